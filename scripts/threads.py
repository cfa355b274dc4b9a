# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""How many threads make a model fastest here and now, measured: on a busy machine two can be ten times slower than one."""

import itertools
import time
from collections.abc import Callable

import torch

PROBE_S = 0.03  # for each number of threads
MARGIN = 0.9  # more threads must take at most this share of the time


def choose_threads(model) -> int:
    """Measure, and let torch use, the number of threads with which the linear maps of the AR, one frame, are fastest.

    At most as many as torch uses by itself (cores, `OMP_NUM_THREADS`). Takes about `PROBE_S` for each of 1, 2, 4, ...
    until more do not help; nothing where torch uses one, and on a GPU.
    """
    most = torch.get_num_threads()
    if most > 1 and model.device.type == "cpu":
        maps = [module for module in model.ar.modules() if hasattr(module, "in_features")]
        works = [lambda m=m, x=torch.zeros(1, 1, m.in_features, dtype=model.ar.dtype): m(x) for m in maps]
        with torch.inference_mode():
            most = fastest(works, [2**k for k in range(most.bit_length()) if 2**k < most] + [most])
    torch.set_num_threads(most)
    return most


def fastest(works: list[Callable], counts: list[int], clock: Callable = time.perf_counter) -> int:
    """The first of rising numbers of threads `counts` that the next one does not beat by a tenth."""
    for few, more in zip(counts, counts[1:], strict=False):
        if compare(works, few, more, clock) > MARGIN:
            return few
    return counts[-1]


def compare(works: list[Callable], few: int, more: int, clock: Callable) -> float:
    """Time that `works` take with `more` threads in proportion to that with `few`: each work with both, so that both
    meet the same rush, and ended as soon as one of them has taken long."""
    spent, end = {few: 0.0, more: 0.0}, clock() + 3 * PROBE_S
    for threads in spent:  # wakes the threads
        torch.set_num_threads(threads)
        works[0]()
    for work in itertools.cycle(works):
        for threads in spent:
            torch.set_num_threads(threads)
            begin = clock()
            work()
            spent[threads] += clock() - begin
        if min(spent.values()) >= PROBE_S or clock() >= end:
            return spent[more] / spent[few]
