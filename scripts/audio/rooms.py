# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Simulated rooms and microphones: impulse response, tone, level and noise from a preset and a seed.

Prompt and target of one recording share one `Room`, so they share its impulse response. All of this is simulated;
no real room was measured.
"""

from dataclasses import asdict, dataclass

import numpy as np
from scipy.signal import butter, fftconvolve, lfilter, sosfilt

SAMPLING_RATE = 32_000
TARGET_RMS_DBFS = -23.0


@dataclass(frozen=True)
class RoomPreset:
    """One room and microphone. Times in s, levels in dB, frequencies in Hz, noise in dBFS RMS."""

    rt60: float
    high_decay: float  # decay time above 6 kHz as a share of rt60; in wet rooms what leaks from below lasts longer
    wet_db: float
    low_shelf_db: float
    high_shelf_db: float
    high_pass_hz: float
    low_pass_hz: float
    noise_dbfs: float


ROOMS = {
    "dry_close": RoomPreset(0.25, 0.60, -16, 0, 1, 30, 15_500, -78),
    "living_room": RoomPreset(0.45, 0.50, -9, 1, -1, 50, 15_000, -66),
    "studio": RoomPreset(0.70, 0.60, -10, 0, 0, 30, 15_500, -74),
    "chamber_hall": RoomPreset(1.30, 0.50, -6, 1, -1, 30, 15_000, -70),
    "concert_hall": RoomPreset(2.10, 0.40, -4, 1, -2, 30, 14_500, -68),
    "church": RoomPreset(3.40, 0.35, -1, 0, -3, 40, 13_000, -66),
    "old_tape": RoomPreset(0.90, 0.40, -7, -3, -2, 90, 9_000, -58),
    "phone_mic": RoomPreset(0.60, 0.50, -5, -6, 2, 150, 11_000, -60),
}
ANY_ROOM = "any"  # another one with every seed, between these
SMALLEST = RoomPreset(0.20, 0.30, -18, -6, -4, 20, 9_000, -80)
LARGEST = RoomPreset(4.00, 0.70, 0, 3, 3, 160, 15_500, -58)
ROOM_NAMES = (*ROOMS, ANY_ROOM)


def any_room(rng: np.random.Generator) -> RoomPreset:
    """A room at random: times and frequencies are drawn evenly by their ratios, levels by their differences."""
    drawn = {}
    for name, least in asdict(SMALLEST).items():
        most = getattr(LARGEST, name)
        ratio = least > 0  # all others are levels, in dB
        drawn[name] = least * (most / least) ** rng.random() if ratio else rng.uniform(least, most)
    return RoomPreset(**drawn)


def without_clipping(*waves: np.ndarray) -> list[np.ndarray]:
    """Waves of one recording in float32, at one gain: 1, or what lets the highest peak of all be 0.97."""
    peak = max(float(np.abs(wave).max(initial=0)) for wave in waves)
    return [(wave * (0.97 / peak if peak > 0.97 else 1.0)).astype(np.float32) for wave in waves]


class Room:
    """A preset made concrete by a seed: `room(dry, level, rng)` -> the recorded wave.

    Args:
        preset (`str`): key of `ROOMS`, or `ANY_ROOM`.
        seed (`int`): of the impulse response and of the jitter.
        jitter (`float`): decay time and tone vary by up to this share between seeds; 0 keeps the preset.
    """

    def __init__(self, preset: str, seed: int, jitter: float = 0.2):
        if preset not in ROOM_NAMES:
            raise ValueError(f"unknown room {preset!r}: choose one of {', '.join(ROOM_NAMES)}")
        rng = np.random.default_rng([seed, [*sorted(ROOMS), ANY_ROOM].index(preset)])
        self.preset, self.spec = preset, any_room(rng) if preset == ANY_ROOM else ROOMS[preset]
        self.rt60 = self.spec.rt60 * (1 + jitter * rng.uniform(-1, 1))
        self.gain_db = 3.0 * rng.uniform(-1, 1) if jitter else 0.0
        tone = 1 + jitter * rng.uniform(-1, 1, 2)
        self.low_db, self.high_db = self.spec.low_shelf_db * tone[0], self.spec.high_shelf_db * tone[1]
        response = self._impulse_response(rng)
        self.response = (self._tone(response) / np.sqrt((response**2).sum())).astype(np.float32)

    def __call__(self, dry: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
        """Put `dry` (samples,) of mean RMS `level` into the room; float32, same length, peak at most 0.97.

        Callers add the room's decay as silence at the end of `dry` if they want to hear it.
        """
        return without_clipping(self.record(dry, level, rng))[0]

    def record(self, dry: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
        """The same without a limit: what the microphone gives at a gain that only `level` and the room decide."""
        wet = fftconvolve(dry, self.response)[: len(dry)]
        wet *= 10 ** ((TARGET_RMS_DBFS + self.gain_db) / 20) / max(level, 1e-6)
        noise = lfilter([0.32], [1, -0.68], rng.standard_normal(len(dry)))  # first-order low-pass at about 2 kHz
        return wet + (noise * (10 ** (self.spec.noise_dbfs / 20) / noise.std()) if len(dry) > 1 else 0)

    def _impulse_response(self, rng: np.random.Generator) -> np.ndarray:
        spec, n = self.spec, int((1.2 * self.rt60 + 0.05) * SAMPLING_RATE)
        early = np.zeros(n)
        times = rng.uniform(0.002, 0.035, rng.integers(6, 12))
        early[(times * SAMPLING_RATE).astype(int)] += rng.choice([-1, 1], len(times)) * np.exp(-times / 0.020)
        early *= 10 ** ((spec.wet_db - 3) / 20) / np.sqrt((early**2).sum())
        t = np.arange(n) / SAMPLING_RATE
        tail = np.zeros(n)
        bands = ((20, 250, 1.15), (250, 2000, 1.0), (2000, 6000, 0.75), (6000, 15_500, spec.high_decay))
        for low, high, share in bands:
            band = butter(2, (low, high), "bandpass", fs=SAMPLING_RATE, output="sos")
            tail += sosfilt(band, rng.standard_normal(n)) * 10 ** (-3 * t / (self.rt60 * share))
        tail *= np.clip(t / 0.022, 0, 1) * np.where(t < 0.012, 0.2, 1.0)
        tail *= 10 ** (spec.wet_db / 20) / np.sqrt((tail**2).sum())
        response = early + tail
        response[0] += 1.0
        return response

    def _tone(self, x: np.ndarray) -> np.ndarray:
        low = lfilter(*butter(1, 200, "low", fs=SAMPLING_RATE), x)
        high = lfilter(*butter(1, 4000, "high", fs=SAMPLING_RATE), x)
        x = x + low * (10 ** (self.low_db / 20) - 1) + high * (10 ** (self.high_db / 20) - 1)
        x = sosfilt(butter(2, self.spec.high_pass_hz, "high", fs=SAMPLING_RATE, output="sos"), x)
        return sosfilt(butter(4, self.spec.low_pass_hz, "low", fs=SAMPLING_RATE, output="sos"), x)
