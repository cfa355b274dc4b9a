# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""FSDP2 by Accelerate: each process keeps its share of weights, gradients, averages and the optimiser's state.

A model is one unit, gathered for a forward pass: were its layers units of their own, processes would have to run the
same layers equally often, and rows that see their own predictions take one more pass. What is saved is whole, so that
checkpoints and folders are those of any other run. Without FSDP every function gives back what it is given.
"""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from scripts.training.processes import RunError, sum_over_processes

KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def make_accelerator(**options) -> Accelerator:
    """An `Accelerator` for one process, DDP or FSDP, as the launcher's environment says; on a CPU without a GPU.

    Raises:
        RunError: DeepSpeed and the like; FSDP 1; FSDP that wraps layers.
    """
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[parallel], **options)
    state = accelerator.state
    if state.distributed_type is DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.FSDP  # Accelerate itself asks for FSDP on accelerators only
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type not in KINDS:
        raise RunError(f"{state.distributed_type.value} is not one of {', '.join(kind.value for kind in KINDS)}")
    if state.distributed_type is DistributedType.FSDP:
        plugin = state.fsdp_plugin
        if plugin.fsdp_version != 2 or plugin.auto_wrap_policy is not None:
            raise RunError("FSDP needs fsdp_version: 2 and fsdp_auto_wrap_policy: NO_WRAP, see recipes/accelerate/")
    return accelerator


def prepare(accelerator: Accelerator, module: torch.nn.Module, optimizer, *methods: str):
    """Module and optimiser for training; `methods` of the module compute with its weights too."""
    module, optimizer = accelerator.prepare(module, optimizer)
    if is_sharded(module):
        module.set_reshard_after_forward(True)  # no whole copy stays, which state_dict would give instead of the share
        module.set_reduce_scatter_unused_params(True)  # processes may be at different codebooks
        module.used = set()
        module.register_forward_hook(_note_used, prepend=True)  # before FSDP's own, which takes the weights away
        for name in methods:
            register_fsdp_forward_method(module, name)
    return module, optimizer


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether `prepare` has shared `module` out."""
    return isinstance(module, FSDPModule)


def gather(value):
    """`value`, tensors in dicts and lists, with every share made whole; all processes must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gather(one) for key, one in value.items()}
    return [gather(one) for one in value] if isinstance(value, list) else value


def share(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor that each process has, what `like` is of its own."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def share_optimizer(state: dict, optimizer) -> dict:
    """Of a whole `optimizer.state_dict()`, the process's own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def own(value, parameter):  # what has a number for each of the parameter's is shared out like it
        return share(value, parameter) if isinstance(value, torch.Tensor) and value.shape == parameter.shape else value

    entries = {i: {k: own(v, parameters[i]) for k, v in entry.items()} for i, entry in state["state"].items()}
    return state | {"state": entries}


def drop_unused(module: torch.nn.Module) -> None:
    """Take away the gradients of parameters that no loss of the window depends on, on any process. FSDP gives them
    zeros, and momentum and weight decay would move them; DDP gives them none."""
    if not is_sharded(module):
        return
    named = list(module.named_parameters())
    counts = sum_over_processes([float(name in module.used) for name, _ in named])
    for (_, parameter), count in zip(named, counts):
        parameter.grad = parameter.grad if count else None
    module.used.clear()


def _note_used(module: torch.nn.Module, _, losses: dict[str, torch.Tensor]) -> None:
    """Forward hook: add the names of the parameters in the losses' graph to `module.used`."""
    seen, nodes = set(), [loss.grad_fn for loss in losses.values()]
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    leaves = {id(node.variable) for node in seen if hasattr(node, "variable")}
    module.used |= {name for name, parameter in module.named_parameters() if id(parameter) in leaves}
