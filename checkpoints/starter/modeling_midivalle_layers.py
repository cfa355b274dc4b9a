# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What the AR and NAR decoders share: embeddings and clocks of MIDI rows and audio frames, norms, attention, blocks."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_midivalle import (
    MIDI_FIELDS,
    TICKS_PER_BAR,
    UNITS_PER_FRAME,
    UNITS_PER_SECOND,
    UNITS_PER_TICK,
    MidiValleDecoderConfig,
)
from .modeling_midivalle_frame_notes import FrameNotes, read_notes
from .quantization_midivalle import quantize_linears


def attended_index(attention_mask: torch.Tensor) -> torch.LongTensor:
    """
    Position of each place among the attended places of its row, from `attention_mask` `(B, T)`: padding on either side
    moves nothing. Padded places keep their own index (the published sums count them).
    """
    mask = attention_mask.bool()
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return torch.where(mask, mask.long().cumsum(1) - 1, places)


def check_midi_ids(midi_ids: torch.LongTensor, batch_size: int, sizes: list[int], values: bool = True) -> None:
    """
    Refuse MIDI rows that are not `(batch_size, N, 6)` or, with `values`, whose ids lie outside the tables of `sizes`
    rows. Compiled code is not held up by a look at the values.

    Raises:
        ValueError: naming the first wrong row; for a bar, how long a sequence may be.
    """
    check_integers("MIDI rows", midi_ids)
    if midi_ids.ndim != 3 or midi_ids.shape[::2] != (batch_size, len(sizes)):
        raise ValueError(f"MIDI rows must be ({batch_size}, N, {len(sizes)}), got {tuple(midi_ids.shape)}")
    if not values or torch.compiler.is_compiling():
        return
    if (wrong := ((midi_ids < 0) | (midi_ids >= midi_ids.new_tensor(sizes))).nonzero()).numel():
        b, row, field = wrong[0].tolist()
        raise ValueError(
            f"MIDI row [{b}, {row}]: {MIDI_FIELDS[field]} id {int(midi_ids[b, row, field])} is not in [0, "
            f"{sizes[field]}); one sequence holds at most {(sizes[5] - 4) * 2} s of prompt and target: shorten it"
        )


def check_integers(name: str, values: torch.Tensor) -> None:
    """ValueError by `name` if `values` are no tensor of integers that torch takes for indices; what they are is not
    looked at."""
    is_tensor = isinstance(values, torch.Tensor)
    if not is_tensor or values.dtype not in (torch.long, torch.int):
        found = values.dtype if is_tensor else type(values).__name__
        raise ValueError(f"{name} must be a tensor of integers (torch.long), got {found}")


def check_codes(name: str, codes: torch.LongTensor, size: int, counted: torch.BoolTensor | None = None) -> None:
    """
    Refuse `codes` outside [0, size) where they are `counted`, everywhere if not given. A look at the values, as in
    [`check_midi_ids`].

    Raises:
        ValueError: naming the first wrong place by `name`.
    """
    if torch.compiler.is_compiling():
        return
    wrong = (codes < 0) | (codes >= size)
    if (wrong := (wrong if counted is None else wrong & counted).nonzero()).numel():
        place = wrong[0].tolist()
        raise ValueError(f"{name} {place}: {int(codes[tuple(place)])} is not in [0, {size})")


def check_prompt_lengths(prompt_lengths: torch.LongTensor, frames: torch.LongTensor) -> None:
    """
    Refuse `prompt_lengths` `(B,)` that leave nothing of a row's `frames` `(B,)` to be predicted: that row would not
    count.

    Raises:
        ValueError: naming the first such row.
    """
    if torch.compiler.is_compiling():
        return
    if (wrong := ((prompt_lengths < 0) | (prompt_lengths >= frames)).nonzero()).numel():
        b = int(wrong[0])
        raise ValueError(
            f"prompt_lengths [{b}]: {int(prompt_lengths[b])} is not in [0, {int(frames[b])}), the row's frames: "
            "a loss needs a frame behind the prompt"
        )


def masked_cross_entropy(
    logits: torch.Tensor, targets: torch.LongTensor, num_items: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Cross-entropy over targets other than -100, in fp32: the mean, or the sum over `num_items` when that is given
    (gradient accumulation). `logits` `(..., V)`, `targets` `(...)`. Zero, not NaN, when nothing is to be predicted.
    """
    loss = F.cross_entropy(
        logits.flatten(0, -2).float(),
        targets.flatten().to(logits.device, torch.long),  # codes may be int32, which generation takes too
        ignore_index=-100,
        reduction="sum",
    )
    return loss / (targets.ne(-100).sum().clamp(min=1).to(loss.device) if num_items is None else num_items)


class SinusoidalPositions(nn.Module):
    """`x + alpha * pe(index)`, even dimensions sin, odd cos. Computed in place: no table to lose or to outgrow."""

    def __init__(self, hidden_size: int, trainable: bool):
        super().__init__()
        self.hidden_size, self.trainable = hidden_size, trainable
        self.alpha = nn.Parameter(torch.ones(1), requires_grad=trainable)

    def forward(self, hidden_states: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
        even = torch.arange(0, self.hidden_size, 2, dtype=torch.float32, device=index.device)
        angle = index[..., None].float() * torch.exp(even * -(math.log(10000.0) / self.hidden_size))
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
        # detach: loading makes every parameter trainable, the published NAR keeps its alphas fixed
        alpha = self.alpha if self.trainable else self.alpha.detach()
        return hidden_states + (alpha * table).to(hidden_states.dtype)


def rotary_angles(config: MidiValleDecoderConfig, clock: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `(B, 1, T, head_size)`, fp32, of `clock` `(B, T)` in 1/4800 s, for geometrically spaced periods."""
    pairs = config.hidden_size // config.num_attention_heads // 2
    low, high = (math.log(s * UNITS_PER_SECOND) for s in (config.rotary_min_period_s, config.rotary_max_period_s))
    periods = torch.linspace(low, high, pairs, dtype=torch.float32, device=clock.device).exp()
    angle = (clock[..., None].float() * (2 * math.pi / periods)).repeat(1, 1, 2)[:, None]
    return angle.cos(), angle.sin()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_size / 2) of `states` `(B, heads, T, head_size)`, in fp32."""
    x = states.float()
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(states.dtype)


class PromptSummary(nn.Module):
    """
    What a prompt's piano and room sound like, as one vector: the mean over the prompt's frames of a map that sees each
    frame's codes beside its notes. Attention could find as much out, but hardly learns to.
    """

    def __init__(self, config: MidiValleDecoderConfig):
        super().__init__()
        inner = config.prompt_summary_size
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.linear1, self.linear2 = nn.Linear(config.hidden_size, inner), nn.Linear(inner, inner)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)  # without a prompt: nothing
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, is_prompt: torch.BoolTensor) -> torch.Tensor:
        """`(B, 1, hidden_size)`, the summary of the frames `hidden_states` `(B, T, hidden_size)` at `is_prompt`
        `(B, T)`."""
        inner = self.activation(self.linear2(self.activation(self.linear1(self.norm(hidden_states)))))
        total = torch.where(is_prompt[..., None], inner, 0).sum(1, keepdim=True, dtype=torch.float32)
        return self.out_proj((total / is_prompt.sum(1).clamp(min=1)[:, None, None]).to(inner.dtype))


class MidiValleEmbeddings(nn.Module):
    """MIDI rows and audio frames as vectors of the stack, with positions, segments and the notes of each frame."""

    def __init__(self, config: MidiValleDecoderConfig, trainable_positions: bool):
        super().__init__()
        sizes = list(zip(config.midi_vocab_sizes, config.midi_embedding_sizes, strict=True))
        self.midi_tables = nn.ModuleList(nn.Embedding(vocab, width) for vocab, width in sizes)
        self.midi_projection = nn.Linear(sum(config.midi_embedding_sizes), config.hidden_size)
        self.sinusoidal = config.position_embedding_type == "sinusoidal"
        if self.sinusoidal:
            self.midi_positions = SinusoidalPositions(config.hidden_size, trainable_positions)
            self.audio_positions = SinusoidalPositions(config.hidden_size, trainable_positions)
        if config.use_segment_embeddings:
            self.midi_segments = nn.Embedding(2, config.hidden_size)  # 0 prompt, 1 target
            self.audio_segments = nn.Embedding(2, config.hidden_size)
        if config.use_frame_notes:
            self.frame_notes = FrameNotes(
                config.midi_vocab_sizes[0] - 4, config.hidden_size, config.frame_note_offsets, config.frame_note_decays
            )
        self.prompt_summary = PromptSummary(config) if config.prompt_summary_size else None
        self.use_segments, self.use_frame_notes = config.use_segment_embeddings, config.use_frame_notes
        self.midi_dropout = nn.Dropout(config.midi_embedding_dropout)
        self.audio_dropout = nn.Dropout(config.embedding_dropout)

    def embed_midi(
        self, midi_ids: torch.LongTensor, midi_attention_mask: torch.Tensor, prompt_lengths: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """`midi_ids` `(B, N, 6)` -> vectors `(B, N, hidden_size)`, onsets `(B, N)` in 1/4800 s (special rows at 0)."""
        fields = [table(midi_ids[..., i]) for i, table in enumerate(self.midi_tables)]
        hidden_states = self.midi_projection(torch.cat(fields, -1))
        ticks = (midi_ids[..., 5] - 4) * TICKS_PER_BAR + midi_ids[..., 4] - 4
        clock = (ticks * UNITS_PER_TICK).clamp(min=0)
        if self.sinusoidal:
            hidden_states = self.midi_positions(hidden_states, attended_index(midi_attention_mask))
        if self.use_segments:
            hidden_states = hidden_states + self.midi_segments(
                (clock >= prompt_lengths[:, None] * UNITS_PER_FRAME).long()
            )
        return self.midi_dropout(hidden_states), clock

    def attended_rows(self, midi_ids: torch.LongTensor, midi_attention_mask: torch.Tensor) -> torch.BoolTensor:
        """`midi_attention_mask` `(B, N)`, with frame notes without the rows that only continue another: the frames know
        how long it is, and a row that stands where nothing is struck would be taken for something new."""
        attended = midi_attention_mask.bool()
        if not self.use_frame_notes:
            return attended
        is_special = (midi_ids < 4).any(-1)
        return attended & (is_special | read_notes(midi_ids, midi_attention_mask).valid)

    def place_audio(self, hidden_states: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
        """Code vectors `(B, T, hidden_size)` with what [`describe_frames`] says of their `places` added."""
        return self.audio_dropout(hidden_states + self.describe_frames(*places).to(hidden_states.dtype))

    def describe_frames(
        self,
        index: torch.LongTensor,
        frames: torch.LongTensor,
        midi_ids: torch.LongTensor,
        midi_attention_mask: torch.Tensor,
        prompt_lengths: torch.LongTensor,
    ) -> torch.Tensor:
        """
        Positions, segments and notes of audio frames, whatever their codes are: `(B, T, hidden_size)`.

        Args:
            index (`torch.LongTensor` of shape `(B, T)`): place of each frame in its row's input.
            frames (`torch.LongTensor` of shape `(B, T)`): the frame that each place predicts, on the physical axis.
        """
        weight = self.midi_projection.weight
        described = torch.zeros(*index.shape, len(weight), dtype=weight.dtype, device=index.device)
        if self.sinusoidal:
            described = self.audio_positions(described, index)
        if self.use_segments:
            described = described + self.audio_segments((index >= prompt_lengths[:, None]).long())
        if self.use_frame_notes:
            notes = read_notes(midi_ids, midi_attention_mask)
            described = described + self.frame_notes(notes, frames).to(described.dtype)
        return described


class StageProjection(nn.Linear):
    """Stage vector to scale and shift. A class of its own: transformers lets only owners of parameters initialise."""


class StageNorm(nn.Module):
    """LayerNorm with the scale and shift of the NAR stage: `scale * LN(x) + shift`, a plain product as published."""

    def __init__(self, config: MidiValleDecoderConfig):
        super().__init__()
        self.projected = config.stage_norm == "projected"
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=self.projected)
        if self.projected:
            self.project_layer = StageProjection(config.hidden_size, 2 * config.hidden_size)
        else:
            self.table = nn.Parameter(torch.empty(config.num_codebooks - 1, 2 * config.hidden_size))

    def forward(self, hidden_states: torch.Tensor, stage: torch.Tensor) -> torch.Tensor:
        """`stage`: vectors `(B or 1, 1, hidden_size)` if projected, else rows of the table `(B or 1, 1)`."""
        scale, shift = (self.project_layer(stage) if self.projected else self.table[stage]).chunk(2, -1)
        return scale * self.norm(hidden_states) + shift


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, `(B, heads, T, head_size)` -> `(B, T, heads, head_size)` and the weights `(B, heads, T, S)`."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MidiValleAttention(nn.Module):
    """Multi-head self-attention with a packed q, k, v projection; causal in the AR, where it may use a cache."""

    num_key_value_groups = 1

    def __init__(self, config: MidiValleDecoderConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Cache | None,
        last: int = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`last`: outputs of so many last places only; 0 for all."""
        B, T, H = hidden_states.shape
        packed = self.in_proj(hidden_states).view(B, T, 3, H // self.head_dim, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        query = query[:, :, -last:]
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, -last:]
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.out_proj(output.flatten(2)), weights


class MidiValleBlock(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a feed-forward layer. With `staged` norms it is the NAR's, else the AR's."""

    def __init__(self, config: MidiValleDecoderConfig, layer_idx: int, staged: bool):
        super().__init__()
        self.self_attn = MidiValleAttention(config, layer_idx, is_causal=not staged)
        self.norm1, self.norm2 = (make_norm(config, staged) for _ in range(2))
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        stage: tuple[torch.Tensor, ...] | torch.Tensor | None = None,  # positional: checkpointing needs its gradient
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        last: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        """`last`: outputs of so many last places only; 0 for all."""
        staged = () if stage is None else (stage,)
        attended, _ = self.self_attn(
            self.norm1(hidden_states, *staged), attention_mask, rotary, past_key_values, last, **kwargs
        )
        hidden_states = hidden_states[:, -last:] + self.dropout(attended)
        inner = self.dropout(self.activation(self.linear1(self.norm2(hidden_states, *staged))))
        return hidden_states + self.dropout(self.linear2(inner))


def make_norm(config: MidiValleDecoderConfig, staged: bool) -> nn.Module:
    """The norm of a block or of a stack's end."""
    return StageNorm(config) if staged else nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class MidiVallePreTrainedModel(PreTrainedModel):
    """Flags and initialisation common to the AR and the NAR."""

    config: MidiValleDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MidiValleBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MidiValleBlock, "attentions": MidiValleAttention}

    def quantize_(self, dtype: Literal["int8"] = "int8") -> None:
        """
        Turn the linear layers of all blocks into int8 ones, in place; heads and embeddings stay. The model is then
        saved and loaded so. Not for training.

        Raises:
            ValueError: another `dtype`; an adapter is loaded.
        """
        if dtype != "int8":
            raise ValueError(f'quantize_ knows "int8", got {dtype!r}')
        quantize_linears(self)
        self.config.quantization = dtype

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SinusoidalPositions):
            init.ones_(module.alpha)
        elif isinstance(module, StageProjection) or (isinstance(module, StageNorm) and not module.projected):
            affine = module.bias if isinstance(module, StageProjection) else module.table
            half = affine.shape[-1] // 2  # every stage starts as a plain LayerNorm: scale 1, shift 0
            init.copy_(affine, (torch.arange(2 * half) < half).to(affine.dtype).expand_as(affine))


__all__ = ["MidiVallePreTrainedModel"]
