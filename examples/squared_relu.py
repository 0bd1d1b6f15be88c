"""How sparse may the activations of a small GPT be? Squared ReLU, and shares of zeros that are set by force.

    python examples/squared_relu.py                      ten trainings: four activation functions, and ReLU with a given share of zeros
    python examples/squared_relu.py --picture cliff.png  the same, as a picture (matplotlib)

A preprint of 2026 (arXiv 2605.17659) finds that ReLU makes up to 90 % of the activations of a small GPT zero, that squared ReLU has a good ratio of
sparsity to loss there but amplifies spikes, the largest activations of some layers, which a clip prevents, and that over 79 configurations the
accuracy falls off a cliff where more than about 70 % of the activations are zero.

Here a GPT of four blocks learns Python's own documentation character by character. `record.zeros` is the share of activations that are 0, and
`record.a_max` the largest one. With a given share, only the largest pre-activations of each token are kept.
"""

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformer import ALPHABET, GPT, LENGTH, TEXT

import torchsat

BATCH, HELD_OUT = 16, 40_000
CLIP = 4.0


class SquaredReLU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.relu(z).square()


class ClippedSquaredReLU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.relu(z).square().clamp(max=CLIP)


class Largest(nn.Module):
    """Keeps the largest pre-activations of each token, so that a given share of its units is zero behind the ReLU that follows, or more."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, z: Tensor) -> Tensor:
        return z.masked_fill(z <= z.detach().kthvalue(round(self.share * z.shape[-1]), -1, keepdim=True).values, 0.0)


NATURAL: dict[str, Callable[[], nn.Module]] = {"GELU": nn.GELU, "ReLU": nn.ReLU, "ReLU^2": SquaredReLU, "clipped ReLU^2": ClippedSquaredReLU}
FORCED = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Outcome:
    loss: float
    """The mean cross-entropy of held-out text, in nats per character."""
    zeros: float
    """The share of activations that are 0, over all blocks, at the end."""
    spike: float
    """The largest activation of a block at the end, in multiples of the root mean square of that block: the most over blocks."""
    monitor: torchsat.Monitor


def characters() -> Tensor:
    """The text as numbers."""
    place = {character: at for at, character in enumerate(ALPHABET)}
    return torch.tensor([place[character] for character in TEXT])


def train(activation: Callable[[], nn.Module], text: Tensor, steps: int, rate: float = 2e-3, seed: int = 0) -> Outcome:
    """An ordinary loop with a warm-up."""
    torch.manual_seed(seed)
    model = GPT(activation=activation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=max(1, min(100, steps // 4)))
    snapshots: list[torchsat.Snapshot] = []
    with torchsat.watch(model, every=max(1, steps // 20), budget=None, sinks=[snapshots.append]) as monitor:
        for _ in range(steps):
            batch = text[torch.randint(len(text) - HELD_OUT - LENGTH - 1, (BATCH, 1)) + torch.arange(LENGTH + 1)]
            loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
    pieces = text[-HELD_OUT:].unfold(0, LENGTH + 1, LENGTH)
    with torch.no_grad():
        held_out = nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten()).item()
    records = [record for record in snapshots[-1] if ".mlp" in record.site]
    return Outcome(held_out, sum(record.zeros or 0.0 for record in records) / len(records), max(spike(record) for record in records), monitor)


def spike(record: torchsat.Record) -> float:
    assert record.a_max is not None
    assert record.a_mean is not None
    assert record.a_std is not None
    return record.a_max / math.hypot(record.a_mean, record.a_std)


def draw(path: str, runs: dict[str, Outcome]) -> None:
    """The picture: loss over the share of zeros, and the spikes of the activation functions that nothing is forced on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, spikes = figure.subplots(1, 2)
    forced = [runs[name] for name in runs if name not in NATURAL]
    loss.plot([run.zeros for run in forced], [run.loss for run in forced], color="0.6", marker="o", markersize=4, label="ReLU, share given")
    for name in NATURAL:
        loss.plot(runs[name].zeros, runs[name].loss, marker="D", linestyle="none", label=name)
    loss.set(xlabel="share of zeros", xlim=(-0.03, 1.03))
    loss.set_title("loss of held-out text, nats per character", fontsize=10, loc="left")
    loss.legend(frameon=False, fontsize=8)
    spikes.bar(list(NATURAL), [runs[name].spike for name in NATURAL], color="0.6")
    spikes.set_title("largest activation, in root mean squares", fontsize=10, loc="left")
    for axis in (loss, spikes):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def forced(share: float) -> Callable[[], nn.Module]:
    """ReLU of which no more than the rest of each token's units is on."""
    return lambda: nn.Sequential(Largest(share), nn.ReLU())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--given", type=float, nargs="*", default=FORCED, help="the shares of zeros that are set by force")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", help="where to draw it (needs matplotlib)")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    torch.set_num_threads(1)

    runs, text = dict[str, Outcome](), characters()
    print("                  zeros  held-out loss  largest / rms")
    for name, activation in {**NATURAL, **{f"ReLU, {share:.0%} given": forced(share) for share in options.given}}.items():
        runs[name] = outcome = train(activation, text, options.steps, options.rate, options.seed)
        print(f"{name:16} {outcome.zeros:6.1%} {outcome.loss:14.3f} {outcome.spike:14.1f}")
        if outcome.monitor.alerts:
            print(f"    the verdict: {outcome.monitor.verdict}")
    if options.picture:
        draw(options.picture, runs)


if __name__ == "__main__":
    main()
