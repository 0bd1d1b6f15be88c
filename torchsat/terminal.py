"""How text is set on a terminal: how wide it is, whether it shows colours, and where lines may be broken; standard library only.

The reports and the lines of the log use it. rich is not used for them: it fits a table into a narrow terminal by breaking words and numbers, and
inside a notebook it displays the text instead of writing it into the file that it was given.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from enum import Enum
from typing import Any

NARROW = 80
"""The width, in characters, where the output is no terminal and COLUMNS is not set: that of most terminals, mails and logs of CI."""
_LEAST = 40
PROSE = 100
"""Sentences are not set wider than this, since long lines are hard to read."""


class Style(Enum):
    """The styles of terminals, as their escape codes."""

    BOLD = "1"
    FAINT = "2"
    RED = "31"
    YELLOW = "33"
    GREEN = "32"


def width_of(out: Any) -> int:
    """The width of an output in characters: the variable COLUMNS if it is set, else that of the terminal, else NARROW."""
    set_by_user = os.environ.get("COLUMNS", "")
    if set_by_user.isdecimal() and int(set_by_user):
        return max(_LEAST, int(set_by_user))
    if not is_terminal(out):
        return NARROW
    try:
        return max(_LEAST, os.get_terminal_size(out.fileno()).columns or NARROW)
    except (AttributeError, OSError, ValueError):
        return max(_LEAST, shutil.get_terminal_size((NARROW, 24)).columns)


def is_terminal(out: Any) -> bool:
    """Whether a person reads this output as it is written. A closed stream, or one that is not known to be a terminal, is none."""
    try:
        return bool(out.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def shows_colours(out: Any) -> bool:
    """Whether colours may be written: to a terminal, unless the user forbids it (https://no-color.org) or the terminal has none."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return is_terminal(out) and not plain and (os.name != "nt" or bool(os.environ.get("WT_SESSION") or os.environ.get("ANSICON")))


def painted(text: str, *styles: Style) -> str:
    """The text in these styles."""
    return f"\033[{';'.join(style.value for style in styles)}m{text}\033[0m" if styles and text else text


def wrapped(text: str, width: int, first: str = "", rest: str = "", most: int = PROSE) -> list[str]:
    """The lines of a paragraph. A number keeps its per cent sign, and a name that is wider than a line is folded where its parts meet.

    Args:
        first, rest: what the first line and the others begin with.
        most: no line is longer, however wide the output is.
    """
    # textwrap breaks at spaces only, not at those that keep words together.
    kept = re.sub(r"(\d) %", "\\1\N{NO-BREAK SPACE}%", text)
    room = min(width, most) - max(len(first), len(rest))
    words = " ".join(part for word in kept.split(" ") for part in folded(word, room))
    lines = textwrap.wrap(words, min(width, most), initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [first.rstrip()]


def folded(name: str, width: int) -> list[str]:
    """A name in pieces of at most this width, which end where its parts meet: at a dot, a slash or a space."""
    pieces: list[str] = []
    for part in re.findall(r"[^./ ]*[./ ]+|[^./ ]+", name):
        while len(part) > width:
            if pieces and len(pieces[-1]) < width // 2:
                pieces[-1], part = pieces[-1] + part[: width - len(pieces[-1])], part[width - len(pieces[-1]) :]
            else:
                pieces, part = [*pieces, part[:width]], part[width:]
        if pieces and len((pieces[-1] + part).rstrip()) <= width:
            pieces[-1] += part
        elif part:
            pieces.append(part)
    return [piece.rstrip(" ") for piece in pieces] or [""]
