"""The Triton kernels that add the elements of one call to a row of statistics.py.

`kernels/cuda.py` starts them; cuda_elements.py says how a program reads.

Units are counted at a sample of the elements: several atomic additions for every element would cost many times as much as reading it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from torchsat.columns import BINS, BLOCK, COLUMN
from torchsat.kernels.cuda_elements import add, count_of, largest, lines, load, place, squares, tile_of, total
from torchsat.kernels.formulas import BETWEEN, FIRST_BIN, GELU, GIVEN, LOGISTIC, SILU

# The places of the columns in a row. Of the globals of Python a kernel can read constants of this type only.
_N = constexpr(COLUMN["n"])
_READ = constexpr(COLUMN["read"])
_ELEMENTS = constexpr(COLUMN["elements"])
_NONFINITE = constexpr(COLUMN["nonfinite"])
_LOW = constexpr(COLUMN["low"])
_HIGH = constexpr(COLUMN["high"])
_DERIVATIVE = constexpr(COLUMN["derivative"])
_DERIVATIVE_SQ = constexpr(COLUMN["derivative_sq"])
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

# The rows of a unit block.
_SAMPLES = constexpr(BLOCK.index("samples"))
_SATURATED = constexpr(BLOCK.index("saturated"))
_SAMPLES_READ = constexpr(BLOCK.index("samples_read"))
_A_ABS = constexpr(BLOCK.index("a_abs"))

# The kinds of derivatives.
_GIVEN = constexpr(GIVEN)
_LOGISTIC = constexpr(LOGISTIC)
_BETWEEN = constexpr(BETWEEN)
_SILU = constexpr(SILU)
_GELU = constexpr(GELU)


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
        # s(z) s(-z) is the same for z and -z.
        e = tl.exp(-tl.abs(b * z))
        whole = 1 / (1 + e)
        out = c * e * whole * whole
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
def _read(z_ptr, a_ptr, slope_ptr, at, inside, whole, kind: constexpr, b, c, d):
    """z, a and |f'| of the elements at these places, and whether all three are finite."""
    z = load(z_ptr, at, inside, whole)
    a = load(a_ptr, at, inside, whole)
    if kind == _GIVEN:
        slope = load(slope_ptr, at, inside, whole)
    else:
        slope = _slope(z, kind, b, c, d)
    return z, a, slope, inside & (z * 0 + a * 0 + slope * 0 == 0)


@triton.jit
def _bins(slope, ok, per_peak, size: constexpr):
    """The histogram of |f'| / peak of a tile of this size."""
    index = ((slope * per_peak).to(tl.int32, bitcast=True) >> 22) - _FIRST_BIN
    index = tl.where(ok, tl.minimum(tl.maximum(index, 0), _BINS - 1), _ROOM - 1)
    return tl.histogram(tl.reshape(index, [size]), _ROOM)


@triton.jit
def _count_units(
    z_ptr, a_ptr, slope_ptr, block_ptr, count, low, high, whole, read, seed, inner, size, unit_count, elements, kind: constexpr, width: constexpr
):
    """Count `unit_count` of the elements by unit, at block_ptr."""
    for tile in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(unit_count, width), tl.num_programs(0).to(tl.int64)):
        mine = tile * width + tl.arange(0, width).to(tl.int64)
        at = mine
        if unit_count < count:
            at = place(mine, count, unit_count, seed + 1)
        # A derivative that is computed from z is finite where z is, whatever the parameters of its formula.
        z, a, _slope, ok = _read(z_ptr, a_ptr, slope_ptr, at, mine < unit_count, False, kind, 1.0, 1.0, 1.0)
        if read < whole:
            at = place(at, whole, read, seed)
        unit = (at // inner) % size
        one = tl.where(ok, 1.0, 0.0).to(tl.float64)
        weighed = one * elements / unit_count
        tl.atomic_add(block_ptr + _SAMPLES * size + unit, weighed, mask=ok, sem="relaxed")
        tl.atomic_add(block_ptr + _SATURATED * size + unit, weighed, mask=ok & ((z <= low) | (z >= high)), sem="relaxed")
        tl.atomic_add(block_ptr + _SAMPLES_READ * size + unit, one, mask=ok, sem="relaxed")
        sizes = tl.where(ok, tl.abs(a), 0.0).to(tl.float64)
        tl.atomic_add(block_ptr + _A_ABS * size + unit, sizes * elements / unit_count, mask=ok, sem="relaxed")


@triton.jit
def _add_moments(row_ptr, weight, slope_1, slope_2, z_1, z_2, a_1, a_2):
    add(row_ptr + _DERIVATIVE, tl.sum(slope_1, axis=0) * weight)
    add(row_ptr + _DERIVATIVE_SQ, tl.sum(slope_2, axis=0) * weight)
    add(row_ptr + _Z, tl.sum(z_1, axis=0) * weight)
    add(row_ptr + _Z_SQ, tl.sum(z_2, axis=0) * weight)
    add(row_ptr + _A, tl.sum(a_1, axis=0) * weight)
    add(row_ptr + _A_SQ, tl.sum(a_2, axis=0) * weight)


@triton.jit
def _add_counts(row_ptr, weight, n, in_low, in_high, zeros, left, right, sigmoid: constexpr):
    read = total(n)
    add(row_ptr + _N, read * weight)
    add(row_ptr + _READ, read)
    add(row_ptr + _LOW, total(in_low) * weight)
    add(row_ptr + _HIGH, total(in_high) * weight)
    add(row_ptr + _ZEROS, total(zeros) * weight)
    if sigmoid:
        add(row_ptr + _GATE_LEFT, total(left) * weight)
        add(row_ptr + _GATE_RIGHT, total(right) * weight)


@triton.jit
def _add_bins(row_ptr, weight, bins):
    at = tl.arange(0, _ROOM)
    tl.atomic_add(row_ptr + _BIN0 + at, bins.to(tl.float64) * weight, mask=(at < _BINS) & (bins > 0), sem="relaxed")


@triton.jit
def _raise_extremes(row_ptr, z_top, z_bottom, a_top, a_bottom):
    largest(row_ptr + _Z_MAX, tl.max(z_top, axis=0))
    largest(row_ptr + _Z_MIN_NEGATED, tl.max(z_bottom, axis=0))
    largest(row_ptr + _A_MAX, tl.max(a_top, axis=0))
    largest(row_ptr + _A_MIN_NEGATED, tl.max(a_bottom, axis=0))


@triton.jit
def _add_tiles(
    z_ptr,
    a_ptr,
    slope_ptr,
    row_ptr,
    count,
    elements,
    low,
    high,
    peak,
    b,
    c,
    d,
    kind: constexpr,
    sigmoid: constexpr,
    has_peak: constexpr,
    has_exact: constexpr,
    threads: constexpr,
    neighbours: constexpr,
):
    """Add the tiles of this program to the row."""
    none, zero, nothing = tl.zeros([threads], tl.int32), tl.zeros([threads], tl.float64), tl.full([threads], float("-inf"), tl.float32)
    n, bad, in_low, in_high, zeros, left, right = none, none, none, none, none, none, none
    slope_1, slope_2, z_1, z_2, a_1, a_2 = zero, zero, zero, zero, zero, zero
    z_top, z_bottom, a_top, a_bottom = nothing, nothing, nothing, nothing
    bins = tl.zeros([_ROOM], tl.int32)
    for tile in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(count, threads * neighbours), tl.num_programs(0).to(tl.int64)):
        at = tile_of(tile, threads, neighbours)
        inside = at < count
        full = (tile + 1) * (threads * neighbours) <= count
        z, a, slope, ok = _read(z_ptr, a_ptr, slope_ptr, at, inside, full, kind, b, c, d)
        z_top = tl.maximum(z_top, tl.max(tl.where(ok, z, float("-inf")), axis=1))
        z_bottom = tl.maximum(z_bottom, tl.max(tl.where(ok, -z, float("-inf")), axis=1))
        a_top = tl.maximum(a_top, tl.max(tl.where(ok, a, float("-inf")), axis=1))
        a_bottom = tl.maximum(a_bottom, tl.max(tl.where(ok, -a, float("-inf")), axis=1))
        z, a, slope = tl.where(ok, z, 0.0), tl.where(ok, a, 0.0), tl.where(ok, slope, 0.0)
        n += count_of(ok)
        bad += count_of(inside & (ok == 0))
        in_low += count_of(ok & (z <= low))
        in_high += count_of(ok & (z >= high))
        zeros += count_of(ok & (a == 0))
        if sigmoid:
            left += count_of(ok & (a < 0.1))
            right += count_of(ok & (a > 0.9))
        slope_1 += lines(slope)
        slope_2 += squares(slope)
        z_1 += lines(z)
        z_2 += squares(z)
        a_1 += lines(a)
        a_2 += squares(a)
        if has_peak:
            bins += _bins(slope, ok, 1 / peak, threads * neighbours)
    weight = elements.to(tl.float64) / count.to(tl.float64)
    _add_counts(row_ptr, weight, n, in_low, in_high, zeros, left, right, sigmoid)
    _add_moments(row_ptr, weight, slope_1, slope_2, z_1, z_2, a_1, a_2)
    _raise_extremes(row_ptr, z_top, z_bottom, a_top, a_bottom)
    if has_peak:
        _add_bins(row_ptr, weight, bins)
    if not has_exact:
        add(row_ptr + _NONFINITE, total(bad))


@triton.jit
def _add_call(row_ptr, exact_ptr, elements, peak, has_peak: constexpr, has_exact: constexpr):
    """What enters the row once, whatever the elements."""
    add(row_ptr + _ELEMENTS, elements.to(tl.float64))
    if has_peak:
        largest(row_ptr + _PEAK, tl.full((), peak, tl.float64))
    if has_exact:
        add(row_ptr + _NONFINITE, tl.load(exact_ptr))
        for extreme in tl.static_range(4):
            largest(row_ptr + _Z_MAX + extreme, tl.load(exact_ptr + 1 + extreme))


@triton.jit(do_not_specialize=["count", "whole", "read", "seed", "inner", "size", "unit_count", "elements"])
def observe(
    z_ptr,
    a_ptr,
    slope_ptr,
    row_ptr,
    block_ptr,
    exact_ptr,
    count,
    low,
    high,
    peak,
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
    sigmoid: constexpr,
    has_peak: constexpr,
    has_units: constexpr,
    has_exact: constexpr,
    threads: constexpr,
    neighbours: constexpr,
):
    """Add `count` elements, which stand for `elements`, to the row at row_ptr, and some of them by unit to the block at block_ptr."""
    _add_tiles(z_ptr, a_ptr, slope_ptr, row_ptr, count, elements, low, high, peak, b, c, d, kind, sigmoid, has_peak, has_exact, threads, neighbours)
    if tl.program_id(0) == 0:
        _add_call(row_ptr, exact_ptr, elements, peak, has_peak, has_exact)
    if has_units:
        _count_units(z_ptr, a_ptr, slope_ptr, block_ptr, count, low, high, whole, read, seed, inner, size, unit_count, elements, kind, threads * 4)


@triton.jit(do_not_specialize=["count"])
def extremes(z_ptr, a_ptr, out_ptr, count, threads: constexpr, neighbours: constexpr):
    """How many of the elements are inf or nan, and the extremes of the others, merged into the five numbers at out_ptr."""
    nothing = tl.full([threads], float("-inf"), tl.float32)
    bad, z_top, z_bottom, a_top, a_bottom = tl.zeros([threads], tl.int32), nothing, nothing, nothing, nothing
    for tile in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(count, threads * neighbours), tl.num_programs(0).to(tl.int64)):
        at = tile_of(tile, threads, neighbours)
        inside = at < count
        full = (tile + 1) * (threads * neighbours) <= count
        z, a = load(z_ptr, at, inside, full), load(a_ptr, at, inside, full)
        ok = inside & (z * 0 + a * 0 == 0)
        bad += count_of(inside & (ok == 0))
        z_top = tl.maximum(z_top, tl.max(tl.where(ok, z, float("-inf")), axis=1))
        z_bottom = tl.maximum(z_bottom, tl.max(tl.where(ok, -z, float("-inf")), axis=1))
        a_top = tl.maximum(a_top, tl.max(tl.where(ok, a, float("-inf")), axis=1))
        a_bottom = tl.maximum(a_bottom, tl.max(tl.where(ok, -a, float("-inf")), axis=1))
    add(out_ptr, total(bad))
    largest(out_ptr + 1, tl.max(z_top, axis=0))
    largest(out_ptr + 2, tl.max(z_bottom, axis=0))
    largest(out_ptr + 3, tl.max(a_top, axis=0))
    largest(out_ptr + 4, tl.max(a_bottom, axis=0))
