# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The published weights and codec, for `scripts.convert_checkpoint`."""
