"""What the scenarios of depth, inputs, rates and healthy networks are built of: small data sets, networks and one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from faults_runs import Training
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F

Act = Callable[[], nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Data:
    """Inputs and targets to train on, and others to score on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def inputs(self, change: Callable[[Tensor], Tensor]) -> Data:
        """The same data with all inputs changed."""
        return Data(change(self.x), self.y, change(self.test_x), self.test_y)

    def standardized(self) -> Data:
        """The same data with columns of mean 0 and deviation 1 in the training part; columns without variation become 0."""
        mean, deviation = self.x.mean(0), self.x.std(0)
        return self.inputs(lambda x: (x - mean) / torch.where(deviation > 0, deviation, torch.ones_like(deviation)))


def split(x: object, y: object, share: float = 0.75) -> Data:
    """Data in a fixed random order, cut in two. Whole numbers become classes, other targets a column of floats."""
    inputs = torch.from_numpy(np.asarray(x)).float()
    targets = torch.from_numpy(np.asarray(y))
    targets = targets.float().reshape(len(targets), -1) if targets.is_floating_point() else targets.long()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(99))
    cut = round(share * len(order))
    return Data(inputs[order[:cut]], targets[order[:cut]], inputs[order[cut:]], targets[order[cut:]])


def digits() -> Data:
    """1797 images of 8 x 8 pixels in ten classes, with values from 0 to 1."""
    return split(*datasets.load_digits(return_X_y=True)).inputs(lambda x: x / 16)


def wine() -> Data:
    """178 wines in three classes; the last of 13 columns lies in the hundreds and thousands."""
    return split(*datasets.load_wine(return_X_y=True))


def cancer() -> Data:
    """569 tumours in two classes; some of the 30 columns lie in the thousands."""
    return split(*datasets.load_breast_cancer(return_X_y=True))


def iris() -> Data:
    """150 flowers in three classes, with 4 columns."""
    return split(*datasets.load_iris(return_X_y=True))


def moons(noise: float = 0.1) -> Data:
    """1000 points on two half circles that reach into each other."""
    return split(*datasets.make_moons(1000, noise=noise, random_state=5))


def mixture(columns: int = 20, classes: int = 4) -> Data:
    """2000 points of several Gaussian clusters in each class."""
    return split(*datasets.make_classification(2000, columns, n_informative=10, n_classes=classes, class_sep=1.5, random_state=7))


def curve(function: Callable[[Tensor], Tensor], low: float, high: float, columns: int = 1) -> Data:
    """1000 points of a function of uniform inputs; the targets are the function's values, centred and scaled."""
    x = low + (high - low) * torch.rand(1000, columns, generator=torch.Generator().manual_seed(3))
    y = function(x).reshape(len(x), 1)
    return split(x, (y - y.mean()) / y.std())


def waves(noise: float = 0.15) -> Data:
    """1200 signals of 32 samples, one channel: sines, squares and saw teeth of random pitch and phase, with noise."""
    generator = np.random.default_rng(11)
    kinds = generator.integers(0, 3, 1200)
    phase = generator.uniform(0.08, 0.2, (1200, 1)) * np.arange(32) + generator.uniform(0, 1, (1200, 1))
    shapes = np.stack([np.sin(2 * np.pi * phase), np.sign(np.sin(2 * np.pi * phase)), 2 * (phase % 1) - 1])
    return split((shapes[kinds, np.arange(1200)] + generator.normal(0, noise, (1200, 32)))[:, None], kinds)


def mlp(sizes: Iterable[int], act: Act) -> nn.Sequential:
    """Linear layers of these sizes with an activation after each but the last."""
    widths = list(sizes)
    layers = [module for before, after in pairwise(widths) for module in (nn.Linear(before, after), act())]
    return nn.Sequential(*layers[:-1])


def draw(model: Model, weight: Callable[[Tensor], object] | None, bias: float | None = 0.0) -> Model:
    """Draw the weights of all linear layers and convolutions again; set their biases."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            if weight is not None:
                weight(module.weight)
            if bias is not None and module.bias is not None:
                nn.init.constant_(module.bias, bias)
    return model


def kaiming(weight: Tensor) -> None:
    """The initialisation that keeps the scale through rectifiers."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def xavier(weight: Tensor) -> None:
    """The initialisation that keeps the scale through tanh."""
    nn.init.xavier_normal_(weight)


def accuracy(out: Tensor, y: Tensor) -> float:
    """The share of right classes, or of right signs where there is one output."""
    guess = out.argmax(1) if out.shape[-1] > 1 else (out.flatten() > 0).long()
    return (guess == y).float().mean().item() if bool(out.isfinite().all()) else 0.0


def explained(out: Tensor, y: Tensor) -> float:
    """The share of the variance of the targets that is explained; not below -1."""
    value = 1 - ((out - y) ** 2).mean().item() / y.var().item()
    return max(value, -1.0) if value == value else -1.0


def logistic(out: Tensor, y: Tensor) -> Tensor:
    """The cross entropy of one logit."""
    return F.binary_cross_entropy_with_logits(out.flatten(), y.float())


def fit(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    *,
    batch: int = 64,
    loss: Loss = F.cross_entropy,
    score: Callable[[Tensor, Tensor], float] = accuracy,
    rate: Callable[[int], float] | None = None,
    passes: int = 1,
    penalty: Callable[[], Tensor] | None = None,
    on_train: bool = False,
) -> Training:
    """The usual loop over random batches.

    Args:
        rate: the learning rate of each step, where it changes.
        passes: how many backwards run before each step of the optimizer.
        penalty: what is added to the loss.
        on_train: score on the data that are trained on.
    """
    generator, done = torch.Generator().manual_seed(1000 + seed), [0]

    def step() -> None:
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(done[0])
        optimizer.zero_grad()
        for _ in range(passes):
            rows = torch.randint(len(data.x), (batch,), generator=generator)
            value = loss(model(data.x[rows]), data.y[rows])
            (value if penalty is None else value + penalty()).backward()
        optimizer.step()
        done[0] += 1

    def result() -> float:
        model.eval()
        with torch.no_grad():
            return score(model(data.x), data.y) if on_train else score(model(data.test_x), data.test_y)

    return Training(model, optimizer, step, result, steps)


def sgd(model: nn.Module, lr: float, momentum: float = 0.0, decay: float = 0.0) -> torch.optim.Optimizer:
    """Plain gradient descent, or with momentum."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)


def adam(model: nn.Module, lr: float = 1e-3, decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam, with L2 decay if one is given."""
    return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=decay)
