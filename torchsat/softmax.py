"""Computes the numbers of a softmax, such as the weights of an attention: the entropy and the Jacobian of its rows, and its largest logits.

The rows are [batch, heads, queries, keys]. Where masks hide keys from a query, its row is the softmax over those that it sees. As in statistics.py,
each function exists as a kernel and in plain torch, and nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchsat.columns import COLUMN, HEADS
from torchsat.kernels import cpu
from torchsat.statistics import EXACT, accumulator, empty_row, indices, merge_, row_of


def softmax_extremes(z: Tensor, visible: Tensor, a: Tensor | None, broken: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """EXACT of a softmax, and the largest logit of each head. As in `observe_softmax`, rows that see fewer than two keys, or a logit that is inf or
    nan, enter no extreme.

    Args:
        z, visible: as in `observe_softmax`.
        a: the softmax of z. None: its columns are those of no element.
        broken: [batch, heads, queries, 1], whether what an attention returned for this query is inf or nan: where a query sees no key, torch returns
            0 or nan. None: a says that.
    """
    # Of one key that stands for all, each is visible. NaN goes through to the extremes of its row.
    masked = visible.numel() > 1 or z.shape[-1] == 1
    if cpu.reads(z, a):
        return cpu.softmax_extremes(z, visible.expand(z.shape) if masked else None, a, None if broken is None else broken.expand(*z.shape[:3], 1))
    dtype = accumulator(z.device)
    keys = visible.sum(-1, keepdim=True) if masked else torch.full((1, 1, 1, 1), z.shape[-1], device=z.device)
    nothing = torch.full((), -math.inf, dtype=z.dtype, device=z.device)
    top = (torch.where(visible, z, nothing) if masked else z).amax(-1, keepdim=True)
    bottom = (torch.where(visible, z, -nothing) if masked else z).amin(-1, keepdim=True)
    finite = torch.isfinite(top) & torch.isfinite(bottom)
    counts = finite & (keys > 1)
    tops = torch.where(counts, top, nothing).amax((0, 2, 3))
    if a is None:
        bad = torch.where(finite, torch.zeros_like(keys), keys).sum()
        if broken is not None:
            bad = bad + ((keys == 0) & broken).expand(top.shape).sum() * z.shape[-1]
        of_a = [nothing, nothing]
    else:
        high, low = a.amax(-1, keepdim=True), (torch.where(visible, a, math.inf) if masked else a).amin(-1, keepdim=True)
        # A softmax is nan in all of a row or nowhere.
        bad = torch.isnan(high).sum() * z.shape[-1]
        of_a = [torch.where(counts, each, nothing.to(a.dtype)).amax() for each in (high, -low)]
    exact = [bad, tops.amax(), torch.where(counts, -bottom, nothing).amax(), *of_a]
    return torch.stack([each.to(dtype) for each in exact]), tops.to(dtype)


def observe_softmax(logits: Tensor, visible: Tensor, elements: int, exact: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The row and the block of heads (columns.HEADS, [7, heads]) of one softmax.

    Args:
        logits: [batch, heads, queries, keys], with what masks add.
        visible: booleans that broadcast to the same shape: which keys a query sees. A query row that sees fewer than two keys has no entropy and does
            not count; neither does one with a visible logit that is inf or nan.
        elements: how many logits the whole softmax has, read or not.
        exact: what `softmax_extremes` found among all rows. None: what is found among those that were read.
    """
    visible = visible.expand(logits.shape)
    if cpu.reads(logits):
        row, heads = empty_row(logits.device), torch.zeros(len(HEADS), logits.shape[1], dtype=accumulator(logits.device))
        heads[-1] = -math.inf
        cpu.observe_softmax(logits, visible, elements, row, heads)
    else:
        row, heads = _observe_softmax(logits, visible, elements)
    if exact is not None:
        found, tops = exact
        row[COLUMN["nonfinite"] : COLUMN["nonfinite"] + 1] = 0
        merge_(row, empty_row(row.device).index_copy_(0, indices(EXACT, row.device), found))
        torch.maximum(heads[-1], tops, out=heads[-1])
    return row, heads


def _observe_softmax(logits: Tensor, visible: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """`observe_softmax` in plain torch; `visible` has the shape of the logits."""
    dtype = accumulator(logits.device)
    z = logits.to(dtype)
    keys = visible.sum(-1)
    finite = (torch.isfinite(z) | ~visible).all(-1)
    counts = finite & (keys > 1)
    seen = visible & counts.unsqueeze(-1)
    zero, nothing = torch.zeros((), dtype=dtype, device=z.device), torch.full((), -math.inf, dtype=dtype, device=z.device)
    z = torch.where(seen, z, zero)
    shifted = torch.where(seen, z - torch.where(seen, z, nothing).amax(-1, keepdim=True), zero)
    weights = torch.where(seen, shifted.exp(), zero)
    total = weights.sum(-1, keepdim=True).clamp(min=1)
    p = weights / total
    log_keys = torch.where(counts, keys.to(dtype).clamp(min=2).log(), zero)
    entropy = torch.where(counts, total.squeeze(-1).log() - (p * shifted).sum(-1), zero)
    mean = z.sum(-1) / keys.clamp(min=1)
    largest = torch.where(seen, z, nothing)
    of_rows = {
        "rows": counts,
        "entropy": torch.where(counts, entropy / log_keys.clamp(min=math.log(2)), zero),
        "jacobian": torch.where(counts, 1 - p.square().sum(-1), zero),
        "logit_variance": torch.where(seen, z - mean.unsqueeze(-1), zero).square().sum(-1) / keys.clamp(min=1),
        "log_keys": log_keys,
    }
    weight = elements / max(1, z.numel())
    of_heads = {name: each.to(dtype).sum((0, 2)) * weight for name, each in of_rows.items()}
    of_heads |= {"rows_read": counts.to(dtype).sum((0, 2)), "logit_max": largest.amax((0, 2, 3))}
    n = seen.sum()
    values = {
        "n": n,
        "read": n,
        "elements": torch.full_like(n, elements),
        "nonfinite": (((~finite) & (keys > 0)).unsqueeze(-1) & visible).sum(),
        "z": z.sum(),
        "z_sq": z.square().sum(),
        "a": p.sum(),
        "a_sq": p.square().sum(),
        "zeros": n - (p != 0).sum(),
        "z_max": largest.amax(),
        "z_min_negated": torch.where(seen, -z, nothing).amax(),
        "a_max": torch.where(seen, p, nothing).amax(),
        "a_min_negated": torch.where(seen, -p, nothing).amax(),
    }
    return row_of(values, weight, z.device), torch.stack([of_heads[name] for name in HEADS])
