"""A run directory as text, Markdown, JSON or a page of its own: `torchsat report RUN_DIR`. Never torch.

Everything comes out of the event files, so it works on another machine, during training, and after a crash. Text and Markdown are printed from the
same tables; the page holds the view of the Saturation tab with all its numbers, and needs neither TensorBoard nor a server.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, TextIO
from urllib.parse import urlencode

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchsat.record import Alert, Record, Snapshot
from torchsat.rules import percent
from torchsat.tensorboard import SUBRUN
from torchsat.tensorboard.reader import Run, read_runs
from torchsat.view import Episode, Grid, episodes_of, from_snapshots, heads, histograms, plain, scales

Format = Literal["text", "markdown", "json", "html"]
FORMATS: tuple[Format, ...] = ("text", "markdown", "json", "html")
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = " .:-=+*#"
"""For an encoding without block characters."""
_NO_TERMINAL_WIDTH = 200
_LEAST_WIDTH = 110
"""A narrower terminal wraps lines, which is better than numbers cut in half."""


@dataclass(frozen=True)
class Sheet:
    """A table before it is printed: cells of text, the first `left` columns to be set to the left."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1
    trend: bool = False
    """The last column is a trend, set to the left too."""


def report(source: str | os.PathLike[str] | Snapshot, file: TextIO | None = None, format: Format = "text") -> None:  # noqa: A002
    """Print the report of every run at or below a directory, or of one snapshot.

    Raises:
        FileNotFoundError: there is no torchsat data.
        ValueError: there is no such format.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed are {', '.join(FORMATS)}")
    out = file or sys.stdout
    runs = [Run("", [source])] if isinstance(source, Snapshot) else read_runs(source)
    if format == "html":
        out.write(page(runs))
    elif format == "json":
        json.dump([_as_json(run) for run in runs], out, indent=1, allow_nan=False)
        out.write("\n")
    else:
        for index, run in enumerate(runs):
            if index:
                out.write("\n")
            _print_run(out, run, format == "markdown")


def _name(run: Run) -> str:
    return run.directory.removesuffix(os.sep + SUBRUN)


def _print_run(out: TextIO, run: Run, markdown: bool) -> None:
    found, bars = episodes_of(run.snapshots), _PLAIN_BARS if _lacks_bars(out) else _BARS
    sheets = [_site_sheet(run.snapshots, bars), _attention_sheet(run.snapshots, bars), _weight_sheet(run.snapshots[-1])]
    asides = [(word, sentence) for word, sentences in (("damaged", run.damage), ("note", run.notes)) for sentence in sentences]
    if markdown:
        title = [f"## {_escaped(_name(run))}: {_summary(run, found)}"] if run.directory else []
        parts = [*title, *(f"**{word}:** {_escaped(sentence)}" for word, sentence in asides), _markdown(_alert_sheet(found, run.snapshots[-1].step))]
        out.write("\n\n".join([*parts, *(_markdown(sheet) for sheet in sheets if sheet.rows)]) + "\n")
        return
    console = _console(out)
    if run.directory:
        console.print(Text(_name(run), "bold").append(f": {_summary(run, found)}", "not bold"))
    for word, sentence in asides:
        console.print(Text(f"{word}:", "yellow").append(f" {sentence}", "default"))
    if run.directory:
        console.print()
    console.print(_alert_table(found, run.snapshots[-1].step) if found else "no alerts")
    for sheet in sheets:
        if sheet.rows:
            console.print()
            console.print(_rich(sheet))


def _console(file: TextIO) -> Console:
    """Colours only on a terminal."""
    console = Console(file=file, highlight=False, width=None if file.isatty() else _NO_TERMINAL_WIDTH)
    console.width = max(console.width, _LEAST_WIDTH)
    return console


def _summary(run: Run, found: list[Episode]) -> str:
    first, last, firing = run.snapshots[0], run.snapshots[-1], sum(each.cleared is None for each in found)
    return (
        f"{len(run.snapshots)} observations, steps {first.step} to {last.step}, "
        f"{len(last.records)} sites, {len(found)} alert{'' if len(found) == 1 else 's'} ({firing} firing at the end)"
    )


def _rich(sheet: Sheet) -> Table:
    table = Table(box=None, pad_edge=False, title=sheet.title, title_justify="left", title_style="bold")
    for index, column in enumerate(sheet.columns):
        to_left = index < sheet.left or (sheet.trend and index == len(sheet.columns) - 1)
        table.add_column(column, justify="left" if to_left else "right", overflow="fold" if index < sheet.left else "ellipsis")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return table


def _markdown(sheet: Sheet) -> str:
    """A title and a table; what Markdown would take for markup is escaped."""
    if not sheet.rows:
        return f"### {sheet.title}\n\nnone"
    rules = [":--" if index < sheet.left or (sheet.trend and index == len(sheet.columns) - 1) else "--:" for index in range(len(sheet.columns))]
    rows = [[_escaped(cell) for cell in row] for row in (sheet.columns, *sheet.rows)]
    return "\n".join([f"### {sheet.title}", "", *(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))])


def _escaped(text: str) -> str:
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", text.replace("\n", " "))


def _alert_table(found: list[Episode], end: int) -> Table:
    table = Table("", "rule", "from step", "to step", "what", box=None, pad_edge=False, title="Alerts", title_justify="left", title_style="bold")
    for each in found:
        style = "red" if each.alert.severity == "critical" else "yellow"
        what = Text("\n".join(_lines(each.alert)), overflow="fold")
        table.add_row(Text(each.alert.severity, style), each.alert.rule, str(each.alert.since), _until(each, end), what)
    return table


def _alert_sheet(found: list[Episode], end: int) -> Sheet:
    rows = [(each.alert.severity, each.alert.rule, str(each.alert.since), _until(each, end), ". ".join(_lines(each.alert))) for each in found]
    return Sheet("Alerts", ("", "rule", "from step", "to step", "what"), rows, left=5)


def _until(episode: Episode, end: int) -> str:
    return f"{end}, still firing" if episode.cleared is None else f"{episode.cleared}{', then its place is gone' if episode.gone else ''}"


def _lines(alert: Alert) -> list[str]:
    """What, who else, why, and what to try: a few lines."""
    lines = [alert.message]
    if alert.also:
        lines.append(f"also: {', '.join(alert.also[:6])}" + (f" and {len(alert.also) - 6} more" if len(alert.also) > 6 else ""))
    for cause in alert.causes:
        lines += [f"why: {cause.name} ({percent(cause.share)}): {cause.evidence}", f"     try: {cause.remedy}"]
    return lines


def badness(record: Record) -> float:
    """For sorting: how far the derivative of this site is from open; outputs and gates last."""
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


def _latest(snapshots: Sequence[Snapshot], softmaxes: bool, trend: str) -> list[tuple[Record, list[float | None]]]:
    """Each site as it was last seen, with one of its numbers over time."""
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
    columns = ("saturated", "low", "high", "E|f'|/peak", "stuck units", "attenuation", "rms dL/dz", "saturated over time")
    rows = [
        (
            record.site,
            record.activation + (" (output)" if record.output else " (gate)" if record.gate else ""),
            *(_share(value) for value in (record.saturated, record.low, record.high)),
            _number(record.relative_derivative, "{:.3f}"),
            _share(record.stuck),
            _number(record.attenuation, "{:.3g}"),
            _number(record.grad_z_rms, "{:.2e}"),
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
            *(_number(value, "{:.3g}") for value in (record.entropy, record.entropy_min, record.jacobian, record.logit_std, record.z_max)),
            sparkline(series, bars=bars),
        )
        for record, series in found
    ]
    columns = ("site", "heads", "entropy", "lowest head", "Jacobian", "logit std", "largest logit", "lowest entropy over time")
    return Sheet("Attention and softmax, at the last step", columns, rows, trend=True)


def trials_table(trials: Any) -> str:
    """The `Trials` of try_remedies as text: loss and gradient at the end, and the worst hidden site."""
    table = Table(box=None, pad_edge=False)
    table.add_column("remedy")
    for name in ("loss", "saturated", "E|f'|/peak", "attenuation", "first layer's gradient"):
        table.add_column(name, justify="right")
    table.add_column("what was changed", overflow="fold")
    for trial in trials.trials:
        table.add_row(
            trial.remedy,
            _number(trial.loss if trial.tried else None, "{:.3g}"),
            _share(trial.worst("saturated")),
            _number(trial.worst("relative_derivative"), "{:.3g}"),
            _number(trial.worst("attenuation"), "{:.3g}"),
            _number(trial.first_gradient(), "{:.2e}"),
            Text(trial.change if trial.tried else f"not tried: {trial.change}"),
        )
    out = io.StringIO()
    console = _console(out)
    console.print(table)
    for note in trials.notes:
        console.print(note, markup=False)
    return out.getvalue().rstrip()


def _weight_sheet(snapshot: Snapshot) -> Sheet:
    rows = [
        (
            weight.name,
            ", ".join(weight.feeds),
            _number(weight.gain, "{:.3g}"),
            _number(weight.input_rms, "{:.3g}"),
            _share(weight.input_centred_share),
            _number(weight.grad_norm, "{:.2e}"),
            _number(weight.update_ratio, "{:.1e}"),
        )
        for weight in snapshot.weights
    ]
    columns = ("layer", "feeds", "gain", "rms input", "centred share", "gradient norm", "update ratio")
    return Sheet("Layers that feed them", columns, rows, left=2)


def _as_json(run: Run) -> dict[str, Any]:
    """The run as it ended, its alerts, and every metric of every site over time."""
    last, series = run.snapshots[-1], from_snapshots(_name(run), run.snapshots)
    bare = replace(last, records=tuple(replace(record, histogram=None) for record in last.records), alerts=())
    found: dict[str, Any] = plain(
        {
            "run": _name(run),
            "observations": len(run.snapshots),
            "damage": run.damage,
            "notes": run.notes,
            "alerts": series.describe()["alerts"],
            "last": asdict(bare),
            "steps": series.steps.tolist(),
            "over_time": {name: dict(zip(series.names, values.T.tolist(), strict=True)) for name, values in series.values.items()},
        }
    )
    return found


PAGE_CELLS = 200_000
"""Numbers per metric of a run in a page; beyond that, observations are left out evenly."""
PAGE_HISTOGRAMS = 100
"""Observations per histogram in a page."""
_STATIC = Path(__file__).parent / "tensorboard" / "static"
_MODULES = ("source.js", "charts.js", "heatmap.js", "app.js", "page.js")


def page(runs: Sequence[Run]) -> str:
    """The view of the Saturation tab as one page that holds its numbers and asks for nothing."""
    table: dict[str, Any] = {"scales": scales(), "runs": []}
    for run in runs:
        for path, query, answer in _answers(run):
            table[_key(path, query)] = (
                {"gzip": base64.b64encode(gzip.compress(answer.pack(), mtime=0)).decode()} if isinstance(answer, Grid) else answer
            )
        about = table[_key("run", {"run": _name(run)})]
        table["runs"].append({"name": _name(run), "time": about["time"], "sites": len(about["sites"])})
    plain_text = io.StringIO()
    for run in runs:
        _print_run(plain_text, run, False)
    return _PAGE.format(
        title=_html(", ".join(_name(run) for run in runs) or "snapshot"),
        style=(_STATIC / "style.css").read_text(encoding="utf-8"),
        text=_html(plain_text.getvalue()),
        data=json.dumps(table, allow_nan=False).replace("<", "\\u003c"),
        script="\n".join(_bundled(name) for name in _MODULES),
    )


def _key(path: str, query: dict[str, str]) -> str:
    """As the URLSearchParams of a browser write it."""
    return f"{path}?{urlencode(query, safe='*').replace('~', '%7E')}"


def _answers(run: Run) -> Iterator[tuple[str, dict[str, str], Any]]:
    """What the tab's server would answer, for every question there is."""
    name, series = _name(run), from_snapshots(_name(run), run.snapshots)
    most = max(2, PAGE_CELLS // max(1, len(series.names)))
    yield "run", {"run": name}, series.describe()
    for metric in series.values:
        yield "values", {"run": name, "metric": metric}, series.grid(metric).thin(most)
    for site in series.sites:
        query = {"run": name, "site": site["site"]}
        yield "site", query, series.site(site["site"]).thin(most)
        softmax = site["kind"] == "softmax"
        yield ("heads" if softmax else "histogram"), query, (heads if softmax else histograms)(site["site"], run.snapshots).thin(PAGE_HISTOGRAMS)


def _bundled(name: str) -> str:
    """A module as part of one script: names are the same in all of them, so that only the import and export words must go."""
    text = (_STATIC / name).read_text(encoding="utf-8")
    return re.sub(r"^export ", "", re.sub(r"^import .*;$", "", text, flags=re.MULTILINE), flags=re.MULTILINE)


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>torchsat: {title}</title>
<style>
{style}</style>
<noscript><pre>{text}</pre></noscript>
<script type="application/json" id="torchsat-data">{data}</script>
<script type="module">
{script}</script>
</html>
"""


def sparkline(values: Sequence[float | None], width: int = 24, bars: str = _BARS) -> str:
    """Shares in [0, 1] over time as bars, oldest first, at most `width` of them."""
    if len(values) > width:
        values = [values[round(at * (len(values) - 1) / (width - 1))] for at in range(width)]
    return "".join(" " if value is None else bars[min(len(bars) - 1, int(value * len(bars)))] for value in values)


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `torchsat`."""
    parser = argparse.ArgumentParser("torchsat", description="Which layers of a trained network are saturated, and since when.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("report", help="print sites, trends and alerts of a run from its event files")
    command.add_argument("run_dir", help="the directory given to torchsat.watch, or one above it")
    command.add_argument("--format", choices=FORMATS, default="text", help="html is one page with the view of TensorBoard's Saturation tab")
    command.add_argument("-o", "--output", metavar="FILE", help="write there instead of to the terminal")
    options = parser.parse_args(arguments)
    try:
        if options.output is None:
            report(options.run_dir, format=options.format)
        else:
            text = io.StringIO()
            report(options.run_dir, text, options.format)
            Path(options.output).write_text(text.getvalue(), encoding="utf-8")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"torchsat: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
