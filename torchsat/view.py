"""One run as arrays of sites x steps, and everything else that a picture of it needs; NumPy and standard library only.

The server of the Saturation tab (tensorboard/plugin.py) makes a `Series` of what TensorBoard has loaded, the report makes one of snapshots. Both hand
the same answers to the same page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsat.alerts import Episode, episodes
from torchsat.colours import shades
from torchsat.definitions import CAUSE_DEFINITIONS, RULE_DEFINITIONS
from torchsat.grids import Grid, Table, join
from torchsat.ledger import ENTRY_FACTS
from torchsat.metrics import METRICS, Ramp, Values, excess, rows_of
from torchsat.percent import PERCENT
from torchsat.record import (
    HISTOGRAM_BINS,
    HISTOGRAM_EDGES,
    SITE_FACTS,
    WEIGHT_FACTS,
    Alert,
    LayerFacts,
    Nearest,
    Snapshot,
    normal_saturated,
    to_float,
)
from torchsat.verdict import Verdict, verdict_of


def scales() -> dict[str, Any]:
    """What a page needs to draw and print numbers as Python does, ready for JSON: metrics, colours, percentages, and edges of histogram bins."""

    def hexadecimal(ramp: Ramp, dark: bool) -> list[str]:
        return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in shades(ramp, dark)]

    ramps: tuple[Ramp, ...] = ("heat", "amount", "balance")
    return {
        "metrics": [{**asdict(metric), "reversed": metric.reversed} for metric in METRICS],
        "ramps": {ramp: {"light": hexadecimal(ramp, False), "dark": hexadecimal(ramp, True)} for ramp in ramps},
        "rules": [asdict(definition) for definition in RULE_DEFINITIONS],
        "causes": [asdict(definition) for definition in CAUSE_DEFINITIONS],
        "links": {},  # where each word is explained; only a server has the pages (tensorboard/pages.py)
        "percent": asdict(PERCENT),
        "histogram_edges": HISTOGRAM_EDGES,
    }


@dataclass(frozen=True)
class Series:
    """One run: every metric of METRICS as an array of steps x sites, with the facts of its sites and layers and its alerts."""

    name: str
    steps: NDArray[np.float64]
    times: NDArray[np.float64]
    sites: tuple[dict[str, Any], ...]
    """The SITE_FACTS of each site, by name. Sites are in the order of data flow."""
    layers: tuple[dict[str, Any], ...]
    """The WEIGHT_FACTS of each layer that feeds a site, by name."""
    values: dict[str, Values]
    """For each metric an array [steps, sites]."""
    seen: dict[str, int]
    """The last step at which each site and layer was measured."""
    alerts: tuple[Episode, ...] = ()
    judged: bool = True
    """Whether any rule was in use at the last observation."""
    nearest: Nearest | None = None
    """What came nearest to a warning then."""

    def told(self, events: Iterable[Alert], judged: bool = True, nearest: Nearest | None = None) -> Series:
        """The same series with the alerts that these events raised and cleared, and with what else is known of its last observation."""
        end = int(self.steps[-1]) if len(self.steps) else 0
        found = tuple(episodes(sorted(events, key=lambda alert: alert.step), self.seen, end))
        return replace(self, alerts=found, judged=judged, nearest=nearest)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sites."""
        return tuple(site["site"] for site in self.sites)

    @property
    def verdict(self) -> Verdict:
        """What is wrong with the run."""
        layers = {layer["name"]: layer.get("layer") or "" for layer in self.layers}
        return verdict_of(self.alerts, layers | {site["site"]: site["activation"] for site in self.sites}, self.judged, self.nearest)

    def grid(self, metric: str) -> Grid:
        """One metric of every site."""
        return Grid(self.steps, self.times, self.names, self.values[metric])

    def site(self, name: str) -> Grid:
        """Every metric of one site."""
        at = self.names.index(name)
        return Grid(self.steps, self.times, tuple(self.values), np.stack([values[:, at] for values in self.values.values()], 1))

    def sites_at(self, place: str) -> list[str]:
        """The sites that an alert at this place is about: the site itself, or those that the layer feeds."""
        known = set(self.names)
        fed = next((layer["feeds"] for layer in self.layers if layer["name"] == place), ())
        return [place] if place in known else [site for site in fed if site in known]

    def describe(self) -> dict[str, Any]:
        """Everything but the numbers over time, ready for JSON.

        An alert of a layer gets the sites that the layer feeds as its `places`, since the page shows sites only.
        """
        shown = [name for name, values in self.values.items() if np.isfinite(values).any()]
        alerts = []
        for each in self.alerts:
            times = {"fired": each.fired, "cleared": each.cleared, "gone": each.gone}
            alerts.append({**each.alert.as_dict(), **times, "places": self.sites_at(each.alert.site)})
        found: dict[str, Any] = plain(
            {
                "name": self.name,
                "observations": len(self.steps),
                "first": self.steps[0] if len(self.steps) else None,
                "last": self.steps[-1] if len(self.steps) else None,
                "time": self.times[-1] if len(self.times) else None,
                "sites": [{**site, "normal_saturated": normal_saturated(site["normal_low"], site["normal_high"])} for site in self.sites],
                "layers": [{**layer, "titled": _titled(layer)} for layer in self.layers],
                "metrics": shown,
                "alerts": alerts,
                "verdict": self.verdict.as_dict(),
            }
        )
        return found


def _titled(facts: dict[str, Any]) -> str:
    """`LayerFacts.titled` of facts from an event file, where those of an older one lack what the layer is."""
    return LayerFacts(facts["name"], (), 0, False, layer=facts.get("layer") or "").titled


def plain(value: Any) -> Any:
    """The same value for JSON, which knows neither NaN nor infinity: NaN becomes None, infinity a string."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else float(value) if math.isfinite(value) else str(float(value))
    return value


def series(
    name: str,
    records: Sequence[tuple[Table, Sequence[dict[str, Any]]]],
    weights: Sequence[tuple[Table, Sequence[dict[str, Any]]]],
) -> Series:
    """A run from its tables of records and of weights.

    Each table has the rows `rows_of("records")` or `rows_of("weights")`, and comes with the facts of its columns: SITE_FACTS or WEIGHT_FACTS by name.
    """
    names, steps, times, values = join([table for table, _ in records], len(rows_of("records")))
    facts = {each["site"]: each for _, group in records for each in group}
    layer_names, layer_steps, _, layer_values = join([table for table, _ in weights], len(rows_of("weights")))
    layers = {each["name"]: each for _, group in weights for each in group}
    fed = np.full((len(steps), len(rows_of("weights")), len(names)), np.nan, np.float32)
    worst, level = np.full((len(steps), len(names)), np.nan, np.float32), rows_of("weights").index("alert_level")
    _, here, there = np.intersect1d(steps, layer_steps, return_indices=True)
    for at, site in enumerate(names):
        feeding = [index for index, layer in enumerate(layer_names) if site in layers[layer]["feeds"]]
        if feeding:
            fed[here, :, at] = np.fmin.reduce(layer_values[there][:, :, feeding], axis=-1)
            worst[here, at] = np.fmax.reduce(layer_values[there][:, level][:, feeding], axis=-1)
    found = {metric: fed[:, row] for row, metric in enumerate(rows_of("weights"))}
    of_records = {metric: values[:, row] for row, metric in enumerate(rows_of("records"))}
    of_records["alert_level"] = np.fmax(of_records["alert_level"], worst)
    found |= of_records
    found["excess"] = np.full_like(found["saturated"], np.nan)
    for at, site in enumerate(names):
        found["excess"][:, at] = excess(found["saturated"][:, at], facts[site]["normal_low"], facts[site]["normal_high"])
    _mark_broken(found, np.array([facts[each]["kind"] == "softmax" for each in names], bool))
    return Series(
        name,
        steps,
        times,
        tuple(facts[each] for each in names),
        tuple(layers[each] for each in layer_names),
        {metric.name: found[metric.name] for metric in METRICS},
        _last_seen(names, steps, values) | _last_seen(layer_names, layer_steps, layer_values),
    )


def _mark_broken(found: dict[str, Values], softmax: NDArray[np.bool_]) -> None:
    """Make infinite what is not known because elements were inf or nan, so that it does not look as if nothing had been measured.

    A site has no other number where all of its elements are inf or nan, and a gradient that is not finite leaves no number of the backward pass. What
    a site never has stays unknown: an activation has no entropy, and a softmax (`softmax` tells which sites are one) has few of the other numbers.
    """
    forward, backward = found["nonfinite"] > 0, found["grad_nonfinite"] > 0
    for metric in METRICS:
        values = found[metric.name]
        if metric.name == "alert_level":
            values[forward | backward] = np.inf
        elif metric.over != "weights":
            is_gradient = metric.name in _OF_GRADIENTS
            has = softmax if metric.group == "attention" else ~softmax | ~np.isnan(values).all(axis=0)
            values[(forward | backward if is_gradient else forward) & np.isnan(values) & has] = np.inf


_OF_GRADIENTS = ("attenuation", "blocked", "trapped", "grad_z_rms")
"""The metrics of the backward pass."""


def _last_seen(names: Sequence[str], steps: NDArray[np.float64], values: Values) -> dict[str, int]:
    """For arrays [steps, rows, names], the last step at which each name has a number."""
    there: NDArray[np.bool_] = np.any(~np.isnan(values), axis=1)
    return {name: int(steps[there[:, at]].max()) for at, name in enumerate(names) if there[:, at].any()}


def from_snapshots(name: str, snapshots: Sequence[Snapshot]) -> Series:
    """A run from the snapshots that `torchsat.read` returns."""
    records = [(record_table(each), facts_of(each.records, SITE_FACTS)) for each in snapshots]
    weights = [(weight_table(each), facts_of(each.weights, WEIGHT_FACTS)) for each in snapshots]
    events = [alert for each in snapshots for alert in each.alerts]
    return series(name, records, weights).told(events, snapshots[-1].judged, snapshots[-1].nearest)


def facts_of(items: Iterable[Any], facts: Sequence[str]) -> list[dict[str, Any]]:
    """The facts of records (SITE_FACTS) or of weights (WEIGHT_FACTS) by name."""
    return [{fact: getattr(item, fact) for fact in facts} for item in items]


def record_table(snapshot: Snapshot) -> Table:
    """The metrics of all sites in one snapshot."""
    rows = [[to_float(getattr(record, metric)) for record in snapshot.records] for metric in rows_of("records")]
    return Table.of([record.site for record in snapshot.records], snapshot.step, snapshot.time, rows)


def weight_table(snapshot: Snapshot) -> Table:
    """The metrics of all layers in one snapshot."""
    rows = [[to_float(getattr(weight, metric)) for weight in snapshot.weights] for metric in rows_of("weights")]
    return Table.of([weight.name for weight in snapshot.weights], snapshot.step, snapshot.time, rows)


def histograms(site: str, snapshots: Sequence[Snapshot]) -> Grid:
    """The histogram of |f'| / peak of one site over time: one column per bin of HISTOGRAM_EDGES."""
    found = [(each, record.histogram) for each in snapshots for record in each.records if record.site == site and record.histogram is not None]
    return _grid([str(index) for index in range(HISTOGRAM_BINS)], found)


def heads(site: str, snapshots: Sequence[Snapshot]) -> Grid:
    """The entropy of each head of one softmax over time: one column per head."""
    found = [
        (each, [to_float(head.entropy) for head in record.heads])
        for each in snapshots
        for record in each.records
        if record.site == site and record.heads
    ]
    return _grid([str(index) for index in range(max((len(row) for _, row in found), default=0))], found)


def ledger_entries(snapshots: Sequence[Snapshot]) -> list[dict[str, Any]]:
    """The ENTRY_FACTS of the entries of the newest ledger, by name; empty where there is none."""
    newest = next((each.ledger for each in reversed(snapshots) if each.ledger is not None), None)
    return [] if newest is None else [{fact: getattr(entry, fact) for fact in ENTRY_FACTS} for entry in newest.entries]


def ledger_grid(metric: str, snapshots: Sequence[Snapshot]) -> Grid:
    """One number (ENTRY_METRICS) of each entry of the ledgers over time."""
    tables = [
        Table.of(
            [entry.place for entry in each.ledger.entries],
            each.step,
            each.time,
            [[to_float(getattr(entry, metric)) for entry in each.ledger.entries]],
        )
        for each in snapshots
        if each.ledger is not None
    ]
    names, steps, times, values = join(tables, 1)
    return Grid(steps, times, names, values[:, 0])


ROUTING = ("dead", "busiest", "entropy", "margin")
"""The numbers of a mixture of experts that a page tells."""


def mixtures(snapshots: Sequence[Snapshot]) -> list[dict[str, Any]]:
    """What the mixtures of experts of a run are, in their order; each as it was when it was seen last."""
    found = {each.site: {"site": each.site, "k": each.k, "experts": each.experts} for snapshot in snapshots for each in snapshot.experts}
    return list(found.values())


def routing(snapshots: Sequence[Snapshot]) -> Grid:
    """What is known of each mixture of experts over time, in columns `site/0`, `site/1`, ... and `site/dead`, `site/busiest`, ...: the part of the
    tokens that each expert gets, which add up to `k`, and the numbers of ROUTING."""
    tables = []
    for snapshot in snapshots:
        told: dict[str, float] = {}
        for each in snapshot.experts:
            told |= {f"{each.site}/{index}": part * each.k for index, part in enumerate(each.load)}
            told |= {f"{each.site}/{metric}": to_float(getattr(each, metric)) for metric in ROUTING}
        if told:
            tables.append(Table.of(list(told), snapshot.step, snapshot.time, [list(told.values())]))
    names, steps, times, values = join(tables, 1)
    return Grid(steps, times, names, values[:, 0])


def _grid(names: Sequence[str], found: Sequence[tuple[Snapshot, Sequence[float]]]) -> Grid:
    """The grid of one list of numbers per snapshot. Lists that are shorter than `names` are filled with NaN."""
    values = np.full((len(found), len(names)), np.nan, np.float32)
    for at, (_, row) in enumerate(found):
        values[at, : len(row)] = row
    return Grid(np.array([each.step for each, _ in found], np.float64), np.array([each.time for each, _ in found]), tuple(names), values)
