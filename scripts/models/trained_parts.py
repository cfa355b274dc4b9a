# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Codec, AR or NAR of a folder: of its own, as training saves it, or of a whole model's."""

import hashlib
import re
from pathlib import Path

import torch
from safetensors import safe_open

from modeling_midivalle import MidiValleARModel, MidiValleForConditionalGeneration, MidiValleNARModel, PianoEncodecModel
from scripts.models.model_folder import check_weight_files, load_weights, model_type

PART_CLASSES = {"codec": PianoEncodecModel, "ar": MidiValleARModel, "nar": MidiValleNARModel}
CODEC_TYPES, WHOLE = ("piano_encodec", "encodec"), MidiValleForConditionalGeneration.config_class.model_type


class PartError(ValueError):
    """A folder without the part that is wanted; the message names it, what is wrong and what to do."""


def load_part(name: str, folder: str | Path, given_as: str | None = None):
    """The model `name` (`codec`, `ar` or `nar`) of its own folder or of a whole model's, in fp32, every weight found.

    Args:
        given_as (`str`, *optional*): What names the folder in messages, instead of the option `--name`.
    Raises:
        PartError: no such folder, or another kind of model.
        FolderError: see `load_weights`.
    """
    model_class, folder = PART_CLASSES[name], Path(folder)
    given = f"{given_as or f'--{name}'} {folder}"
    if not (folder / "config.json").is_file():
        raise PartError(f"{given}: holds no config.json; give the folder that the training saved")
    kind = model_type(folder)
    whole = kind == WHOLE
    kinds = CODEC_TYPES if name == "codec" else (model_class.config_class.model_type,)
    if not whole and kind not in kinds:
        raise PartError(f"{given}: holds a {kind} model, expected {' or '.join(kinds)}")
    loaded_class = MidiValleForConditionalGeneration if whole else model_class
    model = load_weights(loaded_class, folder, dtype=torch.float32)
    if whole and not hasattr(model, name):
        raise PartError(f"{given}: was converted without a codec")
    model = getattr(model, name) if whole else model
    model.config.name_or_path = ""  # a whole model's configuration would tell the path
    return model


def codec_hash(folder: str | Path) -> str:
    """sha256 of what decides a codec's codes: encoder and codebooks, whatever they are stored as. Its decoder may go on
    learning.

    Raises:
        ValueError: there is no codec in `folder`, or a damaged file.
    """
    found = _codec_tensors(folder, r"encoder\..*|.*codebook\.embed")
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + found[name].numpy().tobytes())
    return digest.hexdigest()


def load_codebooks(folder: str | Path) -> torch.Tensor:
    """`(K, codebook_size, D)`, fp32, of the codec in `folder`, and nothing else of it.

    Raises:
        ValueError: there is no codec in `folder`, a damaged file, or numbers that are not finite.
    """
    found = _codec_tensors(folder, r"quantizer\.layers\.\d+\.codebook\.embed")
    books = torch.stack([found[name] for name in sorted(found, key=lambda name: int(name.split(".")[2]))])
    if not books.isfinite().all():
        raise PartError(f"{folder}: codebooks that are not finite")
    return books


def _codec_tensors(folder: str | Path, pattern: str) -> dict[str, torch.Tensor]:
    """The codec's tensors in `folder`, or in a whole model's, whose names match; fp32, at least one."""
    found, prefix = {}, "codec." if model_type(Path(folder)) == WHOLE else ""
    check_weight_files(folder)
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                own = name.removeprefix(prefix)
                if name == prefix + own and re.fullmatch(pattern, own):
                    found[own] = tensors.get_tensor(name).float()
    if not found:
        raise PartError(f"{folder}: holds no codec; give the folder of one, or of a whole model")
    return found
