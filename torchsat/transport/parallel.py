"""What data parallelism does to a model: which ranks there are, and over how many its gradients are averaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchsat.internals import fully_sharded_divisor


def averaged_over(model: nn.Module | None, weights: Iterable[Tensor]) -> float:
    """What data parallelism divides the gradients of a model by; 1 where there is none, or where it is told to divide by nothing.

    Args:
        weights: those that tensor parallelism does not spread over ranks. If one is spread all the same, FSDP2 has done it, maybe from a module
            around the model.
    """
    for module in model.modules() if model is not None else ():
        divisor = fully_sharded_divisor(module) if isinstance(module, FSDPModule) else None
        if divisor is not None:
            return divisor
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return float(dist.get_world_size(module.process_group))
    return float(next((weight.device_mesh.size() for weight in weights if isinstance(weight, DTensor)), 1))


def default_group() -> dist.ProcessGroup | None:
    """The group of all ranks of the job; None where there is only one, or where torch.distributed is not in use."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return dist.group.WORLD


def averages(model: nn.Module | None, weights: Iterable[Tensor], wrapper_ranks: int, stages: Iterable[Any]) -> float:
    """What the loss that is trained on is smaller by than the one whose gradient a rank sees.

    Data parallelism averages over ranks, and a pipeline divides what its micro-batches have added up (torch 2.6 leaves that to the loss).

    Args:
        weights: those that tensor parallelism does not spread over ranks.
        wrapper_ranks: over how many ranks the DistributedDataParallel averages whose forward ran the model; 0: none did.
        stages: of a pipeline that the model is, if it is any.
    """
    if not dist.is_available() or not dist.is_initialized():
        return 1.0
    chunks = max((stage.chunks or 1 for stage in stages if hasattr(stage, "scale_grads")), default=1)
    return float((wrapper_ranks or averaged_over(model, weights)) * chunks)
