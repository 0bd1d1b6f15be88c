"""A cause of an alert, and how code stands in its remedy; standard library only."""

from __future__ import annotations

from dataclasses import dataclass

CODE_INDENT = "    "
"""What stands before each line of code in `Cause.remedy`."""


@dataclass(frozen=True)
class Cause:
    """One explanation of an alert."""

    name: str
    share: float
    """How much of the alert it explains; the shares of an alert's causes add up to 1."""
    evidence: str
    """The figures that speak for it."""
    remedy: str
    """What to try against it: a sentence, and behind it, where there is any, the lines of `code`, indented."""

    @property
    def advice(self) -> str:
        """The sentence of the remedy, without the code."""
        return " ".join(line for line in self.remedy.splitlines() if not line.startswith(CODE_INDENT))

    @property
    def code(self) -> str:
        """The lines of the remedy that can be pasted into the user's code, after `model` and `optimizer` are made, with the inputs of the training
        set as `x`. Empty where the remedy is a sentence only."""
        lines = [line.removeprefix(CODE_INDENT) for line in self.remedy.splitlines() if line.startswith(CODE_INDENT)]
        return "\n".join(lines)
