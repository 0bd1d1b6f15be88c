"""What TensorBoard's own dashboards show of a run, for readers that do not have our tab: scalars, their charts, and a table of alerts. Never torch.

A dozen scalars of the whole network form one group, `torchsat/`. The numbers of single sites form one group per metric. Their tags begin with the
number of the site in the order of data flow, so that TensorBoard, which sorts by name, shows them in this order. The Custom Scalars dashboard gets
charts of these scalars, the Text dashboard the verdict and the alerts, the Images dashboard a picture (heatmap.py).

The numbers are such that a reader can compare activations: the alert level, and what lies beyond that which N(0, 1) inputs give. By the raw share a
healthy ReLU, with half of its inputs on its plateau, would look worse than a sick sigmoid.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MarginChartContent, MultilineChartContent

from torchsat.alerts import Episode
from torchsat.flow import gradient_over_depth
from torchsat.metrics import excess
from torchsat.percent import percent
from torchsat.record import Alert, Record, Snapshot
from torchsat.shown import WARNING
from torchsat.verdict import verdict_of

NETWORK = {
    "health_worst": "The alert level of the worst site or layer, outputs included: 0 is healthy, 0.5 at the limit of a warning, 1 critical.",
    "unhealthy": "Share of the sites that are at the limit of a warning or beyond it, by themselves or by a layer that feeds them.",
    "excess_p10": "Share of elements on a plateau beyond what N(0, 1) inputs give, at the hidden site below which a tenth of the hidden sites lie.",
    "excess_median": "The same at the median hidden site.",
    "excess_p90": "The same at the hidden site above which a tenth lie.",
    "excess_max": "The same at the worst hidden site.",
    "derivative_min": "E|f'(z)| over what N(0, 1) inputs give, at the worst hidden site: 1 is normal, 0 is closed.",
    "stuck_max": "Share of units saturated in at least 99 % of their newest samples (64 to 1000), at the worst hidden site.",
    "attenuation_min": "||dL/dz|| / ||dL/da|| at the hidden site that lets least of the gradient through.",
    "gradient_first_over_last": "||dL/dz|| at the first site of a path over that at the last hidden one: 1 is healthy, 0 has vanished.",
    "update_ratio_min": "||change of W|| / ||W|| per step of the layer that moves least, of those that feed a site.",
    "update_ratio_max": "The same of the layer that moves most.",
    "entropy_min": "H / ln T of the attention head that looks at fewest keys: 1 is even attention, 0 is one key alone.",
    "nonfinite": "Measured elements that are inf or nan, in the forward and in the backward pass, over all sites.",
    "overhead": "Share of the training time that the last observations took.",
    "alerts": "Alerts that fire now. See the Text tab, or `torchsat report`.",
}
"""The scalars of the whole network, by their name below `torchsat/`, with their descriptions."""


def excess_of(record: Record) -> float | None:
    """The saturated share beyond that of N(0, 1) inputs: half of a healthy ReLU's inputs lie on its plateau."""
    return None if record.saturated is None else excess(record.saturated, record.normal_low, record.normal_high)


def derivative_of(record: Record) -> float | None:
    """E|f'| over what N(0, 1) inputs give: for every activation 1 is normal."""
    return record.relative_derivative / record.normal_derivative if record.relative_derivative is not None and record.normal_derivative else None


def levels_of(snapshot: Snapshot) -> dict[str, float]:
    """The alert level of each site that has one: its own, or that of a layer that feeds it, whichever is worse."""
    found = {record.site: record.alert_level for record in snapshot.records if record.alert_level is not None}
    for weight in snapshot.weights:
        if weight.alert_level:
            for site in weight.feeds:
                found[site] = max(found.get(site, 0.0), weight.alert_level)
    return found


class Group(NamedTuple):
    """A group of scalars: one number of each site."""

    name: str
    """What the tags begin with."""
    value: Callable[[Record, Mapping[str, float]], float | None]
    """The number of a record. The second argument are the `levels_of` its snapshot."""
    title: str
    says: str
    """The description of one scalar. `{site}` and `{activation}` are filled in."""


SITES = (
    Group(
        "torchsat.health",
        lambda record, levels: levels.get(record.site),
        "Health",
        "How near `{site}` ({activation}), or a layer that feeds it, is to an alert: 0 is healthy, 0.5 at the limit of a warning, 1 critical.",
    ),
    Group(
        "torchsat.excess",
        lambda record, _: excess_of(record),
        "Saturated beyond normal",
        "Share of the inputs of `{site}` ({activation}) that lie on a plateau, less what N(0, 1) inputs give.",
    ),
    Group(
        "torchsat.derivative",
        lambda record, _: derivative_of(record),
        "E|f'| over normal",
        "E|f'(z)| at `{site}` ({activation}) over what N(0, 1) inputs give: 1 is normal, 0 is closed.",
    ),
    Group("torchsat.attenuation", lambda record, _: record.attenuation, "Attenuation", "||dL/dz|| / ||dL/da|| at `{site}` ({activation})."),
    Group(
        "torchsat.entropy",
        lambda record, _: record.entropy_min,
        "Attention entropy",
        "H / ln T of the lowest head of `{site}`: 1 is even attention, 0 is one key alone.",
    ),
)
"""The groups of scalars of single sites."""

PER_CHART, MOST_CHARTS = 10, 10
"""A chart shows ten sites. If that makes more than ten charts, each shows as many sites as make ten charts."""


def network(snapshot: Snapshot, firing: int, levels: Mapping[str, float]) -> dict[str, float | None]:
    """The numbers of the whole network, by the names of NETWORK. None: it is not known.

    Args:
        firing: how many alerts fire now.
        levels: the `levels_of` the snapshot.
    """
    hidden = [record for record in snapshot.records if not record.output]

    def collect(values: Iterable[float | None]) -> list[float]:
        return [value for value in values if value is not None]

    beyond, derivatives = sorted(collect(map(excess_of, hidden))), collect(map(derivative_of, hidden))
    columns = zip(*map(_JUDGED, hidden), strict=True) if hidden else [()] * 3
    stuck, attenuations, entropies = map(collect, columns)
    updates = collect(weight.update_ratio for weight in snapshot.weights)
    of_layers = collect(weight.alert_level for weight in snapshot.weights)
    return {
        "health_worst": max([*levels.values(), *of_layers], default=None),
        "unhealthy": sum(level >= WARNING for level in levels.values()) / len(levels) if levels else None,
        "excess_p10": _quantile(beyond, 0.1),
        "excess_median": _quantile(beyond, 0.5),
        "excess_p90": _quantile(beyond, 0.9),
        "excess_max": max(beyond, default=None),
        "derivative_min": min(derivatives, default=None),
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
    """The scalars of a snapshot for any logger, by TensorBoard's tags. Tags of sites lack the number of the site, which only a whole run gives it.

    Args:
        firing: how many alerts fire now. A snapshot cannot tell, since it knows only the alerts that have changed. None: this scalar is left out.
    """
    levels = levels_of(snapshot)
    whole = network(snapshot, firing or 0, levels)
    found = {f"torchsat/{name}": value for name, value in whole.items() if name != "alerts" or firing is not None}
    found.update((f"{group.name}/{record.site}", group.value(record, levels)) for record in snapshot.records for group in SITES)
    return {tag: float(value) for tag, value in found.items() if value is not None}


_JUDGED = operator.attrgetter("stuck", "attenuation", "entropy_min")


def _quantile(ordered: Sequence[float], below: float) -> float | None:
    """The number below which that fraction of sorted numbers lies, interpolated between neighbours; None if there are no numbers."""
    if not ordered:
        return None
    at = below * (len(ordered) - 1)
    left = int(at)
    right = min(left + 1, len(ordered) - 1)
    return ordered[left] + (ordered[right] - ordered[left]) * (at - left)


def layout(tags: Sequence[tuple[Group, Sequence[str]]], worst_tags: Sequence[str]) -> bytes:
    """The encoded layout of the Custom Scalars dashboard: charts of the spread over all sites, of the worst sites, and of all sites.

    Args:
        tags: of each group its tags, in the order of data flow.
        worst_tags: the tags of the worst sites.
    """

    def multiline(title: str, chosen: Sequence[str]) -> Chart:
        return Chart(title=title, multiline=MultilineChartContent(tag=[f"{re.escape(tag)}$" for tag in chosen]))

    spread = MarginChartContent.Series(value="torchsat/excess_median", lower="torchsat/excess_p10", upper="torchsat/excess_p90")
    title = "Saturated beyond normal: median, and all but the lowest and highest tenth of the sites"
    charts = [
        multiline("Health of the worst site, and share of the sites that are unhealthy", ["torchsat/health_worst", "torchsat/unhealthy"]),
        Chart(title=title, margin=MarginChartContent(series=[spread])),
    ]
    if worst_tags:
        charts.append(multiline(f"The {len(worst_tags)} worst sites", worst_tags))
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


def escaped(text: str) -> str:
    """The text with every character escaped that Markdown would take for markup."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", text)


def code_in_cell(code: str) -> str:
    """Code as HTML for a cell of a Markdown table, with nothing in it that Markdown would take for a mark of its own."""
    for mark in "&<>|*_[`":
        code = code.replace(mark, f"&#{ord(mark)};" if mark != "&" else "&amp;")
    return f"<pre>{code.replace(chr(10), '<br>')}</pre>"


def alert_table(events: Sequence[Alert], firing: Iterable[Alert] = (), activations: Mapping[str, str] | None = None) -> str:
    """The verdict on what fires now, and the events so far as a Markdown table, the newest first.

    It is one text, since TensorBoard keeps only one per step. It has few columns, since TensorBoard breaks the text of narrow ones into pieces.

    Args:
        activations: the activation of each site, and what each layer is, by name.
    """
    over = [Episode(event, event.since, event.step) for event in events if not event.firing]
    verdict = verdict_of([*(Episode(alert, alert.step, None) for alert in firing), *over], activations)
    lines = [f"**{escaped(str(verdict))}**" + (f". Try: {verdict.advice}" if verdict.advice else ""), "", "what | why | try", "--- | --- | ---"]
    for alert in reversed(events):
        what = f"step {alert.step}: {f'**{alert.severity}**' if alert.firing else 'cleared'}: {alert.message}"
        why = "; ".join(f"{cause.name} {percent(cause.share)}: {cause.evidence}" for cause in alert.causes)
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in (what, why, alert.causes[0].advice if alert.causes else "")]
        if alert.causes and alert.causes[0].code:
            cells[-1] += code_in_cell(alert.causes[0].code)
        lines.append(" | ".join(cells))
    return "\n".join(lines)
