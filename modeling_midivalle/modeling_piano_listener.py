# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A small network that hears which keys are struck and how hard.

The codec's encoder sees the wave through strided convolutions and misses every fourth key; this one sees spectra, in
which a key is the same picture wherever it lies, and misses half as many. So it tells the codec what to write
(`encode_codes(..., struck=)`), and, since spectral distances hardly notice a quiet inner note, it makes each note that
a decoder in training loses a loss of its own. It is not the transcriber that `scripts.evaluate` reads notes with.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_piano_listener import PianoListenerConfig
from .modeling_piano_encodec import SOFTEST, check_audio, row_lengths
from .quantization_midivalle import Int8Conv2d

SAMPLING_RATE, HOP = 32_000, 640
KEYS = 88
BINS_PER_SEMITONE = 2
BINS = KEYS * BINS_PER_SEMITONE
LOWEST_HZ, HIGHEST_HZ = 27.5, 15_500.0
WINDOWS = (8_192, 4_096, 2_048, 1_024)  # the longer tell keys apart, the shorter when
# of a key, in bins from it: those of which it may be partial 4, 3 or 2, then its own partials 1 to 6 and 8
HARMONICS = (-48, -38, -24, 0, 24, 38, 48, 56, 62, 72)
KNEE = 1e-3  # amplitudes well below are linear (noise stays small), above logarithmic (soft partials count)
# kernels over frames and keys, and their dilations: what a key is heard beside, and for which part of a second
OCTAVES, CHORD_OCTAVES, FIFTHS, NEIGHBOURS = ((3, 3), (1, 12)), ((1, 3), (1, 12)), ((1, 3), (1, 7)), ((3, 3), (1, 1))
TENTH, THIRD = ((5, 1), (1, 1)), ((5, 1), (4, 1))
LAYERS = (OCTAVES, TENTH, THIRD, OCTAVES, TENTH, FIFTHS, NEIGHBOURS, THIRD, CHORD_OCTAVES, TENTH, OCTAVES, THIRD, TENTH)


@dataclass
class PianoListenerOutput(ModelOutput):
    """
    Args:
        logits (`torch.Tensor` of shape `(B, T, 88)`): of each key being struck in each frame.
        velocity (`torch.Tensor` of shape `(B, T, 88)`): over 127, with which, if it is.
        hidden_states (`tuple[torch.Tensor]`): of the layers, each `(B, hidden_size, T, bins or keys)`.
    """

    logits: torch.Tensor | None = None
    velocity: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class PianoListenerModel(PreTrainedModel):
    """
    Audio -> struck keys. Every key is heard by the same weights: from the spectrum around it and around its partials,
    then beside its neighbours, fifths and octaves, and over a second.

    Example:

    ```python
    >>> listener = PianoListenerModel.from_pretrained(folder, subfolder="listener")
    >>> codes = codec.encode_codes(audio, struck=listener.hear(audio))
    ```"""

    config: PianoListenerConfig
    base_model_prefix = "listener"
    main_input_name = "input_values"
    _auto_class = "AutoModel"
    _supports_sdpa = True  # it has no attention

    def __init__(self, config: PianoListenerConfig):
        super().__init__(config)
        size = config.hidden_size
        self.bf16 = False  # of the convolutions
        self.first = nn.Conv2d(len(WINDOWS) * len(HARMONICS), size, (3, 3), padding=(1, 1))
        self.keys = nn.Conv2d(size, size, (5, BINS_PER_SEMITONE), stride=(1, BINS_PER_SEMITONE), padding=(2, 0))
        self.layers = nn.ModuleList(
            nn.Conv2d(
                size, size, kernel, padding=tuple(k // 2 * d for k, d in zip(kernel, dilation)), dilation=dilation
            )
            for kernel, dilation in LAYERS
        )
        self.last = nn.Conv2d(size, 2, (3, 1), padding=(1, 0))
        if config.quantization:
            self.quantize_(config.quantization)
        self.post_init()

    def quantize_(self, dtype: Literal["int8"] = "int8") -> None:
        """
        Store all layers but the first and the last as int8, in place: half the size of fp16, the same speed. The model
        can be saved and loaded so.

        Args:
            dtype (`str`, defaults to `"int8"`): int8 weights, one scale per output channel.
        Raises:
            ValueError: another `dtype`.
        """
        if dtype != "int8":
            raise ValueError(f'quantize_ knows "int8", got {dtype!r}')
        self._replace(nn.Conv2d, Int8Conv2d)
        self.config.quantization = dtype

    def dequantize_(self) -> None:
        """Undo `quantize_`, in place, but for its rounding: int8 weights do not learn."""
        self._replace(Int8Conv2d, Int8Conv2d.to_conv)
        self.config.quantization = None

    def _replace(self, kind: type[nn.Module], new) -> None:
        if isinstance(self.keys, kind):
            self.keys = new(self.keys)
            self.layers = nn.ModuleList(new(layer) for layer in self.layers)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        if module is self.last:  # few keys are struck in a frame; a velocity of 64
            init.copy_(module.bias, torch.tensor([-4.0, 0.5]))

    @staticmethod
    def spectrum(audio: torch.Tensor) -> torch.Tensor:
        """Of `audio` `(B, 640 T)`: log(1 + amplitude / KNEE), `(B, windows, T, bins)`; frame t is centred on sample
        640 t + 320."""
        parts = []
        for n in WINDOWS:
            window, around = torch.hann_window(n, device=audio.device), (n - HOP) // 2
            frames = torch.stft(
                F.pad(audio, (around, around)), n, HOP, window=window, center=False, return_complex=True
            )
            power = torch.view_as_real(frames).square().sum(-1).transpose(1, 2)
            power = power @ (_bank(n, BINS + max(HARMONICS), audio.device) * (2.0 / window.sum()) ** 2)
            parts.append(torch.log1p((power + 1e-9).sqrt() / KNEE))
        return torch.stack(parts, 1)

    def forward(self, input_values: torch.Tensor, return_dict: bool = True) -> PianoListenerOutput:
        """
        Args:
            input_values (`torch.Tensor` of shape `(B, 640 T)` or `(B, 1, 640 T)`): audio of 32 kHz, full scale 1.0.
            return_dict (`bool`): a [`PianoListenerOutput`], or a tuple.
        """
        x = self.spectrum(input_values.flatten(1)).to(self.first.weight.dtype)
        x = F.pad(x, (-min(HARMONICS), 0))
        starts = [shift - min(HARMONICS) for shift in HARMONICS]
        x = torch.cat([x[..., s : s + BINS] for s in starts], 1)
        x = x.contiguous(memory_format=torch.channels_last)  # half the time on a CPU
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = [F.relu(self.first(x))]
            hidden.append(F.relu(self.keys(hidden[-1])))
            for layer in self.layers:
                hidden.append(hidden[-1] + F.relu(layer(hidden[-1])))
            logits, velocity = self.last(hidden[-1]).float().unbind(1)
        output = PianoListenerOutput(logits=logits, velocity=velocity, hidden_states=tuple(hidden))
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def hear(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None = None, threshold: float = 0.5
    ) -> torch.Tensor:
        """
        Which keys are struck in audio, for [`~PianoEncodecModel.encode_codes`].

        Args:
            input_values (`torch.Tensor` of shape `(B, 1, L)`): audio of 32 kHz, full scale 1.0.
            padding_mask (`torch.Tensor` of shape `(B, L)` or `(B, 1, L)`, *optional*): 1 for samples, 0 for padding
                on the right.
            threshold (`float`): likelihood from which on a key counts as struck.
        Returns:
            `torch.Tensor` of shape `(B, T, 88)`, T = ceil(L / 640): velocity over 127 in the frame in which a key is
            struck, else 0. A row is heard at its own length.
        Raises:
            ValueError: `input_values` is not `(B, 1, L)` of finite floats, or `padding_mask` does not fit.
        """
        check_audio(input_values, padding_mask)
        B, _, L = input_values.shape
        lengths = row_lengths(input_values, padding_mask)
        struck = input_values.new_zeros(B, -(-L // HOP), KEYS, dtype=torch.float32)
        for length in set(lengths) - {0}:
            rows = [b for b in range(B) if lengths[b] == length]
            heard = self(F.pad(input_values[rows, 0, :length].float(), (0, -length % HOP)))
            logits = heard.logits.transpose(1, 2)
            before = F.pad(logits, (2, 0), value=-1e9).unfold(2, 2, 1)[:, :, : logits.shape[2]].amax(-1)
            peaks = (logits == F.max_pool1d(logits, 5, 1, 2)) & (logits > before)  # of equal ones the first
            peaks &= torch.sigmoid(logits) > threshold
            found = peaks.transpose(1, 2) * heard.velocity.clamp(SOFTEST, 1.0)
            struck[rows, : found.shape[1]] = found
        return struck


@lru_cache(maxsize=8)
def _bank(n: int, bins: int, device: torch.device) -> torch.Tensor:
    """(n // 2 + 1, bins) triangles of power, half a semitone apart from 27.5 Hz on, at least a bin of the FFT wide."""
    frequencies = torch.linspace(0, SAMPLING_RATE / 2, n // 2 + 1)
    ratio = 2 ** (1 / (12 * BINS_PER_SEMITONE))
    centres = LOWEST_HZ * ratio ** torch.arange(bins)
    width = torch.maximum(centres * (ratio - 1), torch.tensor(1.01 * SAMPLING_RATE / n))
    bank = (1 - (frequencies[:, None] - centres).abs() / width).clamp_min(0)
    return (bank / bank.sum(0, keepdim=True).clamp_min(1e-3) * (centres < HIGHEST_HZ)).to(device)


__all__ = ["PianoListenerModel", "PianoListenerOutput"]
