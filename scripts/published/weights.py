# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The weights of the published MIDI-VALLE (a flat state_dict) by our names: nothing lost, nothing left over.

Every fault of a file is a `CheckpointError` of one sentence.
"""

import pickle
import re
import zipfile
from pathlib import Path, PosixPath

import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_midivalle import MidiValleARConfig, MidiValleNARConfig

NAMES = (  # ours -> published, applied one after the other
    (r"^ar\.model\.", "ar."),
    (r"^(?:ar|nar)\.embeddings\.midi_tables\.(\d+)\.", r"feat_emb.\1.word_embeddings."),
    (r"^(ar|nar)\.embeddings\.midi_projection\.", r"\1_text_embedding."),
    (r"^(ar|nar)\.embeddings\.midi_positions\.", r"\1_text_position."),
    (r"^(ar|nar)\.embeddings\.audio_positions\.", r"\1_audio_position."),
    (r"^(ar|nar)\.(audio_embeddings?(?:\.\d+)?)\.", r"\1_\2.word_embeddings."),
    (r"^(ar|nar)\.((?:layers|norm)\.)", r"\1_decoder.\2"),
    (r"\.in_proj\.", ".in_proj_"),
    (r"^ar\.lm_head\.", "ar_predict_layer."),
    (r"^nar\.heads\.", "nar_predict_layers."),
)
# The published trainer stores its options beside the weights, and two of them are paths. A path is but text; what its
# class is called depends on the version of Python that wrote it.
PATHS = [(PosixPath, "pathlib.PosixPath"), (PosixPath, "pathlib._local.PosixPath")]
# What generation chooses from, by our rules. Published, any code may be drawn; always the likeliest one makes VALL-E
# and its kin repeat themselves.
SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 0.95}
STAGES = "nar.stage_embeddings.weight"  # one table of ours, an entry for each row in the file


class CheckpointError(ValueError):
    """A file that is not what it should be; one sentence."""


def read_pickle(path: str | Path) -> dict:
    """The dictionary that `torch.save` wrote to `path`, mapped, not read; tensors, plain values and paths only.

    Raises:
        CheckpointError: no such file, no such format, or other objects in it than these.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(PATHS):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise CheckpointError(f"{path}: not a file of torch.save") from error
        raise CheckpointError(
            f"{path}: holds Python objects beside tensors, and reading them would run code: save its tensors alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: not a file of torch.save, or a damaged one") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not a dictionary of tensors")
    return found


def read_published(path: str | Path) -> dict[str, torch.Tensor]:
    """The flat state_dict of a published file, or of a trainer's checkpoint (`{"model": ...}`)."""
    found = read_pickle(path)
    if isinstance(found.get("model"), dict):
        found = found["model"]
    if "xp.cfg" in found or "best_state" in found:
        raise CheckpointError(f"{path}: an AudioCraft export; give it as --codec")
    check_tensors(path, found)
    for key, value in found.items():
        if value.dtype != torch.float32:
            raise CheckpointError(f"{path}: {key} is {value.dtype}, not float32")
    return found


def check_tensors(path: str | Path, state: dict) -> None:
    """CheckpointError unless `state` is of names and dense tensors of finite numbers."""
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {key!r} is not the name of a tensor; expected a state_dict")
        if value.layout != torch.strided or value.is_quantized or not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {key} is not of finite numbers, all of them stored")


def read_configs(published: dict[str, torch.Tensor], num_heads: int) -> tuple[MidiValleARConfig, MidiValleNARConfig]:
    """Configurations from the tensors' shapes. `num_heads`, which no shape tells, is the published 16 unless given.

    Raises:
        CheckpointError: an entry that tells a size is missing, or the sizes contradict one another.
    """

    def shape(key: str) -> torch.Size:
        """Of a matrix; all that tell a size are."""
        if key not in published:
            raise CheckpointError(f"not a state_dict of MIDI-VALLE: {key} is missing")
        if published[key].ndim != 2:
            raise CheckpointError(f"not a state_dict of MIDI-VALLE: {key} is {tuple(published[key].shape)}, no matrix")
        return published[key].shape

    def count(pattern: str) -> int:
        return len({match[0] for match in map(re.compile(pattern).match, published) if match})

    tables = [shape(f"feat_emb.{i}.word_embeddings.weight") for i in range(6)]
    rows, width = shape("ar_predict_layer.weight")
    shared = {
        "hidden_size": width,
        "num_attention_heads": num_heads,
        "intermediate_size": shape("ar_decoder.layers.0.linear1.weight")[0],
        "midi_vocab_sizes": [size[0] for size in tables],
        "midi_embedding_sizes": [size[1] for size in tables],
        "codebook_size": rows - 1,
        "num_codebooks": count(r"nar_audio_embeddings\.\d+"),
    }
    specials = {"vocab_size": rows, "eos_token_id": rows - 1, "pad_token_id": rows - 1}
    aliases = [
        (f"nar_predict_layers.{k}.weight", f"nar_audio_embeddings.{k + 2}.word_embeddings.weight")
        for k in range(shared["num_codebooks"] - 2)
    ]
    tied = all(shape(a) == shape(b) and torch.equal(published[a], published[b]) for a, b in aliases)
    layers = {part: count(rf"{part}_decoder\.layers\.\d+\.") for part in ("ar", "nar")}
    try:
        ar = MidiValleARConfig.from_preset("published", num_hidden_layers=layers["ar"], **shared, **specials)
        nar = MidiValleNARConfig.from_preset(
            "published", num_hidden_layers=layers["nar"], **shared, tie_word_embeddings=tied
        )
    except StrictDataclassError as error:
        raise CheckpointError(f"the sizes contradict one another (see --num-heads): {error.__cause__}") from error
    return ar, nar


def published_names(name: str, stages: int) -> list[str]:
    """The entry of the published file that our tensor `name` is; for the stage vectors `stages` entries, its rows."""
    if name == STAGES:
        return [f"nar_stage_embeddings.{i}.word_embeddings.weight" for i in range(stages)]
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return [name]


def to_our_state_dict(
    published: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], stages: int
) -> dict[str, torch.Tensor]:
    """The published tensors by our names; none is copied but the rows of the stages.

    Args:
        published: the flat state_dict.
        wanted: tensors of our AR and NAR by name (`ar.*`, `nar.*`), for their shapes.
        stages: of the NAR.
    Raises:
        CheckpointError: an entry is missing, is left over or has another shape; ten of them are named.
    """
    ours, used, faults = {}, set(), []
    for name, like in wanted.items():
        keys = published_names(name, stages)
        used.update(keys)
        if missing := [key for key in keys if key not in published]:
            faults += [f"{key} is missing" for key in missing if f"{key} is missing" not in faults]
            continue
        parts = [published[key] for key in keys]
        shape = (like.shape[0] // len(keys), *like.shape[1:])
        wrong = [(key, tuple(part.shape)) for key, part in zip(keys, parts) if part.shape != shape]
        faults += [f"{key} is {found}, expected {tuple(shape)}" for key, found in wrong]
        ours[name] = parts[0] if len(parts) == 1 or wrong else torch.cat(parts)
    faults += [f"{key} is left over" for key in published if key not in used]
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CheckpointError(f"not the keys of MIDI-VALLE: {'; '.join(faults[:10])}{more}")
    return ours
