"""Figures of matplotlib, which is imported here only, and only when a figure is asked for: torchsat does not depend on it.

A figure is made without pyplot, so nothing global changes: no backend is chosen, no figure stays open, and the figures of the user appear where they
did before. A notebook shows it once, where it is the last expression of a cell; a script writes it with `savefig`. Where the user's style is dark,
so are the colours.

This file knows neither monitors nor trials. It is given a `Series`, grids, or panels of named curves.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsat.alerts import Episode
from torchsat.colours import shades
from torchsat.grids import Grid, edges
from torchsat.metrics import METRICS, Metric, Ramp, Values
from torchsat.record import HISTOGRAM_BINS, HISTOGRAM_EDGES, normal_saturated
from torchsat.view import Series

try:
    from matplotlib import colormaps, rcParams
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter
except ModuleNotFoundError:
    raise ModuleNotFoundError("a figure needs matplotlib: pip install matplotlib") from None

_SEVERITY = {"critical": "#cf3f45", "warning": "#c98a1b"}
_LONGEST = 40
"""The most characters of a name beside the picture. Its end tells sites apart, so the beginning is left out."""
_MOST_NAMES = 60
"""Where there are more sites, only every second, third, ... name is written."""


class Picture(Figure):
    """A figure that a notebook shows, whether or not pyplot has been imported there."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The figure at twice its resolution, which is sharp on every screen, and the size at which it is shown."""
        written = io.BytesIO()
        self.savefig(written, format="png", dpi=2 * self.dpi)
        width, height = self.get_size_inches()
        return written.getvalue(), {"width": int(width * self.dpi), "height": int(height * self.dpi)}


@dataclass(frozen=True)
class Curve:
    """A line with the name that the legend shows."""

    name: str
    points: tuple[tuple[int, float], ...]
    """Pairs of a step and a finite value. Where there are none, the name still takes its place in the legend."""


@dataclass(frozen=True)
class Panel:
    """One chart of a row, with its curves over the steps."""

    title: str
    curves: tuple[Curve, ...]
    """The same names in the same order in every panel of a figure. The first one is the reference and is drawn in the colour of text."""
    logarithmic: bool = False


def curves(panels: Sequence[Panel]) -> Picture:
    """The panels side by side, with one legend below them."""
    figure = _figure(3.6 * len(panels), 4.2)
    palette = [colormaps["tab20"](number) for number in range(20)]
    lines: dict[str, Any] = {}
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        for at, curve in enumerate(panel.curves):
            style: dict[str, Any] = {"color": _ink(), "linewidth": 2.2} if at == 0 else {"color": palette[(at - 1) % 20], "linewidth": 1.2}
            steps, values = zip(*curve.points, strict=True) if curve.points else ((), ())
            (lines[curve.name],) = axes.plot(steps, values, **style)
        if panel.logarithmic and any(value > 0 for curve in panel.curves for _, value in curve.points):
            axes.set_yscale("log")
        axes.set(title=panel.title, xlabel="step")
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=7, frameon=False)
    return figure


def runs_figure(runs: Sequence[Series], metric: Metric) -> Picture:
    """One metric of all sites over the steps, with the alerts, and beside it the depth profile at the last step. Of several runs a row for each, on
    one scale of colours and one axis of steps."""
    rows = [_Row.of(run, metric) for run in runs]
    tall = [max(3, len(row.sites)) for row in rows]
    # Of one run the title is that of the figure; of several, each row has its own.
    figure = _figure(10, min(12.0 if len(runs) == 1 else 6.0 * len(runs), sum(1.9 + 0.24 * count for count in tall)))
    if len(runs) == 1:
        _title(figure, _titled(runs[0]), f"Try: {runs[0].verdict.advice}" if runs[0].verdict.advice else "")
    known = [row.values.ravel() for row in rows if row.sites]
    if not known:
        _nothing(figure.add_subplot(), metric)
        return figure
    scale = _Scale.of(metric, np.concatenate(known))
    pairs = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(5, 1), height_ratios=tall)
    for run, row, (heat, profile) in zip(runs, rows, pairs, strict=True):
        if len(runs) == 1:
            heat.set_title(metric.title)
        else:
            heat.set_title(_short(run), loc="left", fontsize=10, parse_math=False)
        if row.sites:
            profile.sharey(heat)
            row.draw(heat, profile, scale)
        else:
            _nothing(heat, metric)
            profile.set_axis_off()
    begin, end = min(edges(run.steps)[0] for run in runs), max(edges(run.steps)[-1] for run in runs)
    for heat, _ in pairs:
        heat.set_xlim(begin, end)
    if len(runs) > 1:
        figure.suptitle(metric.title, fontsize=12)
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.colours), ax=list(pairs[:, 1]), fraction=0.2, aspect=30)
    if metric.form == "level":
        bar.set_ticks([0, 0.5, 1], labels=["healthy", "warning", "critical"])
    return figure


def _titled(run: Series) -> str:
    return f"{run.name}: {run.verdict}" if run.name else str(run.verdict)


def _short(run: Series) -> str:
    """The title of a row, in at most two lines."""
    return "\n".join(textwrap.wrap(_titled(run), 100)[:2])


def _nothing(axes: Axes, metric: Metric) -> None:
    """Say that there is nothing to draw."""
    axes.text(0.5, 0.5, f"no site has the number {metric.title!r}", ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


@dataclass(frozen=True)
class _Row:
    """What is drawn of one run: the sites that have a number of the metric."""

    run: Series
    sites: Sequence[dict[str, Any]]
    values: Values
    """[sites, steps]"""

    @staticmethod
    def of(run: Series, metric: Metric) -> _Row:
        found = run.values[metric.name]
        kept = [at for at in range(len(run.names)) if not np.isnan(found[:, at]).all()]
        return _Row(run, [run.sites[at] for at in kept], found[:, kept].T)

    def draw(self, heat: Axes, profile: Axes, scale: _Scale) -> None:
        """Draw the heatmap and the profile at the last step."""
        _heat(heat, edges(self.run.steps), np.arange(len(self.sites) + 1) - 0.5, self.values, scale)
        _names(heat, [f"{site['site']} ({site['activation']})" for site in self.sites])
        heat.set(xlabel="step")
        _alerts(heat, self.run, {site["site"]: at for at, site in enumerate(self.sites)})
        _profile(profile, self.values[:, -1], scale)
        profile.set(title=f"at step {self.run.steps[-1]:.0f}")


def site_figure(run: Series, site: str, histogram: Grid, heads: Grid) -> Picture:
    """One site: how its inputs spread over |f'| / peak at each step, or the entropy of its heads, and below it what the plateaus take."""
    at = run.names.index(site)
    facts = run.sites[at]
    figure = _figure(9, 6.2)
    _title(figure, f"{site} ({facts['activation']}{', an output' if facts['output'] else ', a gate' if facts['gate'] else ''})")
    told = [each for each in run.alerts if site in _places(run, each)]
    softmax = facts["kind"] == "softmax"
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    if softmax and len(heads.steps):
        entropy = next(metric for metric in METRICS if metric.name == "entropy_min")
        scale = _Scale.of(entropy, heads.values)
        _heat(upper, edges(heads.steps), np.arange(len(heads.names) + 1) - 0.5, heads.values.T, scale)
        upper.set(ylabel="head", title="entropy of the attention: 1 is even, 0 is one key alone")
        figure.colorbar(ScalarMappable(scale.norm, scale.colours), ax=upper, aspect=30)
    elif len(histogram.steps):
        _histogram(upper, histogram)
        figure.colorbar(ScalarMappable(_SHARES, _colours("amount")), ax=upper, aspect=30, label="share of inputs", format="%g")
    else:
        upper.text(0.5, 0.5, "no histogram was measured at this site", ha="center", va="center", transform=upper.transAxes)
    lines = ("entropy_min", "blocked", "trapped") if softmax else ("saturated", "blocked", "trapped", "stuck")
    for name in lines:
        series = run.values[name][:, at]
        if np.isfinite(series).any():
            metric = next(metric for metric in METRICS if metric.name == name)
            lower.plot(run.steps, np.where(np.isfinite(series), series, np.nan), label=metric.title, linewidth=1.6)
    normal = normal_saturated(facts["normal_low"], facts["normal_high"])
    if not softmax and normal > 0:
        lower.axhline(normal, color="grey", linestyle=":", linewidth=1, label="saturated where inputs are N(0, 1)")
    for each in told:
        lower.axvspan(each.alert.since, run.steps[-1] if each.cleared is None else each.cleared, color=_SEVERITY[each.alert.severity], alpha=0.12)
        lower.axvline(each.alert.since, color=_SEVERITY[each.alert.severity], linewidth=1.2, label=f"{each.alert.severity}: {each.alert.rule}")
    lower.set(xlabel="step", ylim=(-0.03, 1.03))
    figure.legend(*lower.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


_LEAST_SHARE = 1e-3
_SHARES = LogNorm(_LEAST_SHARE, 1.0)
"""The scale of the colours of a histogram. Like the logarithm in fastai's `color_dim` it shows where a few inputs are, too."""


def _histogram(axes: Axes, histogram: Grid) -> None:
    """The share of inputs in each bin of |f'| / peak over the steps: what is low in the picture lets no gradient through."""
    shares = np.where(histogram.values > 0, histogram.values, _LEAST_SHARE)
    axes.pcolormesh(edges(histogram.steps), np.arange(HISTOGRAM_BINS + 1), shares.T, cmap=_colours("amount"), norm=_SHARES, rasterized=True)
    marks = [(0, "0, closed"), *((HISTOGRAM_EDGES.index(2.0**-k), f"$2^{{-{k}}}$") for k in (20, 15, 10, 5, 2)), (HISTOGRAM_BINS, "1, open")]
    axes.set_yticks([place for place, _ in marks], labels=[name for _, name in marks])
    axes.set(ylabel="|f'| / peak", title="how open the site is to each of its inputs")


@dataclass(frozen=True)
class _Scale:
    """The colours of a metric, and where its scale begins and ends."""

    colours: ListedColormap
    norm: Normalize
    logarithmic: bool

    @staticmethod
    def of(metric: Metric, values: Values) -> _Scale:
        finite = values[np.isfinite(values) & ((values > 0) | (metric.scale == "linear"))]
        least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.1, 1.0)
        low, high = least if metric.low is None else metric.low, most if metric.high is None else metric.high
        norm: Normalize = LogNorm(low, max(high, low * 1.01), clip=True) if metric.scale == "log" else Normalize(low, high, clip=True)
        return _Scale(_colours(metric.ramp, metric.reversed), norm, metric.scale == "log")


def _heat(axes: Axes, x: NDArray[np.float64], y: NDArray[np.floating[Any]], values: Values, scale: _Scale) -> None:
    """A heatmap with the first row on top. What was not measured is grey, and what is inf or nan is hatched."""
    axes.set_facecolor("#4a4d52" if _is_dark() else "#d5d8dc")
    shown = np.ma.masked_where(~np.isfinite(values), np.maximum(values, 1e-30) if scale.logarithmic else values)
    axes.pcolormesh(x, y, shown, cmap=scale.colours, norm=scale.norm, rasterized=True)
    broken = np.isinf(values)
    for row in np.flatnonzero(broken.any(1)):
        turns = np.flatnonzero(np.diff(np.concatenate([[False], broken[row], [False]]).astype(int)))
        spans = [(x[begin], x[end] - x[begin]) for begin, end in zip(turns[::2], turns[1::2], strict=True)]
        axes.broken_barh(spans, (y[row], 1), facecolor="#f3d9fa", edgecolor="#8e44ad", hatch="xxxx", linewidth=0.5)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[-1], y[0]))


def _profile(axes: Axes, values: Values, scale: _Scale) -> None:
    """The numbers of the last step as bars, one beside each row of the heatmap."""
    low, high = scale.norm.vmin or 0.0, scale.norm.vmax or 1.0
    for row, value in enumerate(values):
        if np.isinf(value):
            axes.barh(row, high - low, left=low, facecolor="#f3d9fa", edgecolor="#8e44ad", hatch="xxxx", linewidth=0.5)
        elif np.isfinite(value):
            place = min(max(float(value), low), high)
            axes.barh(row, place - low, left=low, height=0.8, color=scale.colours(scale.norm(place)), edgecolor="grey", linewidth=0.5)
    if scale.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(low, high)
    axes.tick_params(labelleft=False, left=False, labelsize=8)


def _alerts(axes: Axes, run: Series, rows: Mapping[str, int]) -> None:
    """A line through each row from the step since which an alert holds to where it cleared, with a triangle where it began."""
    for each in run.alerts:
        places = [rows[place] for place in _places(run, each) if place in rows]
        if not places:
            continue
        colour, begin = _SEVERITY[each.alert.severity], max(each.alert.since, run.steps[0])
        end = axes.get_xlim()[1] if each.cleared is None else each.cleared
        axes.hlines([row + 0.38 for row in places], begin, end, colors=colour, linewidth=1.5)
        axes.plot(begin, places[0] + 0.3, marker=">", color=colour, markeredgecolor="white", markersize=8, clip_on=False, zorder=5)


def _places(run: Series, episode: Episode) -> list[str]:
    """The sites that an alert is about: where it began first. An alert of a layer is about the sites that the layer feeds."""
    return list(dict.fromkeys(site for place in (episode.alert.site, *episode.alert.also) for site in run.sites_at(place)))


def _names(axes: Axes, names: Sequence[str]) -> None:
    """The names of the rows."""
    every = -(-len(names) // _MOST_NAMES)
    shown = [(at, name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}") for at, name in enumerate(names) if at % every == 0]
    axes.set_yticks([at for at, _ in shown], labels=[name for _, name in shown], fontsize=8 if len(shown) < 30 else 7)


def _figure(width: float, height: float) -> Picture:
    return Picture(figsize=(width, height), layout="constrained")


def _title(figure: Picture, *sentences: str) -> None:
    """A title on the left, in lines that fit the figure. No character of it is markup."""
    lines = [line for sentence in sentences for line in textwrap.wrap(sentence, 120)[:2]]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10.5, parse_math=False)


def _is_dark() -> bool:
    red, green, blue, alpha = to_rgba(rcParams["figure.facecolor"])
    return alpha > 0 and 0.3 * red + 0.6 * green + 0.1 * blue < 0.5


def _ink() -> str:
    return str(rcParams["text.color"])


def _colours(ramp: Ramp, backwards: bool = False) -> ListedColormap:
    """A ramp as matplotlib's kind of colours."""
    found = [tuple(channel / 255 for channel in colour) for colour in shades(ramp, _is_dark())]
    return ListedColormap(found[::-1] if backwards else found)
