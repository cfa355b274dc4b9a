# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The finished windows of a render on disk, so that an interrupted one goes on where it stopped."""

import fcntl
import zlib
from pathlib import Path

import numpy as np

from scripts.rendering.manifest import MOST_THREADS

FORMAT = "crc32"  # behind the key: a file without it is of a version whose windows cannot be checked
CHECK_SIZE = 4


class Journal:
    """A file of one line, the key of what is rendered, and after it the frames of each finished window.

    A window is written whole, in words of 16 bits: the number of the attempt that was kept, codes `(K, T)`, and where
    the model has them mean vectors `(A, T)` as float16; then the CRC-32 of all that. What a kill has cut short is
    dropped when the file is opened again; from a damaged window on, all are, and a file with another key is started
    anew, both with a remark. From its first window on the file is one render's until that closes it or ends, however
    it ends.

    Args:
        path (`Path`): A hidden file beside the output.
        key (`str`): Says all that decides the sound, in one line; see `scripts.rendering.manifest`.
        num_codebooks (`int`), frames (`list[int]`): K, and T of each window.
        axes (`int`): A; 0 for models without mean vectors.

    Attributes:
        windows (`list[tuple]`): Attempt, codes and vectors (or None) of each finished window.
        remark (`str`): One sentence on what is there and not used; empty if all of it is.

    Raises:
        ValueError: another render is writing the file, or it cannot be used; from `append` too.
    """

    def __init__(self, path: Path, key: str, num_codebooks: int, frames: list[int], axes: int = 0):
        self.path, self.num_codebooks, self.frames, self.axes = path, num_codebooks, frames, axes
        self.head = f"{key} {FORMAT}\n".encode()
        self.lock, self.windows, self.remark = None, [], ""
        if path.is_file():
            self._take()
            self.windows = self._read()
        if self.windows:
            whole = len(self.head) + sum(map(self._size, frames[: len(self.windows)]))
            with open(path, "r+b") as file:
                file.truncate(whole)

    def append(self, attempt: int, codes: np.ndarray, vectors: np.ndarray | None = None) -> None:
        """Keep the next window: attempt number, codes `(K, T)`, vectors `(A, T)`."""
        if self.lock is None:
            self._take()
        data = np.append(attempt, codes).astype("<i2").tobytes()
        data += b"" if vectors is None else vectors.astype("<f2").tobytes()
        data += _check(data)
        try:
            with open(self.path, "ab" if self.windows else "wb") as file:
                file.write(data if self.windows else self.head + data)
        except OSError as error:  # a full disk: what is kept stays, but nothing is left of a file that holds nothing
            if not self.windows:
                self.remove()
            raise ValueError(
                f"{self.path}: cannot be written ({error.strerror}); make room, and start again to go on"
            ) from error
        self.windows.append((attempt, codes, vectors))

    def remove(self) -> None:
        """The output is written: the journal has done its work."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Another render may go on with the file."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def _take(self) -> None:
        try:
            self.lock = open(self.path, "ab")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies
        except BlockingIOError as error:
            self.close()
            output = self.path.name.removeprefix(".").removesuffix(".windows")
            raise ValueError(f"{output}: another render is making it; wait for it or stop it") from error
        except OSError as error:  # of another user; a file system without locks
            self.close()
            raise ValueError(
                f"{self.path}: cannot be used ({error.strerror or error}); move it away or choose another folder"
            ) from error

    def _size(self, frames: int) -> int:
        """Bytes of a window."""
        return 2 * (1 + (self.num_codebooks + self.axes) * frames) + CHECK_SIZE

    def _read(self) -> list[tuple[int, np.ndarray, np.ndarray | None]]:
        data, name = self.path.read_bytes(), self.path.name
        if not data.startswith(self.head):
            if not self.head.startswith(data):  # else it was cut short before its first window
                self.remark = f"{name}: is of other settings or another version, or damaged: windows are made anew"
            return []
        windows, place = [], len(self.head)
        for number, frames in enumerate(self.frames, 1):
            window = data[place : place + self._size(frames)]
            if len(window) < self._size(frames):
                break
            if _check(window[:-CHECK_SIZE]) != window[-CHECK_SIZE:]:
                self.remark = f"{name}: window {number} is damaged: it and those behind it are made anew"
                break
            count, vectors = 1 + self.num_codebooks * frames, None
            numbers = np.frombuffer(window, "<i2", count).astype(np.int64)
            if self.axes:
                vectors = np.frombuffer(window, "<f2", self.axes * frames, 2 * count).astype(np.float16)
                vectors = vectors.reshape(self.axes, frames)
            windows.append((int(numbers[0]), numbers[1:].reshape(self.num_codebooks, frames), vectors))
            place += self._size(frames)
        return windows


def _check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECK_SIZE, "little")


def journal_path(output: Path) -> Path:
    """The hidden file beside an output that holds its finished windows until it is written."""
    return output.with_name(f".{output.name}.windows")


def journal_threads(path: Path) -> int | None:
    """The number of threads that the windows of a journal were made with; None if it tells none that can be."""
    try:
        with open(path, "rb") as file:
            threads = int(file.readline(200).split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return threads if 1 <= threads <= MOST_THREADS else None
