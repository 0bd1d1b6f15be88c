"""I fine-tune a network that came trained, and it gets worse: what does the new data do to it?

    python examples/finetuning.py           the new images come as pixels from 0 to 255, where the network was trained on 0 to 1
    python examples/finetuning.py --sane    the new images come as the network knows them

A convolutional network learns the digits 0 to 4. Then its convolutions and their BatchNorm are frozen, and a new head with a tanh layer learns the
digits 5 to 9. With the wrong scale everything behind the frozen part is hundreds of times too large, and the tanh is saturated at the first step. A
frozen part is measured like any other: nothing of it has to learn for that.
"""

import argparse
import logging

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchsat


def body() -> nn.Sequential:
    """Two convolutions with batch normalisation: what is kept."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def data(digits: range) -> tuple[Tensor, Tensor]:
    """Images with values from 0 to 1, and the number of each digit in the list."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    kept = (labels >= digits.start) & (labels < digits.stop)
    return images[kept].float().reshape(-1, 1, 8, 8) / 16, labels[kept] - digits.start


def fit(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> float:
    """Train the parameters that are not frozen. Returns the share of the images that the model then knows."""
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=rate)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def train(sane: bool, steps: int, log_dir: str | None = None) -> tuple[float, torchsat.Monitor]:
    """Train, freeze, and fine-tune. Returns the share of new images that the network then knows, and the monitor."""
    torch.manual_seed(0)
    base = body()
    fit(nn.Sequential(base, nn.Linear(32, 5)), *data(range(5)), steps=200, rate=3e-3)

    # The statistics of BatchNorm are frozen, too: in evaluation mode it uses those of the first training.
    base.requires_grad_(False).eval()
    model = nn.Sequential(base, nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
    images, labels = data(range(5, 10))
    monitor = torchsat.watch(model, log_dir, every=10)
    known = fit(model, images if sane else 255 * images, labels, steps, rate=1e-2)
    monitor.close()
    return known, monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sane", action="store_true", help="give it the new images as it knows images")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log", help="the directory to write for TensorBoard")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)

    known, monitor = train(options.sane, options.steps, options.log)
    print(f"\nof the new digits it knows {known:.1%}")
    print(f"the verdict: {monitor.verdict}")
    if monitor.verdict.advice:
        print(f"try: {monitor.verdict.advice}")


if __name__ == "__main__":
    main()
