# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`MidiValleTokenizer`: MIDI -> rows of six ids, and back.

One row a note, `[pitch, velocity, duration, IOI, position, bar]`, on a grid of 96 ticks per beat at a constant 120 BPM
(1/192 s). Ids equal the published tokenizer's. *Held* rows are this project's addition: a note that already sounds
at the left edge of a window stands at the edge with its remaining duration, and its age in the IOI field (ids below
388, which sorted notes never use). A note that is longer than one row can say goes on in a held row at that row's end.
"""

import math
import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from symusic import Score
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import PaddingStrategy, is_torch_tensor, logging, to_py_obj

from .midi_midivalle import (
    NOTE_DTYPE,
    PITCH_MIN,
    SUSTAIN_MODES,
    TICKS_PER_SECOND,
    MidiError,
    Performance,
    load_performance,
    slice_notes,
    to_ticks,
)
from .miditok_midivalle import (
    FIELDS,
    NUM_BARS,
    SPECIAL_TOKENS,
    TICKS_PER_BAR,
    VOCAB_SIZES,
    MidiValleMidiTok,
    default_config,
)

logger = logging.get_logger(__name__)

BOS, EOS = 1, 2
NUM_SPECIAL = len(SPECIAL_TOKENS)
MAX_DURATION = 1152  # ticks, 6 s: the longest of one row
MAX_AGE = 384  # ticks: older held notes share an id
MIDI_ENDINGS = (".mid", ".midi", ".kar", ".smf")
GRID_S = 0.5  # 25 codec frames = 96 ticks, the smallest common grid
AXIS = NUM_BARS * TICKS_PER_BAR  # ticks of one sequence
SEQUENCE_SECONDS = AXIS // TICKS_PER_SECOND


class MidiValleTokenizer(PreTrainedTokenizer):
    """Tokenizer of expressive piano MIDI.

    `tokenizer(midi)` encodes whole inputs of at most 32 s; `encode_notes` lays windows of performances, a prompt and a
    target for example, on one time axis; `decode_rows` and `ids_to_score` go back. The flat vocabulary that
    transformers sees (`get_vocab`, `convert_tokens_to_ids`) lists the six vocabularies one after the other; texts of
    its tokens (`"Pitch_60 Velocity_63"`) are encoded and decoded as by any tokenizer of transformers.

    Args:
        midi_tokenizer_file (`str`, *optional*): A saved `midi_tokenizer.json` (miditok).
        sustain (`str`, defaults to `"extend"`):
            What `tokenizer(midi)` does with the sustain pedal: `"extend"` durations by it, or `"ignore"` it as the
            published weights expect.
        mark_held (`bool`, defaults to `True`):
            Whether `encode_notes` writes held rows; the published weights never saw any, nor more than 6 s of a note.
    """

    vocab_files_names = {"midi_tokenizer_file": "midi_tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, midi_tokenizer_file: str | None = None, sustain: str = "extend", mark_held: bool = True, **kwargs
    ):
        if sustain not in SUSTAIN_MODES:
            raise ValueError(f"sustain is {sustain!r}; choose one of {SUSTAIN_MODES}")
        self.sustain, self.mark_held = sustain, mark_held
        self.midi_tokenizer = _midi_tokenizer(midi_tokenizer_file)
        self._flat_tokens = [
            token if field == 0 or not token.endswith("_None") else f"{FIELDS[field]}_{token.removesuffix('_None')}"
            for field, vocabulary in enumerate(self.midi_tokenizer.vocab)
            for token in vocabulary
        ]
        self._flat_ids = {token: i for i, token in enumerate(self._flat_tokens)}
        for name in ("pad", "bos", "eos", "mask"):
            kwargs.setdefault(f"{name}_token", f"{name.upper()}_None")
        kwargs.setdefault("unk_token", kwargs["mask_token"])  # of a text; MIDI has no unknown
        super().__init__(midi_tokenizer_file=midi_tokenizer_file, sustain=sustain, mark_held=mark_held, **kwargs)

    # --- MIDI -> ids

    def load_performance(
        self, midi: "str | os.PathLike | bytes | BinaryIO | Score", sustain: str | None = None, name: str | None = None
    ) -> Performance:
        """Read the piano notes of a MIDI input, as `midi_midivalle.load_performance` does.

        Args:
            midi (`str`, `os.PathLike`, `bytes`, binary file or `symusic.Score`): What to read.
            sustain (`str`, *optional*): `"extend"` or `"ignore"`; `self.sustain` by default.
            name (`str`, *optional*): Name for messages, if not the file's own.

        Returns:
            `Performance`: sorted notes in s, and a report on what was left out.

        Raises:
            `MidiError`: an input that cannot be used.
        """
        return load_performance(midi, sustain=sustain or self.sustain, name=name)

    def __call__(
        self,
        midi=None,
        text_pair=None,
        text=None,
        padding: bool | str | PaddingStrategy | None = None,
        add_special_tokens: bool = True,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchEncoding:
        """Encode whole MIDI inputs, pedal as in `self.sustain`. Nothing is truncated; left-out notes are logged.

        A text is encoded as `PreTrainedTokenizer` does: flat ids, as lists and not padded by default. A `str` is the
        path of a MIDI file if it ends in .mid, .midi, .kar or .smf, or if something of that name exists; any other is
        a text. Words that are no tokens become `unk_token`, and are logged.

        Args:
            midi (path, `bytes`, binary file, `symusic.Score`, or a list of these): Inputs of at most 32 s.
            padding, padding_side, max_length, pad_to_multiple_of, return_tensors:
                As in `pad`; for MIDI padding is `True` and return_tensors `"np"` by default.
            add_special_tokens (`bool`): Put a BOS row first and an EOS row last. Texts get none.
            text, text_pair, **kwargs: Texts, and the further arguments that `PreTrainedTokenizer` has for them.

        Returns:
            `BatchEncoding`: of MIDI `input_ids (B, N, 6)` and `attention_mask (B, N)`, int64.

        Raises:
            `MidiError`: unusable input (see `load_performance`), or a note at or after 32 s.
        """
        options = {
            "padding": padding,
            "padding_side": padding_side,
            "max_length": max_length,
            "pad_to_multiple_of": pad_to_multiple_of,
            "return_tensors": return_tensors,
        }
        if midi is None or _is_text(midi):
            options |= {"padding": padding or False, "add_special_tokens": add_special_tokens}
            return super().__call__(text if midi is None else midi, text_pair, **options, **kwargs)
        if text is not None or text_pair is not None or kwargs:
            given = {"text": text, "text_pair": text_pair} | kwargs
            names = ", ".join(name for name in given if given[name] is not None)
            raise MidiError(f"{names}: for texts of tokens only; leave it out with MIDI")
        inputs, batch = midi if isinstance(midi, (list, tuple)) else [midi], []
        if not inputs:
            raise MidiError("an empty list of MIDI inputs; give at least one")
        for item in inputs:
            performance = self.load_performance(item)
            if performance.warning:
                logger.warning(performance.warning)
            try:
                batch.append(self.encode_notes([(performance.notes, 0.0, math.inf)], add_special_tokens))
            except MidiError as error:
                raise MidiError(f"{performance.name}: {error}") from error
        options["padding"] = True if padding is None else padding
        return self.pad({"input_ids": batch}, **options | {"return_tensors": return_tensors or "np"})

    def encode(self, text, *args, **kwargs) -> list[int]:
        """Flat ids of a text of tokens; `MidiError` for MIDI, which the tokenizer itself takes."""
        if not isinstance(text, (list, tuple)) and not _is_text(text):
            raise MidiError("encode takes a text of tokens; for MIDI call the tokenizer itself, tokenizer(midi)")
        return super().encode(text, *args, **kwargs)

    def encode_notes(
        self,
        segments: Sequence[tuple[np.ndarray, float, float]],
        add_special_tokens: bool = True,
        mark_held: bool | None = None,
        return_report: bool = False,
    ):
        """Lay windows of performances one after the other on one time axis that starts at 0, and encode them.

        A note is clipped at the right edge of its window. A note that already sounds at the left edge becomes a held
        row: position and bar of the edge, remaining duration, IOI id `388 - min(age in ticks, 384)`; it comes before
        the notes struck at that tick, and the next struck note's IOI skips it.

        Args:
            segments (list of `(notes, start, end)`):
                Sorted notes (`NOTE_DTYPE`) of a performance and a window of it in seconds. Edges are multiples of
                0.5 s (25 frames), but for the last end, which may be `math.inf`.
            add_special_tokens (`bool`): Put a BOS row first and an EOS row last.
            mark_held (`bool`, *optional*, defaults to `self.mark_held`):
                If false, held notes are left out, and notes clipped to 6 s; both are counted.
            return_report (`bool`): Also return counts of rows and of changes.

        Returns:
            `np.ndarray` of shape `(N, 6)`, int64; with `return_report` a tuple of it and a `dict[str, int]` with
            `struck` and `held` rows, `held_left_out`, and `clipped_durations` (over 6 s, or beyond the axis).

        Raises:
            `MidiError`: edges off the grid, notes that are unsorted or off the piano, or a note at or after 32 s.
        """
        mark_held = self.mark_held if mark_held is None else mark_held
        offset, parts, left_out, clipped = 0, [np.empty((0, 5), np.int64)], 0, 0
        for i, (notes, start, end) in enumerate(segments):
            is_last = i == len(segments) - 1
            left, right = _edges(start, end, is_last)
            struck, held = slice_notes(notes, start, end)
            if not mark_held:
                left_out, held = left_out + len(held), held[:0]
            both = np.concatenate([held, struck])
            tick, duration = to_ticks(both["onset"]), np.maximum(to_ticks(both["duration"]), 1)
            age = np.maximum(left - tick, 0)
            tick = np.clip(tick, left, right - 1) - left  # a note of a window without right edge may round onto its end
            duration = np.minimum(duration - age, right - left - tick)
            longest = np.maximum(MAX_DURATION, AXIS - offset - tick) if mark_held else MAX_DURATION
            clipped += int((duration > longest).sum())
            events = np.stack([both["pitch"], both["velocity"], duration, age, tick + offset], 1)
            parts.append(_continued(events, None if is_last else offset + right - left) if mark_held else events)
            offset += right - left
        events = np.concatenate(parts)
        rows = _rows(events)
        if add_special_tokens:
            rows = np.concatenate([np.full((1, 6), BOS), rows, np.full((1, 6), EOS)])
        if not return_report:
            return rows
        held_rows = int((events[:, 3] > 0).sum())
        return rows, {
            "struck": len(events) - held_rows,
            "held": held_rows,
            "held_left_out": left_out,
            "clipped_durations": clipped,
        }

    # --- ids -> MIDI

    def decode_rows(self, ids) -> np.ndarray:
        """Rows of ids `(N, 6)` -> notes (`NOTE_DTYPE`) on the sequence's time axis, in s, sorted.

        Special rows are skipped. Times are exact on the grid, velocities the bins' values 1, 3, ..., 127. A held row
        gives a note where it stands, or makes the one that it continues longer.
        Raises `MidiError` for ids outside the vocabularies.
        """
        rows = self._note_rows(ids)
        is_first, lengths = _joined(rows)
        rows = rows[is_first]
        notes = np.empty(len(rows), NOTE_DTYPE)
        notes["onset"] = (rows[:, 5] * TICKS_PER_BAR + rows[:, 4]) / TICKS_PER_SECOND
        notes["duration"] = lengths / TICKS_PER_SECOND
        notes["pitch"], notes["velocity"] = rows[:, 0] + PITCH_MIN, 2 * rows[:, 1] + 1
        return notes[np.lexsort((notes["duration"], notes["pitch"], notes["onset"]))]

    def ids_to_score(self, ids) -> Score:
        """Rows of ids `(N, 6)` -> a symusic `Score` of one track at 96 ticks per quarter, 120 BPM, 4/4; as by
        `decode_rows`."""
        rows = self._note_rows(ids)
        is_first, lengths = _joined(rows)
        score = self.midi_tokenizer.decode([(rows[is_first] + NUM_SPECIAL).tolist()])
        for note, length in zip(score.tracks[0].notes, lengths.tolist(), strict=True):
            note.duration = length
        return score

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """`PreTrainedTokenizer.decode` of the flat ids of texts. `MidiError` for rows, which are not those."""
        ids = to_py_obj(token_ids)
        batch = ids if isinstance(ids, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in ids) else []
        is_deeper = any(isinstance(place, (list, tuple)) for row in batch for place in row)
        if is_deeper or (batch and all(map(_is_row, batch))):
            raise MidiError("rows of six ids are not the flat ids of a text; give each sequence to decode_rows")
        return super().decode(ids, skip_special_tokens, **kwargs)

    def _note_rows(self, ids) -> np.ndarray:
        """Check ids, drop special rows, and subtract the special tokens."""
        rows = np.asarray(ids, dtype=np.int64)
        if rows.ndim != 2 or rows.shape[1] != len(FIELDS):
            raise MidiError(f"ids have shape {rows.shape}; give the rows of one sequence, (N, {len(FIELDS)})")
        rows = rows[~((rows >= 0) & (rows < NUM_SPECIAL)).all(1)]
        if ((rows < NUM_SPECIAL) | (rows >= VOCAB_SIZES)).any():
            raise MidiError(f"ids are outside the vocabularies {VOCAB_SIZES}")
        return rows - NUM_SPECIAL

    # --- transformers

    def pad(
        self,
        encoded_inputs,
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """`PreTrainedTokenizer.pad` for rows of six ids: PAD rows are zeros, nothing is truncated.

        Args:
            encoded_inputs (mapping, or list of mappings, with `input_ids` and optionally `attention_mask`):
                One `(N, 6)` or several. Other keys are passed on; flat ids go to the parent class (plain lists of six
                numbers are those of one sequence only beside its mask).
            padding (`bool` or `str`): `True` or `"longest"`, `"max_length"`, or `False`.
            return_tensors (`str`, *optional*): `"np"` or `"pt"`; by default `"pt"` if the ids are torch tensors.

        Returns:
            `BatchEncoding`: `input_ids (B, N, 6)` and `attention_mask (B, N)`, int64; lists of arrays if not padded.
        """
        if isinstance(encoded_inputs, (list, tuple)):
            encoded_inputs = {key: [item[key] for item in encoded_inputs] for key in encoded_inputs[0]}
        ids, masks = encoded_inputs["input_ids"], encoded_inputs.get("attention_mask")
        if not _are_rows(ids, masks):
            options = (padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask, return_tensors)
            return super().pad(encoded_inputs, *options, verbose)
        if return_tensors is None and is_torch_tensor(ids[0]):
            return_tensors = "pt"
        if np.ndim(ids[0]) == 1:  # one sequence: a batch of one
            ids, masks = [ids], None if masks is None else [masks]
        ids = [np.asarray(rows, dtype=np.int64) for rows in ids]
        masks = [np.ones(len(rows)) for rows in ids] if masks is None else masks
        masks = [np.asarray(mask, dtype=np.int64) for mask in masks]
        if padding not in (False, PaddingStrategy.DO_NOT_PAD, "do_not_pad"):
            length = max(map(len, ids))
            if padding in (PaddingStrategy.MAX_LENGTH, "max_length"):
                length = max(length, max_length or 0)
            length = -(-length // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
            left = (padding_side or self.padding_side) == "left"
            ids = _stack(ids, length, left)
            masks = _stack(masks, length, left)
            return_tensors = return_tensors or "np"
        data = {**encoded_inputs, "input_ids": ids, "attention_mask": masks}
        if return_attention_mask is False:
            del data["attention_mask"]
        return BatchEncoding(data, tensor_type=return_tensors)

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Sizes of the six vocabularies, special tokens included."""
        return VOCAB_SIZES

    @property
    def vocab_size(self) -> int:
        """Size of the flat vocabulary."""
        return len(self._flat_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Flat vocabulary: `Pitch_60`, `Velocity_63`, ..., and the special tokens of each field."""
        return {**self._flat_ids, **self.added_tokens_encoder}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `midi_tokenizer.json`, the miditok configuration."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + self.vocab_files_names["midi_tokenizer_file"])
        self.midi_tokenizer.save(path)
        return (path,)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        words = text.split()
        unknown = [word for word in words if word not in self._flat_ids]
        if unknown:
            logger.warning_once(
                f"words that are no MIDI tokens: {len(unknown)} of {len(words)}, {unknown[0]!r} first; a MIDI file's "
                "name ends in .mid"
            )
        return words

    def _convert_token_to_id(self, token: str) -> int | None:
        unknown = self.unk_token
        return self._flat_ids.get(token, self._flat_ids.get(unknown, self._added_tokens_encoder.get(unknown)))

    def _convert_id_to_token(self, index: int) -> str | None:
        return self._flat_tokens[index] if 0 <= index < len(self._flat_tokens) else None


def _midi_tokenizer(path: str | None) -> MidiValleMidiTok:
    """The one that was saved as `path`, or a new one."""
    if path is None:
        return MidiValleMidiTok(default_config())
    try:
        tokenizer = MidiValleMidiTok(params=path)
        found = tuple(tokenizer.len)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # what miditok makes of other JSON
        raise ValueError(f"{path}: is not a MIDI-VALLE tokenizer ({error!r}); save it again") from error
    if found != VOCAB_SIZES:
        raise ValueError(f"{path}: is another tokenizer: vocabularies of {found}, expected {VOCAB_SIZES}")
    return tokenizer


def _is_text(inputs) -> bool:
    """Whether these are texts (or their words or ids), not MIDI; by the first of a batch."""
    while isinstance(inputs, (list, tuple)) and len(inputs):
        inputs = inputs[0]
    if not isinstance(inputs, str):
        return isinstance(inputs, int)
    return not inputs.lower().endswith(MIDI_ENDINGS) and not os.path.exists(inputs)


def _are_rows(ids, masks) -> bool:
    """Whether ids to be padded are rows of six: `(N, 6)`, or several such; else they are flat."""
    depth = np.ndim(ids[0]) if len(ids) else 0
    if depth != 1 or any(len(row) != len(FIELDS) for row in ids):
        return depth > 1
    return not isinstance(ids, list) or not isinstance(ids[0], list) or (masks is not None and np.ndim(masks) == 1)


def _is_row(ids: Sequence) -> bool:
    """Whether these are six ids, each of its own vocabulary."""
    return len(ids) == len(FIELDS) and all(0 <= i < size for i, size in zip(ids, VOCAB_SIZES, strict=True))


def _edges(start: float, end: float, is_last: bool) -> tuple[int, int]:
    """Edges of a window in ticks. An end off the grid is rounded up so that it cuts nothing off."""
    on_grid = [abs(edge / GRID_S - round(edge / GRID_S)) < 1e-6 for edge in (start, end) if math.isfinite(edge)]
    if not (on_grid and on_grid[0] and (is_last or all(on_grid) and math.isfinite(end)) and 0 <= start < end):
        raise MidiError(f"window {start} to {end} s: give multiples of {GRID_S} s (only the last end is free)")
    right = math.ceil(end * TICKS_PER_SECOND - 1e-6) if math.isfinite(end) else 2**40
    return round(start * TICKS_PER_SECOND), right


def _continued(events: np.ndarray, edge: int | None) -> np.ndarray:
    """Events of one window, as for `_rows`, those of more than 6 s in parts of 6 s. They go on until their key is
    struck again or the axis ends; of several of one key at one tick the last one does, whose state the key has.

    A row of 6 s that ends at the `edge` to another window, if any, is a tick shorter: it would seem to be continued by
    what is held there.
    """
    events, more = events.copy(), []
    for i in np.flatnonzero(events[:, 2] > MAX_DURATION):
        pitch, velocity, duration, age, tick = events[i].tolist()
        later = events[i + 1 :][events[i + 1 :, 0] == pitch, 4]
        end = min(tick + duration, AXIS, *later[later > tick])
        begins = range(tick, end, MAX_DURATION)
        if len(begins) > 1 and tick not in later:
            events[i, 2] = MAX_DURATION
            more += [(pitch, velocity, min(end - t, MAX_DURATION), age + t - tick, t) for t in begins[1:]]
    if more:
        events = np.concatenate([events, more])
        events = events[np.lexsort((events[:, 3] == 0, events[:, 4]))]  # stable; held before struck
    events[(events[:, 2] >= MAX_DURATION) & (events[:, 4] + MAX_DURATION == edge), 2] = MAX_DURATION - 1
    return events


def _joined(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows `(N, 6)` without special tokens: which do not continue another, and how long each of those is, in
    ticks."""
    tick, duration = rows[:, 5] * TICKS_PER_BAR + rows[:, 4], rows[:, 2] + 1
    is_first, lengths = np.ones(len(rows), bool), duration.copy()
    full = {}  # key and end, in ticks, of a row of 6 s -> the row that its note begins with
    for i in np.argsort(tick, kind="stable"):
        begun = full.pop((rows[i, 0], tick[i]), None) if rows[i, 3] == 0 else None
        first = i if begun is None else begun
        is_first[i], lengths[first] = begun is None, tick[i] + duration[i] - tick[first]
        if duration[i] == MAX_DURATION:
            full[rows[i, 0], tick[i] + MAX_DURATION] = first
    return is_first, lengths[is_first]


def _rows(events: np.ndarray) -> np.ndarray:
    """Events (N, 5) of pitch, velocity, duration, age (0: struck) and tick -> rows of ids (N, 6)."""
    pitch, velocity, duration, age, tick = events.T
    if len(tick) and tick.max() >= AXIS:
        raise MidiError(
            f"a note begins at {tick.max() / TICKS_PER_SECOND:.1f} s, one sequence holds {SEQUENCE_SECONDS} s; "
            "cut the music into windows (`encode_notes`)"
        )
    struck = age == 0
    ioi = -np.minimum(age, MAX_AGE)
    ioi[struck] = np.minimum(np.diff(tick[struck], prepend=tick[struck][:1]), TICKS_PER_BAR - 1)
    values = (
        pitch - PITCH_MIN,
        np.minimum(velocity // 2, 63),
        np.minimum(duration, MAX_DURATION) - 1,
        ioi + TICKS_PER_BAR,
        tick % TICKS_PER_BAR,
        tick // TICKS_PER_BAR,
    )
    rows = np.stack(values, 1) + NUM_SPECIAL
    if ((rows < NUM_SPECIAL) | (rows >= VOCAB_SIZES)).any() or (ioi[struck] < 0).any():
        raise MidiError("notes are unsorted, or hold a key or velocity that the piano does not have")
    return rows


def _stack(arrays: list[np.ndarray], length: int, left: bool) -> np.ndarray:
    """Pad with zeros to `length` along the first axis and stack."""
    out = np.zeros((len(arrays), length, *arrays[0].shape[1:]), np.int64)
    for row, array in zip(out, arrays, strict=True):
        row[length - len(array) if left else 0 :][: len(array)] = array
    return out
