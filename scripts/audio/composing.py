# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Written music -> performed MIDI: tempo and loudness curves, voicing, chord spread, overlapping touch, pedalling.

Music is text: `C#5:.75` is a note with its length in beats, `D4+G#4+B4:1` a chord, `r:1` a rest; a length stays until
the next one is written and `|` is only for the eye.
"""

import re
from dataclasses import dataclass, field

import numpy as np
from symusic import ControlChange, Note, Score, Tempo, TimeSignature, Track

TICKS_PER_SECOND = 960  # 480 a beat at a constant 120 BPM: the file stores real time, as a Disklavier does
STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
PITCH = re.compile(r"([A-G])([#b]?)(-?\d)")
PEDAL_PRESS = ((0.0, 30), (0.03, 75), (0.07, 112))  # (s, CC64 value) from the start of the foot's way down
PEDAL_LIFT = ((0.0, 58), (0.03, 20), (0.06, 0))  # and up


@dataclass(frozen=True)
class Voice:
    """One line of a piece.

    Attributes:
        music: the notes, see the module.
        louder: velocity steps above the piece's dynamics; a leading voice is also a little early.
        touch: sounding share of the written length; 1.05 is legato, 0.5 staccato.
        start: beat of the first note.
    """

    music: str
    louder: float = 0.0
    touch: float = 1.0
    start: float = 0.0


@dataclass(frozen=True)
class Piece:
    """A piece and its interpretation; curves are `(beat, value)` points joined by straight lines.

    Attributes:
        voices: its lines.
        tempo: beats per minute.
        dynamics: velocity, 1 to 127.
        pedal: beats at which the harmony changes: the pedal is lifted there and caught again just after.
        pedal_end: beat of the last lift.
        lead_in: silence before the first beat, s.
        beats_per_bar: for the time signature only.
    """

    voices: tuple[Voice, ...]
    tempo: tuple[tuple[float, float], ...]
    dynamics: tuple[tuple[float, float], ...]
    pedal: tuple[float, ...] = field(default=())
    pedal_end: float = 0.0
    lead_in: float = 0.3
    beats_per_bar: int = 4


def perform(piece: Piece, seed: int) -> Score:
    """Play a piece: a symusic score in ticks, equal for equal seeds.

    Within a chord the top note is loudest and the notes are spread upwards by some milliseconds; a leading voice comes
    up to 25 ms early, as pianists play a melody. Timing varies by 4 ms and velocity by 2 steps (normal, one sigma).
    """
    rng = np.random.default_rng(seed)
    seconds = _clock(piece)
    track = Track(name="piano")
    for voice in piece.voices:
        for beat, length, pitches in _events(voice):
            start, end = seconds(beat), seconds(beat) + (seconds(beat + length) - seconds(beat)) * voice.touch
            loud = np.interp(beat, *zip(*piece.dynamics, strict=True)) + voice.louder
            lead = min(max(voice.louder, 0.0) * 0.0015, 0.025)
            for i, pitch in enumerate(pitches):
                inner = -5 if len(pitches) > 1 and 0 < i < len(pitches) - 1 else 0
                onset = max(start - lead + 0.007 * i + 0.004 * rng.standard_normal(), 0.0)
                velocity = int(np.clip(round(loud + inner + 2 * rng.standard_normal()), 8, 124))
                ticks = _ticks(onset)
                track.notes.append(Note(ticks, max(_ticks(end) - ticks, 20), pitch, velocity))
    track.controls.extend(_pedalling(piece, seconds))
    score = Score(TICKS_PER_SECOND // 2)
    score.tempos.append(Tempo(0, 120))
    score.time_signatures.append(TimeSignature(0, piece.beats_per_bar, 4))
    score.tracks.append(track)
    return score.sort()


def pitch_number(name: str) -> int:
    """`"A4"` -> 69, `"Bb3"` -> 58.

    Raises:
        ValueError: not a note name.
    """
    match = PITCH.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a note name such as C#5")
    letter, accidental, octave = match.groups()
    return 12 * (int(octave) + 1) + STEPS[letter] + {"": 0, "#": 1, "b": -1}[accidental]


def _events(voice: Voice) -> list[tuple[float, float, list[int]]]:
    """Beat, length and ascending pitches of each note or chord."""
    beat, length, events = voice.start, 1.0, []
    for token in voice.music.replace("|", " ").split():
        names, _, written = token.partition(":")
        length = float(written) if written else length
        if names != "r":
            events.append((beat, length, sorted(pitch_number(name) for name in names.split("+"))))
        beat += length
    return events


def _clock(piece: Piece):
    """Function beat -> s: the integral of the tempo curve."""
    end = max(beat + length for voice in piece.voices for beat, length, _ in _events(voice)) + 8
    beats = np.arange(0, end, 1 / 48)
    bpm = np.interp(beats, *zip(*piece.tempo, strict=True))
    times = piece.lead_in + np.concatenate([[0], np.cumsum(60 / bpm[:-1] / 48)])
    return lambda beat: float(np.interp(beat, beats, times))


def _pedalling(piece: Piece, seconds) -> list[ControlChange]:
    """CC64 in real time: up with the new bass, down again 0.12 s after it (the first time 0.05 s)."""
    events = []
    for i, beat in enumerate(piece.pedal):
        at = seconds(beat)
        events += [(at + 0.01 + dt, value) for dt, value in PEDAL_LIFT] if i else []
        events += [(at + (0.12 if i else 0.05) + dt, value) for dt, value in PEDAL_PRESS]
    if piece.pedal:
        events += [(seconds(piece.pedal_end) + 3 * dt, value) for dt, value in PEDAL_LIFT]
    return [ControlChange(_ticks(at), 64, value) for at, value in events]


def _ticks(seconds: float) -> int:
    return round(seconds * TICKS_PER_SECOND)
