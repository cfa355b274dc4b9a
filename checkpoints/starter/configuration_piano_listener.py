# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Configuration of the piano listener, which hears struck keys in audio."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class PianoListenerConfig(PreTrainedConfig):
    r"""
    Of a [`PianoListenerModel`].

    Args:
        hidden_size (`int`, *optional*, defaults to 96): channels of every layer.
        quantization (`str`, *optional*): `"int8"` for [`Int8Conv2d`] layers; see `quantize_`.

    Example:

    ```python
    >>> PianoListenerConfig().hidden_size
    96
    ```"""

    model_type = "piano_listener"
    _auto_class = "AutoConfig"

    hidden_size: int = 96
    quantization: Literal["int8"] | None = None

    def validate_architecture(self):
        """Refuse what cannot be built."""
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be above 0, got {self.hidden_size}")


__all__ = ["PianoListenerConfig"]
