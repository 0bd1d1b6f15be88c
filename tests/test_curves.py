"""Peak and tails of functions that no row names, learned from the derivative that gradients show, are those of closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.truth import known
from torchsat.curves import SIDE, Curve, bins_of, edge_of, learn


def gathered(function: Callable[[Tensor], Tensor], z: Tensor, parts: int = 1) -> tuple[Any, Any]:
    curve = Curve()
    for part in z.chunk(parts):
        exact = part.double().requires_grad_()
        (slope,) = torch.autograd.grad(function(exact).sum(), exact)
        curve.add(part, slope.abs().float(), torch.ones_like(part, dtype=torch.bool), 1.0)
    return known(curve.read())


def algebraic(z: Tensor) -> Tensor:
    """z / sqrt(1 + z^2): f' = (1 + z^2)^-1.5, so that the peak is 1 and f' is 0.05 at z^2 = 20^(2/3) - 1."""
    return z / (1 + z * z).sqrt()


EDGE = math.sqrt(20 ** (2 / 3) - 1)
TAILS: list[tuple[Callable[[Tensor], Tensor], float, float | None, float | None]] = [
    (algebraic, 1.0, -EDGE, EDGE),
    (torch.tanh, 1.0, -2.178, 2.178),
    (torch.sigmoid, 0.25, -4.357, 4.357),
    (F.relu, 1.0, 0.0, None),
    (F.gelu, 1.129, -2.2786, None),
    (lambda z: z.clamp(-1, 2), 1.0, -1.0, 2.0),
    (lambda z: F.elu(-z), 1.0, None, 2.996),
    (torch.sin, 1.0, None, None),
    (lambda z: z * torch.erf(z), 1.2572, None, None),
    (lambda z: z + 0.3 * torch.sin(z), 1.3, None, None),
]


@pytest.mark.parametrize("at", range(len(TAILS)))
@pytest.mark.parametrize("std", [2.5, 5.0])
def test_peak_and_tails_are_those_of_the_function(at: int, std: float) -> None:
    function, peak, low, high = TAILS[at]
    found = known(learn(*gathered(function, std * torch.randn(40000)), 0.05))
    assert found.peak == pytest.approx(peak, rel=0.01)
    assert (found.low is None, found.high is None) == (low is None, high is None)
    for edge, expected in ((found.low, low), (found.high, high)):
        assert edge is None or edge == pytest.approx(expected, rel=0.05, abs=0.02)
    z = torch.linspace(-6, 6, 24001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(z).sum(), z)
    weights = torch.exp(-0.5 * z.detach() ** 2)
    assert found.normal_derivative == pytest.approx(((slope.abs() * weights).sum() / weights.sum()).item() / peak, abs=0.01)


@pytest.mark.parametrize("function", [torch.exp, torch.square, lambda z: z**3, torch.cosh, lambda z: F.relu(z).square()])
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_a_slope_that_grows_has_no_peak(function: Callable[[Tensor], Tensor], std: float) -> None:
    assert learn(*gathered(function, std * torch.randn(40000)), 0.05) is None


def test_nothing_is_learned_from_a_little() -> None:
    assert learn(*gathered(torch.tanh, 2 * torch.randn(1000)), 0.05) is None
    # All z lie where the slope is large: the tails exist, but were not seen.
    found = known(learn(*gathered(torch.tanh, 0.5 * torch.randn(10000)), 0.05))
    assert (found.low, found.high) == (None, None)
    # What was seen of the sine ends just behind a zero of its slope.
    found = known(learn(*gathered(torch.sin, 3.24 * torch.rand(20000) - 1.62), 0.05))
    assert (found.low, found.high) == (None, None)


def test_curves_merge() -> None:
    z = 3 * torch.randn(8192)
    whole, parts = gathered(torch.tanh, z), gathered(torch.tanh, z, parts=7)
    assert whole[0] == parts[0]
    assert torch.allclose(torch.tensor(whole[1]), torch.tensor(parts[1]), rtol=1e-9)


def test_every_z_lies_in_its_bin() -> None:
    z = torch.cat([torch.linspace(-20, 20, 9973, dtype=torch.float64), torch.tensor([0.0, -1e9, 1e9, 1e-12, -1e-12], dtype=torch.float64)])
    for value, at in zip(z.tolist(), bins_of(z).tolist(), strict=True):
        assert edge_of(at) - 1e-12 * (1 + abs(value)) <= value or at == 0
        assert value <= edge_of(at + 1) + 1e-12 * (1 + abs(value)) or at == 2 * SIDE - 1


class Algebraic(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return algebraic(z)


@pytest.mark.parametrize("functional", [False, True])
def test_a_function_of_the_users_own_gets_saturated_stuck_and_blocked(functional: bool) -> None:
    """After the first observations, by the tails that were learned, in a module and in a form; the true ones are at +-2.524."""

    def wide(z: Tensor) -> Tensor:
        return torch.where(z > 0, algebraic(z), 1.0 * algebraic(z))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act, self.last = nn.Linear(8, 16), Algebraic(), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            self.a = wide(z) if functional else self.act(z)
            if self.a.requires_grad:
                self.a.retain_grad()
            out: Tensor = self.last(self.a)
            return out

    model = Net()
    with torch.no_grad():
        model.layer.weight.mul_(5)
        model.layer.bias[0] = 60.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    site = "where" if functional else "act"
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(512, 8)
        model(x).square().mean().backward()
        optimizer.step()
        monitor.flush()
        record = known(monitor.latest)[site]
        if step == 0:
            assert (record.tails, record.peak, record.saturated, record.stuck, record.blocked, record.learned) == (
                "unknown",
                None,
                None,
                None,
                None,
                False,
            )
    assert (record.tails, record.learned, record.histogram) == ("both", True, None)
    assert record.peak == pytest.approx(1.0, rel=0.01)
    z, grad = model.layer(x).detach().double(), known(model.a.grad).double()
    side = (z >= EDGE).double() - (z <= -EDGE).double()
    assert record.saturated == pytest.approx(side.abs().mean().item(), abs=0.01)
    assert record.relative_derivative == pytest.approx((1 + z * z).pow(-1.5).mean().item(), rel=0.02)
    assert record.blocked == pytest.approx(((side != 0) * grad.abs()).sum().item() / grad.abs().sum().item(), abs=0.02)
    assert record.trapped == pytest.approx(((side * grad > 0) * grad.abs()).sum().item() / grad.abs().sum().item(), abs=0.02)
    assert record.stuck == 1 / 16
    monitor.close()
