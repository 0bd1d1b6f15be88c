"""The rows of statistics.py on NVIDIA GPUs: starts the Triton kernels.

Those of cuda_rows.py, cuda_gradients.py, cuda_sums.py and cuda_logits.py are one for each function here.

Triton comes with the CUDA builds of torch. The kernels are used on a device as soon as trust.trust_kernels has found that they compute the right
numbers there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from torchsat.columns import COLUMN, HEADS
from torchsat.kernels import cuda_gradients, cuda_logits, cuda_rows, cuda_sums
from torchsat.kernels.formulas import BETWEEN, GELU, GELU_ERF, GIVEN, LOGISTIC, SILU, Formula

KINDS = frozenset((GIVEN, LOGISTIC, BETWEEN, SILU, GELU, GELU_ERF))
"""The kinds of derivatives that the kernel computes from z; GIVEN is read."""
WARPS = 4
THREADS = 32 * WARPS
"""How many threads a program has."""
BLOCK_QUERIES, BLOCK_KEYS = 64, 64
_MOST_FEATURES = 256
"""A head of more features does not fit into the memory that a program has for its queries and keys."""
_BYTES = 16
"""A thread reads so many neighbouring bytes at once."""
_PER_PROCESSOR = 8
"""At most so many programs for each processor. About as many run on one at a time."""
_UNIT_SAMPLES = 65536
"""At most this many elements of a call are counted by unit."""
_ALONE = 65536
"""One program reads a vector of so many elements, and several read a longer one."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_trusted: set[int] = set()
"""The devices on which the kernels compute the right numbers."""


@dataclass(frozen=True)
class _Tile:
    """How many elements a program reads at a time, as [threads, neighbours]."""

    threads: int
    neighbours: int

    @staticmethod
    def of(vector: Tensor) -> _Tile:
        """The tile for the elements of this vector. Triton's interpreter, which runs on the CPU, is given larger ones: each costs it some time."""
        return _Tile(THREADS, _BYTES // vector.element_size()) if vector.is_cuda else _Tile(2048, 8)

    def programs(self, vector: Tensor) -> int:
        """How many programs read the vector."""
        most = _PER_PROCESSOR * _processors(vector.device) if vector.is_cuda else 3
        return int(min(triton.cdiv(vector.shape[0], self.threads * self.neighbours), most))


@functools.lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def reads(*tensors: Tensor | None) -> bool:
    """Whether the kernels can read these vectors, and are trusted on their device."""
    return all(each is None or (each.is_cuda and each.device.index in _trusted and each.dtype in _DTYPES) for each in tensors)


def trust(device: torch.device) -> None:
    """Use the kernels on this device from now on."""
    _trusted.add(torch.cuda.current_device() if device.index is None else device.index)


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
    if not count:
        row[COLUMN["elements"]] += elements
        return
    formula = slope if isinstance(slope, Formula) else Formula(GIVEN)
    tile = _Tile.of(z)
    with torch.cuda.device_of(z):
        cuda_rows.observe[(tile.programs(z),)](
            z.contiguous(),
            a.contiguous(),
            z if isinstance(slope, Formula) else slope.contiguous(),
            row,
            row if block is None else block,
            row if exact is None else exact,
            count,
            *_edges(edges),
            1.0 if peak is None else peak,
            formula.b,
            formula.c,
            formula.d,
            *((count, count, 0, 1, 1) if place is None else place),
            min(count, _UNIT_SAMPLES),
            elements,
            kind=formula.kind,
            sigmoid=sigmoid,
            has_peak=peak is not None,
            has_units=block is not None,
            has_exact=exact is not None,
            threads=tile.threads,
            neighbours=tile.neighbours,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def extremes(z: Tensor, a: Tensor | None) -> Tensor:
    """statistics.EXACT of two vectors of neighbouring elements. Without a, its columns are not defined."""
    out, tile = _nothing(5, z.device), _Tile.of(z)
    if len(z):
        with torch.cuda.device_of(z):
            cuda_rows.extremes[(tile.programs(z),)](
                *(z, z if a is None else a, out, len(z)), threads=tile.threads, neighbours=tile.neighbours, num_warps=WARPS
            )
    return out


def sides(z: Tensor, edges: tuple[float | None, float | None], count: int, seed: int) -> Tensor:
    """statistics.Sides.values of `count` elements of a vector, which are drawn with a seed unless they are all."""
    out = torch.empty(count, dtype=torch.int8, device=z.device)
    block = 4 * _Tile.of(z).threads
    if count:
        with torch.cuda.device_of(z):
            cuda_gradients.sides[(triton.cdiv(count, block),)](
                *(z, out, z.shape[0], z.stride(0), count, seed, *_edges(edges)), block=block, num_warps=WARPS
            )
    return out


def observe_gradient(
    grad_a: Tensor | None, grad_z: Tensor | None, count: int, elements: int, row: Tensor, sides: Tensor | None = None, seed: int = 0
) -> None:
    """Merge a backward call of so many elements into a row. `count` is the length of the gradients, of which one may be missing. `sides` and `seed`
    are statistics.Sides."""
    if not count:
        return
    a, z = (row if each is None else each for each in (grad_a, grad_z))
    read = a if grad_a is not None else z
    tile = _Tile.of(read)
    with torch.cuda.device_of(row):
        cuda_gradients.gradient[(tile.programs(read),)](
            *(a, z, row if sides is None else sides, row, count, elements, a.stride(0), z.stride(0)),
            *(0 if sides is None else sides.shape[0], seed),
            has_a=grad_a is not None,
            has_z=grad_z is not None,
            has_sides=sides is not None and grad_a is not None,
            threads=tile.threads,
            neighbours=tile.neighbours,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def multiplies(q: Tensor, k: Tensor) -> bool:
    """Whether `scan_logits` can read these queries and keys."""
    return reads(q, k) and q.dtype == k.dtype and q.shape[-1] <= _MOST_FEATURES and 0 not in q.shape and 0 not in k.shape


def scan_logits(q: Tensor, k: Tensor, factor: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """softmax.scan_softmax of the logits factor q k^T, which have no mask but the causal one.

    Args:
        q: [batch, heads, queries, features], in any layout.
        k: [batch, groups, keys, features]; each group belongs to as many neighbouring heads.
    """
    batch, heads, queries, features = q.shape
    exact, block = _nothing(5, q.device), torch.zeros(len(HEADS), heads, dtype=torch.float64, device=q.device)
    block[-1] = -math.inf
    with torch.cuda.device_of(q):
        cuda_logits.scan_logits[(triton.cdiv(queries, BLOCK_QUERIES) * batch * heads,)](
            *(q, k, exact, block, factor, heads, heads // k.shape[1], queries, k.shape[2], features, *q.stride(), *k.stride()),
            is_causal=is_causal,
            block_queries=BLOCK_QUERIES,
            block_keys=BLOCK_KEYS,
            block_features=max(16, triton.next_power_of_2(features)),
            num_warps=WARPS,
        )
    return exact, block


def squares(x: Tensor, y: Tensor | None, out: Tensor, at: int) -> None:
    """statistics.put_squares."""
    x, y = x.contiguous(), None if y is None else y.contiguous()
    sums, tile = out[at : at + (1 if y is None else 2)], _Tile.of(x)
    programs = 1 if len(x) <= _ALONE else tile.programs(x)
    if programs > 1:
        sums.zero_()
    with torch.cuda.device_of(x):
        cuda_sums.squares[(programs,)](
            *(x, x if y is None else y, sums, len(x)), has_y=y is not None, threads=tile.threads, neighbours=tile.neighbours, num_warps=WARPS
        )


def add_features(x: Tensor, place: tuple[int, int, int, int, int], sums: Tensor) -> None:
    """Add the elements x of a layer's input to columns.FEATURES. `place` is that of the units."""
    block = 4 * _Tile.of(x).threads
    if len(x):
        with torch.cuda.device_of(x):
            cuda_sums.features[(triton.cdiv(len(x), block),)](*(x.contiguous(), sums, len(x), *place), width=block, num_warps=WARPS)


def _edges(edges: tuple[float | None, float | None]) -> tuple[float, float]:
    low, high = edges
    return -math.inf if low is None else low, math.inf if high is None else high


def _nothing(size: int, device: torch.device) -> Tensor:
    """statistics.EXACT of no element: a count and extremes."""
    out = torch.full((size,), -math.inf, dtype=torch.float64, device=device)
    out[:1].zero_()
    return out
