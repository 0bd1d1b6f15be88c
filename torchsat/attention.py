"""Computes the logits of attention again from the arguments of the call, since fused kernels never write them to memory. Pure functions.

Most numbers come from some query rows only, so that the T x T matrix of a long context never exists: some samples of the batch, and in each of them
positions of its own, both drawn as sampling.py draws elements; they are the same for all heads. The largest logits, however, sit in few rows, those
of an outlier token for instance, and a sample misses them. They are found among all rows (`scan`), some at a time, and with them the sums that the
entropy is made of, in memory that does not grow with the number of queries.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchsat.attention_masks import seen_in, seen_under
from torchsat.kernels import on_gpu
from torchsat.replay import NotRebuiltError
from torchsat.sampling import places
from torchsat.softmax import merge_scans, scan_softmax
from torchsat.statistics import upcast

_LEAST_ROWS = 8
"""At least this many query rows of each head are read, however many keys they have."""
_PIECE = 2**20
"""About so many logits exist at a time on a CPU while all rows are read."""
_PIECE_ELSEWHERE = 2**22
"""The same on other devices, where each piece costs some 50 launches. Its logits and the tensors made of them take about 100 MB."""

_PROJECTED = 2**24
"""About so many numbers of queries and keys are projected anew at a time: 64 MB of float32."""


@dataclass(frozen=True)
class Logits:
    """The logits of some query rows of an attention."""

    z: Tensor
    """[batch, heads, queries, keys], with what float masks add."""
    visible: Tensor
    """Booleans that broadcast to z: which keys a query sees."""
    elements: int
    """How many logits the whole attention has."""


@dataclass(frozen=True)
class Queries:
    """Which query rows are read: some samples of the batch, and in each of them some positions. Either are indices, or a slice of neighbours."""

    shape: tuple[int, ...]
    """Of all logits: [batch, heads, queries, keys]."""
    batch: Tensor | slice
    """[samples]."""
    positions: Tensor | slice
    """[samples, positions]: each sample has its own."""

    @staticmethod
    def of(shape: tuple[int, ...], limit: int | None, seed: int, device: torch.device) -> Queries:
        """The query rows of logits of this shape, [batch, heads, queries, keys].

        Args:
            limit: the rows have about this many logits over all heads, but every head has at least 8 rows; None: all rows.
            seed: which rows are read; see sampling.py.
        """
        batch, heads, queries, keys = shape
        rows = batch * queries if limit is None else max(_LEAST_ROWS, limit // max(1, heads * keys))
        # What a query sees depends on its position, above all under a causal mask. So positions are chosen first, then as many samples as fit.
        positions = min(queries, max(_LEAST_ROWS, math.isqrt(rows), -(-rows // max(1, batch))))
        samples = min(batch, max(1, rows // max(1, positions)))
        if samples == batch and positions == queries:
            return Queries(shape, slice(0, batch), slice(0, queries))
        chosen = places(batch, samples, seed, device).long() if samples < batch else torch.arange(batch, device=device)
        if positions == queries:
            return Queries(shape, chosen, slice(0, queries))
        return Queries(shape, chosen, places(queries, positions, seed + 1, device, samples).long().view(samples, positions))

    @property
    def has_all_samples(self) -> bool:
        """Whether some rows of every sample are read."""
        return isinstance(self.batch, slice) or len(self.batch) == self.shape[0]

    def of_samples(self, tensor: Tensor) -> Tensor:
        """These samples of a tensor [batch or 1, ...]."""
        if isinstance(self.batch, slice):
            return tensor if tensor.shape[0] == 1 else tensor[self.batch]
        return tensor.expand(self.shape[0], *tensor.shape[1:]).index_select(0, self.batch)

    def pick(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor [batch or 1, heads, queries or 1, any]."""
        if isinstance(self.positions, slice):
            return self.of_samples(tensor if tensor.shape[2] == 1 else tensor[:, :, self.positions])
        assert isinstance(self.batch, Tensor)
        return tensor.expand(self.shape[0], -1, self.shape[2], -1)[self.batch.unsqueeze(1), :, self.positions].permute(0, 2, 1, 3)

    def of_steps(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor [queries, batch, any], as [samples, positions, any]."""
        if isinstance(self.positions, slice):
            return self.of_samples(tensor[self.positions].transpose(0, 1))
        assert isinstance(self.batch, Tensor)
        return tensor[self.positions, self.batch.unsqueeze(1)]

    def causal(self, device: torch.device) -> Tensor:
        """Which keys these rows see under a causal mask, [samples or 1, 1, positions, keys]."""
        at = torch.arange(self.shape[2], device=device)[self.positions] if isinstance(self.positions, slice) else self.positions
        return torch.arange(self.shape[3], device=device) <= at.reshape(-1, 1, at.shape[-1], 1)

    def pieces(self, device: torch.device) -> Iterator[Queries]:
        """All rows of these samples, some neighbours at a time: whole samples if they are short, and otherwise some positions of one.

        Args:
            device: where the logits are computed, which says how many at a time.
        """
        batch, heads, queries, keys = self.shape
        first, end, _ = self.batch.indices(batch) if isinstance(self.batch, slice) else (0, batch, 1)
        rows = max(1, _piece(device) // max(1, heads * keys))
        samples = max(1, rows // max(1, queries))
        for sample in range(first, end, samples):
            for position in range(0, queries, queries if samples > 1 else min(rows, queries)):
                after = queries if samples > 1 else min(position + rows, queries)
                yield Queries(self.shape, slice(sample, min(sample + samples, end)), slice(position, after))


@dataclass(frozen=True)
class SoftmaxRows:
    """Which rows of a softmax over one axis are read.

    A softmax over the last of four axes is taken for an attention [batch, heads, queries, keys]. Any other one counts as one head.
    """

    shape: tuple[int, ...]
    axis: int
    has_heads: bool
    queries: Queries

    @staticmethod
    def of(z: Tensor, axis: int, limit: int | None, seed: int, has_heads: bool = True) -> SoftmaxRows:
        """The rows of a softmax of z over this axis; `has_heads` is False where z is known to be no attention."""
        shape = tuple(z.shape)
        heads = shape if has_heads and z.ndim == 4 and axis == 3 else (1, 1, z.numel() // max(1, shape[axis]), shape[axis])
        return SoftmaxRows(shape, axis, heads[1] > 1, Queries.of(heads, limit, seed, z.device))

    @property
    def elements(self) -> int:
        """How many elements the whole softmax has."""
        return math.prod(self.shape)

    def rows(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor of the same shape, as [batch, heads, queries, keys]."""
        return self.queries.pick(self._four(tensor))

    def take(self, tensor: Tensor) -> Tensor:
        """The elements of these rows, as a vector."""
        return self.rows(tensor).reshape(-1)

    def logits(self, z: Tensor) -> Logits:
        """The logits of these rows. Keys are masked where z, which is the sum of logit and mask, says so."""
        taken = upcast(self.rows(z))
        return Logits(taken, seen_in(taken), self.elements)

    def scan(self, z: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
        """What softmax.scan_softmax finds in all rows of the softmax a of z; None: torch never computes a."""
        found = []
        for logits, weights in self._pieces(z, z if a is None else a):
            wide = upcast(logits)
            found.append(scan_softmax(wide, seen_in(wide), None if a is None else weights))
        return merge_scans(found)

    def _pieces(self, z: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of z and a that are not too large, each as [batch, heads, queries, keys]."""
        # An axis of heads is not cut, so that each part has all heads.
        axes = (0, 2) if self.has_heads else tuple(each for each in range(len(self.shape)) if each != self.axis)
        waiting = [(z, a)]
        while waiting:
            z, a = waiting.pop()
            axis = max(axes, key=lambda each: z.shape[each], default=None)
            if z.numel() <= _piece(z.device) or axis is None or z.shape[axis] < 2:
                yield self._four(z), self._four(a)
                continue
            half = z.shape[axis] // 2
            for first, length in ((0, half), (half, z.shape[axis] - half)):
                waiting.append((z.narrow(axis, first, length), a.narrow(axis, first, length)))

    def _four(self, tensor: Tensor) -> Tensor:
        return tensor if self.has_heads else tensor.movedim(self.axis, -1).reshape(1, 1, -1, self.shape[self.axis])


@dataclass(frozen=True)
class Values:
    """The values V of an attention, where O = p V is what its kernel returns for the probabilities p. Then dL/dp = dL/dO V^T."""

    source: Tensor
    """The argument of the call that they come from: the values themselves, or what is projected to them."""
    weights: tuple[Tensor, ...]
    """The weights of that projection."""
    arrange: Callable[[Tensor], Tensor]
    """A view of the source as [batch or 1, ...]."""
    project: Callable[[Tensor], Tensor]
    """The values of some samples, [samples, groups, keys, features], from these samples of that view."""


@dataclass(frozen=True)
class Attention:
    """A call of attention, from which the logits of any query rows can be computed."""

    shape: tuple[int, ...]
    """Of the logits: [batch, heads, queries, keys]."""
    device: torch.device
    query: Callable[[Queries], Tensor]
    """The queries of these rows, scaled, [samples, heads, positions, features], in the precision in which logits are computed."""
    key: Callable[[Queries], Tensor]
    """The keys of these samples, [samples, groups, keys, features]. Each group of keys belongs to as many heads."""
    added: Callable[[Queries], Tensor | None]
    """The mask of these rows, boolean (true: visible) or added to the logits, [samples or 1, heads or 1, positions, keys]."""
    is_causal: bool
    has_mask: bool
    """Whether there is a mask besides the causal one. Without it every query sees a key."""
    values: Values
    dropout: float
    """The probability with which an element of p is dropped before it is multiplied by the values."""
    width: int = 1
    """The features of all heads together."""
    factors: tuple[Tensor, Tensor, float] | None = None
    """Queries, keys and the number by which their products are multiplied, where they are the arguments of the call."""

    @staticmethod
    def of(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attention:
        """A call of `F.scaled_dot_product_attention` or `F.multi_head_attention_forward`, whichever `call` is.

        Raises:
            NotRebuiltError: the mask is no plain tensor.
        """
        if call is F.multi_head_attention_forward:
            return _multi_head(inspect.signature(call).bind(*args, **kwargs).arguments)
        return _scaled_dot_product(*args, **kwargs)

    def rows(self, limit: int | None, seed: int) -> Queries:
        """The rows that are read; `limit` and `seed` are those of `Queries.of`."""
        return Queries.of(self.shape, limit, seed, self.device)

    def logits(self, rows: Queries) -> Logits:
        """The logits of these rows."""
        return self._logits(rows, self.query(rows), self.key(rows))

    def scan(self, output: Any) -> tuple[Tensor, Tensor]:
        """What softmax.scan_softmax finds in all rows. Its columns of a are those of no element, since torch never computes a.

        Args:
            output: what the call returned.
        """
        found = []
        if self.has_mask and isinstance(output, tuple):
            # F.multi_head_attention_forward returns [queries, batch, features], or [queries, features]: one output for all heads.
            rows = output[0].detach() if output[0].ndim == 3 else output[0].detach().unsqueeze(1)
            output = rows.transpose(0, 1).unsqueeze(1)
        elif not self.has_mask and (at_once := self._scan_at_once()) is not None:
            return at_once
        broken = ~torch.isfinite(_four(output.detach())).all(-1, keepdim=True) if self.has_mask else None
        batch, heads, queries, keys = self.shape
        samples = max(1, _piece(self.device) // max(1, heads * queries * keys))
        for first in range(0, batch, samples):
            # Keys and queries of some samples are computed once, and their logits piece by piece.
            whole = Queries(self.shape, slice(first, min(first + samples, batch)), slice(0, queries))
            query, key = self.query(whole), self.key(whole).contiguous()
            # Each piece is written over the one before, since an allocator need not give its memory to the next. The first is as large as any.
            room: Tensor | None = None
            for piece in whole.pieces(self.device):
                # The keys behind the last query of a piece are seen by none of its queries.
                at = piece.positions
                last = at.stop if isinstance(at, slice) and self.is_causal and not self.has_mask else keys
                room = query.new_empty(math.prod(query[:, :, at].shape[:3]) * keys) if room is None else room
                logits = self._logits(piece, query[:, :, at], key[:, :, :last], room)
                found.append(scan_softmax(logits.z, logits.visible, None, None if broken is None else piece.pick(broken)))
        return merge_scans(found)

    def _scan_at_once(self) -> tuple[Tensor, Tensor] | None:
        """`scan` by a kernel that multiplies queries by keys itself; None where there is none."""
        if self.device.type == "cpu":
            return None
        batch, _, queries, keys = self.shape
        # What is projected anew takes memory, so that it is done for some samples at a time.
        samples = batch if self.factors is not None else max(1, _PROJECTED // max(1, self.width * (queries + keys)))
        found = []
        for first in range(0, batch, samples):
            some = Queries(self.shape, slice(first, min(first + samples, batch)), slice(0, queries))
            q, k, factor = (self.query(some), self.key(some), 1.0) if self.factors is None else self.factors
            kernels = on_gpu(q, k)
            if kernels is None or not kernels.multiplies(q, k):
                return None
            found.append(kernels.scan_logits(q, k, factor, self.is_causal))
        return merge_scans(found)

    def _logits(self, rows: Queries, query: Tensor, key: Tensor, room: Tensor | None = None) -> Logits:
        """The logits of these queries and keys, which are written to `room` if it is given."""
        (samples, heads, positions, _), (groups, keys) = query.shape, key.shape[1:3]
        # With grouped queries, head h reads the keys of group h // (heads per group).
        query, key = query.reshape(samples * groups, heads // groups * positions, -1), key.flatten(0, 1)
        out = None if room is None else room[: samples * heads * positions * keys].view(samples * groups, -1, keys)
        with torch.autocast(query.device.type, enabled=False):
            z = torch.bmm(query, key.transpose(1, 2), out=out).view(samples, heads, positions, keys)
        return _masked(z, self.added(rows), rows.causal(z.device)[..., :keys] if self.is_causal else None, math.prod(self.shape))


def _piece(device: torch.device) -> int:
    return _PIECE if device.type == "cpu" else _PIECE_ELSEWHERE


def _scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    if attn_mask is not None and type(attn_mask) is not Tensor:
        raise NotRebuiltError(f"its mask is a {type(attn_mask).__name__}")
    q, k = (_four(each.detach()) for each in (query, key))
    # Query and key may each be broadcast to a common batch, and to common heads unless queries are grouped.
    batch, heads = max(q.shape[0], k.shape[0]), q.shape[1] if enable_gqa else max(q.shape[1], k.shape[1])
    q, k = q.expand(batch, heads, -1, -1), k.expand(batch, k.shape[1] if enable_gqa else heads, -1, -1)
    length, size = q.shape[2], k.shape[2]
    lead: torch.Size = torch.broadcast_shapes(query.shape[:-2], query.shape[:-2] if enable_gqa else key.shape[:-2])
    factor, mask = q.shape[-1] ** -0.5 if scale is None else scale, None if attn_mask is None else attn_mask.detach()
    if mask is not None and len(lead) == 2:
        # What is broadcast over samples or heads stays so, since finding what a mask hides costs time.
        mask = mask[(None,) * (4 - mask.ndim)].expand(-1, -1, length, size)
    elif mask is not None:
        mask = _four(mask.expand(*lead, length, size))
    return Attention(
        (batch, heads, length, size),
        q.device,
        lambda rows: upcast(rows.pick(q)) * factor,
        lambda rows: upcast(rows.of_samples(k)),
        lambda rows: None if mask is None else rows.pick(mask),
        is_causal,
        mask is not None,
        Values(value, (), _four, upcast),
        dropout_p,
        heads * q.shape[-1],
        (q, k, factor),
    )


def _multi_head(given: dict[str, Any]) -> Attention:
    """A call of F.multi_head_attention_forward with these arguments, by name."""
    query, heads, keys, values = given["query"].detach(), given["num_heads"], _Projection.of(given, 1), _Projection.of(given, 2)
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if query.ndim == 2:
        query = query.unsqueeze(1)
        padding = None if padding is None else padding.unsqueeze(0)
    length, batch, _ = query.shape
    key = keys.arrange(keys.source(given).detach())
    # As in torch: only under these conditions does is_causal replace the mask that is given.
    hint = given.get("is_causal", False) and padding is None and not given.get("need_weights", True)
    added_keys = (given.get("bias_k") is not None) + bool(given.get("add_zero_attn"))
    size = key.shape[-2] + added_keys
    full = None
    if mask is not None and not hint:
        mask = mask.detach()
        full = mask[None, None] if mask.ndim == 2 else mask.reshape(batch, heads, *mask.shape[1:])

    def added(rows: Queries) -> Tensor | None:
        additions = [] if full is None else [rows.pick(full)]
        additions += [] if padding is None else [rows.of_samples(padding.detach()[:, None, None, :])]
        whole = None
        for each in additions:
            # In this function a true boolean hides a key. The keys that it adds itself are never hidden.
            each = torch.zeros_like(each, dtype=torch.float32).masked_fill(each, -math.inf) if each.dtype == torch.bool else upcast(each)
            each = F.pad(each, (0, added_keys))
            whole = each if whole is None else whole + each
        return whole

    def projected_query(rows: Queries) -> Tensor:
        q = F.linear(rows.of_steps(query), *_weight_and_bias(given, 0))
        q = upcast(q.reshape(*q.shape[:2], heads, -1).transpose(1, 2))
        scaled: Tensor = q * q.shape[-1] ** -0.5
        return scaled

    return Attention(
        (batch, heads, length, size),
        query.device,
        projected_query,
        lambda rows: keys.project(rows.of_samples(key)),
        added,
        bool(hint),
        full is not None or padding is not None,
        Values(values.source(given), values.tensors, values.arrange, _in_present_precision(values.project, query.device.type)),
        given["dropout_p"] if given.get("training", True) else 0.0,
        int(given["embed_dim_to_check"]),
    )


@dataclass(frozen=True)
class _Projection:
    """How F.multi_head_attention_forward computes the keys or the values of some samples from one of its arguments."""

    names: tuple[str, str]
    """The names of that argument, and of the one that takes its place as what is projected already."""
    heads: int
    weight: Tensor | None
    """None where the argument is projected already."""
    bias: Tensor | None
    last: Tensor | None
    """What is added to all samples as one key more."""
    adds_zero: bool
    """Whether zeros are added as one key more."""

    @staticmethod
    def of(given: dict[str, Any], which: int) -> _Projection:
        """The projection to keys (1) or values (2) of a call with these arguments, by name."""
        names, letter = (("key", "static_k"), ("value", "static_v"))[which - 1], "qkv"[which]
        weight, bias = (None, None) if given.get(names[1]) is not None else _weight_and_bias(given, which)
        last = None if weight is None else given.get(f"bias_{letter}")
        return _Projection(names, given["num_heads"], weight, bias, None if last is None else last.detach(), bool(given.get("add_zero_attn")))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters that it uses."""
        return tuple(each for each in (self.weight, self.bias, self.last) if each is not None)

    def source(self, given: dict[str, Any]) -> Tensor:
        """The argument that it projects."""
        source: Tensor = given[self.names[self.weight is None]]
        return source

    def arrange(self, source: Tensor) -> Tensor:
        """That argument as [samples, keys, features], or [samples, heads, keys, features] where it is projected already."""
        if self.weight is None:
            return source.reshape(-1, self.heads, *source.shape[1:])
        return (source if source.ndim == 3 else source.unsqueeze(1)).transpose(0, 1)

    def project(self, samples: Tensor) -> Tensor:
        """The keys or values by head, [samples, heads, keys, features]."""
        if self.weight is not None:
            samples = F.linear(samples, self.weight, self.bias)
            if self.last is not None:
                samples = torch.cat([samples, self.last.expand(len(samples), 1, -1)], 1)
            samples = samples.reshape(*samples.shape[:2], self.heads, -1).transpose(1, 2)
        if self.adds_zero:
            samples = torch.cat([samples, samples.new_zeros(*samples.shape[:2], 1, samples.shape[3])], 2)
        return upcast(samples)


def _weight_and_bias(given: dict[str, Any], which: int) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of the projection to queries (0), keys (1) or values (2)."""
    if given.get("use_separate_proj_weight", False):
        weight = (given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"])[which]
    else:
        weight = given["in_proj_weight"].chunk(3)[which]
    bias = given["in_proj_bias"]
    return weight.detach(), None if bias is None else bias.detach().chunk(3)[which]


def _in_present_precision(project: Callable[[Tensor], Tensor], kind: str) -> Callable[[Tensor], Tensor]:
    """The function with the autocast of now, whatever it is when the function is called. A backward has none.

    Args:
        kind: of the device.
    """
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def later(samples: Tensor) -> Tensor:
        with torch.autocast(kind, dtype, enabled):
            return project(samples)

    return later


def product(q: Tensor, k: Tensor) -> Tensor:
    """q k^T in the precision of q and k, not in the lower one that autocast would choose."""
    with torch.autocast(q.device.type, enabled=False):
        return torch.matmul(q, k.transpose(-1, -2))


def _masked(z: Tensor, added: Tensor | None, causal: Tensor | None, elements: int) -> Logits:
    """Logits under a mask `added`, which is boolean (true: visible) or is added to z, and under the causal mask `causal`, if there is one."""
    visible = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=z.device) if causal is None else causal
    if added is not None and added.dtype == torch.bool:
        visible = visible & added
    elif added is not None:
        added = upcast(added)
        visible = visible & seen_under(added)
        z = z + added
    return Logits(z, visible, elements)


def _four(tensor: Tensor) -> Tensor:
    """A tensor of any number of axes as [batch, heads, rows, columns]. Further leading axes join the batch; fewer than four axes are one head."""
    if tensor.ndim >= 4:
        return tensor.flatten(0, -4)
    return tensor.unsqueeze(-3).reshape(-1, 1, *tensor.shape[-2:])
