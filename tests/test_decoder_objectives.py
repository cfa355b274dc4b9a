# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Starts and losses of the decoders: near codes have near logits, nobody sees the truth, errors are repaired."""

import pytest
import torch

from modeling_midivalle import MidiValleARConfig, MidiValleARModel, MidiValleNARConfig, MidiValleNARModel
from scripts.codec.quantizer import nearest
from scripts.decoders.objectives import (
    ar_loss,
    disturb,
    frame_loss,
    latent_error,
    nar_frame_loss,
    nar_loss,
    published_loss,
    start_as_published,
    start_from_codebooks,
    sum_of,
)


@pytest.fixture
def codebooks():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2048, 16, generator=generator) * torch.tensor([4.0, 1.0, 0.5, 0.3])[:, None, None]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    midi_ids = torch.randint(4, 20, (2, 3, 6), generator=generator)
    codes = torch.randint(0, 2048, (2, 4, 50), generator=generator)
    lengths = torch.full((2,), 25)
    return {"midi_ids": midi_ids, "midi_attention_mask": midi_ids[..., 0] * 0 + 1} | {
        "audio_codes": codes,
        "prompt_lengths": lengths,
    }


def make(part, **changes):
    torch.manual_seed(0)
    config, model = {"ar": (MidiValleARConfig, MidiValleARModel), "nar": (MidiValleNARConfig, MidiValleNARModel)}[part]
    return model(config.from_preset("tiny", **changes))


def test_a_started_head_finds_the_nearest_code(codebooks):
    """A hidden state that holds a latent, axis by axis, gets its highest logit from the code nearest to it; specials
    are none, not even beside near silence."""
    model = make("ar", tie_word_embeddings=False)
    start_from_codebooks(model, codebooks)
    latent = torch.randn(64, 16) * torch.tensor([4.0, 0.1]).repeat(32)[:, None]
    hidden = torch.zeros(64, 32)
    hidden[:, :16] = latent / codebooks[0].std(0)
    hidden[:, 16] = 1
    assert torch.equal(model.lm_head(hidden).argmax(-1), nearest(latent, codebooks[0]))
    states = model.model.norm(torch.randn(5, 32))
    assert torch.allclose(states[:, 16], torch.ones(5))  # whatever comes in, the bias counts once


def test_a_started_nar_adds_the_latent_up(codebooks, batch):
    """The sum of the tables is the partial latent, in deviations of its axes."""
    model = make("nar", tie_word_embeddings=False)
    start_from_codebooks(model, codebooks)
    codes = batch["audio_codes"]
    total = sum(model.audio_embeddings[k](codes[:, k]) for k in range(4))[..., :16]
    expected = sum_of(codes, codebooks) / codebooks[0].std(0)
    assert torch.allclose(total, expected * total.std() / expected.std(), atol=1e-4)


def test_a_start_needs_room(codebooks):
    with pytest.raises(ValueError, match="do not fit"):
        start_from_codebooks(make("ar"), codebooks.repeat(1, 1, 2))


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_the_published_start_is_torchs_own_with_all_layers_alike(part):
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64}
    config, model = {"ar": (MidiValleARConfig, MidiValleARModel), "nar": (MidiValleNARConfig, MidiValleNARModel)}[part]
    core = model(config.from_preset("published", **size))
    start_as_published(core)
    tables = [module.weight for module in core.modules() if isinstance(module, torch.nn.Embedding)]
    assert len(tables) == {"ar": 7, "nar": 11}[part]
    assert all(0.8 < float(table.std()) < 1.2 for table in tables)
    if part == "nar":
        assert core.heads[0].weight is core.audio_embeddings[2].weight
    layer, *others = (core.model if part == "ar" else core).layers
    attention = layer.self_attn
    assert not attention.in_proj.bias.any() and not attention.out_proj.bias.any()
    bounds = {layer.linear1: 32**-0.5, layer.linear2: 64**-0.5, attention.out_proj: 32**-0.5}
    bounds |= {core.embeddings.midi_projection: 544**-0.5} if part == "nar" else {core.lm_head: 32**-0.5}
    bounds |= {layer.norm1.project_layer: 32**-0.5} if part == "nar" else {}
    for linear, bound in (bounds | {attention.in_proj: (6 / (32 + 96)) ** 0.5}).items():  # uniform up to there
        assert 0.95 * bound < float(linear.weight.abs().max()) <= bound
    for other in others:
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())


def test_the_ar_never_sees_the_truth(codebooks, batch):
    """Target inputs are hidden, or the model's own choices one place earlier; the prompt and BOS stay."""
    model = make("ar").eval()
    seen = []
    model.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["input_ids"].clone()), with_kwargs=True)
    losses = ar_loss(model, model, batch, codebooks, slice(0, 1))
    assert losses["code"].isfinite() and losses["latent"].isfinite() and len(seen) == 2
    codes, pad, bos = batch["audio_codes"][:, 0], model.config.pad_token_id, model.config.bos_token_id
    own, hidden = seen[1]
    for row in (own, hidden):
        assert row[25] == bos
    assert torch.equal(own[:25], codes[0, :25]) and torch.equal(hidden[:25], codes[1, :25])
    assert (hidden[26:] == pad).all() and (seen[0][0, 26:] == pad).all()
    first = {k: v[:1] for k, v in batch.items() if k != "audio_codes"}
    guess = model(input_ids=seen[0], **first).logits[0, :, :2048].argmax(-1)
    assert torch.equal(own[26:], guess[25:-1])


def test_without_own_rows_there_is_one_pass(codebooks, batch):
    model, calls = make("ar"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    ar_loss(model, model, batch, codebooks, slice(0, 0))["code"].backward()
    assert len(calls) == 1


def test_losses_count_target_frames_only(codebooks, batch):
    """The prompt's codes are input, never labels: a NAR's loss is that of its target frames."""
    model = make("nar").eval()
    stages = torch.tensor([1, 3])
    with torch.no_grad():
        losses = nar_loss(model, batch, stages, codebooks, 0.0, None)
    shared = {k: batch[k] for k in ("midi_ids", "midi_attention_mask", "prompt_lengths")}
    with torch.no_grad():
        logits = model(audio_codes=batch["audio_codes"], stage=stages, **shared).logits[:, 25:]
    target = torch.stack([batch["audio_codes"][0, 1], batch["audio_codes"][1, 3]])[:, 25:]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target)
    assert float(losses["code"]) == pytest.approx(float(expected), rel=1e-5)
    left = [
        codebooks[1][target[0]] + sum_of(batch["audio_codes"][:1, 2:, 25:], codebooks[2:])[0],
        codebooks[3][target[1]],
    ]
    errors = [latent_error(logits[i], codebooks[k], left[i]) for i, k in enumerate((1, 3))]
    assert float(losses["latent"]) == pytest.approx(float(sum(errors) / 2), rel=1e-4)


def test_the_published_loss_sees_the_truth_and_sums_it(batch):
    """All frames of the AR count, the EOS behind the last too; of the NAR those behind a drawn part, weighted."""
    codes, shared = batch["audio_codes"], {k: batch[k] for k in ("midi_ids", "midi_attention_mask")}
    model = make("ar", objective="published_sum", use_target_bos=False, use_segment_embeddings=False).eval()
    logits = model(codes[:, 0], **shared).logits
    targets = torch.nn.functional.pad(codes[:, 0, 1:], (0, 1), value=2048)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="sum")
    torch.testing.assert_close(published_loss(model, model, batch, None, None)["code"], expected)
    model = make("nar", objective="published_sum").eval()
    drawn = [model.draw_prefix(torch.tensor([50, 60]), torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert (min(drawn), max(drawn)) == (12, 23) and model.draw_prefix(torch.tensor([4000])) == 150
    with pytest.raises(ValueError, match="a prefix needs: 3"):
        model.draw_prefix(torch.tensor([3]))
    stages, P = torch.tensor([2, 2]), drawn[0]
    logits = model(codes, prompt_lengths=torch.tensor([P, P]), stage=2, **shared).logits[:, P:]
    expected = (
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes[:, 2, P:], reduction="sum") * 50 / (50 - P)
    )
    found = published_loss(model, model, batch, stages, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found["code"], expected)


def test_noise_is_in_the_target_only(codebooks, batch):
    """The prompt that a NAR reads is the true one."""
    model, seen = make("nar").eval(), []
    model.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["audio_codes"]), with_kwargs=True)
    nar_loss(model, batch, torch.tensor([1, 3]), codebooks, 1.0, torch.Generator().manual_seed(0))
    same = seen[0] == batch["audio_codes"]
    assert same[..., :25].all() and not same[..., 25:].all()


def test_rows_are_disturbed_by_as_much_as_each_draws(codebooks, batch):
    """Of eight equal rows some keep nearly all codes, and some hardly any."""
    codes = batch["audio_codes"][:1].repeat(8, 1, 1)
    given, _ = disturb(codes, codebooks, 2.0, torch.Generator().manual_seed(0))
    kept = (given == codes)[:, 0].float().mean(1)
    assert kept.min() < 0.3 and kept.max() > 0.7


def test_repairs_are_better_than_the_old_codes(codebooks, batch):
    """Behind a disturbed codebook, the label leads nearer to the true latent than the code it replaces."""
    codes = batch["audio_codes"]
    given, best = disturb(codes, codebooks, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(given, best)
    true = sum_of(codes, codebooks)
    given, best = disturb(codes, codebooks, 1.0, torch.Generator().manual_seed(0))
    wrong = given[:, 0] != codes[:, 0]
    assert 0.1 < wrong.float().mean() < 1
    below = codebooks[0][given[:, 0]]
    kept, repaired = (true - below - codebooks[1][c[:, 1]] for c in (codes, best))
    assert (repaired.square().sum(-1) <= kept.square().sum(-1) + 1e-4).all()
    assert repaired[wrong].square().mean() < 0.9 * kept[wrong].square().mean()
    again, _ = disturb(codes, codebooks, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(again, given)


def test_frames_learn_alone(codebooks, batch):
    """`frame` is the error of what a started head reads: 0 for a model whose last norm gives the latent. Prompt,
    attention and the audio's truth play no part in what is read."""
    model = make("ar", tie_word_embeddings=False)
    start_from_codebooks(model, codebooks)
    assert not any(layer.self_attn.out_proj.weight.any() for layer in model.model.layers)
    loss = frame_loss(model, batch, codebooks)["frame"]
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads["model.layers.0.self_attn.in_proj.weight"] is None and grads["lm_head.weight"] is None
    assert all(grads[f"model.layers.{i}.linear1.weight"].any() for i in range(2))
    latent = sum_of(batch["audio_codes"][..., 25:], codebooks)
    read = torch.zeros(2, 25, 32)
    read[..., :16] = latent / codebooks[0].std(0)
    model.model.norm.forward = lambda states: read
    assert float(frame_loss(model, batch, codebooks)["frame"]) < 1e-9


def test_frames_alone_are_what_the_whole_model_makes_of_them(codebooks, batch, make_rows):
    """While attention is silent, and with the BOS frame as hidden as the others: each frame with its own notes, and
    with the same summary of the prompt."""
    model = make("ar", tie_word_embeddings=False, prompt_summary_size=8).eval()
    start_from_codebooks(model, codebooks)
    with torch.no_grad():
        for parameter in model.model.embeddings.prompt_summary.parameters():
            parameter.normal_()  # so that it tells much
    ids = torch.stack([make_rows(seed, seconds=1.0) for seed in range(2)])
    batch = batch | {"midi_ids": ids, "midi_attention_mask": torch.ones_like(ids[..., 0])}
    codes, lengths, pad = batch["audio_codes"], batch["prompt_lengths"], model.config.pad_token_id
    inputs = model.build_inputs(codes[:, 0], torch.ones_like(codes[:, 0]), lengths)
    inputs["input_ids"][:, 25:] = pad
    shared = {k: batch[k] for k in ("midi_ids", "midi_attention_mask", "prompt_lengths")}
    output = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"], **shared)
    states = output.last_hidden_state[:, -51:]  # behind those of the MIDI rows
    places = torch.arange(25, 50)
    assert torch.equal(model.model.predicted_frames(places.expand(2, -1), lengths)[0], places)
    read, wanted = states[:, places, :16] * codebooks[0].std(0), sum_of(codes, codebooks)[:, places]
    expected = (read - wanted).square().sum(-1).mean() / codebooks[0].var(0).sum()
    torch.testing.assert_close(frame_loss(model, batch, codebooks)["frame"], expected, rtol=1e-5, atol=0)


def test_frames_of_a_nar_learn_alone(codebooks, batch):
    """Gradients reach everything but attention and heads; 0 where the state reads as what the lower codebooks leave,
    be they right or disturbed."""
    model = make("nar", tie_word_embeddings=False)
    start_from_codebooks(model, codebooks)
    stages = torch.tensor([1, 3])
    nar_frame_loss(model, batch, stages, codebooks, 0.5, torch.Generator().manual_seed(0))["frame"].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads["layers.0.self_attn.in_proj.weight"] is None and grads["heads.0.weight"] is None
    assert all(grads[f"layers.{i}.linear1.weight"].any() for i in range(2))
    codes, read = batch["audio_codes"][..., 25:], torch.zeros(2, 25, 32)
    model.norm.forward = lambda states, condition: read
    for noise in (0.0, 1.0):
        given = disturb(codes, codebooks, noise, torch.Generator().manual_seed(0))[0] if noise else codes
        for row, stage in enumerate(stages.tolist()):
            part = slice(row, row + 1)
            left = sum_of(codes[part], codebooks) - sum_of(given[part, :stage], codebooks)
            read[row, :, :16] = left[0] / codebooks[stage].std(0)
        generator = torch.Generator().manual_seed(0)
        assert float(nar_frame_loss(model, batch, stages, codebooks, noise, generator)["frame"]) < 1e-9


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_frames_alone_learn_what_the_prompt_sounds_like(codebooks, batch, part):
    """Its summary gets a gradient, and another prompt another loss; a batch without prompts is one too."""
    model, stages = make(part, prompt_summary_size=8), torch.tensor([1, 3])

    def loss(batch):
        if part == "ar":
            return frame_loss(model, batch, codebooks)["frame"]
        return nar_frame_loss(model, batch, stages, codebooks, 0.0, None)["frame"]

    loss(batch).backward()
    summary = (model.model if part == "ar" else model).embeddings.prompt_summary
    assert all(parameter.grad.abs().sum() > 0 for parameter in summary.parameters())
    other = batch["audio_codes"].clone()
    other[..., :25] = other[..., :25].roll(1, 0)
    assert loss(batch | {"audio_codes": other}) != loss(batch)
    summary.zero_grad()
    loss(batch | {"prompt_lengths": torch.zeros(2, dtype=torch.long)}).backward()
    assert not any(parameter.grad.any() for parameter in summary.parameters())
