"""Measures the gradient along its way from the output of the model to the input, for the ledger (ledger.py).

When a training pass ends, its graph is walked from the outputs of the model, and hooks on its nodes take the norm of the gradient where an entry of
the ledger begins or ends. Which nodes these are, and what their entries are called, is found out once for each graph that the model has. It is kept
in `Sites` under a signature of the graph, and later passes only walk and put on hooks. The names need to know which module made which node, so
modules are hooked in an observation that follows an unknown graph.

The norms are of all elements, and not of a sample, so that the factors multiply to the factor of the whole way. No hook holds a tensor of the graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.ledger import Fact
from torchsat.observe import nodes as kinds
from torchsat.observe.feeders import is_weight, weights_used
from torchsat.observe.passes import Pass
from torchsat.observe.route import Made, ModuleCall, Naming
from torchsat.observe.spine import Edge, Point, spine_of
from torchsat.parts import Key
from torchsat.sharding import is_pending, part_of
from torchsat.statistics import accumulator, put_squares
from torchsat.structure import Found, clean
from torchsat.tensors import why_unread
from torchsat.ways import PLACE, Listener, Plan

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

_MOST_NODES = 8000
"""The most nodes of a graph that are walked; graph.Survey says why there is a limit. A larger graph has no ledger."""
TOO_LARGE = f"the ledger of the gradient is not made: a graph of the model has more than {_MOST_NODES} nodes"
_MOST_OF_PARAMETER = 32
"""The most nodes that are looked at to find out that something is computed from parameters alone."""
_PATIENCE = 8
"""In how many observations after an unknown graph the modules are hooked."""
_MOST_PLANS = 16
"""The most graphs of one model that are known. A model that has more of them is random in its structure."""


@dataclass
class _Kept:
    """What one pass has measured."""

    into: Pass
    plan: Plan
    sums: dict[torch.device, Tensor] = field(default_factory=dict)
    heard: list[int] = field(default_factory=list)
    is_inner: bool = False
    """Whether what was heard last came from a backward that makes a graph of its own."""
    waiting: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)
    """For each group of inputs that is not complete, their sum and how many have arrived."""


class Way:
    """The gradient's way in one observation."""

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self._first = 0
        """The number of the first node of the present pass."""
        self._open: list[tuple[str, int]] = []
        self._calls: list[ModuleCall] = []
        self._kept: list[_Kept] = []

    @property
    def learns(self) -> bool:
        """Whether it is noted which module makes which node."""
        return self._observation.sites.ways.learns

    def begin_pass(self) -> None:
        """Note that a training pass through the whole model begins."""
        self._first = internals.next_node_number()
        self._open.clear()
        self._calls.clear()

    def begin_module(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module's forward begins."""
        if self._observation.passes.is_inside and not internals.in_backward():
            self._open.append((path, internals.next_node_number()))

    def end_module(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """Note that a module's forward has ended."""
        while self._open:
            name, first = self._open.pop()
            if name == path:
                last = internals.next_node_number()
                if last > first:
                    self._calls.append(ModuleCall.of(path, module, first, last))
                return

    def end_pass(self, outputs: set[Node], into: Pass) -> None:
        """Put hooks on the graph of a pass.

        Args:
            outputs: the nodes that computed the output of the model.
        """
        ways = self._observation.sites.ways
        if ways.is_too_large:
            return
        ends = sorted((node for node in outputs if internals.node_number(node) >= self._first), key=internals.node_number, reverse=True)
        if not ends:
            return
        walked = self._walk(ends)
        if walked is None:
            ways.is_too_large, ways.learning = True, 0
            self._observation.note_if_wanted(PLACE, TOO_LARGE)
            return
        nodes, last = walked
        signature = hash(tuple((node.name(), _order(node) - self._first * (not kinds.is_leaf(node))) for node in nodes))
        if signature not in ways.plans:
            if not self.learns or len(ways.plans) >= _MOST_PLANS:
                # The modules are hooked in the next observations, until one of them has such a graph.
                ways.learning = _PATIENCE if len(ways.plans) < _MOST_PLANS else 0
                return
            ways.plans[signature] = self._plan(nodes, last)
            ways.learning = 0
        ways.learning = max(0, ways.learning - 1)
        plan = ways.plans[signature]
        if plan is not None:
            self._hook(plan, nodes, into)

    def conclude(self) -> None:
        """Give what was measured to the passes, at the end of an observation and before it is decided which passes count."""
        for kept in self._kept:
            if not kept.sums:
                continue
            device = next(iter(kept.sums))
            squares = sum(
                (each.to(device, non_blocking=True) for each in kept.sums.values()), torch.zeros((), dtype=accumulator(device), device=device)
            )
            heard = torch.tensor(kept.heard, dtype=squares.dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
            # A pass may count in a later observation, whose graph may be another one. So each graph has a place of its own.
            key: Key = ("ledger", str(kept.plan.number))
            kept.into.tally(key, torch.stack([squares, heard]))
            self._observation.passes.tally_facts[key] = {"entries": kept.plan.facts}
        self._kept.clear()

    def _walk(self, ends: Sequence[Node]) -> tuple[list[Node], list[Node]] | None:
        """The nodes that the pass has made, from the outputs on, and those outputs that no other output is computed from. None where there are too
        many."""
        met, last = dict[Node, None](), list[Node]()
        for end in ends:
            # A cache of keys and values that is returned too holds views of what the other outputs were computed from.
            if _behind_views(end) in met or end in met:
                continue
            last.append(end)
            met[end] = None
            waiting = [end]
            while waiting:
                for before, _ in waiting.pop().next_functions:
                    if before is not None and before not in met and (internals.node_number(before) >= self._first):
                        met[before] = None
                        waiting.append(before)
                        if len(met) > _MOST_NODES:
                            return None
        # Leaves have the highest number of all, and come last.
        return sorted(met, key=lambda node: _order(node), reverse=True), last

    def _plan(self, nodes: Sequence[Node], last: Sequence[Node]) -> Plan | None:
        """Where the gradient is to be measured in a graph; None where no way leads through it."""
        lineage = self._observation.lineage
        made = [(call.first, call.last) for call in self._calls if _PARAMETRISED in f"{call.path}."]
        makes_weight = functools.partial(_is_made_in, made)
        weights, index = self._weights(), {node: at + 1 for at, node in enumerate(nodes)}
        graph: list[list[Edge]] = [[Edge(at, index[node]) for at, node in enumerate(last)]]
        used: dict[int, list[str]] = {}
        for at, node in enumerate(nodes, 1):
            edges = [(position, before, nr) for position, (before, nr) in enumerate(node.next_functions) if before is not None and before in index]
            graph.append(
                [Edge(position, index[before], nr) for position, before, nr in edges if _is_signal(before, weights) and not makes_weight(before)]
            )
            if kinds.is_contraction(node) and (names := weights_used(node, weights)):
                used[at] = names
        uses: dict[str, list[int]] = {}
        for at, names in used.items():
            for name in names:
                uses.setdefault(name, []).append(at)
        spine = spine_of(graph, uses, [None, *(internals.output_shape(node, 0) for node in nodes)])
        if spine is None:
            return None
        sites = {at: site for at, node in enumerate(nodes, 1) if (site := lineage.site_of(node)) is not None}
        self._calls.sort(key=lambda call: (call.first, -call.last))
        entries = Naming(Made([None, *nodes], self._calls, sites, used)).entries(spine.stretches())
        points: dict[Point, int] = {}
        facts: list[Fact] = []
        for entry in entries:
            wanted = (entry.start, entry.end, *(() if entry.skip is None else (entry.skip,)), *entry.branches)
            at, to, *others = [points.setdefault(each, len(points)) for each in wanted]
            skip = None if entry.skip is None else others.pop(0)
            facts.append((entry.place, entry.kind.value, entry.level, entry.parent, at, to, skip, tuple(others)))
        number = len(self._observation.sites.ways.plans)
        return Plan(number, tuple(facts), len(points), _listeners(points, graph, [None, *nodes]))

    def _weights(self) -> dict[int, str]:
        """The name of each weight of the model by the id of its tensor."""
        model = self._observation.passes.gradients.model
        named = [] if model is None else list(model.named_parameters())
        return {id(weight): clean(name.removesuffix(".weight")) for name, weight in named if weight.ndim >= 2}

    def _hook(self, plan: Plan, nodes: Sequence[Node], into: Pass) -> None:
        kept = _Kept(into, plan, heard=[0] * plan.points)
        self._kept.append(kept)
        guard = self._observation.guard
        for at, listener in plan.listeners.items():
            node = nodes[at - 1]
            if listener.outputs and internals.forward_class(node) is not None:
                # A function of the user's may change what it is given.
                arrives = guard(PLACE, _hear_outputs, kept, listener)
                node.register_prehook(lambda grads, arrives=arrives: arrives(torch.is_grad_enabled(), grads))
                leaves = guard(PLACE, _hear_inputs, kept, listener)
                node.register_hook(lambda grad_inputs, _, leaves=leaves: leaves(torch.is_grad_enabled(), grad_inputs))
            else:
                both = guard(PLACE, _hear, kept, listener)
                node.register_hook(lambda grad_inputs, grad_outputs, both=both: both(torch.is_grad_enabled(), grad_inputs, grad_outputs))


def _behind_views(node: Node) -> Node:
    """The first node on the way back that does not view, copy or join."""
    while kinds.is_view(node) and (before := [each for each, _ in node.next_functions if each is not None]):
        node = before[0]
    return node


def _order(node: Node) -> int:
    """A number that is higher than those of the nodes that a node was computed from. Leaves, which come last, have none of their own."""
    return -1 if kinds.is_leaf(node) else internals.node_number(node)


_PARAMETRISED = ".parametrizations."
"""Below this name torch.nn.utils.parametrize puts the modules that make a weight."""


def _is_made_in(calls: Sequence[tuple[int, int]], node: Node) -> bool:
    """Whether a node was made in one of these calls, each given by the numbers of its first node and of the one after its last."""
    return not kinds.is_leaf(node) and any(first <= internals.node_number(node) < last for first, last in calls)


def _is_signal(node: Node, weights: Mapping[int, str]) -> bool:
    """Whether a node has computed a signal, and not something that depends on parameters alone."""
    if hasattr(node, "variable"):
        return not isinstance(node.variable, nn.Parameter)
    return not (is_weight(node, weights) or _is_of_parameters(node))


def _is_of_parameters(node: Node) -> bool:
    """Whether every way from a node ends at a parameter, and what it has computed is not larger than the largest of these parameters: nothing has
    entered that has an axis of samples."""
    while kinds.is_view(node) and len(before := [other for other, _ in node.next_functions if other is not None]) == 1:
        # A parameter that is repeated for each sample has the axis of the samples, but nothing of them.
        node = before[0]
    waiting, met, largest = [node], set[Node](), 0
    while waiting:
        each = waiting.pop()
        if each in met:
            continue
        met.add(each)
        if (leaf := getattr(each, "variable", None)) is not None:
            if not isinstance(leaf, nn.Parameter):
                return False
            largest = max(largest, leaf.numel())
            continue
        before = [other for other, _ in each.next_functions if other is not None]
        if len(met) > _MOST_OF_PARAMETER or not before or kinds.is_contraction(each):
            return False
        waiting += before
    shape = internals.output_shape(node, 0)
    return shape is not None and math.prod(shape) <= largest


def _listeners(points: Mapping[Point, int], graph: Sequence[Sequence[Edge]], nodes: Sequence[Node | None]) -> dict[int, Listener]:
    """What is to be measured at each node."""
    outputs: dict[int, list[int]] = {}
    inputs: dict[int, list[tuple[int, int, int, int]]] = {}
    for point, number in points.items():
        crossings = point.edges
        if point.node == 0:
            for edge in graph[0]:
                outputs.setdefault(edge.target, []).append(number)
            continue
        if point.node is not None:
            node = nodes[point.node]
            if node is not None and not kinds.is_leaf(node):
                outputs.setdefault(point.node, []).append(number)
                continue
            # Nothing can be put on a leaf. What arrives there is what the nodes that it enters pass on.
            crossings = tuple((at, edge.position) for at, edges in enumerate(graph) for edge in edges if edge.target == point.node)
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for at, position in crossings:
            edge = next(each for each in graph[at] if each.position == position)
            groups.setdefault((edge.target, edge.output), []).append((at, position))
        for group, edges in enumerate(groups.values()):
            for at, position in edges:
                inputs.setdefault(at, []).append((number, position, group, len(edges)))
    return {at: Listener(tuple(outputs.get(at, ())), tuple(inputs.get(at, ()))) for at in outputs.keys() | inputs.keys()}


def _begin_hearing(kept: _Kept, is_inner: bool) -> None:
    """Forget what a gradient inside the loss has passed on, when the gradient of the loss itself comes.

    Args:
        is_inner: whether this backward makes a graph of its own, as that of a derivative which stands in the loss.
    """
    if kept.is_inner and not is_inner:
        for sums in kept.sums.values():
            sums.zero_()
        kept.heard[:] = [0] * len(kept.heard)
        kept.waiting.clear()
    kept.is_inner = is_inner


def _hear(kept: _Kept, listener: Listener, is_inner: bool, grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
    _hear_outputs(kept, listener, is_inner, grad_outputs)
    _hear_inputs(kept, listener, is_inner, grad_inputs)


def _hear_outputs(kept: _Kept, listener: Listener, is_inner: bool, grads: Sequence[Tensor | None]) -> None:
    _begin_hearing(kept, is_inner)
    for point in listener.outputs:
        for grad in grads:
            _add(kept, point, grad)


def _hear_inputs(kept: _Kept, listener: Listener, is_inner: bool, grads: Sequence[Tensor | None]) -> None:
    _begin_hearing(kept, is_inner)
    for point, position, group, count in listener.inputs:
        grad = grads[position]
        if count == 1 or grad is None:
            _add(kept, point, grad)
            continue
        before, arrived = kept.waiting.pop((point, group), (None, 0))
        whole = grad.detach() if before is None else before + grad.detach()
        if arrived + 1 == count:
            _add(kept, point, whole)
        else:
            kept.waiting[point, group] = (whole.clone() if before is None else whole, arrived + 1)


def _add(kept: _Kept, point: int, grad: Tensor | None) -> None:
    """Add the squares of a gradient to a point."""
    if grad is None or is_pending(grad):
        return
    grad = part_of(grad).detach()
    if why_unread(grad) is not None:
        return
    vector, times = flat(grad)
    device = grad.device
    sums = kept.sums.get(device)
    if sums is None:
        sums = kept.sums[device] = torch.zeros(kept.plan.points, dtype=accumulator(device), device=device)
    if times == 1 and not kept.heard[point]:
        put_squares(vector, None, sums, point)
    else:
        one = torch.zeros(1, dtype=sums.dtype, device=device)
        put_squares(vector, None, one, 0)
        sums[point : point + 1] += one * times
    kept.heard[point] += 1


def flat(grad: Tensor) -> tuple[Tensor, int]:
    """The elements of a gradient as a vector, in the order in which they lie in memory, and how often each of them counts. An expanded gradient, as
    that of a sum, is not copied."""
    times = 1
    for axis in range(grad.ndim):
        if grad.stride(axis) == 0 and grad.shape[axis] > 1:
            times *= grad.shape[axis]
            grad = grad.narrow(axis, 0, 1)
    if not grad.is_contiguous() and grad.ndim > 1:
        grad = grad.permute(sorted(range(grad.ndim), key=grad.stride, reverse=True))
    return grad.reshape(-1), times


def attach(observation: Observation, found: Found) -> Callable[[], None] | None:
    """Hook the modules, so that it is known which of them makes which node."""
    way = observation.way
    if not way.learns:
        return None
    for each in found.modules:
        observation.hook_before(each.module, PLACE, way.begin_module, each.name)

    def hook_ends() -> None:
        for each in found.modules:
            observation.hook_after(each.module, PLACE, way.end_module, each.name, always=True)

    return hook_ends
