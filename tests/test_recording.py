# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The prompt's recording: its colour is made up for, its noise played along, and neither holds sound back or leaves a
seam."""

import numpy as np
import pytest
import torch
from scipy.signal import butter, lfilter

from modeling_midivalle.recording_midivalle import (
    BANDS,
    LIMITS_DB,
    TAPS,
    RecordingChain,
    RecordingStream,
    StreamFilter,
    filter_taps,
    measure_recording,
)

RATE = 32_000


def music(seconds=4.0, seed=0, level=0.1):
    """Noise that decays again and again, `(samples,)`."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(time)) * np.exp(-6 * (time % 0.5))
    return torch.from_numpy(level * noise).float()


def through_a_telephone(wave):
    """Softer below 300 Hz and above 3.4 kHz."""
    low, high = butter(1, 300, "high", fs=RATE), butter(1, 3400, "low", fs=RATE)
    return torch.from_numpy(lfilter(*high, lfilter(*low, wave.numpy()))).float()


def dull(wave):
    """Next to nothing above 4 kHz, as of a piano."""
    return torch.from_numpy(lfilter(*butter(6, 1500, "low", fs=RATE), wave.numpy())).float()


def hiss(seconds, seed, level=1e-3):
    """White noise above about 4 kHz."""
    white = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return torch.from_numpy(level * lfilter(*butter(2, 4000, "high", fs=RATE), white)).float()


def gains_of(taps):
    """dB at the middles of 100 Hz steps up to 16 kHz."""
    return 20 * torch.fft.rfft(taps.double(), RATE // 100).abs().log10()


def levels(wave):
    """dB of the bands of a wave `(samples,)`."""
    from scripts.measuring.metrics import _long_term_spectrum

    return _long_term_spectrum(wave.numpy(), RATE)


def test_the_models_own_colour_is_made_up_for():
    """Beside what differs, here nothing: by parts of four bands, smoothly."""
    colour = [0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 0.0, -4.0, -4.0, -4.0]
    plain, coloured = (measure_recording(music(), music(), RATE, given) for given in (None, colour))
    before, after = (levels(RecordingStream(chain)(music(seed=1)[None, None])[0, 0]) for chain in (plain, coloured))
    found = (after - before).reshape(10, 4)
    assert np.abs(found.mean(1) - (np.array(colour) - np.mean(colour))).max() < 1.0
    assert np.abs(found[4] - found[0] - 3.0).max() < 0.5 and np.abs(found[9] - found[0] + 4.0).max() < 0.5


def test_what_differs_is_made_up_for():
    """Measured on one piece, applied to another, most of it; not its level."""
    recording = measure_recording(0.2 * through_a_telephone(music()), music(), RATE)
    assert recording.noise_taps is None
    other = music(seed=1)
    wanted = levels(through_a_telephone(other))
    before, after = (levels(w) - wanted for w in (other, RecordingStream(recording)(other[None, None])[0, 0]))
    heard = slice(0, -4)  # above, the telephone is softer still than LIMITS_DB
    assert np.abs(before[heard]).max() > 8
    assert np.abs(after[heard]).max() < 0.5 * np.abs(before[heard]).max()
    assert 1 - before[heard] @ after[heard] / (before[heard] @ before[heard]) == pytest.approx(0.8, abs=0.03)


def test_a_single_band_is_made_up_for_with_its_neighbours():
    """Smoothly: no resonance of one band."""
    lack = 12.0 * (torch.arange(BANDS, dtype=torch.float64) == 20)  # its middle is at 3 kHz
    recorded = StreamFilter(filter_taps(lack, RATE))(music()[None, None])[0, 0]
    gains = gains_of(measure_recording(recorded, music(), RATE).taps)
    gains = gains - gains[10]
    assert 2 < gains[30] < 4 and gains[25] > 1 and gains[36] > 1 and gains[50:].abs().max() < 0.2


def test_the_loud_half_counts():
    """Of soft frames, with their own colour, nothing is made up for."""
    is_soft = torch.arange(4 * RATE) % RATE >= 0.55 * RATE
    wave = torch.where(is_soft, 0.03, 1.0) * hiss(4.0, 3, 0.1)
    recorded = torch.where(is_soft, through_a_telephone(wave), wave)
    assert gains_of(measure_recording(recorded, wave, RATE).taps).abs().max() < 1


def test_nothing_sounds_before_a_strike():
    """A minimum-phase response: of all with its gains the one whose energy comes first."""
    taps = filter_taps(6 * torch.randn(BANDS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), RATE)
    energy = taps.double().square().cumsum(0) / taps.double().square().sum()
    assert taps.shape == (TAPS,) and taps.dtype == torch.float32
    assert energy[0] > 0.3 and energy[RATE // 1000] > 0.9  # a millisecond
    assert float(gains_of(taps)[10:120].std()) > 1


def test_gains_are_limited():
    """A recording without anything below 2 kHz, and the other way round."""
    high = torch.from_numpy(lfilter(*butter(8, 2000, "high", fs=RATE), music().numpy())).float()
    low = torch.from_numpy(lfilter(*butter(8, 2000, "low", fs=RATE), music().numpy())).float()
    for recorded, made in ((high, low), (low, high)):
        gains = gains_of(measure_recording(recorded, made, RATE).taps)
        assert gains.min() > LIMITS_DB[0] - 2 and gains.max() < LIMITS_DB[1] + 2
        assert gains.max() - gains.min() > 15


@pytest.mark.parametrize("seconds", [0.01, 2.0])
def test_silence_and_equals_change_nothing(seconds):
    """However short they are."""
    wave = music(seconds)
    for pair in ((wave, wave), (0 * wave, 0 * wave), (0.3 * wave, wave)):
        recording = measure_recording(*pair, RATE)
        torch.testing.assert_close(recording.taps, torch.eye(TAPS)[0], atol=1e-5, rtol=0)
        assert recording.noise_taps is None or not RecordingStream(recording)(0 * wave[None, None]).abs().max() > 1e-9


def test_hiss_is_played_along():
    """As loud and of the same colour as recorded, under all of the music and its silence, always the same; music that
    the codec makes of it is not louder than it."""
    recorded = dull(music()) + hiss(4.0, 1)
    recording = measure_recording(recorded, dull(music()), RATE)
    silence = torch.zeros(1, 1, 2 * RATE)
    noise = RecordingStream(recording)(silence)[0, 0]
    found, wanted = (torch.from_numpy(np.abs(np.fft.rfft(w.numpy()[:RATE])) ** 2) for w in (noise, hiss(2.0, 2)))
    for first, last in ((6000, 8000), (8000, 12_000), (12_000, 15_000)):
        ratio = 10 * float((found[first:last].mean() / wanted[first:last].mean()).log10())
        assert abs(ratio) < 1.5
    assert found[200:2000].mean() < found[8000:12_000].mean()
    assert gains_of(recording.taps)[50:].max() < 0.1  # nor is it made louder
    assert torch.equal(RecordingStream(recording)(silence)[0, 0], noise)
    assert measure_recording(music(), music() + hiss(4.0, 1), RATE).noise_taps is None


def test_noise_says_nothing_of_how_music_is_coloured():
    """The codec makes more hiss than was recorded: that is made softer, and of the music nothing louder."""
    recorded, made = (dull(music()) + hiss(4.0, seed, level) for seed, level in ((1, 1e-3), (2, 1e-2)))
    gains = gains_of(measure_recording(recorded, made, RATE).taps)
    assert gains[2:15].abs().max() < 2 and gains[70:120].max() < -15


def test_noise_is_there_from_the_first_sample_on():
    """As loud as later, however long its filter rings."""
    ringing = torch.randn(TAPS, generator=torch.Generator().manual_seed(0)) / TAPS**0.5
    noise = RecordingStream(RecordingChain(torch.eye(TAPS)[0], ringing))(torch.zeros(1, 1, 2 * TAPS))[0, 0]
    assert noise[:256].std() > 0.8 * noise[TAPS:].std()


def test_a_recording_that_falls_silent_has_noise_of_limited_range():
    """What is softer than 60 dB below its loudest band is taken for as loud as that."""
    silent = torch.arange(4 * RATE) % RATE > 0.6 * RATE
    high = torch.from_numpy(lfilter(*butter(6, 8000, "high", fs=RATE), hiss(4.0, 1).numpy())).float()
    taps = measure_recording(dull(music()).masked_fill(silent, 0) + high, dull(music()), RATE).noise_taps
    gains = 20 * torch.fft.rfft(taps.double()).abs().log10()
    assert 55 < gains.max() - gains.min() < 65


def test_a_stream_is_as_a_whole():
    recording = measure_recording(dull(music()) + hiss(4.0, 1), through_a_telephone(music()), RATE)
    assert recording.noise_taps is not None
    wave, stream, cuts = music(1.0)[None, None], RecordingStream(recording), [0, 0, 640, 1280, 20_480, 32_000]
    parts = torch.cat([stream(wave[..., a:b]) for a, b in zip(cuts, cuts[1:])], -1)
    torch.testing.assert_close(parts, RecordingStream(recording)(wave), atol=1e-6, rtol=0)
    expected = np.convolve(wave[0, 0].double().numpy(), recording.taps.double().numpy())[:32_000]
    torch.testing.assert_close(
        StreamFilter(recording.taps)(wave)[0, 0].double(), torch.from_numpy(expected), atol=1e-5, rtol=0
    )
