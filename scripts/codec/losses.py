# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Distance of spectra at several resolutions, what the codec's decoder is trained for."""

import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank

SAMPLING_RATE = 32_000
AUDIBLE = 3e-3  # the same for onsets: what stays below is no note
RISE_S = 0.032  # an onset is a rise within this time
FLOOR = 3e-4  # added to magnitudes before the logarithm: -70 dB below a full-scale sine, under every room's noise


class SpectralLoss(nn.Module):
    """Log-mel L1, spectral convergence, onsets and levels over several windows; inputs (B, samples), full scale 1.0.

    Long windows separate neighbouring low keys (27.5 Hz and 29.1 Hz need 0.6 s), short ones place onsets. A mean over
    all frames hardly notices a missing attack; so the rises of the short windows' bands are compared on their own,
    relative to how much there is to rise. What is uncertain, all of these would rather have too soft: `level` compares
    the mean power of each band.
    """

    def __init__(self, windows=(512, 2048, 8192), mels=(64, 160, 320)):
        super().__init__()
        self.windows = windows
        for n, bands in zip(windows, mels, strict=True):
            self.register_buffer(f"window_{n}", torch.hann_window(n), persistent=False)
            bank = mel_filter_bank(n // 2 + 1, bands, 27.5, 15_500, SAMPLING_RATE, norm=None, mel_scale="htk")
            bank = bank / bank.sum(0, keepdims=True).clip(1e-3)
            self.register_buffer(f"mel_{n}", torch.from_numpy(bank).float(), persistent=False)

    def magnitude(self, wave: torch.Tensor, n: int) -> torch.Tensor:
        """(B, frames, n // 2 + 1); a full-scale sine peaks at 1."""
        window = getattr(self, f"window_{n}")
        spectrum = torch.stft(wave, n, n // 4, window=window, return_complex=True)
        return spectrum.abs().transpose(1, 2) * (2.0 / window.sum())

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        mel, convergence, onset, level = 0.0, 0.0, [], []
        for n in self.windows:
            a, b = self.magnitude(output, n), self.magnitude(target, n)
            bank = getattr(self, f"mel_{n}")
            x, y = a @ bank, b @ bank
            mel = mel + (torch.log(x + FLOOR) - torch.log(y + FLOOR)).abs().mean()
            if n < max(self.windows):
                hops = round(RISE_S * SAMPLING_RATE / (n // 4))
                rises, wanted = (_rise(torch.log(bands + AUDIBLE), hops) for bands in (x, y))
                onset.append((rises - wanted).abs().mean() / (wanted.mean() + 0.01))
            a_level, b_level = (torch.log(bands.square().mean(1) + FLOOR**2) / 2 for bands in (x, y))
            level.append((a_level - b_level).abs().mean())
            error = (a - b).square().sum((1, 2)).sqrt()
            convergence = convergence + (error / (b.square().sum((1, 2)).sqrt() + 0.05)).mean()
        count = len(self.windows)
        found = {"mel": mel / count, "convergence": convergence / count, "onset": sum(onset) / len(onset)}
        return found | {"level": sum(level) / count}


def _rise(bands: torch.Tensor, hops: int) -> torch.Tensor:
    """How much each band (B, frames, bands) has risen within `hops`, 0 where it fell."""
    return (bands[:, hops:] - bands[:, :-hops]).clamp_min(0)
