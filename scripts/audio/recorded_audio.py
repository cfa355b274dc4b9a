# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Excerpts of real recordings, with or without notes: folders of audio files, or parquet shards that hold audio.

A file of audio has its notes in a MIDI file of the same name beside it. A column `audio` or `NAME_audio` of a
shard (what `datasets.Audio` stores, a struct with `bytes`) has them in `NAME_onset`, `NAME_duration`, `NAME_pitch` and
`NAME_velocity` (`scripts.prepare_dataset --keep-audio`), or in `midi` or `NAME_midi`, the bytes of a MIDI file.
A constant part (DC) is taken out, as the processor takes it out of prompts.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from torch.utils.data import Dataset

from processing.audio_midivalle import check_wave, read_audio, to_int16, to_mono_32k, without_dc
from scripts.audio.pianos import SAMPLING_RATE, SourceError
from scripts.audio.rendered_audio import HOP, LOWEST_PITCH, PITCHES, onset_roll, sounding_excerpt
from scripts.audio.visible_files import visible_files
from tokenization.midi_midivalle import NOTE_DTYPE, MidiError, load_performance
from tokenization.tokenization_midivalle import MIDI_ENDINGS

AUDIO_FILES = (".wav", ".flac")
FIELDS = ("onset", "duration", "pitch", "velocity")


class RecordedExcerpts(Dataset):
    """Excerpts of recordings: number i is drawn from (seed, i). A recording counts by its length, a row as one excerpt.

    An item holds `wave` int16 (samples,) at 32 kHz, `onsets` uint8 (frames, 88), and `has_notes`, whether the recording
    has any: without, `onsets` is zero. A recording that is too short is followed by silence.

    Args:
        paths: audio files, parquet shards, or folders to look for both in.
        seconds: length of an excerpt.
    Attributes:
        digest (`str`): tells these files from others, by their places in `paths`, their sizes and what MIDI holds.
    Raises:
        SourceError: nothing is there, or a file is neither, or holds nothing, or the MIDI beside it cannot be used.
    """

    def __init__(self, paths, seconds: float, seed: int = 0):
        self.seconds, self.seed = seconds, seed
        files = [found for path in paths for found in _files(Path(path))]
        self.recordings = [recording for _, file, midi in files for recording in _recordings(file, midi)]
        if not self.recordings:
            raise SourceError(f"{', '.join(map(str, paths))}: no .wav, .flac or .parquet file with audio is there")
        self.digest = _digest(files)
        weights = np.array([max(recording.seconds / seconds, 1.0) for recording in self.recordings])
        self.weights = weights / weights.sum()

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        recording = self.recordings[rng.choice(len(self.recordings), p=self.weights)]
        wave, notes = recording.excerpt(rng, self.seconds)
        samples = round(self.seconds * SAMPLING_RATE)
        wave = np.pad(wave[:samples], (0, max(samples - len(wave), 0)))
        has_notes, notes = notes is not None, np.empty(0, NOTE_DTYPE) if notes is None else notes
        return {"wave": to_int16(wave), "onsets": onset_roll(notes, samples // HOP), "has_notes": np.array(has_notes)}


@dataclass(frozen=True)
class AudioFile:
    """One recording in a file; only what is wanted of it is read."""

    path: Path
    seconds: float
    midi: Path | None

    def excerpt(self, rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, np.ndarray | None]:
        """Wave (samples,) at 32 kHz from a random place on, and its notes, if there are any."""
        start = float(rng.uniform(0, max(self.seconds - seconds, 0.0)))
        try:
            with soundfile.SoundFile(self.path) as file:
                rate = file.samplerate
                file.seek(round(start * rate))
                wave = file.read(round(seconds * rate), dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise SourceError(f"{self.path}: cannot be read as audio ({error})") from error
        mono = without_dc(check_wave(wave, rate, str(self.path)).mean(1, dtype=np.float32))
        notes = _notes(self.midi)
        seconds = len(mono) / rate  # a MIDI may go on where the recording has ended
        return to_mono_32k(mono, rate), None if notes is None else sounding_excerpt(notes, start, seconds)


@dataclass(frozen=True)
class ShardRow:
    """One row of a shard."""

    path: Path
    group: int
    row: int
    name: str  # of the column
    seconds: float = 0.0

    def excerpt(self, rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, np.ndarray | None]:
        """As `AudioFile.excerpt`."""
        prefix = self.name.removesuffix("audio")
        columns = [self.name, *(f"{prefix}{field}" for field in FIELDS), f"{prefix}midi"]
        row = _row_group(str(self.path), self.group, tuple(columns)).slice(self.row, 1).to_pylist()[0]
        place = f"{self.path.name}, row {self.row}, {self.name}"
        if not (row[self.name] or {}).get("bytes"):
            raise SourceError(f"{place}: holds no audio; save the dataset with its files' bytes in it")
        wave = without_dc(to_mono_32k(*read_audio(row[self.name]["bytes"], place)))
        start = float(rng.uniform(0, max(len(wave) / SAMPLING_RATE - seconds, 0.0)))
        notes = _row_notes(row, prefix, place)
        wave = wave[round(start * SAMPLING_RATE) :][: round(seconds * SAMPLING_RATE)]
        return wave, None if notes is None else sounding_excerpt(notes, start, len(wave) / SAMPLING_RATE)


def _files(path: Path) -> list[tuple[str, Path, Path | None]]:
    """The files that are meant: where in `path` each is, the file, and the MIDI of its name beside it."""
    kinds = (*AUDIO_FILES, ".parquet")
    if path.is_dir():
        files = visible_files(path, kinds)
    elif path.is_file() and path.suffix.lower() in kinds:
        files = [path]
    else:
        raise SourceError(f"{path}: neither a folder nor one of {', '.join(kinds)}")
    midi = {}
    for folder in {file.parent for file in files}:
        for found in sorted(folder.iterdir()):
            if found.suffix.lower() in MIDI_ENDINGS:
                midi.setdefault(found.with_suffix(""), found)
    start = path if path.is_dir() else path.parent
    return [(str(file.relative_to(start)), file, midi.get(file.with_suffix(""))) for file in files]


def _digest(files: list[tuple[str, Path, Path | None]]) -> str:
    """Of what `_files` gives, and of the MIDI."""
    digest = hashlib.sha256()
    for name, file, midi in files:
        digest.update(repr((name, file.stat().st_size, midi and midi.read_bytes())).encode())
    return digest.hexdigest()


def _recordings(path: Path, midi: Path | None) -> list[AudioFile | ShardRow]:
    try:
        if path.suffix.lower() in AUDIO_FILES:
            if not (seconds := soundfile.info(path).duration):
                raise SourceError(f"{path}: holds no samples; take it out")
            _notes(midi)  # now, not when it is drawn, after hours of learning
            return [AudioFile(path, seconds, midi)]
        shard = pq.ParquetFile(path)
    except MidiError as error:
        raise SourceError(f"{path}: the MIDI beside it cannot be used ({error}); mend it, or take it out") from error
    except (soundfile.SoundFileError, RuntimeError, pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    names = [field.name for field in shard.schema_arrow if field.name.split("_")[-1] == "audio"]
    for name in names:
        kind = shard.schema_arrow.field(name).type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise SourceError(f"{path}: its column {name} is {kind}, not audio as `datasets` stores it (with bytes)")
    places = [(g, r) for g in range(shard.num_row_groups) for r in range(shard.metadata.row_group(g).num_rows)]
    return [ShardRow(path, group, row, name) for group, row in places for name in names]


def _row_notes(row: dict, prefix: str, place: str) -> np.ndarray | None:
    if row.get(f"{prefix}midi") is not None:
        return load_performance(row[f"{prefix}midi"]).notes
    if any(row.get(f"{prefix}{field}") is None for field in FIELDS):
        return None
    notes = np.empty(len(row[f"{prefix}onset"]), NOTE_DTYPE)
    try:
        for field in FIELDS:
            notes[field] = np.asarray(row[f"{prefix}{field}"], NOTE_DTYPE[field]).reshape(len(notes))
    except (TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"{place}: {prefix}{field} cannot be read as notes ({error})") from error
    known = (notes["pitch"] >= LOWEST_PITCH) & (notes["pitch"] < LOWEST_PITCH + PITCHES)
    known &= (notes["velocity"] >= 0) & (notes["velocity"] < 128) & np.isfinite(notes["onset"] + notes["duration"])
    if not known.all():
        raise SourceError(f"{place}: a note's times are not finite, its key is on no piano, or its velocity above 127")
    return notes


@lru_cache(maxsize=256)
def _notes(midi: Path | None) -> np.ndarray | None:
    return None if midi is None else load_performance(midi).notes


@lru_cache(maxsize=4)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    try:
        shard = pq.ParquetFile(path)
        return shard.read_row_group(group, [name for name in columns if name in shard.schema_arrow.names])
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
