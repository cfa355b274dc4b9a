# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Pieces on their way to audio: windows by a plan, side by side, finished ones kept, in bounded memory."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from modeling_midivalle import CodecStream
from modeling_midivalle.generation_midivalle import GeneratedFrames
from modeling_midivalle.modeling_midivalle_frame_notes import PlayedKeys
from modeling_midivalle.recording_midivalle import RecordingChain
from modeling_midivalle.sampling_midivalle import last_frames, pad_codes, window_seed
from processing.processing_midivalle import FRAME_RATE
from scripts.rendering.decoding import Decoding
from scripts.rendering.journal import Journal
from scripts.rendering.scheduling import Size, schedule

ATTEMPT_STEP = 1_000_000  # attempt a at window w draws with the seed of window w + 1,000,000 a
RETRY = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
}  # of a window whose first attempt drew nothing


@dataclass(frozen=True)
class Keys:
    """What is played in the windows of a performance after a prompt; for a model whose codec is told."""

    model: object
    processor: object
    performance: object
    windows: list[tuple[float, float]]
    prompt: object

    def played(self, window: int, frames: int) -> PlayedKeys:
        """What the keys do in the new frames of a window, `(1, frames, 88)`."""
        return self.model.played_keys(*self._rows(window), frames)

    def dynamics(self):
        """What single keys lack in loudness, a `KeyDynamics` or None."""
        return self.model.key_dynamics(self.processor.mean_velocities([self.performance]), 1)[0]

    def played_in_prompt(self, frames: int) -> PlayedKeys:
        """What the keys do in the prompt, `(1, frames, 88)`."""
        ids, mask, first = self._rows(0)
        return self.model.played_keys(ids, mask, torch.zeros_like(first), frames)

    def begin_silent(self) -> bool:
        """Whether nothing sounds until a key is struck."""
        return self.model.begins_silent(*self._rows(0))[0]

    def _rows(self, window: int) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor]:
        """MIDI rows of a window, their mask, and where its new frames begin."""
        inputs = self.processor.window_inputs(self.performance, *self.windows[window], self.prompt)
        inputs = inputs.to(self.model.device)
        return inputs["input_ids"], inputs["attention_mask"], inputs["prompt_lengths"] + inputs["context_frames"]


@dataclass(eq=False)
class Job:
    """One performance on its way to its outputs.

    Attributes:
        performance (`Performance`), windows (`list[tuple[float, float]]`), prompt (`Prompt`, *optional*): Of a
            `MidiValleProcessor`.
        prompt_codes (`torch.LongTensor` of shape `(1, K, P)`): The prompt, encoded.
        recording (`RecordingChain`, *optional*): What its recording adds, see `recording_of`.
        keys (`Keys`, *optional*): What is played, where the model's codec is told.
        seed (`int`): Of the piece.
        carries (`bool`): Windows go on from the codes before them; else each makes its context anew, as a run-in.
        layout (`list[dict]`, *optional*): Of `scripts.rendering.scheduling.layouts`; each window alone if not given.
        opened (callable, *optional*): `opened(job)` before the first window: sets `sinks` and `journal`.
        sinks (`list`): Take audio with `write`: `AudioWriter`, `PcmStream`.
        journal (`Journal`, *optional*): Keeps finished windows, and holds those of an interrupted render.
        planned (`list[int]`): Attempt that is kept of each window, where a manifest says so.
        attempts (`list[int]`), made (`list[GeneratedFrames]`): Kept attempt and frames `(1, ., T)` of what is done.
        error (`ValueError`, *optional*): Why it was given up.
    """

    performance: object
    windows: list[tuple[float, float]]
    prompt: object
    prompt_codes: torch.LongTensor
    seed: int
    recording: RecordingChain | None = None
    keys: Keys | None = None
    sinks: list = field(default_factory=list)
    carries: bool = True
    layout: list[dict] | None = None
    opened: Callable | None = None
    journal: Journal | None = None
    planned: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    made: list[GeneratedFrames] = field(default_factory=list)
    is_exact: bool = True  # its length is that of its windows; else the model's (`compat`)
    error: ValueError | None = None
    resumed: int = 0
    samples: int = 0
    began: float = 0.0  # `time.perf_counter()`
    digest: object = field(default_factory=hashlib.sha256)
    stream: CodecStream | None = None
    decoding: Decoding | None = None

    @property
    def done(self) -> int:
        """Finished windows."""
        return len(self.made)

    def start(self, codec, decoding: Decoding) -> None:
        """Open the outputs, and decode the windows that an interrupted render has left."""
        self.decoding, self.began = decoding, time.perf_counter()
        of_keys = (self.keys.begin_silent(), self.keys.dynamics()) if self.keys else ()
        self.stream = CodecStream(codec, self.recording, *of_keys)
        if self.opened:
            self.opened(self)
        for attempt, *arrays in self.journal.windows if self.journal else []:
            device = self.prompt_codes.device
            kept = [None if array is None else torch.from_numpy(array)[None].to(device) for array in arrays]
            self._add(attempt, GeneratedFrames(*kept))
        self.resumed = self.done

    def add(self, attempt: int, frames: GeneratedFrames) -> None:
        """Take the next window: keep it, decode it, hand its audio on."""
        if self.journal:
            self.journal.append(attempt, *(None if x is None else x[0].cpu().numpy() for x in frames))
        self._add(attempt, frames)

    def _add(self, attempt: int, frames: GeneratedFrames) -> None:
        self.attempts.append(attempt)
        self.made.append(frames)
        is_last, played = self.done == len(self.windows), self.played(self.done - 1, frames.codes)
        self.decoding(lambda: self._decode(frames, is_last, played))

    def played(self, window: int, codes: torch.LongTensor) -> PlayedKeys | None:
        """What the keys do in `codes` `(1, K, T)` of a window, `(1, T, 88)`; None: what the codes say."""
        return self.keys.played(window, codes.shape[-1]) if self.keys else None

    def _decode(self, frames: GeneratedFrames, is_last: bool, played: PlayedKeys | None) -> None:
        wave = self.stream.push(frames.codes, is_last, played, frames.vectors)[0, 0].cpu().numpy()
        if is_last and self.is_exact:
            rate = self.stream.codec.config.sampling_rate
            wave = wave[: round(self.windows[-1][1] * rate) - self.samples]  # the last frame may reach beyond the end
        self.samples += len(wave)
        self.digest.update(wave.tobytes())
        for sink in self.sinks:
            sink.write(wave)

    def context(self, frames: int) -> torch.LongTensor:
        """The last `frames` of what is done, `(1, K, frames)`."""
        recent, found = [self.prompt_codes[..., :0]], 0
        for codes, _ in reversed(self.made):
            if found >= frames:
                break
            recent.insert(1, codes)
            found += codes.shape[-1]
        return last_frames(torch.cat(recent, -1), frames)


def frames_of(windows: list[tuple[float, float]]) -> list[int]:
    """Codec frames of each window."""
    return [math.ceil((end - start) * FRAME_RATE - 1e-6) for start, end in windows]


def window_sizes(processor, performance, windows: list[tuple[float, float]], prompt) -> list[Size]:
    """MIDI rows, context frames and new frames of each window."""
    rows = [len(processor.encode_window(performance, *window, prompt)[0]) for window in windows]
    contexts = [round(processor.context_of(start) * FRAME_RATE) for start, _ in windows]
    return list(zip(rows, contexts, frames_of(windows), strict=True))


@dataclass
class Row:
    """A row of a batch: MIDI rows `(N, 6)`, codes `(1, K, P)` of the prompt and `(1, K, C)` of the context, run-in and
    new frames, and the seed."""

    notes: np.ndarray
    prompt: torch.LongTensor
    context: torch.LongTensor
    run_in: int
    frames: int
    seed: int


def member_rows(processor, members: list[tuple[Job, int]], attempt: int) -> list[Row]:
    """The row of window number w of each (job, w)."""
    columns = zip(*((job.performance, *job.windows[window], job.prompt) for job, window in members), strict=True)
    inputs = processor.window_inputs(*map(list, columns), return_tensors="np")
    rows = []
    for i, (job, window) in enumerate(members):
        notes = inputs["input_ids"][i][inputs["attention_mask"][i] > 0]
        context, frames = int(inputs["context_frames"][i]), int(inputs["target_frames"][i])
        seed = window_seed(job.seed, window + ATTEMPT_STEP * attempt)
        given, run_in = (context, 0) if job.carries else (0, context)
        rows.append(Row(notes, job.prompt_codes, job.context(given), run_in, frames, seed))
    return rows


def filling_row(like: Row, job: Job, size: Size) -> Row:
    """A row of the lengths of `size` whose content does not matter."""
    notes, context, frames = size
    given, run_in = (context, 0) if job.carries else (0, context)
    codes = like.prompt.new_zeros(1, like.prompt.shape[1], given)
    return Row(np.repeat(like.notes[:1], notes, 0), like.prompt, codes, run_in, frames, 0)


def draws(model, sampling: dict) -> bool:
    """Whether two seeds give two versions with these options of `model.generate_frames`."""
    if sampling.get("compat") or sampling.get("do_sample") is not None:
        return bool(sampling.get("compat") or sampling["do_sample"])
    is_given = any(sampling.get(name) is not None for name in ("temperature", "top_k", "top_p"))
    return is_given or bool(model.generation_config.do_sample)


@torch.no_grad()
def generate_windows(
    model, processor, members: list[tuple[Job, int]], sampling: dict, attempt: int = 0, alone: bool = False
) -> list[GeneratedFrames]:
    """Frames `(1, ., T)` of window number w of each (job, w) of one step; of a piece without layout as
    `model.generate_stream` has them. The rows that only the layout knows are filled, `alone` left out."""
    rows, places = member_rows(processor, members, attempt), range(len(members))
    job, window = members[0]
    if job.layout and not alone:
        places = [job.layout[window]["row"] for job, window in members]
        mine = dict(zip(places, rows, strict=True))
        sizes = job.layout[window]["rows"]
        rows = [mine[i] if i in mine else filling_row(rows[0], job, size) for i, size in enumerate(sizes)]
    data = processor.tokenizer.pad({"input_ids": [row.notes for row in rows]}, return_tensors="pt").to(model.device)
    if attempt and not draws(model, sampling):
        sampling = sampling | RETRY
    frames = model.generate_frames(
        data["input_ids"],
        data["attention_mask"],
        *pad_codes([row.prompt for row in rows]),
        torch.tensor([row.run_in + row.frames for row in rows], device=model.device),
        *pad_codes([row.context for row in rows]),
        seed=[row.seed for row in rows],
        **sampling,
    )
    if sampling.get("compat"):
        return [frames]
    return [frames.cut(i, rows[i].run_in, rows[i].run_in + rows[i].frames) for i in places]


def render_jobs(
    model,
    processor,
    jobs: dict[int, Job],
    steps: list[list[tuple[int, int]]],
    sampling: dict,
    judge: Callable | None = None,
    decoding: Decoding | None = None,
) -> Iterator[tuple[Job, int]]:
    """Render jobs by a plan.

    Args:
        model (`MidiValleForConditionalGeneration`), processor (`MidiValleProcessor`): From one model folder.
        jobs (`dict[int, Job]`): By piece; pieces that are not among them are left out. Finished ones are taken out.
        steps (`list`): Of `scripts.rendering.scheduling.schedule`.
        sampling (`dict`): Options of `model.generate_frames`.
        judge (callable, *optional*): `judge(job, window, frames, again)` -> (attempt, frames) to keep, where
            `again(attempt)` gives the frames of another attempt.
        decoding (`Decoding`, *optional*): How audio is made of codes.

    Yields:
        `tuple(Job, int)`: a job, and the number of the window that it has just finished; once more if it failed, with
        its `error`. Where a step cannot be generated, that stops all that share it.
    """
    decoding = decoding or Decoding(model.device)
    for step in steps:
        here = [(jobs[piece], window) for piece, window in step if piece in jobs and not jobs[piece].error]
        for job, _ in here:
            if job.stream is None:
                _guard([job], job.start, model.codec, decoding)
                if not job.error and job.done == len(job.windows):  # its journal held all of it
                    _guard([job], decoding.wait)
                if job.error or job.done == len(job.windows):
                    yield job, job.done - 1
        members = [(job, window) for job, window in here if job.done <= window and not job.error]
        if members:
            _guard([job for job, _ in members], _step, model, processor, members, sampling, judge)
            for job, window in members:
                if job.done == len(job.windows):
                    _guard([job], decoding.wait)
                yield job, window
        for piece, _ in step:
            if piece in jobs and jobs[piece].done == len(jobs[piece].windows):
                del jobs[piece]


def _guard(jobs: list[Job], work: Callable, *arguments) -> None:
    """Do `work(*arguments)`; what it refuses is the error of `jobs`, and so is a GPU that is too small for it."""
    try:
        work(*arguments)
    except (ValueError, torch.OutOfMemoryError) as error:
        is_full = isinstance(error, torch.OutOfMemoryError)
        for job in jobs:
            job.error = ValueError("the GPU's memory is full: give a smaller --batch-size") if is_full else error


def _step(model, processor, members: list[tuple[Job, int]], sampling: dict, judge: Callable | None) -> None:
    """Generate a window of each job, and keep it."""
    for (job, window), new in zip(members, generate_windows(model, processor, members, sampling), strict=True):

        def again(attempt: int, job: Job = job, window: int = window) -> GeneratedFrames:
            return generate_windows(model, processor, [(job, window)], sampling, attempt, alone=True)[0]

        _guard([job], _keep, job, window, new, again, judge)


def _keep(job: Job, window: int, frames: GeneratedFrames, again: Callable, judge: Callable | None) -> None:
    job.add(*_choose(job, window, frames, again, judge))


def _choose(job: Job, window: int, frames: GeneratedFrames, again: Callable, judge: Callable | None):
    """Attempt and frames to keep: what a manifest says, else what the judge says, else the first."""
    if job.planned:
        attempt = job.planned[window]
        return attempt, again(attempt) if attempt else frames
    return (0, frames) if judge is None else judge(job, window, frames, again)


class Collected(list):
    """A sink that keeps the audio."""

    write = list.append


def render_wave(model, processor, performance, prompt, seed: int, ring_out: float, sampling: dict) -> np.ndarray:
    """A performance after a prompt as one wave `(samples,)`."""
    windows, sink, codes = processor.windows(performance, ring_out), Collected(), encode_prompt(model, prompt)
    keys = keys_of(model, processor, performance, windows, prompt)
    recording = recording_of(model, prompt, codes, keys)
    job = Job(performance, windows, prompt, codes, seed, recording, keys, sinks=[sink])
    for _ in render_jobs(model, processor, {0: job}, schedule([len(windows)], 1), sampling):
        if job.error:
            raise job.error
    return np.concatenate(sink)


def encode_prompt(model, prompt) -> torch.LongTensor:
    """Codes `(1, K, P)` of a `Prompt`; P = 0 for None."""
    if prompt is None:
        return torch.zeros(1, model.config.ar_config.num_codebooks, 0, dtype=torch.long, device=model.device)
    return model.codec.encode_codes(torch.from_numpy(np.ascontiguousarray(prompt.wave))[None, None].to(model.device))


def keys_of(model, processor, performance, windows: list[tuple[float, float]], prompt) -> Keys | None:
    """The keys of a performance for models with `keys_from_midi`; None for others."""
    return Keys(model, processor, performance, windows, prompt) if model.config.keys_from_midi else None


def recording_of(
    model, prompt, prompt_codes: torch.LongTensor, keys: Keys | None = None, as_recorded: bool | None = None
) -> RecordingChain | None:
    """What the recording of a `Prompt` adds to its codes, or to what the model with `keys` makes of them; None without
    one, or where model or `as_recorded` say so."""
    if prompt is None or not (model.config.as_recorded if as_recorded is None else as_recorded):
        return None
    wave = torch.from_numpy(np.ascontiguousarray(prompt.wave))
    return model.measure_prompt(wave, prompt_codes, keys and keys.played_in_prompt(prompt_codes.shape[-1]))
