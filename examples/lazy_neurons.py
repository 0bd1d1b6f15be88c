"""Which share of the rectifiers of a transformer is on? Few, and it need not have anything to learn from for that.

    python examples/lazy_neurons.py                    three trainings: the digits, with random labels, and with random pixels
    python examples/lazy_neurons.py --picture lazy.png the same, as a picture (matplotlib)

Li et al. (2022, arXiv 2210.06313) count how many outputs of the rectifiers in the blocks of trained transformers are not zero: 3.0 % in T5-Base and
6.3 % in ViT-B16. Training makes it so: at the start it is half of them. And it comes about as well where labels or inputs are random, so that nothing
in the data can be what asks for it.

`record.saturated` of a ReLU is the share of its elements that are zero. Such a layer is no fault, and no alert is raised.
"""

import argparse
import logging
from dataclasses import dataclass

import torch
from small_vit import KNOWN, ViT, digits, draw_blocks
from torch import nn

import torchsat

BATCH = 32
DATA = ("digits", "random labels", "random pixels")


@dataclass(frozen=True)
class Outcome:
    right: float
    """The share of the training data that is recognised over the last tenth of the steps."""
    shares: list[tuple[int, list[float]]]
    """The step of each observation, and the share of outputs that are not zero, by block."""
    monitor: torchsat.Monitor


def train(data: str, steps: int, rate: float = 1e-3, hidden: int = 256, seed: int = 0) -> Outcome:
    """An ordinary loop over one of the three kinds of data."""
    torch.manual_seed(seed)
    pixels, labels = (each[:KNOWN] for each in digits())
    if data == "random labels":
        labels = torch.randint(10, labels.shape)
    if data == "random pixels":
        pixels = torch.randn(pixels.shape)
    model, right = ViT(hidden=hidden, activation="relu"), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    last = max(1, steps // 10)
    snapshots: list[torchsat.Snapshot] = []
    with torchsat.watch(model, every=max(1, steps // 40), budget=None, sinks=[snapshots.append]) as monitor:
        for step in range(steps):
            chosen = torch.randint(KNOWN, (BATCH,))
            scores = model(pixels[chosen])
            loss = nn.functional.cross_entropy(scores, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += int((scores.argmax(1) == labels[chosen]).sum()) if step >= steps - last else 0
    shares = [
        (snapshot.step, [1 - each.saturated for each in snapshot if each.activation == "relu" and each.saturated is not None])
        for snapshot in snapshots
    ]
    return Outcome(right / (BATCH * last), shares, monitor)


def draw(path: str, runs: dict[str, Outcome]) -> None:
    """The picture: a panel for each kind of data, and in it a line for each block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True)
    for axis, (name, outcome) in zip(axes, runs.items(), strict=True):
        draw_blocks(axis, outcome.shares)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.set_ylim(0, 0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share that is not zero")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--hidden", type=int, default=256, help="how many rectifiers a block has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", help="where to draw it (needs matplotlib)")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    torch.set_num_threads(1)

    runs = {}
    print("                learned   not zero: first, last, and by block at the end")
    for data in DATA:
        runs[data] = outcome = train(data, options.steps, options.rate, options.hidden, options.seed)
        (_, first), (_, last) = outcome.shares[0], outcome.shares[-1]
        by_block = " ".join(f"{share:.1%}" for share in last)
        print(f"{data:14} {outcome.right:8.1%}   {sum(first) / len(first):.1%}, {sum(last) / len(last):.1%}   {by_block}")
        print(f"    the verdict: {outcome.monitor.verdict}")
    if options.picture:
        draw(options.picture, runs)


if __name__ == "__main__":
    main()
