"""Learns peak and tails of a function that no row of the table names, from the derivative that gradients show at each z.

What is gathered on the device is a *curve*: for each of some bins of z how many elements had a known derivative, and the sum of |f'| over them. Both
add, so that calls, micro-batches and observations merge. The bins are even steps of log2(1 + 8 |z|) on either side of 0: 0.005 wide at 0, and 4 % of
z far out.

The host concludes from it, once there is enough:

- The *peak* is the largest mean of a bin. It is not known where the slope still grows with |z| at an end of what was seen.
- A *tail* begins where the mean of a bin falls below epsilon of the peak and stays there, as far as was seen. A function with zeros of its slope,
  such as a sine, seems to have a tail where what was seen ends at such a zero, so a tail has to be seen over a tenth of the way to it, in a hundredth
  of all elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchsat.activations import Constants

SIDE = 256
"""The bins on each side of 0."""
_PER_OCTAVE, _FINE = 16, 8.0
ENOUGH = 2000
"""With fewer elements nothing is concluded."""
_PER_BIN = 8
"""A bin with fewer elements is merged into the next one that is nearer to 0."""
_FORGETS = 2.0**24
"""Where more elements have been counted, the old ones are halved: a function with learned parameters changes."""


def bins_of(z: Tensor) -> Tensor:
    """The bin of each element, from the lowest z to the highest."""
    away = (torch.log2(1 + _FINE * z.abs()) * _PER_OCTAVE).clamp(max=SIDE - 1).long()
    return torch.where(z < 0, SIDE - 1 - away, SIDE + away)


def edge_of(at: int) -> float:
    """The z at which a bin begins."""
    away = at - SIDE
    return math.copysign((2 ** (abs(away) / _PER_OCTAVE) - 1) / _FINE, away)


class Curve:
    """The curve of one function: [2, bins], the number of elements and the sum of |f'|."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._copy: Tensor | None = None

    def add(self, z: Tensor, slope: Tensor, known: Tensor, weight: float) -> None:
        """Add elements at some of which the slope is known."""
        dtype = torch.float32 if z.device.type == "mps" else torch.float64
        if self._sums is None or self._sums.device != z.device:
            self._sums = torch.zeros(2, 2 * SIDE, dtype=dtype, device=z.device)
        nothing = torch.zeros((), dtype=dtype, device=z.device)
        counted = known.to(dtype) * weight
        at = bins_of(torch.where(known, z.to(dtype), nothing))
        self._sums.index_add_(1, at, torch.stack([counted, torch.where(known, slope.to(dtype), nothing) * counted]))

    def read(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Counts and sums on the host. Of a GPU these are the numbers of the call before, since nobody waits for the device."""
        if self._sums is None:
            return None
        self._sums *= torch.where(self._sums[0].sum() > _FORGETS, 0.5, 1.0)
        if self._sums.is_cpu:
            found: Tensor | None = self._sums
        else:
            found = self._copy
            self._copy = torch.zeros(self._sums.shape, dtype=self._sums.dtype, pin_memory=self._sums.is_cuda).copy_(self._sums, non_blocking=True)
        return None if found is None else (found[0].tolist(), found[1].tolist())


def learn(counts: Sequence[float], sums: Sequence[float], epsilon: float) -> Constants | None:
    """Peak and tails of a curve; None where there is too little to tell, or where the slope still grows at an end."""
    bins = _merged(counts, sums)
    total = sum(each[2] for each in bins)
    if total < ENOUGH or len(bins) < 8:
        return None
    means = [each[3] for each in bins]
    peak = max(means)
    if not math.isfinite(peak) or peak <= 0 or _grows(bins, total) or _grows(bins[::-1], total):
        return None
    high = _tail(bins, total, epsilon * peak)
    mirrored = _tail([(-last, -first, count, mean) for first, last, count, mean in bins[::-1]], total, epsilon * peak)
    low = None if mirrored is None else -mirrored
    return Constants(
        peak=peak,
        low=low,
        high=high,
        tails_known=True,
        normal_low=0.0 if low is None else 0.5 * math.erfc(-low / math.sqrt(2)),
        normal_high=0.0 if high is None else 0.5 * math.erfc(high / math.sqrt(2)),
        normal_derivative=_normal_mean(bins, peak),
    )


_Bin = tuple[float, float, float, float]
"""Where a bin begins and ends, its count and its mean slope."""


def _merged(counts: Sequence[float], sums: Sequence[float]) -> list[_Bin]:
    """The bins with enough elements, from the lowest z to the highest; one with too few is merged into its neighbour nearer to 0."""
    found: list[_Bin] = []
    for side in (range(SIDE - 1, -1, -1), range(SIDE, 2 * SIDE)):
        half: list[list[float]] = []
        for at in side:
            if not counts[at]:
                continue
            if half and counts[at] < _PER_BIN:
                half[-1][0], half[-1][1] = min(half[-1][0], edge_of(at)), max(half[-1][1], edge_of(at + 1))
                half[-1][2] += counts[at]
                half[-1][3] += sums[at]
            else:
                half.append([edge_of(at), edge_of(at + 1), counts[at], sums[at]])
        found += [(first, last, count, total / count) for first, last, count, total in half]
    return sorted(found)


def _grows(bins: Sequence[_Bin], total: float) -> bool:
    """Whether the slope is larger over the last hundredth of the elements than anywhere else in their upper half, as that of a square is."""
    seen, outer, inner = 0.0, 0.0, 0.0
    for _, _, count, mean in reversed(bins):
        seen += count
        if seen > 0.5 * total:
            break
        outer, inner = (max(outer, mean), inner) if seen <= 0.01 * total else (outer, max(inner, mean))
    return outer > 1.05 * inner and outer >= 0.5 * max(each[3] for each in bins)


def _tail(bins: Sequence[_Bin], total: float, level: float) -> float | None:
    """Where the high tail begins: between the middles of the last bin that is not below the level and the one after it. None: there is none."""
    at = max((at for at, each in enumerate(bins) if each[3] >= level), default=len(bins))
    tail = bins[at + 1 :]
    if not tail or sum(each[2] for each in tail) < max(32.0, 0.01 * total):
        return None
    inner, outer = bins[at], tail[0]
    left, right = (inner[0] + inner[1]) / 2, (outer[0] + outer[1]) / 2
    edge = left + (right - left) * (inner[3] - level) / max(inner[3] - outer[3], 1e-300)
    middle = sum((first + last) / 2 * count for first, last, count, _ in bins) / total
    return edge if tail[-1][1] - edge >= 0.1 * abs(edge - middle) else None


def _normal_mean(bins: Sequence[_Bin], peak: float) -> float | None:
    """E|f'(z)| / peak for z ~ N(0, 1), where nearly all of that range was seen."""

    def below(z: float) -> float:
        return 0.5 * math.erfc(-z / math.sqrt(2))

    shares = [below(last) - below(first) for first, last, _, _ in bins]
    seen = sum(shares)
    return sum(share * each[3] for share, each in zip(shares, bins, strict=True)) / seen / peak if seen > 0.95 else None
