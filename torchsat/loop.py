"""The training loop as torchsat sees it: when a step ends, whether the next one is observed, and what becomes of its observation.

Steps are found by a hook that torch runs around every optimizer's step (process.py, steps.py). Hooks are on the model only during an observed step,
from the end of the step before; at the end of the step the observation's parts go on their way to the host (transport/), and what has arrived of
earlier ones is delivered (delivery.py).

A step is observed where the schedule says so, or where there is a reason to observe again (`Retry`):

    RESUMED        `load_state_dict`: the first step of a session is observed, whatever its number
    OTHER_MODEL    the observation was abandoned while another model trained; the next step of this one is observed, run eager
    OVERFLOW       a GradScaler's optimizer has skipped the observed step; the next one is observed
    NO_PASS        no training pass was seen; the next steps are observed in eager execution, three at most
    SILENT_GRAPH   the compiled graph told nothing; the next steps are observed, two at most, then in eager execution

A reason is forgotten when the observation that it asked for opens. Where ranks observe together, the schedule alone decides, since all must observe
the same steps.

Nothing here may stop training: what fails is reported once through `logging` and no longer watched.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from enum import Enum
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from torchsat import compile_settings, internals, process
from torchsat.compiling import REFUSED, Compilation, Mode
from torchsat.delivery import Delivery
from torchsat.faults import MODEL, Faults
from torchsat.observe.observation import Execution, Observation, Retry
from torchsat.observe.passes import Pass, PassEvent
from torchsat.options import Options
from torchsat.parts import Parts
from torchsat.schedule import Clock, Schedule
from torchsat.sites import Sites
from torchsat.steps import Steps, has_closure
from torchsat.structure import FLATTENED
from torchsat.transport import meeting
from torchsat.transport.parallel import averages
from torchsat.transport.route import Route

log = logging.getLogger("torchsat")

TAKEN_FOR_REPEATED = "taken to be the same on all ranks of tensor parallelism, and counted on the first: other parts of a sequence are not seen"
_PASSES_WITHOUT_STEP = 200
_STEPS_OF_OTHERS = 8
"""Steps of other models during which an observation waits for this one."""


class Driver(Enum):
    """What ends a step. OPTIMIZERS -> BY_HAND: `monitor.step()` was called."""

    OPTIMIZERS = "optimizers"
    BY_HAND = "by_hand"


class Loop:
    """Observes the steps of one model.

    Args:
        model: what is watched; it is not kept alive, unless it is our own module around the stages of a pipeline.
        stages: of a pipeline, by the name that the sites in them begin with; empty for any other model.
        clock: of the host and the device.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, Any], options: Options, clock: Clock) -> None:
        self._wrapper = model if stages else None
        """Strong reference to our module around the stages of a pipeline. Nobody else keeps it; `_model` is weak."""
        self.step = 0
        """The number of the step that runs."""
        self.turn = 0
        """How many observations have ended: it decides which elements the next one reads."""
        self.is_closed = False
        self.faults = Faults(options.raises)
        self.sites = Sites(options.activations, options.epsilon)
        self.schedule = Schedule(options.every, options.budget)
        self.compilation = Compilation(self)
        kind = "stage of a pipeline" if stages else type(model).__qualname__.removeprefix("FSDP")
        self.route = Route(options.group, kind, options.raises)
        self.delivery = Delivery(options, type(model).__name__, self.sites, self.route, self.faults)
        self.observation: Observation | None = None
        """The one that is open."""
        self._model = weakref.ref(model)
        self._stages = stages
        self._options = options
        self._clock = clock
        self._device: torch.device | None = None
        """The device of the model, whose clock tells what an observation costs."""
        self._driver = Driver.OPTIMIZERS
        self._steps = Steps(self._model)
        self._retry: Retry | None = None
        self._passes = 0
        """Training passes since the last step."""
        self._wrapper_ranks = 0
        """Over how many ranks the DistributedDataParallel around the model averages gradients; 0: none was seen."""
        self._newest_pass: Pass | None = None
        """The last pass before an optimizer stepped and the round was not over."""
        self._since = 0.0
        """Since when our own code runs, on the host's clock."""

        self._watcher = process.Watcher(self.before_step, self.after_step, self.close, self.fail, self._stop)

    def start(self) -> None:
        """Begin to watch: from now on the process tells this loop of steps. Raises what `errors="raise"` lets through, and leaves nothing behind."""
        self.step = self.schedule.first = self.delivery.resume(self._options.log_dir, self._options.start)
        process.join(self._watcher)
        try:
            model = self._model()
            if self._options.compiled == "in_graph" and model is not None:
                self.compilation.use_graph(model)
            self.open()
        except Exception:
            self.close()
            raise

    def begin_at(self, step: int) -> None:
        """The next step has this number. It is observed, as the first of every session is."""
        self.abandon(Retry.RESUMED)
        self.step = self.schedule.first = step
        self.open()

    def end_step(self) -> None:
        """End a step by hand; from then on optimizers are no longer listened to."""
        self._driver = Driver.BY_HAND
        with self.never_raising(), self._timed():
            if self.observation is not None:
                self.observation.after_step(None)
            self._end_round()

    def close(self) -> None:
        """Stop watching, and leave nothing behind: no hook, thread or open file."""
        if self.is_closed:
            return
        process.leave(self._watcher)
        self._stop()
        self.flush()
        self.route.leave()
        self.delivery.close()

    def flush(self) -> None:
        """Wait for every observation in flight, and for the sinks."""
        with self.never_raising():
            self.drain(wait=meeting.CLOSING if self.is_closed else meeting.PATIENCE)
        self.delivery.flush()

    def _stop(self) -> None:
        """Take everything off the model, without touching files or threads: all that a forked child may do."""
        self.is_closed = True
        self._steps.forget()
        self.abandon(None)
        self.compilation.take_off()

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An optimizer of the process is about to step."""
        if self.is_closed or self._driver is Driver.BY_HAND or self.faults.ended is not None:
            return
        if self._model() is None:
            self.close()
            return
        observation = self.observation
        if observation is None and self._steps.begins_short(optimizer):
            return
        if not self._steps.owns(optimizer):
            if observation is not None and self.compilation.mode is Mode.UNKNOWN:
                self._wait_for_less(observation)
            return
        stepped = self._steps.has_stepped(optimizer)
        if not self._steps.begins(optimizer) or (observation is None and not stepped):
            return
        with torch.no_grad(), self._timed():
            if stepped:
                if observation is not None:
                    observation.passes.drop_after(self._newest_pass)
                self._end_round()
            if self.observation is not None:
                self.observation.passes.is_stepping = True
                self.observation.before_step(optimizer, has_closure(args, kwargs))

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An optimizer of the process has stepped."""
        if self.is_closed or self._driver is Driver.BY_HAND or not self._steps.ends(optimizer):
            return
        self._passes = 0
        idle = self.observation is None and self._retry is None and not self.delivery.in_flight
        if idle and self._steps.only() is optimizer and not self.schedule.due(self.step + 1):
            self.step += 1
            if self.schedule.compares:
                self.schedule.follow(self._clock.mark(self._device))
            return
        with torch.no_grad(), self._timed():
            if self.observation is not None:
                self.observation.passes.is_stepping = False
                self.observation.after_step(optimizer, has_closure(args, kwargs))
            if self._steps.add(optimizer):
                self._end_round()
            else:
                self._newest_pass = self.observation.passes.newest if self.observation is not None else None

    def _wait_for_less(self, observation: Observation) -> None:
        """Another model trains while this one waits to be entered: nobody is to run eager for long because of it. Hooks of an observation must be
        gone by then, or they would be compiled with the model."""
        observation.steps_of_others += 1
        if observation.steps_of_others == _STEPS_OF_OTHERS:
            self.abandon(Retry.OTHER_MODEL)

    def abandon(self, why: Retry | None) -> None:
        """End the observation that is open, if one is, without taking anything of it."""
        observation, self.observation = self.observation, None
        if observation is not None:
            observation.abandon(why)
            self._retry = why
        compile_settings.release(self)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """What runs inside is time of our own, of the observation that has begun last."""
        self._since = self._clock.seconds()
        try:
            yield
        finally:
            self._spend()

    def _spend(self) -> None:
        """Count the time since `_since` as our own."""
        now = self._clock.seconds()
        self.schedule.spend(now - self._since)
        self._since = now

    def _end_round(self) -> None:
        """A step is over: finish its observation, if it has one, and open the next one, if that is due."""
        self.drain()
        observation = self.observation
        if observation is not None:
            self._finish(observation)
            self._spend()
            self.schedule.finish(observation.window, self._clock.mark(self._device))
            changed = self.schedule.adjust(self.step)
            if changed is not None:
                log.warning("torchsat: step %d: %s", self.step, changed)
        elif self.schedule.compares:
            self.schedule.follow(self._clock.mark(self._device))
        self.step += 1
        self._steps.end_round()
        self._newest_pass = None
        if self.schedule.due(self.step) or self._retry is not None:
            self.open()

    def open(self) -> None:
        """Open an observation of the step that begins."""
        model = self._model()
        if model is None or self.is_closed or self.faults.ended is not None:
            return
        with self.never_raising():
            why, self._retry = self._retry, None
            first = next(model.parameters(), None)
            self._device = None if first is None else first.device
            window = self.schedule.begin(self.step, self._clock.mark(self._device))
            found = self.sites.walk(model, self._options.selects)
            self.sites.expect(found, [name for name in found.calls if self._options.selects(name)], self._options.calls)
            observation = self.observation = Observation(
                self.sites,
                self._options,
                turn=self.turn,
                window=window,
                clock=self._clock,
                faults=self.faults,
                on_pass=self._on_pass,
                stages=self._stages,
            )
            execution = self.compilation.prepare(found, self.sites)
            observation.open(found, self.compilation.graph_hooks, execution)
            if execution is Execution.EAGER:
                # Before the first pass nobody knows whether the model will be compiled.
                self.compilation.opened(model, self.step == self.schedule.first or why is Retry.OTHER_MODEL)

    def _on_pass(self, event: PassEvent, training: bool) -> None:
        """The model is entered or left during an observation, or a fault has ended everything."""
        model = self._model()
        if event is PassEvent.FAILED:
            self.end_all()
        elif event is PassEvent.ENTERED and model is not None:
            self._entered(model, training)
        elif event is PassEvent.LEFT and model is not None:
            self.compilation.left(model, training, self.observation is not None)

    def _entered(self, model: nn.Module, training: bool) -> None:
        self.compilation.entered(model, training)
        observation = self.observation
        if not training or observation is None:
            return
        observation.window.enter(self._clock.mark(self._device))
        self.route.enter()
        wrapper = internals.wrapped_by_data_parallel()
        if wrapper is not None:
            self._wrapper_ranks = dist.get_world_size(wrapper.process_group)
        self._steps.look_again()
        observation.passes.is_stepping = self._steps.is_running
        self._passes += 1
        if self._passes == _PASSES_WITHOUT_STEP and self._driver is Driver.OPTIMIZERS:
            log.warning(
                "torchsat: %d training passes, and no step of a torch optimizer that owns parameters of %s was seen; nothing can be shown. "
                "Call monitor.step() at the end of each step.",
                self._passes,
                type(model).__name__,
            )

    def _finish(self, observation: Observation) -> None:
        """Take the hooks off, and send what was measured on its way to the host."""
        parts = observation.finish()
        self.observation, self.turn = None, self.turn + 1
        compile_settings.release(self)
        self._meet()
        if observation.has_measured:
            self.compilation.saw_pass()
            self.sites.retract(MODEL, REFUSED)
            self.delivery.say_stopped(self.step, observation.newly_stopped)
        elif observation.passes.has_entered and not (self.sites.has_modules or self.sites.has_recurrent):
            self.delivery.say_nothing_watched()
        else:
            self._retry = self.compilation.missed_pass(self._model(), self.route.speaks) or self._retry
            if self.compilation.hides_model:
                self.sites.note(MODEL, REFUSED)
        if self.route.together:
            # Which steps are observed is a matter of all ranks.
            self._retry = None
            self._send_to_all(observation, parts)
        elif observation.has_measured:
            if parts.is_empty:
                self.delivery.say_nothing_watched()
            self._send(observation, parts)
        self.drain()

    def _meet(self) -> None:
        """The end of the first observation decides, on all ranks alike, who observes together."""
        if self.route.has_met:
            return
        model = self._model()
        if model is not None and internals.is_flattened(model):
            raise TypeError(FLATTENED)
        self.route.meet(self._device or torch.device("cpu"))
        self.schedule.is_agreed = self.route.together

    def _send_to_all(self, observation: Observation, parts: Parts) -> None:
        """Hand what was measured to all ranks; also if it is nothing, since they wait for it."""
        for site in list(self.sites.ran.values()):
            if self.sites.is_taken_for_repeated(site):
                self.sites.note(site.name, TAKEN_FOR_REPEATED)
        self._send(observation, parts)
        # The ranks agree on what went before the first step: not all need see the files of an earlier session.
        history = self.route.take_history()
        if history is not None:
            self.delivery.take_up(history)
        if self.route.interval:
            changed = self.schedule.agree(self.route.interval)
            if changed is not None and self.route.speaks:
                log.warning("torchsat: step %d: %s", self.step, changed)

    def _send(self, observation: Observation, parts: Parts) -> None:
        averaged = parts.averaged(averages(self._model(), observation.unspread, self._wrapper_ranks, self._stages.values()))
        flight = self.route.send(self.step, averaged, interval=self.schedule.wanted, before=self.drain, history=self.delivery.history)
        if flight is not None:
            # The ranks agree on the first step.
            self.step = flight.step
            self.delivery.add(flight)

    def drain(self, wait: float = 0.0) -> None:
        """Deliver what has arrived; or everything, waiting for so many seconds."""
        retry = self.delivery.drain(self.step, self.schedule.overhead, wait)
        self.schedule.is_agreed = self.route.together
        if retry is not None:
            self._retry = retry

    def fail(self, error: Exception) -> None:
        """Something outside of an observation has failed: that is the end of all monitoring of this model."""
        self.sites.fail(MODEL, str(error))
        self.end_all()
        self.faults.report(MODEL, error)

    def end_all(self) -> None:
        """A fault has ended all monitoring of this model."""
        self.abandon(None)
        # The other ranks are not to wait for what never comes.
        self.route.leave()

    def never_raising(self) -> NeverRaising:
        """Runs its body without gradients; what that raises ends the monitor, not training."""
        return NeverRaising(self)


class NeverRaising:
    """The body runs without gradients; what it raises ends the monitor, not training."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self._no_grad.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._no_grad.__exit__(kind, error, trace)
        if not isinstance(error, Exception):
            return False
        self._loop.fail(error)
        return True
