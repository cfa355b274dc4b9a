# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Files and arrays -> model inputs: MIDI windows, an audio prompt, one time axis. No model, no device."""

from transformers import AutoProcessor

from .audio_midivalle import AudioError, AudioWriter, read_audio, to_mono_32k, write_audio
from .processing_midivalle import MidiValleProcessor, ProcessorError, Prompt
from .windows_midivalle import plan_windows

AutoProcessor.register("midivalle", MidiValleProcessor, exist_ok=True)  # found by class name: any key serves
MidiValleProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "AudioError",
    "AudioWriter",
    "MidiValleProcessor",
    "ProcessorError",
    "Prompt",
    "plan_windows",
    "read_audio",
    "to_mono_32k",
    "write_audio",
]
