# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Audio files <-> waves. WAV and FLAC only, checked before a decoder sees them; written whole or not at all.

libsndfile alone would block on a FIFO, take 0-sample files, NaN and rates of 1 Hz, and open decoders with known
overflows (ADPCM, GSM, MP3 inside WAV), hence the guards.
"""

import io
import os
import stat
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 32_000
MAX_BYTES = MAX_SAMPLES = 200_000_000  # of a file; of all channels together
MIN_RATE, MAX_RATE, MAX_CHANNELS = 8_000, 192_000, 8
CONTAINERS = {b"RIFF": "WAV", b"RIFX": "WAV", b"RF64": "WAV", b"fLaC": "FLAC"}
SUBTYPES = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")
OUTPUT_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
BLOCK = 1 << 20  # frames decoded at a time
FULL_SCALE = 0.999  # highest peak written; louder waves are turned down, not clipped


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file, what is wrong and, if of use, what to do."""


def read_audio(audio: str | os.PathLike | bytes, name: str | None = None) -> tuple[np.ndarray, int]:
    """Read a WAV (also RF64) or FLAC file of PCM or float samples.

    Args:
        audio (`str`, `os.PathLike` or `bytes`): A file of at most 200 MB, or its bytes.
        name (`str`, *optional*): Name for messages, if not the file's own.

    Returns:
        `tuple(np.ndarray, int)`: wave `(samples, channels)`, float32 with full scale 1.0, and its rate in Hz.

    Raises:
        `AudioError`: not such a file, damaged, empty, with NaN, or beyond the limits (8 to 192 kHz, 8 channels).
    """
    if isinstance(audio, (bytes, bytearray)):
        name, data = name or "audio", bytes(audio)
    else:
        name = name or Path(audio).name
        data = _read(audio, name)
    if len(data) > MAX_BYTES:
        raise AudioError(f"{name}: {len(data)} bytes are too many (limit {MAX_BYTES})")
    if not data:
        raise AudioError(f"{name}: the file is empty; give a WAV or FLAC file")
    if data[:4] not in CONTAINERS:
        kind = {b"OggS": "an Ogg", b"ID3\x03": "an MP3", b"ID3\x04": "an MP3", b"MThd": "a MIDI"}.get(data[:4])
        raise AudioError(f"{name}: {f'is {kind} file' if kind else 'is not audio'}; convert it to WAV or FLAC")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            wave = _decode(file, name)
            rate = file.samplerate
    except (soundfile.SoundFileError, RuntimeError, MemoryError, OverflowError) as error:
        raise AudioError(f"{name}: damaged {CONTAINERS[data[:4]]} data; export the file again") from error
    return check_wave(wave, rate, name), rate


def check_wave(wave: np.ndarray, sampling_rate: float, name: str = "audio") -> np.ndarray:
    """Return `wave` if it has samples, all finite, at a usable rate (Hz); else raise `AudioError`."""
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


def check_output(path: str | os.PathLike) -> Path:
    """Return `path` if audio can be written there by its name and folder; else raise `AudioError`."""
    path = Path(path)
    if path.suffix.lower() not in OUTPUT_FORMATS:
        raise AudioError(f"{path.name}: the output must end in {' or '.join(OUTPUT_FORMATS)}")
    if not path.parent.is_dir():
        raise AudioError(f"{path.name}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise AudioError(f"{path.name}: is a folder; give the name of a file")
    return path


def write_audio(
    path: str | os.PathLike, wave: np.ndarray, sampling_rate: int = SAMPLING_RATE, subtype: str = "PCM_16"
) -> float:
    """Write a WAV or FLAC file, by the ending of its name. The file appears complete or not at all.

    Args:
        path (`str` or `os.PathLike`): An existing file is replaced.
        wave (`np.ndarray` of shape `(samples,)` or `(samples, channels)`): Full scale 1.0.
        sampling_rate (`int`): Hz.
        subtype (`str`): `"PCM_16"` or `"PCM_24"`.

    Returns:
        `float`: the gain that was applied; below 1.0 where a louder peak would have been clipped.

    Raises:
        `AudioError`: a name, folder or wave that cannot be written.
    """
    path, wave = check_output(path), np.asarray(wave)
    check_wave(wave, sampling_rate, path.name)
    gain = min(1.0, FULL_SCALE / max(float(np.abs(wave).max()), FULL_SCALE))
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        soundfile.write(partial, wave * gain, sampling_rate, subtype, format=OUTPUT_FORMATS[path.suffix.lower()])
        os.replace(partial, path)
    except (OSError, soundfile.SoundFileError) as error:
        raise AudioError(f"{path.name}: cannot be written to {path.parent} ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return gain


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


def _decode(file: soundfile.SoundFile, name: str) -> np.ndarray:
    """Check the header, then decode slice by slice; `(samples, channels)`."""
    if file.format not in ("WAV", "WAVEX", "RF64", "FLAC") or file.subtype not in SUBTYPES:
        raise AudioError(f"{name}: {file.format} with {file.subtype} is not supported; save it as PCM WAV or FLAC")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise AudioError(f"{name}: {file.channels} channels are too many (limit {MAX_CHANNELS})")
    if file.frames * file.channels > MAX_SAMPLES:
        raise AudioError(
            f"{name}: {file.frames} samples in {file.channels} channels are too many (limit {MAX_SAMPLES})"
        )
    wave = np.empty((file.frames, file.channels), np.float32)
    for start in range(0, len(wave), BLOCK):
        part = wave[start : start + BLOCK]
        if len(file.read(out=part)) < len(part):
            raise AudioError(f"{name}: the file is cut short; export it again")
    return wave
