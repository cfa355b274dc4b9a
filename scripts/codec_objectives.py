# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""What each part of the codec is trained for, and how its weights start."""

import torch

from modeling_midivalle import PianoEncodecModel
from scripts.codec_features import SpectralFeatures
from scripts.codec_losses import SpectralLoss
from scripts.codec_quantizer import quantize_train


class Objective(torch.nn.Module):
    """A part of the codec and what it is trained for. `forward(wave (B, samples), updates)` gives losses by name."""

    def __init__(self, codec: PianoEncodecModel, bf16: bool):
        super().__init__()
        self.codec, self.bf16 = codec, bf16

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Latent (B, D, T) in fp32 of wave (B, samples)."""
        return self._run(self.codec.encoder.layers, wave[:, None])

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Wave (B, samples) in fp32 of a latent (B, D, T)."""
        *layers, activation, last = self.codec.decoder.layers
        hidden = self._run(layers, latent)
        return last(activation(hidden))[:, 0]  # rounded to bf16, the wave itself would hiss at -50 dB

    def _run(self, layers, x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            bf16 = self.bf16 and not (x.device.type == "cpu" and is_narrow_and_strided(layer))
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                x = layer(x if bf16 else x.float())
        return x.float()


class EncoderObjective(Objective):
    """The encoder learns to produce the spectral features."""

    def __init__(self, codec, bf16: bool, features: SpectralFeatures):
        super().__init__(codec, bf16)
        self.features = features
        self.codec.decoder.requires_grad_(False)

    def forward(self, wave, updates=None):
        latent, target = self.encode(wave), self.features(wave)
        return {"regression": (latent - target).square().mean()}, None


class DecoderObjective(Objective):
    """The decoder learns to speak quantised latents: of the features, or of a trained encoder."""

    def __init__(self, codec, bf16: bool, features: SpectralFeatures | None):
        super().__init__(codec, bf16)
        self.features, self.spectral = features, SpectralLoss()
        self.codec.encoder.requires_grad_(False)

    def forward(self, wave, updates=None):
        with torch.no_grad():
            latent = self.features(wave) if self.features is not None else self.encode(wave)
            latent, _, _ = quantize_train(self.codec.quantizer, latent)
        output = self.decode(latent)[:, : wave.shape[1]]
        return self.spectral(output, wave), output


class WholeObjective(Objective):
    """Encoder, quantiser and decoder together, for fine-tuning a codec that already speaks."""

    def __init__(self, codec, bf16: bool, features: None = None):
        super().__init__(codec, bf16)
        self.spectral = SpectralLoss()

    def forward(self, wave, updates=None):
        latent, _, commitment = quantize_train(self.codec.quantizer, self.encode(wave), updates)
        output = self.decode(latent)[:, : wave.shape[1]]
        waveform = ((output - wave).abs().mean(1) / (wave.abs().mean(1) + 0.01)).mean()
        return self.spectral(output, wave) | {"commitment": commitment, "waveform": waveform}, output


OBJECTIVES = {"encoder": EncoderObjective, "decoder": DecoderObjective, "whole": WholeObjective}


def is_narrow_and_strided(layer: torch.nn.Module) -> bool:
    """Whether a layer must stay fp32 on the CPU: torch 2.13's bf16 kernels (AMX) return wrong values for strided
    convolutions of 16 input channels, forward (cosine 0.12 with fp32) and in the gradient of the transposed ones."""
    conv = getattr(layer, "conv", None)
    return conv is not None and conv.stride[0] > 1 and min(conv.in_channels, conv.out_channels) < 32


@torch.no_grad()
def start_balanced(codec: PianoEncodecModel, wave: torch.Tensor, latent: torch.Tensor) -> None:
    """Scale every convolution so that its output has unit variance on real audio.

    The usual random starts let the signal fade against the biases on its way through 16 layers: the encoder's latent
    then carries next to nothing, and training stays with the mean spectrum for hours.

    Args:
        wave (`torch.Tensor` of shape `(B, samples)`): for the encoder, and the level of the decoder's output.
        latent (`torch.Tensor` of shape `(B, D, T)`): for the decoder.
    """
    last = codec.decoder.layers[-1].conv

    def rescale(module, _inputs, output):
        scale = (float(wave.std()) if module is last else 1.0) / (output.std() + 1e-8)
        module.weight = module.weight * scale  # through weight norm's right inverse
        return output * scale

    handles = []
    for conv in [m for m in codec.modules() if isinstance(m, torch.nn.Conv1d | torch.nn.ConvTranspose1d)]:
        weight = torch.empty_like(conv.weight)
        torch.nn.init.kaiming_normal_(weight, nonlinearity="linear")
        conv.weight = weight
        conv.bias.zero_()
        handles.append(conv.register_forward_hook(rescale))
    codec.encoder(wave[:, None])
    codec.decoder(latent)
    for handle in handles:
        handle.remove()
