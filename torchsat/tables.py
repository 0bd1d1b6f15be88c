"""Tables of text: which columns and rows there is room for, and where a cell may be broken. Never torch.

A table says of each column how much it matters and of each row whether it is healthy. On a narrow terminal the columns that matter least are left
out, names are folded where their parts meet, and sentences are broken between words; no word and no number is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, TextIO

from torchsat.terminal import Style, folded, painted, shows_colours, width_of, wrapped
from torchsat.verdict import Health

BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = " .:-=+*#"
"""For an output whose encoding lacks block characters."""


ROWS = 12
"""A table of no more rows than this is printed whole."""
MOST_ROWS = 24
"""Of a larger table no more rows than these are printed, the worst ones."""
_GAP = "  "
_LEAST = 12
"""No name is folded into fewer characters than these, nor into fewer than the title of its column has."""
_PROSE = 24
"""Sentences that would have less room than these characters stand below their row."""
_UNDER = "    "
_NAME = 1 / 3
"""A name that takes more than this part of a line is folded where that makes room for a column."""
STYLES = {
    Health.HEALTHY.value: (Style.GREEN,),
    Health.NOT_JUDGED.value: (),
    Health.IN_DOUBT.value: (),
    Health.WARNING.value: (Style.YELLOW,),
    Health.CRITICAL.value: (Style.RED,),
    Health.NOT_FINITE.value: (Style.RED, Style.BOLD),
}
"""The styles of the words for how a run, a site or a layer is."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        title: what stands above it.
        rank: 0 if it is always shown; of the others the one of the lowest rank is shown first where there is not room for all.
        left: it is aligned to the left.
        name: its cells are names, which may be folded into several lines.
        prose: its cells are sentences, which may be broken between words.
    """

    title: str
    rank: int = 0
    left: bool = False
    name: bool = False
    prose: bool = False

    @property
    def folds(self) -> bool:
        """Whether its cells may take several lines."""
        return self.name or self.prose


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    cells: tuple[str, ...]
    notable: bool = True
    """Whether it is shown where there is not room for all rows."""


@dataclass(frozen=True)
class Sheet:
    """A table before it is printed."""

    title: str
    """What stands above it; empty where nothing does."""
    columns: tuple[Column, ...]
    rows: Sequence[Row]
    noun: str = "row"
    """What a row is, in the singular."""


@dataclass(frozen=True)
class Page:
    """How a report is set.

    Args:
        width: in characters.
        colours: whether escape codes may be used.
        bars: the characters of sparklines.
        everything: nothing is summed up.
    """

    width: int
    colours: bool
    bars: str
    everything: bool

    def without_colours(self) -> Page:
        """The same page for a text that is not known to go to a terminal."""
        return replace(self, colours=False)

    def styled(self, text: str, *styles: Style) -> str:
        """The text in these styles, if the page has any."""
        return painted(text, *styles) if self.colours else text


def page_for(out: TextIO, everything: bool = False) -> Page:
    """The page of an output."""
    return Page(width_of(out), shows_colours(out), bars_for(out), everything)


def bars_for(out: IO[str]) -> str:
    """The characters of a sparkline that this output can show, the lowest first."""
    try:
        BARS.encode(getattr(out, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return _PLAIN_BARS
    return BARS


def table(page: Page, sheet: Sheet, whole: bool = False) -> list[str]:
    """A table: its title, its columns as far as there is room, its rows."""
    shown = _rows(page, sheet) if not whole else list(sheet.rows)
    columns, widths = _fitting(sheet, page.width, shown)
    below = [at for at, column in enumerate(sheet.columns) if column.prose and at not in columns]
    title = [page.styled(line, Style.BOLD) for line in wrapped(sheet.title, page.width)] if sheet.title else []
    lines = [*title, page.styled(_line([sheet.columns[at].title for at in columns], columns, widths, sheet), Style.FAINT)]
    for row in shown:
        lines += _set(page, row, columns, widths, sheet)
        lines += [line for at in below if row.cells[at] for line in wrapped(row.cells[at], page.width, _UNDER, _UNDER)]
    left = [row for row in sheet.rows if not any(row is each for each in shown)]
    if left:
        health = next((at for at, column in enumerate(sheet.columns) if column.title == "health"), None)
        healthy = health is not None and all(row.cells[health] == Health.HEALTHY.value for row in left)
        noun = f"{'healthy ' if healthy else ''}{sheet.noun}{'' if len(left) == 1 else 'es' if sheet.noun.endswith('x') else 's'}"
        lines.append(f"and {len(left)} more {noun}; --all shows {'it' if len(left) == 1 else 'them'}")
    return lines


def _rows(page: Page, sheet: Sheet) -> list[Row]:
    """The rows that are printed: all of a small table; of a large one the notable ones, as far as there is room."""
    if page.everything or len(sheet.rows) <= ROWS:
        return list(sheet.rows)
    notable = [row for row in sheet.rows if row.notable]
    return notable[:MOST_ROWS] if len(notable) > 2 else list(sheet.rows[:3])


def _fitting(sheet: Sheet, width: int, rows: Sequence[Row]) -> tuple[list[int], dict[int, int]]:
    """The columns that are printed, and the width of each.

    The columns of rank 0 always are; names and sentences among them are folded as far as needed. Others follow by rank while there
    is room for all.
    """
    wanted = {at: max(len(column.title), *(len(row.cells[at]) for row in rows)) for at, column in enumerate(sheet.columns)}
    blank = {at for at in wanted if all(row.cells[at].strip() in ("", "-") for row in rows)}
    chosen = {at for at, column in enumerate(sheet.columns) if not column.rank and at not in blank}
    prose = {at for at in chosen if sheet.columns[at].prose}
    most = {at: _PROSE if at in prose else int(_NAME * width) if sheet.columns[at].name else wanted[at] for at in wanted}
    widths = {at: min(wanted[at], most[at]) for at in wanted}

    def taken() -> int:
        return sum(widths[at] for at in chosen) + len(_GAP) * (len(chosen) - 1)

    if taken() > width:
        chosen -= prose
    for at in sorted((at for at in wanted if sheet.columns[at].rank and at not in blank), key=lambda at: sheet.columns[at].rank):
        if taken() + len(_GAP) + widths[at] <= width:
            chosen.add(at)
    names = [at for at in chosen if sheet.columns[at].folds]
    least = {at: max(_LEAST if sheet.columns[at].name else _PROSE, len(sheet.columns[at].title)) for at in names}
    while taken() > width and any(widths[at] > least[at] for at in names):
        widths[max(names, key=lambda at: widths[at] - least[at])] -= 1
    while taken() < width and any(widths[at] < wanted[at] for at in names):
        widths[max(names, key=lambda at: wanted[at] - widths[at])] += 1
    return sorted(chosen), widths


def _line(cells: Sequence[str], columns: Sequence[int], widths: dict[int, int], sheet: Sheet) -> str:
    """One line of a table."""
    return _GAP.join(
        cell.ljust(widths[at]) if sheet.columns[at].left else cell.rjust(widths[at]) for cell, at in zip(cells, columns, strict=True)
    ).rstrip()


def _set(page: Page, row: Row, columns: Sequence[int], widths: dict[int, int], sheet: Sheet) -> list[str]:
    """A row in one line; in several lines where a name is folded."""

    def pieces(at: int) -> list[str]:
        column = sheet.columns[at]
        if not column.folds or len(row.cells[at]) <= widths[at]:
            return [row.cells[at]]
        if column.prose:
            return wrapped(row.cells[at], widths[at], rest=" ", most=widths[at])
        first, *rest = folded(row.cells[at], widths[at] - 1)
        return [first, *(f" {piece}" for piece in rest)]

    found = [pieces(at) for at in columns]
    lines = []
    for line in range(max(map(len, found))):
        cells = [each[line] if line < len(each) else "" for each in found]
        text = _line(cells, columns, widths, sheet)
        health = _health(sheet.columns, columns)
        if page.colours and health is not None and cells[health] in STYLES:
            start = sum(widths[at] + len(_GAP) for at in columns[:health])
            end = start + len(cells[health])
            text = text[:start] + painted(cells[health], *STYLES[cells[health]]) + text[end:]
        lines.append(text)
    return lines


def _health(all_columns: Sequence[Column], columns: Sequence[int]) -> int | None:
    """Which of the printed columns is that of the health."""
    return next((place for place, at in enumerate(columns) if all_columns[at].title == "health"), None)
