"""Scenarios of faults.py without a fault: the sound trainings beside those of faults_everyday.py.

Each of them has something that could be taken for a fault: units at a plateau, gates that are shut, heads that look at one place, gradients of zero.
All of them reach what they can.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import cast

import torch
from faults_runs import Scenario, Training
from faults_scores import explained
from faults_tasks import Batch, Task, drawn
from faults_tasks import digits as images
from faults_tasks import fit as fit_task
from faults_trainings import Data, adam, digits, fit, mlp, sgd, split, wine, xavier
from faults_trainings import explained as rebuilt
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F


def eight_three_eight(_: bool, seed: int) -> Training:
    """Three tanh units hold eight patterns, so that each pattern ends near a corner of the cube: a code of three bits."""
    torch.manual_seed(seed)
    patterns = torch.eye(8)
    data = Data(patterns, torch.arange(8), patterns, torch.arange(8))
    model = mlp((8, 3, 8), nn.Tanh)
    return fit(model, data, torch.optim.RMSprop(model.parameters(), 2e-2), 700, seed, batch=16)


class Board(nn.Module):
    """The worth of a board from which squares hold which stones, with units that end at 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stones, self.middle, self.end = nn.Linear(27, 64), nn.Linear(64, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(self.stones(x), 0.0, 1.0)
        return cast(Tensor, self.end(torch.clamp(self.middle(x), 0.0, 1.0)))


LINES = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])


def clipped_board(_: bool, seed: int) -> Training:
    """The worth of a board of noughts and crosses is its open lines; the clipped units of such a network are at 0 or 1 for most boards."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        board = torch.randint(3, (size, 9))
        mine, other = ((board[:, LINES] == stone).sum(2) for stone in (1, 2))
        worth = (mine.square() * (other == 0) - other.square() * (mine == 0)).sum(1, keepdim=True)
        return F.one_hot(board, 3).float().flatten(1), worth / 8

    model = Board()
    return fit_task(model, Task(batch, F.mse_loss, explained), adam(model, 3e-3), 900, size=64)


class Reversal(nn.Module):
    """One head over the symbols of a sequence and their places, with what it mixes added to them."""

    def __init__(self, length: int, symbols: int, width: int = 48) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Parameter(torch.randn(length, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.end = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        x = self.symbol(x) + self.place
        shares = (self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5).softmax(-1)
        return cast(Tensor, self.end(self.norm(shares @ self.value(x))))


def reversed_sequences(_: bool, seed: int) -> Training:
    """A sequence is to be told backwards: the head of each place looks at the opposite place alone, whatever stands there."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        x = torch.randint(10, (size, 12))
        return x, x.flip(1)

    model = Reversal(12, 10)
    return fit_task(model, Task(batch), adam(model, 3e-3), 500, size=32)


class Holding(nn.Module):
    """A GRU cell in a loop, and the value that it holds at each time."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.cell, self.end = nn.GRUCell(2, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(len(x), self.cell.hidden_size), []
        for now in x.unbind(1):
            state = self.cell(now, state)
            states.append(state)
        return cast(Tensor, self.end(torch.stack(states, 1)))


def sample_and_hold(_: bool, seed: int) -> Training:
    """The last marked value of a noisy series must be told at each time, so that the gates stay shut between the marks."""
    torch.manual_seed(seed)

    def batch(size: int) -> Batch:
        values, marks = 2 * torch.rand(size, 15) - 1, (torch.rand(size, 15) < 0.12).float()
        marks[:, 0] = 1
        last = (marks * torch.arange(15)).cummax(1).values.long()
        return torch.stack((values, marks), 2), values.gather(1, last)[..., None]

    model = Holding()
    return fit_task(model, Task(batch, F.mse_loss, lambda out, y: explained(out.flatten(), y.flatten())), adam(model, 1e-2), 220, size=32)


def rare_kinds(_: bool, seed: int) -> Training:
    """Nine rows in ten are of one kind of three, and are told surely long before the end; two tanh layers stand at their rims for most rows."""
    torch.manual_seed(seed)
    shape = {"n_informative": 8, "n_classes": 3, "weights": [0.9, 0.06, 0.04], "class_sep": 2.0, "flip_y": 0.0, "random_state": 6}
    data = split(*datasets.make_classification(3000, 12, **shape))

    def score(out: Tensor, y: Tensor) -> float:
        right = out.argmax(1) == y
        return torch.stack([right[y == kind].float().mean() for kind in range(3)]).mean().item()

    model = mlp((12, 32, 16, 3), nn.Tanh)
    return fit(model, data, sgd(model, 0.1, 0.9), 800, seed, batch=64, score=score)


class Adapted(nn.Module):
    """A trained linear layer that stays as it is, with a correction of low rank that begins as zero."""

    def __init__(self, trained: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.trained = trained.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, trained.in_features) / trained.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(trained.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.trained(x) + 2 * (x @ self.down.mT @ self.up.mT))


def _some(low: bool) -> Task:
    x, y = images()
    rows = y < 5 if low else y >= 5
    return Task(drawn(x[rows].flatten(1) / 16, y[rows] % 5))


@cache
def _trained(seed: int) -> nn.Sequential:
    torch.manual_seed(900 + seed)
    model = mlp((64, 64, 64, 5), nn.Tanh)
    training = fit_task(model, _some(low=True), adam(model, 2e-3), 400)
    for _ in range(400):
        training.step()
    model.zero_grad()
    return model


def low_rank(_: bool, seed: int) -> Training:
    """The layers of a trained tanh network are frozen, and corrections of rank 4 and a new head learn the other five digits."""
    first, act, second, also, _head = copy.deepcopy(_trained(seed))
    torch.manual_seed(seed)
    model = nn.Sequential(Adapted(cast(nn.Linear, first)), act, Adapted(cast(nn.Linear, second)), also, nn.Linear(64, 5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    return fit_task(model, _some(low=False), optimizer, 300)


def dropped_code(_: bool, seed: int) -> Training:
    """An autoencoder with GELU and a fifth of its units dropped is trained by AdamW at the usual decay of 0.01."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 96), nn.GELU(), nn.Dropout(0.2), nn.Linear(96, 12), nn.ELU()),
        *(nn.Linear(12, 96), nn.GELU(), nn.Dropout(0.2), nn.Linear(96, 64)),
    )
    data = digits()
    whole = Data(data.x, data.x, data.test_x, data.test_x)
    return fit(model, whole, torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2), 700, seed, batch=32, loss=F.mse_loss, score=rebuilt)


def one_cycle(_: bool, seed: int) -> Training:
    """The rate of momentum rises to 0.5 in a third of the run and falls to nothing; normalised hardswish layers take it well."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Hardswish(), nn.Conv2d(12, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Hardswish()),
        *(nn.Flatten(), nn.Linear(144, 10)),
    )
    x, y = images()
    steps = 360

    def rate(step: int) -> float:
        return step / 120 if step < 120 else (steps - step) / (steps - 120)

    return fit_task(model, Task(drawn(x[:, None] / 16, y)), sgd(model, 0.5, 0.9, decay=5e-4), steps, size=64, rate=rate)


def five_units_wine(_: bool, seed: int) -> Training:
    """Five softsign units with batches of eight have told the wines apart for most of the run, and lie far out on both sides."""
    torch.manual_seed(seed)
    model = mlp((13, 5, 3), nn.Softsign)
    for weight in model.parameters():
        if weight.dim() > 1:
            xavier(weight)
    return fit(model, wine().standardized(), torch.optim.Adagrad(model.parameters(), 0.3), 600, seed, batch=8)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("eight_three_eight", "healthy", "https://cybertronai.github.io/hinton-problems/encoder-backprop-8-3-8/", eight_three_eight, 0.99),
    Scenario("clipped_board", "healthy", "http://talkchess.com/forum3/viewtopic.php?f=7&t=75724&p=871849", clipped_board, 0.85),
    Scenario("reversed_sequences", "healthy", "UvA Deep Learning Tutorials, Tutorial 6, 2022", reversed_sequences, 0.97),
    Scenario("sample_and_hold", "healthy", "Hochreiter and Schmidhuber, Long Short-Term Memory, 1997", sample_and_hold, 0.85),
    Scenario(
        "rare_kinds", "healthy", "https://scikit-learn.org/stable/modules/generated/sklearn.metrics.balanced_accuracy_score.html", rare_kinds, 0.8
    ),
    Scenario("low_rank", "healthy", "Hu et al., LoRA, 2021", low_rank, 0.88),
    Scenario("dropped_code", "healthy", "Srivastava et al., Dropout, 2014", dropped_code, 0.8),
    Scenario("one_cycle", "healthy", "Smith and Topin, Super-Convergence, 2017", one_cycle, 0.93),
    Scenario(
        "five_units_wine", "healthy", "Bergstra et al., Quadratic Polynomials Learn Better Image Features, 2009 (softsign)", five_units_wine, 0.9
    ),
)
