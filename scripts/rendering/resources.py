# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What a machine gives a model: threads, measured, since on a busy machine two can be ten times slower than one; and
rows of a batch, by free memory."""

import itertools
import time
from collections.abc import Callable
from functools import partial

import torch

from modeling_midivalle.decoding_midivalle_ar import is_small

PROBE_S = 0.03  # for each number of threads
NAR_FRAMES = 512  # that the NAR sees together
MARGIN = 0.9  # more threads must take at most this share of the time
MOST_ROWS, CPU_ROWS = 64, 4
POSITIONS = 2600  # of the longest sequence: 1600 frames, and notes


def choose_threads(model, most: int) -> int:
    """Measure, and let torch use, the number of threads with which the linear maps of the AR, one frame, are fastest;
    where the AR is small, and takes one thread anyway, those of the NAR, a window.

    At most `most`. Takes about `PROBE_S` for each of 1, 2, 4, ... until more do not help; nothing on a GPU.
    """
    if most > 1 and model.device.type == "cpu":
        part, frames = (model.nar, NAR_FRAMES) if is_small(model.ar, 1) else (model.ar, 1)
        maps = [module for module in part.modules() if hasattr(module, "in_features")]
        works = [partial(m, torch.zeros(1, frames, m.in_features, dtype=part.dtype)) for m in maps]
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


def rows_that_fit(config, free_bytes: int, bytes_per_value: int = 4) -> int:
    """Windows that may be generated together in so much free memory: a power of two up to `MOST_ROWS`, so that the
    batches, and with them the bits, do not change with every small change of what is free.

    Args:
        config (`MidiValleConfig`): Of the model.
        free_bytes (`int`): What is free beside the weights; half of it is used.
        bytes_per_value (`int`): Of the model's type.
    """
    row = bytes_of_row(config, POSITIONS, bytes_per_value)
    return 2 ** max(min(int(free_bytes / 2 / row), MOST_ROWS).bit_length() - 1, 0)


def bytes_of_row(config, positions: int, bytes_per_value: int = 4) -> int:
    """What a window of so many notes and frames takes, about, while it is generated."""
    ar, nar = config.ar_config, config.nar_config
    cache = 2 * ar.num_hidden_layers * ar.hidden_size
    layer = 10 * nar.hidden_size + 2 * nar.intermediate_size + nar.num_attention_heads * positions
    return positions * (cache + layer + 4 * nar.codebook_size) * bytes_per_value


def batch_rows(model, parallel: bool) -> int:
    """Windows together where the user does not say: by free memory on a GPU; else one, or in parallel `CPU_ROWS`."""
    if model.device.type == "cuda":
        return rows_that_fit(model.config, torch.cuda.mem_get_info()[0], model.ar.dtype.itemsize)
    return CPU_ROWS if parallel else 1
