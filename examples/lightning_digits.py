"""PyTorch Lightning: a deep sigmoid network on scikit-learn's digits, watched by one callback.

    python examples/lightning_digits.py

TensorBoard shows the run in lightning_logs/ with a Saturation tab; the alerts are on the console too.
"""

import argparse

import lightning.pytorch as lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchsat.integrations.lightning import Torchsat


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
        self.net = nn.Sequential(*hidden, nn.Linear(64, 10))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(pixels)
        return out

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        pixels, labels = batch
        loss = nn.functional.cross_entropy(self(pixels), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        pixels, labels = batch
        self.log("accuracy", (self(pixels).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    train, held_out = (TensorDataset(pixels[part].float(), labels[part]) for part in (slice(1500), slice(1500, None)))

    saturation = Torchsat()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[saturation], log_every_n_steps=10, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(Digits(), DataLoader(train, 64, shuffle=True), DataLoader(held_out, 64))

    assert saturation.monitor is not None
    for alert in saturation.monitor.alerts:
        print(alert.message)
    print(f"see it in TensorBoard:  tensorboard --logdir {trainer.log_dir}")


if __name__ == "__main__":
    main()
