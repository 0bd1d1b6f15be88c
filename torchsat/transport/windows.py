"""Adds up unit blocks over observations, on the host, until every unit (channel or feature) has enough samples to tell whether it is stuck."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from torchsat.columns import BLOCK, UNITS

UNIT_SAMPLES = 1000
"""How many samples a unit must have before it can be called stuck. At 50 % saturation, 128 independent samples are all saturated or all not once in
10^38 times, but the samples of one batch are not independent."""
STUCK_SHARE = 0.99
"""A unit is stuck if at least this share of its samples is saturated."""
_READ = BLOCK.index("samples_read")
Block = NDArray[np.float64]
"""[3, units]: columns.BLOCK of each unit."""


class UnitWindows:
    """The window of each site: its unit blocks, added up since the last full window.

    A window is full once UNIT_SAMPLES samples of every unit have been read. The next observation then begins a new window.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Block] = {}

    def get(self, site: str) -> Block | None:
        """The window of a site as it is now; None where it has none."""
        return self._blocks.get(site)

    def add(self, site: str, block: Block) -> list[float]:
        """Add the block of one observation. Another number of units than before begins a new window.

        Returns:
            The numbers of columns.UNITS of the window, this observation included.
        """
        known = self._blocks.get(site)
        begins = known is None or known.shape != block.shape or known[_READ].min() >= UNIT_SAMPLES
        window = self._blocks[site] = block.copy() if known is None or begins else known + block
        return _summary(window)

    def drop(self, site: str) -> None:
        """Forget the window of a site that has no block any more."""
        self._blocks.pop(site, None)

    def keep(self, units: Mapping[str, int | None]) -> None:
        """Keep only the windows of sites that still have as many units as before."""
        self._blocks = {site: window for site, window in self._blocks.items() if window.shape[1] == (units.get(site) or 0)}

    def start_over(self) -> None:
        """Forget every window."""
        self._blocks.clear()


def _summary(window: Block) -> list[float]:
    """The numbers of columns.UNITS for a window."""
    # Which share of a unit is saturated is weighed by what each call has, and how sure that is depends on how many samples were read.
    samples, saturated, read = window
    least, most = float(read.min()), float(read.max())
    if most < UNIT_SAMPLES:
        return [len(samples), 0.0, 0.0, least]
    measured = read >= UNIT_SAMPLES
    stuck = measured & (saturated >= STUCK_SHARE * samples)
    summary = [len(samples), float(measured.sum()), float(stuck.sum()), least]
    assert len(summary) == len(UNITS)
    return summary
