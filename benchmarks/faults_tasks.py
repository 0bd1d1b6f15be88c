"""The tasks that the scenarios of faults_sequences.py, faults_attention.py and faults_finetuning.py learn, and the loop that trains them.

A task makes batches from torch's global generator, which the scenario seeds, and scores outputs: accuracy for classes, and the share of the variance
that is explained for numbers.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from faults_runs import Training
from faults_scores import accuracy, explained
from sklearn import datasets
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy over the last dimension of `out`, for classes `y` of its other dimensions."""
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def likelihood(out: Tensor, y: Tensor) -> float:
    """The mean log-likelihood of the right classes, in nats."""
    return -cross_entropy(out, y).item()


@dataclass(frozen=True)
class Task:
    """What is learned."""

    batch: Callable[[int], Batch]
    """Makes so many inputs and their targets."""
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    score: Callable[[Tensor, Tensor], float] = accuracy


def fit(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    size: int = 32,
    clip: float | None = None,
    rate: Callable[[int], float] | None = None,
) -> Training:
    """A training of `model` on batches of `size`. `clip`: the norm that gradients are clipped to. `rate`: a factor of the learning rate per step."""
    x_test, y_test = task.batch(512)
    rates = [group["lr"] for group in optimizer.param_groups]
    done = 0

    def step() -> None:
        nonlocal done
        if rate is not None:
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * rate(done)
        done += 1
        x, y = task.batch(size)
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    def score() -> float:
        model.eval()
        with torch.no_grad():
            return task.score(model(x_test), y_test)

    return Training(model, optimizer, step, score, steps)


def drawn(x: Tensor, y: Tensor) -> Callable[[int], Batch]:
    """Batches that are drawn from rows of data. Batches of 512 are drawn from the last quarter, which the others never see."""

    def batch(size: int) -> Batch:
        cut = len(x) * 3 // 4
        rows = cut + torch.randperm(len(x) - cut)[:512] if size == 512 else torch.randint(cut, (size,))
        return x[rows], y[rows]

    return batch


@cache
def digits() -> Batch:
    """scikit-learn's digits, shuffled: pixels of [1797, 8, 8] in 0..16, and classes."""
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return torch.tensor(data.images[order], dtype=torch.float32), torch.tensor(data.target[order])


def rows_of_digits(scale: float = 1 / 16, mean: float = 0.0) -> Task:
    """The class of a digit, from its 8 rows of 8 pixels."""
    x, y = digits()
    return Task(drawn((x - mean) * scale, y))


def some_digits(low: bool, scale: float = 1 / 16, mean: float = 0.0) -> Task:
    """The class of a digit among 0 to 4 (`low`) or 5 to 9, from an image of [1, 8, 8]."""
    x, y = digits()
    rows = y < 5 if low else y >= 5
    return Task(drawn((x[rows, None] - mean) * scale, y[rows] % 5))


def adding(length: int) -> Task:
    """Hochreiter and Schmidhuber's adding problem: the sum of the two numbers in [0, 1] that are marked, one in each half."""

    def batch(size: int) -> Batch:
        numbers, marks = torch.rand(size, length), torch.zeros(size, length)
        for first in (0, length // 2):
            marks[torch.arange(size), first + torch.randint(length // 2, (size,))] = 1
        return torch.stack((numbers, marks), -1), (numbers * marks).sum(1, keepdim=True)

    return Task(batch, F.mse_loss, explained)


def latch(length: int, symbols: int = 4, noise: float = 0.3) -> Task:
    """The first symbol of a sequence of noise must be told at its end. Inputs: [size, length, symbols]."""

    def batch(size: int) -> Batch:
        x, y = noise * torch.randn(size, length, symbols), torch.randint(symbols, (size,))
        x[torch.arange(size), 0, y] += 1
        return x, y

    return Task(batch)


def waves(length: int, scale: float = 1.0, mean: float = 0.0, channels: int = 1) -> Task:
    """The next value of sines with random frequency and phase and a little noise. The inputs are scaled and moved, the targets are not."""

    def batch(size: int) -> Batch:
        t = torch.arange(length + 1.0)
        frequency, phase = 0.2 + 0.5 * torch.rand(size, 1, channels), 6.283 * torch.rand(size, 1, channels)
        series = torch.sin(frequency * t[:, None] + phase) + 0.05 * torch.randn(size, length + 1, channels)
        return mean + scale * series[:, :-1], series[:, -1]

    return Task(batch, F.mse_loss, explained)


def polarity(words: int = 50, length: int = 20) -> Task:
    """Whether a text has more good words than bad ones, with neutral words between them. Inputs: word numbers of [size, length]."""

    def batch(size: int) -> Batch:
        x = torch.randint(words, (size, length))
        kinds = (x < words // 5).long() - ((x >= words // 5) & (x < 2 * (words // 5))).long()
        return x, (kinds.sum(1) > 0).long()

    return Task(batch)


def automaton(length: int) -> Task:
    """After each input bit, the state of a machine with three states that a 1 moves on and a 0 leaves. Inputs: one-hot [size, length, 2]."""

    def batch(size: int) -> Batch:
        bits = torch.randint(2, (size, length))
        return F.one_hot(bits, 2).float(), bits.cumsum(1) % 3

    return Task(batch)


def recall(pairs: int, keys: int = 16, values: int = 8) -> Task:
    """Pairs of key and value, then a key: its value must be told. Inputs: [size, 2 * pairs + 1] symbols; the values come after the keys in number."""

    def batch(size: int) -> Batch:
        k = torch.rand(size, keys).argsort(1)[:, :pairs]
        v, asked = torch.randint(values, (size, pairs)), torch.randint(pairs, (size, 1))
        pairs_of = torch.stack((k, v + keys), -1).flatten(1)
        return torch.cat((pairs_of, k.gather(1, asked)), 1), v.gather(1, asked)[:, 0]

    return Task(batch)


def repeated(length: int, symbols: int = 16) -> Task:
    """A random sequence that is repeated: the symbols of the second half must be told, each from those before it. Targets of the first half: -100."""

    def batch(size: int) -> Batch:
        first = torch.randint(symbols, (size, length))
        whole = torch.cat((first, first), 1)
        y = whole[:, 1:].clone()
        y[:, : length - 1] = -100
        return whole[:, :-1], y

    def score(out: Tensor, y: Tensor) -> float:
        return (out.argmax(-1) == y)[y >= 0].float().mean().item()

    return Task(batch, cross_entropy, score)


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789\n .,:;='\"()[]{}_-+*/#<>!%@\\|&^~$?"


@cache
def _text(module: ModuleType) -> Tensor:
    return torch.tensor([CHARACTERS.index(character) for character in inspect.getsource(module).lower() if character in CHARACTERS])


def vocabulary() -> int:
    """How many different characters a text can have."""
    return len(CHARACTERS)


def characters(length: int, last: bool = False, module: ModuleType = textwrap) -> Task:
    """The next character of the source of a module of Python, after each character or only after the last one."""
    text = _text(module)

    def batch(size: int) -> Batch:
        starts = torch.randint(len(text) - length, (size, 1)) + torch.arange(length + 1)
        return text[starts[:, :-1]], text[starts[:, -1]] if last else text[starts[:, 1:]]

    return Task(batch)
