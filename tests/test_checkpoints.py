# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Checkpoints: exact, whole or passed over, never half written; one run a folder; settings that may not change."""

import contextlib
import errno
import importlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts import unfinished
from scripts.codec.pool_files import PoolFiles
from scripts.training import checkpoints
from scripts.training.checkpoints import MANIFEST, OPTIMIZERS, TENSORS, Checkpoints, gradients_of, restore_gradients
from scripts.training.processes import FolderLock, RunError, StopSignals, any_process, check_unchanged, settings_of
from scripts.unfinished import WriteError, check_output_folder, unfinished_file, unfinished_folder, write_json


def content(step):
    """Tensors, optimisers and state that tell their step."""
    tensors = {"a": torch.full((3, 2), float(step)), "b": torch.arange(4)}
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return tensors, [optimizer.state_dict()], {"loss": 0.1 * step}


def test_what_is_saved_comes_back_with_random_states_and_gradients(tmp_path, has_usual_mode):
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    random.gauss(0, 1), np.random.standard_normal()  # each keeps a second value back
    tensors, optimizers, state = content(3)
    model = torch.nn.Linear(2, 3)
    model.weight.grad = torch.ones(3, 2)
    Checkpoints(tmp_path).save(3, tensors, optimizers, state, gradients_of(model), micro_step=1)

    def draws():
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()

    expected = draws()
    found = Checkpoints(tmp_path).newest()
    assert (found.path.name, found.step, found.micro_step, found.state) == ("step_0000003_001", 3, 1, state)
    assert found.restore_rng() and draws() == expected
    assert all(torch.equal(value, tensors[name]) for name, value in found.tensors.items())
    assert torch.equal(found.optimizers[0]["state"][0]["exp_avg"], optimizers[0]["state"][0]["exp_avg"])
    model.weight.grad, model.bias.grad = None, torch.ones(3)
    restore_gradients(model, found.gradients)
    assert torch.equal(model.weight.grad, torch.ones(3, 2)) and model.bias.grad is None
    assert has_usual_mode(found.path.glob("*.safetensors"))


def test_what_two_processes_have_begun_goes_on_in_one(tmp_path, monkeypatch):
    """It has the sum of their gradients, and another process none; nor random states, if it was not there."""
    path = Checkpoints(tmp_path).save(3, *content(3), {"w": torch.ones(2)}, micro_step=1)
    first, second = (path / checkpoints.rank_file(number) for number in range(2))
    save_file({name: 2 * v if name == "gradient.w" else v for name, v in load_file(first).items()}, second)
    with safe_open(first, "pt") as file:
        save_file(load_file(second) | {"gradient.v": torch.ones(1)}, second, file.metadata())
    checkpoints._write_manifest(path, {"step": 3, "micro_step": 1, "world_size": 2})
    found = Checkpoints(tmp_path).newest()
    assert found.world_size == 2 and found.gradients["w"].tolist() == [3, 3] and found.gradients["v"].tolist() == [1]
    monkeypatch.setattr(checkpoints, "world_size", lambda: 2)
    assert Checkpoints(tmp_path).newest().gradients["w"].tolist() == [1, 1]
    monkeypatch.setattr(checkpoints, "world_size", lambda: 3)
    monkeypatch.setattr(checkpoints, "rank", lambda: 2)
    found, before = Checkpoints(tmp_path).newest(), torch.get_rng_state()
    assert found.gradients == {} and not found.restore_rng() and torch.equal(torch.get_rng_state(), before)


def test_the_newest_whole_ones_stay_and_order_is_by_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for step, micro in ((1, 0), (2, 0), (2, 3), (10, 0)):
        checkpoints.save(step, *content(step), micro_step=micro)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000002_003", "step_0000010"]
    assert checkpoints.newest().step == 10
    before = (tmp_path / "step_0000010" / MANIFEST).stat().st_mtime_ns
    checkpoints.save(10, *content(11))  # whole already: stays
    assert (tmp_path / "step_0000010" / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(RunError, match="at least one"):
        Checkpoints(tmp_path, keep=0)


def flip(path):
    data = bytearray((path / TENSORS).read_bytes())
    data[-1] ^= 1
    (path / TENSORS).write_bytes(data)


def cut(path):
    data = (path / OPTIMIZERS).read_bytes()
    (path / OPTIMIZERS).write_bytes(data[: len(data) // 2])


def empty_manifest(path):
    (path / MANIFEST).write_text(json.dumps({"step": 2, "micro_step": 0, "world_size": 1, "files": {}}))


DAMAGES = {
    "tensors.safetensors has changed": flip,
    "optimizers.pt has \\d+ bytes, not": cut,
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "rank_0000.safetensors has \\d+ bytes": lambda path: (path / "rank_0000.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    ),
    "MANIFEST.json lacks": empty_manifest,
    "MANIFEST.json is missing or unreadable": lambda path: (path / MANIFEST).write_text("{"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_one_is_named_and_passed_over(reason, tmp_path, capsys):
    for step in (1, 2):
        Checkpoints(tmp_path).save(step, *content(step))
    DAMAGES[reason](tmp_path / "step_0000002")
    checkpoints = Checkpoints(tmp_path)
    found = checkpoints.newest()
    assert found.step == 1 and float(found.tensors["a"][0, 0]) == 1
    assert re.search(rf"passed over: step_0000002 \({reason}", capsys.readouterr().out)
    checkpoints.save(2, *content(2))  # the damaged one is written anew
    assert Checkpoints(tmp_path).newest().step == 2
    for step in (1, 2):
        (tmp_path / f"step_{step:07d}" / MANIFEST).unlink()
    with pytest.raises(RunError, match="no checkpoint is whole: step_0000002"):
        Checkpoints(tmp_path).newest()


def test_what_a_kill_during_saving_leaves_is_cleared(tmp_path):
    Checkpoints(tmp_path).save(1, *content(1))
    (tmp_path / ".step_0000002.tmp").mkdir()
    (tmp_path / ".step_0000002.tmp" / TENSORS).write_bytes(b"half")
    assert Checkpoints(tmp_path).newest().step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001"]


@pytest.mark.parametrize("limit", [100, 100_000, 500_000])  # stops at the first file, the weights, the optimiser
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(limit, tmp_path):
    """A limit on the size of files gives what a full disk gives: a write that fails half-way."""
    tensors, optimizers, state = content(2)
    optimizers[0]["state"][0]["exp_avg"] = torch.zeros(1000, 400)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *content(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RunError) as caught:
            checkpoints.save(2, tensors | {"c": torch.zeros(50_000)}, optimizers, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sentence = str(caught.value)
    assert "step_0000002 could not be written" in sentence and "MiB are free" in sentence and "\n" not in sentence
    assert "step_0000001 is whole" in sentence and [p.name for p in tmp_path.iterdir()] == ["step_0000001"]
    assert Checkpoints(tmp_path).newest().step == 1


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), unfinished_file(path) as partial:
        partial.write_text("half")
        assert partial.name.startswith(".") and json.loads(path.read_text()) == {"a": 1}
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(WriteError, match=f"^{tmp_path}/none/a.json: cannot be written .No such file"):
        write_json(tmp_path / "none" / "a.json", {})


OUTPUTS = {  # words of commands whose other files are not there either: the folder is looked at before
    "train": "--config recipes/starter_ar.yaml --data none --codec none --output-dir",
    "train_codec": "whole --config recipes/codec_finetune.yaml --audio none.wav --codec none --output-dir",
    "prepare_dataset": "--codec none --pairs none --output-dir",
    "adapt": "none.wav none.mid --output-dir",
    "evaluate": "--model none --midi-root none --piano none --output-dir",
    "evaluate_long": "--midi-root none --minutes 2 --output-dir",
    "render": "none.mid --output-dir",
    "assemble_model": "--codec none --ar none --nar none --output",
    "convert_checkpoint": "--codec none --output",
    "examples": "midi --output",
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_folder_that_cannot_be_is_refused_first(command, tmp_path, monkeypatch, capsys):
    """A file, what would lie in a file, and a folder that is closed."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    words, file = OUTPUTS[command].split(), tmp_path / "file"
    file.write_text("mine")

    def said_of(output):
        assert importlib.import_module(f"scripts.{command}").main([*words, str(output)]) == 2
        return capsys.readouterr().err.partition(f"{words[-1]} ")[2]

    assert said_of(file) == f"{file}: is not a folder; give another {words[-1]}\n"
    assert said_of(file / "out") == f"{file / 'out'}: {file} is not a folder; give another {words[-1]}\n"

    def closed(dir):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(unfinished, "TemporaryFile", closed)
    sentence = f"{tmp_path} cannot be written to (Permission denied); give another {words[-1]}\n"
    assert said_of(tmp_path / "out") == f"{tmp_path / 'out'}: {sentence}"
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_what_is_written_beside_a_folder_needs_room_there(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    file = unfinished.TemporaryFile

    def closed_above(dir):
        if dir != tmp_path / "open":
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return file(dir=dir)

    monkeypatch.setattr(unfinished, "TemporaryFile", closed_above)
    check_output_folder(tmp_path / "open")
    check_output_folder(tmp_path / "open" / "a" / "b", beside=True)
    with pytest.raises(
        WriteError, match=f"^--output {tmp_path}/open: {tmp_path} cannot be written to .Permission denied"
    ):
        check_output_folder(tmp_path / "open", "--output", beside=True)
    with pytest.raises(WriteError, match=f"^--output {tmp_path}/open/file: is not a folder"):
        (tmp_path / "open" / "file").touch()
        PoolFiles({tmp_path / "open" / "file" / "a.npy": ((1,), np.int16)}, {})


def test_of_a_folder_that_is_not_finished_nothing_stays(tmp_path):
    """Neither what was to hold it and was not there before; but what was moved out of it, and whatever was there."""
    (tmp_path / "mine").mkdir()
    for fails in (True, False):
        output = tmp_path / "mine" / "a" / "b" / "out"
        with contextlib.suppress(ZeroDivisionError), unfinished_folder(output) as folder:
            (folder / "file").write_text("x")
            if fails:
                raise ZeroDivisionError
            folder.rename(output)
        found = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))]
        assert found == (["mine"] if fails else ["mine", "mine/a", "mine/a/b", "mine/a/b/out", "mine/a/b/out/file"])


PARENT = """
import multiprocessing, os, sys, time
from scripts.training.processes import follow_parent
def work():
    follow_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)
multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(60)
"""


def test_a_worker_ends_with_the_process_that_started_it():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        assert parent.stdout.read() == ""  # ends when nobody can write to it any more


HOLDER = "import sys, time; from scripts.training.processes import FolderLock\n"
HOLDER += "with FolderLock(sys.argv[1]):\n  print('has it', flush=True); time.sleep(60)"


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_no_hindrance(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "has it\n"
        with pytest.raises(RunError, match=f"another run is at work here \\(pid {child.pid}\\)"), FolderLock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
        with pytest.raises(RunError, match="another run"), FolderLock(tmp_path):
            pass
    with FolderLock(tmp_path):
        pass


def test_a_signal_is_a_flag_once(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert not any_process(stop.received)
        os.kill(os.getpid(), signal.SIGTERM)
        assert any_process(stop.received) and stop.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_changed_settings_are_refused_with_both_values(capsys):
    recorded = json.loads(json.dumps(settings_of({"rate": 0.1, "betas": (0.9, 0.98)}, data="x")))
    check_unchanged(recorded, settings_of({"rate": 0.1, "betas": (0.9, 0.98)}, data="x"))
    now = settings_of({"rate": 0.2, "betas": (0.9, 0.98)}, data="x")
    now["versions"]["torch"] = "1.0"
    with pytest.raises(RunError, match=r"recipe.rate was 0.1, is 0.2; versions.torch was .*, is 1.0 \(--force"):
        check_unchanged(recorded, now)
    check_unchanged(recorded, now, force=True)
    assert "forced: recipe.rate was 0.1, is 0.2" in capsys.readouterr().out
