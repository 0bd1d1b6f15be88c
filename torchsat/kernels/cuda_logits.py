"""The Triton kernel that reads all logits of an attention, which are never in memory. `kernels/cuda.py` starts it.

A program multiplies one block of queries by all blocks of keys that they see, and keeps a few numbers of each query: the largest and the smallest
logit, and the sums that its softmax is made of, with e = exp(z - largest). Where a later block has a larger logit, the sums are made relative to that
one, as in fused attention (Milakov and Gimelshein 2018). Mean and variance of the logits are merged block by block (Chan et al. 1979), since a sum of
squares in float32 would lose the variance of logits that lie far from 0. In plain torch the same takes hundreds of launches and a temporary tensor
for each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from torchsat.columns import HEADS
from torchsat.kernels.cuda_elements import add, largest

# The rows of a block of heads. Of the globals of Python a kernel can read constants of this type only.
_ROWS = constexpr(HEADS.index("rows"))
_ENTROPY = constexpr(HEADS.index("entropy"))
_JACOBIAN = constexpr(HEADS.index("jacobian"))
_LOGIT_VARIANCE = constexpr(HEADS.index("logit_variance"))
_LOG_KEYS = constexpr(HEADS.index("log_keys"))
_FIRST_KEY = constexpr(HEADS.index("first_key"))
_LOG_Z = constexpr(HEADS.index("log_z"))
_LOG_Z_SQ = constexpr(HEADS.index("log_z_sq"))
_LOGIT_MAX = constexpr(HEADS.index("logit_max"))


@triton.jit
def _kept(counts, values):
    """The sum over the queries that count, in float64."""
    return tl.sum(tl.where(counts, values, 0.0).to(tl.float64), axis=0)


@triton.jit
def _weigh(z, good, top, total, weighted, square):
    """The largest logit of each query, and its sums of e, of e (z - largest) and of e^2, with those of one block more."""
    higher = tl.maximum(top, tl.max(tl.where(good, z, float("-inf")), axis=1))
    # 0 where there is no logit yet: minus infinity less minus infinity is nan.
    raised = tl.where(top == float("-inf"), 0.0, top - higher)
    below = tl.where(good, z - tl.where(higher == float("-inf"), 0.0, higher)[:, None], 0.0)
    e = tl.where(good, tl.exp(below), 0.0)
    smaller = tl.exp(raised)
    weighted = smaller * (weighted + raised * total) + tl.sum(e * below, axis=1)
    total = smaller * total + tl.sum(e, axis=1)
    square = smaller * smaller * square + tl.sum(e * e, axis=1)
    return higher, total, weighted, square


@triton.jit
def _spread(z, good, met, mean, deviation):
    """How many logits of each query there are, their mean, and the sum of squares around it, with those of one block more."""
    more = tl.sum(good.to(tl.float32), axis=1)
    all_met = tl.maximum(met + more, 1.0)
    mean_of_more = tl.sum(z, axis=1) / tl.maximum(more, 1.0)
    apart = tl.where(good, z - mean_of_more[:, None], 0.0)
    between = mean_of_more - mean
    deviation += tl.sum(apart * apart, axis=1) + between * between * (met * more / all_met)
    return met + more, mean + between * (more / all_met), deviation


@triton.jit
def _product(q, k_from, column, feature, keys, features, k_row, k_feature):
    """The products of a block of queries and the keys of these columns."""
    k_at = k_from + column.to(tl.int64)[None, :] * k_row + feature[:, None] * k_feature
    k = tl.load(k_at, mask=(column[None, :] < keys) & (feature[:, None] < features), other=0.0)
    return tl.dot(q, k, input_precision="ieee")


@triton.jit
def _add_exact(exact_ptr, counts, broken, sees, top, bottom):
    """Merge the extremes of the queries that count, and the keys of those that are broken, into statistics.EXACT."""
    add(exact_ptr, tl.sum(tl.where(broken, sees, 0).to(tl.float64), axis=0))
    largest(exact_ptr + 1, tl.max(tl.where(counts, top, float("-inf")), axis=0))
    largest(exact_ptr + 2, -tl.min(tl.where(counts, bottom, float("inf")), axis=0))


@triton.jit
def _add_head(at, heads, counts, sees, top, total, weighted, square, met, deviation, first):
    """Add the queries that count to the numbers of their head, which lie `heads` apart from `at` on."""
    some, log_keys = tl.maximum(total, 1.0), tl.log(tl.maximum(sees, 2).to(tl.float32))
    log_z = tl.log(some) + top
    add(at + _ROWS * heads, tl.sum(counts.to(tl.float64), axis=0))
    add(at + _ENTROPY * heads, _kept(counts, (tl.log(some) - weighted / some) / log_keys))
    add(at + _JACOBIAN * heads, _kept(counts, 1.0 - square / (some * some)))
    add(at + _LOGIT_VARIANCE * heads, _kept(counts, deviation / tl.maximum(met, 1.0)))
    add(at + _LOG_KEYS * heads, _kept(counts, log_keys))
    add(at + _FIRST_KEY * heads, _kept(counts, tl.exp(first - tl.where(counts, top, first)) / some))
    add(at + _LOG_Z * heads, _kept(counts, log_z))
    add(at + _LOG_Z_SQ * heads, _kept(counts, log_z * log_z))
    largest(at + _LOGIT_MAX * heads, tl.max(tl.where(counts, top, float("-inf")), axis=0))


@triton.jit(do_not_specialize=["heads", "group", "queries", "keys"])
def scan_logits(
    q_ptr,
    k_ptr,
    exact_ptr,
    heads_ptr,
    factor,
    heads,
    group,
    queries,
    keys,
    features,
    q_batch,
    q_head,
    q_row,
    q_feature,
    k_batch,
    k_head,
    k_row,
    k_feature,
    is_causal: constexpr,
    block_queries: constexpr,
    block_keys: constexpr,
    block_features: constexpr,
):
    """Merge softmax.scan_softmax of the logits factor q k^T into the numbers at exact_ptr and heads_ptr.

    Under a causal mask query i sees the keys up to i. Each `group` of heads shares its keys. The programs lie on one axis,
    since the others end at 65535; neighbours read the same keys.
    """
    blocks = tl.cdiv(queries, block_queries)
    block, pair = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    sample, head = pair // heads, pair % heads
    row = block * block_queries + tl.arange(0, block_queries)
    feature = tl.arange(0, block_features)
    q_at = q_ptr + sample * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_row + feature[None, :] * q_feature
    q = tl.load(q_at, mask=(row[:, None] < queries) & (feature[None, :] < features), other=0.0)
    k_from = k_ptr + sample * k_batch + (head // group) * k_head
    top = tl.full([block_queries], float("-inf"), tl.float32)
    bottom = tl.full([block_queries], float("inf"), tl.float32)
    bad = tl.zeros([block_queries], tl.int32)
    zero = tl.zeros([block_queries], tl.float32)
    total, weighted, square, first = zero, zero, zero, zero
    met, mean, deviation = zero, zero, zero
    end = tl.minimum(keys, (block + 1) * block_queries) if is_causal else keys
    for begin in tl.range(0, end, block_keys):
        column = begin + tl.arange(0, block_keys)
        z = _product(q, k_from, column, feature, keys, features, k_row, k_feature) * factor
        seen = (column[None, :] < keys) & (row[:, None] < queries)
        if is_causal:
            seen = seen & (column[None, :] <= row[:, None])
        good = seen & (z * 0 == 0)
        bad += tl.sum((seen & (good == 0)).to(tl.int32), axis=1)
        z = tl.where(good, z, 0.0)
        bottom = tl.minimum(bottom, tl.min(tl.where(good, z, float("inf")), axis=1))
        top, total, weighted, square = _weigh(z, good, top, total, weighted, square)
        met, mean, deviation = _spread(z, good, met, mean, deviation)
        # Every query sees the first key.
        first += tl.sum(tl.where(column[None, :] == 0, z, 0.0), axis=1)
    sees = tl.zeros([block_queries], tl.int32) + keys
    if is_causal:
        sees = tl.minimum(row + 1, keys)
    counts = (row < queries) & (bad == 0) & (sees > 1)
    _add_exact(exact_ptr, counts, (row < queries) & (bad > 0), sees, top, bottom)
    _add_head(heads_ptr + head, heads, counts, sees, top, total, weighted, square, met, deviation, first)
