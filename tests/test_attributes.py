"""Attributes of a user's module are read without running code of the user's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torchsat
from tests.truth import known
from torchsat import Activation
from torchsat.attributes import stored, stored_or


class Counts(nn.Module):
    """Counts how often a weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.ran += 1
        return 2 * weight


class Odd(nn.Module):
    shared = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.plain = nn.Parameter(torch.ones(2)), 4
        self.register_buffer("kept", torch.zeros(2))
        self.is_made = True

    @property
    def computed(self) -> float:
        raise RuntimeError("user code has run")

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if self.__dict__.get("is_made"):
            raise RuntimeError("user code has run")
        return super().__getattr__(name)


def test_what_is_stored_is_read_and_what_is_computed_is_not() -> None:
    module = Odd()
    assert (stored(module, "shared"), stored(module, "plain")) == (3, 4)
    assert stored(module, "weight").tolist() == [1, 1]
    assert stored(module, "kept").tolist() == [0, 0]
    with pytest.raises(AttributeError, match=r"Odd\.computed is computed each time that it is read"):
        stored(module, "computed")
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        stored(module, "absent")
    assert stored_or(module, "computed", 5) == 5


def test_an_activation_whose_parameter_is_computed_is_named() -> None:
    """Neither a parametrized PReLU nor a parameter of a user's own activation that is a property is read."""

    class Beta(nn.Module):
        read = 0

        @property
        def beta(self) -> float:
            Beta.read += 1
            return 1.5

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.5 * x)

    counts, row = Counts(), Activation("beta", (Beta,), ("beta",), function=lambda z, beta: z * torch.sigmoid(beta * z))
    model = nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 8), Beta(), nn.Tanh())
    parametrize.register_parametrization(model[1], "weight", counts)
    counts.ran = 0
    monitor = torchsat.watch(model, every=1, budget=None, activations=(*torchsat.ACTIVATIONS, row))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    monitor.close()
    assert (counts.ran, Beta.read) == (3, 0)
    assert monitor.coverage.seen[-1] == "4"
    unseen = dict(monitor.coverage.unseen)
    assert "computed each time that it is read" in unseen["1"]
    assert "computed each time that it is read" in unseen["3"]
    assert known(monitor.latest).step == 2


def test_no_attribute_of_a_model_is_asked_for_in_a_way_that_runs_its_code() -> None:
    """A module that draws a random number where an attribute is missing trains as without us."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def __getattr__(self, name: str) -> Tensor | nn.Module:
            if name not in ("layer", "_modules", "_parameters"):
                torch.rand(1)
            return super().__getattr__(name)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x))

    class Computes(nn.Tanh):
        @property
        def inplace(self) -> bool:
            torch.rand(1)
            return False

    def trained(watched: bool) -> list[float]:
        torch.manual_seed(0)
        model, losses = nn.Sequential(Draws(), nn.Linear(8, 8), Computes()), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = torchsat.watch(model, every=1, budget=None) if watched else None
        for _ in range(3):
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if monitor is not None:
            monitor.close()
            assert monitor.coverage.seen == ("0/relu", "2")
        return [*losses, torch.rand(()).item()]

    assert trained(True) == trained(False)
