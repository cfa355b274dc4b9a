# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Configurations of MIDI-VALLE: the AR decoder, the NAR decoder, and the whole model with its codec."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_piano_encodec import PianoEncodecConfig  # isort: skip (says so if transformers is too old)
from transformers import PreTrainedConfig

# One physical time axis in integers: a MIDI tick is 1/192 s, a codec frame 1/50 s; 1/4800 s is their common unit.
UNITS_PER_SECOND = 4800
UNITS_PER_TICK = 25
UNITS_PER_FRAME = 96
TICKS_PER_BAR = 384
COLOURS = 10  # parts of the range of frequencies in `colour_gains_db`
SPECIAL_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")  # of the AR, behind the codes
MIDI_FIELDS = ("pitch", "velocity", "duration", "ioi", "position", "bar")

PUBLISHED_WIDTHS = (32, 32, 256, 128, 64, 32)
SIZES = {
    "tiny": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "midi_embedding_sizes": (4, 4, 8, 4, 4, 4),
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "midi_embedding_dropout": 0.0,
    },
    "starter": {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "midi_embedding_sizes": (32, 16, 32, 32, 32, 16),
        "dropout": 0.0,  # hardly an example is seen twice, and drawing masks costs a tenth of a CPU step
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "midi_embedding_dropout": 0.0,
        "tie_word_embeddings": False,  # tied, the easiest thing to learn is to repeat the code before
        "prompt_summary_size": 96,
        "frame_note_decays": (0.5, 4.0),
    },
    "base": {"midi_embedding_sizes": PUBLISHED_WIDTHS},
    # The published model number by number (arXiv 2507.08530 and its code), oddities included.
    "published": {
        "midi_embedding_sizes": PUBLISHED_WIDTHS,
        "hidden_act": "relu",
        "position_embedding_type": "sinusoidal",
        "use_segment_embeddings": False,
        "use_frame_notes": False,
        "objective": "published_sum",
    },
}
# 40 axes of spectra and 88 of keys; most layers at low rates, where a CPU is fast
STARTER_CODEC = {
    "num_filters": 16,
    "hidden_size": 128,
    "num_key_axes": 88,
    "num_oscillators": 84,
    "num_lstm_layers": 4,
    "last_kernel_size": 13,
}
STARTER_CODEC |= {"upsampling_ratios": (5, 4, 4, 8)}


@strict
class MidiValleDecoderConfig(PreTrainedConfig):
    r"""
    What the AR and the NAR decoder have in common. Not used alone.

    Args:
        hidden_size (`int`, defaults to 1024): width of the stack.
        num_hidden_layers (`int`, defaults to 12): pre-norm blocks.
        num_attention_heads (`int`, defaults to 16): attention heads; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 4096): width of the feed-forward layer.
        hidden_act (`str`, defaults to `"gelu"`): its activation (published: `"relu"`).
        dropout, attention_dropout, embedding_dropout, midi_embedding_dropout (`float`): inside blocks, on attention
            weights, on audio frames, and on MIDI rows before the first block.
        midi_vocab_sizes (`list[int]`): ids per field of a MIDI row: pitch, velocity, duration, IOI, position, bar.
        midi_embedding_sizes (`list[int]`): width of each field's table.
        codebook_size, num_codebooks (`int`): of the codec, 2048 and 4.
        position_embedding_type (`str`): `"sinusoidal"` (published: MIDI rows and audio frames both count from 0) or
            `"time_rotary"` (both stand on one physical time axis, by rotary positions in 1/4800 s).
        rotary_min_period_s, rotary_max_period_s (`float`): geometric range of the rotary periods, s.
        use_segment_embeddings (`bool`): a learned vector marks rows and frames as prompt or target.
        use_frame_notes (`bool`): frames are also given the piano's state (88 keys) at the frame that they predict.
        frame_note_offsets (`list[int]`): frames around it whose strikes are given too.
        frame_note_decays (`list[float]`): how fast the features fall that tell a tone's age, s; one feature each.
        prompt_summary_size (`int`, defaults to 0): width of the map that sums the prompt's frames up into one vector,
            which all frames are given: what its piano and room sound like. 0 for none, as published.
        objective (`str`): `"target_mean"` (mean cross-entropy of the target frames) or `"published_sum"`.
        code_choice (`str`): a code that is not sampled is the likeliest (`"argmax"`, as published) or the nearest to
            the mean code vector under the logits (`"expected"`).
        quantization (`str`, *optional*): `"int8"` for blocks of [`Int8Linear`] layers; see `quantize_`.
    """

    model_type = "midivalle_decoder"

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    embedding_dropout: float = 0.1
    midi_embedding_dropout: float = 0.1
    midi_vocab_sizes: list[int] | tuple[int, ...] = (92, 68, 1156, 772, 388, 20)
    midi_embedding_sizes: list[int] | tuple[int, ...] = PUBLISHED_WIDTHS
    codebook_size: int = 2048
    num_codebooks: int = 4
    position_embedding_type: Literal["sinusoidal", "time_rotary"] = "time_rotary"
    rotary_min_period_s: float = 0.04
    rotary_max_period_s: float = 64.0
    use_segment_embeddings: bool = True
    use_frame_notes: bool = True
    frame_note_offsets: list[int] | tuple[int, ...] = (-1, 0, 1, 2)
    frame_note_decays: list[float] | tuple[float, ...] = (0.5,)
    prompt_summary_size: int = 0
    objective: Literal["target_mean", "published_sum"] = "target_mean"
    code_choice: Literal["expected", "argmax"] = "argmax"
    quantization: Literal["int8"] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name in ("midi_vocab_sizes", "midi_embedding_sizes", "frame_note_offsets", "frame_note_decays"):
            setattr(self, name, list(getattr(self, name)))  # JSON has no tuples: equal before and after saving
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse sizes that contradict one another."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "codebook_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.position_embedding_type == "time_rotary" and (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError("time_rotary needs an even head size: change hidden_size or num_attention_heads")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even, got {self.hidden_size}")
        for name in ("midi_vocab_sizes", "midi_embedding_sizes"):
            if len(getattr(self, name)) != len(MIDI_FIELDS) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be six positive numbers {MIDI_FIELDS}, got {getattr(self, name)}")
        if self.use_frame_notes and 0 not in self.frame_note_offsets:
            raise ValueError(f"frame_note_offsets must contain 0, got {self.frame_note_offsets}")
        if self.use_frame_notes and min(self.frame_note_decays, default=1) <= 0:
            raise ValueError(f"frame_note_decays must be positive, got {self.frame_note_decays}")
        if self.prompt_summary_size < 0:
            raise ValueError(f"prompt_summary_size must be at least 0, got {self.prompt_summary_size}")
        if self.num_codebooks < 2:
            raise ValueError(f"num_codebooks must be at least 2 (AR and one NAR stage), got {self.num_codebooks}")
        if not 0 < self.rotary_min_period_s < self.rotary_max_period_s:
            raise ValueError("rotary_min_period_s must be positive and below rotary_max_period_s")


@strict
class MidiValleARConfig(MidiValleDecoderConfig):
    r"""
    Configuration of [`MidiValleARModel`], which predicts the first codebook frame by frame.

    Args:
        vocab_size (`int`, defaults to 2050): codes, EOS, BOS. The published model has no BOS: 2049.
        eos_token_id, pad_token_id, bos_token_id (`int`, *optional*): behind the codes. To set one to a code later does
            nothing: `Trainer` does so with the ids of a tokenizer.
        use_target_bos (`bool`, defaults to `True`): a BOS frame stands between prompt and target.
        tie_word_embeddings (`bool`, defaults to `True`): the head is the input table (published: `False`).

    Example:

    ```python
    >>> config = MidiValleARConfig.from_preset("starter", num_hidden_layers=2)
    ```"""

    model_type = "midivalle_ar"
    _auto_class = "AutoConfig"
    base_config_key = "ar_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # the cache until transformers 5.23, and since

    vocab_size: int = 2050
    eos_token_id: int | None = 2048
    pad_token_id: int | None = 2048
    bos_token_id: int | None = 2049
    use_target_bos: bool = True
    tie_word_embeddings: bool = True
    use_cache: bool = True

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MidiValleARConfig":
        """Configuration `name` of `tiny`, `starter`, `base`, `published`; keywords replace single fields."""
        fields = dict(_size(name))
        if name == "starter":
            fields["num_hidden_layers"] = 4
        if name == "published":
            fields |= {"vocab_size": 2049, "bos_token_id": None, "use_target_bos": False, "tie_word_embeddings": False}
        return cls(**(fields | overrides))

    def __setattr__(self, name, value):
        if name in SPECIAL_IDS and name in vars(self) and value is not None and value < self.codebook_size:
            return  # a code: `Trainer` given a tokenizer or processor would put the ids of MIDI rows here
        super().__setattr__(name, value)

    def validate_architecture(self):
        """Refuse an output vocabulary without room for the special codes."""
        super().validate_architecture()
        if self.use_target_bos and self.bos_token_id is None:
            raise ValueError("use_target_bos needs a bos_token_id")
        specials = [i for name in SPECIAL_IDS if (i := getattr(self, name)) is not None]
        if any(not self.codebook_size <= i < self.vocab_size for i in specials):
            raise ValueError(
                f"special ids {specials} must lie behind the {self.codebook_size} codes and below vocab_size "
                f"{self.vocab_size}"
            )


@strict
class MidiValleNARConfig(MidiValleDecoderConfig):
    r"""
    Configuration of [`MidiValleNARModel`], which predicts codebooks 1.. from those below, stage by stage.

    Args:
        stage_norm (`str`, defaults to `"table"`): where the scale and shift of the adaptive norms come from:
            `"table"` (a learned row per stage) or `"projected"` (published: a linear map of a stage vector, around
            a norm with its own affine). Both express the same functions; at the published width a table has 340 times
            fewer parameters.
        tie_word_embeddings (`bool`, defaults to `True`): the head of codebook k is the input table of codebook k.
        tie_heads_one_step_off (`bool`, defaults to `False`): as published, tie the head of codebook k to the table of
            codebook k + 1 instead; the last head stays free.
    """

    model_type = "midivalle_nar"
    _auto_class = "AutoConfig"
    base_config_key = "nar_config"
    attribute_map = {"vocab_size": "codebook_size"}

    stage_norm: Literal["table", "projected"] = "table"
    tie_word_embeddings: bool = True
    tie_heads_one_step_off: bool = False

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MidiValleNARConfig":
        """Configuration `name` of `tiny`, `starter`, `base`, `published`; keywords replace single fields."""
        fields = dict(_size(name))
        if name == "starter":
            fields["num_hidden_layers"] = 3
        if name == "published":
            fields |= {"stage_norm": "projected", "tie_heads_one_step_off": True, "midi_embedding_dropout": 0.0}
        return cls(**(fields | overrides))


@strict
class MidiValleConfig(PreTrainedConfig):
    r"""
    Configuration of [`MidiValleForConditionalGeneration`]: codec, AR and NAR.

    Args:
        codec_config (`PianoEncodecConfig` or `dict`), ar_config (`MidiValleARConfig` or `dict`),
        nar_config (`MidiValleNARConfig` or `dict`): the parts.
        share_midi_embeddings (`bool`, defaults to `False`): AR and NAR use the same six MIDI tables (as published).
        has_codec (`bool`, defaults to `True`): `False` leaves the codec out: the model knows codes only.
        as_recorded (`bool`, defaults to `False`): what is generated after a recorded prompt is given the colour and the
            noise of its recording (`recording_midivalle.py`), unless `generate` is told otherwise.
        keys_from_midi (`bool`, defaults to `False`): the codec's decoder is told which keys are struck, and how hard,
            by the MIDI, not by the codes that were predicted from it; for a codec with `num_key_axes`.
        mean_vectors (`bool`, defaults to `False`): the codec's decoder is given the mean of all code vectors, each as
            likely as AR and NAR hold it, instead of those of the chosen codes; what follows still goes by the codes.
        velocity_gain_db (`float`, defaults to 0.0): dB by which a key of velocity 127 is made louder than one of
            velocity 0, beyond what the codec makes of them by itself (`dynamics_midivalle.py`); for a codec
            with `num_oscillators`, and of no effect without `keys_from_midi`. The following are of none without it.
        treble_gain_db (`float`, defaults to 0.0): the same of the audio above some 4 kHz, in which a key that is struck
            harder is brighter; beside `velocity_gain_db`.
        octave_gain_db (`float`, defaults to 0.0): dB by which a key is made louder that is struck together with the one
            an octave below; beside `velocity_gain_db`.
        attack_gain_db (`float`, defaults to 0.0): dB by which every key is made louder while it is struck, and the even
            partials of one that is struck alone softer, in generated audio; beside `velocity_gain_db`.
        sustain_gain_db (`float`, defaults to 0.0): dB a second by which held keys are made louder while nothing is
            struck, up to 8, one or two of them up to 14; in longer rests they fall. Beside `velocity_gain_db`.
        colour_gains_db (`list[float]`, *optional*): dB that generated audio lacks in the mean, beyond what the codec
            lacks, in ten parts of the range from 50 Hz up, evenly spaced in mel; for `as_recorded`. An adapter adds its
            own to them (`scripts.adapt`).

    Example:

    ```python
    >>> config = MidiValleConfig.from_preset("starter")
    >>> config.sampling_rate, config.frame_rate
    (32000, 50)
    ```"""

    model_type = "midivalle"
    _auto_class = "AutoConfig"
    sub_configs_defaults = {
        "codec_config": PianoEncodecConfig,
        "ar_config": MidiValleARConfig,
        "nar_config": MidiValleNARConfig,
    }

    codec_config: PianoEncodecConfig | dict | None = None
    ar_config: MidiValleARConfig | dict | None = None
    nar_config: MidiValleNARConfig | dict | None = None
    share_midi_embeddings: bool = False
    has_codec: bool = True
    as_recorded: bool = False
    keys_from_midi: bool = False
    mean_vectors: bool = False
    velocity_gain_db: float = 0.0
    treble_gain_db: float = 0.0
    octave_gain_db: float = 0.0
    attack_gain_db: float = 0.0
    sustain_gain_db: float = 0.0
    colour_gains_db: list[float] | tuple[float, ...] | None = None

    @classmethod
    def from_preset(cls, name: str, codec_config: PianoEncodecConfig | dict | None = None) -> "MidiValleConfig":
        """`tiny` (tests), `starter` (11 M + codec), `base` (the paper's size) or `published` (the paper, exactly)."""
        if codec_config is None:
            small = {
                "tiny": {"num_filters": 2, "hidden_size": 16, "num_lstm_layers": 1},
                "starter": STARTER_CODEC,
            }
            codec_config = small.get(name, {})
        return cls(
            codec_config=codec_config,
            ar_config=MidiValleARConfig.from_preset(name).to_dict(),
            nar_config=MidiValleNARConfig.from_preset(name).to_dict(),
            share_midi_embeddings=name == "published",
        )

    @property
    def sampling_rate(self) -> int:
        """Of the audio, Hz."""
        return self.codec_config.sampling_rate

    @property
    def frame_rate(self) -> int:
        """Codec frames per second, 50."""
        return UNITS_PER_SECOND // UNITS_PER_FRAME

    @property
    def hop_length(self) -> int:
        """Samples per codec frame."""
        return self.codec_config.hop_length

    def validate_architecture(self):
        """Refuse parts that do not fit together."""
        codec, ar, nar = self.codec_config, self.ar_config, self.nar_config
        for name, value in (("codebook_size", codec.codebook_size), ("num_codebooks", codec.num_quantizers)):
            if not value == getattr(ar, name) == getattr(nar, name):
                raise ValueError(
                    f"{name} differs: codec {value}, AR {getattr(ar, name)}, NAR {getattr(nar, name)}; must be equal"
                )
        if codec.hop_length * self.frame_rate != codec.sampling_rate:
            raise ValueError(f"the codec must have {self.frame_rate} frames per second, see sampling_rate and ratios")
        if self.keys_from_midi and not codec.num_key_axes:
            raise ValueError("keys_from_midi needs a codec whose latent has axes of keys (num_key_axes)")
        if self.velocity_gain_db and not codec.num_oscillators:
            raise ValueError("velocity_gain_db needs a codec with num_oscillators")
        if not self.has_codec and "expected" in (ar.code_choice, nar.code_choice):
            raise ValueError("code_choice 'expected' needs the codec's codebooks (has_codec)")
        colour = self.colour_gains_db
        if colour is not None and (len(colour) != COLOURS or not all(map(math.isfinite, colour))):
            raise ValueError(f"colour_gains_db must be {COLOURS} finite numbers, got {colour}")
        sizes = [(c.midi_vocab_sizes, c.midi_embedding_sizes) for c in (ar, nar)]
        if sizes[0][0] != sizes[1][0] or (self.share_midi_embeddings and sizes[0] != sizes[1]):
            raise ValueError(
                "ar_config and nar_config differ in their MIDI vocabularies or in the shared tables' widths"
            )

    def get_text_config(self, *args, **kwargs) -> MidiValleARConfig:
        """The AR, for caches and vocabulary checks."""
        return self.ar_config


def _size(name: str) -> dict:
    if name not in SIZES:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(SIZES)}")
    return SIZES[name]


__all__ = ["MidiValleARConfig", "MidiValleConfig", "MidiValleNARConfig"]
