# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Endless audio for the codec: MIDI rendered on pianos and rooms as it is needed, so nothing is stored or seen twice.

`RenderedExcerpts` draws a performance, an excerpt, a piano and a room from (seed, number) alone.
"""

import csv
import hashlib
import lzma
import math
import re
import sys
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from processing.audio_midivalle import to_int16
from scripts.audio.pianos import SAMPLING_RATE, SourceError, load_piano, performance_level
from scripts.audio.rooms import Room, without_clipping
from scripts.audio.visible_files import visible_files
from tokenization.midi_midivalle import MidiError, Performance, load_performance
from tokenization.tokenization_midivalle import MIDI_ENDINGS

HOP = 640
CODES = ("heard", "played", "generated")  # kinds of codes of a pool, see `codes_path`
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

    def load(self, root: str, sustain: str = "extend") -> Performance:
        """Read the notes, `sustain` as in `load_performance`.

        Raises:
            MidiError: the file cannot be used.
            SourceError: the archive is damaged or not there, or the file is not in it.
        """
        if self.archive is None:
            return load_performance(Path(root) / self.path, sustain)
        archive = Path(root) / self.archive
        try:
            data = _archive_members(str(archive))[self.path]
        except (OSError, EOFError, KeyError, lzma.LZMAError, tarfile.TarError) as error:
            raise SourceError(f"{archive}: {self.path} cannot be read from it ({error})") from error
        return load_performance(data, sustain, self.path)


def of_split(names: list[str], split: str) -> set[str]:
    """Those of `names` that are of a split, where no table says which: by their hashes one in twenty, and of a few one,
    is for validation, one in twenty for test, all others for training."""
    order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    tested = len(order) // 20
    held = max(tested, int(len(order) > 1))
    parts = {"validation": order[:held], "test": order[held : held + tested], "train": order[held + tested :]}
    return set(parts.get(split, ()))


def list_midi(root: str | Path, split: str, hold_out: bool = True) -> list[MidiFile]:
    """The files of one split of a MIDI folder.

    Args:
        root: folder with `manifest.csv` (columns path, split, duration_s, composition_id, licence, source) beside the
            files or beside one `SOURCE.tar.xz` an archive; without a manifest every MIDI file below is taken.
        hold_out: without a manifest `of_split` decides; else all files are of any split, where nothing is learned.
    Raises:
        MidiError: no such folder, or nothing of that split is there.
    """
    root = Path(root)
    if not root.is_dir():
        raise MidiError(f"{root}: no such folder; give one of MIDI files")
    manifest = root / "manifest.csv"
    if not manifest.is_file():
        paths = visible_files(root, MIDI_ENDINGS)
        found = [MidiFile(str(p.relative_to(root)), None, split, 0.0, p.stem, "unknown") for p in paths]
        chosen = of_split([file.path for file in found], split) if hold_out else None
        if found and chosen == set():
            raise MidiError(
                f"{root}: of {len(found)} MIDI files none is for {split!r}; add a manifest.csv that says which"
            )
        found = [file for file in found if chosen is None or file.path in chosen]
    else:
        try:
            with open(manifest, newline="", encoding="utf-8-sig") as f:  # spreadsheets begin a file with a mark
                rows = [row for row in csv.DictReader(f) if row["split"] == split]
            found = [_manifest_file(root, row) for row in rows]
        except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
            columns = "path, split, duration_s, composition_id, licence"
            raise MidiError(f"{manifest}: expected a table with the columns {columns} ({error})") from error
    if not found:
        raise MidiError(f"{root}: no MIDI file of split {split!r}; expected manifest.csv or .mid files")
    return found


def sounding_excerpt(notes: np.ndarray, start: float, seconds: float) -> np.ndarray:
    """Notes heard in [start, start + seconds), times relative to `start` (held ones have negative onsets)."""
    ends = notes["onset"] + notes["duration"]
    part = notes[(notes["onset"] < start + seconds) & (ends > start - 2.0)].copy()
    part["onset"] -= start
    return part


def onset_roll(notes: np.ndarray, frames: int, lead: float = 0.0) -> np.ndarray:
    """uint8 (frames, 88): the velocity of each key that is struck in a frame of 20 ms; notes relative to `lead` s after
    frame 0."""
    roll = np.zeros((frames, PITCHES), np.uint8)
    at = np.floor((notes["onset"] + lead) * SAMPLING_RATE / HOP).astype(int)
    struck = (at >= 0) & (at < frames)
    roll[at[struck], notes["pitch"][struck] - LOWEST_PITCH] = notes["velocity"][struck]
    return roll


class RenderedExcerpts(Dataset):
    """Endless rendered piano: excerpt i of a split is drawn and rendered from (seed, i) alone. A MIDI file that cannot
    be used is said once, and another is drawn.

    An item holds `wave` int16 (samples,) at 32 kHz and `onsets` uint8 (frames, 88): the velocity of a key that is
    struck in that 20 ms frame.

    Args:
        midi_root, split: see `list_midi`.
        pianos: paths for `load_piano`.
        rooms: names of `scripts.audio.rooms.ROOM_NAMES`.
        seconds: length of an excerpt.
    """

    def __init__(self, midi_root, split, pianos, rooms, seconds: float = 12.0, seed: int = 0):
        self.root, self.split, self.files = str(midi_root), split, list_midi(midi_root, split)
        self.pianos, self.rooms = list(pianos), list(rooms)
        self.seconds, self.seed = seconds, seed
        durations = np.array([max(f.duration, 1.0) for f in self.files])
        self.weights = durations / durations.sum()
        self._performances = {}

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        wave, notes, _ = self.excerpt(draws_of(self.split, self.seed, index))
        return {"wave": to_int16(wave), "onsets": onset_roll(notes, len(wave) // HOP)}

    def excerpt(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
        """One rendered excerpt: wave (samples,) float32, notes relative to its start, and what it is."""
        file, performance = self._draw(rng)
        start = float(rng.uniform(0, max(performance.end - self.seconds, 0.01)))
        piano = self.pianos[rng.integers(len(self.pianos))]
        room = self.rooms[rng.integers(len(self.rooms))]
        seed = int(rng.integers(2**31))
        wave = render(performance.notes, start, self.seconds, piano, Room(room, seed), rng)
        notes = sounding_excerpt(performance.notes, start, self.seconds)
        return wave, notes, {"path": file.path, "start": start, "piano": piano, "room": room, "room_seed": seed}

    def _draw(self, rng: np.random.Generator) -> tuple[MidiFile, Performance]:
        """A file that can be used; MidiError if there is none."""
        while True:
            file = self.files[rng.choice(len(self.files), p=self.weights)]
            if file.path not in self._performances:
                try:
                    self._performances[file.path] = file.load(self.root)
                except MidiError as error:
                    self._performances[file.path] = None
                    print(f"{error}; others are drawn instead", file=sys.stderr, flush=True)
                    if len(self._performances) == len(self.files) and not any(self._performances.values()):
                        raise MidiError(f"{self.root}: holds no MIDI file that can be used ({error})") from error
            if self._performances[file.path]:
                return file, self._performances[file.path]


def draws_of(split: str, seed: int, index: int) -> np.random.Generator:
    """What item `index` is drawn with: for training something else, lest held-out items have its very rooms."""
    return np.random.default_rng([seed, index, 1] if split == "train" else [seed, index])


def source_settings(source) -> dict:
    """What decides the items of a `RenderedExcerpts`, or `RenderedRecordings`, but for their lengths: names and content
    of files, no paths of a machine."""
    content = {name: content_sha256(Path(source.root, name)) for name in {f.archive or f.path for f in source.files}}
    files = repr([(file.path, file.duration, content[file.archive or file.path]) for file in source.files])
    found = {"seed": source.seed, "midi_sha256": hashlib.sha256(files.encode()).hexdigest()[:12]}
    pianos = [f"{Path(piano).name} {content_sha256(piano)}" for piano in source.pianos]
    return found | {"pianos": pianos, "rooms": list(source.rooms)}


def content_sha256(path: str | Path) -> str:
    """First 12 digits of the sha256 of a file, or `FONT.sf2:PROGRAM`, or of the names and content of a folder's files;
    "missing" where there is none, which is told when it is needed."""
    path = Path(path) if Path(path).exists() else Path(str(path).partition(":")[0])
    if path.is_dir():
        files = "".join(f"{file.name} {content_sha256(file)}\n" for file in sorted(path.iterdir()) if file.is_file())
        return hashlib.sha256(files.encode()).hexdigest()[:12]
    if not path.is_file():
        return "missing"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def onsets_path(pool: str | Path) -> Path:
    """Where the struck keys, uint8 velocities (excerpts, frames, 88), of a pool lie."""
    return Path(pool).with_suffix(".onsets.npy")


def codes_path(pool: str | Path, codec_sha256: str, kind: str = "heard") -> Path:
    """Where the codes (excerpts, K, frames) of a pool by one codec lie: as `heard`, with its notes as `played`, or
    `generated` from its notes; and the `means` (excerpts, A, frames) of those."""
    return Path(pool).with_suffix(f".{codec_sha256[:12]}{'' if kind == 'heard' else '.' + kind}.npy")


def all_codes(pool: str | Path) -> list[Path]:
    """Whatever `codes_path` of whichever codec is there."""
    name = re.compile(rf"{re.escape(Path(pool).stem)}\.[0-9a-f]{{12}}(\.\w+)?\.npy")
    return sorted(path for path in Path(pool).parent.glob("*.npy") if name.fullmatch(path.name))


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
    if not math.isfinite(duration := float(row["duration_s"])):
        raise ValueError(f"duration_s is {duration}")
    return MidiFile(row["path"], archive, row["split"], duration, row["composition_id"], row["licence"])


@lru_cache(maxsize=8)
def _archive_members(archive: str) -> dict[str, bytes]:
    """All MIDI files of one archive by path; about 10 MB an archive."""
    with tarfile.open(archive) as tar:
        return {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}
