# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""One optimiser step of one part of the codec, with one process or several; and all of its state.

Gradients are averaged over processes by hand: the discriminator is used twice in a step and frozen once, the decoder's
first steps leave most of it without gradients, and `DistributedDataParallel` wants neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

from scripts.codec.discriminator import MultiScaleSTFTDiscriminator, discriminator_loss, generator_losses
from scripts.codec.objectives import DecoderObjective, WholeObjective
from scripts.codec.quantizer import ema_update
from scripts.codec.recipe import CodecRecipe
from scripts.training.muon import Muon
from scripts.training.processes import RunError, any_process, rank, world_size
from scripts.training.schedules import warmup_cosine
from scripts.unfinished import set_usual_mode

DISCRIMINATOR_BETAS = (0.5, 0.9)
LARGEST_BATCH = 128  # that "auto" takes: beyond, a step says little more than half of it


class Learner:
    """An objective, its optimisers, the discriminator, if there is one, and the averaged weights.

    Args:
        objective: of `scripts.codec.objectives`, on its device.
        output: where a batch is written that gave no finite loss.
    """

    def __init__(self, objective, recipe: CodecRecipe, device: torch.device, output: Path):
        self.objective, self.model = objective, objective.model
        self.recipe, self.device, self.output = recipe, device, output
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        if recipe.optimizer == "muon":  # a listener's last layer learns sooner by Adam: onset loss 0.024, not 0.031
            last = {id(p) for name, p in objective.named_parameters() if name.startswith("model.last.")}
            hidden = {"params": [p for p in self.trained if id(p) not in last]}
            heads = {"params": [p for p in self.trained if id(p) in last], "momentum": None}
            groups = [group for group in (hidden, heads) if group["params"]]
            self.optimizers = [Muon(groups, recipe.learning_rate, betas=recipe.betas)]
        else:
            self.optimizers = [torch.optim.Adam(self.trained, recipe.learning_rate, recipe.betas)]
        self.discriminator = None
        if recipe.adversarial_from is not None and isinstance(objective, DecoderObjective | WholeObjective):
            torch.manual_seed(recipe.seed)
            self.discriminator = MultiScaleSTFTDiscriminator().to(device)
            rate = recipe.discriminator_learning_rate
            self.optimizers.append(torch.optim.Adam(self.discriminator.parameters(), rate, DISCRIMINATOR_BETAS))
        self.generator = torch.Generator().manual_seed(recipe.seed)  # of revived codes
        if world_size() > 1:  # what began by a random start is the first process's
            for value in self.model.state_dict().values():
                distributed.broadcast(value, 0)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state but that of the optimisers."""
        found = {f"live.{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"average.{k}": v for k, v in self.average.items()} | {"generator": self.generator.get_state()}
        if self.discriminator is not None:
            found |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        return found

    def load(self, tensors: dict[str, torch.Tensor], optimizers: list[dict]) -> None:
        """Take over what `tensors` and the optimisers' `state_dict` gave."""
        self.model.load_state_dict(_part(tensors, "live."))
        self.average = {k: v.to(self.device) for k, v in _part(tensors, "average.").items()}
        self.generator.set_state(tensors["generator"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(_part(tensors, "discriminator."))
        for optimizer, values in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(values)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, for a while."""
        live = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(live)

    def __call__(self, step: int, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Do step number `step` on the next `accumulation` batches; returns losses and the gradient's norm.

        Raises:
            RunError: a loss or gradient is not finite, on any process; nothing has moved.
        """
        recipe, losses, self.step = self.recipe, {}, step
        if isinstance(self.objective, DecoderObjective):
            self.objective.step.fill_(step)
        share = warmup_cosine(step, recipe.warmup_steps, recipe.steps, recipe.final_learning_rate_share)
        for optimizer, rate in zip(self.optimizers, (recipe.learning_rate, recipe.discriminator_learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.zero_grad()
        pairs = []
        for _ in range(recipe.accumulation):
            batch = {k: v.to(self.device, non_blocking=True) for k, v in next(batches).items()}
            found, output = self._forward(batch)
            pairs.append((output, batch["input_values"]))
            add(losses, found, 1 / recipe.accumulation)
        _average_gradients(self.trained)
        losses["gradient"] = torch.nn.utils.clip_grad_norm_(self.trained, recipe.clip_norm)
        if not torch.isfinite(losses["gradient"]):  # the same on all processes
            raise self._not_finite("the gradient", losses, batch)
        self.optimizers[0].step()
        if updates := getattr(self.objective, "updates", None):
            dead = recipe.dead_code * world_size()
            losses["revived"] = ema_update(self.model.quantizer, updates, recipe.codebook_decay, dead, self.generator)
            updates.clear()
        if self._adversarial(pairs[0][0]):
            losses["discriminator"] = self._train_discriminator(pairs)
        self._move_average()
        return losses

    def _forward(self, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Losses and output of one batch; its gradients are added."""
        losses, output = self.objective(batch)
        if self._adversarial(output):
            losses |= generator_losses(self.discriminator, output, batch["input_values"])
        total = sum(self.recipe.weights[name] * value for name, value in losses.items())
        if any_process(not torch.isfinite(total)):
            raise self._not_finite("a loss", losses, batch)
        (total / self.recipe.accumulation).backward()
        return {k: v.detach() for k, v in losses.items()}, output.detach() if output is not None else None

    def _not_finite(self, what: str, losses: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> RunError:
        path = self.output / f"bad_batch_{rank()}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in batch.items()}, path)
        set_usual_mode(path)
        values = {name: value.item() for name, value in losses.items()}
        return RunError(
            f"{what} of step {self.step} is not finite ({values}); its batch is {path}, the newest checkpoint is of "
            "before: look at the batch, or lower learning_rate in a new run"
        )

    def _adversarial(self, output: torch.Tensor | None) -> bool:
        return self.discriminator is not None and output is not None and self.step >= self.recipe.adversarial_from

    def _train_discriminator(self, pairs: list) -> torch.Tensor:
        total = 0.0
        for output, wave in pairs:
            loss = discriminator_loss(self.discriminator, output, wave) / len(pairs)
            loss.backward()
            total = total + loss.detach()
        _average_gradients(self.discriminator.parameters())
        self.optimizers[1].step()
        return total

    @torch.no_grad()
    def _move_average(self) -> None:
        decay = min(self.recipe.average_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if "codebook" in name:
                self.average[name].copy_(value)  # an average already
            else:
                self.average[name].lerp_(value, 1 - decay)

    def memory_of(self, batch: dict[str, torch.Tensor]) -> int:
        """Bytes that a step with such a batch takes on the GPU; gradients and updates are thrown away."""
        torch.cuda.reset_peak_memory_stats(self.device)
        batch = {k: v.to(self.device) for k, v in batch.items()}
        if isinstance(self.objective, DecoderObjective):
            self.objective.step.fill_(self.recipe.sing_steps)  # later steps take more
        losses, output = self.objective(batch)
        if self.discriminator is not None and output is not None:
            losses |= generator_losses(self.discriminator, output, batch["input_values"])
        sum(losses.values()).backward()
        for parameter in self.trained:
            parameter.grad = None
        getattr(self.objective, "updates", []).clear()
        return torch.cuda.max_memory_allocated(self.device)


def batch_that_fits(memory_of, limit: float) -> int:
    """The largest batch, at most `LARGEST_BATCH`, whose memory by `memory_of(size)`, a line through 2 and 4, is within
    `limit`; from 8 on a multiple of 8."""
    two, four = memory_of(2), memory_of(4)
    each = max((four - two) / 2, 1)
    size = int(min((limit - two) // each + 2, LARGEST_BATCH))
    if size < 1:
        raise RunError(f"not even one crop fits: a batch of 2 takes {two / 2**30:.1f} GiB; lower crop_seconds")
    return size - size % 8 if size >= 8 else size


def _average_gradients(parameters) -> None:
    """Of all processes; each has used as many crops."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def add(totals: dict, values: dict, share: float = 1.0) -> None:
    """Add `share` of each of `values` to `totals`."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + share * value


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
