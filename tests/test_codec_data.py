# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Sound for the codec: batches are functions of the seed and their number, whoever prepares them; real recordings."""

import contextlib
import io
import itertools
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from scripts import render_pool
from scripts.audio.pianos import SourceError
from scripts.audio.recorded_audio import RecordedExcerpts
from scripts.audio.rendered_audio import RenderedExcerpts, codes_path, draws_of, onset_roll, onsets_path
from scripts.codec.data import CropBatches, StoredCrops, StoredExcerpts, coloured, first_waves, fixed_batch
from scripts.codec.pool_files import PoolFiles
from scripts.codec.recipe import CodecRecipe
from scripts.dataset.folder import midi_bytes
from scripts.training.processes import RunError
from tokenization import NOTE_DTYPE, MidiError, load_performance

RECIPE = CodecRecipe(crop_seconds=0.1, excerpt_seconds=0.4, mixed_excerpts=2, seed=3)


class Numbered:
    """Excerpt i of 0.4 s is the number i + 1 in every sample; only frame 0 of a crop of five has an onset."""

    def __getitem__(self, index):
        onsets = np.zeros((20, 88), np.uint8)
        onsets[::5, index % 88] = 64
        return {"wave": np.full(20 * 640, index + 1, np.int16), "onsets": onsets}


class Same:
    """Every excerpt is the same."""

    def __getitem__(self, index):
        return Numbered()[1000]


class Louder:
    """An excerpt whose samples grow from 1 to 12,800."""

    def __getitem__(self, index):
        return {"wave": np.arange(1, 12_801, dtype=np.int16), "onsets": np.zeros((20, 88), np.uint8)}


def take(batches, count, first=0):
    return list(itertools.islice(batches(first), count))


def numbers(batch):
    return (batch["input_values"][:, 0] * 32767).round().int().tolist()


@pytest.fixture
def pool(tmp_path):
    """Three excerpts of ten frames; an excerpt's and frame's number is its onsets' velocity, and its code."""
    path = tmp_path / "pool.npy"
    np.save(path, np.random.default_rng(0).integers(-30_000, 30_000, (3, 640 * 10), dtype=np.int16))
    onsets = np.zeros((3, 10, 88), np.uint8)
    onsets[..., 0] = np.arange(30).reshape(3, 10)
    np.save(onsets_path(path), onsets)
    np.save(codes_path(path, "0123456789abcdef"), np.arange(3 * 4 * 10, dtype=np.int16).reshape(3, 4, 10))
    return path


def test_stored_crops(pool):
    """Slices of the pool with their onsets, and their codes, from the lead on, where there are some."""
    waves, onsets = np.load(pool), np.load(onsets_path(pool))
    assert StoredCrops([pool], 0.08, 1)[5]["input_values"].shape == (2560,)
    assert "audio_codes" not in StoredCrops([pool], 0.08, 1)[0]
    with pytest.raises(ValueError, match=r"0123456789ab\.npy: holds codes, but of another codec"):
        StoredCrops([pool], 0.08, 1, "another codec")
    for lead in (0, 2):
        source = StoredCrops([pool], 0.08, 1, "0123456789abcdef", lead * 0.02)
        for item in (source[i] for i in range(3)):
            excerpt, frame = divmod(int(item["audio_codes"][0, lead]), 40)
            expected = waves[excerpt, 640 * frame : 640 * (frame + 4)] / np.float32(32767)
            assert np.allclose(item["input_values"], expected) and item["audio_codes"].shape == (4, lead + 4)
            assert np.array_equal(item["onsets"], onsets[excerpt, frame : frame + 4] / np.float32(127))
        begun = {int(source[i]["audio_codes"][0, lead]) % 40 for i in range(60)}
        assert begun == set(range(lead, 7))  # every place that has room
    other = StoredCrops([pool], 0.08, 2, "0123456789abcdef", 0.04)
    assert any(not np.array_equal(source[i]["input_values"], other[i]["input_values"]) for i in range(5))
    with pytest.raises(ValueError, match="shorter than a crop"):
        StoredCrops([pool], 0.16, 1, None, 0.06)
    with pytest.raises(ValueError, match=r"none\.npy: is not a file of a pool"):
        StoredCrops([pool.with_name("none.npy")], 0.08)
    for file, array, said in (
        (codes_path(pool, "0123456789abcdef"), np.zeros((3, 4, 9), np.int16), "is of another pool"),
        (onsets_path(pool), onsets[:2], "is of another pool"),
        (pool, waves.astype(np.float32), "holds float32 (3, 6400), but a pool has int16 of 2 axes"),
    ):
        np.save(file, array)
        with pytest.raises(ValueError, match=re.escape(f"{file}: {said}")):
            StoredCrops([pool], 0.08, 1, "0123456789abcdef")
    with pytest.raises(ValueError, match="holds float32"):
        StoredExcerpts([pool])


def test_every_other_crop_has_its_notes_as_played(pool):
    """Where there are codes of both kinds, about half of the crops are of each."""
    np.save(codes_path(pool, "0123456789abcdef", "played"), np.full((3, 4, 10), 999, np.int16))
    source = StoredCrops([pool], 0.08, 1, "0123456789abcdef")
    played = [bool((source[i]["audio_codes"] == 999).all()) for i in range(40)]
    assert 10 < sum(played) < 30 and played == [bool((source[i]["audio_codes"] == 999).all()) for i in range(40)]


def test_where_a_model_has_generated_codes_half_of_the_crops_have_them(pool):
    """Those and the ones with notes as played are told their keys, of the lead too; those as heard are not."""
    for kind, value in (("played", 999), ("generated", 888)):
        np.save(codes_path(pool, "0123456789abcdef", kind), np.full((3, 4, 10), value, np.int16))
    items = [StoredCrops([pool], 0.08, 1, "0123456789abcdef", 0.04)[i] for i in range(160)]
    kinds = [int(item["audio_codes"][0, 0]) for item in items]
    assert 65 < kinds.count(888) < 95 and 25 < kinds.count(999) < 55
    assert [bool(item["told"]) for item in items] == [kind >= 888 for kind in kinds]
    onsets = np.load(onsets_path(pool))
    for item in items:
        around = np.concatenate([item["lead_onsets"], item["onsets"]]) * np.float32(127)
        assert any(np.allclose(around, onsets[e, f : f + 6]) for e in range(3) for f in range(5))
    batch = next(CropBatches(StoredCrops([pool], 0.08, 1, "0123456789abcdef", 0.04), CodecRecipe(), 5)())
    assert batch["told"].dtype == torch.bool and batch["told"].shape == (5,)
    np.save(codes_path(pool, "0123456789abcdef", "means"), np.full((3, 12, 10), 0.5, np.float16))
    items = [StoredCrops([pool], 0.08, 1, "0123456789abcdef", 0.04)[i] for i in range(40)]
    assert [bool((item["means"] == 0.5).all()) for item in items] == [kind == 888 for kind in kinds[:40]]
    assert all(item["means"].shape == (12, 6) for item in items)
    for kind in ("played", "generated", "means"):
        codes_path(pool, "0123456789abcdef", kind).unlink()


def test_crops_of_several_pools(pool):
    """All are drawn from, and what lies beside a crop is of its own pool; so it is of whole excerpts."""
    other, sha256 = pool.with_name("other.npy"), "0123456789abcdef"
    np.save(other, -np.load(pool)[:2])
    np.save(onsets_path(other), np.load(onsets_path(pool))[:2] + 50)
    np.save(codes_path(other, sha256), np.load(codes_path(pool, sha256))[:2] + 500)
    waves, onsets, codes = {}, {}, {}
    for p, path in enumerate((pool, other)):
        waves[p], onsets[p], codes[p] = np.load(path), np.load(onsets_path(path)), np.load(codes_path(path, sha256))
    items, seen = StoredCrops([pool, other], 0.08, 1, sha256), set()
    for item in (items[i] for i in range(60)):
        first = int(item["audio_codes"][0, 0])
        p = int(first >= 500)
        e, frame = divmod(first - 500 * p, 40)
        span = slice(frame, frame + 4)
        assert np.array_equal(item["audio_codes"], codes[p][e, :, span])
        assert np.array_equal(item["onsets"], onsets[p][e, span] / np.float32(127))
        assert np.allclose(item["input_values"], waves[p][e, 640 * frame : 640 * frame + 2560] / np.float32(32767))
        seen.add((p, e))
    whole = StoredExcerpts([pool, other])
    assert len(seen) == len(whole) == 5
    for i, (p, e) in enumerate(sorted(seen)):
        assert np.array_equal(whole[i]["wave"], waves[p][e]) and np.array_equal(whole[i]["onsets"], onsets[p][e])


def test_what_just_fits(pool):
    """A crop of a whole excerpt, and a batch of whole ones; more keys than excerpts, or none at all, are refused."""
    crop, whole = StoredCrops([pool], 0.16, 1, None, 0.04)[0], fixed_batch(StoredExcerpts([pool]), 3, 0.2)
    assert crop["onsets"].shape == (8, 88) and whole["input_values"].shape == (3, 6400)
    for file, array, said in (
        (onsets_path(pool), np.zeros((4, 10, 88), np.uint8), "is of another pool"),
        (pool, np.zeros((0, 6400), np.int16), "holds int16"),
    ):
        np.save(file, array)
        with pytest.raises(ValueError, match=re.escape(f"{file}: {said}")):
            StoredCrops([pool], 0.08)


def test_pools_with_other_kinds_of_codes_do_not_go_together(pool, tmp_path):
    for path in (pool, onsets_path(pool)):
        shutil.copy(path, path.with_name(path.name.replace("pool", "other")))
    other = pool.with_name("other.npy")
    with pytest.raises(ValueError, match=r"other\.0123456789ab\.npy: is not there, but other pools have theirs"):
        StoredCrops([pool, other], 0.08, 1, "0123456789abcdef")
    np.save(codes_path(other, "0123456789abcdef"), np.load(codes_path(pool, "0123456789abcdef")))
    assert "audio_codes" in StoredCrops([pool, other], 0.08, 1, "0123456789abcdef")[0]


def test_crops_of_excerpts_are_mixed_and_none_is_given_twice():
    """A block of three excerpts (so that batches of six come out even) gives each of its twelve crops once."""
    batches = CropBatches(Numbered(), RECIPE, 6)
    assert (batches.excerpts, batches.crops, batches.batches_per_block) == (3, 4, 2)
    found, orders = take(batches, 6), set()
    for block in range(3):
        crops = numbers(found[2 * block]) + numbers(found[2 * block + 1])
        assert sorted(crops) == sorted([3 * block + i for i in (1, 2, 3)] * 4) and crops != sorted(crops)
        orders.add(tuple(crop - 3 * block for crop in crops))
    assert len(orders) == 3  # of each block its own
    other = take(CropBatches(Numbered(), replace(RECIPE, seed=4), 6), 2)
    assert [numbers(batch) for batch in other] != [numbers(batch) for batch in found[:2]]
    third = CodecRecipe(crop_seconds=0.4, excerpt_seconds=1.2)  # where 1.2 / 0.4 is a little less than 3
    assert CropBatches(Numbered(), third, 6).crops == 3
    for batch in found:
        assert batch["input_values"].shape == (6, 3200) and batch["onsets"].shape == (6, 5, 88)
        assert ((batch["onsets"] > 0).sum((1, 2)) == 1).all()  # cut where the wave is cut
        assert batch["onsets"][:, 0].argmax(1).tolist() == [n - 1 for n in numbers(batch)]


def test_any_beginning_and_any_number_of_workers_give_the_same(pool):
    recipe = CodecRecipe(crop_seconds=0.1, excerpt_seconds=0.4, mixed_excerpts=2, level_db=(-6, 6), noise_db=(-60, -40))
    for source in (Numbered(), StoredCrops([pool], 0.1, 3)):
        alone = take(CropBatches(source, recipe, 3), 9)
        for first, workers in ((1, 0), (4, 0), (5, 2), (8, 1)):
            again = take(CropBatches(source, recipe, 3, workers), 9 - first, first)
            for a, b in zip(alone[first:], again, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a)
        assert not torch.equal(alone[0]["input_values"], alone[1]["input_values"])


def test_processes_share_the_blocks_and_another_number_of_them_repeats_none():
    """Two processes do what one does, and three go on with what two have not begun."""
    alone = [numbers(b) for b in take(CropBatches(Numbered(), RECIPE, 4), 8)]
    pair = [[numbers(b) for b in take(CropBatches(Numbered(), RECIPE, 4, 0, r, 2), 4)] for r in range(2)]
    blocks = [[alone[2 * b], alone[2 * b + 1]] for b in range(4)]
    assert pair == [blocks[0] + blocks[2], blocks[1] + blocks[3]]
    used = {n for process in pair for batch in process[:3] for n in batch}
    base = CropBatches(Numbered(), RECIPE, 4, 0, 0, 2).next_base(3)
    assert base == 4  # block 3 has been begun
    later = {
        n for r in range(3) for b in take(CropBatches(Numbered(), RECIPE, 4, 0, r, 3, base), 2) for n in numbers(b)
    }
    assert not used & later and min(later) == 2 * base + 1


def test_processes_share_a_pool(pool):
    """Batch by batch in turns."""
    source = StoredCrops([pool], 0.08, 1)
    alone = take(CropBatches(source, RECIPE, 3), 6)
    for process in range(2):
        for mine, whole in zip(take(CropBatches(source, RECIPE, 3, 0, process, 2), 3), alone[process::2], strict=True):
            assert torch.equal(mine["input_values"], whole["input_values"])


def test_the_first_waves():
    """As many as are asked for, or a few more, of as many batches."""
    batches = CropBatches(Numbered(), RECIPE, 4)
    waves = first_waves(batches, 9)
    assert waves.shape == (12, 3200) and len(first_waves(batches, 8)) == 8
    assert torch.equal(waves, torch.cat([batch["input_values"] for batch in take(batches, 3)]))


def test_a_lead_is_what_sounds_before():
    """Crops begin after it, and its level follows theirs."""
    recipe = CodecRecipe(crop_seconds=0.1, excerpt_seconds=0.4, lead_seconds=0.2, mixed_excerpts=2, level_db=(-9, -3))
    batches = CropBatches(Louder(), recipe, 4)
    assert batches.crops == 2
    batch = next(batches())
    assert batch["lead"].shape == (4, 6400) and batch["input_values"].shape == (4, 3200)
    ramp = torch.cat([batch["lead"], batch["input_values"]], 1).double()
    ramp = ramp / ((ramp[:, -1:] - ramp[:, :1]) / 9599)
    torch.testing.assert_close(ramp - ramp[:, :1], torch.arange(9600.0).double().expand(4, -1), atol=0.01, rtol=0)
    assert sorted(set(ramp[:, 0].round().int().tolist())) == [1, 3201]
    noted = next(CropBatches(Numbered(), recipe, 4)())
    assert torch.equal(noted["lead_onsets"], noted["onsets"].repeat(1, 2, 1))  # struck every five frames, as in crops
    assert torch.equal(noted["onsets"].amax((1, 2)), torch.full((4,), 64 / 127))


def test_levels_and_noise(pool):
    """Gain within its bounds and never over full scale; noise of its level; not with codes, which would not follow."""
    quiet = Numbered()
    plain = next(CropBatches(quiet, RECIPE, 4)())["input_values"]
    recipe = CodecRecipe(crop_seconds=0.1, excerpt_seconds=0.4, mixed_excerpts=2, seed=3, level_db=(-20, -10))
    gains = 20 * (next(CropBatches(quiet, recipe, 4)())["input_values"] / plain)[:, 0].log10()
    assert ((gains > -20) & (gains < -10)).all() and gains.std() > 0.1
    others = CropBatches(Same(), replace(recipe, seed=4), 4), CropBatches(Same(), recipe, 4, 0, 1, 2)
    levels = [next(each())["input_values"][:, 0].tolist() for each in (CropBatches(Same(), recipe, 4), *others)]
    assert len(set(sum(levels, []))) == 12  # of each crop, seed and process its own
    loud = CodecRecipe(crop_seconds=0.1, level_db=(30, 31))
    assert next(CropBatches(StoredCrops([pool], 0.1), loud, 4)())["input_values"].abs().max() < 0.98
    noisy = CodecRecipe(crop_seconds=0.1, excerpt_seconds=0.4, mixed_excerpts=2, seed=3, noise_db=(-40, -40))
    noise = next(CropBatches(quiet, noisy, 4)())["input_values"] - plain
    assert 20 * noise.std().log10() == pytest.approx(-40, abs=0.3)
    noise = next(CropBatches(quiet, replace(noisy, noise_db=(-60.0, -40.0)), 4)())["input_values"] - plain
    assert 20 * noise.std(1).log10().min() > -60.3 and noise.std(1).log10().std() > 0.02
    led = replace(recipe, level_db=(30.0, 31.0), lead_seconds=0.2)  # the lead, which is softer, follows the crop
    assert next(CropBatches(Louder(), led, 4)())["input_values"].abs().max() == pytest.approx(0.97, rel=1e-3)
    bright = CodecRecipe(crop_seconds=0.1, colour_db=6.0, level_db=(30, 31))
    assert next(CropBatches(StoredCrops([pool], 0.1), bright, 4)())["input_values"].abs().max() < 0.98
    coded = StoredCrops([pool], 0.1, 0, "0123456789abcdef")
    with pytest.raises(ValueError, match="do not go with stored codes"):
        next(CropBatches(coded, loud, 4)())


def test_colours():
    """A tone comes out by what its frequency is given, in place; every crop has a colour of its own."""
    time = torch.arange(32_000) / 32_000
    levels = np.array([0, 0, 0, -20, 6, 0, 0, 0])
    places = 30 * 500 ** (np.array([3, 4, 3.5]) / 7)
    for hertz, level in zip(places.round(), (-20, 6, -7), strict=True):
        tone = torch.sin(2 * torch.pi * float(hertz) * time)
        assert torch.allclose(coloured(tone, levels), tone * 10 ** (level / 20), atol=0.01)
    assert torch.allclose(coloured(tone, np.zeros(8)), tone, atol=1e-5)
    source, settings = Numbered(), {"crop_seconds": 0.1, "excerpt_seconds": 0.4, "mixed_excerpts": 2, "seed": 3}
    plain, again, other = (
        next(CropBatches(source, CodecRecipe(**settings, colour_db=db), 4)())["input_values"] for db in (0.0, 4.0, 4.0)
    )
    gains = 20 * (again.mean(1) / plain.mean(1)).log10()
    assert torch.equal(again, other) and 1 < gains.std() < 12
    led = CodecRecipe(**settings | {"lead_seconds": 0.2}, colour_db=4.0)
    batch = next(CropBatches(Louder(), led, 4)())  # one filter over both: what goes on evenly has no step between them
    ends = torch.cat([batch["lead"][:, -3:], batch["input_values"][:, :3]], 1).diff()
    assert batch["lead"].shape == (4, 6400) and ends.abs().max() < 0.01


def test_a_pool_and_rendering_on_the_fly_are_the_same_sound(tiny_pack, tmp_path):
    source = RenderedExcerpts(tiny_pack / "midi", "train", [tiny_pack / "piano"], ["studio"], 1.0, 5)
    items = [source[i] for i in range(2)]
    np.save(tmp_path / "pool.npy", np.stack([item["wave"] for item in items]))
    np.save(onsets_path(tmp_path / "pool.npy"), np.stack([item["onsets"] for item in items]))
    rendered, stored = fixed_batch(source, 2, 0.5), fixed_batch(StoredExcerpts([tmp_path / "pool.npy"]), 2, 0.5)
    assert rendered["input_values"].shape == (2, 16_000) and rendered["onsets"].shape == (2, 25, 88)
    assert all(torch.equal(rendered[name], stored[name]) for name in rendered)
    with pytest.raises(ValueError, match="longer than the excerpts"):
        fixed_batch(source, 2, 1.5)


def test_held_out_excerpts_are_in_rooms_of_their_own(tiny_pack):
    """Of the same presets and the same seed, but not those that the training has heard."""
    folders = tiny_pack / "midi", [tiny_pack / "piano"], ["studio"], 1.0, 5
    found = [RenderedExcerpts(folders[0], split, *folders[1:]) for split in ("train", "validation", "test")]
    rooms = [[source.excerpt(draws_of(source.split, 5, i))[2]["room_seed"] for i in range(20)] for source in found]
    assert not set(rooms[0]) & set(rooms[1]) and rooms[1] == rooms[2]


def test_midi_that_cannot_be_used_is_said_once_and_another_drawn(tiny_pack, tmp_path, capfd):
    shutil.copytree(tiny_pack / "midi", tmp_path / "midi")
    source = RenderedExcerpts(tmp_path / "midi", "train", [tiny_pack / "piano"], ["studio"], 1.0, 5)
    (tmp_path / "midi" / "1.mid").write_bytes(b"no MIDI")
    found = [source.excerpt(np.random.default_rng(i))[2]["path"] for i in range(6)]
    assert set(found) == {"0.mid"} and capfd.readouterr().err.count("1.mid: not a MIDI file") == 1
    source = RenderedExcerpts(tmp_path / "midi", "train", [tiny_pack / "piano"], ["studio"], 1.0, 5)
    (tmp_path / "midi" / "0.mid").write_bytes(b"no MIDI")
    with pytest.raises(MidiError, match="midi: holds no MIDI file that can be used"):
        source[0]


def test_a_pool_that_cannot_be_rendered_is_refused_before_any_process_starts(tiny_pack, tmp_path, capsys):
    for midi, piano, said in (
        (tmp_path, "piano", "no MIDI file of split 'train'"),
        (tiny_pack / "midi", "none", "none"),
    ):
        more = ["--midi-root", str(midi), "--piano", str(tiny_pack / piano), "--output", str(tmp_path / "pool.npy")]
        assert render_pool.main(more) == 2
        assert said in capsys.readouterr().err and not list(tmp_path.glob("*.npy*"))


@pytest.fixture
def make_pool(tiny_pack, tmp_path, monkeypatch, capsys):
    """`make_pool("--seed", 1, ...)` -> exit code and what was said, for three excerpts of 1 s, rendered here."""

    @contextlib.contextmanager
    def here(processes, context, open_, arguments):
        open_(*arguments)
        yield SimpleNamespace(submit=lambda work, numbers: SimpleNamespace(result=lambda: work(numbers)))

    monkeypatch.setattr(render_pool, "EXCERPT_S", 1.0)
    monkeypatch.setattr(render_pool, "CHUNK", 1)
    monkeypatch.setattr(render_pool, "ProcessPoolExecutor", here)

    def run(*more):
        words = ["--midi-root", tiny_pack / "midi", "--piano", tiny_pack / "piano", "--room", "studio"]
        words += ["--hours", 3 / 3600, "--output", tmp_path / "pool.npy", *more]
        code, said = render_pool.main([str(word) for word in words]), capsys.readouterr()
        return code, said.out + said.err.splitlines()[-1] if said.err else said.out

    return run


def test_a_pool_goes_on_where_it_stopped(make_pool, interrupted_pool, tiny_pack, tmp_path, monkeypatch):
    """By an interrupt, or the death of a process; and is never replaced."""
    pool, advance, render = tmp_path / "pool.npy", PoolFiles.advance, render_pool._render_items

    def die(numbers):
        raise BrokenProcessPool

    with interrupted_pool():
        assert make_pool() == (130, "interrupted; start it again to go on: what is finished is kept")
    assert not pool.exists() and "(seed was 0, is 1)" in make_pool("--seed", 1)[1]
    done, sent = [], []
    monkeypatch.setattr(PoolFiles, "advance", lambda self, to: done.append(self.done) or advance(self, to))
    with monkeypatch.context() as patch:
        patch.setattr(render_pool, "_render_items", lambda n: sent.append((render if n.start < 2 else die)(n)))
        assert make_pool() == (2, "error: a process died (out of memory?); start again, what is finished is kept")
    assert sent == [None]  # the rest of anything long would be waited for, if its process died while it sends it
    assert make_pool()[0] == 0 and done == [1, 2]
    source = RenderedExcerpts(tiny_pack / "midi", "train", [tiny_pack / "piano"], ["studio"], 1.0)
    assert np.array_equal(np.load(pool), [source[i]["wave"] for i in range(3)])
    assert np.array_equal(np.load(onsets_path(pool)), [source[i]["onsets"] for i in range(3)])
    made = pool.stat().st_mtime_ns
    assert make_pool() == (0, f"{pool}: is done already\n")
    code, said = make_pool("--hours", 2 / 3600, "--split", "other")
    assert code == 2 and "(items was 3, is 2; split was train, is other); delete it and pool.state.json" in said
    (tmp_path / "pool.state.json").unlink()
    assert make_pool() == (2, f"error: {pool}: exists already; delete it, or give another --output")
    assert pool.stat().st_mtime_ns == made and done == [1, 2]
    for option, value in (("--hours", 0), ("--hours", "nan"), ("--hours", "inf"), ("--processes", 0), ("--seed", -1)):
        with pytest.raises(SystemExit):
            make_pool(option, value)


def test_a_pool_that_is_shorter_than_what_a_process_renders_at_a_time(make_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(render_pool, "CHUNK", 4)
    assert make_pool("--hours", 1e-9)[0] == 0 and np.load(tmp_path / "pool.npy").shape == (1, 32_000)


@pytest.mark.parametrize("where", ["submit", "advance"])
def test_who_is_interrupted_does_not_wait_for_its_processes(where, tiny_pack, tmp_path, monkeypatch):
    """They end with what they are rendering, wherever the interrupt falls."""
    submit, given = ProcessPoolExecutor.submit, []

    def slow(self, index):  # no rendering: a forked process of one that has had threads may hang in it
        if index:
            time.sleep(3)
            (tmp_path / f"rendered_{index}").touch()
        return {"wave": np.zeros(32_000, np.int16), "onsets": np.zeros((50, 88), np.uint8)}

    def stop(self, *work):
        given.append(work)
        if where == "advance" or len(given) == 3:
            raise KeyboardInterrupt
        return submit(self, *work)

    monkeypatch.setattr(RenderedExcerpts, "__getitem__", slow)
    monkeypatch.setattr(*((ProcessPoolExecutor, "submit") if where == "submit" else (PoolFiles, "advance")), stop)
    monkeypatch.setattr(render_pool, "EXCERPT_S", 1.0)
    monkeypatch.setattr(render_pool, "CHUNK", 1)
    fork = multiprocessing.get_context("fork")  # a new process would take seconds to import torch
    monkeypatch.setattr(render_pool.multiprocessing, "get_context", lambda _: fork)
    words = ["--midi-root", tiny_pack / "midi", "--piano", tiny_pack / "piano", "--room", "studio", "--processes", 2]
    words += ["--hours", 4 / 3600, "--output", tmp_path / "pool.npy"]
    assert render_pool.main([str(word) for word in words]) == 130
    assert not multiprocessing.active_children() and not list(tmp_path.glob("rendered_*"))


def test_the_files_of_a_pool(tmp_path, monkeypatch):
    """One process at a time; an interrupt between two names; files that are gone; a disk that is too small."""
    output, beside = tmp_path / "a.npy", tmp_path / "a.beside.npy"
    files = {output: ((2, 3), np.int16), beside: ((2,), np.uint8)}
    rows = [np.ones((2, 3)), np.ones(2)]
    with PoolFiles(files, {"seed": 0}) as pool:
        with pytest.raises(RunError, match="a.npy: another run is at work here"), PoolFiles(files, {"seed": 0}):
            pass
        with PoolFiles({tmp_path / "b.npy": ((1,), np.int16)}, {}):  # beside it, another
            pass
        pool.add(rows, 2)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr("os.replace", lambda old, new, name=os.replace: name(old, new) if new == beside else 1 / 0)
            pool.finish()
    assert beside.exists() and not output.exists()
    with PoolFiles(files, {"seed": 0}) as pool:
        assert pool.done == 2
        pool.finish()
    assert np.array_equal(np.load(output), rows[0]) and np.array_equal(np.load(beside), rows[1])
    state = tmp_path / "a.state.json"
    state.write_text(state.read_text().replace('"done": 2', '"done": 1'))
    with pytest.raises(RunError, match="a.npy: exists already"), PoolFiles(files, {"seed": 0}):
        pass
    output.unlink()
    for _ in range(2):  # begun anew, and not taken for done where that is interrupted
        with PoolFiles(files, {"seed": 0}) as pool:
            assert pool.done == 0
    state.write_text("{")
    with pytest.raises(RunError, match="a.state.json: is damaged"), PoolFiles(files, {"seed": 0}):
        pass
    with monkeypatch.context() as patch, pytest.raises(RunError, match="c.npy: its 2 MB cannot be written"):
        patch.setattr("os.posix_fallocate", lambda *_: os.open(tmp_path / "none" / "none", os.O_RDONLY))
        with PoolFiles({tmp_path / "c.npy": ((2, 500_000), np.int16)}, {}):
            pass
    assert not (tmp_path / ".c.npy.tmp").exists()
    codes_path(tmp_path / "d.npy", "0123456789abcdef", "played").touch()
    with PoolFiles({tmp_path / "f.npy": ((2,), np.int16)}, {}) as pool:
        pool.add([np.ones(1)], 1)
    (tmp_path / ".f.npy.tmp").write_bytes(b"")
    for name, items, said in (
        ("f.npy", 2, "f.npy: its 0 MB cannot be written"),
        ("d.npy", 1, r"d.0123456789ab.played.npy: is of an earlier d.npy; delete it"),
        ("e.npy", 10**300, "e.npy: its .* MB cannot be written"),
        ("runs", 1, "runs: is no name of a pool; give an --output that ends in .npy"),
    ):
        with pytest.raises(RunError, match=said), PoolFiles({tmp_path / name: ((items,), np.int16)}, {}):
            pass
    assert not list(tmp_path.glob(".[cde].*.tmp"))


# --- recordings


@pytest.fixture
def recording(tiny_pack, tmp_path):
    """A second and a half of rendered piano, stereo at 44.1 kHz, with its MIDI beside."""
    midi = tiny_pack / "midi" / "0.mid"
    shutil.copy(midi, tmp_path / "take.mid")
    noise = 0.1 * np.random.default_rng(0).standard_normal((round(1.5 * 44_100), 2))
    soundfile.write(tmp_path / "take.wav", noise, 44_100)
    return tmp_path, load_performance(midi).notes


def test_audio_files_with_and_without_notes(recording):
    folder, notes = recording
    item = RecordedExcerpts([folder], 1.5, seed=1)[0]
    assert item["wave"].shape == (48_000,) and item["wave"].dtype == np.int16 and item["has_notes"]
    assert np.array_equal(item["onsets"], onset_roll(notes, 75))
    (folder / "loud").mkdir()  # as recorders for cards name them
    for name in ("take.mid", "take.wav"):
        shutil.copy(folder / name, folder / "loud" / name.upper())
    assert RecordedExcerpts([folder / "loud"], 1.5, seed=1)[0]["has_notes"]
    (folder / "bare").mkdir()
    (folder / "take.wav").rename(folder / "bare" / "take.wav")
    found = RecordedExcerpts([folder], 2.0, seed=1)
    digests = {found.digest, RecordedExcerpts([folder], 2.0, seed=2).digest}
    assert len(digests) == 1
    (folder / "loud" / "TAKE.MID").write_bytes((folder / "take.mid").read_bytes() + b"\0")
    digests.add(RecordedExcerpts([folder], 2.0).digest)
    shutil.copy(folder / "bare" / "take.wav", folder / "bare" / "more.wav")
    digests.add(RecordedExcerpts([folder], 2.0).digest)
    assert len(digests) == 3
    bare = found[4]
    assert not bare["has_notes"] and not bare["onsets"].any()
    assert bare["wave"].shape == (64_000,) and not bare["wave"][48_010:].any() and bare["wave"][47_000:47_900].any()


def test_a_folder_of_recordings_is_looked_through_once(tmp_path, monkeypatch):
    """Not for each of its files: there may be ten thousand."""
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(32_000), 32_000)
    list_folder, listed = Path.iterdir, []
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or list_folder(path))
    source = RecordedExcerpts([tmp_path], 1.0)
    assert len([source[i] for i in range(9)]) == 9 and listed == [tmp_path]


def test_no_note_is_struck_behind_the_end_of_a_recording(recording):
    """Where its MIDI goes on, silence follows the audio: nothing that could be heard, or lost."""
    folder, notes = recording
    wave, rate = soundfile.read(folder / "take.wav")
    soundfile.write(folder / "take.wav", wave[: rate // 2], rate)
    data = {"bytes": (folder / "take.wav").read_bytes(), "path": None}
    row = {"audio": data, "midi": (folder / "take.mid").read_bytes()}
    pq.write_table(pa.Table.from_pylist([row]), folder / "0.parquet")
    assert onset_roll(notes, 75)[25:].any()
    for name in ("take.wav", "0.parquet"):
        item = RecordedExcerpts([folder / name], 1.5)[0]
        assert np.array_equal(item["onsets"][:25], onset_roll(notes, 75)[:25]) and not item["onsets"][25:].any()


def test_a_constant_part_of_a_recording_is_left_out(tmp_path):
    """Of a file and of a row: the processor takes it out of what the codec is given."""
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 96_000)
    data = io.BytesIO()
    soundfile.write(data, noise + 0.3, 32_000, format="FLAC")
    (tmp_path / "take.flac").write_bytes(data.getvalue())
    pq.write_table(pa.Table.from_pylist([{"audio": {"bytes": data.getvalue(), "path": None}}]), tmp_path / "0.parquet")
    for name in ("take.flac", "0.parquet"):
        wave = RecordedExcerpts([tmp_path / name], 2.0)[0]["wave"]
        assert abs(wave.mean()) < 30 and wave.std() == pytest.approx(0.1 / 3**0.5 * 32767, rel=0.02)


def test_shards(recording, tmp_path_factory):
    """Columns as `scripts.prepare_dataset --keep-audio` writes them, and `audio` with `midi`; no notes is no error."""
    folder, notes = recording
    data = io.BytesIO()
    soundfile.write(data, *soundfile.read(folder / "take.wav"), format="FLAC")
    sound = {"bytes": data.getvalue(), "path": None}
    prepared = {f"target_{field}": notes[field].tolist() for field in notes.dtype.names}
    columns = [{"target_audio": sound} | prepared, {"audio": sound, "midi": (folder / "take.mid").read_bytes()}]
    file = RecordedExcerpts([folder], 1.5)[0]
    for i, row in enumerate([*columns, {"prompt_audio": sound}]):
        shard = tmp_path_factory.mktemp("shards") / f"{i}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), shard)
        item = RecordedExcerpts([shard], 1.5)[0]
        assert np.abs(item["wave"] - file["wave"].astype(int)).max() <= 2 and bool(item["has_notes"]) == (i < 2)
        assert np.array_equal(item["onsets"], onset_roll(notes, 75) if i < 2 else np.zeros((75, 88)))
    for change, said in (
        ({"target_pitch": [109] * len(notes)}, "its key is on no piano"),
        ({"target_onset": [float("nan")] * len(notes)}, "times are not finite"),
        ({"target_velocity": [1]}, "target_velocity cannot be read as notes"),
        ({"target_velocity": [128] * len(notes)}, "its velocity above 127"),
    ):
        shard = shard.with_name(f"{next(iter(change))}_{len(said)}.parquet")
        pq.write_table(pa.Table.from_pylist([columns[0] | change]), shard)
        with pytest.raises(SourceError, match=f"{shard.name}, row 0, target_audio: .*{said}"):
            RecordedExcerpts([shard], 1.5)[0]


@pytest.mark.parametrize("kind", ["file", "shard"])
def test_an_excerpt_from_within_a_recording(kind, tmp_path):
    """Its notes are where they are heard: a click is of the height of its note's velocity."""
    places, samples = [1600 * i + 700 for i in range(200)], np.zeros(10 * 32_000)
    notes = np.array([(place / 32_000, 0.04, 60, 1 + i % 120) for i, place in enumerate(places)], NOTE_DTYPE)
    samples[places] = notes["velocity"] / 128
    soundfile.write(tmp_path / "a.wav", samples, 32_000)
    if kind == "file":
        (tmp_path / "a.mid").write_bytes(midi_bytes(notes))
    else:
        sound = {"bytes": (tmp_path / "a.wav").read_bytes(), "path": None}
        row = {"audio": sound} | {field: notes[field].tolist() for field in notes.dtype.names}
        (tmp_path / "a.wav").unlink()
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    source, starts = RecordedExcerpts([tmp_path], 1.0), set()
    for item in (source[i] for i in range(8)):
        heard = np.flatnonzero(item["wave"])
        frames, keys = item["onsets"].nonzero()
        assert len(heard) >= 19 and (keys == 60 - 21).all() and abs(len(heard) - len(frames)) <= 1
        starts.add(int(heard[0]))
        for frame, velocity in zip(frames, item["onsets"][frames, keys], strict=True):
            near = np.abs(item["wave"][max(640 * frame - 40, 0) : 640 * frame + 680]).max()
            assert near == pytest.approx(256 * int(velocity), abs=2) or frame in (0, 49)
    assert len(starts) > 5  # from anywhere


def test_every_row_of_a_shard_is_drawn_with_its_own_notes(tmp_path):
    rows = []
    for i in range(4):
        sound = io.BytesIO()
        soundfile.write(sound, (i + 1) / 8 * (-1.0) ** np.arange(32_000), 32_000, format="WAV")
        notes = {"onset": [0.5], "duration": [0.1], "pitch": [60 + i], "velocity": [80]}
        rows.append({"audio": {"bytes": sound.getvalue(), "path": None}} | notes)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    source, seen = RecordedExcerpts([tmp_path], 1.0), set()
    for item in (source[i] for i in range(40)):
        number = round(item["wave"][0] / 4096) - 1
        seen.add(number)
        assert item["onsets"].any(0).nonzero()[0].tolist() == [60 - 21 + number]
    assert seen == {0, 1, 2, 3}


def test_a_long_recording_counts_by_its_length(tmp_path):
    for name, seconds, level in (("long", 9.0, 0.5), ("short", 0.5, 0.1), ("one", 1.0, 0.1)):
        wave = level * (-1.0) ** np.arange(round(seconds * 32_000))
        soundfile.write(tmp_path / f"{name}.wav", wave, 32_000)
    source = RecordedExcerpts([tmp_path], 1.0)
    assert 40 < sum(source[i]["wave"].max() > 10_000 for i in range(60)) < 58  # 9 of 11, not 1 of 3


def test_recordings_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "._hidden.wav").write_bytes(b"as some systems put beside each file")
    with pytest.raises(SourceError, match=r"no \.wav, \.flac or \.parquet"):
        RecordedExcerpts([tmp_path], 1.0)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    with pytest.raises(SourceError, match=r"bad\.wav: cannot be read"):
        RecordedExcerpts([tmp_path], 1.0)
    soundfile.write(tmp_path / "bad.wav", np.zeros(0), 32_000)
    with pytest.raises(SourceError, match=r"bad\.wav: holds no samples; take it out"):
        RecordedExcerpts([tmp_path], 1.0)
    soundfile.write(tmp_path / "bad.wav", np.zeros(32_000), 32_000)
    (tmp_path / "bad.mid").write_bytes(b"no MIDI")  # it would be drawn after hours of learning
    with pytest.raises(SourceError, match=r"bad\.wav: the MIDI beside it cannot be used .bad\.mid: .*mend it, or take"):
        RecordedExcerpts([tmp_path], 1.0)
    (tmp_path / "bad.mid").unlink()
    for value, said in (
        ("x.wav", "column audio is string, not audio"),
        ({"bytes": None, "path": "x"}, "no audio; save"),
    ):
        pq.write_table(pa.Table.from_pylist([{"audio": value}]), tmp_path / "a.parquet")
        with pytest.raises(SourceError, match=said):
            RecordedExcerpts([tmp_path / "a.parquet"], 1.0)[0]
    with pytest.raises(SourceError, match="neither a folder nor one of"):
        RecordedExcerpts([tmp_path / "x.mp3"], 1.0)
