# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The codec: codes of each row for itself, the same codes from every loader, and the training of its quantiser."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecConvTranspose1d

from modeling_midivalle import CodecStream, PianoEncodecConfig, PianoEncodecModel
from modeling_midivalle.modeling_midivalle_frame_notes import PlayedKeys
from modeling_midivalle.modeling_piano_encodec import STRUCK, PianoEncodecUpsampling
from processing.audio_midivalle import read_audio, to_mono_32k
from scripts.codec.parts import export_rounded
from scripts.codec.quantizer import ema_update, kmeans_start, nearest, quantize_train

STARTER = Path(__file__).resolve().parents[1] / "checkpoints" / "starter"


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    model = PianoEncodecModel(PianoEncodecConfig(num_filters=2, hidden_size=16, num_lstm_layers=1))
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)
    return model.eval()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("samples", [1, 640, 641, 6400])
def test_shapes(codec, samples):
    codes = codec.encode_codes(noise(2, 1, samples))
    frames = -(-samples // 640)
    assert codes.shape == (2, 4, frames) and codes.dtype == torch.long
    assert codes.min() >= 0 and codes.max() < 2048
    audio = codec.decode_codes(codes)
    assert audio.shape == (2, 1, 640 * frames) and audio.dtype == torch.float32
    assert codec.decode_codes(codes[:, :2]).shape == audio.shape  # fewer codebooks: coarser
    assert codec.decode_codes(codes[:, :, :0]).shape == (2, 1, 0)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "autocast", "loaded", "made"])
def test_less_than_float32_changes_nothing(codec, cast, tmp_path):
    """In bfloat16 most codes would be others; more precision may be had."""
    wave, found = noise(1, 1, 6400), copy.deepcopy(codec)
    if cast == "loaded":
        codec.save_pretrained(tmp_path)
        found = PianoEncodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    elif cast == "made":
        found = PianoEncodecModel._from_config(codec.config, dtype=torch.bfloat16).eval()
        found.load_state_dict(codec.state_dict())
    elif cast == "to":
        found = found.to("cpu", torch.float16)
    elif cast != "autocast":
        getattr(found, cast)()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        codes = found.encode_codes(wave)
        audio, streamed = found.decode_codes(codes), CodecStream(found).push(codes, is_last=True)
    assert torch.equal(codes, codec.encode_codes(wave)) and torch.equal(audio, codec.decode_codes(codes))
    assert torch.equal(streamed, CodecStream(codec).push(codes, is_last=True)) and found.dtype == torch.float32
    assert found.double().dtype == torch.float64


@pytest.mark.parametrize("axes", [2, 3])
def test_a_row_does_not_see_its_batch(codec, axes):
    """Padding, whatever stands in it, changes no code of a shorter row."""
    wave, lengths = noise(3, 1, 6400), (6400, 3000, 640)
    mask = torch.stack([(torch.arange(6400) < length).long() for length in lengths])
    codes = codec.encode_codes(wave, mask if axes == 2 else mask[:, None])
    for b, length in enumerate(lengths):
        alone = codec.encode_codes(wave[b : b + 1, :, :length])
        assert torch.equal(codes[b : b + 1, :, : alone.shape[-1]], alone)
        assert not codes[b, :, alone.shape[-1] :].any()


def test_saved_and_loaded_everywhere(codec, tmp_path):
    """Our class and transformers' own give the same codes and audio from the folder."""
    codec.save_pretrained(tmp_path)
    wave = noise(1, 1, 9600)
    codes = codec.encode_codes(wave)
    ours, report = PianoEncodecModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(ours.encode_codes(wave), codes)
    plain = EncodecModel.from_pretrained(tmp_path)
    with torch.no_grad():
        encoded = plain.encode(wave, bandwidth=2.2)
        assert torch.equal(encoded.audio_codes[0], codes)
        decoded = plain.decode(encoded.audio_codes, encoded.audio_scales)[0]
    torch.testing.assert_close(codec.decode_codes(codes), decoded, atol=1e-6, rtol=1e-5)


def test_the_shipped_codec_gives_the_same_codes_everywhere(tmp_path):
    """Of a bundled prompt, on the CPU in fp32: from the shards, saved and loaded alone, exported as for shipping, and
    through transformers' own class."""
    wave = torch.from_numpy(to_mono_32k(*read_audio(STARTER / "prompts" / "steinway_studio.flac")))[None, None]
    shards = [load_file(file) for file in sorted(STARTER.glob("model-*.safetensors"))]
    state = {k.removeprefix("codec."): v for shard in shards for k, v in shard.items() if k.startswith("codec.")}
    config = PianoEncodecConfig(**json.loads((STARTER / "config.json").read_text())["codec_config"])
    shipped = PianoEncodecModel(config).eval()
    absent, unknown = shipped.load_state_dict(state, strict=False)
    assert not unknown and all(name.endswith("embed_avg") for name in absent)  # averages, for training alone
    codes = shipped.encode_codes(wave)
    assert codes.shape == (1, 4, 300) and len(codes.unique()) > 500
    shipped.save_pretrained(tmp_path / "saved")
    export_rounded(shipped.state_dict(), config, tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        again = PianoEncodecModel.from_pretrained(folder, dtype=torch.float32).eval()
        assert torch.equal(again.encode_codes(wave), codes)
        plain, report = EncodecModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(report.values())
        with torch.no_grad():
            assert torch.equal(plain.eval().encode(wave, bandwidth=2.2).audio_codes[0], codes)


def test_any_encodec_of_the_right_form_loads(codec, tmp_path):
    """A folder of transformers' own class loads as ours."""
    fields = {k: v for k, v in codec.config.to_dict().items() if k not in ("model_type", "auto_map", "architectures")}
    plain = EncodecModel(EncodecModel.config_class(**fields))
    plain.load_state_dict(codec.state_dict())
    plain.save_pretrained(tmp_path)
    wave = noise(1, 1, 3200)
    assert torch.equal(PianoEncodecModel.from_pretrained(tmp_path).encode_codes(wave), codec.encode_codes(wave))


def test_known_notes_are_written_into_the_latent():
    """Codes of struck keys are those of a latent that has them; nothing else changes; wrong shapes are refused."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(num_filters=2, hidden_size=96, num_lstm_layers=1, num_key_axes=88))
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    wave, struck = torch.randn(2, 1, 6400), torch.zeros(2, 10, 88)
    struck[1, 4, 30] = 1.0
    heard, played = codec.encode_codes(wave), codec.encode_codes(wave, struck=struck)
    with torch.no_grad():
        latent = codec.encoder(wave)
        latent[:, 8:] = 0
        latent[1, 8 + 30, 4] = sum(STRUCK)
        assert torch.equal(played, codec.quantizer.encode(latent).transpose(0, 1))
    assert not torch.equal(heard, played)
    with pytest.raises(ValueError, match=r"struck must be \(2, 10, 88\)"):
        codec.encode_codes(wave, struck=struck[:, :9])
    with pytest.raises(StrictDataclassClassValidationError, match="num_key_axes is 0 or 88"):
        PianoEncodecConfig(num_key_axes=40)


def codec_of_keys():
    """A tiny codec of 12 axes of spectra and 88 of keys."""
    torch.manual_seed(2)
    config = PianoEncodecConfig(num_filters=2, hidden_size=100, num_lstm_layers=1, num_key_axes=88)
    codec = PianoEncodecModel(config).eval()
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    return codec


def test_known_notes_are_decoded_whatever_the_codes_say():
    """At once and in chunks; of the keys that the codes hold themselves nothing is left."""
    codec = codec_of_keys()
    codes, struck = torch.randint(0, 2048, (1, 4, 40)), torch.zeros(1, 40, 88)
    struck[0, 7, 30] = struck[0, 20, 31] = 0.5
    latent = codec.quantizer.decode(codes.transpose(0, 1))
    latent[:, 12:] = 0
    latent[0, 12 + 30, 7] = latent[0, 12 + 31, 20] = 2.7
    with torch.no_grad():
        expected = codec.decoder(latent)
    whole = codec.decode_codes(codes, struck)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=1e-4)
    assert (whole - codec.decode_codes(codes)).abs().max() > 1e-3
    stream = CodecStream(codec)
    keys = PlayedKeys(struck, struck > 0)
    chunks = [
        stream.push(codes[..., :13], keys=keys.cut(0, 0, 13)),
        stream.push(codes[..., 13:], True, keys.cut(0, 13, 40)),
    ]
    torch.testing.assert_close(torch.cat(chunks, -1), whole, atol=1e-6, rtol=1e-4)
    means = torch.randn(1, 12, 40)
    latent[:, :12] = means
    with torch.no_grad():
        expected = codec.decoder(latent)
    torch.testing.assert_close(codec.decode_codes(codes, struck, means), expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=r"vectors must be \(1, 100 or more, 40\)"):
        codec.decode_codes(codes, vectors=means)
    with pytest.raises(ValueError, match=r"struck must be \(1, 40, 88\)"):
        codec.decode_codes(codes, struck[:, :-1])


@pytest.fixture(scope="module")
def telling():
    """A codec whose codes say which keys are struck: a vector of two codebooks has one of them."""
    codec = codec_of_keys()
    for layer in codec.quantizer.layers:
        layer.codebook.embed[:, 12:] = 0
    codec.quantizer.layers[0].codebook.embed[7, 12 + 30] = 2.7
    codec.quantizer.layers[1].codebook.embed[8, 12 + 31] = 1.8 + 1.8 * 0.2
    codec.quantizer.layers[2].codebook.embed[[5, 6], 12 + 32] = torch.tensor([1.1, 5.0])  # no velocities
    return codec


def test_codes_say_which_keys_are_struck(telling, codec):
    codes = torch.full((2, 4, 20), 9)
    codes[0, 0, 5], codes[0, 1, 12], codes[1, 0, 0] = 7, 8, 7
    struck = telling.struck_of(codes)
    assert struck.shape == (2, 20, 88)
    assert [tuple(place) for place in struck.nonzero().tolist()] == [(0, 5, 30), (0, 12, 31), (1, 0, 30)]
    torch.testing.assert_close(struck[struck > 0], torch.tensor([0.5, 0.2, 0.5]))
    codes[1, 2, 3], codes[1, 2, 9] = 5, 6
    torch.testing.assert_close(telling.struck_of(codes)[1, [3, 9], 32], torch.tensor([0.05, 1.0]))
    codes[0, 0, 6] = 7
    assert torch.equal(telling.struck_of(codes)[0, :10], struck[0, :10])  # one that is said twice is struck once
    with pytest.raises(ValueError, match="num_key_axes is 0"):
        codec.struck_of(codes)
    with pytest.raises(ValueError, match=r"must lie in \[0, 2048\)"):
        telling.struck_of(codes + 2040)


def test_codes_are_decoded_with_the_keys_that_they_say_a_frame_late(telling):
    codes = torch.randint(100, 2048, (2, 4, 20))
    codes[0, 0, 5] = codes[1, 0, 19] = 7
    struck, later = telling.struck_of(codes), torch.zeros(2, 20, 88)
    later[0, 6, 30] = struck[0, 5, 30]  # that of the last frame is beyond the end
    made = telling.decode_codes(codes, later, telling.steady_vectors(codes, struck))
    assert torch.equal(telling.decode_steady(codes), made)
    assert not torch.equal(made, telling.decode_codes(codes, struck, telling.steady_vectors(codes, struck)))


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_codes_of_a_moment(telling, frames):
    codes = torch.randint(0, 2048, (1, 4, frames))
    struck = telling.struck_of(codes)
    steady = telling.steady_vectors(codes, struck)
    assert struck.shape == (1, frames, 88) and steady.shape == (1, 12, frames)
    assert telling.decode_codes(codes, struck, steady).shape == (1, 1, 640 * frames)
    assert telling.decode_steady(codes).shape == (1, 1, 640 * frames)


def test_spectra_are_steady_between_strikes(telling):
    """The mean of five frames on each side, but none of across a strike, nor of beyond the ends."""
    codes, struck = torch.randint(0, 2048, (1, 4, 21)), torch.zeros(1, 21, 88)
    struck[0, 7, 30] = struck[0, 8, 31] = 0.5
    spectra = telling.latent_of(codes)[:, :12]
    steady = telling.steady_vectors(codes, struck)
    for frame in range(21):
        begin, end = (0, 7) if frame < 7 else (7, 8) if frame == 7 else (8, 21)
        near = slice(max(frame - 5, begin), min(frame + 6, end))
        torch.testing.assert_close(steady[..., frame], spectra[..., near].mean(-1))
    with pytest.raises(ValueError, match=r"struck must be \(1, 21, 88\)"):
        telling.steady_vectors(codes, struck[:, 1:])


def test_unusable_input(codec):
    for wave in (noise(2, 640), noise(1, 2, 640)):
        with pytest.raises(ValueError, match=r"must be \(B, 1, L\)"):
            codec.encode_codes(wave)
    with pytest.raises(ValueError, match="a row without a sample"):
        codec.encode_codes(noise(1, 1, 640), torch.zeros(1, 640))
    for mask in (torch.ones(1, 641), torch.arange(640)[None] > 9, torch.arange(640)[None] != 9):
        with pytest.raises(ValueError, match=r"padding_mask must be \(1, 640\), with padding on the right alone"):
            codec.encode_codes(noise(1, 1, 640), mask)
    for wave in (torch.full((1, 1, 640), torch.nan), torch.full((1, 1, 640), 300)):
        with pytest.raises(ValueError, match="must be finite floats"):
            codec.encode_codes(wave)
    with pytest.raises(ValueError, match=r"must be \(B, K, T\)"):
        codec.decode_codes(torch.zeros(1, 5, 3, dtype=torch.long))
    for code in (-1, 2048):
        with pytest.raises(ValueError, match="must lie in"):
            codec.decode_codes(torch.full((1, 4, 3), code))
    for codes in (torch.zeros(1, 4, 3), torch.zeros(1, 4, 3, dtype=torch.int16), torch.zeros(1, 4, 3).numpy()):
        with pytest.raises(ValueError, match="audio_codes must be a tensor of integers"):
            codec.decode_codes(codes)


# --- training of the quantiser


def make_quantizer(codes=8, size=4, layers=2):
    """As much of `EncodecModel.quantizer` as training needs, with random codebooks."""
    books = []
    for i in range(layers):
        embed = noise(codes, size, seed=i) / (i + 1)
        books.append(
            SimpleNamespace(
                codebook_size=codes,
                embed=embed,
                embed_avg=embed.clone(),
                cluster_size=torch.ones(codes),
                inited=torch.zeros(1),
            )
        )
    return SimpleNamespace(layers=[SimpleNamespace(codebook=book) for book in books])


def test_nearest_is_the_nearest():
    vectors, embed = noise(20_000, 4), noise(8, 4, seed=1)
    assert torch.equal(nearest(vectors, embed), torch.cdist(vectors, embed).argmin(1))


def test_the_gradient_passes_straight_through():
    quantizer, latent = make_quantizer(), noise(2, 4, 5).requires_grad_()
    quantised, codes, commitment = quantize_train(quantizer, latent)
    weights = noise(2, 4, 5, seed=3)
    (gradient,) = torch.autograd.grad((quantised * weights).sum(), latent, retain_graph=True)
    assert torch.allclose(gradient, weights, atol=1e-6)
    (pull,) = torch.autograd.grad(commitment, latent)
    assert pull.abs().sum() > 0  # the commitment loss does reach the encoder
    first, second = (F.embedding(codes[:, k], quantizer.layers[k].codebook.embed) for k in range(2))
    assert torch.allclose(quantised, (first + second).transpose(1, 2), atol=1e-6)
    left = [latent.transpose(1, 2) - chosen for chosen in (first, first + second)]
    expected = sum(rest.square().mean() for rest in left) / 2 / latent.var()
    assert torch.allclose(commitment, expected, rtol=1e-4)  # mean of both codebooks, relative to the latent


def test_each_codebook_moves_by_its_own_vectors():
    quantizer, other, updates = make_quantizer(), make_quantizer(), []
    for k in range(2):
        quantize_train(quantizer, noise(1, 4, 40, seed=k), updates)
    ema_update(quantizer, updates, 0.9, 0.0, torch.Generator())
    for book in range(2):
        alone = SimpleNamespace(layers=other.layers[book : book + 1])
        ema_update(alone, updates[book::2], 0.9, 0.0, torch.Generator())
        moved, expected = quantizer.layers[book].codebook, other.layers[book].codebook
        assert torch.allclose(moved.embed, expected.embed) and torch.allclose(moved.embed_avg, expected.embed_avg)


def test_training_and_use_choose_the_same_codes(codec):
    latent = noise(2, 16, 7)
    _, codes, _ = quantize_train(codec.quantizer, latent)
    assert torch.equal(codes, codec.quantizer.encode(latent).transpose(0, 1))


def test_one_step_of_the_moving_average():
    """cluster = d cluster + (1 - d) count, sum likewise, code = sum / cluster; checked by a loop."""
    quantizer, latent, decay = make_quantizer(layers=1), noise(1, 4, 40), 0.9
    book, updates = quantizer.layers[0].codebook, []
    before, sums, counts = book.embed.clone(), book.embed_avg.clone(), book.cluster_size.clone()
    quantize_train(quantizer, latent, updates)
    assert ema_update(quantizer, updates, decay, 0.0, torch.Generator().manual_seed(0)) == 0
    vectors, indices = updates[0]
    for code in range(8):
        own = vectors[indices == code]
        count = decay * counts[code] + (1 - decay) * len(own)
        total = decay * sums[code] + (1 - decay) * own.sum(0)
        assert torch.allclose(book.cluster_size[code], count) and torch.allclose(book.embed_avg[code], total)
        assert torch.allclose(book.embed[code], total / count, atol=1e-6)
        if not len(own):
            assert torch.allclose(book.embed[code], before[code], atol=1e-6)  # an unused code stays where it is


def test_dead_codes_are_revived():
    """A code that nothing uses becomes a vector of the step; the others do not notice."""
    quantizer, latent, updates = make_quantizer(layers=1), noise(1, 4, 40), []
    book = quantizer.layers[0].codebook
    book.embed[3] = book.embed_avg[3] = 1000.0
    book.cluster_size[3] = 0.02
    quantize_train(quantizer, latent, updates)
    assert ema_update(quantizer, updates, 0.9, 0.05, torch.Generator().manual_seed(0)) == 1
    distance = (updates[0][0] - book.embed[3]).abs().sum(1).min()
    assert distance < 1e-5 and book.cluster_size[3] == pytest.approx(0.1)
    assert torch.isfinite(book.embed).all() and book.embed.abs().max() < 100


def test_kmeans_start():
    """Eight clusters and eight codes: one codebook leaves the width of the clusters, each further one leaves less."""
    quantizer, generator = make_quantizer(), torch.Generator().manual_seed(0)
    centres = 10 * noise(8, 4, seed=5)
    vectors = centres[torch.arange(800) % 8] + 0.1 * noise(800, 4, seed=6)
    left = kmeans_start(quantizer, vectors, 80, generator)
    assert 0 < left[1] < left[0] < 0.2
    book = quantizer.layers[0].codebook
    assert book.inited.item() == 1
    assert book.cluster_size.sum() == pytest.approx(80, rel=0.05)  # as many uses as a training step will bring
    assert torch.allclose(book.embed_avg, book.embed * book.cluster_size[:, None], atol=1e-5)
    few = make_quantizer(layers=1)  # more codes than there are vectors: each is still one of them
    kmeans_start(few, 100 + centres[:4].repeat(20, 1), 80, generator)
    assert torch.cdist(few.layers[0].codebook.embed, 100 + centres[:4]).min(1).values.max() < 0.1
    random, _, worse = quantize_train(make_quantizer(), vectors.T[None])
    fitted, _, better = quantize_train(quantizer, vectors.T[None])
    assert better < worse
    assert F.mse_loss(fitted, vectors.T[None]) < 0.5 * F.mse_loss(random, vectors.T[None])


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_causal_conv": True},
        {"pad_mode": "reflect", "num_residual_layers": 2},
        {"upsampling_ratios": (2, 4, 8, 10), "num_residual_layers": 3, "last_kernel_size": 13},
    ],
)
def test_decoding_in_chunks_equals_decoding_at_once(overrides):
    """The same samples whatever the chunks: no seam, not even from the LSTM, which remembers all frames before."""
    torch.manual_seed(1)
    fields = {"num_filters": 2, "hidden_size": 16, "num_lstm_layers": 1} | overrides
    codec = PianoEncodecModel(PianoEncodecConfig(**fields)).eval()
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    codes = torch.randint(0, 2048, (1, 4, 81))
    whole = codec.decode_codes(codes)
    assert whole.abs().max() > 0.01
    for sizes in ((81,), (1, 80), (27, 27, 27), (5, 3, 2, 1, 30, 40), (80, 1), (10,) * 8 + (1,)):
        stream, chunks = CodecStream(codec), []
        for i, part in enumerate(codes.split(sizes, -1)):
            chunks.append(stream.push(part, is_last=i == len(sizes) - 1))
            given = sum(chunk.shape[-1] for chunk in chunks)
            assert given == 640 * (81 if i == len(sizes) - 1 else max(sum(sizes[: i + 1]) - stream.delay, 0))
        torch.testing.assert_close(torch.cat(chunks, -1), whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"use_causal_conv": True}, {"use_causal_conv": True, "trim_right_ratio": 0.5}])
@pytest.mark.parametrize("kernel, stride", [(4, 2), (5, 2), (10, 5)])
def test_upsampling_without_gradients_gives_the_same(fields, kernel, stride):
    """As transformers' own layer, whichever side is trimmed."""
    torch.manual_seed(0)
    plain = EncodecConvTranspose1d(PianoEncodecConfig(**fields), 3, 2, kernel, stride)
    ours = PianoEncodecUpsampling(PianoEncodecConfig(**fields), 3, 2, kernel, stride)
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():
        inputs = noise(2, 3, 7)
        torch.testing.assert_close(ours(inputs), plain(inputs), atol=1e-6, rtol=1e-5)


def test_a_stream_keeps_no_more_than_its_context():
    codec = PianoEncodecModel(PianoEncodecConfig(num_filters=2, hidden_size=16, num_lstm_layers=1)).eval()
    stream = CodecStream(codec)
    for _ in range(20):
        stream.push(torch.zeros(1, 4, 50, dtype=torch.long))
    assert stream.before.inputs.shape[-1] <= 2 * stream.before.context
    assert stream.behind.inputs.shape[-1] <= 2 * stream.behind.context
