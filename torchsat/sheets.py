"""The tables of the report, and how they are printed as text and as Markdown. Never torch.

Both forms are printed from the same `Sheet`s, so that their cells agree. Only the alerts differ: text has several lines per alert, Markdown one row.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchsat.alerts import Episode, episodes_of
from torchsat.percent import percent
from torchsat.record import CODE_INDENT, Alert, Record, Snapshot
from torchsat.tensorboard import SUBRUN
from torchsat.tensorboard.reader import Run
from torchsat.tensorboard.stock import code_in_cell

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = " .:-=+*#"
"""For an output whose encoding lacks block characters."""
_NO_TERMINAL_WIDTH = 200
"""The width of the text, in characters, if the output is no terminal."""
_LEAST_WIDTH = 110
"""A narrower terminal wraps the lines, which is better than numbers that are cut in half."""


@dataclass(frozen=True)
class Sheet:
    """A table before it is printed. Its cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1
    """This many first columns are aligned to the left, the others to the right."""
    trend: bool = False
    """The last column is a sparkline, aligned to the left too."""

    def to_left(self, column: int) -> bool:
        """Whether the column of this index is aligned to the left."""
        return column < self.left or (self.trend and column == len(self.columns) - 1)


def name_of(run: Run) -> str:
    """The name of a run: the directory that was given to `watch`."""
    return run.directory.removesuffix(os.sep + SUBRUN)


def print_text(out: TextIO, run: Run) -> None:
    """Print the report of one run as text, with colours if `out` is a terminal."""
    found, end = episodes_of(run.snapshots), run.snapshots[-1].step
    console = console_for(out)
    if run.directory:
        console.print(Text(name_of(run), "bold").append(f": {_summary(run, found)}", "not bold"))
    for word, sentence in _asides(run):
        console.print(Text(f"{word}:", "yellow").append(f" {sentence}", "default"))
    if run.directory:
        console.print()
    console.print(_alert_table(found, end) if found else "no alerts")
    for sheet in _sheets(run, out):
        console.print()
        console.print(_rich(sheet))


def print_markdown(out: TextIO, run: Run) -> None:
    """Print the report of one run as Markdown."""
    found, end = episodes_of(run.snapshots), run.snapshots[-1].step
    title = [f"## {_escaped(name_of(run))}: {_summary(run, found)}"] if run.directory else []
    parts = [*title, *(f"**{word}:** {_escaped(sentence)}" for word, sentence in _asides(run)), _markdown(_alert_sheet(found, end))]
    out.write("\n\n".join([*parts, *map(_markdown, _sheets(run, out))]) + "\n")


def console_for(file: TextIO) -> Console:
    """A console that writes into a file. It uses colours only on a terminal."""
    # In a notebook, rich would display the text in the cell instead of writing it to the file.
    console = Console(file=file, highlight=False, force_jupyter=False, width=None if file.isatty() else _NO_TERMINAL_WIDTH)
    console.width = max(console.width, _LEAST_WIDTH)
    return console


def _asides(run: Run) -> list[tuple[str, str]]:
    """What a reader should know of the files, as (kind, sentence)."""
    return [(word, sentence) for word, sentences in (("damaged", run.damage), ("note", run.notes)) for sentence in sentences]


def _summary(run: Run, found: list[Episode]) -> str:
    """The extent of a run, in one line."""
    first, last, firing = run.snapshots[0], run.snapshots[-1], sum(each.cleared is None for each in found)
    return (
        f"{len(run.snapshots)} observations, steps {first.step} to {last.step}, "
        f"{len(last.records)} sites, {len(found)} alert{'' if len(found) == 1 else 's'} ({firing} firing at the end)"
    )


def _sheets(run: Run, out: IO[str]) -> list[Sheet]:
    """The tables that have rows."""
    bars = _PLAIN_BARS if _lacks_bars(out) else _BARS
    sheets = [_site_sheet(run.snapshots, bars), _attention_sheet(run.snapshots, bars), _weight_sheet(run.snapshots[-1])]
    return [sheet for sheet in sheets if sheet.rows]


def _rich(sheet: Sheet) -> Table:
    """A table for the terminal. The names in the columns on the left are folded if there is no room, never cut."""
    table = Table(box=None, pad_edge=False, title=sheet.title, title_justify="left", title_style="bold")
    for index, column in enumerate(sheet.columns):
        table.add_column(column, justify="left" if sheet.to_left(index) else "right", overflow="fold" if index < sheet.left else "ellipsis")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return table


def _markdown(sheet: Sheet) -> str:
    """A heading and a table in Markdown."""
    if not sheet.rows:
        return f"### {sheet.title}\n\nnone"
    rules = [":--" if sheet.to_left(index) else "--:" for index in range(len(sheet.columns))]
    rows = [[_escaped(cell) for cell in row] for row in (sheet.columns, *sheet.rows)]
    return "\n".join([f"### {sheet.title}", "", *(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))])


def _escaped(text: str) -> str:
    """The text with every character escaped that Markdown would take for markup, and with code that stands on lines of its own kept as it is."""
    found = []
    for is_code, lines in itertools.groupby(text.split("\n"), lambda line: line.startswith(CODE_INDENT)):
        if is_code:
            found.append(code_in_cell("\n".join(line.removeprefix(CODE_INDENT) for line in lines)))
        else:
            found.append(re.sub(r"([\\|<>*_`\[\]])", r"\\\1", " ".join(lines)))
    return "".join(found)


def _alert_table(found: list[Episode], end: int) -> Table:
    """The alerts for the terminal."""
    table = Table("", "rule", "from step", "to step", "what", box=None, pad_edge=False, title="Alerts", title_justify="left", title_style="bold")
    for each in found:
        style = "red" if each.alert.severity == "critical" else "yellow"
        what = Text("\n".join(_lines(each.alert)), overflow="fold")
        table.add_row(Text(each.alert.severity, style), each.alert.rule, str(each.alert.since), _until(each, end), what)
    return table


def _alert_sheet(found: list[Episode], end: int) -> Sheet:
    """The alerts for Markdown."""
    rows = [(each.alert.severity, each.alert.rule, str(each.alert.since), _until(each, end), _in_a_cell(each.alert)) for each in found]
    return Sheet("Alerts", ("", "rule", "from step", "to step", "what"), rows, left=5)


def _in_a_cell(alert: Alert) -> str:
    """The lines of an alert as sentences in a row, with code on lines of its own."""
    text = ". ".join(line.strip() for line in _lines(alert))
    return "\n".join(re.sub(r"^( {4}.*)\. (why: )", r"\1\n\2", line) for line in text.split("\n"))


def _until(episode: Episode, end: int) -> str:
    """When an alert ended. `end`: the last step of the run."""
    return f"{end}, still firing" if episode.cleared is None else f"{episode.cleared}{', then its place is gone' if episode.gone else ''}"


def _lines(alert: Alert) -> list[str]:
    """An alert in a few lines: what is wrong, which other places suffer, the causes with their remedies."""
    lines = [alert.message]
    if alert.also:
        lines.append(f"also: {', '.join(alert.also[:6])}" + (f" and {len(alert.also) - 6} more" if len(alert.also) > 6 else ""))
    for cause in alert.causes:
        lines += [f"why: {cause.name} ({percent(cause.share)}): {cause.evidence}", f"     try: {cause.remedy}"]
    return lines


def badness(record: Record) -> float:
    """The sort key of sites: how much less open than normal the site is. Outputs and gates, which saturate by design, come last."""
    if record.output or record.gate:
        return -1.0
    closed = 0.0 if record.relative_derivative is None else 1 - record.relative_derivative
    normal = 0.0 if record.normal_derivative is None else 1 - record.normal_derivative
    return max(closed - normal, record.stuck or 0.0, 1.0 if record.nonfinite else 0.0)


def _lacks_bars(file: IO[str]) -> bool:
    try:
        _BARS.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return True
    return False


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


def _site_sheet(snapshots: Sequence[Snapshot], bars: str) -> Sheet:
    found = sorted(_latest(snapshots, False, "saturated"), key=lambda pair: badness(pair[0]), reverse=True)
    columns = ("saturated", "low", "high", "blocked", "trapped", "E|f'|/peak", "stuck units", "attenuation", "rms dL/dz", "saturated over time")
    rows = [
        (
            record.site,
            record.activation + (" (output)" if record.output else " (gate)" if record.gate else ""),
            *(percent_or_dash(value) for value in (record.saturated, record.low, record.high, record.blocked, record.trapped)),
            number_or_dash(record.relative_derivative, "{:.3f}"),
            percent_or_dash(record.stuck),
            number_or_dash(record.attenuation, "{:.3g}"),
            number_or_dash(record.grad_z_rms, "{:.2e}"),
            sparkline(series, bars=bars),
        )
        for record, series in found
    ]
    return Sheet("Sites, worst first, at the last step", ("site", "activation", *columns), rows, left=2, trend=True)


def _attention_sheet(snapshots: Sequence[Snapshot], bars: str) -> Sheet:
    found = sorted(_latest(snapshots, True, "entropy_min"), key=lambda pair: 1.0 if pair[0].entropy_min is None else pair[0].entropy_min)
    rows = [
        (
            record.site + (" (output)" if record.output else ""),
            str(len(record.heads or ())),
            *(number_or_dash(value, "{:.3g}") for value in (record.entropy, record.entropy_min, record.jacobian, record.logit_std, record.z_max)),
            sparkline(series, bars=bars),
        )
        for record, series in found
    ]
    columns = ("site", "heads", "entropy", "lowest head", "Jacobian", "logit std", "largest logit", "lowest entropy over time")
    return Sheet("Attention and softmax, at the last step", columns, rows, trend=True)


def _weight_sheet(snapshot: Snapshot) -> Sheet:
    rows = [
        (
            weight.name,
            ", ".join(weight.feeds),
            number_or_dash(weight.gain, "{:.3g}"),
            number_or_dash(weight.input_rms, "{:.3g}"),
            percent_or_dash(weight.input_centred_share),
            number_or_dash(weight.grad_norm, "{:.2e}"),
            number_or_dash(weight.update_ratio, "{:.1e}"),
        )
        for weight in snapshot.weights
    ]
    columns = ("layer", "feeds", "gain", "rms input", "centred share", "gradient norm", "update ratio")
    return Sheet("Layers that feed them", columns, rows, left=2)


def percent_or_dash(share: float | None) -> str:
    """A share as a percentage; a dash if it is not known."""
    return "-" if share is None else percent(share)


def number_or_dash(value: float | None, form: str) -> str:
    """A number in a format such as `{:.3g}`; a dash if it is not known."""
    return "-" if value is None else form.format(value)
