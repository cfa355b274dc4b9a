# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Generation: the AR's frames one by one, the NAR's codebooks one by one, audio. The MIDI sets the length, not EOS,
except with `compat="published"`, where the published program's own rules hold."""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .configuration_midivalle import TICKS_PER_BAR, UNITS_PER_FRAME, UNITS_PER_TICK
from .modeling_midivalle_frame_notes import read_notes
from .modeling_midivalle_layers import check_midi_ids

PUBLISHED_FRAMES_PER_ROW = 16


@dataclass
class MidiValleGenerateOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.Tensor` of shape `(B, 1, L)`): audio at `config.sampling_rate`, 0 after a row's end.
        audio_codes (`torch.LongTensor` of shape `(B, K, T)`): codes of the target alone, 0 after a row's end.
        target_frames (`torch.LongTensor` of shape `(B,)`): frames of each row.
    """

    audio_values: torch.Tensor | None = None
    audio_codes: torch.LongTensor | None = None
    target_frames: torch.LongTensor | None = None


class PreallocatedLayer(DynamicLayer):
    """A growing cache layer inside a buffer of `capacity` places: appending copies the new states only."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        seen = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            B, heads, _, size = key_states.shape
            self._buffer = key_states.new_empty(2, B, heads, self.capacity, size)
        end = seen + key_states.shape[2]
        self._buffer[0, :, :, seen:end], self._buffer[1, :, :, seen:end] = key_states, value_states
        self.keys, self.values = self._buffer[:, :, :, :end]
        return self.keys, self.values


@dataclass
class Sampler:
    """How a code is chosen from logits: greedy, or by the inverse distribution function at a uniform number."""

    do_sample: bool
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0

    def __post_init__(self):
        if self.do_sample and not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; do_sample=False chooses greedily")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k must be at least 0 and top_p in (0, 1], got {self.top_k} and {self.top_p}")

    def __call__(self, logits: torch.Tensor, uniform: torch.Tensor | None) -> torch.LongTensor:
        """`logits` `(..., V)` and `uniform` `(...)` in [0, 1) -> codes `(...)`. ValueError on NaN or infinity."""
        if not torch.isfinite(logits).all():
            raise ValueError("the model gave NaN or infinite logits: its weights or its precision are broken")
        if not self.do_sample:
            return logits.argmax(-1)
        logits, order = (logits.float() / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            logits, order = logits[..., : self.top_k], order[..., : self.top_k]
        before = logits.softmax(-1).cumsum(-1)
        if self.top_p < 1:
            reached = before.roll(1, -1) >= self.top_p  # the code that crosses top_p still counts
            reached[..., 0] = False
            before = logits.masked_fill(reached, -torch.inf).softmax(-1).cumsum(-1)
        threshold = uniform[..., None].to(before) * before[..., -1:]
        place = (before <= threshold).sum(-1, keepdim=True).clamp(max=before.shape[-1] - 1)
        return order.gather(-1, place)[..., 0]


def draw_uniform(
    target_frames: torch.LongTensor, channels: int, seed: int | list[int] | None, width: int
) -> torch.Tensor:
    """
    Uniform numbers `(B, channels, width)`. Each row draws for its own frames from its own generator (`seed`, or its
    entry of a list), so a row's numbers do not depend on its batch. None: seeds from torch's global generator.
    """
    B = len(target_frames)
    if seed is None:
        seed = torch.randint(2**62, (B,)).tolist()
    seeds = [seed] * B if isinstance(seed, int) else list(seed)
    if len(seeds) != B:
        raise ValueError(f"seed must be one integer or one for each of the {B} rows, got {len(seeds)}")
    uniform = torch.zeros(B, channels, width)
    for b, frames in enumerate(target_frames.tolist()):
        generator = torch.Generator().manual_seed(seeds[b])
        for channel in range(channels):
            uniform[b, channel, :frames] = torch.rand(frames, generator=generator)
    return uniform


def align_right(codes: torch.LongTensor, lengths: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Move right-padded `codes` `(B, T)` against the right edge; also the mask `(B, T)`."""
    source = torch.arange(codes.shape[1], device=codes.device) - (codes.shape[1] - lengths[:, None])
    return codes.gather(1, source.clamp(min=0)), (source >= 0).long()


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


class MidiValleGenerationMixin(GenerationMixin):
    """`generate` and `generate_codes` of [`MidiValleForConditionalGeneration`]."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        prompt_codes: torch.LongTensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        target_frames: int | torch.LongTensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        nar_temperature: float = 0.0,
        seed: int | list[int] | None = None,
        compat: Literal["published"] | None = None,
        return_dict_in_generate: bool = False,
    ) -> torch.Tensor | MidiValleGenerateOutput:
        r"""
        Render MIDI on the piano and in the room of a prompt.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N, 6)`): MIDI rows of prompt and target on one time axis.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 0 on padded rows, either side.
            input_values (`torch.Tensor` of shape `(B, 1, L)`, *optional*): the prompt's audio, `config.sampling_rate`.
            padding_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 on padding, on the right.
            prompt_codes (`torch.LongTensor` of shape `(B, K, P)`, *optional*): the prompt, already encoded, padded on
                the right; instead of `input_values`.
            prompt_lengths (`torch.LongTensor` of shape `(B,)`, *optional*): frames of each row of `prompt_codes`.
            target_frames (`int` or `torch.LongTensor` of shape `(B,)`, *optional*): frames to generate (50 a second);
                up to the end of the last note if not given.
            do_sample, temperature, top_k, top_p (*optional*): for codebook 0; from `generation_config` if not given.
                Any of the last three is enough to sample.
            nar_temperature (`float`, *optional*): above 0, the other codebooks are sampled too.
            seed (`int` or `list[int]`, *optional*): same seed, same audio, alone or in any batch.
            compat (`str`, *optional*): `"published"` generates one row by the published program's rules: every code may
                be drawn at temperature 1 unless told otherwise; it ends where EOS is the likeliest or the drawn id, or
                after 16 frames per MIDI row and one; `target_frames` is not read.
            return_dict_in_generate (`bool`, *optional*): also return the codes and lengths.
        Returns:
            `torch.Tensor` of shape `(B, 1, hop_length * T)`, float32, T the longest row's frames and 0 after a row's
            end; or [`MidiValleGenerateOutput`].
        """
        prompt_codes, prompt_lengths = self._encode_prompt(
            input_ids, input_values, padding_mask, prompt_codes, prompt_lengths
        )
        audio_codes = self.generate_codes(
            input_ids,
            attention_mask,
            prompt_codes,
            prompt_lengths,
            target_frames,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            nar_temperature=nar_temperature,
            seed=seed,
            compat=compat,
        )
        if compat is None:
            target_frames = self._check_target(input_ids, attention_mask, prompt_lengths, target_frames)
        else:
            target_frames = torch.tensor([audio_codes.shape[-1]], device=audio_codes.device)
        audio_values = self.decode_codes(audio_codes, target_frames)
        if not return_dict_in_generate:
            return audio_values
        return MidiValleGenerateOutput(audio_values=audio_values, audio_codes=audio_codes, target_frames=target_frames)

    @torch.no_grad()
    def generate_codes(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        prompt_codes: torch.LongTensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        target_frames: int | torch.LongTensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        nar_temperature: float = 0.0,
        seed: int | list[int] | None = None,
        compat: Literal["published"] | None = None,
    ) -> torch.LongTensor:
        """The target's codes `(B, K, T)`, 0 after a row's end. Arguments as in `generate`."""
        prompt_codes, prompt_lengths = self._encode_prompt(input_ids, None, None, prompt_codes, prompt_lengths)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids[..., 0])
        if compat is None:
            defaults = self.generation_config
            target_frames = self._check_target(input_ids, attention_mask, prompt_lengths, target_frames)
        else:
            defaults, target_frames = Sampler(do_sample=True), self._published_cap(compat, attention_mask)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if do_sample is None:
            do_sample = bool(defaults.do_sample) or any(value is not None for value in given.values())
        given = {k: getattr(defaults, k) if v is None else v for k, v in given.items()}
        sampler = Sampler(do_sample, **{k: v for k, v in given.items() if v is not None})
        width = int(target_frames.max())
        uniform = draw_uniform(target_frames, self.config.ar_config.num_codebooks, seed, width).to(input_ids.device)
        first = self._generate_ar(
            input_ids, attention_mask, prompt_codes[:, 0], prompt_lengths, width, sampler, uniform[:, 0], bool(compat)
        )
        target_frames = target_frames.clamp(max=first.shape[1])
        return self._generate_nar(
            input_ids,
            attention_mask,
            prompt_codes,
            prompt_lengths,
            first,
            target_frames,
            nar_temperature,
            uniform[:, 1:],
        )

    @torch.no_grad()
    def decode_codes(
        self, audio_codes: torch.LongTensor, target_frames: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """
        `audio_codes` `(B, K, T)` to audio `(B, 1, hop_length * T)`, float32. Rows are decoded each at its own length,
        as the codec hears both sides; 0 after a row's end.
        """
        self._require_codec()
        B, _, T = audio_codes.shape
        hop = self.config.hop_length
        lengths = [T] * B if target_frames is None else target_frames.tolist()
        audio_values = torch.zeros(B, 1, hop * T, device=audio_codes.device)
        for b, length in enumerate(lengths):
            audio_values[b : b + 1, :, : hop * length] = self.codec.decode_codes(audio_codes[b : b + 1, :, :length])
        return audio_values

    def _generate_ar(
        self,
        midi_ids: torch.LongTensor,
        midi_attention_mask: torch.Tensor,
        prompt: torch.LongTensor,
        prompt_lengths: torch.LongTensor,
        frames: int,
        sampler: Sampler,
        uniform: torch.Tensor,
        until_eos: bool,
    ) -> torch.LongTensor:
        """
        Codebook 0 of the target, `(B, frames)`, one cached step per frame; EOS and BOS cannot be chosen. `until_eos`
        (one row): EOS can, and ends it.
        """
        config = self.config.ar_config
        ids, mask = align_right(prompt, prompt_lengths)
        if config.use_target_bos:
            bos = ids.new_full((len(ids), 1), config.bos_token_id)
            ids, mask = torch.cat([ids, bos], 1), torch.cat([mask, torch.ones_like(bos)], 1)
        width = ids.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), frames)], 1)
        capacity = midi_ids.shape[1] + width + frames
        cache = Cache(layers=[PreallocatedLayer(capacity) for _ in range(config.num_hidden_layers)])
        codes = []
        for step in range(frames):
            logits = self.ar(
                ids,
                midi_ids=midi_ids,
                midi_attention_mask=midi_attention_mask,
                attention_mask=mask[:, : width + step],
                prompt_lengths=prompt_lengths,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1, : config.vocab_size if until_eos else config.codebook_size]
            if not sampler.do_sample and config.code_choice == "expected":
                ids = self._nearest_to_expected(logits, 0)[:, None]
            else:
                ids = sampler(logits, uniform[:, step])[:, None]
            if until_eos and config.eos_token_id in (int(ids), int(logits.argmax(-1))):
                break
            codes.append(ids)
        if not codes:
            raise ValueError("the model chose to stop before the first frame: try another seed or another prompt")
        return torch.cat(codes, 1)

    def _generate_nar(
        self,
        midi_ids: torch.LongTensor,
        midi_attention_mask: torch.Tensor,
        prompt: torch.LongTensor,
        prompt_lengths: torch.LongTensor,
        first: torch.LongTensor,
        target_frames: torch.LongTensor,
        temperature: float,
        uniform: torch.Tensor,
    ) -> torch.LongTensor:
        """All codebooks of the target, `(B, K, T)`, from codebook 0 `first` `(B, T)`."""
        sampler = Sampler(temperature > 0, temperature or 1.0)
        T = first.shape[1]
        places = torch.arange(T, device=first.device)
        inside = places < target_frames[:, None]
        target = prompt.new_zeros(*prompt.shape[:2], T)
        target[:, 0] = first.masked_fill(~inside, 0)
        source = prompt_lengths[:, None] + places.minimum(target_frames[:, None] - 1)  # where a target frame stands
        for stage in range(1, target.shape[1]):
            codes, mask = join_codes(prompt, prompt_lengths, target, target_frames)
            logits = self.nar(codes, midi_ids, midi_attention_mask, mask, prompt_lengths, stage).logits
            logits = logits.gather(1, source[..., None].expand(-1, -1, logits.shape[-1]))
            if temperature == 0 and self.config.nar_config.code_choice == "expected":
                codes = self._nearest_to_expected(logits, stage)
            else:
                codes = sampler(logits, uniform[:, stage - 1])
            target[:, stage] = codes.masked_fill(~inside, 0)
        return target

    def _nearest_to_expected(self, logits: torch.Tensor, stage: int) -> torch.LongTensor:
        """
        The code nearest to the expected vector under `logits` `(..., codebook_size)`: `(...)`. Where many codes are
        about equally likely, the likeliest is a wild guess, and this one the least error to be expected.
        """
        if not torch.isfinite(logits).all():
            raise ValueError(f"codebook {stage}: the model gave NaN or infinite logits: its weights are broken")
        book = self.codec.quantizer.layers[stage].codebook.embed  # (codebook_size, D)
        expected = logits.float().softmax(-1) @ book
        return (2 * expected @ book.T - book.square().sum(-1)).argmax(-1)

    def _encode_prompt(
        self,
        input_ids: torch.LongTensor,
        input_values: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        prompt_codes: torch.LongTensor | None,
        prompt_lengths: torch.LongTensor | None,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Check the inputs; the prompt as codes `(B, K, P)` and frames `(B,)`, P = 0 without one."""
        check_midi_ids(input_ids, len(input_ids), self.config.ar_config.midi_vocab_sizes)
        B, K = len(input_ids), self.config.ar_config.num_codebooks
        if input_values is not None:
            if prompt_codes is not None:
                raise ValueError("give the prompt as input_values or as prompt_codes, not both")
            self._require_codec()
            prompt_codes = self.codec.encode_codes(input_values, padding_mask)
            samples = (
                torch.full((B,), input_values.shape[-1]) if padding_mask is None else padding_mask.reshape(B, -1).sum(1)
            )
            frames = -(-samples // self.config.hop_length)
            if prompt_lengths is not None and prompt_lengths.tolist() != frames.tolist():
                raise ValueError(
                    f"prompt_lengths {prompt_lengths.tolist()} are not the audio's frames {frames.tolist()}"
                )
            prompt_lengths = frames
        if prompt_codes is None:
            prompt_codes = input_ids.new_zeros(B, K, 0)
        if prompt_codes.ndim != 3 or prompt_codes.shape[:2] != (B, K):
            raise ValueError(f"prompt_codes must be ({B}, {K}, P), got {tuple(prompt_codes.shape)}")
        if (
            prompt_codes.numel()
            and not 0 <= int(prompt_codes.min()) <= int(prompt_codes.max()) < self.config.ar_config.codebook_size
        ):
            raise ValueError(f"prompt_codes must lie in [0, {self.config.ar_config.codebook_size})")
        if prompt_lengths is None:
            prompt_lengths = torch.full((B,), prompt_codes.shape[-1])
        prompt_lengths = prompt_lengths.to(input_ids.device)
        if (
            prompt_lengths.shape != (B,)
            or not 0 <= int(prompt_lengths.min()) <= int(prompt_lengths.max()) <= prompt_codes.shape[-1]
        ):
            raise ValueError(
                f"prompt_lengths must be {B} numbers from 0 to {prompt_codes.shape[-1]}, got {prompt_lengths.tolist()}"
            )
        if not self.config.ar_config.use_target_bos and int(prompt_lengths.min()) < 1:
            raise ValueError("this model needs a prompt of at least one frame in every row (it has no BOS frame)")
        return prompt_codes.to(input_ids.device), prompt_lengths

    def _check_target(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        prompt_lengths: torch.LongTensor,
        target_frames: int | torch.LongTensor | None,
    ) -> torch.LongTensor:
        """`target_frames` as `(B,)`; without it, up to the end of each row's last note."""
        B = len(input_ids)
        if target_frames is None:
            notes = read_notes(
                input_ids, torch.ones_like(input_ids[..., 0]) if attention_mask is None else attention_mask
            )
            ends = notes.end.masked_fill(~notes.valid, 0).amax(1)
            target_frames = (ends / UNITS_PER_FRAME).ceil().long() - prompt_lengths
        target_frames = torch.as_tensor(target_frames, device=input_ids.device)
        target_frames = target_frames.expand(B) if target_frames.ndim == 0 else target_frames
        if target_frames.shape != (B,) or int(target_frames.min()) < 1:
            raise ValueError(
                f"target_frames must be {B} positive numbers, got {target_frames.tolist()}; without target_frames the "
                "MIDI must hold notes after the prompt"
            )
        bars = self.config.ar_config.midi_vocab_sizes[5] - 4
        limit = bars * TICKS_PER_BAR * UNITS_PER_TICK // UNITS_PER_FRAME
        if (longest := int((prompt_lengths + target_frames).max())) > limit:
            raise ValueError(
                f"{longest} frames of prompt and target; one call holds at most {limit} ({limit / 50:g} s): shorten it"
            )
        return target_frames

    def _published_cap(self, compat: str, attention_mask: torch.Tensor) -> torch.LongTensor:
        """Most frames that the published program generates after the MIDI rows of `attention_mask` `(1, N)`: `(1,)`."""
        if compat != "published":
            raise ValueError(f'compat must be None or "published", got {compat!r}')
        if self.config.ar_config.use_target_bos or len(attention_mask) != 1:
            raise ValueError('compat="published" is for one row and for weights without a BOS frame (converted ones)')
        return PUBLISHED_FRAMES_PER_ROW * attention_mask.sum(1) + 1

    def _require_codec(self):
        if not self.config.has_codec:
            raise ValueError("this model was saved without a codec: use generate_codes, with prompt_codes")
