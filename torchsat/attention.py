"""Computes the logits of attention again from the arguments of the call, since fused kernels never write them to memory. Pure functions.

Only some query rows are computed, so that the T x T matrix of a long context never exists. The rows are spread over batch and positions, and are the
same for all heads.

A key does not count for a query that cannot see it. It is masked where a boolean mask says so, and where a float mask lies 80 below the largest value
of its row, since e^-80 is no weight at all. Where only the sum of logit and mask is known, it is masked where that sum is below -9000: masks are
filled with -1e4, with the lowest number of a type, or with minus infinity.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsat.replay import NotRebuiltError
from torchsat.sampling import spaced
from torchsat.statistics import upcast

_MASKED, _MASKED_SUM = -80.0, -9000.0
_LEAST_ROWS = 8
"""At least this many query rows of each head are read, however many keys they have."""


@dataclass(frozen=True)
class Logits:
    """The logits of some query rows of an attention."""

    z: Tensor
    """[batch, heads, queries, keys], with what float masks add."""
    visible: Tensor
    """Booleans that broadcast to z: which keys a query sees."""
    elements: int
    """How many logits the whole attention has."""


@dataclass(frozen=True)
class Queries:
    """Which query rows are read: some samples of the batch, and in each of them some positions."""

    batch: slice
    positions: slice

    @staticmethod
    def of(shape: tuple[int, ...], limit: int | None, turn: int) -> Queries:
        """The query rows of logits of this shape, [batch, heads, queries, keys].

        Args:
            limit: the rows have about this many logits over all heads, but every head has at least 8 rows; None: all rows.
            turn: which observation this is.
        """
        batch, heads, queries, keys = shape
        rows = batch * queries if limit is None else max(_LEAST_ROWS, limit // max(1, heads * keys))
        # What a query sees depends on its position, above all under a causal mask. So positions are chosen first, then as many samples as fit.
        positions = min(queries, max(_LEAST_ROWS, math.isqrt(rows), -(-rows // max(1, batch))))
        return Queries(spaced(batch, max(1, rows // max(1, positions)), turn), spaced(queries, positions, turn))


@dataclass(frozen=True)
class SoftmaxRows:
    """Which rows of a softmax over one axis are read.

    A softmax over the last of four axes is taken for an attention [batch, heads, queries, keys]. Any other one counts as one head.
    """

    shape: tuple[int, ...]
    axis: int
    has_heads: bool
    queries: Queries

    @staticmethod
    def of(z: Tensor, axis: int, limit: int | None, turn: int, has_heads: bool = True) -> SoftmaxRows:
        """The rows of a softmax of z over this axis; `has_heads` is False where z is known to be no attention."""
        shape = tuple(z.shape)
        heads = shape if has_heads and z.ndim == 4 and axis == 3 else (1, 1, z.numel() // max(1, shape[axis]), shape[axis])
        return SoftmaxRows(shape, axis, heads[1] > 1, Queries.of(heads, limit, turn))

    @property
    def elements(self) -> int:
        """How many elements the whole softmax has."""
        return math.prod(self.shape)

    def rows(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor of the same shape, as [batch, heads, queries, keys]."""
        if not self.has_heads:
            tensor = tensor.movedim(self.axis, -1).reshape(1, 1, -1, self.shape[self.axis])
        return tensor[self.queries.batch, :, self.queries.positions]

    def take(self, tensor: Tensor) -> Tensor:
        """The elements of these rows, as a vector."""
        return self.rows(tensor).reshape(-1)

    def logits(self, z: Tensor) -> Logits:
        """The logits of these rows. Keys are masked where z, which is the sum of logit and mask, says so."""
        taken = upcast(self.rows(z))
        return Logits(taken, ~(taken <= _MASKED_SUM), self.elements)


def attention_logits(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], limit: int | None, turn: int) -> Logits:
    """The logits of a call of `F.scaled_dot_product_attention` or `F.multi_head_attention_forward`.

    Args:
        call: which of the two functions was called.
        limit, turn: as for `Queries.of`.

    Raises:
        NotRebuiltError: the mask is no plain tensor.
    """
    if call is F.multi_head_attention_forward:
        return _multi_head(inspect.signature(call).bind(*args, **kwargs).arguments, limit, turn)
    return _scaled_dot_product(*args, **kwargs, limit=limit, turn=turn)


def _scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    limit: int | None,
    turn: int,
) -> Logits:
    if attn_mask is not None and type(attn_mask) is not Tensor:
        raise NotRebuiltError(f"its mask is a {type(attn_mask).__name__}")
    q, k = (each.detach() if each.ndim == 4 else _four(each.detach()) for each in (query, key))
    # Query and key may each be broadcast to a common batch, and to common heads unless queries are grouped.
    batch, heads = max(q.shape[0], k.shape[0]), q.shape[1] if enable_gqa else max(q.shape[1], k.shape[1])
    q, k = q.expand(batch, heads, -1, -1), k.expand(batch, k.shape[1] if enable_gqa else heads, -1, -1)
    length, size = q.shape[2], k.shape[2]
    lead: torch.Size = torch.broadcast_shapes(query.shape[:-2], query.shape[:-2] if enable_gqa else key.shape[:-2])
    rows = Queries.of((batch, heads, length, size), limit, turn)
    q, k = upcast(q[rows.batch, :, rows.positions]), upcast(k[rows.batch])
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    # With grouped queries, head h reads the keys of group h // (heads per group).
    groups = k.shape[1]
    z = _product(q.reshape(q.shape[0], groups, heads // groups, *q.shape[2:]), k.unsqueeze(2)).reshape(q.shape[0], heads, q.shape[2], size)
    added = None
    if attn_mask is not None:
        mask = attn_mask.detach().expand(*lead, length, size)[..., rows.positions, :]
        added = (mask if mask.ndim == 4 else _four(mask))[rows.batch]
    return _masked(z, added, _causal(length, size, rows, z.device) if is_causal else None, batch * heads * length * size)


def _multi_head(given: dict[str, Any], limit: int | None, turn: int) -> Logits:
    """The logits of a call of F.multi_head_attention_forward with these arguments, by name."""
    query, key, heads = given["query"].detach(), given["key"].detach(), given["num_heads"]
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if query.ndim == 2:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        padding = None if padding is None else padding.unsqueeze(0)
    length, batch, _ = query.shape
    # As in torch: only under these conditions does is_causal replace the mask that is given.
    hint = given.get("is_causal", False) and padding is None and not given.get("need_weights", True)
    added_keys = (given.get("bias_k") is not None) + bool(given.get("add_zero_attn"))
    static = given.get("static_k")
    size = (key.shape[0] if static is None else static.shape[1]) + added_keys
    rows = Queries.of((batch, heads, length, size), limit, turn)
    q, k = _projected(given, query, key, rows)
    z = _product(q * q.shape[-1] ** -0.5, k)
    additions = []
    if mask is not None and not hint:
        mask = mask.detach()
        full = mask[None, None] if mask.ndim == 2 else mask.reshape(batch, heads, *mask.shape[1:])[rows.batch]
        additions.append(full[:, :, rows.positions])
    if padding is not None:
        additions.append(padding.detach()[rows.batch, None, None, :])
    added = None
    for each in additions:
        # In this function a true boolean hides a key. The keys that it adds itself are never hidden.
        each = F.pad(torch.zeros_like(each, dtype=z.dtype).masked_fill(each, -math.inf) if each.dtype == torch.bool else each, (0, added_keys))
        added = each if added is None else added + each
    return _masked(z, added, _causal(length, size, rows, z.device) if hint else None, batch * heads * length * size)


def _projected(given: dict[str, Any], query: Tensor, key: Tensor, rows: Queries) -> tuple[Tensor, Tensor]:
    """Queries and keys by head, [batch, heads, rows, features]: the queries of these rows, and all keys of the samples that the rows belong to.

    Args:
        given: the arguments of F.multi_head_attention_forward, by name.
        query, key: [rows, batch, features].
    """
    batch, heads, static = query.shape[1], given["num_heads"], given.get("static_k")
    if given.get("use_separate_proj_weight", False):
        weights = given["q_proj_weight"], given["k_proj_weight"]
    else:
        weights = given["in_proj_weight"].chunk(3)[:2]
    biases = (None, None) if given["in_proj_bias"] is None else given["in_proj_bias"].detach().chunk(3)[:2]
    # The projections run in the precision that torch used for them, so that the logits are those that the attention saw.
    q = F.linear(query[rows.positions, rows.batch], weights[0].detach(), biases[0])
    q = upcast(q.reshape(*q.shape[:2], heads, -1).permute(1, 2, 0, 3))
    if static is None:
        projected = F.linear(key[:, rows.batch], weights[1].detach(), biases[1])
        if given.get("bias_k") is not None:
            projected = torch.cat([projected, given["bias_k"].detach().expand(1, projected.shape[1], -1)])
        k = projected.reshape(*projected.shape[:2], heads, -1).permute(1, 2, 0, 3)
    else:
        k = static.detach().reshape(batch, heads, *static.shape[1:])[rows.batch]
    if given.get("add_zero_attn"):
        k = torch.cat([k, k.new_zeros(*k.shape[:2], 1, k.shape[3])], 2)
    return q, upcast(k)


def _product(q: Tensor, k: Tensor) -> Tensor:
    """q k^T in the precision of q and k, not in the lower one that autocast would choose."""
    with torch.autocast(q.device.type, enabled=False):
        return torch.matmul(q, k.transpose(-1, -2))


def _masked(z: Tensor, added: Tensor | None, causal: Tensor | None, elements: int) -> Logits:
    """Logits under a mask `added`, which is boolean (true: visible) or is added to z, and under the causal mask `causal`, if there is one."""
    visible = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=z.device) if causal is None else causal
    if added is not None and added.dtype == torch.bool:
        visible = visible & added
    elif added is not None:
        added = upcast(added)
        largest = added.amax(-1, keepdim=True)
        visible = visible & ~(added <= largest + _MASKED) & ~(largest <= _MASKED_SUM)
        z = z + added
    return Logits(z, visible, elements)


def _causal(queries: int, keys: int, rows: Queries, device: torch.device) -> Tensor:
    """Which keys these query rows see under a causal mask, [rows, keys]."""
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device)[rows.positions].unsqueeze(-1)


def _four(tensor: Tensor) -> Tensor:
    """A tensor of any number of axes as [batch, heads, rows, columns]. Further leading axes join the batch; fewer than four axes are one head."""
    if tensor.ndim > 4:
        return tensor.flatten(0, -4)
    return tensor.unsqueeze(-3).reshape(-1, 1, *tensor.shape[-2:])
