"""A plain training loop, and functions that find what a monitor has put on a model and in the process."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import torchsat
from torchsat.loop import Loop


def train(
    model: nn.Module,
    steps: int = 12,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    each: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Trains on random data with a plain loop and returns the loss of every forward pass."""
    generator = torch.Generator().manual_seed(7)
    steps_of = optimizer(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        for _ in range(accumulate):
            x, y = torch.randn(16, 64, generator=generator), torch.randint(3, (16,), generator=generator)
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item())
        steps_of.step()
        steps_of.zero_grad()
        each(step)
    return losses


def traces_of(model: nn.Module) -> list[object]:
    return [
        thing
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
        for thing in getattr(module, kind).values()
    ]


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def loop_of(monitor: torchsat.Monitor) -> Loop:
    """The loop behind a monitor, for what no public name tells."""
    return monitor._loop
