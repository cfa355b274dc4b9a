# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The keys' state at each frame: written out by hand, against a plain loop, and the same for one frame as for many."""

import math

import pytest
import torch

from modeling_midivalle.modeling_midivalle_frame_notes import FrameNotes, held_keys, read_notes, struck_keys

DECAYS = [0.5, 4.0]


def features(rows, first, width):
    """`(width, 6, 88)`: strike, place, sounding, two ages, release."""
    module = FrameNotes(88, 4, [0], DECAYS)
    notes = read_notes(rows[None], torch.ones(1, len(rows)))
    strikes, tones = module.key_states(notes, torch.tensor([[first]]), width)
    return torch.cat([strikes, tones], -1)[0].view(width, 6, 88)


def loop_features(rows, first, width):
    """The definition, note by note, frame by frame, in seconds."""
    out = torch.zeros(width, 6, 88)
    for w in range(width):
        start, end = (first + w) / 50, (first + w + 1) / 50
        state = {}
        for pitch, velocity, duration, ioi, position, bar in rows.tolist():
            onset = ((bar - 4) * 384 + position - 4) / 192
            if pitch >= 4 and onset < end - 1e-9:
                age = max(388 - ioi, 0) / 192
                state[pitch - 4] = (onset - age, onset + (duration - 3) / 192, (2 * (velocity - 4) + 1) / 127)
        for key, (strike, release, velocity) in state.items():
            late = (strike - start) * 50
            sounding = min(max((release - start) * 50, 0), 1)
            out[w, 0, key] = velocity * max(0, 1 - abs(late))
            out[w, 1, key] = max(late, 0) if late > -1e-9 else 0
            out[w, 2, key] = velocity * sounding
            for place, decay in enumerate(DECAYS, 3):
                out[w, place, key] = math.exp(min(strike - start, 0) / decay) if sounding > 1e-6 else 0
            out[w, 5, key] = math.exp(-(end - release) / 0.1) if end > release + 1e-9 else 0
    return out


def test_by_hand():
    # key 60 (row 39): struck at tick 12 = 0.0625 s = frame 3 + 1/8, full velocity, for 12 ticks = 3.125 frames
    rows = torch.tensor([[39 + 4, 67, 3 + 12, 388, 4 + 12, 4]])
    got = features(rows, 0, 12)[:, :, 39]
    assert got[2].tolist() == [0, 0, 0, 0, 0, 0]  # not yet
    torch.testing.assert_close(got[3], torch.tensor([7 / 8, 1 / 8, 1, 1, 1, 0]))
    ages = [math.exp(-(7 / 8) * 0.02 / decay) for decay in DECAYS]
    torch.testing.assert_close(got[4], torch.tensor([1 / 8, 0, 1, *ages, 0]))
    torch.testing.assert_close(got[6, [0, 2]], torch.tensor([0, 0.25]))  # it ends a quarter into frame 6
    torch.testing.assert_close(got[6, 5], torch.tensor(math.exp(-0.75 * 0.02 / 0.1)))


def test_a_row_that_continues_another_makes_it_longer():
    """All features are those of one note; but not of another key, after a gap, or if it says it is younger."""
    first, note = [39 + 4, 67, 3 + 1152, 388, 4 + 12, 4], [50, 20, 3 + 9, 388 + 80, 4 + 92, 5]
    rest = [[39 + 4, 67, 3 + 1152, 4, 4 + 12, 7], [39 + 4, 67, 3 + 100, 4, 4 + 12, 10]]
    rows = torch.tensor([[1] * 6, first, note, *rest, [2] * 6])[None]
    notes = read_notes(rows, torch.ones(1, 6))
    assert notes.valid.tolist() == [[False, True, True, False, False, False]]
    end = (12 + 2 * 1152 + 100) * 25
    assert notes.end[0, 1] == end and notes.strike[0, 1] == 12 * 25
    whole = read_notes(rows[:, :3], torch.ones(1, 3))
    whole.end[0, 1] = end
    module = FrameNotes(88, 4, [0, 1], DECAYS)
    given = torch.tensor([[0]]), 750
    for found, expected in zip(module.key_states(notes, *given), module.key_states(whole, *given), strict=True):
        assert torch.equal(found, expected)
    held = held_keys(rows, torch.ones(1, 6), torch.tensor([0]), 750)[0, :, 39]
    assert held.nonzero()[:, 0].tolist() == list(range(3, end // 96))
    for place, value in ((0, 39 + 5), (4, 4 + 13), (3, 5)):
        other = torch.tensor([first, rest[0]])[None]
        other[0, 1, place] = value
        assert read_notes(other, torch.ones(1, 2)).valid.all()
    assert all(len(column) == 0 for column in read_notes(rows[:0], torch.ones(0, 6)))
    assert read_notes(rows, torch.tensor([[1, 0, 1, 1, 1, 1]])).end[0, 3] == end  # what is left continues itself


@pytest.mark.parametrize("seconds", [13, 30, 32])
def test_a_note_may_be_as_long_as_a_sequence(seconds):
    rows = [[50, 40, 3 + 1152, 388 if time == 0 else 4, 4, 4 + time // 2] for time in range(0, seconds, 6)]
    rows[-1][2] = 3 + 192 * ((seconds - 1) % 6 + 1)
    notes = read_notes(torch.tensor([rows]), torch.ones(1, len(rows)))
    assert notes.end[notes.valid].tolist() == [seconds * 4800]


def test_held_note_sounds_but_is_not_struck():
    rows = torch.tensor([[39 + 4, 67, 3 + 96, 388 - 96, 4, 4]])  # at frame 0 it is 0.5 s old
    got = features(rows, 0, 3)[:, :, 39]
    torch.testing.assert_close(got[0], torch.tensor([0, 0, 1, math.exp(-1), math.exp(-1 / 8), 0]))


def test_struck_keys():
    """By frame and key the velocity, of two strikes the harder; held, padded and special rows, and other frames, strike
    nothing."""
    rows = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1],
            [4 + 39, 4 + 31, 100, 388 - 50, 4, 4],  # held: struck before
            [4 + 39, 4 + 31, 100, 388, 4 + 10, 4],  # at 10 / 192 s, in frame 2
            [4 + 51, 4 + 63, 100, 388, 4 + 10, 4],
            [4 + 39, 4 + 20, 100, 388, 4 + 11, 4],  # again, in the same frame
            [4 + 0, 4 + 10, 100, 388, 4 + 383, 5],  # at 767 / 192 s, in frame 199
            [4 + 87, 4 + 20, 100, 388, 4, 6],  # in frame 200
            [2, 2, 2, 2, 2, 2],
        ]
    )
    mask = torch.ones(2, len(rows))
    mask[1, 3] = 0
    struck = struck_keys(rows.expand(2, -1, -1), mask, torch.tensor([0, 2]), 200)
    assert struck.shape == (2, 200, 88)
    expected = torch.zeros(2, 200, 88)
    expected[0, 2, 39], expected[0, 2, 51], expected[0, 199, 0] = 63 / 127, 127 / 127, 21 / 127
    expected[1, 0, 39], expected[1, 197, 0], expected[1, 198, 87] = 63 / 127, 21 / 127, 41 / 127
    assert torch.equal(struck, expected)
    assert struck_keys(rows[None], mask[:1], torch.tensor([0]), 0).shape == (1, 0, 88)


def test_held_keys():
    """From the frame of a row's onset, struck there or before, to that of its end; two rows of a key are one."""
    rows = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1],
            [4 + 39, 4 + 31, 3 + 96, 388 - 50, 4, 4],  # held: struck before; ends in frame 25
            [4 + 39, 4 + 31, 3 + 192, 388, 4 + 48, 4],  # 0.25 to 1.25 s: frames 12 to 62
            [4 + 51, 4 + 63, 3 + 960, 388, 4 + 96, 4],  # from frame 25 on
        ]
    )
    mask = torch.ones(2, len(rows))
    mask[1, 1] = 0
    held = held_keys(rows.expand(2, -1, -1), mask, torch.tensor([0, 5]), 70)
    expected = torch.zeros(2, 70, 88, dtype=torch.bool)
    expected[0, :62, 39] = expected[0, 25:, 51] = expected[1, 7:57, 39] = expected[1, 20:, 51] = True
    assert torch.equal(held, expected)
    assert held_keys(rows[None], mask[:1], torch.tensor([0]), 0).shape == (1, 0, 88)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_plain_loop(make_rows, seed):
    rows = make_rows(seed, notes=60, seconds=1.5, held=4)
    rows[1:-1, 0] = 4 + rows[1:-1, 0] % 7  # few keys: many re-strikes
    torch.testing.assert_close(features(rows, -1, 60), loop_features(rows, -1, 60), atol=1e-5, rtol=0)


def test_frames_one_by_one_equal_all_at_once(make_rows):
    module = FrameNotes(88, 6, [-1, 0, 1, 2], DECAYS)
    rows = torch.stack([make_rows(1, notes=40, seconds=1.0, held=2), make_rows(2, notes=40, seconds=1.0, held=2)])
    notes = read_notes(rows, torch.ones(rows.shape[:2]))
    frames = torch.stack([torch.arange(50), torch.arange(50).clamp(min=3) - 3])  # a left-padded row: 0, 0, 0, 0, 1, ..
    full = module(notes, frames)
    steps = [module(notes, frames[:, t : t + 1]) for t in range(50)]
    torch.testing.assert_close(torch.cat(steps, 1), full)


def test_padded_rows_and_special_rows_are_silent(make_rows):
    rows = make_rows(3, notes=5, seconds=0.5)
    padded = torch.cat([torch.zeros(2, 6, dtype=torch.long), rows])
    mask = torch.tensor([[0] * 2 + [1] * len(rows)])
    module = FrameNotes(88, 4, [0, 1], DECAYS)
    frames = torch.arange(25)[None]
    expected = module(read_notes(rows[None, 1:-1], torch.ones(1, 5)), frames)
    torch.testing.assert_close(module(read_notes(padded[None], mask), frames), expected)
    assert not module(read_notes(rows[None], torch.zeros(1, 7)), frames).any()
