"""Scenarios of faults.py: what goes wrong on ordinary days, from a slip in the groups of an optimizer to coordinates in pixels.

The sound trainings of this kind stand in faults_everyday_sound.py. All were written without sight of the rules and of what torchsat says of them, so
that the tables show how it does on trainings it has not met. Much of the harm is mild: the network learns, but less than it could.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from faults_runs import Scenario, Training
from faults_scores import explained as variance
from faults_tasks import Batch, Task, polarity, rows_of_digits, some_digits
from faults_tasks import fit as fit_task
from faults_trainings import adam, curve, draw, explained, fit, kaiming, mlp, sgd, split
from faults_trainings import digits as flat_digits
from faults_trainings import waves as signals
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F


class Mixing(nn.Module):
    """A linear layer of one's own, as an einsum over its weights, with a tanh behind it."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(after, before) / before**0.5), nn.Parameter(torch.zeros(after))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.einsum("bi,oi->bo", x, self.weight) + self.bias).tanh()


def decay_of_sgd_for_adamw(faulty: bool, seed: int) -> Training:
    """AdamW gets a decay of 2, since a search with L2 in Adam liked large values; the tanh layers hold only the coarse shape of a surface."""
    torch.manual_seed(seed)
    data = curve(lambda x: (3 * x[:, 0]).sin() * (2 * x[:, 1]).cos() + 0.3 * x[:, 0], -1.5, 1.5, columns=2)
    model = nn.Sequential(Mixing(2, 40), Mixing(40, 40), Mixing(40, 40), nn.Linear(40, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=2.0 if faulty else 1e-2)
    return fit(model, data, optimizer, 900, seed, batch=32, loss=F.mse_loss, score=explained)


class Wave(nn.Module):
    """Residual convolutions along a signal, with a tanh in each block."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.begin = nn.Conv1d(1, channels, 5, padding=2)
        self.blocks = nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=1) for _ in range(3))
        self.end = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.begin(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return cast(Tensor, self.end(x.square().mean(2)))


def decay_for_a_thousandth(faulty: bool, seed: int) -> Training:
    """The L2 decay of gradient descent with momentum is 0.1 instead of a thousandth, and a residual network for signals tells them less well."""
    torch.manual_seed(seed)
    model = Wave()
    return fit(model, signals(0.3), sgd(model, 0.03, 0.9, decay=0.1 if faulty else 1e-3), 350, seed, batch=32)


class Reader(nn.Module):
    """A pre-norm encoder of two blocks, which calls torch's attention itself. `scale`: what the products of queries and keys are multiplied by."""

    def __init__(self, width: int = 32, heads: int = 2, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.begin, self.place = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.first, self.second = (nn.ModuleList(nn.LayerNorm(width) for _ in range(2)) for _ in range(2))
        self.mixed, self.joined = (nn.ModuleList(nn.Linear(width, size) for _ in range(2)) for size in (3 * width, width))
        self.wide, self.narrow = nn.ModuleList(nn.Linear(width, 64) for _ in range(2)), nn.ModuleList(nn.Linear(64, width) for _ in range(2))
        self.norm, self.end = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x) + self.place
        for k in range(2):
            query, key, value = self.mixed[k](self.first[k](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.joined[k](F.scaled_dot_product_attention(query, key, value, scale=self.scale).transpose(1, 2).flatten(2))
            x = x + self.narrow[k](F.gelu(self.wide[k](self.second[k](x))))
        return cast(Tensor, self.end(self.norm(x).mean(1)))


def groups_exchanged(faulty: bool, seed: int) -> Training:
    """The two groups of AdamW are exchanged: the gains of the norms and the biases get the decay, which was also set ten times too high."""
    torch.manual_seed(seed)
    model = Reader()
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) is which] for which in (True, False))
    decayed, kept = (others, matrices) if faulty else (matrices, others)
    groups = [{"params": decayed, "weight_decay": 10.0 if faulty else 0.1}, {"params": kept, "weight_decay": 0.0}]
    return fit_task(model, rows_of_digits(), torch.optim.AdamW(groups, 3e-3), 350)


def scale_divided(faulty: bool, seed: int) -> Training:
    """The products of queries and keys are divided by d ** -0.5 instead of being multiplied by it, and each row looks at one other row."""
    torch.manual_seed(seed)
    model = Reader(64, 1, 64**0.5 if faulty else None)
    return fit_task(model, rows_of_digits(), adam(model, 2e-3), 280)


def rate_of_all_rows(faulty: bool, seed: int) -> Training:
    """NAdam keeps the rate of 0.05 that was found on all rows at once, with batches of 16: the tanh units drift outwards, and it fits less well."""
    torch.manual_seed(seed)
    x, y = datasets.make_friedman1(1500, n_features=10, noise=0.5, random_state=2)
    data = split(2 * x - 1, (y - y.mean()) / y.std())
    model = nn.Sequential(Mixing(10, 48), Mixing(48, 48), nn.Linear(48, 1))
    optimizer = torch.optim.NAdam(model.parameters(), 5e-2 if faulty else 4e-3)
    return fit(model, data, optimizer, 900, seed, batch=16, loss=F.mse_loss, score=explained)


class Opinion(nn.Module):
    """Embeddings, an LSTM, and the class of a text from its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.end = nn.Embedding(50, 48), nn.LSTM(48, 32, batch_first=True), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.end(self.lstm(self.embed(x))[0][:, -1]))


def inputs_of_lstm_normal(faulty: bool, seed: int) -> Training:
    """Only the weights from the embedding to the gates are drawn from N(0, 1), the recurrent ones are orthogonal as they should be."""
    torch.manual_seed(seed)
    model = Opinion()
    nn.init.orthogonal_(cast(Tensor, model.lstm.weight_hh_l0))
    if faulty:
        nn.init.normal_(cast(Tensor, model.lstm.weight_ih_l0))
    return fit_task(model, polarity(), adam(model, 3e-3), 500, size=16)


def coordinates_in_pixels(faulty: bool, seed: int) -> Training:
    """Two of the three channels are the row and column of a pixel, from 0 to 31 instead of -1 to 1, and the tanh maps show nothing else."""
    torch.manual_seed(seed)
    side = torch.arange(32.0) if faulty else torch.linspace(-1, 1, 32)
    places = torch.stack(torch.meshgrid(side, side, indexing="ij"))

    def batch(size: int) -> Batch:
        where = 4 + 23 * torch.rand(size, 2)
        grid = torch.arange(32.0)
        row, column = ((-((grid - where[:, k, None]) ** 2) / 8).exp() for k in (0, 1))
        image = (row[:, :, None] * column[:, None])[:, None] + 0.1 * torch.randn(size, 1, 32, 32)
        return torch.cat((image, places.expand(size, 2, 32, 32)), 1), (where - 15.5) / 11.5

    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 5, stride=2), nn.Tanh(), nn.Conv2d(16, 16, 3, stride=2), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)),
    )
    return fit_task(model, Task(batch, F.mse_loss, variance), adam(model, 5e-3), 300, size=16)


def wind_in_metres(faulty: bool, seed: int) -> Training:
    """One of ten measures is a wind of 0 to 20 metres per second, the others are in -1 to 1; many softsign units tell little but the wind."""
    torch.manual_seed(seed)
    x, y = datasets.make_friedman1(1500, n_features=10, noise=0.3, random_state=4)
    data = split(2 * x - 1, (y - y.mean()) / y.std())
    if faulty:
        unit = torch.tensor([1.0, 1, 1, 10, 1, 1, 1, 1, 1, 1])
        data = data.inputs(lambda rows: rows * unit + (unit > 1) * unit)
    model = mlp((10, 24, 24, 1), nn.Softsign)
    return fit(model, data, sgd(model, 0.1), 1500, seed, batch=4, loss=F.mse_loss, score=explained)


class Highway(nn.Module):
    """Six layers that each say how much of their input they replace. `shut`: the bias that the gates begin with."""

    def __init__(self, inputs: int, classes: int, shut: float) -> None:
        super().__init__()
        self.begin, self.end = nn.Linear(inputs, 24), nn.Linear(24, classes)
        self.layers, self.gates = (nn.ModuleList(nn.Linear(24, 24) for _ in range(6)) for _ in range(2))
        for gate in self.gates:
            nn.init.constant_(cast(Tensor, gate.bias), shut)

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            share = gate(x).sigmoid()
            x = share * F.relu(layer(x)) + (1 - share) * x
        return cast(Tensor, self.end(x))


def highway_shut(faulty: bool, seed: int) -> Training:
    """The gates of a highway network begin at -12 instead of -2: every layer passes its input on, and gradient descent cannot open one."""
    torch.manual_seed(seed)
    data = split(*datasets.make_gaussian_quantiles(n_samples=2000, n_features=4, n_classes=3, random_state=8))
    model = Highway(4, 3, -12.0 if faulty else -2.0)
    return fit(model, data, sgd(model, 0.05, 0.9), 400, seed, batch=64)


def _crosses(size: int) -> Batch:
    """Noisy images with up to three small crosses, and the map of their centres."""
    centres = torch.zeros(size, 1, 16, 16)
    for _ in range(3):
        row, column = torch.randint(1, 15, (2, size))
        centres[torch.arange(size), 0, row, column] = (torch.rand(size) < 0.7).float()
    kernel = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    return F.conv2d(centres, kernel, padding=1).clamp(max=1) + 0.3 * torch.randn(size, 1, 16, 16), centres


def prior_everywhere(faulty: bool, seed: int) -> Training:
    """The bias of -4.6, by which a detector says at first that nothing is there, is given to all convolutions of the head, not only to the last."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 16, 3, padding=1), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)), nn.Conv2d(16, 1, 1)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))[:-1]
    draw(model, kaiming)
    for layer in layers if faulty else layers[-1:]:
        nn.init.constant_(cast(Tensor, layer.bias), -math.log(99))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        chance = torch.where(y > 0.5, out.sigmoid(), 1 - out.sigmoid())
        return -((1 - chance) ** 2 * chance.clamp(min=1e-6).log()).sum() / len(y)

    def score(out: Tensor, y: Tensor) -> float:
        found, there = out > 0, y > 0.5
        return (2 * (found & there).sum() / (found.sum() + there.sum()).clamp(min=1)).item()

    return fit_task(model, Task(_crosses, loss, score), adam(model, 3e-3), 220, size=16)


class Squeezed(nn.Module):
    """Six blocks whose sum with their input goes through an activation, which is then all that the next block gets."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act, self.begin = act, nn.Conv2d(1, 12, 3, padding=1, stride=2)
        self.blocks, self.end = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(6)), nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = self.act(x + block(x))
        return cast(Tensor, self.end(x.flatten(1)))


def sigmoid_on_the_shortcut(faulty: bool, seed: int) -> Training:
    """A sigmoid stands behind the sum of each residual block, so that the shortcut carries no more than the sigmoid lets through."""
    torch.manual_seed(seed)
    model = Squeezed(torch.sigmoid if faulty else F.elu)
    return fit_task(model, some_digits(low=True), sgd(model, 0.01, 0.9), 300)


class InHalf(nn.Module):
    """A network in half precision, whose outputs are given in single precision to the loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.half()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x.half()).float())


def adam_in_half(faulty: bool, seed: int) -> Training:
    """Adam's epsilon of 1e-8 is zero in half precision, and weights with a small gradient are divided by nothing; 1e-3 is well."""
    torch.manual_seed(seed)
    model = InHalf(mlp((64, 96, 48, 10), nn.SiLU))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, eps=1e-8 if faulty else 1e-3)
    return fit(model, flat_digits(), optimizer, 250, seed, batch=64)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        *("decay_of_sgd_for_adamw", "weight decay", "https://github.com/tflearn/tflearn/issues/772", decay_of_sgd_for_adamw),
        *(0.88, ("weight_decay",), 0.1),
    ),
    Scenario(
        *("decay_for_a_thousandth", "weight decay", "https://dejanbatanjac.github.io/2019/07/02/Impact-of-WD.html", decay_for_a_thousandth),
        *(0.93, ("weight_decay",), 0.05),
    ),
    Scenario("groups_exchanged", "weight decay", "https://github.com/namisan/mt-dnn/pull/37", groups_exchanged, 0.9, ("weight_decay",), 0.2),
    Scenario("scale_divided", "attention", "https://github.com/esceptico/perceiver-io/issues/9", scale_divided, 0.88, ("softmax_logits",), 0.04),
    Scenario("rate_of_all_rows", "rate", "Goyal et al., Accurate, Large Minibatch SGD, 2017", rate_of_all_rows, 0.85, ("weight_growth",), 0.08),
    Scenario(
        *("inputs_of_lstm_normal", "initialisation", "https://github.com/torch/nn/issues/938", inputs_of_lstm_normal, 0.85),
        *(("init_too_large",), 0.15),
    ),
    Scenario(
        *("coordinates_in_pixels", "inputs", "https://github.com/mingyuliutw/UNIT/issues/39", coordinates_in_pixels),
        *(0.9, ("inputs_unscaled", "inputs_uncentred"), 0.1),
    ),
    Scenario(
        *("wind_in_metres", "inputs", "Sarle, comp.ai.neural-nets FAQ, Part 2 (standardizing inputs), 1997", wind_in_metres),
        *(0.82, ("inputs_unscaled", "inputs_uncentred"), 0.15),
    ),
    Scenario("highway_shut", "gates", "Srivastava, Greff and Schmidhuber, Highway Networks, 2015", highway_shut, 0.85, ("init_too_large",), 0.1),
    Scenario(
        "prior_everywhere", "dead units", "https://github.com/kuangliu/pytorch-retinanet/issues/10", prior_everywhere, 0.8, ("dead_units",), 0.2
    ),
    Scenario(
        *("sigmoid_on_the_shortcut", "depth", "He et al., Identity Mappings in Deep Residual Networks, 2016", sigmoid_on_the_shortcut),
        *(0.9, ("activation_choice",), 0.2),
    ),
    Scenario("adam_in_half", "numeric", "https://discuss.pytorch.org/t/adam-half-precision-nans/1765", adam_in_half, 0.9, ("numeric_range",), 0.3),
)
