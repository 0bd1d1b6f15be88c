"""What the kernels of both devices agree on: derivatives that they compute by themselves, from z, and the bins of the histogram.

All other derivatives are computed by torch and handed to the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torchsat.activations import ACTIVATIONS, Bound
from torchsat.record import OCTAVES

FIRST_BIN = (127 - OCTAVES) * 2 - 1
"""The exponent and first mantissa bit of the float32 that is the upper edge of the first bin of the histogram."""
GIVEN, LOGISTIC, BETWEEN, SILU, GELU, GELU_ERF = range(6)


@dataclass(frozen=True)
class Formula:
    """|f'(z)|, as one of these kinds.

    LOGISTIC: c s(b z) s(-b z), with s the logistic function.
    BETWEEN: c where b < z < d, else 0.
    SILU: |s(z) (1 + z s(-z))|.
    GELU: of the approximation by tanh: |s(u) + z s(u) s(-u) u'|, with u = 2 sqrt(2 / pi) (z + 0.044715 z^3).
    GELU_ERF: |F(z) + z F'(z)|, with F the distribution function of the standard normal distribution.
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
"""Of the rows of ACTIVATIONS with these names."""
_DERIVATIVES = {row.name: row.derivative for row in ACTIVATIONS}


def formula(bound: Bound) -> Formula | None:
    """The formula of a function, if it is one of torchsat's own that there is one for."""
    name = bound.activation.name
    if name not in _FORMULAS or bound.learned or bound.derivative is not _DERIVATIVES[name]:
        return None
    return _FORMULAS[name](**bound.plain)
