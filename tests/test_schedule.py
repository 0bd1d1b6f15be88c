"""The budget, on a clock of the test's own."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import torchsat
from torchsat import schedule
from torchsat.schedule import Account, Mark, Schedule, Wish
from torchsat.transport.meeting import LAG


def test_which_steps_are_observed() -> None:
    plan = Schedule(50, None)
    assert [step for step in range(301) if plan.due(step)] == [0, 1, 2, 4, 8, 16, 32, 50, 64, 100, 128, 150, 200, 250, 256, 300]
    assert [step for step in range(10) if Schedule(1, None).due(step)] == list(range(10))


class Run(NamedTuple):
    """What has become of a training on a clock of the test's own."""

    observed: list[int]
    said: list[tuple[int, str]]
    spent: float
    """Seconds that observing took, the first observation aside."""
    lasted: float
    """Seconds that the training took as a whole."""


Seconds = float | Callable[[int], float]


def at(seconds: Seconds, step: int) -> float:
    return seconds if isinstance(seconds, float) else seconds(step)


def train(plan: Schedule, steps: int, *, cost: Seconds, step: Seconds, own: float = 1.0, first: int = 0) -> Run:
    """Train on a clock of the test's own.

    Args:
        cost: the seconds that the observation of a step takes.
        step: the seconds that a step takes without it.
        own: the share of the cost that is the time of our own code. The rest is indirect.
    """
    now, observed, said, spent = 0.0, [], [], 0.0
    for number in range(first, first + steps):
        due, taken = plan.due(number), at(cost, number)
        if due:
            observed.append(number)
            window = plan.begin(number, Mark(now, None))
            window.spend(own * taken)
            now += taken
            spent += taken if number != first else 0.0
        now += at(step, number)
        if due:
            plan.finish(window, Mark(now, None))
            sentence = plan.adjust(number)
            if sentence is not None:
                said.append((number, sentence))
        elif plan.compares:
            plan.follow(Mark(now, None))
    return Run(observed, said, spent, now)


def by_the_rule(every: int, budget: float, steps: int, cost: float, step: float) -> list[int]:
    """The steps that the rule names: a multiple of `every` if, with it, all observations take no more than 2 s and the share of the training time."""
    observed, spent = [0], 0.0
    for number in range(1, steps):
        pays = spent + cost <= 2 + budget * (number * step + spent + cost)
        if number & (number - 1) == 0 or (number % every == 0 and pays):
            observed.append(number)
            spent += cost
    return observed


# Seconds of an observation and of a step: a small network, a large one, one whose observation takes as long as 50 steps, and slow steps.
# The costs are odd numbers, so that no sum lies on the limit, where rounding would decide.
TRAININGS = [(0.00212347, 0.001, 30_000), (0.512347, 0.2, 10_000), (0.512347, 0.01, 50_000), (0.112347, 2.0, 2_000), (5.12347, 2.0, 10_000)]


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize(("cost", "step", "steps"), TRAININGS)
def test_the_steps_are_those_that_the_budget_pays_for(cost: float, step: float, steps: int, every: int) -> None:
    run = train(Schedule(every, 0.02), steps, cost=cost, step=step)
    assert run.observed == by_the_rule(every, 0.02, steps, cost, step)
    assert run.spent <= 2 + 0.02 * run.lasted


@pytest.mark.parametrize("every", [10, 50])
@pytest.mark.parametrize(("cost", "step", "steps"), TRAININGS)
def test_the_budget_holds_where_the_cost_is_indirect(cost: float, step: float, steps: int, every: int) -> None:
    """What it comes to is known after a few observations."""
    run = train(Schedule(every, 0.02), steps, cost=cost, step=step, own=0.0)
    assert run.spent <= 2 + 0.02 * run.lasted + 4 * cost
    assert len(run.observed) == pytest.approx(len(by_the_rule(every, 0.02, steps, cost, step)), abs=4)


def test_within_the_allowance_a_run_is_observed_as_asked() -> None:
    """README's every=10, where an observation costs three times as much as a step."""
    plan = Schedule(10, 0.02)
    run = train(plan, 2001, cost=0.006, step=0.002)
    powers = {2**k for k in range(11)}
    assert run.observed == sorted({0, *powers, *range(10, 2001, 10)})
    assert run.said == []
    assert plan.interval == 10
    assert plan.overhead is not None
    assert plan.overhead > 0.2


def test_a_large_model_has_four_observations_and_then_its_share() -> None:
    plan = Schedule(10, 0.02)
    run = train(plan, 20_000, cost=0.5, step=0.2)
    assert run.observed[:6] == [0, 1, 2, 4, 8, 16]
    # It costs 0.5 s, and the share of 24.5 s without observing and 25 s in all is 0.5 s: 122.5 steps.
    assert [said for _, said in run.said] == [
        "observing has taken 2 s so far; its budget is 2 s and 2 % of the training time. An observation costs 500 ms, a step 200 ms. Beside the "
        "powers of two, the next step to be observed is about 850, and then about one in 123; budget=None keeps every=10."
    ]
    assert 850 in run.observed
    assert not [number for number in run.observed if number < 850 and number & (number - 1)]
    late = [number for number in run.observed if number > 10_000 and number & (number - 1)]
    assert (late[-1] - late[0]) / (len(late) - 1) == pytest.approx(122.5, rel=0.03)
    assert plan.interval == 123
    assert plan.overhead == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("own", [1.0, 0.0])
def test_the_total_holds_where_observations_suddenly_cost_more(own: float) -> None:
    plan = Schedule(10, 0.02)
    run = train(plan, 60_000, cost=lambda number: 0.002 if number < 20_000 else 0.1, step=0.01, own=own)
    # What training has paid for until then and was not spent is enough for a few of the new ones.
    assert [number for number in run.observed if 20_000 <= number < 20_150] == list(range(20_000, 20_150, 10))
    assert run.spent <= 2 + 0.02 * run.lasted + 4 * 0.1
    assert len(run.said) == 1
    assert "An observation costs 100 ms, a step 10 ms." in run.said[0][1]
    assert plan.interval in (490, 491)


def test_a_cost_that_falls_gives_every_back() -> None:
    plan = Schedule(10, 0.02)
    run = train(plan, 40_000, cost=lambda number: 0.1 if number < 10_000 else 0.001, step=0.01)
    (_, first), (step, last) = run.said
    assert first.endswith("and then about one in 491; budget=None keeps every=10.")
    assert step < 16_400
    assert last.endswith("An observation costs 1 ms, a step 10 ms. From here on every=10 is kept again.")
    assert [number for number in run.observed if number > 20_000] == sorted({2**15, *range(20_010, 40_000, 10)})


@pytest.mark.parametrize("slow", [(0,), (2,), (2, 16), (1, 3), (3, 5), (41,), (40, 41)])
def test_a_compilation_in_one_of_the_first_steps_is_no_cost_of_observing(slow: tuple[int, ...]) -> None:
    plan = Schedule(4, 0.02)
    run = train(plan, 400, cost=0.01, step=lambda number: 60.0 if number in slow else 0.01, own=0.5)
    assert run.observed == [number for number in range(400) if number % 4 == 0 or number in (1, 2)]
    assert run.said == []
    assert plan.interval == 4


def test_the_first_observation_does_not_count() -> None:
    run = train(Schedule(4, 0.02), 400, cost=lambda number: 0.001 if number else 1000.0, step=0.01)
    assert run.observed == [number for number in range(400) if number % 4 == 0 or number in (1, 2)]


def test_steps_of_different_length_cost_nothing() -> None:
    """Observing costs 0.1 ms; steps take 10 to 30 ms, and now and then a second."""
    drawn = random.Random(0)
    plan = Schedule(10, 0.02)
    run = train(plan, 20_000, cost=0.0001, step=lambda number: 1.0 if drawn.random() < 0.02 else drawn.uniform(0.01, 0.03), own=0.5)
    assert run.observed == sorted({0, *(2**k for k in range(15)), *range(10, 20_000, 10)})
    assert run.said == []


def test_without_a_budget_nothing_is_left_out_but_the_overhead_is_known() -> None:
    plan = Schedule(2, None)
    run = train(plan, 101, cost=5.0, step=1.0)
    assert run.observed == [0, 1, *range(2, 101, 2)]
    assert run.said == []
    assert plan.overhead == pytest.approx(5 / 7)


def test_a_budget_of_everything_leaves_nothing_out() -> None:
    assert train(Schedule(1, 1.0), 200, cost=5.0, step=1.0).observed == list(range(200))


def test_with_every_step_observed_our_own_time_is_all_there_is() -> None:
    run = train(Schedule(1, 0.02), 3000, cost=0.5, step=0.1)
    assert run.observed[:6] == [0, 1, 2, 3, 4, 8]
    assert run.spent <= 2 + 0.02 * run.lasted


def test_an_observation_that_is_abandoned_counts_with_our_own_time() -> None:
    plan = Schedule(10, 0.02)
    for number in range(3):
        window = plan.begin(number, Mark(float(number), None))
        window.spend(0.25)
        if number == 1:
            window.void()
        plan.finish(window, Mark(number + 0.5, None))
        plan.adjust(number)
    assert plan.account(2).spent == 0.5


@pytest.mark.parametrize("pause", [0.0, 3600.0])
def test_a_pause_pays_for_nothing(pause: float) -> None:
    """A notebook whose loop stands still for an hour between two steps."""
    plan = Schedule(10, 0.02)
    run = train(plan, 5000, cost=0.112347, step=lambda number: 0.01 + (pause if number == 777 else 0.0))
    assert run.observed == train(Schedule(10, 0.02), 5000, cost=0.112347, step=0.01).observed


def test_the_message_comes_once_step_every_is_near_and_is_true() -> None:
    plan = Schedule(100, 0.02)
    run = train(plan, 5000, cost=2.5, step=0.1)
    ((step, sentence),) = run.said
    assert step == 64
    # 6 observations until step 64, and 5 more until 1024 ... 4096 are all paid for from the share.
    assert sentence.startswith(
        "observing has taken 17.5 s so far; its budget is 2 s and 2 % of the training time. An observation costs 2.5 s, a step 100 ms."
    )
    assert run.observed == [0, *(2**k for k in range(13))]


def test_ranks_observe_the_same_steps_at_a_cost_that_each_can_pay() -> None:
    """Three ranks of different speed, which hear each other's wishes LAG steps later, as transport/ranks.py lets them."""
    for every in (1, 10):
        costs, plans, now, said = (0.002, 0.5, 0.05), [Schedule(every, 0.02) for _ in range(3)], [0.0] * 3, []
        told: dict[int, Wish] = {}
        observed, agreed = [], None
        for number in range(20_000):
            due = {plan.due(number) for plan in plans}
            assert len(due) == 1
            if not due.pop():
                for rank, plan in enumerate(plans):
                    now[rank] += 0.2
                    if plan.compares:
                        plan.follow(Mark(now[rank], None))
                continue
            observed.append(number)
            windows = [plan.begin(number, Mark(begun, None)) for plan, begun in zip(plans, now, strict=True)]
            for rank, (plan, window) in enumerate(zip(plans, windows, strict=True)):
                plan.is_agreed = True
                window.spend(costs[rank])
                now[rank] += 0.2 + costs[rank]
            heard = [told.pop(before) for before in sorted(told) if before + LAG <= number]
            agreed = heard[-1] if heard else agreed
            wishes = [plan.wish(number, LAG) for plan in plans]
            told[number] = Wish(max(each.earliest for each in wishes), max(each.interval for each in wishes))
            for rank, (plan, window) in enumerate(zip(plans, windows, strict=True)):
                sentence = None if agreed is None else plan.agree(number, agreed)
                if sentence is not None and rank == 0:
                    said.append(sentence)
                plan.finish(window, Mark(now[rank], None))
                assert plan.adjust(number) is None
        assert 0.5 * (len(observed) - 1) <= 2 + 0.02 * now[1] + 3 * 0.5
        assert 0.5 * (len(observed) - 1) >= 0.9 * (2 + 0.02 * now[1])
        assert [number for number in observed if number & (number - 1) == 0] == [0, *(2**k for k in range(15))]
        assert len(said) == 1
        assert said[0].startswith(
            "the budget for observing is 2 s and 2 % of the training time, on the rank where observing costs most. Beside the powers "
        )
        assert said[0].endswith(f"and then about one in 123; budget=None keeps every={every}.")


@pytest.mark.parametrize("seen", [True, False])
def test_what_lies_between_two_steps_is_no_cost_of_ours(seen: bool) -> None:
    """A validation of 500 s before every observed step."""
    plan, now = Schedule(10, 0.1), 0.0
    for at in range(400):
        if plan.due(at):
            window = plan.begin(at, Mark(now, None))
            now += 500.0
            if seen:
                window.enter(Mark(now, None))
            now += 1.1
            plan.finish(window, Mark(now, None))
            plan.adjust(at)
        else:
            now += 1.0
            if plan.compares:
                plan.follow(Mark(now, None))
    # 500.1 s are paid for by 4501 s without observing and 5001 s in all.
    assert plan.interval == (10 if seen else 4501)


class Event:
    """A mark on a device that is behind."""

    def __init__(self, at: float) -> None:
        self.at, self.done = at, False

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, other: "Event") -> float:
        assert self.done
        assert other.done
        return other.at - self.at


def test_a_device_is_never_waited_for() -> None:
    plan, now = Schedule(2, 0.01), 0.0
    events = []

    def mark() -> Mark:
        events.append(Event(now))
        return Mark(0.0, events[-1])  # type: ignore[arg-type]

    for at in range(12):
        if due := plan.due(at):
            window = plan.begin(at, mark())
        now += 5e4 if due else 1e4
        if due:
            plan.finish(window, mark())
            assert plan.adjust(at) is None
        else:
            plan.follow(mark())
    assert plan.overhead is None
    assert plan.account(11) == Account()
    window = plan.begin(12, mark())
    now += 5e4
    plan.finish(window, mark())
    for event in events:
        event.done = event.at < 2.5e5
    # 40 s over a step of 10 s, from the device's clock, which counts in milliseconds. The windows of the steps 2 and 4 have passed. Those of 6, 8, 10
    # and 12 have not, and are taken to cost the same; so is that of step 1, after which no step was timed. With nine powers of two before it, step
    # 6712 is the first multiple of 2 at which 0.99 x (280 + 400) s is not more than 2 s and 0.01 x 67120 s.
    assert plan.adjust(12) == (
        "observing has taken 280 s so far; its budget is 2 s and 1 % of the training time. An observation costs 40 s, a step 10 s. Beside the powers "
        "of two, the next step to be observed is about 6712, and then about one in 396; budget=None keeps every=2."
    )
    assert plan.account(12) == Account(spent=280.0, trained=120.0, cost=40.0, step=10.0)
    assert plan.overhead == pytest.approx(40 / 60)


def test_on_a_device_the_hosts_time_stands_in_where_no_step_was_timed() -> None:
    """With every step observed there is nothing to compare with."""
    plan, now = Schedule(1, 0.02), 0.0
    observed = []
    for at in range(400):
        if plan.due(at):
            observed.append(at)
            events = [Event(now), Event(now + 20.0)]
            for event in events:
                event.done = True
            window = plan.begin(at, Mark(0.0, events[0]))  # type: ignore[arg-type]
            window.spend(0.1)
            plan.finish(window, Mark(0.0, events[1]))  # type: ignore[arg-type]
            plan.adjust(at)
            now += 20.0
        else:
            now += 10.0
    assert observed[:21] == list(range(21))
    assert observed[21:] == [32, 64, 128, 256]


def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Has monitors read a clock that stands still: the one element of this list is its time."""
    now = [0.0]

    class Clock(schedule.Clock):
        def seconds(self) -> float:
            return now[0]

    monkeypatch.setattr(schedule, "CLOCK", Clock())
    return now


def test_a_real_training_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = stopped_clock(monkeypatch)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    steps: list[torchsat.Snapshot] = []

    def slow(snapshot: torchsat.Snapshot) -> None:
        steps.append(snapshot)
        now[0] += 4.125

    with caplog.at_level(logging.WARNING), torchsat.watch(model, tmp_path, every=4, budget=0.25, sinks=[slow]) as monitor:
        assert monitor.overhead is None
        for _ in range(160):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            now[0] += 1.0
    observed = [each.step for each in steps]
    assert observed == by_the_rule(4, 0.25, 160, 4.125, 1.0)
    assert [number for number in observed if number & (number - 1)] == [92, 104, 116, 144, 156]
    # What an observation takes is known when the next one begins.
    known = observed[observed.index(4) :]
    assert monitor.overhead == pytest.approx(4.125 * (len(known) - 1) / (known[-1] - 4 + 4.125 * (len(known) - 1)))
    assert [record.message for record in caplog.records] == [
        "torchsat: step 2: observing has taken 8.25 s so far; its budget is 2 s and 25 % of the training time. An observation costs 4.12 s, a step 1 "
        "s. Beside the powers of two, the next step to be observed is about 92, and then about one in 13; budget=None keeps every=4."
    ]
    assert [each.overhead for each in steps[:5]] == [None] * 5
    told = [each.overhead for each in torchsat.read(tmp_path)]
    assert told == [None if each.overhead is None else pytest.approx(each.overhead, rel=1e-6) for each in steps]
    assert steps[-1].overhead == pytest.approx(4.125 * (len(known) - 2) / (known[-2] - 4 + 4.125 * (len(known) - 2)))


def test_the_user_hears_of_the_budget_at_the_last_step_before_one_is_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = stopped_clock(monkeypatch)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    steps: list[int] = []

    def slow(snapshot: torchsat.Snapshot) -> None:
        steps.append(snapshot.step)
        now[0] += 0.5

    torchsat.watch(model, every=1, sinks=[slow])
    for _ in range(10):
        optimizer.zero_grad()
        now[0] += 0.125
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert steps == [0, 1, 2, 3, 4, 8]
    (said,) = [record.message for record in caplog.records if "budget" in record.message]
    assert said.startswith(
        "torchsat: step 4: observing has taken 2 s so far; its budget is 2 s and 2 % of the training time. An observation costs 500 ms, "
    )


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, "2 %", True])
def test_a_budget_that_is_none(budget: object) -> None:
    with pytest.raises(ValueError, match=r"budget is .*; allowed are numbers above 0 up to 1 \(a share of training time"):
        torchsat.watch(nn.Tanh(), budget=budget)  # type: ignore[arg-type]
