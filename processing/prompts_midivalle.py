# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Prompts that users bring: which part of a recording is used, whether its MIDI is in time with it, and its level.

A prompt whose MIDI is some 100 ms off teaches the model to play as much off, so its offset is measured: the rise of
the recording's energy in each pitch class, against the strikes that the MIDI says. And to the model a recording at a
low gain is one of a softer, duller piano, since a piano that is played softly is both, so a level that the velocities
do not explain is made up for.
"""

import numpy as np

from .audio_midivalle import SAMPLING_RATE

GRID_S = 0.5  # starts of excerpts
FULL_S = 60.0  # of a recording, from shortly before its first strike on, looked at for its offset
HOP, WINDOW = 160, 2048  # samples: 5 ms, and 64 ms to tell semitones apart from the middle of the keyboard on
LONGEST_LAG_S = 2.0  # offsets are looked for up to here
EARLY_S = (
    0.005  # by which this measure finds the strikes of recordings that are in time early (mean of the bundled prompts)
)
ALIKE = 0.9  # of the correlation's peak: where the music repeats itself a beat off, chance decides which is the higher
CLEAR = 14.0  # peak of the correlation above its median, in median deviations: less is no match (own 24, foreign 13)
FEWEST_NOTES, SHORTEST_S = 4, 1.5  # with less an offset cannot be told
IN_TIME_S, CORRECTED_S = 0.02, 0.3  # a smaller offset is none, a larger one is not corrected but told
CLIPPED = 0.999  # samples from here on count as clipped
# How loud recordings are, dB RMS of full scale, above what their velocities tell (see `expected_level`): 98 of 100 that
# the starter has learned from, and their median; and the levels of nine of ten of them
LOUDNESS_DB, USUAL_LOUDNESS_DB, LEVELS_DB = (-28.0, -11.0), -21.0, (-38.0, -18.5)
VELOCITY_LAW_DB = 42.0  # from velocity 12.7 to 127: of the pianos in these recordings (`scripts/audio/pianos.py`)
RELEASE_S, LONGEST_TONE_S = 0.2, 1.0  # a note gives its energy while it lasts and is released, at most so long


def measure_offset(wave: np.ndarray, notes: np.ndarray) -> tuple[float, float]:
    """How much later the recording is than its MIDI.

    Args:
        wave (`np.ndarray` of shape `(samples,)`): 32 kHz; its first minute is looked at.
        notes (`np.ndarray` with fields `onset`, `pitch`, `velocity`): In s from the start of `wave`.

    Returns:
        `tuple(float, float)`: offset in s, positive where the sound comes after the MIDI (to add to the onsets), within
        2 s, and of several that fit about equally well (notes repeated in time) the one that is none; and how clearly
        the peak of the correlation stands out. Below `CLEAR` they do not match at any offset.
    """
    rise = _rise(wave[: round(FULL_S * SAMPLING_RATE)])  # (frames, 12)
    frames, longest = len(rise), round(LONGEST_LAG_S * SAMPLING_RATE / HOP)
    strikes = np.zeros((frames + 2 * longest, 12))  # so that strikes may be moved by the longest lag
    place = np.round(notes["onset"] * SAMPLING_RATE / HOP).astype(int)
    inside = (place >= 0) & (place < frames)  # strikes after the end would draw regular music towards a later part
    np.add.at(strikes, (place[inside] + longest, notes["pitch"][inside] % 12), notes["velocity"][inside] / 127.0)
    size = 1 << (frames + len(strikes)).bit_length()
    spectrum = np.fft.rfft(rise, size, axis=0) * np.conj(np.fft.rfft(strikes, size, axis=0))
    correlation = np.fft.irfft(spectrum.sum(1), size)
    lags = np.arange(-longest, longest + 1)
    correlation = correlation[lags - longest]  # strikes[longest] is time 0; negative places wrap around
    correlation = np.convolve(correlation, np.hanning(9) / np.hanning(9).sum(), "same")  # a strike is no single frame
    correlation = correlation - np.median(correlation)
    spread = np.median(np.abs(correlation)) + 1e-12
    beside = np.pad(correlation, 1, constant_values=-np.inf)
    is_peak = (correlation >= np.maximum(beside[:-2], beside[2:])) & (correlation >= ALIKE * correlation.max())
    offsets = lags * HOP / SAMPLING_RATE + EARLY_S
    in_time = np.flatnonzero(is_peak & (np.abs(offsets) < IN_TIME_S))
    best = in_time[0] if len(in_time) else correlation.argmax()
    return float(offsets[best]), float(correlation[best] / spread)


def check_offset(wave: np.ndarray, notes: np.ndarray, name: str) -> tuple[float, str]:
    """The offset, s, that is to be added to the onsets of `notes` (0 if none can or need be), and a sentence for the
    user: what was corrected, or why it seems that recording and MIDI do not belong together; mostly empty."""
    struck = notes["onset"][(notes["onset"] >= 0) & (notes["onset"] < len(wave) / SAMPLING_RATE)]
    if len(struck):  # a silent beginning would be all that the measure looks at
        begin = round(max(float(struck.min()) - LONGEST_LAG_S, 0.0) / GRID_S) * GRID_S
        struck, wave = struck[struck < begin + FULL_S], wave[round(begin * SAMPLING_RATE) :]
        notes = notes.copy()
        notes["onset"] -= begin
    if len(struck) < FEWEST_NOTES or len(wave) < SHORTEST_S * SAMPLING_RATE:
        return 0.0, ""
    offset, clearness = measure_offset(wave, notes)
    if clearness < CLEAR:
        return (
            0.0,
            f"{name}: the strikes of its MIDI are not found in the recording; they do not seem to belong together",
        )
    if abs(offset) < IN_TIME_S:
        return 0.0, ""
    said = f"{name}: the recording is {abs(offset) * 1000:.0f} ms {'later' if offset > 0 else 'earlier'} than its MIDI"
    if abs(offset) > CORRECTED_S:
        return 0.0, f"{said}, which is too much to be corrected; move one of them"
    return offset, f"{said}; corrected"


def choose_excerpt(wave: np.ndarray, notes: np.ndarray, seconds: float) -> float:
    """Start in s, on the 0.5 s grid, of the part of a recording that shows most of the piano.

    Many notes over a wide register; few that already sound at its beginning (the model hears them without their
    strikes) or are cut at its end; little clipping.

    Args:
        wave (`np.ndarray` of shape `(samples,)`): 32 kHz, at least as long as the excerpt.
        notes (`np.ndarray` with fields `onset`, `duration`, `pitch`): In s from the start of `wave`.
        seconds (`float`): Length of the excerpt.
    """
    starts = np.arange(0, len(wave) / SAMPLING_RATE - seconds + 1e-9, GRID_S)
    clipped = np.append(0, np.cumsum(np.abs(wave) >= CLIPPED))
    scores = []
    for start in starts:
        onset, end = notes["onset"], notes["onset"] + notes["duration"]
        struck = (onset >= start) & (onset < start + seconds)
        held, cut = ((onset < edge - 0.03) & (end > edge + 0.03) for edge in (start, start + seconds))
        first, last = round(start * SAMPLING_RATE), round((start + seconds) * SAMPLING_RATE)
        bands = len(np.unique(notes["pitch"][struck] // 4))
        broken = clipped[last] - clipped[first]
        scores.append(bands + 0.1 * min(struck.sum(), 30) - held.sum() - 0.5 * cut.sum() - 0.01 * broken)
    return float(starts[int(np.argmax(scores))])


def expected_level(notes: np.ndarray, seconds: float) -> float:
    """RMS, dB, of a piano whose tones are of full scale at velocity 127, by its notes alone; -inf without notes.

    Args:
        notes (`np.ndarray` with fields `onset`, `duration`, `velocity`): In s; those struck from 0 to `seconds` count.
        seconds (`float`): Length of the recording.
    """
    notes = notes[(notes["onset"] >= 0) & (notes["onset"] < seconds)]
    power = (np.maximum(notes["velocity"], 1) / 127.0) ** (VELOCITY_LAW_DB / 10)
    with np.errstate(divide="ignore"):
        tones = np.minimum(notes["duration"] + RELEASE_S, LONGEST_TONE_S)
        return float(10 * np.log10((power * tones).sum() / seconds))


def check_level(wave: np.ndarray, notes: np.ndarray, name: str) -> tuple[float, str]:
    """The gain, dB, that brings a recording to a usual level where its velocities do not explain its own (0 if they do,
    or if there is nothing to be heard), and a sentence for the user; mostly empty.

    Args:
        wave (`np.ndarray` of shape `(samples,)`): 32 kHz.
        notes (`np.ndarray` with fields `onset`, `duration`, `velocity`): In s from the start of `wave`.
    """
    power = float(np.mean(np.square(wave, dtype=np.float64)))
    expected = expected_level(notes, len(wave) / SAMPLING_RATE)
    if not power > 0 or not np.isfinite(expected):
        return 0.0, ""
    level = 10 * np.log10(power)
    if LOUDNESS_DB[0] <= level - expected <= LOUDNESS_DB[1]:
        return 0.0, ""
    gain = float(np.clip(expected + USUAL_LOUDNESS_DB, *LEVELS_DB) - level)
    is_raised, found = gain > 0, "softer" if level - expected < LOUDNESS_DB[0] else "louder"
    if is_raised is not (found == "softer"):  # velocities that no level of a recording fits
        return 0.0, ""
    said = f"{name}: the recording is {found} than the velocities of its MIDI tell"
    return gain, f"{said}; {'raised' if is_raised else 'lowered'} by {abs(gain):.0f} dB"


def _rise(wave: np.ndarray) -> np.ndarray:
    """Rise of the log energy of each pitch class from one frame to the next, `(frames, 12)`, its mean removed."""
    padded = np.pad(wave, WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    frequency = np.fft.rfftfreq(WINDOW, 1 / SAMPLING_RATE)
    heard = (frequency > 100) & (frequency < 5000)
    pitch = np.round(69 + 12 * np.log2(frequency[heard] / 440)).astype(int)
    bank = np.equal.outer(pitch % 12, np.arange(12)).astype(np.float32)
    power = [np.abs(np.fft.rfft(part * np.hanning(WINDOW)))[:, heard] @ bank for part in np.array_split(frames, 32)]
    level = np.log(np.concatenate(power) + 1e-3 * max(np.max(np.concatenate(power)), 1e-9))
    rise = np.maximum(np.diff(level, axis=0, prepend=level[:1]), 0)
    return rise - rise.mean(0)
