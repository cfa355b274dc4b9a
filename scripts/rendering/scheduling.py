# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Which windows of which pieces are generated together: decided by their numbers alone, before anything is rendered.

A window's bits depend on the shape of its batch, not on what the other rows hold. So the plan, and with it the bits, is
the same whether a render was interrupted or not, and in a batch that is made again a row that is not needed is filled
with anything of the same lengths.
"""

from collections.abc import Iterable

Size = tuple[int, int, int]  # MIDI rows, context frames, new frames of a window


def schedule(counts: list[int], batch_size: int, parallel: bool = False) -> list[list[tuple[int, int]]]:
    """Steps, each a list of at most `batch_size` (piece, window), of pieces of `counts` windows.

    A piece's windows follow each other, and where one piece ends the next takes its place. With `parallel` a step takes
    the next windows of any piece, the very first alone, since it is waited for.
    """
    if parallel:
        every = [(piece, window) for piece, count in enumerate(counts) for window in range(count)]
        return [every[:1]] + [every[i : i + batch_size] for i in range(1, len(every), batch_size)]
    steps, waiting, places = [], iter(range(len(counts))), []
    while True:
        places = [(piece, window + 1) for piece, window in places if window + 1 < counts[piece]]
        places += [(piece, 0) for _, piece in zip(range(batch_size - len(places)), waiting, strict=False)]
        if not places:
            return steps
        steps.append(places)


def layouts(steps: Iterable[list[tuple[int, int]]], sizes: list[list[Size]]) -> list[list[dict]]:
    """For each piece and window its `row` in its batch, and the sizes of all the batch's `rows`."""
    found = [[{}] * len(windows) for windows in sizes]
    for step in steps:
        rows = [list(sizes[piece][window]) for piece, window in step]
        for row, (piece, window) in enumerate(step):
            found[piece][window] = {"row": row, "rows": rows}
    return found


def steps_again(layout: list[dict] | None, count: int, parallel: bool) -> list[list[tuple[int, int]]]:
    """The steps of one piece of `count` windows, as piece 0, when it is made again without the others."""
    steps = []
    for window in range(count):
        is_behind = parallel and layout and window and layout[window]["row"] > layout[window - 1]["row"]
        if is_behind and layout[window]["rows"] == layout[window - 1]["rows"]:  # else the manifest is damaged
            steps[-1].append((0, window))
        else:
            steps.append([(0, window)])
    return steps
