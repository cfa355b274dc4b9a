# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""An AudioCraft export of an EnCodec (`{"xp.cfg": yaml, "best_state": weights}`) as a `PianoEncodecModel`."""

import math
import re
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from modeling_midivalle import PianoEncodecConfig, PianoEncodecModel
from scripts.published.weights import CheckpointError, check_tensors, read_pickle

# AudioCraft and the `encodec` package -> transformers
KEY_MAP = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.conv(?:tr)?\.conv(?:tr)?\.", ".conv."),
    (r"\.conv(?:tr)?\.norm\.", ".norm."),
    (r"^quantizer\.vq\.layers\.", "quantizer.layers."),
    (r"\._codebook\.", ".codebook."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
# What no shape tells: (section, key) of xp.cfg, our field, AudioCraft's default, config/model/encodec/default.yaml
SETTINGS = (
    ("seanet", "causal", "use_causal_conv", False),
    ("seanet", "pad_mode", "pad_mode", "constant"),
    ("seanet", "dilation_base", "dilation_growth_rate", 2),
    ("encodec", "renormalize", "normalize", False),
)
SAME_EVERYWHERE = {"activation": "ELU", "activation_params": {"alpha": 1.0}, "disable_norm_outer_blocks": 0}


def read_codec_export(path: str | Path) -> tuple[PianoEncodecModel, dict[str, list[str]]]:
    """The codec of an AudioCraft export, in fp32, and the map of its keys.

    Raises:
        CheckpointError: not such an export, another kind of codec, or keys that differ.
    """
    found = read_pickle(path)
    if "pretrained" in found:
        raise CheckpointError(f"{path}: only names another codec, {found['pretrained']}; give that one's own files")
    if missing := [key for key in ("xp.cfg", "best_state") if key not in found]:
        raise CheckpointError(f"{path}: not an AudioCraft export, {' and '.join(missing)} is missing")
    try:
        settings = yaml.safe_load(found["xp.cfg"])
    except (yaml.YAMLError, AttributeError) as error:
        raise CheckpointError(f"{path}: its xp.cfg is not YAML") from error
    state = found["best_state"]
    if isinstance(state, dict):
        state = state.get("model", state)
    if not isinstance(settings, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path}: its xp.cfg holds no settings or its best_state no weights")
    check_tensors(path, state)
    try:
        config = read_codec_config(state, settings)
        model = PianoEncodecModel(config).eval()
    except (ValueError, TypeError, AttributeError, LookupError, StrictDataclassError) as error:
        raise CheckpointError(f"{path}: not an EnCodec that MIDI-VALLE can use ({error})") from error
    names = {key: rename(key) for key in state}
    wanted = model.state_dict()
    faults = [f"{name} is missing" for name in wanted if name not in names.values()]
    faults += [f"{key} is left over" for key, name in names.items() if name not in wanted]
    both = [(key, name) for key, name in names.items() if name in wanted]
    faults += [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[name].shape)}"
        for key, name in both
        if state[key].shape != wanted[name].shape
    ]
    if faults:
        raise CheckpointError(f"{path}: the keys differ: {'; '.join(faults[:10])}; {len(faults)} in all")
    model.load_state_dict({names[key]: value.float() for key, value in state.items()})
    return model, {name: [key] for key, name in names.items()}


def rename(key: str) -> str:
    """The name of AudioCraft's `key` in transformers."""
    for pattern, replacement in KEY_MAP:
        key = re.sub(pattern, replacement, key)
    return key


def read_codec_config(state: dict[str, torch.Tensor], settings: dict) -> PianoEncodecConfig:
    """Sizes from the shapes of `state`, the rest from `settings`, the export's xp.cfg.

    Raises:
        KeyError: an entry that tells a size is missing.
        ValueError: settings that `EncodecModel` does not have.
    """
    seanet = settings.get("seanet") or {}
    for key, value in SAME_EVERYWHERE.items():
        if seanet.get(key, value) != value:
            raise ValueError(f"seanet.{key} is {seanet[key]}, only {value} is known")
    if activation := (seanet.get("decoder") or {}).get("final_activation"):
        raise ValueError(f"seanet.decoder.final_activation is {activation}, only none is known")
    if "encoder.model.0.conv.conv.weight_v" not in state:
        raise ValueError("no weight norm, which is the only norm that is known")

    def kernels(pattern: str) -> list[torch.Size]:
        """Shapes of the convolutions whose name matches, by their place."""
        found = ((re.fullmatch(rf"{pattern}\.weight_v", key), value) for key, value in state.items())
        return [value.shape for match, value in sorted(((int(m[1]), v) for m, v in found if m), key=lambda x: x[0])]

    first, *_, last = kernels(r"encoder\.model\.(\d+)\.conv\.conv")
    ratios = [shape[2] // 2 for shape in kernels(r"decoder\.model\.(\d+)\.convtr\.convtr")]
    blocks = kernels(r"encoder\.model\.(\d+)\.block\.1\.conv\.conv")
    codebooks = [value for key, value in state.items() if key.endswith("._codebook.embed")]
    size, width = codebooks[0].shape
    bits = (size - 1).bit_length()
    config = {
        field: resolve(settings, (settings.get(part) or {}).get(key, default)) for part, key, field, default in SETTINGS
    }
    trim = (seanet.get("decoder") or {}).get("trim_right_ratio", 1.0)
    sampling_rate = int(resolve(settings, settings.get("sample_rate", 32_000)))
    return PianoEncodecConfig(
        **config,
        trim_right_ratio=float(trim),
        sampling_rate=sampling_rate,
        target_bandwidths=[len(codebooks) * (sampling_rate // math.prod(ratios)) * bits / 1000],
        num_filters=first[0],
        kernel_size=first[2],
        last_kernel_size=last[2],
        hidden_size=last[0],
        codebook_dim=width,
        codebook_size=size,
        upsampling_ratios=ratios,
        num_residual_layers=len(blocks) // len(ratios),
        residual_kernel_size=blocks[0][2],
        compress=blocks[0][1] // blocks[0][0],
        num_lstm_layers=sum(bool(re.fullmatch(r"encoder\.model\.\d+\.lstm\.weight_ih_l\d+", key)) for key in state),
        use_conv_shortcut=any(".shortcut." in key for key in state),
    )


def resolve(settings: dict, value):
    """`value`, or what its reference `${section.key}` to another setting stands for."""
    while isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        value = settings
        for key in match[1].split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"xp.cfg refers to {match[0]}, which is not there")
            value = value[key]
    return value
