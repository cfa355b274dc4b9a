# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.train` on tiny data: it learns, goes on after any interruption, refuses what is off."""

import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_midivalle import MidiValleForConditionalGeneration, PianoEncodecModel
from scripts import train
from scripts.dataset.shards import Shards
from scripts.decoders.data import TrainingStream, shard_files
from scripts.decoders.optimizers import make_optimizer
from scripts.decoders.run import BadLossError, Run
from scripts.decoders.validation import figures
from scripts.models.trained_parts import load_codebooks, load_part
from scripts.training import publishing, run_log
from scripts.training.model_card import NOTE, decoder_card, public_name
from scripts.unfinished import WriteError
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
log_steps: 1
validation_batches: 1
"""
NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "embedding_dropout", "midi_embedding_dropout"), 0.0)


@pytest.fixture
def run(tiny_data, tiny_pack, tmp_path):
    """`run(part, output, ...)` -> exit code of the command."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def command(part, output, *more):
        arguments = ["--config", str(tmp_path / "recipe.yaml"), "--part", part, "--data", str(tiny_data)]
        arguments += ["--codec", str(tiny_pack / "codec"), "--output-dir", str(output)]
        return train.main([*arguments, *map(str, more)])

    return command


def make_run(part, data, codec, output, batches=None, **changes):
    """A `Run` on the training items, or on `batches` for ever, with a constant rate of 0.01."""
    settings = {"preset": "tiny", "batch_size": 2, "steps": 60, "warmup_steps": 1, "learning_rate": 0.01}
    settings |= {"weight_decay": 0.0, "bf16": False, "prompt_seconds": (0.5, 1.0), "no_prompt_share": 0.0}
    recipe = train.TrainRecipe(**(settings | changes))
    rest = (recipe.prompt_seconds, recipe.no_prompt_share)
    stream = TrainingStream(shard_files(data, "train"), MidiValleTokenizer(), recipe.batch_size, *rest)
    validation = [next(iter(TrainingStream(shard_files(data, "train"), MidiValleTokenizer(), 2, *rest)))]
    if batches is not None:
        stream = Repeated(batches)
    codebooks = load_codebooks(codec)
    model = train.start_model(recipe, part, codebooks)
    return Run(recipe, part, model, stream, validation, codebooks, output, None, codec)


class Repeated:
    """A stream that gives the same batches for ever."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return itertools.cycle(self.batches)

    def state_dict(self):
        return {"epoch": 0}


@pytest.fixture
def batch(tiny_data):
    """Two items with prompts of one length."""
    return next(iter(TrainingStream(shard_files(tiny_data, "train"), MidiValleTokenizer(), 2, (0.5, 0.5), 0.0)))


def content(folder):
    """All tensors of a checkpoint, its state, and the log without times."""
    tensors = load_file(folder / "tensors.safetensors")
    optimizers = torch.load(folder / "optimizers.pt", weights_only=True)
    for number, state in optimizers[0]["state"].items():
        tensors |= {f"optimizer.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors |= load_file(folder / "rank_0000.safetensors")
    state = json.loads((folder / "state.json").read_text()) | {"seconds": 0}
    rows = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    return tensors, state, [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]


def assert_same(one, other):
    """Two checkpoints hold the same bits, and their logs the same figures."""
    one, other = content(one), content(other)
    assert one[0].keys() == other[0].keys()
    assert not [name for name, value in one[0].items() if not torch.equal(value, other[0][name])]
    assert one[1] == other[1] and one[2] == other[2]


def test_exported_folders_have_a_card_that_works(run, run_python, tiny_data, tmp_path):
    """Its example is run as it stands; it is written anew until somebody makes it their own."""
    assert run("ar", tmp_path / "out") == 0
    path = tmp_path / "out" / "model" / "README.md"
    card = ModelCard.load(path)
    found = card.data.to_dict()
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "audio-to-audio")
    assert not {"license", "base_model", "datasets"} & set(found) and "None has been chosen yet" in card.text
    assert f"Data: `{tiny_data.name}`. Steps done: 4, by this recipe" in card.text and "preset: tiny" in card.text
    row = [row for row in run_log.read_log(tmp_path / "out" / "log.jsonl") if "validation_code_0" in row][-1]
    assert (
        "Validation at step 4" in card.text and f"| validation_code_0 | {row['validation_code_0']:.4g} |" in card.text
    )
    best = (tmp_path / "out" / "best" / "README.md").read_text()
    assert re.search(r"Validation at step [24],", best) and "# out/best" in best
    assert not re.search(rf"{tmp_path}|{tiny_data.parent}", card.content + best)  # no path of this machine
    example = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    said = "assert 'transformers_modules' in type(decoder).__module__\nprint(type(decoder).__name__)"
    assert run_python(tmp_path, example + said) == "MidiValleARModel\n"
    path.write_text(card.content.replace(NOTE, "Mine."))
    assert run("ar", tmp_path / "out", "--licence", "mit") == 0  # the weights of the last checkpoint, again
    assert "Mine." in path.read_text() and "license" not in ModelCard.load(path).data.to_dict()
    path.unlink()
    assert run("ar", tmp_path / "out", "--licence", "mit") == 0
    assert ModelCard.load(path).data.license == "mit" and "## Licence\n\nmit." in path.read_text()


def test_a_card_names_what_the_run_was_told(tmp_path):
    """The licence of the weights that it began with, data of the Hub; no path, no password."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# Base\n")
    recipe = train.TrainRecipe(init_from=str(tmp_path / "base"))
    about = (recipe, "owner/data@v1", str(tmp_path / "codes"), None, "owner/name")
    card = ModelCard(decoder_card("nar", *about).text("owner/name", 7))
    found = card.data.to_dict()
    assert (found["license"], found["datasets"]) == ("cc-by-nc-sa-4.0", ["owner/data"])
    assert "Begun with the weights of `base`. Data: `owner/data@v1`. Steps done: 7" in card.text
    assert (
        "init_from: base" in card.text
        and "with codes of the codec `codes`." in card.text
        and "Validation" not in card.text
    )
    assert "licence holds for them too: cc-by-nc-sa-4.0." in card.text and str(tmp_path) not in card.content
    assert 'from_pretrained("owner/name", trust_remote_code=True)' in card.text
    assert public_name("https://me:secret@example.org/data/v1?token=1") == "https://example.org/data/v1"
    assert public_name("hf://datasets/owner/data") == "hf://datasets/owner/data"
    assert public_name(tmp_path / "FONT.sf2:0") == "FONT.sf2:0"


def test_weights_are_not_replaced_by_a_run_that_begins_anew(run, tmp_path, capsys):
    """Someone has removed the checkpoints of a finished run, and starts it again."""
    assert run("ar", tmp_path / "out") == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for folder in (tmp_path / "out").glob("step_*"):
        kept = {path: content for path, content in kept.items() if folder not in path.parents}
        shutil.rmtree(folder)
    assert run("ar", tmp_path / "out") == 2
    assert "model: is there, but no checkpoint to go on from" in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_splits_with_and_without_pedals_are_refused(run, tiny_data, tmp_path, capsys):
    """Validation would be of other notes than training."""
    shutil.copytree(tiny_data, tmp_path / "data")
    for file in (tmp_path / "data").glob("train-*"):
        table = pq.read_table(file)
        about = json.loads(table.schema.metadata[b"midivalle"]) | {"sustain": "ignore"}
        metadata = table.schema.metadata | {b"midivalle": json.dumps(about).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), file)
    assert run("ar", tmp_path / "out", "--data", tmp_path / "data") == 2
    said = "was made differently, train with --sustain ignore, validation with --sustain extend: make one of them anew"
    assert said in capsys.readouterr().err


@pytest.mark.draws
def test_a_run_without_a_figure_ends_well(tiny_data, tiny_pack, tmp_path):
    """Shorter than `log_steps`, and with no validation: there is nothing to draw."""
    run = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "out", steps=1, log_steps=9)
    run.validation = []
    assert run.train() and (tmp_path / "out" / "model").is_dir()
    assert not (tmp_path / "out" / "learning_curves.png").exists()


@pytest.mark.draws
@pytest.mark.parametrize("part", ["ar", "nar"])
def test_resumed_equals_uninterrupted(run, part, tmp_path):
    """Four steps, and two after the checkpoint of the second, by command line."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(part, whole) == 0
    names = [".lock", "best", "learning_curves.png", "log.jsonl", "model", "step_0000002", "step_0000004"]
    assert sorted(p.name for p in whole.iterdir()) == names
    parts.mkdir()
    shutil.copytree(whole / "step_0000002", parts / "step_0000002")
    shutil.copy(whole / "log.jsonl", parts)  # rows of later steps are made again, not doubled
    assert run(part, parts) == 0
    assert_same(whole / "step_0000004", parts / "step_0000004")
    model = AutoModel.from_pretrained(parts / "model")
    average = load_file(whole / "step_0000004" / "tensors.safetensors")
    assert all(torch.equal(value, average[f"average.{name}"]) for name, value in model.state_dict().items())
    rows = content(whole / "step_0000004")[2]
    stages = ["0"] if part == "ar" else ["1", "2", "3"]
    assert all(0 <= rows[-1][f"validation_top10_{stage}"] <= 1 for stage in stages) and rows[-1]["step"] == 4
    assert rows[-1]["hours"] == pytest.approx(4 * 2 / 3600, rel=1e-5)  # targets of 1 s, two a step
    losses = [sum(row[f"validation_code_{s}"] for s in stages) for row in rows if f"validation_code_{stages[0]}" in row]
    best = AutoModel.from_pretrained(whole / "best").state_dict()
    last_is_best = losses[-1] == min(losses)
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items()) == last_is_best
    before = (whole / "log.jsonl").read_text()
    assert run(part, whole) == 0 and (whole / "log.jsonl").read_text() == before  # nothing is left to do


@pytest.mark.parametrize("changes", [{}, {"optimizer": "scaled_adam", "schedule": "eden", "learning_rate": 0.05}])
def test_stopped_after_every_batch(changes, tiny_data, tiny_pack, tmp_path):
    """Eight interruptions, inside windows, between them and across epochs (of four batches), with dropout."""
    layout = {"steps": 4, "gradient_accumulation_steps": 2, "save_steps": 3, "log_steps": 3} | changes
    arguments = ("ar", tiny_data, tiny_pack / "codec")
    whole = make_run(*arguments, tmp_path / "whole", **layout)
    assert whole.train()
    for cut in range(1, 9):
        torch.manual_seed(cut)  # whatever another launch would begin with
        run = make_run(*arguments, tmp_path / "parts", **layout)
        run.resume()
        assert (run.step, run.micro_step) == divmod(cut - 1, 2)
        count = itertools.count()
        assert run.train(lambda count=count: next(count) == 1) == (cut == 8)
    assert_same(tmp_path / "whole" / "step_0000004", tmp_path / "parts" / "step_0000004")


def test_stopped_before_the_first_batch(tiny_data, tiny_pack, tmp_path):
    """Nothing is passed over that nobody has learned from; nor when that happens again later."""
    layout = {"steps": 2, "save_steps": 9, "log_steps": 9, "gradient_accumulation_steps": 2}
    arguments = ("ar", tiny_data, tiny_pack / "codec")
    assert make_run(*arguments, tmp_path / "whole", **layout).train()
    for stops in (0, 0, 3, 0, None):
        torch.manual_seed(99)
        run, count = make_run(*arguments, tmp_path / "parts", **layout), itertools.count()
        run.resume()
        assert run.train(lambda stops=stops, count=count: next(count) == stops) == (stops is None)
        if stops == 0 and not run.step:
            assert run.stream.position == 0
    assert_same(tmp_path / "whole" / "step_0000002", tmp_path / "parts" / "step_0000002")


def test_by_force_fewer_batches_make_a_step_and_another_seed_counts(tiny_data, tiny_pack, tmp_path):
    arguments = ("ar", tiny_data, tiny_pack / "codec", tmp_path / "out")
    layout = {"steps": 2, "save_steps": 9, "log_steps": 9}
    first, count = make_run(*arguments, gradient_accumulation_steps=8, **layout), itertools.count()
    assert not first.train(lambda: next(count) == 5) and first.micro_step == 5
    again = make_run(*arguments, gradient_accumulation_steps=2, seed=7, **layout)
    again.stream.seed = 7
    again.resume(force=True)
    assert again.stream.seed == 7 and again.train() and again.step == 2


def test_a_checkpoint_of_another_form_is_refused_by_force_too(run, tmp_path, capsys):
    assert run("ar", tmp_path / "out") == 0
    assert run("nar", tmp_path / "out", "--force") == 2
    assert "does not fit these settings; give another --output-dir" in capsys.readouterr().err


def test_interrupted_outside_of_a_run(run, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "make_run", interrupt)
    assert run("ar", tmp_path / "out") == 130
    assert "interrupted; start it again" in capsys.readouterr().err


def test_a_damaged_checkpoint_falls_back_and_ends_the_same(run, tmp_path, capsys):
    assert run("ar", tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "step_0000004" / "tensors.safetensors").write_bytes(b"0")
    assert run("ar", tmp_path / "parts") == 0
    assert "passed over: step_0000004 (tensors.safetensors has 1 byte," in capsys.readouterr().out
    assert_same(tmp_path / "whole" / "step_0000004", tmp_path / "parts" / "step_0000004")


def test_changed_settings_need_force(run, tmp_path, capsys):
    assert run("ar", tmp_path / "out") == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("steps: 4", "steps: 5").replace("save_steps: 2", "save_steps: 1"))
    capsys.readouterr()
    assert run("ar", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "recipe.steps was 4, is 5" in said.err and "continuing" not in said.out
    assert run("ar", tmp_path / "out", "--force") == 0
    assert f"continuing from {tmp_path / 'out' / 'step_0000004'}\n" in capsys.readouterr().out
    assert (tmp_path / "out" / "step_0000005").is_dir()


def test_validation_has_prompts_and_batches_as_there_are(tiny_data, tiny_pack, tmp_path, capsys):
    """Prompts of the recipe's lengths; of fewer items than a batch all are taken, and of no batch none."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = ["--config", str(tmp_path / "recipe.yaml"), "--data", str(tiny_data), "--codec", str(tiny_pack / "codec")]
    args = train.parse([*words, "--output-dir", str(tmp_path / "out")])
    rows = sum(Shards(shard_files(tiny_data, "validation")).rows)
    for changes, lengths in (
        ({"prompt_seconds": (0.5, 0.5)}, 25),
        ({"prompt_seconds": (0.5, 1.0)}, 50),
        ({"no_prompt_share": 1.0}, 0),
    ):
        recipe = train.TrainRecipe(preset="tiny", batch_size=rows + 1, validation_batches=1, **changes)
        (batch,) = train.make_run(args, recipe, "ar", tmp_path / "out").validation
        assert batch["prompt_lengths"].tolist() == [lengths] * rows
    recipe = train.TrainRecipe(preset="tiny", batch_size=2, validation_batches=0)
    assert train.make_run(args, recipe, "ar", tmp_path / "out").validation == []


def test_other_data_of_the_same_form_need_force(run, prepare_here, tiny_pack, tmp_path, capsys):
    """Made with another seed: the rows that are still to come would be others, and the best loss of others."""
    assert run("ar", tmp_path / "out") == 0
    source = ["--midi-root", tiny_pack / "midi", "--piano", tiny_pack / "piano", "--seed", 1]
    for split, items in (("train", 8), ("validation", 2)):
        prepare_here(tmp_path / "other", *source, "--split", split, "--items", items)
    assert run("ar", tmp_path / "out", "--data", str(tmp_path / "other")) == 2
    said = capsys.readouterr().err
    assert "data.rows was" in said and "data.validation_rows was" in said
    assert run("ar", tmp_path / "out", "--data", str(tmp_path / "other"), "--force") == 0


def test_a_signal_saves_inside_a_window_and_both_decoders_train_in_turn(run, tmp_path, monkeypatch, capsys):
    recipe = RECIPE + "gradient_accumulation_steps: 3\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    step = Run._micro_step

    def interrupted(self, batch):
        step(self, batch)
        if (self.part, self.step, self.micro_step) == ("ar", 1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_micro_step", interrupted)
        assert run("both", tmp_path / "out") == 0
    assert "stopped at step 1 (SIGTERM); saved" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out" / "ar").glob("step_*")) == ["step_0000001_002"]
    assert not (tmp_path / "out" / "nar").exists()
    assert run("both", tmp_path / "out") == 0 and run("ar", tmp_path / "whole") == 0
    assert_same(tmp_path / "whole" / "step_0000004", tmp_path / "out" / "ar" / "step_0000004")
    assert AutoModel.from_pretrained(tmp_path / "out" / "nar" / "model").config.num_codebooks == 4


def test_a_sharded_run_stops_between_windows(tiny_data, tiny_pack, batch, tmp_path):
    """FSDP keeps the gradients of an open window where no checkpoint reaches them."""
    size = {"batches": [batch], "gradient_accumulation_steps": 3}
    run = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "run", **size)
    run.sharded = True
    assert not run.train(lambda: run.micro_step or run.step)
    assert [p.name for p in (tmp_path / "run").glob("step_*")] == ["step_0000001"]


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_every_parameter_moves_and_one_batch_is_learned(part, tiny_data, tiny_pack, batch, tmp_path):
    changes = {part: NO_DROPOUT | {"hidden_size": 64}, "own_share": 0.0, "code_noise": 0.0, "latent_weight": 0.0}
    size = {"batches": [batch], "steps": {"ar": 120, "nar": 250}[part], "save_steps": 250, "average_decay": 0.0}
    run = make_run(part, tiny_data, tiny_pack / "codec", tmp_path / "run", **changes, **size)
    before = {name: value.detach().clone() for name, value in run.core.named_parameters()}
    run.train()
    losses = [row["code"] for row in run_log.read_log(tmp_path / "run" / "log.jsonl") if "code" in row]
    assert losses[-1] < 0.05 < losses[0]
    assert not [name for name, value in run.core.named_parameters() if torch.equal(value, before[name])]


def gradients(run, batches):
    """Gradients of one window of `batches`, as the optimiser would get them, and the losses in the log."""
    found = {}
    run.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in run.core.named_parameters()})
    for batch in batches:
        run._micro_step(batch)
    run._close_window()
    return found, run.logged


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_a_batch_of_eight_equals_eight_of_one(part, tiny_data, tiny_pack, tmp_path):
    """Rows of unequal lengths too: the loss is over the window's frames, and what is drawn goes by the row."""
    files = shard_files(tiny_data, "train")
    stream = TrainingStream(files, MidiValleTokenizer(), 8, (0.5, 0.5), 0.0)
    whole = next(iter(stream))
    rows = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(8)]
    options = {part: NO_DROPOUT, "code_noise": 0.0, "clip_norm": None, "log_steps": 100}
    one = make_run(part, tiny_data, tiny_pack / "codec", tmp_path / "a", batch_size=8, **options)
    eight = make_run(
        part, tiny_data, tiny_pack / "codec", tmp_path / "b", batch_size=1, gradient_accumulation_steps=8, **options
    )
    (wanted, losses), (got, others) = gradients(one, [whole]), gradients(eight, rows)
    assert losses["code"] == pytest.approx(others["code"], rel=1e-5)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, atol=2e-5 * float(value.abs().max() + 1e-3), rtol=1e-4, msg=name)
    short = [rows[0], {k: v[..., :60] if k == "audio_codes" else v for k, v in rows[1].items()}]
    frames = [int(row["audio_codes"].shape[2] - row["prompt_lengths"].sum()) for row in short]
    alone = [gradients(one, [row])[0] for row in short]
    both = gradients(one, short)[0]
    assert frames[0] != frames[1]
    name = "lm_head.weight" if part == "ar" else "norm.norm.weight"
    name = name if name in both else next(iter(both))
    if part == "ar":  # a NAR's second row would have another stage
        mean = sum(n * g[name] for n, g in zip(frames, alone)) / sum(frames)
        torch.testing.assert_close(both[name], mean, atol=1e-6, rtol=1e-4)


def test_gradients_are_clipped_to_their_norm_and_the_log_has_means(tiny_data, tiny_pack, batch, tmp_path):
    """The norm in the log is what it was; rates of the warm-up, and means over the steps since the last row."""
    size = {"batches": [batch], "steps": 4, "log_steps": 2, "warmup_steps": 8, "ar": NO_DROPOUT, "own_share": 0.0}
    clipped, free = (
        make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / str(norm), clip_norm=norm, **size)
        for norm in (1e-3, None)
    )
    (short, logged), (long, _) = gradients(clipped, [batch]), gradients(free, [batch])
    norms = [math.sqrt(sum(float(value.square().sum()) for value in found.values())) for found in (short, long)]
    assert norms == pytest.approx([1e-3, logged["gradient"][0]], rel=1e-4) and norms[1] > 0.01
    run = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "run", **size)
    losses, step = [], run._wrong
    run._wrong = lambda means, norm: losses.append(means["code"]) or step(means, norm)
    assert run.train()
    rows = [row for row in run_log.read_log(tmp_path / "run" / "log.jsonl") if "code" in row]
    assert [row["code"] for row in rows] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-5)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01 * 1.5 / 8, 0.01 * 3.5 / 8])


def test_averages_forget_the_first_weights(tiny_data, tiny_pack, tmp_path):
    """They hardly remember in the first steps, and `average_decay` of what they were in later ones."""
    run = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "run", average_decay=0.5)
    name, weight = next(iter(run.core.named_parameters()))
    for step, left in ((0, 0.1), (5, 0.4), (200, 0.5)):
        run.step = step
        with torch.no_grad():
            weight.fill_(0.0)
            run.average[name].fill_(1.0)
        run._move_average()
        torch.testing.assert_close(run.average[name], torch.full_like(weight, left))


def test_gradient_checkpointing_changes_nothing(tiny_data, tiny_pack, batch, tmp_path):
    plain = make_run("nar", tiny_data, tiny_pack / "codec", tmp_path / "a", nar=NO_DROPOUT)
    saving = make_run(
        "nar", tiny_data, tiny_pack / "codec", tmp_path / "b", nar=NO_DROPOUT, gradient_checkpointing=True
    )
    assert saving.core.layers[0].gradient_checkpointing and not plain.core.layers[0].gradient_checkpointing
    (wanted, _), (got, _) = gradients(plain, [batch]), gradients(saving, [batch])
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_published_weights_go_on_by_their_own_objective(
    run, part, make_model, tiny_data, tiny_pack, tmp_path, capsys, monkeypatch
):
    """From a whole model's folder, one decoder, and its parts go together again; our objective on request."""
    prompts = []

    def spy(losses, batches, *rest):
        prompts.extend(batch["prompt_lengths"] for batch in batches)
        return figures(losses, batches, *rest)

    monkeypatch.setattr("scripts.decoders.run.figures", spy)
    model = make_model("published")
    model.save_pretrained(tmp_path / "whole")
    recipe = RECIPE + "init_from: {}\nmark_held: false\nno_prompt_share: 1.0\n".format(tmp_path / "whole")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert run(part, tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [value for name, value in rows[-1].items() if name.startswith("validation_code")]
    assert prompts and not torch.cat(prompts).any()  # as the recipe trains
    options = {"init_from": str(tmp_path / "whole"), "no_prompt_share": 1.0}
    again = make_run(part, tiny_data, tiny_pack / "codec", tmp_path / "again", **options)
    played = again.losses.play(again.validation[0], 20)  # an AR that has no BOS goes on from the first half
    assert played.shape == ((2, 1, 25 + 20) if part == "ar" else (2, 4, 20))
    assert min(losses) > 100 and not any("latent" in name for name in rows[-1])  # sums, and nothing beside them
    trained = AutoModel.from_pretrained(tmp_path / "out" / "model")
    assert trained.config.objective == "published_sum"
    assert not MidiValleTokenizer.from_pretrained(tmp_path / "out" / "model").mark_held  # notes are read so from now on
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
    assert run(part, tmp_path / "none") == 2
    assert (
        "error: init_from nowhere: holds no config.json" in capsys.readouterr().err
    )  # and not --ar, as assembling has


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_a_decoder_goes_on_with_something_new(run, part, make_model, tmp_path, capsys):
    """A summary of the prompt is added and learned; what it was taught is not thrown away by taking it out again."""
    make_model().save_pretrained(tmp_path / "whole")
    start = RECIPE + "init_from: {}\n" + part + ": {{prompt_summary_size: {}}}\n"
    (tmp_path / "recipe.yaml").write_text(start.format(tmp_path / "whole", 8))
    assert run(part, tmp_path / "more") == 0
    learned = load_file(tmp_path / "more" / "model" / "model.safetensors")
    assert all(value.any() for name, value in learned.items() if "prompt_summary" in name)
    for size in (0, 4):
        (tmp_path / "recipe.yaml").write_text(start.format(tmp_path / "more" / "model", size))
        assert run(part, tmp_path / "less") == 2 and "there is no place for" in capsys.readouterr().err


def test_bf16_trains_too(tiny_data, tiny_pack, batch, tmp_path):
    run = make_run(
        "ar", tiny_data, tiny_pack / "codec", tmp_path / "run", batches=[batch], steps=10, bf16=True, log_steps=1
    )
    run.train()
    losses = [row["code"] for row in run_log.read_log(tmp_path / "run" / "log.jsonl") if "code" in row]
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
    for text, message in (("a: [", "is not YAML"), ("- a", "holds a list"), ("learning_rate: fast", "is not a number")):
        (tmp_path / "recipe.yaml").write_text(text)
        assert run("ar", tmp_path / "out") == 2 and message in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-3\n")  # a text in YAML
    assert train.TrainRecipe.from_yaml(tmp_path / "recipe.yaml").learning_rate == 1e-3
    lines = ["own_share: 1.5", "log_steps: 0", "betas: [0.9, high]", "bf16: 1", "optimizer: 3", "seed: 1.5"]
    lines += [f"{name}: .nan" for name in ("learning_rate", "latent_weight", "clip_norm", "exploding_ratio")]
    lines += ["learning_rate: .inf", "learning_rate: 0", "betas: [.nan, 0.9]", "batch_frames: 0", "max_skipped: -1"]
    lines += ["betas: [0.9, 1.0]", "exploding_ratio: 0.5", "report_to: [[trackio]]"]
    lines += ["ar: {hiden_size: 64}", "nar: {layers: 2}", "ar: {dropout: .nan}"]
    for line in lines:
        (tmp_path / "recipe.yaml").write_text(line)
        assert run("ar", tmp_path / "out") == 2
        assert f"recipe.yaml: {line.partition(':')[0]}" in capsys.readouterr().err
    for fields, message in (
        ("num_hidden_layers: 0", "num_hidden_layers must be at least 1, got 0"),
        ("num_attention_heads: 0", "num_attention_heads must be at least 1, got 0"),
        ("num_attention_heads: 3", "hidden_size 32 is not a multiple of num_attention_heads 3"),
        ("dropout: 1.5", "dropout probability has to be between 0 and 1"),
        ("hidden_act: sofa", "'sofa'"),
        ("intermediate_size: many", "Field 'intermediate_size' expected int"),
    ):
        (tmp_path / "recipe.yaml").write_text(RECIPE + f"nar: {{{fields}}}\n")
        assert run("both", tmp_path / "out") == 2  # before the AR has learned
        assert f"the recipe's nar: no model can be made of it ({message}" in capsys.readouterr().err
    for fields, message in (
        ("quantization: int8", "int8 weights do not learn"),
        ("num_codebooks: 3", "num_codebooks and codebook_size are (3, 2048), but the codec has (4, 2048)"),
    ):
        (tmp_path / "recipe.yaml").write_text(RECIPE + f"ar: {{{fields}}}\n")
        assert run("ar", tmp_path / "out") == 2 and f"error: ar: {message}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("ar", tmp_path / "out", "--stop-after", "nan")
    assert "--stop-after must be above 0" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(RECIPE + "frame_steps: 1\ncodebook_start: false\n")
    assert run("nar", tmp_path / "out") == 2
    assert "frame_steps need codebook_start" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(RECIPE + "optimizer: sgd\n")
    assert run("ar", tmp_path / "out") == 2
    assert "recipe.yaml: optimizer: 'sgd' is not one of adamw, muon, scaled_adam" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["weights", "explosion"])
def test_a_bad_loss_stops_and_keeps_the_batch(fault, tiny_data, tiny_pack, tmp_path, has_usual_mode):
    run = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "run")
    batch = next(iter(run.stream))
    run.stream.load_state_dict({"epoch": 0, "position": 0, "seed": 0})
    if fault == "weights":
        with torch.no_grad():
            next(iter(run.core.parameters())).fill_(float("nan"))
    else:
        run.usual["code+latent"] = 0.01
    with pytest.raises(BadLossError, match="step 0: loss nan" if fault == "weights" else "times the usual one"):
        run.train()
    path = tmp_path / "run" / "bad_step_0000000_rank0.safetensors"
    assert has_usual_mode([path])
    saved = load_file(path)
    assert all(torch.equal(saved[f"0.{name}"], value) for name, value in batch.items())
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert (
        "loss" in about["wrong"] and [Path(name).suffix for name, _ in json.loads(about["rows"])[0]] == [".parquet"] * 2
    )
    assert not list((tmp_path / "run").glob("step_*"))  # nothing that is not finite is ever saved


def test_bad_steps_are_passed_over_and_counted(tiny_data, tiny_pack, batch, tmp_path, monkeypatch):
    """Two of five steps have a loss that is not finite: the weights stay finite; a third one stops the run."""
    size = {"batches": [batch], "steps": 5, "save_steps": 5, "log_steps": 5, "on_bad_loss": "skip", "max_skipped": 2}
    run = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "run", **size)
    forward = run.losses.forward
    bad = {1, 3}

    def poisoned(batch, step, index):
        found = forward(batch, step, index)
        return {k: v * float("nan") for k, v in found.items()} if step in bad else found

    monkeypatch.setattr(run.losses, "forward", poisoned)
    assert run.train() and run.skipped == 2
    assert all(torch.isfinite(value).all() for value in run.core.state_dict().values())
    rows = [row for row in run_log.read_log(tmp_path / "run" / "log.jsonl") if "code" in row]
    assert rows[-1]["skipped"] == 2 and math.isfinite(rows[-1]["code"])
    assert len(list((tmp_path / "run").glob("bad_step_*"))) == 2
    run = make_run("ar", tiny_data, tiny_pack / "codec", tmp_path / "more", **size)
    bad |= {2}
    forward = run.losses.forward
    monkeypatch.setattr(run.losses, "forward", poisoned)
    with pytest.raises(BadLossError, match="; max_skipped is 2"):
        run.train()


def test_a_full_disk_ends_the_run_with_one_sentence(run, tmp_path, monkeypatch, capsys):
    """A limit on the size of files gives what a full disk gives; with room again the run goes on as if without."""
    before, save = resource.getrlimit(resource.RLIMIT_FSIZE), Run.save

    def limited(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if self.step == 4 else before[0], before[1]))
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", limited)
        try:
            assert run("ar", tmp_path / "out") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step_0000004 could not be written" in error and "step_0000002 is whole" in error
    assert run("ar", tmp_path / "out") == 0 and run("ar", tmp_path / "whole") == 0
    assert_same(tmp_path / "whole" / "step_0000004", tmp_path / "out" / "step_0000004")


def test_pushing_is_tried_again_and_then_reported(run, tmp_path, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, repo_id, exist_ok):
            calls.append(repo_id)

        def upload_folder(self, folder_path, repo_id, commit_message):
            names = {p.name for p in tmp_path.joinpath("out", "model").iterdir()}
            assert {"config.json", "model.safetensors"} <= names and not [
                n for n in names if n.endswith((".pt", ".bin"))
            ]
            if len(calls) < working:
                raise OSError("500 Server Error")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    pauses = []
    monkeypatch.setattr(publishing.time, "sleep", pauses.append)
    for working, said in (
        (3, "is on the Hub as someone/piano"),
        (99, "could not be pushed to someone/piano (500 Server"),
    ):
        calls.clear()
        assert run("ar", tmp_path / "out", "--push-to-hub", "someone/piano") == 0
        assert len(calls) == min(working, 4) and said in capsys.readouterr().out
    assert pauses == [5, 10, 5, 10, 20]  # of three attempts, and of four


def test_a_reader_of_an_exported_folder_finds_whole_files(tmp_path, monkeypatch):
    """Weights come last; a full disk, or a kill before, leaves what was there as it was."""

    class Model:
        fails = False

        def save_pretrained(self, folder, state_dict):
            folder.mkdir()  # what a kill has left is not mixed with it
            for name in ("model.safetensors", "config.json", "z.json"):
                (folder / name).write_text(f"{name} of {state_dict}")
            if self.fails:
                raise OSError("No space left on device")
            state_dict.clear()  # as transformers does

    model, moved, replace, state = Model(), [], os.replace, {"w": 1}
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "half.safetensors").write_text("of a kill")
    monkeypatch.setattr(publishing.os, "replace", lambda old, new: moved.append(new.name) or replace(old, new))
    publishing.export(model, tmp_path / "model", state)
    assert moved[-1] == "model.safetensors" and sorted(moved) == ["config.json", "model.safetensors", "z.json"]
    assert os.listdir(tmp_path) == ["model"] and state == {"w": 1}
    before = {path: path.read_text() for path in (tmp_path / "model").iterdir()}
    model.fails = True
    with pytest.raises(publishing.PublishError, match="model could not be written .No space left"):
        publishing.export(model, tmp_path / "model", {"w": 2})
    assert {path: path.read_text() for path in (tmp_path / "model").iterdir()} == before
    assert os.listdir(tmp_path) == ["model"] and len(before) == 3


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_trackers_get_sound_and_curves_at_each_validation(part, tracker, tiny_data, tiny_pack, tmp_path, monkeypatch):
    """Half a second of the first row, as it is and as it is played; the random states do not notice."""
    codec = PianoEncodecModel.from_pretrained(tiny_pack / "codec")
    tracker.shown.clear()
    size = {"steps": 4, "save_steps": 2, "sample_seconds": 0.5, part: NO_DROPOUT}
    plain = make_run(part, tiny_data, tiny_pack / "codec", tmp_path / "plain", **size)
    assert plain.train() and not plain.shows_samples
    monkeypatch.setattr("scripts.decoders.run.installed_trackers", lambda names: [tracker])
    run = make_run(part, tiny_data, tiny_pack / "codec", tmp_path / "run", **size)
    assert run.train()
    assert_same(tmp_path / "plain" / "step_0000004", tmp_path / "run" / "step_0000004")
    names = ("samples/truth", "samples/generated", "curves")
    assert tracker.shown.keys() == {(name, step) for name in names for step in (2, 4)}
    row = {name: value[:1] for name, value in run.validation[0].items()}
    prompt, K = int(row["prompt_lengths"]), 1 if part == "ar" else 4
    wave, rate = tracker.shown["samples/truth", 4]
    true = codec.decode_codes(row["audio_codes"][:, :K, : prompt + 25])[0, :, prompt * 640 :]
    assert rate == 32000 and torch.equal(wave, true.clamp(-1, 1)) and wave.shape == (1, 16000)
    assert tracker.shown["samples/generated", 4][0].shape == wave.shape and tracker.shown["curves", 4].ndim == 3


def test_what_is_played_is_what_the_decoder_finds_likeliest(tiny_data, tiny_pack, tmp_path):
    """The AR on its own past; of the NAR's first stage the true codebook 0 is the past."""
    for part in ("ar", "nar"):
        run = make_run(part, tiny_data, tiny_pack / "codec", tmp_path / part)
        batch, core = run.validation[0], run.core.eval()
        shared = {k: batch[k] for k in ("midi_ids", "midi_attention_mask", "prompt_lengths")}
        prompt, played = int(batch["prompt_lengths"][0]), run.losses.play(batch, 20)
        assert played.shape == (2, 1 if part == "ar" else 4, prompt + 20)
        assert torch.equal(played[:, 0, :prompt], batch["audio_codes"][:, 0, :prompt])
        if part == "ar":
            codes = played[:, 0]
            inputs = core.build_inputs(codes, torch.ones_like(codes), batch["prompt_lengths"])
            logits = core(**inputs, **shared).logits[:, -21:-1, : core.config.codebook_size]
            assert torch.equal(logits.argmax(-1), codes[:, prompt:])
        else:
            logits = core(batch["audio_codes"], stage=1, **shared).logits[:, prompt : prompt + 20]
            assert torch.equal(logits.argmax(-1), played[:, 1, prompt:])


def test_trackers_that_are_not_installed_are_named(monkeypatch, capsys):
    monkeypatch.setattr(run_log.importlib.util, "find_spec", lambda name: None if name == "trackio" else name)
    assert run_log.installed_trackers(["tensorboard", "trackio"]) == ["tensorboard"]
    assert "trackio is not installed" in capsys.readouterr().out


def test_a_row_tells_speed_and_the_time_left(tmp_path, monkeypatch, capsys):
    """Of what has been done since the run went on; trackers get figures of the validation in a group of their own."""
    sent = []
    accelerator = SimpleNamespace(
        is_main_process=True, init_trackers=lambda *_: None, log=lambda row, step: sent.append((row, step))
    )
    monkeypatch.setattr(run_log.time, "time", iter([1000.0, 1060.0]).__next__)
    log = run_log.RunLog(tmp_path / "run", accelerator, 50)
    log.begin(10, {})
    log.write(30, 2.0, 720.04, {"code": 1.23456789, "validation_code_0": 2.0})
    assert "30/50 " in (said := capsys.readouterr().out) and said.endswith("10.0x real time, 0:01:00 left\n")
    row = {"step": 30, "hours": 2.0, "wall_s": 720.0, "code": 1.23457}
    assert run_log.read_log(tmp_path / "run" / "log.jsonl") == [row | {"validation_code_0": 2.0}]
    assert sent == [(row | {"validation/code_0": 2.0}, 30)]
    accelerator.is_main_process = False
    monkeypatch.setattr(run_log.time, "time", lambda: 0.0)
    log.write(40, 3.0, 720.0, {})
    assert len(run_log.read_log(tmp_path / "run" / "log.jsonl")) == 1 and not capsys.readouterr().out


def test_a_log_goes_on_behind_its_checkpoint(tmp_path):
    """Later rows are dropped, by the first process; trackers are told the plain settings, and are ended."""
    told, ended = [], []
    tracker = SimpleNamespace(finish=lambda: ended.append(True))
    accelerator = SimpleNamespace(is_main_process=False, trackers=[tracker], log=lambda *_: None)
    accelerator.init_trackers = lambda *given: told.append(given)
    log = run_log.RunLog(tmp_path, accelerator, 50)
    log.begin(10, {"steps": 50, "rate": 0.5, "name": "x", "betas": [0.8, 0.9]}, parameters=7)
    assert told == [("midivalle", {"steps": 50, "rate": 0.5, "name": "x", "parameters": 7})]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}, "hours": 1}}\n' for step in (9, 10, 11)) + '{"step": 12, "ho')
    log.cut(10)
    assert path.read_text().endswith('"ho')
    accelerator.is_main_process = True
    log.cut(10)
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [9, 10]
    log.write(10, 2.0, 60.0, {})  # where it went on
    log.close()
    assert ended == [True]
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"log.jsonl: cannot be written \(No space left on device\); make room"):
        log.write(11, 2.0, 60.0, {})


@pytest.mark.draws
def test_curves_are_drawn_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    """Not at every checkpoint: a picture takes a second. By the first process, and not before there is a figure."""
    now, drawn = [100.0], []
    monkeypatch.setattr(run_log.time, "time", lambda: now[0])
    monkeypatch.setattr(run_log, "draw_curves", lambda folder: drawn.append((folder, now[0])))
    accelerator = SimpleNamespace(is_main_process=True, init_trackers=lambda *_: None, log=lambda *_: None)
    log = run_log.RunLog(tmp_path, accelerator, 50)
    log.begin(0, {})
    log.draw(last=True)
    log.write(10, 2.0, 1.0, {"code": 1.0})
    for now[0] in (159.0, 160.0, 161.0, 219.0, 221.0):
        log.draw()
    assert drawn == [(tmp_path, 160.0), (tmp_path, 221.0)]
    now[0] = 222.0
    log.draw(last=True)
    accelerator.is_main_process = False
    log.draw(last=True)
    assert drawn[2:] == [(tmp_path, 222.0)]


def test_learning_curves_by_command(tmp_path, capsys):
    assert run_log.main([str(tmp_path)]) == 2 and "holds no log.jsonl" in capsys.readouterr().err
    row = '{"step": 1, "hours": 1, "code": 2.0}\n'
    for rest in ("[1]\n", '{"step": 1, "code": 2.0}\n', '{"step": 1, "ho\n' + row):  # cut short, but not at the end
        (tmp_path / "log.jsonl").write_text(row + rest)
        assert run_log.main([str(tmp_path)]) == 2 and "line 2: not a row of a training log" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "hours": 1, "code": 2.0, "validation_code_0": 3.0}\n{"step": 2, "co'
    )
    assert run_log.main([str(tmp_path)]) == 0
    assert (tmp_path / "learning_curves.png").read_bytes()[1:4] == b"PNG"


def test_what_shares_a_panel(tmp_path, monkeypatch):
    """Codebooks, and training and validation, of one figure; each line has its rows, over hours of audio."""
    rows = [
        {"step": 1, "hours": 0.5, "wall_s": 9, "code_0": 4.0, "code_1": 5.0, "f1": 0.1},
        {"step": 2, "hours": 1.0, "wall_s": 18, "validation_code_0": 3.0, "f1_truth": 0.9},
        {"step": 3, "hours": 1.5, "wall_s": 27, "code_0": 2.0},
    ]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    drawn = []
    monkeypatch.setattr(run_log.pyplot, "close", drawn.append)
    run_log.draw_curves(tmp_path)
    panels = {
        axis.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
        for axis in drawn[0].axes
        if axis.axison
    }
    monkeypatch.undo()
    run_log.pyplot.close(drawn[0])
    assert panels == {
        "code": {"code_0": [[0.5, 4], [1.5, 2]], "code_1": [[0.5, 5]], "validation_code_0": [[1, 3]]},
        "f1": {"f1": [[0.5, 0.1]]},
        "f1_truth": {"f1_truth": [[1, 0.9]]},
    }


@pytest.mark.parametrize("name", ["paper", "starter_ar", "starter_nar", "finetune_published"])
def test_recipes_can_be_read_and_have_an_optimiser(name):
    recipe = train.TrainRecipe.from_yaml(f"{Path(__file__).parents[1]}/recipes/{name}.yaml")
    settings = (recipe.learning_rate, recipe.betas, recipe.weight_decay)
    optimizer = make_optimizer(recipe.optimizer, torch.nn.Linear(2, 2), *settings)
    assert optimizer.param_groups[0]["lr"] == recipe.learning_rate and recipe.save_steps <= recipe.steps
    assert (type(optimizer).__name__ == "ScaledAdam") == (name == "paper")


def test_the_paper_begins_with_the_initial_values_of_its_program():
    recipe = train.TrainRecipe.from_yaml(f"{Path(__file__).parents[1]}/recipes/paper.yaml")
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    books = torch.zeros(4, 2048, 1)
    tables = [
        train.start_model(replace(recipe, ar=size), "ar", books).model.audio_embedding,
        train.start_model(replace(recipe, nar=size), "nar", books).audio_embeddings[0],
    ]
    assert all(0.95 < float(table.weight.detach().std()) < 1.05 for table in tables)
