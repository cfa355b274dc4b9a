# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What a codec recipe file (YAML) may set, see `recipes/codec_*.yaml`."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from modeling_midivalle import PianoEncodecConfig, PianoListenerConfig
from scripts.audio.rooms import ROOM_NAMES, ROOMS
from scripts.training.recipe_file import check_fields, check_ranges, check_trackers, read_recipe

OPTIMIZERS = ("adam", "muon")
LOSS_WEIGHTS = {"mel": 1.0, "convergence": 0.5, "onset": 0.25, "waveform": 0.2, "commitment": 0.25, "regression": 1.0}
LOSS_WEIGHTS |= {"adversarial": 0.05, "features": 0.1, "notes": 10.0, "heard": 0.3, "struck": 60.0, "strength": 16.0}
LOSS_WEIGHTS |= {"keep": 1.0, "kicks": 30.0, "level": 0.0, "velocity": 2.0}


@dataclass
class CodecRecipe:
    """Settings of one run of `scripts.train_codec`; times in s, levels in dB."""

    model: dict = field(default_factory=dict)  # fields of PianoEncodecConfig
    listener: dict = field(default_factory=dict)  # fields of PianoListenerConfig, of one that begins from nothing
    rooms: list[str] = field(default_factory=lambda: list(ROOMS))  # of rendered audio; each recording's own is jittered
    crop_seconds: float = 2.0
    lead_seconds: float = 0.0  # before a crop: what still sounds in it began there, and the decoder remembers it
    excerpt_seconds: float = 12.0  # rendered or read at a time, then cut into crops
    mixed_excerpts: int = 32  # whose crops are mixed before they become batches
    level_db: tuple[float, float] = (0.0, 0.0)  # each crop's gain is drawn from here; by it full scale is not exceeded
    noise_db: tuple[float, float] | None = None  # and white noise of this RMS, dBFS, is added
    colour_db: float = 0.0  # spread of the levels that a filter of the crop's own has, see scripts.codec.data.coloured
    batch_size: int | str = 6  # crops of a process and batch; "auto": what fits into the GPU, see scripts.codec.run
    accumulation: int = 1  # batches of a step
    steps: int = 20_000
    memory: float = 0.6  # share of the frame before that the latent leaves out, see SpectralFeatures
    sing_steps: int = 600  # of the decoder: gates alone, through exact synthesis
    kmeans_vectors: int = 400_000  # from 60,000 the codes leave 0.018 of their variance, but 0.11 of new audio's
    optimizer: str = "adam"  # or muon, at the same rates, see scripts.training.muon
    learning_rate: float = 1e-3
    discriminator_learning_rate: float = 3e-4
    warmup_steps: int = 100
    final_learning_rate_share: float = 0.02
    betas: tuple[float, float] = (0.8, 0.99)
    clip_norm: float = 1.0
    codebook_decay: float = 0.99
    dead_code: float = 0.01  # averaged uses a step below which a code is revived, a process
    weights: dict[str, float] = field(default_factory=dict)  # of each loss by name
    adversarial_from: int | None = None  # step at which the discriminator starts; None: never
    average_decay: float = 0.999  # of the weights that are saved
    bf16: bool = True  # autocast of the encoder and decoder; quantiser, losses and the last layer stay fp32
    validation_crops: int = 4
    validation_seconds: float = 5.0
    save_steps: int = 500
    log_steps: int = 100
    report_to: list[str] = field(default_factory=list)  # tensorboard, trackio: where they are installed
    seed: int = 0

    def __post_init__(self):
        unknown = set(self.weights) - set(LOSS_WEIGHTS)
        if unknown:
            raise ValueError(f"unknown loss weights {sorted(unknown)}: choose from {sorted(LOSS_WEIGHTS)}")
        if not self.rooms or not set(map(str, self.rooms)) <= set(ROOM_NAMES):
            raise ValueError(f"rooms: {self.rooms} are not all of {', '.join(ROOM_NAMES)}")
        if self.batch_size != "auto" and not (isinstance(self.batch_size, int) and self.batch_size > 0):
            raise ValueError(f"batch_size is a number of crops or auto, not {self.batch_size!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        counts = ("mixed_excerpts", "accumulation", "steps", "kmeans_vectors", "save_steps", "log_steps")
        positive = ("learning_rate", "discriminator_learning_rate", "clip_norm")
        shares = ("memory", "final_learning_rate_share", "codebook_decay", "average_decay")
        rest = ("lead_seconds", "warmup_steps", "sing_steps", "dead_code", "adversarial_from", "validation_crops")
        least = (
            dict.fromkeys(counts, 1)
            | dict.fromkeys(rest, 0)
            | {"seed": 0, "colour_db": 0, "crop_seconds": 0.1, "validation_seconds": 0.3}
        )
        check_ranges(self, positive, shares, **least, level_db=-math.inf, noise_db=-math.inf)
        if self.noise_db is not None and self.noise_db[1] >= 0:
            raise ValueError(f"noise_db must be below 0, which is full scale, got {list(self.noise_db)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be from 0 to below 1, got {list(self.betas)}")
        if wrong := {name: weight for name, weight in self.weights.items() if not weight >= 0}:
            raise ValueError(f"weights must be at least 0, got {wrong}")
        check_trackers(self.report_to)
        check_fields("model", self.model, PianoEncodecConfig)
        check_fields("listener", self.listener, PianoListenerConfig)
        if self.excerpt_seconds < self.lead_seconds + self.crop_seconds:
            crop = f"{self.crop_seconds} s after {self.lead_seconds} s"
            raise ValueError(f"crops of {crop} do not fit into excerpts of {self.excerpt_seconds} s")
        self.weights = LOSS_WEIGHTS | self.weights

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides) -> "CodecRecipe":
        """Read a recipe; an unknown key is an error that names it. `overrides` that are not None win."""
        return read_recipe(path, cls, **overrides)

    def decisive(self) -> dict:
        """What a run that goes on must not change: all but when it is saved, looked at and written about."""
        free = {"save_steps", "log_steps", "report_to", "validation_crops", "validation_seconds"}
        return {k: v for k, v in asdict(self).items() if k not in free}
