# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The finished windows of a render on disk, so that an interrupted one goes on where it stopped."""

from pathlib import Path

import numpy as np


class Journal:
    """A file of one line, the key of what is rendered, and after it the codes of each finished window.

    A window is written whole: 16-bit integers, first the number of the attempt that was kept, then codes `(K, T)`. What
    a kill has cut short is dropped when the file is opened again; a file with another key is started anew.

    Args:
        path (`Path`): A hidden file beside the output.
        key (`str`): Says all that decides the sound, in one line; see `scripts.manifest`.
        num_codebooks (`int`), frames (`list[int]`): K, and T of each window.
    """

    def __init__(self, path: Path, key: str, num_codebooks: int, frames: list[int]):
        self.path, self.num_codebooks, self.frames = path, num_codebooks, frames
        self.head = f"{key}\n".encode()
        self.windows = self._read()
        if self.windows:
            whole = len(self.head) + sum(2 * (1 + codes.size) for _, codes in self.windows)
            with open(path, "r+b") as file:
                file.truncate(whole)

    def append(self, attempt: int, codes: np.ndarray) -> None:
        """Keep the next window: attempt number and codes `(K, T)`."""
        data = np.append(attempt, codes).astype("<i2").tobytes()
        try:
            with open(self.path, "ab" if self.windows else "wb") as file:
                file.write(data if self.windows else self.head + data)
        except OSError:  # a full disk: what is kept stays, but nothing is left of a file that holds nothing
            if not self.windows:
                self.remove()
            raise
        self.windows.append((attempt, codes))

    def remove(self) -> None:
        """The output is written: the journal has done its work."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[tuple[int, np.ndarray]]:
        data = self.path.read_bytes() if self.path.is_file() else b""
        if not data.startswith(self.head):
            return []
        windows, place = [], len(self.head)
        for frames in self.frames:
            size = 1 + self.num_codebooks * frames
            if len(data) < place + 2 * size:
                break
            numbers = np.frombuffer(data, "<i2", size, place).astype(np.int64)
            windows.append((int(numbers[0]), numbers[1:].reshape(self.num_codebooks, frames)))
            place += 2 * size
        return windows


def journal_threads(path: Path) -> int | None:
    """The number of threads that the windows of a journal were made with; None if there is none."""
    try:
        with open(path, "rb") as file:
            return int(file.readline(200).split()[1])
    except (OSError, ValueError, IndexError):
        return None
