"""A run directory as text: `torchsat report RUN_DIR`. Never torch.

Everything comes out of the event files, so it works on another machine, during training, and after a crash.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import IO, Any, TextIO

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


def report(source: str | os.PathLike[str] | Snapshot, file: TextIO | None = None) -> None:
    """Print the report of every run at or below a directory, or of one snapshot. Raises FileNotFoundError where there is none."""
    console = _console(file or sys.stdout)
    if isinstance(source, Snapshot):
        _print_tables(console, [source], [(alert, alert) for alert in source.alerts])
        return
    for index, run in enumerate(read_runs(source)):
        if index:
            console.print()
        _print_run(console, run)


def _console(file: TextIO) -> Console:
    console = Console(file=file, highlight=False, width=None if file.isatty() else _NO_TERMINAL_WIDTH)
    console.width = max(console.width, _LEAST_WIDTH)
    return console


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
    _print_tables(console, run.snapshots, alerts)


def _print_tables(console: Console, snapshots: Sequence[Snapshot], alerts: list[tuple[Alert, Alert]]) -> None:
    last, bars = snapshots[-1], _PLAIN_BARS if _lacks_bars(console.file) else _BARS
    console.print(_alert_table(alerts, last.step) if alerts else "no alerts")
    tables = [_site_table(snapshots, bars), _attention_table(snapshots, bars)]
    for table in (*tables, _weight_table(last)):
        if table.row_count:
            console.print()
            console.print(table)


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
        table.add_row(Text(raised.severity, style), raised.rule, str(raised.since), until, Text("\n".join(_lines(raised)), overflow="fold"))
    return table


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
            if record.kind != "softmax":
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


def _attention_table(snapshots: Sequence[Snapshot], bars: str) -> Table:
    table = Table(box=None, pad_edge=False, title="Attention and softmax, at the last step", title_justify="left", title_style="bold")
    table.add_column("site", overflow="fold")
    for name in ("heads", "entropy", "lowest head", "Jacobian", "logit std", "largest logit"):
        table.add_column(name, justify="right")
    table.add_column("lowest entropy over time")
    latest: dict[str, Record] = {}
    series: dict[str, list[float | None]] = {}
    for snapshot in snapshots:
        for record in snapshot.records:
            if record.kind == "softmax":
                latest[record.site] = record
                series.setdefault(record.site, []).append(record.entropy_min)
    for record in sorted(latest.values(), key=lambda record: 1.0 if record.entropy_min is None else record.entropy_min):
        table.add_row(
            Text(record.site + (" (output)" if record.output else "")),
            str(len(record.heads or ())),
            *(_number(value, "{:.3g}") for value in (record.entropy, record.entropy_min, record.jacobian, record.logit_std, record.z_max)),
            sparkline(series[record.site], bars=bars),
        )
    return table


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
