"""Activations are told from everything else by the gradients that a backward leaves at their input and output."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchsat.elementwise import Nature, bends, nature

ROWS, WIDTH = 96, 32
Map = Callable[[Tensor], Tensor]
PER_UNIT = torch.linspace(0.4, 2, WIDTH)

ACTIVATIONS: dict[str, Map] = {
    "x erf": lambda z: z * torch.erf(z),
    "swish": lambda z: z * torch.sigmoid(1.3 * z),
    "swish per unit": lambda z: z * torch.sigmoid(PER_UNIT * z),
    "snake per unit": lambda z: z + torch.sin(PER_UNIT * z) ** 2 / PER_UNIT,
    "clamp": lambda z: z.clamp(-1.5, 1.5),
    "prelu per unit": lambda z: torch.where(z > 0, z, 0.4 * PER_UNIT * z),
    "residual": lambda z: z + torch.tanh(z),
    "sine": lambda z: torch.sin(3 * z),
    "square": torch.square,
    "dynamic tanh": lambda z: PER_UNIT * torch.tanh(0.7 * z) + PER_UNIT,
    "noisy": lambda z: torch.tanh(2 * z) + 0.5 * torch.rand_like(z),
}
OTHERS: dict[str, Map] = {
    "rms norm": lambda z: PER_UNIT * z * torch.rsqrt(z.square().mean(-1, keepdim=True)),
    "layer norm": lambda z: F.layer_norm(z, (WIDTH,)),
    "batch norm": lambda z: (z - z.mean(0)) / z.std(0),
    "unit length": lambda z: F.normalize(z, dim=-1),
    "centred": lambda z: z - z.mean(-1, keepdim=True),
    "response norm": lambda z: z + z * z.norm(dim=0) / z.norm(dim=0).mean(),
    "weakest to strongest": lambda z: (z - z.amin(-1, keepdim=True)) / (z.amax(-1, keepdim=True) - z.amin(-1, keepdim=True)),
    "dropout": lambda z: z * (torch.rand_like(z) > 0.1) / 0.9,
    "drop path": lambda z: z * (torch.rand(len(z), 1) > 0.5),
    "softmax": lambda z: torch.softmax(z, -1),
    "log softmax": lambda z: torch.log_softmax(z, -1),
    "cumulative": lambda z: torch.cumsum(torch.tanh(z), -1),
    "convolution": lambda z: torch.tanh(z) + 0.5 * torch.tanh(z.roll(1, -1)),
    "gate": lambda z: z * torch.sigmoid(z.mean(-1, keepdim=True)),
    "capsule": lambda z: z * z.norm(dim=-1, keepdim=True) / (1 + z.square().sum(-1, keepdim=True)),
    "layer scale": lambda z: z * PER_UNIT,
    "shift": lambda z: z + PER_UNIT,
    "gumbel": lambda z: z - torch.log(-torch.log(torch.rand_like(z).clamp(1e-6, 1 - 1e-6))),
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda a: a.square().sum(),
    "fourth powers": lambda a: a.pow(4).sum(),
    "magnitudes": lambda a: a.abs().sum(),
    "random": lambda a: (a * torch.randn_like(a)).sum(),
    "a distance": lambda a: (a - torch.randn_like(a)).square().mean(),
}


def examined(function: Map, loss: Callable[[Tensor], Tensor], dtype: torch.dtype, scale: float = 1.0) -> Nature:
    """What the gradients of one call say. The rows differ in size, as the samples of a batch do."""
    z = (torch.randn(ROWS, WIDTH) * torch.exp(0.5 * torch.randn(ROWS, 1))).to(dtype).requires_grad_()
    a = function(z).to(dtype)
    grad_a, grad_z = (each.flatten() for each in torch.autograd.grad(loss(a) * scale, [a, z]))
    known = torch.isfinite(grad_a) & torch.isfinite(grad_z) & (grad_a != 0)
    units = torch.arange(WIDTH).expand(ROWS, WIDTH).flatten()[known]
    quotient = grad_z[known].double() / grad_a[known].double()
    return nature(z.detach().flatten()[known], a.detach().flatten()[known], quotient, [None, units], torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_found(name: str, loss: str, dtype: torch.dtype) -> None:
    assert examined(ACTIVATIONS[name], LOSSES[loss], dtype) is Nature.ACTIVATION


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_taken_for_one(name: str, loss: str) -> None:
    assert examined(OTHERS[name], LOSSES[loss], torch.float32) is not Nature.ACTIVATION


@pytest.mark.parametrize("scale", [1e-8, 65536.0])
def test_the_size_of_the_gradient_is_of_no_account(scale: float) -> None:
    for name in ("swish", "clamp"):
        assert examined(ACTIVATIONS[name], LOSSES["random"], torch.float32, scale) is Nature.ACTIVATION
    assert examined(OTHERS["layer norm"], LOSSES["random"], torch.float32, scale) is Nature.OTHER


def test_a_constant_slope_is_linear_and_no_slope_is_nothing() -> None:
    assert examined(lambda z: 2 * z, LOSSES["squares"], torch.float32) is Nature.LINEAR
    assert examined(OTHERS["layer scale"], LOSSES["squares"], torch.float32) is Nature.LINEAR
    assert examined(lambda z: 0 * z + 1, LOSSES["squares"], torch.float32) is Nature.UNKNOWN


def test_a_few_elements_tell_nothing() -> None:
    z = torch.linspace(-2, 2, 31)
    assert nature(z, torch.tanh(z), 1 - torch.tanh(z) ** 2, [None], 1e-7) is Nature.UNKNOWN


def test_a_slope_that_is_not_that_of_the_output_is_no_derivative() -> None:
    """Such are the quotients of a norm where the loss makes dL/da a function of z."""
    z = torch.randn(500)
    assert nature(z, z, 1 + z.square(), [None], 1e-7) is Nature.OTHER
    assert nature(z, z + z**3 / 3, 1 + z.square(), [None], 1e-7) is Nature.ACTIVATION


def test_what_may_be_an_activation_shows_in_the_forward_pass() -> None:
    z = torch.randn(ROWS, WIDTH)
    units = torch.arange(WIDTH).expand(ROWS, WIDTH).flatten()

    def seen(function: Map) -> bool:
        return bends(z.flatten(), function(z).flatten(), [None, units])

    assert all(seen(ACTIVATIONS[name]) for name in ACTIVATIONS if name != "noisy")
    assert not any(seen(OTHERS[name]) for name in ("rms norm", "dropout", "drop path", "cumulative", "layer scale", "shift", "gumbel"))
    assert not bends(z.flatten()[:20], torch.tanh(z.flatten()[:20]), [None])
    assert not bends(torch.full((64,), math.nan), torch.full((64,), math.nan), [None])
