"""The grid of models and trainings that audit.py compares: each case trains one model twice, with torchsat and without, and gives the figures.

The two models are copies of each other and get the same batches. What the records must say is computed from the one that nobody watches
(audit_truth.py).
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import audit_truth as truth
import torch
import torch.nn.functional as F
from audit_truth import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsat

EPSILON, RATE = 0.05, 0.01
Compared = tuple[str, Any, dict[str, Figure]]
"""A place, the record, head, weight or snapshot that was measured, and what its fields must be."""


@dataclass(frozen=True)
class Case:
    """One training, and what must be measured of it."""

    name: str
    compare: Callable[[], Iterator[Compared]]


@dataclass(frozen=True)
class Known:
    """One activation of torch.nn, as the documentation of torch defines it."""

    name: str
    make: Callable[[], nn.Module]
    function: truth.Function
    tails: str
    call: Callable[[Tensor], Tensor] | None = None
    """A function of torch that computes the same."""


def _known() -> tuple[Known, ...]:
    same = (
        ("sigmoid", nn.Sigmoid, "both", torch.sigmoid),
        ("tanh", nn.Tanh, "both", torch.tanh),
        ("relu", nn.ReLU, "low", F.relu),
        ("relu6", nn.ReLU6, "both", F.relu6),
        ("elu", nn.ELU, "low", F.elu),
        ("selu", nn.SELU, "low", F.selu),
        ("celu", nn.CELU, "low", F.celu),
        ("gelu", nn.GELU, "low", F.gelu),
        ("silu", nn.SiLU, "low", F.silu),
        ("mish", nn.Mish, "low", F.mish),
        ("softplus", nn.Softplus, "low", F.softplus),
        ("softsign", nn.Softsign, "both", F.softsign),
        ("hardtanh", nn.Hardtanh, "both", F.hardtanh),
        ("hardsigmoid", nn.Hardsigmoid, "both", F.hardsigmoid),
        ("hardswish", nn.Hardswish, "low", F.hardswish),
        ("log_sigmoid", nn.LogSigmoid, "high", F.logsigmoid),
        ("tanhshrink", nn.Tanhshrink, "none", F.tanhshrink),
        ("softshrink", nn.Softshrink, "none", F.softshrink),
        ("hardshrink", nn.Hardshrink, "none", F.hardshrink),
        ("leaky_relu", nn.LeakyReLU, "none", F.leaky_relu),
    )
    plain = [Known(name, make, make(), tails, call) for name, make, tails, call in same]
    threshold = functools.partial(nn.Threshold, 0.3, -1.0)
    tanh_form = functools.partial(nn.GELU, approximate="tanh")
    elu = functools.partial(nn.ELU, alpha=1.7)
    softplus = functools.partial(nn.Softplus, beta=2.5)
    hardtanh = functools.partial(nn.Hardtanh, -0.3, 1.4)
    others = [
        Known("threshold", threshold, threshold(), "low"),
        Known("gelu", tanh_form, tanh_form(), "low"),
        Known("elu", elu, elu(), "low"),
        Known("softplus", softplus, softplus(), "low"),
        Known("hardtanh", hardtanh, hardtanh(), "both"),
    ]
    return (*plain, *others)


ACTIVATIONS = _known()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=64)
def _shape(index: int) -> truth.Shape:
    found = truth.shape_of(ACTIVATIONS[index].function, EPSILON)
    # A function without a plateau has an edge on the grid where f' is small only near one point.
    return truth.Shape(found.peak, None, None) if ACTIVATIONS[index].tails == "none" else found


@functools.lru_cache(maxsize=64)
def _normal(index: int) -> dict[str, Figure]:
    return truth.normal(ACTIVATIONS[index].function, _shape(index))


@dataclass(eq=False)
class Run:
    """What one training without torchsat left behind, and the snapshot of the same training with it."""

    snapshot: torchsat.Snapshot
    tape: truth.Tape
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    began: float = field(default_factory=time.time)


Train = Callable[[nn.Module, torch.optim.Optimizer, Sequence[Tensor]], None]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> None:
    """One step on the gradients of all batches."""
    optimizer.zero_grad()
    for x in batches:
        model(x).double().square().mean().backward()
    optimizer.step()


def twice(
    model: nn.Module,
    batches: Sequence[Tensor],
    activations: Sequence[str],
    layers: Sequence[str] = (),
    *,
    train: Train = plain,
    twin: nn.Module | None = None,
    make: Callable[[Any], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> Run:
    """Train a copy of the model without torchsat, and then the model with it, for one step.

    Args:
        activations, layers: the modules of the copy to be kept on the tape.
        twin: a model with the same parameters that computes the same with modules, where the watched one calls functions.
    """
    make = make or (lambda parameters: torch.optim.SGD(parameters, lr=RATE))
    bare = copy.deepcopy(model) if twin is None else twin
    tape, began = truth.Tape(), time.time()
    tape.record(bare, activations, layers)
    before = {name: each.detach().clone() for name, each in bare.named_parameters()}
    optimizer = make([each for each in bare.parameters() if each.requires_grad])
    state = torch.get_rng_state()
    train(bare, optimizer, [x.clone() for x in batches])
    grads = {name: None if each.grad is None else each.grad.clone() for name, each in bare.named_parameters()}
    after = {name: each.detach().clone() for name, each in bare.named_parameters()}
    tape.close()
    torch.set_rng_state(state)
    monitor = torchsat.watch(model, errors="raise", budget=None, epsilon=EPSILON, **{"sample": None, **options})
    train(model, make([each for each in model.parameters() if each.requires_grad]), [x.clone() for x in batches])
    monitor.close()
    assert monitor.latest is not None
    return Run(monitor.latest, tape, before, after, grads, began)


def facts(known: Known, index: int, site: str, *, kind: str = "module", units: int | None = None, after: tuple[str, ...] = ()) -> dict[str, Figure]:
    """The facts of a hidden site."""
    given = {
        "site": site,
        "activation": known.name,
        "kind": kind,
        "tails": known.tails,
        "output": False,
        "last": True,
        "gate": False,
        "after": after,
        "learned": False,
    }
    nothing = {"entropy": None, "jacobian": None, "logit_std": None, "log_keys": None, "entropy_min": None, "heads": None}
    nothing |= {"first_key": None, "log_z": None, "log_z_rms": None, "effective_rank": None, "srank": None, "rank_limit": None}
    ranks = {"worst": None, "worst_rank": None, "nonfinite_rank": None}
    return {**{name: Figure(value) for name, value in {**given, "units": units, **nothing, **ranks}.items()}, **_normal(index)}


def element_wise(index: int, dtype: torch.dtype, layout: Layout) -> Iterator[Compared]:
    """One activation between two layers."""
    known = ACTIVATIONS[index]
    torch.manual_seed(index)
    first, head, x, axis = layout.make()
    with torch.no_grad():
        # Wide weights reach the tails on both sides.
        first.weight.mul_(6)  # type: ignore[operator]
    model = nn.Sequential(first, known.make(), nn.Flatten(), head).to(dtype)
    if layout.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    run = twice(model, [x.to(dtype)], ["1"], ["0"], extras=("rank",))
    calls = run.tape.calls["1"]
    samples = calls[0].z.numel() // calls[0].z.shape[axis]
    figures = truth.merged(
        facts(known, index, "1", units=calls[0].z.shape[axis]),
        truth.record(known.function, calls, _shape(index), sigmoid=known.name == "sigmoid"),
        {"dormant": truth.dormant(calls, axis)},
        # Of a call with more samples 512 are read.
        truth.ranks(calls, axis) if samples <= 512 else {"rank_limit": Figure(min(512, calls[0].z.shape[axis]))},
    )
    if samples > 512:
        del figures["effective_rank"], figures["srank"]
    if known.tails != "none" and samples >= 1000:
        figures |= {"stuck": Figure(truth.stuck(calls, axis, _shape(index)), 1e-9), "stuck_n": Figure(samples)}
    yield "1", run.snapshot["1"], figures
    yield from _weights(run, {"0": Weight("0", ("1",), _fan_in(first), axis, data=True)})
    yield from _snapshot(run, ("1",), ("0",))


@dataclass(frozen=True)
class Weight:
    """What is known of a layer by the way the model is made."""

    name: str
    feeds: tuple[str, ...]
    fan_in: int
    axis: int
    """The axis of the features of its input."""
    data: bool
    parameter: str = ""
    """The path of its weight; empty: `name.weight`."""


def _fan_in(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        taps = weight.shape[0] // layer.groups * math.prod(weight.shape[2:])
        return max(1, taps // math.prod(layer.stride))
    return math.prod(weight.shape[1:])


def _weights(run: Run, weights: dict[str, Weight], rate: float | None = RATE) -> Iterator[Compared]:
    found = {each.name: each for each in run.snapshot.weights}
    for name, known in weights.items():
        path = known.parameter or f"{name}.weight"
        figures = truth.weight(
            *(run.before[path], run.after[path], run.grads[path], known.fan_in, run.tape.inputs.get(name, []), known.axis), rate=rate
        )
        figures |= {"name": Figure(name), "feeds": Figure(known.feeds), "data": Figure(known.data), "parameter": Figure(name == path)}
        figures["spectral"] = truth.spectral(run.after[path]) if "softmax" in known.feeds else Figure(None)
        if path not in run.grads or run.grads[path] is None:
            figures |= {"update_ratio": Figure(None), "learned_ratio": Figure(None)}
        yield name, found.get(name), figures


def _snapshot(run: Run, sites: tuple[str, ...], layers: tuple[str, ...] | None = None, step: int = 0) -> Iterator[Compared]:
    """The snapshot as a whole. Its records and weights are compared as a list of names here, and one by one elsewhere."""
    snapshot = run.snapshot
    figures = {"step": Figure(step), "time": Figure((run.began + time.time()) / 2, (time.time() - run.began) / 2 + 1e-3), "overhead": Figure(None)}
    yield "snapshot", snapshot, figures
    names = tuple(each.site for each in snapshot.records)
    yield (
        "snapshot",
        _Listed(names, tuple(each.name for each in snapshot.weights), tuple(each.site for each in snapshot.experts)),
        {
            "records": Figure(sites),
            "experts": Figure(()),
            **({} if layers is None else {"weights": Figure(layers)}),
        },
    )


@dataclass(frozen=True)
class _Listed:
    """The names of the sites, layers and routers of a snapshot, under the names of its fields."""

    records: tuple[str, ...]
    weights: tuple[str, ...]
    experts: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """A shape of z, by the layer that makes it and the batch that this layer is given."""

    name: str
    make: Callable[[], tuple[nn.Module, nn.Module, Tensor, int]]
    """Returns the layer, the head behind a flattening, a batch, and the axis of the units of z."""
    channels_last: bool = False


def _transposed() -> tuple[nn.Module, nn.Module, Tensor, int]:
    return nn.Linear(5, 7), nn.Linear(7 * 6, 2), torch.randn(5, 6, 31).permute(2, 1, 0), 2


LAYOUTS = (
    Layout("[1024, 24]", lambda: (nn.Linear(8, 24), nn.Linear(24, 2), torch.randn(1024, 8), 1)),
    Layout("[60, 40]", lambda: (nn.Linear(24, 40), nn.Linear(40, 2), torch.randn(60, 24), 1)),
    Layout("[3, 1]", lambda: (nn.Linear(8, 1), nn.Linear(1, 2), torch.randn(3, 8), 1)),
    Layout("[9, 13, 17]", lambda: (nn.Linear(5, 17), nn.Linear(13 * 17, 2), torch.randn(9, 13, 5), 2)),
    Layout("[31, 6, 7] transposed", _transposed),
    Layout("[4, 6, 30] convolution", lambda: (nn.Conv1d(3, 6, 3), nn.Linear(6 * 30, 2), torch.randn(4, 3, 32), 1)),
    Layout("[8, 5, 16, 15] convolution", lambda: (nn.Conv2d(3, 5, (3, 4)), nn.Linear(5 * 16 * 15, 2), torch.randn(8, 3, 18, 18), 1)),
    Layout(
        "[8, 6, 9, 9] grouped, channels last",
        lambda: (nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.Linear(6 * 81, 2), torch.randn(8, 4, 19, 19), 1),
        True,
    ),
    Layout("[2, 3, 4, 5, 6] convolution", lambda: (nn.Conv3d(2, 3, 2), nn.Linear(3 * 120, 2), torch.randn(2, 2, 5, 6, 7), 1)),
    Layout("[4, 6, 21] transposed convolution", lambda: (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.Linear(6 * 21, 2), torch.randn(4, 4, 10), 1)),
)


class Shared(nn.Module):
    """One activation that is called on two tensors of different size."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.narrow, self.act = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), act

    def forward(self, x: Tensor) -> Tensor:
        wide = self.act(3 * self.conv(x))
        out: Tensor = self.act(self.narrow(wide.mean((2, 3))) - 2)
        return out


class Calling(nn.Module):
    """A layer and an activation, called as a function."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.call = nn.Linear(8, 24), nn.Linear(24, 2), call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.call(self.first(x)))
        return out


class Checkpointed(nn.Module):
    """Two layers with an activation between, inside an activation checkpoint."""

    def __init__(self, act: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = nn.Sequential(nn.Linear(8, 24), act), nn.Linear(24, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=self.reentrant)
        out: Tensor = self.head(hidden)
        return out


def _index(name: str) -> int:
    return next(at for at, each in enumerate(ACTIVATIONS) if each.name == name)


def situation(
    name: str, model: nn.Module, batches: Sequence[Tensor], site: str, units: int | None, layers: dict[str, Weight], **options: Any
) -> Iterator[Compared]:
    """One activation in one way to train, against the calls on the tape."""
    index = _index(name)
    known, scale = ACTIVATIONS[index], options.pop("scale", 1.0)
    run = twice(model, batches, [site], list(layers), **options)
    figures = truth.merged(
        facts(known, index, site, units=units),
        truth.record(known.function, run.tape.calls[site], _shape(index), sigmoid=name == "sigmoid", scale=scale),
        {"dormant": truth.dormant(run.tape.calls[site], 1)},
    )
    yield site, run.snapshot[site], figures
    # A scaler unscales the gradients in place before the step, so that those on the tape carry no factor.
    yield from _weights(run, layers)


def mlp(act: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    first, last = nn.Linear(8, 24), nn.Linear(24, 2)
    with torch.no_grad():
        first.weight.mul_(4)
    return nn.Sequential(first, act, last)


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> None:
    """A step with a GradScaler, which leaves unscaling to the optimizer's step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x in batches:
        scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)


def autocast(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> None:
    for x in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        out.float().square().mean().backward()
    optimizer.step()


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> None:
    def loss() -> float:
        optimizer.zero_grad()
        value = model(batches[0]).square().mean()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)


def evaluated(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> None:
    """An evaluation pass in the middle of the step, which does not count: the tape is told so by leaving its calls out."""
    plain(model, optimizer, batches)
    model.eval()
    with torch.no_grad():
        model(batches[0])
    model.train()


def situations() -> Iterator[Case]:
    """The ways to train."""
    fed = {"0": Weight("0", ("1",), 8, 1, data=True)}

    def case(name: str, make: Callable[[], Iterator[Compared]]) -> Case:
        return Case(name, make)

    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    small = [x[:7], x[7:100], x[100:]]
    spoiled = x.clone()
    spoiled[3, 2], spoiled[17, 0], spoiled[90, 5] = math.inf, math.nan, -math.inf
    images = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    for name, act in (("tanh", nn.Tanh), ("relu", nn.ReLU), ("gelu", nn.GELU)):
        yield case(f"{name}: micro-batches of 7, 93 and 100", functools.partial(situation, name, mlp(act()), small, "1", 24, fed))
        yield case(f"{name}: GradScaler", functools.partial(situation, name, mlp(act()), [x], "1", 24, fed, train=scaled, scale=1024.0))
        yield case(f"{name}: autocast", functools.partial(situation, name, mlp(act()), [x], "1", 24, {}, train=autocast))
        yield case(f"{name}: closure", functools.partial(situation, name, mlp(act()), [x], "1", 24, {}, train=closure))
        yield case(f"{name}: inf and nan in the inputs", functools.partial(_spoiled, name, act, spoiled))
        yield case(f"{name}: called on two sizes", functools.partial(_shared, name, act, images))
        for reentrant in (False, True):
            yield case(f"{name}: checkpoint{', reentrant' if reentrant else ''}", functools.partial(_checkpointed, name, act, reentrant, x))
    for name, kind in (("relu", nn.ReLU), ("hardtanh", nn.Hardtanh), ("elu", nn.ELU), ("silu", nn.SiLU)):
        yield case(f"{name}: in place", functools.partial(situation, name, mlp(kind(inplace=True)), [x], "1", 24, fed, twin=mlp(kind())))
    for index, known in enumerate(ACTIVATIONS):
        if known.call is not None:
            yield case(f"{known.name}: called as a function", functools.partial(_called, index, x))


def _spoiled(name: str, act: Callable[[], nn.Module], x: Tensor) -> Iterator[Compared]:
    index = _index(name)
    run = twice(mlp(act()), [x], ["1"])
    yield "1", run.snapshot["1"], truth.record(ACTIVATIONS[index].function, run.tape.calls["1"], _shape(index))


def _shared(name: str, act: Callable[[], nn.Module], images: Tensor) -> Iterator[Compared]:
    index = _index(name)
    torch.manual_seed(2)
    run = twice(Shared(act()), [images], ["act"])
    figures = truth.record(ACTIVATIONS[index].function, run.tape.calls["act"], _shape(index))
    yield "act", run.snapshot["act"], {**figures, "units": Figure(None), "stuck": Figure(None)}


def _checkpointed(name: str, act: Callable[[], nn.Module], reentrant: bool, x: Tensor) -> Iterator[Compared]:
    index = _index(name)
    torch.manual_seed(5)
    model = Checkpointed(act(), reentrant)
    # The values without a checkpoint are the same, so that the tape need not tell a recompute from a pass.
    twin = nn.ModuleDict({"body": copy.deepcopy(model.body), "head": copy.deepcopy(model.head)})
    twin.forward = lambda given: twin["head"](twin["body"](given))
    run = twice(model, [x.clone().requires_grad_()], ["body.1"], twin=twin)
    yield "body.1", run.snapshot["body.1"], truth.record(ACTIVATIONS[index].function, run.tape.calls["body.1"], _shape(index))


def _called(index: int, x: Tensor) -> Iterator[Compared]:
    known = ACTIVATIONS[index]
    assert known.call is not None
    torch.manual_seed(6)
    model = Calling(known.call)
    twin = Calling(known.make())
    twin.load_state_dict(model.state_dict())
    run = twice(model, [3 * x], ["call"], ["first"], twin=twin)
    figures = truth.merged(
        facts(known, index, known.name, kind="call", units=24),
        truth.record(known.function, run.tape.calls["call"], _shape(index), sigmoid=known.name == "sigmoid"),
    )
    yield known.name, run.snapshot[known.name], figures
    yield from _weights(run, {"first": Weight("first", (known.name,), 8, 1, data=True)})


def cases(small: bool) -> Iterator[Case]:
    """Every case of the grid; `small`: one dtype and one layout of each activation."""
    for index, known in enumerate(ACTIVATIONS):
        for dtype in DTYPES[1:2] if small else DTYPES:
            for layout in LAYOUTS[:1] if small else LAYOUTS:
                yield Case(f"{known.name} {str(dtype).removeprefix('torch.')} {layout.name}", functools.partial(element_wise, index, dtype, layout))
    yield from situations()
