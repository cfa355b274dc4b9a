# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.train` on tiny data: it learns, resumes as if it had never stopped, and refuses foreign codes."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_midivalle import MidiValleForConditionalGeneration
from scripts import train
from scripts.assemble_model import load_part
from scripts.data import TrainingStream, shard_files
from tokenization import MidiValleTokenizer

RECIPE = """
preset: tiny
batch_size: 2
steps: 4
warmup_steps: 1
learning_rate: 0.01
weight_decay: 0.0
prompt_seconds: [0.5, 1.0]
bf16: false
save_steps: 2
validation_batches: 1
"""


@pytest.fixture
def run(tiny_data, tiny_pack, tmp_path):
    """`run(part, output, ...)` -> exit code of the command."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def command(part, output, *more):
        arguments = ["--config", str(tmp_path / "recipe.yaml"), "--part", part, "--data", str(tiny_data)]
        arguments += ["--codec", str(tiny_pack / "codec"), "--output-dir", str(output)]
        return train.main([*arguments, *map(str, more)])

    return command


def make_run(part, data, codec, output, **changes):
    """A `Run` and an endless repetition of one batch of two items, one prompted stretch."""
    recipe = train.TrainRecipe("tiny", batch_size=2, steps=60, warmup_steps=1, learning_rate=0.01, weight_decay=0.0)
    recipe.bf16 = False
    for name, value in changes.items():
        setattr(recipe, name, value)
    stream = TrainingStream(shard_files(data, "train"), MidiValleTokenizer(), 2, (0.5, 1.0), 0.0)
    batch = next(iter(stream))
    codebooks = train.load_codebooks(codec)
    return train.Run(recipe, part, stream, [batch], codebooks, output), itertools.repeat(batch)


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_resumed_equals_uninterrupted(run, part, tmp_path):
    """Four steps, and two after the checkpoint of the second, end with equal weights, averages and optimiser."""
    assert run(part, tmp_path / "whole") == 0
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [
        "log.jsonl",
        "model",
        "step_0000002",
        "step_0000004",
    ]
    shutil.copytree(tmp_path / "whole" / "step_0000002", tmp_path / "parts" / "step_0000002")
    assert run(part, tmp_path / "parts") == 0
    states = [load_file(tmp_path / name / "step_0000004" / "tensors.safetensors") for name in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    places = [json.loads((tmp_path / name / "step_0000004" / "state.json").read_text()) for name in ("whole", "parts")]
    assert places[0]["stream"] == places[1]["stream"] and places[0]["frames"] == places[1]["frames"]
    model = AutoModel.from_pretrained(tmp_path / "parts" / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[0][f"average.{name}"])
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    stages = ["0"] if part == "ar" else ["1", "2", "3"]
    assert all(f"validation_code_{stage}" in rows[-1] for stage in stages) and rows[-1]["step"] == 4
    assert run(part, tmp_path / "whole") == 0  # nothing is left to do: no step, no error


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_every_parameter_moves_and_the_loss_falls(part, tiny_data, tiny_pack, tmp_path):
    run, batches = make_run(part, tiny_data, tiny_pack / "codec", tmp_path / "run")
    before = {name: value.detach().clone() for name, value in run.core.named_parameters()}
    run.model.train()
    losses = []
    for run.step in range(40):
        losses.append(run._train_step(batches)["code"])
    assert losses[0] == pytest.approx(7.6, abs=0.5)  # ln 2048: nothing is known yet
    assert sum(losses[-4:]) / 4 < 0.6 * losses[0]
    still = [name for name, value in run.core.named_parameters() if torch.equal(value, before[name])]
    assert not still


def test_accumulated_steps_equal_one_larger_batch(tiny_data, tiny_pack, tmp_path):
    """Two halves of a batch, accumulated, move the weights as the whole does."""
    run, whole = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "whole", batch_size=2, own_share=0.0)
    batch = next(whole)
    halves = itertools.cycle([{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)])
    run._train_step(whole)
    expected = {name: value.detach().clone() for name, value in run.core.named_parameters()}
    run, _ = make_run(
        "ar", tiny_data, tiny_pack / "codec", tmp_path / "halves", gradient_accumulation_steps=2, own_share=0.0
    )
    run._train_step(halves)
    for name, value in run.core.named_parameters():
        assert torch.allclose(value, expected[name], atol=2e-3), name  # Adam's first step is a sign: 1e-2 each


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_published_weights_go_on_by_their_own_objective(run, part, make_model, tiny_pack, tmp_path, capsys):
    """From a whole model's folder, one decoder, and its parts go together again; our objective on request."""
    model = make_model("published")
    model.save_pretrained(tmp_path / "whole")
    recipe = RECIPE + "init_from: {}\nmark_held: false\nno_prompt_share: 1.0\n".format(tmp_path / "whole")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert run(part, tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [value for name, value in rows[-1].items() if name.startswith("validation_code")]
    assert min(losses) > 100 and not any("latent" in name for name in rows[-1])  # sums, and nothing beside them
    trained = AutoModel.from_pretrained(tmp_path / "out" / "model")
    assert trained.config.objective == "published_sum"
    before = getattr(model, part).state_dict()
    alphas = {name for name in before if name.endswith("alpha")}
    still = {name for name, value in trained.state_dict().items() if torch.equal(value, before[name])}
    assert still >= alphas if part == "nar" else not still & alphas
    parts = {name: str(tmp_path / "whole") for name in ("codec", "ar", "nar")} | {part: str(tmp_path / "out" / "model")}
    joined = MidiValleForConditionalGeneration.from_sub_models(**{k: load_part(k, v) for k, v in parts.items()})
    assert torch.equal(getattr(joined, part).state_dict()[min(alphas)], trained.state_dict()[min(alphas)])
    (tmp_path / "recipe.yaml").write_text(recipe + f"{part}: {{objective: target_mean}}\n")
    assert run(part, tmp_path / "clean") == 0
    last = json.loads((tmp_path / "clean" / "log.jsonl").read_text().splitlines()[-1])
    assert max(value for name, value in last.items() if name.startswith("validation_code")) < 30
    (tmp_path / "recipe.yaml").write_text(RECIPE + "init_from: nowhere\n")
    assert run(part, tmp_path / "none") == 2 and "nowhere: holds no config.json" in capsys.readouterr().err


def test_bf16_trains_too(tiny_data, tiny_pack, tmp_path):
    run, batches = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "run", bf16=True)
    losses = [run._train_step(batches)["code"] for run.step in range(10)]
    assert losses[-1] < losses[0] and {p.dtype for p in run.core.parameters()} == {torch.float32}


def test_refusals(run, tiny_pack, tmp_path, capsys):
    """Another codec, a recipe with an unknown key, data that is not there: one sentence, exit code 2, no output."""
    shutil.copytree(tiny_pack / "codec", tmp_path / "codec")
    path = tmp_path / "codec" / "model.safetensors"
    tensors = load_file(path)
    tensors["quantizer.layers.0.codebook.embed"] += 1
    save_file(tensors, path)
    assert run("ar", tmp_path / "out", "--codec", tmp_path / "codec") == 2
    assert "was encoded by codec" in capsys.readouterr().err
    assert run("ar", tmp_path / "out", "--data", tmp_path) == 2
    assert "no train-*.parquet" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(RECIPE + "stepz: 3\n")
    assert run("ar", tmp_path / "out") == 2
    assert "unknown keys ['stepz']" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(RECIPE + "frame_steps: 1\n")
    assert run("nar", tmp_path / "out") == 2
    assert "frame_steps are for an AR" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data, tiny_pack, tmp_path):
    run, batches = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "run")
    with torch.no_grad():
        next(iter(run.core.parameters())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss nan at step 0"):
        run._train_step(batches)
