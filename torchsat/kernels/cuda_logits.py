"""The Triton kernel that finds the largest logits of an attention, whose logits are never in memory. `kernels/cuda.py` starts it.

A program multiplies one block of queries by all blocks of keys that they see, and keeps of each query the largest and the smallest logit alone.
In plain torch the same takes hundreds of launches and a temporary tensor for each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from torchsat.kernels.cuda_elements import add, largest


@triton.jit(do_not_specialize=["heads", "group", "queries", "keys"])
def logit_extremes(
    q_ptr,
    k_ptr,
    exact_ptr,
    tops_ptr,
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
    """Merge softmax.softmax_extremes of the logits factor q k^T into the numbers at exact_ptr and tops_ptr.

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
    end = keys
    if is_causal:
        end = tl.minimum(keys, (block + 1) * block_queries)
    for begin in tl.range(0, end, block_keys):
        column = begin + tl.arange(0, block_keys)
        k_at = k_from + column.to(tl.int64)[None, :] * k_row + feature[:, None] * k_feature
        k = tl.load(k_at, mask=(column[None, :] < keys) & (feature[:, None] < features), other=0.0)
        z = tl.dot(q, k, input_precision="ieee") * factor
        seen = (column[None, :] < keys) & (row[:, None] < queries)
        if is_causal:
            seen = seen & (column[None, :] <= row[:, None])
        broken = seen & (z * 0 != 0)
        bad += tl.sum(broken.to(tl.int32), axis=1)
        top = tl.maximum(top, tl.max(tl.where(seen & (broken == 0), z, float("-inf")), axis=1))
        bottom = tl.minimum(bottom, tl.min(tl.where(seen & (broken == 0), z, float("inf")), axis=1))
    sees = tl.zeros([block_queries], tl.int32) + keys
    if is_causal:
        sees = tl.minimum(row + 1, keys)
    counts = (row < queries) & (bad == 0) & (sees > 1)
    most = tl.max(tl.where(counts, top, float("-inf")), axis=0)
    add(exact_ptr, tl.sum(tl.where((row < queries) & (bad > 0), sees, 0).to(tl.float64), axis=0))
    largest(exact_ptr + 1, most)
    largest(exact_ptr + 2, -tl.min(tl.where(counts, bottom, float("inf")), axis=0))
    largest(tops_ptr + head, most)
