# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What a run of the codec is looked at by: figures, sounds and pictures of fixed crops, and learning curves."""

from pathlib import Path

import matplotlib
import numpy as np
import soundfile
import torch

from modeling_midivalle import PianoListenerModel
from scripts.audio.pianos import SAMPLING_RATE
from scripts.codec.listener import onset_f1
from scripts.measuring.metrics import log_mel_distance
from scripts.plots import draw_spectrogram
from scripts.training.processes import RunError
from scripts.training.run_log import read_log

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  after the choice of a backend without a screen

AXES = ("step", "hours", "wall_s")  # what a row of a log counts, and does not measure


@torch.no_grad()
def validate(
    objective, listener: PianoListenerModel | None, batch: dict[str, torch.Tensor], folder: Path
) -> dict[str, float]:
    """Figures of fixed crops; writes them and what became of them to `folder` as FLAC and spectrograms.

    Args:
        objective: its losses on `batch` are `val_NAME`. If it makes sound, so are `val_log_mel_db`
            (`scripts.measuring.metrics`) and, with `listener`, `val_f1` and `val_f1_truth`, the onset F1 of what it
            hears in the output and in the crops themselves. A listener that is trained itself is measured by `val_f1`
            too, and so is an encoder that learns to hear.
    """
    losses, output = objective(batch)
    figures = {f"val_{name}": float(value) for name, value in losses.items()}
    wave, onsets = batch["input_values"], batch["onsets"]
    known = batch.get("has_notes", torch.ones(len(wave), dtype=torch.bool, device=wave.device))
    if isinstance(objective.model, PianoListenerModel) and known.any():
        figures["val_f1"] = onset_f1(objective.model(wave[known]).logits, onsets[known])
    if hasattr(objective, "logits") and known.any():
        figures["val_f1"] = onset_f1(objective.logits(wave[known]), onsets[known])
    if output is None:
        return figures
    if listener is not None and known.any():
        figures["val_f1_truth"] = onset_f1(listener(wave[known]).logits, onsets[known])
        figures["val_f1"] = onset_f1(listener(output[known]).logits, onsets[known])
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(wave.cpu().numpy(), output.float().cpu().numpy(), strict=True))
    figures["val_log_mel_db"] = float(np.mean([log_mel_distance(truth, made) for truth, made in pairs]))
    for index, (truth, made) in enumerate(pairs):
        for name, sound in (("truth", truth), ("codec", made)):
            path = folder / f"{index:02d}_{name}.flac"
            try:
                soundfile.write(path, np.clip(sound, -1, 1), SAMPLING_RATE)
            except soundfile.SoundFileError as error:
                raise RunError(f"{path}: cannot be written ({error})") from error
    draw_pairs(pairs, folder / "spectrograms.png")
    return figures


def draw_pairs(pairs: list[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Spectrograms of each crop (left) and what the codec makes of it (right)."""
    figure, axes = pyplot.subplots(len(pairs), 2, figsize=(14, 3 * len(pairs)), layout="constrained", squeeze=False)
    for row, pair in zip(axes, pairs, strict=True):
        for axis, wave, name in zip(row, pair, ("truth", "codec"), strict=True):
            draw_spectrogram(
                axis, wave + 1e-6 * np.random.default_rng(0).standard_normal(len(wave))
            )  # silence has no dB
            axis.set_title(name)
    figure.savefig(path, dpi=60)
    pyplot.close(figure)


def draw_curves(log: Path, path: Path) -> None:
    """Learning curves: one panel for each figure of a `log.jsonl`, validation over training, by hours of audio."""
    rows = read_log(log) if log.is_file() else []
    names = dict.fromkeys(name.removeprefix("val_") for row in rows for name in row if name not in AXES)
    if not names:
        return
    columns = min(len(names), 4)
    shape = -(-len(names) // columns), columns
    figure, axes = pyplot.subplots(*shape, figsize=(4 * columns, 3 * shape[0]), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names):
        for key, label in ((name, "training"), (f"val_{name}", "validation")):
            points = [(row["hours"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axis.set(title=name, xlabel="hours of audio")
        axis.legend(fontsize="small")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=80, format="png")
    temporary.replace(path)
    pyplot.close(figure)
