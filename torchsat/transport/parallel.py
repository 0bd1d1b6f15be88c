"""What data parallelism does to a model: which ranks there are, and over how many its gradients are averaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchsat.internals_distributed import fully_sharded_divisor


def averaged_over(model: nn.Module | None, weights: Iterable[Tensor]) -> float:
    """The number that data parallelism divides the gradients of a model by; 1 where there is none, or where it is set not to divide.

    Args:
        weights: the weights that tensor parallelism does not spread over ranks. If one of them is a DTensor all the same, FSDP2 has spread it, maybe
            through a module around the model.
    """
    for module in model.modules() if model is not None else ():
        divisor = fully_sharded_divisor(module) if isinstance(module, FSDPModule) else None
        if divisor is not None:
            return divisor
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return float(dist.get_world_size(module.process_group))
    return float(next((weight.device_mesh.size() for weight in weights if isinstance(weight, DTensor)), 1))


def is_distributed() -> bool:
    """Whether this process is a rank of a job that uses torch.distributed now."""
    return dist.is_available() and dist.is_initialized()


def job_rank() -> int:
    """The rank of this process in the whole job; 0 where torch.distributed is not in use."""
    return dist.get_rank() if is_distributed() else 0


def default_group() -> dist.ProcessGroup | None:
    """The group of all ranks of the job; None where there is only one, or where torch.distributed is not in use."""
    if not is_distributed() or dist.get_world_size() < 2:
        return None
    return dist.group.WORLD


def averages(model: nn.Module | None, weights: Iterable[Tensor], wrapper_ranks: int, stages: Iterable[Any]) -> float:
    """The factor by which the gradients that a rank reads during the backward are larger than those that training uses.

    Data parallelism averages gradients over ranks only afterwards, and a pipeline divides the sum over its micro-batches by their number (torch 2.6
    leaves that to the loss).

    Args:
        weights: the weights that tensor parallelism does not spread over ranks.
        wrapper_ranks: the number of ranks over which the DistributedDataParallel around the model averages; 0: there is none around it.
        stages: the stages of a pipeline that are watched; empty for any other model.
    """
    if not is_distributed():
        return 1.0
    chunks = max((stage.chunks or 1 for stage in stages if hasattr(stage, "scale_grads")), default=1)
    return float((wrapper_ranks or averaged_over(model, weights)) * chunks)
