# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.render`: exact lengths, same seed same file, and one sentence for everything it cannot use."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from symusic import Note, Score, Tempo, Track
from transformers import EncodecFeatureExtractor

from modeling_midivalle import MidiValleConfig, MidiValleForConditionalGeneration
from processing import MidiValleProcessor, read_audio, write_audio
from scripts import plots, render
from scripts.stream_decoding import decode_stream
from tokenization import MidiValleTokenizer, load_performance

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
    """A model folder as it lies on the Hub, with a tiny random model and two prompts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = MidiValleForConditionalGeneration(MidiValleConfig.from_preset("tiny"))
    for layer in model.codec.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)
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


def test_says_once_what_is_left_out_and_clipped(run):
    """Two drum notes, a key below the piano and a note of 7 s: one line beside the file; nothing if all is rendered."""
    save_midi("piece.mid", (0.0, 7.0, 60), (0.1, 0.2, 15))
    score, drums = Score("piece.mid"), Track(is_drum=True, ttype="tick")
    drums.notes.extend([Note(0, 10, 36, 80, ttype="tick"), Note(20, 10, 36, 80, ttype="tick")])
    score.tracks.append(drums)
    score.dump_midi("piece.mid")
    code, _, err = run("piece.mid", "out.wav", "--ring-out", "0")
    said = [line for line in err.splitlines() if line.startswith("render: ")]
    keys = "outside the piano's keys 21 to 108"
    clipped = "1 durations over 6 s are clipped to 6 s"
    assert code == 0 and said == [f"render: piece.mid: left out notes: 2 on a drum track, 1 {keys}; {clipped}"]
    assert err.count("left out") == 1
    save_midi("piece.mid", (0.0, 0.4, 60))
    code, _, err = run("piece.mid", "out.wav", "--ring-out", "0", "--force")
    assert code == 0 and "render:" not in err


def test_windows_are_generated_in_turn_and_joined_on_the_frame_grid(folder):
    """Two windows with the same prompt: codes of each as if it were alone, decoded as one stream."""
    processor, model = render.load_processor(folder), render.load_model(folder, "cpu")
    save_midi(folder / "piece.mid", *[(t / 3, 0.3, 60 + t) for t in range(4)])
    piece = processor.load(folder / "piece.mid")
    prompt = processor.prepare_prompt(folder / "prompts/upright_hall.mid", folder / "prompts/upright_hall.flac")
    windows = [(0.0, 0.5), (0.5, 1.33)]
    codes = list(render.generate_windows(model, processor, piece, windows, prompt, 7, {"top_k": 5}))
    assert [tuple(c.shape) for c in codes] == [(1, 4, 25), (1, 4, 42)]
    for i, window in enumerate(windows):
        inputs = processor.window_inputs(piece, *window, prompt)
        alone = model.generate(**inputs, seed=7 + i, top_k=5, return_dict_in_generate=True)
        assert torch.equal(alone.audio_codes, codes[i])
    wave = render.to_wave(model.codec, iter(codes), 1.33)
    whole = model.codec.decode_codes(torch.cat(codes, -1))[0, 0, : len(wave)]
    assert len(wave) == round(1.33 * RATE)
    torch.testing.assert_close(torch.from_numpy(wave), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "overrides", [{}, {"use_causal_conv": True}, {"pad_mode": "reflect", "num_residual_layers": 2}]
)
def test_decoding_in_chunks_equals_decoding_at_once(overrides):
    """The same samples whatever the chunks: no seam, not even from the LSTM, which remembers all frames before."""
    config = MidiValleConfig.from_preset("tiny").codec_config.to_dict() | overrides
    torch.manual_seed(1)
    codec = MidiValleForConditionalGeneration(MidiValleConfig.from_preset("tiny", codec_config=config)).codec.eval()
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    codes = torch.randint(0, 2048, (1, 4, 81))
    whole = codec.decode_codes(codes)[0, 0]
    assert whole.abs().max() > 0.01
    for size in (27, 40, 81, 1500):
        chunks = list(decode_stream(codec, codes, size))
        assert [len(chunk) for chunk in chunks] == [640 * min(size, 81 - t) for t in range(0, 81, size)]
        torch.testing.assert_close(torch.cat(chunks), whole, atol=1e-6, rtol=1e-4)


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
    "short prompt": (("good.mid", *PROMPT_MIDI, "short.wav"), "short.wav: lasts 0.20 s"),
    "prompt without MIDI": (("good.mid", "--prompt-audio", "noise.wav"), "add --prompt-midi"),
    "prompt without audio": (("good.mid", "--prompt-midi", "good.mid"), "add --prompt-audio"),
    "prompt MIDI elsewhere": (("good.mid", "--prompt-audio", "noise.wav", "--prompt-midi", "late.mid"), "no note"),
    "Ogg prompt": (("good.mid", *PROMPT_MIDI, "p.ogg"), "convert it to WAV or FLAC"),
    "missing prompt": (("good.mid", *PROMPT_MIDI, "no.wav"), "no.wav: no such file"),
    "two prompts": (("good.mid", "--prompt", "a", *PROMPT_MIDI, "noise.wav"), "not both"),
    "unknown prompt": (("good.mid", "--prompt", "harp"), "not one of steinway_studio, upright_hall"),
    "start behind the end": (("good.mid", "--start", "9"), "good.mid: no note sounds between 9.0"),
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
        (("good.mid",), "give INPUT.mid and OUTPUT.wav"),
        ((), "give INPUT.mid and OUTPUT.wav"),
    ],
)
def test_bad_outputs(arguments, message, run, inputs):
    before = {path.name: path.read_bytes() for path in inputs.iterdir()}
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in inputs.iterdir()} == before


def test_force_replaces(run, inputs):
    assert run("good.mid", "noise.wav", "--force", "--ring-out", "0.1")[0] == 0
    assert len(read_audio("noise.wav")[0]) == round((render_end("good.mid") + 0.1) * RATE)


def test_bad_models(folder, inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    (inputs / "hollow").mkdir()
    (inputs / "hollow" / "config.json").write_text('{"model_type": "midivalle"}')
    for model, message in (
        ("nowhere", "no such folder, and not a Hub id"),
        ("./no/where", "no such folder, and not a Hub id"),
        (str(inputs), "holds no config.json"),
        ("hollow", "hollow: no processor can be loaded"),
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
    ["{", '{"a": 1}', '[{"name": "x"}]', json.dumps([dict.fromkeys(render.NamedPrompt.__dataclass_fields__, "../x")])],
)
def test_bad_prompt_lists(text, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "prompts.json").write_text(text)
    with pytest.raises(render.RenderError, match="prompts.json"):
        render.read_prompts(tmp_path)


def test_damaged_weights(folder, tmp_path):
    """A missing or a broken weight is named; transformers alone would start it anew or use it."""
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.startswith("nar.") and key.endswith("linear1.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(render.RenderError, match=f"do not fit the configuration.*{name}"):
        render.load_model(tmp_path / "model", "cpu")
    save_file(weights | {name: weights[name] * torch.nan}, path, {"format": "pt"})
    with pytest.raises(render.RenderError, match=f"not finite: {name}"):
        render.load_model(tmp_path / "model", "cpu")
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(render.RenderError, match="no model can be loaded"):
        render.load_model(tmp_path / "model", "cpu")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["ar_config"]["num_attention_heads"] = 7  # refused by the strict configuration, which is no ValueError
    path.write_text(json.dumps(config))
    with pytest.raises(render.RenderError, match="no model can be loaded"):
        render.load_model(tmp_path / "model", "cpu")


def test_hub_ids(folder, monkeypatch):
    """Data of a Hub repository is fetched, its code is not; what the Hub says is one line."""
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "me/lost":
            raise OSError("404\nlong story")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert render.model_folder("me/model") == folder
    assert asked == [("me/model", ["*.json", "*.safetensors", "prompts/*"])]
    with pytest.raises(render.RenderError, match=r"--model me/lost: cannot be downloaded \(404\)"):
        render.model_folder("me/lost")


def test_published_rules(run, monkeypatch):
    """--compat reaches the model, which sets the length; more than one window or weights of ours are refused."""
    save_midi("piece.mid", (0.0, 1.0, 60))
    code, _, err = run("piece.mid", "no.wav", "--compat", "published")
    assert code == 2 and "for weights without a BOS frame" in err and not Path("no.wav").exists()
    asked = {}

    def generate_codes(self, *arguments, **options):
        asked.update(options)
        return torch.zeros(1, 4, 7, dtype=torch.long)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "generate_codes", generate_codes)
    code, out, err = run("piece.mid", "out.wav", "--compat", "published", "--seed", 5)
    assert code == 0 and asked["compat"] == "published" and asked["seed"] == 5, err
    assert soundfile.info("out.wav").frames == 7 * 640 and "0.140 s" in out
    save_midi("long.mid", (0.0, 1.0, 60), (40.0, 1.0, 60))
    code, _, err = run("long.mid", "no.wav", "--compat", "published")
    assert code == 2 and "renders one segment of at most" in err


def test_a_model_without_prompts_renders_without(tmp_path):
    assert render.choose_prompt(tmp_path, None) == ("no prompt (the model folder has none)", None)
    with pytest.raises(render.RenderError, match="the model folder has no prompts"):
        render.choose_prompt(tmp_path, "x")


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


def test_plots(inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    assert plots.main(["noise.wav", "good.mid", "plot.png"]) == 0
    assert Path("plot.png").read_bytes()[:4] == b"\x89PNG"
    assert plots.main(["noise.wav", "text.mid", "other.png"]) == 2 and not Path("other.png").exists()
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    image = plots.log_spectrogram(tone)
    assert image.shape[0] == plots.ROWS and image.max() == 0 and image.min() >= -plots.RANGE_DB
    peak = np.geomspace(plots.LOWEST_HZ, plots.HIGHEST_HZ, plots.ROWS)[image.mean(1).argmax()]
    assert peak == pytest.approx(440, rel=0.02)
