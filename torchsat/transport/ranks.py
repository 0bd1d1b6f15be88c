"""The transport of a process that observes together with others."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from torchsat.internals_distributed import default_store
from torchsat.parts import Parts
from torchsat.transport.agreement import Agreement, Collectives, agree, agree_on_history
from torchsat.transport.flight import Flight, copy_after
from torchsat.transport.layout import Layout, told
from torchsat.transport.meeting import LAG, Meeting, Rendezvous
from torchsat.transport.packing import Ends, Numbers, Vectors, pack, unpack
from torchsat.transport.parallel import job_rank
from torchsat.transport.windows import UnitWindows

_met: dict[str, int] = {}
"""How many monitors of this process have announced themselves to each group, by kind of model."""


class Ranks:
    """One monitor's view of the processes that observe with it.

    Args:
        group: the process group; None where there is none, so that this process is alone.
        kind: the kind of the model. The n-th monitor of a kind on one rank observes together with the n-th of that kind on the others.
        give_up: called once, with the reason, when this rank stops observing with the others because they no longer answer.
    """

    def __init__(self, group: dist.ProcessGroup | None, kind: str, give_up: Callable[[str], None]) -> None:
        self.meeting = Meeting.UNMET
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.everywhere = job_rank()
        """The rank in the whole job, which is the one that users are shown."""
        self.layout = Layout()
        """The layout that all ranks have agreed upon; empty before that."""
        self.history: dict[str, Any] | None = None
        """What the rank with the highest step number remembers of an earlier session, for the other ranks; None once it has been used."""
        self.agreed: tuple[int, int] | None = None
        """The step before which some rank cannot pay for a further observation, and the longest interval that a rank wishes; None: not known yet."""
        self._group = group
        self._give_up = give_up
        self._collectives: Collectives | None = None
        self._said = b""
        """What this rank has told the others about its sites and layers; empty before that."""
        self._told: dict[int, Ends] = {}
        """For each step, what the ranks told each other then and have not acted upon yet."""
        self._windows = UnitWindows()
        self._rendezvous: Rendezvous | None = None
        if group is not None:
            name = hashlib.sha256(json.dumps([dist.get_process_group_ranks(group), kind]).encode()).hexdigest()[:12]
            number = _met.setdefault(name, 0)
            _met[name] += 1
            self._store = dist.PrefixStore(f"torchsat/{name}/{number}", default_store())  # type: ignore[attr-defined]
            self._rendezvous = Rendezvous(self._store, self.size, f"{kind} no. {number + 1}")

    @property
    def together(self) -> bool:
        """Whether this rank observes with the others now."""
        return self.meeting is Meeting.TOGETHER

    def meet(self, device: torch.device) -> str | None:
        """Decide whether all ranks observe together. Every rank calls this at the end of its first observed step.

        Args:
            device: the device of the model.

        Returns:
            Why this rank observes by itself although it has a group; None where the ranks observe together or there is no group.
        """
        if self.meeting is not Meeting.UNMET:
            return None
        if self._group is None or self._rendezvous is None:
            self.meeting = Meeting.ALONE
            return None
        try:
            why_apart = self._rendezvous.decide()
            if why_apart is not None:
                self.meeting = Meeting.ALONE
                return why_apart
            store = dist.PrefixStore("group", self._store)  # type: ignore[attr-defined]
            self._collectives = Collectives.like(self._group, store, device, self.rank, self.size)
        except Exception as error:
            self.meeting = Meeting.LOST
            return f"{type(error).__name__}: {error}"
        self.meeting = Meeting.TOGETHER
        return None

    def leave(self) -> None:
        """Stop observing with other ranks, and tell them so."""
        if self.together and self._rendezvous is not None:
            with contextlib.suppress(Exception):
                self._rendezvous.say_left(self.everywhere)
        self.meeting = self.meeting.without_others()
        if self._collectives is not None:
            self._collectives.let_go()
            self._collectives = None

    def send(
        self,
        step: int,
        parts: Parts,
        *,
        earliest: int = 0,
        interval: int = 1,
        before: Callable[[], None] = lambda: None,
        history: Callable[[], dict[str, Any]] = dict,
    ) -> Flight | None:
        """Send this rank's numbers to the others. Every rank calls this at the end of the same observed steps, even if it measured nothing.

        Args:
            earliest: the step before which this rank cannot pay for the observation after the next one.
            interval: the interval between observations that this rank wishes.
            before: called to read the flights that are LAG steps old.
            history: returns what this rank remembers of an earlier session, in plain types.

        Returns:
            The flight, which has the step that the ranks agree upon; None where the others were lost just now.

        Raises:
            TimeoutError: the others did not answer while the ranks were agreeing.
        """
        facts = told(parts)
        step = self._settle(step, facts, before, history)
        collectives = self._collectives
        if collectives is None:
            return None
        ends = Ends(step, step, interval, facts != self._said, earliest)
        vectors = pack(parts, self.layout, collectives.device, ends, rank=self.rank, everywhere=self.everywhere)
        own = Vectors(*(vector.clone() for vector in vectors))
        # These numbers are used if the others are lost. A rank that observes by itself has no worst rank.
        own.maxes[self.layout.places.worst] = -math.inf
        works = collectives.merge(vectors)
        merged, mine = copy_after(works, vectors, own)
        return Flight(step, time.time(), self.layout, [merged], works, [mine], generation=parts.generation, give_up=self._lose)

    def read(self, flight: Flight) -> Numbers:
        """The numbers of a flight that has arrived, also after the others were lost."""
        numbers = unpack(flight.merged(), flight.layout, self._windows)
        if not flight.failed:
            self._told[flight.step] = numbers.ends
            if numbers.ends.first_step != numbers.ends.last_step:
                self._lose(f"they are at other steps ({numbers.ends.first_step} to {numbers.ends.last_step} in one observation)")
        return numbers

    def _settle(self, step: int, facts: bytes, before: Callable[[], None], history: Callable[[], dict[str, Any]]) -> int:
        """Before this rank sends, agree with the others on whatever is open. Returns the number of the step, which the first agreement may change."""
        if self._collectives is None:
            return step
        if not self._said:
            agreement = self._agree(self._collectives, facts, step)
            if agreement.step:
                self.history = agree_on_history(self._collectives, agreement.furthest, history)
            return agreement.step
        before()
        # Numbers that `flush` has read early are acted upon only when they are LAG steps old, as on the other ranks.
        due = [self._told.pop(at) for at in sorted(self._told) if at + LAG <= step]
        self.agreed = (due[-1].earliest, due[-1].interval) if due else self.agreed
        # `before` may have found that the others are lost.
        if self.together and any(ends.changed for ends in due):
            self._agree(self._collectives, facts, step)
        return step

    def _agree(self, collectives: Collectives, facts: bytes, step: int) -> Agreement:
        agreement = agree(collectives, facts, step)
        self.layout, self._said = agreement.layout, facts
        self._windows.keep({name: entry.units for name, entry in self.layout.sites.items()})
        return agreement

    def _lose(self, why: str) -> None:
        """Stop observing with the others, because they no longer answer or are at other steps."""
        if not self.together:
            return
        with contextlib.suppress(Exception):
            left = self._rendezvous.who_left() if self._rendezvous is not None else None
            why = why if left is None else f"rank {left} no longer observes"
        self.leave()
        self._give_up(why)
