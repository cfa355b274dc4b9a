# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Learning-rate schedules as pure functions of the step."""

import math


def warmup_cosine(step: int, warmup_steps: int, steps: int, final_share: float) -> float:
    """Share of the top learning rate: linear warm-up, then a cosine down to `final_share` at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done))
