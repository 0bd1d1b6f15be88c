"""How long an observation waits for the step that it is of. An observation costs in every pass, so one that waits in vain must not stay open.

- *Passes without a backward*: the steps of an environment before the first update, a model that only infers although gradients are on. After so many
  training passes in a row the observation is given up, without a word, and the step after the next step of an optimizer is observed in its place. An
  episode of reinforcement learning or a search may really take that many passes to one backward, so each time the limit is raised; an observation
  that ends well sets it by the most passes that it has seen.
- *Backwards without a step* of a torch optimizer, and none has ever stepped: the loop updates its parameters itself. The observation is given up, and
  one line says what to do. The limit is high, since a loop may as well collect the gradients of hundreds of micro-batches before its first step.
- *Steps of other models' optimizers* while this model is not called and nobody knows whether it is compiled: all compiled code of the process runs
  eager in that time, which other models should not suffer for long. Each time the limit is raised too, or some of many models that are trained in
  turn would never be observed.
"""

from __future__ import annotations

_PASSES = 64
_OTHERS = 8
_BACKWARDS = 512
_RAISE = 4
"""The factor by which a limit is raised when an observation was given up."""


class Patience:
    """The limits of one monitor."""

    def __init__(self) -> None:
        self._passes = _PASSES
        self._others = _OTHERS

    def is_over(self, passes: int) -> bool:
        """Whether an observation is to be given up after this many passes in a row without a backward."""
        if passes <= self._passes:
            return False
        self._passes *= _RAISE
        return True

    def is_over_for_others(self, steps: int) -> bool:
        """Whether an observation is to be given up after this many steps of other models."""
        if steps < self._others:
            return False
        self._others *= _RAISE
        return True

    def is_over_by_hand(self, backwards: int) -> bool:
        """Whether parameters are taken to be updated by hand after this many backwards, if no optimizer has ever stepped."""
        return backwards >= _BACKWARDS

    def ended(self, passes: int) -> None:
        """Note that an observation has ended with its step, in which at most this many passes went by without a backward."""
        self._passes = max(_PASSES, _RAISE * passes)
