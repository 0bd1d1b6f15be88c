"""The scores of faults.py's scenarios: functions of outputs and targets, of which more is better."""

from __future__ import annotations

from torch import Tensor


def accuracy(output: Tensor, target: Tensor) -> float:
    """The share of right classes: the largest output along the last axis."""
    return (output.argmax(-1) == target).float().mean().item()


def explained(output: Tensor, target: Tensor) -> float:
    """The share of the variance of the targets that the outputs explain."""
    return 1 - ((output - target).square().mean() / target.var()).item()
