"""From merged rows to records: means, shares and ratios of the sums that came from the device; standard library only.

A transport reads its numbers into `SiteRow` and `LayerRow`; `to_record` and `to_weight` make of them what a Snapshot shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchsat.record import LayerFacts, SiteFacts


@dataclass(frozen=True)
class Stuck:
    """The last full window of a site's units."""

    share: float
    """Of its units, those that are stuck."""
    samples: int
    """Of the least sampled unit."""


@dataclass(frozen=True)
class SiteRow:
    """The numbers of one site, merged over calls and ranks, on the host."""

    facts: SiteFacts
    numbers: Sequence[float]
    """The columns of columns.ROW."""
    units: Sequence[float] | None = None
    """columns.UNITS of the window; None where the units are not always as many."""
    heads: Sequence[Sequence[float]] = ()
    """columns.HEADS, each with one number per head; empty where this is no softmax."""
    worst: float | None = None
    """Of several ranks: the highest saturated share of one rank alone, and that rank."""
    worst_rank: int | None = None
    nonfinite_rank: int | None = None


@dataclass(frozen=True)
class LayerRow:
    """The numbers of one layer, on the host."""

    facts: LayerFacts
    numbers: Sequence[float]
    """columns.LAYER, over `n` elements of the weight; NaN where unknown."""
    n: int
    numel: int
    learning_rate: float | None = None
