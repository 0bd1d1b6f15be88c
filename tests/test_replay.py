"""Rebuilt gates are tested against the module's own output and against cells run step by step, logits of attention against loops; all in float64."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

from torchsat import replay
from torchsat.attention import Attention, Logits, Queries, SoftmaxRows
from torchsat.columns import COLUMN
from torchsat.replay import Gate, NotRebuiltError, cell_gates, rnn_gates
from torchsat.sampling import seed_of
from torchsat.softmax import observe_softmax
from torchsat.statistics import EXACT


def attention_logits(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], limit: int | None, seed: int) -> Logits:
    """The logits of some rows of a call of attention; the arguments are those of `Attention.of` and `Queries.of`."""
    attention = Attention.of(call, args, kwargs)
    return attention.logits(attention.rows(limit, seed))


KINDS = [nn.LSTM, nn.GRU, nn.RNN]


def by_name(gates: list[Gate]) -> dict[str, Tensor]:
    return {f"{gate.layer}/{gate.name}": gate.z for gate in gates}


def last_output(module: nn.RNNBase, gates: dict[str, Tensor], suffix: str, h_before: Tensor) -> Tensor:
    """The output that these gates imply, sample by sample."""
    at: Callable[[str], Tensor] = lambda name: gates[f"{suffix}/{name}"]  # noqa: E731
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
        known = by_name(list(rnn_gates(module, x, state, random, output)))
    assert all((known[name] - z).abs().max() < 1e-12 for name, z in gates.items())
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


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("packs", [False, True])
def test_some_sequences_have_the_gates_that_they_have_among_all(
    kind: Callable[..., nn.RNNBase], packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_ENOUGH_SEQUENCES", 6)
    module = kind(5, 7, num_layers=2, bidirectional=True).double()
    steps, batch = 6, 30
    x = torch.randn(steps, batch, 5, dtype=torch.float64)
    lengths = torch.randint(1, steps + 1, (batch,)) if packs else torch.full((batch,), steps)
    lengths[0] = steps
    given = pack_padded_sequence(x, lengths, enforce_sorted=False) if packs else x
    states = torch.randn(2, 4, batch, 7, dtype=torch.float64)
    state = (states[0], states[1]) if kind is nn.LSTM else states[0]
    output, _ = module(given, state)
    whole, chosen = list(rnn_gates(module, given, state)), set[tuple[str, str, int]]()
    for seed in range(60):
        some = list(rnn_gates(module, given, state, None, output, 7 * steps * 3, seed))
        for every, few in zip(whole, some, strict=True):
            assert (
                (few.layer, few.name, few.elements) == (every.layer, every.name, 7 * int(lengths.sum())) == (every.layer, every.name, every.elements)
            )
            near = torch.cdist(few.z, every.z, p=math.inf)
            assert near.amin(1).max() < 1e-12
            assert len(few.z) < len(every.z) / 3
            chosen.update((every.layer, every.name, index) for index in near.argmin(1).tolist())
    # Over several observations every sequence is chosen.
    assert len(chosen) == sum(len(every.z) for every in whole)


def test_a_relu_rnn_and_a_projected_lstm() -> None:
    rnn = nn.RNN(5, 7, nonlinearity="relu").double()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    (gate,) = rnn_gates(rnn, x)
    assert (gate.layer, gate.name, gate.function) == ("l0", "hidden", "relu")
    assert torch.allclose(torch.relu(gate.z), rnn(x)[0].flatten(0, 1), atol=1e-12)
    lstm = nn.LSTM(5, 7, proj_size=3, num_layers=2).double()
    gates = by_name(list(rnn_gates(lstm, x)))
    implied = (torch.sigmoid(gates["l1/output"]) * torch.tanh(gates["l1/hidden"])) @ lstm.get_parameter("weight_hr_l1").T
    assert torch.allclose(implied, lstm(x)[0].flatten(0, 1), atol=1e-12)


def step_by_step(module: nn.LSTM, x: Tensor) -> list[Tensor]:
    """The pre-activations of a one-layer LSTM from nn.LSTMCell's definition, one sequence [steps, features] at a time."""
    h = c = torch.zeros(module.hidden_size, dtype=x.dtype)
    found, get = [], module.get_parameter
    for step in x:
        z = get("weight_ih_l0") @ step + get("bias_ih_l0") + get("weight_hh_l0") @ h + get("bias_hh_l0")
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
def test_packed_sequences_are_seen_without_their_padding(kind: Callable[..., nn.RNNBase], enforce_sorted: bool, dropout: float) -> None:
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
def test_cells(kind: Callable[..., nn.RNNCellBase], batched: bool) -> None:
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


def reference(z: Tensor, visible: Tensor) -> tuple[list[float], list[float], list[float], list[float]]:
    """For each head of z [batch, heads, queries, keys], by loops: means over rows of H / ln T, 1 - sum p^2 and the variance of the logits, and the
    largest."""
    entropy, jacobian, variance, largest = [], [], [], []
    for head in range(z.shape[1]):
        shares, traces, variances, top = [], [], [], -math.inf
        for sample in range(z.shape[0]):
            for query in range(z.shape[2]):
                row = z[sample, head, query][visible[sample, head, query]]
                if len(row) < 2:
                    continue
                p = torch.softmax(row, 0)
                shares.append(-(p * p.log()).sum().item() / math.log(len(row)))
                traces.append((torch.diag(p) - torch.outer(p, p)).trace().item())
                variances.append(row.var(correction=0).item())
                top = max(top, row.max().item())
        entropy.append(sum(shares) / len(shares))
        jacobian.append(sum(traces) / len(traces))
        variance.append(sum(variances) / len(variances))
        largest.append(top)
    return entropy, jacobian, variance, largest


def measured(logits: Logits) -> tuple[list[float], ...]:
    _, heads = observe_softmax(logits.z, logits.visible, logits.elements)
    rows, entropy, jacobian, variance, *_, largest = heads.tolist()
    means = ([total / n for total, n in zip(each, rows, strict=True)] for each in (entropy, jacobian, variance))
    return (*means, largest)


def agree(logits: Logits, z: Tensor, visible: Tensor) -> None:
    for found, expected in zip(measured(logits), reference(z, visible.expand(z.shape)), strict=True):
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


L, S = 6, 7
ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 1.7},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(2, 1, L, S, generator=torch.Generator().manual_seed(1)) > 0.4},
    "float mask": {"attn_mask": torch.randn(4, L, S, dtype=torch.float64, generator=torch.Generator().manual_seed(1))},
    "padding": {"attn_mask": torch.zeros(L, S, dtype=torch.float64).masked_fill(torch.arange(S) > 4, torch.finfo(torch.float32).min)},
    "minus infinity": {"attn_mask": torch.zeros(L, S, dtype=torch.float64).masked_fill(torch.arange(S) == 0, -math.inf)},
    "minus 100": {"attn_mask": torch.zeros(L, S, dtype=torch.float64).masked_fill(torch.arange(S) < 3, -100.0)},
    "one row sees nothing": {"attn_mask": torch.ones(L, S, dtype=torch.bool).index_fill(0, torch.tensor([2]), False)},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_logits_are_those_that_attention_uses(name: str) -> None:
    options = ATTENTION[name]
    q, k, v = (torch.randn(2, 4, size, 8, dtype=torch.float64) for size in (L, S, S))
    v = torch.eye(S, dtype=torch.float64).expand(2, 4, S, S)
    p = F.scaled_dot_product_attention(q, k, v, **options)
    logits = attention_logits(F.scaled_dot_product_attention, (q, k, v), options, None, 0)
    visible = logits.visible.expand(logits.z.shape)
    rows = visible.any(-1)
    ours = torch.softmax(logits.z.masked_fill(~visible, -math.inf), -1)
    # With the unit matrix as values, attention returns its own probabilities.
    assert torch.allclose(ours[rows], p[rows], rtol=1e-12, atol=1e-12)
    assert logits.elements == 2 * 4 * L * S
    agree(logits, logits.z, visible)
    hidden = {"causal": L * (S - 1) - (L - 1) * L // 2, "padding": 2 * L, "minus infinity": L, "minus 100": 3 * L, "one row sees nothing": S}
    if name in hidden:
        assert (~visible).sum().item() == 2 * 4 * hidden[name]


@pytest.mark.parametrize("shape", [(L, 8), (3, L, 8), (2, 3, 4, L, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_fewer_and_more_axes(shape: tuple[int, ...], masked: bool) -> None:
    q, k = torch.randn(*shape, dtype=torch.float64), torch.randn(*shape[:-2], S, 8, dtype=torch.float64)
    v = torch.eye(S, dtype=torch.float64).expand(*shape[:-2], S, S)
    mask = torch.rand(*shape[:-2], L, S) > 0.3 if masked else None
    p = F.scaled_dot_product_attention(q, k, v, mask)
    logits = attention_logits(F.scaled_dot_product_attention, (q, k, v, mask), {}, None, 0)
    heads = shape[-3] if len(shape) > 4 else 1
    assert logits.z.shape[1] == heads
    visible = logits.visible.expand(logits.z.shape)
    ours = torch.softmax(logits.z.masked_fill(~visible, -math.inf), -1)
    assert torch.allclose(ours.nan_to_num().reshape(p.shape), p.nan_to_num(), rtol=1e-12, atol=1e-12)


def test_grouped_queries_read_the_keys_of_their_group() -> None:
    q, k = torch.randn(2, 6, L, 8, dtype=torch.float64), torch.randn(2, 3, S, 8, dtype=torch.float64)
    v = torch.eye(S, dtype=torch.float64).expand(2, 3, S, S)
    p = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    logits = attention_logits(F.scaled_dot_product_attention, (q, k, v), {"enable_gqa": True}, None, 0)
    assert torch.allclose(torch.softmax(logits.z, -1), p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float", "per head", "causal"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 3}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_has_the_weights_that_it_returns(
    batch_first: bool, mask: str | None, padding: str | None, options: dict[str, Any], need_weights: bool
) -> None:
    module = nn.MultiheadAttention(8, 4, batch_first=batch_first, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    batch = 3
    q, k, v = (torch.randn(batch, size, width, dtype=torch.float64) for size, width in ((L, 8), (L, module.kdim), (L, module.vdim)))
    if not batch_first:
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
    causal = torch.triu(torch.ones(L, L, dtype=torch.bool), 1)
    masks = {
        "bool": torch.rand(L, L) > 0.7,
        "float": torch.randn(L, L, dtype=torch.float64),
        "per head": torch.rand(batch * 4, L, L) > 0.7,
        "causal": causal,
        None: None,
    }
    hidden = torch.arange(L) > torch.tensor([[4], [5], [2]])
    paddings = {"bool": hidden, None: None}
    paddings["float"] = torch.zeros(batch, L, dtype=torch.float64).masked_fill(hidden, -math.inf)
    given = {"attn_mask": masks[mask], "key_padding_mask": paddings[padding], "is_causal": mask == "causal", "need_weights": need_weights}
    heard: list[Logits] = []

    class Ear(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is F.multi_head_attention_forward:
                heard.append(attention_logits(function, args, kwargs, None, 0))
            return function(*args, **(kwargs or {}))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Ear():
            module(q, k, v, **given)
        # Without weights torch applies a causal mask in place of the given one, which also hides the keys that were added.
        _, p = module(q, k, v, **{**given, "need_weights": True}, average_attn_weights=False)
    (logits,) = heard
    visible = logits.visible.expand(logits.z.shape)
    ours = torch.softmax(logits.z.masked_fill(~visible, -math.inf), -1)
    if mask == "causal" and not need_weights and padding is None and "add_bias_kv" in options:
        assert not visible[..., L:].any()
        return
    rows = visible.any(-1)
    assert torch.allclose(ours[rows], p[rows], rtol=1e-12, atol=1e-12)
    agree(logits, logits.z, visible)


def test_a_long_context_is_read_in_part() -> None:
    """With 64k keys, T x T would be 4.3e9 logits per head."""
    q, k = torch.randn(1, 4, 65536, 2), torch.randn(1, 2, 65536, 2)
    logits = attention_logits(F.scaled_dot_product_attention, (q, k, k), {"enable_gqa": True, "is_causal": True}, 65536, 1)
    assert tuple(logits.z.shape) == (1, 4, 8, 65536)
    assert logits.elements == 4 * 65536**2
    positions = logits.visible.sum(-1).flatten() - 1
    # One position in each eighth of the context.
    assert (positions // 8192).tolist() == list(range(8))
    expected = (q[0, :, positions[2]].double() * 2**-0.5 * k[0, :, 5].double().repeat_interleave(2, 0)).sum(-1)
    assert torch.allclose(logits.z[0, :, 2, 5].double(), expected)


def test_rows_are_spread_over_samples_and_positions_and_move() -> None:
    met = set()
    for seed in range(400):
        rows = Queries.of((64, 2, 64, 64), 4096, seed, torch.device("cpu"))
        assert isinstance(rows.batch, Tensor)
        assert isinstance(rows.positions, Tensor)
        assert rows.positions.shape == (4, 8)
        # A causal row at the start sees one key only, so every observation reads early and late rows; and of each sample others.
        assert (rows.positions // 8 == torch.arange(8)).all()
        assert len({tuple(each) for each in rows.positions.tolist()}) == 4
        assert (rows.batch // 16 == torch.arange(4)).all()
        met |= {(sample, position) for sample, each in zip(rows.batch.tolist(), rows.positions.tolist(), strict=True) for position in each}
    assert {sample for sample, _ in met} == {position for _, position in met} == set(range(64))
    # 12800 of 4096 pairs of a sample and a position, drawn independently.
    assert len(met) == pytest.approx(4096 * (1 - math.exp(-12800 / 4096)), rel=0.02)
    full = Queries.of((3, 2, 5, 7), None, 9, torch.device("cpu"))
    assert (full.batch, full.positions) == (slice(0, 3), slice(0, 5))


@pytest.mark.parametrize("period", [2, 4])
def test_query_rows_of_any_pattern_over_samples_and_positions_are_met_evenly(period: int) -> None:
    """Whether a row is marked depends on sample and position at once: rows at the same positions of all samples would see one side only."""
    batch, queries = torch.arange(64).view(-1, 1), torch.arange(64)
    marks = {
        "sum": (batch + queries) % period,
        "blocks": (batch // period + queries // period) % 2,
        "product": (batch * queries + batch) % period,
        "positions": queries.expand(64, 64) % period,
        "samples": batch.expand(64, 64) % period,
    }
    for name, each in marks.items():
        marked = (each == 1).double()
        errors = []
        for turn in range(30):
            rows = Queries.of((64, 4, 64, 64), 65536, seed_of(turn, 0), torch.device("cpu"))
            errors.append(rows.pick(marked.view(64, 1, 64, 1)).mean().item() - marked.mean().item())
        n = 65536 // (4 * 64)
        # Rows of one sample depend on each other: of a pattern over samples alone there are 16 independent ones.
        deviation = 0.5 / math.sqrt(16 if name in ("samples", "product") else n)
        assert abs(sum(errors) / 30) <= 4 * deviation / math.sqrt(30), name
        assert max(map(abs, errors)) <= 4 * deviation, name


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), 3), ((2, 3, 4, 5), 1), ((4, 5), 1), ((5,), 0), ((2, 4, 5), 2)])
def test_a_softmax_over_any_axis(shape: tuple[int, ...], axis: int) -> None:
    z = torch.randn(*shape, dtype=torch.float64)
    logits = SoftmaxRows.of(z, axis, None, 0).logits(z)
    expected = z if z.ndim == 4 and axis == 3 else z.movedim(axis, -1).reshape(1, 1, -1, shape[axis])
    assert torch.equal(logits.z, expected)
    agree(logits, expected, torch.ones_like(expected, dtype=torch.bool))


HIDDEN = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) > 0.6
FILLS = (-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min, torch.finfo(torch.float16).min / 2, -1e9, -1e4)


@pytest.mark.parametrize("value", FILLS)
def test_keys_that_a_sum_hides_do_not_count(value: float) -> None:
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    masked = z + torch.zeros(4, 5, dtype=torch.float64).masked_fill(HIDDEN, value)
    agree(SoftmaxRows.of(z, 3, None, 0).logits(masked), z, ~HIDDEN)


@pytest.mark.parametrize("value", [*FILLS, -100.0])
def test_keys_that_float_masks_hide_do_not_count(value: float) -> None:
    """One mask, two that are added, and one that is added twice and clamped."""
    q, k, v = (torch.randn(2, 3, size, 8, dtype=torch.float64) for size in (4, 5, 5))
    one = torch.zeros(4, 5, dtype=torch.float64).masked_fill(HIDDEN, value)
    padding = torch.zeros(1, 5, dtype=torch.float64).masked_fill(torch.arange(5) == 4, value)
    for mask, hidden in ((one, HIDDEN), (one + padding, HIDDEN | (torch.arange(5) == 4)), ((one + one).clamp(min=value), HIDDEN)):
        logits = attention_logits(F.scaled_dot_product_attention, (q, k, v, mask), {}, None, 0)
        assert torch.equal(logits.visible.expand(1, 1, 4, 5)[0, 0], ~hidden)


@pytest.mark.parametrize("keys", [2048, 40_000])
@pytest.mark.parametrize("fill", [-math.inf, -1e4, torch.finfo(torch.float32).min])
def test_a_bias_that_falls_with_the_distance_is_no_mask(keys: int, fill: float) -> None:
    """ALiBi (Press et al. 2022): -slope * distance, with slopes of 2^-1 and less, beside a causal mask."""
    query = torch.tensor([keys - 1, keys // 2, 70])
    distance = query.unsqueeze(1) - torch.arange(keys)
    slopes = torch.tensor([0.5, 0.25, 2.0**-8]).view(3, 1, 1)
    # A fill that is not lower than the bias itself cannot be told from it.
    if fill == -1e4 and keys > 10_000:
        return
    bias = (-slopes * distance).masked_fill(distance < 0, 0) + torch.zeros(3, keys).masked_fill(distance < 0, fill)
    q, k = torch.randn(1, 3, 3, 4), torch.randn(1, 3, keys, 4)
    expected = (distance >= 0).expand(1, 3, 3, keys)
    logits = attention_logits(F.scaled_dot_product_attention, (q, k, k, bias), {}, None, 0)
    assert torch.equal(logits.visible.expand(1, 3, 3, keys), expected)
    assert torch.equal(SoftmaxRows.of(logits.z, 3, None, 0).logits(logits.z).visible, expected)


def test_a_row_that_sees_nothing_is_counted_where_torch_makes_nan_of_it() -> None:
    z = torch.randn(2, 3, 4, 5).index_fill(2, torch.tensor([1]), -math.inf)
    z[0, 0, 3, 2] = math.nan
    rows = SoftmaxRows.of(z, 3, None, 0)
    logits = rows.logits(z)
    row, heads = observe_softmax(logits.z, logits.visible, logits.elements, rows.scan(z, torch.softmax(z, -1)))
    assert row[COLUMN["nonfinite"]] == torch.softmax(z, -1).isnan().sum() == 2 * 3 * 5 + 5
    assert heads[0].tolist() == [5, 6, 6]
    mask = torch.ones(4, 5, dtype=torch.bool).index_fill(0, torch.tensor([1]), False)
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    attention = Attention.of(F.scaled_dot_product_attention, (q, k, k, mask), {})
    output = F.scaled_dot_product_attention(q, k, k, mask)
    for broken in (False, True):
        output[:, :, 1] = math.nan if broken else 0.0
        assert attention.scan(output)[0][0] == (2 * 3 * 5 if broken else 0)


@pytest.mark.parametrize("piece", [2**20, 300, 7])
def test_the_numbers_of_a_head_are_those_of_all_rows(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchsat.attention._PIECE", piece)
    q, k = torch.randn(3, 4, 40, 8), torch.randn(3, 2, 50, 8)
    q[1, :, 23] *= torch.tensor([30.0, 20.0, 10.0, 5.0]).view(4, 1)
    k[2, 1, 49] = math.nan
    masks: list[Tensor | None] = [None, torch.rand(3, 1, 40, 50) > 0.3, torch.zeros(40, 50).masked_fill(torch.rand(40, 50) > 0.5, -1e9)]
    for mask in masks:
        attention = Attention.of(F.scaled_dot_product_attention, (q, k, k, mask), {"enable_gqa": True})
        assert isinstance(attention.logits(attention.rows(100, 0)).elements, int)
        whole = attention.logits(attention.rows(None, 0))
        row, heads = observe_softmax(*vars(whole).values())
        found, every = attention.scan(F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True))
        assert torch.allclose(every, heads, rtol=1e-5, atol=1e-6)
        expected = [row[COLUMN[name]].item() for name in EXACT[:3]]
        assert found[:3].tolist() == pytest.approx(expected, rel=1e-6)
        # The softmax of the same logits, as a call of its own.
        z = whole.z.masked_fill(~whole.visible, -math.inf)
        a = torch.softmax(z, -1)
        rows = SoftmaxRows.of(z, 3, 64, 0)
        of_softmax, every = rows.scan(z, a)
        assert torch.allclose(every, heads, rtol=1e-5, atol=1e-6)
        assert of_softmax.tolist() == pytest.approx([a.isnan().sum().item(), *(row[COLUMN[name]].item() for name in EXACT[1:])], rel=1e-6)


def test_one_hot_even_and_broken_rows() -> None:
    z = torch.zeros(1, 3, 4, 8)
    z[:, 1, :, 0] = 1e4
    z[:, 2, 0, 0] = math.nan
    row, heads = observe_softmax(z, torch.ones(1, 1, 1, 1, dtype=torch.bool), 96)
    rows, entropy, jacobian, variance, log_keys, *_, largest = heads.tolist()
    assert rows == [4, 4, 3]
    assert [total / n for total, n in zip(entropy, rows, strict=True)] == pytest.approx([1, 0, 1])
    assert [total / n for total, n in zip(jacobian, rows, strict=True)] == pytest.approx([7 / 8, 0, 7 / 8])
    assert variance[1] / 4 == pytest.approx(1e8 * 7 / 64)
    assert largest == [0, 1e4, 0]
    assert log_keys == pytest.approx([n * math.log(8) for n in rows])
    # n, elements, non-finite
    assert row[:3].tolist() == [11 * 8, 96, 8]


def test_entropy_obeys_the_bound_of_zhai_et_al() -> None:
    """Rows of norm s: H >= ln(1 + (T-1) b) + s sqrt(T (T-1)) b / (1 + (T-1) b), b = exp(-s sqrt(T / (T-1))); equality at one key against all."""
    size, norm = 12, 5.0
    spike = torch.full((size,), -1 / (size - 1), dtype=torch.float64)
    spike[0] = 1.0
    spike *= norm / spike.norm()
    b = math.exp(-norm * math.sqrt(size / (size - 1)))
    bound = math.log(1 + (size - 1) * b) + norm * math.sqrt(size * (size - 1)) * b / (1 + (size - 1) * b)
    z = torch.randn(1, 1, 500, size, dtype=torch.float64)
    z = z / z.norm(dim=-1, keepdim=True) * norm
    z[0, 0, 0] = spike
    _, heads = observe_softmax(z[:, :, :1], torch.ones(1, 1, 1, 1, dtype=torch.bool), size)
    assert heads[1].item() * math.log(size) == pytest.approx(bound, rel=1e-12)
    each = [observe_softmax(z[:, :, at : at + 1], torch.ones(1, 1, 1, 1, dtype=torch.bool), size)[1][1].item() for at in range(500)]
    assert min(each) * math.log(size) >= bound * (1 - 1e-12)


def test_a_logit_that_is_nan_is_not_a_masked_one() -> None:
    z = torch.zeros(1, 1, 4, 8)
    z[0, 0, 1, 3] = math.nan
    logits = SoftmaxRows.of(z, 3, None, 0).logits(z)
    row, heads = observe_softmax(logits.z, logits.visible, logits.elements)
    assert row[:3].tolist() == [24, 32, 8]
    assert heads[0].item() == 3


def test_attention_that_broadcasts_its_queries() -> None:
    q, k = torch.randn(1, 4, L, 8, dtype=torch.float64), torch.randn(3, 4, S, 8, dtype=torch.float64)
    v = torch.eye(S, dtype=torch.float64).expand(3, 4, S, S)
    p = F.scaled_dot_product_attention(q.expand(3, -1, -1, -1), k, v)
    logits = attention_logits(F.scaled_dot_product_attention, (q, k, v), {}, None, 0)
    assert torch.allclose(torch.softmax(logits.z, -1), p, rtol=1e-12, atol=1e-12)
    assert logits.elements == 3 * 4 * L * S


def test_a_mask_of_another_kind_is_refused() -> None:
    from torch.nn.attention.bias import causal_upper_left

    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(NotRebuiltError, match="its mask is a CausalBias"):
        attention_logits(F.scaled_dot_product_attention, (q, q, q, causal_upper_left(4, 4)), {}, None, 0)
