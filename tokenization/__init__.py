# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Symbolic music <-> ids. numpy, symusic and miditok; never torch."""

from transformers import AutoTokenizer

from .midi_midivalle import NOTE_DTYPE, MidiError, Performance, load_performance, slice_notes
from .tokenization_midivalle import MidiValleTokenizer

AutoTokenizer.register("midivalle", MidiValleTokenizer, exist_ok=True)  # found by class name: any key serves
MidiValleTokenizer.register_for_auto_class("AutoTokenizer")

__all__ = ["NOTE_DTYPE", "MidiError", "MidiValleTokenizer", "Performance", "load_performance", "slice_notes"]
