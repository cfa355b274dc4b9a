# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Tables of corpora: whose columns are whose, which row is of which split, and the audio of a stretch."""

import csv
import itertools
import re

import numpy as np
import pytest
import soundfile
import soxr

from processing.prompts_midivalle import check_level
from scripts.dataset import paired_recordings
from scripts.dataset.folder import midi_bytes
from scripts.dataset.paired_recordings import PairedRecordings, read_pairs, read_stretch
from scripts.dataset.recordings import DataArguments, relative_notes
from tokenization import NOTE_DTYPE, MidiError, load_performance

MAESTRO = "canonical_composer,canonical_title,split,year,midi_filename,audio_filename,duration"
ATEPP = "artist,artist_id,track,track_duration,composer,composition_id,score_path,midi_path,youtube_links,quality"
ATEPP += ",perf_id,album,album_date,repetition"
PIJAMA = "id,artist,album,title,recording_condition,midi_filepath,mp3_filepath,youtube_url,duration_sec"
PIJAMA += ",performance_start_sec,performance_end_sec,split,acoust_id"
PIJAMA_TIMES = "midi_filepath,mp3_filepath,title,duration_sec,performance_start_sec,performance_end_sec"


def write_table(path, header, *rows):
    columns = header.split(",")
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, columns, restval="")
        table.writeheader()
        table.writerows(rows)
    return path


def test_maestro(tmp_path):
    """A folder is known by its table; the split is the corpus' own."""
    rows = [{"split": s, "midi_filename": f"{s}.midi", "audio_filename": f"{s}.wav", "duration": "100.5"} for s in "ab"]
    write_table(tmp_path / "maestro-v3.0.0.csv", MAESTRO, *rows)
    base, (pair,), excluded = read_pairs(tmp_path, "b")
    assert (base, pair.audio, pair.midi, pair.seconds, excluded) == (tmp_path, "b.wav", "b.midi", 100.5, [])
    assert pair.licence == "CC BY-NC-SA 4.0" and pair.recording_id == "b.wav"
    with pytest.raises(MidiError, match="no usable row of split 'test'; it has a, b$"):
        read_pairs(tmp_path, "test")


def test_atepp(tmp_path):
    """Audio lies beside the MIDI; bad recordings are excluded with the corpus' word; a composition is of one split."""
    rows = [
        {"composition_id": i // 2, "midi_path": f"x/{i:05d}.mid", "track_duration": "60", "quality": quality}
        for i, quality in enumerate(["", "high quality", "applause", "low quality; corrupted"] * 50)
    ]
    table = write_table(tmp_path / "ATEPP-metadata-1.2.csv", ATEPP, *rows)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "00001.flac").touch()
    _, pairs, excluded = read_pairs(table)
    assert len(pairs) == len(excluded) == 100 and [p.audio for p in pairs[:2]] == ["x/00000.wav", "x/00001.flac"]
    assert excluded[0] == {"source": "x/00002.mid", "reason": "ATEPP says applause"}
    splits = {s: {int(p.midi[2:7]) // 2 for p in read_pairs(table, s)[1]} for s in ("train", "validation", "test")}
    assert sum(len(found) for found in splits.values()) == len(set.union(*splits.values())) == 50
    assert len(splits["train"]) > 35
    earlier = write_table(
        tmp_path / "ATEPP-1.csv",
        ATEPP.replace("quality", "notes"),
        *[
            {"composition_id": "1", "midi_path": "a.mid", "track_duration": "60", "notes": word}
            for word in ("", "low quality")
        ],
    )
    assert len(read_pairs(earlier)[1]) == len(read_pairs(earlier)[2]) == 1


def test_pijama(tmp_path, write_midi):
    """Windows lie inside the performance; speech and applause around it are not used."""
    row = {"split": "train", "midi_filepath": "a.midi", "mp3_filepath": "a.wav", "duration_sec": "9"}
    row |= {"performance_start_sec": "3", "performance_end_sec": "6.5"}
    write_table(tmp_path / "pijama.csv", PIJAMA, row)
    write_midi(tmp_path / "a.midi", seconds=9.0)
    soundfile.write(tmp_path / "a.wav", np.zeros(9 * 32_000), 32_000)
    recordings = PairedRecordings(tmp_path, 0, "train")
    for index in range(10):
        prompt, target, _ = recordings.draw(index, DataArguments("train", 1.0, 2.0, 0, False, 1.0))
        assert target.seconds in (1.0, 1.5, 2.0) and len(target.wave) == round((target.seconds + 1.5) * 32_000)
        for window in (prompt, target):
            assert 3 <= window.start and window.start + window.seconds <= 6.5
        assert prompt.start + 1 <= target.start + 1e-9 or target.start + target.seconds <= prompt.start + 1e-9
    write_table(tmp_path / "pijama.csv", PIJAMA, row, row | {"split": "val"}, row | {"duration_sec": "inf"})
    with pytest.raises(MidiError, match=r"row \d is cut short, or its times make no sense .*inf"):
        read_pairs(tmp_path, "train")
    write_table(tmp_path / "pijama.csv", PIJAMA, row, row | {"split": "val"})
    assert [len(read_pairs(tmp_path, split)[1]) for split in ("train", "validation", "val")] == [1, 1, 1]


@pytest.mark.parametrize(("lengths", "least", "most"), [("19", 42, 58), ("11", 20, 40), ("1", 20, 40)])
def test_a_recording_is_drawn_by_its_length(lengths, least, most, tmp_path, write_midi):
    """As the table tells it; if it does not, for one of them at least, as often as any other."""
    rows = [{"split": "train", "midi_filename": "a.mid", "audio_filename": f"{i}.wav"} for i in range(2)]
    rows = [row | {"duration": seconds} for row, seconds in itertools.zip_longest(rows, lengths, fillvalue="0")]
    write_table(tmp_path / "maestro-v3.0.0.csv", MAESTRO, *rows)
    write_midi(tmp_path / "a.mid", seconds=3.0)
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(3 * 32_000), 32_000)
    recordings = PairedRecordings(tmp_path, 0, "train")
    drawn = [recordings.draw(i, DataArguments("train", 0.5, 0.5, 0, False))[2]["recording_id"] for i in range(60)]
    assert least < drawn.count("1.wav") < most


def test_nothing_that_is_learned_validates(tmp_path, write_midi):
    """Without a column split each recording is of one split, all of its rows, and a few are held out of a few."""
    rows = [{"audio": f"{i}.wav", "midi": f"{i}.mid", "recording_id": f"r{i // 2}"} for i in range(120)]
    write_table(tmp_path / "pairs.csv", "audio,midi,recording_id", *rows)
    found = {s: read_pairs(tmp_path / "pairs.csv", s)[1] for s in ("train", "validation", "test")}
    assert {s: len(pairs) for s, pairs in found.items()} == {"train": 108, "validation": 6, "test": 6}
    assert sum(len({pair.recording_id for pair in pairs}) for pairs in found.values()) == 60
    for name in ("a.wav", "a.mid", "b.wav", "b.mid"):
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / name).touch()
    for name in "ab":
        write_midi(tmp_path / "few" / f"{name}.mid")
    (learned,), (held,) = (read_pairs(tmp_path / "few", split)[1] for split in ("train", "validation"))
    assert {learned.audio, held.audio} == {"a.wav", "b.wav"}
    with pytest.raises(MidiError, match="few: none of 2 recordings is for 'test'; give a table with a column split"):
        read_pairs(tmp_path / "few", "test")


def test_a_folder_of_pairs(tmp_path, write_midi):
    """Names are matched with their folders; what has no partner, or no notes, is no pair, but listed; without any it is
    an error."""
    names = ("a/one.wav", "a/one.mid", "b/one.flac", "b/one.midi", "two.wav", "b/.three.wav", "bad.mid", "bad.wav")
    for name in (*names, "a/one.flac", "four.mid", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(MidiError, match=r"no MIDI of a pair can be used \(one.mid: the file is empty"):
        read_pairs(tmp_path)
    for name in ("a/one.mid", "b/one.midi"):
        write_midi(tmp_path / name)
    _, pairs, left_out = read_pairs(tmp_path)
    assert [(p.audio, p.midi) for p in pairs] == [("a/one.wav", "a/one.mid"), ("b/one.flac", "b/one.midi")]
    no_partner = "no audio or MIDI of its name is beside it"
    reasons = {"a/one.flac": "another file of its name is used", "four.mid": no_partner, "two.wav": no_partner}
    reasons["bad.mid"] = "bad.mid: the file is empty; give a MIDI file"
    assert {item["source"]: item["reason"] for item in left_out} == reasons
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "folder.mid").mkdir()
    with pytest.raises(MidiError, match="no audio file with MIDI of its name"):
        read_pairs(tmp_path / "c")
    write_table(tmp_path / "one.csv", "audio,midi,split", {"audio": "x.wav", "midi": "x.mid", "split": "test"})
    assert read_pairs(tmp_path, "test")[1][0].audio == "x.wav"
    rows = [
        {"audio": f"{i}.wav", "midi": f"{i}.mid", "split": split} for i, split in enumerate(("Train", "", " train "))
    ]
    write_table(tmp_path / "c" / "splits.csv", "audio,midi,split", *rows)
    _, pairs, left_out = read_pairs(tmp_path / "c", "train")
    assert [pair.audio for pair in pairs] == ["0.wav", "2.wav"]
    assert left_out == [{"source": "1.mid", "reason": "its split is blank"}]
    (tmp_path / "c" / "._splits.csv").write_bytes(b"\0\5\x16\7\xff")  # what a Mac puts beside each file
    assert len(read_pairs(tmp_path / "c", "train")[1]) == 2
    (tmp_path / "c" / "other.csv").write_bytes(b"caf\xe9")  # might be the table: its splits are not to be guessed
    with pytest.raises(MidiError, match="other.csv: cannot be read as a table; save .* or give a folder without it$"):
        read_pairs(tmp_path / "c", "train")
    write_table(tmp_path / "two.csv", MAESTRO)
    with pytest.raises(MidiError, match="holds several tables .one.csv, two.csv.; name one"):
        read_pairs(tmp_path)
    with pytest.raises(MidiError, match="none.csv: cannot be read as a table .No such file or directory.$"):
        read_pairs(tmp_path / "none.csv")
    write_table(tmp_path / "two.csv", MAESTRO, {"midi_filename": "m", "audio_filename": "a", "duration": "long"})
    with pytest.raises(MidiError, match="two.csv: row 1 is cut short, or its times make no sense .*long"):
        read_pairs(tmp_path / "two.csv")
    for text, said in (
        ("audio,midi\na.wav,a.mid\nb.wav\n", r"row 2 is cut short, .*\(b.wav\); mend it or take it out$"),
        (f"{PIJAMA_TIMES}\nm,a,t,9,nan,5\n", "nan"),
        (f"{PIJAMA_TIMES}\nm,a,t,9,5,3\n", "row 1 .*m, a, t, 9, 5, 3"),
        (f"{PIJAMA_TIMES}\nm,a,t,9,-1,3\n", "row 1 .*m, a, t, 9, -1, 3"),
        ("midi_filename,audio_filename\nm,a\n", "has no column 'canonical_composer', which one of MAESTRO has"),
    ):
        (tmp_path / "two.csv").write_text(text)
        with pytest.raises(MidiError, match=f"two.csv: .*{said}"):
            read_pairs(tmp_path / "two.csv", "train")


@pytest.mark.parametrize(("level", "corrected"), [(0.001, True), (0.1, False), (0.9, True)])
def test_the_level_of_a_recording_is_corrected_as_a_whole(level, corrected, tmp_path):
    """As the processor does it of a prompt: one gain for both windows, whichever they are, and none where velocities
    explain the level; the half of it that is played softly stays as much softer."""
    notes = [(0.25 * i, 0.3, 60 + i % 5, 30 if i < 24 else 90) for i in range(48)]
    (tmp_path / "a.mid").write_bytes(midi_bytes(np.array(notes, NOTE_DTYPE)))
    wave = level * np.random.default_rng(0).uniform(-1, 1, 12 * 32_000)
    wave[: 6 * 32_000] *= 0.1
    soundfile.write(tmp_path / "a.wav", wave, 32_000, subtype="FLOAT")
    recordings, gains = PairedRecordings(tmp_path, 0), set()
    gain, said = check_level(wave.astype(np.float32), np.array(notes, NOTE_DTYPE), "a.wav")
    for index in range(6):
        as_is, found = (
            recordings.draw(index, DataArguments("train", 1.0, 1.0, 0, False, correct_level=c)) for c in (0, 1)
        )
        assert "gain_db" not in as_is[2]
        gains.add(found[2]["gain_db"])
        for before, after in zip(as_is[:2], found[:2], strict=True):
            assert np.allclose(after.wave, before.wave * 10 ** (found[2]["gain_db"] / 20), rtol=1e-4)
    assert len(gains) == 1 and gains.pop() == pytest.approx(gain, abs=0.01)
    assert (gain != 0) is (said != "") is corrected


def test_the_level_is_that_of_the_part_that_is_used(tmp_path, write_midi, monkeypatch):
    """Not of the speech before the performance, nor of what is behind as much as fits into memory; and what is raised
    does not clip."""
    monkeypatch.setattr(paired_recordings, "CHECKED_S", 5.0)
    row = {"split": "train", "midi_filepath": "a.mid", "mp3_filepath": "a.wav", "duration_sec": "9"}
    write_table(tmp_path / "pijama.csv", PIJAMA, row | {"performance_start_sec": "3", "performance_end_sec": "9"})
    write_midi(tmp_path / "a.mid", seconds=9.0)
    wave = 1e-3 * np.random.default_rng(0).uniform(-1, 1, 9 * 32_000)
    wave[3 * 32_000 :: 6_400], wave[3 * 32_000 + 3_200 :: 6_400] = 0.4, -0.4  # without a constant part
    wave[: 2 * 32_000] = wave[8 * 32_000 :] = 0.1
    soundfile.write(tmp_path / "a.wav", wave, 32_000, subtype="FLOAT")
    data = DataArguments("train", 1.0, 1.0, 0, False, correct_level=True)
    prompt, target, about = PairedRecordings(tmp_path, 0, "train").draw(0, data)
    notes = relative_notes(load_performance(tmp_path / "a.mid").notes, 3, 5)
    gain, _ = check_level(wave[3 * 32_000 : 8 * 32_000].astype(np.float32), notes, "a.wav")
    assert about["gain_db"] == pytest.approx(gain, abs=0.01) and gain > 8
    assert max(np.abs(prompt.wave).max(), np.abs(target.wave).max()) == pytest.approx(0.97, abs=1e-4)


@pytest.mark.parametrize(("late", "moved"), [(0.12, 0.12), (0.005, 0.0), (1.0, None), (None, None)])
def test_what_is_not_in_time_is_moved_or_left_out(late, moved, tmp_path):
    """The notes of both windows by the same offset; what is a second late, or other music, makes no item. If not asked
    for, all is taken as it is."""
    rng = np.random.default_rng(0)
    pitches, onsets = rng.integers(45, 80, 40), np.sort(rng.uniform(0.5, 11.0, 40))
    (tmp_path / "a.mid").write_bytes(
        midi_bytes(np.array([(o, 0.2, p, 80) for o, p in zip(onsets, pitches)], NOTE_DTYPE))
    )
    wave, time = np.zeros(13 * 32_000), np.arange(16_000) / 32_000
    for onset, pitch in zip(onsets if late is not None else np.sort(rng.uniform(0.5, 11.0, 40)), pitches):
        first = round((onset + (late or 0)) * 32_000)
        tone = np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * time) * np.exp(-8 * time)
        wave[first : first + 16_000] += 0.1 * tone
    soundfile.write(tmp_path / "a.wav", wave, 32_000, subtype="FLOAT")
    recordings = PairedRecordings(tmp_path, 0)
    as_is = recordings.draw(0, DataArguments("train", 2.0, 2.0, 0, False))
    assert "offset_s" not in as_is[2]
    looked_at, told = recordings.out_of_time("extend")
    wanted = {
        0.12: r"a.wav: the recording is 1\d\d ms later than its MIDI$",
        1.0: "too much",
        None: "belong together",
    }
    assert looked_at == 1 and len(told) == (moved != 0) and all(re.search(wanted[late], said) for said in told)
    data = DataArguments("train", 2.0, 2.0, 0, False, correct_offset=True)
    if moved is None:
        said = "too much to be corrected" if late else "do not seem to belong together"
        with pytest.raises(MidiError, match=f"a.wav: .*{said}"):
            recordings.draw(0, data)
        return
    *windows, about = recordings.draw(0, data)
    assert about["offset_s"] == pytest.approx(moved, abs=0.02) and (about["offset_s"] != 0) is (moved != 0)
    for before, after in zip(as_is[:2], windows, strict=True):
        assert np.array_equal(after.wave, before.wave) and after.start == before.start
        sounding = relative_notes(load_performance(tmp_path / "a.mid").notes, after.start - about["offset_s"], 2.0)
        assert np.allclose(after.notes["onset"], sounding["onset"], atol=1e-5) and len(sounding) > 2


@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050])
def test_a_stretch_is_that_of_the_whole_recording(rate, tmp_path):
    """Decoding and resampling only a stretch gives the samples of the whole, also at the ends of the file."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((3 * rate, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    whole = soxr.resample(np.pad(noise.mean(1), rate), rate, 32_000, "VHQ")  # a second of silence around it
    for start, seconds in ((1.2345, 0.5), (0.0, 1.0), (-0.5, 1.0), (2.5, 1.0)):
        first = round(start * 32_000) + 32_000
        stretch = read_stretch(tmp_path / "a.wav", start, seconds)
        assert len(stretch) == round(seconds * 32_000)
        assert np.abs(stretch - whole[first : first + len(stretch)]).max() < 1e-6


def test_a_stretch_of_an_mp3_has_all_its_sound(tmp_path):
    """Behind a seek its decoder lacks what earlier frames hold of later ones: up to half a second, where they are few
    bytes, as those of soft piano music are."""
    rate, rng = 24_000, np.random.default_rng(0)
    wave = np.zeros(20 * rate)
    for first in rng.integers(0, len(wave) - 400, 40):
        wave[first : first + 400] = 0.8 * np.sin(np.arange(400) / 4) * np.exp(-np.arange(400) / 100)
    soundfile.write(tmp_path / "a.mp3", wave, rate)
    whole, _ = soundfile.read(tmp_path / "a.mp3")
    whole = soxr.resample(whole, rate, 32_000, "VHQ")
    for start in rng.uniform(2, 18, 30):
        stretch = read_stretch(tmp_path / "a.mp3", start, 1.0)
        there = whole[round(start * 32_000) :][: len(stretch)]
        assert np.abs(stretch - (there - there.mean())).max() < 1e-3


def test_windows_end_where_the_midi_does(tmp_path, write_midi):
    """What follows in the audio, applause or music that the MIDI lacks, has no notes to learn it from."""
    end = max(note["onset"] + note["duration"] for note in load_performance(write(tmp_path, write_midi)).notes)
    data = DataArguments("train", 1.0, 1.0, 0, False)
    recordings = PairedRecordings(tmp_path / "a.csv", 0)
    for index in range(20):
        for window in recordings.draw(index, data)[:2]:
            assert window.start + window.seconds <= end + paired_recordings.RING_S + 1e-6
    data.target_seconds = 12.0
    with pytest.raises(MidiError, match="a.wav: .* s of what its MIDI tells, but an item needs 13.0 s"):
        recordings.draw(0, data)


def write(folder, write_midi):
    """A minute of audio with four seconds of MIDI, and their table; the MIDI."""
    write_midi(folder / "a.mid", seconds=4.0)
    soundfile.write(folder / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 60 * 8_000), 8_000)
    write_table(folder / "a.csv", "audio,midi", {"audio": "a.wav", "midi": "a.mid"})
    return folder / "a.mid"


def test_a_constant_part_is_left_out(tmp_path):
    """As of the processor's prompts: else rows hold codes that the model is never given. There is none around a file,
    and a wave that has none stays as it is, bit by bit."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((3 * 44_100, 2)).astype(np.float32)
    noise -= noise.mean()
    for name, wave in (("a.wav", noise), ("dc.wav", noise + np.float32([0.1, 0.3]))):
        soundfile.write(tmp_path / name, wave, 44_100, subtype="FLOAT")
    for start in (1.2, 0.0, -0.5, 2.5, 4.0):
        plain, shifted = (read_stretch(tmp_path / name, start, 1.0) for name in ("a.wav", "dc.wav"))
        away = np.ones(32_000, bool)
        for edge in (-start, 3.0 - start):  # of the file, where a constant part begins and ends
            away[max(round(edge * 32_000) - 100, 0) : max(round(edge * 32_000) + 100, 0)] = False
        assert np.abs(plain - shifted)[away].max() < 2e-3 and len(shifted) == 32_000
    assert not read_stretch(tmp_path / "dc.wav", -0.5, 1.0)[:15_000].any()


def test_audio_that_cannot_be_read(tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "nan.wav", np.full(32_000, np.nan), 32_000, subtype="FLOAT")
    for name, what in (("text.wav", "cannot be read as audio"), ("none.wav", "no such file"), ("nan.wav", "finite")):
        with pytest.raises(MidiError, match=f"{name}: .*{what}"):
            read_stretch(tmp_path / name, 0.0, 0.5)
