"""The rate is doubled, and the attention of a Vision Transformer collapses: does its entropy tell, and does a bound on its weights help?

    python examples/entropy_collapse.py                        three trainings: a rate, twice the rate, and twice the rate with bounded weights
    python examples/entropy_collapse.py --picture entropy.png  the same, as a picture (matplotlib)

Zhai et al. (2023, arXiv 2303.06296) follow the mean entropy of the rows of attention of a Vision Transformer. With twice the rate that suits it, the
entropy of all layers falls to nearly 0, and the training diverges. Their remedy divides each weight by its spectral norm and multiplies it by one
learned number (sigma-reparametrisation), so that the logits of the attention cannot grow faster than that number.

Here a small one learns the digits of scikit-learn with Adam. The entropy is `record.entropy`: 1 where a query looks at all keys alike, 0 where each
looks at one key only. It is that of all rows and keys, not of a sample.
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from small_vit import KNOWN, ViT, digits, draw_blocks
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torchsat

BATCH = 32


class SigmaReparametrisation(nn.Module):
    """weight -> gamma weight / sigma, where sigma is the largest singular value, by one step of power iteration at a time, and gamma is learned."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))
        self.u: Tensor
        self.v: Tensor
        u, _, v = torch.linalg.svd(weight.detach(), full_matrices=False)
        self.register_buffer("u", u[:, 0].clone())
        self.register_buffer("v", v[0].clone())

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.u = nn.functional.normalize(weight @ self.v, dim=0)
                self.v = nn.functional.normalize(weight.T @ self.u, dim=0)
        return self.gamma * weight / (self.u @ weight @ self.v)


def bound(model: nn.Module) -> None:
    """Put the weights of all linear layers and of all attention under the reparametrisation."""
    for module in list(model.modules()):
        name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            parametrize.register_parametrization(module, name, SigmaReparametrisation(getattr(module, name)))


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    right: float
    """The share of the held-out digits that are recognised at the end."""
    snapshots: list[torchsat.Snapshot]
    monitor: torchsat.Monitor

    def entropies(self) -> Iterator[tuple[int, list[float]]]:
        """The step of each observation, and the mean entropy of each attention."""
        for snapshot in self.snapshots:
            yield snapshot.step, [record.entropy for record in snapshot if record.entropy is not None]


def train(rate: float, steps: int, bounded: bool = False, depth: int = 4, seed: int = 0) -> Outcome:
    """An ordinary loop, without warm-up."""
    torch.manual_seed(seed)
    pixels, labels = digits()
    model, losses = ViT(depth), []
    if bounded:
        bound(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    snapshots: list[torchsat.Snapshot] = []
    with torchsat.watch(model, every=max(1, steps // 30), budget=None, sinks=[snapshots.append]) as monitor:
        for _ in range(steps):
            chosen = torch.randint(KNOWN, (BATCH,))
            loss = nn.functional.cross_entropy(model(pixels[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        right = (model.eval()(pixels[KNOWN:]).argmax(1) == labels[KNOWN:]).float().mean().item()
    return Outcome(losses, right, snapshots, monitor)


def draw(path: str, runs: dict[str, Outcome]) -> None:
    """The picture: a panel for each run with the entropy of each block over the steps, and one with their losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots(1, len(runs) + 1)
    for axis, (name, outcome) in zip(axes, runs.items(), strict=False):
        draw_blocks(axis, outcome.entropies())
        axis.set_title(f"entropy: {name}", fontsize=10, loc="left")
        axis.set_ylim(-0.02, 1.02)
        width = max(1, len(outcome.losses) // 50)
        losses = [sum(outcome.losses[at : at + width]) / width for at in range(0, len(outcome.losses) - width + 1, width)]
        axes[-1].plot(range(0, width * len(losses), width), losses, label=name)
    axes[0].legend(frameon=False, fontsize=8)
    axes[-1].set_title("loss", fontsize=10, loc="left")
    axes[-1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.004, help="of Adam; the second and the third run have twice that")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", help="where to draw it (needs matplotlib)")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    torch.set_num_threads(1)

    runs = {}
    print(f"{'':26} recognised    loss  entropy of each block at the end")
    for name, times, bounded in (("the rate", 1, False), ("twice the rate", 2, False), ("twice, bounded", 2, True)):
        runs[name] = outcome = train(times * options.rate, options.steps, bounded, options.depth, options.seed)
        last = outcome.losses[-max(1, options.steps // 10) :]
        _, entropies = list(outcome.entropies())[-1]
        shown = " ".join(f"{each:.2f}" for each in entropies)
        print(f"{name:14} {times * options.rate:11.3g} {outcome.right:11.1%} {sum(last) / len(last):7.3f}  {shown}")
        print(f"    the verdict: {outcome.monitor.verdict}")
    if options.picture:
        draw(options.picture, runs)


if __name__ == "__main__":
    main()
