# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Train the Piano-Encodec: from nothing, part by part, or fine-tune any Hugging Face EnCodec of 32 kHz.

    python -m scripts.train_codec features  --config RECIPE [audio] --output-dir RUNS/features
    python -m scripts.train_codec encoder   --config RECIPE [audio] --features RUNS/features --output-dir RUNS/encoder
    python -m scripts.train_codec hearing   --config RECIPE [audio] --codec RUNS/encoder/codec --output-dir RUNS/hearing
    python -m scripts.train_codec codebooks --config RECIPE [audio] --codec RUNS/hearing/codec --output-dir RUNS/codes
    python -m scripts.train_codec encode    --config RECIPE --audio POOL.npy --codec RUNS/codes
    python -m scripts.train_codec listener  --config RECIPE [audio] [--go-on --listener OTHER] \\
        --output-dir RUNS/listener
    python -m scripts.train_codec decoder   --config RECIPE [audio] --features RUNS/features --codec RUNS/codes \\
        [--listener RUNS/listener] --output-dir RUNS/decoder
    python -m scripts.train_codec kicks     --config RECIPE [audio] --codec RUNS/decoder/codec --output-dir RUNS/kicks
    python -m scripts.train_codec decoder --go-on --config RECIPE [audio] --codec RUNS/kicks/codec \\
        --listener RUNS/listener --output-dir RUNS/final
    python -m scripts.train_codec whole     --config RECIPE [audio] --codec FOLDER_OR_HUB_ID \\
        [--listener RUNS/listener] --output-dir RUNS/finetuned

[audio] is one of
    --midi-root PACK/midi --piano PIANO.tar ...   rendered while it is needed, no sample twice
    --audio POOL.npy ...                          rendered before by scripts.render_pool
    --audio FOLDER_OR_FILE ...                    recordings: .wav, .flac (a .mid beside or none), parquet shards

`features` fits the latent's axes; the encoder learns to produce them; in `hearing` its last layers, which cost
little, learn for longer to hear struck keys, at any time, for its other axes stay; `codebooks` fits the residual stack
to what it does produce, and from then on the codes are fixed, whatever the decoder still learns. The `listener` learns
to hear struck keys: it tells a codec what to write (`assemble_model --listener`), and makes every note that the decoder
loses a loss of its own. `kicks` gives each struck key an
attack of its own where its partials already sound (`scripts.codec.oscillators`). `whole` fine-tunes all of any 32 kHz
EnCodec, as the paper does.

A run goes on from its newest checkpoint; a signal saves one first. `features` and `codebooks` are fitted at once, and
replace no earlier ones; they and `encode` take one process. The others take several: `accelerate launch -m
scripts.train_codec ...` or `torchrun -m scripts.train_codec ...`. In the output folder: the codec or the listener with
its model card, `log.jsonl`, `learning_curves.png`, and with `--validation` (rendered: the manifest's validation split)
`samples/`, what has become of some fixed crops; the recipe's `report_to` sends the last three to tensorboard or trackio
too.
"""

import argparse
import os
import sys
from pathlib import Path

from scripts.audio.recorded_audio import RecordedExcerpts
from scripts.audio.rendered_audio import RenderedExcerpts, content_sha256, source_settings
from scripts.codec.data import CropBatches, StoredCrops, StoredExcerpts, fixed_batch
from scripts.codec.parts import encode_pools, fit_codebooks, fit_features, objective_of, trained_listener
from scripts.codec.recipe import CodecRecipe
from scripts.codec.run import CPU_BATCH, Run
from scripts.models.model_folder import LISTENER, model_folder
from scripts.models.trained_parts import codec_hash
from scripts.rendering.manifest import weights_sha256
from scripts.training.model_card import Base, add_licence, base_of, base_of_listener, codec_card
from scripts.training.processes import run_errors
from scripts.unfinished import check_output_folder

PARTS = ("features", "encoder", "hearing", "codebooks", "encode", "listener", "decoder", "kicks", "whole")
FITTED = ("features", "codebooks", "encode")  # at once, not step by step
VALIDATION_SEED = 1_000_003  # of recordings: other excerpts than the first of training


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what contradicts itself is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_codec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--config", required=True, help="recipe, YAML; see recipes/codec_*.yaml")
    parser.add_argument("--midi-root", help="folder of MIDI files or of a MIDI pack with manifest.csv, to be rendered")
    parser.add_argument("--piano", action="append", default=[], help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--audio", nargs="*", default=[], help="pools or recordings instead, see above")
    parser.add_argument("--validation", nargs="*", default=[], help="pools or recordings that are not trained on")
    parser.add_argument("--features", help="output of `features`")
    parser.add_argument("--codec", help="codec to go on from, a folder or Hub id")
    parser.add_argument(
        "--listener",
        help="output of `listener`, or a model folder that has one: a decoder learns what must be heard in its sound, "
        "and it goes on to learn itself",
    )
    parser.add_argument(
        "--go-on", action="store_true", help="keep what --codec, or of `listener` --listener, already knows of the part"
    )
    parser.add_argument("--output-dir", help="checkpoints, log, curves and the codec go here; `encode` has none")
    parser.add_argument("--batch-size", type=_batch_size, help="instead of the recipe's: a number, or auto (see below)")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare audio")
    parser.add_argument("--stop-after", type=float, help="seconds of wall time after which to save and stop")
    parser.add_argument("--force", action="store_true", help="go on though settings differ from the checkpoint's")
    add_licence(parser)
    parser.epilog = f"--batch-size auto: as many crops as fill a GPU's memory; {CPU_BATCH} on a CPU."
    args = parser.parse_args(argv)
    if args.stop_after is not None and not args.stop_after > 0:
        parser.error("--stop-after must be above 0")
    if args.workers < 0:
        parser.error("--workers must be at least 0")
    rendered = (args.midi_root is not None, bool(args.piano))
    if any(rendered) if args.audio else not all(rendered):
        parser.error("give audio: --midi-root and --piano, or --audio")
    begins = args.part == "encoder" or (args.part == "decoder" and not args.go_on)
    if begins and args.features is None:
        parser.error(f"{args.part} needs --features")
    if args.part in ("hearing", "codebooks", "encode", "decoder", "kicks", "whole") and args.codec is None:
        parser.error(f"{args.part} needs --codec")
    if args.features is not None and args.part not in ("encoder", "decoder"):
        parser.error("--features are for encoder and decoder")
    if args.go_on and args.part not in ("encoder", "decoder", "listener"):
        parser.error(f"--go-on is for encoder, decoder and listener: {args.part} always does")
    if args.part == "listener" and args.go_on != (args.listener is not None):
        parser.error("listener needs --go-on and --listener together, or neither")
    if (args.part == "encode") != (args.output_dir is None):
        parser.error(f"{args.part} {'writes beside its pools, without' if args.output_dir else 'needs'} --output-dir")
    if args.part in FITTED:
        for name in ("validation", "steps", "stop_after", "force"):
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} is for what learns step by step, not for {args.part}")
    if args.part == "encode" and not all(path.endswith(".npy") for path in args.audio or ["none"]):
        parser.error("encode takes pools of scripts.render_pool: --audio POOL.npy")
    return args


def source_of(args: argparse.Namespace, recipe: CodecRecipe):
    """Where the sound comes from, see `scripts.codec.data`."""
    seconds, seed = recipe.excerpt_seconds, recipe.seed
    if not args.audio:
        return RenderedExcerpts(args.midi_root, "train", args.piano, recipe.rooms, seconds, seed)
    if not _are_pools(args.audio):
        return RecordedExcerpts(args.audio, seconds, seed)
    codes = codec_hash(args.codec) if args.part in ("decoder", "kicks") else None
    return StoredCrops(args.audio, recipe.crop_seconds, seed, codes, recipe.lead_seconds)


def validation_of(args: argparse.Namespace, recipe: CodecRecipe):
    """A fixed batch to look at, or None."""
    seconds, count = recipe.validation_seconds, recipe.validation_crops
    if args.validation and _are_pools(args.validation):
        source = StoredExcerpts(args.validation)
        count = min(count, len(source))
    elif args.validation:
        source = RecordedExcerpts(args.validation, seconds, VALIDATION_SEED)
    elif args.midi_root and (Path(args.midi_root) / "manifest.csv").is_file():
        source = RenderedExcerpts(args.midi_root, "validation", args.piano, recipe.rooms, seconds, recipe.seed)
    else:
        return None
    return fixed_batch(source, count, seconds) if count else None


def decisive(args: argparse.Namespace, source, listener: str | None) -> dict:
    """What must be the same, beside the recipe, when a run goes on: the sound, and what it begins with, learns from."""
    names = [Path(path).name for path in (args.audio or [args.midi_root, *args.piano])]
    about = {"part": args.part, "sound": names, "go_on": args.go_on}
    if isinstance(source, RenderedExcerpts):
        about["rendered"] = source_settings(source)
    if isinstance(source, RecordedExcerpts):
        about["recordings_sha256"] = source.digest
    if isinstance(source, StoredCrops):
        about["pools_sha256"] = [content_sha256(Path(path).with_suffix(".state.json")) for path in args.audio]
        about |= {"kinds": source.kinds, "means": bool(source.means)}
    if args.codec and args.part != "listener":
        about["codec_sha256"] = weights_sha256(Path(args.codec))
    if args.features and args.part in ("encoder", "decoder"):
        about["features_sha256"] = weights_sha256(Path(args.features))
    if listener:
        about["listener_sha256"] = weights_sha256(Path(listener, LISTENER))
    return about


def bases_of(args: argparse.Namespace, codec: str | None) -> list[Base]:
    """What the part goes on from, for its card; `codec` as it was given, `args.codec` being its folder."""
    if args.part == "listener" and args.listener:
        return [base_of_listener(args.listener)]
    if args.part in ("features", "listener"):
        return []
    return [base_of(codec, Path(args.codec)) if codec else base_of(args.features)]


def run_part(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    recipe, output = CodecRecipe.from_yaml(args.config, batch_size=args.batch_size, steps=args.steps), args.output_dir
    if args.part in FITTED and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"{args.part} is one process's work: start it without accelerate launch or torchrun")
    if output:
        check_output_folder(output)
    codec, args.codec = args.codec, args.codec and str(model_folder(args.codec, "--codec"))
    if args.part == "encode":
        return encode_pools(args.codec, args.audio)
    data = args.audio or [args.midi_root, *args.piano]
    card = codec_card(args.part, recipe, data, bases_of(args, codec), args.licence)
    source = source_of(args, recipe)
    size = CPU_BATCH if recipe.batch_size == "auto" else recipe.batch_size
    batches = CropBatches(source, recipe, size, args.workers)
    if args.part == "features":
        return fit_features(recipe, batches, Path(output), card)
    if args.part == "codebooks":
        return fit_codebooks(recipe, args.codec, batches, Path(output), card)
    learnt = args.listener if args.part in ("listener", "decoder", "whole") else None
    objective = objective_of(args.part, recipe, batches, args.codec, args.features, learnt, args.go_on)
    listener = trained_listener(args.listener) if args.listener and not learnt else None
    validation, about = validation_of(args, recipe), decisive(args, source, learnt)
    run = Run(objective, recipe, source, output, args.workers, validation, listener, about, args.force, card)
    return run.train(args.stop_after)


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    args = parse(argv)
    try:
        with run_errors():
            run_part(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # of what is not trained, or the second one
        print("interrupted; start it again to go on: what is finished is kept", file=sys.stderr)
        return 130
    return 0


def _are_pools(paths: list[str]) -> bool:
    """Whether these are pools, and not recordings."""
    found = {str(path).endswith(".npy") for path in paths}
    if len(found) > 1:
        raise ValueError("pools (.npy) and recordings do not go together: give one kind")
    return found.pop()


def _batch_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return text if text == "auto" else int(text)


if __name__ == "__main__":
    sys.exit(main())
