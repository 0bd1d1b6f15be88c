"""Finds out what a user's module computes, where the table of activations has no row for its type.

The module is never run for this: it is judged by the inputs z and outputs a of its real calls. If they fit one row of the table, the module is that
function. Where none does, the functions with one parameter are tried that models write by hand (handwritten.py). Several rows can fit: on positive
numbers ReLU is the identity, and in bfloat16 the two forms of GELU are the same. Then the best fit is taken where all that fit have one name or agree
at every z, and otherwise nothing is said before other numbers tell them apart.

How far the outputs of two ways to write a function lie apart is the rounding of their terms, which are as large as a, as z and as 1: in
`0.5 * z * (1 + erf(z / sqrt(2)))` the sum is rounded to eps although it vanishes for negative z, so that a is off by eps * |z| / 4 where it is nearly
0. A function that no row fits is *anonymous*: only its derivative can be known, from gradients (elementwise.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchsat.activations import Activation, Bound, bind_plain
from torchsat.functions import CURVES
from torchsat.handwritten import FAMILIES, PLAIN, Guess, frequency

_MOST = 8192
"""The most elements that are compared."""
_FIRST = 64
"""The elements that are compared first. Most rows are refuted by these."""
_FEWEST = 16
"""With fewer elements nothing is concluded."""
_BIN, _REACH = 0.5, 10.0
"""Width in z of the bins over which the errors of a low precision are averaged, and where the last bins begin."""


@dataclass(frozen=True)
class Recognition:
    """What the numbers of a module say."""

    bound: Bound | None
    """The function; None where no row fits, or where the numbers could be those of several."""
    may_come: bool = False
    """Whether some row fits, so that other numbers may still show which function it is."""


@dataclass(frozen=True)
class _Fit:
    """One row that fits."""

    row: Activation
    given: dict[str, Any]
    made: Tensor
    """Its values at the z that are compared."""
    error: float
    """The root of the mean squared error, in units of the rounding that is expected at each element."""


def recognise(z: Tensor, a: Tensor, rows: Sequence[Activation], epsilon: float) -> Recognition:
    """The function f with a = f(z): one of these rows with its default parameters, the tanh form of GELU, or one that models write by hand.

    Only numbers are compared, in the precision of a; no function of the user's module is called.

    Args:
        z, a: elements of one call of a module that no row names.
    """
    numbers = _Numbers(z, a)
    if numbers.z.numel() < _FEWEST:
        return Recognition(None, may_come=True)
    fits = [fit for row, given in _candidates((*rows, *PLAIN, *CURVES)) if (fit := numbers.fit(row, given)) is not None]
    if not fits and numbers.is_exact and not numbers.is_narrow:
        fits = [fit for each in FAMILIES if (given := numbers.guess(each.guess)) is not None and (fit := numbers.fit(each.row, given)) is not None]
    if not fits:
        return Recognition(None)
    best = min(fits, key=lambda fit: fit.error)
    others = [fit for fit in fits if fit.row.name != best.row.name and not numbers.agree(fit.made, best.made)]
    if others or numbers.is_narrow or numbers.is_linear:
        return Recognition(None, may_come=True)
    # Of those that agree everywhere, such as ELU and CELU, the first one in the table is taken.
    first = next(fit for fit in fits if fit.row.name == best.row.name or numbers.agree(fit.made, best.made))
    chosen = best if first.row.name == best.row.name else first
    return Recognition(bind_plain(chosen.row, epsilon, chosen.given))


def differs(bound: Bound, z: Tensor, a: Tensor) -> Tensor:
    """Whether a is no longer f(z) for a function that was recognised before: a boolean tensor on the device, true if they differ."""
    function = bound.activation.function or bound.activation.calls[0]
    made = function(z.clone(), **bound.plain)
    return ((made - a.to(made)).abs() > 4 * _tolerance(a.dtype) * _size(z, made, frequency(bound.activation, bound.plain))).any()


def anonymous(name: str, epsilon: float) -> Bound:
    """A function of which only the derivative at each element can be known, from gradients. It has neither a peak nor tails."""
    return Bound(Activation(name), _unknown, {}, {}, epsilon, None)


def is_anonymous(bound: Bound) -> bool:
    """Whether this is a function that no row of the table fits."""
    return bound.derivative is _unknown


class _Numbers:
    """The elements that are compared, in float64 on the host."""

    def __init__(self, z: Tensor, a: Tensor) -> None:
        self._tolerance = _tolerance(a.dtype)
        self._averages = a.dtype in (torch.float16, torch.bfloat16)
        z, a = z.cpu().double(), a.cpu().double()
        finite = torch.isfinite(z) & torch.isfinite(a)
        z, a = z[finite], a[finite]
        reach = 1.5 if self._averages else 0.1
        self.is_narrow = not bool((z > 0.1).any()) or not bool((z < -0.1).any()) or not bool((z.abs() > reach).any())
        """Whether z has one sign, or is so near to 0 that rounding hides what tells the functions apart."""
        if z.numel() > _MOST:
            # At random, with a generator of our own: every n-th element could belong to a few channels only.
            taken = torch.randperm(z.numel(), generator=torch.Generator().manual_seed(0))[:_MOST]
            z, a = z[taken], a[taken]
        self.z, self._a = z, a
        self._bins = ((z.clamp(-_REACH, _REACH) + _REACH) / _BIN).long()

    def fit(self, row: Activation, given: dict[str, Any]) -> _Fit | None:
        """How well a row fits; None where it does not."""
        function = row.function or row.calls[0]
        expected = self._tolerance * _size(self.z, self._a, frequency(row, given))
        if not bool(((function(self.z[:_FIRST].clone(), **given) - self._a[:_FIRST]).abs() <= expected[:_FIRST]).all()):
            return None
        errors = ((made := function(self.z.clone(), **given)) - self._a) / expected
        return _Fit(row, given, made, float(errors.square().mean().sqrt())) if self._fits(errors) else None

    def agree(self, one: Tensor, other: Tensor) -> bool:
        """Whether two functions have the same values at all these z, even in float32."""
        return bool(((one - other).abs() <= _tolerance(torch.float32) * _size(self.z, one)).all())

    @property
    def is_exact(self) -> bool:
        """Whether a parameter can be found: in a low precision several functions with one would fit."""
        return not self._averages

    def guess(self, guess: Guess) -> dict[str, Any] | None:
        """The parameter that a family of functions would have."""
        return guess(self.z, self._a)

    @property
    def is_linear(self) -> bool:
        """Whether a straight line fits too."""
        z = self.z - self.z.mean()
        slope = z.dot(self._a) / z.dot(z).clamp(min=1e-300)
        return self._fits((slope * z + self._a.mean() - self._a) / (self._tolerance * _size(self.z, self._a)))

    def _fits(self, errors: Tensor) -> bool:
        """Whether values differ from a by no more than rounding, by their errors in units of the rounding that is expected.

        In low precision the bound on one rounding is so wide that other functions lie within it. But roundings have no preferred sign, so the mean
        error in each range of z must be much smaller: at most a fifth, beside three standard errors of it.
        """
        if not bool((errors.abs() <= 1).all()):
            return False
        if not self._averages:
            return True
        count = torch.bincount(self._bins).double()
        mean, square = (torch.bincount(self._bins, weights=each) / count.clamp(min=1) for each in (errors, errors.square()))
        standard = ((square - mean.square()).clamp(min=0) / count.clamp(min=1)).sqrt()
        return bool(((mean.abs() <= 0.2 + 3 * standard) | (count < 8)).all())


def _candidates(rows: Sequence[Activation]) -> Iterator[tuple[Activation, dict[str, Any]]]:
    """Each row whose function can be computed, with its parameters."""
    for row in rows:
        if row.derivative is None or row.from_output or len(row.defaults) != len(row.parameters) or not (row.calls or row.function):
            continue
        for values in (row.defaults, *([("tanh",)] if row.name == "gelu" else [])):
            yield row, dict(zip(row.parameters, values, strict=True))


def _size(z: Tensor, a: Tensor, frequency: float = 0.0) -> Tensor:
    """The size of the terms whose rounding a carries."""
    return a.abs() + (0.25 + 0.25 * frequency) * z.abs() + 0.25


def _tolerance(dtype: torch.dtype) -> float:
    """How far two ways to write a function may lie apart, in units of `_size`.

    Measured over 27 spellings of the rows of the table, operation by operation in each type: at most 2 eps in a low precision, and 10 in float32,
    where constants are also written with few digits. Such constants are no better in float64.
    """
    return 2 * torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 32 * torch.finfo(torch.float32).eps


def _unknown(z: Tensor) -> Tensor:
    return torch.full_like(z, math.nan)
