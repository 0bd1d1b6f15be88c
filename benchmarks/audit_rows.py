"""The rest of the grid of audit.py: softmax, attention, recurrent gates, GLU, several steps, several ranks, and samples.

Gates and logits exist in no tensor of the model. They are computed here step by step in float64, by the equations in the documentation of torch.
"""

from __future__ import annotations

import copy
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import audit_truth as truth
import torch
import torch.distributed as dist
import torch.nn.functional as F
from audit_grid import ACTIVATIONS, EPSILON, RATE, Case, Compared, Weight, _index, _shape, _weights, mlp, plain, twice
from audit_truth import Call, Figure
from torch import Tensor, nn

import torchsat
from torchsat import Record

RANKS = 2


class Attending(nn.Module):
    """Queries and keys from one layer, and a function that makes an output of them."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], keys: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 4 * 6), nn.Linear(8, keys * 6), nn.Linear(8, keys * 6)
        self.head, self.attend, self.keys = nn.Linear(4 * 6, 2), attend, keys

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, positions, 6]."""
        shapes = ((self.q, 4), (self.k, self.keys), (self.v, self.keys))
        q, k, v = (layer(x).unflatten(-1, (heads, 6)).transpose(1, 2) for layer, heads in shapes)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))
        return out


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(6)).softmax(-1) @ v


def _bool_mask() -> Tensor:
    mask = torch.rand(11, 11, generator=torch.Generator().manual_seed(8)) < 0.7
    return mask | torch.eye(11, dtype=torch.bool)


def _alibi() -> Tensor:
    """A bias that falls by at most 1 from key to key, and reaches -119 all the same, where a mask may lie."""
    distance = (torch.arange(120)[None, :] - torch.arange(120)[:, None]).abs()
    return -torch.tensor([1.0, 0.5, 0.25, 0.125]).reshape(4, 1, 1) * distance


def attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor], added: Tensor | None, visible: Tensor | None, keys: int) -> Iterator[Compared]:
    """One attention with 4 heads.

    Args:
        added: what a float mask adds to the logits.
        visible: which keys a query sees; None: all.
        keys: the number of heads of keys and values.
    """
    torch.manual_seed(9)
    model = Attending(attend, keys)
    with torch.no_grad():
        model.q.weight.mul_(4)
    bare, x = copy.deepcopy(model).double(), 2 * torch.randn(5, 11 if added is None else added.shape[-1], 8)
    run = twice(model, [x], [], ["q", "k"])
    q, k, v = bare.heads(x.double())
    logits = (q @ k.repeat_interleave(4 // keys, 1).transpose(-1, -2) / math.sqrt(6)).detach()
    if added is not None:
        logits = logits + added.double()
    seen = torch.ones_like(logits, dtype=torch.bool) if visible is None else visible.expand(logits.shape)
    v = v.repeat_interleave(4 // keys, 1)
    yield from _softmax(run.snapshot["softmax"], logits, seen, lambda p: bare.head((p @ v).transpose(1, 2).flatten(2)))
    yield from _weights(run, {name: Weight(name, ("softmax",), 8, 2, data=True) for name in ("q", "k")})


def _softmax(record: Record, logits: Tensor, visible: Tensor, rest: Callable[[Tensor], Tensor]) -> Iterator[Compared]:
    """A softmax with these logits. `rest` computes the output of the model from its probabilities, and the loss is that of `plain`."""
    weights = torch.where(visible, logits, -math.inf).softmax(-1).requires_grad_()
    (grad,) = torch.autograd.grad(rest(weights).square().mean(), weights)
    figures, heads = truth.softmax(logits, visible, grad)
    counted = visible & (visible.sum(-1, keepdim=True) > 1)
    z = logits[counted].numpy()
    p = torch.where(visible, logits, -math.inf).softmax(-1)[counted].numpy()
    size = math.sqrt(float((z * z).mean()))
    figures |= {
        "n": Figure(len(z)),
        "elements": Figure(logits.numel()),
        "nonfinite": Figure(0),
        "kind": Figure("softmax"),
        "z_mean": Figure(float(z.mean()), 1e-5 * size),
        "z_std": Figure(float(z.std()), 1e-5 * size),
        "z_rms": Figure(size, 1e-5 * size),
        "z_min": Figure(float(z.min()), 1e-5 * size),
        "z_max": Figure(float(z.max()), 1e-5 * size),
        "a_mean": Figure(float(p.mean()), 1e-6),
        "a_std": Figure(float(p.std()), 1e-6),
        "a_min": Figure(float(p.min()), 1e-6),
        "a_max": Figure(float(p.max()), 1e-6),
        **{name: Figure(None) for name in ("saturated", "low", "high", "derivative", "derivative_rms", "peak", "relative_derivative", "histogram")},
        **{name: Figure(None) for name in ("stuck", "stuck_n", "gate_left", "gate_right", "dormant", "effective_rank", "srank", "rank_limit")},
    }
    yield "softmax", record, figures
    found = record.heads or ()
    for at, head in enumerate(heads):
        yield f"head {at}", found[at] if at < len(found) else None, head


def multi_head(causal: bool) -> Iterator[Compared]:
    """nn.MultiheadAttention, whose projections are one matrix."""
    torch.manual_seed(10)
    attend = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        assert attend.in_proj_weight is not None
        attend.in_proj_weight.mul_(4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attn, self.head = nn.Linear(8, 8), attend, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1) if causal else None
            out: Tensor = self.head(self.attn(h, h, h, attn_mask=mask, need_weights=False)[0])
            return out

    model, x = Model(), 2 * torch.randn(3, 9, 8)
    bare = copy.deepcopy(model).double()
    run = twice(model, [x], [])
    projected = F.linear(bare.first(x.double()), bare.attn.in_proj_weight, bare.attn.in_proj_bias).chunk(3, -1)
    q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in projected)
    logits = (q @ k.transpose(-1, -2) / 2).detach()
    visible = torch.ones(9, 9, dtype=torch.bool).tril() if causal else torch.ones(9, 9, dtype=torch.bool)

    def rest(p: Tensor) -> Tensor:
        out: Tensor = bare.head(bare.attn.out_proj((p @ v).transpose(1, 2).flatten(2)))
        return out

    yield from _softmax(run.snapshot["attn/softmax"], logits, visible.expand(logits.shape), rest)
    found, path = {each.name: each for each in run.snapshot.weights}, "attn.in_proj_weight"
    yield path, found.get(path), {"spectral": Figure(None)}
    for name, part in zip("qk", run.after[path].chunk(3), strict=False):
        yield f"{path}/{name}", found.get(f"{path}/{name}"), {"spectral": truth.spectral(part)}


def _steps(kind: str, x: Tensor, weights: dict[str, Tensor], suffix: str) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The hidden states of one layer in one direction, [steps, batch, units], and the z of each gate at each step, in float64."""
    w_ih, w_hh = weights[f"weight_ih_{suffix}"], weights[f"weight_hh_{suffix}"]
    b_ih, b_hh = weights[f"bias_ih_{suffix}"], weights[f"bias_hh_{suffix}"]
    h = torch.zeros(x.shape[1], w_hh.shape[1], dtype=torch.float64)
    c, out, gates = h, [], dict[str, list[Tensor]]()

    def keep(**given: Tensor) -> None:
        for name, z in given.items():
            gates.setdefault(name, []).append(z)

    for step in x:
        one, other = step @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        if kind == "LSTM":
            i, f, g, o = (one + other).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            keep(input=i, forget=f, cell=g, output=o, hidden=c)
        elif kind == "GRU":
            (r, u, n), (rh, uh, nh) = one.chunk(3, -1), other.chunk(3, -1)
            r, u = r + rh, u + uh
            n = n + torch.sigmoid(r) * nh
            h = (1 - torch.sigmoid(u)) * torch.tanh(n) + torch.sigmoid(u) * h
            keep(reset=r, update=u, new=n)
        else:
            z = one + other
            h = torch.tanh(z)
            keep(hidden=z)
        out.append(h)
    return torch.stack(out), gates


class Recurrent(nn.Module):
    """A recurrent layer between data and a head."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0])
        return out


def recurrent(kind: str, layers: int, both: bool, batch_first: bool, dtype: torch.dtype) -> Iterator[Compared]:
    """All gates of a recurrent layer."""
    torch.manual_seed(11)
    make: Callable[..., nn.RNNBase] = getattr(nn, kind)
    model = Recurrent(make(6, 10, layers, bidirectional=both, batch_first=batch_first))
    with torch.no_grad():
        for each in model.rnn.parameters():
            each.mul_(5)
    model = model.to(dtype)
    bare, x = {name: each.detach().clone().double() for name, each in model.rnn.named_parameters()}, torch.randn(9, 12, 6).to(dtype)
    run = twice(model, [x], [], ["rnn"])
    given = (x.transpose(0, 1) if batch_first else x).double()
    for layer in range(layers):
        outputs = []
        for suffix in [f"l{layer}", f"l{layer}_reverse"][: 2 if both else 1]:
            backwards = suffix.endswith("reverse")
            hidden, gates = _steps(kind, given.flip(0) if backwards else given, bare, suffix)
            outputs.append(hidden.flip(0) if backwards else hidden)
            for name, steps in gates.items():
                yield from _gate(run.snapshot[f"rnn.{suffix}/{name}"], kind, name, torch.stack(steps), dtype)
        given = torch.cat(outputs, -1)
    found = {each.name: each for each in run.snapshot.weights}
    for name, weight in bare.items():
        if name.startswith("weight"):
            inputs = [x] if name.startswith("weight_ih_l0") else []
            path = f"rnn.{name}"
            grad = run.grads[path]
            figures = truth.weight(run.before[path], run.after[path], grad, weight.shape[1], inputs, x.ndim - 1, rate=RATE)
            yield path, found.get(path), figures


def _gate(record: Record, kind: str, name: str, z: Tensor, dtype: torch.dtype) -> Iterator[Compared]:
    is_tanh = name in ("cell", "hidden", "new")
    index = _index("tanh" if is_tanh else "sigmoid")
    function = ACTIVATIONS[index].function
    figures = truth.record(function, [Call(z, function(z))], _shape(index), sigmoid=not is_tanh)
    # The model computes its states in its own precision, which moves every z by rounding.
    z_size = figures["z_rms"].value
    loose = 1e-4 if dtype == torch.float32 else 1e-9
    kept = {
        name: Figure(figure.value, figure.within + loose * (z_size if name.startswith("z_") else 1.0))
        for name, figure in figures.items()
        if not isinstance(figure.value, tuple) and name not in ("gate_left", "gate_right", "low", "high", "saturated")
    }
    shares = {name: Figure(figures[name].value, figures[name].within + 3 / z.numel()) for name in ("low", "high", "saturated")}
    facts = {"kind": Figure("recurrent"), "gate": Figure(kind != "RNN"), "activation": Figure(ACTIVATIONS[index].name), "units": Figure(10)}
    yield record.site, record, {**kept, **shares, **facts}


def glu(x: Tensor) -> Iterator[Compared]:
    """F.glu, whose gate is the sigmoid of the second half of its input."""
    torch.manual_seed(12)
    model = nn.Sequential(nn.Linear(8, 24), nn.GLU(), nn.Linear(12, 2))
    bare = copy.deepcopy(model)
    run = twice(model, [x], [])
    z = bare[0](x)
    z.retain_grad()
    value, gate = z.chunk(2, -1)
    opened = torch.sigmoid(gate)
    opened.retain_grad()
    bare[2](value * opened).double().square().mean().backward()
    assert z.grad is not None
    call = Call(gate.detach(), opened.detach(), z.grad.chunk(2, -1)[1], opened.grad)
    index = _index("sigmoid")
    figures = truth.record(ACTIVATIONS[index].function, [call], _shape(index), sigmoid=True)
    # The kernel of torch never writes the opened gate, so its extremes are those of a sigmoid that is computed again.
    figures |= {name: Figure(figures[name].value, 1e-6) for name in ("a_min", "a_max")}
    yield (
        "1/glu",
        run.snapshot["1/glu"],
        {
            **figures,
            **{name: Figure(value) for name, value in {"gate": True, "output": False, "activation": "sigmoid", "kind": "call", "units": 12}.items()},
        },
    )


class Chain(nn.Module):
    """Three sites after each other, of which the last one computes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 2)
        self.first, self.second, self.last = nn.Tanh(), nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.c(self.second(self.b(self.first(self.a(x))))))
        return out


def chain(x: Tensor) -> Iterator[Compared]:
    """What is known of each site's place in the model."""
    torch.manual_seed(13)
    run = twice(Chain(), [x], ["first", "second", "last"], ["b"])
    for site, after, output in (("first", (), False), ("second", ("first",), False), ("last", ("second",), True)):
        facts = {"after": after, "output": output, "last": output, "gate": False, "losses": ("square",) if output else ()}
        yield site, run.snapshot[site], {name: Figure(fact) for name, fact in facts.items()}
    found = {each.name: each for each in run.snapshot.weights}
    for name, feeds, data in (("a", "first", True), ("b", "second", False), ("c", "last", False)):
        yield name, found.get(name), {"feeds": Figure((feeds,)), "data": Figure(data)}
    yield from _weights(run, {"b": Weight("b", ("second",), 16, 1, data=False)})


def several_steps(x: Tensor) -> Iterator[Compared]:
    """Every step of a training with Adam, observed one by one."""
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        model, snapshots = mlp(nn.Tanh()), list[torchsat.Snapshot]()
        bare = copy.deepcopy(model)
        first = bare[0]
        assert isinstance(first, nn.Linear)
        monitor = torchsat.watch(model, every=1, budget=None, sample=None, sinks=[snapshots.append], errors="raise")
        watched, plainly = (optimizer(each.parameters(), lr=RATE) for each in (model, bare))
        index, truths = _index("tanh"), []
        for _ in range(6):
            tape = truth.Tape()
            tape.record(bare, ["1"], ["0"])
            before = first.weight.detach().clone()
            plain(bare, plainly, [x])
            tape.close()
            truths.append((tape, before, first.weight.detach().clone(), first.weight.grad))
            plain(model, watched, [x])
        monitor.close()
        for step, (snapshot, (tape, before, after, grad)) in enumerate(zip(snapshots, truths, strict=True)):
            yield f"step {step}", snapshot, {"step": Figure(step)}
            yield f"step {step}", snapshot["1"], truth.record(ACTIVATIONS[index].function, tape.calls["1"], _shape(index))
            decay = 0.01 if optimizer is torch.optim.AdamW else 0.0
            weight = truth.weight(before, after, grad if step == 5 else None, 8, tape.inputs["0"], 1, rate=RATE, decay=decay)
            if step != 5:
                del weight["grad_norm"]
            yield f"step {step}", snapshot.weights[0], weight


def overhead() -> Iterator[Compared]:
    """The measured share of training time is known after some observations, and is a share."""
    # The batch is so large that observing a step takes less time than the step, on a busy machine too.
    model, x, told = mlp(nn.Tanh()), torch.randn(16384, 8), list[float | None]()
    monitor = torchsat.watch(model, every=2, budget=None, sinks=[lambda snapshot: told.append(snapshot.overhead)])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    # It is known once the steps that follow some observations have been timed, which on a busy machine takes a few more.
    for _ in range(400):
        plain(model, optimizer, [x])
        if told and told[-1] is not None:
            break
    monitor.close()
    latest = monitor.latest
    assert latest is not None
    yield "snapshot", latest, {"overhead": Figure(0.5, 0.5)}


def sampled(x: Tensor) -> Iterator[Compared]:
    """A site that is read in part: shares within four standard errors, extremes exact."""
    for name in ("tanh", "relu", "gelu"):
        index = _index(name)
        torch.manual_seed(14)
        first = nn.Linear(8, 64)
        model = nn.Sequential(first, ACTIVATIONS[index].make(), nn.Linear(64, 2))
        with torch.no_grad():
            first.weight.mul_(6)
        run = twice(model, [x], ["1"], sample=4096)
        exact = truth.record(ACTIVATIONS[index].function, run.tape.calls["1"], _shape(index))
        record = run.snapshot["1"]
        figures = {field: exact[field] for field in ("elements", "z_min", "z_max", "a_min", "a_max", "nonfinite")}
        for field in ("low", "high", "saturated", "zeros"):
            share = exact[field].value
            figures[field] = Figure(share, 4 * math.sqrt(max(share * (1 - share), 1e-4) / 4096))
        figures["n"] = Figure(4096, 200)
        for field, spread in (("z_mean", "z_std"), ("a_mean", "a_std")):
            figures[field] = Figure(exact[field].value, 4 * exact[spread].value / 64)
        yield "1", record, figures


def _rank(rank: int, port: int, pipe: Connection) -> None:
    """One of two ranks, whose batches differ: the second one has wide inputs, and one inf."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model = nn.parallel.DistributedDataParallel(mlp(nn.Tanh()))
    monitor = torchsat.watch(model, budget=None, sample=None, epsilon=EPSILON, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    plain(model, optimizer, [_batch(rank)])
    monitor.close()
    pipe.send(monitor.latest)
    dist.destroy_process_group()


def _batch(rank: int) -> Tensor:
    x = torch.randn(50 + 30 * rank, 8, generator=torch.Generator().manual_seed(20 + rank)) * (1 + rank)
    if rank == 1:
        x[2, 3] = math.inf
    return x


def ranks() -> Iterator[Compared]:
    """Two ranks that observe together, with batches of different sizes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    spawn = multiprocessing.get_context("spawn")
    ours, workers = [], []
    for rank in range(RANKS):
        mine, theirs = spawn.Pipe()
        workers.append(spawn.Process(target=_rank, args=(rank, store.port, theirs), daemon=True))
        workers[-1].start()
        ours.append(mine)
    told = [pipe.recv() if pipe.poll(60) else None for pipe in ours]
    for each in workers:
        each.join(30)
    index, calls, shares = _index("tanh"), [], []
    for rank in range(RANKS):
        tape, bare = truth.Tape(), mlp(nn.Tanh())
        tape.record(bare, ["1"], [])
        bare(_batch(rank))
        calls += [Call(call.z, call.a) for call in tape.calls["1"]]
        shares.append(truth.record(ACTIVATIONS[index].function, calls[-1:], _shape(index))["saturated"].value)
    exact = truth.record(ACTIVATIONS[index].function, calls, _shape(index))
    figures = {name: figure for name, figure in exact.items() if not name.startswith("grad") and name != "attenuation"}
    worst = max(range(RANKS), key=lambda rank: float(shares[rank]))
    figures |= {"worst": Figure(shares[worst], 1e-6), "worst_rank": Figure(worst), "nonfinite_rank": Figure(1)}
    for rank, snapshot in enumerate(told):
        yield f"rank {rank}", snapshot and snapshot["1"], figures


def cases(small: bool) -> Iterator[Case]:
    """Every case of this half of the grid; `small`: the parts that take least time, and reach every field."""
    mask, causal = _bool_mask(), torch.ones(11, 11, dtype=torch.bool).tril()
    sdpa = F.scaled_dot_product_attention
    floats = torch.zeros(11, 11).masked_fill(~mask, -math.inf)
    attentions: Sequence[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor], Tensor | None, Tensor | None, int]] = (
        ("softmax", _explicit, None, None, 4),
        ("scaled_dot_product_attention", sdpa, None, None, 4),
        ("causal", functools.partial(_sdpa, is_causal=True), None, causal, 4),
        ("boolean mask", functools.partial(_sdpa, attn_mask=mask), None, mask, 4),
        ("float mask", functools.partial(_sdpa, attn_mask=floats), None, mask, 4),
        ("lowest numbers as a mask", functools.partial(_sdpa, attn_mask=floats.clamp(min=torch.finfo(torch.float32).min)), None, mask, 4),
        ("ALiBi", functools.partial(_sdpa, attn_mask=_alibi()), _alibi(), None, 4),
        ("grouped queries", functools.partial(_sdpa, enable_gqa=True), None, None, 2),
    )
    for name, attend, added, visible, keys in attentions:
        yield Case(f"attention: {name}", functools.partial(attention, attend, added, visible, keys))
    for is_causal in (False, True):
        yield Case(f"nn.MultiheadAttention{', causal' if is_causal else ''}", functools.partial(multi_head, is_causal))
    for kind in ("LSTM", "GRU", "RNN"):
        for layers, both, first in [(1, False, True)] if small else [(1, False, True), (2, False, False), (2, True, True), (3, True, False)]:
            for dtype in (torch.float32,) if small else (torch.float32, torch.float64):
                name = f"nn.{kind}, {layers} layers{', both directions' if both else ''}, {dtype}"
                yield Case(name, functools.partial(recurrent, kind, layers, both, first, dtype))
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(15))
    yield Case("GLU", functools.partial(glu, 3 * x))
    yield Case("three sites in a chain", functools.partial(chain, x))
    yield Case("six steps", functools.partial(several_steps, x))
    yield Case("overhead", overhead)
    yield Case("a sample of 4096", functools.partial(sampled, torch.randn(4096, 8, generator=torch.Generator().manual_seed(16))))
    yield Case("two ranks", ranks)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)
