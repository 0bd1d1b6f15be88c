"""What fused kernels hide, rebuilt: the gates of recurrent layers and the logits of attention. Pure functions of what was called.

nn.LSTM, nn.GRU, nn.RNN and their cells compute their gates inside one kernel, where no hook fires. Their pre-activations follow from inputs,
hidden states and weights, by the equations that the torch documentation states. The hidden states of a layer come out of the same kernel, run
again on some sequences of the batch without gradients; then the gates of all time steps are one product, and no step waits for the one before.

The masks of the dropout between layers are drawn again from the state that the generator had before the call. That gives the same masks on a
CPU; cuDNN keeps a state of its own, so that on a GPU the layers above a dropout cannot be rebuilt, and are not: they are named as unseen.

The logits of an attention are computed again for some query rows only, so that the T x T matrix of a long context never exists. Rows are
spread over batch and positions, the same for all heads. A key is masked where a boolean says so, where a float mask lies 80 below the
largest of its row (e^-80 is nothing), or, where only the sum of logit and mask is known, where that sum is below -9000.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

State = Tensor | tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Gate:
    """The pre-activations of one gate in one layer and direction: z is [samples, units], samples being all time steps of all sequences."""

    layer: str
    name: str
    function: str
    z: Tensor
    elements: int
    """How many z the whole batch has."""


_LEAST_SEQUENCES = 4


class NotRebuiltError(ValueError):
    """Why the gates of a layer cannot be rebuilt. Raised once the layers below it have been given."""


def cell_gates(module: nn.RNNCellBase, x: Tensor, state: State = None) -> Iterator[Gate]:
    """The gates of one step of an nn.LSTMCell, nn.GRUCell or nn.RNNCell; the layer's name is empty."""
    kind = "RNN_" + module.nonlinearity.upper() if isinstance(module, nn.RNNCell) else type(module).__name__.removesuffix("Cell")
    if x.ndim == 1:
        x = x.unsqueeze(0)
        if isinstance(state, tuple):
            state = state[0].unsqueeze(0), state[1].unsqueeze(0)
        elif state is not None:
            state = state.unsqueeze(0)
    if state is None:
        zero = x.new_zeros(len(x), module.hidden_size)
        state = (zero, zero) if kind == "LSTM" else zero
    weights = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh] if module.bias else [module.weight_ih, module.weight_hh]
    h, c = state if isinstance(state, tuple) else (state, state)
    for name, function, z in _gates(kind, x.unsqueeze(0), h.unsqueeze(0), c, weights):
        yield Gate("", name, function, z.flatten(0, 1), z.numel())


def rnn_gates(
    module: nn.RNNBase,
    x: Tensor | PackedSequence,
    state: State = None,
    random: Tensor | None = None,
    output: Tensor | PackedSequence | None = None,
    limit: int | None = None,
    turn: int = 0,
) -> Iterator[Gate]:
    """The gates of an nn.LSTM, nn.GRU or nn.RNN, layer by layer, forward direction first.

    Args:
        module: any number of layers and directions, `batch_first`, `proj_size`, `dropout`.
        x, state: what the module was called with.
        random: the state of the CPU generator before the call, for the dropout between layers.
        output: what the module made of it: the hidden states of the last layer, which then need not be computed again.
        limit: sequences of about so many z per gate are rebuilt, and at least 4 (None: all); all of them where there is a dropout, whose masks
            are drawn for the whole batch.
        turn: which observation this is: the sequences change from one to the next.

    Raises:
        NotRebuiltError: for a layer above a dropout whose masks cannot be drawn again; the layers below it have been yielded by then.
    """
    lengths: Tensor | None = None

    def ordered(sequences: Tensor | PackedSequence) -> Tensor:
        """[steps, batch, features]"""
        if isinstance(sequences, PackedSequence):
            return pad_packed_sequence(sequences)[0]
        return sequences.unsqueeze(1) if sequences.ndim == 2 else sequences.transpose(0, 1) if module.batch_first else sequences

    inputs, last = ordered(x), None if output is None else ordered(output)
    if isinstance(x, PackedSequence):
        lengths = pad_packed_sequence(x)[1]
    steps, batch = inputs.shape[:2]
    directions = 2 if module.bidirectional else 1
    size = module.proj_size or module.hidden_size
    samples = steps * batch if lengths is None else int(lengths.sum())
    states: list[Tensor] | None = None
    if state is not None:
        states = [part.reshape(module.num_layers * directions, batch, -1) for part in (state if isinstance(state, tuple) else (state,))]
    drops = module.training and module.dropout > 0 and module.num_layers > 1
    if limit is not None and not drops:
        chosen = _spaced(batch, max(_LEAST_SEQUENCES, limit // max(1, steps * module.hidden_size)), turn)
        last = None if last is None else last[:, chosen]
        inputs, lengths = inputs[:, chosen], None if lengths is None else lengths[chosen]
        states = None if states is None else [part[:, chosen].contiguous() for part in states]
        batch = inputs.shape[1]
    # Positions of real elements in the padded [steps, batch]; the lengths are on the host, so nothing waits for the device.
    kept = (
        None if lengths is None else (torch.arange(steps).unsqueeze(1) < lengths).flatten().nonzero().squeeze(1).to(x.data.device, non_blocking=True)
    )
    saved = torch.get_rng_state() if drops else None
    try:
        if drops and random is not None:
            torch.set_rng_state(random)
        for layer in range(module.num_layers):
            if layer and drops:
                if random is None or inputs.device.type != "cpu":
                    raise NotRebuiltError(f"the dropout before layer {layer} draws its masks inside the fused kernel, out of reach")
                inputs = _dropped(inputs, module.dropout, x)
            outputs = []
            for direction in range(directions):
                at = layer * directions + direction
                suffix = f"l{layer}_reverse" if direction else f"l{layer}"
                names = [f"weight_ih_{suffix}", f"weight_hh_{suffix}"] + ([f"bias_ih_{suffix}", f"bias_hh_{suffix}"] if module.bias else [])
                weights = [getattr(module, name) for name in names]
                projection = getattr(module, f"weight_hr_{suffix}") if module.proj_size else None
                if states is not None:
                    first: Tensor | tuple[Tensor, Tensor] = (states[0][at], states[1][at]) if len(states) == 2 else states[0][at]
                else:
                    zero = inputs.new_zeros(batch, size)
                    first = (zero, inputs.new_zeros(batch, module.hidden_size)) if module.mode == "LSTM" else zero
                given = _reversed(inputs, lengths) if direction else inputs
                h, c = first if isinstance(first, tuple) else (first, first)
                if last is not None and layer == module.num_layers - 1:
                    hidden = last.chunk(directions, -1)[direction]
                    hidden = _reversed(hidden, lengths) if direction else hidden
                else:
                    hidden = _run(module.mode, given, h, c, weights, projection, module.bias)
                outputs.append(_reversed(hidden, lengths) if direction else hidden)
                before = torch.cat([h.unsqueeze(0).to(hidden.dtype), hidden[:-1]])
                for name, function, z in _gates(module.mode, given, before, c, weights):
                    # A reversed direction fills the same positions: each sequence is turned within its own length.
                    flat = z.flatten(0, 1)
                    yield Gate(suffix, name, function, flat if kept is None else flat.index_select(0, kept), samples * z.shape[-1])
            inputs = torch.cat(outputs, -1)
    finally:
        if saved is not None:
            torch.set_rng_state(saved)


def _run(kind: str, inputs: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], projection: Tensor | None, bias: bool) -> Tensor:
    """The hidden states [steps, batch, units] of one layer in one direction, by torch's own kernel."""
    given = [*weights, *([] if projection is None else [projection])]
    h, c = h.unsqueeze(0).to(inputs.dtype), c.unsqueeze(0).to(inputs.dtype)
    # cuDNN wants the weights of a whole module in one piece of memory, and warns where they are not.
    with torch.backends.cudnn.flags(enabled=False):
        if kind == "LSTM":
            return torch.lstm(inputs, (h, c), given, bias, 1, 0.0, False, False, False)[0]
        run = torch.gru if kind == "GRU" else torch.rnn_tanh if kind == "RNN_TANH" else torch.rnn_relu
        return run(inputs, h, given, bias, 1, 0.0, False, False, False)[0]


def _gates(kind: str, inputs: Tensor, before: Tensor, c: Tensor, weights: list[Tensor]) -> list[tuple[str, str, Tensor]]:
    """(gate, function, z) of one layer in one direction, z being [steps, batch, units].

    Args:
        inputs: [steps, batch, features].
        before: the hidden state that each step begins with, [steps, batch, units].
        c: the cell state that the first step begins with.
    """
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    projected, recurrent = F.linear(inputs, weight_ih, bias_ih), F.linear(before, weight_hh, bias_hh)
    if kind == "GRU":
        (reset, update, new), (reset_h, update_h, new_h) = projected.chunk(3, -1), recurrent.chunk(3, -1)
        reset = reset + reset_h
        return [("reset", "sigmoid", reset), ("update", "sigmoid", update + update_h), ("new", "tanh", new + torch.sigmoid(reset) * new_h)]
    z = projected + recurrent
    if kind != "LSTM":
        return [("hidden", kind.removeprefix("RNN_").lower(), z)]
    i, f, g, o = z.chunk(4, -1)
    kept, added, cells = torch.sigmoid(f), torch.sigmoid(i) * torch.tanh(g), []
    for share, new in zip(kept, added, strict=True):
        c = torch.addcmul(new, share, c.to(new.dtype))
        cells.append(c)
    return [("input", "sigmoid", i), ("forget", "sigmoid", f), ("cell", "tanh", g), ("output", "sigmoid", o), ("hidden", "tanh", torch.stack(cells))]


def _reversed(sequences: Tensor, lengths: Tensor | None) -> Tensor:
    """[steps, batch, ...] with each sequence turned around within its own length."""
    if lengths is None:
        return sequences.flip(0)
    steps = torch.arange(len(sequences)).unsqueeze(1)
    turned = torch.where(steps < lengths, lengths - 1 - steps, steps).to(sequences.device, non_blocking=True)
    return sequences.gather(0, turned.unsqueeze(-1).expand_as(sequences))


def _dropped(inputs: Tensor, share: float, x: Tensor | PackedSequence) -> Tensor:
    """The dropout between layers, drawn in the order in which the kernel draws it: over time steps, or over the packed elements."""
    if not isinstance(x, PackedSequence):
        return F.dropout(inputs, share)
    rows: list[Tensor] = []
    order = torch.arange(inputs.shape[1]) if x.sorted_indices is None else x.sorted_indices.cpu()
    places = [(step, order[:count]) for step, count in enumerate(x.batch_sizes.tolist())]
    rows = [inputs[step, batch] for step, batch in places]
    mask = F.dropout(torch.ones_like(torch.cat(rows)), share)
    result, at = inputs.clone(), 0
    for step, batch in places:
        result[step, batch] = inputs[step, batch] * mask[at : at + len(batch)]
        at += len(batch)
    return result


_MASKED, _MASKED_SUM = -80.0, -9000.0
_LEAST_ROWS = 8
"""Query rows of each head, however many keys they have."""


@dataclass(frozen=True)
class Logits:
    """Some query rows of an attention."""

    z: Tensor
    """[batch, heads, queries, keys], with what float masks add."""
    visible: Tensor
    """Booleans that broadcast to z: which key a query sees."""
    elements: int
    """Logits of the whole attention."""


@dataclass(frozen=True)
class Queries:
    """Which query rows are read: these samples of the batch, and in each these positions."""

    batch: slice
    positions: slice

    @staticmethod
    def of(shape: tuple[int, ...], limit: int | None, turn: int) -> Queries:
        """Of logits [batch, heads, queries, keys]: rows of about `limit` logits over all heads (None: all rows), and at least 8 rows per head."""
        batch, heads, queries, keys = shape
        rows = batch * queries if limit is None else max(_LEAST_ROWS, limit // max(1, heads * keys))
        # What a query sees depends on its position, under a causal mask above all: several of them, then as many samples as fit.
        positions = min(queries, max(_LEAST_ROWS, math.isqrt(rows), -(-rows // max(1, batch))))
        return Queries(_spaced(batch, max(1, rows // max(1, positions)), turn), _spaced(queries, positions, turn))


def _spaced(size: int, wanted: int, turn: int) -> slice:
    step = max(1, -(-size // max(1, wanted)))
    # A step that divides the size would meet the same column of an image, or the same window, again and again.
    while step > 1 and math.gcd(step, size) != 1:
        step += 1
    return slice(turn * 7919 % max(1, min(step, size)), size, step)


@dataclass(frozen=True)
class SoftmaxRows:
    """Which rows of a softmax over one axis are read. Attention over the last of four axes is [batch, heads, queries, keys]; else it is one head."""

    shape: tuple[int, ...]
    axis: int
    has_heads: bool
    queries: Queries

    @staticmethod
    def of(z: Tensor, axis: int, limit: int | None, turn: int, has_heads: bool = True) -> SoftmaxRows:
        shape = tuple(z.shape)
        heads = shape if has_heads and z.ndim == 4 and axis == 3 else (1, 1, z.numel() // max(1, shape[axis]), shape[axis])
        return SoftmaxRows(shape, axis, heads[1] > 1, Queries.of(heads, limit, turn))

    def rows(self, tensor: Tensor) -> Tensor:
        """[batch, heads, queries, keys]"""
        if not self.has_heads:
            tensor = tensor.movedim(self.axis, -1).reshape(1, 1, -1, self.shape[self.axis])
        return tensor[self.queries.batch, :, self.queries.positions]

    def take(self, tensor: Tensor) -> Tensor:
        return self.rows(tensor).reshape(-1)

    def logits(self, z: Tensor) -> Logits:
        taken = _wide(self.rows(z))
        return Logits(taken, ~(taken <= _MASKED_SUM), math.prod(self.shape))


def attention_logits(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], limit: int | None, turn: int) -> Logits:
    """Of a call of `F.scaled_dot_product_attention` or `F.multi_head_attention_forward`."""
    if call is F.multi_head_attention_forward:
        return _multi_head(inspect.signature(call).bind(*args, **kwargs).arguments, limit, turn)
    return _scaled_dot_product(*args, **kwargs, limit=limit, turn=turn)


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
    limit: int | None,
    turn: int,
) -> Logits:
    if attn_mask is not None and type(attn_mask) is not Tensor:
        raise NotRebuiltError(f"its mask is a {type(attn_mask).__name__}")
    q, k = (each.detach() if each.ndim == 4 else _four(each.detach()) for each in (query, key))
    # Each may be broadcast: to a common batch, and to common heads but where queries are grouped.
    batch, heads = max(q.shape[0], k.shape[0]), q.shape[1] if enable_gqa else max(q.shape[1], k.shape[1])
    q, k = q.expand(batch, heads, -1, -1), k.expand(batch, k.shape[1] if enable_gqa else heads, -1, -1)
    length, size = q.shape[2], k.shape[2]
    lead: torch.Size = torch.broadcast_shapes(query.shape[:-2], query.shape[:-2] if enable_gqa else key.shape[:-2])
    rows = Queries.of((batch, heads, length, size), limit, turn)
    q, k = _wide(q[rows.batch, :, rows.positions]), _wide(k[rows.batch])
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    # Grouped queries: head h reads the keys of group h // (heads per group).
    groups = k.shape[1]
    z = _product(q.reshape(q.shape[0], groups, heads // groups, *q.shape[2:]), k.unsqueeze(2)).reshape(q.shape[0], heads, q.shape[2], size)
    added = None
    if attn_mask is not None:
        mask = attn_mask.detach().expand(*lead, length, size)[..., rows.positions, :]
        added = (mask if mask.ndim == 4 else _four(mask))[rows.batch]
    return _masked(z, added, _causal(length, size, rows, z.device) if is_causal else None, batch * heads * length * size)


def _multi_head(given: dict[str, Any], limit: int | None, turn: int) -> Logits:
    query, key, heads = given["query"].detach(), given["key"].detach(), given["num_heads"]
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if query.ndim == 2:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        padding = None if padding is None else padding.unsqueeze(0)
    length, batch, _ = query.shape
    hint = given.get("is_causal", False) and padding is None and not given.get("need_weights", True)
    if given.get("use_separate_proj_weight", False):
        weights = given["q_proj_weight"], given["k_proj_weight"]
    else:
        weights = given["in_proj_weight"].chunk(3)[:2]
    biases = (None, None) if given["in_proj_bias"] is None else given["in_proj_bias"].detach().chunk(3)[:2]
    added_keys = (given.get("bias_k") is not None) + bool(given.get("add_zero_attn"))
    static = given.get("static_k")
    size = (key.shape[0] if static is None else static.shape[1]) + added_keys
    rows = Queries.of((batch, heads, length, size), limit, turn)
    # In the precision that the projections ran in: what attention saw is what is measured.
    q = F.linear(query[rows.positions, rows.batch], weights[0].detach(), biases[0])
    q = _wide(q.reshape(*q.shape[:2], heads, -1).permute(1, 2, 0, 3))
    if static is None:
        projected = F.linear(key[:, rows.batch], weights[1].detach(), biases[1])
        if given.get("bias_k") is not None:
            projected = torch.cat([projected, given["bias_k"].detach().expand(1, projected.shape[1], -1)])
        k = projected.reshape(*projected.shape[:2], heads, -1).permute(1, 2, 0, 3)
    else:
        k = static.detach().reshape(batch, heads, *static.shape[1:])[rows.batch]
    if given.get("add_zero_attn"):
        k = torch.cat([k, k.new_zeros(*k.shape[:2], 1, k.shape[3])], 2)
    z = _product(q * q.shape[-1] ** -0.5, _wide(k))
    additions = []
    if mask is not None and not hint:
        mask = mask.detach()
        full = mask[None, None] if mask.ndim == 2 else mask.reshape(batch, heads, *mask.shape[1:])[rows.batch]
        additions.append(full[:, :, rows.positions])
    if padding is not None:
        additions.append(padding.detach()[rows.batch, None, None, :])
    added = None
    for each in additions:
        # Here a true boolean hides a key.
        each = F.pad(torch.zeros_like(each, dtype=z.dtype).masked_fill(each, -math.inf) if each.dtype == torch.bool else each, (0, added_keys))
        added = each if added is None else added + each
    return _masked(z, added, _causal(length, size, rows, z.device) if hint else None, batch * heads * length * size)


def _product(q: Tensor, k: Tensor) -> Tensor:
    """Not in the low precision that autocast would choose."""
    with torch.autocast(q.device.type, enabled=False):
        return torch.matmul(q, k.transpose(-1, -2))


def _masked(z: Tensor, added: Tensor | None, causal: Tensor | None, elements: int) -> Logits:
    visible = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=z.device) if causal is None else causal
    if added is not None and added.dtype == torch.bool:
        visible = visible & added
    elif added is not None:
        added = _wide(added)
        largest = added.amax(-1, keepdim=True)
        visible = visible & ~(added <= largest + _MASKED) & ~(largest <= _MASKED_SUM)
        z = z + added
    return Logits(z, visible, elements)


def _causal(queries: int, keys: int, rows: Queries, device: torch.device) -> Tensor:
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device)[rows.positions].unsqueeze(-1)


def _four(tensor: Tensor) -> Tensor:
    """As [batch, heads, rows, columns]: more leading axes join the batch, fewer are one head."""
    if tensor.ndim > 4:
        return tensor.flatten(0, -4)
    return tensor.unsqueeze(-3).reshape(-1, 1, *tensor.shape[-2:])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
