# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""`MidiValleProcessor`: MIDI and an audio prompt -> model inputs, prompt and target on one time axis.

The target's time zero is the end of the prompt's *audio*, on the frame grid. Prompts and windows are multiples of
0.5 s (25 codec frames = 96 MIDI ticks); only the end of the last window is free.
"""

import dataclasses
import math
import os
from typing import TypedDict

import numpy as np
from transformers import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import logging
from transformers.utils.versions import require_version

from .audio_midivalle import MAX_CHANNELS, SAMPLING_RATE, check_wave, read_audio, to_mono_32k, without_dc
from .prompts_midivalle import check_level, check_offset, choose_excerpt
from .windows_midivalle import GRID_S, plan_windows

require_version("transformers>=5.23", "pip install --upgrade transformers")
logger = logging.get_logger(__name__)

FRAME_RATE = 50
MIN_PROMPT_S, MAX_PROMPT_S = 1.0, 15.0
MAX_RING_OUT_S = 10.0
MAX_ONSET_DELAY_S = 0.05
SEQUENCE_S = 32.0  # prompt and window together: 16 bars of 2 s, 1600 codec frames
LOOK_AHEAD_S = 0.5  # notes behind a window's end that it is told of: its last frames are not the last of the music
SILENCE = 1e-3  # a prompt whose peak is lower (-60 dBFS) tells nothing about a piano
LOUDEST = 16.0  # of a float prompt's peak: recordings pass full scale, but not by 24 dB
SLACK = 32  # samples (1 ms) by which a prompt may miss the grid without losing 0.5 s


class ProcessorError(ValueError):
    """Inputs that do not fit together; the message says what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A checked prompt.

    Attributes:
        wave (`np.ndarray` of shape `(samples,)`): float32, 32 kHz, a multiple of 0.5 s.
        notes (`np.ndarray` of shape `(M,)`): its notes, in s from the start of `wave`; later ones may be among them.
        start (`float`): where in the given recording it begins, s.
        offset (`float`): by how much the onsets of its MIDI were corrected, s.
        remark (`str`): what the user should know of it; mostly empty.
        gain_db (`float`): by how much `wave` is louder than the given recording.
    """

    wave: np.ndarray
    notes: np.ndarray
    start: float = 0.0
    offset: float = 0.0
    remark: str = ""
    gain_db: float = 0.0

    @property
    def seconds(self) -> float:
        """Length, a multiple of 0.5 s."""
        return len(self.wave) / SAMPLING_RATE

    @property
    def frames(self) -> int:
        """Length in codec frames, a multiple of 25."""
        return round(self.seconds * FRAME_RATE)


class MidiValleAudioKwargs(TypedDict, total=False):
    """Options of the feature extractor for plain `audio`; its `sampling_rate` is an argument of the call."""

    padding: bool | str | None
    truncation: bool | None
    max_length: int | None
    return_tensors: str | None


class MidiValleProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a call: `return_tensors` of every call, those of tokenizer and feature extractor with `text`."""

    audio_kwargs: MidiValleAudioKwargs


class MidiValleProcessor(ProcessorMixin):
    """MIDI and an audio prompt -> inputs of `MidiValleForConditionalGeneration.generate`.

    A call gives all windows of its pieces. To take them one by one, `load` a performance, plan its `windows`, and take
    the `window_inputs` of each.

    Args:
        feature_extractor (`EncodecFeatureExtractor`): mono, 32 kHz.
        tokenizer (`MidiValleTokenizer`): also reads the MIDI files; its `sustain` is the default of this processor.
        max_prompt_seconds (`float`, defaults to 8.0):
            Of a longer recording the part is used that shows most of the piano (`choose_excerpt`). At most 15 s.
        max_window_seconds (`float`, defaults to 20.0):
            Longest window, the longest target that the model was trained on; with the prompt at most 32 s.
        context_seconds (`float`, defaults to 4.0):
            How much of its music before a window is conditioned on: a multiple of 0.5 s; it is part of the window.
        onset_delay_seconds (`float`, defaults to 0.0):
            By how much earlier than its MIDI the model is heard to strike: the notes that are to be rendered, not those
            of prompts, are given to it so much later. At most 0.05 s either way.
        correct_level (`bool`, defaults to `False`):
            Whether a prompt's recording that is much softer or louder than the velocities of its MIDI tell is brought
            to a usual level (`check_level`): for a model that has learned from recordings of such levels alone.
        chat_template (`str`, *optional*): As of any processor; MIDI has no use for it.
    """

    valid_processor_kwargs = MidiValleProcessorKwargs
    text_kwargs = {"padding": True, "return_tensors": "pt"}
    audio_kwargs = {"return_tensors": "pt"}

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        max_prompt_seconds=8.0,
        max_window_seconds=20.0,
        context_seconds=4.0,
        onset_delay_seconds=0.0,
        correct_level=False,
        chat_template=None,
    ):
        longest = min(MAX_PROMPT_S, SEQUENCE_S - max_window_seconds)
        if not MIN_PROMPT_S <= max_prompt_seconds <= longest < SEQUENCE_S:
            raise ValueError(
                f"max_prompt_seconds {max_prompt_seconds} must be {MIN_PROMPT_S} to {MAX_PROMPT_S}, and with "
                f"max_window_seconds {max_window_seconds} at most {SEQUENCE_S}"
            )
        if context_seconds % GRID_S or not 0 <= context_seconds <= max_window_seconds - 2 * LOOK_AHEAD_S - GRID_S:
            raise ValueError(
                f"context_seconds {context_seconds} must be a multiple of {GRID_S} s and leave room for new frames in "
                f"max_window_seconds {max_window_seconds}"
            )
        if not abs(onset_delay_seconds) <= MAX_ONSET_DELAY_S:  # also what is not a number
            raise ValueError(f"onset_delay_seconds {onset_delay_seconds} must be within {MAX_ONSET_DELAY_S} s")
        self.max_prompt_seconds, self.max_window_seconds = max_prompt_seconds, max_window_seconds
        self.context_seconds, self.onset_delay_seconds = context_seconds, onset_delay_seconds
        self.correct_level = correct_level
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        midi=None,
        prompt_midi=None,
        prompt_audio=None,
        sampling_rate=None,
        start=None,
        end=None,
        sustain=None,
        text: str | list[str] | None = None,
        audio: np.ndarray | list[np.ndarray] | None = None,
        **kwargs: Unpack[MidiValleProcessorKwargs],
    ) -> BatchFeature:
        """Make the inputs of one piece of any length, or of several: all their windows.

        With a list of MIDI inputs every other argument may be a list of the same length, or one value for all.

        Args:
            midi (path, `bytes`, binary file, `symusic.Score` or a loaded performance; or a list):
                What is to be rendered.
            prompt_midi (as `midi`, *optional*): The notes of the prompt, in time with its audio.
            prompt_audio (path, `bytes`, binary file or array, *optional*):
                Recording of the prompt: WAV or FLAC of any rate, or an array, CPU tensor or list of numbers
                `(samples,)`, an array or tensor `(samples, channels)` or `(channels, samples)`, or what `datasets`
                gives of an `Audio` column. At least 1 s; a multiple of 0.5 s up to `max_prompt_seconds` is used (see
                `prepare_prompt`).
            sampling_rate (`int`, *optional*): Rate of an array, Hz. Files know theirs.
            start, end (`float`, *optional*):
                Span of `midi` in s; by default from 0 to the end of the last sounding note. It may end up to
                10 s later.
            sustain (`str`, *optional*): `"extend"` or `"ignore"`; the tokenizer's by default.
            text, audio (*optional*):
                Instead of `midi`, inputs of tokenizer and feature extractor as they are: texts of MIDI tokens
                (`"Pitch_60 Velocity_63"`) become flat ids, waves at 32 kHz the codec's input. Neither makes a window.
            return_tensors (`str`, defaults to `"pt"`): `"pt"` or `"np"`.
            **kwargs: With `text` or `audio`, the options of tokenizer (padded by default) and feature extractor.

        Returns:
            `BatchFeature`, of B pieces with W windows together: `input_ids (W, N, 6)`, `attention_mask (W, N)`;
            `target_frames (W,)` and `context_frames (W,)`, codec frames; `window_counts (B,)`, `prompt_lengths (B,)`;
            `mean_velocities (B,)`, over 127; with prompts `input_values (B, 1, L)`, `padding_mask (B, L)`.

        Raises:
            `ValueError` (`MidiError`, `AudioError` or `ProcessorError`): one sentence on what cannot be used.
        """
        if midi is None and (text is not None or audio is not None):
            if not all(value is None for value in (prompt_midi, prompt_audio, start, end, sustain)):
                raise ProcessorError(
                    "prompt_midi, prompt_audio, start, end and sustain need midi; give it, or leave them"
                )
            return self._process_parts(text, audio, sampling_rate, **kwargs)
        if midi is None:
            raise ProcessorError("midi is missing; give the MIDI that is to be rendered")
        return_tensors = kwargs.pop("return_tensors", None) or "pt"
        if text is not None or audio is not None or kwargs:
            others = ", ".join([*kwargs] or ["text and audio"])
            raise ProcessorError(f"{others}: not an argument beside midi; the prompt's audio is prompt_audio")
        midis = list(midi) if isinstance(midi, (list, tuple)) else [midi]
        if not midis:
            raise ProcessorError("midi is an empty list; give at least one MIDI input")
        if isinstance(prompt_audio, (list, tuple)) and prompt_audio and _is_number(prompt_audio[0]):
            prompt_audio = [prompt_audio] * len(midis)  # samples, not prompts
        prompt_arguments = (prompt_midi, prompt_audio, sampling_rate, sustain)
        if any(isinstance(value, (list, tuple)) for value in prompt_arguments):
            columns = [_per_item(value, len(midis)) for value in prompt_arguments]
            prompts = [self.prepare_prompt(*item) for item in zip(*columns, strict=True)]
        else:
            prompts = [self.prepare_prompt(*prompt_arguments)] * len(midis)
        for remark in dict.fromkeys(prompt.remark for prompt in prompts if prompt is not None and prompt.remark):
            logger.warning(remark)
        columns = [_per_item(value, len(midis)) for value in (sustain, start, end)]
        performances, items, counts = [], [], []
        for midi, prompt, mode, first, last in zip(midis, prompts, *columns, strict=True):
            performance = self.load(midi, mode, start=first, end=last)
            ring_out = 0.0 if last is None else last - (first or 0.0) - performance.end
            if ring_out > MAX_RING_OUT_S:
                after = f"is more than {MAX_RING_OUT_S:g} s after the last note of {performance.name} has ended"
                raise ProcessorError(f"end {last:g} s {after}, at {(first or 0.0) + performance.end:.2f} s")
            windows = self.windows(performance, max(ring_out, 0.0))
            performances.append(performance)
            items += [(performance, *window, prompt) for window in windows]
            counts.append(len(windows))
        data = self._windows(items) | {"window_counts": np.array(counts)} | self._prompts(prompts)
        data["mean_velocities"] = self.mean_velocities(performances)
        return BatchFeature(data, return_tensors)

    def load(self, midi, sustain: str | None = None, start: float | None = None, end: float | None = None):
        """Read a MIDI input and cut a span out of it.

        Args:
            midi (path, `bytes`, binary file, `symusic.Score` or a loaded performance): What to read.
            sustain (`str`, *optional*): `"extend"` or `"ignore"`; the tokenizer's by default. Not for a performance.
            start, end (`float`, *optional*):
                Span in s, anywhere. `start` becomes time zero (a note that already sounds there has a negative
                onset); at `end` notes are clipped.

        Returns:
            `Performance` (of the tokenizer's package) with the notes of the span.

        Raises:
            `ValueError`: `MidiError` for an unusable file, `ProcessorError` for a span without notes.
        """
        if not dataclasses.is_dataclass(midi):
            midi = self.tokenizer.load_performance(midi, sustain)
            if midi.warning:
                logger.warning(midi.warning)
        if not len(midi.notes):
            raise ProcessorError(f"{midi.name}: holds no notes; give a performance with some")
        if start is None and end is None:
            return midi
        start, end = start or 0.0, math.inf if end is None else end
        if not (_is_number(start) and _is_number(end) and 0 <= start < end):
            stretch = f"start {start!r}" + (f" and end {end!r}" if end != math.inf else "")
            raise ProcessorError(f"{stretch}: give numbers of seconds, 0 <= start < end")
        notes, ends = midi.notes, np.minimum(midi.notes["onset"] + midi.notes["duration"], end)
        inside = (notes["onset"] < end) & (ends > start)
        notes = notes[inside].copy()
        if ends[inside].max(initial=start) - start < 1 / SAMPLING_RATE:
            span = f"from {start} s on" if end == math.inf else f"between {start} and {end} s"
            raise ProcessorError(f"{midi.name}: no note sounds {span}; its notes end at {midi.end:.3f} s")
        notes["duration"] = np.minimum(notes["duration"], end - notes["onset"])
        notes["onset"] -= start
        return dataclasses.replace(midi, notes=notes)

    def prepare_prompt(
        self, prompt_midi=None, prompt_audio=None, sampling_rate: float | None = None, sustain: str | None = None
    ) -> Prompt | None:
        """Check a prompt, correct its offset and level, and take the best part of it; arguments as in `__call__`.

        An offset between recording and MIDI of 20 to 300 ms is corrected, and with `correct_level` a level that the
        velocities do not explain; `remark` of the result says so, or that recording and MIDI do not seem to belong
        together. None if neither MIDI nor audio is given.

        Raises:
            `ValueError`: `ProcessorError` for one without the other, under 1 s, silence, or no note inside.
        """
        if prompt_midi is None and prompt_audio is None:
            return None
        if prompt_midi is None or prompt_audio is None:
            given, missing = ("MIDI", "audio") if prompt_audio is None else ("audio", "MIDI")
            raise ProcessorError(f"a prompt needs its audio and its MIDI: only the {given} is given, add the {missing}")
        name = os.path.basename(prompt_audio) if isinstance(prompt_audio, (str, os.PathLike)) else "prompt audio"
        wave = self.read_prompt(prompt_audio, sampling_rate)
        performance = self.load(prompt_midi, sustain)
        offset, remark = check_offset(wave, performance.notes, name)
        notes = performance.notes.copy()
        notes["onset"] += offset
        seconds, start = self._prompt_seconds(wave), 0.0
        if len(wave) / SAMPLING_RATE >= seconds + GRID_S:
            start = choose_excerpt(wave, notes, seconds)
            used = f"{name}: {start:g} to {start + seconds:g} s are used"
            remark = f"{remark}; {used.removeprefix(f'{name}: ')}" if remark else used
        wave = np.pad(wave, (0, SLACK))[round(start * SAMPLING_RATE) :][: round(seconds * SAMPLING_RATE)]
        wave = without_dc(wave)
        notes = notes[notes["onset"] + notes["duration"] > start]
        notes["onset"] -= start
        if np.abs(wave).max() < SILENCE:
            raise ProcessorError(
                f"{name}: the {seconds} s of the prompt are silence; give one in which the piano sounds"
            )
        if not ((notes["onset"] >= 0) & (notes["onset"] < seconds)).any():
            raise ProcessorError(f"{performance.name}: no note begins in the {seconds} s of the prompt's audio")
        gain, said = check_level(wave, notes, name) if self.correct_level else (0.0, "")
        remark = f"{remark}; {said.removeprefix(f'{name}: ')}" if remark and said else remark or said
        return Prompt(wave * np.float32(10 ** (gain / 20)), notes, start, offset, remark, gain)

    def read_prompt(self, prompt_audio, sampling_rate: float | None = None) -> np.ndarray:
        """A recording, of any form that `__call__` takes, as wave `(samples,)`, 32 kHz; ProcessorError if it is under
        1 s or silent."""
        name = os.path.basename(prompt_audio) if isinstance(prompt_audio, (str, os.PathLike)) else "prompt audio"
        wave = to_mono_32k(*self._read_wave(prompt_audio, sampling_rate, name))
        if len(wave) < MIN_PROMPT_S * SAMPLING_RATE - SLACK:
            raise ProcessorError(
                f"{name}: lasts {len(wave) / SAMPLING_RATE:.3f} s; a prompt needs at least {MIN_PROMPT_S} s"
            )
        if np.abs(wave).max() < SILENCE:
            raise ProcessorError(f"{name}: is silence, or its channels cancel; give a prompt in which the piano sounds")
        return wave

    def _prompt_seconds(self, wave: np.ndarray) -> float:
        """How much of a recording is used, a multiple of 0.5 s."""
        return min((len(wave) + SLACK) / SAMPLING_RATE, self.max_prompt_seconds) // GRID_S * GRID_S

    def windows(self, performance, ring_out: float = 2.0) -> list[tuple[float, float]]:
        """Windows that cover a performance and its ring-out: a short one first, then longer ones (see `plan_windows`).

        Args:
            performance (`Performance`): From `load`, or any input of it.
            ring_out (`float`): Silence and reverberation after the end of the last sounding note, 0 to 10 s.

        Returns:
            `list[tuple[float, float]]`: start and end in s, for `window_inputs`. The last end is off the grid.
        """
        longest = (self.max_window_seconds - self.context_seconds - LOOK_AHEAD_S) // GRID_S * GRID_S
        limit = min(MAX_RING_OUT_S, longest - GRID_S)  # it fits into the last window
        if not 0 <= ring_out <= limit:
            raise ProcessorError(f"a ring-out of {ring_out} s is not possible; choose 0 to {limit} s")
        performance = self.load(performance)
        return plan_windows(performance.notes, performance.end + ring_out, longest)

    def window_inputs(
        self, performance, start: float, end: float, prompt: Prompt | None = None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Inputs of one of the `windows` of a performance, after a prompt of `prepare_prompt`; as in `__call__`, but
        without `window_counts` and `mean_velocities`, which are of pieces. With a list of performances, of one window
        of each, by lists of the other arguments or one value for all."""
        performances = [self.load(p) for p in (performance if isinstance(performance, list) else [performance])]
        columns = [performances, *(_per_item(value, len(performances)) for value in (start, end, prompt))]
        data = self._windows(list(zip(*columns, strict=True))) | self._prompts(columns[3])
        return BatchFeature(data, return_tensors)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As [`ProcessorMixin.save_pretrained`], whose note for the folder, the map of its code, is taken off again."""
        files = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        vars(self).pop("auto_map", None)  # loading does not set it: a loaded processor would differ from its original
        return files

    def _process_parts(self, text, audio, sampling_rate: int | None, **kwargs) -> BatchFeature:
        """Texts through the tokenizer, waves through the feature extractor."""
        options = self._merge_kwargs(
            MidiValleProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        data = {}
        if text is not None:
            data |= self.tokenizer(text=text, **options["text_kwargs"])
        if audio is not None:
            rate = SAMPLING_RATE if sampling_rate is None else sampling_rate
            data |= self.feature_extractor(audio, sampling_rate=rate, **options["audio_kwargs"])
        return BatchFeature(data)

    @staticmethod
    def mean_velocities(performances: list) -> np.ndarray:
        """Mean velocity of the notes of each performance, over 127, `(B,)`."""
        return np.array([performance.notes["velocity"].mean() / 127 for performance in performances], np.float32)

    def context_of(self, start: float) -> float:
        """How much of its own music, s, a window that begins at `start` s is conditioned on."""
        return min(start, self.context_seconds)

    def _prompts(self, prompts: list[Prompt | None]) -> dict[str, np.ndarray]:
        """Padded inputs of one prompt a piece."""
        if None in prompts and any(prompt is not None for prompt in prompts):
            raise ProcessorError("only some items of the batch have a prompt; give one to every item or to none")
        if prompts[0] is None:
            return {"prompt_lengths": np.zeros(len(prompts), np.int64)}
        waves = [prompt.wave for prompt in prompts]
        data = self.feature_extractor(waves, sampling_rate=SAMPLING_RATE, return_tensors="np")
        return {"prompt_lengths": np.array([prompt.frames for prompt in prompts]), **data}

    def _windows(self, items: list[tuple]) -> dict[str, np.ndarray]:
        """Items of (performance, start, end, prompt) -> padded inputs of windows."""
        data = dict(self.tokenizer.pad({"input_ids": [self._rows(*item) for item in items]}, return_tensors="np"))
        data["target_frames"] = np.array([math.ceil((end - start) * FRAME_RATE - 1e-6) for _, start, end, _ in items])
        contexts = [self.context_of(start) for _, start, _, _ in items]
        return data | {"context_frames": np.array([round(seconds * FRAME_RATE) for seconds in contexts])}

    def encode_window(self, performance, start: float, end: float, prompt: Prompt | None = None):
        """MIDI rows `(N, 6)` of prompt, context, new frames and a little of what follows; and the tokenizer's report
        (`held_left_out`, `clipped_durations`)."""
        if not (_is_number(start) and _is_number(end) and 0 <= start < end):
            raise ProcessorError(f"{performance.name}: window {start} to {end} s: give numbers, 0 <= start < end")
        first = start - self.context_of(start)
        if end - first > self.max_window_seconds + 1e-6:
            raise ProcessorError(
                f"{performance.name}: {end - first:.3f} s of context and new music; one window holds up to "
                f"{self.max_window_seconds} s: plan the `windows` of a performance"
            )
        before = [] if prompt is None else [(prompt.notes, 0.0, prompt.seconds)]
        room = SEQUENCE_S - (0.0 if prompt is None else prompt.seconds)
        segment = (self._delayed(performance.notes), first, min(end + LOOK_AHEAD_S, first + room))
        return self.tokenizer.encode_notes([*before, segment], return_report=True)

    def _delayed(self, notes: np.ndarray) -> np.ndarray:
        """Notes that are struck `onset_delay_seconds` later and end when they ended, or live as briefly as may be."""
        if not self.onset_delay_seconds:
            return notes
        notes = notes.copy()
        notes["onset"] += self.onset_delay_seconds
        notes["duration"] = np.maximum(notes["duration"] - self.onset_delay_seconds, 1 / FRAME_RATE)
        return notes

    def _rows(self, performance, start: float, end: float, prompt: Prompt | None) -> np.ndarray:
        rows, report = self.encode_window(performance, start, end, prompt)
        if report["held_left_out"]:
            logger.warning(
                f"{performance.name}: notes that sound at {start - self.context_of(start)} s are left out "
                f"there ({report['held_left_out']}): this model knows no held notes"
            )
        return rows

    def _read_wave(self, audio, sampling_rate: float | None, name: str) -> tuple[np.ndarray, float]:
        """A file, bytes, array or tensor -> float wave `(samples,)` or `(samples, channels)` and its rate."""
        if isinstance(audio, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(audio, "read"):
            return _read_file(audio, name)
        if isinstance(audio, dict) and {"array", "sampling_rate"} <= set(audio):  # as `datasets` gave it before 4.0
            audio, sampling_rate = audio["array"], audio["sampling_rate"]
        elif isinstance(audio, dict):  # as it gives what it does not decode
            if not (source := audio.get("bytes") or audio.get("path")):
                raise ProcessorError("prompt_audio is a dict without array and sampling_rate, bytes or path; give one")
            return _read_file(source, name)
        elif hasattr(audio, "get_all_samples"):  # an `AudioDecoder`, as it gives from 4.0 on
            samples = audio.get_all_samples()
            audio, sampling_rate = samples.data, samples.sample_rate
        if hasattr(audio, "detach"):  # a tensor; NumPy has no bfloat16
            audio = audio.detach().cpu()
            audio = audio.float() if audio.is_floating_point() else audio
        try:
            wave = np.asarray(audio)
        except ValueError as error:
            raise ProcessorError(
                "prompt_audio is a list of unlike parts; give samples, and sampling_rate beside them"
            ) from error
        if sampling_rate is None:
            raise ProcessorError("prompt_audio is an array; give its sampling_rate in Hz too")
        if wave.ndim not in (1, 2) or wave.dtype.kind not in "fi":
            raise ProcessorError(
                f"prompt_audio has shape {wave.shape} and type {wave.dtype}; give float or signed samples, 1 or 2 axes"
            )
        if wave.ndim == 2 and wave.shape[0] < wave.shape[1]:
            wave = wave.T  # channels first
        if wave.ndim == 2 and wave.shape[1] > MAX_CHANNELS:
            raise ProcessorError(
                f"prompt_audio has {wave.shape[1]} channels (limit {MAX_CHANNELS}); give the prompts of several pieces "
                "as a list"
            )
        if wave.dtype.kind == "i" and wave.dtype.itemsize > 4:
            raise ProcessorError(
                f"prompt_audio has type {wave.dtype}; give int16 or int32 samples, or floats up to 1.0"
            )
        if wave.dtype.kind == "i":
            wave = wave / -float(np.iinfo(wave.dtype).min)
        else:
            _check_level(wave, "prompt_audio")
        return check_wave(wave, sampling_rate, name), sampling_rate


def _per_item(value, count: int) -> list:
    """A list of `count` values: `value` itself, or the same value for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ProcessorError(
            f"the number of MIDI inputs is {count}, but a list beside them has {len(value)}; give as many, or one value"
            " for all"
        )
    return list(value)


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating))


def _read_file(source, name: str) -> tuple[np.ndarray, float]:
    """Float wave `(samples,)` or `(samples, channels)`, full scale 1.0, and rate, Hz, of what `read_audio` takes."""
    wave, sampling_rate = read_audio(source, name)
    _check_level(wave, name)
    return wave, sampling_rate


def _check_level(wave: np.ndarray, name: str) -> None:
    """ProcessorError if `wave`, of floats, is far beyond full scale."""
    peak = np.abs(wave).max(initial=0)
    if LOUDEST < peak < math.inf:
        raise ProcessorError(f"{name} reaches {peak:.0f}, but full scale is 1.0: divide 16-bit samples by 32768")


__all__ = ["MidiValleProcessor", "MidiValleProcessorKwargs", "ProcessorError", "Prompt"]
