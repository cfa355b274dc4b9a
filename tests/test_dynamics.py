# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What single keys are made louder by behind the codec's LSTM, and what happens to the treble of its audio."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from modeling_midivalle import CodecStream, MidiValleConfig, PianoEncodecConfig, PianoEncodecModel
from modeling_midivalle.dynamics_midivalle import (
    ATTACK_FADING_S,
    FADING_S,
    FEW_LIMIT_DB,
    KNOWN,
    LATE_S,
    LEVEL_DB,
    MEMORY_S,
    OCTAVE_FADING_S,
    SOFTEST_DB,
    SUSTAIN_AFTER_S,
    SUSTAIN_FADING_S,
    SUSTAIN_LIMIT_DB,
    TREBLE_FADING_S,
    TREBLE_LIMITS_DB,
    KeyDynamics,
    TrebleSplit,
)
from modeling_midivalle.modeling_midivalle_frame_notes import PlayedKeys

C4, C5 = 60 - 21, 72 - 21  # keys
CODEC = {"num_filters": 4, "hidden_size": 100, "num_lstm_layers": 1, "num_key_axes": 88, "num_oscillators": 32}


def rolls(frames, *strikes):
    """Each key is held until the end."""
    struck, held = torch.zeros(1, frames, 88), torch.zeros(1, frames, 88, dtype=torch.bool)
    for frame, key, velocity in strikes:
        struck[0, frame, key], held[0, frame:, key] = velocity, True
    return PlayedKeys(struck, held)


def decibels(dynamics):
    """(T, pitches), without what all have; both channels of a pair have the same factor."""
    factors = dynamics.pitches
    assert torch.equal(factors[..., ::2], factors[..., 1::2])
    return 20 * factors[0, :, ::2].log10() - LEVEL_DB


PARTIALS = {0: 1.0, 12: 0.8, 19: 0.6, 24: 0.5, 28: 0.4, 31: 0.35, 34: 0.3, 36: 0.3}  # semitones, share


def test_a_key_is_made_louder_by_what_its_velocity_is_above_the_mean():
    """Its fundamental and partials, from its frame on, ever less; of all other pitches nothing changes."""
    gains = decibels(KeyDynamics(20.0, 0.5, 84, 50)(rolls(10, (4, C4, 0.8))))
    fade = math.exp(-5 / 50 / MEMORY_S)  # of what is known of the piece, at the fifth frame
    mean = (KNOWN * 0.5 * fade + 0.8) / (KNOWN * fade + 1)
    wanted = torch.zeros(10, 84)
    for above, share in PARTIALS.items():
        wanted[4:, 60 + above - 28] = share * 20 * (0.8 - mean) * torch.exp(-torch.arange(6) / 50 / FADING_S)
    torch.testing.assert_close(gains, wanted, atol=1e-4, rtol=1e-4)


def test_a_soft_key_does_not_vanish():
    gains = decibels(KeyDynamics(40.0, 0.9, 84, 50)(rolls(3, (1, C4, 0.1))))
    assert gains.min() == pytest.approx(SOFTEST_DB)


def test_a_soft_strike_takes_nothing_from_what_sounds():
    """C5 is struck softly while C4 sounds loudly: C4's partials stay as loud, but for their fading; C5's others, where
    nothing sounds, become softer. A loud strike makes louder what a soft one has made softer."""
    gains = decibels(KeyDynamics(20.0, 0.5, 84, 50)(rolls(3, (0, C4, 0.9), (1, C5, 0.1), (2, C5, 0.9))))
    shared, own = 72 - 28, 72 + 31 - 28
    fade = math.exp(-1 / 50 / FADING_S)
    assert gains[0, shared] > 1 and gains[1, shared] == pytest.approx(float(gains[0, shared]) * fade, rel=1e-4)
    assert abs(gains[0, own]) < 1e-5 and gains[1, own] < -0.1 and gains[2, own] > 0.1
    assert gains[2, shared] > gains[1, shared]  # its own, not a share of C4's


def test_a_strike_is_made_softer_only_where_nothing_else_sounds():
    """The less, the more of a pitch sounds already, however many keys share it; it never becomes louder."""
    chords = [(frame, C4 + above, 0.5) for frame in (0, 1) for above in (-12, 0)]
    for before, shared in ([(1, C4, 0.5)], -0.69), (chords, -0.12):
        gains = decibels(KeyDynamics(20.0, 0.5, 84, 50)(rolls(3, *before, (2, C5, 0.1))))
        assert gains[2, 72 - 28] == pytest.approx(shared, abs=0.01)
        assert gains[2, 72 + 31 - 28] == pytest.approx(0.35 * -3, abs=0.01) and gains.max() < 1e-4


def test_the_tuned_values():
    """What the constants do, in numbers: the other tests hold with any others."""

    def heard(velocity, **more):
        """dB of C5, struck with C4, and of the treble, by frame."""
        factors = KeyDynamics(20.0, 0.5, 84, 50, **more)(rolls(200, (0, C4, velocity), (0, C5, velocity)))
        return 20 * factors.pitches[0, :, 2 * (72 - 28)].log10() + 0.8, 20 * factors.treble[0].log10()

    assert heard(0.5)[0].abs().max() < 1e-4  # all that is struck at the mean velocity is made 0.8 dB softer
    fading = {0.5: heard(0.9)[0], 0.3: heard(0.5, octave_db=6.0)[0], 0.12: heard(0.5, attack_db=6.0)[0]}
    for seconds, gains in (fading | {1.0: heard(0.9, treble_db=9.0)[1]}).items():
        assert gains[round(seconds * 50)] / gains[0] == pytest.approx(math.exp(-1), rel=1e-3)
    lasting = heard(0.5, sustain_db=5.0)[0]  # from 0.4 s on, up to 14 dB; of a chord up to 8
    assert lasting[:21].abs().max() < 1e-4 and lasting[21] == pytest.approx(0.1, abs=1e-4)
    assert lasting.max() == pytest.approx(14.0, abs=1e-4)
    chord = KeyDynamics(20.0, 0.5, 84, 50, sustain_db=5.0)(rolls(200, *((0, key, 0.5) for key in (0, C4, C5))))
    assert 20 * chord.pitches.max().log10() + 0.8 == pytest.approx(8.0, abs=1e-4)


def test_a_hard_strike_is_bright_and_a_soft_one_dull():
    """By the hardest of the keys of a frame, from it on, ever less; within limits."""
    dynamics = KeyDynamics(20.0, 0.5, 84, 50, 25.0)
    treble = 20 * dynamics(rolls(8, (2, C4, 0.7), (2, C5, 0.3), (6, C4, 0.2))).treble[0].log10()
    fade = math.exp(-3 / 50 / MEMORY_S)
    hard = 25 * (0.7 - (KNOWN * 0.5 * fade + 1.0) / (KNOWN * fade + 2))
    torch.testing.assert_close(treble[:2], torch.zeros(2))
    torch.testing.assert_close(
        treble[2:6], hard * torch.exp(-torch.arange(4) / 50 / TREBLE_FADING_S), rtol=1e-4, atol=0
    )
    assert treble[6] < -5 and treble[7] == pytest.approx(float(treble[6]) * math.exp(-1 / 50 / TREBLE_FADING_S))
    for velocity, limit in zip((0.01, 1.0), TREBLE_LIMITS_DB):
        strong = KeyDynamics(20.0, 0.5, 84, 50, 100.0)(rolls(1, (0, C4, velocity)))
        assert 20 * float(strong.treble[0, 0].log10()) == pytest.approx(limit, abs=1e-4)
    assert (KeyDynamics(20.0, 0.5, 84, 50)(rolls(3, (1, C4, 0.9))).treble == 1).all()


@pytest.mark.parametrize("lower, upper", [(1, 1), (1, 2), (2, 1)])
def test_the_upper_key_of_an_octave_is_made_louder(lower, upper):
    """At its odd partials, from the frame on in which both are struck, whatever is struck then; they may be a frame
    apart, in any order."""
    wanted, both = torch.zeros(6, 84), max(lower, upper)
    keys = rolls(6, (lower, C4, 0.6), (upper, C5, 0.6), (both + 1, C4 + 5, 0.6))
    plain, gains = (decibels(KeyDynamics(20.0, 0.5, 84, 50, 0.0, octave)(keys)) for octave in (0.0, 6.0))
    for above, share in {0: 1.0, 19: 0.6, 28: 0.4, 34: 0.3}.items():
        wanted[both:, 72 + above - 28] = share * 6 * torch.exp(-torch.arange(6 - both) / 50 / OCTAVE_FADING_S)
    torch.testing.assert_close(gains - plain, wanted, atol=1e-4, rtol=1e-4)


def test_keys_that_are_no_octave_are_left_alone():
    for strikes in (((1, C4, 0.6), (3, C5, 0.6)), ((1, C4, 0.6), (1, C4 + 7, 0.6)), ((1, C5, 0.6), (1, C5 + 24, 0.6))):
        gains = [KeyDynamics(20.0, 0.5, 84, 50, 0.0, octave)(rolls(6, *strikes)).pitches for octave in (0.0, 6.0)]
        assert torch.equal(*gains)


def test_every_key_is_made_louder_while_it_is_struck():
    """Whatever its velocity; of keys that share a pitch the larger share counts, and a strike begins anew."""
    strikes = (1, C4, 0.2), (1, C5, 0.9), (5, C4, 0.2)
    plain, gains = (decibels(KeyDynamics(20.0, 0.5, 84, 50, 0.0, 0.0, x)(rolls(8, *strikes))) for x in (0.0, 3.0))
    fade = torch.exp(-torch.arange(7) / 50 / ATTACK_FADING_S)
    added = (gains - plain)[1:]
    assert not (gains - plain)[0].any()
    torch.testing.assert_close(added[:, C5 + 21 - 28], 3 * torch.cat([fade[:4], (0.8 * fade[:3]).maximum(fade[4:])]))
    torch.testing.assert_close(added[:, C4 + 21 - 28], 3 * torch.cat([fade[:4], fade[:3]]))
    assert not added[:, C4 + 21 - 28 - 1].any()


@pytest.mark.parametrize(
    ("other", "frame", "even"), [(None, 1, -1.0), (C4 + 1, 1, 0.8), (C4 + 1, 2, 0.8), (C5, 4, 1.0)]
)
def test_even_partials_of_a_key_that_is_struck_alone_are_softer_in_generated_audio(other, frame, even):
    """All of them, by as much as its attack is louder; not where another key is struck in the same frame or the next,
    nor where the pitch is another key's a moment later; and not in codes of recordings."""
    keys = rolls(5, (1, C4, 0.5), *(((frame, other, 0.5),) if other else ()))
    low, last = C4 + 21 - 28, 0 if other is None else frame - 1

    def added(late):
        plain, gains = (decibels(KeyDynamics(20.0, 0.5, 84, 50, 0, 0, x, 5.0, late)(keys)) for x in (0.0, 3.0))
        return (gains - plain)[1:]

    fade = torch.exp(-torch.arange(4 - last) / 50 / ATTACK_FADING_S)
    generated = added(1.8)
    torch.testing.assert_close(generated[last:, low + 12], 3 * even * fade)
    if frame == 4:
        assert (generated[:3, low + 12] < 0).all()
    if other is None:
        for above, share in {0: 1.0, 19: 0.6, 24: -1.0, 28: 0.4, 31: -1.0, 34: 0.3, 36: -1.0}.items():
            torch.testing.assert_close(generated[:, low + above], 3 * share * fade)
        assert (added(0.0)[:, low + 12] > 0).all()


@pytest.mark.parametrize("low, most", [((), FEW_LIMIT_DB), ((0,), FEW_LIMIT_DB), ((0, 1), SUSTAIN_LIMIT_DB)])
def test_tones_last_while_nothing_is_struck(low, most):
    """From a moment after the last strike on, up to a limit that falls late and is lower for chords, at all partials of
    the keys that are held; at a strike, and of keys that are let go, it goes."""
    rest, frames = round(SUSTAIN_AFTER_S * 50), 300
    keys = rolls(frames, (0, C4, 0.5), (0, C4 + 1, 0.5), (250, C5 + 7, 0.5), *((0, key, 0.5) for key in low))
    keys.held[0, 60:, C4 + 1] = False
    plain, gains = (decibels(KeyDynamics(20.0, 0.5, 84, 50, sustain_db=x, late_db=1.8)(keys)) for x in (0.0, 5.0))
    added, (held, let_go, other) = gains - plain, (C4 + 21 - 28, C4 + 1 + 21 - 28, C4 + 2 + 21 - 28)
    rising, since = 0.1 * torch.arange(1, 250 - rest), torch.arange(rest + 1, 250)  # frames since the strike
    fallen = 1.8 / 50 * (since - LATE_S * 50).clamp(min=0)
    close = {"atol": 1e-4, "rtol": 1e-4}
    assert not added[: rest + 1].any() and not added[:, other].any()
    for pitch, share in ((held, 1.0), (held + 12, 0.8)):
        expected = (share * rising).minimum(share * most - fallen)
        torch.testing.assert_close(added[rest + 1 : 250, pitch], expected, **close)
    fading = torch.exp(-torch.arange(1, 91) / 50 / SUSTAIN_FADING_S)
    torch.testing.assert_close(added[250:260, held], added[249, held] * fading[:10], **close)
    torch.testing.assert_close(added[60:150, let_go], rising[59 - rest - 1] * fading, **close)
    struck = C5 + 7 + 21 - 28  # a pitch that C4 and the new key share begins anew
    assert added[200, struck] > 1 and abs(added[250, struck]) < 1e-4


def test_what_is_generated_becomes_dull_while_nothing_is_struck():
    """12 dB of the treble from 0.6 to 2.6 s after a strike, until the next one; a recording's codes fall themselves."""
    keys = rolls(200, (0, C4, 0.5), (150, C5, 0.5))
    treble = 20 * KeyDynamics(20.0, 0.5, 84, 50, late_db=1.8)(keys).treble[0].log10()
    expected = torch.zeros(200)
    expected[30:130] = -12 * torch.arange(100) / 100
    expected[130:150] = -12
    expected[180:] = -12 * torch.arange(20) / 100
    torch.testing.assert_close(treble, expected, atol=1e-4, rtol=0)
    assert (KeyDynamics(20.0, 0.5, 84, 50)(keys).treble == 1).all()


@pytest.mark.parametrize("hertz, share", [(500, 0.0), (1000, 0.01), (3500, 0.5), (6000, 1.0), (12000, 1.0)])
def test_treble_is_split_off_in_time_with_the_rest(hertz, share):
    wave = torch.sin(2 * math.pi * hertz * torch.arange(3200) / 32000)[None, None]
    same, treble = TrebleSplit(32000)(wave)[0]
    assert torch.equal(same, wave[0, 0])
    torch.testing.assert_close(treble[100:-100], share * wave[0, 0, 100:-100], atol=0.02, rtol=0)


def test_factors_of_frames_are_straight_lines_between_them():
    """What a stream does with those of the treble and of rests: a jump takes one frame."""
    stream = CodecStream(PianoEncodecModel(PianoEncodecConfig(**CODEC)).eval())
    first, left = stream._factors(torch.tensor([[1.0, 1.0, 3.0, 2.0]]), torch.zeros(1, 2, 640))
    second, none = stream._factors(left, torch.zeros(1, 2, 3 * 640))
    ramp = torch.arange(640) / 640
    wanted = torch.cat([torch.ones(640), 1 + 2 * ramp, 3 - ramp, torch.full((640,), 2.0)])
    torch.testing.assert_close(torch.cat([first, second]), wanted)
    assert none.numel() == 0


def test_long_rests_fade(monkeypatch):
    """From two seconds on after the last key was let go, by 30 dB a second, up to the frame before the next strike;
    not where one is held; in chunks as in one."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(**CODEC)).eval()
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    codes, keys = torch.randint(0, 2048, (1, 4, 600)), rolls(600, (3, 7, 0.9), (250, 50, 0.5), (560, 20, 0.7))
    keys.held[:, 10:, 7] = keys.held[:, 400:, 50] = False

    def play(*ends):
        stream = CodecStream(codec)
        return torch.cat(
            [stream.push(codes[..., a:b], b == 600, keys.cut(0, a, b)) for a, b in zip((0, *ends), ends)], -1
        )[0, 0]

    faded, chunked = play(600), play(100, 109, 110, 249, 250, 251, 560, 600)
    torch.testing.assert_close(chunked, faded, atol=1e-6, rtol=1e-4)
    monkeypatch.setattr("modeling_midivalle.streaming_piano_encodec.REST_S", 1e9)
    whole = play(600)
    decibels = 20 * (faded / whole)[::640].log10()  # at the beginnings of frames
    assert (whole[::640] != 0).all()
    wanted = torch.zeros(600)  # 150 frames from 250 on are held
    for let_go, struck in ((10, 250), (400, 560)):
        quiet = torch.arange(1, struck - let_go + 1) / 50
        wanted[let_go:struck] = -30 * (quiet - 2).clamp(min=0)
    torch.testing.assert_close(decibels, wanted, atol=0.01, rtol=0)
    assert wanted.min() < -70


@pytest.mark.parametrize("told", [0, 1])
def test_a_stream_may_be_told_of_the_keys_in_a_part(told):
    """What is pushed without them does not fade, and shifts nothing of what comes behind."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(**CODEC)).eval()
    codes, keys = torch.randint(0, 2048, (1, 4, 300)), rolls(300, (5, 30, 0.5))
    stream, waves = CodecStream(codec), []
    for i, (begin, end) in enumerate(((0, 160), (160, 300))):
        waves.append(stream.push(codes[..., begin:end], end == 300, keys.cut(0, begin, end) if i == told else None))
    assert torch.cat(waves, -1).shape == (1, 1, 300 * 640) and stream.rests.numel() == 0


def test_a_stream_with_dynamics_is_the_same_in_chunks():
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(**CODEC)).eval()
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    codes, keys = (
        torch.randint(0, 2048, (1, 4, 60)),
        rolls(60, (3, 20, 0.9), (21, 30, 0.2), (32, 12, 0.5), (33, 24, 0.7)),
    )
    plain = CodecStream(codec).push(codes, True, keys)

    def play(*ends):
        stream, chunks = CodecStream(codec, dynamics=KeyDynamics(30.0, 0.5, 32, 50, 30.0, 6.0)), []
        for begin, end in zip((0, *ends), ends):
            chunks.append(stream.push(codes[..., begin:end], end == 60, keys.cut(0, begin, end)))
        return torch.cat(chunks, -1)

    whole = play(60)
    torch.testing.assert_close(play(5, 6, 33, 60), whole, atol=1e-6, rtol=1e-4)
    assert (whole - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="has to be told which keys are struck"):
        CodecStream(codec, dynamics=KeyDynamics(30.0, 0.5, 32, 50)).push(codes)


def test_what_the_channels_hold_in_silence_is_not_made_louder():
    """It is not 0, and louder it would be heard, whatever key is held; so codes of silence sound the same."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(**CODEC)).eval()
    codes = codec.encode_codes(torch.zeros(1, 1, 150 * 640))
    keys = PlayedKeys(torch.zeros(1, 150, 88), torch.ones(1, 150, 88, dtype=torch.bool))
    gains = KeyDynamics(20.0, 0.5, 32, 50, sustain_db=5.0)(keys).pitches
    assert gains[0, 100].min() > 1.4 and gains[0, 100].max() > 2
    plain = CodecStream(codec).push(codes, True, keys)[0, 0, 50 * 640 : 140 * 640]
    stream = CodecStream(codec, dynamics=KeyDynamics(20.0, 0.5, 32, 50, sustain_db=5.0))
    played = stream.push(codes, True, keys)[0, 0, 50 * 640 : 140 * 640]
    assert (played - plain).abs().max() < 1e-3 * (plain - plain.mean()).abs().max()


def test_refused_configurations():
    with pytest.raises(StrictDataclassClassValidationError, match="num_oscillators 33 does not fit"):
        PianoEncodecConfig(**CODEC | {"num_oscillators": 33})
    parts = {"ar_config": MidiValleConfig.from_preset("tiny").ar_config.to_dict()}
    parts["nar_config"] = MidiValleConfig.from_preset("tiny").nar_config.to_dict()
    with pytest.raises(
        StrictDataclassClassValidationError, match="velocity_gain_db needs a codec with num_oscillators"
    ):
        MidiValleConfig(codec_config=CODEC | {"num_oscillators": 0}, **parts, keys_from_midi=True, velocity_gain_db=1.0)
    for colour in ([1.0] * 9, [float("nan")] * 10):
        with pytest.raises(StrictDataclassClassValidationError, match="colour_gains_db must be 10 finite numbers"):
            MidiValleConfig(codec_config=CODEC, **parts, colour_gains_db=colour)


def test_dynamics_are_switched_off(make_model, make_rows, tmp_path):
    """By either of the two that the others need; such a model plays and is saved."""
    rows = make_rows(seconds=0.4)[None]
    for off in ({"velocity_gain_db": 0.0}, {"keys_from_midi": False}):
        model = make_model("keys")
        model.config.codec_config.num_oscillators = 16
        model.config.velocity_gain_db = model.config.treble_gain_db = model.config.sustain_gain_db = 20.0
        loud = model.generate(rows, target_frames=20)
        for name, value in off.items():
            setattr(model.config, name, value)
        audio = model.generate(rows, target_frames=20)
        assert (audio - loud).abs().max() > 1e-4
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again.generate(rows, target_frames=20), audio)


def test_pieces_have_means_of_their_own(make_model, make_rows):
    """`generate` gives each piece its own; without them 0.5; wrong ones are refused."""
    model = make_model("keys")
    model.config.codec_config.num_oscillators, model.config.velocity_gain_db = 16, 30.0
    rows = torch.stack([make_rows(seconds=0.4)] * 2)
    given = {"target_frames": torch.tensor([20, 20])}
    half, low = model.generate(rows, mean_velocities=torch.tensor([0.5, 0.1]), **given)
    assert (half - low).abs().max() > 1e-5
    torch.testing.assert_close(half, model.generate(rows[:1], target_frames=20)[0], atol=1e-6, rtol=1e-4)
    for wrong in ([0.5], [0.5, 1.5], [0.5, math.nan]):
        with pytest.raises(ValueError, match="mean_velocities must be numbers from 0 to 1, one for each piece"):
            model.generate(rows, mean_velocities=torch.tensor(wrong), **given)
