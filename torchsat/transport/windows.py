"""Unit blocks added up over observations, on the host, until every unit has enough samples to be called stuck or not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchsat.statistics import UNIT_SAMPLES, summarise_units


class Windows:
    """The window of each site: its unit block [2, units] (samples, saturated samples), summed since the last full window.

    A window is full once every unit has UNIT_SAMPLES samples. It is kept as it is until the next observation, which begins a new one.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}

    def add(self, site: str, block: Tensor) -> list[float]:
        """Add the block of one observation.

        Args:
            block: float64 [2, units]. Another number of units than before begins a new window.

        Returns:
            The numbers of columns.UNITS of the window, this observation included.
        """
        known = self._blocks.get(site)
        begins = known is None or known.shape != block.shape or float(known[0].min()) >= UNIT_SAMPLES
        window = block.clone() if known is None or begins else known.add_(block)
        self._blocks[site] = window
        summed: list[float] = summarise_units(window, torch.device("cpu")).tolist()
        return summed

    def drop(self, site: str) -> None:
        """Forget the window of a site that has no block any more."""
        self._blocks.pop(site, None)

    def keep(self, units: Mapping[str, int | None]) -> None:
        """Forget the windows of all sites but those that have as many units as before."""
        self._blocks = {site: window for site, window in self._blocks.items() if window.shape[1] == (units.get(site) or 0)}

    def start_over(self) -> None:
        """Forget every window."""
        self._blocks.clear()
