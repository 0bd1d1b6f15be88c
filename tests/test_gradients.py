"""Which passes count, told from what the user's program does with the gradients: the same training gives the same record, however it is written."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.models import Block
from tests.truth import known

Loop = Callable[[nn.Sequential, torch.optim.Optimizer], None]


def batch(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.randn(4, 8)).square().mean()
    return loss


def measured(loop: Loop, act: type[nn.Module] = nn.Tanh, steps: int = 2) -> list[tuple[float, float]]:
    """For each step of a loop, how many passes of four rows its record has, and how many gradients of such passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 1))
    optimizer, snapshots = torch.optim.SGD(model.parameters(), lr=0.01), list[torchsat.Snapshot]()
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise", sinks=(snapshots.append,))
    for _ in range(steps):
        loop(model, optimizer)
    monitor.close()
    assert [snapshot.step for snapshot in snapshots] == list(range(steps))
    return [(snapshot["1"].n / 64, snapshot["1"].grad_n / 64) for snapshot in snapshots]


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    batch(model).backward()
    optimizer.step()


def micro_batches(count: int, each: Callable[[list[nn.Parameter]], object], factor: float = 1.0) -> Loop:
    """Several batches before a step, with something done to the gradients after each. The loss of the first is multiplied by a factor."""

    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for at in range(count):
            (batch(model) * (factor if at == 0 else 1.0)).backward()
            each(list(model.parameters()))
        optimizer.step()

    return loop


def set_by_division(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = known(parameter.grad) / 2


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize(
    ("each", "factor"),
    [
        (lambda parameters: None, 1.0),
        (lambda parameters: None, 0.0),
        (lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-3), 1.0),
        (lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3), 1.0),
        (lambda parameters: [known(each.grad).add_(0.1 * torch.randn_like(each)) for each in parameters], 1.0),
        (set_by_division, 1.0),
    ],
    ids=["plain", "zero_loss", "clip_norm", "clip_value", "noise", "division"],
)
def test_every_micro_batch_counts_whatever_is_done_to_the_gradients_between(each: Callable[..., object], factor: float, count: int) -> None:
    assert measured(micro_batches(count, each, factor)) == [(count, count)] * 2


EMPTIES: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "none": lambda parameters: torch.optim.SGD(parameters).zero_grad(),
    "zero_": lambda parameters: [known(each.grad).zero_() for each in parameters],
    "detach_": lambda parameters: [known(each.grad).detach_().zero_() for each in parameters],
    "fill_": lambda parameters: [known(each.grad).fill_(0) for each in parameters],
    "foreach": lambda parameters: torch._foreach_zero_([known(each.grad) for each in parameters]),
    "times_zero": lambda parameters: [known(each.grad).mul_(0) for each in parameters],
}


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("how", EMPTIES)
def test_batches_whose_gradient_is_emptied_do_not_count_however_it_is_done(how: str, count: int, unused: bool) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        if unused:
            # Parameters that get no gradient, before and behind those that do.
            model.unused = nn.Linear(2, 2)
            model._parameters["first"] = nn.Parameter(torch.ones(1))
            model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
        for _ in range(count):
            batch(model).backward()
            EMPTIES[how]([each for each in model.parameters() if each.grad is not None])
        train(model, optimizer)

    assert measured(loop) == [(1, 1)] * 2


@pytest.mark.parametrize("count", [4, 20])
@pytest.mark.parametrize("how", EMPTIES)
def test_micro_batches_whose_gradients_are_kept_in_a_buffer_all_count(how: str, count: int) -> None:
    """As in training with differential privacy: `.grad` is moved into a buffer after each batch, and set from it before the step."""

    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        buffers = [torch.zeros_like(each) for each in parameters]
        for _ in range(count):
            batch(model).backward()
            torch._foreach_add_(buffers, [known(each.grad) for each in parameters])
            EMPTIES[how](parameters)
        for parameter, buffer in zip(parameters, buffers, strict=True):
            parameter.grad = buffer
        optimizer.step()
        optimizer.zero_grad()

    assert measured(loop) == [(count, count)] * 2


def test_gradients_that_the_user_computes_and_sets_count() -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        parameters = list(model.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(batch(model), parameters), strict=True):
            parameter.grad = grad
        optimizer.step()

    def surgery(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        # One pass, a backward for each task, and what is made of both gradients.
        parameters, out = list(model.parameters()), model(torch.randn(4, 8))
        tasks = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (out.square().mean(), out.abs().mean())]
        for parameter, one, other in zip(parameters, *tasks, strict=True):
            parameter.grad = torch.where(one * other > 0, one + other, 0)
        optimizer.step()

    assert measured(loop) == [(1, 1)] * 2
    assert measured(surgery) == [(1, 2)] * 2


def attack(model: nn.Module, how: str) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    if how == "autograd.grad":
        torch.autograd.grad(model(x).sum(), x)
    elif how == "backward":
        model(x).sum().backward()
    elif how == "inputs":
        model(x).sum().backward(inputs=[x])
    elif how == "frozen":
        model.requires_grad_(False)
        model(x).sum().backward()
        model.requires_grad_(True)
    elif how == "parts":
        assert isinstance(model, nn.Sequential)
        torch.autograd.grad(model[2](model[1](model[0](x))).sum(), x)
    elif how == "curvature":
        grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        torch.autograd.grad(sum((grad.sum() for grad in grads), torch.zeros(())), list(model.parameters()))
    elif how == "raised":
        handle = next(model.parameters()).register_hook(lambda grad: next(iter(())))
        with pytest.raises(StopIteration):
            model(x).sum().backward()
        handle.remove()
    else:
        model(x)


@pytest.mark.parametrize("how", ["autograd.grad", "backward", "inputs", "frozen", "parts", "curvature", "raised", "no backward"])
@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("count", [1, 20])
def test_passes_whose_gradient_does_not_enter_the_step_do_not_count(how: str, act: type[nn.Module], count: int) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(count):
            attack(model, how)
        train(model, optimizer)

    assert measured(loop, act) == [(1, 1)] * 2


def test_parts_that_run_again_are_the_next_pass() -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        model[1](model[0](torch.randn(4, 8)))
        optimizer.zero_grad()
        model[2](model[1](model[0](torch.randn(4, 8)))).square().mean().backward()
        optimizer.step()

    assert measured(loop) == [(1, 1)] * 2


def test_an_episode_with_one_backward_counts_whole() -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        losses = [batch(model) for _ in range(30)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()

    assert measured(loop) == [(30, 30)] * 2


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_a_gradient_that_is_differentiated_again_counts(act: type[nn.Module]) -> None:
    """A backward through the gradient of a ReLU runs through no node of its forward."""

    def penalty(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        x = torch.randn(4, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().mean().backward()
        batch(model).backward()
        optimizer.step()

    def maml(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        loss = torch.func.functional_call(model, parameters, (torch.randn(4, 8),)).square().mean()
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        fast = {name: value - 0.1 * grad for (name, value), grad in zip(parameters.items(), grads, strict=True)}
        optimizer.zero_grad()
        torch.func.functional_call(model, fast, (torch.randn(4, 8),)).square().mean().backward()
        optimizer.step()

    assert [n for n, _ in measured(penalty, act)] == [2, 2]
    assert [n for n, _ in measured(maml, act)] == [2, 2]


@pytest.mark.parametrize("freezes", [False, True])
def test_a_discriminator_is_measured_in_its_own_step_alone(freezes: bool) -> None:
    def run(frozen: bool) -> torchsat.Snapshot:
        torch.manual_seed(0)
        generator, critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        of_generator, of_critic = torch.optim.SGD(generator.parameters(), lr=0.01), torch.optim.SGD(critic.parameters(), lr=0.01)
        monitor = torchsat.watch(critic, every=1, budget=None, errors="raise")
        for _ in range(3):
            fake = generator(torch.randn(4, 4))
            critic.requires_grad_(True)
            of_critic.zero_grad()
            (F.softplus(-critic(torch.randn(4, 8))).mean() + F.softplus(critic(fake.detach())).mean()).backward()
            of_critic.step()
            critic.requires_grad_(not frozen)
            of_generator.zero_grad()
            F.softplus(-critic(fake)).mean().backward()
            of_generator.step()
        monitor.close()
        return known(monitor.latest)

    snapshot, expected = run(freezes), run(False)
    assert (snapshot["1"].n, snapshot["1"].grad_n) == (2 * 64, 2 * 64)
    assert snapshot.records == expected.records


def test_parameters_that_no_optimizer_owns_do_not_keep_a_batch() -> None:
    """The gradients of a trunk that is not trained, but not frozen either, are never emptied."""

    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        head = torch.optim.SGD(model[2].parameters(), lr=0.01)
        batch(model).backward()
        head.zero_grad()
        batch(model).backward()
        head.step()
        head.zero_grad()

    assert measured(loop) == [(1, 1)] * 2


def test_sparse_gradients_are_told_apart_too() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.act = nn.Embedding(10, 4, sparse=True), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(self.words(x))
            return out

    for sets_to_none in (True, False):
        model = Bag()
        monitor = torchsat.watch(model, every=1, errors="raise")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for keeps in (False, True, True):
            model(torch.randint(10, (4,))).sum().backward()
            if not keeps:
                optimizer.zero_grad(set_to_none=sets_to_none)
        optimizer.step()
        assert known(monitor.latest)["act"].n == 2 * 16
        monitor.close()


def test_a_loop_by_hand_with_optimizers_inside_counts_what_each_has_stepped_with() -> None:
    model = Block()
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
        monitor.step()
    # The first step was over with the first of the optimizer's steps; from the first call on, only calls end a step.
    assert known(monitor.latest)["act"].n == 3 * 32
