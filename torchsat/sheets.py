"""The tables of the report, before they are printed as text (text.py) or as Markdown (markdown.py). Never torch.

A table says of each column how much it matters and of each row whether it is healthy. The printers decide by that what there is room for: a narrow
terminal shows fewer columns, and the healthy sites of a large network are one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from torchsat.alerts import Episode
from torchsat.percent import number_or_dash, percent_or_dash
from torchsat.record import Record, Snapshot, Weight
from torchsat.shown import level_in_words
from torchsat.tensorboard.reader import Run
from torchsat.verdict import Health, Verdict, verdict_on, worst_first

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = " .:-=+*#"
"""For an output whose encoding lacks block characters."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        title: what stands above it.
        rank: 0 if it is always shown; of the others the one of the lowest rank is shown first where there is not room for all.
        left: it is aligned to the left.
        name: its cells are names, which may be folded into several lines.
    """

    title: str
    rank: int = 0
    left: bool = False
    name: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    cells: tuple[str, ...]
    notable: bool = True
    """Whether it is shown where there is not room for all rows."""


@dataclass(frozen=True)
class Sheet:
    """A table before it is printed."""

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Row]
    noun: str = "row"
    """What a row is, in the singular."""


def bars_for(out: IO[str]) -> str:
    """The characters of a sparkline that this output can show, the lowest first."""
    try:
        _BARS.encode(getattr(out, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return _PLAIN_BARS
    return _BARS


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
    )
    rows = []
    for name in worst_first(verdicts):
        verdict, last = verdicts[name], by_name[name].snapshots[-1]
        alert = verdict.alert
        cause = alert.causes[0].name if alert is not None and alert.causes else "-"
        since = str(alert.since) if alert is not None else "-"
        counts = (str(last.step), str(len(by_name[name].snapshots)))
        rows.append(Row((name, verdict.health.value, *counts, since, verdict.where or "-", verdict.what or "-", cause)))
    return Sheet("Runs, worst first", columns, rows, "run")


def sheets(run: Run, found: Sequence[Episode], bars: str = _BARS, trend: int = 24) -> list[Sheet]:
    """The tables of a run that have rows.

    Args:
        found: the alerts of the run.
        trend: the most characters of a sparkline.
    """
    firing = {place for each in found if each.cleared is None for place in (each.alert.site, *each.alert.also)}
    made = [_site_sheet(run.snapshots, firing, bars, trend), _attention_sheet(run.snapshots, firing, bars, trend)]
    return [sheet for sheet in (*made, _weight_sheet(run.snapshots[-1], firing)) if sheet.rows]


def health_of(item: Record | Weight, firing: Iterable[str] = ()) -> str:
    """How a site or a layer is in one observation, in a word; a dash where no rule judges it.

    Args:
        firing: the places of the alerts that fire. One that is healthy now and is among them is recovering: its alert waits before it clears.
    """
    broken = item.nonfinite or item.grad_nonfinite if isinstance(item, Record) else not math.isfinite(item.norm or 0.0)
    word = level_in_words(item.alert_level, broken)
    if word in (Health.NOT_FINITE.value, Health.CRITICAL.value, Health.WARNING.value):
        return word
    if item.alert_level is None:
        return "-"
    place = item.site if isinstance(item, Record) else item.name
    return "recovering" if place in firing else Health.HEALTHY.value


def _notable(health: str, record: Record | None = None) -> bool:
    """Whether a row is worth a line in a large network. Where no rule judges a site, one that is far from normal is."""
    return health != Health.HEALTHY.value and (health != "-" or (record is not None and badness(record) >= 0.3))


def _severity(item: Record | Weight, health: str) -> tuple[bool, float]:
    """The sort key of rows, of which the largest is the worst: what is not finite, then by level."""
    return health == Health.NOT_FINITE.value, -1.0 if item.alert_level is None else item.alert_level


def badness(record: Record) -> float:
    """The sort key of sites of equal health: how much less open than normal the site is. Outputs and gates, which saturate by design, come last."""
    if record.output or record.gate:
        return -1.0
    closed = 0.0 if record.relative_derivative is None else 1 - record.relative_derivative
    normal = 0.0 if record.normal_derivative is None else 1 - record.normal_derivative
    return max(closed - normal, record.stuck or 0.0, 1.0 if record.nonfinite else 0.0)


def sparkline(values: Sequence[float | None], width: int = 24, bars: str = _BARS) -> str:
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


_SITE_COLUMNS = (
    Column("site", left=True, name=True),
    Column("activation", left=True, rank=2),
    Column("health", left=True),
    Column("saturated", rank=1),
    Column("low", rank=10),
    Column("high", rank=11),
    Column("blocked", rank=5),
    Column("trapped", rank=8),
    Column("E|f'|/peak", rank=4),
    Column("stuck", rank=6),
    Column("attenuation", rank=7),
    Column("rms dL/dz", rank=9),
    Column("trend", left=True, rank=3),
)


def _site_sheet(snapshots: Sequence[Snapshot], firing: set[str], bars: str, trend: int) -> Sheet:
    found = [(health_of(record, firing), record, series) for record, series in _latest(snapshots, False, "saturated")]
    found.sort(key=lambda each: (*_severity(each[1], each[0]), badness(each[1])), reverse=True)
    rows = [
        Row(
            (
                record.site,
                record.activation + (" (output)" if record.output else " (gate)" if record.gate else ""),
                health,
                *(percent_or_dash(value) for value in (record.saturated, record.low, record.high, record.blocked, record.trapped)),
                number_or_dash(record.relative_derivative, "{:.3f}"),
                percent_or_dash(record.stuck),
                number_or_dash(record.attenuation),
                number_or_dash(record.grad_z_rms, "{:.2e}"),
                sparkline(series, trend, bars),
            ),
            _notable(health, record),
        )
        for health, record, series in found
    ]
    return Sheet("Sites at the last step, worst first (trend: the saturated share over time)", _SITE_COLUMNS, rows, "site")


_ATTENTION_COLUMNS = (
    Column("softmax", left=True, name=True),
    Column("health", left=True),
    Column("heads", rank=3),
    Column("entropy", rank=7),
    Column("lowest head", rank=1),
    Column("blocked", rank=4),
    Column("Jacobian", rank=8),
    Column("logit std", rank=5),
    Column("largest logit", rank=6),
    Column("trend", left=True, rank=2),
)


def _attention_sheet(snapshots: Sequence[Snapshot], firing: set[str], bars: str, trend: int) -> Sheet:
    found = [(health_of(record, firing), record, series) for record, series in _latest(snapshots, True, "entropy_min")]
    found.sort(key=lambda each: (*_severity(each[1], each[0]), -(1.0 if each[1].entropy_min is None else each[1].entropy_min)), reverse=True)
    rows = [
        Row(
            (
                record.site + (" (output)" if record.output else ""),
                health,
                str(len(record.heads or ())),
                *(number_or_dash(value) for value in (record.entropy, record.entropy_min)),
                percent_or_dash(record.blocked),
                *(number_or_dash(value) for value in (record.jacobian, record.logit_std, record.z_max)),
                sparkline(series, trend, bars),
            ),
            _notable(health),
        )
        for health, record, series in found
    ]
    return Sheet("Attention and softmax at the last step (trend: the entropy of the lowest head)", _ATTENTION_COLUMNS, rows, "softmax")


_WEIGHT_COLUMNS = (
    Column("layer", left=True, name=True),
    Column("health", left=True),
    Column("gain", rank=1),
    Column("rms input", rank=3),
    Column("centred", rank=6),
    Column("gradient norm", rank=5),
    Column("update ratio", rank=2),
    Column("feeds", left=True, name=True, rank=4),
)


def _weight_sheet(snapshot: Snapshot, firing: set[str]) -> Sheet:
    found = [(health_of(weight, firing), weight) for weight in snapshot.weights]
    found.sort(key=lambda each: _severity(each[1], each[0]), reverse=True)
    rows = [
        Row(
            (
                weight.titled,
                health,
                number_or_dash(weight.gain),
                number_or_dash(weight.input_rms),
                percent_or_dash(weight.input_centred_share),
                number_or_dash(weight.grad_norm, "{:.2e}"),
                number_or_dash(weight.update_ratio, "{:.1e}"),
                ", ".join(weight.feeds),
            ),
            _notable(health),
        )
        for health, weight in found
    ]
    return Sheet("Layers that feed them", _WEIGHT_COLUMNS, rows, "layer")
