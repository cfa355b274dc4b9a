# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""Optimisers by name, and ScaledAdam: the one that the published model was trained with.

ScaledAdam (Yao et al., Zipformer, arXiv 2310.11230) is written here from its description. A tensor moves in proportion
to its own root mean square, so the learning rate is relative; its size is learned beside it, from the gradient along
the tensor itself; and the gradient's norm is held below twice its own recent median.
"""

import torch

from scripts.decoders.sharding import gather
from scripts.training.muon import Muon

SIZE_PERIOD, SIZE_SHARE = 4, 0.1  # steps between changes of size; their learning rate, relative
SMALLEST, LARGEST, SCALAR_LIMIT = 1e-5, 3.0, 10.0  # root mean squares; value of a lone number
NORM_WINDOW, CLIPPING_SCALE = 1000, 2.0


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose steps scale with each tensor's root mean square, with learned sizes and clipping by the median norm.

    Args:
        params: tensors, or groups of them.
        lr (`float`, defaults to 0.05): share of its size that a tensor moves a step.
        betas (`tuple`, defaults to (0.9, 0.95)), eps (`float`, defaults to 1e-8): as in Adam.
        clipping_scale (`float`, defaults to 2.0): largest norm of a step's gradients, relative to the median of a
            thousand earlier ones; from step 1001 on.
    """

    def __init__(self, params, lr=0.05, betas=(0.9, 0.95), eps=1e-8, clipping_scale=CLIPPING_SCALE):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be from 0 to below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "clipping_scale": clipping_scale})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every tensor that has a gradient; returns what `closure` returns."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in pairs:
            if not self.state[p]:
                self._start(p)
        share = self._clipping([p for p, _ in pairs])
        for p, group in pairs:
            update = self._move_number if p.numel() == 1 else self._move_tensor
            update(p, p.grad * share, self.state[p], group)
        return loss

    def _start(self, p: torch.Tensor) -> None:
        state = self.state[p]
        state["step"] = 0
        state["delta"], state["squares"] = torch.zeros_like(p), torch.zeros_like(p)
        if p.numel() > 1:
            state["rms"] = gather(p.square().mean().sqrt())
            state["along"] = torch.zeros(SIZE_PERIOD, dtype=p.dtype, device=p.device)  # sum(p * g) of the last steps
            state["size_squares"] = torch.zeros((), dtype=p.dtype, device=p.device)

    def _clipping(self, tensors: list[torch.Tensor]) -> float | torch.Tensor:
        """The factor that holds the norm of all gradients, each times its tensor's size, below the threshold."""
        if not tensors:
            return 1.0
        parts = [gather(p.grad.square().sum()) * self.state[p].get("rms", 1.0) ** 2 for p in tensors]
        norm = torch.stack([part.float().to(parts[0].device) for part in parts]).sum().sqrt()
        first = next(p for group in self.param_groups for p in group["params"] if self.state[p])
        state = self.state[first]
        if "norms" not in state:
            state["norms"] = torch.zeros(NORM_WINDOW, device=first.device)
            state["threshold"] = torch.full((), torch.inf, device=first.device)
        count = state["step"]
        if count and count % NORM_WINDOW == 0:
            scale = self.param_groups[0]["clipping_scale"]
            state["threshold"] = state["norms"].sort().values[NORM_WINDOW // 2] * scale
        state["norms"][count % NORM_WINDOW] = norm
        return (state["threshold"] / norm.clamp(min=1e-20)).clamp(max=1.0)

    @staticmethod
    def _move_tensor(p: torch.Tensor, g: torch.Tensor, state: dict, group: dict) -> None:
        lr, (b1, b2), eps = group["lr"], group["betas"], group["eps"]
        delta, step = state["delta"], state["step"]
        delta.mul_(b1)
        state["along"][step % SIZE_PERIOD] = gather((p * g).sum())
        if step % SIZE_PERIOD == SIZE_PERIOD - 1:
            rms = state["rms"] = gather(p.square().mean().sqrt())
            decay, number = b2**SIZE_PERIOD, (step + 1) // SIZE_PERIOD
            state["size_squares"].mul_(decay).add_(state["along"].square().mean(), alpha=1 - decay)
            change = -SIZE_SHARE * lr * (1 - decay**number) ** 0.5 * state["along"].sum()
            change = change / (state["size_squares"].sqrt() + eps)
            change = torch.where(rms < SMALLEST, torch.zeros_like(change), change)
            change = torch.where(rms > LARGEST, torch.full_like(change, -SIZE_SHARE * SIZE_PERIOD * lr), change)
            delta.add_(p * change, alpha=1 - b1)
        delta.sub_(_direction(g, state, b2, eps) * state["rms"].clamp(min=SMALLEST), alpha=lr * (1 - b1))
        p.add_(delta)
        state["step"] += 1

    @staticmethod
    def _move_number(p: torch.Tensor, g: torch.Tensor, state: dict, group: dict) -> None:
        lr, (b1, b2), eps = SIZE_SHARE * group["lr"], group["betas"], group["eps"]
        state["delta"].mul_(b1).sub_(_direction(g, state, b2, eps), alpha=lr * (1 - b1))
        p.add_(state["delta"]).clamp_(-SCALAR_LIMIT, SCALAR_LIMIT)
        state["step"] += 1


def _direction(g: torch.Tensor, state: dict, b2: float, eps: float) -> torch.Tensor:
    """`g` over the root of its mean square; the correction for a young mean ends once it is below 1 %."""
    squares = state["squares"].mul_(b2).addcmul_(g, g, value=1 - b2)
    correction = 1 - b2 ** (state["step"] + 1)
    return g / ((squares / correction if correction < 0.99 else squares).sqrt() + eps)


def make_optimizer(name: str, model: torch.nn.Module, lr: float, betas: tuple, weight_decay: float):
    """The optimiser `name`: `adamw`, `muon` (both decay tensors of two axes or more) or `scaled_adam` (nothing).

    Raises:
        ValueError: another name, or weight decay where there is none.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "scaled_adam":
        if weight_decay:
            raise ValueError("scaled_adam has no weight decay: set weight_decay to 0")
        return ScaledAdam(trained, lr, tuple(betas))
    if name == "muon":
        is_matrix = {
            id(module.weight)
            for place, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not {"heads", "lm_head"} & set(place.split("."))
        }
        matrices = {"params": [p for p in trained if id(p) in is_matrix]}
        rest = {"params": [p for p in trained if id(p) not in is_matrix], "momentum": None}
        groups = [group for group in (matrices, rest) if group["params"]]
        return Muon(groups, lr, betas=betas, weight_decay=weight_decay)
    if name != "adamw":
        raise ValueError(f"optimizer {name!r} is not one of adamw, muon, scaled_adam")
    tensors = {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay}
    rest = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([group for group in (tensors, rest) if group["params"]], lr, tuple(betas), fused=True)
