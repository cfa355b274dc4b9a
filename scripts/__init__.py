# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Commands of the project; run each as `python -m scripts.NAME`."""
