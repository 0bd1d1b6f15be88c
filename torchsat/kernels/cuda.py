"""The rows of statistics.py on NVIDIA GPUs: one Triton kernel per call, which reads every element once.

A program of the kernel reads one block of elements and writes one row; two small operations then merge the rows. Sums are float64, so that neither a
mean far from 0 nor a vanishing gradient loses its digits. Units are counted at a sample of the elements, by the first programs: two atomic additions
for every element would cost many times as much as reading it.

Triton comes with the CUDA builds of torch. The kernels are used on a device as soon as statistics.trust_kernels has found that they compute the right
numbers there. What differs between observations is no constant of a kernel, so that no kernel is compiled again.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from torchsat.columns import BACKWARD, BINS, BLOCK, COLUMN, SUMS, UNWEIGHED
from torchsat.kernels.formulas import BETWEEN, FIRST_BIN, GELU, GELU_ERF, GIVEN, LOGISTIC, SILU, Formula
from torchsat.sampling import MIX

KINDS = frozenset((GIVEN, LOGISTIC, BETWEEN, SILU, GELU, GELU_ERF))
"""The kinds of derivatives that the kernel computes from z; GIVEN is read."""
_BLOCK = 2048
_WARPS = 8
_UNIT_SAMPLES = 65536
"""At most this many elements of a call are counted by unit."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_trusted: set[int] = set()
"""The devices on which the kernels compute the right numbers."""

_UNWEIGHED = frozenset(COLUMN[name] for name in UNWEIGHED)
_GATES = slice(COLUMN["gate_left"], COLUMN["gate_right"] + 1)
_EXTREMES = slice(COLUMN["z_max"], COLUMN["a_min_negated"] + 1)
_GRADIENT = slice(COLUMN[BACKWARD[0]], COLUMN[BACKWARD[-1]] + 1)

# The places of the columns in a row. Of the globals of Python a kernel can read constants of this type only.
_WIDTH = constexpr(len(COLUMN))
_N = constexpr(COLUMN["n"])
_READ = constexpr(COLUMN["read"])
_ELEMENTS = constexpr(COLUMN["elements"])
_NONFINITE = constexpr(COLUMN["nonfinite"])
_LOW = constexpr(COLUMN["low"])
_HIGH = constexpr(COLUMN["high"])
_DERIVATIVE = constexpr(COLUMN["derivative"])
_DERIVATIVE_SQ = constexpr(COLUMN["derivative_sq"])
_DERIVATIVE_UNKNOWN = constexpr(COLUMN["derivative_unknown"])
_Z = constexpr(COLUMN["z"])
_Z_SQ = constexpr(COLUMN["z_sq"])
_A = constexpr(COLUMN["a"])
_A_SQ = constexpr(COLUMN["a_sq"])
_ZEROS = constexpr(COLUMN["zeros"])
_GATE_LEFT = constexpr(COLUMN["gate_left"])
_GATE_RIGHT = constexpr(COLUMN["gate_right"])
_BIN0 = constexpr(COLUMN[BINS[0]])
_BINS = constexpr(len(BINS))
_FIRST_BIN = constexpr(FIRST_BIN)
_ROOM = constexpr(64)
"""The number of bins as a power of two, which Triton wants. Elements that do not count fall into the last one."""
_PEAK = constexpr(COLUMN["peak"])
_Z_MAX = constexpr(COLUMN["z_max"])
_Z_MIN_NEGATED = constexpr(COLUMN["z_min_negated"])
_A_MAX = constexpr(COLUMN["a_max"])
_A_MIN_NEGATED = constexpr(COLUMN["a_min_negated"])
_BACKWARD_FROM = constexpr(_GRADIENT.start)
_BACKWARD_TO = constexpr(_GRADIENT.stop)

# Places in the short row of a backward call.
_BACKWARD_WIDTH = constexpr(len(BACKWARD))
_GRAD_A_N = constexpr(BACKWARD.index("grad_a_n"))
_GRAD_A_READ = constexpr(BACKWARD.index("grad_a_read"))
_GRAD_A_SQ = constexpr(BACKWARD.index("grad_a_sq"))
_GRAD_Z_N = constexpr(BACKWARD.index("grad_z_n"))
_GRAD_Z_READ = constexpr(BACKWARD.index("grad_z_read"))
_GRAD_Z_SQ = constexpr(BACKWARD.index("grad_z_sq"))
_GRAD_NONFINITE = constexpr(BACKWARD.index("grad_nonfinite"))
_DEMAND = constexpr(BACKWARD.index("demand"))
_LEAVING = constexpr(BACKWARD.index("leaving"))
_BLOCKED = constexpr(BACKWARD.index("blocked"))
_TRAPPED = constexpr(BACKWARD.index("trapped"))

# The rows of a unit block.
_SAMPLES = constexpr(BLOCK.index("samples"))
_SATURATED = constexpr(BLOCK.index("saturated"))
_SAMPLES_READ = constexpr(BLOCK.index("samples_read"))

# The factors of the hash of sampling.py.
_MIX_0 = constexpr(MIX[0])
_MIX_1 = constexpr(MIX[1])

# The kinds of derivatives.
_GIVEN = constexpr(GIVEN)
_LOGISTIC = constexpr(LOGISTIC)
_BETWEEN = constexpr(BETWEEN)
_SILU = constexpr(SILU)
_GELU = constexpr(GELU)


def reads(*tensors: Tensor | None) -> bool:
    """Whether the kernels can read these vectors, and are trusted on their device."""
    return all(each is None or (each.is_cuda and each.device.index in _trusted and each.dtype in _DTYPES) for each in tensors)


def trust(device: torch.device) -> None:
    """Use the kernels on this device from now on."""
    _trusted.add(torch.cuda.current_device() if device.index is None else device.index)


@triton.jit
def _logistic(z):
    """The logistic function at z and at -z, in a form that does not overflow."""
    e = tl.exp(-tl.abs(z))
    whole = 1 / (1 + e)
    return tl.where(z > 0, whole, e * whole), tl.where(z > 0, e * whole, whole)


@triton.jit
def _slope(z, kind: constexpr, b, c, d):
    """|f'(z)| by one of the formulas of formulas.py."""
    if kind == _LOGISTIC:
        up, down = _logistic(b * z)
        out = c * up * down
    elif kind == _BETWEEN:
        out = tl.where((z > b) & (z < d), c, 0.0)
    elif kind == _SILU:
        up, down = _logistic(z)
        out = tl.abs(up * (1 + z * down))
    elif kind == _GELU:
        # Beyond |z| = 30 the second term is 0.
        v = tl.minimum(tl.maximum(z, -30.0), 30.0)
        up, down = _logistic(1.5957691216057308 * (v + 0.044715 * v * v * v))
        out = tl.abs(up + v * up * down * 1.5957691216057308 * (1 + 0.134145 * v * v))
    else:
        v = tl.minimum(tl.maximum(z, -30.0), 30.0)
        out = tl.abs(0.5 + 0.5 * tl.erf(v * 0.7071067811865476) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327)
    return out


@triton.jit
def _load(ptr, at, inside, whole):
    """The elements at these places, as float32. Only the last block, which is not `whole`, needs a mask: a load with one reads element by element."""
    if whole:
        values = tl.load(ptr + at).to(tl.float32)
    else:
        values = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _read(z_ptr, a_ptr, slope_ptr, at, inside, whole, z_step, a_step, kind: constexpr, b, c, d):
    """z, a and |f'| of the elements at these places, and whether all three are finite; where they are not, all three are 0."""
    z = _load(z_ptr, at * z_step, inside, whole)
    a = _load(a_ptr, at * a_step, inside, whole)
    if kind == _GIVEN:
        slope = _load(slope_ptr, at, inside, whole)
    else:
        slope = _slope(z, kind, b, c, d)
    ok = inside & (z * 0 + a * 0 + slope * 0 == 0)
    return tl.where(ok, z, 0.0), tl.where(ok, a, 0.0), tl.where(ok, slope, 0.0), ok


@triton.jit
def _place(at, elements, read, seed):
    """Where in a dense tensor of so many elements those lie that sampling.py draws as number `at` of `read`."""
    mixed = (at + seed) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    mixed = (mixed * _MIX_0) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 15)
    mixed = (mixed * _MIX_1) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    drawn = (mixed >> 8).to(tl.float64) * 5.9604644775390625e-08 + at.to(tl.float64)
    place = (drawn * (elements.to(tl.float64) / read.to(tl.float64))).to(tl.int64)
    return tl.minimum(place, elements - 1)


@triton.jit
def _total(values):
    return tl.sum(values.to(tl.float64), axis=0)


@triton.jit
def _square(values):
    wide = values.to(tl.float64)
    return tl.sum(wide * wide, axis=0)


@triton.jit
def _count(values):
    return tl.sum(values.to(tl.int32), axis=0).to(tl.float64)


@triton.jit
def _write_sums(row, z, a, slope, ok, inside, low, high):
    """The sum columns of a block but the histogram."""
    n = _count(ok)
    tl.store(row + _N, n)
    tl.store(row + _READ, n)
    tl.store(row + _ELEMENTS, 0.0)
    tl.store(row + _NONFINITE, _count(inside) - n)
    tl.store(row + _LOW, _count(ok & (z <= low)))
    tl.store(row + _HIGH, _count(ok & (z >= high)))
    tl.store(row + _DERIVATIVE, _total(slope))
    tl.store(row + _DERIVATIVE_SQ, _square(slope))
    tl.store(row + _DERIVATIVE_UNKNOWN, 0.0)
    tl.store(row + _Z, _total(z))
    tl.store(row + _Z_SQ, _square(z))
    tl.store(row + _A, _total(a))
    tl.store(row + _A_SQ, _square(a))
    tl.store(row + _ZEROS, _count(ok & (a == 0)))
    tl.store(row + _GATE_LEFT, _count(ok & (a < 0.1)))
    tl.store(row + _GATE_RIGHT, _count(ok & (a > 0.9)))
    for column in tl.static_range(_BACKWARD_FROM, _BACKWARD_TO):
        tl.store(row + column, 0.0)


@triton.jit
def _write_histogram(row, slope, ok, peak, per_peak, has_peak: constexpr):
    """The histogram of |f'| / peak, and the peak."""
    at = tl.arange(0, _ROOM)
    if has_peak:
        index = ((slope * per_peak).to(tl.int32, bitcast=True) >> 22) - _FIRST_BIN
        index = tl.minimum(tl.maximum(index, 0), _BINS - 1)
        counts = tl.histogram(tl.where(ok, index, _ROOM - 1), _ROOM)
        tl.store(row + _BIN0 + at, counts.to(tl.float64), mask=at < _BINS)
        tl.store(row + _PEAK, peak)
    else:
        tl.store(row + _BIN0 + at, tl.zeros([_ROOM], tl.float64), mask=at < _BINS)
        tl.store(row + _PEAK, float("-inf"))


@triton.jit
def _write_extremes(row, z, a, ok):
    """The max columns but the peak."""
    tl.store(row + _Z_MAX, tl.max(tl.where(ok, z, float("-inf")), axis=0))
    tl.store(row + _Z_MIN_NEGATED, tl.max(tl.where(ok, -z, float("-inf")), axis=0))
    tl.store(row + _A_MAX, tl.max(tl.where(ok, a, float("-inf")), axis=0))
    tl.store(row + _A_MIN_NEGATED, tl.max(tl.where(ok, -a, float("-inf")), axis=0))


@triton.jit(do_not_specialize=["count", "whole", "read", "seed", "inner", "size", "unit_count", "elements"])
def _observe(
    z_ptr,
    a_ptr,
    slope_ptr,
    out_ptr,
    block_ptr,
    count,
    z_step,
    a_step,
    low,
    high,
    peak,
    per_peak,
    b,
    c,
    d,
    whole,
    read,
    seed,
    inner,
    size,
    unit_count,
    elements,
    kind: constexpr,
    has_peak: constexpr,
    has_units: constexpr,
    block: constexpr,
):
    """The row of one block of elements, each with the weight 1, at out_ptr; the first programs also count elements by unit, at block_ptr."""
    program = tl.program_id(0).to(tl.int64)
    mine = program * block + tl.arange(0, block)
    inside = mine < count
    z, a, slope, ok = _read(z_ptr, a_ptr, slope_ptr, mine, inside, (program + 1) * block <= count, z_step, a_step, kind, b, c, d)
    row = out_ptr + program * _WIDTH
    _write_sums(row, z, a, slope, ok, inside, low, high)
    _write_histogram(row, slope, ok, peak, per_peak, has_peak)
    _write_extremes(row, z, a, ok)
    if has_units:
        if program * block < unit_count:
            at = mine
            if unit_count < count:
                at = _place(mine, count, unit_count, seed + 1)
            z, a, slope, ok = _read(z_ptr, a_ptr, slope_ptr, at, mine < unit_count, False, z_step, a_step, kind, b, c, d)
            if read < whole:
                at = _place(at, whole, read, seed)
            unit = (at // inner) % size
            one = tl.where(ok, 1.0, 0.0).to(tl.float64)
            weighed = one * elements / unit_count
            tl.atomic_add(block_ptr + _SAMPLES * size + unit, weighed, mask=ok)
            tl.atomic_add(block_ptr + _SATURATED * size + unit, weighed, mask=ok & ((z <= low) | (z >= high)))
            tl.atomic_add(block_ptr + _SAMPLES_READ * size + unit, one, mask=ok)


@triton.jit(do_not_specialize=["count"])
def _extremes(z_ptr, a_ptr, out_ptr, count, block: constexpr):
    """How many elements of one block are inf or nan, and the extremes of the others, at out_ptr."""
    program = tl.program_id(0).to(tl.int64)
    at = program * block + tl.arange(0, block)
    inside = at < count
    whole = (program + 1) * block <= count
    z = _load(z_ptr, at, inside, whole)
    a = _load(a_ptr, at, inside, whole)
    ok = inside & (z * 0 + a * 0 == 0)
    row = out_ptr + program * 5
    tl.store(row, _count(inside) - _count(ok))
    tl.store(row + 1, tl.max(tl.where(ok, z, float("-inf")), axis=0))
    tl.store(row + 2, tl.max(tl.where(ok, -z, float("-inf")), axis=0))
    tl.store(row + 3, tl.max(tl.where(ok, a, float("-inf")), axis=0))
    tl.store(row + 4, tl.max(tl.where(ok, -a, float("-inf")), axis=0))


@triton.jit(do_not_specialize=["count", "drawn", "seed"])
def _sides(z_ptr, out_ptr, count, z_step, drawn, seed, low, high, block: constexpr):
    """The sides of `drawn` of `count` elements, at out_ptr."""
    mine = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = mine < drawn
    at = mine
    if drawn < count:
        at = _place(mine, count, drawn, seed)
    z = _load(z_ptr, at * z_step, inside, False)
    tl.store(out_ptr + mine, (z >= high).to(tl.int8) - (z <= low).to(tl.int8), mask=inside)


@triton.jit
def _write_demand(row, a_ptr, z_ptr, side_ptr, mine, count, a_step, z_step, drawn, seed, has_z: constexpr):
    """The demand of those of `drawn` elements with a side that are number `mine`, and the blocked and trapped parts of it. They get the weight
    count / drawn, since the row is of `count` elements."""
    inside = mine < drawn
    at = mine
    if drawn < count:
        at = _place(mine, count, drawn, seed)
    a = _load(a_ptr, at * a_step, inside, False)
    ok = inside & (a * 0 == 0)
    if has_z:
        ok = ok & (_load(z_ptr, at * z_step, inside, False) * 0 == 0)
    side = tl.load(side_ptr + mine, mask=inside, other=0)
    size = tl.where(ok, tl.abs(a), 0.0)
    weight = count.to(tl.float64) / drawn.to(tl.float64)
    tl.store(row + _DEMAND, weight * _total(size))
    tl.store(row + _BLOCKED, weight * _total(tl.where(side != 0, size, 0.0)))
    leaves = ok & (((side > 0) & (a > 0)) | ((side < 0) & (a < 0)))
    tl.store(row + _LEAVING, weight * _count(leaves))
    tl.store(row + _TRAPPED, weight * _total(tl.where(leaves, size, 0.0)))


@triton.jit(do_not_specialize=["count", "drawn", "seed"])
def _gradient(
    a_ptr, z_ptr, side_ptr, out_ptr, count, a_step, z_step, drawn, seed, has_a: constexpr, has_z: constexpr, has_sides: constexpr, block: constexpr
):
    """The short row of one block of a backward call, at out_ptr. The first programs also sum up the demand of the elements with a side."""
    program = tl.program_id(0).to(tl.int64)
    at = program * block + tl.arange(0, block)
    inside = at < count
    whole = (program + 1) * block <= count
    a = tl.zeros([block], tl.float32)
    z = tl.zeros([block], tl.float32)
    if has_a:
        a = _load(a_ptr, at * a_step, inside, whole)
    if has_z:
        z = _load(z_ptr, at * z_step, inside, whole)
    ok = inside & (a * 0 + z * 0 == 0)
    n = _count(ok)
    row = out_ptr + program * _BACKWARD_WIDTH
    tl.store(row + _GRAD_A_N, n if has_a else 0.0)
    tl.store(row + _GRAD_A_READ, n if has_a else 0.0)
    tl.store(row + _GRAD_A_SQ, _square(tl.where(ok, a, 0.0)))
    tl.store(row + _GRAD_Z_N, n if has_z else 0.0)
    tl.store(row + _GRAD_Z_READ, n if has_z else 0.0)
    tl.store(row + _GRAD_Z_SQ, _square(tl.where(ok, z, 0.0)))
    tl.store(row + _GRAD_NONFINITE, _count(inside) - n)
    for column in tl.static_range(_DEMAND, _TRAPPED + 1):
        tl.store(row + column, 0.0)
    if has_sides:
        if program * block < drawn:
            _write_demand(row, a_ptr, z_ptr, side_ptr, at, count, a_step, z_step, drawn, seed, has_z)


def observe(
    z: Tensor,
    a: Tensor,
    slope: Tensor | Formula,
    peak: float | None,
    edges: tuple[float | None, float | None],
    elements: int,
    sigmoid: bool,
    exact: Tensor | None,
    row: Tensor,
    place: tuple[int, int, int, int, int] | None = None,
    block: Tensor | None = None,
) -> None:
    """Merge a forward call into a row, and add the samples of each unit to a unit block, if there is one.

    The arguments are those of statistics.observe; `place` is that of the units.
    """
    count = z.shape[0]
    row[COLUMN["elements"]] += elements
    if not count:
        return
    formula = slope if isinstance(slope, Formula) else Formula(GIVEN)
    unit_count = min(count, _UNIT_SAMPLES)
    programs = triton.cdiv(count, _BLOCK)
    out = torch.empty(programs, len(COLUMN), dtype=torch.float64, device=z.device)
    low, high = edges
    with torch.cuda.device_of(z):
        _observe[(programs,)](
            z,
            a,
            z if isinstance(slope, Formula) else slope.contiguous(),
            out,
            row if block is None else block,
            count,
            z.stride(0),
            a.stride(0),
            -math.inf if low is None else low,
            math.inf if high is None else high,
            1.0 if peak is None else peak,
            1.0 if peak is None else 1 / peak,
            formula.b,
            formula.c,
            formula.d,
            *((count, count, 0, 1, 1) if place is None else place),
            unit_count,
            elements,
            kind=formula.kind,
            has_peak=peak is not None,
            has_units=block is not None,
            block=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    sums = out[:, : len(SUMS)].sum(0)
    if not sigmoid:
        sums[_GATES] = 0
    if exact is not None:
        sums[COLUMN["nonfinite"]] = exact[0]
        torch.maximum(row[_EXTREMES], exact[1:], out=row[_EXTREMES])
    row[: len(SUMS)] += _weighed(sums, elements / count)
    torch.maximum(row[len(SUMS) :], out[:, len(SUMS) :].amax(0), out=row[len(SUMS) :])


def extremes(z: Tensor, a: Tensor | None) -> Tensor:
    """statistics.EXACT of two vectors of neighbouring elements. Without a, its columns are not defined."""
    count = z.shape[0]
    programs = triton.cdiv(count, _BLOCK)
    out = torch.empty(programs, 5, dtype=torch.float64, device=z.device)
    with torch.cuda.device_of(z):
        _extremes[(programs,)](z, z if a is None else a, out, count, block=_BLOCK, num_warps=_WARPS)
    return torch.cat([out[:, :1].sum(0), out[:, 1:].amax(0)])


def sides(z: Tensor, edges: tuple[float | None, float | None], count: int, seed: int) -> Tensor:
    """statistics.Sides.values of `count` elements of a vector, which are drawn with a seed unless they are all."""
    out = torch.empty(count, dtype=torch.int8, device=z.device)
    low, high = edges
    if count:
        with torch.cuda.device_of(z):
            _sides[(triton.cdiv(count, _BLOCK),)](
                *(z, out, z.shape[0], z.stride(0), count, seed, -math.inf if low is None else low, math.inf if high is None else high),
                block=_BLOCK,
                num_warps=_WARPS,
            )
    return out


def observe_gradient(
    grad_a: Tensor | None, grad_z: Tensor | None, count: int, elements: int, row: Tensor, sides: Tensor | None = None, seed: int = 0
) -> None:
    """Merge a backward call of so many elements into a row. `count` is the length of the gradients, of which one may be missing. `sides` and `seed`
    are statistics.Sides."""
    if not count:
        return
    programs = triton.cdiv(count, _BLOCK)
    out = torch.empty(programs, len(BACKWARD), dtype=torch.float64, device=row.device)
    a, z = (row if each is None else each for each in (grad_a, grad_z))
    with torch.cuda.device_of(row):
        _gradient[(programs,)](
            *(a, z, row if sides is None else sides, out, count, a.stride(0), z.stride(0), 0 if sides is None else sides.shape[0], seed),
            has_a=grad_a is not None,
            has_z=grad_z is not None,
            has_sides=sides is not None and grad_a is not None,
            block=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    row[_GRADIENT] += _weighed(out.sum(0), elements / count, _GRADIENT.start)


def _weighed(sums: Tensor, weight: float, first: int = 0) -> Tensor:
    """Neighbouring sum columns of a row, from the `first` on, of elements that have this weight and were added up without it."""
    return sums if weight == 1 else torch.where(_is_weighed(first, len(sums), sums.device), sums * weight, sums)


@functools.lru_cache(maxsize=64)
def _is_weighed(first: int, count: int, device: torch.device) -> Tensor:
    """Which of these columns are weighed. The flags are cached, since each copy to a GPU would wait for the GPU."""
    return torch.tensor([at not in _UNWEIGHED for at in range(first, first + count)], device=device)
