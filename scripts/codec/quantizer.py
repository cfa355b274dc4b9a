# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Training of the residual quantiser of an `EncodecModel`: k-means start, EMA codebooks, revival of unused codes.

transformers' quantiser only looks codes up. The functions here move its buffers (`embed, embed_avg, cluster_size`), so
the result loads into a plain `EncodecModel`.
"""

import torch
from torch import distributed as dist
from torch.nn import functional as F


def quantize_train(quantizer, latent: torch.Tensor, updates: list | None = None):
    """Residual quantisation with a straight-through gradient.

    Args:
        quantizer: `EncodecModel.quantizer`.
        latent (`torch.Tensor` of shape `(B, D, T)`): encoder output, fp32.
        updates: if given, one `(vectors (B*T, D), indices (B*T,))` a codebook is appended for `ema_update`.
    Returns:
        quantised latent (B, D, T), codes (B, K, T), commitment loss relative to the latent's variance.
    """
    B, D, T = latent.shape
    residual = latent.transpose(1, 2).reshape(-1, D)
    total, codes, commitment = 0.0, [], 0.0
    scale = residual.detach().var() + 1e-6
    for layer in quantizer.layers:
        indices = nearest(residual.detach(), layer.codebook.embed)
        chosen = F.embedding(indices, layer.codebook.embed)
        if updates is not None:
            updates.append((residual.detach(), indices))
        commitment = commitment + F.mse_loss(residual, chosen) / scale
        residual, total = residual - chosen, total + chosen
        codes.append(indices.view(B, T))
    flat = latent.transpose(1, 2).reshape(-1, D)
    quantised = flat + (total - flat).detach()
    return quantised.view(B, T, D).transpose(1, 2), torch.stack(codes, 1), commitment / len(codes)


def nearest(vectors: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code (L2) of each vector: (N, D), (C, D) -> (N,)."""
    half = embed.square().sum(1) / 2
    return torch.cat([(part @ embed.T - half).argmax(1) for part in vectors.split(16_384)])  # the cache is small


@torch.no_grad()
def ema_update(quantizer, updates, decay: float, dead: float, generator: torch.Generator) -> int:
    """Move the codebooks towards the vectors they were chosen for; returns how many codes were revived.

    Args:
        updates: `(vectors (N, D), indices (N,))` of every codebook, once for each batch of one optimiser step. With
            several processes each gives its own; what is counted is summed over batches and processes.
        decay: of the moving averages.
        dead: a code whose averaged use falls below this count is replaced by a random current vector.
        generator: draws those vectors; in the same state on all processes.
    """
    revived, books = 0, len(quantizer.layers)
    for k, layer in enumerate(quantizer.layers):
        vectors, indices = (torch.cat(parts) for parts in zip(*updates[k::books], strict=True))
        book = layer.codebook
        count = torch.zeros_like(book.cluster_size).index_add_(0, indices, torch.ones_like(indices, dtype=torch.float))
        total = torch.zeros_like(book.embed_avg).index_add_(0, indices, vectors)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        book.cluster_size.lerp_(count, 1 - decay)
        book.embed_avg.lerp_(total, 1 - decay)
        unused = book.cluster_size < dead
        if unused.any():
            pick = torch.randint(len(vectors), (int(unused.sum()),), generator=generator)
            fresh = vectors[pick.to(vectors.device)]
            if dist.is_initialized():
                dist.broadcast(fresh, 0)
            book.cluster_size[unused] = 2 * dead
            book.embed_avg[unused] = fresh * 2 * dead
            revived += int(unused.sum())
        book.embed.copy_(book.embed_avg / book.cluster_size[:, None].clamp_min(1e-5))
    return revived


@torch.no_grad()
def kmeans_start(quantizer, vectors: torch.Tensor, step_vectors: int, generator: torch.Generator, rounds: int = 8):
    """Fit the whole residual stack by k-means to encoder outputs.

    Args:
        vectors (`torch.Tensor` of shape `(N, D)`): N should be several times the codebook size.
        step_vectors: vectors of one training step; scales the averaged counts so that the EMA goes on smoothly.
    Returns:
        share of the variance that is left after each codebook.
    """
    residual, variance, left = vectors.clone(), vectors.var(0).sum(), []
    for layer in quantizer.layers:
        book = layer.codebook
        pick = torch.randperm(len(residual), generator=generator)[: book.codebook_size]
        centres = residual[pick.to(residual.device)].clone()
        for _ in range(rounds):
            indices = nearest(residual, centres)
            count = torch.bincount(indices, minlength=len(centres)).to(residual.dtype)
            total = torch.zeros_like(centres).index_add_(0, indices, residual)
            empty = count == 0
            centres = total / count.clamp_min(1)[:, None]
            if empty.any():
                again = torch.randint(len(residual), (int(empty.sum()),), generator=generator)
                centres[empty] = residual[again.to(residual.device)]
        indices = nearest(residual, centres)
        count = torch.bincount(indices, minlength=len(centres)).to(residual.dtype).clamp_min(0.5)
        book.embed.copy_(centres)
        book.cluster_size.copy_(count * (step_vectors / len(residual)))
        book.embed_avg.copy_(centres * book.cluster_size[:, None])
        book.inited.fill_(1)
        residual = residual - centres[indices]
        left.append(float(residual.var(0).sum() / variance))
    return left
