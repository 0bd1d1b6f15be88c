"""PyTorch Ignite needs no integration: its Trainer steps a torch optimizer, and that is all that torchsat listens to.

    python examples/ignite_digits.py

A network with tanh on scikit-learn's digits, whose weights are drawn too large.
"""

import argparse

import torch
from ignite.engine import Events, create_supervised_trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchsat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    pixels = (pixels.float() - pixels.float().mean()) / pixels.float().std()
    first = nn.Linear(64, 64)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    nn.init.normal_(first.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
    monitor = torchsat.watch(model, "runs/ignite")
    trainer.add_event_handler(Events.COMPLETED, monitor.close)
    trainer.run(DataLoader(TensorDataset(pixels, labels), 64, shuffle=True), max_epochs=epochs)

    for alert in monitor.alerts:
        print(alert.message)
    print("see it in TensorBoard:  tensorboard --logdir runs")


if __name__ == "__main__":
    main()
