"""How the cost of an observation grows: `python benchmarks/scale.py [--device cuda] [--pairs 5] [--write]`.

Three tables give by how many milliseconds an observed step takes longer than a bare one: over the number of sites (tanh networks of width 32, batch
64), over the width of four layers (batch 256), and over the length of the sequences of a small GPT. An observation costs a fixed time per site, and a
time per element that is read. No more elements are read than a sample holds. `--write` puts the tables into docs/cost.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
from overhead import put, table
from torch import nn
from workloads import Gpt, Training, Workload, machine

import torchsat

SITES = (10, 30, 100, 300, 1000, 3000, 5000)
WIDTHS = (64, 256, 1024, 2048)
LENGTHS = (32, 128, 512, 1024)


def tanh_network(depth: int, width: int) -> nn.Module:
    return nn.Sequential(*(each for _ in range(depth) for each in (nn.Linear(width, width), nn.Tanh())), nn.Linear(width, 10))


def drawn(batch: int, width: int, device: torch.device) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: (torch.randn(batch, width, device=device), torch.randint(0, 10, (batch,), device=device))


def tokens(length: int, device: torch.device) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: (torch.randint(0, 64, (8, length), device=device), torch.randint(0, 64, (8, length), device=device))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def extra(work: Workload, device: torch.device, pairs: int) -> tuple[float, float, int]:
    """The milliseconds of a bare step, by how many milliseconds an observed step takes longer, and the number of sites."""
    torch.manual_seed(0)
    bare = work.model().to(device)
    watched = copy.deepcopy(bare)
    monitor = torchsat.watch(watched, every=1, budget=None, rules=())
    one, other = Training(work, bare, device), Training(work, watched, device)
    times: list[tuple[float, float]] = []
    for turn in range(pairs + 2):
        batch = work.batch()
        first, second = ((one, other), (other, one))[turn % 2]
        took = {each: each.step(batch) for each in (first, second)}
        if turn >= 2:
            times.append((took[one], took[other]))
    monitor.close()
    assert monitor.latest is not None
    bare_step = statistics.median(each for each, _ in times)
    return 1e3 * bare_step, 1e3 * statistics.median(after - before for before, after in times), len(monitor.latest.records)


def series(title: str, works: dict[int, Workload], device: torch.device, pairs: int) -> str:
    rows = []
    for size, work in works.items():
        bare, more, sites = extra(work, device, pairs)
        rows.append((str(size), str(sites), f"{bare:.1f} ms", f"{more:.1f} ms", f"{more / sites:.2f} ms"))
        print(title, *rows[-1], flush=True)
    return table((title, "sites", "bare step", "observed: longer by", "per site"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    device = torch.device(given.device)
    sites = {n: Workload(str(n), "", partial(tanh_network, n, 32), drawn(64, 32, device), sgd) for n in SITES}
    widths = {n: Workload(str(n), "", partial(tanh_network, 4, n), drawn(256, n, device), sgd) for n in WIDTHS}
    lengths = {n: Workload(str(n), "", partial(Gpt, 128, 2, 4, n, 64), tokens(n, device), sgd) for n in LENGTHS}
    tables = [series(name, works, device, given.pairs) for name, works in {"depth": sites, "width": widths, "sequence length": lengths}.items()]
    text = f"{machine(device)}; medians of {given.pairs} pairs of steps.\n\n" + "\n\n".join(tables)
    print("\n" + text)
    if given.write:
        put(text, f"scale-{device.type}")


if __name__ == "__main__":
    main()
