"""What an optimizer's group says of its step: the learning rate, and what weight decay does to a weight.

A layer whose gradient is 0 still changes under weight decay, so the change of a weight alone does not show whether the layer learns. How decay acts
depends on the optimizer:

- *Decoupled* (AdamW): the weight is multiplied by 1 - learning rate x weight decay before the rest of the step. What is left of the change is exact.
- *Coupled* (SGD, Adam): weight decay x weight is added to the gradient. Adam makes a step of the usual size of that sum, however small the gradient
  is. Of the step, the gradient's part is then told by the norms of the two terms.
- An optimizer of another library: nothing is known, but that a gradient of exactly 0 teaches nothing.

A learning rate can be a tensor (`capturable=True`, compiled optimizers). On a GPU it is copied there and travels with the other numbers, since
reading it would wait for the device.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchsat.statistics import put_squares


class Coupling(Enum):
    """Where weight decay enters the step of an optimizer."""

    DECOUPLED = "decoupled"
    COUPLED = "coupled"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Decay:
    """The weight decay of one group of an optimizer in one step."""

    coupling: Coupling
    weight_decay: float
    rate: float | Tensor | None
    """The learning rate; a tensor only where it is on another device than the CPU."""


def learning_rate(group: dict[str, Any]) -> float | Tensor | None:
    """The learning rate of a group: a number, or where it is a tensor on a GPU a copy of it there. None: it has none that is a number."""
    return _number(group.get("lr"))


def decay_of(optimizer: Optimizer, group: dict[str, Any]) -> Decay | None:
    """The weight decay of a group; None where it has none."""
    weight_decay = _number(group.get("weight_decay"))
    if not isinstance(weight_decay, float) or not weight_decay:
        return None
    return Decay(_coupling(optimizer, group), weight_decay, learning_rate(group))


def put_learned(before: Tensor, now: Tensor, decay: Decay | None, sums: dict[str, Tensor]) -> None:
    """Write `learned_sq` of columns.WEIGHT: the sum of squares of what the step did to a weight beside weight decay. NaN where it is not known.

    Args:
        before, now: the elements of the weight that are read, before and after the step.
        sums: a view of one element for each name in columns.WEIGHT; the others have been written.
    """
    learned, change, grad = sums["learned_sq"], sums["change_sq"], sums["grad_sq"]
    if decay is None:
        learned.copy_(change)
    elif decay.coupling is Coupling.COUPLED:
        learned.copy_(change * grad / (grad + decay.weight_decay**2 * sums["weight_sq"]))
    elif decay.coupling is Coupling.UNKNOWN:
        learned.copy_(torch.where(grad == 0, grad, change))
    elif decay.rate is not None:
        rate = decay.rate.to(before.device, non_blocking=True) if isinstance(decay.rate, Tensor) else decay.rate
        # In the type of the weight, as the optimizer computes it. A weight that has only decayed is then met bit for bit.
        both = learned.new_zeros(2)
        put_squares(before * (1 - rate * decay.weight_decay), now, both, 0)
        learned.copy_(both[1:])


def _coupling(optimizer: Optimizer, group: dict[str, Any]) -> Coupling:
    said = group.get("decoupled_weight_decay")
    if said is None:
        said = getattr(optimizer, "adam_w_mode", None)
    if said is not None:
        return Coupling.DECOUPLED if said else Coupling.COUPLED
    kinds = type(optimizer).__mro__
    if any(name in kind.__name__.lower() for kind in kinds for name in ("adamw", "muon", "lion", "adafactor")):
        return Coupling.DECOUPLED
    known = type(optimizer).__module__.partition(".")[0] == "torch"
    return Coupling.COUPLED if known else Coupling.UNKNOWN


def _number(value: Any) -> float | Tensor | None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta:
            return None
        return float(value.detach()) if value.device.type == "cpu" else value.detach().reshape(()).clone()
    return float(value) if isinstance(value, numbers.Real) else None
