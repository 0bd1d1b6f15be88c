"""Small models that several test files use, and two functions that give their parts a type."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(8, 8), act or nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.linear(x))
        return out


def mlp(act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 3))


def linear_at(model: nn.Module, index: int) -> nn.Linear:
    """The linear layer at this index of an nn.Sequential. Raises AssertionError where another module stands there."""
    found = model.get_submodule(str(index))
    assert isinstance(found, nn.Linear)
    return found


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    """The compiled model. torch.compile returns a module for a module, but its annotation says only that it returns a callable."""
    found = torch.compile(model, **options)
    assert isinstance(found, nn.Module)
    return found


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.SiLU(inplace=True))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.body(x.reshape(-1, 1, 8, 8)).flatten(1)))
        return out


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Calling(nn.Module):
    """A linear layer, followed by a function that forward calls directly, without a module around it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(16, 24), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self.layer(x))
        return out


class Double(torch.autograd.Function):
    """A custom function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Everything(nn.Module):
    """A model that uses random numbers, attention, recurrence, and functional activations, in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.rrelu(self.layer(x), training=True), 0.1)
        x = self.encoder(self.lstm(x)[0])
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)
        x = F.glu(x + F.gumbel_softmax(x, dim=-1))
        return F.log_softmax(self.head(F.elu_(x)), -1)


class EverySite(nn.Module):
    """A model with a site of every kind: module, function call, gate, softmax and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.prelu = nn.Linear(64, 32), nn.ReLU(inplace=True), nn.PReLU(8)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 8, bidirectional=True)
        self.cell = nn.GRUCell(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.conv(self.relu(self.first(x)).unflatten(1, (4, 8))))
        x, _ = self.lstm(x.transpose(1, 2))
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
        x = F.glu(torch.cat([x, F.gelu(x)], -1))
        out: Tensor = self.cell(x.softmax(-1).sum(1)).tanh()
        return out
