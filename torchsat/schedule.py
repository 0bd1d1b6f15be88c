"""Decides which steps are observed: step 0, the powers of two below `every`, and its multiples; fewer where that would cost more than the budget.

The cost of an observation is measured in two ways, and the larger one counts: the time that our own code took, and the difference between the
observed step and the few steps after it. The difference includes indirect costs, such as cold caches or a compiled model that runs eager. On a GPU
only the difference means anything. It is computed from events on the device's own clock, which are read after they have passed, so that nothing waits
for the device. Steps take different times, so medians are used. The first observation does not count, since it also finds out the structure of the
model.

The time between two steps, in which a batch is loaded or a whole validation runs, is not caused by torchsat. So the time before the model is called
counts as no more than one step.

The few observations below step `every` are not limited by the budget, since they show early that an initialisation is bad.

A *window* is one observation together with the steps up to the next one. When an observation is abandoned its window becomes void, and its times are
not used:

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
"""The cost of an observation is the median over this many windows."""
_FOLLOWERS = 5
"""An observed step is compared with this many steps after it."""
_ROUND = (1, 2, 5)
"""First digits of the factors by which `every` may be multiplied: 1, 2, 5, 10, 20, 50, ..."""
_SLACK = 0.7
"""An interval becomes shorter only if that would cost at most this share of the budget, so that it does not change back and forth."""


@dataclass(frozen=True)
class Mark:
    """A moment, on the clock of the host and, where there is one, of the device."""

    host: float
    event: torch.cuda.Event | None

    def passed(self) -> bool:
        """Whether the device has reached this moment."""
        return self.event is None or self.event.query()

    def until(self, later: Mark) -> float:
        """Seconds to a later mark; both must have passed."""
        if self.event is None or later.event is None:
            return later.host - self.host
        return float(self.event.elapsed_time(later.event)) / 1e3


class Clock:
    """The clocks of the host and of the device. A test hands a monitor a clock of its own."""

    seconds: Callable[..., float] = staticmethod(time.perf_counter)
    """The host's time in seconds, counted from an arbitrary moment. Every hook reads it twice, so it is the standard library's function itself."""

    def mark(self, device: torch.device | None) -> Mark:
        """This moment; on a GPU also the moment at which the device will have finished the work that is queued so far."""
        event = None
        if device is not None and device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
        return Mark(self.seconds(), event)


CLOCK = Clock()
"""The clock that `torchsat.watch` hands to a monitor. Tests put another one here."""


class WindowState(Enum):
    """The state of a window; see the module's docstring."""

    OPEN = "open"
    FINISHED = "finished"
    VOID = "void"


@dataclass(eq=False)
class Window:
    """The times of one observation and of the steps up to the next one."""

    step: int
    begin: Mark
    """The end of the step before the observed one."""
    entry: Mark | None = None
    """When the model was called for training; None where that was not seen."""
    own: float = 0.0
    """Seconds that our own code took."""
    end: Mark | None = None
    """When the observation was over; None before that."""
    followers: list[Mark] = field(default_factory=list)
    """The ends of the steps after the observed one."""
    following: Mark | None = None
    """When the next window began; None before that."""
    state: WindowState = WindowState.OPEN

    def enter(self, mark: Mark) -> None:
        """Note the first call of the model for training."""
        if self.entry is None:
            self.entry = mark

    def spend(self, seconds: float) -> None:
        """Add seconds that our own code took."""
        self.own += seconds

    def finish(self, mark: Mark) -> None:
        """Note the end of the observation."""
        if self.state is WindowState.OPEN:
            self.end, self.state = mark, WindowState.FINISHED

    def void(self) -> None:
        """Make the window void, since its observation was abandoned: its times are not used."""
        if self.state is WindowState.OPEN:
            self.state = WindowState.VOID

    def passed(self) -> bool:
        """Whether the window is complete and the device has reached all its marks, so that its times can be read."""
        return self.end is not None and self.following is not None and self.following.passed()

    def costs(self) -> tuple[float, float]:
        """The seconds that the observation cost, and the seconds that a step without an observation takes."""
        assert self.end is not None
        idle = 0.0 if self.entry is None else self.begin.until(self.entry)
        busy = self.begin.until(self.end) - idle
        ends = [self.end, *self.followers]
        if not self.followers:
            # No step was timed after it, so only the time of our own code is known.
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
        """The interval that the budget requires on this rank."""
        self.first = 0
        """The number of the first step. Its observation finds out the structure of the model, so its cost is not counted."""
        self.is_agreed = False
        """Whether several ranks agree on the interval. This rank then only says which interval it wants."""
        self.compares = False
        """Whether the caller is to report the end of each step with `follow`, so that the observed step can be compared with those after it."""
        self._windows: list[Window] = []
        """The windows whose times cannot be read yet, oldest first."""
        self._costs: deque[tuple[float, float]] = deque(maxlen=_WINDOWS)
        """For each of the last observations, its cost in seconds, and the seconds of a step without an observation."""
        self._shares: deque[tuple[float, float]] = deque(maxlen=2 * _WINDOWS)
        """For each of the last observations from step `every` on, its cost in seconds, and the seconds of its whole window."""
        self._said = every
        """The interval that the user was told last."""
        self._unsaid: str | None = None
        """A message that is held back, since the interval does not matter below step `every`."""

    def due(self, step: int) -> bool:
        """Whether this step is observed."""
        return step % self.interval == 0 or (step < self.every and step & (step - 1) == 0)

    @property
    def overhead(self) -> float | None:
        """The share of training time that the last observations took, from step `every` on; None before it is known."""
        whole = sum(seconds for _, seconds in self._shares)
        return sum(cost for cost, _ in self._shares) / whole if whole else None

    def begin(self, step: int, mark: Mark) -> Window:
        """Begin the window of an observation, and return it."""
        self._windows = [each for each in self._windows if each.state is not WindowState.VOID]
        if self._windows and self._windows[-1].following is None:
            self._windows[-1].following = mark
        window = Window(step, mark)
        self._windows.append(window)
        self.compares = False
        del self._windows[: -4 * _WINDOWS]
        return window

    def follow(self, mark: Mark) -> None:
        """Note the end of a step without an observation, as long as `compares` is true."""
        if self.compares:
            followers = self._windows[-1].followers
            followers.append(mark)
            self.compares = len(followers) < _FOLLOWERS

    def finish(self, window: Window, mark: Mark) -> None:
        """Note that the observation of this window is over."""
        window.finish(mark)
        self.compares = window.state is WindowState.FINISHED

    def spend(self, seconds: float) -> None:
        """Add seconds that our own code took outside of hooks. They count for the observation that began last."""
        if self._windows and self._windows[-1].state is not WindowState.VOID:
            self._windows[-1].spend(seconds)

    def agree(self, interval: int) -> str | None:
        """Set the interval that all ranks have agreed upon: the longest that any of them wants. Returns a message for the user if it has changed."""
        before, self.interval = self.interval, interval
        if interval == before:
            return None
        return (
            f"observing takes {'more' if interval > before else 'less'} than the budget of {100 * (self.budget or 1.0):.3g} % allows on the rank "
            f"where it takes most. One in {interval} steps is observed from here on; budget=None keeps every={self.every}."
        )

    def resume(self, interval: int) -> None:
        """Continue with the interval of an earlier session, if it is a multiple of `every` and there is a budget."""
        if interval % self.every == 0 and self.budget is not None:
            self.interval = self.wanted = interval

    def adjust(self, step: int) -> str | None:
        """Set the interval by what observations have cost so far, after the observation of this step.

        Returns:
            A message for the user if the interval has changed. Below step `every` the message is held back.
        """
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
        """Compute the interval that the budget requires. Returns a message for the user if it has changed."""
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
        """Read the times of the windows whose marks have all passed, oldest first."""
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
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not smaller than `multiple`."""
    decade = 1
    while True:
        for digit in _ROUND:
            if digit * decade >= multiple:
                return digit * decade
        decade *= 10
