# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Render a pool of audio once, for machines that cannot render and train at the same time.

    python -m scripts.render_pool --midi-root PACK/midi --piano PIANO.tar ... --hours 5 --output runs/pool.npy

Writes int16 (excerpts, samples) at 32 kHz, 230 MB an hour, which `scripts.train_codec --audio` crops, and beside it
`POOL.onsets.npy`, uint8 (excerpts, frames, 88): the velocity of a key that is struck in a frame of 20 ms.
"""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scripts.pianos import SAMPLING_RATE, load_piano
from scripts.rendered_audio import HOP, PITCHES, RenderedExcerpts, onsets_path
from scripts.rooms import ROOMS

EXCERPT_S = 12.0
_source = None


def _open(args: argparse.Namespace) -> None:
    global _source  # one per process: its pianos stay in memory
    rooms = args.room or list(ROOMS)
    _source = RenderedExcerpts(args.midi_root, args.split, args.piano, rooms, EXCERPT_S, args.seed)


def _excerpt(index: int) -> tuple[int, dict[str, np.ndarray]]:
    return index, _source[index]


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--midi-root", required=True, help="folder of MIDI files or of a MIDI pack with manifest.csv")
    parser.add_argument("--piano", action="append", required=True, help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--room", action="append", choices=tuple(ROOMS), help="a room to use (default: all)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--hours", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", required=True, help=".npy file")
    args = parser.parse_args(argv)
    count = max(round(args.hours * 3600 / EXCERPT_S), 1)
    shape = (count, round(EXCERPT_S * SAMPLING_RATE))
    onsets = np.zeros((count, shape[1] // HOP, PITCHES), np.uint8)
    temporary = f"{args.output}.tmp"
    try:
        _open(args)  # what is wrong with MIDI or rooms is said here, not by each process
        for piano in args.piano:
            load_piano(piano)
        pool = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int16, shape=shape)
        with multiprocessing.get_context("spawn").Pool(args.processes, _open, (args,)) as workers:
            found = workers.imap_unordered(_excerpt, range(count), chunksize=4)
            for index, item in tqdm(found, total=count, unit="excerpt"):
                pool[index], onsets[index] = item["wave"], item["onsets"]
        pool.flush()
        np.save(onsets_path(args.output), onsets)
        os.replace(temporary, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        Path(temporary).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
