# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What `scripts.render` decides beforehand: which windows share a batch, threads, rows; imports and decoding beside."""

import gc
import sys
import threading

import pytest
import torch

from modeling_midivalle import MidiValleConfig
from scripts.rendering import resources
from scripts.rendering.decoding import Decoding
from scripts.rendering.scheduling import layouts, schedule, steps_again
from scripts.rendering.startup import UNUSED, quick_imports


def test_a_piece_that_ends_makes_room():
    assert schedule([3, 1, 2], 2) == [[(0, 0), (1, 0)], [(0, 1), (2, 0)], [(0, 2), (2, 1)]]
    assert schedule([2, 2], 1) == [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]]
    assert schedule([], 4) == []


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_window_once_and_in_order(size, parallel):
    counts = [4, 1, 7, 2, 2]
    steps = schedule(counts, size, parallel)
    every = [pair for step in steps for pair in step]
    assert sorted(every) == [(piece, window) for piece, count in enumerate(counts) for window in range(count)]
    assert all(1 <= len(step) <= size for step in steps)
    for piece, count in enumerate(counts):
        assert [window for p, window in every if p == piece] == list(range(count))
    if not parallel:
        assert all(len({piece for piece, _ in step}) == len(step) for step in steps)


def test_layouts_tell_the_row_and_all_sizes():
    sizes = [[(5, 0, 50), (9, 50, 100)], [(7, 0, 40)]]
    found = layouts(schedule([2, 1], 2), sizes)
    assert found[0] == [{"row": 0, "rows": [[5, 0, 50], [7, 0, 40]]}, {"row": 0, "rows": [[9, 50, 100]]}]
    assert found[1] == [{"row": 1, "rows": [[5, 0, 50], [7, 0, 40]]}]


def test_a_piece_again_without_its_mates():
    """Its windows of one step together in parallel, else one by one."""
    sizes = [[(1, 0, 1)] * 2, [(1, 0, 1)] * 5]
    parallel = layouts(schedule([2, 5], 3, parallel=True), sizes)[1]
    assert steps_again(parallel, 5, True) == [[(0, 0), (0, 1)], [(0, 2), (0, 3), (0, 4)]]
    parallel[3] = parallel[3] | {"rows": []}  # in a damaged manifest windows of a batch may not agree on it
    assert steps_again(parallel, 5, True)[1:] == [[(0, 2)], [(0, 3)], [(0, 4)]]
    carried = layouts(schedule([2, 5], 2), sizes)[1]
    assert steps_again(carried, 5, False) == steps_again(None, 5, True) == [[(0, window)] for window in range(5)]


@pytest.mark.parametrize(("speed_up", "chosen"), [((1, 1.9, 3.5), 4), ((1, 1.5, 1.6), 2), ((1, 0.05, 0.04), 1)])
def test_threads_by_measurement(speed_up, chosen, monkeypatch):
    """More threads where they are faster by a tenth, on a clock that the work itself moves on."""
    time, threads = [0.0], [1]
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))

    def work():
        time[0] += 0.001 / dict(zip((1, 2, 4), speed_up, strict=True))[threads[0]]

    assert resources.fastest([work, work], [1, 2, 4], lambda: time[0]) == chosen
    assert time[0] < 10 * resources.PROBE_S


def test_the_probe_leaves_its_choice(make_model, monkeypatch):
    model, before = make_model(), torch.get_num_threads()
    monkeypatch.setattr(resources, "fastest", lambda works, counts: [work() for work in works] and counts[-1])
    try:
        assert resources.choose_threads(model, 3) == torch.get_num_threads() == 3
        assert resources.choose_threads(model, 1) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("is_small", [False, True])
def test_the_probe_is_of_what_takes_several_threads(make_model, monkeypatch, is_small):
    model, tried = make_model(), []
    monkeypatch.setattr(resources, "is_small", lambda ar, rows: is_small)
    monkeypatch.setattr(resources, "fastest", lambda works, counts: tried.extend(works) or 1)
    resources.choose_threads(model, 2)
    modules = set((model.nar if is_small else model.ar).modules())
    assert tried and {work.func for work in tried} <= modules
    assert {work.args[0].shape[1] for work in tried} == {resources.NAR_FRAMES if is_small else 1}


def test_rows_by_free_memory():
    config = MidiValleConfig.from_preset("tiny")
    rows = [resources.rows_that_fit(config, free) for free in (0, 10**8, 10**9, 10**10, 10**13)]
    assert rows[0] == 1 and rows == sorted(rows) and rows[-1] == resources.MOST_ROWS and 1 < rows[2] < rows[-1]
    assert resources.rows_that_fit(config, 10**9, 2) == 2 * resources.rows_that_fit(config, 10**9, 4)
    half = 8 * resources.bytes_of_row(config, resources.POSITIONS)  # of what is free
    assert [resources.rows_that_fit(config, free) for free in (2 * half + 8, 2 * half - 8)] == [8, 4]
    assert resources.bytes_of_row(config, 2000) > 2.1 * resources.bytes_of_row(config, 1000)  # attention is a square


def test_rows_on_a_cpu(make_model):
    assert [resources.batch_rows(make_model(), parallel) for parallel in (False, True)] == [1, 4]


def test_decoding_beside_keeps_the_order_and_its_errors():
    decoding, done, go = Decoding(torch.device("cpu"), overlapped=True), [], threading.Event()
    decoding(lambda: (go.wait(10), done.append(threading.current_thread())))
    assert done == []  # not waited for
    go.set()
    decoding(lambda: done.append(2))
    decoding.wait()
    assert done[0] is not threading.main_thread() and done[1:] == [2]

    def broken():
        raise ValueError("no space left")

    decoding(broken)
    with pytest.raises(ValueError, match="no space left"):
        decoding.wait()
    decoding.wait()  # it is told once
    decoding(broken)
    with pytest.raises(ValueError, match="no space left"):  # by the next one too, which waits for the one before
        decoding(lambda: done.append(3))
    assert 3 not in done
    Decoding(torch.device("cpu"))(lambda: done.append(threading.current_thread()))
    assert done[-1] is threading.main_thread()


def test_quick_imports_hide_and_bring_back(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in UNUSED]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        import scipy  # noqa: F401
    assert gc.isenabled() and not set(UNUSED) & set(sys.modules)
    gc.unfreeze()
