"""What a step did beside weight decay, and learning rates of every kind, compared with the closed form in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

import torchsat
from tests.models import linear_at
from tests.truth import known
from torchsat import Alert, Snapshot, Weight

FIRST, MIDDLE, LAST = "0", "2", "4"


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def observed(
    model: nn.Sequential, make: Callable[..., Optimizer], **options: Any
) -> tuple[dict[str, Weight], dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """One observed step: the weights as we see them, and (before, after, gradient) of each in float64."""
    seen: list[Snapshot] = []
    optimizer = make(model.parameters(), **options)
    with torchsat.watch(model, every=1, budget=None, sample=None, sinks=(seen.append,), errors="raise"):
        model(torch.randn(32, 8)).square().mean().backward()
        before = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
        grads = {name: known(parameter.grad).double().clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        after = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    names = (FIRST, MIDDLE, LAST)
    truth = {name: (before[f"{name}.weight"], after[f"{name}.weight"], grads[f"{name}.weight"]) for name in names}
    return {weight.name: weight for weight in seen[0].weights}, truth


DECOUPLED: list[tuple[Callable[..., Optimizer], dict[str, Any]]] = [
    (AdamW, {"lr": 1e-3}),
    (AdamW, {"lr": 1e-3, "weight_decay": 0.3, "foreach": False}),
    (AdamW, {"lr": torch.tensor(1e-2)}),
    (AdamW, {"lr": np.float64(1e-2)}),
    (NAdam, {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
]


@pytest.mark.parametrize(("make", "options"), DECOUPLED)
def test_decoupled_decay_is_subtracted(make: Callable[..., Optimizer], options: dict[str, Any]) -> None:
    weights, truth = observed(deep(), make, **options)
    kept = 1 - float(options["lr"]) * options.get("weight_decay", 1e-2)
    for name, (before, after, _) in truth.items():
        assert weights[name].learned_ratio == pytest.approx(float((after - kept * before).norm() / before.norm()), rel=1e-4)
        assert weights[name].update_ratio == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert weights[name].learning_rate == pytest.approx(float(options["lr"]), rel=1e-7)


@pytest.mark.parametrize(("make", "options"), DECOUPLED)
def test_a_weight_that_only_decays_has_learned_nothing(make: Callable[..., Optimizer], options: dict[str, Any]) -> None:
    model = deep()
    with torch.no_grad():
        linear_at(model, 2).bias.fill_(-1e3)
    weights, truth = observed(model, make, **options)
    for name in (FIRST, MIDDLE):
        assert (weights[name].grad_norm, weights[name].learned_ratio) == (0.0, 0.0)
        before, after, _ = truth[name]
        assert weights[name].update_ratio == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert known(weights[name].update_ratio) > 0


@pytest.mark.parametrize("make", [SGD, Adam])
def test_coupled_decay_leaves_the_gradient_its_part(make: Callable[..., Optimizer]) -> None:
    weights, truth = observed(deep(), make, lr=1e-2, weight_decay=0.1)
    for name, (before, after, grad) in truth.items():
        part = grad.norm() / (grad.square().sum() + 0.01 * before.square().sum()).sqrt()
        assert weights[name].learned_ratio == pytest.approx(float(part * (after - before).norm() / before.norm()), rel=1e-4)


def test_without_decay_all_of_the_step_is_learned() -> None:
    weights, _ = observed(deep(), SGD, lr=0.1)
    assert all(weight.learned_ratio == weight.update_ratio is not None for weight in weights.values())


def test_of_a_foreign_optimizer_only_a_zero_gradient_is_known_to_teach_nothing() -> None:
    class Foreign(Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.99).sub_(0.1 * parameter.grad.sign())

    model = deep()
    with torch.no_grad():
        linear_at(model, 2).bias.fill_(-1e3)
    weights, _ = observed(model, Foreign)
    assert weights[MIDDLE].learned_ratio == 0.0
    assert known(weights[MIDDLE].update_ratio) > 0
    weights, _ = observed(deep(), Foreign)
    assert all(weight.learned_ratio == weight.update_ratio is not None for weight in weights.values())


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SGD, {"lr": 0.1}),
        (AdamW, {"lr": 1e-3}),
        (AdamW, {"lr": torch.tensor(1e-3)}),
        (Adam, {"lr": 1e-3, "weight_decay": 1e-2}),
        (SGD, {"lr": 0.1, "weight_decay": 1e-3, "momentum": 0.9}),
    ],
)
def test_a_layer_without_gradient_is_frozen_whatever_decays(make: Callable[..., Optimizer], options: dict[str, Any]) -> None:
    """The first layer gets a gradient that is 1e-20 of the others, which is below Adam's eps."""

    class Thin(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 1e-20

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
            self.act = nn.ModuleList(nn.Tanh() for _ in range(5))
            self.last = nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            for at, (layer, act) in enumerate(zip(self.layers, self.act, strict=True)):
                x = act(layer(x))
                x = Thin.apply(x) if at == 0 else x  # type: ignore[no-untyped-call]
            out: Tensor = self.last(x)
            return out

    alerts: list[Alert] = []
    model = Net()
    rules = tuple(rule for rule in torchsat.RULES if rule.name == "frozen_weights")
    optimizer = make(model.parameters(), **options)
    with torchsat.watch(model, every=1, budget=None, rules=rules, on_alert=alerts.append, errors="raise"):
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(64, 16)).square().mean().backward()
            optimizer.step()
    assert [(alert.site, alert.rule, alert.firing) for alert in alerts] == [("layers.0", "frozen_weights", True)]
    assert ("without weight decay" in alerts[0].message) == ("weight_decay" in options or make is AdamW)


def test_norms_of_what_is_not_finite_are_infinite() -> None:
    model = deep()
    seen: list[Snapshot] = []
    optimizer = SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, every=1, budget=None, sinks=(seen.append,), errors="raise"):
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(32, 8)).square().mean().backward()
            if step == 1:
                known(linear_at(model, 2).weight.grad)[0, 0] = math.inf
                known(linear_at(model, 4).weight.grad)[0, 0] = math.nan
            optimizer.step()
    first, second, third = ({weight.name: weight for weight in each.weights} for each in seen)
    assert all(math.isfinite(known(weight.grad_norm)) for weight in first.values())
    for name in (MIDDLE, LAST):
        assert (second[name].grad_norm, second[name].update_ratio, second[name].learned_ratio) == (math.inf,) * 3
        assert math.isfinite(known(second[name].norm))
        assert (third[name].norm, third[name].gain) == (math.inf, math.inf)
        assert third[name].update_ratio is None
    assert math.isfinite(known(second[FIRST].grad_norm))
    assert [alert.rule for each in seen for alert in each.alerts] == ["nonfinite"]


def test_a_rate_that_is_no_number_is_unknown() -> None:
    from torchsat.optimizers import decay_of, learning_rate

    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    for given in (None, "1e-3", torch.ones(2), torch.ones((), device="meta")):
        assert learning_rate({"lr": given}) is None
        assert decay_of(optimizer, {"lr": 0.1, "weight_decay": given}) is None
    for given in (np.float32(0.5), np.int64(1), torch.tensor([0.5]), torch.tensor(1, dtype=torch.int32)):
        assert isinstance(learning_rate({"lr": given}), float)
