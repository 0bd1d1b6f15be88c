"""How the trials of `try_remedies` compare, as a table of text and as a card of a notebook. Never torch.

Both are made from the same rows: the untouched copy first, then what helped most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchsat.cards import Treatment, Tried
from torchsat.percent import number_or_dash, percent_or_dash
from torchsat.tables import Column, Page, Row, Sheet
from torchsat.tables import table as set_table
from torchsat.terminal import wrapped


@dataclass(frozen=True)
class Compared:
    """One trial beside the untouched copy."""

    remedy: str
    loss: float | None
    """The loss at the end; None where the remedy was not tried."""
    spread: float | None
    """The standard deviation of that loss over the seeds; None where there is one seed."""
    of_untouched: float | None
    """The loss as a share of that of the untouched copy; None for the untouched copy itself, and where one of them is not known."""
    saturated: float | None
    derivative: float | None
    gradient: float | None
    """Of the worst hidden site the saturated share and E|f'| / peak, and the norm of the first layer's gradient, at the last observation."""
    change: str
    best: bool

    @property
    def loss_in_words(self) -> str:
        """The loss with its spread."""
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        return f"{number_or_dash(self.loss)}{spread}"


_COLUMNS = (
    Column("remedy", left=True, name=True),
    Column("loss"),
    Column("of untouched"),
    Column("saturated", rank=1),
    Column("E|f'|/peak", rank=2),
    Column("gradient", rank=3),
    Column("what changed", left=True, prose=True),
)


def table(rows: Sequence[Compared], notes: Sequence[str], page: Page) -> list[str]:
    """The trials as lines of text."""
    cells = [
        Row(
            (
                f"{row.remedy} (best)" if row.best else row.remedy,
                row.loss_in_words,
                percent_or_dash(row.of_untouched),
                percent_or_dash(row.saturated),
                number_or_dash(row.derivative),
                number_or_dash(row.gradient, "{:.1e}"),
                row.change,
            )
        )
        for row in rows
    ]
    return [*set_table(page, Sheet("", _COLUMNS, cells), whole=True), *(line for note in notes for line in wrapped(note, page.width))]


def treatment(rows: Sequence[Compared], notes: Sequence[str], sentence: str, code: str) -> Treatment:
    """The trials as what a card shows."""
    tried = [Tried(row.remedy, row.loss_in_words, percent_or_dash(row.of_untouched), row.of_untouched, row.change, row.best) for row in rows]
    return Treatment(sentence, tried, notes, code)
