# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Checkpoints of a training run that survive a kill at any moment, a full disk and damage; for every trainer.

A run's folder holds `step_NNNNNNN` (inside an accumulation window `step_NNNNNNN_MMM`), each written beside, synced to
disk and renamed, so that a name that exists is whole unless its bytes have changed since; `MANIFEST.json` tells.

    with FolderLock(output), StopSignals() as stop:           # scripts.training.processes
        checkpoints = Checkpoints(output, keep=2)             # on every process of the run
        if found := checkpoints.newest():                     # says which ones are damaged
            check_unchanged(found.state["settings"], settings, force)
            ...                                               # load found.tensors, .optimizers, .state
            restore_gradients(model, found.gradients)
            found.announce()
        first = next(batches)
        if found: found.restore_rng()                         # last, just before the first forward pass
        while ...:
            checkpoints.save(step, tensors, optimizers, state, gradients_of(model), micro_step)
            if any_process(stop.received): break
"""

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.training.processes import RunError, rank, together, world_size
from scripts.unfinished import set_usual_mode
from scripts.wording import counted

MANIFEST = "MANIFEST.json"
TENSORS, OPTIMIZERS, STATE = "tensors.safetensors", "optimizers.pt", "state.json"


@dataclass
class Checkpoint:
    """What `Checkpoints.newest` found, in host memory.

    Args:
        path (`Path`): its folder.
        step, micro_step (`int`): optimiser steps done, and batches done of the window that is open (0: none).
        world_size (`int`): processes that wrote it.
        tensors (`dict`): as given to `save`.
        optimizers (`list`), state (`dict`): likewise.
        gradients (`dict`): of this process, by parameter; if the number of processes has changed, the sum of all of
            them on the first process and nothing on the others (so gradients must be sums, not means).
    """

    path: Path
    step: int
    micro_step: int
    world_size: int
    tensors: dict[str, torch.Tensor]
    optimizers: list[dict]
    state: dict
    gradients: dict[str, torch.Tensor]

    def announce(self) -> None:
        """Say that the run goes on from here; for when nothing is left that could refuse it."""
        if rank() == 0:
            print(f"continuing from {self.path}", flush=True)

    def restore_rng(self) -> bool:
        """Set the random states of torch, CUDA, NumPy and Python; `False`, and no change, on a process that was not
        there when the checkpoint was written."""
        path = self.path / rank_file(rank())
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("rng.")}
            rest = json.loads(file.metadata()["rng"])
        torch.set_rng_state(tensors["rng.torch"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        keys = tensors["rng.numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, *rest["numpy"]))
        random.setstate((rest["python"][0], tuple(tensors["rng.python"].tolist()), rest["python"][1]))
        return True


class Checkpoints:
    """The checkpoints of one run. All processes make one and call `save` and `newest` together.

    Args:
        folder (`str` or `Path`): of the run, shared by its processes.
        keep (`int`, defaults to 2): how many whole checkpoints stay.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise RunError(f"at least one checkpoint must be kept, not {keep}")
        self.folder, self.keep = Path(folder), keep
        self._verified: set[str] = set()

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        optimizers: list[dict],
        state: dict,
        gradients: dict[str, torch.Tensor] | None = None,
        micro_step: int = 0,
    ) -> Path:
        """Write one checkpoint, then delete all but the newest `keep` whole ones. One that is there already stays.

        Args:
            step (`int`), micro_step (`int`, defaults to 0): as in `Checkpoint`.
            tensors (`dict`): weights, averages, buffers by name; those of the first process count.
            optimizers (`list` of `dict`): `state_dict()` of each, tensors and numbers; those of the first process.
            state (`dict`): anything JSON holds exactly; that of the first process.
            gradients (`dict`, *optional*): of this process, sums so far of the open window.

        Raises:
            RunError: on all processes, if one of them could not write (disk full); older ones are as they were.
        """
        name = f"step_{step:07d}" + (f"_{micro_step:03d}" if micro_step else "")
        temporary, target = self.folder / f".{name}.tmp", self.folder / name

        def begin():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def write():
            _write_rank_file(temporary / rank_file(rank()), gradients or {})
            if rank() == 0:
                copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
                save_file(copies, temporary / TENSORS)
                torch.save(optimizers, temporary / OPTIMIZERS)
                (temporary / STATE).write_text(json.dumps(state))

        def finish():
            numbers = {"step": step, "micro_step": micro_step, "world_size": world_size()}
            _write_manifest(temporary, numbers)
            shutil.rmtree(target, ignore_errors=True)  # only ever a damaged one
            temporary.rename(target)
            _sync(self.folder)
            self._verified.add(name)
            self._drop_old()

        if together(lambda: self._whole(target)):
            return target
        try:
            together(begin)
            together(write, everywhere=True)
            together(finish)
        except RunError as error:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise self._not_written(name, tensors, optimizers, error) from error
        return target

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, read and checked; `None` in a new run. Damaged ones are named and passed over.

        Raises:
            RunError: there are checkpoints, and none of them is whole.
        """
        path = together(self._choose)
        if path is None:
            return None
        numbers = json.loads((path / MANIFEST).read_text())
        gradients = {}
        if numbers["world_size"] == world_size():
            gradients = _gradients(path / rank_file(rank()))
        elif rank() == 0:
            for other in range(numbers["world_size"]):
                for name, value in _gradients(path / rank_file(other)).items():
                    gradients[name] = gradients[name] + value if name in gradients else value
        optimizers = torch.load(path / OPTIMIZERS, map_location="cpu", weights_only=True)
        state = json.loads((path / STATE).read_text())
        places = [numbers[key] for key in ("step", "micro_step", "world_size")]
        return Checkpoint(path, *places, load_file(path / TENSORS), optimizers, state, gradients)

    def _choose(self) -> Path | None:
        for stale in self.folder.glob(".step_*.tmp"):  # of a kill during saving
            shutil.rmtree(stale)
        damaged = []
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            if (wrong := damage(path)) is None:
                self._verified.add(path.name)
                print("".join(f"passed over: {one}\n" for one in damaged), end="", flush=True)
                return path
            damaged.append(f"{path.name} ({wrong})")
        if damaged:
            raise RunError(f"{self.folder}: no checkpoint is whole: {', '.join(damaged)}; start in a new folder")
        return None

    def _whole(self, path: Path) -> bool:
        if path.name not in self._verified and damage(path) is None:
            self._verified.add(path.name)
        return path.is_dir() and path.name in self._verified

    def _drop_old(self) -> None:
        whole = [path for path in sorted(self.folder.glob("step_*")) if self._whole(path)]
        for path in whole[: -self.keep]:
            doomed = path.with_name(f".{path.name}.tmp")  # a kill meanwhile leaves nothing that looks damaged
            path.rename(doomed)
            shutil.rmtree(doomed)

    def _not_written(self, name: str, tensors: dict, optimizers: list, error: Exception) -> RunError:
        states = [value for one in optimizers for entry in one["state"].values() for value in entry.values()]
        held = [*tensors.values(), *(value for value in states if isinstance(value, torch.Tensor))]
        needed = sum(value.numel() * value.element_size() for value in held)
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        kept = [path.name for path in sorted(self.folder.glob("step_*")) if self._whole(path)]
        last = f"{kept[-1]} is whole, the run can go on from it" if kept else "there is no earlier one"
        space = f"it needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
        return RunError(f"{self.folder / name} could not be written ({error}): {space}; {last}")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; `None` if every file is there with the recorded size and sha256."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        numbers = [int(manifest[key]) for key in ("step", "micro_step", "world_size")]
        recorded = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    if missing := set(file_names(numbers[-1])) - set(recorded):
        return f"{MANIFEST} lacks {', '.join(sorted(missing))}"
    for name, (size, digest) in recorded.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {counted(file.stat().st_size, 'byte')}, not {size}"
        if _sha256(file) != digest:
            return f"{name} has changed"
    return None


def file_names(processes: int) -> list[str]:
    """Files that a checkpoint of `processes` must hold, beside its manifest."""
    return [TENSORS, OPTIMIZERS, STATE, *map(rank_file, range(processes))]


def rank_file(process: int) -> str:
    """Name of what is one process's own: gradients of an open window, random states."""
    return f"rank_{process:04d}.safetensors"


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of an open accumulation window by parameter name; those that are `None` are left out."""
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def restore_gradients(model: torch.nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    """Put back what `gradients_of` gave."""
    for name, value in model.named_parameters():
        value.grad = gradients[name].to(value.device) if name in gradients else None


def _write_rank_file(path: Path, gradients: dict[str, torch.Tensor]) -> None:
    name, keys, *numpy_rest = np.random.get_state()
    python_version, python_keys, gauss = random.getstate()
    tensors = {f"gradient.{k}": v.detach().to("cpu", copy=True).contiguous() for k, v in gradients.items()}
    tensors |= {"rng.torch": torch.get_rng_state(), "rng.numpy": torch.from_numpy(keys.astype(np.int64))}
    tensors["rng.python"] = torch.tensor(python_keys, dtype=torch.int64)
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    rest = {"numpy": [int(numpy_rest[0]), int(numpy_rest[1]), float(numpy_rest[2])], "python": [python_version, gauss]}
    save_file(tensors, path, metadata={"rng": json.dumps(rest)})


def _gradients(path: Path) -> dict[str, torch.Tensor]:
    return {name[9:]: value for name, value in load_file(path).items() if name.startswith("gradient.")}


def _write_manifest(folder: Path, numbers: dict) -> None:
    files = {}
    for name in file_names(numbers["world_size"]):
        set_usual_mode(folder / name)
        _sync(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(numbers | {"files": files}, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
