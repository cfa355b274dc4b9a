# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Layers with int8 weights. Linear ones are for speed: a step of the AR reads all weights for one frame, and int8 is a
quarter of fp32. Convolutions are for the size of a file alone: they compute in floating point."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

QUANTIZED = ("in_proj", "out_proj", "linear1", "linear2")  # of each block: all but 2 % of what a step reads


class Int8Linear(nn.Module):
    """
    A linear layer whose weights are int8 with one scale per output, symmetric (largest magnitude = 127).

    On a CPU for which torch has kernels (FBGEMM, oneDNN), each row of the input is rounded to 8 bits too, and products
    are summed in integers. Elsewhere, and under autograd, inputs stay as they are: the two differ by that rounding.

    Args:
        in_features, out_features (`int`): as in `nn.Linear`.
        bias (`bool`): whether there is one, in floating point.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._packed = None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """The int8 layer nearest to `linear`, on its device."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        layer.weight, layer.scale = round_rows(linear.weight)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.device.type != "cpu" or inputs.requires_grad or not has_cpu_kernel():
            return F.linear(inputs, self.weight.to(inputs.dtype) * self.scale.to(inputs.dtype)[:, None], self.bias)
        if self._packed is None:
            self._packed = pack(self.weight, self.scale)
        rows, is_one_row = inputs.float(), inputs.numel() == self.in_features
        if not is_one_row:  # the kernel has one range for all rows: let each fill it
            largest = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
            rows = rows / largest
        is_narrow = not torch.cpu._is_vnni_supported()  # older processors add up pairs of products in 16 bits
        output = torch.ops.quantized.linear_dynamic(rows, self._packed, is_narrow)
        if not is_one_row:
            output *= largest
        if self.bias is not None:
            output += self.bias
        return output.to(inputs.dtype)

    def _apply(self, *args, **kwargs):
        self._packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return self.__dict__ | {"_packed": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Conv2d(nn.Module):
    """
    A convolution whose weights are stored as int8 with one scale per output channel, symmetric (largest magnitude =
    127). It computes with them as floating-point numbers of its bias' type.

    Args:
        conv (`nn.Conv2d`): with a bias, unpadded or padded by zeros, of one group; its weights are rounded.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        weight, scale = round_rows(conv.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = conv.bias

    def to_conv(self) -> nn.Conv2d:
        """The same convolution with weights in floating point, which can learn."""
        sizes = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation
        conv = nn.Conv2d(*sizes, device=self.bias.device, dtype=self.bias.dtype)
        conv.weight.data.copy_(self._weight())
        conv.bias = self.bias
        return conv

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.conv2d(inputs, self._weight(), self.bias, self.stride, self.padding, self.dilation)

    def _weight(self) -> torch.Tensor:
        return self.weight.to(self.bias.dtype) * self.scale.to(self.bias.dtype)[:, None, None, None]

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{sizes}, padding={self.padding}, dilation={self.dilation}"


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` `(N, ...)` as int8, and the scale `(N,)` in float32 that it is to be multiplied with."""
    weight = weight.detach().float()
    scale = (weight.abs().flatten(1).amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8), scale


def has_cpu_kernel() -> bool:
    """Whether this torch has int8 kernels for this processor."""
    return torch.backends.quantized.engine in ("x86", "fbgemm", "onednn")


def pack(weight: torch.Tensor, scale: torch.Tensor) -> torch.ScriptObject:
    """`weight` `(N, K)` int8 and `scale` `(N,)` in the order in which torch's kernels read them."""
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantized tensor creation functions.*")
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def refuse_adapters(model: nn.Module) -> None:
    """ValueError if an adapter is on a layer of `model` that would be int8."""
    parents = model.modules()
    if any(hasattr(getattr(parent, name, None), "base_layer") for parent in parents for name in QUANTIZED):  # peft's
        raise ValueError("int8 layers and an adapter do not go together: quantize the model without its adapter")


def quantize_linears(model: nn.Module) -> None:
    """Replace the large linear layers of all blocks in `model` by int8 ones; ValueError if an adapter is on them."""
    refuse_adapters(model)
    for parent in list(model.modules()):
        for name in QUANTIZED:
            if isinstance(linear := getattr(parent, name, None), nn.Linear):
                setattr(parent, name, Int8Linear.from_linear(linear))


__all__ = ["Int8Conv2d", "Int8Linear"]
