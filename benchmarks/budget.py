"""Whether the budget of `torchsat.watch` is kept: `python benchmarks/budget.py [--budgets 0.005,0.02] [--steps 20000] [--write]`.

A network is trained that is so small that an observation costs as much as several steps, and every step is asked for. A bare copy and a watched copy
take turns, 50 steps each. "Observing took" is how much longer the watched training took as a whole, and "allowed" is what the budget grants it: 2 s
and its share of the time. "Later" is how much longer the second half took, in which the allowance is spent and the share alone is left, and
"monitor.overhead" what the monitor says about itself at the end. The row "nothing watched" compares two bare copies, so it shows the noise. `--write`
puts the table into docs/cost.md.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from overhead import put, table
from torch import nn
from workloads import machine

import torchsat
from torchsat.schedule import ALLOWANCE

TURN = 50


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    x = torch.randn(32, 32)
    begun = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return time.perf_counter() - begun


def row(budget: float | None, steps: int) -> tuple[str, ...]:
    """The row of the table for one budget. None: the second copy is not watched either, and the row shows the noise."""
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    watched = copy.deepcopy(bare)
    pair = [(model, trained(model)) for model in (bare, watched)]
    monitor = None if budget is None else torchsat.watch(watched, every=1, budget=budget)
    totals, later = [0.0, 0.0], [0.0, 0.0]
    for turn in range(steps // TURN):
        for which in (0, 1) if turn % 2 else (1, 0):
            took = seconds(*pair[which], TURN)
            totals[which] += took
            later[which] += took if 2 * turn * TURN >= steps else 0.0
    plain = f"{1e3 * totals[0] / steps:.3f} ms"
    spent, share = f"{totals[1] - totals[0]:.2f} s", f"{later[1] / later[0] - 1:+.4f}"
    if monitor is None or budget is None:
        return "nothing watched", plain, spent, "", share, "", "", ""
    monitor.close()
    said = "unknown" if monitor.overhead is None else f"{monitor.overhead:.4f}"
    observer = monitor._loop.observer
    allowed = f"{ALLOWANCE + budget * totals[1]:.2f} s"
    return f"{budget}", plain, spent, allowed, share, said, str(observer.turn), str(observer.schedule.interval)


TITLES = ("budget", "bare step", "observing took", "allowed", "later", "monitor.overhead", "observations", "at the end one step in")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="0.005,0.02,0.1")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows = [row(budget, given.steps) for budget in (None, *map(float, given.budgets.split(",")))]
    text = f"{machine(torch.device('cpu'))}; {given.steps} steps.\n\n{table(TITLES, rows)}"
    print(text)
    if given.write:
        put(text, "budget")


if __name__ == "__main__":
    main()
