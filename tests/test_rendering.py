# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Pianos, rooms and excerpts: the right sample, pitch, level and release; the same sound wherever an excerpt starts."""

import csv
import dataclasses
import os
import sys
import tarfile

import numpy as np
import pytest
import soundfile
from scipy.signal import butter, sosfiltfilt

from scripts.audio import pianos
from scripts.audio.pianos import SampledPiano, SoundFontPiano, SourceError, load_piano, performance_level, velocity_gain
from scripts.audio.rendered_audio import RenderedExcerpts, list_midi, render
from scripts.audio.rooms import LARGEST, ROOMS, SMALLEST, TARGET_RMS_DBFS, Room, without_clipping
from tokenization import NOTE_DTYPE, MidiError

RATE = 32_000
LAYERS = ((1, 50, -20.0), (51, 90, -12.0), (91, 127, -4.0))


def notes(*rows):
    """Rows of (onset s, duration s, pitch, velocity)."""
    return np.array(list(rows), NOTE_DTYPE)


def frequency(wave):
    """Of the strongest partial, Hz, to 1 Hz."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), RATE))
    return int(spectrum.argmax())


def level_db(wave):
    return 20 * np.log10(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


@pytest.fixture(scope="module")
def piano(write_piano, tmp_path_factory):
    """Five keys in three layers; four seconds that hardly decay."""
    return SampledPiano(write_piano(tmp_path_factory.mktemp("grand"), layers=LAYERS, seconds=4.0, decay=100.0))


@pytest.mark.parametrize(
    ("pitch", "velocity", "expected"),
    [
        (60, 30, 261.63),  # the soft layer sounds the key itself
        (60, 51, 2 * 261.63),
        (60, 91, 3 * 261.63),
        (62, 30, 293.66),  # two semitones above the sample of 60
        (69, 30, 440.0),  # three below the sample of 72
        (30, 30, 46.25),  # below the lowest sample
    ],
)
def test_the_right_sample_is_picked_and_shifted(piano, pitch, velocity, expected):
    wave = piano(notes((0.0, 1.0, pitch, velocity)), 1.0)
    assert abs(frequency(wave) - expected) <= 1.0


def test_one_velocity_law_for_all_layers(piano):
    """The recorded level of a layer does not show; only `42 log10(velocity / 127)` dB does."""
    loud = level_db(piano(notes((0.0, 1.0, 60, 127)), 1.0))
    assert loud == pytest.approx(level_db(0.5 * np.sin(np.arange(RATE) / 10)), abs=0.1)
    for velocity in (100, 80, 40, 10):
        expected = loud + 42 * np.log10(velocity / 127)
        assert level_db(piano(notes((0.0, 1.0, 60, velocity)), 1.0)) == pytest.approx(expected, abs=0.1)
    assert velocity_gain(np.array([127]))[0] == 1.0


def test_levels_of_samples_within_a_layer_are_kept(write_piano, tmp_path):
    """A key recorded 6 dB softer than its layer's middle sounds 6 dB softer."""
    folder = write_piano(tmp_path / "p", keys=(48, 72), layers=LAYERS, decay=100.0)
    with open(folder / "index.csv", newline="") as f:
        rows = list(csv.reader(f))
    for row in rows[1:]:
        if row[1] == "48":
            row[6], row[7] = (str(float(value) - 6) for value in row[6:8])
    with open(folder / "index.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)
    piano = SampledPiano(folder)
    low, high = (level_db(piano(notes((0.0, 1.0, pitch, 127)), 1.0)) for pitch in (48, 72))
    assert high - low == pytest.approx(6.0, abs=0.1)


@pytest.mark.parametrize(("pitch", "tau"), [(48, 0.25), (60, 0.18), (84, 0.12)])
def test_release(pitch, tau, piano):
    """After key-up the sound falls by e in 180 ms at key 60, sooner above and later below; keys without dampers go
    on."""
    wave = piano(notes((0.0, 0.5, pitch, 30)), 2.0)
    before, after = wave[round(0.4 * RATE) : round(0.5 * RATE)], wave[round((0.48 + tau) * RATE) :][: RATE // 25]
    assert level_db(after) - level_db(before) == pytest.approx(-20 * np.log10(np.e), abs=0.5)
    assert not wave[round((0.5 + 5 * tau) * RATE) + 1 :].any()
    top = piano(notes((0.0, 0.1, 96, 30)), 2.0)
    assert level_db(top[RATE : RATE + 3200]) == pytest.approx(level_db(top[3200:6400]), abs=0.2)


def test_notes_add_up_and_begin_on_their_sample(piano):
    both = piano(notes((0.25, 0.5, 60, 60), (0.5, 0.5, 64, 100)), 1.5)
    alone = [piano(notes(row), 1.5) for row in ((0.25, 0.5, 60, 60), (0.5, 0.5, 64, 100))]
    assert np.allclose(both, alone[0] + alone[1], atol=1e-6)
    assert not both[: RATE // 4].any() and both[RATE // 4 + 1] != 0


def test_few_layers_are_darker_when_soft(write_piano, tmp_path):
    """With one layer the brightness of loud and soft is a low-pass: a high key loses more when it is soft."""
    single = SampledPiano(write_piano(tmp_path / "p", keys=(60, 96), decay=100.0))

    def lost(pitch):
        soft, loud = (level_db(single(notes((0.0, 1.0, pitch, velocity)), 1.0)) for velocity in (20, 127))
        return loud - soft

    assert lost(96) > lost(60) + 1


def test_an_excerpt_is_a_slice_of_the_whole(piano):
    """Dry, sample by sample: notes that began before the excerpt sound on as they would have."""
    piece = notes((0.0, 2.5, 48, 40), (0.5, 0.25, 60, 80), (1.0, 1.0, 64, 100), (2.0, 0.5, 72, 20))
    whole = piano(piece, 3.0)
    for start in (0.5, 1.25):
        part = piece.copy()
        part["onset"] -= start
        assert np.array_equal(piano(part, 3.0 - start), whole[round(start * RATE) :])


def test_an_excerpt_in_a_room_is_a_slice_of_the_whole(write_piano, tmp_path):
    folder, room = write_piano(tmp_path / "p"), Room("dry_close", 3)
    rng = np.random.default_rng(0)
    rows = [(t, rng.uniform(0.1, 0.8), rng.integers(40, 80), rng.integers(40, 90)) for t in np.arange(0, 8, 0.2)]
    piece = notes(*rows)
    whole = render(piece, 0.0, 8.0, folder, room, np.random.default_rng(1))
    part = render(piece, 4.0, 2.0, folder, room, np.random.default_rng(2))
    assert len(part) == 2 * RATE and level_db(part) > -40
    difference = part - whole[4 * RATE : 6 * RATE]
    assert level_db(difference) < ROOMS["dry_close"].noise_dbfs + 4  # two independent noises, nothing else


def test_folder_and_tar_are_the_same_piano(write_piano, tmp_path):
    folder = write_piano(tmp_path / "upright")
    with tarfile.open(tmp_path / "upright.tar", "w") as tar:
        tar.add(folder, "upright")
    piece = notes((0.0, 0.5, 60, 80))
    first, second = (load_piano(str(tmp_path / name)) for name in ("upright", "upright.tar"))
    assert first.name == second.name == "upright"
    assert np.array_equal(first(piece, 1.0), second(piece, 1.0))


def test_unusable_pianos(write_piano, tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="neither a piano folder nor a tar file"):
        SampledPiano(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no index.csv"):
        SampledPiano(tmp_path / "empty")
    folder = write_piano(tmp_path / "p")
    (folder / "index.csv").write_text((folder / "index.csv").read_text().splitlines()[0])
    with pytest.raises(SourceError, match="lists no sample"):
        SampledPiano(folder)
    with pytest.raises(SourceError, match="no such SoundFont"):
        load_piano(str(tmp_path / "none.sf2"))
    (tmp_path / "font.sf2").write_bytes(b"RIFF")
    monkeypatch.setattr(pianos.shutil, "which", lambda name: None)
    (tmp_path / "FONT.SF2").write_bytes(b"RIFF")
    for font in ("font.sf2:3", "FONT.SF2"):
        with pytest.raises(SourceError, match="need the fluidsynth program"):
            load_piano(str(tmp_path / font))
    with pytest.raises(SourceError, match="font.sf2:x: the program behind the colon must be 0 to 127"):
        load_piano(str(tmp_path / "font.sf2:x"))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("index.csv", b"onset_db", b"onset", "index.csv: expected a table .*onset_db, peak_db \\('onset_db'"),
        ("index.csv", b"-6.0", b"soft", "index.csv: expected a table .*'soft'"),
        ("index.csv", b"-6.0", b"nan", "index.csv: expected a table .*a level of 036_127.wav is not finite"),
        ("index.csv", b"file,", b"\xff,", "index.csv: expected a table .*'utf-8'"),
        ("index.csv", b"060_127.wav", b"c4.wav", "holds no c4.wav, which index.csv lists"),
        ("060_127.wav", b"RIFF", b"RIFX?", "060_127.wav cannot be read \\("),
    ],
)
def test_damaged_pianos(file, old, new, message, write_piano, tmp_path):
    """Whatever is wrong with a piano is one sentence that names it."""
    path = write_piano(tmp_path / "p", seconds=0.1) / file
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(SourceError, match=f"^{tmp_path}/p: {message}"):
        SampledPiano(tmp_path / "p")(notes((0.0, 0.1, 60, 80)), 0.1)


@pytest.mark.parametrize("sound", [np.zeros((9, 2)), np.zeros(0), np.full(9, np.nan)])
def test_sounds_that_are_none(sound, write_piano, tmp_path):
    piano = write_piano(tmp_path / "p", seconds=0.1)
    soundfile.write(piano / "060_127.wav", sound, RATE, "FLOAT")
    with pytest.raises(SourceError, match="/p: 060_127.wav must be mono, not empty, and of finite"):
        SampledPiano(piano)(notes((0.0, 0.1, 60, 80)), 0.1)


def test_a_piano_that_is_cut_short_and_one_of_a_spreadsheet(write_piano, tmp_path):
    folder = write_piano(tmp_path / "p", seconds=0.1)
    (folder / "index.csv").write_text((folder / "index.csv").read_text(), encoding="utf-8-sig")
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(folder, "p")
    assert SampledPiano(tmp_path / "p.tar").rows
    (tmp_path / "p.tar").write_bytes((tmp_path / "p.tar").read_bytes()[:40_000])
    with pytest.raises(SourceError, match="p.tar: cannot be read .*; copy or download it again"):
        SampledPiano(tmp_path / "p.tar")


FLUIDSYNTH = """#!{python}
import sys
import numpy as np, soundfile
from symusic import Score

score = Score(sys.argv[-1], ttype="second")
wave = np.zeros(32_000 * 9, dtype=np.float32)
for note in score.tracks[0].notes:
    time = np.arange(round(note.duration * 32_000)) / 32_000
    first = round(note.time * 32_000)
    tone = np.sin(2 * np.pi * 440 * 2 ** ((note.pitch - 69) / 12) * time) * (note.velocity / 127) ** 2
    wave[first : first + len(tone)] += 0.01 * (1 + score.tracks[0].program) * tone
soundfile.write(sys.argv[sys.argv.index("-F") + 1], wave, 32_000, subtype="FLOAT", format="WAV")
"""


@pytest.fixture
def font(tmp_path, monkeypatch):
    """A SoundFont file, and a `fluidsynth` that plays sines, far softer than sampled pianos."""
    program = tmp_path / "bin" / "fluidsynth"
    program.parent.mkdir()
    program.write_text(FLUIDSYNTH.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    (tmp_path / "Font.sf2").write_bytes(b"RIFF")
    return tmp_path / "Font.sf2"


def test_a_soundfont_plays_at_the_level_of_sampled_pianos(font):
    played = notes((0.5, 0.4, 69, 64), (1.0, 0.4, 60, 64), (1.5, 0.4, 48, 64))
    first, third = SoundFontPiano(font), load_piano(f"{font}:3")
    assert (first.name, third.name) == ("font", "font_3")
    wave = first(played, 2.0)
    assert wave.shape == (64_000,) and wave.dtype == np.float32 and not wave[:15_900].any()
    assert frequency(wave[16_000:28_000]) == 440 and frequency(wave[48_000:60_000]) == 131
    assert np.allclose(third(played, 2.0), wave, atol=1e-3)  # the program is four times as loud
    expected = 20 * np.log10(performance_level(played))
    assert abs(level_db(wave[16_000:62_000]) - expected) < 3


def test_a_soundfont_that_cannot_be_read_is_not_replaced_by_the_default_one(font, tmp_path):
    soundfile.write(tmp_path / "default.wav", np.ones(9), 32_000)
    words = f"while [ $1 != -F ]; do shift; done; cp {tmp_path}/default.wav $2; echo Failed to load the SoundFont >&2"
    (tmp_path / "bin" / "fluidsynth").write_text(f"#!/bin/sh\n{words}\n")
    with pytest.raises(SourceError, match="Font.sf2: fluidsynth failed: Failed to load the SoundFont"):
        SoundFontPiano(font)(notes((0.0, 1.0, 60, 64)), 1.0)


def test_a_soundfont_begins_with_what_already_sounds(font):
    played = notes((-0.5, 1.5, 69, 64))
    cut, whole = SoundFontPiano(font)(played, 1.0), SoundFontPiano(font)(notes((0.0, 1.5, 69, 64)), 1.5)
    assert np.allclose(cut, whole[16_000:], atol=1e-4)


# --- rooms


def test_rooms_are_seeded():
    first, again, other = Room("studio", 1), Room("studio", 1), Room("studio", 2)
    assert np.array_equal(first.response, again.response) and first.gain_db == again.gain_db
    assert not np.array_equal(first.response[:5000], other.response[:5000])
    assert Room("studio", 1, jitter=0.0).rt60 == ROOMS["studio"].rt60
    dry = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    waves = [room(dry, 1.0, np.random.default_rng(5)) for room in (first, again)]
    assert np.array_equal(*waves) and waves[0].dtype == np.float32 and len(waves[0]) == RATE
    with pytest.raises(ValueError, match="unknown room 'cellar'"):
        Room("cellar", 0)


def test_any_room_is_another_one_with_every_seed():
    rooms = [Room("any", seed) for seed in range(40)]
    assert np.array_equal(rooms[3].response, Room("any", 3).response)
    assert len({room.spec for room in rooms}) == 40
    for name, least in dataclasses.asdict(SMALLEST).items():
        drawn, most = [getattr(room.spec, name) for room in rooms], getattr(LARGEST, name)
        assert least <= min(drawn) and max(drawn) <= most and max(drawn) - min(drawn) > 0.7 * (most - least)
        assert all(least <= getattr(room, name) <= most for room in ROOMS.values())


@pytest.mark.parametrize("name", ["dry_close", "concert_hall"])
def test_the_level_of_a_recording(name):
    """A performance of level L comes out near -23 dBFS whatever L is; peaks never clip."""
    room, dry = Room(name, 0, jitter=0.0), 0.1 * np.random.default_rng(0).standard_normal(2 * RATE)
    wave = room(dry, 0.1, np.random.default_rng(0))
    assert level_db(wave[RATE:]) == pytest.approx(TARGET_RMS_DBFS, abs=4)
    tenfold = room(10 * dry, 1.0, np.random.default_rng(0))
    assert np.allclose(wave, tenfold, atol=1e-5)
    assert np.abs(room(dry, 1e-3, np.random.default_rng(0))).max() == pytest.approx(0.97, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "hertz", "expected"),
    [
        ({"low_shelf_db": 6.0}, 40, 6),
        ({"high_shelf_db": -6.0}, 14_000, -6),
        ({"high_pass_hz": 160}, 160, -3),
        ({"low_pass_hz": 9_000}, 9_000, -3),
    ],
)
def test_the_tone_of_a_room(change, hertz, expected, monkeypatch):
    """Beside that of the same room without; at 1 kHz there is hardly a difference."""
    plain = Room("studio", 0, jitter=0.0)
    monkeypatch.setitem(ROOMS, "studio", dataclasses.replace(ROOMS["studio"], **change))
    other = Room("studio", 0, jitter=0.0)
    found = [np.abs(np.fft.rfft(room.response, RATE * 2))[[2 * hertz, 2000]] for room in (plain, other)]
    assert 20 * np.log10(found[1] / found[0]) == pytest.approx([expected, 0], abs=0.5)


def test_a_wet_room(monkeypatch):
    """What rings is by so much louder, beside the direct sound, as `wet_db` is higher."""
    found = []
    for wet_db in (-20, -8):
        monkeypatch.setitem(ROOMS, "studio", dataclasses.replace(ROOMS["studio"], wet_db=wet_db))
        energy = np.square(Room("studio", 0, jitter=0.0).response, dtype=np.float64)
        found.append(10 * np.log10([energy[64:1120].sum(), energy[1600:].sum()] / energy[:48].sum()))
    assert found[1] - found[0] == pytest.approx([12, 12], abs=1.5)


def test_one_gain_for_what_is_of_one_recording():
    """The loudest wave decides it, wherever it stands; and none is turned up."""
    loud, soft = np.array([0.0, -1.94]), np.array([0.5, 0.2])
    for waves in ((loud, soft), (soft, loud)):
        for wave, limited in zip(waves, without_clipping(*waves), strict=True):
            assert limited == pytest.approx(wave / 2)
    assert without_clipping(soft)[0] == pytest.approx(soft)


def test_rooms_ring_as_long_as_they_say():
    """Energy left after the direct sound falls by 60 dB in about rt60."""
    long, short = Room("concert_hall", 0, jitter=0.0), Room("dry_close", 0, jitter=0.0)
    energy = [np.cumsum(room.response[::-1].astype(np.float64) ** 2)[::-1] for room in (long, short)]
    half = [10 * np.log10(e[round(0.5 * s * RATE)] / e[800]) for e, s in zip(energy, (2.1, 0.25), strict=True)]
    assert all(-45 < decay < -20 for decay in half)  # -30 dB after half of rt60, faster where the treble dies first
    silence = long(np.zeros(RATE, np.float32), 1.0, np.random.default_rng(0))
    assert level_db(silence) == pytest.approx(ROOMS["concert_hall"].noise_dbfs, abs=0.1)


def test_the_treble_of_a_room_dies_first():
    """Time to fall by 60 dB, from the 20 dB below the first 5: around 1 kHz rt60, above 6 kHz `high_decay` of that."""
    room, spec = Room("studio", 0, jitter=0.0), ROOMS["studio"]
    found = []
    for band in ((700, 1400), (7000, 12_000)):
        wave = sosfiltfilt(butter(4, band, "bandpass", fs=RATE, output="sos"), room.response[800:].astype(np.float64))
        left = np.cumsum(wave[::-1] ** 2)[::-1]
        found.append(3 * np.diff([(left > left[0] * 10 ** (db / 10)).sum() for db in (-5, -25)])[0] / RATE)
    assert found[0] == pytest.approx(spec.rt60, rel=0.1)
    assert found[1] == pytest.approx(spec.high_decay * spec.rt60, rel=0.1)


def test_performance_level_grows_with_notes_and_velocity():
    """And knows no silence before the music, nor how long a string is held that has died away."""
    one, louder = notes((0.0, 1.0, 60, 60)), notes((0.0, 1.0, 60, 120))
    assert performance_level(notes((50.0, 1.0, 60, 60))) == performance_level(one)
    held = performance_level(notes((0.0, 5.0, 60, 60), (0.0, 10.0, 64, 60)))
    assert held == pytest.approx(performance_level(notes((0.0, 10.0, 60, 60), (0.0, 10.0, 64, 60))))
    assert performance_level(louder) / performance_level(one) == pytest.approx(2 ** (42 / 20), rel=1e-6)
    chord = notes((0.0, 1.0, 60, 60), (0.0, 1.0, 64, 60))
    assert performance_level(chord) / performance_level(one) == pytest.approx(np.sqrt(2))
    assert performance_level(notes()) == 1.0


# --- streams


def test_the_same_number_gives_the_same_audio(tiny_pack):
    def excerpt(seed, index):
        return RenderedExcerpts(tiny_pack / "midi", "train", [tiny_pack / "piano"], ["studio"], 1.0, seed)[index]

    first, again = excerpt(4, 7), excerpt(4, 7)
    assert np.array_equal(first["wave"], again["wave"]) and np.array_equal(first["onsets"], again["onsets"])
    assert first["wave"].shape == (32_000,) and first["onsets"].shape == (50, 88) and first["onsets"].any()
    assert not any(np.array_equal(first["wave"], excerpt(*other)["wave"]) for other in ((4, 8), (5, 7)))


def test_a_midi_pack_is_read_from_its_archives(write_midi, tmp_path):
    """A manifest beside `SOURCE.tar.xz`: only its split, and the notes that the file itself has."""
    (tmp_path / "own").mkdir()
    for seed in range(2):
        write_midi(tmp_path / "own" / f"{seed}.mid", seed)
    plain = list_midi(tmp_path / "own", "train", hold_out=False)
    assert [file.path for file in plain] == ["0.mid", "1.mid"]
    held = [file for split in ("train", "validation") for file in list_midi(tmp_path / "own", split)]
    assert len(held) == 2 and {file.path for file in held} == {"0.mid", "1.mid"}
    with pytest.raises(MidiError, match="of 2 MIDI files none is for 'test'; add a manifest.csv"):
        list_midi(tmp_path / "own", "test")
    expected = plain[1].load(tmp_path / "own").notes
    with tarfile.open(tmp_path / "own.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "own", "own")
    header = "path,split,duration_s,composition_id,licence\n"
    rows = "own/0.mid,train,6,a,CC0\nown/1.mid,test,6,b,CC0\n"
    (tmp_path / "manifest.csv").write_text(header + rows)
    for file in (tmp_path / "own").iterdir():
        file.unlink()
    found = list_midi(tmp_path, "test")
    assert [(f.path, f.archive, f.composition_id) for f in found] == [("own/1.mid", "own.tar.xz", "b")]
    assert np.array_equal(found[0].load(tmp_path).notes, expected)
    with pytest.raises(MidiError, match="no MIDI file of split 'validation'"):
        list_midi(tmp_path, "validation")
    with pytest.raises(MidiError, match="none: no such folder; give one of MIDI files"):
        list_midi(tmp_path / "none", "train")
    (tmp_path / "manifest.csv").write_text(header + rows, encoding="utf-8-sig")  # as spreadsheets save it
    assert list_midi(tmp_path, "test") == found
    with pytest.raises(SourceError, match="own.tar.xz: own/2.mid cannot be read from it"):
        dataclasses.replace(found[0], path="own/2.mid").load(tmp_path)
    (tmp_path / "other.tar.xz").write_bytes(b"")
    with pytest.raises(SourceError, match="other.tar.xz: own/1.mid cannot be read from it"):
        dataclasses.replace(found[0], archive="other.tar.xz").load(tmp_path)
    for text in ("path;split\na;test\n", header + "own/1.mid,test,long,b,CC0\n", header + "own/1.mid,test,nan,b,CC0\n"):
        (tmp_path / "manifest.csv").write_text(text)
        with pytest.raises(MidiError, match="manifest.csv: expected a table with the columns path, split"):
            list_midi(tmp_path, "test")
