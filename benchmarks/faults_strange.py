"""Scenarios of faults.py that no limit was tuned on: tables, signals, images and recurrent layers. The rest of them stands in faults_stranger.py.

They were written without sight of the rules and of what torchsat says of them, so that the tables show how it does on trainings it has not met.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from faults_runs import Scenario, Training
from faults_scores import explained as variance
from faults_tasks import Batch, Task, automaton, waves
from faults_tasks import fit as fit_task
from faults_trainings import Data, adam, cancer, curve, digits, draw, explained, fit, logistic, mixture, mlp, sgd, split, xavier
from faults_trainings import waves as signals
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

RECIPE = "Karpathy, A Recipe for Training Neural Networks, 2019"
CS231N = "https://cs231n.github.io/neural-networks-3/"


def _blob(size: int, side: int = 12) -> Batch:
    """Images with one bright spot, and its row and column in pixels."""
    place = 1 + (side - 3) * torch.rand(size, 2)
    grid = torch.arange(float(side))
    row, column = ((-((grid - place[:, k, None]) ** 2) / 3).exp() for k in (0, 1))
    return (row[:, :, None] * column[:, None])[:, None] + 0.05 * torch.randn(size, 1, side, side), place


def spot_in_pixels(faulty: bool, seed: int) -> Training:
    """A network that finds a spot ends in a sigmoid, and its targets are pixels up to 10; divided by the side of the image they fit."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ELU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ELU(), nn.Flatten()),
        *(nn.Linear(144, 32), nn.ELU(), nn.Linear(32, 2), nn.Sigmoid()),
    )

    def batch(size: int) -> Batch:
        x, place = _blob(size)
        return x, place if faulty else place / 12

    return fit_task(model, Task(batch, F.mse_loss, variance), adam(model, 3e-3), 300)


def noise_behind_tanh(faulty: bool, seed: int) -> Training:
    """A small diffusion model is to tell the noise in a point; a tanh at its end cannot say noise beyond one deviation."""
    torch.manual_seed(seed)
    model = mlp((3, 64, 64, 2), nn.SiLU)
    if faulty:
        model.append(nn.Tanh())
    points = torch.from_numpy(datasets.make_moons(2000, noise=0.03, random_state=1)[0]).float()
    points = (points - points.mean(0)) / (3 * points.std(0))

    def batch(size: int) -> Batch:
        clean, noise, time = points[torch.randint(2000, (size,))], torch.randn(size, 2), torch.rand(size, 1)
        return torch.cat((clean * (1 - time).sqrt() + noise * time.sqrt(), time), 1), noise

    return fit_task(model, Task(batch, F.mse_loss, variance), adam(model, 5e-3), 500, size=128)


def softmax_over_one(faulty: bool, seed: int) -> Training:
    """A classifier of two classes has one output with a softmax over it, which is one whatever the input is."""
    torch.manual_seed(seed)
    model = nn.Sequential(*mlp((30, 24, 1), nn.GELU), nn.Softmax(1) if faulty else nn.Sigmoid())

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy(out.flatten(), y.float())

    def score(out: Tensor, y: Tensor) -> float:
        return ((out.flatten() > 0.5).long() == y).float().mean().item()

    return fit(model, cancer().standardized(), adam(model, 3e-3), 250, seed, batch=32, loss=loss, score=score)


def sigmoid_signals(faulty: bool, seed: int) -> Training:
    """Five convolutions along a signal with sigmoids between them, by gradient descent; exponential units learn at the same rate."""
    torch.manual_seed(seed)
    act = nn.Sigmoid if faulty else nn.ELU
    layers = [module for k in range(5) for module in (nn.Conv1d(1 if k == 0 else 12, 12, 5, padding=2, stride=1 + k % 2), act())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3))
    return fit(model, signals(), sgd(model, 0.01, 0.9), 400, seed, batch=32)


def sigmoid_autoencoder(faulty: bool, seed: int) -> Training:
    """An autoencoder of seven layers has a sigmoid behind each, as the old papers drew it, and gives the mean image for every digit."""
    torch.manual_seed(seed)
    act = nn.Sigmoid if faulty else nn.ELU
    model = nn.Sequential(*mlp((64, 48, 32, 16, 16, 32, 48, 64), act), nn.Sigmoid())
    data = digits()
    images = Data(data.x, data.x, data.test_x, data.test_x)

    def score(out: Tensor, x: Tensor) -> float:
        return 1 - ((out - x).square().sum() / (x - x.mean(0)).square().sum()).item()

    return fit(model, images, adam(model, 3e-3), 500, seed, batch=64, loss=F.binary_cross_entropy, score=score)


def sigmoid_rings_normed(faulty: bool, seed: int) -> Training:
    """Six weight-normalised sigmoid layers with RMSprop on rings of points; the rectifier twin needs no longer than this."""
    torch.manual_seed(seed)
    model = mlp((5, 32, 32, 32, 32, 32, 32, 3), nn.Sigmoid if faulty else nn.LeakyReLU)
    for module in model:
        if isinstance(module, nn.Linear):
            weight_norm(module)
    data = split(*datasets.make_gaussian_quantiles(n_samples=2000, n_features=5, n_classes=3, random_state=4))
    return fit(model, data, torch.optim.RMSprop(model.parameters(), 1e-3), 500, seed, batch=32)


class Projection(nn.Module):
    """A linear layer of one's own: a parameter that is drawn with the deviation that is given."""

    def __init__(self, before: int, after: int, deviation: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(deviation * torch.randn(before, after))
        self.bias = nn.Parameter(torch.zeros(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight + self.bias)


def own_layers_hundredth(faulty: bool, seed: int) -> Training:
    """Six layers of one's own draw their weights with the deviation 0.01 of old tutorials; the signal is gone before it reaches the end."""
    torch.manual_seed(seed)
    widths = (20, *[96] * 6)
    layers = [Projection(a, b, 0.01 if faulty else a**-0.5) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers, nn.Linear(96, 4))
    return fit(model, mixture(), sgd(model, 0.05, 0.9), 300, seed, batch=32)


def gru_orthogonal_gain(faulty: bool, seed: int) -> Training:
    """The recurrent weights of a GRU are orthogonal, as advised, with a gain of 12 that was meant for another layer."""
    torch.manual_seed(seed)
    recurrent = nn.GRU(1, 32, batch_first=True)
    model = Last(recurrent, 32, 1)
    for part in recurrent.get_parameter("weight_hh_l0").chunk(3):
        nn.init.orthogonal_(part, 12.0 if faulty else 1.0)
    return fit_task(model, waves(14), adam(model, 5e-3), 300, size=32)


class Last(nn.Module):
    """A recurrent layer and a linear one behind its last state, or behind each state."""

    def __init__(self, recurrent: nn.Module, width: int, out: int, each: bool = False) -> None:
        super().__init__()
        self.recurrent, self.out, self.each = recurrent, nn.Linear(width, out), each

    def forward(self, x: Tensor) -> Tensor:
        states = self.recurrent(x)[0]
        return cast(Tensor, self.out(states if self.each else states[:, -1]))


def _moving(size: int, frames: int = 4, side: int = 6) -> Batch:
    """Films in which a spot moves up, down, left or right, and which of the four it is."""
    kind = torch.randint(4, (size,))
    start = torch.randint(side, (size, 2))
    way = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])[kind]
    films = torch.zeros(size, frames, side, side)
    for frame in range(frames):
        place = (start + frame * way) % side
        films[torch.arange(size), frame, place[:, 0], place[:, 1]] = 1.0
    return films + 0.05 * torch.randn_like(films), kind


def films_normal(faulty: bool, seed: int) -> Training:
    """Convolutions over films draw their weights from a normal distribution with deviation 1, and their tanh units stand in the tails."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv3d(1, 8, (2, 3, 3), padding=(0, 1, 1)), nn.Tanh(), nn.Conv3d(8, 12, (2, 2, 2), stride=(1, 2, 2)), nn.Tanh()),
        *(nn.Conv3d(12, 16, (2, 2, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4)),
    )
    for module in model:
        if isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight) if faulty else nn.init.xavier_normal_(module.weight)

    def batch(size: int) -> Batch:
        films, kind = _moving(size)
        return 3 * films[:, None], kind

    return fit_task(model, Task(batch), adam(model, 5e-3), 300, size=16)


def decibels(faulty: bool, seed: int) -> Training:
    """The spectra of signals are given in decibels between -90 and 0 to convolutions with tanh; about their mean they lie well."""
    torch.manual_seed(seed)
    raw = signals().inputs(lambda x: 10 * (torch.fft.rfft(x, dim=2).abs().square() / 600 + 1e-6).log10() - 25)
    data = raw if faulty else raw.standardized()
    model = nn.Sequential(nn.Conv1d(1, 16, 3), nn.Tanh(), nn.Conv1d(16, 16, 3), nn.Tanh(), nn.Flatten(), nn.Linear(208, 3))
    return fit(model, data, sgd(model, 0.02, 0.9), 300, seed, batch=16)


def seconds_of_the_day(faulty: bool, seed: int) -> Training:
    """The load of a grid is to be told from the second of the day, 0 to 86400, and from the temperature, with no scaling."""
    torch.manual_seed(seed)
    data = curve(lambda x: torch.sin(3.1 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 0], -1.0, 1.0, 2)
    if faulty:
        data = data.inputs(lambda x: torch.stack((43200 * (x[:, 0] + 1), 10 + 15 * x[:, 1]), 1))
    model = mlp((2, 40, 40, 1), nn.Softsign)
    return fit(model, data, adam(model, 5e-3), 400, seed, batch=32, loss=F.mse_loss, score=explained)


def norm_shift_minus_four(faulty: bool, seed: int) -> Training:
    """The shifts of batch normalisations begin at -4, so that the rectifiers behind them see nothing above zero."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(144, 10))
    if faulty:
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, -4.0)
    return fit(model, digits(), sgd(model, 0.02, 0.9), 250, seed, batch=32)


def beats_one_by_one(faulty: bool, seed: int) -> Training:
    """Signals come one by one, at the rate and momentum that were right for batches of 64; the rectifiers die of single samples."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv1d(1, 16, 5), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(16, 16, 5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(160, 32), nn.ReLU(), nn.Linear(32, 3)),
    )
    return fit(model, signals(0.05), sgd(model, 0.1 if faulty else 0.002, 0.9), 600, seed, batch=1)


class Residual(nn.Module):
    """A tanh branch with two convolutions that is added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(channels, channels, 3, padding=1), nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.two(self.one(x).tanh()))


def nadam_residual(faulty: bool, seed: int) -> Training:
    """NAdam at 0.3 takes the first steps of a residual network for signals, where 0.003 is right."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv1d(1, 12, 5, stride=2), Residual(12), Residual(12), Residual(12), nn.Flatten(), nn.Linear(168, 3))
    return fit(model, signals(), torch.optim.NAdam(model.parameters(), 0.3 if faulty else 3e-3), 250, seed, batch=32)


def warm_restart(faulty: bool, seed: int) -> Training:
    """A cosine schedule restarts at step 200; its restart takes the peak of another run, a hundred times the first one."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 64, 64, 10), nn.Tanh), xavier)

    def rate(step: int) -> float:
        peak = 4.0 if faulty and step >= 200 else 0.04
        return peak * (0.52 + 0.48 * math.cos(math.pi * (step % 200) / 200))

    return fit(model, digits().standardized(), sgd(model, 0.04, 0.9), 400, seed, batch=32, rate=rate)


class Signs(torch.optim.Optimizer):
    """Each weight moves by the rate against the sign of its gradient's average."""

    def __init__(self, parameters: object, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 0.1)
                weight.sub_(average.sign(), alpha=group["lr"])


def signs_too_fast(faulty: bool, seed: int) -> Training:
    """An optimizer that steps by signs has the rate that Adam had at its best, and its weights walk off without a bound."""
    torch.manual_seed(seed)
    model = draw(mlp((64, 64, 48, 10), nn.Tanh), xavier)
    return fit(model, digits().standardized(), Signs(model.parameters(), 0.05 if faulty else 5e-4), 400, seed, batch=32)


def sum_of_magnitudes(faulty: bool, seed: int) -> Training:
    """The sum of all magnitudes of the weights is added to the loss with the factor that was meant for their mean."""
    torch.manual_seed(seed)
    model = mlp((64, 64, 32, 10), nn.Tanh)
    weights = [weight for weight in model.parameters() if weight.ndim > 1]

    def penalty() -> Tensor:
        return (0.03 if faulty else 1e-5) * torch.stack([weight.abs().sum() for weight in weights]).sum()

    return fit(model, digits().standardized(), adam(model, 2e-3), 400, seed, batch=64, penalty=penalty)


def angle_of_rotation(faulty: bool, seed: int) -> Training:
    """The loss is the angle between directions, by the arc cosine of their product; where they agree to the last bit its slope has no bound."""
    torch.manual_seed(seed)
    model = mlp((3, 48, 48, 2), nn.Tanh)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 3)
        angle = x[:, 0] + 0.5 * x[:, 1].sin()
        return x, torch.stack((angle.cos(), angle.sin()), 1)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        cosine = (F.normalize(out, dim=1) * y).sum(1)
        limit = 1.0 if faulty else 1 - 1e-4
        return cosine.clamp(-limit, limit).acos().mean()

    def score(out: Tensor, y: Tensor) -> float:
        value = (F.normalize(out, dim=1) * y).sum(1).mean().item()
        return value if math.isfinite(value) else -1.0

    return fit_task(model, Task(batch, loss, score), adam(model, 3e-3), 400, size=128)


def entropy_of_zero(faulty: bool, seed: int) -> Training:
    """The entropy of logits with a temperature is taken as p log p of the probabilities; once one is zero, every weight is not a number."""
    torch.manual_seed(seed)
    model = mlp((64, 64, 64, 10), nn.Tanh)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        logits = out / 0.008
        p = logits.softmax(1)
        logs = p.log() if faulty else logits.log_softmax(1)
        return F.cross_entropy(logits, y) + 0.01 * (p * logs).sum(1).mean()

    data = digits().standardized()
    return fit(model, data, adam(model, 1e-3), 300, seed, batch=64, loss=loss)


def raw_and_sigmoids(faulty: bool, seed: int) -> Training:
    """Raw columns of tumours go through four layers of sigmoids by momentum: either would do harm alone."""
    torch.manual_seed(seed)
    data = cancer() if faulty else cancer().standardized()
    model = mlp((30, 20, 20, 20, 20, 1), nn.Sigmoid if faulty else nn.ELU)
    return fit(model, data, sgd(model, 0.02, 0.9), 300, seed, batch=16, loss=logistic)


def pressures_and_rate(faulty: bool, seed: int) -> Training:
    """A GRU reads air pressures about 1013, and RMSprop has a rate of 0.1: its gates are shut by the first and driven further by the second."""
    torch.manual_seed(seed)
    model = Last(nn.GRU(1, 24, batch_first=True), 24, 1)
    task = waves(14, scale=8.0, mean=1013.0) if faulty else waves(14)
    return fit_task(model, task, torch.optim.RMSprop(model.parameters(), 0.1 if faulty else 3e-3), 300)


class Minimal(nn.Module):
    """A recurrent layer with one gate that says how much of the state is replaced."""

    def __init__(self, inputs: int, width: int, bias: float) -> None:
        super().__init__()
        self.gate, self.new, self.width = nn.Linear(inputs + width, width), nn.Linear(inputs + width, width), width
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        state, states = x.new_zeros(len(x), self.width), []
        for now in x.unbind(1):
            share = torch.sigmoid(self.gate(torch.cat((now, state), 1)))
            state = state + share * (torch.tanh(self.new(torch.cat((now, share * state), 1))) - state)
            states.append(state)
        return torch.stack(states, 1), None


def minimal_gate_shut(faulty: bool, seed: int) -> Training:
    """The gate of a minimal gated unit begins with a bias of -9, so that nothing is written to its state."""
    torch.manual_seed(seed)
    model = Last(Minimal(2, 32, -9.0 if faulty else 0.0), 32, 3, each=True)
    return fit_task(model, automaton(8), adam(model, 1e-2), 350, size=32, clip=1.0)


class Dilated(nn.Module):
    """Gated convolutions with growing gaps, as in WaveNet, over signals."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv1d(1, width, 1), nn.Linear(width, 3)
        self.layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**k) for k in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for k, layer in enumerate(self.layers):
            value, gate = layer(F.pad(x, (2**k, 0))).chunk(2, 1)
            x = x + value.tanh() * gate.sigmoid()
        return cast(Tensor, self.leave(x.mean(2)))


def gated_convolutions_rate(faulty: bool, seed: int) -> Training:
    """Gated convolutions get momentum at a rate of 1.5, where 0.1 is right, and their gates and values go to the tails for good."""
    torch.manual_seed(seed)
    model = Dilated(12)
    return fit(model, signals(0.1), sgd(model, 1.5 if faulty else 0.1, 0.9), 300, seed, batch=32)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        "spot_in_pixels",
        "outputs",
        "Nibali et al., Numerical Coordinate Regression, arXiv 1801.07372",
        spot_in_pixels,
        0.9,
        ("activation_choice",),
        0.5,
    ),
    Scenario(
        "noise_behind_tanh",
        "outputs",
        "Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020",
        noise_behind_tanh,
        0.75,
        ("activation_choice",),
        0.06,
    ),
    Scenario(
        "softmax_over_one", "outputs", "Brownlee, Softmax Activation Function with Python, 2020", softmax_over_one, 0.93, ("activation_choice",), 0.2
    ),
    Scenario("sigmoid_signals", "depth", "Glorot and Bengio, Understanding the difficulty, 2010", sigmoid_signals, 0.9, ("activation_choice",), 0.3),
    Scenario(
        "sigmoid_autoencoder",
        "depth",
        "Hinton and Salakhutdinov, Reducing the Dimensionality of Data with Neural Networks, 2006",
        sigmoid_autoencoder,
        0.5,
        ("activation_choice",),
        0.3,
    ),
    Scenario(
        "sigmoid_rings_normed", "depth", "Salimans and Kingma, Weight Normalization, 2016", sigmoid_rings_normed, 0.85, ("activation_choice",), 0.3
    ),
    Scenario("own_layers_hundredth", "initialisation", RECIPE, own_layers_hundredth, 0.8, ("init_too_small",), 0.3),
    Scenario(
        "gru_orthogonal_gain",
        "initialisation",
        "Saxe, McClelland and Ganguli, Exact solutions, 2014",
        gru_orthogonal_gain,
        0.8,
        ("init_too_large",),
        0.2,
    ),
    Scenario(
        "films_normal",
        "initialisation",
        "Tran et al., Learning Spatiotemporal Features with 3D Convolutional Networks, 2015",
        films_normal,
        0.75,
        ("init_too_large",),
        0.2,
    ),
    Scenario("decibels", "inputs", RECIPE, decibels, 0.85, ("inputs_uncentred", "inputs_unscaled"), 0.1),
    Scenario("seconds_of_the_day", "inputs", RECIPE, seconds_of_the_day, 0.9, ("inputs_unscaled",), 0.3),
    Scenario(
        "norm_shift_minus_four",
        "dead units",
        "Mehta et al., On Implicit Filter Level Sparsity in CNNs, 2019",
        norm_shift_minus_four,
        0.9,
        ("dead_units",),
        0.2,
    ),
    Scenario("beats_one_by_one", "dead units", CS231N, beats_one_by_one, 0.8, ("weight_growth", "dead_units"), 0.2),
    Scenario("nadam_residual", "rate", "Dozat, Incorporating Nesterov Momentum into Adam, 2016", nadam_residual, 0.9, ("weight_growth",), 0.2),
    Scenario("warm_restart", "rate", "Loshchilov and Hutter, SGDR, 2017", warm_restart, 0.93, ("weight_growth",), 0.1),
    Scenario(
        "signs_too_fast", "rate", "Chen et al., Symbolic Discovery of Optimization Algorithms, 2023", signs_too_fast, 0.93, ("weight_growth",), 0.05
    ),
    Scenario("sum_of_magnitudes", "weight decay", RECIPE, sum_of_magnitudes, 0.93, ("weight_decay",), 0.2),
    Scenario("angle_of_rotation", "numeric", "https://github.com/kornia/kornia/issues/4007", angle_of_rotation, 0.95, ("numeric_range",), 0.3),
    Scenario("entropy_of_zero", "numeric", RECIPE, entropy_of_zero, 0.88, ("numeric_range",), 0.3),
    Scenario("raw_and_sigmoids", "several", RECIPE, raw_and_sigmoids, 0.93, ("inputs_unscaled", "activation_choice"), 0.2),
    Scenario("pressures_and_rate", "several", RECIPE, pressures_and_rate, 0.8, ("inputs_uncentred", "weight_growth"), 0.3),
    Scenario(
        "minimal_gate_shut",
        "gates",
        "Zhou et al., Minimal Gated Unit for Recurrent Neural Networks, 2016",
        minimal_gate_shut,
        0.85,
        ("init_too_large",),
        0.2,
    ),
    Scenario("gated_convolutions_rate", "gates", "van den Oord et al., WaveNet, 2016", gated_convolutions_rate, 0.85, ("weight_growth",), 0.2),
)
