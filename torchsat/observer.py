"""Opens an observation of a step, finishes it when the step is over, and sends what it measured on its way to the host.

A step is observed where the schedule says so, or where there is a reason to observe again (`Retry`):

    RESUMED        `load_state_dict`: the first step of a session is observed, whatever its number
    OTHER_MODEL    the observation was abandoned while another model trained; the next step of this one is observed, run eager
    NO_STEP        the observation was given up since it waited too long for a step (patience.py); the step after the next one is observed
    OVERFLOW       a GradScaler's optimizer has skipped the observed step; the next one is observed
    NO_PASS        no training pass was seen; the next steps are observed in eager execution, three at most
    SILENT_GRAPH   the compiled graph reported nothing; the next steps are observed, two at most, then in eager execution

A reason is forgotten when the observation that it asked for opens. Where ranks observe together, the schedule alone decides, since all must observe
the same steps.

Hooks are on the model only during an observation. When it ends, what it measured is sent to the host (transport/), and earlier observations that have
arrived there are delivered to the user (delivery.py).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchsat import compile_settings, internals
from torchsat.compiling import REFUSED, Compilation
from torchsat.delivery import Delivery
from torchsat.faults import MODEL, Faults
from torchsat.internals_distributed import is_flattened, wrapped_by_data_parallel
from torchsat.observe.observation import Execution, Observation, Retry
from torchsat.observe.passes import OnPass, PassEvent
from torchsat.options import Options
from torchsat.parts import Parts
from torchsat.schedule import Account, Clock, Schedule, Wish
from torchsat.sites import Sites
from torchsat.structure import FLATTENED
from torchsat.transport import meeting
from torchsat.transport.parallel import averages
from torchsat.transport.route import Route

log = logging.getLogger("torchsat")

TAKEN_FOR_REPEATED = "taken to be the same on all ranks of tensor parallelism, and counted on the first: other parts of a sequence are not seen"


class Observer:
    """Observes those steps of one model that the loop asks it to observe.

    Args:
        model: the model that is watched; it is not kept alive.
        stages: the stages of a pipeline, keyed by the name that their sites begin with; empty for any other model.
        clock: the clocks of the host and the device.
        on_pass: called during an observation when the model's forward begins or ends, and when a fault ends all monitoring.
    """

    def __init__(self, model: nn.Module, stages: Mapping[str, Any], options: Options, clock: Clock, on_pass: OnPass) -> None:
        self.turn = 0
        """Number of observations that have ended. It selects the elements that the next one reads, so that each observation reads other elements."""
        self.observation: Observation | None = None
        """The observation that is open; None between observations."""
        self.retry: Retry | None = None
        """Why the next step is observed even if the schedule does not ask for it; None: there is no such reason."""
        self.faults = Faults(options.raises)
        self.sites = Sites(options.activations, options.epsilon)
        self.schedule = Schedule(options.every, options.budget)
        self.compilation = Compilation(self)
        kind = "stage of a pipeline" if stages else type(model).__qualname__.removeprefix("FSDP")
        self.route = Route(options.group, kind, options.raises)
        self.delivery = Delivery(options, type(model).__name__, self.sites, self.route, self.faults)
        self._model = weakref.ref(model)
        self._stages = stages
        self._options = options
        self.clock = clock
        self._on_pass = on_pass
        self.device: torch.device | None = None
        """The device of the model. Its clock measures what an observation costs."""
        self._wrapper_ranks = 0
        """Number of ranks over which a DistributedDataParallel around the model averages gradients; 0: no such wrapper was seen."""
        self._since = 0.0
        """The host's time up to which the time of our own code has been counted."""

    def begin(self, step: int) -> None:
        """Begin a session whose first step has this number."""
        self.schedule.first = step
        model = self._model()
        if self._options.compiled == "in_graph" and model is not None:
            self.compilation.use_graph(model)
        self.open(step)

    def resume(self, step: int, turn: int, account: Account) -> None:
        """Continue with the numbers of a saved session. The next step is observed, like the first step of every session."""
        self.abandon(Retry.RESUMED)
        self.turn = turn
        self.schedule.resume(account)
        self.schedule.first = step
        self.open(step)

    def open(self, step: int) -> None:
        """Open an observation of the step that begins."""
        model = self._model()
        if model is None or self.faults.ended is not None:
            return
        with self.never_raising():
            why, self.retry = self.retry, None
            first = next(model.parameters(), None)
            with internals.without_function_modes():
                self.device = None if first is None else first.device
            window = self.schedule.begin(step, self.clock.mark(self.device))
            found = self.sites.walk(model, self._options.selects)
            self.sites.expect(found, [name for name in found.calls if self._options.selects(name)], self._options.calls)
            self.delivery.say_unregistered(self.sites.unregistered or {})
            observation = self.observation = Observation(
                self.sites,
                self._options,
                turn=self.turn,
                window=window,
                clock=self.clock,
                faults=self.faults,
                on_pass=self._on_pass,
                stages=self._stages,
            )
            execution = self.compilation.prepare(found, self.sites)
            observation.open(found, self.compilation.graph_hooks, execution)
            if execution is Execution.EAGER:
                # Before the model is called for the first time, it is not known whether it is compiled.
                self.compilation.opened(model, step == self.schedule.first or why is Retry.OTHER_MODEL)

    def heard(self, event: PassEvent, training: bool) -> None:
        """Called during an observation when the model's forward begins or ends, and when a fault has ended all monitoring."""
        model, observation = self._model(), self.observation
        if event is PassEvent.FAILED:
            self.end_all()
        elif event is PassEvent.LEFT and model is not None:
            self.compilation.left(model, training, observation is not None)
        elif event is PassEvent.ENTERED and model is not None:
            self.compilation.entered(model, training)
            if training and observation is not None:
                observation.window.enter(self.clock.mark(self.device))
                self.route.enter()
                wrapper = wrapped_by_data_parallel()
                if wrapper is not None:
                    self._wrapper_ranks = dist.get_world_size(wrapper.process_group)

    def finish(self, observation: Observation, step: int) -> int:
        """Finish the observation of a step, and send what was measured on its way to the host.

        Returns:
            The number of the step, on which ranks agree when they meet.
        """
        parts = observation.finish()
        self.observation, self.turn = None, self.turn + 1
        compile_settings.release(self)
        self._meet()
        if observation.has_measured:
            self.compilation.saw_pass()
            self.sites.retract(MODEL, REFUSED)
            self.delivery.say_stopped(step, observation.newly_stopped)
        elif (observation.passes.has_entered or observation.passes.has_run_parts) and not (self.sites.has_modules or self.sites.has_recurrent):
            self.delivery.say_nothing_watched()
        else:
            self.retry = self.compilation.missed_pass(self._model(), self.route.speaks) or self.retry
            if self.compilation.hides_model:
                self.sites.note(MODEL, REFUSED)
        if self.route.together:
            # All ranks must observe the same steps, so one rank alone cannot observe a further one.
            self.retry = None
            step = self._send_to_all(observation, parts, step)
        elif observation.has_measured:
            if parts.is_empty:
                self.delivery.say_nothing_watched()
            step = self._send(observation, parts, step)
        self.drain(step)
        self._spend()
        self.schedule.finish(observation.window, self.clock.mark(self.device))
        changed = self.schedule.adjust(step)
        if changed is not None:
            log.warning("torchsat: step %d: %s", step, changed)
        return step

    def abandon(self, why: Retry | None) -> None:
        """End the open observation, if there is one, and discard what it measured. `why` is the reason to observe again, if there is one."""
        observation, self.observation = self.observation, None
        if observation is not None:
            observation.abandon(why)
            self.retry = why
        compile_settings.release(self)

    def drain(self, step: int, wait: float = 0.0) -> None:
        """Deliver the observations that have arrived on the host. With `wait`, wait up to so many seconds for each that has not."""
        retry = self.delivery.drain(step, self.schedule.overhead, wait)
        self.schedule.is_agreed = self.route.together
        if retry is not None:
            self.retry = retry

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time that the body takes as time of torchsat, charged to the observation that began last."""
        self._since = self.clock.seconds()
        try:
            yield
        finally:
            self._spend()

    def _spend(self) -> None:
        """Count the time since `_since` as time of torchsat."""
        now = self.clock.seconds()
        self.schedule.spend(now - self._since)
        self._since = now

    def _meet(self) -> None:
        """At the end of the first observation, decide whether ranks observe together. All ranks come to the same decision."""
        if self.route.has_met:
            return
        model = self._model()
        if model is not None and is_flattened(model):
            raise TypeError(FLATTENED)
        self.route.meet(self.device or torch.device("cpu"))
        self.schedule.is_agreed = self.route.together

    def _send_to_all(self, observation: Observation, parts: Parts, step: int) -> int:
        """Send what was measured to all ranks. This is done even if nothing was measured, since the others wait for it."""
        for site in list(self.sites.ran.values()):
            if self.sites.is_taken_for_repeated(site):
                self.sites.note(site.name, TAKEN_FOR_REPEATED)
        step = self._send(observation, parts, step)
        # Not every rank can read the files of an earlier session, so one rank tells the others what is known of it.
        history = self.route.take_history()
        if history is not None:
            self.delivery.take_up(history)
        if self.route.agreed is not None:
            changed = self.schedule.agree(step, Wish(*self.route.agreed))
            if changed is not None and self.route.speaks:
                log.warning("torchsat: step %d: %s", step, changed)
        return step

    def _send(self, observation: Observation, parts: Parts, step: int) -> int:
        averaged = parts.averaged(averages(self._model(), observation.unspread, self._wrapper_ranks, self._stages.values()))
        wish = self.schedule.wish(step, meeting.LAG) if self.route.together else Wish(step, self.schedule.every)
        flight = self.route.send(
            step, averaged, earliest=wish.earliest, interval=wish.interval, before=lambda: self.drain(step), history=self.delivery.history
        )
        self.delivery.add(flight)
        return step if flight is None else flight.step

    def fail(self, error: Exception) -> None:
        """End all monitoring of this model, because something outside of an observation has failed."""
        if not self.faults.raises:
            self.sites.fail(MODEL, str(error))
            self.end_all()
        self.faults.report(MODEL, error)

    def end_all(self) -> None:
        """End all monitoring of this model after a fault."""
        self.abandon(None)
        # Otherwise the other ranks would wait for numbers that never come.
        self.route.leave()

    def close(self) -> None:
        """Leave the other ranks, say how the run ends, and close the sinks."""
        self.route.leave()
        with self.never_raising():
            self.delivery.say_end()
        self.delivery.close()

    def never_raising(self) -> NeverRaising:
        """A context whose body runs without gradients, and whose errors end the monitor and not training."""
        return NeverRaising(self)


class NeverRaising:
    """A context whose body runs without gradients. An error in the body ends the monitor, not training."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self._no_grad.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._no_grad.__exit__(kind, error, trace)
        if not isinstance(error, Exception):
            return False
        self._observer.fail(error)
        return True
