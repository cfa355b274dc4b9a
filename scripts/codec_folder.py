# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The codec of a folder: of its own, as training saves it, or of a whole model's."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open

from modeling_midivalle import MidiValleForConditionalGeneration, PianoEncodecModel


class CodecFolderError(ValueError):
    """A folder without a codec; one sentence."""


def load_codec(folder: str | Path) -> PianoEncodecModel:
    """The codec of `folder`, in fp32.

    Raises:
        CodecFolderError: there is none.
        ValueError, OSError: transformers cannot load it.
    """
    if not is_whole(folder):
        return PianoEncodecModel.from_pretrained(folder, dtype=torch.float32)
    model = MidiValleForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if not model.config.has_codec:
        raise CodecFolderError(f"{folder}: is a model that was converted without its codec")
    return model.codec


def codec_hash(folder: str | Path) -> str:
    """sha256 of what decides a codec's codes: encoder and codebooks. Its decoder may go on learning.

    Raises:
        CodecFolderError: there is no codec in `folder`.
    """
    found, prefix = {}, "codec." if is_whole(folder) else ""  # what its weights are called by in a whole model
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():
                own = name.removeprefix(prefix)
                if name == prefix + own and (own.startswith("encoder.") or own.endswith("codebook.embed")):
                    found[own] = tensors.get_tensor(name).tobytes()
    if not found:
        raise CodecFolderError(f"{folder}: holds no codec; give the folder of one, or of a whole model")
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + found[name])
    return digest.hexdigest()


def is_whole(folder: str | Path) -> bool:
    """Whether `folder` holds a whole model, not a codec alone."""
    try:
        return json.loads((Path(folder) / "config.json").read_text()).get("model_type") == "midivalle"
    except (OSError, ValueError, AttributeError):
        return False
