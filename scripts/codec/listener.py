# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What a listener learns from, and is measured by; the network itself is `PianoListenerModel`."""

import torch
from torch.nn import functional as F

NEAR_ONSET, STRUCK_WEIGHT = 0.4, 2.0  # label of the frames beside an onset; how much more a struck key counts


def onset_loss(logits: torch.Tensor, struck: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of onsets, `struck (B, T, 88)` not 0 where a key is struck; the frames beside are half right."""
    label = (struck > 0).float()
    beside = torch.maximum(F.pad(label, (0, 0, 1, 0))[:, :-1], F.pad(label, (0, 0, 0, 1))[:, 1:])
    label = torch.maximum(label, NEAR_ONSET * beside)
    return F.binary_cross_entropy_with_logits(logits, label, pos_weight=logits.new_tensor(STRUCK_WEIGHT))


@torch.no_grad()
def onset_f1(logits: torch.Tensor, struck: torch.Tensor, threshold: float = 0.5) -> float:
    """Share of onsets found within two frames: peaks over `threshold` against `struck (B, T, 88)`."""
    p, truth = torch.sigmoid(logits).transpose(1, 2), (struck > 0).transpose(1, 2)
    peaks = (p == F.max_pool1d(p, 5, 1, 2)) & (p > threshold)
    near_truth, near_peak = (F.max_pool1d(x.float(), 5, 1, 2) > 0 for x in (truth, peaks))
    precision = (peaks & near_truth).sum() / peaks.sum().clamp_min(1)
    recall = (truth & near_peak).sum() / truth.sum().clamp_min(1)
    return float(2 * precision * recall / (precision + recall).clamp_min(1e-9))
