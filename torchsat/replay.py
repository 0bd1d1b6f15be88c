"""What fused kernels hide, rebuilt: the gates of recurrent layers. Pure functions of (module, inputs).

nn.LSTM, nn.GRU, nn.RNN and their cells compute their gates inside one kernel, where no hook fires. Their pre-activations follow from inputs
and weights alone, by the recurrences that the torch documentation states, run here step by step without gradients.

The masks of the dropout between layers are drawn again from the state that the generator had before the call. That gives the same masks on a
CPU; cuDNN keeps a state of its own, so that on a GPU the layers above a dropout cannot be rebuilt, and are not: they are named as unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    found, _ = _scan(kind, x.unsqueeze(0), state, weights, None)
    for name, function, z in found:
        yield Gate("", name, function, z.flatten(0, 1))


def rnn_gates(module: nn.RNNBase, x: Tensor | PackedSequence, state: State = None, random: Tensor | None = None) -> Iterator[Gate]:
    """The gates of an nn.LSTM, nn.GRU or nn.RNN, layer by layer, forward direction first.

    Args:
        module: any number of layers and directions, `batch_first`, `proj_size`, `dropout`.
        x, state: what the module was called with.
        random: the state of the CPU generator before the call, for the dropout between layers.

    Raises:
        NotRebuiltError: for a layer above a dropout whose masks cannot be drawn again; the layers below it have been yielded by then.
    """
    lengths: Tensor | None = None
    if isinstance(x, PackedSequence):
        inputs, lengths = pad_packed_sequence(x)
    else:
        inputs = x.unsqueeze(1) if x.ndim == 2 else x.transpose(0, 1) if module.batch_first else x
    steps, batch = inputs.shape[:2]
    directions = 2 if module.bidirectional else 1
    hidden = module.proj_size or module.hidden_size
    states: list[Tensor] | None = None
    if state is not None:
        states = [part.reshape(module.num_layers * directions, batch, -1) for part in (state if isinstance(state, tuple) else (state,))]
    # Positions of real elements in the padded [steps, batch]; the lengths are on the host, so nothing waits for the device.
    kept = (
        None if lengths is None else (torch.arange(steps).unsqueeze(1) < lengths).flatten().nonzero().squeeze(1).to(x.data.device, non_blocking=True)
    )
    drops = module.training and module.dropout > 0
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
                    zero = inputs.new_zeros(batch, hidden)
                    first = (zero, inputs.new_zeros(batch, module.hidden_size)) if module.mode == "LSTM" else zero
                ordered = _reversed(inputs, lengths) if direction else inputs
                found, output = _scan(module.mode, ordered, first, weights, projection)
                outputs.append(_reversed(output, lengths) if direction else output)
                for name, function, z in found:
                    # A reversed direction fills the same positions: each sequence is turned within its own length.
                    flat = z.flatten(0, 1)
                    yield Gate(suffix, name, function, flat if kept is None else flat.index_select(0, kept))
            inputs = torch.cat(outputs, -1)
    finally:
        if saved is not None:
            torch.set_rng_state(saved)


def _scan(
    kind: str, inputs: Tensor, state: Tensor | tuple[Tensor, Tensor], weights: list[Tensor], projection: Tensor | None
) -> tuple[list[tuple[str, str, Tensor]], Tensor]:
    """One layer in one direction over [steps, batch, features]: (gate, function, z) each [steps, batch, units], and the output."""
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    projected = F.linear(inputs, weight_ih, bias_ih)
    gates, cells, outputs = [], [], []
    h, c = state if isinstance(state, tuple) else (state, state)
    for step in projected:
        recurrent = F.linear(h, weight_hh, bias_hh)
        if kind == "GRU":
            reset, update, new = step.chunk(3, -1)
            reset_h, update_h, new_h = recurrent.chunk(3, -1)
            reset, update = reset + reset_h, update + update_h
            new = new + torch.sigmoid(reset) * new_h
            gates.append(torch.cat([reset, update, new], -1))
            kept = torch.sigmoid(update)
            h = (1 - kept) * torch.tanh(new) + kept * h
        elif kind == "LSTM":
            z = step + recurrent
            i, f, g, o = z.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if projection is not None:
                h = F.linear(h, projection)
            gates.append(z)
            cells.append(c)
        else:
            z = step + recurrent
            h = torch.tanh(z) if kind == "RNN_TANH" else torch.relu(z)
            gates.append(z)
        outputs.append(h)
    z = torch.stack(gates)
    if kind == "LSTM":
        i, f, g, o = z.chunk(4, -1)
        found = [("input", "sigmoid", i), ("forget", "sigmoid", f), ("cell", "tanh", g), ("output", "sigmoid", o)]
        found.append(("hidden", "tanh", torch.stack(cells)))
    elif kind == "GRU":
        reset, update, new = z.chunk(3, -1)
        found = [("reset", "sigmoid", reset), ("update", "sigmoid", update), ("new", "tanh", new)]
    else:
        found = [("hidden", kind.removeprefix("RNN_").lower(), z)]
    return found, torch.stack(outputs)


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
