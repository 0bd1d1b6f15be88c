"""Chooses the transport of one monitor's observations: `Local` until the monitor has met other ranks, and again after it has lost them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from torchsat.parts import Parts
from torchsat.record import Kind
from torchsat.transport.flight import Flight
from torchsat.transport.local import Local
from torchsat.transport.meeting import Meeting
from torchsat.transport.packing import Numbers
from torchsat.transport.parallel import default_group, job_rank
from torchsat.transport.ranks import Ranks

log = logging.getLogger("torchsat")


class Route:
    """The transports of one monitor.

    Args:
        group: the ranks that observe together, as the user gave it: "auto" is all of torch.distributed, None this process by itself.
        kind: the kind of the model; monitors of several ranks observe together only if their models are of one kind.
        raises: raise faults instead of logging them.
    """

    def __init__(self, group: dist.ProcessGroup | Literal["auto"] | None, kind: str, raises: bool) -> None:
        self._group = group
        self._kind = kind
        self._raises = raises
        self.local = Local()
        self._ranks: Ranks | None = None
        """This monitor's view of the other ranks; None before its first training pass. After they are lost it still reads the flights sent before."""
        self._differing_said = False

    @property
    def together(self) -> bool:
        """Whether other ranks observe with this one now."""
        return self._ranks is not None and self._ranks.together

    @property
    def has_met(self) -> bool:
        """Whether it has been decided if other ranks observe with this one."""
        return self._ranks is not None and self._ranks.meeting is not Meeting.UNMET

    @property
    def waits_for_others(self) -> bool:
        """Whether other ranks wait for each observation of this one, or may do so at the end of the first."""
        return self.together or (not self.has_met and (default_group() if self._group == "auto" else self._group) is not None)

    @property
    def speaks(self) -> bool:
        """Whether this rank writes, logs and alerts: it is by itself, or the first of those that observe together."""
        return self._ranks is None or not self._ranks.together or self._ranks.rank == 0

    @property
    def rank(self) -> int:
        """The rank of this process in the whole job, even after torch.distributed has been shut down; 0 where there is only one process."""
        if self._ranks is not None:
            return self._ranks.everywhere
        return job_rank()

    @property
    def agreed(self) -> tuple[int, int] | None:
        """The step before which no further observation can be paid for on all ranks, and the interval that they have agreed upon; None: none yet."""
        return self._ranks.agreed if self._ranks is not None and self._ranks.together else None

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """The sites that are seen on any rank, and their kinds; empty where this process is by itself."""
        if self._ranks is None or not self._ranks.together:
            return {}
        return {name: entry.facts.kind for name, entry in self._ranks.layout.sites.items()}

    def enter(self) -> None:
        """Tell the other ranks, when the first training pass begins, that this one watches its model."""
        if self._ranks is None:
            group = default_group() if self._group == "auto" else self._group
            try:
                self._ranks = Ranks(group, self._kind, self._say_lost)
            except Exception as error:
                log.warning("torchsat: each rank observes by itself: %s: %s", type(error).__name__, error)
                self._ranks = Ranks(None, self._kind, self._say_lost)

    def meet(self, device: torch.device) -> None:
        """Decide, at the end of the first observation, whether several ranks observe together. All of them come to the same decision."""
        self.enter()
        assert self._ranks is not None
        why_apart = self._ranks.meet(device)
        if why_apart is not None:
            self._say_lost(why_apart)

    def send(
        self,
        step: int,
        parts: Parts,
        *,
        earliest: int,
        interval: int,
        before: Callable[[], None],
        history: Callable[[], dict[str, Any]],
    ) -> Flight | None:
        """Send what was measured to the host; where other ranks wait for it, even if it is nothing. Returns None where nothing was sent.

        Args:
            earliest: the step before which this rank cannot pay for the observation after the next one.
            interval: the interval between observations that this rank wishes.
            before: called to read the flights that are old enough.
            history: returns what this rank remembers of an earlier session.
        """
        if self._ranks is None or not self._ranks.together:
            return self.local.send(step, parts)
        try:
            return self._ranks.send(step, parts, earliest=earliest, interval=interval, before=before, history=history)
        except Exception as error:
            if self._raises:
                raise
            self._ranks.leave()
            self._say_lost(f"{type(error).__name__}: {error}")
            return None

    def take_history(self) -> dict[str, Any] | None:
        """What another rank remembers of an earlier session, if this rank is to continue with it. It is returned once, then None."""
        if self._ranks is None:
            return None
        history, self._ranks.history = self._ranks.history, None
        return history

    def read(self, flight: Flight) -> Numbers:
        """The numbers of a flight that has arrived."""
        if not flight.layout.shared:
            return self.local.read(flight)
        assert self._ranks is not None
        numbers = self._ranks.read(flight)
        if numbers.differing and not self._differing_said and self.speaks:
            self._differing_said = True
            log.warning(
                "torchsat: step %d: ranks hold different weights in %s%s. What is shown is of all ranks together; if each trains its own model, "
                "pass group=None.",
                flight.step,
                numbers.differing[0],
                f" and {len(numbers.differing) - 1} more layers" if len(numbers.differing) > 1 else "",
            )
        return numbers

    def leave(self) -> None:
        """Stop observing with other ranks, so that they do not wait for numbers that never come."""
        if self._ranks is not None:
            self._ranks.leave()

    def _say_lost(self, why: str) -> None:
        log.warning("torchsat: rank %d observes by itself from here on: %s. Training is not affected.", self.rank, why)
