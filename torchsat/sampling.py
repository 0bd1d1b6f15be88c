"""Which elements of a tensor are read.

A sample is *stratified*: memory order is cut into as many strata of equal length as elements are to be read, and in each stratum one place is drawn.
A place is drawn by a hash of the number of the stratum and a seed, so that the user's random generators are not touched, and kernels in C, Triton and
torch find the same places by themselves. The first stratum begins at the first element and the last one ends at the last; a stratum may end within an
element, which then belongs to both neighbours in parts. So every element is read with the same probability.

The bound: whatever the tensor holds, the mean over n elements that are drawn in this way has no bias, and a variance of at most that of n independent
draws, since between strata there is no chance left. A share is known to 0.5 / sqrt(n), 0.2 points at n = 65536, as standard deviation.
tests/test_statistics.py holds it against patterns that are made to defeat sampling. Lattices, which read every k-th element, have no such bound: for
each of them there are patterns of which it sees one half only, and on tensors whose sizes are powers of two these are common (stripes,
checkerboards).

The seed differs between the observations and between the calls of one site, so that the micro-batches of a step are not read at the same places.
Sites that are called once in a pass share a seed, and those of the same shape share the places, which are computed once. z, a and the gradients of
one call are read at the same places."""

from __future__ import annotations

import collections
import functools
import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from torchsat.kernels import cpu

MIX = (0x7FEB352D, 0x846CA68B)
"""The factors of the hash `lowbias32` (Chris Wellons, https://nullprogram.com/blog/2018/07/31/). kernels/cpu.c and cuda_rows.py have it too."""
_WORD = 0xFFFFFFFF
_PART = 16384
_SPARE = 8
"""Bits of a hash that are left out: with the other 24, the number of a stratum and the place in it fit together into the 53 bits of a float64."""


def seed_of(turn: int, call: int) -> int:
    """The seed of the call-th call of a site in the turn-th observation. It has 31 bits: Triton would compile a kernel anew for a larger number."""
    return _mixed(_mixed(turn & _WORD) + call & _WORD) >> 1


def _mixed(value: int) -> int:
    value ^= value >> 16
    value = value * MIX[0] & _WORD
    value ^= value >> 15
    value = value * MIX[1] & _WORD
    return value ^ value >> 16


def places(size: int, count: int, seed: int, device: torch.device, rows: int = 1) -> Tensor:
    """[rows * count] places in a vector of this size: for each row its own, one in each of `count` strata, in rising order. They are int32 where that
    is enough.

    In exact numbers a place is floor((i + u) size / count), where u is the hash of stratum i as a fraction.
    """
    whole = rows * count
    # The CPU computes them in parts, which fit its cache. An MPS device has no float64.
    part = _PART if device.type in ("cpu", "mps") else max(1, whole)
    found = torch.empty(whole, dtype=torch.int32 if size < 2**31 else torch.int64, device="cpu" if device.type == "mps" else device)
    if device.type == "cpu" and cpu.reads():
        cpu.places(size, count, seed, rows, found)
        return found
    for first in range(0, whole, part):
        number = torch.arange(first, min(first + part, whole), device=found.device)
        mixed = (number + seed).bitwise_and_(_WORD)
        mixed ^= mixed >> 16
        mixed.mul_(MIX[0]).bitwise_and_(_WORD)
        mixed ^= mixed >> 15
        mixed.mul_(MIX[1]).bitwise_and_(_WORD)
        mixed ^= mixed >> 16
        stratum = number if rows == 1 else number.remainder_(count)
        place = mixed.bitwise_right_shift_(_SPARE).to(torch.float64).mul_(0.5 ** (32 - _SPARE)).add_(stratum).mul_(size / count)
        found[first : first + part] = place.clamp_(max=size - 1)
    return found.to(device)


@dataclass(frozen=True, eq=False)
class Sample:
    """The elements of a dense tensor that are read."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    """The axes in memory order, outermost first."""
    n: int
    """How many elements are read."""
    seed: int

    @staticmethod
    def of(tensor: Tensor, limit: int | None, seed: int) -> Sample:
        """At most `limit` elements of a tensor; None: all."""
        shape, strides = tuple(tensor.shape), tensor.stride()
        total = math.prod(shape)
        n = total if limit is None else min(limit, total)
        key = (shape, strides, n, seed)
        found = _samples.get(key)
        if found is None:
            found = _samples[key] = Sample(shape, _memory_order(shape, strides), n, seed)
        _latest.append(found)
        return found

    def take(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor of the same shape, or of one that broadcasts to it, as a vector: a view if all are read and that is possible."""
        if tensor.stride() == self.strides and tuple(tensor.shape) == self.shape:
            flat = tensor.as_strided((self.elements,), (1,), tensor.storage_offset())
        else:
            ordered = tensor.expand(self.shape).permute(self.order)
            rows = _rows(ordered) if not self.is_whole and self.is_indexed(tensor) else None
            if rows is not None:
                return cpu.take(rows, self.places(tensor.device))
            flat = ordered.reshape(-1)
        if self.is_whole:
            return flat
        if flat.stride(0) == 1 and self.is_indexed(flat):
            return cpu.take(flat, self.places(tensor.device))
        return flat.index_select(0, self.places(tensor.device))

    def is_indexed(self, tensor: Tensor) -> bool:
        """Whether the kernels for the CPU can take the elements from this tensor: they read places of 32 bits."""
        return self.elements < 2**31 and cpu.reads(tensor)

    def places(self, device: torch.device) -> Tensor:
        """The places of these elements in memory order. They are kept as long as the sample is: a call and its gradients use them."""
        found = self._places.get(device)
        if found is None:
            found = self._places[device] = places(self.elements, self.n, self.seed, device)
        return found

    def units(self, axis: int) -> Units:
        """The units of these elements, which lie along this axis."""
        found = self._units.get(axis)
        if found is None:
            found = self._units[axis] = Units(self, axis)
        return found

    @functools.cached_property
    def elements(self) -> int:
        """How many elements the tensor has, read or not."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether every element is read."""
        return self.n == self.elements

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

    @functools.cached_property
    def _places(self) -> dict[torch.device, Tensor]:
        return {}

    @functools.cached_property
    def _units(self) -> dict[int, Units]:
        return {}


def _rows(tensor: Tensor) -> Tensor | None:
    """The elements of a tensor in this order as [rows, columns] of neighbours; None where no view has them so."""
    if tensor.stride(-1) != 1:
        return None
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return None


_samples: weakref.WeakValueDictionary[tuple[tuple[int, ...], tuple[int, ...], int, int], Sample] = weakref.WeakValueDictionary()
"""The samples that are in use. Calls of tensors of the same shape share one, and so its places."""
_latest: collections.deque[Sample] = collections.deque(maxlen=4)
"""The samples that were asked for last. They stay in use for a while, so that a call of the same shape soon afterwards shares its places too."""


@functools.lru_cache(maxsize=4096)
def _memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis)))


class Units:
    """Which unit (channel or feature) each element of a sample belongs to: its index along `axis`."""

    def __init__(self, sample: Sample, axis: int) -> None:
        after = sample.order[sample.order.index(axis) + 1 :]
        self.place = (sample.elements, sample.n, sample.seed, math.prod(sample.shape[dim] for dim in after), sample.shape[axis])
        """(elements, n, seed, inner, size): of n elements, which are drawn from so many, the one at place p belongs to the unit p // inner % size."""
        self._index: Tensor | None = None
        self._table: Tensor | None = None

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.place[-1]

    @property
    def weight(self) -> float:
        """How many elements of the tensor each element that is read stands for."""
        return self.place[0] / max(1, self.place[1])

    def table(self) -> Tensor | None:
        """The unit of each element for the kernels of the CPU, kept for all calls of this sample; None where all elements are read, and the kernels
        count along."""
        if self._table is None and self.place[0] != self.place[1]:
            self._table = cpu.unit_table(self.place)
        return self._table

    def index(self, device: torch.device) -> Tensor:
        """The unit of each element, as a vector on a device."""
        if self._index is None or self._index.device != device:
            elements, n, seed, inner, size = self.place
            taken = torch.arange(elements, device=device) if n == elements else places(elements, n, seed, device)
            self._index = taken.div_(inner, rounding_mode="floor").remainder_(size)
        return self._index
