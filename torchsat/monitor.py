"""`watch` and the `Monitor`: when to observe, the way to the host, and what happens with a snapshot there.

Steps are found by a hook that torch runs around every optimizer's step (process.py); ours looks whether the optimizer owns parameters of the
model. One step is one round in which every such optimizer steps once. Hooks are on the model only during an observed step, from the end of the
step before; the end of the step packs all rows into one vector, copied asynchronously and read at a later step.

A compiled model is observed in eager: its submodules' hooks would be ignored by the graph, or worse, be compiled into it. The stance
"force_eager" belongs to the whole process, so it holds only from the start of an observation until the model is entered, which is when torch
has decided; what is compiled inside the model stays compiled, unless it is a submodule and hides sites.

Nothing here may stop training: what fails is reported once through `logging` and no longer watched.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
import math
import os
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torchsat import process
from torchsat.activations import ACTIVATIONS, Activation
from torchsat.calls import uses_flex_attention
from torchsat.diagnosis import Diagnosis, verdict
from torchsat.ingraph import Wires, why_not
from torchsat.ranks import CLOSING, GRACE, LAG, PATIENCE, LayerPart, Ranks, Round, SitePart, averaged_over, default_group
from torchsat.record import Alert, Coverage, Record, Snapshot
from torchsat.rules import RULES, Judge, Rule
from torchsat.schedule import Mark, Schedule
from torchsat.statistics import MAXES, SUMS, UNITS, accumulator, summarise_units, to_record, trust_kernels
from torchsat.taps import MODEL, PIPELINES, Found, Pass, Site, Stages, Taps, clean, is_compiled
from torchsat.tensorboard import SUBRUN
from torchsat.weights import COLUMNS, Layer, is_flattened, is_freed, local, placement, to_weight
from torchsat.weights import why_not as layer_why_not

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

log = logging.getLogger("torchsat")

Sink = Callable[[Snapshot], Any]
Patterns = str | Iterable[str] | None
_MOST_IN_FLIGHT = 16
"""Observations on their way before one is waited for: a device that is this far behind would otherwise fill the host's pinned memory."""
_PASSES_WITHOUT_STEP = 200
_STEPS_OF_OTHERS = 8


def watch(
    model: nn.Module | PipelineStage | Sequence[PipelineStage],
    log_dir: str | os.PathLike[str] | None = None,
    *,
    writer: Any = None,
    every: int = 50,
    budget: float | None = 0.02,
    epsilon: float = 0.05,
    sample: int | Literal["auto"] | None = "auto",
    include: Patterns = None,
    exclude: Patterns = None,
    calls: bool = True,
    compiled: Literal["eager", "in_graph"] = "eager",
    activations: Sequence[Activation] = ACTIVATIONS,
    rules: Sequence[Rule] = RULES,
    sinks: Iterable[Sink] | None = None,
    on_alert: Callable[[Alert], Any] | None = None,
    group: dist.ProcessGroup | Literal["auto"] | None = "auto",
    start: int | Literal["resume"] = 0,
    errors: Literal["warn", "raise"] = "warn",
) -> Monitor:
    """Watch the activations of a model while it trains; the one line.

    Args:
        model: any nn.Module; before or after the optimizer is made, before or after torch.compile or DistributedDataParallel. Or a stage of
            torch.distributed.pipelining, or a list of those that this rank runs.
        log_dir: TensorBoard's directory of this run; written is the sub-run `<log_dir>/torchsat`. None: nothing is written.
        writer: instead of `log_dir`, a torch.utils.tensorboard.SummaryWriter to write through.
        every: observe step 0, the powers of two below this, and its multiples.
        budget: the share of training time that observing may take from step `every` on: where it would take more, the interval is stretched, which
            is logged. None: any.
        epsilon: an element is saturated where |f'| stays below this share of its peak.
        sample: the most elements read per call of a site, spread evenly over it; None: all. "auto": 65536, and all where a kernel on the GPU reads
            them anyway.
        include, exclude: patterns of site names (as in a shell), one or several.
        calls: hear function calls too (`F.relu(x)`, `x.tanh()`, softmax, attention), not only modules and recurrent layers.
        compiled: how a compiled model is observed: "eager" runs observed steps without the compiler; "in_graph" compiles the measurement of its
            modules into the graph (to be called before the first compiled step; that first step still runs eager).
        activations: the table that says which module or function computes which activation.
        rules: when to alert.
        sinks: functions of a Snapshot, called after TensorBoard's; `flush` and `close` are called too where they exist.
        on_alert: function of an Alert, called when one fires, worsens or clears.
        group: the ranks that observe together: "auto" is all of torch.distributed, if it is in use when training begins; None: each by itself.
        start: the number of the first step: of a resumed run, the optimizer steps that it has taken. Alerts that fired then in `log_dir` go on with
            their `since`. "resume": the step after the last one in `log_dir`. A checkpoint can hold more: `monitor.state_dict()`.
        errors: "raise" lets faults of the monitor through, for developers of torchsat.

    Raises:
        TypeError: the model cannot be watched (not an nn.Module, nn.DataParallel, TorchScript).
        ValueError: an argument is out of its range.
    """
    return Monitor(
        model,
        log_dir,
        writer=writer,
        every=every,
        budget=budget,
        epsilon=epsilon,
        sample=sample,
        include=include,
        exclude=exclude,
        calls=calls,
        compiled=compiled,
        activations=activations,
        rules=rules,
        sinks=sinks,
        on_alert=on_alert,
        group=group,
        start=start,
        errors=errors,
    )


@dataclass(frozen=True)
class _Numbers:
    """One observation on the host."""

    sites: list[tuple[dict[str, Any], list[float], dict[str, Any]]]
    """Facts, row, and what is known of single ranks."""
    layers: list[tuple[dict[str, Any], list[float]]]
    scale: float
    skipped: bool
    """The optimizer itself found an overflow and did nothing: not a step."""


@dataclass
class _InFlight:
    """One observation on its way to the host."""

    step: int
    time: float
    facts: list[tuple[torch.device, int, dict[str, Any]]]
    """Of each site, and how many numbers it has."""
    weight_facts: list[tuple[torch.device, dict[str, Any]]]
    parts: dict[torch.device, tuple[Tensor, torch.cuda.Event | None]]
    """The numbers on the host, and when they are there."""
    home: torch.device
    """The device whose part ends with the loss scale and the overflow flag."""
    divisor: float
    """Of gradients, beside the loss scale."""

    def arrived(self) -> bool:
        return all(event is None or event.query() for _, event in self.parts.values())

    def wait(self, seconds: float = math.inf) -> None:
        for _, event in self.parts.values():
            if event is not None:
                event.synchronize()

    def read(self) -> _Numbers:
        """The numbers, which have arrived."""
        hosts = {device: cast("list[float]", part.tolist()) for device, (part, _) in self.parts.items()}
        places = dict.fromkeys(hosts, 0)
        scale, skipped = hosts[self.home][-2:]

        def cut(device: torch.device, width: int) -> list[float]:
            places[device] += width
            return hosts[device][places[device] - width : places[device]]

        sites = [(facts, cut(device, width), dict[str, Any]()) for device, width, facts in self.facts]
        layers = [(facts, cut(device, len(COLUMNS))) for device, facts in self.weight_facts]
        return _Numbers(sites, layers, self.divisor * (1.0 if math.isnan(scale) or scale <= 0 else scale), skipped > 0)


class Monitor:
    """What `watch` returns. A context manager: leaving it closes it."""

    def __init__(
        self,
        model: nn.Module | PipelineStage | Sequence[PipelineStage],
        log_dir: str | os.PathLike[str] | None = None,
        *,
        writer: Any,
        every: int,
        budget: float | None,
        epsilon: float,
        sample: int | Literal["auto"] | None,
        include: Patterns,
        exclude: Patterns,
        calls: bool,
        compiled: Literal["eager", "in_graph"],
        activations: Sequence[Activation],
        rules: Sequence[Rule],
        sinks: Iterable[Sink] | None,
        on_alert: Callable[[Alert], Any] | None,
        group: dist.ProcessGroup | Literal["auto"] | None,
        start: int | Literal["resume"],
        errors: Literal["warn", "raise"],
    ) -> None:
        self._stages = _stages(model)
        """Of a pipeline, that the model is, if it is any: by the name that goes before those of their sites."""
        modules = {name: _plain(stage.submod) for name, stage in self._stages.items()}
        watched = Stages(modules) if modules else _plain(model)
        self._kept = watched if modules else None
        """What nobody else keeps."""
        _check(every, budget, epsilon, sample, activations, rules, group, start, errors)
        self._model = weakref.ref(watched)
        self._schedule = Schedule(every, budget)
        self._since = 0.0
        """Since when our own code runs, on the host's clock."""
        self._device: torch.device | None = None
        """Whose clock tells what an observation costs."""
        self._errors = errors
        self._on_alert = on_alert
        if sinks is not None and not isinstance(sinks, Iterable):
            raise TypeError(f"sinks is {sinks!r}; allowed is a tuple of functions of one Snapshot")
        self._sinks: list[Sink] = list(sinks or ())
        for sink in self._sinks:
            if not callable(sink):
                raise TypeError(f"sinks holds {sink!r}; each must be a function of one Snapshot")
        if on_alert is not None and not callable(on_alert):
            raise TypeError(f"on_alert is {on_alert!r}; allowed is a function of one Alert")
        if log_dir is not None and (not isinstance(log_dir, (str, os.PathLike)) or not os.fspath(log_dir)):
            raise TypeError(f'log_dir is {log_dir!r}; allowed is a directory such as "runs/exp1"')
        if not isinstance(calls, bool):
            raise TypeError(f"calls is {calls!r}; allowed are True (hear function calls too) and False (modules and recurrent layers only)")
        if compiled not in ("eager", "in_graph"):
            raise ValueError(f'compiled is {compiled!r}; allowed are "eager" and "in_graph"')
        self._taps = Taps(
            activations,
            _selector(include, exclude),
            epsilon,
            sample,
            self._entered,
            self._left,
            self._gradients,
            self._fault,
            calls,
            self._schedule.spend,
        )
        self._judge = Judge(rules, self._fault)
        self._diagnosis = Diagnosis()
        self._latest: Snapshot | None = None
        self._stuck: dict[str, tuple[float, int]] = {}
        self._in_flight: list[_InFlight | Round] = []
        self._step = 0
        self._passes = 0
        """Training passes since the last step."""
        self._misses = 0
        self._announced = False
        self._said_stopped: set[str] = set()
        self._again = False
        self._closed = False
        self._group = group
        self._ranks: Ranks | None = None
        """The processes that observe with this one, once they have met; None: this one is by itself."""
        self._reader: Ranks | None = None
        """Who reads the rounds that are under way, also after the others were lost."""
        self._has_entered = self._has_met = self._said_differing = False
        self._averaged = 0
        """Over how many ranks gradients are averaged by the model's wrapper; 0: not known."""
        self._manual = False
        self._owned: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._stepping: list[Optimizer] = []
        """The optimizers whose `step` is running, outermost first."""
        self._round: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Those that have stepped since the last round ended."""
        self._members: weakref.WeakSet[Optimizer] | None = None
        """Those of the last round; None before its end."""
        self._alone: Callable[[], Optimizer | None] = _nobody
        """The only optimizer of the last round, if it was one: the short way through a step that is not observed."""
        self._mark: Pass | None = None
        """The last pass before an optimizer stepped and the round was not over."""
        self._rates: dict[int, float] = {}
        """The learning rate of each parameter of the observed step."""
        self._scale: Tensor | None = None
        self._skipped: Tensor | None = None
        self._flex: bool | None = None
        """Whether the model uses flex_attention; None: not looked for yet."""
        self._wires: Wires | None = None
        """The hooks that are compiled with the model."""
        self._laid: tuple[Any, ...] = ()
        """What they were laid for."""
        self._waited = 0
        """Steps of other optimizers since an observation began, as long as the model was not entered."""
        self._silent = 0
        """Observations in a row in which the compiled graph said nothing."""
        self._compiled: bool | None = None
        """Whether the model is called from compiled code; None until it was entered."""
        if log_dir is not None or writer is not None:
            from torchsat.tensorboard.writer import TensorBoardWriter

            files = TensorBoardWriter(log_dir, writer)
            self._sinks.insert(0, files)
            if default_group() is None and int(os.environ.get("WORLD_SIZE") or 1) < 2:
                # Of several ranks, which may come to be only after this, those that write none make none.
                files.open()
        self._step = self._schedule.first = self._resume(log_dir, start)
        self._watcher = process.Watcher(self._before_step, self._after_step, self.close, functools.partial(self._fault, MODEL), self._forget)
        process.join(self._watcher)
        try:
            _trust_kernels(watched)
            if compiled == "in_graph":
                self._wire()
            self._open()
        except Exception:
            self.close()
            raise
        self._nothing = "of its activations, include= and exclude= leave none" if include or exclude else "no activation was found"
        if not calls and not self._taps.names and not self._taps.recurrent:
            self._warn_of_nothing()

    @property
    def latest(self) -> Snapshot | None:
        """The newest snapshot that has reached the host."""
        return self._latest

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The alerts that fire now, worst first."""
        return self._diagnosis.firing

    @property
    def overhead(self) -> float | None:
        """The measured share of training time that observing took lately, from step `every` on; None before it is known."""
        return self._schedule.overhead

    @property
    def coverage(self) -> Coverage:
        """What is seen and what is not, as of the last observation."""
        taps = self._taps
        # What is seen on any rank; what is not, on this one.
        everywhere = self._ranks.layout.sites if self._ranks is not None else {}
        seen = dict.fromkeys(everywhere or taps.sites)
        unseen = [*taps.unseen, *taps.failed.items(), *taps.notes.items(), *taps.stopped.items()]
        idle = [name for name in (*taps.names, *taps.expected) if name not in seen] + [name for name, ran in taps.recurrent.items() if not ran]
        why = "it has not run in an observed training pass"
        deaf = {} if taps.hears_calls else dict.fromkeys(taps.expected, "function calls are not heard (calls=False)")
        if self._flex and self._misses:
            unseen.append((MODEL, "compiled, with flex_attention: it is not run eager, where the attention would take T x T memory"))
        unseen += [(name, deaf.get(name, why)) for name in idle if name not in taps.failed and name not in taps.notes]
        kinds = Counter([facts["kind"] for facts in everywhere.values()] or [site.kind for site in taps.sites.values()])
        return Coverage(tuple(seen), tuple(unseen), tuple(kinds.items()))

    def step(self) -> None:
        """End a step by hand, in a loop without a torch optimizer. From then on optimizers are no longer listened to.

        Update ratios are not known in such a loop, and a GradScaler's factor is not taken out.
        """
        if self._closed:
            return
        self._manual = True
        with self._never_raising(), self._timed():
            if self._taps.is_open:
                self._after_weights(None)
            self._finish_round()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should hold, in plain types: the number of steps taken, and what rules and diagnosis remember."""
        self._drain()
        return {"step": self._step, "interval": self._schedule.interval, "turn": self._taps.turn, **self._history()}

    def _history(self) -> dict[str, Any]:
        """What is remembered of earlier observations, in plain types."""
        stuck = {name: list(known) for name, known in self._stuck.items()}
        return {"stuck": stuck, "judge": self._judge.state_dict(), "diagnosis": self._diagnosis.state_dict()}

    def _take_up(self, history: dict[str, Any]) -> None:
        stuck = {name: (float(share), int(n)) for name, (share, n) in history["stuck"].items()}
        self._judge.load_state_dict(history["judge"])
        self._diagnosis.load_state_dict(history["diagnosis"])
        self._stuck = stuck

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another monitor was when it gave its `state_dict`; to be called before training goes on.

        Raises:
            ValueError: it is no such state.
        """
        missing = {"step", "interval", "turn", "stuck", "judge", "diagnosis"} - set(state)
        if missing:
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}; allowed is what monitor.state_dict() gave")
        try:
            step, turn, interval = (int(state[name]) for name in ("step", "turn", "interval"))
            self._take_up(state)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the state cannot be understood ({type(error).__name__}: {error}); allowed is what monitor.state_dict() gave"
            ) from error
        self._taps.turn = turn
        if interval % self._schedule.every == 0 and self._schedule.budget is not None:
            self._schedule.interval = self._schedule.wanted = interval
        self._begin_at(step)

    def _begin_at(self, step: int) -> None:
        """The next step has this number. It is observed, as every first one is."""
        self._taps.close()
        process.release(self._watcher)
        self._step = self._schedule.first = step
        self._open()

    def _resume(self, log_dir: str | os.PathLike[str] | None, start: int | Literal["resume"]) -> int:
        """Take up what the event files of an earlier session say; the number of the first step."""
        if start == 0 or log_dir is None:
            return 0 if start == "resume" else start
        from torchsat.tensorboard.reader import read_runs

        try:
            history = read_runs(os.path.join(os.fspath(log_dir), SUBRUN))[-1].snapshots
        except FileNotFoundError:
            return 0 if start == "resume" else start
        step = history[-1].step + 1 if start == "resume" else start
        history = [snapshot for snapshot in history if snapshot.step < step]
        told: dict[tuple[str, str], Alert] = {}
        for alert in (alert for snapshot in history for alert in snapshot.alerts):
            told.pop((alert.site, alert.rule), None)
            if alert.firing:
                told[alert.site, alert.rule] = alert
        if history:
            self._judge.resume(list(told.values()), len(history))
            self._diagnosis.resume(told.values(), history[0], history[-1])
        return step

    def flush(self) -> None:
        """Wait for every observation in flight, and for the sinks."""
        with self._never_raising():
            self._drain(wait=CLOSING if self._closed else PATIENCE)
        for sink in list(self._sinks):
            self._to_sink(sink, getattr(sink, "flush", None))

    def close(self) -> None:
        """Stop watching, and leave nothing behind: no hook, thread or open file. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._owned.clear()
        process.leave(self._watcher)
        self._taps.close()
        self._unwire()
        self.flush()
        if self._ranks is not None:
            self._ranks.leave()
        for sink in list(self._sinks):
            self._to_sink(sink, getattr(sink, "close", None))
        self._sinks.clear()

    def _forget(self) -> None:
        """Stop watching without touching files or threads."""
        self._closed = True
        self._taps.close()
        self._unwire()
        process.release(self._watcher)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model that holds its monitor holds none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"step {self._step}"
        return f"<torchsat.Monitor: {len(self._taps.sites)} sites, {len(self.alerts)} alerts, {state}>"

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._closed or self._manual or MODEL in self._taps.failed:
            return
        if self._model() is None:
            self.close()
            return
        if self._alone() is optimizer and not self._stepping and not self._taps.is_open:
            self._stepping.append(optimizer)
            return
        if not self._owns(optimizer):
            if self._compiled is None and self._taps.is_open:
                self._wait_for_less()
            return
        if self._stepping:
            # Not what we remember but what is on the stack: a step that raised never reached its end.
            self._stepping = [each for each in process.steps_on_stack()[:-1] if self._owns(each)]
        self._stepping.append(optimizer)
        if len(self._stepping) > 1 or not (self._taps.is_open or optimizer in self._round):
            return
        with torch.no_grad(), self._timed():
            if optimizer in self._round:
                self._taps.drop_after(self._mark)
                self._finish_round()
            if self._taps.is_open:
                scale, self._skipped = process.gradient_scale(optimizer)
                self._scale = scale if scale is not None else self._scale
                self._before_weights(optimizer, _has_closure(args, kwargs))

    def _wait_for_less(self) -> None:
        """Another model trains while this one waits to be entered: nobody is to run eager for long because of it. Hooks of an observation must be
        gone by then, or they would be compiled with the model."""
        self._waited += 1
        if self._waited == _STEPS_OF_OTHERS:
            self._taps.close()
            process.release(self._watcher)
            self._again = True

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._closed or self._manual or not self._stepping or self._stepping[-1] is not optimizer:
            return
        self._stepping.pop()
        if self._stepping:
            return
        self._passes = 0
        idle = not self._taps.is_open and not self._in_flight and not self._again
        if idle and self._alone() is optimizer and not self._schedule.due(self._step + 1):
            self._step += 1
            if self._schedule.compares:
                self._schedule.follow(Mark.now(self._device))
            return
        with torch.no_grad(), self._timed():
            self._round.add(optimizer)
            if self._taps.is_open:
                self._after_weights(optimizer, _has_closure(args, kwargs))
            if self._round_is_over():
                self._finish_round()
            else:
                self._mark = self._taps.last_pass()

    def _owns(self, optimizer: Optimizer) -> bool:
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._owned.get(optimizer)
        if known is None or known[0] != size:
            model = self._model()
            mine = {id(parameter) for parameter in model.parameters()} if model is not None else set()
            known = size, any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"])
            self._owned[optimizer] = known
        return known[1]

    def _round_is_over(self) -> bool:
        """Whether every optimizer that takes part in a step has stepped. In the first round: whether no gradient is left to another one."""
        if self._members is not None:
            return set(self._members) <= set(self._round)
        model = self._model()
        if model is None:
            return True
        stepped = {id(parameter) for optimizer in self._round for group in optimizer.param_groups for parameter in group["params"]}
        return all(parameter.grad is None or id(parameter) in stepped for parameter in model.parameters())

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """What runs inside is time of our own, of the observation that is open at its end."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._spend()

    def _spend(self) -> None:
        now = time.perf_counter()
        self._schedule.spend(now - self._since)
        self._since = now

    def _finish_round(self) -> None:
        self._drain()
        if self._taps.is_open:
            self._finish_observation()
            self._spend()
            self._schedule.end(Mark.now(self._device))
            changed = self._schedule.adjust(self._step)
            if changed is not None:
                log.warning("torchsat: step %d: %s", self._step, changed)
        elif self._schedule.compares:
            self._schedule.follow(Mark.now(self._device))
        self._step += 1
        self._members, self._round, self._mark = self._round, weakref.WeakSet(), None
        members = list(self._members)
        self._alone = weakref.ref(members[0]) if len(members) == 1 else _nobody
        if self._schedule.due(self._step) or self._again:
            self._open()

    def _open(self) -> None:
        model = self._model()
        if model is None or self._closed or MODEL in self._taps.failed:
            return
        with self._never_raising():
            self._again = False
            first = next(model.parameters(), None)
            self._device = None if first is None else first.device
            self._schedule.begin(self._step, Mark.now(self._device))
            self._rates.clear()
            self._scale = self._skipped = None
            found = self._taps.places(model)
            if self._wires is not None:
                self._lay(self._wires, found)
                # What feeds what is seen in eager; a model that cannot run eager does without. While another monitor makes all run eager, so it is.
                if self._compiled is not None and not process.forces_eager() and (self._flex or self._taps.knows(found)):
                    self._taps.open(model, found, in_graph=True)
                    return
            self._taps.open(model, found)
            # Before the first pass nobody knows whether the model will be compiled. One that was never entered is idle, and left alone.
            if self._compiled or (self._compiled is None and (self._step == self._schedule.first or self._waited)):
                self._force_eager(model)
            self._waited = 0

    def _wire(self) -> None:
        """Get ready to measure inside the compiled graph, or say why not."""
        reason = why_not()
        if reason is not None:
            log.warning('torchsat: compiled="in_graph" is not possible, observed steps run eager: %s.', reason)
            return
        process.heed_hooks(self._watcher)
        model = self._model()
        if model is not None:
            process.forget_graphs(model)
        self._wires = Wires(self._taps)

    def _lay(self, wires: Wires, found: Found) -> None:
        """Hook the modules that were found, for the compiler, if they are not those that are hooked."""
        if found.structure != self._laid:
            self._laid = found.structure
            wires.cut()
            # The slope of RReLU is drawn: it is not known where the output has overwritten z.
            sites = [(name, module) for name, module, row in found.sites if not (row.from_output and getattr(module, "inplace", False))]
            wires.lay(sites, [(name, module) for name, module in found.layers if layer_why_not(module) is None])

    def _unwire(self) -> None:
        if self._wires is not None:
            self._wires.cut()
            self._wires = None
            process.ignore_hooks(self._watcher)

    def _entered(self, training: bool) -> None:
        """The model was entered during an observation: torch has decided between graph and eager, so the stance has done its work."""
        model = self._model()
        self._compiled = process.inside_compiled_code()
        process.release(self._watcher)
        if not training or model is None:
            return
        self._schedule.enter(Mark.now(self._device))
        if not self._has_entered:
            self._enter_ranks()
        wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
        if wrapper is not None:
            self._averaged = dist.get_world_size(wrapper.process_group)
        if any(is_compiled(module) for module in model.modules()):
            self._force_eager(model)
        if self._stepping:
            self._stepping = [each for each in process.steps_on_stack() if self._owns(each)]
        self._passes += 1
        if self._passes == _PASSES_WITHOUT_STEP and not self._manual:
            log.warning(
                "torchsat: %d training passes, and no step of a torch optimizer that owns parameters of %s was seen; nothing can be shown. "
                "Call monitor.step() at the end of each step.",
                self._passes,
                type(model).__name__,
            )

    def _left(self, training: bool) -> None:
        process.release(self._watcher)
        # A validation runs its graph, even if that means to miss this observation; the next one then holds on.
        model = self._model()
        if (training or self._misses) and self._compiled and self._taps.is_open and model is not None:
            self._force_eager(model)
        elif self._compiled:
            process.linger(self._watcher)

    def _force_eager(self, model: nn.Module) -> None:
        """Run the model eager, unless that would build the T x T matrices which flex_attention is there to avoid."""
        if self._flex is None:
            self._flex = uses_flex_attention(model)
        if not self._flex:
            process.force_eager(self._watcher)

    def _gradients(self, earlier: bool) -> tuple[bool, bool | Tensor]:
        """In a backward: whether it will add to `.grad` of our parameters, and whether what earlier ones added is still there."""
        model = self._model()
        parameters = [each for each in model.parameters() if each.requires_grad] if model is not None else []
        if not parameters or self._stepping:
            return False, True
        with torch.enable_grad():
            node = parameters[0].view_as(parameters[0]).grad_fn
        leaf = node.next_functions[0][0] if node is not None else None
        try:
            adds = leaf is not None and torch._C._will_engine_execute_node(leaf)
        except RuntimeError:
            # An engine that cannot say, such as compiled autograd: then no pass is taken for discarded.
            adds = False
        if not adds:
            return False, True
        if not earlier:
            return True, True
        grads = [each.grad for each in parameters if each.grad is not None and not each.grad.is_sparse]
        if not grads:
            return True, False
        return True, torch.stack([(grad.count_nonzero() > 0).to(grads[0].device) for grad in grads]).any()

    def _before_weights(self, optimizer: Optimizer, closure: bool) -> None:
        divisor = getattr(optimizer, "grad_scale", None)
        self._rates.update((id(p), float(group["lr"])) for group in optimizer.param_groups if _is_number(group.get("lr")) for p in group["params"])
        for layer, weight in self._weights_of(optimizer):
            layer.before_step(weight)
            if not closure:
                layer.observe_grad(weight, divisor)

    def _after_weights(self, optimizer: Optimizer | None, closure: bool = False) -> None:
        for layer, weight in self._weights_of(optimizer):
            if closure or optimizer is None:
                layer.observe_grad(weight, None)
            layer.after_step(weight)

    def _weights_of(self, optimizer: Optimizer | None) -> list[tuple[Layer, Tensor]]:
        """The observed layers whose weight this optimizer owns; of None, all."""
        owned = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
        alive = [(layer, module) for layer in self._taps.layers.values() if (module := layer.module()) is not None]
        weights = [(layer, cast(Tensor, getattr(module, layer.parameter))) for layer, module in alive]
        freed = {layer.name: "the memory of its weight is freed when the optimizer steps" for layer, weight in weights if is_freed(weight)}
        self._taps.notes.update(freed)
        return [(layer, weight) for layer, weight in weights if layer.name not in freed and (owned is None or id(weight) in owned)]

    def _finish_observation(self) -> None:
        """Pack what was measured, send it to the host, and take the hooks off."""
        taps = self._taps
        layers = self._weights_of(None)
        taps.close()
        process.release(self._watcher)
        together = self._meets()
        if taps.saw_pass:
            self._misses = self._silent = 0
            self._say_stopped()
        elif taps.saw_model and not (taps.names or taps.recurrent):
            self._warn_of_nothing()
        else:
            self._miss(self._model())
        if together:
            # Which steps are observed is a matter of all ranks.
            self._again = False
            self._send(layers)
        elif taps.saw_pass:
            self._pack(layers)

    def _say_stopped(self) -> None:
        stopped = [name for name in self._taps.stopped if name not in self._said_stopped]
        self._said_stopped.update(stopped)
        if stopped and self._speaks:
            names = ", ".join(stopped[:5]) + (f" and {len(stopped) - 5} more" if len(stopped) > 5 else "")
            log.warning("torchsat: step %d: %s ran before, but not in the last observations.", self._step, names)

    def _pack(self, layers: list[tuple[Layer, Tensor]]) -> None:
        """Send what was measured to the host."""
        taps = self._taps
        feeds = taps.feeders()
        packed: dict[torch.device, list[Tensor]] = {}
        facts: list[tuple[torch.device, int, dict[str, Any]]] = []
        weight_facts: list[tuple[torch.device, dict[str, Any]]] = []
        for site in taps.sites.values():
            if site.row is not None:
                width = len(SUMS) + len(MAXES) + len(UNITS) + (0 if site.heads is None else site.heads.numel())
                facts.append((site.row.device, width, _facts(site)))
                packed.setdefault(site.row.device, []).extend([site.row, summarise_units(site.block, site.row.device)])
                if site.heads is not None:
                    packed[site.row.device].append(site.heads.to(site.row.device).flatten())
        for layer, weight in layers:
            if layer.name not in feeds:
                continue
            _measure_frozen(layer, weight)
            row = layer.row()
            if row is not None:
                known = {"numel": weight.numel(), "n": layer.n, "learning_rate": self._rates.get(id(weight))}
                weight_facts.append((row.device, {**self._layer_facts(layer, feeds), **known}))
                packed.setdefault(row.device, []).append(row)
        if not facts:
            self._warn_of_nothing()
            return
        # The scale and the overflow stay with the rows of their own device: a copy between devices would be read before it has arrived.
        home = self._scale.device if self._scale is not None and self._scale.device in packed else next(iter(packed))
        packed[home].extend(_number(value, home) for value in (self._scale, self._skipped))
        parts = {device: _to_host(torch.cat(rows)) for device, rows in packed.items()}
        self._in_flight.append(_InFlight(self._step, time.time(), facts, weight_facts, parts, home, self._averages(layers)))
        self._drain()

    def _averages(self, layers: list[tuple[Layer, Tensor]]) -> float:
        """What the loss that is trained on is smaller by than the one whose gradient a rank sees: data parallelism averages over ranks, and a
        pipeline divides what its micro-batches have added up (torch 2.6 leaves that to the loss)."""
        if not dist.is_available() or not dist.is_initialized():
            return 1.0
        sharded = [weight for layer, weight in layers if layer.name not in self._taps.spread]
        chunks = max((stage.chunks or 1 for stage in self._stages.values() if hasattr(stage, "scale_grads")), default=1)
        return float((self._averaged or averaged_over(self._model(), sharded)) * chunks)

    def _layer_facts(self, layer: Layer, feeds: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """The WEIGHT_FACTS of a layer."""
        return {"name": layer.name, "feeds": feeds[layer.name], "fan_in": layer.fan_in, "data": layer.name in self._taps.fed_by_data}

    def _stage_of(self, name: str) -> Any:
        """The stage that a site or layer is in."""
        return self._stages[name.partition("/")[0].partition(".")[0]]

    @property
    def _together(self) -> bool:
        """Whether other ranks observe with this one."""
        return self._ranks is not None and self._ranks.together

    @property
    def _speaks(self) -> bool:
        """Whether this rank writes, logs and alerts."""
        return self._ranks is None or not self._ranks.together or self._ranks.rank == 0

    def _enter_ranks(self) -> None:
        """The first training pass: tell the other ranks that this one watches."""
        self._has_entered = True
        group = default_group() if self._group == "auto" else self._group
        if group is None:
            return
        try:
            kind = "stage of a pipeline" if self._stages else type(self._model()).__qualname__.removeprefix("FSDP")
            self._ranks = self._reader = Ranks(group, kind, self._lose)
        except Exception as error:
            log.warning("torchsat: each rank observes by itself: %s: %s", type(error).__name__, error)

    def _meets(self) -> bool:
        """Whether the observation that ends now is one of several ranks. The end of the first one decides, on all ranks alike."""
        if not self._has_met:
            self._has_met = True
            model = self._model()
            if model is not None and is_flattened(model):
                raise TypeError(_FLATTENED)
            if not self._has_entered:
                self._enter_ranks()
            if self._ranks is not None:
                try:
                    why_apart = self._ranks.meet(self._device or torch.device("cpu"))
                except Exception as error:
                    why_apart = f"{type(error).__name__}: {error}"
                if why_apart is not None:
                    self._lose(why_apart)
            self._share(self._together)
            self._move_files()
        return self._together

    def _share(self, together: bool) -> None:
        """What adds up over observations does so where all ranks are known; the interval is agreed upon."""
        self._taps.keeps_windows = not together
        self._schedule.shared = together

    def _lose(self, why: str) -> None:
        """From now on this rank observes by itself."""
        self._ranks = None
        self._share(False)
        self._move_files()
        log.warning("torchsat: rank %d observes by itself from here on: %s. Training is not affected.", self._rank, why)

    @property
    def _rank(self) -> int:
        """In the whole job, of which there may be nothing left; 0 where there is none."""
        if self._reader is not None:
            return self._reader.everywhere
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def _move_files(self) -> None:
        """Only the first rank of a job writes where the user said; what another one writes, for itself or its group, must not get in between."""
        if self._speaks and self._rank:
            for sink in self._sinks:
                if hasattr(sink, "move"):
                    sink.move(f"rank{self._rank}")

    def _send(self, layers: list[tuple[Layer, Tensor]]) -> None:
        """Hand what was measured to all ranks; also if it is nothing, since they wait for it."""
        assert self._ranks is not None
        taps, ranks = self._taps, self._ranks
        feeds = taps.feeders()
        sites = {}
        for name, site in taps.sites.items():
            share = taps.share(site)
            softmax = site.kind == "softmax"
            facts = {**_facts(site), "units": site.units if softmax else share.units, "heads": share.units if softmax else None}
            if self._stages:
                stage = self._stage_of(name)
                leaves = facts["output"] and not stage.is_last
                facts.update(stage=stage.stage_index, leaves=leaves, output=facts["output"] and not leaves)
            sites[name] = SitePart(facts, site.row, site.block, site.heads, share.first, share.counts)
        parts = {}
        for layer, weight in layers:
            if layer.name in feeds:
                _measure_frozen(layer, weight)
                place = placement(weight)
                facts = {**self._layer_facts(layer, feeds), "features": layer.features}
                if self._stages:
                    facts["stage"] = self._stage_of(layer.name).stage_index
                parts[layer.name] = LayerPart(
                    facts,
                    layer.numbers,
                    layer.inputs,
                    layer.n,
                    local(weight).numel(),
                    self._rates.get(id(weight)),
                    place is not None,
                    place is None or place.counts,
                    taps.counts_repeated if layer.input_counts is None else layer.input_counts,
                    layer.first,
                    layer.input_elements,
                )
        divisor: Tensor | float = self._averages(layers)
        if self._scale is not None:
            divisor = self._scale * divisor
        try:
            sent = ranks.send(
                self._step,
                sites,
                parts,
                divisor=divisor,
                interval=self._schedule.wanted,
                skipped=self._skipped,
                before=self._drain,
                history=self._history,
            )
        except Exception as error:
            if self._errors == "raise":
                raise
            ranks.leave()
            self._lose(f"{type(error).__name__}: {error}")
            return
        if sent is not None:
            # The ranks agree on the first step, and on what went before it: not all need see the files of an earlier session.
            self._step = sent.step
            if ranks.history is not None:
                self._take_up(ranks.history)
                ranks.history = None
            self._in_flight.append(sent)
            if ranks.interval:
                self._follow_interval(ranks.interval)
        self._drain()

    def _read(self, flight: Round) -> _Numbers:
        assert self._reader is not None
        merged = self._reader.read(flight)
        if merged.differing and not self._said_differing and self._speaks:
            self._said_differing = True
            log.warning(
                "torchsat: step %d: ranks hold different weights in %s%s. What is shown is of all ranks together; if each trains its own model, "
                "pass group=None.",
                flight.step,
                merged.differing[0],
                f" and {len(merged.differing) - 1} more layers" if len(merged.differing) > 1 else "",
            )
        return _Numbers(merged.sites, merged.layers, 1.0, merged.skipped)

    def _follow_interval(self, interval: int) -> None:
        """All ranks observe as seldom as the one that needs it most."""
        before, self._schedule.interval = self._schedule.interval, interval
        if interval != before and self._speaks:
            log.warning(
                "torchsat: step %d: observing takes %s than the budget of %.3g %% allows on the rank where it takes most. One in %d steps is "
                "observed from here on; budget=None keeps every=%d.",
                self._step,
                "more" if interval > before else "less",
                100 * (self._schedule.budget or 1.0),
                interval,
                self._schedule.every,
            )

    def _warn_of_nothing(self) -> None:
        model = self._model()
        if model is not None and not self._announced and self._speaks:
            self._announced = True
            log.warning("torchsat: %s: %s, nothing is watched. See monitor.coverage.", type(model).__name__, self._nothing)

    def _miss(self, model: nn.Module | None) -> None:
        """An observed step without a training pass is not a silent gap."""
        if self._wires is not None and self._compiled is not None and self._silent < 2:
            self._silent += 1
            self._again = True
            if self._silent == 2 and model is not None:
                self._unwire()
                log.warning(
                    'torchsat: no compiled graph of %s was heard: it was compiled before torchsat.watch(compiled="in_graph"), or it does not run '
                    "compiled. Observed steps run eager.",
                    type(model).__name__,
                )
            return
        self._misses += 1
        if self._misses == 3 and model is not None and self._speaks:
            why = (
                "it uses flex_attention and runs compiled; torchsat does not run it eager, where the attention would take T x T memory"
                if self._flex
                else "it is in evaluation mode; call model.train() for training"
                if not any(module.training for module in model.modules())
                else "its activations did not run, or only without gradients, or in a compiled function torchsat did not find"
            )
            log.warning("torchsat: three steps were to be observed, but no training pass of %s was seen: %s.", type(model).__name__, why)
        self._compiled = True
        self._again = self._misses < 3

    def _drain(self, wait: float = 0.0) -> None:
        """Judge and hand on, in order, what has arrived; or all, waiting for so many seconds. What all ranks know becomes visible on all of them at
        the end of the same step, so that a loop that stops on an alert stops everywhere."""
        if len(self._in_flight) > _MOST_IN_FLIGHT:
            wait = max(wait, PATIENCE)
        while self._in_flight:
            flight = self._in_flight[0]
            if isinstance(flight, Round) and self._together:
                if not wait and self._step < flight.step + LAG:
                    return
                flight.wait(wait or GRACE)
            elif wait:
                flight.wait(wait)
            elif not flight.arrived():
                return
            self._in_flight.remove(flight)
            self._deliver(flight)

    def _deliver(self, flight: _InFlight | Round) -> None:
        numbers = flight.read() if isinstance(flight, _InFlight) else self._read(flight)
        if numbers.skipped:
            self._again = self._again or not self._together
            return
        records: list[Record] = []
        for facts, row, of_ranks in numbers.sites:
            name = facts["site"]
            record, stuck = to_record(facts, row, numbers.scale, self._stuck.get(name))
            if stuck is not None:
                self._stuck[name] = stuck
            if record.n or record.nonfinite:
                records.append(replace(record, **of_ranks) if of_ranks else record)
        if not records and isinstance(flight, Round):
            if not flight.layout.sites and not self._taps.names:
                self._warn_of_nothing()
            return
        weights = [to_weight(facts, row) for facts, row in numbers.layers]
        snapshot = Snapshot(flight.step, flight.time, tuple(records), tuple(weights), overhead=self._schedule.overhead)
        snapshot = replace(snapshot, alerts=self._verdict(snapshot))
        self._latest = snapshot
        if not self._speaks:
            return
        self._announce(snapshot)
        # First to the files: a callback may close the monitor.
        for sink in list(self._sinks):
            self._to_sink(sink, functools.partial(sink, snapshot))
        for alert in snapshot.alerts:
            _say(alert)
            if self._on_alert is not None:
                try:
                    self._on_alert(alert)
                except Exception as error:
                    self._on_alert = None
                    self._fault("on_alert", error, "it is not called again")

    def _verdict(self, snapshot: Snapshot) -> tuple[Alert, ...]:
        return self._diagnosis.judge(self._judge.judge(snapshot), self._judge.firing, snapshot)

    def _announce(self, snapshot: Snapshot) -> None:
        """One line after the first observation: what is watched, what is not."""
        if self._announced:
            return
        self._announced = True
        coverage = self.coverage
        unseen, kinds = coverage.unseen, coverage.described
        rest = ""
        if unseen:
            names = ", ".join(place for place, _ in unseen[:3]) + (", ..." if len(unseen) > 3 else "")
            rest = f"; not seen: {len(unseen)} ({names}), see monitor.coverage"
        log.info("torchsat: watching %s and %d layers%s", kinds, len(snapshot.weights), rest)

    def _to_sink(self, sink: Sink, call: Callable[[], Any] | None) -> None:
        if call is None:
            return
        try:
            call()
        except Exception as error:
            if sink in self._sinks:
                self._sinks.remove(sink)
                with contextlib.suppress(Exception):
                    getattr(sink, "close", lambda: None)()
            self._fault(f"sink {getattr(sink, '__qualname__', type(sink).__name__)}", error, "it gets no more snapshots")

    def _fault(self, place: str, error: Exception, lost: str | None = None) -> None:
        """The monitor failed at a place: say so once, and go on without it."""
        if self._errors == "raise":
            raise error
        lost = lost or ("all monitoring stops" if place == MODEL else f"{place} is no longer watched")
        log.warning("torchsat: %s: %s: %s; %s. Training is not affected.", place, type(error).__name__, error, lost)
        if place == MODEL:
            self._taps.failed[MODEL] = str(error)
            self._taps.close()
            process.release(self._watcher)
            if self._ranks is not None:
                # The others are not to wait for what never comes.
                self._ranks.leave()

    def _never_raising(self) -> _NeverRaising:
        return _NeverRaising(self)


class _NeverRaising:
    """The body runs without gradients; what it raises ends the monitor, not training."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self._no_grad.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self._no_grad.__exit__(kind, error, trace)
        if not isinstance(error, Exception):
            return False
        self._monitor._fault(MODEL, error)
        return True


def _measure_frozen(layer: Layer, weight: Tensor) -> None:
    """A layer that no optimizer owns (a frozen part) has a gain and an input too."""
    if not layer.n and layer.inputs is not None:
        layer.after_step(weight)


_FLATTENED = (
    "a model in FullyShardedDataParallel (FSDP1) cannot be watched: it makes one flat parameter of the weights of many layers. "
    "Use torch.distributed.fsdp.fully_shard (FSDP2)."
)


def _stages(model: Any) -> dict[str, Any]:
    """The stages of a pipeline, where one is given, or several that this rank runs."""
    pipelines = sys.modules.get(PIPELINES)
    given = model if isinstance(model, (list, tuple)) else [model]
    if pipelines is None or not given or not all(isinstance(each, pipelines._PipelineStageBase) for each in given):
        return {}
    return {f"stage{each.stage_index}": each for each in given}


def _plain(model: Any) -> nn.Module:
    """The module itself, out of its compiled or distributed wrapper; TypeError where it cannot be watched."""
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "nn.DataParallel cannot be watched: it runs copies of the model that are thrown away after each pass. "
            "Use torch.nn.parallel.DistributedDataParallel, or watch the module inside it on one device."
        )
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TypeError(
            "a TorchScript model cannot be watched: its modules do not run Python hooks. Watch the model that it was made from, and close the "
            "monitor before torch.jit.script."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed are a torch.nn.Module and stages of torch.distributed.pipelining")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    assert isinstance(model, nn.Module)
    for name, module in model.named_modules():
        if isinstance(module, (nn.DataParallel, torch.jit.ScriptModule)):
            raise TypeError(f"{clean(name)} is a {type(module).__name__}, which cannot be watched; see torchsat.watch(exclude=...) only for sites")
    if is_flattened(model):
        raise TypeError(_FLATTENED)
    return model


def _trust_kernels(model: nn.Module) -> None:
    """Before training, since it waits for the devices; on one that a model moves to later, plain torch measures."""
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        why_not = trust_kernels(device)
        if why_not is not None:
            log.warning("torchsat: its kernels are not used on %s, where plain torch measures samples: %s", device, why_not)


def _check(every: Any, budget: Any, epsilon: Any, sample: Any, activations: Any, rules: Any, group: Any, start: Any, errors: Any) -> None:
    if group not in (None, "auto") and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f'group is {group!r}; allowed are "auto" (all ranks of torch.distributed), a torch.distributed.ProcessGroup of which this rank is '
            "a member, and None (each rank by itself)"
        )
    if start != "resume" and (not isinstance(start, int) or isinstance(start, bool) or start < 0):
        raise ValueError(f'start is {start!r}; allowed are whole numbers from 0 up (optimizer steps already taken) and "resume"')
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every is {every!r}; allowed are whole numbers from 1 up (steps between observations)")
    if budget is not None and (not isinstance(budget, (int, float)) or isinstance(budget, bool) or not 0 < budget <= 1):
        raise ValueError(f"budget is {budget!r}; allowed are numbers above 0 up to 1 (a share of training time; 0.02 by default), or None for any")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ValueError(f"epsilon is {epsilon!r}; allowed are numbers between 0 and 1 (a share of the peak derivative; 0.05 by default)")
    if sample not in (None, "auto") and (not isinstance(sample, int) or isinstance(sample, bool) or sample < 1):
        raise ValueError(f'sample is {sample!r}; allowed are whole numbers from 1 up, None for all elements, and "auto"')
    for kind, values in ((Activation, activations), (Rule, rules)):
        name = f"{kind.__name__.lower()}s"
        if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name} must be a tuple of torchsat.{kind.__name__}, such as (*torchsat.{name.upper()}, torchsat.{kind.__name__}(...))")
    if errors not in ("warn", "raise"):
        raise ValueError(f'errors is {errors!r}; allowed are "warn" and "raise"')


def _patterns(name: str, given: Any) -> list[str]:
    found = [given] if isinstance(given, str) else list(given or ()) if given is None or isinstance(given, Iterable) else [given]
    if not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f'{name} is {given!r}; allowed are a pattern of site names such as "encoder.*", or several')
    return found


def _selector(include: Patterns, exclude: Patterns) -> Callable[[str], bool]:
    wanted, unwanted = _patterns("include", include), _patterns("exclude", exclude)

    def selects(name: str) -> bool:
        if wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            return False
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in unwanted)

    return selects


def _facts(site: Site) -> dict[str, Any]:
    """The SITE_FACTS of a site."""
    constants = site.bound.constants
    return {
        "site": site.name,
        "activation": site.bound.activation.name,
        "kind": site.kind,
        "tails": site.bound.tails if site.bound.tails_known else "unknown",
        "output": site.output,
        "gate": site.gate or site.multiplies,
        "after": tuple(site.after),
        "units": site.units,
        "normal_low": constants.normal_low if constants else None,
        "normal_high": constants.normal_high if constants else None,
        "normal_derivative": constants.normal_derivative if constants else None,
    }


def _number(value: Tensor | None, device: torch.device) -> Tensor:
    """One element, NaN for None."""
    dtype = accumulator(device)
    if value is None or value.device != device:
        return torch.full((1,), math.nan, dtype=dtype, device=device)
    return value.detach().reshape(1).to(dtype)


def _nobody() -> None:
    """No optimizer."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `step` was given a closure; torch hands a hook the optimizer itself as the first argument."""
    return len(args) > 1 or kwargs.get("closure") is not None


def _to_host(packed: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The numbers on the host, and the event after which they are there."""
    if packed.device.type != "cuda":
        return packed.cpu(), None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(packed.device))
    return host, event


def _say(alert: Alert) -> None:
    level = logging.INFO if not alert.firing else logging.ERROR if alert.severity == "critical" else logging.WARNING
    log.log(level, "torchsat: step %d: %s", alert.step, verdict(alert))
