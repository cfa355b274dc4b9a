# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A small network that hears which keys are struck and how hard, so that the codec's decoder can be told what it lost.

Spectral distances hardly notice a quiet inner note: it is a small part of what sounds. A listener trained on rendered
audio, whose notes are known, and then kept as it is, makes each lost onset a loss of its own, and each note that
sounds softer or harder than it was played. It is not the transcriber that `scripts.evaluate` reads notes with.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

SAMPLING_RATE, HOP = 32_000, 640
KEYS = 88
BINS_PER_SEMITONE = 2
LOWEST_HZ, HIGHEST_HZ = 27.5, 15_500.0
WINDOWS = (8_192, 2_048)  # one to tell keys apart, one to tell when
HARMONICS = (-24, 0, 24, 38, 48, 56, 62, 72)  # of a key, in bins from it: an octave below, then partials 1 to 6 and 8
KNEE = 1e-3  # amplitudes well below are linear (noise stays small), above logarithmic (soft partials count)
NEAR_ONSET, STRUCK_WEIGHT = 0.4, 2.0  # label of the frames beside an onset; how much more a struck key counts


class Heard(NamedTuple):
    """What a listener hears: logits `(B, T, 88)` of the keys that are struck in each frame; `velocity (B, T, 88)`, over
    127, with which, if they are; and its hidden layers, each `(B, channels, T, bins or keys)`."""

    logits: torch.Tensor
    velocity: torch.Tensor
    hidden: list[torch.Tensor]


class Listener(nn.Module):
    """Wave (B, 640 T), full scale 1.0 -> [`Heard`].

    Every key is heard by the same weights, from the spectrum around it and around its partials, then beside its
    octaves. With `bf16` the convolutions run in bf16.
    """

    def __init__(self, channels: int = 48, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.bins = KEYS * BINS_PER_SEMITONE
        for n in WINDOWS:
            self.register_buffer(f"bank_{n}", _bank(n, self.bins + max(HARMONICS)), persistent=False)
            self.register_buffer(f"window_{n}", torch.hann_window(n), persistent=False)
        heard = len(WINDOWS) * len(HARMONICS)
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(heard, channels, (3, 3), padding=(1, 1)),
                nn.Conv2d(channels, channels, (5, BINS_PER_SEMITONE), stride=(1, BINS_PER_SEMITONE), padding=(2, 0)),
                nn.Conv2d(channels, channels, (3, 3), padding=(1, 1)),
                nn.Conv2d(channels, channels, (3, 3), padding=(1, 12), dilation=(1, 12)),
                nn.Conv2d(channels, channels, (5, 1), padding=(2, 0)),
            ]
        )
        self.last = nn.Conv2d(channels, 2, (3, 1), padding=(1, 0))
        self.last.bias.data = torch.tensor([-4.0, 0.5])  # few keys are struck in a frame; a velocity of 64

    def spectrum(self, wave: torch.Tensor) -> torch.Tensor:
        """(B, windows, T, bins): log(1 + amplitude / KNEE); frame t is centred on sample 640 t + 320."""
        parts = []
        for n in WINDOWS:
            window, around = getattr(self, f"window_{n}"), (n - HOP) // 2
            padded = F.pad(wave, (around, around))
            frames = torch.stft(padded, n, HOP, window=window, center=False, return_complex=True)
            power = torch.view_as_real(frames).square().sum(-1).transpose(1, 2)
            power = power @ (getattr(self, f"bank_{n}") * (2.0 / window.sum()) ** 2)
            parts.append(torch.log1p((power + 1e-9).sqrt() / KNEE))
        return torch.stack(parts, 1)

    def forward(self, wave: torch.Tensor) -> Heard:
        x = self.spectrum(wave)
        x = F.pad(x, (-min(HARMONICS), 0))
        starts = [shift - min(HARMONICS) for shift in HARMONICS]
        x = torch.cat([x[..., s : s + self.bins] for s in starts], 1)
        x = x.contiguous(memory_format=torch.channels_last)  # half the time on a CPU
        hidden = []
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for layer in self.layers:
                x = F.relu(layer(x))
                hidden.append(x)
            return Heard(*self.last(x).float().unbind(1), hidden)


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


def _bank(n: int, bins: int) -> torch.Tensor:
    """(n // 2 + 1, bins) triangles of power, half a semitone apart from 27.5 Hz on, at least a bin of the FFT wide."""
    frequencies = torch.linspace(0, SAMPLING_RATE / 2, n // 2 + 1)
    ratio = 2 ** (1 / (12 * BINS_PER_SEMITONE))
    centres = LOWEST_HZ * ratio ** torch.arange(bins)
    width = torch.maximum(centres * (ratio - 1), torch.tensor(1.01 * SAMPLING_RATE / n))
    bank = (1 - (frequencies[:, None] - centres).abs() / width).clamp_min(0)
    return bank / bank.sum(0, keepdim=True).clamp_min(1e-3) * (centres < HIGHEST_HZ)
