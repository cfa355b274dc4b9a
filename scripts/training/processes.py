# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What the processes of a training run agree on: folder, signals, settings, sums and errors; for every trainer.

Each function works in a lone process too. With several, all of them must call it.
"""

import fcntl
import json
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import distributed

LOCK = ".lock"
VERSIONS = ("torch", "transformers", "accelerate", "numpy", "safetensors")
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # a full disk is any of them, by who writes


class RunError(ValueError):
    """A run that cannot start or go on: folder in use, settings changed, nothing whole, disk full; one sentence."""


class FolderLock:
    """A run's folder is this run's until its first process ends, however it ends. A context manager.

    Args:
        name: of a file in the folder, if it is only that file which is the run's.
    Raises:
        RunError: a living process has the folder; the message names its pid.
    """

    def __init__(self, folder: str | Path, name: str = ""):
        self.folder, self.name, self._file = Path(folder), name, None

    def __enter__(self) -> "FolderLock":
        together(self._take)
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def _take(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / (f".{self.name}{LOCK}" if self.name else LOCK), "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies: never stale
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            place = self.folder / self.name
            raise RunError(f"{place}: another run is at work here (pid {owner}); wait or stop it") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file


class StopSignals:
    """SIGTERM and SIGINT as a flag, `received`: the trainer saves and leaves within seconds. A context manager; a
    second SIGINT interrupts at once."""

    def __init__(self):
        self.received: str | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def run_errors() -> Iterator[None]:
    """What befalls the processes of a run as RunError of one sentence: an error of a `DataLoader`'s worker, in its own
    words; the death of one, which torch raises wherever the process is; a GPU whose memory is full."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        said = str(error).strip()
        if isinstance(error, torch.OutOfMemoryError):
            raise RunError("the memory of the GPU is full; give smaller batches, or free it") from error
        if "DataLoader worker (pid" in said:
            raise RunError("a worker process died (out of memory?); start again, what is finished is kept") from error
        if "Original Traceback" in said and not isinstance(error, RuntimeError):  # that would be a bug
            raise RunError(said.splitlines()[-1].split(": ", 1)[-1]) from error
        raise


def settings_of(recipe: dict, **more) -> dict:
    """What a resumed run must have in common with its checkpoint, for its state: recipe, more, library versions."""
    found = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return json.loads(json.dumps({"recipe": recipe} | more | {"versions": found}))  # tuples become lists, as read back


def check_unchanged(recorded: dict, now: dict, force: bool = False) -> None:
    """Refuse to go on with other settings than the checkpoint's, unless forced; then the changes are printed.

    Raises:
        RunError: names each changed setting with both values.
    """
    changed = changed_settings(recorded, now)
    if changed and not force:
        raise RunError(f"settings differ from the checkpoint's: {changed} (--force goes on with them)")
    if changed and rank() == 0:
        print(f"forced: {changed}", flush=True)


def changed_settings(recorded: dict, now: dict) -> str:
    """Each setting that is not as it was, with both values; empty if there is none."""
    before, after = _flat(recorded), _flat(now)
    return "; ".join(
        f"{key} was {before.get(key)}, is {after.get(key)}"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    )


def follow_parent(*_) -> None:
    """In a process of `multiprocessing`: end as soon as the one that started it ends, however it ends, and leave
    Ctrl-C, which a terminal sends to both, to that one. Does nothing in any other process; takes what a `DataLoader`
    tells its workers."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def together(action: Callable, everywhere: bool = False):
    """Result of `action` on the first process, for all; with `everywhere` every process does it.

    Raises:
        RunError: on every process, if `action` failed on one: its RunError, or what a full disk raises.
    """
    result = error = None
    if everywhere or rank() == 0:
        try:
            result = action()
        except (RunError, *WRITE_ERRORS) as caught:
            error = " ".join(str(caught).split()) or type(caught).__name__
    if world_size() > 1:
        answers = [None] * world_size()
        distributed.all_gather_object(answers, (result if rank() == 0 else None, error))
        result, error = answers[0][0], next((e for _, e in answers if e), None)
    if error:
        raise RunError(error)
    return result


def sum_over_processes(values: list[float]) -> list[float]:
    """The sums of `values` over all processes, on each of them; float64."""
    if world_size() == 1:
        return values
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return total.tolist()


def any_process(flag) -> bool:
    """Whether `flag` is true on any process."""
    return sum_over_processes([float(bool(flag))])[0] > 0


def rank() -> int:
    """Number of this process, 0 for the first."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _flat(value: dict, prefix: str = "") -> dict:
    flat = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{prefix}{key}.") if isinstance(entry, dict) else {f"{prefix}{key}": entry}
    return flat
