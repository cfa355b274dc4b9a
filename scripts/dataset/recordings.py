# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Pairs of prompt and target drawn from recordings that are rendered from MIDI; item i is a function of (seed, i)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from scripts.audio.pianos import load_piano, performance_level
from scripts.audio.rendered_audio import MidiFile, draws_of, list_midi, record, source_settings
from scripts.audio.rooms import Room, without_clipping

LEAD_S, TAIL_S = 1.0, 0.5  # encoded around a target and cut off: a target stands inside running music
MIN_PROMPT_NOTES = 5
TRIES = 50  # to find a target that is not in its own prompt; a piece may be too short for that


@dataclass
class DataArguments:
    """What an item holds; the same numbers give the same data."""

    split: str
    prompt_seconds: float
    target_seconds: float
    seed: int
    keep_audio: bool
    min_target_seconds: float | None = None  # targets of drawn lengths from this on; without it all are equally long
    sustain: str = "extend"  # of the notes that are told, see `load_performance`; what sounds has its pedals anyway
    correct_level: bool = False  # of real recordings, as the processor corrects it of prompts
    correct_offset: bool = False  # between them and their MIDI, likewise

    def draw_target_seconds(self, rng: np.random.Generator) -> float:
        """Length of one target, s, a multiple of 0.5."""
        if self.min_target_seconds is None:
            return self.target_seconds
        return int(rng.integers(2 * self.min_target_seconds, 2 * self.target_seconds, endpoint=True)) / 2


@dataclass
class Window:
    """One stretch of a recording: notes relative to its start (before 0: still sounding), audio around it."""

    notes: np.ndarray
    wave: np.ndarray
    source: str
    start: float
    seconds: float


class RenderedRecordings:
    """Recordings made from MIDI: item i of a split draws piano, room, target and prompt from (seed, i).

    Args:
        midi_root, split, hold_out: as `list_midi`.
        pianos: paths for `load_piano`.
        rooms: names of `scripts.audio.rooms.ROOM_NAMES`.
    """

    def __init__(
        self, midi_root: str, split: str, pianos: list[str], rooms: list[str], seed: int, hold_out: bool = True
    ):
        self.root, self.files = midi_root, list_midi(midi_root, split, hold_out)
        self.pianos, self.rooms = pianos, rooms
        self.seed, self.excluded = seed, []
        durations = np.array([max(f.duration, 1.0) for f in self.files])
        self.weights = durations / durations.sum()
        self.performances = {}
        self.compositions = {file.composition_id for file in self.files}

    @cached_property
    def settings(self) -> dict:
        """See `source_settings`; all files are read for it."""
        return source_settings(self)

    def draw(self, index: int, data: DataArguments, piano: str | None = None) -> tuple[Window, Window, dict]:
        """Prompt and target windows of item `index`, and its provenance; the same music in the same room on another
        `piano`, if one is given."""
        rng = draws_of(data.split, self.seed, index)
        drawn, preset = self.pianos[rng.integers(len(self.pianos))], self.rooms[rng.integers(len(self.rooms))]
        piano = piano or drawn
        room_seed = int(rng.integers(2**31))
        room = Room(preset, room_seed)
        target = self.files[rng.choice(len(self.files), p=self.weights)]
        # half of the prompts are of another piece: that is what users bring
        prompt = target if rng.random() < 0.5 and data.split == "train" else self._other(target, rng)
        # one gain for both, as in a recording session: only then does the prompt tell how loud a velocity is
        level, parts, waves = performance_level(self._notes(target)), [], []
        for file, seconds in ((prompt, data.prompt_seconds), (target, data.draw_target_seconds(rng))):
            notes = self._notes(file)
            start = self._start(notes, seconds, rng, full=not parts)
            for _ in range(TRIES):
                if not parts or file is not prompt or _are_apart(parts[0], start, seconds):
                    break
                start = self._start(notes, seconds, rng, full=False)
            lead, tail = (LEAD_S, TAIL_S) if len(parts) else (0.0, 0.0)
            waves.append(record(notes, start - lead, seconds + lead + tail, piano, room, level, rng))
            told = relative_notes(self._notes(file, data.sustain), start, seconds)
            parts.append(Window(told, waves[-1], file.path, start, seconds))
        for part, wave in zip(parts, without_clipping(*waves), strict=True):
            part.wave = wave
        recording = f"{load_piano(str(piano)).name}/{preset}/{room_seed}"
        licences = sorted({prompt.licence, target.licence})
        about = {"recording_id": recording, "piano": load_piano(str(piano)).name, "room": preset}
        return parts[0], parts[1], about | {"licence": "; ".join(licences)}

    def _other(self, target: MidiFile, rng: np.random.Generator) -> MidiFile:
        while len(self.compositions) > 1:
            file = self.files[rng.choice(len(self.files), p=self.weights)]
            if file.composition_id != target.composition_id:
                return file
        return target

    def _notes(self, file: MidiFile, sustain: str = "extend") -> np.ndarray:
        if (file.path, sustain) not in self.performances:
            self.performances[file.path, sustain] = file.load(self.root, sustain).notes
        return self.performances[file.path, sustain]

    def _start(self, notes: np.ndarray, seconds: float, rng: np.random.Generator, full: bool) -> float:
        """A start, s: prompts are full of notes; targets also take the silence before a piece and its last ring."""
        end = float((notes["onset"] + notes["duration"]).max())
        if not full and rng.random() < 0.08:
            return 0.0
        for _ in range(20):
            start = float(rng.uniform(0, max(end - seconds * (1.0 if full else 0.6), 0.01)))
            struck = (notes["onset"] >= start) & (notes["onset"] < start + seconds)
            if struck.sum() >= MIN_PROMPT_NOTES:
                break
        return start


def _are_apart(prompt: Window, start: float, seconds: float) -> bool:
    return start >= prompt.start + prompt.seconds or start + seconds <= prompt.start


def relative_notes(notes: np.ndarray, start: float, seconds: float) -> np.ndarray:
    """Notes that are struck or still sound in the window, times relative to its start."""
    part = notes[(notes["onset"] < start + seconds) & (notes["onset"] + notes["duration"] > start)].copy()
    part["onset"] -= start
    return part
