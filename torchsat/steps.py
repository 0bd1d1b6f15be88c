"""Finds out when a training step is over, from the steps of single optimizers.

What torchsat counts as one step is a *round*, in which **no parameter of the model is stepped twice**. An optimizer that would step a parameter again
begins the next round. So a body and a head with an optimizer each make one step together, a discriminator that is trained twice for each step of its
generator makes two, an optimizer that is made anew goes on where the old one was, and a backward in which each parameter is stepped as soon as its
gradient is there is one step. The number of a step is a function of the order in which optimizers step, and of nothing else.

Whether a round is over shows for sure only when the next one begins, which is late. So it is taken to be over as soon as no further optimizer is
expected in it: each other one that has stepped lately, going by the most rounds from one of its steps to the next, has stepped in it, or owns
parameters that were stepped in it already. If another one steps all the same, and none of its parameters was stepped in the round that is over, it
joins that round: no step is counted for it, and it is expected from then on. In the first round nothing is known, and it is over when every parameter
that has a gradient was stepped. While a backward runs no round is over.

An optimizer's step may run another optimizer's step inside it (a wrapper, SAM); only the outermost counts. A step that raises an error never reaches
its end, so the steps that are running are looked up on the Python stack and not only remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from torch import nn
from torch.optim import Optimizer

from torchsat import internals


class Entry(Enum):
    """How the step of an optimizer stands to the rounds."""

    ONLY = "only"
    """It is a round: no other optimizer is expected."""
    INNER = "inner"
    """It runs inside the step of another optimizer, and does not count."""
    SAME = "same"
    """It belongs to the round that is not over."""
    LATE = "late"
    """It belongs to the round that was taken to be over."""
    NEXT = "next"
    """It begins the next round."""


@dataclass(eq=False)
class _Member:
    """What is known of one optimizer."""

    size: int
    """Number of its parameters when it was looked at."""
    owned: frozenset[int]
    """Those that belong to the model, by id."""
    last: int | None = None
    """The round in which it stepped last; None where it has not stepped yet."""
    gap: int = 1
    """The most rounds from one step of it to the next."""

    def is_expected(self, turn: int) -> bool:
        """Whether it is to be expected in this round."""
        return self.last is not None and turn - self.last <= 2 * self.gap


class Steps:
    """The optimizer steps of one model.

    Args:
        model: a function that returns the model, or None once the model no longer exists.
    """

    def __init__(self, model: Callable[[], nn.Module | None]) -> None:
        self._model = model
        self._members: weakref.WeakKeyDictionary[Optimizer, _Member] = weakref.WeakKeyDictionary()
        self._running: list[Optimizer] = []
        """The optimizers whose `step` is running, outermost first."""
        self.turn = 0
        """The number of the round. A round of the only optimizer, of which nothing else is to be known, is counted here by the caller."""
        self._stepped: set[int] = set()
        """The parameters that were stepped in this round, by id."""
        self.is_over = True
        """Whether the round is taken to be over. Before the first step it is."""
        self._entry = Entry.NEXT
        """How the outermost step that is running, or has run last, stands to the rounds."""
        self._only: Callable[[], Optimizer | None] = _nobody
        """Returns the only optimizer that is expected, or None where there are several. With it a step that is not observed needs fewer checks."""

    @property
    def is_running(self) -> bool:
        """Whether an optimizer of the model is stepping."""
        return bool(self._running)

    @property
    def has_stepped(self) -> bool:
        """Whether an optimizer of the model has ever stepped."""
        return bool(self._stepped)

    def begins_short(self, optimizer: Optimizer) -> bool:
        """Note that a step begins, if this optimizer is the only one and no step is running. Returns whether that was so; otherwise call `begins`."""
        if self._only() is optimizer and not self._running:
            self._running.append(optimizer)
            self._entry = Entry.ONLY
            return True
        return False

    def begins(self, optimizer: Optimizer) -> Entry:
        """Note that an optimizer that owns parameters of the model begins to step."""
        if self._running:
            self._running = [each for each in internals.steps_on_stack()[:-1] if self.owns(each)]
        self._running.append(optimizer)
        if len(self._running) > 1:
            return Entry.INNER
        if self._stepped and self._look_at(optimizer).owned.isdisjoint(self._stepped):
            self._entry = Entry.LATE if self.is_over else Entry.SAME
        else:
            self._entry = Entry.NEXT
        return self._entry

    def enter(self, optimizer: Optimizer) -> None:
        """Note that the optimizer whose step has ended has stepped in a round, which is the next one unless `begins` has said otherwise."""
        member, only = self._look_at(optimizer), self._only()
        if only is not None:
            self._members[only].last = self.turn
        if self._entry in (Entry.NEXT, Entry.ONLY):
            self.turn += 1
            self._stepped.clear()
            self.is_over = False
        self._stepped |= member.owned
        if member.last is not None:
            member.gap = max(member.gap, self.turn - member.last)
        member.last = self.turn
        self._only = _nobody

    def ends(self, optimizer: Optimizer) -> Entry | None:
        """Note that an optimizer has stepped. Returns how its step stands to the rounds; None if it owns no parameter of the model or was an inner
        one."""
        if not self._running or self._running[-1] is not optimizer:
            return None
        self._running.pop()
        return None if self._running else self._entry

    def look_again(self) -> None:
        """Forget the steps that raised an error and so never ended. This is called when the model's forward begins."""
        if self._running:
            self._running = [each for each in internals.steps_on_stack() if self.owns(each)]

    def is_complete(self) -> bool:
        """Whether the round that is not over yet is over now, since no further optimizer is expected in it."""
        if self.is_over:
            return False
        if self.turn > 1:
            return not any(
                each.last != self.turn and each.is_expected(self.turn) and each.owned.isdisjoint(self._stepped) for each in self._members.values()
            )
        model = self._model()
        if model is None:
            return True
        # A subclass of Tensor may run code of the user's where an attribute is read.
        with internals.without_function_modes():
            return all(each.grad is None or id(each) in self._stepped for each in model.parameters())

    def end_round(self) -> None:
        """Note that the round is over."""
        self.is_over = True
        expected = [optimizer for optimizer, each in self._members.items() if each.is_expected(self.turn + 1)]
        is_alone = len(expected) == 1 and self._members[expected[0]].last == self.turn
        self._only = weakref.ref(expected[0]) if is_alone else _nobody

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer has a parameter of the model."""
        return bool(self._look_at(optimizer).owned)

    def forget(self) -> None:
        """Forget all optimizers."""
        self._members.clear()

    def _look_at(self, optimizer: Optimizer) -> _Member:
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._members.get(optimizer)
        if known is None or known.size != size:
            model = self._model()
            mine = {id(parameter) for parameter in model.parameters()} if model is not None else set()
            owned = frozenset(id(parameter) for group in optimizer.param_groups for parameter in group["params"] if id(parameter) in mine)
            known = _Member(size, owned) if known is None else replace(known, size=size, owned=owned)
            self._members[optimizer] = known
        return known


def has_closure(args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether `step` was given a closure. The first of `args`, as torch passes them to a hook, is the optimizer itself."""
    return len(args) > 1 or kwargs.get("closure") is not None


def _nobody() -> None:
    """Returns None, like a weak reference to an optimizer that is gone."""
