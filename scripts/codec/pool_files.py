# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The files of a pool of audio in the making; who was interrupted goes on where it stopped."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from scripts.audio.rendered_audio import all_codes
from scripts.training.processes import FolderLock, RunError, changed_settings
from scripts.unfinished import check_output_folder, write_json


class PoolFiles:
    """Arrays that are filled item by item, and get their names when all of them are whole. A context manager: while it
    is entered, no other process can make the same pool.

    `POOL.state.json` tells how many items are done, and of which settings; it stays beside the finished pool.

    Args:
        files: shape, items first, and type of each array; the audio, which the pool is named after, first.
        settings: what decides the items.
    Attributes:
        done: how many items there are.
    Raises:
        RunError: no name of a pool; or when entered: another process is at work, the pool was begun or made with other
            settings, or codes of an earlier pool lie there.
        WriteError: see `check_output_folder`.
    """

    def __init__(self, files: dict[Path, tuple[tuple[int, ...], type]], settings: dict):
        self.files, self.settings, self.done = files, settings, 0
        self.output = next(iter(files))
        self.items = files[self.output][0][0]
        if self.output.suffix != ".npy":
            raise RunError(f"{self.output}: is no name of a pool; give an --output that ends in .npy")
        check_output_folder(self.output.parent, "--output")
        self.state = self.output.with_suffix(".state.json")
        self._lock = FolderLock(self.output.parent, self.output.name)

    def __enter__(self) -> "PoolFiles":
        self._lock.__enter__()
        try:
            self._open()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._lock.__exit__()

    def _open(self) -> None:
        state = self._read_state()
        if self.output.exists() and (state is None or state["done"] < self.items):
            raise RunError(f"{self.output}: exists already; delete it, or give another --output")
        if changed := state and changed_settings(state["settings"], self.settings):
            which = f"{self.output}: another pool was made or begun here ({changed})"
            raise RunError(f"{which}; delete it and {self.state.name}, or give another --output")
        if state and all(file.exists() or _temporary(file).exists() for file in self.files):
            self.done = state["done"]
        if not self.done and (codes := [path for path in all_codes(self.output) if path not in self.files]):
            raise RunError(f"{codes[0]}: is of an earlier {self.output.name}; delete it, or give another --output")
        if not self.done:
            self.state.unlink(missing_ok=True)  # from here on it would speak of files that are empty
        if self.done < self.items:
            self.arrays = [self._array(file, *kind) for file, kind in self.files.items()]

    def _array(self, file: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        temporary, mode = _temporary(file), "r+" if self.done else "w+"
        try:
            array = np.lib.format.open_memmap(temporary, mode=mode, shape=shape, dtype=dtype)
            with open(temporary, "r+b") as taken:  # a disk that is too full is to be known now, not at its last byte
                os.posix_fallocate(taken.fileno(), 0, temporary.stat().st_size)
        except (OSError, OverflowError, ValueError) as error:
            for begun in () if self.done else self.files:
                _temporary(begun).unlink(missing_ok=True)
            size = np.prod(shape, dtype=float) * np.dtype(dtype).itemsize
            reason = getattr(error, "strerror", error)
            raise RunError(f"{file}: its {size / 1e6:.0f} MB cannot be written ({reason})") from error
        return array

    def _read_state(self) -> dict | None:
        if not self.state.exists():
            return None
        try:
            state = json.loads(self.state.read_text())
            return {"settings": dict(state["settings"]), "done": int(state["done"])}
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.state}: is damaged; delete it, and the pool is begun anew") from error

    def add(self, found: list[np.ndarray], done: int) -> None:
        """The next items, in the order of `files`; they are on disk when the state says so."""
        fill(self.arrays, found, range(self.done, done))
        self.advance(done)

    def advance(self, done: int) -> None:
        """The next items, which another process has filled in (`open_arrays`)."""
        self.done = done
        write_json(self.state, {"settings": self.settings, "done": done})

    def finish(self) -> None:
        """Give the files their names; again, if that was interrupted."""
        for file in reversed(self.files):  # the audio last: with it, all are there
            if _temporary(file).exists():
                os.replace(_temporary(file), file)


def open_arrays(files: Iterable[Path]) -> list[np.ndarray]:
    """The arrays of a pool in the making, for a process of whoever has entered it."""
    return [np.load(_temporary(file), mmap_mode="r+") for file in files]


def fill(arrays: list[np.ndarray], found: list[np.ndarray], items: range) -> None:
    """Write `items`, in the order of the pool's files, to disk."""
    for array, values in zip(arrays, found, strict=True):
        array[items.start : items.stop] = values
        array.flush()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
