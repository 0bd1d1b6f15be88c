"""A deep sigmoid network on raw pixels: it learns badly, and one line says which layers are saturated.

    python examples/digits.py           the broken network, written to runs/digits
    python examples/digits.py --sane    the same loop with ReLU, He initialisation and standardised inputs, written to runs/digits_sane

The data are the 1797 handwritten digits that ship with scikit-learn.
"""

import argparse
import logging
import shutil
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchsat
from torchsat.report import report


def network(sane: bool) -> nn.Sequential:
    """Four hidden layers of 64. The usual mistake: sigmoids, with weights drawn from N(0, 1) whatever the width."""
    model = nn.Sequential()
    for k in range(1, 5):
        linear = nn.Linear(64, 64)
        if sane:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        else:
            nn.init.normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        model.add_module(f"hidden{k}", nn.Sequential(OrderedDict(linear=linear, act=nn.ReLU() if sane else nn.Sigmoid())))
    model.add_module("head", nn.Linear(64, 10))
    return model


def train(log_dir: str | None, sane: bool = False, steps: int = 1000) -> tuple[float, torchsat.Monitor]:
    """An ordinary training loop. Returns the accuracy on held-out digits, and the monitor."""
    torch.manual_seed(0)
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float()
    if sane:
        pixels = (pixels - pixels[:1500].mean(0)) / (pixels[:1500].std(0) + 1e-3)

    model = network(sane)
    monitor = torchsat.watch(model, log_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    writer = SummaryWriter(log_dir)
    for step in range(steps):
        batch = torch.randint(1500, (64,))
        loss = nn.functional.cross_entropy(model(pixels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        writer.add_scalar("train/loss", loss.item(), step)
    writer.close()
    monitor.close()

    model.eval()
    with torch.no_grad():
        accuracy = (model(pixels[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    return accuracy, monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sane", action="store_true")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)

    run = Path("runs/digits_sane" if options.sane else "runs/digits")
    shutil.rmtree(run, ignore_errors=True)
    accuracy, monitor = train(str(run), options.sane, options.steps)

    print(f"\naccuracy on held-out digits: {accuracy:.1%}, alerts firing: {len(monitor.alerts)}\n")
    report(run)
    print("\nsee it in TensorBoard:  tensorboard --logdir runs")


if __name__ == "__main__":
    main()
