"""One run as arrays of sites x steps, and how each number is drawn. Never torch.

The Saturation tab, the HTML report and the heatmap image all draw from what is here, so that they agree: which metrics there are, on which
scale and in which colours, in which order the sites stand, when each alert fired and cleared.

Colours are computed, not tabulated: paths through OKLCH (Ottosson 2020, https://bottosson.github.io/posts/oklab/) on which lightness changes by equal
steps, so equal steps of a number look equal, in print and to eyes that confuse red and green. What is well has the colour of the page, what is not
stands out: light pages get dark, dark pages bright ends.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from torchsat.record import HISTOGRAM_BINS, SITE_FACTS, WEIGHT_FACTS, Alert, Snapshot, to_float

Ramp = Literal["heat", "amount", "balance"]
Values = NDArray[np.float32]

SHADES = 256


@dataclass(frozen=True)
class Metric:
    """How one number of a site is drawn.

    Args:
        name: the attribute of Record, or of the Weight that feeds the site.
        title, says: for people.
        form: `share` is printed in per cent, `number` with three digits.
        scale: of colour and axis.
        low, high: the ends of the scale; None: the least and largest number shown.
        worst: which end is bad, and so which of several numbers is shown where one pixel has room for one; None: the latest.
        ramp: `heat` from well to bad, `amount` from little to much, `balance` from too little over right to too much.
        over: whether it is a number of the site, of the layers that feed it (of several, the least), or computed here.
    """

    name: str
    title: str
    says: str
    form: Literal["share", "number"] = "share"
    scale: Literal["linear", "log"] = "linear"
    low: float | None = 0.0
    high: float | None = 1.0
    worst: Literal["low", "high"] | None = "high"
    ramp: Ramp = "heat"
    over: Literal["records", "weights", "view"] = "records"


METRICS: tuple[Metric, ...] = (
    Metric("excess", "Saturated beyond normal", "Share of inputs on a plateau, less what N(0, 1) inputs give (ReLU: 50 %).", over="view"),
    Metric("saturated", "Saturated", "Share of inputs on a plateau, where |f'| stays below 5 % of its peak by default."),
    Metric("low", "Saturated low", "Share of inputs on the lower plateau."),
    Metric("high", "Saturated high", "Share of inputs on the upper plateau."),
    Metric("relative_derivative", "E|f'| / peak", "Mean derivative over its peak: 1 is fully open, 0 is closed.", "number", worst="low"),
    Metric("stuck", "Stuck units", "Share of units saturated in at least 99 % of at least 1000 samples; on ReLU, dead units."),
    Metric(
        "attenuation", "Attenuation", "||dL/dz|| / ||dL/da||: what this activation alone does to the gradient.", "number", "log", 1e-3, 1.0, "low"
    ),
    Metric("grad_z_rms", "Gradient", "Root mean square of dL/dz.", "number", "log", None, None, None, "amount"),
    Metric("update_ratio", "Update ratio", "||change of W|| / ||W|| per step.", "number", "log", 1e-6, 1.0, "low", "balance", "weights"),
    Metric("gain", "Weight gain", "rms(W) sqrt(fan_in): 1 under Xavier, 1.41 under He.", "number", "log", 0.05, 20.0, None, "balance", "weights"),
    Metric("z_std", "Spread of z", "Standard deviation of the pre-activation.", "number", "log", 0.01, 100.0, None, "balance"),
    Metric("z_mean", "Mean of z", "Mean of the pre-activation.", "number", "linear", -4.0, 4.0, None, "balance"),
    Metric("zeros", "Zeros", "Share of activations that are exactly 0.", ramp="amount", worst=None),
    Metric("entropy_min", "Attention entropy", "H / ln T of the lowest head: 1 is even attention, 0 is one key alone.", "number", worst="low"),
    Metric("logit_std", "Attention logits", "Standard deviation of the logits within a row.", "number", "log", 0.1, 100.0, None, "amount"),
    Metric("nonfinite", "Not finite", "Measured elements that are inf or nan; any is too many.", "number"),
)

_PATHS: dict[tuple[Ramp, bool], tuple[tuple[float, float, float], ...]] = {
    ("heat", False): ((0.965, 0.02, 100), (0.80, 0.14, 75), (0.60, 0.19, 38), (0.43, 0.17, 5), (0.26, 0.10, -40)),
    ("heat", True): ((0.23, 0.03, -85), (0.38, 0.14, -40), (0.58, 0.20, 10), (0.77, 0.16, 55), (0.95, 0.10, 105)),
    ("amount", False): ((0.965, 0.02, 190), (0.80, 0.08, 195), (0.60, 0.10, 225), (0.42, 0.12, 260), (0.26, 0.12, 285)),
    ("amount", True): ((0.23, 0.03, 285), (0.38, 0.12, 275), (0.58, 0.12, 240), (0.77, 0.12, 195), (0.95, 0.10, 150)),
    ("balance", False): ((0.36, 0.13, 255), (0.66, 0.11, 245), (0.965, 0.0, 60), (0.66, 0.15, 60), (0.36, 0.09, 50)),
    ("balance", True): ((0.88, 0.10, 225), (0.55, 0.12, 245), (0.23, 0.0, 60), (0.55, 0.12, 55), (0.88, 0.12, 85)),
}
"""(lightness, chroma, hue in degrees) of OKLCH at equal distances along each ramp; light page, dark page."""


def _oklab_to_linear(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    """Linear sRGB; the matrices are Ottosson's."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _rgb(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """8-bit sRGB; where the screen has no such colour, a paler one of the same lightness."""
    while True:
        linear = _oklab_to_linear(lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue)))
        if chroma <= 0 or all(-1e-4 <= channel <= 1 + 1e-4 for channel in linear):
            break
        chroma = max(0.0, chroma - 0.005)
    encoded = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in (min(1.0, max(0.0, channel)) for channel in linear))
    red, green, blue = (round(255 * value) for value in encoded)
    return red, green, blue


@functools.cache
def shades(ramp: Ramp, dark: bool = False) -> tuple[tuple[int, int, int], ...]:
    """The colours of a ramp, from its low end, as 8-bit RGB."""
    path, colours = _PATHS[ramp, dark], []
    for shade in range(SHADES):
        at = shade / (SHADES - 1) * (len(path) - 1)
        index = min(int(at), len(path) - 2)
        one, other = path[index], path[index + 1]
        if not (one[1] and other[1]):  # grey has no hue of its own
            one, other = ((each[0], each[1], max(one[1:], other[1:])[1]) for each in (one, other))
        colours.append(_rgb(*(start + (end - start) * (at - index) for start, end in zip(one, other, strict=True))))
    return tuple(colours)


def shade(metric: Metric, values: Values, low: float, high: float) -> NDArray[np.intp]:
    """Which colours of the ramp finite numbers have on the scale from `low` to `high`."""
    wide = values.astype(np.float64)
    if metric.scale == "log":
        wide, low, high = np.log10(np.maximum(wide, 1e-300)), math.log10(low), math.log10(high)
    share = (np.clip(wide, low, high) - low) / (high - low)
    if metric.ramp == "heat" and metric.worst == "low":
        share = 1 - share
    found: NDArray[np.intp] = np.floor(share * (SHADES - 1) + 0.5).astype(np.intp)
    return found


def scales() -> dict[str, Any]:
    """Metrics and colours for a page."""

    def hexadecimal(ramp: Ramp, dark: bool) -> list[str]:
        return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in shades(ramp, dark)]

    ramps: tuple[Ramp, ...] = ("heat", "amount", "balance")
    return {
        "metrics": [asdict(metric) for metric in METRICS],
        "ramps": {ramp: {"light": hexadecimal(ramp, False), "dark": hexadecimal(ramp, True)} for ramp in ramps},
    }


@dataclass(frozen=True)
class Episode:
    """One alert from its firing to its end."""

    alert: Alert
    """As it was at its worst."""
    fired: int
    """The step at which it was raised; the condition began at `alert.since`."""
    cleared: int | None
    """The step at which it cleared; None where it fires to the end."""
    gone: bool = False
    """It did not clear: its place is not there any more, as in a resumed run of another model. `cleared` is when it was last seen."""


def episodes(alerts: Iterable[Alert], seen: Mapping[str, int], end: int) -> list[Episode]:
    """The alerts of a run, given in the order in which they were raised and cleared; what fires still, then the worst, then the earliest first.

    Args:
        seen: the last step of each site and layer.
        end: the last step of the run.
    """
    firing: dict[tuple[str, str], list[Alert]] = {}
    found: list[Episode] = []
    for alert in alerts:
        key = alert.site, alert.rule
        if alert.firing:
            firing.setdefault(key, []).append(alert)
        elif key in firing:
            found.append(_episode(firing.pop(key), alert.step))
    for raised in firing.values():
        last = seen.get(raised[-1].site, end)
        found.append(_episode(raised, last if last < end else None, gone=last < end))
    return sorted(found, key=lambda each: (each.cleared is not None, each.alert.severity != "critical", each.alert.since))


def _episode(raised: list[Alert], cleared: int | None, gone: bool = False) -> Episode:
    worst = next((alert for alert in reversed(raised) if alert.severity == "critical"), raised[-1])
    return Episode(worst, raised[0].step, cleared, gone)


def episodes_of(snapshots: Sequence[Snapshot]) -> list[Episode]:
    """The alerts of a run that has been read."""
    seen = {record.site: each.step for each in snapshots for record in each.records}
    seen |= {weight.name: each.step for each in snapshots for weight in each.weights}
    return episodes((alert for each in snapshots for alert in each.alerts), seen, snapshots[-1].step)


@dataclass(frozen=True)
class Grid:
    """Numbers over time: one row per observation, one column per name; NaN where there is none."""

    steps: NDArray[np.float64]
    times: NDArray[np.float64]
    names: tuple[str, ...]
    values: Values
    """[steps, names]."""

    def pack(self) -> bytes:
        """For a page: a uint32 length, so many bytes of JSON ({"names", "count"}), float64 steps, float32 values; all little-endian.

        The JSON is padded with blanks so that the arrays stand at multiples of 8.
        """
        head = json.dumps({"names": self.names, "count": len(self.steps)}).encode()
        head += b" " * (-(4 + len(head)) % 8)
        steps, values = self.steps.astype("<f8").tobytes(), np.ascontiguousarray(self.values, "<f4").tobytes()
        return struct.pack("<I", len(head)) + head + steps + values

    def thin(self, most: int) -> Grid:
        """At most so many observations, evenly chosen, both ends kept."""
        if len(self.steps) <= most:
            return self
        kept = np.unique(np.linspace(0, len(self.steps) - 1, most).round().astype(int))
        return Grid(self.steps[kept], self.times[kept], self.names, self.values[kept])


@dataclass(frozen=True)
class Table:
    """A packed tensor over time whose columns are `names`: [rows, columns] at each (step, time)."""

    names: tuple[str, ...]
    steps: Sequence[int]
    times: Sequence[float]
    values: Values
    """[steps, rows, columns]."""

    @staticmethod
    def of(names: Sequence[str], step: int, time: float, rows: Sequence[Sequence[float]]) -> Table:
        """One observation; what is beyond the range of float32 is infinite."""
        with np.errstate(over="ignore"):
            values = np.array([rows], np.float64).reshape(1, len(rows), len(names)).astype(np.float32)
        return Table(tuple(names), [step], [time], values)


def in_order(orders: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Names of several lists as one, the order of the last of them kept; what only an earlier one has stands after its neighbour there."""
    merged: list[str] = []
    for names in dict.fromkeys(tuple(names) for names in reversed(list(orders))):
        place, known = 0, set(merged)
        for name in names:
            if name in known:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                place += 1
    return tuple(merged)


def last_session(steps: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.intp]:
    """Which observations count, in the order of their steps: a resumed run makes void what the lost session wrote from its first step on."""
    order = np.lexsort((steps, times))
    kept, least = [], math.inf
    for index in order[::-1]:
        if steps[index] < least:
            kept.append(index)
            least = steps[index]
    return np.array(kept[::-1], dtype=np.intp)


def not_void(steps: Sequence[float], times: Sequence[float], observed: Grid) -> NDArray[np.bool_]:
    """Which of the things that happened at these steps and times no later session made void, by beginning at or before them."""
    order = np.argsort(observed.times)
    least = np.minimum.accumulate(np.append(observed.steps[order], math.inf)[::-1])[::-1]
    found: NDArray[np.bool_] = np.asarray(steps, np.float64) < least[np.searchsorted(observed.times[order], times, "right")]
    return found


def join(tables: Sequence[Table], rows: int) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.float64], Values]:
    """Tables of one kind, whose columns may differ, as (names, steps, times, values [steps, rows, names])."""
    tables = sorted((table for table in tables if len(table.steps)), key=lambda table: max(table.times))
    names = in_order(table.names for table in tables)
    place = {name: index for index, name in enumerate(names)}
    steps = np.concatenate([np.asarray(table.steps, np.float64) for table in tables] or [np.zeros(0)])
    times = np.concatenate([np.asarray(table.times, np.float64) for table in tables] or [np.zeros(0)])
    values = np.full((len(steps), rows, len(names)), np.nan, np.float32)
    at = 0
    for table in tables:
        values[at : at + len(table.steps), :, [place[name] for name in table.names]] = table.values
        at += len(table.steps)
    kept = last_session(steps, times)
    return names, steps[kept], times[kept], values[kept]


@dataclass(frozen=True)
class Series:
    """One run: every metric as a grid of steps x sites, and what else a picture of it needs."""

    name: str
    steps: NDArray[np.float64]
    times: NDArray[np.float64]
    sites: tuple[dict[str, Any], ...]
    """SITE_FACTS of each site, in the order of data flow."""
    layers: tuple[dict[str, Any], ...]
    """WEIGHT_FACTS of each layer that feeds a site."""
    values: dict[str, Values]
    """[steps, sites] for every metric of METRICS."""
    seen: dict[str, int]
    """The last step of each site and layer."""
    alerts: tuple[Episode, ...] = ()

    def told(self, alerts: Iterable[Alert]) -> Series:
        """The same with its alerts."""
        end = int(self.steps[-1]) if len(self.steps) else 0
        return replace(self, alerts=tuple(episodes(sorted(alerts, key=lambda alert: alert.step), self.seen, end)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site["site"] for site in self.sites)

    def grid(self, metric: str) -> Grid:
        return Grid(self.steps, self.times, self.names, self.values[metric])

    def site(self, name: str) -> Grid:
        """Every metric of one site."""
        at = self.names.index(name)
        return Grid(self.steps, self.times, tuple(self.values), np.stack([values[:, at] for values in self.values.values()], 1))

    def describe(self) -> dict[str, Any]:
        """All but the numbers, ready for JSON."""
        feeds = {layer["name"]: layer["feeds"] for layer in self.layers}
        known = set(self.names)
        shown = [name for name, values in self.values.items() if np.isfinite(values).any()]
        alerts = []
        for each in self.alerts:
            places = [each.alert.site] if each.alert.site in known else [site for site in feeds.get(each.alert.site, ()) if site in known]
            alerts.append({**each.alert.as_dict(), "fired": each.fired, "cleared": each.cleared, "gone": each.gone, "places": places})
        found: dict[str, Any] = plain(
            {
                "name": self.name,
                "observations": len(self.steps),
                "first": self.steps[0] if len(self.steps) else None,
                "last": self.steps[-1] if len(self.steps) else None,
                "time": self.times[-1] if len(self.times) else None,
                "sites": self.sites,
                "layers": self.layers,
                "metrics": shown,
                "alerts": alerts,
            }
        )
        return found


def plain(value: Any) -> Any:
    """The same for JSON, which knows neither NaN, here None, nor infinity, here a string."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else float(value) if math.isfinite(value) else str(float(value))
    return value


def rows_of(over: Literal["records", "weights"]) -> list[str]:
    """The metrics that are numbers of a record, or of a weight: the rows of the tables that `series` takes."""
    return [metric.name for metric in METRICS if metric.over == over]


def series(
    name: str,
    records: Sequence[tuple[Table, Sequence[dict[str, Any]]]],
    weights: Sequence[tuple[Table, Sequence[dict[str, Any]]]],
) -> Series:
    """A run from its tables of records and of weights, whose rows are `rows_of` each, with the facts of their columns."""
    names, steps, times, values = join([table for table, _ in records], len(rows_of("records")))
    facts = {each["site"]: each for _, group in records for each in group}
    layer_names, layer_steps, _, layer_values = join([table for table, _ in weights], len(rows_of("weights")))
    layers = {each["name"]: each for _, group in weights for each in group}
    fed = np.full((len(steps), len(rows_of("weights")), len(names)), np.nan, np.float32)
    _, here, there = np.intersect1d(steps, layer_steps, return_indices=True)
    for at, site in enumerate(names):
        feeding = [index for index, layer in enumerate(layer_names) if site in layers[layer]["feeds"]]
        if feeding:
            fed[here, :, at] = np.fmin.reduce(layer_values[there][:, :, feeding], axis=-1)
    found = {metric: values[:, row] for row, metric in enumerate(rows_of("records"))}
    found |= {metric: fed[:, row] for row, metric in enumerate(rows_of("weights"))}
    normal = np.array([(facts[each]["normal_low"] or 0.0) + (facts[each]["normal_high"] or 0.0) for each in names], np.float32)
    found["excess"] = found["saturated"] - normal
    return Series(
        name,
        steps,
        times,
        tuple(facts[each] for each in names),
        tuple(layers[each] for each in layer_names),
        {metric.name: found[metric.name] for metric in METRICS},
        _last_seen(names, steps, values) | _last_seen(layer_names, layer_steps, layer_values),
    )


def _last_seen(names: Sequence[str], steps: NDArray[np.float64], values: Values) -> dict[str, int]:
    """The last step at which each column of [steps, rows, columns] has a number."""
    there: NDArray[np.bool_] = np.any(~np.isnan(values), axis=1)
    return {name: int(steps[there[:, at]].max()) for at, name in enumerate(names) if there[:, at].any()}


def from_snapshots(name: str, snapshots: Sequence[Snapshot]) -> Series:
    """A run from what `torchsat.read` gives."""
    records, weights = [], []
    for each in snapshots:
        facts = [{fact: getattr(record, fact) for fact in SITE_FACTS} for record in each.records]
        table = [[to_float(getattr(record, metric)) for record in each.records] for metric in rows_of("records")]
        records.append((Table.of([fact["site"] for fact in facts], each.step, each.time, table), facts))
        facts = [{fact: getattr(weight, fact) for fact in WEIGHT_FACTS} for weight in each.weights]
        table = [[to_float(getattr(weight, metric)) for weight in each.weights] for metric in rows_of("weights")]
        weights.append((Table.of([fact["name"] for fact in facts], each.step, each.time, table), facts))
    return series(name, records, weights).told(alert for each in snapshots for alert in each.alerts)


def histograms(site: str, snapshots: Sequence[Snapshot]) -> Grid:
    """The histogram of |f'| / peak of one site over time."""
    found = [(each, record.histogram) for each in snapshots for record in each.records if record.site == site and record.histogram is not None]
    return _grid([str(index) for index in range(HISTOGRAM_BINS)], found)


def heads(site: str, snapshots: Sequence[Snapshot]) -> Grid:
    """The entropy of each head of one softmax over time."""
    found = [
        (each, [to_float(head.entropy) for head in record.heads])
        for each in snapshots
        for record in each.records
        if record.site == site and record.heads
    ]
    return _grid([str(index) for index in range(max((len(row) for _, row in found), default=0))], found)


def _grid(names: Sequence[str], found: Sequence[tuple[Snapshot, Sequence[float]]]) -> Grid:
    values = np.full((len(found), len(names)), np.nan, np.float32)
    for at, (_, row) in enumerate(found):
        values[at, : len(row)] = row
    return Grid(np.array([each.step for each, _ in found], np.float64), np.array([each.time for each, _ in found]), tuple(names), values)
