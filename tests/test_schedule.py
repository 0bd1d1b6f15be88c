"""The budget, on a clock of the test's own."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import torchsat
from torchsat import schedule
from torchsat.schedule import Mark, Schedule


def test_which_steps_are_observed() -> None:
    plan = Schedule(50, None)
    assert [step for step in range(201) if plan.due(step)] == [0, 1, 2, 4, 8, 16, 32, 50, 100, 150, 200]
    assert [step for step in range(10) if Schedule(1, None).due(step)] == list(range(10))


def train(plan: Schedule, steps: int, cost: float, step: float, own: float | None = None) -> tuple[list[int], list[str], float]:
    """Observed steps, what was said, and the time that observing took, where an observation costs so many seconds and a step so many."""
    now, observed, said, spent = 0.0, [], [], 0.0
    for at in range(steps):
        due = plan.due(at)
        if due:
            observed.append(at)
            window = plan.begin(at, Mark(now, None))
            window.spend(cost if own is None else own)
            now += cost
            spent += cost
        now += step
        if due:
            plan.finish(window, Mark(now, None))
            sentence = plan.adjust(at)
            if sentence is not None:
                said.append(sentence)
        elif plan.compares:
            plan.follow(Mark(now, None))
    return observed, said, spent / now


def test_an_observation_within_the_budget_changes_nothing() -> None:
    plan = Schedule(50, 0.02)
    observed, said, _ = train(plan, 1001, cost=0.9, step=1.0)
    assert observed == [0, 1, 2, 4, 8, 16, 32, *range(50, 1001, 50)]
    assert said == []
    assert plan.overhead == pytest.approx(0.9 / 50.9)


@pytest.mark.parametrize("own", [None, 0.0])
def test_the_interval_is_stretched_until_the_budget_holds(own: float | None) -> None:
    # 10 steps' worth at 0.5 %: an interval of at least 10 * 0.995 / 0.005 = 1990 steps, hence 2500 = 50 * 50.
    plan = Schedule(50, 0.005)
    observed, said, _ = train(plan, 20_001, cost=10.0, step=1.0, own=own)
    assert observed == [0, 1, 2, 4, 8, 16, 32, *range(2500, 20_001, 2500)]
    assert said == [
        "an observation costs 1e+04 ms, a step 1e+03 ms: 17 % of the training time at every=50, and the budget is 0.5 %. One in 2500 steps is "
        "observed from here on; budget=None keeps every=50."
    ]
    assert plan.overhead is not None
    assert plan.overhead == pytest.approx(10 / 2510)
    assert plan.overhead <= 0.005


def test_it_comes_back_only_when_it_stays_well_within() -> None:
    plan = Schedule(10, 0.1)
    train(plan, 101, cost=5.0, step=1.0)
    assert plan.interval == 50
    _, said, _ = train(plan, 5001, cost=1.0, step=1.0)
    # 1 step's worth at 10 %: 9 steps suffice, 12.9 with the slack, hence 20 and not 10.
    assert plan.interval == 20
    assert len(said) == 1
    assert train(plan, 5001, cost=0.1, step=1.0)[1][-1].endswith("One in 10 steps is observed from here on; budget=None keeps every=10.")
    assert plan.interval == 10


def test_without_a_budget_nothing_is_stretched_but_the_overhead_is_known() -> None:
    plan = Schedule(2, None)
    observed, said, _ = train(plan, 101, cost=5.0, step=1.0)
    assert observed == [0, 1, *range(2, 101, 2)]
    assert said == []
    assert plan.overhead == pytest.approx(5 / 7)


def test_with_every_step_observed_our_own_time_is_all_there_is() -> None:
    plan = Schedule(1, 0.02)
    observed, _, _ = train(plan, 3000, cost=1.0, step=1.0)
    assert plan.interval == 50
    assert observed[:3] == [0, 1, 2]


def test_the_first_observation_and_one_slow_step_do_not_count() -> None:
    plan = Schedule(4, 0.1)
    now = 0.0
    for at in range(400):
        due = plan.due(at)
        if due:
            window = plan.begin(at, Mark(now, None))
            now += 1000.0 if at == 0 else 0.1
        now += 500.0 if at == 41 else 1.0
        if due:
            plan.finish(window, Mark(now, None))
            assert plan.adjust(at) is None
        elif plan.compares:
            plan.follow(Mark(now, None))
    assert plan.interval == 4


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
    assert plan.interval == (10 if seen else 5000)


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
    for at in range(12):
        if plan.due(at):
            events.append(Event(now))
            window = plan.begin(at, Mark(0.0, events[-1]))  # type: ignore[arg-type]
        now += 50.0 if plan.due(at) else 10.0
        if plan.due(at):
            events.append(Event(now))
            plan.finish(window, Mark(0.0, events[-1]))  # type: ignore[arg-type]
        else:
            events.append(Event(now))
            plan.follow(Mark(0.0, events[-1]))  # type: ignore[arg-type]
        assert plan.adjust(at) is None
    assert plan.overhead is None
    for event in events:
        event.done = True
    # 40 ms over a step of 10 ms, from the device's clock, which counts in milliseconds.
    assert str(plan.adjust(12)).startswith("an observation costs 40 ms, a step 10 ms: 67 % of the training time at every=2")
    assert plan.overhead == pytest.approx(40 / 60)


def test_a_real_training_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]

    class Clock(schedule.Clock):
        def seconds(self) -> float:
            return now[0]

    monkeypatch.setattr(schedule, "CLOCK", Clock())
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    steps: list[torchsat.Snapshot] = []

    def slow(snapshot: torchsat.Snapshot) -> None:
        steps.append(snapshot)
        now[0] += 4.0

    with caplog.at_level(logging.WARNING), torchsat.watch(model, tmp_path, every=4, budget=0.1, sinks=[slow]) as monitor:
        assert monitor.overhead is None
        for _ in range(400):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            now[0] += 1.0
        assert monitor.overhead == pytest.approx(4 / 44)
    # 4 steps' worth at 10 %: 36 steps at least.
    assert [each.step for each in steps] == [0, 1, 2, *range(40, 400, 40)]
    assert [record.message for record in caplog.records] == [
        "torchsat: step 2: an observation costs 4e+03 ms, a step 1e+03 ms: 50 % of the training time at every=4, and the budget is 10 %. One in 40 "
        "steps is observed from here on; budget=None keeps every=4."
    ]
    assert [each.overhead for each in steps[:4]] == [None] * 4
    assert [each.overhead for each in torchsat.read(tmp_path)][-1] == pytest.approx(4 / 44, rel=1e-6)


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, "2 %", True])
def test_a_budget_that_is_none(budget: object) -> None:
    with pytest.raises(ValueError, match=r"budget is .*; allowed are numbers above 0 up to 1 \(a share of training time"):
        torchsat.watch(nn.Tanh(), budget=budget)  # type: ignore[arg-type]
