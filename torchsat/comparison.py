"""How the trials of `try_remedies` compare, as a table of text and as a card of a notebook. Never torch.

Both are made from the same rows: the untouched copy first, then what helped most.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchsat.cards import Treatment, Tried
from torchsat.percent import number_or_dash, percent_or_dash

_WIDTH = 200
"""The width of the table, in characters."""


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


def table(rows: Sequence[Compared], notes: Sequence[str]) -> str:
    """The trials as text."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("remedy")
    for name in ("loss", "of untouched", "saturated", "E|f'|/peak", "gradient"):
        shown.add_column(name, justify="right")
    shown.add_column("what was changed", overflow="fold")
    for row in rows:
        shown.add_row(
            Text(f"{row.remedy} (best)" if row.best else row.remedy),
            row.loss_in_words,
            percent_or_dash(row.of_untouched),
            percent_or_dash(row.saturated),
            number_or_dash(row.derivative),
            number_or_dash(row.gradient, "{:.1e}"),
            Text(row.change),
        )
    out = io.StringIO()
    # In a notebook, rich would display the text in the cell instead of writing it to the file.
    console = Console(file=out, highlight=False, force_jupyter=False, width=_WIDTH)
    console.print(shown)
    for note in notes:
        console.print(note, markup=False)
    return out.getvalue().rstrip()


def treatment(rows: Sequence[Compared], notes: Sequence[str], sentence: str, code: str) -> Treatment:
    """The trials as what a card shows."""
    tried = [Tried(row.remedy, row.loss_in_words, percent_or_dash(row.of_untouched), row.of_untouched, row.change, row.best) for row in rows]
    return Treatment(sentence, tried, notes, code)
