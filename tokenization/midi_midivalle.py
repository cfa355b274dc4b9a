# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A MIDI file, bytes or symusic `Score` -> notes in seconds: checked, merged, pedalled, sorted.

symusic reads the notes and the tempo map. It loses some things without a word (measured on 0.5.9: controllers of a
track or channel that has no notes, note-ons that never end, tracks beyond the announced number, everything after
2^31 ticks), so a byte scan finds the pedal and the lost notes and refuses files that it cannot account for.
"""

import io
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from symusic import Score

NOTE_DTYPE = np.dtype([("onset", "f8"), ("duration", "f8"), ("pitch", "i2"), ("velocity", "i2")])  # s, s, key, 0..127
TICKS_PER_SECOND = 192  # the model's grid: 96 ticks per beat at 120 BPM, 5.2 ms
PITCH_MIN, PITCH_MAX = 21, 108  # the keys of a piano
SUSTAIN, SOSTENUTO = 64, 66  # controllers; una corda (67) changes no duration and is not read
RESET = 121  # "reset all controllers" lets the pedals of its channel come up
PEDAL_DOWN = 64  # a pedal from half its way on holds the dampers up; lower values let them fall
MIN_DURATION_S = RESTRIKE_S = 1e-3  # shortest note after the pedal rule; a closer strike of the key is the same strike
ROUNDING_S = 1e-9  # onset and duration added up again may miss the time of the key-up's tick by so much
MAX_BYTES, MAX_SECONDS = 5_000_000, 6 * 3600
MAX_CATCHES = 200_000_000  # presses of the sostenuto times notes, some seconds of work: 2,000 presses in 100,000 notes
DRUM_CHANNEL = 9  # channel 10, counted from 0

SUSTAIN_MODES = ("extend", "ignore")
LEFT_OUT = {  # report key -> words for the user
    "drum_notes": "on a drum track",
    "outside_notes": f"outside the piano's keys {PITCH_MIN} to {PITCH_MAX}",
    "unended_notes": "without a note-off",
}


class MidiError(ValueError):
    """A MIDI input that cannot be used; the message names the file, what is wrong and, if of use, what to do."""


@dataclass(frozen=True)
class Performance:
    """The piano notes of one MIDI input.

    Attributes:
        notes (`np.ndarray` of `NOTE_DTYPE`, shape `(M,)`, M >= 1):
            Onset and duration in seconds, sorted by (onset, pitch, duration).
        name (`str`): File name, for messages.
        report (`dict[str, int]`):
            `notes` kept, of them `extended_notes` lengthened by the pedal, and what was left out: `drum_notes`,
            `outside_notes`, `unended_notes`.
    """

    notes: np.ndarray
    name: str
    report: dict[str, int]

    @property
    def end(self) -> float:
        """End of the last sounding note, s."""
        return float((self.notes["onset"] + self.notes["duration"]).max())

    @property
    def warning(self) -> str:
        """One sentence on the notes that were left out; empty if there are none."""
        parts = [f"{self.report[key]} {words}" for key, words in LEFT_OUT.items() if self.report[key]]
        return f"{self.name}: left out notes: {', '.join(parts)}" if parts else ""


def to_ticks(seconds) -> np.ndarray:
    """Seconds -> grid ticks (1/192 s), int64. A tie goes up; 1e-6 tick keeps float noise from tipping it down."""
    return np.floor(np.asarray(seconds) * TICKS_PER_SECOND + (0.5 + 1e-6)).astype(np.int64)


def load_performance(
    midi: "str | os.PathLike | bytes | BinaryIO | Score", sustain: str = "extend", name: str | None = None
) -> Performance:
    """Read the piano notes of a MIDI input in real time.

    The tempo map and any resolution are honoured. All tracks but drums are merged, of format 0 and 1 alike; note-offs
    end the oldest sounding note of their key and channel, as in the published pipeline. Nothing is dropped silently:
    see `Performance.report`.

    Args:
        midi (`str`, `os.PathLike`, `bytes`, binary file or `symusic.Score`):
            A file of at most 5 MB, its bytes (`bytearray` and `memoryview` too), one that is open for reading, or a
            score in any time unit.
        sustain (`str`):
            `"extend"` lengthens notes by the sustain and sostenuto pedals (see `extend_by_pedal`), `"ignore"` keeps
            key-up times.
        name (`str`, *optional*): Name for messages, if not the file's own.

    Returns:
        `Performance`

    Raises:
        `MidiError`: not a readable MIDI file, damaged, longer than 6 hours, or without a single piano note.
    """
    if sustain not in SUSTAIN_MODES:
        raise MidiError(f"sustain is {sustain!r}; choose one of {SUSTAIN_MODES}")
    if isinstance(midi, (str, os.PathLike)):
        name = name or Path(midi).name or repr(str(midi))
        midi = _read(midi, name)
    name = name or "MIDI"
    if hasattr(midi, "read"):
        midi = _read_open(midi, name)
    if isinstance(midi, (bytes, bytearray, memoryview)):
        score, pedals, note_ons, last_tick = _parse(bytes(midi), name)
    else:
        score = _in_ticks(midi, name)
        pedals, note_ons, last_tick = _score_pedals(score), score.note_num(), score.end()
    seconds = _tempo_map(score, name)
    notes, report = _collect(score, seconds, name, note_ons)
    if sustain == "extend":
        sustain, sostenuto = (pedals[pedals[:, 1] == number] for number in (SUSTAIN, SOSTENUTO))
        presses = _presses(seconds(sostenuto[:, 0]), sostenuto[:, 2])
        if len(presses) * len(notes) > MAX_CATCHES:
            raise MidiError(f"{name}: {len(presses)} presses of the sostenuto pedal are no performance; take CC66 out")
        last_event = float(seconds(np.int64(last_tick)))
        longer = extend_by_pedal(notes, seconds(sustain[:, 0]), sustain[:, 2], last_event, presses)
        report["extended_notes"] = int((longer > notes["duration"] + MIN_DURATION_S).sum())
        notes["duration"] = longer
    notes = notes[np.lexsort((notes["duration"], notes["pitch"], notes["onset"]))]  # stable
    return Performance(notes, name, report)


def extend_by_pedal(
    notes: np.ndarray, times: np.ndarray, values: np.ndarray, last_event: float, sostenuto: np.ndarray | None = None
) -> np.ndarray:
    """Durations under the sustain and the sostenuto pedal.

    A note whose key goes up while the sustain pedal is down rings until the pedal comes up, or until the last event of
    the file if it never does; a pedal that is up for a moment only, between two presses, ends it too. A press of the
    sostenuto catches the keys that sound at that moment: their notes ring until it comes up. Any note ends at the next
    strike of its key that comes more than 1 ms later. 1 ms remains.

    Args:
        notes (`np.ndarray` of `NOTE_DTYPE`, shape `(M,)`): Notes with key-up durations.
        times (`np.ndarray` of shape `(C,)`): Times of the CC64 events in seconds, ascending.
        values (`np.ndarray` of shape `(C,)`): Their values, 64 and above = down; of equal times the last one counts.
        last_event (`float`): Time of the last event of the file, s.
        sostenuto (`np.ndarray` of shape `(P, 2)`, *optional*): Down and up of each press of CC66, s; inf = never up.

    Returns:
        `np.ndarray` of shape `(M,)`: durations in seconds.
    """
    onset, end = notes["onset"], notes["onset"] + notes["duration"]
    last_event = max(last_event, end.max())
    times, values = np.append(-np.inf, times), np.append(0, values)  # the pedal starts up
    ups = np.append(times[values < PEDAL_DOWN], last_event)

    def sustained(end: np.ndarray) -> np.ndarray:
        until = end + ROUNDING_S
        down = values[np.searchsorted(times, until, side="right") - 1] >= PEDAL_DOWN
        return np.where(down, ups[np.searchsorted(ups[:-1], until, side="right")], end)

    end = sustained(end)
    for down, up in np.empty((0, 2)) if sostenuto is None else np.minimum(sostenuto, last_event):
        caught = np.isin(notes["pitch"], notes["pitch"][(onset <= down) & (down < end - ROUNDING_S)])
        end = np.where(caught & (down < end - ROUNDING_S) & (end < up), sustained(np.full_like(end, up)), end)
    for pitch in np.unique(notes["pitch"]):
        key = notes["pitch"] == pitch
        strikes = np.append(np.sort(onset[key]), np.inf)
        end[key] = np.minimum(end[key], strikes[np.searchsorted(strikes, onset[key] + RESTRIKE_S, side="right")])
    return np.maximum(end - onset, MIN_DURATION_S)


def _presses(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Events of a pedal -> down and up of each press `(P, 2)`; one that never comes up ends at inf."""
    down = np.concatenate([[False], values >= PEDAL_DOWN, [False]])
    times = np.concatenate([[-np.inf], times, [np.inf]])
    change = np.flatnonzero(np.diff(down.astype(int))) + 1
    return times[change].reshape(-1, 2)


def slice_notes(notes: np.ndarray, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """The notes struck in a window and those that already sound at its left edge.

    Decided on the grid, so that windows which share their edges hold every strike exactly once. A window that reaches
    the end of the last note has no right edge: a note rounded up onto it is not lost.

    Args:
        notes (`np.ndarray` of `NOTE_DTYPE`, shape `(M,)`): Notes in seconds.
        start (`float`), end (`float`): Edges of the window in seconds; `math.inf` for no right edge.

    Returns:
        `tuple(np.ndarray, np.ndarray)`: struck and held notes, unchanged: neither clipped nor shifted.
    """
    tick, edge = to_ticks(notes["onset"]), to_ticks(start)
    open_end = not len(notes) or end >= float((notes["onset"] + notes["duration"]).max())
    struck = (tick >= edge) & (open_end or tick < to_ticks(end))
    held = (tick < edge) & (tick + to_ticks(notes["duration"]) > edge)
    return notes[struck], notes[held]


def _read(path: str | os.PathLike, name: str) -> bytes:
    try:
        status = os.stat(path)  # before open: opening a FIFO would block for ever
        if not stat.S_ISREG(status.st_mode):
            raise MidiError(f"{name}: not a regular file; give a MIDI file")
        if status.st_size > MAX_BYTES:
            raise MidiError(f"{name}: {status.st_size} bytes are too many for a MIDI file (limit {MAX_BYTES})")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, MidiError):
            raise
        raise MidiError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_open(file, name: str) -> bytes:
    """An open file from where it stands on."""
    if isinstance(file, io.TextIOBase):
        raise MidiError(f"{name}: the file is open as text; open it with mode 'rb'")
    try:
        return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise MidiError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _parse(data: bytes, name: str) -> tuple[Score, np.ndarray, int, int]:
    """Bytes -> score, pedal events (C, 3) of tick, controller and value, number of note-ons, tick of the last event."""
    pedals, note_ons, last_tick = [], 0, 0
    for start, end in _tracks(data, name):
        try:
            track_pedals, track_ons, track_last = _scan_track(data, start, end)
        except IndexError as error:
            raise MidiError(f"{name}: damaged MIDI data; export the file again") from error
        pedals += track_pedals
        note_ons += track_ons
        last_tick = max(last_tick, track_last)
    if last_tick >= 2**31:
        raise MidiError(f"{name}: {last_tick} ticks are too many (limit {2**31 - 1})")
    try:
        score = Score.from_midi(data)
    except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
        raise MidiError(f"{name}: damaged MIDI data; export the file again") from error
    if score.note_num() > note_ons:
        raise MidiError(f"{name}: damaged MIDI data (events after the end of a track); export the file again")
    events = np.array(pedals, dtype=np.int64).reshape(-1, 3)
    return score, events[np.argsort(events[:, 0], kind="stable")], note_ons, last_tick


def _tracks(data: bytes, name: str) -> list[tuple[int, int]]:
    """Check the header and the chunk sizes; return the byte range of every track."""
    if len(data) > MAX_BYTES:
        raise MidiError(f"{name}: {len(data)} bytes are too many for a MIDI file (limit {MAX_BYTES})")
    if not data:
        raise MidiError(f"{name}: the file is empty; give a MIDI file")
    if data[:4] != b"MThd" or len(data) < 14 or data[4:8] < b"\0\0\0\6":
        raise MidiError(f"{name}: not a MIDI file (no complete MThd header)")
    header, form, announced, division = struct.unpack(">IHHH", data[4:14])
    if form > 1:
        raise MidiError(f"{name}: MIDI format {form} is not supported; save it as format 0 or 1")
    if not 1 <= division <= 32767:
        raise MidiError(f"{name}: resolution {division:#06x} is not in ticks per quarter; save it with 1 to 32767")
    position, tracks = 8 + header, []
    while position + 8 <= len(data):
        is_track = data[position : position + 4] == b"MTrk"
        if not is_track and len(tracks) == announced:
            break  # bytes behind the last track are not music
        size = int.from_bytes(data[position + 4 : position + 8], "big")
        start, position = position + 8, position + 8 + size
        if position > len(data):
            raise MidiError(f"{name}: the file is cut short (missing bytes: {position - len(data)})")
        if is_track:
            tracks.append((start, position))
    if len(tracks) != announced:
        raise MidiError(
            f"{name}: its header announces another number of tracks ({announced}) than it holds ({len(tracks)})"
            "; it is damaged"
        )
    return tracks


def _scan_track(data: bytes, position: int, end: int) -> tuple[list[tuple[int, int, int]], int, int]:
    """One track -> pedal events (tick, controller, value), number of note-ons, tick of the last channel event."""
    pedals, note_ons, tick, last_tick, running = [], 0, 0, 0, 0
    pedalled = set()  # status bytes of channels whose pedals have moved: a reset before says nothing
    while position < end:
        delta, position = _variable_length(data, position)
        tick += delta
        status = running  # survives meta events, against the standard: symusic reads such files, so they are common
        if data[position] & 0x80:
            status, position = data[position], position + 1
        if 0x80 <= status < 0xF0:
            size = 1 if status >> 4 in (0xC, 0xD) else 2
            first, second = data[position], data[position + size - 1]
            if (first | second) & 0x80:
                raise IndexError("a data byte has its high bit set")
            if status >> 4 == 0x9 and second:
                note_ons += 1
            elif status >> 4 == 0xB and first in (SUSTAIN, SOSTENUTO) and status & 0xF != DRUM_CHANNEL:
                pedals.append((tick, first, second))
                pedalled.add(status)
            elif first == RESET and status in pedalled:
                pedals += [(tick, SUSTAIN, 0), (tick, SOSTENUTO, 0)]
            running, last_tick = status, tick
        elif status in (0xF0, 0xF7, 0xFF):
            if status == 0xFF:
                kind, position = data[position], position + 1
                if kind == 0x2F:
                    return pedals, note_ons, last_tick  # end of track
            size, position = _variable_length(data, position)
        else:
            raise IndexError("no status byte")
        position += size
    if position > end:
        raise IndexError("an event crosses the end of its track")
    return pedals, note_ons, last_tick


def _variable_length(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(position, position + 4):
        value = value << 7 | data[index] & 0x7F
        if data[index] < 0x80:
            return value, index + 1
    raise IndexError("a variable-length number has more than four bytes")


def _in_ticks(score: Score, name: str) -> Score:
    if not hasattr(score, "ticks_per_quarter"):
        raise MidiError(
            f"{name}: {type(score).__name__} is not MIDI; give a path, bytes, an open file or a symusic Score"
        )
    if not 1 <= score.ticks_per_quarter <= 32767:
        raise MidiError(f"{name}: resolution {score.ticks_per_quarter} is not in 1 to 32767 ticks per quarter")
    if any(track.notes.numpy()["duration"].min(initial=0) < 0 for track in score.tracks):  # `to` makes them 0
        raise MidiError(f"{name}: holds a note with a negative duration")
    return score.to("tick")


def _score_pedals(score: Score) -> np.ndarray:
    """Pedal events (C, 3) of tick, controller and value, ascending."""
    events = [np.empty((0, 3), np.int64)]
    for track in score.tracks:
        controls = track.controls.numpy()
        is_pedal = np.isin(controls["number"], (SUSTAIN, SOSTENUTO)) & (not track.is_drum)
        is_reset = (controls["number"] == RESET) & (np.cumsum(is_pedal) > 0)
        moves = np.stack([controls[key] for key in ("time", "number", "value")], 1).astype(np.int64)
        moves = np.repeat(moves, is_pedal + 2 * is_reset, 0)  # in their order; a reset moves both pedals
        resets = np.flatnonzero(moves[:, 1] == RESET).reshape(-1, 2)
        moves[resets, 1:] = [[SUSTAIN, 0], [SOSTENUTO, 0]]
        events.append(moves)
    events = np.concatenate(events)
    return events[np.argsort(events[:, 0], kind="stable")]


def _tempo_map(score: Score, name: str):
    """Return a function from ticks (int64) to seconds (float64). symusic's own seconds are float32."""
    tempos = score.tempos.numpy()
    order = np.argsort(tempos["time"], kind="stable")
    ticks = np.append(0, tempos["time"][order].astype(np.int64))
    mspq = np.append(500_000, tempos["mspq"][order].astype(np.int64))  # 120 BPM until the first tempo
    if mspq.min() < 1 or ticks.min() < 0:
        raise MidiError(f"{name}: a tempo event without a length; remove it")
    scale = 1e6 * score.ticks_per_quarter
    base = np.append(0.0, np.cumsum(np.diff(ticks) * mspq[:-1] / scale))

    def seconds(tick: np.ndarray) -> np.ndarray:
        change = np.searchsorted(ticks, tick, side="right") - 1  # of equal ticks the last tempo
        return base[change] + (tick - ticks[change]) * mspq[change] / scale

    return seconds


def _collect(score: Score, seconds, name: str, note_ons: int) -> tuple[np.ndarray, dict[str, int]]:
    """Merge the tracks; return the piano notes (unsorted, key-up durations) and the report."""
    report = dict.fromkeys(("notes", "extended_notes", *LEFT_OUT), 0)
    columns = []
    for track in score.tracks:
        if track.is_drum:
            report["drum_notes"] += len(track.notes)
            continue
        fields = track.notes.numpy()
        columns.append(np.stack([fields[key].astype(np.int64) for key in ("time", "duration", "pitch", "velocity")]))
    report["unended_notes"] = note_ons - score.note_num()
    if score.note_num() == 0:
        unended = f" that end (note-ons: {note_ons}); export it again" if note_ons else ""
        raise MidiError(f"{name}: holds no notes{unended}")
    time, duration, pitch, velocity = np.concatenate(columns, 1) if columns else np.empty((4, 0), np.int64)
    piano = (pitch >= PITCH_MIN) & (pitch <= PITCH_MAX)
    report["notes"], report["outside_notes"] = int(piano.sum()), int((~piano).sum())
    if not report["notes"]:
        raise MidiError(
            f"{name}: holds no piano notes ({report['drum_notes']} {LEFT_OUT['drum_notes']}, "
            f"{report['outside_notes']} {LEFT_OUT['outside_notes']})"
        )
    if time.min() < 0 or velocity.min() < 0:
        raise MidiError(f"{name}: holds a note with a negative time or velocity")
    notes = np.empty(report["notes"], NOTE_DTYPE)
    notes["onset"], end = seconds(time[piano]), seconds((time + duration)[piano])
    notes["duration"], notes["pitch"], notes["velocity"] = end - notes["onset"], pitch[piano], velocity[piano]
    if not math.isfinite(end.max()) or end.max() > MAX_SECONDS:
        raise MidiError(f"{name}: {end.max():.1f} s are too long (limit {MAX_SECONDS} s); split the file")
    return notes, report
