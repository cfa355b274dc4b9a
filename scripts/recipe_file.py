# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A recipe file (YAML) as settings, or refused in one sentence."""

from dataclasses import fields
from pathlib import Path

import yaml


def read_recipe(path: str | Path, cls: type, **overrides):
    """The dataclass `cls` with what a file sets; `overrides` that are not None win.

    Raises:
        ValueError: not YAML, unknown names, or values that `cls` refuses; one sentence that begins with the path.
        OSError: it cannot be read.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; give lines of the form name: value")
    decimal = {f.name for f in fields(cls) if isinstance(f.default, float)}
    for name in decimal & set(values):
        if isinstance(values[name], str):  # YAML takes 1e-3 for a text: it wants 1.0e-3
            try:
                values[name] = float(values[name])
            except ValueError:
                raise ValueError(f"{path}: {name}: {values[name]!r} is not a number") from None
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise ValueError(f"{path}: unknown keys {sorted(map(str, unknown))}")
    try:
        return cls(**(values | {k: v for k, v in overrides.items() if v is not None}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
