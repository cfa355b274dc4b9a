# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`PianoListenerModel`: what it gives, rows of their own lengths, and that it loads as it was saved."""

import copy

import pytest
import torch
from transformers import AutoModel

from modeling_midivalle import PianoListenerConfig, PianoListenerModel


@pytest.fixture(scope="module")
def listener():
    torch.manual_seed(0)
    model = PianoListenerModel(PianoListenerConfig(hidden_size=8)).eval()
    with torch.no_grad():
        model.last.weight *= 20
        model.last.bias.copy_(torch.tensor([0.0, 0.5]))  # an untrained one that hears something
    return model


def tones(rows, samples):
    torch.manual_seed(1)
    time = torch.arange(samples) / 32_000
    return (torch.sin(2 * torch.pi * 440 * time) * (time % 0.2 < 0.1) + 0.1 * torch.randn(rows, samples))[:, None] / 4


def test_what_is_struck(listener):
    struck = listener.hear(tones(2, 20_000))
    assert struck.shape == (2, 32, 88) and struck.dtype == torch.float32
    assert (struck > 0).any() and not (struck > 0).all() and struck.max() <= 1
    assert struck[struck > 0].min() >= 0.05
    pairs = (struck[:, 1:] > 0) & (struck[:, :-1] > 0)
    assert not pairs.any()  # a key is not struck in two frames that touch
    assert (listener.hear(tones(2, 20_000), threshold=1.0) == 0).all()


def test_a_row_is_heard_at_its_own_length(listener):
    wave = tones(3, 20_000)
    mask = torch.arange(20_000) < torch.tensor([20_000, 9_000, 0])[:, None]
    struck = listener.hear(wave, mask)
    assert torch.equal(struck, listener.hear(wave, mask[:, None]))
    assert torch.equal(struck[0], listener.hear(wave[:1])[0])
    assert torch.equal(struck[1, :15], listener.hear(wave[1:2, :, :9_000])[0]) and not struck[1, 15:].any()
    assert not struck[2].any()


def test_a_frame_is_centred(listener):
    """A click in the middle of frame 9 is as loud some frames before as behind it, in each of the four windows."""
    audio = torch.zeros(1, 640 * 19)
    audio[0, 640 * 9 + 320] = 1.0
    spectrum = listener.spectrum(audio)
    torch.testing.assert_close(spectrum, spectrum.flip(2), atol=1e-4, rtol=0)
    assert spectrum.shape[1] == 4 and (spectrum[..., 9, 0] > spectrum[..., 8, 0]).all()


def test_nothing_is_heard_above_15_5_khz(listener):
    noise = torch.randn(1, 6400, generator=torch.Generator().manual_seed(0))
    heard, silent = listener.spectrum(noise), listener.spectrum(0 * noise)
    above = 27.5 * 2 ** (torch.arange(heard.shape[-1]) / 24) >= 15_500
    assert torch.equal(heard[..., above], silent[..., above]) and (heard > silent)[..., ~above].all()


def test_layers_and_tuples(listener):
    heard = listener(tones(2, 6_400))
    assert heard.logits.shape == heard.velocity.shape == (2, 10, 88)
    assert [h.shape[-1] for h in heard.hidden_states] == [176, *[88] * 14]
    logits, velocity, hidden = listener(tones(2, 6_400)[:, 0], return_dict=False)
    assert torch.equal(logits, heard.logits) and torch.equal(velocity, heard.velocity) and len(hidden) == 15


def test_it_loads_as_it_was_saved(listener, tmp_path):
    listener.save_pretrained(tmp_path / "listener")
    loaded, report = AutoModel.from_pretrained(tmp_path, subfolder="listener", output_loading_info=True)
    assert type(loaded) is PianoListenerModel and not any(report.values())
    assert torch.equal(loaded.hear(tones(1, 9_000)), listener.hear(tones(1, 9_000)))


@torch.no_grad()
def test_int8(listener, tmp_path):
    """Near to what it was, half the size of fp16, saved and loaded as it is, and in floating point again."""
    sound, small = tones(1, 9_600), copy.deepcopy(listener)
    logits = listener(sound).logits
    small.quantize_()
    small.quantize_("int8")
    near = small(sound).logits
    assert 0 < (near - logits).norm() / logits.norm() < 0.02
    kinds = {name: value.dtype for name, value in small.state_dict().items()}
    assert {name for name, kind in kinds.items() if kind == torch.int8} == {
        "keys.weight",
        *(f"layers.{i}.weight" for i in range(13)),
    }
    small.save_pretrained(tmp_path / "listener")
    again, report = AutoModel.from_pretrained(tmp_path / "listener", output_loading_info=True)
    assert not any(report.values()) and again.config.quantization == "int8"
    assert {name: value.dtype for name, value in again.state_dict().items()} == kinds
    assert torch.equal(again(sound).logits, near)
    half = AutoModel.from_pretrained(tmp_path / "listener", dtype=torch.bfloat16)
    assert half.keys.weight.dtype == torch.int8 and (half(sound).logits - near).norm() / near.norm() < 0.1
    again.dequantize_()
    again.dequantize_()
    assert again.config.quantization is None and torch.equal(again(sound).logits, near)
    wanted = {name: value.shape for name, value in listener.state_dict().items()}
    assert {name: value.shape for name, value in again.state_dict().items()} == wanted
    with torch.enable_grad():
        again(sound).logits.sum().backward()
    assert all(p.grad is not None for name, p in again.named_parameters() if "last" not in name)
    with pytest.raises(ValueError, match='knows "int8", got'):
        small.quantize_("int4")


def test_a_new_one_hears_nothing_yet():
    torch.manual_seed(0)
    model = PianoListenerModel(PianoListenerConfig())
    assert model.last.bias.tolist() == [-4.0, 0.5] and not model.hear(tones(1, 20_000)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(listener, dtype):
    half = copy.deepcopy(listener).to(dtype)
    logits, wanted = half(tones(1, 6_400)).logits, listener(tones(1, 6_400)).logits
    assert logits.dtype == torch.float32 and (logits - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert half.hear(tones(1, 6_400)).dtype == torch.float32


def test_a_key_that_is_as_likely_for_long_is_struck_once(listener):
    steady = copy.deepcopy(listener)
    with torch.no_grad():
        steady.last.weight.zero_()
        steady.last.bias.copy_(torch.tensor([50.0, 0.5]))
    struck = steady.hear(torch.zeros(1, 1, 6_400))
    assert (struck[:, 0] == 0.5).all() and not struck[:, 1:].any()


@pytest.mark.parametrize("mask", [torch.arange(900) > 99, torch.ones(899)])
def test_unusable_masks(listener, mask):
    with pytest.raises(ValueError, match=r"padding_mask must be \(1, 900\), with padding on the right alone"):
        listener.hear(torch.zeros(1, 1, 900), mask[None])


@pytest.mark.parametrize("shape", [(640,), (1, 640), (1, 2, 640)])
def test_unusable_input(listener, shape):
    with pytest.raises(ValueError, match=r"input_values must be \(B, 1, L\)"):
        listener.hear(torch.zeros(shape))


def test_what_the_codec_refuses_is_not_heard_either(listener):
    for wave in (torch.full((1, 1, 640), torch.nan), torch.full((1, 1, 640), 300)):
        with pytest.raises(ValueError, match="must be finite floats"):
            listener.hear(wave)
    with pytest.raises(ValueError, match="input_values must be a tensor, got ndarray"):
        listener.hear(torch.zeros(1, 1, 640).numpy())


def test_no_layer_of_no_channels():
    with pytest.raises(Exception, match="hidden_size must be above 0"):
        PianoListenerConfig(hidden_size=0)
