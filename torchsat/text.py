"""The report as text, for a terminal, a log or a mail. Never torch.

It begins with the verdict: what is wrong, where, since when, why, and what to try. The tables follow. Nothing is cut: where a line is too narrow, the
columns that matter least are left out and names are folded where their parts meet. The healthy sites of a large network are one line.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from torchsat.alerts import ADJECTIVE, Episode, episodes_of
from torchsat.forecast import forecasts
from torchsat.percent import listed, percent
from torchsat.record import Alert
from torchsat.sheets import comparison, extent, sheets, verdicts_of
from torchsat.tables import STYLES, Page, page_for, table
from torchsat.tensorboard.reader import Run
from torchsat.terminal import Style, wrapped
from torchsat.verdict import Health, Verdict, summary, worst_first

MOST_NAMES = 6
"""So many places are named behind an alert."""
MOST_CODE = 16
"""So many lines of code are printed of one remedy."""
MOST_OVER = 5
"""So many alerts that are over are printed."""
_IS = {
    Health.HEALTHY: "is healthy",
    Health.NOT_JUDGED: "is not judged",
    Health.IN_DOUBT: "is in doubt",
    Health.WARNING: "has a warning",
    Health.CRITICAL: "is critical",
    Health.NOT_FINITE: "is not finite",
}


def print_text(out: TextIO, runs: Sequence[Run], source: str = "", everything: bool = False) -> None:
    """Print the report of one run; or a table of several runs, the details of the worst one, and how to print those of the others.

    Args:
        source: the directory that the runs were read from, for the command.
        everything: print the details of all runs, and all rows of every table.
    """
    page = page_for(out, everything)
    verdicts = verdicts_of(runs)
    by_name = {run.name: run for run in runs}
    lines: list[str] = []
    if len(runs) > 1:
        lines += _several(page, verdicts, runs)
    order = worst_first(verdicts)
    shown = order if everything or len(runs) == 1 else [name for name in order[:1] if verdicts[name].health.is_sick]
    for name in shown:
        lines += ["", ""] if lines else []
        lines += _details(page, by_name[name], verdicts[name])
    if len(shown) < len(order):
        other = next(name for name in order if name not in shown)
        lines += ["", f"{'Any other run' if shown else 'One of them'}:  {_command(source, other)}", f"All of them:    {_command(source)} --all"]
    out.write("\n".join(line.rstrip() for line in lines) + "\n")


def _command(*path: str) -> str:
    """The command that prints the report of this directory."""
    return f"torchsat report {shlex.quote(str(Path(*path)))}"


def _several(page: Page, verdicts: dict[str, Verdict], runs: Sequence[Run]) -> list[str]:
    """Several runs side by side."""
    text = wrapped(summary(verdicts), page.width)
    worst = verdicts[worst_first(verdicts)[0]].health
    return [*(page.styled(line, Style.BOLD, *STYLES[worst.value]) for line in text), "", *table(page, comparison(verdicts, runs), whole=True)]


def _details(page: Page, run: Run, verdict: Verdict) -> list[str]:
    """Everything about one run."""
    found = episodes_of(run.snapshots)
    lines = _head(page, run, verdict, found)
    for word, sentences in (("Damaged", run.damage), ("Note", run.notes)):
        for sentence in sentences:
            first, *rest = wrapped(sentence, page.width, f"{word}: ", "  ")
            lines += ["", page.styled(first, Style.YELLOW), *rest]
    lines += _other_alerts(page, [each for each in found if each.alert is not verdict.alert])
    for sheet in sheets(run, found, page.bars, 24 if page.width >= 100 else 10):
        lines += ["", *table(page, sheet)]
    told = forecasts(run.snapshots[-1].formats)
    return [*lines, *([""] if told else []), *(line for sentence in told for line in wrapped(sentence, page.width, "Forecast: ", "  "))]


def _head(page: Page, run: Run, verdict: Verdict, found: Sequence[Episode]) -> list[str]:
    """The verdict on a run: what is wrong, where, since when, why, and what to try."""
    about = f"{run.name} {_IS[verdict.health]}" if run.name else verdict.health.value.capitalize()
    told = f"{about}: {verdict.calm}" if verdict.alert is None else f"{about}: {_subject(verdict)}, since step {verdict.alert.since}"
    lines = [page.styled(line, Style.BOLD, *STYLES[verdict.health.value]) for line in wrapped(told, page.width)]
    if run.directory:
        lines += [page.styled(line, Style.FAINT) for line in wrapped(extent(run, found), page.width)]
    if verdict.alert is not None:
        lines += ["", *_alert(page, verdict.alert)]
    return lines


def _subject(verdict: Verdict) -> str:
    """The places that suffer and what they are, as in `hidden1 and 3 more places are saturated`. A rule of the user's is named."""
    assert verdict.alert is not None
    if verdict.alert.rule not in ADJECTIVE:
        return f"{verdict.where}: {verdict.what}"
    return f"{verdict.where} {'are' if verdict.alert.also else 'is'} {verdict.what}"


def _alert(page: Page, alert: Alert) -> list[str]:
    """One alert: what is wrong, which other places suffer, and the causes with their remedies."""

    def labelled(label: str, text: str) -> list[str]:
        first, *rest = wrapped(text, page.width, f"{label:6}", " " * 6)
        return [page.styled(first[:6], Style.BOLD) + first[6:], *rest]

    lines = labelled("What:", alert.message)
    if alert.also:
        lines += labelled("Also:", listed(alert.also, len(alert.also) if page.everything else MOST_NAMES))
    for cause in alert.causes:
        share = f" ({percent(cause.share)})" if len(alert.causes) > 1 else ""
        lines += ["", *labelled("Why:", f"{cause.name}{share}: {cause.evidence}"), *labelled("Try:", cause.advice)]
        code = cause.code.splitlines()
        most = len(code) if page.everything or len(code) <= MOST_CODE + 1 else MOST_CODE
        lines += ["", *(f"      {line}" for line in code[:most])] if code else []
        lines += [f"      ... {len(code) - most} more lines of code; --all prints them"] if most < len(code) else []
    return lines


def _other_alerts(page: Page, found: Sequence[Episode]) -> list[str]:
    """The alerts that the verdict is not about."""
    lines: list[str] = []
    firing, over = [each for each in found if each.cleared is None], [each for each in found if each.cleared is not None]
    if firing:
        lines += ["", page.styled("Other alerts that fire", Style.BOLD)]
    for each in firing:
        title = f"{each.alert.severity}: {each.alert.site}, {each.alert.rule}, since step {each.alert.since}"
        lines += ["", *(page.styled(line, *STYLES[each.alert.severity]) for line in wrapped(title, page.width)), *_alert(page, each.alert)]
    if over:
        lines += ["", page.styled("Alerts that are over", Style.BOLD)]
    shown = over if page.everything else over[:MOST_OVER]
    for each in shown:
        ended = f"{each.cleared}{', where its place ends' if each.gone else ''}"
        lines += wrapped(f"steps {each.alert.since} to {ended}: {each.alert.severity}: {each.alert.message}", page.width, "", "  ")
        if page.everything:
            lines += ["", *_alert(page, each.alert), ""]
    if len(shown) < len(over):
        lines.append(f"and {len(over) - len(shown)} more that are over; --all shows them")
    return lines
