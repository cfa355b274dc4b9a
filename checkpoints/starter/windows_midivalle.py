# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Where to cut a long performance: windows on the 0.5 s grid that begin where the music is thin."""

import math

import numpy as np

GRID_S = 0.5  # 25 codec frames = 96 MIDI ticks, the smallest common grid
SHORTEST_S = 15.0  # shorter windows are possible (short pieces, what is left over) but cost
NEAR_S = 0.05  # a note struck so near to a cut makes the seam audible
CUT_COST, HELD_COST, NEAR_COST, SHORT_COST = 1.0, 1.0, 2.0, 20.0  # per cut, sounding note, struck note, missing second


def plan_windows(notes: np.ndarray, total: float, longest: float) -> list[tuple[float, float]]:
    """Divide `[0, total]` into windows of 15 s to `longest`, cut where few notes sound and none is struck.

    The cheapest division by dynamic programming. Every cut lies on the grid and before the end of the last note, so
    that the last window holds all of the ring-out.

    Args:
        notes (`np.ndarray` with fields `onset` and `duration`, shape `(M,)`, M >= 1): Sorted notes, in s.
        total (`float`): End of the last window in s, off the grid; less than `longest` after the last note's end.
        longest (`float`): Longest window in s.

    Returns:
        `list[tuple[float, float]]`: start and end of each window in s, without gap or overlap.
    """
    if total <= longest:
        return [(0.0, total)]
    onsets, ends = notes["onset"], np.sort(notes["onset"] + notes["duration"])
    cuts = np.arange(math.ceil(ends[-1] / GRID_S)) * GRID_S  # all before the last end
    held = np.searchsorted(onsets, cuts) - np.searchsorted(ends, cuts, side="right")
    near = np.searchsorted(onsets, cuts + NEAR_S) - np.searchsorted(onsets, cuts - NEAR_S)
    cost = CUT_COST + HELD_COST * held + NEAR_COST * near
    best, previous = np.zeros(len(cuts)), np.zeros(len(cuts), int)
    reach = int(longest / GRID_S)

    def cheapest(end: float, last: int) -> tuple[float, int]:
        """The best way to `end` by a window that starts at one of the cuts up to `last`."""
        first = max(last + 1 - reach, 0)
        length = end - cuts[first : last + 1]
        ways = best[first : last + 1] + SHORT_COST * np.maximum(SHORTEST_S - length, 0)
        ways[length > longest + 1e-9] = np.inf
        choice = int(ways.argmin())
        return float(ways[choice]), first + choice

    for i in range(1, len(cuts)):
        way, previous[i] = cheapest(cuts[i], i - 1)
        best[i] = cost[i] + way
    edges, i = [total], cheapest(total, len(cuts) - 1)[1]
    while i > 0:
        edges.append(float(cuts[i]))
        i = previous[i]
    edges.append(0.0)
    return list(zip(edges[::-1], edges[-2::-1], strict=False))
