# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Train the Piano-Encodec: from nothing, part by part, or fine-tune any Hugging Face EnCodec of 32 kHz.

    python -m scripts.train_codec features  --config RECIPE [audio] --output-dir RUNS/features
    python -m scripts.train_codec encoder   --config RECIPE [audio] --features RUNS/features --output-dir RUNS/encoder
    python -m scripts.train_codec codebooks --config RECIPE [audio] --codec RUNS/encoder/codec --output-dir RUNS/codes
    python -m scripts.train_codec encode    --config RECIPE --audio POOL.npy --codec RUNS/codes --output-dir RUNS/codes
    python -m scripts.train_codec listener  --config RECIPE [audio] --output-dir RUNS/listener
    python -m scripts.train_codec decoder   --config RECIPE [audio] --features RUNS/features --codec RUNS/codes \\
        [--listener RUNS/listener] --output-dir RUNS/decoder
    python -m scripts.train_codec whole     --config RECIPE [audio] --codec FOLDER_OR_HUB_ID --output-dir RUNS/finetuned

[audio] is `--midi-root PACK/midi --piano PIANO.tar ...` (rendered while it is needed) or `--audio POOL.npy ...`.
`features` fits the latent's axes; the encoder learns to produce them; `codebooks` fits the residual stack to what it
does produce, and from then on the codes are fixed, whatever the decoder still learns. The `listener` learns to hear
struck keys, and makes every note that the decoder loses a loss of its own. `whole` fine-tunes all of any 32 kHz
EnCodec. A run continues from its newest checkpoint.
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
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from modeling_midivalle import PianoEncodecConfig, PianoEncodecModel
from scripts.codec_discriminator import MultiScaleSTFTDiscriminator, discriminator_loss, generator_losses
from scripts.codec_features import SpectralFeatures
from scripts.codec_listener import Listener
from scripts.codec_objectives import (
    DecoderObjective,
    EncoderObjective,
    ListenerObjective,
    WholeObjective,
    start_balanced,
)
from scripts.codec_oscillators import start_oscillators, start_synthesis
from scripts.codec_quantizer import ema_update, kmeans_start
from scripts.prepare_dataset import codec_hash
from scripts.rendered_audio import RenderedCrops, StoredCrops, codes_path
from scripts.rooms import ROOMS
from scripts.schedules import warmup_cosine

SHIPPED_DTYPE = torch.float16
LOSS_WEIGHTS = {"mel": 1.0, "convergence": 0.5, "onset": 0.25, "waveform": 0.2, "commitment": 0.25, "regression": 1.0}
LOSS_WEIGHTS |= {"adversarial": 0.05, "features": 0.1, "notes": 10.0, "heard": 0.3}
PARTS = ("features", "encoder", "codebooks", "encode", "listener", "decoder", "whole")


@dataclass
class CodecRecipe:
    """What a codec recipe file (YAML) may set."""

    model: dict = field(default_factory=dict)  # fields of PianoEncodecConfig
    rooms: list[str] = field(default_factory=lambda: list(ROOMS))
    crop_seconds: float = 2.0
    lead_seconds: float = 0.0  # of codes before a crop: what still sounds in it began there, the decoder remembers
    batch_size: int = 6
    steps: int = 20_000
    memory: float = 0.6  # share of the frame before that the latent leaves out, see SpectralFeatures
    sing_steps: int = 600  # of the decoder: gates alone, through exact synthesis
    kmeans_vectors: int = 400_000  # from 60,000 the codes leave 0.018 of their variance, but 0.11 of new audio's
    learning_rate: float = 1e-3
    discriminator_learning_rate: float = 3e-4
    warmup_steps: int = 100
    final_learning_rate_share: float = 0.02
    betas: tuple[float, float] = (0.8, 0.99)
    clip_norm: float = 1.0
    codebook_decay: float = 0.99
    dead_code: float = 0.01  # averaged uses a step below which a code is revived
    weights: dict[str, float] = field(default_factory=dict)  # of each loss by name
    adversarial_from: int | None = None  # step at which the discriminator starts; None: never
    average_decay: float = 0.999  # of the weights that are saved
    bf16: bool = True  # autocast of the encoder and decoder; quantiser, losses and the last layer stay fp32
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self):
        unknown = set(self.weights) - set(LOSS_WEIGHTS)
        if unknown:
            raise ValueError(f"unknown loss weights {sorted(unknown)}: choose from {sorted(LOSS_WEIGHTS)}")
        self.weights = LOSS_WEIGHTS | self.weights
        self.betas = tuple(self.betas)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "CodecRecipe":
        """Read a recipe; an unknown key is an error that names it."""
        values = yaml.safe_load(Path(path).read_text()) or {}
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown keys {sorted(unknown)}")
        return cls(**values)


def export_codec(state: dict[str, torch.Tensor], config: PianoEncodecConfig, folder: Path) -> None:
    """Save weights rounded to the shipped precision and codebooks in fp32, as a folder `from_pretrained` takes."""
    rounded = {
        name: value.detach().cpu().to(torch.float32 if "codebook" in name else SHIPPED_DTYPE).contiguous()
        for name, value in state.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.tmp"
    save_file(rounded, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    config.dtype = "float32"
    config.save_pretrained(folder)


def save_checkpoint(folder: Path, step: int, tensors: dict, optimizers: list, extra: dict) -> None:
    """Write `folder/step_N` by rename, then drop all but the newest two."""
    temporary, target = folder / f".step_{step:07d}.tmp", folder / f"step_{step:07d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary / "tensors.safetensors")
    torch.save([o.state_dict() for o in optimizers], temporary / "optimizers.pt")
    (temporary / "state.json").write_text(json.dumps({"step": step} | extra))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in sorted(folder.glob("step_*"))[:-2]:
        shutil.rmtree(old)


class Run:
    """One training run of one objective."""

    def __init__(self, objective, recipe: CodecRecipe, dataset, output: Path, workers: int):
        self.recipe, self.output, self.model = recipe, output, objective.model
        self.moves_codebooks = isinstance(objective, WholeObjective)
        parallel = DistributedDataParallelKwargs(broadcast_buffers=False)  # ema_update itself keeps codebooks equal
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[parallel])
        torch.manual_seed(recipe.seed)
        self.device = self.accelerator.device
        trained = [p for p in objective.parameters() if p.requires_grad]
        optimizers = [torch.optim.Adam(trained, recipe.learning_rate, recipe.betas)]
        self.discriminator = None
        if recipe.adversarial_from is not None and isinstance(objective, DecoderObjective | WholeObjective):
            self.discriminator = MultiScaleSTFTDiscriminator()
            rate = recipe.discriminator_learning_rate
            optimizers.append(torch.optim.Adam(self.discriminator.parameters(), rate, (0.5, 0.9)))
            self.discriminator = self.accelerator.prepare(self.discriminator)
        self.objective, *self.optimizers = self.accelerator.prepare(objective, *optimizers)
        prefetch = 4 if workers else None
        self.loader = iter(DataLoader(dataset, recipe.batch_size, num_workers=workers, prefetch_factor=prefetch))
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step, self.seconds = 0, 0.0
        self._resume()

    def train(self, stop_after: float | None = None) -> None:
        """Run to the last step, or for `stop_after` seconds of wall time."""
        began, logged, totals = time.time(), time.time(), {}
        while self.step < self.recipe.steps and not (stop_after and time.time() - began > stop_after):
            for name, value in self._train_step(next(self.loader)).items():
                totals[name] = totals.get(name, 0.0) + float(torch.as_tensor(value).detach())
            self.step += 1
            if self.step % 100 == 0:
                now = time.time()
                self.seconds, logged = self.seconds + now - logged, now
                self._log({k: v / 100 for k, v in totals.items()})
                totals = {}
            if self.step % self.recipe.save_steps == 0:
                self.save()
        self.save()

    def save(self) -> None:
        """Checkpoint of the run, and the averaged weights: a loadable folder `codec`, or `listener.safetensors`."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"live.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        if self.discriminator is not None:
            state = self.accelerator.unwrap_model(self.discriminator).state_dict()
            tensors |= {f"discriminator.{k}": v for k, v in state.items()}
        save_checkpoint(self.output, self.step, tensors, self.optimizers, {"seconds": self.seconds})
        if isinstance(self.model, Listener):
            temporary = self.output / "listener.safetensors.tmp"
            save_file(self.average, temporary)
            os.replace(temporary, self.output / "listener.safetensors")
        else:
            export_codec(self.average, self.model.config, self.output / "codec")

    def _train_step(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        recipe, batch = self.recipe, {k: v.to(self.device) for k, v in batch.items()}
        wave, core = batch["input_values"], self.accelerator.unwrap_model(self.objective)
        if isinstance(core, DecoderObjective):
            core.step.fill_(self.step)
        share = warmup_cosine(self.step, recipe.warmup_steps, recipe.steps, recipe.final_learning_rate_share)
        for optimizer, rate in zip(self.optimizers, (recipe.learning_rate, recipe.discriminator_learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        updates = [] if self.moves_codebooks else None
        losses, output = self.objective(batch, updates)
        adversarial = self.discriminator is not None and self.step >= recipe.adversarial_from
        if adversarial:
            losses |= generator_losses(self.discriminator, output, wave)
        total = sum(recipe.weights[name] * value for name, value in losses.items())
        if not torch.isfinite(total):
            raise FloatingPointError(f"loss {float(total)} at step {self.step}: {losses}")
        self.accelerator.backward(total)
        losses["gradient"] = self.accelerator.clip_grad_norm_(self.objective.parameters(), recipe.clip_norm)
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        if updates:
            dead = recipe.dead_code * self.accelerator.num_processes
            losses["revived"] = ema_update(self.model.quantizer, updates, recipe.codebook_decay, dead, self.generator)
        if adversarial:
            losses["discriminator"] = discriminator_loss(self.discriminator, output.detach(), wave)
            self.optimizers[1].zero_grad()
            self.accelerator.backward(losses["discriminator"])
            self.optimizers[1].step()
            self.optimizers[1].zero_grad()
        self._average()
        return losses

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.recipe.average_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            if "codebook" in name:
                self.average[name].copy_(value)  # an average already
            else:
                self.average[name].lerp_(value, 1 - decay)

    def _log(self, means: dict[str, float]) -> None:
        hours = self.step * self.recipe.batch_size * self.recipe.crop_seconds * self.accelerator.num_processes / 3600
        row = {"step": self.step, "hours": round(hours, 3), "wall_s": round(self.seconds, 1)}
        row |= {k: round(v, 4) for k, v in means.items()}
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.output / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{row} {hours * 3600 / max(self.seconds, 1):.1f}x real time", flush=True)

    def _resume(self) -> None:
        for folder in sorted(self.output.glob("step_*"), reverse=True):
            tensors = load_file(folder / "tensors.safetensors")
            self.model.load_state_dict(_part(tensors, "live."))
            self.average = {k: v.to(self.device) for k, v in _part(tensors, "average.").items()}
            if self.discriminator is not None and _part(tensors, "discriminator."):
                self.accelerator.unwrap_model(self.discriminator).load_state_dict(_part(tensors, "discriminator."))
            for optimizer, state in zip(self.optimizers, torch.load(folder / "optimizers.pt", weights_only=True)):
                optimizer.load_state_dict(state)
            state = json.loads((folder / "state.json").read_text())
            self.step, self.seconds = state["step"], state["seconds"]
            self.accelerator.print(f"continuing from {folder} at step {self.step}")
            return


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def collect(loader, latent_of, count: int) -> tuple[torch.Tensor, int]:
    """At least `count` latent vectors (N, D) of fresh audio, and how many one batch gives."""
    found = []
    while sum(len(v) for v in found) < count:
        found.append(latent_of(next(loader)["input_values"]))
    return torch.cat(found), len(found[0])


@torch.no_grad()
def fit_features(recipe: CodecRecipe, dataset, workers: int, output: Path) -> None:
    """Fit the axes to audio; writes `features.safetensors` and a codec folder for the encoder to begin with."""
    codec = PianoEncodecModel(PianoEncodecConfig(**recipe.model))
    features = SpectralFeatures(codec.config.hidden_size, recipe.memory)
    loader = iter(DataLoader(dataset, recipe.batch_size, num_workers=workers))
    bands, _ = collect(loader, lambda w: features.bands(w).flatten(0, 1), recipe.kmeans_vectors)
    print(f"{codec.config.hidden_size} axes keep {features.fit(bands):.4f} of the variance of {len(bands)} frames")
    output.mkdir(parents=True, exist_ok=True)
    save_file(features.state_dict(), output / "features.safetensors")
    export_codec(codec.state_dict(), codec.config, output)


def fit_codebooks(codec, vectors: torch.Tensor, step_vectors: int, recipe: CodecRecipe) -> None:
    """k-means of the whole residual stack."""
    generator = torch.Generator().manual_seed(recipe.seed)
    left = kmeans_start(codec.quantizer, vectors, step_vectors, generator)
    print(f"codebooks leave {[round(v, 4) for v in left]} of the variance")


def objective_of(args: argparse.Namespace, recipe: CodecRecipe, codec, data):
    """The objective of the asked part; parts that begin from nothing get their start here."""
    if args.part == "whole":
        return WholeObjective(codec, recipe.bf16)
    if args.part == "encoder":
        features = load_features(args.features, codec.config.hidden_size, recipe.memory)
        if not args.go_on:
            wave = next(iter(DataLoader(data, 4)))["input_values"]
            start_balanced(codec.encoder.layers, wave[:, None], 1.0, float(features(wave).std()))
        return EncoderObjective(codec, recipe.bf16, features)
    if not args.go_on:
        features = load_features(args.features, codec.config.hidden_size, recipe.memory)
        wave = next(iter(DataLoader(data, 16)))["input_values"]
        with torch.no_grad():
            start_oscillators(codec, features, codec.encoder(wave[:, None]))
            start_synthesis(codec)
    listener = load_listener(args.listener) if args.listener else None
    return DecoderObjective(codec, recipe.bf16, 0 if args.go_on else recipe.sing_steps, listener)


@torch.no_grad()
def freeze_codes(recipe: CodecRecipe, encoder: str, dataset, workers: int, output: Path) -> None:
    """Fit the codebooks to a trained encoder at shipped precision. From here on the codes stay what they are."""
    codec = PianoEncodecModel.from_pretrained(encoder, dtype=torch.float32)
    loader = iter(DataLoader(dataset, recipe.batch_size, num_workers=workers))
    vectors, step = collect(
        loader, lambda w: codec.encoder(w[:, None]).transpose(1, 2).flatten(0, 1), recipe.kmeans_vectors
    )
    fit_codebooks(codec, vectors, step, recipe)
    export_codec(codec.state_dict(), codec.config, output)


@torch.no_grad()
def encode_pools(folder: str, pools: list[str]) -> None:
    """Codes of whole pools, beside them: training the decoder then needs no encoder."""
    codec = PianoEncodecModel.from_pretrained(folder, dtype=torch.float32)
    for pool in pools:
        target = codes_path(pool, codec_hash(folder))
        if target.is_file():
            continue
        waves, codes = np.load(pool, mmap_mode="r"), []
        for start in tqdm(range(0, len(waves), 8), desc=Path(pool).name):
            batch = torch.from_numpy(waves[start : start + 8].astype(np.float32) / 32767)[:, None]
            codes.append(codec.encode_codes(batch).numpy().astype(np.int16))
        temporary = target.with_name(f".{target.name}")
        np.save(temporary, np.concatenate(codes))
        os.replace(temporary, target)


def load_features(folder: str, hidden_size: int, memory: float) -> SpectralFeatures:
    """The fitted features of `train_codec features`."""
    features = SpectralFeatures(hidden_size, memory)
    features.load_state_dict(load_file(Path(folder) / "features.safetensors"))
    return features


def load_listener(folder: str) -> Listener:
    """The trained listener of `train_codec listener`."""
    listener = Listener()
    listener.load_state_dict(load_file(Path(folder) / "listener.safetensors"))
    return listener


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--config", required=True, help="recipe, YAML; see recipes/codec_*.yaml")
    parser.add_argument("--midi-root", help="folder of MIDI files or of a MIDI pack with manifest.csv, to be rendered")
    parser.add_argument("--piano", action="append", default=[], help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--audio", nargs="*", default=[], help="rendered pools (scripts.render_pool), instead")
    parser.add_argument("--features", help="output of `features`")
    parser.add_argument("--codec", help="codec folder to go on from")
    parser.add_argument("--listener", help="output of `listener`; the decoder then learns what it must hear")
    parser.add_argument("--go-on", action="store_true", help="keep what --codec already knows of the part")
    parser.add_argument("--output-dir", required=True, help="checkpoints, log.jsonl and the codec go here")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare audio")
    parser.add_argument("--stop-after", type=float, help="seconds of wall time after which to save and stop")
    args = parser.parse_args(argv)
    output = Path(args.output_dir)
    try:
        recipe = CodecRecipe.from_yaml(args.config)
        seed = recipe.seed + 1000 * len(list(output.glob("step_*"))) + 100_000 * int(os.environ.get("RANK", 0))
        if args.audio:  # seeds differ between processes and after a resume, so that audio is fresh
            codes = codec_hash(args.codec) if args.part == "decoder" and args.codec else None
            data = StoredCrops(args.audio, recipe.crop_seconds, seed, codes, recipe.lead_seconds)
        elif args.midi_root and args.piano:
            data = RenderedCrops(args.midi_root, "train", args.piano, recipe.rooms, recipe.crop_seconds, seed=seed)
        else:
            parser.error("give audio: --midi-root and --piano, or --audio")
        if args.part == "features":
            fit_features(recipe, data, args.workers, output)
        elif args.part == "codebooks":
            freeze_codes(recipe, args.codec, data, args.workers, output)
        elif args.part == "encode":
            encode_pools(args.codec, args.audio)
        elif args.part == "listener":
            torch.manual_seed(recipe.seed)
            Run(ListenerObjective(Listener()), recipe, data, output, args.workers).train(args.stop_after)
        else:
            start = args.codec or args.features
            begins = args.part == "encoder" or (args.part == "decoder" and not args.go_on)
            if start is None or (begins and args.features is None):
                parser.error(f"{args.part} needs {'--features' if begins else '--codec'}")
            codec = PianoEncodecModel.from_pretrained(start, dtype=torch.float32)
            Run(objective_of(args, recipe, codec, data), recipe, data, output, args.workers).train(args.stop_after)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
