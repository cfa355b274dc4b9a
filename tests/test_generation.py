# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Generation: cached = uncached, batch = alone, seeds, exact lengths, sampling, refusals."""

import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from transformers import GenerationConfig, StaticCache

from modeling_midivalle import CodecStream, MidiValleForConditionalGeneration
from modeling_midivalle.dynamics_midivalle import KeyDynamics
from modeling_midivalle.modeling_midivalle_frame_notes import PlayedKeys
from modeling_midivalle.recording_midivalle import RecordingStream, measure_recording
from modeling_midivalle.sampling_midivalle import Sampler, draw_seeds, draw_uniform, join_codes, window_seed

VARIANTS = pytest.mark.parametrize("preset", ["tiny", "summary", "published"])


@pytest.fixture
def song(make_batch):
    """Two rows: MIDI `(2, N, 6)` with mask, prompt codes of 9 and 4 frames, 21 and 30 frames to generate."""
    codes, _, midi_ids, midi_mask, _ = make_batch((34, 34), (9, 4))
    lengths = torch.tensor([9, 4])
    return {
        "input_ids": midi_ids,
        "attention_mask": midi_mask,
        "prompt_codes": codes[..., :9] * (torch.arange(9) < lengths[:, None])[:, None],
        "prompt_lengths": lengths,
        "target_frames": torch.tensor([21, 30]),
    }


def row(song, b):
    """Row `b` alone, without padding."""
    keep, P = song["attention_mask"][b].bool(), int(song["prompt_lengths"][b])
    return {
        "input_ids": song["input_ids"][b : b + 1, keep],
        "prompt_codes": song["prompt_codes"][b : b + 1, :, :P],
        "target_frames": int(song["target_frames"][b]),
    }


GREEDY = Sampler(False)


def struck_in(rows, given, frames):
    """What MIDI rows `(N, 6)` strike in `frames` from frame `given` on, `(1, frames, 88)`, by a loop."""
    struck = torch.zeros(1, frames, 88)
    for pitch, velocity, _, ioi, position, bar in rows.tolist():
        frame = ((bar - 4) * 384 + position - 4) * 50 // 192 - given
        if pitch >= 4 and ioi >= 388 and 0 <= frame < frames:
            struck[0, frame, pitch - 4] = max(struck[0, frame, pitch - 4], (2 * (velocity - 4) + 1) / 127)
    return struck


def decode_struck(codec, codes, struck):
    """Audio of codes and struck keys: silent until the first is, but for a rise within the frame before."""
    audio, first = codec.decode_codes(codes, struck), int(struck[0].any(-1).nonzero()[0])
    audio[..., : first * 640] *= (torch.arange(first * 640) / 640 - first + 1).clamp_min(0)
    return audio


def nearest_to_expected(model, logits, stage):
    book = model.codec.quantizer.layers[stage].codebook.embed
    return torch.cdist(logits.softmax(-1) @ book, book).argmin(-1)


def by_definition(model, song, ar_sampler=GREEDY, nar_sampler=GREEDY, uniform=None):
    """The whole sequence anew for each frame, then each stage."""
    ids, prompt, frames = song["input_ids"], song["prompt_codes"], song["target_frames"]
    P = torch.tensor([prompt.shape[-1]])
    audio = prompt[:, 0]
    if model.ar.config.use_target_bos:
        audio = torch.cat([audio, torch.tensor([[2049]])], 1)
    first = len(audio[0])
    for t in range(frames):
        logits = model.ar(audio, ids, prompt_lengths=P, use_cache=False).logits[:, -1, :2048]
        if ar_sampler is GREEDY and model.config.ar_config.code_choice == "expected":
            code = nearest_to_expected(model, logits, 0)
        else:
            code = ar_sampler(logits, None if uniform is None else uniform[:, 0, t])
        audio = torch.cat([audio, code[:, None]], 1)
    codes = torch.cat([prompt, torch.zeros(1, 4, frames, dtype=torch.long)], -1)
    codes[:, 0, P:] = audio[:, first:]
    for stage in (1, 2, 3):
        logits = model.nar(codes, ids, prompt_lengths=P, stage=stage).logits[:, P:]
        if nar_sampler is GREEDY and model.config.nar_config.code_choice == "expected":
            codes[:, stage, P:] = nearest_to_expected(model, logits, stage)
        else:
            codes[:, stage, P:] = nar_sampler(logits, None if uniform is None else uniform[:, stage])
    return codes[..., P:]


def test_the_nar_computes_only_what_is_new(make_model, song, monkeypatch):
    """What its three stages share once a window, and logits from the first new frame of all rows on."""
    model, shared, kept = make_model(), [], []
    share, apply = model.nar.share_inputs, model.nar._apply_heads
    monkeypatch.setattr(model.nar, "share_inputs", lambda *inputs: shared.append(1) or share(*inputs))
    monkeypatch.setattr(model.nar, "_apply_heads", lambda x, stage: kept.append(x.shape[1]) or apply(x, stage))
    model.generate_codes(**song)
    assert shared == [1] and kept == [30] * 3  # prompts of 9 and 4 frames, 30 in all and 34


@pytest.mark.parametrize(
    "preset, choice", [("tiny", "argmax"), ("tiny", "expected"), ("summary", "argmax"), ("published", "argmax")]
)
@torch.no_grad()
def test_cached_greedy_equals_the_definition(make_model, song, preset, choice):
    model = make_model(preset)
    model.config.ar_config.code_choice = model.config.nar_config.code_choice = choice
    for b in range(2):
        alone = row(song, b)
        codes = model.generate_codes(**alone, do_sample=False)
        assert torch.equal(codes, by_definition(model, alone))
        if choice == "argmax":  # the codes nearest to an expectation of random weights crowd around the middle
            assert len(codes.unique()) > 10  # a constant answer would prove little


def test_codes_up_to_the_end_are_not_expectations(make_model, song):
    """Where the model says when to stop, which no code can say."""
    model = make_model("published")
    codes = model.generate_codes(**row(song, 0), do_sample=False, compat="published")
    model.config.ar_config.code_choice = "expected"
    assert torch.equal(model.generate_codes(**row(song, 0), do_sample=False, compat="published"), codes)


@torch.no_grad()
def test_the_nearest_code_in_half_precision(make_model, song):
    model = make_model().to(torch.bfloat16)
    model.config.ar_config.code_choice = model.config.nar_config.code_choice = "expected"
    codes = model.generate_codes(**row(song, 0), do_sample=False)
    assert codes.shape == (1, 4, 21) and codes.max() < 2048


@torch.no_grad()
def test_sampling_equals_the_definition(make_model, song):
    model, alone = make_model(), row(song, 0)
    uniform = draw_uniform(torch.tensor([21]), 4, 9, 21)
    samplers = Sampler(True, 1.3, 40, 0.9), Sampler(True, 0.8)
    codes = model.generate_codes(**alone, seed=9, temperature=1.3, top_k=40, top_p=0.9, nar_temperature=0.8)
    assert torch.equal(codes, by_definition(model, alone, *samplers, uniform))


@VARIANTS
@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_the_mixin_agrees(make_model, song, preset, cache):
    """`ar.generate` of GenerationMixin, left-padded and batched, gives the same codebook 0."""
    model = make_model(preset)
    model.config.ar_config.code_choice = "argmax"
    ids = torch.zeros(2, 9, dtype=torch.long)
    ids[0], ids[1, 5:] = song["prompt_codes"][0, 0], song["prompt_codes"][1, 0, :4]
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    if model.ar.config.use_target_bos:
        ids = torch.cat([ids, torch.full((2, 1), 2049)], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    out = model.ar.generate(
        ids,
        attention_mask=mask,
        midi_ids=song["input_ids"],
        midi_attention_mask=song["attention_mask"],
        prompt_lengths=song["prompt_lengths"],
        max_new_tokens=21,
        do_sample=False,
        suppress_tokens=[i for i in (2048, 2049) if i < model.ar.config.vocab_size],
        cache_implementation=cache,
        disable_compile=True,
    )
    ours = model.generate_codes(**(song | {"target_frames": 21}), do_sample=False)
    assert torch.equal(out[:, ids.shape[1] :], ours[:, 0])


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@VARIANTS
@torch.no_grad()
def test_a_compiled_step_gives_the_same_codes(make_model, song, preset):
    """The step after the prefill, on a static cache, as one graph."""
    model, alone = make_model(preset), row(song, 0)
    ids = alone["prompt_codes"][:, 0]
    if model.ar.config.use_target_bos:
        ids = torch.cat([ids, torch.tensor([[2049]])], 1)
    plain, compiled = model.ar, torch.compile(model.ar, fullgraph=True, dynamic=True)
    rows, P, results = alone["input_ids"].shape[1], torch.tensor([9]), []
    for step in (plain, compiled):
        cache = StaticCache(config=model.ar.config, max_cache_len=rows + ids.shape[1] + 8)
        shared = {"midi_ids": alone["input_ids"], "prompt_lengths": P, "past_key_values": cache}
        first = plain(ids, **shared)
        logits, shared["prompt_summary"], found = first.logits, first.prompt_summary, []
        for t in range(8):
            found.append(logits[:, -1, :2048].argmax(-1))
            mask = torch.ones(1, ids.shape[1] + t + 1, dtype=torch.long)
            logits = step(found[-1][None], attention_mask=mask, **shared).logits
        results.append(torch.cat(found))
    assert torch.equal(*results) and torch.equal(results[0], model.generate_codes(**alone, do_sample=False)[0, 0, :8])


@VARIANTS
@pytest.mark.parametrize(
    "sampling", [{"do_sample": False, "nar_temperature": None}, {"do_sample": True, "nar_temperature": 0.7, "seed": 11}]
)
def test_batch_equals_alone(make_model, song, preset, sampling):
    """Unequal MIDI, prompts and targets: every row as if it were alone, codes and audio. With 2 of 48 seeds (of
    weights and draws) one draw falls so close to a border that rounding decides, and what follows differs."""
    model = make_model(preset)
    both = model.generate(**song, **sampling, return_dict_in_generate=True)
    assert both.audio_values.shape == (2, 1, 30 * 640)
    for b, frames in enumerate((21, 30)):
        alone = model.generate(**row(song, b), **sampling, return_dict_in_generate=True)
        assert torch.equal(both.audio_codes[b, :, :frames], alone.audio_codes[0])
        torch.testing.assert_close(both.audio_values[b, :, : frames * 640], alone.audio_values[0], atol=1e-5, rtol=0)
    assert not both.audio_codes[0, :, 21:].any() and not both.audio_values[0, :, 21 * 640 :].any()


@torch.no_grad()
def test_the_audio_is_as_the_prompt_was_recorded(make_model, song):
    """On demand or as the model is configured, each piece by its own prompt; codes stay, and a stream is the same."""
    model, given = make_model(), {k: v for k, v in song.items() if not k.startswith("prompt_")}
    waves = 0.1 * torch.randn(2, 1, 9 * 640, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 9 * 640, dtype=torch.long)
    waves[1, 0, 4 * 640 :], mask[1, 4 * 640 :] = 0.0, 0
    given |= {"input_values": waves, "padding_mask": mask, "return_dict_in_generate": True}
    plain, recorded_too = model.generate(**given), model.generate(**given, as_recorded=True)
    assert torch.equal(plain.audio_codes, recorded_too.audio_codes)
    for b, (frames, target) in enumerate(((9, 21), (4, 30))):
        recorded = waves[b, 0, : frames * 640]
        recording = model.measure_prompt(recorded, model.codec.encode_codes(recorded[None, None]))
        expected = RecordingStream(recording)(plain.audio_values[b : b + 1, :, : target * 640])
        torch.testing.assert_close(recorded_too.audio_values[b : b + 1, :, : target * 640], expected, atol=1e-6, rtol=0)
        assert (expected - plain.audio_values[b : b + 1, :, : target * 640]).abs().max() > 1e-3
    model.config.as_recorded = True
    assert torch.equal(model.generate(**given).audio_values, recorded_too.audio_values)
    assert torch.equal(model.generate(**given, as_recorded=False).audio_values, plain.audio_values)
    alone = row(song, 0)
    assert torch.equal(
        model.generate(**alone), model.generate(**alone, as_recorded=False)
    )  # codes tell of no recording
    alone |= {"input_values": waves[:1], "prompt_codes": None}
    assert torch.equal(torch.cat(list(model.generate_stream(**alone)), -1), model.generate(**alone))


@torch.no_grad()
@pytest.mark.parametrize("gain", [0.0, 30.0])
def test_a_prompt_is_compared_with_what_the_model_makes_of_its_notes(make_model, song, gain):
    """Told which keys are struck, and as loud as their velocities say; where none is, with its codes alone."""
    model, given = make_model("keys"), {k: v for k, v in song.items() if not k.startswith("prompt_")}
    model.config.codec_config.num_oscillators, model.config.velocity_gain_db = 16, gain
    waves = 0.1 * torch.randn(2, 1, 9 * 640, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 9 * 640, dtype=torch.long)
    waves[1, 0, 4 * 640 :], mask[1, 4 * 640 :] = 0.0, 0
    given |= {"input_values": waves, "padding_mask": mask}
    plain, made = model.generate(**given), model.generate(**given, as_recorded=True)
    for b, (frames, target) in enumerate(((9, 21), (4, 30))):
        recorded = waves[b, 0, : frames * 640]
        codes, rows = model.codec.encode_codes(recorded[None, None]), row(song, b)
        mask = torch.ones(rows["input_ids"].shape[:2]).bool()
        keys = model.played_keys(rows["input_ids"], mask, torch.zeros(1, dtype=torch.long), frames)
        assert keys.struck.any()
        mean = float(keys.struck[keys.struck > 0].mean())
        stream = CodecStream(model.codec, dynamics=KeyDynamics(gain, mean, 16, 50) if gain else None)
        chain = measure_recording(recorded, stream.push(codes, True, keys)[0, 0], 32000)
        expected = RecordingStream(chain)(plain[b : b + 1, :, : target * 640])
        torch.testing.assert_close(made[b : b + 1, :, : target * 640], expected, atol=1e-6, rtol=0)
        heard = model.measure_prompt(recorded, codes)
        assert (heard.taps - chain.taps).abs().max() > 1e-4
        nothing = PlayedKeys(torch.zeros(1, frames, 88), torch.ones(1, frames, 88).bool())
        assert torch.equal(model.measure_prompt(recorded, codes, nothing).taps, heard.taps)


@torch.no_grad()
def test_a_prompt_is_made_as_a_recording_of_its_loudness(make_model):
    """The mean velocity is its own, and its tones, which do fall, are not made to fall."""
    model = make_model("keys")
    model.config.codec_config.num_oscillators, model.config.velocity_gain_db = 16, 30.0
    model.config.sustain_gain_db = 5.0
    generator = torch.Generator().manual_seed(0)
    codes, recorded = (
        torch.randint(0, 2048, (1, 4, 250), generator=generator),
        torch.randn(160_000, generator=generator),
    )
    struck, key = torch.zeros(1, 250, 88), 33 - 21  # within the 16 pitches
    struck[0, 5, key] = 0.95
    keys = PlayedKeys(struck, struck.cumsum(1) > 0)

    def chain(mean, fall):
        stream = CodecStream(model.codec, dynamics=KeyDynamics(30.0, mean, 16, 50, sustain_db=5.0, late_db=fall))
        return measure_recording(recorded, stream.push(codes, True, keys)[0, 0], 32000).taps

    taps = model.measure_prompt(recorded, codes, keys).taps
    torch.testing.assert_close(taps, chain(0.95, 0.0))
    assert all((chain(*other) - taps).abs().max() > 1e-4 for other in ((0.5, 0.0), (0.95, 1.8)))


@torch.no_grad()
def test_the_midi_tells_the_codec_which_keys_are_struck(make_model, song):
    """The codes stay, the audio is that of their spectra and of the keys in the MIDI rows, each piece's own."""
    model = make_model("keys")
    told = model.generate(**song, return_dict_in_generate=True)
    model.config.keys_from_midi = False
    plain = model.generate(**song, return_dict_in_generate=True)
    assert torch.equal(told.audio_codes, plain.audio_codes)
    for b, frames in enumerate((21, 30)):
        rows, given = row(song, b), int(song["prompt_lengths"][b])
        struck = struck_in(rows["input_ids"][0], given, frames)
        assert struck.count_nonzero() > 2
        expected = decode_struck(model.codec, told.audio_codes[b : b + 1, :, :frames], struck)
        torch.testing.assert_close(told.audio_values[b : b + 1, :, : frames * 640], expected, atol=1e-5, rtol=0)
        assert (expected - plain.audio_values[b : b + 1, :, : frames * 640]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny", "keys"])
def test_the_codec_decodes_the_mean_of_what_is_likely(make_model, song, kind):
    """Codes are as before; the vectors are the code vectors of all stages weighed by their likelihood, computed here of
    the whole sequence at once; audio is what the codec makes of them, in a stream and in any batch too."""
    model = make_model(kind)
    codes = model.generate_codes(**song)
    assert model.generate_frames(**song).vectors is None and model.num_vector_axes == 0
    plain = model.generate(**song)
    model.config.mean_vectors = True
    frames, axes = model.generate_frames(**song), {"tiny": 16, "keys": 12}[kind]
    assert torch.equal(frames.codes, codes) and frames.vectors.shape == (2, axes, 30) == (2, model.num_vector_axes, 30)
    audio = model.generate(**song)
    assert (audio - plain).abs().max() > 1e-4
    for b in range(2):
        rows = row(song, b)
        new, P = codes[b : b + 1, :, : rows["target_frames"]], rows["prompt_codes"].shape[-1]
        whole, lengths = torch.cat([rows["prompt_codes"], new], -1), torch.tensor([P])
        given = model.ar.build_inputs(whole[:, 0], torch.ones_like(whole[:, 0]), lengths)
        logits = [model.ar(given["input_ids"], rows["input_ids"], prompt_lengths=lengths, use_cache=False).logits]
        logits[0] = logits[0][:, P : P + new.shape[-1], :2048]
        for stage in (1, 2, 3):
            logits.append(model.nar(whole, rows["input_ids"], prompt_lengths=lengths, stage=stage).logits[:, P:])
        books = [layer.codebook.embed for layer in model.codec.quantizer.layers]
        expected = sum(a.softmax(-1) @ book for a, book in zip(logits, books, strict=True)).transpose(1, 2)
        found = frames.cut(b, 0, new.shape[-1])
        torch.testing.assert_close(found.vectors.float(), expected[:, :axes], atol=2e-3, rtol=2e-3)
        stream = torch.cat(list(model.generate_stream(**rows)), -1)
        torch.testing.assert_close(audio[b : b + 1, :, : stream.shape[-1]], stream, atol=1e-4, rtol=0)
        if kind == "tiny":
            decoded = model.codec.decode_codes(found.codes, vectors=found.vectors)
            torch.testing.assert_close(stream, decoded, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_rest_at_the_beginning_is_silent(make_model, make_rows):
    """Until the first strike, over windows without notes too; but not where a note sounds on from before."""
    model, rows, held = make_model("keys"), make_rows(seconds=0.2), make_rows(seconds=0.2, notes=0, held=1)
    rows[1:-1, 4] += 96  # ticks, 25 frames
    first = (int(rows[1, 4]) - 4) * 50 // 192
    for before, silent in (([[1] * 6, [2] * 6], 20 + first), (held.tolist(), 0)):
        empty = torch.tensor(before + [[0] * 6] * (len(rows) - len(before)))
        ids = torch.stack([empty, rows])
        given = {"target_frames": torch.tensor([20, 40]), "window_counts": torch.tensor([2])}
        levels = model.generate(ids, attention_mask=(ids[..., 0] > 0).long(), **given)[0, 0].view(-1, 640).abs().amax(1)
        assert (levels[: max(silent - 1, 0)] == 0).all() and (levels[max(silent - 1, 0) :] > 0).all()


@torch.no_grad()
def test_a_tone_held_over_the_end_of_the_prompt_is_no_strike(make_model):
    """The new audio begins silent all the same."""
    rows = torch.tensor([[[1] * 6, [50, 40, 3 + 192, 388, 4, 4], [55, 40, 3 + 40, 388, 4 + 115, 4], [2] * 6]])
    prompt = torch.randint(0, 2048, (1, 4, 10), generator=torch.Generator().manual_seed(0))
    audio = make_model("keys").generate(rows, prompt_codes=prompt, target_frames=40)
    levels = audio.view(-1, 640).abs().amax(1)
    assert (levels[:18] == 0).all() and (levels[18:] > 0).all()  # struck in frame 10 + 19


def test_left_padded_midi_equals_right_padded(make_model, song):
    model = make_model()
    right = model.generate_codes(**song, do_sample=False)
    shift = (song["attention_mask"] == 0).sum(1)
    left = dict(song)
    for name in ("input_ids", "attention_mask"):
        left[name] = torch.stack([r.roll(int(s), 0) for r, s in zip(song[name], shift, strict=True)])
    assert int(shift.max()) > 0 and torch.equal(model.generate_codes(**left, do_sample=False), right)


def test_seed_repeats_exactly(make_model, song):
    model = make_model()
    torch.manual_seed(1)
    first = model.generate(**song, seed=5, temperature=1.0)
    torch.manual_seed(2)
    assert torch.equal(model.generate(**song, seed=5, temperature=1.0), first)
    assert not torch.equal(model.generate(**song, seed=6, temperature=1.0), first)
    seeds = model.generate_codes(**song, seed=[5, 6])
    assert torch.equal(model.generate_codes(**song, seed=np.int64(5)), model.generate_codes(**song, seed=5))
    assert torch.equal(seeds[0], model.generate_codes(**song, seed=5)[0])
    assert torch.equal(model.generate_codes(**song, seed=2**64 + 5), model.generate_codes(**song, seed=5))
    assert torch.equal(seeds[1], model.generate_codes(**song, seed=6)[1])
    torch.manual_seed(3)
    free = model.generate_codes(**song)
    torch.manual_seed(3)
    assert torch.equal(model.generate_codes(**song), free)  # without a seed, torch's own generator counts


def test_a_limit_that_is_off_draws_nothing(make_model, song):
    model = make_model()
    greedy = model.generate_codes(**song)
    assert torch.equal(model.generate_codes(**song, top_p=1.0, top_k=0), greedy)
    assert not torch.equal(model.generate_codes(**song, top_p=0.99), greedy)
    assert not torch.equal(model.generate_codes(**song, top_k=50), greedy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_is_halved_as_a_whole_still_plays(make_model, song, dtype):
    model = make_model().to(dtype)
    song = {k: v for k, v in song.items() if not k.startswith("prompt_")}
    audio = model.generate(**song, input_values=0.1 * torch.randn(2, 1, 9 * 640))
    assert audio.dtype == torch.float32 and audio.isfinite().all() and audio.std() > 0


def test_generation_config_is_the_default_and_is_saved(make_model, song, tmp_path):
    model = make_model()
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=7, top_p=0.8)
    expected = model.generate_codes(**song, seed=1, do_sample=True, temperature=0.5, top_k=7, top_p=0.8)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.generate_codes(**song, seed=1), expected)


def test_audio_prompt_equals_its_codes(make_model, song):
    model = make_model()
    wave = torch.randn(2, 1, 9 * 640, generator=torch.Generator().manual_seed(0))
    padding_mask = torch.ones(2, 9 * 640, dtype=torch.long)
    padding_mask[1, 4 * 640 - 100 :] = 0  # a broken last frame counts as one
    codes = model.codec.encode_codes(wave, padding_mask)
    midi = {k: song[k] for k in ("input_ids", "attention_mask", "target_frames")}
    from_audio = model.generate(**midi, input_values=wave, padding_mask=padding_mask, do_sample=False)
    expected = model.generate(**midi, prompt_codes=codes, prompt_lengths=torch.tensor([9, 4]), do_sample=False)
    assert torch.equal(from_audio, expected)


def test_length_follows_the_midi(make_model):
    """Without target_frames: to the end of the last sounding note, which need not be the last row."""
    rows = [[1] * 6, [50, 40, 3 + 192, 388, 4, 4], [55, 40, 3 + 10, 388 + 96, 4 + 96, 4], [2] * 6]
    out = make_model().generate(torch.tensor([rows]), seed=0)
    assert out.shape == (1, 1, 50 * 640)
    prompt = torch.zeros(1, 4, 20, dtype=torch.long)
    assert make_model().generate(torch.tensor([rows]), prompt_codes=prompt, seed=0).shape == (1, 1, 30 * 640)


def test_eos_and_bos_are_never_chosen(make_model, song):
    model = make_model()
    with torch.no_grad():
        model.ar.lm_head.weight[2048:] = 50 * model.ar.lm_head.weight[2048:].sign()
    codes = model.generate_codes(**song, seed=0, temperature=5.0, top_k=0, top_p=1.0)
    assert 0 <= int(codes.min()) and int(codes.max()) < 2048


def test_nan_raises(make_model, song):
    model = make_model()
    with torch.no_grad():
        model.ar.model.layers[1].linear2.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        model.generate(**song)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.full((1, 3, 6), 20)}, r"MIDI row \[0, 0\]: bar id 20 .* at most 32 s"),
        ({"input_ids": torch.zeros(1, 3, 5, dtype=torch.long)}, r"must be \(1, N, 6\)"),
        ({"input_values": torch.zeros(1, 1, 640)}, "not both"),
        ({"prompt_codes": torch.zeros(1, 3, 5, dtype=torch.long)}, "prompt_codes must be"),
        ({"prompt_codes": torch.full((1, 4, 5), 2048)}, r"prompt_codes must lie in \[0, 2048\)"),
        ({"prompt_lengths": torch.tensor([99])}, "prompt_lengths must be"),
        ({"target_frames": 0}, "target_frames must be"),
        ({"target_frames": 1592}, r"1601 frames .* at most 1600 \(32 s\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must be \(1, 1\d\), got \(2, 3\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": "1"}, "temperature must be a finite number of at least 0, got '1'"),
        ({"temperature": math.nan}, "temperature must be a finite number of at least 0, got nan"),
        ({"temperature": -1, "do_sample": False}, "temperature must be a finite number of at least 0, got -1"),
        ({"temperature": True}, "temperature must be a finite number of at least 0, got True"),
        ({"nar_temperature": -1.0}, "nar_temperature must be a finite number of at least 0, got -1.0"),
        ({"nar_temperature": "0.7"}, "nar_temperature must be a finite number of at least 0, got '0.7'"),
        ({"nar_temperature": math.inf}, "nar_temperature must be a finite number of at least 0, got inf"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0.0"),
        ({"top_p": "0.9"}, "top_p must be a number above 0 and at most 1, got '0.9'"),
        ({"top_p": math.nan}, "top_p must be a number above 0 and at most 1, got nan"),
        ({"top_k": "5"}, "top_k must be a whole number of at least 0, got '5'"),
        ({"top_k": -5}, "top_k must be a whole number of at least 0, got -5"),
        ({"do_sample": "no"}, "do_sample must be True or False, got 'no'"),
        ({"as_recorded": "no"}, "as_recorded must be True or False, got 'no'"),
        ({"seed": "3"}, "seed must be an integer or a list of integers, got '3'"),
        ({"target_frames": "5"}, "target_frames must be numbers, got '5'"),
        ({"mean_velocities": "loud"}, "mean_velocities must be numbers, got 'loud'"),
        ({"seed": [1, 2, 3]}, r"one for each row \(1\), got 3"),
        ({"seed": torch.tensor(3)}, r"seed must be an integer or a list of integers, got tensor\(3\)"),
        ({"target_frames": 3.5}, "target_frames must be whole numbers, got 3.5"),
        (
            {"input_ids": np.zeros((1, 3, 6), np.int64)},
            r"MIDI rows must be a tensor of integers \(torch.long\), got ndarray",
        ),
        ({"prompt_codes": torch.zeros(1, 4, 9)}, r"prompt_codes must be a tensor of integers .*got torch.float32"),
        ({"prompt_codes": torch.zeros(1, 4, 9, dtype=torch.int16)}, "prompt_codes must be a tensor .*got torch.int16"),
        ({"input_ids": torch.zeros(1, 3, 6, dtype=torch.uint8)}, "MIDI rows must be a tensor .*got torch.uint8"),
        ({"prompt_lengths": [9]}, "prompt_lengths must be a tensor of integers .*got list"),
        (
            {"prompt_codes": None, "prompt_lengths": [9], "input_values": torch.zeros(1, 1, 5760)},
            "prompt_lengths must be a tensor of integers .*got list",
        ),
        ({"context_frames": 0}, "context_frames must be a tensor of integers .*got int"),
        ({"window_counts": [1]}, "window_counts must be a tensor of integers .*got list"),
        ({"attention_mask": [[1]]}, "attention_mask must be a tensor, got list"),
        (
            {"prompt_codes": None, "prompt_lengths": None, "input_values": [0.0]},
            "input_values must be a tensor, got list",
        ),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"generation_config": GenerationConfig()}, "no generation_config: set model.generation_config"),
        ({"max_new_tokens": 5}, "no max_new_tokens: target_frames sets the length"),
        ({"streamer": print}, "no streamer: generate_stream gives the audio"),
        ({"num_beams": 2}, "no num_beams: generate_stream lists its arguments"),
    ],
)
def test_wrong_input_is_refused(make_model, song, change, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**(row(song, 0) | change))


def test_weights_may_be_offloaded(make_model, make_rows):
    """By accelerate: they are on "meta", and are there only while a layer's own forward runs."""
    parts = make_model()
    model = MidiValleForConditionalGeneration.from_sub_models(
        parts.codec, parts.ar, parts.nar, as_recorded=True, colour_gains_db=[1.0] * 10
    )
    wave = 0.1 * torch.randn(1, 1, 32_000, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": make_rows(0)[None], "input_values": wave, "target_frames": 20}
    audio = model.generate(**inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.codec.device.type == "meta"
    torch.testing.assert_close(model.generate(**inputs), audio)


def test_a_device_map_does_not_cut_the_codec(make_model):
    """Its layers read one another's weights."""
    model = make_model()
    room = int(1.5 * sum(parameter.nbytes for parameter in model.codec.parameters()))
    found = infer_auto_device_map(model, {"cpu": room, "disk": 2**40}, model._no_split_modules)
    assert found and not [name for name in found if name.startswith("codec.")]


def test_numbers_of_numpy_are_numbers(make_model, song):
    model = make_model()
    given = {"temperature": 1.5, "top_k": 40, "top_p": 0.75, "nar_temperature": 0.5}
    numpy = {name: np.int64(value) if name == "top_k" else np.float32(value) for name, value in given.items()}
    codes = [model.generate_codes(**row(song, 0), seed=9, **sampling) for sampling in (given, numpy)]
    assert torch.equal(*codes)


def test_codes_have_no_other_options_either(make_model, song):
    with pytest.raises(ValueError, match="no max_length: target_frames"):
        make_model().generate_codes(**row(song, 0), max_length=5)


def test_train_mode_with_gradient_checkpointing_is_refused(make_model, song):
    model = make_model().train()
    model.ar.model.layers[0].gradient_checkpointing = True
    for generate, inputs in ((model.generate, row(song, 0)), (model.ar.generate, {"max_new_tokens": 3})):
        with pytest.raises(ValueError, match=r"call model.eval\(\) before generate"):
            generate(**inputs)
    assert model.eval().generate(**row(song, 0)).shape == (1, 1, 21 * 640)


def test_the_published_model_needs_a_prompt(make_model, song):
    midi = {k: song[k] for k in ("input_ids", "attention_mask", "target_frames")}
    assert make_model().generate_codes(**midi, seed=0).shape == (2, 4, 30)
    with pytest.raises(ValueError, match="needs a prompt"):
        make_model("published").generate_codes(**midi)


def published_row(make_model, make_rows, notes=2):
    """A published model and a row of `notes` + 2 MIDI rows with a prompt of 6 frames."""
    codes = torch.randint(0, 2048, (1, 4, 6), generator=torch.Generator().manual_seed(1))
    return make_model("published"), {"input_ids": make_rows(0, notes)[None], "prompt_codes": codes}


def edit_logits(model, edit):
    """Call `edit(logits, frames so far)` on the logits `(1, 1, 2049)` of every step; it changes them in place."""

    def hook(_module, _inputs, kwargs, output):
        edit(output.logits, kwargs["attention_mask"].shape[1])

    model.ar.register_forward_hook(hook, with_kwargs=True)


def test_published_rules_stop_at_the_cap_or_where_eos_is_likeliest(make_model, make_rows):
    """Whatever `target_frames` says: 16 frames a row and one; or where the argmax is EOS, though it was not drawn."""
    model, row = published_row(make_model, make_rows)
    edit_logits(model, lambda logits, _: logits[..., 2048].fill_(-1e4))
    out = model.generate(**row, target_frames=3, compat="published", seed=0, return_dict_in_generate=True)
    assert out.audio_codes.shape == (1, 4, 16 * 4 + 1) and out.target_frames.tolist() == [65]
    assert out.audio_values.shape == (1, 1, 65 * 640)
    again = model.generate_codes(**row, compat="published", seed=0)
    padded = {"input_ids": torch.cat([row["input_ids"], torch.zeros(1, 3, 6, dtype=torch.long)], 1)}
    padded["attention_mask"] = torch.tensor([[1] * 4 + [0] * 3])  # padding counts no frames
    assert torch.equal(out.audio_codes, again)
    assert torch.equal(again, model.generate_codes(**(row | padded), compat="published", seed=0))

    def end_after_nine(logits, frames):
        if frames == 6 + 9:
            logits[..., 2048] = logits.amax() + 0.01  # the likeliest, but of 2049 hardly ever the drawn one

    edit_logits(model, end_after_nine)
    assert torch.equal(model.generate_codes(**row, compat="published", seed=0)[:, 0], again[:, 0, :9])


def test_published_rules_stop_where_eos_is_drawn(make_model, make_rows):
    """EOS just below the likeliest code is drawn sooner or later, and then ends the row."""
    model, row = published_row(make_model, make_rows, notes=6)
    lengths = set()
    edit_logits(model, lambda logits, _: logits[..., 2048].fill_(float(logits.amax()) - 0.5))
    for seed in range(8):
        try:
            lengths.add(model.generate_codes(**row, compat="published", seed=seed).shape[-1])
        except ValueError as error:
            assert "before the first frame" in str(error)
    assert len(lengths) > 1 and min(lengths) < 16 * 8  # else only the cap or the argmax would end it


def test_published_sampling_draws_from_all_codes(make_model, make_rows):
    """No top-k, no top-p, temperature 1, whatever the generation configuration says; our own rules follow it."""
    model, row = published_row(make_model, make_rows)
    model.generation_config.top_k = 1
    edit_logits(model, lambda logits, _: logits.zero_()[..., 2048].fill_(-1e4))
    free = model.generate_codes(**row, compat="published", seed=0)[0, 0]
    assert len(free.unique()) > 55  # of 65: equal chances for 2048 codes
    own = model.generate_codes(**row, target_frames=65, seed=0)[0, 0]
    assert len(own.unique()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"compat": "paper"}, "compat must be"), ({"input_ids": torch.ones(2, 3, 6, dtype=torch.long)}, "one row")],
)
def test_published_rules_refuse(make_model, make_rows, change, message):
    model, row = published_row(make_model, make_rows)
    if len(change.get("input_ids", row["input_ids"])) == 2:
        change = change | {"prompt_codes": row["prompt_codes"].repeat(2, 1, 1)}
    with pytest.raises(ValueError, match=message):
        model.generate_codes(**(row | {"compat": "published"} | change))
    with pytest.raises(ValueError, match="without a BOS frame"):
        make_model().generate_codes(**row, compat="published")


@pytest.mark.parametrize("windows", [{"window_counts": [2]}, {"context_frames": [2, 2]}])
def test_published_rules_make_no_windows(make_model, make_rows, windows):
    """Two windows would be of any lengths and overlap: the processor's inputs of a piece are refused, not misread."""
    model, row = published_row(make_model, make_rows)
    windows = {name: torch.tensor(value) for name, value in windows.items()}
    row |= {"input_ids": row["input_ids"].repeat(2, 1, 1), "target_frames": torch.tensor([3, 3])}
    row["prompt_codes"] = row["prompt_codes"].repeat(1 if "window_counts" in windows else 2, 1, 1)
    with pytest.raises(ValueError, match="in one window, without context: give the inputs of processor.window_inputs"):
        model.generate(**row, **windows, compat="published")


# --- pieces of several windows --------------------------------------------------------------------


@pytest.fixture
def pieces(make_rows):
    """Two pieces, of three windows (20, 30, 25 frames) and of one (40), after prompts of 9 and 4 frames."""
    rows = [make_rows(seed, notes=6 + seed, seconds=1.0, held=seed % 2) for seed in range(4)]
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], True),
        "prompt_codes": torch.randint(0, 2048, (2, 4, 9), generator=generator),
        "prompt_lengths": torch.tensor([9, 4]),
        "target_frames": torch.tensor([20, 30, 25, 40]),
        "context_frames": torch.tensor([0, 20, 25, 0]),
        "window_counts": torch.tensor([3, 1]),
    }


def piece(pieces, b):
    """Piece `b` alone."""
    first = int(pieces["window_counts"][:b].sum())
    windows = slice(first, first + int(pieces["window_counts"][b]))
    P = int(pieces["prompt_lengths"][b])
    alone = {key: pieces[key][windows] for key in ("input_ids", "attention_mask", "target_frames", "context_frames")}
    alone |= {"prompt_codes": pieces["prompt_codes"][b : b + 1, :, :P]}
    return alone | {"window_counts": pieces["window_counts"][b : b + 1]}


SAMPLED = {"temperature": 1.0, "nar_temperature": 0.7}


def test_streaming_equals_offline_sample_for_sample(make_model, pieces):
    """Chunks of a stream together are `generate`, bit by bit, and one decode of all codes within 1e-4."""
    model, one = make_model(), piece(pieces, 0)
    chunks = list(model.generate_stream(**one, seed=4, **SAMPLED))
    assert len(chunks) == 3 and all(chunk.shape[-1] > 0 for chunk in chunks)
    whole = model.generate(**one, seed=4, **SAMPLED, return_dict_in_generate=True)
    assert torch.equal(torch.cat(chunks, -1), whole.audio_values) and whole.audio_values.shape == (1, 1, 75 * 640)
    decoded = model.codec.decode_codes(whole.audio_codes)
    torch.testing.assert_close(whole.audio_values, decoded, atol=1e-4, rtol=0)
    stream = model.generate_stream(**one, seed=4, **SAMPLED)  # a consumer that stops early has had what it took
    assert torch.equal(next(stream), chunks[0])
    stream.close()
    with pytest.raises(ValueError, match="a stream is of one piece"):
        next(model.generate_stream(**pieces))


def test_pieces_side_by_side_equal_each_alone(make_model, pieces):
    model = make_model()
    both = model.generate(**pieces, seed=4, **SAMPLED, return_dict_in_generate=True)
    assert both.target_frames.tolist() == [75, 40] and both.audio_values.shape == (2, 1, 75 * 640)
    for b, frames in enumerate((75, 40)):
        alone = model.generate(**piece(pieces, b), seed=4, **SAMPLED, return_dict_in_generate=True)
        assert torch.equal(both.audio_codes[b, :, :frames], alone.audio_codes[0])
        torch.testing.assert_close(both.audio_values[b, :, : frames * 640], alone.audio_values[0], atol=1e-5, rtol=0)
    assert not both.audio_codes[1, :, 40:].any() and not both.audio_values[1, :, 40 * 640 :].any()


@torch.no_grad()
def test_a_window_strikes_the_keys_of_its_new_frames(make_model, pieces):
    """Not those of its context, nor of the prompt."""
    model, one = make_model("keys"), piece(pieces, 0)
    made, struck = model.generate(**one, return_dict_in_generate=True), []
    for rows, context, frames in zip(one["input_ids"], one["context_frames"], one["target_frames"]):
        struck.append(struck_in(rows, 9 + int(context), int(frames)))
        assert struck[-1].any()
    expected = decode_struck(model.codec, made.audio_codes, torch.cat(struck, 1))
    torch.testing.assert_close(made.audio_values, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_window_goes_on_from_its_context(make_model, pieces):
    """The codes after a context are those that one long window gives, if its first codes are the context."""
    model, rows = make_model(), pieces["input_ids"][:1]
    prompt = {"prompt_codes": pieces["prompt_codes"][:1]}
    long = model.generate_codes(rows, **prompt, target_frames=50, do_sample=False)
    context = long[..., :30]
    after = model.generate_codes(rows, **prompt, target_frames=20, context_codes=context, do_sample=False)
    assert torch.equal(after[:, 0], long[:, 0, 30:])
    # the NAR of the long window also predicted the context: with the same frames it predicts the same
    codes = torch.cat([prompt["prompt_codes"], long], -1)
    codes[:, 1:, 9 + 30 :] = 0
    for stage in (1, 2, 3):
        logits = model.nar(codes, rows, prompt_lengths=torch.tensor([9]), stage=stage).logits[:, 9 + 30 :]
        codes[:, stage, 9 + 30 :] = logits.argmax(-1)
    assert torch.equal(after, codes[..., 9 + 30 :])
    # contexts and prompts of unequal lengths in one batch
    batch = {key: pieces[key][2:] if key != "prompt_codes" else pieces[key] for key in ("input_ids", "attention_mask")}
    context = torch.randint(0, 2048, (2, 4, 7), generator=torch.Generator().manual_seed(8))
    lengths = torch.tensor([3, 7])
    shared = {"prompt_lengths": pieces["prompt_lengths"], "target_frames": torch.tensor([12, 8]), "do_sample": False}
    both = model.generate_codes(
        **batch, prompt_codes=pieces["prompt_codes"], context_codes=context, context_lengths=lengths, **shared
    )
    for b in range(2):
        P, C, T = (int(x[b]) for x in (pieces["prompt_lengths"], lengths, shared["target_frames"]))
        alone = model.generate_codes(
            batch["input_ids"][b : b + 1],
            batch["attention_mask"][b : b + 1],
            pieces["prompt_codes"][b : b + 1, :, :P],
            target_frames=T,
            context_codes=context[b : b + 1, :, :C],
            do_sample=False,
        )
        assert torch.equal(both[b, :, :T], alone[0]) and not both[b, :, T:].any()


def test_draws_depend_on_seed_and_window_alone(make_model, pieces):
    """Window 2 draws the same numbers whatever window 1 needed; other windows and seeds draw others."""
    seeds = {window_seed(seed, window) for seed in range(20) for window in range(20)}
    assert len(seeds) == 400 and window_seed(7, 0) == 7 and all(0 <= seed < 2**63 for seed in seeds)
    model, one = make_model(), piece(pieces, 0)
    one["context_frames"] = torch.zeros(3, dtype=torch.long)
    whole = model.generate(**one, seed=4, **SAMPLED, return_dict_in_generate=True).audio_codes
    used = one["attention_mask"][1].bool()
    alone = model.generate_codes(
        one["input_ids"][1:2, used], None, one["prompt_codes"], target_frames=30, seed=window_seed(4, 1), **SAMPLED
    )
    assert torch.equal(alone, whole[..., 20:50])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_counts": torch.tensor([3, 2])}, r"window_counts \[3, 2\] must be positive and sum up to .* \(4\)"),
        ({"window_counts": torch.tensor([4, 0])}, "window_counts"),
        ({"context_frames": torch.tensor([0, 1])}, "context_frames must be numbers from 0, one for each window .4"),
        (
            {"context_frames": torch.tensor([0, -1, 0, 0])},
            "context_frames must be numbers from 0, one for each window .4",
        ),
        ({"context_frames": torch.tensor([0, 21, 25, 0])}, "context_frames 21 is more than the 20 that"),
        ({"context_frames": torch.tensor([0, 20, 1570, 0])}, "1604 frames of prompt, context and target"),
        ({"prompt_codes": torch.zeros(4, 4, 9, dtype=torch.long)}, r"prompt_codes must be \(2, 4, P\)"),
    ],
)
def test_pieces_that_do_not_fit_together(make_model, pieces, change, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**(pieces | change), seed=0)


# --- parts ----------------------------------------------------------------------------------------


def test_sampler_follows_the_distribution():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    uniform = (torch.arange(2000) + 0.5) / 2000

    def shares(**fields):
        codes = Sampler(True, **fields)(logits.expand(2000, 4), uniform)
        return (codes.bincount(minlength=4) / 2000).tolist()

    assert shares() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=2e-3)
    assert shares(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-3)
    assert shares(top_p=0.71) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=2e-3)
    assert shares(top_p=0.69) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-3)
    assert shares(top_k=2, top_p=0.9) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-3)
    assert shares(top_k=1) == shares(top_p=1e-6) == [0, 1, 0, 0]
    squared = torch.tensor([0.1, 0.4, 0.2, 0.3]) ** 2
    assert shares(temperature=0.5) == pytest.approx((squared / squared.sum()).tolist(), abs=2e-3)


def test_no_more_codes_than_top_p_needs():
    assert not Sampler(True, top_p=0.5)(torch.zeros(100, 2), torch.arange(100) / 100).any()


def test_seeds_are_taken_as_they_are():
    assert draw_seeds(2**40 + 3, 2) == [2**40 + 3] * 2 and draw_seeds([-1, 2**63 + 1], 2) == [2**63 - 1, 1]


def test_uniform_numbers_of_a_row_do_not_depend_on_the_batch():
    both = draw_uniform(torch.tensor([7, 40]), 4, 3, 40)
    assert torch.equal(both[:1, :, :7], draw_uniform(torch.tensor([7]), 4, 3, 7))
    assert torch.equal(both[1:], draw_uniform(torch.tensor([40]), 4, 3, 40))


def test_join_codes_by_hand():
    prompt, target = torch.tensor([[[1, 2, 3]], [[4, 0, 0]]]), torch.tensor([[[7, 8]], [[9, 9]]])
    joined, mask = join_codes(prompt, torch.tensor([3, 1]), target, torch.tensor([1, 2]))
    assert joined[:, 0].tolist() == [[1, 2, 3, 7], [4, 9, 9, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
