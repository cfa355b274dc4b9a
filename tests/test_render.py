# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.render`: exact lengths, same seed same file, and one sentence for everything it cannot use."""

import errno
import gc
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import wave as wave_module
import weakref
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from symusic import Note, Score, Tempo, Track
from transformers import EncodecFeatureExtractor

from modeling_midivalle import MidiValleConfig, MidiValleForConditionalGeneration
from modeling_midivalle.generation_midivalle import GeneratedFrames
from processing import AudioError, MidiValleProcessor, read_audio, write_audio
from scripts import plots, render
from scripts.measuring.transcription import TranscriptionError
from scripts.models import model_folder
from scripts.rendering import files, manifest, pieces
from scripts.rendering.arguments import RenderError, build_parser
from scripts.rendering.decoding import Decoding
from scripts.rendering.journal import Journal, journal_threads
from scripts.rendering.pcm_stream import PcmStream
from scripts.rendering.verification import compare
from tokenization import NOTE_DTYPE, MidiValleTokenizer, load_performance

ROOT = Path(__file__).resolve().parents[1]
RATE = 32_000


def save_midi(path, *notes, tempos=((0, 120),)):
    """Notes of (onset s, duration s, pitch); tempos of (s, bpm) that change nothing but the ticks."""
    score, track = Score(480, ttype="second"), Track(ttype="second")
    for time, tempo in tempos:
        score.tempos.append(Tempo(time, tempo, ttype="second"))
    for onset, duration, pitch in notes:
        track.notes.append(Note(onset, duration, pitch, 80, ttype="second"))
    score.tracks.append(track)
    score.to("tick").dump_midi(str(path))


def noise(seconds, level=0.1):
    return level * np.random.default_rng(0).standard_normal(round(seconds * RATE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as it lies on the Hub, with a tiny random model, whose codec the MIDI tells which keys are struck,
    and two prompts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = MidiValleConfig.from_preset(
        "tiny",
        {"num_filters": 2, "hidden_size": 100, "num_lstm_layers": 1, "num_key_axes": 88, "num_oscillators": 16},
    )
    config.keys_from_midi, config.velocity_gain_db = True, 30.0
    config.treble_gain_db, config.octave_gain_db, config.attack_gain_db = 20.0, 6.0, 3.0
    config.sustain_gain_db = 5.0
    model = MidiValleForConditionalGeneration(config)
    for layer in model.codec.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)
    model.config.mean_vectors = True
    model.save_pretrained(folder)
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=RATE)
    MidiValleProcessor(extractor, MidiValleTokenizer()).save_pretrained(folder)
    (folder / "prompts").mkdir()
    entries = []
    for i, name in enumerate(("steinway_studio", "upright_hall")):
        save_midi(folder / "prompts" / f"{name}.mid", (0.0, 1.0, 60 + i))
        write_audio(folder / "prompts" / f"{name}.flac", noise(1.5 + i), RATE)
        entries.append(
            {"name": name, "description": f"No. {i}", "piano": "p", "room": "r", "licence": "CC0", "more": 1}
        )
    (folder / "prompts" / "prompts.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    """`run("piece.mid", "out.wav", ...)` -> exit code, stdout, stderr; in a folder of its own, with the tiny model."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        code = render.main([*map(str, arguments), "--model", str(folder), "--device", "cpu"])
        return code, *capsys.readouterr()

    return command


def test_a_name_that_the_terminal_cannot_show_is_no_failure(run, monkeypatch):
    save_midi("曲.mid", (0.0, 0.5, 60))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert run("曲.mid", "曲.wav")[0] == 0 and Path("曲.wav").is_file()
    sys.stdout.flush()
    assert rb"\u66f2.wav: " in sys.stdout.buffer.getvalue()


def test_exact_length_with_leading_silence(run):
    """Nine tenths of a second of silence, the last note ends at 2.3037 s: the file is that plus the ring-out long."""
    save_midi("piece.mid", (0.9, 0.5, 60), (1.8, 0.5037, 64))
    end = render_end("piece.mid")
    code, out, err = run("piece.mid", "out.wav", "--ring-out", "0.4")
    assert code == 0, err
    wave, rate = read_audio("out.wav")
    assert (rate, wave.shape) == (RATE, (round((end + 0.4) * RATE), 1)) and np.abs(wave).max() > 0
    assert soundfile.info("out.wav").subtype == "PCM_16" and "prompt steinway_studio" in out


def render_end(path):
    return load_performance(path).end


def test_same_seed_same_file_and_choices(run):
    save_midi("piece.mid", (0.0, 0.3, 60), tempos=((0, 70), (0.1, 140)))
    files = {}
    options = {
        "a.flac": ("--temperature", 0.9),
        "b.flac": ("--temperature", 0.9, "--seed", 0, "--prompt", "steinway_studio"),
        "seed.flac": ("--temperature", 0.9, "--seed", 1),
        "default.flac": ("--seed", 2),
        "prompt.flac": ("--prompt", "upright_hall", "--temperature", 3, "--top-k", 0, "--top-p", 1),
        "greedy.flac": ("--temperature", 0),
        "greedy_seed.flac": ("--temperature", 0, "--seed", 5),
    }
    for name, arguments in options.items():
        code, _, err = run("piece.mid", name, "--ring-out", "0.1", *arguments)
        assert code == 0, err
        files[name] = read_audio(name)[0].tobytes()
    assert files["a.flac"] == files["b.flac"]
    assert files["greedy.flac"] == files["greedy_seed.flac"] == files["default.flac"]
    assert len(set(files.values())) == 4


def test_spans_and_own_prompts(run):
    """From 20.3 to 21.05 s of a note that sounds on: clipped there; an own prompt of any rate."""
    save_midi("piece.mid", (0.0, 40.0, 60), (20.5, 30.0, 62))
    save_midi("p.mid", (0.2, 1.0, 50))
    write_audio("p.wav", noise(1.7), 44_100)
    span = ("--start", 20.3, "--end", 21.05, "--ring-out", 0.25)
    code, out, err = run("piece.mid", "out.wav", *span, "--prompt-audio", "p.wav", "--prompt-midi", "p.mid")
    assert code == 0, err
    assert len(read_audio("out.wav")[0]) == RATE and "own prompt" in out


def test_says_once_what_is_left_out_and_clipped(folder, run, tmp_path, capsys):
    """Two drum notes, a key below the piano and, by a model without held rows, what is beyond 6 s of a note: one line;
    nothing if all is rendered."""
    save_midi("piece.mid", (0.0, 0.4, 60), (0.1, 0.2, 15), (7.5, 6.8, 60))
    score, drums = Score("piece.mid"), Track(is_drum=True, ttype="tick")
    drums.notes.extend([Note(0, 10, 36, 80, ttype="tick"), Note(20, 10, 36, 80, ttype="tick")])
    score.tracks.append(drums)
    score.dump_midi("piece.mid")
    code, _, err = run("piece.mid", "out.wav", "--ring-out", "0")
    said = [line for line in err.splitlines() if line.startswith("render: ")]
    keys = "outside the piano's keys 21 to 108"
    left_out = f"render: piece.mid: left out notes: 2 on a drum track, 1 {keys}"
    assert code == 0 and said == [left_out] and err.count("left out") == 1
    plain = shutil.copytree(folder, tmp_path / "plain")
    MidiValleTokenizer(mark_held=False).save_pretrained(plain)
    assert render.main(["piece.mid", "other.wav", "--ring-out", "0", "--model", str(plain), "--device", "cpu"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("render: ")]
    assert said == [f"{left_out}; notes that sound for more than 6 s in one window are clipped there (1 time)"]
    save_midi("piece.mid", (0.0, 0.4, 60))
    code, out, err = run("piece.mid", "out.wav", "--ring-out", "0", "--force")
    assert code == 0 and "render:" not in err and out.startswith("out.wav: 0.400 s, 1 note, 1 window, "), out


def test_render_is_what_the_model_streams(folder, run):
    """The file holds, sample for sample, what `model.generate` makes of the processor's inputs, of several windows."""
    processor, model = model_folder.load_processor(folder), model_folder.load_model(folder, "cpu")
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(14)])
    options = ("--seed", 7, "--temperature", 1.0, "--top-k", 5, "--ring-out", 0, "--prompt", "upright_hall")
    code, out, err = run("piece.mid", "out.wav", *options)
    assert code == 0 and "3 windows" in out, err
    prompt = (folder / "prompts/upright_hall.mid", folder / "prompts/upright_hall.flac")
    inputs = processor("piece.mid", *prompt)
    whole = model.generate(**inputs, seed=7, temperature=1.0, top_k=5)[0, 0]
    wave = read_audio("out.wav")[0][:, 0]
    assert len(wave) == round(render_end("piece.mid") * RATE)
    assert np.abs(wave - whole.numpy()[: len(wave)]).max() <= 1.51 / 32768  # 16 bits


def test_lists_prompts(run):
    assert run("--list-prompts") == (0, "steinway_studio (default): No. 0 [CC0]\nupright_hall: No. 1 [CC0]\n", "")


PROMPT_MIDI = ("--prompt-midi", "good.mid", "--prompt-audio")
BAD = {
    "empty file": (("empty.mid",), "empty.mid: the file is empty"),
    "text renamed": (("text.mid",), "text.mid: not a MIDI file"),
    "no notes": (("silent.mid",), "silent.mid: holds no notes"),
    "missing file": (("missing.mid",), "missing.mid: no such file"),
    "a folder": ((".",), "not a regular file"),
    "silent prompt": (("good.mid", *PROMPT_MIDI, "silence.wav"), "silence.wav: .* silence"),
    "short prompt": (("good.mid", *PROMPT_MIDI, "short.wav"), "short.wav: lasts 0.200 s"),
    "prompt without audio": (("good.mid", "--prompt-midi", "good.mid"), "add --prompt-audio"),
    "prompt MIDI elsewhere": (("good.mid", "--prompt-audio", "noise.wav", "--prompt-midi", "late.mid"), "no note"),
    "Ogg prompt": (("good.mid", *PROMPT_MIDI, "p.ogg"), "convert it to WAV or FLAC"),
    "missing prompt": (("good.mid", *PROMPT_MIDI, "no.wav"), "no.wav: no such file"),
    "two prompts": (("good.mid", "--prompt", "a", *PROMPT_MIDI, "noise.wav"), "not both"),
    "unknown prompt": (("good.mid", "--prompt", "harp"), "not one of steinway_studio, upright_hall"),
    "start behind the end": (("good.mid", "--start", "9"), "good.mid: no note sounds from 9.0 s on"),
    "span before the first note": (("late.mid", "--end", "3"), "no note sounds between 0.0 and 3.0 s"),
    "notes that never end": (("unended.mid",), r"unended.mid: holds no notes that end \(note-ons: 1\); export"),
    "format of a file": (("good.mid", "--format", "flac"), "--format is for --output-dir"),
    "threshold": (("good.mid", "--verify-threshold", "7"), "--verify-threshold be 0 to 1"),
    "end before start": (("good.mid", "--start", "0.4", "--end", "0.2"), "0 <= start < end"),
    "ring-out": (("good.mid", "--ring-out", "-1"), "ring-out of -1.0 s"),
    "temperature": (("good.mid", "--temperature", "-1"), "--temperature"),
    "top-k": (("good.mid", "--top-k", "-1"), "--top-k"),
    "top-p": (("good.mid", "--top-p", "0"), "--top-p"),
    "seed": (("good.mid", "--seed", "-1"), "--seed"),
}  # fmt: skip


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "empty.mid").write_bytes(b"")
    (tmp_path / "text.mid").write_text("This is not music.\n")
    save_midi(tmp_path / "silent.mid")
    save_midi(tmp_path / "good.mid", (0.0, 0.3, 60))
    save_midi(tmp_path / "late.mid", (5.0, 0.3, 60))
    unended = bytes.fromhex("4d546864 00000006 0000 0001 01e0 4d54726b 00000008 00903c40 00ff2f00")
    (tmp_path / "unended.mid").write_bytes(unended)
    write_audio(tmp_path / "silence.wav", np.zeros(3 * RATE))
    write_audio(tmp_path / "short.wav", noise(0.2))
    write_audio(tmp_path / "noise.wav", noise(2))
    soundfile.write(tmp_path / "p.ogg", noise(2), RATE)
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case, run, inputs):
    (source, *options), message = BAD[case]
    before = sorted(os.listdir())
    code, out, err = run(source, "out.wav", *options)
    assert (code, out) == (2, "") and sorted(os.listdir()) == before
    assert err.startswith("render: ") and err.count("\n") == 1
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("good.mid", "out.mp3"), r"out.mp3: the output must end in .wav or .flac"),
        (("good.mid", "no/out.wav"), "the folder no does not exist"),
        (("good.mid", "noise.wav"), "noise.wav: exists already; add --force"),
        (("good.mid", "nowhere.wav"), "nowhere.wav: exists already; add --force"),
        (("good.mid", ""), "'' names no file: give OUTPUT.wav"),
        (("good.mid", "folder.wav", "--force"), "folder.json: is a folder; give the output another name"),
        (("good.mid", "folder.json"), "folder.json: is a folder; give a file in it, or --output-dir folder.json"),
        (("good.mid",), "give INPUT.mid and OUTPUT.wav"),
        (("good.mid", "a.wav", "b.wav"), "give INPUT.mid and OUTPUT.wav"),
        ((), "give INPUT.mid and OUTPUT.wav"),
    ],
)
def test_bad_outputs(arguments, message, run, inputs):
    (inputs / "folder.json").mkdir()
    (inputs / "nowhere.wav").symlink_to("absent.wav")
    before = {path.name: path.is_file() and path.read_bytes() for path in inputs.iterdir()}
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert {path.name: path.is_file() and path.read_bytes() for path in inputs.iterdir()} == before


def test_a_name_that_no_file_can_be_written_by():
    """It is read from the system, but libsndfile does not take it; that would be found when all has been rendered."""
    task = files.Task(Path("\udcff.mid"), Path("out/\udcff.wav"))
    with pytest.raises(RenderError, match="its name is not UTF-8; rename \udcff.mid, or"):
        files.check_names(build_parser("").parse_args([]), task, [])


def test_force_replaces(run, inputs):
    assert run("good.mid", "noise.wav", "--force", "--ring-out", "0.1")[0] == 0
    assert len(read_audio("noise.wav")[0]) == round((render_end("good.mid") + 0.1) * RATE)


def test_bad_models(folder, inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    (inputs / "hollow").mkdir()
    (inputs / "hollow" / "config.json").write_text('{"model_type": "midivalle"}')
    shutil.copytree("hollow", "cut")
    (inputs / "cut" / "generation_config.json").write_text('{"do_sample": fal')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub is asked"))
    for model, message in (
        ("nowhere", "no such folder, and not a Hub id"),
        *((place, f"--model {place}: no such folder, and not a Hub id") for place in ("./where", "/where", "~/where")),
        ("checkpoints/starter", "no such folder, and not a Hub id"),  # nobody's there, or a stranger's
        (str(inputs), "holds no config.json"),
        ("hollow", "hollow: no processor can be loaded"),
        ("cut", "cut/generation_config.json: is damaged (not a JSON object); copy or download it again"),
    ):
        assert render.main(["good.mid", "out.wav", "--model", model]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err, err
    if not torch.cuda.is_available():
        assert render.main(["good.mid", "out.wav", "--model", str(folder), "--device", "cuda"]) == 2
        assert "no GPU" in capsys.readouterr().err
    assert not (inputs / "out.wav").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"a": 1}',
        '[{"name": "x"}]',
        json.dumps([dict.fromkeys(model_folder.NamedPrompt.__dataclass_fields__, "../x")]),
    ],
)
def test_bad_prompt_lists(text, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "prompts.json").write_text(text)
    with pytest.raises(model_folder.FolderError, match="prompts.json"):
        model_folder.read_prompts(tmp_path)


def test_damaged_weights(folder, tmp_path):
    """A missing or a broken weight is named; transformers alone would start it anew or use it."""
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.startswith("nar.") and key.endswith("linear1.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(model_folder.FolderError, match=f"do not fit the configuration.*{name}"):
        model_folder.load_model(tmp_path / "model", "cpu")
    save_file(weights | {name: weights[name] * torch.nan}, path, {"format": "pt"})
    with pytest.raises(model_folder.FolderError, match=f"not finite: {name}"):
        model_folder.load_model(tmp_path / "model", "cpu")
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(model_folder.FolderError, match="model.safetensors: is damaged"):
        model_folder.load_model(tmp_path / "model", "cpu")
    save_file(weights, path, {"format": "pt"})
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["ar_config"]["num_attention_heads"] = 7  # refused by the strict configuration, which is no ValueError
    path.write_text(json.dumps(config))
    with pytest.raises(model_folder.FolderError, match="no model can be loaded .hidden_size 32 is not a multiple"):
        model_folder.load_model(tmp_path / "model", "cpu")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"colour_gains_db": [1]}),
        ("config.json", {"velocity_gain_db": "a"}),
        ("config.json", {"ar_config": {"hidden_size": 33}}),
        ("config.json", {"nar_config": {"frame_note_offsets": []}}),
        ("processor_config.json", {"context_seconds": "x"}),
        ("processor_config.json", {"onset_delay_seconds": None}),
    ],
)
def test_a_configuration_that_contradicts_itself_is_one_sentence(folder, tmp_path, capsys, file, change):
    path = shutil.copytree(folder, tmp_path / "model") / file
    config = json.loads(path.read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    save_midi(tmp_path / "a.mid", (0.0, 0.4, 60))
    words = [tmp_path / "a.mid", tmp_path / "a.wav", "--model", path.parent, "--device", "cpu"]
    assert render.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "can be loaded (" in said and not (tmp_path / "a.wav").exists()


def test_hub_ids(folder, monkeypatch):
    """Data of a Hub repository is fetched, its code is not; what the Hub says is one line."""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "me/lost":
            raise OSError("404\nlong story")
        if name == "me/behind-a-proxy":
            raise httpx2.ProxyError("403 Forbidden")  # no OSError
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder.model_folder("me/model") == folder
    assert asked == [("me/model", ["*.json", "*.safetensors", "prompts/*", "README.md"])]
    with pytest.raises(model_folder.FolderError, match=r"--model me/lost: cannot be downloaded \(404\)"):
        model_folder.model_folder("me/lost")
    with pytest.raises(model_folder.FolderError, match=r"--model me/behind-a-proxy: cannot be downloaded \(403 Forb"):
        model_folder.model_folder("me/behind-a-proxy")


def test_published_rules(run, monkeypatch):
    """--compat reaches the model, which sets the length; more than one window or weights of ours are refused."""
    save_midi("piece.mid", (0.0, 1.0, 60))
    code, _, err = run("piece.mid", "no.wav", "--compat", "published")
    assert code == 2 and "for weights without a BOS frame" in err and not Path("no.wav").exists()
    asked = {}

    def generate_frames(self, *arguments, **options):
        asked.update(options)
        return GeneratedFrames(torch.zeros(1, 4, 7, dtype=torch.long), None)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "generate_frames", generate_frames)
    code, out, err = run("piece.mid", "out.wav", "--compat", "published", "--seed", 5)
    assert code == 0 and asked["compat"] == "published" and asked["seed"] == [5], err
    assert soundfile.info("out.wav").frames == 7 * 640 and "0.140 s" in out
    save_midi("long.mid", (0.0, 1.0, 60), (40.0, 1.0, 60))
    code, _, err = run("long.mid", "no.wav", "--compat", "published")
    assert code == 2 and "renders one segment of at most" in err
    monkeypatch.setattr(files, "batch_rows", lambda *_: 64)  # as on a GPU
    save_midi("other.mid", (0.0, 1.0, 62))
    code, _, err = run("piece.mid", "other.mid", "--output-dir", "both", "--compat", "published", "--seed", 5)
    assert code == 0 and asked["seed"] == [5] and len(list(Path("both").glob("*.wav"))) == 2, err


def start_render(folder, *arguments, **options):
    command = [sys.executable, "-m", "scripts.render", *map(str, arguments), "--model", str(folder), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def samples_of(path):
    return soundfile.read(path, dtype="int16")[0]


@pytest.mark.parametrize("raw", [False, True])
def test_a_stream_writes_pcm(raw, monkeypatch):
    """16 bit, with or without a WAV header; louder samples are clipped; all is there when it is closed, though the
    system may take a part at a time."""
    source, sink = os.pipe()
    monkeypatch.setattr(os, "write", lambda descriptor, data, write=os.write: write(descriptor, data[:999]))
    wave = np.tile(np.array([-1.5, -1.0, -0.5, 0.25, 1.5], np.float32), 1000)
    stream = PcmStream(sink, RATE, 5000, raw, lambda: None)
    stream.write(wave[:3000])
    stream.write(wave[3000:])
    stream.close()
    os.close(sink)
    with open(source, "rb") as file:
        data = file.read()
    if not raw:
        with wave_module.open(io.BytesIO(data)) as file:
            assert file.getparams()[:4] == (1, 2, RATE, 5000)
            data = file.readframes(5000)
    assert np.frombuffer(data, "<i2").tolist() == [-32767, -32767, -16384, 8192, 32767] * 1000 and stream.first_at > 0
    assert stream.peak == 1.5  # what is told in the end


@pytest.mark.parametrize(("raw", "size"), [(False, 44), (True, 0)])
def test_a_stream_without_audio(raw, size):
    """Still a file of sound, of no samples; nothing was heard."""
    source, sink = os.pipe()
    stream = PcmStream(sink, RATE, 0, raw, lambda: None)
    stream.close()
    os.close(sink)
    with open(source, "rb") as file:
        assert len(file.read()) == size and np.isnan(stream.first_at)


@pytest.mark.parametrize(("peak", "said"), [(1.0, ""), (2.0, "; clipped by up to 6.0 dB: a file is turned down")])
def test_a_clipped_stream_is_told(peak, said):
    stream, job = SimpleNamespace(peak=peak, first_at=2.0), SimpleNamespace(windows=[(0.0, 1.0), (1.0, 3.0)])
    told = files.describe_stream(SimpleNamespace(begin=0.0), stream, 1.0, [2.0, 3.0], job)
    assert told.endswith(f"1.5x real time{said}")


def test_a_stream_notices_that_nobody_reads():
    """Also while it waits for audio, and while it is full; nothing blocks then."""
    for chunks in (0, 100):
        source, sink = os.pipe()
        gone = threading.Event()
        stream = PcmStream(sink, RATE, None, False, gone.set)
        os.close(source)
        for _ in range(chunks):
            stream.write(np.zeros(RATE, np.float32))
        assert gone.wait(10) and stream.gone
        stream.write(np.zeros(RATE, np.float32))
        stream.close()
        os.close(sink)


@pytest.mark.slow
def test_streaming(folder, tmp_path):
    """WAV and raw PCM on standard output, with and without a file: the same samples; times are told on stderr."""
    save_midi(tmp_path / "piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(14)])
    options = (tmp_path / "piece.mid", "--ring-out", 0.3, "--stream", "-")
    out, err = start_render(folder, *options, tmp_path / "piece.wav").communicate()
    raw, _ = start_render(folder, *options, "--raw").communicate()
    assert out, err
    whole = samples_of(tmp_path / "piece.wav")
    assert len(whole) == round((render_end(tmp_path / "piece.mid") + 0.3) * RATE)
    streamed, rate = soundfile.read(io.BytesIO(out), dtype="int16")
    assert rate == RATE and np.array_equal(streamed, whole) and len(out) == 44 + 2 * len(whole)
    assert np.array_equal(np.frombuffer(raw, "<i2"), whole)
    assert re.search(rb"first audio after \d+\.\d\d s.*real time", err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["piece.json", "piece.mid", "piece.wav"]


def test_a_consumer_that_goes_ends_the_render(folder, tmp_path):
    """It reads a little and is gone: the process ends by itself, soon, without error, and leaves nothing."""
    save_midi(tmp_path / "long.mid", *[(t / 2, 0.3, 60 + t % 12) for t in range(1200)])
    process = start_render(folder, tmp_path / "long.mid", "--stream", "-")
    assert process.stdout.read(44 + 2000)[:4] == b"RIFF"
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert b"the reader of the stream has gone" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["long.mid"]


@pytest.mark.slow
def test_a_file_beside_the_stream_is_finished_without_the_consumer(folder, tmp_path):
    save_midi(tmp_path / "piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(14)])
    process = start_render(folder, tmp_path / "piece.mid", tmp_path / "piece.wav", "--stream", "-")
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert len(samples_of(tmp_path / "piece.wav")) == round((render_end(tmp_path / "piece.mid") + 2.0) * RATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["piece.json", "piece.mid", "piece.wav"]


def counted(monkeypatch):
    """Windows that are generated from now on, as a list of batch sizes."""
    calls, real = [], MidiValleForConditionalGeneration.generate_frames

    def generate_frames(self, ids, *arguments, **options):
        calls.append(len(ids))
        return real(self, ids, *arguments, **options)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "generate_frames", generate_frames)
    return calls


def interrupt_after(monkeypatch, windows):
    """Ctrl-C when so many windows have been generated."""
    real, left = MidiValleForConditionalGeneration.generate_frames, [windows]

    def generate_frames(self, *arguments, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(self, *arguments, **options)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "generate_frames", generate_frames)


def test_an_interrupted_render_goes_on_where_it_stopped(run, monkeypatch):
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(14)])
    options = ("--temperature", 1, "--ring-out", 0)
    assert run("piece.mid", "whole.wav", *options)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        code, _, err = run("piece.mid", "piece.wav", *options)
    assert code == 130 and "start it again to go on" in err
    journal = Path(".piece.wav.windows")
    assert not Path("piece.wav").exists() and journal.exists()
    damaged = Path("damaged")  # numbers of threads that would end the process are not taken
    for threads, told in (("1", 1), ("99999999", None), ("-3", None), ("two", None)):
        damaged.write_text(f"key {threads}\n")
        assert journal_threads(damaged) == told
    journal.write_bytes(journal.read_bytes()[:-3])  # cut short by a kill: that window is made again
    calls = counted(monkeypatch)
    code, out, err = run("piece.mid", "piece.wav", *options)
    assert code == 0 and len(calls) == 2 and "1 window there already" in out, err
    assert Path("piece.wav").read_bytes() == Path("whole.wav").read_bytes() and not journal.exists()
    with monkeypatch.context() as patch:  # what an earlier render with other settings has left is not used
        interrupt_after(patch, 2)
        run("piece.mid", "other.wav", *options)
    calls.clear()
    code, _, err = run("piece.mid", "other.wav", *options, "--seed", 1)
    assert code == 0 and len(calls) == 3 and "render: .other.wav.windows: is of other settings" in err


@pytest.mark.parametrize(
    ("place", "count", "remark"),
    [
        (0, 0, "is of other settings or another version, or damaged"),  # the key
        (12, 0, "window 1 is damaged"),  # the attempt
        (110, 1, "window 2 is damaged"),  # a code, still a number that could be
        (150, 1, "window 2 is damaged"),  # a vector
        (-1, 2, "window 3 is damaged"),  # a checksum
    ],
)
def test_a_damaged_journal(place, count, remark, tmp_path):
    """The windows before the damage are used, the others made anew, with a word; then the file is whole again."""
    path, codes, vectors = tmp_path / ".piece.wav.windows", np.arange(16).reshape(2, 8), np.arange(24).reshape(3, 8)

    def go_on():
        return Journal(path, "key 1", 2, [8, 8, 8], 3)

    journal = go_on()
    for _ in range(3):
        journal.append(1, codes, vectors)
    journal.close()
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    journal = go_on()
    assert len(journal.windows) == count and f".piece.wav.windows: {remark}" in journal.remark
    for attempt, *arrays in journal.windows:
        assert attempt == 1 and all(map(np.array_equal, arrays, (codes, vectors)))
    for _ in range(3 - count):
        journal.append(1, codes, vectors)
    journal.close()
    assert path.read_bytes() == whole and go_on().remark == ""
    path.write_bytes(whole[:-1])  # cut short by a kill, not damaged
    journal = go_on()
    assert len(journal.windows) == 2 and journal.remark == ""


def test_a_journal_of_the_version_before(tmp_path):
    """It has no checksums: begun anew, with a word. One that was cut short within its head has lost nothing."""
    path = tmp_path / ".piece.wav.windows"
    path.write_bytes(b"key 1\n" + bytes(34))
    journal = Journal(path, "key 1", 2, [8])
    assert journal.windows == [] and "another version" in journal.remark and journal_threads(path) == 1
    for cut in (b"", b"key 1 c"):
        journal.close()
        path.write_bytes(cut)
        journal = Journal(path, "key 1", 2, [8])
        assert (journal.windows, journal.remark) == ([], "")


def test_what_is_there_is_not_replaced_unasked(run):
    """Not a file that only has a manifest's name either."""
    save_midi("piece.mid", (0.0, 0.5, 60))
    Path("out").mkdir()
    Path("out/piece.json").write_text("mine")
    code, _, err = run("piece.mid", "--output-dir", "out", "--ring-out", "0.2")
    assert code == 2 and "piece.json: exists already" in err and Path("out/piece.json").read_text() == "mine"
    assert not Path("out/piece.wav").exists()


def test_a_report_that_is_there_is_not_replaced_unasked(run):
    save_midi("piece.mid", (0.0, 0.5, 60))
    Path("piece.report.json").write_text("mine")
    code, _, err = run("piece.mid", "piece.wav", "--verify")
    assert code == 2 and "piece.report.json: exists already" in err and Path("piece.report.json").read_text() == "mine"


def test_a_disk_that_is_full_leaves_no_journal(run, monkeypatch):
    save_midi("piece.mid", (0.0, 0.5, 60))

    def full(*arguments):
        journal = Journal(*arguments)
        journal.head = Full(journal.head)
        return journal

    class Full(bytes):
        def __add__(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "Journal", full)
    code, _, err = run("piece.mid", "piece.wav", "--ring-out", "0.2")
    assert code == 2 and ".piece.wav.windows: cannot be written (No space left on device); make room" in err
    assert os.listdir() == ["piece.mid"]


def test_a_name_that_is_too_long_is_one_sentence(run):
    save_midi("piece.mid", (0.0, 0.5, 60))
    for length in (300, 240):  # the latter with what is added while the file is being made
        code, _, err = run("piece.mid", "x" * length + ".wav")
        assert code == 2 and "too long" in err and err.count("\n") == 1


def test_a_stream_that_cannot_be_written_is_no_success():
    read, write = os.pipe()
    gone = threading.Event()
    stream = PcmStream(read, 32_000, None, True, gone.set)  # a reader's descriptor: writing fails, but nobody has gone
    stream.write(np.zeros(640, np.float32))
    assert gone.wait(5) and stream.gone
    with pytest.raises(RenderError, match="cannot be written"):
        files.refuse_broken(stream)
    os.close(read), os.close(write)


@pytest.mark.parametrize(("name", "value"), [("quantize", "int8"), ("dtype", "bfloat16")])
def test_other_numbers_are_recorded_and_made_again(run, monkeypatch, name, value):
    save_midi("piece.mid", (0.0, 0.5, 60))
    real, seen = MidiValleForConditionalGeneration.generate_frames, []

    def generate_frames(self, *args, **kwargs):
        seen.append({"quantize": self.nar.config.quantization, "dtype": str(self.ar.dtype).removeprefix("torch.")})
        assert self.codec.dtype == torch.float32
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "generate_frames", generate_frames)
    usual = {"quantize": None, "dtype": "float32"}
    assert run("piece.mid", "usual.wav", "--ring-out", "0.2")[0] == 0 and seen.pop() == usual and not seen
    assert run("piece.mid", "other.wav", "--ring-out", "0.2", f"--{name}", value)[0] == 0
    settings = [json.loads(Path(file).read_text())["recipe"]["settings"] for file in ("usual.json", "other.json")]
    assert usual.items() <= settings[0].items() and (usual | {name: value}).items() <= settings[1].items()
    assert run("again.wav", "--from-manifest", "other.json")[0] == 0 and seen == [usual | {name: value}] * 2
    assert Path("again.wav").read_bytes() == Path("other.wav").read_bytes()


def test_the_sound_is_as_recorded_on_demand(run):
    """The manifest keeps it."""
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(8)])
    assert run("piece.mid", "plain.wav", "--ring-out", 0.2)[0] == 0
    assert run("piece.mid", "equal.wav", "--ring-out", 0.2, "--as-recorded")[0] == 0
    plain, equal = (soundfile.read(name)[0] for name in ("plain.wav", "equal.wav"))
    assert plain.shape == equal.shape and np.abs(plain - equal).max() > 1e-3
    assert json.loads(Path("equal.json").read_text())["recipe"]["settings"]["as_recorded"] is True
    assert run("again.wav", "--from-manifest", "equal.json")[0] == 0
    assert Path("again.wav").read_bytes() == Path("equal.wav").read_bytes()


def test_manifest(run, folder, monkeypatch):
    """piece.json tells what was used, and is enough to make the same file again; a changed input is refused."""
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(14)])
    assert run("piece.mid", "piece.wav", "--temperature", 1, "--seed", 3, "--ring-out", 0.2, "--start", 0.4)[0] == 0
    manifest = json.loads(Path("piece.json").read_text())
    recipe = manifest["recipe"]
    assert recipe["settings"]["seed"] == 3 and recipe["settings"]["start"] == 0.4 and recipe["threads"] >= 1
    assert recipe["midi"] == manifest["files"]["piece.mid"] and len(recipe["prompt"]["files"]) == 2
    assert {"torch", "transformers", "code_sha256", "processor"} <= set(recipe["software"])
    assert recipe["software"]["code_sha256"] != hashlib.sha256().hexdigest()  # of no file
    threads = torch.get_num_threads()
    code, _, err = run("again.wav", "--from-manifest", "piece.json")
    assert code == 0 and torch.get_num_threads() == threads, err
    assert Path("again.wav").read_bytes() == Path("piece.wav").read_bytes()
    again = json.loads(Path("again.json").read_text())
    assert {k: v for k, v in again.items() if k != "output"} == {k: v for k, v in manifest.items() if k != "output"}
    for option in (("--seed", 4), ("--temperature", 0.5), ("--batch-size", 2), ("--sustain", "ignore")):
        code, _, err = run("other.wav", "--from-manifest", "piece.json", *option)
        assert code == 2 and f"{option[0]} is what the manifest says" in err
    shutil.copytree(folder, "moved")
    assert run("moved.wav", "--from-manifest", "piece.json", "--model", "moved")[0] == 0
    assert Path("moved.wav").read_bytes() == Path("piece.wav").read_bytes()
    Path("moved").rename("elsewhere")  # with its prompts
    assert run("found.wav", "--from-manifest", "moved.json", "--model", "elsewhere")[0] == 0
    assert Path("found.wav").read_bytes() == Path("piece.wav").read_bytes()
    manifest["output"]["samples_sha256"] = "0"
    Path("wrong.json").write_text(json.dumps(manifest))
    code, _, err = run("third.wav", "--from-manifest", "wrong.json")
    assert code == 1 and "third.wav: is not bit for bit what wrong.json describes" in err
    save_midi("piece.mid", (0.5, 0.3, 60))
    code, _, err = run("no.wav", "--from-manifest", "piece.json")
    assert code == 2 and "piece.mid: is not the file any more" in err and not Path("no.wav").exists()
    Path("text.json").write_text("{}")
    Path("deep.json").write_text("[" * 100_000)
    edited = {"nul.json": {"files": {"a\0.mid": "0"}}, "long.json": {"attempts": [0] * 9}}
    for name, value in (("dtype", "wrong"), ("seed", -1)):
        edited[f"{name}.json"] = {"recipe": recipe | {"settings": recipe["settings"] | {name: value}}}
    for name, change in edited.items():
        Path(name).write_text(json.dumps(manifest | {"files": {}} | change))
    for name, message in (
        ("text.json", "is not a manifest of scripts.render, or damaged; render the MIDI file anew"),
        ("deep.json", "is not a manifest"),
        ("dtype.json", "--dtype wrong is not one of float32, bfloat16"),
        ("seed.json", "--seed -1 is outside 0 to 2^62"),
        ("nul.json", "cannot be read (embedded null byte)"),
        ("long.json", "tells of 9 windows where piece.mid has 1 now"),
        ("no.json", "cannot be read (No such file or directory)"),
    ):
        code, _, err = run("no.wav", "--from-manifest", name)
        assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("recipe", "settings"), []),
        (("recipe", "settings", "temperature"), "hot"),
        (("recipe", "settings", "seed"), True),
        (("recipe", "settings", "output_dir"), "elsewhere"),
        (("recipe", "settings", "ring_out"), None),
        (("recipe", "threads"), -4),
        (("recipe", "software"), []),
        (("recipe", "layout"), 5),
        (("recipe", "settings", "start"), 2**80),
        (("recipe", "layout"), []),
        (("recipe", "layout", 0), 5),
        (("recipe", "layout", 0, "row"), 2),
        (("recipe", "layout", 0, "row"), "x"),
        (("recipe", "layout", 0, "rows", 1), [5, 0]),
        (("recipe", "layout", 0, "rows", 1), [5, 0, 0]),
        (("recipe", "layout", 0, "rows", 1), [5, 10**13, 50]),
        (("midi_file",), 5),
        (("attempts",), ["x"]),
        (("attempts",), [0, 0]),
        (("attempts",), [2**40]),
        (("output",), None),
        (("output", "samples_sha256"), 5),
    ],
)
def test_a_damaged_manifest(place, value, tmp_path):
    software = {"torch": "2"}
    recipe = {"settings": {"seed": 0, "ring_out": 2, "temperature": None}, "threads": 1, "software": software}
    recipe |= {"layout": [{"row": 1, "rows": [[8, 0, 50], [5, 0, 15]]}], "weights_sha256": "0"}
    content = {"format": 2, "recipe": recipe, "midi_file": "a.mid", "files": {}, "attempts": [0]}
    content["output"] = {"samples_sha256": "0"}
    path = tmp_path / "piece.json"
    path.write_text(json.dumps(content))
    assert manifest.read_manifest(path) == content
    inside = content
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(manifest.ManifestError, match="piece.json: is not a manifest"):
        manifest.read_manifest(path)


@pytest.fixture
def music(tmp_path):
    """A folder of three performances and a bad file, and one of nothing."""
    (tmp_path / "music").mkdir()
    (tmp_path / "nothing").mkdir()
    for name, notes in (("a", 14), ("b", 3), ("c", 8)):
        save_midi(tmp_path / "music" / f"{name}.mid", *[(t / 3, 0.3, 60 + t) for t in range(notes)])
    (tmp_path / "music" / "bad.mid").write_text("no music")
    (tmp_path / "music" / "._a.mid").write_text("as some systems put beside each file")
    (tmp_path / "music" / ".versions").mkdir()
    (tmp_path / "music" / ".versions" / "a.mid").write_text("as some systems keep what was there before")
    (tmp_path / "music" / "folder.mid").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


MANY = ("nothing", "music", "--output-dir", "out", "--batch-size", 2, "--temperature", 1, "--ring-out", 0)


def test_many_files_in_batches(music, run, monkeypatch):
    """Windows of two files at a time; what is no music is named and stops nobody; a second start does nothing again."""
    calls = counted(monkeypatch)
    code, out, err = run(*MANY)
    assert code == 2 and "bad.mid: not a MIDI file" in err and out.count("s on cpu") == 3
    assert "nothing: holds no .mid, .midi, .kar, .smf file" in err
    assert calls == [2, 2, 2]  # first windows of a and b; where b ends, c takes its place
    assert sorted(os.listdir("out")) == ["a.json", "a.wav", "b.json", "b.wav", "c.json", "c.wav"]
    for name in "abc":
        assert run(f"music/{name}.mid", f"{name}.wav", "--temperature", 1, "--ring-out", 0)[0] == 0
        one, other = samples_of(f"{name}.wav"), samples_of(f"out/{name}.wav")
        assert len(one) == len(other) and np.abs(one.astype(int) - other).max() <= 1
    calls.clear()
    code, _, err = run(*MANY)
    assert code == 2 and calls == [] and err.count("is there already, made the same way") == 3
    code, _, err = run(*MANY, "--seed", 1)
    assert code == 2 and err.count("exists already; add --force") == 3 and calls == []
    (music / "other").mkdir()
    save_midi(music / "other" / "c.mid", (0.0, 0.3, 60))  # would have the same name
    code, _, err = run("other", *MANY[2:])
    assert code == 2 and "c.wav: exists already; add --force" in err and calls == []
    told = Path("out/a.json").read_text()
    Path("out/a.json").write_text(told.replace("out/a.wav", "out/a.flac"))  # of another file, which shares it
    code, _, err = run(*MANY)
    assert code == 2 and "a.wav: exists already; add --force" in err and err.count("made the same way") == 2
    Path("out/a.json").write_text(told)
    assert calls == []
    (music / "music" / "c.mid").unlink()
    for name in "ab":  # the manifest of a file from a batch is enough, without the others
        code, _, err = run(f"again_{name}.wav", "--from-manifest", f"out/{name}.json")
        assert code == 0 and Path(f"again_{name}.wav").read_bytes() == Path(f"out/{name}.wav").read_bytes(), err
    assert calls == [2, 2, 2, 2]


def test_a_file_that_cannot_be_written_stops_nobody(music, run, monkeypatch):
    real = files.AudioWriter.close

    def close(self):
        if self.path.name == "b.wav":
            raise AudioError("b.wav: cannot be written to out (disk full)")
        return real(self)

    monkeypatch.setattr(files.AudioWriter, "close", close)
    code, out, err = run(*MANY)
    assert code == 2 and "b.wav: cannot be written" in err and out.count("s on cpu") == 2
    assert sorted(os.listdir("out")) == [".b.wav.windows", "a.json", "a.wav", "c.json", "c.wav"]


def test_a_journal_of_another_user_and_a_long_name_stop_nobody(music, run, monkeypatch):
    """`b` meets the journal only when its first window is there, which shares a step with one of `a`."""
    (music / "music" / "bad.mid").unlink()
    shutil.copy(music / "music" / "a.mid", music / "music" / f"{'x' * 240}.mid")
    real = Journal._take

    def take(self):
        if self.path.name == ".b.wav.windows":
            with monkeypatch.context() as patch:
                patch.setattr("builtins.open", refuse)
                return real(self)
        return real(self)

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Journal, "_take", take)
    code, out, err = run(*MANY)
    assert code == 2 and "xxx.wav: is too long a name" in err and ".b.wav.windows: cannot be used" in err
    assert out.count("s on cpu") == 2 and sorted(os.listdir("out")) == ["a.json", "a.wav", "c.json", "c.wav"]


def test_an_interrupted_batch_goes_on_with_the_same_bits(music, run, monkeypatch):
    (music / "music" / "bad.mid").unlink()
    assert run(*MANY[1:])[0] == 0
    expected = {name: Path(f"out/{name}.wav").read_bytes() for name in "abc"}
    for path in Path("out").iterdir():
        path.unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run(*MANY[1:])[0] == 130
    assert sorted(os.listdir("out")) == [".a.wav.windows", ".c.wav.windows", "b.json", "b.wav"]
    calls = counted(monkeypatch)
    assert run(*MANY[1:])[0] == 0 and calls == [2]
    assert {name: Path(f"out/{name}.wav").read_bytes() for name in "abc"} == expected


def test_an_error_in_a_batch_stops_those_that_share_it(music, run, monkeypatch):
    """The third step, of a and c, does not fit into a GPU's memory: b is there already, and d takes their place."""
    save_midi(music / "music" / "d.mid", (0.0, 0.3, 60))
    real, calls = MidiValleForConditionalGeneration.generate_frames, []

    def generate_frames(self, *arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments, **options)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "generate_frames", generate_frames)
    code, out, err = run(*MANY)
    full = "the GPU's memory is full: give a smaller --batch-size"
    assert code == 2 and all(f"render: {name}.mid: {full}\n" in err for name in "ac")
    assert {"b.wav", "d.wav"} <= set(os.listdir("out")) and not Path("out/a.wav").exists()


def test_parallel(run, monkeypatch):
    """Windows of one piece side by side, each after its own run-in: exact length, the same bits again, also after an
    interruption and from the manifest; other sound than with carried context."""
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(30)])
    options = ("--temperature", 1, "--ring-out", 0.3)
    calls = counted(monkeypatch)
    assert run("piece.mid", "whole.wav", *options, "--parallel", "--batch-size", 2)[0] == 0
    assert calls == [1, 2, 1]  # the first alone, since it is waited for
    assert len(samples_of("whole.wav")) == round((render_end("piece.mid") + 0.3) * RATE)
    assert run("again.wav", "--from-manifest", "whole.json")[0] == 0 and calls == [1, 2, 1, 1, 2, 1]
    assert Path("again.wav").read_bytes() == Path("whole.wav").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run("piece.mid", "piece.wav", *options, "--parallel", "--batch-size", 2)[0] == 130
    calls.clear()
    assert run("piece.mid", "piece.wav", *options, "--parallel", "--batch-size", 2)[0] == 0 and calls == [1]
    assert Path("piece.wav").read_bytes() == Path("whole.wav").read_bytes()
    assert run("piece.mid", "carried.wav", *options)[0] == 0
    carried, parallel = samples_of("carried.wav"), samples_of("whole.wav")
    assert len(carried) == len(parallel) and not np.array_equal(carried, parallel)


def test_a_render_whose_journal_holds_all_of_it(run, monkeypatch):
    """Killed behind its last window: the rest is written, also where audio is made beside what follows (on a GPU)."""
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(14)])
    real = Decoding.__init__
    monkeypatch.setattr(Decoding, "__init__", lambda self, device: real(self, device, overlapped=True))
    monkeypatch.setattr(Journal, "remove", lambda self: None)
    assert run("piece.mid", "piece.wav")[0] == 0
    whole = Path("piece.wav").read_bytes()
    Path("piece.wav").unlink(), Path("piece.json").unlink()
    code, out, err = run("piece.mid", "piece.wav")
    assert code == 0 and "there already" in out and Path("piece.wav").read_bytes() == whole, err


def test_a_prompt_is_not_written_over(run):
    save_midi("piece.mid", (0.0, 1.0, 60))
    save_midi("own.mid", (0.0, 1.0, 60))
    soundfile.write("own.wav", np.random.default_rng(0).normal(0, 0.1, 64_000), 32_000)
    before = Path("own.wav").read_bytes()
    own = ("--prompt-audio", "own.wav", "--prompt-midi", "own.mid", "--force")
    sentence = "is the prompt; give the output another name or folder\n"
    assert run("piece.mid", "own.wav", *own)[::2] == (2, f"render: own.wav: {sentence}")
    assert run("own.mid", "--output-dir", ".", *own)[::2] == (2, f"render: own.wav: {sentence}")
    Path("link.wav").symlink_to("own.wav")
    assert run("piece.mid", "link.wav", *own)[::2] == (2, f"render: link.wav: {sentence}")
    assert run("piece.mid", "piece.wav", *own)[0] == 0
    assert run("own.wav", "--from-manifest", "piece.json", "--force")[::2] == (2, f"render: own.wav: {sentence}")
    assert Path("own.wav").read_bytes() == before


def test_two_renders_of_one_file(run, monkeypatch):
    """The second is refused, with other settings too, and the first comes out as if it had been alone."""
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(14)])
    assert run("piece.mid", "alone.wav")[0] == 0
    real, refused = MidiValleForConditionalGeneration.generate_frames, []

    def generate_frames(self, *arguments, **options):
        with monkeypatch.context() as within:
            within.setattr(MidiValleForConditionalGeneration, "generate_frames", real)
            if Path(".piece.wav.windows").exists() and not refused:
                refused.extend((run("piece.mid", "piece.wav"), run("piece.mid", "piece.wav", "--seed", 3)))
        return real(self, *arguments, **options)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "generate_frames", generate_frames)
    assert run("piece.mid", "piece.wav")[0] == 0
    sentence = "render: piece.wav: another render is making it; wait for it or stop it\n"
    assert [code for code, _, _ in refused] == [2, 2] and all(err.endswith(sentence) for _, _, err in refused)
    assert Path("piece.wav").read_bytes() == Path("alone.wav").read_bytes()
    assert not Path(".piece.wav.windows").exists()


def test_threads(run, monkeypatch):
    """Measured when nothing is said; else the user's, the manifest's, or those of the render that goes on."""
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(14)])
    chosen = iter((1, 5))
    monkeypatch.setattr(files, "choose_threads", lambda model, most: next(chosen))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    interrupted = pytest.MonkeyPatch()
    interrupt_after(interrupted, 1)
    assert run("piece.mid", "piece.wav")[0] == 130
    interrupted.undo()
    code, out, err = run("piece.mid", "piece.wav")
    assert code == 0 and "1 window there already" in out, err

    def threads_of(*arguments):
        code, _, err = run("other.wav", "--force", *arguments)
        assert code == 0, err
        return json.loads(Path("other.json").read_text())["recipe"]["threads"]

    assert json.loads(Path("piece.json").read_text())["recipe"]["threads"] == 1
    assert threads_of("--from-manifest", "piece.json") == 1
    assert threads_of("--from-manifest", "piece.json", "--threads", 3) == 3
    assert run("piece.mid", "fresh.wav")[0] == 0
    assert json.loads(Path("fresh.json").read_text())["recipe"]["threads"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output-dir", "out"), "give MIDI files or folders"),
        (("music", "--output-dir", "music/a.mid"), "--output-dir music/a.mid: is not a folder; give another"),
        (("out", "--output-dir", "out"), "out: holds no .mid, .midi, .kar, .smf file"),
        (("music", "music/a.mid", "--output-dir", "out"), "would both become a.wav"),
        (("a.mid", "a.report.mid", "--output-dir", "out", "--verify"), "would both become a.report.json"),
        (("music", "--output-dir", "out", "--stream", "-"), "--stream is for one file"),
        (("music/a.mid", "x.wav", "--top-k", str(2**63)), "is outside 0 to 2^62"),
        (("music/a.mid", "x.wav", "--raw"), "--raw is for --stream"),
        (("music/a.mid", "--stream", "-", "--verify"), "--verify needs a file"),
        (("music/a.mid", "x.wav", "--batch-size", "0"), "--batch-size 0"),
        (("music/a.mid", "x.wav", "--threads", "0"), "--threads 0"),
        (("music/a.mid", "x.wav", "--threads", "100000"), "--threads 100000 must be at most"),
        (("music/a.mid", "x.wav", "--parallel", "--compat", "published"), "leave out --parallel"),
        (("a.mid", "--output-dir", "out", "--batch-size", 2, "--compat", "published"), "leave out --batch-size"),
        (("music/a.mid", "x.wav", "--from-manifest", "m.json"), "--from-manifest takes OUTPUT.wav"),
        (("music/a.mid", "x.wav", "--verify", "-1"), "--verify must not be negative"),
    ],
)
def test_file_options_that_do_not_fit(arguments, message, music, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert os.listdir("out") == []


class Listener:
    """A transcriber that hears every second call nothing, and otherwise all notes of a piece, 100 ms late."""

    def __init__(self, *_):
        self.calls = 0

    def __call__(self, wave, rate):
        self.calls += 1
        notes = load_performance("piece.mid").notes.copy()
        notes["onset"] += 0.1 if self.calls % 2 else 0
        return notes if len(wave) < 3 * RATE else notes[:0]


def test_self_check_and_repair(run, monkeypatch):
    """A window whose notes are not heard is generated anew, with other draws; the best is kept and all is reported."""
    monkeypatch.setattr(files, "Transcriber", Listener)
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(3)])
    calls = counted(monkeypatch)
    code, out, err = run("piece.mid", "piece.wav", "--ring-out", 0, "--verify", 3)
    assert code == 0 and calls == [1, 1] and "3 of 3 notes heard, onset F1 1.0" in err, err
    report = json.loads(Path("piece.report.json").read_text())
    assert report["summary"] == {"missing": 0, "extra": 0, "shifted": 0, "notes": 3, "right": 3, "f1": 1.0}
    assert report["windows"][0]["attempts"] == [0.0, 1.0] and report["windows"][0]["kept"] == 1
    assert json.loads(Path("piece.json").read_text())["attempts"] == [1]
    with monkeypatch.context() as patch:  # killed behind its last window
        patch.setattr(Journal, "remove", lambda self: None)
        code, _, err = run("again.wav", "--from-manifest", "piece.json")  # without the transcriber
    assert code == 0 and Path("again.wav").read_bytes() == Path("piece.wav").read_bytes(), err
    assert run("piece.mid", "again.wav", "--ring-out", 0, "--force")[0] == 0  # not by the attempts that are there
    assert Path("again.wav").read_bytes() != Path("piece.wav").read_bytes()
    Path("again.report.json").write_text("mine")
    for name in ("piece", "again"):  # a report goes with the sound that it is about
        assert run("piece.mid", f"{name}.wav", "--ring-out", 0, "--force")[0] == 0
    assert not Path("piece.report.json").exists() and Path("again.report.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ((), pieces.RETRY),
        (("--temperature", 0), pieces.RETRY),
        (("--top-k", 20), {"temperature": None, "top_k": 20, "top_p": None}),
        (("--temperature", 0.3), {"temperature": 0.3, "top_k": None, "top_p": None}),
    ],
)
def test_another_attempt_draws_as_asked(options, second, run, monkeypatch):
    """Where the first drew nothing, it draws as `RETRY` says; else as the first."""
    monkeypatch.setattr(files, "Transcriber", Listener)
    asked, generate = [], MidiValleForConditionalGeneration.generate_frames

    def generate_frames(self, *arguments, **given):
        asked.append({name: given.get(name) for name in second})
        return generate(self, *arguments, **given)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "generate_frames", generate_frames)
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(3)])
    code, _, err = run("piece.mid", "piece.wav", "--ring-out", 0, "--verify", 1, *options)
    assert code == 0 and len(asked) == 2 and asked[1] == second, err


def test_what_is_finished_is_not_kept(run, monkeypatch):
    """A folder of any number of files needs the memory of those that are being made."""
    alive, finish = [], files.finish

    def finish_and_look(setting, task, job):
        gc.collect()
        alive.append(sum(known() is not None for known in made))
        made.append(weakref.ref(job))
        return finish(setting, task, job)

    made = []
    monkeypatch.setattr(files, "finish", finish_and_look)
    for i in range(4):
        save_midi(f"{i}.mid", (0.0, 0.5, 60 + i))
    code, _, err = run(*[f"{i}.mid" for i in range(4)], "--output-dir", "sound", "--batch-size", 1)
    assert code == 0 and len(alive) == 4 and max(alive) == 0, (alive, err)


def test_what_is_judged_is_what_is_rendered(run, monkeypatch):
    """With what velocities do to single keys."""
    heard = []

    def keep(wave, rate):
        heard.append(wave)
        return load_performance("piece.mid").notes

    monkeypatch.setattr(files, "Transcriber", lambda *_: keep)
    save_midi("piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(3)])
    code, _, err = run("piece.mid", "piece.wav", "--ring-out", 0, "--verify", 1)
    assert code == 0, err
    rendered = soundfile.read("piece.wav")[0]
    np.testing.assert_allclose(heard[0][: len(rendered)], rendered, atol=2 / 32768)


def test_windows_are_judged_in_their_surroundings(folder, run, monkeypatch):
    """Where nothing is heard in the last quarter of a second of what does not end there, every note is judged once, in
    its place: with the window behind it."""
    save_midi("piece.mid", *[(0.25 + 0.3 * i, 0.1, 60 + i) for i in range(15)])
    piece = load_performance("piece.mid")
    windows = model_folder.load_processor(folder).windows(piece, 0)
    edges = [end for _, end in windows[:-1]]
    onset, coming = piece.notes["onset"], iter(windows)
    assert len(edges) == 2 and all(((onset >= edge - 0.25) & (onset < edge)).any() for edge in edges)

    def hear(wave, rate):
        start, end = next(coming)
        seconds, notes = len(wave) / rate, piece.notes.copy()
        notes["onset"] -= start + math.ceil((end - start) * 50) / 50 - seconds
        return notes[(notes["onset"] >= 0) & (notes["onset"] < seconds - 0.25 * (end in edges))]

    monkeypatch.setattr(files, "Transcriber", lambda *_: hear)
    code, _, err = run("piece.mid", "piece.wav", "--ring-out", 0, "--verify", 1)
    assert code == 0, err
    report = json.loads(Path("piece.report.json").read_text())
    assert report["summary"] == {"missing": 0, "extra": 0, "shifted": 0, "notes": 15, "right": 15, "f1": 1.0}
    assert [window["attempts"] for window in report["windows"]] == [[1.0]] * 3


def test_notes_that_are_wrong_are_listed():
    reference = np.array([(0.0, 1, 60, 80), (1.0, 1, 62, 80), (2.0, 1, 64, 80), (3.0, 1, 65, 80)], NOTE_DTYPE)
    estimate = np.array([(0.02, 1, 60, 80), (1.1, 1, 62, 80), (2.5, 1, 70, 80), (3.0, 1, 65, 80)], NOTE_DTYPE)
    found = compare(reference, estimate, -np.inf, 3.0)
    assert (found["notes"], found["heard"], found["right"], found["f1"]) == (3, 3, 1, pytest.approx(1 / 3, abs=1e-3))
    assert found["missing"] == [[2.0, 64]] and found["extra"] == [[2.5, 70]] and found["shifted"] == [[1.0, 62, 0.1]]
    early = reference.copy()
    early["onset"] -= 0.04  # what is heard a little early beyond an edge is still of this side
    for span in ((-np.inf, 0.98), (0.98, np.inf)):
        assert compare(reference, early, *span)["f1"] == 1.0
    assert compare(reference[:0], estimate[:0], 0, 1)["f1"] is None


def test_a_prompt_without_its_midi(run, inputs, monkeypatch):
    """It is transcribed where that is possible, and otherwise a sentence says how."""

    def missing(*_):
        raise TranscriptionError("not installed")

    monkeypatch.setattr(files, "Transcriber", missing)
    code, _, err = run("good.mid", "out.wav", "--prompt-audio", "noise.wav")
    assert code == 2 and "noise.wav comes without its MIDI: add --prompt-midi, or run `make install-eval`" in err
    heard = np.array([(0.2, 0.5, 60, 80)], NOTE_DTYPE)
    monkeypatch.setattr(files, "Transcriber", lambda *_: lambda wave, rate: heard)
    code, out, err = run("good.mid", "out.wav", "--prompt-audio", "noise.wav", "--ring-out", 0)
    assert code == 0 and "own prompt, transcribed" in out, err
    monkeypatch.setattr(files, "Transcriber", lambda *_: lambda wave, rate: heard[:0])
    code, _, err = run("good.mid", "none.wav", "--prompt-audio", "noise.wav")
    assert code == 2 and "no note is heard in it" in err


def test_a_model_without_prompts_renders_without(tmp_path):
    assert model_folder.choose_prompt(tmp_path, None) == ("no prompt (the model folder has none)", None)
    with pytest.raises(model_folder.FolderError, match="the model folder has no prompts"):
        model_folder.choose_prompt(tmp_path, "x")


def test_the_command_line_itself(folder, inputs):
    """A real process: it renders, and for a bad file it says one sentence and exits with 2."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(*arguments):
        command = [sys.executable, "-m", "scripts.render", *arguments, "--model", folder]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = start(inputs / "text.mid", inputs / "out.wav")
    assert done.returncode == 2 and done.stdout == "" and not (inputs / "out.wav").exists()
    assert done.stderr == "render: text.mid: not a MIDI file (no complete MThd header)\n"
    done = start(inputs / "good.mid", inputs / "out.wav", "--ring-out", "0.2")
    assert done.returncode == 0 and (inputs / "out.wav").exists(), done.stderr


def test_a_plot_that_cannot_be_finished_leaves_what_was_there(inputs, monkeypatch):
    def full_disk(_, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(inputs)
    Path("plot.png").write_bytes(b"whole")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    for name in ("plot.png", "plot.pdf"):
        assert plots.main(["noise.wav", "good.mid", name]) == 2
    assert Path("plot.png").read_bytes() == b"whole" and sorted(Path().glob("*plot*")) == [Path("plot.png")]


def test_a_plot_of_a_span_has_the_notes_where_they_sound(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    onsets, draw = [], plots.draw_piano_roll
    monkeypatch.setattr(
        plots, "draw_piano_roll", lambda axis, notes: (onsets.append(notes["onset"]), draw(axis, notes))
    )
    assert plots.main(["noise.wav", "good.mid", "whole.png"]) == 0
    assert plots.main(["noise.wav", "good.mid", "span.png", "--start", "0.25"]) == 0
    assert onsets[1] == pytest.approx(onsets[0] - 0.25)
    for start in ("-1", "nan", "inf"):
        assert plots.main(["noise.wav", "good.mid", "no.png", f"--start={start}"]) == 2 and not Path("no.png").exists()
    assert capsys.readouterr().err.count("must be 0 or more") == 3


def test_plots(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    Path("for $x^$.mid").write_bytes(Path("good.mid").read_bytes())
    assert plots.main(["noise.wav", "for $x^$.mid", "plot.png"]) == 0
    assert Path("plot.png").read_bytes()[:4] == b"\x89PNG"
    assert plots.main(["noise.wav", "text.mid", "other.png"]) == 2 and not Path("other.png").exists()
    assert plots.main(["noise.wav", "good.mid", "none/plot.png"]) == 2
    assert plots.main(["noise.wav", "good.mid", "noise.wav/plot.png"]) == 2
    assert plots.main(["noise.wav", "good.mid", "plot.wrong"]) == 2
    assert plots.main(["noise.wav", "good.mid", "plot"]) == 2 and sorted(Path().glob("plot*")) == [Path("plot.png")]
    assert [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()][1:] == [
        "plots: none/plot.png: cannot be written",
        "plots: noise.wav/plot.png: cannot be written",
        "plots: plot.wrong: cannot be written",
        "plots: plot: has no ending that tells the kind of picture; add .png",
    ]
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    image = plots.log_spectrogram(tone)
    assert image.shape[0] == plots.ROWS and image.max() == 0 and image.min() >= -plots.RANGE_DB
    peak = np.geomspace(plots.LOWEST_HZ, plots.HIGHEST_HZ, plots.ROWS)[image.mean(1).argmax()]
    assert peak == pytest.approx(440, rel=0.02)
    assert plots.log_spectrogram(tone[:100]).shape[0] == plots.ROWS  # shorter than a window
    late = plots.log_spectrogram(tone[:1600] * (np.arange(1600) > 1200)).max(0).argmax()
    assert late > 0.6 * plots.log_spectrogram(tone[:1600]).shape[1]
    assert (plots.log_spectrogram(np.zeros(RATE)) == -plots.RANGE_DB).all()  # silence is dark


def test_an_adapter_is_played(run, folder, tmp_path):
    """Beside the model, and again from the manifest, wherever it lies then."""
    peft = pytest.importorskip("peft", reason="make install-peft")
    save_midi("piece.mid", (0.0, 0.3, 60))
    model = model_folder.load_model(folder, "cpu")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(target_modules=r"nar\.layers\.\d+\.linear1", init_lora_weights=False))
    model.save_pretrained("mine")
    assert run("piece.mid", "plain.wav", "--ring-out", 0.1)[0] == 0
    code, _, err = run("piece.mid", "mine.wav", "--ring-out", 0.1, "--adapter", "mine")
    assert code == 0, err
    assert read_audio("mine.wav")[0].tobytes() != read_audio("plain.wav")[0].tobytes()
    shutil.move("mine", "moved")
    assert "--adapter mine: no such folder" in run("again.wav", "--from-manifest", "mine.json")[2]
    assert run("again.wav", "--from-manifest", "mine.json", "--adapter", "moved")[0] == 0
    assert read_audio("again.wav")[0].tobytes() == read_audio("mine.wav")[0].tobytes()
    assert "is what the manifest says" in run("no.wav", "--from-manifest", "plain.json", "--adapter", "moved")[2]
    weights = Path("moved/adapter_model.safetensors")
    tensors = load_file(weights)
    for changed, sentence in (
        ({name: value + 1 for name, value in tensors.items()}, "moved: is not the model any more"),
        ({name: value[:1] for name, value in tensors.items()}, "--adapter moved: does not fit the model"),
        (dict(list(tensors.items())[1:]), "--adapter moved: is of another model"),
        ({name: value * torch.nan for name, value in tensors.items()}, "weights that are not finite"),
    ):
        save_file(changed, weights)
        code, _, err = run("no.wav", "--from-manifest", "mine.json", "--adapter", "moved")
        assert code == 2 and sentence in err and len(err.splitlines()) == 1
    weights.write_bytes(b"")
    assert (
        "--adapter moved: does not fit the model, or is damaged" in run("piece.mid", "no.wav", "--adapter", "moved")[2]
    )
    weights.unlink()
    assert "holds no adapter_model.safetensors" in run("piece.mid", "no.wav", "--adapter", "moved")[2]
    assert "leave out --quantize" in run("piece.mid", "no.wav", "--adapter", "moved", "--quantize", "int8")[2]
    assert not Path("no.wav").exists()
