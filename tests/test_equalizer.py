# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The filter to a prompt's spectrum: it makes up for what differs, holds no sound back, and leaves no seam."""

import numpy as np
import pytest
import torch
from scipy.signal import butter, lfilter

from modeling_midivalle.equalizer_midivalle import (
    BANDS,
    LIMIT_DB,
    StreamFilter,
    filter_taps,
    long_term_difference,
)

RATE = 32_000


def music(seconds=4.0, seed=0):
    """Noise that decays again and again, `(samples,)`."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(time)) * np.exp(-3 * (time % 0.5))
    return torch.from_numpy(0.1 * noise).float()


def through_a_telephone(wave):
    """Softer below 300 Hz and above 3.4 kHz."""
    low, high = butter(1, 300, "high", fs=RATE), butter(1, 3400, "low", fs=RATE)
    return torch.from_numpy(lfilter(*high, lfilter(*low, wave.numpy()))).float()


def test_what_differs_is_made_up_for():
    """Measured on one piece, applied to another; not its level."""
    taps = filter_taps(long_term_difference(0.2 * through_a_telephone(music()), music(), RATE), RATE)
    other = music(seed=1)
    equalized = StreamFilter(taps)(other[None, None])[0, 0]
    before, after = (long_term_difference(through_a_telephone(other), wave, RATE) for wave in (other, equalized))
    heard = slice(0, -1)  # in the last band the telephone is more than LIMIT_DB softer
    assert before[heard].abs().max() > 8 and after[heard].abs().max() < 1.2
    assert taps.dtype == torch.float32 and abs(float(taps.abs().sum().log10())) < 1


def test_nothing_sounds_before_a_strike():
    """A minimum-phase response: of all with its gains the one whose energy comes first."""
    difference = 6 * torch.randn(BANDS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    taps = filter_taps(difference, RATE).double()
    energy = taps.square().cumsum(0) / taps.square().sum()
    assert energy[0] > 0.3 and energy[RATE // 1000] > 0.95  # a millisecond
    gains = torch.fft.rfft(taps, 4096).abs().log10() * 20
    frequencies = torch.arange(2049) * RATE / 4096
    middle = gains[(frequencies > 1000) & (frequencies < 12_000)]
    assert float(middle.max()) < LIMIT_DB and float(middle.std()) > 1


def test_gains_are_limited():
    hum = torch.full((BANDS,), 60.0, dtype=torch.float64)
    hum[BANDS // 2 :] = -60
    gains = torch.fft.rfft(filter_taps(hum, RATE).double()).abs().log10() * 20
    assert gains.max() < LIMIT_DB + 1 and gains.min() > -LIMIT_DB - 1 and gains.max() - gains.min() > 1.8 * LIMIT_DB


@pytest.mark.parametrize("seconds", [0.01, 2.0])
def test_silence_and_equals_change_nothing(seconds):
    """However short they are."""
    wave = music(seconds)
    for pair in ((wave, wave), (0 * wave, 0 * wave), (0.3 * wave, wave)):
        taps = filter_taps(long_term_difference(*pair, RATE), RATE)
        torch.testing.assert_close(taps, torch.eye(len(taps))[0], atol=1e-5, rtol=0)


def test_a_stream_is_filtered_as_a_whole():
    wave, taps = music(1.0)[None, None], filter_taps(torch.linspace(-9, 9, BANDS, dtype=torch.float64), RATE)
    stream, cuts = StreamFilter(taps), [0, 0, 1, 640, 2000, 20_000, 32_000]
    parts = torch.cat([stream(wave[..., a:b]) for a, b in zip(cuts, cuts[1:])], -1)
    torch.testing.assert_close(parts, StreamFilter(taps)(wave), atol=1e-6, rtol=0)
    expected = np.convolve(wave[0, 0].double().numpy(), taps.double().numpy())[:32_000]
    torch.testing.assert_close(parts[0, 0].double(), torch.from_numpy(expected), atol=1e-5, rtol=0)
