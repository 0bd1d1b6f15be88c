"""Which weights feed a site, by which axis, and how large they are: for every way in which a module or a function uses a weight."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.training import loop_of
from tests.truth import known, one_step
from torchsat.observe.meter import unit_axis


class Uses(nn.Module):
    """A model whose forward is a function of itself and x."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def __init__(self, forward: Callable[["Uses", Tensor], Tensor], **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def gain(weight: Tensor, fan_in: int) -> float:
    return weight.detach().double().square().mean().sqrt().item() * math.sqrt(fan_in)


FED: Mapping[str, tuple[Uses, Tensor, str, int, str]] = {
    "matmul": (Uses(lambda m, x: torch.relu(x @ m.w), w=parameter(5, 6)), torch.randn(4, 5), "w", 5, "w"),
    "called weight": (Uses(lambda m, x: torch.relu(x @ m.weight), weight=parameter(5, 6)), torch.randn(4, 5), "weight", 5, "weight"),
    "weight first": (Uses(lambda m, x: torch.relu(m.w @ x), w=parameter(6, 5)), torch.randn(5, 4), "w", 5, "w"),
    "linear": (Uses(lambda m, x: torch.relu(F.linear(x, m.w)), w=parameter(6, 5)), torch.randn(2, 4, 5), "w", 5, "w"),
    "addmm": (Uses(lambda m, x: torch.relu(torch.addmm(m.b, x, m.w)), w=parameter(5, 6), b=parameter(6)), torch.randn(4, 5), "w", 5, "w"),
    "einsum": (Uses(lambda m, x: torch.relu(torch.einsum("btc,cd->btd", x, m.w)), w=parameter(5, 6)), torch.randn(2, 4, 5), "w", 5, "w"),
    "experts": (Uses(lambda m, x: torch.relu(torch.bmm(x, m.w)), w=parameter(3, 5, 6)), torch.randn(3, 4, 5), "w", 5, "w"),
    "one expert": (Uses(lambda m, x: torch.relu(F.linear(x, m.w[1])), w=parameter(3, 6, 5)), torch.randn(4, 5), "w", 5, "w"),
    "chunk of a weight": (Uses(lambda m, x: torch.relu(F.linear(x, m.w.chunk(2)[1])), w=parameter(6, 5)), torch.randn(4, 5), "w", 5, "w"),
    "cast weight": (Uses(lambda m, x: torch.relu(x @ m.w.double()), w=parameter(5, 6)), torch.randn(4, 5).double(), "w", 5, "w"),
    "own convolution": (Uses(lambda m, x: torch.relu(F.conv1d(x, m.w)), w=parameter(6, 5, 3)), torch.randn(2, 5, 7), "w", 15, "w"),
    "list": (
        Uses(lambda m, x: torch.relu(x @ m.ws[1]), ws=nn.ParameterList([parameter(2, 2), parameter(5, 6)])),
        torch.randn(4, 5),
        "ws.1",
        5,
        "ws.1",
    ),
    "embedding": (Uses(lambda m, x: torch.relu(m.e(x)), e=nn.Embedding(9, 6)), torch.randint(9, (4,)), "e", 1, "e.weight"),
    "bilinear": (Uses(lambda m, x: torch.relu(m.b(x, x)), b=nn.Bilinear(5, 5, 6)), torch.randn(4, 5), "b", 25, "b.weight"),
    "added position": (Uses(lambda m, x: torch.relu((x + m.p) @ m.w), w=parameter(5, 6), p=parameter(4, 5)), torch.randn(4, 5), "w", 5, "w"),
    "graph": (Uses(lambda m, x: torch.relu(torch.eye(4) @ (x @ m.w)), w=parameter(5, 6)), torch.randn(4, 5), "w", 5, "w"),
    "graph with learned nodes": (Uses(lambda m, x: torch.relu(x @ (m.e @ m.w)), w=parameter(5, 6), e=parameter(4, 5)), torch.eye(4), "w", 5, "w"),
}


@pytest.mark.parametrize("case", FED)
def test_a_parameter_that_is_used_as_a_weight_is_measured(case: str) -> None:
    model, x, name, fan_in, path = FED[case]
    (weight,) = one_step(model, x=x).weights
    used = dict(model.named_parameters())[path]
    assert (weight.name, weight.fan_in, len(weight.feeds), weight.parameter) == (name, fan_in, 1, name == path)
    assert weight.gain == pytest.approx(gain(used, fan_in), rel=1e-5)
    assert weight.grad_norm == pytest.approx(known(used.grad).norm().item(), rel=1e-5)


COMPUTED: Mapping[str, tuple[Uses, Tensor]] = {
    "weight norm": (
        Uses(lambda m, x: torch.relu(F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True))), v=parameter(6, 5), g=parameter(6, 1)),
        torch.randn(4, 5),
    ),
    "merged LoRA": (
        Uses(lambda m, x: torch.relu(F.linear(x, m.w + m.b @ m.a)), w=parameter(6, 5), a=parameter(2, 5), b=parameter(6, 2)),
        torch.randn(4, 5),
    ),
    "parametrization": (Uses(lambda m, x: torch.relu(m.l(x)), l=nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))), torch.randn(4, 5)),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_weight_that_is_computed_from_parameters_has_no_gain(case: str) -> None:
    """What enters the product is not the parameter, so that the gain of the parameter would be a number of something else."""
    model, x = COMPUTED[case]
    assert one_step(model, x=x).weights == ()


def fed(model: nn.Module, x: Tensor) -> dict[str, tuple[str, ...]]:
    return {weight.name: weight.feeds for weight in one_step(model, x=x).weights}


def test_no_layer_is_guessed_by_the_order_in_which_layers_run() -> None:
    """The tanh runs after the linear layer, and a parameter feeds it. A tanh behind a ReLU with nothing between is fed by no layer at all."""
    model = Uses(lambda m, x: torch.tanh(torch.relu(m.l(x)) @ m.w), l=nn.Linear(5, 6), w=parameter(6, 7))
    assert fed(model, torch.randn(4, 5)) == {"l": ("relu",), "w": ("tanh",)}
    assert fed(Uses(lambda m, x: torch.tanh(torch.relu(m.l(x))), l=nn.Linear(5, 6)), torch.randn(4, 5)) == {"l": ("relu",)}
    assert fed(Uses(lambda m, x: torch.tanh(x) + 0 * m.l(x).sum(), l=nn.Linear(5, 6)), torch.randn(4, 5)) == {}


@pytest.mark.parametrize("frozen", [False, True])
def test_every_way_back_leads_to_a_weight(frozen: bool) -> None:
    """LoRA: z = base(x) + B(A(x)). A base that does not learn is found by the node of its output."""
    linear = {name: nn.Linear(6, 6) for name in ("first", "base", "a", "b")}
    linear["base"].requires_grad_(not frozen)

    def forward(m: Uses, x: Tensor) -> Tensor:
        x = torch.relu(m.first(x))
        return torch.tanh(m.base(x) + m.b(m.a(x)))

    assert fed(Uses(forward, **linear), torch.randn(4, 6)) == {"first": ("relu",), "base": ("tanh",), "b": ("tanh",)}


def test_what_a_skip_connection_carries_from_another_site_is_not_fed_by_its_layer() -> None:
    def forward(m: Uses, x: Tensor) -> Tensor:
        x = torch.relu(m.one(x))
        return torch.relu(m.norm(m.two(x)) + x)

    model = Uses(forward, one=nn.Linear(6, 6), two=nn.Linear(6, 6), norm=nn.BatchNorm1d(6))
    assert fed(model, torch.randn(4, 6)) == {"one": ("relu",), "two": ("relu_1",)}


def test_the_layers_that_write_to_a_stream_feed_what_reads_it() -> None:
    def forward(m: Uses, x: Tensor) -> Tensor:
        h = m.enter(x)
        for block in (m.one, m.two):
            h = h + block(h)
        return torch.tanh(m.norm(h))

    model = Uses(forward, enter=nn.Linear(5, 6), one=nn.Linear(6, 6), two=nn.Linear(6, 6), norm=nn.LayerNorm(6))
    assert fed(model, torch.randn(4, 5)) == dict.fromkeys(("enter", "one", "two"), ("tanh",))


def test_tied_weights_have_the_gain_of_neither_use() -> None:
    """As an embedding one output is a copy of one element, as the last layer a sum of six."""

    def forward(m: Uses, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(torch.relu(m.l(torch.sigmoid(m.e(x)))), m.e.weight))

    assert fed(Uses(forward, e=nn.Embedding(9, 6), l=nn.Linear(6, 6)), torch.randint(9, (4,))) == {"l": ("relu",)}


UNITS: Mapping[str, tuple[Uses, tuple[int, ...], int]] = {
    "[B, L, C]": (Uses(lambda m, x: torch.relu(m.l(x)), l=nn.Linear(5, 7)), (7, 9, 5), 2),
    "[L, B, C] of the size of L": (Uses(lambda m, x: torch.relu(m.l(x)), l=nn.Linear(5, 7)), (9, 7, 5), 2),
    "[B, C, L] behind a transpose": (Uses(lambda m, x: torch.relu(m.l(x).transpose(1, 2)), l=nn.Linear(5, 7)), (7, 7, 5), 1),
    "[B, H, W, C] of a linear layer": (Uses(lambda m, x: torch.relu(m.l(x)), l=nn.Linear(5, 7)), (7, 7, 7, 5), 3),
    "Conv1d": (Uses(lambda m, x: torch.relu(m.c(x)), c=nn.Conv1d(5, 7, 1)), (7, 5, 7), 1),
    "[B, H, W, C] of a convolution": (Uses(lambda m, x: torch.relu(m.c(x).permute(0, 2, 3, 1)), c=nn.Conv2d(5, 7, 1)), (7, 5, 7, 7), 3),
    "[B, HW, C] with B = C": (Uses(lambda m, x: torch.relu(m.c(x).flatten(2).transpose(1, 2)), c=nn.Conv2d(5, 8, 1)), (8, 5, 4, 2), 2),
    "[B, C, HW] with HW = C": (Uses(lambda m, x: torch.relu(m.c(x).flatten(2)), c=nn.Conv2d(5, 8, 1)), (3, 5, 4, 2), 1),
    "pooled": (Uses(lambda m, x: torch.relu(m.b(F.max_pool2d(m.c(x), 2)).mean(2)), c=nn.Conv2d(5, 8, 1), b=nn.BatchNorm2d(8)), (8, 5, 4, 16), 1),
    "weight first": (Uses(lambda m, x: torch.relu(m.w @ x), w=parameter(6, 5)), (5, 6), 0),
    "lazy": (Uses(lambda m, x: torch.relu(m.l(x).mT), l=nn.LazyLinear(7)), (7, 7, 5), 1),
    "without a graph": (Uses(lambda m, x: torch.relu(m.c(x)), c=nn.Conv1d(5, 7, 1).requires_grad_(False)), (7, 5, 7), 1),
    "flattened": (Uses(lambda m, x: torch.relu(m.c(x).flatten(1)), c=nn.Conv1d(5, 3, 1)), (4, 5, 7), 1),
    "heads": (Uses(lambda m, x: torch.relu(m.l(x).view(3, 7, 2, 4).transpose(1, 2)), l=nn.Linear(5, 8)), (3, 7, 5), 1),
}


@pytest.mark.parametrize("case", UNITS)
def test_the_units_lie_where_the_outputs_of_the_layer_do(case: str) -> None:
    model, shape, axis = UNITS[case]
    z = model(torch.randn(shape))
    monitor = torchsat.watch(model, errors="raise")
    observation = known(loop_of(monitor).observer.observation)
    model(torch.randn(shape))
    site = observation.sites.ran["relu"]
    assert (unit_axis(site, tuple(z.shape)), site.units) == (axis, z.shape[axis])


def test_each_part_of_a_fused_projection_has_its_own_gain() -> None:
    """GPT-2's attention in one layer for queries, keys and values, and a gated unit whose first half is the gate."""

    def forward(m: Uses, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in m.qkv(x).split(8, -1))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        gate, value = m.up(x).chunk(2, -1)
        return F.glu(m.glu(F.silu(gate) * value))

    model = Uses(forward, qkv=nn.Linear(8, 24), up=nn.Linear(8, 12), glu=nn.Linear(6, 10))
    with torch.no_grad():
        model.qkv.weight[8:16] *= 5
    weights = {weight.name: weight for weight in one_step(model, x=torch.randn(2, 5, 8)).weights}
    expected = {"qkv/0-7": (0, 8, "qkv"), "qkv/8-15": (8, 16, "qkv"), "up/0-5": (0, 6, "up"), "glu/5-9": (5, 10, "glu")}
    assert set(weights) == {"qkv", "up", "glu", *expected}
    for name, (first, last, layer) in expected.items():
        rows = model.get_parameter(f"{layer}.weight")[first:last]
        assert weights[name].gain == pytest.approx(gain(rows, rows.shape[1]), rel=1e-5), name
        assert weights[name].input_rms == weights[layer].input_rms
        assert weights[name].whole == layer
        assert weights[name].feeds == weights[layer].feeds
    # A rotation of the halves of each head, as rotary positions make it, takes no part out.
    rotary = Uses(lambda m, x: torch.relu(m.l(x) + torch.cat([m.l(x)[:, 4:], m.l(x)[:, :4]], -1)), l=nn.Linear(8, 8))
    assert set(fed(rotary, torch.randn(3, 8))) == {"l"}


def test_attention_of_torch_is_fed_by_its_own_projections() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    weights = {weight.name: weight for weight in one_step(model, x=torch.randn(2, 5, 8)).weights}
    assert set(weights) == {"linear1", *(f"self_attn.in_proj_weight{part}" for part in ("", "/q", "/k"))}
    fused = model.self_attn.in_proj_weight
    assert weights["self_attn.in_proj_weight/k"].gain == pytest.approx(gain(known(fused)[8:16], 8), rel=1e-5)
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    snapshot = one_step(apart, lambda m: m(torch.randn(2, 5, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 6))[0])
    assert {weight.name: weight.fan_in for weight in snapshot.weights} == {"q_proj_weight": 8, "k_proj_weight": 6}


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, ("input", "forget", "cell", "output")), (nn.GRU, ("reset", "update", "new"))])
def test_each_gate_of_a_recurrent_layer_has_the_gain_of_its_rows(kind: type[nn.LSTM | nn.GRU], gates: tuple[str, ...]) -> None:
    model = nn.ModuleDict({"rnn": kind(5, 4)})
    with torch.no_grad():
        model.get_parameter("rnn.weight_ih_l0")[4:8] *= 20
    snapshot = one_step(model, lambda m: m["rnn"](torch.randn(3, 6, 5))[0])
    weights = {weight.name: weight for weight in snapshot.weights}
    for at, gate in enumerate(gates):
        for matrix, fan_in in (("weight_ih_l0", 5), ("weight_hh_l0", 4)):
            part = weights[f"rnn.{matrix}/{gate}"]
            assert part.gain == pytest.approx(gain(model.get_parameter(f"rnn.{matrix}")[4 * at : 4 * at + 4], fan_in), rel=1e-5)
            assert part.feeds == (f"rnn.l0/{gate}",)


def test_gpt2_and_mixtral_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(90, (2, 7))
    gpt2 = transformers.GPT2Config(vocab_size=100, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2Model(gpt2)
    snapshot = one_step(model, lambda m: m(tokens).last_hidden_state)
    weights = {weight.name: weight for weight in snapshot.weights}
    assert set(weights) == {"h.0.mlp.c_fc", *(f"h.0.attn.c_attn{part}" for part in ("", "/0-15", "/16-31"))}
    assert weights["h.0.attn.c_attn/16-31"].gain == pytest.approx(gain(model.h[0].attn.c_attn.weight[:, 16:32], 16), rel=1e-5)
    assert weights["h.0.mlp.c_fc"].gain == pytest.approx(gain(model.h[0].mlp.c_fc.weight, 16), rel=1e-5)
    assert weights["h.0.mlp.c_fc"].input_n == 2 * 7 * 16
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    mixtral = transformers.MixtralModel(transformers.MixtralConfig(vocab_size=100, num_hidden_layers=1, max_position_embeddings=32, **sizes))
    snapshot = one_step(mixtral, lambda m: m(tokens).last_hidden_state)
    feeding = {weight.name for weight in snapshot.weights if "layers.0.mlp.experts.act_fn" in weight.feeds}
    assert feeding == {"layers.0.mlp.experts.gate_up_proj"}
