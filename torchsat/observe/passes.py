"""Decides which forward passes count in an observation, and keeps what each of them measured. A *pass* is one call of the whole model.

- A pass counts if it is a training pass: autograd was on when the model was called, and some part of the model is in training mode. Only passes of
  one thread are observed, the first that trains, since another thread may use the model at the same time.
- A recompute of activation checkpointing runs inside a backward and is not counted again. In reentrant mode only the recompute can see gradients.
- A pass is forgotten if its forward raised, or if its gradients were thrown away, as for a batch that the user skipped. The latter shows when the
  next backward begins: the gradients that the earlier one left in `.grad` are gone.
- What runs outside the model's own forward (its parts called one by one) belongs to a pass of its own, the first of the list.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.faults import MODEL
from torchsat.observe.graph import ends
from torchsat.observe.hooks import Guard
from torchsat.statistics import empty_row, merge_, merge_heads_
from torchsat.structure import Found, Stages
from torchsat.weights import input_sums

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

TRANSFORMED = "it was called inside a transform of torch.func (grad, vmap, jvp), whose tensors stand for others and hold no numbers of their own"
_MOST = 8
"""The most passes that are kept apart. If there are more, the oldest is merged into the first of the list and can no longer be dropped."""


class PassEvent(Enum):
    """The events that the owner of an observation is told, during the user's forward."""

    ENTERED = "entered"
    LEFT = "left"
    FAILED = "failed"
    """An error of our own code has ended the observation and all monitoring of this model."""


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
    backward: int | None = None
    """The number of the backward that added this pass's gradient to `.grad`."""
    dropped: bool = False

    def add(self, kind: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Merge a row, a block or the sums of an input into one of the four dictionaries."""
        if self.dropped:
            return
        old = kind.get(name)
        if old is None or old.shape != value.shape:
            kind[name] = value
        elif kind is self.rows:
            merge_(old, value.to(old.device))
        elif kind is self.heads:
            merge_heads_(old, value.to(old.device))
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

    def merge_inputs(self, name: str, x: Tensor, axis: int, limit: int | None, turn: int) -> None:
        """Merge the sums of an input x of a layer. The features lie along `axis`."""
        sums = self.place(self.inputs, name, x.device)
        self.put(self.inputs, name, input_sums(x, axis, limit, turn, sums if sums is not None and sums.shape[1] == x.shape[axis] else None))

    def drop(self) -> None:
        """Forget everything: the pass does not count."""
        self.dropped = True
        for kind in (self.rows, self.blocks, self.heads, self.inputs):
            kind.clear()

    def forget(self, site: str) -> None:
        """Forget what was measured of one site."""
        for kind in (self.rows, self.blocks, self.heads):
            kind.pop(site, None)

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

    def settle(self, into: Pass, guard: Guard) -> None:
        """Merge this pass into another one, each place under the guard. Numbers that arrive later go there too."""
        pairs = ((self.rows, into.rows), (self.blocks, into.blocks), (self.heads, into.heads), (self.inputs, into.inputs))
        for mine, theirs in pairs:
            for name, value in list(mine.items()):
                guard.attempt(name, into.add, theirs, name, value)
        self.rows, self.blocks, self.heads, self.inputs = into.rows, into.blocks, into.heads, into.inputs


class Passes:
    """The passes of one observation.

    Args:
        guard: the guard of the observation.
    """

    def __init__(self, guard: Guard) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._guard = guard
        self._passes = [Pass()]
        """The first entry holds what ran outside the model's own forward, and passes that can no longer be dropped; each other entry is one pass."""
        self._running: Pass | None = None
        """The pass whose backward began last: a recompute belongs to it."""
        self._local = threading.local()
        self._owner: int | None = None
        """The thread whose passes are observed."""
        self.has_entered = False
        """Whether a training pass through the whole model has begun."""
        self.has_measured = False
        """Whether anything of a training pass has been measured."""
        self.is_stepping = False
        """Whether an optimizer of the model is stepping. Gradients that its closure computes then say nothing about earlier passes."""

    def watch(self, model: nn.Module) -> None:
        """Set the model whose passes these are. It is not kept alive."""
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model whose passes these are; None where it is gone."""
        return self._model()

    def __iter__(self) -> Iterator[Pass]:
        return iter(self._passes)

    def __len__(self) -> int:
        return len(self._passes)

    @property
    def newest(self) -> Pass:
        """The newest pass, as a mark for `drop_after`."""
        return self._passes[-1]

    @property
    def outside(self) -> Pass:
        """The pass that is never dropped. It holds what ran outside the model's own forward."""
        return self._passes[0]

    @property
    def current(self) -> Pass:
        """The pass to which numbers that are measured now belong."""
        if self.is_inside:
            return self._passes[-1]
        return self._running if self._running is not None and internals.in_backward() else self._passes[0]

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
        training = self._guard.grad_enabled and in_training and not (internals.rehearses() or internals.is_transformed()) and self._claims_thread()
        self._local.inside = training
        if training:
            self.has_entered = True
            self._passes.append(Pass())
            if len(self._passes) > _MOST:
                self._passes.pop(1).settle(self._passes[0], self._guard)
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

    def expect_backward(self, outputs: set[Node]) -> None:
        """Put hooks on the nodes that computed the model's output, which notice when the backward of the newest pass begins."""
        begins = self._guard(MODEL, self._backward_begins, self.newest)
        for node in outputs:
            node.register_prehook(lambda grad_outputs: begins())

    def counts(self, module: nn.Module) -> bool:
        """Whether a forward call of this module that happens now belongs to a training pass."""
        if internals.in_backward() or internals.is_transformed():
            return False
        inside = self.is_inside
        return inside if inside is not None else self._guard.grad_enabled and module.training and self._claims_thread()

    def drop_after(self, mark: Pass | None) -> None:
        """Drop the passes that began after this one, since they belong to the next step."""
        if mark is not None and mark in self._passes:
            for each in self._passes[self._passes.index(mark) + 1 :]:
                each.drop()

    def has_row(self, site: str) -> bool:
        """Whether any pass has measured this site."""
        return any(site in each.rows for each in self._passes)

    def settle(self) -> Pass:
        """Merge all passes into one, and return it."""
        whole = Pass()
        for each in self._passes:
            each.settle(whole, self._guard)
        self._passes = [whole]
        return whole

    def _claims_thread(self) -> bool:
        """Whether this thread is the one that is observed: the first that trains."""
        if self._owner is None:
            self._owner = threading.get_ident()
        return self._owner == threading.get_ident()

    def _backward_begins(self, current: Pass) -> None:
        number = internals.backward_number()
        self._running = current
        if current.backward is not None or current.dropped:
            return
        earlier = [each for each in self._passes[1:] if each.backward not in (None, number) and not each.dropped]
        if not self._adds_to_grad():
            return
        current.backward = number
        alive = self._grad_is_alive() if earlier else True
        for each in earlier:
            if isinstance(alive, Tensor):
                each.keep_where(alive)
            elif not alive:
                each.drop()

    def _parameters(self) -> list[nn.Parameter]:
        model = self._model()
        return [] if model is None else [each for each in model.parameters() if each.requires_grad]

    def _adds_to_grad(self) -> bool:
        """Whether the backward that begins will add to `.grad` of the model's parameters."""
        parameters = [] if self.is_stepping else self._parameters()
        return bool(parameters) and internals.will_accumulate(parameters[0])

    def _grad_is_alive(self) -> bool | Tensor:
        """Whether the gradients that earlier backwards added to `.grad` are still there; a boolean tensor where only the device knows."""
        grads = [each.grad for each in self._parameters() if each.grad is not None and not each.grad.is_sparse]
        if not grads:
            return False
        return torch.stack([(grad.count_nonzero() > 0).to(grads[0].device) for grad in grads]).any()


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
    observation.on_pass(PassEvent.ENTERED, training)


def _leave(observation: Observation, model: nn.Module, args: Any, output: Any) -> None:
    training = observation.passes.leave()
    if training is None:
        return
    if training:
        if output is None and sys.exc_info()[0] is not None:
            observation.passes.newest.drop()
        else:
            outputs = ends(output)
            observation.passes.expect_backward(outputs)
            observation.lineage.reached_output(outputs)
        observation.lineage.end_pass()
    observation.on_pass(PassEvent.LEFT, training)
