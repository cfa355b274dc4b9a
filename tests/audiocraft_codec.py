# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""EnCodec (arXiv 2210.13438) as plain functions over AudioCraft's names of its weights, non-causal, and such weights at
random. Independent of transformers on purpose: the converter's tests compare the two."""

import torch
import torch.nn.functional as F

RATIOS, FILTERS, WIDTH, CODES, BOOKS = (8, 5, 4, 4), 2, 16, 32, 4


def random_export(pad_mode="constant", seed=0):
    """What AudioCraft's `export_encodec` writes, with a small codec at random."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def conv(name, outputs, inputs, kernel, transposed=False):
        shape = (inputs, outputs, kernel) if transposed else (outputs, inputs, kernel)
        state[f"{name}.weight_v"] = torch.randn(shape, generator=generator)
        state[f"{name}.weight_g"] = 0.5 + torch.rand(shape[0], 1, 1, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    def block(name, size):
        conv(f"{name}.block.1.conv.conv", size // 2, size, 3)
        conv(f"{name}.block.3.conv.conv", size, size // 2, 1)

    def lstm(name, size):
        for suffix in ("ih_l0", "hh_l0"):
            state[f"{name}.lstm.weight_{suffix}"] = 0.3 * torch.randn(4 * size, size, generator=generator)
            state[f"{name}.lstm.bias_{suffix}"] = 0.3 * torch.randn(4 * size, generator=generator)

    conv("encoder.model.0.conv.conv", FILTERS, 1, 7)
    size = FILTERS
    for i, ratio in enumerate(reversed(RATIOS)):
        block(f"encoder.model.{3 * i + 1}", size)
        conv(f"encoder.model.{3 * i + 3}.conv.conv", 2 * size, size, 2 * ratio)
        size *= 2
    lstm("encoder.model.13", size)
    conv("encoder.model.15.conv.conv", WIDTH, size, 7)
    conv("decoder.model.0.conv.conv", size, WIDTH, 7)
    lstm("decoder.model.1", size)
    for i, ratio in enumerate(RATIOS):
        conv(f"decoder.model.{3 * i + 3}.convtr.convtr", size // 2, size, 2 * ratio, transposed=True)
        block(f"decoder.model.{3 * i + 4}", size // 2)
        size //= 2
    conv("decoder.model.15.conv.conv", 1, size, 7)
    for k in range(BOOKS):
        name = f"quantizer.vq.layers.{k}._codebook"
        book = 0.5**k * torch.randn(CODES, WIDTH, generator=generator)
        state |= {f"{name}.embed": book, f"{name}.embed_avg": book.clone()}
        state |= {f"{name}.inited": torch.ones(1), f"{name}.cluster_size": torch.ones(CODES)}
    settings = f"""
sample_rate: 32000
channels: 1
encodec: {{autoencoder: seanet, quantizer: rvq, sample_rate: '${{sample_rate}}', causal: false, renormalize: false}}
seanet:
  causal: ${{encodec.causal}}
  pad_mode: {pad_mode}
  activation: ELU
  activation_params: {{alpha: 1.0}}
  dilation_base: 2
  true_skip: true
  decoder: {{trim_right_ratio: 1.0, final_activation: null}}
"""
    return {"xp.cfg": settings, "best_state": state, "version": "1.3.0", "exported": True}


def encode(state, wave, pad_mode="constant"):
    """`wave` (B, 1, L), L a multiple of 640 -> codes (B, 4, L / 640)."""
    x = _conv(state, "encoder.model.0.conv.conv", wave, pad_mode)
    for i, ratio in enumerate(reversed(RATIOS)):
        x = _block(state, f"encoder.model.{3 * i + 1}", x, pad_mode)
        x = _conv(state, f"encoder.model.{3 * i + 3}.conv.conv", F.elu(x), pad_mode, stride=ratio)
    x = _lstm(state, "encoder.model.13", x)
    residual = _conv(state, "encoder.model.15.conv.conv", F.elu(x), pad_mode).transpose(1, 2)
    codes = []
    for k in range(BOOKS):
        book = state[f"quantizer.vq.layers.{k}._codebook.embed"]
        codes.append(torch.cdist(residual, book[None]).argmin(-1))
        residual = residual - book[codes[-1]]
    return torch.stack(codes, 1)


def decode(state, codes, pad_mode="constant"):
    """Codes (B, 4, T) -> wave (B, 1, 640 T)."""
    x = sum(state[f"quantizer.vq.layers.{k}._codebook.embed"][codes[:, k]] for k in range(BOOKS)).transpose(1, 2)
    x = _lstm(state, "decoder.model.1", _conv(state, "decoder.model.0.conv.conv", x, pad_mode))
    for i, ratio in enumerate(RATIOS):
        name = f"decoder.model.{3 * i + 3}.convtr.convtr"
        y = F.conv_transpose1d(F.elu(x), _weight(state, name), state[f"{name}.bias"], stride=ratio)
        right = ratio // 2  # kernel - stride = ratio samples too many, the smaller half of them on the right
        x = y[..., ratio - right : y.shape[-1] - right]
        x = _block(state, f"decoder.model.{3 * i + 4}", x, pad_mode)
    return _conv(state, "decoder.model.15.conv.conv", F.elu(x), pad_mode)


def _weight(state, name):
    v = state[f"{name}.weight_v"]
    return state[f"{name}.weight_g"] * v / v.flatten(1).norm(dim=1)[:, None, None]


def _conv(state, name, x, pad_mode, stride=1):
    """As many frames as `x` has strides; of the padding, the smaller half stands on the right."""
    weight = _weight(state, name)
    padding = weight.shape[-1] - stride
    right = padding // 2
    return F.conv1d(F.pad(x, (padding - right, right), mode=pad_mode), weight, state[f"{name}.bias"], stride=stride)


def _block(state, name, x, pad_mode):
    y = _conv(state, f"{name}.block.1.conv.conv", F.elu(x), pad_mode)
    return x + _conv(state, f"{name}.block.3.conv.conv", F.elu(y), pad_mode)


def _lstm(state, name, x):
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    size = x.shape[1]
    layer = torch.nn.LSTM(size, size, batch_first=True)
    layer.load_state_dict({suffix: state[f"{name}.lstm.{suffix}"] for suffix in names})
    return layer(x.transpose(1, 2))[0].transpose(1, 2) + x
