# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`python -m scripts.adapt` on a tiny model: an adapter that loads, a base that stays, recordings that are refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from symusic import ControlChange, Note, Score, Track
from transformers import AutoModel, EncodecFeatureExtractor

from modeling_midivalle import MidiValleForConditionalGeneration, PianoEncodecConfig, PianoEncodecModel
from processing import MidiValleProcessor, write_audio
from scripts import adapt
from scripts.audio.rendered_audio import onset_roll
from scripts.dataset import own_recording
from scripts.dataset.folder import midi_bytes
from scripts.dataset.own_recording import Recording, encode, read_recording
from scripts.measuring.metrics import colour_difference
from scripts.training.model_card import adapter_card
from tokenization import NOTE_DTYPE, MidiValleTokenizer

RECIPE = """
rank: 2
steps: 4
warmup_steps: 1
learning_rate: 0.01
dropout: 0.0
prompt_seconds: [0.5, 1.0]
target_seconds: 1.0
held_share: 0.05
"""
RATE = 32_000
PROCESSOR = SimpleNamespace(tokenizer=MidiValleTokenizer(), correct_level=False)


@pytest.fixture
def folder(make_model, tmp_path):
    """A tiny model's folder with its processor."""
    make_model().save_pretrained(tmp_path / "model")
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=RATE)
    MidiValleProcessor(extractor, MidiValleTokenizer()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(folder, write_midi, tmp_path):
    """`run(seconds, *more)` -> exit code of the command on a recording of that length, of noise."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def command(seconds, *more):
        wave = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE)).astype(np.float32)
        write_audio(tmp_path / "mine.wav", wave)
        write_midi(tmp_path / "mine.mid", seconds=seconds, density=4)
        files = [str(tmp_path / name) for name in ("mine.wav", "mine.mid")]
        options = ["--model", str(folder), "--config", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
        return adapt.main([*files, *options, "--output-dir", str(tmp_path / "out"), *more])

    return command


def test_notes_are_those_that_the_model_knows(make_model, tmp_path):
    """Of a model that knows no pedal they end with their keys."""
    score, track = Score(480, ttype="second"), Track(ttype="second")
    for i in range(40):
        track.notes.append(Note(0.4 * i, 0.1, 50 + i, 80, ttype="second"))
    track.controls.append(ControlChange(0.0, 64, 127, ttype="second"))
    score.tracks.append(track)
    score.to("tick").dump_midi(tmp_path / "a.mid")
    write_audio(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(61 * RATE))
    for sustain in ("ignore", "extend"):
        processor = SimpleNamespace(tokenizer=MidiValleTokenizer(sustain=sustain), correct_level=False)
        recording, _ = read_recording(tmp_path / "a.wav", tmp_path / "a.mid", make_model(), processor)
        assert (recording.notes["duration"].max() > 0.5) == (sustain == "extend")


@pytest.mark.parametrize("late", [-0.15, 0.2])
def test_notes_are_moved_to_where_they_are_heard(late, make_model, tmp_path, monkeypatch):
    """By a MIDI that is early or late by less than 0.3 s; what then lies outside of the sound is left out."""
    rng = np.random.default_rng(0)
    onsets = [0.1, *np.sort(rng.uniform(0.5, 60.5, 118)), 60.9]
    played = np.array([(onset, 0.3, rng.integers(50, 80), 80) for onset in onsets], NOTE_DTYPE)
    (tmp_path / "a.mid").write_bytes(midi_bytes(played))
    wave, time = np.zeros(62 * RATE), np.arange(RATE // 4) / RATE
    for onset, pitch in zip(played["onset"] + late, played["pitch"], strict=True):
        sound = 0.1 * np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * time) * np.exp(-10 * time)
        first = round((onset + 0.5) * RATE)
        wave[first : first + len(sound)] += sound
    wave = wave[RATE // 2 :][: 61 * RATE]
    write_audio(tmp_path / "a.wav", wave)
    monkeypatch.setattr(own_recording, "encode", lambda codec, wave, notes=None: torch.zeros(4, 61 * 50))
    recording, remark = read_recording(tmp_path / "a.wav", tmp_path / "a.mid", make_model(), PROCESSOR)
    expected = played["onset"] + late
    expected = expected[(expected >= 0) & (expected < 61)]
    assert len(expected) == 119 and np.abs(recording.notes["onset"] - expected).max() < 0.02 and remark


def test_where_windows_of_a_recording_lie():
    """Drawn ones before what is held back, prompts beside targets; that is heard whole, behind the last prompt before
    it. The codes are the numbers of their frames."""
    heard = torch.arange(20 * 50).expand(4, -1)
    recording = Recording(np.zeros(20 * RATE), np.zeros(0, NOTE_DTYPE), heard, heard, MidiValleTokenizer())
    recipe, rng, seen = adapt.AdaptRecipe(prompt_seconds=(0.5, 1.5), target_seconds=2.0, batch_size=4), None, set()
    rng = np.random.default_rng(0)
    for _ in range(40):
        batch = recording.draw(rng, recipe, 6.0)
        (prompt,) = set(batch["prompt_lengths"].tolist())
        frames = batch["audio_codes"][:, 0]
        assert frames.shape == (4, prompt + 100) and (frames < 300).all()
        assert all(len(set(row)) == prompt + 100 for row in frames.tolist())  # none of the target in the prompt
        seen |= {("prompt", prompt), *(("before", bool(row[0] < row[prompt])) for row in frames)}
        seen |= {("end", int(row[-1])) for row in frames if row[-1] == 299}
    assert seen == {("prompt", n) for n in (25, 50, 75)} | {("before", True), ("before", False), ("end", 299)}
    held = [batch["audio_codes"][0, 0].tolist() for batch in recording.held(recipe, 16.0)]
    prompt = list(range(725, 800))
    assert held == [prompt + list(range(first, first + 100)) for first in (800, 900)]


def test_notes_that_are_left_out_are_told(make_model, tmp_path, monkeypatch):
    """Else the model learns to leave out what is heard."""
    score, track, drums = Score(480, ttype="second"), Track(ttype="second"), Track(ttype="second", is_drum=True)
    for i in range(40):
        track.notes.append(Note(0.4 * i, 0.1, 50 + i, 80, ttype="second"))
    drums.notes.append(Note(1.0, 0.1, 40, 80, ttype="second"))
    score.tracks.extend([track, drums])
    score.to("tick").dump_midi(tmp_path / "a.mid")
    write_audio(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(61 * RATE))
    monkeypatch.setattr(own_recording, "encode", lambda codec, wave, notes=None: torch.zeros(4, 61 * 50))
    _, remark = read_recording(tmp_path / "a.wav", tmp_path / "a.mid", make_model(), PROCESSOR)
    assert remark.startswith("a.mid: left out notes: 1 ") and "; a.wav: the strikes" in remark


def test_a_recording_of_another_level_is_corrected(make_model, write_midi, tmp_path, monkeypatch):
    """As prompts are, if they are: else a prompt of it would be another piano."""
    write_midi(tmp_path / "a.mid", 1, 60)
    wave = 0.001 * np.random.default_rng(0).standard_normal(61 * RATE)
    write_audio(tmp_path / "a.wav", wave)
    monkeypatch.setattr(own_recording, "encode", lambda codec, wave, notes=None: torch.zeros(4, 61 * 50))
    as_is, _ = read_recording(tmp_path / "a.wav", tmp_path / "a.mid", make_model(), PROCESSOR)
    corrected = SimpleNamespace(tokenizer=MidiValleTokenizer(), correct_level=True)
    raised, remark = read_recording(tmp_path / "a.wav", tmp_path / "a.mid", make_model(), corrected)
    gain = raised.wave.std() / as_is.wave.std()
    assert gain > 10 and np.allclose(raised.wave, gain * as_is.wave, rtol=1e-3, atol=1e-6)
    assert f"softer than the velocities of its MIDI tell; raised by {20 * np.log10(gain):.0f} dB" in remark


def test_silence_is_refused_before_anything_is_learned(make_model, write_midi, tmp_path):
    write_midi(tmp_path / "a.mid", 1)
    write_audio(tmp_path / "a.wav", np.zeros(61 * RATE))
    with pytest.raises(ValueError, match=r"a\.wav: is silence; give a recording of the notes of a\.mid"):
        read_recording(tmp_path / "a.wav", tmp_path / "a.mid", make_model(), PROCESSOR)


def test_a_recording_that_ends_in_silence_is_played_to_its_end(folder, monkeypatch):
    """More silence than any ring-out: what is rendered lasts as long as what it is compared with."""
    notes = np.array([(0.2, 0.5, 60, 80), (2.2, 0.5, 64, 80)], NOTE_DTYPE)
    codes = torch.zeros(4, 20 * 50, dtype=torch.long)
    recording = Recording(np.ones(20 * RATE, np.float32), notes, codes, codes, MidiValleTokenizer())
    monkeypatch.setattr(adapt, "heard", lambda recording, wave, *_: len(wave))
    render_wave, rung = adapt.render_wave, []
    monkeypatch.setattr(adapt, "render_wave", lambda *given: rung.append(given[5]) or render_wave(*given))
    model, processor = adapt.load_model(folder, "cpu"), adapt.load_processor(folder)
    assert adapt.play(model, processor, recording, adapt.AdaptRecipe(prompt_seconds=(0.5, 1.0)), 2.0, None) == 18 * RATE
    assert rung == [10.0]


def test_notes_of_the_held_part_are_those_struck_in_it():
    """Not what still sounds when it begins, nor what follows it."""
    notes = np.array([(1.5, 1.0, 50, 80), (2.0, 0.1, 55, 80), (2.5, 0.5, 60, 80), (3.0, 0.5, 64, 80)], NOTE_DTYPE)
    wave, codes = np.ones(4 * RATE, np.float32), torch.zeros(4, 4 * 50)
    recording, struck = Recording(wave, notes, codes, codes, MidiValleTokenizer()), notes[1:3].copy()
    struck["onset"] -= 2
    found = adapt.heard(recording, wave[:RATE], 2.0, 1.0, lambda wave, rate: struck)
    assert found == {"timbre distance, dB": pytest.approx(0, abs=1e-6), "onset F1": 1.0}


def test_a_held_part_without_notes_is_refused_before_anything_is_learned(folder, tmp_path):
    """All notes are in the first 10 s; of 20 s the last 4 are held back."""
    notes = np.array([(0.5 * i, 0.5, 50 + i, 80) for i in range(20)], NOTE_DTYPE)
    model, processor = adapt.load_model(folder, "cpu"), adapt.load_processor(folder)
    wave = 0.1 * np.random.default_rng(0).standard_normal(20 * RATE).astype(np.float32)
    codes = encode(model.codec, wave)
    recording = Recording(wave, notes, codes, codes, processor.tokenizer)
    recipe = adapt.AdaptRecipe(prompt_seconds=(1.0, 2.0), target_seconds=2.0)
    with pytest.raises(adapt.AdaptError, match="no note is struck from 16 to 20 s, .*: change held_share, or give"):
        adapt.adapt(model, processor, recording, recipe, None, True, tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()


def test_the_codec_is_not_given_the_colour_of_what_is_generated(make_model):
    """It is what the table measures both sides of the adaptation by."""
    model, wave = make_model(), 0.1 * np.random.default_rng(0).standard_normal(8 * RATE).astype(np.float32)
    codes, notes = encode(model.codec, wave), np.array([(0.2, 0.5, 60, 80)], NOTE_DTYPE)
    given = Recording(wave, notes, codes, codes, MidiValleTokenizer()), adapt.AdaptRecipe(prompt_seconds=(1.0, 2.0))
    plain = adapt.reconstruct(model, *given, 4.0, 2.0)
    model.config.as_recorded = True
    recorded = adapt.reconstruct(model, *given, 4.0, 2.0)
    model.config.colour_gains_db = [6.0] * 5 + [-6.0] * 5
    assert np.array_equal(recorded, adapt.reconstruct(model, *given, 4.0, 2.0)) and not np.allclose(recorded, plain)


def test_an_adapter_learns_a_colour_of_its_own(make_model, tmp_path):
    """What adapted sound lacks in parts of the spectrum, here of a low tone, is added to what the model lacks, wherever
    the adapter is played."""
    pytest.importorskip("peft", reason="make install-peft")
    parts, gains = make_model(), [1.0] * 5 + [-1.0] * 5
    model = MidiValleForConditionalGeneration.from_sub_models(
        parts.codec, parts.ar, parts.nar, as_recorded=True, colour_gains_db=gains
    )
    model.save_pretrained(tmp_path / "model")
    wave = 0.1 * np.sin(440 * np.arange(12 * RATE) / RATE).astype(np.float32)
    codes, notes = encode(model.codec, wave), np.array([(2.2, 0.5, 60, 80), (3.5, 0.5, 64, 80)], NOTE_DTYPE)
    recording, recipe = Recording(wave, notes, codes, codes, MidiValleTokenizer()), adapt.AdaptRecipe()
    recipe.prompt_seconds = (1.0, 2.0)
    processor = MidiValleProcessor(EncodecFeatureExtractor(feature_size=1, sampling_rate=RATE), MidiValleTokenizer())
    trained = adapt.add_adapter(model, recipe)
    assert model.colour_gains() == gains and not any(p is q for p in trained for q in model.colour.parameters())
    lacking = -np.array(
        colour_difference(recording.cut(2.0, 8.0), adapt.played(model, processor, recording, recipe, 2, 8))
    )
    adapt.learn_colour(model, processor, recording, recipe, 10.0)
    learned = model.colour_gains()
    assert np.allclose(np.array(learned) - gains, lacking, atol=1e-3) and np.ptp(lacking) > 3
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert loaded.colour_gains() == gains
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert np.allclose(loaded.eval().colour_gains(), learned, atol=1e-3)
    loaded.disable_adapters()
    assert loaded.colour_gains() == gains


def test_an_adapter_is_learned_and_loads(run, folder, tmp_path, monkeypatch, has_usual_mode, capsys):
    pytest.importorskip("peft", reason="make install-peft")
    measure, written = adapt.measure, []
    path = tmp_path / "out" / "adapter_model.safetensors"
    monkeypatch.setattr(adapt, "measure", lambda *given: written.append(path.is_file()) or measure(*given))
    monkeypatch.setattr(adapt, "learn_colour", lambda *_: path.unlink())  # it is kept before, and again with its colour
    assert run(61, "--losses-only") == 0
    assert written == [False, True]  # whatever becomes of the figures after, the adapter is there
    out = capsys.readouterr().out
    assert "| loss, codebook 3 |" in out and "4 steps" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["before"].keys() == report["after"].keys() and report["before"] != report["after"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("peft", "other", None)
    assert "from 1.0 min\nof a recording with 2" in card.text and "steps: 4" in card.text.split("```yaml")[1]
    assert 'base = "model"  # its folder or Hub id' in card.text and "whose licence is not told" in card.text
    assert out.partition("\n| held part")[2].partition("\n4 steps")[0] in card.text
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "model" and str(tmp_path) not in card.content  # no path of this machine
    assert has_usual_mode([path])
    weights = load_file(path)
    assert weights and all("lora_" in name and ".codec." not in name for name in weights)
    assert {name.split("ar.model")[0] for name in weights if "ar.model" in name} and any(
        ".nar." in n or n.startswith("nar.") for n in weights
    )
    plain, adapted = AutoModel.from_pretrained(folder).eval(), AutoModel.from_pretrained(folder)
    adapted.load_adapter(str(tmp_path / "out"))
    adapted.eval()
    inputs = {"input_ids": torch.randint(0, 2048, (1, 20)), "prompt_lengths": torch.tensor([5])}
    with torch.no_grad():
        assert not torch.equal(plain.ar(**inputs).logits, adapted.ar(**inputs).logits)
    state = adapted.state_dict()
    for name, value in plain.state_dict().items():  # nothing of the base has moved
        place = (
            name
            if name in state
            else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        assert torch.equal(state[place], value), name


def test_a_card_tells_the_licence_and_the_hub_id_of_the_base(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\ntags: [piano]\n---\n# Base\n")
    text = adapter_card("mine", "owner/base", tmp_path, adapt.AdaptRecipe(), 90.0, 400, 240, "| no figures |")
    card = ModelCard(text)
    found = card.data.to_dict()
    assert (found["base_model"], found["license"], found["library_name"]) == ("owner/base", "cc-by-nc-sa-4.0", "peft")
    assert "from 1.5 min\nof a recording with 400 notes" in card.text and "Steps done: 240" in card.text
    assert "seed: 0" in card.text and "licence holds for them too: cc-by-nc-sa-4.0." in card.text
    assert adapter_card("mine", str(tmp_path), tmp_path, adapt.AdaptRecipe(), 90.0, 400, 240, "").count("owner/") == 0


class Falling(torch.nn.Module):
    """A loss of constant slope in one weight, beside another that rises by a share of it."""

    def __init__(self, share=0.0):
        super().__init__()
        self.weight, self.share, self.modes = torch.nn.Parameter(torch.zeros(())), share, set()

    def forward(self, batch, step, total):
        self.modes.add(self.training)
        return {"code": self.weight * batch["slope"], "latent": -self.share * self.weight * batch["slope"]}

    def measure(self, batch, stage):
        self.modes.add(self.training)
        return {"code": batch + stage, "top10": 0.5}


def test_learning_goes_by_the_recipe(monkeypatch):
    """As fast as it says at each step, however steep, on what was drawn for that step from before the end, as long as
    it may."""
    recipe, drawn = adapt.AdaptRecipe(steps=6, warmup_steps=2, learning_rate=0.01, seed=3), []

    class Drawing:
        slope = 1.0

        def draw(self, rng, recipe, end):
            drawn.append((int(rng.integers(2**31)), end))
            return {"slope": torch.tensor(self.slope * 10.0 ** (len(drawn) % 3))}

    losses = {"ar": Falling()}
    trained = list(losses["ar"].parameters())
    assert adapt.learn(losses, trained, Drawing(), recipe, 7.0) == 6
    rates = [0.01 * adapt.warmup_cosine(step, 2, 6, 0.05) for step in range(6)]
    assert losses["ar"].weight.item() == pytest.approx(-sum(rates), rel=1e-3) and rates[0] < rates[2] > rates[5]
    wanted = [int(np.random.default_rng([3, step]).integers(2**31)) for step in range(6)]
    assert drawn == [(number, 7.0) for number in wanted] and losses["ar"].modes == {True}
    rising = {"nar": Falling(share=0.5)}  # the latent counts more than the codes
    adapt.learn(rising, list(rising["nar"].parameters()), Drawing(), recipe, 7.0)
    assert rising["nar"].weight.item() == pytest.approx(sum(rates), rel=1e-3)
    recipe.max_minutes, clock = 1.0, iter(range(0, 600, 30))
    with monkeypatch.context() as patch:
        patch.setattr(adapt.time, "time", lambda: next(clock))
        assert adapt.learn(losses, trained, Drawing(), recipe, 7.0) == 2
    Drawing.slope = float("nan")
    with pytest.raises(adapt.AdaptError, match="step 0: the loss is nan; lower learning_rate"):
        adapt.learn(losses, trained, Drawing(), recipe, 7.0)
    recipe.max_minutes = -1.0  # over before it begins
    assert adapt.learn(losses, trained, Drawing(), recipe, 7.0) == 0


def test_figures_are_means_without_dropout():
    part = {name: Falling() for name in ("ar", "nar")}
    assert adapt.measure(part, [1.0, 2.0], 2) == {
        "loss, codebook 0": 1.5,
        "top-10 accuracy, codebook 0": 0.5,
        "loss, codebook 1": 2.5,
        "top-10 accuracy, codebook 1": 0.5,
    }
    assert part["ar"].modes == part["nar"].modes == {False}


def test_a_prompt_is_what_is_heard_just_before():
    notes = np.array([(1.5, 0.2, 50, 80), (2.5, 1.0, 60, 80), (5.0, 1.0, 64, 80)], NOTE_DTYPE)
    recording = Recording(np.arange(8 * RATE), notes, torch.zeros(4, 8 * 50), None, MidiValleTokenizer())
    prompt = adapt.prompt_of(recording, adapt.AdaptRecipe(prompt_seconds=(1.0, 2.0)), 4.0)
    assert np.array_equal(prompt.wave, np.arange(2 * RATE, 4 * RATE))
    assert prompt.notes["pitch"].tolist() == [60, 64] and prompt.notes["onset"].tolist() == [0.5, 3.0]


def test_what_the_colour_is_measured_on(monkeypatch):
    """The last minute and a half before what is held back, behind a prompt, if there are notes in it; of a model that
    plays as recorded."""
    model, played = SimpleNamespace(colour=None, config=SimpleNamespace(as_recorded=True)), []

    def play(model, processor, recording, recipe, begin, seconds):
        played.append((begin, seconds))
        raise ValueError("enough")

    monkeypatch.setattr(adapt, "played", play)
    recording = SimpleNamespace(notes=np.array([(4.0, 9.0, 50, 80), (150.0, 1.0, 60, 80)], NOTE_DTYPE))
    recipe = adapt.AdaptRecipe(prompt_seconds=(1.0, 6.0))
    for end in (200.0, 151.0):
        with pytest.raises(ValueError, match="enough"):
            adapt.learn_colour(model, None, recording, recipe, end)
    assert played == [(110.0, 90.0), (61.0, 90.0)]
    adapt.learn_colour(model, None, recording, recipe, 50.0)
    recording.notes["onset"] = 7.0
    with pytest.raises(ValueError, match="enough"):
        adapt.learn_colour(model, None, recording, recipe, 50.0)
    model.config.as_recorded = False
    adapt.learn_colour(model, None, recording, recipe, 50.0)
    assert played[2:] == [(6.0, 44.0)]


def test_what_is_held_back_is_heard_in_half_seconds():
    found = [adapt.held_seconds(SimpleNamespace(seconds=seconds), 10.0) for seconds in (20.74, 100.0)]
    assert found == [10.5, 36.0]


@pytest.mark.parametrize(("prompt", "share"), [(13.0, 0.2), (1.0, 0.1)])
def test_a_recording_with_no_room_for_a_target_is_refused(prompt, share, tmp_path):
    """Before what is held back, or in it."""
    codes = torch.zeros(4, 20 * 50, dtype=torch.long)
    recording = Recording(np.zeros(20 * RATE), np.zeros(0, NOTE_DTYPE), codes, codes, MidiValleTokenizer())
    recipe = adapt.AdaptRecipe(prompt_seconds=(1.0, prompt), target_seconds=3.5, held_share=share)
    with pytest.raises(adapt.AdaptError, match="the held part or the rest is shorter than a target: change held_share"):
        adapt.adapt(None, None, recording, recipe, None, False, tmp_path / "out", "base")


def test_an_adapter_begins_as_its_recipe_says(make_model):
    pytest.importorskip("peft", reason="make install-peft")
    model = make_model()
    adapt.add_adapter(model, adapt.AdaptRecipe(rank=3, alpha=7.0, dropout=0.25))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7.0, 0.25)
    first = [adapt.add_adapter(make_model(), adapt.AdaptRecipe(seed=seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize("part", ["ar", "nar"])
def test_only_the_recipes_part_learns(run, tmp_path, part):
    pytest.importorskip("peft", reason="make install-peft")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{recipe.read_text()}part: {part}\n")
    assert run(61, "--losses-only") == 0
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert weights and {"nar" if ".nar." in f".{name}" else "ar" for name in weights} == {part}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    moved = {int(name[-1]) for name, loss in report["before"].items() if report["after"][name] != loss}
    assert moved and moved <= ({0} if part == "ar" else {1, 2, 3})


def test_a_recording_that_cannot_be_used_is_refused(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:  # the recording is refused before peft has anything to do
        patch.setattr(adapt, "require_peft", lambda: None)
        assert run(5) == 2 and "lasts 5 s; give 60 to 600 s" in capsys.readouterr().err
    for name in ("ranks", "frame_steps"):
        (tmp_path / "recipe.yaml").write_text(RECIPE + f"{name}: 2\n")
        assert run(5) == 2 and f"unknown keys ['{name}']" in capsys.readouterr().err
    for line, message in (
        ("steps: -3", "steps must be at least 1, got -3"),
        ("steps: many", "steps: 'many' is not a whole number"),
        ("learning_rate: .inf", "learning_rate: inf is not finite"),
        ("alpha: 0", "alpha must be above 0"),
        ("own_share: 2", "own_share must be at most 1"),
        ("dropout: 1", "dropout must be below 1, got 1.0"),
        ("prompt_seconds: [6, 1]", "prompt_seconds must be the lower and the higher of two numbers"),
        ("prompt_seconds: 3", "prompt_seconds: 3 is not a list of two numbers"),
        ("target_seconds: 1.2", "prompt_seconds and target_seconds must be multiples of 0.5"),
        ("held_share: 1.5", "held_share must be between 0 and 1"),
        ("part: codec", "part must be one of ar, nar, both, got 'codec'"),
    ):
        name = line.partition(":")[0]
        kept = [other for other in RECIPE.splitlines() if not other.startswith(f"{name}:")]
        (tmp_path / "recipe.yaml").write_text("\n".join([*kept, line]))
        assert run(5) == 2 and f"recipe.yaml: {message}" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(adapt.importlib.util, "find_spec", lambda name: None)
    assert run(5) == 2 and "peft is not installed: run make install-peft" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_used_is_refused_before_anything_is_learned(
    run, folder, tmp_path, monkeypatch, capsys
):
    """Also one that is there: an adapter would be lost, or a model play the new one without being asked."""
    monkeypatch.setattr(adapt, "require_peft", lambda: None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    before = sorted(folder.iterdir())
    for name, sentence in (
        ("file", "is not a folder; give another --output-dir"),
        ("old", "exists already; choose another"),
        ("model", "exists already; choose another"),
        ("file/out", f"{tmp_path / 'file'} is not a folder; give another --output-dir"),
    ):
        assert run(5, "--output-dir", str(tmp_path / name)) == 2
        assert capsys.readouterr().err == f"error: --output-dir {tmp_path / name}: {sentence}\n"
    assert (tmp_path / "file").read_text() == "mine" and sorted(folder.iterdir()) == before
    (tmp_path / "out").mkdir()  # empty, it will do: the recording is what is wrong
    assert run(5) == 2 and "lasts 5 s" in capsys.readouterr().err and (tmp_path / "out").is_dir()
    assert run(5, "--output-dir", str(tmp_path / "a" / "b")) == 2 and not (tmp_path / "a").exists()


def test_prompts_that_leave_no_room_are_refused_before_anything_is_learned(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adapt, "require_peft", lambda: None)
    path = tmp_path / "long.yaml"
    path.write_text(RECIPE.replace("[0.5, 1.0]", "[0.5, 20.0]"))
    assert run(61, "--config", str(path)) == 2 and not (tmp_path / "out").exists()
    said = "prompt_seconds up to 20.0 and windows of 20.0 s do not fit into the 32 s of one sequence"
    assert f"error: {path}: {said}; lower prompt_seconds\n" == capsys.readouterr().err


def test_interrupted_before_there_is_an_adapter(run, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt, "require_peft", lambda: None)
    monkeypatch.setattr(adapt, "read_recording", interrupted)
    assert run(5) == 130 and capsys.readouterr().err == "interrupted; no adapter was written\n"
    assert not (tmp_path / "out").exists()


def test_interrupted_once_there_is_an_adapter(run, tmp_path, monkeypatch, capsys):
    """It may go to the Hub too: no path of this machine is in it."""
    pytest.importorskip("peft", reason="make install-peft")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt, "learn_colour", interrupted)
    assert run(61, "--losses-only") == 130
    said = f"interrupted; the adapter is in {tmp_path / 'out'}, without card and figures\n"
    assert capsys.readouterr().err.endswith(said)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model" and not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("seconds", [31.0, 62.31])
def test_chunks_have_the_codes_of_the_whole(make_model, seconds):
    """But for rounding, which may turn a code where two are as near; the LSTM's memory reaches no further back."""
    codec = make_model().codec
    wave = 0.1 * np.random.default_rng(1).standard_normal(round(seconds * RATE)).astype(np.float32)
    codes = encode(codec, wave)
    whole = codec.encode_codes(torch.from_numpy(wave[: len(wave) // 640 * 640])[None, None])[0]
    assert codes.shape == whole.shape == (4, len(wave) // 640)
    assert (codes == whole).float().mean() > 0.99


def test_targets_are_learned_as_they_were_played():
    """With their keys, in every chunk; prompts are as they are heard, when the piece is played too."""
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(num_filters=2, hidden_size=90, num_key_axes=88, num_lstm_layers=1))
    for layer in codec.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)
    wave = 0.1 * np.random.default_rng(1).standard_normal(35 * RATE).astype(np.float32)
    notes = np.array([(t / 4, 0.2, 40 + t % 30, 80) for t in range(139)], NOTE_DTYPE)
    heard, played = encode(codec.eval(), wave), encode(codec, wave, notes)
    struck = torch.from_numpy(onset_roll(notes, heard.shape[1]).astype(np.float32) / 127)[None]
    whole = codec.encode_codes(torch.from_numpy(wave)[None, None], struck=struck)[0]
    assert (played == whole).float().mean() > 0.99
    places = struck[0].any(1)
    assert (heard != played)[:, places].any(0).all() and (heard == played)[:, ~places].float().mean() > 0.99
    recording = Recording(wave, notes, heard, played, MidiValleTokenizer())
    codes = recording.batch([(3.0, 32.0)], 1.0, 2.0)["audio_codes"][0]
    assert torch.equal(codes, torch.cat([heard[:, 150:200], played[:, 1600:1700]], 1))
