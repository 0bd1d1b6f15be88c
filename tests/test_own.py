"""Activations that are modules of the user: they are recognised by the values that they compute, without running them an additional time."""

import copy
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.truth import one_step


class NewGELU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


class QuickGELU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(1.702 * z)


class Squared(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return F.relu(z).square()


class Swish(nn.Module):
    """Swish with one parameter per feature of the last axis."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.linspace(0.5, 2, size))

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.beta * z)


class ChannelSwish(Swish):
    """Swish with one parameter per channel of the second axis."""

    def forward(self, z: Tensor) -> Tensor:
        beta = self.beta.reshape(-1, *[1] * (z.ndim - 2)) if z.ndim > 1 else self.beta
        return z * torch.sigmoid(beta * z)


class Custom(torch.autograd.Function):
    """tanh as a custom autograd function with its own backward and without forward-mode differentiation."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.tanh(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(z) ** 2)


class Fused(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = Custom.apply(z)  # type: ignore[no-untyped-call]
        return out


class Counting(nn.Module):
    """An in-place activation that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z.clamp_(-2, 2)


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, z: Tensor) -> Tensor:
        return z / z.square().mean(-1, keepdim=True).sqrt() * self.weight


class Noise(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z) + torch.rand_like(z)


class Scale(Swish):
    def forward(self, z: Tensor) -> Tensor:
        return z * self.beta


class Two(nn.Module):
    def forward(self, z: Tensor, other: Tensor) -> Tensor:
        return torch.tanh(z) * other


class Snake(nn.Module):
    """The activation of vocoders, whose parameter has three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.linspace(0.5, 2, 6).reshape(1, 6, 1))

    def forward(self, z: Tensor) -> Tensor:
        return z + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * z) ** 2


class Buffered(nn.Module):
    rate: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(1.3))
        self.seen: list[float] = []

    def forward(self, z: Tensor) -> Tensor:
        self.seen.append(float(z.detach().abs().max()) + random.random())
        return torch.sin(self.rate * z)


class DropPath(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.bernoulli(torch.full((len(z), *[1] * (z.ndim - 1)), 0.5))


class Steps(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.cumsum(torch.tanh(z), -1)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (NewGELU(), "gelu"),
        (QuickGELU(), "quick_gelu"),
        (Squared(), "squared_relu"),
        (Fused(), "tanh"),
        (Counting(), "Counting"),
        (Swish(5), "Swish"),
        (ChannelSwish(), "ChannelSwish"),
        (Snake(), "Snake"),
        (Buffered(), "Buffered"),
        (Noise(), "Noise"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_an_activation_of_the_users_own_is_found_from_what_it_does(module: nn.Module, name: str) -> None:
    """The module runs exactly as often as the model calls it: its counters and the random numbers it draws show it."""
    model = nn.Sequential(nn.Conv1d(3, 6, 1), copy.deepcopy(module))
    x = 3 * torch.randn(16, 3, 5)
    random.seed(3)
    snapshot = one_step(model, x=x)
    assert [(record.site, record.activation, record.kind, record.units) for record in snapshot.records] == [("1", name, "module", 6)]
    record = snapshot["1"]
    assert random.random() == (random.seed(3), random.random(), random.random())[isinstance(module, Buffered) + 1]
    own = model[1]
    if isinstance(own, (Counting, Buffered)):
        assert (own.calls if isinstance(own, Counting) else len(own.seen)) == 1
    z = model[0](x).detach().double().requires_grad_()
    torch.manual_seed(0)
    a = copy.deepcopy(module).double()(z.clone())
    (slope,) = torch.autograd.grad(a.sum(), z, retain_graph=True)
    assert record.derivative == pytest.approx(slope.abs().mean().item(), rel=1e-5)
    assert record.derivative_rms == pytest.approx(slope.square().mean().sqrt().item(), rel=1e-5)
    assert record.z_std == pytest.approx(z.std(correction=0).item(), rel=1e-5)
    if not isinstance(module, Noise):
        (grad_z,) = torch.autograd.grad(a.square().sum(), z)
        assert record.grad_z_rms == pytest.approx(grad_z.square().mean().sqrt().item(), rel=1e-5)
    assert (record.saturated is None) == (name[0].isupper() or name == "squared_relu")


@pytest.mark.parametrize("module", [RMSNorm(), Scale(6), DropPath(), Steps(), nn.Dropout()], ids=lambda module: type(module).__name__)
def test_what_is_no_activation_is_no_site(module: nn.Module) -> None:
    snapshot = one_step(nn.Sequential(nn.Linear(3, 6), module, nn.Linear(6, 6), nn.Tanh()), x=torch.randn(32, 3))
    assert [record.site for record in snapshot.records] == (["1/tanh", "3"] if isinstance(module, Steps) else ["3"])


def test_a_module_that_changes_what_it_computes_is_not_taken_for_what_it_was() -> None:
    class Annealed(nn.Module):
        beta = 1.0

        def forward(self, z: Tensor) -> Tensor:
            return torch.tanh(self.beta * z)

    annealed = Annealed()
    model = nn.Sequential(nn.Linear(4, 6), annealed)
    monitor = torchsat.watch(model, every=1, errors="raise")
    x = torch.randn(32, 4)
    seen = []
    for beta in (1.0, 1.0, 10.0, 10.0):
        annealed.beta = beta
        model(x).sum().backward()
        monitor.step()
        monitor.flush()
        assert monitor.latest is not None
        seen.append(monitor.latest["1"])
    z = model[0](x).detach().double()
    assert [record.activation for record in seen] == ["tanh", "tanh", "Annealed", "Annealed"]
    assert seen[1].derivative == pytest.approx((1 - z.tanh() ** 2).mean().item(), rel=1e-5)
    assert seen[2].derivative == seen[3].derivative == pytest.approx((10 * (1 - (10 * z).tanh() ** 2)).mean().item(), rel=1e-5)
    assert (seen[2].peak, seen[2].saturated) == (None, None)


def test_a_function_that_is_called_inside_an_own_activation_is_no_second_site() -> None:
    model = nn.Sequential(nn.Linear(4, 6), NewGELU(), nn.Linear(6, 6), Swish())
    monitor = torchsat.watch(model, every=1, errors="raise")
    for _ in range(3):
        model(torch.randn(32, 4)).sum().backward()
        monitor.step()
        assert monitor.coverage.seen == ("1", "3")
        assert monitor.coverage.unseen == ()


def test_an_own_activation_in_a_checkpoint_is_found_or_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.known, self.other = nn.Linear(4, 6), NewGELU(), Squashed()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(lambda x: self.other(self.known(self.layer(x))), x, use_reentrant=False)
            return out

    class Squashed(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z * torch.erf(z)

    model = Net()
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(32, 4)).sum().backward()
    assert monitor.coverage.seen == ("known",)
    assert [place for place, _ in monitor.coverage.unseen] == ["other"]


def test_learned_parameters_are_read_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 6), Swish())
    monitor = torchsat.watch(model, every=1, errors="raise")
    x = torch.randn(8, 4)
    for beta in (1.0, 0.0):
        model[1].weight = nn.Parameter(torch.full((6,), beta))
        model[3].beta = nn.Parameter(torch.full((6,), beta))
        model(x).sum().backward()
        monitor.step()
    # With beta = 0 it is z / 2.
    assert monitor.latest is not None
    assert monitor.latest["3"].derivative == pytest.approx(0.5)
    assert monitor.latest["1"].derivative == pytest.approx((model[0](x) > 0).double().mean().item())
