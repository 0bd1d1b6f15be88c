"""Blocked and trapped: how much of the gradient's demand falls to elements on a plateau, and how much of it asks them to leave."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.truth import known
from torchsat.activations import ACTIVATIONS, bind
from torchsat.columns import COLUMN
from torchsat.statistics import DEMAND, Sides, empty_row, observe_gradient, sides_of

EDGE = {"tanh": math.atanh(math.sqrt(0.95)), "sigmoid": math.log((1 + math.sqrt(0.95)) / (1 - math.sqrt(0.95)))}
"""Where the tails begin: f' is 5 % of its peak there."""


def demand(z: Tensor, grad: Tensor, low: float, high: float = math.inf) -> tuple[float, float, float]:
    """Blocked, trapped and leaving by their definition."""
    sizes, is_low, is_high = grad.abs(), z <= low, z >= high
    leaves = (is_low & (grad < 0)) | (is_high & (grad > 0))
    return ((sizes * (is_low | is_high)).sum() / sizes.sum()).item(), ((sizes * leaves).sum() / sizes.sum()).item(), leaves.double().mean().item()


class Calls(nn.Module):
    """Computes an activation in several ways, and keeps z and a of each."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.linear, self.act, self.head = nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)
        self.relu, self.glu = nn.ReLU(inplace=True), nn.GLU()
        with torch.no_grad():
            self.linear.weight *= 8

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        self.z, a = z.detach().clone(), z
        if self.way == "module":
            a = self.act(z)
        elif self.way == "call":
            a = torch.sigmoid(z)
        elif self.way == "in place":
            a = self.relu(z)
        elif self.way == "twice":
            a = self.act(z) + self.act(2 * z)
            self.z = torch.stack([self.z, 2 * self.z])
        elif self.way == "checkpoint":
            a = checkpoint(self.act, z, use_reentrant=False)
        if a.requires_grad:
            self.grads: list[Tensor] = []
            a.register_hook(self.grads.append)
        return self.head(a)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "site", "low", "high"),
    [
        ("module", "act", -EDGE["tanh"], EDGE["tanh"]),
        ("call", "sigmoid", -EDGE["sigmoid"], EDGE["sigmoid"]),
        ("in place", "relu", 0.0, math.inf),
        ("twice", "act", -EDGE["tanh"], EDGE["tanh"]),
        ("checkpoint", "act", -EDGE["tanh"], EDGE["tanh"]),
    ],
)
def test_a_record_says_how_much_of_the_demand_is_blocked_and_trapped(way: str, site: str, low: float, high: float) -> None:
    torch.manual_seed(0)
    model = Calls(way).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    # Two micro-batches, the second with 50 times the loss, so that its demand counts 50 times.
    z, grads = [], []
    for factor in (1, 50):
        loss = factor * F.cross_entropy(model(torch.randn(40, 6).double()), torch.randint(3, (40,)))
        loss.backward()
        grad = torch.stack([model.grads[0]] * 2) if way == "twice" else model.grads[0]
        z.append(model.z)
        grads.append(grad)
    optimizer.step()
    record = known(known(monitor.latest)[site])
    blocked, trapped, leaving = demand(torch.stack(z), torch.stack(grads), low, high)
    assert 0.1 < trapped < blocked < 0.95
    assert (record.blocked, record.trapped, record.leaving) == pytest.approx((blocked, trapped, leaving), rel=1e-12)


def test_of_several_parts_of_a_loss_the_demand_of_their_sum_is_not_asked() -> None:
    """Each backward through a site is a demand of its own, as micro-batches are."""
    forward, backward = sides_of(torch.tensor([-3.0, 3.0, 0.0]), (-2.0, 2.0)), torch.tensor([-1.0, 1.0, 2.0])
    row = observe_gradient(backward, None, 3, None, forward)
    row = observe_gradient(-backward, None, 3, row, forward)
    assert row[DEMAND].tolist() == [8.0, 2.0, 4.0, 2.0]


def test_a_gate_of_a_glu_has_the_demand_of_its_own_output() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 20), nn.GLU(), nn.Linear(10, 1)).double()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(10)
    x = torch.randn(30, 6).double()
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model(x).square().sum().backward()
    optimizer.step()
    record = known(monitor.latest).records[0]
    monitor.close()
    first, last = known(model.get_submodule("0")), known(model.get_submodule("2"))
    value, z = first(x).detach().chunk(2, 1)
    gate = torch.sigmoid(z).requires_grad_()
    last(value * gate).square().sum().backward()
    assert (record.blocked, record.trapped, record.leaving) == pytest.approx(demand(z, known(gate.grad), -EDGE["sigmoid"], EDGE["sigmoid"]), rel=1e-5)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "gelu", "elu", "softsign", "hardtanh", "log_sigmoid", "relu6"])
@pytest.mark.parametrize("kernels", ["kernels", "plain"])
def test_the_sides_are_those_of_the_table(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "plain":
        monkeypatch.setattr("torchsat.statistics.engine", lambda *tensors: None)
    activation = next(row for row in ACTIVATIONS if row.name == name)
    bound = bind(activation, activation.modules[0](), 0.05)
    z = torch.linspace(-9, 9, 1001)
    found = known(sides_of(z, bound.edges({}))).values
    constants = known(bound.constants)
    assert found.dtype == torch.int8
    for value, side in zip(z.tolist(), found.tolist(), strict=True):
        expected = 1 if constants.high is not None and value >= constants.high else -1 if constants.low is not None and value <= constants.low else 0
        assert side == expected, value


def test_where_there_is_no_plateau_or_no_gradient_nothing_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    (0 * model(torch.randn(5, 4))).sum().backward()
    optimizer.step()
    leaky, tanh = known(monitor.latest).records
    assert (leaky.blocked, leaky.trapped, tanh.blocked, tanh.trapped) == (None, None, None, None)
    assert sides_of(torch.zeros(3), (None, None)) is None


def test_elements_whose_gradient_is_not_finite_demand_nothing() -> None:
    sides = Sides(torch.tensor([1, -1, 0, 1], dtype=torch.int8))
    for grad_z in (None, torch.tensor([0.0, 1.0, 1.0, math.inf])):
        row = observe_gradient(torch.tensor([1.0, math.nan, -2.0, 4.0]), grad_z, 8, empty_row(torch.device("cpu")), sides)
        last = 0.0 if grad_z is not None else 4.0
        assert [row[COLUMN[each]].item() for each in ("demand", "blocked", "trapped")] == [2 * (3 + last), 2 * (1 + last), 2 * (1 + last)]


@pytest.mark.parametrize(("name", "f", "peak"), [("tanh", torch.tanh, 1.0), ("sigmoid", torch.sigmoid, 0.25)])
def test_what_a_plateau_costs(name: str, f: Callable[[Tensor], Tensor], peak: float) -> None:
    """The two claims of docs/saturation.md, on elements that are spread over plateaus and slopes, with autograd for the derivatives."""
    torch.manual_seed(0)
    z = (4 * torch.randn(4000).double() / (1 if name == "tanh" else 0.5)).requires_grad_()
    g = torch.randn(4000).double()
    a = f(z)
    slope = torch.autograd.grad(a.sum(), z)[0]
    a = a.detach()
    blocked, trapped, _ = demand(z, g, -EDGE[name], EDGE[name])
    assert 0.2 < trapped < blocked < 0.8
    # If every z may move by eta, the loss falls at first order by eta sum f' |g|, and where f' is everywhere at its peak by eta peak sum |g|.
    left = (slope * g.abs()).sum() / (peak * g.abs().sum())
    assert left < 1 - 0.95 * blocked
    # The bound is reached where no element is on a slope other than the peak, and those in the tails are at their edges.
    at_edge = torch.where(torch.rand(4000) < 0.5, torch.zeros(1).double(), torch.full((1,), EDGE[name], dtype=torch.float64)).requires_grad_()
    edge_slope = torch.autograd.grad(f(at_edge).sum(), at_edge)[0]
    share = demand(at_edge, g, -EDGE[name], EDGE[name] - 1e-12)[0]
    assert (edge_slope * g.abs()).sum() / (peak * g.abs().sum()) == pytest.approx(1 - 0.95 * share, rel=1e-9)
    # However far it moves, an element that pushes on into its tail can lower the loss by no more than |g| times what is left of the range.
    is_high, is_low = z.detach() >= EDGE[name], z.detach() <= -EDGE[name]
    content = (is_high & (g < 0)) | (is_low & (g > 0))
    ends = (f(torch.tensor(-50.0).double()), f(torch.tensor(50.0).double()))
    rest = torch.where(is_high, ends[1] - a, a - ends[0])
    part = (ends[1] - f(torch.tensor(EDGE[name], dtype=torch.float64))) / (ends[1] - ends[0])
    assert ((rest * g.abs())[content] <= part * (ends[1] - ends[0]) * g.abs()[content] + 1e-12).all()
    assert part == pytest.approx(0.0127, abs=5e-5)
