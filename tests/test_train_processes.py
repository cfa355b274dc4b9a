# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.train` in processes of its own: two under torchrun, killed at any moment, told to stop."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import modeling_midivalle  # noqa: F401  registers the decoders

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
preset: tiny
batch_size: 1
warmup_steps: 1
learning_rate: 0.01
prompt_seconds: [0.5, 1.0]
bf16: false
log_steps: 10
validation_batches: 1
"""
CHILD = """
import sys
from safetensors.torch import save_file
from scripts import train
args = train.parse(sys.argv[2:])
run = train.make_run(args, train.TrainRecipe.from_yaml(args.config), args.part, args.output_dir)
def keep():
    if run.accelerator.is_main_process:
        save_file({n: p.grad.clone() for n, p in run.core.named_parameters() if p.grad is not None}, sys.argv[1])
run.optimizer.step = keep
run.train()
"""
pytestmark = pytest.mark.slow


@pytest.fixture
def command(tiny_data, tiny_pack, tmp_path):
    """`command(output, processes, *more, ...)` -> arguments of a fresh interpreter; recipe from `tmp_path`; `config` is
    one of recipes/accelerate."""

    def arguments(output, processes=1, *more, child=None, config=None, part="ar"):
        program = ["-m", "scripts.train"] if child is None else [str(child[0]), str(child[1])]
        launch = (
            [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        )
        if config:
            launch = ["-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{config}.yaml"]
        options = ["--config", str(tmp_path / "recipe.yaml"), "--part", part, "--data", str(tiny_data)]
        options += ["--codec", str(tiny_pack / "codec"), "--output-dir", str(output)]
        return [sys.executable, *launch, *program, *options, *more]

    return arguments


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(arguments):
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def same(one, other, ranks=1):
    names = ["tensors.safetensors", *(f"rank_{rank:04d}.safetensors" for rank in range(ranks))]
    for name in names:
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items()), name


@pytest.mark.parametrize("processes", [1, 2])
def test_four_steps_are_two_and_two_more(processes, command, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE + "steps: 4\nsave_steps: 2\n")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(command(whole, processes))
    parts.mkdir()
    (whole / "step_0000002").rename(parts / "step_0000002")
    assert "continuing from" in run(command(parts, processes))
    same(whole / "step_0000004", parts / "step_0000004", processes)
    if processes == 2:  # each process has its own random states; and one process may go on with what two have begun
        ranks = [load_file(whole / "step_0000004" / f"rank_{rank:04d}.safetensors")["rng.torch"] for rank in range(2)]
        assert not torch.equal(*ranks)
        (tmp_path / "recipe.yaml").write_text(RECIPE + "steps: 5\nsave_steps: 2\n")
        run(command(parts, 1, "--force"))
        assert (parts / "step_0000005").is_dir()


def test_two_processes_have_the_gradients_of_one(command, tmp_path):
    """One step of two processes is one step of one that accumulates two batches: dropout off, fp32."""
    dropout = "".join(
        f"  {name}: 0.0\n" for name in ("dropout", "attention_dropout", "embedding_dropout", "midi_embedding_dropout")
    )
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    found = {}
    for processes, accumulation in ((1, 4), (2, 2)):
        accumulate = f"gradient_accumulation_steps: {accumulation}\n"
        (tmp_path / "recipe.yaml").write_text(RECIPE + f"steps: 1\n{accumulate}ar:\n{dropout}")
        gradients = tmp_path / f"{processes}.safetensors"
        run(command(tmp_path / f"run{processes}", processes, child=(child, gradients)))
        found[processes] = load_file(gradients)
    assert found[1].keys() == found[2].keys() and len(found[1]) > 10
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-4, atol=1e-6, msg=name)


FRAMES_FIRST = "frame_steps: 2\ngradient_accumulation_steps: 2\n"
AS_PUBLISHED = """
preset: published
codebook_start: false
mark_held: false
no_prompt_share: 1.0
optimizer: scaled_adam
schedule: eden
weight_decay: 0.0
nar: {hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 2, intermediate_size: 64}
"""


@pytest.mark.parametrize(
    ("part", "changes"), [("ar", FRAMES_FIRST), ("nar", AS_PUBLISHED), ("ar", "optimizer: muon\n")]
)
def test_fsdp_is_ddp_but_for_rounding(part, changes, command, tmp_path):
    """Whole checkpoints and folders, equal to DDP's after four steps to a hundredth of the learning rate, since Adam
    makes much of a gradient that rounding alone decides; going on from the second is exact."""
    (tmp_path / "recipe.yaml").write_text(RECIPE + "steps: 4\nsave_steps: 2\n" + changes)
    ddp, whole, parts = (tmp_path / name for name in ("ddp", "whole", "parts"))
    run(command(ddp, config="ddp", part=part))
    run(command(whole, config="fsdp", part=part))
    wanted, found = (load_file(folder / "step_0000004" / "tensors.safetensors") for folder in (ddp, whole))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)
    parts.mkdir()
    (whole / "step_0000002").rename(parts / "step_0000002")
    assert "continuing from" in run(command(parts, config="fsdp", part=part))
    same(whole / "step_0000004", parts / "step_0000004", 2)
    states = [torch.load(f / "step_0000004" / "optimizers.pt")[0]["state"] for f in (whole, parts)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    saved = AutoModel.from_pretrained(whole / "model").state_dict()
    assert all(torch.equal(value, found[f"average.{name}"]) for name, value in saved.items()) and len(saved) > 10


def test_killed_again_and_again_it_ends_with_the_same_weights(command, tmp_path):
    """Ten kills without warning at random moments, start-up and saving among them; then the run is let end."""
    (tmp_path / "recipe.yaml").write_text(RECIPE + "steps: 200\nsave_steps: 3\n")
    run(command(tmp_path / "whole"))
    rng, kills = random.Random(0), 0
    while kills < 10:
        child = subprocess.Popen(
            command(tmp_path / "parts"), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )
        lines = rng.randrange(1, 12)  # of output: a row of figures or two every third step
        for _, line in zip(range(lines), child.stdout):
            assert line
        time.sleep(rng.random() * 0.3)
        kills += child.poll() is None
        child.kill()
        child.wait()
        if (tmp_path / "parts" / "step_0000200").is_dir():
            break
    assert kills >= 5
    run(command(tmp_path / "parts"))
    same(tmp_path / "whole" / "step_0000200", tmp_path / "parts" / "step_0000200")


def test_told_to_stop_it_saves_within_seconds(command, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE + "steps: 100000\nsave_steps: 100000\n")
    child = subprocess.Popen(command(tmp_path / "run"), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert "'step': 10" in next(line for line in child.stdout if "'step'" in line)
    began = time.time()
    child.send_signal(signal.SIGTERM)
    said = child.stdout.read()
    assert child.wait() == 0 and time.time() - began < 30
    assert "(SIGTERM); saved" in said and list((tmp_path / "run").glob("step_*"))
