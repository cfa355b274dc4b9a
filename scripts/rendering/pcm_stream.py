# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Audio to a pipe while it is made: a thread writes, so that a player that takes its time does not stop the model."""

import os
import queue
import select
import struct
import threading
import time
from collections.abc import Callable

import numpy as np

from processing.audio_midivalle import to_int16

WAITING = 8  # chunks that may wait for the consumer; then the model waits too, and memory does not grow
WATCH_S = 0.2  # how often a consumer that has gone is looked for while there is nothing to write


class PcmStream:
    """16-bit mono PCM, little-endian, with a WAV header or raw, to a file descriptor.

    Args:
        descriptor (`int`): Where to, 1 for standard output.
        sampling_rate (`int`): Hz.
        samples (`int`, *optional*): How many there will be; None if unknown (the header then says the most it can).
        raw (`bool`): No header.
        on_gone (callable): Called once, from the thread, when nothing can be written any more.

    Attributes:
        gone (`bool`): Nothing can be written any more; what comes now is dropped.
        error (`OSError`, *optional*): Why, if it is not that the consumer has gone.
        peak (`float`): Of all that was handed over; what is above 1 was clipped.
        first_at (`float`): `time.perf_counter()` when the first audio was with the consumer, nan before.
    """

    def __init__(
        self, descriptor: int, sampling_rate: int, samples: int | None, raw: bool, on_gone: Callable[[], None]
    ):
        self.descriptor, self.on_gone = descriptor, on_gone
        self.gone, self.peak, self.first_at = False, 0.0, float("nan")
        self.error: OSError | None = None
        self.waiting = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.header = b"" if raw else wav_header(sampling_rate, samples)  # goes with the first audio

    def write(self, wave: np.ndarray) -> None:
        """Hand over `wave` `(samples,)`, full scale 1.0; louder samples are clipped."""
        self.peak = max(self.peak, float(np.abs(wave).max(initial=0.0)))
        data, self.header = self.header + to_int16(wave).astype("<i2").tobytes(), b""
        while data and not self.gone:
            try:
                return self.waiting.put(data, timeout=WATCH_S)
            except queue.Full:  # the consumer may have gone meanwhile
                continue

    def close(self) -> None:
        """Wait until the consumer has all, or has gone."""
        if self.header:
            self.write(np.zeros(0, np.float32))
        while not self.gone:
            try:
                self.waiting.put(None, timeout=WATCH_S)
                break
            except queue.Full:
                continue
        self.thread.join()

    def _run(self):
        try:
            while (data := self._next()) is not None:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self.descriptor, rest) :]
                if len(data) > HEADER_SIZE and self.first_at != self.first_at:
                    self.first_at = time.perf_counter()
        except OSError as error:
            self.error = None if isinstance(error, BrokenPipeError) else error
            self.gone = True
            self.on_gone()

    def _next(self) -> bytes | None:
        watch = select.poll()
        watch.register(self.descriptor, 0)  # errors only: the other end of the pipe is closed
        while True:
            try:
                return self.waiting.get(timeout=WATCH_S)
            except queue.Empty:
                if any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
                    raise BrokenPipeError from None


HEADER_SIZE = 44


def wav_header(sampling_rate: int, samples: int | None) -> bytes:
    """The 44 bytes before 16-bit mono PCM."""
    size = 2**32 - 1 - 36 if samples is None else 2 * samples
    layout = (16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", size + 36)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", *layout)
        + b"data"
        + struct.pack("<I", size)
    )
