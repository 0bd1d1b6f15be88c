"""Which keys the float masks of an attention hide. Pure functions.

A key does not count for a query that cannot see it. Boolean masks say so. A float mask hides a key by a value far below those of the keys that are
seen: -100, -1e4, the lowest number of a type, minus infinity. A bias that falls with the distance (ALiBi) gets as low, but step by step. So a value
hides its key only if a gap lies above it: see `_beyond_gap`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FILL, _CERTAIN = -9000.0, -1e6
"""Sums of logits and masks below the first are hidden, if a gap lies above them; below the second they always are."""
_FAR = 80.0
"""A float mask hides a key by a value so far below the largest of its row: e^-80 is no weight at all."""
_GAP = 20.0
"""The least gap between the keys that a mask hides and those that it does not. Neighbouring keys of ALiBi are 1 apart at most."""


def seen_in(z: Tensor) -> Tensor:
    """Which keys no mask hides, of which only the sum z of logits and masks is known."""
    # The host may look at the numbers of a CPU only. Mostly nothing is hidden, and finding out what is takes several passes.
    if z.device.type == "cpu" and z.detach().numpy().min() > _FILL:
        return torch.ones((1, 1, 1, 1), dtype=torch.bool)
    return ~_hidden(z)


def seen_under(mask: Tensor) -> Tensor:
    """Which keys a mask that is added to the logits does not hide."""
    return ~(_hidden(mask) | _beyond_gap(mask, mask.amax(-1, keepdim=True) - _FAR))


def _hidden(z: Tensor) -> Tensor:
    """Which keys a mask hides, of which only the sum z of logits and masks may be known."""
    return (z <= _CERTAIN) | _beyond_gap(z, _FILL)


def _beyond_gap(z: Tensor, edge: float | Tensor) -> Tensor:
    """Where z lies at or below an edge, in those rows in which a gap separates these values from the others. In a row that lies there as a whole, all
    of it does."""
    below = z <= edge
    nothing = torch.full((), math.inf, dtype=z.dtype, device=z.device)
    gap = torch.where(below, nothing, z).amin(-1, keepdim=True) - torch.where(below, z, -nothing).amax(-1, keepdim=True)
    return below & (gap >= _GAP)
