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
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from modeling_midivalle.modeling_midivalle_frame_notes import struck_keys
from modeling_midivalle.sampling_midivalle import pad_codes, window_seed
from processing import Prompt
from processing.audio_midivalle import to_int16
from processing.processing_midivalle import FRAME_RATE
from scripts.audio.pianos import SAMPLING_RATE, load_piano
from scripts.audio.rendered_audio import HOP, PITCHES, codes_path, onsets_path
from scripts.audio.rooms import ROOM_NAMES, ROOMS
from scripts.codec.pool_files import PoolFiles
from scripts.dataset.recordings import LEAD_S, DataArguments, RenderedRecordings
from scripts.models.model_folder import load_model, load_processor, model_folder
from scripts.models.trained_parts import codec_hash, load_part
from scripts.rendering.manifest import weights_sha256
from scripts.rendering.pieces import encode_prompt
from scripts.training.processes import follow_parent, run_errors
from tokenization import MidiError, Performance

REDRAW, TRIES = 1_000_000, 100  # from an item's number to that of the next try; and how many


class Drawn(Dataset):
    """Item i: the notes of a target (`Performance`), its prompt (`Prompt`), and its audio, int16 (samples,) at 32 kHz.
    Where no note is struck in the target, or a MIDI file cannot be used, another is drawn."""

    def __init__(self, recordings: RenderedRecordings, data: DataArguments, processor):
        self.recordings, self.data, self.processor = recordings, data, processor
        self.told = set()  # of which files was said that they cannot be used

    def _draw(self, index: int):
        """Prompt and target, or no target: a MIDI file that cannot be used."""
        try:
            return self.recordings.draw(index, self.data)[:2]
        except MidiError as error:
            if str(error) not in self.told:
                print(f"{error}; another is drawn instead", file=sys.stderr, flush=True)
            self.told.add(str(error))
            return None, None

    def __getitem__(self, index: int):
        seconds = self.data.target_seconds
        for i in range(TRIES):
            prompt, target = self._draw(index + i * REDRAW)
            if target is not None and (target.notes["onset"] >= 0).any():
                break
        else:
            raise MidiError(f"of {TRIES} excerpts that were drawn, none has a note and a MIDI file that can be used")
        first, size = round(LEAD_S * SAMPLING_RATE), round(seconds * SAMPLING_RATE)
        piece = self.processor.load(Performance(target.notes, target.source, {}), start=0.0, end=seconds)
        return piece, Prompt(prompt.wave, prompt.notes), to_int16(target.wave[first : first + size])


@torch.no_grad()
def generate(model, processor, items: list, seconds: float, seeds: list[int]) -> list[np.ndarray]:
    """Of items of `seconds` the velocities of the keys that the model was given, uint8 (B, T, 88), the codes, int16
    (B, K, T), and with mean vectors these, float16 (B, A, T); `seeds` are of the items, for a model that samples."""
    pieces, prompts, _ = map(list, zip(*items, strict=True))
    inputs = processor.window_inputs(pieces, [0.0] * len(items), [seconds] * len(items), prompts).to(model.device)
    prompt_codes, lengths = pad_codes([encode_prompt(model, prompt) for prompt in prompts])
    given = inputs["input_ids"], inputs["attention_mask"]
    with torch.autocast(model.device.type, torch.bfloat16):  # what rounding changes is no more than a draw would
        codes, vectors = model.generate_frames(*given, prompt_codes, lengths, inputs["target_frames"], seed=seeds)
    struck = struck_keys(*given, lengths.to(model.device), codes.shape[-1])
    found = [(struck * 127).round().byte(), codes.short(), *([] if vectors is None else [vectors])]
    return [array.cpu().numpy() for array in found]


def pool_arrays(output: Path, sha256: str, items: int, frames: int, books: int, axes: int) -> dict:
    """Shape and type of each file of the pool `output`, for `PoolFiles`: audio, struck keys, codes and, with `axes`,
    mean vectors of `items` of `frames`."""
    files = {
        output: ((items, frames * HOP), np.int16),
        onsets_path(output): ((items, frames, PITCHES), np.uint8),
        codes_path(output, sha256, "generated"): ((items, books, frames), np.int16),
    }
    return files | ({codes_path(output, sha256, "means"): ((items, axes, frames), np.float16)} if axes else {})


def make_pool(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    folder, output = model_folder(args.model), Path(args.output)
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
    for piano in args.piano:  # what is wrong with one is said before files are made
        load_piano(piano)
    seconds = processor.max_window_seconds - processor.context_seconds - 0.5  # as long as windows of a piece
    about = {"keep_audio": False, "sustain": processor.tokenizer.sustain}
    data = DataArguments("train", processor.max_prompt_seconds, seconds, args.seed, **about)
    sha256, size = codec_hash(args.codec), args.batch_size
    settings = {"items": args.items, "seconds": seconds, "mean_vectors": args.mean_vectors, "codec_sha256": sha256}
    settings |= {"batch_size": size, "model_sha256": weights_sha256(folder)}  # in bf16 the batch decides the last bits
    books, axes = model.config.ar_config.num_codebooks, model.num_vector_axes
    files = pool_arrays(output, sha256, args.items, round(seconds * FRAME_RATE), books, axes)
    with PoolFiles(files, settings | recordings.settings) as pool:
        if pool.done < args.items:
            _generate_items(pool, model, Drawn(recordings, data, processor), size, args.workers)
        else:
            print(f"{output}: is done already")
        pool.finish()


def _generate_items(pool: PoolFiles, model, drawn: Drawn, size: int, workers: int) -> None:
    """Those that are not done yet, `size` at a time."""
    batches = [list(range(i, min(i + size, pool.items))) for i in range(pool.done, pool.items, size)]
    options = {"num_workers": workers, "collate_fn": list, "worker_init_fn": follow_parent}
    loader = DataLoader(drawn, batch_sampler=batches, **options)
    with tqdm(total=pool.items, initial=pool.done, unit="item") as bar:
        for indices, items in zip(batches, loader, strict=True):
            waves = np.stack([wave for _, _, wave in items])
            seeds = [window_seed(drawn.data.seed, i) for i in indices]
            made = generate(model, drawn.processor, items, drawn.data.target_seconds, seeds)
            pool.add([waves, *made], indices[-1] + 1)
            bar.update(len(indices))


def main(argv: list[str] | None = None) -> int:
    """The command; 0 on success, 2 on input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.generate_pool",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of the model whose AR and NAR generate")
    parser.add_argument("--codec", required=True, help="its codec's own folder, whose decoder is to learn")
    parser.add_argument("--midi-root", required=True, help="folder of MIDI files or of a MIDI pack with manifest.csv")
    parser.add_argument("--piano", action="append", required=True, help="piano tar or folder, or FONT.sf2[:PROGRAM]")
    parser.add_argument("--room", action="append", choices=ROOM_NAMES, help="a room to use (default: all but any)")
    parser.add_argument("--items", type=int, default=800)
    parser.add_argument("--mean-vectors", action="store_true", help="for a model whose codec decodes means of codes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="items generated at a time")
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--output", required=True, help=".npy file")
    args = parser.parse_args(argv)
    if min(args.items, args.batch_size) < 1 or min(args.workers, args.seed) < 0:
        parser.error("--items and --batch-size must be at least 1, --workers and --seed at least 0")
    try:
        with run_errors():
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
