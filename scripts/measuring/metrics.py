# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""How near waves and codes are; pure functions. How near notes are: `note_onsets/scores.py`."""

import warnings

import numpy as np

from modeling_midivalle.configuration_midivalle import COLOURS


def log_mel_distance(a: np.ndarray, b: np.ndarray, sampling_rate: int = 32_000) -> float:
    """Mean absolute difference, dB, of the 80-band log-mel spectra (window 2048, hop 640) of two waves, after both are
    scaled to equal RMS; floor 70 dB below the loudest band."""
    spectra = [_log_mel(x / (np.sqrt(np.mean(x**2)) + 1e-9), sampling_rate) for x in (a, b)]
    frames = min(len(s) for s in spectra)
    floor = max(s.max() for s in spectra) - 70
    return float(np.abs(np.maximum(spectra[0][:frames], floor) - np.maximum(spectra[1][:frames], floor)).mean())


def timbre_distance(a: np.ndarray, b: np.ndarray, sampling_rate: int = 32_000) -> float:
    """RMS difference, dB, of the long-term log-mel spectra of two waves: 40 bands, mean over the louder half of the
    frames (window 2048, hop 1024), without their levels."""
    difference = _long_term_spectrum(a, sampling_rate) - _long_term_spectrum(b, sampling_rate)
    return float(np.sqrt(np.mean(difference**2)))


def colour_difference(target: np.ndarray, wave: np.ndarray, sampling_rate: int = 32_000) -> list[float]:
    """How much louder `wave` is than `target`, dB, in `COLOURS` parts of these spectra: what a model's
    `colour_gains_db` is to take away from what it generates."""
    difference = _long_term_spectrum(wave, sampling_rate) - _long_term_spectrum(target, sampling_rate)
    return difference.reshape(COLOURS, -1).mean(1).tolist()


def multi_resolution_mel(target: np.ndarray, estimate: np.ndarray, sampling_rate: int = 32_000) -> float:
    """Sum over seven windows of the mean absolute difference of log10-mel amplitudes, floor 1e-5; levels count.

    As `MelSpectrogramLoss` of the Descript Audio Codec (arXiv 2306.06546): windows 32 to 2048, hops of a quarter, 5 to
    320 bands of area one.
    """
    import torch
    from transformers.audio_utils import mel_filter_bank

    waves, distance = torch.from_numpy(np.stack([target, estimate]).astype(np.float32)), 0.0
    for i in range(7):
        size, bands = 32 << i, 5 << i
        with warnings.catch_warnings():  # some of so many bands are narrower than a bin, and then zero in both
            warnings.simplefilter("ignore", UserWarning)
            bank = mel_filter_bank(size // 2 + 1, bands, 0, sampling_rate / 2, sampling_rate, "slaney", "slaney")
        spectra = torch.stft(waves, size, size // 4, window=torch.hann_window(size), return_complex=True).abs()
        t, e = (spectra.transpose(1, 2) @ torch.from_numpy(bank).float()).clamp_min(1e-5).log10()
        distance += float((t - e).abs().mean())
    return distance


def si_snr(target: np.ndarray, estimate: np.ndarray) -> float:
    """Scale-invariant signal-to-noise ratio, dB, of two waves of equal length. Codecs of 2 kbit/s keep no phases: they
    score far below 0 here, however near they sound."""
    target, estimate = target - target.mean(), estimate - estimate.mean()
    part = target * (estimate @ target / (target @ target + 1e-9))
    return float(10 * np.log10((part @ part + 1e-9) / ((estimate - part) @ (estimate - part) + 1e-9)))


def spectrogram_nrmse(target: np.ndarray, estimate: np.ndarray, sampling_rate: int = 32_000) -> float:
    """Error of a dB spectrogram on 128 MIDI pitches, relative to the target's norm; the waves are first scaled to equal
    RMS. After `objective_eval` of nii-yamagishilab/score-to-audio: 24 kHz, window 1200, hop 288, floor 1e-5, -20 dB."""
    spectra = [_pitch_spectrum(x / (np.sqrt(np.mean(x**2)) + 1e-9) * 0.05, sampling_rate) for x in (target, estimate)]
    frames = min(len(s) for s in spectra)
    t, g = (s[:frames] for s in spectra)
    return float(np.sqrt(np.square(t - g).sum() / np.square(t).sum()))


def chroma_distance(target: np.ndarray, estimate: np.ndarray, sampling_rate: int = 32_000) -> float:
    """Sum of chroma differences per target bin above 0.3, of the same source: librosa's `chroma_cqt` at 24 kHz."""
    import librosa
    import soxr

    t, g = (
        librosa.feature.chroma_cqt(y=soxr.resample(x, sampling_rate, 24_000), sr=24_000) for x in (target, estimate)
    )
    frames = min(t.shape[1], g.shape[1])
    t, g = np.clip(t[:, :frames], 0, 1), np.clip(g[:, :frames], 1e-5, 1 - 1e-5)
    return float(np.abs(t - g).sum() / max((t > 0.3).sum(), 1))


def code_statistics(codes: np.ndarray, codebook_size: int) -> dict[str, list[float]]:
    """Of each codebook of `codes` `(K, T)`: `used`, the share of its codes that occurs, and `entropy_bits` of a code by
    their frequencies (biased low while T is not many times the codebook)."""
    counts = [np.bincount(row, minlength=codebook_size) for row in codes]
    shares = [count[count > 0] / count.sum() for count in counts]
    used = [float((count > 0).mean()) for count in counts]
    return {"used": used, "entropy_bits": [float(-(share * np.log2(share)).sum()) for share in shares]}


def _pitch_spectrum(wave: np.ndarray, sampling_rate: int) -> np.ndarray:
    """(frames, 128) dB. Triangles from each pitch to its neighbours; below about A2 they are narrower than the window
    resolves, as in the source."""
    import soxr

    size, window, hop = 32_768, 1200, 288
    wave = np.pad(soxr.resample(wave, sampling_rate, 24_000), window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(wave, window)[::hop]
    pitches = np.arange(-1, 129)
    centres = 440 * 2 ** ((pitches - 69) / 12)
    bins = np.arange(size // 2 + 1) * 24_000 / size
    bank = np.stack([np.interp(bins, centres[i : i + 3], [0, 1, 0], 0, 0) for i in range(128)], 1)
    parts = [np.abs(np.fft.rfft(part * np.hanning(window), size)) @ bank for part in np.array_split(frames, 16)]
    return 20 * np.log10(np.maximum(1e-5, np.concatenate(parts))) - 20


def _log_mel(wave: np.ndarray, sampling_rate: int) -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    window, hop = 2048, 640
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, window // 2), window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window))) ** 2
    bank = mel_filter_bank(window // 2 + 1, 80, 27.5, sampling_rate / 2, sampling_rate, norm=None, mel_scale="htk")
    return 10 * np.log10(power @ bank + 1e-10)


def _long_term_spectrum(wave: np.ndarray, sampling_rate: int) -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    window, hop, half = 2048, 1024, sampling_rate / 2
    frames = np.lib.stride_tricks.sliding_window_view(wave, window)[::hop]
    bank = mel_filter_bank(window // 2 + 1, 40, 50.0, half, sampling_rate, norm=None, mel_scale="htk")
    power = (np.abs(np.fft.rfft(frames * np.hanning(window))) ** 2) @ bank
    level = 10 * np.log10(power + 1e-7 * power.max() + 1e-30)  # silence has a spectrum too
    loud = level.mean(1) >= np.median(level.mean(1))
    mean = level[loud].mean(0)
    return mean - mean.mean()
