"""A run directory as text: `torchsat report RUN_DIR`. Never torch.

Everything comes out of the event files, so it works on another machine, during training, and after a crash.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import IO, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torchsat.record import Alert, Record, Snapshot
from torchsat.rules import percent
from torchsat.tensorboard import SUBRUN
from torchsat.tensorboard.reader import Run, read_runs

_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = " .:-=+*#"
"""For an encoding without block characters."""
_NO_TERMINAL_WIDTH = 200
_LEAST_WIDTH = 110
"""A narrower terminal wraps lines, which is better than numbers cut in half."""


def report(run_dir: str | os.PathLike[str], file: TextIO | None = None) -> None:
    """Print the report of every run at or below a directory. Raises FileNotFoundError where there is none."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False, width=None if file.isatty() else _NO_TERMINAL_WIDTH)
    console.width = max(console.width, _LEAST_WIDTH)
    for index, run in enumerate(read_runs(run_dir)):
        if index:
            console.print()
        _print_run(console, run)


def _print_run(console: Console, run: Run) -> None:
    first, last = run.snapshots[0], run.snapshots[-1]
    alerts = collect_alerts(run.snapshots)
    firing = sum(alert.firing for _, alert in alerts)
    console.print(
        f"[bold]{escape(run.directory.removesuffix(os.sep + SUBRUN))}[/]: {len(run.snapshots)} observations, steps {first.step} to {last.step}, "
        f"{len(last.records)} sites, {len(alerts)} alerts ({firing} firing at the end)"
    )
    for sentence in run.damage:
        console.print(f"[yellow]damaged:[/] {escape(sentence)}")
    for sentence in run.notes:
        console.print(f"[yellow]note:[/] {escape(sentence)}")
    console.print()
    if alerts:
        console.print(_alert_table(alerts, last.step))
    else:
        console.print("no alerts")
    console.print()
    console.print(_site_table(run.snapshots, _PLAIN_BARS if _lacks_bars(console.file) else _BARS))
    if last.weights:
        console.print()
        console.print(_weight_table(last))


def collect_alerts(snapshots: Sequence[Snapshot]) -> list[tuple[Alert, Alert]]:
    """Each alert of a run as (when it fired, what was last said of it), worst and earliest first."""
    open_alerts: dict[tuple[str, str], list[Alert]] = {}
    done: list[tuple[Alert, Alert]] = []
    for snapshot in snapshots:
        for alert in snapshot.alerts:
            key = alert.site, alert.rule
            if alert.firing:
                open_alerts.setdefault(key, []).append(alert)
            elif key in open_alerts:
                raised = open_alerts.pop(key)
                done.append((_worst(raised), alert))
    done += [(_worst(raised), raised[-1]) for raised in open_alerts.values()]
    return sorted(done, key=lambda pair: (not pair[1].firing, pair[0].severity != "critical", pair[0].since))


def _worst(raised: list[Alert]) -> Alert:
    return next((alert for alert in reversed(raised) if alert.severity == "critical"), raised[-1])


def _alert_table(alerts: list[tuple[Alert, Alert]], end: int) -> Table:
    table = Table("", "rule", "from step", "to step", "what", box=None, pad_edge=False, title="Alerts", title_justify="left", title_style="bold")
    for raised, last in alerts:
        style = "red" if raised.severity == "critical" else "yellow"
        until = f"{end}, still firing" if last.firing else str(last.step)
        table.add_row(Text(raised.severity, style), raised.rule, str(raised.since), until, Text(raised.message, overflow="fold"))
    return table


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


def _site_table(snapshots: Sequence[Snapshot], bars: str) -> Table:
    table = Table(box=None, pad_edge=False, title="Sites, worst first, at the last step", title_justify="left", title_style="bold")
    table.add_column("site", overflow="fold")
    table.add_column("activation")
    for name in ("saturated", "low", "high", "E|f'|/peak", "stuck units", "attenuation", "rms dL/dz"):
        table.add_column(name, justify="right")
    table.add_column("saturated over time")
    latest: dict[str, Record] = {}
    series: dict[str, list[float | None]] = {}
    for snapshot in snapshots:
        for record in snapshot.records:
            latest[record.site] = record
            series.setdefault(record.site, []).append(record.saturated)
    for record in sorted(latest.values(), key=badness, reverse=True):
        table.add_row(
            Text(record.site),
            Text(record.activation + (" (output)" if record.output else " (gate)" if record.gate else "")),
            *(_share(value) for value in (record.saturated, record.low, record.high)),
            _number(record.relative_derivative, "{:.3f}"),
            _share(record.stuck),
            _number(record.attenuation, "{:.3g}"),
            _number(record.grad_z_rms, "{:.2e}"),
            sparkline(series[record.site], bars=bars),
        )
    return table


def _weight_table(snapshot: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False, title="Layers that feed them", title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("feeds", overflow="fold")
    for name in ("gain", "rms input", "centred share", "gradient norm", "update ratio"):
        table.add_column(name, justify="right")
    for weight in snapshot.weights:
        table.add_row(
            Text(weight.name),
            Text(", ".join(weight.feeds)),
            _number(weight.gain, "{:.3g}"),
            _number(weight.input_rms, "{:.3g}"),
            _share(weight.input_centred_share),
            _number(weight.grad_norm, "{:.2e}"),
            _number(weight.update_ratio, "{:.1e}"),
        )
    return table


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
    options = parser.parse_args(arguments)
    try:
        report(options.run_dir)
    except FileNotFoundError as error:
        print(f"torchsat: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
