# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""
The published MIDI-VALLE (arXiv 2507.08530 and its code) as plain functions over its flat state_dict. Independent of
`modeling_midivalle` on purpose: the parity tests compare the two.

    python -m tests.published_arithmetic    # writes tests/fixtures/published_tiny*
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARIES, WIDTHS = (12, 10, 20, 16, 14, 8), (3, 2, 5, 4, 2, 2)


def random_weights(width, layers, ffn, seed, codes=20):
    """A flat state_dict with the published keys at another size; two of the three NAR heads are aliases."""
    g = torch.Generator().manual_seed(seed)
    shapes = {f"feat_emb.{i}.word_embeddings.weight": (v, e) for i, (v, e) in enumerate(zip(VOCABULARIES, WIDTHS))}
    for part in ("ar", "nar"):
        shapes |= {f"{part}_text_embedding.weight": (width, sum(WIDTHS)), f"{part}_text_embedding.bias": (width,)}
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
    return add_aliases(weights)


def add_aliases(weights):
    """The heads that are tied one step off, as the published file has them: the same tensors under a second name."""
    aliases = {f"nar_predict_layers.{k}.weight": f"nar_audio_embeddings.{k + 2}.word_embeddings.weight" for k in (0, 1)}
    return weights | {name: weights[table] for name, table in aliases.items()}


def sinusoid(n, d, start=0):
    """(n, d), even dimensions sin, odd cos."""
    t = torch.arange(start, start + n, dtype=torch.float32)[:, None]
    w = torch.exp(torch.arange(0, d, 2, dtype=torch.float32) * -(math.log(10000.0) / d))
    return torch.stack([torch.sin(t * w), torch.cos(t * w)], -1).flatten(1)


def embed_midi(w, ids, part):
    """ids (B, S, 6) -> (B, S, d); part is "ar" or "nar"."""
    e = torch.cat([w[f"feat_emb.{i}.word_embeddings.weight"][ids[..., i]] for i in range(6)], -1)
    x = F.linear(e, w[f"{part}_text_embedding.weight"], w[f"{part}_text_embedding.bias"])
    return x + w[f"{part}_text_position.alpha"] * sinusoid(x.shape[1], x.shape[2])


def norm(w, name, x, stage):
    """Plain LayerNorm without a stage vector, adaptive with one."""
    d = (x.shape[-1],)
    if stage is None:
        return F.layer_norm(x, d, w[name + ".weight"], w[name + ".bias"], 1e-5)
    scale, shift = F.linear(stage, w[name + ".project_layer.weight"], w[name + ".project_layer.bias"]).chunk(2, -1)
    return scale * F.layer_norm(x, d, w[name + ".norm.weight"], w[name + ".norm.bias"], 1e-5) + shift


def stack(w, part, x, allow, heads, layers, stage=None, trace=None):
    """allow: bool mask, True where a query may attend. The outputs of the layers and of the norm go to list `trace`."""
    B, T, D = x.shape
    for i in range(layers):
        p = f"{part}_decoder.layers.{i}"
        h = norm(w, p + ".norm1", x, stage)
        qkv = F.linear(h, w[p + ".self_attn.in_proj_weight"], w[p + ".self_attn.in_proj_bias"])
        q, k, v = (t.view(B, T, heads, D // heads).transpose(1, 2) for t in qkv.chunk(3, -1))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=allow).transpose(1, 2).reshape(B, T, D)
        x = x + F.linear(o, w[p + ".self_attn.out_proj.weight"], w[p + ".self_attn.out_proj.bias"])
        h = F.relu(F.linear(norm(w, p + ".norm2", x, stage), w[p + ".linear1.weight"], w[p + ".linear1.bias"]))
        x = x + F.linear(h, w[p + ".linear2.weight"], w[p + ".linear2.bias"])
        if trace is not None:
            trace.append(x)
    x = norm(w, f"{part}_decoder.norm", x, stage)
    if trace is not None:
        trace.append(x)
    return x


def pads(x_lens, y_lens, S, T):
    """Bool masks (B, S), (B, T), True on padding."""
    return torch.arange(S)[None] >= x_lens[:, None], torch.arange(T)[None] >= y_lens[:, None]


def ar_forward(w, x, x_lens, y, y_lens, heads, layers, trace=None):
    """x (B, S, 6), y (B, T, K) -> logits (B, T, eos + 1) and the published summed loss."""
    S, T = x.shape[1], y.shape[1]
    eos = len(w["ar_predict_layer.weight"]) - 1
    pad_x, pad_y = pads(x_lens, y_lens, S, T)
    inp = y[..., 0].masked_fill(pad_y, eos)
    prefix = torch.zeros(S + T, S + T, dtype=torch.bool)
    prefix[:, :S] = True
    prefix[S:, S:] = torch.ones(T, T, dtype=torch.bool).tril()
    allow = prefix & ~torch.cat([pad_x, pad_y], 1)[:, None, None]
    a = w["ar_audio_embedding.word_embeddings.weight"][inp]
    a = a + w["ar_audio_position.alpha"] * sinusoid(T, a.shape[2])
    h = stack(w, "ar", torch.cat([embed_midi(w, x, "ar"), a], 1), allow, heads, layers, None, trace)[:, S:]
    logits = F.linear(h, w["ar_predict_layer.weight"])
    target = torch.cat([inp[:, 1:], torch.full_like(inp[:, :1], eos)], 1)
    return logits, F.cross_entropy(logits.transpose(1, 2), target, reduction="sum")


def nar_forward(w, x, x_lens, y, y_lens, stage, P, heads, layers, trace=None):
    """Stage k in 1..K-1 after P prompt frames -> logits (B, T - P, codebook_size) and the published weighted loss."""
    S, T, K = x.shape[1], y.shape[1], y.shape[2]
    eos = len(w["ar_predict_layer.weight"]) - 1
    pad_x, pad_y = pads(x_lens, y_lens, S, T)
    codes = y.masked_fill(pad_y[..., None], 0)
    a = w["nar_audio_embeddings.0.word_embeddings.weight"][codes[..., 0].masked_fill(pad_y, eos)]
    for j in range(1, K):
        part = w[f"nar_audio_embeddings.{j}.word_embeddings.weight"][codes[..., j]]
        if j >= stage:
            part = torch.cat([part[:, :P], torch.zeros_like(part[:, P:])], 1)
        a = a + part
    a = a + w["nar_audio_position.alpha"] * sinusoid(T, a.shape[2])
    allow = ~torch.cat([pad_x, pad_y], 1)[:, None, None]
    vec = w[f"nar_stage_embeddings.{stage - 1}.word_embeddings.weight"]
    h = stack(w, "nar", torch.cat([embed_midi(w, x, "nar"), a], 1), allow, heads, layers, vec, trace)[:, S + P :]
    logits = F.linear(h, w[f"nar_predict_layers.{stage - 1}.weight"])
    target = codes[:, P:, stage].masked_fill(pad_y[:, P:], eos)
    total = float(y_lens.sum())
    loss = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=eos, reduction="sum")
    return logits, loss * total / (total - P * len(x))


def greedy(w, x, prompt, heads, layers, frames=None):
    """
    Greedy codes (T, K) after prompt (P, K) for rows x (S, 6), the whole sequence anew for each frame; the AR's logits
    of each step, and those of the NAR's stages. EOS is left out for `frames` frames and then forced; without `frames`
    it ends the codes where it is the likeliest, or the 16 frames per row do.
    """
    x, y, P = x[None], prompt[None], len(prompt)
    eos, K = len(w["ar_predict_layer.weight"]) - 1, prompt.shape[1]
    steps = []
    while True:
        lens = torch.tensor([x.shape[1]]), torch.tensor([y.shape[1]])
        steps.append(ar_forward(w, x, lens[0], y, lens[1], heads, layers)[0][0, -1])
        generated, best = y.shape[1] - P, int(steps[-1].argmax())
        if generated == frames or frames is None and (best == eos or generated > 16 * x.shape[1]):
            break
        best = int(steps[-1][:eos].argmax())
        y = torch.cat([y, torch.tensor([[[best] + [0] * (K - 1)]])], 1)
    stages = []
    for k in range(1, K):
        stages.append(nar_forward(w, x, lens[0], y, lens[1], k, P, heads, layers)[0][0])
        y[0, P:, k] = stages[-1].argmax(-1)
    return y[0, P:], torch.stack(steps), torch.stack(stages)


def draw_inputs(seed=5, codes=20):
    """Rows x (2, 11, 6), codes y (2, 23, 4) and their lengths."""
    g = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randint(0, v, (2, 11), generator=g) for v in VOCABULARIES], -1)
    return x, torch.tensor([11, 8]), torch.randint(0, codes, (2, 23, 4), generator=g), torch.tensor([23, 17])


def record(w, heads, layers, prefixes=(5, 4, 6), frames=12):
    """Tensors and facts of a recording, as `scripts.published.check` reads them."""
    x, x_lens, y, y_lens = draw_inputs()
    logits, loss = ar_forward(w, x, x_lens, y, y_lens, heads, layers)
    tensors = {"x": x, "x_lens": x_lens, "y": y, "y_lens": y_lens, "ar_logits": logits}
    facts = {"ar_loss_sum": float(loss), "nar": []}
    for k, P in enumerate(prefixes, start=1):
        tensors[f"nar_logits.{k}"], loss = nar_forward(w, x, x_lens, y, y_lens, k, P, heads, layers)
        facts["nar"].append({"stage": k, "prefix_len": P, "loss_sum_weighted": float(loss)})
    tensors = {f"teacher_forced.{name}": value for name, value in tensors.items()}
    names = ("greedy_codes", "ar_step_logits", "nar_logits")
    played = dict(zip(names, greedy(w, x[0], y[0, :7], heads, layers, frames)))
    played |= {"x": x[0], "prompt": y[0, :7], "cap_x": x[1, :3]}
    played["cap_codes"] = greedy(w, x[1, :3], y[0, :7], heads, layers)[0]
    tensors |= {f"inference.{name}": value.clone() for name, value in played.items()}
    return tensors, {"nhead": heads, "prefix_mode": 1, "teacher_forced": facts}


if __name__ == "__main__":
    weights = random_weights(8, 2, 16, seed=3)
    recorded, told = record(weights, 2, 2)
    print("cap:", len(recorded["inference.cap_codes"]), "frames")
    weights = {
        name: value
        for name, value in weights.items()
        if name not in ("nar_predict_layers.0.weight", "nar_predict_layers.1.weight")
    }
    save_file(weights, FIXTURES / "published_tiny.safetensors")
    save_file(recorded, FIXTURES / "published_tiny-io.safetensors")
    (FIXTURES / "published_tiny.json").write_text(json.dumps(told, indent=1) + "\n")
