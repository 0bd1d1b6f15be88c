"""The tables of the report, before they are printed as text (text.py) or as Markdown (markdown.py). Never torch.

What is shown of them where there is not room for all is decided in tables.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torchsat.alerts import Episode
from torchsat.experts import Experts
from torchsat.forecast import worst
from torchsat.number_formats import IN_WORDS
from torchsat.percent import number_or_dash, percent_or_dash
from torchsat.record import Record, Snapshot, Weight, place_of
from torchsat.shown import level_in_words
from torchsat.tables import BARS, Column, Row, Sheet
from torchsat.tensorboard.reader import Run
from torchsat.verdict import Health, Verdict, verdict_on, worst_first

Item = TypeVar("Item", Record, Weight, Experts)


def extent(run: Run, found: Sequence[Episode]) -> str:
    """The extent of a run, in one line."""
    first, last, firing = run.snapshots[0], run.snapshots[-1], sum(each.cleared is None for each in found)
    steps = f"step {first.step}" if first.step == last.step else f"steps {first.step} to {last.step}"
    counts = (
        _count(len(run.snapshots), "observation"),
        _count(len(last.records), "site"),
        f"{_count(len(found), 'alert')}{f' ({firing} firing at the end)' if found else ''}",
    )
    return f"{counts[0]}, {steps}, {counts[1]}, {counts[2]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def verdicts_of(runs: Iterable[Run]) -> dict[str, Verdict]:
    """The verdict on each run, by name."""
    return {run.name: verdict_on(run.snapshots) for run in runs}


def comparison(verdicts: Mapping[str, Verdict], runs: Iterable[Run]) -> Sheet:
    """Several runs side by side, the worst first."""
    by_name = {run.name: run for run in runs}
    columns = (
        Column("run", name=True, left=True),
        Column("health", left=True),
        Column("steps", rank=3),
        Column("observations", rank=5),
        Column("since", rank=1),
        Column("where", name=True, left=True),
        Column("what", left=True, rank=4),
        Column("cause", left=True, rank=2),
        Column("way to a warning", rank=6),
    )
    rows = []
    for name in worst_first(verdicts):
        verdict, last = verdicts[name], by_name[name].snapshots[-1]
        alert = verdict.alert
        cause = alert.causes[0].name if alert is not None and alert.causes else "-"
        since = str(alert.since) if alert is not None else "-"
        counts = (str(last.step), str(len(by_name[name].snapshots)))
        way = percent_or_dash(verdict.nearest.way if verdict.nearest else None)
        rows.append(Row((name, verdict.health.value, *counts, since, verdict.where or "-", verdict.what or "-", cause, way)))
    return Sheet("Runs, worst first", columns, rows, "run")


def sheets(run: Run, found: Sequence[Episode], bars: str = BARS, trend: int = 24) -> list[Sheet]:
    """The tables of a run that have rows.

    Args:
        found: the alerts of the run.
        trend: the most characters of a sparkline.
    """
    firing = {place for each in found if each.cleared is None for place in (each.alert.site, *each.alert.also)}
    made = [_site_sheet(run.snapshots, firing, bars, trend), _attention_sheet(run.snapshots, firing, bars, trend)]
    last = run.snapshots[-1]
    made += [_expert_sheet(last, firing), _weight_sheet(last, firing), _ledger_sheet(run.snapshots), _format_sheet(last)]
    return [sheet for sheet in made if sheet.rows]


def health_of(item: Record | Weight | Experts, firing: Iterable[str] = ()) -> str:
    """How a site or a layer is in one observation, in a word; a dash where no rule judges it.

    Args:
        firing: the places of the alerts that fire. One that is healthy now and is among them is recovering: its alert waits before it clears.
    """
    broken = item.nonfinite or item.grad_nonfinite if isinstance(item, Record) else isinstance(item, Weight) and not math.isfinite(item.norm or 0.0)
    word = level_in_words(item.alert_level, broken)
    if word in (Health.NOT_FINITE.value, Health.CRITICAL.value, Health.WARNING.value):
        return word
    if item.alert_level is None:
        return "-"
    return "recovering" if place_of(item) in firing else Health.HEALTHY.value


def _notable(item: Record | Weight | Experts, health: str) -> bool:
    """Whether a row is worth a line in a large network. Where no rule judges a site, one that is far from normal is."""
    is_closed = isinstance(item, Record) and item.kind != "softmax" and badness(item) >= 0.3
    return health != Health.HEALTHY.value and (health != "-" or is_closed)


def _severity(item: Record | Weight | Experts, health: str) -> tuple[bool, float]:
    """The sort key of rows, of which the largest is the worst: what is not finite, then by level."""
    return health == Health.NOT_FINITE.value, -1.0 if item.alert_level is None else item.alert_level


def badness(record: Record) -> float:
    """The sort key of sites of equal health: how much less open than normal the site is. Outputs and gates, which saturate by design, come last."""
    if record.output or record.gate:
        return -1.0
    closed = 0.0 if record.relative_derivative is None else 1 - record.relative_derivative
    normal = 0.0 if record.normal_derivative is None else 1 - record.normal_derivative
    return max(closed - normal, record.stuck or 0.0, 1.0 if record.nonfinite else 0.0)


def sparkline(values: Sequence[float | None], width: int = 24, bars: str = BARS) -> str:
    """Numbers in [0, 1] over time as bars, the oldest first. If there are more than `width`, evenly chosen ones are shown."""
    if len(values) > width:
        values = [values[round(at * (len(values) - 1) / (width - 1))] for at in range(width)]
    return "".join(" " if value is None else bars[min(len(bars) - 1, int(value * len(bars)))] for value in values)


def _latest(snapshots: Sequence[Snapshot], softmaxes: bool, trend: str) -> list[tuple[Record, list[float | None]]]:
    """Each softmax, or each other site, as it was last seen, with one of its numbers over time."""
    latest: dict[str, Record] = {}
    series: dict[str, list[float | None]] = {}
    for snapshot in snapshots:
        for record in snapshot.records:
            if (record.kind == "softmax") == softmaxes:
                latest[record.site] = record
                series.setdefault(record.site, []).append(getattr(record, trend))
    return [(record, series[site]) for site, record in latest.items()]


@dataclass(frozen=True)
class _Shown(Generic[Item]):
    """A site or a layer as a row of a table shows it."""

    item: Item
    health: str
    trend: str = ""


Cells = tuple[tuple[Column, Callable[[_Shown[Item]], str]], ...]
"""The columns of a table, each with what its cells say."""

_SITE_CELLS: Cells[Record] = (
    (Column("site", left=True, name=True), lambda row: row.item.site),
    (
        Column("activation", left=True, rank=2),
        lambda row: row.item.activation + (" (output)" if row.item.output else " (gate)" if row.item.gate else ""),
    ),
    (Column("health", left=True), lambda row: row.health),
    (Column("saturated", rank=1), lambda row: percent_or_dash(row.item.saturated)),
    (Column("low", rank=10), lambda row: percent_or_dash(row.item.low)),
    (Column("high", rank=11), lambda row: percent_or_dash(row.item.high)),
    (Column("blocked", rank=5), lambda row: percent_or_dash(row.item.blocked)),
    (Column("trapped", rank=8), lambda row: percent_or_dash(row.item.trapped)),
    (Column("E|f'|/peak", rank=4), lambda row: number_or_dash(row.item.relative_derivative, "{:.3f}")),
    (Column("stuck", rank=6), lambda row: percent_or_dash(row.item.stuck)),
    (Column("attenuation", rank=7), lambda row: number_or_dash(row.item.attenuation)),
    (Column("rms dL/dz", rank=9), lambda row: number_or_dash(row.item.grad_z_rms, "{:.2e}")),
    (Column("trend", left=True, rank=3), lambda row: row.trend),
)
_ATTENTION_CELLS: Cells[Record] = (
    (Column("softmax", left=True, name=True), lambda row: row.item.site + (" (output)" if row.item.output else "")),
    (Column("health", left=True), lambda row: row.health),
    (Column("heads", rank=3), lambda row: str(len(row.item.heads or ()))),
    (Column("entropy", rank=7), lambda row: number_or_dash(row.item.entropy)),
    (Column("lowest head", rank=1), lambda row: number_or_dash(row.item.entropy_min)),
    (Column("blocked", rank=4), lambda row: percent_or_dash(row.item.blocked)),
    (Column("Jacobian", rank=8), lambda row: number_or_dash(row.item.jacobian)),
    (Column("logit std", rank=5), lambda row: number_or_dash(row.item.logit_std)),
    (Column("largest logit", rank=6), lambda row: number_or_dash(row.item.z_max)),
    (Column("trend", left=True, rank=2), lambda row: row.trend),
)
_EXPERT_CELLS: Cells[Experts] = (
    (Column("router", left=True, name=True), lambda row: row.item.site),
    (Column("health", left=True), lambda row: row.health),
    (Column("experts", rank=2), lambda row: str(row.item.experts)),
    (Column("chosen", rank=5), lambda row: str(row.item.k)),
    (Column("dead", rank=1), lambda row: "-" if row.item.dead is None else str(row.item.dead)),
    (Column("busiest / even", rank=3), lambda row: f"{row.item.busiest:.2f}"),
    (Column("entropy", rank=4), lambda row: number_or_dash(row.item.entropy)),
    (Column("margin", rank=6), lambda row: number_or_dash(row.item.margin)),
)
_WEIGHT_CELLS: Cells[Weight] = (
    (Column("layer", left=True, name=True), lambda row: row.item.titled),
    (Column("health", left=True), lambda row: row.health),
    (Column("gain", rank=1), lambda row: number_or_dash(row.item.gain)),
    (Column("rms input", rank=3), lambda row: number_or_dash(row.item.input_rms)),
    (Column("centred", rank=6), lambda row: percent_or_dash(row.item.input_centred_share)),
    (Column("gradient norm", rank=5), lambda row: number_or_dash(row.item.grad_norm, "{:.2e}")),
    (Column("update ratio", rank=2), lambda row: number_or_dash(row.item.update_ratio, "{:.1e}")),
    (Column("feeds", left=True, name=True, rank=4), lambda row: ", ".join(row.item.feeds)),
)


def _sheet(title: str, noun: str, cells: Cells[Item], found: Sequence[_Shown[Item]], badness: Callable[[Item], float]) -> Sheet:
    """A table of sites or layers, the worst first. `badness`: the sort key of those of equal health, of which the largest is the worst."""
    ordered = sorted(found, key=lambda each: (*_severity(each.item, each.health), badness(each.item)), reverse=True)
    rows = [Row(tuple(cell(each) for _, cell in cells), _notable(each.item, each.health)) for each in ordered]
    return Sheet(title, tuple(column for column, _ in cells), rows, noun)


def _site_sheet(snapshots: Sequence[Snapshot], firing: set[str], bars: str, trend: int) -> Sheet:
    found = [_Shown(record, health_of(record, firing), sparkline(series, trend, bars)) for record, series in _latest(snapshots, False, "saturated")]
    return _sheet("Sites at the last step, worst first (trend: the saturated share over time)", "site", _SITE_CELLS, found, badness)


def _attention_sheet(snapshots: Sequence[Snapshot], firing: set[str], bars: str, trend: int) -> Sheet:
    found = [_Shown(record, health_of(record, firing), sparkline(series, trend, bars)) for record, series in _latest(snapshots, True, "entropy_min")]
    title = "Attention and softmax at the last step (trend: the entropy of the lowest head)"
    return _sheet(title, "softmax", _ATTENTION_CELLS, found, lambda record: -(1.0 if record.entropy_min is None else record.entropy_min))


def _expert_sheet(snapshot: Snapshot, firing: set[str]) -> Sheet:
    found = [_Shown(experts, health_of(experts, firing)) for experts in snapshot.experts]
    return _sheet("Mixtures of experts", "mixture", _EXPERT_CELLS, found, lambda experts: experts.busiest)


def _weight_sheet(snapshot: Snapshot, firing: set[str]) -> Sheet:
    found = [_Shown(weight, health_of(weight, firing)) for weight in snapshot.weights]
    return _sheet("Layers that feed them", "layer", _WEIGHT_CELLS, found, lambda weight: 0.0)


_LEDGER_COLUMNS = (
    Column("part", left=True, name=True),
    Column("is", left=True, rank=2),
    Column("factor"),
    Column("gradient left", rank=1),
    Column("branch / skip", rank=3),
    Column("rms input", rank=4),
    Column("largest input", rank=5),
)
_FAR = math.log(1.5)
"""A part whose factor is farther from 1 than this one, up or down, is worth a line in a large network."""


def _ledger_sheet(snapshots: Sequence[Snapshot]) -> Sheet:
    """The way of the gradient in the newest observation that has one, from the output to the input."""
    ledger = next((each.ledger for each in reversed(snapshots) if each.ledger is not None), None)
    if ledger is None or ledger.told is None:
        return Sheet("", _LEDGER_COLUMNS, [], "part")
    rows, left = [], 1.0
    for entry in ledger.entries:
        inside = "  " * entry.level
        left *= (entry.factor or 0.0) if entry.level == 0 else 1.0
        cells = (
            inside + entry.place,
            entry.kind.value,
            number_or_dash(entry.factor),
            number_or_dash(left, "{:.2e}") if entry.level == 0 else "-",
            percent_or_dash(entry.branch),
            number_or_dash(entry.input_rms),
            "-" if entry.input_top is None else f"{entry.input_top:.3g} (channel {entry.top_channel})",
        )
        rows.append(Row(cells, entry.level == 0 and (not entry.factor or abs(math.log(entry.factor)) > _FAR)))
    return Sheet(f"Where the gradient goes: {ledger.told}", _LEDGER_COLUMNS, rows, "part")


def _format_sheet(snapshot: Snapshot) -> Sheet:
    columns = (
        *(Column("format", left=True), Column("place", left=True, name=True), Column("tensor", left=True)),
        *(Column("flushed"), Column("clamped", rank=1), Column("subnormal", rank=2), Column("zero", rank=3)),
    )
    rows = []
    for use, notable in worst(snapshot.formats):
        shares = (
            f"~{percent_or_dash(use.lost)}" if use.in_use and use.lost is not None else percent_or_dash(use.flushed),
            percent_or_dash(use.clamped),
        )
        named = f"{use.format} (in use)" if use.in_use else use.format
        rows.append(Row((named, use.place, IN_WORDS[use.tensor], *shares, percent_or_dash(use.subnormal), percent_or_dash(use.zero)), notable))
    return Sheet("What number formats would do at the last step, worst first (~ is an estimate)", columns, rows, "tensor")
