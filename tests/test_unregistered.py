"""Modules that a model holds where torch does not look, and models that nobody trains, are told of."""

import functools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsat


def layer() -> nn.Linear:
    return nn.Linear(4, 4)


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.known, inside = layer(), layer()
        self.layers: Any = [layer(), [{"a": layer()}]]
        self.heads: Any = {"x": layer(), 3: layer()}
        self.pair: Any = (self.known, layer())
        self.object: Any = SimpleNamespace(net=layer(), nets=[layer()], deeper=SimpleNamespace(net=layer()))
        self.partial: Any = functools.partial(layer(), 1)
        self.closure: Any = lambda x: inside(x)
        self.method: Any = layer().forward
        # What follows is no part of the model, has nothing to learn or has been named.
        self.parents: Any = [self, nn.Sequential(self)]
        self.teacher: Any = [layer().requires_grad_(False)]
        self.functions: Any = [nn.ReLU(), torch.tanh]
        self.again: Any = self.layers
        self.many: Any = list(range(100_000))

    @property
    def trap(self) -> None:
        raise SystemExit


def test_modules_in_plain_containers_are_named() -> None:
    unseen = dict(torchsat.watch(Hiding()).coverage.unseen)
    places = [
        "layers.0",
        "layers.1.0.a",
        "heads.x",
        "heads.3",
        "pair.1",
        "object.net",
        "object.nets.0",
        "partial.func",
        "closure.inside",
        "method.self",
    ]
    assert list(unseen) == places
    tail = "torch does not know it as part of the model"
    assert unseen["layers.0"] == f"a module in a plain Python list: {tail}; put it into an nn.ModuleList, or watch it by itself"
    assert unseen["heads.x"] == f"a module in a plain Python dict: {tail}; put it into an nn.ModuleDict, or watch it by itself"
    assert unseen["partial.func"] == f"a module in a partial: {tail}; make it an attribute of the model, or watch it by itself"
    assert list(dict(torchsat.watch(Hiding(), exclude="*.*").coverage.unseen)) == []


def test_a_module_that_is_put_where_torch_looks_is_no_longer_named() -> None:
    model = Hiding()
    monitor = torchsat.watch(model, every=1, budget=None)
    model.more = nn.ModuleList([model.layers[0], nn.Tanh()])
    model.known(torch.randn(2, 4)).sum().backward()
    monitor.step()
    assert "layers.0" not in dict(monitor.coverage.unseen)


def test_no_code_of_the_users_runs() -> None:
    def leave(*args: Any) -> Any:
        raise SystemExit

    odd = type("Odd", (), {"__slots__": (), "__dict__": property(leave), "__class__": property(leave), "__getattr__": leave})

    class Iterated(list[Any]):
        def __iter__(self) -> Any:
            raise SystemExit

    model = nn.Sequential(layer())
    vars(model).update(odd=odd(), iterated=Iterated([layer()]))
    assert [place for place, _ in torchsat.watch(model).coverage.unseen] == ["iterated.0"]


class Layer(nn.Linear):
    """A layer that trains itself, as in the forward-forward algorithm."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.relu, self.optimizer = nn.ReLU(), torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(super().forward(x))
        return out


class ForwardForward(nn.Module):
    def __init__(self, *known: nn.Module) -> None:
        super().__init__()
        self.layers: Any = [Layer(), Layer()]
        self.known = nn.ModuleList(known)

    def train_layers(self, steps: int) -> None:
        for _ in range(steps):
            for each in self.layers:
                each.optimizer.zero_grad()
                each(torch.randn(4, 8)).square().mean().backward()
                each.optimizer.step()


def test_a_model_without_parameters_that_nobody_trains_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = ForwardForward()
    with caplog.at_level(logging.WARNING, "torchsat"), torchsat.watch(model, errors="raise") as monitor:
        assert caplog.messages == [
            "torchsat: layers.0 and 1 more: a module in a plain Python list: torch does not know it as part of the model; "
            "put it into an nn.ModuleList, or watch it by itself. See monitor.coverage."
        ]
        model.train_layers(20)
    assert caplog.messages[1:] == [
        "torchsat: 8 steps of optimizers were seen, and none of one that owns parameters of ForwardForward: nothing is watched. See monitor.coverage."
    ]
    assert [place for place, _ in monitor.coverage.unseen] == ["layers.0", "layers.1"]


def test_a_model_that_nobody_trains_is_told_of_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    model = ForwardForward(nn.Linear(2, 2))
    with caplog.at_level(logging.WARNING, "torchsat"), torchsat.watch(model, errors="raise"):
        model.train_layers(99)
        assert len(caplog.messages) == 1
        model.train_layers(2)
    assert len(caplog.messages) == 2
    assert "200 steps of optimizers were seen" in caplog.messages[1]


def test_a_model_that_has_been_trained_waits_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    model = ForwardForward(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "torchsat"), torchsat.watch(model, errors="raise"):
        optimizer.step()
        model.train_layers(150)
    assert not any("steps of optimizers" in message for message in caplog.messages)
