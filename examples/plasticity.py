"""A network that learns one thing after another: does it keep the ability to learn?

    python examples/plasticity.py                  a small network whose labels are drawn anew every 400 steps, without and with ReDo
    python examples/plasticity.py --picture p.png  the same, as a picture (matplotlib)

The digits of scikit-learn get labels that have nothing to do with them. They can only be learned by heart, and after 400 steps there are other ones.
Nothing about the 40th task is harder than about the first, but the network gets worse: units of the second layer fall asleep one after another, its
features lose their directions, and what is left cannot learn the next labels. Sokar et al. (2023, arXiv 2302.12902) have found this in agents, whose
targets change as they learn, and Dohare et al. (2024, Nature 632) in long sequences of supervised tasks.

ReDo (Sokar et al.) looks every 400 steps for units whose mean |a| is at most 0.025 of the mean over their layer, draws the weights before them anew,
sets those behind them to 0, and empties the moments of Adam of both.
"""

import argparse
import logging
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchsat

WIDTH, DEPTH, BATCH = 64, 3, 64


def network() -> nn.Sequential:
    """Three hidden layers of rectifiers."""
    layers: list[nn.Module] = []
    for width in (64, *[WIDTH] * (DEPTH - 1)):
        layers += [nn.Linear(width, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


@torch.no_grad()
def recycle(model: nn.Sequential, optimizer: torch.optim.Adam, x: Tensor) -> int:
    """ReDo: wake the dormant units. Returns how many there were."""
    count = 0
    for at in range(0, 2 * DEPTH, 2):
        before, behind = model[at], model[at + 2]
        assert isinstance(before, nn.Linear)
        assert isinstance(behind, nn.Linear)
        sizes = model[: at + 2](x).abs().mean(0)
        dormant = sizes <= 0.025 * sizes.mean()
        fresh = nn.Linear(before.in_features, before.out_features)
        before.weight[dormant], before.bias[dormant] = fresh.weight[dormant], 0.0
        behind.weight[:, dormant] = 0.0
        for moment in ("exp_avg", "exp_avg_sq"):
            for parameter in (before.weight, before.bias):
                optimizer.state[parameter][moment][dormant] = 0.0
            optimizer.state[behind.weight][moment][:, dormant] = 0.0
        count += int(dormant.sum())
    return count


def train(redo: bool, tasks: int, steps: int, rate: float = 1e-3, seed: int = 0) -> tuple[list[float], list[torchsat.Snapshot], torchsat.Monitor]:
    """Learn so many tasks of so many steps. Returns the accuracy in the second half of each task, the snapshots, and the monitor."""
    pixels = torch.as_tensor(load_digits(return_X_y=True)[0]).float()
    x = (pixels - pixels.mean(0)) / (pixels.std(0) + 0.2)
    torch.manual_seed(seed)
    model, draw = network(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    snapshots: list[torchsat.Snapshot] = []
    accuracies = []
    monitor = torchsat.watch(model, every=max(1, steps // 8), budget=None, extras="rank", sinks=[snapshots.append])
    for _ in range(tasks):
        labels, right = torch.randint(10, (len(x),), generator=draw), 0
        for step in range(steps):
            chosen = torch.randint(len(x), (BATCH,), generator=draw)
            scores = model(x[chosen])
            loss = nn.functional.cross_entropy(scores, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += int((scores.argmax(1) == labels[chosen]).sum()) if step >= steps // 2 else 0
        accuracies.append(right / (BATCH * (steps - steps // 2)))
        if redo:
            recycle(model, optimizer, x)
    monitor.close()
    return accuracies, snapshots, monitor


def worst(snapshot: torchsat.Snapshot) -> tuple[float | None, float | None]:
    """The share of dormant units of the layer that has most of them, and the effective rank of the layer with the least."""
    dormant = [record.dormant for record in snapshot if record.dormant is not None]
    ranks = [record.effective_rank * record.rank_limit for record in snapshot if record.effective_rank is not None and record.rank_limit]
    return max(dormant, default=None), min(ranks, default=None)


def draw(path: str, runs: dict[str, tuple[list[float], list[torchsat.Snapshot]]], steps: int) -> None:
    """The picture: accuracy, dormant units and effective rank over the tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for (name, (accuracies, snapshots)), colour in zip(runs.items(), ("#c0504d", "#1f6f78"), strict=False):
        tasks, values = [snapshot.step / steps for snapshot in snapshots], [worst(snapshot) for snapshot in snapshots]
        axes[0].plot(range(1, len(accuracies) + 1), accuracies, color=colour, label=name)
        for at in (0, 1):
            axes[at + 1].plot(tasks, [float("nan") if value[at] is None else value[at] for value in values], color=colour)
    for axis, title in zip(axes, ("accuracy on random labels", "dormant units, worst layer", "effective rank, lowest layer"), strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("task")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--steps", type=int, default=400, help="of each task")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="where to draw it (needs matplotlib)")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    torch.set_num_threads(1)

    runs = {}
    print("           task  accuracy  dormant units  effective rank")
    for name, redo in (("plain", False), ("with ReDo", True)):
        accuracies, snapshots, monitor = train(redo, options.tasks, options.steps, options.rate, options.seed)
        runs[name] = accuracies, snapshots
        for task in sorted({1, *range(max(1, options.tasks // 4), options.tasks, max(1, options.tasks // 4)), options.tasks}):
            before = [snapshot for snapshot in snapshots if snapshot.step < task * options.steps]
            dormant, rank = worst(before[-1])
            shown = "-" if dormant is None else f"{dormant:.0%}"
            print(f"{name:10} {task:5} {accuracies[task - 1]:9.1%} {shown:>14} {0.0 if rank is None else rank:15.1f}")
        print(f"{name}: the verdict: {monitor.verdict}")
    if options.picture:
        draw(str(options.picture), runs, options.steps)


if __name__ == "__main__":
    main()
