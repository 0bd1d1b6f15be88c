"""The training loop as torchsat sees it: when a step ends, and whether the next one is observed.

Steps are found by a hook that torch runs around every optimizer's step (process.py, steps.py), or the user ends them by hand. From the end of one
step on the next one is observed, if the schedule or a reason to observe again asks for it (observer.py). A step that is not observed runs the short
way through `before_step` and `after_step`, and nothing else of ours.

Nothing here may stop training: what fails is reported once through `logging` and no longer watched.
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
from torchsat.observe.observation import Observation, Retry
from torchsat.observe.passes import Pass, PassEvent
from torchsat.observer import Observer
from torchsat.options import Options
from torchsat.schedule import Clock
from torchsat.steps import Steps, has_closure
from torchsat.transport import meeting

log = logging.getLogger("torchsat")

_PASSES_WITHOUT_STEP = 200
_STEPS_OF_OTHERS = 8
"""Steps of other models during which an observation waits for this one."""


class Driver(Enum):
    """What ends a step. OPTIMIZERS -> BY_HAND: `monitor.step()` was called."""

    OPTIMIZERS = "optimizers"
    BY_HAND = "by_hand"


class Loop:
    """Finds the steps of one model, and has them observed.

    Args:
        model: what is watched; it is not kept alive, unless it is our own module around the stages of a pipeline.
        stages: of a pipeline, by the name that the sites in them begin with; empty for any other model.
        clock: of the host and the device.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, Any], options: Options, clock: Clock) -> None:
        self.step = 0
        """The number of the step that runs."""
        self.is_closed = False
        self.observer = Observer(model, stages, options, clock, self._on_pass)
        self._wrapper = model if stages else None
        """Strong reference to our module around the stages of a pipeline. Nobody else keeps it; `_model` is weak."""
        self._model = weakref.ref(model)
        self._options = options
        self._driver = Driver.OPTIMIZERS
        self._steps = Steps(self._model)
        self._passes = 0
        """Training passes since the last step."""
        self._newest_pass: Pass | None = None
        """The last pass before an optimizer stepped and the round was not over."""
        self._watcher = process.Watcher(self.before_step, self.after_step, self.close, self.observer.fail, self._stop)

    def start(self) -> None:
        """Begin to watch: from now on the process tells this loop of steps. Raises what `errors="raise"` lets through, and leaves nothing behind."""
        self.step = self.observer.delivery.resume(self._options.log_dir, self._options.start)
        process.join(self._watcher)
        try:
            self.observer.begin(self.step)
        except Exception:
            self.close()
            raise

    def resume(self, step: int, turn: int, interval: int) -> None:
        """Go on with the numbers of a saved session."""
        self.step = step
        if not self.is_closed:
            self.observer.resume(step, turn, interval)

    def end_step(self) -> None:
        """End a step by hand; from then on optimizers are no longer listened to."""
        self._driver, observer = Driver.BY_HAND, self.observer
        with observer.never_raising(), observer.timed():
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

    def _stop(self) -> None:
        """Take everything off the model, without touching files or threads: all that a forked child may do."""
        self.is_closed = True
        self._steps.forget()
        self.observer.abandon(None)
        self.observer.compilation.take_off()

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An optimizer of the process is about to step."""
        observer = self.observer
        if self.is_closed or self._driver is Driver.BY_HAND or observer.faults.ended is not None:
            return
        if self._model() is None:
            self.close()
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
        """An optimizer of the process has stepped."""
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

    def _wait_for_less(self, observation: Observation) -> None:
        """Another model trains while this one waits to be entered: nobody is to run eager for long because of it. Hooks of an observation must be
        gone by then, or they would be compiled with the model."""
        observation.steps_of_others += 1
        if observation.steps_of_others == _STEPS_OF_OTHERS:
            self.observer.abandon(Retry.OTHER_MODEL)

    def _end_round(self) -> None:
        """A step is over: finish its observation, if it has one, and open the next one, if that is due."""
        observer = self.observer
        observer.drain(self.step)
        if observer.observation is not None:
            self.step = observer.finish(observer.observation, self.step)
        elif observer.schedule.compares:
            observer.schedule.follow(observer.clock.mark(observer.device))
        self.step += 1
        self._steps.end_round()
        self._newest_pass = None
        if not self.is_closed and (observer.schedule.due(self.step) or observer.retry is not None):
            observer.open(self.step)

    def _on_pass(self, event: PassEvent, training: bool) -> None:
        """The model is entered or left during an observation, or a fault has ended everything."""
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
