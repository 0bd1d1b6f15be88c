"""Counts which elements of a tensor number formats would clamp, flush to zero or make subnormal. number_formats.py says what the formats are.

Rounding is monotone, so that what a format does to an element follows from comparing its size with four limits. The size is compared as the integer
that its bits in float32 are: integers keep the order of sizes, and numbers that are subnormal in float32 are told apart on processors that take them
for 0. A float64 is rounded to float32 first, as torch's casts do. The elements of a block-scaled format are compared after the scale is applied.

Neighbours share a scale, so what is read is whole blocks of 32 neighbours along the last axis, drawn as sampling.py draws elements; at the end of an
axis that is no multiple of 32 a block is shorter. The largest element of the tensor, which nvfp4 needs, is looked for among all elements. Elements
that are inf or nan are left out, also where a scale is chosen. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from torchsat.columns import FORMATS as COLUMNS
from torchsat.number_formats import BY_NAME, FORMATS, NumberFormat
from torchsat.sampling import places
from torchsat.statistics import accumulator

BLOCK = 32
"""Neighbours that are read together: a block of mxfp8, and two of nvfp4."""
_LESS = 8
"""This many times fewer elements are read than of a site, since only shares of whole tensors are derived from them."""
_PIECE = 2**15
"""Elements that are compared at a time."""
_SIZE, _INF = 0x7FFFFFFF, 0x7F800000
"""All bits of a float32 without its sign, and those of infinity."""
_EXPONENT = 23
"""The bit of a float32 at which its exponent begins."""
_PLAIN = tuple(each for each in FORMATS if each.block == 1)
_SCALED = tuple(each for each in FORMATS if each.block > 1)


def count(tensor: Tensor, limit: int | None, seed: int) -> Tensor:
    """[columns, formats]: the numbers of columns.FORMATS of a dense tensor that has elements, for each row of number_formats.FORMATS.

    Args:
        limit: the most elements read of a site, of which an eighth is read here; None: all.
        seed: which blocks are read; see sampling.py.
    """
    shape, strides = tuple(tensor.shape) or (1,), tensor.stride() or (1,)
    whole = tensor.numel() // shape[-1] * -(-shape[-1] // BLOCK)
    wanted = whole if limit is None else min(whole, max(1, limit // _LESS // BLOCK))
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flat = tensor.as_strided((span,), (1,), tensor.storage_offset())
    # Read in the order of memory, where the elements fill it.
    largest = _largest(flat if span == tensor.numel() else tensor)
    numbers: Tensor | None = None
    for first in range(0, wanted, _PIECE // BLOCK):
        # The places of the blocks are kept where there are few of them.
        find = _index if wanted * BLOCK <= _PIECE else _index.__wrapped__
        index, inside = find(shape, strides, whole, wanted, seed, tensor.device, first)
        found = _counted(_taken(flat, index), inside, largest)
        numbers = found if numbers is None else numbers + found
    assert numbers is not None
    # Each block that is read stands for so many.
    return numbers * (1 + _weighed(tensor.device) * (whole / wanted - 1))


@functools.lru_cache(maxsize=8)
def _weighed(device: torch.device) -> Tensor:
    """[columns, 1]: 1 for a column that an element enters with the weight of its call, and 0 for any other."""
    return torch.tensor([[float(column.weighed)] for column in COLUMNS.columns], dtype=accumulator(device)).to(device)


def _largest(tensor: Tensor) -> Tensor:
    """The largest size of an element, as float32; not finite where some element is not."""
    # torch has no extremes of float8.
    low, high = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
    return torch.maximum(-low, high).float()


@functools.lru_cache(maxsize=64)
def _index(
    shape: tuple[int, ...], strides: tuple[int, ...], whole: int, wanted: int, seed: int, device: torch.device, first: int
) -> tuple[Tensor, Tensor]:
    """Where the elements of a piece of the blocks, from number `first` on, lie in memory, [blocks, BLOCK], and which of them exist. They are cached:
    the tensors of one site, and sites of one shape, are read at the same places."""
    width, end = shape[-1], min(first + _PIECE // BLOCK, wanted)
    per_row = -(-width // BLOCK)
    is_whole = wanted == whole
    block = torch.arange(first, end, device=device) if is_whole else places(whole, wanted, seed, device)[first:end].to(torch.int64)
    row, column = block.div(per_row, rounding_mode="floor"), block.remainder(per_row) * BLOCK
    at = torch.zeros_like(row)
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        at += row.remainder(size) * stride
        row = row.div(size, rounding_mode="floor")
    columns = column[:, None] + torch.arange(BLOCK, device=device)
    return at[:, None] + columns.clamp(max=width - 1) * strides[-1], columns < width


def _taken(flat: Tensor, index: Tensor) -> Tensor:
    """These elements as float32."""
    if flat.element_size() == 1:
        # torch has no index_select of float8 everywhere, but moves bytes.
        return flat.view(torch.uint8).index_select(0, index.reshape(-1)).view(flat.dtype).float().reshape(index.shape)
    taken = flat.index_select(0, index.reshape(-1)).reshape(index.shape)
    if taken.dtype == torch.float64:
        # A finite element that float32 cannot hold is beyond the range of every format, and not infinite.
        most = torch.finfo(torch.float32).max
        taken = torch.where(taken.isinf(), taken, taken.clamp(-most, most))
    return taken.float()


def _counted(x: Tensor, inside: Tensor, largest: Tensor) -> Tensor:
    """[columns, formats] of blocks x [blocks, BLOCK] of float32, each element counted once.

    Args:
        inside: which elements exist.
        largest: the largest element of the tensor that x is of.
    """
    sizes = x.view(torch.int32) & _SIZE
    valid = inside & (sizes < _INF)
    finite = torch.where(valid, sizes, 0)
    # What is left out counts as larger than anything.
    sizes = torch.where(valid, sizes, _SIZE)
    is_number = finite > 0
    most = torch.where(largest.isfinite(), largest, finite.amax().view(torch.float32))
    numbers = finite.view(torch.float32)
    scaled = torch.stack([numbers / _mx_scales(finite), numbers * _nvfp4_factors(finite, most)]).view(torch.int32) & _SIZE
    scaled = torch.where(is_number, scaled, sizes)
    tables = _tables(x.device)
    below = [
        _trues(sizes.reshape(1, -1) < tables[0]),
        _trues(scaled.reshape(len(_SCALED), 1, -1) < tables[1]).reshape(-1),
        torch.zeros(1, dtype=torch.int32, device=x.device),
    ]
    counts = torch.cat(below).to(accumulator(x.device))
    return counts[tables[2]] - counts[tables[3]]


def _trues(flags: Tensor) -> Tensor:
    """How many of these are true, along the last axis. To add bytes takes a CPU less than half of the time that it takes to add truth values."""
    return flags.view(torch.uint8).sum(-1, dtype=torch.int32)


def _mx_scales(finite: Tensor) -> Tensor:
    """The scale of each block of mxfp8, [blocks, 1]. Scales below the smallest normal float32 are raised to it, as torchao does."""
    exponent = (finite.amax(1, keepdim=True) >> _EXPONENT) - math.frexp(BY_NAME["mxfp8"].largest)[1] + 1
    return (exponent.clamp(min=1) << _EXPONENT).view(torch.float32)


def _nvfp4_factors(finite: Tensor, most: Tensor) -> Tensor:
    """What each element of a block of nvfp4 is multiplied with, [blocks, BLOCK]. `most` is the largest element of the tensor."""
    inner, scale = BY_NAME["nvfp4"], BY_NAME["fp8_e4m3"]
    halves = finite.reshape(-1, BLOCK // inner.block, inner.block).amax(2).view(torch.float32)
    whole = most / (scale.largest * inner.largest)
    whole = torch.where(whole > 0, whole, 1.0)
    bits = (halves / inner.largest / whole).clamp(scale.smallest_normal, scale.largest).view(torch.int32)
    # e4m3 keeps 3 of 23 bits: add nearly one half of what is cut off, one half where the last bit that is kept is odd, and cut off.
    cut = _EXPONENT - scale.mantissa
    rounded = (bits + ((1 << cut - 1) - 1) + ((bits >> cut) & 1)) >> cut << cut
    factors = (1.0 / whole) / rounded.view(torch.float32)
    return factors[:, :, None].expand(-1, -1, inner.block).reshape(-1, BLOCK)


def _bits(size: float) -> int:
    """The bits of a size that float32 has exactly, as an integer."""
    (found,) = struct.unpack("<i", struct.pack("<f", size))
    return int(found)


def limits(known: NumberFormat) -> tuple[int, int, int, int]:
    """The bits from which on an element is no longer flushed, no longer the smallest value, no longer subnormal, and clamped."""
    step = math.ldexp(1.0, math.frexp(known.largest)[1] - 1 - known.mantissa)
    # From the middle an element goes to the even neighbour: beyond the largest value where that is odd.
    clamped = _bits(known.largest + step / 2) + (0 if known.largest / step % 2 else 1)
    half = known.smallest / 2
    return _bits(half) + 1, _bits(3 * half), _bits(known.smallest_normal - half), clamped


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The limits of sizes [limits, 1], those of scaled sizes [formats, 4, 1], and for each column of each format, [columns, formats] each, the limit
    up to which it counts, and the one from which on. They are cached, since each copy to a GPU would wait for the GPU."""
    zero, finite = 0, 1
    plain = [1, _INF, *(limit for each in _PLAIN for limit in limits(each))]
    scaled = [list(limits(each)) for each in _SCALED]
    none = len(plain) + 4 * len(_SCALED)
    first = {each: 2 + 4 * at for at, each in enumerate((*_PLAIN, *_SCALED))}
    spans: dict[str, Callable[[int], tuple[int, int]]] = {
        "n": lambda at: (finite, none),
        "read": lambda at: (finite, none),
        "zero": lambda at: (zero, none),
        "flushed": lambda at: (at, zero),
        "smallest": lambda at: (at + 1, at),
        "subnormal": lambda at: (at + 2, at),
        "clamped": lambda at: (finite, at + 3),
    }
    table = torch.tensor([[spans[column.name](first[each]) for each in FORMATS] for column in COLUMNS.columns])
    found = torch.tensor(plain, dtype=torch.int32)[:, None], torch.tensor(scaled, dtype=torch.int32)[:, :, None], table[..., 0], table[..., 1]
    a, b, c, d = (each.to(device) for each in found)
    return a, b, c, d
