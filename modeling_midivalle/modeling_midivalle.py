# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""MIDI-VALLE whole: codec, AR and NAR in one model. `generate` is in generation_midivalle.py."""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_midivalle import COLOURS, MidiValleConfig
from .generation_midivalle import MidiValleGenerationMixin
from .modeling_midivalle_ar import MidiValleARModel
from .modeling_midivalle_layers import check_codes, check_integers, check_prompt_lengths
from .modeling_midivalle_nar import MidiValleNARModel
from .modeling_piano_encodec import PianoEncodecModel
from .quantization_midivalle import refuse_adapters


@dataclass
class MidiValleOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`): mean of the two losses.
        ar_loss, nar_loss (`torch.Tensor`): of codebook 0, and of each row's stage.
        ar_logits (`torch.Tensor` of shape `(B, T + 1, vocab_size)`): aligned with the AR's input (BOS inside).
        nar_logits (`torch.Tensor` of shape `(B, T, codebook_size)`): of each row's stage.
    """

    loss: torch.Tensor | None = None
    ar_loss: torch.Tensor | None = None
    nar_loss: torch.Tensor | None = None
    ar_logits: torch.Tensor | None = None
    nar_logits: torch.Tensor | None = None


class MidiValleForConditionalGeneration(PreTrainedModel, MidiValleGenerationMixin):
    """
    Renders a MIDI performance on the piano and in the room of a short audio prompt.

    Example:

    ```python
    >>> inputs = processor(midi="piece.mid", prompt_midi="prompt.mid", prompt_audio=wave, sampling_rate=44100)
    >>> audio_values = model.generate(**inputs, seed=0)  # (1, 1, 640 * frames), 32 kHz
    ```"""

    config: MidiValleConfig
    _auto_class = "AutoModel"
    # Not "": transformers 5.23 would then drop the first letter of a key when that gives another key, nar.* -> ar.*
    base_model_prefix = "midivalle"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MidiValleBlock", "PianoEncodecModel"]
    _keep_in_fp32_modules_strict = ["codec", "colour"]
    _keys_to_ignore_on_load_missing = [r"colour\.weight", r"codebook\.embed_avg"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MidiValleConfig):
        super().__init__(config)
        if config.has_codec:
            self.codec = PianoEncodecModel(config.codec_config)
        self.ar = MidiValleARModel(config.ar_config)
        self.nar = MidiValleNARModel(config.nar_config)
        if config.colour_gains_db is not None:  # zero: what an adapter adds to them is its share of this layer
            self.colour = torch.nn.Linear(1, COLOURS, bias=False, dtype=torch.float32)
        if config.share_midi_embeddings:
            self._tied_weights_keys = {
                f"nar.embeddings.midi_tables.{i}.weight": f"ar.model.embeddings.midi_tables.{i}.weight"
                for i in range(len(config.ar_config.midi_vocab_sizes))
            }
        self.generation_config = GenerationConfig(do_sample=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if module is getattr(self, "colour", None):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoders; the codec keeps at least float32."""
        return self.ar.dtype

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.ar.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Embedding):
        self.ar.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        """Refused: both vocabularies are fixed, that of MIDI rows and that of the codec's codes."""
        raise ValueError("MIDI-VALLE's vocabularies are fixed by its MIDI fields and its codec: none can be resized")

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The MIDI tables are governed by `share_midi_embeddings`; the heads, by each decoder's own configuration."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys or {})

    @classmethod
    def from_sub_models(
        cls, codec: PianoEncodecModel, ar: MidiValleARModel, nar: MidiValleNARModel, **playing
    ) -> "MidiValleForConditionalGeneration":
        """
        Put trained parts together (each from its own `from_pretrained`); weights are copied, tables are not shared.
        How they play together (`playing`: `keys_from_midi`, `mean_vectors`, ...) is the whole's: [`MidiValleConfig`].

        Raises:
            StrictDataclassError (of huggingface_hub): the parts' codebooks or MIDI vocabularies differ, or they cannot
                play so.
        """
        config = MidiValleConfig(
            codec_config=codec.config.to_dict(),
            ar_config=ar.config.to_dict(),
            nar_config=nar.config.to_dict(),
            **playing,
        )
        model = cls(config)
        for name, part in (("codec", codec), ("ar", ar), ("nar", nar)):
            getattr(model, name).load_state_dict(part.state_dict())
        return model.eval()

    def quantize_(self, dtype: Literal["int8"] = "int8") -> None:
        """Both decoders to `dtype`, in place, as [`MidiValleARModel.quantize_`] does it; the codec stays as it is."""
        refuse_adapters(self)  # both or none
        self.ar.quantize_(dtype)
        self.nar.quantize_(dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        audio_codes: torch.LongTensor,
        prompt_lengths: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        audio_attention_mask: torch.Tensor | None = None,
        stage: int | torch.LongTensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> MidiValleOutput:
        r"""
        The training losses of both decoders.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N, 6)`): MIDI rows of prompt and target on one time axis.
            audio_codes (`torch.LongTensor` of shape `(B, K, T)`): frames of prompt and target, padded on the right.
            prompt_lengths (`torch.LongTensor` of shape `(B,)`): prompt frames of each row.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 0 on padded MIDI rows.
            audio_attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padded frames.
            stage (`int` or `torch.LongTensor` of shape `(B,)`, *optional*): NAR stages; drawn if not given.
            return_loss (`bool`): of no effect, there is always a loss: by this name `Trainer` knows it.
        Raises:
            ValueError: codes, masks or lengths of other shapes; rows, codes or stages out of range; a prompt behind
                which no frame of its row is left.
        """
        for name, value in (("audio_codes", audio_codes), ("prompt_lengths", prompt_lengths)):
            check_integers(name, value)
        B, T = len(input_ids), audio_codes.shape[-1]
        wanted = {
            "audio_codes": (audio_codes, (B, self.config.ar_config.num_codebooks, T)),
            "prompt_lengths": (prompt_lengths, (B,)),
            "attention_mask": (attention_mask, input_ids.shape[:2]),
            "audio_attention_mask": (audio_attention_mask, (B, T)),
        }
        for name, (value, shape) in wanted.items():
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(value.shape)}")
        if audio_attention_mask is None:
            audio_attention_mask = torch.ones_like(audio_codes[:, 0])
        attended = audio_attention_mask.bool()
        check_codes("audio_codes", audio_codes, self.config.ar_config.codebook_size, attended[:, None])
        check_prompt_lengths(prompt_lengths, attended.sum(1))
        if stage is None:
            stage = self.nar.draw_stages(len(audio_codes)).to(audio_codes.device)
        ar = self.ar(
            midi_ids=input_ids,
            midi_attention_mask=attention_mask,
            prompt_lengths=prompt_lengths,
            use_cache=False,
            **self.ar.build_inputs(audio_codes[:, 0], audio_attention_mask, prompt_lengths),
            **kwargs,
        )
        nar = self.nar(
            audio_codes,
            input_ids,
            attention_mask,
            audio_attention_mask,
            prompt_lengths,
            stage,
            labels=audio_codes,
            **kwargs,
        )
        return MidiValleOutput(
            loss=(ar.loss + nar.loss) / 2,
            ar_loss=ar.loss,
            nar_loss=nar.loss,
            ar_logits=ar.logits,
            nar_logits=nar.logits,
        )


__all__ = ["MidiValleForConditionalGeneration"]
