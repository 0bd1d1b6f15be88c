"""The trainings of remedies.py: for each remedy that an alert prints, trainings with the fault that it is for.

Their data are the handwritten digits that ship with scikit-learn, or numbers drawn from a seed. The pixels are divided by their largest value and
standardised where a training does not have its inputs for a fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


@dataclass
class Task:
    """A training from its beginning. What a remedy can replace are the model's parts, the optimizer's settings and `x`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    """The inputs of the training set."""
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    steps: int = 150
    batch: int = 64


@dataclass(frozen=True)
class Case:
    """A training with a fault."""

    name: str
    causes: tuple[str, ...]
    """The causes that are right for it."""
    make: Callable[[], Task]


def digits(scale: float = 1.0, offset: float = 0.0, raw: bool = False) -> tuple[Tensor, Tensor]:
    """The digits as they ship, from 0 to 16, or standardised, times a scale and shifted."""
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = pixels.float()
    if not raw:
        x = ((x - x.mean(0)) / (x.std(0) + 1e-3)).clamp(-5, 5)
    return scale * x + offset, labels


def stack(activation: Callable[[], nn.Module], depth: int = 4, width: int = 64, gain: float | None = None, bias: float = 0.0) -> nn.Sequential:
    """Hidden layers of one width. `gain`: rms(W) sqrt(fan_in) of each; None: that of Xavier or, for ReLU, of He."""
    model = nn.Sequential()
    for _ in range(depth):
        layer = nn.Linear(width, width)
        wanted = math.sqrt(2) if activation is nn.ReLU else 1.0
        nn.init.normal_(layer.weight, std=(gain or wanted) / math.sqrt(width))
        nn.init.constant_(layer.bias, bias)
        model.extend((layer, activation()))
    return model.append(nn.Linear(width, 10))


def sgd(model: nn.Module, rate: float = 0.05, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate, **more)


def adam(model: nn.Module, rate: float = 1e-3, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate, **{"weight_decay": 0.0, **more})


def task(model: nn.Module, data: tuple[Tensor, Tensor], make: Callable[..., torch.optim.Optimizer] = sgd, rate: float = 0.05, **more: Any) -> Task:
    return Task(model, make(model, rate, **more), *data)


class Rows(nn.Module):
    """A recurrent network that reads the rows of an image."""

    def __init__(self, kind: Callable[..., nn.RNNBase], gain: float = 1.0) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 48, batch_first=True), nn.Linear(48, 10)
        with torch.no_grad():
            for name, parameter in self.rnn.named_parameters():
                if "weight" in name:
                    parameter.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(-1, 8, 8))[0][:, -1])  # type: ignore[no-any-return]


class Attending(nn.Module):
    """Attention over the rows of an image. `amount`: how many times too large its query and key weights are."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, 32), nn.Parameter(0.5 * torch.randn(8, 32))
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 10)
        with torch.no_grad():
            self.attention.in_proj_weight[:64] *= amount

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.reshape(-1, 8, 8)) + self.position
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))  # type: ignore[no-any-return]


def convolutions(gain: float) -> nn.Sequential:
    """Six convolutions with tanh. `gain`: how many times too large their weights are."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for before in (1, 16, 16, 16, 16, 16):
        layer = nn.Conv2d(before, 16, 3, padding=1)
        nn.init.xavier_normal_(layer.weight)
        with torch.no_grad():
            layer.weight *= gain
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 10))


def thousands() -> tuple[Tensor, Tensor]:
    """Sound features, and one that is counted in thousands."""
    x, y = digits()
    return torch.cat([x[:, :63], 3000 + 1000 * torch.randn(len(x), 1)], 1), y


def broken() -> tuple[Tensor, Tensor]:
    x, y = digits()
    x[::50, 10] = math.nan
    x[7, 3] = math.inf
    return x, y


def beyond_range() -> Task:
    """Targets from 3 to 103 for an output that ends at 1."""
    x, _ = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
    y = 53 + 16 * x[:, :8].mean(1, keepdim=True).clamp(-3, 3)
    return Task(model, torch.optim.Adam(model.parameters(), 1e-2), x, y, nn.functional.mse_loss)


def each_by_itself(logits: Tensor, y: Tensor) -> Tensor:
    """The loss of ten classifiers, each of which says whether an image shows its digit."""
    return nn.functional.binary_cross_entropy_with_logits(logits, nn.functional.one_hot(y, 10).float())


def ended_by(last: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy) -> Task:
    """A classifier that ends in an activation."""
    x, y = digits()
    found = task(stack(nn.ReLU, 2).append(last), (x, y))
    found.loss = loss
    return found


def negative_targets(last: nn.Module) -> Task:
    """Standardised targets for an output that gives values from 0 to 1, or from -1 to 1."""
    x, _ = digits()
    y = x[:, 20:36].reshape(-1, 4, 4).mean(2)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4), last)
    return Task(model, torch.optim.Adam(model.parameters(), 1e-2), x, y / y.std(), nn.functional.mse_loss)


def decayed_norms() -> Task:
    """Two groups of AdamW that have been exchanged: the weights of the norms decay, and the matrices do not."""
    model = nn.Sequential()
    for _ in range(3):
        model.extend((nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()))
    model.append(nn.Linear(64, 10))
    matrices, others = ([each for each in model.parameters() if (each.dim() > 1) is which] for which in (True, False))
    groups = [{"params": others, "weight_decay": 30.0}, {"params": matrices, "weight_decay": 0.0}]
    return Task(model, torch.optim.AdamW(groups, 3e-3), *digits())


CASES: tuple[Case, ...] = (
    Case("tanh, inputs shifted by 20", ("inputs_uncentred",), lambda: task(stack(nn.Tanh), digits(offset=20))),
    Case("relu, inputs shifted by 20", ("inputs_uncentred",), lambda: task(stack(nn.ReLU), digits(offset=20))),
    Case("tanh, inputs 50 times too large", ("inputs_unscaled",), lambda: task(stack(nn.Tanh), digits(50))),
    Case("tanh, raw pixels", ("inputs_unscaled", "inputs_uncentred"), lambda: task(stack(nn.Tanh), digits(raw=True))),
    Case("sigmoid, raw pixels from 0 to 255", ("inputs_unscaled",), lambda: task(stack(nn.Sigmoid, 2), digits(16, raw=True), adam, 3e-3)),
    Case("relu, raw pixels from 0 to 255", ("inputs_unscaled", "inputs_uncentred"), lambda: task(stack(nn.ReLU), digits(16, raw=True))),
    Case("relu, a feature in thousands", ("inputs_unscaled", "inputs_uncentred"), lambda: task(stack(nn.ReLU), thousands())),
    Case("tanh, a feature in thousands", ("inputs_unscaled", "inputs_uncentred"), lambda: task(stack(nn.Tanh), thousands())),
    Case("gru, inputs 100 times too large", ("inputs_unscaled",), lambda: task(Rows(nn.GRU), digits(100), adam, 3e-3)),
    Case("tanh, weights from N(0, 1)", ("init_too_large",), lambda: task(stack(nn.Tanh, gain=8.0), digits())),
    Case("tanh, weights from N(0, 1), raw pixels", ("init_too_large", "inputs_unscaled"), lambda: task(stack(nn.Tanh, gain=8.0), digits(raw=True))),
    Case("sigmoid, weights from N(0, 1)", ("init_too_large",), lambda: task(stack(nn.Sigmoid, gain=20.0), digits())),
    Case("relu, weights 10 times too large", ("init_too_large",), lambda: task(stack(nn.ReLU, 6, gain=14.0), digits(), rate=0.01)),
    Case("convolutions with tanh, weights 20 times too large", ("init_too_large",), lambda: task(convolutions(20.0), digits())),
    Case("lstm, weights 20 times too large", ("init_too_large",), lambda: task(Rows(nn.LSTM, 20.0), digits(), adam, 3e-3)),
    Case("tanh, weights 4 times too large", ("init_too_large",), lambda: task(stack(nn.Tanh, gain=4.0), digits())),
    Case("tanh, biases of 8", ("init_too_large",), lambda: task(stack(nn.Tanh, bias=8.0), digits())),
    Case("relu, biases of -10", ("dead_units",), lambda: task(stack(nn.ReLU, bias=-10.0), digits())),
    Case("tanh, Adam at a rate of 0.3", ("weight_growth",), lambda: task(stack(nn.Tanh), digits(), adam, 0.3)),
    Case("relu, Adam at a rate of 1", ("weight_growth",), lambda: task(stack(nn.ReLU), digits(), adam, 1.0)),
    Case("relu, SGD at a rate of 2", ("weight_growth",), lambda: task(stack(nn.ReLU), digits(), rate=2.0)),
    Case("tanh, Adam at a rate of 0.05", ("weight_growth",), lambda: task(stack(nn.Tanh), digits(), adam, 0.05)),
    Case("relu, Adam at a rate of 0.1", ("weight_growth",), lambda: task(stack(nn.ReLU), digits(), adam, 0.1)),
    Case("relu, Adam at a rate of 0.3", ("weight_growth",), lambda: task(stack(nn.ReLU), digits(), adam, 0.3)),
    Case("tanh, SGD at a rate of 3", ("weight_growth",), lambda: task(stack(nn.Tanh), digits(), rate=3.0)),
    Case("attention, Adam at a rate of 0.3", ("softmax_logits", "weight_growth"), lambda: task(Attending(1.0), digits(), adam, 0.3)),
    Case("tanh, SGD at a rate of 10", ("weight_growth",), lambda: task(stack(nn.Tanh), digits(), rate=10.0)),
    Case("tanh, momentum of 0.99 at a rate of 1", ("weight_growth",), lambda: task(stack(nn.Tanh), digits(), rate=1.0, momentum=0.99)),
    Case("lstm, Adam at a rate of 0.3", ("weight_growth",), lambda: task(Rows(nn.LSTM), digits(), adam, 0.3)),
    Case("rnn, Adam at a rate of 0.3", ("weight_growth",), lambda: task(Rows(nn.RNN), digits(), adam, 0.3)),
    Case("12 sigmoids", ("activation_choice",), lambda: task(stack(nn.Sigmoid, 12), digits())),
    Case("5 sigmoids", ("activation_choice",), lambda: task(stack(nn.Sigmoid, 5), digits())),
    Case("a sigmoid for targets from 3 to 103", ("activation_choice",), beyond_range),
    Case("a sigmoid for standardised targets", ("activation_choice",), lambda: negative_targets(nn.Sigmoid())),
    Case("a tanh for standardised targets", ("activation_choice",), lambda: negative_targets(nn.Tanh())),
    Case("a softmax before cross_entropy", ("activation_choice",), lambda: ended_by(nn.Softmax(1))),
    Case("a softmax before nll_loss", ("activation_choice",), lambda: ended_by(nn.Softmax(1), nn.functional.nll_loss)),
    Case("a tanh before cross_entropy", ("activation_choice",), lambda: ended_by(nn.Tanh())),
    Case("a sigmoid before a sigmoid", ("activation_choice",), lambda: ended_by(nn.Sigmoid(), each_by_itself)),
    Case("tanh, weights 4 times too small", ("init_too_small",), lambda: task(stack(nn.Tanh, 10, gain=0.25), digits())),
    Case("relu, weights of 0.01", ("init_too_small",), lambda: task(stack(nn.ReLU, 6, gain=0.08), digits())),
    Case("inf and nan in the inputs", ("numeric_range",), lambda: task(stack(nn.Tanh), broken())),
    Case("attention, logits too large", ("softmax_logits",), lambda: task(Attending(30.0), digits(), adam, 3e-3)),
    Case("tanh, weight decay of 30", ("weight_decay",), lambda: task(stack(nn.Tanh, 6), digits(), adam, 3e-3, weight_decay=30.0)),
    Case("relu, SGD with weight decay of 0.3", ("weight_decay",), lambda: task(stack(nn.ReLU, 6), digits(), sgd, 0.05, weight_decay=0.3)),
    Case("norms with a weight decay of 30", ("weight_decay",), decayed_norms),
    Case("relu, SGD with weight decay of 1", ("weight_decay",), lambda: task(stack(nn.ReLU, 6), digits(), sgd, 0.05, weight_decay=1.0)),
)
