"""What is computed from z, a and their gradients, and how it is laid out: every statistic merges.

A *row* is one float64 vector per site: sum columns, then max columns. A column adds (or maxes) over elements and depends on its element
alone, so that micro-batches, repeated calls of a shared module and, later, ranks all merge by the same operation; whatever is not such a
column (means, shares, ratios) is derived on the host by `to_record`. Beside the row a site keeps a *unit block* [2, units], samples and
saturated samples of each unit, which adds up over observations until every unit has `UNIT_SAMPLES`: stuck units are found in O(units) memory.

Nothing here waits for the device: no `.item()`, no branch on a device tensor. Non-finite elements are counted and enter nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchsat.activations import Bound, Edges
from torchsat.kernels import cpu, engine, gpu
from torchsat.kernels.formulas import BETWEEN, FIRST_BIN, LOGISTIC, Formula, formula
from torchsat.record import HISTOGRAM_BINS, Head, Record

UNIT_SAMPLES = 1000
"""Samples of a unit before anything is said of it: at 50 % saturation, 128 samples all alike happen by chance once in 10^38, but the
samples of one batch are not independent."""
STUCK_SHARE = 0.99
_PART = 65536

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
_BINS = slice(_AT["bin0"], _AT["bin0"] + HISTOGRAM_BINS)
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
        return _sample(tuple(tensor.shape), tensor.stride(), limit, turn)

    def take(self, tensor: Tensor) -> Tensor:
        """The elements of this tensor, or of one that broadcasts to the same shape, as a vector; a view where that is possible."""
        if tensor.stride() == self.strides and tuple(tensor.shape) == self.shape:
            return tensor.as_strided((self.n,), (self.step,), tensor.storage_offset() + self.start)
        flat = tensor.expand(self.shape).permute(self.order).reshape(-1)
        return flat if self.step == 1 else flat[self.start :: self.step]

    @functools.cached_property
    def n(self) -> int:
        """How many are taken."""
        return max(0, -(-(math.prod(self.shape) - self.start) // self.step))

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """Of a dense tensor with this order."""
        strides, inner = [0] * len(self.shape), 1
        for axis in reversed(self.order):
            strides[axis] = inner
            inner *= self.shape[axis]
        return tuple(strides)

    def spread(self, parameter: Tensor) -> Tensor:
        """A learned parameter at each element taken: one value, one per channel (dimension 1, as PReLU), or broadcast."""
        if parameter.numel() == 1:
            return parameter.reshape(())
        if parameter.ndim == 1 and len(self.shape) > 1:
            parameter = parameter.reshape(-1, *([1] * (len(self.shape) - 2)))
        return self.take(parameter)


@functools.lru_cache(maxsize=4096)
def _sample(shape: tuple[int, ...], strides: tuple[int, ...], limit: int | None, turn: int) -> Sample:
    order = tuple(sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis)))
    step = 1 if limit is None else -(-math.prod(shape) // limit) or 1
    if step > 1:
        while any(math.gcd(step, size) != 1 for size in shape):
            step += 1
    return Sample(shape, order, turn * 7919 % min(step, max(math.prod(shape), 1)), step)


@dataclass(eq=False)
class Units:
    """Which unit each element of a sample belongs to: the index along `axis`."""

    sample: Sample
    axis: int

    @property
    def size(self) -> int:
        return self.sample.shape[self.axis]

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Element i of the sample is element start + i * step of the tensor, whose units lie `inner` elements apart: (start, step, inner, size)."""
        sample = self.sample
        after = sample.order[sample.order.index(self.axis) + 1 :]
        return sample.start, sample.step, math.prod(sample.shape[dim] for dim in after), self.size

    def index(self, device: torch.device) -> Tensor:
        """The unit of each element."""
        if self._index is None or self._index.device != device:
            start, step, inner, size = self.place
            taken = torch.arange(start, math.prod(self.sample.shape), step, device=device)
            self._index = taken.div(inner, rounding_mode="floor").remainder(size)
        return self._index

    _index: Tensor | None = None


def empty_row(device: torch.device) -> Tensor:
    """The row of no element: what every merge starts from."""
    return _empty_row(device).clone()


@functools.lru_cache(maxsize=64)
def _empty_row(device: torch.device) -> Tensor:
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
) -> tuple[Tensor, Tensor | None]:
    """The row and the unit block of one forward call, merged in place into those given.

    Args:
        z, a: the elements taken, vectors of equal length.
        slope: |f'(z)|, or its formula, where the kernels read z and a.
        peak: sup|f'|; None: no relative derivative.
        edges: (z_L, z_R), tails inclusive; None: no tail on that side.
        elements: how many the tensor has.
        sigmoid: count the activations below 0.1 and above 0.9.
        units: which unit each element belongs to; None: no unit block.
    """
    constant = not isinstance(peak, Tensor) and not any(isinstance(edge, Tensor) for edge in edges)
    kernels = engine(z, a, None if isinstance(slope, Formula) else slope) if constant else None
    if kernels is not None:
        row = empty_row(z.device) if row is None else row
        if units is None:
            kernels.observe(z, a, slope, peak, edges, elements, sigmoid, row)
            return row, None
        block = torch.zeros(2, units.size, dtype=torch.float64, device=z.device) if block is None else block
        kernels.observe(z, a, slope, peak, edges, elements, sigmoid, row, units.place, block)
        return row, block
    found, counts = _observe(z, a, cast(Tensor, slope), peak, edges, elements, sigmoid, units)
    row = found if row is None else merge_(row, found)
    return row, counts if block is None or counts is None else block.add_(counts)


def known_slope(bound: Bound, *tensors: Tensor) -> Formula | None:
    """The derivative as the kernels that read these tensors compute it, if they do."""
    found = formula(bound)
    kernels = None if found is None else engine(*tensors)
    return found if kernels is not None and found is not None and found.kind in kernels.KINDS else None


@functools.cache
def trust_kernels(device: torch.device) -> str | None:
    """Use the kernels on this GPU from now on, if they compute there what plain torch computes; why not, if not.

    Waits for the device, and may compile for some seconds: not for a training step.
    """
    kernels = gpu()
    if kernels is None:
        return "Triton is not installed"
    try:
        wrong = disagreement(kernels, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if wrong is None:
        kernels.trust(device)
    return wrong


def disagreement(kernels: Any, device: torch.device) -> str | None:
    """Where kernels on a device and plain torch on the host differ by more than rounding."""
    z = torch.linspace(-9, 9, 20_000).roll(7777)
    z[77], z[7777] = math.nan, math.inf
    sample = Sample.of(z.reshape(-1, 5), None, 0)
    units = Units(sample, 1)
    for dtype in (torch.float32, torch.bfloat16):
        there = z.to(device, dtype)
        here = there.cpu().float()
        for given in (Formula(LOGISTIC, 2.0, 4.0), Formula(BETWEEN), None):
            slope = 4 * torch.sigmoid(2 * here) * torch.sigmoid(-2 * here) if given is None or given.kind == LOGISTIC else (here > 0).float()
            row, block = empty_row(device), torch.zeros(2, 5, dtype=torch.float64, device=device)
            kernels.observe(there, there, slope.to(device) if given is None else given, 1.0, (-2.0, 2.0), len(z), True, row, units.place, block)
            kernels.observe_gradient(there, there, len(z), row)
            expected, counts = _observe(here, here, slope, 1.0, (-2.0, 2.0), len(z), True, units)
            merge_(expected, observe_gradient(here, here))
            assert counts is not None
            for name, one, other in zip((*SUMS, *MAXES, "units"), (*row.cpu(), block.cpu()), (*expected, counts), strict=True):
                # An element may lie in the next bin: the derivative is float32.
                if not torch.allclose(one, other, rtol=1e-5, atol=2.0 if name.startswith("bin") else 1e-3):
                    return f"{name} is {one.tolist()} and should be {other.tolist()}"
    return None


def _observe(
    z: Tensor, a: Tensor, slope: Tensor, peak: float | Tensor | None, edges: Edges, elements: int, sigmoid: bool, units: Units | None
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch, on any device: what the kernels are held against."""
    dtype = accumulator(z.device)
    given = torch.stack([each.to(dtype) for each in (z, a, slope)])
    finite = torch.isfinite(given).all(0)
    kept = torch.where(finite, given, torch.zeros((), dtype=dtype, device=z.device))
    z, a, slope = kept
    n = finite.sum()
    low, high = edges
    nothing = torch.zeros_like(finite)
    in_low = (z <= low) & finite if low is not None else nothing
    in_high = (z >= high) & finite if high is not None else nothing
    totals, squares = kept.sum(1), torch.linalg.vecdot(kept, kept)
    zero = torch.zeros_like(n)
    sums = [
        n,
        torch.full_like(n, elements),
        finite.numel() - n,
        in_low.sum(),
        in_high.sum(),
        *(totals[2], squares[2], totals[0], squares[0], totals[1], squares[1]),
        n - (a != 0).sum(),
        ((a < 0.1) & finite).sum() if sigmoid else zero,
        ((a > 0.9) & finite).sum() if sigmoid else zero,
        *[zero] * 5,
    ]
    bins = torch.zeros(HISTOGRAM_BINS, dtype=dtype, device=z.device)
    if peak is None:
        peak_column = torch.full((), -math.inf, dtype=dtype, device=z.device)
    else:
        # torch.full, not torch.tensor: a number copied to a GPU would wait for it.
        peak_column = peak.to(dtype) if isinstance(peak, Tensor) else torch.full((), peak, dtype=dtype, device=z.device)
        bins.index_add_(0, _bin(slope / peak_column), finite.to(dtype))
    far = torch.full((), math.inf, dtype=dtype, device=z.device)
    tops, bottoms = (
        (torch.where(finite, given[:2], -far).amax(1), torch.where(finite, given[:2], far).amin(1)) if len(z) else (-far.expand(2), far.expand(2))
    )
    maxes = [peak_column, tops[0], -bottoms[0], tops[1], -bottoms[1]]
    row = torch.cat([torch.stack([value.to(dtype) for value in sums]), bins, torch.stack(maxes)])
    if units is None:
        return row, None
    block = torch.zeros(2, units.size, dtype=dtype, device=z.device)
    return row, block.index_add_(1, units.index(z.device), torch.stack([finite, in_low | in_high]).to(dtype))


def _bin(relative: Tensor) -> Tensor:
    """The index in HISTOGRAM_EDGES: exponent and first mantissa bit of the float32 are two bins per octave, with no logarithm taken."""
    return (relative.float().contiguous().view(torch.int32).bitwise_right_shift(22) - FIRST_BIN).clamp(0, HISTOGRAM_BINS - 1)


def observe_gradient(grad_a: Tensor | None, grad_z: Tensor | None, row: Tensor | None = None) -> Tensor:
    """The row of one backward call, merged in place into the one given. An element counts only if every gradient given is finite there."""
    given = [grad for grad in (grad_a, grad_z) if grad is not None]
    row = empty_row(given[0].device) if row is None else row
    kernels = engine(grad_a, grad_z)
    if kernels is not None:
        kernels.observe_gradient(grad_a, grad_z, given[0].shape[0], row)
        return row
    dtype = row.dtype
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
    row[_GRADIENT] += torch.stack([*columns, finite.numel() - n]).to(row.device)
    return row


def observe_features(x: Tensor, units: Units, sums: Tensor | None = None) -> Tensor:
    """[samples, sum x, sum x^2] of each unit, of the elements x that were taken: [3, units], added in place to the sums given."""
    dtype = accumulator(x.device)
    sums = torch.zeros(3, units.size, dtype=dtype, device=x.device) if sums is None else sums
    if cpu.reads(x):
        cpu.add_features(x, units.place, sums)
        return sums
    finite = torch.isfinite(x)
    values = torch.where(finite, x.to(dtype), torch.zeros((), dtype=dtype, device=x.device))
    return sums.index_add_(1, units.index(x.device), torch.stack([finite.to(dtype), values, values * values]))


def summarise_features(sums: Tensor) -> Tensor:
    """Of `observe_features`: all samples, the mean square, and the mean over features of the squared mean."""
    if cpu.reads(sums):
        out = torch.empty(3, dtype=sums.dtype)
        cpu.summarise_features(sums, out)
        return out
    n, first, second = sums
    # Without the 1/n bias of a squared sample mean: pairs of distinct samples only, over the features that have any.
    pairs = n * (n - 1)
    squares = torch.where(pairs > 0, (first * first - second) / pairs.clamp(min=1), torch.zeros_like(pairs))
    return torch.stack([n.sum(), second.sum() / n.sum(), squares.sum() / (pairs > 0).sum()])


def put_squares(x: Tensor, y: Tensor | None, out: Tensor, at: int) -> None:
    """Write sum x^2 of a vector to out[at], and sum (y - x)^2, if there is another vector, behind it: never in float32, where squares of a
    gradient that still carries a GradScaler's factor overflow, and those of a vanishing one are 0."""
    if cpu.reads(x, y):
        cpu.squares(x, y, out, at)
        return
    dtype = out.dtype
    # On the CPU in parts: there a norm in float64 makes a copy of the whole.
    size = _PART if x.device.type == "cpu" else max(1, len(x))
    for column in range(1 if y is None else 2):
        out[at + column] = 0
    for first in range(0, len(x), size):
        part = x[first : first + size]
        out[at] += torch.linalg.vector_norm(part, dtype=dtype).square()
        if y is not None:
            out[at + 1] += torch.linalg.vector_norm(y[first : first + size].to(dtype) - part.to(dtype)).square()


def observe_softmax(logits: Tensor, visible: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """The row and the block of heads of one softmax.

    Args:
        logits: [batch, heads, queries, keys], what masks add included.
        visible: booleans that broadcast to the same shape: which keys a query sees. A row that sees fewer than two has no entropy and does
            not count, nor does one with a logit that is inf or nan.
        elements: how many logits the whole softmax has.
    """
    dtype = accumulator(logits.device)
    visible = visible.expand(logits.shape)
    if cpu.reads(logits):
        row, heads = empty_row(logits.device), torch.zeros(len(HEADS), logits.shape[1], dtype=dtype)
        heads[-1] = -math.inf
        cpu.observe_softmax(logits, visible, elements, row, heads)
        return row, heads
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


def summarise_units(block: Tensor | None, device: torch.device) -> Tensor:
    """UNITS of a unit block; all NaN where the site has none."""
    dtype = accumulator(device)
    if block is None:
        return torch.full((len(UNITS),), math.nan, dtype=dtype, device=device)
    if cpu.reads(block):
        out = torch.empty(len(UNITS), dtype=dtype)
        cpu.summarise_units(block, UNIT_SAMPLES, STUCK_SHARE, out)
        return out
    samples, saturated = block
    measured = samples >= UNIT_SAMPLES
    stuck = measured & (saturated >= STUCK_SHARE * samples)
    return torch.stack([torch.full_like(samples[0], len(samples)), measured.sum().to(dtype), stuck.sum().to(dtype), samples.amin()])


def start_over_if_full_(block: Tensor) -> None:
    """Begin a new window once every unit of the block has its samples, without asking the device."""
    if cpu.reads(block):
        cpu.start_over_if_full(block, UNIT_SAMPLES)
    else:
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

    values = dict(zip(_AT, row, strict=False))
    get = values.__getitem__
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
        histogram=tuple(count / n for count in row[_BINS]) if n and peak else None,
    )
    return record, stuck


def _head(rows: float, entropy: float, jacobian: float, variance: float, log_keys: float, logit_max: float) -> Head:
    if not rows:
        return Head(0, None, None, None, None)
    return Head(round(rows), entropy / rows, jacobian / rows, math.sqrt(variance / rows), logit_max)
