# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Endless audio for the codec: MIDI rendered on pianos and rooms as it is needed, so nothing is stored or seen twice.

`RenderedCrops` draws a performance, an excerpt, a piano and a room from (seed, worker, counter) alone and yields short
crops of the sound with the note onsets in them.
"""

import csv
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from scripts.pianos import SAMPLING_RATE, load_piano, performance_level
from scripts.rooms import Room, without_clipping
from tokenization.midi_midivalle import MidiError, Performance, load_performance

HOP = 640
LOWEST_PITCH, PITCHES = 21, 88


@dataclass(frozen=True)
class MidiFile:
    """One performance of a MIDI pack: where it is and what its manifest says."""

    path: str
    archive: str | None
    split: str
    duration: float
    composition_id: str
    licence: str

    def load(self, root: str) -> Performance:
        """Read the notes, pedal applied."""
        if self.archive is None:
            return load_performance(Path(root) / self.path)
        return load_performance(_archive_members(str(Path(root) / self.archive))[self.path])


def list_midi(root: str | Path, split: str) -> list[MidiFile]:
    """The files of one split of a MIDI folder.

    Args:
        root: folder with `manifest.csv` (columns path, split, duration_s, composition_id, licence, source) beside the
            files or beside one `SOURCE.tar.xz` an archive; without a manifest every `.mid`/`.midi` below is taken.
    Raises:
        MidiError: nothing of that split is there.
    """
    root = Path(root)
    manifest = root / "manifest.csv"
    if not manifest.is_file():
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in (".mid", ".midi"))
        found = [MidiFile(str(p.relative_to(root)), None, split, 0.0, p.stem, "unknown") for p in paths]
    else:
        with open(manifest, newline="") as f:
            rows = [row for row in csv.DictReader(f) if row["split"] == split]
        found = [_manifest_file(root, row) for row in rows]
    if not found:
        raise MidiError(f"{root}: no MIDI file of split {split!r}; expected manifest.csv or .mid files")
    return found


def sounding_excerpt(notes: np.ndarray, start: float, seconds: float) -> np.ndarray:
    """Notes heard in [start, start + seconds), times relative to `start` (held ones have negative onsets)."""
    ends = notes["onset"] + notes["duration"]
    part = notes[(notes["onset"] < start + seconds) & (ends > start - 2.0)].copy()
    part["onset"] -= start
    return part


def onset_roll(notes: np.ndarray, frames: int) -> np.ndarray:
    """uint8 (frames, 88): the velocity of each key that is struck in a frame of 20 ms; notes relative to frame 0."""
    roll = np.zeros((frames, PITCHES), np.uint8)
    at = np.floor(notes["onset"] * SAMPLING_RATE / HOP).astype(int)
    struck = (at >= 0) & (at < frames)
    roll[at[struck], notes["pitch"][struck] - LOWEST_PITCH] = notes["velocity"][struck]
    return roll


class RenderedCrops(IterableDataset):
    """Endless crops of rendered piano.

    Yields dicts of `input_values` (samples,) float32 at 32 kHz and `onsets` (frames, 88) float32, 1.0 where a key is
    struck in that 20 ms frame.

    Args:
        midi_root, split: see `list_midi`.
        pianos: paths for `load_piano`.
        rooms: names of `scripts.rooms.ROOMS`.
        crop_seconds: length of a crop, a multiple of 0.02 s.
        excerpt_seconds: how much is rendered at a time; it is cut into crops and pooled, so that a batch mixes pieces.
        pool: crops held for mixing.
        seed: everything drawn is a function of (seed, worker, count).
    """

    def __init__(self, midi_root, split, pianos, rooms, crop_seconds=1.5, excerpt_seconds=12.0, pool=192, seed=0):
        self.root, self.files = str(midi_root), list_midi(midi_root, split)
        self.pianos, self.rooms = list(pianos), list(rooms)
        self.crop, self.excerpt_seconds, self.pool, self.seed = crop_seconds, excerpt_seconds, pool, seed
        durations = np.array([max(f.duration, 1.0) for f in self.files])
        self.weights = durations / durations.sum()
        self._performances = {}

    def __iter__(self):
        torch.set_num_threads(1)
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        pool = []
        while True:
            pool.extend(self._crops(rng))
            while len(pool) > self.pool:
                yield pool.pop(int(rng.integers(len(pool))))

    def excerpt(self, rng: np.random.Generator, seconds: float | None = None) -> tuple[np.ndarray, np.ndarray, dict]:
        """One rendered excerpt: wave (samples,), notes relative to its start, and what it is."""
        seconds = seconds or self.excerpt_seconds
        file = self.files[rng.choice(len(self.files), p=self.weights)]
        performance = self._load(file)
        start = float(rng.uniform(0, max(performance.end - seconds, 0.01)))
        piano = self.pianos[rng.integers(len(self.pianos))]
        room = self.rooms[rng.integers(len(self.rooms))]
        seed = int(rng.integers(2**31))
        wave = render(performance.notes, start, seconds, piano, Room(room, seed), rng)
        notes = sounding_excerpt(performance.notes, start, seconds)
        return wave, notes, {"path": file.path, "start": start, "piano": piano, "room": room, "room_seed": seed}

    def _load(self, file: MidiFile) -> Performance:
        if file.path not in self._performances:
            self._performances[file.path] = file.load(self.root)
        return self._performances[file.path]

    def _crops(self, rng: np.random.Generator) -> list[dict]:
        wave, notes, _ = self.excerpt(rng)
        size, frames = round(self.crop * SAMPLING_RATE), round(self.crop * SAMPLING_RATE) // HOP
        onsets = (onset_roll(notes, len(wave) // HOP) > 0).astype(np.float32)
        return [
            {"input_values": wave[i * size : (i + 1) * size], "onsets": onsets[i * frames : (i + 1) * frames]}
            for i in range(len(wave) // size)
        ]


class StoredCrops(IterableDataset):
    """Endless random crops of rendered pools: `.npy` files of int16 (excerpts, samples).

    Yields `input_values (samples,)` and `onsets (frames, 88)`, 1 where a key is struck; with the hash of a codec that
    has encoded every pool (see `codes_path`) also `audio_codes (K, lead + frames)`, from `lead_seconds` before the crop
    on. Crops start on a frame.
    """

    def __init__(self, paths, crop_seconds: float, seed: int = 0, codec_sha256: str | None = None, lead_seconds=0.0):
        self.paths, self.frames, self.seed = list(paths), round(crop_seconds * SAMPLING_RATE) // HOP, seed
        self.codec_sha256, self.lead = codec_sha256, round(lead_seconds * SAMPLING_RATE) // HOP

    def __iter__(self):
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        pools = [np.load(path, mmap_mode="r") for path in self.paths]
        onsets = [np.load(onsets_path(path), mmap_mode="r") for path in self.paths]
        names = [codes_path(path, self.codec_sha256) for path in self.paths] if self.codec_sha256 else []
        codes = [np.load(name, mmap_mode="r") for name in names] if names and all(n.is_file() for n in names) else None
        while True:
            p = int(rng.integers(len(pools)))
            e = int(rng.integers(len(pools[p])))
            frame = int(rng.integers(self.lead, pools[p].shape[1] // HOP - self.frames + 1))
            wave = pools[p][e, frame * HOP : (frame + self.frames) * HOP].astype(np.float32) / 32767
            item = {"input_values": wave, "onsets": (onsets[p][e, frame : frame + self.frames] > 0).astype(np.float32)}
            if codes is not None:
                item["audio_codes"] = codes[p][e, :, frame - self.lead : frame + self.frames].astype(np.int64)
            yield item


def onsets_path(pool: str | Path) -> Path:
    """Where the struck keys, uint8 velocities (excerpts, frames, 88), of a pool lie."""
    return Path(pool).with_suffix(".onsets.npy")


def codes_path(pool: str | Path, codec_sha256: str) -> Path:
    """Where the codes (excerpts, K, frames) of a pool by one codec lie."""
    return Path(pool).with_suffix(f".{codec_sha256[:12]}.npy")


def render(notes, start: float, seconds: float, piano: str, room: Room, rng: np.random.Generator) -> np.ndarray:
    """Sound of `seconds` of a performance from `start` on, float32 (samples,), peak at most 0.97; the level follows the
    whole performance."""
    return without_clipping(record(notes, start, seconds, piano, room, performance_level(notes), rng))[0]


def record(notes, start: float, seconds: float, piano: str, room: Room, level: float, rng) -> np.ndarray:
    """The same at a gain for performances of the mean RMS `level`, without a limit; see `Room.record`.

    One and a half seconds before the excerpt are rendered too and cut off, so that its start already rings.
    """
    lead = 1.5
    dry = load_piano(str(piano))(sounding_excerpt(notes, start - lead, seconds + lead), seconds + lead)
    return room.record(dry, level, rng)[round(lead * SAMPLING_RATE) :]


def _manifest_file(root: Path, row: dict) -> MidiFile:
    archive = None if (root / row["path"]).is_file() else f"{row['path'].split('/')[0]}.tar.xz"
    return MidiFile(row["path"], archive, row["split"], float(row["duration_s"]), row["composition_id"], row["licence"])


@lru_cache(maxsize=8)
def _archive_members(archive: str) -> dict[str, bytes]:
    """All MIDI files of one archive by path; about 10 MB an archive."""
    with tarfile.open(archive) as tar:
        return {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}
