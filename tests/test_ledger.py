"""The ledger of the gradient: its factors against torch.autograd.grad, their product against the whole, and what is known of deep networks."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsat
from torchsat.ledger import Entry, Kind, Ledger, decode_top
from torchsat.observe import way
from torchsat.observe.stream import observe_stream

CLOSE = 1e-9


class Sum(nn.Module):
    """A residual block of any branch, with its norm before the branch, after the sum, or not at all."""

    def __init__(self, width: int, branch: Callable[[int], nn.Module], before: bool, after: bool) -> None:
        super().__init__()
        self.before = nn.LayerNorm(width) if before else nn.Identity()
        self.branch = branch(width)
        self.after = nn.LayerNorm(width) if after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(x + self.branch(self.before(x)))
        return out


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        out: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Transformer(nn.Module):
    def __init__(self, blocks: int, before: bool, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.place = nn.Parameter(torch.randn(1, 6, width) * 0.1)
        self.blocks = nn.Sequential(
            *(Sum(width, branch, before, not before) for _ in range(blocks) for branch in (Attend, feed_forward)),
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.place)))
        return out


class Down(nn.Module):
    """A residual block of convolutions whose skip connection halves the picture."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(before, after, 3, 2, 1), nn.Conv2d(after, after, 3, padding=1)
        self.norm, self.skip = nn.BatchNorm2d(after), nn.Conv2d(before, after, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.two(torch.relu(self.one(x)))) + self.skip(x))


class InTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 8)
        for each in x.unbind(1):
            h, c = self.cell(each, (h, c))
        out: Tensor = self.head(h)
        return out


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def cnn() -> nn.Module:
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(8, 4))


def resnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Down(4, 8), Down(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def pixels() -> Tensor:
    return torch.randn(3, 3, 16, 16).double()


def words() -> Tensor:
    return torch.randint(0, 11, (3, 6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(7, 5).double()),
    "cnn": (cnn, pixels),
    "resnet": (resnet, pixels),
    "pre-LN transformer": (lambda: Transformer(3, before=True), words),
    "post-LN transformer": (lambda: Transformer(3, before=False), words),
    "LSTM in time": (InTime, lambda: torch.randn(4, 9, 3).double()),
}


def ledger_of(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = lambda out: out.square().mean(), **options: Any) -> Ledger:
    """The ledger of one step that changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchsat.watch(model, errors="raise", every=1, **options) as monitor:
        loss(model(x)).backward()
        optimizer.step()
    optimizer.zero_grad()
    assert monitor.latest is not None
    assert monitor.latest.ledger is not None
    return monitor.latest.ledger


def directly(model: nn.Module, x: Tensor) -> dict[str, tuple[float, float | None]]:
    """For each call of a module, ||dL/d(output)|| and ||dL/d(input)||, by torch.autograd.grad. A module that is called again is left out."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    again = set[str]()

    def note(name: str, given: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        again.update({name} & seen.keys())
        seen[name] = (out, given[0])

    handles = [each.register_forward_hook(lambda m, given, out, name=name: note(name, given, out)) for name, each in model.named_modules()]
    loss = model(x).square().mean()
    for handle in handles:
        handle.remove()

    def norm(tensor: Tensor) -> float | None:
        if not tensor.requires_grad:
            return None
        (grad,) = torch.autograd.grad(loss, [tensor], retain_graph=True)
        return float(grad.double().norm())

    found = {name: (norm(out), norm(given)) for name, (out, given) in seen.items() if name not in again}
    return {name: (out, given) for name, (out, given) in found.items() if out is not None}


def measured(name: str) -> tuple[Ledger, dict[str, tuple[float, float | None]]]:
    """The ledger of one of MODELS, and what `directly` finds in the same model."""
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model, x = make().double(), batch()
    return ledger_of(model, x), directly(model, x)


@pytest.mark.parametrize("name", MODELS)
def test_the_factors_of_the_spine_multiply_to_that_of_the_whole_way(name: str) -> None:
    ledger, known = measured(name)
    factors = [each.factor for each in ledger.spine]
    assert None not in factors
    product = math.prod(each or 0.0 for each in factors)
    assert ledger.factor == pytest.approx(product, rel=CLOSE)
    # The two ends, independently: the output of the model, and that of the first module that made a gradient.
    assert ledger.norm == pytest.approx(known[""][0], rel=CLOSE)
    first = {"mlp": "0", "cnn": "0", "resnet": "0"}.get(name, "embed")
    if name != "LSTM in time":
        assert ledger.end == pytest.approx(known[first][0], rel=CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_each_factor_is_what_autograd_gives(name: str) -> None:
    ledger, known = measured(name)
    checked = 0
    for entry in ledger.entries:
        before, after = known.get(entry.place, (None, None))
        if before is None or entry.kind is Kind.STEP:
            continue
        assert entry.norm == pytest.approx(before, rel=CLOSE), entry.place
        # The input of a norm in a branch gets what comes by the skip connection too.
        if after is not None and entry.level == 0:
            assert entry.factor == pytest.approx(after / before, rel=CLOSE), entry.place
        checked += 1
    assert checked >= {"LSTM in time": 1, "resnet": 8, "cnn": 7, "mlp": 7}.get(name, 20)


def test_an_lstm_in_time_has_one_step_for_each_cell() -> None:
    """Each ends where autograd has the gradient of the state: h and c, of which c is given what does not come by h."""
    torch.manual_seed(0)
    model, x = InTime().double(), torch.randn(4, 9, 3).double()
    steps = [each for each in ledger_of(model, x).spine if each.kind is Kind.STEP]
    # The first one in time holds the first two cells: the state before these is constant.
    assert [each.place for each in steps] == [f"cell/step_{at}" for at in range(7, -1, -1)]
    h = c = x.new_zeros(4, 8)
    states = []
    for each in x.unbind(1):
        h, c = (state.detach().requires_grad_() for state in model.cell(each, (h, c)))
        states.append((h, c))
    # Backwards by hand, each cell by itself.
    (grad_h,) = torch.autograd.grad(model.head(states[-1][0]).square().mean(), [states[-1][0]])
    grad_c = torch.zeros_like(grad_h)
    assert steps[0].norm == pytest.approx(float(grad_h.norm()), rel=CLOSE)
    for at, step in zip(range(8, 1, -1), steps[1:], strict=True):
        new = model.cell(x[:, at], states[at - 1])
        grad_h, grad_c = torch.autograd.grad(new, states[at - 1], [grad_h, grad_c])
        assert step.norm == pytest.approx(math.hypot(float(grad_h.norm()), float(grad_c.norm())), rel=CLOSE), at


def test_a_join_tells_what_its_branch_passes_on_beside_the_skip_connection() -> None:
    """A block x + w x passes on 1 + w times the gradient, of which the branch gives w."""

    class Scale(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.25 * torch.eye(width))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = nn.Sequential(nn.Linear(3, 3), Sum(3, Scale, before=False, after=False), nn.Tanh()).double()
    join = next(each for each in ledger_of(model, torch.randn(5, 3).double()).spine if each.kind is Kind.JOIN)
    assert join.place == "1/add"
    assert join.factor == pytest.approx(1.25, rel=CLOSE)
    assert join.branch == pytest.approx(0.25, rel=CLOSE)


def test_micro_batches_and_a_sum_of_losses_merge() -> None:
    """Squares of norms add up over micro-batches; an output that the loss sums has an expanded gradient, which is not copied."""
    torch.manual_seed(0)
    model, x = mlp().double(), torch.randn(8, 5).double()
    whole = ledger_of(model, x, lambda out: out.sum())
    assert whole.norm == pytest.approx(math.sqrt(24), rel=CLOSE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchsat.watch(model, errors="raise") as monitor:
        for half in x.chunk(2):
            model(half).sum().backward()
        optimizer.step()
    assert monitor.latest is not None
    halves = monitor.latest.ledger
    assert halves is not None
    assert [each.factor for each in halves.entries] == [pytest.approx(each.factor, rel=CLOSE) for each in whole.entries]


def test_a_vanishing_gradient_is_measured_below_the_range_of_float32_squares() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *(part for _ in range(40) for part in (nn.Sigmoid(), nn.Linear(4, 4))))
    ledger = ledger_of(model, torch.randn(4, 4))
    assert ledger.end is not None
    assert 0 < ledger.end < 1e-25
    totals = {total.kind: total for total in ledger.totals()}
    assert totals[Kind.ACTIVATION].count == 40
    assert totals[Kind.ACTIVATION].factor < 0.25**40


def test_glorot_and_bengio_a_default_initialisation_takes_a_third_of_the_variance_by_layer() -> None:
    """Glorot and Bengio 2010: with W uniform in +-1/sqrt(n), n Var(W) = 1/3, so that a layer of a tanh network near 0 passes on 0.577 of the norm.
    Their initialisation, with Var(W) = 1/n, passes on all of it."""
    torch.manual_seed(0)

    def net(gain: float) -> nn.Module:
        layers = [nn.Linear(200, 200, bias=False) for _ in range(8)]
        for layer in layers:
            nn.init.uniform_(layer.weight, -gain / math.sqrt(200), gain / math.sqrt(200))
        return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))

    x = 0.01 * torch.randn(300, 200)
    for gain, expected in ((1.0, 1 / math.sqrt(3)), (math.sqrt(3), 1.0)):
        layers = [each.factor for each in ledger_of(net(gain), x, lambda out: (out * torch.randn_like(out)).sum()).spine if each.kind is Kind.LAYER]
        assert len(layers) == 7
        assert layers == [pytest.approx(expected, rel=0.05)] * 7
        totals = {total.kind: total.factor for total in ledger_of(net(gain), x).totals()}
        assert totals[Kind.ACTIVATION] == pytest.approx(1.0, abs=0.01)


def test_the_curse_of_depth_deep_blocks_before_whose_branch_a_norm_stands_become_the_identity() -> None:
    """Sun et al. 2025 (arXiv 2502.05795): the stream of a pre-LN transformer grows with depth, and the gradient of each branch is divided by its
    size. Their cure multiplies the output of the norm of block l by 1 / sqrt(l)."""
    torch.manual_seed(0)

    class Shrunk(nn.LayerNorm):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    def net(cured: bool) -> nn.Sequential:
        def branch(width: int) -> nn.Module:
            layers = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            for layer in layers:
                nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
            return nn.Sequential(layers[0], nn.ReLU(), layers[1])

        blocks = [Sum(64, branch, before=True, after=False) for _ in range(24)]
        for at, block in enumerate(blocks):
            block.before = Shrunk(64)
            block.before.scale = 1 / math.sqrt(at + 1) if cured else 1.0
        return nn.Sequential(nn.Linear(64, 64), *blocks)

    x = torch.randn(64, 64) * math.sqrt(3)
    plain, cured = (ledger_of(net(each), x, lambda out: (out * torch.randn_like(out)).sum()) for each in (False, True))
    of_norms = [each for each in plain.entries if each.kind is Kind.NORM][::-1]
    joins = [each for each in plain.spine if each.kind is Kind.JOIN][::-1]
    assert len(of_norms) == len(joins) == 24
    # The stream: each branch adds a variance of about 2 to that of the first layer, which is 1.
    sizes = [each.input_rms for each in of_norms]
    assert sizes == [pytest.approx(math.sqrt(1 + 2 * at), rel=0.15) for at in range(24)]
    # What a norm passes on is divided by the size of its input.
    assert [(each.factor or 0.0) * (each.input_rms or 0.0) for each in of_norms] == [pytest.approx(1.0, rel=0.1)] * 24
    # So the branch of block l gives sqrt(2 / (1 + 2 l)) of what the skip connection gives, and the factor of the block goes to 1.
    assert [each.branch for each in joins] == [pytest.approx(math.sqrt(2 / (1 + 2 * at)), rel=0.25) for at in range(24)]
    assert (joins[0].factor or 0.0) > 1.5
    assert joins[-1].factor == pytest.approx(1.0, abs=0.05)
    after = [each.input_rms or 0.0 for each in cured.entries if each.kind is Kind.NORM][::-1]
    assert after[-1] < 0.5 * (sizes[-1] or 0.0)


def test_the_largest_channel_of_the_stream_is_found_wherever_it_stands() -> None:
    x = torch.randn(4, 5, 6)
    x[2, 3, 1] = -345.5
    sums, top = observe_stream(x, 2)
    assert sums.squeeze(1).tolist() == [120.0, pytest.approx(float(x.double().square().sum()), rel=1e-12)]
    assert decode_top(float(top)) == (345.5, 1)
    assert decode_top(float(observe_stream(x, 1)[1])) == (345.5, 3)
    assert decode_top(-math.inf) == (None, None)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh())
    (norm,) = [each for each in ledger_of(model, torch.randn(3, 5)).entries if each.kind is Kind.NORM]
    assert norm.place == "1"
    assert (norm.input_rms or 0.0) > 0
    assert norm.top_channel in range(8)


def test_a_ledger_survives_json_and_totals_leave_out_what_is_not_known() -> None:
    entries = (
        Entry("2/add", Kind.JOIN, 0, None, 2.0, 0.5, 0.1),
        Entry("2.act", Kind.ACTIVATION, 1, "2/add", 2.0, 0.25),
        Entry("1", Kind.NORM, 0, None, 1.0, 0.5, input_rms=2.0, input_top=8.0, top_channel=3),
        Entry("0", Kind.LAYER, 0, None, 0.5, None),
    )
    ledger = Ledger((*entries[:3], replace(entries[3], factor=0.5)))
    assert [(each.kind, each.count) for each in ledger.totals()] == [(Kind.JOIN, 1), (Kind.NORM, 1), (Kind.LAYER, 1)]
    assert [each.factor for each in ledger.totals()] == [pytest.approx(0.5)] * 3
    assert ledger.end == pytest.approx(0.25)
    ledger = Ledger(entries)
    assert Ledger.from_dict(json.loads(json.dumps(ledger.as_dict()))) == ledger
    assert (ledger.norm, ledger.end, ledger.factor) == (2.0, None, None)
    assert ledger.inside("2/add") == entries[1:2]
    assert [each.kind for each in ledger.totals()] == [Kind.JOIN, Kind.NORM]


def test_training_is_bit_identical_and_a_graph_that_changes_is_learned_again() -> None:
    class Random(nn.Module):
        """Runs its second layer in every other step."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.steps = nn.Linear(4, 4), nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            x = torch.tanh(self.one(x))
            return torch.tanh(self.two(x)) if self.steps % 2 else x

    def train(watched: bool) -> tuple[list[Tensor], list[torchsat.Snapshot]]:
        torch.manual_seed(0)
        model, kept = Random(), list[torchsat.Snapshot]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = torchsat.watch(model, errors="raise", every=1, budget=None, sinks=[kept.append]) if watched else None
        for _ in range(8):
            model(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor is not None:
            monitor.close()
        return [each.detach().clone() for each in model.parameters()], kept

    (bare, _), (watched, kept) = train(False), train(True)
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))
    places = [None if each.ledger is None else [entry.place for entry in each.ledger.spine] for each in kept]
    # The second graph is new to the second observation, which did not follow the modules; the next one that has it does.
    assert places[0] == ["tanh_1", "two", "tanh"]
    assert places[1] is None
    assert places[-1] == ["tanh"]


def test_a_ledger_is_read_back_from_the_event_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, kept = Transformer(1, before=True), list[torchsat.Snapshot]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, tmp_path, errors="raise", every=1, sinks=[kept.append]):
        for _ in range(3):
            model(words()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    found = torchsat.read(tmp_path)
    assert [each.ledger for each in found] == [each.ledger for each in kept]
    assert found[0].ledger is not None
    assert [each.kind for each in found[0].ledger.spine[:3]] == [Kind.LAYER, Kind.NORM, Kind.JOIN]


def test_a_graph_with_too_many_nodes_has_no_ledger_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(way, "_MOST_NODES", 20)
    model, kept = Transformer(1, before=True), list[torchsat.Snapshot]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchsat.watch(model, errors="raise", every=1, sinks=[kept.append]) as monitor:
        for _ in range(2):
            model(words()).square().mean().backward()
            optimizer.step()
    assert [each.ledger for each in kept] == [None, None]
    assert ("ledger", way.TOO_LARGE) in monitor.coverage.unseen


class Biased(nn.Module):
    """Attention with a bias for each pair of positions, which is the same for all samples."""

    def __init__(self, kind: str, width: int = 16, length: int = 6) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.table, self.pairs = nn.Embedding(2 * length, 2), nn.Parameter(torch.randn(2, length, length))
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def bias(self, length: int) -> Tensor:
        apart = torch.arange(length)[:, None] - torch.arange(length) + length
        if self.kind == "table":
            return self.table(apart).permute(2, 0, 1).unsqueeze(0)  # type: ignore[no-any-return]
        if self.kind == "net":
            return self.net(apart.to(self.pairs.dtype)[..., None]).permute(2, 0, 1)  # type: ignore[no-any-return]
        return self.pairs

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(self.norm(x)).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        bias = self.bias(x.shape[1])
        if self.kind == "mask":
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(x), -1, -1, -1))
        else:
            attended = torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v
        out: Tensor = x + self.out(attended.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("kind", ["table", "net", "pairs", "mask"])
def test_what_is_the_same_for_all_samples_is_no_input(kind: str, blocks: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), *(Biased(kind) for _ in range(blocks)), nn.Linear(16, 3)).double()
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    ledger = torchsat.probe(model, x, loss=lambda out: out.square().mean()).ledger
    assert ledger is not None
    assert [each.place for each in ledger.spine] == [f"{blocks + 1}", *(f"{at}/add" for at in range(blocks, 0, -1))]
    entered = model[0](x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model[1:](entered).square().mean(), entered)
    last = ledger.spine[-1]
    assert last.norm is not None
    assert last.factor is not None
    assert last.norm * last.factor == pytest.approx(expected.norm().item(), rel=CLOSE)


@pytest.mark.parametrize("kind", ["spectral_norm", "orthogonal", "weight_norm"])
def test_what_makes_a_weight_is_not_on_the_way(kind: str) -> None:
    wrap: Callable[[nn.Module], nn.Module] = getattr(torch.nn.utils.parametrizations, kind)
    model = nn.Sequential(wrap(nn.Linear(16, 16)), nn.Tanh(), wrap(nn.Linear(16, 4)))
    ledger = torchsat.probe(model, torch.randn(32, 16), loss=lambda out: out.square().mean()).ledger
    assert ledger is not None
    assert [each.kind for each in ledger.spine][:2] == [Kind.LAYER, Kind.ACTIVATION]
    assert len(ledger.spine) <= 3


def test_a_derivative_inside_the_loss_is_not_taken_for_the_gradient_of_the_loss() -> None:
    """As in a physics-informed network, whose loss has a derivative of its output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.linspace(0, 1, 32, dtype=torch.float64)[:, None].requires_grad_()
    with torchsat.watch(model, every=1, budget=None, errors="raise") as monitor:
        for _ in range(3):
            u = model(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            loss = (u - torch.sin(x)).square().mean() + (slope - torch.cos(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert monitor.latest is not None
    ledger = monitor.latest.ledger
    assert ledger is not None
    # The derivative does not depend on u itself, so that only the first term reaches u.
    expected = 2 * (u - torch.sin(x)).detach().norm().item() / 32
    assert ledger.spine[0].norm == pytest.approx(expected, rel=CLOSE)


def test_a_gradient_of_the_inputs_before_the_step_leaves_the_ledger_of_the_step() -> None:
    """As in adversarial training: the first graph ends at inputs that want a gradient, and the second one does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.randint(3, (16,))
    with torchsat.watch(model, every=1, budget=None, errors="raise") as monitor:
        for _ in range(3):
            x = torch.randn(16, 8, dtype=torch.float64).requires_grad_()
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), x)
            out = model((x + 0.1 * slope.sign()).detach())
            out.retain_grad()
            optimizer.zero_grad()
            nn.functional.cross_entropy(out, labels).backward()
            optimizer.step()
    assert monitor.latest is not None
    ledger = monitor.latest.ledger
    assert ledger is not None
    assert out.grad is not None
    assert ledger.spine[0].norm == pytest.approx(out.grad.norm().item(), rel=CLOSE)


class Rms(nn.Module):
    """A norm whose name does not say so."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand, self.weight = by_hand, nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        return nn.functional.rms_norm(x, (16,), self.weight)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_norm_is_known_by_what_it_does(by_hand: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), Rms(by_hand), nn.Tanh(), nn.Linear(16, 4))
    ledger = torchsat.probe(model, torch.randn(32, 8), loss=lambda out: out.square().mean()).ledger
    assert ledger is not None
    assert [(each.place, each.kind) for each in ledger.spine] == [("3", Kind.LAYER), ("2", Kind.ACTIVATION), ("1", Kind.NORM)]
