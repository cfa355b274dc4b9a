# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What the prompt's recording does to a piano, beyond what codes tell: how its microphone colours it, and its noise.

Codec and decoders tell pianos and rooms apart, but not to the last decibel, they have never heard the user's
microphone, and four codes a frame have no bits for hiss. But the prompt exists twice, as it was recorded and as the
codec gives it back, told its notes if it is told those of the music too. What the two differ by, band by band, in the
mean of the louder half of its frames, is made up for by a filter; and the noise of the recording, which is what its
upper bands hold when their level hardly varies, is played along. Neither changes with time, so they add no seam.

Audio that is generated has a colour besides that the codec's version of the prompt has not, the same whatever is
played; the filter makes up for it too (`colour_gains_db`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers.audio_utils import hertz_to_mel, mel_filter_bank

from .configuration_midivalle import COLOURS

WINDOW, HOP = 2048, 512  # samples
BANDS, LOWEST_HZ = 40, 50.0  # evenly spaced in mel up to half of the sampling rate
FLOOR = 1e-7  # of the loudest band's power: what is softer does not count
NOISE_SPREAD_DB = 5.0  # between soft and loud frames: a band that varies less holds noise
FEWEST_BANDS = 8  # of music; a recording that seems to have fewer is taken as it is
SHARE = 0.8  # of what is measured: some seconds of other music tell no more
SMOOTH = (0.05, 0.13, 0.2, 0.24, 0.2, 0.13, 0.05)  # over neighbouring bands
LIMITS_DB = (-30.0, 15.0)
NOISE_RANGE_DB = 60.0
TAPS, DESIGN = 2048, 4096  # samples


class RecordingChain(NamedTuple):
    """Taps of the filter that all goes through, `(TAPS,)`, and of that through which white noise of deviation one
    becomes the recording's, or None; both float32 and minimum-phase: nothing sounds before a strike."""

    taps: torch.Tensor
    noise_taps: torch.Tensor | None


def measure_recording(
    recorded: torch.Tensor, made: torch.Tensor, sampling_rate: int, colour_gains_db: Sequence[float] | None = None
) -> RecordingChain:
    """
    What tells a recording from the codec's version of it.

    Args:
        recorded, made (`torch.Tensor` of shape `(samples,)`): the same music in time with each other; of unequal
            lengths the end of the longer one is not used.
        sampling_rate (`int`): Hz.
        colour_gains_db (`Sequence[float]`, *optional*): dB by which what will go through the filter is to be made
            louder besides, in ten parts of the range of four bands each.
    """
    bank = mel_filter_bank(WINDOW // 2 + 1, BANDS, LOWEST_HZ, sampling_rate / 2, sampling_rate, None, "htk")
    bank = torch.from_numpy(bank)
    length = min(len(recorded), len(made))
    waves = F.pad(torch.stack([recorded[:length], made[:length]]).cpu().double(), (0, max(WINDOW - length, 0)))
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    power = torch.fft.rfft(waves.unfold(-1, WINDOW, HOP) * window).abs().square() @ bank  # (2, frames, BANDS)
    level = _decibels(power + FLOOR * power.amax((1, 2), keepdim=True))
    soft, loud = level[0].quantile(0.1, 0), level[0].quantile(0.9, 0)
    varied = (loud - soft >= NOISE_SPREAD_DB).nonzero()
    music = int(varied.max()) + 1 if len(varied) else 0
    music = BANDS if music < FEWEST_BANDS else music
    loudness = level[0].mean(1)
    difference = level[:, loudness >= loudness.median()].mean(1).diff(dim=0)[0].neg()
    difference -= difference[:music].mean()  # not the level
    difference[:music] *= SHARE
    difference[music:].clamp_(max=0)
    if colour_gains_db is not None:
        difference += torch.tensor(colour_gains_db, dtype=torch.float64).repeat_interleave(BANDS // COLOURS)
    half = len(SMOOTH) // 2
    padded = F.pad(difference[None], (half, half), mode="replicate")[0]
    smooth = torch.tensor(SMOOTH, dtype=torch.float64)
    gains = (padded.unfold(0, len(SMOOTH), 1) @ smooth / smooth.sum()).clamp(*LIMITS_DB)
    taps = filter_taps(gains, sampling_rate).to(recorded.device)
    if music == BANDS:
        return RecordingChain(taps, None)
    density = _decibels(power[0].mean(0) / bank.sum(0) / window.square().sum())
    below = _decibels(power[0].quantile(0.1, 0) / bank.sum(0) / window.square().sum())[:music]
    density[:music] = below.minimum(density[music])  # there music hides it
    density = density.clamp(min=float(density.max()) - NOISE_RANGE_DB)
    return RecordingChain(taps, filter_taps(density, sampling_rate).to(recorded.device))


def filter_taps(gains: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """Taps `(TAPS,)`, float32, of the minimum-phase filter with `gains` `(BANDS,)`, dB, at the middles of the bands."""
    centres = np.linspace(*hertz_to_mel(np.array([LOWEST_HZ, sampling_rate / 2]), "htk"), BANDS + 2)[1:-1]
    bins = hertz_to_mel(np.fft.rfftfreq(DESIGN, 1 / sampling_rate), "htk")
    curve = torch.from_numpy(np.interp(bins, centres, gains.numpy()))
    cepstrum = torch.fft.irfft(curve * (math.log(10) / 20), DESIGN)
    cepstrum[1 : DESIGN // 2] *= 2
    cepstrum[DESIGN // 2 + 1 :] = 0
    return torch.fft.irfft(torch.fft.rfft(cepstrum).exp(), DESIGN)[:TAPS].float()


class RecordingStream:
    """A [`RecordingChain`] around a wave that comes piece by piece. The noise is the same every time."""

    def __init__(self, recording: RecordingChain):
        self.filter = StreamFilter(recording.taps)
        self.noise = None if recording.noise_taps is None else StreamFilter(recording.noise_taps)
        self.generator = torch.Generator().manual_seed(0)
        if self.noise is not None:
            self.noise(self._white(TAPS))  # it was there before

    def __call__(self, wave: torch.Tensor) -> torch.Tensor:
        """The next samples `(1, 1, L)`, L a multiple of 16 but at the end."""
        filtered = self.filter(wave)
        if self.noise is None or not wave.shape[-1]:
            return filtered
        return filtered + self.noise(self._white(wave.shape[-1]).to(wave))

    def _white(self, samples: int) -> torch.Tensor:
        return torch.randn(1, 1, samples, generator=self.generator).to(self.filter.taps)


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


def _decibels(power: torch.Tensor) -> torch.Tensor:
    return 10 * (power + 1e-30).log10()


__all__ = ["RecordingChain", "RecordingStream", "measure_recording"]
