"""The private names of torch that concern training on several ranks, each with its reason. This file is the second part of internals.py.

What holds there holds here: each docstring says why no public name serves, and no other file uses a private name of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from torchsat.internals import frames

PIPELINES = "torch.distributed.pipelining.stage"
"""The module whose import makes stages of a pipeline possible. It is looked up in sys.modules, since importing it takes seconds."""

_REHEARSALS = ("_prepare_forward_infra", "_shape_inference")


def rehearses() -> bool:
    """Whether a pipeline runs its stage only to learn the shapes of its outputs, on uninitialised memory."""
    if PIPELINES not in sys.modules:
        return False
    return any(frame.f_code.co_name in _REHEARSALS and frame.f_globals.get("__name__") == PIPELINES for frame in frames())


def is_stage(value: object) -> bool:
    """Whether this is a stage of torch.distributed.pipelining, of whichever kind."""
    pipelines = sys.modules.get(PIPELINES)
    return pipelines is not None and isinstance(value, pipelines._PipelineStageBase)


def wrapped_by_data_parallel() -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs now. A module inside the wrapper cannot find it in any other way."""
    return nn.parallel.DistributedDataParallel._active_ddp_module


def is_flattened(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) has made flat parameters of the weights of this model. fully_shard (FSDP2) never does."""
    return any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters())


def fully_sharded_divisor(module: nn.Module) -> float | None:
    """The number that fully_shard (FSDP2) divides the gradients of this module by; None where it does not say. No public getter exists."""
    group = module._get_fsdp_state()._fsdp_param_group  # type: ignore[operator]
    mesh = getattr(group, "mesh_info", None)
    if mesh is None:
        return None
    told = getattr(group, "gradient_divide_factor", None)
    return float(told or int(getattr(mesh, "shard_mesh_size", 1)) * int(getattr(mesh, "replicate_mesh_size", 1)))


def default_store() -> Any:
    """The store of the whole job: the only one that every rank of any group can reach."""
    return dist.distributed_c10d._get_default_store()


def backend_of(group: dist.ProcessGroup, device: torch.device) -> Any:
    """The backend of a group for a kind of device. RuntimeError where it has none."""
    return group._get_backend(device)


def timeout_of(backend: Any) -> Any:
    """How long collectives of this backend may take, as a timedelta."""
    return getattr(getattr(backend, "options", None), "_timeout", dist.distributed_c10d.default_pg_timeout)


def nccl_options(timeout: Any) -> Any:
    """Options of an NCCL group with this timeout. `new_group` would make the group too, which all ranks of the job must join."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return options


def shard_offset(shape: Iterable[int], mesh: Any, placements: Any) -> tuple[int, ...]:
    """Where this rank's part of a DTensor begins, along each axis. `torch.distributed.tensor` has no public function for it."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, first = compute_local_shape_and_global_offset(tuple(shape), mesh, placements)
    return tuple(first)


def finished(tensor: Tensor) -> Tensor:
    """The tensor itself, after the asynchronous collective that makes it, if one does."""
    if isinstance(tensor, AsyncCollectiveTensor):
        waited: Tensor = tensor.trigger_wait()
        return waited
    return tensor
