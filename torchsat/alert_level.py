"""How near a place is to an alert, on one scale for all rules and activations; standard library only.

A saturated share of 50 % is healthy at a ReLU and bad at a tanh, and an entropy has another scale than a gradient norm. The limits of the rules know
that. So the level says where the value of the worst rule stands between nothing, the limit of a warning and the limit of a critical alert:

    0        on the safe side of all limits, where an alert that fires would clear
    0.5      at the limit of a warning
    1        at the limit of a critical alert, or beyond it

Between the safe side and a warning the level is linear in the ratio of value and limit. Between the two limits it is linear in the logarithm of the
value, since some limits lie powers of ten apart. Unlike an alert it has no patience: it judges one observation alone.
"""

from __future__ import annotations

import math
from typing import Any

from torchsat.rules import HYSTERESIS, Rule
from torchsat.shown import WARNING


def alert_level(rule: Rule, value: float, item: Any) -> float:
    """The level of one value of a rule at a record or weight, from 0 (healthy) to 1 (critical)."""
    warning, critical = rule.limit("warning", item), rule.limit("critical", item)
    if critical is not None and rule.beyond(value, critical):
        return 1.0
    if warning is not None and rule.beyond(value, warning):
        return WARNING if critical is None else WARNING + (1 - WARNING) * _between(value, warning, critical)
    limit = critical if warning is None else warning
    return 0.0 if limit is None else _before(_nearness(rule, value, limit))


def way_to_warning(rule: Rule, value: float, item: Any) -> float | None:
    """How much of the way to the limit of a warning a value has gone: 0 is far away, 1 at the limit or beyond it; None where there is no warning.

    Unlike the level it is not 0 on the whole safe side, so that it tells one healthy network from another. A share begins at 0, and is linear. What
    compares two numbers (a limit above 1 for what must not be large, or below 1 for what must not be small) begins at 1, and is logarithmic.
    """
    limit = rule.limit("warning", item)
    if limit is None:
        return None
    if rule.beyond(value, limit):
        return 1.0
    if limit > 0 and (limit < 1 if rule.below else limit > 1):
        return max(0.0, math.log(value) / math.log(limit)) if 0 < value < math.inf else 0.0
    return _nearness(rule, value, limit)


def _between(value: float, start: float, end: float) -> float:
    """Where a value lies between two limits, from 0 to 1."""
    if value > 0 and start > 0 and end > 0:
        value, start, end = math.log(value), math.log(start), math.log(end)
    return min(1.0, max(0.0, (value - start) / (end - start))) if end != start else 0.0


def _nearness(rule: Rule, value: float, limit: float) -> float:
    """How near a value that is not beyond its limit is to it: 1 at the limit, 0 far away. Ratios of numbers that are not positive say nothing."""
    if not (value > 0 and limit > 0) or not math.isfinite(value):
        return 0.0
    return limit / value if rule.below else value / limit


def _before(nearness: float) -> float:
    """The level below the limit of a warning."""
    return WARNING * max(0.0, nearness - HYSTERESIS) / (1 - HYSTERESIS)
