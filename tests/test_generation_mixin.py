# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`MidiValleARModel.generate` of transformers: every way to the next code agrees with the plain forward pass.

The cache holds MIDI rows in front of the frames; whatever counts cached places has to know that.
"""

import inspect
import shutil

import pytest
import torch
from transformers import StaticCache
from transformers.generation import CompileConfig

STEPS = 6


@pytest.fixture
def ar(make_ar):
    return make_ar(eos_token_id=None, tie_word_embeddings=False)  # of full length, and not one code again and again


@pytest.fixture
def inputs(make_rows):
    """Two rows, the shorter one padded on the left: prompts of 5 and 2 codes, then BOS and target codes."""
    g = torch.Generator().manual_seed(0)
    lengths, prompts = torch.tensor([9, 6]), torch.tensor([5, 2])
    ids = torch.randint(0, 2048, (2, 9), generator=g)
    index = torch.arange(9) - (9 - lengths)[:, None]
    ids = ids.masked_fill(index == prompts[:, None], 2049)
    return {
        "input_ids": ids.masked_fill(index < 0, 2048),
        "attention_mask": (index >= 0).long(),
        "midi_ids": torch.stack([make_rows(b, notes=12) for b in range(2)]),
        "prompt_lengths": prompts,
    }


def generate(ar, inputs, steps=STEPS, **kwargs):
    options = {"do_sample": False, "max_new_tokens": steps, "return_dict_in_generate": True, "output_scores": True}
    return ar.generate(**(inputs | options | kwargs))


def one(inputs):
    """The first row alone, of which nothing is padding."""
    return {name: value[:1] for name, value in inputs.items()}


@torch.no_grad()
def plain_greedy(ar, inputs):
    """Codes `(B, T + STEPS)` and logits `(B, STEPS, vocab_size)`, every step by a forward pass over everything."""
    inputs, logits = dict(inputs), []
    for _ in range(STEPS):
        logits.append(ar(**inputs, use_cache=False).logits[:, -1])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], logits[-1].argmax(-1, keepdim=True)], 1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return inputs["input_ids"], torch.stack(logits, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"logits_to_keep": 0},
    ],
    ids=str,
)
def test_greedy(ar, inputs, options):
    codes, logits = plain_greedy(ar, inputs)
    output = generate(ar, inputs, **options)
    assert torch.equal(output.sequences, codes)
    torch.testing.assert_close(torch.stack(output.scores, 1), logits, atol=1e-5, rtol=0)


def test_static_cache_has_room_for_midi_rows_and_frames(ar, inputs):
    cache = generate(ar, inputs, cache_implementation="static").past_key_values
    assert isinstance(cache, StaticCache)
    assert cache.layers[0].keys.shape == (2, 2, inputs["midi_ids"].shape[1] + 9 + STEPS - 1, 16)


def test_outputs_of_each_step(ar, inputs):
    ar.set_attn_implementation("eager")
    rows = inputs["midi_ids"].shape[1]
    output = generate(ar, inputs, steps=3, output_attentions=True, output_hidden_states=True, output_logits=True)
    assert [a[0].shape for a in output.attentions] == [(2, 2, rows + 9, rows + 9)] + [
        (2, 2, 1, rows + 9 + t) for t in (1, 2)
    ]
    assert [h[-1].shape for h in output.hidden_states] == [(2, rows + 9, 32), (2, 1, 32), (2, 1, 32)]
    assert all(torch.equal(*pair) for pair in zip(output.logits, output.scores, strict=True))


@pytest.mark.parametrize("cached", [True, False])
def test_beams(ar, inputs, cached):
    """Beam search finds codes at least as likely as the greedy ones, and its scores are those of the codes."""
    greedy = generate(ar, inputs)
    beams = generate(ar, inputs, num_beams=4, num_return_sequences=2, use_cache=cached, length_penalty=0.0)
    assert beams.sequences.shape == (4, 9 + STEPS)
    total = torch.stack(greedy.scores, 1).log_softmax(-1).amax(-1).sum(1)
    assert (beams.sequences_scores.view(2, 2)[:, 0] >= total - 1e-4).all()
    twice = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    twice |= {
        "input_ids": beams.sequences,
        "attention_mask": torch.nn.functional.pad(twice["attention_mask"], (0, STEPS), value=1),
    }
    with torch.no_grad():
        logits = ar(**twice).logits[:, 8:-1].log_softmax(-1)
    found = logits.gather(-1, beams.sequences[:, 9:, None]).sum((1, 2))
    torch.testing.assert_close(beams.sequences_scores, found, atol=1e-3, rtol=0)


def test_sampling(ar, inputs):
    """A seed repeats; the cache changes nothing; `num_return_sequences` gives sequences of their own."""
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 50, "temperature": 1.3}
    runs = []
    for cached in (True, True, False):
        torch.manual_seed(1)
        runs.append(generate(ar, inputs, use_cache=cached, **options).sequences)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2]) and len(runs[0].unique(dim=0)) == 6


def test_assisted_decoding_is_refused(ar, inputs):
    """It would cut MIDI rows off the cache."""
    for options in ({"assistant_model": ar}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="not supported with stateful models, such as MidiValleARModel"):
            generate(ar, one(inputs), **options)


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("padded", [True, False])
def test_compiled(ar, inputs, padded):
    """`generate` compiles the step on a static cache as one graph, once: the same codes, and no graph anew."""
    torch.compiler.reset()
    inputs = inputs if padded else one(inputs)
    expected = generate(ar, inputs)
    config = CompileConfig(fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # else a CPU is left out
    with torch._dynamo.config.patch(error_on_recompile=True):
        output = generate(ar, inputs, cache_implementation="static", compile_config=config)
    assert hasattr(ar, "_compiled_call") and torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(expected.scores), atol=1e-5, rtol=0)


@pytest.mark.parametrize("given", ["all codes", "new codes"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_going_on_from_a_cache(ar, inputs, given, cache):
    """Three codes, then the rest with the cache of the first call: as in one call."""
    whole = generate(ar, inputs)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    if cache == "static":
        rows = inputs["midi_ids"].shape[1]
        options = {"past_key_values": StaticCache(config=ar.config, max_cache_len=rows + 9 + STEPS)}
    first = generate(ar, inputs, steps=3, **options)
    rest = inputs | {
        "input_ids": first.sequences if given == "all codes" else first.sequences[:, -1:],
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1),
        "past_key_values": first.past_key_values,
    }
    second = generate(ar, rest, steps=STEPS - 3)
    assert torch.equal(second.sequences[:, -3:], whole.sequences[:, -3:])
    torch.testing.assert_close(torch.stack(second.scores), torch.stack(whole.scores[3:]), atol=1e-5, rtol=0)


def test_stops(ar, inputs):
    """At the end-of-sequence id, each row for itself, padded behind; else at the length asked for."""
    whole = generate(ar, inputs).sequences
    first, second = whole[:, 9:].tolist()
    t = next(t for t in range(1, STEPS - 1) if first[t] not in first[:t] + second)
    options = {"eos_token_id": first[t], "pad_token_id": 2048}
    stopped = generate(ar, inputs, **options).sequences[:, 9:].tolist()
    assert stopped == [first[: t + 1] + [2048] * (STEPS - t - 1), second]
    assert generate(ar, one(inputs), **options).sequences.shape == (1, 9 + t + 1)
    assert generate(ar, inputs, steps=None, max_length=11).sequences.shape == (2, 11)


def test_without_midi(ar):
    """From BOS alone, frames after frames; MIDI changes them."""
    alone = generate(ar, {}).sequences
    empty = {"input_ids": torch.tensor([[2049]]), "midi_ids": torch.zeros(1, 0, 6, dtype=torch.long)}
    assert alone.shape == (1, 1 + STEPS) and torch.equal(alone, generate(ar, empty).sequences)
    codes, logits = plain_greedy(ar, empty | {"attention_mask": torch.ones(1, 1, dtype=torch.long)})
    assert torch.equal(alone, codes)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_from_vectors(ar, inputs, cache):
    """`inputs_embeds` instead of codes: the same codes follow; other vectors, other logits; never both."""
    ids = inputs.pop("input_ids")
    vectors = {"inputs_embeds": ar.get_input_embeddings()(ids).detach()}
    whole = generate(ar, inputs | {"input_ids": ids})
    output = generate(ar, inputs | vectors, cache_implementation=cache)
    assert torch.equal(output.sequences, whole.sequences[:, 9:])
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(whole.scores), atol=1e-5, rtol=0)
    mixed = generate(ar, inputs | {"inputs_embeds": vectors["inputs_embeds"].flip(1)})
    assert (mixed.scores[0] - whole.scores[0]).abs().max() > 0.1
    for wrong in ({}, vectors | {"input_ids": ids}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            ar(**inputs, **wrong)


def test_positions_come_from_the_mask_and_the_cache(ar, inputs, monkeypatch):
    """There is no `position_ids` to get wrong; positions that ignored the cache would be seen by these tests."""
    assert "position_ids" not in inspect.signature(ar.forward).parameters
    whole = generate(ar, inputs)
    blind = lambda mask: torch.zeros_like(mask) if mask.shape[1] > 9 else (mask.cumsum(1) - 1).clamp(min=0)  # noqa: E731
    monkeypatch.setattr("modeling_midivalle.modeling_midivalle_ar.attended_index", blind)
    assert (generate(ar, inputs).scores[1] - whole.scores[1]).abs().max() > 1e-2


def test_the_whole_models_input_embeddings_are_the_ars(make_model):
    model = make_model()
    table = torch.nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table and model.ar.get_input_embeddings() is table
