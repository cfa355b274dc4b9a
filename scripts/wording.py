# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Words of messages."""


def counted(count: int, noun: str) -> str:
    """`1 window`, `2 windows`: a number and its noun, whose plural ends in s."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
