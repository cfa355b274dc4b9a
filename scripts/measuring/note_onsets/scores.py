# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""How near notes are; pure functions. Notes are structured arrays with fields onset, s, pitch and velocity."""

import mir_eval
import numpy as np
from scipy import stats


def note_scores(reference: np.ndarray, estimate: np.ndarray, onset_tolerance: float = 0.05) -> dict[str, float]:
    """Onset scores as mir_eval counts them: equal pitch, onset within `onset_tolerance` s, offsets ignored.

    Returns:
        `f1`, `precision`, `recall`; of the matched notes `onset_bias_ms` (median, positive is late),
        `onset_error_ms` (median absolute) and `velocity_correlation` (Spearman; nan below 5 matches, or where all have
        one velocity).
    """
    result = {"f1": 0.0, "precision": 0.0, "recall": 0.0, "onset_bias_ms": np.nan, "onset_error_ms": np.nan}
    result["velocity_correlation"] = np.nan
    if not len(reference) or not len(estimate):
        return result
    matched = match_onsets(reference, estimate, onset_tolerance)
    result["precision"], result["recall"] = len(matched) / len(estimate), len(matched) / len(reference)
    result["f1"] = 2 * len(matched) / (len(estimate) + len(reference))
    if matched:
        r, e = np.array(matched).T
        late = (estimate["onset"][e] - reference["onset"][r]) * 1000
        result["onset_bias_ms"], result["onset_error_ms"] = float(np.median(late)), float(np.median(np.abs(late)))
        if len(matched) >= 5 and np.ptp(reference["velocity"][r]) and np.ptp(estimate["velocity"][e]):
            correlation = stats.spearmanr(reference["velocity"][r], estimate["velocity"][e]).statistic
            result["velocity_correlation"] = float(correlation)
    return result


def match_onsets(reference: np.ndarray, estimate: np.ndarray, onset_tolerance: float) -> list[tuple[int, int]]:
    """Pairs of places in both: notes of equal pitch with onsets within `onset_tolerance` s, as many as possible."""
    if not len(reference) or not len(estimate):
        return []
    intervals, pitches = zip(*(_intervals(notes) for notes in (reference, estimate)))
    return mir_eval.transcription.match_notes(
        intervals[0], pitches[0], intervals[1], pitches[1], onset_tolerance=onset_tolerance, offset_ratio=None
    )


def mean_interval(values, groups=None) -> tuple[float, float]:
    """Mean and the half-width of its 95 % t-interval; with `groups`, of the group means. nan values are left out."""
    values = np.asarray(values, dtype=float)
    if groups is not None:
        groups = np.asarray(groups)
        parts = [values[groups == g] for g in np.unique(groups)]
        values = np.array([np.nanmean(part) for part in parts if np.isfinite(part).any()])
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def _intervals(notes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) intervals in s and (N,) pitches in Hz, as mir_eval wants them. Lengths do not count."""
    onset = notes["onset"].astype(float)
    return np.stack([onset, onset + 0.01], 1), 440 * 2 ** ((notes["pitch"] - 69) / 12)
