# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Training of the Piano-Encodec, for `scripts.train_codec`."""
