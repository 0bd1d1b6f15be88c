"""Finds out when a training step is over, from the steps of single optimizers.

What torchsat counts as one step is a *round*, in which every optimizer that owns parameters of the model steps once: a GAN's two optimizers make one
step together. Which optimizers take part is learned from the first round. It is over when every parameter that has a gradient belongs to an optimizer
that has stepped. A later round is over when all optimizers of the round before have stepped, or when one of them steps a second time.

An optimizer's step may run another optimizer's step inside it (a wrapper, SAM); only the outermost counts. A step that raises an error never reaches
its end, so the steps that are running are looked up on the Python stack and not only remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from torchsat import internals


class Steps:
    """The optimizer steps of one model.

    Args:
        model: a function that returns the model, or None once the model no longer exists.
    """

    def __init__(self, model: Callable[[], nn.Module | None]) -> None:
        self._model = model
        self._owned: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        """For each optimizer, how many parameters it had when it was looked at, and whether one of them belongs to the model."""
        self._running: list[Optimizer] = []
        """The optimizers whose `step` is running, outermost first."""
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """The optimizers that have stepped since the last round ended."""
        self._members: weakref.WeakSet[Optimizer] | None = None
        """The optimizers that stepped in the last round; None before the first round has ended."""
        self.only: Callable[[], Optimizer | None] = _nobody
        """Returns the only optimizer of the last round, or None where there were several. With it a step that is not observed needs fewer checks."""

    @property
    def is_running(self) -> bool:
        """Whether an optimizer of the model is stepping."""
        return bool(self._running)

    def begins_short(self, optimizer: Optimizer) -> bool:
        """Note that a step begins, if this optimizer is the only one and no step is running. Returns whether that was so; otherwise call `begins`."""
        if self.only() is optimizer and not self._running:
            self._running.append(optimizer)
            return True
        return False

    def begins(self, optimizer: Optimizer) -> bool:
        """Note that an optimizer that owns parameters of the model begins to step. Returns whether it is the outermost one."""
        if self._running:
            self._running = [each for each in internals.steps_on_stack()[:-1] if self.owns(each)]
        self._running.append(optimizer)
        return len(self._running) == 1

    def ends(self, optimizer: Optimizer) -> bool:
        """Note that an optimizer has stepped. Returns whether it owns parameters of the model and was the outermost one."""
        if not self._running or self._running[-1] is not optimizer:
            return False
        self._running.pop()
        return not self._running

    def look_again(self) -> None:
        """Forget the steps that raised an error and so never ended. This is called when the model's forward begins."""
        if self._running:
            self._running = [each for each in internals.steps_on_stack() if self.owns(each)]

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer has stepped in the current round."""
        return optimizer in self._stepped

    def add(self, optimizer: Optimizer) -> bool:
        """Note that this optimizer has stepped in the current round. Returns whether the round is over."""
        self._stepped.add(optimizer)
        if self._members is not None:
            return set(self._members) <= set(self._stepped)
        model = self._model()
        if model is None:
            return True
        stepped = {id(parameter) for each in self._stepped for group in each.param_groups for parameter in group["params"]}
        # A subclass of Tensor may run code of the user's where an attribute is read.
        with internals.without_function_modes():
            return all(parameter.grad is None or id(parameter) in stepped for parameter in model.parameters())

    def end_round(self) -> None:
        """End the current round and begin a new one."""
        self._members, self._stepped = self._stepped, weakref.WeakSet()
        members = list(self._members)
        self.only = weakref.ref(members[0]) if len(members) == 1 else _nobody

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer has a parameter of the model."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._owned.get(optimizer)
        if known is None or known[0] != size:
            model = self._model()
            mine = {id(parameter) for parameter in model.parameters()} if model is not None else set()
            known = size, any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"])
            self._owned[optimizer] = known
        return known[1]

    def forget(self) -> None:
        """Forget all optimizers."""
        self._owned.clear()


def has_closure(args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether `step` was given a closure. The first of `args`, as torch passes them to a hook, is the optimizer itself."""
    return len(args) > 1 or kwargs.get("closure") is not None


def _nobody() -> None:
    """Returns None, like a weak reference to an optimizer that is gone."""
