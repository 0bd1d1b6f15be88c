"""What the HTML page says before its picture: the runs, the verdict, what to try, and how the runs compare. Never torch.

It is plain HTML, so that it is there without scripts, in a mail, in print, and for a screen reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape

from torchsat.alerts import episodes_of
from torchsat.percent import listed, percent
from torchsat.record import Alert
from torchsat.sheets import comparison, extent, verdicts_of
from torchsat.tables import Sheet
from torchsat.tensorboard.reader import Run
from torchsat.verdict import Health, summary, worst_first

MOST_NAMES = 6
"""So many runs are named in the title, and so many places behind an alert."""

STYLE = """
.report { --ink: #202124; --faint: #5f6368; --rule: #dadce0; --card: #f8f9fa; --healthy: #137333; --warning: #a85b00; --critical: #c5221f;
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; padding: 16px 16px 4px; max-width: 1100px; box-sizing: border-box; }
.dark .report { --ink: #e8eaed; --faint: #a9aeb4; --rule: #44474b; --card: #2a2b2f; --healthy: #81c995; --warning: #fdd663; --critical: #ff8a80; }
.report h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
.report h2 { font-size: 15px; margin: 16px 0 2px; }
.report p { margin: 2px 0 8px; overflow-wrap: anywhere; }
.report .extent { color: var(--faint); font-size: 13px; }
.report .state { border-left: 6px solid var(--state); padding: 6px 12px; background: var(--card); color: var(--ink); font-size: 17px;
  margin: 10px 0; }
.report .state b { color: var(--state); text-transform: uppercase; letter-spacing: .03em; }
.report .healthy { --state: var(--healthy); }
.report .not-judged, .report .in-doubt { --state: var(--faint); }
.report .warning { --state: var(--warning); }
.report .critical, .report .not-finite { --state: var(--critical); }
.report td.warning, .report td.critical, .report td.not-finite, .report td.not-judged, .report td.in-doubt,
.report td.healthy { color: var(--state); font-weight: 600; }
.report pre { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: 10px 12px; overflow: auto;
  max-height: 300px; font-size: 13px; }
.report.text pre { max-height: none; }
.report table { border-collapse: collapse; font-size: 14px; margin: 4px 0 10px; }
.report th { text-align: left; color: var(--faint); font-weight: normal; border-bottom: 1px solid var(--rule); }
.report td, .report th { padding: 3px 18px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
.report summary { cursor: pointer; }
#torchsat .torchsat { min-height: 0; }
#torchsat .card.verdict { display: none; }
@media print {
  .report, .torchsat { padding: 0 !important; max-width: none; }
  .report pre { white-space: pre-wrap; overflow: visible; max-height: none; }
  .report .state, .report pre, .report tr, .panel, .card { break-inside: avoid; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .report.text pre { break-inside: auto; font-size: 9px; border: 0; }
  .controls label, .controls details, .controls fieldset, .switches, .torchsat button:not(.link), .torchsat .aside, .tip { display: none !important; }
  .columns { display: block !important; }
  .detail { position: static !important; max-height: none !important; overflow: visible !important; margin-top: 14px; }
}
"""
"""The style of the head and of the text below the picture, and of the whole page in print."""


def title_of(runs: Sequence[Run]) -> str:
    """The title of the page."""
    names = [run.name for run in runs if run.name]
    if len(names) <= 1:
        return names[0] if names else "snapshot"
    return f"{len(names)} runs: {listed(names, MOST_NAMES)}"


def head(runs: Sequence[Run]) -> str:
    """The head of the page: title, date and verdict; of several runs a table; and of the worst run what is wrong, why, and what to try."""
    verdicts = verdicts_of(runs)
    worst = worst_first(verdicts)[0]
    verdict = verdicts[worst]
    sentence = str(verdict).partition(": ")[2] if len(runs) == 1 else summary(verdicts)
    state = f'<p class="state {_class(verdict.health)}"><b>{escape(verdict.health.value)}</b>: {escape(sentence)}</p>'
    if len(runs) > 1:
        state = f'<p class="state {_class(verdict.health)}">{escape(sentence)}</p>'
    parts = [f"<h1>{escape(title_of(runs))}</h1>", f'<p class="extent">{escape(_when(runs))}</p>', state]
    if len(runs) > 1:
        parts.append(_table(comparison(verdicts, runs)))
    if verdict.alert is not None:
        parts += _alert(verdict.alert, f"What is wrong with {worst}" if len(runs) > 1 else "What is wrong")
    return "\n".join(['<header class="report">', *parts, "</header>"])


def _class(health: Health) -> str:
    return health.value.replace(" ", "-")


def _when(runs: Sequence[Run]) -> str:
    """When the last observation was made, and of one run how far it has come."""
    last = datetime.fromtimestamp(max(run.snapshots[-1].time for run in runs), timezone.utc)
    when = f"Last observation: {last:%Y-%m-%d %H:%M} UTC"
    return f"{when}. {extent(runs[0], episodes_of(runs[0].snapshots))}" if len(runs) == 1 and runs[0].directory else when


def _alert(alert: Alert, title: str) -> list[str]:
    """An alert: what is wrong, which other places suffer, and the causes with their remedies and code."""
    parts = [f"<h2>{escape(title)}</h2>", f"<p>{escape(alert.message)}</p>"]
    if alert.also:
        parts.append(f"<p>Also: {escape(listed(alert.also, MOST_NAMES))}</p>")
    for cause in alert.causes:
        share = f" ({percent(cause.share)})" if len(alert.causes) > 1 else ""
        parts.append(f"<h2>Why: {escape(cause.name)}{share}</h2><p>{escape(cause.evidence)}</p>")
        parts.append(f"<p><b>Try:</b> {escape(cause.advice)}</p>" + (f"<pre>{escape(cause.code)}</pre>" if cause.code else ""))
    return parts


def _table(sheet: Sheet) -> str:
    """A table, in which a state of health has its colour."""
    states: Mapping[str, str] = {health.value: _class(health) for health in Health}
    titles = "".join(f'<th scope="col">{escape(column.title)}</th>' for column in sheet.columns)
    rows = ["".join(f'<td class="{states.get(cell, "")}">{escape(cell)}</td>' for cell in row.cells) for row in sheet.rows]
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>".replace(' class=""', "")
