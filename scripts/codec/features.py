# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The latent that the codec is given to start with: compressed spectra of each frame, projected on their main axes.

An autoencoder trained from nothing spends its first days on finding out that spectra matter. Here the latent is known
from the first step: the decoder learns to speak it, the encoder to produce it, each alone and at its own pace.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

SAMPLING_RATE, HOP = 32_000, 640
LOWEST_HZ, HIGHEST_HZ = 27.5, 14_000.0
KNEE = 1e-3  # magnitudes well below are linear (noise stays small), above logarithmic (soft partials count)


class SpectralFeatures(nn.Module):
    """Wave (B, 640 T) -> latent (B, axes, T): log-compressed bands of a long and a short window, projected, less
    `memory` times the frame before.

    The long window tells pitches apart, the short one places onsets inside the frame. The difference leaves what is
    new: a steady tone has little to say, and so the bits go to onsets. A decoder whose LSTM forgets at the same rate
    adds the frames up again (`integrate`); the error of 44 bits a frame is then half of what plain frames leave.

    Args:
        axes: how many main axes are kept.
        memory: what the decoder remembers of the frame before.
        windows, bands, weights: per window: samples, number of bands (mel scale), and how much its errors count.
    """

    def __init__(self, axes: int, memory=0.6, windows=(4096, 1024), bands=(144, 48), weights=(1.0, 0.8)):
        super().__init__()
        self.memory = memory
        self.windows, self.weights, self.long_bands = windows, weights, bands[0]
        for n, count in zip(windows, bands, strict=True):
            bank = mel_filter_bank(n // 2 + 1, count, LOWEST_HZ, HIGHEST_HZ, SAMPLING_RATE, norm=None, mel_scale="htk")
            bank = bank / bank.sum(0, keepdims=True).clip(1e-3)
            if n == max(windows):
                bank = _semitone_bank(n, count)
            self.register_buffer(f"bank_{n}", torch.as_tensor(bank).float(), persistent=False)
            self.register_buffer(f"window_{n}", torch.hann_window(n), persistent=False)
        self.register_buffer("mean", torch.zeros(sum(bands)))
        self.register_buffer("basis", torch.zeros(sum(bands), axes))

    @torch.no_grad()
    def bands(self, wave: torch.Tensor) -> torch.Tensor:
        """(B, T, sum of bands): log(1 + magnitude / KNEE), weighted; frame t is centred on sample 640 t + 320."""
        parts = []
        for n, weight in zip(self.windows, self.weights, strict=True):
            window = getattr(self, f"window_{n}")
            padded = F.pad(wave, ((n - HOP) // 2, (n - HOP) // 2))
            spectrum = torch.stft(padded, n, HOP, window=window, center=False, return_complex=True).abs()
            power = (spectrum * (2.0 / window.sum())).square().transpose(1, 2) @ getattr(self, f"bank_{n}")
            parts.append(torch.log1p(power.clamp_min(0).sqrt() / KNEE) * weight)
        return torch.cat(parts, -1)

    @torch.no_grad()
    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        axes = ((self.bands(wave) - self.mean) @ self.basis).transpose(1, 2)
        return axes - self.memory * F.pad(axes, (1, 0))[..., :-1]

    def integrate(self, latent: torch.Tensor) -> torch.Tensor:
        """The axes (B, axes, T) themselves, from the latent."""
        axes, state = [], 0.0
        for frame in latent.unbind(-1):
            state = frame + self.memory * state
            axes.append(state)
        return torch.stack(axes, -1)

    def band_places(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Where `frequencies` (Hz) lie on the axis of the long window's bands, as fractional indices."""
        return torch.log(frequencies / LOWEST_HZ) / math.log(HIGHEST_HZ / LOWEST_HZ) * (self.long_bands - 1)

    @torch.no_grad()
    def fit(self, bands: torch.Tensor) -> float:
        """Principal axes of `bands` (N, F), scaled to unit mean variance; returns the share of variance kept."""
        self.mean.copy_(bands.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov((bands - self.mean).T.double()))
        kept = values[-self.basis.shape[1] :]
        axes = vectors[:, -self.basis.shape[1] :].flip(1)
        self.basis.copy_(axes / kept.mean().sqrt())
        return float(kept.sum() / values.sum())


def _semitone_bank(n: int, count: int) -> torch.Tensor:
    """(n // 2 + 1, count) triangles on a log-frequency axis from 27.5 Hz to 14 kHz, at least two bins wide."""
    frequencies = torch.linspace(0, SAMPLING_RATE / 2, n // 2 + 1)
    centres = LOWEST_HZ * (HIGHEST_HZ / LOWEST_HZ) ** (torch.arange(count) / (count - 1))
    spacing = centres * ((HIGHEST_HZ / LOWEST_HZ) ** (1 / (count - 1)) - 1)
    width = torch.maximum(spacing, torch.tensor(2.0 * SAMPLING_RATE / n))
    bank = (1 - (frequencies[:, None] - centres).abs() / width).clamp_min(0)
    return bank / bank.sum(0, keepdim=True).clamp_min(1e-3)
