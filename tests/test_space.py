# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The Space: what it renders and refuses with a tiny model; the page itself where gradio is installed."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from symusic import Note, Score, Track
from transformers import EncodecFeatureExtractor

from processing import MidiValleProcessor, write_audio
from tokenization import MidiValleTokenizer

SPACE = Path(__file__).resolve().parents[1] / "space"


@pytest.fixture
def app(make_model, write_midi, tmp_path, monkeypatch):
    """The app on a tiny model with one prompt, `tmp_path/model`; spans of 1 s at most."""
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=32_000)
    processor = MidiValleProcessor(extractor, MidiValleTokenizer(), 1.0, 3.0, context_seconds=1.0)
    processor.save_pretrained(folder)
    (folder / "prompts").mkdir()
    write_midi(folder / "prompts" / "grand.mid", 1, seconds=1.0)
    write_audio(folder / "prompts" / "grand.flac", 0.1 * np.random.default_rng(0).standard_normal(32_000))
    (folder / "prompts" / "prompts.json").write_text(json.dumps([{"name": "grand", "description": "A grand at home"}]))
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    monkeypatch.setenv("MIDIVALLE_MODEL", str(folder))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    monkeypatch.setattr(app, "MAX_SECONDS", 1.0)
    monkeypatch.setattr(app, "RING_OUT_S", 0.1)
    return app


def rendered(app, *request, **more):
    """What `app.render` comes to."""
    *windows, sound = app.render(*request, **more)
    assert windows and set(windows) == {None}
    return sound


def test_renders_and_refuses(app, write_midi, tmp_path, monkeypatch):
    """One model serves all: span, temperature and seed decide the sound; every bad request is one sentence."""
    piece = str(write_midi(tmp_path / "piece.mid", 2, seconds=5.0))
    rate, wave = rendered(app, piece, "grand", 1.0, 0.5, 0.9, 3)
    span = app.read(piece, 1.0, 0.5)
    monkeypatch.setattr(app, "RING_OUT_S", 0.107)  # no whole number of frames
    assert len(rendered(app, piece, "grand", 1.0, 0.5)[1]) == round((span.end + 0.107) * rate)
    monkeypatch.setattr(app, "RING_OUT_S", 0.1)
    assert rate == 32_000 and wave.dtype == np.int16 and len(wave) == round((span.end + 0.1) * rate)
    assert np.array_equal(rendered(app, piece, "grand", 1.0, 0.5, 0.9, 3)[1], wave)
    assert not np.array_equal(rendered(app, piece, "grand", 1.0, 0.5, 0.9, 4)[1], wave)
    assert np.array_equal(rendered(app, piece, "grand", 1.0, 0.5)[1], rendered(app, piece, "grand", 1.0, 0.5, 0, 4)[1])

    (tmp_path / "text.mid").write_text("no music")
    (tmp_path / "big.mid").write_bytes(b"MThd" + bytes(app.MAX_BYTES))
    requests = {
        "give a MIDI file first": (None, "grand", 0, 1, 0),
        "unknown prompt": (piece, "../grand", 0, 1, 0),
        "at most 1 s": (piece, "grand", 0, 1.5, 0),
        "choose a start": (piece, "grand", float("nan"), 1, 0),
        "choose a start within": (piece, "grand", -0.5, 1, 0),
        "choose a start within 10 minutes": (piece, "grand", 600.0, 1, 0),
        "choose a start within 10 minutes and": (piece, "grand", 0, 0, 0),
        "the start is missing": (piece, "grand", None, 1, 0),
        "the seed is missing": (piece, "grand", 0, 1, 0, None),
        "choose a seed": (piece, "grand", 0, 1, 0, -1),
        f"choose a seed from 0 to {2**31 - 1}": (piece, "grand", 0, 1, 0, 2**31),
        "choose a temperature": (piece, "grand", 0, 1, -1),
        "choose a temperature from 0 to 2": (piece, "grand", 0, 1, 2.5),
        "the length is missing": (piece, "grand", 0, None, 0),
        "the start is '0'; give a number": (piece, "grand", "0", 1, 0),
        "gone.mid: the file is not here any more; upload it again": (str(tmp_path / "gone.mid"), "grand", 0, 1, 0),
        "larger than 2 MB": (str(tmp_path / "big.mid"), "grand", 0, 1, 0),
        "text.mid": (str(tmp_path / "text.mid"), "grand", 0, 1, 0),
        "no note sounds": (piece, "grand", 100, 1, 0),
    }
    for words, request in requests.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            rendered(app, *request)
    monkeypatch.setattr(app, "MAX_NOTES", 39)
    with pytest.raises(ValueError, match="more than 39 notes"):
        rendered(app, piece, "grand", 0, 1, 0)
    monkeypatch.setattr(app, "DEADLINE_S", -1.0)
    monkeypatch.setattr(app, "MAX_NOTES", 5000)
    with pytest.raises(ValueError, match="too long"):
        rendered(app, piece, "grand", 0, 1, 0)


def test_codes_are_drawn_as_the_page_says(app, write_midi, tmp_path):
    """Of the 50 likeliest, and of these the ones that make up 95 %; as whole numbers they are rounded."""
    piece = str(write_midi(tmp_path / "piece.mid", 2, seconds=1.0))
    _, processor, model = app.load()
    span = app.read(piece, 0, 0.5)
    inputs = processor(span, end=span.end + 0.1, **app.prompt_files("grand"))
    wave = model.generate(**inputs, seed=3, temperature=2.0, top_k=50, top_p=0.95)[0, 0].numpy()
    rate, found = rendered(app, piece, "grand", 0, 0.5, 2.0, 3)
    assert np.array_equal(found, np.round(wave[: round((span.end + 0.1) * rate)] * 32767)) and np.abs(wave).max() < 1


def test_what_is_just_within_the_limits(app, write_midi, tmp_path, monkeypatch):
    piece = write_midi(tmp_path / "piece.mid", 2, seconds=5.0)
    monkeypatch.setattr(app, "MAX_BYTES", piece.stat().st_size)
    monkeypatch.setattr(app, "MAX_NOTES", 40)
    assert len(app.read_whole(str(piece)).notes) == 40 and len(app.read(str(piece), 0.0, app.MAX_SECONDS).notes)
    assert len(rendered(app, str(piece), "grand", 0.0, 0.5, 2, app.MAX_SEED)[1])
    monkeypatch.setattr(app, "MAX_BYTES", app.MAX_BYTES - 1)
    with pytest.raises(ValueError, match="piece.mid: the file is larger"):
        app.read_whole(str(piece))


def test_what_is_asked_of_the_hub(app, tmp_path, monkeypatch):
    """A model at the commit that was named; never the default folder, by whose name a stranger could run code here."""
    asked = []
    monkeypatch.setattr(app, "snapshot_download", lambda *given, **more: asked.append((given, more)) or tmp_path)
    monkeypatch.setattr(app, "MODEL", app.DEFAULT_MODEL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="checkpoints/starter: no such folder here; set MIDIVALLE_MODEL"):
        app.load()
    assert asked == []
    monkeypatch.setattr(app, "MODEL", "owner/name")
    monkeypatch.setattr(app, "REVISION", "c0ffee")
    monkeypatch.setattr(app.AutoProcessor, "from_pretrained", lambda folder, **_: folder)
    monkeypatch.setattr(app.AutoModel, "from_pretrained", lambda *_, **__: torch.nn.Identity())
    assert app.load()[:2] == (tmp_path, tmp_path) and asked == [(("owner/name",), {"revision": "c0ffee"})]


def test_an_uploaded_prompt(app, write_midi, tmp_path, monkeypatch):
    """Recording and MIDI together replace the bundled prompt, with the processor's words on them; else one sentence."""
    piece = str(write_midi(tmp_path / "piece.mid", 2, seconds=1.0))
    midi, audio = str(write_midi(tmp_path / "own.mid", 3, seconds=5.0)), str(tmp_path / "own.flac")
    write_audio(audio, 0.1 * np.random.default_rng(1).standard_normal(5 * 32_000))

    def render(audio=None, midi=None, prompt="grand"):
        said = []
        return rendered(app, piece, prompt, 0, 0.5, prompt_audio=audio, prompt_midi=midi, warn=said.append)[1], said

    (wave, said), (bundled, nothing) = render(audio, midi, None), render()
    assert wave.shape == bundled.shape and not np.array_equal(wave, bundled)
    files = (str(tmp_path / "model" / "prompts" / f"grand.{ending}") for ending in ("flac", "mid"))
    assert np.array_equal(render(*files)[0], bundled)  # the way by which a prompt comes makes no difference
    assert nothing == [] and len(said) == 1 and re.search(r"belong together; \S+ to \S+ s are used$", said[0])

    (tmp_path / "text.wav").write_text("no music")
    (tmp_path / "text.mid").write_text("no music")
    write_audio(tmp_path / "silence.wav", np.zeros(32_000))
    piped = bytearray(Path(audio).read_bytes())
    piped[21:26] = bytes([piped[21] & 0xF0]) + bytes(4)  # its header tells no length
    (tmp_path / "piped.flac").write_bytes(piped)
    requests = {
        "piped.flac: its header does not tell how long": (str(tmp_path / "piped.flac"), midi),
        "your piano's MIDI is missing": (audio, None),
        "your piano's recording is missing": (None, midi),
        "gone.wav: the file is not here any more": (str(tmp_path / "gone.wav"), midi),
        "text.wav: is not WAV or FLAC": (str(tmp_path / "text.wav"), midi),
        "silence.wav: is silence": (str(tmp_path / "silence.wav"), midi),
        "text.mid: not a MIDI file": (audio, str(tmp_path / "text.mid")),
    }
    for words, request in requests.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            render(*request)
    monkeypatch.setattr(app, "MAX_NOTES", 39)
    with pytest.raises(ValueError, match="own.mid has more than 39 notes"):
        render(audio, midi)
    monkeypatch.setattr(app, "MAX_PROMPT_SECONDS", 4.0)
    with pytest.raises(ValueError, match="own.flac: lasts more than 4 s"):
        render(audio, midi)
    monkeypatch.setattr(app, "MAX_PROMPT_BYTES", 1000)
    with pytest.raises(ValueError, match="own.flac: the file is larger"):
        render(audio, midi)


def test_how_long_a_performance_may_be(app, write_midi, tmp_path, monkeypatch):
    piece = str(write_midi(tmp_path / "piece.mid", 2, seconds=5.0))
    monkeypatch.setattr(app, "MAX_MINUTES", 0.12)
    assert 5 < app.read_whole(piece).end < 7
    monkeypatch.setattr(app, "MAX_MINUTES", 0.05)
    with pytest.raises(ValueError, match=r"piece.mid has more than .* or 0.05 minutes"):
        app.read_whole(piece)


def test_notes_that_are_left_out_are_said(app, write_midi, tmp_path):
    """Of what is rendered and of an uploaded prompt."""
    files = []
    for name in ("piece", "own"):
        score = Score(write_midi(tmp_path / f"{name}.mid", 3, seconds=2.0))
        score.tracks.append(Track(is_drum=True))
        score.tracks[1].notes.append(Note(0, 100, 40, 80))
        score.dump_midi(tmp_path / f"{name}.mid")
        files.append(str(tmp_path / f"{name}.mid"))
    write_audio(tmp_path / "own.wav", 0.1 * np.random.default_rng(1).standard_normal(2 * 32_000))
    said = []
    rendered(
        app, files[0], "grand", 0, 0.5, prompt_audio=str(tmp_path / "own.wav"), prompt_midi=files[1], warn=said.append
    )
    assert [sentence.split(" 1 ")[0] for sentence in said[:2]] == [
        f"{n}.mid: left out notes:" for n in ("piece", "own")
    ]


def test_between_windows_it_can_be_given_up(app, write_midi, tmp_path, monkeypatch):
    """Gradio goes no further when nobody waits for the sound any more, so that others need not."""
    piece, made = str(write_midi(tmp_path / "piece.mid", 2, seconds=1.0)), []
    windows = (made.append(i) or torch.zeros(1, 1, 640) for i in range(3))
    monkeypatch.setattr(app.load()[2], "generate_stream", lambda **_: windows)
    request = app.render(piece, "grand", 0, 0.5)
    assert next(request) is None and made == [0]
    request.close()
    assert made == [0]


def test_a_space_computes_on_its_share_of_the_cores(app, monkeypatch):
    """Torch counts those of the whole machine; as many threads would wait for one another."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("CPU_CORES", "2")
    app.load()
    assert asked == [2]


def test_what_is_turned_down_is_said(app, write_midi, tmp_path, monkeypatch):
    piece, said = str(write_midi(tmp_path / "piece.mid", 2, seconds=1.0)), []
    monkeypatch.setattr(app.load()[2], "generate_stream", lambda **_: iter([torch.full((1, 1, 640), -2.0)]))
    _, wave = rendered(app, piece, "grand", 0, 0.5, warn=said.append)
    assert wave.min() == -32767 and said == ["turned down by 6.0 dB to avoid clipping"]


def test_the_page(app, write_midi, tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[space]"')
    monkeypatch.setattr(app, "MAX_SECONDS", 2.0)  # the slider begins at 1 s
    monkeypatch.setattr(app, "EXAMPLES", tmp_path / "examples")
    app.EXAMPLES.mkdir()
    write_midi(app.EXAMPLES / "example.mid", 1)
    page = app.build()
    copies = [Path(path) for block in page.blocks.values() for path in block.temp_files]
    gradio.route_utils.delete_files_created_by_app(page, None)  # as every hour
    assert copies and all(path.is_file() for path in copies)
    functions = [function for function in page.fns.values() if function.api_name == "synthesize"]
    assert len(functions) == 1 and functions[0].concurrency_limit == 1
    given = [block.label.split(" (")[0] for block in functions[0].inputs]
    wanted = ["MIDI", "Piano and room", "Start", "Length", "Temperature", "Seed", "Recording", "Its MIDI"]
    assert functions[0].inputs[1].choices == [("A grand at home", "grand")] and functions[0].inputs[1].value == "grand"
    words = " ".join(block.value for block in page.blocks.values() if isinstance(block, gradio.Markdown))
    assert "2 s at a time, of a MIDI file of up to 5,000 notes and 10 minutes" in words and "cc-by-4.0" in words
    assert given == wanted and page.delete_cache == (600, 3600) and page._queue.max_size == 16
    piece, audio, said = str(write_midi(tmp_path / "piece.mid", 2, seconds=4.0)), str(tmp_path / "own.wav"), []
    write_audio(audio, 0.1 * np.random.default_rng(1).standard_normal(4 * 32_000))
    monkeypatch.setattr(gradio, "Warning", lambda text, **options: said.append(text))
    assert list(functions[0].fn(piece, "grand", 0, 0.5, 0, 0, audio, piece))[-1][0] == 32_000
    assert len(said) == 1 and "s are used" in said[0]
    fields = {field.label.split(" (")[0]: field for field in functions[0].inputs}
    for name in ("Start", "Length", "Temperature", "Seed"):  # of a program; gradio alone compares it with its limits
        for value, said_of_it in (("0", "is '0'; give a number"), (None, "is missing; give a number")):
            with pytest.raises(gradio.Error, match=f"the {name.lower()} {said_of_it}"):
                fields[name].preprocess(value)
        assert fields[name].preprocess(1) == 1
    with pytest.raises(gradio.Error, match="recording is missing"):
        next(functions[0].fn(piece, "grand", 0, 0.5, 0, 0, None, piece))


def test_it_imports_nothing_of_the_repository_and_pins_what_it_needs():
    code = (SPACE / "app.py").read_text()
    assert not re.search(r"^\s*(from|import) (tokenization|processing|modeling_midivalle|scripts)", code, re.M)
    ours = (SPACE.parent / "requirements.txt").read_text().splitlines()
    pins = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if "==" in line]
    assert set(pins) - set(ours) == {"torch==2.13.0+cpu"}
    assert "TORCH_VERSION := 2.13.0" in (SPACE.parent / "Makefile").read_text()
    readme = (SPACE / "README.md").read_text()
    assert re.search(r"sdk_version: (\S+)", readme)[1].startswith("6.31.")
    # without one a Space has Python 3.10, for which the pinned numpy has no build
    assert re.search(r'python_version: "(\S+)"', readme)[1] in ("3.11", "3.12", "3.13", "3.14")


def test_what_strangers_may_do(app):
    """The limits are those that the README promises. No upload may be larger than the largest that is used, no other
    site may call the page, and nobody sees the program's errors."""
    told = " ".join((SPACE / "README.md").read_text().partition("Limits: ")[2].split())
    limits = f"MIDI files up to {app.MAX_BYTES // 10**6} MB, {app.MAX_NOTES:,} notes and {app.MAX_MINUTES} minutes; "
    limits += f"recordings up to {app.MAX_PROMPT_BYTES // 10**6} MB, of 1 to {app.MAX_PROMPT_SECONDS:.0f} s; "
    limits += "one request at a time, 16 in the queue; what takes more than three minutes is given up"
    assert told.startswith(limits) and app.DEADLINE_S == 180
    calls = [node for node in ast.walk(ast.parse((SPACE / "app.py").read_text())) if isinstance(node, ast.Call)]
    options = {
        getattr(call.func, "attr", ""): {word.arg: ast.unparse(word.value) for word in call.keywords} for call in calls
    }
    assert options["queue"] == {"max_size": "16", "default_concurrency_limit": "1"}
    closed = {"show_error": "False", "share": "False", "strict_cors": "True", "enable_monitoring": "False"}
    assert options["launch"].items() >= (closed | {"max_file_size": "MAX_PROMPT_BYTES"}).items()
