# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Render a pool of audio once, for machines that cannot render and train at the same time.

    python -m scripts.render_pool --midi-root PACK/midi --piano PIANO.tar ... --hours 5 --output runs/pool.npy

Writes int16 (excerpts, samples) at 32 kHz, 230 MB an hour, which `scripts.train_codec --audio` crops, and beside it
`POOL.onsets.npy`, uint8 (excerpts, frames, 88): the velocity of a key that is struck in a frame of 20 ms. A run that
was interrupted goes on where it stopped when it is started again.
"""

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scripts.audio.pianos import SAMPLING_RATE, SourceError, load_piano
from scripts.audio.rendered_audio import HOP, PITCHES, RenderedExcerpts, onsets_path, source_settings
from scripts.audio.rooms import ROOM_NAMES, ROOMS
from scripts.codec.pool_files import PoolFiles, fill, open_arrays
from scripts.training.processes import follow_parent

EXCERPT_S = 12.0
CHUNK = 4  # excerpts that a process renders at a time
_source, _arrays = None, []


def _open(args: argparse.Namespace, files: Iterable[Path] = ()) -> None:
    global _source, _arrays  # one per process: its pianos stay in memory
    follow_parent()
    _arrays = open_arrays(files)
    rooms = args.room or list(ROOMS)
    _source = RenderedExcerpts(args.midi_root, args.split, args.piano, rooms, EXCERPT_S, args.seed)


def _render_items(numbers: range) -> None:
    """Into the pool's arrays, not handed over: a process that dies while it sends something long is waited for."""
    items = [_source[number] for number in numbers]
    fill(_arrays, [np.stack([item[name] for item in items]) for name in ("wave", "onsets")], numbers)


def make_pool(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    _open(args)  # what is wrong with MIDI or rooms is said here, not by each process
    for piano in args.piano:
        load_piano(piano)
    count, output = max(round(args.hours * 3600 / EXCERPT_S), 1), Path(args.output)
    samples = round(EXCERPT_S * SAMPLING_RATE)
    files = {output: ((count, samples), np.int16), onsets_path(output): ((count, samples // HOP, PITCHES), np.uint8)}
    settings = {"split": args.split, "items": count, "seconds": EXCERPT_S} | source_settings(_source)
    with PoolFiles(files, settings) as pool:
        if pool.done < count:
            _render(pool, args)
        else:
            print(f"{output}: is done already")
        pool.finish()


def _render(pool: PoolFiles, args: argparse.Namespace) -> None:
    chunks = [range(i, min(i + CHUNK, pool.items)) for i in range(pool.done, pool.items, CHUNK)]
    processes, context = min(args.processes, len(chunks)), multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, context, _open, (args, list(pool.files))) as workers,
        tqdm(total=pool.items, initial=pool.done, unit="excerpt") as bar,
    ):
        try:
            rendered = [workers.submit(_render_items, numbers) for numbers in chunks]
            for numbers, one in zip(chunks, rendered, strict=True):
                one.result()
                pool.advance(numbers.stop)
                bar.update(len(numbers))
        except BrokenProcessPool as error:
            raise SourceError("a process died (out of memory?); start again, what is finished is kept") from error
        except BaseException:  # else who is interrupted waits for all that is still to be rendered
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--midi-root", required=True, help="folder of MIDI files or of a MIDI pack with manifest.csv")
    parser.add_argument("--piano", action="append", required=True, help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--room", action="append", choices=ROOM_NAMES, help="a room to use (default: all but any)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--hours", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", required=True, help=".npy file")
    args = parser.parse_args(argv)
    if not 0 < args.hours < math.inf or args.processes < 1 or args.seed < 0:
        parser.error("--hours must be more than 0, --processes at least 1, --seed at least 0")
    try:
        make_pool(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start it again to go on: what is finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
