"""What is printed for people outside TensorBoard: the report of a run in four formats. Never torch.

Everything comes from the event files. The report therefore works on another machine, while a run is training, and after a crash. Text is made in
text.py, Markdown in markdown.py, JSON in document.py, the HTML page in page.py; the command is in command.py.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Literal, TextIO

from torchsat.document import document
from torchsat.markdown import print_markdown
from torchsat.page import page
from torchsat.record import Snapshot
from torchsat.tensorboard.reader import Run, read_runs
from torchsat.text import print_text

Format = Literal["text", "markdown", "json", "html"]
FORMATS: tuple[Format, ...] = ("text", "markdown", "json", "html")


def report(
    source: str | os.PathLike[str] | Snapshot,
    file: TextIO | None = None,
    format: Format = "text",  # noqa: A002
    *,
    everything: bool = False,
) -> None:
    """Print the report of every run in a directory or below it, or of one snapshot.

    Args:
        source: the directory given to `watch`, one above it, or a snapshot.
        file: where to print; standard output by default.
        format: `html` is one page with the view of the Saturation tab.
        everything: of `text`, print all sites and the details of all runs. By default the healthy sites of a large network are summed up, and of
            several runs the details of the worst one are printed.

    Raises:
        FileNotFoundError: there is no torchsat data.
        ValueError: there is no such format.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed are {', '.join(FORMATS)}")
    if isinstance(source, Snapshot):
        print_runs([Run("", [source])], file or sys.stdout, format, everything=everything)
    else:
        print_runs(read_runs(source), file or sys.stdout, format, os.fspath(source), everything)


def print_runs(runs: list[Run], out: TextIO, format: Format, source: str = "", everything: bool = False) -> None:  # noqa: A002
    """Print the report of these runs. `source`: the directory that they were read from."""
    if format == "html":
        out.write(page(runs))
    elif format == "json":
        json.dump(document(runs), out, indent=1, allow_nan=False)
        out.write("\n")
    elif format == "markdown":
        print_markdown(out, runs)
    else:
        print_text(out, runs, source, everything)
