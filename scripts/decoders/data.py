# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Training batches from parquet shards of `scripts.prepare_dataset`, streamed.

The batches of an epoch are a function of (seed, epoch) alone and the place among them is one number, so a stopped run
continues with the batch it had not seen, on any number of processes. Prompt lengths are drawn per batch and rows are
put together by the length of their targets, so rows of a batch need no padding of frames.

    python -m scripts.decoders.data USER/NAME --batch-size 8     # how fast they come, and in how much memory
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from processing.processing_midivalle import FRAME_RATE
from scripts.dataset.shards import DataError, Shards, codes_of, dataset_info, notes_of, row_of, shard_files
from scripts.wording import counted
from tokenization import MidiValleTokenizer

__all__ = ["DataError", "TrainingStream", "codes_of", "dataset_info", "notes_of", "shard_files"]

FRAMES_PER_STEP, STEPS_PER_SECOND = 25, 2  # prompts end on the 0.5 s grid
LOOK_AHEAD_S = 0.5  # notes behind a short target that its rows hold too, as in rendering


class TrainingStream:
    """Batches for the decoders, in an order that depends on (seed, epoch) only.

    An epoch visits the shards in a drawn order, `block_shards` at a time. The rows of such a block are shuffled, sorted
    into buckets of equal target length (0.5 s) and cut into batches: what is left over of a bucket, less than a batch,
    is left out of this epoch (`drop_last`). The batches of all blocks are numbered; `position` is the number of the
    next one to give. Of each `world_size` batches from there on rank r takes the r-th, so ranks have equal counts and
    no batch twice.

    A state may be loaded with any other `world_size`: no batch is repeated, and none is lost but those that are left
    over at the end of an epoch, fewer than `world_size`. With another batch size `position` is converted; if the sizes
    divide each other and the rows of every block, exactly, else to within a batch for each block that was seen.

    All ranks read all shards, of which the columns needed take 10 kB for an item of 22 s: an hour of music is 2 MB.

    Args:
        files: shards, as `shard_files` gives them.
        tokenizer: `MidiValleTokenizer`.
        batch_size: rows of a batch on this process.
        prompt_seconds: range (low, high) of the prompt's length, s, at most that of the data; drawn per batch, in steps
            of 0.5 s.
        no_prompt_share: share of batches without any prompt.
        short_share: share of batches whose targets are cut to a drawn length from 1 s on: the first windows of a piece
            are short, and the NAR looks both ways.
        seed, rank, world_size: rank r takes batches r, r + world_size, ...
        batch_frames: instead of `batch_size`, as many rows as have this many frames, targets and longest prompts
            counted; at least one.
        drop_last: leave out what is left over of a bucket; else it is a batch of fewer rows.
        block_shards: shards that are mixed and held in memory, twice: the next block is read ahead.
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
        batch_frames: int | None = None,
        drop_last: bool = True,
        block_shards: int = 16,
    ):
        self.shards = Shards(files)
        self.info, self.tokenizer, self.batch_size = self.shards.info, tokenizer, batch_size
        low, high = (min(seconds, self.info["prompt_seconds"]) for seconds in prompt_seconds)
        self.prompt_steps = (round(low * STEPS_PER_SECOND), round(high * STEPS_PER_SECOND))
        self.no_prompt_share, self.short_share = no_prompt_share, short_share
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.batch_frames, self.drop_last, self.block_shards = batch_frames, drop_last, block_shards
        self.epoch, self.position = 0, 0  # position: batches given in this epoch, over all ranks
        self.last_rows = []  # (file, row) of each row of the batch that was given last

    def state_dict(self) -> dict[str, int]:
        """The place in the stream: the next batch to give."""
        size, by_frames = self.batch_frames or self.batch_size, bool(self.batch_frames)
        place = {"epoch": self.epoch, "position": self.position, "seed": self.seed}
        return place | {"batch_size": size, "by_frames": by_frames}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a `state_dict`, of a stream of any `world_size`; from the beginning of its epoch, if batches are
        counted by frames now and were by rows, or the other way."""
        self.epoch, self.seed = state["epoch"], state["seed"]
        size, by_frames = self.batch_frames or self.batch_size, bool(self.batch_frames)
        is_alike = state.get("by_frames", by_frames) == by_frames
        self.position = state["position"] * state.get("batch_size", size) // size if is_alike else 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches; the position moves on before a batch is handed over.

        Raises:
            DataError: fewer batches in an epoch than ranks; or as `Shards.read`.
        """
        while True:
            blocks = self._blocks(self.epoch)
            total = sum(len(batches) for _, batches in blocks)
            if total < self.world_size:
                size = counted(self.batch_frames, "frame") if self.batch_frames else self.batch_size
                folder, name = self.shards.files[0].rsplit("/", 1)
                split = name.rsplit("-", 3)[0]
                raise DataError(
                    f"{folder}: too few items of {split} for a batch of {size} on each process ({self.world_size})"
                )
            groups = (total - self.position) // self.world_size
            end = self.position + groups * self.world_size
            mine = range(self.position + self.rank, end, self.world_size)
            for number, rows in self._read(blocks, mine):
                batch = self.collate(rows, np.random.default_rng([self.seed, self.epoch, number]))
                self.position += self.world_size
                yield batch
            self.epoch, self.position = self.epoch + 1, 0

    def collate(self, rows: list[dict], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Rows to `midi_ids (B, N, 6)`, `midi_attention_mask (B, N)`, `audio_codes (B, K, T)`, `prompt_lengths (B,)`.

        T counts prompt and target frames; MIDI rows are padded on the right, frames need no padding.
        """
        steps = 0 if rng.random() < self.no_prompt_share else int(rng.integers(*self.prompt_steps, endpoint=True))
        frames, seconds = steps * FRAMES_PER_STEP, steps / STEPS_PER_SECOND
        whole = length = min(len(row["target_codes"]) for row in rows) // self.info["num_codebooks"] // FRAMES_PER_STEP
        if self.short_share and rng.random() < self.short_share:
            length = int(rng.integers(min(STEPS_PER_SECOND, whole), whole, endpoint=True))
        end = min(length + STEPS_PER_SECOND * LOOK_AHEAD_S * (length < whole), whole) / STEPS_PER_SECOND
        ids, codes = [], []
        for row in rows:
            segments = [(notes_of(row, "prompt"), 0.0, seconds)] if steps else []
            segments.append((notes_of(row, "target"), 0.0, end))
            ids.append(self.tokenizer.encode_notes(segments))
            prompt, target = (codes_of(row, part, self.info["num_codebooks"]) for part in ("prompt", "target"))
            target = target[:, : length * FRAMES_PER_STEP]
            codes.append(torch.from_numpy(np.concatenate([prompt[:, :frames], target], 1)))
        midi = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        return {
            "midi_ids": midi["input_ids"],
            "midi_attention_mask": midi["attention_mask"],
            "audio_codes": torch.stack(codes),
            "prompt_lengths": torch.full((len(rows),), frames),
        }

    def _blocks(self, epoch: int) -> list[tuple[list[int], list[np.ndarray]]]:
        """The shards of each block of an epoch, and its batches as numbers of rows in the block."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards.files))
        blocks = []
        for first in range(0, len(order), self.block_shards):
            shards = order[first : first + self.block_shards].tolist()
            steps = np.concatenate([self.shards.frames[shard] for shard in shards]) // FRAMES_PER_STEP
            rng = np.random.default_rng([self.seed, epoch, first, 1])
            rows, batches = rng.permutation(len(steps)), []
            lengths = np.unique(steps)
            for length in lengths:
                bucket, size = rows[steps[rows] == length], self._rows_of_batch(int(length))
                end = len(bucket) - size + 1 if self.drop_last else len(bucket)
                batches += [bucket[i : i + size] for i in range(0, end, size)]
            if len(lengths) > 1:
                batches = [batches[i] for i in rng.permutation(len(batches))]
            blocks.append((shards, batches))
        return blocks

    def _rows_of_batch(self, steps: int) -> int:
        frames = (steps + self.prompt_steps[1]) * FRAMES_PER_STEP
        return max(self.batch_frames // frames, 1) if self.batch_frames else self.batch_size

    def _read(self, blocks: list, numbers: range) -> Iterator[tuple[int, list[dict]]]:
        """The batches with these numbers, each as its number and rows; blocks without any are not fetched."""
        wanted, first = [], 0
        for shards, batches in blocks:
            mine = [(first + i, rows) for i, rows in enumerate(batches) if first + i in numbers]
            wanted += [(shards, mine)] if mine else []
            first += len(batches)
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self.shards.read, shards) for shards, _ in wanted[:1]]
            for i, (shards, mine) in enumerate(wanted):
                table = coming.pop().result()
                coming += [pool.submit(self.shards.read, later) for later, _ in wanted[i + 1 : i + 2]]
                names = [(self.shards.files[shard], row) for shard in shards for row in range(self.shards.rows[shard])]
                for number, rows in mine:
                    self.last_rows = [names[row] for row in rows]
                    yield number, [row_of(table, int(row)) for row in rows]


def main(argv: list[str] | None = None) -> int:
    """Speed of a stream in times real time, targets only; 0 on success, 2 on data that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder, dataset of the Hub, or URL")
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=500, help="how many to take after the first one")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.batches) < 1:
        parser.error("--batch-size and --batches must be at least 1")
    begin = time.perf_counter()
    try:
        batches = iter(TrainingStream(shard_files(args.data, args.split), MidiValleTokenizer(), args.batch_size))
        next(batches)
        first, frames = time.perf_counter(), 0
        for _, batch in zip(range(args.batches), batches):
            frames += batch["audio_codes"].shape[2] * args.batch_size - int(batch["prompt_lengths"].sum())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    speed = frames / FRAME_RATE / (time.perf_counter() - first)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{speed:.0f} times real time; first batch after {first - begin:.1f} s; peak memory {peak:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
