# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Training data from end to end: the same items however they are made, and batches in an order that can be resumed."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import queue
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, List, Value, load_dataset
from huggingface_hub import DatasetCard
from safetensors.torch import load_file, save_file
from symusic import ControlChange, Note, Score, Track

from modeling_midivalle import PianoEncodecConfig, PianoEncodecModel
from scripts import prepare_dataset, train
from scripts.audio.rendered_audio import list_midi
from scripts.audio.rooms import ROOM_NAMES
from scripts.dataset import folder as dataset_folder
from scripts.dataset.folder import midi_bytes
from scripts.dataset.paired_recordings import PairedRecordings
from scripts.dataset.recordings import DataArguments, RenderedRecordings
from scripts.decoders.data import DataError, TrainingStream, codes_of, dataset_info, notes_of, shard_files
from scripts.models.trained_parts import codec_hash, load_part
from scripts.unfinished import WriteError
from tokenization import NOTE_DTYPE, MidiError, MidiValleTokenizer, load_performance

RATE = 32_000


def tables(folder, split="train"):
    return [pq.read_table(path) for path in shard_files(folder, split)]


@pytest.fixture(scope="module")
def tokenizer():
    return MidiValleTokenizer()


def batches(files, tokenizer, count, **options):
    stream = TrainingStream(files, tokenizer, 2, (0.5, 1.0), **options)
    return [batch for batch, _ in zip(stream, range(count), strict=False)]


def equal(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


# --- making


def test_two_processes_make_what_one_makes_and_a_stopped_run_goes_on(tiny_data, prepare_command, tmp_path):
    """Only missing shards are made; what is made equals the data of one process in one go."""
    kept = tiny_data / "train-00001-of-00003.parquet"
    shutil.copy2(kept, tmp_path)
    changed = (tmp_path / kept.name).stat().st_mtime_ns
    assert prepare_command(tmp_path, "--processes", 2) == 0
    assert (tmp_path / kept.name).stat().st_mtime_ns == changed
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "skipped.jsonl").exists()
    for a, b in zip(tables(tiny_data), tables(tmp_path), strict=True):
        assert a.equals(b) and a.schema.metadata == b.schema.metadata


def test_what_an_item_holds(tiny_data, tiny_pack):
    rows = [row for table in tables(tiny_data) for row in table.to_pylist()]
    assert [row["id"] for row in rows] == list(range(8))
    assert dataset_info(shard_files(tiny_data, "train")) == {
        "codec_sha256": codec_hash(tiny_pack / "codec"),
        "num_codebooks": 4,
        "codebook_size": 2048,
        "prompt_seconds": 1.0,
        "target_seconds": 1.0,
        "split": "train",
    }
    for row in rows:
        assert row["room"] in ("dry_close", "studio") and row["piano"] == "piano"
        assert row["recording_id"].startswith(f"piano/{row['room']}/")
        for part in ("prompt", "target"):
            assert codes_of(row, part, 4).shape == (4, 50)
            notes = notes_of(row, part)
            assert (notes["onset"] < 1).all() and (notes["onset"] + notes["duration"] > 0).all()
            assert row[f"{part}_source"] in ("0.mid", "1.mid")
    assert len({row["recording_id"] for row in rows}) == 8
    for row in (row for table in tables(tiny_data, "validation") for row in table.to_pylist()):
        assert row["prompt_source"] != row["target_source"]  # what users bring: another piece


def test_codes_are_those_of_the_audio(tiny_pack):
    """A target is encoded inside running music: its codes equal that stretch of the codes around it."""
    data = DataArguments("train", 1.0, 1.0, 0, keep_audio=True)
    recordings = RenderedRecordings(tiny_pack / "midi", "train", [str(tiny_pack / "piano")], ["studio"], 0)
    codec = PianoEncodecModel.from_pretrained(tiny_pack / "codec").eval()
    ((row,), _) = prepare_dataset.make_rows(recordings, range(5, 6), data, codec)
    prompt, target, _ = recordings.draw(5, data)
    around = codec.encode_codes(torch.from_numpy(target.wave)[None, None])[0].numpy()
    assert np.array_equal(codes_of(row, "target", 4), around[:, 50:100])
    for name, wave in (("prompt", prompt.wave), ("target", target.wave[RATE : 2 * RATE])):
        kept, rate = soundfile.read(io.BytesIO(row[f"{name}_audio"]["bytes"]), dtype="float32")
        assert rate == RATE and np.abs(kept - wave).max() <= 2**-15


def test_a_folder_of_one_piece_gives_its_own_prompts(write_midi, tiny_pack, tmp_path):
    write_midi(tmp_path / "only.mid")
    recordings = RenderedRecordings(tmp_path, "validation", [str(tiny_pack / "piano")], ["studio"], 0, False)
    prompt, target, _ = recordings.draw(0, DataArguments("validation", 1.0, 1.0, 0, keep_audio=False))
    assert prompt.source == target.source == "only.mid"


def test_a_target_is_not_in_its_own_prompt(write_midi, tiny_pack, tmp_path):
    """Where both are of one piece: the prompt would tell what is to be played."""
    write_midi(tmp_path / "only.mid", seconds=8.0)
    recordings = RenderedRecordings(tmp_path, "validation", [str(tiny_pack / "piano")], ["studio"], 0, False)
    for index in range(20):
        prompt, target, _ = recordings.draw(index, DataArguments("validation", 2.0, 3.0, 0, keep_audio=False))
        assert target.start >= prompt.start + 2 or target.start + 3 <= prompt.start


def test_a_prompt_tells_how_loud_a_velocity_is(tiny_pack, tmp_path):
    """The soft piece is as much softer than the loud one as it was played, whichever of them is the prompt."""
    (tmp_path / "midi").mkdir()
    for name, velocity in (("soft", 40), ("loud", 100)):
        played = np.array([(0.25 * i, 0.5, 60 + i % 5, velocity) for i in range(32)], NOTE_DTYPE)
        (tmp_path / "midi" / f"{name}.mid").write_bytes(midi_bytes(played))
    recordings = RenderedRecordings(
        tmp_path / "midi", "validation", [str(tiny_pack / "piano")], ["dry_close"], 0, hold_out=False
    )
    seen = set()
    for index in range(6):
        parts = recordings.draw(index, DataArguments("validation", 3.0, 3.0, 0, keep_audio=False))[:2]
        level = {part.source: 20 * np.log10(part.wave[RATE : 3 * RATE].std()) for part in parts}
        assert 12 < level["loud.mid"] - level["soft.mid"] < 24  # 16.7 dB by the velocity law; few layers are darker
        seen.add(parts[0].source)
    assert len(seen) == 2


def test_notes_without_the_pedal(prepare_here, write_piano, tiny_pack, tokenizer, tmp_path):
    """`--sustain ignore`: the notes last as long as their keys; what sounds has its pedal, and who learns knows."""
    for name in ("a", "b"):
        score = Score(480, ttype="second")
        track = Track(ttype="second")
        for i in range(8):
            track.notes.append(Note(0.3 * i, 0.1, 60 + 2 * (i % 4), 80, ttype="second"))
        track.controls.append(ControlChange(0.0, 64, 127, ttype="second"))
        score.tracks.append(track)
        (tmp_path / "midi").mkdir(exist_ok=True)
        score.to("tick").dump_midi(tmp_path / "midi" / f"{name}.mid")
    found = {}
    for mode in ("extend", "ignore"):
        for split in ("train", "validation"):
            source = ["--midi-root", tmp_path / "midi", "--piano", tiny_pack / "piano", "--items", 2, "--keep-audio"]
            prepare_here(tmp_path / mode, *source, "--split", split, "--sustain", mode)
        found[mode] = [row for table in tables(tmp_path / mode) for row in table.to_pylist()]
        info = dataset_info(shard_files(tmp_path / mode, "train"))
        assert info.get("sustain", "extend") == mode
    for pedalled, plain in zip(*found.values(), strict=True):
        assert pedalled["target_audio"] == plain["target_audio"]
        struck = np.array(plain["target_onset"]) >= 0
        assert np.allclose(np.array(plain["target_duration"])[struck], 0.1, atol=2e-3)
        assert max(pedalled["target_duration"]) > 0.3
    (tmp_path / "recipe.yaml").write_text("preset: tiny\nbatch_size: 2\nsteps: 1\nbf16: false\n")
    command = ["--config", tmp_path / "recipe.yaml", "--part", "ar", "--data", tmp_path / "ignore"]
    command += ["--codec", tiny_pack / "codec", "--output-dir", tmp_path / "run"]
    assert train.main([*map(str, command)]) == 0
    assert MidiValleTokenizer.from_pretrained(tmp_path / "run" / "model").sustain == "ignore"


def test_a_file_in_an_archive_is_named(tmp_path):
    (tmp_path / "empty.mid").write_bytes(b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk\0\0\0\4\0\xff\x2f\0")
    with tarfile.open(tmp_path / "c.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "empty.mid", "c/empty.mid")
    (tmp_path / "empty.mid").unlink()
    columns = "path,split,duration_s,composition_id,licence,source"
    (tmp_path / "manifest.csv").write_text(f"{columns}\nc/empty.mid,train,5,a,CC0,c\n")
    with pytest.raises(MidiError, match="c/empty.mid: "):
        list_midi(tmp_path, "train")[0].load(str(tmp_path))


def test_the_codec_hash_is_of_what_decides_the_codes(tiny_pack, tmp_path):
    shutil.copytree(tiny_pack / "codec", tmp_path / "codec")
    path, hashes = tmp_path / "codec" / "model.safetensors", [codec_hash(tiny_pack / "codec")]
    for name in ("decoder.layers.0.conv.bias", "encoder.layers.0.conv.bias", "quantizer.layers.3.codebook.embed"):
        tensors = load_file(path)
        tensors[name] = tensors[name] + 1
        save_file(tensors, path)
        hashes.append(codec_hash(tmp_path / "codec"))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    halves = {name: value.half() for name, value in load_file(path).items()}
    for stored in (halves, {name: value.float() for name, value in halves.items()}):  # the same codes
        save_file(stored, path)
        hashes.append(codec_hash(tmp_path / "codec"))
    assert hashes[-1] == hashes[-2]
    save_file({name: value.bfloat16() for name, value in halves.items()}, path)  # numpy has no such numbers
    assert codec_hash(tmp_path / "codec") not in hashes


def test_a_whole_model_is_as_good_as_its_codec(make_model, tmp_path):
    """Its folder, in shards or not, has the hash and the weights of its codec saved alone."""
    model = make_model()
    model.codec.save_pretrained(tmp_path / "codec")
    model.save_pretrained(tmp_path / "whole", max_shard_size="200KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    assert codec_hash(tmp_path / "whole") == codec_hash(tmp_path / "codec")
    wave = torch.randn(1, 1, 6400, generator=torch.Generator().manual_seed(0))
    codes = [load_part("codec", tmp_path / name).eval().encode_codes(wave) for name in ("whole", "codec")]
    assert torch.equal(*codes)


def test_bad_codecs_are_one_sentence(tiny_pack, prepare_command, tmp_path, monkeypatch, capsys):
    """A missing codec, and one with a damaged configuration: exit code 2, before any process is started."""
    monkeypatch.setattr(prepare_dataset, "_make", None)
    (tmp_path / "file").write_text("mine")
    assert prepare_command(tmp_path / "file") == 2
    assert "file: is not a folder; give another --output-dir" in capsys.readouterr().err
    assert prepare_command(tmp_path / "out", "--codec", tmp_path / "none") == 2
    assert "none: no such folder, and not a Hub id" in capsys.readouterr().err and not (tmp_path / "out").exists()
    shutil.copytree(tiny_pack / "codec", tmp_path / "codec")
    (tmp_path / "codec" / "config.json").write_text('{"model_type": "piano_encodec", "upsampling_ratios": "no"}')
    assert prepare_command(tmp_path / "out", "--codec", tmp_path / "codec") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'codec'}: no model can be loaded (") and said.count("\n") == 1


@pytest.mark.parametrize(
    "fails, said",
    [
        (lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")), "No space left on device"),
        (lambda *_: os._exit(1), "a process died (see above; out of memory?); start again, finished shards are kept"),
    ],
)
def test_a_process_that_fails_ends_all_with_one_sentence(fails, said, prepare_command, tmp_path, monkeypatch, capsys):
    """No endless waiting, and no half a shard. (Forked, for a new process takes seconds to import torch.)"""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(prepare_dataset.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(prepare_dataset, "write_shard", fails)
    assert prepare_command(tmp_path, "--processes", 2) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].endswith(said) and not list(tmp_path.glob("*.parquet"))


def test_the_sources_are_looked_through_once(prepare_command, tiny_data, tmp_path, monkeypatch):
    """Not again by each process: to read all MIDI of a large folder takes minutes. (Forked, as above.)"""
    fork, look, looking = multiprocessing.get_context("fork"), prepare_dataset._recordings, []
    monkeypatch.setattr(prepare_dataset.multiprocessing, "get_context", lambda _: fork)

    def look_once(*given):
        looking.append(os.getpid())
        assert looking == [os.getpid()], "looked through again"
        return look(*given)

    monkeypatch.setattr(prepare_dataset, "_recordings", look_once)
    assert prepare_command(tmp_path) == 0
    assert all(a.equals(b) for a, b in zip(tables(tiny_data), tables(tmp_path), strict=True))


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    """pyarrow names none."""

    def fails(*_, **__):
        raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    monkeypatch.setattr(dataset_folder.pq, "ParquetWriter", fails)
    with pytest.raises(WriteError, match=r"a.parquet: cannot be written \(No space left on device\); make room"):
        dataset_folder.write_shard(tmp_path / "a.parquet", [], False, {}, [])
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_shards_is_refused(in_this_process, prepare_command, tiny_data, tmp_path, capsys):
    """Of the same split with other settings, in other numbers, damaged; of another split with other columns."""
    for file in tiny_data.glob("train-*"):
        shutil.copy2(file, tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}

    def refused(*more):
        assert prepare_command(tmp_path, *more) == 2
        return capsys.readouterr().err.splitlines()[-1]

    first = tmp_path / "train-00000-of-00003.parquet"
    assert refused("--seed", 1).endswith(
        f"{first}: was made with other settings (seed was 0, is 1); give another --output-dir"
    )
    assert "(items was 8, is 12; shards was 3, is 4)" in refused("--items", 12)
    assert "prompt_seconds was 1.0, is 0.5" in refused("--prompt-seconds", 0.5)
    assert "rooms was ['dry_close', 'studio'], is ['dry_close', 'studio', 'church']" in refused("--room", "church")
    assert "(keep_audio was False, is True)" in refused("--split", "other", "--keep-audio")
    for split in ("train", "other"):  # the pedals' notes, of which shards say nothing
        assert "(sustain was extend, is ignore)" in refused("--split", split, "--sustain", "ignore")
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    table = pq.read_table(first)  # a shard of earlier versions tells less
    metadata = {name: value for name, value in table.schema.metadata.items() if name != b"settings"}
    pq.write_table(table.replace_schema_metadata(metadata), first)
    said = refused()
    assert f"{first}: is of an earlier version, which does not tell its items, keep_audio, midi_sha256" in said
    assert "pianos, rooms, seed, so that others may not go with it; give another --output-dir" in said
    assert prepare_command(tmp_path, "--split", "other", "--items", 1) == 0  # of the same codec: more need not be known
    first.write_bytes(b"")
    assert f"{first} is damaged or cut short" in refused() and "delete it, and it is made anew" in refused()


def test_settings_know_what_files_hold(write_midi, write_piano, tiny_pack, tmp_path):
    """MIDI beside a manifest or in an archive, a piano as folder, tar or font, pairs: same names, other content."""
    write_piano(tmp_path / "piano", seconds=0.1)
    (tmp_path / "piano.tar").write_bytes(b"one")
    (tmp_path / "font.sf2").write_bytes(b"one")
    write_midi(tmp_path / "a.mid", 0)
    write_midi(tmp_path / "b.mid", 0)
    (tmp_path / "b.wav").write_bytes(b"one")
    pianos = [str(tmp_path / name) for name in ("piano", "piano.tar", "font.sf2:3", "none")]

    def settings():
        rendered = RenderedRecordings(tmp_path, "train", pianos, ["studio"], 0, hold_out=False).settings
        assert [name.split()[0] for name in rendered["pianos"]] == ["piano", "piano.tar", "font.sf2:3", "none"]
        return rendered["midi_sha256"], *rendered["pianos"], PairedRecordings(tmp_path, 0).settings["pairs_sha256"]

    def archived():
        return RenderedRecordings(tmp_path / "packed", "train", pianos, ["studio"], 0).settings["midi_sha256"]

    before = settings()
    assert settings() == before
    for change, places in (
        (lambda: (tmp_path / "piano" / "060_127.wav").write_bytes(b"other"), {1}),
        (lambda: (tmp_path / "piano.tar").write_bytes(b"two"), {2}),
        (lambda: (tmp_path / "font.sf2").write_bytes(b"two"), {3}),
        (lambda: write_midi(tmp_path / "a.mid", 1), {0}),
        (lambda: write_midi(tmp_path / "b.mid", 1), {0, 5}),
        (lambda: (tmp_path / "b.wav").write_bytes(b"three"), {5}),
    ):
        change()
        assert {i for i, (old, new) in enumerate(zip(before, settings(), strict=True)) if old != new} == places
        before = settings()
    (tmp_path / "packed").mkdir()
    columns = "path,split,duration_s,composition_id,licence,source"
    (tmp_path / "packed" / "manifest.csv").write_text(f"{columns}\nc/a.mid,train,5,a,CC0,c\n")
    found = {archived()}
    for content in (b"one", b"two"):
        (tmp_path / "packed" / "c.tar.xz").write_bytes(content)
        found.add(archived())
    assert len(found) == 3


# --- real recordings


@pytest.fixture
def pairs(tiny_pack, write_midi, tmp_path):
    """Five seconds of noise at 44.1 kHz, stereo, with a MIDI, and half a second that is too short for an item."""
    write_midi(tmp_path / "long.mid", 7, seconds=5.0)
    noise = 0.2 * np.random.default_rng(0).standard_normal((round(5 * 44_100), 2))
    soundfile.write(tmp_path / "long.flac", np.clip(noise, -1, 1), 44_100)
    soundfile.write(tmp_path / "short.wav", noise[:22_050], 44_100)
    with open(tmp_path / "pairs.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["audio", "midi", "recording_id", "licence", "split"])
        table.writerow(["long.flac", "long.mid", "hall", "CC0", "train"])
        table.writerow(["short.wav", "long.mid", "", "", "train"])
    return tmp_path / "pairs.csv"


def test_pairs_from_end_to_end(prepare_here, pairs, tmp_path):
    """Items of the recording; those of the one that is too short are counted and listed with the reason."""
    output = tmp_path / "data"
    counts = prepare_here(output, "--keep-audio", "--pairs", pairs)
    rows = [row for table in tables(output) for row in table.to_pylist()]
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert rows and skipped and len(rows) + len(skipped) == 8
    assert [len(rows), len(skipped)] == [sum(column) for column in zip(*counts, strict=True)]
    assert all(row["reason"].startswith("short.wav: 0.5 s, but an item needs 2.0 s") for row in skipped)
    for row in rows:
        assert (row["recording_id"], row["licence"], row["target_source"]) == ("hall", "CC0", "long.mid")
        assert abs(row["target_start_s"] - row["prompt_start_s"]) >= 1.0  # the prompt comes from elsewhere
        assert codes_of(row, "target", 4).shape == (4, 50)
        assert len(soundfile.read(io.BytesIO(row["target_audio"]["bytes"]))[0]) == RATE


def test_names_that_are_not_utf8(prepare_here, write_midi, tiny_pack, tmp_path):
    """As old archives leave them on disk: soundfile opens none, so such pairs are left out; of MIDI they are told as
    far as parquet can hold them."""
    midi = Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/M\xe9lodie.mid"))
    midi.parent.mkdir()
    write_midi(midi)
    prepare_here(tmp_path / "out", "--midi-root", midi.parent, "--split", "train", "--piano", tiny_pack / "piano")
    rows = [row for table in tables(tmp_path / "out") for row in table.to_pylist()]
    assert len(rows) == 8 and {row["target_source"] for row in rows} == {"M?lodie.mid"}
    midi.with_suffix(".wav").touch()
    with pytest.raises(MidiError, match=r"no MIDI of a pair can be used \(its name is not UTF-8; rename it and its"):
        PairedRecordings(midi.parent, 0)
    write_midi(midi.with_name("a.mid"))
    midi.with_name("a.wav").touch()
    (left_out,) = PairedRecordings(midi.parent, 0).excluded
    assert left_out["reason"] == "its name is not UTF-8; rename it and its audio"


def test_corrected_levels_are_told(in_this_process, prepare_here, prepare_command, pairs, tiny_pack, tmp_path, capsys):
    """By each row and by the card; splits of other levels do not go with them. What is rendered has none to correct."""
    folder, pairs = tmp_path / "data", ["--pairs", str(pairs)]
    with open(tmp_path / "pairs.csv", "a") as f:
        f.write("long.flac,long.mid,hall,CC0,other\n")
    soundfile.write(tmp_path / "long.flac", 1e-3 * np.random.default_rng(0).standard_normal(5 * RATE), RATE)
    prepare_here(folder, *pairs, "--correct-level")
    rows = list(load_dataset(str(folder), split="train", streaming=True))
    gains = {row["recording_id"]: row["gain_db"] for row in rows}
    assert rows and gains["hall"] > 10
    assert "| `gain_db` | by which both windows" in (folder / "README.md").read_text()
    command = ["--codec", str(tiny_pack / "codec"), "--output-dir", str(folder), "--split", "other", *pairs]
    assert prepare_dataset.main(command) == 2 and "(correct_level was True, is False)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare_command(tmp_path / "new", "--correct-level")
    assert "--correct-level and --correct-offset are for --pairs" in capsys.readouterr().err


def test_corrected_offsets_are_told(in_this_process, prepare_here, pairs, tiny_pack, tmp_path, capsys):
    """By each row and the card; what is too far off is listed. Uncorrected ones are warned of, and learned from."""
    rng = np.random.default_rng(0)
    notes = [(onset, 0.2, rng.integers(45, 80), 80) for onset in np.sort(rng.uniform(0.2, 5.5, 30))]
    (tmp_path / "long.mid").write_bytes(midi_bytes(np.array(notes, NOTE_DTYPE)))
    for name, late in (("long.flac", 0.1), ("short.wav", 0.6)):
        wave, time = np.zeros(8 * RATE), np.arange(RATE) / RATE
        for onset, pitch in [note[::2] for note in notes]:
            tone = np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * time) * np.exp(-8 * time)
            wave[round((onset + late) * RATE) :][:RATE] += 0.02 * tone
        soundfile.write(tmp_path / name, wave, RATE)
    folder = tmp_path / "data"
    prepare_here(folder, "--pairs", pairs, "--correct-offset")
    rows = [row for table in tables(folder) for row in table.to_pylist()]
    assert rows and all(row["offset_s"] == pytest.approx(0.1, abs=0.02) and "gain_db" not in row for row in rows)
    assert "| `offset_s` | by which the notes were moved" in (folder / "README.md").read_text()
    skipped = [json.loads(line)["reason"] for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert skipped and all(said.startswith("short.wav: ") and "too much to be corrected" in said for said in skipped)
    command = ["--codec", str(tiny_pack / "codec"), "--pairs", str(pairs), "--items", "1"]
    command += ["--prompt-seconds", "1", "--target-seconds", "1"]
    for more in ([], ["--correct-offset"]):
        prepare_dataset.main([*command, *more, "--output-dir", str(tmp_path / f"other{len(more)}")])
        said = capsys.readouterr().err
        begun = "warning: of 2 recordings looked at, 2 not in time with the MIDI (long.flac: the recording is " in said
        ended = "which is too much to be corrected; move one of them): --correct-offset moves such MIDI or" in said
        assert (begun, ended) == (not more, not more)


def test_a_window_of_a_recording_is_its_audio(pairs, write_midi, tmp_path):
    """At 32 kHz mono nothing is resampled: a window is a slice of the file, silent where the file has ended."""
    ramp = np.arange(3 * RATE, dtype=np.float64) / 2**20 * (-1.0) ** np.arange(3 * RATE)  # without a constant part
    soundfile.write(tmp_path / "ramp.wav", ramp, RATE, subtype="FLOAT")
    (tmp_path / "ramp.csv").write_text("audio,midi\nramp.wav,long.mid\n")
    recordings, data = PairedRecordings(str(tmp_path / "ramp.csv"), 3), DataArguments("train", 1.0, 1.0, 3, False)
    for index in range(12):
        data.target_seconds = 1.0 if index < 6 else 1.9  # there is little room for the prompt then
        prompt, target, about = recordings.draw(index, data)
        end = target.start + data.target_seconds
        assert 0 <= prompt.start <= target.start - 1 or end <= prompt.start <= 2
        assert about["recording_id"] == "ramp.wav" and about["licence"] == "unknown"
        start = round(prompt.start * RATE)
        assert np.allclose(prompt.wave, ramp[start : start + RATE], atol=1e-6)
        first = round((target.start - 1.0) * RATE)
        padded = np.concatenate([np.zeros(RATE), ramp, np.zeros(RATE)])[first + RATE :][: len(target.wave)]
        assert np.allclose(target.wave, padded, atol=1e-6)
        assert len(target.wave) == round((data.target_seconds + 1.5) * RATE)


def test_bad_pairs(pairs, tmp_path):
    with pytest.raises(MidiError, match="expected columns audio, midi.*between commas; found wave, score"):
        (tmp_path / "bad.csv").write_text("wave,score\na,b\n")
        PairedRecordings(str(tmp_path / "bad.csv"), 0)
    (tmp_path / "bad.csv").write_bytes(b"audio,midi\n" + 9_999 * b"a" + b",\xff\n")
    with pytest.raises(MidiError, match="bad.csv: cannot be read as a table; save it as csv in UTF-8, or give"):
        PairedRecordings(str(tmp_path / "bad.csv"), 0)
    text = (tmp_path / "pairs.csv").read_text()
    (tmp_path / "marked.csv").write_text(text, encoding="utf-8-sig")  # as spreadsheets save it
    assert PairedRecordings(str(tmp_path / "marked.csv"), 0).pairs == PairedRecordings(str(pairs), 0).pairs
    (tmp_path / "marked.csv").write_text(text + ",\n , \n")  # and with rows in which there is nothing
    assert PairedRecordings(str(tmp_path / "marked.csv"), 0).pairs == PairedRecordings(str(pairs), 0).pairs
    for row in ("long.wav,", ",long.mid"):
        (tmp_path / "bad.csv").write_text(text + row + "\n")
        with pytest.raises(MidiError, match=r"bad.csv: row \d+ is cut short, .*long"):
            PairedRecordings(str(tmp_path / "bad.csv"), 0)
    (tmp_path / "bad.csv").write_text("audio,midi\nnone.wav,long.mid\n")
    with pytest.raises(MidiError, match="none.wav: cannot be read as audio"):
        PairedRecordings(str(tmp_path / "bad.csv"), 0).draw(0, DataArguments("train", 1.0, 1.0, 0, False))


# --- the folder, as the Hub has it


@pytest.fixture
def in_this_process(monkeypatch):
    """The command makes its shards here: a process of its own takes seconds to import torch."""

    def make(shards, args, data, recordings):
        todo, done = queue.Queue(), queue.Queue()
        for shard in [*shards, None]:
            todo.put(shard)
        prepare_dataset._work(args, data, recordings, todo, done)
        for result in done.queue:
            if isinstance(result, Exception):
                raise result

    monkeypatch.setattr(prepare_dataset, "_make", make)


def test_datasets_loads_the_folder_by_its_card(tiny_data, tokenizer):
    """Splits, types and licence are told by the card; notes, MIDI bytes and ids of a row are the same music."""
    data = DatasetCard.load(tiny_data / "README.md").data
    assert data.license == ["other"] and data.task_categories == ["text-to-audio"]
    assert data.to_dict()["configs"][0]["data_files"] == [
        {"split": "train", "path": "train-[0-9][0-9][0-9][0-9][0-9]-of-00003.parquet"},
        {"split": "validation", "path": "validation-[0-9][0-9][0-9][0-9][0-9]-of-00001.parquet"},
    ]
    rows = load_dataset(str(tiny_data), split="validation", streaming=True)
    assert rows.features["target_codes"] == List(Value("int16")) and rows.features["target_midi"] == Value("binary")
    for row in rows:
        parts = [notes_of(row, part) for part in ("prompt", "target")]
        ids = tokenizer.encode_notes([(notes, 0.0, 1.0) for notes in parts])
        assert np.array_equal(ids, row["midi_ids"]) and row["target_frames"] == 50
        for part, notes in zip(("prompt", "target"), parts):
            read = load_performance(row[f"{part}_midi"]).notes
            for field in ("pitch", "velocity"):
                assert sorted(read[field]) == sorted(notes[field])
            for a, b in (
                (read["onset"], np.maximum(notes["onset"], 0)),
                (read["onset"] + read["duration"], notes["onset"] + notes["duration"]),
            ):
                assert np.abs(np.sort(a) - np.sort(b)).max() < 4e-3


def test_audio_is_typed_and_a_changed_card_keeps_its_text(in_this_process, prepare_command, tmp_path):
    assert prepare_command(tmp_path, "--items", 2, "--keep-audio", "--split", "jazz-test") == 0
    text = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(text + "\nMy own words.\n")
    assert prepare_command(tmp_path, "--items", 2, "--keep-audio") == 0
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.text.endswith("My own words.\n")
    assert {entry["split"] for entry in card.data.to_dict()["configs"][0]["data_files"]} == {"jazz_test", "train"}
    rows = load_dataset(str(tmp_path), split="train", streaming=True)
    assert isinstance(rows.features["target_audio"], Audio)
    row = next(iter(rows.decode(False)))
    assert len(soundfile.read(io.BytesIO(row["target_audio"]["bytes"]))[0]) == RATE


def test_parts_of_the_work_make_the_whole(in_this_process, prepare_command, tiny_data, tmp_path, capsys):
    """Two machines make the shards of one; the card comes with the last of them."""
    assert prepare_command(tmp_path, "--num-shards", 2, "--shard-index", 1) == 0
    assert "part 1 of 2 is done" in capsys.readouterr().out and not (tmp_path / "README.md").exists()
    assert prepare_command(tmp_path, "--num-shards", 2) == 0
    for name in ("train-00000-of-00003.parquet", "train-00001-of-00003.parquet", "train-00002-of-00003.parquet"):
        assert (tmp_path / name).read_bytes() == (tiny_data / name).read_bytes()
    assert (tmp_path / "README.md").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt-seconds", "0"], "--prompt-seconds above 0"),
        (["--target-seconds", "27"], "together must be at most 32"),
        (["--max-skipped", "nan"], "--max-skipped from 0 to 1"),
        (["--split", "a/b"], "--split 'a/b': names files"),
        (["--items", "100000", "--shard-items", "1"], "--items: 100000 shards, of which 99999 can be named; raise"),
    ],
)
def test_what_no_data_can_have_is_refused(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare_dataset.parse(["--codec", "c", "--pairs", "p", "--output-dir", str(tmp_path), *options])
    assert said in capsys.readouterr().err


def test_there_are_as_many_processes_as_cores_may_be_used(tmp_path, monkeypatch):
    """As of a SLURM job that has four of a hundred: each process needs half a GB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8, 9})
    assert prepare_dataset.parse(["--codec", "c", "--pairs", "p", "--output-dir", str(tmp_path)]).processes == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(prepare_command, tmp_path, capsys):
    assert prepare_command(tmp_path / "out", "--device", "cuda") == 2
    assert capsys.readouterr().err == "error: --device cuda: no GPU is available\n" and not (tmp_path / "out").exists()


def test_an_error_that_cannot_be_sent_is_told_in_words(monkeypatch):
    """Else the process would end as if all were well, and be waited for."""

    class UnsendableError(RuntimeError):
        def __init__(self, code, prefix):
            super().__init__(f"{prefix}\n{code}")

    def fail(*_):
        raise UnsendableError(3, "not this one:")

    done = queue.Queue()
    monkeypatch.setattr(prepare_dataset, "load_part", fail)
    prepare_dataset._work(SimpleNamespace(device="cpu", codec="c"), None, None, None, done)
    error = done.get_nowait()
    assert str(error) == "not this one: 3" and str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_number_of_shards_is_divisible_as_asked(tiny_pack, tmp_path):
    arguments = ["--codec", "c", "--pairs", "p", "--output-dir", str(tmp_path), "--items", "100", "--shard-items", "12"]
    args = prepare_dataset.parse([*arguments, "--divisible-by", "4"])
    assert prepare_dataset._shard_count(args) == 12
    assert set(args.room) == set(ROOM_NAMES) - {"any"}
    parts = [prepare_dataset._items(args, shard) for shard in range(12)]
    assert [i for part in parts for i in part] == list(range(100)) and {len(part) for part in parts} == {8, 9}


def test_targets_of_drawn_lengths(in_this_process, prepare_command, tokenizer, tmp_path):
    assert prepare_command(tmp_path, "--target-seconds", 2, "--min-target-seconds", 1) == 0
    frames = [count for table in tables(tmp_path) for count in table["target_frames"].to_pylist()]
    assert set(frames) <= {50, 75, 100} and len(set(frames)) > 1
    stream = TrainingStream(shard_files(tmp_path, "train"), tokenizer, 1, (0.5, 1.0), 1.0)
    assert sorted(batch["audio_codes"].shape[2] for _, batch in zip(range(8), stream)) == sorted(frames)
    file = tmp_path / "train-00001-of-00003.parquet"
    footer, content = pq.read_metadata(file), bytearray(file.read_bytes())
    column = footer.row_group(0).column(footer.schema.names.index("target_frames"))
    content[column.data_page_offset - 1] ^= 255  # the last byte of its values
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file} is damaged or cut short"):
        TrainingStream(shard_files(tmp_path, "train"), tokenizer, 1)


def test_what_is_skipped_is_tallied_and_too_much_is_an_error(in_this_process, tiny_pack, pairs, tmp_path, capsys):
    """Exit code 1 above the threshold; a second run finds nothing to do and says the same."""
    arguments = ["--codec", tiny_pack / "codec", "--pairs", pairs, "--prompt-seconds", 1, "--target-seconds", 1]
    arguments = [str(a) for a in [*arguments, "--items", 8, "--shard-items", 3, "--output-dir", tmp_path / "data"]]
    assert prepare_dataset.main(arguments) == 1
    first = capsys.readouterr()
    lines = (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()
    assert f"skipped {len(lines)} items: short.wav: 0.5 s" in first.err and "more than 10%" in first.err
    assert json.loads(lines[0])["split"] == "train" and f"{8 - len(lines)} items made" in first.out
    assert prepare_dataset.main([*arguments, "--max-skipped", "1"]) == 0
    assert (tmp_path / "data" / "skipped.jsonl").read_text().splitlines() == lines
    assert capsys.readouterr().out == first.out
    of_one, of_another = ({"source": name, "reason": "applause"} for name in "ab")
    for excluded in ([of_one], [of_another], [of_one]):  # of two splits of a table
        prepare_dataset.finish(tmp_path / "data", excluded)
    kept = [json.loads(line) for line in (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()]
    assert kept == [of_one, of_another, *map(json.loads, lines)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("README.md", "---\nbad: [\n---\nmine", "its header cannot be read"), ("skipped.jsonl", "3\n", "is damaged")],
)
def test_what_was_changed_by_hand_and_cannot_be_read_stays(name, text, said, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    file = tmp_path / "data" / name
    file.write_text(text)
    with pytest.raises(DataError, match=f"{file}: {said}"):
        prepare_dataset.finish(tmp_path / "data", [])
    assert file.read_text() == text


def test_items_encoded_together_are_those_encoded_alone(tiny_pack):
    """Windows of unequal lengths side by side."""
    data = DataArguments("train", 1.0, 2.0, 0, False, min_target_seconds=1.0)
    recordings = RenderedRecordings(tiny_pack / "midi", "train", [str(tiny_pack / "piano")], ["studio"], 0)
    codec = PianoEncodecModel.from_pretrained(tiny_pack / "codec").eval()
    alone, together = (prepare_dataset.make_rows(recordings, range(4), data, codec, size)[0] for size in (1, 4))
    for a, b in zip(alone, together, strict=True):
        for part in ("prompt", "target"):
            assert np.mean(codes_of(a, part, 4) == codes_of(b, part, 4)) > 0.99  # but for rounding
        assert a["target_frames"] == b["target_frames"] == codes_of(b, "target", 4).shape[1]


def test_targets_are_coded_with_their_notes_as_played(tiny_pack):
    """By a codec with key axes; prompts as they are heard, as they will be."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(num_filters=2, hidden_size=96, num_lstm_layers=1, num_key_axes=88))
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    data = DataArguments("train", 1.0, 1.0, 0, keep_audio=False)
    recordings = RenderedRecordings(tiny_pack / "midi", "train", [str(tiny_pack / "piano")], ["studio"], 0)
    prompt, target, _ = recordings.draw(0, data)
    ((row,), _) = prepare_dataset.make_rows(recordings, range(1), data, codec)
    sounds = [torch.from_numpy(part.wave)[None, None] for part in (prompt, target)]
    assert np.array_equal(codes_of(row, "prompt", 4), codec.encode_codes(sounds[0])[0].numpy())
    struck = torch.zeros(1, len(target.wave) // 640, 88)
    for note in target.notes[target.notes["onset"] >= -1]:  # a target begins 1 s after its sound
        if (frame := int((note["onset"] + 1) * 50)) < struck.shape[1]:
            struck[0, frame, note["pitch"] - 21] = note["velocity"] / 127
    heard, played = (codec.encode_codes(sounds[1], struck=known)[0, :, 50:100].numpy() for known in (None, struck))
    assert np.array_equal(codes_of(row, "target", 4), played) and not np.array_equal(heard, played)


@pytest.mark.slow
def test_the_processes_of_datasets_share_the_work_out(tiny_pack, tiny_data, tmp_path):
    """As the command's help tells."""
    words = ["--codec", tiny_pack / "codec", "--midi-root", tiny_pack / "midi", "--piano", tiny_pack / "piano"]
    words += ["--room", "dry_close", "--room", "studio", "--shard-items", 3, "--items", 8, "--output-dir", tmp_path]
    words += ["--prompt-seconds", 1, "--target-seconds", 1, "--processes", 1, "--num-shards", 2, "--shard-index"]
    command = [sys.executable, "-m", "scripts.prepare_dataset", *map(str, words)]

    def run(row):
        return {"code": subprocess.call([*command, str(row["index"])])}

    codes = Dataset.from_dict({"index": range(2)}).map(run, num_proc=2)["code"]
    assert list(codes) == [0, 0]
    for a, b in zip(tables(tiny_data), tables(tmp_path), strict=True):
        assert a.equals(b)


# --- batches


def test_a_batch(tiny_data, tokenizer):
    rows = {row["id"]: row for table in tables(tiny_data) for row in table.to_pylist()}
    lengths = set()
    for batch in batches(shard_files(tiny_data, "train"), tokenizer, 8, no_prompt_share=0.0):
        (frames,) = set(batch["prompt_lengths"].tolist())
        lengths.add(frames)
        assert batch["audio_codes"].shape == (2, 4, frames + 50)
        for codes, ids, mask in zip(batch["audio_codes"], batch["midi_ids"], batch["midi_attention_mask"]):
            (row,) = [r for r in rows.values() if np.array_equal(codes_of(r, "target", 4), codes[:, frames:])]
            assert np.array_equal(codes[:, :frames], codes_of(row, "prompt", 4)[:, :frames])
            segments = [(notes_of(row, "prompt"), 0.0, frames / 50), (notes_of(row, "target"), 0.0, 1.0)]
            expected = tokenizer.encode_notes(segments)
            assert np.array_equal(ids[: len(expected)], expected) and mask.sum() == len(expected)
            assert not ids[len(expected) :].any()
    assert lengths == {25, 50}
    (alone,) = batches(shard_files(tiny_data, "train"), tokenizer, 1, no_prompt_share=1.0)
    assert alone["prompt_lengths"].tolist() == [0, 0] and alone["audio_codes"].shape == (2, 4, 50)


def test_short_targets(tiny_data, tokenizer):
    """Frames end at the drawn length, notes half a second later: what rendering gives for a short window."""
    files, seen = shard_files(tiny_data, "train"), set()
    rows = {row["id"]: row for table in tables(tiny_data) for row in table.to_pylist()}
    stream = TrainingStream(files, tokenizer, 2, (0.5, 0.5), 0.0, short_share=1.0)
    stream.info = stream.info | {"target_seconds": 2.0}
    rng = np.random.default_rng(0)
    for row in rows.values():
        codes = codes_of(row, "target", 4)
        row = row | {"target_codes": np.concatenate([codes, codes], 1).ravel()}  # 2 s of frames
        batch = stream.collate([row], rng)
        frames = batch["audio_codes"].shape[-1] - 25
        seen.add(frames)
        segments = [(notes_of(row, "prompt"), 0.0, 0.5), (notes_of(row, "target"), 0.0, min(frames / 50 + 0.5, 2.0))]
        assert np.array_equal(batch["midi_ids"][0], tokenizer.encode_notes(segments))
    assert seen == {50, 75, 100}


def test_the_order_depends_on_seed_and_epoch(tiny_data, tokenizer):
    files = shard_files(tiny_data, "train")
    first, again, other = (batches(files, tokenizer, 8, seed=seed) for seed in (0, 0, 1))
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(equal(a, b) for a, b in zip(first, other, strict=True))

    def targets(part):
        return [tuple(codes[:, -50:].flatten().tolist()) for batch in part for codes in batch["audio_codes"]]

    epochs = targets(first[:4]), targets(first[4:])
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == 8 and epochs[0] != epochs[1]


def test_a_stopped_stream_goes_on_with_the_next_batch(tiny_data, tokenizer):
    files = shard_files(tiny_data, "train")
    whole = batches(files, tokenizer, 8)
    for stop in (1, 4, 6):
        stream = TrainingStream(files, tokenizer, 2, (0.5, 1.0))
        for _ in zip(range(stop), stream):
            state = json.loads(json.dumps(stream.state_dict()))
        resumed = TrainingStream(files, tokenizer, 2, (0.5, 1.0))
        resumed.load_state_dict(state)
        assert all(equal(a, b) for a, b in zip(whole[stop:], resumed, strict=False))


def test_ranks_share_the_batches_out(tiny_data, tokenizer):
    """Two ranks get what one would, in turn, each batch once; three drop the one that is over, and stay together."""
    files = shard_files(tiny_data, "train")
    whole = batches(files, tokenizer, 8)
    halves = [batches(files, tokenizer, 4, rank=rank, world_size=2) for rank in range(2)]
    for i in range(8):
        assert equal(whole[i], halves[i % 2][i // 2])
    thirds = [batches(files, tokenizer, 2, rank=rank, world_size=3) for rank in range(3)]
    for rank in range(3):
        assert equal(thirds[rank][0], whole[rank]) and equal(thirds[rank][1], whole[4 + rank])


def test_a_folder_whose_name_looks_like_a_pattern(tiny_data, tokenizer, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "piano [v2] *")
    named, plain = (batches(shard_files(f, "train"), tokenizer, 1) for f in (tmp_path / "piano [v2] *", tiny_data))
    assert equal(named[0], plain[0])


def test_incomplete_or_mixed_data_is_refused(tiny_data, tokenizer, tmp_path):
    files = shard_files(tiny_data, "train")
    with pytest.raises(DataError, match=r"too few items of train for a batch of 9 on each process \(1\)"):
        next(iter(TrainingStream(files, tokenizer, 9)))
    with pytest.raises(DataError, match="no test-"):
        shard_files(tiny_data, "test")
    for name in ("jazz", "jazz-test"):  # neither is part of the other
        shutil.copy(tiny_data / "validation-00000-of-00001.parquet", tmp_path / f"{name}-00000-of-00001.parquet")
    assert shard_files(tmp_path, "jazz") == [str(tmp_path / "jazz-00000-of-00001.parquet")]
    with pytest.raises(DataError, match=r"too few items of jazz-test for a batch of 99 on each process \(1\)"):
        next(iter(TrainingStream(shard_files(tmp_path, "jazz-test"), tokenizer, 99)))
    for name in ("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"):
        shutil.copy(tiny_data / name, tmp_path)
    with pytest.raises(DataError, match="2 of 3 shards of train"):
        shard_files(tmp_path, "train")
    mixed = shutil.copy2(tmp_path / "train-00000-of-00003.parquet", tmp_path / "train-00000-of-00004.parquet")
    with pytest.raises(DataError, match=r"shards of several datasets \(-of-00003 and -of-00004\); keep those of one"):
        shard_files(tmp_path, "train")
    mixed.unlink()
    table = pq.read_table(tiny_data / "train-00001-of-00003.parquet")
    other = table.replace_schema_metadata({"midivalle": json.dumps({"codec_sha256": "0"})})
    pq.write_table(other, tmp_path / "train-00001-of-00003.parquet")
    with pytest.raises(DataError, match="are mixed"):
        dataset_info(shard_files(tmp_path, "train"))
