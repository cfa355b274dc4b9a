# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Self-check and repair of a render: each window is transcribed and held against its MIDI; a bad one is tried again."""

from collections.abc import Callable

import numpy as np
import torch

from modeling_midivalle import CodecStream
from modeling_midivalle.generation_midivalle import GeneratedFrames
from modeling_midivalle.modeling_midivalle_frame_notes import PlayedKeys
from processing.processing_midivalle import FRAME_RATE
from scripts.measuring.note_onsets.scores import match_onsets
from scripts.rendering.pieces import Job

CONTEXT_S = 2.0  # audio before a window that the transcriber hears too
EDGE_S = 0.3  # the last onsets of a window are judged with the next one, where they can be heard out
TOLERANCE_S, SHIFTED_S = 0.05, 0.15  # a note within the first is right, within the second shifted, else missing


class Verifier:
    """Judge of `scripts.rendering.pieces.render_jobs`.

    Args:
        codec (`PianoEncodecModel`): To hear the codes.
        transcriber (callable): `transcriber(wave, sampling_rate)` -> notes in s.
        retries (`int`): How often a window below the threshold is generated again, with other draws.
        threshold (`float`): Onset F1 (50 ms) from which a window is good.
    """

    def __init__(self, codec, transcriber: Callable, retries: int, threshold: float):
        self.codec, self.transcriber, self.retries, self.threshold = codec, transcriber, retries, threshold
        self.reports = {}  # id of a job -> reports of its windows

    def __call__(self, job: Job, window: int, frames: GeneratedFrames, again: Callable) -> tuple[int, GeneratedFrames]:
        """The best of at most 1 + `retries` attempts at a window, and its number."""
        tried = [(self.check(job, window, frames), frames)]
        while len(tried) <= self.retries and tried[-1][0]["f1"] is not None and tried[-1][0]["f1"] < self.threshold:
            frames = again(len(tried))
            tried.append((self.check(job, window, frames), frames))
        best = max(range(len(tried)), key=lambda i: tried[i][0]["f1"] if tried[i][0]["f1"] is not None else 1.0)
        report = tried[best][0] | {"attempts": [found["f1"] for found, _ in tried], "kept": best}
        self.reports.setdefault(id(job), {})[window] = report
        return best, tried[best][1]

    def check(self, job: Job, window: int, frames: GeneratedFrames) -> dict:
        """Report on one window with `frames`: its onset F1 (None without notes) and what is wrong."""
        rate = self.codec.config.sampling_rate
        start, end = job.windows[window]
        earliest = max(w for w in range(window + 1) if w == 0 or job.windows[w][0] <= start - CONTEXT_S)
        heard = {w: job.made[w] for w in range(earliest, window)} | {window: frames}
        codes = torch.cat([part.codes for part in heard.values()], -1)
        new = frames.codes.shape[-1]
        size = min(codes.shape[-1], new + round(CONTEXT_S * FRAME_RATE))  # the frames before are the context
        keys = vectors = None
        if job.keys:
            parts = zip(*(job.played(w, part.codes) for w, part in heard.items()), strict=True)
            keys = PlayedKeys(*(torch.cat(part, 1)[:, -size:] for part in parts))
        if frames.vectors is not None:
            vectors = torch.cat([part.vectors for part in heard.values()], -1)[..., -size:]
        stream = CodecStream(self.codec, dynamics=job.keys.dynamics() if job.keys else None)
        wave = stream.push(codes[..., -size:], True, keys, vectors)[0, 0].cpu().numpy()
        notes = self.transcriber(wave, rate)
        notes["onset"] += start - (size - new) / FRAME_RATE
        first = start - EDGE_S if window else -np.inf
        last = end - EDGE_S if window + 1 < len(job.windows) else np.inf
        return {"start": start, "end": end} | compare(job.performance.notes, notes, first, last)

    def report(self, job: Job) -> dict:
        """All of a finished job, for `OUTPUT.report.json`."""
        known = self.reports.setdefault(id(job), {})
        for window in range(job.done):  # those that an interrupted render has left were judged then
            if window not in known:
                known[window] = self.check(job, window, job.made[window]) | {"kept": job.attempts[window]}
        windows = [known[window] for window in sorted(known)]
        total = {key: sum(len(w[key]) for w in windows) for key in ("missing", "extra", "shifted")}
        total |= {key: sum(w[key] for w in windows) for key in ("notes", "right")}
        total["f1"] = f1_score(total["right"], total["notes"], sum(w["heard"] for w in windows))
        about = {"threshold": self.threshold, "retries": self.retries, "tolerance_s": TOLERANCE_S}
        return about | {"summary": total, "windows": windows}


def compare(reference: np.ndarray, estimate: np.ndarray, first: float, last: float) -> dict:
    """Notes whose onset lies in `[first, last)` s: how many, how many of them are right, and lists of the others, each
    note as [onset in s, pitch]; shifted ones as [onset, pitch, by how many s]. What is heard of a note counts where the
    note lies, also beyond an edge."""
    near = (reference["onset"] >= first - SHIFTED_S) & (reference["onset"] < last + SHIFTED_S)
    reference = reference[near]
    inside_r, inside_e = ((n["onset"] >= first) & (n["onset"] < last) for n in (reference, estimate))
    right = match_onsets(reference, estimate, TOLERANCE_S)
    left_r = np.setdiff1d(np.arange(len(reference)), [r for r, _ in right])
    left_e = np.setdiff1d(np.arange(len(estimate)), [e for _, e in right])
    moved = [(left_r[r], left_e[e]) for r, e in match_onsets(reference[left_r], estimate[left_e], SHIFTED_S)]
    missing = np.setdiff1d(left_r, [r for r, _ in moved])
    extra = np.setdiff1d(left_e, [e for _, e in moved])
    count = sum(inside_r[r] for r, _ in right)
    heard = int(count + sum(inside_r[r] for r, _ in moved) + inside_e[extra].sum())
    return {
        "notes": int(inside_r.sum()),
        "heard": heard,
        "right": int(count),
        "f1": f1_score(int(count), int(inside_r.sum()), heard),
        "missing": _listed(reference, missing[inside_r[missing]]),
        "extra": _listed(estimate, extra[inside_e[extra]]),
        "shifted": [
            [*_listed(reference, [r])[0], round(float(estimate["onset"][e] - reference["onset"][r]), 3)]
            for r, e in moved
            if inside_r[r]
        ],
    }


def f1_score(right: int, notes: int, heard: int) -> float | None:
    """F1 of notes; None where there are none and none were heard."""
    return round(2 * right / (notes + heard), 4) if notes + heard else None


def _listed(notes: np.ndarray, which) -> list[list]:
    return [[round(float(notes["onset"][i]), 3), int(notes["pitch"][i])] for i in which]
