"""What is printed for people outside TensorBoard: `torchsat report RUN_DIR` in four formats. Never torch.

Everything comes from the event files. The report therefore works on another machine, while a run is training, and after a crash. Text and Markdown
are made in sheets.py, the HTML page in page.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from torchsat.page import page
from torchsat.record import Snapshot
from torchsat.sheets import name_of, print_markdown, print_text
from torchsat.tensorboard.reader import Run, read_runs
from torchsat.view import from_snapshots, plain

Format = Literal["text", "markdown", "json", "html"]
FORMATS: tuple[Format, ...] = ("text", "markdown", "json", "html")


def report(source: str | os.PathLike[str] | Snapshot, file: TextIO | None = None, format: Format = "text") -> None:  # noqa: A002
    """Print the report of every run in a directory or below it, or of one snapshot.

    Args:
        source: the directory given to `watch`, one above it, or a snapshot.
        file: where to print; standard output by default.
        format: `html` is one page with the view of the Saturation tab.

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
            (print_markdown if format == "markdown" else print_text)(out, run)


def _as_json(run: Run) -> dict[str, Any]:
    """The last observation of a run, its alerts, and every metric of every site over time."""
    last, series = run.snapshots[-1], from_snapshots(name_of(run), run.snapshots)
    bare = replace(last, records=tuple(replace(record, histogram=None) for record in last.records), alerts=())
    found: dict[str, Any] = plain(
        {
            "run": name_of(run),
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `torchsat`: the status with which it exits."""
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
        # Whoever read our output has closed it, as `head` does. Python would print an error when it flushes the rest on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"torchsat: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
