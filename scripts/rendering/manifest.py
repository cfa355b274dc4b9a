# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What a render was made of, `OUTPUT.json`: enough to make it again bit by bit on the same machine and software."""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np

FORMAT = 2
KINDS = {"settings": dict, "threads": int, "software": dict, "layout": list | None, "weights_sha256": str}
SETTINGS = {"model": str, "prompt": str | None, "prompt_audio": str | None, "prompt_midi": str | None, "device": str}
SETTINGS |= {"adapter": str | None}
SETTINGS |= {"start": int | float | None, "end": int | float | None, "ring_out": int | float, "sustain": str | None}
SETTINGS |= {"seed": int, "parallel": bool, "quantize": str | None, "dtype": str, "temperature": int | float | None}
SETTINGS |= {"top_k": int | None, "top_p": int | float | None, "compat": str | None, "as_recorded": bool | None}
MOST_THREADS = 1024  # far fewer do any good, and far more end the process
MOST_ATTEMPTS = 2**15  # a journal's numbers have 16 bits
MOST_NUMBER = 2**62  # the largest seed; far larger ones are no floats any more
LEAST_SIZE, MOST_SIZE = (1, 0, 1), 100_000  # MIDI rows, context and new frames of a window: far more than can be made
CODE = ("tokenization", "processing", "modeling_midivalle")


class ManifestError(ValueError):
    """A manifest that cannot be read, or that does not hold any more; one sentence."""


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal; `ManifestError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ManifestError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error


def weights_sha256(folder: Path, *more: Path) -> str:
    """One sha256 for configuration and weights of a model folder, and for `more` files."""
    files = [*sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]), *more]
    return hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in files).encode()).hexdigest()


def software() -> dict[str, str]:
    """What else decides the last bit: versions, this code, the kind of processor."""
    import torch
    import transformers

    root = Path(__file__).resolve().parents[2]
    files = sorted(file for package in CODE for file in (root / package).glob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"transformers": transformers.__version__, "code_sha256": code}
    return versions | {"processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}


def journal_key(recipe: dict) -> str:
    """One line for all of a manifest that decides the sound, and the number of threads."""
    return f"{hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()} {recipe['threads']}"


def manifest_path(output: Path) -> Path:
    """`piece.json` of `piece.wav`."""
    return output.with_suffix(".json")


def was_verified(path: Path) -> bool:
    """Whether a manifest of that name says that there is a report beside it."""
    try:
        return bool(json.loads(path.read_text())["recipe"]["verify"])
    except (OSError, ValueError, LookupError, TypeError):  # none, or not one of ours
        return False


def read_manifest(path: str | Path) -> dict:
    """A manifest, checked for its keys and for files that have changed since.

    Raises:
        ManifestError: not a manifest, or a MIDI or prompt file is gone or not the same.
    """
    name = Path(path).name
    try:
        content = json.loads(Path(path).read_text())
        recipe, files = content["recipe"], content["files"]
        if content["format"] != FORMAT:
            raise KeyError("format")
        _check_kinds(recipe, KINDS)
        _check_kinds(recipe["settings"], {name: SETTINGS[name] for name in recipe["settings"]})  # no others
        _check_kinds(content, {"midi_file": str, "files": dict, "attempts": list, "output": dict})
        _check_kinds(content["output"], {"samples_sha256": str})
        if not all(isinstance(sha, str) for sha in files.values()) or not 1 <= recipe["threads"] <= MOST_THREADS:
            raise TypeError("files or threads")
        if not all(type(attempt) is int and 0 <= attempt < MOST_ATTEMPTS for attempt in content["attempts"]):
            raise TypeError("attempts")
        _check_layout(recipe["layout"], len(content["attempts"]))
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(
            f"{name}: is not a manifest of scripts.render, or damaged; render the MIDI file anew"
        ) from error
    for file, sha in files.items():
        if file_sha256(file) != sha:
            raise ManifestError(f"{file}: is not the file any more that {name} was made from")
    return content


def _check_kinds(content: dict, kinds: dict) -> None:
    """KeyError or TypeError where a field is not there, or of another kind; true and false are no numbers, nor is what
    is too large for a setting."""
    for name, kind in kinds.items():
        value = content[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, bool | None)):
            raise TypeError(name)
        if isinstance(value, int) and abs(value) > MOST_NUMBER:
            raise TypeError(name)


def _check_layout(layout: list[dict] | None, count: int) -> None:
    """KeyError, TypeError or ValueError unless each of `count` windows has its row in a batch."""
    if layout is None:
        return
    for place in layout:
        _check_kinds(place, {"row": int, "rows": list})
        sizes = [number for size in place["rows"] for number in zip(size, LEAST_SIZE, strict=True)]
        if not all(type(number) is int and least <= number < MOST_SIZE for number, least in sizes):
            raise TypeError("rows")
        if not 0 <= place["row"] < len(place["rows"]):
            raise TypeError("row")
    if len(layout) != count:
        raise TypeError("layout")


def differences(recipe: dict) -> str:
    """One sentence on the software of `recipe` that is not what runs now; empty if all is the same."""
    now = software()
    other = [key for key, value in recipe["software"].items() if now.get(key) != value]
    return f"other than when it was made: {', '.join(other)}; the last bits may differ" if other else ""
