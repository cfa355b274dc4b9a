# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""
The published MIDI-VALLE (arXiv 2507.08530 and its code) as plain functions over its flat state_dict, and the map of its
keys to ours. Independent of `modeling_midivalle` on purpose: the parity tests compare the two.
"""

import math
import re

import torch
import torch.nn.functional as F

KEY_MAP = (  # applied one after the other
    (r"\.word_embeddings\.", "."),
    (r"^ar_predict_layer\.", "ar.lm_head."),
    (r"^nar_predict_layers\.", "nar.heads."),
    (r"^ar_", "ar.model."),
    (r"^nar_", "nar."),
    (r"text_embedding\.", "embeddings.midi_projection."),
    (r"text_position\.", "embeddings.midi_positions."),
    (r"audio_position\.", "embeddings.audio_positions."),
    (r"decoder\.", ""),
    (r"in_proj_(weight|bias)$", r"in_proj.\1"),
)


def to_our_state_dict(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys; the shared MIDI tables go to both decoders, the stage rows into one table."""
    ours = {}
    for key, value in published.items():
        if match := re.match(r"feat_emb\.(\d)\.word_embeddings\.weight", key):
            for part in ("ar.model", "nar"):
                ours[f"{part}.embeddings.midi_tables.{match[1]}.weight"] = value
        elif not key.startswith("nar_stage_embeddings"):
            for pattern, replacement in KEY_MAP:
                key = re.sub(pattern, replacement, key)
            ours[key] = value
    stages = sorted(k for k in published if k.startswith("nar_stage_embeddings"))
    ours["nar.stage_embeddings.weight"] = torch.cat([published[k] for k in stages])
    return ours


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


def stack(w, part, x, allow, heads, layers, stage=None):
    """allow: bool mask, True where a query may attend."""
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
    return norm(w, f"{part}_decoder.norm", x, stage)


def pads(x_lens, y_lens, S, T):
    """Bool masks (B, S), (B, T), True on padding."""
    return torch.arange(S)[None] >= x_lens[:, None], torch.arange(T)[None] >= y_lens[:, None]


def ar_forward(w, x, x_lens, y, y_lens, heads, layers):
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
    h = stack(w, "ar", torch.cat([embed_midi(w, x, "ar"), a], 1), allow, heads, layers)[:, S:]
    logits = F.linear(h, w["ar_predict_layer.weight"])
    target = torch.cat([inp[:, 1:], torch.full_like(inp[:, :1], eos)], 1)
    return logits, F.cross_entropy(logits.transpose(1, 2), target, reduction="sum")


def nar_forward(w, x, x_lens, y, y_lens, stage, P, heads, layers):
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
    h = stack(w, "nar", torch.cat([embed_midi(w, x, "nar"), a], 1), allow, heads, layers, vec)[:, S + P :]
    logits = F.linear(h, w[f"nar_predict_layers.{stage - 1}.weight"])
    target = codes[:, P:, stage].masked_fill(pad_y[:, P:], eos)
    total = float(y_lens.sum())
    loss = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=eos, reduction="sum")
    return logits, loss * total / (total - P * len(x))
