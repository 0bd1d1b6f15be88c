"""Finds out from gradients whether a user's module acts on each element alone, where no row of the table fits it, and so has a derivative f'(z).

The backward that the user runs gives dL/da and dL/dz at the same elements. If a = f(z) element by element, their quotient is f'(z). For anything else
(a norm, a dropout, a softmax, a convolution) the quotient is some other number. Two facts tell them apart:

1. The quotient of an activation is a function of z, and not the same everywhere. Elements that are neighbours when sorted by z then have nearly the
   same quotient; for the mask of a dropout, or where other elements have a part in dL/dz, neighbours have nothing to do with each other. The test is
   von Neumann's ratio (1941), the mean squared difference of neighbours over twice the variance: 0 for a smooth function, 1 for independent numbers.
2. The quotient is the derivative of what the forward pass computed: the mean of two neighbours is the slope of a between them or, where the module
   adds noise to a, the integral over z is a up to a constant. The quotients of a norm can look like a function of z where dL/da is one, as behind a
   sum of squares, but that function is not the derivative of a.

A function can have a parameter for each channel or feature, so both tests are also made within each unit of an axis. Nothing here runs anything of
the user's, and everything is computed on the host in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

_FEWEST = 32
"""With fewer elements, or fewer pairs of neighbours, nothing is concluded."""
_PER_UNIT = 8
"""The mean number of elements that a unit must have for a test within units."""
_PER_BLOCK, _BLOCKS = 4, 16
"""The elements of a unit, sorted by z, are averaged over blocks of at least 4 neighbours, in at most 16 blocks."""


class Nature(Enum):
    """What the gradients of one call show."""

    ACTIVATION = "its derivative is a function of z, and not constant"
    LINEAR = "its derivative is constant, at these elements"
    OTHER = "it does not act on each element alone"
    UNKNOWN = "there is no gradient, or that of z is 0 everywhere, or there are too few elements"


def nature(z: Tensor, a: Tensor, quotient: Tensor, units: Sequence[Tensor | None], rounding: float) -> Nature:
    """What a module computes, by the quotients of its gradients.

    Args:
        z, a, quotient: vectors of the elements at which the quotient is known.
        units: the groupings to try: for each the unit of each element, or None for no grouping.
        rounding: the relative error of a quotient.
    """
    z, a, quotient = z.double(), a.double(), quotient.double()
    if z.numel() < _FEWEST or not bool(quotient.any()):
        return Nature.UNKNOWN
    groupings = [_Grouping(z, each) for each in units if each is None or len(z) >= _PER_UNIT * int(each.unique().numel())]
    least = (4 * rounding) ** 2 * quotient.square().mean()
    varying = [each for each in groupings if each.centred(each.sort(quotient)).square().mean() > least]
    if len(varying) < len(groupings):
        return Nature.LINEAR
    if any(each.is_function(quotient) and each.is_derivative(quotient, a) for each in varying):
        return Nature.ACTIVATION
    return Nature.OTHER if len(groupings) == len(units) else Nature.UNKNOWN


def bends(z: Tensor, a: Tensor, units: Sequence[Tensor | None]) -> bool:
    """Whether a is a function of z, over all elements or within each unit, and no straight line: whether a module may be an activation."""
    z, a = z.double(), a.double()
    finite = torch.isfinite(z) & torch.isfinite(a)
    if int(finite.sum()) < _FEWEST:
        return False
    z, a = z[finite], a[finite]
    kept = [None if each is None else each[finite] for each in units]
    groupings = [_Grouping(z, each) for each in kept if each is None or len(z) >= _PER_UNIT * int(each.unique().numel())]
    rests = [each.bend(each.sort(a)) for each in groupings]
    least = 1e-4 * a.var(correction=0)
    return all(float(rest.square().mean()) > least for rest in rests) and any(
        each.roughness(rest) < 0.25 for each, rest in zip(groupings, rests, strict=True)
    )


class _Grouping:
    """The elements sorted by z, over all of them or within each unit."""

    def __init__(self, z: Tensor, units: Tensor | None) -> None:
        order = z.argsort()
        if units is None:
            unit = torch.zeros_like(order)
        else:
            order = order[units[order].argsort(stable=True)]
            unit = units[order].unique_consecutive(return_inverse=True)[1]
        self._order, self._unit, self._z = order, unit, z[order]
        self._count = torch.bincount(unit).double()
        self._neighbours = unit.diff() == 0

    def sort(self, values: Tensor) -> Tensor:
        return values[self._order]

    def centred(self, values: Tensor) -> Tensor:
        """Sorted values minus the mean of their unit."""
        return values - (torch.bincount(self._unit, weights=values) / self._count)[self._unit]

    def bend(self, values: Tensor) -> Tensor:
        """What is left of sorted values after a straight line in z has been taken off, within each unit."""
        z, values = self.centred(self._z), self.centred(values)
        above, below = (torch.bincount(self._unit, weights=z * each) for each in (values, z))
        return values - (above / below.clamp(min=1e-300))[self._unit] * z

    def roughness(self, values: Tensor) -> float:
        """Von Neumann's ratio of sorted values with mean 0; 1 where there are too few neighbours."""
        jumps, spread = values.diff()[self._neighbours].square(), float(values.square().mean())
        return float(jumps.mean()) / 2 / spread if jumps.numel() >= _FEWEST // 2 and spread else 1.0

    def is_function(self, quotient: Tensor) -> bool:
        """Whether the quotient is a function of z. Where there are few elements in a unit, neighbours lie further apart."""
        return self.roughness(self.centred(self.sort(quotient))) < min(0.5, 0.1 + 2 / float(self._count.mean()))

    def is_derivative(self, quotient: Tensor, a: Tensor) -> bool:
        """Whether the quotient is the derivative of a with respect to z."""
        return self._is_slope(quotient, a) or self._is_integral(quotient, a)

    def _is_slope(self, quotient: Tensor, a: Tensor) -> bool:
        """Whether the slope of a between two neighbours is the mean of their quotients, for most neighbours."""
        q, steps = self.sort(quotient), self._z.diff()
        kept = self._neighbours & (steps > 0)
        slope = self.sort(a).diff()[kept] / steps[kept]
        error = (slope - (q[1:] + q[:-1])[kept] / 2).abs()
        return len(error) >= _FEWEST // 2 and bool(error.median() < 0.1 * self.centred(q).abs().mean())

    def _is_integral(self, quotient: Tensor, a: Tensor) -> bool:
        """Whether a is the integral of the quotient over z, up to a constant in each unit.

        What a differs by from the integral is averaged over blocks of neighbours, so that noise which a module adds to its output has no part in it.
        It must be small against the part of the integral that is no straight line.
        """
        q = self.sort(quotient)
        steps = (q[1:] + q[:-1]) / 2 * self._z.diff() * self._neighbours
        integral = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
        error, curved = self.centred(self.sort(a) - integral), self.bend(integral)
        rank = torch.arange(len(q)) - torch.cat([self._count.new_zeros(1), self._count.cumsum(0)[:-1]]).long()[self._unit]
        blocks = torch.clamp(self._count.long() // _PER_BLOCK, 1, _BLOCKS)[self._unit]
        block = self._unit * _BLOCKS + (rank * blocks).div(self._count.long()[self._unit], rounding_mode="floor")
        size = torch.bincount(block).double()
        errors, signal = ((torch.bincount(block, weights=each).square() / size.clamp(min=1)).sum() for each in (error, curved))
        noise = error.diff()[self._neighbours].square().mean() / 2 * (size > 0).sum()
        return bool(errors <= 0.1 * signal + 2 * noise) and bool(signal >= 4 * noise)
