"""The values that are measured at the layers that feed a site: of their weights, gradients, updates and inputs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.models import linear_at, mlp
from tests.truth import known
from torchsat.weights import elements, fan_in


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
    # Every feature was read once, so that its mean over samples, and with it the centred share, cannot be known.
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
    read = [elements(weight, limit, turn).tolist() for turn in range(300)]
    assert all(read)
    # A weight is read in runs of 16 neighbours. What is left behind the last whole run is not read.
    assert len({element for each in read for element in each}) >= weight.numel() // 16 * 16
