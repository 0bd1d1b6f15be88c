"""What TensorBoard's own dashboards show of a run, where our tab is not installed: tags, layout, heatmap, alerts. Never torch.

A dozen scalars of the whole network stand in one group, `torchsat/`. Numbers of each site stand in one group per metric, whose names begin with the
depth of the site, so that TensorBoard's order is that of the data flow. Custom Scalars gets charts made of these, Images one picture of all sites
over all steps, Text the alerts.
"""

from __future__ import annotations

import io
import itertools
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MarginChartContent, MultilineChartContent

from torchsat.record import Alert, Record, Snapshot
from torchsat.rules import gradient_over_depth, percent
from torchsat.view import METRICS, Grid, Table, join, shade, shades

NETWORK = {
    "saturated_p10": "Share of elements on a plateau at the hidden site below which a tenth of the hidden sites lie.",
    "saturated_median": "The same at the median hidden site.",
    "saturated_p90": "The same at the hidden site above which a tenth lie.",
    "saturated_max": "The same at the worst hidden site.",
    "relative_derivative_min": "E|f'(z)| / peak at the worst hidden site: 1 is fully open, 0 is closed.",
    "stuck_max": "Share of units saturated in at least 99 % of at least 1000 samples, at the worst hidden site.",
    "attenuation_min": "||dL/dz|| / ||dL/da|| at the hidden site that lets least of the gradient through.",
    "gradient_first_over_last": "||dL/dz|| at the first site over that at the last hidden one: 1 is healthy, 0 has vanished.",
    "update_ratio_min": "||change of W|| / ||W|| per step of the layer that moves least, of those that feed a site.",
    "update_ratio_max": "The same of the layer that moves most.",
    "entropy_min": "H / ln T of the attention head that looks at fewest keys: 1 is even attention, 0 is one key alone.",
    "nonfinite": "Measured elements that are inf or nan, in the forward and in the backward pass, over all sites.",
    "overhead": "Share of the training time that the last observations took.",
    "alerts": "Alerts that fire now. See the Text tab, or `torchsat report`.",
}
"""The scalars of the whole network under torchsat/, with their descriptions."""


class Group(NamedTuple):
    """One scalar per site."""

    name: str
    metric: str
    title: str
    says: str
    """With the site and its activation to be filled in."""


SITES = (
    Group("torchsat.saturated", "saturated", "Saturated share", "Share of the inputs of `{site}` ({activation}) that lie on a plateau."),
    Group("torchsat.derivative", "relative_derivative", "E|f'| / peak", "E|f'(z)| / peak at `{site}` ({activation}): 1 is fully open, 0 is closed."),
    Group("torchsat.attenuation", "attenuation", "Attenuation", "||dL/dz|| / ||dL/da|| at `{site}` ({activation})."),
    Group(
        "torchsat.entropy", "entropy_min", "Attention entropy", "H / ln T of the lowest head of `{site}`: 1 is even attention, 0 is one key alone."
    ),
)
"""The groups of scalars of each site."""

MISSING = (200, 204, 208)
WORST = 8
PER_CHART, MOST_CHARTS = 10, 10
"""Ten sites a chart, or as many as make ten charts."""


def network(snapshot: Snapshot, firing: int) -> dict[str, float | None]:
    """The numbers of the whole network; None where nothing can be said."""
    hidden = [record for record in snapshot.records if not record.output]

    def collect(values: Iterable[float | None]) -> list[float]:
        return [value for value in values if value is not None]

    columns = zip(*map(_JUDGED, hidden), strict=True) if hidden else [()] * 5
    saturated, derivatives, stuck, attenuations, entropies = map(collect, columns)
    saturated.sort()
    updates = [weight.update_ratio for weight in snapshot.weights if weight.update_ratio is not None]
    return {
        "saturated_p10": _quantile(saturated, 0.1),
        "saturated_median": _quantile(saturated, 0.5),
        "saturated_p90": _quantile(saturated, 0.9),
        "saturated_max": max(saturated, default=None),
        "relative_derivative_min": min(derivatives, default=None),
        "stuck_max": max(stuck, default=None),
        "attenuation_min": min(attenuations, default=None),
        "gradient_first_over_last": gradient_over_depth(snapshot),
        "update_ratio_min": min(updates, default=None),
        "update_ratio_max": max(updates, default=None),
        "entropy_min": min(entropies, default=None),
        "nonfinite": float(sum(record.nonfinite + record.grad_nonfinite for record in snapshot.records)),
        "overhead": snapshot.overhead,
        "alerts": float(firing),
    }


def scalars(snapshot: Snapshot, firing: int | None = None) -> dict[str, float]:
    """The scalars of a snapshot for any logger, under TensorBoard's tags; the sites without their number, which only a whole run gives them.

    `firing`: how many alerts fire now; a snapshot knows only what has changed.
    """
    found = {f"torchsat/{name}": value for name, value in network(snapshot, firing or 0).items() if name != "alerts" or firing is not None}
    found.update((f"{group.name}/{record.site}", getattr(record, group.metric)) for record in snapshot.records for group in SITES)
    return {tag: float(value) for tag, value in found.items() if value is not None}


_JUDGED = operator.attrgetter("saturated", "relative_derivative", "stuck", "attenuation", "entropy_min")


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Of sorted numbers, interpolated between neighbours."""
    if not ordered:
        return None
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def excess(record: Record) -> float | None:
    """The saturated share less what N(0, 1) inputs give."""
    return None if record.saturated is None else record.saturated - (record.normal_low or 0.0) - (record.normal_high or 0.0)


def layout(tags: Sequence[tuple[Group, Sequence[str]]], worst_tags: Sequence[str]) -> bytes:
    """Charts for the Custom Scalars dashboard, from the tags of each group in order of depth: the spread over all sites, the worst, and all."""

    def multiline(title: str, chosen: Sequence[str]) -> Chart:
        return Chart(title=title, multiline=MultilineChartContent(tag=[f"{re.escape(tag)}$" for tag in chosen]))

    spread = MarginChartContent.Series(value="torchsat/saturated_median", lower="torchsat/saturated_p10", upper="torchsat/saturated_p90")
    charts = [
        Chart(title="Saturated share: median, and all but the lowest and highest tenth of the sites", margin=MarginChartContent(series=[spread]))
    ]
    if worst_tags:
        charts.append(multiline(f"Saturated share of the {len(worst_tags)} sites furthest beyond normal", worst_tags))
    charts.append(multiline("Gradient at the first site over that at the last", ["torchsat/gradient_first_over_last"]))
    categories = [Category(title="torchsat", chart=charts)]
    for group, names in tags:
        if names:
            size = max(PER_CHART, -(-len(names) // MOST_CHARTS))
            parts = [names[at : at + size] for at in range(0, len(names), size)]
            titles = [f"{group.title}, {len(part)} sites from {part[0].partition('/')[2]}" for part in parts]
            each = [multiline(title, part) for title, part in zip(titles, parts, strict=True)]
            categories.append(Category(title=f"torchsat: {group.title} by depth", chart=each, closed=group is not SITES[0]))
    encoded: bytes = Layout(category=categories).SerializeToString()
    return encoded


def alert_table(alerts: Sequence[Alert]) -> str:
    """Every alert so far, newest first, as Markdown: one text, since TensorBoard keeps one per step. Narrow columns would be broken up."""
    lines = ["what | why | try", "--- | --- | ---"]
    for alert in reversed(alerts):
        state = f"**{alert.severity}**, since step {alert.since}" if alert.firing else "cleared"
        what = f"step {alert.step}: {state}: {alert.message}" + (f" ({len(alert.also)} more after it)" if alert.firing and alert.also else "")
        why = "; ".join(f"{cause.name} {percent(cause.share)}: {cause.evidence}" for cause in alert.causes)
        cells = (what, why, alert.causes[0].remedy if alert.causes else "")
        lines.append(" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells))
    return "\n".join(lines)


class Heatmap:
    """One picture of all sites over all steps so far, small enough for the Images dashboard, which shrinks what is larger than a card."""

    WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 350, 270, 106, 24, 40, 8
    KEPT = 512

    def __init__(self) -> None:
        self._observed: list[tuple[int, float, list[tuple[str, float]]]] = []
        self._spared: set[str] = set()
        self._metric = METRICS[0]

    def add(self, snapshot: Snapshot) -> None:
        values = [(record.site, value) for record in snapshot.records if (value := excess(record)) is not None]
        self._observed.append((snapshot.step, snapshot.time, values))
        self._spared = {record.site for record in snapshot.records if record.output or record.gate}
        if len(self._observed) > self.KEPT:
            self._observed = [*self._observed[:-1:2], self._observed[-1]]

    @property
    def end(self) -> tuple[int, float]:
        """The step and the time of the last observation."""
        return self._observed[-1][:2]

    def worst(self) -> list[str]:
        """The hidden sites that are furthest beyond normal at the last observation, worst first."""
        found = [(value, site) for site, value in self._observed[-1][2] if site not in self._spared]
        return [site for _, site in sorted(found, key=lambda pair: -pair[0])[:WORST]]

    def png(self) -> bytes | None:
        """The picture; None where nothing saturates."""
        names, steps, times, values = join(
            [Table.of([site for site, _ in row], step, time, [[value for _, value in row]]) for step, time, row in self._observed], 1
        )
        if not names:
            return None
        grid = Grid(steps, times, names, values[:, 0])
        image = Image.new("RGB", (self.WIDTH, self.HEIGHT), "white")
        width, height = self.WIDTH - self.LEFT - self.RIGHT, self.HEIGHT - self.TOP - self.BOTTOM
        heat = Image.fromarray(self._pixels(grid, width)).resize((width, height), Image.Resampling.NEAREST)
        image.paste(heat, (self.LEFT, self.TOP))
        self._letter(image, grid, width, height)
        encoded = io.BytesIO()
        image.save(encoded, "png")
        return encoded.getvalue()

    def _pixels(self, grid: Grid, width: int) -> NDArray[np.uint8]:
        """[sites, columns, 3]: each column shows the worst of the observations that begin in it, or else the one that holds there."""
        metric, colours = self._metric, np.array([*shades(self._metric.ramp), MISSING], np.uint8)
        last = grid.steps[-1] + (grid.steps[-1] - grid.steps[-2] if len(grid.steps) > 1 else 1)
        starts = np.linspace(grid.steps[0], last, width + 1)
        first = np.searchsorted(grid.steps, starts[:-1], "right") - 1
        until = np.searchsorted(grid.steps, starts[1:], "left")
        found = np.stack([np.fmax.reduce(grid.values[at : max(at + 1, end)], axis=0) for at, end in zip(first, until, strict=True)], 1)
        pixels: NDArray[np.uint8] = colours[np.where(np.isnan(found), len(colours) - 1, shade(metric, np.nan_to_num(found), 0.0, 1.0))]
        return pixels

    def _letter(self, image: Image.Image, grid: Grid, width: int, height: int) -> None:
        pen, font, ink, faint = ImageDraw.Draw(image), _font(12), "#202124", "#5f6368"
        pen.text((4, 4), f"{self._metric.title}, {len(grid.names)} sites", ink, font)
        row, every = height / len(grid.names), -(-15 * len(grid.names) // height)
        shared = _shared(grid.names)
        for place, name in enumerate(grid.names):
            if place % every == 0:
                pen.text(
                    (self.LEFT - 4, self.TOP + (place + 0.5) * row),
                    _shortened(name[shared:], self.LEFT - 8, font),
                    ink,
                    font,
                    anchor="rm",
                )
        pen.rectangle((self.LEFT - 1, self.TOP - 1, self.LEFT + width, self.TOP + height), outline="#9aa0a6")
        below = self.TOP + height + 4
        pen.text((self.LEFT, below), f"step {grid.steps[0]:.0f}", faint, font)
        pen.text((self.LEFT + width, below), f"{grid.steps[-1]:.0f}", faint, font, anchor="ra")
        for at, colour in enumerate(shades(self._metric.ramp)):
            pen.line((self.LEFT + at * 140 // 256 + 40, below + 18, self.LEFT + at * 140 // 256 + 40, below + 28), fill=colour)
        pen.text((self.LEFT + 34, below + 23), "0 %", faint, font, anchor="rm")
        pen.text((self.LEFT + 186, below + 23), "100 %", faint, font, anchor="lm")


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _shared(names: Sequence[str]) -> int:
    """How long the path is that all names begin with."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return sum(len(each[0]) + 1 for each in itertools.takewhile(lambda each: len(set(each)) == 1, parts)) if len(names) > 1 else 0


def _shortened(name: str, width: int, font: Any) -> str:
    """What sites have in common is gone; of the rest the beginning tells them apart."""
    text = name
    while font.getlength(text) > width:
        name = name[:-1]
        text = f"{name}…"
    return text
