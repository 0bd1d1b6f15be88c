"""How a share is printed for people, as a percentage; standard library only.

The Saturation tab prints shares as well, in JavaScript. It gets the thresholds below as data (view.scales), so that both print the same.
"""

from __future__ import annotations

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
