# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Train the decoders, AR, NAR or one after the other, on the shards of `scripts.prepare_dataset`.

    accelerate launch -m scripts.train --config recipes/starter_ar.yaml --part ar \\
        --data DATA --codec CODEC --output-dir RUN
    torchrun --nproc-per-node 2 -m scripts.train ...                     # the same on two processes
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m scripts.train ...  # or fsdp.yaml

Writes `log.jsonl`, checkpoints `step_N`, and the averaged weights as `from_pretrained` folders with a model card:
`model`, the last ones, and `best`, those of the lowest validation loss. Started again, however it ended, it goes on
from the newest whole checkpoint as if it had never stopped; SIGTERM or Ctrl-C saves first. The runs of `--part both`
are RUN/ar and RUN/nar.
"""

import argparse
import math
import os
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from modeling_midivalle import (
    MidiValleARConfig,
    MidiValleARModel,
    MidiValleNARConfig,
    MidiValleNARModel,
)
from scripts.dataset.shards import DEFAULT_SUSTAIN
from scripts.decoders.data import DataError, TrainingStream, dataset_info, shard_files
from scripts.decoders.objectives import start_as_published, start_from_codebooks
from scripts.decoders.recipe import TrainRecipe
from scripts.decoders.run import BadLossError, Run
from scripts.models.model_folder import model_folder
from scripts.models.trained_parts import codec_hash, load_codebooks, load_part
from scripts.training.model_card import RunCard, add_licence, decoder_card
from scripts.training.processes import FolderLock, StopSignals, run_errors
from scripts.training.publishing import push
from scripts.training.recipe_file import model_of
from scripts.unfinished import check_output_folder
from tokenization import MidiValleTokenizer

VALIDATION_PROMPT_S = 4.0  # or what is nearest to it of the recipe's prompts
PARTS = {"ar": (MidiValleARConfig, MidiValleARModel), "nar": (MidiValleNARConfig, MidiValleNARModel)}


def start_model(recipe: TrainRecipe, part: str, codebooks: torch.Tensor):
    """A decoder with new weights, or with those of `recipe.init_from`; what its changed fields add to it is new.

    Raises:
        ValueError: the folder of `init_from` holds no such decoder, or more than the changed fields leave; no decoder
            can have these fields; it does not fit the codec.
    """
    torch.manual_seed(recipe.seed)
    config_class, model_class = PARTS[part]
    changes = getattr(recipe, part)
    if recipe.frame_steps and not recipe.codebook_start:
        raise ValueError("frame_steps need codebook_start: then a hidden state begins as the latent")
    if recipe.init_from is None:
        with model_of(part):
            model = model_class(config_class.from_preset(recipe.preset, **changes))
    else:
        trained = load_part(part, recipe.init_from, "init_from")
        with model_of(part):
            model = model_class(config_class.from_dict(trained.config.to_dict() | changes))
        state, own = trained.state_dict(), model.state_dict()
        if left := [name for name, value in state.items() if name not in own or own[name].shape != value.shape]:
            raise ValueError(f"{recipe.init_from}: with {part}: {changes} there is no place for {', '.join(left[:3])}")
        model.load_state_dict(state, strict=False)
    check_can_learn(part, model.config, codebooks)
    if recipe.init_from is None and recipe.codebook_start:
        start_from_codebooks(model, codebooks)
    elif recipe.init_from is None and recipe.preset == "published":
        start_as_published(model)
    return model


def check_can_learn(part: str, config, codebooks: torch.Tensor) -> None:
    """ValueError if a decoder does not learn (int8), or does not fit the codec, which the AR would not notice."""
    if config.quantization:
        raise ValueError(f"{part}: {config.quantization} weights do not learn; begin with a model that has none")
    wanted, found = tuple(codebooks.shape[:2]), (config.num_codebooks, config.codebook_size)
    if found != wanted:
        raise ValueError(f"{part}: num_codebooks and codebook_size are {found}, but the codec has {wanted}")


def make_run(
    args: argparse.Namespace, recipe: TrainRecipe, part: str, output: Path, card: RunCard | None = None
) -> Run:
    """The run that the command line asks for, whose weights get a `card`.

    Raises:
        ValueError: data, codec, recipe or checkpoint that cannot be used.
    """
    files, held = (shard_files(args.data, split) for split in ("train", "validation"))
    info, of_held, wanted = dataset_info(files), dataset_info(held), codec_hash(args.codec)
    for found in (info["codec_sha256"], of_held["codec_sha256"]):
        if found != wanted:
            raise DataError(
                f"{args.data} was encoded by codec {found[:12]}, but {args.codec} is {wanted[:12]}: encode anew"
            )
    pedals, held_pedals = (of.get("sustain", DEFAULT_SUSTAIN) for of in (info, of_held))
    if pedals != held_pedals:
        made = f"train with --sustain {pedals}, validation with --sustain {held_pedals}"
        raise DataError(f"{args.data}: was made differently, {made}: make one of them anew")
    tokenizer = MidiValleTokenizer(mark_held=recipe.mark_held, sustain=pedals)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    names = ("prompt_seconds", "no_prompt_share", "short_share", "seed", "batch_frames")
    layout = {name: getattr(recipe, name) for name in names} | {"rank": rank, "world_size": world}
    stream = TrainingStream(files, tokenizer, recipe.batch_size, **layout)
    prompt_s = float(np.clip(VALIDATION_PROMPT_S, *recipe.prompt_seconds))
    layout = {"prompt_seconds": (prompt_s, prompt_s), "no_prompt_share": float(recipe.no_prompt_share == 1)}
    layout |= {"batch_frames": recipe.batch_frames, "drop_last": False}
    held_out = TrainingStream(held, tokenizer, recipe.batch_size, **layout)
    validation = list(islice(held_out, recipe.validation_batches))
    data = info | {"shards": len(files), "rows": stream.shards.digest, "validation_rows": held_out.shards.digest}
    codebooks = load_codebooks(args.codec)
    model = start_model(recipe, part, codebooks)
    return Run(recipe, part, model, stream, validation, codebooks, output, data, args.codec, tokenizer, card)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="recipe, YAML; see recipes/*.yaml")
    parser.add_argument("--part", default="both", choices=[*sorted(PARTS), "both"], help="which decoder")
    parser.add_argument(
        "--data", required=True, help="shards of a train and a validation split: folder, Hub dataset, URL"
    )
    parser.add_argument(
        "--codec",
        required=True,
        help="what made the data (a codec, or a model with it), folder or Hub id; another is refused",
    )
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--stop-after", type=float, help="seconds of wall time after which to save and stop")
    parser.add_argument("--force", action="store_true", help="go on although recipe, data or versions have changed")
    parser.add_argument(
        "--push-to-hub", "--push_to_hub", metavar="OWNER/NAME", help="upload the last weights at the end"
    )
    add_licence(parser)
    args = parser.parse_args(argv)
    if args.stop_after is not None and not args.stop_after > 0:
        parser.error("--stop-after must be above 0")
    return args


def train(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    recipe, began = TrainRecipe.from_yaml(args.config), time.time()
    parts = ["ar", "nar"] if args.part == "both" else [args.part]
    outputs = {part: args.output_dir / part if args.part == "both" else args.output_dir for part in parts}
    for output in (args.output_dir, *outputs.values()):
        check_output_folder(output)
    codec, args.codec = args.codec, str(model_folder(args.codec, "--codec"))
    if args.part == "both":  # what the NAR cannot begin with is said before the AR has learned for hours
        start_model(recipe, "nar", load_codebooks(args.codec))
    for part, output in outputs.items():
        hub_id = args.push_to_hub and args.push_to_hub + (f"-{part}" if args.part == "both" else "")
        card = decoder_card(part, recipe, args.data, codec, args.licence, hub_id)
        run = make_run(args, recipe, part, output, card)
        with FolderLock(output), StopSignals() as signals:
            run.resume(args.force)
            limit = math.inf if args.stop_after is None else began + args.stop_after
            if not run.train(lambda: signals.received or time.time() > limit):  # noqa: B023  used up within the loop
                run.accelerator.print(f"stopped at step {run.step} ({signals.received or '--stop-after'}); saved")
                return
        if hub_id and run.accelerator.is_main_process:
            push(output / "model", hub_id)


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success or when told to stop, 1 on a bad loss, 2 on what cannot be used or written, 130 if
    it was interrupted before it could save."""
    args = parse(argv)
    try:
        with run_errors():
            train(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BadLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # outside of a run, or for the second time
        print("interrupted; start it again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
