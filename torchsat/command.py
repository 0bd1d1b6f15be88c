"""The command `torchsat`: its arguments, and the status with which it exits. Never torch.

0   done
1   there is no data, or a file cannot be read or written
2   the arguments are wrong
3   `--fail-on` was given, and a run is as sick as it says or worse
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import torchsat
from torchsat.report import FORMATS, print_runs
from torchsat.sheets import verdicts_of
from torchsat.tensorboard.reader import Run, read_runs
from torchsat.verdict import Health


class Status(IntEnum):
    """The status with which the command exits."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    SICK = 3


_EXIT = """exit status: 0 done; 1 no data, or a file cannot be read or written; 2 wrong arguments;
3 with --fail-on: a run has an alert of that severity or a worse one at its last observation
(inf and nan count as critical)"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("torchsat", description="Which layers of a network are saturated, since when, why, and what to try.")
    parser.add_argument("--version", action="version", version=f"torchsat {torchsat.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    command = commands.add_parser(
        "report",
        help="print the verdict on a run or on several, from their event files",
        description="Print the verdict on a run, with its alerts, sites and layers; of several runs, how they compare.",
        epilog=_EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run_dir", help="the directory given to torchsat.watch, or one above several of them")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--format", choices=FORMATS, default="text", help="text is as wide as the terminal or COLUMNS, 80 in a pipe; html is one page")
    form.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    command.add_argument("--all", action="store_true", help="print all sites and the details of all runs")
    command.add_argument("--fail-on", choices=("warning", "critical"), help="exit with 3 if a run has such an alert at its last observation")
    command.add_argument("-o", "--output", metavar="FILE", help="write there instead of to the terminal")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `torchsat`: the status with which it exits."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return Status.USAGE
    try:
        runs = read_runs(options.run_dir)
        if options.output is None:
            print_runs(runs, sys.stdout, options.format, options.run_dir, options.all)
            sys.stdout.flush()
        else:
            text = io.StringIO()
            print_runs(runs, text, options.format, options.run_dir, options.all)
            Path(options.output).write_text(text.getvalue(), encoding="utf-8")
    except BrokenPipeError:
        # Whoever read our output has closed it, as `head` does. Python would print an error when it flushes the rest on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"torchsat: {error}", file=sys.stderr)
        return Status.ERROR
    sick = [] if options.fail_on is None else _sick(runs, options.fail_on)
    for sentence in sick:
        print(f"torchsat: {sentence}", file=sys.stderr)
    return Status.SICK if sick else Status.DONE


def _sick(runs: Sequence[Run], limit: str) -> list[str]:
    """A sentence for each run that is as sick as this severity or worse."""
    return [f"{name}: {verdict}" for name, verdict in verdicts_of(runs).items() if verdict.health.rank >= Health(limit).rank]
