# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""One recording with its MIDI as notes, codes and training batches, for `scripts.adapt`."""

from pathlib import Path

import numpy as np
import torch

from processing.audio_midivalle import SAMPLING_RATE, read_audio, to_mono_32k, without_dc
from processing.processing_midivalle import SILENCE
from processing.prompts_midivalle import check_level, check_offset
from scripts.audio.rendered_audio import onset_roll
from scripts.wording import counted
from tokenization.midi_midivalle import load_performance

FRAMES_PER_SECOND, GRID_S = 50, 0.5
SHORTEST_S, LONGEST_S, FEWEST_NOTES = 60.0, 600.0, 20
CODEC_CHUNK_S, CODEC_LEAD_S, CODEC_TAIL_FRAMES = 30, 2, 25


class RecordingError(ValueError):
    """A recording that cannot be learned from; one sentence."""


class Recording:
    """A recording as notes and codes, and training batches from parts of it.

    Args:
        wave (`np.ndarray` of shape `(samples,)`): 32 kHz.
        notes (`np.ndarray` of `NOTE_DTYPE`): s from its start.
        heard, played (`torch.LongTensor` of shape `(K, T)`): Codes as the codec hears it, for prompts, and with its
            keys as they were played, for targets: else the decoders would learn to leave out what is not heard.
        tokenizer: `MidiValleTokenizer`.
    """

    def __init__(self, wave: np.ndarray, notes: np.ndarray, heard: torch.Tensor, played: torch.Tensor, tokenizer):
        self.wave, self.notes, self.heard, self.played, self.tokenizer = wave, notes, heard, played, tokenizer
        self.seconds = heard.shape[1] / FRAMES_PER_SECOND

    def cut(self, start: float, seconds: float) -> np.ndarray:
        """Wave `(samples,)` of a stretch, s."""
        return self.wave[round(start * SAMPLING_RATE) :][: round(seconds * SAMPLING_RATE)]

    def notes_from(self, start: float) -> np.ndarray:
        """Notes that sound at `start` or begin later, times relative to it, s."""
        notes = self.notes[self.notes["onset"] + self.notes["duration"] > start].copy()
        notes["onset"] -= start
        return notes

    def batch(self, windows: list[tuple[float, float]], prompt_s: float, target_s: float) -> dict[str, torch.Tensor]:
        """As `TrainingStream` gives it, of windows (start of the prompt, start of the target), s on the 0.5 s grid."""
        ids, codes = [], []
        for prompt, target in windows:
            segments = [(self.notes, prompt, prompt + prompt_s), (self.notes, target, target + target_s)]
            ids.append(self.tokenizer.encode_notes(segments))
            parts = ((self.heard, prompt, prompt_s), (self.played, target, target_s))
            edges = [(part, round(s * FRAMES_PER_SECOND), round(n * FRAMES_PER_SECOND)) for part, s, n in parts]
            codes.append(torch.cat([part[:, first : first + size] for part, first, size in edges], 1))
        midi = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        return {
            "midi_ids": midi["input_ids"],
            "midi_attention_mask": midi["attention_mask"],
            "audio_codes": torch.stack(codes),
            "prompt_lengths": torch.full((len(ids),), round(prompt_s * FRAMES_PER_SECOND)),
        }

    def draw(self, rng: np.random.Generator, recipe, end: float) -> dict[str, torch.Tensor]:
        """A batch of an `AdaptRecipe` from before `end`, s: targets anywhere, prompts beside them."""
        low, high = (round(s / GRID_S) for s in recipe.prompt_seconds)
        prompt_s, target_s = int(rng.integers(low, high, endpoint=True)) * GRID_S, recipe.target_seconds
        windows = []
        while len(windows) < recipe.batch_size:
            prompt = int(rng.integers(0, (end - prompt_s) / GRID_S, endpoint=True)) * GRID_S
            target = int(rng.integers(0, (end - target_s) / GRID_S, endpoint=True)) * GRID_S
            if prompt + prompt_s <= target or target + target_s <= prompt:
                windows.append((prompt, target))
        return self.batch(windows, prompt_s, target_s)

    def held(self, recipe, end: float) -> list[dict[str, torch.Tensor]]:
        """Batches of the part from `end` on, window by window, with one prompt from before it."""
        prompt_s, target_s = recipe.prompt_seconds[1], recipe.target_seconds
        starts = np.arange(end, self.seconds - target_s + 1e-6, target_s)
        return [self.batch([(end - prompt_s, float(start))], prompt_s, target_s) for start in starts]


def read_recording(audio: str, midi: str, model, processor) -> tuple[Recording, str]:
    """A recording with its MIDI, moved in time by up to 0.3 s if need be, at a usual level if `processor` corrects that
    of prompts, and a sentence on these and on notes of the MIDI that are left out (mostly empty).

    Raises:
        ValueError: files that cannot be read; under 1 or over 10 minutes; hardly a note.
    """
    wave = without_dc(to_mono_32k(*read_audio(audio)))
    seconds = len(wave) / SAMPLING_RATE
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise RecordingError(f"{Path(audio).name}: lasts {seconds:.0f} s; give {SHORTEST_S:.0f} to {LONGEST_S:.0f} s")
    if np.abs(wave).max() < SILENCE:
        raise RecordingError(f"{Path(audio).name}: is silence; give a recording of the notes of {Path(midi).name}")
    performance = load_performance(midi, processor.tokenizer.sustain)
    notes = performance.notes.copy()
    offset, remark = check_offset(wave, notes, Path(audio).name)
    notes["onset"] += offset
    notes = notes[(notes["onset"] >= 0) & (notes["onset"] < seconds)]
    if len(notes) < FEWEST_NOTES:
        raise RecordingError(
            f"{Path(midi).name}: {counted(len(notes), 'note')} within the recording; {FEWEST_NOTES} are needed"
        )
    gain, level = check_level(wave, notes, Path(audio).name) if processor.correct_level else (0.0, "")
    wave = wave * np.float32(10 ** (gain / 20))
    said = "; ".join(filter(None, (performance.warning, remark, level)))
    heard, played = encode(model.codec, wave), encode(model.codec, wave, notes)
    return Recording(wave, notes, heard, played, processor.tokenizer), said


@torch.no_grad()
def encode(codec, wave: np.ndarray, notes: np.ndarray | None = None) -> torch.LongTensor:
    """Codes `(K, T)` of `wave` `(samples,)`, in chunks that begin inside running music; with `notes`, and a codec whose
    codes tell keys, as they were played."""
    hop, device = SAMPLING_RATE // FRAMES_PER_SECOND, next(codec.parameters()).device
    size, lead, found = CODEC_CHUNK_S * SAMPLING_RATE, CODEC_LEAD_S * SAMPLING_RATE, []
    wave, roll = torch.from_numpy(wave[: len(wave) // hop * hop]), None
    if notes is not None and codec.config.num_key_axes:
        roll = torch.from_numpy(onset_roll(notes, len(wave) // hop).astype(np.float32) / 127)[None].to(device)
    for start in range(0, len(wave), size):
        first = max(start - lead, 0)
        end = min(start + size + hop * CODEC_TAIL_FRAMES, len(wave))
        struck = None if roll is None else roll[:, first // hop : end // hop]
        codes = codec.encode_codes(wave[first:end][None, None].to(device), struck=struck)[0].cpu()
        found.append(codes[:, (start - first) // hop :][:, : size // hop])
    return torch.cat(found, 1)[:, : len(wave) // hop]
