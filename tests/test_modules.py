"""Activations that are modules: they become sites in every way in which a model can call them, with the parameters they have at that time."""

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.models import mlp
from tests.training import loop_of, train
from tests.truth import check, known, one_step, truth
from torchsat import activations, numeric

INPLACE = [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish]


@pytest.mark.parametrize("kind", [*INPLACE, nn.Threshold], ids=lambda kind: kind.__name__)
def test_an_inplace_activation_is_read_before_it_overwrites_its_input(kind: type[nn.Module]) -> None:
    arguments = (0.2, 0.1) if kind is nn.Threshold else ()
    x = torch.randn(32, 16)
    model = nn.Sequential(nn.Linear(16, 16), kind(*arguments, inplace=True))
    z = model[0](x).detach()
    check(one_step(model, x=x)["1"], truth(kind(*arguments), z))


def test_rrelu_shows_the_slopes_that_were_drawn() -> None:
    model = nn.Sequential(nn.Linear(16, 512), nn.RReLU(inplace=True))
    x = torch.randn(256, 16)
    share = (model[0](x) > 0).float().mean().item()
    record = one_step(model, x=x, sample=None)["1"]
    # The slopes s of the negative side are uniform in [1/8, 1/3]: E s = .22917, E s^2 = .056134.
    assert record.derivative == pytest.approx(share + (1 - share) * 0.22917, abs=0.001)
    assert known(record.derivative_rms) ** 2 == pytest.approx(share + (1 - share) * 0.056134, abs=0.001)
    assert record.saturated == 0


def test_a_learned_prelu_is_read_per_channel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.PReLU(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(x)
            return out

    model = Net()
    with torch.no_grad():
        model.act.weight.copy_(torch.tensor([0.5, 0.0, -2.0]))
    z = torch.randn(4, 3, 5, 5)
    record = one_step(model, x=z)["act"]
    check(record, {"derivative": torch.where(z > 0, 1.0, model.act.weight.detach().abs().reshape(1, 3, 1, 1).expand_as(z)).mean().item()})
    assert record.peak == 2.0
    # A channel can saturate only if its slope is 0, which makes it a ReLU.
    assert record.saturated == pytest.approx((z[:, 1] <= 0).float().sum().item() / z.numel())


def test_a_module_called_twice_in_a_pass_is_one_site() -> None:
    act = nn.Tanh()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(x) + self.act(3 * x)
            return out

    x = torch.randn(8, 4, requires_grad=True)
    snapshot = one_step(Net(), x=x)
    assert [record.site for record in snapshot.records] == ["act"]
    check(snapshot["act"], {"n": 64, "grad_n": 64, "z_mean": (torch.cat([x, 3 * x]).mean()).item()})


def test_keyword_arguments_are_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(8, 8), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(input=self.linear(input=x))
            return out

    snapshot = one_step(Net(), x=torch.randn(4, 8))
    assert snapshot["act"].n == 32
    assert snapshot.weights[0].input_n == 32


def test_a_model_that_grows_is_looked_at_anew() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    monitor = torchsat.watch(model, every=1, errors="raise")
    for width in (8, 5):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        assert monitor.latest is not None
        assert [record.output for record in monitor.latest.records] == ([True] if width == 8 else [False, True])
        model.append(nn.Linear(8, 5))
        model.append(nn.Sigmoid())
        if width == 8:
            optimizer.step()
    assert monitor.latest is not None
    assert monitor.latest["3"].units == 5


def test_a_model_may_move_and_change_after_watch() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")
    train(model, 2)
    model.double()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(8, 64, dtype=torch.float64, generator=generator)).sum().backward()
        optimizer.step()
    model.append(nn.Tanh())
    for _ in range(2):
        model(torch.randn(8, 64, dtype=torch.float64, generator=generator)).sum().backward()
        optimizer.step()
    monitor.flush()
    assert monitor.latest is not None
    assert [record.site for record in monitor.latest.records] == ["1", "3", "5"]


def test_tails_that_are_not_known_are_not_zero() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.scale * x)

    slope = lambda z, scale: scale * (1 - torch.tanh(scale * z) ** 2)  # noqa: E731
    rows = torchsat.Activation("square", (Square,)), torchsat.Activation("scaled", (Scaled,), ("scale",), derivative=slope)
    model = nn.Sequential(nn.Linear(4, 4), Square(), Scaled())
    monitor = torchsat.watch(model, activations=rows, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    assert monitor.latest is not None
    for record in monitor.latest.records:
        assert known(record.derivative) > 0
        assert record.saturated is record.low is record.stuck is record.relative_derivative is record.histogram is None  # type: ignore[comparison-overlap]
        assert record.tails == "unknown"


def test_a_default_device_does_not_reach_into_the_table() -> None:
    numeric.grid.cache_clear()
    activations._constants.cache_clear()
    with torch.device("meta"):
        monitor = torchsat.watch(nn.Sequential(nn.GELU()), errors="raise")
    assert known(loop_of(monitor).observer.sites.known["0"].bound.constants).peak == pytest.approx(1.12890415, rel=1e-7)
