"""The values that are measured of pre-activations, activations and their gradients, for every shape, memory layout and precision."""

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchsat
from tests.models import Block
from tests.test_activations import MODULES
from tests.truth import check, known, one_step, truth
from torchsat.kernels import cpu


class Cubed(nn.Module):
    """z enters two nodes, and one of them twice."""

    def forward(self, z: Tensor) -> Tensor:
        return z * z * z.relu()


FUNCTIONS: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
    (nn.Tanh(), torch.tanh),
    (nn.Softsign(), F.softsign),
    (nn.Tanhshrink(), F.tanhshrink),
    (nn.LogSigmoid(), F.logsigmoid),
    (nn.Hardsigmoid(), F.hardsigmoid),
    (nn.PReLU(init=0.3), lambda z: F.prelu(z, torch.tensor([0.3], dtype=z.dtype))),
    *((kind(), lambda z, kind=kind: kind()(z)) for kind in (nn.Mish, nn.GELU, nn.SELU, nn.CELU, nn.Softshrink, nn.Hardshrink, nn.Softplus)),
]


@pytest.mark.parametrize(("module", "function"), FUNCTIONS, ids=lambda value: type(value).__name__)
def test_forward_and_gradient_are_those_of_plain_autograd(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(32, 16)
    model = nn.Sequential(nn.Linear(16, 16), module)
    check(one_step(model, x=x)["1"], truth(function, model[0](x)))


def test_attenuation_is_of_this_activation_alone_where_z_has_other_uses() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.sigmoid = nn.Linear(16, 16), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            out: Tensor = z * self.sigmoid(z)
            return out

    model, x = Swish(), torch.randn(64, 16)
    record = one_step(model, x=x)["sigmoid"]
    z = model.linear(x).detach().double()
    a = torch.sigmoid(z)
    grad_a = 2 * (z * a) * z
    grad_z = grad_a * a * (1 - a)
    assert record.attenuation == pytest.approx((grad_z.norm() / grad_a.norm()).item(), rel=1e-5)
    assert known(record.attenuation) < 0.25


def backward_hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    """A user's hook that changes the gradient behind the activation."""
    return tuple(3 * grad for grad in grad_input)


@pytest.mark.parametrize("hooked", ["not", "by the module", "by a pre-hook", "by the tensor"])
@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize(
    ("module", "function"),
    [
        (nn.Sigmoid(), torch.sigmoid),
        (nn.Softsign(), F.softsign),
        (nn.Tanhshrink(), F.tanhshrink),
        (nn.PReLU(init=0.3), FUNCTIONS[5][1]),
        (Cubed(), lambda z: z * z * z.relu()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_dl_dz_comes_through_the_activation_alone_whatever_is_hooked(
    module: nn.Module, function: Callable[[Tensor], Tensor], leaf: bool, hooked: str
) -> None:
    """Not from other uses of z, and before any hook of the user's has changed it."""
    module = copy.deepcopy(module)
    if hooked == "by the module":
        module.register_full_backward_hook(backward_hook)
    if hooked == "by a pre-hook":
        module.register_full_backward_pre_hook(lambda module, grad_output: None)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(16, 16), module

        def forward(self, x: Tensor) -> Tensor:
            z = x if leaf else self.linear(x)
            if hooked == "by the tensor":
                z.register_hook(lambda grad: 5 * grad)
            before = torch.sin(z)
            out: Tensor = before * self.act(z) + z.exp()
            return out

    x = torch.randn(64, 16, requires_grad=leaf)
    model = Net()
    record = one_step(model, x=x)["act"]
    z = (x if leaf else model.linear(x)).detach().double().requires_grad_()
    a = function(z)
    grad_a = (2 * (torch.sin(z) * a + z.exp()) * torch.sin(z)).detach()
    (grad_z,) = torch.autograd.grad(a, z, grad_a)
    expected = {"grad_a_rms": grad_a.square().mean().sqrt().item(), "grad_z_rms": grad_z.square().mean().sqrt().item()}
    check(record, {**expected, "attenuation": (grad_z.norm() / grad_a.norm()).item(), "grad_n": z.numel()}, rel=1e-4)


def test_each_of_several_backward_passes_is_heard_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Softsign())
    monitor = torchsat.watch(model, errors="raise")
    x = torch.randn(8, 4)
    a = model(x)
    for weight in (1.0, 3.0):
        (weight * a).sum().backward(retain_graph=True)
    monitor.step()
    assert monitor.latest is not None
    z = model[0](x).detach().double()
    slope = (1 + z.abs()) ** -2
    check(monitor.latest["1"], {"grad_a_rms": math.sqrt(5), "grad_z_rms": (5 * slope.square().mean()).sqrt().item(), "grad_n": 2 * z.numel()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_measured_in_float32_from_the_low_precision_z(dtype: torch.dtype) -> None:
    model, x = Block(nn.Sigmoid()), torch.randn(64, 8) * 4

    def forward(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype):
            out: Tensor = model(x)
            return out

    record = one_step(model, forward)["act"]
    with torch.autocast("cpu", dtype):
        z = model.linear(x)
    assert z.dtype == dtype
    sigmoid = torch.sigmoid(z.double())
    check(record, {"derivative": (sigmoid * (1 - sigmoid)).mean().item(), "z_std": z.double().std(correction=0).item()})
    assert record.attenuation == pytest.approx(record.derivative_rms, rel=0.2)


@pytest.mark.parametrize("shape", [(), (7,), (4, 8), (2, 3, 8), (2, 8, 3, 3), (2, 8, 2, 3, 3)], ids=str)
def test_any_rank_is_measured(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, requires_grad=True)
    record = one_step(nn.Sequential(nn.Tanh()), x=z)["0"]
    check(record, truth(torch.tanh, z))
    # As documented: where no layer feeds the activation, the unit axis is axis 1 for tensors of rank 4 and higher and the last axis for rank 2 and 3.
    # Tensors of lower rank have no units.
    assert record.units == (None if len(shape) < 2 else 8)
    assert not z._backward_hooks


def test_the_unit_axis_is_that_of_the_layer_before() -> None:
    def units(*layers: nn.Module, x: Tensor) -> int | None:
        return one_step(nn.Sequential(*layers), x=x).records[0].units

    assert units(nn.Linear(6, 5), nn.Tanh(), x=torch.randn(2, 3, 4, 6)) == 5
    assert units(nn.Linear(6, 5), nn.Tanh(), x=torch.randn(6)) == 5
    assert units(nn.Conv1d(6, 5, 1), nn.Tanh(), x=torch.randn(2, 6, 9)) == 5
    assert units(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), x=torch.randn(2, 6, 4, 4)) == 5
    assert units(nn.Conv2d(6, 5, 1), nn.ReLU(), x=torch.randn(6, 4, 4)) == 5
    assert units(nn.ConvTranspose2d(6, 5, 2), nn.ReLU(), x=torch.randn(2, 6, 4, 4)) == 5


def test_channels_last_and_strided_inputs_give_the_same_record() -> None:
    z = torch.randn(4, 6, 5, 5)
    wide = torch.zeros(4, 6, 5, 10)
    wide[..., ::2] = z
    records = [
        one_step(nn.Sequential(nn.Tanh()), x=each.detach().requires_grad_())["0"]
        for each in (z, z.to(memory_format=torch.channels_last), wide[..., ::2], z.transpose(2, 3).contiguous().transpose(2, 3))
    ]
    for record in records[1:]:
        for name in ("n", "units", "derivative", "z_std", "attenuation", "grad_z_rms", "saturated"):
            assert getattr(record, name) == pytest.approx(getattr(records[0], name), rel=1e-9), name


def test_an_expanded_input_is_measured() -> None:
    z = torch.randn(4, 1).expand(4, 6)
    check(one_step(nn.Sequential(nn.Tanh()), x=z)["0"], {"n": 24, "z_mean": z.mean().item()})


def test_a_sample_is_said_to_be_one() -> None:
    record = one_step(nn.Sequential(nn.Linear(64, 64), nn.Tanh()), x=torch.randn(512, 64), sample=1000)["1"]
    assert record.elements == 512 * 64
    assert 900 <= record.n <= 1000
    assert record.grad_n == record.n


def test_complex_and_integer_inputs_are_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Tanh())
    monitor = torchsat.watch(model)
    model(torch.randn(3, dtype=torch.complex64, requires_grad=True))
    assert monitor.coverage.unseen[0][0] == "0"
    assert "complex64" in monitor.coverage.unseen[0][1]


def test_an_inplace_activation_on_a_view() -> None:
    class Net(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.conv, self.act, self.whole = nn.Conv2d(1, 2, 3), nn.SiLU(inplace=True), whole

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.conv(x)
            if self.whole:
                out: Tensor = self.act(h.flatten(1))
                return out
            self.act(h[:, :1])
            return h

    x = torch.randn(4, 1, 6, 6)
    for whole in (True, False):
        model = Net(whole)
        z = model.conv(x).flatten(1) if whole else model.conv(x)[:, :1]
        expected = truth(F.silu, z)
        monitor = torchsat.watch(model, errors="raise")
        model(x).square().sum().backward()
        monitor.step()
        if not whole:
            assert "in-place activation on a part of a tensor" in dict(monitor.coverage.unseen)["act"]
            for name in ("grad_a_rms", "grad_z_rms", "attenuation", "grad_n"):
                del expected[name]
                assert monitor.latest is not None
                assert not getattr(monitor.latest["act"], name)
        assert monitor.latest is not None
        check(monitor.latest["act"], expected)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_no_tensor_outlives_its_pass(module: nn.Module) -> None:
    alive: list[weakref.ReferenceType[Tensor]] = []
    model = nn.Sequential(nn.Linear(8, 8), copy.deepcopy(module).float().train())
    model[1].register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    assert [reference() for reference in alive] == [None] * 3
    assert monitor.latest is not None
    assert monitor.latest.step == 2


def test_hooks_never_wait_for_the_device() -> None:
    """Checked on a CPU: a step runs no operator for whose result the host would have to wait if the tensors were on a GPU."""

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
            assert not any(name in str(func) for name in ("_local_scalar_dense", "aten.nonzero", "masked_select", "unique", "bincount"))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 8), nn.PReLU(), nn.Softsign())
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 1, 6, 6)
    for _ in range(3):
        with NoWaiting():  # type: ignore[no-untyped-call]
            model(x).square().sum().backward()
            optimizer.step()
    assert monitor.latest is not None
    assert monitor.latest.step == 2


def test_one_activation_that_is_called_on_a_large_and_a_small_tensor_weighs_each_by_its_size() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.ones(())), nn.ReLU()

        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            large, small = pair
            out: Tensor = self.act(large * self.weight).mean() + self.act(small * self.weight).mean()
            return out

    large, small = torch.ones(64, 16, 40, 40), -torch.ones(64, 1000)
    model = Shared()
    record = one_step(model, lambda _: model((large, small)))["act"]
    true = small.numel() / (large.numel() + small.numel())
    assert record.saturated == pytest.approx(true, rel=1e-9)
    assert record.elements == large.numel() + small.numel()
    assert record.n == record.grad_n <= 2 * 65536
    assert record.z_mean == pytest.approx(1 - 2 * true, rel=1e-9)


class Scaled(nn.Module):
    """An activation of a parameter times the input."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.scale = act, nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: Tensor = self.act(x * self.scale)
        return out


class Half(nn.Module):
    """SiLU of half of the input: a tensor that is not dense."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x.chunk(2, -1)[1])


ACTS: list[tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (nn.Tanh(), lambda x: x, torch.tanh),
    (nn.ReLU(inplace=True), lambda x: x, torch.relu),
    (nn.PReLU(init=0.5), lambda x: x, lambda z: F.leaky_relu(z, 0.5)),
    (Half(), lambda x: x.chunk(2, -1)[1], F.silu),
    (nn.GLU(), lambda x: x.chunk(2, -1)[1], torch.sigmoid),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("act", "taken", "function"), ACTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("plain", [False, True])
def test_one_outlier_that_no_sample_meets_is_an_extreme(
    plain: bool,
    act: nn.Module,
    taken: Callable[[Tensor], Tensor],
    function: Callable[[Tensor], Tensor],
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if plain:
        monkeypatch.setattr(cpu, "reads", lambda *tensors: False)
    x = torch.linspace(-1, 1, 40 * 50).reshape(40, 50)
    x[7, 41], x[30, 33], x[12, 30], x[1, 49], x[39, 26] = 300.0, -200.0, 77.0, math.nan, -math.inf
    x = x.t().contiguous().t() if transposed else x
    (record,) = one_step(Scaled(copy.deepcopy(act)), x=x, sample=30).records
    z = taken(x)
    a = function(z)
    good = z.isfinite() & a.isfinite()
    assert record.n <= 30 < record.elements == record.inspected == z.numel()
    assert record.nonfinite == (~good).sum() == 2
    found = (record.z_max, record.z_min, record.a_max, record.a_min)
    assert found == pytest.approx([each.item() for each in (z[good].max(), z[good].min(), a[good].max(), a[good].min())], rel=1e-6)
