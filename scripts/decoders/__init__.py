# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Training of the AR and NAR decoders, for `scripts.train`."""
