"""The part of the grid of audit.py that asks which passes are counted, how calls of different size weigh, and what feeds what.

A pass counts if its gradient enters the optimizer's step. Each training says itself which of its passes do (`counts`), and the tape keeps only these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import audit_truth as truth
import torch
import torch.nn.functional as F
from audit_grid import ACTIVATIONS, RATE, Case, Compared, Shared, Weight, _index, _shape, _weights, mlp, twice
from audit_truth import Figure
from torch import Tensor, nn

import torchsat

Counts = Callable[[bool], None]
"""Tells the tape whether the passes that follow belong to the training."""
Training = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Counts], None]


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x).square().mean()
    return out


def _attacked(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts, *, by_backward: bool) -> None:
    """Adversarial inputs are searched with the gradient of the input, by .backward() or by autograd.grad."""
    attack = x + 6
    counts(False)
    for _ in range(5):
        attack = attack.detach().requires_grad_()
        value = model(attack).sum()
        if by_backward:
            value.backward()
            grad = attack.grad
        else:
            (grad,) = torch.autograd.grad(value, attack)
        assert grad is not None
        attack = attack + grad.sign()
    counts(True)
    optimizer.zero_grad()
    _loss(model, x).backward()
    optimizer.step()


def _evaluated(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts) -> None:
    """An evaluation in the middle of a step."""
    optimizer.zero_grad()
    _loss(model, x[:100]).backward()
    counts(False)
    model.eval()
    with torch.no_grad():
        model(5 * x)
    model.train()
    counts(True)
    _loss(model, x[100:]).backward()
    optimizer.step()


def _zero_first(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts) -> None:
    """The loss of the first micro-batch is masked completely, so that its gradient is 0."""
    optimizer.zero_grad()
    (_loss(model, 4 * x[:100]) * 0).backward()
    _loss(model, x[100:]).backward()
    optimizer.step()


def _thrown_away(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts, *, to_none: bool) -> None:
    """A batch whose gradient the user throws away before the one that is stepped on."""
    counts(False)
    _loss(model, 5 * x).backward()
    optimizer.zero_grad(set_to_none=to_none)
    counts(True)
    _loss(model, x).backward()
    optimizer.step()


def _clipped(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts) -> None:
    """The gradient is scaled in place between two micro-batches, which throws nothing away."""
    optimizer.zero_grad()
    for part in (x[:70], x[70:]):
        _loss(model, part).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def _buffered(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts) -> None:
    """The gradient of each micro-batch is moved to a buffer, as differentially private training does it."""
    kept = [torch.zeros_like(each) for each in model.parameters()]
    for part in x.split(50):
        _loss(model, part).backward()
        for buffer, each in zip(kept, model.parameters(), strict=True):
            assert each.grad is not None
            buffer += each.grad
            each.grad = None
    for buffer, each in zip(kept, model.parameters(), strict=True):
        each.grad = buffer
    optimizer.step()


def _many(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts) -> None:
    """250 passes with one backward, as in an episode of reinforcement learning. What the first episode shows is that they are so long."""
    for is_first in (True, False):
        counts(not is_first)
        optimizer.zero_grad()
        torch.stack([_loss(model, x[at % len(x)][None]) for at in range(250)]).mean().backward()
        optimizer.step()


class Failing(nn.Module):
    """A model whose forward can fail behind its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fails = mlp(nn.Tanh()), False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        if self.fails:
            raise RuntimeError("out of memory")
        return out


def _retried(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts) -> None:
    """A forward that fails, and is tried again with a smaller batch in the except block."""
    assert isinstance(model, Failing)
    optimizer.zero_grad()
    model.fails = True
    counts(False)
    try:
        model(3 * x)
    except RuntimeError:
        model.fails = False
        counts(True)
        _loss(model, x).backward()
    optimizer.step()


def _in_backward(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, counts: Counts) -> None:
    """An optimizer of its own for each parameter, which steps within the backward."""
    optimizers = {each: torch.optim.SGD([each], lr=RATE) for each in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    handles = [each.register_post_accumulate_grad_hook(step) for each in model.parameters()]
    _loss(model, x).backward()
    for each in handles:
        each.remove()


def training(train: Training, make: Callable[[], nn.Module], site: str, x: Tensor) -> Iterator[Compared]:
    """One training against the passes that it says count."""
    model, bare, tape = make(), make(), truth.Tape()
    tape.record(bare, [site], [])
    train(bare, torch.optim.SGD(bare.parameters(), lr=RATE), x, functools.partial(setattr, tape, "counts"))
    tape.close()
    monitor = torchsat.watch(model, budget=None, sample=None, errors="raise")
    train(model, torch.optim.SGD(model.parameters(), lr=RATE), x, lambda counts: None)
    monitor.close()
    index = _index("tanh")
    found = None if monitor.latest is None else next((each for each in monitor.latest.records if each.site == site), None)
    yield site, found, truth.record(ACTIVATIONS[index].function, tape.calls[site], _shape(index))


def by_hand(x: Tensor) -> Iterator[Compared]:
    """A loop without an optimizer, and without a backward: nothing is known of gradients."""
    model, bare, tape = mlp(nn.Tanh()), mlp(nn.Tanh()), truth.Tape()
    tape.record(bare, ["1"], [])
    with torch.no_grad():
        bare(x)
    monitor = torchsat.watch(model, budget=None, sample=None, errors="raise")
    model(x)
    monitor.step()
    monitor.close()
    index = _index("tanh")
    yield "1", None if monitor.latest is None else monitor.latest["1"], truth.record(ACTIVATIONS[index].function, tape.calls["1"], _shape(index))


def shared() -> Iterator[Compared]:
    """One ReLU on two tensors of which one is a hundred times as large, read in part: each element weighs alike."""
    index = _index("relu")
    torch.manual_seed(30)
    model = Shared(nn.ReLU())
    assert model.conv.bias is not None
    with torch.no_grad():
        model.conv.bias.fill_(1.0)
        model.narrow.bias.fill_(-9.0)
    run = twice(model, [torch.randn(256, 3, 34, 34)], ["act"], sample=4096)
    exact = truth.record(ACTIVATIONS[index].function, run.tape.calls["act"], _shape(index))
    share = exact["saturated"].value
    within = 4 * math.sqrt(share * (1 - share) / 4096)
    figures = {name: Figure(exact[name].value, within) for name in ("saturated", "low", "zeros", "relative_derivative")}
    for name, spread in (("z_mean", "z_std"), ("a_mean", "a_std")):
        figures[name] = Figure(exact[name].value, 4 * exact[spread].value / 64)
    yield "act", run.snapshot["act"], {**figures, **{name: exact[name] for name in ("elements", "z_min", "z_max")}}


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros and ones over the axes of a tensor, which a ReLU turns into a share of closed elements."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[tuple[Tensor, ...]], Tensor]


PATTERNS = (
    Pattern("parity of column block, channel and sample", (4, 256, 128, 128), lambda at: (at[3] // 64 + at[1] + at[0]) % 2),
    Pattern("checkerboard", (4, 64, 128, 128), lambda at: (at[2] + at[3]) % 2),
    Pattern("columns", (4, 64, 128, 128), lambda at: at[3] % 2),
    Pattern("every third column", (4, 64, 128, 128), lambda at: (at[3] % 3 == 0).long()),
    Pattern("upper half of the channels", (4, 64, 128, 128), lambda at: (at[1] >= 32).long()),
    Pattern("parity of four bits", (16, 1024, 1024), lambda at: (at[2] // 512 + at[2] // 4 + at[1] // 2 + at[0]) % 2),
    Pattern("a border of one pixel", (8, 32, 127, 129), lambda at: ((at[2] == 0) | (at[3] == 0)).long()),
    Pattern("one sample of the batch", (32, 64, 64, 65), lambda at: (at[0] == 7).long()),
)


def pattern(given: Pattern) -> Iterator[Compared]:
    """A share over a pattern, in four observations one after the other: each within four standard errors of independent draws."""
    axes = [torch.arange(size).reshape(-1, *([1] * (len(given.shape) - at - 1))) for at, size in enumerate(given.shape)]
    closed = given.make(tuple(axes)).expand(given.shape).bool()
    share = float(closed.double().mean())
    model, told = nn.Sequential(nn.ReLU()), list[torchsat.Snapshot]()
    z = torch.where(closed, -1.0, 1.0)
    monitor = torchsat.watch(model, every=1, budget=None, sinks=[told.append], errors="raise")
    for _ in range(4):
        model(z)
        monitor.step()
    monitor.close()
    for snapshot in told:
        within = 4 * math.sqrt(share * (1 - share) / snapshot["0"].n)
        yield f"step {snapshot.step}", snapshot["0"], {"saturated": Figure(share, within), "elements": Figure(z.numel())}


class Parameters(nn.Module):
    """A layer, a raw parameter that is used as a weight, and an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.weight, self.tanh, self.head = (
            nn.Linear(8, 16),
            nn.ReLU(),
            nn.Parameter(torch.randn(16, 12) / 4),
            nn.Tanh(),
            nn.Linear(12, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.tanh(self.relu(self.first(x)) @ self.weight))
        return out


class Adapted(nn.Module):
    """A layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up, self.tanh, self.head = nn.Linear(8, 16), nn.Linear(8, 2), nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.tanh(self.base(x) + self.up(self.down(x))))
        return out


def fed_by_a_parameter(x: Tensor) -> Iterator[Compared]:
    torch.manual_seed(31)
    run = twice(Parameters(), [x], ["relu", "tanh"])
    yield from _weights(run, {"weight": Weight("weight", ("tanh",), 16, 1, data=False, parameter="weight")})
    found = {each.name: each for each in run.snapshot.weights}
    yield "first", found.get("first"), {"feeds": Figure(("relu",))}


def adapted(x: Tensor) -> Iterator[Compared]:
    torch.manual_seed(32)
    run = twice(Adapted(), [x], ["tanh"], ["base", "up"])
    weights = (Weight("base", ("tanh",), 8, 1, data=True), Weight("up", ("tanh",), 2, 1, data=False))
    yield from _weights(run, {each.name: each for each in weights})


def masked_rows() -> Iterator[Compared]:
    """A softmax of which some rows are masked completely: its result there is nan."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Softmax(-1), nn.Linear(6, 2))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            z = self.net[0](x).masked_fill(x[:, :1] > 1, -math.inf)
            probabilities: Tensor = z.softmax(-1)
            return probabilities

    torch.manual_seed(33)
    x = torch.randn(64, 8)
    masked = Masked()
    monitor = torchsat.watch(masked, budget=None, sample=None, errors="raise")
    masked(x)
    monitor.step()
    monitor.close()
    rows = int((x[:, 0] > 1).sum())
    yield "softmax", None if monitor.latest is None else monitor.latest["softmax"], {"nonfinite": Figure(6 * rows)}


def outlier() -> Iterator[Compared]:
    """Attention over many positions, of which one is far out: the largest logit of each head is exact although few rows are read."""
    torch.manual_seed(34)
    q, k, v = (torch.randn(2, 3, 512, 8) for _ in range(3))
    q[0, :, 77] *= 12

    class Model(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q + given, k, v)

    model = Model()
    monitor = torchsat.watch(model, budget=None, sample=4096, errors="raise")
    model(torch.zeros(()))
    monitor.step()
    monitor.close()
    largest = (q.double() @ k.double().transpose(-1, -2) / math.sqrt(8)).amax((0, 2, 3))
    heads = () if monitor.latest is None else monitor.latest["softmax"].heads or ()
    for at, value in enumerate(largest):
        yield f"head {at}", heads[at] if at < len(heads) else None, {"logit_max": Figure(float(value), 1e-4 * float(value))}


def cases(small: bool) -> Iterator[Case]:
    """Every case of this part of the grid; `small` leaves out the large tensors."""
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(35))
    tanh = functools.partial(mlp, nn.Tanh())
    trainings: Sequence[tuple[str, Training]] = (
        ("attacked by backward", functools.partial(_attacked, by_backward=True)),
        ("attacked by autograd.grad", functools.partial(_attacked, by_backward=False)),
        ("evaluated within a step", _evaluated),
        ("a first micro-batch without gradient", _zero_first),
        ("a batch thrown away, to None", functools.partial(_thrown_away, to_none=True)),
        ("a batch thrown away, to zeros", functools.partial(_thrown_away, to_none=False)),
        ("clipped between micro-batches", _clipped),
        ("gradients in a buffer", _buffered),
        ("250 passes of one step", _many),
        ("optimizer in the backward", _in_backward),
    )
    for name, train in trainings:
        yield Case(f"training: {name}", functools.partial(training, train, lambda: tanh(), "1", x))
    yield Case("training: retried in an except block", functools.partial(training, _retried, _failing, "body.1", x))
    yield Case("training: by hand, no backward", functools.partial(by_hand, x))
    yield Case("called on two sizes, in part", shared)
    yield Case("a raw parameter as a weight", functools.partial(fed_by_a_parameter, x))
    yield Case("a low-rank adapter", functools.partial(adapted, x))
    yield Case("rows that are masked completely", masked_rows)
    yield Case("an outlier in attention", outlier)
    for each in () if small else PATTERNS:
        yield Case(f"pattern: {each.name}", functools.partial(pattern, each))


def _failing() -> nn.Module:
    torch.manual_seed(1)
    return Failing()
