# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What a decoder in training is looked at by, on fixed batches: figures by codebook, and some seconds of sound."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from processing.processing_midivalle import FRAME_RATE
from scripts.models.trained_parts import load_part


def figures(losses, batches: list[dict], autocast: Callable[[], AbstractContextManager]) -> dict[str, float]:
    """Means of the losses and of `top10` over `batches`, as `validation_NAME_CODEBOOK`.

    Args:
        losses (`DecoderLosses`): in evaluation mode.
        batches (`list`): on its device.
        autocast: gives the precision to compute in.
    """
    result = {}
    for stage in [0] if losses.is_ar else range(1, losses.core.config.num_codebooks):
        found = []
        for batch in batches:
            with autocast():
                found.append(losses.measure(batch, stage))
        for name in found[0] if found else ():
            result[f"validation_{name}_{stage}"] = sum(float(one[name]) for one in found) / len(found)
    return result


def codes_played(losses, batch: dict[str, torch.Tensor], seconds: float) -> dict[str, torch.Tensor]:
    """Codes `(1, K, T)` of the batch's first row, `truth` and `generated`, prompt and at most `seconds` of target; of
    an AR codebook 0 alone."""
    row = {name: value[:1] for name, value in batch.items()}
    made = losses.play(row, round(seconds * FRAME_RATE))
    return {"truth": row["audio_codes"][:, : made.shape[1], : made.shape[2]], "generated": made}


@torch.no_grad()
def sounds(codes: dict[str, torch.Tensor], prompt_frames: int, codec: str | Path) -> dict[str, torch.Tensor]:
    """`codes` as audio `(L,)` on the CPU, at the codec's rate, without the prompt, which is decoded to lead in. The
    codec of folder `codec` is read anew: between validations it takes no memory."""
    model = load_part("codec", codec)
    begin = prompt_frames * model.config.hop_length
    return {name: model.decode_codes(value.cpu())[0, 0, begin:].clamp(-1, 1) for name, value in codes.items()}
