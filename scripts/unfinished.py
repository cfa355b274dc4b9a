# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Files and folders that are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

UMASK = os.umask(0o022)  # it can only be read by setting it, which is done once, before there are other threads
os.umask(UMASK)


class WriteError(ValueError):
    """A file or a folder that cannot be written; one sentence."""


def check_output_folder(folder: str | Path, option: str = "--output-dir", beside: bool = False) -> None:
    """Find out that a folder cannot be written to, or made, before there is anything to lose. Nothing is made.

    Args:
        folder (`str` or `Path`): It may be there or not.
        option (`str`, *optional*): Where it was given.
        beside (`bool`, *optional*): Something will be written beside it too.
    Raises:
        WriteError: It, or what should hold it, is a file, or closed.
    """
    folder = Path(folder)
    for wanted in (folder, folder.parent) if beside else (folder,):
        there = next(path for path in (wanted, *wanted.parents) if os.path.lexists(path))
        said = f"{option} {folder}: {'' if there == folder else f'{there} '}"
        if not there.is_dir():
            raise WriteError(f"{said}is not a folder; give another {option}")
        try:
            with TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise WriteError(f"{said}cannot be written to ({error.strerror}); give another {option}") from error


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A hidden path beside `path`, to be written; then it replaces `path`, or after an error is removed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # where nothing could be written, say; that is the error to be told
            partial.unlink(missing_ok=True)


@contextmanager
def unfinished_folder(output: Path) -> Iterator[Path]:
    """A new hidden folder beside `output`, to be filled and moved; what is left of it is removed, and so are folders
    above that were made for it and that nothing was moved into."""
    folder = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def set_usual_mode(path: Path) -> None:
    """Give a file the mode that the umask gives new ones: safetensors makes its own readable for their owner alone."""
    path.chmod(0o666 & ~UMASK)


def write_text(path: Path, text: str) -> None:
    """A text file; `WriteError` if it cannot be written."""
    try:
        with unfinished_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})") from error


def write_json(path: Path, content: dict) -> None:
    """A file of JSON; `WriteError` if it cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")
