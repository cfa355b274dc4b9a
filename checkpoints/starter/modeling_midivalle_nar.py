# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The NAR decoder: codebooks 1.., all frames at once, one stage per codebook, from the codebooks below."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_midivalle import UNITS_PER_FRAME, MidiValleNARConfig
from .modeling_midivalle_layers import (
    MidiValleBlock,
    MidiValleEmbeddings,
    MidiVallePreTrainedModel,
    attended_index,
    check_codes,
    check_midi_ids,
    check_prompt_lengths,
    make_norm,
    masked_cross_entropy,
    rotary_angles,
)
from .quantization_midivalle import quantize_linears


@dataclass
class MidiValleNAROutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): returned with `labels`.
        logits (`torch.Tensor` of shape `(B, T, codebook_size)`): of each row's stage.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*): per layer, over MIDI rows and frames.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class StageInputs(NamedTuple):
    """What the stages of a batch have in common: all but the codes, and their number."""

    midi_states: torch.Tensor  # (B, N, hidden_size)
    described: torch.Tensor  # (B, T, hidden_size), positions, segments and notes of the frames
    is_prompt: torch.BoolTensor  # (B, T)
    mask: torch.Tensor | None  # over MIDI rows and frames
    rotary: tuple[torch.Tensor, torch.Tensor] | None


class MidiValleNARModel(MidiVallePreTrainedModel):
    """
    Predicts codebook k (stage k = 1 .. K - 1) of the target's frames from MIDI, the prompt's frames with all their
    codebooks, and the target's codebooks below k.
    """

    config: MidiValleNARConfig
    _auto_class = "AutoModel"
    main_input_name = "audio_codes"

    def __init__(self, config: MidiValleNARConfig):
        super().__init__(config)
        K, width = config.num_codebooks, config.hidden_size
        self.embeddings = MidiValleEmbeddings(config, trainable_positions=False)
        # table 0 has one row more, the published id of padded frames
        sizes = [config.codebook_size + 1] + [config.codebook_size] * (K - 1)
        self.audio_embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        if config.stage_norm == "projected":
            self.stage_embeddings = nn.Embedding(K - 1, width)
        self.layers = nn.ModuleList(MidiValleBlock(config, i, staged=True) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, staged=True)
        self.heads = nn.ModuleList(nn.Linear(width, config.codebook_size, bias=False) for _ in range(K - 1))
        step = 2 if config.tie_heads_one_step_off else 1  # heads[k - 1] predicts codebook k
        self._tied_weights_keys = {f"heads.{i}.weight": f"audio_embeddings.{i + step}.weight" for i in range(K - step)}
        if config.quantization:
            quantize_linears(self)
            self._keep_in_fp32_modules_strict = ["scale"]  # of int8 layers
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.audio_embeddings[0]

    def set_input_embeddings(self, value: nn.Embedding):
        self.audio_embeddings[0] = value

    def resize_token_embeddings(self, *args, **kwargs):
        """Refused: each codebook has its own table and head, of the codec's size."""
        raise ValueError("MIDI-VALLE's vocabularies are fixed by its codec's codebooks: none can be resized")

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        audio_codes: torch.LongTensor,
        midi_ids: torch.LongTensor,
        midi_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        stage: int | torch.LongTensor = 1,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        shared: StageInputs | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MidiValleNAROutput:
        r"""
        Args:
            audio_codes (`torch.LongTensor` of shape `(B, K, T)`): codes of prompt and target; of the target only the
                codebooks below `stage` are read.
            midi_ids (`torch.LongTensor` of shape `(B, N, 6)`): MIDI rows of prompt and target on one time axis.
            midi_attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 0 on padded rows, either side.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padded frames, either side.
            prompt_lengths (`torch.LongTensor` of shape `(B,)`, *optional*): prompt frames of each row; 0 if not given.
            stage (`int` or `torch.LongTensor` of shape `(B,)`): the codebook to predict, 1 .. K - 1; a tensor lets the
                rows of a batch train different stages.
            labels (`torch.LongTensor` of shape `(B, K, T)`, *optional*): codes, -100 where nothing is to be predicted;
                prompt and padded frames never count.
            logits_to_keep (`int`, *optional*): logits of so many last frames only; 0 for all, which `labels` need.
            shared (`StageInputs`, *optional*): of [`share_inputs`], where several stages of one batch are wanted.
        Returns:
            [`MidiValleNAROutput`]; the loss is the mean over target frames, or the published weighted sum.
        Raises:
            ValueError: wrong axes; ids, codes or stages out of range; `labels` without a target frame in a row.
        """
        B, K, T = audio_codes.shape
        if K != self.config.num_codebooks:
            raise ValueError(f"audio_codes must be (B, {self.config.num_codebooks}, T), got {tuple(audio_codes.shape)}")
        check_midi_ids(midi_ids, B, self.config.midi_vocab_sizes)
        given = stage.tolist() if torch.is_tensor(stage) else [stage] * B
        if not isinstance(given, list) or len(given) != B or not all(1 <= s < K for s in given):
            raise ValueError(f"stage must be 1 to {K - 1}, or so for each row ({B}), got {stage}")
        device = audio_codes.device
        if midi_attention_mask is None:
            midi_attention_mask = torch.ones_like(midi_ids[..., 0])
        if attention_mask is None:
            attention_mask = torch.ones(B, T, dtype=torch.long, device=device)
        if prompt_lengths is None:
            prompt_lengths = torch.zeros(B, dtype=torch.long, device=device)
        if labels is not None:
            logits_to_keep = 0
            check_prompt_lengths(prompt_lengths, attention_mask.sum(1))
        stages, attended = torch.as_tensor(stage, device=device).reshape(-1, 1), attention_mask.bool()  # (1 or B, 1)
        if shared is None:
            shared = self.share_inputs(audio_codes, midi_ids, midi_attention_mask, attention_mask, prompt_lengths)
        midi_states, described, is_prompt, mask, rotary = shared
        if labels is not None:
            targets = labels.gather(1, stages.expand(B, 1)[..., None].expand(-1, -1, T))[:, 0]
            targets = targets.masked_fill(is_prompt | ~attended, -100)
            # before the layers, lest a GPU be waited for
            check_codes("labels of each row's stage", targets, self.config.codebook_size, targets != -100)
        hidden_states = self._sum_codebooks(audio_codes, attended, is_prompt, stages)
        hidden_states = self.embeddings.audio_dropout(hidden_states + described.to(hidden_states.dtype))
        hidden_states = torch.cat([midi_states.to(hidden_states.dtype), hidden_states], 1)
        condition = self.condition(stages)
        for layer in self.layers:
            last = logits_to_keep if layer is self.layers[-1] else 0
            hidden_states = layer(hidden_states, condition, attention_mask=mask, rotary=rotary, last=last, **kwargs)
        logits = self._apply_heads(self.norm(hidden_states[:, -(logits_to_keep or T) :], condition), stage)
        loss = None if labels is None else self.loss(logits, targets, attended, prompt_lengths, **kwargs)
        return MidiValleNAROutput(loss=loss, logits=logits)

    def condition(self, stages: torch.LongTensor) -> torch.Tensor:
        """What the staged norms take of `stages` `(B or 1, 1)`."""
        return self.stage_embeddings(stages - 1) if self.config.stage_norm == "projected" else stages - 1

    def share_inputs(
        self,
        audio_codes: torch.LongTensor,
        midi_ids: torch.LongTensor,
        midi_attention_mask: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_lengths: torch.LongTensor,
    ) -> StageInputs:
        """What the forward computes of all its arguments but stage and target codes: once for all stages of a batch."""
        index = attended_index(attention_mask)
        midi_states, clock = self.embeddings.embed_midi(midi_ids, midi_attention_mask, prompt_lengths)
        described = self.embeddings.describe_frames(index, index, midi_ids, midi_attention_mask, prompt_lengths)
        is_prompt, attended = index < prompt_lengths[:, None], attention_mask.bool()
        if self.embeddings.prompt_summary is not None:
            # prompt frames are the same at every stage
            frames = self._sum_codebooks(audio_codes, attended, is_prompt, torch.ones_like(index[:, :1])) + described
            described = described + self.embeddings.prompt_summary(frames, is_prompt & attended)
        attended_rows = self.embeddings.attended_rows(midi_ids, midi_attention_mask)
        padding = torch.cat([attended_rows.to(attention_mask.dtype), attention_mask], 1)
        mask = create_bidirectional_mask(self.config, torch.cat([midi_states, described], 1), padding)
        rotary = None
        if self.config.position_embedding_type == "time_rotary":
            rotary = rotary_angles(self.config, torch.cat([clock, index * UNITS_PER_FRAME], 1))
        return StageInputs(midi_states, described, is_prompt, mask, rotary)

    def _sum_codebooks(
        self,
        audio_codes: torch.LongTensor,
        attended: torch.BoolTensor,
        is_prompt: torch.BoolTensor,
        stages: torch.LongTensor,
    ) -> torch.Tensor:
        """`(B, T, hidden_size)`: all tables at prompt frames, tables below the stage at target frames."""
        books = torch.arange(self.config.num_codebooks, device=audio_codes.device)
        known = is_prompt[:, None] | (stages > books)[..., None]  # (B, K, T)
        read = known & attended[:, None]  # what is unknown may hold anything
        check_codes("audio_codes", audio_codes, self.config.codebook_size, read)
        first = audio_codes[:, 0].masked_fill(~attended, self.config.codebook_size)
        total = self.audio_embeddings[0](first)
        for k in range(1, self.config.num_codebooks):
            codes = audio_codes[:, k].masked_fill(~read[:, k], 0)
            total = total + self.audio_embeddings[k](codes) * known[:, k, :, None]
        return total

    def _apply_heads(self, hidden_states: torch.Tensor, stage: int | torch.LongTensor) -> torch.Tensor:
        """Logits `(B, T, codebook_size)`, each row through the head of its stage."""
        if not torch.is_tensor(stage):
            return self.heads[stage - 1](hidden_states)
        rows = [(stage == k + 1).nonzero()[:, 0] for k in range(len(self.heads))]
        parts = [head(hidden_states[found]) for head, found in zip(self.heads, rows, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def loss(
        self,
        logits: torch.Tensor,
        targets: torch.LongTensor,
        attended: torch.BoolTensor,
        prompt_lengths: torch.LongTensor,
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Cross-entropy of `logits` `(B, T, codebook_size)` against `targets` `(B, T)`, -100 ignored: the mean, or for
        `"published_sum"` the sum times total / (total - prompt) frames.
        """
        if self.config.objective == "published_sum":
            total = attended.sum()
            loss = F.cross_entropy(
                logits.float().transpose(1, 2), targets.to(logits.device, torch.long), reduction="sum"
            )
            return loss * (total / (total - prompt_lengths.sum())).to(loss.device)
        return masked_cross_entropy(logits, targets, num_items_in_batch)

    def draw_stages(self, batch_size: int, generator: torch.Generator | None = None) -> torch.LongTensor:
        """
        A stage for each row, `(batch_size,)`, on the CPU: each as often as the batch size allows, in drawn order.
        """
        stages = torch.arange(batch_size) % (self.config.num_codebooks - 1)
        offset = torch.randint(
            self.config.num_codebooks - 1, (1,), generator=generator
        )  # fair when K - 1 divides not B
        stages = (stages + offset) % (self.config.num_codebooks - 1) + 1
        return stages[torch.randperm(batch_size, generator=generator)]

    def draw_prefix(self, lengths: torch.LongTensor, generator: torch.Generator | None = None) -> int:
        """
        Prompt frames of a batch as published (prefix mode 1): the first P frames of the excerpts themselves, P uniform
        from a quarter of the shortest of `lengths` `(B,)` to below the half, at most 150.

        Raises:
            ValueError: an excerpt is shorter than four frames.
        """
        quarter = int(lengths.min()) // 4
        if not quarter:
            raise ValueError(f"an excerpt is shorter than the 4 frames that a prefix needs: {int(lengths.min())}")
        return min(int(torch.randint(quarter, 2 * quarter, (1,), generator=generator)), 150)


__all__ = ["MidiValleNARModel"]
