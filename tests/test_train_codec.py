# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.train_codec` on tiny data: part after part, codes that stay, a listener that hears."""

import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from modeling_midivalle import PianoEncodecConfig, PianoEncodecModel, PianoListenerConfig, PianoListenerModel
from modeling_midivalle.modeling_piano_encodec import STRUCK, write_keys
from scripts import train_codec
from scripts.audio.rendered_audio import RenderedExcerpts, codes_path, onset_roll, onsets_path
from scripts.codec import parts
from scripts.codec.data import CropBatches, StoredCrops
from scripts.codec.features import SpectralFeatures
from scripts.codec.listener import onset_f1
from scripts.codec.objectives import (
    DecoderObjective,
    KickObjective,
    ListenerObjective,
    Objective,
    half_played,
    listening_losses,
    struck_losses,
)
from scripts.codec.oscillators import (
    KICKED,
    PITCHES,
    front_layers,
    has_kicks,
    kick_loss,
    kick_rows,
    struck_partials,
)
from scripts.codec.parts import export_rounded
from scripts.codec.recipe import CodecRecipe
from scripts.models.trained_parts import codec_hash, load_part
from scripts.training.processes import RunError
from scripts.training.run_log import draw_curves
from tokenization import NOTE_DTYPE

SMALL = {"num_filters": 16, "hidden_size": 64, "upsampling_ratios": [5, 4, 4, 8]}  # as narrow as oscillators allow
RECIPE = """
model: {num_filters: 16, hidden_size: 96, num_key_axes: 88, num_lstm_layers: 3, upsampling_ratios: [5, 4, 4, 8]}
listener: {hidden_size: 8}
rooms: [studio]
crop_seconds: 0.5
lead_seconds: 0.2
batch_size: 2
steps: 2
sing_steps: 1
kmeans_vectors: 2100
bf16: false
log_steps: 1
validation_crops: 1
validation_seconds: 1.0
"""


@pytest.fixture(scope="module")
def pool(tiny_pack, tmp_path_factory):
    """Two excerpts of 2 s with their onsets."""
    path = tmp_path_factory.mktemp("pool") / "pool.npy"
    source = RenderedExcerpts(tiny_pack / "midi", "train", [tiny_pack / "piano"], ["studio"], 2.0)
    items = [source[i] for i in range(2)]
    np.save(path, np.stack([item["wave"] for item in items]))
    np.save(onsets_path(path), np.stack([item["onsets"] for item in items]))
    return path


def test_part_after_part(pool, tmp_path, monkeypatch):
    """Every command goes on from the one before; encoder and codebooks, and so the codes, stay while the decoder
    learns from the listener."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def run(part, *more):
        shared = ["--config", str(tmp_path / "recipe.yaml"), "--audio", str(pool), "--workers", "0"]
        shared += [] if part in train_codec.FITTED else ["--validation", str(pool)]
        shared += [] if part == "encode" else ["--output-dir", str(tmp_path / part)]
        return train_codec.main([part, *shared, *map(str, more)])

    assert run("features", "--licence", "cc-by-4.0") == 0
    assert run("encoder", "--features", tmp_path / "features") == 0
    begun = load_part("codec", tmp_path / "encoder" / "codec").state_dict()
    given = CodecRecipe.from_yaml(tmp_path / "recipe.yaml"), SimpleNamespace(stored=False)
    going_on = parts.objective_of("encoder", *given, tmp_path / "encoder" / "codec", tmp_path / "features", go_on=True)
    assert all(torch.equal(value, begun[name]) for name, value in going_on.model.state_dict().items())
    assert run("hearing", "--codec", tmp_path / "encoder" / "codec") == 0
    begun, heard = (load_file(tmp_path / part / "codec" / "model.safetensors") for part in ("encoder", "hearing"))
    moved = {name for name in begun if not torch.equal(begun[name], heard[name])}
    assert moved and {int(name.split(".")[2]) > 6 for name in moved if name.startswith("encoder.layers.")} == {True}
    assert all(name.startswith("encoder.layers.") for name in moved)
    first, *_, last = map(json.loads, (tmp_path / "hearing" / "log.jsonl").read_text().splitlines())
    assert first["keep"] < 1e-9 and {"struck", "strength"} <= set(first) and "validation_f1" in last
    assert run("codebooks", "--codec", tmp_path / "hearing" / "codec") == 0
    codec = tmp_path / "codebooks"
    assert run("encode", "--codec", codec) == 0
    heard, played = (np.load(codes_path(pool, codec_hash(codec), kind)) for kind in ("heard", "played"))
    struck = np.load(onsets_path(pool)).any(2)[:, None]
    assert heard.shape == played.shape == (2, 4, 100) and ((heard != played) & struck).any()
    (tmp_path / "recipe.yaml").write_text(RECIPE + "optimizer: muon\n")
    assert run("listener") == 0
    state = torch.load(tmp_path / "listener" / "step_0000002" / "optimizers.pt", weights_only=True)[0]
    hidden, heads = state["param_groups"]
    assert hidden["momentum"] and heads["momentum"] is None and len(heads["params"]) == 2
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    listener = train_codec.trained_listener(tmp_path / "listener")
    assert all(p.isfinite().all() for p in listener.parameters())
    assert run("decoder", "--features", tmp_path / "features", "--codec", codec) == 0
    begun = tmp_path / "decoder" / "codec"
    shutil.move(begun, tmp_path / "begun")
    shutil.rmtree(tmp_path / "decoder")
    more = ["--go-on", "--codec", tmp_path / "begun", "--listener", tmp_path / "listener"]
    assert run("decoder", *more) == 0
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "begun", tmp_path / "decoder" / "codec"))
    assert codec_hash(codec) == codec_hash(tmp_path / "decoder" / "codec")
    assert json.loads((tmp_path / "decoder" / "codec" / "config.json").read_text())["num_oscillators"] == PITCHES
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("decoder.") for name in moved)
    assert run("kicks", "--codec", tmp_path / "decoder" / "codec") == 0
    kicking = load_file(tmp_path / "kicks" / "codec" / "model.safetensors")
    moved = {name for name in after if not torch.equal(after[name], kicking[name])}
    assert moved and {name[-3:] for name in moved} == {"_l0", "_l1"}  # the layer in front, and rows of the oscillators'
    rows = [json.loads(line) for line in (tmp_path / "decoder" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2] and {"mel", "notes", "velocity", "heard", "gradient"} <= set(
        rows[0]
    )
    assert {"validation_mel", "validation_log_mel_db", "validation_f1", "validation_f1_truth"} <= set(rows[2])
    assert soundfile.info(tmp_path / "decoder" / "samples" / "00_codec.flac").frames == 32_000
    assert (tmp_path / "decoder" / "samples" / "spectrograms.png").stat().st_size > 5_000
    assert draw_curves(tmp_path / "decoder").stat().st_size > 5_000
    assert PianoEncodecModel.from_pretrained(tmp_path / "decoder" / "codec").decode_codes(torch.zeros(1, 4, 5).long())[
        0, 0
    ].shape == (3200,)
    monkeypatch.chdir(tmp_path)
    for folder, words in (
        ("features", "Begun with new weights. Data: `pool.npy`. By this recipe"),
        ("encoder/codec", "Begun with the weights of `features`."),
        ("codebooks", "Begun with the weights of `codec`."),
        ("listener/listener", "it hears which keys are struck"),
        ("decoder/codec", "Steps done: 2, by this recipe"),
    ):
        card = ModelCard.load(f"{folder}/README.md")
        assert card.data.license == (None if "listener" in folder else "cc-by-4.0")  # it goes on from part to part
        assert words in card.text and str(tmp_path) not in card.content and str(pool.parent) not in card.content
        made = {}
        exec(re.search(r"```python\n(.*?)```", card.text, re.S)[1], made)  # as it stands, in this repository
        assert made["struck"].shape == (1, 50, 88) if "listener" in folder else made["audio"].shape == (1, 1, 32_000)
    assert re.search(r"at step 2, .*\| validation_f1 \| [\d.]+ \|", card.text, re.S)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("learning_rate: .inf", "learning_rate: inf is not finite"),
        ("learning_rate: 0", "learning_rate must be above 0"),
        ("seed: 99999999999999999999", "seed must be below 2^63, got 99999999999999999999"),
        ("discriminator_learning_rate: -1", "discriminator_learning_rate must be above 0"),
        ("weights: {mel: .nan}", "weights: {'mel': nan} is not finite"),
        ("weights: {mel: loud}", "weights: mel: 'loud' is not a number"),
        ("weights: {mel: -1}", "weights must be at least 0, got {'mel': -1.0}"),
        ("noise_db: [60, 80]", "noise_db must be below 0, which is full scale, got [60.0, 80.0]"),
        ("noise_db: [-60, -80]", "noise_db must be the lower and the higher of two numbers"),
        ("level_db: [3, -6]", "level_db must be the lower and the higher of two numbers"),
        ("optimizer: adamw", "optimizer is one of adam, muon, not 'adamw'"),
        ("betas: [0.8, 1]", "betas must be from 0 to below 1, got [0.8, 1.0]"),
        ("average_decay: 1.5", "average_decay must be at most 1"),
        ("validation_seconds: 0.1", "validation_seconds must be at least 0.3"),
        ("rooms: [studio, sudio]", "rooms: ['studio', 'sudio'] are not all of"),
        ("model: {num_filter: 2}", "model: unknown fields ['num_filter']"),
        ("model: {num_key_axes: 3}", "the recipe's model: no model can be made of it (num_key_axes is 0 or 88"),
        ("model: {num_filters: 0}", "the recipe's model: no model can be made of it"),
        ("listener: {hidden: 2}", "listener: unknown fields ['hidden']"),
        (
            "listener: {hidden_size: 0}",
            "the recipe's listener: no model can be made of it (hidden_size must be above 0",
        ),
    ],
)
def test_recipes_that_cannot_be_used_are_refused(line, sentence, pool, tmp_path, capsys):
    kept = [other for other in RECIPE.splitlines() if not other.startswith(f"{line.partition(':')[0]}:")]
    (tmp_path / "recipe.yaml").write_text("\n".join([*kept, line]))
    part = "listener" if line.startswith("listener") else "features"
    arguments = [part, "--config", str(tmp_path / "recipe.yaml"), "--audio", str(pool), "--workers", "0"]
    assert train_codec.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_found_before_the_fit(pool, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "out").write_text("mine")
    arguments = ["features", "--config", str(tmp_path / "recipe.yaml"), "--audio", str(pool), "--workers", "0"]
    assert train_codec.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert (
        "out: is not a folder; give another" in said.err
        and "axes keep" not in said.out
        and (tmp_path / "out").read_text() == "mine"
    )
    for option in (("--stop-after", "nan"), ("--stop-after", "0"), ("--workers", "-1")):
        with pytest.raises(SystemExit):
            train_codec.main([*arguments, "--output-dir", str(tmp_path / "out"), *option])
        assert f"{option[0]} must be" in capsys.readouterr().err
    for part, more, sentence in (
        ("whole", ("--codec", "c", "--features", "f"), "--features are for encoder and decoder"),
        ("kicks", ("--codec", "c", "--go-on"), "--go-on is for encoder, decoder and listener: kicks always does"),
        ("whole", ("--codec", "c", "--midi-root", "m"), "give audio: --midi-root and --piano, or --audio"),
        ("whole", ("--codec", "c", "--piano", "p"), "give audio: --midi-root and --piano, or --audio"),
    ):
        with pytest.raises(SystemExit):
            train_codec.main([part, *arguments[1:], "--output-dir", str(tmp_path / "out"), *more])
        assert sentence in capsys.readouterr().err


def test_a_codec_that_others_have_learned_from_is_not_replaced(
    pool, tiny_pack, tmp_path, monkeypatch, has_usual_mode, capsys
):
    """`features` and `codebooks`; a codec that was only half written is begun anew, for its weights come last."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    shutil.copytree(tiny_pack / "codec", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    for part in ("features", "codebooks"):
        arguments = [part, "--config", str(tmp_path / "recipe.yaml"), "--audio", str(pool), "--workers", "0"]
        arguments += ["--codec", str(tiny_pack / "codec"), "--output-dir", str(tmp_path / "out")]
        assert train_codec.main(arguments) == 2
        assert f"{tmp_path / 'out'}: holds a codec, from which others may have learned" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"full/model\.safetensors: cannot be written"):
        patch.setattr(parts, "save_file", lambda tensors, *_, **options: save_file(tensors, tmp_path / "none" / "none"))
        export_rounded({"weight": torch.zeros(2)}, PianoEncodecConfig(), tmp_path / "full")
    written = [path.name for path in (tmp_path / "full").iterdir()]
    assert "config.json" in written and not [name for name in written if "safetensors" in name]
    export_rounded({"weight": torch.zeros(2)}, PianoEncodecConfig(), tmp_path / "full")
    assert has_usual_mode((tmp_path / "full").glob("*.safetensors"))


def test_features_that_are_none_are_told_by_their_option(pool, tmp_path, capsys):
    """An encoder begins with their codec, but no --codec was given."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = ["encoder", "--config", str(tmp_path / "recipe.yaml"), "--audio", str(pool), "--workers", "0"]
    assert train_codec.main([*arguments, "--features", str(tmp_path), "--output-dir", str(tmp_path / "out")]) == 2
    assert f"error: --features {tmp_path}: holds no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "line", "sentence"),
    [
        ("codebooks", "kmeans_vectors: 100", "kmeans_vectors: 100 are fewer than 2048 codes"),
        ("encoder", "", "features: were not fitted for this codec"),
        ("whole", "crop_seconds: 0.1", "crop_seconds: 0.1 s are too short; whole needs 0.14 or more"),
        ("kicks", "crop_seconds: 0.5", "crop_seconds: 0.5 s are too short; kicks needs 0.52 or more"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_learned(
    part, line, sentence, pool, tiny_pack, tmp_path, capsys
):
    kept = [other for other in RECIPE.splitlines() if not line or not other.startswith(line.partition(":")[0])]
    (tmp_path / "recipe.yaml").write_text("\n".join([*kept, line]))
    (tmp_path / "features").mkdir()
    parts.save_whole(SpectralFeatures(5).state_dict(), tmp_path / "features" / "features.safetensors")
    for path in (pool, onsets_path(pool)):  # not the codes of another codec
        shutil.copy(path, tmp_path)
    arguments = [part, "--config", tmp_path / "recipe.yaml", "--audio", tmp_path / pool.name, "--workers", 0]
    arguments += ["--codec", tiny_pack / "codec", "--output-dir", tmp_path / "out"]
    arguments += ["--features", tmp_path / "features"] if part == "encoder" else []
    assert train_codec.main([str(argument) for argument in arguments]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 2, "error: a worker process died"),
        (
            ValueError("Caught\nOriginal Traceback (most\n  x\nscripts.x.RenderError: a.wav: no\n"),
            2,
            "error: a.wav: no",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "error: the memory of the GPU is full"),
        (KeyboardInterrupt(), 130, "interrupted; start it again to go on"),
    ],
)
def test_what_befalls_the_processes_is_one_sentence(error, code, said, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(train_codec, "run_part", fail)
    assert train_codec.main(["listener", "--config", "x", "--audio", "x.npy", "--output-dir", "x"]) == code
    found = capsys.readouterr().err
    assert found.startswith(said) and found.count("\n") == 1


@pytest.mark.parametrize("part", ["features", "codebooks", "encode"])
def test_what_is_fitted_at_once_is_one_process_work(part, pool, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [part, "--config", str(tmp_path / "recipe.yaml"), "--audio", str(pool), "--codec", "x"]
    arguments += [] if part == "encode" else ["--output-dir", str(tmp_path / "out")]
    assert train_codec.main(arguments) == 2
    assert f"error: {part} is one process's work" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_codec_of_the_hub(pool, tiny_pack, tmp_path, monkeypatch, capsys):
    """An id is downloaded, and told from a folder that is not there."""
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tiny_pack / "codec")
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = ["whole", "--config", str(tmp_path / "recipe.yaml"), "--audio", str(pool), "--workers", "0"]
    arguments += ["--steps", "1", "--output-dir", str(tmp_path / "out")]
    assert train_codec.main([*arguments, "--codec", "me/codec"]) == 0 and asked == ["me/codec"]
    assert (tmp_path / "out" / "codec" / "config.json").is_file()
    assert train_codec.main([*arguments, "--codec", "./lost"]) == 2
    assert "--codec ./lost: no such folder, and not a Hub id" in capsys.readouterr().err


def test_a_pool_without_onsets_is_refused(pool, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    np.save(tmp_path / "bare.npy", np.load(pool))
    arguments = ["listener", "--config", str(tmp_path / "recipe.yaml"), "--audio", str(tmp_path / "bare.npy")]
    assert train_codec.main([*arguments, "--workers", "0", "--output-dir", str(tmp_path / "out")]) == 2
    assert "bare.onsets.npy" in capsys.readouterr().err


def test_onset_roll_holds_velocities():
    """Frame of 20 ms and key; what is struck before or after the excerpt is not in it."""
    notes = np.array([(-0.01, 1, 60, 50), (0.0, 1, 21, 70), (0.039, 1, 108, 127), (0.04, 1, 60, 1)], NOTE_DTYPE)
    expected = np.zeros((2, 88))
    expected[0, 0], expected[1, 87] = 70, 127
    assert np.array_equal(onset_roll(notes, 2), expected)


def test_the_latent_says_what_is_struck():
    """No loss where the key axes are as `write_keys` has them, much where a key is missing or added; of other rows
    than every other, and of those without notes, the latent stays."""
    onsets = torch.zeros(4, 6, 88)
    onsets[:, 2, 40] = 0.5
    latent = torch.randn(4, 90, 6)
    played = write_keys(latent, onsets)
    assert torch.equal(played[:, :2], latent[:, :2]) and float(played[0, 2 + 40, 2]) == pytest.approx(
        STRUCK[0] + STRUCK[1] / 2
    )
    assert int((played[:, 2:] != 0).sum()) == 4
    right = struck_losses(played[:, 2:].transpose(1, 2), onsets)
    assert float(right["strength"]) == 0 and float(right["struck"]) < 1e-2
    for wrong in (torch.zeros_like(onsets), onsets.roll(1, 2)):
        heard = write_keys(latent, wrong)[:, 2:].transpose(1, 2)
        losses = struck_losses(heard, onsets)
        assert float(losses["strength"]) > 1e-2 and float(losses["struck"]) > 1.5 * float(right["struck"])
    silent = torch.zeros_like(onsets)
    silent[0] = played[0, 2:].T  # the other rows hear nothing, and nothing is known of their notes
    first = torch.tensor([True, False, False, False])
    assert (
        float(struck_losses(silent, onsets)["strength"]) > float(struck_losses(silent, onsets, first)["strength"]) == 0
    )
    assert not any(struck_losses(silent, onsets, first & False).values())
    assert torch.equal(half_played(latent, onsets)[1::2], played[1::2])
    assert torch.equal(half_played(latent, onsets)[::2], latent[::2])
    assert torch.equal(half_played(latent, onsets, torch.tensor([True, False] * 2)), latent)


def test_codebooks_hold_keys_as_heard_and_as_played(pool, tmp_path):
    """Of an encoder that hears nothing, what is struck is in them all the same: of every other crop that has notes."""
    torch.manual_seed(0)
    more = {"num_filters": 2, "hidden_size": 90, "num_lstm_layers": 1, "codebook_size": 256}
    PianoEncodecModel(PianoEncodecConfig(num_key_axes=88, **more)).save_pretrained(tmp_path / "codec")
    recipe = CodecRecipe(crop_seconds=0.5, kmeans_vectors=300)
    batch, struck = next(CropBatches(StoredCrops([pool], 0.5), recipe, 6)()), []
    for name, known in (("all", [True] * 6), ("heard", [True, False] * 3)):
        found = {"has_notes": torch.tensor(known)} | batch
        parts.fit_codebooks(recipe, tmp_path / "codec", lambda found=found: iter([found] * 2), tmp_path / name)
        keys = PianoEncodecModel.from_pretrained(tmp_path / name).quantizer.layers[0].codebook.embed[:, -88:]
        struck.append(((keys == 0) | (keys > 1)).all(1).float().mean())
        assert bool((keys > STRUCK[0]).any()) == all(known)
    assert 0.3 < struck[0] < 0.7 and struck[1] == 0


def test_a_decoder_that_is_too_narrow_for_oscillators_is_refused():
    with pytest.raises(ValueError, match="oscillators need LSTM layers of 168, this codec's are of 32"):
        DecoderObjective(PianoEncodecModel(PianoEncodecConfig(num_filters=2, hidden_size=16)), False, 0)


def test_struck_keys_kick_their_first_partials():
    """Key 60 is the 33rd semitone above E1; an octave above, its second partial. Nothing is above or below the bank."""
    onsets = torch.zeros(1, 3, 88)
    onsets[0, 1, 60 - 21], onsets[0, 2, 0], onsets[0, 2, 87] = 0.3, 1.0, 1.0
    kicks = struck_partials(onsets)
    assert kicks.shape == (1, 3, PITCHES) and not kicks[0, 0].any()
    assert {60 - 28 + above: share for above, share in KICKED} == {
        int(p): pytest.approx(float(kicks[0, 1, p])) for p in kicks[0, 1].nonzero()
    }
    low = [21 + above - 28 for above, _ in KICKED]
    assert kicks[0, 2].nonzero().flatten().tolist() == [p for p in low if p >= 0] + [108 - 28]


def test_the_front_layers_learn_to_kick():
    """Nothing but them and the rows that push moves; a decoder that goes on keeps teaching them."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(**SMALL | {"num_lstm_layers": 3}))
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    lstm = codec.decoder.layers[1].lstm
    with torch.no_grad():
        lstm.weight_ih_l1[kick_rows(lstm)] = 0
    assert not has_kicks(lstm)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    objective = KickObjective(codec)
    hidden = torch.randn(2, 9, 256)
    behind = torch.nn.LSTM(256, 256, 2, batch_first=True)
    behind.load_state_dict({f"{n[:-1]}{int(n[-1]) - 1}": v for n, v in lstm.state_dict().items() if n[-1] != "0"})
    whole = lstm(hidden.transpose(0, 1))[0].transpose(0, 1)
    assert torch.allclose(behind(front_layers(lstm, hidden))[0], whole, atol=1e-6)
    batch = {"audio_codes": torch.randint(0, 2048, (2, 4, 60)), "onsets": torch.zeros(2, 40, 88)}
    batch["onsets"][0, 30, 40], batch["onsets"][1, 20, 50] = 0.5, 0.9
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], 0.003)
    first = objective(batch)[0]
    for _ in range(60):
        losses = objective(batch)[0]
        optimizer.zero_grad()
        (losses["keep"] + 30 * losses["kicks"]).backward()
        optimizer.step()
    assert float(first["keep"]) < 1e-9 and float(losses["kicks"]) < 0.3 * float(first["kicks"])
    assert float(losses["keep"]) < 0.2 and has_kicks(lstm)
    moved = {name for name, value in codec.state_dict().items() if not torch.equal(value, before[name])}
    weights = {f"decoder.layers.1.lstm.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    assert moved == weights | {f"decoder.layers.1.lstm.{kind}_l1" for kind in ("weight_ih", "bias_ih")}
    other = torch.ones(4 * 256, dtype=torch.bool)
    other[kick_rows(lstm)] = False
    assert torch.equal(lstm.weight_ih_l1[other], before["decoder.layers.1.lstm.weight_ih_l1"][other])
    codec.requires_grad_(True)
    wave = 0.1 * torch.randn(2, 40 * 640)
    losses, _ = DecoderObjective(codec, False, 0)(batch | {"input_values": wave})
    told = front_layers(lstm, codec.decoder.layers[0](codec.latent_of(batch["audio_codes"])).transpose(1, 2))
    expected = kick_loss(lstm, told[:, -40:], batch["onsets"], 50)
    assert torch.allclose(losses["kicks"], expected) and 0 < float(expected) < 1
    codec.zero_grad()
    losses["kicks"].backward()
    assert lstm.weight_ih_l0.grad.any() and not lstm.weight_ih_l1.grad[kick_rows(lstm)].any()


def test_codes_that_are_told_their_keys():
    """Only the rows that are; lead and crop."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(**SMALL | {"hidden_size": 128, "num_key_axes": 88}))
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    struck = torch.zeros(2, 9, 88)
    struck[:, 1, 3], struck[:, 7, 5] = 0.5, 0.8
    batch = {"audio_codes": torch.randint(0, 2048, (2, 4, 9)), "told": torch.tensor([False, True])}
    batch |= {"lead_onsets": struck[:, :4], "onsets": struck[:, 4:]}
    latent = Objective(codec, False).quantised(batch)
    plain = codec.latent_of(batch["audio_codes"])
    assert torch.equal(latent[0], plain[0]) and torch.equal(latent[1:], write_keys(plain[1:], struck[1:]))
    assert not torch.equal(latent[1], plain[1])


def test_onset_f1_by_hand():
    """Three struck keys; two found, one of them two frames late, and one peak where nothing is struck."""
    struck, logits = torch.zeros(1, 20, 88), torch.full((1, 20, 88), -9.0)
    for frame, key in ((3, 10), (8, 10), (8, 40)):
        struck[0, frame, key] = 64
    for frame, key in ((3, 10), (10, 40), (15, 5)):
        logits[0, frame, key] = 4.0
    assert onset_f1(logits, struck) == pytest.approx(2 / 3)
    logits[0, 10, 40], logits[0, 11, 40] = -9.0, 4.0  # three frames late is another note
    assert onset_f1(logits, struck) == pytest.approx(1 / 3)


def test_the_listener_learns(pool):
    """On one excerpt, and then hears what is struck in it, and how hard."""
    torch.manual_seed(0)
    wave = torch.from_numpy(np.load(pool)[:1, :32_000].astype(np.float32) / 32767)  # 1 s, six notes
    onsets = torch.from_numpy(np.load(onsets_path(pool))[:1, :50]).float() / 127
    objective = ListenerObjective(PianoListenerModel(PianoListenerConfig(hidden_size=24)))
    optimizer = torch.optim.Adam(objective.parameters(), 0.003)
    batch, history = {"input_values": wave, "onsets": onsets}, []
    for _ in range(120):
        losses = objective(batch)[0]
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
        optimizer.zero_grad()
        (losses["notes"] + 0.1 * losses["velocity"]).backward()
        optimizer.step()
    assert all(history[-1][name] < 0.6 * history[0][name] for name in ("notes", "velocity")), history[-1]
    with torch.no_grad():
        logits = objective.model(wave).logits
    found = [onset_f1(logits, onsets, threshold) for threshold in (0.1, 0.2, 0.3)]
    assert max(found) > 0.3, found


def test_what_sounds_alike_is_heard_alike(pool):
    """No distance between a wave and itself; the losses reach the wave, not the listener."""
    wave = torch.from_numpy(np.load(pool).astype(np.float32) / 32767)
    onsets = torch.from_numpy(np.load(onsets_path(pool)))
    listener = PianoListenerModel(PianoListenerConfig(hidden_size=8)).requires_grad_(False)
    output = (wave * 0.5).requires_grad_()
    same = listening_losses(listener, wave, wave, onsets)
    assert float(same["heard"]) == 0 == float(same["velocity"])
    losses = listening_losses(listener, output, wave, onsets)
    sum(losses.values()).backward()
    assert float(losses["heard"].detach()) > 0 < float(losses["velocity"].detach()) and output.grad.abs().sum() > 0
    assert all(p.grad is None for p in listener.parameters())


def test_codes_in_front_of_a_crop_are_remembered():
    """With the codes before it, a crop is decoded as inside the whole; without, the decoder starts from silence."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(**SMALL))
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_()
    with torch.no_grad():
        codec.decoder.layers[1].lstm.bias_ih_l0[256:512] = 5.0  # forget nothing
    objective = DecoderObjective(codec, False, 0)
    codes = torch.randint(0, 2048, (1, 4, 60))
    whole, wave = codec.decode_codes(codes)[0, 0], torch.zeros(1, 30 * 640)
    inside = slice(5 * 640, -640)
    with torch.no_grad():
        _, led = objective({"input_values": wave, "audio_codes": codes})
        _, alone = objective({"input_values": wave, "audio_codes": codes[..., 30:]})
        sound = torch.randn(1, 60 * 640)
        quantised = codec.encode_codes(sound[:, None])
        _, heard = objective({"input_values": sound[:, 30 * 640 :], "lead": sound[:, : 30 * 640]})
        _, coded = objective({"input_values": wave, "audio_codes": quantised})
    assert torch.allclose(heard, coded, atol=1e-5)  # of sound before a crop, as of its codes
    assert torch.allclose(led[0, inside], whole[30 * 640 :][inside], atol=1e-5)
    assert not torch.allclose(alone[0, inside], whole[30 * 640 :][inside], atol=1e-3)
