"""The element-wise functions of torch that are no activations of torch.nn: `sin`, `erf`, `exp`, `square` and the like, as a network may call them.

A row is an `Activation`, as in activations.py. Rows are of two kinds:

- CURVES have a slope with a bound, so that they have a peak and may have tails. A network uses them as it uses an activation (`sin` in SIREN), and
  they are judged like one.
- The other rows of FUNCTIONS have a slope without a bound, or the same slope everywhere (`abs`), so that no element of them is saturated. They stand
  in arithmetic on the way (`exp` in a state space model, `square` behind a ReLU): their numbers are shown, and only inf and nan are judged.

A call of one of them is no site yet: it may belong to a normalisation or to a loss. Whether it is one shows in the autograd graph
(observe/functions.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchsat.activations import Activation, calls_of

Slope = Callable[..., Tensor]
_NO_TAILS = (None, None)


def _curve(name: str, slope: Slope, peak: float | None, edge: Callable[[float], float] | None, *aliases: str) -> Activation:
    """A row with a bounded slope that is the same at z and -z. `edge` gives the place where its tails begin; None: it has none."""

    def tails(epsilon: float) -> tuple[float | None, float | None]:
        return _NO_TAILS if edge is None else (-edge(epsilon), edge(epsilon))

    return Activation(name, derivative=slope, peak=peak, tails=tails, calls=calls_of(name, *aliases))


def _sinc(z: Tensor) -> Tensor:
    """The derivative of sin(pi z) / (pi z). Near 0, where the difference below has no digits left, by its series."""
    x = math.pi * z
    small = x.abs() < 0.02
    away = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, -math.pi * x / 3 * (1 - x * x / 10), (torch.cos(x) - torch.sinc(z)) / away)


CURVES: tuple[Activation, ...] = (
    _curve("sin", torch.cos, 1.0, None),
    _curve("cos", torch.sin, 1.0, None),
    Activation("sinc", derivative=_sinc, calls=calls_of("sinc")),
    _curve("erf", lambda z: 2 / math.sqrt(math.pi) * torch.exp(-z * z), 2 / math.sqrt(math.pi), lambda e: math.sqrt(-math.log(e)), "special_erf"),
    _curve("erfc", lambda z: 2 / math.sqrt(math.pi) * torch.exp(-z * z), 2 / math.sqrt(math.pi), lambda e: math.sqrt(-math.log(e)), "special_erfc"),
    _curve("atan", lambda z: 1 / (1 + z * z), 1.0, lambda e: math.sqrt(1 / e - 1), "arctan"),
    _curve("asinh", lambda z: torch.hypot(z, torch.ones_like(z)).reciprocal(), 1.0, lambda e: math.sqrt(e**-2 - 1), "arcsinh"),
    _curve("ndtr", lambda z: torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi), 1 / math.sqrt(2 * math.pi), lambda e: math.sqrt(-2 * math.log(e))),
)
"""The functions with a bounded slope."""


def _open(name: str, slope: Slope | None, *aliases: str, parameters: tuple[str, ...] = (), calls: tuple[Callable[..., Any], ...] = ()) -> Activation:
    """A row without a peak."""
    return Activation(name, (), parameters, slope, math.inf, calls=calls or calls_of(name, *aliases))


SQUARE = _open("square", lambda z: 2 * z)
POWER = _open(
    "pow", lambda z, exponent: exponent * torch.pow(z, exponent - 1), parameters=("exponent",), calls=calls_of("pow", "float_power", "__pow__")
)
EXPONENTIAL = _open("pow", lambda z, base: math.log(base) * torch.exp(math.log(base) * z), parameters=("base",), calls=(Tensor.__rpow__,))
RECIPROCAL = _open("reciprocal", lambda z: -1 / (z * z))
QUOTIENT = _open("reciprocal", lambda z, above: -above / (z * z), parameters=("above",), calls=(Tensor.__rdiv__, Tensor.__rtruediv__))

FUNCTIONS: tuple[Activation, ...] = (
    *CURVES,
    SQUARE,
    POWER,
    EXPONENTIAL,
    RECIPROCAL,
    QUOTIENT,
    Activation("abs", derivative=torch.sign, peak=1.0, calls=calls_of("abs", "absolute")),
    _open("exp", torch.exp),
    _open("exp2", lambda z: math.log(2) * torch.exp2(z), "special_exp2"),
    _open("expm1", torch.exp, "special_expm1"),
    _open("log", lambda z: 1 / z),
    _open("log2", lambda z: 1 / (math.log(2) * z)),
    _open("log10", lambda z: 1 / (math.log(10) * z)),
    _open("log1p", lambda z: 1 / (1 + z), "special_log1p"),
    _open("sqrt", lambda z: 0.5 * torch.rsqrt(z)),
    _open("rsqrt", lambda z: -0.5 * torch.rsqrt(z) / z),
    _open("tan", lambda z: 1 + torch.tan(z).square()),
    _open("sinh", torch.cosh),
    _open("cosh", torch.sinh),
    _open("asin", lambda z: torch.rsqrt((1 - z) * (1 + z)), "arcsin"),
    _open("acos", lambda z: -torch.rsqrt((1 - z) * (1 + z)), "arccos"),
    _open("acosh", lambda z: torch.rsqrt((z - 1) * (z + 1)), "arccosh"),
    _open("atanh", lambda z: 1 / ((1 - z) * (1 + z)), "arctanh"),
    _open("erfinv", lambda z: 0.5 * math.sqrt(math.pi) * torch.exp(torch.erfinv(z).square()), "special_erfinv"),
    _open("logit", lambda z: 1 / (z * (1 - z)), "special_logit"),
    _open("lgamma", torch.digamma, "special_gammaln"),
    _open("digamma", lambda z: torch.polygamma(1, z), "special_psi"),
    _open("entr", lambda z: -torch.log(z) - 1, calls=(torch.special.entr,)),
    _open("erfcx", lambda z: 2 * (z * torch.special.erfcx(z) - 1 / math.sqrt(math.pi)), calls=(torch.special.erfcx,)),
    _open("log_ndtr", lambda z: math.sqrt(2 / math.pi) / torch.special.erfcx(-z / math.sqrt(2)), calls=(torch.special.log_ndtr,)),
    _open("i0", torch.special.i1, calls=calls_of("i0")),
)
"""Every function, by which calls it is heard, and its slope."""

ROWS: dict[Callable[..., Any], Activation] = {call: row for row in FUNCTIONS for call in row.calls}
"""The row of each function and method of torch."""
NAMES = frozenset(row.name for row in FUNCTIONS)
_JUDGED = frozenset(row.name for row in CURVES)


def is_judged(row: Activation) -> bool:
    """Whether a site of this row is judged as an activation is."""
    return row.name in _JUDGED
