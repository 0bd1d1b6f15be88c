"""Takes the way of the gradient apart: from the output of a model back to its input, in stretches that follow each other and branches beside them.

The graph of a pass is directed and has no circle. A *meeting point* of a node is the first node behind it, on the way back, through which all ways go
on that lead from it to the input. From the output the spine goes from meeting point to meeting point:

    node       -> its only input                    a layer, an activation, a norm
    split node -> its meeting point, and between    a residual join (Add), a gated product (Mul), an attention
                  them one branch for each input

so that the whole gradient of every stretch arrives at its two ends, and the factors of the stretches multiply to the factor of the whole. A branch
of a stretch is taken apart in the same way. Between two steps of a recurrent network no single node carries the gradient, since its state is several
tensors. There the stretch is cut where the same weight is used again, through the fewest tensors that lead on.

Nodes are numbers here: 0 is the output, and the inputs of a node have higher numbers than the node. Nothing here knows torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Edge:
    """What a node is given by one of its inputs."""

    position: int
    """Which of the node's inputs it is."""
    target: int
    """The node that computed it."""
    output: int = 0
    """Which output of that node it is."""


Graph = Sequence[Sequence[Edge]]
"""The inputs of each node, those that carry the signal only. A node without inputs is one where data enters."""
Crossing = tuple[int, int]
"""An edge, as the number of its node and the position of the input there."""


@dataclass(frozen=True)
class Point:
    """A place at which the norm of the gradient is taken: of all that arrives at the outputs of a node, or of what some edges pass on.

    Exactly one of the two is given.
    """

    node: int | None = None
    edges: tuple[Crossing, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """A part of the way, from one point to the next."""

    start: Point
    end: Point
    nodes: tuple[int, ...]
    """The nodes that the gradient passes through between the two, in the order in which it meets them."""
    branches: tuple[Branch, ...] = ()
    """The ways beside each other from the first of these nodes to the end; none where there is only one way."""
    step: int | None = None
    """Of a part of a recurrence, which step it is, counted from the output."""


@dataclass(frozen=True)
class Branch:
    """One way through a stretch. Several inputs of its first node that lead through the same nodes are one branch."""

    nodes: frozenset[int]
    """The nodes that are on it; none if it leads straight to the end."""
    stretches: tuple[Stretch, ...]
    arrival: Point
    """What it passes on to the end of the stretch."""


@dataclass(frozen=True)
class Spine:
    """The way from the output of a graph to one node at which data enters."""

    graph: Graph
    sink: int
    meeting: Mapping[int, int]
    """The meeting point of each node from which a way leads to the sink."""
    uses: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """For each weight, the nodes that multiply by it."""

    def stretches(self) -> tuple[Stretch, ...]:
        """The way from the output to the sink."""
        return tuple(self._chain(0, self.sink))

    def inputs(self, node: int) -> list[Edge]:
        """The inputs of a node from which a way leads to the sink."""
        return [edge for edge in self.graph[node] if edge.target == self.sink or edge.target in self.meeting]

    def _chain(self, node: int, end: int) -> Iterator[Stretch]:
        while node != end:
            edges, after = self.inputs(node), self.meeting[node]
            start, last = Point(node), Point(after)
            if len(edges) == 1:
                yield Stretch(start, last, (node,))
            else:
                inside = self._between([node], after)
                yield from self._cut(node, after, inside) or [Stretch(start, last, inside, tuple(self._branches(node, after, edges)))]
            node = after

    def _between(self, starts: Sequence[int], end: int) -> tuple[int, ...]:
        """These nodes and those behind them as far as the end, which does not count."""
        met, waiting = set(starts) - {end}, [each for each in starts if each != end]
        while waiting:
            for edge in self.inputs(waiting.pop()):
                if edge.target != end and edge.target not in met:
                    met.add(edge.target)
                    waiting.append(edge.target)
        return tuple(sorted(met))

    def _branches(self, node: int, end: int, edges: Sequence[Edge]) -> Iterator[Branch]:
        groups: list[tuple[list[Edge], set[int]]] = []
        for edge in edges:
            mine, reached = [edge], set(self._between([edge.target], end))
            for other in [each for each in groups if each[1] & reached]:
                mine, reached = [*other[0], *mine], reached | other[1]
                groups.remove(other)
            groups.append((mine, reached))
        for mine, reached in groups:
            into = {edge.target for edge in mine}
            chain = list(self._chain(into.pop(), end)) if len(into) == 1 and reached else []
            arriving = [(each, edge.position) for each in sorted(reached) for edge in self.inputs(each) if edge.target == end]
            arrival = Point(edges=tuple(arriving or [(node, edge.position) for edge in mine]))
            if chain:
                # What comes to the end by other ways does not belong to the branch.
                chain[-1] = replace(chain[-1], end=arrival)
            yield Branch(frozenset(reached), tuple(chain), arrival)

    def _cut(self, node: int, end: int, inside: tuple[int, ...]) -> list[Stretch]:
        """The steps of a recurrence between two nodes; none where no weight is used often enough there."""
        within = set(inside)
        uses = max(([each for each in used if each in within] for used in self.uses.values()), key=len, default=[])
        if len(uses) < _LEAST_STEPS:
            return []
        every = -(-len(uses) // _MOST_STEPS)
        bounds, previous, points = sorted(uses)[::every], 0, list[tuple[Point, int]]()
        for use, following in itertools.pairwise(bounds):
            found = min(
                ((self._crossing(inside, previous, at), at) for at in range(inside.index(use) + 1, inside.index(following) + 1)),
                key=lambda each: len({self._target(edge) for edge in each[0]}) or len(inside),
            )
            if not 0 < len({self._target(edge) for edge in found[0]}) <= _WIDEST:
                return []
            points.append((Point(edges=found[0]), found[1]))
            previous = found[1]
        stretches, start, first = list[Stretch](), Point(node), 0
        for number, (point, at) in enumerate((*points, (Point(end), len(inside)))):
            stretches.append(Stretch(start, point, inside[first:at], step=number))
            start, first = point, at
        return stretches

    def _crossing(self, inside: Sequence[int], previous: int, at: int) -> tuple[Crossing, ...]:
        """The edges that lead from the nodes since the last cut to those behind position `at`."""
        behind, given = set(inside[at:]), {node: self.inputs(node) for node in inside[previous:at]}
        # A node that collects the outputs of all steps carries nothing from one step to the next.
        return tuple((node, edge.position) for node, edges in given.items() if len(edges) <= _WIDEST for edge in edges if edge.target in behind)

    def _target(self, crossing: Crossing) -> tuple[int, int]:
        node, position = crossing
        return next((edge.target, edge.output) for edge in self.graph[node] if edge.position == position)


_LEAST_STEPS = 3
"""A weight that is used this often in one stretch makes it a recurrence."""
_MOST_STEPS = 64
"""The most steps into which a recurrence is cut."""
_WIDEST = 4
"""The most tensors through which a cut may go. The state of an LSTM is two."""
_TRIED = 8
"""The most places at which data enters that are tried as the end of the spine."""


Shape = tuple[int, ...] | None


def spine_of(graph: Graph, uses: Mapping[str, Sequence[int]], shapes: Sequence[Shape] = ()) -> Spine | None:
    """The way from node 0 to that of the nodes at which data enters to which it has the most stretches. None where nothing leads to any.

    What enters beside it, such as the inputs of the later steps of a sequence or a time that a diffusion model is given, is left out. So is what is
    the same for all samples, such as a bias that depends on positions: inside the first block, it would have more stretches than the data.

    Args:
        shapes: the shape of the first output of each node, where it is known.
    """
    depth = [0] * len(graph)
    for node, edges in enumerate(graph):
        for edge in edges:
            depth[edge.target] = max(depth[edge.target], depth[node] + 1)
    reached = {0}
    for node, edges in enumerate(graph):
        if node in reached:
            reached.update(edge.target for edge in edges)
    shared = _shared_by_samples(graph, shapes)
    entered = [node for node in reached if node and not graph[node]]
    sinks = sorted([node for node in entered if node not in shared] or entered, key=lambda node: -depth[node])[:_TRIED]
    found = [Spine(graph, sink, _meeting_points(graph, sink, reached), uses) for sink in sinks]
    return max(found, key=_length, default=None)


def _shared_by_samples(graph: Graph, shapes: Sequence[Shape]) -> set[int]:
    """The nodes at which something enters that is the same for all samples: the first node at which it meets anything else stretches it along the
    first axis."""
    if not shapes:
        return set()
    consumers: dict[int, set[int]] = {}
    for node, edges in enumerate(graph):
        for edge in edges:
            consumers.setdefault(edge.target, set()).add(node)
    found = set[int]()
    for sink in [node for node, edges in enumerate(graph) if node and not edges]:
        node, after = sink, consumers.get(sink, set())
        while len(after) == 1:
            (behind,) = after
            if len(graph[behind]) > 1:
                if _is_stretched(shapes[node], shapes[behind]):
                    found.add(sink)
                break
            node, after = behind, consumers.get(behind, set())
    return found


def _is_stretched(shape: Shape, into: Shape) -> bool:
    """Whether something of a shape must be repeated along the first axis to meet what has the other shape."""
    if not shape or not into or into[0] == 1:
        return False
    return len(shape) < len(into) or (len(shape) == len(into) and shape[0] == 1)


def _length(spine: Spine) -> int:
    node, steps = 0, 0
    while node != spine.sink:
        node, steps = spine.meeting[node], steps + 1
    return steps


def _meeting_points(graph: Graph, sink: int, reached: set[int]) -> dict[int, int]:
    """The meeting point of each of these nodes from which a way leads to the sink (Cooper, Harvey and Kennedy 2001, in a graph without circles)."""
    found: dict[int, int] = {}
    for node in range(sink - 1, -1, -1):
        if node not in reached:
            continue
        for edge in graph[node]:
            target = edge.target
            if target != sink and target not in found:
                continue
            other = found.get(node, target)
            while other != target:
                if other < target:
                    other = found[other]
                else:
                    target = found[target]
            found[node] = target
    return found
