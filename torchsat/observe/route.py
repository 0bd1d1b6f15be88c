"""Names the stretches of the gradient's way (spine.py) by the modules that computed them, and says what each is: a layer, an activation, a norm, ...

The nodes that a module makes have numbers one after the other, so the innermost call of a module in whose range a number lies has made the node.
Stretches of one module without modules inside it are one entry: a normalisation or an activation that is written by hand makes many nodes.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.ledger import Kind
from torchsat.observe import nodes as kinds
from torchsat.observe.spine import Branch, Point, Stretch

_NORM = re.compile(r"norm", re.IGNORECASE)
_JOINS = ("Add", "Sub", "Rsub", "Cat", "Stack", "Lerp", "Addcmul")
"""The nodes at which ways that were computed beside each other are added or joined."""
_DEEPEST = 2
"""How deep branches are taken apart: a branch inside a branch is the last."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation of a signal, by the names of its classes: many of them are written by users. What normalises weights is in
    torch.nn.utils."""
    return any(_NORM.search(kind.__name__) and not kind.__module__.startswith("torch.nn.utils") for kind in type(module).__mro__)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module."""

    path: str
    first: int
    """The number of the first node that it could make."""
    last: int
    """The number after that of its last node."""
    is_norm: bool

    @staticmethod
    def of(path: str, module: nn.Module, first: int, last: int) -> ModuleCall:
        """The call of this module which made the nodes with these numbers."""
        return ModuleCall(path, first, last, is_norm(module))


@dataclass(frozen=True)
class Entry:
    """One entry of the ledger, before its gradient is known."""

    place: str
    kind: Kind
    level: int
    parent: int | None
    """The index of the entry in whose branch it lies; None on the spine."""
    start: Point
    end: Point
    skip: Point | None = None
    """Of a join, what arrives by the shortest of its branches."""
    branches: tuple[Point, ...] = ()
    """Of a join, what arrives by each of the others."""


@dataclass(frozen=True)
class Made:
    """What is known of the nodes of a graph, which are numbered as in spine.py."""

    nodes: Sequence[Node | None]
    """None stands for the output as a whole."""
    calls: Sequence[ModuleCall]
    """Sorted by their first number, and of those that begin together the outer one first."""
    sites: Mapping[int, str]
    """The sites that nodes have computed."""
    weights: Mapping[int, Sequence[str]]
    """The weights that nodes contract with their input."""


class Naming:
    """Makes the entries of a ledger of stretches."""

    def __init__(self, made: Made) -> None:
        self._made = made
        self._firsts = [call.first for call in made.calls]
        self._outer = _outer(made.calls)
        self._calls = [None if node is None else self._call_of(internals.node_number(node)) for node in made.nodes]
        occupied = {call for call in self._calls if call is not None}
        self._containers = {outer for call in occupied for outer in self._above(call) if outer != call}
        """The calls inside which another call has made nodes."""
        self._steps = ""
        """The path of the recurrence whose steps are being named."""

    def entries(self, stretches: Sequence[Stretch]) -> list[Entry]:
        """The entries of these stretches of the spine and of their branches, from the output to the input."""
        found = list[tuple[Entry, Stretch]]()
        self._add(stretches, 0, None, found)
        named, seen = list[Entry](), Counter[str]()
        for entry, _ in reversed(found):
            number = seen[entry.place]
            seen[entry.place] += 1
            is_numbered = entry.kind is Kind.STEP or number > 0
            named.append(replace(entry, place=f"{entry.place}_{number}") if is_numbered else entry)
        return named[::-1]

    def _add(self, stretches: Sequence[Stretch], level: int, parent: int | None, found: list[tuple[Entry, Stretch]]) -> None:
        """Add the entries of these stretches."""
        waiting: Point | None = None
        latest, owner_before = -1, None
        for given in stretches:
            stretch = given if waiting is None else replace(given, start=waiting)
            owner = self._owner(stretch)
            if not stretch.branches and stretch.step is None and all(self._passes_on(each) or self._shifts(each) for each in stretch.nodes):
                # What only views belongs to what comes before it, or else to what follows.
                if latest < 0:
                    waiting = stretch.start
                else:
                    found[latest] = (replace(found[latest][0], end=stretch.end), found[latest][1])
                continue
            waiting = None
            if owner is not None and owner == owner_before:
                entry, before = found[latest]
                joined = replace(before, end=stretch.end, nodes=(*before.nodes, *stretch.nodes))
                found[latest] = (replace(entry, end=stretch.end, kind=self._kind_of_call(owner, joined)), joined)
                continue
            latest, owner_before = len(found), owner
            self._append(stretch, owner, level, parent, found)

    def _append(self, stretch: Stretch, owner: int | None, level: int, parent: int | None, found: list[tuple[Entry, Stretch]]) -> None:
        place, kind = self._described(stretch, owner)
        entry = Entry(place, kind, level, parent, stretch.start, stretch.end)
        if owner is None and kind in (Kind.JOIN, Kind.GATE):
            short, *others = sorted(stretch.branches, key=self._length)
            if kind is Kind.JOIN:
                entry = replace(entry, skip=short.arrival, branches=tuple(each.arrival for each in others))
        own = len(found)
        found.append((entry, stretch))
        if owner is None and kind in (Kind.JOIN, Kind.GATE) and level < _DEEPEST:
            for branch in sorted(stretch.branches, key=self._length, reverse=True):
                self._add(branch.stretches, level + 1, own, found)

    def _length(self, branch: Branch) -> int:
        return sum(not self._passes_on(each) for each in branch.nodes)

    def _passes_on(self, node: int) -> bool:
        made = self._made.nodes[node]
        return made is None or kinds.is_view(made)

    def _shifts(self, node: int) -> bool:
        """Whether a node adds a constant or a parameter to its only signal, which leaves the gradient as it is."""
        made = self._made.nodes[node]
        return made is not None and kinds.kind_of(made) in ("Add", "Sub", "Neg")

    def _owner(self, stretch: Stretch) -> int | None:
        """The call that has made all nodes of a stretch, if no other call has made nodes inside it and it uses a weight in no branch."""
        calls = {self._calls[each] for each in stretch.nodes}
        common = calls.pop() if len(calls) == 1 else None
        if common is None or common in self._containers or stretch.step is not None:
            return None
        return None if stretch.branches and any(each in self._made.weights for each in stretch.nodes) else common

    def _described(self, stretch: Stretch, owner: int | None) -> tuple[str, Kind]:
        """The place of a stretch, and what it is."""
        first = stretch.nodes[0]
        path = self._path(stretch)
        if stretch.step is not None:
            # The last step reaches beyond the module of the recurrence, to where its first state was made.
            self._steps = path if stretch.step == 0 else self._steps
            return f"{self._steps}/step" if self._steps else "step", Kind.STEP
        if owner is not None:
            return self._made.calls[owner].path or self._named(first, path), self._kind_of_call(owner, stretch)
        node = self._made.nodes[first]
        if stretch.branches:
            if node is None:
                return "outputs", Kind.JOIN
            if kinds.kind_of(node) in _JOINS:
                return self._named(first, self._path_of(first)), Kind.JOIN
            if any((each := self._made.nodes[at]) is not None and kinds.is_attention(each) for at in stretch.nodes):
                return f"{path}/attention" if path else "attention", Kind.ATTENTION
            return self._named(first, self._path_of(first)), Kind.GATE
        return self._named(first, path), self._kind(first)

    def _named(self, node: int, path: str) -> str:
        """The place of a node that is no module's."""
        if node in self._made.sites:
            return self._made.sites[node]
        if node in self._made.weights:
            return self._made.weights[node][0]
        made = self._made.nodes[node]
        told = None if made is None else kinds.unaccounted(made)
        name = "output" if made is None else kinds.spelled(kinds.kind_of(made)) if told is None else kinds.spelled(told[0])
        return f"{path}/{name}" if path else name

    def _kind(self, node: int) -> Kind:
        made = self._made.nodes[node]
        if made is None or node in self._made.weights or kinds.is_contraction(made):
            return Kind.LAYER
        if kinds.is_attention(made):
            return Kind.ATTENTION
        size = kinds.normalised_by(made)
        if kinds.is_normalisation(made) or (size is not None and not any(kinds.kind_of(each) == "Exp" for each in size)):
            return Kind.NORM
        return Kind.ACTIVATION if node in self._made.sites or kinds.unaccounted(made) is not None else Kind.OTHER

    def _kind_of_call(self, call: int, stretch: Stretch) -> Kind:
        """What a module is, by its class and by the nodes that it has made."""
        if self._made.calls[call].is_norm:
            return Kind.NORM
        found = {self._kind(each) for each in stretch.nodes}
        return next((kind for kind in (Kind.LAYER, Kind.ATTENTION, Kind.NORM, Kind.ACTIVATION) if kind in found), Kind.OTHER)

    def _path(self, stretch: Stretch) -> str:
        """The path of the innermost module that has made all nodes of a stretch."""
        ways = [list(self._above(call))[::-1] for call in {self._calls[each] for each in stretch.nodes} if call is not None]
        common = [each[0] for each in zip(*ways, strict=False) if len(set(each)) == 1]
        return self._made.calls[common[-1]].path if common else ""

    def _path_of(self, node: int) -> str:
        call = self._calls[node]
        return "" if call is None else self._made.calls[call].path

    def _call_of(self, number: int) -> int | None:
        """The innermost call that made the node of this number."""
        call: int | None = bisect_right(self._firsts, number) - 1
        while call is not None and call >= 0 and self._made.calls[call].last <= number:
            call = self._outer[call]
        return None if call is None or call < 0 else call

    def _above(self, call: int | None) -> Sequence[int]:
        """A call and those that it is inside of, the innermost first."""
        found = []
        while call is not None:
            found.append(call)
            call = self._outer[call]
        return found


def _outer(calls: Sequence[ModuleCall]) -> list[int | None]:
    """For each call the one around it."""
    found, open_calls = list[int | None](), list[int]()
    for at, call in enumerate(calls):
        while open_calls and calls[open_calls[-1]].last < call.last:
            open_calls.pop()
        found.append(open_calls[-1] if open_calls else None)
        open_calls.append(at)
    return found
