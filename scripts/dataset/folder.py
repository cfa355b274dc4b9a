# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A dataset as the Hub has it: parquet shards with typed columns, a card, and the list of what was left out."""

import io
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, DatasetInfo, Features, List, SplitDict, SplitInfo, Value
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from symusic import Note, Score, Track
from yaml import YAMLError

from scripts.audio.pianos import SAMPLING_RATE
from scripts.dataset.shards import DEFAULT_SUSTAIN, DataError, card_pattern, read_column, read_footer, shard_names
from scripts.training.processes import changed_settings
from scripts.unfinished import WriteError, unfinished_file, write_text

SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<count>\d{5})\.parquet")
TICKS_PER_QUARTER = 480  # of the MIDI bytes, at 120 BPM: 1 ms is about one tick
MIN_NOTE_S = 0.002  # a note that is about to end when the window begins needs a tick or two
LICENCES = {  # as the corpora write them -> as the Hub does
    "CC0": "cc0-1.0",
    "CC BY 4.0": "cc-by-4.0",
    "CC BY-NC 3.0": "cc-by-nc-3.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
    "CC BY-SA 4.0": "cc-by-sa-4.0",
    "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0",
}
COLUMNS = {  # what the card tells of them
    "id": "number of the item, counted over the split",
    "recording_id": "one piano in one room under one pair of microphones",
    "piano, room": "of rendered recordings; empty for real ones",
    "licence": "of the sources of this row",
    "midi_ids": "rows of six MIDI ids: the whole prompt, then the target, as `MidiValleTokenizer` writes them",
    "target_frames": "T of the target's codes, 50 a second",
    "prompt_source, prompt_start_s": "MIDI file and where in it the window begins, s; likewise `target_`",
    "prompt_midi": "the window's notes as a MIDI file; notes that sound on from before it begin at 0",
    "prompt_onset, _duration, _pitch, _velocity": "the same notes exactly, s; before 0: struck before the window",
    "prompt_codes": "codes of the codec, (K, T) flattened, int16",
    "prompt_audio": "the window, FLAC, if it was kept",
    "gain_db": "by which both windows are louder than the recording, dB, less where a peak would clip; if levels were "
    "corrected (`--correct-level`)",
    "offset_s": "by which the notes were moved, s, if offsets were corrected (`--correct-offset`)",
}
BODY = """
# {name}

Pairs of prompt and target for MIDI-VALLE: two windows of one recording as notes, MIDI and codec codes. Rows are drawn
independently of one another, so they need no shuffling before use. Made by `scripts.prepare_dataset`; train on it with
`python -m scripts.train --config recipes/starter_ar.yaml --part ar --data USER/NAME --codec CODEC --output-dir RUN`,
CODEC being the folder of the codec below, or of a model that has it.

| column | |
| --- | --- |
{columns}

{num_codebooks} codebooks of {codebook_size} codes, 50 frames a second. The codes are of the codec whose encoder and
codebooks have the sha256 `{codec_sha256}`; no other codec can decode them. Audio columns hold bytes:
`datasets` decodes them with torchcodec, or take them as they are by `load_dataset(..., streaming=True).decode(False)`.

Licences of the sources are told row by row. What could not be used is listed with the reason in `skipped.jsonl`.
"""


def features(keep_audio: bool, correct_level: bool = False, correct_offset: bool = False) -> Features:
    """Columns of a shard; audio last, so that what training reads lies together."""
    columns = {"id": Value("int64")}
    columns |= dict.fromkeys(("recording_id", "piano", "room", "licence"), Value("string"))
    if correct_level:
        columns["gain_db"] = Value("float32")
    if correct_offset:
        columns["offset_s"] = Value("float32")
    columns |= {"midi_ids": List(List(Value("int16"), length=6)), "target_frames": Value("int32")}
    for part in ("prompt", "target"):
        columns |= {f"{part}_source": Value("string"), f"{part}_start_s": Value("float64")}
        columns[f"{part}_midi"] = Value("binary")
        columns |= {f"{part}_{field}": List(Value("float64")) for field in ("onset", "duration")}
        columns |= {f"{part}_{field}": List(Value("int16")) for field in ("pitch", "velocity", "codes")}
    if keep_audio:
        columns |= {f"{part}_audio": Audio(sampling_rate=SAMPLING_RATE) for part in ("prompt", "target")}
    return Features(columns)


def write_shard(
    path: Path, rows: list[dict], keep_audio: bool, about: dict, skipped: list[dict], settings: dict | None = None
) -> None:
    """Write one shard, whole or not at all.

    Args:
        rows: values by column, audio as `{"bytes", "path"}`: the encoder of `datasets.Audio` would need torchcodec.
        about: kept in the footer as `midivalle`, equal in all shards; rows hold `gain_db` and `offset_s` if these were
            corrected.
        skipped: items that are not in `rows`, and why; kept as `skipped`.
        settings: what else decides the items, for `check_folder`; kept as `settings`.
    Raises:
        WriteError: a full disk, say.
    """
    corrected = (about.get(name, False) for name in ("correct_level", "correct_offset"))
    schema = features(keep_audio, *corrected).arrow_schema
    notes = {"midivalle": json.dumps(about), "skipped": json.dumps(skipped), "settings": json.dumps(settings or {})}
    schema = schema.with_metadata(schema.metadata | {k.encode(): v.encode() for k, v in notes.items()})
    options = {"compression": "zstd", "write_page_checksum": True}
    try:
        with unfinished_file(path) as partial, pq.ParquetWriter(partial, schema, **options) as file:
            if rows:  # `datasets` reads no file with a row group of no rows
                file.write_table(pa.Table.from_pylist(rows, schema=schema))
    except OSError as error:  # of pyarrow, without the file's name
        reason = os.strerror(error.errno) if error.errno else error
        raise WriteError(f"{path}: cannot be written ({reason}); make room and start again") from error


def midi_bytes(notes: np.ndarray) -> bytes:
    """Notes of a window as a MIDI file; those that began before it begin at 0."""
    score, track = Score(TICKS_PER_QUARTER, ttype="second"), Track(ttype="second")
    for onset, duration, pitch, velocity in notes.tolist():
        begin = max(onset, 0.0)
        left = max(onset + duration - begin, MIN_NOTE_S)
        track.notes.append(Note(begin, left, pitch, velocity, ttype="second"))
    score.tracks.append(track)
    return score.to("tick").dumps_midi()


def flac(wave: np.ndarray) -> dict:
    """Audio as `datasets.Audio` stores it."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return {"bytes": buffer.getvalue(), "path": None}


def check_folder(folder: Path, split: str, settings: dict) -> None:
    """Refuse to add shards of a split to others that were made differently, or may have been; shards of other splits
    need only be of the same codec, pedals and corrections, and have the same columns, which the card tells of all.

    Raises:
        DataError: made with other `settings`, by an earlier version that does not tell them, or damaged; by its name.
    """
    before_choice = {
        "sustain": DEFAULT_SUSTAIN,
        "correct_level": False,
        "correct_offset": False,
    }  # of shards that do not say
    settings = before_choice | settings
    for (name, count), files in _shards(folder).items():
        for file in files:
            try:
                metadata = read_footer(file).metadata
            except DataError as error:
                raise DataError(f"{error}; delete it, and it is made anew") from error
            made = {"shards": count} | json.loads(metadata[b"midivalle"]) | json.loads(metadata.get(b"settings", b"{}"))
            made = before_choice | made
            shared = settings.keys() if name == split else {"codec_sha256", "keep_audio", *before_choice}
            told = shared & made.keys()
            changed = changed_settings({key: made[key] for key in told}, {key: settings[key] for key in told})
            if changed:
                raise DataError(f"{file}: was made with other settings ({changed}); give another --output-dir")
            if name == split and (untold := ", ".join(sorted(shared - told))):
                earlier = f"{file}: is of an earlier version, which does not tell its {untold}"
                raise DataError(f"{earlier}, so that others may not go with it; give another --output-dir")


def _shards(folder: Path) -> dict[tuple[str, int], list[Path]]:
    """What is there of each split, by its name and the number of shards that it is to have."""
    found = {}
    for file in sorted(folder.glob("*.parquet")):
        if match := SHARD.fullmatch(file.name):
            found.setdefault((match["split"], int(match["count"])), []).append(file)
    return found


def finish(folder: Path, excluded: list[dict]) -> dict[str, tuple[int, Counter]]:
    """Write `skipped.jsonl` and the card from the shards that are there.

    An existing card keeps its text; its header is brought up to date.

    Args:
        excluded: rows of a table that were never tried, and why; what the list holds of other splits' stays in it.
    Returns:
        For each complete split the number of its rows, and of its skipped items by their reason.
    Raises:
        DataError: a shard is damaged.
    """
    skipped = _excluded_before(folder / "skipped.jsonl")
    skipped, tally = skipped + [item for item in excluded if item not in skipped], {}
    splits = {
        split: files for split, files in _shards(folder).items() if [f.name for f in files] == shard_names(*split)
    }
    infos, licences, about = [], set(), {}
    for (split, count), files in splits.items():
        footers = [read_footer(file) for file in files]
        left_out = [item for footer in footers for item in json.loads(footer.metadata.get(b"skipped", b"[]"))]
        skipped += [{"split": split} | item for item in left_out]
        rows, size = sum(f.num_rows for f in footers), sum(file.stat().st_size for file in files)
        infos.append((split, count, rows, size))
        tally[split] = rows, Counter(item["reason"] for item in left_out)
        for file in files:
            licences |= set(pc.unique(read_column(file, "licence")).to_pylist())
        about = json.loads(footers[0].metadata[b"midivalle"])
        typed = Features.from_arrow_schema(footers[0].schema.to_arrow_schema())
    if skipped:
        write_text(folder / "skipped.jsonl", "".join(json.dumps(item) + "\n" for item in skipped))
    if infos:
        write_text(folder / "README.md", _card(folder, infos, typed, sorted(licences), about))
    return tally


def _excluded_before(path: Path) -> list[dict]:
    """What an earlier run has listed of tables' rows that were never tried; `source` tells them from shards' items."""
    try:
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        return [item for item in items if "source" in item]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}); delete it, and it is made anew") from error


def _card(folder: Path, infos: list, typed: Features, licences: list[str], about: dict) -> str:
    data = DatasetCardData(
        license=sorted({LICENCES.get(name, "other") for joined in licences for name in joined.split("; ")}),
        pretty_name=folder.name,
        task_categories=["text-to-audio"],
        tags=["music", "piano", "midi", "codec"],
    )
    names = {split: split.replace("-", "_") for split, *_ in infos}  # the Hub's splits have no hyphens
    files = [{"split": names[s], "path": card_pattern(s, count)} for s, count, *_ in infos]
    splits = {names[s]: SplitInfo(names[s], num_bytes=size, num_examples=rows) for s, _, rows, size in infos}
    info = DatasetInfo(features=typed, splits=SplitDict(splits), dataset_size=sum(i[3] for i in infos))
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    data["configs"] = [{"config_name": "default", "data_files": files}]
    if (folder / "README.md").is_file():
        try:
            text = DatasetCard.load(folder / "README.md", ignore_metadata_errors=True).text
        except (ValueError, YAMLError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{folder / 'README.md'}: its header cannot be read ({reason}); mend or move it") from error
    else:
        columns = "\n".join(f"| `{name}` | {words} |" for name, words in COLUMNS.items())
        text = BODY.format(name=folder.name, columns=columns, **about)
    return f"---\n{data.to_yaml()}\n---\n{text}"
