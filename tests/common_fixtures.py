# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Tiny models built in memory, with weights of realistic scale: near-zero ones would hide wrong masks and scales."""

import copy
import csv
import os
import queue
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.tracking import GeneralTracker
from symusic import Note, Score, Track

from modeling_midivalle import (
    MidiValleARConfig,
    MidiValleARModel,
    MidiValleConfig,
    MidiValleForConditionalGeneration,
    MidiValleNARConfig,
    MidiValleNARModel,
    PianoEncodecConfig,
    PianoEncodecModel,
)
from scripts import unfinished
from scripts.models import model_folder, trained_parts

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Training runs in a test's own process draw no curves unless it is about them: that takes longer than their
    steps."""
    if "draws" not in request.keywords and (run_log := sys.modules.get("scripts.training.run_log")):
        monkeypatch.setattr(run_log.RunLog, "draw", lambda *_, **__: None)


@pytest.fixture(autouse=True, scope="session")
def loaded_once():
    """What `scripts` loads again, while none of its files has changed, is a copy: to make a codec takes longer than
    most tests work with it."""
    load, known = model_folder.load_weights, {}

    def load_or_copy(model_class, folder, **options):
        states = [(path.name, path.stat()) for path in sorted(Path(folder).iterdir()) if path.is_file()]
        files = tuple((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states)
        key = model_class, str(folder), files, tuple(sorted(options.items()))
        if key not in known:
            known[key] = load(model_class, folder, **options)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        for module in (model_folder, trained_parts):
            patch.setattr(module, "load_weights", load_or_copy)
        yield


PUBLISHED_TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}


def lively(model, seed=0):
    """Every weight plus N(0, 0.15): attention, norms and biases all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _decoder(config_class, model_class):
    def make(preset="tiny", seed=0, **overrides):
        torch.manual_seed(seed)
        if preset == "summary":
            preset, overrides = "tiny", {"prompt_summary_size": 8} | overrides
        fields = PUBLISHED_TINY | {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
        fields = overrides if preset == "tiny" else fields | overrides
        return lively(model_class(config_class.from_preset(preset, **fields)), seed)

    return make


@pytest.fixture
def make_ar():
    """`make_ar("tiny" | "summary" | "published", **overrides)` -> a tiny AR in eval mode."""
    return _decoder(MidiValleARConfig, MidiValleARModel)


@pytest.fixture
def make_nar():
    """`make_nar("tiny" | "summary" | "published", **overrides)` -> a tiny NAR in eval mode."""
    return _decoder(MidiValleNARConfig, MidiValleNARModel)


@pytest.fixture
def make_model():
    """`make_model("tiny" | "summary" | "keys" | "published")` -> a tiny codec + AR + NAR in eval mode, with filled
    codebooks; "keys": its codec is told by the MIDI which keys are struck."""

    def make(preset="tiny", seed=0):
        torch.manual_seed(seed)
        config = MidiValleConfig.from_preset("tiny")
        if preset == "summary":
            config.ar_config.prompt_summary_size = config.nar_config.prompt_summary_size = 8
        if preset == "keys":
            codec = {"num_filters": 2, "hidden_size": 100, "num_lstm_layers": 1, "num_key_axes": 88}
            config = MidiValleConfig.from_preset("tiny", codec)
            config.keys_from_midi = True
        if preset == "published":
            config = MidiValleConfig(
                codec_config=config.codec_config.to_dict(),
                ar_config=MidiValleARConfig.from_preset("published", **PUBLISHED_TINY).to_dict(),
                nar_config=MidiValleNARConfig.from_preset("published", **PUBLISHED_TINY).to_dict(),
                share_midi_embeddings=True,
            )
        model = MidiValleForConditionalGeneration(config)
        lively(model.ar, seed), lively(model.nar, seed + 1)
        for layer in model.codec.quantizer.layers:
            layer.codebook.embed.normal_(std=0.3)
        return model.eval()

    return make


@pytest.fixture
def make_rows():
    """`make_rows(seed, notes, seconds, held=0)` -> MIDI rows `(notes + held + 2, 6)`, by onset, with BOS and EOS."""

    def make(seed=0, notes=12, seconds=2.0, held=0):
        g = torch.Generator().manual_seed(seed)
        ticks = torch.randint(0, int(seconds * 192), (notes,), generator=g).sort().values
        ioi = ticks.diff(prepend=ticks[:1]).clamp(max=383) + 388
        age = 388 - torch.randint(1, 385, (held,), generator=g)
        ticks, ioi = torch.cat([torch.zeros(held, dtype=torch.long), ticks]), torch.cat([age, ioi])
        pitch, velocity = (
            torch.randint(4, 92, (held + notes,), generator=g),
            torch.randint(4, 68, (held + notes,), generator=g),
        )
        duration = torch.randint(10, 300, (held + notes,), generator=g)
        rows = torch.stack([pitch, velocity, duration, ioi, ticks % 384 + 4, ticks // 384 + 4], -1)
        return torch.cat([torch.full((1, 6), 1), rows, torch.full((1, 6), 2)])

    return make


@pytest.fixture
def make_batch(make_rows):
    """`make_batch(lengths, prompts)` -> right-padded `codes (B, 4, T)`, `mask`, `midi_ids`, `midi_mask`, `prompts`."""

    def make(lengths=(40, 33), prompts=(12, 7), seed=0):
        g = torch.Generator().manual_seed(seed)
        rows = [make_rows(seed + b, notes=10 + 3 * b, seconds=max(lengths) / 50, held=b) for b in range(len(lengths))]
        midi_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        midi_mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], True)
        lengths = torch.tensor(lengths)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        codes = torch.randint(0, 2048, (len(lengths), 4, mask.shape[1]), generator=g) * mask[:, None]
        return codes, mask, midi_ids, midi_mask, torch.tensor(prompts)

    return make


def _write_piano(folder, keys=(36, 48, 60, 72, 84), layers=((1, 127, -6.0),), seconds=2.0, decay=1.0):
    """A sampled piano of decaying sines, one a key and layer (lovel, hivel, recorded level in dB), all of peak 0.5.

    Layer i sounds i + 1 times the key's frequency, so that a spectrum tells which sample was chosen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, time = [], np.arange(round(seconds * 32_000)) / 32_000
    for i, (low, high, level) in enumerate(layers):
        for j, key in enumerate(keys):
            frequency = (i + 1) * 440 * 2 ** ((key - 69) / 12)
            wave = 0.5 * np.sin(2 * np.pi * frequency * time) * np.exp(-time / decay)
            soundfile.write(folder / f"{key:03d}_{high:03d}.wav", wave, 32_000, subtype="FLOAT")
            first = 0 if j == 0 else (keys[j - 1] + key) // 2 + 1
            last = 127 if j == len(keys) - 1 else (key + keys[j + 1]) // 2
            rows.append((f"{key:03d}_{high:03d}.wav", key, first, last, low, high, level, level, seconds))
    with open(folder / "index.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow("file key lokey hikey lovel hivel onset_db peak_db seconds".split())
        table.writerows(rows)
    return folder


def _write_midi(path, seed=0, seconds=6.0, density=8):
    """A MIDI file of random notes, `density` a second, some of them long."""
    rng = np.random.default_rng(seed)
    score = Score(480, ttype="second")
    track = Track(ttype="second")
    for onset in np.sort(rng.uniform(0, seconds, round(seconds * density))):
        duration = rng.uniform(0.1, 1.5)
        track.notes.append(Note(onset, duration, int(rng.integers(36, 85)), int(rng.integers(30, 120)), ttype="second"))
    score.tracks.append(track)
    score.to("tick").dump_midi(str(path))
    return path


@pytest.fixture
def run_python():
    """`run_python(folder, program, *arguments)` -> what it prints in a process of its own in `folder`, in which nothing
    of this repository can be imported."""

    def run(folder, program, *arguments):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture
def has_usual_mode(monkeypatch):
    """`has_usual_mode(files)` -> whether there are any, of the mode 0o640 of an umask that the test has."""
    monkeypatch.setattr(unfinished, "UMASK", 0o027)
    return lambda files: {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


@pytest.fixture(scope="session")
def write_piano():
    """`write_piano(folder, keys, layers, seconds, decay)` -> the folder of a sampled piano of sines."""
    return _write_piano


@pytest.fixture(scope="session")
def write_midi():
    """`write_midi(path, seed, seconds, density)` -> the path of a MIDI file of random notes."""
    return _write_midi


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory):
    """A folder with `midi/` (two files), `piano/` (sines) and `codec/` (tiny, filled codebooks)."""
    folder = tmp_path_factory.mktemp("pack")
    (folder / "midi").mkdir()
    for seed in range(2):
        _write_midi(folder / "midi" / f"{seed}.mid", seed)
    rows = [
        f"{i}.mid,{s},0,{i},unknown\n" for s in ("train", "validation", "test", "jazz-test", "other") for i in (0, 1)
    ]
    header = "path,split,duration_s,composition_id,licence\n"
    (folder / "midi" / "manifest.csv").write_text(header + "".join(rows))  # both are of any split
    _write_piano(folder / "piano")
    torch.manual_seed(0)
    codec = PianoEncodecModel(PianoEncodecConfig(num_filters=2, hidden_size=16, num_lstm_layers=1))
    sound, _ = soundfile.read(folder / "piano" / "060_127.wav", dtype="float32")
    with torch.no_grad():
        latent = codec.encoder(torch.from_numpy(sound)[None, None])[0].T
    for k, layer in enumerate(codec.quantizer.layers):  # codes as varied as the sound is
        deviation = latent.std(0) * 0.5**k
        layer.codebook.embed.copy_(latent.mean(0) * (k == 0) + deviation * torch.randn_like(layer.codebook.embed))
    codec.save_pretrained(folder / "codec")
    return folder


def _prepare_arguments(pack, output, *more):
    """Command line of `scripts.prepare_dataset` for items of 1 s after 1 s, three to a shard."""
    arguments = ["--codec", str(pack / "codec"), "--room", "dry_close", "--room", "studio", "--shard-items", "3"]
    arguments += ["--prompt-seconds", "1", "--target-seconds", "1", "--items", "8"]
    return [*arguments, "--output-dir", str(output), *map(str, more)]


def _prepare_here(arguments):
    """What a process of `scripts.prepare_dataset` does, in this one: a new one takes seconds to import torch."""
    from scripts import prepare_dataset

    args, shards, done = prepare_dataset.parse(arguments), queue.Queue(), queue.Queue()
    count = -(-args.items // args.shard_items)
    for shard in [*range(count), None]:
        shards.put(shard)
    data = prepare_dataset.data_arguments(args)
    prepare_dataset._work(args, data, prepare_dataset._recordings(args, data), shards, done)
    results = [done.get_nowait() for _ in range(count)]
    assert not [result for result in results if isinstance(result, Exception)]
    prepare_dataset.finish(Path(args.output_dir), [])
    return results


@pytest.fixture(scope="session")
def prepare_here(tiny_pack):
    """`prepare_here(output, ...)` -> (items made, skipped) of each shard; with the codec of `tiny_pack`."""

    def prepare(output, *more):
        output.mkdir(exist_ok=True)
        return _prepare_here(_prepare_arguments(tiny_pack, output, *more))

    return prepare


@pytest.fixture(scope="session")
def prepare_command(tiny_pack):
    """`prepare_command(output, ...)` -> exit code of `scripts.prepare_dataset`; its processes take seconds each."""
    from scripts import prepare_dataset

    source = ["--midi-root", str(tiny_pack / "midi"), "--piano", str(tiny_pack / "piano")]
    return lambda output, *more: prepare_dataset.main(_prepare_arguments(tiny_pack, output, *source, *more))


@pytest.fixture
def interrupted_pool(monkeypatch):
    """`with interrupted_pool():` a pool of `scripts.codec.pool_files` is interrupted behind its first items."""
    from scripts.codec.pool_files import PoolFiles

    advance = PoolFiles.advance

    def stop(self, done):
        if self.done:
            raise KeyboardInterrupt
        advance(self, done)

    @contextmanager
    def interrupted():
        with monkeypatch.context() as patch:
            patch.setattr(PoolFiles, "advance", stop)
            yield

    return interrupted


@pytest.fixture(scope="session")
def tiny_data(tiny_pack, tmp_path_factory):
    """Shards of `scripts.prepare_dataset` of `tiny_pack`: 8 training and 2 validation items of 1 s after 1 s."""
    folder = tmp_path_factory.mktemp("data")
    source = ["--midi-root", str(tiny_pack / "midi"), "--piano", str(tiny_pack / "piano")]
    for split, items in (("train", "8"), ("validation", "2")):
        _prepare_here(_prepare_arguments(tiny_pack, folder, *source, "--split", split, "--items", items))
    return folder


class Tracker(GeneralTracker):
    """Keeps what a tensorboard writer would be given."""

    name, requires_logging_directory = "tensorboard", False

    def __init__(self):
        super().__init__(_blank=True)
        self.tracker, self.shown = self, {}

    def store_init_configuration(self, values):
        """Nothing."""

    def log(self, values, step, **_):
        """Nothing."""

    def add_audio(self, name, wave, step, rate):
        self.shown[name, step] = wave, rate

    def add_image(self, name, picture, step, dataformats):
        self.shown[name, step] = picture


@pytest.fixture(scope="module")
def tracker():
    """A `Tracker`; what it is given is in `shown`, by name and step."""
    return Tracker()
