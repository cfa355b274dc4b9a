# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Which files of a folder are meant, where it is given instead of them."""

from collections.abc import Collection
from pathlib import Path


def visible_files(folder: Path, endings: Collection[str]) -> list[Path]:
    """Sorted files of `folder` and below whose names end in one of `endings`, small letters or capitals; without hidden
    ones, which some systems put beside each file."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings and not path.name.startswith(".") and path.is_file()
    )
