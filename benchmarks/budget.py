"""Whether the budget of `torchsat.watch` is kept: `python benchmarks/budget.py [--budgets 0.005,0.02] [--steps 8000] [--write]`.

A network is trained that is so small that an observation costs as much as several steps. A bare copy and a watched copy take turns, 50 steps each.
The steps from 500 on are counted, since by then the monitor has stretched the interval between its observations. The column "measured" says by how
much longer the watched training took, and "monitor.overhead" what the monitor says about itself. The row "nothing watched" compares two bare copies,
so it shows the noise. `--write` puts the table into docs/cost.md.
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

FIRST, TURN = 500, 50


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
    monitor = None if budget is None else torchsat.watch(watched, budget=budget)
    totals = [0.0, 0.0]
    for turn in range(steps // TURN):
        for which in (0, 1) if turn % 2 else (1, 0):
            took = seconds(*pair[which], TURN)
            totals[which] += took if turn * TURN >= FIRST else 0.0
    counted = len(range(FIRST, steps))
    times = (f"{1e3 * totals[0] / counted:.3f} ms", f"{totals[1] / totals[0] - 1:+.4f}")
    if monitor is None:
        return "nothing watched", *times, "", ""
    monitor.close()
    said = monitor.overhead
    return f"{budget}", *times, "unknown" if said is None else f"{said:.4f}", str(monitor._loop.observer.schedule.interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="0.005,0.02,0.1")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows = [row(budget, given.steps) for budget in (None, *map(float, given.budgets.split(",")))]
    found = table(("budget", "bare step", "measured", "monitor.overhead", "one step in"), rows)
    text = f"{machine(torch.device('cpu'))}; {given.steps} steps, counted from {FIRST} on.\n\n{found}"
    print(text)
    if given.write:
        put(text, "budget")


if __name__ == "__main__":
    main()
