"""Two networks with half of their elements on a plateau: one is sure of what it has learned, the other one is stuck. The gradient tells which.

    python examples/sure_or_stuck.py                         prints the figures of both
    python examples/sure_or_stuck.py --picture stuck.png     also draws them side by side

Both are the same tanh network, with the same initialisation, on the digits of scikit-learn. One is trained with a learning rate that suits it, until
it makes no error, and long after that. The other one is trained with 5 times that rate. The share of elements on a plateau does not tell them apart.
What the plateaus take of the gradient's demand (blocked), and what of it asks the elements to leave (trapped), does.
"""

import argparse
import logging

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchsat

RATES = {"sure": 0.01, "stuck": 0.05}
"""The learning rate of each network."""
SITE = "3"
"""The second tanh layer, whose figures are shown."""


def train(rate: float, steps: int) -> tuple[float, list[torchsat.Snapshot], tuple[torchsat.Alert, ...]]:
    """An ordinary loop. Returns the share of held-out digits that it gets right, every snapshot, and the alerts."""
    torch.manual_seed(0)
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    inputs = (pixels.float() - 4.9) / 6.0
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    snapshots: list[torchsat.Snapshot] = []
    with torchsat.watch(model, every=20, budget=None, sinks=[snapshots.append]) as monitor:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(steps):
            batch = torch.randint(1500, (64,))
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = (model(inputs[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    return right, snapshots, monitor.alerts


def draw(runs: dict[str, list[torchsat.Snapshot]], path: str) -> None:
    """One panel for each network: the share on a plateau, and the blocked and the trapped demand, over the steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), sharey=True, layout="constrained")
    for panel, (name, snapshots) in zip(panels, runs.items(), strict=True):
        for metric, colour in (("saturated", "0.55"), ("blocked", "#0072b2"), ("trapped", "#d55e00")):
            shares = [getattr(snapshot[SITE], metric) for snapshot in snapshots]
            panel.plot([snapshot.step for snapshot in snapshots], shares, color=colour, label=metric)
        panel.set(title=f"{name}: learning rate {RATES[name]}", xlabel="step", ylim=(0, 1))
    panels[0].set_ylabel("share of elements, or of the demand")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--picture", help="draw the two networks into this file")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    runs = {}
    for name, rate in RATES.items():
        right, runs[name], alerts = train(rate, options.steps)
        last = runs[name][-1][SITE]
        print(f"{name}: {right:.1%} right, {len(alerts)} alerts")
        print(f"    on a plateau {last.saturated:.0%}, blocked {last.blocked:.0%}, trapped {last.trapped:.0%}")
    if options.picture:
        draw(runs, options.picture)
        print(f"the picture is in {options.picture}")


if __name__ == "__main__":
    main()
