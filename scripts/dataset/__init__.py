# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Training data of the decoders: recordings, shards, for `scripts.prepare_dataset`."""
