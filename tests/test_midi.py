# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""MIDI reading: real time, pedal, nothing lost in silence, and one clear sentence for every bad file."""

import os
import random

import numpy as np
import pytest
from symusic import Note, Score, Track

from tokenization import NOTE_DTYPE, MidiError, load_performance, midi_midivalle, slice_notes
from tokenization.midi_midivalle import extend_by_pedal


def note_on(pitch, velocity=64, channel=0):
    return bytes([0x90 | channel, pitch, velocity])


def note_off(pitch, channel=0):
    return bytes([0x80 | channel, pitch, 0])


def pedal(value, channel=0):
    return bytes([0xB0 | channel, 64, value])


def sostenuto(value):
    return bytes([0xB0, 66, value])


def tempo(mspq):
    return b"\xff\x51\x03" + mspq.to_bytes(3, "big")


def variable_length(value):
    digits = [value & 127]
    while value := value >> 7:
        digits.append(value & 127 | 128)
    return bytes(reversed(digits))


def midi(*tracks, tpq=480, form=1, announced=None):
    """Bytes of a MIDI file; a track is a list of (tick, event bytes), in order."""
    out = b"MThd\0\0\0\6" + b"".join(n.to_bytes(2, "big") for n in (form, announced or len(tracks), tpq))
    for track in tracks:
        body, now = b"", 0
        for tick, event in track:
            body, now = body + variable_length(tick - now) + event, tick
        body += b"\0\xff\x2f\0"
        out += b"MTrk" + len(body).to_bytes(4, "big") + body
    return out


ONE_NOTE = midi([(0, note_on(60)), (480, note_off(60))])


def rows(performance):
    return [tuple(round(x, 6) if isinstance(x, float) else x for x in note.item()) for note in performance.notes]


def test_times_follow_the_tempo_map():
    data = midi(
        [(0, tempo(500_000)), (480, tempo(1_000_000)), (480, tempo(250_000)), (960, tempo(2_000_000))],
        [(240, note_on(60, 80)), (720, note_off(60)), (960, note_on(62, 81)), (1200, note_off(62))],
    )
    performance = load_performance(data)
    # 480 ticks are 0.5 s, then 0.25 s (of two tempos at one tick the last counts), then 2 s
    assert rows(performance) == [(0.25, 0.375, 60, 80), (0.75, 1.0, 62, 81)]
    assert performance.end == pytest.approx(1.75)


@pytest.mark.parametrize("tpq", [1, 96, 220, 480, 32767])
def test_resolution_does_not_change_times_and_no_tempo_means_120(tpq):
    data = midi([(3 * tpq, note_on(60)), (4 * tpq, note_off(60))], tpq=tpq)
    assert rows(load_performance(data)) == [(1.5, 0.5, 60, 64)]


def test_format_0_and_1_and_score_give_the_same_notes(tmp_path):
    left = [(0, note_on(40, 50, 1)), (0, pedal(127, 1)), (100, note_off(40, 1)), (700, pedal(0, 1))]
    right = [(50, note_on(72, 90)), (90, note_off(72))]
    merged = sorted(left + right, key=lambda event: event[0])
    path = tmp_path / "a.mid"
    path.write_bytes(midi(left, right))
    expected = load_performance(path)
    assert len(expected.notes) == 2 and expected.report["extended_notes"] == 2 and expected.name == "a.mid"
    for other in (midi(merged, form=0), path.read_bytes(), Score(str(path))):
        assert rows(load_performance(other)) == rows(expected)


def test_notes_are_sorted_by_onset_pitch_duration_and_off_ends_the_oldest():
    data = midi(
        [
            (0, note_on(64, 1)),
            (0, note_on(60, 2)),
            (48, note_on(60, 3)),
            (96, note_off(60)),
            (96, note_off(64)),
            (192, note_off(60)),
        ]
    )
    assert rows(load_performance(data, "ignore")) == [(0, 0.1, 60, 2), (0, 0.1, 64, 1), (0.05, 0.15, 60, 3)]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], 0.1),  # no pedal
        ([(48, pedal(64)), (480, pedal(63))], 0.5),  # down at key-up: until the pedal is up
        ([(48, pedal(63)), (480, pedal(0))], 0.1),  # half pedal below 64 is up
        ([(96, pedal(127)), (480, pedal(0))], 0.5),  # down in the moment of key-up counts
        ([(0, pedal(127)), (96, pedal(0)), (480, pedal(127))], 0.1),  # up in that moment too
        ([(0, pedal(127)), (96, pedal(0)), (96, pedal(127)), (480, pedal(0))], 0.5),  # of one tick the last counts
        ([(97, pedal(127)), (480, pedal(0))], 0.1),  # down too late
        ([(0, pedal(127)), (240, pedal(100)), (480, pedal(0))], 0.5),  # pedal noise above 64
        ([(0, pedal(127)), (960, b"\xb0\x01\x00")], 1.0),  # never up: the last event of the file
        ([(0, pedal(127)), (192, note_on(60)), (200, note_off(60)), (480, pedal(0))], 0.2),  # next strike of the key
        ([(0, pedal(127)), (192, note_on(61)), (200, note_off(61)), (480, pedal(0))], 0.5),  # of another key
    ],
)
def test_pedal_rule(events, expected):
    key = [(0, note_on(60)), (96, note_off(60))]
    track = sorted(key + events, key=lambda event: event[0])
    assert load_performance(midi(track)).notes["duration"][0] == pytest.approx(expected)
    # Tracks without notes hold pedals too (symusic alone would lose this one).
    if all(event[0] & 0xF0 == 0xB0 for _, event in events):
        assert load_performance(midi(key, events)).notes["duration"][0] == pytest.approx(expected)
    assert load_performance(midi(track), "ignore").notes["duration"][0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([(48, sostenuto(64)), (480, sostenuto(63))], 0.5),  # the key is down when it is pressed: caught
        ([(96, sostenuto(127)), (480, sostenuto(0))], 0.1),  # it has just gone up: not caught
        ([(0, sostenuto(127)), (480, sostenuto(0))], 0.5),  # struck in the moment of the press
        ([(48, sostenuto(127)), (480, sostenuto(0)), (470, pedal(127)), (700, pedal(0))], 700 / 960),  # handed over
        ([(0, pedal(127)), (300, sostenuto(127)), (310, pedal(0)), (480, sostenuto(0))], 0.5),  # rings by the sustain
        ([(48, sostenuto(127)), (90, sostenuto(0)), (200, sostenuto(127)), (480, sostenuto(0))], 0.1),  # pressed anew
        ([(48, sostenuto(127)), (960, b"\xb0\x01\x00")], 1.0),  # never up: the last event of the file
        ([(48, sostenuto(127)), (192, note_on(60)), (200, note_off(60)), (480, sostenuto(0))], 0.2),  # next strike
        ([(0, b"\xb0\x43\x7f"), (480, b"\xb0\x43\x00")], 0.1),  # una corda lengthens nothing
    ],
)
def test_sostenuto(events, expected):
    key = [(0, note_on(60)), (96, note_off(60))]
    track = sorted(key + events, key=lambda event: event[0])
    assert load_performance(midi(track)).notes["duration"][0] == pytest.approx(expected)
    assert load_performance(midi(track), "ignore").notes["duration"][0] == pytest.approx(0.1)


def test_more_presses_than_anybody_makes(monkeypatch):
    """Each press looks at each note: a file made to keep a server busy is refused."""
    monkeypatch.setattr(midi_midivalle, "MAX_CATCHES", 1)
    track = [(0, note_on(60)), (10, sostenuto(127)), (20, sostenuto(0)), (30, sostenuto(127)), (96, note_off(60))]
    with pytest.raises(MidiError, match="2 presses of the sostenuto pedal are no performance; take CC66 out"):
        load_performance(midi(track))
    assert len(load_performance(midi(track), "ignore").notes) == 1


def test_sostenuto_holds_the_keys_it_caught_and_no_others():
    """Key 60 is caught; 62, struck later, is not; 60 struck again rings too, for its damper is still up."""
    keys = [(0, note_on(60)), (96, note_off(60)), (192, note_on(62)), (288, note_off(62)), (384, note_on(60))]
    track = [*keys, (400, note_off(60)), (48, sostenuto(127)), (480, sostenuto(0))]
    notes = load_performance(midi(sorted(track, key=lambda event: event[0]))).notes
    assert (notes["onset"] * 960).tolist() == pytest.approx([0, 192, 384])
    assert (notes["duration"] * 960).tolist() == pytest.approx([384, 96, 96])


def test_pedalling_anew_ends_what_rang():
    """Up for 5 ms between two presses: the old harmony ends there, the new one rings on."""
    track = [
        (0, pedal(127)),
        (0, note_on(60)),
        (96, note_off(60)),
        (475, pedal(20)),
        (476, note_on(64)),
        (480, pedal(90)),
    ]
    track += [(500, note_off(64)), (960, pedal(0))]
    assert (load_performance(midi(track)).notes["duration"] * 960).tolist() == pytest.approx([475, 484])


def test_a_restrike_ends_a_note_and_its_twin_but_twins_do_not_end_each_other():
    twins = [(0, note_on(60)), (0, note_on(60, 70, 1)), (48, note_on(60)), (90, note_off(60, 1)), (480, note_off(60))]
    performance = load_performance(midi([*twins, (864, note_off(60))]))
    assert performance.notes["duration"].tolist() == pytest.approx([0.05, 0.05, 0.85])
    assert performance.report["extended_notes"] == 0


def test_strikes_within_1_ms_are_one_strike():
    track = [(0, note_on(60)), (9, note_on(60, 70)), (960, note_off(60)), (1920, note_off(60))]  # 0.94 ms apart
    assert load_performance(midi(track, tpq=4800)).notes["duration"].tolist() == pytest.approx([0.1, 0.2 - 9 / 9600])


def test_a_pedal_on_a_drum_channel_is_not_the_pianos():
    """Of bytes and of a score, which keeps the pedals of tracks with notes only."""
    drums = [(0, pedal(127, 9)), (0, note_on(36, channel=9)), (9, note_off(36, 9)), (960, pedal(0, 9))]
    data = midi([(0, note_on(60)), (96, note_off(60))], drums)
    for given in (data, Score.from_midi(data)):
        assert load_performance(given).notes["duration"].tolist() == [0.1]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([(0, pedal(127)), (480, b"\xb0\x79\x00"), (960, b"\xb0\x01\x00")], 0.5),  # the sustain pedal
        ([(48, sostenuto(127)), (480, b"\xb0\x79\x00"), (960, b"\xb0\x01\x00")], 0.5),  # the sostenuto
        ([(0, b"\xb0\x79\x00"), (0, pedal(127)), (480, pedal(0))], 0.5),  # first; of one tick the last counts
        ([(0, pedal(127)), (48, b"\xb0\x79\x00"), (48, pedal(127)), (480, pedal(0))], 0.5),
        ([(0, pedal(127)), (48, b"\xb1\x79\x00"), (480, pedal(0))], 0.5),  # of another channel
        ([(0, b"\xb9\x40\x7f"), (48, pedal(127)), (96, b"\xb9\x79\x00"), (480, pedal(0))], 0.5),  # of drums
    ],
)
def test_a_reset_of_all_controllers_lets_the_pedals_up(events, expected):
    key = [(0, note_on(60)), (96, note_off(60))]
    data = midi(sorted(key + events, key=lambda event: event[0]))
    assert load_performance(data).notes["duration"].tolist() == [pytest.approx(expected)]
    assert load_performance(Score.from_midi(data)).notes["duration"].tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("number", [64, 66])
def test_a_pedal_in_the_moment_of_key_up_whatever_the_tempos(number):
    """Onset and duration in s do not add up to the key-up's own time to the last bit. CC64 counts, CC66 is too late."""
    rng, press = np.random.default_rng(0), bytes([0xB0, number])
    for _ in range(300):
        tempos = [(480 * i, tempo(int(rng.integers(300_000, 900_000)))) for i in range(9)]
        onset, end = int(rng.integers(480, 2400)), 480 * int(rng.integers(5, 8))
        key = [(onset, note_on(60)), (end, note_off(60)), (end, press + b"\x7f"), (end + 480, press + b"\0")]
        report = load_performance(midi(tempos, key, [(9999, b"\xb0\x01\0")])).report
        assert report["extended_notes"] == (number == 64)


def test_1_ms_remains():
    zero = midi([(10, note_on(60)), (10, note_off(60))])
    performance = load_performance(zero)
    assert performance.notes["duration"].tolist() == pytest.approx([1e-3])
    assert performance.report["extended_notes"] == 0  # not by the pedal


def test_a_pedal_that_never_comes_up_shortens_nothing():
    """Also where the last event that is told lies before the end of a note."""
    notes = np.array([(0.0, 1.0, 60, 64), (0.0, 2.0, 62, 64)], NOTE_DTYPE)
    assert extend_by_pedal(notes, np.array([0.5]), np.array([127]), last_event=0.5).tolist() == [2.0, 2.0]


def test_nothing_is_left_out_in_silence():
    data = midi(
        [(0, note_on(60)), (0, note_on(20)), (0, note_on(109)), (0, note_on(61)), (9, note_off(60)), (9, note_off(20))]
        + [(9, note_off(109)), (9, note_on(36, 99, 9)), (20, note_off(36, 9))]
    )
    performance = load_performance(data, name="x.mid")
    assert performance.report == {
        "notes": 1,
        "extended_notes": 0,
        "drum_notes": 1,
        "outside_notes": 2,
        "unended_notes": 1,
    }
    assert performance.warning.startswith("x.mid: left out notes: 1 on a drum track, 2 outside")
    assert load_performance(ONE_NOTE).warning == ""


def test_lenient_where_symusic_is():
    def file(body):
        return b"MThd\0\0\0\6\0\0\0\1\x01\xe0MTrk" + len(body).to_bytes(4, "big") + body

    running_after_meta = file(b"\0\x90\x3c\x40\0\xff\x01\x01a\x60\x3c\0\0\xff\x2f\0")
    no_end_of_track = file(b"\0\x90\x3c\x40\x60\x3c\0")
    sysex = file(b"\0\xf0\x02\x01\xf7\0\x90\x3c\x40\x60\x3c\0")
    for data in (running_after_meta, no_end_of_track, sysex, running_after_meta + b"trailing"):
        assert rows(load_performance(data)) == [(0, 0.1, 60, 64)]


def test_windows_hold_every_strike_once_and_every_sounding_note():
    rng = np.random.default_rng(0)
    notes = np.zeros(2000, NOTE_DTYPE)
    notes["onset"] = np.sort(rng.uniform(0, 40, 2000)).round(3)  # milliseconds: many round across an edge
    notes["duration"], notes["pitch"] = rng.exponential(0.7, 2000) + 1e-3, rng.integers(21, 109, 2000)
    edges = [*np.arange(0, 40, 2.5), float((notes["onset"] + notes["duration"]).max())]
    windows = [slice_notes(notes, *edge) for edge in zip(edges, edges[1:], strict=False)]
    struck = np.concatenate([struck for struck, _ in windows])
    assert np.array_equal(np.sort(struck), np.sort(notes))
    for start, (_, held) in zip(edges, windows, strict=False):
        sounding = (notes["onset"] < start - 0.003) & (notes["onset"] + notes["duration"] > start + 0.006)
        assert np.isin(notes[sounding], held).all() and (held["onset"] < start).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"This is a text file, not MIDI", "not a MIDI file"),
        (ONE_NOTE[:12], "not a MIDI file"),
        (b"RIFF\0\0\0\0RMIDdata" + ONE_NOTE, "not a MIDI file"),
        (ONE_NOTE[:-3], "cut short"),
        (midi([]), "no notes"),
        (midi([(0, pedal(127)), (9, pedal(0))]), "no notes"),
        (midi([(0, note_on(60))]), "no notes"),
        (midi([(0, note_on(36, 64, 9)), (9, note_off(36, 9))]), "no piano notes"),
        (midi([(0, note_on(10)), (9, note_off(10))]), "no piano notes"),
        (midi([(0, note_on(60)), (9, note_off(60))], form=2), "format 2"),
        (midi([(0, note_on(60)), (9, note_off(60))], tpq=0), "resolution"),
        (midi([(0, note_on(60)), (9, note_off(60))], tpq=0xE728), "resolution"),
        (
            midi([(0, note_on(60)), (9, note_off(60))], [(0, note_on(62)), (9, note_off(62))], announced=1),
            r"announces another number of tracks \(1\) than it holds",
        ),
        (
            midi([(0, note_on(60)), (9, note_off(60))], announced=3),
            r"announces another number of tracks \(3\) than it holds \(1\)",
        ),
        (midi([(0, tempo(0)), (0, note_on(60)), (9, note_off(60))]), "tempo"),
        (midi([(0, b"\x90\x3c\xff"), (9, note_off(60))]), "damaged"),
        (midi([(0, b"\x3c\x40"), (9, note_off(60))]), "damaged"),
        (midi([(n * (2**28 - 1), note_on(60, n % 2)) for n in range(10)]), "ticks are too many"),
        (midi([(0, note_on(60)), (2**28 - 1, note_off(60))]), "too long"),
        (b"MThd" + bytes(5_000_001), "too many"),
        (None, "NoneType is not MIDI"),
        (7, "int is not MIDI"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(data, words, tmp_path):
    inputs = [data]
    if isinstance(data, bytes):
        inputs.append(tmp_path / "bad.mid")
        inputs[1].write_bytes(data)
    for bad in inputs:
        with pytest.raises(MidiError, match=words) as error:
            load_performance(bad, name="bad.mid")
        message = str(error.value)
        assert message.startswith("bad.mid: ") and "\n" not in message and str(tmp_path) not in message


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mid")  # opening it would block for ever
    for path, words in [
        (tmp_path / "pipe.mid", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "none.mid", "No such file"),
        ("a\0b.mid", "null (byte|character)"),
    ]:
        with pytest.raises(MidiError, match=words):
            load_performance(path)
    with pytest.raises(MidiError, match="extend"):
        load_performance(ONE_NOTE, sustain="yes")


def test_mutated_files_are_read_or_refused():
    rng = random.Random(0)
    seed = midi([(0, tempo(400_000)), (0, note_on(60)), (9, pedal(99)), (90, note_off(60))], [(300, pedal(0))])
    read = 0
    for _ in range(3000):
        data = bytearray(seed)
        for _ in range(rng.choice((1, 2, 8))):
            i = rng.randrange(len(data))
            data[i : i + rng.choice((0, 1, 1, 1, 2))] = bytes(rng.randrange(256) for _ in range(rng.choice((0, 1, 1))))
        try:
            notes = load_performance(bytes(data)).notes
        except MidiError:
            continue
        read += 1
        assert len(notes) and np.isfinite(notes["onset"]).all() and (notes["duration"] > 0).all()
        assert (notes["onset"] >= 0).all() and ((notes["pitch"] >= 21) & (notes["pitch"] <= 108)).all()
    assert 100 < read < 2900


@pytest.mark.parametrize(
    ("note", "what"), [((0, -5, 60, 64), "duration"), ((-9, 5, 60, 64), "time"), ((0, 5, 60, -1), "velocity")]
)
def test_a_score_of_negative_numbers_is_refused(note, what):
    score, track = Score(480), Track()
    track.notes.append(Note(*note))
    score.tracks.append(track)
    with pytest.raises(MidiError, match=f"a note with a negative .*{what}"):
        load_performance(score)
