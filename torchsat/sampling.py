"""Which elements of a tensor are read.

A sample is a lattice: every `step`-th element in memory order. The step shares no factor with any dimension of the tensor, so that the elements
visit all units, positions and samples of the batch evenly. A step that divides the width would see only some units: on units that differ, its share
of saturated elements was 11 percentage points off. Random indices would be as even, but drawing them costs more than the statistics do, and would
change the state of the user's random generator. In each observation the lattice begins at another element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_PRIME = 7919
"""The lattices of successive observations begin this far apart, modulo `step`. It is a prime, so that `step` observations use every beginning."""


def coprime(step: int, sizes: Iterable[int]) -> int:
    """The first number from `step` on that shares no factor with any of these sizes."""
    sizes = tuple(sizes)
    while any(math.gcd(step, size) != 1 for size in sizes):
        step += 1
    return step


def beginning(turn: int, step: int, size: int) -> int:
    """Where a lattice with this step begins in the turn-th observation: a number below the step, and below the size, so that something is read."""
    return turn * _PRIME % max(1, min(step, size))


def spaced(size: int, wanted: int, turn: int) -> slice:
    """About `wanted` of `size` indices, evenly spaced."""
    # A step that divides the size would meet the same column of an image, or the same window, in every observation.
    step = coprime(max(1, -(-size // max(1, wanted))), (size,))
    return slice(beginning(turn, step, size), size, step)


@dataclass(frozen=True)
class Sample:
    """The elements of a dense tensor that are read: every `step`-th one in memory order, from `start` on."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    """The axes in memory order, outermost first."""
    start: int
    step: int

    @staticmethod
    def of(tensor: Tensor, limit: int | None, turn: int) -> Sample:
        """At most `limit` elements of a tensor (None: all) in the turn-th observation."""
        return _sample(tuple(tensor.shape), tensor.stride(), limit, turn)

    def take(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor of the same shape, or of one that broadcasts to it, as a vector; a view where that is possible."""
        if tensor.stride() == self.strides and tuple(tensor.shape) == self.shape:
            return tensor.as_strided((self.n,), (self.step,), tensor.storage_offset() + self.start)
        flat = tensor.expand(self.shape).permute(self.order).reshape(-1)
        return flat if self.step == 1 else flat[self.start :: self.step]

    @functools.cached_property
    def n(self) -> int:
        """How many elements are read."""
        return max(0, -(-(math.prod(self.shape) - self.start) // self.step))

    @functools.cached_property
    def elements(self) -> int:
        """How many elements the tensor has, read or not."""
        return math.prod(self.shape)

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """The strides of a dense tensor of this shape and order."""
        strides, inner = [0] * len(self.shape), 1
        for axis in reversed(self.order):
            strides[axis] = inner
            inner *= self.shape[axis]
        return tuple(strides)

    def spread(self, parameter: Tensor) -> Tensor:
        """The value of a learned parameter at each element read. The parameter is one number, one number per channel (dimension 1, as in PReLU), or a
        tensor that broadcasts."""
        if parameter.numel() == 1:
            return parameter.reshape(())
        if parameter.ndim == 1 and len(self.shape) > 1:
            parameter = parameter.reshape(-1, *([1] * (len(self.shape) - 2)))
        return self.take(parameter)


@functools.lru_cache(maxsize=4096)
def _sample(shape: tuple[int, ...], strides: tuple[int, ...], limit: int | None, turn: int) -> Sample:
    order = tuple(sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis)))
    total = math.prod(shape)
    step = coprime(1 if limit is None else -(-total // limit) or 1, shape)
    return Sample(shape, order, beginning(turn, step, total), step)


@dataclass(eq=False)
class Units:
    """Which unit (channel or feature) each element of a sample belongs to: its index along `axis`."""

    sample: Sample
    axis: int

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.sample.shape[self.axis]

    @property
    def place(self) -> tuple[int, int, int, int]:
        """(start, step, inner, size): element i of the sample is element start + i * step of the tensor, and belongs to the unit
        (start + i * step) // inner % size."""
        sample = self.sample
        after = sample.order[sample.order.index(self.axis) + 1 :]
        return sample.start, sample.step, math.prod(sample.shape[dim] for dim in after), self.size

    def index(self, device: torch.device) -> Tensor:
        """The unit of each element, as a vector on a device."""
        if self._index is None or self._index.device != device:
            start, step, inner, size = self.place
            taken = torch.arange(start, math.prod(self.sample.shape), step, device=device)
            self._index = taken.div(inner, rounding_mode="floor").remainder(size)
        return self._index

    _index: Tensor | None = None
