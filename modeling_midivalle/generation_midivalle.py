# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Generation: the AR's frames one by one, the NAR's codebooks one by one, audio; pieces of any length window by window.
The MIDI sets the length, not EOS, except with `compat="published"`, where the published program's own rules hold."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .configuration_midivalle import TICKS_PER_BAR, UNITS_PER_FRAME, UNITS_PER_TICK
from .decoding_midivalle_ar import FrameDecoder
from .dynamics_midivalle import LATE_DB_PER_S, KeyDynamics
from .modeling_midivalle_frame_notes import PlayedKeys, held_keys, read_notes, sounds_before, struck_keys
from .modeling_midivalle_layers import check_integers, check_midi_ids
from .recording_midivalle import RecordingChain, measure_recording
from .sampling_midivalle import (
    SAMPLING,
    Sampler,
    align_right,
    check_finite,
    check_flag,
    check_temperature,
    draw_seeds,
    draw_uniform,
    join_codes,
    last_frames,
    length_mask,
    pad_codes,
    read_numbers,
    refuse_options,
    window_seed,
)
from .streaming_piano_encodec import CodecStream

PUBLISHED_FRAMES_PER_ROW = 16


@dataclass
class MidiValleGenerateOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.Tensor` of shape `(B, 1, L)`): audio at `config.sampling_rate`, 0 after a piece's end.
        audio_codes (`torch.LongTensor` of shape `(B, K, T)`): codes of the target alone, 0 after a piece's end.
        target_frames (`torch.LongTensor` of shape `(B,)`): frames of each piece.
    """

    audio_values: torch.Tensor | None = None
    audio_codes: torch.LongTensor | None = None
    target_frames: torch.LongTensor | None = None


class GeneratedFrames(NamedTuple):
    """
    Args:
        codes (`torch.LongTensor` of shape `(B, K, T)`): the chosen codes.
        vectors (`torch.Tensor` of shape `(B, A, T)`, float16, *optional*): with `config.mean_vectors`, what the codec
            decodes: the mean of the code vectors, without the axes of keys where the MIDI tells these.
    """

    codes: torch.LongTensor
    vectors: torch.Tensor | None

    def cut(self, row: int, begin: int, end: int) -> "GeneratedFrames":
        """Frames `begin` to `end` of one row."""
        return GeneratedFrames(*(None if x is None else x[row : row + 1, :, begin:end] for x in self))


class MidiValleGenerationMixin(GenerationMixin):
    """`generate`, `generate_stream` and `generate_codes` of [`MidiValleForConditionalGeneration`]."""

    @torch.no_grad()
    def generate(self, input_ids: torch.LongTensor, *, return_dict_in_generate: bool = False, **inputs):
        r"""
        Render MIDI on the piano and in the room of a prompt: all chunks of [`generate_stream`], of several pieces too.

        Args:
            input_ids (`torch.LongTensor` of shape `(W, N, 6)`): MIDI rows of the windows of all pieces.
            return_dict_in_generate (`bool`, *optional*): also return the codes and lengths.
            inputs: all other arguments of [`generate_stream`].
        Returns:
            `torch.Tensor` of shape `(B, 1, hop_length * T)`, float32, T the longest piece's frames and 0 after a
            piece's end; or [`MidiValleGenerateOutput`].
        """
        codes, audio = {}, {}
        for piece, new_codes, new_audio in self._stream(input_ids, **inputs):
            codes.setdefault(piece, []).append(new_codes[0].T)
            audio.setdefault(piece, []).append(new_audio[0, 0])
        codes = [torch.cat(codes[piece]) for piece in sorted(codes)]
        audio_values = torch.nn.utils.rnn.pad_sequence([torch.cat(audio[piece]) for piece in sorted(audio)], True)
        if not return_dict_in_generate:
            return audio_values[:, None]
        return MidiValleGenerateOutput(
            audio_values=audio_values[:, None],
            audio_codes=torch.nn.utils.rnn.pad_sequence(codes, True).transpose(1, 2),
            target_frames=torch.tensor([len(c) for c in codes], device=input_ids.device),
        )

    def generate_stream(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        prompt_codes: torch.LongTensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        target_frames: int | torch.LongTensor | None = None,
        context_frames: torch.LongTensor | None = None,
        window_counts: torch.LongTensor | None = None,
        mean_velocities: torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        as_recorded: bool | None = None,
        **sampling,
    ) -> Iterator[torch.Tensor]:
        r"""
        Render one piece, and give its audio while the rest is still to be generated.

        A piece is one window of MIDI rows, or several in a row. Each is generated after the prompt and after the last
        `context_frames` of what was generated before it; its rows hold the notes of prompt, context and new frames.

        Args:
            input_ids (`torch.LongTensor` of shape `(W, N, 6)`): MIDI rows of each window on its own time axis.
            attention_mask (`torch.Tensor` of shape `(W, N)`, *optional*): 0 on padded rows, either side.
            input_values (`torch.Tensor` of shape `(B, 1, L)`, *optional*): the prompt's audio, `config.sampling_rate`.
            padding_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 on padding, on the right.
            prompt_codes (`torch.LongTensor` of shape `(B, K, P)`, *optional*): the prompt, already encoded, padded on
                the right; instead of `input_values`.
            prompt_lengths (`torch.LongTensor` of shape `(B,)`, *optional*): frames of each row of `prompt_codes`.
            target_frames (`int` or `torch.LongTensor` of shape `(W,)`, *optional*): new frames (50 a second) of each
                window; up to the end of the last note if not given.
            context_frames (`torch.LongTensor` of shape `(W,)`, *optional*): frames before them that are given again; 0
                if not given. At most what the piece has.
            window_counts (`torch.LongTensor` of shape `(B,)`, *optional*): windows of each piece, B = 1 for a stream;
                one each if not given.
            mean_velocities (`torch.Tensor` of shape `(B,)`, *optional*): of all notes of each piece, over 127, for
                `config.velocity_gain_db`; 0.5 if not given.
            seed (`int` or `list[int]`, *optional*): of each piece. Window number w draws from (seed, w) alone: the
                same audio alone or in any batch.
            as_recorded (`bool`, *optional*): give the audio the colour and the noise of the recording `input_values`;
                the codes are the same. `config.as_recorded` if not given; a prompt that is given as codes has none.
            sampling: `do_sample`, `temperature`, `top_k`, `top_p`, `nar_temperature` and `compat` of
                [`generate_codes`].
        Yields:
            `torch.Tensor` of shape `(1, 1, samples)`, float32: the next audio; together exactly that of `generate`.
        """
        if (len(input_ids) if window_counts is None else len(window_counts)) != 1:
            raise ValueError("a stream is of one piece; generate takes several")
        inputs = {"input_values": input_values, "padding_mask": padding_mask}
        inputs |= {"prompt_codes": prompt_codes, "prompt_lengths": prompt_lengths, "target_frames": target_frames}
        inputs |= {"context_frames": context_frames, "window_counts": window_counts, "seed": seed}
        inputs |= {"mean_velocities": mean_velocities, "as_recorded": as_recorded}
        for _, _, audio in self._stream(input_ids, attention_mask, **inputs, **sampling):
            yield audio

    @torch.no_grad()
    def colour_gains(self) -> list[float] | None:
        """`config.colour_gains_db`, ten numbers of dB, and what an adapter that is played adds to them."""
        gains, layer = self.config.colour_gains_db, getattr(self, "colour", None)
        if gains is None or layer is None:
            return gains
        one = torch.ones(1, dtype=layer.weight.dtype, device="cpu" if layer.weight.is_meta else layer.weight.device)
        return [gain + more for gain, more in zip(gains, layer(one).tolist(), strict=True)]

    @torch.no_grad()
    def measure_prompt(
        self, recorded: torch.Tensor, prompt_codes: torch.LongTensor, keys: PlayedKeys | None = None
    ) -> RecordingChain:
        """What tells the recording of a prompt, `recorded` `(samples,)`, from the codec's version of it, `prompt_codes`
        `(1, K, P)`; for [`CodecStream`]. That version is made as what follows will be: told which `keys` are struck
        `(1, P, 88)`, and with what they lack in loudness; of None, or where none is, from the codes alone."""
        dynamics = None
        if keys is None or not keys.struck.any():
            keys = None
        else:
            dynamics = self.key_dynamics(keys.struck[keys.struck > 0].mean()[None], 1, generated=False)[0]
        made = CodecStream(self.codec, dynamics=dynamics).push(prompt_codes, True, keys)[0, 0]
        return measure_recording(recorded.to(made), made, self.codec.config.sampling_rate, self.colour_gains())

    @torch.no_grad()
    def _stream(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        prompt_codes: torch.LongTensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        target_frames: int | torch.LongTensor | None = None,
        context_frames: torch.LongTensor | None = None,
        window_counts: torch.LongTensor | None = None,
        mean_velocities: torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        as_recorded: bool | None = None,
        **sampling,
    ) -> Iterator[tuple[int, torch.LongTensor, torch.Tensor]]:
        """Window after window, of all pieces side by side: (piece, new codes `(1, K, T)`, new audio `(1, 1, l)`)."""
        self._require_codec()
        refuse_options(name for name in sampling if name not in SAMPLING)
        counts, context_frames = self._check_windows(len(input_ids), window_counts, context_frames)
        piece_of = [b for b, count in enumerate(counts) for _ in range(count)]
        prompt_codes, prompt_lengths = self._encode_prompt(
            len(counts), input_ids, input_values, padding_mask, prompt_codes, prompt_lengths
        )
        attention_mask = self._check_mask(input_ids, attention_mask)
        if sampling.get("compat") is not None:
            if max(counts) > 1 or context_frames.any():
                raise ValueError(
                    f"compat={sampling['compat']!r} makes a piece in one window, without context: give the inputs of "
                    "processor.window_inputs(performance, 0.0, end, prompt)"
                )
            target_frames = None  # the model sets the length
        else:
            known = prompt_lengths[piece_of] + context_frames.to(input_ids.device)
            target_frames = self._check_target(input_ids, attention_mask, known, target_frames)
        seeds, keep = draw_seeds(seed, len(counts)), int(context_frames.max())
        begins = [sum(counts[:b]) for b in range(len(counts))]  # each piece's first window
        check_flag("as_recorded", as_recorded)
        if not (self.config.as_recorded if as_recorded is None else as_recorded):
            input_values = None
        first = input_ids[begins], attention_mask[begins]
        streams = self._codec_streams(*first, input_values, prompt_codes, prompt_lengths, mean_velocities)
        history = [prompt_codes[:1, :, :0] for _ in counts]
        for w in range(max(counts)):
            pieces = [b for b, count in enumerate(counts) if w < count]
            rows = [begins[b] + w for b in pieces]
            mask = attention_mask[rows]
            used = mask.any(0)  # padding for the sake of other windows would only change the rounding
            frames = self.generate_frames(
                input_ids[rows][:, used],
                mask[:, used],
                prompt_codes[pieces],
                prompt_lengths[pieces],
                None if target_frames is None else target_frames[rows],
                *pad_codes([last_frames(history[b], int(context_frames[row])) for b, row in zip(pieces, rows)]),
                seed=[window_seed(seeds[b], w) for b in pieces],
                **sampling,
            )
            known = prompt_lengths[pieces] + context_frames[rows].to(prompt_lengths.device)
            longest = frames.codes.shape[-1]
            played = self.played_keys(input_ids[rows], mask, known, longest)
            for i, (b, row) in enumerate(zip(pieces, rows)):
                new, vectors = frames.cut(i, 0, longest if target_frames is None else int(target_frames[row]))
                known_codes = torch.cat([history[b], new], -1)
                history[b] = known_codes[..., max(known_codes.shape[-1] - keep, 0) :]
                keys = None if played is None else played.cut(i, 0, new.shape[-1])
                yield b, new, streams[b].push(new, w == counts[b] - 1, keys, vectors)

    def _codec_streams(
        self, input_ids, attention_mask, recorded, prompt_codes, prompt_lengths, mean_velocities
    ) -> list[CodecStream]:
        """A stream for each piece, of its first window and its prompt; `recorded` `(B, 1, L)` are prompts whose colour
        and noise it is to have, or None."""
        recordings = [None] * len(input_ids)
        if recorded is not None:
            played = self.played_keys(
                input_ids, attention_mask, torch.zeros_like(prompt_lengths), prompt_codes.shape[-1]
            )
            for b, P in enumerate(prompt_lengths.tolist()):
                keys = None if played is None else played.cut(b, 0, P)
                recordings[b] = self.measure_prompt(recorded[b, 0], prompt_codes[b : b + 1, :, :P], keys)
        silent = self.begins_silent(input_ids, attention_mask, prompt_lengths)
        dynamics = self.key_dynamics(mean_velocities, len(input_ids))
        return [CodecStream(self.codec, *of_piece) for of_piece in zip(recordings, silent, dynamics, strict=True)]

    def played_keys(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, first: torch.LongTensor, frames: int
    ) -> PlayedKeys | None:
        """What the codec's decoder is told of the notes beside the codes: what the keys do in `frames` from frame
        `first` `(B,)` of the windows `input_ids` on; None unless `config.keys_from_midi`."""
        if not self.config.keys_from_midi:
            return None
        given = input_ids, attention_mask, first.to(input_ids.device), frames
        return PlayedKeys(struck_keys(*given), held_keys(*given))

    def key_dynamics(
        self, mean_velocities: torch.Tensor | None, pieces: int, generated: bool = True
    ) -> list[KeyDynamics | None]:
        """What single keys of each of some `pieces` lack in loudness, for [`CodecStream`], where their codes are
        `generated` or a recording's; None without `config.velocity_gain_db`. `mean_velocities` `(pieces,)` as in
        [`generate_stream`]."""
        means = (
            torch.full((pieces,), 0.5) if mean_velocities is None else read_numbers("mean_velocities", mean_velocities)
        )
        if means.shape != (pieces,) or not ((means >= 0) & (means <= 1)).all():
            raise ValueError(
                f"mean_velocities must be numbers from 0 to 1, one for each piece ({pieces}), got {means.tolist()}"
            )
        if not (self.config.velocity_gain_db and self.config.keys_from_midi):
            return [None] * pieces
        given = self.config.codec_config.num_oscillators, self.config.frame_rate
        more = self.config.treble_gain_db, self.config.octave_gain_db, self.config.attack_gain_db
        more += (self.config.sustain_gain_db, LATE_DB_PER_S if generated else 0.0)
        return [KeyDynamics(self.config.velocity_gain_db, mean, *given, *more) for mean in means.tolist()]

    def begins_silent(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, first: torch.LongTensor
    ) -> list[bool]:
        """Whether nothing sounds at frame `first` `(B,)` of the windows `input_ids` until a key is struck, for
        [`CodecStream`]; False unless `config.keys_from_midi`, for then the keys are not known."""
        if not self.config.keys_from_midi:
            return [False] * len(input_ids)
        return (~sounds_before(input_ids, attention_mask, first.to(input_ids.device))).tolist()

    def generate_codes(self, *args, **kwargs) -> torch.LongTensor:
        """The codes alone `(B, K, T)` of [`generate_frames`], which takes the same."""
        return self.generate_frames(*args, **kwargs).codes

    @torch.no_grad()
    def generate_frames(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        prompt_codes: torch.LongTensor | None = None,
        prompt_lengths: torch.LongTensor | None = None,
        target_frames: int | torch.LongTensor | None = None,
        context_codes: torch.LongTensor | None = None,
        context_lengths: torch.LongTensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        nar_temperature: float | None = None,
        seed: int | list[int] | None = None,
        compat: Literal["published"] | None = None,
        **unknown,
    ) -> GeneratedFrames:
        r"""
        The codes of one window in each row, without audio, and what the codec is to make of them.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N, 6)`): MIDI rows of prompt, context and new frames on one
                time axis.
            attention_mask, prompt_codes, prompt_lengths, target_frames: as in [`generate_stream`].
            context_codes (`torch.LongTensor` of shape `(B, K, C)`, *optional*): what was generated just before, padded
                on the right.
            context_lengths (`torch.LongTensor` of shape `(B,)`, *optional*): frames of each row of it; C if not given.
            do_sample, temperature, top_k, top_p (*optional*): for codebook 0; from `generation_config` if not given.
                A temperature, a top_k above 0 or a top_p below 1 is enough to sample.
            nar_temperature (`float`, *optional*): above 0, the other codebooks are sampled too.
            seed (`int` or `list[int]`, *optional*): same seed, same codes, alone or in any batch.
            compat (`str`, *optional*): `"published"` generates one row by the published program's rules: every code may
                be drawn at temperature 1 unless told otherwise; it ends where EOS is the likeliest or the drawn id, or
                after 16 frames per MIDI row and one; `target_frames` is not read.
        Returns:
            [`GeneratedFrames`]: the new frames; codes are 0 after a row's end.
        """
        refuse_options(unknown)
        nar_temperature = 0.0 if nar_temperature is None else nar_temperature
        check_temperature("nar_temperature", nar_temperature)
        B = len(input_ids)
        prompt_codes, prompt_lengths = self._encode_prompt(B, input_ids, None, None, prompt_codes, prompt_lengths)
        context_codes, context_lengths = self._check_codes("context", B, input_ids, context_codes, context_lengths)
        attention_mask = self._check_mask(input_ids, attention_mask)
        if compat is None:
            defaults = self.generation_config
            known = prompt_lengths + context_lengths
            target_frames = self._check_target(input_ids, attention_mask, known, target_frames)
        else:
            defaults, target_frames = Sampler(do_sample=True), self._published_cap(compat, attention_mask)
        if do_sample is None:
            narrowed = top_k not in (None, 0) or top_p not in (None, 1)
            do_sample = defaults.do_sample or temperature is not None or narrowed
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        given = {k: getattr(defaults, k) if v is None else v for k, v in given.items()}
        sampler = Sampler(do_sample, **{k: v for k, v in given.items() if v is not None})
        width = int(target_frames.max())
        uniform = draw_uniform(target_frames, self.config.ar_config.num_codebooks, seed, width).to(input_ids.device)
        midi, prompt = (input_ids, attention_mask), (prompt_codes, prompt_lengths)
        context = (context_codes, context_lengths)
        first = self._generate_ar(midi, prompt, context, width, sampler, uniform[:, 0], bool(compat))
        target_frames = target_frames.clamp(max=first.codes.shape[1])
        return self._generate_nar(midi, prompt, context, first, target_frames, nar_temperature, uniform[:, 1:])

    def _generate_ar(
        self,
        midi: tuple[torch.LongTensor, torch.Tensor],
        prompt: tuple[torch.LongTensor, torch.LongTensor],
        context: tuple[torch.LongTensor, torch.LongTensor],
        frames: int,
        sampler: Sampler,
        uniform: torch.Tensor,
        until_eos: bool,
    ) -> GeneratedFrames:
        """
        Codebook 0 of the new frames, `(B, frames)`, one cached step per frame; EOS and BOS cannot be chosen.
        `until_eos` (one row): EOS can, and ends it. `midi` with its mask, `prompt` and `context` with their lengths.
        Vectors, `(B, frames, A)` here, are means in codebook 0.
        """
        config = self.config.ar_config
        parts = [(codes[:, 0], length_mask(lengths, codes.shape[-1])) for codes, lengths in (prompt, context)]
        if config.use_target_bos:
            bos = prompt[0].new_full((len(prompt[0]), 1), config.bos_token_id)
            parts.insert(1, (bos, torch.ones_like(bos)))
        ids, mask = align_right(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))
        choose, size = sampler, config.vocab_size if until_eos else config.codebook_size
        if not (sampler.do_sample or until_eos) and config.code_choice == "expected":
            choose = self._expected_choice(0)
        decoder = FrameDecoder(self.ar, ids, mask, midi, prompt[1], frames)
        means = bool(self.num_vector_axes) and not until_eos
        codes = decoder.decode(choose, uniform, size, config.eos_token_id if until_eos else None, means)
        if not codes.shape[1]:
            raise ValueError("the model chose to stop before the first frame: try another seed or another prompt")
        return GeneratedFrames(codes, self._mean_vectors(0, decoder.kept) if means else None)

    def _generate_nar(
        self,
        midi: tuple[torch.LongTensor, torch.Tensor],
        prompt: tuple[torch.LongTensor, torch.LongTensor],
        context: tuple[torch.LongTensor, torch.LongTensor],
        begun: GeneratedFrames,
        target_frames: torch.LongTensor,
        temperature: float,
        uniform: torch.Tensor,
    ) -> GeneratedFrames:
        """
        All codebooks of the new frames, `(B, K, T)`, from what `_generate_ar` has `begun`. Context and new frames
        together are the target that the NAR knows from training; what it predicts for the context is not used.
        """
        first, vectors = begun
        sampler = Sampler(bool(temperature), temperature or 1.0)
        T = first.shape[1]
        places = torch.arange(T, device=first.device)
        inside = places < target_frames[:, None]
        target = first.new_zeros(len(first), self.config.nar_config.num_codebooks, T)
        target[:, 0] = first.masked_fill(~inside, 0)
        given, shared = prompt[1] + context[1], None
        begin = int(given.min())  # no new frame stands before
        source = (given - begin)[:, None] + places.minimum(target_frames[:, None] - 1)  # where a new frame stands
        for stage in range(1, target.shape[1]):
            known, _ = join_codes(*context, target, target_frames)
            codes, mask = join_codes(*prompt, known, context[1] + target_frames)
            if shared is None:
                shared = self.nar.share_inputs(codes, *midi, mask, prompt[1])
            kept = codes.shape[-1] - begin
            logits = self.nar(codes, *midi, mask, prompt[1], stage, logits_to_keep=kept, shared=shared).logits
            logits = logits.gather(1, source[..., None].expand(-1, -1, logits.shape[-1]))
            check_finite(logits)
            if vectors is not None:
                vectors = vectors + self._mean_vectors(stage, logits)
            expected = temperature == 0 and self.config.nar_config.code_choice == "expected"
            codes = (self._expected_choice(stage) if expected else sampler)(logits, uniform[:, stage - 1])
            target[:, stage] = codes.masked_fill(~inside, 0)
        return GeneratedFrames(target, None if vectors is None else vectors.transpose(1, 2).half())

    @property
    def num_vector_axes(self) -> int:
        """A of [`GeneratedFrames`]; 0 without vectors."""
        if not (self.config.mean_vectors and self.config.has_codec):
            return 0
        codec = self.config.codec_config
        return codec.codebook_dim - (codec.num_key_axes if self.config.keys_from_midi else 0)

    def _mean_vectors(self, stage: int, logits: torch.Tensor) -> torch.Tensor:
        """The expected vectors `(..., A)` of codebook `stage` under logits `(..., codebook_size)`: the least error in
        the mean, where one code or another is chosen by a hair."""
        book = self.codec.quantizer.layers[stage].codebook.embed
        return logits.float().softmax(-1) @ book[:, : self.num_vector_axes].float()

    def _expected_choice(self, stage: int) -> Callable:
        """
        A choice of the codes nearest to the expected vectors under logits `(..., codebook_size)`. Where many codes are
        about equally likely, the likeliest is a wild guess, and this one the least error to be expected.
        """
        book = self.codec.quantizer.layers[stage].codebook.embed.float()  # (codebook_size, D)
        squares = book.square().sum(-1)
        return lambda logits, uniform: (2 * (logits.float().softmax(-1) @ book) @ book.T - squares).argmax(-1)

    def _encode_prompt(
        self,
        B: int,
        input_ids: torch.LongTensor,
        input_values: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        prompt_codes: torch.LongTensor | None,
        prompt_lengths: torch.LongTensor | None,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Check the inputs; the prompts of B pieces as codes `(B, K, P)` and frames `(B,)`, P = 0 without one."""
        check_midi_ids(input_ids, len(input_ids), self.config.ar_config.midi_vocab_sizes)
        if input_values is not None:
            if prompt_codes is not None:
                raise ValueError("give the prompt as input_values or as prompt_codes, not both")
            self._require_codec()
            prompt_codes = self.codec.encode_codes(input_values, padding_mask)
            rows, samples = len(input_values), input_values.shape[-1]
            samples = torch.full((rows,), samples) if padding_mask is None else padding_mask.reshape(rows, -1).sum(1)
            frames = -(-samples // self.config.hop_length)
            if prompt_lengths is not None:
                check_integers("prompt_lengths", prompt_lengths)
            if prompt_lengths is not None and prompt_lengths.tolist() != frames.tolist():
                raise ValueError(
                    f"prompt_lengths {prompt_lengths.tolist()} are not the audio's frames {frames.tolist()}"
                )
            prompt_lengths = frames
        prompt_codes, prompt_lengths = self._check_codes("prompt", B, input_ids, prompt_codes, prompt_lengths)
        if not self.config.ar_config.use_target_bos and int(prompt_lengths.min()) < 1:
            raise ValueError("this model needs a prompt of at least one frame in every row (it has no BOS frame)")
        return prompt_codes, prompt_lengths

    def _check_codes(
        self,
        what: str,
        B: int,
        input_ids: torch.LongTensor,
        codes: torch.LongTensor | None,
        lengths: torch.LongTensor | None,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Check `codes` `(B, K, T)` and `lengths` `(B,)` that are given to go on from; T = 0 for None."""
        K, size = self.config.ar_config.num_codebooks, self.config.ar_config.codebook_size
        if codes is None:
            codes = input_ids.new_zeros(B, K, 0)
        check_integers(f"{what}_codes", codes)
        if codes.ndim != 3 or codes.shape[:2] != (B, K):
            raise ValueError(f"{what}_codes must be ({B}, {K}, P), got {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(f"{what}_codes must lie in [0, {size})")
        lengths = torch.full((B,), codes.shape[-1]) if lengths is None else lengths
        check_integers(f"{what}_lengths", lengths)
        if lengths.shape != (B,) or not 0 <= int(lengths.min()) <= int(lengths.max()) <= codes.shape[-1]:
            raise ValueError(
                f"{what}_lengths must be numbers from 0 to {codes.shape[-1]}, one for each row ({B}), got "
                f"{lengths.tolist()}"
            )
        return codes.to(input_ids.device), lengths.to(input_ids.device)

    def _check_mask(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`attention_mask` `(W, N)` of the checked `input_ids`; ones for None."""
        if attention_mask is None:
            return torch.ones_like(input_ids[..., 0])
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
        if attention_mask.shape != input_ids.shape[:2]:
            raise ValueError(f"attention_mask must be {tuple(input_ids.shape[:2])}, got {tuple(attention_mask.shape)}")
        return attention_mask

    def _check_windows(
        self, W: int, window_counts: torch.LongTensor | None, context_frames: torch.LongTensor | None
    ) -> tuple[list[int], torch.LongTensor]:
        """Windows of each piece, and the context frames `(W,)`."""
        window_counts = torch.ones(W, dtype=torch.long) if window_counts is None else window_counts
        check_integers("window_counts", window_counts)
        counts = window_counts.tolist()
        if not counts or min(counts) < 1 or sum(counts) != W:
            raise ValueError(f"window_counts {counts} must be positive and sum up to the windows of input_ids ({W})")
        context_frames = torch.zeros(W, dtype=torch.long) if context_frames is None else context_frames
        check_integers("context_frames", context_frames)
        if context_frames.shape != (W,) or int(context_frames.min()) < 0:
            raise ValueError(
                f"context_frames must be numbers from 0, one for each window ({W}), got {context_frames.tolist()}"
            )
        return counts, context_frames

    def _check_target(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        known: torch.LongTensor,
        target_frames: int | torch.LongTensor | None,
    ) -> torch.LongTensor:
        """`target_frames` after the `known` frames `(B,)`; without them, up to the end of each row's last note."""
        B = len(input_ids)
        if target_frames is None:
            notes = read_notes(input_ids, attention_mask)
            ends = notes.end.masked_fill(~notes.valid, 0).amax(1)
            target_frames = (ends / UNITS_PER_FRAME).ceil().long() - known
        target_frames = read_numbers("target_frames", target_frames, input_ids.device)
        if target_frames.is_floating_point() or target_frames.dtype == torch.bool:
            raise ValueError(f"target_frames must be whole numbers, got {target_frames.tolist()}")
        target_frames = target_frames.expand(B) if target_frames.ndim == 0 else target_frames
        if target_frames.shape != (B,) or int(target_frames.min()) < 1:
            raise ValueError(
                f"target_frames must be positive numbers, one for each row ({B}), got {target_frames.tolist()}; "
                "without target_frames the MIDI must hold notes after the prompt"
            )
        bars = self.config.ar_config.midi_vocab_sizes[5] - 4
        limit = bars * TICKS_PER_BAR * UNITS_PER_TICK // UNITS_PER_FRAME
        if (longest := int((known + target_frames).max())) > limit:
            raise ValueError(
                f"{longest} frames of prompt, context and target; one window holds at most {limit} ({limit / 50:g} s): "
                "shorten it"
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
