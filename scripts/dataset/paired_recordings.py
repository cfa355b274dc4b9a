# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Pairs of prompt and target drawn from real recordings with their MIDI: MAESTRO, ATEPP, PiJAMA, or one's own.

The table is a csv file, or a folder: the csv of a known corpus in it, or else all audio files with a MIDI file of the
same name beside them. What a csv's columns mean is told by their names (`LAYOUTS`).
"""

import csv
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import soundfile

from processing.audio_midivalle import AudioError, check_wave, to_mono_32k, without_dc
from processing.prompts_midivalle import check_level, check_offset
from scripts.audio.pianos import SAMPLING_RATE
from scripts.audio.rendered_audio import content_sha256, of_split
from scripts.audio.rooms import without_clipping
from scripts.audio.visible_files import visible_files
from scripts.dataset.recordings import LEAD_S, TAIL_S, DataArguments, Window, relative_notes
from scripts.wording import counted
from tokenization.midi_midivalle import MidiError, load_performance
from tokenization.tokenization_midivalle import MIDI_ENDINGS

AUDIO_ENDINGS = (".wav", ".flac", ".mp3", ".ogg")
SPLITS = {"val": "validation", "valid": "validation", "dev": "validation"}  # as tables have it -> as we call it
HELD_OUT = {"validation": (0.90, 0.95), "test": (0.95, 1.0), "train": (0.0, 0.90)}  # by composition
LOOKED_AT, GLANCE_S = 12, 62.0  # recordings, and s of each, that tell whether a corpus is in time with its MIDI
CHECKED_S = 600.0  # of a recording that its level and its offset are judged by, at most: more does not fit into memory
RING_S = 3.0  # of a recording behind the last note of its MIDI that is used: the last chord dies away in it
MARGIN_S = 0.05  # read behind a stretch and cut off: a resampler ends in silence
RUN_IN_S = 1.0  # likewise before it: behind a seek, mp3 lacks what is in earlier frames, of up to half a second


@dataclass(frozen=True)
class Layout:
    """What the columns of a corpus' csv are called; empty where it has none.

    Attributes:
        midi, audio: paths relative to the csv; without `audio` it lies beside the MIDI under its name.
        composition: columns that name what must not be in two splits.
        quality, rejected: what a column is called, in one version or another, and words in it that exclude a row.
    """

    name: str
    midi: str
    audio: str = ""
    split: str = "split"
    composition: tuple[str, ...] = ()
    seconds: str = ""
    start: str = ""
    end: str = ""
    quality: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    licence: str = "unknown"


LAYOUTS = (
    Layout("plain", "midi", "audio"),
    Layout(  # maestro-v3.0.0.csv; Hawthorne et al., ICLR 2019
        "MAESTRO",
        "midi_filename",
        "audio_filename",
        composition=("canonical_composer", "canonical_title"),
        seconds="duration",
        licence="CC BY-NC-SA 4.0",
    ),
    Layout(  # ATEPP-metadata-1.2.csv and ATEPP-1.2-clean.csv; Zhang et al., ISMIR 2022. Audio is not part of it
        "ATEPP",
        "midi_path",
        composition=("composition_id",),
        seconds="track_duration",
        quality=("quality", "notes"),
        rejected=("low quality", "background noise", "applause", "corrupted"),
        licence="MIDI CC BY 4.0, audio of commercial recordings",
    ),
    Layout(  # pijama.csv; Edwards et al., TISMIR 2023
        "PiJAMA",
        "midi_filepath",
        "mp3_filepath",
        composition=("title",),
        seconds="duration_sec",
        start="performance_start_sec",
        end="performance_end_sec",
        licence="MIDI CC BY-NC 3.0, audio of commercial recordings",
    ),
)


@dataclass(frozen=True)
class Pair:
    """One recording: paths as the table has them, the part of it to be used in s, its length in s (0: unknown)."""

    audio: str
    midi: str
    recording_id: str
    licence: str
    start: float = 0.0
    end: float = math.inf
    seconds: float = 0.0


def read_pairs(source: str | Path, split: str | None = None) -> tuple[Path, list[Pair], list[dict]]:
    """The folder that paths are relative to, the pairs of a split (all without one), and what is left out and why: what
    the corpus excludes, rows without a split, files that are alone.

    A split comes from the table. Where it has no such column but knows compositions, nine in ten of these are for
    training, by their hash; of recordings of one's own `of_split` decides.

    Raises:
        MidiError: no table or pairs there, unknown columns, a number that is none, or nothing of that split.
    """
    source = Path(source)
    if source.is_dir():
        visible = (file for file in sorted(source.glob("*.csv")) if not file.name.startswith("."))
        tables = [file for file in visible if _layout(_read(file)[0])]
        if len(tables) > 1:
            raise MidiError(f"{source}: holds several tables ({', '.join(t.name for t in tables)}); name one of them")
        if not tables:
            pairs, alone = _same_names(source)
            return source, _held_out(source, pairs, split), alone
        source = tables[0]
    header, rows = _read(source)
    layout = _layout(header)
    if layout is None:
        known = "; ".join(f"{layout.name}: {layout.midi}" for layout in LAYOUTS[1:])
        raise MidiError(
            f"{source}: expected columns audio, midi (and optionally recording_id, licence, split) and one row, or "
            f"those of a known corpus ({known}), between commas; found {', '.join(header) or 'nothing'}"
        )
    if not rows:
        raise MidiError(f"{source}: expected columns audio, midi (and optionally recording_id, licence) and one row")
    pairs, excluded = [], []
    try:
        for number, row in enumerate(rows, 1):  # noqa: B007  the messages below name it
            if split is not None and row.get(layout.split, split).strip() == "":
                excluded.append({"source": row[layout.midi], "reason": f"its {layout.split} is blank"})
            elif split is not None and not _is_of(layout, row, split):
                continue
            elif any(word in (said := _quality(layout, row)) for word in layout.rejected):
                excluded.append({"source": row[layout.midi], "reason": f"{layout.name} says {said}"})
            else:
                pairs.append(_pair(layout, row, source.parent))
    except KeyError as error:
        raise MidiError(f"{source}: has no column {error}, which one of {layout.name} has") from error
    except (AttributeError, TypeError, ValueError) as error:
        cells = ", ".join(cell for cell in row.values() if isinstance(cell, str))
        raise MidiError(
            f"{source}: row {number} is cut short, or its times make no sense ({cells}); mend it or take it out"
        ) from error
    if not pairs:
        there = ", ".join(sorted({row.get(layout.split) or "" for row in rows} - {""}))
        raise MidiError(f"{source}: no usable row of split {split!r}" + (f"; it has {there}" if there else ""))
    if not layout.composition and layout.split not in header:
        pairs = _held_out(source, pairs, split)
    return source.parent, pairs, excluded


def read_stretch(path: Path, start: float, seconds: float) -> np.ndarray:
    """A stretch of an audio file, mono, 32 kHz, float32; only that stretch is decoded. Silence outside the file. A
    constant part is taken out, as the processor takes it out of prompts: a codec makes other codes of it.

    Raises:
        MidiError: not a regular audio file, damaged there, or not finite.
    """
    try:
        with _open(path) as file:
            step = file.samplerate // math.gcd(file.samplerate, SAMPLING_RATE)  # a whole number of output samples
            run_in = -(-round(RUN_IN_S * file.samplerate) // step) * step
            left = math.floor(start * file.samplerate / step) * step - run_in
            right = math.ceil((start + seconds + MARGIN_S) * file.samplerate)
            first, last = max(left, 0), min(right, file.frames)
            wave = np.zeros((right - left, file.channels), np.float32)
            if last > first:
                file.seek(first)
                if len(file.read(out=wave[first - left : last - left])) < last - first:
                    raise MidiError(
                        f"{path.name}: the audio is cut short; it ends before {last / file.samplerate:.1f} s"
                    )
            mono = to_mono_32k(check_wave(wave, file.samplerate, path.name), file.samplerate)
            skip = round(start * SAMPLING_RATE) - left * SAMPLING_RATE // file.samplerate
            end = math.floor((file.frames / file.samplerate - start) * SAMPLING_RATE)
    except (soundfile.SoundFileError, RuntimeError, AudioError) as error:
        raise MidiError(f"{path.name}: cannot be read as audio ({error})") from error
    mono = mono[skip : skip + round(seconds * SAMPLING_RATE)]
    inside = slice(max(round(-start * SAMPLING_RATE), 0), max(end, 0))  # the silence around has no constant part
    mono[inside] = without_dc(mono[inside])
    return mono


class PairedRecordings:
    """Real recordings with their MIDI; item i draws one, by its length if known, and two windows from (seed, i).

    Args:
        pairs, split: as `read_pairs`.
    """

    def __init__(self, pairs: str, seed: int, split: str | None = None):
        self.base, self.pairs, self.excluded = read_pairs(pairs, split)
        self.seed = seed
        seconds = np.array([pair.seconds for pair in self.pairs])
        self.weights = seconds / seconds.sum() if (seconds > 0).all() else None

    @cached_property
    def settings(self) -> dict:
        """What decides the items, but for their lengths: the table, what the MIDI files hold, bytes of the audio."""
        midi, audio = ([self.base / getattr(pair, kind) for pair in self.pairs] for kind in ("midi", "audio"))
        content = {path: content_sha256(path) for path in set(midi)}
        sizes = [path.stat().st_size if path.is_file() else 0 for path in audio]
        table = repr((self.pairs, [content[path] for path in midi], sizes))
        return {"seed": self.seed, "pairs_sha256": hashlib.sha256(table.encode()).hexdigest()[:12]}

    def out_of_time(self, sustain: str) -> tuple[int, list[str]]:
        """How many recordings were looked at, at most `LOOKED_AT` of all parts of the table, and a sentence for each
        that is not in time with its MIDI, or does not seem to be of it; one that cannot be read tells nothing. It takes
        a second for each."""
        chosen = np.linspace(0, len(self.pairs) - 1, min(LOOKED_AT, len(self.pairs))).round().astype(int)
        looked_at, found = 0, []
        for pair in (self.pairs[i] for i in chosen):
            audio, seconds = self.base / pair.audio, min(GLANCE_S, pair.end - pair.start)
            try:
                _, said = _offset(audio, self.base / pair.midi, sustain, pair.start, min(seconds, _length(audio)))
            except MidiError:
                continue
            looked_at += 1
            found += [said.removesuffix("; corrected")] if said else []
        return looked_at, found

    def draw(self, index: int, data: DataArguments) -> tuple[Window, Window, dict]:
        """Prompt and target windows of item `index`, which do not overlap, and its provenance.

        With `data.correct_level` a recording that is much softer or louder than its velocities tell is brought to a
        usual level (`check_level`), both windows by the same `gain_db`: a prompt tells how loud a velocity is. With
        `data.correct_offset` its notes are moved by `offset_s` (`check_offset`).

        Raises:
            MidiError: the item cannot be made; with `correct_offset` also of a recording that its MIDI does not fit.
        """
        rng = np.random.default_rng([self.seed, index])
        pick = rng.integers(len(self.pairs)) if self.weights is None else rng.choice(len(self.pairs), p=self.weights)
        pair = self.pairs[pick]
        notes, length = _notes(self.base / pair.midi, data.sustain), _length(self.base / pair.audio)
        there = min(length, pair.end)
        told = min(there, float((notes["onset"] + notes["duration"]).max()) + RING_S)
        first, length = pair.start, told - pair.start
        target_seconds = data.draw_target_seconds(rng)
        need = data.prompt_seconds + target_seconds
        if length < need:
            of_what = " of what its MIDI tells" if told < there else ""
            what = f"{max(length, 0):.1f} s{of_what}, but an item needs {need:.1f} s"
            raise MidiError(f"{pair.audio}: {what} (shorten --target-seconds)")
        checked, offset = (self.base / pair.audio, self.base / pair.midi, data.sustain, first, length), {}
        if data.correct_offset:
            offset["offset_s"], said = _offset(*checked)
            if said and not offset["offset_s"]:
                raise MidiError(said)
            notes = notes.copy()
            notes["onset"] += offset["offset_s"]
        start, prompt_start = _places(rng, length, data.prompt_seconds, target_seconds)
        prompt = self._window(notes, pair, first + prompt_start, data.prompt_seconds, 0, 0)
        target = self._window(notes, pair, first + start, target_seconds, LEAD_S, TAIL_S)
        about = {"recording_id": pair.recording_id, "piano": "", "room": "", "licence": pair.licence} | offset
        if data.correct_level:
            about["gain_db"] = _gain(*checked)
            if about["gain_db"]:
                loud = [window.wave * 10 ** (about["gain_db"] / 20) for window in (prompt, target)]
                prompt.wave, target.wave = without_clipping(*loud)
        return prompt, target, about

    def _window(self, notes: np.ndarray, pair: Pair, start: float, seconds: float, lead: float, tail: float) -> Window:
        wave = read_stretch(self.base / pair.audio, start - lead, seconds + lead + tail)
        return Window(relative_notes(notes, start, seconds), wave, pair.midi, start, seconds)


def _places(rng: np.random.Generator, length: float, prompt: float, target: float) -> tuple[float, float]:
    """Starts of a target and of a prompt before or after it, s."""
    start = float(rng.uniform(0, length - target))
    if max(start, length - start - target) < prompt:  # no room on either side
        start = float(rng.uniform(prompt, length - target))
    before, after = start - prompt, length - start - target - prompt
    if after < 0 or rng.random() * (max(before, 0) + after) < before:
        return start, float(rng.uniform(0, max(before, 0)))
    return start, start + target + float(rng.uniform(0, max(after, 0)))


def _read(file: Path) -> tuple[list[str], list[dict]]:
    """Names of the columns, and the rows; not those in which nothing is written, with which spreadsheets end."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:  # spreadsheets begin a file with a mark
            table = csv.DictReader(f)
            written = [row for row in table if any(isinstance(cell, str) and cell.strip() for cell in row.values())]
            return table.fieldnames or [], written
    except UnicodeDecodeError as error:
        raise MidiError(
            f"{file}: cannot be read as a table; save it as csv in UTF-8, or give a folder without it"
        ) from error
    except (OSError, csv.Error) as error:
        raise MidiError(f"{file}: cannot be read as a table ({getattr(error, 'strerror', None) or error})") from error


def _layout(header: list[str]) -> Layout | None:
    return next((o for o in LAYOUTS if o.midi in header and (not o.audio or o.audio in header)), None)


def _is_of(layout: Layout, row: dict, split: str) -> bool:
    if layout.split in row:
        found = row[layout.split].strip().lower()
        return split in (found, SPLITS.get(found))
    if not layout.composition:
        return True
    digest = hashlib.sha256("/".join(row[column] for column in layout.composition).encode()).digest()
    low, high = HELD_OUT.get(split, (0.0, 0.0))
    return low <= int.from_bytes(digest[:6], "big") / 2**48 < high


def _quality(layout: Layout, row: dict) -> str:
    return " ".join(row[column] for column in layout.quality if column in row)


def _held_out(source: Path, pairs: list[Pair], split: str | None) -> list[Pair]:
    """Those of a split, where no table says which; all without one."""
    if split is None:
        return pairs
    chosen = of_split([pair.recording_id for pair in pairs], split)
    if not chosen:
        raise MidiError(
            f"{source}: none of {counted(len(pairs), 'recording')} is for {split!r}; give a table with a column split"
        )
    return [pair for pair in pairs if pair.recording_id in chosen]


def _pair(layout: Layout, row: dict, base: Path) -> Pair:
    audio = row[layout.audio] if layout.audio else _beside(base, row[layout.midi])
    start = float(row[layout.start] or 0) if layout.start else 0.0
    end = float(row[layout.end] or math.inf) if layout.end else math.inf
    if not audio or not row[layout.midi] or not 0 <= start <= end:  # also what is not a number
        raise ValueError(f"{row[layout.midi]}, {audio}, from {start} to {end}")
    seconds = float(row[layout.seconds] or 0) if layout.seconds else 0.0
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{audio} lasts {seconds} s")
    recording, licence = row.get("recording_id") or audio, row.get("licence") or layout.licence
    return Pair(audio, row[layout.midi], recording, licence, start, end, seconds)


def _beside(base: Path, midi: str) -> str:
    """Audio of the same name; the first ending if none is there, for the message of what is missing."""
    names = [str(Path(midi).with_suffix(ending)) for ending in AUDIO_ENDINGS]
    return next((name for name in names if (base / name).is_file()), names[0])


def _same_names(folder: Path) -> tuple[list[Pair], list[dict]]:
    """Audio and MIDI files of one name, in the same folder; and those that have no such partner, that are second, or
    whose MIDI cannot be used (in a corpus with a table, which may be large, that is found when a row is drawn)."""
    files = [path.relative_to(folder) for path in visible_files(folder, (*MIDI_ENDINGS, *AUDIO_ENDINGS))]
    midi, audio = (
        {p.with_suffix(""): str(p) for p in files if p.suffix.lower() in endings}
        for endings in (MIDI_ENDINGS, AUDIO_ENDINGS)
    )
    names = sorted(midi.keys() & audio.keys())
    if not names:
        raise MidiError(f"{folder}: no table of a known corpus, and no audio file with MIDI of its name beside it")
    pairs, alone, used = [], [], {path for name in names for path in (audio[name], midi[name])}
    for name in names:
        try:
            midi[name].encode()  # soundfile opens no other names
            load_performance(folder / midi[name])
            pairs.append(Pair(audio[name], midi[name], audio[name], "unknown"))
        except UnicodeEncodeError:
            alone.append({"source": midi[name], "reason": "its name is not UTF-8; rename it and its audio"})
        except MidiError as error:
            alone.append({"source": midi[name], "reason": str(error)})
    if not pairs:
        raise MidiError(f"{folder}: no MIDI of a pair can be used ({alone[0]['reason']})")
    for path in files:
        if str(path) not in used:
            is_second = path.with_suffix("") in (midi if path.suffix.lower() in AUDIO_ENDINGS else audio)
            reason = "another file of its name is used" if is_second else "no audio or MIDI of its name is beside it"
            alone.append({"source": str(path), "reason": reason})
    return pairs, alone


def _open(path: Path) -> soundfile.SoundFile:
    if not path.is_file():  # opening a FIFO would block for ever
        raise MidiError(f"{path.name}: cannot be read as audio (there is no such file)")
    return soundfile.SoundFile(path)


@lru_cache(maxsize=4096)
def _length(path: Path) -> float:
    try:
        with _open(path) as file:
            return file.frames / file.samplerate
    except soundfile.SoundFileError as error:
        raise MidiError(f"{path.name}: cannot be read as audio ({error})") from error


@lru_cache(maxsize=4096)
def _gain(audio: Path, midi: Path, sustain: str, start: float, seconds: float) -> float:
    """The gain, dB, that `check_level` gives of these seconds of a recording, or of the first `CHECKED_S` of them."""
    return check_level(*_stretch(audio, midi, sustain, start, seconds), audio.name)[0]


@lru_cache(maxsize=4096)
def _offset(audio: Path, midi: Path, sustain: str, start: float, seconds: float) -> tuple[float, str]:
    """Likewise what `check_offset` finds."""
    return check_offset(*_stretch(audio, midi, sustain, start, seconds), audio.name)


@lru_cache(maxsize=1)  # so that offset and gain of a recording cost one decoding
def _stretch(audio: Path, midi: Path, sustain: str, start: float, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    notes = _notes(midi, sustain).copy()
    notes["onset"] -= start
    return read_stretch(audio, start, min(seconds, CHECKED_S)), notes


@lru_cache(maxsize=256)
def _notes(path: Path, sustain: str) -> np.ndarray:
    return load_performance(path, sustain).notes
