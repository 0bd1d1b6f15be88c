"""What the Triton kernels of cuda_rows.py, cuda_gradients.py, cuda_logits.py and cuda_sums.py share: how a program reads elements and adds up.

There are a few programs for each processor of the GPU. A program reads every n-th tile of the elements. A tile is [threads, neighbours]: the
elements of one line belong to one thread, so that sums over a line stay in its registers, and threads meet once, after the last tile. Sums are
float64, so that neither a mean far from 0 nor a vanishing gradient loses its digits. Each program then adds its sums to the result by atomic
additions, and one launch does it all. The order of these additions varies, and the last of the 53 bits with it.

What differs between observations is no constant of a kernel, so that no kernel is compiled again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from torchsat.sampling import MIX

# The factors of the hash of sampling.py. Of the globals of Python a kernel can read constants of this type only.
_MIX_0 = constexpr(MIX[0])
_MIX_1 = constexpr(MIX[1])


@triton.jit
def load(ptr, at, inside, whole):
    """The elements at these places, as float32. Only the last tile, which is not `whole`, needs a mask: a load with one reads element by element."""
    if whole:
        values = tl.load(ptr + at).to(tl.float32)
    else:
        values = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def place(at, elements, read, seed):
    """Where in a dense tensor of so many elements those lie that sampling.py draws as number `at` of `read`."""
    mixed = (at + seed) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    mixed = (mixed * _MIX_0) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 15)
    mixed = (mixed * _MIX_1) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    drawn = (mixed >> 8).to(tl.float64) * 5.9604644775390625e-08 + at.to(tl.float64)
    found = (drawn * (elements.to(tl.float64) / read.to(tl.float64))).to(tl.int64)
    return tl.minimum(found, elements - 1)


@triton.jit
def add(ptr, value):
    """Add to a number of which other programs add as well."""
    tl.atomic_add(ptr, value, sem="relaxed")


@triton.jit
def largest(ptr, value):
    """Raise a float64 to this value. An atomic maximum compares the bits of -0.0 as the least of all numbers, so 0.0 takes its place."""
    wide = value.to(tl.float64)
    tl.atomic_max(ptr, tl.where(wide == 0, 0.0, wide), sem="relaxed")


@triton.jit
def lines(values):
    """The sum of each line of a tile."""
    return tl.sum(values.to(tl.float64), axis=1)


@triton.jit
def squares(values):
    wide = values.to(tl.float64)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def count_of(values):
    return tl.sum(values.to(tl.int32), axis=1)


@triton.jit
def total(counts):
    return tl.sum(counts.to(tl.float64), axis=0)


@triton.jit
def tile_of(tile, threads: constexpr, neighbours: constexpr):
    """The numbers of the elements of a tile, [threads, neighbours]."""
    inner = tl.arange(0, threads)[:, None] * neighbours + tl.arange(0, neighbours)[None, :]
    return tile * (threads * neighbours) + inner.to(tl.int64)
