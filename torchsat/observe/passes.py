"""Decides which forward passes count in an observation, and keeps what each of them measured. A *pass* is one call of the whole model.

The principle: **what is measured are the training passes whose gradient enters the step.** Everything follows from it:

- A training pass is one with autograd on and some part of the model in training mode. Only passes of one thread are observed, the first that trains,
  since another thread may use the model at the same time.
- A pass counts if a backward that runs through it has entered the optimizer's step, which gradients.py tells from what happens to `.grad`. A batch
  whose gradient is emptied does not count; nor do the passes of an attack, a metric, a rollout, or of a discriminator while its generator is
  trained. It makes no difference how the user keeps their gradients out of the step: by `torch.autograd.grad`, by freezing or by `zero_grad`.
- A backward through the gradient of a pass (`create_graph=True`, as in a gradient penalty or in MAML) is a backward through that pass.
- Where no backward has entered the step, as in a loop that the user ends by hand or where torch runs no hooks in the backward, the passes count
  whose gradients came nearest to it: added to `.grad`, returned, emptied; where no backward was heard at all, every pass counts.
- A recompute of activation checkpointing runs inside a backward and is not counted again. In reentrant mode only the recompute can see gradients.
- A pass is forgotten if its forward raised.
- What runs outside the model's own forward, as its parts that are called one by one, is one pass until a part runs again or a backward begins.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.faults import MODEL
from torchsat.internals_distributed import rehearses
from torchsat.observe.gradients import Backward, Fate, Gradients
from torchsat.observe.graph import ends
from torchsat.observe.hooks import Guard
from torchsat.parts import Key
from torchsat.statistics import empty_row, merge_, merge_heads_
from torchsat.structure import Found, Stages
from torchsat.ways import PLACE
from torchsat.weights import input_sums

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

TRANSFORMED = "it was called inside a transform of torch.func (grad, vmap, jvp), whose tensors stand for others and hold no numbers of their own"
_MOST = 8
"""The most passes that are kept apart. If there are more, the oldest two of equal standing are merged, and count or do not count together."""
_STANDING = (Fate.ENTERED, Fate.ADDED, Fate.GIVEN, Fate.GONE, Fate.NONE)
"""The fates of a backward, from the one that is nearest to the optimizer's step."""


class PassEvent(Enum):
    """The events that the owner of an observation is told, during the user's forward."""

    ENTERED = "entered"
    LEFT = "left"
    REPEATED = "repeated"
    """Outside of the model's own forward a part of it has run once more, and no backward since."""
    FAILED = "failed"
    """An error of our own code has ended the observation and all monitoring of this model."""


Name = TypeVar("Name", str, Key)
OnPass = Callable[[PassEvent, bool], None]
"""Called with each event, and with whether it belongs to a training pass."""


@dataclass(eq=False)
class Pass:
    """What one training pass has measured. It is kept apart from other passes until it is known that the pass counts."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    """The row of each site."""
    blocks: dict[str, Tensor] = field(default_factory=dict)
    """The unit block of each site."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """The block of heads of each softmax."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """The sums of each layer's input, [6, features] (columns.FEATURES)."""
    tally_sums: dict[Key, Tensor] = field(default_factory=dict)
    """The block of sums of each place of a tally (columns.Tally)."""
    tally_maxes: dict[Key, Tensor] = field(default_factory=dict)
    """The block of maxima of each of these places."""
    backwards: list[Backward] = field(default_factory=list)
    """The backwards that have run through this pass."""
    merged: list[Pass] = field(default_factory=list)
    """The passes that were merged into this one. What hooks measure of them later is stored here."""
    is_hooked: bool = False
    """Whether hooks in its graph will tell of its backward."""
    dropped: bool = False

    @property
    def standing(self) -> Fate:
        """The best that has become of a gradient of this pass."""
        fates = {Fate.ADDED if each.fate is Fate.RUNNING else each.fate for each in self.backwards}
        return next((each for each in _STANDING if each in fates), Fate.NONE)

    def add(self, kind: dict[Name, Tensor], name: Name, value: Tensor) -> None:
        """Merge a row, a block or the sums of an input into one of the six dictionaries."""
        if self.dropped:
            return
        old = kind.get(name)
        if old is None or old.shape != value.shape:
            kind[name] = value
        elif kind is self.rows:
            merge_(old, value.to(old.device))
        elif kind is self.heads:
            merge_heads_(old, value.to(old.device))
        elif kind is self.tally_maxes:
            torch.maximum(old, value.to(old.device), out=old)
        else:
            old += value.to(old.device)

    def place(self, kind: dict[str, Tensor], name: str, device: torch.device) -> Tensor | None:
        """The tensor under this name that can be merged into in place; None where there is none on this device."""
        there = kind.get(name)
        return there if there is not None and there.device == device else None

    def put(self, kind: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Store a value: nothing is left to do if it is the tensor that `place` returned, merged in place; a new one is merged."""
        if value is not kind.get(name):
            self.add(kind, name, value)

    def merge_inputs(self, name: str, x: Tensor, axis: int, limit: int | None, seed: int) -> None:
        """Merge the sums of an input x of a layer. The features lie along `axis`."""
        sums = self.place(self.inputs, name, x.device)
        self.put(self.inputs, name, input_sums(x, axis, limit, seed, sums if sums is not None and sums.shape[1] == x.shape[axis] else None))

    def tally(self, key: Key, sums: Tensor, maxes: Tensor | None = None) -> None:
        """Merge the blocks of one place of a tally."""
        self.add(self.tally_sums, key, sums)
        if maxes is not None:
            self.add(self.tally_maxes, key, maxes)

    def drop(self) -> None:
        """Forget everything: the pass does not count."""
        self.dropped = True
        for kind in (self.rows, self.blocks, self.heads, self.inputs):
            kind.clear()
        for tallied in (self.tally_sums, self.tally_maxes):
            tallied.clear()

    def forget(self, site: str) -> None:
        """Forget what was measured of one site."""
        for kind in (self.rows, self.blocks, self.heads):
            kind.pop(site, None)
        for tallied in (self.tally_sums, self.tally_maxes):
            for key in [key for key in tallied if key[1] == site]:
                del tallied[key]

    def keep_where(self, alive: Tensor) -> None:
        """Empty the pass if this flag is false. The flag stays on the device: the host does not wait for it."""
        for name, row in self.rows.items():
            self.rows[name] = torch.where(alive.to(row.device), row, empty_row(row.device))
        for kind in (self.blocks, self.inputs):
            for name, value in kind.items():
                kind[name] = value * alive.to(value)
        for name, heads in self.heads.items():
            nothing = torch.zeros_like(heads)
            nothing[-1] = -math.inf
            self.heads[name] = torch.where(alive.to(heads.device), heads, nothing)
        for key, value in self.tally_sums.items():
            # Not a product: a sum that is inf or nan has to go too.
            self.tally_sums[key] = torch.where(alive.to(value.device), value, torch.zeros_like(value))
        for key, value in self.tally_maxes.items():
            self.tally_maxes[key] = torch.where(alive.to(value.device), value, torch.full_like(value, -math.inf))

    def settle(self, into: Pass, guard: Guard) -> None:
        """Merge this pass into another one, each place under the guard. Numbers that arrive later go there too."""
        pairs = ((self.rows, into.rows), (self.blocks, into.blocks), (self.heads, into.heads), (self.inputs, into.inputs))
        for mine, theirs in pairs:
            for name, value in list(mine.items()):
                guard.attempt(name, into.add, theirs, name, value)
        for tallied, into_tallied in ((self.tally_sums, into.tally_sums), (self.tally_maxes, into.tally_maxes)):
            for key, value in list(tallied.items()):
                guard.attempt(key[1], into.add, into_tallied, key, value)
        into.backwards.extend(each for each in self.backwards if each not in into.backwards)
        for each in (self, *self.merged):
            each.rows, each.blocks, each.heads, each.inputs, each.backwards = into.rows, into.blocks, into.heads, into.inputs, into.backwards
            each.tally_sums, each.tally_maxes = into.tally_sums, into.tally_maxes
            into.merged.append(each)
        self.merged = []

    def counted(self) -> Pass:
        """This pass, emptied where the device knows that nothing was left of its gradient when the optimizer stepped."""
        holds = [each.holds for each in self.backwards if each.fate is Fate.ENTERED]
        flags = [each for each in holds if each is not None]
        if flags and len(flags) == len(holds):
            self.keep_where(torch.stack([flag.to(flags[0].device) for flag in flags]).any())
        return self


class Passes:
    """The passes of one observation.

    Args:
        guard: the guard of the observation.
        repeated: called when a part of the model runs once more outside of the model's own forward, and no backward has run since.
        began: called when a backward through a pass has begun.
    """

    def __init__(self, guard: Guard, repeated: Callable[[], None], began: Callable[[], None]) -> None:
        self._repeated, self._began = repeated, began
        self._ran: set[str] = set()
        """The sites and layers that have run in the present pass outside of the model's own forward."""
        self.most_waiting = 0
        """The most passes that have begun in a row without such a backward."""
        self.gradients = Gradients()
        self._guard = guard
        self._passes = [Pass()]
        """The first entry holds what a compiled graph reports, and always counts; each other entry is one pass."""
        self._rest: list[Pass] = []
        """After `settle`: the passes that did not count."""
        self._inner = self._passes[0]
        """The pass that began last."""
        self._outside: Pass | None = None
        """The pass of what runs outside the model's own forward; None where none has begun since the last backward through such a pass."""
        self._running: tuple[Pass, Backward] | None = None
        """The pass whose backward began last, and that backward: a recompute in it belongs to the pass."""
        self._local = threading.local()
        self._owner: int | None = None
        """The thread whose passes are observed."""
        self.hears_backward = True
        """Whether hooks tell which backward a pass has: not in a compiled graph."""
        self.tally_facts: dict[Key, Mapping[str, Any]] = {}
        """The facts of each place of a tally (parts.TallyPart), which whoever measures it keeps here."""
        self.waiting = 0
        """Number of passes that have begun since the last backward that added to `.grad` or gave gradients of parameters."""
        self.has_entered = False
        """Whether a training pass through the whole model has begun."""
        self.has_run_parts = False
        """Whether parts of the model have been called in training while the model itself did not run."""
        self.has_measured = False
        """Whether anything of a training pass has been measured."""

    def __iter__(self) -> Iterator[Pass]:
        return iter(self._passes)

    def __len__(self) -> int:
        return len(self._passes)

    @property
    def newest(self) -> Pass:
        """The pass through the whole model that began last."""
        return self._inner

    @property
    def always(self) -> Pass:
        """The pass that always counts. It holds what a compiled graph reports, which tells nothing of the backward that will follow."""
        return self._passes[0]

    @property
    def current(self) -> Pass:
        """The pass to which numbers that are measured now belong."""
        if self.is_inside:
            return self._inner
        if not self.hears_backward:
            return self.always
        if self._running is not None and internals.in_backward() and self.gradients.is_running(self._running[1]):
            return self._running[0]
        if self._outside is None:
            self._outside = self._begin()
        return self._outside

    @property
    def is_inside(self) -> bool | None:
        """Whether this thread is inside a training pass that is observed; False inside any other pass, None outside of the model."""
        return getattr(self._local, "inside", None)

    def was_interrupted(self, model: nn.Module) -> bool:
        """Asked when the model's forward begins: whether the pass before never ended. A KeyboardInterrupt ends a forward without calling any hook."""
        return not internals.in_backward() and self.is_inside is not None and not internals.runs_twice(model)

    def enter(self, model: nn.Module) -> bool | None:
        """Note that the model's forward begins. Returns whether a training pass begins; None where no pass begins, as in a recompute."""
        if internals.in_backward():
            return None
        if self.is_inside is not None and internals.runs_twice(model):
            # The model calls itself: that is one pass.
            self._local.depth = getattr(self._local, "depth", 0) + 1
            return None
        self._local.depth = 0
        in_training = any(module.training for module in model.modules())
        training = self._guard.grad_enabled and in_training and not (rehearses() or internals.is_transformed()) and self._claims_thread()
        self._local.inside = training
        self._local.raised = _handled()
        if training:
            self.has_entered = True
            self._inner = self._begin()
        return training

    def leave(self) -> bool | None:
        """Note that the model's forward ends. Returns whether a training pass ends; None where no pass ends."""
        training = self.is_inside
        if internals.in_backward() or training is None:
            return None
        if self._local.depth:
            self._local.depth -= 1
            return None
        self._local.inside = None
        return training

    def has_raised(self, output: Any) -> bool:
        """Asked when the model's forward ends: whether it raised an error. A forward that returns None may run where another error is handled."""
        return output is None and _handled() not in (None, self._local.raised)

    def expect_backward(self, nodes: set[Node], current: Pass | None = None) -> None:
        """Put hooks on nodes of a pass (by default the newest one), which notice when a backward runs through them."""
        current = self.newest if current is None else current
        current.is_hooked = current.is_hooked or bool(nodes)
        hears = self._guard(MODEL, self.hear_backward, current)
        for node in nodes:
            node.register_prehook(lambda grad_outputs: hears())

    def leave_part(self, output: Any) -> None:
        """Note that the outermost of the parts that run has returned this output, if it was called outside of the model's own forward."""
        if self.is_inside is None and self._outside is not None and not internals.in_backward():
            self.expect_backward(ends(output), self._outside)

    def hear_backward(self, current: Pass) -> None:
        """Note that the backward that runs now runs through this pass."""
        backward = self.gradients.running(lambda call: self._guard(MODEL, call))
        if backward is None:
            return
        self._running = current, backward
        if backward in current.backwards:
            return
        current.backwards.append(backward)
        self._began()
        if backward.accumulation is not internals.Accumulation.NEITHER:
            self.waiting = 0
            self._ran.clear()
        if current is self._outside:
            self._outside = None
            self._ran.clear()

    def ear(self) -> Callable[..., None]:
        """A function to be called in a backward, under the guard, with gradients that are computed in it for the present pass."""
        current = self.current
        current.is_hooked = True

        def hear(*grads: Tensor | None) -> None:
            self.hear_backward(current)
            # With create_graph=True a gradient has a graph, and a backward through that graph is one through the pass.
            self.expect_backward({grad.grad_fn for grad in grads if grad is not None and grad.grad_fn is not None}, current)

        return hear

    def counts(self, module: nn.Module) -> bool:
        """Whether a forward call of this module that happens now belongs to a training pass."""
        if internals.in_backward() or internals.is_transformed():
            return False
        inside = self.is_inside
        return inside if inside is not None else self._guard.grad_enabled and module.training and self._claims_thread()

    def drop_entered(self) -> None:
        """Forget the passes whose gradient has entered a step."""
        for each in self._passes[1:]:
            if each.standing is Fate.ENTERED:
                each.drop()

    def has_row(self, site: str) -> bool:
        """Whether any pass has measured this site."""
        return any(site in each.rows for each in self._passes)

    def settle(self) -> Pass:
        """Merge the passes that count into one, and return it."""
        whole, best = Pass(), min((each.standing for each in self._passes if not each.dropped), key=_STANDING.index)
        for at, each in enumerate(self._passes):
            if at == 0 or each.standing is best:
                each.counted().settle(whole, self._guard)
            else:
                self._rest.append(each)
        self._passes = [whole]
        return whole

    def take_over(self, earlier: Passes) -> None:
        """Take over the passes that have not entered the step of an earlier observation, since they may enter that of this one."""
        rest = [each for each in earlier._rest if not each.dropped and each.standing is not Fate.NONE]
        self._passes += rest
        self.gradients.take_over(earlier.gradients)
        self.tally_facts.update(earlier.tally_facts)
        self.has_measured = self.has_measured or bool(rest)
        self.has_entered = self.has_entered or earlier.has_entered

    def _begin(self) -> Pass:
        """Begin a pass."""
        if not internals.in_backward():
            self.gradients.forget_failed()
        self._wait()
        self._passes.append(Pass())
        if len(self._passes) > _MOST:
            for one, other in itertools.combinations(self._passes[1:-1], 2):
                if one.standing is other.standing and self._outside not in (one, other):
                    other.settle(one, self._guard)
                    self._passes.remove(other)
                    break
        return self._passes[-1]

    def runs(self, place: str) -> None:
        """Note that a site or layer of a training pass runs. Outside of the model's own forward the next pass begins where one runs again."""
        if self.is_inside is not None or internals.in_backward():
            return
        if place in self._ran:
            self._ran.clear()
            if self._outside is not None and self._outside.is_hooked:
                self._outside = None
            else:
                # A pass without a graph has no backward of its own: it is the frozen part of the next one.
                self._wait()
            self._repeated()
        self._ran.add(place)

    def _wait(self) -> None:
        self.waiting += 1
        self.most_waiting = max(self.waiting, self.most_waiting)

    def _claims_thread(self) -> bool:
        """Whether this thread is the one that is observed: the first that trains."""
        if self._owner is None:
            self._owner = threading.get_ident()
        return self._owner == threading.get_ident()


def _handled() -> tuple[int, int] | None:
    """The exception that is being handled now, and how far it has come up the stack; None where there is none. Nothing is kept alive."""
    _, error, trace = sys.exc_info()
    return None if error is None else (id(error), id(trace))


def attach(observation: Observation, found: Found) -> Callable[[], None]:
    """Hook the beginning of the model's forward. The function that is returned hooks its end.

    The end is hooked last of all, so that a model that is itself an activation is still in its pass when its own hook runs.
    """
    roots = tuple(found.model.children()) if isinstance(found.model, Stages) else (found.model,)
    for root in roots:
        observation.hook_before(root, MODEL, _enter, observation)

    def hook_ends() -> None:
        for root in roots:
            observation.hook_after(root, MODEL, _leave, observation, always=True)

    return hook_ends


def _enter(observation: Observation, model: nn.Module, args: Any, kwargs: Any) -> None:
    if observation.passes.was_interrupted(model):
        observation.calls.reset()
    training = observation.passes.enter(model)
    if training is None:
        return
    if internals.is_transformed():
        observation.note_if_wanted(MODEL, TRANSFORMED)
    if training:
        observation.lineage.begin_pass()
        observation.way.begin_pass()
    observation.on_pass(PassEvent.ENTERED, training)


def _leave(observation: Observation, model: nn.Module, args: Any, output: Any) -> None:
    training = observation.passes.leave()
    if training is None:
        return
    if training:
        if observation.passes.has_raised(output):
            observation.passes.newest.drop()
        else:
            outputs = ends(output)
            observation.passes.expect_backward(outputs)
            observation.lineage.reached_output(outputs)
            observation.guard.attempt(PLACE, observation.way.end_pass, outputs, observation.passes.newest)
        observation.lineage.end_pass()
    observation.on_pass(PassEvent.LEFT, training)
