# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.evaluate` with a stand-in for the transcriber: what is compared, and what is written."""

import copy
import json
import os
import re
import shutil
import time
import types

import numpy as np
import pytest
import soundfile
import torch
from transformers import EncodecFeatureExtractor

from modeling_midivalle import (
    MidiValleConfig,
    MidiValleForConditionalGeneration,
    PianoListenerConfig,
    PianoListenerModel,
)
from processing import MidiValleProcessor
from scripts import evaluate
from scripts.measuring.transcription import TranscriptionError
from scripts.rendering.manifest import weights_sha256
from scripts.training.processes import FolderLock
from tokenization import NOTE_DTYPE, MidiValleTokenizer


@pytest.fixture
def transcriber(monkeypatch):
    """Hears the truth in the truth and nothing in any other wave; counts how often it was asked."""

    class Stub:
        asked, reference, truth = 0, None, None

        def __init__(self, device):
            assert device == "cpu"

        def __call__(self, wave, sampling_rate):
            assert sampling_rate == 32_000 and wave.shape == Stub.truth.shape
            Stub.asked += 1
            return Stub.reference if np.array_equal(wave, Stub.truth) else Stub.reference[:0]

    class Excerpt(evaluate.Excerpt):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            Stub.reference, Stub.truth = self.reference, self.wave

    monkeypatch.setattr(evaluate, "Transcriber", Stub)
    monkeypatch.setattr(evaluate, "Excerpt", Excerpt)
    monkeypatch.setattr(evaluate, "chroma_distance", lambda target, wave: 0.5)  # librosa comes with make install-eval
    return Stub


def run(pack, output, *more):
    arguments = ["--midi-root", str(pack / "midi"), "--piano", str(pack / "piano"), "--room", "studio"]
    arguments += ["--excerpts", "2", "--seconds", "1", "--prompt-seconds", "0.5", "--output-dir", str(output)]
    return evaluate.main([*arguments, *map(str, more)])


def test_a_model_is_scored_and_everything_is_kept(make_model, tiny_pack, transcriber, tmp_path, capsys):
    make_model("keys").save_pretrained(tmp_path / "model")
    processor = MidiValleProcessor(EncodecFeatureExtractor(1, 32_000), MidiValleTokenizer())
    processor.save_pretrained(tmp_path / "model")
    listener = PianoListenerModel(PianoListenerConfig(hidden_size=4))
    with torch.no_grad():
        listener.last.bias[0] = 0.0  # an untrained one that hears something
    listener.save_pretrained(tmp_path / "model" / "listener")
    output = tmp_path / "out"
    assert run(tiny_pack, output, "--model", tmp_path / "model", "--top-k", 5) == 0
    assert transcriber.asked == 10  # five systems, two excerpts
    results = json.loads((output / "results.json").read_text())
    assert list(results["summary"]) == ["truth", "codec", "codec_listened", "codec_told", "generated"]
    assert results["summary"]["codec_listened"]["nrmse"] != results["summary"]["codec"]["nrmse"]
    assert results["summary"]["truth"]["f1"][0] == 1.0 and results["summary"]["generated"]["f1"][0] == 0.0
    assert results["summary"]["truth"]["log_mel_db"][0] == 0.0 < results["summary"]["codec"]["log_mel_db"][0]
    about = results["codecs"]["codec"]
    assert all(0 < used <= 1 for used in about["used"])
    assert about["entropy_kbit_per_s"] < about["kbit_per_s"] == pytest.approx(2.2)
    assert results["summary"]["codec_told"]["nrmse"] != results["summary"]["codec"]["nrmse"]  # the notes are heard
    assert len(results["rows"]) == 10 and results["settings"]["top_k"] == 5
    made = results["made_with"]
    folders = {"codec": tmp_path / "model", "codec_listened": tmp_path / "model" / "listener"}
    assert made["weights_sha256"] == {name: weights_sha256(folder) for name, folder in folders.items()}
    assert made["torch"] == torch.__version__
    about = results["rows"][0]
    assert {about["target"], about["prompt"]} == {"0.mid", "1.mid"}
    assert 0 <= about["start_s"] <= 7.5 and 0 <= about["prompt_start_s"] <= 7.5
    lines = (output / "table.md").read_text().splitlines()
    assert lines[0].startswith("| system | f1 | precision | recall |") and len(lines) == 7
    assert lines[2].startswith("| truth | 1.000 ± ") and lines[0] in capsys.readouterr().out
    for index in range(2):
        for system in results["summary"]:
            wave, rate = soundfile.read(output / f"{index:02d}_{system}.flac")
            assert (rate, len(wave)) == (32_000, 32_000)
        assert (output / f"{index:02d}.png").stat().st_size > 10_000


def test_a_codec_is_told_as_when_the_model_generates(monkeypatch):
    """Strikes come late by `onset_delay_seconds`; but what makes generated tones fall after 3 s is not for codes of
    recordings."""
    codec = {"num_filters": 2, "hidden_size": 100, "num_lstm_layers": 1, "num_key_axes": 88, "num_oscillators": 16}
    config = MidiValleConfig.from_preset("tiny", codec)
    config.keys_from_midi, config.velocity_gain_db, config.sustain_gain_db = True, 20.0, 5.0
    model, seen = MidiValleForConditionalGeneration(config).eval(), []

    class Stream(evaluate.CodecStream):
        def push(self, codes, is_last, keys, vectors):
            seen.append((keys.struck[0], copy.deepcopy(self.dynamics)(keys).pitches[0]))
            return super().push(codes, is_last, keys, vectors)

    monkeypatch.setattr(evaluate, "CodecStream", Stream)
    notes = np.array([(0.01, 6.0, 36, 80)], NOTE_DTYPE)
    around = np.random.default_rng(0).standard_normal(8 * 32_000, np.float32)
    target = types.SimpleNamespace(notes=notes)
    excerpt = types.SimpleNamespace(around=around, lead=32_000, wave=around[32_000 : 7 * 32_000], target=target)
    for delay, frame in ((0.0, 50), (0.02, 51)):  # the excerpt begins with frame 50
        processor = MidiValleProcessor(
            EncodecFeatureExtractor(1, 32_000), MidiValleTokenizer(), onset_delay_seconds=delay
        )
        assert evaluate.reconstruct_told(model, processor, excerpt).shape == excerpt.wave.shape
        struck, gains = seen[-1]
        assert struck.nonzero().tolist() == [[frame, 36 - 21]]
        key = 2 * (36 - 28)  # its fundamental's channel: louder after a while, and as loud at 5.5 s as at 4 s
        assert gains[frame + 150, key] > 1.5 * gains[frame, key]
        torch.testing.assert_close(gains[frame + 275, key], gains[frame + 200, key], rtol=1e-3, atol=0)


def test_a_codec_that_changes_nothing_gives_the_excerpt(tiny_pack):
    """Of what is encoded and decoded around it; the listener hears all of that too."""

    class Codec:
        device = "cpu"

        def parameters(self):
            return iter([torch.zeros(1)])

        def encode_codes(self, around, struck=None):
            self.around, self.struck = around, struck
            return torch.zeros(1, 4, 125, dtype=torch.long)

        def decode_codes(self, codes):
            return self.around

        decode_steady = decode_codes

    arguments = evaluate.DataArguments("validation", 0.5, 1.0, 0, keep_audio=False)
    recordings = evaluate.RenderedRecordings(
        tiny_pack / "midi", "validation", [str(tiny_pack / "piano")], ["studio"], 0
    )
    excerpt, codec = evaluate.Excerpt(recordings, 0, arguments), Codec()
    wave, codes, speed = evaluate.reconstruct(codec, excerpt)
    assert np.array_equal(wave, excerpt.wave) and codes.shape == (4, 125) and codec.around.shape == (1, 1, 80_000)
    assert set(speed) == {"encode_x_real_time", "decode_x_real_time"}
    listener = types.SimpleNamespace(hear=lambda around: around.shape)
    assert np.array_equal(evaluate.reconstruct_listened(codec, listener, excerpt), excerpt.wave)
    assert codec.struck == (1, 1, 80_000)


def test_codes_are_waited_for(tiny_pack):
    """A GPU returns before it has made them: encoding lasts until they are here."""

    class Codes(np.ndarray):
        def cpu(self):
            time.sleep(0.1)
            return torch.from_numpy(np.asarray(self))

    class Codec:
        def parameters(self):
            return iter([torch.zeros(1)])

        def encode_codes(self, around):
            return np.zeros((1, 4, 50), int).view(Codes)

        def decode_codes(self, codes):
            return torch.zeros(1, 1, 32_000)

    wave = np.zeros(32_000, np.float32)
    excerpt = types.SimpleNamespace(around=wave, lead=0, wave=wave)
    _, codes, speed = evaluate.reconstruct(Codec(), excerpt)
    assert codes.shape == (4, 50) and speed["encode_x_real_time"] <= 10 < speed["decode_x_real_time"]


def test_what_is_generated_is_told_what_is_to_be_played(tiny_pack, monkeypatch):
    """Notes of the excerpt, of what sounds on into it too, its prompt, its seed; and silence behind what has ended."""
    arguments = evaluate.DataArguments("validation", 0.5, 1.0, 0, keep_audio=False)
    recordings = evaluate.RenderedRecordings(
        tiny_pack / "midi", "validation", [str(tiny_pack / "piano")], ["studio"], 0
    )
    excerpt, seen = evaluate.Excerpt(recordings, 0, arguments), []
    monkeypatch.setattr(evaluate, "render_wave", lambda *given: seen.append(given) or np.ones(20_000))
    processor = MidiValleProcessor(EncodecFeatureExtractor(1, 32_000), MidiValleTokenizer())
    wave = evaluate.synthesise("model", processor, excerpt, 1.0, 5, {"top_k": 3})
    assert wave.tolist() == [1.0] * 20_000 + [0.0] * 12_000
    ((model, _, piece, prompt, seed, ring_out, sampling),) = seen
    assert (model, seed, sampling) == ("model", 5, {"top_k": 3}) and 0 <= ring_out <= 1
    onsets, expected = piece.notes["onset"], excerpt.target.notes["onset"]
    assert np.array_equal(onsets, expected[expected < 1]) and onsets.min() < 0 <= piece.end
    assert np.array_equal(prompt.wave, excerpt.prompt.wave) and np.array_equal(prompt.notes, excerpt.prompt.notes)


def test_recordings_are_averaged_and_the_speed_is_a_median():
    """Two excerpts of one recording count as one; a column's mean is of its own system."""
    rows = [
        dict.fromkeys(evaluate.COLUMNS, value) | {"system": system, "recording_id": name, "colour_db": [value, 1.0]}
        for system, name, value in (("a", "x", 1.0), ("a", "x", 3.0), ("a", "y", 5.0), ("b", "x", 7.0))
    ]
    summary = evaluate.summarise(rows)
    assert list(summary) == ["a", "b"] and summary["a"]["f1"][0] == 3.5 and summary["b"]["nrmse"][0] == 7
    assert evaluate.colours(rows) == {"a": [3.0, 1.0], "b": [7.0, 1.0]}
    codec = types.SimpleNamespace(config=types.SimpleNamespace(codebook_size=4, hop_length=640))
    report = evaluate.codec_report(codec, [np.array([[0, 1], [0, 0]])] * 3, [{"s": s} for s in (1.0, 9.0, 2.0)])
    assert report["kbit_per_s"] == pytest.approx(0.2) and report["entropy_kbit_per_s"] == pytest.approx(0.05)
    assert report["s"] == 2 and report["used"] == [0.5, 0.25]


def test_a_mean_over_fewer_recordings_says_so():
    """Where few notes are found, or all of one velocity, there is no correlation."""
    rows = [
        dict.fromkeys(evaluate.COLUMNS, 0.5) | {"system": system, "recording_id": name, "velocity_correlation": value}
        for system, name, value in (("a", "x", 0.2), ("a", "y", 0.4), ("b", "x", 0.1), ("b", "y", float("nan")))
    ]
    first, second = evaluate.table(evaluate.summarise(rows), rows).splitlines()[2:]
    assert "| 0.300 ± " in first and " of 2)" not in first
    assert second.count(" of 2)") == 1 and "| 0.100 ± nan (1 of 2) |" in second


def test_damaged_models_are_named(make_model, tiny_pack, transcriber, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert run(tiny_pack, tmp_path / "out", "--model", tmp_path / "model") == 2
    assert "model.safetensors: is damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_codec_alone(tiny_pack, transcriber, tmp_path):
    assert run(tiny_pack, tmp_path / "out", "--codec", tiny_pack / "codec", "--excerpts", 1) == 0
    summary = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert list(summary) == ["truth", "codec"] and transcriber.asked == 2


def test_several_codecs_share_one_truth(tiny_pack, transcriber, tmp_path, capsys, monkeypatch):
    """Each is a system of its own; a second run takes the truth from the first, but only the same truth."""
    monkeypatch.setattr(evaluate, "plot", lambda *_: None)  # which takes longer than all the rest
    other = tmp_path / "other" / "codec"
    shutil.copytree(tiny_pack / "codec", other)
    codecs = ["--codec", tiny_pack / "codec", "--codec", other]
    assert run(tiny_pack, tmp_path / "one", *codecs) == 0
    first = json.loads((tmp_path / "one" / "results.json").read_text())
    names = [f"{tiny_pack.name}_codec", "other_codec"]
    assert list(first["summary"]) == ["truth", *names] and list(first["codecs"]) == names
    assert transcriber.asked == 6  # three systems, two excerpts
    assert first["summary"][names[0]]["si_snr_db"] == first["summary"][names[1]]["si_snr_db"]
    again = ["--truth", tmp_path / "one" / "results.json"]
    assert run(tiny_pack, tmp_path / "two", *codecs, *again) == 0
    assert transcriber.asked == 10  # the codecs only
    second = json.loads((tmp_path / "two" / "results.json").read_text())
    truths = [[row for row in results["rows"] if row["system"] == "truth"] for results in (first, second)]
    assert json.dumps(truths[0]) == json.dumps(truths[1])  # nan included
    assert run(tiny_pack, tmp_path / "three", *codecs, *again, "--seed", 1) == 0
    assert transcriber.asked == 16  # other audio, nothing known
    before = (tmp_path / "one" / "results.json").read_bytes()
    assert run(tiny_pack, tmp_path / "one", *codecs, *again, "--first", 2) == 2  # rows and truth stay as they are
    assert "one/results.json: exists already; give another --output-dir" in capsys.readouterr().err
    assert (tmp_path / "one" / "results.json").read_bytes() == before and transcriber.asked == 16
    assert run(tiny_pack, tmp_path / "four", "--codec", other, "--codec", other) == 2
    assert "given twice" in capsys.readouterr().err
    row = dict.fromkeys(evaluate.COLUMNS, "x") | {"system": "truth", "sha256": ["0"]}
    for content in ([], {"rows": [row | {"sha256": "0"}]}, {"rows": [row]}):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        assert run(tiny_pack, tmp_path / "four", *codecs, "--truth", tmp_path / "bad.json") == 2
        assert "not a results.json" in capsys.readouterr().err and not (tmp_path / "four").exists()


def test_whose_piano_it_sounds_like(tiny_pack, transcriber, tmp_path):
    """The truth is at no distance from its own piano; another piano plays the same notes with other partials."""
    bright = tmp_path / "bright"
    shutil.copytree(tiny_pack / "piano", bright)
    for path in bright.glob("*.wav"):
        sound, rate = soundfile.read(path)
        soundfile.write(path, 8 * np.abs(sound) * sound, rate)
    codec = ["--codec", tiny_pack / "codec"]
    assert run(tiny_pack, tmp_path / "out", *codec, "--piano", bright, "--excerpts", 3, "--seed", 1) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["colour_db"]["truth"] == [0.0] * 10 and np.abs(results["colour_db"]["codec"]).max() > 0.1
    assert results["own_piano"]["truth"] == 1.0 and set(results["own_piano"]) == {"truth", "codec"}
    truths = [row for row in results["rows"] if row["system"] == "truth"]
    assert {row["piano"] for row in truths} == {"piano", "bright"}  # both are drawn
    for row in truths:
        own = row["timbre_db"].pop(row["piano"])
        assert own == 0.0 < min(row["timbre_db"].values())
    twice = ["--piano", tiny_pack / "piano", "--excerpts", 1]
    assert run(tiny_pack, tmp_path / "alone", *codec, *twice) == 0  # of one piano there is nothing to say
    assert json.loads((tmp_path / "alone" / "results.json").read_text())["own_piano"] == {}


def test_the_reference_is_what_is_struck_in_the_excerpt(tiny_pack):
    """Notes that only sound on from before are no onsets; the reconstruction has the excerpt's length."""
    arguments = evaluate.DataArguments("validation", 0.5, 1.0, 0, keep_audio=False)
    recordings = evaluate.RenderedRecordings(
        tiny_pack / "midi", "validation", [str(tiny_pack / "piano")], ["studio"], 0
    )
    for index in range(4):
        excerpt = evaluate.Excerpt(recordings, index, arguments)
        assert len(excerpt.wave) == 32_000 and len(excerpt.prompt.wave) == 16_000
        onsets = excerpt.reference["onset"]
        assert ((onsets >= 0) & (onsets < 1)).all() and excerpt.reference.dtype == NOTE_DTYPE
        struck = excerpt.target.notes["onset"]
        assert len(onsets) == ((struck >= 0) & (struck < 1)).sum()


def test_music_that_ends_early(make_model, tiny_pack, transcriber, write_midi, tmp_path, capsys):
    """Greedy: a note and 11 s without one are rendered to their end; an excerpt without a note has no scores."""
    (tmp_path / "midi").mkdir()
    write_midi(tmp_path / "midi" / "short.mid", seconds=0.2, density=10)
    make_model().save_pretrained(tmp_path / "model")
    processor = MidiValleProcessor(EncodecFeatureExtractor(1, 32_000), MidiValleTokenizer())
    processor.save_pretrained(tmp_path / "model")
    options = ["--midi-root", tmp_path / "midi", "--seconds", 13, "--excerpts", 1, "--temperature", 0]
    assert run(tiny_pack, tmp_path / "out", "--model", tmp_path / "model", *options) == 0
    assert soundfile.info(tmp_path / "out" / "00_generated.flac").frames == 13 * 32_000
    held = evaluate.Performance(np.array([(0.0, 9.0, 60, 80)], NOTE_DTYPE), "held.mid", {})
    recordings = evaluate.RenderedRecordings(
        tmp_path / "midi", "validation", [tiny_pack / "piano"], ["studio"], 0, False
    )
    recordings.performances["short.mid"] = held.notes
    with pytest.raises(evaluate.EvaluationError, match="excerpt 0, short.mid from .* no note is struck in it"):
        evaluate.Excerpt(recordings, 0, evaluate.DataArguments("validation", 0.5, 1.0, 0, keep_audio=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--excerpts", 0), "--excerpts must be at least 1"),
        (("--first", -1), "--first and --seed at least 0"),
        (("--seconds", 0.3), "--seconds and --prompt-seconds must be multiples of 0.5"),
        (("--seconds", "nan"), "--seconds and --prompt-seconds must be multiples of 0.5"),
        (("--seconds", 1e9), "the former up to 600.0"),
        (("--prompt-seconds", 0), "--seconds and --prompt-seconds must be multiples of 0.5 above 0"),
        (("--prompt-seconds", 40), "the latter up to 15.0"),
        (("--device", "gpu"), "--device gpu: there is no such device"),
        (("--device", "meta"), "--device meta: there is no such device"),
    ],
)
def test_options_out_of_range(options, message, tiny_pack, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tiny_pack, tmp_path / "out", "--codec", tiny_pack / "codec", *options)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_run_a_folder(tiny_pack, transcriber, tmp_path, capsys, monkeypatch):
    """Also where the other run has begun, or ended, since this one looked; and an interrupted run says so."""
    codec, out = ("--codec", tiny_pack / "codec"), tmp_path / "out"
    with FolderLock(out):
        assert run(tiny_pack, out, *codec) == 2
    assert f"out: another run is at work here (pid {os.getpid()}); wait or stop it" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == [".lock"]
    load = evaluate.load

    def other(args):
        (out / "results.json").write_text("theirs")
        return load(args)

    monkeypatch.setattr(evaluate, "load", other)
    assert run(tiny_pack, out, *codec) == 2 and (out / "results.json").read_text() == "theirs"

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load", interrupt)
    assert run(tiny_pack, tmp_path / "new", *codec) == 130
    assert "interrupted; the excerpts that are finished are in" in capsys.readouterr().err


def test_what_would_be_taken_for_something_else(tiny_pack, transcriber, tmp_path, capsys):
    """Two pianos of one name, a codec of another sampling rate, a truth that is not there."""
    shutil.copytree(tiny_pack / "piano", tmp_path / "piano")
    shutil.copytree(tiny_pack / "codec", tmp_path / "fast")
    config = json.loads((tmp_path / "fast" / "config.json").read_text())
    config |= {"sampling_rate": 64_000, "target_bandwidths": [4.4]}  # as many codebooks
    (tmp_path / "fast" / "config.json").write_text(json.dumps(config))
    codec = ("--codec", tiny_pack / "codec")
    for options, message in (
        ((*codec, "--piano", tmp_path / "piano"), f"and {tmp_path / 'piano'}: have the same name; rename one of them"),
        ((*codec, "--codec", tmp_path / "fast"), "--codec: fast is a codec of 64000 Hz; excerpts have 32000"),
        ((*codec, "--truth", tmp_path / "none.json"), "--truth .*none.json: cannot be read .No such file"),
    ):
        assert run(tiny_pack, tmp_path / "out", *options) == 2
        assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--temperature", "--top-k", "--top-p"])
def test_a_codec_does_not_draw(option, tiny_pack, tmp_path, capsys):
    assert run(tiny_pack, tmp_path / "out", "--codec", tiny_pack / "codec", option, 1) == 2
    assert capsys.readouterr().err == f"error: {option} is for --model: a codec does not draw\n"


def test_refusals(tiny_pack, transcriber, tmp_path, capsys, monkeypatch):
    assert run(tiny_pack, tmp_path / "out", "--codec", tmp_path / "none") == 2
    assert run(tiny_pack, tmp_path / "out", "--codec", tiny_pack / "codec", "--piano", tmp_path / "none") == 2
    with pytest.raises(SystemExit, match="2"):
        run(tiny_pack, tmp_path / "out", "--codec", tiny_pack / "codec", "--room", "cellar")
    assert run(tiny_pack, tmp_path / "out", "--codec", tiny_pack / "codec", "--temperature", -1) == 2
    (tmp_path / "file").write_text("mine")
    assert run(tiny_pack, tmp_path / "file", "--codec", tiny_pack / "codec") == 2

    def missing(device):
        raise TranscriptionError("the transcriber is not installed: run `make install-eval`")

    monkeypatch.setattr(evaluate, "Transcriber", missing)
    assert run(tiny_pack, tmp_path / "out", "--codec", tiny_pack / "codec") == 2
    error = capsys.readouterr().err
    assert (
        "make install-eval" in error
        and error.count("\nerror: ") + error.startswith("error: ") == 5
        and not (tmp_path / "out").exists()
    )
