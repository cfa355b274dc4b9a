# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""How many notes survive: ground truth, codec reconstruction and generated audio, read by the same transcriber.

    python -m scripts.evaluate --model checkpoints/starter --midi-root PACK/midi --piano PIANO.tar ... --output-dir OUT

Excerpts are rendered from MIDI with a prompt from another piece on the same piano in the same room. `codec` is what the
codec makes of sound alone, as transformers' `EncodecModel` does; `codec_listened`, where its folder holds a `listener`
(`assemble_model --listener`), what it makes of the same sound with the keys in its codes that this one hears; and
`codec_told`, where the model is told which keys are struck (`keys_from_midi`), with those that are, encoded and
decoded, and as loud as when the model generates. Both are decoded with steady spectra (`steady_vectors`). Give one or
several `--codec FOLDER` instead of `--model` to score codecs alone, all against one transcription of the truth;
`--truth RESULTS.json` of an earlier run saves that one too, where audio and notes are the same. `--piano FONT.sf2`
(through fluidsynth) and rooms that were not trained on show what a codec does with what it never heard. Needs `make
install-eval`.

Columns, each the mean over recordings (every excerpt is one, though two may be of one performance) and half of its 95 %
t-interval; where a recording has no value, as without notes that are found, the table says of how many the mean is.
Definitions in `scripts/measuring/`:
    f1, precision, recall   note onsets of equal pitch within 50 ms (mir_eval), notes read by Transkun
    onset_bias_ms, onset_error_ms, velocity_correlation   of the notes found: median, median absolute, Spearman
    log_mel_db              80 bands, equal RMS, dB
    multi_mel               sum of log10-mel differences over seven windows, as Descript's codec reports it
    si_snr_db               scale-invariant signal-to-noise ratio
    nrmse, chroma           `objective_eval` of score-to-audio, as the MIDI-VALLE paper reports them
`codecs` in results.json: share of each codebook that is used, its entropy in bits a code, bit rate as coded and by
entropy, and how many times faster than real time encoding and decoding are (median). `own_piano`, with several pianos:
the share of excerpts whose long-term spectrum is nearer to the target as its own piano plays it than to the same music
in the same room on any other (`timbre_db` in the rows, dB by piano). `colour_db`: how much louder each system is in the
mean than the truth, dB, in the ten parts of the spectrum that `assemble_model --colour` takes. `made_with`: versions,
and hashes of the weights.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from modeling_midivalle import CodecStream, PianoEncodecModel, PianoListenerModel
from modeling_midivalle.modeling_midivalle_frame_notes import PlayedKeys
from processing import MidiValleProcessor, Prompt
from processing.processing_midivalle import MAX_PROMPT_S, MAX_RING_OUT_S
from scripts.audio.pianos import SAMPLING_RATE, load_piano
from scripts.audio.rendered_audio import HOP, LOWEST_PITCH, PITCHES, onset_roll
from scripts.audio.rooms import ROOM_NAMES, ROOMS
from scripts.dataset.recordings import LEAD_S, DataArguments, RenderedRecordings
from scripts.measuring.metrics import (
    chroma_distance,
    code_statistics,
    colour_difference,
    log_mel_distance,
    multi_resolution_mel,
    si_snr,
    spectrogram_nrmse,
    timbre_distance,
)
from scripts.measuring.note_onsets.scores import mean_interval, note_scores
from scripts.measuring.transcription import Transcriber
from scripts.models.model_folder import LISTENER, load_listener, load_model, load_processor, model_folder
from scripts.models.trained_parts import load_part
from scripts.rendering.arguments import check_sampling, sampling_options
from scripts.rendering.manifest import software, weights_sha256
from scripts.rendering.pieces import render_wave
from scripts.training.processes import FolderLock
from scripts.unfinished import check_output_folder, write_json, write_text
from tokenization import Performance

COLUMNS = ("f1", "precision", "recall", "onset_bias_ms", "onset_error_ms", "velocity_correlation", "log_mel_db")
COLUMNS += ("multi_mel", "si_snr_db", "nrmse", "chroma")
RESULTS = "results.json"
MAX_SECONDS = 600.0  # of an excerpt: spectra of some GB; `scripts.evaluate_long` is for whole pieces


class EvaluationError(ValueError):
    """Files or arguments that cannot be used; one sentence."""


class Excerpt:
    """One validation item: prompt and target with their notes and audio; EvaluationError if no note is struck."""

    def __init__(self, recordings: RenderedRecordings, index: int, arguments: DataArguments):
        self.prompt, self.target, self.about = recordings.draw(index, arguments)
        lead, size = round(LEAD_S * SAMPLING_RATE), round(arguments.target_seconds * SAMPLING_RATE)
        self.around, self.lead, self.wave = self.target.wave, lead, self.target.wave[lead : lead + size]
        self.on_pianos = {}  # the same music in the same room, by piano
        for piano in recordings.pianos if len(set(recordings.pianos)) > 1 else ():
            _, target, about = recordings.draw(index, arguments, piano)
            self.on_pianos[about["piano"]] = target.wave[lead : lead + size]
        onset = self.target.notes["onset"]
        self.reference = self.target.notes[(onset >= 0) & (onset < arguments.target_seconds)]
        if not len(self.reference):  # even the truth would score 0
            where = f"excerpt {index}, {self.target.source} from {self.target.start:.1f} s on"
            raise EvaluationError(f"{where}: no note is struck in it; give longer --seconds or another --seed")

    def sha256(self) -> str:
        """Of what the truth's scores depend on: its audio and its notes."""
        return hashlib.sha256(self.wave.tobytes() + self.reference.tobytes()).hexdigest()


@torch.no_grad()
def reconstruct(codec: PianoEncodecModel, excerpt: Excerpt) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """The codec's version of the target, encoded inside its surroundings; the codes `(K, T)` of all; and how many times
    faster than real time both ways were."""
    around = torch.from_numpy(excerpt.around)[None, None].to(next(codec.parameters()).device)
    seconds, begin = len(excerpt.around) / SAMPLING_RATE, time.perf_counter()
    codes = codec.encode_codes(around)
    found = codes[0].cpu().numpy()  # a GPU is waited for
    middle = time.perf_counter()
    wave = codec.decode_codes(codes)[0, 0].cpu().numpy()
    end = time.perf_counter()
    speed = {"encode_x_real_time": seconds / (middle - begin), "decode_x_real_time": seconds / (end - middle)}
    return wave[excerpt.lead : excerpt.lead + len(excerpt.wave)], found, speed


@torch.no_grad()
def reconstruct_listened(codec: PianoEncodecModel, listener: PianoListenerModel, excerpt: Excerpt) -> np.ndarray:
    """The same with what `listener` hears in the codes; the decoder knows nothing but these."""
    around = torch.from_numpy(excerpt.around)[None, None].to(codec.device)
    codes = codec.encode_codes(around, struck=listener.hear(around))
    wave = codec.decode_steady(codes)[0, 0].cpu().numpy()
    return wave[excerpt.lead : excerpt.lead + len(excerpt.wave)]


@torch.no_grad()
def reconstruct_told(model, processor: MidiValleProcessor, excerpt: Excerpt) -> np.ndarray:
    """The same of a model with `keys_from_midi`, whose codec is told the notes both ways: its codes have the keys that
    are struck in them, as those that the AR and NAR learned from, and its decoder is told them, and gives them what
    they lack in loudness, as when it generates."""
    around = torch.from_numpy(excerpt.around)[None, None].to(model.device)
    written = _keys(excerpt, around, 0.0).struck
    codes = model.codec.encode_codes(around, struck=written)
    keys = _keys(excerpt, around, processor.onset_delay_seconds)
    dynamics = model.key_dynamics(keys.struck[keys.struck > 0].mean()[None], 1, generated=False)[0]
    spectra = model.codec.steady_vectors(codes, written)
    wave = CodecStream(model.codec, dynamics=dynamics).push(codes, True, keys, spectra)[0, 0].cpu().numpy()
    return wave[excerpt.lead : excerpt.lead + len(excerpt.wave)]


def _keys(excerpt: Excerpt, around: torch.Tensor, delay: float) -> PlayedKeys:
    """What the keys do in the frames of `around` `(1, 1, samples)`, `delay` s late."""
    notes = excerpt.target.notes.copy()
    notes["onset"] += delay
    frames = -(-around.shape[-1] // HOP)
    struck = torch.from_numpy(onset_roll(notes, frames, LEAD_S).astype(np.float32) / 127)
    held, rate = torch.zeros(frames, PITCHES, dtype=torch.bool), SAMPLING_RATE / HOP
    for onset, duration, pitch in zip(notes["onset"] + LEAD_S, notes["duration"], notes["pitch"], strict=True):
        held[max(int(onset * rate), 0) : max(int((onset + duration) * rate), 0), pitch - LOWEST_PITCH] = True
    return PlayedKeys(struck[None].to(around.device), held[None].to(around.device))


def distances(target: np.ndarray, wave: np.ndarray) -> dict[str, float]:
    """All that is measured without a transcriber."""
    return {
        "log_mel_db": log_mel_distance(target, wave),
        "multi_mel": multi_resolution_mel(target, wave),
        "si_snr_db": si_snr(target, wave),
        "nrmse": spectrogram_nrmse(target, wave),
        "chroma": chroma_distance(target, wave),
    }


def synthesise(
    model, processor: MidiValleProcessor, excerpt: Excerpt, seconds: float, seed: int, sampling: dict
) -> np.ndarray:
    """The model's version of the `seconds` of the target, from notes and prompt alone, as `scripts.render` makes it."""
    piece = processor.load(Performance(excerpt.target.notes, excerpt.target.source, {}), start=0.0, end=seconds)
    prompt = Prompt(excerpt.prompt.wave, excerpt.prompt.notes)
    ring_out = min(max(seconds - piece.end, 0.0), MAX_RING_OUT_S)
    wave = render_wave(model, processor, piece, prompt, seed, ring_out, sampling)
    return np.pad(wave, (0, len(excerpt.wave) - len(wave)))  # what would ring longer has died away


def score(excerpt: Excerpt, system: str, wave: np.ndarray, transcriber: Transcriber, known: dict[str, dict]) -> dict:
    """Row of one system and excerpt; the truth's is taken from `known` if it is there."""
    target, prompt = excerpt.target, excerpt.prompt
    found = {"system": system, "target": target.source, "start_s": target.start} | excerpt.about
    found |= {"prompt": prompt.source, "prompt_start_s": prompt.start}
    found["colour_db"] = colour_difference(excerpt.wave, wave)
    found["timbre_db"] = {piano: timbre_distance(other, wave) for piano, other in excerpt.on_pianos.items()}
    if system == "truth":
        found["sha256"] = excerpt.sha256()
        if found["sha256"] in known:
            return found | known[found["sha256"]]
    return found | note_scores(excerpt.reference, transcriber(wave, SAMPLING_RATE)) | distances(excerpt.wave, wave)


def known_truths(path: str | None) -> dict[str, dict]:
    """Rows of the truth in an earlier results.json by their hash."""
    try:
        rows = json.loads(Path(path).read_text())["rows"] if path else []
        truths = [row for row in rows if row["system"] == "truth" and {"sha256", *COLUMNS} <= set(row)]
        return {row["sha256"]: {column: float(row[column]) for column in COLUMNS} for row in truths}
    except OSError as error:
        raise EvaluationError(f"--truth {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: is not a results.json of scripts.evaluate") from error


def codec_names(folders: list[str]) -> list[str]:
    """`codec` if there is one; of several the shortest ends of their paths that tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts))):
        names = ["_".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names if len(names) > 1 else ["codec"]
    raise EvaluationError(f"--codec: a folder is given twice in {', '.join(folders)}")


def codec_report(codec: PianoEncodecModel, codes: list[np.ndarray], speeds: list[dict[str, float]]) -> dict:
    """Use of the codebooks over all excerpts, kbit/s as coded and by entropy, median speed."""
    report = code_statistics(np.concatenate(codes, 1), codec.config.codebook_size)
    frames_per_s = SAMPLING_RATE / codec.config.hop_length
    report["kbit_per_s"] = len(codes[0]) * np.log2(codec.config.codebook_size) * frames_per_s / 1000
    report["entropy_kbit_per_s"] = sum(report["entropy_bits"]) * frames_per_s / 1000
    return report | {name: float(np.median([speed[name] for speed in speeds])) for name in speeds[0]}


def summarise(rows: list[dict]) -> dict:
    """Mean and 95 % half-width of every column by system."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    groups = {s: [row["recording_id"] for row in rows if row["system"] == s] for s in systems}
    return {
        s: {c: mean_interval([row[c] for row in rows if row["system"] == s], groups[s]) for c in COLUMNS}
        for s in systems
    }


def own_piano(rows: list[dict]) -> dict[str, float]:
    """Share of the excerpts of each system that sound most like their own piano; nothing, if there is one piano."""
    hits = {}
    for row in rows:
        if distances := row["timbre_db"]:
            hits.setdefault(row["system"], []).append(min(distances, key=distances.get) == row["piano"])
    return {system: float(np.mean(found)) for system, found in hits.items()}


def colours(rows: list[dict]) -> dict[str, list[float]]:
    """Mean `colour_db` of each system."""
    systems = {row["system"]: None for row in rows}
    return {s: np.mean([row["colour_db"] for row in rows if row["system"] == s], 0).tolist() for s in systems}


def table(summary: dict, rows: list[dict]) -> str:
    """Markdown table of the summary of `rows`; a mean of fewer than all says of how many."""
    lines = ["| system | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for system, values in summary.items():
        own = [row for row in rows if row["system"] == system]
        counts = {column: int(np.isfinite([row[column] for row in own]).sum()) for column in COLUMNS}
        notes = {column: f" ({n} of {len(own)})" if n < len(own) else "" for column, n in counts.items()}
        cells = [f"{mean:.3f} ± {half:.3f}{notes[column]}" for column, (mean, half) in values.items()]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path, excerpt: Excerpt, waves: dict[str, np.ndarray]) -> None:
    """Spectrograms of prompt, target and every version, one above the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"prompt": excerpt.prompt.wave} | waves
    rows = len(panels)
    figure, axes = plt.subplots(rows, 1, figsize=(14, 3 * rows))
    # shares of a panel; to have them found would take as long as all the rest
    figure.subplots_adjust(0.06, 0.12 / rows, 0.99, 1 - 0.28 / rows, hspace=0.3)
    for axis, (name, wave) in zip(axes, panels.items()):
        axis.specgram(wave + 1e-9, NFFT=2048, Fs=SAMPLING_RATE, noverlap=1408, vmin=-140, vmax=-40, cmap="magma")
        axis.set(ylim=(0, 6000), title=name, ylabel="Hz")
    figure.suptitle(f"{excerpt.target.source}, {excerpt.about['recording_id']}", parse_math=False)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="model folder or Hub id")
    model.add_argument("--codec", action="append", help="codec folder, to score it alone; once or several times")
    parser.add_argument("--midi-root", required=True, help="folder of MIDI files or of a MIDI pack with manifest.csv")
    parser.add_argument("--piano", action="append", required=True, help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--room", action="append", choices=ROOM_NAMES, help="a room to use (default: all but any)")
    parser.add_argument("--split", default="validation", help="default: %(default)s")
    parser.add_argument("--excerpts", type=int, default=12, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first excerpt, to share the work out")
    parser.add_argument("--seconds", type=float, default=15.0, help="of an excerpt, a multiple of 0.5 (%(default)s)")
    parser.add_argument("--prompt-seconds", type=float, default=5.0, help="a multiple of 0.5 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--truth", metavar="RESULTS.json", help="of an earlier run: equal truths are not transcribed again"
    )
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output-dir", required=True, help="results.json, table.md, sounds and pictures go here")
    args = parser.parse_args(argv)
    if args.excerpts < 1 or min(args.first, args.seed) < 0:
        parser.error("--excerpts must be at least 1, --first and --seed at least 0")
    limits = (args.seconds, MAX_SECONDS), (args.prompt_seconds, MAX_PROMPT_S)
    if any(seconds % 0.5 or not 0 < seconds <= most for seconds, most in limits):
        parser.error(
            "--seconds and --prompt-seconds must be multiples of 0.5 above 0, "
            f"the former up to {MAX_SECONDS}, the latter up to {MAX_PROMPT_S}"
        )
    try:
        torch.ones(1, device=args.device).item()
    except (RuntimeError, AssertionError):  # no name of a device, or torch is built without it
        parser.error(f"--device {args.device}: there is no such device; give cpu, or cuda where there is a GPU")
    return args


def check_output(folder: Path, *results: str) -> None:
    """ValueError if `folder` cannot be written to, or holds `results` of another run."""
    check_output_folder(folder)
    if found := [folder / name for name in results if (folder / name).exists()]:
        raise EvaluationError(f"{found[0]}: exists already; give another --output-dir, or move it away")


def check_pianos(paths: list[str]) -> None:
    """Load all; EvaluationError if two have one name, by which results tell whose sound is whose."""
    named = {}
    for path in paths:
        other = named.setdefault(load_piano(path).name, path)
        if Path(other).resolve() != Path(path).resolve():
            raise EvaluationError(f"--piano {other} and {path}: have the same name; rename one of them")


def load(args: argparse.Namespace):
    """Model and processor, or None twice, the codecs and listeners by the name of their system, and their `hashes`."""
    if args.model:
        folder = model_folder(args.model)
        model = load_model(folder, args.device)
        codecs = {"codec": model.codec}
        heard_by = listeners(codecs, {"codec": folder}, args.device)
        return model, load_processor(folder), codecs, heard_by, hashes({"codec": folder}, heard_by)
    folders = dict(zip(codec_names(args.codec), args.codec, strict=True))
    codecs = {name: load_part("codec", folder).to(args.device).eval() for name, folder in folders.items()}
    for name, codec in codecs.items():
        if (rate := codec.config.sampling_rate) != SAMPLING_RATE:
            raise EvaluationError(f"--codec: {name} is a codec of {rate} Hz; excerpts have {SAMPLING_RATE}")
    heard_by = listeners(codecs, folders, args.device)
    taken = {"truth", *(f"{name}_listened" for name in heard_by)}
    if taken & set(codecs):
        raise EvaluationError(f"--codec: {min(taken & set(codecs))} is the name of another system; rename the folder")
    return None, None, codecs, heard_by, hashes(folders, heard_by)


def hashes(folders: dict[str, str | Path], heard_by: dict) -> dict[str, str]:
    """sha256 of configuration and weights in the folder of each codec, or of its model, and of its listener."""
    inner = {f"{name}_listened": Path(folders[name]) / LISTENER for name in heard_by}
    return {name: weights_sha256(Path(folder)) for name, folder in (folders | inner).items()}


def listeners(codecs: dict, folders: dict[str, str | Path], device: str) -> dict[str, PianoListenerModel]:
    """Those in the folders of codecs that have axes for what they hear, by the codec's system."""
    found = {name: load_listener(folders[name]) for name in codecs if getattr(codecs[name].config, "num_key_axes", 0)}
    return {name: listener.to(device) for name, listener in found.items() if listener is not None}


def evaluate(args: argparse.Namespace) -> dict:
    """Score the excerpts, and write all but the table; what is in results.json."""
    output, rows = Path(args.output_dir), []
    check_output(output, RESULTS)
    check_sampling(args)
    for name in ("temperature", "top_k", "top_p") if args.codec else ():
        if getattr(args, name) is not None:
            raise EvaluationError(f"--{name.replace('_', '-')} is for --model: a codec does not draw")
    known = known_truths(args.truth)
    recordings = RenderedRecordings(args.midi_root, args.split, args.piano, args.room or list(ROOMS), args.seed, False)
    check_pianos(args.piano)
    transcriber = Transcriber(args.device)
    model, processor, codecs, heard_by, weights = load(args)
    made_with = software() | {"weights_sha256": weights}
    about = {"keep_audio": False, "sustain": "extend" if model is None else processor.tokenizer.sustain}
    arguments = DataArguments(args.split, args.prompt_seconds, args.seconds, args.seed, **about)
    codes, speeds = {name: [] for name in codecs}, {name: [] for name in codecs}
    with FolderLock(output):
        check_output(output, RESULTS)  # of a run that has ended meanwhile
        for index in tqdm(range(args.first, args.first + args.excerpts), unit="excerpt"):
            excerpt = Excerpt(recordings, index, arguments)
            waves = {"truth": excerpt.wave}
            for name, codec in codecs.items():
                waves[name], found, speed = reconstruct(codec, excerpt)
                codes[name].append(found)
                speeds[name].append(speed)
                if name in heard_by:
                    waves[f"{name}_listened"] = reconstruct_listened(codec, heard_by[name], excerpt)
            if model is not None and model.config.keys_from_midi:
                waves["codec_told"] = reconstruct_told(model, processor, excerpt)
            if model is not None:
                seed = args.seed + index
                waves["generated"] = synthesise(model, processor, excerpt, args.seconds, seed, sampling_options(args))
            for system, wave in waves.items():
                rows.append({"index": index} | score(excerpt, system, wave, transcriber, known))
                soundfile.write(output / f"{index:02d}_{system}.flac", np.clip(wave, -1, 1), SAMPLING_RATE)
            plot(output / f"{index:02d}.png", excerpt, waves)
            reports = {name: codec_report(codec, codes[name], speeds[name]) for name, codec in codecs.items()}
            results = {"settings": vars(args), "summary": summarise(rows), "codecs": reports, "rows": rows}
            results |= {"own_piano": own_piano(rows), "colour_db": colours(rows), "made_with": made_with}
            write_json(output / RESULTS, results)  # after each excerpt: what is done is done
    return results


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    args = parse(argv)
    try:
        results = evaluate(args)
        write_text(Path(args.output_dir) / "table.md", table(results["summary"], results["rows"]) + "\n")
    except (ValueError, OSError, soundfile.LibsndfileError) as error:  # the last: a full disk
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the excerpts that are finished are in {args.output_dir}", file=sys.stderr)
        return 130
    print(table(results["summary"], results["rows"]))
    if results["own_piano"]:
        print("own piano: " + ", ".join(f"{system} {share:.2f}" for system, share in results["own_piano"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
