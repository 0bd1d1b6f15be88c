"""What a monitor remembers of its run for its figures and its card, in a bounded amount of memory; NumPy and standard library only.

A figure of a run needs numbers of all its observations. The event files have them, but a monitor may write none, and to read files back while they
are written takes longer than to draw the figure. So a few numbers of each observation are kept as arrays: 20 metrics and one histogram of each site,
which is 300 bytes, where a Record has 5000. Where there are more than `MOST` observations, or more than `MOST_NUMBERS` numbers, every second one is
left out, so that a large network takes 8 MB at most. Alerts are all kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torchsat.alerts import Episode, episodes
from torchsat.grids import Grid, Table
from torchsat.metrics import Values
from torchsat.record import HISTOGRAM_BINS, SITE_FACTS, WEIGHT_FACTS, Alert, Nearest, Record, Snapshot, Weight, to_float
from torchsat.verdict import Health, Verdict, verdict_of, what_is_where
from torchsat.view import Series, facts_of, record_table, series, weight_table

MOST = 400
"""The most observations that are kept. A figure has about as many columns of pixels."""
LEAST, MOST_NUMBERS = 40, 2_000_000
"""So many observations are kept whatever the network, and so many numbers where these are more."""
_PER_SITE = 20 + HISTOGRAM_BINS
"""The numbers that are kept of a site at one observation."""


@dataclass(frozen=True)
class _Row:
    """What is kept of one observation."""

    records: Table
    weights: Table
    histograms: Mapping[str, Values]
    """The histogram of each site that has one."""
    heads: Mapping[str, tuple[float, ...]]
    """The entropy of each head of each softmax."""

    @staticmethod
    def of(snapshot: Snapshot) -> _Row:
        with_one = [record for record in snapshot.records if record.histogram is not None]
        bins = np.array([record.histogram for record in with_one], np.float32).reshape(-1, HISTOGRAM_BINS)
        heads = {record.site: tuple(to_float(head.entropy) for head in record.heads) for record in snapshot.records if record.heads}
        return _Row(record_table(snapshot), weight_table(snapshot), dict(zip([each.site for each in with_one], bins, strict=True)), heads)


class History:
    """The observations of one monitor, oldest first."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._count = 0
        self._stride = 1
        """Of so many observations one is kept; the newest one is always kept, until the next one comes."""
        self._records: dict[str, Record] = {}
        self._weights: dict[str, Weight] = {}
        """The newest record of each site, and the newest measurement of each layer: they have the facts."""
        self._events: list[Alert] = []
        self._judged = True
        self._nearest: Nearest | None = None
        """Those of the newest observation."""

    def add(self, snapshot: Snapshot) -> None:
        """Remember one observation."""
        self._records.update((record.site, record) for record in snapshot.records)
        self._weights.update((weight.name, weight) for weight in snapshot.weights)
        self._events.extend(snapshot.alerts)
        if self._rows and (self._count - 1) % self._stride:
            self._rows.pop()
        self._rows.append(_Row.of(snapshot))
        self._count += 1
        self._judged, self._nearest = snapshot.judged, snapshot.nearest
        if len(self._rows) > max(LEAST, min(MOST, MOST_NUMBERS // (_PER_SITE * max(1, len(self._records))))):
            self._rows, self._stride = self._rows[::2], 2 * self._stride

    def take_up(self, firing: Iterable[Alert]) -> None:
        """Remember alerts that fired already when this session began."""
        self._events.extend(firing)

    def __len__(self) -> int:
        """How many observations are kept."""
        return len(self._rows)

    def series(self, name: str = "") -> Series:
        """The run as the tab and the report have it."""
        facts, layers = facts_of(self._records.values(), SITE_FACTS), facts_of(self._weights.values(), WEIGHT_FACTS)
        # `series` joins the facts of all tables, so it is enough that the first one comes with all of them.
        records = [(row.records, facts if at == 0 else []) for at, row in enumerate(self._rows)]
        weights = [(row.weights, layers if at == 0 else []) for at, row in enumerate(self._rows)]
        return series(name, records, weights).told(self._events, self._judged, self._nearest)

    def histograms(self, site: str) -> Grid:
        """The histogram of |f'| / peak of one site over time: one column per bin of HISTOGRAM_EDGES."""
        return self._grid(HISTOGRAM_BINS, [(row, row.histograms[site]) for row in self._rows if site in row.histograms])

    def heads(self, site: str) -> Grid:
        """The entropy of each head of one softmax over time: one column per head."""
        found = [(row, row.heads[site]) for row in self._rows if site in row.heads]
        return self._grid(max((len(each) for _, each in found), default=0), found)

    @staticmethod
    def _grid(width: int, found: Sequence[tuple[_Row, Sequence[float] | Values]]) -> Grid:
        values = np.full((len(found), width), np.nan, np.float32)
        for at, (_, row) in enumerate(found):
            values[at, : len(row)] = row
        steps, times = (np.array([getattr(row.records, name)[0] for row, _ in found], np.float64) for name in ("steps", "times"))
        return Grid(steps, times, tuple(map(str, range(width))), values)

    def verdict(self, firing: Iterable[Alert]) -> Verdict:
        """The verdict on the run, of which these alerts fire now."""
        found = episodes(sorted(self._events, key=lambda alert: alert.step), {}, 0)
        told = [*(Episode(alert, alert.since, None) for alert in firing), *(each for each in found if each.cleared is not None)]
        if not self._rows and not told:
            return Verdict(Health.NOT_JUDGED, unjudged="nothing has been observed yet")
        return verdict_of(told, what_is_where(self._records.values(), self._weights.values()), self._judged, self._nearest)

    def levels(self, columns: int) -> dict[str, list[float]]:
        """For each site its health over the run in so many columns of equal numbers of observations: the worst `alert_level` in each."""
        run = self.series()
        values = run.values["alert_level"]
        parts = np.array_split(values, min(columns, len(values))) if len(values) else []
        found = np.array([np.fmax.reduce(part, axis=0) for part in parts])
        return {name: found[:, at].tolist() for at, name in enumerate(run.names)} if parts else {}
