"""The training loop as torchsat sees it: when a step ends, and whether the next one is observed.

torch calls our hooks around the step of every optimizer (process.py), and steps.py finds out from these calls when a training step is over. In a loop
without a torch optimizer the user calls `monitor.step()` instead. At the end of each step it is decided whether the next one is observed: the
schedule or a reason to observe again (observer.py) may ask for it. On a step that is not observed, only a few lines of `before_step` and `after_step`
run, and nothing else of ours.

Nothing here may stop training: a failure is reported once through `logging`, and what failed is no longer watched.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchsat import internals, process
from torchsat.claims import Claim
from torchsat.compiling import Mode
from torchsat.internals import hidden_from_modes
from torchsat.observe.hooks import is_capturing
from torchsat.observe.observation import Observation, Retry
from torchsat.observe.passes import PassEvent
from torchsat.observer import Observer
from torchsat.options import Options
from torchsat.patience import Patience
from torchsat.schedule import Account, Clock
from torchsat.steps import Entry, Steps, has_closure
from torchsat.transport import meeting

log = logging.getLogger("torchsat")

_NO_STEP = (
    "torchsat: %d backward passes have computed gradients of %s, and no step of a torch optimizer that owns its parameters was seen; nothing can be "
    "shown. Call monitor.step() at the end of each step."
)
_STEPS_WITHOUT_OURS, _STEPS_WITHOUT_PARAMETERS = 200, 8
"""After this many steps of other optimizers and none of one that owns parameters of the model, the user is told: the second number where the model
has no parameters, so that it never has such an optimizer."""
_CAPTURED = (
    "torchsat: a training step of %s was captured in a CUDA graph. Capturing executes nothing, and a replay runs no Python, so these steps are "
    "neither measured nor counted; steps outside the graph are. To have all of them measured, train eagerly or with torch.compile, whose "
    'mode="reduce-overhead" captures CUDA graphs for you.'
)


class Driver(Enum):
    """What ends a step. OPTIMIZERS -> BY_HAND: `monitor.step()` was called."""

    OPTIMIZERS = "optimizers"
    BY_HAND = "by_hand"


class Loop:
    """Finds the training steps of one model, and has the observer measure those that are due.

    Args:
        model: the model that is watched. It is not kept alive, unless it is our own module around the stages of a pipeline.
        stages: the stages of a pipeline, keyed by the name that their sites begin with; empty for any other model.
        clock, claim: the clocks of the host and the device, and what the monitor has for itself.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, Any], options: Options, clock: Clock, claim: Claim) -> None:
        self.step = 0
        """The number of the current step."""
        self.is_closed = False
        self.observer = Observer(model, stages, options, clock, self._on_pass)
        self._wrapper = model if stages else None
        """Strong reference to our module around the stages of a pipeline. Nobody else keeps it; `_model` is weak."""
        self._model = weakref.ref(model)
        self._options = options
        self._driver = Driver.OPTIMIZERS
        self._was_captured = False
        """Whether the user has been told that a step was captured in a CUDA graph."""
        self._was_told = False
        """Whether the user has been told that no step of an optimizer was seen."""
        self._steps = Steps(self._model)
        self._awaited: int | None = None
        """The number of the backward in which an optimizer has stepped, so that the round may be over when it ends."""
        self._is_early = False
        """Whether the open observation is of the next round, and was opened before it is known that this round is over."""
        self._patience = Patience()
        self._foreign_steps: int | None = 0
        """Number of steps of other optimizers. None once an optimizer that owns parameters of the model has stepped, or the user has been told."""
        self._watcher = process.Watcher(self.before_step, self.after_step, self.close, self.save, self.observer.fail, self._stop, claim)

    def start(self) -> None:
        """Begin to watch: from now on our process-wide hooks call this loop at every optimizer step. An error that `errors="raise"` lets through is
        raised, after everything has been taken off again."""
        self.step = self.observer.delivery.resume(self._options.log_dir, self._options.start)
        process.join(self._watcher)
        try:
            self.observer.begin(self.step)
        except Exception:
            self.close()
            raise

    def resume(self, step: int, turn: int, account: Account) -> None:
        """Continue with the step, turn and account of a saved session."""
        self.step = step
        if not self.is_closed:
            self.observer.resume(step, turn, account)

    def end_step(self) -> None:
        """End a step by hand. From then on the steps of optimizers are ignored."""
        self._driver, observer = Driver.BY_HAND, self.observer
        if is_capturing():
            self._say_captured()
            return
        with hidden_from_modes(), observer.never_raising(), observer.timed():
            if observer.observation is not None:
                observer.observation.after_step(None)
            self._end_round()

    def close(self) -> None:
        """Stop watching, and leave nothing behind: no hook, thread or open file."""
        if self.is_closed:
            return
        process.leave(self._watcher)
        observation = self.observer.observation
        if observation is not None and observation.passes.gradients.gone > 1:
            self._say_no_step(observation)
        self._stop()
        self.flush()
        self.observer.close()

    def flush(self) -> None:
        """Wait for every observation in flight, and for the sinks."""
        with self.observer.never_raising():
            self.observer.drain(self.step, wait=meeting.CLOSING if self.is_closed else meeting.PATIENCE)
        self.observer.delivery.flush()

    def save(self) -> None:
        """Write what has arrived on the host, since the process may be about to end. Called on a thread of its own, while this one is interrupted."""
        with self.observer.never_raising():
            self.observer.drain(self.step)
        self.observer.delivery.flush()

    def _stop(self) -> None:
        """Take everything off the model, without touching files or threads. A forked child may do no more than this."""
        self.is_closed = True
        self._steps.forget()
        self.observer.abandon(None)
        self.observer.compilation.take_off()

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called when any optimizer of the process is about to step, whichever model it belongs to."""
        observer = self.observer
        if self.is_closed or observer.faults.ended is not None:
            return
        if self._model() is None:
            self.close()
            return
        if self._driver is Driver.BY_HAND:
            if observer.observation is not None and self._steps.owns(optimizer):
                observer.observation.enters_step(optimizer)
                observer.observation.passes.gradients.has_stepped()
            return
        if is_capturing():
            if self._steps.owns(optimizer):
                self._say_captured()
            return
        observation = observer.observation
        if observation is None and self._steps.begins_short(optimizer):
            return
        if not self._steps.owns(optimizer):
            if self._foreign_steps is not None:
                self._count_foreign()
            if observation is not None and observer.compilation.mode is Mode.UNKNOWN:
                observation.steps_of_others += 1
                if self._patience.is_over_for_others(observation.steps_of_others):
                    observer.abandon(Retry.OTHER_MODEL)
            return
        self._foreign_steps = None
        entry = self._steps.begins(optimizer)
        if entry is Entry.INNER or (observer.observation is None and (entry is not Entry.NEXT or self._steps.is_over)):
            return
        with torch.no_grad(), observer.timed():
            if entry is Entry.NEXT and not self._steps.is_over:
                self._end_round()
                if observation is not None and observation is not observer.observation and observer.observation is not None:
                    observer.observation.passes.take_over(observation.passes)
            if observer.observation is not None and not self._is_of_other_round(entry):
                observer.observation.before_step(optimizer, has_closure(args, kwargs))

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called when any optimizer of the process has stepped."""
        if self.is_closed or self._driver is Driver.BY_HAND:
            return
        entry = self._steps.ends(optimizer)
        if entry is None:
            return
        observer = self.observer
        idle = observer.observation is None and observer.retry is None and not observer.delivery.in_flight
        if idle and entry is Entry.ONLY and not observer.schedule.due(self.step + 1):
            self.step += 1
            self._steps.turn += 1
            if observer.schedule.compares:
                observer.schedule.follow(observer.clock.mark(observer.device))
            return
        backward = internals.backward_number()
        if backward is not None and backward == self._awaited and observer.observation is None:
            self._steps.enter(optimizer)
            return
        with torch.no_grad(), observer.timed():
            self._steps.enter(optimizer)
            if observer.observation is not None:
                if self._is_of_other_round(entry):
                    observer.observation.enters_other_round(optimizer)
                else:
                    observer.observation.after_step(optimizer, has_closure(args, kwargs))
            if backward is not None:
                self._wait_for_backward(backward)
            elif self._steps.is_complete():
                self._end_round()
            elif observer.observation is None and not self._steps.is_over:
                # The next pass belongs to this round, if another optimizer steps with it, or to the next one, which is to be observed.
                self._is_early = self._open_if_due(self.step + 1)

    def _is_of_other_round(self, entry: Entry) -> bool:
        """Whether a step belongs to the round before the one that is observed."""
        return entry is Entry.LATE or self._is_early

    def _wait_for_backward(self, number: int) -> None:
        """Have the round end when the backward has ended in which an optimizer has just stepped, since other parameters will be stepped in it."""
        if self._awaited != number:
            self._awaited = number
            internals.after_backward(self._backward_ended)

    def _backward_ended(self) -> None:
        """Called when a backward has ended in which an optimizer has stepped."""
        self._awaited = None
        # A backward inside another one, as of a reentrant checkpoint, steps a part of the parameters. The round then ends when the next one begins.
        if not self.is_closed and not internals.is_nested_backward() and self._steps.is_complete():
            with self.observer.never_raising(), self.observer.timed():
                self._end_round()

    def _say_captured(self) -> None:
        """Tell the user once that a step which is captured in a CUDA graph, and is not executed now, will not be observed."""
        if not self._was_captured:
            self._was_captured = True
            log.warning(_CAPTURED, self.observer.delivery.model)

    def _count_foreign(self) -> None:
        """Count a step of an optimizer that owns nothing of the model, as long as no other one has stepped, and tell the user after a while."""
        assert self._foreign_steps is not None
        self._foreign_steps += 1
        model = self._model()
        has_parameters = model is not None and next(model.parameters(), None) is not None
        if self._foreign_steps >= (_STEPS_WITHOUT_OURS if has_parameters else _STEPS_WITHOUT_PARAMETERS):
            self.observer.delivery.say_no_step(self._foreign_steps)
            self._foreign_steps = None

    def _say_no_step(self, observation: Observation) -> None:
        """Tell the user once that a loop without a torch optimizer has to say where its steps end."""
        if self._driver is Driver.OPTIMIZERS and not self._steps.has_stepped and not self._was_told:
            self._was_told = True
            log.warning(_NO_STEP, observation.passes.gradients.unused, self.observer.delivery.model)

    def _end_round(self) -> None:
        """End the current step: finish its observation, if there is one, and open an observation of the next step, if one is due."""
        observer = self.observer
        observer.drain(self.step)
        early, self._is_early = self._is_early and observer.observation is not None, False
        if observer.observation is not None and not early:
            self._patience.ended(observer.observation.passes.most_waiting)
            self.step = observer.finish(observer.observation, self.step)
            process.catch_sigterm()
        elif observer.schedule.compares:
            observer.schedule.follow(observer.clock.mark(observer.device))
        self.step += 1
        self._steps.end_round()
        if not early:
            self._open_if_due(self.step)

    def _open_if_due(self, step: int) -> bool:
        """Open an observation of this step, if one is due. Returns whether that was so."""
        observer = self.observer
        if self.is_closed or not (observer.schedule.due(step) or observer.retry is not None):
            return False
        observer.open(step)
        return True

    def _on_pass(self, event: PassEvent, training: bool) -> None:
        """Called during an observation with each event of a pass."""
        self.observer.heard(event, training)
        observation = self.observer.observation
        if event is PassEvent.ENTERED and training and observation is not None:
            self._steps.look_again()
            observation.passes.gradients.is_stepping = self._steps.is_running
        if event in (PassEvent.ENTERED, PassEvent.REPEATED) and training and observation is not None:
            self._lose_patience(observation)

    def _lose_patience(self, observation: Observation) -> None:
        """Give an observation up if it has waited for too long. Other ranks would wait for its numbers, so that it goes on where there are some."""
        if self._steps.is_running or self.observer.route.waits_for_others:
            return
        by_hand = not self._steps.has_stepped and self._patience.is_over_by_hand(observation.passes.gradients.unused)
        if by_hand:
            self._say_no_step(observation)
        if by_hand or self._patience.is_over(observation.passes.waiting):
            self.observer.abandon(Retry.NO_STEP)
