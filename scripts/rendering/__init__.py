# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""MIDI files to audio files, for `scripts.render`."""
