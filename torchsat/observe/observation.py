"""One observation, from its beginning to its end: the object that owns everything that belongs to it.

    HOOKED --a training pass is measured--> ENTERED --finish()--> FINISHED
       |                                       |
       +------------------ abandon(why) -------+----------------> ABANDONED

HOOKED: the hooks are on the model, and nothing has been measured yet. ENTERED: something of a training pass (one call of the model in training) has
been measured. FINISHED: `finish` has taken the hooks off and returned the Parts. ABANDONED: the hooks are off, the schedule's window is void, and
what was measured is lost; the monitor may observe a later step in its place. The last two are final: a hook that fires late finds a closed guard.

The observation owns hooks, passes with their rows, what lineage keeps during a pass, learning rates, the loss scale, notes, and its window in the
schedule. What outlives it is written into `Sites` by `finish`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchsat import internals
from torchsat.faults import MODEL, Faults
from torchsat.observe import calls, ingraph, layers, logits, modules, own, passes, recurrent, stream, way
from torchsat.observe.calls import Calls
from torchsat.observe.hooks import Guard, Hook
from torchsat.observe.ingraph import GraphHooks, GraphReceiver
from torchsat.observe.layers import Layers
from torchsat.observe.lineage import Lineage
from torchsat.observe.meter import Meter
from torchsat.observe.own import Candidate
from torchsat.observe.passes import OnPass, Pass, Passes, PassEvent
from torchsat.observe.saving import all_off, leave_out
from torchsat.observe.tallies import tally_parts
from torchsat.observe.way import Way
from torchsat.options import Options
from torchsat.parts import Parts, SitePart
from torchsat.schedule import Clock, Window
from torchsat.sites import Site, Sites, Structure
from torchsat.structure import Found
from torchsat.ways import PLACE

Source = Callable[["Observation", Found], Callable[[], None] | None]
"""A function that puts hooks on the modules that were found. If it returns a function, that one is called after all sources, for hooks that must run
after those of the other sources."""

SOURCES: tuple[Source, ...] = (
    *(passes.attach, way.attach, calls.attach, modules.attach, own.attach, recurrent.attach, stream.attach),
    *(logits.attach, layers.attach),
)
"""Where activations come from in eager execution. Their hooks run in this order."""
GRAPH_SOURCES: tuple[Source, ...] = (ingraph.attach,)
"""Where activations come from while the compiled graph measures."""
ONLY_IN_EAGER = "measured in eager steps only: in a compiled graph the activations of modules are heard, not function calls, gates or attention"


class State(Enum):
    """The state of an observation; see the diagram in the module's docstring."""

    HOOKED = "hooked"
    ENTERED = "entered"
    FINISHED = "finished"
    ABANDONED = "abandoned"


class Execution(Enum):
    """Whether an observation measures with hooks in eager execution, or with operators in a compiled graph.

    EAGER -> GRAPH: the hooks for eager execution are on, but the operators of a compiled graph reported something.
    """

    EAGER = "eager"
    GRAPH = "graph"


class Retry(Enum):
    """Why the next step is observed, whether or not the schedule asks for it."""

    OTHER_MODEL = "another model trained while the observation waited for this one"
    OVERFLOW = "the optimizer found an overflow and skipped the step"
    NO_PASS = "no training pass was seen in the observed step"
    SILENT_GRAPH = "the compiled graph told nothing in the observed step"
    NO_STEP = "the observation waited too long for a step"
    RESUMED = "the monitor went on from a saved state"


class Observation:
    """One observed step.

    Args:
        sites: what is known of the sites of the model; `finish` adds to it.
        options: the options of the monitor.
        turn: the number of this observation, which selects the elements that are read.
        window: the schedule's window, to which the time of our own code is added.
        clock: the clocks of the host and the device.
        faults: reports errors of our own code.
        on_pass: called when the model's forward begins or ends, and when a fault ends all monitoring.
        stages: the stages of a pipeline, keyed by the name that their sites begin with; empty for any other model.
    """

    def __init__(
        self, sites: Sites, options: Options, *, turn: int, window: Window, clock: Clock, faults: Faults, on_pass: OnPass, stages: Mapping[str, Any]
    ) -> None:
        self.sites = sites
        self.options = options
        self.turn = turn
        self.window = window
        self.on_pass = on_pass
        self.execution = Execution.EAGER
        self.abandoned_for: Retry | None = None
        self.steps_of_others = 0
        """Number of optimizer steps of other models since the observation was opened, as long as this model has not been called."""
        self.newly_stopped: list[str] = []
        """After `finish`: the sites that ran before but not in the last observations, and were not reported for that yet."""
        self.unspread: list[Tensor] = []
        """After `finish`: the weights of layers that tensor parallelism does not spread."""
        self._state = State.HOOKED
        self._faults = faults
        self._stages = stages
        self._handles: list[Any] = []
        self._graph_hooks: GraphHooks | None = None
        self._graph_only: frozenset[str] | None = None
        """The names of the sites that a compiled graph can measure, if the graph alone measures; None in eager execution."""
        self._scale: Tensor | None = None
        self._skipped: Tensor | None = None
        self.candidates: list[Candidate] = []
        """The modules of the user's own that may be activations."""
        self._noted: dict[str, str] = {}
        self._failures: dict[tuple[type[Exception], str], tuple[Exception, list[str]]] = {}
        """For each kind of fault the first one, and the places at which it happened."""
        self.guard = Guard(self.fail, window, clock, sites.failed)
        self.lineage = Lineage(sites, self.note_if_wanted)
        self.logits = logits.Logits(self)
        self.passes = Passes(self.guard, lambda: on_pass(PassEvent.REPEATED, True), functools.partial(_hear_loss, self))
        self.meter = Meter(options, turn, sites, self.passes, self.lineage, self.guard, self.note)
        self.layers = Layers(self)
        self.way = Way(self)
        self.calls = Calls(self)

    @property
    def state(self) -> State:
        """The state of this observation."""
        return State.ENTERED if self._state is State.HOOKED and self.passes.has_measured else self._state

    @property
    def is_open(self) -> bool:
        """Whether hooks of ours can still measure something."""
        return self._state is State.HOOKED

    @property
    def has_measured(self) -> bool:
        """Whether anything of a training pass has been measured."""
        return self.passes.has_measured

    def open(self, found: Found, graph_hooks: GraphHooks | None, execution: Execution) -> None:
        """Put the hooks on the model as it was found.

        Args:
            graph_hooks: the hooks that are compiled with the model, if there are any. What they measure goes to this observation from now on.
            execution: with GRAPH no other hooks are put on.
        """
        self.execution = execution
        self._graph_only = frozenset(found.names) if execution is Execution.GRAPH else None
        self._graph_hooks = graph_hooks
        self.passes.gradients.watch(found.model)
        if graph_hooks is not None:
            graph_hooks.receiver = GraphReceiver(self)
        leave_out(self.guard)
        sources = SOURCES if execution is Execution.EAGER else GRAPH_SOURCES
        for hook_ends in reversed([source(self, found) for source in sources]):
            if hook_ends is not None:
                hook_ends()

    def hook_before(self, module: nn.Module, place: str | None, call: Callable[..., None], *first: Any) -> None:
        """Have `call` called with (*first, module, args, kwargs) before the module's forward, through the guard for this place; None: unguarded."""
        self._handles.append(module.register_forward_pre_hook(self._hook(module, place, call, *first), with_kwargs=True))

    def hook_after(self, module: nn.Module, place: str | None, call: Callable[..., None], *first: Any, always: bool = False) -> None:
        """Have `call` called with (*first, module, args, output) after the module's forward; `always`: with output None after one that raised too."""
        self._handles.append(module.register_forward_hook(self._hook(module, place, call, *first), always_call=always))

    def _hook(self, module: nn.Module, place: str | None, call: Callable[..., None], *first: Any) -> Hook:
        return Hook(functools.partial(call, *first) if place is None else self.guard(place, call, *first), module, self.guard)

    def heard_graph(self) -> None:
        """Note that a compiled graph has reported something, so that this observation cannot see the structure of the model."""
        self.execution = Execution.GRAPH
        self.passes.hears_backward = False

    def note(self, place: str, reason: str) -> None:
        """Record what is missing at a place."""
        self._noted[place] = reason
        self.sites.note(place, reason)

    def note_if_wanted(self, place: str, reason: str) -> None:
        """Like `note`, unless the user has excluded the place, or this observation has noted another reason there or for the module around it."""
        if self.options.selects(place) and place not in self._noted and place.rpartition("/")[0] not in self._noted:
            self.note(place, reason)

    def reject(self, place: str, reason: str) -> None:
        """Record that a place cannot be measured, as its module shows before it runs."""
        self._noted.setdefault(place, reason)
        self.sites.reject(place, reason)

    def forget_inside(self, name: str) -> None:
        """Forget what was met inside a module that has turned out to be a site itself."""
        inside = [place for place in (*self.sites.known, *self._noted) if place.startswith(f"{name}/")]
        self.sites.forget(f"{name}/")
        for place in (name, *inside):
            self._noted.pop(place, None)
        for each in self.passes:
            for place in inside:
                each.forget(place)

    def fail(self, place: str, error: Exception) -> None:
        """Stop watching a place at which our own code raised. At MODEL this ends the observation.

        Other places are logged when the observation ends, and those with the same fault in one line.
        """
        self.sites.fail(place, str(error) if place == MODEL else f"{type(error).__name__}: {error}")
        for each in self.passes:
            each.forget(place)
        if place == MODEL:
            self._faults.end(error)
            self.abandon(None)
            self.on_pass(PassEvent.FAILED, False)
        if place == MODEL or self._faults.raises:
            self._faults.report(place, error)
            return
        # Places differ in their shapes, so numbers do not tell one fault from another.
        kind = type(error), re.sub(r"\d+", "", str(error))
        self._failures.setdefault(kind, (error, []))[1].append(place)

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """Called before an optimizer of the model steps. `closure` says that gradients are computed during the step."""
        self.calls.end_pass()
        scale, self._skipped = internals.gradient_scale(optimizer)
        self._scale = scale if scale is not None else self._scale
        if not closure:
            self.enters_step(optimizer)
        self.passes.gradients.is_stepping = True
        self.layers.before_step(optimizer, closure)

    def enters_other_round(self, optimizer: Optimizer) -> None:
        """Called after an optimizer has made a step that does not belong to this observation: forget the passes whose gradient has entered it."""
        self.enters_step(optimizer)
        self.passes.drop_entered()

    def enters_step(self, optimizer: Optimizer) -> None:
        """Note that the gradients of the optimizer's parameters, as they are now, enter its step."""
        self.passes.gradients.enter_step(each for group in optimizer.param_groups for each in group["params"])

    def after_step(self, optimizer: Optimizer | None, closure: bool = False) -> None:
        """Called after an optimizer of the model has stepped, or with None after a step that the user ended by hand."""
        self.passes.gradients.is_stepping = False
        if optimizer is not None and closure:
            self.enters_step(optimizer)
        self.passes.gradients.has_stepped()
        self.layers.after_step(optimizer, closure)

    def stage_of(self, name: str) -> int | None:
        """The number of the pipeline's stage that a site or layer is in; None where there is no pipeline."""
        return None if not self._stages else int(self._stage_object(name).stage_index)

    def finish(self) -> Parts:
        """Take the hooks off and merge what the passes measured into Parts. Where nothing was measured, no part has a row."""
        weights = self.layers.weights()
        self._unhook(State.FINISHED)
        self.guard.attempt(PLACE, self.way.conclude)
        whole, eager = self.passes.settle(), self.execution is Execution.EAGER
        if self.has_measured and eager:
            self.lineage.conclude(self.passes.has_entered)
        if any(name in whole.rows and not site.decided for name, site in self.sites.ran.items()):
            # Some site ran for the first time after the structure had been learned, so the next observation learns it again.
            self.sites.structure = Structure.NEW
        self.lineage.end_pass()
        if self.has_measured and self._graph_only is not None:
            for name in self.sites.ran:
                if name not in self._graph_only:
                    self.note(name, ONLY_IN_EAGER)
        self.newly_stopped = self.sites.settle(whole.rows, self._noted, self.has_measured and eager)
        self.unspread = [weight for layer, weight in weights if layer.name not in self.sites.spans]
        sites, of_layers = self._site_parts(whole), self.layers.parts(whole.inputs, weights)
        own.conclude(self)
        self._report_failures()
        tallies = tally_parts(whole, self.sites, self.passes.tally_facts)
        return Parts(sites, of_layers, tallies, scale=self._scale, skipped=self._skipped, generation=self.sites.generation)

    def abandon(self, why: Retry | None) -> None:
        """Take the hooks off and forget what was measured. `why` is the reason to observe a later step in its place; None where there is none."""
        if self.is_open:
            self.abandoned_for = why
            self._unhook(State.ABANDONED)
            self.lineage.end_pass()
            self.window.void()
            self._report_failures()

    def say_unmeasured(self, places: Sequence[str], reason: str) -> None:
        """Log once in a run that these layers are not measured."""
        self._faults.say_unmeasured(places, reason)

    def _unhook(self, state: State) -> None:
        self._state = state
        self.guard.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        all_off(self.guard, self.passes.gradients.model)
        self.calls.remove()
        if self._graph_hooks is not None:
            self._graph_hooks.receiver = None

    def ends_model(self, name: str) -> bool:
        """Whether what a site or layer computes may be an output of the whole model: it is in the last stage of a pipeline, or there is none."""
        return not self._stages or bool(self._stage_object(name).is_last)

    def _stage_object(self, name: str) -> Any:
        return self._stages[name.partition("/")[0].partition(".")[0]]

    def _site_parts(self, whole: Pass) -> dict[str, SitePart]:
        """What was measured at every site that has ever run. The row of a site is None if it did not run in this observation."""
        parts = {name: self.guard.attempt(name, _site_part, self, site, whole) for name, site in list(self.sites.ran.items())}
        return {name: part for name, part in parts.items() if part is not None}

    def _report_failures(self) -> None:
        for error, places in self._failures.values():
            self._faults.report_places(places, error)
        self._failures.clear()


def _hear_loss(observation: Observation) -> None:
    """Note that a backward has begun."""
    observation.lineage.hear_loss()
    observation.logits.hear_loss()


def _site_part(observation: Observation, site: Site, whole: Pass) -> SitePart:
    name, heads = site.name, whole.heads.get(site.name)
    if heads is not None:
        site.head_count = heads.shape[1]
    facts, leaves = site.facts(), False
    if (facts.output or facts.last) and not observation.ends_model(name):
        # An output of a stage that is not the last one is no output of the model.
        facts, leaves = dataclasses.replace(facts, output=False, last=False, losses=()), facts.output
    span, stage = observation.sites.span(site), observation.stage_of(name)
    return SitePart(facts, whole.rows.get(name), whole.blocks.get(name), heads, span, stage, leaves)
