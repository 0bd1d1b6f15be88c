"""Scenarios of faults.py: probabilities, gates and codes, whose plateaus are often where they are meant to be."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from faults_runs import Scenario, Training
from faults_scores import accuracy
from faults_supervised import agreement, digits, split, stacked, supervised, tabular
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F


def points(name: str, count: int = 800, noise: float = 0.1, **more: float) -> tuple[Tensor, Tensor]:
    """Two classes of points in the plane: `moons` or `circles`."""
    x, y = getattr(datasets, f"make_{name}")(count, noise=noise, random_state=0, **more)
    return torch.tensor(x).float(), torch.tensor(y).float()[:, None]


def sure_moons(faulty: bool, seed: int) -> Training:
    """A classifier of two moons is trained until its sigmoid output is sure of nearly every point."""
    torch.manual_seed(seed)
    model = stacked([2, 32, 32, 1], nn.ReLU, nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return supervised(model, optimizer, split(*points("moons")), F.binary_cross_entropy, agreement, 1000, 64, seed)


def rare_positives(faulty: bool, seed: int) -> Training:
    """Two in a hundred samples are positive, and the sigmoid output rightly stays on its lower plateau for the others."""
    torch.manual_seed(seed)
    x, y = datasets.make_classification(3000, 12, n_informative=6, weights=[0.98], class_sep=2.0, flip_y=0.0, random_state=0)
    data = split(torch.tensor(x).float(), torch.tensor(y).float()[:, None])
    model = stacked([12, 24, 1], nn.Tanh, nn.Sigmoid())

    def balanced(output: Tensor, target: Tensor) -> float:
        right = ((output > 0.5) == (target > 0.5)).float()
        return float(right[target > 0.5].mean() + right[target < 0.5].mean()) / 2

    return supervised(model, torch.optim.Adam(model.parameters(), 5e-3), data, F.binary_cross_entropy, balanced, 900, 64, seed)


class Detector(nn.Module):
    """Two convolutions and a map of probabilities whose offset starts at a small prior, as in RetinaNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        nn.init.constant_(self.head.bias, -math.log(0.99 / 0.01))  # type: ignore[arg-type]
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(F.relu(self.second(F.relu(self.first(x))))))


def blobs(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Noisy images with a bright cross at a random place each, and the map of the centres."""
    centre = torch.zeros(count, 1, size, size)
    places = torch.randint(1, size - 1, (count, 2))
    centre[torch.arange(count), 0, places[:, 0], places[:, 1]] = 1
    cross = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return F.conv2d(centre, cross, padding=1) + 0.3 * torch.randn(count, 1, size, size), centre


def focal_prior(faulty: bool, seed: int) -> Training:
    """A detector under the focal loss starts with the prior 0.01, on the lower plateau of its sigmoid, and stays there where there is no object."""
    torch.manual_seed(seed)
    model = Detector()

    def focal(output: Tensor, target: Tensor) -> Tensor:
        right = torch.where(target > 0.5, output, 1 - output).clamp(min=1e-6)
        weight = torch.where(target > 0.5, 0.25, 0.75)
        return -(weight * (1 - right) ** 2 * right.log()).sum() / target.sum()

    def found(output: Tensor, target: Tensor) -> float:
        return float((output.flatten(1).argmax(1) == target.flatten(1).argmax(1)).float().mean())

    return supervised(model, torch.optim.Adam(model.parameters(), 3e-3), split(*blobs(400, 12)), focal, found, 500, 16, seed)


def rare_labels(faulty: bool, seed: int) -> Training:
    """Forty labels, most of them rare, share a network with sigmoid outputs; nearly all outputs are rightly close to 0."""
    torch.manual_seed(seed)
    teacher = torch.randn(20, 40, generator=torch.Generator().manual_seed(7)) / 20**0.5
    x = torch.randn(2000, 20)
    y = (x @ teacher > torch.linspace(0.8, 2.0, 40)).float()
    model = stacked([20, 64, 40], nn.Tanh, nn.Sigmoid())

    def f1(output: Tensor, target: Tensor) -> float:
        hit = ((output > 0.5) & (target > 0.5)).sum()
        return float(2 * hit / ((output > 0.5).sum() + target.sum()))

    return supervised(model, torch.optim.Adam(model.parameters(), 5e-3), split(x, y), F.binary_cross_entropy, f1, 1000, 32, seed)


def binary_autoencoder(faulty: bool, seed: int) -> Training:
    """An autoencoder of black and white digits, whose sigmoid outputs rightly saturate, has thirty times the rate that suits it. The twin has not."""
    torch.manual_seed(seed)
    pixels = (digits()[0] > 0.4).float()
    x, _, kept, _ = split(pixels, pixels)
    model = stacked([64, 48, 24, 48, 64], nn.Tanh, nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), 0.15 if faulty else 4e-3)
    return supervised(model, optimizer, (x, x, kept, kept), F.binary_cross_entropy, agreement, 800, 64, seed)


class Unet(nn.Module):
    """A small U-Net with one skip connection and a sigmoid map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ConvTranspose2d(16, 8, 2, 2)
        self.norm, self.out = nn.BatchNorm2d(16), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.down(x))
        b = torch.relu(self.up(torch.relu(self.norm(self.deep(a)))))
        return self.out(torch.cat([a, b], 1)).sigmoid()  # type: ignore[no-any-return]


def discs(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Noisy images of one disc each, and the masks of the discs."""
    grid = torch.arange(size).float()
    centre, radius = torch.rand(count, 2, 1, 1) * (size - 6) + 3, torch.rand(count, 1, 1) * 2 + 1.5
    mask = ((grid[None, :, None] - centre[:, 0]) ** 2 + (grid[None, None, :] - centre[:, 1]) ** 2 < radius**2).float()[:, None]
    return mask + 0.4 * torch.randn(count, 1, size, size), mask


def dice_loss(output: Tensor, target: Tensor) -> Tensor:
    """One minus the soft Dice coefficient of a batch."""
    return 1 - (2 * (output * target).sum() + 1e-6) / (output.sum() + target.sum() + 1e-6)


def dice(output: Tensor, target: Tensor) -> float:
    """The Dice coefficient of thresholded maps."""
    return 1 - float(dice_loss((output > 0.5).float(), target))


def masks(faulty: bool, seed: int) -> Training:
    """A U-Net segments discs under the Dice loss; its sigmoid map rightly lies on both plateaus. The faulty one has a rate of 1."""
    torch.manual_seed(seed)
    model = Unet()
    optimizer = torch.optim.Adam(model.parameters(), 1.0 if faulty else 1e-2)
    return supervised(model, optimizer, split(*discs(300, 16)), dice_loss, dice, 300, 8, seed)


XOR = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0], [1.0], [1.0], [0.0]])


def xor(faulty: bool, seed: int) -> Training:
    """Exclusive or with four tanh units and a sigmoid output; the faulty one draws weights with a standard deviation of 12."""
    torch.manual_seed(seed)
    model = stacked([2, 4, 1], nn.Tanh, nn.Sigmoid())
    if faulty:
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.weight, std=12.0)  # type: ignore[arg-type]
    score = lambda output, target: 1 - float((output - target).abs().mean())  # noqa: E731
    return supervised(model, torch.optim.SGD(model.parameters(), 1.0), (*XOR, *XOR), F.mse_loss, score, 1500, None, seed)


def circles(faulty: bool, seed: int) -> Training:
    """Two circles with four tanh units; the faulty one is trained with a rate of 10 and a momentum of 0.9. The twin has a rate of 0.05."""
    torch.manual_seed(seed)
    model = stacked([2, 4, 1], nn.Tanh, nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), 10.0 if faulty else 0.05, momentum=0.9)
    x, y = points("circles", noise=0.08, factor=0.4)
    return supervised(model, optimizer, split(2 * x, y), F.binary_cross_entropy, agreement, 1000, 32, seed)


class Excited(nn.Module):
    """Convolutions whose channels are weighed by a squeeze-and-excitation gate."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16 * 16, 10)
        self.squeeze, self.excite = nn.Linear(16, 8), nn.Linear(8, 16)
        nn.init.constant_(self.excite.bias, offset)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.second(F.relu(self.first(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(a.mean((2, 3))))))
        return self.out(F.max_pool2d(a * gate[:, :, None, None], 2).flatten(1))  # type: ignore[no-any-return]


def squeezed(faulty: bool, seed: int) -> Training:
    """Squeeze-and-excitation gates start with an offset of -9, shut, so that the convolutions get no gradient. The twin starts with 0."""
    torch.manual_seed(seed)
    x, y = digits()
    model = Excited(-9.0 if faulty else 0.0)
    data = split(x.reshape(-1, 1, 8, 8), y)
    return supervised(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), data, F.cross_entropy, accuracy, 300, 32, seed)


class Highway(nn.Module):
    """Highway layers whose transform gates start nearly shut."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(64, width), nn.Linear(width, 10)
        self.plain = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for gate in self.gates:
            nn.init.constant_(gate.bias, -3.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        for plain, gate in zip(self.plain, self.gates, strict=True):
            share = torch.sigmoid(gate(a))
            a = share * torch.tanh(plain(a)) + (1 - share) * a
        return self.out(a)  # type: ignore[no-any-return]


def highway(faulty: bool, seed: int) -> Training:
    """A highway network of eight layers, whose gates start at -3 on purpose, learns the digits."""
    torch.manual_seed(seed)
    model = Highway(32, 8)
    return supervised(model, torch.optim.Adam(model.parameters(), 3e-3), split(*digits()), F.cross_entropy, accuracy, 500, 32, seed)


def codes(faulty: bool, seed: int) -> Training:
    """Tanh codes for hashing are pushed to -1 and 1 on purpose by a scale that grows, as in HashNet, while a classifier reads them."""
    torch.manual_seed(seed)
    x, y = digits()

    class Hash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.code, self.head, self.calls = nn.Linear(64, 64), nn.Linear(64, 24), nn.Linear(24, 10), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            a = torch.tanh((1 + self.calls / 100) * self.code(F.relu(self.body(x))))
            return self.head(a if self.training else a.sign())  # type: ignore[no-any-return]

    model = Hash()
    return supervised(model, torch.optim.Adam(model.parameters(), 3e-3), split(x, y), F.cross_entropy, accuracy, 700, 64, seed)


def distilled(faulty: bool, seed: int) -> Training:
    """A small student learns the softened probabilities of a teacher by the Kullback-Leibler divergence at temperature 4."""
    torch.manual_seed(seed)
    x, y, kept, y_kept = split(*digits())
    teacher = stacked([64, 128, 10], nn.ReLU)
    tutor = torch.optim.Adam(teacher.parameters(), 5e-3)
    for _ in range(80):
        tutor.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        tutor.step()
    with torch.no_grad():
        soft = F.softmax(teacher(x) / 4, 1)
    model = stacked([64, 16, 10], nn.Tanh)

    def divergence(output: Tensor, target: Tensor) -> Tensor:
        return 16 * F.kl_div(F.log_softmax(output / 4, 1), target, reduction="batchmean")

    return supervised(model, torch.optim.Adam(model.parameters(), 5e-3), (x, soft, kept, y_kept), divergence, accuracy, 700, 32, seed)


class Mixture(nn.Module):
    """A mixture density network of three Gaussians over one number."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(1, 24), nn.Linear(24, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share, mean, spread = self.out(torch.tanh(self.hidden(x))).chunk(3, 1)
        return F.softmax(share, 1), mean, F.softplus(spread) + 1e-3


def log_density(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """The mean log density of the targets under the mixture."""
    share, mean, spread = output
    return torch.logsumexp((share + 1e-9).log() + torch.distributions.Normal(mean, spread).log_prob(target), 1).mean()


def mixture(faulty: bool, seed: int) -> Training:
    """A mixture density network fits the inverse of a wave, for which its mixing weights rightly become sure."""
    torch.manual_seed(seed)
    t = torch.rand(1000, 1)
    x = t + 0.3 * torch.sin(2 * math.pi * t) + 0.05 * torch.randn(1000, 1)
    model = Mixture()
    loss = lambda output, target: -log_density(output, target)  # noqa: E731
    score = lambda output, target: float(log_density(output, target))  # noqa: E731
    return supervised(model, torch.optim.Adam(model.parameters(), 5e-3), split(4 * x - 2, t), loss, score, 1000, 64, seed)


def ordinal(faulty: bool, seed: int) -> Training:
    """Ordered classes are told by sigmoids of one score against nine thresholds, of which most are far away and rightly sure."""
    torch.manual_seed(seed)
    x = torch.randn(1500, 8)
    level = (4.5 + 2.5 * (x[:, 0] + torch.sin(2 * x[:, 1]))).round().clamp(0, 9)
    y = (level[:, None] > torch.arange(9) + 0.5).float()

    class Ordinal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.thresholds = stacked([8, 32, 32, 1], nn.SiLU), nn.Parameter(torch.linspace(-4, 4, 9))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.body(x) - self.thresholds)

    def near(output: Tensor, target: Tensor) -> float:
        return float((((output > 0.5).sum(1) - target.sum(1)).abs() <= 1).float().mean())

    model = Ordinal()
    return supervised(model, torch.optim.Adam(model.parameters(), 1e-2), split(x, y), F.binary_cross_entropy, near, 900, 32, seed)


def hinge(faulty: bool, seed: int) -> Training:
    """A tanh output is trained on the labels -1 and 1 under a hinge loss, which is content once it is beyond 0.9."""
    torch.manual_seed(seed)
    x, y = tabular("breast_cancer")
    model = stacked([30, 16, 1], nn.ELU, nn.Tanh())
    loss = lambda output, target: F.relu(0.9 - output * target).mean()  # noqa: E731
    score = lambda output, target: float((output.sign() == target).float().mean())  # noqa: E731
    data = split(x, 2 * y.float()[:, None] - 1)
    return supervised(model, torch.optim.AdamW(model.parameters(), 5e-3), data, loss, score, 500, 4, seed)


class Ranker(nn.Module):
    """A score for each of two items; the output is the probability that the first one is preferred, as in RankNet."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.score = stacked([inputs, 16, 1], nn.Tanh)

    def forward(self, pair: Tensor) -> Tensor:
        first, second = pair.unbind(1)
        return torch.sigmoid(self.score(first) - self.score(second))


def ranking(faulty: bool, seed: int) -> Training:
    """Pairs of wines are ranked by their proline from the other columns; the faulty one gets these as they are, up to hundreds."""
    torch.manual_seed(seed)
    x, _ = tabular("wine", scaled=not faulty)
    order = torch.randint(len(x), (2000, 2))
    better = (x[order[:, :1], -1] > x[order[:, 1:], -1]).float()
    model = Ranker(12)
    data = split(x[order][:, :, :-1], better)
    return supervised(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), data, F.binary_cross_entropy, agreement, 600, 32, seed)


def healthy(name: str, source: str, make: Callable[[bool, int], Training], good: float) -> Scenario:
    """A scenario without a fault."""
    return Scenario(f"output_{name}", "outputs", source, make, good)


SCENARIOS: tuple[Scenario, ...] = (
    healthy("sure_moons", "scikit-learn, Varying regularization in Multi-layer Perceptron (two moons), user guide", sure_moons, 0.97),
    healthy("rare_positives", "TensorFlow tutorial, Classification on imbalanced data (credit card fraud)", rare_positives, 0.75),
    healthy("focal_prior", "Lin et al., Focal Loss for Dense Object Detection, 2017, section 4.1 (prior 0.01 at the start)", focal_prior, 0.9),
    healthy("rare_labels", "Wu et al., Distribution-Balanced Loss for Multi-Label Classification, 2020 (long tails)", rare_labels, 0.7),
    Scenario(
        "output_binary_autoencoder",
        "outputs",
        "https://github.com/anderzzz/monkey_caput/issues/2 (an autoencoder whose images turn grey)",
        binary_autoencoder,
        0.9,
        ("weight_growth",),
        0.05,
    ),
    Scenario(
        "output_dice_masks",
        "outputs",
        "https://github.com/mateuszbuda/brain-segmentation-pytorch/issues/17 (the Dice loss stays at 1; the rate may be too high)",
        masks,
        0.85,
        ("weight_growth",),
        0.2,
    ),
    Scenario(
        "output_xor_large_weights",
        "outputs",
        "https://datascience.stackexchange.com/questions/11589 (Creating neural net for xor function)",
        xor,
        0.85,
        ("init_too_large",),
        0.1,
    ),
    Scenario(
        "output_circles_hot_rate",
        "outputs",
        "TensorFlow Playground, circles with tanh units and a learning rate of 10",
        circles,
        0.95,
        ("weight_growth",),
        0.1,
    ),
    Scenario(
        "output_shut_excitation",
        "outputs",
        "Hu, Shen and Sun, Squeeze-and-Excitation Networks, 2018, section 3.2 (the gate of the channels)",
        squeezed,
        0.9,
        ("init_too_large",),
        0.1,
    ),
    healthy("highway", "Srivastava, Greff and Schmidhuber, Highway Networks, 2015, section 2.2 (negative offsets)", highway, 0.9),
    healthy("hash_codes", "Cao et al., HashNet: Deep Learning to Hash by Continuation, 2017", codes, 0.9),
    healthy("distilled", "Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015", distilled, 0.9),
    healthy("mixture_density", "Bishop, Mixture Density Networks, 1994, section 5 (the inverse of a wave)", mixture, 0.7),
    healthy("ordinal", "Niu et al., Ordinal Regression with Multiple Output CNN for Age Estimation, 2016", ordinal, 0.85),
    healthy("hinge", "Rosasco et al., Are Loss Functions All the Same?, 2004 (the hinge loss on labels -1 and 1)", hinge, 0.93),
    Scenario(
        "output_ranking_unscaled",
        "outputs",
        "Burges et al., Learning to Rank using Gradient Descent, 2005 (RankNet), with the raw columns of the wines",
        ranking,
        0.8,
        ("inputs_unscaled", "inputs_uncentred"),
        0.05,
    ),
)
