# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""One training run of one decoder, on one process or several, that goes on after any interruption as if without it."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

from processing.processing_midivalle import FRAME_RATE
from scripts.decoders.objectives import DecoderLosses
from scripts.decoders.optimizers import make_optimizer
from scripts.decoders.recipe import TrainRecipe
from scripts.decoders.sharding import drop_unused, gather, is_sharded, make_accelerator, prepare, share, share_optimizer
from scripts.decoders.validation import codes_played, figures, sounds
from scripts.training.checkpoints import Checkpoints, gradients_of, restore_gradients
from scripts.training.processes import RunError, any_process, check_unchanged, settings_of, sum_over_processes, together
from scripts.training.publishing import export
from scripts.training.run_log import RunLog, installed_trackers
from scripts.training.schedules import eden, phase, warmup_cosine
from scripts.unfinished import set_usual_mode

KEPT = ("settings", "frames", "seconds", "window", "logged", "usual", "skipped", "best")  # of a run's fields


class BadLossError(FloatingPointError):
    """A loss or gradient that is not finite, or a loss that explodes, where the recipe does not pass over it."""


class Run:
    """One training run of one decoder: `resume`, then `train`.

    Args:
        recipe (`TrainRecipe`), part (`str`): what to train, and how; `"ar"` or `"nar"`.
        core: the decoder.
        stream (`TrainingStream`): this process's batches.
        validation (`list` of batches): the same on every process.
        codebooks (`torch.Tensor` of shape `(K, codebook_size, D)`): of the codec.
        output (`Path`): folder of the run.
        data (`dict`): what tells the data from others; a resumed run must have the same.
        codec (`str` or `Path`, *optional*): folder of the codec; without it trackers get no sound.
        tokenizer (`MidiValleTokenizer`, *optional*): what notes are read with; saved beside the weights.
        card (`RunCard`, *optional*): likewise.
    Raises:
        RunError: see `make_accelerator`.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        part: str,
        core,
        stream,
        validation,
        codebooks,
        output,
        data=None,
        codec=None,
        tokenizer=None,
        card=None,
    ):
        self.recipe, self.part, self.stream, self.output, self.codec = recipe, part, stream, Path(output), codec
        trackers = installed_trackers(recipe.report_to)
        self.accelerator = make_accelerator(log_with=trackers or None, project_dir=output)
        self.shows_samples = bool(trackers and codec and validation and recipe.sample_seconds)
        self.core, self.tokenizer, self.card = core, tokenizer, card
        if recipe.gradient_checkpointing:
            core.activation_checkpointing_enable({"use_reentrant": False})
        losses = DecoderLosses(core, codebooks, recipe)
        optimizer = make_optimizer(recipe.optimizer, core, recipe.learning_rate, recipe.betas, recipe.weight_decay)
        self.losses, self.optimizer = prepare(self.accelerator, losses, optimizer, "measure", "play")
        self.sharded = is_sharded(self.losses)
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        set_seed(recipe.seed + 1_000_003 * (1 + self.accelerator.process_index))  # dropout differs by process
        self.average = {k: v.detach().clone() for k, v in core.state_dict().items()}
        self.validation = [{k: v.to(self.device) for k, v in batch.items()} for batch in validation]
        self.log = RunLog(self.output, self.accelerator, recipe.steps)
        self.checkpoints = Checkpoints(self.output, recipe.save_total_limit)
        self.settings = settings_of(recipe.binding(), part=part, data=data or {})
        self.step, self.micro_step, self.frames, self.seconds = 0, 0, 0.0, 0.0
        self.window, self.logged = {}, {}  # sums over the open window; over the steps since the last row of the log
        self.window_batches, self.window_rows = [], []  # of this process
        self.usual, self.skipped, self.best = {}, 0, None
        self.resumed, self._clock = None, time.time()

    def resume(self, force: bool = False) -> None:
        """Go on from the newest whole checkpoint of `output`, if there is one.

        Raises:
            RunError: recipe, data or versions have changed and `force` is not given; no checkpoint is whole; or none is
                there, but weights that a run has left.
        """
        found = self.checkpoints.newest()
        if found is None:
            if made := [path for name in ("model", "best") if (path := self.output / name).exists()]:
                raise RunError(f"{made[0]}: is there, but no checkpoint to go on from; give another --output-dir")
            self.log.cut(0)
            return
        check_unchanged(found.state["settings"], self.settings, force)
        self.log.cut(found.step)
        if self.sharded and found.micro_step:
            raise RunError(f"{found.path}: FSDP cannot go on within a window; go on without it to the next checkpoint")
        like = {f"{kind}.{k}": v for kind in ("model", "average") for k, v in self.core.state_dict().items()}
        try:
            tensors = {name: share(value, like[name]) for name, value in found.tensors.items()}
            self.core.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            self.optimizer.load_state_dict(share_optimizer(found.optimizers[0], self.optimizer))
            restore_gradients(self.core, found.gradients)
        except (RuntimeError, LookupError, ValueError) as error:  # of another part or form, by --force
            raise RunError(f"{found.path}: does not fit these settings; give another --output-dir") from error
        self.average = {k[8:]: v for k, v in tensors.items() if k.startswith("average.")}
        self.step, self.micro_step = found.step, found.micro_step
        for name in KEPT[1:]:
            setattr(self, name, found.state[name])
        self.stream.load_state_dict(found.state["stream"] | {"seed": self.stream.seed})  # another one by --force
        found.tensors, found.optimizers, found.gradients = {}, [], {}  # only the random states are still to come
        self.resumed = found
        found.announce()
        self._export(gather(self.average))  # a kill may have come between checkpoint and folders

    def train(self, stop=lambda: False) -> bool:
        """Run to the last step, or until `stop()` is true on any process; then save. Whether the last step was done.

        Raises:
            BadLossError: see `TrainRecipe.on_bad_loss`.
            RunError: a checkpoint could not be written.
        """
        self.log.begin(self.step, self.settings["recipe"], part=self.part)
        batches, self._clock = self._batches(), time.time()
        self.losses.train()
        stopped, first = False, self.step
        while self.step < self.recipe.steps and not (stopped := self._may_stop and any_process(stop())):
            self._micro_step(next(batches))
            if self.micro_step >= self.recipe.gradient_accumulation_steps:  # above it by --force
                self._close_window()
                if self.step % self.recipe.save_steps == 0 and self.step < self.recipe.steps:
                    self._validate()
                    self.save()
                    self.log.draw()
        if not stopped and self.step > first:
            self._validate()
        self.save()
        self.log.close()
        if not stopped:  # it takes seconds, which a stopped run may not have
            self.log.draw(last=True)
        return not stopped

    def save(self) -> None:
        """Checkpoint, then the averaged weights as the folder `model`, and as `best` if they are."""
        self._tick()
        self._restore_rng()  # told to stop before the first batch
        average = gather(self.average)
        tensors = {f"model.{k}": v for k, v in gather(self.core.state_dict()).items()}
        tensors |= {f"average.{k}": v for k, v in average.items()}
        state = {name: getattr(self, name) for name in KEPT} | {"stream": self.stream.state_dict()}
        gradients = gradients_of(self.core) if self.micro_step else None
        optimizers = [gather(self.optimizer.state_dict())]
        self.checkpoints.save(self.step, tensors, optimizers, state, gradients, self.micro_step)
        self._export(average)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches; the random states of the checkpoint are restored behind the first."""
        for batch in self.stream:
            self._restore_rng()
            yield batch

    def _restore_rng(self) -> None:
        if self.resumed is not None:
            self.resumed.restore_rng()
            self.resumed = None

    def _micro_step(self, batch: dict[str, torch.Tensor]) -> None:
        """Gradients of one batch are added to the window's: sums over frames, so that a window's mean is over all."""
        last = self.micro_step + 1 >= self.recipe.gradient_accumulation_steps
        index = self.step * self.recipe.gradient_accumulation_steps + self.micro_step
        index = index * self.world + self.accelerator.process_index
        self.window_batches.append(batch)
        self.window_rows.append(getattr(self.stream, "last_rows", []))
        frames = int(batch["audio_codes"].shape[2] * len(batch["midi_ids"]) - batch["prompt_lengths"].sum())
        batch = {k: v.to(self.device) for k, v in batch.items()}
        with nullcontext() if last else self.accelerator.no_sync(self.losses):
            with self._autocast():
                found = self.losses(batch, self.step, index)
            loss = sum(value * self._weight(name) for name, value in found.items())
            self.accelerator.backward(loss * (1 if self._sums else frames))
        names = list(found)
        sums = sum_over_processes(
            [float(frames), 1.0, *(found[n].item() * (1 if self._sums else frames) for n in names)]
        )
        for name, value in zip(["frames", "batches", *names], sums):
            self.window[name] = self.window.get(name, 0.0) + value
        self.micro_step += 1

    def _close_window(self) -> None:
        """The optimiser's step, unless something is wrong with the window; then the log."""
        recipe, window = self.recipe, self.window
        frames, count = window.pop("frames"), window.pop("batches")
        means = {name: value / (count if self._sums else frames) for name, value in window.items()}
        drop_unused(self.losses)
        for parameter in self.losses.parameters():
            if parameter.grad is not None:  # DDP and FSDP have averaged over processes
                parameter.grad.mul_(self.world / (1 if self._sums else frames))
        limit = recipe.clip_norm if recipe.optimizer == "adamw" and recipe.clip_norm else math.inf
        norm = float(gather(self.accelerator.clip_grad_norm_(self.losses.parameters(), limit)))
        wrong = self._wrong(means, norm)
        if wrong:
            self._bad_window(wrong)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate * self._rate_share()
            self.optimizer.step()
            self._move_average()
            row = means | {"gradient": norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            for name, value in row.items():
                total, number = self.logged.get(name, (0.0, 0))
                self.logged[name] = (total + value, number + 1)
        self.optimizer.zero_grad()
        self.frames += frames
        self.step, self.micro_step, self.window = self.step + 1, 0, {}
        self.window_batches, self.window_rows = [], []
        if self.step % recipe.log_steps == 0 and self.logged:
            self._log({name: total / number for name, (total, number) in self.logged.items()})
            self.logged = {}

    def _wrong(self, means: dict[str, float], norm: float) -> str | None:
        """What is wrong with a step, by its mean losses and gradient norm, the same on every process."""
        loss = sum(value * self._weight(name) for name, value in means.items())
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss} and gradient norm {norm}"
        kind = "+".join(means)  # the first steps of an AR have another loss
        usual, ratio = self.usual.get(kind, loss), self.recipe.exploding_ratio
        if ratio and loss > ratio * usual:
            return f"loss {loss:.4g}, {loss / usual:.1f} times the usual one"
        self.usual[kind] = usual + 0.05 * (loss - usual)
        return None

    def _bad_window(self, wrong: str) -> None:
        """Keep the step's batches; then stop, or count it."""
        path = self.output / f"bad_step_{self.step:07d}_rank{self.accelerator.process_index}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.{k}": v.contiguous() for i, batch in enumerate(self.window_batches) for k, v in batch.items()}
        about = {"wrong": wrong, "rows": json.dumps(self.window_rows)}  # file and row of each item
        together(lambda: (save_file(tensors, path, metadata=about), set_usual_mode(path)), everywhere=True)
        self.skipped += 1
        told = f"step {self.step}: {wrong}; its batches are in {path}"
        if self.recipe.on_bad_loss == "stop":
            raise BadLossError(f"{told}; the weights are unharmed (on_bad_loss: skip would pass over it)")
        if self.skipped > self.recipe.max_skipped:
            raise BadLossError(f"{told}; max_skipped is {self.recipe.max_skipped}")
        self.accelerator.print(f"passed over ({self.skipped} of {self.recipe.max_skipped}): {told}", flush=True)

    @torch.no_grad()
    def _move_average(self) -> None:
        decay = min(self.recipe.average_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.core.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)

    @contextmanager
    def _averaged(self):
        """The averaged weights are the model's for a while."""
        live = {k: v.detach().clone() for k, v in self.core.state_dict().items()}
        self.core.load_state_dict(self.average)
        yield
        self.core.load_state_dict(live)

    @property
    def _may_stop(self) -> bool:
        """Whether a checkpoint could be made here: FSDP keeps the gradients of an open window to itself."""
        return not (self.sharded and self.micro_step)

    @property
    def _sums(self) -> bool:
        """Whether losses are sums over frames already: the published ones, which nothing divides."""
        return self.core.config.objective == "published_sum"

    def _weight(self, name: str) -> float:
        return 1.0 if name == "code" else self.recipe.latent_weight

    def _rate_share(self) -> float:
        recipe = self.recipe
        if recipe.schedule == "eden":
            return eden(self.step * recipe.gradient_accumulation_steps, self.stream.state_dict()["epoch"])
        begin, end = phase(self.step, recipe.frame_steps, recipe.steps)
        return warmup_cosine(self.step - begin, recipe.warmup_steps, end - begin, recipe.final_learning_rate_share)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    @torch.no_grad()
    def _validate(self) -> None:
        """Log how the averaged weights do on the fixed validation batches, and remember the best ones."""
        losses = self.accelerator.unwrap_model(self.losses)
        losses.eval()
        with self._averaged():
            found = figures(losses, self.validation, self._autocast)
            codes = codes_played(losses, self.validation[0], self.recipe.sample_seconds) if self.shows_samples else {}
        losses.train()
        self._log(found)
        if codes and self.accelerator.is_main_process:
            self.log.show(self.step, sounds(codes, int(self.validation[0]["prompt_lengths"][0]), self.codec))
        code = [value for name, value in found.items() if name.startswith("validation_code")]
        mean = sum(code) / len(code) if code else math.inf
        if code and (self.best is None or mean < self.best["loss"]):
            self.best = {"step": self.step, "loss": mean}

    def _export(self, average: dict[str, torch.Tensor]) -> None:
        best = self.best is not None and self.best["step"] == self.step and not self.micro_step
        for name in ["model", "best"] if best else ["model"]:
            given = average, self.tokenizer
            together(lambda name=name, given=given: export(self.core, self.output / name, *given, self._card_of(name)))

    def _card_of(self, name: str) -> str | None:
        """The card of the folder `name`, by what was logged so far; only the last weights go to the Hub."""
        if self.card is None:
            return None
        path = f"{self.output.resolve().name}/{name}"
        path = self.card.hub_id or path if name == "model" else path
        return self.card.text(path, self.step, self.log.validated(self.step))

    def _tick(self) -> None:
        now = time.time()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def _log(self, values: dict[str, float]) -> None:
        self._tick()
        values |= {"skipped": self.skipped} if self.skipped else {}
        self.log.write(self.step, self.frames / FRAME_RATE / 3600, self.seconds, values)
