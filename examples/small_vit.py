"""A small Vision Transformer for the digits of scikit-learn, which lazy_neurons.py and entropy_collapse.py train."""

from collections.abc import Iterable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

KNOWN = 1500
"""So many of the 1797 digits are trained on; the others are held out."""


class ViT(nn.Module):
    """Cuts a digit of 8 x 8 pixels into 16 patches and puts them through blocks of torch's own transformer, whose norms stand before the branches."""

    def __init__(self, depth: int = 4, width: int = 64, heads: int = 4, hidden: int = 256, activation: str = "gelu") -> None:
        super().__init__()
        self.patch, self.place = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, hidden, 0.0, activation, batch_first=True, norm_first=True) for _ in range(depth))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        out: Tensor = self.head(self.norm(self.blocks(self.patch(patches) + self.place)).mean(1))
        return out


def digits() -> tuple[Tensor, Tensor]:
    """All digits as 64 pixels each, with mean 0 and standard deviation 1 over all of them, and their labels."""
    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    pixels = pixels.float()
    return (pixels - pixels.mean()) / pixels.std(), labels


def draw_blocks(axis: Any, points: Iterable[tuple[int, list[float]]]) -> None:
    """A line for each block, the first one darkest, into a panel of matplotlib. `points`: steps, each with a number for each block."""
    steps, values = zip(*points, strict=True)
    for block, line in enumerate(zip(*values, strict=True)):
        axis.plot(steps, line, color=str(0.7 * block / len(values[0])), label=f"block {block}")
