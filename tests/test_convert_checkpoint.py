# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.convert_checkpoint`: every key accounted for, equal numbers, nothing written when in doubt."""

import importlib.util
import json
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, EncodecConfig, EncodecModel

from modeling_midivalle import MidiValleConfig, MidiValleForConditionalGeneration, PianoEncodecModel
from scripts import convert_checkpoint
from scripts.published.check import Check
from scripts.published.codec import read_codec_config
from scripts.published.weights import CheckpointError, published_names
from tests.audiocraft_codec import BOOKS, CODES, decode, encode, random_export
from tests.published_arithmetic import FIXTURES, add_aliases, random_weights

RECORDING = FIXTURES / "published_tiny-io.safetensors"


@pytest.fixture
def published():
    return add_aliases(load_file(FIXTURES / "published_tiny.safetensors"))


@pytest.fixture
def run(tmp_path, capsys):
    """`run(output, midi_valle=..., codec=..., ...)` -> exit code, stdout, stderr; objects are written by torch.save."""

    def command(output, *more, **files):
        arguments = ["--output", str(tmp_path / output), "--num-heads", "2", *map(str, more)]
        for option, value in files.items():
            if isinstance(value, dict | list):
                torch.save(value, tmp_path / f"{option}.pt")
                value = tmp_path / f"{option}.pt"
            arguments += [f"--{option.replace('_', '-')}", str(value)]
        return convert_checkpoint.main(arguments), *capsys.readouterr()

    return command


@torch.no_grad()
def test_from_the_file_to_equal_numbers(run, published, tmp_path, has_usual_mode):
    """A trainer's checkpoint converts, passes the recording's checks and loads by the Auto classes, tables shared."""
    options = {"exp_dir": Path("exp/valle"), "manifest_dir": Path("data"), "num_epochs": 20}  # the trainer's, paths too
    code, out, err = run("new", "--check", RECORDING, midi_valle={"model": published, "step": 3} | options)
    assert code == 0, err
    assert "AR logits, largest difference" in out and "ar_predict_layer.weight -> ar.lm_head.weight" in out
    report = json.loads((tmp_path / "new" / "conversion.json").read_text())
    sources = [key for keys in report["keys"].values() for key in keys]
    assert (
        set(sources) == set(published) and len(report["checks"]) == 17 and len(report["files"]["midi_valle.pt"]) == 64
    )
    model = AutoModel.from_pretrained(tmp_path / "new")
    assert model.num_parameters() == report["parameters"]["all"] == len_unique(published)
    assert model.ar.model.embeddings.midi_tables[0].weight is model.nar.embeddings.midi_tables[0].weight
    assert model.config.ar_config.objective == model.config.nar_config.objective == "published_sum"
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    assert (processor.tokenizer.sustain, processor.tokenizer.mark_held) == ("ignore", False)
    assert (processor.max_prompt_seconds, processor.max_window_seconds) == (8.0, 20.0)
    assert (tmp_path / "new" / "README.md").read_text() == convert_checkpoint.CARD.read_text()
    assert has_usual_mode((tmp_path / "new").iterdir())
    state = model.state_dict()
    convert_checkpoint.check_saved(tmp_path / "new", state)
    for name, change, words in (("ar.model.norm.bias", 1e-6, "not saved as it was read"), ("more", 0, "more was not")):
        with pytest.raises(CheckpointError, match=words):
            changed = state | {name: state["ar.model.norm.bias"] + change}
            convert_checkpoint.check_saved(tmp_path / "new", changed)
    with pytest.raises(ValueError, match="without a codec"):
        model.generate(
            torch.ones(1, 3, 6, dtype=torch.long), prompt_codes=torch.ones(1, 4, 2, dtype=torch.long), target_frames=2
        )
    for part in ("ar", "nar"):
        saved = getattr(model, part)
        saved.save_pretrained(tmp_path / part)
        again, info = type(saved).from_pretrained(tmp_path / part, output_loading_info=True)
        assert not any(info.values())
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in saved.state_dict().items())


def len_unique(state):
    return sum({value.data_ptr(): value.numel() for value in state.values()}.values())


@pytest.mark.parametrize("own", [{0}, {1}, {0, 1}])
def test_heads_that_are_no_aliases_stay_their_own(run, published, tmp_path, own):
    """Of a model that was trained so; no table replaces them, nor those of its heads that are aliases."""
    for k in own:
        published[f"nar_predict_layers.{k}.weight"] = published[f"nar_predict_layers.{k}.weight"] + 1.0
    code, _, err = run("new", midi_valle=published)
    assert code == 0, err
    model = AutoModel.from_pretrained(tmp_path / "new")
    for k in range(2):
        assert torch.equal(model.nar.heads[k].weight, published[f"nar_predict_layers.{k}.weight"])
        table = published[f"nar_audio_embeddings.{k + 2}.word_embeddings.weight"]
        assert torch.equal(model.nar.audio_embeddings[k + 2].weight, table)


def test_what_an_audiocraft_export_does_not_say_is_as_in_audiocraft():
    config = read_codec_config(random_export()["best_state"], {})
    said = (config.use_causal_conv, config.pad_mode, config.dilation_growth_rate, config.normalize)
    assert said == (False, "constant", 2, False) and (config.trim_right_ratio, config.sampling_rate) == (1.0, 32_000)


def test_what_passes_a_check():
    passed = [Check("", difference, 1.0).passed for difference in (0.0, 1.0, 1.01, float("nan"), float("inf"))]
    assert passed == [True, True, False, False, False]


def test_a_failed_check_leaves_no_folder(run, published, tmp_path):
    published["ar_text_position.alpha"] = published["ar_text_position.alpha"] + 1e-3
    code, out, err = run("new", "--check", RECORDING, midi_valle=published)
    assert code == 1 and "FAIL AR logits" in out and "checks failed" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["midi_valle.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, facts: [], "io.json: holds a list"),
        (lambda t, facts: facts | {"teacher_forced": []}, "is not a whole recording"),
        (lambda t, facts: facts.update(prefix_mode=2), "was recorded with 2 heads and prefix mode 2"),
        (lambda t, facts: facts["teacher_forced"].update(ar_loss_sum=0), "is not a whole recording"),
        (lambda t, facts: t.__delitem__("inference.prompt"), "the recording lacks 'inference.prompt'"),
        (
            lambda t, facts: t.update({"inference.greedy_codes": t["inference.greedy_codes"][:, :2].contiguous()}),
            "is not a whole recording",
        ),
    ],
    ids=["list", "nothing", "prefix mode", "no loss", "no prompt", "two codebooks"],
)
def test_recordings_that_cannot_be_used(run, published, tmp_path, change, message):
    tensors, facts = load_file(RECORDING), json.loads((FIXTURES / "published_tiny.json").read_text())
    changed = change(tensors, facts)
    save_file(tensors, tmp_path / "io.safetensors")
    (tmp_path / "io.json").write_text(json.dumps(facts if changed is None else changed))
    code, _, err = run("new", "--check", tmp_path / "io.safetensors", midi_valle=published)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "new").exists()


def test_a_lower_loss_than_recorded_is_a_failed_check(run, published, tmp_path):
    facts = json.loads((FIXTURES / "published_tiny.json").read_text())
    facts["teacher_forced"]["ar_loss_sum"] *= 1.01
    save_file(load_file(RECORDING), tmp_path / "io.safetensors")
    (tmp_path / "io.json").write_text(json.dumps(facts))
    code, out, _ = run("new", "--check", tmp_path / "io.safetensors", midi_valle=published)
    assert code == 1 and out.count("FAIL") == 1 and "FAIL AR loss" in out


class Harmful:
    def __reduce__(self):
        return print, ("code was run",)


FAULTS = {
    "a key is missing": (
        lambda w: w.pop("nar_decoder.layers.1.norm2.norm.bias"),
        "nar_decoder.layers.1.norm2.norm.bias is missing",
    ),
    "the heads are missing": (lambda w: w.pop("ar_predict_layer.weight"), "ar_predict_layer.weight is missing"),
    "a key is left over": (
        lambda w: w.update({"ar_text_prenet.0.weight": torch.ones(2)}),
        "ar_text_prenet.0.weight is left over",
    ),
    "a shape": (
        lambda w: w.update({"nar_text_embedding.bias": torch.ones(9)}),
        r"nar_text_embedding.bias is \(9,\), expected \(8,\)",
    ),
    "a stage row": (
        lambda w: w.update({"nar_stage_embeddings.1.word_embeddings.weight": torch.ones(1, 9)}),
        r"nar_stage_embeddings.1.* \(1, 9\), expected \(1, 8\)",
    ),
    "not finite": (
        lambda w: w["ar_text_embedding.bias"].fill_(torch.nan),
        "ar_text_embedding.bias is not of finite numbers",
    ),
    "half": (
        lambda w: w.update({"ar_text_embedding.bias": torch.ones(8).half()}),
        "ar_text_embedding.bias is torch.float16",
    ),
    "no tensor": (lambda w: w.update(lr=0.1), "'lr' is not the name of a tensor"),
    "no name": (lambda w: w.update({3: torch.ones(2)}), "3 is not the name of a tensor"),
    "sparse": (
        lambda w: w.update({"ar_text_embedding.bias": torch.ones(8).to_sparse()}),
        "ar_text_embedding.bias is not of finite numbers",
    ),
    "a flat table": (
        lambda w: w.update({"ar_predict_layer.weight": w["ar_predict_layer.weight"].flatten()}),
        r"ar_predict_layer.weight is \(\d+,\), no matrix",
    ),
    "code": (lambda w: w.update(lr=Harmful()), "reading them would run code"),
    "an AudioCraft export": (lambda w: w.update({"xp.cfg": "", "best_state": {}}), "give it as --codec"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used(run, published, tmp_path, fault):
    change, message = FAULTS[fault]
    change(published)
    code, out, err = run("new", midi_valle=published)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "code was run" not in out + err
    assert re.search(message, err), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["midi_valle.pt"]


def test_arguments_that_cannot_be_used(run, published, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "text.pt").write_text("no weights")
    with open(tmp_path / "plain.pt", "wb") as file:
        pickle.dump(Harmful(), file)
    (tmp_path / "io.safetensors").touch()
    for output, files, message in (
        ("new", {}, "give --midi-valle, --codec or both"),
        ("new", {"codec": random_export(), "check": RECORDING}, "add --midi-valle"),
        ("new", {"midi_valle": tmp_path / "none.pt"}, "none.pt: no such file"),
        ("new", {"midi_valle": tmp_path / "text.pt"}, "text.pt: not a file of torch.save"),
        ("new", {"midi_valle": tmp_path / "plain.pt"}, "plain.pt: "),
        ("new", {"midi_valle": [1]}, "holds a list"),
        ("full", {"midi_valle": published}, "exists already"),
        ("new", {"midi_valle": published, "num_heads": 3}, "see --num-heads"),
        ("new", {"midi_valle": published, "num_heads": 4, "check": RECORDING}, "was recorded with 2 heads"),
        ("new", {"midi_valle": published, "check": tmp_path / "io.safetensors"}, "io.json: no such file"),
        ("new", {"midi_valle": published, "codec": {"xp.cfg": ""}}, "best_state is missing"),
        ("new", {"codec": {"pretrained": "facebook/encodec_32khz"}}, "only names another codec"),
        ("new", {"codec": tmp_path / "full"}, "no config.json"),
    ):
        code, out, err = run(output, **files)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and "code was run" not in out + err
        assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*.tmp"))


def test_a_file_of_the_old_format(run, published, tmp_path):
    torch.save(published, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "place").mkdir()
    (tmp_path / "new").symlink_to("place")  # an empty folder, as good as none
    assert run("new", midi_valle=tmp_path / "old.pt")[0] == 0
    assert (tmp_path / "place" / "config.json").is_file()


def test_the_full_size_has_the_published_keys():
    """368 entries of the file, two of them aliases, and 371,021,188 parameters; nothing is allocated."""
    config = MidiValleConfig.from_preset("published")
    config.has_codec = False
    with torch.device("meta"):
        model = MidiValleForConditionalGeneration(config)
    keys = [key for name in model.state_dict() for key in published_names(name, 3)]
    assert len(keys) == 368 + 6 and len(set(keys)) == 368  # each MIDI table stands in two places
    assert model.num_parameters() == 371_021_188


@pytest.mark.parametrize("pad_mode", ["constant", "reflect"])
@torch.no_grad()
def test_an_audiocraft_codec_gives_equal_codes_and_audio(run, tmp_path, pad_mode):
    export = random_export(pad_mode)
    assert run("codec", codec=export)[0] == 0
    codec = AutoModel.from_pretrained(tmp_path / "codec")
    assert type(codec) is PianoEncodecModel and codec.config.pad_mode == pad_mode
    assert codec.config.sampling_rate == 32_000 and codec.config.num_quantizers == BOOKS
    wave = 0.3 * torch.randn(2, 1, 640 * 30, generator=torch.Generator().manual_seed(1))
    codes = encode(export["best_state"], wave, pad_mode)
    assert len(codes.unique()) > 15
    assert torch.equal(codec.encode_codes(wave), codes)
    torch.testing.assert_close(
        codec.decode_codes(codes), decode(export["best_state"], codes, pad_mode), atol=1e-5, rtol=0
    )
    other = decode(export["best_state"], codes, "constant" if pad_mode == "reflect" else "reflect")
    assert not torch.allclose(codec.decode_codes(codes), other, atol=1e-4)  # the padding can be heard


@pytest.mark.skipif(importlib.util.find_spec("encodec") is None, reason="needs the optional encodec 0.1.1 (--no-deps)")
@torch.no_grad()
def test_equals_the_encodec_package(run, tmp_path, monkeypatch):
    """The layers that AudioCraft took over, with weights of their own."""
    if importlib.util.find_spec("torchaudio") is None:  # imported by encodec, not used by its layers
        monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    export = random_export("reflect")
    sizes = {
        "dimension": 16,
        "n_filters": 2,
        "ratios": [8, 5, 4, 4],
        "lstm": 1,
        "pad_mode": "reflect",
        "true_skip": True,
    }
    quantizer = ResidualVectorQuantizer(dimension=16, n_q=BOOKS, bins=CODES).eval()
    layers = torch.nn.ModuleDict(
        {"encoder": SEANetEncoder(**sizes), "decoder": SEANetDecoder(**sizes), "quantizer": quantizer}
    )
    layers.load_state_dict(export["best_state"])
    assert run("codec", codec=export)[0] == 0
    codec = PianoEncodecModel.from_pretrained(tmp_path / "codec")
    wave = 0.3 * torch.randn(1, 1, 640 * 30, generator=torch.Generator().manual_seed(1))
    codes = quantizer.vq.encode(layers["encoder"](wave)).transpose(0, 1)
    assert torch.equal(codec.encode_codes(wave), codes)
    audio = layers["decoder"](quantizer.vq.decode(codes.transpose(0, 1)))
    torch.testing.assert_close(codec.decode_codes(codes), audio, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["best_state"].pop("decoder.model.1.lstm.bias_hh_l0"), "lstm.bias_hh_l0 is missing"),
        (
            lambda e: e["best_state"].update({"encoder.model.99.bias": torch.ones(1)}),
            "encoder.model.99.bias is left over",
        ),
        (lambda e: e["best_state"].clear(), "not an EnCodec"),
        (lambda e: e.update(best_state={"model": torch.ones(2)}), "its best_state no weights"),
        (lambda e: e.update({"xp.cfg": e["xp.cfg"].replace("ELU", "GELU")}), "activation is GELU"),
        (lambda e: e.update({"xp.cfg": e["xp.cfg"].replace("encodec.causal", "encodec.none")}), "is not there"),
        (lambda e: e.update({"xp.cfg": "{"}), "not YAML"),
        (lambda e: e.update({"xp.cfg": "seanet: 3"}), "not an EnCodec"),
        (
            lambda e: e.update({"xp.cfg": e["xp.cfg"].replace("final_activation: null", "final_activation: Tanh")}),
            "final_activation is Tanh",
        ),
        (lambda e: e["best_state"].update(epoch=3), "'epoch' is not the name of a tensor"),
        (lambda e: e["best_state"]["decoder.model.1.lstm.bias_hh_l0"].fill_(torch.nan), "is not of finite numbers"),
    ],
)
def test_codecs_that_cannot_be_used(run, tmp_path, change, message):
    export = random_export()
    change(export)
    code, _, err = run("new", codec=export)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "new").exists()


def test_both_files_make_a_model_that_sounds(run, tmp_path):
    """Codec and decoders of the same codebooks, the codec from an export and from a Hugging Face folder."""
    weights = random_weights(16, 2, 64, seed=2, codes=CODES)
    assert run("whole", midi_valle=weights, codec=random_export())[0] == 0
    model = AutoModel.from_pretrained(tmp_path / "whole")
    rows = torch.tensor([[[1] * 6, [5, 5, 9, 9, 5, 4], [2] * 6]])
    inputs = {"input_ids": rows, "input_values": 0.1 * torch.randn(1, 1, 6400), "target_frames": 5, "seed": 0}
    audio = model.generate(**inputs)
    assert audio.shape == (1, 1, 3200) and audio.abs().max() > 0
    assert torch.equal(model.generate(**inputs, do_sample=True, top_k=50, top_p=0.95), audio)  # what its card says
    assert not torch.equal(model.generate(**inputs, do_sample=False), audio)
    plain = EncodecModel(EncodecConfig(**model.codec.config.to_dict() | {"model_type": "encodec"}))
    plain.load_state_dict(model.codec.state_dict())
    plain.save_pretrained(tmp_path / "hf")
    assert run("again", midi_valle=weights, codec=tmp_path / "hf")[0] == 0
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "again").generate(**inputs), audio)
    code, _, err = run("new", midi_valle=random_weights(16, 2, 64, seed=2), codec=random_export())
    assert code == 2 and "do not fit together: codebook_size differs" in err


def test_two_files_of_one_name_are_both_listed(run, tmp_path):
    weights = random_weights(16, 2, 64, seed=2, codes=CODES)
    for folder, content in (("valle", weights), ("codec", random_export())):
        (tmp_path / folder).mkdir()
        torch.save(content, tmp_path / folder / "model.bin")
    paths = [tmp_path / folder / "model.bin" for folder in ("valle", "codec")]
    code, out, err = run("new", midi_valle=paths[0], codec=paths[1])
    assert code == 0, err
    report = json.loads((tmp_path / "new" / "conversion.json").read_text())
    assert report["files"] == {str(path): convert_checkpoint.sha256(path) for path in paths}
    assert all(f"{path}: sha256 " in out for path in paths)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; no folder was written\n"),
        (SafetensorError("I/O error: No space left on device"), 2, "error: I/O error: No space left on device\n"),
    ],
    ids=["interrupted", "full"],
)
def test_a_folder_that_is_not_finished_is_not_there(run, published, tmp_path, monkeypatch, error, code, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(convert_checkpoint, "check_saved", fail)
    assert run("new", midi_valle=published)[::2] == (code, said)
    assert [path.name for path in tmp_path.iterdir()] == ["midi_valle.pt"]
