# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""One training run of one part of the codec: it goes on from its newest checkpoint as if it had never stopped.

Nothing in a step is drawn from a global generator: batches are functions of the seed and their number
(`scripts.codec.data`), revived codes come from a generator that is saved. On a CPU, a run that was stopped and one that
was not are equal bit by bit, with one process or several.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed

from modeling_midivalle import PianoListenerModel
from scripts.codec.data import CropBatches
from scripts.codec.parts import LISTENER, export_rounded
from scripts.codec.step import Learner, add, batch_that_fits
from scripts.codec.validation import validate
from scripts.training.checkpoints import Checkpoint, Checkpoints
from scripts.training.processes import (
    FolderLock,
    RunError,
    StopSignals,
    any_process,
    check_unchanged,
    rank,
    settings_of,
    sum_over_processes,
    world_size,
)
from scripts.training.run_log import RunLog, installed_trackers

GPU_SHARE = 0.7  # of its memory that a batch of "auto" fills
CPU_BATCH = 6
OF_BLOCKS = ("batch_size", "crop_seconds", "lead_seconds", "excerpt_seconds", "mixed_excerpts")  # of a recipe


class Run:
    """One training run of one objective.

    Args:
        objective: of `scripts.codec.objectives`.
        source: of `scripts.codec.data`.
        output: `step_N` (checkpoints), `log.jsonl`, `learning_curves.png`, `samples`, and `codec` or `listener`, the
            averaged weights, lie there.
        workers: processes that prepare audio.
        validation: a fixed batch, see `scripts.codec.data.fixed_batch`.
        listener: hears the validation's output; None: the objective's own, if it has one.
        about: what else must be the same when the run goes on.
        force: go on with other settings than the checkpoint's.
        card: `RunCard` of what is exported.
    """

    def __init__(
        self,
        objective,
        recipe,
        source,
        output,
        workers=0,
        validation=None,
        listener=None,
        about=None,
        force=False,
        card=None,
    ):
        self.recipe, self.source, self.output, self.workers = recipe, source, Path(output), workers
        trackers = installed_trackers(recipe.report_to)  # the processes find one another in the next line
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=trackers or None, project_dir=output)
        self.device, self.log = accelerator.device, RunLog(self.output, accelerator, recipe.steps)
        self.objective = objective.to(self.device).train()  # or cuDNN's LSTM has no gradient
        self.model = objective.model
        self.listener = listener or getattr(objective, "listener", None)
        if self.listener is not None:
            self.listener.to(self.device)
        self.validation = {k: v.to(self.device) for k, v in validation.items()} if validation else None
        self.settings, self.force, self.card = settings_of(recipe.decisive(), **(about or {})), force, card
        self.learner = Learner(objective, recipe, self.device, self.output)
        self.step, self.saved, self.crops, self.seconds, self.totals = 0, -1, 0, 0.0, {}
        self.batches, self.base, self.batch_size = 0, 0, 0  # see CropBatches

    def train(self, stop_after: float | None = None) -> None:
        """Run to the last step, for `stop_after` seconds of wall time, or until a signal; then save.

        Raises:
            RunError: the folder is in use, its settings are others, a loss is not finite, or a disk is full.
        """
        with FolderLock(self.output), StopSignals() as stop:
            checkpoints = Checkpoints(self.output)
            batches = self._begin(checkpoints.newest())
            self.log.begin(self.step, self.settings["recipe"])
            began = self.clock = time.time()
            while self.step < self.recipe.steps:
                add(self.totals, self.learner(self.step, batches))
                self.step, self.batches = self.step + 1, self.batches + self.recipe.accumulation
                self.crops += self.recipe.accumulation * self.batch_size * world_size()
                if self.step % self.recipe.log_steps == 0:
                    self._log()
                if self.step % self.recipe.save_steps == 0 or self.step == self.recipe.steps:
                    self._save(checkpoints, self.validation is not None)
                if any_process(stop.received or (stop_after and time.time() - began > stop_after)):
                    break
            self._save(checkpoints, look=False)
            self._export()  # also of a run that had ended before
            self.log.close()

    def _begin(self, found: Checkpoint | None) -> Iterator[dict[str, torch.Tensor]]:
        """Take over a checkpoint; then the batches from here on."""
        if found is not None:
            check_unchanged(found.state["settings"], self.settings, self.force)
            try:
                self.learner.load(found.tensors, found.optimizers)
            except (RuntimeError, LookupError, ValueError) as error:  # of another part or form, by --force
                raise RunError(f"{found.path}: does not fit these settings; give another --output-dir") from error
            self._take_over(found)
            found.announce()
        elif made := [path for path in self._results() if path.exists()]:
            raise RunError(f"{made[0]}: is there, but no checkpoint to go on from; give another --output-dir")
        self.log.cut(self.step)
        self.batch_size = self.batch_size or self._batch_size()
        place = (self.batch_size, self.workers, rank(), world_size(), self.base)
        return CropBatches(self.source, self.recipe, *place)(self.batches)

    def _take_over(self, found: Checkpoint) -> None:
        state = found.state
        self.step, self.saved, self.crops, self.seconds = found.step, found.step, state["crops"], state["seconds"]
        self.batches, self.base, self.batch_size = state["batches"], state["base"], state["batch_size"]
        share = world_size() / found.world_size  # sums over processes, of which there were others
        self.totals = {name: share * value for name, value in state["totals"].items()} if rank() == 0 else {}
        recipe = replace(self.recipe, **{name: state["settings"]["recipe"][name] for name in OF_BLOCKS})
        if found.world_size != world_size() or recipe != self.recipe:  # begin with blocks of what nobody has begun
            before = CropBatches(self.source, recipe, self.batch_size, 0, 0, found.world_size, self.base)
            if recipe.batch_size != self.recipe.batch_size:
                self.batch_size = self._batch_size()
            items = CropBatches(self.source, self.recipe, self.batch_size).items
            self.base, self.batches = -(-before.next_base(self.batches) * before.items // items), 0

    def _log(self) -> None:
        self._share_totals()
        figures = {k: v / world_size() / self.recipe.log_steps for k, v in self.totals.items()}
        self.totals = {}
        self.log.write(self.step, self._hours(), self.seconds, figures)

    def _share_totals(self) -> None:
        """Sums so far to the first process, and the clock forward."""
        if names := sorted(self.totals):
            totals = sum_over_processes([float(self.totals[name]) for name in names])
            self.totals = dict(zip(names, totals, strict=True)) if rank() == 0 else {}
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def _hours(self) -> float:
        return self.crops * self.recipe.crop_seconds / 3600

    def _save(self, checkpoints: Checkpoints, look: bool) -> None:
        """Validation, then a checkpoint, then the averaged weights; in this order a kill in between loses none."""
        if self.saved == self.step:
            return
        self._share_totals()
        if look and rank() == 0:
            with self.learner.averaged():
                figures, sounds = validate(self.objective, self.listener, self.validation, self.output / "samples")
            self.log.write(self.step, self._hours(), self.seconds, figures)
            self.log.show(self.step, sounds)
        state = {"settings": self.settings, "batch_size": self.batch_size, "batches": self.batches, "base": self.base}
        state |= {"seconds": self.seconds, "crops": self.crops, "totals": self.totals}
        optimizers = [optimizer.state_dict() for optimizer in self.learner.optimizers]
        checkpoints.save(self.step, self.learner.tensors(), optimizers, state)
        self.saved = self.step
        self._export()
        self.log.draw(last=self.step == self.recipe.steps)

    def _results(self) -> tuple[Path, Path]:
        """Where a listener, and where a codec is written."""
        return self.output / LISTENER, self.output / "codec"

    def _export(self) -> None:
        if rank() != 0:
            return
        listener, codec = self._results()
        folder = listener if isinstance(self.model, PianoListenerModel) else codec
        path, card = f"{self.output.resolve().name}/{folder.name}", None
        if self.card is not None:
            card = self.card.text(path, self.step, self.log.validated(self.step))
        export_rounded(self.learner.average, self.model.config, folder, card)

    def _batch_size(self) -> int:
        if self.recipe.batch_size != "auto":
            return self.recipe.batch_size
        if self.device.type != "cuda":
            return CPU_BATCH

        batch = next(CropBatches(self.source, self.recipe, 4)())

        def memory_of(size: int) -> int:
            return self.learner.memory_of({name: value[:size] for name, value in batch.items()})

        limit = GPU_SHARE * torch.cuda.get_device_properties(self.device).total_memory
        size = batch_that_fits(memory_of, limit)
        if world_size() > 1:  # the smallest of all
            sizes = torch.tensor(size, device=self.device)
            distributed.all_reduce(sizes, distributed.ReduceOp.MIN)
            size = int(sizes)
        return size
