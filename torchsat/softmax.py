"""Computes the numbers of a softmax, such as the weights of an attention: the entropy and the Jacobian of its rows, and its largest logits.

The rows are [batch, heads, queries, keys]. Where masks hide keys from a query, its row is the softmax over those that it sees. As in statistics.py,
most functions exist as a kernel and in plain torch, and nothing waits for the device.

The numbers of the heads are those of all rows (`scan_softmax`). On a CPU the logits have to be multiplied for the largest one in any case, and the
sums cost a fraction of that. What needs the elements themselves, such as the histogram of z, and the gradient come from a sample of rows.

A softmax has no plateau of single elements, but of rows. Let p be a row of probabilities over the T keys that are visible, and g = dL/dp.

- The row is *one-hot*, which is its plateau, if the trace of its Jacobian, 1 - sum p^2, is at most epsilon of the largest, 1 - 1/T.
- Its *demand* is max g - min g: what the loss would fall at first order if all of the weight went from the worst key to the best. A constant that is
  added to g changes nothing, as it does not change dL/dz.
- Its *gap* is p.g - min g, the part of this that is still to be had (the gap of Frank and Wolfe over the simplex): what the loss would fall at first
  order if the weight, as it lies now, went to the best key. It is 0 where the row has chosen this key, however one-hot it is.

What passes to the logits is dL/dz_i = p_i (g_i - p.g). Its size, the sum of |dL/dz|, is at most the trace times the demand. So a one-hot row passes
at most epsilon of its demand, whatever it has chosen; the gap tells whether that is a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchsat.columns import COLUMN, HEADS
from torchsat.kernels import cpu
from torchsat.statistics import EXACT, accumulator, empty_row, indices, merge_, row_of


def scan_softmax(z: Tensor, visible: Tensor, a: Tensor | None, broken: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """EXACT of a softmax and its block of heads (columns.HEADS, [14, heads]), without the numbers of the backward. Of both, all rows are read.

    A row that sees fewer than two keys has no entropy and does not count; neither does one with a visible logit that is inf or nan.

    Args:
        z: [batch, heads, queries, keys], with what masks add.
        visible: booleans that broadcast to the same shape: which keys a query sees.
        a: the softmax of z. None: its columns are those of no element.
        broken: [batch, heads, queries, 1], whether what an attention returned for this query is inf or nan: where a query sees no key, torch returns
            0 or nan. None: a says that.
    """
    masked = not _sees_all(z, visible)
    if cpu.reads(z, a):
        return cpu.scan_softmax(z, visible.expand(z.shape) if masked else None, a, None if broken is None else broken.expand(*z.shape[:3], 1))
    dtype = accumulator(z.device)
    keys = visible.sum(-1, keepdim=True) if masked else torch.full((1, 1, 1, 1), z.shape[-1], device=z.device)
    nothing = torch.full((), -math.inf, dtype=z.dtype, device=z.device)
    # NaN goes through to the extremes of its row.
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
    of_rows = _of_rows(z, visible if masked else None, keys, top)
    zero = torch.zeros((), dtype=dtype, device=z.device)
    of_heads = {name: torch.where(counts, each.to(dtype), zero).sum((0, 2, 3)) for name, each in of_rows.items()}
    of_heads |= {"rows": counts.to(dtype).sum((0, 2, 3)), "logit_max": tops.to(dtype)}
    return torch.stack([each.to(dtype) for each in exact]), _block(of_heads)


def _of_rows(z: Tensor, visible: Tensor | None, keys: Tensor, top: Tensor) -> dict[str, Tensor]:
    """What the sums in columns.HEADS are of, for each row, [batch, heads, queries, 1], or a size that broadcasts to it; of a row that does not count,
    anything.

    Args:
        visible: as in `scan_softmax`; None: all keys.
        keys: how many keys each row sees.
        top: the largest logit of each row.
    """
    dtype, zero = accumulator(z.device), torch.zeros((), dtype=z.dtype, device=z.device)
    shifted = z - top if visible is None else torch.where(visible, z - top, zero)
    weights = shifted.exp() if visible is None else torch.where(visible, shifted.exp(), zero)
    total = weights.sum(-1, keepdim=True)
    weighted, square = (weights * shifted).sum(-1, keepdim=True), weights.square().sum(-1, keepdim=True)
    of_first = weights[..., :1] if visible is None else weights.gather(-1, _first(visible).expand(*weights.shape[:3], 1))
    n = keys.clamp(min=2).to(z.dtype)
    apart = shifted - shifted.sum(-1, keepdim=True) / n
    apart = apart if visible is None else torch.where(visible, apart, zero)
    total, weighted, square, of_first, n = (each.to(dtype) for each in (total, weighted, square, of_first, n))
    return {
        "entropy": (total.log() - weighted / total) / n.log(),
        "jacobian": 1 - square / total.square(),
        "logit_variance": apart.square().sum(-1, keepdim=True).to(dtype) / n,
        "log_keys": n.log().expand(top.shape),
        "first_key": of_first / total,
        "log_z": (log_z := total.log() + top.to(dtype)),
        "log_z_sq": log_z.square(),
    }


def _first(visible: Tensor) -> Tensor:
    """The index of the first key that each row sees; 0 where it sees none."""
    return visible.to(torch.uint8).argmax(-1, keepdim=True)


def merge_scans(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `scan_softmax` found in several parts of one softmax, as one."""
    exact, blocks = (torch.stack(each) for each in zip(*found, strict=True))
    return (
        torch.cat([exact[:, :1].sum(0), exact[:, 1:].amax(0)]),
        torch.cat([blocks[:, :-1].sum(0), blocks[:, -1:].amax(0)]),
    )


def observe_softmax(logits: Tensor, visible: Tensor, elements: int, exact: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The row and the block of heads of one softmax, of which some rows are read for the row.

    Args:
        logits, visible: as in `scan_softmax`, of the rows that are read.
        elements: how many logits the whole softmax has, read or not.
        exact: what `scan_softmax` found among all rows. None: what is found among those that were read.
    """
    visible = visible.expand(logits.shape)
    found, heads = scan_softmax(logits, visible, None) if exact is None else exact
    if cpu.reads(logits):
        row = empty_row(logits.device)
        cpu.observe_softmax(logits, visible, elements, row)
    else:
        row = _observe_softmax(logits, visible, elements)
    if exact is not None:
        row[COLUMN["nonfinite"] : COLUMN["nonfinite"] + 1] = 0
        merge_(row, empty_row(row.device).index_copy_(0, indices(EXACT, row.device), found))
    return row, heads


def _observe_softmax(logits: Tensor, visible: Tensor, elements: int) -> Tensor:
    """The row of `observe_softmax` in plain torch; `visible` has the shape of the logits."""
    dtype = accumulator(logits.device)
    z = logits.to(dtype)
    keys = visible.sum(-1)
    finite = (torch.isfinite(z) | ~visible).all(-1)
    counts = finite & (keys > 1)
    seen = visible & counts.unsqueeze(-1)
    zero, nothing = torch.zeros((), dtype=dtype, device=z.device), torch.full((), -math.inf, dtype=dtype, device=z.device)
    z = torch.where(seen, z, zero)
    largest = torch.where(seen, z, nothing)
    shifted = torch.where(seen, z - largest.amax(-1, keepdim=True), zero)
    weights = torch.where(seen, shifted.exp(), zero)
    p = weights / weights.sum(-1, keepdim=True).clamp(min=1)
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
    return row_of(values, elements / max(1, z.numel()), z.device)


def _block(of_heads: dict[str, Tensor]) -> Tensor:
    """The block of heads with these rows, by name; every other row is that of no query row."""
    given = next(iter(of_heads.values()))
    nothing = torch.zeros_like(given)
    return torch.stack([of_heads.get(name, nothing - math.inf if name == HEADS[-1] else nothing) for name in HEADS])


@dataclass(frozen=True)
class Probabilities:
    """The rows of a softmax that were read. They are kept from the forward pass until the backward."""

    p: Tensor
    """[batch, heads, queries, keys]; nan in a row with a visible logit that is inf or nan."""
    visible: Tensor
    """Booleans that broadcast to p: which keys a query sees."""
    elements: int
    """How many logits the whole softmax has, read or not."""

    @staticmethod
    def of(logits: Tensor, visible: Tensor, elements: int) -> Probabilities:
        """The rows with these logits; the arguments are those of `observe_softmax`."""
        # The difference is 0, and nan where a logit is inf or nan.
        z = logits + (logits - logits)
        return Probabilities(torch.softmax(z if _sees_all(z, visible) else z.masked_fill(~visible, -math.inf), -1), visible, elements)


def _sees_all(z: Tensor, visible: Tensor) -> bool:
    """Whether no key is hidden: one boolean stands for all keys."""
    return visible.numel() == 1 and z.shape[-1] > 1


def observe_demand(rows: Probabilities, grad: Tensor, epsilon: float) -> Tensor:
    """The block of heads of one backward call through a softmax; the module's docstring says what the numbers are.

    A row counts if it sees two keys or more, and if the logits and the gradients of the keys that it sees are finite. `row_demand` is the sum of the
    demands, `row_blocked` that of the one-hot rows, `row_trapped` the sum of their gaps. `rows_leaving` counts the one-hot rows of which the gap is
    more than half of the demand.

    Args:
        grad: dL/dp at these rows, of the same shape; that of a key which is not visible is not read.
        epsilon: the part of the largest trace below which a row is one-hot.
    """
    dtype, p, g, visible = accumulator(grad.device), rows.p, grad.to(rows.p.dtype), rows.visible
    if _sees_all(p, visible):
        keys = torch.full((1, 1, 1), p.shape[-1], device=p.device)
        low, high = g.amin(-1), g.amax(-1)
        above = g - low.unsqueeze(-1)
    else:
        keys = visible.sum(-1)
        low, high = torch.where(visible, g, math.inf).amin(-1), torch.where(visible, g, -math.inf).amax(-1)
        above = torch.where(visible, g - low.unsqueeze(-1), 0.0)
    # A sum of what is not negative, since p.g and min g can be nearly equal.
    demand, gap, trace = high - low, (p * above).sum(-1), 1 - (p * p).sum(-1)
    # Where one number of a row is inf or nan, one of these is too.
    counts = torch.isfinite(demand) & torch.isfinite(trace) & (keys > 1)
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    is_one_hot = counts & (trace <= epsilon * (1 - 1 / keys.to(p.dtype)))
    of_rows = {
        "rows_heard": counts,
        "row_demand": torch.where(counts, demand, zero),
        "row_blocked": torch.where(is_one_hot, demand, zero),
        "row_trapped": torch.where(is_one_hot, gap, zero),
        "rows_leaving": is_one_hot & (gap > demand / 2),
    }
    weight = rows.elements / max(1, rows.p.numel())
    return _block({name: each.to(dtype).sum((0, 2)) * weight for name, each in of_rows.items()})
