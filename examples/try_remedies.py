"""Find out what helps a deep sigmoid network on raw pixels: every remedy is tried on a copy of the network and measured.

    python examples/try_remedies.py                       prints a table, and what the numbers say about each remedy
    python examples/try_remedies.py --picture trials.png  also draws the curves

The data are the 1797 handwritten digits that ship with scikit-learn. The network is that of examples/digits.py.
"""

import argparse
from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchsat


def network() -> nn.Sequential:
    """A network with four hidden layers of 64 sigmoids. The weights are drawn from N(0, 1) regardless of the width, which is far too large."""
    model = nn.Sequential()
    for k in range(1, 5):
        linear = nn.Linear(64, 64)
        nn.init.normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        model.add_module(f"hidden{k}", nn.Sequential(OrderedDict(linear=linear, act=nn.Sigmoid())))
    model.add_module("head", nn.Linear(64, 10))
    return model


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", help="draw loss, saturation and gradients over the steps into this file")
    options = parser.parse_args()

    torch.manual_seed(0)
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    batches = list(zip(pixels.float()[:1500].split(64), labels[:1500].split(64), strict=True))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    trials = torchsat.try_remedies(model, batches, loss, optimizer=optimizer, steps=options.steps)
    print(trials)
    print()
    for trial in trials.trials[1:]:
        print(trials.sentence(trial.remedy))
    if options.picture:
        trials.picture(options.picture)
        print(f"\nthe picture is in {options.picture}")


if __name__ == "__main__":
    main()
