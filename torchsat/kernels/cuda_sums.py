"""The Triton kernels for the numbers of a layer: sums of squares of its weight, and the sums of its input by feature.

`kernels/cuda.py` starts them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from torchsat.columns import FEATURES
from torchsat.kernels.cuda_elements import add, load, place, tile_of

_SAMPLES = constexpr(FEATURES.index("samples"))
_X = constexpr(FEATURES.index("x"))
_X_SQ = constexpr(FEATURES.index("x_sq"))
_SQUARE_SAMPLES = constexpr(FEATURES.index("square_samples"))
_SQUARE_X_SQ = constexpr(FEATURES.index("square_x_sq"))
_SAMPLES_READ = constexpr(FEATURES.index("samples_read"))


@triton.jit(do_not_specialize=["count"])
def squares(x_ptr, y_ptr, out_ptr, count, has_y: constexpr, threads: constexpr, neighbours: constexpr):
    """The sum of x^2 at out_ptr and, if there is a y, that of (y - x)^2 behind it. One program writes them; several add them."""
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    x_2 = tl.zeros([threads], tl.float64)
    change_2 = tl.zeros([threads], tl.float64)
    for tile in tl.range(first, tl.cdiv(count, threads * neighbours), programs):
        at = tile_of(tile, threads, neighbours)
        inside = at < count
        full = (tile + 1) * (threads * neighbours) <= count
        x = load(x_ptr, at, inside, full).to(tl.float64)
        x_2 += tl.sum(x * x, axis=1)
        if has_y:
            change = load(y_ptr, at, inside, full).to(tl.float64) - x
            change_2 += tl.sum(change * change, axis=1)
    if programs == 1:
        tl.store(out_ptr, tl.sum(x_2, axis=0))
        if has_y:
            tl.store(out_ptr + 1, tl.sum(change_2, axis=0))
    else:
        add(out_ptr, tl.sum(x_2, axis=0))
        if has_y:
            add(out_ptr + 1, tl.sum(change_2, axis=0))


@triton.jit(do_not_specialize=["count", "whole", "read", "seed", "inner", "size"])
def features(x_ptr, sums_ptr, count, whole, read, seed, inner, size, width: constexpr):
    """Add each element of a layer's input to the numbers columns.FEATURES of its feature, [6, size] at sums_ptr. It stands for whole / count."""
    mine = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    x = load(x_ptr, mine, mine < count, False)
    ok = (mine < count) & (x * 0 == 0)
    at = mine
    if read < whole:
        at = place(mine, whole, read, seed)
    to = sums_ptr + (at // inner) % size
    wide = tl.where(ok, x, 0.0).to(tl.float64)
    one = tl.where(ok, 1.0, 0.0).to(tl.float64)
    weight = whole.to(tl.float64) / count.to(tl.float64)
    tl.atomic_add(to + _SAMPLES * size, weight * one, mask=ok, sem="relaxed")
    tl.atomic_add(to + _X * size, weight * wide, mask=ok, sem="relaxed")
    tl.atomic_add(to + _X_SQ * size, weight * wide * wide, mask=ok, sem="relaxed")
    tl.atomic_add(to + _SQUARE_SAMPLES * size, weight * weight * one, mask=ok, sem="relaxed")
    tl.atomic_add(to + _SQUARE_X_SQ * size, weight * weight * wide * wide, mask=ok, sem="relaxed")
    tl.atomic_add(to + _SAMPLES_READ * size, one, mask=ok, sem="relaxed")
