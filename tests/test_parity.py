# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The `published` preset computes what the published program computes, from the published program's own weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_midivalle import MidiValleARConfig, MidiValleARModel, MidiValleNARConfig, MidiValleNARModel
from tests.published_arithmetic import ar_forward, nar_forward, to_our_state_dict

FIXTURE = Path(__file__).parent / "fixtures" / "published_tiny.safetensors"
SMALL = {"midi_vocab_sizes": [12, 10, 20, 16, 14, 8], "midi_embedding_sizes": [3, 2, 5, 4, 2, 2], "codebook_size": 20}


def published_weights(width, layers, ffn, seed, vocab=(12, 10, 20, 16, 14, 8), codes=20):
    """A flat state_dict with the published keys, at another size; two of the three NAR heads are aliases."""
    g = torch.Generator().manual_seed(seed)
    widths, shapes = SMALL["midi_embedding_sizes"], {}
    for i, (v, e) in enumerate(zip(vocab, widths, strict=True)):
        shapes[f"feat_emb.{i}.word_embeddings.weight"] = (v, e)
    for part in ("ar", "nar"):
        shapes |= {f"{part}_text_embedding.weight": (width, sum(widths)), f"{part}_text_embedding.bias": (width,)}
        shapes |= {f"{part}_text_position.alpha": (1,), f"{part}_audio_position.alpha": (1,)}
        norms = [f"{part}_decoder.norm"]
        for i in range(layers):
            p = f"{part}_decoder.layers.{i}"
            shapes |= {f"{p}.self_attn.in_proj_weight": (3 * width, width), f"{p}.self_attn.in_proj_bias": (3 * width,)}
            shapes |= {f"{p}.self_attn.out_proj.weight": (width, width), f"{p}.self_attn.out_proj.bias": (width,)}
            shapes |= {f"{p}.linear1.weight": (ffn, width), f"{p}.linear1.bias": (ffn,)}
            shapes |= {f"{p}.linear2.weight": (width, ffn), f"{p}.linear2.bias": (width,)}
            norms += [f"{p}.norm1", f"{p}.norm2"]
        for n in norms:
            if part == "nar":
                shapes |= {f"{n}.project_layer.weight": (2 * width, width), f"{n}.project_layer.bias": (2 * width,)}
                n += ".norm"
            shapes |= {f"{n}.weight": (width,), f"{n}.bias": (width,)}
    shapes["ar_audio_embedding.word_embeddings.weight"] = shapes["ar_predict_layer.weight"] = (codes + 1, width)
    for k in range(4):
        shapes[f"nar_audio_embeddings.{k}.word_embeddings.weight"] = (codes + (k == 0), width)
    for k in range(3):
        shapes[f"nar_stage_embeddings.{k}.word_embeddings.weight"] = (1, width)
    shapes["nar_predict_layers.2.weight"] = (codes, width)
    weights = {name: 0.4 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    for name in weights:
        if "norm" in name and len(shapes[name]) == 1 and name.endswith("weight"):
            weights[name] += 1  # scales near one let attention be sharp: else a wrong scale hides
    for k in (0, 1):
        weights[f"nar_predict_layers.{k}.weight"] = weights[f"nar_audio_embeddings.{k + 2}.word_embeddings.weight"]
    return weights


def our_models(weights, width, layers, ffn, heads):
    fields = SMALL | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
    }
    codes = SMALL["codebook_size"]
    specials = {"vocab_size": codes + 1, "eos_token_id": codes, "pad_token_id": codes}
    ar = MidiValleARModel(MidiValleARConfig.from_preset("published", **fields, **specials)).eval()
    nar = MidiValleNARModel(MidiValleNARConfig.from_preset("published", **fields)).eval()
    ours = to_our_state_dict(weights)
    for name, model in (("ar.", ar), ("nar.", nar)):
        model.load_state_dict({k.removeprefix(name): v for k, v in ours.items() if k.startswith(name)})
    return ar, nar


def inputs(seed=5):
    g = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randint(0, v, (2, 11), generator=g) for v in SMALL["midi_vocab_sizes"]], -1)
    x_lens, y_lens = torch.tensor([11, 8]), torch.tensor([23, 17])
    y = torch.randint(0, SMALL["codebook_size"], (2, 23, 4), generator=g)
    return x, x_lens, y, y_lens


def our_outputs(ar, nar, x, x_lens, y, y_lens, prompts=(5, 4, 6)):
    """AR logits and loss, then per stage NAR logits behind the prompt and loss."""
    codes = y.transpose(1, 2)
    midi_mask = (torch.arange(x.shape[1]) < x_lens[:, None]).long()
    mask = (torch.arange(y.shape[1]) < y_lens[:, None]).long()
    with torch.no_grad():
        zero = torch.zeros(len(x), dtype=torch.long)
        out = ar(midi_ids=x, midi_attention_mask=midi_mask, **ar.build_inputs(codes[:, 0], mask, zero))
        results = [(out.logits, out.loss)]
        for stage, P in enumerate(prompts, start=1):
            out = nar(codes, x, midi_mask, mask, torch.full((len(x),), P), stage, labels=codes)
            results.append((out.logits[:, P:], out.loss))
    return results


@pytest.mark.parametrize(("width", "layers", "ffn", "heads"), [(16, 2, 64, 2), (24, 3, 48, 4)])
def test_equals_the_published_arithmetic(width, layers, ffn, heads):
    weights = published_weights(width, layers, ffn, seed=width)
    x, x_lens, y, y_lens = inputs()
    ours = our_outputs(*our_models(weights, width, layers, ffn, heads), x, x_lens, y, y_lens)
    theirs = [ar_forward(weights, x, x_lens, y, y_lens, heads, layers)]
    theirs += [
        nar_forward(weights, x, x_lens, y, y_lens, k, P, heads, layers) for k, P in enumerate((5, 4, 6), start=1)
    ]
    for (logits, loss), (expected_logits, expected_loss) in zip(ours, theirs, strict=True):
        assert expected_logits.abs().max() > 1  # else the comparison says little
        torch.testing.assert_close(logits, expected_logits, atol=2e-5, rtol=0)
        torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-6)


def test_equals_the_stored_numbers():
    """Weights, inputs and outputs stored by the arithmetic: both sides cannot drift together."""
    stored = load_file(FIXTURE)
    weights = {k.removeprefix("weights."): v for k, v in stored.items() if k.startswith("weights.")}
    for k in (0, 1):
        weights[f"nar_predict_layers.{k}.weight"] = weights[f"nar_audio_embeddings.{k + 2}.word_embeddings.weight"]
    ours = our_outputs(*our_models(weights, 8, 2, 16, 2), *(stored[k] for k in ("x", "x_lens", "y", "y_lens")))
    for i, (logits, loss) in enumerate(ours):
        torch.testing.assert_close(logits, stored[f"logits.{i}"], atol=2e-5, rtol=0)
        torch.testing.assert_close(loss, stored[f"loss.{i}"], atol=0, rtol=1e-6)


def test_a_small_fault_is_seen():
    """5 % on the attention scale, or a wrong alpha, is far above the tolerance."""
    weights = published_weights(16, 2, 64, seed=16)
    x, x_lens, y, y_lens = inputs()
    expected, _ = ar_forward(weights, x, x_lens, y, y_lens, 2, 2)
    for fault in ("scale", "alpha"):
        ar, nar = our_models(weights, 16, 2, 64, 2)
        if fault == "scale":
            ar.model.layers[1].self_attn.scaling *= 1.05
        else:
            ar.model.embeddings.audio_positions.alpha.data += 0.02
        logits, _ = our_outputs(ar, nar, x, x_lens, y, y_lens)[0]
        assert (logits - expected).abs().max() > 1e-3, fault
