# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What the trainers of codec and decoders share."""
