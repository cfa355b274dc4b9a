# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What generation is made of: choice of codes, random numbers that depend on a seed alone, rows of unequal lengths."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

WINDOW_STEP = (
    0x9E3779B97F4A7C15  # 2^64 / golden ratio: seeds of neighbouring windows and of neighbouring seeds stay apart
)
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "nar_temperature", "compat")
INSTEAD = {
    "generation_config": "set model.generation_config, or give do_sample, temperature, top_k and top_p",
    "max_new_tokens": "target_frames sets the length, as the MIDI does without it",
    "max_length": "target_frames sets the length, as the MIDI does without it",
    "streamer": "generate_stream gives the audio piece by piece",
}


class PreallocatedLayer(DynamicLayer):
    """A growing cache layer inside a buffer of `capacity` places: appending copies the new states only. They are stored
    as `stored_dtype`, if one is given, and given back as they came."""

    def __init__(self, capacity: int, stored_dtype: torch.dtype | None = None):
        super().__init__()
        self.capacity, self.stored_dtype = capacity, stored_dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        seen = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            B, heads, _, size = key_states.shape
            dtype = self.stored_dtype or key_states.dtype
            self.buffer = key_states.new_zeros(2, B, heads, self.capacity, size, dtype=dtype)
        end = seen + key_states.shape[2]
        self.buffer[0, :, :, seen:end], self.buffer[1, :, :, seen:end] = key_states, value_states
        self.keys, self.values = self.buffer[:, :, :, :end]
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)


@dataclass
class Sampler:
    """How a code is chosen from logits: greedy, or by the inverse distribution function at a uniform number."""

    do_sample: bool
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0

    def __post_init__(self):
        check_flag("do_sample", self.do_sample)
        check_temperature("temperature", self.temperature)
        if self.do_sample and self.temperature == 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; do_sample=False chooses greedily")
        if not is_number(self.top_k, Integral) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number of at least 0, got {self.top_k!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a number above 0 and at most 1, got {self.top_p!r}")

    def __call__(self, logits: torch.Tensor, uniform: torch.Tensor | None) -> torch.LongTensor:
        """`logits` `(..., V)`, finite, and `uniform` `(...)` in [0, 1) -> codes `(...)`."""
        if not self.do_sample:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits, order = logits.topk(self.top_k)
        else:
            logits, order = logits.sort(dim=-1, descending=True, stable=True)
        below = logits.softmax(-1).cumsum(-1)
        last = below.shape[-1] - 1
        if self.top_p < 1:
            last = (below < self.top_p).sum(-1, keepdim=True).clamp(max=last)  # the code that crosses top_p counts
            mass = below.gather(-1, last)
        else:
            mass = below[..., -1:]
        place = (below <= uniform[..., None].to(below) * mass).sum(-1, keepdim=True).clamp(max=last)
        return order.gather(-1, place)[..., 0]


def is_number(value, kind: type = Real) -> bool:
    """Whether `value` is a number of that kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_temperature(name: str, value) -> None:
    """ValueError by `name` unless `value` is a finite number of at least 0."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_flag(name: str, value) -> None:
    """ValueError by `name` unless `value` is True, False or None."""
    if not isinstance(value, bool | None):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def read_numbers(name: str, values, device: torch.device | None = None) -> torch.Tensor:
    """`values` as a tensor; ValueError by `name` if they are no numbers."""
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:  # texts, lists of unequal lengths, what no integer holds
        raise ValueError(f"{name} must be numbers, got {values!r}") from error


def check_finite(logits: torch.Tensor) -> None:
    """ValueError if there is NaN or infinity in `logits`, or in sums of them."""
    if not torch.isfinite(logits).all():
        raise ValueError("the model gave NaN or infinite logits: its weights or its precision are broken")


def refuse_options(names: Iterable[str]) -> None:
    """ValueError if there are any `names`, of options that generation does not have: what to give instead."""
    for name in names:
        raise ValueError(f"generation has no {name}: {INSTEAD.get(name, 'generate_stream lists its arguments')}")


def draw_seeds(seed: int | list[int] | None, B: int) -> list[int]:
    """A seed for each of B rows, below 2^63: the given one or ones; None: from torch's global generator."""
    if seed is None:
        seed = torch.randint(2**62, (B,)).tolist()
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * B
    if not all(isinstance(one, Integral) for one in seeds):
        raise ValueError(f"seed must be an integer or a list of integers, got {seed!r}")
    if len(seeds) != B:
        raise ValueError(f"seed must be one integer or one for each row ({B}), got {len(seeds)}")
    return [int(one) % 2**63 for one in seeds]


def draw_uniform(
    target_frames: torch.LongTensor, channels: int, seed: int | list[int] | None, width: int
) -> torch.Tensor:
    """
    Uniform numbers `(B, channels, width)`. Each row draws for its own frames from its own generator (`seed`, or its
    entry of a list), so a row's numbers do not depend on its batch. None: seeds from torch's global generator.
    """
    B = len(target_frames)
    seeds, uniform = draw_seeds(seed, B), torch.zeros(B, channels, width)
    for b, frames in enumerate(target_frames.tolist()):
        generator = torch.Generator().manual_seed(seeds[b])
        for channel in range(channels):
            uniform[b, channel, :frames] = torch.rand(frames, generator=generator)
    return uniform


def window_seed(seed: int, window: int) -> int:
    """The seed of window number `window` of a piece that is generated with `seed`; of the first it is `seed` itself."""
    return (seed + window * WINDOW_STEP) % 2**63


def length_mask(lengths: torch.LongTensor, width: int) -> torch.LongTensor:
    """`lengths` `(B,)` -> mask `(B, width)`, 1 on what is not padding on the right."""
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def last_frames(codes: torch.LongTensor, count: int) -> torch.LongTensor:
    """The last `count` frames of `codes` `(1, K, T)`; ValueError if there are fewer."""
    if count > codes.shape[-1]:
        raise ValueError(f"context_frames {count} is more than the {codes.shape[-1]} that are there")
    return codes[..., codes.shape[-1] - count :]


def pad_codes(parts: list[torch.LongTensor]) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Codes `(1, K, T)` of different lengths as a batch `(B, K, T)`, padded on the right, and its lengths `(B,)`."""
    width = max(part.shape[-1] for part in parts)
    lengths = torch.tensor([part.shape[-1] for part in parts], device=parts[0].device)
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts]), lengths


def align_right(ids: torch.LongTensor, mask: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Move what `mask` `(B, T)` attends of `ids` `(B, T)` against the right edge, in order; also its mask."""
    order = mask.argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def join_codes(
    prompt: torch.LongTensor,
    prompt_lengths: torch.LongTensor,
    target: torch.LongTensor,
    target_frames: torch.LongTensor,
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Right-padded `prompt` `(B, K, P)` and `target` `(B, K, T)`, row by row one after the other, and the mask."""
    P, ends = prompt_lengths[:, None], (prompt_lengths + target_frames)[:, None]
    places = torch.arange(int(ends.max()), device=target.device).expand(len(target), -1)
    both = torch.cat([prompt, target], -1)
    source = torch.where(places < P, places, places - P + prompt.shape[-1]).clamp(max=both.shape[-1] - 1)
    joined = both.gather(-1, source[:, None].expand(-1, both.shape[1], -1))
    mask = places < ends
    return joined.masked_fill(~mask[:, None], 0), mask.long()
