# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The AR's steps over one window: what is the same for all frames is computed once, and a step is a few operations."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache

from .configuration_midivalle import UNITS_PER_FRAME
from .modeling_midivalle_layers import rotary_angles
from .sampling_midivalle import PreallocatedLayer, check_finite

LOOK_EVERY = 16  # frames between two looks at what was chosen: at a look the host waits for a GPU
SMALL_BYTES, FEW_ROWS = 32 * 2**20, 4  # an AR with such weights takes so many rows on one thread of a CPU


class FrameDecoder:
    """
    Codebook 0 of the new frames of one window. MIDI rows, prompt and context enter by the AR's own forward. Then a step
    works on what is there already: what is added to the frames' code vectors (positions, segments, notes), rotary
    angles, padding mask, and keys and values, which are written in place.

    With `uniform_steps` all steps look alike, as a CUDA graph needs it: a step finds its place in a tensor and attends
    to the whole cache under a mask, not to its filled part. An AR with hooks that a step would pass over (those of
    accelerate, of an observer) takes its own forward at each step.

    Args:
        ar (`MidiValleARModel`): in eval mode.
        ids, mask (`torch.LongTensor` of shape `(B, T)`): the audio input so far, padded on the left.
        midi (`tuple`): MIDI rows `(B, N, 6)` and their mask `(B, N)`.
        prompt_lengths (`torch.LongTensor` of shape `(B,)`): prompt frames of each row.
        frames (`int`): new frames.
        uniform_steps (`bool`, *optional*): on a GPU if not given.
    """

    @torch.no_grad()
    def __init__(
        self,
        ar,
        ids: torch.LongTensor,
        mask: torch.LongTensor,
        midi: tuple[torch.LongTensor, torch.Tensor],
        prompt_lengths: torch.LongTensor,
        frames: int,
        uniform_steps: bool | None = None,
    ):
        self.ar, self.frames, self.is_plain = ar, frames, _is_observed(ar)
        self.uniform_steps = not self.is_plain and (ids.is_cuda if uniform_steps is None else uniform_steps)
        self.known = midi[0].shape[1] + ids.shape[1]  # places of the cache that the prefill fills
        # where weights are rounded to 8 bits, keys and values are to 16: late in a window they are as much to read
        self.stored_dtype = torch.bfloat16 if ar.config.quantization and _has_bf16_attention(ids.device) else None
        layers = [PreallocatedLayer(self.known + frames, self.stored_dtype) for _ in ar.model.layers]
        self.cache = Cache(layers=layers)
        self.given = {"midi_ids": midi[0], "midi_attention_mask": midi[1], "prompt_lengths": prompt_lengths}
        self.prompt_summary = None  # known from the prefill on
        self.mask = torch.cat([mask, mask.new_ones(len(mask), frames)], 1)
        self.logits = self._forward(ids).clone()
        if not self.is_plain:
            self._prepare_steps(mask)

    def _prepare_steps(self, mask: torch.LongTensor) -> None:
        """What is added to each new frame, its rotary angles, and the mask over the places of the cache."""
        decoder, numbers = self.ar.model, torch.arange(self.frames, device=mask.device)
        index = mask.sum(1, keepdim=True) + numbers
        predicted = decoder.predicted_frames(index, self.given["prompt_lengths"])
        self.added = decoder.embeddings.describe_frames(index, predicted, **self.given)
        if self.prompt_summary is not None:
            self.added = self.added + self.prompt_summary
        self.rotary = None
        if decoder.config.position_embedding_type == "time_rotary":
            cos, sin = (angles.transpose(1, 2) for angles in rotary_angles(decoder.config, predicted * UNITS_PER_FRAME))
            first, second = sin.chunk(2, -1)
            both = torch.stack([cos, torch.cat([-first, second], -1)])
            self.rotary = both  # (2, B, frames, 1, head size)
        rows = decoder.embeddings.attended_rows(self.given["midi_ids"], self.given["midi_attention_mask"])
        attended = torch.cat([rows, self.mask.bool()], 1)
        self.penalty = None
        if self.uniform_steps or not attended.all():
            penalty = self.added.new_zeros(attended.shape, dtype=self.stored_dtype or self.added.dtype)
            self.penalty = penalty.masked_fill(~attended, -torch.inf)[:, None, None]
        self.places = torch.arange(attended.shape[1], device=mask.device)
        B = len(mask)
        self.embed, self.norm = bare(decoder.audio_embedding), bare(decoder.norm)
        self.head = for_rows(B, self.ar.lm_head)[0]
        self.blocks = [
            (
                bare(layer.norm1),
                *for_rows(B, layer.self_attn.in_proj, layer.self_attn.out_proj),
                bare(layer.norm2),
                *for_rows(B, layer.linear1, layer.linear2),
                bare(layer.activation),
                cached.buffer,
            )
            for layer, cached in zip(decoder.layers, self.cache.layers, strict=True)
        ]

    @torch.no_grad()
    def decode(
        self,
        choose: Callable,
        uniform: torch.Tensor,
        vocab_size: int,
        eos_token_id: int | None = None,
        keep_logits: bool = False,
    ) -> torch.LongTensor:
        """
        Args:
            choose (callable): logits `(B, vocab_size)` and uniform numbers `(B,)` to codes `(B,)`.
            uniform (`torch.Tensor` of shape `(B, frames)`): the numbers.
            vocab_size (`int`): ids below it can be chosen.
            eos_token_id (`int`, *optional*): ends one row before the frame at which it is chosen or the likeliest.
            keep_logits (`bool`): what the codes were chosen from is in `kept` then, `(B, frames, vocab_size)`.
        Returns:
            `torch.LongTensor` of shape `(B, frames)`, or less where EOS ended it.
        Raises:
            ValueError: the model gave NaN or infinite logits.
        """
        B, device = len(self.mask), self.mask.device
        self.codes = torch.zeros(B, self.frames, dtype=torch.long, device=device)
        self.sums = torch.zeros(B, self.frames, device=device)  # of logits: not finite where one of them is not
        self.stops = torch.zeros(B, self.frames, dtype=torch.bool, device=device)
        self.kept = self.logits.new_zeros(B, self.frames, vocab_size) if keep_logits else None

        def advance(frame: int | torch.Tensor, is_last: bool = False) -> None:
            logits = self.logits[:, :vocab_size]
            code = choose(logits, _take(uniform, 1, frame)[:, 0])
            _put(self.codes, 1, frame, code[:, None])
            _put(self.sums, 1, frame, logits.sum(-1, keepdim=True, dtype=torch.float32))
            if self.kept is not None:
                _put(self.kept, 1, frame, logits[:, None])
            if eos_token_id is not None:
                stop = (code == eos_token_id) | (logits.argmax(-1) == eos_token_id)
                _put(self.stops, 1, frame, stop[:, None])
            if not is_last:
                self.logits.copy_(self._forward(code[:, None]) if self.is_plain else self._step(code, frame))

        with torch.inference_mode(), threads(1 if is_small(self.ar, B) else torch.get_num_threads()):
            return self._loop(advance, eos_token_id)

    def _loop(self, advance: Callable, eos_token_id: int | None) -> torch.LongTensor:
        """Call `advance` for each frame; look for EOS now and then, and for broken logits at the end."""
        place = torch.zeros(1, dtype=torch.long, device=self.mask.device)
        replay = self._capture(advance, place) if self.uniform_steps and place.is_cuda else None
        for frame in range(self.frames):
            if replay is not None:
                replay()
            else:
                advance(place if self.uniform_steps else frame, frame == self.frames - 1)
            place += 1
            if eos_token_id is not None and frame % LOOK_EVERY == LOOK_EVERY - 1 and self.stops.any():
                break
        end = int(self.stops[0].nonzero()[0]) if self.stops.any() else self.frames
        check_finite(self.sums[:, : end + 1])
        return self.codes[:, :end]

    def _capture(self, advance: Callable, place: torch.Tensor) -> Callable:
        """`advance` as a CUDA graph; what its trials have written is written again, or reset here."""
        logits, stream = self.logits.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                advance(place)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            advance(place)
        self.logits.copy_(logits)
        return graph.replay

    def _forward(self, ids: torch.LongTensor) -> torch.Tensor:
        """Logits `(B, V)` after `ids` by the AR's own forward."""
        seen = self.cache.get_seq_length()
        frames = ids.shape[1] + (seen - self.given["midi_ids"].shape[1] if seen else 0)
        output = self.ar(
            ids,
            attention_mask=self.mask[:, :frames],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            prompt_summary=self.prompt_summary,
            **self.given,
        )
        self.prompt_summary = output.prompt_summary
        return output.logits[:, -1]

    def _step(self, code: torch.LongTensor, frame: int | torch.Tensor) -> torch.Tensor:
        """Logits `(B, V)` after `code` `(B,)` of new frame `frame`: the AR's forward for one frame, cached."""
        attention, (B, place) = self.ar.model.layers[0].self_attn, (len(code), self.known + frame)
        hidden_states = self.embed(code) + _take(self.added, 1, frame)[:, 0]
        rotary = None if self.rotary is None else _take(self.rotary, 2, frame)
        end, penalty = place + 1, self.penalty
        if self.uniform_steps:
            end, penalty = len(self.places), penalty.masked_fill(self.places > place, -torch.inf)
        elif penalty is not None:
            penalty = penalty[..., :end]
        for norm1, in_proj, out_proj, norm2, linear1, linear2, activation, buffer in self.blocks:
            packed = in_proj(norm1(hidden_states)).view(B, 3, -1, attention.head_dim)
            if rotary is not None:
                turned = packed[:, :2].float()  # query and key
                swapped = turned.roll(attention.head_dim // 2, -1)
                packed[:, :2] = torch.addcmul(turned * rotary[0], swapped, rotary[1])
            _put(buffer, 3, place, packed[:, 1:, :, None].transpose(0, 1))
            keys, values = buffer[:, :, :, :end]
            query = packed[:, 0, :, None].to(keys.dtype)
            attended = F.scaled_dot_product_attention(query, keys, values, penalty, scale=attention.scaling)
            hidden_states = hidden_states + out_proj(attended.flatten(1).to(packed.dtype))
            hidden_states = hidden_states + linear2(activation(linear1(norm2(hidden_states))))
        return self.head(self.norm(hidden_states))


def is_small(ar, rows: int) -> bool:
    """Whether a step of `ar` for so many rows is best on one thread: it is a hundred small operations, for which
    several threads take as long, and on a busy machine, where they wait for one another, ten times as long."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in chain(ar.parameters(), ar.buffers()))
    return ar.device.type == "cpu" and rows <= FEW_ROWS and size <= SMALL_BYTES


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Operations of the calling thread run on `count` threads, after that on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_rows(rows: int, *linears: nn.Module) -> list[Callable]:
    """
    The maps of `linears` for inputs `(rows, in_features)`. fp32 weights on a CPU are laid out once, a copy, in an order
    that is read faster. For several rows it is oneDNN's: MKL, to which `nn.Linear` goes, lays them out anew at each
    call, and takes twice as long. For one row it is column by column if there are more outputs than inputs: on
    processors of AMD's, MKL takes two thirds of the time then.
    """
    return [_laid_out(linear, rows) if _can_be_laid_out(linear, rows) else bare(linear) for linear in linears]


def _can_be_laid_out(linear: nn.Module, rows: int) -> bool:
    """Whether `linear` is nothing but an fp32 product on a CPU for which there is a better order."""
    if type(linear) is not nn.Linear or _has_hooks(linear) or torch.is_autocast_enabled("cpu"):
        return False
    if linear.weight.device.type != "cpu" or linear.weight.dtype != torch.float32:
        return False
    if rows == 1:
        return linear.out_features > linear.in_features
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def _laid_out(linear: nn.Linear, rows: int) -> Callable:
    weight, bias = linear.weight.detach(), linear.bias
    if rows > 1:
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda inputs: torch.ops.mkldnn._linear_pointwise(inputs, ordered, bias, "none", [], "")
    columns = weight.t().contiguous().t()
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return lambda inputs: torch.addmv(bias, columns, inputs[0])[None]


def bare(module: nn.Module) -> Callable:
    """`module` without what `nn.Module.__call__` does beside its forward, where there is nothing for it to do."""
    return module if _has_hooks(module) else module.forward


def _has_bf16_attention(device: torch.device) -> bool:
    """Whether `device` is a CPU on which attention in bf16 is as fast as what it reads."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _is_observed(ar) -> bool:
    """Whether hooks hang on a module whose parts a step calls one by one."""
    blocks = [module for layer in ar.model.layers for module in (layer, layer.self_attn)]
    return any(map(_has_hooks, (ar, ar.model, *blocks)))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _take(table: torch.Tensor, dim: int, place: int | torch.Tensor) -> torch.Tensor:
    """The slice of `table` at `place`, a number or a tensor `(1,)`."""
    return table.narrow(dim, place, 1) if isinstance(place, int) else table.index_select(dim, place)


def _put(table: torch.Tensor, dim: int, place: int | torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` there."""
    if isinstance(place, int):
        table.narrow(dim, place, 1).copy_(values)
    else:
        table.index_copy_(dim, place, values.to(table.dtype))
