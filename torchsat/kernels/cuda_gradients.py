"""The Triton kernels that add the gradients of one call to a row of statistics.py, and keep on which side of its plateaus each element lies.

`kernels/cuda.py` starts them; cuda_elements.py says how a program reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from torchsat.columns import COLUMN
from torchsat.kernels.cuda_elements import add, count_of, load, place, squares, tile_of, total

_GRAD_A_N = constexpr(COLUMN["grad_a_n"])
_GRAD_A_READ = constexpr(COLUMN["grad_a_read"])
_GRAD_A_SQ = constexpr(COLUMN["grad_a_sq"])
_GRAD_Z_N = constexpr(COLUMN["grad_z_n"])
_GRAD_Z_READ = constexpr(COLUMN["grad_z_read"])
_GRAD_Z_SQ = constexpr(COLUMN["grad_z_sq"])
_GRAD_NONFINITE = constexpr(COLUMN["grad_nonfinite"])
_DEMAND = constexpr(COLUMN["demand"])
_LEAVING = constexpr(COLUMN["leaving"])
_BLOCKED = constexpr(COLUMN["blocked"])
_TRAPPED = constexpr(COLUMN["trapped"])


@triton.jit(do_not_specialize=["count", "drawn", "seed"])
def sides(z_ptr, out_ptr, count, z_step, drawn, seed, low, high, block: constexpr):
    """The sides of `drawn` of `count` elements, at out_ptr."""
    mine = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = mine < drawn
    at = mine
    if drawn < count:
        at = place(mine, count, drawn, seed)
    z = load(z_ptr, at * z_step, inside, False)
    tl.store(out_ptr + mine, (z >= high).to(tl.int8) - (z <= low).to(tl.int8), mask=inside)


@triton.jit
def _add_demand(row, a_ptr, z_ptr, side_ptr, count, elements, a_step, z_step, drawn, seed, has_z: constexpr, width: constexpr):
    """Add the demand of `drawn` elements with a side, and the blocked and trapped parts of it. Each stands for elements / drawn of them."""
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    demand = tl.zeros([width], tl.float64)
    blocked = tl.zeros([width], tl.float64)
    trapped = tl.zeros([width], tl.float64)
    leaving = tl.zeros([width], tl.int32)
    tiles = tl.cdiv(drawn, width)
    for tile in tl.range(first, tiles, programs):
        mine = tile * width + tl.arange(0, width).to(tl.int64)
        inside = mine < drawn
        at = mine
        if drawn < count:
            at = place(mine, count, drawn, seed)
        a = load(a_ptr, at * a_step, inside, False)
        ok = inside & (a * 0 == 0)
        if has_z:
            ok = ok & (load(z_ptr, at * z_step, inside, False) * 0 == 0)
        side = tl.load(side_ptr + mine, mask=inside, other=0)
        size = tl.where(ok, tl.abs(a), 0.0).to(tl.float64)
        leaves = ok & (((side > 0) & (a > 0)) | ((side < 0) & (a < 0)))
        demand += size
        blocked += tl.where(side != 0, size, 0.0)
        trapped += tl.where(leaves, size, 0.0)
        leaving += leaves.to(tl.int32)
    if first < tiles:
        weight = elements.to(tl.float64) / drawn.to(tl.float64)
        add(row + _DEMAND, tl.sum(demand, axis=0) * weight)
        add(row + _BLOCKED, tl.sum(blocked, axis=0) * weight)
        add(row + _TRAPPED, tl.sum(trapped, axis=0) * weight)
        add(row + _LEAVING, total(leaving) * weight)


@triton.jit(do_not_specialize=["count", "elements", "drawn", "seed"])
def gradient(
    a_ptr,
    z_ptr,
    side_ptr,
    row_ptr,
    count,
    elements,
    a_step,
    z_step,
    drawn,
    seed,
    has_a: constexpr,
    has_z: constexpr,
    has_sides: constexpr,
    threads: constexpr,
    neighbours: constexpr,
):
    """Add the gradients at `count` elements, which stand for `elements`, to the row at row_ptr, and the demand of those with a side."""
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    n = tl.zeros([threads], tl.int32)
    bad = tl.zeros([threads], tl.int32)
    a_2 = tl.zeros([threads], tl.float64)
    z_2 = tl.zeros([threads], tl.float64)
    for tile in tl.range(first, tl.cdiv(count, threads * neighbours), programs):
        at = tile_of(tile, threads, neighbours)
        inside = at < count
        full = (tile + 1) * (threads * neighbours) <= count
        a = tl.zeros([threads, neighbours], tl.float32)
        z = tl.zeros([threads, neighbours], tl.float32)
        if has_a:
            a = load(a_ptr, at * a_step, inside, full)
        if has_z:
            z = load(z_ptr, at * z_step, inside, full)
        ok = inside & (a * 0 + z * 0 == 0)
        n += count_of(ok)
        bad += count_of(inside & (ok == 0))
        if has_a:
            a_2 += squares(tl.where(ok, a, 0.0))
        if has_z:
            z_2 += squares(tl.where(ok, z, 0.0))
    weight = elements.to(tl.float64) / count.to(tl.float64)
    read = total(n)
    if has_a:
        add(row_ptr + _GRAD_A_N, read * weight)
        add(row_ptr + _GRAD_A_READ, read)
        add(row_ptr + _GRAD_A_SQ, tl.sum(a_2, axis=0) * weight)
    if has_z:
        add(row_ptr + _GRAD_Z_N, read * weight)
        add(row_ptr + _GRAD_Z_READ, read)
        add(row_ptr + _GRAD_Z_SQ, tl.sum(z_2, axis=0) * weight)
    add(row_ptr + _GRAD_NONFINITE, total(bad))
    if has_sides:
        _add_demand(row_ptr, a_ptr, z_ptr, side_ptr, count, elements, a_step, z_step, drawn, seed, has_z, threads * 4)
