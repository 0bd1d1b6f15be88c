"""What the remedies of alerts do: each is pasted as it is printed into the training that it is for, and the training is run again.

    python benchmarks/remedies.py                 all trainings of remedies_cases.py
    python benchmarks/remedies.py --only NAME     those whose names contain one of these, with the evidence and the remedies

A training runs three times: with the monitor, until its end, to hear the alerts; and then, from the same seed, as it is and with the code of a remedy
(`Cause.code`) executed behind the lines that make model and optimizer. The score is the accuracy on a fifth of the data that is not trained on (of
a regression, minus the mean square of the error). What a remedy does to `x` is done to these too, with its mean and deviation.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from remedies_cases import CASES, Case, Task
from torch import nn

import torchsat

CLOSE = 0.01
"""Scores that differ by less, or of a regression by less than this share, are equal."""


@dataclass(frozen=True)
class Outcome:
    """What one remedy did to one training."""

    case: Case
    cause: torchsat.Cause
    rank: int
    before: float
    after: float

    @property
    def verdict(self) -> str:
        """Whether the training with the remedy is better, equal, or worse."""
        close = CLOSE * max(1.0, abs(self.before)) if math.isfinite(self.before) else 0.0
        if self.after > self.before + close:
            return "better"
        return "worse" if self.after < self.before - close else "equal"


def start(case: Case, seed: int, code: str = "") -> tuple[Task, torch.Tensor, torch.Tensor]:
    """The training from its beginning, with the code pasted into it, and the inputs and targets of its test."""
    torch.manual_seed(seed)
    task = case.make()
    order = torch.randperm(len(task.x), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(order) // 5 :], order[: len(order) // 5]
    names: dict[str, Any] = {"torch": torch, "nn": nn, "model": task.model, "optimizer": task.optimizer, "x": task.x[train]}
    exec(code, names)
    x_test, y_test = task.x[test], task.y[test]
    line = code.splitlines()[-1] if code else ""
    if line.startswith("x = "):
        held_out = {**names, "x": x_test}
        exec(line, held_out)
        x_test = held_out["x"]
    task.x, task.y, task.model = names["x"], task.y[train], names["model"]
    return task, x_test, y_test


def train(case: Case, seed: int, steps: int | None, code: str = "") -> float:
    """The score of a training."""
    task, x_test, y_test = start(case, seed, code)
    for _ in _steps(task, steps):
        pass
    with torch.no_grad():
        output = task.model(x_test.nan_to_num(posinf=0.0, neginf=0.0))
        score = -nn.functional.mse_loss(output, y_test) if y_test.is_floating_point() else (output.argmax(1) == y_test).float().mean()
    return score.item() if math.isfinite(score.item()) else -math.inf


def _steps(task: Task, steps: int | None) -> Iterator[int]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps or task.steps):
        chosen = torch.randint(len(task.x), (task.batch,), generator=generator)
        task.optimizer.zero_grad()
        task.loss(task.model(task.x[chosen]), task.y[chosen]).backward()
        task.optimizer.step()
        yield step


def hear(case: Case, seed: int, steps: int | None) -> list[torchsat.Alert]:
    """The alerts that are raised in a training."""
    heard: list[torchsat.Alert] = []
    task, _, _ = start(case, seed)
    with torchsat.watch(task.model, every=10, budget=None, on_alert=heard.append):
        for _ in _steps(task, steps):
            pass
    return [alert for alert in heard if alert.firing]


def outcomes(case: Case, seed: int, steps: int | None, verbose: bool) -> list[Outcome]:
    """What each remedy of the first alert does to a training."""
    told = hear(case, seed, steps)
    if verbose or not told:
        print(f"\n{case.name} ({', '.join(case.causes)}): " + ("" if told else "no alert"))
    if not told:
        return []
    before, found = train(case, seed, steps), []
    for rank, cause in enumerate(told[0].causes):
        if verbose:
            print(f"  step {told[0].step}: {told[0].message}\n  {cause.name} {cause.share:.0%}: {cause.evidence}\n    {cause.remedy}")
        if cause.code:
            found.append(Outcome(case, cause, rank, before, train(case, seed, steps, cause.code)))
            if verbose:
                print(f"  -> {found[-1].verdict}: {before:.3g}, then {found[-1].after:.3g}")
    return found


def main(cases: Sequence[Case] = CASES) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="only the trainings whose names contain one of these, with what the alerts say")
    parser.add_argument("--steps", type=int, help="only so many steps of each")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    chosen = [case for case in cases if options.only is None or any(part in case.name for part in options.only)]
    found = [each for case in chosen for seed in options.seeds for each in outcomes(case, seed, options.steps, options.only is not None)]
    print("\n| training | cause | share | as it is | with the remedy | |\n|---|---|---|---|---|---|")
    for each in found:
        print(f"| {each.case.name} | {each.cause.name} | {each.cause.share:.0%} | {each.before:.3g} | {each.after:.3g} | {each.verdict} |")
    counts = [sum(each.verdict == verdict for each in found) for verdict in ("better", "equal", "worse")]
    print("\n{} remedies: {} better, {} equal, {} worse".format(len(found), *counts))
    print(f"torch {torch.__version__}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
