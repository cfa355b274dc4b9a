# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A recipe file (YAML) as settings, or refused in one sentence."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError

from scripts.models.model_folder import reason

TRACKERS = ("tensorboard", "trackio")
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "lines of name: value"}
KINDS |= {list: "a list", tuple: "a list of two numbers", NoneType: "nothing"}


def read_recipe(path: str | Path, cls: type, **overrides):
    """The dataclass `cls` with what a file sets; `overrides` that are not None win.

    Raises:
        ValueError: it cannot be read, is not YAML, has unknown names, or values that `cls` refuses; one sentence that
            begins with the path.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; give lines of the form name: value")
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise ValueError(f"{path}: unknown keys {sorted(map(str, unknown))}")
    try:
        hints = get_type_hints(cls)
        values = {name: _read_value(name, value, hints[name]) for name, value in values.items()}
        return cls(**(values | {k: v for k, v in overrides.items() if v is not None}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_value(name: str, value, hint):
    """`value` as a field of type `hint` wants it; ValueError if it is of another kind."""
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    kinds = [get_origin(kind) or kind for kind in kinds]
    if float in kinds and isinstance(value, str):  # YAML takes 1e-3 for a text: it wants 1.0e-3
        try:
            value = float(value)
        except ValueError:
            pass
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if tuple in kinds and isinstance(value, list) and len(value) == 2:
        value = tuple(_read_value(name, part, float) for part in value)
    numbers = value.values() if isinstance(value, dict) else (value,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}: {value!r} is not finite")
    if type(value) not in kinds:
        raise ValueError(f"{name}: {value!r} is not {' or '.join(KINDS[kind] for kind in kinds)}")
    if get_args(hint) == (str, float):
        value = {key: _read_value(f"{name}: {key}", part, float) for key, part in value.items()}
    return value


def check_ranges(recipe, positive: Iterable[str] = (), shares: Iterable[str] = (), **least: float) -> None:
    """ValueError where a field is out of its range, or a range of two numbers does not rise.

    Args:
        recipe: a dataclass.
        positive: names of fields that must be above 0.
        shares: names of fields that must be from 0 to 1.
        least: the least value by the name of a field; fields that are None, or a text, are let be.
    """
    for name, bound in (least | dict.fromkeys(positive, 0) | dict.fromkeys(shares, 0)).items():
        value = getattr(recipe, name)
        values = value if isinstance(value, tuple) else (value,)
        numbers = [part for part in values if isinstance(part, int | float)]
        if name in positive and not all(part > 0 for part in numbers):  # also what is not a number
            raise ValueError(f"{name} must be above 0, got {value}")
        if not all(part >= bound for part in numbers):
            raise ValueError(f"{name} must be at least {bound}, got {value}")
        if any(isinstance(part, int) and part >= 2**63 for part in numbers):  # generators take no more
            raise ValueError(f"{name} must be below 2^63, got {value}")
        if name in shares and not all(part <= 1 for part in numbers):
            raise ValueError(f"{name} must be at most 1, got {value}")
        if list(values) != sorted(values):
            raise ValueError(f"{name} must be the lower and the higher of two numbers, got {list(value)}")


def check_fields(name: str, changes: dict, config_class: type) -> None:
    """ValueError if `changes`, a recipe's `name`, has other fields than `config_class`, which would ignore them."""
    if unknown := set(changes) - {f.name for f in fields(config_class)}:
        raise ValueError(f"{name}: unknown fields {sorted(map(str, unknown))}")


def check_trackers(names: list[str]) -> None:
    """ValueError if `report_to` names what a run cannot report to."""
    if unknown := set(map(str, names)) - set(TRACKERS):
        raise ValueError(f"report_to: {sorted(unknown)} are not of {', '.join(TRACKERS)}")


@contextmanager
def model_of(name: str) -> Iterator[None]:
    """What a model raises that cannot be made of a recipe's `name`, as ValueError of one sentence."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        raise ValueError(f"the recipe's {name}: no model can be made of it ({reason(error)})") from error
