# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Training batches from parquet shards of `scripts.prepare_dataset`, streamed.

The order is a function of (seed, epoch) alone and the place in it is one number, so a stopped run continues with the
batch it had not seen. Prompt lengths are drawn per batch, so rows of a batch need no padding of frames.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import load_dataset

NOTE_FIELDS = ("onset", "duration", "pitch", "velocity")
NOTE_DTYPE = np.dtype([("onset", "f8"), ("duration", "f8"), ("pitch", "i2"), ("velocity", "i2")])
FRAMES_PER_STEP, STEPS_PER_SECOND = 25, 2  # prompts end on the 0.5 s grid
LOOK_AHEAD_S = 0.5  # notes behind a short target that its rows hold too, as in rendering


class DataError(ValueError):
    """Shards that are missing, mixed or made with another codec."""


def shard_files(folder: str | Path, split: str) -> list[str]:
    """Parquet files of a split, complete and in order.

    Raises:
        DataError: none there, or some of the `-of-N` files are missing.
    """
    files = sorted(str(f) for f in Path(folder).glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"{folder}: no {split}-*.parquet; make it with scripts.prepare_dataset")
    expected = int(files[0].removesuffix(".parquet").split("-of-")[-1])
    if len(files) != expected:
        there = f"{len(files)} of {expected} shards of {split}"
        raise DataError(f"{folder}: {there}; finish it with scripts.prepare_dataset")
    return files


def dataset_info(files: list[str]) -> dict:
    """What the shards say of themselves: codec_sha256, num_codebooks, prompt_seconds, target_seconds."""
    found = {pq.read_schema(f).metadata[b"midivalle"].decode() for f in files}
    if len(found) > 1:
        raise DataError(f"{Path(files[0]).parent}: shards of different codecs or layouts are mixed")
    return json.loads(found.pop())


def notes_of(row: dict, part: str) -> np.ndarray:
    """Notes of a row's `prompt` or `target`, structured array, s relative to its window."""
    notes = np.empty(len(row[f"{part}_onset"]), dtype=NOTE_DTYPE)
    for field in NOTE_FIELDS:
        notes[field] = row[f"{part}_{field}"]
    return notes


def codes_of(row: dict, part: str, num_codebooks: int) -> np.ndarray:
    """Codes (K, T), int64, of a row's `prompt` or `target`."""
    return np.asarray(row[f"{part}_codes"], dtype=np.int64).reshape(num_codebooks, -1)


class TrainingStream:
    """Batches for the decoders, in an order that depends on (seed, epoch) only.

    Args:
        files: shards; a row group or more each.
        tokenizer: `MidiValleTokenizer`.
        batch_size: rows of a batch on this process.
        prompt_seconds: range (low, high) of the prompt's length, s; drawn per batch in steps of 0.5 s.
        no_prompt_share: share of batches without any prompt.
        short_share: share of batches whose targets are cut to a drawn length from 1 s on: the first windows of a piece
            are short, and the NAR looks both ways.
        seed, rank, world_size: rank r takes batches r, r + world_size, ...
    """

    def __init__(
        self,
        files: list[Path],
        tokenizer,
        batch_size: int,
        prompt_seconds: tuple[float, float] = (1.0, 6.0),
        no_prompt_share: float = 0.05,
        short_share: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.info = dataset_info(files)
        self.files, self.tokenizer, self.batch_size = files, tokenizer, batch_size
        low, high = (min(seconds, self.info["prompt_seconds"]) for seconds in prompt_seconds)
        self.prompt_steps = (round(low * STEPS_PER_SECOND), round(high * STEPS_PER_SECOND))
        self.no_prompt_share, self.short_share = no_prompt_share, short_share
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.position = 0, 0  # position: batches given in this epoch, over all ranks

    def state_dict(self) -> dict[str, int]:
        """The place in the stream: the next batch to give."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a `state_dict`."""
        self.epoch, self.position, self.seed = state["epoch"], state["position"], state["seed"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches; the position moves on before a batch is handed over."""
        while True:
            start, number, mine = self.position, -1, None
            for number, rows in enumerate(self._batches(self.epoch)):
                if number % self.world_size == self.rank:
                    mine = (number, rows)
                # only when every rank has one: the ranks stay in the same epoch
                if number % self.world_size == self.world_size - 1 and number >= start:
                    self.position = number + 1
                    yield self.collate(mine[1], np.random.default_rng([self.seed, self.epoch, mine[0]]))
            if number + 1 < self.world_size:
                raise DataError(
                    f"{Path(self.files[0]).parent}: too few items for {self.world_size} batches of {self.batch_size}"
                )
            self.epoch, self.position = self.epoch + 1, 0

    def collate(self, rows: list[dict], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Rows to `midi_ids (B, N, 6)`, `midi_attention_mask (B, N)`, `audio_codes (B, K, T)`, `prompt_lengths (B,)`.

        T counts prompt and target frames; MIDI rows are padded on the right, frames need no padding.
        """
        steps = 0 if rng.random() < self.no_prompt_share else int(rng.integers(*self.prompt_steps, endpoint=True))
        frames, seconds = steps * FRAMES_PER_STEP, steps / STEPS_PER_SECOND
        whole = length = round(self.info["target_seconds"] * STEPS_PER_SECOND)
        if self.short_share and rng.random() < self.short_share:
            length = int(rng.integers(STEPS_PER_SECOND, whole, endpoint=True))
        end = min(length / STEPS_PER_SECOND + (LOOK_AHEAD_S if length < whole else 0.0), self.info["target_seconds"])
        ids, codes = [], []
        for row in rows:
            segments = [(notes_of(row, "prompt"), 0.0, seconds)] if steps else []
            segments.append((notes_of(row, "target"), 0.0, end))
            ids.append(torch.from_numpy(self.tokenizer.encode_notes(segments)))
            prompt, target = (codes_of(row, part, self.info["num_codebooks"]) for part in ("prompt", "target"))
            target = target if length == whole else target[:, : length * FRAMES_PER_STEP]
            codes.append(torch.from_numpy(np.concatenate([prompt[:, :frames], target], 1)))
        midi_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(i) for i in ids])
        return {
            "midi_ids": midi_ids,
            "midi_attention_mask": (torch.arange(midi_ids.shape[1]) < lengths[:, None]).long(),
            "audio_codes": torch.stack(codes),
            "prompt_lengths": torch.full((len(rows),), frames),
        }

    def _batches(self, epoch: int) -> Iterator[list[dict]]:
        """Full batches of one epoch; shards in a drawn order, the rows of a shard too."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = []
        for shard in rng.permutation(len(self.files)):
            stream = load_dataset("parquet", data_files=[self.files[shard]], split="train", streaming=True)
            block = list(stream)
            for i in np.random.default_rng([self.seed, epoch, shard, 1]).permutation(len(block)):
                rows.append(block[i])
                if len(rows) == self.batch_size:
                    yield rows
                    rows = []
