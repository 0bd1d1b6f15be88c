"""The part of the grid of audit.py that asks for numbers of a whole layer, which belong to no single element.

These are dormant units and the ranks of features, the singular values of weights, the logits of a loss, the routers of mixtures of experts, and
functions of the user's own, whose peak and tails were learned.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import audit_truth as truth
import numpy as np
import torch
import torch.nn.functional as F
from audit_grid import ACTIVATIONS, EPSILON, RATE, Case, Compared, _index, _Listed, plain, twice
from audit_truth import Call, Figure
from torch import Tensor, nn

import torchsat
from torchsat import Snapshot

Change = Callable[[nn.Module], None]
"""Changes the parameters of a model."""


def steps_of(
    model: nn.Module, batches: Sequence[Tensor], activations: Sequence[str], change: Change | None = None
) -> Iterator[tuple[Snapshot, truth.Tape]]:
    """Train a copy of the model without torchsat, and the model with it, one step for each batch: each snapshot, and what the copy kept.

    Args:
        change: what is done to both after the second step.
    """
    bare, snapshots = copy.deepcopy(model), list[Snapshot]()
    monitor = torchsat.watch(model, every=1, budget=None, sample=None, epsilon=EPSILON, sinks=[snapshots.append], errors="raise")
    optimizers = [torch.optim.SGD(each.parameters(), lr=RATE) for each in (model, bare)]
    tapes = []
    for step, x in enumerate(batches):
        tapes.append(truth.Tape())
        tapes[-1].record(bare, activations, [])
        plain(bare, optimizers[1], [x])
        tapes[-1].close()
        plain(model, optimizers[0], [x])
        if step == 1 and change is not None:
            change(model)
            change(bare)
    monitor.close()
    yield from zip(snapshots, tapes, strict=True)


def asleep(index: int) -> Iterator[Compared]:
    """Units that sleep, of which three are woken. They are told anew when each has 200 samples more."""
    torch.manual_seed(40)
    first = nn.Linear(8, 40)
    with torch.no_grad():
        first.weight[:9].mul_(1e-3)
        first.bias[:9].mul_(1e-3)
        # On both sides of a fortieth of the others.
        first.weight[9:14].mul_(torch.linspace(0.01, 0.05, 5)[:, None])
        first.bias[9:14].mul_(torch.linspace(0.01, 0.05, 5))

    def wake(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("0.weight")[:3].mul_(1e3)

    model, x = nn.Sequential(first, ACTIVATIONS[index].make(), nn.Linear(40, 2)), torch.randn(5 * 120, 8)
    calls, told = list[Call](), Figure(None)
    for step, (snapshot, tape) in enumerate(steps_of(model, x.split(120), ["1"], wake)):
        calls += tape.calls["1"]
        if step % 2:
            told, calls = truth.dormant(calls, 1), []
        yield f"step {step}", snapshot["1"], {"dormant": told}


def ranked(index: int, rank: int, dtype: torch.dtype, *, images: bool = False) -> Iterator[Compared]:
    """The features of three micro-batches together, behind a weight of this rank."""
    torch.manual_seed(41)
    first: nn.Module = nn.Conv2d(3, 40, 1) if images else nn.Linear(24, 40)
    model = nn.Sequential(first, ACTIVATIONS[index].make(), nn.Flatten(), nn.Linear(40 * 25 if images else 40, 2))
    with torch.no_grad():
        if not images:
            model.get_parameter("0.weight").copy_(torch.randn(40, rank) @ torch.randn(rank, 24) / math.sqrt(24 * rank))
    x = torch.randn(27, 3, 5, 5) if images else torch.randn(270, 24)
    run = twice(model.to(dtype), [each.to(dtype) for each in x.tensor_split((len(x) // 27, len(x) // 3))], ["1"], extras=("rank",))
    yield "1", run.snapshot["1"], {**truth.ranks(run.tape.calls["1"], 1), "dormant": truth.dormant(run.tape.calls["1"], 1)}


class Queries(nn.Module):
    """Attention whose queries and keys come from wide layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(48, 64), nn.Linear(48, 64), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return found


def trained_queries() -> Iterator[Compared]:
    """The largest singular values of two weights that move, after each step. A later observation begins where the last one ended."""
    torch.manual_seed(42)
    model, x, exact = Queries(), torch.randn(4, 9, 48), list[dict[str, Tensor]]()
    snapshots = list[Snapshot]()
    monitor = torchsat.watch(model, every=1, budget=None, sample=None, sinks=[snapshots.append], errors="raise")
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(5):
        plain(model, optimizer, [x])
        exact.append({name: model.get_parameter(f"{name}.weight").detach().clone() for name in ("q", "k")})
    monitor.close()
    for step, (snapshot, weights) in enumerate(zip(snapshots, exact, strict=True)):
        found = {each.name: each for each in snapshot.weights}
        for name, weight in weights.items():
            yield f"step {step}: {name}", found.get(name), {"spectral": truth.spectral(weight, 2e-3 if step else 1e-5)}


def logits_of_a_loss(inside: bool) -> Iterator[Compared]:
    """What a cross-entropy takes, of two micro-batches; `inside`: the model computes the loss itself."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = 9 * self.net(x)
            return F.cross_entropy(z, y[: len(x)]) if inside else z

    torch.manual_seed(43)
    model, y = Model(), torch.randint(5, (40,))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> None:
        for x in batches:
            (model(x) if inside else F.cross_entropy(model(x), y[: len(x)])).backward()
        optimizer.step()

    given = [torch.randn(40, 8), torch.randn(13, 8)]
    z = [9 * copy.deepcopy(model).net(x).detach() for x in given]
    run = twice(model, given, [], train=train, extras=("logits",))
    logits = torch.cat(z).double()[None, None]
    figures, _ = truth.softmax(logits, torch.ones_like(logits, dtype=torch.bool), torch.randn_like(logits))
    record = next((each for each in run.snapshot.records if each.activation == "log_softmax"), None)
    kept = {name: figures[name] for name in ("entropy", "jacobian", "logit_std", "log_keys", "first_key", "log_z", "log_z_rms")}
    ends = {
        "z_max": Figure(float(logits.max()), 1e-5 * float(logits.abs().max())),
        "z_min": Figure(float(logits.min()), 1e-5 * float(logits.abs().max())),
    }
    yield "logits", record, {**kept, **ends, "entropy_min": Figure(None), "output": Figure(True), "n": Figure(logits.numel())}


class Mixture(nn.Module):
    """A router and its experts. A token goes to the experts of the k highest scores."""

    def __init__(self, kind: str, k: int) -> None:
        super().__init__()
        self.kind, self.k, self.router = kind, k, nn.Linear(16, 8)
        self.experts = nn.ModuleList(nn.Linear(16, 4) for _ in range(8))
        self.balance = nn.Parameter(torch.linspace(-0.2, 0.2, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.router(x)
        scores = z if self.kind == "logits" else torch.sigmoid(z) if self.kind == "sigmoid" else torch.softmax(z, -1)
        chosen = torch.topk(scores + self.balance if self.kind == "balanced" else scores, self.k).indices
        shares = torch.softmax(scores, -1).gather(-1, chosen)
        out = torch.stack([expert(x) for expert in self.experts], -2)
        taken: Tensor = (out.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, 4)) * shares.unsqueeze(-1)).sum(-2)
        return taken


def mixture(kind: str, k: int, tokens: int) -> Iterator[Compared]:
    """The choices of a router in two micro-batches, counted one by one. One of its experts gets nearly no token."""
    torch.manual_seed(44)
    model = nn.Sequential(nn.Linear(16, 16), Mixture(kind, k))
    with torch.no_grad():
        model.get_parameter("1.router.bias")[2] -= 4.0
    x = torch.randn(tokens, 16)
    run = twice(model, [x[: tokens // 3], x[tokens // 3 :]], ["1.router"])
    z = truth.features([call.a for call in run.tape.calls["1.router"] if call.a is not None], 1)
    yield "1/experts", next(iter(run.snapshot.experts), None), routed(z, kind, k)
    yield "snapshot", _Listed((), (), tuple(each.site for each in run.snapshot.experts)), {"experts": Figure(("1/experts",))}


def routed(z: truth.Array, kind: str, k: int) -> dict[str, Figure]:
    """What must be said of a router with these logits, of each token and expert."""
    counts, entropies, margins = [0] * 8, list[float](), list[float]()
    for row in z:
        raw = 1 / (1 + np.exp(-row)) if kind == "sigmoid" else np.exp(row)
        p = raw / raw.sum()
        scores = p + np.linspace(-0.2, 0.2, 8) if kind == "balanced" else p
        order = sorted(range(8), key=lambda at: -scores[at])
        for at in order[:k]:
            counts[at] += 1
        margins.append(float(scores[order[k - 1]] - scores[order[k]]))
        entropies.append(-sum(float(each) * math.log(each) for each in p) / math.log(8))
    load = [count / (k * len(z)) for count in counts]
    is_told = len(z) * k >= 64 * 8
    return {
        "site": Figure("1/experts"),
        "k": Figure(k),
        "tokens": Figure(len(z)),
        "experts": Figure(8),
        "load": Figure(tuple(load), 1e-12),
        "dead": Figure(sum(8 * each < 0.05 for each in load) if is_told else None),
        "busiest": Figure(8 * max(load), 1e-12),
        "concentration": Figure((8 * max(load) - 1) / (8 / k - 1), 1e-12),
        "entropy": Figure(float(np.mean(entropies)), 1e-6),
        "margin": Figure(float(np.mean(margins)), 1e-6),
    }


class Own(nn.Module):
    """z / sqrt(1 + z^2), for which there is no row."""

    def forward(self, z: Tensor) -> Tensor:
        return z / (1 + z * z).sqrt()


def learned() -> Iterator[Compared]:
    """A function of the user's own. Its peak and tails are known, within a percent, after some observations."""
    torch.manual_seed(45)
    model, x = nn.Sequential(nn.Linear(8, 16), Own(), nn.Linear(16, 1)), torch.randn(512, 8)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(5)
    snapshots = list(steps_of(model, [x] * 5, ["1"]))
    snapshot, tape = snapshots[-1]
    own = Own()
    exact = truth.record(own, tape.calls["1"], truth.shape_of(own, EPSILON))
    yield "step 0", snapshots[0][0]["1"], {"learned": Figure(False), "tails": Figure("unknown"), "peak": Figure(None), "saturated": Figure(None)}
    near = {name: Figure(exact[name].value, 0.01) for name in ("peak", "saturated", "low", "high", "derivative", "relative_derivative")}
    yield "step 4", snapshot["1"], {**near, "learned": Figure(True), "tails": Figure("both"), "histogram": Figure(None)}


def cases(small: bool) -> Iterator[Case]:
    """Every case of this part of the grid; `small`: one of each kind."""
    for name in ("relu", "leaky_relu") if small else (known.name for known in ACTIVATIONS):
        yield Case(f"{name}: units that sleep", functools.partial(asleep, _index(name)))
    for name in ("tanh", "relu"):
        for rank in (24, 2):
            for dtype in (torch.float32,) if small else (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                yield Case(f"{name}: features behind a weight of rank {rank}, {dtype}", functools.partial(ranked, _index(name), rank, dtype))
        yield Case(f"{name}: features of images", functools.partial(ranked, _index(name), 3, torch.float32, images=True))
    yield Case("weights of queries and keys that move", trained_queries)
    for inside in (False, True):
        yield Case(f"logits of a loss{', inside of the model' if inside else ''}", functools.partial(logits_of_a_loss, inside))
    for kind in ("softmax", "sigmoid", "logits", "balanced"):
        for k, tokens in ((2, 400),) if small else ((1, 400), (1, 600), (2, 400), (2, 120), (3, 900)):
            yield Case(f"experts: {kind}, {k} of 8, {tokens} tokens", functools.partial(mixture, kind, k, tokens))
    yield Case("a function of the user's own", learned)
