"""Finds out what a user's module computes, where the table of activations has no row for its type.

The module is never run for this: it is judged by the inputs z and outputs a of its real calls. If they fit a row of the table, the module is that
function. Otherwise autograd gives f' at each element, as the quotient of dL/dz and dL/da, and `is_function` decides whether these quotients are the
derivative of an activation or something else, such as the mask of a dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsat.activations import Activation, Bound, bind_plain

_WITHOUT_MODULE = (
    Activation(
        "quick_gelu",
        derivative=lambda z: torch.sigmoid(1.702 * z) * (1 + 1.702 * z * torch.sigmoid(-1.702 * z)),
        function=lambda z: z * torch.sigmoid(1.702 * z),
    ),
    Activation("squared_relu", derivative=lambda z: 2 * F.relu(z), function=lambda z: F.relu(z).square()),
)
"""Functions that torch has no module for and that models write out by hand."""


def recognise(z: Tensor, a: Tensor, rows: Sequence[Activation], epsilon: float) -> Bound | None:
    """The function f with a = f(z): one of these rows with its default parameters, the tanh form of GELU, quick GELU or squared ReLU.

    Only numbers are compared, in the precision of a; no function of the user's module is called.

    Args:
        z, a: elements of one call of a module that no row names.

    Returns:
        The function. None where no row fits, or where the numbers could be those of several: there are too few, or z has one sign only.
    """
    tolerance = _tolerance(a.dtype)
    z, a = z.double(), a.double()
    finite = torch.isfinite(z) & torch.isfinite(a)
    z, a = z[finite], a[finite]
    if z.numel() < 16 or not bool((z > 0.1).any()) or not bool((z < -0.1).any()) or bool(torch.isclose(a, z, rtol=tolerance, atol=0).all()):
        return None
    for row in (*rows, *_WITHOUT_MODULE):
        if row.derivative is None or row.from_output or len(row.defaults) != len(row.parameters) or not (row.calls or row.function):
            continue
        function = row.function or row.calls[0]
        for values in (row.defaults, *([("tanh",)] if row.name == "gelu" else [])):
            given = dict(zip(row.parameters, values, strict=True))
            # Near a zero of the function the rounding is that of its terms, which are as large as z.
            made = function(z.clone(), **given)
            if bool(((made - a).abs() <= tolerance * (a.abs() + 0.1 * z.abs().clamp(max=1))).all()):
                return bind_plain(row, epsilon, given)
    return None


def differs(bound: Bound, z: Tensor, a: Tensor) -> Tensor:
    """Whether a is no longer f(z) for a function that was recognised before: a boolean tensor on the device, true if they differ."""
    function = bound.activation.function or bound.activation.calls[0]
    made = function(z.clone(), **bound.plain)
    return ((made - a.to(made)).abs() > 4 * _tolerance(a.dtype) * (made.abs() + z.abs().clamp(max=1))).any()


def _tolerance(dtype: torch.dtype) -> float:
    """How far two ways to write a function may lie apart, relatively. A float16 or bfloat16 result was rounded once, from a more precise one."""
    return torch.finfo(dtype).eps * (4 if dtype in (torch.float16, torch.bfloat16) else 64)


def is_function(z: Tensor, slope: Tensor, axes: Sequence[Tensor | None]) -> bool:
    """Whether a derivative that differs from element to element is a function of z, over all elements or within each unit of an axis.

    If it is one, elements that are neighbours when sorted by z have nearly the same slope; the slopes of a random mask have nothing to do with each
    other. The test is von Neumann's ratio (1941), the mean squared difference of neighbours over twice the variance: it is 0 for a smooth function
    and 1 for independent numbers. The limit is 0.5.

    Args:
        z, slope: vectors.
        axes: the groupings to try: for each the unit of each element, or None for no grouping.
    """
    spread = slope.double().var(correction=0)
    if not float(spread) > 1e-10 * float(slope.double().square().mean()):
        return False
    for units in axes:
        order = z.argsort() if units is None else z.argsort()[units[z.argsort()].argsort(stable=True)]
        jumps = slope.double()[order].diff().square()
        within = slope.double()
        if units is not None:
            sorted_units = units[order]
            jumps = jumps[sorted_units.diff() == 0]
            count = torch.zeros(int(units.max()) + 1, dtype=torch.float64, device=z.device).index_add_(0, units, torch.ones_like(within))
            mean = torch.zeros_like(count).index_add_(0, units, within) / count.clamp(min=1)
            within = within - mean[units]
            spread = within.square().mean()
            if not float(spread) > 1e-10 * float(slope.double().square().mean()):
                continue
        if jumps.numel() and float(jumps.mean()) < 0.5 * 2 * float(spread):
            return True
    return False


def differentiated(name: str, epsilon: float) -> Bound:
    """A function of which only the derivative at each element is known, from autograd. It has neither a peak nor tails."""
    return Bound(Activation(name), lambda z: torch.full_like(z, math.nan), {}, {}, epsilon, None)
