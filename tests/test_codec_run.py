# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Runs of the codec's trainer go on as if they had never stopped, bit by bit, after kills and signals."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from modeling_midivalle import PianoEncodecConfig, PianoEncodecModel, PianoListenerConfig, PianoListenerModel
from scripts import train_codec
from scripts.audio.rendered_audio import RenderedExcerpts, codes_path, onsets_path
from scripts.codec import run, step
from scripts.codec.discriminator import MultiScaleSTFTDiscriminator
from scripts.codec.features import SpectralFeatures
from scripts.codec.objectives import WholeObjective
from scripts.codec.parts import encode_pools, export_rounded, save_whole
from scripts.codec.quantizer import ema_update
from scripts.codec.recipe import CodecRecipe
from scripts.codec.run import Run
from scripts.codec.step import batch_that_fits
from scripts.codec.validation import validate
from scripts.models.trained_parts import codec_hash
from scripts.training.processes import RunError
from scripts.training.run_log import read_log

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
rooms: [studio]
crop_seconds: 0.4
excerpt_seconds: 1.2
mixed_excerpts: 2
level_db: [-6, 3]
batch_size: 2
accumulation: 2
steps: 4
warmup_steps: 2
codebook_decay: 0.5
dead_code: 0.3
adversarial_from: 1
save_steps: 2
log_steps: 3
validation_crops: 1
validation_seconds: 0.6
"""


@pytest.fixture(scope="module", autouse=True)
def small_discriminator():
    """A discriminator of a tenth of the time, as narrow as the codec."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "MultiScaleSTFTDiscriminator", partial(MultiScaleSTFTDiscriminator, channels=4))
        yield


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("listener")
    PianoListenerModel(PianoListenerConfig(hidden_size=8)).save_pretrained(folder / "listener")
    return folder


@pytest.fixture(scope="module")
def shared(tiny_pack, listener):
    """Arguments of a run that renders, listens and discriminates."""
    (listener / "recipe.yaml").write_text(RECIPE)
    found = ["whole", "--config", listener / "recipe.yaml", "--codec", tiny_pack / "codec", "--listener", listener]
    found += ["--midi-root", tiny_pack / "midi", "--piano", tiny_pack / "piano", "--workers", "0"]
    return [str(argument) for argument in found]


@pytest.fixture
def whole(shared, tmp_path):
    """`whole(output, ...)` -> arguments with more of them."""
    return lambda output, *more: [*shared, *map(str, more), "--output-dir", str(tmp_path / output)]


@pytest.fixture(scope="module")
def at_once(shared, tracker, tmp_path_factory):
    """The folder of a run of four steps that nothing stopped and a tracker was told of, and what it said."""
    folder = tmp_path_factory.mktemp("at_once")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(run, "installed_trackers", lambda names: [tracker])
        assert train_codec.main([*shared, "--output-dir", str(folder)]) == 0
    (folder / "said.txt").write_text(said.getvalue())
    return folder


def assert_equal_runs(one, other, step=4):
    """Weights, averages, optimisers, generator, sums and log of both are the same bits."""
    one_step, other_step = (folder / f"step_{step:07d}" for folder in (one, other))
    tensors, others = (load_file(folder / "tensors.safetensors") for folder in (one_step, other_step))
    assert set(tensors) == set(others)
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    for mine, its in zip(*(torch.load(f / "optimizers.pt", weights_only=True) for f in (one_step, other_step))):
        assert mine["param_groups"] == its["param_groups"]
        for place, values in mine["state"].items():
            assert all(torch.equal(value, its["state"][place][name]) for name, value in values.items())
    states = [json.loads((folder / "state.json").read_text()) for folder in (one_step, other_step)]
    assert [state.pop("seconds") > 0 for state in states] == [True, True] and states[0] == states[1]
    rows = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (one, other)]
    assert [[{k: v for k, v in row.items() if k != "wall_s"} for row in part] for part in rows[:1]] == [
        [{k: v for k, v in row.items() if k != "wall_s"} for row in rows[1]]
    ]
    assert (one / "codec" / "model.safetensors").read_bytes() == (other / "codec" / "model.safetensors").read_bytes()


def test_two_steps_and_two_more_are_four(at_once, whole, tmp_path, capsys):
    """`whole` with discriminator, listener, accumulation and revived codes; the cut lies inside a line of the log."""
    assert re.search(r"x real time, \d+:\d\d:\d\d left", (at_once / "said.txt").read_text())
    rows = map(json.loads, (at_once / "log.jsonl").read_text().splitlines())
    row = next(row for row in rows if "revived" in row)  # a validation comes before it
    assert (
        row["step"] == 3 and row["revived"] > 0 and {"adversarial", "discriminator", "notes", "commitment"} <= set(row)
    )
    assert row["hours"] == pytest.approx(3 * 4 * 0.4 / 3600, abs=1e-4)
    parts = tmp_path / "parts"
    shutil.copytree(at_once / "step_0000002", parts / "step_0000002")
    kept = [line for line in (at_once / "log.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 2]
    lost = '{"step": 3, "hours": 0.1, "of": "a step that was lost"}\n{"step": 4, "cut sho'
    (parts / "log.jsonl").write_text("".join(f"{line}\n" for line in kept) + lost)
    (tmp_path / "anew").mkdir()  # killed before its first checkpoint
    shutil.copy(parts / "log.jsonl", tmp_path / "anew")
    assert train_codec.main(whole("anew")) == 0
    assert_equal_runs(at_once, tmp_path / "anew")
    capsys.readouterr()
    assert train_codec.main(whole("parts")) == 0
    assert "continuing from" in capsys.readouterr().out
    assert_equal_runs(at_once, parts)
    before, after = (load_file(at_once / f"step_000000{n}" / "tensors.safetensors") for n in (2, 4))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"live", "average", "discriminator", "generator"}


def test_a_kill_during_saving_and_damage_fall_back(at_once, whole, tmp_path, capsys):
    """Half a checkpoint is cleared away, a damaged one is passed over; the run ends the same."""
    killed = tmp_path / "killed"
    shutil.copytree(at_once, killed)
    file = killed / "step_0000004" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (killed / ".step_0000003.tmp").mkdir()
    shutil.rmtree(killed / "codec")
    capsys.readouterr()
    assert train_codec.main(whole("killed")) == 0
    assert "passed over: step_0000004 (tensors.safetensors has" in capsys.readouterr().out
    assert not (killed / ".step_0000003.tmp").exists()
    assert_equal_runs(at_once, killed)


def test_a_signal_saves_first_and_other_settings_are_refused(at_once, whole, tmp_path, capsys, monkeypatch):
    """SIGTERM in step 1: a checkpoint of step 1, from which the run goes on to the same end."""
    learn = run.Learner.__call__

    def interrupted(self, step, batches):
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, step, batches)

    with monkeypatch.context() as patch:
        patch.setattr(run.Learner, "__call__", interrupted)
        assert train_codec.main(whole("stopped")) == 0
    assert [p.name for p in sorted((tmp_path / "stopped").glob("step_*"))] == ["step_0000001"]
    assert (tmp_path / "stopped" / "codec" / "config.json").is_file()
    assert train_codec.main(whole("stopped", "--steps", 5)) == 2
    assert "recipe.steps was 4, is 5" in capsys.readouterr().err
    assert train_codec.main(whole("stopped")) == 0
    assert_equal_runs(at_once, tmp_path / "stopped")


# Blocks of one excerpt and of four
@pytest.mark.parametrize(("size", "mixed", "base"), [pytest.param(3, 1, 4, marks=pytest.mark.slow), (2, 3, 1)])
def test_other_batches_begin_behind_what_was_heard(size, mixed, base, at_once, whole, tmp_path):
    """By force: the new size is used, and none of the four excerpts that have been begun comes again."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("mixed_excerpts: 2", f"mixed_excerpts: {mixed}"))
    shutil.copytree(at_once / "step_0000002", tmp_path / "out" / "step_0000002")
    more = ("--config", tmp_path / "recipe.yaml", "--batch-size", size, "--force")
    assert train_codec.main(whole("out", *more)) == 0
    state = json.loads((tmp_path / "out" / "step_0000004" / "state.json").read_text())
    assert (state["batch_size"], state["base"], state["batches"]) == (size, base, 4)


def test_a_folder_that_cannot_be_gone_on_in_stays_as_it_is(at_once, whole, tmp_path, capsys):
    """A codec whose checkpoints are gone, and a checkpoint that does not fit, not even by force."""
    shutil.copytree(at_once / "codec", tmp_path / "done" / "codec")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("adversarial_from: 1\n", ""))
    shutil.copytree(at_once / "step_0000004", tmp_path / "other" / "step_0000004")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    assert train_codec.main(whole("done")) == 2
    assert f"{tmp_path / 'done' / 'codec'}: is there, but no checkpoint" in capsys.readouterr().err
    assert train_codec.main(whole("other", "--config", tmp_path / "recipe.yaml", "--force")) == 2
    said = capsys.readouterr()
    assert "step_0000004: does not fit these settings; give another" in said.err and "continuing" not in said.out
    assert all(path.stat().st_mtime_ns == changed for path, changed in files.items())


@pytest.fixture(scope="module")
def coded(tiny_pack, tmp_path_factory):
    """A pool with its codes, and a codec as narrow as the decoder's oscillators allow."""
    folder = tmp_path_factory.mktemp("coded")
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(num_filters=16, hidden_size=64, upsampling_ratios=[5, 4, 4, 8]))
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    export_rounded(codec.state_dict(), codec.config, folder / "codec")
    source = RenderedExcerpts(tiny_pack / "midi", "train", [tiny_pack / "piano"], ["studio"], 1.0)
    np.save(folder / "pool.npy", np.stack([source[i]["wave"] for i in range(2)]))
    np.save(onsets_path(folder / "pool.npy"), np.stack([source[i]["onsets"] for i in range(2)]))
    encode_pools(str(folder / "codec"), [str(folder / "pool.npy")])
    return folder


def test_the_decoder_goes_on_exactly_too(coded, listener, tmp_path):
    recipe = RECIPE.replace("level_db: [-6, 3]", "lead_seconds: 0.2").replace("accumulation: 2", "accumulation: 1")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("adversarial_from: 1", ""))
    shared = ["decoder", "--config", tmp_path / "recipe.yaml", "--codec", coded / "codec", "--listener", listener]
    shared += ["--go-on", "--audio", coded / "pool.npy", "--validation", coded / "pool.npy", "--workers", "0"]
    assert train_codec.main([*map(str, shared), "--output-dir", str(tmp_path / "at_once")]) == 0
    shutil.copytree(tmp_path / "at_once" / "step_0000002", tmp_path / "parts" / "step_0000002")
    shutil.copy(tmp_path / "at_once" / "log.jsonl", tmp_path / "parts")
    assert train_codec.main([*map(str, shared), "--output-dir", str(tmp_path / "parts")]) == 0
    assert_equal_runs(tmp_path / "at_once", tmp_path / "parts")


def test_a_listener_goes_on_with_what_it_knows(coded, listener, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("{crop_seconds: 0.4, batch_size: 2, steps: 1, learning_rate: 1.0e-9}")
    shared = ["listener", "--config", str(tmp_path / "recipe.yaml"), "--audio", str(coded / "pool.npy")]
    shared += ["--workers", "0", "--output-dir", str(tmp_path / "out")]
    for one_alone in (["--go-on"], ["--listener", str(listener)]):
        with pytest.raises(SystemExit, match="2"):
            train_codec.main([*shared, *one_alone])
        assert "needs --go-on and --listener together, or neither" in capsys.readouterr().err
    assert train_codec.main([*shared, "--go-on", "--listener", str(listener)]) == 0
    begun, learned = (load_file(f / "listener" / "model.safetensors") for f in (listener, tmp_path / "out"))
    for name, value in begun.items():
        torch.testing.assert_close(learned[name].float(), value, rtol=1e-3, atol=1e-6)  # float16


def test_other_weights_or_sound_of_the_same_names_are_refused(coded, listener, tmp_path, capsys):
    """A listener, a codec's decoder, features, a pool and the kinds of its codes that were made anew."""
    shutil.copytree(coded, tmp_path / "made")
    shutil.copytree(listener, tmp_path / "made" / "listener")
    (tmp_path / "made" / "features").mkdir()
    save_whole(SpectralFeatures(64).state_dict(), tmp_path / "made" / "features" / "features.safetensors")
    made, pool = tmp_path / "made", tmp_path / "made" / "pool.npy"
    recipe = RECIPE.replace("level_db: [-6, 3]", "").replace("adversarial_from: 1", "").replace("steps: 4", "steps: 1")
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = ["decoder", "--go-on", "--config", tmp_path / "recipe.yaml", "--codec", made / "codec", "--workers", "0"]
    command += ["--features", made / "features", "--listener", made / "listener", "--audio", pool]
    command = [*map(str, command), "--output-dir", str(tmp_path / "out")]
    assert train_codec.main(command) == 0 and train_codec.main(command) == 0

    def change(path, name):
        tensors = load_file(path)
        save_whole(tensors | {name: tensors[name] + 0.01}, path)

    change(made / "listener" / "listener" / "model.safetensors", "last.bias")
    change(made / "codec" / "model.safetensors", "decoder.layers.0.conv.bias")  # the codes stay
    change(made / "features" / "features.safetensors", "basis")
    pool.with_suffix(".state.json").write_text("{}")
    sha256 = codec_hash(made / "codec")
    shutil.copy(codes_path(pool, sha256), codes_path(pool, sha256, "played"))
    assert train_codec.main(command) == 2
    error = capsys.readouterr().err
    changes = ("listener_sha256 was", "codec_sha256 was", "features_sha256 was", "pools_sha256 was ['missing'], is")
    assert all(change in error for change in (*changes, "kinds was ['heard'], is ['heard', 'played']"))
    assert error.count(" was ") == 5 and train_codec.main([*command, "--force"]) == 0


def test_another_piano_of_the_same_name_is_refused(at_once, whole, tiny_pack, tmp_path, capsys):
    shutil.copytree(at_once, tmp_path / "out")
    shutil.copytree(tiny_pack / "piano", tmp_path / "piano")
    more = whole("out")
    more[more.index("--piano") + 1] = str(tmp_path / "piano")
    assert train_codec.main(more) == 0
    (tmp_path / "piano" / "060_127.wav").write_bytes((tmp_path / "piano" / "072_127.wav").read_bytes())
    assert train_codec.main(more) == 2 and "rendered.pianos was ['piano " in capsys.readouterr().err


def test_trackers_get_sound_and_curves_at_each_validation(at_once, tracker):
    """As files of the run are; other tests have runs without trackers, which are equal."""
    names = ("samples/00_truth", "samples/00_codec", "curves")
    assert tracker.shown.keys() == {(name, step) for name in names for step in (2, 4)}
    wave, rate = tracker.shown["samples/00_codec", 4]
    written, _ = soundfile.read(at_once / "samples" / "00_codec.flac")
    assert rate == 32_000 and np.abs(wave[0].numpy() - written).max() < 1e-4


@pytest.mark.slow
def test_two_processes_go_on_exactly_and_agree(whole, tmp_path, monkeypatch):
    """Under torchrun: 4 steps = 2 + 2; both processes' sums are in the log, and one process can take over."""
    monkeypatch.setattr(step, "MultiScaleSTFTDiscriminator", MultiScaleSTFTDiscriminator)  # other processes have it

    def launch(output):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["-m", "scripts.train_codec", *whole(output)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]

    launch("at_once")
    for output in ("parts", "alone"):
        shutil.copytree(tmp_path / "at_once" / "step_0000002", tmp_path / output / "step_0000002")
        shutil.copy(tmp_path / "at_once" / "log.jsonl", tmp_path / output)  # rows of later steps are made again
    launch("parts")
    assert_equal_runs(tmp_path / "at_once", tmp_path / "parts")
    rows = map(json.loads, (tmp_path / "at_once" / "log.jsonl").read_text().splitlines())
    row = next(row for row in rows if "mel" in row)  # a validation comes before it
    assert row["step"] == 3 and row["hours"] == pytest.approx(2 * 3 * 4 * 0.4 / 3600, abs=1e-4)
    assert train_codec.main(whole("alone")) == 0
    state = json.loads((tmp_path / "alone" / "step_0000004" / "state.json").read_text())
    assert (state["base"], state["batches"]) == (4, 4)  # two processes have begun blocks 0 to 3 of three batches each
    alone = next(row for row in read_log(tmp_path / "alone" / "log.jsonl") if "mel" in row)
    assert alone["step"] == 3 and alone["mel"] == pytest.approx(row["mel"], rel=0.2)  # of sums of two, two and one


SUMS = """
import torch
from types import SimpleNamespace as S
from torch import distributed
from scripts.codec.quantizer import ema_update
distributed.init_process_group("gloo")
rank, g = distributed.get_rank(), torch.Generator().manual_seed(0)
vectors, embed = torch.randn(40, 4, generator=g), torch.randn(8, 4, generator=g)
book = S(embed=embed.clone(), embed_avg=embed.clone(), cluster_size=torch.ones(8))
indices = torch.cdist(vectors, embed).argmin(1)
mine = slice(20 * rank, 20 * rank + 20)
ema_update(S(layers=[S(codebook=book)]), [(vectors[mine], indices[mine])], 0.9, 0.0, g)
whole = S(embed=embed.clone(), embed_avg=embed.clone(), cluster_size=torch.ones(8))
distributed.destroy_process_group()
ema_update(S(layers=[S(codebook=whole)]), [(vectors, indices)], 0.9, 0.0, g)
assert torch.allclose(book.embed, whole.embed, atol=1e-6) and torch.equal(book.cluster_size, whole.cluster_size)
"""


@pytest.mark.slow
def test_codebook_statistics_are_summed_over_processes(tmp_path):
    """Two processes with half of the vectors each move a codebook as one process with all of them does."""
    (tmp_path / "sums.py").write_text(SUMS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*command, str(tmp_path / "sums.py")], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_codebook_statistics_are_summed_over_batches(tiny_pack):
    """Two batches of a step move the codebooks as one batch of both, not one after the other."""
    codec = [PianoEncodecModel.from_pretrained(tiny_pack / "codec", dtype=torch.float32) for _ in range(2)]
    wave = 0.1 * torch.randn(4, 6400, generator=torch.Generator().manual_seed(0))
    batches = ([wave], [wave[:2], wave[2:]])
    for model, parts in zip(codec, batches, strict=True):
        objective = WholeObjective(model, False)
        for part in parts:
            objective({"input_values": part})
        assert len(objective.updates) == 4 * len(parts)
        ema_update(model.quantizer, objective.updates, 0.9, 0.0, torch.Generator())
    for one, two in zip(codec[0].quantizer.layers, codec[1].quantizer.layers, strict=True):
        torch.testing.assert_close(one.codebook.embed, two.codebook.embed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("uses", [True, False])
def test_codebooks_go_on_from_what_was_saved(uses, tiny_pack):
    """Where averages are missing, as in a shipped codec: from the vectors and how often each was used, or once."""
    codec = PianoEncodecModel.from_pretrained(tiny_pack / "codec", dtype=torch.float32)
    book = codec.quantizer.layers[1].codebook
    before = book.embed.clone()
    book.embed_avg.fill_(0.0 if uses else 2.0)
    book.cluster_size.copy_(torch.rand(len(before)) + 0.1 if uses else torch.zeros(len(before)))
    counts = book.cluster_size.clone() if uses else torch.ones(len(before))
    WholeObjective(codec, False)
    assert torch.equal(book.embed, before) and torch.equal(book.cluster_size, counts)
    torch.testing.assert_close(book.embed_avg, before * counts[:, None])


def test_looking_moves_nothing(tiny_pack):
    """Without gradients `whole` notes no updates, so that validation does not train."""
    objective = WholeObjective(PianoEncodecModel.from_pretrained(tiny_pack / "codec", dtype=torch.float32), False)
    with torch.no_grad():
        losses, output = objective({"input_values": torch.zeros(1, 6400)})
    assert objective.updates == [] and output.shape == (1, 6400) and "commitment" in losses


def test_samples_that_cannot_be_written_are_named(tmp_path):
    wave = torch.zeros(1, 9600)
    (tmp_path / "00_truth.flac").mkdir()

    class Copying:
        model = None

        def __call__(self, batch):
            return {}, batch["input_values"]

    with pytest.raises(RunError, match=r"00_truth\.flac: cannot be written"):
        validate(Copying(), None, {"input_values": wave, "onsets": torch.zeros(1, 15, 88)}, tmp_path)


def test_a_loss_that_is_no_number_stops_and_keeps_its_batch(tiny_pack, tmp_path, has_usual_mode):
    """The weights stay finite, the batch lies in the folder, and the sentence names it."""

    class Poisoned:
        def __getitem__(self, index):
            return {"wave": np.zeros(12_800, np.int16), "onsets": np.zeros((20, 88), np.uint8)}

    codec = PianoEncodecModel.from_pretrained(tiny_pack / "codec", dtype=torch.float32)
    recipe = CodecRecipe(crop_seconds=0.4, excerpt_seconds=0.4, mixed_excerpts=2, batch_size=2, steps=2, bf16=False)
    objective = WholeObjective(codec, False)
    objective.forward = lambda batch: ({"mel": codec.encoder.layers[0].conv.bias.sum() * float("nan")}, None)
    with pytest.raises(RunError, match=r"a loss of step 0 is not finite .*bad_batch_0\.safetensors"):
        Run(objective, recipe, Poisoned(), tmp_path).train()
    assert load_file(tmp_path / "bad_batch_0.safetensors")["input_values"].shape == (2, 12_800)
    assert has_usual_mode([tmp_path / "bad_batch_0.safetensors"])
    assert all(p.isfinite().all() for p in codec.parameters()) and not list(tmp_path.glob("step_*"))


def test_the_batch_that_fits():
    """A line through two measurements: 1 GiB and 3 GiB a crop."""
    assert batch_that_fits(lambda size: 2**30 * (1 + 3 * size), 2**30 * 100) == 32  # 33 would take 100
    assert batch_that_fits(lambda size: 2**30 * (1 + 3 * size), 2**30 * 20) == 6
    assert batch_that_fits(lambda size: 2**20, 2**30 * 100) == 128
    with pytest.raises(RunError, match="not even one crop fits"):
        batch_that_fits(lambda size: 2**30 * (1 + 3 * size), 2**30 * 3)


def test_recipes_are_refused_in_one_sentence(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    shared = ["listener", "--config", str(path), "--audio", "x.npy", "--output-dir", str(tmp_path / "out")]
    for text, sentence in {
        "batch_size: big": "batch_size is a number of crops or auto",
        "crop_seconds: 20": "do not fit into excerpts",
        "weights: {loud: 1}": "unknown loss weights",
        "speed: 3": "unknown keys ['speed']",
        "a: [": "is not YAML",
    }.items():
        path.write_text(text)
        assert train_codec.main(shared) == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    path.write_bytes(b"\xff")
    assert train_codec.main(shared) == 2 and f"{path}: is not YAML" in capsys.readouterr().err
    path.write_text("")
    with pytest.raises(SystemExit, match="2"):
        train_codec.main([*shared, "--batch-size", "few"])
    assert "'few' is neither a number nor auto" in capsys.readouterr().err
    assert train_codec.main([*shared, "--audio", "x.npy", "y.wav"]) == 2
    assert "do not go together" in capsys.readouterr().err
    for arguments in (["whole"], ["encoder"], ["decoder", "--features", "x"], ["encode", "--codec", "x"]):
        with pytest.raises(SystemExit, match="2"):
            train_codec.main([*arguments, *shared[1:]])
    assert "encode writes beside its pools, without --output-dir" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        train_codec.main(shared[:-2])
    assert "listener needs --output-dir" in capsys.readouterr().err
    for option in (["--validation", "x.npy"], ["--steps", "3"], ["--stop-after", "1"], ["--force"]):
        with pytest.raises(SystemExit, match="2"):
            train_codec.main(["codebooks", "--codec", "x", *shared[1:], *option])
        assert f"{option[0]} is for what learns step by step" in capsys.readouterr().err


def test_a_codec_of_another_form_is_refused(whole, tmp_path, capsys):
    fields = {"num_filters": 2, "hidden_size": 16, "num_lstm_layers": 1, "upsampling_ratios": [5, 4, 4, 4]}
    PianoEncodecModel(PianoEncodecConfig(**fields)).save_pretrained(tmp_path / "other")
    for part in ("whole", "codebooks"):
        assert train_codec.main([part, *whole("out", "--codec", tmp_path / "other")[1:]]) == 2
        assert "1 channels of 32000 Hz, 320 samples a frame" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_recipes_of_the_repository_are_read():
    found = sorted(ROOT.glob("recipes/codec_*.yaml"))
    assert len(found) >= 4 and all(CodecRecipe.from_yaml(path).steps > 0 for path in found)
