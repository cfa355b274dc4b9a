# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Model folders and the parts of them."""
