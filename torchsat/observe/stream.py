"""Measures the inputs of normalisations: their size, and the largest value with its channel.

A normalisation divides by the size of its input, and the gradient that it passes back is divided by it too. In a transformer its input is the
residual stream, whose size grows with depth, and in which single channels may hold values far beyond all others (massive activations). All elements
are read, since such values stand at few positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchsat.ledger import CHANNELS
from torchsat.observe.route import is_norm
from torchsat.observe.way import flat
from torchsat.sharding import is_pending, part_of
from torchsat.statistics import accumulator, put_squares
from torchsat.structure import Found
from torchsat.tensors import why_unread

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

_OVER_CHANNELS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    nn.GroupNorm,
)
"""The normalisations whose input has its channels along the second axis. That of all others has them along the last one."""


def attach(observation: Observation, found: Found) -> None:
    """Hook every normalisation."""
    for each in found.modules:
        if is_norm(each.module) and next(each.module.children(), None) is None and each.name:
            observation.hook_before(each.module, f"{each.name}/input", _before, observation, each.name)


def _before(observation: Observation, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not observation.passes.counts(module):
        return
    x = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
    if x is None or is_pending(x):
        return
    part = part_of(x).detach()
    if why_unread(part) is not None or not part.numel():
        return
    axis = 1 if isinstance(module, _OVER_CHANNELS) and part.ndim > 1 else part.ndim - 1
    observation.passes.current.tally(("stream", name), *observe_stream(part, axis))


def observe_stream(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The blocks of columns.STREAM of one input, whose channels lie along `axis`."""
    vector, times = flat(x)
    sums = torch.zeros(2, dtype=accumulator(x.device), device=x.device)
    put_squares(vector, None, sums, 1)
    sums[1:] *= times
    sums[:1].fill_(x.numel())
    return sums.unsqueeze(1), _code(x, axis).reshape(1, 1)


def _code(x: Tensor, axis: int) -> Tensor:
    """The largest |x| together with the index of its channel, as one number: the larger value has the larger number (ledger.decode_top)."""
    dtype = accumulator(x.device)
    if x.shape[axis] > CHANNELS or dtype != torch.float64:
        return torch.full((), -math.inf, dtype=dtype, device=x.device)
    others = [each for each in range(x.ndim) if each != axis]
    largest, least = (x.amax(others), x.amin(others)) if others else (x, x)
    # The bits of a float32 that is not negative, read as an integer, have the order of the numbers. Together with 20 bits for the channel they fit
    # into the 53 bits of a float64.
    bits = torch.maximum(largest, -least).float().contiguous().view(torch.int32).long()
    return (bits * CHANNELS + torch.arange(len(bits), device=x.device)).amax().to(dtype)
