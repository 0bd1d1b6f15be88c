"""Decides whether several ranks observe together. The ranks meet in the key-value store of their job."""

from __future__ import annotations

import time
from enum import Enum
from typing import Any

GRACE = 5.0
"""Seconds that a rank waits, once, for other ranks: for those that have not begun to train a watched model, or for a result that is late."""
PATIENCE = 60.0
"""Seconds that a rank waits for others that train a watched model, but are still in their first observed step."""
LAG = 4
"""Steps after which a result becomes visible, on all ranks alike. By then it has arrived without anybody having waited."""
CLOSING = 10.0
"""Seconds that `close` waits for other ranks."""


class Meeting(Enum):
    """Whether this process observes together with the other ranks of its group. ALONE and LOST are final.

    | from     | to       | when                                                                                                          |
    | -------- | -------- | ------------------------------------------------------------------------------------------------------------- |
    | UNMET    | ALONE    | there is no group; or not all ranks train a watched model, as the ranks decided; or this rank stopped before  |
    | UNMET    | TOGETHER | all ranks have ended their first observed step                                                                |
    | UNMET    | LOST     | the others observe together, but this rank cannot: its group has no backend that works here, or its store failed |
    | TOGETHER | LOST     | a rank has left or died, or was not heard of in time, or is at another step; or this rank stops               |
    """

    UNMET = "unmet"
    """The end of the first observed step will decide."""
    ALONE = "alone"
    """This rank observes by itself and always did."""
    TOGETHER = "together"
    """All ranks of the group observe as one."""
    LOST = "lost"
    """This rank observes by itself, and the others did or do observe together."""

    def without_others(self) -> Meeting:
        """The state after this rank has stopped observing with others."""
        return {Meeting.UNMET: Meeting.ALONE, Meeting.TOGETHER: Meeting.LOST}.get(self, self)


class Rendezvous:
    """The place in the store where the ranks that train one model meet.

    Making one announces this rank to the others.

    Args:
        store: a torch.distributed.Store that all ranks of the group reach, under a prefix of its own.
        size: how many ranks there are.
        model: what they watch, for the message to the user: "Net no. 1".
    """

    def __init__(self, store: Any, size: int, model: str) -> None:
        self._store, self._size, self._model = store, size, model
        store.add("entered", 1)

    def decide(self) -> str | None:
        """At the end of the first observed step of this rank: None if all ranks observe together; otherwise why not.

        The first rank that sees all of them at this place, or that has waited long enough, writes the decision, which binds everyone. A rank waits
        GRACE seconds for others that have not announced themselves, and PATIENCE seconds for others that have.
        """
        store = self._store
        store.add("arrived", 1)
        begun, pause = time.monotonic(), 1e-3
        while not store.check(["decision"]):
            entered, arrived = store.add("entered", 0), store.add("arrived", 0)
            if arrived == self._size:
                store.compare_set("decision", "", "together")
                break
            if time.monotonic() - begun > (PATIENCE if entered == self._size else GRACE):
                store.compare_set("decision", "", f"apart: {self._why_apart(entered, arrived)}")
                break
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
        decision: str = store.get("decision").decode()
        return None if decision == "together" else decision.partition(": ")[2]

    def say_left(self, rank: int) -> None:
        """Tell the others that this rank no longer observes. The first rank to say so is the one that they name."""
        self._store.compare_set("left", "", str(rank))

    def who_left(self) -> str | None:
        """The first rank that said it no longer observes."""
        left: str | None = self._store.get("left").decode() if self._store.check(["left"]) else None
        return left

    def _why_apart(self, entered: int, arrived: int) -> str:
        if entered == self._size:
            return f"only {arrived} of {self._size} ranks ended a step within {PATIENCE:g} s"
        return (
            f"{entered} of {self._size} ranks train a watched {self._model}; call torchsat.watch on every rank, or pass group= the ranks that do, or "
            "group=None"
        )
