"""The report as Markdown, for an issue or a pull request. Never torch.

It has every column and every row of the tables, since a page of Markdown scrolls.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TextIO

from torchsat.alerts import Episode, episodes_of
from torchsat.cause import CODE_INDENT
from torchsat.forecast import forecasts
from torchsat.percent import listed, percent
from torchsat.record import Alert
from torchsat.sheets import comparison, extent, sheets, verdicts_of
from torchsat.tables import Column, Row, Sheet, bars_for
from torchsat.tensorboard.reader import Run
from torchsat.tensorboard.stock import code_in_cell, escaped
from torchsat.verdict import Verdict, summary, worst_first


def print_markdown(out: TextIO, runs: Sequence[Run]) -> None:
    """Print the report of each run, the worst first; before them, of several, how they compare."""
    verdicts = verdicts_of(runs)
    by_name = {run.name: run for run in runs}
    parts: list[str] = []
    if len(runs) > 1:
        parts += [f"**{_escaped(summary(verdicts))}**", _markdown(comparison(verdicts, runs))]
    for name in worst_first(verdicts):
        parts += _details(by_name[name], verdicts[name], out)
    out.write("\n\n".join(parts) + "\n")


def _details(run: Run, verdict: Verdict, out: TextIO) -> list[str]:
    """One run: its verdict, its extent, its alerts and its tables."""
    found, end = episodes_of(run.snapshots), run.snapshots[-1].step
    parts = [f"## {_escaped(run.name)}: {_escaped(str(verdict))}" if run.name else f"## {_escaped(str(verdict)[:1].upper() + str(verdict)[1:])}"]
    if run.directory:
        parts.append(extent(run, found))
    asides = [(word, sentence) for word, sentences in (("damaged", run.damage), ("note", run.notes)) for sentence in sentences]
    parts += [f"**{word}:** {_escaped(sentence)}" for word, sentence in asides]
    told = "\n".join(f"- {_escaped(sentence)}" for sentence in forecasts(run.snapshots[-1].formats))
    return [*parts, _markdown(_alert_sheet(found, end)), *map(_markdown, sheets(run, found, bars_for(out))), *([told] if told else [])]


def _markdown(sheet: Sheet) -> str:
    """A heading and a table in Markdown."""
    if not sheet.rows:
        return f"### {sheet.title}\n\nnone"
    rules = [":--" if column.left else "--:" for column in sheet.columns]
    titles = [_escaped(column.title) for column in sheet.columns]
    rows = [[_escaped(cell) for cell in row.cells] for row in sheet.rows]
    return "\n".join([f"### {sheet.title}", "", *(f"| {' | '.join(row)} |" for row in (titles, rules, *rows))])


def _escaped(text: str) -> str:
    """The text with every character escaped that Markdown would take for markup, and with code that stands on lines of its own kept as it is."""
    found = []
    for is_code, lines in itertools.groupby(text.split("\n"), lambda line: line.startswith(CODE_INDENT)):
        if is_code:
            found.append(code_in_cell("\n".join(line.removeprefix(CODE_INDENT) for line in lines)))
        else:
            found.append(escaped(" ".join(lines)))
    return "".join(found)


def _alert_sheet(found: list[Episode], end: int) -> Sheet:
    """The alerts, a row for each."""
    columns = tuple(Column(title, left=True) for title in ("severity", "rule", "from step", "to step", "what"))
    rows = [(each.alert.severity, each.alert.rule, str(each.alert.since), _until(each, end), _in_a_cell(each.alert)) for each in found]
    return Sheet("Alerts", columns, [Row(row) for row in rows])


def _until(episode: Episode, end: int) -> str:
    """When an alert ended. `end`: the last step of the run."""
    return f"{end}, still firing" if episode.cleared is None else f"{episode.cleared}{', then its place is gone' if episode.gone else ''}"


def _in_a_cell(alert: Alert) -> str:
    """The lines of an alert as sentences in a row, with code on lines of its own."""
    text = ". ".join(line.strip() for line in _lines(alert))
    return "\n".join(re.sub(r"^( {4}.*)\. (Why: )", r"\1\n\2", line) for line in text.split("\n"))


def _lines(alert: Alert) -> list[str]:
    """An alert in a few lines: what is wrong, which other places suffer, the causes with their remedies."""
    lines = [alert.message]
    if alert.also:
        lines.append(f"Also: {listed(alert.also, 6)}")
    for cause in alert.causes:
        lines += [f"Why: {cause.name} ({percent(cause.share)}): {cause.evidence}", f"     Try: {cause.remedy}"]
    return lines
