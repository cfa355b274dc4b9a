# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The settings of `scripts.train`, as recipe files have them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from modeling_midivalle import MidiValleARConfig, MidiValleNARConfig
from scripts.training.recipe_file import check_fields, check_ranges, check_trackers, read_recipe

CHOICES = {
    "optimizer": ("adamw", "muon", "scaled_adam"),
    "schedule": ("cosine", "eden"),
    "on_bad_loss": ("stop", "skip"),
}
FREE = ("save_steps", "save_total_limit", "log_steps", "report_to", "sample_seconds")  # a resumed run may have others


@dataclass
class TrainRecipe:
    """What a recipe file (YAML) may set, for either decoder."""

    preset: str = "starter"
    init_from: str | None = None  # folder of trained weights to go on from: of the decoder, or of a whole model
    ar: dict = field(default_factory=dict)  # fields of MidiValleARConfig that differ from the preset or from init_from
    nar: dict = field(default_factory=dict)
    batch_size: int = 8  # rows a process and batch
    batch_frames: int | None = None  # instead: as many rows as have this many frames, prompts counted
    gradient_accumulation_steps: int = 1  # batches a step
    gradient_checkpointing: bool = False  # less memory, a third more work; the same gradients
    steps: int = 10_000
    optimizer: str = "adamw"  # or muon, at the same rates, or scaled_adam, the published one, at relative ones: 0.05
    schedule: str = "cosine"  # or eden, the published one
    learning_rate: float = 1e-3
    warmup_steps: int = 200  # of cosine, and its last rate
    final_learning_rate_share: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0  # of adamw; scaled_adam clips by its own rule
    prompt_seconds: tuple[float, float] = (1.0, 6.0)
    no_prompt_share: float = 0.05
    short_share: float = 0.0  # of batches whose targets are cut to a drawn length, as the first windows of a piece are
    mark_held: bool = True  # notes that sound on from before an excerpt get rows; the published model knows none
    own_share: float = 0.5  # AR: of the rows see their own predictions, the others no past target code
    code_noise: float = 0.5  # NAR: lower codebooks are disturbed by up to this, relative to the codebook's deviation
    latent_weight: float = 5.0  # of the expected code's distance to the truth, beside the cross-entropy
    frame_steps: int = 0  # that come first: frames alone with their notes, without attention and prompt
    codebook_start: bool = True  # without init_from, tables and heads begin as the codec's codebooks
    average_decay: float = 0.998  # of the weights that are saved
    bf16: bool = True
    on_bad_loss: str = "stop"  # where loss or gradient is not finite, or the loss explodes; or skip: no update
    exploding_ratio: float | None = 20.0  # loss of a step over its running mean
    max_skipped: int = 10  # steps that skip may pass over in the whole run; one more stops it
    save_steps: int = 500
    save_total_limit: int = 2  # checkpoints that are kept
    log_steps: int = 50
    report_to: list[str] = field(default_factory=list)  # tensorboard, trackio: where they are installed
    sample_seconds: float = 4.0  # of sound that the trackers get at each validation, with the curves; 0: neither
    validation_batches: int = 4
    seed: int = 0

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        check_trackers(self.report_to)
        if self.exploding_ratio is not None and self.exploding_ratio <= 1:  # the first loss is the usual one
            raise ValueError(f"exploding_ratio must be above 1, or null, got {self.exploding_ratio}")
        counts = ("batch_size", "gradient_accumulation_steps", "steps", "save_steps", "save_total_limit", "log_steps")
        counts += ("batch_frames",)
        shares = ("no_prompt_share", "short_share", "own_share", "average_decay", "final_learning_rate_share")
        rest = ("prompt_seconds", "frame_steps", "warmup_steps", "weight_decay", "code_noise", "latent_weight", "seed")
        rest += ("clip_norm", "max_skipped", "sample_seconds", "validation_batches")
        check_ranges(self, ("learning_rate",), shares, **dict.fromkeys(counts, 1), **dict.fromkeys(rest, 0))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be from 0 to below 1, got {list(self.betas)}")
        check_fields("ar", self.ar, MidiValleARConfig)
        check_fields("nar", self.nar, MidiValleNARConfig)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainRecipe":
        """Read a recipe; an unknown key is an error that names it."""
        return read_recipe(path, cls)

    def binding(self) -> dict:
        """The settings that a resumed run must share with its checkpoint."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}
