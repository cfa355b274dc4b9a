# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Whole pieces: length, drift, joins, memory, first audio, and prompts that are not in time with their MIDI.

    python -m scripts.evaluate_long --midi-root PACK/midi --minutes 2 5 12 30 --output-dir OUT
    python -m scripts.evaluate_long --midi-root PACK/midi --minutes 5 --parallel --output-dir OUT_PARALLEL
    python -m scripts.evaluate_long --midi-root PACK/midi --offsets 0 50 100 200 --output-dir OUT

A piece is a performance of the test split of about that length, or a recital of several; its first minute is played
again at its end, so that the first and the last minute differ by nothing but the time between. It is rendered by
`scripts.render` in a process of its own. Notes are read off by the transcriber of `make install-eval`, of long pieces
the first and last minutes only (`--transcribe-minutes`). Nothing is generated anew for its result.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

from processing import Prompt, read_audio, to_mono_32k
from scripts.audio.rendered_audio import list_midi
from scripts.dataset.folder import midi_bytes
from scripts.evaluate import EvaluationError, check_output
from scripts.measuring.metrics import timbre_distance
from scripts.measuring.note_onsets.scores import match_onsets, note_scores
from scripts.measuring.transcription import Transcriber
from scripts.models.model_folder import (
    DEFAULT_MODEL,
    choose_prompt,
    load_model,
    load_processor,
    model_folder,
    read_prompts,
)
from scripts.rendering.journal import journal_path
from scripts.rendering.manifest import file_sha256, software, weights_sha256
from scripts.rendering.pieces import render_wave
from scripts.training.processes import FolderLock
from scripts.unfinished import write_json
from tokenization import Performance, load_performance

RATE = 32_000
MINUTE_S = 60.0
PAUSE_S = 2.0  # between the pieces of a recital
JOIN_S = 0.5  # on both sides of a join: "the second around it"
BLOCK_S, MARGIN_S = 60.0, 3.0  # the transcriber hears a minute at a time, and a little around it
PLACES = 2000  # random places that joins are compared with
SHORTEST = 1.2  # minutes of a piece: with what is found of about that length it has a first and a last minute
LONG, OFFSETS = "long.json", "offsets.json"
# Runs a command and says its peak memory, KiB. A peak counts what a process was forked from: this is small, and what
# measures here is not.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
if not code:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def make_piece(root: str, minutes: float, seed: int) -> tuple[np.ndarray, list[str]]:
    """Notes of a piece of about so many minutes, its first minute again at the end; and the files it is made of."""
    files = sorted(list_midi(root, "test", hold_out=False), key=lambda file: file.path)
    wanted = minutes * MINUTE_S
    near = [file for file in files if 0.9 * wanted <= file.duration <= 1.1 * wanted]
    rng = np.random.default_rng([seed, round(minutes)])
    order = [near[rng.integers(len(near))]] if near else [files[i] for i in rng.permutation(len(files))]
    parts, names, end = [], [], 0.0
    for file in order:
        notes = file.load(root).notes.copy()
        notes["onset"] += end - notes["onset"].min() + (PAUSE_S if parts else 0.0)
        end = float((notes["onset"] + notes["duration"]).max())
        parts.append(notes)
        names.append(file.path)
        if end >= 0.9 * wanted:
            break
    if not near and end < 0.9 * wanted:
        raise EvaluationError(
            f"--minutes {minutes:g}: the test split of {root} lasts {end / MINUTE_S:.1f}; give fewer, or more files"
        )
    again = np.concatenate(parts)
    again = again[again["onset"] < MINUTE_S].copy()
    again["duration"] = np.minimum(again["duration"], MINUTE_S - again["onset"])
    again["onset"] += np.ceil(end + PAUSE_S) - again["onset"].min()
    notes = np.concatenate([*parts, again])
    return np.sort(notes, order=("onset", "pitch", "duration")), names


def last_minute(notes: np.ndarray) -> tuple[float, float]:
    """From when to when, s, the first minute of the notes of `make_piece` is played again."""
    again = notes[-(notes["onset"] < MINUTE_S).sum() :]
    return float(np.round(again["onset"][0])), float((again["onset"] + again["duration"]).max())


def run_render(*arguments: str) -> tuple[float, float]:
    """Run `scripts.render`: seconds it took, its peak memory in MiB."""
    begin, words = time.perf_counter(), ["scripts.render", *arguments]
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-m", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode(errors="replace").splitlines()
    refuse_failed(done.returncode, words, said)
    return time.perf_counter() - begin, int(said[-1]) / 1024


def refuse_failed(code: int, words: list[str], said: list[str]) -> None:
    """EvaluationError if the render of a command's `words` has failed, with the last of the lines that it `said`."""
    if code:
        raise EvaluationError(f"{' '.join(words)}: ended with exit code {code}: {''.join(said[-1:])}")


def windows_of(sound: Path, wanted: list) -> list[list[float]]:
    """The windows that a sound was rendered in, by its manifest.

    Args:
        wanted: what it must have been made of: sha256 of the MIDI file, of the prompt's files and of the model, and
            whether `--parallel`.
    Raises:
        EvaluationError: it was made of something else, or there is no manifest.
    """
    manifest = sound.with_suffix(".json")
    try:
        recipe = json.loads(manifest.read_text())["recipe"]
        made_of = [recipe["midi"], *recipe["prompt"]["files"], recipe["weights_sha256"], recipe["settings"]["parallel"]]
        windows = recipe["windows"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EvaluationError(f"{manifest}: is no manifest of scripts.render; leave out --reuse") from error
    if made_of != wanted:
        other = "of other notes, with another prompt or model, or --parallel is not as it was"
        raise EvaluationError(f"{sound}: was made {other}; give what it was made of, or leave out --reuse")
    return windows


def transcribe(transcriber, wave: np.ndarray, spans: list[tuple[float, float]]) -> np.ndarray:
    """Notes with onset in the `spans`, a minute at a time."""
    found = []
    for start, end in spans:
        for first in np.arange(start, end, BLOCK_S):
            last = min(first + BLOCK_S, end)
            begin = max(first - MARGIN_S, 0.0)
            notes = transcriber(wave[round(begin * RATE) : round((last + MARGIN_S) * RATE)], RATE)
            notes["onset"] += begin
            found.append(notes[(notes["onset"] >= first) & (notes["onset"] < last)])
    return np.concatenate(found)


def onset_scores(reference: np.ndarray, estimate: np.ndarray, joins: np.ndarray) -> dict[str, float]:
    """Onset F1 of the notes near a join and of the others, and how many there are of the former."""
    matched = match_onsets(reference, estimate, 0.05)
    result = {}

    def near(notes: np.ndarray) -> np.ndarray:
        return (np.abs(notes["onset"][:, None] - joins[None]) <= JOIN_S).any(1)

    near_r, near_e = near(reference), near(estimate)
    for r, e in matched:  # what is heard of a note counts where the note lies
        near_e[e] = near_r[r]
    for name, flag in (("joins", True), ("elsewhere", False)):
        hits = sum(near_r[r] == flag for r, _ in matched)
        counted = int((near_r == flag).sum() + (near_e == flag).sum())
        result[f"f1_{name}"] = 2 * hits / counted if counted else float("nan")
    return result | {"notes_near_joins": int(near_r.sum())}


def jumps(wave: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At each place (s): step of energy and mean step of log-mel bands, dB, from 40 ms before to 40 ms after it."""
    from transformers.audio_utils import mel_filter_bank

    size = round(0.04 * RATE)
    bank = mel_filter_bank(size // 2 + 1, 40, 50.0, RATE / 2, RATE, norm=None, mel_scale="htk")
    sides = []
    for shift in (-size, 0):
        starts = np.round(places * RATE).astype(int) + shift
        parts = np.stack([wave[start : start + size] for start in starts])
        power = np.abs(np.fft.rfft(parts * np.hanning(size))) ** 2
        sides.append((10 * np.log10(np.square(parts).mean(1) + 1e-9), 10 * np.log10(power @ bank + 1e-6)))
    (energy_0, mel_0), (energy_1, mel_1) = sides
    return np.abs(energy_1 - energy_0), np.abs(mel_1 - mel_0).mean(1)


def measure(args: argparse.Namespace, transcriber, minutes: float) -> dict:
    """Render one piece and measure it."""
    folder = Path(args.output_dir)
    midi, output = folder / f"{minutes:g}min.mid", folder / f"{minutes:g}min.wav"
    notes, names = make_piece(args.midi_root, minutes, args.seed)
    content = midi_bytes(notes)
    piece = load_performance(content, name=midi.name)
    _, prompt_files = choose_prompt(Path(args.model), args.prompt)
    prompt = to_mono_32k(*read_audio(prompt_files[1]))
    wanted = [hashlib.sha256(content).hexdigest(), *map(file_sha256, prompt_files)]
    wanted += [weights_sha256(Path(args.model)), args.parallel]
    options = ["--model", args.model, "--prompt", args.prompt, "--ring-out", "2", "--force"]
    options += ["--parallel"] if args.parallel else []
    took = memory = float("nan")
    if not (args.reuse and output.exists()):
        midi.write_bytes(content)
        journal_path(output).unlink(missing_ok=True)  # windows that an interrupted render has left would save time
        took, memory = run_render(str(midi), str(output), *options)
    wave, _ = soundfile.read(output, dtype="float32")  # `read_audio` takes no more than 52 minutes
    total = piece.end + 2.0
    windows = windows_of(output, wanted)
    joins = np.array([start for start, _ in windows[1:]])
    head, tail = (0.0, MINUTE_S), last_minute(piece.notes)
    half = args.transcribe_minutes * MINUTE_S / 2
    spans = [(0.0, piece.end)] if 2 * half >= piece.end else [(0.0, half), (piece.end - half, piece.end)]
    heard = transcribe(transcriber, wave, spans)
    inside = np.any([(piece.notes["onset"] >= a) & (piece.notes["onset"] < b) for a, b in spans], 0)
    result = {"minutes": minutes, "files": names, "seconds": total, "notes": len(piece.notes), "windows": len(windows)}
    result |= {"length_error_ms": abs(len(wave) / RATE - total) * 1000, "peak_mib": memory, "render_s": took}
    result |= {"f1": note_scores(piece.notes[inside], heard)["f1"]}
    result |= onset_scores(piece.notes[inside], heard, joins)
    for name, (start, end) in (("first", head), ("last", tail)):
        parts = [n[(n["onset"] >= start) & (n["onset"] < end)] for n in (piece.notes, heard)]
        scores = note_scores(*parts)
        result |= {f"f1_{name}_minute": scores["f1"], f"bias_{name}_minute_ms": scores["onset_bias_ms"]}
        result[f"timbre_{name}_minute_db"] = timbre_distance(prompt, wave[round(start * RATE) : round(end * RATE)])
    rng = np.random.default_rng(args.seed)
    places = rng.uniform(1.0, piece.end - 1.0, PLACES)
    for name, at_joins, elsewhere in zip(("energy", "mel"), jumps(wave, joins), jumps(wave, places), strict=True):
        limit = float(np.percentile(elsewhere, 95))
        result |= {f"{name}_step_joins_db": float(np.median(at_joins)), f"{name}_step_95_db": limit}
        result |= {f"{name}_step_median_db": float(np.median(elsewhere))}
        result |= {f"{name}_step_joins_95_db": float(np.percentile(at_joins, 95))}
        result[f"{name}_share_above"] = float((at_joins > limit).mean())
    return result


def measure_first_audio(args: argparse.Namespace, midi: Path) -> dict:
    """Seconds from the start of the command to the first audio, and what the command says of it."""
    begin = time.perf_counter()
    options = ["--model", args.model, "--prompt", args.prompt, "--stream", "-", "--raw", "--end", "60"]
    words = ["scripts.render", str(midi), *options]
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(2)
    first = time.perf_counter() - begin
    _, said = process.communicate()
    refuse_failed(process.returncode, words, said.decode(errors="replace").splitlines())
    line = [line for line in said.decode().splitlines() if "first audio" in line]
    return {"first_audio_of_the_command_s": first, "said": line[-1] if line else said.decode()[-200:]}


def measure_offsets(args: argparse.Namespace, transcriber) -> list[dict]:
    """Onset F1 and bias of excerpts behind prompts whose MIDI is early by each offset, corrected and not; their means.
    All is written after each excerpt."""
    processor, model = load_processor(Path(args.model)), load_model(Path(args.model), "cpu")
    files = sorted(list_midi(args.midi_root, "test", hold_out=False), key=lambda file: file.path)
    rng, rows = np.random.default_rng([args.seed, 1]), []
    prompts = [entry.name for entry in read_prompts(Path(args.model))]
    about = {"settings": vars(args), "made_with": software() | {"weights_sha256": weights_sha256(Path(args.model))}}
    for number in range(args.excerpts):
        file = files[rng.integers(len(files))]
        whole = file.load(args.midi_root)
        start = float(rng.uniform(0, max(whole.end - args.seconds, 0.1)))
        piece = processor.load(whole, start=start, end=start + args.seconds)
        struck = piece.notes[piece.notes["onset"] >= 0]
        if not len(struck):  # even the truth would score 0
            where = f"excerpt {number}, {file.path} from {start:.1f} s on"
            raise EvaluationError(f"{where}: no note is struck in it; give longer --seconds or another --seed")
        name = prompts[number % len(prompts)]
        wave = to_mono_32k(*read_audio(Path(args.model) / "prompts" / f"{name}.flac"))
        true = load_performance(Path(args.model) / "prompts" / f"{name}.mid")
        for offset in args.offsets:
            notes = true.notes.copy()
            notes["onset"] -= offset / 1000
            early = Performance(notes, name, true.report)
            corrected = processor.prepare_prompt(early, wave, RATE)
            for kind, prompt in (("as given", Prompt(corrected.wave, notes)), ("corrected", corrected)):
                audio = render_wave(model, processor, piece, prompt, args.seed, 0.0, {})
                scores = note_scores(struck, transcriber(audio, RATE))
                row = {"excerpt": number, "prompt": name, "offset_ms": offset, "kind": kind}
                row |= {"measured_ms": corrected.offset * 1000}
                rows.append(row | {key: scores[key] for key in ("f1", "onset_bias_ms")})
                print(rows[-1], flush=True)
        summary = summarise_offsets(rows)
        write_json(Path(args.output_dir) / OFFSETS, about | {"summary": summary, "rows": rows})
    return summary


def summarise_offsets(rows: list[dict]) -> list[dict]:
    """Means over the excerpts by offset and kind."""
    groups = {}
    for row in rows:
        groups.setdefault((row["offset_ms"], row["kind"]), []).append(row)
    return [
        {"offset_ms": offset, "kind": kind, "n": len(group)}
        | {key: float(np.nanmean([row[key] for row in group])) for key in ("f1", "onset_bias_ms", "measured_ms")}
        for (offset, kind), group in sorted(groups.items())
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model folder (default: %(default)s)")
    parser.add_argument("--midi-root", required=True, help="MIDI pack with manifest.csv, or a folder of MIDI files")
    parser.add_argument("--prompt", default="steinway_studio", help="a bundled prompt (default: %(default)s)")
    parser.add_argument("--minutes", type=float, nargs="*", default=[], help="lengths of the pieces")
    parser.add_argument("--transcribe-minutes", type=float, default=8.0, help="of each piece (default: %(default)s)")
    parser.add_argument("--parallel", action="store_true", help="rendered so: what that costs at the joins")
    parser.add_argument("--reuse", action="store_true", help="measure sounds that are in OUTPUT_DIR already")
    parser.add_argument("--offsets", type=float, nargs="*", default=[], help="of prompt MIDI, ms")
    parser.add_argument("--excerpts", type=int, default=4, help="for --offsets (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of an excerpt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", required=True, help="long.json, offsets.json and the sounds go here")
    args = parser.parse_args(argv)
    if not (args.minutes or args.offsets):
        parser.error("nothing to do: give --minutes or --offsets")
    of_minutes, of_offsets = ("prompt", "transcribe_minutes", "parallel", "reuse"), ("excerpts", "seconds")
    for given, needed, names in ((args.minutes, "--minutes", of_minutes), (args.offsets, "--offsets", of_offsets)):
        for name in names:
            if not given and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for {needed}")
    if not args.transcribe_minutes >= 2:
        parser.error("--transcribe-minutes must be at least 2: the first and the last minute are compared")
    if not all(SHORTEST <= minutes < math.inf for minutes in args.minutes):
        parser.error(f"--minutes must be at least {SHORTEST}: the first and the last minute are compared")
    if not all(map(math.isfinite, args.offsets)):
        parser.error("--offsets must be numbers, in ms")
    if not 0 < args.seconds < math.inf or args.excerpts < 1 or args.seed < 0:
        parser.error("--seconds must be above 0, --excerpts at least 1, --seed at least 0")
    return args


def measure_pieces(args: argparse.Namespace, transcriber) -> None:
    """Render and measure pieces of all `minutes`; what is done is written after each."""
    folder, pieces = Path(args.output_dir), []
    for minutes in args.minutes:
        pieces.append(measure(args, transcriber, minutes))
        print(json.dumps(pieces[-1], indent=1), flush=True)
        write_json(folder / LONG, {"settings": vars(args), "pieces": pieces})
    first = measure_first_audio(args, folder / f"{args.minutes[0]:g}min.mid")
    write_json(folder / LONG, {"settings": vars(args), "pieces": pieces, "first_audio": first})


def evaluate(args: argparse.Namespace) -> None:
    """Measure what the command line asks for, in a folder without results of the same kind."""
    folder = Path(args.output_dir)
    results = [name for name, asked in ((LONG, args.minutes), (OFFSETS, args.offsets)) if asked]
    check_output(folder, *results)
    model = model_folder(args.model)
    args.model = str(model)  # of a Hub id its copy
    if args.minutes:
        choose_prompt(model, args.prompt)
    if not read_prompts(model):
        raise EvaluationError(f"--model {model}: has no bundled prompts; give a model that has some")
    list_midi(args.midi_root, "test", hold_out=False)
    transcriber = Transcriber()
    with FolderLock(folder):
        check_output(folder, *results)  # of a run that has ended meanwhile
        if args.minutes:
            measure_pieces(args, transcriber)
        if args.offsets:
            print(json.dumps(measure_offsets(args, transcriber), indent=1))


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used, 130 if interrupted."""
    args = parse(argv)
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; what is finished is in {args.output_dir}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
