# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Compare a converted model with inputs and outputs that were recorded from the original program.

A recording is a `.safetensors` with a `.json` beside it: `teacher_forced.{x, x_lens, y, y_lens, ar_logits,
nar_logits.STAGE}`, with losses, stages and prefixes in the JSON, and `inference.{x, prompt, greedy_codes,
ar_step_logits, nar_logits, cap_x, cap_codes}`. Codes are `(T, K)` there.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scripts.published.weights import CheckpointError

AR_TOLERANCE, AR_REACH = 1e-5, 2.5  # for logits up to 2.5; larger ones are rounded in proportion
NAR_TOLERANCE, NAR_REACH = 1e-4, 60.0
LOSS_TOLERANCE = 1e-6  # relative


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference, or the number of codes that differ."""

    name: str
    difference: float
    tolerance: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN never is."""
        return self.difference <= self.tolerance


def load_recording(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of `NAME.safetensors` or `NAME-io.safetensors`, and the JSON `NAME.json` beside it.

    Raises:
        CheckpointError: one of the two is missing or cannot be read.
    """
    path = Path(path)
    facts = path.with_suffix(".json")
    if not facts.is_file():
        facts = path.with_name(f"{path.stem.removesuffix('-io')}.json")
    for file in (path, facts):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; a recording is a .safetensors with a .json beside it")
    try:
        tensors, found = load_file(path), json.loads(facts.read_text())
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read, or the .json beside it ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{facts}: holds a {type(found).__name__}, not the facts of a recording")
    return {k: v.long() if not v.is_floating_point() else v for k, v in tensors.items()}, found


@torch.no_grad()
def compare(model, path: str | Path) -> list[Check]:
    """Compare a `MidiValleForConditionalGeneration` in fp32 with the recording of `path`.

    Raises:
        CheckpointError: the recording cannot be read, is incomplete, or is of another model.
    """
    tensors, facts = load_recording(path)
    heads = model.config.ar_config.num_attention_heads
    if facts.get("nhead", heads) != heads or facts.get("prefix_mode", 1) != 1:
        raise CheckpointError(
            f"{path}: was recorded with {facts.get('nhead')} heads and prefix mode {facts.get('prefix_mode')}; the "
            f"model has {heads} heads (see --num-heads) and prefix mode 1"
        )
    try:
        return [*_teacher_forced(model, tensors, facts["teacher_forced"]), *_inference(model, tensors)]
    except KeyError as error:
        raise CheckpointError(f"{path}: the recording lacks {error}") from error
    except (TypeError, IndexError, ArithmeticError, RuntimeError) as error:  # of shapes and values that do not fit
        raise CheckpointError(f"{path}: is not a whole recording of such a model ({error})") from error


def _teacher_forced(model, tensors: dict[str, torch.Tensor], facts: dict) -> list[Check]:
    """Logits and losses on whole padded sequences."""
    x, x_lens, y, y_lens = (tensors[f"teacher_forced.{name}"] for name in ("x", "x_lens", "y", "y_lens"))
    codes, rows = y.transpose(1, 2), torch.zeros(len(x), dtype=torch.long)
    midi_mask, mask = (
        (torch.arange(n) < lens[:, None]).long() for n, lens in ((x.shape[1], x_lens), (y.shape[1], y_lens))
    )
    out = model.ar(midi_ids=x, midi_attention_mask=midi_mask, **model.ar.build_inputs(codes[:, 0], mask, rows))
    checks = _logits_and_loss(
        "AR", out, tensors["teacher_forced.ar_logits"], facts["ar_loss_sum"], AR_TOLERANCE, AR_REACH
    )
    for case in facts["nar"]:
        stage, prefix = case["stage"], case["prefix_len"]
        out = model.nar(codes, x, midi_mask, mask, rows + prefix, stage, labels=codes)
        out.logits, wanted = out.logits[:, prefix:], tensors[f"teacher_forced.nar_logits.{stage}"]
        loss = case["loss_sum_weighted"]
        checks += _logits_and_loss(f"NAR stage {stage}", out, wanted, loss, NAR_TOLERANCE, NAR_REACH)
    return checks


def _logits_and_loss(name: str, out, logits: torch.Tensor, loss: float, *tolerance: float) -> list[Check]:
    return [
        _logits(f"{name} logits, largest difference", out.logits, logits, *tolerance),
        Check(f"{name} loss, relative difference", abs(float(out.loss) / loss - 1), LOSS_TOLERANCE),
    ]


def _inference(model, tensors: dict[str, torch.Tensor]) -> list[Check]:
    """Greedy codes with a cache, of a given length and up to the cap; logits of each step and stage."""
    x, prompt, codes = (tensors[f"inference.{name}"] for name in ("x", "prompt", "greedy_codes"))
    midi, prompt = x[None], prompt.T[None]
    found = model.generate_codes(midi, prompt_codes=prompt, target_frames=len(codes), do_sample=False)
    checks = [
        Check(f"greedy codes, codebook {k + 1}", _differing(found[0, k], codes[:, k])) for k in range(codes.shape[1])
    ]
    whole, P = torch.cat([prompt, codes.T[None]], -1), prompt.shape[-1]
    steps = model.ar(whole[:, 0], midi, use_cache=False).logits[0, P - 1 :]
    wanted = tensors["inference.ar_step_logits"]
    checks.append(_logits("AR logits of each step", steps, wanted, AR_TOLERANCE, AR_REACH))
    for stage, wanted in enumerate(tensors["inference.nar_logits"], start=1):
        logits = model.nar(whole, midi, prompt_lengths=torch.tensor([P]), stage=stage).logits[0, P:]
        name = f"NAR logits after generation, stage {stage}"
        checks.append(_logits(name, logits, wanted, NAR_TOLERANCE, NAR_REACH))
    cap = tensors["inference.cap_x"][None]
    found = model.generate_codes(cap, prompt_codes=prompt, do_sample=False, compat="published")
    return [*checks, Check("greedy codes up to the cap", _differing(found[0].T, tensors["inference.cap_codes"]))]


def _logits(name: str, found: torch.Tensor, wanted: torch.Tensor, tolerance: float, reach: float) -> Check:
    difference = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    return Check(name, difference, tolerance * max(1.0, float(wanted.abs().max()) / reach))


def _differing(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found != wanted).sum()) if found.shape == wanted.shape else float("inf")
