"""How a share is printed for people, as a percentage, and what may be unknown or too long; standard library only.

The Saturation tab prints shares as well, in JavaScript. It gets the thresholds below as data (view.scales), so that both print the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PercentFormat:
    """The thresholds of the format, all in per cent."""

    least: float = 0.1
    """What lies between 0 and this is printed as `< 0.1 %`: only an exact 0 is printed as 0."""
    most: float = 99.9
    """What lies between this and 100 is printed as `> 99.9 %`: only an exact 100 is printed as 100."""
    fine_below: float = 10.0
    """Percentages below this one, and above `fine_above`, have decimals; the others have none."""
    fine_above: float = 90.0
    decimals: int = 1


PERCENT = PercentFormat()


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage."""
    points = 100 * share
    if 0 < points < PERCENT.least:
        return f"< {PERCENT.least:g} %"
    if PERCENT.most < points < 100:
        return f"> {PERCENT.most:g} %"
    decimals = PERCENT.decimals if points < PERCENT.fine_below or points > PERCENT.fine_above else 0
    return f"{points:.{decimals}f} %"


def percent_or_dash(share: float | None) -> str:
    """A share as a percentage; a dash if it is not known."""
    return "-" if share is None else percent(share)


def number_or_dash(value: float | None, form: str = "{:.3g}") -> str:
    """A number in a format; a dash if it is not known."""
    return "-" if value is None else form.format(value)


def listed(names: Sequence[str], most: int) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
