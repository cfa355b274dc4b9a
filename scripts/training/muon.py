# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Muon (Jordan et al., 2024): matrices move by their momentum made orthogonal, everything else by Adam.

All directions of such a step are equally long, also those that gradients hardly show, so what begins from nothing gets
further in its first hours, listener and AR alike; what has learned for days gains little (model_cards/training_log.md).
torch's own Muon takes matrices alone, no kernels. Steps are as long as Adam's (Liu et al., "Muon is scalable for LLM
training", arXiv 2502.16982), so its learning rates hold.
"""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5, by Jordan
TURNS = 5  # after which singular values are 0.7 to 1.2
LENGTH = 0.2  # root mean square of Adam's steps, of a learning rate of 1


class Muon(torch.optim.Optimizer):
    """
    Args:
        params: tensors, or groups of them.
        lr (`float`, defaults to 1e-3): about the root mean square of a step, times five.
        momentum (`float`, *optional*, defaults to 0.95): of matrices; kernels are matrices with one row for each
            output. None leaves a group's matrices to Adam: tables, of which a step sees a few rows, and heads.
        betas (`tuple`, defaults to (0.9, 0.99)), eps (`float`, defaults to 1e-8): as in Adam, of the rest.
        weight_decay (`float`, defaults to 0): share of `lr` by which tensors of two axes and more shrink.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0):
        settings = {"lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every tensor that has a gradient; returns what `closure` returns."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.ndim > 1:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                is_matrix = group["momentum"] is not None and p.ndim > 1 and min(p.flatten(1).shape) > 1
                (_move_matrix if is_matrix else _move_by_adam)(p, self.state[p], group)
        return loss


def _move_matrix(p: torch.Tensor, state: dict, group: dict) -> None:
    mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
    ahead = p.grad.lerp(mean, group["momentum"])  # Nesterov's
    is_shared = isinstance(ahead, DTensor)  # by FSDP: a share of a matrix knows nothing of its directions
    whole = ahead.full_tensor() if is_shared else ahead
    direction = orthogonal(whole.flatten(1)).view(p.shape)
    if is_shared:
        direction = distribute_tensor(direction, p.device_mesh, p.placements, src_data_rank=None)
    p.sub_(direction, alpha=group["lr"] * LENGTH * max(p.flatten(1).shape) ** 0.5)


def _move_by_adam(p: torch.Tensor, state: dict, group: dict) -> None:
    b1, b2 = group["betas"]
    state["step"] = state.get("step", 0) + 1
    mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - b1)
    square = state.setdefault("square", torch.zeros_like(p)).lerp_(p.grad.square(), 1 - b2)
    size = (square / (1 - b2 ** state["step"])).sqrt().add_(group["eps"])
    p.addcdiv_(mean, size, value=-group["lr"] / (1 - b1 ** state["step"]))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U V' of `matrix` (m, n) = U S V'; by bf16 products, that GPUs and newer CPUs are fastest at."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    is_tall = len(x) > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(TURNS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if is_tall else x).to(matrix.dtype)
