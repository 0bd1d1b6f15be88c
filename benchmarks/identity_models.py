"""The models of the situations in identity_cases.py: small networks with what a monitor could disturb.

They draw random numbers, have hooks on tensors and modules, checkpoint themselves, and hold modules that no table knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def mlp(act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 1))


class Norm(nn.Module):
    """A normalisation that the user has written, as a module without children."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Own(nn.Module):
    """An activation that no table knows, as a module without children."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.runs = nn.Parameter(torch.ones(16)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + torch.sin(self.alpha * x).square() / self.alpha


class Hooked(nn.Module):
    """A model that keeps a hidden tensor with its gradient, and counts the calls of its tensor hooks, in front of and behind own modules."""

    def __init__(self, leaf: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.leaf, self.head = nn.Linear(8, 16), leaf(), nn.Linear(16, 1)
        self.heard: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x)
        self.hidden.retain_grad()
        self.hidden.register_hook(lambda grad: self.heard.append(float(grad.norm())))
        inside = self.leaf(self.hidden)
        inside.register_hook(lambda grad: self.heard.append(float(grad.norm())))
        out: Tensor = self.head(inside)
        return out


class Recomputing(nn.Module):
    """A module without children that checkpoints its own computation, which has running statistics."""

    mean: Tensor
    var: Tensor

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.runs, self.reentrant = 0, reentrant
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))

    def compute(self, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.tanh(F.dropout(F.batch_norm(x, self.mean, self.var, training=True), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.compute, x, use_reentrant=self.reentrant)
        return out


class Last(nn.Module):
    """The last output of a recurrent layer, and a head."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.rnn, nn.RNNBase):
            hidden = self.rnn(x)[0][-1]
        else:
            hidden = c = torch.zeros(x.shape[1], 8)
            for each in x:
                hidden, c = self.rnn(each, (hidden, c)) if isinstance(self.rnn, nn.LSTMCell) else (self.rnn(each, hidden), c)
        out: Tensor = self.head(hidden)
        return out


class Drop(nn.Module):
    """A parametrization that draws random numbers each time the weight is read."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.5, self.training)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.lstm, self.head = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.rrelu(self.first(x), training=True), 0.1)
        x = self.lstm(self.encoder(x))[0]
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)
        out: Tensor = self.head(F.glu(x + F.gumbel_softmax(x, dim=-1)))
        return out


class Backwards(nn.Module):
    """Module backward hooks of the user's, which change gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.heard = mlp(), list[float]()
        self.net[1].register_full_backward_hook(self._scale)
        self.net[3].register_full_backward_pre_hook(self._double)
        self.net[2].register_forward_hook(lambda module, args, out: out + 0.1)

    def _double(self, module: nn.Module, grad_out: Any) -> Any:
        return tuple(2 * each for each in grad_out)

    def _scale(self, module: nn.Module, grad_in: Any, grad_out: Any) -> Any:
        self.heard.append(float(grad_out[0].norm()))
        return tuple(0.5 * each for each in grad_in)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Array(torch.Tensor):
    """A tensor subclass that holds plain data."""


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.net = nn.Linear(8, 8, dtype=torch.complex64), nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(torch.view_as_real(self.mix(torch.fft.fft(x))).flatten(1))
        return out


class Stochastic(nn.Module):
    """Layers that are skipped at random."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.head = (
            nn.Linear(8, 16),
            nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for each in self.blocks:
            if float(torch.rand(())) < 0.7:
                x = x + each(x)
        out: Tensor = self.head(x)
        return out


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.SiLU(inplace=True))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.body(x).flatten(1)))
        return out
