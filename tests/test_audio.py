# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Audio files: what goes in comes out, and what cannot be used is refused in one sentence."""

import io
import os
import struct

import numpy as np
import pytest
import soundfile

from processing.audio_midivalle import (
    FULL_SCALE,
    AudioError,
    AudioWriter,
    read_audio,
    to_int16,
    to_mono_32k,
    write_audio,
)


def tone(seconds=0.5, rate=32_000, channels=1, hz=440.0, level=0.5):
    """A sine of `hz`, `(samples, channels)` float32."""
    wave = level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, 1).astype(np.float32)


def encoded(wave, rate=32_000, container="WAV", subtype="PCM_16", endian=None):
    """The bytes of an audio file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, subtype, endian, container)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("container", "subtype", "step"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "FLOAT", 0),
        ("WAVEX", "DOUBLE", 0),
        ("RF64", "PCM_32", 2**-24),
        ("FLAC", "PCM_S8", 2**-7),
        ("FLAC", "PCM_16", 2**-15),
    ],
)
def test_reads_what_was_written(container, subtype, step, tmp_path):
    wave = tone(channels=2)
    data = encoded(wave, 44_100, container, subtype)
    (tmp_path / "a.wav").write_bytes(data)
    for source in (data, tmp_path / "a.wav", str(tmp_path / "a.wav")):
        found, rate = read_audio(source)
        assert (found.shape, found.dtype, rate) == (wave.shape, np.float32, 44_100)
        assert np.abs(found - wave).max() <= step


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 192_000])
def test_resampling_keeps_pitch_level_and_length(rate):
    """Two channels of 440 Hz at 0.5 become one of the same, away from the ends; the length follows the rate."""
    found = to_mono_32k(tone(1.0, rate, channels=2), rate)
    assert found.shape == (32_000,) and found.dtype == np.float32
    assert np.abs(found - tone(1.0)[:, 0])[1000:-1000].max() < 2e-3
    assert to_mono_32k(np.stack([np.ones(9), np.zeros(9)], 1), 32_000).tolist() == [0.5] * 9


def test_16_bit_samples_are_rounded_and_clipped():
    samples = to_int16(np.array([1.5, 1.0, 0.25, 0.0, -0.25, -1.0, -1.5]))
    assert samples.dtype == np.int16 and samples.tolist() == [32767, 32767, 8192, 0, -8192, -32767, -32767]


@pytest.mark.parametrize(("ending", "subtype"), [(".wav", "PCM_16"), (".flac", "PCM_24"), (".WAV", "PCM_24")])
def test_writes_atomically_and_never_clips(ending, subtype, tmp_path):
    path = tmp_path / f"out{ending}"
    path.write_bytes(b"old")
    assert write_audio(path, tone(level=0.5), 32_000, subtype) == 1.0
    found, rate = read_audio(path)
    assert rate == 32_000 and np.abs(found - tone()).max() <= 2**-15
    gain = write_audio(path, tone(level=2.0), 32_000, subtype)
    assert gain == pytest.approx(FULL_SCALE / 2, rel=1e-3)
    assert np.abs(read_audio(path)[0] - tone(level=2.0) * gain).max() <= 2**-14
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.wav"
    write_audio(path, tone())
    old = path.read_bytes()

    def full_disk(file, *args, **kwargs):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(soundfile, "SoundFile", full_disk)
    with pytest.raises(AudioError, match=r"out\.wav: cannot be written .*No space left"):
        write_audio(path, tone(hz=220))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["out.wav"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.mp3", r"must end in \.wav or \.flac"), ("no/out.wav", "does not exist"), ("dir.wav", "is a folder")],
)
def test_refuses_outputs(name, message, tmp_path):
    (tmp_path / "dir.wav").mkdir()
    with pytest.raises(AudioError, match=message):
        write_audio(tmp_path / name, tone())


def test_refuses_to_write_what_is_not_sound(tmp_path):
    with pytest.raises(AudioError, match="not finite"):
        write_audio(tmp_path / "out.wav", np.array([0.0, np.nan]))
    for wave in (np.array([0, 300], np.int16), np.zeros((1, 1, 9)), np.zeros((2, 9))):
        with pytest.raises(AudioError, match=r"out.wav: cannot hold a wave of shape .* give floats"):
            write_audio(tmp_path / "out.wav", wave)
    with pytest.raises(AudioError, match="out.wav: cannot be written as 'PCM_9'; choose PCM_16 or PCM_24"):
        write_audio(tmp_path / "out.wav", tone(), subtype="PCM_9")
    writer = AudioWriter(tmp_path / "out.wav")
    writer.write(np.zeros(4))
    with pytest.raises(AudioError, match=r"shape \(2, 2\) .* as many channels each time"):
        writer.write(np.zeros((2, 2)))
    assert not os.listdir(tmp_path)


def patched(data, position, value, kind="<I"):
    return data[:position] + struct.pack(kind, value) + data[position + struct.calcsize(kind) :]


PLAIN = encoded(tone())  # 36 bytes of RIFF and fmt, then the samples
FLAC = encoded(tone(2.0) * np.random.default_rng(0).uniform(0, 1, (64_000, 1)), container="FLAC")
BAD = {
    "empty": (b"", "empty"),
    "text": (b"not audio at all", "is not WAV or FLAC; convert it"),
    "Ogg": (encoded(tone(), container="OGG", subtype="VORBIS"), "is an Ogg file; convert it to WAV or FLAC"),
    "MP3": (b"\xff\xfb\x90\x00" + bytes(20), "is an MP3 file; convert it to WAV or FLAC"),
    "AIFF": (b"FORM" + bytes(20), "is an AIFF file"),
    "MIDI": (b"MThd" + bytes(20), "is a MIDI file"),
    "header only": (b"RIFF" + bytes(8), "damaged WAV"),
    "ADPCM": (encoded(tone(), subtype="IMA_ADPCM"), "IMA_ADPCM is not supported"),
    "mu-law": (encoded(tone(), subtype="ULAW"), "ULAW is not supported"),
    "no samples": (encoded(tone(0)), "no samples"),
    "NaN": (encoded(np.full((100, 1), np.nan), subtype="FLOAT"), "not finite"),
    "infinity": (encoded(np.full((100, 1), np.inf), subtype="DOUBLE"), "not finite"),
    "1 Hz": (patched(encoded(tone()), 24, 1), "1 Hz is outside"),
    "9 channels": (encoded(tone(channels=9)), "9 channels"),
    **{f"cut {kind}": (encoded(tone(), container=kind)[:-1000], "cut short") for kind in ("WAV", "WAVEX", "RF64")},
    "cut behind an odd chunk": (PLAIN[:36] + b"LIST\5\0\0\0notes\0" + PLAIN[36:-1000], "cut short"),
    "cut RIFX": (encoded(tone(), endian="BIG")[:-2], "cut short"),
    "cut FLAC": (FLAC[: len(FLAC) // 2], "damaged FLAC|cut short"),
    "huge FLAC": (patched(FLAC, 22, 0xFFFFFFFF), "too many|damaged"),
    "FLAC from a pipe": (FLAC[:21] + bytes([FLAC[21] & 0xF0]) + bytes(4) + FLAC[26:], "does not tell how long it is"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_bad_files_by_name(case, tmp_path):
    data, message = BAD[case]
    (tmp_path / "prompt.wav").write_bytes(data)
    with pytest.raises(AudioError, match=f"^prompt.wav: .*({message})"):
        read_audio(tmp_path / "prompt.wav")


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x80000000, 0x7FFFF000])
def test_a_wav_from_a_pipe_says_no_size(size):
    """Its writer could not go back to its header, where the place of the size holds the largest number or so."""
    data = encoded(tone())
    assert np.array_equal(read_audio(patched(data, 40, size))[0], read_audio(data)[0])


def test_refuses_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")  # must not block
    for path in (tmp_path / "pipe.wav", tmp_path):
        with pytest.raises(AudioError, match="not a regular file"):
            read_audio(path)
    with pytest.raises(AudioError, match="missing.wav: cannot be read"):
        read_audio(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="cannot be read"):
        read_audio("a\0.wav")


@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_damaged_bytes_raise_nothing_else(container):
    """300 files with a few changed bytes each: audio or AudioError, quickly."""
    rng, data = np.random.default_rng(1), encoded(tone(0.05), container=container)
    for _ in range(300):
        changed = bytearray(data)
        for position in rng.integers(0, min(len(data), 120), 3):
            changed[position] = rng.integers(256)
        try:
            wave, rate = read_audio(bytes(changed))
        except AudioError:
            continue
        assert np.isfinite(wave).all() and wave.size and rate >= 8000


@pytest.mark.parametrize("shape", [(), (2,)])
def test_pieces_are_written_as_one_and_turned_down_as_one(tmp_path, shape):
    """The loudest sample may come last: all of it is turned down; nothing but the file is left."""
    wave = 0.5 * np.random.default_rng(0).uniform(-1, 1, (5000, *shape))
    wave[-1] = 2.0
    writer = AudioWriter(tmp_path / "pieces.wav")
    for piece in (wave[:1], wave[1:1], wave[1:4000], wave[4000:]):
        writer.write(piece)
    assert list(tmp_path.iterdir()) == [] and writer.close() == write_audio(tmp_path / "whole.wav", wave) == 0.999 / 2
    assert (tmp_path / "pieces.wav").read_bytes() == (tmp_path / "whole.wav").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces.wav", "whole.wav"]
    with pytest.raises(AudioError, match="no samples"):
        AudioWriter(tmp_path / "empty.wav").close()
    with pytest.raises(AudioError, match="not finite"):
        AudioWriter(tmp_path / "nan.wav").write(np.full(3, np.nan))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces.wav", "whole.wav"]
