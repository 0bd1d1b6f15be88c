"""This rank's part of a tensor.

Tensor parallelism and fully_shard spread a tensor over ranks as a DTensor. Each rank measures the part that it holds; where that part lies in the
whole tensor, and whether another rank holds the same part and counts it, is what a merge over ranks needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchsat.internals_distributed import finished, shard_offset
from torchsat.tensors import plain


@dataclass(frozen=True)
class Placement:
    """How a tensor is spread over ranks, as one rank sees it."""

    counts: bool
    """Whether this rank counts its part. False where another rank holds the same part and counts it."""
    first: tuple[int, ...]
    """The index in the whole tensor at which this rank's part begins, along each axis."""
    is_first: bool
    """Whether this rank is the first of all ranks that hold a part."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks; any other tensor as it is, read as a plain one where it holds plain data."""
    return plain(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part, as a plain tensor that no collective still computes."""
    return plain(finished(local(tensor)))


def is_freed(weight: Tensor) -> bool:
    """Whether the memory of a weight is released. Libraries that shard or offload weights do so between two uses."""
    part = local(weight)
    return part.numel() > 0 and part.layout is torch.strided and part.untyped_storage().nbytes() == 0


def is_pending(tensor: Tensor) -> bool:
    """Whether the tensor is a sum over ranks that has not been computed yet, so that no rank has any of its elements."""
    return isinstance(tensor, DTensor) and any(each.is_partial() for each in tensor.placements)


def placement(tensor: Tensor) -> Placement | None:
    """How a tensor is spread over ranks; None where it is not spread, or is a sum that has not been computed yet."""
    if not isinstance(tensor, DTensor):
        return None
    at = tensor.device_mesh.get_coordinate()
    if at is None or is_pending(tensor):
        return None
    counts = all(where == 0 for where, each in zip(at, tensor.placements, strict=True) if each.is_replicate())
    return Placement(counts, shard_offset(tensor.shape, tensor.device_mesh, tensor.placements), not any(at))
