# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.generate_pool`: codes of notes beside the recording that they stand for."""

import shutil

import numpy as np
import pytest
import torch
from transformers import EncodecFeatureExtractor, GenerationConfig

from modeling_midivalle import PianoEncodecModel
from processing import MidiValleProcessor
from processing.audio_midivalle import to_int16
from scripts import generate_pool
from scripts.audio.rendered_audio import codes_path, onsets_path
from scripts.codec.data import StoredCrops
from scripts.codec.objectives import DecoderObjective
from scripts.codec.pool_files import PoolFiles
from scripts.dataset.recordings import DataArguments, RenderedRecordings
from scripts.models.trained_parts import codec_hash
from tokenization import MidiValleTokenizer


@pytest.fixture
def make(make_model, tiny_pack, tmp_path, capsys):
    """`make("--items", 3, ...)` -> exit code and what was said, with a tiny model whose codec has axes of keys; pieces
    of 1 s after 1 s."""
    make_model("keys").save_pretrained(tmp_path / "model")
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=32_000)
    limits = {"max_prompt_seconds": 1.0, "max_window_seconds": 2.0, "context_seconds": 0.5, "onset_delay_seconds": 0.02}
    MidiValleProcessor(extractor, MidiValleTokenizer(), **limits).save_pretrained(tmp_path / "model")
    make_model("keys").codec.save_pretrained(tmp_path / "codec")

    def run(*more):
        arguments = ["--model", tmp_path / "model", "--codec", tmp_path / "codec", "--midi-root", tiny_pack / "midi"]
        arguments += ["--piano", tiny_pack / "piano", "--room", "studio", "--workers", 0, "--batch-size", 2]
        code = generate_pool.main([*map(str, arguments), "--output", str(tmp_path / "pool.npy"), *map(str, more)])
        return code, capsys.readouterr().err

    return run


def test_midi_that_cannot_be_used(make, tiny_pack, tmp_path):
    """It is said, and another item is drawn."""
    shutil.copytree(tiny_pack / "midi", tmp_path / "midi")
    (tmp_path / "midi" / "1.mid").write_bytes(b"no MIDI")
    code, said = make("--items", 3, "--midi-root", tmp_path / "midi")
    assert code == 0 and "1.mid: not a MIDI file" in said and len(np.load(tmp_path / "pool.npy")) == 3


def test_no_midi_that_can_be_used(make, tiny_pack, tmp_path):
    shutil.copytree(tiny_pack / "midi", tmp_path / "midi")
    for path in (tmp_path / "midi").glob("*.mid"):
        path.write_bytes(b"no MIDI")
    code, said = make("--items", 3, "--midi-root", tmp_path / "midi")
    assert code == 2 and "of 100 excerpts that were drawn, none has a note and a MIDI file that can be used" in said
    assert said.count("0.mid: not a MIDI file") == 1


def test_sampled_codes_are_of_the_seed(make, tmp_path, monkeypatch):
    """Each item of one of its own."""
    GenerationConfig(do_sample=True, temperature=1.0).save_pretrained(tmp_path / "model")
    pools, seeds, generate = [], [], generate_pool.generate
    monkeypatch.setattr(generate_pool, "generate", lambda *given: seeds.extend(given[4]) or generate(*given))
    for _ in range(2):
        assert make("--items", 3)[0] == 0
        pools.append(files_of(tmp_path))
        for path in tmp_path.glob("pool*"):
            path.unlink()
    assert all(np.array_equal(array, pools[1][name]) for name, array in pools[0].items())
    assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3


def files_of(folder):
    return {path.name: np.load(path) for path in sorted(folder.glob("pool*.npy"))}


def test_a_pool(make, interrupted_pool, tmp_path, monkeypatch):
    """What a decoder learns from that is told its keys; interrupted and started again, the same."""
    assert make("--items", 5)[0] == 0
    whole, sha256 = files_of(tmp_path), codec_hash(tmp_path / "codec")
    pool = tmp_path / "pool.npy"
    codes, onsets = whole[codes_path(pool, sha256, "generated").name], whole[onsets_path(pool).name]
    assert whole["pool.npy"].shape == (5, 32_000) and codes.shape == (5, 4, 50) and onsets.shape == (5, 50, 88)
    assert np.abs(whole["pool.npy"]).max(1).min() > 300 and 0 <= codes.min() < codes.max() < 2048
    assert len({row.tobytes() for row in codes}) == 5 and (onsets > 0).any((1, 2)).all()
    assert 100 < onsets.max() < 120  # velocities
    np.save(codes_path(pool, sha256), np.zeros_like(codes))
    kinds = [StoredCrops([pool], 0.3, 0, sha256, 0.2)[i] for i in range(20)]
    assert (
        {bool(item["told"]) for item in kinds} == {bool(item["audio_codes"].any()) for item in kinds} == {False, True}
    )
    made = pool.stat().st_mtime_ns
    assert make("--items", 5)[0] == 0 and pool.stat().st_mtime_ns == made
    code, said = make("--items", 5, "--seed", 1)
    assert code == 2 and "another pool was made or begun here (seed was 0, is 1); delete it and pool.state" in said
    (tmp_path / "pool.state.json").unlink()  # as pools had none
    assert make("--items", 5) == (2, f"error: {pool}: exists already; delete it, or give another --output\n")
    for path in tmp_path.glob("pool*"):
        path.unlink()

    add = PoolFiles.add
    with interrupted_pool():
        code, said = make("--items", 5)
    assert code == 130 and said.endswith("what is finished is kept\n") and not pool.exists()
    assert "another pool was made or begun here (items was 5, is 4)" in make("--items", 4)[1]
    assert "begun here (batch_size was 2, is 3)" in make("--items", 5, "--batch-size", 3)[1]
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    config.write_text(text + "\n")  # other weights change the sum likewise
    assert "begun here (model_sha256 was " in make("--items", 5)[1]
    config.write_text(text)
    drawn = []
    monkeypatch.setattr(PoolFiles, "add", lambda self, *a: drawn.append(self.done) or add(self, *a))
    assert make("--items", 5)[0] == 0 and drawn == [2, 4]
    again = files_of(tmp_path)
    assert again.keys() == whole.keys() and all(np.array_equal(again[name], whole[name]) for name in whole)
    assert not list(tmp_path.glob(".pool*.tmp"))


def test_mean_vectors_beside_the_codes(make, tmp_path):
    """They are those of the same codes, and what a decoder that is told its keys learns from."""
    assert make("--items", 3, "--mean-vectors")[0] == 0
    found, sha256, pool = files_of(tmp_path), codec_hash(tmp_path / "codec"), tmp_path / "pool.npy"
    means = found[codes_path(pool, sha256, "means").name]
    assert means.shape == (3, 12, 50) and means.dtype == np.float16 and np.isfinite(means).all() and means.std() > 0
    source = StoredCrops([pool], 0.3, 0, sha256, 0.2)
    batch = {name: torch.from_numpy(np.stack([source[i][name] for i in range(4)])) for name in source[0]}
    objective = DecoderObjective(PianoEncodecModel.from_pretrained(tmp_path / "codec"), False, 0)
    latent = objective.quantised(batch)
    assert batch["told"].all() and torch.equal(latent[:, :12], batch["means"])
    batch["means"][0] = float("nan")
    codes = objective.codec.quantizer.decode(batch["audio_codes"].transpose(0, 1))
    assert torch.equal(objective.quantised(batch)[0, :12], codes[0, :12])


def test_what_the_model_is_told(make, tmp_path, monkeypatch):
    """Notes as its tokenizer says, after the longest prompt, and which keys are struck, whatever its configuration
    says."""
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"keys_from_midi": true', '"keys_from_midi": false'))
    MidiValleTokenizer(sustain="ignore").save_pretrained(tmp_path / "model")
    told = []

    def look(pool, model, drawn, *_):
        told.append((model.config.keys_from_midi, model.config.mean_vectors, drawn.data.sustain))
        told.append((drawn.data.prompt_seconds, drawn.data.target_seconds))
        raise ValueError("enough")

    monkeypatch.setattr(generate_pool, "_generate_items", look)
    assert make("--items", 1, "--mean-vectors")[0] == 2 and told == [(True, True, "ignore"), (1.0, 1.0)]


def test_a_target_without_notes_is_drawn_again(tiny_pack):
    arguments = DataArguments("train", 1.0, 1.0, 0, keep_audio=False)
    recordings = RenderedRecordings(tiny_pack / "midi", "train", [tiny_pack / "piano"], ["studio"], 0)
    draw, drawn, targets = recordings.draw, [], []

    def silent_first(index, data):
        drawn.append(index)
        prompt, target, about = draw(index, data)
        targets.append(target)
        if len(drawn) == 1:
            target.notes = target.notes[:0]
        if len(drawn) == 2:  # all that sounds was struck before
            target.notes = target.notes[:1]
            target.notes["onset"], target.notes["duration"] = -1.0, 1.5
        return prompt, target, about

    recordings.draw = silent_first
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=32_000)
    processor = MidiValleProcessor(extractor, MidiValleTokenizer())
    piece, prompt, wave = generate_pool.Drawn(recordings, arguments, processor)[3]
    assert (
        drawn == [3, 3 + generate_pool.REDRAW, 3 + 2 * generate_pool.REDRAW]
        and len(piece.notes)
        and prompt.seconds == 1.0
        and wave.any()
        and np.array_equal(wave, to_int16(targets[-1].wave[32_000:64_000]))  # without the second before it
    )


def test_what_cannot_be_told_is_refused(make, make_model, tiny_pack, tmp_path, monkeypatch):
    code, said = make("--codec", tiny_pack / "codec")
    assert code == 2 and "has other codebooks than the codec of" in said
    make_model("tiny").save_pretrained(tmp_path / "plain")
    code, said = make("--model", tmp_path / "plain")
    assert code == 2 and "its codec has no axes of keys" in said
    code, said = make("--model", tmp_path / "none")
    assert code == 2 and f"--model {tmp_path / 'none'}: no such folder" in said
    (tmp_path / "plain" / "generation_config.json").write_text("{")  # transformers alone would ignore it
    code, said = make("--model", tmp_path / "plain")
    assert code == 2 and "generation_config.json: is damaged" in said
    code, said = make("--piano", tmp_path / "plain")
    assert code == 2 and "plain: holds no index.csv" in said and not list(tmp_path.glob(".pool*"))
    for option, value in (("--items", 0), ("--batch-size", 0), ("--workers", -1), ("--seed", -1), ("--device", "x")):
        with pytest.raises(SystemExit):
            make(option, value)

    def die(args):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(generate_pool, "make_pool", die)
    code, said = make()
    assert code == 2 and said.endswith(
        "error: a worker process died (out of memory?); start again, what is finished is kept\n"
    )
