# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Notes and spectra held against one another."""
