"""Computes the largest singular value of a weight by a few products with vectors. Pure arithmetic, and nothing waits for the device.

The largest singular value of W is the root of the largest eigenvalue of A = W^T W. Power iteration finds it slowly where the next ones are near, as
they are in every weight that was drawn at random. The best value within the span of v, A v, A^2 v, ... (Lanczos) takes a tenth of the products. The
vector that is found is kept by the caller, and the next observation begins with it: training moves a weight little between two of them, so that a
few products are enough from then on.

No random generator is touched, and no eigenvalue routine is called, since those of a GPU wait for it: the small matrix of the span is squared until
only its first eigenvector is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchsat.statistics import accumulator

FIRST, LATER = 32, 5
"""How many products with A are made without a vector to begin with, and with one."""
_POWER, _TIMES = 16, 6
"""The matrix of the span is raised to the power 16 so many times. Eigenvalues that differ by more than 16^-6 of themselves are told apart, and of
others the mean is as good."""
_NOTHING_LEFT = 1e-6
"""The span is complete where what A adds to it is below this share of what it began with."""


def largest_singular(weight: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest singular value of a matrix, from below, and the vector that gives it; of a weight with more axes, that of [first axis, all others].

    A value that is inf or nan comes from a weight with such an element.

    Args:
        start: the vector that an earlier call with nearly the same weight returned.
    """
    matrix = weight.detach().flatten(1)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    drawn = _drawn(matrix.shape[1], matrix)
    with torch.autocast(matrix.device.type, enabled=False):
        vector = drawn if start is None or start.shape != drawn.shape else start.to(drawn)
        # Where an element of the weight was not finite, the vector of that observation is of no use.
        usable = torch.isfinite(vector).all() & (vector.norm() > 0)
        return _ritz(matrix, torch.where(usable, vector, drawn), FIRST if vector is drawn else LATER)


def _ritz(matrix: Tensor, vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The largest singular value within the span of so many products, and its vector."""
    basis, images = [vector / vector.norm()], list[Tensor]()
    size = None
    # The first vector may lie outside of what the rows span, which no later one does.
    for _ in range(min(steps, min(matrix.shape) + 1)):
        images.append(matrix @ basis[-1])
        added = images[-1] @ matrix
        size = added.norm() if size is None else size
        known = torch.stack(basis)
        # Once is not enough: what is left of a vector that lies almost within the span is rounding.
        for _ in range(2):
            added = added - (known @ added) @ known
        rest = added.norm()
        basis.append(torch.where(rest > _NOTHING_LEFT * size, added / rest, torch.zeros_like(added)))
    stacked, spanned = torch.stack(images).to(accumulator(matrix.device)), torch.stack(basis[:-1])
    gram = stacked @ stacked.T
    power = gram / gram.diagonal().sum()
    for _ in range(_TIMES):
        power = torch.linalg.matrix_power(power, _POWER)
        power = power / power.diagonal().sum()
    value = (power * gram).sum().sqrt()
    return value, power[0].to(spanned) @ spanned


def _drawn(size: int, like: Tensor) -> Tensor:
    """A vector to begin with: always the same, and like no feature of a weight."""
    at = torch.arange(1, size + 1, dtype=torch.float64, device=None if like.device.type == "mps" else like.device)
    return torch.cos(at * at * 0.7548776662466927).to(like)
