"""Warnings of torch and of the user name the line that caused them, also in the steps that are observed."""

import sys
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat


class Warns(nn.Module):
    """A model in whose forward functions of torch warn: from Python, from C++, at several depths, and once per line that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.soft, self.loss = nn.Linear(8, 8), nn.ReLU(), nn.Softmax(), nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.layer(x))
        x = F.softmax(x)
        x = self.soft(x)
        F.mse_loss(x, x[:1])
        self.loss(x, x[:1])
        torch.tensor(x.detach())
        F.dropout2d(x)
        _ = x.grad
        return torch.tanh(x)


def _origins(watched: bool) -> list[tuple[str, str, int]]:
    """The text, file and line of each warning that Python shows at its default, which is once for each line."""
    # Forget what has been shown before.
    for name in (__name__, *(name for name in sys.modules if name.startswith("torch.nn."))):
        vars(sys.modules[name]).pop("__warningregistry__", None)
    shown: list[tuple[str, str, int]] = []

    def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        shown.append((str(message), filename, lineno))

    torch.manual_seed(0)
    model = Warns()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show  # type: ignore[assignment]
        monitor = torchsat.watch(model, budget=None) if watched else None
        for _ in range(6):
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
        if monitor is not None:
            monitor.close()
            assert {"tanh", "softmax", "soft/softmax"} <= set(monitor.coverage.seen)
    return shown


def test_a_warning_names_the_line_that_caused_it_and_is_shown_as_often_as_without_us() -> None:
    bare = _origins(False)
    assert len(bare) == 7
    assert _origins(True) == bare


def test_warnings_that_are_errors_stop_neither_training_nor_monitoring(caplog: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LSTM(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = torchsat.watch(model, every=1, budget=None)
        for _ in range(3):
            model(torch.randn(4, 3, 8))[0].sum().backward()
            optimizer.step()
        monitor.close()
    assert len(monitor.coverage.seen) == 6
    assert caplog.messages == []
