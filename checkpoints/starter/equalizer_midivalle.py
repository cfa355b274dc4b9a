# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A filter that brings what a model plays to the long-term spectrum of the prompt's recording.

Codec and decoders tell pianos and rooms apart, but not to the last decibel, and they have never heard the user's
microphone. The prompt exists twice, as it was recorded and as the codec gives it back; what they differ by in the mean,
band by band, is made up for. The filter does not change with time, so it adds no seam.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F
from transformers.audio_utils import hertz_to_mel, mel_filter_bank

WINDOW, HOP = 2048, 512  # samples
BANDS, LOWEST_HZ = 40, 50.0
FLOOR = 1e-7  # of the loudest band's power: what is softer does not count
LIMIT_DB = 15.0
TAPS, DESIGN = 2048, 4096  # samples


def long_term_difference(recorded: torch.Tensor, made: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """
    How much louder the bands of `recorded` `(samples,)` are than those of `made` `(samples,)`, the same music: dB
    `(BANDS,)`, the mean over the louder half of the frames. Their mean, the difference of the levels, is taken off.
    """
    bank = mel_filter_bank(WINDOW // 2 + 1, BANDS, LOWEST_HZ, sampling_rate / 2, sampling_rate, None, "htk")
    length = min(len(recorded), len(made))
    waves = F.pad(torch.stack([recorded[:length], made[:length]]).double(), (0, max(WINDOW - length, 0)))
    frames = waves.unfold(-1, WINDOW, HOP) * torch.hann_window(WINDOW).to(waves)
    power = torch.fft.rfft(frames).abs().square() @ torch.from_numpy(bank).to(waves)
    level = 10 * (power + FLOOR * power.amax((1, 2), keepdim=True) + 1e-30).log10()  # (2, frames, BANDS)
    loudness = level[0].mean(1)
    recorded, made = level[:, loudness >= loudness.median()].mean(1)
    return recorded - made - (recorded - made).mean()


def filter_taps(difference: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """
    Taps `(TAPS,)`, float32, of the minimum-phase filter (nothing sounds before a strike) whose gains in the bands are
    `difference` `(BANDS,)`, dB, at most `LIMIT_DB` either way, a little smoothed over the bands.
    """
    padded = F.pad(difference[None], (1, 1), mode="replicate")[0]
    gains = (padded.unfold(0, 3, 1) @ difference.new_tensor([0.25, 0.5, 0.25])).clamp(-LIMIT_DB, LIMIT_DB)
    edges = hertz_to_mel(np.array([LOWEST_HZ, sampling_rate / 2]), "htk")
    centres = np.linspace(*edges, BANDS + 2)[1:-1]
    bins = hertz_to_mel(np.fft.rfftfreq(DESIGN, 1 / sampling_rate), "htk")
    curve = torch.from_numpy(np.interp(bins, centres, gains.cpu().numpy())).to(difference)
    cepstrum = torch.fft.irfft(curve * (math.log(10) / 20), DESIGN)
    cepstrum[1 : DESIGN // 2] *= 2
    cepstrum[DESIGN // 2 + 1 :] = 0
    return torch.fft.irfft(torch.fft.rfft(cepstrum).exp(), DESIGN)[:TAPS].float()


class StreamFilter:
    """A filter over a wave that comes piece by piece: what it gives is what it gives for the whole.

    Args:
        taps (`torch.Tensor` of shape `(N,)`).
    """

    def __init__(self, taps: torch.Tensor):
        self.taps, self.past = taps, taps.new_zeros(len(taps) - 1)

    def __call__(self, wave: torch.Tensor) -> torch.Tensor:
        """The next samples `(1, 1, L)`, filtered."""
        if not wave.shape[-1]:
            return wave
        known = torch.cat([self.past, wave[0, 0].to(self.past)])
        self.past = known[len(known) - len(self.past) :]
        size = 1 << (len(known) + len(self.taps) - 1).bit_length()
        product = torch.fft.rfft(known, size) * torch.fft.rfft(self.taps, size)
        return torch.fft.irfft(product, size)[len(self.taps) - 1 : len(known)][None, None]


__all__ = ["StreamFilter", "filter_taps", "long_term_difference"]
