# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The `published` preset computes what the published program computes, from weights by the published names."""

import pytest
import torch
from safetensors.torch import load_file

from scripts.convert_checkpoint import build_model
from scripts.published.check import compare
from tests.published_arithmetic import FIXTURES, add_aliases, ar_forward, draw_inputs, nar_forward, random_weights

PREFIXES = (5, 4, 6)


def our_outputs(model, x, x_lens, y, y_lens):
    """AR logits, loss and outputs of the layers; per stage the same of the NAR, logits behind the prompt."""
    codes = y.transpose(1, 2)
    midi_mask = (torch.arange(x.shape[1]) < x_lens[:, None]).long()
    mask = (torch.arange(y.shape[1]) < y_lens[:, None]).long()
    with torch.no_grad():
        zero = torch.zeros(len(x), dtype=torch.long)
        built, more = model.ar.build_inputs(codes[:, 0], mask, zero), {"output_hidden_states": True}
        out = model.ar(midi_ids=x, midi_attention_mask=midi_mask, **built, **more)
        results = [(out.logits, out.loss, out.hidden_states)]
        for stage, P in enumerate(PREFIXES, start=1):
            out = model.nar(codes, x, midi_mask, mask, torch.full((len(x),), P), stage, labels=codes, **more)
            results.append((out.logits[:, P:], out.loss, out.hidden_states))
    return results


@pytest.mark.parametrize(
    ("width", "layers", "ffn", "heads"), [(16, 2, 64, 2), (24, 3, 48, 4), (42, 1, 20, 7), (10, 4, 6, 1)]
)
def test_equals_the_published_arithmetic(width, layers, ffn, heads):
    weights, inputs = random_weights(width, layers, ffn, seed=width), draw_inputs()
    ours = our_outputs(build_model(weights, heads, None)[0], *inputs)
    traces = [[] for _ in ours]
    theirs = [ar_forward(weights, *inputs, heads, layers, traces[0])]
    theirs += [nar_forward(weights, *inputs, k, P, heads, layers, traces[k]) for k, P in enumerate(PREFIXES, start=1)]
    traces[0].pop(-2)  # the AR's last hidden state is the norm's, those of the NAR are its layers' alone
    for trace in traces[1:]:
        trace.pop()
    for (logits, loss, states), (expected, expected_loss), trace in zip(ours, theirs, traces, strict=True):
        assert expected.abs().max() > 1  # else the comparison says little
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-6)
        torch.testing.assert_close(states[1:], tuple(trace), atol=2e-5, rtol=0)


def test_equals_the_recording():
    """Weights and outputs stored by the arithmetic: both sides cannot drift together."""
    weights = add_aliases(load_file(FIXTURES / "published_tiny.safetensors"))
    checks = compare(build_model(weights, 2, None)[0], FIXTURES / "published_tiny-io.safetensors")
    assert len(checks) == 17 and [c for c in checks if not c.passed] == []


def test_heads_that_are_not_tied_stay_apart():
    weights = random_weights(16, 2, 64, seed=1)
    weights["nar_predict_layers.1.weight"] = weights["nar_predict_layers.1.weight"] + 1
    model = build_model(weights, 2, None)[0]
    assert not model.config.nar_config.tie_word_embeddings
    for stage in (1, 2):
        expected, _ = nar_forward(weights, *draw_inputs(), stage, PREFIXES[stage - 1], 2, 2)
        torch.testing.assert_close(our_outputs(model, *draw_inputs())[stage][0], expected, atol=2e-5, rtol=0)


def test_a_small_fault_is_seen():
    """5 % on the attention scale, or a wrong alpha, is far above the tolerance."""
    weights = random_weights(16, 2, 64, seed=16)
    expected, _ = ar_forward(weights, *draw_inputs(), 2, 2)
    for fault in ("scale", "alpha"):
        model = build_model({key: value.clone() for key, value in weights.items()}, 2, None)[0]
        if fault == "scale":
            model.ar.model.layers[1].self_attn.scaling *= 1.05
        else:
            model.ar.model.embeddings.audio_positions.alpha.data += 0.02
        logits = our_outputs(model, *draw_inputs())[0][0]
        assert (logits - expected).abs().max() > 1e-3, fault
