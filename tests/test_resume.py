"""Runs that stop and go on: steps, alerts and their since-step, one line in TensorBoard."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn

import torchsat
from tests.models import linear_at
from torchsat import schedule
from torchsat.integrations import take_up
from torchsat.record import Snapshot


def saturated() -> nn.Sequential:
    """A sigmoid whose weights are far too large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 1))
    with torch.no_grad():
        linear_at(model, 0).weight *= 50
    return model


def batches(first: int, last: int) -> list[Tensor]:
    return [torch.randn(64, 8, generator=torch.Generator().manual_seed(step)) for step in range(first, last)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for x in batches(first, last):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def watched(model: nn.Module, **given: Any) -> tuple[torchsat.Monitor, list[Snapshot], list[torchsat.Alert]]:
    kept: list[Snapshot] = []
    alerts: list[torchsat.Alert] = []
    return torchsat.watch(model, every=5, budget=None, sinks=[kept.append], on_alert=alerts.append, **given), kept, alerts


def test_a_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    whole = saturated()
    optimizer = adam(whole)
    monitor, expected, told = watched(whole)
    train(whole, optimizer, 0, 40)
    monitor.close()
    assert [alert.since for alert in told] == [0]

    model = saturated()
    optimizer = adam(model)
    monitor, first, _ = watched(model)
    train(model, optimizer, 0, 20)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "monitor": monitor.state_dict()}, tmp_path / "checkpoint")
    monitor.close()

    model = saturated()
    optimizer = adam(model)
    kept = torch.load(tmp_path / "checkpoint", weights_only=True)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    monitor, second, said_again = watched(model)
    monitor.load_state_dict(kept["monitor"])
    train(model, optimizer, 20, 40)
    monitor.close()

    # The first step of a session is observed whatever its number.
    assert [each.step for each in second] == [20, 25, 30, 32, 35]
    assert [each.step for each in first + second] == [each.step for each in expected]
    for one, other in zip(first + second, expected, strict=True):
        assert (one.records[0].saturated, one.weights) == (other.records[0].saturated, other.weights)
    assert said_again == []
    (alert,) = monitor.alerts
    assert (alert.site, alert.since, alert.causes) == ("1", 0, told[0].causes)


def test_a_state_keeps_streaks_that_have_not_fired_yet() -> None:
    model = saturated()
    monitor, kept, alerts = watched(model)
    train(model, adam(model), 0, 2)
    state = monitor.state_dict()
    monitor.close()
    assert (len(kept), alerts) == (2, [])
    monitor, _, alerts = watched(model)
    monitor.load_state_dict(state)
    train(model, adam(model), 2, 3)
    monitor.close()
    assert [(alert.step, alert.since) for alert in alerts] == [(2, 0)]


def test_another_dict_is_answered() -> None:
    monitor, _, _ = watched(saturated())
    with pytest.raises(ValueError, match=r"the state lacks diagnosis, judge, stuck, turn; allowed is what monitor.state_dict\(\) gave"):
        monitor.load_state_dict({"step": 3})
    with pytest.raises(ValueError, match=r"the state cannot be understood \(KeyError: 'states'\)"):
        monitor.load_state_dict({**monitor.state_dict(), "judge": {}})
    monitor.close()


def test_a_checkpoint_of_another_version_does_not_stop_the_training_that_it_resumes(caplog: pytest.LogCaptureFixture) -> None:
    model = saturated()
    monitor, kept, _ = watched(model, start=7)
    take_up(monitor, {"step": 7, "version": 99})
    train(model, adam(model), 0, 1)
    monitor.close()
    assert [each.step for each in kept] == [7]
    assert caplog.messages[0].startswith("torchsat: the checkpoint's state of the monitor is not taken up, alerts begin anew: the state lacks ")


@pytest.mark.parametrize("start", [20, "resume"])
def test_a_run_goes_on_from_its_directory(start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two files of one second are told apart by this number, and TensorBoard reads them in the order of their names, where 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    model, run = saturated(), tmp_path / "run"
    optimizer = adam(model)
    monitor, _, told = watched(model, log_dir=run)
    # The process dies after the checkpoint of step 20, or at step 21.
    train(model, optimizer, 0, 24 if start == 20 else 21)
    monitor.close()
    (fired,) = told
    caplog.set_level(logging.WARNING, "torchsat")
    caplog.clear()
    model = saturated()
    optimizer = adam(model)
    monitor, kept, told = watched(model, log_dir=run, start=start)
    first = 20 if start == 20 else 21
    train(model, optimizer, first, 40)
    monitor.close()
    assert [each.step for each in kept] == sorted({first, 25, 30, 32, 35})
    assert told == []
    assert not [message for message in caplog.messages if "is saturated" in message]
    (alert,) = monitor.alerts
    assert (alert.since, alert.causes[0].name) == (0, fired.causes[0].name)
    steps = [each.step for each in torchsat.read(run)]
    assert steps == sorted({0, 1, 2, 4, 5, 8, 10, 15, 16, 20, first, 25, 30, 32, 35})
    accumulator = EventAccumulator(str(run / "torchsat"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("torchsat/excess_max")] == steps
    # The last word on the alert is that it fires, since the first step.
    (event,) = [alert for snapshot in torchsat.read(run) for alert in snapshot.alerts]
    assert (event.step, event.since, event.firing) == (2, 0, True)


def test_a_checkpoint_before_the_alert_fires_it_anew(tmp_path: Path) -> None:
    model, run = saturated(), tmp_path / "run"
    monitor, _, told = watched(model, log_dir=run)
    train(model, adam(model), 0, 10)
    monitor.close()
    assert [alert.step for alert in told] == [2]
    monitor, _, told = watched(model, log_dir=run, start=1)
    train(model, adam(model), 1, 11)
    monitor.close()
    assert [(alert.step, alert.since) for alert in told] == [(4, 1)]


def test_where_nothing_was_written_a_resumed_run_begins_at_0(tmp_path: Path) -> None:
    model = saturated()
    monitor, kept, _ = watched(model, log_dir=tmp_path / "run", start="resume")
    train(model, adam(model), 0, 3)
    monitor.close()
    assert [each.step for each in kept] == [0, 1, 2]


def test_a_start_without_a_directory_is_the_step() -> None:
    model = saturated()
    monitor, kept, _ = watched(model, start=103)
    train(model, adam(model), 0, 8)
    monitor.close()
    assert [each.step for each in kept] == [103, 105, 110]


@pytest.mark.parametrize("start", [-1, 1.0, True, "latest", None])
def test_other_starts_are_answered(start: Any) -> None:
    with pytest.raises(ValueError, match="allowed are whole numbers from 0 up"):
        watched(saturated(), start=start)


@pytest.mark.parametrize("group", [3, "world", False])
def test_other_groups_are_answered(group: Any) -> None:
    with pytest.raises(TypeError, match='allowed are "auto"'):
        watched(saturated(), group=group)


def test_a_resumed_run_reads_the_elements_that_an_uninterrupted_one_does() -> None:
    def records(interrupted: bool) -> list[tuple[int, Any]]:
        model = saturated()
        optimizer = adam(model)
        monitor, kept, _ = watched(model, sample=100)
        train(model, optimizer, 0, 20)
        if interrupted:
            state = monitor.state_dict()
            monitor.close()
            monitor, more, _ = watched(model, sample=100)
            monitor.load_state_dict(state)
            assert monitor.state_dict()["turn"] == state["turn"] == 9
            train(model, optimizer, 20, 40)
            kept = kept + more
        else:
            train(model, optimizer, 20, 40)
        monitor.close()
        return [(each.step, each["1"].z_mean) for each in kept]

    assert records(interrupted=True) == records(interrupted=False)


class Sessions:
    """Trainings on a clock of the test's own, on which a step takes 1 s and an observation a little more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        sessions = self

        class Clock(schedule.Clock):
            def seconds(self) -> float:
                return sessions.now

        monkeypatch.setattr(schedule, "CLOCK", Clock())
        self.model = saturated()
        self.optimizer = adam(self.model)
        self.observed: list[int] = []

    def watch(self) -> torchsat.Monitor:
        return torchsat.watch(self.model, every=5, budget=0.1, sinks=[self.slow])

    def slow(self, snapshot: Snapshot) -> None:
        self.observed.append(snapshot.step)
        self.now += 1.0625

    def train(self, first: int, last: int) -> None:
        for x in batches(first, last):
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.now += 1.0


def test_a_resumed_run_keeps_what_it_has_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is observed as if nothing had happened, but for the first step of the second session, which does not count."""
    whole = Sessions(monkeypatch)
    whole.watch()
    whole.train(0, 100)
    assert [step for step in whole.observed if step & (step - 1)] == [50, 60, 80, 90, 95]

    halves = Sessions(monkeypatch)
    monitor = halves.watch()
    halves.train(0, 51)
    state = monitor.state_dict()
    assert state["observing"] == {"spent": 7 * 1.0625, "trained": 50.0, "cost": 1.0625, "step": 1.0}
    monitor.close()
    monitor = halves.watch()
    monitor.load_state_dict(state)
    halves.train(51, 100)
    assert halves.observed == sorted([*whole.observed, 51])


def test_a_run_that_goes_back_has_spent_what_it_has_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that returns to the state of step 3 again and again gains no new allowance by it."""
    sessions = Sessions(monkeypatch)
    monitor = sessions.watch()
    sessions.train(0, 3)
    state = monitor.state_dict()
    spent = 0.0
    for _ in range(5):
        sessions.train(3, 9)
        assert monitor.state_dict()["observing"]["spent"] > spent
        spent = monitor.state_dict()["observing"]["spent"]
        monitor.load_state_dict(state)
    assert sessions.observed == [0, 1, 2, 4, 8, *[3, 4, 8] * 4]


def test_the_state_of_an_earlier_version_begins_with_nothing_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(monkeypatch)
    monitor = sessions.watch()
    state = {**monitor.state_dict(), "step": 100, "interval": 500}
    del state["observing"]
    monitor.load_state_dict(state)
    sessions.train(100, 121)
    assert sessions.observed == [100, 105, 110, 115, 120]
    # Windows of 4, 5, 5 and 5 steps, the sink not counted.
    assert monitor.overhead == pytest.approx(4 * 1.0625 / (19 + 4 * 1.0625))
