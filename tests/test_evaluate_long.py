# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.evaluate_long`: what it measures, on cases small enough to know."""

import json

import numpy as np
import pytest

from scripts import evaluate_long
from scripts.evaluate_long import (
    RATE,
    jumps,
    make_piece,
    onset_scores,
    summarise_offsets,
    transcribe,
    write_midi,
)
from tokenization import NOTE_DTYPE


def notes(*rows):
    return np.array([(onset, 0.2, pitch, 80) for onset, pitch in rows], NOTE_DTYPE)


def test_a_recital_ends_with_its_first_minute(tiny_pack, tmp_path, monkeypatch):
    """Files are joined until it is long enough; then the first minute's notes come again, a whole number of s later."""
    monkeypatch.setattr(evaluate_long, "MINUTE_S", 2.0)
    made, names = make_piece(str(tiny_pack / "midi"), 6.0, 0)  # 12 s of 6 s files
    assert len(names) == 2 and (np.diff(made["onset"]) >= 0).all()
    first = made[made["onset"] < 2.0]
    last = made[-len(first) :]
    assert np.array_equal(last["pitch"], first["pitch"])
    assert np.allclose(last["onset"] - last["onset"][0], first["onset"] - first["onset"][0])
    again = write_midi(tmp_path / "piece.mid", made)
    assert len(again.notes) == len(made) and np.abs(again.notes["onset"] - made["onset"]).max() < 1e-3


def test_notes_near_joins_and_elsewhere():
    reference = notes((0.2, 60), (4.8, 62), (5.2, 64), (9.0, 65))
    estimate = notes((0.2, 60), (4.81, 62), (9.0, 70), (9.0, 65))
    scores = onset_scores(reference, estimate, np.array([5.0]))
    assert scores == {"f1_joins": 2 / 3, "f1_elsewhere": 4 / 5, "notes_near_joins": 2}


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


def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_long, "Transcriber", lambda: None)
    (tmp_path / "midi").mkdir()
    arguments = ["--midi-root", str(tmp_path / "midi"), "--minutes", "2", "--output-dir", str(tmp_path / "out")]
    assert evaluate_long.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_command(tiny_pack, tmp_path, monkeypatch, make_model):
    """A piece of seconds, rendered by a process of its own, with a transcriber that hears the MIDI."""
    from transformers import EncodecFeatureExtractor

    from processing import MidiValleProcessor, write_audio
    from tokenization import MidiValleTokenizer, load_performance

    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=RATE)
    MidiValleProcessor(extractor, MidiValleTokenizer()).save_pretrained(folder)
    (folder / "prompts").mkdir()
    write_midi(folder / "prompts" / "p.mid", notes((0.0, 60), (0.5, 64)))
    write_audio(folder / "prompts" / "p.flac", 0.1 * np.random.default_rng(0).standard_normal(2 * RATE))
    entry = dict.fromkeys(("description", "piano", "room", "licence"), "x") | {"name": "p"}
    (folder / "prompts" / "prompts.json").write_text(json.dumps([entry]))
    monkeypatch.setattr(evaluate_long, "MINUTE_S", 2.0)
    monkeypatch.setattr(evaluate_long, "Transcriber", lambda: lambda wave, rate: piece().notes[:0])

    def piece():
        return load_performance(tmp_path / "out" / "3min.mid")

    arguments = ["--model", str(folder), "--prompt", "p", "--midi-root", str(tiny_pack / "midi"), "--minutes", "3"]
    assert evaluate_long.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "long.json").read_text())
    assert results["pieces"][0]["length_error_ms"] < 0.02 and results["pieces"][0]["peak_mib"] > 100
    assert results["first_audio"]["first_audio_of_the_command_s"] > 0


def test_less_than_what_is_compared_is_refused(tmp_path, capsys):
    """The first and the last minute are compared: they must be read."""
    with pytest.raises(SystemExit, match="2"):
        evaluate_long.main(["--midi-root", "x", "--transcribe-minutes", "1", "--output-dir", str(tmp_path / "out")])
    assert "at least 2" in capsys.readouterr().err and not (tmp_path / "out").exists()
