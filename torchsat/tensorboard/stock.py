"""What TensorBoard's own dashboards show of a run, for readers that do not have our tab: scalars, their charts, and a table of alerts. Never torch.

A dozen scalars of the whole network form one group, `torchsat/`. The numbers of single sites form one group per metric. Their tags begin with the
number of the site in the order of data flow, so that TensorBoard, which sorts by name, shows them in this order. The Custom Scalars dashboard gets
charts of these scalars, the Text dashboard the alerts, the Images dashboard a picture (heatmap.py).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MarginChartContent, MultilineChartContent

from torchsat.flow import gradient_over_depth
from torchsat.percent import percent
from torchsat.record import Alert, Snapshot

NETWORK = {
    "saturated_p10": "Share of elements on a plateau at the hidden site below which a tenth of the hidden sites lie.",
    "saturated_median": "The same at the median hidden site.",
    "saturated_p90": "The same at the hidden site above which a tenth lie.",
    "saturated_max": "The same at the worst hidden site.",
    "relative_derivative_min": "E|f'(z)| / peak at the worst hidden site: 1 is fully open, 0 is closed.",
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


class Group(NamedTuple):
    """A group of scalars: one metric of each site."""

    name: str
    """What the tags begin with."""
    metric: str
    """The attribute of Record."""
    title: str
    says: str
    """The description of one scalar. `{site}` and `{activation}` are filled in."""


SITES = (
    Group("torchsat.saturated", "saturated", "Saturated share", "Share of the inputs of `{site}` ({activation}) that lie on a plateau."),
    Group("torchsat.derivative", "relative_derivative", "E|f'| / peak", "E|f'(z)| / peak at `{site}` ({activation}): 1 is fully open, 0 is closed."),
    Group("torchsat.attenuation", "attenuation", "Attenuation", "||dL/dz|| / ||dL/da|| at `{site}` ({activation})."),
    Group(
        "torchsat.entropy", "entropy_min", "Attention entropy", "H / ln T of the lowest head of `{site}`: 1 is even attention, 0 is one key alone."
    ),
)
"""The groups of scalars of single sites."""

PER_CHART, MOST_CHARTS = 10, 10
"""A chart shows ten sites. If that makes more than ten charts, each shows as many sites as make ten charts."""


def network(snapshot: Snapshot, firing: int) -> dict[str, float | None]:
    """The numbers of the whole network, by the names of NETWORK. None: it is not known.

    Args:
        firing: how many alerts fire now.
    """
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
    """The scalars of a snapshot for any logger, by TensorBoard's tags. Tags of sites lack the number of the site, which only a whole run gives it.

    Args:
        firing: how many alerts fire now. A snapshot cannot tell, since it knows only the alerts that have changed. None: this scalar is left out.
    """
    found = {f"torchsat/{name}": value for name, value in network(snapshot, firing or 0).items() if name != "alerts" or firing is not None}
    found.update((f"{group.name}/{record.site}", getattr(record, group.metric)) for record in snapshot.records for group in SITES)
    return {tag: float(value) for tag, value in found.items() if value is not None}


_JUDGED = operator.attrgetter("saturated", "relative_derivative", "stuck", "attenuation", "entropy_min")


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


def code_in_cell(code: str) -> str:
    """Code as HTML for a cell of a Markdown table, with nothing in it that Markdown would take for a mark of its own."""
    for mark in "&<>|*_[`":
        code = code.replace(mark, f"&#{ord(mark)};" if mark != "&" else "&amp;")
    return f"<pre>{code.replace(chr(10), '<br>')}</pre>"


def alert_table(events: Sequence[Alert]) -> str:
    """The events so far as a Markdown table, the newest first.

    It is one text, since TensorBoard keeps only one per step. It has few columns, since TensorBoard breaks the text of narrow ones into pieces.
    """
    lines = ["what | why | try", "--- | --- | ---"]
    for alert in reversed(events):
        what = f"step {alert.step}: {f'**{alert.severity}**' if alert.firing else 'cleared'}: {alert.message}"
        why = "; ".join(f"{cause.name} {percent(cause.share)}: {cause.evidence}" for cause in alert.causes)
        cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in (what, why, alert.causes[0].advice if alert.causes else "")]
        if alert.causes and alert.causes[0].code:
            cells[-1] += code_in_cell(alert.causes[0].code)
        lines.append(" | ".join(cells))
    return "\n".join(lines)
