# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Notes read off audio by Transkun 2.0.1 (MIT, its own weights), the optional extra of `make install-eval`."""

import importlib
import importlib.machinery
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from tokenization.midi_midivalle import NOTE_DTYPE


class TranscriptionError(ValueError):
    """The transcriber is not installed."""


class Transcriber:
    """Callable: `transcriber(wave, sampling_rate)` -> notes (`NOTE_DTYPE`), times in s."""

    def __init__(self, device: str = "cpu"):
        try:
            with _without_torchaudio():
                package = importlib.import_module("transkun")
                moduleconf = importlib.import_module("moduleconf")
                folder = Path(package.__file__).parent / "pretrained"
                found = moduleconf.parseFromFile(str(folder / "2.0.conf"))["Model"]
                self.model = found.module.TransKun(conf=found.config)
        except ImportError as error:
            raise TranscriptionError(f"the transcriber is not installed ({error}): run `make install-eval`") from error
        checkpoint = torch.load(folder / "2.0.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(checkpoint.get("best_state_dict") or checkpoint["state_dict"], strict=False)
        self.model, self.device = self.model.to(device).eval(), device

    @torch.no_grad()
    def __call__(self, wave: np.ndarray, sampling_rate: int) -> np.ndarray:
        import soxr

        audio = soxr.resample(wave, sampling_rate, self.model.fs).astype(np.float32)
        with warnings.catch_warnings():  # it asks for checkpoints of gradients that nobody wants
            warnings.filterwarnings("ignore", ".*(use_reentrant|requires_grad=True)")
            events = self.model.transcribe(torch.from_numpy(audio)[:, None].to(self.device))
        rows = [(e.start, max(e.end - e.start, 0.001), e.pitch, e.velocity) for e in events if e.pitch > 0]
        notes = np.array(rows, dtype=NOTE_DTYPE)
        notes.sort(order=["onset", "pitch", "duration"])
        return notes


@contextmanager
def _without_torchaudio():
    """Transkun asks torchaudio for a mel filterbank that its checkpoint then overwrites; zeros of the shape do.

    torchaudio itself does not load beside a CPU torch, and breaks transformers when installed. The stand-in is removed
    again, so that nobody else finds it.
    """
    if "torchaudio" in sys.modules:
        yield
        return
    stub = types.ModuleType("torchaudio")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    stub.functional = types.SimpleNamespace(
        melscale_fbanks=lambda n_freqs, f_min, f_max, n_mels, sample_rate: torch.zeros(n_freqs, n_mels)
    )
    sys.modules["torchaudio"] = stub
    try:
        yield
    finally:
        del sys.modules["torchaudio"]
