"""What the graph of a pass holds is a site, is accounted for, or is named."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchsat
from tests.truth import check, one_step, truth
from torchsat import functions
from torchsat.coverage import Coverage
from torchsat.observe import nodes


class Between(nn.Module):
    """A function between two layers, so that its output is hidden."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 8), nn.Linear(width, 4), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.function(self.first(x)))
        return out


def unseen(model: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    monitor = torchsat.watch(model, errors="raise")
    out = model(torch.randn(8, 6) if x is None else x)
    sum(each.square().sum() for each in (out if isinstance(out, tuple) else (out,))).backward()
    monitor.step()
    monitor.close()
    return dict(monitor.coverage.unseen)


GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])


def scatter_softmax(z: Tensor) -> Tensor:
    """The softmax over groups of rows, as PyTorch Geometric writes it."""
    index = GROUPS[:, None].expand_as(z)
    largest = torch.zeros(3, 8).scatter_reduce(0, index, z.detach(), "amax", include_self=False)
    out = (z - largest.index_select(0, GROUPS)).exp()
    total = torch.zeros(3, 8).scatter_add(0, index, out) + 1e-16
    return out / total.index_select(0, GROUPS)


def assigned(z: Tensor) -> Tensor:
    z = z.clone()
    z[z < 0] = 0
    return z


def maker_of(function: Callable[[Tensor], Tensor]) -> str:
    """The name of the node that makes what a function returns."""
    made = function(torch.ones(2, requires_grad=True)).grad_fn
    return "" if made is None else made.name()


def softmax_by_hand(z: Tensor) -> Tensor:
    return (z - z.amax(-1, keepdim=True)).exp() / (z - z.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)


def elu_by_hand(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, torch.exp(z) - 1)


def bounded_by_hand(z: Tensor) -> Tensor:
    inner = torch.where(z > 1, torch.ones_like(z), z)
    return torch.where(z < -1, -torch.ones_like(z), inner)


CURVES = {row.name for row in functions.CURVES}
# The function, its place, the activation that is found there, and the kind of the site.
MEASURED: list[tuple[Callable[[Tensor], Tensor], str, str, str]] = [
    (torch.sin, "sin", "sin", "call"),
    (lambda z: z.cos(), "cos", "cos", "call"),
    (torch.special.erf, "erf", "erf", "call"),
    (lambda z: torch.atan(input=z), "atan", "atan", "call"),
    (torch.sinc, "sinc", "sinc", "call"),
    (lambda z: z.exp(), "exp", "exp", "function"),
    (lambda z: 2**z, "pow", "pow", "function"),
    (lambda z: torch.pow(3.0, z), "pow", "pow", "function"),
    (lambda z: z**3, "pow", "pow", "function"),
    (lambda z: z**2, "square", "square", "function"),
    (lambda z: z * z, "square", "square", "function"),
    (lambda z: z.clone().square_(), "square", "square", "function"),
    (lambda z: z.abs(), "abs", "abs", "function"),
    (lambda z: 3 / z, "reciprocal", "reciprocal", "function"),
    (torch.special.erfcx, "erfcx", "erfcx", "function"),
    (lambda z: torch.where(z > 0, z, 0.0), "where", "relu", "call"),
    (lambda z: torch.where(z.detach() > 0, z, torch.zeros_like(z)), "where", "relu", "call"),
    (lambda z: z * (z > 0), "mul", "relu", "call"),
    (lambda z: z * (z > 0).float(), "mul", "relu", "call"),
    (lambda z: z.masked_fill(z < 0, 0), "masked_fill", "relu", "call"),
    (assigned, "masked_fill" if "MaskedFill" in maker_of(assigned) else "index_put", "relu", "call"),  # torch 2.15 has made the one the other
    (lambda z: torch.maximum(z, torch.zeros_like(z)), "maximum", "relu", "call"),
    (lambda z: z.clamp(min=torch.zeros(8)), "clamp", "relu", "call"),
    (lambda z: torch.where(z > 0, z, 0.3 * z), "where", "leaky_relu", "call"),
    (lambda z: torch.minimum(torch.full_like(z, 0.4), z), "minimum", "clamp", "call"),
    (lambda z: torch.logaddexp(z, torch.zeros(8)), "logaddexp", "softplus", "call"),
    (elu_by_hand, "where", "elu", "call"),
    (bounded_by_hand, "where_1", "hardtanh", "call"),
]
# The function, and the places that are named; those that are sites beside them.
NAMED: list[tuple[Callable[[Tensor], Tensor], set[str], set[str]]] = [
    (lambda z: torch.zeros_like(z).scatter(-1, z.topk(3).indices, z.topk(3).values), {"topk"}, set()),
    (lambda z: z * (z >= z.kthvalue(4, dim=-1, keepdim=True).values), {"mul"}, set()),
    (lambda z: torch.maximum(z, z.flip(0)), {"maximum"}, set()),
    (lambda z: z / (1 + z.abs()), {"div"}, {"abs"}),
    (lambda z: z.cumprod(-1), {"cumprod"}, set()),
    (lambda z: z - z.logsumexp(-1, keepdim=True), {"logsumexp"}, set()),
    (lambda z: z - z.exp().sum(-1, keepdim=True).log(), {"logsumexp"}, set()),
    (torch.round, {"round"}, set()),
    (lambda z: torch.ops.aten.sin(z), {"sin"}, set()),
    (lambda z: torch.view_as_real(torch.exp(1j * z)).sum(-1), {"exp"}, set()),
    (lambda z: F.relu(z).square(), set(), {"relu", "square"}),
    (lambda z: z.abs().sqrt(), set(), {"abs", "sqrt"}),
    (lambda z: torch.exp(-(z**2)), set(), {"square", "exp"}),
    (scatter_softmax, set(), {"exp"}),
    (softmax_by_hand, set(), {"exp"}),
]
ACCOUNTED: list[Callable[[Tensor], Tensor]] = [
    lambda z: torch.where(torch.arange(8) > 3, z, 0.0),
    lambda z: torch.where(torch.ones_like(z, dtype=torch.bool).tril(), z, 0.0),
    lambda z: z.masked_fill(torch.isnan(z), 0.0),
    lambda z: F.dropout(z, 0.3) * torch.rand_like(z),
    lambda z: z * z.flip(0) + z.cumsum(-1) - z.mean(0),
    lambda z: z[:, [0, 0, 1, 2, 3, 4, 5, 6]].sort(-1).values,
    lambda z: F.max_pool1d(z[None], 3, 1, 1)[0],
    lambda z: F.layer_norm(z, (8,)) + F.normalize(z),
    lambda z: z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6),
    lambda z: z / (z * z).mean(-1, keepdim=True).add(1e-6).sqrt(),
    lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True) + 1e-5).sqrt(),
    lambda z: z / z.norm(dim=-1, keepdim=True).clamp(min=1e-6),
    lambda z: z / z.abs().sum(-1, keepdim=True).clamp_min(1e-6),
    lambda z: z + (z.round() - z).detach(),
    lambda z: torch.fft.ifft(torch.fft.fft(z)).real,
    lambda z: z * torch.cos(torch.arange(8.0)) + torch.sin(torch.arange(8.0)),
]


@pytest.mark.parametrize("at", range(len(MEASURED)))
def test_a_function_of_a_signal_is_a_site_with_the_numbers_of_autograd(at: int) -> None:
    """In the first observation, which decides that it is one, and in later ones."""
    function, place, activation, kind = MEASURED[at]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.layer(x))

    model, x = Net(), 2 * torch.randn(32, 6)
    apart = copy.deepcopy(model.layer)
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    for _ in range(3):
        model(x).square().sum().backward()
        monitor.step()
        monitor.flush()
        assert monitor.coverage.seen == (place,)
        assert monitor.coverage.unseen == ()
        assert monitor.latest is not None
        record = monitor.latest[place]
        assert (record.activation, record.kind) == (activation, kind)
        check(record, truth(function, apart(x)), rel=1e-4)
        assert (record.saturated is None) == (activation == place not in {*CURVES, "abs"})


@pytest.mark.parametrize("at", range(len(NAMED)))
def test_what_is_no_function_of_one_signal_is_named(at: int) -> None:
    function, names, seen = NAMED[at]
    monitor = torchsat.watch(model := Between(function), errors="raise")
    model(torch.randn(8, 6)).square().sum().backward()
    monitor.step()
    assert set(monitor.coverage.seen) == seen
    assert {place for place, _ in monitor.coverage.unseen} == names


@pytest.mark.parametrize("at", range(len(ACCOUNTED)))
def test_what_is_linear_or_normalises_is_not_named(at: int) -> None:
    assert unseen(Between(ACCOUNTED[at])) == {}


@pytest.mark.parametrize("call", [lambda z: z.clamp(min=0), lambda z: torch.clip(z, -0.5, 0.7), lambda z: torch.clamp_max(z, 0.3)])
def test_a_clamp_with_fixed_bounds_is_measured(call: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 16)

        def forward(self, x: Tensor) -> Tensor:
            return call(self.layer(x))

    model, x = Net(), torch.randn(32, 6)
    record = one_step(model, x=x)["clamp"]
    check(record, truth(call, model.layer(x)))
    z = model.layer(x).detach()
    assert record.saturated == (call(z) != z).double().mean().item()


def test_a_clamp_has_the_derivative_of_torch_on_its_bound() -> None:
    """Half of the inputs of this clamp are exactly 0. Until torch 2.14 the derivative on the bound is 1, and from 2.15 on it is 0."""
    model, x = Between(lambda z: F.relu(z).clamp(0, 1)), torch.randn(32, 6)
    record = one_step(model, x=x)["clamp"]
    z = F.relu(model.first(x)).detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(z.clamp(0, 1).sum(), z)
    assert (z == 0).double().mean() > 0.25
    assert record.derivative == slope.mean().item()
    assert record.saturated == (slope == 0).double().mean().item()


def test_a_function_of_a_parameter_is_no_activation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = parametrizations.spectral_norm(nn.Linear(6, 8))
            self.last = parametrizations.orthogonal(nn.Linear(8, 8))
            self.scale, self.rho = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x)) * self.scale.exp() + torch.log1p(self.rho.exp())
            return out

    assert unseen(Net()).keys() == {"first", "last"}
    assert unseen(torch.nn.utils.spectral_norm(nn.Linear(6, 4))) == {}


def test_a_raw_parameter_is_a_weight() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(30 * x @ self.weight)

    record = one_step(Net(), x=torch.randn(8, 6))["sin"]
    assert record.n == 48


def test_the_loss_in_a_model_is_none_of_its_activations() -> None:
    class Net(nn.Module):
        def __init__(self, both: bool) -> None:
            super().__init__()
            self.layer, self.last, self.both = nn.Linear(6, 8), nn.Linear(8, 2), both

        def forward(self, x: Tensor) -> Any:
            y = self.last(torch.tanh(self.layer(x))).exp()
            loss = F.cross_entropy(y, torch.zeros(8, dtype=torch.long)) + y.abs().mean() + (y - 1).pow(2).mean().sqrt()
            return (y, loss) if self.both else loss

    for both in (False, True):
        model = Net(both)
        monitor = torchsat.watch(model, errors="raise")
        out = model(torch.randn(8, 6))
        sum(each.square().sum() for each in (out if both else (out,))).backward()
        monitor.step()
        assert monitor.coverage.seen == (("tanh", "exp") if both else ("tanh",))
        assert monitor.coverage.unseen == ()


def test_the_graph_of_an_earlier_pass_is_not_explored() -> None:
    """The weights of the second pass are computed from the gradients of the first one, with functions that do not belong to the model."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    for _ in range(2):
        weights: dict[str, Tensor] = dict(model.named_parameters())
        first = torch.func.functional_call(model, weights, (torch.randn(8, 4),)).square().mean()
        grads = torch.autograd.grad(first, list(weights.values()), create_graph=True)
        fast = {name: weight - 0.1 * torch.tanh(grad).exp() for (name, weight), grad in zip(weights.items(), grads, strict=True)}
        optimizer.zero_grad()
        torch.func.functional_call(model, fast, (torch.randn(8, 4),)).square().mean().backward()
        optimizer.step()
    monitor.close()
    assert monitor.coverage.seen == ("1",)
    assert monitor.coverage.unseen == ()


def test_a_function_in_a_transform_of_torch_func_is_said() -> None:
    act = nn.Tanh()
    model = Between(lambda z: torch.vmap(lambda row: act(torch.tanh(row)))(z))
    model.add_module("act", act)
    assert unseen(model) == {**dict.fromkeys(["act", "tanh"], nodes.IN_TRANSFORM), "Tanh": nodes.UNHEARD}


def test_alike_places_take_one_line() -> None:
    model = nn.Sequential(*(Between(lambda z: z.cumprod(-1)[:, :6], 6) for _ in range(3)))
    for each in model:
        each.last = nn.Linear(6, 6)
    monitor = torchsat.watch(model, errors="raise")
    model(torch.randn(4, 6)).sum().backward()
    assert [place for place, _ in monitor.coverage.unseen] == ["0/cumprod", "1/cumprod", "2/cumprod"]
    assert str(monitor.coverage).splitlines()[1:] == [f"  0/cumprod and 2 more: {nodes.UNMEASURED}"]
    layers = Coverage((), (("layers.0", "x"), ("layers.1", "x"), ("head", "x")))
    assert str(layers).splitlines()[1:] == ["  layers.0 and 1 more: x", "  head: x"]


def test_the_table_names_only_nodes_of_torch() -> None:
    """A misspelt name would make its function seem unaccounted for, or hide another one."""
    header = Path(torch.__file__).parent / "include/torch/csrc/autograd/generated/Functions.h"
    if not header.exists():
        pytest.skip("this build of torch has no headers")
    kinds = {re.sub(r"Backward.*", "", name) for name in re.findall(r"struct TORCH_API (\w+)", header.read_text())}
    others = {"AccumulateGrad", "CopyBackwards", "CopySlices", "Error", "GraphRoot", "UndefinedGrad"}
    known = {name for names in nodes._ACCOUNTED.values() for name in names.split()}
    assert len(known - kinds - others) < 8, known - kinds - others
