# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Adapt a model to one piano by LoRA, from 1 to 10 minutes of a recording and its MIDI.

    python -m scripts.adapt mine.wav mine.mid --output-dir my_piano

Needs peft (`make install-peft`). AR, NAR or both learn (`part` of the recipe), codec and weights stay; then what the
sound still lacks in ten parts of the spectrum is measured, and made up for. The end of the recording is held back: a
table of what the model made of it before and after, also in `report.json`. The folder is an adapter, with a card
(`README.md`, the base's licence), as the Hub has them:

    python -m scripts.render piece.mid piece.wav --adapter my_piano --prompt-audio mine.wav --prompt-midi mine.mid

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.load_adapter("my_piano")
"""

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from modeling_midivalle.recording_midivalle import RecordingStream, measure_recording
from processing.audio_midivalle import SAMPLING_RATE
from processing.processing_midivalle import MAX_RING_OUT_S, Prompt
from scripts.dataset.own_recording import FRAMES_PER_SECOND, GRID_S, Recording, read_recording
from scripts.decoders.objectives import DecoderLosses
from scripts.measuring.metrics import colour_difference, timbre_distance
from scripts.measuring.note_onsets.scores import note_scores
from scripts.measuring.transcription import Transcriber, TranscriptionError
from scripts.models.model_folder import ADAPTER_FILES, DEFAULT_MODEL, load_model, load_processor, model_folder
from scripts.rendering.pieces import render_wave
from scripts.training.model_card import CARD, adapter_card, base_of
from scripts.training.processes import run_errors
from scripts.training.publishing import export
from scripts.training.recipe_file import check_ranges, read_recipe
from scripts.training.schedules import warmup_cosine
from scripts.unfinished import check_output_folder, write_json, write_text
from scripts.wording import counted
from tokenization.midi_midivalle import Performance
from tokenization.tokenization_midivalle import SEQUENCE_SECONDS

PARTS = {"ar": r"ar\.model", "nar": "nar", "both": r"(ar\.model|nar)"}
LINEAR = r"\.layers\.\d+\.(self_attn\.(in_proj|out_proj)|linear1|linear2)"
COLOUR_S = 90.0  # of the part that is learned from, at most, that is played to find what its sound lacks
LISTENED_S = 36.0  # of the held part, at most: of 12 s the spectrum is as much the music's as the piano's


class AdaptError(ValueError):
    """A recording that cannot be learned from, or peft that is not there; one sentence."""


@dataclass
class AdaptRecipe:
    """What a recipe file (YAML) may set."""

    part: str = "both"  # what learns: `ar`, `nar`, `both`
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    steps: int = 240  # of each part
    batch_size: int = 2
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    prompt_seconds: tuple[float, float] = (1.0, 6.0)
    target_seconds: float = 6.0
    held_share: float = 0.2  # of the recording, its end: never learned from
    max_minutes: float = 14.0  # after which learning ends, whatever steps are left
    latent_weight: float = 5.0
    own_share: float = 0.5
    code_noise: float = 0.5
    seed: int = 0
    frame_steps: ClassVar[int] = 0  # of `DecoderLosses`: frames alone come before there is an AR

    def __post_init__(self):
        least = dict.fromkeys(("warmup_steps", "max_minutes", "latent_weight", "code_noise", "seed"), 0)
        least |= dict.fromkeys(("rank", "steps", "batch_size"), 1)
        shares = ("dropout", "own_share")
        check_ranges(self, ("learning_rate", "alpha"), shares, prompt_seconds=0.5, target_seconds=0.5, **least)
        if not 0 < self.held_share < 1:
            raise ValueError(f"held_share must be between 0 and 1, got {self.held_share}")
        if any(seconds % GRID_S for seconds in (*self.prompt_seconds, self.target_seconds)):
            raise ValueError(f"prompt_seconds and target_seconds must be multiples of {GRID_S}")
        if not self.dropout < 1:  # with 1 nothing is learned
            raise ValueError(f"dropout must be below 1, got {self.dropout}")
        if self.part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {self.part!r}")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "AdaptRecipe":
        """Read a recipe; an unknown key is an error that names it."""
        return read_recipe(path, cls)


def require_peft() -> None:
    """AdaptError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise AdaptError("peft is not installed: run make install-peft")


def check_output(output: Path) -> None:
    """ValueError unless `output` is new or empty and can be written to: an adapter in a model's own folder would be
    played with it from then on."""
    check_output_folder(output, beside=True)  # `export` writes beside it, then into it
    if output.exists() and any(output.iterdir()):
        raise AdaptError(f"--output-dir {output}: exists already; choose another")


def add_adapter(model, recipe: AdaptRecipe) -> list[torch.nn.Parameter]:
    """Give the recipe's parts a LoRA, and the model's colour, if it has one. Returns what is to be trained of the
    parts; all else stays.

    Raises:
        AdaptError: peft is not installed.
    """
    require_peft()
    from peft import LoraConfig

    lora = {"r": recipe.rank, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}
    torch.manual_seed(recipe.seed)
    layers = PARTS[recipe.part] + LINEAR
    model.add_adapter(LoraConfig(target_modules=f"({layers}|colour)" if hasattr(model, "colour") else layers, **lora))
    return [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("colour.")]


@torch.no_grad()
def measure(losses: dict[str, DecoderLosses], batches: list[dict], num_codebooks: int) -> dict[str, float]:
    """Mean `code` loss and `top10` of each codebook over `batches`."""
    found = {}
    for stage in range(num_codebooks):
        part = losses["ar" if stage == 0 else "nar"].eval()
        rows = [part.measure(batch, stage) for batch in batches]
        for name, label in (("code", "loss"), ("top10", "top-10 accuracy")):
            found[f"{label}, codebook {stage}"] = float(np.mean([float(row[name]) for row in rows]))
    return found


def learn(
    losses: dict[str, DecoderLosses], trained: list, recording: Recording, recipe: AdaptRecipe, end: float
) -> int:
    """Train the adapter on what lies before `end`, s; returns the steps that were done."""
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=0.0)
    began, device = time.time(), trained[0].device
    for step in range(recipe.steps):
        if time.time() - began > 60 * recipe.max_minutes:
            return step
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warmup_cosine(step, recipe.warmup_steps, recipe.steps, 0.05)
        batch = recording.draw(np.random.default_rng([recipe.seed, step]), recipe, end)
        batch = {k: v.to(device) for k, v in batch.items()}
        shown = {}
        for name, part in losses.items():
            found = part.train()(batch, step, step)
            total = sum(value * (1.0 if key == "code" else recipe.latent_weight) for key, value in found.items())
            if not torch.isfinite(total):
                raise AdaptError(f"step {step}: the loss is {total.item()}; lower learning_rate")
            total.backward()
            shown[name] = round(found["code"].item(), 3)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            print({"step": step + 1, "wall_s": round(time.time() - began)} | shown, flush=True)
    return recipe.steps


@torch.no_grad()
def learn_colour(model, processor, recording: Recording, recipe: AdaptRecipe, end: float) -> None:
    """What the adapted model's sound lacks, in the parts of the spectrum of `config.colour_gains_db`, becomes the
    adapter's share of the layer `colour`. It is measured on what lies before `end`, s."""
    if not (hasattr(model, "colour") and model.config.as_recorded):
        return
    begin = max(end - COLOUR_S, recipe.prompt_seconds[1])
    onset = recording.notes["onset"]
    if not ((onset >= begin) & (onset < end)).any():
        return
    wave = played(model, processor, recording, recipe, begin, end - begin)
    lacking = -torch.tensor(colour_difference(recording.cut(begin, end - begin), wave))
    first, second = (layers["default"].weight for layers in (model.colour.lora_A, model.colour.lora_B))
    second.copy_(torch.outer(lacking, first[:, 0]) / (first.square().sum() * model.colour.scaling["default"]))


def play(model, processor, recording: Recording, recipe: AdaptRecipe, end: float, transcriber) -> dict[str, float]:
    """What can be heard of the held part, after the prompt just before it: how far the mean spectrum is from the
    recording's, and with a transcriber how many notes are found."""
    seconds = held_seconds(recording, end)
    wave = played(model, processor, recording, recipe, end, seconds)
    return heard(recording, wave, end, seconds, transcriber)


def played(model, processor, recording: Recording, recipe: AdaptRecipe, begin: float, seconds: float) -> np.ndarray:
    """The model's version of `seconds` of the recording from `begin` s on, after the prompt just before it."""
    model.eval()
    prompt = prompt_of(recording, recipe, begin)
    piece = processor.load(Performance(recording.notes, "the recording", {}), start=begin, end=begin + seconds)
    ring_out = min(max(seconds - piece.end, 0.0), MAX_RING_OUT_S)
    wave = render_wave(model, processor, piece, prompt, recipe.seed, ring_out, {})
    return np.pad(wave, (0, round(seconds * SAMPLING_RATE) - len(wave)))  # what would ring longer has died away


def held_seconds(recording: Recording, end: float) -> float:
    """How much of what is held back from `end` s on is listened to, s."""
    return min(LISTENED_S, (recording.seconds - end) // GRID_S * GRID_S)


def prompt_of(recording: Recording, recipe: AdaptRecipe, end: float) -> Prompt:
    """The longest prompt of `recipe` just before `end`, s."""
    seconds = recipe.prompt_seconds[1]
    return Prompt(recording.cut(end - seconds, seconds), recording.notes_from(end - seconds))


@torch.no_grad()
def reconstruct(model, recording: Recording, recipe: AdaptRecipe, end: float, seconds: float) -> np.ndarray:
    """What the codec gives back of the recording from `end` s on, with the colour and noise of the prompt's recording
    if the model plays so; `colour_gains_db` are of what is generated."""
    codes, prompt = recording.heard[None].to(model.device), prompt_of(recording, recipe, end)
    first, middle, last = (round(s * FRAMES_PER_SECOND) for s in (end - prompt.seconds, end, end + seconds))
    wave = model.codec.decode_codes(codes[..., middle:last])
    if model.config.as_recorded:
        made = model.codec.decode_codes(codes[..., first:middle])[0, 0]
        wave = RecordingStream(measure_recording(torch.from_numpy(prompt.wave).to(made), made, SAMPLING_RATE))(wave)
    return wave[0, 0].cpu().numpy()


def heard(recording: Recording, wave: np.ndarray, end: float, seconds: float, transcriber) -> dict[str, float]:
    """Distance of the mean spectra, dB, of `wave` and of the recording from `end` s on; onset F1 of its notes."""
    found = {"timbre distance, dB": timbre_distance(recording.cut(end, seconds), wave)}
    if transcriber is not None:
        notes = recording.notes_from(end)
        notes = notes[(notes["onset"] >= 0) & (notes["onset"] < seconds)]
        found["onset F1"] = note_scores(notes, transcriber(wave, SAMPLING_RATE))["f1"]
    return found


def find_transcriber():
    """The transcriber, or `None` after a sentence."""
    try:
        return Transcriber()
    except TranscriptionError as error:
        print(f"no onset F1: {error}", flush=True)
        return None


def table(before: dict[str, float], after: dict[str, float], codec: dict[str, float]) -> str:
    """Markdown: each figure before and after, and of the codec's reconstruction where there is one."""
    rows = ["| held part | before | after | codec |", "| --- | --- | --- | --- |"]
    for name in before:
        best = f"{codec[name]:.3f}" if name in codec else ""
        rows.append(f"| {name} | {before[name]:.3f} | {after[name]:.3f} | {best} |")
    return "\n".join(rows)


def write_adapter(model, output: Path, base: str) -> None:
    """The adapter of `model` to `output`, with the name of its `base`: peft writes a path on this machine."""
    export(model, output)
    file = output / ADAPTER_FILES[0]
    write_json(file, json.loads(file.read_text()) | {"base_model_name_or_path": base})


def adapt(
    model, processor, recording: Recording, recipe: AdaptRecipe, transcriber, listen: bool, output: Path, base: str
) -> dict:
    """Add an adapter to `model`, whose name is `base`, train it and write it to the folder `output`; returns steps and
    the figures `before`, `after` and of the `codec`.

    Raises:
        AdaptError: peft is missing, or the held part is shorter than a target or, if listened to, without notes.
        PublishError: the adapter could not be written.
    """
    end = recording.seconds * (1 - recipe.held_share) // GRID_S * GRID_S
    fits = end >= recipe.prompt_seconds[1] + recipe.target_seconds
    batches = recording.held(recipe, end) if fits else []
    if not batches:
        raise AdaptError("the held part or the rest is shorter than a target: change held_share or target_seconds")
    seconds, onsets = held_seconds(recording, end), recording.notes["onset"]
    if listen and not ((onsets >= end) & (onsets < end + seconds)).any():
        raise AdaptError(
            f"no note is struck from {end:g} to {end + seconds:g} s, where the held part is listened to: change "
            "held_share, or give --losses-only"
        )
    batches = [{k: v.to(model.device) for k, v in batch.items()} for batch in batches]
    trained = add_adapter(model, recipe)
    books = torch.stack([layer.codebook.embed for layer in model.codec.quantizer.layers])
    losses = {name: DecoderLosses(getattr(model, name), books, recipe) for name in ("ar", "nar")}

    def figures():
        found = measure(losses, batches, model.config.ar_config.num_codebooks)
        return found | (play(model, processor, recording, recipe, end, transcriber) if listen else {})

    before = figures()  # a new adapter changes nothing: its second matrix is zero
    learning = {name: part for name, part in losses.items() if recipe.part in (name, "both")}
    steps = learn(learning, trained, recording, recipe, end)
    write_adapter(model, output, base)  # now: whatever becomes of what follows
    learn_colour(model, processor, recording, recipe, end)
    write_adapter(model, output, base)
    after, codec = figures(), {}
    if listen:
        codec = heard(recording, reconstruct(model, recording, recipe, end, seconds), end, seconds, transcriber)
    return {"steps": steps, "before": before, "after": after, "codec": codec}


def adapt_files(args: argparse.Namespace, output: Path) -> dict:
    """What the command line asks for; see `adapt`."""
    recipe = AdaptRecipe.from_yaml(args.config)
    check_output(output)
    require_peft()
    folder = model_folder(args.model)
    processor, model = load_processor(folder), load_model(folder, args.device)
    longest = max(recipe.target_seconds, processor.max_window_seconds)
    if recipe.prompt_seconds[1] + longest > SEQUENCE_SECONDS:  # found after learning otherwise
        raise AdaptError(
            f"{args.config}: prompt_seconds up to {recipe.prompt_seconds[1]} and windows of {longest} s do not fit into"
            f" the {SEQUENCE_SECONDS} s of one sequence; lower prompt_seconds"
        )
    recording, remark = read_recording(args.audio, args.midi, model, processor)
    print(f"{recording.seconds:.0f} s, {counted(len(recording.notes), 'note')}. {remark}", flush=True)
    transcriber = None if args.losses_only else find_transcriber()
    base = base_of(args.model, folder).name
    report = adapt(model, processor, recording, recipe, transcriber, not args.losses_only, output, base)
    write_json(output / "report.json", report)
    figures = table(report["before"], report["after"], report["codec"])
    about = (recipe, recording.seconds, len(recording.notes), report["steps"])
    write_text(output / CARD, adapter_card(output.name, args.model, folder, *about, figures))
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used, 130 if interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", help="WAV or FLAC of one piano, 1 to 10 minutes")
    parser.add_argument("midi", help="what is played in it")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--config", default="recipes/my_piano.yaml", help="recipe, YAML (default: %(default)s)")
    parser.add_argument("--output-dir", required=True, type=Path, help="the adapter goes here")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--losses-only", action="store_true", help="do not play the held part before and after")
    args = parser.parse_args(argv)
    output = args.output_dir.resolve()  # `.` has no name
    try:
        with run_errors():
            report = adapt_files(args, output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f"the adapter is in {output}, without card and figures"
        is_kept = (output / ADAPTER_FILES[0]).is_file()
        print(f"interrupted; {kept if is_kept else 'no adapter was written'}", file=sys.stderr)
        return 130
    print(table(report["before"], report["after"], report["codec"]))
    folder = str(args.output_dir)
    print(
        f"{counted(report['steps'], 'step')}; the adapter is in {folder}: scripts.render --adapter, "
        f"model.load_adapter({folder!r})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
