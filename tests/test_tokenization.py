# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Tokenizer: the published ids, windows on one time axis, held rows, round trips, padding, and the Auto class."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from symusic import ControlChange, Note, Score, Tempo, Track

from tokenization import NOTE_DTYPE, MidiError, MidiValleTokenizer, load_performance

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = FIXTURES / "golden.mid"
TICK = 1 / 192
HOP = 96 / 192  # 0.5 s
BOS, EOS = [1] * 6, [2] * 6


@pytest.fixture(scope="module")
def tokenizer():
    return MidiValleTokenizer(sustain="ignore")


@pytest.fixture(scope="module")
def published():
    return MidiValleTokenizer(sustain="ignore", mark_held=False)


def encode_published(notes, tpq):
    """The published tokenisation, stated in integers: (onset, duration, pitch, velocity) in file ticks -> ids."""
    rows, previous = [BOS], None
    for onset, duration, pitch, velocity in sorted(notes, key=lambda n: (n[0], n[2], n[1])):
        if not 21 <= pitch <= 108:
            continue
        tick = (2 * onset * 96 + tpq) // (2 * tpq)
        length = min(max((2 * duration * 96 + tpq) // (2 * tpq), 1), 1152)
        ioi = 0 if previous is None else min(383, tick - previous)
        previous = tick
        rows.append([pitch - 17, 4 + min(velocity // 2, 63), 3 + length, 388 + ioi, 4 + tick % 384, 4 + tick // 384])
    return rows + [EOS]


def score_of(notes, tpq=96):
    score, track = Score(tpq), Track(name="Piano")
    track.notes.extend([Note(*note) for note in notes])
    score.tracks.append(track)
    return score


def notes_of(*rows):
    """Notes from (onset, duration, pitch, velocity) in grid ticks."""
    return np.array([(on * TICK, length * TICK, pitch, velocity) for on, length, pitch, velocity in rows], NOTE_DTYPE)


@pytest.mark.parametrize("seed", range(60))
def test_ids_equal_the_published_ones(published, seed):
    rng = np.random.default_rng(seed)
    tpq = int(rng.choice([24, 96, 120, 220, 384, 480, 1024, 32767, rng.integers(1, 32768)]))
    count, end = int(rng.integers(1, 200)), int(31.9 * 2 * tpq)
    lengths = rng.integers(0, np.maximum(2, rng.choice([0.05, 1, 8], count) * 2 * tpq))
    notes = np.stack(
        [rng.integers(0, end, count), lengths, rng.integers(15, 115, count), rng.integers(1, 128, count)], 1
    )
    notes[count // 2 :, 0] = notes[: count - count // 2, 0]  # chords
    score = score_of([[60, 1, 60, 60], *notes.tolist()], tpq)
    expected = encode_published([(n.time, n.duration, n.pitch, n.velocity) for n in score.tracks[0].notes], tpq)
    assert published(score)["input_ids"][0].tolist() == expected
    assert [BOS, *published.midi_tokenizer(score)[0].ids, EOS] == expected  # miditok's own path, tested the same


def test_hand_written_ids(published):
    notes = [(0, 1, 21, 1), (0, 2000, 108, 127), (96, 96, 60, 64), (96 + 500, 1152, 60, 63), (15 * 384 + 383, 1, 60, 2)]
    assert published(score_of(notes))["input_ids"][0].tolist() == [
        BOS,
        [4, 4, 4, 388, 4, 4],
        [91, 67, 1155, 388, 4, 4],
        [43, 36, 99, 388 + 96, 100, 4],
        [43, 35, 1155, 388 + 383, 4 + 212, 5],
        [43, 5, 4, 388 + 383, 4 + 383, 19],
        EOS,
    ]


def test_rounding_is_half_up_for_onset_and_duration_alike(tokenizer):
    ids = tokenizer(score_of([(1, 1, 60, 64), (2, 3, 61, 64), (3, 5, 62, 64)], tpq=192))["input_ids"][0, 1:-1]
    assert ids[:, 4].tolist() == [5, 5, 6] and ids[:, 2].tolist() == [4, 5, 6]


@pytest.mark.parametrize("sustain", ["extend", "ignore"])
def test_golden_file(sustain):
    """Two tracks, tempo changes, pedal, a chord of several resolutions, a drum and a note off the piano."""
    golden = json.loads((FIXTURES / "golden_ids.json").read_text())
    assert MidiValleTokenizer(sustain=sustain)(GOLDEN)["input_ids"][0].tolist() == golden[sustain]


def test_tempo_and_pedal_reach_the_ids():
    score = score_of([(0, 48, 60, 64), (960, 48, 62, 64)])
    score.tempos.append(Tempo(0, 60.0))  # 96 ticks are a second now
    score.tracks[0].controls.extend([ControlChange(0, 64, 127), ControlChange(192, 64, 0)])
    for sustain, length in (("ignore", 96), ("extend", 384)):
        ids = MidiValleTokenizer(sustain=sustain)(score)["input_ids"][0]
        assert ids[1].tolist() == [43, 36, 3 + length, 388, 4, 4] and ids[2].tolist() == [45, 36, 99, 771, 4, 9]


def test_held_rows_by_hand(tokenizer):
    ended = (50, 46, 52, 80)  # at the edge itself: not held
    notes = notes_of((10, 500, 50, 80), ended, (95, 2, 55, 80), (96, 10, 60, 80), (100, 500, 64, 80), (192, 9, 65, 80))
    ids, report = tokenizer.encode_notes([(notes, HOP, 2 * HOP)], return_report=True)
    assert ids.tolist() == [
        BOS,
        [33, 44, 3 + 96, 388 - 86, 4, 4],  # 86 ticks old, clipped at the right edge
        [38, 44, 3 + 1, 388 - 1, 4, 4],
        [43, 44, 3 + 10, 388, 4, 4],  # first struck note: IOI 0, held rows do not count
        [47, 44, 3 + 92, 388 + 4, 8, 4],
        EOS,
    ]
    assert report == {"struck": 2, "held": 2, "held_left_out": 0, "clipped_durations": 0}
    plain, report = tokenizer.encode_notes([(notes, HOP, 2 * HOP)], False, mark_held=False, return_report=True)
    assert plain.tolist() == ids[3:5].tolist() and report["held_left_out"] == 2
    unmarked = MidiValleTokenizer(mark_held=False).encode_notes([(notes, HOP, 2 * HOP)], False)
    assert unmarked.tolist() == plain.tolist()


def test_an_old_held_note_keeps_the_oldest_id_and_its_true_remainder(tokenizer):
    notes = notes_of((0, 3000, 60, 64))
    ids, report = tokenizer.encode_notes([(notes, 8 * HOP, math.inf)], False, return_report=True)
    assert ids.tolist() == [[43, 36, 3 + 1152, 4, 4, 4], [43, 36, 3 + 3000 - 8 * 96 - 1152, 4, 4, 4 + 3]]
    assert report == {"struck": 0, "held": 2, "held_left_out": 0, "clipped_durations": 0}
    assert tokenizer.encode_notes([(notes, 24 * HOP, math.inf)], False)[0, 2] == 3 + 3000 - 24 * 96


def test_a_tone_of_more_than_6_s_goes_on_in_held_rows(tokenizer, published):
    notes = notes_of((10, 2400, 60, 64), (11, 2000, 50, 64), (300, 5, 61, 64), (1162, 9, 62, 64), (1163, 9, 50, 64))
    ids, report = tokenizer.encode_notes([(notes, 0.0, math.inf)], False, return_report=True)
    assert ids[:, [0, 2, 3, 4, 5]].tolist() == [
        [43, 3 + 1152, 388, 4 + 10, 4],
        [33, 3 + 1152, 388 + 1, 4 + 11, 4],
        [44, 3 + 5, 388 + 289, 4 + 300, 4],
        [43, 3 + 1152, 4, 4 + 10, 4 + 3],  # held rows come before what is struck at their tick
        [45, 3 + 9, 388 + 383, 4 + 10, 4 + 3],
        [33, 3 + 9, 388 + 1, 4 + 11, 4 + 3],  # struck again just where the old tone would go on
        [43, 3 + 96, 4, 4 + 10, 4 + 6],
    ]
    assert report == {"struck": 5, "held": 2, "held_left_out": 0, "clipped_durations": 0}
    _, report = published.encode_notes([(notes, 0.0, math.inf)], return_report=True)
    assert report["clipped_durations"] == 2 and report["held"] == 0
    late = notes_of((0, 384 * 99, 60, 64), (21 * 192, 384 * 99, 61, 64))  # what is beyond the axis is left out
    ids, report = tokenizer.encode_notes([(late, 0.0, math.inf)], False, return_report=True)
    assert ids[ids[:, 0] == 43][:, 5].tolist() == [4, 7, 10, 13, 16, 19]
    assert report["clipped_durations"] == 2 and ids[-2:, 2].tolist() == [3 + 5 * 192, 3 + 2 * 192]
    assert (tokenizer.decode_rows(ids)["onset"] + tokenizer.decode_rows(ids)["duration"] == 32).all()


def test_a_tone_of_the_prompt_does_not_go_on_in_the_target(tokenizer):
    """The prompt ends with a row of 6 s where a note of that key is held: a tick less tells them apart."""
    prompt, target = notes_of((0, 2000, 60, 30)), notes_of((0, 1500, 60, 90), (1600, 9, 62, 90))
    for end in (6.0, 9.5):
        ids = tokenizer.encode_notes([(prompt, end - 6, end), (target, 4.0, 15.0)], False)
        assert ids[:2].tolist() == [[43, 19, 3 + 1151, *ids[0, 3:]], [43, 49, 3 + 732, 4, 4, 4 + 3]]
        assert tokenizer.decode_rows(ids)["velocity"].tolist() == [31, 91, 91]


def test_of_notes_of_one_key_at_one_tick_the_longest_goes_on(tokenizer):
    """As two voices may have it; and of two that are held at a left edge the one that was struck last."""
    notes = notes_of((0, 1300, 60, 64), (0, 2700, 60, 64), (10, 2700, 61, 64), (10, 2700, 61, 64))
    ids = tokenizer.encode_notes([(notes, 0.0, math.inf)], False)
    back = tokenizer.decode_rows(ids)
    assert (back["onset"] < 0.06).all() and [round(d * 192) for d in back["duration"]] == [1152, 2700, 1152, 2700]
    held = notes_of((0, 9000, 60, 64), (90, 2000, 60, 90))
    back = tokenizer.decode_rows(tokenizer.encode_notes([(held, HOP, 20.0)], False))
    assert [round(d * 192) for d in back["duration"]] == [1152, 2090 - 96]


def test_prompt_and_target_share_one_time_axis(tokenizer):
    prompt = notes_of((96, 400, 40, 64), (150, 1, 41, 64))
    target = notes_of((5, 200, 70, 64), (96, 9, 71, 64))
    ids = tokenizer.encode_notes([(prompt, HOP, 2 * HOP), (target, HOP, 1.27)], add_special_tokens=False)
    assert ids[:, [0, 2, 3, 4, 5]].tolist() == [
        [23, 3 + 96, 388, 4, 4],  # ends with the prompt
        [24, 3 + 1, 388 + 54, 4 + 54, 4],
        [53, 3 + 109, 388 - 91, 4 + 96, 4],  # held over the left edge of the target
        [54, 3 + 9, 388 + 42, 4 + 96, 4],  # 42 ticks after the prompt's last strike
    ]


def test_windows_hold_every_note_once_at_its_time(tokenizer):
    rng = np.random.default_rng(1)
    notes = np.zeros(400, NOTE_DTYPE)
    notes["onset"], notes["duration"] = np.sort(rng.uniform(0, 39, 400)), rng.uniform(1e-3, 5.9, 400)
    notes["pitch"], notes["velocity"] = rng.integers(21, 109, 400), rng.integers(1, 128, 400)
    edges = [0.0, 14.5, 20.0, 36.5, float((notes["onset"] + notes["duration"]).max())]
    sounding = np.zeros((108 + 1, 60 * 192), int)
    strikes = []
    for start, end in zip(edges, edges[1:], strict=False):
        ids = tokenizer.encode_notes([(notes, start, end)], add_special_tokens=False)
        held = ids[:, 3] < 388
        window = tokenizer.decode_rows(ids)
        ticks = np.round((window["onset"] + start) * 192).astype(int)
        for tick, note in zip(ticks, window, strict=True):
            sounding[note["pitch"], tick : tick + round(note["duration"] * 192)] = 1
        strikes += [(row[5] * 384 + row[4] - 4 * 385 + round(start * 192), row[0] + 17) for row in ids[~held]]
    onset = np.floor(notes["onset"] * 192 + 0.5).astype(int)
    length = np.maximum(np.floor(notes["duration"] * 192 + 0.5).astype(int), 1)
    assert strikes == list(zip(onset, notes["pitch"], strict=True))
    expected = np.zeros_like(sounding)
    for pitch, tick, duration in zip(notes["pitch"], onset, length, strict=True):
        expected[pitch, tick : tick + duration] = 1
    late = math.ceil(edges[-1] * 192)  # the last window ends with the last note, up to its rounding
    assert np.array_equal(sounding[:, :late], expected[:, :late])


@pytest.mark.parametrize("seed", range(5))
def test_long_notes_come_back(tokenizer, seed):
    """Tones of up to 20 s, some of which end with the next strike of their key, as by the pedal."""
    rng = np.random.default_rng(seed)
    onset = np.sort(rng.choice(30 * 192, 60, replace=False))
    pitch = rng.integers(60, 72, 60)
    ends = onset + rng.integers(1, 20 * 192, 60)
    following = [min([*onset[(pitch == pitch[i]) & (onset > onset[i])], 32 * 192]) for i in range(60)]
    duration = np.minimum(ends, following) - onset
    notes = notes_of(*zip(onset, duration, pitch, rng.integers(0, 64, 60) * 2 + 1, strict=True))
    assert (duration > 1152).sum() > 5
    ids = tokenizer.encode_notes([(notes, 0.0, math.inf)])
    back, score = tokenizer.decode_rows(ids), tokenizer.ids_to_score(ids)
    written = load_performance(score, "ignore").notes
    for field in NOTE_DTYPE.names:
        assert np.allclose(back[field], notes[field], atol=1e-9), field
        assert np.allclose(written[field], notes[field], atol=1e-9), field


def test_a_note_that_rounds_onto_the_end_stays_in_its_window(tokenizer):
    notes = np.array([(0.998, 0.002, 60, 64)], NOTE_DTYPE)  # tick 191.6, ends at 1.0 s
    prompt_and_target = [(notes, 0.0, 1.0), (notes_of((0, 5, 70, 64)), 0.0, math.inf)]
    ids = tokenizer.encode_notes(prompt_and_target, add_special_tokens=False)
    assert ids[:, 4].tolist() == [4 + 191, 4 + 192] and ids[:, 2].tolist() == [4, 8]


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([(0.25, 1.0)], "multiples of 0.5"),
        ([(0.0, 0.7), (0.0, 1.0)], "multiples of 0.5"),
        ([(0.0, math.inf), (0.0, 1.0)], "multiples of 0.5"),
        ([(1.0, 1.0)], "multiples of 0.5"),
        ([(-0.5, 1.0)], "multiples of 0.5"),
        ([(math.nan, 1.0)], "multiples of 0.5"),
        ([(math.inf, math.inf)], "multiples of 0.5"),
        ([(0.0, 16.0), (0.0, 16.5)], r"begins at 32\.. s, one sequence holds 32 s.*windows"),
    ],
)
def test_bad_windows_are_refused(tokenizer, segments, words):
    notes = notes_of(*((tick, 20, 60, 64) for tick in range(0, 20 * 192, 43)))
    with pytest.raises(MidiError, match=words):
        tokenizer.encode_notes([(notes, *edges) for edges in segments])


def test_bad_notes_and_ids_are_refused(tokenizer):
    for notes in (notes_of((0, 1, 20, 64)), notes_of((0, 1, 60, -3)), notes_of((9, 1, 60, 64), (0, 1, 60, 64))):
        with pytest.raises(MidiError, match="notes are unsorted"):
            tokenizer.encode_notes([(notes, 0.0, math.inf)])
    for ids in ([[4, 4, 4, 388, 4]], [4] * 6, [[[4] * 6]]):
        with pytest.raises(MidiError, match="shape"):
            tokenizer.decode_rows(ids)
    for ids in ([[92, 4, 4, 388, 4, 4]], [[43, 4, 4, 388, 4, 20]], [[1, 4, 4, 388, 4, 4]], [[-1] * 6]):
        with pytest.raises(MidiError, match="outside"):
            tokenizer.ids_to_score(ids)
    with pytest.raises(MidiError, match="MIDI: a note begins at 32.0 s"):
        tokenizer(score_of([(32 * 192, 9, 60, 64)]))
    with pytest.raises(MidiError, match="empty list"):
        tokenizer([])
    with pytest.raises(ValueError, match="sustain"):
        MidiValleTokenizer(sustain="maybe")


def test_a_window_without_notes_is_a_sequence(tokenizer):
    assert tokenizer.encode_notes([(notes_of((0, 5, 60, 64)), 1.0, 2.0)]).tolist() == [BOS, EOS]
    assert tokenizer.encode_notes([(notes_of(), 0.0, 2.0)]).tolist() == [BOS, EOS]
    assert len(tokenizer.decode_rows([BOS, EOS])) == 0


def test_left_out_notes_are_logged(tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr("tokenization.tokenization_midivalle.logger.warning", said.append)
    tokenizer([score_of([(0, 5, 60, 64)]), score_of([(0, 5, 60, 64), (0, 5, 110, 64)])])
    assert said == ["MIDI: left out notes: 1 outside the piano's keys 21 to 108"]


def test_ids_to_midi_and_back(tokenizer):
    ids = tokenizer(GOLDEN)["input_ids"][0]
    score, decoded = tokenizer.ids_to_score(ids), tokenizer.decode_rows(ids)
    again = tokenizer(score.dumps_midi())["input_ids"][0]
    assert np.array_equal(tokenizer.decode_rows(again), decoded)
    assert np.array_equal(np.sort(again[:, [0, 1, 2, 4, 5]], 0), np.sort(ids[:, [0, 1, 2, 4, 5]], 0))
    written = load_performance(score, "ignore").notes
    assert len(decoded) == len(ids) - 2
    for field in NOTE_DTYPE.names:
        assert np.allclose(written[field], decoded[field], atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(tokenizer, side):
    short, long = score_of([(0, 5, 60, 64)]), score_of([(0, 5, 60, 64), (9, 5, 61, 64)])
    batch = tokenizer([short, long], padding_side=side, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 4, 6) and batch["attention_mask"].shape == (2, 4)
    mask = [[0, 1, 1, 1], [1, 1, 1, 1]] if side == "left" else [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == mask
    kept = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert kept.tolist() == tokenizer(short)["input_ids"][0].tolist()
    assert not batch["input_ids"][0][~batch["attention_mask"][0].bool()].any()


def test_pad_as_a_collator(tokenizer):
    short, long = score_of([(0, 5, 60, 64)]), score_of([(0, 5, 60, 64), (9, 5, 61, 64)])
    ragged = tokenizer([short, long], padding=False, return_tensors=None)
    assert [rows.shape for rows in ragged["input_ids"]] == [(3, 6), (4, 6)]
    items = [{"input_ids": rows, "id": i} for i, rows in enumerate(ragged["input_ids"])]
    batch = tokenizer.pad(items, pad_to_multiple_of=8, return_tensors="pt")
    assert (
        batch["input_ids"].shape == (2, 8, 6) and batch["attention_mask"].sum() == 7 and batch["id"].tolist() == [0, 1]
    )
    assert tokenizer.pad(items, padding="max_length", max_length=5)["input_ids"].shape == (2, 5, 6)
    assert tokenizer.pad(items, padding="max_length", max_length=2)["input_ids"].shape == (2, 4, 6)  # never truncated
    single = tokenizer.pad({"input_ids": ragged["input_ids"][0].tolist(), "attention_mask": [1, 1, 0]})
    assert single["input_ids"].shape == (1, 3, 6) and single["attention_mask"].tolist() == [[1, 1, 0]]


def test_flat_vocabulary_for_transformers(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert tokenizer.vocab_sizes == (92, 68, 1156, 772, 388, 20)
    assert len(vocabulary) == len(tokenizer) == tokenizer.vocab_size == sum(tokenizer.vocab_sizes)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert tokenizer.convert_tokens_to_ids(list(vocabulary)) == list(vocabulary.values())
    assert tokenizer.convert_ids_to_tokens(list(vocabulary.values())) == list(vocabulary)
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
    assert special == [0, 1, 2, 3]
    for token, index in vocabulary.items():
        assert tokenizer.encode(token) == [index] and tokenizer.decode([index]) == token
    text = "Pitch_60 Velocity_63 Duration_0.1.96 IOI_-3 Position_0 Bar_15"
    flat = tokenizer.encode(text)
    offsets = np.cumsum([0, *tokenizer.vocab_sizes[:-1]])
    assert (flat - offsets).tolist() == [43, 35, 4, 385, 4, 19] and tokenizer.decode(flat) == text
    assert tokenizer.pad({"input_ids": [flat, flat[:2]]})["input_ids"][1] == flat[:2] + [0] * 4


def test_rows_are_not_decoded_as_texts(tokenizer):
    """Nor taken for flat ids; texts of six words are still decoded side by side."""
    rows = tokenizer(score_of([(0, 10, 60, 64), (9, 10, 62, 64)]))["input_ids"]
    for wrong in (rows, rows[0], rows.tolist(), list(rows), rows[0].tolist(), rows[0, 1:-1]):
        for decode in (tokenizer.decode, tokenizer.batch_decode):
            with pytest.raises(MidiError, match="give each sequence to decode_rows"):
                decode(wrong)
    texts = [
        "Pitch_60 Velocity_63 Duration_0.1.96 IOI_0 Position_0 Bar_0",
        "Pitch_60 Pitch_61 Pitch_62 Pitch_63 Bar_0 Bar_1",
    ]
    flat = tokenizer(texts)["input_ids"]
    assert tokenizer.decode(flat) == tokenizer.batch_decode(np.array(flat)) == texts


def test_texts_and_paths_are_told_apart(tokenizer, tmp_path, monkeypatch):
    """A `str` with a MIDI ending, or of something that exists, is a path; the rest is text, in flat ids as lists."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenization.tokenization_midivalle.logger.warning_once", (said := []).append)
    (tmp_path / "piece").write_bytes(GOLDEN.read_bytes())
    rows = tokenizer(GOLDEN)["input_ids"]
    assert np.array_equal(tokenizer("piece")["input_ids"], rows)
    assert np.array_equal(tokenizer(["piece", str(GOLDEN)])["input_ids"], np.concatenate([rows, rows]))
    with pytest.raises(MidiError, match="missing.MID: cannot be read"):
        tokenizer("missing.MID")
    text = "Pitch_60 Velocity_63 Duration_0.1.96 IOI_-3 Position_0 Bar_15"
    flat = tokenizer.encode(text)
    assert tokenizer(text)["input_ids"] == tokenizer(text=text)["input_ids"] == flat and not said
    assert tokenizer([text, "Bar_15"], padding=True)["attention_mask"] == [[1] * 6, [1] + [0] * 5]
    six = tokenizer([text, text], padding=True, return_tensors="pt")["input_ids"]  # six long, and yet not rows
    assert six.tolist() == [flat, flat]
    assert tokenizer("Pitch_60 forte")["input_ids"] == [flat[0], tokenizer.mask_token_id]
    assert said == ["words that are no MIDI tokens: 1 of 2, 'forte' first; a MIDI file's name ends in .mid"]
    for midi in (str(GOLDEN), GOLDEN, GOLDEN.read_bytes()):
        with pytest.raises(MidiError, match=r"for MIDI call the tokenizer itself, tokenizer\(midi\)"):
            tokenizer.encode(midi)
    for arguments in ({"text": text}, {"text_pair": text}, {"truncation": True}):
        with pytest.raises(MidiError, match=f"{[*arguments][0]}: for texts of tokens only"):
            tokenizer(GOLDEN, **arguments)


def test_saving_keeps_the_options(tmp_path):
    tokenizer = MidiValleTokenizer(sustain="ignore", mark_held=False, padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    for copy in (MidiValleTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (copy.sustain, copy.mark_held, copy.padding_side) == ("ignore", False, "left")
        assert copy.get_vocab() == tokenizer.get_vocab()
        assert np.array_equal(copy(GOLDEN)["input_ids"], tokenizer(GOLDEN)["input_ids"])
    changed = MidiValleTokenizer.from_pretrained(tmp_path, sustain="extend")
    changed.save_pretrained(tmp_path)
    assert MidiValleTokenizer.from_pretrained(tmp_path).sustain == "extend"


def test_a_foreign_vocabulary_is_refused(tmp_path):
    MidiValleTokenizer().save_pretrained(tmp_path)
    path = tmp_path / "midi_tokenizer.json"
    path.write_text(path.read_text().replace('"max_bar_embedding": 16', '"max_bar_embedding": 17'))
    with pytest.raises(ValueError, match="vocabularies"):
        MidiValleTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_another_file_in_place_of_the_vocabulary(tmp_path, text):
    """Damaged, or the JSON of another library."""
    MidiValleTokenizer().save_pretrained(tmp_path)
    (tmp_path / "midi_tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="midi_tokenizer.json: is not a MIDI-VALLE tokenizer"):
        MidiValleTokenizer.from_pretrained(tmp_path)


def test_auto_tokenizer_in_a_process_without_this_repository(tmp_path):
    MidiValleTokenizer(sustain="ignore").save_pretrained(tmp_path / "model")
    (tmp_path / "a.mid").write_bytes(GOLDEN.read_bytes())
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained('model', trust_remote_code=True)\n"
        "assert type(tokenizer).__module__.startswith('transformers_modules'), type(tokenizer)\n"
        "assert 'tokenization' not in sys.modules\n"
        "print(tokenizer('a.mid')['input_ids'][0].tolist())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((FIXTURES / "golden_ids.json").read_text())["ignore"]
