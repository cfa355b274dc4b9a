# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Our note scores as a metric of the `evaluate` library, for other people's models and notebooks.

metric = evaluate.load("scripts/measuring/note_onsets")  # this folder, or a Space that has its files
metric.add(prediction={"onset": [0.51, 1.0], "pitch": [60, 64], "velocity": [50, 70]}, reference=...)
metric.compute()  # {"f1": 0.95, "f1_interval": 0.02, ...}
"""

import datasets
import evaluate
import numpy as np

from .scores import mean_interval, note_scores

DESCRIPTION = "How many notes of a piano performance are found again in another, such as a transcription of its audio."
INPUTS = """
Args:
    predictions, references: of each piece `{"onset": [s, ...], "pitch": [MIDI number, ...], "velocity": [...]}`.
    onset_tolerance: how far apart, s, the onsets of a match may be.
    groups: of each piece the recording it is of; all is then of the recordings' means.
Returns:
    Means over the pieces of `f1`, `precision`, `recall`, `onset_bias_ms` and `onset_error_ms` (of the matches, median
    and median absolute), `velocity_correlation` (Spearman, of pieces with five matches or more and more than one
    velocity), and with `_interval` the half-widths of their 95 % intervals (nan for a single piece).
"""
NOTE_FIELDS = {"onset": "float64", "pitch": "int64", "velocity": "int64"}


class NoteOnsets(evaluate.Metric):
    """See `INPUTS`."""

    def _info(self):
        notes = {field: datasets.List(datasets.Value(dtype)) for field, dtype in NOTE_FIELDS.items()}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": notes, "references": notes}),
            license="Apache-2.0",
        )

    def _compute(self, predictions, references, onset_tolerance=0.05, groups=None):
        pairs = zip(references, predictions)
        rows = [note_scores(_array(r), _array(p), onset_tolerance) for r, p in pairs]
        if not rows:
            raise ValueError("There is no piece to score.")
        if groups is not None and len(groups) != len(rows):
            raise ValueError(f"groups: {len(groups)} for {len(rows)} piece(s); give one for each piece, please.")
        result = {}
        for name in rows[0]:
            result[name], result[f"{name}_interval"] = mean_interval([row[name] for row in rows], groups)
        return result


def _array(notes: dict) -> np.ndarray:
    lengths = {len(notes[field]) for field in NOTE_FIELDS}
    if len(lengths) > 1:
        raise ValueError(
            f"A piece has lists of {sorted(lengths)} onsets, pitches and velocities: as many of each, please."
        )
    array = np.empty(lengths.pop(), list(NOTE_FIELDS.items()))
    for field in NOTE_FIELDS:
        array[field] = notes[field]
    return array
