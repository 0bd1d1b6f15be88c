"""The Gram matrix of the features of a site, from which the host computes their effective rank (spectrum.py).

Of a = f(z), at most SAMPLES samples of a call are read, and of these at most FEATURES features. The features are the same in all calls and on all
ranks, spread evenly over the layer; the samples are drawn anew in each call. The sum over samples of the outer product of the features with
themselves has the squares of the singular values of [samples, features] as eigenvalues, and unlike these it adds up over micro-batches and ranks.
Behind the features stands a 1, so that the last element counts the samples, and the last row holds the sums of the features.

Each sample that is read counts once, whatever its call has: of a call with more than SAMPLES samples so many are read, of a smaller one all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchsat.sampling import places
from torchsat.statistics import accumulator

FEATURES = 128
"""The most features of a site that are compared with each other."""
SAMPLES = 512
"""The most samples of one call that are read."""


def gram(a: Tensor, axis: int, seed: int) -> Tensor:
    """[1, (features + 1)^2]: the block of sums of columns.RANK of one call. The features of a lie along `axis`. A sample of which a feature is inf or
    nan is left out."""
    x = torch.movedim(a, axis, -1)
    shape, width = x.shape[:-1], x.shape[-1]
    samples, features = math.prod(shape), min(width, FEATURES)
    dtype = accumulator(a.device)
    column = torch.arange(features, device=a.device).mul_(width).div_(features, rounding_mode="floor")
    row = places(samples, min(samples, SAMPLES), seed, a.device).long()
    # Only what is read is copied, however large and in whatever order of memory the activation is.
    chosen = (*(index.unsqueeze(1) for index in torch.unravel_index(row, shape)), column)
    read = x[chosen].to(dtype)
    finite = torch.isfinite(read).all(1, keepdim=True)
    read = torch.cat([torch.where(finite, read, torch.zeros_like(read)), finite.to(dtype)], 1)
    return (read.T @ read).reshape(1, -1)
