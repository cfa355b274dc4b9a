# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What the codec's parts learn from, by values worked out by hand: features, losses, the start that sings, one step."""

import math

import pytest
import torch

from modeling_midivalle import PianoEncodecConfig, PianoEncodecModel
from scripts.codec import objectives
from scripts.codec.discriminator import MultiScaleSTFTDiscriminator, discriminator_loss, generator_losses
from scripts.codec.features import HOP, KNEE, SAMPLING_RATE, SpectralFeatures
from scripts.codec.losses import SpectralLoss
from scripts.codec.objectives import Objective, start_balanced
from scripts.codec.oscillators import (
    KICKED,
    PEAK,
    PITCHES,
    RADIUS,
    _measure,
    kick_loss,
    kick_rows,
    pitch_frequencies,
    resting_bias,
    sing,
    start_oscillators,
    start_synthesis,
    synthesis_basis,
)
from scripts.codec.recipe import CodecRecipe
from scripts.codec.step import Learner

SMALL = {"num_filters": 16, "hidden_size": 64, "upsampling_ratios": [5, 4, 4, 8]}


def tone(hertz, seconds=1.0, amplitude=0.5):
    return amplitude * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_bands_are_centred_on_their_frame():
    """Frame t on sample 640 t + 320: a click there is heard alike by the frames before and after, by both windows."""
    features, click = SpectralFeatures(2), torch.zeros(1, 9 * HOP)
    click[0, 4 * HOP + HOP // 2] = 1.0
    bands = features.bands(click)[0]
    assert bands.shape == (9, 192) and torch.allclose(bands, bands.flip(0), atol=1e-4)
    assert bands[:, :144].sum(1).argmax() == 4 and bands[:, 144:].any(1).tolist() == [t == 4 for t in range(9)]


@pytest.mark.parametrize("hertz", [440.0, 3000.0])
def test_bands_tell_pitch_and_level(hertz):
    """The loudest long band is that of the pitch; twice as loud is log 2 more, of the short window 0.8 of it; far below
    the knee it is twice as much."""
    features = SpectralFeatures(2)
    assert features.band_places(torch.tensor([27.5, 14_000.0])).tolist() == pytest.approx([0, 143])
    assert (features.bands(noise(1, 9 * HOP))[0] > 0.5).all()  # every band hears something
    loud, twice, soft, softer = (features.bands(tone(hertz, 0.4, a)[None])[0, 10] for a in (0.25, 0.5, 2e-5, 1e-5))
    place = float(features.band_places(torch.tensor(hertz)))
    assert abs(int(loud[:144].argmax()) - place) <= 0.5
    for part, weight in ((slice(0, 144), 1.0), (slice(144, 192), 0.8)):
        best = loud[part].argmax()
        assert float(twice[part][best] - loud[part][best]) == pytest.approx(weight * math.log(2), abs=0.01)
        assert float(soft[part][best]) == pytest.approx(2 * float(softer[part][best]), rel=0.02)
    assert float(features.bands(tone(hertz, 0.4, KNEE)[None])[0, 10, :144].max()) < math.log(2) + 0.01


def test_the_latent_leaves_out_what_is_remembered():
    """`memory` times the frame before; adding up again gives the axes themselves."""
    features, wave = SpectralFeatures(3, memory=0.6), 0.1 * noise(2, 8 * HOP)
    features.mean.normal_(generator=torch.Generator().manual_seed(1))
    features.basis.normal_(generator=torch.Generator().manual_seed(2))
    axes = ((features.bands(wave) - features.mean) @ features.basis).transpose(1, 2)
    latent = features(wave)
    assert torch.allclose(latent[..., 0], axes[..., 0], atol=1e-4)
    assert torch.allclose(latent[..., 1:], axes[..., 1:] - 0.6 * axes[..., :-1], atol=1e-4)
    assert torch.allclose(features.integrate(latent), axes, atol=1e-3)


def test_main_axes():
    """Of three bands the two that vary most, the first one first, with unit variance on average."""
    values = torch.full((8, 192), 5.0)
    for bit, (band, size) in enumerate({3: 3.0, 7: 2.0, 9: 1.0}.items()):  # independent of each other
        values[:, band] += size * (1 - 2 * (torch.arange(8) >> bit & 1))
    features = SpectralFeatures(2)
    assert features.fit(values) == pytest.approx(13 / 14)
    assert torch.allclose(features.mean, torch.tensor(5.0)) and features.basis.abs().argmax(0).tolist() == [3, 7]
    axes = ((values - features.mean) @ features.basis).var(0)
    assert float(axes.mean()) == pytest.approx(1.0) and float(axes[0] / axes[1]) == pytest.approx(9 / 4)


def test_spectral_losses_of_a_gain():
    """Half as loud: log 2 of mel and level, half of the convergence, few rises; nothing where all is right."""
    loss, target = SpectralLoss(), 0.5 * noise(2, 32_000)
    assert not any(map(float, loss(target, target).values()))
    found = loss(0.5 * target, target)
    assert float(found["mel"]) == pytest.approx(math.log(2), rel=0.05)
    assert float(found["level"]) == pytest.approx(math.log(2), rel=0.02)
    assert float(found["convergence"]) == pytest.approx(0.5, rel=0.01) and float(found["onset"]) < 0.3
    for n in loss.windows:
        assert float(loss.magnitude(tone(1000.0, 1.0, 1.0)[None], n)[0, -1 * (32_000 // n * 2)].max()) == pytest.approx(
            1.0, rel=0.01
        )


def test_spectral_losses_of_times():
    """A missing attack is a whole rise, an end that is missing none; the mean power is not of a time."""
    loss, time = SpectralLoss(), torch.arange(32_000) / 32_000

    def sounding(begin, end):
        return (tone(1000.0) * (10 * torch.minimum(time - begin, end - time)).clamp(0, 1))[None]

    early, late, both = sounding(0.1, 0.45), sounding(0.55, 0.9), sounding(0.1, 0.9)
    attack = torch.cat([torch.zeros(1, 16_000), 0.3 * noise(1, 16_000)], 1)
    assert float(loss(torch.zeros_like(attack), attack)["onset"]) > 0.9
    assert float(loss(both, early)["onset"]) < 0.1 and float(loss(both, early)["mel"]) > 0.05
    assert float(loss(early, late)["level"]) < 0.1 and float(loss(early, late)["mel"]) > 0.1


class Judge(torch.nn.Module):
    """Two parts whose logits are the wave and three times it, with the wave as a feature."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, wave):
        return [(wave * self.scale * k, [wave * self.scale, 2 * wave]) for k in (1, 3)]


def test_hinges_by_hand():
    output, target = torch.tensor([[0.5, -0.25]]), torch.tensor([[2.0, 0.0]])
    losses = generator_losses(Judge(), output, target)
    # of the output 1 - x is 0.5 and 1.25, and -0.5 (cut) and 1.75 where it counts three times
    assert float(losses["adversarial"]) == pytest.approx((0.875 + 0.875) / 2)
    assert float(losses["features"]) == pytest.approx(0.875)  # (1.5 + 0.25) / (2.0 + 0.0)
    # of the target 1 - x is -1 (cut) and 1, -5 (cut) and 1; of the output 1 + x is 1.5 and 0.75, 2.5 and 0.25
    assert discriminator_loss(Judge(), output, target).item() == pytest.approx((0.5 + 1.125 + 0.5 + 1.375) / 2)


def test_who_is_judged_learns_and_the_judge_does_not():
    torch.manual_seed(0)
    judge, output = MultiScaleSTFTDiscriminator((256, 512), 4), noise(2, 4000).requires_grad_()
    for (logits, features), n in zip(judge(output), (256, 512), strict=True):
        assert logits.shape[:3] == (2, 1, 4000 // (n // 4) + 1) and len(features) == 5
    sum(generator_losses(judge, output, noise(2, 4000, seed=1)).values()).backward()
    assert output.grad.any() and all(p.grad is None and p.requires_grad for p in judge.parameters())


def oscillation(keys, frames, rate=50):
    """What gates that are open at the pitches `keys` give: cosine and sine of the phase at the middle of each frame."""
    hidden = torch.zeros(1, 256, frames)
    for k in keys:
        phase = 2 * math.pi * pitch_frequencies()[k] * torch.arange(frames) / rate
        hidden[0, 2 * k], hidden[0, 2 * k + 1] = math.tanh(PEAK) * phase.cos(), math.tanh(PEAK) * phase.sin()
    return hidden


@pytest.mark.parametrize("key", [0, 41, 83])
def test_synthesis_is_exact(key):
    """Frame t is the phase at sample 640 t + 320."""
    wave = sing(oscillation([key], 30), synthesis_basis(HOP, SAMPLING_RATE), HOP)[0]
    time = (torch.arange(30 * HOP, dtype=torch.float64) + 0.5 - HOP / 2) / SAMPLING_RATE
    expected = (2 * math.pi * pitch_frequencies()[key] * time).cos().float()
    assert wave.shape == (30 * HOP,) and torch.allclose(wave[HOP:-HOP], expected[HOP:-HOP], atol=1e-3)


def test_a_started_decoder_is_about_exact_synthesis():
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(**SMALL)).eval()
    start_synthesis(codec)
    hidden, inside = oscillation([20, 41], 30), slice(2 * HOP, -2 * HOP)
    wanted = sing(hidden, synthesis_basis(HOP, SAMPLING_RATE), HOP)[0, inside]
    with torch.no_grad():
        for layer in codec.decoder.layers[2:]:
            hidden = layer(hidden)
    made = hidden[0, 0, inside]
    assert float(torch.corrcoef(torch.stack([made, wanted]))[0, 1]) > 0.98
    assert float(made.std()) == pytest.approx(float(wanted.std()), rel=0.3)


@pytest.mark.parametrize("layers", [2, 3])
def test_a_started_decoder_sings(layers):
    """From a latent of the spectra of a tone it makes that tone, at its pitch and not at a multiple of 50 Hz."""
    torch.manual_seed(0)
    hertz = pitch_frequencies()[[30, 50]].tolist()
    codec = PianoEncodecModel(PianoEncodecConfig(**SMALL | {"num_lstm_layers": layers})).eval()
    features, tones = SpectralFeatures(64), torch.stack([tone(f, 1.2, 0.2) for f in hertz])
    waves = torch.cat([tones, 0.02 * noise(2, 38_400)])
    features.fit(features.bands(waves).flatten(0, 1))
    latent = features(waves)
    start_oscillators(codec, features, latent)
    start_synthesis(codec)
    lstm = codec.decoder.layers[1].lstm
    _, radius = _measure(lstm, layers - 2, 2 * PITCHES, lstm.hidden_size)
    assert torch.allclose(radius, torch.tensor(RADIUS), rtol=0.3)  # none dies away, or stands still at a quarter turn
    with torch.no_grad():
        sound = codec.decoder(latent[:2])[:, 0, 6400:]
    level = sound.std(1) / tones.std()
    assert ((level > 0.5) & (level < 2)).all()  # though the latent leaves out what is remembered
    spectrum = torch.fft.rfft(sound * torch.hann_window(32_000)).abs()
    assert codec.config.num_oscillators == PITCHES
    for found, wanted in zip(spectrum.argmax(1).tolist(), hertz, strict=True):
        assert abs(found - wanted) < 2


def test_kicks_by_hand():
    """Nothing where none is due; three times the square of what a struck key misses."""
    lstm = PianoEncodecModel(PianoEncodecConfig(**SMALL | {"num_lstm_layers": 3})).decoder.layers[1].lstm
    with torch.no_grad():
        for name, value in (("weight_ih", 0.0), ("bias_ih", resting_bias(50))):
            lstm.get_parameter(f"{name}_l1")[kick_rows(lstm)] = value
    onsets = torch.zeros(1, 10, 88)
    assert kick_loss(lstm, torch.zeros(1, 10, 256), onsets, 50).item() == 0
    onsets[0, 4, 40] = 0.5
    expected = 3 * sum(share**2 for _, share in KICKED) / (10 * PITCHES)
    assert kick_loss(lstm, torch.zeros(1, 10, 256), onsets, 50).item() == pytest.approx(expected, rel=1e-5)


def test_a_balanced_start():
    """Every convolution's output has the deviation, the last one's its own."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(num_filters=4, hidden_size=16, num_lstm_layers=1))
    sound, found, layers = 0.01 * noise(2, 1, 12_800), [], codec.encoder.layers
    start_balanced(layers, sound, 1.0, 3.0)
    convs = [m for m in layers.modules() if isinstance(m, torch.nn.Conv1d)]
    for conv in convs:
        conv.register_forward_hook(lambda module, inputs, output: found.append(float(output.detach().std())))
    x = sound
    for layer in layers:
        x = layer(x)
    louder = layers[0](2 * sound).detach().std()
    assert float(louder) == pytest.approx(2.0, rel=1e-3)  # no output is scaled any more
    found = found[:-1]
    assert found[:-1] == pytest.approx([1.0] * (len(convs) - 1), rel=1e-3) and found[-1] == pytest.approx(3.0, rel=1e-3)


class Line(torch.nn.Module):
    """Losses `mel` and `onset` of weight times mean of a batch; a buffer is called a codebook's, and counts."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.weight = torch.nn.Parameter(torch.ones(()))
        self.model.register_buffer("codebook", torch.zeros(()))

    def forward(self, batch):
        self.model.codebook += 1
        x = self.model.weight * batch["input_values"].mean()
        return {"mel": x, "onset": 0.5 * x}, None


@pytest.mark.parametrize("has_it", [False, True])
def test_where_there_is_no_lstm_in_bf16_it_stays_fp32(has_it, monkeypatch):
    """Processors without AVX-512 have none; what is around it is in bf16 all the same."""
    monkeypatch.setattr(objectives, "has_bf16_lstm", lambda: has_it)
    codec = PianoEncodecModel(PianoEncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16, num_lstm_layers=1))
    seen = {}
    for layer in codec.encoder.layers:
        found = seen.setdefault(type(layer).__name__, set())
        monkeypatch.setattr(layer, "forward", lambda x, found=found: found.add(torch.is_autocast_enabled("cpu")) or x)
    Objective(codec, bf16=True).encode(torch.zeros(1, 640))
    assert seen["EncodecLSTM"] == {has_it} and True in seen["EncodecResnetBlock"]


def test_one_step_by_hand(tmp_path):
    """Weighted losses and their gradient, averaged over the batches and clipped; the warm-up's rate; the average."""
    settings = {"learning_rate": 0.1, "warmup_steps": 10, "steps": 100, "accumulation": 2, "clip_norm": 2.0}
    recipe = CodecRecipe(**settings, weights={"mel": 2.0, "onset": 4.0}, average_decay=0.5)
    objective = Line()
    learner, weight = Learner(objective, recipe, torch.device("cpu"), tmp_path), objective.model.weight
    losses = learner(0, iter([{"input_values": torch.full((2, 5), value)} for value in (1.0, 2.0)]))
    assert float(losses["mel"]) == 1.5 and float(losses["onset"]) == 0.75
    assert float(losses["gradient"]) == pytest.approx(1.5 * (2.0 + 4.0 * 0.5))
    assert float(weight.grad) == pytest.approx(2.0)  # clipped
    rate = learner.optimizers[0].param_groups[0]["lr"]
    assert 0 < rate <= 0.1 / 10 + 1e-9 and weight.item() == pytest.approx(1 - rate)  # Adam's first step
    before = weight.item()
    assert float(learner.average["weight"]) == pytest.approx(0.1 + 0.9 * before)  # first ones count little
    assert float(learner.average["codebook"]) == 2.0  # as it is
    with learner.averaged():
        assert torch.equal(weight, learner.average["weight"])
    assert weight.item() == before
    average = float(learner.average["weight"])
    learner(50, iter([{"input_values": torch.full((2, 5), 0.01)}] * 2))
    assert float(weight.grad) == pytest.approx(0.04) and weight.item() != before  # no sum with the step before
    assert float(learner.average["weight"]) == pytest.approx((average + weight.item()) / 2)
