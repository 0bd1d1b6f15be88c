"""Values that introduce themselves: in one line at a prompt, as a card in a notebook; standard library only.

The generated `repr` of a snapshot of fifty sites has a hundred thousand characters, and a notebook shows it for every cell that ends with one. So a
value has a short `repr`, and its numbers are read from its attributes.

What a card looks like stands above the values, in cards.py. It is looked up when a notebook asks for a card, as torchsat/__init__.py looks up its
names, so that the values themselves import nothing.
"""

from __future__ import annotations

from importlib import import_module


class Shown:
    """A value with a short `repr` and a card."""

    @property
    def in_short(self) -> str:
        """What the value says, in one line."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.in_short}>"

    def _repr_html_(self) -> str:
        """The card that a notebook shows."""
        return str(import_module("torchsat.cards").card(self))


WARNING = 0.5
"""The `alert_level` at the limit of a warning (alert_level.py)."""


def level_in_words(level: float | None, nonfinite: int = 0) -> str:
    """An `alert_level` for people: where it stands between healthy and critical."""
    if nonfinite:
        return "not finite"
    if level is None:
        return "not judged"
    return "critical" if level >= 1 else "warning" if level >= WARNING else "near a warning" if level > 0.25 else "healthy"
