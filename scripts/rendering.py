# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Pieces on their way to audio: windows of several pieces side by side, finished ones kept, in bounded memory."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from modeling_midivalle import CodecStream
from modeling_midivalle.sampling_midivalle import last_frames, pad_codes, window_seed
from scripts.journal import Journal

ATTEMPT_STEP = 1_000_000  # attempt a at window w draws with the seed of window w + 1,000,000 a
RETRY = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}  # where nothing is drawn the first time


@dataclass(eq=False)
class Job:
    """One performance on its way to its outputs.

    Attributes:
        performance (`Performance`), windows (`list[tuple[float, float]]`), prompt (`Prompt`, *optional*): Of a
            `MidiValleProcessor`.
        prompt_codes (`torch.LongTensor` of shape `(1, K, P)`): The prompt, encoded.
        seed (`int`): Of the piece.
        sinks (`list`): Take audio with `write`: `AudioWriter`, `PcmStream`; none for a piece that is computed along.
        journal (`Journal`, *optional*): Keeps finished windows, and holds those of an interrupted render.
        planned (`list[int]`): Attempt that is kept of each window, where a manifest says so.
        attempts (`list[int]`), codes (`list[torch.LongTensor]`): Kept attempt and codes `(1, K, T)` of what is done.
    """

    performance: object
    windows: list[tuple[float, float]]
    prompt: object
    prompt_codes: torch.LongTensor
    seed: int
    sinks: list = field(default_factory=list)
    journal: Journal | None = None
    planned: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    codes: list[torch.LongTensor] = field(default_factory=list)
    is_mate: bool = False  # only computed along, so that the others get the same bits as in the same batch before
    is_exact: bool = True  # its length is that of its windows; else the model's (`compat`)
    resumed: int = 0
    samples: int = 0
    digest: object = field(default_factory=hashlib.sha256)
    stream: CodecStream | None = None

    @property
    def done(self) -> int:
        """Finished windows."""
        return len(self.codes)

    def start(self, codec) -> None:
        """Decode the windows that an interrupted render has left."""
        self.stream = CodecStream(codec)
        for attempt, codes in self.journal.windows if self.journal else []:
            self._add(attempt, torch.from_numpy(codes)[None].to(self.prompt_codes.device))
        self.resumed = self.done

    def add(self, attempt: int, codes: torch.LongTensor) -> None:
        """Take the next window `(1, K, T)`: keep it, decode it, hand its audio on."""
        if self.journal:
            self.journal.append(attempt, codes[0].cpu().numpy())
        self._add(attempt, codes)

    def _add(self, attempt: int, codes: torch.LongTensor) -> None:
        self.attempts.append(attempt)
        self.codes.append(codes)
        is_last = self.done == len(self.windows)
        wave = self.stream.push(codes, is_last)[0, 0].cpu().numpy()
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
        for codes in reversed(self.codes):
            if found >= frames:
                break
            recent.insert(1, codes)
            found += codes.shape[-1]
        return last_frames(torch.cat(recent, -1), frames)


def frames_of(windows: list[tuple[float, float]]) -> list[int]:
    """Codec frames of each window."""
    return [math.ceil((end - start) * 50 - 1e-6) for start, end in windows]


@torch.no_grad()
def generate_window(
    model, processor, jobs: list[Job], window: int, attempt: int, sampling: dict
) -> list[torch.LongTensor]:
    """Codes `(1, K, T)` of window number `window` of each job; of a piece alone as `model.generate_stream` has them."""
    columns = zip(*((job.performance, *job.windows[window], job.prompt) for job in jobs), strict=True)
    inputs = processor.window_inputs(*map(list, columns)).to(model.device)
    contexts = [job.context(int(frames)) for job, frames in zip(jobs, inputs["context_frames"], strict=True)]
    if attempt and sampling.get("temperature") is None:
        sampling = sampling | RETRY
    codes = model.generate_codes(
        inputs["input_ids"],
        inputs["attention_mask"],
        *pad_codes([job.prompt_codes for job in jobs]),
        inputs["target_frames"],
        *pad_codes(contexts),
        seed=[window_seed(job.seed, window + ATTEMPT_STEP * attempt) for job in jobs],
        **sampling,
    )
    if sampling.get("compat"):
        return [codes]
    return [new[..., :frames] for new, frames in zip(codes.split(1), inputs["target_frames"].tolist(), strict=True)]


def render_jobs(
    model, processor, jobs: list[Job], sampling: dict, judge: Callable | None = None
) -> Iterator[tuple[Job, int]]:
    """Render jobs side by side, window number by window number.

    Which pieces share a batch depends on their windows alone, not on what an interrupted render has left: a piece that
    has the window already is computed along, so that the others get the same bits.

    Args:
        model (`MidiValleForConditionalGeneration`), processor (`MidiValleProcessor`): From one model folder.
        jobs (`list[Job]`): A batch.
        sampling (`dict`): Options of `model.generate_codes`.
        judge (callable, *optional*): `judge(job, window, codes, again)` -> (attempt, codes) to keep, where
            `again(attempt)` gives the codes of another attempt.

    Yields:
        `tuple(Job, int)`: a job, and the number of the window that it has just finished.
    """

    def again(job: Job, window: int, attempt: int) -> torch.LongTensor:
        return generate_window(model, processor, [job], window, attempt, sampling)[0]

    for job in jobs:
        job.start(model.codec)
        if job.done == len(job.windows):
            yield job, job.done - 1
    while missing := [job.done for job in jobs if job.done < len(job.windows) and not job.is_mate]:
        mates = [job.done for job in jobs if job.is_mate and min(missing) < len(job.windows)]
        window = min(missing + mates)
        batch = [job for job in jobs if window < len(job.windows)]
        codes = generate_window(model, processor, batch, window, 0, sampling)
        advanced = [(job, new) for job, new in zip(batch, codes, strict=True) if job.done == window]
        for job, new in advanced:
            job.add(*_choose(job, window, new, lambda a, j=job, w=window: again(j, w, a), judge))
        for job, _ in advanced:
            yield job, window


def _choose(job: Job, window: int, codes: torch.LongTensor, again: Callable, judge: Callable | None):
    """Attempt and codes to keep: what a manifest says, else what the judge says, else the first."""
    if job.planned:
        attempt = job.planned[window]
        return attempt, again(attempt) if attempt else codes
    return (0, codes) if judge is None else judge(job, window, codes, again)


class Collected(list):
    """A sink that keeps the audio."""

    write = list.append


def render_wave(model, processor, performance, prompt, seed: int, ring_out: float, sampling: dict) -> np.ndarray:
    """A performance after a prompt as one wave `(samples,)`."""
    windows, sink = processor.windows(performance, ring_out), Collected()
    job = Job(performance, windows, prompt, encode_prompt(model, prompt), seed, sinks=[sink])
    for _ in render_jobs(model, processor, [job], sampling):
        pass
    return np.concatenate(sink)


def encode_prompt(model, prompt) -> torch.LongTensor:
    """Codes `(1, K, P)` of a `Prompt`; P = 0 for None."""
    if prompt is None:
        return torch.zeros(1, model.config.ar_config.num_codebooks, 0, dtype=torch.long, device=model.device)
    return model.codec.encode_codes(torch.from_numpy(np.ascontiguousarray(prompt.wave))[None, None].to(model.device))
