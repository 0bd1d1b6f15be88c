"""Follows the gradients of a model's parameters from the backward that computes them to the optimizer's step that uses them.

Which backwards have entered a step is told by what the user's program does with `.grad`, never by what the numbers are:

    RUNNING --ends, has added to .grad--> ADDED --an optimizer steps with it--> ENTERED
       |                                    +------.grad is emptied-----------> GONE
       +-----ends, torch.autograd.grad returned the gradients of parameters---> GIVEN
       +-----ends, no gradient of any parameter (an attack, a penalty)--------> NONE
       +-----an optimizer steps inside it, or it runs inside a step-----------> ENTERED

    ADDED, GONE and GIVEN --an optimizer steps with a .grad that the user has assigned--> ENTERED

A backward has entered the step of an optimizer if it added to the `.grad` of one of the optimizer's parameters and that is still there. `.grad` is
still there as long as it is the same tensor with the same version counter, whatever its values are: a gradient may be exactly zero. If it was changed
in place between two backwards, only its values tell zeroing from clipping or noise, and they are asked then. On a GPU the answer stays on the device.

If a step begins with a `.grad` that no backward has left there, the user has made it from gradients that were kept elsewhere (per-sample gradients,
gradient surgery, a buffer for accumulation). torch does not tell from which, so that all backwards since the last step have entered.

Nothing here keeps a gradient or a graph alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from torchsat import internals
from torchsat.internals import Accumulation
from torchsat.sharding import local


class Fate(Enum):
    """What has become of the gradients that one backward computed; see the diagram in the module's docstring."""

    RUNNING = "running"
    ADDED = "added"
    GIVEN = "given"
    NONE = "none"
    GONE = "gone"
    ENTERED = "entered"


State = tuple[weakref.ref[Tensor], int]
"""A weak reference to the `.grad` of a parameter, and the version of that tensor. Python has one such reference for each tensor, so that two are the
same object if they are of the same tensor."""


@dataclass(eq=False)
class Backward:
    """One backward pass of the user's program."""

    accumulation: Accumulation
    before: dict[int, State]
    """What `.grad` of each parameter was when it began."""
    fate: Fate = Fate.RUNNING
    added: set[int] = field(default_factory=set)
    """The parameters to whose `.grad` it has added, by id, as long as that is still there."""
    doubtful: dict[int, Tensor] = field(default_factory=dict)
    """Those of them whose `.grad` was changed in place since, with a flag on its device: whether there is a value other than zero."""

    def lose(self, parameters: Iterable[int]) -> bool:
        """Note that `.grad` of these parameters was emptied. Returns whether nothing is left of what this backward has added."""
        self.added.difference_update(parameters)
        if not self.added and self.fate is Fate.ADDED:
            self.fate = Fate.GONE
        return self.fate is Fate.GONE

    def enter(self, owned: set[int] | None) -> None:
        """Note that an optimizer steps. `owned`: its parameters that have a gradient; None: it uses what this backward has computed in any case."""
        if owned is None:
            self.fate, self.doubtful = Fate.ENTERED, {}
        elif self.fate is Fate.ADDED and not self.added.isdisjoint(owned):
            self.fate = Fate.ENTERED
            used = self.added & owned
            self.doubtful = {each: self.doubtful[each] for each in used} if used <= self.doubtful.keys() else {}

    @property
    def holds(self) -> Tensor | None:
        """A flag on the device: whether what it has added was still there when it entered; None: it certainly was."""
        if not self.doubtful:
            return None
        flags = list(self.doubtful.values())
        return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


class Gradients:
    """The backwards of one observation."""

    def __init__(self) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._running: dict[int, Backward] = {}
        """The backwards that run now, by the number that torch gives them: one, and those that it runs inside, as a reentrant checkpoint does."""
        self._kept: list[Backward] = []
        """The backwards that may still enter a step, once they have ended."""
        self._left: dict[int, State] = {}
        """What `.grad` of each parameter was when the last backward ended."""
        self.gone = 0
        """How often all that a backward had added was emptied, and no optimizer had stepped with it."""
        self.unused = 0
        """Number of backwards that computed gradients of parameters since an optimizer has stepped."""
        self._entering: list[tuple[Backward, Fate]] = []
        """The backwards that have entered the step that runs, with what they were before."""
        self.is_stepping = False
        """Whether an optimizer of the model is stepping. It uses what its closure computes, wherever it keeps that."""

    def watch(self, model: nn.Module) -> None:
        """Set the model. It is not kept alive."""
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model; None where it is gone."""
        return self._model()

    def is_running(self, backward: Backward) -> bool:
        """Whether this backward has not ended."""
        return backward in self._running.values()

    def running(self, call_at_end: Callable[[Callable[[], None]], Callable[[], None]]) -> Backward | None:
        """The backward that runs now, noted when it is asked for first; None where torch does not say which one it is, as in compiled autograd.

        Args:
            call_at_end: makes of a function of ours one that may be called when the backward ends.
        """
        number = internals.backward_number()
        if number is None:
            return None
        backward = self._running.get(number)
        if backward is None:
            states = self._states()
            if not self._running:
                self._look_for_losses(states)
            backward = self._running[number] = Backward(internals.accumulation(self._parameters()), states)
            internals.after_backward(call_at_end(lambda: self._ends(number)))
        return backward

    def forget_failed(self) -> None:
        """Forget the backwards that are running, and a step that runs without a closure. It is called where there is none: they raised an error."""
        for backward, fate in self._entering:
            backward.fate, self.is_stepping = fate, False
        self._entering = []
        for each in self._running.values():
            each.fate = Fate.NONE if each.fate is Fate.RUNNING else each.fate
        self._running.clear()

    def enter_step(self, parameters: Iterable[Tensor]) -> None:
        """Note that an optimizer with these parameters steps."""
        if internals.in_backward():
            for each in self._running.values():
                each.enter(None)
        else:
            self.forget_failed()
        owned, assigned = set[int](), False
        for parameter in parameters:
            grad = parameter.grad
            if grad is not None:
                owned.add(id(parameter))
                left = self._left.get(id(parameter))
                assigned = assigned or left is None or left[0]() is not grad
        self._entering = [(backward, backward.fate) for backward in self._kept]
        # Inside a backward, what it has left in `.grad` is not known yet.
        for backward in self._kept:
            backward.enter(None if assigned and not self._running else owned)

    def has_stepped(self) -> None:
        """Note that the step has not raised an error."""
        self._entering, self.unused = [], 0
        self._kept = [backward for backward in self._kept if backward.fate is not Fate.ENTERED]

    def take_over(self, earlier: Gradients) -> None:
        """Take over the backwards of an earlier observation that have not entered a step."""
        self._kept += [each for each in earlier._kept if each.fate is not Fate.ENTERED]
        self._left = earlier._left

    def _ends(self, number: int) -> None:
        backward = self._running.pop(number, None)
        if backward is None:
            return
        self._left = self._states()
        if backward.fate is not Fate.RUNNING:
            return
        backward.added = {
            key
            for key, state in self._left.items()
            if (before := backward.before.get(key)) is None or before[0] is not state[0] or before[1] != state[1]
        }
        backward.before = {}
        if backward.added:
            backward.fate = Fate.ADDED
        elif backward.accumulation is Accumulation.ADDS:
            # A hook took the gradients as they came, to keep them elsewhere or to step with them.
            backward.fate = Fate.ENTERED
        else:
            backward.fate = Fate.GIVEN if backward.accumulation is Accumulation.GIVES else Fate.NONE
        if self.is_stepping and backward.fate in (Fate.ADDED, Fate.GIVEN):
            backward.fate = Fate.ENTERED
        self.unused += backward.fate is not Fate.NONE
        if backward.fate in (Fate.ADDED, Fate.GIVEN):
            self._kept.append(backward)

    def _look_for_losses(self, now: dict[int, State]) -> None:
        """Find out which gradients were emptied since the last backward ended."""
        if not any(each.fate is Fate.ADDED for each in self._kept):
            return
        lost, flags = {key for key in self._left if key not in now}, dict[int, Tensor]()
        for key in self._left.keys() & now.keys():
            (before, version), (present, changed) = self._left[key], now[key]
            grad = present()
            if grad is None or present is not before or version == changed:
                continue
            flag = internals.stored(local(grad)).count_nonzero() > 0
            if flag.device.type != "cpu":
                flags[key] = flag
            elif not flag:
                lost.add(key)
        for each in self._kept:
            if each.fate is Fate.ADDED:
                self.gone += each.lose(lost)
                each.doubtful.update({key: flags[key] & each.doubtful.get(key, flags[key]) for key in flags.keys() & each.added})

    def _parameters(self) -> list[nn.Parameter]:
        model = self.model
        return [] if model is None else [each for each in model.parameters() if each.requires_grad]

    def _states(self) -> dict[int, State]:
        return {id(each): (weakref.ref(grad), internals.version(local(grad))) for each in self._parameters() if (grad := each.grad) is not None}
