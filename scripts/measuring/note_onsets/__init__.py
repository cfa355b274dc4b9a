# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Note scores, and a metric of the `evaluate` library: a folder that stands alone."""
