"""Measures the logits that a cross-entropy takes: their largest, ln Z, and the entropy of what the model says.

The loss is mostly computed outside of the model, where no hook is. So the tensors that the model returns are read where it returns them, and which of
them are logits is learned from the graph: when the first backward begins, it is walked back from the loss to the softmax inside of a cross-entropy,
and from there over views to what the model has returned. What was read before that is held until then, and counts only if it was the logits. A
cross-entropy that the model computes itself is heard as a call (calls.py), and then its output is not read again.

The site is called `logits`. It has one head, whose rows are the samples or tokens and whose keys are the classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchsat import internals
from torchsat.activations import Activation, Bound
from torchsat.observe.graph import maker
from torchsat.observe.loss import logits_in
from torchsat.observe.marks import NodeTable
from torchsat.observe.passes import Pass
from torchsat.sharding import is_pending, placement
from torchsat.sites import Site
from torchsat.softmax import observe_softmax
from torchsat.structure import Found, Stages
from torchsat.tensors import plain, why_unread

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

NAME = "logits"
_LOG_SOFTMAX = Bound(Activation("log_softmax"), lambda z: z, {}, {}, 0.0, None)
"""Stands where other sites have their element-wise function."""
_MOST = 8
"""So many of the tensors that a model returns are looked at."""

_Block = tuple[Tensor, Tensor]
"""The row and the block of heads of one call."""


class Logits:
    """The logits of one observation."""

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self._returned = NodeTable[tuple[int, int]]()
        """For the node of each tensor that may be logits, its place among what the model returned, and its number of axes."""
        self._held: list[tuple[Pass, int, int, _Block]] = []
        """What was read before it is known what the logits are: the pass, the place, the axis of the classes, the numbers."""
        self._inside: Pass | None = None
        """The pass in which the model itself has computed a cross-entropy."""

    def heard(self, place: str, z: Tensor, axis: int) -> None:
        """Measure the logits of a cross-entropy that the model computes itself."""
        self._inside = self._observation.passes.current
        self._add(place, self._inside, self._measured(place, z, axis))

    def returned(self, output: Any) -> None:
        """Measure what the model has returned, as far as it is logits, or may be."""
        passes, known, learns = self._observation.passes, self._observation.sites.logits, self._observation.lineage.learns
        if self._inside is passes.current:
            return
        for at, z in enumerate(internals.tree_leaves(output)[:_MOST]):
            if not isinstance(z, Tensor) or not _may_be_logits(z):
                continue
            if at in known:
                self._add(NAME, passes.current, self._measured(NAME, z, known[at]))
            elif learns and not known:
                axis = 1 if z.ndim > 3 else z.ndim - 1
                self._returned[maker(z)[0]] = (at, z.ndim)
                self._held.append((passes.current, at, axis, self._measured(NAME, z, axis)))

    def hear_loss(self) -> None:
        """Find out, when a backward has begun, which of the tensors that the model returned are the logits of the loss."""
        held, self._held = self._held, []
        if not held:
            return
        known = self._observation.sites.logits
        for (at, ndim), axis in logits_in(internals.objectives(), self._returned):
            if not known:
                # Behind a view that has merged samples and tokens, classes lie where they lay before it, which is last.
                known[at] = ndim - 1 if axis is None else axis
        for current, at, axis, block in held:
            if known.get(at) == axis:
                self._add(NAME, current, block)

    def _measured(self, name: str, z: Tensor, axis: int) -> _Block:
        rows, z = self._observation.meter.rows_of(z, axis, False, name), plain(z).detach()
        logits = rows.logits(z)
        return observe_softmax(logits.z, logits.visible, logits.elements, rows.scan(z, None))

    def _add(self, name: str, current: Pass, block: _Block) -> None:
        """Add the numbers of one call. It is an output of the model: to be sure is no fault there."""
        site = self._observation.sites.known.setdefault(name, Site(name, _LOG_SOFTMAX, "softmax"))
        site.traced = site.reaches_output = site.last = site.output = site.decided = True
        self._observation.passes.has_measured = True
        self._observation.sites.has_run(site)
        current.add(current.rows, name, block[0])
        current.add(current.heads, name, block[1])


def attach(observation: Observation, found: Found) -> None:
    """Hook the end of the model, if logits are asked for."""
    if NAME not in observation.options.extras or not observation.options.selects(NAME) or observation.sites.has_failed(NAME):
        return
    for root in tuple(found.model.children()) if isinstance(found.model, Stages) else (found.model,):
        observation.hook_after(root, NAME, _after, observation)


def _after(observation: Observation, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if observation.passes.is_inside and not internals.in_backward() and not internals.is_transformed():
        observation.logits.returned(output)


def _may_be_logits(z: Tensor) -> bool:
    """Whether these are numbers of a graph, in this process alone, with two classes or more along some axis."""
    if not z.is_floating_point() or z.grad_fn is None or z.ndim < 2 or not z.numel() or max(z.shape[1:]) < 2:
        return False
    return placement(z) is None and not is_pending(z) and why_unread(plain(z)) is None
