# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The AR decoder: codebook 0, frame by frame, after all MIDI rows. Sequence [MIDI ; audio], MIDI seen both ways."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_midivalle import SPECIAL_IDS, UNITS_PER_FRAME, MidiValleARConfig
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

# an output's name for the cache: transformers 5.24 calls it `cache` and warns of the name that all had before
CACHE = "past_key_values" if "past_key_values" in BaseModelOutputWithPast.__dataclass_fields__ else "cache"


@dataclass
class MidiValleARDecoderOutput(BaseModelOutputWithPast):
    """
    Args:
        prompt_summary (`torch.Tensor` of shape `(B, 1, hidden_size)`, *optional*): with `config.prompt_summary_size`,
            what the next steps are given.
    """

    prompt_summary: torch.Tensor | None = None


@dataclass
class MidiValleAROutput(CausalLMOutputWithPast):
    """
    Args:
        prompt_summary (`torch.Tensor` of shape `(B, 1, hidden_size)`, *optional*): of [`MidiValleARDecoderOutput`].
    """

    prompt_summary: torch.Tensor | None = None


class MidiValleARDecoder(MidiVallePreTrainedModel):
    """The stack of the AR without its head. MIDI rows enter with the first frames and then stay in the cache."""

    config: MidiValleARConfig

    def __init__(self, config: MidiValleARConfig):
        super().__init__(config)
        self.embeddings = MidiValleEmbeddings(config, trainable_positions=True)
        self.audio_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MidiValleBlock(config, i, staged=False) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, staged=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.audio_embedding

    def set_input_embeddings(self, value: nn.Embedding):
        self.audio_embedding = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        midi_ids: torch.LongTensor | None = None,
        midi_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_summary: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MidiValleARDecoderOutput:
        """
        Arguments as in [`MidiValleARModel`]. `last_hidden_state` is `(B, N + T, hidden_size)` when MIDI rows enter,
        else `(B, T, hidden_size)`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        (B, T), device = given.shape[:2], given.device
        if midi_ids is None:
            midi_ids = torch.zeros(B, 0, len(self.config.midi_vocab_sizes), dtype=torch.long, device=device)
        if midi_attention_mask is None:
            midi_attention_mask = torch.ones_like(midi_ids[..., 0])
        if prompt_lengths is None:
            prompt_lengths = torch.zeros(B, dtype=torch.long, device=device)
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and self.training and self.layers[0].gradient_checkpointing:
            raise ValueError("gradient checkpointing keeps no cache in train mode: call model.eval() before generate")
        seen, prefill = _seen_frames(past_key_values, midi_ids.shape[1])
        check_midi_ids(midi_ids, B, self.config.midi_vocab_sizes, values=prefill)
        if inputs_embeds is None:
            if prefill:  # as above: a step of generation is not held up
                check_codes("input_ids", input_ids, self.config.vocab_size)
            inputs_embeds = self.audio_embedding(input_ids)
        places = seen + torch.arange(T, device=device)
        if attention_mask is None:
            index = places.expand(B, -1)
            length = seen + T if isinstance(seen, int) else past_key_values.get_max_length() - midi_ids.shape[1]
            attention_mask = torch.ones(B, length, dtype=torch.long, device=device)
        else:
            if isinstance(seen, int) and attention_mask.shape[1] != seen + T:
                raise ValueError(
                    f"attention_mask must cover the {seen} cached and the {T} new frames, got {attention_mask.shape[1]}"
                )
            index = attended_index(attention_mask)[:, places]
        frames = self.predicted_frames(index, prompt_lengths)
        hidden_states = self.embeddings.place_audio(
            inputs_embeds, index, frames, midi_ids, midi_attention_mask, prompt_lengths
        )
        if self.embeddings.prompt_summary is not None:
            if prompt_summary is None:
                if not prefill:
                    raise ValueError("with a filled cache give the prompt_summary of the output that filled it")
                is_prompt = (index < prompt_lengths[:, None]) & attention_mask[:, places].bool()
                prompt_summary = self.embeddings.prompt_summary(hidden_states, is_prompt)
            hidden_states = hidden_states + prompt_summary
        clock, blocks = frames * UNITS_PER_FRAME, None
        if prefill:
            midi_states, midi_clock = self.embeddings.embed_midi(midi_ids, midi_attention_mask, prompt_lengths)
            hidden_states = torch.cat([midi_states.to(hidden_states.dtype), hidden_states], 1)
            clock = torch.cat([midi_clock, clock], 1)
            # 0 = one block, seen both ways; -1 = causal
            blocks = F.pad(torch.zeros_like(midi_ids[..., 0]), (0, T), value=-1)
        attended_rows = self.embeddings.attended_rows(midi_ids, midi_attention_mask)
        padding = torch.cat([attended_rows.to(attention_mask.dtype), attention_mask], 1)
        mask = create_causal_mask(self.config, hidden_states, padding, past_key_values, block_sequence_ids=blocks)
        rotary = rotary_angles(self.config, clock) if self.config.position_embedding_type == "time_rotary" else None
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, None, attention_mask=mask, rotary=rotary, past_key_values=past_key_values, **kwargs
            )
        return MidiValleARDecoderOutput(
            last_hidden_state=self.norm(hidden_states), prompt_summary=prompt_summary, **{CACHE: past_key_values}
        )

    def predicted_frames(self, index: torch.LongTensor, prompt_lengths: torch.LongTensor) -> torch.LongTensor:
        """
        The frame that the input at place `index` `(B, T)` predicts. Prompt input i predicts frame i + 1; the BOS frame
        at place P predicts frame P, and so every later place i predicts frame i. Without BOS it is i + 1 throughout.
        """
        if not self.config.use_target_bos:
            return index + 1
        return torch.where(index < prompt_lengths[:, None], index + 1, index)


class MidiValleARModel(MidiVallePreTrainedModel, GenerationMixin):
    """
    Predicts the first codebook of the target's frames. Audio input with `config.use_target_bos`: P prompt codes, one
    BOS frame, the target's codes; without: codes only. `generate` of [`GenerationMixin`] takes the forward's arguments.
    """

    config: MidiValleARConfig
    _auto_class = "AutoModel"  # said here, for the parts of a loaded folder too: what they save holds their code
    # No assisted decoding: it cuts caches, attentions and hidden states by frames, and MIDI rows stand before those.
    _is_stateful = True
    _tied_weights_keys = {"lm_head.weight": "model.audio_embedding.weight"}

    def __init__(self, config: MidiValleARConfig):
        super().__init__(config)
        self.model = MidiValleARDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.quantization:
            quantize_linears(self)
            self._keep_in_fp32_modules_strict = ["scale"]  # of int8 layers
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        midi_ids: torch.LongTensor | None = None,
        midi_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_summary: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MidiValleAROutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): codes of codebook 0 and special ids; with a filled cache
                only the new ones. See [`~MidiValleARModel.build_inputs`].
            midi_ids (`torch.LongTensor` of shape `(B, N, 6)`, *optional*): MIDI rows of prompt and target on one time
                axis; given at every step (with a filled cache they are not attended anew). Without them frames follow
                frames alone.
            midi_attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 0 on padded rows, either side.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padded frames, either side; with a
                filled cache it covers the cached frames too, as everywhere in transformers.
            prompt_lengths (`torch.LongTensor` of shape `(B,)`, *optional*): prompt frames of each row; 0 if not given.
            past_key_values (`Cache`, *optional*): holds MIDI rows and earlier frames.
            inputs_embeds (`torch.Tensor` of shape `(B, T, hidden_size)`, *optional*): code vectors instead of
                `input_ids`, rows of `get_input_embeddings()` or mixtures of them.
            prompt_summary (`torch.Tensor` of shape `(B, 1, hidden_size)`, *optional*): of the output that filled the
                cache, with `config.prompt_summary_size`; the whole prompt stands in that call.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): aligned with `input_ids` (shifted inside), -100
                where nothing is to be predicted.
            logits_to_keep (`int`, *optional*): only the last so many logits; 0 keeps all, which `labels` need.
            cache (`Cache`, *optional*): `past_key_values` by the name that it has from transformers 5.24 on.
        Returns:
            [`MidiValleAROutput`] with `logits` `(B, T, vocab_size)`; `hidden_states` span MIDI and audio.
        Raises:
            ValueError: ids out of range; `labels` beside `prompt_lengths` that leave nothing to be predicted.
        """
        if labels is not None:
            logits_to_keep = 0
            check_codes("labels", labels, self.config.vocab_size, labels != -100)
            if prompt_lengths is not None:
                places = torch.ones_like(labels) if attention_mask is None else attention_mask
                check_prompt_lengths(prompt_lengths, places.sum(1) - int(self.config.use_target_bos))
        outputs = self.model(
            input_ids,
            midi_ids,
            midi_attention_mask,
            attention_mask,
            prompt_lengths,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            prompt_summary=prompt_summary,
            use_cache=use_cache,
            **kwargs,
        )
        frames = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        logits = self.lm_head(outputs.last_hidden_state[:, -(logits_to_keep or frames) :])
        return MidiValleAROutput(
            loss=None if labels is None else self.loss(logits, labels, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            prompt_summary=outputs.prompt_summary,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def build_inputs(
        self, codes: torch.LongTensor, attention_mask: torch.Tensor, prompt_lengths: torch.LongTensor
    ) -> dict[str, torch.LongTensor]:
        """
        Frames to the AR's own input, for training and generation alike.

        Args:
            codes (`torch.LongTensor` of shape `(B, T)`): codebook 0 of prompt and target, padded on the right.
            attention_mask (`torch.Tensor` of shape `(B, T)`): 0 on padding.
            prompt_lengths (`torch.LongTensor` of shape `(B,)`): prompt frames of each row.
        Returns:
            `input_ids`, `attention_mask` and `labels` `(B, T + 1)` (or `(B, T)` without BOS); labels are -100 on
            prompt, BOS and padding, except that `"published_sum"` also counts prompt (from frame 1) and padding.
        """
        input_ids = codes.masked_fill(~attention_mask.bool(), self.config.pad_token_id)
        if self.config.use_target_bos:
            P = prompt_lengths[:, None]
            places = torch.arange(codes.shape[1] + 1, device=codes.device).expand(len(codes), -1)
            source = torch.where(places > P, places - 1, places).clamp(max=codes.shape[1] - 1)
            input_ids = input_ids.gather(1, source).masked_fill(places == P, self.config.bos_token_id)
            attention_mask = F.pad(attention_mask, (1, 0), value=1)
            first = prompt_lengths + 1
        else:
            first = prompt_lengths
        if self.config.objective == "published_sum":
            return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": input_ids}
        places = torch.arange(input_ids.shape[1], device=codes.device)
        ignored = (places < first[:, None]) | ~attention_mask.bool()
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": input_ids.masked_fill(ignored, -100),
        }

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.LongTensor,
        shift_labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Cross-entropy of `logits` `(B, T, vocab_size)`, each against the next of `labels` `(B, T)`. `"target_mean"`:
        mean over labels other than -100. `"published_sum"`: sum over all places; what is -100 or past the end is EOS.
        """
        eos = self.config.objective == "published_sum"
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=self.config.eos_token_id if eos else -100)
        if eos:
            targets = shift_labels.masked_fill(shift_labels == -100, self.config.eos_token_id)
            return F.cross_entropy(
                logits.float().transpose(1, 2), targets.to(logits.device, torch.long), reduction="sum"
            )
        return masked_cross_entropy(logits, shift_labels, num_items_in_batch)

    def _prepare_generation_config(self, *args, **kwargs):
        for name in SPECIAL_IDS:  # what `Trainer` made of them: see the configuration
            given = getattr(self.generation_config, name)
            given = given if isinstance(given, list) else [given]
            if any(i is not None and i < self.config.codebook_size for i in given):
                setattr(self.generation_config, name, getattr(self.config, name))
        return super()._prepare_generation_config(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> dict:
        """
        The forward's arguments; masks stay two-dimensional, because the cache also holds MIDI rows. Where `generate`
        goes on with a filled cache, it takes those rows for frames: that is put right. Steps that may be compiled get
        tensors of one shape and stride.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        inputs = {"input_ids": input_ids}
        if inputs_embeds is not None and is_first_iteration:
            inputs = {"inputs_embeds": inputs_embeds}
        [(name, given)] = inputs.items()
        midi_ids = kwargs.get("midi_ids")
        rows = 0 if midi_ids is None else midi_ids.shape[1]
        if next_sequence_length is not None and is_first_iteration:
            next_sequence_length = given.shape[1] - int(_seen_frames(past_key_values, rows)[0])
        if next_sequence_length is not None:
            given = given[:, -next_sequence_length:]
        if attention_mask is not None and not is_first_iteration and getattr(past_key_values, "is_compileable", False):
            attention_mask = F.pad(
                attention_mask, (0, past_key_values.get_max_length() - rows - attention_mask.shape[1])
            )
        kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "position_ids")}
        return {
            name: given.clone(memory_format=torch.contiguous_format),
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            **kwargs,
        }

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: dict, *args, **kwargs) -> dict:
        if outputs.prompt_summary is not None:
            model_kwargs["prompt_summary"] = outputs.prompt_summary
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _prepare_static_cache(self, *args, max_cache_len: int, model_kwargs: dict, **kwargs) -> Cache:
        rows = 0 if model_kwargs.get("midi_ids") is None else model_kwargs["midi_ids"].shape[1]
        return super()._prepare_static_cache(
            *args, max_cache_len=max_cache_len + rows, model_kwargs=model_kwargs, **kwargs
        )


def _seen_frames(past_key_values: Cache | None, rows: int) -> tuple[int | torch.Tensor, bool]:
    """Audio frames in the cache (a tensor for static caches), and whether the MIDI rows are still to be put there."""
    length = 0 if past_key_values is None else past_key_values.get_seq_length()
    if isinstance(length, int):
        prefill = length == 0
    else:
        prefill = not torch.compiler.is_compiling() and bool(length == 0)  # a compiled step is never the first
    return (0 if prefill else length - rows), prefill


__all__ = ["MidiValleARModel"]
