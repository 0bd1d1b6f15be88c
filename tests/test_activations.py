"""Derivatives are tested against autograd, peaks and tails against the search on a grid, and rows of the user's own against closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.truth import known
from torchsat import ACTIVATIONS, Activation
from torchsat.activations import bind, bind_plain
from torchsat.functions import CURVES, EXPONENTIAL, FUNCTIONS, POWER, QUOTIENT
from torchsat.recognise import Recognition, differs, recognise

MODULES = [
    nn.Sigmoid(),
    nn.Tanh(),
    nn.ReLU(),
    nn.ReLU6(),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.3),
    nn.LeakyReLU(2.0),
    nn.PReLU(),
    nn.PReLU(init=-1.5),
    nn.RReLU().eval(),
    nn.RReLU(0.2, 0.6).eval(),
    nn.ELU(),
    nn.ELU(2.5),
    nn.ELU(0.02),
    nn.SELU(),
    nn.CELU(),
    nn.CELU(0.25),  # 1 over 0.3 is a float32 in torch: 4e-8 off
    nn.CELU(4.0),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Softplus(),
    nn.Softplus(3.0, 5.0),
    nn.Softsign(),
    nn.Hardtanh(),
    nn.Hardtanh(-0.5, 2.0),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.LogSigmoid(),
    nn.Tanhshrink(),
    nn.Softshrink(),
    nn.Softshrink(1.5),
    nn.Hardshrink(),
    nn.Hardshrink(2.0),
    nn.Threshold(0.7, -3.0),
]


def row(module: nn.Module) -> Activation:
    return next(row for row in ACTIVATIONS if row.computes(module))


def derivative(module: nn.Module, z: torch.Tensor) -> torch.Tensor:
    bound = bind(row(module), module, 0.05)
    given = {**bound.plain, **{name: value.to(z) for name, value in bound.learned.items()}}
    return bound.derivative(z, **given, **({"a": module(z).detach()} if row(module).from_output else {})).detach()


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_the_derivative_is_that_of_autograd(module: nn.Module) -> None:
    # The kinks of hard functions are on this grid: -3, -2, -1, 0, 0.5, 0.7, 1, 2, 3, 6.
    z = torch.linspace(-30, 30, 600_001, dtype=torch.float64).mul(1e4).round().div(1e4).requires_grad_()
    module = module.double()
    (truth,) = torch.autograd.grad(module(z).sum(), z)
    # Hardsigmoid of torch multiplies by 1/6 in float32.
    tolerance = 1e-8 if isinstance(module, nn.Hardsigmoid) else 1e-12
    error = (derivative(module, z.detach()) - truth).abs()
    if isinstance(module, nn.Hardswish):
        # On the kink itself torch takes the inner slope. Both values are subgradients.
        error = error[(z.detach().abs() - 3).abs() > 1e-9]
    assert error.max() <= tolerance


@pytest.mark.parametrize("module", MODULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_derivative_is_finite_and_within_its_peak_over_the_whole_range(module: nn.Module, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    z = torch.cat([torch.linspace(-40, 40, 8001), torch.logspace(1, math.log10(most) - 0.01, 200)]).to(dtype).float()
    z = torch.cat([z, -z])
    module = module.float()
    slope = derivative(module, z).abs()
    bound = bind(row(module), module, 0.05)
    peak = bound.evaluate(z, module(z).detach(), bound.learned)[1]
    assert torch.isfinite(slope).all()
    assert peak is not None
    assert slope.max() <= float(peak) * (1 + 1e-6)


def test_the_derivative_survives_where_the_output_has_rounded_to_one() -> None:
    # bfloat16 sigmoid is 1 from z = 6.25 on; f'(6.25) = 0.001925..., the product form in float32.
    z = torch.tensor([6.25], dtype=torch.bfloat16)
    assert torch.sigmoid(z).item() == 1.0
    expected = math.exp(-6.25) / (1 + math.exp(-6.25)) ** 2
    assert derivative(nn.Sigmoid(), z.float()).item() == pytest.approx(expected, rel=1e-6)


# sup|f'| and the edges of the tails at epsilon 0.05, by closed forms that were checked in float64.
PUBLISHED = {
    "Sigmoid()": (0.25, -4.35654, 4.35654),
    "Tanh()": (1, -2.17827, 2.17827),
    "ReLU()": (1, 0, None),
    "ReLU6()": (1, 0, 6),
    "LeakyReLU(negative_slope=0.01)": (1, None, None),
    "ELU(alpha=1.0)": (1, -2.99573, None),
    "CELU(alpha=4.0)": (1, -2.99573 * 4, None),
    "SELU()": (1.758099, -2.99573, None),
    "GELU(approximate='none')": (1.12890415, -2.2786, None),
    "GELU(approximate='tanh')": (1.12899307, -2.2857, None),
    "SiLU()": (1.09983932, -3.9299, None),
    "Mish()": (1.08849816, -3.9813, None),
    "Softplus(beta=1.0, threshold=20.0)": (1, -2.94444, None),
    "Softsign()": (1, -3.47214, 3.47214),
    "Hardtanh(min_val=-1.0, max_val=1.0)": (1, -1, 1),
    "Hardsigmoid()": (1 / 6, -3, 3),
    "Hardswish()": (1.5, -3, None),
    "LogSigmoid()": (1, None, 2.94444),
    "Tanhshrink()": (1, None, None),
    "Softshrink(0.5)": (1, None, None),
    "Hardshrink(0.5)": (1, None, None),
    "Threshold(threshold=0.7, value=-3.0)": (1, 0.7, None),
}


@pytest.mark.parametrize("module", [module for module in MODULES if repr(module) in PUBLISHED], ids=repr)
def test_peak_and_tails_are_the_published_ones(module: nn.Module) -> None:
    constants = bind(row(module), module, 0.05).constants
    assert constants is not None
    peak, low, high = PUBLISHED[repr(module)]
    assert constants.peak == pytest.approx(peak, rel=1e-6)
    for found, expected in ((constants.low, low), (constants.high, high)):
        assert (found is None) == (expected is None)
        assert found is None or found == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("module", [m for m in MODULES if not isinstance(m, (nn.PReLU, nn.RReLU))], ids=repr)
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.3])
def test_every_row_agrees_with_the_search_on_a_grid(module: nn.Module, epsilon: float) -> None:
    """The numeric search, which serves the user's rows, and the closed forms of the table give the same peaks and tails."""
    bare = Activation("bare", (type(module),), row(module).parameters, row(module).derivative)
    found, closed = bind(bare, module, epsilon).constants, bind(row(module), module, epsilon).constants
    assert found is not None
    assert closed is not None
    assert found.peak == pytest.approx(closed.peak, rel=1e-3 if isinstance(module, nn.Hardswish) else 1e-7)
    if isinstance(module, (nn.LeakyReLU,)) and module.negative_slope < epsilon:
        assert found.low == pytest.approx(0, abs=3e-3)  # judged by |f'| alone its left side is flat, but the row says that it never is
        assert closed.low is None
        return
    for a, b in ((found.low, closed.low), (found.high, closed.high)):
        assert (a is None) == (b is None)
        assert a is None or a == pytest.approx(b, abs=3e-3)


def test_what_normal_inputs_give() -> None:
    """The expected numbers were computed by quadrature: E|f'| / peak and the share of z ~ N(0, 1) in the tails at epsilon 0.05."""
    tanh, sigmoid, hardtanh, gelu, relu = (
        known(bind(row(module), module, 0.05).constants) for module in (nn.Tanh(), nn.Sigmoid(), nn.Hardtanh(), nn.GELU(), nn.ReLU())
    )
    assert tanh.normal_derivative == pytest.approx(0.605706, abs=1e-6)
    assert tanh.normal_low + tanh.normal_high == pytest.approx(0.029386, abs=1e-6)
    assert sigmoid.normal_derivative == pytest.approx(0.206621 / 0.25, abs=4e-6)
    assert hardtanh.normal_derivative == pytest.approx(0.682689, abs=1e-6)
    assert hardtanh.normal_low + hardtanh.normal_high == pytest.approx(0.317311, abs=1e-6)
    assert gelu.normal_low == pytest.approx(0.0113, abs=1e-4)  # Phi(-2.2786): the dip of f' near -0.75 is no tail
    assert relu.normal_derivative == pytest.approx(0.5, abs=1e-9)
    assert relu.normal_low == 0.5


def test_every_elementwise_activation_of_torch_has_one_row() -> None:
    not_elementwise = {"GLU", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax"}
    classes = [getattr(nn.modules.activation, name) for name in nn.modules.activation.__all__ if name not in not_elementwise]
    known = {module for row in ACTIVATIONS for module in row.modules}
    assert {kind.__name__ for kind in classes} == {kind.__name__ for kind in known}
    assert len({row.name for row in ACTIVATIONS}) == len(ACTIVATIONS)


def test_a_subclass_counts_as_long_as_it_computes_the_same() -> None:
    class Named(nn.Tanh):
        pass

    class Other(nn.Tanh):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z

    assert row(Named()).name == "tanh"
    assert not any(each.computes(Other()) for each in ACTIVATIONS)


class Snake(nn.Module):
    """x + sin(x)^2: f' = 1 + sin(2x), peak 2, no tail."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.sin(x) ** 2


class Arctan(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.atan(x * self.scale)


def test_a_row_without_a_derivative_is_differentiated() -> None:
    z = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    bound = bind(Activation("snake", (Snake,)), Snake(), 0.05)
    assert torch.allclose(bound.derivative(z), 1 + torch.sin(2 * z), atol=1e-12)
    assert known(bound.constants).peak == pytest.approx(2, rel=1e-6)
    # f' = s / (1 + (s z)^2): peak s, and at 5 % of it (s z)^2 = 19.
    arctan = known(bind(Activation("arctan", (Arctan,)), Arctan(2.0), 0.05).constants)
    assert arctan.peak == pytest.approx(2.0, rel=1e-9)
    assert arctan.low == pytest.approx(-math.sqrt(19) / 2, rel=1e-9)
    assert arctan.high == pytest.approx(math.sqrt(19) / 2, rel=1e-9)


def test_a_function_and_its_parameters_can_be_given() -> None:
    row = Activation("arctan", (Arctan,), parameters=("scale",), function=lambda x, scale: torch.atan(scale * x))
    z = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert torch.allclose(bind(row, Arctan(3.0), 0.05).derivative(z, scale=3.0), 3 / (1 + 9 * z * z), atol=1e-12)


def test_a_function_without_bound_has_no_peak() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    constants = known(bind(Activation("square", (Square,)), Square(), 0.05).constants)
    assert constants.peak is None
    assert constants.low is constants.high is constants.normal_derivative is None


class _Softmax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)


class _Roll(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.roll(1, -1))


class _Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + torch.rand_like(x)


class _Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[: len(x) // 2]


class _Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("module", "fact"),
    [
        (_Softmax(), "depends on other elements"),
        (_Roll(), "depends on other elements"),
        (_Noise(), "it draws random numbers"),
        (_Halves(), r"64 numbers become \(32,\)"),
        (_Channels(), "failed: RuntimeError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_elementwise_is_refused_with_the_fact_and_the_cure(module: nn.Module, fact: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"(?s)activation 'odd': .*{fact}.*give `derivative=`"):
        bind(Activation("odd", (type(module),)), module, 0.05)
    assert torch.equal(state, torch.get_rng_state())


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"'snake' names the parameters \('alpha',\), but Snake lacks one"):
        bind(Activation("snake", (Snake,), parameters=("alpha",)), Snake(), 0.05)


KNOWN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, object]]] = {
    "gelu": (lambda z: 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0)))), {"approximate": "tanh"}),
    "silu": (lambda z: z / (1 + torch.exp(-z)), {}),
    "relu": (lambda z: z * (z > 0), {}),
    "softsign": (lambda z: z / (1 + z.abs()), {}),
    "quick_gelu": (lambda z: z * torch.sigmoid(1.702 * z), {}),
    "squared_relu": (lambda z: F.relu(z).square(), {}),
    "hardtanh": (lambda z: z.clamp(-1, 1), {"min_val": -1.0, "max_val": 1.0}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN)
def test_a_function_written_by_hand_is_known_by_its_numbers(name: str, dtype: torch.dtype) -> None:
    function, plain = KNOWN[name]
    z = (2 * torch.randn(500)).to(dtype)
    bound = recognise(z.to(torch.float32 if dtype != torch.float64 else dtype), function(z.double()).to(dtype), ACTIVATIONS, 0.05).bound
    assert bound is not None
    if name != "gelu" or dtype != torch.bfloat16:
        # In bfloat16 the two forms of GELU give the same numbers.
        assert (bound.activation.name, bound.plain) == (name, plain)
    exact = torch.linspace(-6, 6, 997, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(exact).sum(), exact)
    assert torch.allclose(bound.evaluate(exact.detach(), exact.detach(), {})[0], slope.abs(), rtol=1e-9, atol=1e-3 if name == "gelu" else 1e-9)


SPELLINGS: dict[str, tuple[str, dict[str, object], Callable[[torch.Tensor], torch.Tensor]]] = {
    "erf": ("gelu", {"approximate": "none"}, lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))),
    "torch's": ("gelu", {"approximate": "none"}, F.gelu),
    "with a constant of six digits": ("gelu", {"approximate": "none"}, lambda z: z * 0.5 * (1 + torch.erf(z / 1.41421))),
    "tanh": ("gelu", {"approximate": "tanh"}, lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * torch.pow(z, 3))))),
    "fast": ("gelu", {"approximate": "tanh"}, lambda z: 0.5 * z * (1 + torch.tanh(z * 0.7978845608 * (1 + 0.044715 * z * z)))),
    "quick": ("quick_gelu", {}, lambda z: z * torch.sigmoid(1.702 * z)),
    "silu": ("silu", {}, lambda z: z / (1 + torch.exp(-z))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (0, 4), (-3, 1), (3, 1), (0, 30)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_gelu_and_its_relatives_are_known_at_any_z_and_told_apart(name: str, mean: float, std: float, dtype: torch.dtype) -> None:
    """Computed operation by operation in the type itself, at the z of trained networks. In bfloat16 the two forms of GELU are the same numbers."""
    activation, plain, function = SPELLINGS[name]
    z = (mean + std * torch.randn(16384)).to(dtype)
    bound = recognise(z, function(z), ACTIVATIONS, 0.05).bound
    assert bound is not None
    assert bound.activation.name == activation
    assert dtype == torch.bfloat16 or bound.plain == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("std", [0.2, 1, 4, 30])
@pytest.mark.parametrize(
    "function",
    [
        lambda z: z * torch.erf(z),
        lambda z: torch.tanh(1.02 * z),
        lambda z: 1.7159 * torch.tanh(2 / 3 * z),
        lambda z: z * torch.sigmoid(z).square(),
        lambda z: torch.sin(z) + 0.1 * z,
        lambda z: z.clamp(-1, 1) + 0.01 * z,
    ],
)
def test_a_function_like_one_of_the_table_gets_no_wrong_name(function: Any, std: float, dtype: torch.dtype) -> None:
    z = (std * torch.randn(16384)).to(dtype)
    assert recognise(z, function(z), ACTIVATIONS, 0.05).bound is None


FITTED: list[tuple[Callable[[torch.Tensor], torch.Tensor], str, dict[str, float | None], float, tuple[float | None, float | None]]] = [
    (lambda z: F.leaky_relu(z, 0.2), "leaky_relu", {"negative_slope": 0.2}, 1.0, (None, None)),
    (lambda z: z * (z > 0.3), "jump_relu", {"theta": 0.3}, 1.0, (0.3, None)),
    (lambda z: z.clamp(-1.5, 1.5), "clamp", {"min": -1.5, "max": 1.5}, 1.0, (-1.5, 1.5)),
    (lambda z: z.clamp(max=0.4), "clamp", {"min": None, "max": 0.4}, 1.0, (None, 0.4)),
    (lambda z: F.relu(z).square().clamp(max=1.6), "clipped_squared_relu", {"cap": 1.6}, 2 * math.sqrt(1.6), (0.05 * math.sqrt(1.6), math.sqrt(1.6))),
    (lambda z: F.elu(z, 0.9), "elu", {"alpha": 0.9}, 1.0, (math.log(0.05 / 0.9), None)),
    (lambda z: z * torch.sigmoid(1.3 * z), "swish", {"beta": 1.3}, 1.09983932, (-3.9299 / 1.3, None)),
    (lambda z: torch.sin(30 * z), "sin", {"omega": 30.0}, 30.0, (None, None)),
    (lambda z: torch.sin(z), "sin", {}, 1.0, (None, None)),
    (lambda z: z + torch.sin(0.7 * z) ** 2 / 0.7, "snake", {"alpha": 0.7}, 2.0, (None, None)),
    (lambda z: 2 * torch.tanh(z / 2), "soft_cap", {"cap": 2.0}, 1.0, (-4.35654, 4.35654)),
    (torch.atan, "atan", {}, 1.0, (-math.sqrt(19), math.sqrt(19))),
    (torch.erf, "erf", {}, 2 / math.sqrt(math.pi), (-1.730818, 1.730818)),
]


@pytest.mark.parametrize("at", range(len(FITTED)))
def test_the_parameter_of_a_function_that_is_written_by_hand_is_found(at: int) -> None:
    function, name, plain, peak, tails = FITTED[at]
    z = 1.2 * torch.randn(4096)
    bound = recognise(z, function(z), ACTIVATIONS, 0.05).bound
    assert bound is not None
    assert bound.activation.name == name
    assert dict(bound.plain) == pytest.approx(plain)
    constants = known(bound.constants)
    assert constants.peak == pytest.approx(peak)
    assert (constants.low, constants.high) == pytest.approx(tails, abs=1e-4)
    exact = torch.linspace(-6, 6, 997, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(exact).sum(), exact)
    assert torch.allclose(bound.evaluate(exact.detach(), exact.detach(), {})[0], slope.abs(), rtol=1e-5, atol=1e-9)


def test_squared_relu_has_no_peak_and_a_low_tail() -> None:
    z = torch.randn(500)
    bound = known(recognise(z, F.relu(z).square(), ACTIVATIONS, 0.05).bound)
    assert (bound.activation.name, bound.tails_known, bound.tails) == ("squared_relu", True, "low")
    constants = known(bound.constants)
    assert (constants.peak, constants.low, constants.high) == (None, 0.0, None)


@pytest.mark.parametrize("row", FUNCTIONS, ids=lambda row: row.name)
def test_the_slope_of_a_function_of_torch_is_that_of_autograd(row: Activation) -> None:
    """Where it is defined, and near the ends of that range."""
    given = dict.fromkeys(row.parameters, 2.7)
    first, last = {"acosh": (1.001, 6.0), "erfinv": (-0.999, 0.999), "asin": (-0.999, 0.999), "acos": (-0.999, 0.999), "atanh": (-0.999, 0.999)}.get(
        row.name, (0.001, 0.999) if row.name in ("logit", "entr") else (-6.0, 6.0) if row in CURVES else (0.001, 6.0)
    )
    z = torch.linspace(first, last, 1001, dtype=torch.float64, requires_grad=True)
    calls: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
        POWER: lambda z: z**2.7,
        EXPONENTIAL: lambda z: 2.7**z,
        QUOTIENT: lambda z: 2.7 / z,
    }
    function: Callable[[torch.Tensor], torch.Tensor] = calls.get(row, row.calls[0])
    (slope,) = torch.autograd.grad(function(z).sum(), z)
    bound = bind_plain(row, 0.05, given)
    found, peak, _ = bound.evaluate(z.detach(), z.detach(), {})
    assert torch.allclose(found, slope.abs(), rtol=1e-9, atol=1e-11)
    assert peak is None or float(found.max()) <= float(peak) * (1 + 1e-9)
    assert (peak is not None) == (row in CURVES or row.name == "abs")


@pytest.mark.parametrize("row", CURVES, ids=lambda row: row.name)
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.3])
def test_peak_and_tails_of_a_curve_agree_with_the_search_on_a_grid(row: Activation, epsilon: float) -> None:
    closed, found = known(bind_plain(row, epsilon).constants), known(bind_plain(Activation("bare", derivative=row.derivative), epsilon).constants)
    assert found.peak == pytest.approx(closed.peak, rel=1e-6)
    if row.name not in ("sin", "cos"):
        assert (found.low, found.high) == pytest.approx((closed.low, closed.high), abs=3e-3)


def test_a_sigmoid_of_1_7_z_is_no_gelu_in_bfloat16() -> None:
    """There it has the numbers of quick GELU, whose factor is 1.702."""
    z = torch.randn(16384).bfloat16()
    bound = recognise(z, z * torch.sigmoid(1.7 * z), ACTIVATIONS, 0.05).bound
    assert bound is not None
    assert bound.activation.name == "quick_gelu"


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z,
        lambda z: 2 * z,
        lambda z: 2 * torch.sin(z),
        lambda z: torch.tanh(1.1 * z),
        lambda z: z / z.square().mean().sqrt(),
        torch.zeros_like,
        torch.abs,
    ],
)
def test_other_functions_are_not_taken_for_a_row(function: Any) -> None:
    z = 2 * torch.randn(500)
    assert recognise(z, function(z), ACTIVATIONS, 0.05).bound is None


def test_nothing_is_known_from_one_side_or_a_few_numbers() -> None:
    """On positive numbers ReLU, ELU and many others are the same function."""
    z = torch.rand(500) + 0.2
    assert recognise(z, F.relu(z), ACTIVATIONS, 0.05) == Recognition(None, may_come=True)
    z = torch.randn(12)
    assert recognise(z, torch.tanh(z), ACTIVATIONS, 0.05) == Recognition(None, may_come=True)


def test_a_changed_function_no_longer_fits() -> None:
    z = 2 * torch.randn(500)
    bound = recognise(z, torch.tanh(z), ACTIVATIONS, 0.05).bound
    assert bound is not None
    assert not differs(bound, z, torch.tanh(z))
    assert differs(bound, z, torch.tanh(1.01 * z))
