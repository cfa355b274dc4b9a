# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Make training data: pairs of prompt and target as notes, MIDI and codec codes, a dataset as the Hub has it.

    python -m scripts.prepare_dataset --codec runs/codec/codec --midi-root PACK/midi --piano PIANO.tar ... \\
        --split train --items 4000 --output-dir runs/data
    python -m scripts.prepare_dataset --codec CODEC --pairs maestro-v3.0.0/ --split train --output-dir DATA
    hf upload USER/NAME DATA --repo-type dataset --exclude ".*"

An item is a target of one performance and a prompt from elsewhere in the same recording: same piano, same room. With
`--midi-root` performances are rendered; `--pairs` takes real recordings: a folder of MAESTRO, ATEPP or PiJAMA with its
csv, any folder of audio and MIDI files of the same names, or a csv (columns audio, midi, and optionally recording_id,
licence, split). Where nothing says which split a recording is of, one in twenty, at least one, is for validation and
one in twenty for test. What cannot be read is left out and listed with the reason in `skipped.jsonl`. Of a recording
what its MIDI tells is used, up to 3 s behind its last note, without a constant part (DC). Notes last as the pedals have
them; for the published model, which knows no pedal, add `--sustain ignore`. Recordings keep their level; for a model
whose processor corrects that of prompts (`correct_level`, as the starter's does), add `--correct-level`: what is much
softer or louder than its velocities tell is brought to a usual level, by one gain (`gain_db`) for all of a recording.
They are taken to be in time with their MIDI; a dozen are looked at, with a warning if they are not. `--correct-offset`
moves MIDI that is 20 to 300 ms off (`offset_s`), as the processor does, and leaves out what is further off or does not
seem to belong together.

Item i is a function of (seed, i) alone, so rows are as good as shuffled, the number of processes changes nothing, and a
stopped run goes on with the first missing shard. Codes are made by all cores, one item at a time; or on GPUs by
`--device cuda --batch-size 16` (device and batch size may change single codes, by rounding).

More than one machine: `--num-shards N --shard-index I` makes one N-th of the files, on a shared folder or on several
that are copied together; whoever finds all of them writes the card. As a SLURM array, `sbatch --array=0-15` with

    srun python -m scripts.prepare_dataset ... --num-shards $SLURM_ARRAY_TASK_COUNT --shard-index $SLURM_ARRAY_TASK_ID

or by the processes of `datasets`, `command` being a list of the words before `--num-shards`:

    run = lambda row: {"code": subprocess.call([*command, "--num-shards", "16", "--shard-index", str(row["index"])])}
    Dataset.from_dict({"index": range(16)}).map(run, num_proc=16)
"""

import argparse
import multiprocessing
import os
import queue
import re
import signal
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from scripts.audio.pianos import SAMPLING_RATE, SourceError
from scripts.audio.rendered_audio import HOP, onset_roll
from scripts.audio.rooms import ROOM_NAMES, ROOMS
from scripts.dataset.folder import check_folder, finish, flac, midi_bytes, write_shard
from scripts.dataset.paired_recordings import PairedRecordings
from scripts.dataset.recordings import LEAD_S, DataArguments, RenderedRecordings, Window
from scripts.dataset.shards import DEFAULT_SUSTAIN, shard_names
from scripts.models.model_folder import model_folder
from scripts.models.trained_parts import codec_hash, load_part
from scripts.training.processes import follow_parent
from scripts.unfinished import check_output_folder
from scripts.wording import counted
from tokenization import MidiValleTokenizer
from tokenization.midi_midivalle import SUSTAIN_MODES, MidiError

LONGEST_S = 32  # of a sequence of the tokenizer
MOST_SHARDS = 99_999  # of a split: their names have five digits, by which they are found again
WARNED = 3  # recordings that a warning names


def make_rows(recordings, items: range, data: DataArguments, codec, batch_size: int = 1) -> tuple[list, list]:
    """Rows of a shard by column (see `scripts.dataset.folder.features`), and items that could not be made with reasons.

    Args:
        codec: `PianoEncodecModel`; encodes the windows of `batch_size` items at a time.
    """
    tokenizer = MidiValleTokenizer()
    rows, skipped = [], []
    for first in range(items.start, items.stop, batch_size):
        drawn = []
        for index in range(first, min(first + batch_size, items.stop)):
            try:
                drawn.append((index, *recordings.draw(index, data)))
            except MidiError as error:
                skipped.append({"id": index, "reason": str(error)})
        prompts, targets = ([item[i] for item in drawn] for i in (1, 2))
        codes = {"prompt": _encode(codec, prompts), "target": _encode(codec, targets, LEAD_S)}
        for i, (index, prompt, target, about) in enumerate(drawn):
            segments = [(prompt.notes, 0.0, prompt.seconds), (target.notes, 0.0, target.seconds)]
            row = {"id": index, "midi_ids": tokenizer.encode_notes(segments).tolist()} | about
            row |= _columns("prompt", prompt, codes["prompt"][i], 0.0, data.keep_audio)
            row |= _columns("target", target, codes["target"][i], LEAD_S, data.keep_audio)
            row["target_frames"] = round(target.seconds * SAMPLING_RATE / HOP)
            rows.append(row)
    return rows, skipped


def _columns(part: str, window: Window, codes: np.ndarray, lead: float, keep_audio: bool) -> dict:
    """One window; its codes and audio begin `lead` s before it."""
    first, frames = (round(seconds * SAMPLING_RATE / HOP) for seconds in (lead, window.seconds))
    source = window.source.encode(errors="replace").decode()  # parquet has no names that are not UTF-8
    columns = {"source": source, "start_s": window.start, "midi": midi_bytes(window.notes)}
    columns |= {field: window.notes[field].tolist() for field in ("onset", "duration", "pitch", "velocity")}
    columns["codes"] = codes[:, first : first + frames].astype(np.int16).ravel().tolist()
    if keep_audio:
        columns["audio"] = flac(window.wave[first * HOP : (first + frames) * HOP])
    return {f"{part}_{name}": value for name, value in columns.items()}


def _encode(codec, windows: list[Window], lead: float | None = None) -> list[np.ndarray]:
    """Codes (K, T) of each window's audio. With `lead`, the seconds of audio before a window, they are those of its
    notes as played, if the codec has axes for keys: what decoders learn from is not to miss a note that the encoder did
    not hear. A prompt is only heard, as it will be when the model is used."""
    if not windows:
        return []
    waves = [torch.from_numpy(window.wave) for window in windows]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    mask, struck = torch.arange(padded.shape[1]) < torch.tensor([len(wave) for wave in waves])[:, None], None
    if lead is not None and codec.config.num_key_axes:
        struck = np.stack([onset_roll(w.notes, -(-padded.shape[1] // HOP), lead) for w in windows])
        struck = torch.from_numpy(struck.astype(np.float32) / 127).to(codec.device)
    codes = codec.encode_codes(padded[:, None].to(codec.device), mask.to(codec.device), struck).cpu().numpy()
    return [row[:, : -(-len(wave) // HOP)] for row, wave in zip(codes, waves, strict=True)]


def _work(args: argparse.Namespace, data: DataArguments, recordings, shards, done, number: int = 0):
    """Process `number`: takes shard numbers until there are none."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # codes are to be those of the CPU as far as can be
    try:
        device = f"cuda:{number % torch.cuda.device_count()}" if args.device == "cuda" else args.device
        codec = load_part("codec", args.codec).eval().to(device)
        settings = _settings(args, recordings)
        about = {"codec_sha256": settings["codec_sha256"], "num_codebooks": codec.config.num_quantizers}
        about |= {"codebook_size": codec.config.codebook_size, "prompt_seconds": data.prompt_seconds}
        about |= {"target_seconds": data.target_seconds, "split": data.split}
        if data.min_target_seconds is not None:
            about["min_target_seconds"] = data.min_target_seconds
        about |= _choices(args)
        while (shard := shards.get()) is not None:
            rows, skipped = make_rows(recordings, _items(args, shard), data, codec, args.batch_size)
            write_shard(_shard_path(args, shard), rows, data.keep_audio, about, skipped, settings)
            done.put((len(rows), len(skipped)))
    except (ValueError, OSError, RuntimeError) as error:
        done.put(SourceError(" ".join(str(error).split())))  # not all errors can be sent as they are


def _process(args: argparse.Namespace, data: DataArguments, sources, *rest) -> None:
    """`_work`, ended by SIGTERM as by an error: a shard that is half written is cleared away."""
    follow_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _work(args, data, sources.get(), *rest)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyhow, and not in a traceback of its last breath


def _next_result(done, workers: list):
    """What a process reports next; an error if one died without a word, which would otherwise be waited for."""
    while True:
        try:
            return done.get(timeout=1)
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                return SourceError("a process died (see above; out of memory?); start again, finished shards are kept")


def _recordings(args: argparse.Namespace, data: DataArguments):
    if args.pairs:
        return PairedRecordings(args.pairs, args.seed, args.split)
    return RenderedRecordings(args.midi_root, data.split, args.piano, args.room, args.seed)


def _settings(args: argparse.Namespace, recordings) -> dict:
    """What decides the items of the split and their numbers."""
    names = ("items", "prompt_seconds", "target_seconds", "min_target_seconds", "keep_audio")
    settings = {name: getattr(args, name) for name in names} | {"shards": _shard_count(args)}
    return settings | {"codec_sha256": codec_hash(args.codec)} | recordings.settings | _choices(args)


def _choices(args: argparse.Namespace) -> dict:
    """What settings and shards say of pedals and corrections; nothing of what all had before there was a choice."""
    said = {} if args.sustain == DEFAULT_SUSTAIN else {"sustain": args.sustain}
    return said | {name: True for name in ("correct_level", "correct_offset") if getattr(args, name)}


def _shard_count(args: argparse.Namespace) -> int:
    """Of the whole split: enough for `--shard-items`, and divisible as asked for."""
    return -(-args.items // (args.shard_items * args.divisible_by)) * args.divisible_by


def _items(args: argparse.Namespace, shard: int) -> range:
    """Items of a shard; all shards have equally many, or one less."""
    count = _shard_count(args)
    return range(args.items * shard // count, args.items * (shard + 1) // count)


def _shard_path(args: argparse.Namespace, shard: int) -> Path:
    return Path(args.output_dir) / shard_names(args.split, _shard_count(args))[shard]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--codec", required=True, help="codec that makes the codes, or a model with it: folder or Hub id"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--midi-root", help="folder of MIDI files or of a MIDI pack with manifest.csv, to be rendered")
    source.add_argument("--pairs", help="folder or csv of real recordings with their MIDI")
    parser.add_argument("--piano", action="append", default=[], help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--room", action="append", choices=ROOM_NAMES, help="a room to use (default: all but any)")
    parser.add_argument("--split", default="train", help="split of the manifest or table")
    parser.add_argument("--items", type=int, default=1000, help="how many prompt-target items")
    parser.add_argument("--prompt-seconds", type=float, default=6.0, help="s, a multiple of 0.5")
    parser.add_argument("--target-seconds", type=float, default=16.0, help="s, a multiple of 0.5")
    parser.add_argument("--min-target-seconds", type=float, help="targets of drawn lengths from this on, s")
    parser.add_argument(
        "--sustain", choices=SUSTAIN_MODES, default=DEFAULT_SUSTAIN, help="notes as the pedals have them, or not"
    )
    parser.add_argument("--correct-level", action="store_true", help="of recordings, as the processor may of prompts")
    parser.add_argument("--correct-offset", action="store_true", help="between recordings and their MIDI, likewise")
    parser.add_argument("--keep-audio", action="store_true", help="store the audio too, FLAC, 85 MB an hour")
    parser.add_argument("--shard-items", type=int, default=64, help="items of a shard, at most")
    parser.add_argument("--divisible-by", type=int, default=1, help="of the number of shards: processes x workers")
    parser.add_argument("--num-shards", type=int, default=1, help="parts that all the work is divided into")
    parser.add_argument("--shard-index", type=int, default=0, help="which of these parts to do, from 0 on")
    parser.add_argument(
        "--max-skipped", type=float, default=0.1, help="share of skipped items above which to exit with 1"
    )
    cores = len(os.sched_getaffinity(0))  # that may be used: a job of a cluster has not all of its machine
    parser.add_argument("--processes", type=int, default=cores, help="processes, one core each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to encode; GPUs are shared out")
    parser.add_argument("--batch-size", type=int, default=1, help="items encoded at a time; 1 is best on CPUs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", required=True)
    args = parser.parse_args(argv)
    args.room = args.room or list(ROOMS)
    if args.midi_root and not args.piano:
        parser.error("--midi-root needs at least one --piano")
    if args.midi_root and (args.correct_level or args.correct_offset):
        parser.error("--correct-level and --correct-offset are for --pairs: what is rendered needs neither")
    if any(s % 0.5 for s in (args.prompt_seconds, args.target_seconds, args.min_target_seconds or 0)):
        parser.error("--prompt-seconds, --target-seconds and --min-target-seconds must be multiples of 0.5")
    shortest = args.target_seconds if args.min_target_seconds is None else args.min_target_seconds
    if not 0 < shortest <= args.target_seconds or args.prompt_seconds <= 0:
        parser.error("0 < --min-target-seconds <= --target-seconds, and --prompt-seconds above 0")
    if args.prompt_seconds + args.target_seconds > LONGEST_S:
        parser.error(f"--prompt-seconds and --target-seconds together must be at most {LONGEST_S}")
    if min(args.items, args.shard_items, args.divisible_by, args.batch_size, args.processes) < 1:
        parser.error("--items, --shard-items, --divisible-by, --batch-size and --processes must be at least 1")
    if _shard_count(args) > MOST_SHARDS:
        parser.error(f"--items: {_shard_count(args)} shards, of which {MOST_SHARDS} can be named; raise --shard-items")
    if args.seed < 0 or not 0 <= args.max_skipped <= 1:
        parser.error("--seed must be at least 0, --max-skipped from 0 to 1")
    if not re.fullmatch(r"[\w.-]+", args.split):
        parser.error(f"--split {args.split!r}: names files; give letters, digits, - and _")
    if not 0 <= args.shard_index < args.num_shards:
        parser.error("--shard-index must be from 0 to --num-shards - 1")
    return args


def data_arguments(args: argparse.Namespace) -> DataArguments:
    """What the command line says of the items."""
    return DataArguments(**{field.name: getattr(args, field.name) for field in fields(DataArguments)})


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 1 if too much had to be skipped, 2 on input that cannot be used."""
    args = parse(argv)
    data = data_arguments(args)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SourceError("--device cuda: no GPU is available")
        check_output_folder(args.output_dir)
        args.codec = str(model_folder(args.codec, "--codec"))
        recordings = _recordings(args, data)
        settings, excluded = _settings(args, recordings), recordings.excluded  # before any process is started
        load_part("codec", args.codec)  # what is wrong with it, too
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        check_folder(Path(args.output_dir), args.split, settings)
        mine = range(args.shard_index, _shard_count(args), args.num_shards)
        todo = [shard for shard in mine if not _shard_path(args, shard).is_file()]
        if todo and args.pairs and not args.correct_offset:
            _warn_of_offsets(recordings, args.sustain)
        _make(todo, args, data, recordings)
        tally = finish(Path(args.output_dir), excluded)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start it again to go on: finished shards are kept", file=sys.stderr)
        return 130
    if args.split not in tally:
        print(f"part {args.shard_index} of {args.num_shards} is done; the card is written when all shards are there")
        return 0
    rows, reasons = tally[args.split]
    skipped = sum(reasons.values())
    for reason, count in reasons.most_common(10):
        print(f"skipped {counted(count, 'item')}: {reason}", file=sys.stderr)
    left_out = f", {counted(len(excluded), 'recording')} left out" if excluded else ""
    listed = " (see skipped.jsonl)" if skipped or excluded else ""
    print(f"{counted(rows, 'item')} made, {skipped} skipped{left_out}{listed}, in {args.output_dir}")
    if skipped > args.max_skipped * (rows + skipped):
        print(f"error: more than {args.max_skipped:.0%} of the items were skipped (--max-skipped)", file=sys.stderr)
        return 1
    return 0


def _warn_of_offsets(recordings: PairedRecordings, sustain: str) -> None:
    """Say what is not in time, before it is learned from as it is."""
    looked_at, found = recordings.out_of_time(sustain)
    if found:
        said = "; ".join(found[:WARNED]) + (f"; and {len(found) - WARNED} more" if len(found) > WARNED else "")
        begin = (
            f"warning: of {counted(looked_at, 'recording')} looked at, {len(found)} not in time with the MIDI ({said})"
        )
        print(f"{begin}: --correct-offset moves such MIDI or leaves it out", file=sys.stderr)


def _make(shards: list[int], args: argparse.Namespace, data: DataArguments, recordings) -> None:
    """Make these shards by `args.processes` processes; raises the error that stopped one of them."""
    context = multiprocessing.get_context("spawn")
    sources, todo, done = context.Queue(), context.Queue(), context.Queue()
    for waiting in (sources, todo):
        waiting.cancel_join_thread()  # else who is interrupted waits for shards to be taken that nobody will take
    count = min(args.processes, len(shards))
    for shard in shards + [None] * count:
        todo.put(shard)
    for _ in range(count):  # not as an argument: each process would only be started when the one before has read it
        sources.put(recordings)
    work = {"target": _process, "daemon": True}  # daemons do not outlive an interrupt
    workers = [context.Process(args=(args, data, sources, todo, done, number), **work) for number in range(count)]
    for worker in workers:
        worker.start()
    try:
        with tqdm(shards, unit="shard") as bar:
            for _ in bar:
                result = _next_result(done, workers)
                if isinstance(result, Exception):
                    raise result
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()


if __name__ == "__main__":
    sys.exit(main())
