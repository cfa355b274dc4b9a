# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Metrics: cases small enough to count by hand."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import butter, filtfilt

from scripts.measuring.metrics import (
    chroma_distance,
    code_statistics,
    colour_difference,
    log_mel_distance,
    multi_resolution_mel,
    si_snr,
    spectrogram_nrmse,
    timbre_distance,
)
from scripts.measuring.note_onsets.scores import mean_interval, note_scores
from tokenization import NOTE_DTYPE

ROOT = Path(__file__).resolve().parents[1]


def notes(*rows):
    """Rows of (onset s, pitch, velocity), 0.5 s long."""
    return np.array([(onset, 0.5, pitch, velocity) for onset, pitch, velocity in rows], NOTE_DTYPE)


def test_counts_by_hand():
    """Of five notes two are right, one is 60 ms late, one has a wrong key, one is missing; one is extra."""
    reference = notes((0.0, 60, 50), (1.0, 62, 60), (2.0, 64, 70), (3.0, 65, 80), (4.0, 67, 90))
    estimate = notes((0.01, 60, 50), (0.98, 62, 60), (2.06, 64, 70), (3.0, 66, 80), (3.5, 40, 90))
    scores = note_scores(reference, estimate)
    assert (scores["precision"], scores["recall"]) == (2 / 5, 2 / 5)
    assert scores["f1"] == pytest.approx(2 * 2 / 10)
    assert scores["onset_bias_ms"] == pytest.approx((10 - 20) / 2)  # the median of +10 and -20 ms
    assert scores["onset_error_ms"] == pytest.approx(15)
    assert math.isnan(scores["velocity_correlation"])  # two matches are too few
    assert note_scores(reference, estimate, onset_tolerance=0.1)["f1"] == pytest.approx(2 * 3 / 10)


def test_a_repeated_key_is_matched_once():
    scores = note_scores(notes((0.0, 60, 50), (0.04, 60, 50)), notes((0.02, 60, 50)))
    assert (scores["precision"], scores["recall"]) == (1.0, 0.5)


def test_lengths_do_not_count():
    reference, estimate = notes((0.0, 60, 50)), notes((0.0, 60, 50))
    estimate["duration"] = 5.0
    assert note_scores(reference, estimate)["f1"] == 1.0


def test_velocities_are_ranked():
    times = range(6)
    reference = notes(*[(t, 60 + t, 20 + 10 * t) for t in times])
    assert note_scores(reference, notes(*[(t, 60 + t, 5 + t * t) for t in times]))["velocity_correlation"] == 1.0
    assert note_scores(reference, notes(*[(t, 60 + t, 90 - t) for t in times]))["velocity_correlation"] == -1.0
    assert math.isnan(note_scores(reference, notes(*[(t, 60 + t, 64) for t in times]))["velocity_correlation"])


def test_no_notes_at_all():
    some, none = notes((0.0, 60, 50)), notes()
    for reference, estimate in ((some, none), (none, some), (none, none)):
        scores = note_scores(reference, estimate)
        assert scores["f1"] == scores["precision"] == scores["recall"] == 0.0
        assert math.isnan(scores["onset_bias_ms"])


def test_mean_and_its_interval():
    mean, half = mean_interval([1.0, 2.0, 3.0, float("nan")])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-6)  # t at 97.5 %, 2 degrees; deviation 1
    mean, half = mean_interval([1.0, 3.0, 7.0, float("nan")], groups=["a", "a", "b", "c"])
    assert mean == 4.5  # of the group means 2 and 7; the group without a value is left out
    assert half == pytest.approx(12.706205 * 2.5, rel=1e-6)  # 1 degree; standard error |7 - 2| / 2
    assert mean_interval([5.0])[0] == 5.0 and math.isnan(mean_interval([5.0])[1])
    assert all(math.isnan(value) for value in mean_interval([float("nan")]))


def test_spectral_distance():
    """Zero for equal sounds at any level, large for another tone, and it grows with noise."""
    time = np.arange(16_000) / 32_000
    tone, other = np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 1_500 * time)
    noise = np.random.default_rng(0).standard_normal(16_000)
    assert log_mel_distance(tone, tone) == 0.0
    assert log_mel_distance(tone, 0.1 * tone) == pytest.approx(0.0, abs=1e-3)
    little, more = (log_mel_distance(tone, tone + level * noise) for level in (0.001, 0.1))
    assert 0 < little < more < log_mel_distance(tone, noise)
    assert log_mel_distance(tone, other) > 5


def band_centre(number):
    """Of one of the 80 bands, Hz: equal steps in mel, 2595 log10(1 + f / 700), from 27.5 Hz to 16 kHz."""
    lowest, highest = (2595 * math.log10(1 + f / 700) for f in (27.5, 16_000))
    return 700 * (10 ** ((lowest + (highest - lowest) * (number + 1) / 81) / 2595) - 1)


@pytest.mark.parametrize(("level_db", "expected"), [(-60, 10 / 80), (-50, 20 / 80), (-80, 0)])
def test_spectral_distance_by_hand(level_db, expected):
    """A second tone counts by what it is above 70 dB below the first, in one band of 80."""
    time = np.arange(128_000) / 32_000
    tone, other = (np.sin(2 * np.pi * band_centre(number) * time) for number in (60, 75))
    assert log_mel_distance(tone, tone + 10 ** (level_db / 20) * other) == pytest.approx(expected, abs=0.01)


def test_multi_resolution_mel():
    """Ten times louder is 1 in log10 in all seven windows where both are above the floor; noise counts."""
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    assert multi_resolution_mel(noise, noise) == 0.0
    with_empty_bands = multi_resolution_mel(noise, 10 * noise)  # bands narrower than a bin stay at the floor in both
    assert 6 < with_empty_bands <= 7.0001
    assert multi_resolution_mel(0.1 * noise, noise) == pytest.approx(with_empty_bands, abs=0.02)
    assert multi_resolution_mel(1e-9 * noise, 1e-8 * noise) == 0
    little, more = (multi_resolution_mel(tone(69, 0.5), tone(69, 0.5) + level * noise) for level in (1e-4, 1e-2))
    assert 0 < little < more


def tone(pitch, seconds=2.0):
    return np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * np.arange(round(seconds * 32_000)) / 32_000) * 0.1


def test_si_snr_knows_no_gain():
    """Noise of a tenth of the tone's power is 10 dB below it, at any gain."""
    target = tone(69)
    noise = np.random.default_rng(0).standard_normal(len(target)) * np.sqrt(0.1) * target.std()
    assert si_snr(target, target + noise) == pytest.approx(10, abs=0.2)
    assert si_snr(target, 7 * (target + noise)) == pytest.approx(si_snr(target, target + noise))
    assert si_snr(target, noise) < -20


def test_si_snr_by_hand():
    """A tenth of what is at right angles to the target is 20 dB below it, and constant parts do not count."""
    phase = 2 * np.pi * np.arange(32_000) / 320
    assert si_snr(np.sin(phase) + 2, np.sin(phase) + 0.1 * np.cos(phase) - 3) == pytest.approx(20)


def test_colour_difference():
    """By parts of the spectrum, of which the lowest end at some 330, 700 Hz; without the level."""
    target = np.random.default_rng(0).standard_normal(64_000)
    low = filtfilt(*butter(4, 500, "low", fs=32_000), target)
    found = np.array(colour_difference(target, 0.1 * (target + 4 * low)))
    assert found[0] - found[5] == pytest.approx(20 * np.log10(5), abs=1.0)
    assert np.ptp(found[4:]) < 1.0 and found.mean() == pytest.approx(0, abs=1e-6)
    assert colour_difference(target, np.zeros(64_000))[0] != 0  # silence is told, not NaN


def test_timbre_distance():
    """0 at any level; far for another register."""
    target = tone(69)
    assert timbre_distance(target, 5 * target) == pytest.approx(0, abs=0.05)
    assert timbre_distance(target, tone(93)) > 5 > timbre_distance(target, tone(70))


def test_timbre_distance_by_hand():
    """8 dB more in the lowest 10 of 40 bands: 6 above the mean, and 2 below it in the others."""
    noise = np.random.default_rng(0).standard_normal(320_000)
    lowest, highest = (2595 * math.log10(1 + f / 700) for f in (50, 16_000))
    edge = 700 * (10 ** ((lowest + (highest - lowest) * 10.5 / 41) / 2595) - 1)
    spectrum = np.fft.rfft(noise)
    spectrum[: round(edge * 10)] *= 10 ** (8 / 20)
    found = timbre_distance(noise, np.fft.irfft(spectrum))
    assert found == pytest.approx(math.sqrt((10 * 6**2 + 30 * 2**2) / 40), abs=0.1)


def test_timbre_distance_hears_the_louder_half():
    """Whatever the softer one is."""
    loud, soft = [tone(69), tone(70)], [0.01 * tone(pitch, 1.5) for pitch in (50, 93)]
    waves = [[np.concatenate([first, second]) for second in soft] for first in loud]
    assert timbre_distance(waves[0][0], waves[0][1]) < 0.1
    assert timbre_distance(waves[0][0], waves[1][0]) == pytest.approx(timbre_distance(*loud), rel=0.2)


def test_spectrogram_nrmse():
    """0 at any gain; a wrong pitch costs more than a little noise."""
    target = tone(60)
    noisy = target + np.random.default_rng(0).standard_normal(len(target)) * 1e-5
    assert spectrogram_nrmse(target, 3 * target) == pytest.approx(0, abs=0.01)  # rounding, far below the tone
    faint = spectrogram_nrmse(noisy, noisy + 1e-4 * tone(80))
    assert 0 < 2 * faint < spectrogram_nrmse(noisy, noisy - target + tone(61))


def test_chroma_distance():
    """An octave is no distance, a semitone is the whole one: what was there is missing, and something else is there."""
    pytest.importorskip("librosa", reason="chroma needs librosa: make install-eval")
    assert chroma_distance(tone(60), tone(60)) < 1e-3
    assert chroma_distance(tone(60), tone(72)) < 0.3 < 1.5 < chroma_distance(tone(60), tone(61))


def test_code_statistics_by_hand():
    """One code always: 0 bits. Four codes equally often: 2 bits, half of a codebook of eight."""
    stats = code_statistics(np.array([[3] * 8, [0, 1, 2, 3] * 2]), 8)
    assert stats == {"used": [1 / 8, 1 / 2], "entropy_bits": [pytest.approx(0), pytest.approx(2)]}


def test_note_scores_by_evaluate(tmp_path):
    """`evaluate.load` copies the folder: nothing of the repository may be needed."""
    import evaluate
    from evaluate.config import HF_MODULES_CACHE

    folder = ROOT / "scripts" / "measuring" / "note_onsets"
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path), keep_in_memory=True)
    assert Path(inspect.getfile(type(metric))).is_relative_to(HF_MODULES_CACHE)
    pairs = [(notes((0.0, 60, 50)), notes((0.01, 60, 40))), (notes((0.0, 60, 50), (1.0, 62, 9)), notes((0.03, 60, 50)))]
    for reference, estimate in pairs:
        reference, estimate = (
            {f: n[f].tolist() for f in ("onset", "pitch", "velocity")} for n in (reference, estimate)
        )
        metric.add(reference=reference, prediction=estimate)
    scores = metric.compute(groups=["a", "b"])
    rows = [note_scores(*pair) for pair in pairs]
    assert set(scores) == {name + end for name in rows[0] for end in ("", "_interval")}
    for name in rows[0]:
        expected = mean_interval([row[name] for row in rows])
        assert (scores[name], scores[f"{name}_interval"]) == pytest.approx(expected, nan_ok=True)
    lists = {"onset": [0.0, 1.0], "pitch": [60], "velocity": [50]}
    with pytest.raises(ValueError, match="as many of each"):
        metric.compute(references=[lists], predictions=[lists])
    with pytest.raises(ValueError, match="no piece"):
        metric.compute(references=[], predictions=[])
    lists["onset"] = [0.0]
    with pytest.raises(ValueError, match="groups: 2 for 1 piece"):
        metric.compute(references=[lists], predictions=[lists], groups=["a", "b"])
