"""How long an observation waits for its step: it is given up where none comes, and never where training merely takes many passes to a step."""

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.models import Block, mlp
from tests.training import loop_of, traces_of
from tests.truth import known
from torchsat import patience
from torchsat.observe.observation import Retry


def test_the_model_is_named_also_where_it_is_gone_when_the_monitor_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")
    for _ in range(300):
        model.zero_grad()
        model(torch.randn(2, 64)).sum().backward()
    del model
    monitor.close()
    (message,) = caplog.messages
    assert "300 backward passes have computed gradients of Sequential, and no step" in message


@pytest.mark.parametrize("empties", [False, True])
def test_backwards_without_any_step_are_said_once(empties: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_BACKWARDS", 20)
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")
    observer = loop_of(monitor).observer

    def train(steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(2, 64)).sum().backward()
            if empties:
                model.zero_grad()

    train(20)
    assert (caplog.messages, observer.observation is None) == ([], False)
    train(40)
    assert [message for message in caplog.messages if "Call monitor.step() at the end of each step." in message] == caplog.messages
    assert len(caplog.messages) == 1
    assert (observer.observation, traces_of(model)) == (None, [])
    # As soon as the user does so, observations begin again.
    monitor.step()
    train(1)
    monitor.step()
    assert known(monitor.latest)["1"].n == 2 * 32


def test_a_loop_that_ends_before_it_was_told_is_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    monitor = torchsat.watch(model, errors="raise")
    for _ in range(5):
        model(torch.randn(2, 64)).sum().backward()
        model.zero_grad()
    monitor.close()
    assert [message for message in caplog.messages if "5 backward passes" in message and "monitor.step()" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_an_observation_without_a_backward_is_given_up_quietly_and_made_up_for(caplog: pytest.LogCaptureFixture) -> None:
    model, snapshots = mlp(), list[torchsat.Snapshot]()
    monitor = torchsat.watch(model, every=100, errors="raise", sinks=(snapshots.append,))
    observer, optimizer = loop_of(monitor).observer, torch.optim.SGD(model.parameters(), lr=0.1)

    def step(passes: int) -> None:
        optimizer.zero_grad()
        torch.stack([model(torch.randn(2, 64)).square().mean() for _ in range(passes)]).sum().backward()
        optimizer.step()

    for _ in range(70):
        model(torch.randn(2, 64))
    assert (observer.observation, observer.retry, traces_of(model)) == (None, Retry.NO_STEP, [])
    # The step that is running is not observed, the next one is; and now 100 passes to one backward are not too many.
    step(1)
    step(100)
    monitor.flush()
    assert [(snapshot.step, snapshot["1"].n) for snapshot in snapshots] == [(1, 100 * 2 * 32)]
    assert caplog.messages == []


def test_parts_that_are_called_again_and_again_without_a_backward_are_given_up_too() -> None:
    model = mlp()
    monitor = torchsat.watch(model, errors="raise")
    for _ in range(100):
        model[1](model[0](torch.randn(2, 64)))
    assert loop_of(monitor).observer.observation is None
    assert not traces_of(model)


def test_many_micro_batches_are_no_loop_without_a_step(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    monitor = torchsat.watch(model, errors="raise", calls=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(260):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    monitor.flush()
    assert known(monitor.latest)["1"].n == 260 * 2
    assert caplog.messages == []


def test_the_evaluations_of_a_closure_are_no_loop_without_a_step(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_BACKWARDS", 10)
    model, x = Block(), torch.randn(4, 8)
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-4, max_iter=30, max_eval=30, tolerance_grad=0.0, tolerance_change=0.0)
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    monitor.flush()
    assert calls[0] == 30
    assert known(monitor.latest)["act"].n == calls[0] * 4 * 8
    assert caplog.messages == []


def test_each_of_many_models_that_are_trained_in_turn_is_observed() -> None:
    models = [Block() for _ in range(12)]
    monitors = [torchsat.watch(model, every=1, errors="raise") for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for _ in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for monitor in monitors:
        monitor.flush()
        assert known(monitor.latest).step == 3
