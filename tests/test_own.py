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
from tests.truth import check, one_step, truth


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
        (Counting(), "clamp"),
        (Swish(5), "Swish"),
        (ChannelSwish(), "ChannelSwish"),
        (Snake(), "Snake"),
        (Buffered(), "sin"),
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
    assert (record.saturated is None) == name[0].isupper()


class Softmax(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.exp() / z.exp().sum(-1, keepdim=True)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6).roll(1, 0))

    def forward(self, z: Tensor) -> Tensor:
        return z + (z @ self.weight).tanh()


class Same(nn.Module):
    """What many modules are in training or in evaluation: nothing at all."""

    def forward(self, z: Tensor) -> Tensor:
        return z


class Shuffled(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z[:, [1, 0, 3, 2, 5, 4]]


@pytest.mark.parametrize(
    "module",
    [RMSNorm(), Scale(6), DropPath(), Steps(), Softmax(), Residual(), Same(), Shuffled(), nn.Dropout()],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_activation_is_no_site(module: nn.Module) -> None:
    """Neither in the first observation nor in later ones, in which it is decided and no longer hooked; and nothing is said of it. Of a softmax that
    is written by hand the exponential is a site, once."""
    model = nn.Sequential(nn.Linear(3, 6), module, nn.Linear(6, 6), nn.Tanh())
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inside = {Steps: ("1/tanh",), Residual: ("1/tanh",), Softmax: ("1/exp",)}.get(type(module), ())
    for _ in range(4):
        model(torch.randn(32, 3)).square().sum().backward()
        optimizer.step()
        assert monitor.coverage.seen == (*inside, "3")
        assert monitor.coverage.unseen == ()


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_own_activation_in_a_checkpoint_is_measured(reentrant: bool) -> None:
    """Its values are those of the first pass, and its gradients those of the backward; nothing runs more often than training runs it."""

    class Squashed(nn.Module):
        runs = 0

        def forward(self, z: Tensor) -> Tensor:
            self.runs += 1
            return z * torch.erf(z)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.known, self.other = nn.Linear(4, 4), nn.Linear(4, 6), NewGELU(), Squashed()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(lambda x: self.other(self.known(self.layer(x))), self.first(x), use_reentrant=reentrant)
            return out

    model, x = Net(), torch.randn(32, 4)
    snapshot = one_step(model, x=x)
    assert model.other.runs == 2
    z = model.known(model.layer(model.first(x)))
    check(snapshot["other"], truth(lambda z: z * torch.erf(z), z), rel=1e-4)
    assert (snapshot["known"].activation, snapshot["other"].activation) == ("gelu", "Squashed")


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


class Norm(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)


class Erf(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.erf(z)


class Cube(torch.autograd.Function):
    """A custom function that no row of the table fits."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.pow(3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad.mul_(3 * z * z)


class Cubing(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = Cube.apply(z)  # type: ignore[no-untyped-call]
        return out


@pytest.mark.parametrize("module", [Norm, Erf, Cubing])
def test_nothing_of_the_users_runs_because_of_us(module: type[nn.Module]) -> None:
    """Tensor hooks and retained gradients in front of a module of the user's own, and a computation that it checkpoints, see training alone."""

    class Checkpointed(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = [module()]
            self.runs = 0
            self.register_buffer("mean", torch.zeros(6))

        def compute(self, z: Tensor) -> Tensor:
            self.runs += 1
            self.mean.add_(z.detach().mean(0))
            out: Tensor = self.inner[0](z)
            return out

        def forward(self, z: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.compute, z, use_reentrant=False)
            return out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.own, self.last, self.leaf = nn.Linear(4, 6), module(), nn.Linear(6, 6), Checkpointed()
            self.heard: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            self.h = self.first(x)
            self.h.retain_grad()
            self.h.register_hook(lambda grad: self.heard.append(grad.norm().item()))
            out: Tensor = self.leaf(self.last(self.own(self.h)))
            return out

    def train(watched: bool) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        monitor = torchsat.watch(model, every=1, budget=None, errors="raise") if watched else None
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(32, 4)).square().mean().backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= model.h.grad.norm()
            optimizer.step()
        if monitor is not None:
            assert monitor.coverage.seen == (() if module is Norm else ("own", "leaf"))
            monitor.close()
        return model.heard, model.leaf.runs, model.leaf.mean.tolist(), [parameter.tolist() for parameter in model.parameters()]

    assert train(True) == train(False)


def test_a_custom_function_with_a_backward_that_overwrites_its_gradient() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), Cubing()), torch.randn(32, 4)
    check(one_step(model, x=x)["1"], truth(lambda z: z**3, model[0](x)), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 65536.0])
def test_the_derivative_is_that_of_autograd_in_any_precision_and_size_of_the_gradient(dtype: torch.dtype, scale: float) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Swish(), nn.Linear(6, 3)).to(dtype)
    monitor = torchsat.watch(model, errors="raise")
    x = torch.randn(256, 4).to(dtype)
    (model(x).float().square().mean() * scale).backward()
    monitor.step()
    assert monitor.latest is not None
    if dtype == torch.float16 and scale < 1:
        # The gradients are 0 in this type, so that nothing can be known.
        assert monitor.coverage.seen == ("1/sigmoid",)
        return
    z = model[0](x).detach().double().requires_grad_()
    (slope,) = torch.autograd.grad((z * torch.sigmoid(model[1].beta.double() * z)).sum(), z)
    assert monitor.latest["1"].derivative == pytest.approx(slope.abs().mean().item(), rel=1e-4 if dtype == torch.float32 else 0.01)


def test_the_derivative_is_of_all_elements_or_is_not_shown() -> None:
    """Where dL/da is 0 the quotient is not known. A dropout leaves that to chance; a ReLU and a max pooling hide the elements on one side."""
    x = torch.randn(512, 4)
    for behind, shown in ((nn.Dropout(0.5), True), (nn.ReLU(), False), (nn.MaxPool1d(3, 1, 1), False)):
        model = nn.Sequential(nn.Linear(4, 6), Swish(), behind, nn.Linear(6, 3))
        snapshot = one_step(model, x=x)
        expected = truth(Swish().double(), model[0](x))
        derivative = snapshot["1"].derivative
        assert (derivative is not None) is shown, behind
        assert derivative is None or derivative == pytest.approx(expected["derivative"], rel=0.02)


def test_a_step_without_a_backward_knows_no_derivative() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Erf())
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    model(torch.randn(32, 4)).sum().backward()
    monitor.step()
    model(torch.randn(32, 4))
    monitor.step()
    monitor.flush()
    assert monitor.latest is not None
    record = monitor.latest["1"]
    assert (record.n, record.derivative, record.derivative_rms, record.attenuation) == (192, None, None, None)
    assert record.z_rms


def test_an_activation_that_no_gradient_reaches_is_named_once() -> None:
    model = nn.Sequential(Erf(), nn.Linear(4, 6))
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    for _ in range(3):
        model(torch.randn(32, 4)).sum().backward()
        monitor.step()
        assert monitor.coverage.unseen == (
            ("0", "it may be an activation, but what it computes does not show: no gradient has reached both its input and its output"),
        )
    # Data that needs a gradient, as in an adversarial attack, shows it.
    model(torch.randn(32, 4, requires_grad=True)).sum().backward()
    monitor.step()
    assert (monitor.coverage.seen, monitor.coverage.unseen) == (("0",), ())


def test_nothing_is_asked_of_a_module_in_inference() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Erf())
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    with torch.no_grad():
        model(torch.randn(32, 4))
    with torch.inference_mode():
        model(torch.randn(32, 4))
    monitor.step()
    assert monitor.coverage.seen == ()


def test_the_sites_stay_in_the_order_in_which_they_run() -> None:
    model = nn.Sequential(Erf(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), Erf(), nn.Linear(4, 4), nn.Sigmoid())
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    for _ in range(2):
        model(torch.randn(64, 4, requires_grad=True)).square().sum().backward()
        monitor.step()
        monitor.flush()
        assert monitor.latest is not None
        assert [record.site for record in monitor.latest.records] == ["0", "2", "4", "6"]
    assert monitor.latest is not None
    # The structure is learned in the observation after the one in which a site turned up.
    assert [record.after for record in monitor.latest.records] == [(), ("0",), ("2",), ("4",)]
    assert [record.output for record in monitor.latest.records] == [False, False, False, True]


def test_what_is_decided_is_revised() -> None:
    """A clamp that is a ReLU at first turns out to be a ReLU6, and an activation that becomes a norm is no longer shown."""

    class Ceiling(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.clamp(0, 6)

    class Turning(nn.Module):
        turned = False

        def forward(self, z: Tensor) -> Tensor:
            return z * torch.rsqrt(z.square().mean(-1, keepdim=True)) if self.turned else z * torch.erf(z)

    turning = Turning()
    model = nn.Sequential(nn.Linear(4, 6), Ceiling(), nn.Linear(6, 6), turning, nn.Linear(6, 3))
    monitor = torchsat.watch(model, every=1, budget=None, errors="raise")
    found = []
    for step in range(7):
        turning.turned = step > 1
        model(torch.randn(64, 4) * (1 if step < 2 else 30)).square().sum().backward()
        monitor.step()
        monitor.flush()
        assert monitor.latest is not None
        found.append({record.site: record.activation for record in monitor.latest.records})
    assert found[1] == {"1": "relu", "3": "Turning"}
    assert found[2]["1"] == "relu6"
    assert found[-1] == {"1": "relu6"}
