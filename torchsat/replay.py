"""Computes the gates of recurrent layers again from the arguments of the call, since fused kernels hide them. Pure functions.

nn.LSTM, nn.GRU, nn.RNN and their cells compute their gates inside one kernel, where no hook fires. A *gate* here is any of the activations inside
such a layer, the new hidden or cell state included. The pre-activations of the gates follow from inputs, hidden states and weights, by the equations
in the documentation of torch. The hidden states of a layer are computed by the same kernel, which is run again without gradients on some sequences of
the batch. The gates of all time steps are then one matrix product, so that no loop over time is needed.

The masks of the dropout between layers are drawn again from the state that the random generator had before the call. On a CPU these are the same
masks. cuDNN keeps a generator of its own, so that on a GPU the layers above a dropout cannot be computed again; they are reported as unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from torchsat import internals
from torchsat.attributes import stored
from torchsat.sampling import places
from torchsat.sharding import is_freed, part_of
from torchsat.tensors import why_unread

State = Tensor | tuple[Tensor, Tensor] | None
"""The hidden state, and the cell state of an LSTM, that a call was given."""
COMPUTED = "a weight of it is computed from others, and reading it can change them"
FREED = "a tensor whose memory is freed after the forward"
_LEAST_SEQUENCES, _ENOUGH_SEQUENCES = 4, 32
"""At least the first number of sequences of a batch are computed again, and the second one unless they are long: the elements of one sequence
depend on each other, so that few sequences say little however long they are."""
_MOST = 8
"""For the sake of more sequences a gate may have this many times the elements that were asked for. With 4 of 8 sequences in place of all, shares of a
trained speaker network (benchmarks/published.py) were off by 2 points."""


@dataclass(frozen=True)
class Gate:
    """The pre-activations of one gate in one layer and direction."""

    layer: str
    """The suffix of the layer's weights, such as `l0` or `l0_reverse`; empty for a cell."""
    name: str
    function: str
    """The name of its activation."""
    z: Tensor
    """[samples, units], where samples are all time steps of all sequences that were computed again."""
    elements: int
    """Number of elements of z for the whole batch, computed again or not."""


class NotRebuiltError(ValueError):
    """Something that a fused kernel hides cannot be computed again; the message says why."""


def why_unknown(module: nn.RNNBase | nn.RNNCellBase) -> str | None:
    """Why the weights that the last call of this module has used cannot be read; None where they can.

    A weight that is computed from others (spectral norm, weight drop) must not be read, since that computes it again. nn.LSTM, nn.GRU and nn.RNN keep
    the weights that a forward has used; their cells do not.
    """
    try:
        weights = _weights(module)
    except AttributeError:
        return COMPUTED
    reasons = (FREED if is_freed(each) else why_unread(each) for each in weights.values())
    return next((f"a weight of it is {reason}" for reason in reasons if reason is not None), None)


def _weights(module: nn.RNNBase | nn.RNNCellBase) -> dict[str, Tensor]:
    """The weights and biases that the last call has used, by the name of the attribute.

    Raises:
        AttributeError: they are not kept.
    """
    used = internals.flat_weights(module) if isinstance(module, nn.RNNBase) else None
    if used is None:
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
        used = {name: stored(module, name) for name in names}
    return {name: part_of(each) for name, each in used.items()}


def cell_gates(module: nn.RNNCellBase, x: Tensor, state: State = None) -> Iterator[Gate]:
    """The gates of one step of an nn.LSTMCell, nn.GRUCell or nn.RNNCell, which was called with x and this state."""
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
    weights = list(_weights(module).values())
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
    seed: int = 0,
) -> Iterator[Gate]:
    """The gates of an nn.LSTM, nn.GRU or nn.RNN, layer by layer, the forward direction first.

    Args:
        module: any number of layers and directions, `batch_first`, `proj_size`, `dropout`.
        x, state: what the module was called with.
        random: the state of the CPU generator before the call, for the dropout between layers.
        output: what the module returned. It holds the hidden states of the last layer, which then need not be computed again.
        limit: so many sequences are computed again that each gate has about this many z (None: all); for the sake of 32 sequences up to eight times
            as many, and at least 4 sequences in any case. With dropout between layers all are, since its masks are drawn for the whole batch.
        seed: which sequences; see sampling.py.

    Raises:
        NotRebuiltError: for a layer above a dropout whose masks cannot be drawn again. The layers below it have been yielded by then.
    """
    given = _sequences(module, x, state, output)
    drops = module.training and module.dropout > 0 and module.num_layers > 1
    # The lengths are on the host, so that nothing here waits for the device.
    samples = given.inputs.shape[0] * given.inputs.shape[1] if given.lengths is None else int(given.lengths.sum())
    if limit is not None and not drops:
        steps, batch = given.inputs.shape[:2]
        each = max(1, steps * module.hidden_size)
        wanted = max(_LEAST_SEQUENCES, min(_ENOUGH_SEQUENCES, _MOST * limit // each), limit // each)
        if wanted < batch:
            given = given.some(wanted, seed)
    kept = given.kept()
    saved = torch.get_rng_state() if drops else None
    try:
        if drops and random is not None:
            torch.set_rng_state(random)
        for layer in range(module.num_layers):
            if layer and drops:
                if random is None or given.inputs.device.type != "cpu":
                    raise NotRebuiltError(f"the dropout before layer {layer} draws its masks inside the fused kernel, out of reach")
                given = replace(given, inputs=_dropped(given.inputs, module.dropout, x))
            outputs = []
            for direction in range(2 if module.bidirectional else 1):
                hidden, gates = _direction(module, given, layer, direction)
                outputs.append(hidden)
                for name, function, z in gates:
                    # A reversed direction fills the same positions, since each sequence is reversed within its own length.
                    flat = z.flatten(0, 1)
                    taken = flat if kept is None else flat.index_select(0, kept)
                    yield Gate(_suffix(layer, direction), name, function, taken, samples * z.shape[-1])
            given = replace(given, inputs=torch.cat(outputs, -1))
    finally:
        if saved is not None:
            torch.set_rng_state(saved)


@dataclass(frozen=True)
class _Sequences:
    """The sequences that a layer is given, with time steps first."""

    inputs: Tensor
    """[steps, batch, features], padded."""
    lengths: Tensor | None
    """[batch], on the host; None where all sequences have all steps."""
    states: tuple[Tensor, ...] | None
    """The hidden state, and of an LSTM the cell state, before the first step, each [layers * directions, batch, units]; None: they are 0."""
    last: Tensor | None
    """The output of the last layer, [steps, batch, units of all directions], if it is known."""

    def some(self, count: int, seed: int) -> _Sequences:
        """The same, with only so many sequences of the batch."""
        batch, device = self.inputs.shape[1], self.inputs.device
        there = places(batch, count, seed, device)
        return _Sequences(
            self.inputs.index_select(1, there),
            None if self.lengths is None else self.lengths.index_select(0, places(batch, count, seed, self.lengths.device)),
            None if self.states is None else tuple(part.index_select(1, there) for part in self.states),
            None if self.last is None else self.last.index_select(1, there),
        )

    def kept(self) -> Tensor | None:
        """Where the elements that are no padding lie in the flattened [steps, batch]; None where there is no padding."""
        if self.lengths is None:
            return None
        inside = torch.arange(len(self.inputs)).unsqueeze(1) < self.lengths
        return inside.flatten().nonzero().squeeze(1).to(self.inputs.device, non_blocking=True)


def _sequences(module: nn.RNNBase, x: Tensor | PackedSequence, state: State, output: Tensor | PackedSequence | None) -> _Sequences:
    """The sequences that are given to the first layer of a module."""

    def ordered(sequences: Tensor | PackedSequence) -> Tensor:
        if isinstance(sequences, PackedSequence):
            return pad_packed_sequence(sequences)[0]
        return sequences.unsqueeze(1) if sequences.ndim == 2 else sequences.transpose(0, 1) if module.batch_first else sequences

    inputs = ordered(x)
    states = None
    if state is not None:
        parts = state if isinstance(state, tuple) else (state,)
        states = tuple(part.reshape(module.num_layers * (2 if module.bidirectional else 1), inputs.shape[1], -1) for part in parts)
    lengths = pad_packed_sequence(x)[1] if isinstance(x, PackedSequence) else None
    return _Sequences(inputs, lengths, states, None if output is None else ordered(output))


def _suffix(layer: int, direction: int) -> str:
    return f"l{layer}_reverse" if direction else f"l{layer}"


def _direction(module: nn.RNNBase, given: _Sequences, layer: int, direction: int) -> tuple[Tensor, list[tuple[str, str, Tensor]]]:
    """The hidden states of one layer in one direction, [steps, batch, units], and its gates as `_gates` gives them."""
    suffix = _suffix(layer, direction)
    names = [f"weight_ih_{suffix}", f"weight_hh_{suffix}"] + ([f"bias_ih_{suffix}", f"bias_hh_{suffix}"] if module.bias else [])
    used = _weights(module)
    weights = [used[name] for name in names]
    h, c = _first_state(module, given, layer, direction)
    inputs = _reversed(given.inputs, given.lengths) if direction else given.inputs
    if given.last is not None and layer == module.num_layers - 1:
        hidden = given.last.chunk(2 if module.bidirectional else 1, -1)[direction]
        hidden = _reversed(hidden, given.lengths) if direction else hidden
    else:
        projection = used[f"weight_hr_{suffix}"] if module.proj_size else None
        hidden = _run(module.mode, inputs, h, c, weights, projection, module.bias)
    before = torch.cat([h.unsqueeze(0).to(hidden.dtype), hidden[:-1]])
    return _reversed(hidden, given.lengths) if direction else hidden, _gates(module.mode, inputs, before, c, weights)


def _first_state(module: nn.RNNBase, given: _Sequences, layer: int, direction: int) -> tuple[Tensor, Tensor]:
    """The hidden state and the cell state before the first step, each [batch, units]. Only an LSTM reads the second one."""
    if given.states is not None:
        at = layer * (2 if module.bidirectional else 1) + direction
        return given.states[0][at], given.states[-1][at]
    batch = given.inputs.shape[1]
    h = given.inputs.new_zeros(batch, module.proj_size or module.hidden_size)
    return h, given.inputs.new_zeros(batch, module.hidden_size) if module.mode == "LSTM" else h


def _run(kind: str, inputs: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], projection: Tensor | None, bias: bool) -> Tensor:
    """The hidden states [steps, batch, units] of one layer in one direction, computed by torch's own kernel.

    Args:
        kind: the `mode` of the module.
        projection: the weight that projects the hidden state of an LSTM with `proj_size`; None for any other layer.
        bias: whether `weights` end with two biases.
    """
    given = [*weights, *([] if projection is None else [projection])]
    h, c = h.unsqueeze(0).to(inputs.dtype), c.unsqueeze(0).to(inputs.dtype)
    # cuDNN is off, since it warns if the weights that it is given are not one contiguous piece of memory.
    with torch.backends.cudnn.flags(enabled=False):
        if kind == "LSTM":
            return torch.lstm(inputs, (h, c), given, bias, 1, 0.0, False, False, False)[0]
        run = torch.gru if kind == "GRU" else torch.rnn_tanh if kind == "RNN_TANH" else torch.rnn_relu
        return run(inputs, h, given, bias, 1, 0.0, False, False, False)[0]


def _gates(kind: str, inputs: Tensor, before: Tensor, c: Tensor, weights: list[Tensor]) -> list[tuple[str, str, Tensor]]:
    """(name, function, z) of each gate of one layer in one direction, where z is [steps, batch, units].

    Args:
        inputs: [steps, batch, features].
        before: the hidden state before each step, [steps, batch, units].
        c: the cell state before the first step, [batch, units].
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
    """[steps, batch, ...] with each sequence reversed within its own length."""
    if lengths is None:
        return sequences.flip(0)
    steps = torch.arange(len(sequences)).unsqueeze(1)
    turned = torch.where(steps < lengths, lengths - 1 - steps, steps).to(sequences.device, non_blocking=True)
    return sequences.gather(0, turned.unsqueeze(-1).expand_as(sequences))


def _dropped(inputs: Tensor, share: float, x: Tensor | PackedSequence) -> Tensor:
    """The inputs [steps, batch, features] after the dropout between layers.

    The kernel draws the mask of a padded batch over time steps, and that of a packed one in the order of its packed elements.
    """
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
