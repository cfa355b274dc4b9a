# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Put a trained codec, AR and NAR together as one folder in Hub layout: weights, configuration, code, processor.

    python -m scripts.assemble_model --codec runs/final/codec --ar runs/ar/model --nar runs/nar/model \\
        [--listener runs/listener] --output checkpoints/starter

The decoders are rounded to --dtype; the codec must be rounded to fp16 already (`scripts.train_codec` does it), since
the decoders learned the codes of the rounded one; with --dtype float32, nothing is rounded. The tokenizer is the one
that the AR has learned with. A listener, which tells the codec what it hears, lies in a folder of its own, `listener`.
The folder loads in fp32. It is made beside --output, loaded again and compared, then moved in; other files of --output
(prompts/) stay, and so does a model card (README.md) without the comment that says that it is written anew.
"""

import argparse
import math
import os
import re
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import EncodecFeatureExtractor, GenerationConfig
from transformers.utils import logging

from modeling_midivalle import MidiValleForConditionalGeneration
from modeling_midivalle.configuration_midivalle import COLOURS
from processing import MidiValleProcessor
from scripts.models.model_folder import LISTENER, load_listener, model_type, reason
from scripts.models.trained_parts import WHOLE, load_part
from scripts.published.weights import SAMPLING
from scripts.training.model_card import CARD, add_licence, base_of, base_of_listener, is_edited, whole_card
from scripts.unfinished import check_output_folder, set_usual_mode, unfinished_folder
from tokenization import MidiValleTokenizer

MAX_SHARD_SIZE = "14MB"  # a file of the repository stays under 15 MiB
MAX_MIB = 40.0
SHIPPED_DTYPE = torch.float16  # of the codec, and of a listener
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
GAINS = ("velocity", "treble", "octave", "attack", "sustain")
LEFT_OUT = "embed_avg"  # of a codebook: `embed` times `cluster_size`, which training begins with where it is missing


class AssembleError(ValueError):
    """Parts that cannot be put together; the message names the part, what is wrong and what to do."""


def shipped_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The precision in which tensor `name` of the whole model is stored, if the decoders are stored as `dtype`."""
    if not name.startswith("codec.") or dtype == torch.float32:
        return dtype
    return torch.float32 if ".codebook." in name else SHIPPED_DTYPE


def round_weights(model: MidiValleForConditionalGeneration, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of `model` at its shipped precision, all of it if that is fp32, or without what tells nothing new;
    tensors that are shared stay shared.

    Raises:
        AssembleError: rounding changes what decides the codec's codes, or leaves the range of `dtype`.
    """
    rounded, known = {}, {}
    for name, value in model.state_dict().items():
        if name.endswith(LEFT_OUT) and dtype != torch.float32:
            continue
        wanted = shipped_dtype(name, dtype)
        key = (value.data_ptr(), value.shape, wanted)
        stored = rounded[name] = known.setdefault(key, value.detach().to(wanted).contiguous())
        if not torch.isfinite(stored).all():
            raise AssembleError(f"{name}: not finite in {str(wanted).removeprefix('torch.')}; choose another --dtype")
        if name.startswith("codec.") and "codebook" not in name and not torch.equal(stored.float(), value):
            raise AssembleError(
                f"{name}: the codec is not rounded to fp16, so the decoders learned other codes than it would make; "
                "export it by scripts.train_codec before the data are encoded, or give --dtype float32"
            )
    return rounded


def check_folder(folder: Path, rounded: dict[str, torch.Tensor]) -> None:
    """Load the folder again and compare every tensor with `rounded`; AssembleError on a difference."""
    model, report = MidiValleForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    state = model.state_dict()
    different = [
        k for k, v in rounded.items() if state[k].dtype != torch.float32 or not torch.equal(state[k], v.float())
    ]
    missing = {name for name in state.keys() - rounded.keys() if not name.endswith(LEFT_OUT)}
    if different or any(report.values()) or missing or rounded.keys() - state.keys():
        raise AssembleError(f"the saved folder does not load as it was saved: {different[:3]} {report}")


def assemble(
    codec: str | Path,
    ar: str | Path,
    nar: str | Path,
    output: Path,
    dtype: torch.dtype,
    max_mib: float = MAX_MIB,
    windows: dict[str, float] | None = None,
    listener: str | Path | None = None,
    quantize_listener: bool = False,
    licence: str | None = None,
    **playing,
) -> dict[str, int]:
    """Make the folder `output` of three trained parts.

    Args:
        codec, ar, nar: folders that `from_pretrained` takes.
        output: folder; its other files stay, its old weights are replaced, and its card, unless somebody has edited it.
        dtype: precision in which AR and NAR are stored.
        max_mib: largest size of the whole folder, MiB.
        windows: `max_prompt_seconds`, `max_window_seconds`, `onset_delay_seconds` and `correct_level`, as in
            `MidiValleProcessor`.
        listener: folder of `train_codec listener`, or of a model that has one.
        quantize_listener: store it in int8, as `PianoListenerModel.quantize_` does.
        licence: of the weights, for the card; that of all parts if not given.
        playing: `as_recorded`, `keys_from_midi`, `mean_vectors` and gains, as in `MidiValleConfig`.
    Returns:
        Parameters of each part by its name.
    Raises:
        AssembleError: parts that do not fit, too large a folder, or an `output` that holds another model, such as one
            of the parts; it is then as it was.
    """
    if not max_mib > 0:
        raise AssembleError(f"--max-mib must be above 0, got {max_mib}")
    if playing.get("velocity_gain_db") and not playing.get("keys_from_midi"):
        raise AssembleError("--velocity-gain is for --keys-from-midi")
    for name in GAINS:
        if not math.isfinite(gain := playing.get(f"{name}_gain_db") or 0.0):  # every sample would be NaN
            raise AssembleError(f"--{name}-gain must be finite, got {gain}")
        if playing.get(f"{name}_gain_db") and not playing.get("velocity_gain_db"):
            raise AssembleError(f"--{name}-gain is for --velocity-gain")
    output = output.resolve()  # `.` has no name
    check_output_folder(output, "--output", beside=True)
    if (output / "config.json").is_file() and (kind := model_type(output)) != WHOLE:
        raise AssembleError(f"--output {output}: holds a {kind} model; choose another folder")
    folders = {"codec": codec, "ar": ar, "nar": nar}
    parts = {name: load_part(name, folder) for name, folder in folders.items()}
    tokenizer = tokenizer_of(ar, nar)
    try:
        model = MidiValleForConditionalGeneration.from_sub_models(**parts, **playing)
    except StrictDataclassError as error:
        raise AssembleError(f"the parts do not fit together: {reason(error)}") from error
    if model.config.ar_config.objective == "published_sum":  # an AR that knows the truth alone, as published
        model.generation_config = GenerationConfig(**SAMPLING)
    rounded = round_weights(model, dtype)
    heard = None if listener is None else load_listener(listener)
    if quantize_listener and listener is None:
        raise AssembleError("--quantize-listener is for --listener")
    if listener is not None and not model.config.codec_config.num_key_axes:
        raise AssembleError("--listener: the codec has no axes for what it hears (num_key_axes is 0)")
    if listener is not None and heard is None:
        raise AssembleError(
            f"--listener {listener}: holds no {LISTENER} folder; give the output of train_codec listener"
        )
    with unfinished_folder(output) as temporary:
        model.save_pretrained(temporary, state_dict=dict(rounded), max_shard_size=MAX_SHARD_SIZE)
        extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=model.config.sampling_rate)
        processor = MidiValleProcessor(extractor, tokenizer, **(windows or {}))
        processor.save_pretrained(temporary)
        if heard is not None:
            wanted = shipped_dtype("codec.", dtype)
            if quantize_listener:
                heard.quantize_()
            state = {k: v.to(wanted) if v.is_floating_point() else v for k, v in heard.state_dict().items()}
            heard.save_pretrained(temporary / LISTENER, state_dict=state)
            again = load_listener(temporary).state_dict()  # refuses what is not finite
            if not all(torch.equal(again[name].float(), value.float()) for name, value in state.items()):
                raise AssembleError("the saved listener does not load as it was saved")
            for code in (temporary / LISTENER).glob("*.py"):  # remote code is looked for beside the model's own
                os.replace(code, temporary / code.name)
        check_folder(temporary, rounded)
        sizes = {name: part.num_parameters() for name, part in parts.items()}
        if not is_edited(output / CARD):
            bases = [base_of(str(folder)) for folder in folders.values()]
            bases += [base_of_listener(listener)] if listener else []
            (temporary / CARD).write_text(whole_card(output.name, sizes, bases, licence), encoding="utf-8")
        move_in(temporary, output, max_mib)
    return sizes


def tokenizer_of(ar: Path, nar: Path) -> MidiValleTokenizer:
    """The one that the decoders learned with; the default one of decoders of before they were saved."""
    saved = [Path(folder) for folder in (ar, nar) if (Path(folder) / "tokenizer_config.json").is_file()]
    found = [MidiValleTokenizer.from_pretrained(folder) for folder in saved] or [MidiValleTokenizer()]
    first, last = ((tokenizer.sustain, tokenizer.mark_held) for tokenizer in (found[0], found[-1]))
    if first != last:
        names = "sustain {} and mark_held {}"
        raise AssembleError(f"the AR has learned with {names.format(*first)}, the NAR with {names.format(*last)}")
    return found[0]


def move_in(source: Path, output: Path, max_mib: float) -> None:
    """Move the files of `source` into `output`, with the mode of new files; weights of an earlier model and its
    listener are replaced.

    Raises:
        AssembleError: the folder would be larger than `max_mib`.
    """
    new = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    old = {p.relative_to(output) for p in output.rglob("*") if p.is_file()}
    stale = {p for p in old - new if WEIGHT_FILE.fullmatch(str(p)) or p.parts[0] == LISTENER}
    size = sum((source / p).stat().st_size for p in new) + sum((output / p).stat().st_size for p in old - new - stale)
    if size > max_mib * 2**20:
        raise AssembleError(
            f"{output}: {size / 2**20:.1f} MiB would be more than {max_mib} MiB; take smaller parts, or raise --max-mib"
        )
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(new, key=lambda p: (p.suffix != ".safetensors", p)):  # the index only after its shards
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        set_usual_mode(source / path)
        os.replace(source / path, output / path)
    for path in stale:
        (output / path).unlink()
    if any(path.parts[0] == LISTENER for path in stale) and not any((output / LISTENER).iterdir()):
        (output / LISTENER).rmdir()


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 on parts that cannot be used, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.assemble_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--codec", required=True, help="codec folder of scripts.train_codec (RUN/codec)")
    parser.add_argument("--ar", required=True, help="AR folder of scripts.train (RUN/model)")
    parser.add_argument("--nar", required=True, help="NAR folder of scripts.train (RUN/model)")
    parser.add_argument("--listener", help="output of scripts.train_codec listener")
    parser.add_argument("--quantize-listener", action="store_true", help="store it in int8, half the size of float16")
    parser.add_argument(
        "--output", type=Path, default=Path("checkpoints/starter"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="precision in which AR and NAR are stored (default: %(default)s)",
    )
    parser.add_argument("--max-mib", type=float, default=MAX_MIB, help="largest folder, MiB (default: %(default)s)")
    parser.add_argument("--as-recorded", action="store_true", help="the colour and noise of prompts are played along")
    parser.add_argument("--keys-from-midi", action="store_true", help="the MIDI tells the codec which keys are struck")
    parser.add_argument("--mean-vectors", action="store_true", help="the codec decodes means, not the chosen codes")
    parser.add_argument(
        "--velocity-gain", type=float, default=0.0, metavar="DB", help="what loud keys lack over soft ones, dB"
    )
    parser.add_argument(
        "--treble-gain", type=float, default=0.0, metavar="DB", help="the same of their treble, beside it, dB"
    )
    parser.add_argument(
        "--octave-gain", type=float, default=0.0, metavar="DB", help="what a key lacks above its octave, beside it, dB"
    )
    parser.add_argument(
        "--attack-gain", type=float, default=0.0, metavar="DB", help="what all keys lack while they are struck, dB"
    )
    parser.add_argument(
        "--sustain-gain", type=float, default=0.0, metavar="DB", help="what held keys lack more each second, dB"
    )
    parser.add_argument(
        "--colour",
        type=float,
        nargs=COLOURS,
        metavar="DB",
        help="what generated audio lacks in ten parts of its spectrum, dB: minus `colour_db` of scripts.evaluate "
        "without this",
    )
    parser.add_argument(
        "--onset-delay", type=float, default=0.0, metavar="S", help="by which the model is heard to strike early, s"
    )
    parser.add_argument(
        "--correct-level",
        action="store_true",
        help="prompts much softer or louder than their velocities tell are brought to the level of rendered recordings",
    )
    parser.add_argument(
        "--max-prompt", type=float, default=6.0, metavar="S", help="longest prompt it has learned with, s (%(default)s)"
    )
    parser.add_argument(
        "--max-window", type=float, default=16.0, metavar="S", help="longest target likewise, s (%(default)s)"
    )
    add_licence(parser)
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        windows = {"max_prompt_seconds": args.max_prompt, "max_window_seconds": args.max_window}
        windows |= {"onset_delay_seconds": args.onset_delay, "correct_level": args.correct_level}
        playing = {name: getattr(args, name) for name in ("as_recorded", "keys_from_midi", "mean_vectors")}
        playing |= {f"{name}_gain_db": getattr(args, f"{name}_gain") for name in GAINS}
        playing["colour_gains_db"] = args.colour
        dtype = getattr(torch, args.dtype)
        sizes = assemble(
            args.codec,
            args.ar,
            args.nar,
            args.output,
            dtype,
            args.max_mib,
            windows,
            args.listener,
            args.quantize_listener,
            args.licence,
            **playing,
        )
    except (ValueError, OSError, SafetensorError) as error:  # a full disk is either of the last two
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was assembled", file=sys.stderr)
        return 130
    total = sum(p.stat().st_size for p in args.output.rglob("*") if p.is_file()) / 2**20
    print(f"{args.output}: {', '.join(f'{k} {v:,} parameters' for k, v in sizes.items())}; {total:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
