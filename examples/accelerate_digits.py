"""Accelerate: a deep tanh network on scikit-learn's digits, with gradient accumulation, watched by one line.

    python examples/accelerate_digits.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_digits.py

TensorBoard shows the run in runs/accelerate_digits with a Saturation tab.
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchsat.integrations.accelerate import watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with="tensorboard", project_dir="runs")
    accelerator.init_trackers("accelerate_digits")

    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(TensorDataset(pixels.float(), labels), 32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    monitor = watch(accelerator, model)

    step = 0
    for _ in range(epochs):
        for batch, target in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch), target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                accelerator.log({"loss": loss.item()}, step=step)
                step += 1
    monitor.close()
    accelerator.end_training()

    for alert in monitor.alerts:
        accelerator.print(alert.message)
    accelerator.print(f"{step} steps; see it in TensorBoard:  tensorboard --logdir runs")


if __name__ == "__main__":
    main()
