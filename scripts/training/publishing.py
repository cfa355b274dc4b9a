# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Trained weights as `from_pretrained` folders, on disk and on the Hub."""

import os
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError

from scripts.training.model_card import CARD, is_edited
from scripts.training.processes import RunError
from scripts.unfinished import set_usual_mode


class PublishError(RunError):
    """A folder that cannot be written; one sentence."""


def export(model, folder: Path, state: dict | None = None, tokenizer=None, card: str | None = None) -> None:
    """`save_pretrained` of a model, and of its `tokenizer`, with its `card`, beside `folder`, then file by file into
    it: a reader finds whole files at any moment. A card that somebody has edited stays.

    Raises:
        PublishError: a full disk, say; what was there before stays.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _export(model, folder, temporary, state, tokenizer, card)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise PublishError(f"{folder} could not be written ({error}); what was there is as it was") from error


def _export(model, folder: Path, temporary: Path, state: dict | None, tokenizer, card: str | None) -> None:
    model.save_pretrained(temporary, state_dict=None if state is None else dict(state))  # it empties what it is given
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if card is not None and not is_edited(folder / CARD):
        (temporary / CARD).write_text(card, encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.suffix == ".safetensors"):  # weights last
        set_usual_mode(path)
        os.replace(path, folder / path.name)
    temporary.rmdir()


def push(folder: Path, repo_id: str, attempts: int = 4, pause_s: float = 5.0) -> bool:
    """Upload a `from_pretrained` folder as `repo_id`, tried `attempts` times with pauses that double.

    Returns `False`, after a sentence, if that fails: the folder is still there, and the run has not suffered.
    """
    from huggingface_hub import HfApi

    problem = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            HfApi().create_repo(repo_id, exist_ok=True)
            HfApi().upload_folder(folder_path=str(folder), repo_id=repo_id, commit_message="scripts.train")
            print(f"{folder} is on the Hub as {repo_id}", flush=True)
            return True
        except Exception as error:  # whatever the Hub or the network below it raises: the run goes on
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
    print(f"{folder} could not be pushed to {repo_id} ({problem}); it is kept, push it by `hf upload`", flush=True)
    return False
