# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Render a MIDI performance of any length on the piano and in the room of a prompt.

    python -m scripts.render piece.mid piece.wav
    python -m scripts.render piece.mid piece.flac --prompt upright_living_room --start 60 --end 90
    python -m scripts.render piece.mid piece.wav --prompt-audio mine.wav --prompt-midi mine.mid
    python -m scripts.render --list-prompts

The output lasts exactly until the end of the last sounding note plus the ring-out; with --compat published, until the
model ends it. Same seed, same output; without --temperature the starter does not draw at all. Input that cannot be used
gives one sentence, exit code 2 and no file.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "checkpoints/starter"
HUB_FILES = ["*.json", "*.safetensors", "prompts/*"]  # data only: the code is this repository's


class RenderError(ValueError):
    """Arguments or a model folder that cannot be used; one sentence."""


@dataclass(frozen=True)
class NamedPrompt:
    """An entry of a model folder's `prompts/prompts.json`."""

    name: str
    description: str
    piano: str
    room: str
    licence: str


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 for input that cannot be used."""
    args = build_parser().parse_args(argv)
    try:
        check_arguments(args)
        return list_prompts(args) if args.list_prompts else render(args)
    except ValueError as error:  # RenderError, or MidiError, AudioError, ProcessorError: not yet imported
        print(f"render: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.render", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", nargs="?", metavar="INPUT.mid", help="performance to render")
    parser.add_argument("output", nargs="?", metavar="OUTPUT.wav", help="WAV or FLAC, 32 kHz mono, 16 bit")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    model = parser.add_argument_group("model and prompt")
    model.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id (default: %(default)s)")
    model.add_argument("--prompt", metavar="NAME", help="a bundled prompt (default: the first of the model)")
    model.add_argument("--list-prompts", action="store_true", help="list the bundled prompts and stop")
    model.add_argument("--prompt-audio", metavar="P.wav", help="own prompt: WAV or FLAC from 1 s; 8 s are used")
    model.add_argument("--prompt-midi", metavar="P.mid", help="the notes of --prompt-audio, in time with it")
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    music = parser.add_argument_group("music")
    music.add_argument("--start", type=float, metavar="S", help="begin here, s; becomes time 0 (default: 0)")
    music.add_argument("--end", type=float, metavar="S", help="clip the notes here, s (default: the end)")
    music.add_argument("--ring-out", type=float, default=2.0, metavar="S", help="after the last note, s (%(default)s)")
    music.add_argument("--sustain", choices=("extend", "ignore"), help="sustain pedal (default: the model's)")
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
    if args.input is None or args.output is None:
        raise RenderError("give INPUT.mid and OUTPUT.wav, or --list-prompts")
    if (args.prompt_audio is None) != (args.prompt_midi is None):
        missing = "--prompt-midi" if args.prompt_midi is None else "--prompt-audio"
        raise RenderError(f"a prompt needs its audio and its MIDI: add {missing}")
    if args.prompt and args.prompt_audio:
        raise RenderError("give a bundled --prompt or an own --prompt-audio, not both")
    for path in (args.input, args.prompt_audio, args.prompt_midi):
        if path is not None and not Path(path).exists():
            raise RenderError(f"{Path(path).name}: no such file")
    if Path(args.output).exists() and not args.force:
        raise RenderError(f"{Path(args.output).name}: exists already; add --force to replace it")
    if not 0 <= args.seed <= 2**62:
        raise RenderError(f"--seed {args.seed} is outside 0 to 2^62")
    if args.temperature is not None and not args.temperature >= 0:
        raise RenderError(f"--temperature {args.temperature} must not be negative")
    if args.top_k is not None and args.top_k < 0:
        raise RenderError(f"--top-k {args.top_k} must not be negative")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise RenderError(f"--top-p {args.top_p} must be above 0 and at most 1")


def list_prompts(args: argparse.Namespace) -> int:
    """Print the bundled prompts of a model."""
    for i, prompt in enumerate(read_prompts(model_folder(args.model))):
        print(f"{prompt.name}{' (default)' if i == 0 else ''}: {prompt.description} [{prompt.licence}]")
    return 0


def render(args: argparse.Namespace) -> int:
    """Load, render, write."""
    from processing import write_audio
    from processing.audio_midivalle import check_output
    from tokenization import load_performance

    check_output(args.output)
    load_performance(args.input)  # a bad file is refused before a model is fetched or loaded
    folder = model_folder(args.model)
    processor = load_processor(folder)
    whole = processor.tokenizer.load_performance(args.input, args.sustain)
    performance = processor.load(whole, start=args.start, end=args.end)
    windows = processor.windows(performance, args.ring_out)
    if args.compat and len(windows) > 1:
        raise RenderError(
            f"--compat {args.compat} renders one segment of at most {processor.max_window_seconds} s, and "
            f"{performance.name} needs {len(windows)}: give --start and --end"
        )
    if changes := describe_changes(processor.tokenizer, performance, windows):
        print(f"render: {changes}", file=sys.stderr)
    if args.prompt_audio:
        label, files = "own prompt", (args.prompt_midi, args.prompt_audio)
    else:
        label, files = choose_prompt(folder, args.prompt)
    prompt = processor.prepare_prompt(*files, sustain=args.sustain) if files else None
    model = load_model(folder, args.device)
    begin = time.perf_counter()
    codes = generate_windows(model, processor, performance, windows, prompt, args.seed, sampling_options(args))
    wave = to_wave(model.codec, codes, seconds=None if args.compat else windows[-1][1])
    took = time.perf_counter() - begin
    gain = write_audio(args.output, wave, model.config.sampling_rate)
    seconds = len(wave) / model.config.sampling_rate
    turned_down = f", turned down by {gain:.2f} to avoid clipping" if gain < 1 else ""
    print(
        f"{args.output}: {seconds:.3f} s, {len(performance.notes)} notes, {len(windows)} windows, {label}, "
        f"{took:.1f} s on {model.device} ({seconds / took:.2f}x real time){turned_down}"
    )
    return 0


def describe_changes(tokenizer, performance, windows) -> str:
    """One sentence on notes that were left out and durations that are clipped; empty if there are none."""
    reports = [tokenizer.encode_notes([(performance.notes, *w)], return_report=True)[1] for w in windows]
    clipped = sum(report["clipped_durations"] for report in reports)
    parts = [performance.warning] if performance.warning else []
    if clipped:
        parts.append(f"{'' if parts else performance.name + ': '}{clipped} durations over 6 s are clipped to 6 s")
    return "; ".join(parts)


def generate_windows(model, processor, performance, windows, prompt, seed: int, sampling: dict) -> Iterator:
    """Generate the windows of a performance one after another, each after the same prompt.

    Args:
        model (`MidiValleForConditionalGeneration`), processor (`MidiValleProcessor`): From one model folder.
        performance (`Performance`): From `processor.load`.
        windows (`list[tuple[float, float]]`): From `processor.windows`.
        prompt (`Prompt`, *optional*): From `processor.prepare_prompt`; encoded once.
        seed (`int`): Window i draws with `seed + i`.
        sampling (`dict`): Options of `model.generate_codes`.

    Yields:
        `torch.LongTensor` of shape `(1, K, T)`: codes of each window, 50 frames a second.
    """
    import torch
    from tqdm import tqdm

    prompt_codes = None
    if prompt is not None:
        wave = torch.from_numpy(prompt.wave)[None, None].to(model.device)
        prompt_codes = model.codec.encode_codes(wave)
    for i, (start, end) in enumerate(tqdm(windows, unit="window", desc="render", disable=None)):
        inputs = processor.window_inputs(performance, start, end, prompt).to(model.device)
        yield model.generate_codes(
            inputs["input_ids"],
            inputs["attention_mask"],
            prompt_codes,
            inputs["prompt_lengths"],
            inputs["target_frames"],
            seed=seed + i,
            **sampling,
        )


def to_wave(codec, codes: Iterator, seconds: float | None):
    """Join the codes of all windows on the frame grid and decode them as one: float32 `(samples,)` of `seconds`, or of
    all frames."""
    import torch

    from scripts.stream_decoding import decode_stream

    wave = torch.cat(list(decode_stream(codec, torch.cat(list(codes), -1))))
    return wave[: None if seconds is None else round(seconds * codec.config.sampling_rate)].numpy()


def sampling_options(args: argparse.Namespace) -> dict:
    """Options of `generate_codes`; what the command line leaves open is the model's."""
    if args.temperature == 0:
        return {"do_sample": False, "compat": args.compat}
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "compat": args.compat}


def model_folder(model: str) -> Path:
    """A local folder as it is, a Hub id downloaded (data only, no code)."""
    folder = Path(model)
    if not folder.is_dir():
        if model == DEFAULT_MODEL or folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise RenderError(f"--model {model}: no such folder, and not a Hub id of the form owner/name")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, allow_patterns=HUB_FILES))
        except OSError as error:  # all errors of the Hub
            raise RenderError(f"--model {model}: cannot be downloaded ({str(error).splitlines()[0]})") from error
    if not (folder / "config.json").is_file():
        raise RenderError(f"--model {model}: the folder holds no config.json")
    return folder


def read_prompts(folder: Path) -> list[NamedPrompt]:
    """The bundled prompts of a model folder, the default first; none if it has no `prompts/prompts.json`."""
    path = folder / "prompts" / "prompts.json"
    if not path.is_file():
        return []
    fields = NamedPrompt.__dataclass_fields__
    try:
        prompts = [NamedPrompt(**{key: str(entry[key]) for key in fields}) for entry in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise RenderError(f"{path}: not a list of prompts with {', '.join(fields)} ({error})") from error
    if any(Path(prompt.name).name != prompt.name for prompt in prompts):
        raise RenderError(f"{path}: a prompt's name must be a plain file name")
    return prompts


def choose_prompt(folder: Path, name: str | None) -> tuple[str, tuple[Path, Path] | None]:
    """A label for the user, and MIDI and audio of the named or the default prompt (None if the model has none)."""
    prompts = {prompt.name: prompt for prompt in read_prompts(folder)}
    if name is None and not prompts:
        return "no prompt (the model folder has none)", None
    if name is not None and name not in prompts:
        raise RenderError(f"--prompt {name}: not one of {', '.join(prompts) or 'any: the model folder has no prompts'}")
    name = name or next(iter(prompts))
    return f"prompt {name}", (folder / "prompts" / f"{name}.mid", folder / "prompts" / f"{name}.flac")


def quiet_transformers():
    """No progress bars and warnings of transformers: what they warn of is refused here, in one sentence."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_processor(folder: Path):
    """The processor of a model folder, by this repository's code."""
    from transformers import AutoProcessor

    import tokenization  # noqa: F401  registers the class
    from processing import MidiValleProcessor

    quiet_transformers()
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RenderError(f"{folder}: no processor can be loaded ({str(error).splitlines()[0]})") from error
    if not isinstance(processor, MidiValleProcessor):
        raise RenderError(f"{folder}: holds a {type(processor).__name__}, not a MidiValleProcessor")
    return processor


def load_model(folder: Path, device: str):
    """The model of a folder in fp32, by this repository's code; every weight must be there, and finite."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModel

    import modeling_midivalle  # noqa: F401  registers the classes

    quiet_transformers()
    if device == "cuda" and not torch.cuda.is_available():
        raise RenderError("--device cuda: no GPU is available")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, report = AutoModel.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise RenderError(f"{folder}: no model can be loaded ({str(error).splitlines()[0]})") from error
    if model.config.model_type != "midivalle":
        raise RenderError(f"{folder}: holds a {model.config.model_type} model, not midivalle")
    if not model.config.has_codec:
        raise RenderError(f"{folder}: holds no codec; convert it together with --codec")
    if wrong := {key: value for key, value in report.items() if value}:
        raise RenderError(f"{folder}: the weights do not fit the configuration: {wrong}")
    if bad := [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]:
        raise RenderError(f"{folder}: weights that are not finite: {', '.join(bad[:3])}")
    return model.to(device).eval()


if __name__ == "__main__":
    sys.exit(main())
