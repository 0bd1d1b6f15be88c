"""Computes the sums and maxima over z, a and their gradients, at the elements that were read. columns.py says what each number is.

z is the pre-activation of a site, a = f(z) its activation. `observe` and `observe_gradient` fill the row of a site, the first in a forward pass and
the second in a backward pass. Every sum stands for all elements of its call: what was read enters with the weight elements / elements read
(columns.py). Beside its row a site keeps a *unit block* (columns.BLOCK) with the samples and the saturated samples of each unit (channel or feature).
The host adds up the blocks of several observations until every unit has enough samples (transport/windows.py), so that stuck units are found in
memory that grows with the units and not with the samples. A softmax has a block of heads in place of a unit block, and a layer has a block of
features.

Most functions exist twice: as kernels (kernels/), which read every element once, and here in plain torch, which runs on any device and which the
kernels are tested against. Nothing here waits for the device: there is no `.item()` and no branch on a device tensor. Non-finite elements are counted
and enter no other number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchsat.activations import Bound, Edges
from torchsat.columns import BACKWARD, BINS, BLOCK, COLUMN, FEATURES, MAXES, SUMS, UNWEIGHED
from torchsat.kernels import cpu, engine
from torchsat.kernels.formulas import FIRST_BIN, Formula, formula
from torchsat.sampling import Sample, Units, places

_PART = 65536
"""Elements that a norm in float64 copies at a time."""
_PIECE = 2**22
"""Elements of which extremes are found at a time on a GPU, where no kernel reads them."""
_STRATA, _PER_STRATUM = 128, 16
"""The most strata of z, and how many elements each has at least, where a derivative is known only at some elements."""
_HISTOGRAM = slice(COLUMN[BINS[0]], COLUMN[BINS[-1]] + 1)
_GRADIENT = slice(COLUMN[BACKWARD[0]], COLUMN[BACKWARD[-1]] + 1)
DEMAND = slice(COLUMN["demand"], COLUMN["trapped"] + 1)
"""The columns of the demand in a row."""
SIDES = 65536
"""Of a larger call on a GPU, the sides of so many elements are kept until the backward."""
_UNWEIGHED = frozenset((*UNWEIGHED, *MAXES))


def accumulator(device: torch.device) -> torch.dtype:
    """The type of all sums: float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def empty_row(device: torch.device) -> Tensor:
    """The row of a site at which no element was read. Merging it changes nothing, so every merge starts from it."""
    return _empty_row(device).clone()


@functools.lru_cache(maxsize=64)
def _empty_row(device: torch.device) -> Tensor:
    dtype = accumulator(device)
    return torch.cat([torch.zeros(len(SUMS), dtype=dtype, device=device), torch.full((len(MAXES),), -math.inf, dtype=dtype, device=device)])


def row_of(values: Mapping[str, Tensor], weight: float, device: torch.device) -> Tensor:
    """The row with these columns, given by name, of elements that have this weight. Every other column is that of an empty row."""
    row = empty_row(device)
    return row.index_copy_(0, indices(tuple(values), device), torch.stack([*_weighed(values, weight, row.dtype).values()]))


def _weighed(values: Mapping[str, Tensor], weight: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """These columns in the type of all sums, the weighed ones multiplied by the weight that each element has."""
    return {name: value.to(dtype) * (1 if name in _UNWEIGHED else weight) for name, value in values.items()}


@functools.lru_cache(maxsize=64)
def indices(names: tuple[str, ...], device: torch.device) -> Tensor:
    """The indices of these columns in a row. They are cached, since each copy to a GPU would wait for the GPU."""
    return torch.tensor([COLUMN[name] for name in names], device=device)


def merge_(into: Tensor, row: Tensor) -> Tensor:
    """Merge one row into another, in place."""
    sums = len(SUMS)
    into[:sums] += row[:sums]
    torch.maximum(into[sums:], row[sums:], out=into[sums:])
    return into


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which it is measured: float64 as it is, every other type as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def observe(
    z: Tensor,
    a: Tensor,
    slope: Tensor | Formula,
    peak: float | Tensor | None,
    edges: Edges,
    elements: int,
    sigmoid: bool = False,
    units: Units | None = None,
    row: Tensor | None = None,
    block: Tensor | None = None,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The row and the unit block of one forward call, merged in place into those given.

    Args:
        z, a: the elements that were read, as vectors of equal length.
        slope: |f'(z)| at these elements, or its formula if a kernel reads z and a (see `known_slope`).
        peak: sup|f'|. None: there is no relative derivative, and no histogram.
        edges: (z_L, z_R), where the tails begin; an element on an edge is saturated. None: there is no tail on that side.
        elements: how many elements the call has, read or not.
        sigmoid: whether to count the activations below 0.1 and above 0.9.
        units: which unit each element belongs to. None: there is no unit block.
        row, block: what to merge into. None: a new row, a new block.
        exact: what `extremes` found among all elements of the call, where only some were read. None: what is found among those that were read.
    """
    constant = not isinstance(peak, Tensor) and not any(isinstance(edge, Tensor) for edge in edges)
    kernels = engine(z, a, None if isinstance(slope, Formula) else slope) if constant else None
    if kernels is not None:
        row = empty_row(z.device) if row is None else row
        if units is None:
            kernels.observe(z, a, slope, peak, edges, elements, sigmoid, exact, row)
            return row, None
        block = torch.zeros(len(BLOCK), units.size, dtype=torch.float64, device=z.device) if block is None else block
        tables = (units.table(),) if kernels is cpu else ()
        kernels.observe(z, a, slope, peak, edges, elements, sigmoid, exact, row, units.place, block, *tables)
        return row, block
    found, counts = _observe(z, a, cast(Tensor, slope), peak, edges, elements, sigmoid, units)
    if exact is not None:
        found.index_copy_(0, indices(EXACT, found.device), exact.to(found.dtype))
    row = found if row is None else merge_(row, found)
    return row, counts if block is None or counts is None else block.add_(counts)


def known_slope(bound: Bound, *tensors: Tensor) -> Formula | None:
    """The formula by which a kernel computes |f'(z)| itself while it reads these tensors; None where no kernel can."""
    found = formula(bound)
    kernels = None if found is None else engine(*tensors)
    return found if kernels is not None and found is not None and found.kind in kernels.KINDS else None


EXACT = ("nonfinite", "z_max", "z_min_negated", "a_max", "a_min_negated")
"""The columns that are found among all elements of a call, read or not: a sample misses the one element that matters to them."""


def extremes(z: Tensor | None, a: Tensor | None) -> Tensor:
    """EXACT of all elements of a call, as a vector: one pass over z and a, without a copy of either.

    Either may be None where it is not in memory at the same time (an in-place activation overwrites z). Its columns are then those of no element, and
    `torch.maximum` merges the two results. An element at which only z is not finite, and another one at which only a is, then count once.
    """
    one, other = (z, a) if z is not None and a is not None and z.stride() == a.stride() else (z if z is not None else a, None)
    assert one is not None
    if z is not None and a is not None and other is None:
        return torch.maximum(extremes(z, None), extremes(None, a))
    rows = _rows_of(one)
    kernels = engine(one, other)
    if rows is None or kernels is None or (kernels is not cpu and rows.ndim == 2):
        found = _extremes(one, one if other is None else other)
    else:
        found = kernels.extremes(rows, None if other is None else _rows_of(other))
    return found if other is not None else _of_one(found, z is not None)


def take(sample: Sample, tensor: Tensor, is_z: bool) -> tuple[Tensor, Tensor | None]:
    """The elements of z, or of a, that are read, and its `extremes`, where one pass over memory finds both; None where it does not."""
    if sample.is_whole or tensor.stride() != sample.strides or not sample.is_indexed(tensor):
        return sample.take(tensor), None
    return cpu.take_and_scan(tensor.as_strided((sample.elements,), (1,)), sample.places(tensor.device), is_z)


def _of_one(found: Tensor, is_z: bool) -> Tensor:
    """EXACT with the columns of z, which are those of one tensor, for that tensor. The columns of the other one are those of no element."""
    nothing = torch.full_like(found[:2], -math.inf)
    return torch.cat([found[:1], found[1:3], nothing] if is_z else [found[:1], nothing, found[1:3]])


def _rows_of(tensor: Tensor) -> Tensor | None:
    """All elements of a tensor as a vector of neighbours or, if it is a part of another one, as [rows, columns]; None where neither is a view."""
    sample = Sample.of(tensor, None, 0)
    if sample.strides == tensor.stride():
        return sample.take(tensor)
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return None


def _extremes(z: Tensor, a: Tensor) -> Tensor:
    """`extremes` in plain torch, of two tensors of the same shape."""
    pieces, dtype, parts = [(z, a)], accumulator(z.device), []
    # Temporaries are as large as one piece. On the CPU it fits the cache, and elsewhere a small one would not be worth its launch.
    size = _PART if z.device.type == "cpu" else _PIECE
    while pieces:
        z, a = pieces.pop()
        if z.numel() > size:
            axis = max(range(z.ndim), key=lambda each: z.shape[each])
            half = z.shape[axis] // 2
            for first, length in ((0, half), (half, z.shape[axis] - half)):
                pieces.append((z.narrow(axis, first, length), a.narrow(axis, first, length)))
            continue
        ok = torch.isfinite(z) & torch.isfinite(a)
        nothing = torch.full((), -math.inf, dtype=dtype, device=z.device)
        tops = [torch.where(ok, each, nothing.to(each.dtype)).amax() for each in (z, -z, a, -a)]
        parts.append(torch.stack([(~ok).sum().to(dtype), *(top.to(dtype) for top in tops)]))
    found = torch.stack(parts)
    return torch.cat([found[:, :1].sum(0), found[:, 1:].amax(0)])


def _observe(
    z: Tensor, a: Tensor, slope: Tensor, peak: float | Tensor | None, edges: Edges, elements: int, sigmoid: bool, units: Units | None
) -> tuple[Tensor, Tensor | None]:
    """`observe` in plain torch, without anything to merge into."""
    dtype, device = accumulator(z.device), z.device
    given = torch.stack([each.to(dtype) for each in (z, a, slope)])
    finite = torch.isfinite(given).all(0)
    kept = torch.where(finite, given, torch.zeros((), dtype=dtype, device=device))
    z, a, slope = kept
    n = finite.sum()
    low, high = edges
    nothing = torch.zeros_like(finite)
    in_low = (z <= low) & finite if low is not None else nothing
    in_high = (z >= high) & finite if high is not None else nothing
    totals, squares = kept.sum(1), torch.linalg.vecdot(kept, kept)
    values = {
        "n": n,
        "read": n,
        "elements": torch.full_like(n, elements),
        "nonfinite": finite.numel() - n,
        "low": in_low.sum(),
        "high": in_high.sum(),
        "derivative": totals[2],
        "derivative_sq": squares[2],
        "z": totals[0],
        "z_sq": squares[0],
        "a": totals[1],
        "a_sq": squares[1],
        "zeros": n - (a != 0).sum(),
    }
    if sigmoid:
        values |= {"gate_left": ((a < 0.1) & finite).sum(), "gate_right": ((a > 0.9) & finite).sum()}
    if peak is not None:
        # torch.tensor would copy the number to the GPU and wait for that; torch.full does not.
        values["peak"] = peak.to(dtype) if isinstance(peak, Tensor) else torch.full((), peak, dtype=dtype, device=device)
    if len(z):
        far = torch.full((), math.inf, dtype=dtype, device=device)
        tops, bottoms = torch.where(finite, given[:2], -far).amax(1), torch.where(finite, given[:2], far).amin(1)
        values |= {"z_max": tops[0], "z_min_negated": -bottoms[0], "a_max": tops[1], "a_min_negated": -bottoms[1]}
    weight = elements / max(1, len(z))
    row = row_of(values, weight, device)
    if peak is not None:
        row[_HISTOGRAM].index_add_(0, _bin(slope / values["peak"]), finite.to(dtype) * weight)
    if units is None:
        return row, None
    samples = finite.to(dtype)
    block = torch.zeros(len(BLOCK), units.size, dtype=dtype, device=device)
    found = [samples * weight, (in_low | in_high).to(dtype) * weight, samples, a.abs() * weight]
    return row, block.index_add_(1, units.index(device), torch.stack(found))


def _bin(relative: Tensor) -> Tensor:
    """The bin of each |f'| / peak in the histogram.

    The exponent and the first bit of the mantissa of a float32 make two bins per octave, so that no logarithm has to be computed.
    """
    return (relative.float().contiguous().view(torch.int32).bitwise_right_shift(22) - FIRST_BIN).clamp(0, len(BINS) - 1)


@dataclass(frozen=True)
class Sides:
    """On which side of its function's plateaus each element of a call lies. It is kept from the forward pass until the backward."""

    values: Tensor
    """1 in the high tail, -1 in the low one, otherwise 0, as int8. If there are fewer than elements that were read, they are those of the elements
    that `sampling.places` draws from these with the seed."""
    seed: int = 0


def sides_of(z: Tensor, edges: Edges, seed: int = 0) -> Sides | None:
    """The sides of the elements z that were read; None where the function has no tail.

    On a GPU, where a kernel may read whole tensors, the sides of 65536 of the elements are kept, since a byte for each would be memory that the
    user's model needs.

    Args:
        seed: draws these elements.
    """
    low, high = edges
    if low is None and high is None:
        return None
    constant = not isinstance(low, Tensor) and not isinstance(high, Tensor)
    kernels = engine(z) if constant else None
    count = len(z) if z.is_cpu or not constant else min(len(z), SIDES)
    found = _sides(z, edges, count, seed) if kernels is None else kernels.sides(z, edges, count, seed)
    return Sides(found, seed)


def _sides(z: Tensor, edges: Edges, count: int, seed: int) -> Tensor:
    """The sides of `count` elements in plain torch."""
    low, high = edges
    z = z if count == len(z) else z.index_select(0, places(len(z), count, seed, z.device))
    found = torch.zeros(z.shape, dtype=torch.int8, device=z.device)
    if high is not None:
        found += z >= high
    if low is not None:
        found -= (z <= low).to(torch.int8)
    return found


def observe_gradient(
    grad_a: Tensor | None, grad_z: Tensor | None, elements: int | None = None, row: Tensor | None = None, sides: Sides | None = None
) -> Tensor:
    """The row of one backward call, merged in place into the one given.

    Args:
        grad_a, grad_z: dL/da and dL/dz at the elements that were read, as vectors; None where it is not known, but not both. An element counts only
            if every gradient given is finite there.
        elements: how many elements the call has, read or not; None: as many as were read.
        row: what to merge into. None: a new row.
        sides: the sides of the elements, for the demand, `blocked` and `trapped`. None: they are not known.
    """
    given = [grad for grad in (grad_a, grad_z) if grad is not None]
    row = empty_row(given[0].device) if row is None else row
    read = given[0].shape[0]
    elements = read if elements is None else elements
    kernels = engine(grad_a, grad_z)
    if sides is not None and grad_a is not None and (kernels is None or (kernels is cpu and len(sides.values) < read)):
        _observe_demand(grad_a, grad_z, sides, elements, row)
        sides = None
    if kernels is not None:
        kernels.observe_gradient(grad_a, grad_z, read, elements, row, *(() if sides is None else (sides.values, sides.seed)))
        return row
    dtype = row.dtype
    finite = torch.isfinite(given[0])
    for other in given[1:]:
        finite = finite & torch.isfinite(other)
    n = finite.sum().to(dtype)
    nothing = torch.zeros_like(n)
    values = {"grad_nonfinite": finite.numel() - n}
    for name, grad in (("grad_a", grad_a), ("grad_z", grad_z)):
        if grad is not None:
            kept = torch.where(finite, grad.to(dtype), nothing)
            values |= {f"{name}_n": n, f"{name}_read": n, f"{name}_sq": kept.dot(kept)}
    values = _weighed(values, elements / max(1, read), dtype)
    row[_GRADIENT] += torch.stack([values.get(name, nothing) for name in BACKWARD]).to(row.device)
    return row


def _observe_demand(grad_a: Tensor, grad_z: Tensor | None, sides: Sides, elements: int, row: Tensor) -> None:
    """Add `demand`, `blocked` and `trapped` of one backward call to a row, in plain torch."""
    count, given = len(sides.values), [grad for grad in (grad_a, grad_z) if grad is not None]
    if count < len(grad_a):
        chosen = places(len(grad_a), count, sides.seed, grad_a.device)
        given = [grad.index_select(0, chosen) for grad in given]
    finite = torch.isfinite(torch.stack(given)).all(0)
    side, grad = sides.values, torch.where(finite, given[0], torch.zeros((), dtype=grad_a.dtype, device=grad_a.device)).to(row.dtype)
    sizes, leaves = grad.abs(), (side * grad > 0).to(row.dtype)
    sums = torch.stack([sizes.sum(), leaves.sum(), sizes.dot((side != 0).to(row.dtype)), sizes.dot(leaves)])
    row[DEMAND] += sums.to(row.device) * (elements / max(1, count))


def observe_quotient(z: Tensor, a: Tensor, grad_a: Tensor, grad_z: Tensor, elements: int, row: Tensor) -> None:
    """Add |f'(z)| = |dL/dz / dL/da| to the row of a call whose elements all entered it with an unknown derivative.

    The quotient is not known where dL/da is 0. These elements are not like the others: behind a ReLU or a max pooling they are those with small z.
    So the elements are sorted into strata by z, and those of one stratum have its mean derivative. Where nothing of a stratum is known, the
    derivative stays unknown.

    Args:
        z, a, grad_a, grad_z: vectors of the elements that were read.
        elements: how many elements the call had, read or not.
        row: the row of the site.
    """
    counted = torch.isfinite(z) & torch.isfinite(a)
    known = knows_quotient(grad_a, grad_z) & counted
    nothing = torch.zeros((), dtype=row.dtype, device=row.device)
    slope = torch.where(known, (grad_z.to(row) / grad_a.to(row)).abs(), nothing)
    z, n = torch.where(counted, z.to(row), nothing), counted.sum().clamp(min=1)
    mean = z.sum() / n
    spread = (torch.where(counted, z - mean, nothing).square().sum() / n).sqrt()
    # The strata have as many elements each if z has a normal distribution.
    strata = max(1, min(_STRATA, len(z) // _PER_STRATUM))
    stratum = (torch.special.ndtr((z - mean) / spread.clamp(min=1e-30)) * strata).long().clamp(0, strata - 1)
    sums = torch.zeros(4, strata, dtype=row.dtype, device=row.device)
    sums.index_add_(1, stratum, torch.stack([counted.to(row), known.to(row), slope, slope * slope]))
    told = sums[0] * (sums[1] > 0)
    per_known = told / sums[1].clamp(min=1)
    added = torch.stack([sums[2].dot(per_known), sums[3].dot(per_known), -told.sum()]) * (elements / max(1, known.numel()))
    row.index_add_(0, indices(("derivative", "derivative_sq", "derivative_unknown"), row.device), added)


def knows_quotient(grad_a: Tensor, grad_z: Tensor) -> Tensor:
    """At which elements dL/dz / dL/da has enough digits to be taken for f'(z)."""
    # float16 has subnormal numbers everywhere; those of the other types may be rounded to 0.
    types = [torch.finfo(grad.dtype) for grad in (grad_a, grad_z)]
    least = max(64 * each.tiny * each.eps if each.dtype == "float16" else 2**10 * each.tiny for each in types)
    return torch.isfinite(grad_a) & torch.isfinite(grad_z) & (grad_a.abs() >= least)


def observe_features(x: Tensor, units: Units, sums: Tensor | None = None) -> Tensor:
    """columns.FEATURES of each unit, over the elements x of a layer's input that were read: [6, units], added in place to the sums given."""
    dtype = accumulator(x.device)
    kernels = engine(x)
    if kernels is not None and kernels is not cpu:
        sums = torch.zeros(len(FEATURES), units.size, dtype=dtype, device=x.device) if sums is None else sums
        kernels.add_features(x, units.place, sums)
        return sums
    found = torch.zeros(3, units.size, dtype=dtype, device=x.device)
    if kernels is cpu:
        cpu.add_features(x, units.place, units.table(), found)
    else:
        finite = torch.isfinite(x)
        values = torch.where(finite, x.to(dtype), torch.zeros((), dtype=dtype, device=x.device))
        found.index_add_(1, units.index(x.device), torch.stack([finite.to(dtype), values, values * values]))
    weight = units.weight
    samples, first, second = found.unbind()
    columns = (weight * samples, weight * first, weight * second, weight**2 * samples, weight**2 * second, samples)
    assert len(columns) == len(FEATURES)
    return torch.stack(columns) if sums is None else sums.add_(torch.stack(columns))


def put_squares(x: Tensor, y: Tensor | None, out: Tensor, at: int) -> None:
    """Write the sum of x^2 of a vector to out[at] and, if there is a second vector y, the sum of (y - x)^2 to out[at + 1].

    The squares are not float32: there the squares of a gradient that still carries a GradScaler's factor overflow, and those of a vanishing one are
    0.
    """
    kernels = engine(x, y)
    if kernels is not None:
        kernels.squares(x, y, out, at)
        return
    dtype = out.dtype
    # On the CPU the vector is read in parts, since a norm in float64 copies the whole vector first.
    size = _PART if x.device.type == "cpu" else max(1, len(x))
    sums = out[at : at + (1 if y is None else 2)].zero_()
    for first in range(0, len(x), size):
        part = x[first : first + size]
        sums[0] += torch.linalg.vector_norm(part, dtype=dtype).square()
        if y is not None:
            sums[1] += torch.linalg.vector_norm(y[first : first + size].to(dtype) - part.to(dtype)).square()


def merge_heads_(into: Tensor, heads: Tensor) -> Tensor:
    """Merge one block of heads into another, in place."""
    into[:-1] += heads[:-1]
    torch.maximum(into[-1], heads[-1], out=into[-1])
    return into
