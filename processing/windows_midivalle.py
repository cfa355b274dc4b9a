# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Where to cut a long performance: a short window first, so that it can soon be heard, then longer ones; windows begin
where the music is thin. Every edge lies on the 0.5 s grid."""

import math

import numpy as np

GRID_S = 0.5  # 25 codec frames = 96 MIDI ticks, the smallest common grid
ROUNDING_S = 1e-6  # ends that should lie on the grid may miss it by so much
FIRST_S = 1.0  # longest first window; the next may be twice as long, and so on
SHORT_SHARE = 0.65  # of the longest window: shorter ones are possible (what is left over) but cost
NEAR_S = 0.05  # a note struck so near to a cut makes a seam audible
CUT_COST, HELD_COST, NEAR_COST, SHORT_COST = 1.0, 1.0, 2.0, 20.0  # per cut, sounding note, struck note, missing second


def plan_windows(notes: np.ndarray, total: float, longest: float, first: float = FIRST_S) -> list[tuple[float, float]]:
    """Divide `[0, total]` into windows of at most `longest`, cut where few notes sound and none is struck.

    The first window lasts at most `first`, each of the next at most twice as long as the one before was allowed to be,
    cut at the thinnest place of the last quarter of that; when `longest` is reached, the cheapest division of the rest,
    by dynamic programming. Every cut lies on the grid and before the end of the last note, so that the last window
    holds all of the ring-out.

    Args:
        notes (`np.ndarray` with fields `onset` and `duration`, shape `(M,)`, M >= 1): Sorted notes, in s.
        total (`float`): End of the last window in s, off the grid; less than `longest` after the last note's end.
        longest, first (`float`): Longest window, and longest first window, in s.

    Returns:
        `list[tuple[float, float]]`: start and end of each window in s, without gap or overlap.
    """
    onsets, ends = notes["onset"], np.sort(notes["onset"] + notes["duration"])
    if abs(total - (grid := round(total / GRID_S) * GRID_S)) < ROUNDING_S:
        total = grid  # a rounding error is not worth a cut
    cuts = np.arange(math.ceil((ends[-1] - ROUNDING_S) / GRID_S)) * GRID_S  # all before the last end
    held = np.searchsorted(onsets, cuts) - np.searchsorted(ends, cuts, side="right")
    near = np.searchsorted(onsets, cuts + NEAR_S) - np.searchsorted(onsets, cuts - NEAR_S)
    cost = CUT_COST + HELD_COST * held + NEAR_COST * near
    edges, reach = [0.0], first
    while reach < longest and edges[-1] + reach < total:
        soon = np.flatnonzero((cuts >= edges[-1] + 0.75 * reach) & (cuts <= edges[-1] + reach))
        if not len(soon):  # the rest is ring-out
            break
        edges.append(float(cuts[soon[cost[soon].argmin()]]))
        reach *= 2
    rest = cuts > edges[-1]
    edges += _cheapest(cuts[rest], cost[rest], edges[-1], total, longest) + [total]
    return list(zip(edges, edges[1:], strict=False))


def _cheapest(cuts: np.ndarray, cost: np.ndarray, start: float, total: float, longest: float) -> list[float]:
    """The cuts, of `cuts` at their `cost`, that divide `[start, total]` most cheaply; none if it is short enough."""
    if total - start <= longest:
        return []
    cuts, cost = np.append(start, cuts), np.append(0.0, cost)
    best, previous = np.zeros(len(cuts)), np.zeros(len(cuts), int)
    reach = int(longest / GRID_S)

    def cheapest(end: float, last: int) -> tuple[float, int]:
        """The best way to `end` by a window that starts at one of the cuts up to `last`."""
        first = max(last + 1 - reach, 0)
        length = end - cuts[first : last + 1]
        ways = best[first : last + 1] + SHORT_COST * np.maximum(SHORT_SHARE * longest - length, 0)
        ways[length > longest + 1e-9] = np.inf
        choice = int(ways.argmin())
        return float(ways[choice]), first + choice

    for i in range(1, len(cuts)):
        way, previous[i] = cheapest(cuts[i], i - 1)
        best[i] = cost[i] + way
    chosen, i = [], cheapest(total, len(cuts) - 1)[1]
    while i > 0:
        chosen.append(float(cuts[i]))
        i = previous[i]
    return chosen[::-1]
