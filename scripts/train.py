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
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from modeling_midivalle import MidiValleARConfig, MidiValleARModel, MidiValleNARConfig, MidiValleNARModel
from scripts.data import DataError, TrainingStream, dataset_info, shard_files
from scripts.prepare_dataset import codec_hash
from scripts.schedules import warmup_cosine
from tokenization import MidiValleTokenizer

PARTS = {"ar": (MidiValleARConfig, MidiValleARModel), "nar": (MidiValleNARConfig, MidiValleNARModel)}


@dataclass
class TrainRecipe:
    """What a recipe file (YAML) may set, for either decoder."""

    preset: str = "starter"
    ar: dict = field(default_factory=dict)  # fields of MidiValleARConfig that differ from the preset
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
    code_dropout: float = 0.0  # AR: up to this share of a row's past target codes is hidden or replaced
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


def drop_codes(input_ids: torch.Tensor, first: torch.Tensor, dropout: float, config) -> torch.Tensor:
    """Hide past codes, so that the AR must listen to the notes: a steady tone repeats its code, and a model that only
    learns to repeat never starts the next note.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`): input of the AR.
        first (`torch.Tensor` of shape `(B,)`): place of the first target code.
        dropout: each row's share is drawn up to this; half of it becomes the pad id, half a random code.
    """
    share = torch.rand(len(input_ids), 1, device=input_ids.device) * dropout
    hit = torch.rand(input_ids.shape, device=input_ids.device) < share
    hit &= torch.arange(input_ids.shape[1], device=input_ids.device) >= first[:, None]
    codes = torch.randint_like(input_ids, config.codebook_size)
    codes = codes.masked_fill(torch.rand(codes.shape, device=codes.device) < 0.5, config.pad_token_id)
    return torch.where(hit, codes, input_ids)


def decoder_loss(
    model: torch.nn.Module,
    part: str,
    batch: dict[str, torch.Tensor],
    stages: torch.Tensor | None,
    dropout: float = 0.0,
):
    """Mean cross-entropy of the target frames of a batch, and the logits' top-10 accuracy."""
    codes, lengths = batch["audio_codes"], batch["prompt_lengths"]
    shared = {k: batch[k] for k in ("midi_ids", "midi_attention_mask", "prompt_lengths")}
    if part == "ar":
        core = model.module if hasattr(model, "module") else model
        inputs = core.build_inputs(codes[:, 0], torch.ones_like(codes[:, 0]), lengths)
        if dropout:
            inputs["input_ids"] = drop_codes(inputs["input_ids"], lengths + 1, dropout, core.config)
        output = model(**inputs, **shared)
        logits, targets = output.logits[:, :-1], inputs["labels"][:, 1:]
    else:
        output = model(audio_codes=codes, stage=stages, labels=codes, **shared)
        targets = codes.gather(1, stages[:, None, None].expand(-1, 1, codes.shape[2]))[:, 0]
        prompt = torch.arange(codes.shape[2], device=codes.device) < lengths[:, None]
        logits, targets = output.logits, targets.masked_fill(prompt, -100)
    with torch.no_grad():
        wanted = targets != -100
        top10 = (logits[wanted].topk(10).indices == targets[wanted][:, None]).any(1).float().mean()
    return output.loss, top10


class Run:
    """One training run of one decoder."""

    def __init__(self, recipe: TrainRecipe, part: str, stream: TrainingStream, validation: list[dict], output: Path):
        self.recipe, self.part, self.stream, self.output = recipe, part, stream, output
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), gradient_accumulation_steps=recipe.gradient_accumulation_steps
        )
        torch.manual_seed(recipe.seed)
        config_class, model_class = PARTS[part]
        model = model_class(config_class.from_preset(recipe.preset, **getattr(recipe, part)))
        decay, rest = [], []
        for parameter in model.parameters():
            (decay if parameter.ndim > 1 else rest).append(parameter)
        groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, recipe.learning_rate, recipe.betas, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.core, self.device = self.accelerator.unwrap_model(self.model), self.accelerator.device
        self.average = {k: v.detach().clone() for k, v in self.core.state_dict().items()}
        self.generator = torch.Generator().manual_seed(recipe.seed + self.accelerator.process_index)
        self.validation = validation
        self.step, self.frames, self.seconds = 0, 0, 0.0
        self._resume()

    def train(self, stop_after: float | None = None) -> None:
        """Run to the last step, or for `stop_after` seconds of wall time."""
        began = logged = time.time()
        losses, accuracies = [], []
        batches = iter(self.stream)
        self.model.train()
        while self.step < self.recipe.steps and not (stop_after and time.time() - began > stop_after):
            loss, top10 = self._train_step(batches)
            losses.append(loss)
            accuracies.append(top10)
            self.step += 1
            if self.step % 50 == 0:
                now = time.time()
                self.seconds, logged = self.seconds + now - logged, now
                self._log({"loss": float(np.mean(losses)), "top10": float(np.mean(accuracies))})
                losses, accuracies = [], []
            if self.step % self.recipe.save_steps == 0:
                self._log(self.validate())
                self.save()
        self._log(self.validate())
        self.save()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and top-10 accuracy of the averaged weights per codebook, on the fixed validation batches."""
        live = {k: v.detach().clone() for k, v in self.core.state_dict().items()}
        self.core.load_state_dict(self.average)
        self.core.eval()
        result = {}
        for stage in [0] if self.part == "ar" else range(1, self.core.config.num_codebooks):
            found = []
            for batch in self.validation:
                batch = {k: v.to(self.device) for k, v in batch.items()}
                stages = torch.full((len(batch["midi_ids"]),), stage, device=self.device)
                with self._autocast():
                    loss, top10 = decoder_loss(self.core, self.part, batch, stages)
                found.append((float(loss), float(top10)))
            result[f"validation_loss_{stage}"], result[f"validation_top10_{stage}"] = np.mean(found, 0).tolist()
        self.core.load_state_dict(live)
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
        live = {k: v.detach().clone() for k, v in self.core.state_dict().items()}
        self.core.load_state_dict(self.average)
        self.core.save_pretrained(self.output / "model")
        self.core.load_state_dict(live)

    def _train_step(self, batches) -> tuple[float, float]:
        recipe = self.recipe
        rate = recipe.learning_rate * warmup_cosine(
            self.step, recipe.warmup_steps, recipe.steps, recipe.final_learning_rate_share
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, accuracies = [], []
        for _ in range(recipe.gradient_accumulation_steps):
            batch = {k: v.to(self.device) for k, v in next(batches).items()}
            size = len(batch["midi_ids"])
            stages = self.core.draw_stages(size, self.generator).to(self.device) if self.part == "nar" else None
            with self.accelerator.accumulate(self.model):
                with self._autocast():
                    loss, top10 = decoder_loss(self.model, self.part, batch, stages, recipe.code_dropout)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"loss {float(loss)} at step {self.step}")
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            target_frames = int(batch["audio_codes"].shape[2] * size - batch["prompt_lengths"].sum())
            self.frames += target_frames * self.accelerator.num_processes
            losses.append(float(loss))
            accuracies.append(float(top10))
        decay = min(recipe.average_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.core.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return float(np.mean(losses)), float(np.mean(accuracies))

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

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
        tokenizer = MidiValleTokenizer()
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        layout = {"prompt_seconds": recipe.prompt_seconds, "no_prompt_share": recipe.no_prompt_share}
        layout |= {"seed": recipe.seed, "rank": rank, "world_size": world}
        stream = TrainingStream(files, tokenizer, recipe.batch_size, **layout)
        held_out = TrainingStream(shard_files(args.data, "validation"), tokenizer, recipe.batch_size, (4.0, 4.0), 0.0)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    validation = [batch for batch, _ in zip(held_out, range(recipe.validation_batches))]
    Run(recipe, args.part, stream, validation, Path(args.output_dir)).train(args.stop_after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
