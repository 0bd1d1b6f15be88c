"""The numbers of an attention that are of all rows (largest logit, entropy, share of the first key), against the whole matrix in float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.conftest import record
from tests.facts import layer_facts
from tests.test_packing import batch, together
from tests.truth import known, one_step
from torchsat.attention import Attention
from torchsat.causes import Scene, explain
from torchsat.columns import HEADS, WEIGHT
from torchsat.judge import Judge
from torchsat.kernels import cpu
from torchsat.record import Head, Record, Snapshot
from torchsat.rows import LayerRow, to_weight
from torchsat.rules import RULES
from torchsat.softmax import scan_softmax
from torchsat.spectral import largest_singular

LENGTH, HEADS_OF_Q, FEATURES = 96, 4, 8


def direct(z: Tensor, visible: Tensor) -> list[dict[str, float]]:
    """The numbers of each head from all logits [batch, heads, queries, keys] at once, in float64."""
    found = []
    visible = visible.expand(z.shape)
    for at in range(z.shape[1]):
        rows = [(row[see].double(), see) for row, see in zip(z[:, at].flatten(0, 1), visible[:, at].flatten(0, 1), strict=True) if see.sum() > 1]
        p = [torch.softmax(row, 0) for row, _ in rows]
        found.append(
            {
                "rows": len(rows),
                "entropy": sum(-torch.special.xlogy(each, each).sum().item() / math.log(len(each)) for each in p),
                "jacobian": sum(1 - each.square().sum().item() for each in p),
                "logit_variance": sum(row.var(correction=0).item() for row, _ in rows),
                "log_keys": sum(math.log(len(each)) for each in p),
                "first_key": sum(each[0].item() for each in p),
                "log_z": sum(row.logsumexp(0).item() for row, _ in rows),
                "log_z_sq": sum(row.logsumexp(0).square().item() for row, _ in rows),
                "logit_max": max(row.max().item() for row, _ in rows),
            }
        )
    return found


def check(block: Tensor, z: Tensor, visible: Tensor, rel: float) -> None:
    for at, expected in enumerate(direct(z, visible)):
        for name, value in expected.items():
            assert block[HEADS.index(name), at].item() == pytest.approx(value, rel=rel, abs=rel), (at, name)


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def outlier(x: Tensor, at: int = 71, by: float = 12.0) -> Tensor:
    """A copy in which one token of one sample is far larger than the others."""
    x = x.clone()
    x[-1, ..., at, :] *= by
    return x


ALIBI = -torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(4, 1, 1) * (torch.arange(LENGTH).unsqueeze(1) - torch.arange(LENGTH)).abs()
PADDED = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).index_fill(3, torch.arange(7), False)
CALLS: dict[str, tuple[Tensor | None, dict[str, Any], Tensor]] = {
    "plain": (None, {}, torch.ones(1, 1, 1, 1, dtype=torch.bool)),
    "causal": (None, {"is_causal": True}, causal(LENGTH, LENGTH)),
    "boolean": (PADDED & causal(LENGTH, LENGTH), {}, PADDED & causal(LENGTH, LENGTH)),
    "alibi": (ALIBI.masked_fill(~causal(LENGTH, LENGTH), -math.inf), {}, causal(LENGTH, LENGTH)),
    "grouped": (None, {"is_causal": True, "enable_gqa": True}, causal(LENGTH, LENGTH)),
}


@pytest.mark.parametrize("piece", [2**20, 1000])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", CALLS)
def test_the_numbers_of_a_call_are_those_of_the_whole_matrix(
    kind: str, dtype: torch.dtype, compiled: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if piece == 1000 and dtype == torch.float64:
        return
    if not compiled:
        monkeypatch.setattr(cpu, "reads", lambda *tensors: False)
    monkeypatch.setattr("torchsat.attention._PIECE", piece)
    mask, given, visible = CALLS[kind]
    groups = 2 if kind == "grouped" else HEADS_OF_Q
    q, k = outlier(torch.randn(2, HEADS_OF_Q, LENGTH, FEATURES).to(dtype)), outlier(torch.randn(2, groups, LENGTH, FEATURES).to(dtype))
    attention = Attention.of(F.scaled_dot_product_attention, (q, k, k, mask), given)
    z = (q.double() @ k.double().repeat_interleave(HEADS_OF_Q // groups, 1).transpose(-1, -2)) * FEATURES**-0.5
    if kind == "alibi":
        z = z + torch.where(visible, ALIBI, 0.0).double()
    check(attention.scan(F.scaled_dot_product_attention(q, k, k, mask, **given))[1], z, visible, 1e-10 if dtype == torch.float64 else 1e-6)


def test_the_ceiling_is_right_to_the_last_digit() -> None:
    """Queries and keys of few digits, whose products are numbers of float32: what is found must be equal, at any size of the outlier."""
    q, k = (torch.randint(-8, 9, (1, 2, 2048, 16)).float() / 8 for _ in range(2))
    q[0, 0, 1777] *= 4096
    attention = Attention.of(F.scaled_dot_product_attention, (q, k, k), {"is_causal": True, "scale": 0.25})
    z = (q.double() @ k.double().transpose(-1, -2) * 0.25).masked_fill(~causal(2048, 2048), -math.inf)
    z[:, :, 0] = -math.inf
    exact, block = attention.scan(None)
    assert block[-1].tolist() == z.amax((0, 2, 3)).tolist()
    assert block[0].tolist() == [2047, 2047]
    assert exact[2].item() == -z.masked_fill(z == -math.inf, math.inf).min().item()
    # One row of 2047: a sample of 65536 logits, which has 16 rows of each head, mostly misses it.
    assert block[-1, 0] > 100 * block[-1, 1]
    p = torch.softmax(z[:, :, 1:], -1)
    entropy = (-torch.special.xlogy(p, p).sum(-1) / torch.arange(2, 2049).log()).sum((0, 2))
    assert block[HEADS.index("entropy")].tolist() == pytest.approx(entropy.tolist(), rel=1e-6)
    assert block[HEADS.index("first_key")].tolist() == pytest.approx(p[..., 0].sum((0, 2)).tolist(), rel=1e-6)


class Attending(nn.Module):
    """The same attention as a fused call, as torch's own module, and as a plain softmax."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.attention = kind, nn.MultiheadAttention(16, 2, batch_first=True)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.qkv.weight = self.attention.in_proj_weight

    def logits(self, x: Tensor) -> Tensor:
        q, k, _ = self.attention.in_proj_weight.chunk(3)
        made = [F.linear(x, weight).unflatten(-1, (2, 8)).transpose(1, 2) for weight in (q, k)]
        z: Tensor = made[0] @ made[1].transpose(-1, -2) * 8**-0.5
        return z

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "module":
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out
        q, k, v = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        if self.kind == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        weighed: Tensor = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1) @ v
        return weighed


@pytest.mark.parametrize("kind", ["fused", "module", "softmax"])
def test_a_record_has_the_exact_numbers_however_little_is_read(kind: str) -> None:
    model, x = Attending(kind), outlier(torch.randn(3, LENGTH, 16), by=30.0)
    (record,) = (each for each in one_step(model, lambda _: model(x), sample=500).records if each.kind == "softmax")
    assert record.n < 3 * 2 * LENGTH * LENGTH / 10
    expected = direct(model.logits(x).detach(), torch.ones(1, 1, 1, 1, dtype=torch.bool))
    heads = known(record.heads)
    for head, each in zip(heads, expected, strict=True):
        n = each["rows"]
        assert head.rows == n == 3 * LENGTH
        for name, value in (("entropy", each["entropy"] / n), ("jacobian", each["jacobian"] / n), ("first_key", each["first_key"] / n)):
            assert getattr(head, name) == pytest.approx(value, rel=2e-6), name
        assert head.logit_std == pytest.approx(math.sqrt(each["logit_variance"] / n), rel=2e-6)
        assert head.logit_max == pytest.approx(each["logit_max"], rel=2e-6)
    assert record.first_key == pytest.approx(sum(known(head.first_key) for head in heads) / 2)
    assert record.entropy == pytest.approx(sum(known(head.entropy) for head in heads) / 2)


def test_a_sink_has_most_of_the_weight_of_the_first_key() -> None:
    z = torch.zeros(1, 2, 50, 50)
    z[:, 0, :, 0] = 9.0
    _, block = scan_softmax(z, causal(50, 50)[None, None], None)
    shares = (block[HEADS.index("first_key")] / block[0]).tolist()
    even = sum(1 / n for n in range(2, 51)) / 49
    assert shares == pytest.approx([sum(1 / (1 + (n - 1) * math.exp(-9)) for n in range(2, 51)) / 49, even], rel=1e-6)
    # What the docstring of Head.first_key says of even attention.
    assert even == pytest.approx((math.log(50) + 0.58 - 1) / 49, rel=0.01)


@pytest.mark.parametrize("compiled", [True, False])
def test_logits_far_from_zero_and_far_apart_lose_nothing(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(cpu, "reads", lambda *tensors: False)
    z = torch.randn(1, 1, 40, 300)
    _, near = scan_softmax(z, torch.ones(1, 1, 1, 1, dtype=torch.bool), None)
    moved = (z + 1024).double()
    _, far = scan_softmax(moved.float(), torch.ones(1, 1, 1, 1, dtype=torch.bool), None)
    check(far, moved.float(), torch.ones(1, 1, 1, 1, dtype=torch.bool), 2e-6)
    assert far[:6, 0].tolist() == pytest.approx(near[:6, 0].tolist(), rel=1e-4)
    z[0, 0, 3, 7] = 2e16
    check(scan_softmax(z, torch.ones(1, 1, 1, 1, dtype=torch.bool), None)[1], z, torch.ones(1, 1, 1, 1, dtype=torch.bool), 1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (96, 33), (5, 40), (1, 8), (12, 1)])
def test_the_largest_singular_value_is_that_of_a_decomposition(shape: tuple[int, int]) -> None:
    """A weight that was drawn, whose singular values lie close to each other; one that has moved since; one that a single direction has grown in."""
    weight = torch.randn(shape)
    value, vector = largest_singular(weight)
    assert value.item() == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), rel=2e-6)
    again, kept = largest_singular(weight, vector)
    assert again.item() == pytest.approx(value.item(), rel=2e-6)
    moved = weight + 0.02 * torch.randn(shape)
    assert largest_singular(moved, kept)[0].item() == pytest.approx(torch.linalg.matrix_norm(moved.double(), 2).item(), rel=2e-3)
    spike = weight + 9 * torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    assert largest_singular(spike, kept)[0].item() == pytest.approx(torch.linalg.matrix_norm(spike.double(), 2).item(), rel=2e-3)
    precise = largest_singular(weight.double())[0].item()
    assert precise == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), rel=1e-6)


def test_a_weight_that_is_broken_for_a_while_is_measured_again() -> None:
    weight = torch.randn(8, 8)
    broken = weight.clone()
    broken[2, 2] = math.nan
    value, vector = largest_singular(broken)
    assert value.isnan()
    assert largest_singular(weight, vector)[0].item() == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), rel=1e-2)
    assert largest_singular(torch.zeros(4, 4))[0].isnan() or largest_singular(torch.zeros(4, 4))[0] == 0


@pytest.mark.parametrize("kind", ["fused", "module", "softmax"])
def test_queries_and_keys_have_the_largest_singular_value_of_their_weight(kind: str) -> None:
    model, x = Attending(kind), torch.randn(3, 12, 16)
    snapshot, state = one_step(model, lambda _: model(x)), torch.get_rng_state()
    parts = {weight.name.rpartition("/")[2]: weight for weight in snapshot.weights if weight.whole}
    q, k, _ = model.attention.in_proj_weight.detach().double().chunk(3)
    names = ("q", "k") if kind == "module" else ("0-15", "16-31")
    for name, matrix in zip(names, (q, k), strict=True):
        assert known(parts[name].spectral) == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-5), name
    # What feeds no softmax has none, and neither has the weight of which these are parts.
    assert all(weight.spectral is None for weight in snapshot.weights if weight.name.rpartition("/")[2] not in names)
    assert torch.equal(torch.get_rng_state(), state)


class Separate(nn.Module):
    """An attention with a layer each for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, 8)).transpose(1, 2) for each in (self.q, self.k, self.v))
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


def test_separate_layers_are_measured_through_a_training() -> None:
    model, x = Separate(), torch.randn(4, 12, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with torchsat.watch(model, every=1, errors="raise") as monitor:
        for _ in range(12):
            optimizer.zero_grad()
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
            weights = {each.name: each for each in known(monitor.latest).weights}
            for name in ("q", "k"):
                exact = torch.linalg.matrix_norm(model.get_submodule(name).get_parameter("weight").detach().double(), 2).item()
                assert known(weights[name].spectral) == pytest.approx(exact, rel=2e-3), name
    assert {name for name, each in weights.items() if each.spectral is None} == {"out"} & set(weights)


def grown(start: dict[str, float], by: dict[str, float], steps: int = 16) -> tuple[list[torchsat.Alert], list[Snapshot]]:
    """The alerts of growth and the snapshots of a training in which some weights are multiplied at the start, and others before each step."""
    model, x, alerts, snapshots = Separate(), torch.randn(4, 24, 16), list[torchsat.Alert](), list[Snapshot]()
    with torch.no_grad():
        for name, factor in start.items():
            model.get_parameter(f"{name}.weight").mul_(factor)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with torchsat.watch(model, every=1, errors="raise", on_alert=alerts.append, sinks=(snapshots.append,)) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for name, factor in by.items():
                    model.get_parameter(f"{name}.weight").mul_(factor)
        alerts += [alert for alert in monitor.alerts if alert.firing]
    return [alert for alert in alerts if alert.rule == "logit_growth" or "logits grow" in alert.message], snapshots


@pytest.mark.parametrize(("grows", "stays"), [("q", "k"), ("k", "q")])
@pytest.mark.parametrize("rule", ["logit_growth", "attention_collapse"])
def test_growth_of_the_logits_is_told_with_the_weight_that_grew(rule: str, grows: str, stays: str) -> None:
    alerts, snapshots = grown({}, {grows: 2.0})
    # The rows have collapsed by then, which is the same fault and the headline.
    assert "the logits grow" in alerts[-1].message
    scene = Scene(snapshots[-1], snapshots[0], snapshots[-2])
    first, last = ([known(head.logit_max) for head in known(each["softmax"].heads)] for each in (snapshots[0], snapshots[-1]))
    causes = {cause.name: cause for cause in explain(replace(alerts[-1], rule=rule), scene)}
    assert set(causes) == {"softmax_logits", "weight_growth"}
    told = f"the largest logit of softmax is {max(last):.3g} in head {last.index(max(last))}, and was {max(first):.3g} at the first observation"
    assert told in causes["softmax_logits"].evidence
    assert all(word in causes["softmax_logits"].remedy for word in ("QK-norm", "QK-clip", "lower the learning rate", "model.q", "model.k"))
    was, now = ({weight.name: known(weight.spectral) for weight in each.weights if weight.spectral} for each in (snapshots[0], snapshots[-1]))
    evidence = f"||W|| of {grows} has grown from {was[grows]:.3g} to {now[grows]:.3g}; ||W|| of {stays} "
    assert causes["weight_growth"].evidence.startswith(evidence)
    assert f"model.{grows}" in causes["weight_growth"].remedy
    assert f"model.{stays}" not in causes["weight_growth"].remedy
    if rule == "logit_growth":
        share = math.log(now[grows] / was[grows])
        assert causes["weight_growth"].share == pytest.approx(share / (share + 1))
        assert f"{math.sqrt(100 / max(last)):.2g} each" in causes["softmax_logits"].remedy


def test_logits_that_are_large_from_the_start_are_no_growth() -> None:
    assert grown({"q": 40.0, "k": 40.0}, {})[0] == []
    # Nor is growth that ends at logits of a usual size.
    assert grown({}, {"q": 1.2})[0] == []


def test_growth_is_told_after_five_observations_and_of_attentions_alone() -> None:
    largest = (2.0, 30.0, 300.0, *[3000.0] * 5)

    def told(heads: int, weights: tuple[torchsat.Weight, ...] = ()) -> list[tuple[str, str, int]]:
        judge = Judge(RULES)
        snapshots = [Snapshot(step, 0.0, (attention(each, heads),), weights) for step, each in enumerate(largest)]
        return [(alert.rule, alert.severity, alert.step) for each in snapshots for alert in judge.judge(each)]

    assert told(heads=2) == [("logit_growth", "critical", 6)]
    # A pointer, whose logits one layer makes, and an attention of one head.
    made = [to_weight(LayerRow(layer_facts(name, feeds=("softmax",)), [*[1.0] * 6, *[math.nan] * 3], 4, 4)) for name in ("q", "k")]
    assert told(1) == told(1, (made[0],)) == []
    assert told(1, tuple(made)) == told(2)


def attention(logit_max: float, heads: int) -> Record:
    """The record of a softmax with this largest logit in its last head."""
    each = [Head(8, 0.5, 0.5, 1.0, 1.0)] * (heads - 1) + [Head(8, 0.5, 0.5, 1.0, logit_max)]
    return record(
        "softmax", kind="softmax", activation="softmax", heads=tuple(each), entropy=0.5, log_keys=2.0, logit_std=1.0, blocked=0.0, trapped=0.0
    )


def test_the_largest_singular_value_is_that_of_the_rank_that_knows_it() -> None:
    whole = batch()
    part, at = whole.layers["layer"], WEIGHT.index("spectral")

    def found(*values: float) -> float:
        given = [known(part.numbers).index_fill(0, torch.tensor([at]), value) for value in values]
        return together(*(replace(whole, layers={"layer": replace(part, numbers=each)}) for each in given)).layers[0].numbers[at]

    assert found(4.5, math.nan) == found(math.nan, 4.5) == 4.5
    assert found(4.5, math.inf) == math.inf
    assert math.isnan(found(math.nan, math.nan))
