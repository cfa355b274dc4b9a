# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Train one decoder, AR or NAR, on the shards of `scripts.prepare_dataset`.

    accelerate launch -m scripts.train --config recipes/starter_ar.yaml --part ar \
        --data DATA --codec CODEC --output-dir RUN

Writes `log.jsonl`, whole checkpoints `step_N` and the averaged weights as a `from_pretrained` folder `model`. Started
again, it continues from the newest checkpoint.
"""

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from modeling_midivalle import (
    MidiValleARConfig,
    MidiValleARModel,
    MidiValleNARConfig,
    MidiValleNARModel,
    PianoEncodecModel,
)
from scripts.assemble_model import load_part
from scripts.data import DataError, TrainingStream, dataset_info, shard_files
from scripts.decoder_objectives import ar_loss, frame_loss, nar_loss, published_loss, start_from_codebooks
from scripts.prepare_dataset import codec_hash
from scripts.schedules import warmup_cosine
from tokenization import MidiValleTokenizer

PARTS = {"ar": (MidiValleARConfig, MidiValleARModel), "nar": (MidiValleNARConfig, MidiValleNARModel)}


@dataclass
class TrainRecipe:
    """What a recipe file (YAML) may set, for either decoder."""

    preset: str = "starter"
    init_from: str | None = None  # folder of trained weights to go on from: of the decoder, or of a whole model
    ar: dict = field(default_factory=dict)  # fields of MidiValleARConfig that differ from the preset or from init_from
    nar: dict = field(default_factory=dict)
    batch_size: int = 8  # rows a process and step
    gradient_accumulation_steps: int = 1
    steps: int = 10_000
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    final_learning_rate_share: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    prompt_seconds: tuple[float, float] = (1.0, 6.0)
    no_prompt_share: float = 0.05
    short_share: float = 0.0  # of batches whose targets are cut to a drawn length, as the first windows of a piece are
    mark_held: bool = True  # notes that sound on from before an excerpt get rows; the published model knows none
    own_share: float = 0.5  # AR: of a batch's rows see their own predictions, the others no past target code
    code_noise: float = 0.5  # NAR: lower codebooks are disturbed by up to this, relative to the codebook's deviation
    latent_weight: float = 5.0  # of the expected code's distance to the truth, beside the cross-entropy
    frame_steps: int = 0  # AR: that come first: frames alone with their notes, without attention and prompt
    codebook_start: bool = True  # without init_from, tables and heads begin as the codec's codebooks
    average_decay: float = 0.998  # of the weights that are saved
    bf16: bool = True
    save_steps: int = 500
    validation_batches: int = 4
    seed: int = 0

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainRecipe":
        """Read a recipe; an unknown key is an error that names it."""
        values = yaml.safe_load(Path(path).read_text()) or {}
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown keys {sorted(unknown)}")
        return cls(**values)


class Run:
    """One training run of one decoder."""

    def __init__(
        self,
        recipe: TrainRecipe,
        part: str,
        stream: TrainingStream,
        validation: list[dict],
        codebooks: torch.Tensor,
        output: Path,
    ):
        self.recipe, self.part, self.stream, self.output = recipe, part, stream, output
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), gradient_accumulation_steps=recipe.gradient_accumulation_steps
        )
        torch.manual_seed(recipe.seed)
        model = start_model(recipe, part, codebooks)
        decay, rest = [], []
        for parameter in model.parameters():
            (decay if parameter.ndim > 1 else rest).append(parameter)
        groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, recipe.learning_rate, recipe.betas, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.core, self.device = self.accelerator.unwrap_model(self.model), self.accelerator.device
        self.published = self.core.config.objective == "published_sum"
        self.average = {k: v.detach().clone() for k, v in self.core.state_dict().items()}
        self.generator = torch.Generator().manual_seed(recipe.seed + self.accelerator.process_index)
        self.validation, self.codebooks = validation, codebooks.to(self.device)
        self.step, self.frames, self.seconds = 0, 0, 0.0
        self._resume()

    def train(self, stop_after: float | None = None) -> None:
        """Run to the last step, or for `stop_after` seconds of wall time."""
        began = logged = time.time()
        losses = []
        batches = iter(self.stream)
        self.model.train()
        while self.step < self.recipe.steps and not (stop_after and time.time() - began > stop_after):
            losses.append(self._train_step(batches))
            self.step += 1
            if self.step % 50 == 0:
                now = time.time()
                self.seconds, logged = self.seconds + now - logged, now
                self._log({k: float(np.mean([loss[k] for loss in losses if k in loss])) for k in losses[-1]})
                losses = []
            if self.step % self.recipe.save_steps == 0:
                self._log_validation()
                self.save()
        self._log_validation()
        self.save()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the current weights per codebook on the fixed validation batches, as they play: the AR on its own
        past, the NAR on true lower codebooks."""
        self.core.eval()
        result = {}
        for stage in [0] if self.part == "ar" else range(1, self.core.config.num_codebooks):
            found = []
            for batch in self.validation:
                batch = {k: v.to(self.device) for k, v in batch.items()}
                with self._autocast():
                    stages = torch.full((len(batch["midi_ids"]),), stage, device=self.device) if stage else None
                    if self.published:
                        prefix = torch.Generator().manual_seed(self.recipe.seed)  # the same one every time
                        losses = published_loss(self.core, self.core, batch, stages, prefix)
                    elif self.part == "ar":
                        losses = ar_loss(self.core, self.core, batch, self.codebooks, slice(None))
                    else:
                        losses = nar_loss(self.core, batch, stages, self.codebooks, 0.0, None)
                found.append(losses)
            for name in found[0]:
                result[f"validation_{name}_{stage}"] = float(np.mean([losses[name].item() for losses in found]))
        self.core.train()
        return result

    def save(self) -> None:
        """Checkpoint by rename, newest two kept; and the averaged weights as a folder."""
        if not self.accelerator.is_main_process:
            return
        temporary, target = self.output / ".step.tmp", self.output / f"step_{self.step:07d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {f"model.{k}": v for k, v in self.core.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        tensors = {k: v.detach().clone().contiguous().cpu() for k, v in tensors.items()}
        save_file(tensors, temporary / "tensors.safetensors")
        rest = {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}
        torch.save(rest, temporary / "rest.pt")
        state = {"step": self.step, "frames": self.frames, "seconds": self.seconds, "stream": self.stream.state_dict()}
        (temporary / "state.json").write_text(json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in sorted(self.output.glob("step_*"))[:-2]:
            shutil.rmtree(old)
        with self._averaged():
            self.core.save_pretrained(self.output / "model")

    @contextmanager
    def _averaged(self):
        """The averaged weights are the model's for a while."""
        live = {k: v.detach().clone() for k, v in self.core.state_dict().items()}
        self.core.load_state_dict(self.average)
        yield
        self.core.load_state_dict(live)

    def _train_step(self, batches) -> dict[str, float]:
        recipe = self.recipe
        rate = recipe.learning_rate * warmup_cosine(
            self.step, recipe.warmup_steps, recipe.steps, recipe.final_learning_rate_share
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for _ in range(recipe.gradient_accumulation_steps):
            batch = {k: v.to(self.device) for k, v in next(batches).items()}
            size = len(batch["midi_ids"])
            with self.accelerator.accumulate(self.model):
                with self._autocast():
                    if self.published:
                        stages = None
                        if self.part == "nar":  # one stage for the whole batch
                            stages = self.core.draw_stages(1, self.generator).to(self.device).repeat(size)
                        found = published_loss(self.model, self.core, batch, stages, self.generator)
                    elif self.part == "ar" and self.step < recipe.frame_steps:
                        found = frame_loss(self.core, batch, self.codebooks)
                    elif self.part == "ar":
                        own = slice(0, round(size * recipe.own_share))
                        found = ar_loss(self.model, self.core, batch, self.codebooks, own)
                    else:
                        stages = self.core.draw_stages(size, self.generator).to(self.device)
                        noise = (recipe.code_noise, self.generator)
                        found = nar_loss(self.model, batch, stages, self.codebooks, *noise)
                loss = sum(value * (1.0 if name == "code" else recipe.latent_weight) for name, value in found.items())
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"loss {float(loss)} at step {self.step}")
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            target_frames = int(batch["audio_codes"].shape[2] * size - batch["prompt_lengths"].sum())
            self.frames += target_frames * self.accelerator.num_processes
            losses.append([value.item() for value in found.values()])
        decay = min(recipe.average_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.core.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return dict(zip(found, np.mean(losses, 0).tolist()))

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    def _log_validation(self) -> None:
        with self._averaged():
            self._log(self.validate())

    def _log(self, values: dict[str, float]) -> None:
        hours = self.frames / 50 / 3600
        row = {"step": self.step, "hours": round(hours, 3), "wall_s": round(self.seconds, 1)}
        row |= {k: round(v, 4) for k, v in values.items()}
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.output / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{row} {hours * 3600 / max(self.seconds, 1):.1f}x real time", flush=True)

    def _resume(self) -> None:
        found = sorted(self.output.glob("step_*"))
        if not found:
            return
        tensors = load_file(found[-1] / "tensors.safetensors")
        self.core.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k[8:]: v.to(self.device) for k, v in tensors.items() if k.startswith("average.")}
        rest = torch.load(found[-1] / "rest.pt", weights_only=True)
        self.optimizer.load_state_dict(rest["optimizer"])
        self.generator.set_state(rest["generator"])
        state = json.loads((found[-1] / "state.json").read_text())
        self.step, self.frames, self.seconds = state["step"], state["frames"], state["seconds"]
        self.stream.load_state_dict(state["stream"])
        self.accelerator.print(f"continuing from {found[-1]} at step {self.step}")


def start_model(recipe: TrainRecipe, part: str, codebooks: torch.Tensor):
    """A decoder with new weights, or with those of `recipe.init_from`.

    Raises:
        ValueError: the folder of `init_from` holds no such decoder.
    """
    config_class, model_class = PARTS[part]
    changes = getattr(recipe, part)
    if recipe.frame_steps and not (part == "ar" and recipe.codebook_start):
        raise ValueError("frame_steps are for an AR with codebook_start, whose hidden state begins as the latent")
    if recipe.init_from is None:
        model = model_class(config_class.from_preset(recipe.preset, **changes))
        if recipe.codebook_start:
            start_from_codebooks(model, codebooks)
        return model
    trained = load_part(part, recipe.init_from)
    model = model_class(config_class.from_dict(trained.config.to_dict() | changes))
    model.load_state_dict(trained.state_dict())
    return model


def load_codebooks(folder: str | Path) -> torch.Tensor:
    """`(K, codebook_size, D)` of a codec folder."""
    layers = PianoEncodecModel.from_pretrained(folder, dtype=torch.float32).quantizer.layers
    return torch.stack([layer.codebook.embed for layer in layers])


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, YAML; see recipes/starter_*.yaml")
    parser.add_argument("--part", required=True, choices=sorted(PARTS), help="which decoder")
    parser.add_argument("--data", required=True, help="folder of parquet shards with a train and a validation split")
    parser.add_argument("--codec", required=True, help="the codec that made the data; another one is refused")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--stop-after", type=float, help="seconds of wall time after which to save and stop")
    args = parser.parse_args(argv)
    try:
        recipe = TrainRecipe.from_yaml(args.config)
        files = shard_files(args.data, "train")
        found, wanted = dataset_info(files)["codec_sha256"], codec_hash(args.codec)
        if found != wanted:
            made = f"{args.data} was encoded by codec {found[:12]}"
            raise DataError(f"{made}, but {args.codec} is {wanted[:12]}: encode anew")
        tokenizer = MidiValleTokenizer(mark_held=recipe.mark_held)
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        layout = {"prompt_seconds": recipe.prompt_seconds, "no_prompt_share": recipe.no_prompt_share}
        layout |= {"short_share": recipe.short_share}
        layout |= {"seed": recipe.seed, "rank": rank, "world_size": world}
        stream = TrainingStream(files, tokenizer, recipe.batch_size, **layout)
        held_out = TrainingStream(shard_files(args.data, "validation"), tokenizer, recipe.batch_size, (4.0, 4.0), 0.0)
        validation = [batch for batch, _ in zip(held_out, range(recipe.validation_batches))]
        run = Run(recipe, args.part, stream, validation, load_codebooks(args.codec), Path(args.output_dir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run.train(args.stop_after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
