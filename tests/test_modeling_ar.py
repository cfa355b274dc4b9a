# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The AR: layout of its input, clocks, masks, cache, padding, loss, gradients, precision."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_midivalle import modeling_midivalle_ar
from modeling_midivalle.modeling_midivalle_layers import attended_index, rotary_angles, rotate

VARIANTS = pytest.mark.parametrize("preset", ["tiny", "summary", "published"])


def training_inputs(ar, batch):
    codes, mask, midi_ids, midi_mask, prompts = batch
    inputs = ar.build_inputs(codes[:, 0], mask, prompts)
    return inputs | {"midi_ids": midi_ids, "midi_attention_mask": midi_mask, "prompt_lengths": prompts}


def pad_left(values, count, value=0):
    """`count` places more at the start of axis 1."""
    return torch.cat([values.new_full((len(values), count, *values.shape[2:]), value), values], 1)


# --- layout and clocks ----------------------------------------------------------------------------


def test_build_inputs_by_hand(make_ar):
    codes, mask = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    built = make_ar().build_inputs(codes, mask, torch.tensor([2, 0]))
    assert built["input_ids"].tolist() == [[10, 11, 2049, 12, 13, 14], [2049, 20, 21, 22, 2048, 2048]]
    assert built["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    assert built["labels"].tolist() == [[-100] * 3 + [12, 13, 14], [-100, 20, 21, 22, -100, -100]]
    published = make_ar("published").build_inputs(codes, mask, torch.tensor([2, 1]))
    assert published["input_ids"].tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 2048, 2048]]


def test_predicted_frames_by_hand(make_ar):
    index = torch.arange(6)[None]
    # two prompt codes predict frames 1 and 2, BOS predicts frame 2, target frames 2, 3, 4 predict 3, 4, 5
    assert make_ar().model.predicted_frames(index, torch.tensor([2])).tolist() == [[1, 2, 2, 3, 4, 5]]
    assert make_ar().model.predicted_frames(index, torch.tensor([0])).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert make_ar("published").model.predicted_frames(index, torch.tensor([2])).tolist() == [[1, 2, 3, 4, 5, 6]]


def test_midi_clock_and_segments(make_ar):
    embeddings = make_ar().model.embeddings
    rows = torch.tensor([[[1] * 6, [50, 40, 30, 388, 4 + 383, 4], [50, 40, 30, 388, 4, 5], [2] * 6]])
    mask = torch.ones(1, 4, dtype=torch.long)
    vectors, clock = embeddings.embed_midi(rows, mask, torch.tensor([100]))
    assert clock.tolist() == [[0, 383 * 25, 384 * 25, 0]]
    moved, _ = embeddings.embed_midi(rows, mask, torch.tensor([101]))  # 2.02 s: the note at 2.0 s joins the prompt
    assert [torch.equal(a, b) for a, b in zip(vectors[0], moved[0], strict=True)] == [True, True, False, True]


def test_one_clock_for_midi_and_audio(make_ar, make_batch, monkeypatch):
    """Rotary positions: onsets of the rows in 1/4800 s, then for each input the frame that it predicts."""
    seen = []
    spy = lambda config, clock: seen.append(clock) or rotary_angles(config, clock)  # noqa: E731
    monkeypatch.setattr(modeling_midivalle_ar, "rotary_angles", spy)
    ar = make_ar()
    inputs = training_inputs(ar, make_batch((5,), (2,)))
    ar(**inputs)
    onsets = [0 if r[0] < 4 else ((r[5] - 4) * 384 + r[4] - 4) * 25 for r in inputs["midi_ids"][0].tolist()]
    assert seen[0].tolist() == [onsets + [96, 192, 192, 288, 384, 480]]


def test_the_bos_frame_is_the_first_of_the_target(make_ar, make_rows):
    embeddings, rows = make_ar(use_frame_notes=False).model.embeddings, make_rows()[None]
    index = torch.arange(4)[None]
    marks = embeddings.place_audio(torch.zeros(1, 4, 32), index, index, rows, rows[..., 0], torch.tensor([2]))[0]
    prompt, target = embeddings.audio_segments.weight
    torch.testing.assert_close(marks, torch.stack([prompt, prompt, target, target]))


def test_attended_index_counts_attended_places():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]])
    index = attended_index(mask)
    assert index[0, 2:].tolist() == [0, 1, 2] and index[1].tolist() == [0, 1, 2, 3, 4] and index[2, 4] == 2


def test_rotary_products_depend_on_time_differences_only(make_ar):
    config = make_ar(hidden_size=64).config
    query, key = torch.randn(2, 1, 2, 1, 32, generator=torch.Generator().manual_seed(0)).unbind(0)

    def product(at, to):
        q = rotate(query, *rotary_angles(config, torch.tensor([[at]])))
        return (q * rotate(key, *rotary_angles(config, torch.tensor([[to]])))).sum(-1)

    torch.testing.assert_close(product(96_000, 96_025), product(0, 25), atol=5e-3, rtol=0)
    assert (product(0, 25) - product(0, 96)).abs().max() > 0.1  # a tick is not a frame


# --- masks ----------------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_midi_is_seen_both_ways_and_audio_is_causal(make_ar, make_batch, preset, attention):
    ar = make_ar(preset)
    ar.set_attn_implementation(attention)
    inputs = training_inputs(ar, make_batch((30,), (8,)))
    inputs["input_ids"] = inputs["input_ids"].clamp(max=2047)
    rows = inputs["midi_ids"].shape[1]
    before = ar(**inputs, output_hidden_states=True).hidden_states[-1]

    late = inputs["midi_ids"].clone()
    late[0, -2, 1] = 4 + (late[0, -2, 1] + 9) % 64  # velocity of the last note
    after = ar(**(inputs | {"midi_ids": late}), output_hidden_states=True).hidden_states[-1]
    assert ((before - after).abs().amax(-1) > 1e-4).all()  # every earlier row and every frame

    codes = inputs["input_ids"].clone()
    codes[0, 20] = (codes[0, 20] + 7) % 2048
    after = ar(**(inputs | {"input_ids": codes}), output_hidden_states=True).hidden_states[-1]
    changed = (before - after).abs().amax(-1)[0] > 1e-5
    assert not changed[: rows + 20].any() and changed[rows + 20 :].all()


# --- cache ----------------------------------------------------------------------------------------


@VARIANTS
@torch.no_grad()
def test_incremental_equals_full_at_every_split(make_ar, make_batch, preset):
    """Without any position argument: positions come from the cache."""
    ar = make_ar(preset)
    inputs = training_inputs(ar, make_batch((14, 14), (5, 3)))
    for name in ("labels", "attention_mask"):
        del inputs[name]
    ids = inputs.pop("input_ids")
    full = ar(ids, **inputs).logits
    for split in range(5 if preset == "summary" else 1, ids.shape[1]):  # a summary is of the whole prompt
        first = ar(ids[:, :split], **inputs, use_cache=True)
        known = {"past_key_values": first.past_key_values, "prompt_summary": first.prompt_summary}
        second = ar(ids[:, split:], **inputs, **known)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cache_by_the_name_of_transformers_5_24(make_ar, make_batch):
    ar = make_ar()
    inputs = training_inputs(ar, make_batch((14,), (5,))) | {"labels": None, "attention_mask": None}
    ids = inputs.pop("input_ids")
    full, cache = ar(ids, **inputs).logits, DynamicCache(config=ar.config)
    steps = [ar(part, **inputs, cache=cache).logits for part in ids.split(6, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=0)
    prepared = ar.prepare_inputs_for_generation(ids, cache=cache, midi_ids=inputs["midi_ids"])
    assert prepared["past_key_values"] is cache and "cache" not in prepared


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_step_by_step_with_left_padding(make_ar, make_batch, cache):
    ar = make_ar()
    inputs = training_inputs(ar, make_batch((12, 9), (5, 3)))
    short = inputs["attention_mask"].sum(1)
    shift = 12 + 1 - short  # move each row to the right edge
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.stack([row.roll(int(s)) for row, s in zip(inputs[name], shift, strict=True)])
    del inputs["labels"]
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    full = ar(ids, attention_mask=mask, **inputs).logits
    rows = inputs["midi_ids"].shape[1]
    cache = DynamicCache() if cache == "dynamic" else StaticCache(config=ar.config, max_cache_len=rows + ids.shape[1])
    steps = [
        ar(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, **inputs).logits
        for t in range(ids.shape[1])
    ]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], full[real], atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_frame_is_told_what_the_prompt_sounds_like(make_ar, make_batch):
    """Without attention too; the summary knows codes and notes of the prompt, and nothing of the target."""
    ar = make_ar("summary")
    for layer in ar.model.layers:
        layer.self_attn.out_proj.weight.zero_()
    inputs = training_inputs(ar, make_batch((30,), (8,)))
    before, ids = ar(**inputs), inputs["input_ids"]
    for place, is_heard in ((3, True), (7, True), (8, False), (20, False)):  # place 8 is BOS
        other = ids.clone()
        other[0, place] = (other[0, place] + 7) % 2048
        after = ar(**(inputs | {"input_ids": other}))
        assert torch.equal(after.prompt_summary, before.prompt_summary) != is_heard
        assert ((after.logits - before.logits)[0, 25:].abs().amax(-1) > 0).all() == is_heard
    alone = ar(**(inputs | {"prompt_lengths": torch.tensor([0])}))
    assert not alone.prompt_summary.any()


@torch.no_grad()
def test_a_cache_without_its_summary_is_refused(make_ar, make_batch):
    ar = make_ar("summary")
    inputs = training_inputs(ar, make_batch()) | {"labels": None, "attention_mask": None}
    cache = ar(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="give the prompt_summary of the output that filled it"):
        ar(**(inputs | {"input_ids": inputs["input_ids"][:, :1]}), past_key_values=cache)


def test_a_mask_of_the_wrong_length_is_refused(make_ar, make_batch):
    ar = make_ar()
    inputs = training_inputs(ar, make_batch())
    cache = ar(**inputs, use_cache=True).past_key_values
    step = inputs | {"input_ids": inputs["input_ids"][:, :1], "labels": None, "attention_mask": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="41 cached and the 1 new"):
        ar(**step, past_key_values=cache)


# --- padding and batch ----------------------------------------------------------------------------


@VARIANTS
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(make_ar, make_batch, preset):
    ar = make_ar(preset)
    batch = make_batch((30, 21), (8, 5))
    batched = ar(**training_inputs(ar, batch)).logits
    codes, mask, midi_ids, midi_mask, prompts = batch
    for b in range(2):
        length, rows = int(mask[b].sum()), int(midi_mask[b].sum())
        alone = (codes[b : b + 1, :, :length], mask[b : b + 1, :length])
        alone = training_inputs(
            ar, (*alone, midi_ids[b : b + 1, :rows], midi_mask[b : b + 1, :rows], prompts[b : b + 1])
        )
        expected = ar(**alone).logits
        torch.testing.assert_close(batched[b : b + 1, : expected.shape[1]], expected, atol=1e-5, rtol=0)
        left = alone | {
            "input_ids": pad_left(alone["input_ids"], 4, 77),
            "attention_mask": pad_left(alone["attention_mask"], 4),
            "midi_ids": pad_left(alone["midi_ids"], 3),
            "midi_attention_mask": pad_left(alone["midi_attention_mask"], 3),
            "labels": None,
        }
        torch.testing.assert_close(ar(**left).logits[:, 4:], expected, atol=1e-5, rtol=0)


# --- loss and gradients ---------------------------------------------------------------------------


def test_loss_is_the_mean_over_target_frames(make_ar, make_batch):
    ar = make_ar()
    batch = make_batch((20, 15), (6, 4))
    inputs = training_inputs(ar, batch)
    out = ar(**inputs)
    codes, mask, *_, prompts = batch
    terms = []
    for b in range(2):
        for t in range(
            int(prompts[b]), int(mask[b].sum())
        ):  # target frame t is predicted at place t (BOS shifts by one)
            terms.append(-out.logits[b, t].log_softmax(-1)[codes[b, 0, t]])
    torch.testing.assert_close(out.loss, torch.stack(terms).mean())
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(ar(**(inputs | {"labels": inputs["input_ids"]}), shift_labels=shifted).loss, out.loss)
    assert ar(**(inputs | {"labels": torch.full_like(inputs["labels"], -100)})).loss == 0  # nothing to predict
    kept = ar(**inputs, logits_to_keep=3)
    assert kept.logits.shape == out.logits.shape and torch.equal(kept.loss, out.loss)
    torch.testing.assert_close(ar(**inputs, num_items_in_batch=torch.tensor(50)).loss, out.loss * len(terms) / 50)


@VARIANTS
def test_every_parameter_gets_a_gradient(make_ar, make_batch, preset):
    ar = make_ar(preset).train()
    ar(**training_inputs(ar, make_batch())).loss.backward()
    assert [n for n, p in ar.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_drops_out_in_training_alone(make_ar, make_batch, attention):
    rates = dict.fromkeys(("dropout", "embedding_dropout", "midi_embedding_dropout"), 0.0)
    ar, inputs = make_ar(**rates, attention_dropout=0.5), training_inputs(make_ar(), make_batch())
    ar.set_attn_implementation(attention)
    assert torch.equal(ar(**inputs).logits, ar(**inputs).logits)
    ar.train()
    assert not torch.equal(ar(**inputs).logits, ar(**inputs).logits)


def test_loss_falls_on_one_batch(make_ar, make_batch):
    ar = make_ar().train()
    inputs = training_inputs(ar, make_batch())
    optimizer = torch.optim.AdamW(ar.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = ar(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(make_ar, make_batch, reentrant):
    gradients = []
    for checkpointing in (False, True):
        ar = make_ar().train()
        if checkpointing:
            ar.activation_checkpointing_enable({"use_reentrant": reentrant})
        ar(**training_inputs(ar, make_batch())).loss.backward()
        gradients.append([p.grad for p in ar.parameters()])
    torch.testing.assert_close(*gradients)


# --- precision ------------------------------------------------------------------------------------


@VARIANTS
@torch.no_grad()
def test_attention_and_precision_agree(make_ar, make_batch, preset):
    ar = make_ar(preset)
    inputs = training_inputs(ar, make_batch())
    real = inputs["attention_mask"].bool()
    sdpa = ar(**inputs).logits[real]
    ar.set_attn_implementation("eager")
    torch.testing.assert_close(ar(**inputs).logits[real], sdpa, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = ar(**inputs).logits[real].float()
    assert (half - sdpa).norm() / sdpa.norm() < 0.05
    for dtype, tolerance in ((torch.float16, 0.005), (torch.bfloat16, 0.05)):
        whole = make_ar(preset).to(dtype)(**inputs).logits[real].float()
        assert (whole - sdpa).norm() / sdpa.norm() < tolerance


def test_a_small_fault_is_seen(make_ar, make_batch):
    """5 % on the scale of one layer's attention, or a clock one frame late, is far above the tolerances used here."""
    inputs = training_inputs(make_ar(), make_batch((30,), (8,)))
    expected = make_ar()(**inputs).logits
    scaled = make_ar()
    scaled.model.layers[1].self_attn.scaling *= 1.05
    assert (scaled(**inputs).logits - expected).abs().max() > 1e-3
    late = make_ar()
    on_time = late.model.predicted_frames
    late.model.predicted_frames = lambda index, prompts: on_time(index, prompts) + 1
    assert (late(**inputs).logits - expected).abs().max() > 1e-2


def test_wrong_midi_shape_is_refused(make_ar):
    with pytest.raises(ValueError, match="MIDI rows must be"):
        make_ar()(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.full((2, 41), 2050)}, r"input_ids \[0, 0\]: 2050 is not in \[0, 2050\)"),
        ({"labels": torch.full((2, 41), 2050)}, r"labels \[0, 0\]: 2050 is not in"),
        ({"prompt_lengths": torch.tensor([12, 33])}, r"prompt_lengths \[1\]: 33 is not in \[0, 33\)"),
        ({"prompt_lengths": torch.tensor([-1, 7])}, r"prompt_lengths \[0\]: -1 is not in \[0, 40\)"),
    ],
)
def test_ids_and_lengths_out_of_range_are_refused(make_ar, make_batch, change, message):
    ar = make_ar()
    with pytest.raises(ValueError, match=message):
        ar(**(training_inputs(ar, make_batch()) | change))
