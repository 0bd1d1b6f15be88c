"""What counts as one step: with one optimizer, with several, without one, with a closure, or with a scaler that skips steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.models import linear_at, mlp
from tests.training import train
from tests.truth import known


def test_steps_are_those_of_the_optimizers_that_own_the_model() -> None:
    model, other = mlp(), mlp()
    monitor, others = torchsat.watch(model, every=1, errors="raise"), torchsat.watch(other, every=1, errors="raise")
    train(model, 3)
    train(other, 7)
    monitor.flush()
    assert monitor.latest is not None
    assert monitor.latest.step == 2
    assert others.latest is not None
    assert others.latest.step == 6


def test_two_optimizers_on_one_model_make_one_step() -> None:
    model, snapshots = mlp(), list[torchsat.Snapshot]()
    torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
    first, second = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2:].parameters(), lr=0.01)
    for _ in range(4):
        model(torch.randn(8, 64)).sum().backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 3]
    assert all(snapshot["1"].n == 8 * 32 for snapshot in snapshots)
    assert all(known(weight.update_ratio) > 0 for snapshot in snapshots for weight in snapshot.weights)


def test_two_optimizers_in_turn_make_a_step_each_round() -> None:
    model, snapshots = mlp(), list[torchsat.Snapshot]()
    torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
    optimizers = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2:].parameters(), lr=0.1)
    for _ in range(4):
        for optimizer in optimizers:
            model(torch.randn(8, 64)).sum().backward()
            optimizer.step()
            model.zero_grad()
    assert 3 <= len(snapshots) <= 8
    assert [snapshot.step for snapshot in snapshots] == list(range(len(snapshots)))


def test_an_lbfgs_step_is_one_step_with_all_its_evaluations() -> None:
    model, snapshots = mlp(), list[torchsat.Snapshot]()
    torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, y = torch.randn(16, 64), torch.randint(3, (16,))
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    counts = []
    for _ in range(3):
        before = calls[0]
        optimizer.step(closure)
        counts.append(calls[0] - before)
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2]
    assert [snapshot["1"].n for snapshot in snapshots] == [16 * 32 * count for count in counts]
    assert all(known(snapshot.weights[0].grad_norm) > 0 and known(snapshot.weights[0].update_ratio) > 0 for snapshot in snapshots)


def test_a_loop_without_an_optimizer_steps_by_hand() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=2, errors="raise")
    for _ in range(5):
        model(torch.randn(8, 64)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * known(parameter.grad))
                parameter.grad = None
        monitor.step()
    assert monitor.latest is not None
    assert monitor.latest.step == 4
    assert monitor.latest.weights[0].gain == pytest.approx(1 / 3**0.5, rel=0.1)


def test_the_optimizer_may_be_made_later_and_raise() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")

    class Odd(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("not now")
            super().step()

    optimizer = Odd(model.parameters(), lr=0.1)
    for attempt in range(3):
        Odd.fails = attempt == 0
        model(torch.randn(8, 64)).sum().backward()
        if attempt == 0:
            with pytest.raises(RuntimeError, match="not now"):
                optimizer.step()
        else:
            optimizer.step()
    monitor.flush()
    assert monitor.latest is not None
    assert monitor.latest.step == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_is_taken_out_and_its_skipped_steps_are_not_counted(fused: bool) -> None:
    def run(scale: float | None) -> torchsat.Snapshot:
        torch.manual_seed(0)
        model = mlp(nn.Sigmoid)
        monitor = torchsat.watch(model, every=1, errors="raise")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
        x, y = torch.randn(16, 64), torch.randint(3, (16,))
        weights = linear_at(model, 0).weight.detach().clone()
        skipped = 0
        while torch.equal(weights, linear_at(model, 0).weight):
            optimizer.zero_grad()
            loss = 1e4 * nn.functional.cross_entropy(model(x), y)
            # Gradients multiplied by 2^126 overflow float32, and the scaler halves its scale until they are finite.
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped += torch.equal(weights, linear_at(model, 0).weight)
        monitor.flush()
        assert (skipped > 0) == (scale is not None and scale > 1e30)
        assert monitor.latest is not None
        return monitor.latest

    plain = run(None)
    for scaled in (run(2.0**16), run(2.0**126)):
        for site in ("1", "3"):
            for name in ("n", "grad_n", "attenuation", "grad_a_rms", "grad_z_rms", "grad_nonfinite"):
                assert getattr(scaled[site], name) == pytest.approx(getattr(plain[site], name), rel=1e-5), (site, name)
        for mine, theirs in zip(scaled.weights, plain.weights, strict=True):
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
            assert mine.update_ratio == pytest.approx(theirs.update_ratio, rel=1e-4)


def test_a_step_that_raised_does_not_deafen_the_monitor_to_another_optimizer() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")

    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("out of memory")

    model(torch.randn(4, 64)).sum().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        Fails(model.parameters(), lr=0.1).step()
    train(model, 5)
    assert monitor.latest is not None
    assert monitor.latest.step == 4
