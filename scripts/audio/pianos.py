# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Dry piano sound from notes: sampled pianos (a folder or tar with `index.csv`) and SoundFonts through fluidsynth.

One waveform a note, chosen by key and velocity, shifted, scaled, released and summed. Every piano obeys one velocity
law, `42 log10(velocity / 127)` dB, so that equal velocities mean equal levels whatever the instrument.
"""

import csv
import io
import lzma
import math
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import lfilter

SAMPLING_RATE = 32_000
VELOCITY_LAW_DB = 42.0
MAX_NOTE_S = 10.0  # samples are cut here: a string is inaudible in a mix by then, and the cache stays small
UNDAMPED_ABOVE = 88  # keys without dampers ring on after release
INTEGERS, LEVELS = ("key", "lokey", "hikey", "lovel", "hivel"), ("onset_db", "peak_db")  # columns that are used
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError)  # what unpacking raises


class SourceError(ValueError):
    """A sound source that cannot be read or run."""


def velocity_gain(velocity: np.ndarray) -> np.ndarray:
    """Amplitude of the shared velocity law, 1.0 at velocity 127."""
    return (np.maximum(velocity, 1) / 127.0) ** (VELOCITY_LAW_DB / 20)


def performance_level(notes: np.ndarray) -> float:
    """Estimated dry RMS of a performance from its notes alone, so that excerpts share the level of the whole.

    Args:
        notes (`np.ndarray` with fields onset, duration, pitch, velocity): times in seconds.
    """
    if not len(notes):
        return 1.0
    energy = velocity_gain(notes["velocity"]) ** 2 * np.clip(notes["duration"] + 0.2, 0.2, 1.0)
    span = max(float((notes["onset"] + notes["duration"]).max() - notes["onset"].min()), 1.0)
    return float(np.sqrt(energy.sum() / span))


class SampledPiano:
    """A sampled piano. Callable: `piano(notes, seconds)` -> float32 wave at 32 kHz.

    Args:
        path: folder or `.tar` with `index.csv` (columns file, key, lokey, hikey, lovel, hivel, onset_db, peak_db,
            seconds) and its mono 32 kHz sound files.
    Raises:
        SourceError: the path holds no readable index, or not all that it lists; when it plays, a damaged sound file.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = path, Path(path).name.removesuffix(".tar")
        self._files = _read_piano_files(Path(path))
        rows = _read_index(path, self._files)
        self.layers = sorted({(row["lovel"], row["hivel"]) for row in rows})
        self.rows = {layer: [row for row in rows if (row["lovel"], row["hivel"]) == layer] for layer in self.layers}
        self.layer_db = {layer: _middle_level(self.rows[layer]) for layer in self.layers}
        self._waves = {}

    def __call__(self, notes: np.ndarray, seconds: float) -> np.ndarray:
        """Sum the notes (times in s, any before 0 are heard from 0 on) into `seconds` of sound, float32 (samples,)."""
        out = np.zeros(int(round(seconds * SAMPLING_RATE)), dtype=np.float32)
        for onset, duration, pitch, velocity in notes[["onset", "duration", "pitch", "velocity"]].tolist():
            start = int(onset * SAMPLING_RATE) if onset >= 0 else -int(-onset * SAMPLING_RATE)
            if start >= len(out):
                continue
            wave = self._note(int(pitch), int(velocity), duration)
            skip = max(-start, 0)
            begin = max(start, 0)
            part = wave[skip : skip + len(out) - begin]
            out[begin : begin + len(part)] += part
        return out

    def _note(self, pitch: int, velocity: int, duration: float) -> np.ndarray:
        layer = next((layer for layer in self.layers if layer[0] <= velocity <= layer[1]), self.layers[-1])
        sample, row = self._shifted(layer, pitch)
        duration = max(duration, 2.5) if pitch > UNDAMPED_ABOVE else duration
        tau = 0.25 if pitch < 60 else 0.18 if pitch < 80 else 0.12
        hold = int(duration * SAMPLING_RATE)
        wave = sample[: hold + int(5 * tau * SAMPLING_RATE)].astype(np.float32)
        level_db = VELOCITY_LAW_DB * np.log10(max(velocity, 1) / 127) + row["peak_db"] - self.layer_db[layer]
        wave *= np.float32(10 ** (level_db / 20))
        if len(wave) > hold:
            wave[hold:] *= np.exp(-np.arange(len(wave) - hold, dtype=np.float32) / (tau * SAMPLING_RATE))
        if len(self.layers) <= 2:  # few layers: the missing change of brightness with velocity is a low-pass
            cutoff = min(14_000.0, 600 * 2 ** (5.2 * velocity / 127))
            a = np.exp(-2 * np.pi * cutoff / SAMPLING_RATE)
            wave = lfilter([1 - a], [1, -a], wave).astype(np.float32)
        return wave

    def _shifted(self, layer: tuple[int, int], pitch: int) -> tuple[np.ndarray, dict]:
        if (layer, pitch) not in self._waves:
            rows = self.rows[layer]
            row = next((r for r in rows if r["lokey"] <= pitch <= r["hikey"]), None)
            row = row or min(rows, key=lambda r: abs(r["key"] - pitch))
            wave, rate = self._sound(row["file"])
            step = 2 ** ((pitch - row["key"]) / 12) * rate / SAMPLING_RATE
            count = min(int(len(wave) / step), int(MAX_NOTE_S * SAMPLING_RATE))
            shifted = np.interp(np.arange(count) * step, np.arange(len(wave)), wave)
            self._waves[layer, pitch] = shifted.astype(np.float16), row  # half the cache, -66 dB rounding at worst
        return self._waves[layer, pitch]

    def _sound(self, name: str) -> tuple[np.ndarray, int]:
        try:
            wave, rate = soundfile.read(io.BytesIO(self._files[name]), dtype="float32")
        except soundfile.LibsndfileError as error:
            raise SourceError(f"{self.path}: {name} cannot be read ({error.error_string}); copy it again") from error
        if wave.ndim > 1 or not len(wave) or not np.isfinite(wave).all():
            raise SourceError(f"{self.path}: {name} must be mono, not empty, and of finite samples")
        return wave, rate


class SoundFontPiano:
    """A SoundFont preset through the `fluidsynth` program (system package `fluidsynth`)."""

    def __init__(self, path: str | Path, program: int = 0):
        self.path, self.program = Path(path), program
        self.name = self.path.stem.lower() + (f"_{program}" if program else "")
        if not self.path.is_file():
            raise SourceError(f"{path}: no such SoundFont")
        if shutil.which("fluidsynth") is None:
            raise SourceError("SoundFonts need the fluidsynth program: install it (Debian: apt-get install fluidsynth)")

    def __call__(self, notes: np.ndarray, seconds: float) -> np.ndarray:
        """As `SampledPiano`. Notes that began before 0 are rendered from their onset, then cut."""
        lead = max(-float(notes["onset"].min()), 0.0) if len(notes) else 0.0
        wave = self._synthesise(notes, lead) * self.gain
        out = np.zeros(int(round(seconds * SAMPLING_RATE)), dtype=np.float32)
        part = wave[int(lead * SAMPLING_RATE) :][: len(out)]
        out[: len(part)] = part
        return out

    @cached_property
    def gain(self) -> float:
        """What brings the font to the level of sampled pianos, from a scale over the middle of the keyboard."""
        keys = np.arange(36, 85, 4)
        notes = np.zeros(len(keys), [("onset", float), ("duration", float), ("pitch", int), ("velocity", int)])
        notes["onset"], notes["duration"], notes["pitch"], notes["velocity"] = 0.5 * np.arange(len(keys)), 0.4, keys, 80
        wave = self._synthesise(notes, 0.0)
        rms = float(np.sqrt(np.square(wave, dtype=np.float64).sum() / (0.5 * len(keys) * SAMPLING_RATE)))
        if not rms:
            raise SourceError(f"{self.path}: program {self.program} is silent")
        return performance_level(notes) / rms

    def _synthesise(self, notes: np.ndarray, lead: float) -> np.ndarray:
        """The notes `lead` s later, until they have ended, as the font has them: `(samples,)`."""
        from symusic import Note, Score, Tempo, Track

        score = Score(4800)
        score.tempos.append(Tempo(0, 120))
        track = Track(program=self.program)
        for onset, duration, pitch, velocity in notes[["onset", "duration", "pitch", "velocity"]].tolist():
            ticks = round((onset + lead) * 9600)
            track.notes.append(Note(ticks, max(round(duration * 9600), 1), int(pitch), int(velocity)))
        score.tracks.append(track)
        with tempfile.TemporaryDirectory() as folder:
            midi, wav = Path(folder) / "in.mid", Path(folder) / "out.wav"
            score.dump_midi(str(midi))
            command = ["fluidsynth", "-ni", "-q", "-R", "0", "-C", "0", "-g", "0.5", "-r", str(SAMPLING_RATE)]
            command += ["-o", "synth.polyphony=512", "-O", "float", "-F", str(wav), str(self.path), str(midi)]
            done = subprocess.run(command, capture_output=True, text=True)
            unread = "Failed to load" in done.stderr or "not a SoundFont" in done.stderr  # its default one plays then
            if done.returncode or unread or not wav.is_file():
                raise SourceError(f"{self.path}: fluidsynth failed: {' '.join(done.stderr.split())[:200]}")
            return soundfile.read(wav, dtype="float32", always_2d=True)[0].mean(1)


@lru_cache(maxsize=8)
def load_piano(path: str) -> SampledPiano | SoundFontPiano:
    """A piano by path: folder or tar with `index.csv`, or `FONT.sf2[:PROGRAM]`; kept in memory for the process."""
    base, _, program = path.partition(":")
    if Path(base).suffix.lower() in (".sf2", ".sf3"):
        if program and not (program.isdecimal() and int(program) <= 127):
            raise SourceError(f"{path}: the program behind the colon must be 0 to 127")
        return SoundFontPiano(base, int(program or 0))
    return SampledPiano(path)


def _read_piano_files(path: Path) -> dict[str, bytes]:
    """All files of a piano by base name, still compressed."""
    try:
        if path.is_dir():
            files = {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()}
        elif path.is_file() and tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                files = {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isfile()}
        else:
            raise SourceError(f"{path}: neither a piano folder nor a tar file")
    except DAMAGE as error:
        raise SourceError(f"{path}: cannot be read ({error}); copy or download it again") from error
    if "index.csv" not in files:
        raise SourceError(f"{path}: holds no index.csv, so it is not a sampled piano")
    return files


def _read_index(path: str | Path, files: dict[str, bytes]) -> list[dict]:
    """The rows of index.csv; the sound file of each is there."""
    try:
        text = files["index.csv"].decode("utf-8-sig")  # spreadsheets begin a file with a mark
        rows = [_typed(row) for row in csv.DictReader(io.StringIO(text))]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        columns = ", ".join(("file", *INTEGERS, *LEVELS))
        raise SourceError(f"{path}: index.csv: expected a table with the columns {columns} ({error})") from error
    if not rows:
        raise SourceError(f"{path}: index.csv lists no sample")
    if missing := sorted({row["file"] for row in rows} - files.keys()):
        raise SourceError(f"{path}: holds no {missing[0]}, which index.csv lists; copy or download it again")
    return rows


def _typed(row: dict) -> dict:
    typed = {"file": row["file"]} | {k: int(row[k]) for k in INTEGERS} | {k: float(row[k]) for k in LEVELS}
    if not all(math.isfinite(typed[k]) for k in LEVELS):
        raise ValueError(f"a level of {row['file']} is not finite")
    return typed


def _middle_level(rows: list[dict]) -> float:
    """Mean onset level, dB, of a layer's middle keys; the anchor of the velocity law."""
    levels = [r["onset_db"] for r in rows if 40 <= r["key"] <= 76] or [r["onset_db"] for r in rows]
    return float(np.mean(levels))
