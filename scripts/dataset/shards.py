# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""The parquet shards of a split, wherever they lie: a folder, a dataset of the Hub, a folder on a web server.

`datasets` streams them: only footers and the columns that training needs are fetched, by ranges, and nothing is kept
on disk. What is missing or damaged is named with its file, and its row where there is one.
"""

import glob
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from huggingface_hub import DatasetCard
from pyarrow.dataset import ParquetFragmentScanOptions

from processing.processing_midivalle import FRAME_RATE
from scripts.wording import counted
from tokenization import NOTE_DTYPE

NOTE_FIELDS = NOTE_DTYPE.names
COLUMNS = [f"{part}_{field}" for part in ("prompt", "target") for field in (*NOTE_FIELDS, "codes")]
CODEBOOK_SIZE, DEFAULT_SUSTAIN = 2048, "extend"  # of shards that do not say
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
DIGITS = "[0-9]" * 5  # of a shard's number, in a pattern of file names
READERS = 16  # footers read at a time
LISTED = 5  # files named in a message


class DataError(ValueError):
    """Shards that are missing, mixed, damaged or made with another codec."""


def shard_files(source: str | Path, split: str) -> list[str]:
    """Parquet files of a split, complete and in order.

    Args:
        source: a folder, a dataset of the Hub (`user/name`, with `@revision` if need be), or the http(s) URL of a
            folder whose `README.md` is the card that `scripts.prepare_dataset` wrote.
        split: what the files' names begin with.
    Raises:
        DataError: none there, some of the `-of-N` files are missing, or there are several N.
    """
    root, remote = str(source).rstrip("/"), True
    if root.startswith(("http://", "https://")):
        return _listed_by_card(root, split)
    if not Path(root).exists() and HUB_ID.fullmatch(root):
        root = f"hf://datasets/{root}"
    elif not root.startswith("hf://"):
        remote = False
    try:
        found = fsspec.filesystem("hf").glob(f"{root}/{_pattern(split)}") if remote else _here(root, split)
    except Exception as error:  # the Hub's are of several libraries, those of no network too
        raise DataError(f"{source}: neither a folder here nor a dataset of the Hub ({_line(error)})") from error
    files = sorted(f"hf://{file}" if remote else file for file in found)
    if not files:
        raise DataError(f"{source}: no {split}-*.parquet; make it with scripts.prepare_dataset")
    counts = sorted({int(file.removesuffix(".parquet").split("-of-")[-1]) for file in files})
    if len(counts) > 1:
        sets = " and ".join(f"-of-{count:05d}" for count in counts)
        raise DataError(f"{source}: {split} holds shards of several datasets ({sets}); keep those of one")
    expected = shard_names(split, counts[0])
    missing = sorted(set(expected) - {file.rsplit("/", 1)[-1] for file in files})
    if missing or len(files) != len(expected):
        there = f"{len(files)} of {counted(len(expected), 'shard')} of {split}"
        raise DataError(f"{source}: {there} (missing: {_names(missing)}); finish it with scripts.prepare_dataset")
    return files


def shard_names(split: str, count: int) -> list[str]:
    """File names of a split of `count` shards."""
    return [f"{split}-{i:05d}-of-{count:05d}.parquet" for i in range(count)]


def card_pattern(split: str, count: int) -> str:
    """The same for a dataset card: of these files alone, not of another split whose name goes on with a hyphen."""
    return f"{split}-{DIGITS}-of-{count:05d}.parquet"


def dataset_info(files: list[str]) -> dict:
    """What the shards say of themselves: codec_sha256, num_codebooks, codebook_size, prompt_seconds, target_seconds.

    Raises:
        DataError: as `read_footers`.
    """
    return read_footers(files)[0]


def read_footers(files: list[str]) -> tuple[dict, list[int], str]:
    """What the shards say of themselves, the number of rows of each, and a digest of what is in them: of the sizes and
    limits of their columns; reads the ends of the files only.

    Raises:
        DataError: files that are missing, cut short, no shards or of different codecs; or no rows at all.
    """
    with ThreadPoolExecutor(READERS) as pool:
        footers = list(pool.map(_footer, files))
    bad = [str(footer) for footer in footers if isinstance(footer, DataError)]
    if bad:
        raise DataError(f"{len(bad)} of {counted(len(files), 'shard')} cannot be used: {_names(bad, '; ')}")
    folder = files[0].rsplit("/", 1)[0]
    if len({footer.metadata[b"midivalle"] for footer in footers}) > 1:
        raise DataError(f"{folder}: shards of different codecs or layouts are mixed")
    rows = [footer.num_rows for footer in footers]
    if not sum(rows):
        raise DataError(f"{folder}: holds no rows, in {counted(len(files), 'shard')}")
    groups = [footer.row_group(i).to_dict() for footer in footers for i in range(footer.num_row_groups)]
    return json.loads(footers[0].metadata[b"midivalle"]), rows, hashlib.sha256(repr(groups).encode()).hexdigest()[:12]


def read_footer(file: str | Path) -> pq.FileMetaData:
    """The footer of a shard; what it says of itself is `metadata[b"midivalle"]`.

    Raises:
        DataError: missing, damaged, or no shard.
    """
    try:
        with fsspec.open(str(file)) as f:
            footer = pq.ParquetFile(f).metadata
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing") from error
    except Exception as error:  # see Shards._read
        raise DataError(f"{file} is damaged or cut short ({_line(error)})") from error
    if b"midivalle" not in (footer.metadata or {}):
        raise DataError(f"{file} is not of scripts.prepare_dataset")
    return footer


def read_column(file: str | Path, name: str) -> pa.ChunkedArray:
    """One column of a shard, whole; `DataError` if it is damaged there."""
    try:
        with fsspec.open(str(file)) as f:
            return pq.ParquetFile(f, page_checksum_verification=True).read([name])[name]
    except Exception as error:  # see Shards._read
        raise DataError(f"{file} is damaged or cut short ({_line(error)})") from error


class Shards:
    """Rows of shards, read by `datasets` with as little as can be fetched.

    Args:
        files: as `shard_files` gives them.

    Attributes:
        info: see `dataset_info`.
        frames: target frames of each row, an array a shard.
        digest: tells these rows from others.
    """

    def __init__(self, files: list[str]):
        self.files = [str(file) for file in files]
        self.info, self.rows, self.digest = read_footers(self.files)
        checked = ParquetFragmentScanOptions(page_checksum_verification=True)
        names = [file if "://" in file else glob.escape(file) for file in self.files]  # `datasets` looks for patterns
        source = {"data_files": {"train": names}, "split": "train", "streaming": True}
        self.dataset = load_dataset("parquet", columns=COLUMNS, fragment_scan_options=checked, **source)
        if self.info.get("min_target_seconds", self.info["target_seconds"]) == self.info["target_seconds"]:
            whole = round(self.info["target_seconds"] * FRAME_RATE)
            self.frames = [np.full(count, whole) for count in self.rows]
        else:
            with ThreadPoolExecutor(READERS) as pool:
                columns = pool.map(lambda file: read_column(file, "target_frames"), self.files)
                self.frames = [column.to_numpy() for column in columns]

    def read(self, shards: list[int]) -> pa.Table:
        """`COLUMNS` of all rows of the shards with these numbers, one after the other.

        Raises:
            DataError: with the file's name: it is damaged, gone, shorter than it was, or a row holds codes or notes
                that cannot be.
        """
        return pa.concat_tables([self._read(shard) for shard in shards])

    def _read(self, shard: int) -> pa.Table:
        if not self.rows[shard]:
            return self.dataset.features.arrow_schema.empty_table().select(COLUMNS)
        file, tables, count = self.files[shard], [], 0
        stream = self.dataset.shard(len(self.files), shard).with_format("arrow")
        try:
            for table in stream.iter(batch_size=self.rows[shard]):
                tables.append(table)
                count += len(table)
        except Exception as error:  # of a dozen libraries, and none of them names the file
            raise DataError(f"{file}: cannot be read from row {count} on ({_line(error)})") from error
        if count != self.rows[shard]:
            raise DataError(f"{file}: of {counted(self.rows[shard], 'row')} at the start {count} could be read")
        table = pa.concat_tables(tables).select(COLUMNS).combine_chunks()
        self._check(file, table)
        return table

    def _check(self, file: str, table: pa.Table) -> None:
        """Refuse codes out of range, half frames and notes that are not numbers, by file and row."""
        size, codebooks = self.info.get("codebook_size", CODEBOOK_SIZE), self.info["num_codebooks"]
        for part in ("prompt", "target"):
            codes, ends = _flat(table, f"{part}_codes")
            _refuse(file, ends, (codes < 0) | (codes >= size), f"a {part} code is outside 0 to {size - 1}")
            cut = np.diff(ends, prepend=0) % codebooks != 0
            if cut.any():
                raise DataError(f"{file}, row {cut.argmax()}: {part}_codes are not {codebooks} codebooks of one length")
            for field in NOTE_FIELDS:
                values, ends = _flat(table, f"{part}_{field}")
                _refuse(file, ends, ~np.isfinite(values), f"{part}_{field} is not finite")


def notes_of(row: dict, part: str) -> np.ndarray:
    """Notes of a row's `prompt` or `target`, structured array, s relative to its window."""
    notes = np.empty(len(row[f"{part}_onset"]), dtype=NOTE_DTYPE)
    for field in NOTE_FIELDS:
        notes[field] = row[f"{part}_{field}"]
    return notes


def codes_of(row: dict, part: str, num_codebooks: int) -> np.ndarray:
    """Codes (K, T), int64, of a row's `prompt` or `target`."""
    return np.asarray(row[f"{part}_codes"], dtype=np.int64).reshape(num_codebooks, -1)


def row_of(table: pa.Table, index: int) -> dict[str, np.ndarray]:
    """One row of `Shards.read`, its lists as arrays."""
    return {name: table[name][index].values.to_numpy(zero_copy_only=False) for name in table.column_names}


def _here(folder: str, split: str) -> list[str]:
    return [str(file) for file in Path(folder).glob(_pattern(split))]


def _pattern(split: str) -> str:
    """Of a split's files, not those of another whose name goes on with a hyphen, as of `jazz` and `jazz-test`."""
    return f"{split}-{DIGITS}-of-{DIGITS}.parquet"


def _listed_by_card(url: str, split: str) -> list[str]:
    """Web servers do not list their folders; the card tells how many shards a split has."""
    try:
        with fsspec.open(f"{url}/README.md", "r") as f:
            configs = DatasetCard(f.read()).data.to_dict().get("configs") or []
    except (OSError, ValueError) as error:
        raise DataError(f"{url}: its README.md cannot be read ({_line(error)})") from error
    paths = [entry["path"] for config in configs for entry in config["data_files"]]
    counts = [int(found[1]) for path in paths if (found := re.search(r"-of-(\d+)\.parquet$", path))]
    forms = (card_pattern, "{}-*-of-{:05d}.parquet".format)  # cards had the second until November 2026
    count = next((n for n in counts if any(form(split, n) in paths for form in forms)), 0)
    if not count:
        raise DataError(f"{url}: README.md names no {split}-*.parquet; make it with scripts.prepare_dataset")
    return [f"{url}/{name}" for name in shard_names(split, count)]


def _footer(file: str) -> pq.FileMetaData | DataError:
    try:
        return read_footer(file)
    except DataError as error:
        return error


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of a column of lists, and where each row's end."""
    column = table[name].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False), np.cumsum(column.value_lengths().to_numpy())


def _refuse(file: str, ends: np.ndarray, wrong: np.ndarray, what: str) -> None:
    if wrong.any():
        row = np.searchsorted(ends, wrong.argmax(), side="right")
        raise DataError(f"{file}, row {row}: {what}; make the shard anew")


def _names(names: list[str], separator: str = ", ") -> str:
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return separator.join(names[:LISTED] + more)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
