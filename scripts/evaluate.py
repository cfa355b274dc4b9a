# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""How many notes survive: ground truth, codec reconstruction and generated audio, read by the same transcriber.

    python -m scripts.evaluate --model checkpoints/starter --midi-root PACK/midi --piano PIANO.tar ... --output-dir OUT

Excerpts are rendered from MIDI with a prompt from another piece on the same piano in the same room. Give `--codec
FOLDER` instead of `--model` to score a codec alone. Needs `make install-eval`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from modeling_midivalle import MidiValleForConditionalGeneration, PianoEncodecModel
from processing import MidiValleProcessor, Prompt
from scripts.metrics import (
    chroma_distance,
    code_statistics,
    log_mel_distance,
    mean_interval,
    note_scores,
    si_snr,
    spectrogram_nrmse,
)
from scripts.pianos import SAMPLING_RATE, load_piano
from scripts.recordings import LEAD_S, DataArguments, RenderedRecordings
from scripts.rendered_audio import HOP
from scripts.rendering import render_wave
from scripts.rooms import ROOMS
from scripts.transcription import Transcriber
from tokenization import Performance

COLUMNS = ("f1", "precision", "recall", "onset_bias_ms", "onset_error_ms", "velocity_correlation", "log_mel_db")
COLUMNS += ("si_snr_db", "nrmse", "chroma")


class Excerpt:
    """One validation item: prompt and target with their notes and audio."""

    def __init__(self, recordings: RenderedRecordings, index: int, arguments: DataArguments):
        self.prompt, self.target, self.about = recordings.draw(index, arguments)
        lead, size = round(LEAD_S * SAMPLING_RATE), round(arguments.target_seconds * SAMPLING_RATE)
        self.around, self.lead, self.wave = self.target.wave, lead, self.target.wave[lead : lead + size]
        onset = self.target.notes["onset"]
        self.reference = self.target.notes[(onset >= 0) & (onset < arguments.target_seconds)]


@torch.no_grad()
def reconstruct(codec: PianoEncodecModel, excerpt: Excerpt) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """The codec's version of the target, encoded inside its surroundings; the codes `(K, T)` of all; and how many times
    faster than real time both ways were."""
    around = torch.from_numpy(excerpt.around)[None, None].to(next(codec.parameters()).device)
    seconds, begin = len(excerpt.around) / SAMPLING_RATE, time.perf_counter()
    codes = codec.encode_codes(around)
    middle = time.perf_counter()
    wave = codec.decode_codes(codes)[0, 0].cpu().numpy()
    end = time.perf_counter()
    speed = {"encode_x_real_time": seconds / (middle - begin), "decode_x_real_time": seconds / (end - middle)}
    return wave[excerpt.lead : excerpt.lead + len(excerpt.wave)], codes[0].cpu().numpy(), speed


def distances(target: np.ndarray, wave: np.ndarray) -> dict[str, float]:
    """All that is measured without a transcriber."""
    return {
        "log_mel_db": log_mel_distance(target, wave),
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
    return render_wave(model, processor, piece, prompt, seed, seconds - piece.end, sampling)


def summarise(rows: list[dict]) -> dict:
    """Mean and 95 % half-width of every column by system."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    groups = {s: [row["recording_id"] for row in rows if row["system"] == s] for s in systems}
    return {
        s: {c: mean_interval([row[c] for row in rows if row["system"] == s], groups[s]) for c in COLUMNS}
        for s in systems
    }


def table(summary: dict) -> str:
    """Markdown table of a summary."""
    lines = ["| system | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for system, values in summary.items():
        cells = [f"{mean:.3f} ± {half:.3f}" for mean, half in values.values()]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path, excerpt: Excerpt, waves: dict[str, np.ndarray]) -> None:
    """Spectrograms of prompt, target and every version, one above the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"prompt": excerpt.prompt.wave} | waves
    figure, axes = plt.subplots(len(panels), 1, figsize=(14, 3 * len(panels)), constrained_layout=True)
    for axis, (name, wave) in zip(axes, panels.items()):
        axis.specgram(wave + 1e-9, NFFT=2048, Fs=SAMPLING_RATE, noverlap=1408, vmin=-140, vmax=-40, cmap="magma")
        axis.set(ylim=(0, 6000), title=name, ylabel="Hz")
    figure.suptitle(f"{excerpt.target.source}, {excerpt.about['recording_id']}")
    figure.savefig(path, dpi=70)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="model folder or Hub id")
    model.add_argument("--codec", help="codec folder, to score it alone")
    parser.add_argument("--midi-root", required=True, help="folder of MIDI files or of a MIDI pack with manifest.csv")
    parser.add_argument("--piano", action="append", required=True, help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--room", action="append", choices=tuple(ROOMS), help="a room to use (default: all)")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--excerpts", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="number of the first excerpt, to share the work out")
    parser.add_argument("--seconds", type=float, default=15.0, help="of an excerpt, a multiple of 0.5")
    parser.add_argument("--prompt-seconds", type=float, default=5.0, help="a multiple of 0.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output-dir", required=True, help="results.json, table.md, sounds and pictures go here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    args = parse(argv)
    try:
        recordings = RenderedRecordings(args.midi_root, args.split, args.piano, args.room or list(ROOMS), args.seed)
        for piano in args.piano:
            load_piano(piano)
        transcriber = Transcriber(args.device)
        if args.model:
            model = MidiValleForConditionalGeneration.from_pretrained(args.model).to(args.device).eval()
            processor, codec = MidiValleProcessor.from_pretrained(args.model), model.codec
        else:
            codec = PianoEncodecModel.from_pretrained(args.codec, dtype=torch.float32).to(args.device).eval()
            model = None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments = DataArguments(args.split, args.prompt_seconds, args.seconds, args.seed, keep_audio=False)
    sampling = {k: v for k in ("temperature", "top_k", "top_p") if (v := getattr(args, k)) is not None}
    output, rows, codes, speeds = Path(args.output_dir), [], [], []
    output.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(args.first, args.first + args.excerpts), unit="excerpt"):
        excerpt = Excerpt(recordings, index, arguments)
        wave, found, speed = reconstruct(codec, excerpt)
        waves = {"truth": excerpt.wave, "codec": wave}
        codes.append(found)
        speeds.append(speed)
        if model is not None:
            waves["generated"] = synthesise(model, processor, excerpt, args.seconds, args.seed + index, sampling)
        for system, wave in waves.items():
            scores = note_scores(excerpt.reference, transcriber(wave, SAMPLING_RATE))
            scores |= distances(excerpt.wave, wave)
            rows.append({"index": index, "system": system, "target": excerpt.target.source} | excerpt.about | scores)
            soundfile.write(output / f"{index:02d}_{system}.flac", np.clip(wave, -1, 1), SAMPLING_RATE)
        plot(output / f"{index:02d}.png", excerpt, waves)
    summary = summarise(rows)
    about = code_statistics(np.concatenate(codes, 1), codec.config.codebook_size)
    about["kbit_per_s"] = sum(about["entropy_bits"]) * SAMPLING_RATE / HOP / 1000
    about |= {name: float(np.median([speed[name] for speed in speeds])) for name in speeds[0]}
    results = {"settings": vars(args), "summary": summary, "codec": about, "rows": rows}
    (output / "results.json").write_text(json.dumps(results, indent=1))
    (output / "table.md").write_text(table(summary) + "\n")
    print(table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
