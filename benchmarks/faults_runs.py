"""The runs of faults.py: what a scenario is, and how one training of it is watched.

A scenario is a training with a fault that is known, and the same training without it. Each fault is verified to do harm: the training with it must
end with a lower score than the one without it. A scenario without a fault is a healthy training that looks like a faulty one.

Each training is watched twice at once, with `every=10` and with the defaults, and the rules of other projects judge the same tensors at the same
steps as the first.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from other_rules import Others
from torch import nn

import torchsat
from torchsat import process
from torchsat.schedule import Schedule

EVERY = 10


@dataclass
class Training:
    """A training that can be run step by step."""

    model: nn.Module
    """The model that is watched."""
    optimizer: torch.optim.Optimizer
    """The optimizer that steps the watched model."""
    step: Callable[[], object]
    """Runs one step: it makes a batch, runs the model and the backward, and calls the optimizer's step once."""
    score: Callable[[], float]
    """How good the model is now; higher is better. It leaves the model as it is, but for `training`, which it may set to False."""
    steps: int
    """How many steps are run."""


@dataclass(frozen=True)
class Scenario:
    """A training whose fault is known, and which can be run without it."""

    name: str
    kind: str
    """The kind of fault; the tables have a line for each."""
    source: str
    """Where such a training has been reported: an address, or an author, a title and a year."""
    make: Callable[[bool, int], Training]
    """Makes the training from whether it has the fault, and from a seed. It seeds torch itself."""
    good: float
    """The score that the training without the fault reaches at least."""
    causes: tuple[str, ...] = ()
    """The names of the causes that are right. The first alert's first cause must be one of them. Empty: there is no fault, and the scenario is only
    run without one."""
    harm: float = 0.0
    """The score of the training with the fault lies below the other one by at least this much."""


@dataclass(frozen=True)
class Run:
    """What one training of a scenario has given."""

    scenario: str
    faulty: bool
    seed: int
    score: float
    often: Sequence[torchsat.Snapshot]
    """The snapshots with every=10."""
    seldom: Sequence[torchsat.Snapshot]
    """The snapshots at the defaults."""
    others: dict[str, int] = field(default_factory=dict)
    """The first step at which each rule set of another project fired. Those that never fired are missing."""
    seconds: float = 0.0


def run(scenario: Scenario, faulty: bool, seed: int, steps: int | None = None) -> Run:
    """Train once, watched. `steps`: run only so many steps."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    training = scenario.make(faulty, seed)
    often: list[torchsat.Snapshot] = []
    seldom: list[torchsat.Snapshot] = []
    plan, others = Schedule(EVERY, None), Others(training.model, training.optimizer)
    with (
        warnings.catch_warnings(),
        # A second watch of a model closes the first one. Here two rates are wanted of one and the same training.
        mock.patch.object(process, "make_way", return_value=None),
        torchsat.watch(training.model, every=EVERY, budget=None, sinks=[often.append], rules=()),
        torchsat.watch(training.model, sinks=[seldom.append], rules=()),
    ):
        warnings.simplefilter("ignore")
        for step in range(steps or training.steps):
            if plan.due(step):
                others.begin(step)
            training.step()
            others.end()
    score = training.score()
    return Run(
        scenario.name,
        faulty,
        seed,
        score if math.isfinite(score) else -math.inf,
        often,
        seldom,
        others.first,
        time.perf_counter() - began,
    )
