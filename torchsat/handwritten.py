"""Activations that torch has no module for and that models write out by hand, with one parameter that is found from numbers.

A row is an `Activation` as in activations.py. Beside it stands a guess: from elements z and a = f(z), the parameter that the function would have if
it were of this family, or None. Whether it is one is not decided by the guess, but by how well all elements fit (recognise.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsat.activations import ACTIVATIONS, CLAMP, Activation

QUICK_GELU = Activation(
    "quick_gelu",
    derivative=lambda z: torch.sigmoid(1.702 * z) * (1 + 1.702 * z * torch.sigmoid(-1.702 * z)),
    function=lambda z: z * torch.sigmoid(1.702 * z),
)
SQUARED_RELU = Activation(
    "squared_relu",
    derivative=lambda z: 2 * F.relu(z),
    peak=math.inf,
    tails=lambda epsilon: (0.0, None),
    function=lambda z: F.relu(z).square(),
)
"""Its slope has no bound, but is 0 on the low side whatever the peak."""
CLIPPED_SQUARED_RELU = Activation(
    "clipped_squared_relu",
    parameters=("cap",),
    derivative=lambda z, cap: 2 * F.relu(z) * (z.square() < cap),
    peak=lambda cap: 2 * math.sqrt(cap),
    tails=lambda epsilon, cap: (epsilon * math.sqrt(cap), math.sqrt(cap)),
    function=lambda z, cap: F.relu(z).square().clamp(max=cap),
)
"""`relu(z).square().clamp(max=cap)`, which bounds the spikes of a squared ReLU. Until an element reaches the cap it cannot be told from one."""
SINE = Activation(
    "sin",
    parameters=("omega",),
    derivative=lambda z, omega: omega * torch.cos(omega * z),
    peak=lambda omega: abs(omega),
    tails=lambda epsilon, omega: (None, None),
    function=lambda z, omega: torch.sin(omega * z),
)
SNAKE = Activation(
    "snake",
    parameters=("alpha",),
    derivative=lambda z, alpha: 1 + torch.sin(2 * alpha * z),
    peak=lambda alpha: 2.0,
    tails=lambda epsilon, alpha: (None, None),
    function=lambda z, alpha: z + torch.sin(alpha * z).square() / alpha,
)
SWISH = Activation(
    "swish",
    parameters=("beta",),
    derivative=lambda z, beta: torch.sigmoid(beta * z) * (1 + beta * z * torch.sigmoid(-beta * z)),
    function=lambda z, beta: z * torch.sigmoid(beta * z),
)


def _soft_cap_edge(epsilon: float, cap: float) -> float:
    return cap * math.acosh(epsilon**-0.5)


SOFT_CAP = Activation(
    "soft_cap",
    parameters=("cap",),
    derivative=lambda z, cap: 4 * torch.sigmoid(2 * z / cap) * torch.sigmoid(-2 * z / cap),
    peak=lambda cap: 1.0,
    tails=lambda epsilon, cap: (-_soft_cap_edge(epsilon, cap), _soft_cap_edge(epsilon, cap)),
    function=lambda z, cap: cap * torch.tanh(z / cap),
)
"""`cap * tanh(z / cap)`, which bounds logits."""
JUMP_RELU = Activation(
    "jump_relu",
    parameters=("theta",),
    derivative=lambda z, theta: (z > theta).to(z.dtype),
    peak=lambda theta: 1.0,
    tails=lambda epsilon, theta: (theta, None),
    function=lambda z, theta: z * (z > theta),
)


def frequency(row: Activation, given: Mapping[str, Any]) -> float:
    """By how much z is multiplied before a sine is taken of it: the rounding of that product grows with z. 0 for every other function."""
    return float(abs(given.get({"sin": "omega", "snake": "alpha"}.get(row.name, ""), 0.0)))


PLAIN: tuple[Activation, ...] = (QUICK_GELU, SQUARED_RELU)
"""The rows without a parameter."""
Guess = Callable[[Tensor, Tensor], "dict[str, Any] | None"]


@dataclass(frozen=True)
class Family:
    """A function with a parameter that has to be found."""

    row: Activation
    guess: Guess


def _row(name: str) -> Activation:
    return next(row for row in ACTIVATIONS if row.name == name)


def _nearest_to_zero(z: Tensor, count: int = 16) -> Tensor:
    """The indices of the elements nearest to 0."""
    return z.abs().argsort()[:count]


def _guess_sine(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    near = _nearest_to_zero(z)
    if bool((a.abs() > 1 + 1e-6).any()) or bool((z[near] == 0).any()):
        return None
    return _refined(SINE, "omega", float((a[near].clamp(-1, 1).asin() / z[near]).median()), z, a)


def _guess_snake(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    near = _nearest_to_zero(z, 64)[-16:]
    return _refined(SNAKE, "alpha", float(((a - z)[near] / z[near].square().clamp(min=1e-12)).median()), z, a)


def _guess_swish(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    inner = (a / z > 0) & (a / z < 1) & (z.abs() > 0.1)
    if not bool(inner.any()):
        return None
    return _refined(SWISH, "beta", float((torch.logit((a / z)[inner]) / z[inner]).median()), z, a)


def _guess_soft_cap(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    """The cap grows with a at a given z, so that it is found by bisection at the largest z."""
    at = z.abs().argmax()
    top, bound = float(z[at].abs()), float(a[at].abs())
    if not 0 < bound < top:
        return None
    low, high = bound, 1e3 * top
    for _ in range(60):
        cap = math.sqrt(low * high)
        low, high = (low, cap) if cap * math.tanh(top / cap) > bound else (cap, high)
    return _refined(SOFT_CAP, "cap", math.sqrt(low * high), z, a)


def _guess_jump(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    off, on = z[a == 0], z[a != 0]
    low, high = float(off.max()) if len(off) else math.inf, float(on.min()) if len(on) else -math.inf
    # Of the numbers between the last element that is off and the first that is on, the one with the fewest digits.
    found = (round((low + high) / 2, digits) for digits in range(12))
    theta = next((each for each in found if low <= each < high), None) if math.isfinite(low) and math.isfinite(high) else None
    return None if theta is None else {"theta": theta}


def _guess_leaky(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    low = z < -0.01
    slope = _short(float((a[low] / z[low]).median())) if bool(low.any()) else 0.0
    return {"negative_slope": slope} if slope > 0 else None


def _guess_elu(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    low = z < -0.1
    return {"alpha": _short(float((a[low] / torch.expm1(z[low])).median()))} if bool(low.any()) else None


def _guess_clamp(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    """The bounds are the extremes of a, where several elements lie on them."""
    low, high = float(a.min()), float(a.max())
    at_low, at_high = int((a == low).sum()) > 1 and bool((z < low).any()), int((a == high).sum()) > 1 and bool((z > high).any())
    return {"min": low if at_low else None, "max": high if at_high else None} if (at_low or at_high) and low < high else None


def _guess_clipped_square(z: Tensor, a: Tensor) -> dict[str, Any] | None:
    """The cap is the largest a, where several elements lie on it."""
    cap = float(a.max())
    return {"cap": cap} if cap > 0 and int((a == cap).sum()) > 1 and bool((z.square() > cap).any()) else None


def _refined(row: Activation, name: str, value: float, z: Tensor, a: Tensor) -> dict[str, Any] | None:
    """A parameter after some steps of Gauss and Newton on the elements that the first guess fits best; None where they lead nowhere."""
    function = row.function
    assert function is not None
    for _ in range(6):
        if not math.isfinite(value) or value == 0:
            return None
        step = 1e-6 * abs(value)
        error = a - function(z, value)
        kept = error.abs() <= error.abs().median()
        slope = (function(z, value + step) - function(z, value - step)) / (2 * step)
        value += float((slope * error)[kept].sum() / slope.square()[kept].sum().clamp(min=1e-300))
    return {name: _short(value)}


def _short(value: float) -> float:
    """A parameter with six digits, which is what numbers in float32 tell. Nobody writes one with more."""
    return float(f"{value:.6g}")


FAMILIES: tuple[Family, ...] = (
    Family(_row("leaky_relu"), _guess_leaky),
    Family(JUMP_RELU, _guess_jump),
    Family(CLAMP, _guess_clamp),
    Family(CLIPPED_SQUARED_RELU, _guess_clipped_square),
    Family(_row("elu"), _guess_elu),
    Family(SWISH, _guess_swish),
    Family(SINE, _guess_sine),
    Family(SNAKE, _guess_snake),
    Family(SOFT_CAP, _guess_soft_cap),
)
"""The functions that are tried where no row without a parameter fits."""
