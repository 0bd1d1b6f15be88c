"""What counts as one step: with one optimizer, with several, without one, with a closure, or with a scaler that skips steps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.models import linear_at, mlp
from tests.training import train
from tests.truth import known
from torchsat.steps import Entry, Steps


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


Sgd = torch.optim.SGD


def first_then_rest(model: nn.Sequential) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    return Sgd(model[0].parameters(), lr=0.01), Sgd(model[2:].parameters(), lr=0.01)


def in_turn(critic_steps: int, generator_first: bool) -> Callable[[nn.Sequential], Iterator[torch.optim.Optimizer]]:
    """One optimizer steps several times for each step of the other."""

    def steps(model: nn.Sequential) -> Iterator[torch.optim.Optimizer]:
        generator, critic = first_then_rest(model)
        for _ in range(12):
            if generator_first:
                yield generator
            for _ in range(critic_steps):
                yield critic
            if not generator_first:
                yield generator

    return steps


def shared(model: nn.Sequential) -> Iterator[torch.optim.Optimizer]:
    """Two optimizers that step the same parameters in turn."""
    pair = Sgd(model.parameters(), lr=0.01), torch.optim.Adam(model.parameters())
    for at in range(24):
        yield pair[at % 2]


def joins_late(model: nn.Sequential) -> Iterator[torch.optim.Optimizer]:
    """The second optimizer is used from step 20 on only."""
    pair = first_then_rest(model)
    for at in range(40):
        yield pair[0]
        if at >= 20:
            yield pair[1]


def retires(model: nn.Sequential) -> Iterator[torch.optim.Optimizer]:
    """The first optimizer is used up to step 20 only."""
    pair = first_then_rest(model)
    for at in range(40):
        if at < 20:
            yield pair[0]
        yield pair[1]


def made_anew(model: nn.Sequential) -> Iterator[torch.optim.Optimizer]:
    """The optimizer is replaced every ten steps."""
    for at in range(40):
        if at % 10 == 0:
            optimizer = Sgd(model.parameters(), lr=0.01)
        yield optimizer


@pytest.mark.parametrize("every", [1, 7, 50])
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        *((in_turn(critic, first), 12 * critic) for critic in (1, 2, 5) for first in (False, True)),
        (shared, 24),
        (joins_late, 40),
        (retires, 40),
        (made_anew, 40),
    ],
)
def test_the_number_of_steps_depends_on_the_order_of_the_optimizers_alone(
    order: Callable[[nn.Sequential], Iterator[torch.optim.Optimizer]], expected: int, every: int
) -> None:
    """In a step no parameter is stepped twice, so that their number is that of the optimizer which steps most often."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    monitor = torchsat.watch(model, every=every, budget=None, errors="raise")
    for optimizer in order(model):
        model(torch.ones(4, 2)).sum().backward()
        optimizer.step()
        model.zero_grad()
    # The last step is counted once it is known to be over.
    assert monitor.state_dict()["step"] in (expected - 1, expected)
    numbers = monitor.state_dict()["step"]
    monitor.close()
    unobserved = Steps(lambda: model)
    assert numbers == rounds(unobserved, order(model))


def rounds(steps: Steps, optimizers: Iterator[torch.optim.Optimizer]) -> int:
    """The number of rounds that are over, counted without a monitor. No gradient is there, so that the first round is over with its first step."""
    count = 0
    for optimizer in optimizers:
        if steps.begins(optimizer) is Entry.NEXT and not steps.is_over:
            steps.end_round()
            count += 1
        steps.ends(optimizer)
        steps.enter(optimizer)
        if steps.is_complete():
            steps.end_round()
            count += 1
    return count


def test_what_is_measured_of_optimizers_in_turn_is_what_each_steps_with() -> None:
    """A discriminator steps twice for each step of the generator, with 8, 8 and 4 rows."""
    model, snapshots = mlp(), list[torchsat.Snapshot]()
    torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
    critic, generator = Sgd(model[0].parameters(), lr=0.1), Sgd(model[2:].parameters(), lr=0.1)
    for _ in range(6):
        for optimizer, rows in ((critic, 8), (critic, 8), (generator, 4)):
            model(torch.randn(rows, 64)).sum().backward()
            optimizer.step()
            model.zero_grad()
    # Once it is known that both take part: a step of the discriminator alone, and one of both.
    measured = [(snapshot.step, snapshot["1"].n // 32) for snapshot in snapshots]
    assert measured[2:] == [(step, 8 if step % 2 == 0 else 12) for step in range(2, 12)]


def test_an_observation_that_is_not_of_every_step_sees_all_passes_of_its_step() -> None:
    model, snapshots = mlp(), list[torchsat.Snapshot]()
    torchsat.watch(model, every=5, budget=None, errors="raise", sinks=(snapshots.append,))
    critic, generator = Sgd(model[0].parameters(), lr=0.1), Sgd(model[2:].parameters(), lr=0.1)
    for _ in range(16):
        for optimizer, rows in ((critic, 8), (critic, 8), (generator, 4)):
            model(torch.randn(rows, 64)).sum().backward()
            optimizer.step()
            model.zero_grad()
    assert {snapshot.step: snapshot["1"].n // 32 for snapshot in snapshots if snapshot.step > 2} == {
        step: 8 if step % 2 == 0 else 12 for step in (4, 5, 8, 10, 15, 16, 20, 25, 30)
    }


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


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_optimizers_that_step_in_the_backward_make_one_step_a_backward(reentrant: bool | None) -> None:
    """One optimizer for each parameter, stepped and zeroed by a hook as soon as the gradient is there; against one optimizer after the backward."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Sigmoid()), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x) if reentrant is None else checkpoint(self.body, x, use_reentrant=reentrant)
            out: Tensor = self.head(h)
            return out

    def run(in_backward: bool) -> list[torchsat.Snapshot]:
        torch.manual_seed(0)
        model, snapshots = Net(), list[torchsat.Snapshot]()
        if in_backward:
            optimizers: dict[Tensor, Sgd] = {parameter: Sgd([parameter], lr=0.1) for parameter in model.parameters()}

            def step(parameter: Tensor) -> None:
                optimizers[parameter].step()
                optimizers[parameter].zero_grad()

            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(step)
        else:
            optimizer = Sgd(model.parameters(), lr=0.1)
        monitor = torchsat.watch(model, every=1, budget=None, errors="raise", sinks=(snapshots.append,))
        for _ in range(5):
            model(torch.randn(32, 8).requires_grad_()).square().mean().backward()
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad()
        monitor.close()
        return snapshots

    plain, inside = run(False), run(True)
    assert [snapshot.step for snapshot in plain] == [snapshot.step for snapshot in inside] == list(range(5))
    for one, other in zip(plain, inside, strict=True):
        for mine, theirs in zip(one.records, other.records, strict=True):
            assert mine.site == theirs.site
            for name in ("n", "grad_n", "attenuation", "grad_a_rms", "grad_z_rms", "saturated"):
                assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-6), (one.step, name)
        for weight, same in zip(one.weights, other.weights, strict=True):
            assert weight.name == same.name
            for name in ("grad_norm", "update_ratio"):
                assert getattr(weight, name) == pytest.approx(getattr(same, name)), (one.step, name)


def test_micro_batches_before_a_step_in_the_backward_all_count() -> None:
    model = mlp()
    optimizers: dict[Tensor, Sgd] = {parameter: Sgd([parameter], lr=0.1) for parameter in model.parameters()}
    accumulates = [True]

    def step(parameter: Tensor) -> None:
        if not accumulates[0]:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    monitor = torchsat.watch(model, every=1, errors="raise")
    for at in range(9):
        accumulates[0] = at % 3 < 2
        model(torch.randn(4, 64)).sum().backward()
    assert known(monitor.latest).step == 2
    assert (known(monitor.latest)["1"].n, known(monitor.latest)["1"].grad_n) == (3 * 4 * 32, 3 * 4 * 32)


def test_a_step_that_raised_takes_no_pass_with_it() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")

    class Fails(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("out of memory")
            super().step()

    optimizer = Fails(model.parameters(), lr=0.1)
    model(torch.randn(100, 64)).sum().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.zero_grad()
    Fails.fails = False
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    monitor.flush()
    assert (known(monitor.latest).step, known(monitor.latest)["1"].n) == (0, 4 * 32)
