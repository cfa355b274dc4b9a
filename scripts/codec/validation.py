# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What a run of the codec is looked at by: figures, sounds and pictures of fixed crops."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from modeling_midivalle import PianoListenerModel
from scripts.audio.pianos import SAMPLING_RATE
from scripts.codec.listener import onset_f1
from scripts.measuring.metrics import log_mel_distance
from scripts.plots import draw_spectrogram
from scripts.training.processes import RunError
from scripts.training.run_log import pyplot


@torch.no_grad()
def validate(
    objective, listener: PianoListenerModel | None, batch: dict[str, torch.Tensor], folder: Path
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Figures of fixed crops, and these and what became of them as sounds `(L,)` by name, which are written to `folder`
    as FLAC and spectrograms.

    Args:
        objective: its losses on `batch` are `validation_NAME`. If it makes sound, so are `validation_log_mel_db`
            (`scripts.measuring.metrics`) and, with `listener`, `validation_f1` and `validation_f1_truth`, the onset F1
            of what it hears in the output and in the crops themselves. A listener that is trained itself is measured
            by `validation_f1` too, and so is an encoder that learns to hear.
    """
    losses, output = objective(batch)
    figures = {f"validation_{name}": float(value) for name, value in losses.items()}
    wave, onsets = batch["input_values"], batch["onsets"]
    known = batch.get("has_notes", torch.ones(len(wave), dtype=torch.bool, device=wave.device))
    if isinstance(objective.model, PianoListenerModel) and known.any():
        figures["validation_f1"] = onset_f1(objective.model(wave[known]).logits, onsets[known])
    if hasattr(objective, "logits") and known.any():
        figures["validation_f1"] = onset_f1(objective.logits(wave[known]), onsets[known])
    if output is None:
        return figures, {}
    if listener is not None and known.any():
        figures["validation_f1_truth"] = onset_f1(listener(wave[known]).logits, onsets[known])
        figures["validation_f1"] = onset_f1(listener(output[known]).logits, onsets[known])
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(wave.cpu().numpy(), output.float().cpu().numpy(), strict=True))
    figures["validation_log_mel_db"] = float(np.mean([log_mel_distance(truth, made) for truth, made in pairs]))
    kinds = ("truth", "codec")
    sounds = {f"{i:02d}_{kind}": np.clip(w, -1, 1) for i, pair in enumerate(pairs) for kind, w in zip(kinds, pair)}
    for name, sound in sounds.items():
        path = folder / f"{name}.flac"
        try:
            soundfile.write(path, sound, SAMPLING_RATE)
        except soundfile.SoundFileError as error:
            raise RunError(f"{path}: cannot be written ({error})") from error
    draw_pairs(pairs, folder / "spectrograms.png")
    return figures, {name: torch.from_numpy(sound) for name, sound in sounds.items()}


def draw_pairs(pairs: list[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Spectrograms of each crop (left) and what the codec makes of it (right)."""
    rows = len(pairs)
    figure, axes = pyplot.subplots(rows, 2, figsize=(14, 3 * rows), squeeze=False)
    figure.subplots_adjust(0.06, 0.15 / rows, 0.99, 1 - 0.12 / rows, 0.12, 0.35)
    for row, pair in zip(axes, pairs, strict=True):
        for axis, wave, name in zip(row, pair, ("truth", "codec"), strict=True):
            draw_spectrogram(
                axis, wave + 1e-6 * np.random.default_rng(0).standard_normal(len(wave))
            )  # silence has no dB
            axis.set_title(name)
    figure.savefig(path, dpi=60)
    pyplot.close(figure)
