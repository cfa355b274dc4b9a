# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Make training data: pairs of prompt and target as notes and codec codes, in parquet shards.

    python -m scripts.prepare_dataset --codec runs/codec/codec --midi-root PACK/midi --piano PIANO.tar ... \
        --split train --items 4000 --output-dir runs/data/train
    python -m scripts.prepare_dataset --codec CODEC --pairs pairs.csv --split train --output-dir DATA

An item is a target of one performance and a prompt from elsewhere in the same recording: same piano, same room. With
`--midi-root` performances are rendered; `pairs.csv` (columns audio, midi, and optionally recording_id, licence) names
real recordings instead. Item i is a function of (seed, i) alone, so the number of processes changes nothing, and a
stopped run goes on with the first missing shard.
"""

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import queue
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from safetensors import safe_open
from tqdm import tqdm

from scripts.pianos import SAMPLING_RATE, RenderError, load_piano, performance_level
from scripts.rendered_audio import HOP, MidiFile, list_midi, record
from scripts.rooms import ROOMS, Room, without_clipping
from tokenization.midi_midivalle import MidiError, load_performance

LEAD_S, TAIL_S = 1.0, 0.5  # encoded around a target and cut off: a target stands inside running music
MIN_PROMPT_NOTES = 5


@dataclass
class DataArguments:
    """What an item holds; the same numbers give the same data."""

    split: str
    prompt_seconds: float
    target_seconds: float
    seed: int
    keep_audio: bool


@dataclass
class Window:
    """One stretch of a recording: notes relative to its start (before 0: still sounding), audio around it."""

    notes: np.ndarray
    wave: np.ndarray
    source: str
    start: float


class RenderedRecordings:
    """Recordings made from MIDI: item i draws piano, room, target and prompt from (seed, i)."""

    def __init__(self, midi_root: str, split: str, pianos: list[str], rooms: list[str], seed: int):
        self.root, self.files, self.pianos, self.rooms = midi_root, list_midi(midi_root, split), pianos, rooms
        self.seed = seed
        durations = np.array([max(f.duration, 1.0) for f in self.files])
        self.weights = durations / durations.sum()
        self.performances = {}
        self.compositions = {file.composition_id for file in self.files}

    def draw(self, index: int, data: DataArguments) -> tuple[Window, Window, dict]:
        """Prompt and target windows of item `index`, and its provenance."""
        rng = np.random.default_rng([self.seed, index])
        piano, preset = self.pianos[rng.integers(len(self.pianos))], self.rooms[rng.integers(len(self.rooms))]
        room_seed = int(rng.integers(2**31))
        room = Room(preset, room_seed)
        target = self.files[rng.choice(len(self.files), p=self.weights)]
        # half of the prompts are of another piece: that is what users bring
        prompt = target if rng.random() < 0.5 and data.split == "train" else self._other(target, rng)
        # one gain for both, as in a recording session: only then does the prompt tell how loud a velocity is
        level, parts, waves = performance_level(self._notes(target)), [], []
        for file, seconds in ((prompt, data.prompt_seconds), (target, data.target_seconds)):
            notes = self._notes(file)
            start = self._start(notes, seconds, rng, full=file is prompt and len(parts) == 0)
            lead, tail = (LEAD_S, TAIL_S) if len(parts) else (0.0, 0.0)
            waves.append(record(notes, start - lead, seconds + lead + tail, piano, room, level, rng))
            parts.append(Window(_relative(notes, start, seconds), waves[-1], file.path, start))
        for part, wave in zip(parts, without_clipping(*waves), strict=True):
            part.wave = wave
        recording = f"{load_piano(str(piano)).name}/{preset}/{room_seed}"
        licences = sorted({prompt.licence, target.licence})
        about = {"recording_id": recording, "piano": load_piano(str(piano)).name, "room": preset}
        return parts[0], parts[1], about | {"licence": "; ".join(licences)}

    def _other(self, target: MidiFile, rng: np.random.Generator) -> MidiFile:
        while len(self.compositions) > 1:
            file = self.files[rng.choice(len(self.files), p=self.weights)]
            if file.composition_id != target.composition_id:
                return file
        return target

    def _notes(self, file: MidiFile) -> np.ndarray:
        if file.path not in self.performances:
            self.performances[file.path] = file.load(self.root).notes
        return self.performances[file.path]

    def _start(self, notes: np.ndarray, seconds: float, rng: np.random.Generator, full: bool) -> float:
        """A start, s: prompts are full of notes; targets also take the silence before a piece and its last ring."""
        end = float((notes["onset"] + notes["duration"]).max())
        if not full and rng.random() < 0.08:
            return 0.0
        for _ in range(20):
            start = float(rng.uniform(0, max(end - seconds * (1.0 if full else 0.6), 0.01)))
            struck = (notes["onset"] >= start) & (notes["onset"] < start + seconds)
            if struck.sum() >= MIN_PROMPT_NOTES:
                break
        return start


class PairedRecordings:
    """Real recordings with their MIDI, from a csv; item i draws a recording and two windows from (seed, i)."""

    def __init__(self, pairs: str, seed: int):
        with open(pairs, newline="") as f:
            self.rows = list(csv.DictReader(f))
        self.base, self.seed = Path(pairs).parent, seed
        if not self.rows or not {"audio", "midi"} <= set(self.rows[0]):
            raise MidiError(f"{pairs}: expected columns audio, midi (and optionally recording_id, licence) and one row")

    def draw(self, index: int, data: DataArguments) -> tuple[Window, Window, dict]:
        """Prompt and target windows of item `index`, and its provenance."""
        import soxr

        rng = np.random.default_rng([self.seed, index])
        row = self.rows[rng.integers(len(self.rows))]
        notes = load_performance(self.base / row["midi"]).notes
        try:
            wave, rate = soundfile.read(self.base / row["audio"], dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise MidiError(f"{row['audio']}: cannot be read as audio ({error})") from error
        wave = soxr.resample(wave.mean(1), rate, SAMPLING_RATE).astype(np.float32)
        length = len(wave) / SAMPLING_RATE
        need = data.prompt_seconds + data.target_seconds
        if length < need:
            what = f"{length:.1f} s, but an item needs {need:.1f} s"
            raise MidiError(f"{row['audio']}: {what} (shorten --target-seconds)")
        start = float(rng.uniform(0, length - data.target_seconds))
        if max(start, length - start - data.target_seconds) < data.prompt_seconds:  # no room on either side
            start = float(rng.uniform(data.prompt_seconds, length - data.target_seconds))
        before, after = start - data.prompt_seconds, length - start - data.target_seconds - data.prompt_seconds
        if after < 0 or rng.random() * (max(before, 0) + after) < before:
            prompt_start = float(rng.uniform(0, max(before, 0)))
        else:
            prompt_start = start + data.target_seconds + float(rng.uniform(0, max(after, 0)))
        prompt = self._window(notes, wave, row, prompt_start, data.prompt_seconds, 0, 0)
        target = self._window(notes, wave, row, start, data.target_seconds, LEAD_S, TAIL_S)
        about = {"recording_id": row.get("recording_id") or row["audio"], "piano": "", "room": ""}
        return prompt, target, about | {"licence": row.get("licence") or "unknown"}

    @staticmethod
    def _window(notes, wave, row, start, seconds, lead, tail) -> Window:
        first = round((start - lead) * SAMPLING_RATE)
        size = round((seconds + lead + tail) * SAMPLING_RATE)
        padded = np.pad(wave[max(first, 0) : first + size], (max(-first, 0), 0))
        padded = np.pad(padded, (0, size - len(padded)))
        return Window(_relative(notes, start, seconds), padded, row["midi"], start)


def codec_hash(folder: str | Path) -> str:
    """sha256 of what decides a codec's codes: encoder and codebooks. Its decoder may go on learning."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise RenderError(f"{folder}: holds no model.safetensors, so it is not a codec folder")
    digest = hashlib.sha256()
    with safe_open(path, "numpy") as tensors:
        for name in sorted(tensors.keys()):
            if name.startswith("encoder.") or name.endswith("codebook.embed"):
                digest.update(name.encode() + tensors.get_tensor(name).tobytes())
    return digest.hexdigest()


def make_item(recordings, index: int, data: DataArguments, codec) -> dict:
    """One row of the data set: notes as columns (s, relative to their window), codes int16 (K * T,)."""
    prompt, target, about = recordings.draw(index, data)
    lead = round(LEAD_S * SAMPLING_RATE / HOP)
    frames = round(data.target_seconds * SAMPLING_RATE / HOP)
    row = {"id": index} | about
    codes = {"prompt": _encode(codec, prompt.wave), "target": _encode(codec, target.wave)[:, lead : lead + frames]}
    for name, window in (("prompt", prompt), ("target", target)):
        row[f"{name}_source"], row[f"{name}_start_s"] = window.source, window.start
        for field in ("onset", "duration", "pitch", "velocity"):
            row[f"{name}_{field}"] = window.notes[field].tolist()
        row[f"{name}_codes"] = codes[name].astype(np.int16).ravel().tolist()
        if data.keep_audio:
            lead_s = LEAD_S if name == "target" else 0.0
            seconds = data.target_seconds if name == "target" else data.prompt_seconds
            row[f"{name}_audio"] = _flac(window.wave[round(lead_s * SAMPLING_RATE) :][: round(seconds * SAMPLING_RATE)])
    return row


def schema(data: DataArguments, about: dict) -> pa.Schema:
    """Columns of a shard; `about` (codec hash, seconds, codebooks) is kept as its metadata."""
    columns = [("id", pa.int64())] + [(name, pa.string()) for name in ("recording_id", "piano", "room", "licence")]
    for name in ("prompt", "target"):
        columns += [(f"{name}_source", pa.string()), (f"{name}_start_s", pa.float64())]
        columns += [(f"{name}_{f}", pa.list_(pa.float64())) for f in ("onset", "duration")]
        columns += [(f"{name}_{f}", pa.list_(pa.int16())) for f in ("pitch", "velocity", "codes")]
        if data.keep_audio:
            columns.append((f"{name}_audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    return pa.schema(columns, metadata={"midivalle": json.dumps(about)})


def write_shard(path: Path, rows: list[dict], schema: pa.Schema) -> None:
    """Atomic parquet file."""
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")
    os.replace(temporary, path)


def _relative(notes: np.ndarray, start: float, seconds: float) -> np.ndarray:
    """Notes that are struck or still sound in the window, times relative to its start."""
    part = notes[(notes["onset"] < start + seconds) & (notes["onset"] + notes["duration"] > start)].copy()
    part["onset"] -= start
    return part


def _encode(codec, wave: np.ndarray) -> np.ndarray:
    import torch

    return codec.encode_codes(torch.from_numpy(wave)[None, None])[0].numpy()


def _flac(wave: np.ndarray) -> dict:
    """Audio as `datasets.Audio` stores it; written plainly, because its own encoder needs torchcodec."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return {"bytes": buffer.getvalue(), "path": None}


def _work(args: argparse.Namespace, data: DataArguments, shards, done):
    """One process: takes shard numbers until there are none."""
    import torch

    from modeling_midivalle import PianoEncodecModel

    torch.set_num_threads(1)
    try:
        codec = PianoEncodecModel.from_pretrained(args.codec, dtype=torch.float32).eval()
        recordings = _recordings(args, data)
        about = {"codec_sha256": codec_hash(args.codec), "num_codebooks": codec.config.num_quantizers}
        about |= {"prompt_seconds": data.prompt_seconds, "target_seconds": data.target_seconds, "split": data.split}
        while (shard := shards.get()) is not None:
            rows, skipped = [], []
            for index in range(shard * args.shard_items, min((shard + 1) * args.shard_items, args.items)):
                try:
                    rows.append(make_item(recordings, index, data, codec))
                except MidiError as error:
                    skipped.append({"id": index, "reason": str(error)})
            if skipped:
                with open(Path(args.output_dir) / "skipped.jsonl", "a") as f:
                    f.writelines(json.dumps(row) + "\n" for row in skipped)
            write_shard(_shard_path(args, shard), rows, schema(data, about))
            done.put((len(rows), len(skipped)))
    except (ValueError, OSError) as error:
        done.put(error)


def _next_result(done, workers: list):
    """What a process reports next; an error if one died without a word, which would otherwise be waited for."""
    while True:
        try:
            return done.get(timeout=5)
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                return RenderError("a process died (see above; out of memory?); start again, finished shards are kept")


def _recordings(args: argparse.Namespace, data: DataArguments):
    if args.pairs:
        return PairedRecordings(args.pairs, args.seed)
    return RenderedRecordings(args.midi_root, data.split, args.piano, args.room, args.seed)


def _shard_path(args: argparse.Namespace, shard: int) -> Path:
    return Path(args.output_dir) / f"{args.split}-{shard:05d}-of-{-(-args.items // args.shard_items):05d}.parquet"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", required=True, help="folder of the codec that makes the codes")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--midi-root", help="folder of MIDI files or of a MIDI pack with manifest.csv, to be rendered")
    source.add_argument("--pairs", help="csv of real recordings: columns audio, midi")
    parser.add_argument("--piano", action="append", default=[], help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--room", action="append", choices=tuple(ROOMS), help="a room to use (default: all)")
    parser.add_argument("--split", default="train", help="split of the manifest")
    parser.add_argument("--items", type=int, default=1000, help="how many prompt-target items")
    parser.add_argument("--prompt-seconds", type=float, default=6.0, help="s, a multiple of 0.5")
    parser.add_argument("--target-seconds", type=float, default=16.0, help="s, a multiple of 0.5")
    parser.add_argument("--keep-audio", action="store_true", help="store the audio too, FLAC, 85 MB an hour")
    parser.add_argument("--shard-items", type=int, default=64, help="items of a shard")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes, one core each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", required=True)
    args = parser.parse_args(argv)
    args.room = args.room or list(ROOMS)
    if args.midi_root and not args.piano:
        parser.error("--midi-root needs at least one --piano")
    if (args.prompt_seconds * 2) % 1 or (args.target_seconds * 2) % 1:
        parser.error("--prompt-seconds and --target-seconds must be multiples of 0.5")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    args = parse(argv)
    data = DataArguments(args.split, args.prompt_seconds, args.target_seconds, args.seed, args.keep_audio)
    try:
        codec_hash(args.codec)  # before any process is started
    except RenderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    shards, done = context.Queue(), context.Queue()
    missing = [s for s in range(-(-args.items // args.shard_items)) if not _shard_path(args, s).is_file()]
    processes = min(args.processes, len(missing))
    for shard in missing + [None] * processes:
        shards.put(shard)
    workers = [context.Process(target=_work, args=(args, data, shards, done)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    made = skipped = 0
    for _ in (bar := tqdm(missing, unit="shard")):
        result = _next_result(done, workers)
        if isinstance(result, Exception):
            bar.close()
            for worker in workers:
                worker.terminate()
            print(f"error: {result}", file=sys.stderr)
            return 2
        made, skipped = made + result[0], skipped + result[1]
    for worker in workers:
        worker.join()
    print(f"{made} items made, {skipped} skipped (see skipped.jsonl), in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
