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

from torchsat import process
from torchsat.compiling import Mode
from torchsat.internals import hidden_from_modes
from torchsat.observe.hooks import is_capturing
from torchsat.observe.observation import Observation, Retry
from torchsat.observe.passes import Pass, PassEvent
from torchsat.observer import Observer
from torchsat.options import Options
from torchsat.schedule import Clock
from torchsat.steps import Steps, has_closure
from torchsat.transport import meeting

log = logging.getLogger("torchsat")

_PASSES_WITHOUT_STEP = 200
"""After this many training passes (calls of the model in training) without a step of an optimizer, the user is told to call `monitor.step()`."""
_STEPS_OF_OTHERS = 8
"""An observation whose model is not called is abandoned after this many optimizer steps of other models."""
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
        clock: the clocks of the host and the device.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, Any], options: Options, clock: Clock) -> None:
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
        self._steps = Steps(self._model)
        self._passes = 0
        """Number of training passes since the last step."""
        self._newest_pass: Pass | None = None
        """The newest pass when the last optimizer had stepped, if the round was not over then. A *round* is one step of every optimizer (steps.py).
        If one of them steps again before the round is over, the passes after this one belong to the next step."""
        self._watcher = process.Watcher(self.before_step, self.after_step, self.close, self.save, self.observer.fail, self._stop)

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

    def resume(self, step: int, turn: int, interval: int) -> None:
        """Continue with the step, turn and interval of a saved session."""
        self.step = step
        if not self.is_closed:
            self.observer.resume(step, turn, interval)

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
        self._stop()
        self.flush()
        self.observer.route.leave()
        self.observer.delivery.close()

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
        if self.is_closed or self._driver is Driver.BY_HAND or observer.faults.ended is not None:
            return
        if self._model() is None:
            self.close()
            return
        if is_capturing():
            if self._steps.owns(optimizer):
                self._say_captured()
            return
        observation = observer.observation
        if observation is None and self._steps.begins_short(optimizer):
            return
        if not self._steps.owns(optimizer):
            if observation is not None and observer.compilation.mode is Mode.UNKNOWN:
                self._wait_for_less(observation)
            return
        stepped = self._steps.has_stepped(optimizer)
        if not self._steps.begins(optimizer) or (observation is None and not stepped):
            return
        with torch.no_grad(), observer.timed():
            if stepped:
                if observation is not None:
                    observation.passes.drop_after(self._newest_pass)
                self._end_round()
            if observer.observation is not None:
                observer.observation.passes.is_stepping = True
                observer.observation.before_step(optimizer, has_closure(args, kwargs))

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called when any optimizer of the process has stepped."""
        if self.is_closed or self._driver is Driver.BY_HAND or not self._steps.ends(optimizer):
            return
        self._passes, observer = 0, self.observer
        idle = observer.observation is None and observer.retry is None and not observer.delivery.in_flight
        if idle and self._steps.only() is optimizer and not observer.schedule.due(self.step + 1):
            self.step += 1
            if observer.schedule.compares:
                observer.schedule.follow(observer.clock.mark(observer.device))
            return
        with torch.no_grad(), observer.timed():
            observation = observer.observation
            if observation is not None:
                observation.passes.is_stepping = False
                observation.after_step(optimizer, has_closure(args, kwargs))
            if self._steps.add(optimizer):
                self._end_round()
            else:
                self._newest_pass = observation.passes.newest if observation is not None else None

    def _say_captured(self) -> None:
        """Tell the user once that a step which is captured in a CUDA graph, and is not executed now, will not be observed."""
        if not self._was_captured:
            self._was_captured = True
            log.warning(_CAPTURED, type(self._model()).__name__)

    def _wait_for_less(self, observation: Observation) -> None:
        """Count the steps of other models while this observation waits for its own model to be called, and abandon it after a few.

        The observation makes all compiled code of the process run eager, which other models should not suffer for long. Its hooks must be gone by the
        time compiled code is compiled again, or they would be compiled with the model.
        """
        observation.steps_of_others += 1
        if observation.steps_of_others == _STEPS_OF_OTHERS:
            self.observer.abandon(Retry.OTHER_MODEL)

    def _end_round(self) -> None:
        """End the current step: finish its observation, if there is one, and open an observation of the next step, if one is due."""
        observer = self.observer
        observer.drain(self.step)
        if observer.observation is not None:
            self.step = observer.finish(observer.observation, self.step)
            process.catch_sigterm()
        elif observer.schedule.compares:
            observer.schedule.follow(observer.clock.mark(observer.device))
        self.step += 1
        self._steps.end_round()
        self._newest_pass = None
        if not self.is_closed and (observer.schedule.due(self.step) or observer.retry is not None):
            observer.open(self.step)

    def _on_pass(self, event: PassEvent, training: bool) -> None:
        """Called during an observation when the model's forward begins or ends, and when a fault has ended all monitoring."""
        self.observer.heard(event, training)
        observation = self.observer.observation
        if event is not PassEvent.ENTERED or not training or observation is None:
            return
        self._steps.look_again()
        observation.passes.is_stepping = self._steps.is_running
        self._passes += 1
        if self._passes == _PASSES_WITHOUT_STEP and self._driver is Driver.OPTIMIZERS:
            log.warning(
                "torchsat: %d training passes, and no step of a torch optimizer that owns parameters of %s was seen; nothing can be shown. "
                "Call monitor.step() at the end of each step.",
                self._passes,
                type(self._model()).__name__,
            )
