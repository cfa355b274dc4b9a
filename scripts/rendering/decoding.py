# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The audio of a window while the next one is generated: on a GPU, by a thread on a stream of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch


class Decoding:
    """Runs what decodes a finished window and hands its audio on, one after the other, in order.

    Args:
        device (`torch.device`): Where the codes are.
        overlapped (`bool`, *optional*): Beside what follows; by default on a GPU only, whose cores are not those that
            the model's own operations run on.
    """

    def __init__(self, device: torch.device, overlapped: bool | None = None):
        is_cuda = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if is_cuda else None
        self.worker = ThreadPoolExecutor(1) if (is_cuda if overlapped is None else overlapped) else None
        self.pending: Future | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Run `work()`, now or meanwhile; at most one waits, so that memory does not grow."""
        if self.worker is None:
            return work()
        self.wait()
        codes_are_there = torch.cuda.current_stream().record_event() if self.side else None
        self.pending = self.worker.submit(self._run, work, codes_are_there)

    def wait(self) -> None:
        """Until all is decoded; raises what the work has raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def _run(self, work: Callable[[], None], codes_are_there) -> None:
        with torch.cuda.stream(self.side) if self.side else nullcontext():
            if self.side:
                self.side.wait_event(codes_are_there)
            work()
