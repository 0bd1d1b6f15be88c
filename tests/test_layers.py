"""The values that are measured at the layers that feed a site: of their weights, gradients, updates and inputs."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import torchsat
from tests.models import linear_at, mlp
from tests.truth import known
from torchsat.start import came_trained
from torchsat.weights import Layer, elements, fan_in, unevenness


def test_weights_are_measured_by_hand() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(20, 30), nn.Conv1d(1, 4, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.tanh, self.conv, self.relu = first, nn.Tanh(), second, nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.relu(self.conv(self.tanh(self.linear(x)).unsqueeze(1)))
            return out

    net, x = Net(), torch.randn(400, 20) * 2 + 5
    monitor = torchsat.watch(net, sample=None, errors="raise")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    before = copy.deepcopy(net)
    net(x).sum().backward()
    optimizer.step()
    monitor.flush()
    assert monitor.latest is not None
    linear, conv = monitor.latest.weights
    assert (linear.name, linear.feeds, linear.fan_in) == ("linear", ("tanh",), 20)
    assert (conv.name, conv.feeds, conv.fan_in) == ("conv", ("relu",), 3)
    # The weights are measured as they were in the forward pass, before the optimizer changed them.
    assert linear.norm == pytest.approx(before.linear.weight.norm().item(), rel=1e-6)
    assert linear.gain == pytest.approx(before.linear.weight.norm().item() / 30**0.5, rel=1e-6)
    assert conv.gain == pytest.approx(before.conv.weight.norm().item() / 4**0.5, rel=1e-6)
    assert linear.grad_norm == pytest.approx(known(net.linear.weight.grad).norm().item(), rel=1e-6)
    change = (net.linear.weight - before.linear.weight).norm() / before.linear.weight.norm()
    assert linear.update_ratio == pytest.approx(change.item(), rel=1e-5)
    assert linear.input_rms == pytest.approx(x.square().mean().sqrt().item(), rel=1e-6)
    # N(5, 4): the mean square is 29, of which 4 varies between samples.
    assert linear.input_centred_share == pytest.approx(4 / 29, abs=0.01)
    assert linear.input_n == 8000
    assert linear.learning_rate == 0.5


def test_the_centred_share_has_no_bias_in_small_batches() -> None:
    shares = []
    for _ in range(200):
        model = nn.Sequential(nn.Linear(50, 4), nn.Tanh())
        monitor = torchsat.watch(model, errors="raise")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(4, 50)).sum().backward()
        optimizer.step()
        assert monitor.latest is not None
        shares.append(known(monitor.latest.weights[0].input_centred_share))
        monitor.close()
    # Inputs without a common mean have the share 1. The plain squared mean of 4 samples would give 1 - 1/4. Clipping at 1 leaves a small bias.
    assert sum(shares) / 200 == pytest.approx(1, abs=0.03)


def test_fan_in_of_every_layer() -> None:
    assert fan_in(nn.Conv2d(8, 6, 3, groups=2)) == 4 * 9
    assert fan_in(nn.ConvTranspose2d(8, 6, 4, stride=2)) == 8 * 16 // 4


def test_a_weight_whose_memory_is_freed_between_its_uses_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    weight = linear_at(model, 0).weight.requires_grad_(False)
    kept = weight.detach().clone()

    def fetch(module: nn.Module, args: object) -> None:
        weight.untyped_storage().resize_(kept.untyped_storage().nbytes())
        weight.copy_(kept)

    model[0].register_forward_pre_hook(fetch)

    def free(module: nn.Module, args: object, output: object) -> None:
        weight.untyped_storage().resize_(0)

    model[0].register_forward_hook(free)
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
    monitor.flush()
    assert monitor.latest is not None
    assert [each.site for each in monitor.latest.records] == ["1"]
    assert not monitor.latest.weights
    assert monitor.coverage.unseen == (("0", "the memory of its weight is freed when the optimizer steps"),)


def test_the_gradient_norm_is_that_which_the_optimizer_received() -> None:
    class Centred(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(1e-3)
            super().step()

    model = mlp()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = Centred(model.parameters(), lr=0.1)
    model(torch.randn(4, 64)).sum().backward()
    expected = known(linear_at(model, 0).weight.grad).norm().item()
    optimizer.step()
    assert monitor.latest is not None
    assert monitor.latest.weights[0].grad_norm == pytest.approx(expected, rel=1e-6)


def test_wide_inputs_are_measured_where_they_were_read() -> None:
    model = nn.Sequential(nn.Linear(70_000, 2), nn.Tanh())
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 70_000) + 2).sum().backward()
    optimizer.step()
    assert monitor.latest is not None
    (weight,) = monitor.latest.weights
    assert weight.input_n <= 65536
    assert weight.input_rms == pytest.approx(5**0.5, rel=0.02)
    # Some features were read in two of the three samples, which tells how much they vary: 1 of a mean square of 5.
    assert weight.input_centred_share == pytest.approx(0.2, abs=0.03)


def test_of_features_that_are_read_once_nobody_knows_how_much_they_vary() -> None:
    model = nn.Sequential(nn.Linear(700, 2), nn.Tanh())
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(1, 700) + 2).sum().backward()
    optimizer.step()
    (weight,) = known(monitor.latest).weights
    assert weight.input_n == 700
    assert weight.input_centred_share is None


def test_a_lazy_layer_is_measured_once_it_exists() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1))
    monitor = torchsat.watch(model, every=1, errors="raise")
    model(torch.randn(3, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(3, 5)).sum().backward()
        optimizer.step()
    assert monitor.latest is not None
    assert [weight.name for weight in monitor.latest.weights] == ["0"]
    assert monitor.coverage.unseen == ()


@pytest.mark.parametrize("limit", [1, 64, 100, 1000])
@pytest.mark.parametrize("shape", [(64, 64), (7, 11), (3, 48)])
def test_a_small_sample_reads_something_of_a_weight_in_every_observation(shape: tuple[int, ...], limit: int) -> None:
    weight = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    # A weight is read in runs of 16 neighbours. Of the 256 runs of the largest one, 2500 draws of a single one miss none.
    read = [elements(weight, limit, turn).tolist() for turn in range(2500 if limit <= 100 else 300)]
    assert all(read)
    assert len({element for each in read for element in each}) == weight.numel()


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_and_columns_of_a_weight_are_read_evenly(transposed: bool) -> None:
    """Whatever structure a weight has, in rows, columns or both, the runs show it as independent draws of as many runs would."""
    rows, columns = torch.arange(512).view(-1, 1), torch.arange(1024)
    whole = {
        "rows": rows % 2 + 0 * columns,
        "halves": 0 * rows + columns // 512,
        "blocks": (rows // 64 + columns // 64) % 2,
        "stripes": 0 * rows + columns // 16 % 2,
        "board": (rows + columns // 16) % 2,
        "gates": rows // 128 % 2 + 0 * columns,
    }
    for name, each in whole.items():
        weight = each.float().t().contiguous().t() if transposed else each.float()
        shares = [elements(weight, 65536, turn).mean().item() for turn in range(12)]
        assert max(abs(share - 0.5) for share in shares) <= 4 * 0.5 / math.sqrt(1024), name


class Other(nn.Linear):
    """A layer whose weight is kept in another type than it is used in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(8, 16, bias=False)
        self.weight = nn.Parameter((20 * self.weight.detach()).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to_dense().to(x.dtype) / 20)


def _complex() -> nn.Module:
    class Complex(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(super().forward(torch.fft.fft(x))).flatten(1)

    return Complex(8, 8, dtype=torch.complex64)


def _sparse() -> nn.Module:
    layer = Other(torch.float32)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse(), requires_grad=False)
    return layer


def _offloaded() -> nn.Module:
    layer = nn.Linear(8, 16)
    layer.requires_grad_(False)
    accelerate = pytest.importorskip("accelerate", reason='Accelerate is not installed: pip install "accelerate>=1.0"')
    accelerate.cpu_offload(layer, execution_device="cpu")
    return layer


class Wrapping(Tensor):
    """A weight that keeps its numbers in a way of its own, as quantized weights do."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Wrapping":
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, requires_grad=False)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        made = func(*tree_map(lambda each: each.held if isinstance(each, Wrapping) else each, args), **(kwargs or {}))
        return Wrapping(made) if func is torch.ops.aten.detach.default else made


def _wrapping() -> nn.Module:
    layer = nn.Linear(8, 16, bias=False)
    layer.weight = nn.Parameter(Wrapping(layer.weight.detach()), requires_grad=False)
    return layer


KINDS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "complex": (_complex, "its weight is a tensor of complex numbers (torch.complex64)"),
    "int8": (lambda: Other(torch.int8), "its weight is a tensor of integers (torch.int8)"),
    "bool": (lambda: Other(torch.bool), "its weight is a tensor of integers (torch.bool)"),
    "sparse": (_sparse, "its weight is a sparse tensor (torch.sparse_coo), not a dense one"),
    "offloaded": (_offloaded, "its weight is a tensor on the meta device, which holds no numbers"),
    "wrapping": (_wrapping, "its weight is a Wrapping, which keeps its numbers in a way of its own"),
    "float8": (lambda: Other(torch.float8_e4m3fn), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_cannot_be_measured_is_named_alone_and_in_one_line(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = KINDS[kind]
    branches = nn.ModuleList(nn.Sequential(make(), nn.Tanh()) for _ in range(4))
    model = nn.ModuleDict({"b": branches, "head": nn.Sequential(nn.Linear(16, 16), nn.Sigmoid())})
    monitor = torchsat.watch(model, every=1, budget=None)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(3):
        x = torch.randn(32, 8)
        model["head"](sum(branch(x) for branch in branches)).square().mean().backward()
        optimizer.step()
    monitor.close()
    snapshot = known(monitor.latest)
    assert snapshot.step == 2
    assert monitor.coverage.seen == ("b.0.1", "b.1.1", "b.2.1", "b.3.1", "head.1")
    places = [f"b.{at}.0" for at in range(4)]
    if reason is None:
        assert monitor.coverage.unseen == ()
        weight = model.get_parameter("b.0.0.weight").detach().double()
        assert {each.name: each.gain for each in snapshot.weights}["b.0.0"] == pytest.approx((weight.square().sum() / 16).sqrt().item(), rel=1e-5)
        assert caplog.messages == []
        return
    assert monitor.coverage.unseen == tuple((place, reason) for place in places)
    assert [each.name for each in snapshot.weights] == ["head.0"]
    assert caplog.messages == [
        f"torchsat: 4 places such as b.0.0, b.1.0, b.2.0: {reason}; they are not measured as a layer. Training is not affected."
    ]


def test_a_fault_at_one_layer_is_charged_to_it_alone(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of work on a layer fails alone: before the optimizer's step, after it, and at the end of the observation."""
    for method in ("before_step", "after_step", "observe_grad", "features"):
        caplog.clear()
        whole = vars(Layer)[method]

        def broken(layer: Layer, *given: Any, method: str = method, real: Any = whole) -> Any:
            if layer.name in ("0", "2"):
                raise RuntimeError(f"no {method} of {layer.name}")
            return real.__get__(layer) if isinstance(real, property) else real(layer, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Layer, method, property(broken) if method == "features" else broken)
            model = nn.Sequential(*(each for _ in range(3) for each in (nn.Linear(8, 8), nn.Tanh())))
            monitor = torchsat.watch(model, every=1, budget=None)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                model(torch.randn(4, 8)).square().mean().backward()
                optimizer.step()
            monitor.close()
        snapshot = known(monitor.latest)
        assert (snapshot.step, [record.site for record in snapshot.records], [weight.name for weight in snapshot.weights]) == (
            2,
            ["1", "3", "5"],
            ["4"],
        )
        assert [place for place, _ in monitor.coverage.unseen] == ["0", "2"]
        assert [message for message in caplog.messages if "longer" in message] == [
            f"torchsat: 2 places such as 0, 2: RuntimeError: no {method} of 0; they are no longer watched. Training is not affected."
        ]


def observed(model: nn.Module, x: Tensor, steps: int = 1) -> list[torchsat.Snapshot]:
    seen: list[torchsat.Snapshot] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torchsat.watch(model, every=1, budget=None, sinks=(seen.append,), errors="raise"):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return seen


def test_the_unevenness_is_fishers_analysis_of_variance() -> None:
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 1))
    first = linear_at(model, 0).weight
    with torch.no_grad():
        first[:20] *= 2
    ratio = scipy.f_oneway(*first.detach().double().abs().reshape(-1, 16).numpy()).statistic
    seen = observed(model, torch.randn(4, 48), steps=5)
    assert known(seen[0].weights[0].unevenness) == pytest.approx((ratio - 1) * 60**0.5, rel=1e-9)
    # After three observations the weights are what this run has made of them.
    assert [each.weights[0].unevenness is None for each in seen] == [False, False, False, True, True]


@pytest.mark.parametrize(
    "initialise",
    [
        lambda weight: None,
        nn.init.xavier_uniform_,
        nn.init.kaiming_normal_,
        nn.init.trunc_normal_,
        nn.init.orthogonal_,
        lambda weight: nn.init.normal_(weight, std=100),
        lambda weight: nn.init.sparse_(weight, 0.9),
        lambda weight: weight.exponential_(),
        nn.init.eye_,
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_what_an_initialiser_draws_is_even(initialise: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for shape in ((32, 32), (64, 50), (128, 784), (1024, 64)):
        weight = nn.Linear(shape[1], shape[0]).weight.detach()
        initialise(weight)
        assert float(unevenness(elements(weight, 65536, seed))) < 5


def test_of_a_few_or_equal_weights_nothing_is_told() -> None:
    assert unevenness(torch.randn(511)).isnan()
    assert not unevenness(torch.randn(512)).isnan()
    (seen,) = observed(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(4, 8))
    assert seen.weights[0].unevenness is None
    equal = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    nn.init.constant_(linear_at(equal, 0).weight, 0.1)
    (seen,) = observed(equal, torch.randn(4, 64))
    assert seen.weights[0].unevenness is None


@pytest.mark.parametrize("frozen", [False, True])
def test_training_makes_weights_uneven(frozen: bool) -> None:
    """Weights that were trained on inputs of which a half says nothing; loaded frozen or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    (fresh,) = observed(model, torch.randn(16, 64))
    assert not came_trained(fresh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1.0)
    for _ in range(150):
        x = torch.randn(64, 64)
        x[:, 32:] *= 0.1
        optimizer.zero_grad()
        (model(x) - x[:, :4].sin()).square().mean().backward()
        optimizer.step()
    model[0].requires_grad_(not frozen)
    (loaded,) = observed(model, torch.randn(16, 64))
    assert known(loaded.weights[0].unevenness) > 8
    assert came_trained(loaded)
