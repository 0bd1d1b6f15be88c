"""What the scenarios of faults_outputs.py and faults_probabilities.py share: tables of data, scores, and the loop of a supervised training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from faults_runs import Training
from sklearn import datasets
from torch import Tensor, nn

Table = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs and targets to train on, then inputs and targets to score on."""


def split(x: Tensor, y: Tensor, seed: int = 0) -> Table:
    """Keep a random quarter of the samples to score on."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y, cut = x[order], y[order], 3 * len(x) // 4
    return x[:cut], y[:cut], x[cut:], y[cut:]


def standard(x: Tensor) -> Tensor:
    """The columns with mean 0 and standard deviation 1; constant columns become 0."""
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


def tabular(name: str, scaled: bool = True) -> tuple[Tensor, Tensor]:
    """A table that ships with scikit-learn, with standardised or with raw columns, and its targets."""
    rows, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    x, y = torch.tensor(rows).float(), torch.tensor(targets)
    return standard(x) if scaled else x, y


def digits() -> tuple[Tensor, Tensor]:
    """The 8 x 8 digits of scikit-learn with pixels in 0..1, and their classes."""
    x, y = tabular("digits", scaled=False)
    return x / 16, y


def agreement(output: Tensor, target: Tensor) -> float:
    """The share of probabilities that are on the side of 0.5 where their target is."""
    return float(((output > 0.5) == (target > 0.5)).float().mean())


def stacked(sizes: Sequence[int], activation: Callable[[], nn.Module], *end: nn.Module) -> nn.Sequential:
    """A multi-layer perceptron with these sizes; `end` follows its last linear layer."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1], *end)


def supervised(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Table,
    loss: Callable[[Any, Tensor], Tensor],
    score: Callable[[Any, Tensor], float],
    steps: int,
    batch: int | None = 32,
    seed: int = 0,
) -> Training:
    """Train on random batches, or on all samples at once where `batch` is None, and score on the samples that were kept back."""
    x, y, x_kept, y_kept = data
    generator = torch.Generator().manual_seed(seed)

    def step() -> None:
        pick = slice(None) if batch is None else torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss(model(x[pick]), y[pick]).backward()
        optimizer.step()

    @torch.no_grad()
    def scored() -> float:
        model.eval()
        return score(model(x_kept), y_kept)

    return Training(model, optimizer, step, scored, steps)
