"""Rebuilt gates against the module's own output, and against cells run step by step in float64."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from torchsat.replay import Gate, NotRebuiltError, cell_gates, rnn_gates

KINDS = [nn.LSTM, nn.GRU, nn.RNN]


def by_name(gates: list[Gate]) -> dict[str, Tensor]:
    return {f"{gate.layer}/{gate.name}": gate.z for gate in gates}


def last_output(module: nn.RNNBase, gates: dict[str, Tensor], suffix: str, h_before: Tensor) -> Tensor:
    """The output that these gates imply, sample by sample."""
    at = lambda name: gates[f"{suffix}/{name}"]  # noqa: E731
    if isinstance(module, nn.LSTM):
        return torch.sigmoid(at("output")) * torch.tanh(at("hidden"))
    if isinstance(module, nn.GRU):
        update = torch.sigmoid(at("update"))
        return (1 - update) * torch.tanh(at("new")) + update * h_before
    return torch.tanh(at("hidden")) if module.nonlinearity == "tanh" else torch.relu(at("hidden"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3},
        {"bidirectional": True, "num_layers": 2},
        {"batch_first": True},
        {"bias": False},
        {"num_layers": 2, "dropout": 0.4},
        {"num_layers": 3, "dropout": 0.4, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("given_state", [False, True])
def test_the_gates_imply_the_modules_own_output(kind: type[nn.RNNBase], options: dict[str, object], given_state: bool) -> None:
    module = kind(5, 7, **options).double()  # type: ignore[arg-type]
    steps, batch, directions = 9, 4, 2 if module.bidirectional else 1
    x = torch.randn(batch, steps, 5, dtype=torch.float64) if module.batch_first else torch.randn(steps, batch, 5, dtype=torch.float64)
    state = None
    if given_state:
        parts = torch.randn(2, module.num_layers * directions, batch, 7, dtype=torch.float64)
        state = (parts[0], parts[1]) if kind is nn.LSTM else parts[0]
    random = torch.get_rng_state()
    output, _ = module(x, state)
    after = torch.get_rng_state()
    with torch.no_grad():
        gates = by_name(list(rnn_gates(module, x, state, random)))
    assert torch.equal(after, torch.get_rng_state())
    output = output.transpose(0, 1) if module.batch_first else output
    last = module.num_layers - 1
    for direction in range(directions):
        mine = output[..., 7 * direction : 7 * (direction + 1)]
        if direction:
            mine = mine.flip(0)
        first = torch.zeros(batch, 7, dtype=torch.float64)
        if state is not None:
            first = (state[0] if isinstance(state, tuple) else state)[last * directions + direction]
        before = torch.cat([first.unsqueeze(0), mine[:-1]]).flatten(0, 1)
        implied = last_output(module, gates, f"l{last}{'_reverse' if direction else ''}", before)
        assert (implied - mine.flatten(0, 1)).abs().max() < 1e-12
    # 5 gates of an LSTM (the hidden tanh is one), 3 of a GRU, 1 of an RNN.
    assert len(gates) == {nn.LSTM: 5, nn.GRU: 3, nn.RNN: 1}[kind] * module.num_layers * directions


def test_a_relu_rnn_and_a_projected_lstm() -> None:
    rnn = nn.RNN(5, 7, nonlinearity="relu").double()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    (gate,) = rnn_gates(rnn, x)
    assert (gate.layer, gate.name, gate.function) == ("l0", "hidden", "relu")
    assert torch.allclose(torch.relu(gate.z), rnn(x)[0].flatten(0, 1), atol=1e-12)
    lstm = nn.LSTM(5, 7, proj_size=3, num_layers=2).double()
    gates = by_name(list(rnn_gates(lstm, x)))
    implied = (torch.sigmoid(gates["l1/output"]) * torch.tanh(gates["l1/hidden"])) @ lstm.weight_hr_l1.T
    assert torch.allclose(implied, lstm(x)[0].flatten(0, 1), atol=1e-12)


def step_by_step(module: nn.LSTM, x: Tensor) -> list[Tensor]:
    """The pre-activations of a one-layer LSTM from nn.LSTMCell's definition, one sequence [steps, features] at a time."""
    h = c = torch.zeros(module.hidden_size, dtype=x.dtype)
    found = []
    for step in x:
        z = module.weight_ih_l0 @ step + module.bias_ih_l0 + module.weight_hh_l0 @ h + module.bias_hh_l0
        i, f, g, o = z.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        found.append(torch.cat([z, c]))
    return found


def test_every_gate_is_that_of_the_definition() -> None:
    module, x = nn.LSTM(5, 7).double(), torch.randn(6, 5, dtype=torch.float64)
    expected = torch.stack(step_by_step(module, x))
    gates = by_name(list(rnn_gates(module, x)))
    found = torch.cat([gates[f"l0/{name}"] for name in ("input", "forget", "cell", "output", "hidden")], 1)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_packed_sequences_are_seen_without_their_padding(kind: type[nn.RNNBase], enforce_sorted: bool, dropout: float) -> None:
    module = kind(5, 7, num_layers=2, bidirectional=True, dropout=dropout).double()
    lengths = torch.tensor([6, 4, 3, 1] if enforce_sorted else [3, 6, 1, 4])
    padded = torch.randn(6, 4, 5, dtype=torch.float64)
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=enforce_sorted)
    random = torch.get_rng_state()
    output, _ = module(packed)
    gates = by_name(list(rnn_gates(module, packed, None, random)))
    assert {len(z) for z in gates.values()} == {14}
    mine, _ = pad_packed_sequence(output)
    assert isinstance(output, PackedSequence)
    kept = (torch.arange(6).unsqueeze(1) < lengths).flatten()
    if kind is not nn.GRU:
        implied = last_output(module, gates, "l1", torch.zeros(0))
        assert (implied - mine[..., :7].flatten(0, 1)[kept]).abs().max() < 1e-12
        implied = last_output(module, gates, "l1_reverse", torch.zeros(0))
        turned = torch.stack([torch.cat([mine[:n, k, 7:].flip(0), mine[n:, k, 7:]]) for k, n in enumerate(lengths.tolist())], 1)
        assert (implied - turned.flatten(0, 1)[kept]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("batched", [True, False])
def test_cells(kind: type[nn.RNNCellBase], batched: bool) -> None:
    cell = kind(5, 7).double()
    shape = (3,) if batched else ()
    x, h, c = (torch.randn(*shape, size, dtype=torch.float64) for size in (5, 7, 7))
    state = (h, c) if kind is nn.LSTMCell else h
    for given in (state, None):
        gates = {gate.name: gate.z for gate in cell_gates(cell, x, given)}
        output = cell(x, given)
        before = h if given is not None else torch.zeros_like(h)
        if kind is nn.LSTMCell:
            implied, output = torch.sigmoid(gates["output"]) * torch.tanh(gates["hidden"]), output[0]
        elif kind is nn.GRUCell:
            update = torch.sigmoid(gates["update"])
            implied = (1 - update) * torch.tanh(gates["new"]) + update * before
        else:
            implied = torch.tanh(gates["hidden"])
        assert (implied - output).abs().max() < 1e-12


def test_a_dropout_that_cannot_be_drawn_again_ends_with_the_reason() -> None:
    module, found = nn.LSTM(5, 7, num_layers=2, dropout=0.5), list[str]()
    with pytest.raises(NotRebuiltError, match="the dropout before layer 1 draws its masks inside the fused kernel"):
        found.extend(gate.layer for gate in rnn_gates(module, torch.randn(4, 2, 5)))
    found = [gate.layer for gate in itertools.islice(rnn_gates(module, torch.randn(4, 2, 5)), 5)]
    assert set(found) == {"l0"}
    assert len(list(rnn_gates(module.eval(), torch.randn(4, 2, 5)))) == 10
