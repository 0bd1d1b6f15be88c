"""The lines of the log: an alert when it is told, and the verdict when a run ends; standard library only.

A person at a terminal reads an alert as three lines: what is wrong, why, and what to try. A log file, a service that collects logs and `grep` want
one line per event. The message of a log record is the same for all handlers, so it has three lines only where every handler that will write it leads
to a terminal or into a notebook, and colours only where all of these show them. The code of a remedy stands in neither: `torchsat report` and
`alert.causes[0].code` have it.

A run that ends with an alert gets one more line, a warning, since what was told at step 200 has scrolled away at step 20,000. A run that ends healthy
gets its line at the level INFO, which is not shown by default: a script that trains hundreds of small models stays silent as long as they are well.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from enum import Enum
from typing import Any

from torchsat.alerts import sentences
from torchsat.record import Alert
from torchsat.terminal import Style, is_terminal, painted, shows_colours, width_of, wrapped
from torchsat.verdict import Verdict

_INDENT = "    "
_WIDE = 10_000
"""The width of what breaks lines by itself, in characters."""
_COLOUR = {"critical": Style.RED, "warning": Style.YELLOW}


class Form(Enum):
    """How an alert is written."""

    LINE = "one line"
    PARAGRAPH = "three lines"
    COLOURED = "three lines in colours"


def tell(logger: logging.Logger, alert: Alert) -> None:
    """Log an alert."""
    level = logging.INFO if not alert.firing else logging.ERROR if alert.severity == "critical" else logging.WARNING
    if logger.isEnabledFor(level):
        form, width = form_for(logger, level)
        logger.log(level, "%s", alert_line(alert, form, width))


def tell_end(logger: logging.Logger, verdict: Verdict, directory: str | None) -> None:
    """Log the verdict on a run that ends.

    Args:
        directory: where it was written; None where nothing was written.
    """
    level, line = end_line(verdict, directory)
    form, width = form_for(logger, level)
    if form is not Form.LINE:
        line = "\n".join(wrapped(line, width, rest=_INDENT, most=width))
    logger.log(level, "%s", line)


def directory_of(log_dir: Any, writer: Any) -> str | None:
    """The directory that was given to `watch`, or that of the writer that was given; None where there is none."""
    directory = log_dir if writer is None else getattr(writer, "log_dir", None)
    return os.fsdecode(directory) if isinstance(directory, (str, os.PathLike)) else None


def form_for(logger: logging.Logger, level: int) -> tuple[Form, int]:
    """The form that suits all handlers which write a line of this level, and the width in characters of the narrowest of their terminals."""
    streams = _streams(logger, level)
    if not streams or not all(is_terminal(stream) or _is_notebook(stream) for stream in streams):
        return Form.LINE, _WIDE
    # A browser breaks lines by itself.
    width = min((width_of(stream) for stream in streams if not _is_notebook(stream)), default=_WIDE)
    return Form.COLOURED if all(map(shows_colours, streams)) else Form.PARAGRAPH, width


def _streams(logger: logging.Logger, level: int) -> list[Any]:
    """The streams of the handlers that write a line of this level; None for a handler that has no stream. Where there is no handler at all, Python
    writes to standard error (`logging.lastResort`)."""
    streams, has_handler, current = [], False, logger
    while True:
        has_handler = has_handler or bool(current.handlers)
        wanted = [each for each in current.handlers if level >= each.level and not isinstance(each, logging.NullHandler)]
        streams += [getattr(each, "stream", None) for each in wanted]
        if not current.propagate or current.parent is None:
            return streams if has_handler else [sys.stderr]
        current = current.parent


def _is_notebook(stream: Any) -> bool:
    """Whether this is the standard error of a Jupyter kernel. It is no terminal, and is read by a person all the same."""
    return type(stream).__module__.partition(".")[0] == "ipykernel"


def alert_line(alert: Alert, form: Form, width: int) -> str:
    """The message of the log record of an alert. At a terminal of so many characters its lines are broken between words."""
    what, *more = sentences(alert)
    if not alert.firing:
        return f"torchsat: step {alert.step}: {what}"
    if form is Form.LINE:
        return ". ".join([f"torchsat: step {alert.step}: {alert.severity}: {what}", *more])
    first = wrapped(f"torchsat: step {alert.step}: {alert.severity}: {what}", width, rest=_INDENT, most=width)
    rest = [line for each in more for line in wrapped(each, width, _INDENT, f"{_INDENT}     ", most=width)]
    if form is Form.COLOURED:
        first[0] = first[0].replace(alert.severity, painted(alert.severity, Style.BOLD, _COLOUR[alert.severity]), 1)
        place = next((each for each in (alert.worst, alert.site) if each and any(f" {each} " in line for line in first)), None)
        first = [line.replace(f" {place} ", f" {painted(place, Style.BOLD)} ", 1) if place else line for line in first]
        rest = [re.sub(f"^{_INDENT}(Why:|Try:)", lambda found: _INDENT + painted(found[1], Style.BOLD), line) for line in rest]
    return "\n".join([*first, *rest])


def end_line(verdict: Verdict, directory: str | None) -> tuple[int, str]:
    """The level and the message of the last line of a run.

    Args:
        directory: what was given to `watch`; None where nothing is written.
    """
    if not verdict.health.is_sick:
        return logging.INFO, f"torchsat: the run ends {verdict}"
    more = "monitor.alerts" if directory is None else f"torchsat report {shlex.quote(directory)}"
    return logging.WARNING, f"torchsat: the run ends {verdict}. More: {more}"
