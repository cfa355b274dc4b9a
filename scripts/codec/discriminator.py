# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A multi-scale STFT discriminator with hinge and feature-matching losses (the idea is EnCodec's, arXiv 2210.13438)."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


class STFTDiscriminator(nn.Module):
    """Judges one complex spectrogram: (B, samples) -> logits (B, 1, frames, bands) and its feature maps."""

    def __init__(self, window: int, channels: int = 32):
        super().__init__()
        self.size = window
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        layers = [weight_norm(nn.Conv2d(2, channels, (3, 9), padding=(1, 4)))]
        for dilation in (1, 2, 4):
            padding = (dilation, 4)
            layers.append(weight_norm(nn.Conv2d(channels, channels, (3, 9), (1, 2), padding, dilation=(dilation, 1))))
        layers.append(weight_norm(nn.Conv2d(channels, channels, 3, padding=1)))
        self.layers = nn.ModuleList(layers)
        self.head = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, wave: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        spectrum = torch.stft(wave, self.size, self.size // 4, window=self.window, normalized=True, return_complex=True)
        h, features = torch.view_as_real(spectrum).permute(0, 3, 2, 1), []
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
            features.append(h)
        return self.head(h), features


class MultiScaleSTFTDiscriminator(nn.Module):
    """One `STFTDiscriminator` a window length, samples."""

    def __init__(self, windows=(2048, 1024, 512, 256), channels: int = 32):
        super().__init__()
        self.parts = nn.ModuleList(STFTDiscriminator(n, channels) for n in windows)

    def forward(self, wave: torch.Tensor) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        return [part(wave) for part in self.parts]


def generator_losses(discriminator: nn.Module, output: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hinge and feature-matching losses of `output` (B, samples); the discriminator itself is left as it is."""
    discriminator.requires_grad_(False)
    fake = discriminator(output)
    with torch.no_grad():
        real = discriminator(target)
    discriminator.requires_grad_(True)
    hinge = sum(F.relu(1 - logits).mean() for logits, _ in fake) / len(fake)
    distance = [
        (a - b).abs().mean() / b.abs().mean().clamp_min(1e-5)
        for (_, fa), (_, fb) in zip(fake, real, strict=True)
        for a, b in zip(fa, fb, strict=True)
    ]
    return {"adversarial": hinge, "features": sum(distance) / len(distance)}


def discriminator_loss(discriminator: nn.Module, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator on real `target` and detached `output`, both (B, samples)."""
    real, fake = discriminator(target), discriminator(output)
    return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for (r, _), (f, _) in zip(real, fake)) / len(real)
