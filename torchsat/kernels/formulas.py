"""What the kernels of both devices agree on: which derivatives they compute themselves from z, and the bins of the histogram.

All other derivatives are computed by torch and passed to the kernels as a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torchsat.activations import ACTIVATIONS, Bound
from torchsat.record import OCTAVES

FIRST_BIN = (127 - OCTAVES) * 2 - 1
"""The exponent and the first bit of the mantissa of the float32 at the upper edge of the histogram's first bin, as one integer. Each bin is one
more."""
GIVEN, LOGISTIC, BETWEEN, SILU, GELU, GELU_ERF = range(6)
"""The kinds of derivatives. GIVEN is a vector that torch has computed; `Formula` says what the others are."""


@dataclass(frozen=True)
class Formula:
    """|f'(z)|, as one of these kinds.

    LOGISTIC: c s(b z) s(-b z), where s is the logistic function.
    BETWEEN: c where b < z < d, else 0.
    SILU: |s(z) (1 + z s(-z))|.
    GELU: |s(u) + z s(u) s(-u) u'|, where u = 2 sqrt(2 / pi) (z + 0.044715 z^3): the approximation by tanh.
    GELU_ERF: |F(z) + z F'(z)|, where F is the distribution function of the standard normal distribution.
    """

    kind: int
    b: float = 0.0
    c: float = 1.0
    d: float = math.inf


_FORMULAS: dict[str, Callable[..., Formula]] = {
    "sigmoid": lambda: Formula(LOGISTIC, 1.0, 1.0),
    "tanh": lambda: Formula(LOGISTIC, 2.0, 4.0),
    "relu": lambda: Formula(BETWEEN),
    "relu6": lambda: Formula(BETWEEN, 0.0, 1.0, 6.0),
    "hardtanh": lambda min_val, max_val: Formula(BETWEEN, float(min_val), 1.0, float(max_val)),
    "hardsigmoid": lambda: Formula(BETWEEN, -3.0, 1 / 6, 3.0),
    "threshold": lambda threshold, value: Formula(BETWEEN, float(threshold)),
    "silu": lambda: Formula(SILU),
    "gelu": lambda approximate: Formula(GELU if approximate == "tanh" else GELU_ERF),
}
"""The formula of each row of ACTIVATIONS that has one, by name, as a function of its parameters."""
_DERIVATIVES = {row.name: row.derivative for row in ACTIVATIONS}


def formula(bound: Bound) -> Formula | None:
    """The formula of a function; None where it has none, or where its derivative is not the one that torchsat's own row states."""
    name = bound.activation.name
    if name not in _FORMULAS or bound.learned or bound.derivative is not _DERIVATIVES[name]:
        return None
    return _FORMULAS[name](**bound.plain)
