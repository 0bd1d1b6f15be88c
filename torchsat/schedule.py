"""Decides which steps are observed: step 0, every power of two, and the multiples of `every` as long as the budget pays for them.

The budget is a share of the time of training and an allowance of 2 s beyond it. A multiple of `every` is observed if all observations of the run,
this one included, take no more than the allowance and that share of the time that the run has taken. So a short run, or one of a small network, is
observed exactly as the user asked. Once the allowance is spent, each observation waits until training has gone on for long enough to pay for it. What
an observation and a step take is known from those before. So the step from which on the next observation can be paid for (`earliest`) is computed
when an observation ends, and the steps in between only compare numbers. Powers of two are observed whatever they cost, since there are few of them.
They count, so that multiples of `every` wait longer.

What an observation costs is the time that our own code took, and beyond that the difference between the observed step and the few steps after it. The
difference contains indirect costs, such as cold caches or a compiled model that runs eager. Steps take different times, and a compilation may fall
into any of the first steps, so the median of the difference over the last observations stands for each of them, and one difference alone is not
believed. On a GPU only the difference means anything. It is computed from events on the device's own clock, which are read after they have passed, so
that nothing waits for the device. An observation whose times are not known yet is taken to cost what the last ones did.

The first observation does not count. It finds out the structure of the model, and on some machines it compiles our kernels. That happens once,
whatever the budget is; and if it counted, the first run on a machine would be observed at other steps than the second one.

The time of training is the number of steps times the median time of a step. A validation between two steps, or a night in which a notebook is idle,
is no training and pays for nothing. Nor is it a cost of an observation: the time before the model is called counts as no more than one step.

Where several ranks observe together, each says from which step on it can pay, and the latest of these steps counts. What a rank says at one
observation is acted upon at a later one, so it says it of the observation after that.

A *window* is one observation together with the steps up to the next one. When an observation is abandoned its window becomes void. The time that our
own code took still counts, and its other times are not used:

    OPEN --finish()--> FINISHED        OPEN --void()--> VOID
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

import torch

ALLOWANCE = 2.0
"""Seconds that the observations of a run may take beyond the budget's share of the training time."""
_WINDOWS = 8
"""What an observation and a step take are medians over this many windows."""
_FOLLOWERS = 5
"""An observed step is compared with this many steps after it."""


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


class Cost(NamedTuple):
    """What one observation took. All times are in seconds."""

    own: float
    """The time that our own code took, on the host's clock."""
    on_device: bool
    """Whether the other times are of a device's clock."""
    longer: float | None = None
    """By how much the observed step was longer than the steps after it; on the host's clock without `own`. It may be negative, since steps differ.
    None where no step was timed after it."""
    step: float = 0.0
    """The time of a step without an observation."""
    steps: int = 0
    """The number of steps in the window."""

    def charged(self, longer: float | None) -> float:
        """What the observation costs, if it made the step so much longer. On a device our own time stands in where nothing else is known."""
        if longer is None:
            return self.own
        return max(0.0, longer) + (0.0 if self.on_device else self.own)


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
    within: float = 0.0
    """Those of them that lie before the end of the observation. In the others, which lie in the steps after it, numbers arrive on the host."""
    end: Mark | None = None
    """When the observation was over; None before that."""
    followers: list[Mark] = field(default_factory=list)
    """The ends of the steps after the observed one."""
    following: Mark | None = None
    """When the next window began; None before that."""
    steps: int = 0
    """The number of steps up to the next window."""
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
            self.end, self.within, self.state = mark, self.own, WindowState.FINISHED

    def void(self) -> None:
        """Make the window void, since its observation was abandoned: its times are not used."""
        if self.state is WindowState.OPEN:
            self.state = WindowState.VOID

    def passed(self) -> bool:
        """Whether the window is complete and the device has reached all its marks, so that its times can be read."""
        return self.end is not None and self.following is not None and self.following.passed()

    def cost(self) -> Cost:
        """What the observation took, as far as its times can be read now."""
        on_device = self.begin.event is not None
        if self.end is None or not self.passed():
            return Cost(self.own, on_device)
        idle = 0.0 if self.entry is None else self.begin.until(self.entry)
        busy = self.begin.until(self.end) - idle
        within = 0.0 if on_device else self.within
        if not self.followers:
            return Cost(self.own, on_device, None, busy + idle - within, self.steps)
        step = statistics.median(one.until(other) for one, other in itertools.pairwise((self.end, *self.followers)))
        return Cost(self.own, on_device, busy + min(idle, step) - step - within, step, self.steps)


@dataclass(frozen=True)
class Account:
    """What observing has cost in a run, and the training that pays for it. All times are in seconds."""

    spent: float = 0.0
    """The time that all observations have taken."""
    trained: float = 0.0
    """The time that all steps have taken, without what observing took."""
    cost: float = 0.0
    """What one observation costs."""
    step: float = 0.0
    """The time of a step without an observation; 0 where it is not known yet."""

    def steps_until(self, observations: int, budget: float) -> float:
        """The number of steps from now on after which so many further observations can be paid for; 0 or less where they can be now."""
        if self.step <= 0:
            return 0.0
        # The training time, of which the budget is a share, includes observing.
        lacking = (1 - budget) * (self.spent + observations * self.cost) - budget * self.trained - ALLOWANCE
        return lacking / (budget * self.step)

    def interval(self, budget: float) -> float:
        """The number of steps that pay for one observation."""
        return (1 - budget) * self.cost / (budget * self.step) if self.step > 0 else 0.0


class Wish(NamedTuple):
    """What one rank, or all of them together, ask of the observations to come."""

    earliest: int
    """The first step at which a multiple of `every` may be observed."""
    interval: int
    """The number of steps between observations, powers of two aside, that this comes to."""


class Schedule:
    """Which steps are observed.

    Args:
        every: the interval that the user asked for.
        budget: the share of training time that observing may take beyond the allowance; None: any.
    """

    def __init__(self, every: int, budget: float | None) -> None:
        self.every = every
        self.budget = budget
        self.earliest = 0
        """No multiple of `every` below this step is observed, unless it is a power of two."""
        self.interval = every
        """The number of steps between observations, powers of two aside: `every`, or what the budget pays for."""
        self.first = 0
        """The number of the first step, whose observation does not count."""
        self.is_agreed = False
        """Whether several ranks agree on which steps are observed. This rank then only says what it wishes."""
        self.compares = False
        """Whether the caller is to report the end of each step with `follow`, so that the observed step can be compared with those after it."""
        self._windows: list[Window] = []
        """The windows whose times cannot be read yet, oldest first."""
        self._costs: deque[Cost] = deque()
        """What the last observations took whose times could be read."""
        self._before = Account()
        """The account of all observations before those."""
        self._shares: deque[tuple[float, float]] = deque(maxlen=2 * _WINDOWS)
        """For each of the last observations from step `every` on, its cost in seconds, and the seconds of its whole window."""
        self._wished = every
        """The interval that this rank wished last."""
        self._said: int | None = None
        """The interval that the user was told last; None: `every` is kept as far as the user knows."""

    def due(self, step: int) -> bool:
        """Whether this step is observed."""
        return step & (step - 1) == 0 or (step >= self.earliest and step % self.every == 0)

    @property
    def overhead(self) -> float | None:
        """The share of training time that the last observations took, from step `every` on; None before it is known."""
        whole = sum(seconds for _, seconds in self._shares)
        return sum(cost for cost, _ in self._shares) / whole if whole else None

    def begin(self, step: int, mark: Mark) -> Window:
        """Begin the window of an observation, and return it."""
        self._forget_void()
        if self._windows and self._windows[-1].following is None:
            self._windows[-1].following = mark
            # The number of the step falls where the user goes back to an earlier state.
            self._windows[-1].steps = max(0, step - self._windows[-1].step)
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

    def resume(self, account: Account) -> None:
        """Continue with the account of an earlier session. Where a run goes back to an earlier state of its own, what was spent since stays spent."""
        if account.spent > self.account(self.first).spent:
            self._before = account
            self._costs.clear()

    def account(self, step: int) -> Account:
        """The account at the end of this step. Observations whose times cannot be read yet are taken to cost what the last ones did."""
        longer, second = self._medians()
        pending = [window for window in self._windows if window.state is not WindowState.VOID]
        costs = [*self._costs, *(window.cost() for window in pending if window.step != self.first)]
        charges = [cost.charged(longer) for cost in costs]
        steps = sum(cost.steps for cost in self._costs) + (max(0, step + 1 - pending[0].step) if pending else 0)
        return Account(
            self._before.spent + sum(charges),
            self._before.trained + steps * second,
            statistics.median(charges[-_WINDOWS:]) if charges else self._before.cost,
            second,
        )

    def wish(self, step: int, lag: int = 0) -> Wish:
        """What the budget asks of the observations after this step.

        Args:
            lag: at the first observation after so many steps the ranks act upon what they wish now. 0: this rank is by itself and acts at once.
        """
        if self.budget is None:
            return Wish(0, self.every)
        account = self.account(step)
        # Nothing can be changed any more about the observations that come before the ranks act upon this, nor about the next one then.
        ahead = 2 + sum(map(self.due, range(step + 1, step + lag))) if lag else 1
        earliest = acted = step + lag
        while (later := step + math.ceil(account.steps_until(ahead + _powers(acted, earliest), self.budget))) > earliest:
            earliest = later
        interval = account.interval(self.budget)
        can_go_on = account.steps_until(_WINDOWS, self.budget) <= _WINDOWS * self.every
        if earliest <= (step // self.every + ahead) * self.every and (self._wished == self.every or can_go_on):
            interval = self.every
        self._wished = max(self.every, math.ceil(interval))
        return Wish(earliest, self._wished)

    def adjust(self, step: int) -> str | None:
        """Decide which steps are observed after the observation of this step.

        Returns:
            A message for the user if the interval has become another one.
        """
        self._measure()
        follows = None if self.is_agreed else self._take(step, self.wish(step))
        if follows is None:
            return None
        account = self.account(step)
        return (
            f"observing has taken {_readable(account.spent)} so far; its budget is {self._allowed}. An observation costs {_readable(account.cost)}, "
            f"a step {_readable(account.step)}. {follows}"
        )

    def agree(self, step: int, wish: Wish) -> str | None:
        """Take what all ranks together wish: the latest step, and the longest interval. Returns a message for the user if there is news in it."""
        follows = self._take(step, wish)
        return None if follows is None else f"the budget for observing is {self._allowed}, on the rank where observing costs most. {follows}"

    def _take(self, step: int, wish: Wish) -> str | None:
        """Act upon a wish. Returns what follows from it for the user; None where that is not new, or changes little, or step `every` is not near."""
        self.earliest, self.interval = wish
        after = self.every * (step // self.every + 1)
        coming = max(after, self.every * math.ceil(self.earliest / self.every))
        is_new = coming > after if self._said is None else not self._said / 2 < self.interval < 2 * self._said
        if not is_new or 2 * step < self.every:
            return None
        if coming == after and self.interval == self.every:
            self._said = None
            return f"From here on every={self.every} is kept again."
        self._said = self.interval
        return (
            f"Beside the powers of two, the next step to be observed is about {coming}, and then about one in {self.interval}; "
            f"budget=None keeps every={self.every}."
        )

    @property
    def _allowed(self) -> str:
        return f"{ALLOWANCE:g} s and {100 * (self.budget or 1.0):.3g} % of the training time"

    def _measure(self) -> None:
        """Read the times of the windows whose marks have all passed, oldest first."""
        self._forget_void()
        while self._windows and self._windows[0].passed():
            window = self._windows.pop(0)
            cost = window.cost()
            if window.step >= self.every and window.following is not None:
                self._shares.append((cost.charged(cost.longer), window.begin.until(window.following)))
            if window.step == self.first:
                # Its steps are training, but its first one may have compiled the model.
                _, step = self._medians()
                step = step or (cost.step if window.followers else 0.0)
                self._before = replace(self._before, trained=self._before.trained + cost.steps * step)
            else:
                self._costs.append(cost)
                if len(self._costs) > _WINDOWS:
                    self._settle()

    def _settle(self) -> None:
        """Move the oldest cost into the account of all before."""
        longer, step = self._medians()
        before, oldest = self._before, self._costs.popleft()
        self._before = replace(before, spent=before.spent + oldest.charged(longer), trained=before.trained + oldest.steps * step)

    def _forget_void(self) -> None:
        """Drop the windows that are void. The time that our own code took in them has been spent."""
        wasted = sum(window.own for window in self._windows if window.state is WindowState.VOID and window.step != self.first)
        self._before = replace(self._before, spent=self._before.spent + wasted)
        self._windows = [window for window in self._windows if window.state is not WindowState.VOID]

    def _medians(self) -> tuple[float | None, float]:
        """By how much observed steps were longer, None where that is not known, and the time of a step."""
        longer = [cost.longer for cost in self._costs if cost.longer is not None]
        steps = [cost.step for cost in self._costs]
        return statistics.median_low(longer) if len(longer) > 1 else None, statistics.median(steps) if steps else self._before.step


def _powers(after: int, before: int) -> int:
    """The number of powers of two between two steps."""
    return max(0, (before - 1).bit_length() - after.bit_length())


def _readable(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
