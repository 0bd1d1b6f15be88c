"""Computes dL/dp of fused attention, whose probabilities p are never written to memory, from the gradient of its output. Pure arithmetic.

The output of a kernel is O = p V, so that dL/dp = dL/dO V^T. It is computed for the query rows that are read, and the values V are needed for that in
the backward: those of the samples that these rows are in.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from torchsat import internals
from torchsat.attention import Queries, Values, product
from torchsat.statistics import upcast


class KeptValues:
    """The values of those samples of which rows are read, kept from the forward pass until the backward.

    Only these samples are copied. A source of which all samples are needed is not: it is held until the first backward, in which the graph lets go of
    it too. Where the user has the graph kept for a second backward, the source lives on in it, and a weak reference finds it.
    """

    def __init__(self, values: Values, rows: Queries) -> None:
        is_whole = rows.has_all_samples
        self._arrange, self._project = values.arrange, values.project
        detached = values.source.detach()
        self._held: Tensor | None = detached if is_whole else rows.of_samples(values.arrange(detached))
        self._source = weakref.ref(values.source) if is_whole else None
        """None where some samples are held, as a copy."""
        self._version = internals.version(detached)
        self._weights = [(weight.detach(), internals.version(weight)) for weight in values.weights]

    def take(self) -> Tensor | None:
        """The values, [samples, groups, keys, features]; None where what they come from is gone, or was changed in place since the forward pass."""
        if any(not _is_as_it_was(*each) for each in self._weights):
            return None
        if self._source is None:
            return None if self._held is None else self._project(self._held)
        source, self._held = self._source() if self._held is None else self._held, None
        if source is None or not _is_as_it_was(source, self._version):
            return None
        return self._project(self._arrange(source.detach()))


def _is_as_it_was(tensor: Tensor, version: int) -> bool:
    """Whether a tensor that had this version was not changed in place since, and still has its memory: FSDP2 frees that of a whole weight between the
    forward pass and the backward."""
    return internals.version(tensor) == version and tensor.untyped_storage().nbytes() > 0


def grad_of_weights(grad: Tensor, values: Tensor, rows: Queries) -> Tensor:
    """dL/dp at these rows, [samples, heads, positions, keys].

    Args:
        grad: dL/dO, [batch, heads, queries, features], in any axes. A kernel may have padded the features, or take the samples of an attention
            without heads for its heads.
        values: the values of these samples.
    """
    grad = grad.reshape(*rows.shape[:3], -1)
    (groups, _, size), taken = values.shape[1:], upcast(rows.pick(grad))
    samples, heads, positions, _ = taken.shape
    taken = taken[..., :size].reshape(samples, groups, heads // groups, positions, size)
    return product(taken, values.unsqueeze(2)).reshape(samples, heads, positions, -1)
