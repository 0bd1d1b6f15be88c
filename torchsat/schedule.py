"""When to observe: step 0, the powers of two below `every`, its multiples; and less often where that would cost more than the budget.

What an observation costs is measured in two ways, and the larger counts: the time that our own code took, and by how much the observed step was
longer than the few steps behind it (which also sees what our code does to others: caches, a compiled model run eager). On a GPU only the second means
anything; it is taken from events on the device's own clock, read once they have passed, so that nobody waits. One step is not like another, hence
medians; the first observation, which finds out the structure of the model, does not count.

What lies between two steps (a batch is loaded, a whole validation runs) is no cost of ours: the time before the model is entered counts for at most
one step.

The handful of observations below `every` is outside the budget: it is what tells early that an initialisation is bad.

An observation that is abandoned voids its window, so that nothing is concluded from it:

    OPEN --finish()--> FINISHED        OPEN --void()--> VOID
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch

_WINDOWS = 8
"""The cost of an observation is the median over so many."""
_FOLLOWERS = 5
"""An observed step is compared with so many steps behind it."""
_ROUND = (1, 2, 5)
_SLACK = 0.7
"""An interval becomes shorter only where that would cost at most this share of the budget, so that it does not swing to and fro."""


@dataclass(frozen=True)
class Mark:
    """A moment, on the clock of the host and, where there is one, of the device."""

    host: float
    event: torch.cuda.Event | None

    def passed(self) -> bool:
        """Whether the device has come to this moment."""
        return self.event is None or self.event.query()

    def until(self, later: Mark) -> float:
        """Seconds to a later mark; both must have passed."""
        if self.event is None or later.event is None:
            return later.host - self.host
        return float(self.event.elapsed_time(later.event)) / 1e3


class Clock:
    """The clocks of the host and of the device. A test hands a monitor a clock of its own."""

    seconds: Callable[..., float] = staticmethod(time.perf_counter)
    """The host's time, from any fixed moment on. Every hook reads it twice, so it is the function of the standard library itself."""

    def mark(self, device: torch.device | None) -> Mark:
        """This moment; on a GPU also the moment at which the device will have done what it has been given so far."""
        event = None
        if device is not None and device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
        return Mark(self.seconds(), event)


CLOCK = Clock()
"""The clock that `torchsat.watch` hands to a monitor. Tests put another one here."""


class WindowState(Enum):
    """How far a window has come; see the module's docstring."""

    OPEN = "open"
    FINISHED = "finished"
    VOID = "void"


@dataclass(eq=False)
class Window:
    """One observation and the steps up to the next."""

    step: int
    begin: Mark
    """The end of the step before."""
    entry: Mark | None = None
    """When the model was entered for training; None where that was not seen."""
    own: float = 0.0
    """Seconds of our own code."""
    end: Mark | None = None
    followers: list[Mark] = field(default_factory=list)
    """The ends of the next steps."""
    following: Mark | None = None
    """When the next window began."""
    state: WindowState = WindowState.OPEN

    def enter(self, mark: Mark) -> None:
        """The model is entered for training."""
        if self.entry is None:
            self.entry = mark

    def spend(self, seconds: float) -> None:
        """Our own code ran for so long."""
        self.own += seconds

    def finish(self, mark: Mark) -> None:
        """The observation is over."""
        if self.state is WindowState.OPEN:
            self.end, self.state = mark, WindowState.FINISHED

    def void(self) -> None:
        """The observation was abandoned: nothing is concluded from its time."""
        if self.state is WindowState.OPEN:
            self.state = WindowState.VOID

    def passed(self) -> bool:
        """Whether all its marks have passed."""
        return self.end is not None and self.following is not None and self.following.passed()

    def costs(self) -> tuple[float, float]:
        """Seconds that the observation took, and seconds that a step without one takes."""
        assert self.end is not None
        idle = 0.0 if self.entry is None else self.begin.until(self.entry)
        busy = self.begin.until(self.end) - idle
        ends = [self.end, *self.followers]
        if not self.followers:
            # There is nothing to compare with but our own time.
            return (self.own, busy + idle - self.own) if self.end.event is None else (0.0, busy + idle)
        step = statistics.median(one.until(other) for one, other in itertools.pairwise(ends))
        return max(busy + min(idle, step) - step, self.own if self.end.event is None else 0.0), step


class Schedule:
    """Which steps are observed.

    Args:
        every: the interval that the user asked for.
        budget: the share of training time that observing may take; None: any.
    """

    def __init__(self, every: int, budget: float | None) -> None:
        self.every = every
        self.budget = budget
        self.interval = every
        """The interval now: `every`, or a multiple of it."""
        self.wanted = every
        """The interval that the budget asks for on this rank."""
        self.first = 0
        """The number of the first step, which finds out the structure of the model."""
        self.is_agreed = False
        """Several ranks agree on the interval: here it is only wanted."""
        self.compares = False
        """Whether the ends of the steps are asked for."""
        self._windows: list[Window] = []
        """Those whose marks have not all passed."""
        self._costs: deque[tuple[float, float]] = deque(maxlen=_WINDOWS)
        """Seconds of each of the last observations, and of a step without one."""
        self._shares: deque[tuple[float, float]] = deque(maxlen=2 * _WINDOWS)
        """Seconds of each of the last observations, and of its window, from step `every` on."""
        self._said = every
        """The interval that the user knows of."""
        self._unsaid: str | None = None
        """What has not been said yet, since below `every` the interval does not matter."""

    def due(self, step: int) -> bool:
        """Whether this step is observed."""
        return step % self.interval == 0 or (step < self.every and step & (step - 1) == 0)

    @property
    def overhead(self) -> float | None:
        """The share of training time that the last observations took, from step `every` on; None before it is known."""
        whole = sum(seconds for _, seconds in self._shares)
        return sum(cost for cost, _ in self._shares) / whole if whole else None

    def begin(self, step: int, mark: Mark) -> Window:
        """An observation begins; its window."""
        self._windows = [each for each in self._windows if each.state is not WindowState.VOID]
        if self._windows and self._windows[-1].following is None:
            self._windows[-1].following = mark
        window = Window(step, mark)
        self._windows.append(window)
        self.compares = False
        del self._windows[: -4 * _WINDOWS]
        return window

    def follow(self, mark: Mark) -> None:
        """A step without an observation is over, while `compares`."""
        if self.compares:
            followers = self._windows[-1].followers
            followers.append(mark)
            self.compares = len(followers) < _FOLLOWERS

    def finish(self, window: Window, mark: Mark) -> None:
        """The observation of this window is over."""
        window.finish(mark)
        self.compares = window.state is WindowState.FINISHED

    def spend(self, seconds: float) -> None:
        """Our own code ran for so long, outside of hooks: it counts for the observation that has begun last."""
        if self._windows and self._windows[-1].state is not WindowState.VOID:
            self._windows[-1].spend(seconds)

    def agree(self, interval: int) -> str | None:
        """All ranks observe as seldom as the one that needs it most; in words, if that is a change."""
        before, self.interval = self.interval, interval
        if interval == before:
            return None
        return (
            f"observing takes {'more' if interval > before else 'less'} than the budget of {100 * (self.budget or 1.0):.3g} % allows on the rank "
            f"where it takes most. One in {interval} steps is observed from here on; budget=None keeps every={self.every}."
        )

    def resume(self, interval: int) -> None:
        """Go on with the interval of an earlier session, if it can be one of ours."""
        if interval % self.every == 0 and self.budget is not None:
            self.interval = self.wanted = interval

    def adjust(self, step: int) -> str | None:
        """Set the interval by what is known after the observation of this step; in words, if it has changed. Below `every` it does not matter yet."""
        sentence = self._stretch()
        if self.is_agreed:
            return None
        self.interval = self.wanted
        if 2 * step < self.every:
            self._unsaid = sentence or self._unsaid
            return None
        sentence, self._unsaid = sentence or self._unsaid, None
        if self.interval == self._said:
            return None
        self._said = self.interval
        return sentence

    def _stretch(self) -> str | None:
        """Find the interval that the budget asks for; in words, if it has changed."""
        self._measure()
        if self.budget is None or not self._costs:
            return None
        cost = statistics.median(each for each, _ in self._costs)
        step = statistics.median(each for _, each in self._costs)
        if step <= 0:
            return None
        least = cost * (1 - self.budget) / self.budget / step
        wanted = self.every * _rounded_up(least / self.every)
        if wanted < self.wanted:
            wanted = min(self.wanted, self.every * _rounded_up(least / _SLACK / self.every))
        if wanted == self.wanted:
            return None
        self.wanted = wanted
        share = cost / (cost + self.every * step)
        return (
            f"an observation costs {1e3 * cost:.3g} ms, a step {1e3 * step:.3g} ms: {100 * share:.2g} % of the training time at every={self.every}, "
            f"and the budget is {100 * self.budget:.3g} %. One in {wanted} steps is observed from here on; budget=None keeps every={self.every}."
        )

    def _measure(self) -> None:
        """Take in the windows whose marks have passed, in order."""
        while self._windows and (self._windows[0].state is WindowState.VOID or self._windows[0].passed()):
            window = self._windows.pop(0)
            if window.state is WindowState.VOID:
                continue
            cost, step = window.costs()
            if window.step != self.first:
                self._costs.append((cost, step))
            if window.step >= self.every and window.following is not None:
                self._shares.append((cost, window.begin.until(window.following)))


def _rounded_up(multiple: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    decade = 1
    while True:
        for digit in _ROUND:
            if digit * decade >= multiple:
                return digit * decade
        decade *= 10
