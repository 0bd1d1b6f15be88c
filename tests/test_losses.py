"""Which function of the loss takes an output is found in the graph, and tells values that are bounded in vain and targets that are out of reach."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.conftest import record
from tests.test_harm import output, rules_of
from torchsat import Record

Loss = Callable[[Tensor], Tensor]
CLASSES, VALUES = torch.tensor([0, 1, 2, 3, 0, 1]), torch.linspace(-2, 2, 24).view(6, 4)


def squared_by_hand(a: Tensor) -> Tensor:
    return ((3 * a - 1 - VALUES) ** 2).sum() / 24


def of_a_categorical(a: Tensor) -> Tensor:
    found: Tensor = torch.distributions.Categorical(logits=a).log_prob(CLASSES)
    return -found.mean()


TAKEN: tuple[tuple[nn.Module, Loss, tuple[str, ...]], ...] = (
    (nn.Softmax(1), lambda a: F.cross_entropy(a, CLASSES), ("log_softmax",)),
    (nn.Softmax(1), lambda a: F.nll_loss(a, CLASSES), ("nll_loss",)),
    (nn.Softmax(1), of_a_categorical, ("sub of several signals", "logsumexp")),
    (nn.Sigmoid(), lambda a: F.cross_entropy(a.view(2, 3, 4).flatten(0, 1), CLASSES), ("log_softmax",)),
    (nn.Sigmoid(), lambda a: F.cross_entropy(a.view(1, 6, 2, 2).permute(0, 2, 1, 3)[:, :, :, 0], CLASSES[None] % 2), ("log_softmax",)),
    (
        nn.Tanh(),
        lambda a: F.binary_cross_entropy_with_logits(a[:, 0].double(), VALUES[:, 0].sigmoid().double()),
        ("binary_cross_entropy_with_logits",),
    ),
    (nn.Sigmoid(), lambda a: -F.logsigmoid(a).mean(), ("logsigmoid",)),
    (nn.Tanh(), lambda a: F.soft_margin_loss(a, VALUES.sign()), ("soft_margin_loss",)),
    (nn.Sigmoid(), lambda a: F.mse_loss(a, VALUES) + F.binary_cross_entropy(a, VALUES.sigmoid()), ("mse_loss", "binary_cross_entropy")),
    (nn.Sigmoid(), lambda a: F.smooth_l1_loss(a.clone()[a > 0.2], VALUES[0, 0].expand(int((a > 0.2).sum()))), ("smooth_l1_loss",)),
    (nn.Tanh(), lambda a: F.huber_loss(a, VALUES), ("huber_loss",)),
    (nn.Tanh(), squared_by_hand, ("square",)),
    # The logits of these two are bounded on purpose: they are scaled before the loss takes them.
    (nn.Tanh(), lambda a: F.cross_entropy(10 * a, CLASSES), ("log_softmax of scaled values",)),
    (nn.Tanh(), lambda a: F.cross_entropy(a / 0.07, CLASSES), ("log_softmax of scaled values",)),
    (nn.Tanh(), lambda a: (a - VALUES).abs().mean(), ("abs of scaled values",)),
    (nn.Tanh(), lambda a: (a**3).mean(), ("pow",)),
    (nn.Softmax(1), lambda a: F.nll_loss(a.log(), CLASSES), ("log",)),
    (nn.Tanh(), lambda a: F.mse_loss(a[:3], a[3:]), ("mse_loss of several signals",)),
    (nn.Tanh(), lambda a: F.mse_loss(a, VALUES) + (a.exp() * a).mean(), ("mse_loss", "mul of several signals", "exp")),
)


def trained(loss: Loss, *modules: nn.Module, gives: bool = False) -> torchsat.Snapshot:
    """The snapshot of one step. `gives`: with gradients that torch.autograd.grad returns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), *modules)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = torchsat.watch(model, every=1, errors="raise")
    found = loss(model(torch.randn(6, 5)))
    if gives:
        for parameter, grad in zip(model.parameters(), torch.autograd.grad(found, list(model.parameters())), strict=True):
            parameter.grad = grad
    else:
        found.backward()
    optimizer.step()
    monitor.close()
    assert monitor.latest is not None
    return monitor.latest


@pytest.mark.parametrize("gives", [False, True])
@pytest.mark.parametrize(("module", "loss", "names"), TAKEN, ids=range(len(TAKEN)))
def test_the_functions_of_a_loss_that_take_an_output_are_named(module: nn.Module, loss: Loss, names: tuple[str, ...], gives: bool) -> None:
    hidden, last = trained(loss, module, gives=gives).records
    assert (hidden.losses, last.losses) == ((), names)


def test_a_loss_that_the_model_computes_itself_is_found() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.head(x).softmax(-1)
            return {"loss": F.cross_entropy(logits, CLASSES), "logits": logits}

    model = Own()
    monitor = torchsat.watch(model, every=1, errors="raise")
    model(torch.randn(6, 5))["loss"].backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    monitor.close()
    assert monitor.latest is not None
    assert [(each.output, each.losses) for each in monitor.latest.records] == [(True, ("log_softmax",))]
    assert [(each.rule, each.causes[0].name) for each in monitor.alerts] == [("bounded_logits", "activation_choice")]


def test_what_another_network_makes_of_an_output_is_no_loss_of_it() -> None:
    critic = nn.Linear(4, 1)
    assert trained(lambda a: (critic(a) ** 2).mean(), nn.Tanh())["3"].losses == ("addmm of several signals",)


def bounded(losses: tuple[str, ...], low: float, high: float, **given: Any) -> Record:
    return record(site="out", output=True, units=10, losses=losses, a_min=low, a_max=high, **given)


def test_values_that_differ_by_less_than_4_are_told_where_the_loss_takes_them_for_logits() -> None:
    """tanh gives values from -1 to 1, and 1.7159 tanh(2 z / 3) from -1.7159 to 1.7159."""
    tanh = bounded(("log_softmax",), -0.999, 0.998)
    assert rules_of([tanh]) == [("bounded_logits", 0)]
    assert rules_of([replace(tanh, a_min=-1.7, a_max=1.7)]) == [("bounded_logits", 0)]
    assert rules_of([replace(tanh, a_min=-5.0, a_max=5.0)]) == []
    for losses in ((), ("mse_loss",), ("binary_cross_entropy",)):
        assert rules_of([replace(tanh, losses=losses)]) == []
    assert rules_of([replace(tanh, output=False)]) == []
    assert rules_of([replace(tanh, tails="low", activation="relu")]) == []


def test_an_output_is_asked_beyond_its_range_where_the_gradient_of_a_square_does_not_fall() -> None:
    """At an output with plateaus on both sides, half of whose demand is blocked, and nearly nothing of it trapped."""
    start = output(saturated=0.0, low=0.0, high=0.0, blocked=0.0, trapped=0.0, leaving=0.0, grad_a_rms=1.0, losses=("mse_loss",))
    asked = replace(start, saturated=0.4, low=0.2, high=0.2, blocked=0.5, trapped=0.02, grad_a_rms=0.7)

    def told(last: Record) -> list[tuple[str, int]]:
        return rules_of([start] * 10 + [last] * 4)

    assert told(asked) == [("saturated", 120)]
    assert told(replace(asked, losses=("huber_loss",))) == [("saturated", 120)]
    assert told(replace(asked, grad_a_rms=0.2)) == []
    assert told(replace(asked, blocked=0.11)) == []
    # A critic, or a cross-entropy of probabilities, asks for more where the output is right.
    assert told(replace(asked, losses=("mse_loss", "addmm"))) == []
    assert told(replace(asked, losses=())) == told(replace(asked, losses=("binary_cross_entropy",))) == []


@pytest.mark.parametrize(("module", "loss"), [(nn.Softmax(1), F.cross_entropy), (nn.Sigmoid(), F.cross_entropy), (nn.Tanh(), F.cross_entropy)])
def test_the_remedy_of_bounded_logits_is_code_that_leaves_the_output_linear(module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), module)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torchsat.watch(model, every=1, errors="raise") as monitor:
        loss(model(torch.randn(6, 5)), CLASSES).backward()
        optimizer.step()
    (alert,) = monitor.alerts
    (cause,) = alert.causes
    assert monitor.latest is not None
    last = monitor.latest.records[-1]
    assert alert.step == 0
    assert f"between {last.a_min:.3g} and {last.a_max:.3g}" in cause.evidence
    assert cause.code is not None
    exec(cause.code, {"model": model, "nn": nn})
    assert isinstance(model[3], nn.Identity)
