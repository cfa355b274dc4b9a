# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.assemble_model`: rounded parts in, a folder out that loads equal; nothing half-made is left."""

import json
import re

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from modeling_midivalle import MidiValleForConditionalGeneration, PianoListenerConfig, PianoListenerModel
from scripts import assemble_model
from scripts.codec.parts import trained_listener
from scripts.models.model_folder import load_listener
from scripts.models.trained_parts import codec_hash
from scripts.published.weights import SAMPLING
from tokenization import MidiValleTokenizer

IS_REMOTE = """
for one in (model, processor, processor.tokenizer):
    assert "transformers_modules" in type(one).__module__
"""


REMOTE_LISTENER = """
import sys, torch
from transformers import AutoModel
listener = AutoModel.from_pretrained(sys.argv[1], subfolder="listener", trust_remote_code=True)
assert "transformers_modules" in type(listener).__module__
print(tuple(listener.hear(torch.zeros(1, 1, 1000)).shape))
"""


def round_codec(codec):
    """What `scripts.train_codec` does before it saves a codec."""
    with torch.no_grad():
        for name, value in codec.state_dict().items():
            if "codebook" not in name:
                value.copy_(value.half().float())


@pytest.fixture
def parts(make_model, tmp_path):
    """Folders of a tiny codec (rounded to fp16), AR and NAR."""
    model = make_model()
    round_codec(model.codec)
    for name in ("codec", "ar", "nar"):
        getattr(model, name).save_pretrained(tmp_path / name)
    return model


def assemble(folder, *more):
    names = [argument for name in ("codec", "ar", "nar") for argument in (f"--{name}", str(folder / name))]
    return assemble_model.main([*names, "--output", str(folder / "out"), *more])


def stored(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def test_the_folder_says_how_it_is_played(parts, tmp_path):
    assert assemble(tmp_path) == 0
    assert not AutoModel.from_pretrained(tmp_path / "out").config.as_recorded
    assert assemble(tmp_path, "--as-recorded", "--onset-delay", "0.01") == 0
    assert AutoModel.from_pretrained(tmp_path / "out").config.as_recorded
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.onset_delay_seconds == 0.01 and processor.correct_level is False
    assert assemble(tmp_path, "--correct-level") == 0
    assert AutoProcessor.from_pretrained(tmp_path / "out").correct_level is True
    colour = [0.0, 0.5, 1.0, 2.0, 1.0, 0.0, -1.0, -2.0, -2.5, -3.0]
    assert assemble(tmp_path, "--as-recorded", "--colour", *map(str, colour)) == 0
    assert AutoModel.from_pretrained(tmp_path / "out").config.colour_gains_db == colour
    for flag in ("as_recorded", "mean_vectors"):
        assert assemble(tmp_path, f"--{flag.replace('_', '-')}") == 0
        config = AutoModel.from_pretrained(tmp_path / "out").config
        assert [name for name in ("as_recorded", "mean_vectors") if getattr(config, name)] == [flag]
    assert assemble(tmp_path, "--colour", *["nan"] * 10) == 2
    assert assemble(tmp_path, "--onset-delay", "1") == 2
    assert assemble(tmp_path, "--onset-delay", "nan") == 2
    assert assemble(tmp_path, "--keys-from-midi") == 2  # this codec has no axes of keys
    assert assemble(tmp_path, "--velocity-gain", "8") == 2  # nor oscillators
    for gain in ("--treble-gain", "--octave-gain", "--attack-gain", "--sustain-gain"):  # go with them
        assert assemble(tmp_path, gain, "8") == 2


def test_the_folder_does_not_say_where_its_parts_lay(parts, tmp_path):
    assert assemble(tmp_path) == 0
    assert not [path for path in (tmp_path / "out").glob("*.json") if str(tmp_path) in path.read_text()]


def test_notes_are_read_as_the_decoders_have_learned_them(parts, tmp_path, capsys):
    assert assemble(tmp_path) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.mark_held
    assert (processor.max_prompt_seconds, processor.max_window_seconds) == (6.0, 16.0)
    MidiValleTokenizer(mark_held=False).save_pretrained(tmp_path / "ar")
    MidiValleTokenizer(mark_held=False, sustain="ignore").save_pretrained(tmp_path / "nar")
    assert assemble(tmp_path) == 2
    said = "the AR has learned with sustain extend and mark_held False, the NAR with sustain ignore and mark_held False"
    assert said in capsys.readouterr().err
    MidiValleTokenizer(mark_held=False).save_pretrained(tmp_path / "nar")
    assert assemble(tmp_path, "--max-prompt", "3", "--max-window", "20") == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert not processor.tokenizer.mark_held
    assert (processor.max_prompt_seconds, processor.max_window_seconds) == (3.0, 20.0)


def test_decoders_of_the_published_objective_are_sampled_as_the_converted_ones(make_model, parts, tmp_path):
    """Their AR learned from the truth alone: always the likeliest code, it would repeat itself."""
    assert assemble(tmp_path) == 0
    assert not AutoModel.from_pretrained(tmp_path / "out").generation_config.do_sample
    make_model("published").ar.save_pretrained(tmp_path / "ar")
    make_model("published").nar.save_pretrained(tmp_path / "nar")
    assert assemble(tmp_path) == 0
    config = AutoModel.from_pretrained(tmp_path / "out").generation_config
    assert {name: getattr(config, name) for name in SAMPLING} == SAMPLING


def test_a_codec_that_is_not_rounded_is_stored_as_it_is(parts, tmp_path, capsys):
    with torch.no_grad():
        parts.codec.encoder.layers[0].conv.bias += 1e-5
    parts.codec.save_pretrained(tmp_path / "codec")
    assert assemble(tmp_path) == 2 and "or give --dtype float32" in capsys.readouterr().err
    assert assemble(tmp_path, "--dtype", "float32") == 0
    loaded = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in parts.state_dict().items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_folder_loads_in_fp32_and_equals_the_rounded_parts(parts, dtype, tmp_path):
    assert assemble(tmp_path, "--dtype", dtype) == 0
    loaded, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is MidiValleForConditionalGeneration and not any(report.values())
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float32}
    for name, value in loaded.state_dict().items():
        precision = getattr(torch, dtype) if not name.startswith("codec.") else torch.float16
        if name.startswith("codec.quantizer"):
            precision = torch.float32
        if name.endswith("embed_avg"):  # tells nothing that the others do not
            assert not value.any()
            continue
        assert torch.equal(value, parts.state_dict()[name].to(precision).float()), name
    wave = torch.randn(1, 1, 3200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.codec.encode_codes(wave), parts.codec.encode_codes(wave))


def test_a_listener_lies_beside_and_loads_from_there(parts, make_model, run_python, tmp_path, capsys):
    """In fp16 or int8, with its code where transformers looks for it."""
    assert assemble(tmp_path, "--listener", str(tmp_path / "heard")) == 2
    assert "the codec has no axes for what it hears" in capsys.readouterr().err
    codec = make_model("keys").codec
    round_codec(codec)
    codec.save_pretrained(tmp_path / "codec")
    assert assemble(tmp_path, "--listener", str(tmp_path / "heard")) == 2
    assert "heard: holds no listener folder" in capsys.readouterr().err
    torch.manual_seed(0)
    listener = PianoListenerModel(PianoListenerConfig(hidden_size=4))
    listener.save_pretrained(tmp_path / "heard" / "listener")
    assert assemble(tmp_path, "--listener", str(tmp_path / "heard")) == 0
    out = tmp_path / "out"
    assert {f.name for f in (out / "listener").iterdir()} == {"config.json", "model.safetensors"}
    assert all(value.dtype == torch.float16 for value in stored(out / "listener").values())
    assert str(tmp_path) not in (out / "listener" / "config.json").read_text()
    loaded = load_listener(out)
    for name, value in listener.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())
    assert assemble(tmp_path, "--listener", str(tmp_path / "heard"), "--dtype", "float32") == 0
    assert torch.equal(load_listener(out).last.weight, listener.last.weight)
    heard = ["--listener", str(tmp_path / "heard"), "--quantize-listener"]
    assert assemble(tmp_path, *heard) == 0
    assert stored(out / "listener")["keys.weight"].dtype == torch.int8
    assert stored(out / "listener")["keys.scale"].dtype == torch.float16
    assert load_listener(out).config.quantization == "int8" and load_listener(out).keys.scale.dtype == torch.float32
    assert assemble(tmp_path, *heard[2:]) == 2 and "is for --listener" in capsys.readouterr().err
    assert run_python(tmp_path, REMOTE_LISTENER, out).split() == ["(1,", "2,", "88)"]
    learns = trained_listener(out)
    assert learns.config.quantization is None and learns.keys.weight.requires_grad
    (tmp_path / "heard" / "listener" / "config.json").write_text("{")
    assert assemble(tmp_path, "--listener", str(tmp_path / "heard")) == 2
    assert "config.json: is damaged" in capsys.readouterr().err
    assert assemble(tmp_path) == 0
    assert load_listener(out) is None and not list(out.glob("listener/*"))  # it was of another model


def test_what_is_stored(parts, tmp_path, has_usual_mode):
    assert assemble(tmp_path) == 0
    tensors = stored(tmp_path / "out")
    kinds = {"decoders": set(), "codebooks": set(), "codec": set()}
    for name, value in tensors.items():
        kind = "decoders" if not name.startswith("codec.") else "codebooks" if name.endswith(".embed") else "codec"
        if not name.endswith(("cluster_size", "inited")):
            kinds[kind].add(value.dtype)
    assert kinds == {"decoders": {torch.float16}, "codebooks": {torch.float32}, "codec": {torch.float16}}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["codec_config"]["dtype"] == "float32"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["do_sample"] is False
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.max_window_seconds, processor.max_prompt_seconds) == (16.0, 6.0)
    assert processor.feature_extractor.sampling_rate == 32_000 and processor.tokenizer.sustain == "extend"
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert has_usual_mode(files)
    assert not [p.name for p in files if str(tmp_path) in p.read_bytes().decode("latin-1")]


def test_other_files_stay_and_old_weights_go(parts, tmp_path, monkeypatch):
    """A second model of fewer shards leaves no shard of the first behind; the card and the prompts are untouched."""
    (tmp_path / "out" / "prompts").mkdir(parents=True)
    (tmp_path / "out" / "prompts" / "a.mid").write_bytes(b"MThd")
    (tmp_path / "out" / "README.md").write_text("card")
    monkeypatch.setattr(assemble_model, "MAX_SHARD_SIZE", "200KB")
    assert assemble(tmp_path) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    monkeypatch.setattr(assemble_model, "MAX_SHARD_SIZE", "14MB")
    assert assemble(tmp_path) == 0
    assert [p.name for p in (tmp_path / "out").glob("model.*")] == ["model.safetensors"]
    assert (tmp_path / "out" / "prompts" / "a.mid").read_bytes() == b"MThd"
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ar", "codec", "nar", "out"]


def test_how_large_the_folder_may_be(parts, tmp_path, monkeypatch, capsys):
    """With its other files, without those that are replaced."""
    monkeypatch.setattr(assemble_model, "MAX_SHARD_SIZE", "200KB")
    assert assemble(tmp_path) == 0
    monkeypatch.setattr(assemble_model, "MAX_SHARD_SIZE", "14MB")
    limit = str(sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) / 2**20 + 0.01)
    assert assemble(tmp_path, "--max-mib", limit) == 0
    (tmp_path / "out" / "README.md").write_bytes(bytes(2**16))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert (
        assemble(tmp_path, "--max-mib", limit) == 2
        and "MiB; take smaller parts, or raise --max-mib" in capsys.readouterr().err
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_that_does_not_load_as_it_was_saved_is_not_kept(parts, tmp_path, monkeypatch, capsys):
    save = MidiValleForConditionalGeneration.save_pretrained

    def save_wrongly(self, folder, state_dict, **options):
        changed = {"ar.model.norm.weight": state_dict["ar.model.norm.weight"] + 1}
        save(self, folder, state_dict=state_dict | changed, **options)

    monkeypatch.setattr(MidiValleForConditionalGeneration, "save_pretrained", save_wrongly)
    assert assemble(tmp_path) == 2
    assert "does not load as it was saved: ['ar.model.norm.weight']" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ar", "codec", "nar"]


def test_a_part_is_not_replaced_by_the_whole(parts, tmp_path, monkeypatch, capsys):
    """By whatever name of its folder."""
    before = {path: path.read_bytes() for path in (tmp_path / "ar").iterdir()}
    monkeypatch.chdir(tmp_path / "ar")
    for output in (str(tmp_path / "codec" / ".." / "ar"), "."):
        assert assemble(tmp_path, "--output", output) == 2
        assert f"--output {tmp_path / 'ar'}: holds a midivalle_ar model" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "ar").iterdir()} == before


def test_the_folder_has_a_card_that_works(parts, run_python, write_midi, tmp_path):
    """Its example is run as it stands, without the repository; its licence is that of all parts, or the one that is
    asked for."""
    assert assemble(tmp_path) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    found = card.data.to_dict()
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "audio-to-audio")
    assert "license" not in found and "`codec`, `ar`, `nar`, whose licence is not told" in card.text
    assert {"midi", "piano"} <= set(found["tags"]) and f"| ar | {parts.ar.num_parameters():,} |" in card.text
    assert str(tmp_path) not in card.content
    for name, seconds in (("piece", 2.0), ("mine", 1.5)):
        write_midi(tmp_path / f"{name}.mid", seconds=seconds)
    soundfile.write(tmp_path / "mine.wav", 0.1 * np.random.default_rng(0).standard_normal(48_000), 32_000)
    run_python(tmp_path, re.search(r"```python\n(.*?)```", card.text, re.S)[1] + IS_REMOTE)
    wave, rate = soundfile.read(tmp_path / "piece.wav")
    assert rate == 32_000 and len(wave) > 48_000
    for name in ("codec", "ar", "nar"):
        (tmp_path / name / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# Part\n")
    assert assemble(tmp_path) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-nc-sa-4.0" and "licence holds for them too: cc-by-nc-sa-4.0." in card.text
    (tmp_path / "nar" / "README.md").write_text("---\nlicense: mit\n---\n# Part\n")
    assert assemble(tmp_path) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None and "whose licences differ" in card.text
    assert assemble(tmp_path, "--licence", "cc-by-nc-4.0") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-nc-4.0" and "cc-by-nc-4.0. The weights are derived from" in card.text
    with pytest.raises(SystemExit):
        assemble(tmp_path, "--licence", "CC BY 4.0")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SafetensorError("I/O error: No space left on device"), 2, "error: I/O error: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was assembled\n"),
    ],
    ids=["full", "interrupted"],
)
def test_a_folder_that_is_not_finished(parts, error, code, said, tmp_path, monkeypatch, capsys):
    """Is as it was, and what has befallen is one sentence."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(MidiValleForConditionalGeneration, "save_pretrained", fail)
    assert assemble(tmp_path) == code and capsys.readouterr().err == said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ar", "codec", "nar"]


def test_refused_parts(parts, make_ar, tmp_path, capsys):
    """One sentence, exit code 2, and the output folder as it was."""

    def refused(sentence, *more):
        assert assemble(tmp_path, *more) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    refused("would be more than 0.1 MiB", "--max-mib", "0.1")
    refused("would be more than 0.1 MiB", "--max-mib", "0.1", "--output", str(tmp_path / "new" / "er" / "folder"))
    assert not (tmp_path / "new").exists()
    for size in ("nan", "-1", "0"):
        refused(f"--max-mib must be above 0, got {float(size)}", "--max-mib", size)
    for gain in ("velocity", "treble", "octave", "attack", "sustain"):
        more = [] if gain == "velocity" else ["--velocity-gain", "8"]
        refused(f"--{gain}-gain must be finite, got nan", "--keys-from-midi", *more, f"--{gain}-gain", "nan")
    refused("--velocity-gain is for --keys-from-midi", "--velocity-gain", "8")
    refused("--treble-gain is for --velocity-gain", "--keys-from-midi", "--treble-gain", "8")
    refused("holds no config.json", "--nar", str(tmp_path / "none"))
    refused("holds a midivalle_nar model, expected midivalle_ar", "--ar", str(tmp_path / "nar"))
    make_ar(num_codebooks=3).save_pretrained(tmp_path / "three")
    refused("the parts do not fit together: num_codebooks differs", "--ar", str(tmp_path / "three"))
    with torch.no_grad():
        parts.codec.encoder.layers[0].conv.bias += 1e-5
    parts.codec.save_pretrained(tmp_path / "codec")
    refused("the codec is not rounded to fp16")
    round_codec(parts.codec)
    parts.codec.save_pretrained(tmp_path / "codec")
    with torch.no_grad():
        parts.ar.model.norm.weight[0] = 1e6  # beyond fp16
    parts.ar.save_pretrained(tmp_path / "ar")
    refused("not finite in float16")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def changed(change):
    def damage(path):
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, "model.safetensors: is damaged"),
        (lambda path: path.write_bytes(b""), "model.safetensors: is damaged"),
        (lambda path: path.unlink(), "no model can be loaded"),
        (changed(lambda w: w.update({"quantizer.layers.0.codebook.embed": torch.zeros(7)})), "mismatched_keys"),
        (changed(lambda w: w["quantizer.layers.0.codebook.embed"].fill_(torch.nan)), "not finite: quantizer.layers.0"),
        (lambda path: path.with_name("config.json").write_text('{"model_type": "encodec", "num_filters": "2"}'), "int"),
    ],
    ids=["cut", "empty", "gone", "shape", "nan", "configuration"],
)
def test_damaged_parts_are_named(parts, damage, sentence, tmp_path, capsys):
    damage(tmp_path / "codec" / "model.safetensors")
    assert assemble(tmp_path) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "codec") in error and sentence in error and error.count("\n") == 1
    if "is damaged" in sentence:  # before any codes are made
        with pytest.raises(ValueError, match=sentence):
            codec_hash(tmp_path / "codec")
