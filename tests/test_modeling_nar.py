# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The NAR: what each stage may see, stages per row, padding, ties, loss, gradients, precision."""

import pytest
import torch
from transformers.utils.generic import can_return_loss

from modeling_midivalle import MidiValleNARConfig, MidiValleNARModel, modeling_midivalle_nar

VARIANTS = pytest.mark.parametrize("preset", ["tiny", "summary", "published"])
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


def nar_inputs(batch, stage):
    codes, mask, midi_ids, midi_mask, prompts = batch
    return {
        "audio_codes": codes,
        "midi_ids": midi_ids,
        "midi_attention_mask": midi_mask,
        "attention_mask": mask,
        "prompt_lengths": prompts,
        "stage": stage,
    }


@VARIANTS
@STAGES
@torch.no_grad()
def test_a_stage_sees_the_codebooks_below_it_and_the_whole_prompt(make_nar, make_batch, preset, stage):
    nar = make_nar(preset)
    inputs = nar_inputs(make_batch((30,), (8,)), stage)
    before = nar(**inputs).logits
    for k in range(4):
        for place, visible in ((20, k < stage), (3, True)):  # a target frame, a prompt frame
            codes = inputs["audio_codes"].clone()
            codes[0, k, place] = (codes[0, k, place] + 5) % 2048
            change = (nar(**(inputs | {"audio_codes": codes})).logits - before).abs().amax()
            assert change > 1e-4 if visible else change == 0, (k, place)


@STAGES
def test_no_gradient_from_codebooks_at_or_above_the_stage(make_nar, make_batch, stage):
    nar = make_nar(tie_word_embeddings=False).train()
    batch = make_batch((30,), (0,))  # no prompt: target frames only
    nar(**nar_inputs(batch, stage), labels=batch[0]).loss.backward()
    reached = [
        bool(table.weight.grad is not None and table.weight.grad.abs().sum() > 0) for table in nar.audio_embeddings
    ]
    assert reached == [k < stage for k in range(4)]


def test_one_clock_for_midi_and_audio(make_nar, make_batch, monkeypatch):
    """Rotary positions: onsets of the rows in 1/4800 s, then each frame's own time."""
    seen, angles = [], modeling_midivalle_nar.rotary_angles
    spy = lambda config, clock: seen.append(clock) or angles(config, clock)  # noqa: E731
    monkeypatch.setattr(modeling_midivalle_nar, "rotary_angles", spy)
    inputs = nar_inputs(make_batch((4,), (2,)), 1)
    make_nar()(**inputs)
    onsets = [0 if r[0] < 4 else ((r[5] - 4) * 384 + r[4] - 4) * 25 for r in inputs["midi_ids"][0].tolist()]
    assert seen[0].tolist() == [onsets + [0, 96, 192, 288]]


@VARIANTS
def test_rows_may_have_different_stages(make_nar, make_batch, preset):
    nar = make_nar(preset)
    codes, mask, *_, prompts = batch = make_batch((30, 30, 24, 30), (8, 5, 0, 6))
    stages = torch.tensor([3, 1, 2, 1])
    mixed = nar(**nar_inputs(batch, stages), labels=codes)
    for b, stage in enumerate(stages.tolist()):
        alone = nar(**nar_inputs(batch, stage)).logits
        torch.testing.assert_close(mixed.logits[b], alone[b], atol=1e-5, rtol=0)
    target = (torch.arange(30) >= prompts[:, None]) & mask.bool()
    rows = mixed.logits.log_softmax(-1).gather(-1, codes[torch.arange(4), stages][..., None])[..., 0]
    if preset != "published":
        torch.testing.assert_close(mixed.loss, -rows[target].mean())
    else:
        torch.testing.assert_close(mixed.loss, -rows[target].sum() * mask.sum() / (mask.sum() - prompts.sum()))


@VARIANTS
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(make_nar, make_batch, preset):
    nar = make_nar(preset)
    batch = make_batch((30, 21), (8, 5))
    batched = nar(**nar_inputs(batch, 2)).logits
    length, rows = 21, int(batch[3][1].sum())
    alone = nar_inputs(batch, 2)
    alone = {k: v if isinstance(v, int) else v[1:] for k, v in alone.items()}
    alone |= {"audio_codes": alone["audio_codes"][..., :length], "attention_mask": alone["attention_mask"][:, :length]}
    alone |= {k: alone[k][:, :rows] for k in ("midi_ids", "midi_attention_mask")}
    expected = nar(**alone).logits
    torch.testing.assert_close(batched[1:, :length], expected, atol=1e-5, rtol=0)
    left = dict(alone)
    left["audio_codes"] = torch.cat([torch.full((1, 4, 6), 55), alone["audio_codes"]], -1)
    left["attention_mask"] = torch.cat([torch.zeros(1, 6, dtype=torch.long), alone["attention_mask"]], 1)
    left["midi_ids"] = torch.cat([torch.zeros(1, 2, 6, dtype=torch.long), alone["midi_ids"]], 1)
    left["midi_attention_mask"] = torch.cat([torch.zeros(1, 2, dtype=torch.long), alone["midi_attention_mask"]], 1)
    torch.testing.assert_close(nar(**left).logits[:, 6:], expected, atol=1e-5, rtol=0)


@VARIANTS
@torch.no_grad()
def test_what_is_kept_or_shared_changes_nothing(make_nar, make_batch, preset):
    """Logits of the last frames only, and what the stages have in common computed before."""
    nar = make_nar(preset)
    for batch in (make_batch((30, 21), (8, 5)), make_batch((30,), (8,))):  # with a mask, and without
        codes, mask, midi_ids, midi_mask, prompts = batch
        shared = nar.share_inputs(codes, midi_ids, midi_mask, mask, prompts)
        for stage in (1, 3):
            inputs = nar_inputs(batch, stage)
            expected = nar(**inputs).logits
            kept = nar(**inputs, logits_to_keep=12, shared=shared).logits
            torch.testing.assert_close(kept, expected[:, -12:], atol=1e-5, rtol=0)
        assert nar(**nar_inputs(batch, 1), labels=codes, logits_to_keep=12).logits.shape[1] == codes.shape[-1]


@pytest.mark.parametrize(
    ("fields", "ties"),
    [
        ({}, {0: 1, 1: 2, 2: 3}),
        ({"tie_heads_one_step_off": True}, {0: 2, 1: 3}),
        ({"tie_word_embeddings": False}, {}),
    ],
)
def test_heads_are_tied_as_the_config_says(fields, ties, tmp_path):
    saved = MidiValleNARModel(MidiValleNARConfig.from_preset("tiny", **fields))
    saved.save_pretrained(tmp_path)
    nar, report = MidiValleNARModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for model in (saved, nar):
        found = {
            i: k
            for i, head in enumerate(model.heads)
            for k, table in enumerate(model.audio_embeddings)
            if head.weight is table.weight
        }
        assert found == ties


def test_a_new_model_starts_with_plain_norms():
    for stage_norm in ("table", "projected"):
        nar = MidiValleNARModel(MidiValleNARConfig.from_preset("tiny", stage_norm=stage_norm))
        x = torch.randn(2, 5, 32)
        stage = torch.tensor([[1]]) if stage_norm == "table" else torch.zeros(1, 1, 32)
        torch.testing.assert_close(nar.norm(x, stage), torch.nn.functional.layer_norm(x, (32,)))


@VARIANTS
def test_every_parameter_gets_a_gradient(make_nar, make_batch, preset):
    nar = make_nar(preset).train().requires_grad_()
    batch = make_batch((40, 33, 30), (12, 7, 5))
    nar(**nar_inputs(batch, torch.tensor([1, 2, 3])), labels=batch[0]).loss.backward()
    without = [n for n, p in nar.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == [n for n, _ in nar.named_parameters() if n.endswith("alpha")]  # fixed, as published


def test_loss_falls_on_one_batch(make_nar, make_batch):
    nar = make_nar().train()
    batch = make_batch((40, 33, 30), (12, 7, 5))
    optimizer = torch.optim.AdamW(nar.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = nar(**nar_inputs(batch, torch.tensor([1, 2, 3])), labels=batch[0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
@VARIANTS
def test_gradient_checkpointing_gives_the_same_gradients(make_nar, make_batch, preset, reentrant):
    gradients, batch = [], make_batch()
    for checkpointing in (False, True):
        nar = make_nar(preset).train()
        if checkpointing:
            nar.activation_checkpointing_enable({"use_reentrant": reentrant})
        nar(**nar_inputs(batch, 2), labels=batch[0]).loss.backward()
        gradients.append([p.grad for p in nar.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@VARIANTS
@torch.no_grad()
def test_attention_and_precision_agree(make_nar, make_batch, preset):
    nar = make_nar(preset)
    inputs = nar_inputs(make_batch(), 2)
    real = inputs["attention_mask"].bool()
    sdpa = nar(**inputs).logits[real]
    nar.set_attn_implementation("eager")
    torch.testing.assert_close(nar(**inputs).logits[real], sdpa, atol=1e-5, rtol=0)
    for dtype, tolerance in ((torch.float16, 0.005), (torch.bfloat16, 0.05)):
        half = make_nar(preset).to(dtype)(**inputs).logits[real].float()
        assert (half - sdpa).norm() / sdpa.norm() < tolerance


def test_drawn_stages_are_balanced_and_repeat():
    nar = MidiValleNARModel(MidiValleNARConfig.from_preset("tiny"))
    stages = nar.draw_stages(12, torch.Generator().manual_seed(1))
    assert stages.bincount().tolist() == [0, 4, 4, 4]
    assert torch.equal(stages, nar.draw_stages(12, torch.Generator().manual_seed(1)))
    single = torch.cat([nar.draw_stages(1, torch.Generator().manual_seed(s)) for s in range(60)])
    assert set(single.tolist()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 4}, "stage must be 1 to 3"),
        ({"stage": torch.tensor([1, 4])}, "stage must be 1 to 3, or so for each row"),
        ({"stage": torch.tensor([0, 1])}, "stage must be 1 to 3"),
        ({"stage": torch.tensor([1])}, "stage must be 1 to 3"),
        ({"audio_codes": torch.zeros(2, 3, 9, dtype=torch.long)}, "audio_codes"),
        ({"audio_codes": torch.full((2, 4, 40), 2048)}, r"audio_codes \[0, 0, 0\]: 2048 is not in \[0, 2048\)"),
        ({"labels": torch.full((2, 4, 40), 2048)}, r"labels of each row's stage \[0, 12\]: 2048 is not in"),
        (
            {"labels": torch.zeros(2, 4, 40, dtype=torch.long), "prompt_lengths": torch.tensor([12, 33])},
            "not in .0, 33",
        ),
    ],
)
def test_wrong_input_is_refused(make_nar, make_batch, change, message):
    with pytest.raises(ValueError, match=message):
        make_nar()(**(nar_inputs(make_batch(), 1) | change))


@STAGES
def test_codes_that_are_not_read_may_hold_anything(make_nar, make_batch, stage):
    """Padded frames, and of the target the stage's codebook and those above."""
    inputs = nar_inputs(make_batch(), stage)
    unread = inputs["attention_mask"][:, None] == 0
    target = torch.arange(40) >= inputs["prompt_lengths"][:, None, None]
    unread = unread | (target & (torch.arange(4)[:, None] >= stage))
    nar, wild = make_nar(), inputs["audio_codes"].masked_fill(unread, -100)
    assert torch.equal(nar(**(inputs | {"audio_codes": wild})).logits, nar(**inputs).logits)


def test_the_whole_model_takes_return_dict_and_refuses_what_does_not_fit(make_model, make_batch):
    codes, mask, midi_ids, midi_mask, prompts = make_batch()
    model, inputs = make_model(), {"input_ids": midi_ids, "attention_mask": midi_mask, "audio_attention_mask": mask}
    inputs |= {"audio_codes": codes.masked_fill(mask[:, None] == 0, -100), "prompt_lengths": prompts, "stage": 2}
    output = model(**inputs)
    narrow = {name: value.int() if torch.is_tensor(value) else value for name, value in inputs.items()}
    assert torch.equal(model(**narrow).loss, output.loss)
    found = model(**inputs, return_dict=False)
    assert isinstance(found, tuple) and all(map(torch.equal, found, output.to_tuple()))
    assert can_return_loss(type(model)) and output.loss == (output.ar_loss + output.nar_loss) / 2 > 0  # for `Trainer`
    for change, message in (
        ({"audio_codes": codes + 2048}, r"audio_codes \[0, 0, 0\]: \d+ is not in \[0, 2048\)"),
        ({"prompt_lengths": torch.tensor([12, 33])}, r"prompt_lengths \[1\]: 33 is not in \[0, 33\)"),
        ({"prompt_lengths": torch.tensor([12])}, r"prompt_lengths must be \(2,\), got \(1,\)"),
        ({"prompt_lengths": 12}, "prompt_lengths must be a tensor of integers"),
        ({"audio_codes": codes[:, :3]}, r"audio_codes must be \(2, 4, 40\), got \(2, 3, 40\)"),
        ({"attention_mask": midi_mask[:, 1:]}, "attention_mask must be"),
        ({"audio_attention_mask": mask[:, 1:]}, r"audio_attention_mask must be \(2, 40\), got \(2, 39\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**(inputs | change))
    for part in (model, model.nar):
        with pytest.raises(ValueError, match="none can be resized"):
            part.resize_token_embeddings(2060)
