"""The way of the gradient through small graphs, taken apart by hand."""

from collections.abc import Mapping, Sequence

from torchsat.observe.spine import Edge, Graph, Point, Spine, Stretch, spine_of


def graph(inputs: Mapping[int, Sequence[int]], count: int) -> Graph:
    return [[Edge(position, target) for position, target in enumerate(inputs.get(node, ()))] for node in range(count)]


def spine(inputs: Mapping[int, Sequence[int]], count: int, uses: Mapping[str, Sequence[int]] | None = None) -> Spine:
    found = spine_of(graph(inputs, count), uses or {})
    assert found is not None
    return found


def ends(stretches: Sequence[Stretch]) -> list[tuple[int | None, int | None]]:
    return [(each.start.node, each.end.node) for each in stretches]


def test_a_chain_has_one_stretch_for_each_node() -> None:
    found = spine({0: [1], 1: [2], 2: [3]}, 4).stretches()
    assert ends(found) == [(0, 1), (1, 2), (2, 3)]
    assert [each.nodes for each in found] == [(0,), (1,), (2,)]
    assert not any(each.branches for each in found)


def test_a_join_is_one_stretch_with_its_branches() -> None:
    # Node 1 adds node 4 and what nodes 2 and 3 make of node 4.
    before, join, after = spine({0: [1], 1: [4, 2], 2: [3], 3: [4], 4: [5]}, 6).stretches()
    assert ends([before, join, after]) == [(0, 1), (1, 4), (4, 5)]
    skip, branch = join.branches
    assert (skip.nodes, skip.stretches, skip.arrival) == (frozenset(), (), Point(edges=((1, 0),)))
    assert branch.nodes == {2, 3}
    # The last stretch of the branch ends with what it passes on to node 4, and not with all that arrives there.
    assert [(each.start, each.end) for each in branch.stretches] == [(Point(2), Point(3)), (Point(3), Point(edges=((3, 0),)))]
    assert branch.arrival == Point(edges=((3, 0),))


def test_joins_inside_a_branch_are_taken_apart_too() -> None:
    # The long connection of a U-Net from 5 to 1, and inside it a shorter one from 4 to 2.
    (join,) = [each for each in spine({0: [1], 1: [5, 2], 2: [4, 3], 3: [4], 4: [5], 5: [6]}, 7).stretches() if each.branches]
    inner = join.branches[1].stretches
    assert ends(inner)[0] == (2, 4)
    assert inner[0].branches[0].arrival == Point(edges=((2, 0),))
    assert inner[1] == Stretch(Point(4), Point(edges=((4, 0),)), (4,))


def test_inputs_that_lead_through_the_same_nodes_are_one_branch() -> None:
    # Attention: node 1 has three inputs, of which two were computed from node 4.
    (split,) = [each for each in spine({0: [1], 1: [2, 3, 6], 2: [4], 3: [4], 4: [7], 6: [7], 7: [8]}, 9).stretches() if each.branches]
    assert {branch.nodes for branch in split.branches} == {frozenset({2, 3, 4}), frozenset({6})}
    assert next(branch for branch in split.branches if 4 in branch.nodes).arrival == Point(edges=((4, 0),))


def test_the_way_leads_to_the_input_with_the_most_stretches() -> None:
    # What enters beside it at node 5 is left out, as the time that a diffusion model is given.
    found = spine({0: [1], 1: [2, 5], 2: [3], 3: [4]}, 6)
    assert found.sink == 4
    assert ends(found.stretches()) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_nothing_that_carries_a_signal_has_no_way() -> None:
    assert spine_of(graph({}, 1), {}) is None


def test_a_recurrence_is_cut_at_its_state() -> None:
    # Three steps of a cell whose state is (h, c): h = o(c, gates) and c = add(c before, gates); gates = w(h before).
    inputs = {0: [1]}
    h, c, gates, w, count = 1, 2, 3, 4, 5
    for step in range(3):
        at = 1 + 4 * step
        inputs |= {at + h - 1: [at + c - 1, at + gates - 1], at + c - 1: [at + gates - 1, at + 3 + c], at + gates - 1: [at + w - 1]}
        inputs[at + w - 1] = [at + 4]
        count = at + 4
    inputs |= {count: [count + 2], count + 1: [count + 2], count + 2: []}
    found = spine(inputs, count + 3, {"w": [4, 8, 12]}).stretches()
    steps = [each for each in found if each.step is not None]
    assert [each.step for each in steps] == [0, 1, 2]
    # Between two steps, h enters by the weight and c by the sum.
    assert steps[0].end == Point(edges=((2, 1), (4, 0)))
    assert steps[0].end == steps[1].start
    assert steps[1].end == Point(edges=((6, 1), (8, 0)))
