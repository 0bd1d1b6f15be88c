"""Reads the autograd graph of a forward pass: which layers feed a site, what comes after it, what it is multiplied with, and which activations no
hook saw.

Nodes are looked at while the pass runs and forgotten after it. A walk over the graph holds nodes, never tensors, so that it keeps no activation in
memory.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.observe import nodes as kinds
from torchsat.observe.marks import NodeSet, NodeTable

_MATRIX_PRODUCT = re.compile(r"Addmm|^Mm|Bmm|Baddbmm|Convolution|Matmul|Linear|Attention|Rnn|CheckpointFunction")
_VIEW = re.compile(r"(\w*View|Unsqueeze|Squeeze|Expand|Transpose|Permute|Slice|Select|Split|Chunk|ToCopy|Clone|Alias|T)Backward")
_CONTAINERS: tuple[tuple[type, Callable[[Any], Iterable[Any]]], ...] = (
    (dict, dict.values),
    (list, list.__iter__),
    (tuple, tuple.__iter__),
    (set, set.__iter__),
    (frozenset, frozenset.__iter__),
    (deque, deque.__iter__),
)
"""The containers that are opened, and how. A subclass of the user's may have an iterator of its own, which is not called."""
_CLOSED = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, FunctionType, torch.dtype, torch.device, nn.Module)
"""What is not opened. A module would lead to the whole model."""
_DEEPEST = 8
"""How many containers and objects, one inside the other, are opened to find a tensor."""
_MOST_OBJECTS = 2000
"""The most containers and objects that are opened in one structure, and the most values that are looked at in one of them."""
MOST_NODES = 3000
"""The most nodes that are looked at in one pass; `Survey` says why there is a limit."""
_MOST_OF_FUNCTION = 16
"""More nodes than the call of one mathematical function makes."""
MOST_OF_CALL = 512
"""The most nodes that are looked at to find the gradients of one call."""


def upstream(starts: Iterable[Node | None], stop: Callable[[Node], bool], limit: int = 512) -> Iterator[Node]:
    """These nodes and those that their outputs were computed from, breadth first. The walk does not go beyond a node for which `stop` holds."""
    queue, met = deque(node for node in starts if node is not None), set[Node]()
    while queue and len(met) < limit:
        node = queue.popleft()
        if node in met:
            continue
        met.add(node)
        yield node
        if not stop(node):
            queue.extend(before for before, _ in node.next_functions if before is not None)


def has_weight(node: Node) -> bool:
    """Whether the node uses a weight: it is a matrix product or a convolution, or a parameter with at least two dimensions enters it.

    A reentrant checkpoint, whose one node stands for all that runs in it, counts as one too.
    """
    return bool(_MATRIX_PRODUCT.search(node.name())) or any(leaf.ndim >= 2 and leaf.requires_grad for leaf in _parameters(node))


def _parameters(node: Node) -> Iterator[Tensor]:
    """The leaves (parameters, mostly) that enter a node directly or through a few casts, views and transposes."""
    for start, _ in node.next_functions:
        if start is not None and (variable := getattr(_through_views(start), "variable", None)) is not None:
            yield variable


def _through_views(node: Node) -> Node:
    for _ in range(4):
        following = [before for before, _ in node.next_functions if before is not None]
        if len(following) != 1 or len(node.next_functions) != 1:
            break
        node = following[0]
    return node


def _behind_views(node: Node) -> Node:
    """The node whose output this is a view, cast or copy of."""
    for _ in range(8):
        if not _VIEW.match(node.name()) or node.next_functions[0][0] is None:
            break
        node = node.next_functions[0][0]
    return node


def entrances(own: Node, z: Tensor, node: Node | None, output_nr: int, began: int) -> dict[Node, list[int]] | None:
    """The nodes of one call a = f(z) that z itself enters, each with the positions of z among its inputs.

    In the backward, what these nodes return at these positions adds up to dL/dz through this call alone, whatever else z is used for.

    Args:
        own: the node that made a.
        node, output_nr: the node that made z, and which of its outputs z is; None where z is a leaf.
        began: the number of the first node that the call could make (internals.next_node_number).

    Returns:
        The nodes; none where `a` does not depend on z. None where the call made too many nodes to look at.
    """

    def is_before(each: Node) -> bool:
        return internals.node_number(each) < began

    walked = list(upstream([own], is_before, MOST_OF_CALL))
    if len(walked) == MOST_OF_CALL:
        return None
    found: dict[Node, list[int]] = {}
    same = {(node, output_nr)}
    for each in sorted((each for each in walked if not is_before(each)), key=internals.node_number):
        places = [
            at
            for at, (before, nr) in enumerate(each.next_functions)
            if before is not None and ((before, nr) in same or (node is None and getattr(before, "variable", None) is z))
        ]
        if places and each.name() == internals.MODULE_HOOK:
            # The user's backward hooks on the module: the node passes z on as it is.
            same |= {(each, at) for at in places}
        elif places:
            found[each] = places
    return found


def maker(a: Tensor) -> tuple[Node, int]:
    """The node that computed a tensor which has one, and which of its outputs the tensor is. The node that only makes the output a subclass of Tensor
    is passed over."""
    node, nr = a.grad_fn, a.output_nr
    assert node is not None
    while type(a) is not Tensor and node.name().startswith("AliasBackward"):
        before, before_nr = node.next_functions[0]
        if before is None:
            break
        node, nr = before, before_nr
    return node, nr


def ends(values: Any) -> set[Node]:
    """The autograd nodes that computed the tensors in a structure, such as the arguments or the result of a module. Containers and plain objects are
    opened, one inside the other."""
    found = set[Node | None]()
    # A subclass of Tensor may run code of the user's where an attribute is read.
    with internals.without_function_modes():
        for leaf in _tensors(values):
            # grad_fn cannot be read of a view whose base was changed without gradients.
            with contextlib.suppress(RuntimeError):
                found.add(leaf.grad_fn)
    return {node for node in found if node is not None}


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in a structure, breadth first. What has been met is not opened again, since objects may refer to each other in a circle."""
    level, met = [values], dict[int, Any]()
    for _ in range(_DEEPEST):
        inside: list[Any] = []
        for value in level:
            # The type says what the value is. `isinstance` would ask the value for its class too, which may run code of the user's.
            if issubclass(type(value), Tensor):
                yield value
            elif not issubclass(type(value), _CLOSED) and id(value) not in met and len(met) < _MOST_OBJECTS:
                # The object is kept, so that no other one that is made meanwhile gets its id.
                met[id(value)] = value
                inside += islice(_contents(value), _MOST_OBJECTS)
        level = inside


def _contents(value: Any) -> Iterator[Any]:
    """What a container or an object holds. Methods of the user's, properties among them, are not called: only torch's and Python's own are used."""
    for kind, iterate in _CONTAINERS:
        if issubclass(type(value), kind):
            yield from iterate(value)
            if type(value) is kind:
                # It is no subclass, so it has no attributes.
                return
            break
    for kind in type.__dict__["__mro__"].__get__(type(value)):
        for name, member in type.__dict__["__dict__"].__get__(kind).items():
            # A slot, or the dict of attributes. A class of the user's may have a property in the place of the latter.
            is_dict = name == "__dict__" and isinstance(member, GetSetDescriptorType)
            if is_dict or (isinstance(member, MemberDescriptorType) and kind.__module__ != "builtins"):
                with contextlib.suppress(AttributeError):
                    held = member.__get__(value)
                    yield from dict.values(held) if is_dict else (held,)


class Heard(Protocol):
    """A call of a function that may be a site."""

    @property
    def place(self) -> str:
        """Where it is called."""

    def decide(self, name: str, reason: str) -> str | None:
        """Called when no other site accounts for the function, with what would be said of it. Returns why it is not measured, which may be the reason
        that is given; None where its place is a site."""


Unaccounted = tuple[str, str]
"""What no site accounts for: its name, and why it is not measured."""


class Survey:
    """The walks over the graph of one pass, and the nodes that they have met. A part of the graph is walked whenever a module begins or ends.

    `explain` marks the nodes that a site accounts for; `explore` then finds what is not accounted for among the other nodes (nodes.py). Only nodes
    that the pass itself has made are explored: the graph of a pass may go on into that of an earlier one, as where the weights of a step are computed
    from gradients. When a chain of nodes that Python has touched is freed, each node frees the next one inside its own destructor, and a chain of
    tens of thousands overflows the stack. Therefore no more than MOST_NODES are touched.
    """

    def __init__(self) -> None:
        self._first = internals.next_node_number()
        """The number of the first node that belongs to this pass."""
        self._touched, self._met = NodeSet(), NodeSet()
        self._foreign = NodeSet()
        """Nodes that were met and do not belong to the model."""
        self.choices = NodeSet()
        """Nodes that keep or drop elements by a condition that was computed from a signal, as `torch.where(z > 0, z, 0)` does."""
        self._heard = NodeTable[Heard]()
        """The nodes of calls that may be sites."""
        self.products: list[tuple[Node, Node]] = []
        """Pairs of nodes whose outputs are multiplied with each other."""

    @property
    def is_spent(self) -> bool:
        """Whether the graph has more nodes than may be looked at."""
        return len(self._touched) >= MOST_NODES

    def upstream(self, starts: Iterable[Node | None], stop: Callable[[Node], bool], limit: int = MOST_NODES) -> Iterator[Node]:
        """Like the function `upstream`, but with no more than MOST_NODES nodes in the whole pass."""
        for node in upstream(starts, lambda node: self.is_spent or stop(node), limit):
            self._touched.add(node)
            yield node

    def touch(self, node: Node) -> bool:
        """Note that a node is looked at. False: no more nodes may be."""
        if self.is_spent:
            return False
        self._touched.add(node)
        return True

    def before(self, starts: Iterable[Node | None], ends_at: Callable[[Node], bool]) -> Iterator[tuple[Node, bool]]:
        """The nodes for which `ends_at` holds and that these nodes were computed from with no other such node between. With each comes whether a node
        that uses a weight lies between; it may come twice, once for each of two ways."""
        queue, met = deque((node, False) for node in starts if node is not None), set[tuple[Node, bool]]()
        while queue:
            node, passed = queue.popleft()
            if (node, passed) in met or not self.touch(node):
                continue
            met.add((node, passed))
            if ends_at(node):
                yield node, passed
            else:
                passed = passed or has_weight(node)
                queue.extend((before, passed) for before, _ in node.next_functions if before is not None)

    def depends(self, node: Node, other: Node) -> bool:
        """Whether a node is computed from another one."""
        return any(met is other for met in self.upstream([node], lambda met: met is other, 512))

    def is_learned(self, node: Node) -> bool:
        """Whether a weight enters the computation of a node, and not only scale or shift parameters of one dimension."""
        return any(has_weight(met) for met in self.upstream([node], has_weight, 512))

    def skip(self, nodes: Iterable[Node]) -> None:
        """Leave out these nodes and all before them, since they do not belong to the model."""
        nodes = list(nodes)
        self._foreign.update(node for node in nodes if node not in self._met)
        self._met.update(nodes)

    def explain(self, starts: Iterable[Node], before: set[Node]) -> None:
        """Mark the nodes between an output, made by `starts`, and an input, made by `before`: a site accounts for them."""
        for node in self.upstream(starts, lambda node: node in before or node in self._met):
            if node not in before:
                self._met.add(node)

    def hear(self, own: Node, began: int, heard: Heard) -> None:
        """Note the nodes that a call has made which may be a site: from the one that made its output back to the number at which it began."""

        def is_before(node: Node) -> bool:
            return internals.node_number(node) < began

        for node in upstream([own], is_before, _MOST_OF_FUNCTION):
            if not is_before(node) and not kinds.is_leaf(node):
                self._heard[node] = heard

    def heard_inside(self, own: Node, z: Node) -> list[Heard]:
        """The calls between a node and another one before it that may be sites."""
        found = [heard for node in self.upstream([own], lambda node: node is z, MOST_OF_CALL) if node is not z and (heard := self._heard.get(node))]
        return list(dict.fromkeys(found))

    def explore(self, starts: Iterable[Node]) -> Iterator[Unaccounted]:
        """What no site accounts for among these nodes and those before them that were not met yet."""
        starts = set(starts)
        found = [node for node in self.upstream(starts, self._is_done) if not self._is_done(node)]
        yield from self._name(found, self._objective(starts))

    def explore_parts(self, starts: Iterable[Node], owns: Callable[[Tensor], bool]) -> Iterator[Unaccounted]:
        """Like `explore`, for what runs between the parts of a model that are called one by one. Only nodes that depend on the model are looked at:
        on an output of a part, or on a parameter for which `owns` holds. All others are left out."""
        found = [node for node in self.upstream(starts, self._is_done) if not self._is_done(node)]
        ours = set[Node]()
        for node in sorted(found, key=internals.node_number):
            for before in (each for each, _ in node.next_functions if each is not None):
                known = before in ours or (before in self._met and before not in self._foreign)
                if known or (hasattr(before, "variable") and owns(before.variable)):
                    ours.add(node)
        self.skip(node for node in found if node not in ours)
        yield from self._name([node for node in found if node in ours], set())

    def _is_done(self, node: Node) -> bool:
        """Whether there is nothing to find at this node or before it."""
        return node in self._met or internals.node_number(node) < self._first

    def _objective(self, starts: set[Node]) -> set[Node]:
        """The nodes between a result that is a single number and the last weight before it, from which no other result is computed. That is where a
        model computes its loss."""
        numbers = {node for node in starts if internals.makes_number(node)}
        if not numbers:
            return numbers
        others = set(self.upstream(starts - numbers, self._is_done))
        return set(self.upstream(numbers, lambda node: self._is_done(node) or has_weight(node))) - others

    def _name(self, found: Iterable[Node], objective: set[Node]) -> Iterator[Unaccounted]:
        """Mark these nodes as met, and give a name and a reason for each that is not accounted for."""
        for node in found:
            if node in self._met:
                continue
            self._met.add(node)
            if node.name().startswith("MulBackward"):
                factors = [_behind_views(before) for before, _ in node.next_functions if before is not None]
                if len(factors) == 2 and factors[0] is not factors[1]:
                    self.products.append((factors[0], factors[1]))
            size = kinds.normalised_by(node)
            if size is not None:
                self._met.update(size)
                continue
            summed = kinds.summed_exponentials(node)
            if summed is not None:
                self._met.update(summed)
                if node not in objective:
                    yield "logsumexp", kinds.UNMEASURED
                continue
            told = kinds.chosen(node) if node in self.choices else kinds.unaccounted(node)
            if told is None or (kinds.is_generic(node) and (node in objective or kinds.is_of_parameter(node))):
                continue
            heard, (name, reason) = self._heard.get(node), told
            missing = reason if heard is None else heard.decide(name, reason)
            if missing is not None:
                yield name, missing
