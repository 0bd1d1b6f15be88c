"""The library reproduces published results: those of Glorot and Bengio (2010) and of mean-field theory."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy import integrate, optimize, stats
from sklearn.datasets import load_digits
from torch import nn

import torchsat
from tests.truth import known


def expectation(f: Callable[[float], float], q: float) -> float:
    out: float = integrate.quad(lambda x: f(math.sqrt(q) * x) * stats.norm.pdf(x), -12, 12, limit=200)[0]
    return out


FUNCTIONS: dict[str, tuple[type[nn.Module], Callable[[float], float], Callable[[float], float]]] = {
    "sigmoid": (nn.Sigmoid, lambda z: 1 / (1 + math.exp(-z)), lambda z: 1 / (2 + 2 * math.cosh(z))),
    "tanh": (nn.Tanh, math.tanh, lambda z: 1 / math.cosh(z) ** 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("init", ["standard", "xavier"])
def test_the_gradient_decays_over_depth_as_mean_field_theory_says(name: str, init: str) -> None:
    """Five layers of 1000 units, five seeds, and a random gradient at the top. By the theory of Schoenholz et al. (2017) the rms of dL/dz changes
    from one layer to the next by sqrt(chi). Here chi = sigma_w^2 E f'(sqrt(q) x)^2 with x ~ N(0, 1), and q, the mean square of z in the lower layer,
    is sigma_w^2 E f(z)^2 over the layer below it."""
    kind, f, slope = FUNCTIONS[name]
    variance = 1 / 3 if init == "standard" else 1.0
    logs = torch.zeros(4, dtype=torch.float64)
    for seed in range(5):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(5):
            linear = nn.Linear(1000, 1000, bias=False)
            bound = math.sqrt(3 * variance / 1000)
            nn.init.uniform_(linear.weight, -bound, bound)
            layers += [linear, kind()]
        model = nn.Sequential(*layers)
        monitor = torchsat.watch(model, sample=None, errors="raise")
        output = model(torch.randn(200, 1000))
        output.backward(torch.randn_like(output))
        monitor.step()
        assert monitor.latest is not None
        rms = [known(record.grad_z_rms) for record in monitor.latest.records]
        logs += torch.tensor([math.log(low / high) for low, high in itertools.pairwise(rms)], dtype=torch.float64) / 5
        monitor.close()
    q, predicted = variance * 1.0, []
    for _ in range(4):
        predicted.append(math.sqrt(variance * expectation(lambda z: slope(z) ** 2, q)))
        q = variance * expectation(lambda z: f(z) ** 2, q)
    for measured, expected in zip(logs.exp().tolist(), predicted, strict=True):
        assert measured == pytest.approx(expected, rel=0.01)


def test_the_drifting_sigmoid_layer_of_glorot_and_bengio_fires_though_its_tails_are_empty() -> None:
    """Four layers of 300 sigmoids with the initialisation of the authors (torch's default weights, no bias), trained by SGD with rate 0.1 and batches
    of 10. Training pushes the outputs of the top hidden layer towards 0: their mean is 0.5 at first, 0.36 after 100 steps, 0.10 after 1000."""
    torch.manual_seed(0)
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    layers: list[nn.Module] = []
    for fan_in in (64, 300, 300, 300):
        layers += [nn.Linear(fan_in, 300), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(300, 10))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    events: list[torchsat.Alert] = []
    snapshots: list[torchsat.Snapshot] = []
    monitor = torchsat.watch(model, every=50, on_alert=events.append, sinks=(snapshots.append,), errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2500):
        batch = torch.randint(len(labels), (10,))
        loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    monitor.close()
    saturated = [event for event in events if event.rule == "saturated"]
    assert {event.site for event in saturated} == {"7"}
    assert "its mean derivative is" in saturated[0].message
    assert monitor.latest is not None
    top = monitor.latest["7"]
    assert known(top.saturated) < 0.01
    assert known(top.relative_derivative) < 0.40
    assert all(known(monitor.latest[site].relative_derivative) > 0.6 for site in ("1", "3", "5"))
    first = next(snapshot for snapshot in snapshots if snapshot.step == saturated[0].since)
    assert known(first["7"].saturated) < 0.01


def test_the_edges_of_saturation_are_where_the_derivative_says() -> None:
    """The edges lie where the derivative is 5 % of its peak: sigmoid'(z) = 0.0125 and tanh'(z) = 0.05. They are found by bisection here."""
    assert optimize.brentq(lambda z: FUNCTIONS["sigmoid"][2](z) - 0.0125, 0, 20) == pytest.approx(4.35654, abs=1e-5)
    assert optimize.brentq(lambda z: FUNCTIONS["tanh"][2](z) - 0.05, 0, 20) == pytest.approx(2.17827, abs=1e-5)
    z = torch.tensor([-4.36, -4.35, 4.35, 4.36])
    model = nn.Sequential(nn.Sigmoid())
    with torchsat.watch(model, errors="raise") as monitor:
        model(z.requires_grad_()).sum().backward()
        monitor.step()
        assert monitor.latest is not None
        assert (monitor.latest["0"].low, monitor.latest["0"].high) == (0.25, 0.25)
