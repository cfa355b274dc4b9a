# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Audio beside what a model makes of its notes, for the last step of the codec's decoder.

    python -m scripts.generate_pool --model FOLDER --codec CODEC --midi-root PACK/midi --piano PIANO.tar ... \\
        --items 800 --output runs/generated.npy

The decoder has learned from codes of recordings. What it is given in the end are codes that AR and NAR have generated:
means of many recordings, whose spectra are smoother, and beside them the notes themselves (`keys_from_midi`). From
pairs of such codes and the recording that they stand for it learns what to make of them.

Item i is a target of the train split after a prompt of the same recording, drawn from (seed, i). Written are what
`scripts.render_pool` writes, the keys at the times at which the model is given them, and `POOL.CODEC.generated.npy`,
int16 (items, K, frames); with `--mean-vectors`, for a model that will have them, `POOL.CODEC.means.npy`, float16
(items, A, frames), which are learned from instead. `scripts.train_codec encode` adds the codes as heard and as played.
A run that was interrupted goes on where it stopped when it is started again.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from modeling_midivalle.modeling_midivalle_frame_notes import struck_keys
from modeling_midivalle.sampling_midivalle import pad_codes
from processing import Prompt
from scripts.manifest import write_json
from scripts.model_folder import load_model, load_processor
from scripts.pianos import SAMPLING_RATE
from scripts.recordings import LEAD_S, DataArguments, RenderedRecordings
from scripts.rendered_audio import HOP, PITCHES, codes_path, onsets_path
from scripts.rendering import encode_prompt
from scripts.rooms import ROOMS
from scripts.trained_parts import codec_hash, load_part
from tokenization import Performance

REDRAW = 1_000_000  # from an item's number to that of the next try


class Drawn(Dataset):
    """Item i: the notes of a target (`Performance`), its prompt (`Prompt`), and its audio, int16 (samples,) at 32 kHz.
    Where no note begins in the target, another is drawn."""

    def __init__(self, recordings: RenderedRecordings, data: DataArguments, processor):
        self.recordings, self.data, self.processor = recordings, data, processor

    def __getitem__(self, index: int):
        seconds = self.data.target_seconds
        draws = (self.recordings.draw(i, self.data) for i in itertools.count(index, REDRAW))
        prompt, target, _ = next(found for found in draws if (found[1].notes["onset"] < seconds).any())
        first, size = round(LEAD_S * SAMPLING_RATE), round(seconds * SAMPLING_RATE)
        piece = self.processor.load(Performance(target.notes, target.source, {}), start=0.0, end=seconds)
        wave = np.round(np.clip(target.wave[first : first + size], -1, 1) * 32767).astype(np.int16)
        return piece, Prompt(prompt.wave, prompt.notes), wave


@torch.no_grad()
def generate(model, processor, items: list, seconds: float) -> list[np.ndarray]:
    """Of items of `seconds` the velocities of the keys that the model was given, uint8 (B, T, 88), the codes, int16
    (B, K, T), and with mean vectors these, float16 (B, A, T)."""
    pieces, prompts, _ = map(list, zip(*items, strict=True))
    inputs = processor.window_inputs(pieces, [0.0] * len(items), [seconds] * len(items), prompts).to(model.device)
    prompt_codes, lengths = pad_codes([encode_prompt(model, prompt) for prompt in prompts])
    given = inputs["input_ids"], inputs["attention_mask"]
    with torch.autocast(model.device.type, torch.bfloat16):  # what rounding changes is no more than a draw would
        codes, vectors = model.generate_frames(*given, prompt_codes, lengths, inputs["target_frames"])
    struck = struck_keys(*given, lengths.to(model.device), codes.shape[-1])
    found = [(struck * 127).round().byte(), codes.short(), *([] if vectors is None else [vectors])]
    return [array.cpu().numpy() for array in found]


class Pool:
    """The files of a pool in the making, and how many items are done; `settings` must be those that it began with."""

    def __init__(self, output: Path, sha256: str, items: int, frames: int, books: int, axes: int, settings: dict):
        self.files = {
            output: ((items, frames * HOP), np.int16),
            onsets_path(output): ((items, frames, PITCHES), np.uint8),
        }
        self.files[codes_path(output, sha256, "generated")] = ((items, books, frames), np.int16)
        if axes:
            self.files[codes_path(output, sha256, "means")] = ((items, axes, frames), np.float16)
        self.state, self.settings = output.with_suffix(".state.json"), settings
        mode, self.done = "w+", 0
        if self.state.is_file():
            state = json.loads(self.state.read_text())
            if state["settings"] != settings:
                raise ValueError(f"{self.state}: another pool was begun here; delete it, or give another --output")
            mode, self.done = "r+", state["done"]
        opened = np.lib.format.open_memmap
        self.arrays = [opened(_temporary(f), mode=mode, shape=s, dtype=t) for f, (s, t) in self.files.items()]

    def add(self, found: list[np.ndarray], done: int) -> None:
        """The next items, in the order of `files`; they are on disk when `state` says so."""
        for array, values in zip(self.arrays, found, strict=True):
            array[self.done : done] = values
            array.flush()
        self.done = done
        write_json(self.state, {"settings": self.settings, "done": done})

    def finish(self) -> None:
        """Give the files their names."""
        for file in reversed(self.files):  # the audio last: with it, all are there
            os.replace(_temporary(file), file)
        self.state.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def make_pool(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    folder, output = Path(args.model), Path(args.output)
    if output.exists():
        raise ValueError(f"{output}: exists already; delete it, or give another --output")
    model = load_model(folder, args.device)
    if not model.config.codec_config.num_key_axes:
        raise ValueError(f"{folder}: its codec has no axes of keys (num_key_axes), so nothing can be told to it")
    mine, given = (codec.quantizer.layers for codec in (model.codec, load_part("codec", args.codec)))
    if not all(torch.equal(a.codebook.embed.cpu(), b.codebook.embed) for a, b in zip(mine, given, strict=True)):
        raise ValueError(f"--codec {args.codec}: has other codebooks than the codec of {folder}")
    model.config.keys_from_midi, model.config.mean_vectors = True, args.mean_vectors
    processor = load_processor(folder)
    rooms = args.room or list(ROOMS)
    recordings = RenderedRecordings(args.midi_root, "train", args.piano, rooms, args.seed)
    seconds = processor.max_window_seconds - processor.context_seconds - 0.5  # as long as windows of a piece
    data = DataArguments("train", processor.max_prompt_seconds, seconds, args.seed, keep_audio=False)
    names = [Path(piano).name for piano in args.piano]
    sha256 = codec_hash(args.codec)
    settings = {"seed": args.seed, "items": args.items, "pianos": names, "rooms": rooms, "seconds": seconds}
    settings |= {"codec": sha256, "batch_size": args.batch_size}  # in bf16 the batch decides the last bits
    settings |= {"mean_vectors": args.mean_vectors}
    frames = round(seconds * 50)
    output.parent.mkdir(parents=True, exist_ok=True)
    books, axes = model.config.ar_config.num_codebooks, model.num_vector_axes
    pool = Pool(output, sha256, args.items, frames, books, axes, settings)
    batches = [
        list(range(i, min(i + args.batch_size, args.items))) for i in range(pool.done, args.items, args.batch_size)
    ]
    drawn = DataLoader(
        Drawn(recordings, data, processor), batch_sampler=batches, num_workers=args.workers, collate_fn=list
    )
    with tqdm(total=args.items, initial=pool.done, unit="item") as bar:
        for indices, items in zip(batches, drawn, strict=True):
            waves = np.stack([wave for _, _, wave in items])
            pool.add([waves, *generate(model, processor, items, seconds)], indices[-1] + 1)
            bar.update(len(indices))
    pool.finish()


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder whose AR and NAR generate")
    parser.add_argument("--codec", required=True, help="its codec's own folder, whose decoder is to learn")
    parser.add_argument("--midi-root", required=True, help="folder of MIDI files or of a MIDI pack with manifest.csv")
    parser.add_argument("--piano", action="append", required=True, help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--room", action="append", choices=tuple(ROOMS), help="a room to use (default: all)")
    parser.add_argument("--items", type=int, default=800)
    parser.add_argument("--mean-vectors", action="store_true", help="for a model whose codec decodes means of codes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="items generated at a time")
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    parser.add_argument("--device", default="auto", help="cpu, cuda (default: a GPU if there is one)")
    parser.add_argument("--output", required=True, help=".npy file")
    try:
        make_pool(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
