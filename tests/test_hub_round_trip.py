# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Saved folders: shards, no lost or spare key, and Auto classes in a process that cannot see this repository."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments, default_data_collator

from modeling_midivalle import MidiValleARModel, MidiValleForConditionalGeneration, MidiValleNARModel
from tokenization import MidiValleTokenizer

LOAD_AND_GENERATE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
torch.set_num_threads(1)
folder, inputs, output = sys.argv[1:]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "midivalle"
model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
assert not [m for m in sys.modules if m.split(".")[0] in ("modeling_midivalle", "tokenization", "processing")]
inputs = load_file(inputs)
for name in ("codec", "ar", "nar"):  # what a part saves is complete too
    part = getattr(model, name)
    part.save_pretrained(f"{folder}_{name}")
    again = AutoModel.from_pretrained(f"{folder}_{name}", trust_remote_code=True).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in part.state_dict().items())
save_file({"audio": model.generate(**inputs, seed=3), "codes": model.generate_codes(**inputs, seed=3)}, output)
"""


def stored_keys(folder):
    return {k for f in folder.glob("*.safetensors") for k in load_file(f)}


@pytest.mark.parametrize("preset", ["tiny", "published"])
def test_save_and_load_in_shards(make_model, preset, tmp_path):
    model = make_model(preset)
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and not list(tmp_path.glob("*.bin"))
    again, report = MidiValleForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    tables = zip(again.ar.model.embeddings.midi_tables, again.nar.embeddings.midi_tables)
    shared = [a.weight is b.weight for a, b in tables]
    assert all(shared) if preset == "published" else not any(shared)
    saved = sum("midi_tables" in k for k in stored_keys(tmp_path))
    assert saved == (6 if preset == "published" else 12)  # what is shared is stored once


@pytest.mark.parametrize("preset", ["tiny", "published"])
@pytest.mark.parametrize(("part", "model_class"), [("ar", MidiValleARModel), ("nar", MidiValleNARModel)])
def test_a_part_saved_alone_is_complete(make_model, preset, part, model_class, tmp_path):
    saved = getattr(make_model(preset), part)
    saved.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and sum("midi_tables" in k for k in stored_keys(tmp_path)) == 6
    for (name, a), b in zip(saved.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert type(AutoModel.from_pretrained(tmp_path)) is model_class


def test_parts_put_together_keep_their_weights(make_model):
    model = make_model()
    again = MidiValleForConditionalGeneration.from_sub_models(model.codec, model.ar, model.nar)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_half_precision_keeps_the_codec_in_fp32(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    half = MidiValleForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.codec.parameters()} == {torch.float32}
    assert {p.dtype for part in (half.ar, half.nar) for p in part.parameters()} == {torch.bfloat16}
    rows = torch.tensor([[[1] * 6, [50, 40, 60, 388, 4, 4], [2] * 6]])
    audio = half.generate(rows, target_frames=5, seed=0)
    assert audio.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    again = MidiValleForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert half.dtype == again.dtype == again.ar.dtype == torch.bfloat16 and again.codec.dtype == torch.float32
    assert torch.equal(again.generate(rows, target_frames=5, seed=0), audio)


def test_attention_is_chosen_for_the_whole(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    for attention in ("sdpa", "eager"):
        model = MidiValleForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
        assert model.ar.config._attn_implementation == model.nar.config._attn_implementation == attention
    model.set_attn_implementation("sdpa")
    assert model.ar.config._attn_implementation == "sdpa"


def test_a_process_without_the_repository(make_model, make_rows, tmp_path):
    """trust_remote_code from a saved folder: the code travels with the weights, and the output is bit-equal."""
    model, folder = make_model(), tmp_path / "hub"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_midivalle.MidiValleForConditionalGeneration"
    inputs = {
        "input_ids": make_rows(0)[None],
        "prompt_codes": torch.randint(0, 2048, (1, 4, 10), generator=torch.Generator().manual_seed(0)),
        "target_frames": torch.tensor([15]),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LOAD_AND_GENERATE,
            folder,
            tmp_path / "inputs.safetensors",
            tmp_path / "out.safetensors",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["audio"], model.generate(**inputs, seed=3))
    assert torch.equal(out["codes"], model.generate_codes(**inputs, seed=3))


def test_registered_auto_classes(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().model_type == "midivalle_ar"
    assert type(AutoModel.from_pretrained(tmp_path)) is MidiValleForConditionalGeneration


def test_trainer_given_the_tokenizer_leaves_the_special_codes_alone(make_model, make_batch, tmp_path):
    """It makes a text model's special ids those of its tokenizer; here they would be codes, and rows' ids."""
    codes, mask, midi_ids, midi_mask, prompts = make_batch()
    model = make_model()
    whole = {"input_ids": midi_ids, "attention_mask": midi_mask, "prompt_lengths": prompts}
    whole |= {"audio_codes": codes, "audio_attention_mask": mask, "stage": torch.tensor([1, 2])}
    ar = {"midi_ids": midi_ids, "midi_attention_mask": midi_mask, "prompt_lengths": prompts}
    ar |= model.ar.build_inputs(codes[:, 0], mask, prompts)
    options = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.0, "report_to": []}
    for name, part, inputs in (("whole", model, whole), ("ar", make_model().ar, ar)):
        with torch.no_grad():
            before = part(**inputs).loss
        trainer = Trainer(
            part,
            TrainingArguments(tmp_path / name, use_cpu=True, disable_tqdm=True, save_strategy="no", **options),
            data_collator=default_data_collator,
            train_dataset=[{key: value[b] for key, value in inputs.items()} for b in range(len(codes))],
            processing_class=MidiValleTokenizer(),
        )
        trainer.train()
        trainer.save_model(tmp_path / name)
        again = AutoModel.from_pretrained(tmp_path / name)
        config = getattr(again.config, "ar_config", again.config)
        assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (2048, 2048, 2049)
        with torch.no_grad():
            assert torch.equal(again(**inputs).loss, before)
    again.generate(ar["input_ids"][:1, :20], midi_ids=midi_ids[:1], prompt_lengths=prompts[:1], max_new_tokens=1)
    defaults = again.generation_config
    assert (defaults.eos_token_id, defaults.pad_token_id, defaults.bos_token_id) == (2048, 2048, 2049)
