# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Batches of sound for the codec, each a pure function of the seed and its number.

So a run that goes on continues exactly where it stopped, whatever the number of workers, and processes never see the
same. There are two kinds of sources, both map-style: pools (`StoredCrops`), whose item is a crop, and excerpts
(`RenderedExcerpts`, `RecordedExcerpts`), each of which is cut into crops that are mixed with those of others.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scripts.audio.pianos import SAMPLING_RATE
from scripts.audio.rendered_audio import CODES, HOP, all_codes, codes_path, onsets_path
from scripts.codec.recipe import CodecRecipe

MIXING, LEVELS = 1, 2  # what a number is drawn for
PEAK = 0.97
COLOURS, COLOUR_HZ = 8, (30.0, 15_000.0)


class StoredCrops(Dataset):
    """Random crops of rendered pools: `.npy` files of int16 (excerpts, samples). Crop i is drawn from (seed, i).

    A crop holds `input_values (samples,)` and `onsets (frames, 88)`, velocity over 127 where a key is struck, else 0;
    with the hash of a codec that has encoded every pool (see `codes_path`) also `audio_codes (K, lead + frames)`, from
    `lead_seconds` before the crop on: of every other crop with its notes as played, if there are such codes. Where a
    model has generated codes too (`scripts.generate_pool`), half of the crops have these, and all but those with codes
    as heard are `told (1,)` their keys, for which `lead_onsets (lead, 88)` are those before the crop; where it has mean
    vectors, `means (A, lead + frames)` are decoded instead of such codes, and are NaN beside others. Crops start on a
    frame.
    """

    def __init__(self, paths, crop_seconds: float, seed: int = 0, codec_sha256: str | None = None, lead_seconds=0.0):
        self.arguments = (paths, crop_seconds, seed, codec_sha256, lead_seconds)
        self.frames, self.seed = round(crop_seconds * SAMPLING_RATE) // HOP, seed
        self.lead = round(lead_seconds * SAMPLING_RATE) // HOP
        self.pools, self.onsets = zip(*(open_pool(path) for path in paths), strict=True)
        known = (*CODES, "means") if codec_sha256 else ()
        found = {kind: self._beside_all(paths, codec_sha256, kind) for kind in known}
        others = [name for path in paths for name in all_codes(path)]
        if known and others and not any(found.values()):
            raise ValueError(f"{others[0]}: holds codes, but of another codec; add those of this one by encode")
        self.codes = {kind: self._beside(found[kind], np.int16) for kind in CODES if found.get(kind)}
        self.kinds = list(self.codes) + ["generated"] * ("generated" in self.codes)
        self.means = self._beside(found.get("means", []), np.float16)
        for path, pool in zip(paths, self.pools, strict=True):
            if pool.shape[1] // HOP < self.lead + self.frames:
                raise ValueError(f"{path}: its excerpts are shorter than a crop of {crop_seconds} s and its lead")

    @staticmethod
    def _beside_all(paths, codec_sha256: str, kind: str) -> list[Path]:
        """Files of one kind, of all pools or of none; ValueError if only some have it."""
        names = [codes_path(path, codec_sha256, kind) for path in paths]
        lacking = [name for name in names if not name.is_file()]
        if lacking and len(lacking) < len(names):
            raise ValueError(
                f"{lacking[0]}: is not there, but other pools have theirs; encode this one too, or leave it out"
            )
        return [] if lacking else names

    def _beside(self, names: list[Path], dtype: type) -> list[np.ndarray]:
        return [_array_beside(*of_pool, dtype, 2) for of_pool in zip(names, self.pools, strict=False)]

    def __reduce__(self):  # for workers that are started anew: files are opened there, not sent
        return StoredCrops, self.arguments

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, index])
        p = int(rng.integers(len(self.pools)))
        e = int(rng.integers(len(self.pools[p])))
        frame = int(rng.integers(self.lead, self.pools[p].shape[1] // HOP - self.frames + 1))
        wave = self.pools[p][e, frame * HOP : (frame + self.frames) * HOP].astype(np.float32) / 32767
        onsets = self.onsets[p][e, frame : frame + self.frames].astype(np.float32) / 127
        item = {"input_values": wave, "onsets": onsets}
        if self.codes:
            kind = self.kinds[int(rng.integers(len(self.kinds)))]
            codes = self.codes[kind][p]
            item["audio_codes"] = codes[e, :, frame - self.lead : frame + self.frames].astype(np.int64)
            if "generated" in self.codes:
                item["told"] = np.array(kind != "heard")
                item["lead_onsets"] = self.onsets[p][e, frame - self.lead : frame].astype(np.float32) / 127
            if self.means:
                means = self.means[p][e, :, frame - self.lead : frame + self.frames].astype(np.float32)
                item["means"] = means if kind == "generated" else np.full_like(means, np.nan)
        return item


class CropBatches:
    """Batches of one process: `batches(first)` -> endless iterator from batch `first` on.

    Batches come in blocks, which the processes take in turns. A block of a pool is one batch; one of excerpts is made
    of `mixed_excerpts` of them (or a few more, so that batches come out even), whose crops are drawn in random order.

    Yields dicts of `input_values (B, samples)` float32, `onsets (B, T, 88)` float32 and whatever the source adds; with
    `recipe.lead_seconds`, of excerpts also `lead (B, samples)` and `lead_onsets (B, T, 88)`, what is just before.

    Args:
        source: `StoredCrops`, or map-style excerpts: dicts of `wave` int16 (samples,) and `onsets` uint8 (frames, 88).
        batch_size: crops of a batch; whatever `recipe.batch_size` says.
        workers: processes that prepare the source's items; 0: none, they are prepared when needed.
        process, processes: number of this one, and how many there are.
        base: number of the first block; earlier ones have been used by other numbers of processes or sizes of batches.
    """

    def __init__(self, source, recipe: CodecRecipe, batch_size: int, workers=0, process=0, processes=1, base=0):
        self.source, self.recipe, self.batch_size, self.workers = source, recipe, batch_size, workers
        self.process, self.processes, self.base = process, processes, base
        self.stored = isinstance(source, StoredCrops)
        self.crops = int((recipe.excerpt_seconds - recipe.lead_seconds) / recipe.crop_seconds + 1e-6)  # of an excerpt
        unit = batch_size // math.gcd(batch_size, self.crops)
        self.excerpts = 0 if self.stored else -(-recipe.mixed_excerpts // unit) * unit  # of a block
        self.items = batch_size if self.stored else self.excerpts  # of the source, likewise
        self.batches_per_block = 1 if self.stored else self.excerpts * self.crops // batch_size

    def __call__(self, first: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        found = self._from_pools(first) if self.stored else self._from_excerpts(first)
        for number, batch in zip(itertools.count(first), found):
            block, place = divmod(number, self.batches_per_block)
            self._vary(batch, (self._block(block) * self.batches_per_block + place) * self.batch_size)
            yield batch

    def next_base(self, batches: int) -> int:
        """The first block that no process has begun after `batches` batches each."""
        return self.base + self.processes * -(-batches // self.batches_per_block)

    def _block(self, turn: int) -> int:
        return self.base + turn * self.processes + self.process

    def _from_pools(self, first: int) -> Iterator[dict[str, torch.Tensor]]:
        size = self.batch_size
        places = ([self._block(n) * size + k for k in range(size)] for n in itertools.count(first))
        return iter(DataLoader(self.source, batch_sampler=places, **self._loading()))

    def _from_excerpts(self, first: int) -> Iterator[dict[str, torch.Tensor]]:
        turn, place = divmod(first, self.batches_per_block)
        indices = (self._block(t) * self.excerpts + k for t in itertools.count(turn) for k in range(self.excerpts))
        found = iter(DataLoader(self.source, sampler=indices, batch_size=None, **self._loading()))
        excerpts = list(itertools.islice(found, self.excerpts))
        while True:
            order = np.random.default_rng([self.recipe.seed, MIXING, self._block(turn)])
            order, following = order.permutation(self.excerpts * self.crops), []
            for p in range(place, self.batches_per_block):  # the next block's excerpts come in step with the batches
                due = self.excerpts * (p + 1) // self.batches_per_block
                following += itertools.islice(found, due - len(following))
                yield self._collate(excerpts, order[p * self.batch_size : (p + 1) * self.batch_size])
            excerpts, turn, place = following, turn + 1, 0

    def _collate(self, excerpts: list[dict], chosen: np.ndarray) -> dict[str, torch.Tensor]:
        frames, lead = (round(s * SAMPLING_RATE) // HOP for s in (self.recipe.crop_seconds, self.recipe.lead_seconds))
        parts = [(excerpts[i // self.crops], lead + i % self.crops * frames) for i in chosen.tolist()]
        waves = torch.stack([e["wave"][frame * HOP : (frame + frames) * HOP] for e, frame in parts])
        onsets = torch.stack([e["onsets"][frame : frame + frames] for e, frame in parts])
        more = {k: torch.stack([e[k] for e, _ in parts]) for k in parts[0][0] if k not in ("wave", "onsets")}
        if lead:
            before = torch.stack([e["wave"][(frame - lead) * HOP : frame * HOP] for e, frame in parts])
            struck = torch.stack([e["onsets"][frame - lead : frame] for e, frame in parts])
            more |= {"lead": before.float() / 32767, "lead_onsets": struck.float() / 127}
        return {"input_values": waves.float() / 32767, "onsets": onsets.float() / 127} | more

    def _vary(self, batch: dict[str, torch.Tensor], index: int) -> None:
        recipe = self.recipe
        if recipe.level_db == (0.0, 0.0) and recipe.noise_db is None and not recipe.colour_db:
            return
        if "audio_codes" in batch:
            raise ValueError(
                "level_db, noise_db and colour_db do not go with stored codes, which are those of the sound as it is"
            )
        for k, wave in enumerate(batch["input_values"]):
            rng = np.random.default_rng([recipe.seed, LEVELS, index + k])
            sounds = [batch[name][k] for name in ("lead", "input_values") if name in batch]
            if recipe.colour_db:
                whole = coloured(torch.cat(sounds), rng.normal(0.0, recipe.colour_db, COLOURS))
                for sound, part in zip(sounds, whole.split([len(sound) for sound in sounds]), strict=True):
                    sound[:] = part
            gain = 10 ** (rng.uniform(*recipe.level_db) / 20)
            gain = min(gain, PEAK / (float(wave.abs().max()) + 1e-9))
            for sound in sounds:
                sound *= gain
            if recipe.noise_db is not None:
                noise = torch.from_numpy(rng.standard_normal(len(wave), np.float32))
                wave += noise * 10 ** (rng.uniform(*recipe.noise_db) / 20)

    def _loading(self) -> dict:
        prefetch = 4 if self.workers else None
        return {"num_workers": self.workers, "prefetch_factor": prefetch, "generator": torch.Generator()}


def coloured(wave: torch.Tensor, levels_db: np.ndarray) -> torch.Tensor:
    """`wave` (samples,) through a filter without delay of these levels at frequencies from 30 Hz to 15 kHz, evenly
    spaced as pitches are, and smooth between them."""
    spectrum = torch.fft.rfft(wave)
    frequencies = np.linspace(0, SAMPLING_RATE / 2, len(spectrum)).clip(*COLOUR_HZ)
    places = np.log(frequencies / COLOUR_HZ[0]) / np.log(COLOUR_HZ[1] / COLOUR_HZ[0]) * (len(levels_db) - 1)
    gains = 10 ** (np.interp(places, np.arange(len(levels_db)), levels_db) / 20)
    return torch.fft.irfft(spectrum * torch.from_numpy(gains.astype(np.float32)), len(wave))


def first_waves(batches: CropBatches, count: int) -> torch.Tensor:
    """At least `count` crops (N, samples), as a start needs them."""
    found = []
    for batch in batches():
        found.append(batch["input_values"])
        if sum(map(len, found)) >= count:
            return torch.cat(found)


def fixed_batch(source, count: int, seconds: float) -> dict[str, torch.Tensor]:
    """The first `count` items of a source as one batch of crops of `seconds`, always the same."""
    frames = round(seconds * SAMPLING_RATE) // HOP
    items = [source[i] for i in range(count)]
    if any(len(item["wave"]) < frames * HOP for item in items):
        raise ValueError(f"validation_seconds: {seconds} s are longer than the excerpts for validation")
    waves = torch.stack([torch.as_tensor(item["wave"][: frames * HOP]) for item in items])
    onsets = torch.stack([torch.as_tensor(item["onsets"][:frames]) for item in items])
    more = {k: torch.stack([torch.as_tensor(e[k]) for e in items]) for k in items[0] if k not in ("wave", "onsets")}
    return {"input_values": waves.float() / 32767, "onsets": onsets.float() / 127} | more


class StoredExcerpts(Dataset):
    """The excerpts of pools one after the other, for `fixed_batch`."""

    def __init__(self, paths):
        self.pools = [open_pool(path) for path in paths]
        self.places = [(p, e) for p, (pool, _) in enumerate(self.pools) for e in range(len(pool))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        p, e = self.places[index]
        return {"wave": np.array(self.pools[p][0][e]), "onsets": np.array(self.pools[p][1][e])}


def open_pool(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Audio, int16 (excerpts, samples), and struck keys, uint8 (excerpts, frames, 88), of a pool; they stay on disk.

    Raises:
        ValueError: missing, damaged, no pool, or keys of another one.
    """
    waves = _array(path, np.int16, 2)
    return waves, _array_beside(onsets_path(path), waves, np.uint8, 1)


def _array_beside(path: Path, waves: np.ndarray, dtype: type, axis: int) -> np.ndarray:
    """What lies beside the audio `waves` of a pool, with its frames along `axis`."""
    array = _array(path, dtype, 3)
    if len(array) != len(waves) or array.shape[axis] < waves.shape[1] // HOP:
        raise ValueError(f"{path}: is of another pool: {array.shape} beside audio of {waves.shape}; make it anew")
    return array


def _array(path: str | Path, dtype: type, axes: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is not a file of a pool of scripts.render_pool ({error})") from error
    if array.dtype != dtype or array.ndim != axes or not array.size:
        raise ValueError(f"{path}: holds {array.dtype} {array.shape}, but a pool has {np.dtype(dtype)} of {axes} axes")
    return array
