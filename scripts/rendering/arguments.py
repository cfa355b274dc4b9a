# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The command line of `scripts.render`: its options, and what can be refused before anything is imported or read."""

import argparse
import os
import sys
from pathlib import Path

from scripts.models.model_folder import DEFAULT_MODEL
from scripts.rendering.manifest import MOST_THREADS, SETTINGS
from scripts.unfinished import check_output_folder


class RenderError(ValueError):
    """Arguments that cannot be used; one sentence."""


def say(message) -> None:
    """One line for the user, on standard error."""
    print(f"render: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.render", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="INPUT.mid OUTPUT.wav; with --output-dir only inputs")
    parser.add_argument("--force", action="store_true", help="replace outputs that exist")
    files = parser.add_argument_group("files")
    files.add_argument("--output-dir", metavar="DIR", help="render all PATHs (MIDI files, or folders of them) to here")
    files.add_argument("--format", choices=("wav", "flac"), help="there (wav): 32 kHz, 16 bit")
    files.add_argument(
        "--batch-size", type=int, metavar="N", help="windows side by side (1, with --parallel 4; GPU: by free memory)"
    )
    files.add_argument(
        "--parallel", action="store_true", help="windows of one piece side by side too: sooner done, joins less smooth"
    )
    files.add_argument("--from-manifest", metavar="M.json", help="make the render of this manifest again, to OUTPUT")
    files.add_argument("--stream", choices=("-",), help="to standard output while it is made; OUTPUT may be left out")
    files.add_argument("--raw", action="store_true", help="stream without WAV header: 16 bit, little-endian, mono")
    model = parser.add_argument_group("model and prompt")
    model.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id (default: %(default)s)")
    model.add_argument("--adapter", metavar="FOLDER", help="play an adapter of scripts.adapt: a folder or Hub id")
    model.add_argument("--prompt", metavar="NAME", help="a bundled prompt (default: the first of the model)")
    model.add_argument("--list-prompts", action="store_true", help="list the bundled prompts and stop")
    model.add_argument(
        "--prompt-audio", metavar="P.wav", help="own prompt: WAV or FLAC from 1 s; the best part of a long one is used"
    )
    model.add_argument("--prompt-midi", metavar="P.mid", help="its notes; transcribed if left out (make install-eval)")
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    model.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: measured when it starts)")
    model.add_argument(
        "--quantize",
        choices=("int8",),
        help="decoders with int8 weights: a large model is faster on a CPU, and sounds a little different",
    )
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the decoders (%(default)s); bfloat16: faster where it is multiplied, sounds a little different",
    )
    model.add_argument(
        "--as-recorded",
        action=argparse.BooleanOptionalAction,
        help="give the sound the colour and the noise of the prompt's recording (default: the model's)",
    )
    music = parser.add_argument_group("music")
    music.add_argument("--start", type=float, metavar="S", help="begin here, s; becomes time 0 (default: 0)")
    music.add_argument("--end", type=float, metavar="S", help="clip the notes here, s (default: the end)")
    music.add_argument("--ring-out", type=float, default=2.0, metavar="S", help="after the last note, s (%(default)s)")
    music.add_argument("--sustain", choices=("extend", "ignore"), help="pedals (default: the model's)")
    check = parser.add_argument_group("self-check (make install-eval)")
    check.add_argument(
        "--verify",
        type=int,
        nargs="?",
        const=2,
        metavar="N",
        help="transcribe each window, make it anew up to N times (2) if its F1 is too low; writes OUTPUT.report.json",
    )
    check.add_argument(
        "--verify-threshold", type=float, default=0.5, metavar="F1", help="from which a window is kept (%(default)s)"
    )
    sampling = parser.add_argument_group("sampling (default: the model's own; the starter takes the likeliest code)")
    sampling.add_argument("--seed", type=int, default=0, help="0 to 2^62 (default: %(default)s)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 chooses the likeliest code")
    sampling.add_argument("--top-k", type=int, metavar="K", help="0 = off")
    sampling.add_argument("--top-p", type=float, metavar="P", help="1 = off")
    sampling.add_argument(
        "--compat",
        choices=("published",),
        help="generate as the published program: any code, temperature 1, one segment that ends where the model says",
    )
    return parser


def check_arguments(args: argparse.Namespace):
    """Refuse what can be refused before anything is imported, read or downloaded."""
    if args.list_prompts:
        return
    check_paths(args)
    if args.prompt_midi and not args.prompt_audio:
        raise RenderError("a prompt needs its audio: add --prompt-audio")
    if args.prompt and args.prompt_audio:
        raise RenderError("give a bundled --prompt or an own --prompt-audio, not both")
    for path in (args.prompt_audio, args.prompt_midi):
        if path is not None and not Path(path).exists():
            raise RenderError(f"{Path(path).name}: no such file")
    if args.adapter and args.quantize:
        raise RenderError("--adapter plays on weights that are not quantized: leave out --quantize")
    check_sampling(args)
    if (args.verify or 0) < 0 or not 0 <= args.verify_threshold <= 1:
        raise RenderError("--verify must not be negative, and --verify-threshold be 0 to 1")


def outputs_of(args: argparse.Namespace, output: Path) -> list[Path]:
    """All files that a render of `output` writes."""
    return [output.with_suffix(end) for end in (output.suffix, ".json") + (".report.json",) * (args.verify is not None)]


def with_manifest(args: argparse.Namespace, settings: dict) -> argparse.Namespace:
    """The command line with the `settings` of a manifest; only its model and adapter may be somewhere else now.

    Raises:
        RenderError: an option that says otherwise; a setting that the option would not take.
    """
    parser, file = build_parser(""), Path(args.from_manifest).name
    given = {name for name in [*SETTINGS, "batch_size"] if getattr(args, name) != parser.get_default(name)}
    movable = {"model", "adapter"} if settings.get("adapter") else {"model"}
    for name in sorted(given - movable):
        if name not in settings or settings[name] != getattr(args, name):
            raise RenderError(f"--{name.replace('_', '-')} is what the manifest says: leave it out")
    moved = {name: getattr(args, name) for name in given & movable}  # their weights are compared
    args = argparse.Namespace(**(vars(args) | settings | moved))
    for action in parser._actions:
        value, choices = settings.get(action.dest), action.choices
        if choices and value not in (None, *choices):
            raise RenderError(f"{file}: --{action.dest} {value} is not one of {', '.join(choices)}")
    try:
        check_sampling(args)
    except RenderError as error:
        raise RenderError(f"{file}: {error}") from error
    return args


def check_paths(args: argparse.Namespace):
    """Inputs, outputs and what may be combined."""
    for name in ("batch_size", "threads"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise RenderError(f"--{name.replace('_', '-')} {number} must be at least 1")
    if args.threads is not None and args.threads > MOST_THREADS:
        raise RenderError(f"--threads {args.threads} must be at most {MOST_THREADS}")
    if args.parallel and args.compat:
        raise RenderError("--compat renders one window: leave out --parallel")
    if args.compat and (args.batch_size or 1) > 1:
        raise RenderError("--compat renders one file at a time: leave out --batch-size")
    if args.from_manifest and (len(args.paths) != 1 or args.output_dir or args.stream or args.verify is not None):
        raise RenderError("--from-manifest takes OUTPUT.wav and no other file options")
    if args.output_dir and args.stream:
        raise RenderError("--stream is for one file: leave out --output-dir")
    if args.format and not args.output_dir:
        raise RenderError("--format is for --output-dir; otherwise OUTPUT's own ending tells")
    if args.raw and not args.stream:
        raise RenderError("--raw is for --stream -")
    if args.stream and args.verify is not None:
        raise RenderError("--verify needs a file: leave out --stream")
    if args.output_dir:
        if not args.paths:
            raise RenderError("give MIDI files or folders of them beside --output-dir")
        check_output_folder(args.output_dir)
        return
    if not args.from_manifest:
        if not 1 <= len(args.paths) <= 2 or (len(args.paths) == 1 and not args.stream):
            raise RenderError("give INPUT.mid and OUTPUT.wav, several inputs and --output-dir, or --list-prompts")
        if not Path(args.paths[0]).exists():
            raise RenderError(f"{Path(args.paths[0]).name}: no such file")
    for output in args.paths[0 if args.from_manifest else 1 :]:
        if not Path(output).name:
            raise RenderError(f"'{output}' names no file: give OUTPUT.wav")
        if Path(output).is_dir():
            raise RenderError(f"{output}: is a folder; give a file in it, or --output-dir {output}")
        for path in outputs_of(args, Path(output)):
            if os.path.lexists(path) and not args.force:  # a link that leads nowhere too
                raise RenderError(f"{path.name}: exists already; add --force to replace it")


def check_sampling(args: argparse.Namespace):
    """Refuse a seed and options of `sampling_options` that are out of their ranges."""
    if not 0 <= args.seed <= 2**62:
        raise RenderError(f"--seed {args.seed} is outside 0 to 2^62")
    if args.temperature is not None and not args.temperature >= 0:
        raise RenderError(f"--temperature {args.temperature} must be 0 or more")
    if args.top_k is not None and not 0 <= args.top_k <= 2**62:
        raise RenderError(f"--top-k {args.top_k} is outside 0 to 2^62")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise RenderError(f"--top-p {args.top_p} must be above 0 and at most 1")


def sampling_options(args: argparse.Namespace) -> dict:
    """Options of `generate_codes`; what the command line leaves open is the model's."""
    if args.temperature == 0:
        return {"do_sample": False}
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
