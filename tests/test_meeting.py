"""How ranks meet, part and agree, each transition by itself: threads and a store in memory instead of processes."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from torchsat.parts import Parts
from torchsat.transport import agreement, meeting, ranks
from torchsat.transport.agreement import Collectives, agree, agree_on_history
from torchsat.transport.layout import told
from torchsat.transport.meeting import LAG, Meeting, Rendezvous
from torchsat.transport.packing import Numbers
from torchsat.transport.ranks import Ranks

from .test_packing import batch, row, samples, together

CPU = torch.device("cpu")


@dataclass
class Group:
    """A process group, seen from one of its ranks."""

    rank: int
    size: int
    backend: str | None = "gloo"
    options: None = None

    def name(self) -> str | None:
        return self.backend


def in_memory() -> Any:
    """A store for threads of one process."""
    return dist.HashStore()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of ranks that are threads of this process, and share a store in memory. Nobody waits long."""
    store = in_memory()
    monkeypatch.setattr(ranks, "default_store", lambda: store)
    monkeypatch.setattr(ranks, "_met", {})
    monkeypatch.setattr(dist, "get_rank", lambda group: group.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: group.size)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(group.size)))

    def backend_of(group: Group, device: torch.device) -> Group:
        if group.backend is None:
            raise RuntimeError("no backend")
        return group

    monkeypatch.setattr(agreement, "backend_of", backend_of)
    monkeypatch.setattr(agreement, "timeout_of", lambda backend: timedelta(seconds=5))
    monkeypatch.setattr(meeting, "GRACE", 0.2)
    monkeypatch.setattr(meeting, "PATIENCE", 0.4)


@dataclass
class Member:
    """One rank, and why it gave the others up."""

    ranks: Ranks
    reasons: list[str]


def members(size: int, *present: int, backend: str | None = "gloo", kind: str = "Net") -> list[Member]:
    """Those ranks of a group that watch; all, where none are named."""
    found = []
    for rank in present or range(size):
        # Each rank is a process of its own, which counts its own monitors.
        ranks._met.clear()
        reasons: list[str] = []
        ours = Ranks(Group(rank, size, backend), kind, reasons.append)  # type: ignore[arg-type]
        ours.everywhere = 10 + rank
        found.append(Member(ours, reasons))
    return found


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What these calls return, each made by a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(20) for future in [pool.submit(call) for call in calls]]


def all_meet(found: list[Member]) -> list[str | None]:
    return at_once(*(lambda ours=member.ranks: ours.meet(CPU) for member in found))


def observe(found: list[Member], step: int, parts: list[Parts] | None = None, **given: Any) -> list[Any]:
    """All ranks send at the same step; their flights."""
    own = parts or [batch()] * len(found)
    return at_once(*(lambda ours=member.ranks, mine=mine: ours.send(step, mine, **given) for member, mine in zip(found, own, strict=True)))


@pytest.fixture
def pair() -> Iterator[list[Member]]:
    """Two ranks that observe together."""
    found = members(2)
    assert all_meet(found) == [None, None]
    yield found
    for member in found:
        member.ranks.leave()


def read(found: list[Member], flights: list[Any]) -> list[Numbers]:
    for flight in flights:
        flight.wait(5)
    return [member.ranks.read(flight) for member, flight in zip(found, flights, strict=True)]


def test_without_a_group_a_process_is_alone() -> None:
    ours = Ranks(None, "Net", lambda why: None)
    assert (ours.meeting, ours.rank, ours.size, ours.everywhere) == (Meeting.UNMET, 0, 1, 0)
    assert ours.meet(CPU) is None
    assert ours.meeting is Meeting.ALONE
    assert not ours.together
    assert ours.send(0, batch()) is None


def test_all_ranks_meet_and_are_together() -> None:
    found = members(3)
    assert [member.ranks.meeting for member in found] == [Meeting.UNMET] * 3
    assert all_meet(found) == [None] * 3
    assert [member.ranks.meeting for member in found] == [Meeting.TOGETHER] * 3
    assert all(member.ranks.together for member in found)
    for member in found:
        member.ranks.leave()


def test_a_rank_that_comes_late_is_waited_for() -> None:
    early, late = members(2)
    begun = threading.Event()

    def first() -> str | None:
        begun.set()
        return early.ranks.meet(CPU)

    def second() -> str | None:
        begun.wait()
        threading.Event().wait(0.25)
        return late.ranks.meet(CPU)

    # Longer than GRACE: the late one has announced itself.
    assert at_once(first, second) == [None, None]
    for each in (early, late):
        each.ranks.leave()


def test_where_only_some_ranks_watch_they_are_alone() -> None:
    found = members(3, 0, 2)
    why = "2 of 3 ranks train a watched Net no. 1; call torchsat.watch on every rank, or pass group= the ranks that do, or group=None"
    assert all_meet(found) == [why] * 2
    assert [member.ranks.meeting for member in found] == [Meeting.ALONE] * 2
    # The decision binds who comes later.
    (late,) = members(3, 1)
    assert late.ranks.meet(CPU) == why
    assert late.ranks.meeting is Meeting.ALONE


def test_a_rank_that_never_ends_its_first_step_leaves_the_others_alone() -> None:
    found = members(2)
    assert found[0].ranks.meet(CPU) == "only 1 of 2 ranks ended a step within 0.4 s"
    assert found[0].ranks.meeting is Meeting.ALONE


def test_a_rank_that_stops_before_they_meet_is_alone() -> None:
    (ours,) = members(2, 0)
    ours.ranks.leave()
    assert ours.ranks.meeting is Meeting.ALONE
    assert ours.ranks.meet(CPU) is None


def test_a_rank_that_cannot_join_the_others_is_lost() -> None:
    (ours,) = members(1, backend=None)
    assert ours.ranks.meet(CPU) == "RuntimeError: its process group has no backend for cpu"
    assert ours.ranks.meeting is Meeting.LOST
    assert not ours.ranks.together


def test_a_rank_whose_store_fails_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours,) = members(2, 0)

    def fails(self: Rendezvous) -> str | None:
        raise OSError("connection reset")

    monkeypatch.setattr(Rendezvous, "decide", fails)
    assert ours.ranks.meet(CPU) == "OSError: connection reset"
    assert ours.ranks.meeting is Meeting.LOST


def test_a_rank_that_leaves_is_named_to_the_others(pair: list[Member]) -> None:
    first, second = pair
    observe(pair, 0)
    second.ranks.leave()
    assert second.ranks.meeting is Meeting.LOST
    assert second.reasons == []
    flight = first.ranks.send(1, batch())
    assert flight is not None
    flight.wait(0.05)
    assert first.ranks.meeting is Meeting.LOST
    assert first.reasons == ["rank 11 no longer observes"]
    # Its own numbers stand in for what never came, and name no rank.
    numbers = first.ranks.read(flight)
    assert numbers.sites[0].numbers[0] == together(batch()).sites[0].numbers[0]
    assert (numbers.sites[0].worst, numbers.sites[0].worst_rank) == (None, None)
    assert first.ranks.send(2, batch()) is None


def test_a_rank_of_which_nothing_is_heard_is_given_up(pair: list[Member]) -> None:
    first, _ = pair
    observe(pair, 0)
    flight = first.ranks.send(1, batch())
    assert flight is not None
    flight.wait(0.05)
    assert first.ranks.meeting is Meeting.LOST
    assert first.reasons == ["nothing was heard of them for 0.05 s"]


def test_a_rank_that_does_not_answer_when_all_are_to_agree_is_an_error(pair: list[Member]) -> None:
    with pytest.raises(TimeoutError, match=r"the others did not answer within 0.2 s"):
        pair[0].ranks.send(0, batch())


def test_ranks_that_have_come_to_other_steps_part(pair: list[Member]) -> None:
    read(pair, observe(pair, 0))
    flights = at_once(lambda: pair[0].ranks.send(1, batch()), lambda: pair[1].ranks.send(2, batch()))
    read(pair, flights)
    assert [member.ranks.meeting for member in pair] == [Meeting.LOST] * 2
    assert "they are at other steps (1 to 2 in one observation)" in pair[0].reasons[0] + pair[1].reasons[0]


@pytest.mark.parametrize("state", [Meeting.ALONE, Meeting.LOST])
def test_alone_and_lost_are_final(state: Meeting, pair: list[Member]) -> None:
    ours = pair[0].ranks
    ours.meeting = state
    assert ours.meet(CPU) is None
    assert ours.meeting is state
    ours.leave()
    assert ours.meeting is state
    assert state.without_others() is state


def test_two_models_of_a_kind_are_two_meetings() -> None:
    ranks._met.clear()
    first, second = (Ranks(Group(0, 2), "Net", lambda why: None) for _ in range(2))  # type: ignore[arg-type]
    assert "a watched Net no. 1;" in str(first.meet(CPU))
    assert "a watched Net no. 2;" in str(second.meet(CPU))


def test_ranks_read_what_the_packing_merges(pair: list[Member]) -> None:
    halves = [batch(slice(0, 10), averages=2.0), batch(slice(10, None), averages=2.0)]
    expected = together(*halves)
    for numbers in read(pair, observe(pair, 3, halves, earliest=77, interval=50)):
        assert [each.numbers for each in numbers.sites] == [each.numbers for each in expected.sites]
        assert [each.units for each in numbers.sites] == [each.units for each in expected.sites]
        assert [each.heads for each in numbers.sites] == [each.heads for each in expected.sites]
        assert [each.numbers for each in numbers.layers] == [each.numbers for each in expected.layers]
        assert numbers.ends == replace(expected.ends, earliest=77, interval=50)
    assert list(pair[0].ranks.layout.sites) == ["act", "soft"]


def test_the_furthest_rank_decides_on_step_and_history(pair: list[Member]) -> None:
    remembered = {"judge": {"observations": 7, "worst": float("inf")}, "told": [(1, 2.5)]}
    flights = at_once(
        lambda: pair[0].ranks.send(3, batch(), history=lambda: {"judge": {}}),
        lambda: pair[1].ranks.send(8, batch(), history=lambda: remembered),
    )
    assert [flight.step for flight in flights] == [8, 8]
    assert pair[0].ranks.history == {**remembered, "told": ((1, 2.5),)}
    assert pair[1].ranks.history is None
    read(pair, flights)


def test_a_run_that_begins_has_no_history(pair: list[Member]) -> None:
    read(pair, observe(pair, 0, history=lambda: 1 / 0))
    assert [member.ranks.history for member in pair] == [None, None]


def test_a_site_that_is_new_on_one_rank_is_agreed_upon_later(pair: list[Member]) -> None:
    old = batch()
    grown = replace(old, sites={**old.sites, "new": replace(old.sites["act"], facts=replace(old.sites["act"].facts, site="new"))})
    seen = []
    read(pair, observe(pair, 0, [old, old]))
    for step in range(1, 2 + 2 * LAG):
        numbers = read(pair, observe(pair, step, [old, grown], earliest=step + 5, interval=2 if step > 2 else 100))
        seen.append(([row.facts.site for row in numbers[0].sites], pair[0].ranks.agreed, pair[1].ranks.agreed))
    names = ["act", "soft"]
    # The change is told at step 1 and known to be read by all at step 1 + LAG; so is what was wished at step 0, at 1 and 2, and at 3.
    assert [sites for sites, _, _ in seen] == [names] * LAG + [[*names, "new"]] * (LAG + 1)
    assert [agreed for _, agreed, _ in seen] == [None] * (LAG - 1) + [(0, 1), (6, 100), (7, 100)] + [(8 + late, 2) for late in range(LAG - 1)]
    assert all(one == other for _, one, other in seen)


def test_windows_are_pruned_where_the_units_change(pair: list[Member]) -> None:
    ours = pair[0].ranks
    read(pair, observe(pair, 0))
    assert set(ours._windows._states) == {"act"}
    ours._windows.add("gone", samples(1).numpy())
    facts = batch().sites["act"]
    wider = Parts({"act": replace(facts, span=replace(facts.span, count=5), row=row(n=1, elements=1), block=samples(2, units=5))})
    for step in range(1, 2 + LAG):
        read(pair, observe(pair, step, [wider, wider]))
    assert {site: tuple(window.shape) for site, window in ours._windows._states.items()} == {"act": (4, 5)}


def test_equal_texts_travel_once() -> None:
    sent = []

    class One(Collectives):
        """The first of three ranks; the second says the same, the third something else."""

        def gather(self, numbers: list[int]) -> torch.Tensor:
            return torch.tensor([numbers, [*numbers[:2], 5], [1, 2, 4]])

        def broadcast(self, text: bytes, size: int, root: int) -> bytes:
            sent.append((root, size))
            return told(Parts()) if root == 2 else text

    collectives = One(None, CPU, 0, 3)
    agreed = agree(collectives, told(batch()), 3)
    assert (agreed.step, agreed.furthest) == (5, 1)
    assert sent == [(0, len(told(batch()))), (2, 2)]
    assert list(agreed.layout.sites) == ["act", "soft"]


def test_a_group_with_collectives_under_way_is_kept(pair: list[Member]) -> None:
    observe(pair, 0)
    flight = pair[0].ranks.send(1, batch())
    assert flight is not None
    pair[0].ranks.leave()
    assert not any(work.is_completed() for work in flight.works)
    flight.wait(0.05)
    assert flight.arrived()


def test_the_history_of_the_furthest_rank_is_not_sent_to_itself() -> None:
    class Alone(Collectives):
        def gather(self, numbers: list[int]) -> torch.Tensor:
            return torch.tensor([numbers])

        def broadcast(self, text: bytes, size: int, root: int) -> bytes:
            assert (size, root) == (len(text), 0)
            return text

    assert agree_on_history(Alone(None, CPU, 0, 1), 0, lambda: {"step": 3}) is None


def test_only_the_first_rank_to_leave_is_named() -> None:
    store = in_memory()
    rendezvous = [Rendezvous(store, 3, "Net no. 1") for _ in range(3)]
    assert rendezvous[0].who_left() is None
    rendezvous[1].say_left(4)
    rendezvous[2].say_left(5)
    assert rendezvous[0].who_left() == "4"
