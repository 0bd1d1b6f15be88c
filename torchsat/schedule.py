"""When to observe: step 0, the powers of two below `every`, its multiples; and less often where that would cost more than the budget.

What an observation costs is measured in two ways, and the larger counts: the time that our own code took, and by how much the observed step was
longer than the few steps behind it (which also sees what our code does to others: caches, a compiled model run eager). On a GPU only the second
means anything; it is taken from events on the device's own clock, read once they have passed, so that nobody waits. One step is not like another,
hence medians; the first observation, which finds out the structure of the model, does not count.

What lies between two steps (a batch is loaded, a whole validation runs) is no cost of ours: the time before the model is entered counts for at most
one step.

The handful of observations below `every` is outside the budget: it is what tells early that an initialisation is bad.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from dataclasses import dataclass, field

import torch

_WINDOWS = 8
"""Observations that the cost is the median of."""
_FOLLOWERS = 5
"""Steps behind an observation that it is compared with."""
_ROUND = (1, 2, 5)
_SLACK = 0.7
"""An interval becomes shorter only where that would cost this share of the budget at most: it must not swing to and fro."""


@dataclass(frozen=True)
class Mark:
    """A moment, on the clock of the host and, where there is one, of the device."""

    host: float
    event: torch.cuda.Event | None

    @staticmethod
    def now(device: torch.device | None) -> Mark:
        event = None
        if device is not None and device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
        return Mark(time.perf_counter(), event)

    def passed(self) -> bool:
        return self.event is None or self.event.query()

    def until(self, later: Mark) -> float:
        """Seconds to a later mark; both must have passed."""
        if self.event is None or later.event is None:
            return later.host - self.host
        return float(self.event.elapsed_time(later.event)) / 1e3


@dataclass
class Window:
    """One observation and the steps up to the next."""

    step: int
    begin: Mark
    """The end of the step before."""
    entry: Mark | None = None
    """The model was entered for training; None where that was not seen."""
    own: float = 0.0
    """Seconds of our own code."""
    end: Mark | None = None
    followers: list[Mark] = field(default_factory=list)
    """The ends of the next steps."""
    following: Mark | None = None
    """The begin of the next window."""

    def passed(self) -> bool:
        """Whether all its marks have."""
        return self.end is not None and self.following is not None and self.following.passed()

    def costs(self) -> tuple[float, float]:
        """Seconds of the observation and of a step without."""
        assert self.end is not None
        idle = 0.0 if self.entry is None else self.begin.until(self.entry)
        busy = self.begin.until(self.end) - idle
        ends = [self.end, *self.followers]
        if not self.followers:
            # Nothing to compare with but our own time.
            return (self.own, busy + idle - self.own) if self.end.event is None else (0.0, busy + idle)
        step = statistics.median(one.until(other) for one, other in itertools.pairwise(ends))
        return max(busy + min(idle, step) - step, self.own if self.end.event is None else 0.0), step


@dataclass
class Schedule:
    """Which steps are observed.

    Args:
        every: the interval that the user asked for.
        budget: the share of training time that observing may take; None: any.
    """

    every: int
    budget: float | None
    interval: int = 0
    """The interval now: `every`, or a multiple of it."""
    compares: bool = False
    """The ends of the steps are asked for."""
    _open: list[Window] = field(default_factory=list)
    """Those whose marks have not all passed."""
    _costs: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOWS))
    """Of the last windows: seconds of the observation and of an unobserved step."""
    _shares: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=2 * _WINDOWS))
    """Seconds of the observation and of the window, from step `every` on."""

    _said: int = 0
    """The interval that the user knows of."""
    _unsaid: str | None = None

    first: int = 0
    """The number of the first step, which finds out the structure of the model."""
    wanted: int = 0
    """The interval that the budget asks for."""
    shared: bool = False
    """Several ranks agree on the interval: here it is only wanted."""

    def __post_init__(self) -> None:
        self.interval = self.wanted = self._said = self.every

    def due(self, step: int) -> bool:
        """Whether this step is observed."""
        return step % self.interval == 0 or (step < self.every and step & (step - 1) == 0)

    @property
    def overhead(self) -> float | None:
        """The share of training time that the last observations took, from step `every` on; None before it is known."""
        whole = sum(seconds for _, seconds in self._shares)
        return sum(cost for cost, _ in self._shares) / whole if whole else None

    def begin(self, step: int, mark: Mark) -> None:
        """An observation begins."""
        if self._open and self._open[-1].following is None:
            self._open[-1].following = mark
        self._open.append(Window(step, mark))
        self.compares = False
        del self._open[: -4 * _WINDOWS]

    def enter(self, mark: Mark) -> None:
        """The model is entered for training."""
        if self._open and self._open[-1].entry is None:
            self._open[-1].entry = mark

    def follow(self, mark: Mark) -> None:
        """A step without an observation is over, while `compares`."""
        if self._open:
            self._open[-1].followers.append(mark)
            self.compares = len(self._open[-1].followers) < _FOLLOWERS

    def spend(self, seconds: float) -> None:
        """Our own code ran."""
        if self._open:
            self._open[-1].own += seconds

    def end(self, mark: Mark) -> None:
        """The observation is over."""
        if self._open:
            self._open[-1].end = mark
            self.compares = True

    def adjust(self, step: int) -> str | None:
        """Set the interval by what is known after the observation of this step; in words, if it has changed. Below `every` it does not matter yet."""
        sentence = self._stretch()
        if self.shared:
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
        while self._open and self._open[0].passed():
            window = self._open.pop(0)
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
