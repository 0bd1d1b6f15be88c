"""The rows of statistics.py on NVIDIA GPUs: one Triton kernel per call, which reads every element once. Not run on a GPU yet.

A program takes one block of elements and writes one row; two small operations merge the rows. Sums are float64, where neither a mean far from 0
nor a gradient that vanishes does harm. Units are counted on a sample, by the first programs: two atomic additions for every element would cost
many times the reading.

Triton ships with torch's CUDA builds. The kernels are used on a device once statistics.py has found there that they are right (`trust`). Whatever
differs between observations is no constant of a kernel, so that none is compiled anew.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsat.kernels.formulas import BETWEEN, FIRST_BIN, GELU, GELU_ERF, GIVEN, LOGISTIC, SILU, Formula
from torchsat.record import HISTOGRAM_BINS

KINDS = frozenset((GIVEN, LOGISTIC, BETWEEN, SILU, GELU, GELU_ERF))
_BLOCK = 2048
_WARPS = 8
_ROOM = 64
"""HISTOGRAM_BINS as a power of two; what does not count falls into the last."""
_UNIT_SAMPLES = 65536
_SUMS, _MAXES = 19 + HISTOGRAM_BINS, 5
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_turns = itertools.count()
_trusted: set[int] = set()
"""The devices on which the kernels were found right."""


def reads(*tensors: Tensor | None) -> bool:
    """Whether the kernels can read these vectors."""
    return all(each is None or (each.is_cuda and each.device.index in _trusted and each.dtype in _DTYPES) for each in tensors)


def trust(device: torch.device) -> None:
    """Use the kernels on this device from now on."""
    _trusted.add(torch.cuda.current_device() if device.index is None else device.index)


@triton.jit
def _logistic(z):
    """s(z) and s(-z), neither of which overflows."""
    e = tl.exp(-tl.abs(z))
    whole = 1 / (1 + e)
    return tl.where(z > 0, whole, e * whole), tl.where(z > 0, e * whole, whole)


@triton.jit
def _slope(z, kind: tl.constexpr, b, c, d):
    """The kinds of formulas.py, by number."""
    if kind == 1:
        up, down = _logistic(b * z)
        out = c * up * down
    elif kind == 2:
        out = tl.where((z > b) & (z < d), c, 0.0)
    elif kind == 3:
        up, down = _logistic(z)
        out = tl.abs(up * (1 + z * down))
    elif kind == 4:
        # Beyond 30 the second term is 0.
        v = tl.minimum(tl.maximum(z, -30.0), 30.0)
        up, down = _logistic(1.5957691216057308 * (v + 0.044715 * v * v * v))
        out = tl.abs(up + v * up * down * 1.5957691216057308 * (1 + 0.134145 * v * v))
    else:
        v = tl.minimum(tl.maximum(z, -30.0), 30.0)
        out = tl.abs(0.5 + 0.5 * tl.erf(v * 0.7071067811865476) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327)
    return out


@triton.jit
def _load(ptr, at, inside, whole):
    """Elements as float32. What has a mask is loaded one by one: only the last block needs it."""
    if whole:
        values = tl.load(ptr + at).to(tl.float32)
    else:
        values = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _read(z_ptr, a_ptr, slope_ptr, at, inside, whole, z_step, a_step, kind: tl.constexpr, b, c, d):
    """z, a and |f'| of some elements, 0 where one of them is not finite, and whether all are."""
    z = _load(z_ptr, at * z_step, inside, whole)
    a = _load(a_ptr, at * a_step, inside, whole)
    if kind == 0:
        slope = _load(slope_ptr, at, inside, whole)
    else:
        slope = _slope(z, kind, b, c, d)
    ok = inside & (z * 0 + a * 0 + slope * 0 == 0)
    return tl.where(ok, z, 0.0), tl.where(ok, a, 0.0), tl.where(ok, slope, 0.0), ok


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


@triton.jit(do_not_specialize=["count", "start", "step", "inner", "size", "unit_start", "unit_step", "unit_count"])
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
    start,
    step,
    inner,
    size,
    unit_start,
    unit_step,
    unit_count,
    kind: tl.constexpr,
    has_peak: tl.constexpr,
    has_units: tl.constexpr,
    bins: tl.constexpr,
    room: tl.constexpr,
    first_bin: tl.constexpr,
    block: tl.constexpr,
):
    mine = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = mine < count
    whole = (tl.program_id(0).to(tl.int64) + 1) * block <= count
    z, a, slope, ok = _read(z_ptr, a_ptr, slope_ptr, mine, inside, whole, z_step, a_step, kind, b, c, d)
    n = _count(ok)
    row = out_ptr + tl.program_id(0).to(tl.int64) * (19 + bins + 5)
    tl.store(row + 0, n)
    tl.store(row + 1, 0.0)
    tl.store(row + 2, _count(inside) - n)
    tl.store(row + 3, _count(ok & (z <= low)))
    tl.store(row + 4, _count(ok & (z >= high)))
    tl.store(row + 5, _total(slope))
    tl.store(row + 6, _square(slope))
    tl.store(row + 7, _total(z))
    tl.store(row + 8, _square(z))
    tl.store(row + 9, _total(a))
    tl.store(row + 10, _square(a))
    tl.store(row + 11, _count(ok & (a == 0)))
    tl.store(row + 12, _count(ok & (a < 0.1)))
    tl.store(row + 13, _count(ok & (a > 0.9)))
    for column in tl.static_range(14, 19):
        tl.store(row + column, 0.0)
    bin_at = tl.arange(0, room)
    if has_peak:
        index = ((slope * per_peak).to(tl.int32, bitcast=True) >> 22) - first_bin
        index = tl.minimum(tl.maximum(index, 0), bins - 1)
        counts = tl.histogram(tl.where(ok, index, room - 1), room)
        tl.store(row + 19 + bin_at, counts.to(tl.float64), mask=bin_at < bins)
        tl.store(row + 19 + bins, peak)
    else:
        tl.store(row + 19 + bin_at, tl.zeros([room], tl.float64), mask=bin_at < bins)
        tl.store(row + 19 + bins, float("-inf"))
    tl.store(row + 20 + bins, tl.max(tl.where(ok, z, float("-inf")), axis=0))
    tl.store(row + 21 + bins, tl.max(tl.where(ok, -z, float("-inf")), axis=0))
    tl.store(row + 22 + bins, tl.max(tl.where(ok, a, float("-inf")), axis=0))
    tl.store(row + 23 + bins, tl.max(tl.where(ok, -a, float("-inf")), axis=0))
    if has_units:
        if tl.program_id(0).to(tl.int64) * block < unit_count:
            at = unit_start + mine * unit_step
            z, a, slope, ok = _read(z_ptr, a_ptr, slope_ptr, at, mine < unit_count, False, z_step, a_step, kind, b, c, d)
            unit = ((start + at * step) // inner) % size
            tl.atomic_add(block_ptr + unit, tl.where(ok, 1.0, 0.0).to(tl.float64), mask=ok)
            tl.atomic_add(block_ptr + size + unit, tl.where(ok, 1.0, 0.0).to(tl.float64), mask=ok & ((z <= low) | (z >= high)))


@triton.jit(do_not_specialize=["count"])
def _gradient(a_ptr, z_ptr, out_ptr, count, a_step, z_step, has_a: tl.constexpr, has_z: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    whole = (tl.program_id(0).to(tl.int64) + 1) * block <= count
    a = tl.zeros([block], tl.float32)
    z = tl.zeros([block], tl.float32)
    if has_a:
        a = _load(a_ptr, at * a_step, inside, whole)
    if has_z:
        z = _load(z_ptr, at * z_step, inside, whole)
    ok = inside & (a * 0 + z * 0 == 0)
    n = _count(ok)
    row = out_ptr + tl.program_id(0).to(tl.int64) * 5
    if has_a:
        tl.store(row + 0, n)
    else:
        tl.store(row + 0, 0.0)
    tl.store(row + 1, _square(tl.where(ok, a, 0.0)))
    if has_z:
        tl.store(row + 2, n)
    else:
        tl.store(row + 2, 0.0)
    tl.store(row + 3, _square(tl.where(ok, z, 0.0)))
    tl.store(row + 4, _count(inside) - n)


def observe(
    z: Tensor,
    a: Tensor,
    slope: Tensor | Formula,
    peak: float | None,
    edges: tuple[float | None, float | None],
    elements: int,
    sigmoid: bool,
    row: Tensor,
    place: tuple[int, int, int, int] | None = None,
    block: Tensor | None = None,
) -> None:
    """Merge the columns of a forward call into a row, and add samples and saturated samples of each unit to a block, if there is one."""
    count = z.shape[0]
    row[1] += elements
    if not count:
        return
    formula = slope if isinstance(slope, Formula) else Formula(GIVEN)
    start, step, inner, size = (0, 1, 1, 1) if place is None else place
    unit_step = max(1, -(-count // _UNIT_SAMPLES))
    while math.gcd(unit_step, size) != 1 or math.gcd(unit_step, inner) != 1:
        unit_step += 1
    unit_start = next(_turns) * 7919 % unit_step
    programs = triton.cdiv(count, _BLOCK)
    out = torch.empty(programs, _SUMS + _MAXES, dtype=torch.float64, device=z.device)
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
            start,
            step,
            inner,
            size,
            unit_start,
            unit_step,
            -(-(count - unit_start) // unit_step),
            kind=formula.kind,
            has_peak=peak is not None,
            has_units=block is not None,
            bins=HISTOGRAM_BINS,
            room=_ROOM,
            first_bin=FIRST_BIN,
            block=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    sums = out[:, :_SUMS].sum(0)
    if not sigmoid:
        sums[12:14] = 0
    row[:_SUMS] += sums
    torch.maximum(row[_SUMS:], out[:, _SUMS:].amax(0), out=row[_SUMS:])


def observe_gradient(grad_a: Tensor | None, grad_z: Tensor | None, count: int, row: Tensor) -> None:
    """Merge the gradient's columns into a row."""
    if not count:
        return
    programs = triton.cdiv(count, _BLOCK)
    out = torch.empty(programs, 5, dtype=torch.float64, device=row.device)
    a, z = (row if each is None else each for each in (grad_a, grad_z))
    with torch.cuda.device_of(row):
        _gradient[(programs,)](
            *(a, z, out, count, a.stride(0), z.stride(0)),
            has_a=grad_a is not None,
            has_z=grad_z is not None,
            block=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    row[14:19] += out.sum(0)
