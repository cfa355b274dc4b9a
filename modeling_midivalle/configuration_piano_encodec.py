# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Configuration of the Piano-Encodec: EnCodec with the defaults of the 32 kHz mono codec of MIDI-VALLE."""

from huggingface_hub.dataclasses import strict
from transformers import EncodecConfig
from transformers.utils.versions import require_version

require_version("transformers>=5.23", "pip install --upgrade transformers")


@strict
class PianoEncodecConfig(EncodecConfig):
    r"""
    [`EncodecConfig`] with the published 32 kHz form as defaults: hop 640 samples (50 Hz), 4 codebooks of 2048.

    Any `EncodecConfig` with weight norm, one chunk, one channel and without level normalisation is valid; see
    [`EncodecConfig`] for the fields.

    Args:
        num_key_axes (`int`, *optional*, defaults to 0): Last axes of the latent, one a key from A0 on, that the encoder
            has been taught to say the struck keys with; 0 or 88. See [`~PianoEncodecModel.encode_codes`].
        num_oscillators (`int`, *optional*, defaults to 0): First pairs of channels behind the decoder's LSTM that hold
            the oscillation at one pitch each, by semitones from E1 on. See `dynamics_midivalle.py`.

    Example:

    ```python
    >>> config = PianoEncodecConfig(num_filters=16)
    >>> config.hop_length, config.frame_rate, config.num_quantizers
    (640, 50, 4)
    ```"""

    model_type = "piano_encodec"
    _auto_class = "AutoConfig"

    target_bandwidths: list[float] | tuple[float, ...] = (2.2,)
    sampling_rate: int = 32_000
    num_filters: int = 64
    upsampling_ratios: list[int] | tuple[int, ...] = (8, 5, 4, 4)
    use_causal_conv: bool = False
    pad_mode: str = "constant"
    codebook_size: int = 2048
    use_conv_shortcut: bool = False
    num_key_axes: int = 0
    num_oscillators: int = 0

    def validate_architecture(self):
        """Refuse what MIDI-VALLE cannot use."""
        super().validate_architecture()
        if self.audio_channels != 1 or self.chunk_length_s is not None or self.normalize:
            raise ValueError("Piano-Encodec is mono, in one chunk and without level normalisation")
        if self.norm_type != "weight_norm":
            raise ValueError(
                f"norm_type is weight_norm, got {self.norm_type}: no norm of a whole piece can be streamed"
            )
        if self.num_key_axes not in (0, 88) or self.num_key_axes >= self.hidden_size:
            raise ValueError(f"num_key_axes is 0 or 88 and less than hidden_size, got {self.num_key_axes}")
        if not 0 <= 2 * self.num_oscillators <= self.num_filters * 2 ** len(self.upsampling_ratios):
            raise ValueError(f"num_oscillators {self.num_oscillators} does not fit into the channels behind the LSTM")
        if self.sampling_rate % self.hop_length:
            raise ValueError(f"hop {self.hop_length} does not divide the sampling rate {self.sampling_rate}")


__all__ = ["PianoEncodecConfig"]
