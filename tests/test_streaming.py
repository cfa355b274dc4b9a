# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Streams of shards: from a web server as from a folder, resumed on any number of ranks, and what is wrong is named."""

import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from scripts.dataset import shards
from scripts.dataset.folder import finish, write_shard
from scripts.dataset.shards import Shards, shard_names
from scripts.decoders import data
from scripts.decoders.data import DataError, TrainingStream, shard_files
from tests.range_server import serve
from tokenization import MidiValleTokenizer

ABOUT = {"codec_sha256": "0", "num_codebooks": 4, "codebook_size": 2048, "prompt_seconds": 1.0, "split": "train"}


def make_row(index, target_seconds, rng, audio_bytes=0, density=8):
    """An item of random notes and codes; `audio_bytes` of noise stand for kept audio."""
    row = {"id": index, "recording_id": "r", "piano": "", "room": "", "licence": "CC0", "midi_ids": [[1] * 6]}
    row["target_frames"] = round(target_seconds * 50)
    for part, seconds in (("prompt", 1.0), ("target", target_seconds)):
        count = round(seconds * density)
        row |= {f"{part}_source": "a.mid", f"{part}_start_s": 0.0, f"{part}_midi": b""}
        row[f"{part}_onset"] = np.sort(rng.uniform(0, seconds, count)).tolist()
        row[f"{part}_duration"] = rng.uniform(0.1, 0.5, count).tolist()
        row[f"{part}_pitch"] = rng.integers(21, 109, count).tolist()
        row[f"{part}_velocity"] = rng.integers(1, 128, count).tolist()
        row[f"{part}_codes"] = rng.integers(0, 2048, 4 * round(seconds * 50)).tolist()
        if audio_bytes:
            row[f"{part}_audio"] = {"bytes": rng.bytes(audio_bytes), "path": None}
    return row


def write(folder, sizes, lengths=(1.0,), audio_bytes=0, **changes):
    """Shards of these many rows, targets of lengths drawn from `lengths`, and their card."""
    folder.mkdir(exist_ok=True)
    rng, index = np.random.default_rng(0), 0
    about = ABOUT | {"target_seconds": max(lengths)} | ({"min_target_seconds": min(lengths)} if lengths[1:] else {})
    for name, size in zip(shard_names("train", len(sizes)), sizes, strict=True):
        rows = [make_row(index + i, float(rng.choice(lengths)), rng, audio_bytes) for i in range(size)]
        write_shard(folder / name, rows, bool(audio_bytes), about | changes, [])
        index += size
    finish(folder, [])
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return MidiValleTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 items of equal length in 6 shards."""
    return write(tmp_path_factory.mktemp("even") / "data", [8] * 6)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """60 items of 1, 1.5 or 2 s in 5 shards."""
    return write(tmp_path_factory.mktemp("uneven") / "data", [12] * 5, (1.0, 1.5, 2.0))


@pytest.fixture
def open_stream(folder, tokenizer):
    def make(source=folder, batch_size=2, block_shards=2, **options):
        files = shard_files(source, "train")
        return TrainingStream(files, tokenizer, batch_size, (0.5, 1.0), block_shards=block_shards, **options)

    return make


def take(stream, count):
    """Batches and the rows that they are made of."""
    found = []
    for _, batch in zip(range(count), stream):
        found.append((batch, [(file.rsplit("/", 1)[-1], row) for file, row in stream.last_rows]))
    return found


def same(a, b):
    return all(names == others and all(torch.equal(x[k], y[k]) for k in x) for (x, names), (y, others) in zip(a, b))


def rows_of(batches):
    return [name for _, names in batches for name in names]


def test_shards_without_rows(open_stream, tmp_path):
    """As where every item was skipped: nothing is missed, here and by `datasets` itself."""
    source = write(tmp_path / "data", [0, 3, 0, 0, 5])
    assert [len(Shards(shard_files(source, "train")).read([i])) for i in range(5)] == [0, 3, 0, 0, 5]
    assert len(set(rows_of(take(open_stream(source, 1), 8)))) == 8
    assert len(load_dataset(str(source), split="train")) == 8
    assert len(list(load_dataset(str(source), split="train", streaming=True))) == 8


def test_splits_whose_names_go_on_are_kept_apart(tmp_path):
    """By `datasets` too, which reads the card; a web server gives each by that, or by a card of before."""
    rng = np.random.default_rng(0)
    for split, size in (("jazz", 3), ("jazz-test", 5)):
        rows = [make_row(i, 1.0, rng, 0) for i in range(size)]
        write_shard(tmp_path / shard_names(split, 1)[0], rows, False, ABOUT | {"target_seconds": 1.0}, [])
    finish(tmp_path, [])
    assert [len(load_dataset(str(tmp_path), split=split)) for split in ("jazz", "jazz_test")] == [3, 5]
    card = tmp_path / "README.md"
    for text in (card.read_text(), card.read_text().replace("[0-9]" * 5, "*")):
        card.write_text(text)
        with serve(tmp_path) as server:
            for split in ("jazz", "jazz-test"):
                assert shard_files(server.url, split) == [f"{server.url}/{split}-00000-of-00001.parquet"]


# --- where the shards lie


def test_a_web_server_gives_what_a_folder_gives_and_little_is_fetched(open_stream, tmp_path):
    """Equal batches, by ranges; audio that was kept beside the codes is not fetched."""
    source = write(tmp_path / "data", [4, 4], audio_bytes=3_000_000)
    size = sum(file.stat().st_size for file in source.glob("*.parquet"))
    with serve(source) as server:
        from_web = take(open_stream(server.url), 4)
        sent = sum(count for name, count in server.sent if name.endswith(".parquet"))
    assert same(from_web, take(open_stream(source), 4))
    assert size > 48_000_000 and sent < size / 3


def test_a_dataset_of_the_hub_is_named_by_its_id(monkeypatch, tmp_path):
    """What is no folder here and looks like an id; with a revision; and no network is one sentence."""

    class Hub:
        def glob(self, pattern):
            if "offline" in pattern:
                raise RuntimeError("no network")
            digits = "[0-9]" * 5
            assert pattern == f"hf://datasets/user/name@v1/train-{digits}-of-{digits}.parquet"
            return [f"datasets/user/name@v1/{name}" for name in shard_names("train", 2)]

    monkeypatch.setattr(shards.fsspec, "filesystem", lambda protocol: {"hf": Hub()}[protocol])
    assert shard_files("user/name@v1", "train") == [
        "hf://datasets/user/name@v1/train-00000-of-00002.parquet",
        "hf://datasets/user/name@v1/train-00001-of-00002.parquet",
    ]
    with pytest.raises(DataError, match="user/offline: neither a folder here nor a dataset of the Hub .no network"):
        shard_files("user/offline", "train")
    with pytest.raises(DataError, match="no train-"):
        shard_files(tmp_path, "train")


def test_only_blocks_with_batches_to_give_are_read(open_stream, monkeypatch):
    """Going on in the last block of an epoch reads no earlier one."""
    read, plain = [], Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, shards: read.append(shards) or plain(self, shards))
    stream = open_stream()
    stream.load_state_dict({"epoch": 3, "position": 20, "seed": 0})
    take(stream, 3)
    assert read[0] == stream._blocks(3)[2][0] and len(read) <= 2


def test_what_is_missing_is_listed_before_the_first_step(open_stream, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    for number in (1, 4):
        (tmp_path / "data" / f"train-{number:05d}-of-00006.parquet").unlink()
    with pytest.raises(DataError, match=r"4 of 6 .*missing: train-00001-of-00006.parquet, train-00004-of-00006.parq"):
        open_stream(tmp_path / "data")
    with serve(tmp_path / "data") as server:
        with pytest.raises(DataError, match="2 of 6 shards cannot be used: .*train-00001-of-00006.parquet is missing;"):
            open_stream(server.url)
        with pytest.raises(DataError, match=r"README.md names no validation-\*.parquet"):
            shard_files(server.url, "validation")
        with pytest.raises(DataError, match="its README.md cannot be read"):
            shard_files(f"{server.url}/elsewhere", "train")


def test_damage_is_named_by_file_and_row(open_stream, folder, tmp_path):
    """A shard cut short, a byte that changed, codes that no codec has, half a frame, a note at no time, no rows."""
    source, name = tmp_path / "data", "train-00002-of-00006.parquet"

    def damaged(change):
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(folder, source)
        change(source / name)
        take(open_stream(source), 24)

    def edit(column, value, row=5):
        def change(path):
            table = pq.read_table(path)
            values = table[column].to_pylist()
            values[row] = value(values[row])
            index = table.schema.get_field_index(column)
            field = table.schema.field(index)
            pq.write_table(table.set_column(index, field, pa.array(values, field.type)), path)

        return change

    def flip(path):
        content = bytearray(path.read_bytes())
        footer = pq.read_metadata(path)
        column = footer.row_group(0).column(footer.num_columns - 1)
        begin = column.dictionary_page_offset or column.data_page_offset
        content[begin + column.total_compressed_size // 2] ^= 0xFF
        path.write_bytes(content)

    with pytest.raises(DataError, match=f"{name} is damaged or cut short"):
        damaged(lambda path: path.write_bytes(path.read_bytes()[:-100]))
    with pytest.raises(DataError, match=f"{name} is not of scripts.prepare_dataset"):
        damaged(lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata({}), path))
    with pytest.raises(DataError, match=f"{name}: cannot be read from row 0 on"):
        damaged(flip)
    with pytest.raises(DataError, match=f"{name}, row 5: a target code is outside 0 to 2047"):
        damaged(edit("target_codes", lambda codes: [*codes[:-1], 2048]))
    with pytest.raises(DataError, match=f"{name}, row 0: a prompt code is outside 0 to 2047"):
        damaged(edit("prompt_codes", lambda codes: [-1, *codes[1:]], row=0))
    with pytest.raises(DataError, match=f"{name}, row 5: prompt_codes are not 4 codebooks of one length"):
        damaged(edit("prompt_codes", lambda codes: codes[:-1]))
    with pytest.raises(DataError, match=f"{name}, row 5: target_onset is not finite"):
        damaged(edit("target_onset", lambda onsets: [float("nan"), *onsets[1:]]))
    with pytest.raises(DataError, match="holds no rows, in 2 shards"):
        open_stream(write(tmp_path / "empty", [0, 0]))


def test_a_shard_that_goes_away_during_the_run_is_named(open_stream, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    stream = open_stream(tmp_path / "data", block_shards=1)
    for file in stream.shards.files:
        Path(file).unlink()
    with pytest.raises(DataError, match=r"train-0000\d-of-00006.parquet: cannot be read from row 0 on"):
        next(iter(stream))


# --- order and resuming


def test_resumed_three_times_and_at_the_end_of_an_epoch(open_stream):
    """Every cut goes on with the same batches; the state is plain numbers."""
    whole = take(open_stream(), 60)
    assert sorted(set(rows_of(whole[:24]))) == sorted(rows_of(whole[:24]))  # an epoch: each row once
    assert len(rows_of(whole[:24])) == 48 and set(rows_of(whole[24:48])) == set(rows_of(whole[:24]))
    parts, state = [], None
    for count in (5, 19, 13, 23):  # 24 is the end of the first epoch
        stream = open_stream()
        if state:
            stream.load_state_dict(json.loads(state))
        parts += take(stream, count)
        state = json.dumps(stream.state_dict())
    assert same(parts, whole) and len(parts) == 60


def test_one_two_and_four_ranks_take_over_from_one_another(open_stream):
    """No row twice, none lost but fewer batches than ranks at the end of the epoch; batches are those of one rank."""
    whole, state, given = take(open_stream(), 24), None, []
    for world, count in ((1, 3), (2, 2), (4, 2), (3, 2), (1, 1), (4, 9)):
        ranks = [open_stream(rank=rank, world_size=world) for rank in range(world)]
        for stream in ranks:
            if state:
                stream.load_state_dict(state)
        taken = [take(stream, min(count, (24 - len(given)) // world)) for stream in ranks]
        given += [batch for group in zip(*taken, strict=True) for batch in group]
        assert len({json.dumps(stream.state_dict()) for stream in ranks}) == 1
        state = ranks[-1].state_dict()
    assert len(given) == 22 and same(given, whole)  # of the last two of 24 four ranks cannot all have one
    assert len(set(rows_of(given))) == 44
    ranks = [open_stream(rank=rank, world_size=4) for rank in range(4)]
    for stream in ranks:
        stream.load_state_dict(state)
        take(stream, 1)
        assert stream.state_dict() == {"epoch": 1, "position": 4, "seed": 0, "batch_size": 2, "by_frames": False}
    by_frames = open_stream(batch_frames=300)
    by_frames.load_state_dict(ranks[0].state_dict())  # frames are no rows: the epoch begins anew
    assert (by_frames.epoch, by_frames.position) == (1, 0)


def test_half_the_batch_on_twice_the_ranks_goes_on_with_the_same_rows(open_stream):
    whole = take(open_stream(batch_size=4), 12)
    stream = open_stream(batch_size=4)
    take(stream, 5)
    ranks = [open_stream(rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(stream.state_dict())
    halves = [take(rank, 7) for rank in ranks]
    for i in range(7):
        assert rows_of(whole[5 + i : 6 + i]) == rows_of([halves[0][i], halves[1][i]])


def test_rows_of_a_batch_are_of_one_length(open_stream, uneven):
    """Buckets: nothing is padded or cut, no row comes twice, less than a batch of each bucket and block is left out."""
    lengths = {}
    for name in shard_names("train", 5):
        frames = pq.read_table(uneven / name)["target_frames"].to_pylist()
        lengths |= {(name, row): count for row, count in enumerate(frames)}
    stream = open_stream(uneven, batch_size=3, no_prompt_share=1.0)
    total = sum(len(batches) for _, batches in stream._blocks(0))
    found = take(stream, total)
    for batch, names in found:
        assert {lengths[name] for name in names} == {batch["audio_codes"].shape[2]} and len(names) == 3
    assert stream.epoch == 0 and len(set(rows_of(found))) == 3 * total >= 60 - 2 * 3 * 3
    shapes = [batch["audio_codes"].shape[2] for batch, _ in found]
    assert set(shapes) == {50, 75, 100} and shapes != sorted(shapes)
    assert same(found, take(open_stream(uneven, batch_size=3, no_prompt_share=1.0), total))
    whole = open_stream(
        uneven, batch_size=50, block_shards=5, drop_last=False
    )  # as validation has it: more than of any length
    assert sorted(rows_of(take(whole, 3))) == sorted(lengths) and whole.epoch == 0


def test_batches_of_a_number_of_frames(open_stream, uneven):
    """As many rows as fit with the longest prompt of 50 frames; at least one."""
    sizes = {
        b["audio_codes"].shape[2]: len(n)
        for b, n in take(open_stream(uneven, batch_frames=400, no_prompt_share=1.0), 20)
    }
    assert sizes == {50: 4, 75: 3, 100: 2}
    assert {len(names) for _, names in take(open_stream(uneven, batch_frames=10), 20)} == {1}


def test_the_speed_of_a_stream(folder, capsys):
    assert data.main([str(folder), "--batches", "30", "--batch-size", "2"]) == 0
    assert float(capsys.readouterr().out.split(" times real time")[0]) > 0
    assert data.main([str(folder), "--split", "test"]) == 2
    assert "no test-*.parquet" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_thousand_samples_from_a_web_server(tokenizer, tmp_path, capsys):
    """Memory stays flat, and batches come faster than three times what the fastest training step here takes. Speed is
    by processor time, the server's included: another job on the machine changes nothing."""
    source, rng = tmp_path / "data", np.random.default_rng(0)
    source.mkdir()
    rows = [make_row(i, 4.0, rng) for i in range(64)]
    for name in shard_names("train", 40):
        rng.shuffle(rows)
        write_shard(source / name, rows, False, ABOUT | {"target_seconds": 4.0}, [])
    finish(source, [])
    peaks, begin = {}, time.process_time()
    with serve(source) as server:
        stream = TrainingStream(shard_files(server.url, "train"), tokenizer, 8)
        for samples, _ in zip(range(8, 10_001, 8), stream):
            if samples in (1000, 10_000):
                peaks[samples] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = 10_000 / (time.process_time() - begin)
    with capsys.disabled():
        told = ", ".join(f"{peak:.0f} MiB after {samples}" for samples, peak in peaks.items())
        print(f"\n{speed:.0f} samples a second, {4 * speed:.0f} times real time; peak memory {told}")
    assert stream.epoch == 3 and peaks[10_000] - peaks[1000] < 32
    assert 4 * speed > 3 * 250
