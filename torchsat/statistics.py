"""What is computed from z, a and their gradients, and how it is laid out: every statistic merges.

A *row* is one float64 vector per site: sum columns, then max columns. A column adds (or maxes) over elements and depends on its element
alone, so that micro-batches, repeated calls of a shared module and, later, ranks all merge by the same operation; whatever is not such a
column (means, shares, ratios) is derived on the host by `to_record`. Beside the row a site keeps a *unit block* [2, units], samples and
saturated samples of each unit, which adds up over observations until every unit has `UNIT_SAMPLES`: stuck units are found in O(units) memory.

Nothing here waits for the device: no `.item()`, no branch on a device tensor. Non-finite elements are counted and enter nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchsat.activations import Edges
from torchsat.record import HISTOGRAM_BINS, OCTAVES, Head, Record

UNIT_SAMPLES = 1000
"""Samples of a unit before anything is said of it: at 50 % saturation, 128 samples all alike happen by chance once in 10^38, but the
samples of one batch are not independent."""
STUCK_SHARE = 0.99

SUMS = (
    *("n", "elements", "nonfinite", "low", "high", "derivative", "derivative_sq", "z", "z_sq", "a", "a_sq", "zeros", "gate_left", "gate_right"),
    *("grad_a_n", "grad_a_sq", "grad_z_n", "grad_z_sq", "grad_nonfinite"),
    *(f"bin{k}" for k in range(HISTOGRAM_BINS)),
)
MAXES = ("peak", "z_max", "z_min_negated", "a_max", "a_min_negated")
HEADS = ("rows", "entropy", "jacobian", "logit_variance", "log_keys", "logit_max")
"""Columns of the block [6, heads] of a softmax; the last is a max, the others are sums over query rows."""
UNITS = ("units", "units_measured", "units_stuck", "unit_samples")
"""Derived from a merged unit block, behind the row on its way to the host."""
_AT = {name: index for index, name in enumerate((*SUMS, *MAXES, *UNITS))}
_GRADIENT = slice(_AT["grad_a_n"], _AT["grad_nonfinite"] + 1)


def accumulator(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Sample:
    """Which elements of a tensor are read: every `step`-th in memory order, from `start`.

    The step shares no factor with any dimension, so that the elements read visit all units, positions and samples evenly; a step that
    divides the width would see some units only. `start` moves from observation to observation.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    start: int
    step: int

    @staticmethod
    def of(tensor: Tensor, limit: int | None, turn: int) -> Sample:
        """At most `limit` elements of a tensor (None: all) at the turn-th observation."""
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis)))
        step = 1 if limit is None else -(-tensor.numel() // limit) or 1
        if step > 1:
            while any(math.gcd(step, size) != 1 for size in tensor.shape):
                step += 1
        return Sample(tuple(tensor.shape), order, turn * 7919 % min(step, max(tensor.numel(), 1)), step)

    def take(self, tensor: Tensor) -> Tensor:
        """The elements of this tensor, or of one that broadcasts to the same shape, as a vector; a view where that is possible."""
        if tuple(tensor.shape) != self.shape:
            tensor = tensor.expand(self.shape)
        flat = tensor.permute(self.order).reshape(-1)
        return flat if self.step == 1 else flat[self.start :: self.step]

    def units(self, axis: int, device: torch.device) -> Tensor:
        """The index along `axis` of each element taken."""
        place = self.order.index(axis)
        inner = math.prod(self.shape[dim] for dim in self.order[place + 1 :])
        taken = torch.arange(self.start, math.prod(self.shape), self.step, device=device)
        return taken.div(inner, rounding_mode="floor").remainder(self.shape[axis])

    def spread(self, parameter: Tensor) -> Tensor:
        """A learned parameter at each element taken: one value, one per channel (dimension 1, as PReLU), or broadcast."""
        if parameter.numel() == 1:
            return parameter.reshape(())
        if parameter.ndim == 1 and len(self.shape) > 1:
            parameter = parameter.reshape(-1, *([1] * (len(self.shape) - 2)))
        return self.take(parameter)


def empty_row(device: torch.device) -> Tensor:
    """The row of no element: what every merge starts from."""
    dtype = accumulator(device)
    return torch.cat([torch.zeros(len(SUMS), dtype=dtype, device=device), torch.full((len(MAXES),), -math.inf, dtype=dtype, device=device)])


def merge_(into: Tensor, row: Tensor) -> Tensor:
    """Merge one row into another, in place."""
    sums = len(SUMS)
    into[:sums] += row[:sums]
    torch.maximum(into[sums:], row[sums:], out=into[sums:])
    return into


def upcast(tensor: Tensor) -> Tensor:
    """float64 as it is, all else as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def observe(
    z: Tensor, a: Tensor, slope: Tensor, peak: float | Tensor | None, edges: Edges, elements: int, sigmoid: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The row of one forward call.

    Args:
        z, a: the elements taken, vectors of equal length, float32 or float64.
        slope: |f'(z)|.
        peak: sup|f'|; None: no relative derivative.
        edges: (z_L, z_R), tails inclusive; None: no tail on that side.
        elements: how many the tensor has.
        sigmoid: count the activations below 0.1 and above 0.9.

    Returns:
        The row, and two vectors of booleans: which elements are finite, and which of these are saturated.
    """
    dtype = accumulator(z.device)
    finite = torch.isfinite(z) & torch.isfinite(a) & torch.isfinite(slope)
    zero = torch.zeros((), dtype=dtype, device=z.device)
    z, a, slope = (torch.where(finite, t.to(dtype), zero) for t in (z, a, slope))
    n = finite.sum()
    low, high = edges
    in_low = (z <= low) & finite if low is not None else torch.zeros_like(finite)
    in_high = (z >= high) & finite if high is not None else torch.zeros_like(finite)
    sums = [
        n,
        torch.full_like(n, elements),
        finite.numel() - n,
        in_low.sum(),
        in_high.sum(),
        slope.sum(),
        slope.dot(slope),
        z.sum(),
        z.dot(z),
        a.sum(),
        a.dot(a),
        n - (a != 0).sum(),
        ((a < 0.1) & finite).sum() if sigmoid else torch.zeros_like(n),
        ((a > 0.9) & finite).sum() if sigmoid else torch.zeros_like(n),
        *[torch.zeros_like(n)] * 5,
    ]
    bins = torch.zeros(HISTOGRAM_BINS, dtype=dtype, device=z.device)
    if peak is None:
        peak_column = torch.full((), -math.inf, dtype=dtype, device=z.device)
    else:
        # torch.full, not torch.tensor: a number copied to a GPU would wait for it.
        peak_column = peak.to(dtype) if isinstance(peak, Tensor) else torch.full((), peak, dtype=dtype, device=z.device)
        bins.index_add_(0, _bin(slope / peak_column), finite.to(dtype))
    nothing = torch.full_like(zero, -math.inf)
    maxes = [
        peak_column,
        torch.where(finite, z, nothing).amax(),
        torch.where(finite, -z, nothing).amax(),
        torch.where(finite, a, nothing).amax(),
        torch.where(finite, -a, nothing).amax(),
    ]
    row = torch.cat([torch.stack([value.to(dtype) for value in sums]), bins, torch.stack(maxes)])
    return row, finite, in_low | in_high


def _bin(relative: Tensor) -> Tensor:
    """The index in HISTOGRAM_EDGES: exponent and first mantissa bit of the float32 are two bins per octave, with no logarithm taken."""
    first = (127 - OCTAVES) * 2 - 1
    return (relative.float().contiguous().view(torch.int32).bitwise_right_shift(22) - first).clamp(0, HISTOGRAM_BINS - 1)


def observe_gradient(grad_a: Tensor | None, grad_z: Tensor | None) -> Tensor:
    """The row of one backward call. Where both gradients are given, an element counts only if both are finite."""
    given = [grad for grad in (grad_a, grad_z) if grad is not None]
    dtype = accumulator(given[0].device)
    finite = torch.isfinite(given[0])
    for other in given[1:]:
        finite = finite & torch.isfinite(other)
    n = finite.sum().to(dtype)
    nothing = torch.zeros_like(n)
    columns = []
    for grad in (grad_a, grad_z):
        if grad is None:
            columns += [nothing, nothing]
        else:
            kept = torch.where(finite, grad.to(dtype), nothing)
            columns += [n, kept.dot(kept)]
    row = empty_row(given[0].device)
    row[_GRADIENT] = torch.stack([*columns, finite.numel() - n])
    return row


def observe_softmax(logits: Tensor, visible: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """The row and the block of heads of one softmax.

    Args:
        logits: [batch, heads, queries, keys], float32 or float64, what masks add included.
        visible: booleans that broadcast to the same shape: which keys a query sees. A row that sees fewer than two has no entropy and does
            not count, nor does one with a logit that is inf or nan.
        elements: how many logits the whole softmax has.
    """
    dtype = accumulator(logits.device)
    z, visible = logits.to(dtype), visible.expand(logits.shape)
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
    variance = torch.where(seen, z - mean.unsqueeze(-1), zero).square().sum(-1) / keys.clamp(min=1)
    jacobian = torch.where(counts, 1 - p.square().sum(-1), zero)
    share = torch.where(counts, entropy / log_keys.clamp(min=math.log(2)), zero)
    sums = torch.stack([each.to(dtype).sum((0, 2)) for each in (counts, share, jacobian, variance, log_keys)])
    largest = torch.where(seen, z, nothing)
    heads = torch.cat([sums, largest.amax((0, 2, 3)).unsqueeze(0)])
    n = seen.sum()
    row = empty_row(z.device)
    bad = ((~finite) & (keys > 0)).unsqueeze(-1) & visible
    first = [n, torch.full_like(n, elements), bad.sum(), *[torch.zeros_like(n)] * 4]
    first += [z.sum(), z.square().sum(), p.sum(), p.square().sum(), n - (p != 0).sum()]
    row[: len(first)] = torch.stack([value.to(dtype) for value in first])
    row[_AT["z_max"] : _AT["a_min_negated"] + 1] = torch.stack(
        [largest.amax(), torch.where(seen, -z, nothing).amax(), torch.where(seen, p, nothing).amax(), torch.where(seen, -p, nothing).amax()]
    )
    return row, heads


def merge_heads_(into: Tensor, heads: Tensor) -> Tensor:
    """Merge one block of heads into another, in place."""
    into[:-1] += heads[:-1]
    torch.maximum(into[-1], heads[-1], out=into[-1])
    return into


def count_units(finite: Tensor, saturated: Tensor, units: Tensor, size: int) -> Tensor:
    """The unit block [2, size] of one call: samples, and saturated samples, of each unit."""
    dtype = accumulator(finite.device)
    block = torch.zeros(2, size, dtype=dtype, device=finite.device)
    return block.index_add_(1, units, torch.stack([finite.to(dtype), saturated.to(dtype)]))


def summarise_units(block: Tensor | None, device: torch.device) -> Tensor:
    """UNITS of a unit block; all NaN where the site has none."""
    dtype = accumulator(device)
    if block is None:
        return torch.full((len(UNITS),), math.nan, dtype=dtype, device=device)
    samples, saturated = block
    measured = samples >= UNIT_SAMPLES
    stuck = measured & (saturated >= STUCK_SHARE * samples)
    return torch.stack([torch.full_like(samples[0], len(samples)), measured.sum().to(dtype), stuck.sum().to(dtype), samples.amin()])


def start_over_if_full_(block: Tensor) -> None:
    """Begin a new window once every unit of the block has its samples, without asking the device."""
    block.mul_((block[0].amin() < UNIT_SAMPLES).to(block.dtype))


def to_record(facts: dict[str, Any], row: Sequence[float], scale: float, stuck: tuple[float, int] | None) -> tuple[Record, tuple[float, int] | None]:
    """The record of a merged row (with UNITS behind it, and the block of heads where there is one).

    Args:
        facts: the SITE_FACTS of the record.
        row: the numbers, on the host.
        scale: what the loss was multiplied with (GradScaler).
        stuck: share and samples of the last full window of units, if there was one.

    Returns:
        The record, and share and samples of the last full window now.
    """

    def get(name: str) -> float:
        return float(row[_AT[name]])

    n = get("n")

    def mean(name: str, per: float = n) -> float | None:
        return get(name) / per if per else None

    def std(first: str, second: str) -> float | None:
        return math.sqrt(max(0.0, get(second) / n - (get(first) / n) ** 2)) if n else None

    def rms(name: str, per: float = n, by: float = 1.0) -> float | None:
        return math.sqrt(get(name) / per) / by if per else None

    def extreme(name: str, sign: int = 1) -> float | None:
        return sign * get(name) if math.isfinite(get(name)) else None

    if get("units_measured") == get("units"):
        stuck = (get("units_stuck") / get("units"), round(get("unit_samples")))
    low, high = (mean("low"), mean("high")) if facts["tails"] != "unknown" else (None, None)
    peak = extreme("peak")
    softmax = facts["kind"] == "softmax"
    derivative = None if softmax else mean("derivative")
    block = row[len(_AT) :]
    heads = {name: block[at * len(block) // len(HEADS) : (at + 1) * len(block) // len(HEADS)] for at, name in enumerate(HEADS)}
    rows = sum(heads["rows"])

    def over_rows(name: str) -> float | None:
        return sum(heads[name]) / rows if rows else None

    grad_a, grad_z = rms("grad_a_sq", get("grad_a_n"), scale), rms("grad_z_sq", get("grad_z_n"), scale)
    record = Record(
        **facts,
        n=round(n),
        elements=round(get("elements")),
        saturated=None if low is None or high is None else low + high,
        low=low,
        high=high,
        derivative=derivative,
        derivative_rms=None if softmax else rms("derivative_sq"),
        peak=peak,
        relative_derivative=derivative / peak if derivative is not None and peak else None,
        stuck=stuck[0] if stuck and low is not None else None,
        stuck_n=stuck[1] if stuck and low is not None else None,
        z_mean=mean("z"),
        z_std=std("z", "z_sq"),
        z_rms=rms("z_sq"),
        z_min=extreme("z_min_negated", -1),
        z_max=extreme("z_max"),
        a_mean=mean("a"),
        a_std=std("a", "a_sq"),
        a_min=extreme("a_min_negated", -1),
        a_max=extreme("a_max"),
        gate_left=mean("gate_left") if facts["activation"] == "sigmoid" else None,
        gate_right=mean("gate_right") if facts["activation"] == "sigmoid" else None,
        zeros=mean("zeros"),
        nonfinite=round(get("nonfinite")),
        grad_n=round(max(get("grad_a_n"), get("grad_z_n"))),
        grad_nonfinite=round(get("grad_nonfinite")),
        attenuation=grad_z / grad_a if grad_z is not None and grad_a else None,
        grad_a_rms=grad_a,
        grad_z_rms=grad_z,
        entropy=over_rows("entropy"),
        jacobian=over_rows("jacobian"),
        logit_std=None if (variance := over_rows("logit_variance")) is None else math.sqrt(variance),
        log_keys=over_rows("log_keys"),
        entropy_min=min((heads["entropy"][at] / n for at, n in enumerate(heads["rows"]) if n), default=None),
        heads=tuple(_head(*values) for values in zip(*heads.values(), strict=True)) if softmax else None,
        histogram=tuple(get(f"bin{k}") / n for k in range(HISTOGRAM_BINS)) if n and peak else None,
    )
    return record, stuck


def _head(rows: float, entropy: float, jacobian: float, variance: float, log_keys: float, logit_max: float) -> Head:
    if not rows:
        return Head(0, None, None, None, None)
    return Head(round(rows), entropy / rows, jacobian / rows, math.sqrt(variance / rows), logit_max)
