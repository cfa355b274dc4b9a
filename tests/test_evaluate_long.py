# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.evaluate_long`: what it measures, on cases small enough to know."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import EncodecFeatureExtractor

from processing import MidiValleProcessor, audio_midivalle, write_audio
from scripts import evaluate_long
from scripts.evaluate import EvaluationError
from scripts.evaluate_long import (
    RATE,
    jumps,
    last_minute,
    make_piece,
    midi_bytes,
    onset_scores,
    summarise_offsets,
    transcribe,
)
from scripts.rendering.manifest import file_sha256, weights_sha256
from scripts.training.processes import FolderLock
from tokenization import NOTE_DTYPE, MidiValleTokenizer, load_performance


def notes(*rows):
    return np.array([(onset, 0.2, pitch, 80) for onset, pitch in rows], NOTE_DTYPE)


@pytest.fixture
def model(tmp_path):
    """A model folder that has one prompt, and nothing else."""
    folder = tmp_path / "model"
    (folder / "prompts").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "prompts" / "p.mid").write_bytes(midi_bytes(notes((0.0, 60), (0.5, 64))))
    write_audio(folder / "prompts" / "p.flac", 0.1 * np.random.default_rng(0).standard_normal(2 * RATE))
    entry = dict.fromkeys(("description", "piano", "room", "licence"), "x") | {"name": "p"}
    (folder / "prompts" / "prompts.json").write_text(json.dumps([entry]))
    return folder


@pytest.fixture
def write_manifest(model, tmp_path):
    """`write_manifest(midi, windows)`: what `scripts.render` writes beside `3min.wav`, as far as it is read."""

    def write(midi, windows):
        prompt = {"files": [file_sha256(model / "prompts" / name) for name in ("p.mid", "p.flac")]}
        recipe = {"midi": file_sha256(midi), "prompt": prompt, "windows": windows, "settings": {"parallel": False}}
        content = {"recipe": recipe | {"weights_sha256": weights_sha256(model)}}
        (tmp_path / "out" / "3min.json").write_text(json.dumps(content))

    return write


@pytest.fixture
def command(tiny_pack, tmp_path, monkeypatch, model):
    """`command(...)` -> exit code, with minutes of 2 s and a transcriber that hears nothing."""
    monkeypatch.setattr(evaluate_long, "MINUTE_S", 2.0)
    monkeypatch.setattr(evaluate_long, "Transcriber", lambda: lambda wave, rate: notes())
    arguments = ["--model", model, "--midi-root", tiny_pack / "midi", "--output-dir", tmp_path / "out"]

    def run(*more):
        prompt = ["--prompt", "p"] if "--minutes" in more else []
        return evaluate_long.main([str(argument) for argument in (*arguments, *prompt, *more)])

    return run


def test_a_recital_ends_with_its_first_minute(tiny_pack, monkeypatch):
    """Files are joined until it is long enough; then the first minute's notes come again, a whole number of s later."""
    monkeypatch.setattr(evaluate_long, "MINUTE_S", 2.0)
    made, names = make_piece(str(tiny_pack / "midi"), 6.0, 0)  # 12 s of 6 s files
    assert len(names) == 2 and (np.diff(made["onset"]) >= 0).all()
    first = made[made["onset"] < 2.0]
    last = made[-len(first) :]
    assert np.array_equal(last["pitch"], first["pitch"])
    assert np.allclose(last["onset"] - last["onset"][0], first["onset"] - first["onset"][0])
    again = load_performance(midi_bytes(made))
    assert len(again.notes) == len(made) and np.abs(again.notes["onset"] - made["onset"]).max() < 1e-3
    with pytest.raises(EvaluationError, match="--minutes 99: the test split of .*/midi lasts [78].*; give fewer, or"):
        make_piece(str(tiny_pack / "midi"), 99.0, 0)


def test_notes_near_joins_and_elsewhere():
    reference = notes((0.2, 60), (4.8, 62), (5.2, 64), (9.0, 65))
    estimate = notes((0.2, 60), (4.81, 62), (9.0, 70), (9.0, 65))
    scores = onset_scores(reference, estimate, np.array([5.0]))
    assert scores == {"f1_joins": 2 / 3, "f1_elsewhere": 4 / 5, "notes_near_joins": 2}
    edge = onset_scores(notes((1.0, 60), (4.5, 62)), notes((1.0, 60), (4.48, 62)), np.array([5.0]))
    assert edge == {"f1_joins": 1.0, "f1_elsewhere": 1.0, "notes_near_joins": 1}


def test_the_transcriber_hears_a_minute_at_a_time():
    """Every onset once, at its time, also near the edges of what is heard at once."""
    clicks = np.array([0.5, 59.9, 60.0, 100.0, 119.99, 130.0])
    wave = np.zeros(140 * RATE, np.float32)
    wave[np.round(clicks * RATE).astype(int)] = 1

    def hear(part, rate):
        return notes(*[(place / rate, 60) for place in np.flatnonzero(part)])

    found = transcribe(hear, wave, [(0.0, 120.0), (125.0, 140.0)])
    assert found["onset"] == pytest.approx(clicks)
    assert transcribe(hear, wave, [(0.0, 60.0)])["onset"] == pytest.approx(clicks[:2])


def test_steps():
    time = np.arange(2 * RATE) / RATE
    tone = 0.1 * np.sin(2 * np.pi * 440 * time)
    louder = np.where(time < 1, tone, 10 * tone)
    energy, mel = jumps(louder, np.array([0.5, 1.0]))
    assert energy == pytest.approx([0, 20], abs=0.2) and mel[1] > mel[0] + 3


def test_means_of_offsets():
    rows = [
        {"offset_ms": offset, "kind": kind, "f1": f1, "onset_bias_ms": 1.0, "measured_ms": 0.0}
        for offset, kind, f1 in ((0, "as given", 0.2), (0, "as given", 0.4), (50, "corrected", 0.5))
    ]
    first, second = summarise_offsets(rows)
    assert (first["f1"], first["n"], second["offset_ms"], second["kind"]) == (pytest.approx(0.3), 2, 50, "corrected")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to do: give --minutes or --offsets"),
        (("--minutes", "inf"), "--minutes must be at least 1.2"),
        (("--minutes", "5", "nan"), "--minutes must be at least 1.2"),
        (("--minutes", "-1"), "--minutes must be at least 1.2"),
        (("--minutes", "5", "--transcribe-minutes", "1"), "--transcribe-minutes must be at least 2"),
        (("--minutes", "5", "--transcribe-minutes", "nan"), "--transcribe-minutes must be at least 2"),
        (("--minutes", "5", "--seed", "-1"), "--seed at least 0"),
        (("--offsets", "0", "--prompt", "upright_old_tape"), "--prompt is for --minutes"),
        (("--offsets", "0", "--transcribe-minutes", "3"), "--transcribe-minutes is for --minutes"),
        (("--offsets", "0", "--reuse"), "--reuse is for --minutes"),
        (("--minutes", "5", "--excerpts", "2"), "--excerpts is for --offsets"),
        (("--offsets", "nan"), "--offsets must be numbers, in ms"),
        (("--offsets", "0", "--seconds", "nan"), "--seconds must be above 0"),
        (("--offsets", "0", "--seconds", "inf"), "--seconds must be above 0"),
        (("--offsets", "0", "--excerpts", "0"), "--excerpts at least 1"),
    ],
)
def test_options_out_of_range(options, message, command, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(*options)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_input_is_one_sentence(command, model, tmp_path, capsys, monkeypatch):
    """Before anything is rendered or replaced; a folder is of one run."""

    def refused(message, *options):
        assert command(*options) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    with FolderLock(tmp_path / "held"):
        refused("held: another run is at work here", "--minutes", 3, "--output-dir", tmp_path / "held")
    monkeypatch.setattr(evaluate_long, "Transcriber", None)
    refused("file: is not a folder; give another --output-dir", "--minutes", 3, "--output-dir", tmp_path / "file")
    refused("--prompt x: not one of p", "--minutes", 3, "--reuse", "--prompt", "x")
    refused("empty: no MIDI file of split 'test'", "--minutes", 3, "--midi-root", tmp_path / "empty")
    (tmp_path / "offsets.json").write_text("{}")
    refused("offsets.json: exists already; give another", "--offsets", 0, "--output-dir", tmp_path)


def test_sounds_that_are_there_are_measured_again(command, model, write_manifest, tmp_path, monkeypatch, capsys):
    """`--reuse`: but not as those of other notes, of another model or `--parallel`, and not into the results that are
    there."""
    out, rendered = tmp_path / "out", []

    def render(midi, sound, *options):
        rendered.append(options)
        piece = load_performance(midi)
        write_audio(sound, 0.1 * np.random.default_rng(1).standard_normal(round((piece.end + 2) * RATE)))
        write_manifest(midi, [[0, 3], [3, piece.end + 2]])
        return 1.0, 2.0

    monkeypatch.setattr(evaluate_long, "PLACES", 20)
    monkeypatch.setattr(evaluate_long, "run_render", render)
    monkeypatch.setattr(evaluate_long, "measure_first_audio", lambda args, midi: {"said": midi.name})
    assert command("--minutes", 3) == 0 and len(rendered) == 1
    results = json.loads((out / "long.json").read_text())
    assert results["pieces"][0]["length_error_ms"] < 0.02 and results["first_audio"] == {"said": "3min.mid"}
    assert command("--minutes", 3, "--reuse") == 2
    assert "long.json: exists already; give another --output-dir, or move it away" in capsys.readouterr().err
    (out / "long.json").unlink()
    assert command("--minutes", 3, "--reuse") == 0 and len(rendered) == 1
    assert json.loads((out / "long.json").read_text())["pieces"][0]["f1"] == results["pieces"][0]["f1"]
    (out / "long.json").unlink()
    before = (out / "3min.mid").read_bytes()
    assert command("--minutes", 3, "--reuse", "--seed", 6) == 2 and (out / "3min.mid").read_bytes() == before
    assert "3min.wav: was made of other notes, with another prompt or model" in capsys.readouterr().err
    assert command("--minutes", 3, "--reuse", "--parallel") == 2  # its joins are not those of windows side by side
    (model / "config.json").write_text('{"other": "weights"}')
    assert command("--minutes", 3, "--reuse") == 2
    assert capsys.readouterr().err.count("was made of other notes, with another prompt or model, or --parallel") == 2
    (out / "3min.json").write_text("[]")
    assert command("--minutes", 3, "--reuse") == 2
    assert "3min.json: is no manifest of scripts.render; leave out --reuse" in capsys.readouterr().err


def test_a_render_is_timed_from_its_beginning_and_heard_whatever_its_size(
    command, model, write_manifest, tmp_path, monkeypatch
):
    """What an interrupted one has left would save time; an hour is larger than what is read of users; and the prompt is
    one at any rate."""
    out, left = tmp_path / "out", tmp_path / "out" / ".3min.wav.windows"
    sound = 0.1 * np.random.default_rng(0).standard_normal((2 * 48_000, 2))
    write_audio(model / "prompts" / "p.flac", sound, 48_000)
    out.mkdir()
    left.write_bytes(b"finished windows")
    seen = []

    def render(midi, sound, *options):
        seen.append(left.exists())
        piece = load_performance(midi)
        write_audio(sound, 0.1 * np.random.default_rng(1).standard_normal(round((piece.end + 2) * RATE)))
        monkeypatch.setattr(audio_midivalle, "MAX_BYTES", Path(sound).stat().st_size - 1)
        write_manifest(midi, [[0, 3], [3, piece.end + 2]])
        return 1.0, 2.0

    prompts = []
    monkeypatch.setattr(evaluate_long, "timbre_distance", lambda prompt, wave: prompts.append(len(prompt)) or 0.0)
    monkeypatch.setattr(evaluate_long, "PLACES", 20)
    monkeypatch.setattr(evaluate_long, "run_render", render)
    monkeypatch.setattr(evaluate_long, "measure_first_audio", lambda args, midi: {})
    assert command("--minutes", 3) == 0
    assert seen == [False] and prompts == [2 * RATE] * 2


def test_the_last_minute_begins_where_the_first_is_played_again():
    """Also where the first minute ends with a rest."""
    made = notes((0.0, 60), (40.0, 62), (71.0, 64), (80.0, 60), (120.0, 62))
    assert last_minute(made) == (80.0, pytest.approx(120.2))


def test_what_is_heard_of_a_piece(command, write_manifest, tmp_path, monkeypatch):
    """All but the notes around the join at 1.2 s, and what is played again at the end 20 ms late; what lies between the
    minutes that are transcribed does not count."""
    out, sounds = tmp_path / "out", {}

    def render(midi, sound, *options):
        piece = load_performance(midi)
        wave = np.zeros(round((piece.end + 2) * RATE))
        sounds["notes"], sounds["end"] = piece.notes, piece.end
        for onset, _, pitch, _ in piece.notes.tolist():
            if not 0.7 <= onset <= 1.7:
                wave[round((onset + 0.02 * (onset > 5)) * RATE)] = pitch / 200
        write_audio(sound, wave)
        write_manifest(midi, [[0, 1.2], [1.2, piece.end + 2]])
        return 1.0, 2.0

    def hear(wave, rate):
        return notes(*[(place / rate, round(200 * wave[place])) for place in np.flatnonzero(wave > 0.05)])

    monkeypatch.setattr(evaluate_long, "PLACES", 20)
    monkeypatch.setattr(evaluate_long, "run_render", render)
    monkeypatch.setattr(evaluate_long, "Transcriber", lambda: hear)
    monkeypatch.setattr(evaluate_long, "measure_first_audio", lambda args, midi: {})
    assert command("--minutes", 3, "--transcribe-minutes", 2) == 0
    (found,) = json.loads((out / "long.json").read_text())["pieces"]
    onsets, end = sounds["notes"]["onset"], sounds["end"]
    lost, counted = ((onsets >= 0.7) & (onsets <= 1.7)).sum(), ((onsets < 2) | (onsets >= end - 2)).sum()
    assert found["windows"] == 2 and found["notes"] == len(onsets) and found["notes_near_joins"] == lost
    assert (found["f1_joins"], found["f1_elsewhere"]) == (0, 1)
    assert found["f1"] == pytest.approx(2 * (counted - lost) / (2 * counted - lost))
    first = (onsets < 2).sum()
    assert found["f1_first_minute"] == pytest.approx(2 * (first - lost) / (2 * first - lost))
    assert found["f1_last_minute"] == 1 and found["bias_first_minute_ms"] == pytest.approx(0, abs=0.1)
    assert found["bias_last_minute_ms"] == pytest.approx(20, abs=0.1)
    assert (found["render_s"], found["peak_mib"], found["seconds"]) == (1, 2, pytest.approx(end + 2))


def test_a_render_that_fails_is_no_time(command, tmp_path, monkeypatch, capsys):
    """Its last line is the reason, whether the piece or the first audio was asked for."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho one >&2; echo render: no piano >&2; exit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(evaluate_long.sys, "executable", str(program))
    assert command("--minutes", 3) == 2
    said = capsys.readouterr().err
    assert said.endswith("ended with exit code 2: render: no piano\n") and said.count("\n") == 1
    monkeypatch.setattr(evaluate_long, "measure", lambda args, transcriber, minutes: {"minutes": minutes})
    assert command("--minutes", 3) == 2
    assert "--stream - --raw --end 60: ended with exit code 2: render: no piano" in capsys.readouterr().err
    kept = json.loads((tmp_path / "out" / "long.json").read_text())
    assert kept["pieces"] == [{"minutes": 3.0}]  # not lost
    assert kept["settings"]["minutes"] == [3.0] and kept["settings"]["seed"] == 0


def test_excerpts_that_are_done_are_kept(command, model, tmp_path, monkeypatch, capsys):
    """The second has no note: even the truth would score 0."""
    processor = MidiValleProcessor(EncodecFeatureExtractor(1, RATE), MidiValleTokenizer())
    pieces = iter([notes((0.1, 60)), notes((-0.1, 60))])
    load = processor.load
    monkeypatch.setattr(evaluate_long, "load_processor", lambda folder: processor)
    monkeypatch.setattr(evaluate_long, "load_model", lambda folder, device: None)
    prompts, true = [], load_performance(model / "prompts" / "p.mid").notes["onset"]
    monkeypatch.setattr(evaluate_long, "render_wave", lambda *given: prompts.append(given[3]) or np.zeros(RATE))
    monkeypatch.setattr(evaluate_long, "Transcriber", lambda: lambda wave, rate: notes((0.1, 60)))

    def cut(midi, sustain=None, start=None, end=None):
        return load(midi, sustain) if start is None else dataclasses.replace(midi, notes=next(pieces))

    monkeypatch.setattr(processor, "load", cut)
    assert command("--offsets", 0, 50) == 2
    assert "no note is struck in it; give longer --seconds or another --seed" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "offsets.json").read_text())
    assert len(results["rows"]) == 4 and results["made_with"]["weights_sha256"] == weights_sha256(model)
    for row, prompt in zip(results["rows"], prompts, strict=True):  # MIDI is early by the offset; is it corrected?
        early = row["offset_ms"] - (row["measured_ms"] if row["kind"] == "corrected" else 0)
        assert prompt.notes["onset"] == pytest.approx(true - early / 1000)
    assert [(row["offset_ms"], row["f1"]) for row in results["summary"]] == [(0, 1), (0, 1), (50, 1), (50, 1)]
    (model / "prompts" / "prompts.json").write_text("[]")
    assert command("--offsets", 0, "--output-dir", tmp_path / "other") == 2
    assert "has no bundled prompts; give a model that has some" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(command, model, tmp_path, make_model):
    """A piece of seconds, rendered by a process of its own."""
    make_model().save_pretrained(model)
    MidiValleProcessor(EncodecFeatureExtractor(1, RATE), MidiValleTokenizer()).save_pretrained(model)
    assert command("--minutes", 3) == 0
    results = json.loads((tmp_path / "out" / "long.json").read_text())
    assert results["pieces"][0]["length_error_ms"] < 0.02 and results["pieces"][0]["peak_mib"] > 100
    assert results["first_audio"]["first_audio_of_the_command_s"] > 0
