"""Blocked and trapped at a softmax: how much of the gradient's demand falls to rows that look at one key, and how much of it asks for another key."""

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.truth import known
from torchsat import harm
from torchsat.attention import Attention
from torchsat.attention_gradient import KeptValues
from torchsat.columns import HEADS
from torchsat.record import Head, Record, Snapshot
from torchsat.softmax import Probabilities, observe_demand
from torchsat.start import Start

CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()
BANNED = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.4
PADDED = torch.arange(9) >= torch.tensor([[9], [5]])
"""Which keys are padding, for each sample."""


def sums(p: Tensor, grad: Tensor, visible: Tensor) -> Tensor:
    """By their definitions, of the rows of one softmax [batch, heads, queries, keys] in a loop: how many rows there are, their demand, the demand and
    the gap of those that are one-hot, and how many of these are asked to leave; [5, heads]."""
    found = torch.zeros(5, p.shape[1], dtype=torch.float64)
    rows = p.shape[0] * p.shape[1] * p.shape[2]
    for at, (row, g, sees) in enumerate(zip(p.reshape(rows, -1), grad.reshape(rows, -1), visible.expand(p.shape).reshape(rows, -1), strict=True)):
        row, g = row[sees].double(), g[sees].double()
        if len(row) > 1:
            demand, gap = (g.max() - g.min()).item(), (row.dot(g) - g.min()).item()
            one_hot = 1 - row.square().sum().item() <= 0.05 * (1 - 1 / len(row))
            of_row = [1.0, demand, demand * one_hot, gap * one_hot, float(one_hot and gap > demand / 2)]
            found[:, at // p.shape[2] % p.shape[1]] += torch.tensor(of_row, dtype=torch.float64)
    return found


def shares(found: Tensor) -> tuple[float, float, float]:
    """Blocked, trapped and leaving of such sums."""
    rows, demand, blocked, trapped, leaving = found.tolist()
    return blocked / demand, trapped / demand, leaving / rows


def told(record: Record | Head) -> tuple[float, float, float]:
    return known(record.blocked), known(record.trapped), known(record.leaving)


def agree(record: Record, expected: Tensor, rel: float = 1e-9) -> None:
    """Compare a record and its heads with these sums. There is something to compare: some of the demand is blocked, and some of it trapped."""
    whole = shares(expected.sum(1))
    assert 0.02 < whole[1] < whole[0] < 0.98
    assert told(record) == pytest.approx(whole, rel=rel)
    heads = known(record.heads)
    assert [told(head) for head in heads] == [pytest.approx(shares(each), rel=rel) for each in expected.T]


class Attending(nn.Module):
    """An attention of 4 heads (2 heads of keys where queries are grouped), computed by torch or, for comparison, by hand."""

    def __init__(self, attend: Callable[..., Tensor], groups: int = 4) -> None:
        super().__init__()
        self.attend, self.groups = attend, groups
        self.q, self.k, self.v, self.out = nn.Linear(16, 16), nn.Linear(16, 4 * groups), nn.Linear(16, 4 * groups), nn.Linear(16, 3)
        with torch.no_grad():
            self.q.weight *= 8
            self.k.weight *= 8

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = ((self.q, 4), (self.k, self.groups), (self.v, self.groups))
        q, k, v = (layer(x).unflatten(-1, (heads, 4)).transpose(1, 2) for layer, heads in sizes)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def by_hand(self, x: Tensor, visible: Tensor, loss: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Tensor:
        """The sums of one call, by autograd."""
        q, k, v = self.parts(x)
        k, v = (each.repeat_interleave(4 // self.groups, 1) for each in (k, v))
        z = q @ k.transpose(-1, -2) / 2 + (0 if bias is None else bias)
        p = z.masked_fill(~visible, -math.inf).softmax(-1)
        (grad,) = torch.autograd.grad(loss(self.out((p @ v).transpose(1, 2).flatten(2))), p)
        return sums(p, grad, visible)


def softmax(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    z = q @ k.transpose(-1, -2) / 2
    return torch.softmax(z if visible is None else z.masked_fill(~visible, -math.inf), -1) @ v


BIAS = torch.linspace(-1, 1, 9, dtype=torch.float64).expand(9, 9)
WAYS: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor | None, int]] = {
    "softmax": (softmax, torch.ones_like(CAUSAL), None, 4),
    "masked": (lambda q, k, v: softmax(q, k, v, ~BANNED), ~BANNED, None, 4),
    "module": (lambda q, k, v: nn.Softmax(-1)(q @ k.transpose(-1, -2) / 2) @ v, torch.ones_like(CAUSAL), None, 4),
    "fused": (F.scaled_dot_product_attention, torch.ones_like(CAUSAL), None, 4),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), CAUSAL, None, 4),
    "boolean mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, ~BANNED), ~BANNED, None, 4),
    "float mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS), torch.ones_like(CAUSAL), BIAS, 4),
    "grouped": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), torch.ones_like(CAUSAL), None, 2),
    "scaled": (lambda q, k, v: F.scaled_dot_product_attention(3 * q, k, v, scale=1 / 6), torch.ones_like(CAUSAL), None, 4),
    "another layout": (
        lambda q, k, v: F.scaled_dot_product_attention(q.contiguous(), k, v.transpose(2, 3).contiguous().transpose(2, 3)),
        torch.ones_like(CAUSAL),
        None,
        4,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_record_says_how_much_of_the_demand_one_hot_rows_block_and_trap(way: str) -> None:
    attend, visible, bias, groups = WAYS[way]
    torch.manual_seed(0)
    model = Attending(attend, groups).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    # Two micro-batches, the second with 50 times the loss, so that its demand counts 50 times.
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for factor in (1, 50):
        x, target = torch.randn(2, 9, 16).double(), torch.randint(3, (18,))

        def loss(output: Tensor, factor: int = factor, target: Tensor = target) -> Tensor:
            return factor * F.cross_entropy(output.flatten(0, 1), target)

        expected += model.by_hand(x, visible, loss, bias)
        loss(model(x)).backward()
    optimizer.step()
    agree(known(monitor.latest)["softmax"], expected)
    # What by_hand computes outside of the forward may be named too, where an earlier test has left a compiler in use.
    assert "softmax" not in dict(monitor.coverage.unseen)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["plain", "padded", "other sizes", "zeros and bias", "unbatched"])
def test_the_attention_module_of_torch(kind: str, need_weights: bool) -> None:
    """By the softmax in its graph with `need_weights`, and otherwise from the gradient of its fused kernel."""
    options: dict[str, dict[str, Any]] = {"other sizes": {"kdim": 5, "vdim": 7}, "zeros and bias": {"add_bias_kv": True, "add_zero_attn": True}}
    torch.manual_seed(1)
    model = nn.MultiheadAttention(16, 4, batch_first=True, **options.get(kind, {})).double()
    x = torch.randn(2, 9, 16).double()
    key, value = (torch.randn(2, 9, 5).double(), torch.randn(2, 9, 7).double()) if kind == "other sizes" else (x, x)
    with torch.no_grad():
        for weight in (model.in_proj_weight[:32],) if model.in_proj_weight is not None else (model.q_proj_weight, model.k_proj_weight):
            weight *= 6 if kind == "other sizes" else 12
    if kind == "unbatched":
        x, key, value = x[0], key[0], value[0]
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    padding = PADDED if kind == "padded" else None
    # The loss does not see the weights that are returned, so that dL/dp comes from the output alone.
    model(x, key, value, key_padding_mask=padding, need_weights=need_weights)[0].square().sum().backward()
    optimizer.step()

    x, key, value = (each if each.ndim == 3 else each.unsqueeze(0) for each in (x, key, value))
    weights = model.in_proj_weight.chunk(3) if model.in_proj_weight is not None else (model.q_proj_weight, model.k_proj_weight, model.v_proj_weight)
    q, k, v = (F.linear(each, weight, bias) for each, weight, bias in zip((x, key, value), weights, model.in_proj_bias.chunk(3), strict=True))
    if kind == "zeros and bias":
        k, v = (torch.cat([each, known(last).expand(2, 1, 16), torch.zeros(2, 1, 16)], 1) for each, last in ((k, model.bias_k), (v, model.bias_v)))
    q, k, v = (each.unflatten(-1, (4, 4)).transpose(1, 2) for each in (q, k, v))
    visible = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool) if padding is None else ~padding[:, None, None, :]
    p = (q @ k.transpose(-1, -2) / 2).masked_fill(~visible, -math.inf).softmax(-1)
    (grad,) = torch.autograd.grad(model.out_proj((p @ v).transpose(1, 2).flatten(2)).square().sum(), p)
    (record,) = known(monitor.latest).records
    agree(record, sums(p, grad, visible))


def test_weights_that_are_returned_and_used_have_their_part_in_the_demand() -> None:
    torch.manual_seed(2)
    model = nn.MultiheadAttention(16, 4, batch_first=True, bias=False).double()
    with torch.no_grad():
        model.in_proj_weight[:32] *= 12
    x = torch.randn(2, 9, 16).double()
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    output, averaged = model(x, x, x)
    (output.square().sum() + 30 * averaged.square().sum()).backward()
    optimizer.step()
    q, k, v = (F.linear(x, weight).unflatten(-1, (4, 4)).transpose(1, 2) for weight in model.in_proj_weight.chunk(3))
    p = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    (grad,) = torch.autograd.grad(model.out_proj((p @ v).transpose(1, 2).flatten(2)).square().sum() + 30 * p.mean(1).square().sum(), p)
    agree(known(monitor.latest).records[0], sums(p, grad, torch.ones_like(p, dtype=torch.bool)))


class Dropping(Attending):
    """Attention whose probabilities are dropped at random. The gradient at the output of the softmax is kept."""

    def __init__(self) -> None:
        super().__init__(self.drop)

    def drop(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        self.p, self.grads = p.detach(), list[Tensor]()
        p.register_hook(self.grads.append)
        return F.dropout(p, 0.4) @ v


def test_dropout_after_a_softmax_has_its_part_in_the_demand() -> None:
    torch.manual_seed(0)
    model = Dropping().double()
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    F.cross_entropy(model(torch.randn(2, 9, 16).double()).flatten(0, 1), torch.randint(3, (18,))).backward()
    optimizer.step()
    agree(known(monitor.latest)["softmax"], sums(model.p, model.grads[0], torch.ones_like(CAUSAL)))


def step(model: nn.Module, x: Tensor, backward: Callable[[Tensor], None] = lambda output: output.square().sum().backward(), **options: Any) -> Record:
    """The record of the only softmax after one step."""
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise", **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    backward(model(x))
    optimizer.step()
    monitor.close()
    (record,) = (each for each in known(monitor.latest).records if each.kind == "softmax")
    return record


def same(one: Record, other: Record, rel: float = 1e-9) -> None:
    assert told(one) == pytest.approx(told(other), rel=rel)
    assert [told(head) for head in known(one.heads)] == [pytest.approx(told(head), rel=rel) for head in known(other.heads)]


def pair(dtype: torch.dtype = torch.float64) -> tuple[Attending, Attending]:
    """The same attention as a fused call, and as a softmax."""
    torch.manual_seed(0)
    fused, plain = Attending(F.scaled_dot_product_attention).to(dtype), Attending(softmax).to(dtype)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize("shape", [(16, 9), (3, 40), (1, 60)])
def test_a_sample_of_rows_is_the_same_sample_in_fused_attention(shape: tuple[int, int]) -> None:
    """Few samples of many, of which the values are copied, or all of them, of which they are not."""
    x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1)).double()
    fused, plain = (step(model, x, sample=1000) for model in pair())
    assert fused.n < fused.elements / 2
    assert known(fused.trapped) > 0.02
    same(fused, plain)


@pytest.mark.parametrize(("batch", "sample"), [(2, None), (16, 1000)])
def test_every_backward_through_a_graph_that_is_kept_counts(batch: int, sample: int | None) -> None:
    def twice(output: Tensor) -> None:
        output.square().sum().backward(retain_graph=True)
        output.flatten(0, 1).logsumexp(-1).sum().mul(7).backward()

    x = torch.randn(batch, 9, 16, generator=torch.Generator().manual_seed(1)).double()
    fused, plain = (step(model, x, twice, sample=sample) for model in pair())
    same(fused, plain)
    assert told(step(pair()[0], x, sample=sample)) != pytest.approx(told(plain), rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_heard_once(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.first, self.inside = nn.Linear(16, 16).double(), inside

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inside, self.first(x), use_reentrant=reentrant)  # type: ignore[no-any-return]

    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).double()
    for model in pair():
        torch.manual_seed(5)
        checkpointed = Checkpointed(model)
        found = step(checkpointed, x)
        inner = checkpointed.first(x).detach()
        agree(found, model.by_hand(inner, torch.ones_like(CAUSAL), lambda output: output.square().sum()))
        assert known(found.heads)[0].rows == 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    x = torch.randn(4, 30, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    fused, plain = (step(model, x) for model in pair(dtype))
    same(fused, plain, rel=1e-4 if dtype == torch.float32 else 0.05)


def test_under_autocast_the_attention_module_has_the_values_of_its_kernel() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        model.in_proj_weight[:32] *= 12
    x = torch.randn(2, 9, 16)

    def record(need_weights: bool) -> Record:
        monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x, x, x, need_weights=need_weights)[0]
        output.float().square().sum().backward()
        optimizer.step()
        monitor.close()
        return known(monitor.latest).records[0]

    same(record(True), record(False), rel=0.05)


def test_the_scale_of_a_loss_changes_no_share() -> None:
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).double()
    plain, scaled = pair()[0], pair()[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = torchsat.watch(scaled, budget=None, sinks=(), errors="raise")
    optimizer = torch.optim.SGD(scaled.parameters(), 0.0)
    scaler.scale(scaled(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    monitor.flush()
    same(known(monitor.latest)["softmax"], step(plain, x))


def test_dropout_inside_a_fused_kernel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no fused kernel with dropout, so a row of the names stands for one."""
    monkeypatch.setattr("torchsat.observe.softmaxes._FUSED", "SafeSoftmax")
    monkeypatch.setattr("torchsat.observe.softmaxes._SOFTMAX", ())
    torch.manual_seed(0)
    model = Attending(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1))
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model(torch.randn(2, 9, 16)).square().sum().backward()
    optimizer.step()
    record = known(monitor.latest)["softmax"]
    assert record.blocked is record.trapped is record.leaving is known(record.heads)[0].blocked is None
    assert record.entropy is not None
    assert dict(monitor.coverage.unseen)["softmax"].startswith("blocked and trapped are not seen")


def test_large_values_are_not_kept_where_the_graph_does_not_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchsat.observe.softmaxes._MOST_KEPT", 2 * 9 * 16 * 8 - 1)

    class Checkpointed(Attending):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Checkpointed(F.scaled_dot_product_attention).double(), torch.randn(2, 9, 16).double()
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model(x).square().sum().backward()
    optimizer.step()
    assert known(monitor.latest)["softmax"].blocked is None
    assert "does not keep its values" in dict(monitor.coverage.unseen)["softmax"]
    assert step(pair()[0], x).blocked is not None


def test_where_no_gradient_goes_to_the_logits_nothing_is_said() -> None:
    fused, plain = pair()
    for model in (fused, plain):
        for layer in (model.q, model.k):
            layer.requires_grad_(False)
        record = step(model, torch.randn(2, 9, 16).double())
        assert record.blocked is record.trapped is record.leaving is None


def test_values_are_held_until_the_first_backward_and_only_as_they_were() -> None:
    q, v = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    attention = Attention.of(F.scaled_dot_product_attention, (q, q, v), {})
    kept = KeptValues(attention.values, attention.rows(None, 0))
    assert torch.equal(known(kept.take()), v)
    # Where the graph holds them no longer, they are gone.
    assert torch.equal(known(kept.take()), v)
    del attention, v
    assert kept.take() is None
    v = torch.randn(3, 2, 5, 4)
    attention = Attention.of(F.scaled_dot_product_attention, (q, q, v), {})
    kept = KeptValues(attention.values, attention.rows(None, 0))
    v.add_(1)
    assert kept.take() is None
    # As a sharded weight is freed between the passes.
    attention = Attention.of(F.scaled_dot_product_attention, (q, q, v), {})
    kept = KeptValues(attention.values, attention.rows(None, 0))
    v.untyped_storage().resize_(0)
    assert kept.take() is None
    # Some samples are copied.
    many, rows = torch.randn(50, 2, 5, 4), torch.randn(50, 2, 5, 4)
    attention = Attention.of(F.scaled_dot_product_attention, (rows, rows, many), {})
    chosen = attention.rows(20, 0)
    kept = KeptValues(attention.values, chosen)
    expected = many[chosen.batch].clone()
    many.add_(1)
    assert 0 < len(expected) < 50
    assert torch.equal(known(kept.take()), expected)
    assert torch.equal(known(kept.take()), expected)


def test_a_head_that_looks_at_the_right_key_is_content_and_one_that_looks_at_a_wrong_key_is_trapped() -> None:
    """The values are orthonormal and the loss is |O - V_right|^2 / 2, so that dL/dp_j = p_j, less 1 at the right key.

    Let the row have 1 - d at its key and d / (T - 1) at each of the others. Where the key is right, the demand is d + d / (T - 1) and the gap d times
    that. Where it is wrong, the demand is 2 - d - d / (T - 1), and the gap is larger than (1 - d) of it.
    """
    size, d = 8, 0.01
    logit = math.log((1 - d) / (d / (size - 1)))
    right = (torch.arange(size) + 3) % size
    q = torch.stack([F.one_hot(key, size).double() * logit for key in (right, (right + 1) % size)])[None]
    k, v = (torch.eye(size, dtype=torch.float64).expand(1, 2, size, size) for _ in range(2))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(q.clone())

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q, k, x, scale=1.0)

    record = step(Net(), v, lambda output: (output - F.one_hot(right, size)).square().sum().div(2).backward())
    content, wrong = known(record.heads)
    assert told(content) == pytest.approx((1.0, d, 0.0), rel=1e-9)
    demand, least = 2 - d - d / (size - 1), d / (size - 1) - 1
    gap = (1 - d) ** 2 + d * (least + (size - 2) * d / (size - 1)) / (size - 1) - least
    assert told(wrong) == pytest.approx((1.0, gap / demand, 1.0), rel=1e-9)
    assert gap / demand > 1 - d
    assert known(record.trapped) == pytest.approx((gap + d * (d + d / (size - 1))) / (demand + d + d / (size - 1)), rel=1e-9)
    assert record.leaving == 0.5


def test_what_a_one_hot_row_passes_and_what_the_gap_is() -> None:
    """The claims of docs/saturation.md: sum |dL/dz| is at most the trace of the Jacobian times the demand; the gap is what the loss loses at first
    order on the way to the best key; a constant in g changes neither."""
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 5.0, 30.0):
        z, g = scale * torch.randn(200, 7, dtype=torch.float64), torch.randn(200, 7, dtype=torch.float64)
        p = z.requires_grad_().softmax(-1)
        (grad_z,) = torch.autograd.grad((p * g).sum(), z)
        p = p.detach()
        demand, trace = g.amax(-1) - g.amin(-1), 1 - p.square().sum(-1)
        assert bool((grad_z.abs().sum(-1) <= trace * demand + 1e-12).all())
        best = F.one_hot(g.argmin(-1), 7)
        fall = -((best - p) * g).sum(-1)
        gap = (p * g).sum(-1) - g.amin(-1)
        assert torch.allclose(fall, gap)
        assert bool((gap <= demand + 1e-12).all())
        rows = Probabilities(p[None, None], torch.ones(1, 1, 1, 1, dtype=torch.bool), p.numel())
        assert torch.allclose(observe_demand(rows, g[None, None], 0.05), observe_demand(rows, g[None, None] + 5, 0.05))


def test_keys_chosen_without_regard_to_the_gradient_are_trapped_by_half() -> None:
    torch.manual_seed(0)
    g, p = torch.randn(1, 1, 4000, 12, dtype=torch.float64), F.one_hot(torch.randint(12, (1, 1, 4000)), 12).double()
    block = observe_demand(Probabilities(p, torch.ones(1, 1, 1, 1, dtype=torch.bool), p.numel()), g, 0.05)
    demand, blocked, trapped = (block[HEADS.index(name), 0].item() for name in ("row_demand", "row_blocked", "row_trapped"))
    assert blocked == demand
    assert trapped / demand == pytest.approx(0.5, abs=0.02)


def test_rows_that_cannot_be_judged_do_not_count() -> None:
    """One visible key, a gradient that is nan at a visible key, a logit that is infinite; a gradient at a key that nobody sees is not read."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [math.inf, 0.0, 0.0], [9.0, 0.0, 0.0]], dtype=torch.float64)
    grad = torch.tensor([[1.0, 0.0, math.nan], [math.nan, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    visible = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    block = observe_demand(Probabilities.of(logits[None, None], visible[None, None], 24), grad[None, None], 0.05)
    found = dict(zip(HEADS, block[:, 0].tolist(), strict=True))
    first = math.exp(9) / (math.exp(9) + 1)
    # Twice: the softmax has 24 logits, of which 12 were read.
    assert [found[name] for name in HEADS[8:13]] == pytest.approx([2, 2, 2, 2 * first, 2], rel=1e-12)
    assert (found["rows"], found["entropy"], found["logit_max"]) == (0, 0, -math.inf)


def test_heads_are_written_and_read(tmp_path: Any) -> None:
    fused, _ = pair()
    monitor = torchsat.watch(fused, tmp_path, budget=None, errors="raise")
    optimizer = torch.optim.SGD(fused.parameters(), 0.0)
    fused(torch.randn(2, 9, 16).double()).square().sum().backward()
    optimizer.step()
    monitor.close()
    (snapshot,) = torchsat.read(tmp_path)
    assert snapshot["softmax"] == known(monitor.latest)["softmax"]
    assert known(known(snapshot["softmax"].heads)[2].trapped) > 0


class OfParameters(nn.Module):
    """A call of attention on parameters of these shapes, large enough that many rows are one-hot."""

    def __init__(self, attend: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.parts = nn.ParameterList([nn.Parameter(4 * torch.randn(*shape).double()) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.parts)


def weighted(output: Tensor) -> None:
    """A backward with another gradient at each element."""
    output.mul(torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()


SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "of other sequences": ((2, 3, 5, 4), (2, 3, 9, 4), (2, 3, 9, 6)),
    "values that all samples share": ((2, 3, 5, 4), (2, 3, 9, 4), (1, 1, 9, 4)),
    "keys that all samples share": ((2, 3, 5, 4), (1, 3, 9, 4), (2, 3, 9, 4)),
    "three axes": ((2, 5, 4), (2, 9, 4), (2, 9, 4)),
    "five axes": ((2, 2, 3, 5, 4), (2, 2, 3, 9, 4), (2, 2, 3, 9, 4)),
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("backend", ["default", "math"])
def test_other_shapes_and_the_fallback_of_torch(shapes: str, backend: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend == "default":
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel([SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v)

    fused, plain = (step(OfParameters(each, *SHAPES[shapes]), torch.zeros(1), weighted) for each in (attend, softmax))
    assert known(fused.trapped) > 0.1
    # A softmax over five axes is one head; of the heads of the attention the sums are the same.
    assert told(fused) == pytest.approx(told(plain), rel=1e-9)


def test_the_monitor_holds_no_values_after_the_backward() -> None:
    """The values are freed in the backward, as without a monitor, even where the user keeps the loss, and with it the nodes of the graph."""
    model, _ = pair()
    alive: list[weakref.ReferenceType[Tensor]] = []
    model.v.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    monitor = torchsat.watch(model, budget=None, sinks=(), errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    loss = model(torch.randn(2, 9, 16).double()).square().sum()
    loss.backward()
    assert alive[0]() is None
    optimizer.step()
    assert known(monitor.latest)["softmax"].blocked is not None


def test_a_softmax_that_makes_an_output_is_not_said_to_be_at_the_end_of_its_range() -> None:
    """A sure classifier is one-hot, and a loss that takes the logarithm of its output keeps dL/dp at 1 for ever."""
    record = replace(step(pair()[0], torch.randn(2, 9, 16).double()), output=True, grad_a_rms=1.0, blocked=0.9)
    snapshot = Snapshot(1000, 0.0, (record,), (), (), None)
    assert harm.unsatisfied(record, snapshot, Start(record, 0, False)) is None
