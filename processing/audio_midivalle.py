# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Audio files <-> waves. WAV and FLAC only, checked before a decoder sees them; written whole or not at all.

libsndfile alone would block on a FIFO, take 0-sample files, NaN and rates of 1 Hz, and open decoders with known
overflows (ADPCM, GSM, MP3 inside WAV), hence the guards.
"""

import io
import math
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 32_000
MAX_BYTES = MAX_SAMPLES = 200_000_000  # of a file; of all channels together
MIN_RATE, MAX_RATE, MAX_CHANNELS = 8_000, 192_000, 8
CONTAINERS = {b"RIFF": "WAV", b"RIFX": "WAV", b"RF64": "WAV", b"fLaC": "FLAC"}
OTHERS = {b"OggS": "an Ogg", b"ID3": "an MP3", b"\xff\xfb": "an MP3", b"\xff\xf3": "an MP3", b"MThd": "a MIDI"}
OTHERS |= {b"FORM": "an AIFF", b"caff": "a CAF"}
SUBTYPES = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")
OUTPUT_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
BLOCK = 1 << 20  # frames decoded at a time
UNKNOWN_SIZE = 0x7FFF0000  # of a WAV's samples in bytes, or more: its writer could not go back to its header (a pipe)
LONGEST_NAME = 230  # bytes: file systems take 255, with what is added to it while a file is being made
LEAST_DC = 0.05  # of a wave's RMS: a smaller constant part is left as it is
FULL_SCALE = 0.999  # highest peak written; louder waves are turned down, not clipped


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file, what is wrong and, if of use, what to do."""


def read_audio(audio: "str | os.PathLike | bytes | BinaryIO", name: str | None = None) -> tuple[np.ndarray, int]:
    """Read a WAV (also RF64) or FLAC file of PCM or float samples.

    Args:
        audio (`str`, `os.PathLike`, `bytes` or binary file):
            A file of at most 200 MB, its bytes (`bytearray` and `memoryview` too), or one that is open for reading.
        name (`str`, *optional*): Name for messages, if not the file's own.

    Returns:
        `tuple(np.ndarray, int)`: wave `(samples, channels)`, float32 with full scale 1.0, and its rate in Hz.

    Raises:
        `AudioError`: not such a file, damaged, empty, with NaN, or beyond the limits (8 to 192 kHz, 8 channels).
    """
    if hasattr(audio, "read"):
        name = name or "audio"
        data = _read_open(audio, name)
    elif isinstance(audio, (bytes, bytearray, memoryview)):
        name, data = name or "audio", bytes(audio)
    else:
        name = name or Path(audio).name or repr(str(audio))
        data = _read(audio, name)
    if len(data) > MAX_BYTES:
        raise AudioError(f"{name}: {len(data)} bytes are too many (limit {MAX_BYTES})")
    if not data:
        raise AudioError(f"{name}: the file is empty; give a WAV or FLAC file")
    if data[:4] not in CONTAINERS:
        kind = next((kind for head, kind in OTHERS.items() if data.startswith(head)), None)
        raise AudioError(f"{name}: {f'is {kind} file' if kind else 'is not WAV or FLAC'}; convert it to WAV or FLAC")
    if CONTAINERS[data[:4]] == "WAV" and _is_cut(data):  # libsndfile takes what is there without a word
        raise AudioError(f"{name}: the file is cut short; export it again")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            wave = _decode(file, name)
            rate = file.samplerate
    except (soundfile.SoundFileError, RuntimeError, MemoryError, OverflowError) as error:
        raise AudioError(f"{name}: damaged {CONTAINERS[data[:4]]} data; export the file again") from error
    return check_wave(wave, rate, name), rate


def check_wave(wave: np.ndarray, sampling_rate: float, name: str = "audio") -> np.ndarray:
    """Return `wave` if it has samples, all finite, at a usable rate (Hz); else raise `AudioError`."""
    if not isinstance(sampling_rate, (int, float, np.integer, np.floating)):
        raise AudioError(f"{name}: its sampling rate {sampling_rate!r} is no number; give it in Hz")
    if not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise AudioError(f"{name}: a sampling rate of {sampling_rate} Hz is outside {MIN_RATE} to {MAX_RATE} Hz")
    if not wave.size:
        raise AudioError(f"{name}: holds no samples")
    if not np.isfinite(wave).all():
        raise AudioError(f"{name}: holds samples that are not finite numbers")
    return wave


def to_mono_32k(wave: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Average the channels and resample to 32 kHz (soxr, very high quality); the level is kept.

    Args:
        wave (`np.ndarray` of shape `(samples,)` or `(samples, channels)`): Float audio.
        sampling_rate (`float`): Its rate in Hz.

    Returns:
        `np.ndarray` of shape `(samples * 32000 / sampling_rate,)`, rounded, float32.
    """
    mono = wave.mean(1, dtype=np.float32) if wave.ndim == 2 else wave.astype(np.float32)
    return mono if sampling_rate == SAMPLING_RATE else soxr.resample(mono, sampling_rate, SAMPLING_RATE, "VHQ")


def without_dc(wave: np.ndarray) -> np.ndarray:
    """`wave` `(samples,)` without its constant part, which cheap converters add: nobody hears it, but to a model it is
    sound of a level of its own. One that is next to nothing is left, and the wave with it, bit by bit."""
    mean, spread = (wave.mean(dtype=np.float64), wave.std(dtype=np.float64)) if wave.size else (0.0, 0.0)
    return wave - np.float32(mean) if abs(mean) > LEAST_DC * spread else wave


def to_int16(wave: np.ndarray) -> np.ndarray:
    """A wave of full scale 1.0 as 16-bit samples, rounded; louder ones are clipped."""
    return np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)


def check_output(path: str | os.PathLike) -> Path:
    """Return `path` if audio can be written there by its name and folder; else raise `AudioError`."""
    path = Path(path)
    if path.suffix.lower() not in OUTPUT_FORMATS:
        raise AudioError(f"{path.name}: the output must end in {' or '.join(OUTPUT_FORMATS)}")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise AudioError(f"{path.name}: is too long a name; give one of at most {LONGEST_NAME} bytes")
    if not path.parent.is_dir():
        raise AudioError(f"{path.name}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise AudioError(f"{path.name}: is a folder; give the name of a file")
    return path


class AudioWriter:
    """A WAV or FLAC file, written piece by piece in little memory; it appears complete or not at all.

    As the loudest sample is known at the end only, the pieces wait in an unnamed file, which vanishes with the process.

    Args:
        path (`str` or `os.PathLike`): Format by the ending of its name. An existing file is replaced.
        sampling_rate (`int`): Hz.
        subtype (`str`): `"PCM_16"` or `"PCM_24"`.

    Example:

    ```python
    >>> writer = AudioWriter("piece.wav")
    >>> for wave in waves:
    ...     writer.write(wave)
    >>> gain = writer.close()
    ```"""

    def __init__(self, path: str | os.PathLike, sampling_rate: int = SAMPLING_RATE, subtype: str = "PCM_16"):
        self.path, self.sampling_rate, self.subtype = check_output(path), sampling_rate, subtype
        if not soundfile.check_format(OUTPUT_FORMATS[self.path.suffix.lower()], subtype):
            raise AudioError(f"{self.path.name}: cannot be written as {subtype!r}; choose PCM_16 or PCM_24")
        self.samples, self.peak, self.shape = 0, 0.0, ()
        try:
            self.waiting = tempfile.TemporaryFile(dir=self.path.parent)
        except OSError as error:
            reason = f"cannot be written to {self.path.parent} ({error.strerror or error})"
            raise AudioError(f"{self.path.name}: {reason}") from error

    def write(self, wave: np.ndarray) -> None:
        """Append `wave` `(samples,)` or `(samples, channels)`, full scale 1.0; `AudioError` if it is not finite floats,
        or of other channels than the pieces before."""
        wave = np.asarray(wave)
        is_wave = wave.dtype.kind == "f" and wave.ndim in (1, 2) and math.prod(wave.shape[1:]) <= MAX_CHANNELS
        if not is_wave or (self.samples and wave.shape[1:] != self.shape):
            raise AudioError(
                f"{self.path.name}: cannot hold a wave of shape {wave.shape} and type {wave.dtype}; give floats, "
                f"(samples,) or (samples, channels), as many channels each time, at most {MAX_CHANNELS}"
            )
        wave = np.ascontiguousarray(wave, np.float32)
        if wave.size:
            check_wave(wave, self.sampling_rate, self.path.name)
            self.peak, self.shape = max(self.peak, float(np.abs(wave).max())), wave.shape[1:]
            self.samples += len(wave)
            self._try(lambda: self.waiting.write(wave.data))

    def close(self) -> float:
        """Write the file; returns the gain that was applied: below 1.0 where a louder peak would have been clipped."""
        if not self.samples:
            raise AudioError(f"{self.path.name}: holds no samples")
        gain = min(1.0, FULL_SCALE / max(self.peak, FULL_SCALE))
        self._try(lambda: self._encode(gain))
        return gain

    def _encode(self, gain: float) -> None:
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        channels = self.shape[0] if self.shape else 1
        kind = {"subtype": self.subtype, "format": OUTPUT_FORMATS[self.path.suffix.lower()]}
        try:
            self.waiting.seek(0)
            with soundfile.SoundFile(partial, "w", self.sampling_rate, channels, **kind) as file:
                while data := self.waiting.read(4 * channels * BLOCK):
                    wave = np.frombuffer(data, np.float32).reshape(-1, *self.shape) * np.float32(gain)
                    file.write(to_int16(wave) if self.subtype == "PCM_16" else wave)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
            self.waiting.close()

    def _try(self, write) -> None:
        try:
            write()
        except (OSError, soundfile.SoundFileError) as error:
            reason = f"cannot be written to {self.path.parent} ({error.strerror or error})"
            raise AudioError(f"{self.path.name}: {reason}") from error


def write_audio(
    path: str | os.PathLike, wave: np.ndarray, sampling_rate: int = SAMPLING_RATE, subtype: str = "PCM_16"
) -> float:
    """Write a WAV or FLAC file at once, as `AudioWriter` does; returns the gain that was applied.

    Args:
        wave (`np.ndarray` of shape `(samples,)` or `(samples, channels)`): Full scale 1.0.
        path, sampling_rate, subtype: As for `AudioWriter`.

    Raises:
        `AudioError`: a name, folder or wave that cannot be written.
    """
    check_wave(np.asarray(wave), sampling_rate, check_output(path).name)
    writer = AudioWriter(path, sampling_rate, subtype)
    writer.write(wave)
    return writer.close()


def _read(path: str | os.PathLike, name: str) -> bytes:
    try:
        status = os.stat(path)  # before open: opening a FIFO would block for ever
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{name}: not a regular file; give a WAV or FLAC file")
        if status.st_size > MAX_BYTES:
            raise AudioError(f"{name}: {status.st_size} bytes are too many (limit {MAX_BYTES})")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_open(file, name: str) -> bytes:
    """An open file from where it stands on."""
    if isinstance(file, io.TextIOBase):
        raise AudioError(f"{name}: the file is open as text; open it with mode 'rb'")
    try:
        return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise AudioError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _is_cut(data: bytes) -> bool:
    """Whether the header of a WAV promises more samples than follow."""
    order, position, size64 = "big" if data.startswith(b"RIFX") else "little", 12, 0
    while position + 8 <= len(data):
        chunk, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], order)
        position += 8
        if chunk == b"ds64":
            size64 = int.from_bytes(data[position + 8 : position + 16], order)
        elif chunk == b"data":
            size = size64 if size64 and size == 0xFFFFFFFF else size
            return len(data) - position < size < UNKNOWN_SIZE
        position += size + size % 2
    return False


def _decode(file: soundfile.SoundFile, name: str) -> np.ndarray:
    """Check the header, then decode slice by slice; `(samples, channels)`."""
    if file.format not in ("WAV", "WAVEX", "RF64", "FLAC") or file.subtype not in SUBTYPES:
        raise AudioError(f"{name}: {file.format} with {file.subtype} is not supported; save it as PCM WAV or FLAC")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise AudioError(f"{name}: {file.channels} channels are too many (limit {MAX_CHANNELS})")
    if file.frames > 1 << 62:  # of a FLAC whose writer could not go back to its header (a pipe)
        raise AudioError(f"{name}: its header does not tell how long it is; save it again, to a file")
    if file.frames * file.channels > MAX_SAMPLES:
        raise AudioError(
            f"{name}: {file.frames * file.channels} samples of all channels together are too many (limit {MAX_SAMPLES})"
        )
    wave = np.empty((file.frames, file.channels), np.float32)
    for start in range(0, len(wave), BLOCK):
        part = wave[start : start + BLOCK]
        if len(file.read(out=part)) < len(part):
            raise AudioError(f"{name}: the file is cut short; export it again")
    return wave
