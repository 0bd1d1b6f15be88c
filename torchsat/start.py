"""The first observation of a run, which later ones are compared with; standard library only."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

from torchsat.experts import Experts
from torchsat.record import Record, Snapshot, Weight

_Found = TypeVar("_Found")

LONG = 100
"""Steps after which what learns has changed."""
UNEVEN = 6.0
"""A weight whose unevenness is larger is taken for trained. Draws of torch.nn.init of 512 elements and more stay below 5."""

_TOO_LARGE_A_STEP = 0.05
"""A step that changes the median layer by more of itself makes weights uneven that have learned nothing."""


@dataclass(frozen=True)
class Start:
    """What a rule may compare a place with (`Rule.compares`)."""

    item: Record | Weight | Experts
    """The place at the first observation that had it."""
    step: int
    """The step of that observation."""
    trained: bool
    """Whether the network had trained weights when the run began (`came_trained`)."""


def per_snapshot(compute: Callable[[Snapshot], _Found]) -> Callable[[Snapshot], _Found]:
    """A function of a snapshot that is computed once, though rules ask for it at each record. It keeps what it found in the newest snapshot, which it
    does not keep alive."""
    newest: tuple[weakref.ref[Snapshot], _Found] | None = None

    @wraps(compute)
    def found(snapshot: Snapshot) -> _Found:
        nonlocal newest
        kept = newest
        if kept is None or kept[0]() is not snapshot:
            kept = newest = weakref.ref(snapshot), compute(snapshot)
        return kept[1]

    return found


@per_snapshot
def came_trained(first: Snapshot) -> bool:
    """Whether the network had trained weights when the run began: whether a third of its layers are more uneven than an initialiser makes them.

    Layers that are drawn anew before a fine-tuning, such as a head, and those that training has hardly moved are in the minority. A few steps that
    are far too large make any weight uneven, so behind such steps nothing is concluded.
    """
    steps = [weight.update_ratio for weight in first.weights if weight.update_ratio is not None]
    if first.step > 0 and steps and statistics.median(steps) > _TOO_LARGE_A_STEP:
        return False
    known = [weight.unevenness for weight in first.weights if weight.unevenness is not None]
    return 3 * sum(unevenness > UNEVEN for unevenness in known) > len(known)
