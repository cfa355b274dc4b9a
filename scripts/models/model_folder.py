# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A model folder or Hub id -> processor, model and bundled prompts; all that does not fit gets one sentence."""

import json
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "checkpoints/starter"
LISTENER = "listener"  # folder of a `PianoListenerModel` in a model folder
HUB_FILES = ["*.json", "*.safetensors", "prompts/*", "README.md"]  # data only: the code is this repository's
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class FolderError(ValueError):
    """A model folder that cannot be used; one sentence."""


@dataclass(frozen=True)
class NamedPrompt:
    """An entry of a model folder's `prompts/prompts.json`."""

    name: str
    description: str
    piano: str
    room: str
    licence: str


def model_folder(model: str, option: str = "--model") -> Path:
    """A local folder as it is, a Hub id downloaded (data only, no code); `option` is where it was given."""
    folder = _local_folder(model, option, HUB_FILES)
    if not (folder / "config.json").is_file():
        raise FolderError(f"{option} {model}: the folder holds no config.json")
    check_configurations(folder)
    return folder


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter of `scripts.adapt`, a local one or a Hub id's."""
    folder = _local_folder(adapter, "--adapter", list(ADAPTER_FILES))
    if lacking := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        raise FolderError(f"--adapter {adapter}: holds no {lacking[0]}; give the output of scripts.adapt")
    return folder


def _local_folder(given: str, option: str, files: list[str]) -> Path:
    """A folder as it is; of a Hub id the `files`, downloaded."""
    folder = Path(given)
    if folder.is_dir():
        return folder
    if given == DEFAULT_MODEL or folder.exists() or given.startswith((".", "/", "~")) or given.count("/") != 1:
        raise FolderError(f"{option} {given}: no such folder, and not a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(given, allow_patterns=files))
    except Exception as error:  # whatever the Hub or the network below it raises
        raise FolderError(f"{option} {given}: cannot be downloaded ({reason(error)})") from error


def check_configurations(folder: Path) -> None:
    """FolderError that names the first `*config.json` in `folder` that is damaged: transformers alone would ignore a
    `generation_config.json`, and the model choose its codes in another way."""
    for file in sorted(folder.glob("*config.json")):
        try:
            is_whole = isinstance(json.loads(file.read_text()), dict)
        except (ValueError, RecursionError):
            is_whole = False
        if not is_whole:
            raise FolderError(f"{file}: is damaged (not a JSON object); copy or download it again")


def read_prompts(folder: Path) -> list[NamedPrompt]:
    """The bundled prompts of a model folder, the default first; none if it has no `prompts/prompts.json`."""
    path = folder / "prompts" / "prompts.json"
    if not path.is_file():
        return []
    fields = NamedPrompt.__dataclass_fields__
    try:
        prompts = [NamedPrompt(**{key: str(entry[key]) for key in fields}) for entry in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path}: not a list of prompts with {', '.join(fields)} ({error})") from error
    if any(Path(prompt.name).name != prompt.name for prompt in prompts):
        raise FolderError(f"{path}: a prompt's name must be a plain file name")
    return prompts


def choose_prompt(folder: Path, name: str | None) -> tuple[str, tuple[Path, Path] | None]:
    """A label for the user, and MIDI and audio of the named or the default prompt (None if the model has none)."""
    prompts = {prompt.name: prompt for prompt in read_prompts(folder)}
    if name is None and not prompts:
        return "no prompt (the model folder has none)", None
    if name is not None and name not in prompts:
        raise FolderError(f"--prompt {name}: not one of {', '.join(prompts) or 'any: the model folder has no prompts'}")
    name = name or next(iter(prompts))
    return f"prompt {name}", (folder / "prompts" / f"{name}.mid", folder / "prompts" / f"{name}.flac")


def quiet_transformers():
    """No progress bars and warnings of transformers: what they warn of is refused here, in one sentence."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_processor(folder: Path):
    """The processor of a model folder, by this repository's code."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoProcessor

    import tokenization  # noqa: F401  registers the class
    from processing import MidiValleProcessor

    quiet_transformers()
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:  # of numbers that are none, or do not fit
        raise FolderError(f"{folder}: no processor can be loaded ({reason(error)})") from error
    if not isinstance(processor, MidiValleProcessor):
        raise FolderError(f"{folder}: holds a {type(processor).__name__}, not a MidiValleProcessor")
    return processor


def model_type(folder: Path) -> str | None:
    """What kind of model a folder says it holds."""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise FolderError(f"{folder}: no model can be loaded (config.json: {error})") from error


def reason(error: Exception) -> str:
    """The first line of an error; of a configuration's, of what its own check has said."""
    from huggingface_hub.errors import StrictDataclassError

    said = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return (str(said).strip() or type(said).__name__).splitlines()[0]


def check_weight_files(folder: str | Path) -> None:
    """FolderError that names the first file of weights in `folder` that cannot be opened: cut short, empty."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise FolderError(f"{file}: is damaged ({reason(error)}); copy or download it again") from error


def load_weights(model_class: type, folder: Path, **options):
    """`model_class.from_pretrained(folder, **options)`; every weight must be there, and finite.

    Raises:
        FolderError: files that are damaged or missing, a configuration that is refused, weights that do not fit it.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    quiet_transformers()
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are in the report then, by name
    try:
        model, report = model_class.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        check_weight_files(folder)
        raise FolderError(f"{folder}: no model can be loaded ({reason(error)})") from error
    if wrong := {key: sorted(map(str, value))[:3] for key, value in report.items() if value}:
        raise FolderError(f"{folder}: the weights do not fit the configuration: {wrong}")
    if bad := [name for name, value in model.state_dict().items() if not torch.isfinite(value.sum())]:
        raise FolderError(f"{folder}: weights that are not finite: {', '.join(bad[:3])}")
    return model


def load_adapter(model, folder: Path) -> None:
    """Play an adapter of `scripts.adapt` from now on.

    Raises:
        FolderError: peft is not installed; files that are damaged; an adapter of another kind of model.
    """
    import importlib.util

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if importlib.util.find_spec("peft") is None:
        raise FolderError("--adapter needs peft: run make install-peft")
    try:
        stored = load_file(folder / ADAPTER_FILES[1])
        model.load_adapter(str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise FolderError(f"--adapter {folder}: does not fit the model, or is damaged ({reason(error)})") from error
    loaded = {f"base_model.model.{name}": value for name, value in model.get_adapter_state_dict().items()}
    if {name: value.shape for name, value in stored.items()} != {name: value.shape for name, value in loaded.items()}:
        raise FolderError(f"--adapter {folder}: is of another model: its weights are not of these layers")
    if bad := [name for name, value in stored.items() if not value.isfinite().all()]:
        raise FolderError(f"--adapter {folder}: weights that are not finite: {', '.join(bad[:3])}")


def load_model(folder: Path, device: str, quantize: str | None = None, dtype: str = "float32"):
    """The model of a folder, its decoders in `dtype` or with int8 weights, by this repository's code; every weight must
    be there, and finite."""
    import torch

    from modeling_midivalle import MidiValleForConditionalGeneration

    if device == "cuda" and not torch.cuda.is_available():
        raise FolderError("--device cuda: no GPU is available")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if (kind := model_type(folder)) != "midivalle":
        raise FolderError(f"{folder}: holds a {kind} model, not midivalle")
    options = {"use_safetensors": True, "dtype": getattr(torch, dtype)}
    model = load_weights(MidiValleForConditionalGeneration, folder, **options)
    if not model.config.has_codec:
        raise FolderError(f"{folder}: holds no codec; convert it together with --codec")
    if quantize:
        model.quantize_(quantize)
    return model.to(device).eval()


def load_listener(folder: str | Path):
    """The `PianoListenerModel` in a model folder, or in the output of `train_codec listener`; None if it has none."""
    import torch

    from modeling_midivalle import PianoListenerModel

    path = Path(folder) / LISTENER
    if not path.is_dir():
        return None
    check_configurations(path)
    if (kind := model_type(path)) != PianoListenerModel.config_class.model_type:
        raise FolderError(f"{path}: holds a {kind} model, not {PianoListenerModel.config_class.model_type}")
    return load_weights(PianoListenerModel, path, dtype=torch.float32).eval()
