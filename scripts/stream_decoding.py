# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Codes of any length -> audio in pieces, the same audio as in one piece: window borders leave no seam in the codec."""

from collections.abc import Iterator

import torch
from transformers.models.encodec.modeling_encodec import EncodecLSTM

CONTEXT = 16  # frames on both sides of a chunk; the layers behind the LSTM see fewer than 4


@torch.no_grad()
def decode_stream(codec, audio_codes: torch.LongTensor, chunk_frames: int = 1500) -> Iterator[torch.Tensor]:
    """Decode long audio in little memory.

    The decoder's LSTM, which remembers everything, runs once over all frames at the frame rate (1 kB a frame); only the
    convolutions behind it, where the memory goes, run chunk by chunk with a little context.

    Args:
        codec (`PianoEncodecModel`): Its `decode_codes` gives the same samples (to rounding).
        audio_codes (`torch.LongTensor` of shape `(1, K, T)`): Codes.
        chunk_frames (`int`): Frames decoded at a time, 30 s by default.

    Yields:
        `torch.Tensor` of shape `(samples,)`: consecutive audio, float32 on the CPU, `hop_length * T` in all.
    """
    T, hop = audio_codes.shape[-1], codec.config.hop_length
    layers = list(codec.decoder.layers)
    convolutional = 1 + max(i for i, layer in enumerate(layers) if isinstance(layer, EncodecLSTM))
    hidden = codec.quantizer.decode(audio_codes.transpose(0, 1))
    for layer in layers[:convolutional]:
        hidden = layer(hidden)
    for start in range(0, T, chunk_frames):
        first, end = max(start - CONTEXT, 0), min(start + chunk_frames, T)
        wave = hidden[..., first : end + CONTEXT]
        for layer in layers[convolutional:]:
            wave = layer(wave)
        yield wave[0, 0, (start - first) * hop : (end - first) * hop].float().cpu()
