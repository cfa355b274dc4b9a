# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Convert the published MIDI-VALLE and its codec into a folder that `from_pretrained` loads.

    python -m scripts.convert_checkpoint --midi-valle best-valid-loss.pt --codec compression_32khz_new.bin \\
        --output checkpoints/midivalle_published

Either file may be given alone: without --codec the model makes codes but no audio; without --midi-valle the folder is a
codec. --codec also takes a Hugging Face EnCodec folder. With --check the model is compared with a recording of the
original program, see `scripts.published.check`. The folder is made beside --output, compared with the files, loaded
again, and renamed; it holds the report `conversion.json`. Exit code 1: a check failed; 2: a file that cannot be used.
Neither leaves a folder.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import EncodecFeatureExtractor, GenerationConfig
from transformers.utils import logging

from modeling_midivalle import MidiValleConfig, MidiValleForConditionalGeneration, PianoEncodecConfig, PianoEncodecModel
from processing import MidiValleProcessor
from scripts.models.trained_parts import load_part
from scripts.published.check import Check, compare
from scripts.published.codec import read_codec_export
from scripts.published.weights import (
    SAMPLING,
    CheckpointError,
    published_names,
    read_configs,
    read_published,
    to_our_state_dict,
)
from scripts.unfinished import check_output_folder, set_usual_mode, unfinished_folder
from scripts.wording import counted
from tokenization import MidiValleTokenizer

CARD = Path(__file__).parents[1] / "model_cards" / "midivalle_published.md"
SHARD_SIZE = "500MB"  # saving and loading hold one shard beside the model


def read_codec(path: str | Path) -> tuple[PianoEncodecModel, dict[str, list[str]]]:
    """A codec from an AudioCraft export or a Hugging Face folder, and the map of its keys.

    Raises:
        ValueError: neither of the two.
    """
    if not Path(path).is_dir():
        return read_codec_export(path)
    codec = load_part("codec", path)
    return codec.eval(), {name: [name] for name in codec.state_dict()}


def build_model(
    published: dict[str, torch.Tensor], num_heads: int, codec: PianoEncodecModel | None
) -> tuple[MidiValleForConditionalGeneration, dict[str, list[str]]]:
    """The whole model around the tensors of a published file, and the map of its keys. Only heads
    that are no tables are copied.

    Raises:
        CheckpointError: keys or shapes that are not MIDI-VALLE's, or a codec of other codebooks.
    """
    ar, nar = read_configs(published, num_heads)
    bits = (ar.codebook_size - 1).bit_length()
    nominal = {"codebook_size": ar.codebook_size, "target_bandwidths": [ar.num_codebooks * 50 * bits / 1000]}
    try:
        config = MidiValleConfig(
            codec_config=codec.config.to_dict() if codec else PianoEncodecConfig(**nominal).to_dict(),
            ar_config=ar.to_dict(),
            nar_config=nar.to_dict(),
            share_midi_embeddings=True,
            has_codec=codec is not None,
        )
    except StrictDataclassError as error:
        raise CheckpointError(f"codec and MIDI-VALLE do not fit together: {error.__cause__}") from error
    with torch.device("meta"):
        model = MidiValleForConditionalGeneration(config)
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith("codec.")}
    ours = to_our_state_dict(published, wanted, ar.num_codebooks - 1)
    if not nar.tie_word_embeddings:  # no head is a table then, though some may share its memory in the file
        ours |= {name: value.clone() for name, value in ours.items() if name.startswith("nar.heads.")}
    if codec:
        model.codec = codec
    model.load_state_dict(ours, strict=False, assign=True)  # the keys were compared; those of the codec are in place
    model.tie_weights()
    model.generation_config = GenerationConfig(**SAMPLING)
    return model.eval(), {name: published_names(name, ar.num_codebooks - 1) for name in wanted}


def save_folder(model, folder: Path) -> None:
    """Weights, configuration, code, card and, beside MIDI-VALLE, its processor, which does as published: no pedal, no
    notes held over from before a window."""
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    if isinstance(model, PianoEncodecModel):
        return
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=model.config.sampling_rate)
    tokenizer = MidiValleTokenizer(sustain="ignore", mark_held=False)
    processor = MidiValleProcessor(extractor, tokenizer, max_prompt_seconds=8.0, max_window_seconds=20.0)
    processor.save_pretrained(folder)
    shutil.copyfile(CARD, folder / "README.md")


def check_saved(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Compare what the folder stores, tensor by tensor, with `state`; shared tensors are stored once.

    Raises:
        CheckpointError: a tensor is missing, left over or different.
    """
    stored = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dictionary
                stored.add(name)
                if name not in state or not torch.equal(tensors.get_tensor(name), state[name]):
                    raise CheckpointError(f"{file.name}: {name} was not saved as it was read")
    places = {state[name].data_ptr() for name in stored}
    if lost := [name for name, value in state.items() if value.data_ptr() not in places]:
        raise CheckpointError(f"{folder.name}: {lost[0]} was not saved")


def sha256(path: str | Path) -> str | None:
    """Of a file; None for a folder."""
    if Path(path).is_dir():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(
    midi_valle: Path | None, codec: Path | None, output: Path, num_heads: int = 16, check: Path | None = None
) -> tuple[dict, list[Check]]:
    """Make the folder `output`, unless a check fails.

    Args:
        midi_valle: published state_dict, or a trainer's checkpoint of it.
        codec: AudioCraft export, or Hugging Face folder.
        output: folder that is not there yet, or empty.
        num_heads: attention heads of MIDI-VALLE; the shapes do not tell them.
        check: recording of the original program.
    Returns:
        The report, as it stands in `conversion.json`, and the checks.
    Raises:
        ValueError: a file that cannot be used; nothing is written then.
    """
    output = output.resolve()  # a link is replaced by what it points to, and `.` has a name
    check_output_folder(output, "--output", beside=True)
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output}: exists already; choose another --output")
    given = [Path(p) for p in (midi_valle, codec) if p and Path(p).exists()]
    same = len({path.name for path in given}) < len(given)
    report = {"files": {str(path) if same else path.name: sha256(path) for path in given}}
    part, keys = read_codec(codec) if codec else (None, {})
    if midi_valle is None:
        model = part
    else:
        keys = {f"codec.{name}": source for name, source in keys.items()}
        model, more = build_model(read_published(midi_valle), num_heads, part)
        keys |= more
    report["parameters"] = {"all": model.num_parameters()}  # below the sum of the parts, which share the MIDI tables
    if midi_valle is not None:
        report["parameters"] |= {name: child.num_parameters() for name, child in model.named_children()}
    report["keys"] = keys
    with unfinished_folder(output) as temporary:
        save_folder(model, temporary)
        check_saved(temporary, model.state_dict())
        model_class = type(model)
        del model, part
        loaded, info = model_class.from_pretrained(temporary, output_loading_info=True)
        if wrong := {key: value for key, value in info.items() if value}:
            raise CheckpointError(f"the folder does not load as it was saved: {wrong}")
        if check:
            for parameter in loaded.parameters():  # at aligned addresses, where sums are rounded as in the original
                parameter.data = parameter.data.clone()
        checks = compare(loaded, check) if check else []
        report["checks"] = {c.name: {"difference": c.difference, "tolerance": c.tolerance} for c in checks}
        (temporary / "conversion.json").write_text(json.dumps(report, indent=1) + "\n")
        if all(c.passed for c in checks):
            for file in temporary.iterdir():
                set_usual_mode(file)
            os.replace(temporary, output)
    return report, checks


def main(argv: list[str] | None = None) -> int:
    """The command: 0, 1 if a check fails, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--midi-valle", type=Path, metavar="FILE", help="the authors' best-valid-loss.pt, or a trainer's file"
    )
    parser.add_argument("--codec", type=Path, metavar="FILE", help="AudioCraft export, or Hugging Face EnCodec folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument("--num-heads", type=int, default=16, help="attention heads (default: %(default)s)")
    parser.add_argument(
        "--check", type=Path, metavar="IO.safetensors", help="recording of the original, .json beside it"
    )
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        if args.midi_valle is None and args.codec is None:
            raise CheckpointError("give --midi-valle, --codec or both")
        if args.check and args.midi_valle is None:
            raise CheckpointError("--check compares MIDI-VALLE: add --midi-valle")
        report, checks = convert(args.midi_valle, args.codec, args.output, args.num_heads, args.check)
    except (ValueError, OSError, SafetensorError) as error:  # a full disk is either of the last two
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no folder was written", file=sys.stderr)
        return 130
    for name, digest in report["files"].items():
        print(f"{name}: sha256 {digest or '(folder)'}")
    for name, sources in report["keys"].items():
        print(f"{', '.join(sources)} -> {name}")
    print(", ".join(f"{name} {count:,} parameters" for name, count in report["parameters"].items()))
    for c in checks:
        print(f"{'ok  ' if c.passed else 'FAIL'} {c.name}: {c.difference:.3g} (at most {c.tolerance:g})")
    if failed := sum(not c.passed for c in checks):
        print(f"error: {failed} of {counted(len(checks), 'check')} failed; no folder was written", file=sys.stderr)
        return 1
    print(f"{args.output}: {counted(len(report['keys']), 'tensor')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
