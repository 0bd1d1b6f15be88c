"""Where the gradient is measured in each graph of a model, which is found out once in a run (way.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torchsat.ledger import Fact

PLACE = "ledger"
"""The place under which a fault in measuring the gradient's way is reported. It ends the ledger and nothing else."""


@dataclass(frozen=True)
class Listener:
    """What is measured at one node."""

    outputs: tuple[int, ...] = ()
    """The points that take what arrives at its outputs."""
    inputs: tuple[tuple[int, int, int, int], ...] = ()
    """The points that take what it passes on: the point, the position of the input, the group within the point that is added up before the norm is
    taken, and how many inputs the group has."""


@dataclass(frozen=True)
class Plan:
    """Where the gradient is measured in one graph, whose nodes are numbered from the output on."""

    number: int
    """Which of the graphs of the model it is."""
    facts: tuple[Fact, ...]
    points: int
    listeners: Mapping[int, Listener]


@dataclass
class Ways:
    """What is known of the graphs of one model, over the whole run."""

    plans: dict[int, Plan | None] = field(default_factory=dict)
    """The plan of each graph, by its signature; None for one that no way leads through."""
    is_too_large: bool = False
    """Whether the model has made a graph of more nodes than are walked. No other one is walked then."""
    learning: int = 1
    """In how many of the next observations it is noted which module makes which node."""

    @property
    def learns(self) -> bool:
        """Whether it is noted in the next observation."""
        return self.learning > 0
