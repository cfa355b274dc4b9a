# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Written music, sampled pianos, rooms: sound from notes, and excerpts of recordings."""
