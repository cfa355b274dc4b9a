# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The bundled music: notation, performance rules, and files that the code still writes."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from symusic import Score

from scripts.audio.composing import Piece, Voice, perform, pitch_number
from scripts.audio.rooms import ROOMS
from scripts.examples import EXAMPLES, LICENCES, PROMPT_MUSIC, PROMPTS, RECORDINGS, main, write_examples
from tokenization.midi_midivalle import load_performance

ROOT = Path(__file__).resolve().parents[1]


def test_note_names():
    assert [pitch_number(n) for n in ("C4", "A4", "C#5", "Bb3", "A0", "C8")] == [60, 69, 73, 58, 21, 108]
    with pytest.raises(ValueError, match="H4"):
        pitch_number("H4")


def test_a_written_bar_is_played_in_time():
    piece = Piece((Voice("C4:1 r:.5 E4+G4:.5 | C5:2"),), ((0, 60),), ((0, 60), (4, 80)), lead_in=0.5)
    notes = load_performance(perform(piece, 0)).notes
    assert sorted(notes["pitch"].tolist()) == [60, 64, 67, 72]
    by_pitch = {int(n["pitch"]): n for n in notes}
    expected = {60: (0.5, 1.0), 64: (2.0, 0.5), 67: (2.007, 0.493), 72: (2.5, 2.0)}
    for pitch, (onset, duration) in expected.items():
        assert by_pitch[pitch]["onset"] == pytest.approx(onset, abs=0.02)
        assert by_pitch[pitch]["duration"] == pytest.approx(duration, abs=0.03)
    assert by_pitch[72]["velocity"] > by_pitch[60]["velocity"]


def test_the_leading_voice_is_louder_and_earlier():
    voices = (Voice("C5:1 " * 40, 14), Voice("C3:1 " * 40))
    notes = load_performance(perform(Piece(voices, ((0, 120),), ((0, 60),)), 0)).notes
    melody, bass = notes[notes["pitch"] == 72], notes[notes["pitch"] == 48]
    assert melody["velocity"].mean() - bass["velocity"].mean() == pytest.approx(14, abs=2)
    assert (bass["onset"] - melody["onset"]).mean() == pytest.approx(0.021, abs=0.004)


def test_the_pedal_changes_after_the_bass():
    """Up once the new harmony has begun, down before 0.2 s: nothing of the old chord is caught, and no gap is heard."""
    piece = Piece((Voice("C3:2 G2"),), ((0, 60),), ((0, 60),), (0, 2), 4, lead_in=0.0)
    events = [(c.time / 960, c.value) for c in perform(piece, 0).tracks[0].controls]
    second = [(t, v) for t, v in events if 2.0 < t < 2.5]
    assert second[0][1] < 64 and second[0][0] < 2.03 and any(v >= 64 for t, v in second if t < 2.2)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_bundled_examples_are_what_the_code_writes(name, tmp_path):
    write_examples(tmp_path)
    written, bundled = (Score(str(folder / f"{name}.mid")) for folder in (tmp_path, ROOT / "space" / "examples"))
    assert written.tracks[0].notes.numpy()["pitch"].tolist() == bundled.tracks[0].notes.numpy()["pitch"].tolist()
    for field in ("time", "duration", "velocity"):
        difference = written.tracks[0].notes.numpy()[field] - bundled.tracks[0].notes.numpy()[field]
        assert np.abs(difference).max() <= 1  # other platforms may round the last digit otherwise


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_are_expressive(name):
    performance = load_performance(ROOT / "space" / "examples" / f"{name}.mid")
    assert np.ptp(performance.notes["velocity"]) > 30 and performance.report["extended_notes"] > 50
    assert 40 < performance.end < 80 and performance.report["unended_notes"] == 0


@pytest.mark.parametrize("music", sorted(PROMPT_MUSIC))
def test_prompt_music_shows_the_whole_piano(music):
    notes = load_performance(perform(PROMPT_MUSIC[music], 0)).notes
    heard = notes[notes["onset"] < 6.0]
    assert len(heard) == len(notes) >= 30, "music after 6 s would be cut off"
    assert heard["pitch"].min() <= 28 and heard["pitch"].max() >= 84
    assert heard["velocity"].min() <= 40 and heard["velocity"].max() >= 90


@pytest.fixture
def decaying_tones(tmp_path):
    """Pianos of one decaying tone."""
    for name in LICENCES:
        folder = tmp_path / name
        folder.mkdir()
        t = np.arange(8_000) / 32_000
        soundfile.write(folder / "a.wav", 0.9 * np.sin(2 * np.pi * 440 * t) * np.exp(-3 * t), 32_000)
        header = "file,key,lokey,hikey,lovel,hivel,onset_db,peak_db,seconds"
        (folder / "index.csv").write_text(f"{header}\na.wav,69,21,108,1,127,-20,0,1.0\n")


def test_prompts_are_rendered_whole(tmp_path, decaying_tones):
    """Six seconds, not clipped, not silent, the same each time."""
    output = tmp_path / "prompts"
    assert main(["prompts", "--piano", *(str(tmp_path / n) for n in LICENCES), "--output", str(output)]) == 0
    for prompt in PROMPTS:
        assert prompt.room in ROOMS and prompt.piano in LICENCES
        wave, rate = soundfile.read(output / f"{prompt.name}.flac")
        assert rate == 32_000 and len(wave) == 192_000
        assert 0.02 < np.abs(wave).max() < 0.99


def test_recordings_sound_as_the_prompt_does(tmp_path, decaying_tones):
    """25 s of an example; it begins with the noise of the prompt's own room."""
    pianos = [str(tmp_path / name) for name in LICENCES]
    for command in ("prompts", "recordings"):
        assert main([command, "--piano", *pianos, "--output", str(tmp_path / command)]) == 0
    assert {path.name for path in (tmp_path / "recordings").iterdir()} == {
        f"{a}_{b}_sampled.flac" for a, b in RECORDINGS
    }
    for example, name in RECORDINGS:
        wave, rate = soundfile.read(tmp_path / "recordings" / f"{example}_{name}_sampled.flac")
        assert rate == 32_000 and len(wave) == 800_000 and 0.02 < np.abs(wave).max() < 0.99
        prompt, _ = soundfile.read(tmp_path / "prompts" / f"{name}.flac")
        assert np.corrcoef(wave[:1_000], prompt[:1_000])[0, 1] > 0.99  # the noise, scaled by its whole


def test_bad_input_is_one_sentence_and_no_file(tmp_path, capsys, write_piano):
    """A piano that is missing, damaged or there twice; a file where a folder should be. Pianos play before any is
    replaced."""
    pianos = [str(write_piano(tmp_path / name, seconds=0.1)) for name in LICENCES]
    (tmp_path / "upright_kw" / "084_127.wav").write_bytes(b"")  # of the last prompts
    (tmp_path / "file").write_text("mine")
    prompts, out = ("prompts", "--piano"), str(tmp_path / "out")
    for arguments, message in (
        ((*prompts, pianos[0], "--output", out), "no piano named .*upright_kw"),
        ((*prompts, *pianos, pianos[0], "--output", out), "two have the same name"),
        ((*prompts, *pianos, "--output", out), "upright_kw: 084_127.wav cannot be read"),
        (("midi", "--output", str(tmp_path / "file")), "--output .*/file: is not a folder; give another --output"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1 and not Path(out).exists()
    assert (tmp_path / "file").read_text() == "mine"
