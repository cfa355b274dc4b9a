# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Learning-rate schedules as pure functions of the step."""

import math


def warmup_cosine(step: int, warmup_steps: int, steps: int, final_share: float) -> float:
    """Share of the top learning rate: linear warm-up, then a cosine down to `final_share` at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done))


def phase(step: int, frame_steps: int, steps: int) -> tuple[int, int]:
    """First step and end of the phase that `step` is in: frames alone, or all; each has its own warm-up and fall."""
    return (0, min(frame_steps, steps)) if step < frame_steps else (frame_steps, steps)


def eden(
    batch: int, epoch: int, scale_batches: float = 5000, scale_epochs: float = 4, warmup_batches: int = 20
) -> float:
    """Share of the top learning rate by Eden, ScaledAdam's schedule: falls with the root of batches and of epochs.

    `batch` counts batches (not optimiser steps) from 0, `epoch` from 0; from half the rate up over `warmup_batches`.
    """
    fall = ((batch / scale_batches) ** 2 + 1) ** -0.25 * ((epoch / scale_epochs) ** 2 + 1) ** -0.25
    return fall * (0.5 + 0.5 * min(batch / warmup_batches, 1.0))
