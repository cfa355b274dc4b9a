# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Which files of a folder are meant, where it is given instead of them."""

import os
from collections.abc import Collection
from pathlib import Path


def visible_files(folder: Path, endings: Collection[str]) -> list[Path]:
    """Sorted files of `folder` and below whose names end in one of `endings`, small letters or capitals; without hidden
    ones, which some systems put beside each file, and without hidden folders, where older versions lie. OSError if a
    folder below cannot be read."""

    def refuse(error: OSError):
        raise error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]  # `os.walk` goes into what is left
        paths = (Path(parent) / name for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in endings and path.is_file()]
    return sorted(found)
