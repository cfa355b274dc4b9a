# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""int8 layers: near to fp32, the same by kernel and by plain arithmetic, saved and loaded; agreement of the starter."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_midivalle import MidiValleARModel, MidiValleForConditionalGeneration, quantization_midivalle
from modeling_midivalle.decoding_midivalle_ar import FrameDecoder
from modeling_midivalle.quantization_midivalle import Int8Linear

STARTER = Path(__file__).resolve().parents[1] / "checkpoints" / "starter"
PROMPT_FILES = (("midi", "mid"), ("audio", "flac"))
EXAMPLES = Path(__file__).resolve().parents[1] / "space" / "examples"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 5, 48)])
@torch.no_grad()
def test_a_layer_is_near_and_its_kernel_too(monkeypatch, bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(48, 64, bias)
    linear.weight[0] = 0  # an output that hears nothing
    layer, inputs = Int8Linear.from_linear(linear), torch.randn(shape) * torch.logspace(-2, 2, shape[1])[:, None]
    assert layer.weight.abs().max() == 127
    torch.testing.assert_close(layer.weight * layer.scale[:, None], linear.weight, atol=1e-3, rtol=0)
    found = layer(inputs)
    monkeypatch.setattr(quantization_midivalle, "has_cpu_kernel", lambda: False)
    plain, expected = layer(inputs), linear(inputs)
    for result in (found, plain):
        error = (result - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert 0 < error.max() < 0.03  # quiet rows are as exact as loud ones


@torch.no_grad()
def test_a_row_of_zeros_beside_others():
    torch.manual_seed(0)
    linear, inputs = nn.Linear(48, 64), torch.randn(3, 48)
    inputs[1] = 0
    layer = Int8Linear.from_linear(linear)
    found = layer(inputs)
    torch.testing.assert_close(found[1], linear.bias)
    torch.testing.assert_close(found, linear(inputs), atol=0.05, rtol=0)


@torch.no_grad()
def test_a_layer_follows_its_weights():
    """The packed copy is made anew when weights are loaded, and is not copied or cast along."""
    one, other = (Int8Linear.from_linear(nn.Linear(32, 16)) for _ in range(2))
    inputs = torch.randn(1, 32)
    before = one(inputs)
    assert torch.equal(copy.deepcopy(one)(inputs), before)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(inputs), other(inputs)) and not torch.equal(one(inputs), before)
    half = one.half()(inputs.half())
    assert half.dtype == torch.float16 and torch.equal(copy.deepcopy(one)(inputs.half()), half)


@pytest.mark.parametrize("preset", ["tiny", "published"])
def test_a_quantised_model_is_saved_and_loaded(make_model, make_rows, preset, tmp_path):
    model = make_model(preset)
    prompt = torch.randint(0, 2048, (1, 4, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": make_rows()[None], "prompt_codes": prompt, "target_frames": 12, "do_sample": False}
    exact = model.ar(prompt[:, 0], midi_ids=inputs["input_ids"]).logits
    model.quantize_("int8")
    error = (model.ar(prompt[:, 0], midi_ids=inputs["input_ids"]).logits - exact).norm() / exact.norm()
    assert 0 < error < 0.1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ar_config"]["quantization"] == "int8"
    again, report = MidiValleForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and isinstance(again.nar.layers[0].linear2, Int8Linear)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert sum(value.dtype == torch.int8 for value in state.values()) == 4 * (
        len(again.ar.model.layers) + len(again.nar.layers)
    )
    assert torch.equal(again.generate_codes(**inputs), model.generate_codes(**inputs))
    half = MidiValleForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.ar.model.layers[0].linear1.weight.dtype == torch.int8
    assert half.generate_codes(**inputs).shape == (1, 4, 12)


def test_both_decoders_or_none(make_model):
    model = make_model()
    model.nar.layers[0].linear1.base_layer = nn.Identity()  # as peft's layers have one
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="an adapter do not go together"):
        model.quantize_()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.ar.config.quantization is model.nar.config.quantization is None


def test_one_decoder_alone(make_ar, tmp_path):
    ar = make_ar()
    with pytest.raises(ValueError, match='knows "int8", got'):
        ar.quantize_("int3")
    adapted = make_ar()
    adapted.model.layers[0].linear1.base_layer = torch.nn.Identity()  # as peft's layers have one
    with pytest.raises(ValueError, match="an adapter do not go together"):
        adapted.quantize_()
    assert adapted.config.quantization is None
    ar.quantize_()
    ar.save_pretrained(tmp_path)
    again = MidiValleARModel.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[1].linear1.weight, ar.model.layers[1].linear1.weight)


@pytest.mark.slow  # a minute: real weights
@torch.no_grad()
def test_the_starter_agrees_with_itself_in_int8():
    """Where fp32 chose a code, int8, given the same codes before it, chooses the same in at least 98 of 100 frames."""
    from transformers import AutoProcessor

    import tokenization  # noqa: F401  registers the class
    from processing import MidiValleProcessor  # noqa: F401

    model = MidiValleForConditionalGeneration.from_pretrained(STARTER).eval()
    processor = AutoProcessor.from_pretrained(STARTER, trust_remote_code=False)
    same = []
    for piece in ("bach_prelude_c_bwv846", "chopin_prelude_op28_no7"):
        prompt = {f"prompt_{kind}": str(STARTER / "prompts" / f"steinway_studio.{end}") for kind, end in PROMPT_FILES}
        inputs = processor(midi=str(EXAMPLES / f"{piece}.mid"), start=0, end=9, **prompt)
        midi = (inputs["input_ids"][-1:], inputs["attention_mask"][-1:])
        codes, frames = model.codec.encode_codes(inputs["input_values"]), int(inputs["target_frames"][-1])
        lengths = torch.tensor([codes.shape[-1]])
        ids = nn.functional.pad(codes[:, 0], (0, 1), value=model.config.ar_config.bos_token_id)
        chosen, given = [], (ids, torch.ones_like(ids), midi, lengths, frames)

        def note(logits, _, chosen=chosen):
            chosen.append(logits.argmax(-1))
            return chosen[-1]

        exact = FrameDecoder(model.ar, *given).decode(note, torch.zeros(1, frames), 2048)
        rounded, given_codes = copy.deepcopy(model.ar), iter(exact[0])
        rounded.quantize_("int8")
        chosen.clear()

        def follow(logits, _, chosen=chosen, given_codes=given_codes):
            chosen.append(logits.argmax(-1))
            return next(given_codes)[None]

        FrameDecoder(rounded, *given).decode(follow, torch.zeros(1, frames), 2048)
        same += (torch.stack(chosen, 1) == exact)[0].tolist()
    assert len(same) >= 100 and sum(same) / len(same) >= 0.98
