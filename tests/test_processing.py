# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""One time axis for prompt and target; windows lose no note and repeat none; wrong inputs get one sentence."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from symusic import ControlChange, Note, Score, Tempo, Track
from transformers import AutoProcessor, EncodecFeatureExtractor

from processing import AudioError, MidiValleProcessor, ProcessorError, plan_windows, write_audio
from processing.prompts_midivalle import check_level, choose_excerpt, expected_level
from scripts.audio.pianos import performance_level
from tokenization import NOTE_DTYPE, MidiError, MidiValleTokenizer, Performance
from tokenization.midi_midivalle import to_ticks

RATE = 32_000
WINDOW_KEYS = {"input_ids", "attention_mask", "target_frames", "context_frames", "window_counts", "prompt_lengths"}
WINDOW_KEYS |= {"mean_velocities"}


@pytest.fixture
def processor():
    return MidiValleProcessor(EncodecFeatureExtractor(feature_size=1, sampling_rate=RATE), MidiValleTokenizer())


def midi(*notes, pedal=()):
    """Bytes of a MIDI file at 480 ticks a second: notes (onset s, duration s, pitch), pedal (s, value)."""
    score, track = Score(480), Track()
    score.tempos.append(Tempo(0, 60))
    for onset, duration, pitch in notes:
        track.notes.append(Note(round(onset * 480), round(duration * 480), pitch, 80))
    for time, value in pedal:
        track.controls.append(ControlChange(round(time * 480), 64, value))
    score.tracks.append(track)
    return score.dumps_midi()


def performance(*notes, name="piece.mid"):
    """Loaded notes (onset s, duration s, pitch)."""
    array = np.array([(onset, duration, pitch, 80) for onset, duration, pitch in notes], NOTE_DTYPE)
    return Performance(np.sort(array, order=("onset", "pitch", "duration")), name, {})


def noise(seconds, rate=RATE, level=0.1):
    return (level * np.random.default_rng(0).standard_normal(round(seconds * rate))).astype(np.float32)


def random_performance(seed, seconds, density):
    """About `density` notes a second, some of them long, on a time scale of its own (never on the tick grid)."""
    rng = np.random.default_rng(seed)
    count = max(1, round(seconds * density))
    onsets = np.sort(rng.uniform(0, seconds, count)) * rng.uniform(0.99, 1)
    durations = np.minimum(rng.exponential(1.5, count), 12.0) + 0.005
    return performance(*zip(onsets, durations, rng.integers(21, 109, count), strict=True))


def onset_ticks(rows):
    return (rows[:, 5] - 4) * 384 + rows[:, 4] - 4


# --- one window


def test_target_begins_where_the_prompts_audio_ends(processor):
    """By hand: 2.3 s of prompt audio are trimmed to 2 s = bar 1; the prompt's note is clipped there."""
    inputs = processor(
        midi=midi((0.25, 0.75, 60)), prompt_midi=midi((1.0, 3.0, 48), (2.1, 1.0, 50)), prompt_audio=noise(2.3),
        sampling_rate=RATE,
    )  # fmt: skip
    assert inputs["input_ids"].tolist() == [
        [
            [1] * 6,
            [
                48 - 21 + 4,
                44,
                192 - 1 + 4,
                388,
                192 + 4,
                0 + 4,
            ],  # to the end of the prompt; the note at 2.1 s is not heard
            [60 - 21 + 4, 44, 144 - 1 + 4, 388 + 240, 48 + 4, 1 + 4],
            [2] * 6,
        ]
    ]
    assert inputs["input_values"].shape == (1, 1, 64_000) and inputs["padding_mask"].sum() == 64_000
    assert inputs["prompt_lengths"].tolist() == [100] and inputs["target_frames"].tolist() == [50]
    assert set(inputs) == WINDOW_KEYS | {"input_values", "padding_mask"}
    floats = {key for key, value in inputs.items() if value.dtype != torch.int64}
    assert floats <= {"input_values", "padding_mask", "mean_velocities"}
    assert torch.equal(inputs["input_values"][0, 0], torch.from_numpy(noise(2.3)[:64_000]))


def test_without_prompt(processor):
    inputs = processor(midi=midi((0.5, 1.0, 60)), return_tensors="np")
    assert set(inputs) == WINDOW_KEYS
    assert inputs["prompt_lengths"].tolist() == [0] and inputs["target_frames"].tolist() == [50, 25]
    assert inputs["context_frames"].tolist() == [0, 50] and inputs["window_counts"].tolist() == [2]
    assert [onset_ticks(rows[1:-1]).tolist() for rows in inputs["input_ids"]] == [[96], [96]]


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("form", ["mono", "samples first", "channels first", "int16", "tensor", "wav", "flac bytes"])
def test_any_rate_and_form_of_audio(processor, rate, form, tmp_path):
    wave = 0.3 * np.sin(2 * np.pi * 220 * np.arange(3 * rate) / rate)
    audio, sampling_rate = wave, rate
    if form == "samples first":
        audio = np.stack([wave, wave], 1)
    elif form == "channels first":
        audio = np.stack([wave, wave])
    elif form == "int16":
        audio = (wave * 32767).astype(np.int16)
    elif form == "tensor":
        audio = torch.from_numpy(wave)
    elif form in ("wav", "flac bytes"):
        audio, sampling_rate = tmp_path / ("p.wav" if form == "wav" else "p.flac"), None
        write_audio(audio, wave, rate)
        audio = audio.read_bytes() if "bytes" in form else str(audio)
    prompt = processor.prepare_prompt(midi((0, 1, 60)), audio, sampling_rate)
    assert prompt.wave.shape == (96_000,) and prompt.frames == 150 and prompt.wave.dtype == np.float32
    expected = 0.3 * np.sin(2 * np.pi * 220 * np.arange(96_000) / RATE)
    assert np.abs(prompt.wave - expected)[500:-500].max() < 2e-3  # the level is kept


@pytest.mark.parametrize(
    ("seconds", "kept"), [(1.0, 1.0), (1.49, 1.0), (2.9995, 3.0), (6.0, 6.0), (7.99, 7.5), (25.0, 8.0)]
)
def test_prompts_are_trimmed_to_the_grid(processor, seconds, kept):
    """Half a millisecond short of the grid does not cost half a second; a long prompt keeps its beginning."""
    prompt = processor.prepare_prompt(midi((0, 1, 60)), noise(seconds), RATE)
    assert (prompt.seconds, prompt.frames, len(prompt.wave)) == (kept, kept * 50, kept * RATE)
    length = min(len(prompt.wave), round(seconds * RATE))
    assert np.array_equal(prompt.wave[:length], noise(seconds)[:length])


def test_batch_equals_single(processor):
    """Different lengths of MIDI, prompt and target: each window holds what it holds alone, padded on the right."""
    prompts = [noise(1.2), noise(3.1, 44_100)]
    arguments = [
        {"midi": midi((0, 1, 60)), "prompt_midi": midi((0, 1, 40)), "prompt_audio": prompts[0], "sampling_rate": RATE},
        {"midi": midi((0, 1, 60), (1, 2, 62)), "prompt_midi": midi((0.5, 1, 41), (1, 1, 42)),
         "prompt_audio": prompts[1], "sampling_rate": 44_100, "start": 0.5, "end": 4.0},
    ]  # fmt: skip
    keys = ("midi", "prompt_midi", "prompt_audio", "sampling_rate", "start", "end")
    batch = processor(**{key: [item.get(key) for item in arguments] for key in keys})
    assert batch["input_values"].shape == (2, 1, 96_000) and batch["prompt_lengths"].tolist() == [50, 150]
    assert batch["target_frames"].tolist() == [50, 50, 125] and batch["window_counts"].tolist() == [1, 2]
    first = 0
    for i, item in enumerate(arguments):
        single = processor(**item)
        (windows, rows, _), samples = single["input_ids"].shape, single["input_values"].shape[2]
        mine = slice(first, first + windows)
        assert torch.equal(batch["input_ids"][mine, :rows], single["input_ids"])
        assert torch.equal(batch["attention_mask"][mine, :rows], single["attention_mask"])
        assert not batch["attention_mask"][mine, rows:].any()
        for key in ("target_frames", "context_frames"):
            assert torch.equal(batch[key][mine], single[key])
        assert torch.equal(batch["input_values"][i, :, :samples], single["input_values"][0])
        assert batch["padding_mask"][i].tolist() == [1] * samples + [0] * (96_000 - samples)
        assert batch["prompt_lengths"][i] == single["prompt_lengths"][0]
        first += windows


@pytest.mark.parametrize("form", [bytearray, memoryview, io.BytesIO, "open file", "temporary file"])
def test_midi_and_audio_come_as_bytes_or_open_files(processor, form, tmp_path):
    """Alike, for the piece and both halves of the prompt; a file that is closed is refused."""
    write_audio(tmp_path / "p.wav", noise(1.0), RATE)
    inputs = {"midi": midi((0, 1, 60)), "prompt_midi": midi((0, 1, 40)), "prompt_audio": tmp_path / "p.wav"}
    inputs["prompt_audio"] = inputs["prompt_audio"].read_bytes()

    def given(data):
        if form == "open file":
            path = tmp_path / f"{len(data)} {len(list(tmp_path.iterdir()))}"
            path.write_bytes(data)
            return path.open("rb")
        if form != "temporary file":
            return form(data)
        file = tempfile.NamedTemporaryFile()  # not an `io.IOBase`
        file.write(data)
        file.seek(0)
        return file

    expected, found = processor(**inputs), processor(**{name: given(data) for name, data in inputs.items()})
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    if "file" in str(form):
        for name, data in inputs.items():
            file = given(data)
            file.close()
            with pytest.raises((MidiError, AudioError), match="cannot be read .*closed file"):
                processor(**inputs | {name: file})


def test_a_list_of_numbers_is_one_recording(processor):
    prompt = {"midi": midi((0, 1, 60)), "prompt_midi": midi((0, 1, 40)), "sampling_rate": RATE}
    found = processor(**prompt, prompt_audio=noise(1.0).tolist())
    assert torch.equal(found["input_values"], processor(**prompt, prompt_audio=noise(1.0))["input_values"])


def test_one_prompt_serves_a_batch(processor):
    batch = processor([midi((0, 1, 60)), midi((0, 1.4, 61))], midi((0, 1, 40)), noise(2), RATE, end=[1.0, 1.5])
    assert batch["input_values"].shape == (2, 1, 64_000) and batch["window_counts"].tolist() == [1, 2]
    assert batch["target_frames"].tolist() == [50, 50, 25]


def test_sustain_is_the_tokenizers_unless_given(processor):
    pedalled = midi((0, 0.5, 60), pedal=((0.2, 127), (2.0, 0)))
    assert processor(pedalled)["target_frames"].sum() == 100
    assert processor(pedalled, sustain="ignore")["target_frames"].sum() == 25
    processor.tokenizer.sustain = "ignore"
    assert processor(pedalled)["target_frames"].sum() == 25


def test_a_span_cut_out_anywhere(processor):
    """start is time zero, also off the grid; what sounds there is held, what sounds at the end is clipped."""
    piece = performance((0.2, 2.0, 50), (1.0, 0.2, 60), (3.0, 9.0, 70), (4.0, 1.0, 72))
    span = processor.load(piece, start=1.3, end=3.75)
    assert span.name == "piece.mid" and span.end == pytest.approx(2.45)
    assert span.notes["pitch"].tolist() == [50, 70] and span.notes["onset"] == pytest.approx([-1.1, 1.7])
    rows = processor.window_inputs(span, 0.0, span.end)["input_ids"][0, 1:-1]
    assert rows[:, 3].tolist() == [388 - round(1.1 * 192), 388]  # held since 1.1 s; the first struck note
    assert onset_ticks(rows).tolist() == [0, round(1.7 * 192)]
    assert (rows[:, 2] - 3).tolist() == [round(0.9 * 192), round(0.75 * 192)]
    alone = processor(piece, start=1.3, end=3.75)
    assert torch.equal(alone["input_ids"][-1], processor.window_inputs(span, 1.0, 2.45)["input_ids"][0])
    assert alone["target_frames"].tolist() == [50, 73]


# --- prompts


def played(seconds, seed=0, density=6):
    """Notes of a random performance, and a recording of it."""
    rng = np.random.default_rng(seed)
    onsets = np.sort(rng.uniform(0, seconds - 0.3, round(seconds * density)))
    notes = performance(*[(t, 0.25, int(p)) for t, p in zip(onsets, rng.integers(45, 85, len(onsets)), strict=True)])
    return notes, recorded(notes, seconds, rng)


def recorded(piece, seconds, rng):
    """A recording of notes: decaying tones with three partials, and noise."""
    wave = 0.003 * rng.standard_normal(round(seconds * RATE))
    for note in piece.notes:
        tail = wave[max(round(note["onset"] * RATE), 0) :][: 4 * RATE]  # nothing is left of a tone after that
        time = np.arange(len(tail)) / RATE
        tone = sum(np.sin(2 * np.pi * k * 440 * 2 ** ((note["pitch"] - 69) / 12) * time) / k for k in (1, 2, 3))
        tail += 0.05 * tone * np.exp(-time / 0.3)
    return wave.astype(np.float32)


def moved(piece, seconds):
    notes = piece.notes.copy()
    notes["onset"] += seconds
    return dataclasses.replace(piece, notes=notes)


@pytest.mark.parametrize("late", [0.0, 0.01, 0.05, 0.2, 0.29, -0.12])
def test_offsets_of_prompts_are_measured_and_corrected(processor, late):
    """MIDI that is early or late by up to 300 ms is moved to within a frame; by less than a frame it is left alone."""
    piece, wave = played(6.0)
    prompt = processor.prepare_prompt(moved(piece, -late), wave, RATE)
    assert np.abs(prompt.notes["onset"] - piece.notes["onset"]).max() < 0.012
    assert (prompt.offset == 0) == (abs(late) < 0.02) and prompt.offset == pytest.approx(late, abs=0.012)
    said = f"is {abs(prompt.offset) * 1000:.0f} ms {'later' if late > 0 else 'earlier'} than its MIDI; corrected"
    assert said in prompt.remark if abs(late) > 0.02 else prompt.remark == ""


@pytest.mark.parametrize("late", [0.0, 0.1, -0.05])
def test_more_than_a_minute_of_regular_notes_is_not_off_by_a_bar(processor, late):
    piece = performance(*[(0.2 * i, 0.15, (48, 60, 64, 67, 64, 60)[i % 6]) for i in range(375)])
    wave, time = np.zeros(76 * RATE, np.float32), np.arange(round(0.3 * RATE)) / RATE
    for note in piece.notes:
        begin = round((note["onset"] + late + 0.1) * RATE)
        tone = np.sin(2 * np.pi * 440 * 2 ** ((note["pitch"] - 69) / 12) * time) * np.exp(-time / 0.1)
        wave[begin : begin + len(time)] += 0.1 * tone
    prompt = processor.prepare_prompt(moved(piece, 0.1), wave, RATE)
    assert prompt.offset == (pytest.approx(late, abs=0.02) if late else 0)


@pytest.mark.parametrize(("keys", "seed"), [((50, 62), 2), ((62,), 0)])
def test_notes_repeated_in_time_are_not_off_by_a_beat(processor, keys, seed):
    """They fit nearly as well a beat off, and chance decides at which place best: where they are in time they stay."""
    piece = performance(*[(0.2 * i, 0.16, keys[i % len(keys)]) for i in range(38)])  # goes on behind the recording
    rng = np.random.default_rng(seed)
    wave = recorded(piece, 6.0, rng)
    piece.notes["velocity"] = rng.integers(40, 110, len(piece.notes))
    prompt = processor.prepare_prompt(piece, wave, RATE)
    assert prompt.offset == 0 and prompt.remark == ""


@pytest.mark.parametrize("late", [0.0, 0.1])
def test_a_silent_beginning_tells_nothing_of_the_offset(processor, late):
    piece, wave = played(20.0)
    wave = np.concatenate([np.zeros(70 * RATE, np.float32), wave])
    prompt = processor.prepare_prompt(moved(piece, 70 - late), wave, RATE)
    assert prompt.offset == (pytest.approx(late, abs=0.012) if late else 0)
    assert "corrected" in prompt.remark if late else "belong together" not in prompt.remark


def test_a_prompt_as_datasets_gives_it(processor, tmp_path):
    piece, wave = played(6.0)
    prompt = processor.prepare_prompt(piece, {"array": wave, "sampling_rate": RATE, "path": None})
    plain = processor.prepare_prompt(piece, wave, RATE).wave
    assert np.array_equal(prompt.wave, plain)
    samples = SimpleNamespace(data=torch.from_numpy(wave)[None], sample_rate=RATE)  # from 4.0 on, an `AudioDecoder`
    prompt = processor.prepare_prompt(piece, SimpleNamespace(get_all_samples=lambda: samples))
    assert np.array_equal(prompt.wave, plain)
    soundfile.write(tmp_path / "prompt.wav", wave, RATE, subtype="FLOAT")
    path = str(tmp_path / "prompt.wav")
    for kept in ({"bytes": (tmp_path / "prompt.wav").read_bytes(), "path": None}, {"bytes": None, "path": path}):
        assert np.array_equal(processor.prepare_prompt(piece, kept).wave, plain)  # not decoded
    with pytest.raises(ProcessorError, match="without array and sampling_rate, bytes or path"):
        processor.prepare_prompt(piece, {"bytes": None, "path": None})


def test_what_does_not_belong_together_is_told(processor, caplog):
    piece, wave = played(6.0)
    prompt = processor.prepare_prompt(moved(piece, -0.8), wave, RATE)
    assert prompt.offset == 0 and re.search("(79|80). ms later than its MIDI, which is too much", prompt.remark)
    prompt = processor.prepare_prompt(played(6.0, seed=1)[0], wave, RATE)
    assert prompt.offset == 0 and "do not seem to belong together" in prompt.remark
    assert not caplog.text  # who has the prompt has its remark
    processor([piece] * 2, prompt_midi=played(6.0, seed=1)[0], prompt_audio=wave, sampling_rate=RATE)
    assert caplog.text.count(prompt.remark) == 1


def test_the_best_part_of_a_long_recording_is_used(processor):
    """The middle, with many notes over a wide register; not the beginning, which is clipped, nor the thin end."""
    dense, wave = played(24.0, seed=6, density=12)
    onset = dense.notes["onset"]
    kept = dataclasses.replace(dense, notes=dense.notes[(onset < 16) | (dense.notes["pitch"] == 60)])
    assert choose_excerpt(wave, kept.notes, 8.0) < 7
    wave[: 7 * RATE : 50] = 1.0
    prompt = processor.prepare_prompt(kept, wave, RATE)
    assert 7 <= prompt.start <= 9 and prompt.seconds == 8 and prompt.start % 0.5 == 0
    assert f"prompt audio: {prompt.start:g} to {prompt.start + 8:g} s are used" in prompt.remark
    first = round(prompt.start * RATE)
    assert np.array_equal(prompt.wave, wave[first : first + 8 * RATE])
    inside = kept.notes[kept.notes["onset"] + kept.notes["duration"] > prompt.start]
    assert np.allclose(prompt.notes["onset"], inside["onset"] - prompt.start)


@pytest.mark.parametrize(
    ("held_s", "cut_s", "clipped", "start"), [(0.1, 0.1, 0, 0.5), (0.3, 0.1, 0, 0), (0.1, 0.3, 0, 0), (0.1, 0.1, 50, 0)]
)
def test_what_a_part_with_more_notes_may_not_have(held_s, cut_s, clipped, start):
    """Of the two parts of 1 s the later one has three notes instead of two; it is left for a note that already sounds,
    one that is cut, or for clipping."""
    notes = performance((0.3, held_s, 60), (0.6, 0.1, 60), (1.2, 0.1, 60), (1.3, cut_s, 60)).notes
    wave = np.zeros(48_000, np.float32)
    wave[40_000 : 40_000 + clipped] = 1.0
    assert choose_excerpt(wave, notes, 1.0) == start


@pytest.mark.parametrize(("count", "offset"), [(3, 0), (4, 0.1)])
def test_few_notes_tell_no_offset(processor, count, offset):
    piece, wave = played(6.0, seed=1, density=count / 6)
    prompt = processor.prepare_prompt(moved(piece, -0.1), wave, RATE)
    assert len(piece.notes) == count and prompt.offset == pytest.approx(offset, abs=0.012)
    assert bool(prompt.remark) == bool(offset)


def test_prompts_up_to_15_seconds(processor):
    longest = MidiValleProcessor(processor.feature_extractor, processor.tokenizer, 15.0, 16.0)
    piece, wave = played(15.0)
    assert longest.prepare_prompt(piece, wave, RATE).frames == 750
    inputs = longest(performance(*[(t / 2, 1.0, 60) for t in range(80)]), piece, wave, RATE)
    known = inputs["prompt_lengths"][0] + inputs["context_frames"] + inputs["target_frames"]
    assert known.max() <= 1600 and (inputs["context_frames"] + inputs["target_frames"]).max() <= 800
    with pytest.raises(ValueError, match="max_prompt_seconds 15.5"):
        MidiValleProcessor(processor.feature_extractor, processor.tokenizer, 15.5, 16.0)


# --- windows


def conditioning(processor, piece, window, prompt_seconds=0.0, prompt=None):
    """Rows of a window in ticks of the piece: struck (tick, pitch) and held (tick, pitch, duration, age id)."""
    inputs = processor.window_inputs(piece, *window, prompt, return_tensors="np")
    rows = inputs["input_ids"][0, 1:-1]
    ticks = onset_ticks(rows)
    rows, ticks = rows[ticks >= prompt_seconds * 192], ticks[ticks >= prompt_seconds * 192]
    first = window[0] - inputs["context_frames"][0] / 50
    ticks = ticks - round(prompt_seconds * 192) + round(first * 192)
    is_held = rows[:, 3] < 388
    struck = list(zip(ticks[~is_held].tolist(), (rows[~is_held, 0] + 17).tolist(), strict=True))
    columns = (ticks, rows[:, 0] + 17, rows[:, 2] - 3, rows[:, 3])
    return struck, list(zip(*(column[is_held].tolist() for column in columns), strict=True)), inputs


@pytest.mark.parametrize("context", [0.0, 4.0])
@pytest.mark.parametrize("seed", range(12))
def test_windows_lose_no_note_and_repeat_none(processor, seed, context):
    """Every strike is new in one window; what sounds at the beginning of a window's context is held once, right age;
    and what is longer than 6 s goes on until its key is struck again."""
    processor.context_seconds = context
    piece = random_performance(seed, seconds=[3, 21, 47, 95][seed % 4], density=[0.3, 2, 12][seed % 3])
    windows = processor.windows(piece, ring_out=[0.0, 2.0, 7.3][seed % 3])
    prompt = processor.prepare_prompt(midi((0, 1, 60)), noise(3.0), RATE)
    onset, duration = to_ticks(piece.notes["onset"]), np.maximum(to_ticks(piece.notes["duration"]), 1)
    new, frames = [], 0
    for start, end in windows:
        struck, held, inputs = conditioning(processor, piece, (start, end), 3.0, prompt)
        first, right = round((start - min(start, context)) * 192), math.ceil((end + 0.5) * 192 - 1e-6)
        sounding = [
            (first, pitch, min(tick + length - first, right - first, 1152), 388 - min(first - tick, 384))
            for tick, length, pitch in zip(onset.tolist(), duration.tolist(), piece.notes["pitch"].tolist())
            if tick < first < tick + length
        ]
        for tick, length, pitch in zip(onset.tolist(), duration.tolist(), piece.notes["pitch"].tolist()):
            again = onset[(piece.notes["pitch"] == pitch) & (onset > tick) & (onset < right) & (onset >= first)]
            for at in range(max(tick, first) + 1152, min(tick + length, right, *again), 1152):
                sounding.append((at, pitch, min(tick + length - at, right - at, 1152), 4))
        assert sorted(held) == sorted(sounding)
        last = np.inf if end == windows[-1][1] else round(end * 192)
        new += [note for note in struck if round(start * 192) <= note[0] < last]
        again = [note for note in struck if not round(start * 192) <= note[0] < last]
        assert set(again) <= set(zip(onset.tolist(), piece.notes["pitch"].tolist()))
        frames += int(inputs["target_frames"][0])
    assert sorted(new) == sorted(zip(onset.tolist(), piece.notes["pitch"].tolist()))
    assert frames == math.ceil((piece.end + [0.0, 2.0, 7.3][seed % 3]) * 50 - 1e-6)


def test_prompt_and_window_may_fill_the_sequence():
    """What lies ahead of the window is left out then."""
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=RATE)
    processor = MidiValleProcessor(extractor, MidiValleTokenizer(), max_prompt_seconds=12, max_window_seconds=20)
    prompt = processor.prepare_prompt(midi((0, 1, 60)), noise(12.0), RATE)
    piece = performance(*((0.25 * i, 0.2, 60) for i in range(100)))
    ids = processor.window_inputs(piece, 0.0, 20.0, prompt)["input_ids"]
    assert len(ids[0]) == 2 + 1 + 80


def test_overlapping_notes_in_every_window(processor):
    """240 notes of 1 s every 250 ms, 60.75 s: each is new once; at every cut the four that sound are there, with their
    age."""
    piece = performance(*[(i / 4, 1.0, 30 + i % 60) for i in range(240)])
    windows = processor.windows(piece, ring_out=0.0)
    assert windows[-1][1] == 60.75 and len(windows) > 5
    new = []
    for start, end in windows:
        struck, held, _ = conditioning(processor, piece, (start, end))
        new += [note for note in struck if start * 192 <= note[0] and (note[0] < end * 192 or end == 60.75)]
        begun = [tick for tick, _ in struck] + [tick - (388 - age) for tick, _, _, age in held]
        assert len(set(begun)) == len(begun)  # none twice
        sounding = [i * 48 for i in range(240) if i * 48 < start * 192 < i * 48 + 192]
        assert set(sounding) <= set(begun) and len(sounding) == (3 if start else 0)
    assert sorted(new) == [(i * 48, 30 + i % 60) for i in range(240)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ring_out", [0.0, 2.0, 10.0])
def test_windows_cover_the_piece(seed, ring_out):
    """On the grid, without gap; a second, then at most twice as much each time, at most 16 s; the ring-out is whole."""
    piece = random_performance(seed, seconds=[4, 19, 33, 200][seed % 4], density=3)
    total = piece.end + ring_out
    windows = plan_windows(piece.notes, total, 16.0)
    assert windows[0][0] == 0 and windows[-1][1] == total
    assert all(left[1] == right[0] for left, right in zip(windows, windows[1:], strict=False))
    assert all(start % 0.5 == 0 for start, _ in windows) and all(start < piece.end for start, _ in windows)
    lengths = [end - start for start, end in windows]
    assert all(0 < length <= 16 + 1e-9 for length in lengths)
    assert total < 60 or (lengths[0] == 1 and all(0.75 <= lengths[i] / 2**i <= 1 for i in range(4)))
    assert total < 60 or all(length >= 0.65 * 16 for length in lengths[4:])


def chords(*ends):
    """Ten notes in every second from 0.125 s on, each for longer than to the next but those of `ends` (s, duration)."""
    durations = dict.fromkeys(range(34), 1.0) | dict(ends)
    return [(s + 0.125, length, 40 + k) for s, length in durations.items() if length for k in range(10)]


@pytest.mark.parametrize(
    ("notes", "cut"),
    [
        (chords((17, 0)), 17.5),  # nothing sounds there
        (chords((19, 0.75)), 20.0),  # the longest first window that there may be
        (chords((18, 0.375)), 18.5),  # where ten notes have just ended
        (chords((15, 0.5), (18, 0.5)), 16.0),  # of two such places the first
        (chords((15, 0.5), (18, 0.5)) + [(16.03, 0.01, 90)], 19.0),  # but not beside a strike
        (chords((15, 0.5), (18, 0.5)) + [(15.97, 0.01, 90)], 19.0),
    ],
)
def test_cuts_fall_where_the_music_is_thin(notes, cut):
    """Chords of ten notes sound all the time but at one or two places: there is the cut."""
    assert plan_windows(performance(*notes).notes, 36.0, 20.0, first=20.0) == [(0.0, cut), (cut, 36.0)]


@pytest.mark.parametrize("seconds", [1, 3, 16])
def test_a_span_leaves_no_window_without_a_frame(processor, seconds):
    """Ends of spans are sums of floats, which may miss the grid by a hair."""
    piece = performance(*[(t / 3, 4.0, 60 + t % 12) for t in range(150)])
    for start in np.arange(0, 20, 0.1):
        span = processor.load(piece, start=float(start), end=float(start) + seconds)
        lengths = [end - begin for begin, end in processor.windows(span, ring_out=0.0)]
        assert min(lengths) >= 0.5 and sum(lengths) == pytest.approx(seconds)


def test_a_strike_on_the_last_cut_is_not_repeated(processor):
    """The last note rounds up onto a grid point behind its own end: new in one window only."""
    piece = performance(*[(t, 0.4, 60) for t in np.arange(0, 19.5, 0.5)], (19.999, 0.0005, 61))
    assert processor.windows(piece, ring_out=2.0)[-1][0] < piece.end
    cut = 15.0
    struck = [conditioning(processor, piece, window)[0] for window in ((0.5, cut), (cut, piece.end + 2))]
    assert [(20 * 192, 61) in notes for notes in struck] == [False, True]


def test_a_long_piece_is_planned_quickly():
    """An hour with 36,000 notes within a few seconds, and leading silence is covered too."""
    piece = random_performance(0, 3600, 10)
    piece.notes["onset"] += 100
    windows = plan_windows(piece.notes, piece.end + 2, 20.0)
    assert windows[0][0] == 0 and 180 < len(windows) < 290


def test_notes_left_out_are_reported(processor, caplog):
    processor.tokenizer.mark_held = False
    processor.window_inputs(performance((0, 30, 60), (16, 1, 62)), 15.0, 20.0)
    assert "notes that sound at 11.0 s are left out there (1)" in caplog.text


def test_windows_of_several_pieces(processor):
    """A prompt is one for all, or one of each; a window that is none is refused."""
    pieces = [performance((0, 2, 60)), performance((0, 2, 70), (1, 1, 50))]
    prompt = processor.prepare_prompt(midi((0, 1, 60)), noise(2.0), RATE)
    both = processor.window_inputs(pieces, 0.0, [2.0, 1.0], prompt)
    each = processor.window_inputs(pieces, [0.0, 0.0], [2.0, 1.0], [prompt, prompt])
    assert both.keys() == each.keys() and all(torch.equal(both[key], each[key]) for key in both)
    assert both["target_frames"].tolist() == [100, 50]
    for start, end in ((1.0, 0.5), (-1.0, 1.0), ("0", 1.0)):
        with pytest.raises(ProcessorError, match=f"window {start} to {end} s: give numbers, 0 <= start < end"):
            processor.window_inputs(pieces, start, end)


def test_the_constant_part_of_a_prompt_is_taken_off(processor):
    """It is inaudible, but counts as level, and the model plays loud and soft keys up to 6 dB otherwise after it."""
    notes = midi(*((0.2 * i, 0.1, 60 + i) for i in range(8)))
    wave = noise(2, level=0.03)
    for given in (wave + 0.05, np.stack([wave, wave + 0.1], 1)):
        assert np.abs(processor.prepare_prompt(notes, given, RATE).wave - (wave - wave.mean())).max() < 1e-6
    assert np.array_equal(processor.prepare_prompt(notes, wave, RATE).wave, wave)  # next to none: untouched
    corrects = MidiValleProcessor(processor.feature_extractor, processor.tokenizer, correct_level=True)
    quiet, biased = (corrects.prepare_prompt(notes, noise(2, level=1e-3) + dc, RATE) for dc in (0.0, 0.05))
    assert biased.gain_db == pytest.approx(quiet.gain_db, abs=0.01) and quiet.gain_db > 20
    with pytest.raises(ProcessorError, match="are silence"):
        processor.prepare_prompt(notes, np.full(64_000, 0.1, np.float32), RATE)


def test_a_prompt_as_an_open_file(processor, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(2.0), RATE, "FLOAT")
    with open(tmp_path / "a.wav", "rb") as file:
        np.testing.assert_array_equal(processor.read_prompt(file), processor.read_prompt(tmp_path / "a.wav"))


@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, torch.Tensor.requires_grad_])
def test_a_prompt_as_a_tensor(processor, change):
    """Of any type of floats, and of a model in training."""
    wave = torch.from_numpy(noise(2)).float()
    rounded = change(wave.clone()).detach().float().numpy()
    given = processor.read_prompt(change(wave), RATE)
    np.testing.assert_array_equal(given, processor.read_prompt(rounded, RATE))


# --- refusals


PROMPT = {"prompt_midi": midi((0, 1, 60)), "prompt_audio": noise(2), "sampling_rate": RATE}


@pytest.mark.parametrize(
    ("velocity", "level_db", "gain", "said"),
    [
        (127, -20, 0, ""),  # the notes tell -3: 1 s of full scale in 2 s
        (127, -30.9, 0, ""),  # the softest that is usual
        (127, -31.1, 7.1, "softer than the velocities of its MIDI tell; raised by 7 dB"),  # to 21 below
        (127, -60, 36, "softer than the velocities of its MIDI tell; raised by 36 dB"),
        (127, -10, -14, "louder than the velocities of its MIDI tell; lowered by 14 dB"),
        (40, -36, 0, ""),  # a piano that is played softly: the notes tell 21 less
        (40, -20, -18, "louder than the velocities of its MIDI tell; lowered by 18 dB"),
        (1, -20, -18, "lowered by 18 dB"),  # nobody plays so: no softer than recordings are
        (1, -60, 0, ""),
    ],
)
def test_a_level_that_velocities_do_not_explain(velocity, level_db, gain, said):
    wave = noise(2)
    wave *= 10 ** (level_db / 20) / np.sqrt(np.mean(wave**2))
    notes = np.array([(0.0, 0.8, 60, velocity), (2.0, 1.0, 60, 127)], NOTE_DTYPE)  # the second one is not heard in it
    found, sentence = check_level(wave, notes, "a.wav")
    assert found == pytest.approx(gain, abs=0.1) and said in sentence and bool(said) == bool(sentence)


def test_velocities_tell_what_the_pianos_of_the_training_play():
    notes = random_performance(3, 20.0, 6).notes
    notes["onset"] -= notes["onset"].min()
    seconds = (notes["onset"] + notes["duration"]).max()
    assert expected_level(notes, seconds) == pytest.approx(20 * np.log10(performance_level(notes)), abs=1e-6)


def test_levels_of_nothing():
    notes = np.array([(0.0, 0.8, 60, 90)], NOTE_DTYPE)
    assert check_level(noise(1, level=0.0), notes, "") == check_level(noise(1), notes[:0], "") == (0.0, "")


def test_a_prompt_is_of_a_usual_level_where_the_model_knows_no_others(processor, tmp_path):
    """Whatever its gain, what the model is given is the same; a usual one stays as it is."""
    parts = processor.feature_extractor, processor.tokenizer
    MidiValleProcessor(*parts, correct_level=True).save_pretrained(tmp_path)
    corrects = MidiValleProcessor.from_pretrained(tmp_path)
    notes = midi((0, 1, 60), (0.5, 1, 64), (1, 1, 67))
    quiet, quieter, usual = (corrects.prepare_prompt(notes, noise(2, level=x), RATE) for x in (4e-3, 1e-3, 0.03))
    assert np.allclose(quiet.wave, quieter.wave, rtol=1e-4, atol=1e-7) and quiet.wave.dtype == np.float32
    assert quieter.gain_db - quiet.gain_db == pytest.approx(12.04, abs=0.01) and 10 < quiet.gain_db < 40
    assert usual.gain_db == 0.0 and usual.remark == "" and np.array_equal(usual.wave, noise(2, level=0.03))
    said = f"softer than the velocities of its MIDI tell; raised by {quiet.gain_db:.0f} dB"
    assert quiet.remark == f"prompt audio: the recording is {said}"
    longer = corrects.prepare_prompt(notes, noise(12, level=1e-3), RATE)
    assert re.fullmatch(r"prompt audio: 0 to 8 s are used; the recording is softer .*; raised by \d+ dB", longer.remark)
    untouched = processor.prepare_prompt(notes, noise(2, level=1e-3), RATE)
    assert untouched.gain_db == 0.0 and np.array_equal(untouched.wave, noise(2, level=1e-3))


def float_wav(wave):
    """The bytes of a file of 32-bit floats."""
    soundfile.write(file := io.BytesIO(), wave, RATE, "FLOAT", format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_audio": np.zeros(64_000)}, ProcessorError, "silence"),
        ({"prompt_audio": noise(2) * 32768}, ProcessorError, "full scale is 1.0: divide 16-bit samples by 32768"),
        ({"prompt_audio": float_wav(noise(2) * 32768)}, ProcessorError, "prompt audio reaches .* full scale is 1.0"),
        ({"prompt_audio": (noise(2) * 32768).astype(np.int64)}, ProcessorError, "type int64; give int16 or int32"),
        ({"prompt_audio": noise(0.2)}, ProcessorError, "lasts 0.200 s; a prompt needs at least 1.0 s"),
        ({"prompt_midi": None}, ProcessorError, "needs its audio and its MIDI: only the audio is given, add the MIDI"),
        ({"prompt_audio": None}, ProcessorError, "only the MIDI is given, add the audio"),
        ({"prompt_midi": midi((2.5, 1, 60))}, ProcessorError, "no note begins in the 2.0 s"),
        ({"prompt_midi": b"text"}, MidiError, "not a MIDI file"),
        ({"prompt_audio": b"text"}, AudioError, "prompt audio: is not WAV or FLAC"),
        ({"prompt_audio": "missing.wav"}, AudioError, "missing.wav: cannot be read"),
        ({"sampling_rate": None}, ProcessorError, "give its sampling_rate"),
        ({"sampling_rate": 100}, AudioError, "100 Hz is outside"),
        ({"prompt_audio": np.full(64_000, np.nan)}, AudioError, "not finite"),
        ({"prompt_audio": np.zeros((2, 2, 9))}, ProcessorError, "has shape"),
        ({"prompt_audio": np.zeros(64_000, bool)}, ProcessorError, "type bool"),
        ({"prompt_audio": np.zeros((9, 64_000))}, ProcessorError, "has 9 channels .*give the prompts .* as a list"),
        ({"prompt_audio": np.zeros(0)}, AudioError, "no samples"),
        ({"midi": None}, ProcessorError, "midi is missing"),
        ({"midi": []}, ProcessorError, "empty list"),
        ({"audio": noise(2)}, ProcessorError, "text and audio: not an argument beside midi"),
        ({"promt_audio": noise(2), "padding": True}, ProcessorError, "promt_audio, padding: not an argument beside"),
        ({"midi": None, "text": "Pitch_60"}, ProcessorError, "need midi"),
        ({"midi": midi()}, MidiError, "no notes"),
        ({"midi": performance()}, ProcessorError, "piece.mid: holds no notes"),
        ({"end": 45.0}, ProcessorError, "end 45 s is more than 10 s after the last note of"),
        ({"start": 3.0}, ProcessorError, "no note sounds from 3.0 s on; its notes end at 1.000 s"),
        (
            {"midi": midi((0, 1, 60), (9, 1, 62)), "start": 3, "end": 8},
            ProcessorError,
            "no note sounds between 3 and 8",
        ),
        ({"midi": midi((1, 1, 60)), "end": 0.5}, ProcessorError, "no note sounds between 0.0 and 0.5 s"),
        ({"start": -1.0}, ProcessorError, "^start -1.0: give numbers of seconds, 0 <= start < end"),
        ({"start": math.nan}, ProcessorError, "^start nan: give numbers of seconds"),
        ({"start": 0.5, "end": 0.25}, ProcessorError, "^start 0.5 and end 0.25: give numbers of seconds"),
        ({"end": "0.5"}, ProcessorError, "^start 0.0 and end '0.5': give numbers of seconds"),
        ({"sampling_rate": "32000"}, AudioError, "sampling rate '32000' is no number"),
        ({"prompt_audio": io.BytesIO(b"text")}, AudioError, "prompt audio: is not WAV or FLAC"),
        ({"prompt_audio": io.StringIO("text")}, AudioError, "prompt audio: the file is open as text; open it with"),
        ({"midi": io.StringIO("text")}, MidiError, "MIDI: the file is open as text; open it with mode 'rb'"),
        ({"prompt_audio": (RATE, noise(2))}, ProcessorError, "a list of unlike parts; give samples, and sampling_rate"),
        (
            {"prompt_audio": np.full(RATE, np.inf)},
            AudioError,
            "prompt audio: holds samples that are not finite numbers",
        ),
        ({"midi": "."}, MidiError, "^'.': not a regular file; give a MIDI file"),
        ({"prompt_audio": [0.5, 1] * 16_000 + [None]}, ProcessorError, "prompt_audio has shape .* and type object"),
        ({"start": 0.5, "end": 0.50001}, ProcessorError, "no note sounds between 0.5 and 0.50001 s"),  # not a sample
        ({"start": 0.99999}, ProcessorError, "no note sounds from 0.99999 s on"),
        ({"sustain": "half"}, MidiError, "sustain is 'half'"),
        (
            {"midi": [midi((0, 1, 60))] * 2, "end": [1.0]},
            ProcessorError,
            "MIDI inputs is 2, but a list beside them has 1",
        ),
        (
            {"midi": [midi((0, 1, 60))] * 2, "prompt_midi": [midi((0, 1, 60)), None], "prompt_audio": [noise(2), None]},
            ProcessorError,
            "only some items",
        ),
    ],
)
def test_refusals(processor, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        processor(**({"midi": midi((0, 1, 60))} | PROMPT | arguments))
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ring_out", [-1, 10.5, math.nan])
def test_impossible_ring_outs_and_limits(processor, ring_out):
    with pytest.raises(ProcessorError, match="ring-out"):
        processor.windows(performance((0, 1, 60)), ring_out)
    with pytest.raises(ValueError, match="at most 32"):
        MidiValleProcessor(processor.feature_extractor, processor.tokenizer, 13.0, 20.0)
    for context in (0.3, 19.5, -1.0):
        with pytest.raises(ValueError, match="context_seconds"):
            MidiValleProcessor(processor.feature_extractor, processor.tokenizer, 8.0, 20.0, context)
    with pytest.raises(ProcessorError, match="20.5.* s of context and new music"):
        processor.window_inputs(performance((0, 30, 60)), 10.0, 26.5)


def test_notes_are_given_late_to_a_model_that_strikes_early(processor, tmp_path):
    """Those of the piece, 2 ticks and to their old ends, the shortest for a frame; not those of the prompt; kept in the
    folder."""
    piece, prompt = midi((0.25, 0.75, 60), (1.5, 0.01, 64)), {"prompt_midi": midi((1.0, 1.0, 48))}
    arguments = {"midi": piece, "prompt_audio": noise(2.0), "sampling_rate": RATE} | prompt
    before = processor(**arguments)
    late = MidiValleProcessor(processor.feature_extractor, processor.tokenizer, onset_delay_seconds=2 / 192)
    late.save_pretrained(tmp_path)
    after = MidiValleProcessor.from_pretrained(tmp_path)(**arguments)
    assert torch.equal(after["target_frames"], before["target_frames"])
    rows = [inputs["input_ids"][-1, 1:-1] for inputs in (before, after)]
    assert [onset_ticks(r).tolist() for r in rows] == [[192, 432, 672], [192, 434, 674]]
    assert [(r[:, 2] - 3).tolist() for r in rows] == [[192, 144, 2], [192, 142, 4]]
    with pytest.raises(ValueError, match="onset_delay_seconds 0.1 must be within 0.05 s"):
        MidiValleProcessor(processor.feature_extractor, processor.tokenizer, onset_delay_seconds=0.1)


def test_parts_by_themselves(processor):
    """`text` goes to the tokenizer and `audio` to the feature extractor, padded; options go where they belong."""
    texts, waves = ["Pitch_60", "Pitch_60 Velocity_63"], [noise(0.5), noise(1.0)]
    inputs = processor(text=texts, audio=waves)
    assert set(inputs) == set(processor.model_input_names)
    assert inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert inputs["input_ids"].tolist() == processor.tokenizer(texts, padding=True)["input_ids"]
    assert inputs["input_values"].shape == (2, 1, RATE) and inputs["padding_mask"].sum(1).tolist() == [RATE // 2, RATE]
    assert np.array_equal(inputs["input_values"][1, 0].numpy(), waves[1])
    assert processor(text=texts, padding="max_length", max_length=5)["input_ids"].shape == (2, 5)
    assert isinstance(processor(audio=waves, return_tensors="np")["input_values"], np.ndarray)
    with pytest.raises(ValueError, match="sampling rate of 32000"):
        processor(audio=waves, sampling_rate=44_100)


# --- saved folders


def test_saved_and_loaded(processor, tmp_path):
    processor.max_prompt_seconds, processor.tokenizer.sustain = 4.0, "ignore"
    processor.tokenizer.init_kwargs["sustain"] = "ignore"
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MidiValleProcessor and type(again.tokenizer) is MidiValleTokenizer
    assert (again.max_prompt_seconds, again.max_window_seconds, again.tokenizer.sustain) == (4.0, 20.0, "ignore")
    assert again.feature_extractor.sampling_rate == RATE
    assert set(again.to_dict()) == set(processor.to_dict())
    assert json.loads((tmp_path / "processor_config.json").read_text())["max_window_seconds"] == 20.0
    for key, value in processor(midi=midi((0, 1, 60)), **PROMPT).items():
        assert torch.equal(again(midi=midi((0, 1, 60)), **PROMPT)[key], value), key


REMOTE = """
import sys, numpy as np
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not [m for m in sys.modules if m.split(".")[0] in ("modeling_midivalle", "tokenization", "processing")]
wave = np.random.default_rng(0).standard_normal(44100).astype("f4") * 0.1
inputs = processor("piece.mid", prompt_midi="piece.mid", prompt_audio=wave, sampling_rate=44100, return_tensors="np")
piece = processor.load("piece.mid")
print(inputs["input_ids"].tolist(), inputs["input_values"].shape, processor.windows(piece))
"""


def test_a_process_without_the_repository(processor, tmp_path):
    """The code travels with the saved processor and reads MIDI, pedal and all."""
    processor.save_pretrained(tmp_path / "hub")
    data = midi((0, 0.5, 60), (0.5, 1, 64), pedal=((0.1, 127), (3.0, 0)))
    (tmp_path / "piece.mid").write_bytes(data)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "hub")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = processor(data, data, noise(1.0), RATE)["input_ids"].tolist()
    assert done.stdout.strip() == f"{rows} (1, 1, 32000) [(0.0, 1.0), (1.0, 2.5), (2.5, 5.0)]"


def test_a_loaded_performance_is_taken_as_it_is(processor):
    loaded = processor.load(midi((0, 1, 60)))
    assert dataclasses.is_dataclass(loaded) and processor.load(loaded) is loaded
    assert torch.equal(processor(loaded)["input_ids"], processor(midi((0, 1, 60)))["input_ids"])
