# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The AR's steps: lean, all alike as in a CUDA graph, or by the model's own forward, they give the same codes."""

import platform

import pytest
import torch

from modeling_midivalle import decoding_midivalle_ar
from modeling_midivalle.decoding_midivalle_ar import FEW_ROWS, LOOK_EVERY, SMALL_BYTES, FrameDecoder, for_rows, is_small

FRAMES = 25


def greedy(logits, _):
    return logits.argmax(-1)


@pytest.fixture
def window(make_batch):
    """Audio ids with mask, MIDI with mask, prompt lengths; the second row is padded everywhere, and holds a tone of
    more than 6 s."""
    codes, _, midi_ids, midi_mask, lengths = make_batch((12, 12), (9, 4))
    midi_ids[1, 1] = torch.tensor([50, 40, 3 + 1152, 388, 4, 4])
    midi_ids[1, midi_mask[1].sum() - 2] = torch.tensor([50, 40, 3 + 40, 4, 4, 7])
    ids, mask = codes[:, 0, :9].clone(), torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    return ids, mask, (midi_ids, midi_mask), lengths


@torch.no_grad()
def decode(ar, window, steps, rows=slice(None)):
    ids, mask, midi, lengths = window
    logits = []

    def choose(found, uniform):
        logits.append(found.clone())
        return greedy(found, uniform)

    given = (ids[rows], mask[rows], tuple(part[rows] for part in midi), lengths[rows])
    hook = ar.register_forward_hook(lambda *_: None) if steps == "plain" else None
    decoder = FrameDecoder(ar, *given, FRAMES, uniform_steps=steps == "uniform")
    assert decoder.is_plain == (steps == "plain") and decoder.uniform_steps == (steps == "uniform")
    codes = decoder.decode(choose, torch.zeros(len(given[0]), FRAMES), 2048)
    if hook:
        hook.remove()
    return codes, torch.stack(logits)


@pytest.mark.parametrize("preset", ["tiny", "summary", "published"])
@pytest.mark.parametrize("rows", [slice(None), slice(1)])
def test_all_kinds_of_steps_agree(make_ar, window, preset, rows):
    ar = make_ar(preset, seed=2)
    expected, logits = decode(ar, window, "plain", rows)
    assert len(expected.unique()) > 2
    for steps in ("lean", "uniform"):
        codes, found = decode(ar, window, steps, rows)
        assert torch.equal(codes, expected)
        torch.testing.assert_close(found, logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("use_frame_notes", [False, True])
@torch.no_grad()
def test_a_row_that_continues_a_tone_is_for_the_frames_alone(make_ar, make_nar, window, use_frame_notes):
    """It is not attended to: of what it says only its end counts, in the frames that it reaches."""
    ids, mask, (midi_ids, midi_mask), lengths = window
    ids = torch.cat([ids, torch.randint(0, 2048, (2, 320), generator=torch.Generator().manual_seed(0))], 1)
    mask = torch.cat([mask, mask.new_ones(2, 320)], 1)
    ar, nar = make_ar(use_frame_notes=use_frame_notes), make_nar(use_frame_notes=use_frame_notes)
    codes = ids[:, None].expand(-1, 4, -1)

    def outputs(rows):
        given = {"midi_ids": rows, "midi_attention_mask": midi_mask, "attention_mask": mask, "prompt_lengths": lengths}
        return ar(ids, **given).logits[1], nar(codes, stage=1, **given).logits[1]

    row = (1, int(midi_mask[1].sum()) - 2)
    louder, longer = midi_ids.clone(), midi_ids.clone()
    louder[*row, 1] += 20
    longer[*row, 2] += 20
    for before, other, further in zip(*map(outputs, (midi_ids, louder, longer)), strict=True):
        assert torch.equal(before, other) == use_frame_notes
        assert not torch.equal(before, further)


@pytest.mark.parametrize("uniform_steps", [False, True])
@pytest.mark.parametrize("end", [0, 3, LOOK_EVERY, FRAMES - 1])
def test_eos_ends_a_row_wherever_it_comes(make_ar, window, uniform_steps, end):
    ids, mask, midi, lengths = window
    given = (ids[:1], mask[:1], (midi[0][:1], midi[1][:1]), lengths[:1])
    calls = []

    def hook(_module, _inputs, logits):
        logits[..., 2048] = 1e4 if len(calls) == end else -1e4
        calls.append(None)
        return logits

    ar = make_ar()
    ar.lm_head.register_forward_hook(hook)
    decoder = FrameDecoder(ar, *given, FRAMES, uniform_steps=uniform_steps)
    codes = decoder.decode(greedy, torch.zeros(1, FRAMES), 2050, eos_token_id=2048)
    assert codes.shape == (1, end) and len(calls) <= end + 1 + LOOK_EVERY
    assert not (codes == 2048).any()


def test_under_autocast(make_ar, window):
    """Where a trainer samples within autocast, its products are in bf16, of one row or several."""
    with torch.autocast("cpu", torch.bfloat16):
        for rows in (slice(None), slice(1)):
            plain, lean = (decode(make_ar(), window, steps, rows)[1][0] for steps in ("plain", "lean"))
            torch.testing.assert_close(lean, plain)


def test_half_precision_steps(make_ar, window):
    """bf16 rounds, so only that it runs and mostly agrees with the model's own forward in bf16."""
    ar = make_ar().to(torch.bfloat16)
    plain, lean = (decode(ar, window, steps)[1][0] for steps in ("plain", "lean"))
    torch.testing.assert_close(lean, plain)  # of the prefill
    codes, logits = decode(ar, window, "lean")
    assert codes.shape == (2, FRAMES) and logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


@pytest.mark.parametrize("steps", ["lean", "uniform"])
def test_int8_steps_keep_keys_and_values_in_bf16(make_ar, window, monkeypatch, steps):
    """Where the processor has instructions for it; the logits move by what bf16 rounds, and fp32 weights keep fp32."""
    ar, stored = make_ar(seed=2), []
    prepare = FrameDecoder._prepare_steps
    monkeypatch.setattr(
        FrameDecoder,
        "_prepare_steps",
        lambda self, mask: stored.append(self.cache.layers[0].buffer.dtype) or prepare(self, mask),
    )
    monkeypatch.setattr(decoding_midivalle_ar, "_has_bf16_attention", lambda device: True)
    decode(ar, window, steps)
    ar.quantize_("int8")
    rounded = decode(ar, window, steps)[1]
    monkeypatch.setattr(decoding_midivalle_ar, "_has_bf16_attention", lambda device: False)
    exact = decode(ar, window, steps)[1]
    assert stored == [torch.float32, torch.bfloat16, torch.float32]
    moved = (rounded[1] - exact[1]).abs().max() / exact[1].abs().max()
    assert 0 < float(moved) < 0.05


def test_broken_logits_are_refused(make_ar, window):
    ar = make_ar()
    with torch.no_grad():
        ar.lm_head.weight[7, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        decode(ar, window, "lean")


@pytest.mark.parametrize("uniform_steps", [False, True])
def test_broken_logits_from_which_the_end_is_chosen_are_refused(make_ar, window, uniform_steps):
    ids, mask, midi, lengths = window
    ar, calls = make_ar(), []

    def hook(_module, _inputs, logits):
        calls.append(None)
        logits[..., 2048] = 1e4 if len(calls) == 4 else -1e4
        logits[..., 7] = -torch.inf if len(calls) == 4 else 0
        return logits

    ar.lm_head.register_forward_hook(hook)
    given = (ids[:1], mask[:1], (midi[0][:1], midi[1][:1]), lengths[:1])
    decoder = FrameDecoder(ar, *given, FRAMES, uniform_steps=uniform_steps)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        decoder.decode(greedy, torch.zeros(1, FRAMES), 2050, eos_token_id=2048)


@pytest.mark.parametrize("rows", [1, 3])
def test_only_plain_fp32_maps_are_laid_out(rows):
    linear, hooked = (torch.nn.Linear(24, 40, bias=bias) for bias in (False, True))
    inputs = torch.randn(rows, 24)
    if rows == 1 or (torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")):
        assert not {linear.forward, hooked.forward} & set(for_rows(rows, linear, hooked))
    for found, given in zip(for_rows(rows, linear, hooked), (linear, hooked)):
        torch.testing.assert_close(found(inputs), given(inputs))
    hooked.register_forward_hook(lambda *_: None)
    half = torch.nn.Linear(24, 40, dtype=torch.bfloat16)
    assert for_rows(rows, hooked, half) == [hooked, half.forward]


def test_one_row_reads_wide_maps_row_by_row():
    """Column by column it would take longer."""
    wide = torch.nn.Linear(40, 24)
    assert for_rows(1, wide) == [wide.forward]


@pytest.mark.parametrize(("is_small", "expected"), [(True, 1), (False, 3)])
def test_the_steps_of_a_small_model_take_one_thread(make_ar, window, monkeypatch, is_small, expected):
    """What comes after the steps takes as many as before, also after a failure."""
    ids, mask, midi, lengths = window
    monkeypatch.setattr(decoding_midivalle_ar, "is_small", lambda ar, rows: is_small)
    seen, before = [], torch.get_num_threads()

    def choose(logits, _):
        seen.append(torch.get_num_threads())
        if len(seen) == 3:
            raise RuntimeError("stop")
        return logits.argmax(-1)

    torch.set_num_threads(3)
    try:
        decoder = FrameDecoder(make_ar(), ids, mask, midi, lengths, FRAMES)
        with pytest.raises(RuntimeError, match="stop"):
            decoder.decode(choose, torch.zeros(2, FRAMES), 2048)
        assert set(seen) == {expected} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_is_small(make_ar):
    ar = make_ar()
    assert is_small(ar, FEW_ROWS) and not is_small(ar, FEW_ROWS + 1) and not is_small(ar.to("meta"), 1)
    ar = make_ar()
    ar.extra = torch.nn.Buffer(torch.zeros(SMALL_BYTES, dtype=torch.int8))  # int8 weights are buffers
    assert not is_small(ar, 1)
