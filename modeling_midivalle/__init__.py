# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""PreTrainedModel classes of MIDI-VALLE: ids and codes in, codes and audio out. Importing registers Auto classes."""

from transformers import AutoConfig, AutoModel

from .configuration_midivalle import MidiValleARConfig, MidiValleConfig, MidiValleNARConfig
from .configuration_piano_encodec import PianoEncodecConfig
from .configuration_piano_listener import PianoListenerConfig
from .modeling_midivalle import MidiValleForConditionalGeneration
from .modeling_midivalle_ar import MidiValleARModel
from .modeling_midivalle_nar import MidiValleNARModel
from .modeling_piano_encodec import PianoEncodecModel
from .modeling_piano_listener import PianoListenerModel
from .streaming_piano_encodec import CodecStream

for _config, _model in (
    (PianoEncodecConfig, PianoEncodecModel),
    (PianoListenerConfig, PianoListenerModel),
    (MidiValleARConfig, MidiValleARModel),
    (MidiValleNARConfig, MidiValleNARModel),
    (MidiValleConfig, MidiValleForConditionalGeneration),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)


__all__ = [
    "CodecStream",
    "MidiValleARConfig",
    "MidiValleARModel",
    "MidiValleConfig",
    "MidiValleForConditionalGeneration",
    "MidiValleNARConfig",
    "MidiValleNARModel",
    "PianoEncodecConfig",
    "PianoEncodecModel",
    "PianoListenerConfig",
    "PianoListenerModel",
]
