"""What is measured inside a compiled graph is what eager observation measures, in one graph, and leaves nothing behind."""

import copy
import dataclasses
import io
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchsat
from tests.truth import known
from torchsat import compile_settings
from torchsat.observe import ingraph
from torchsat.observe.observation import ONLY_IN_EAGER

able = pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.6 and 2.7 are refused: they compile anew for each of many equal blocks")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert torch._dynamo.config.skip_nnmodule_hook_guards
    assert not ingraph._slots


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(16, 16), act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.linear(x))
        return out


class Net(nn.Module):
    """Activations as modules, one of them in place, one with a learned parameter, one shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(nn.Tanh()), Block(nn.ReLU(inplace=True)), Block(nn.PReLU(16))
        self.shared = nn.SiLU()
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.shared(self.third(self.shared(self.second(self.first(x))))))
        return out


def net(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def train(model: nn.Module, run: Callable[..., Any], steps: int, width: int = 16) -> tuple[list[float], torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(torch.randn(32, width, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def watched(mode: str, backend: str, steps: int = 9) -> tuple[list[torchsat.Snapshot], list[float], int, nn.Module]:
    torch._dynamo.reset()
    model, counter, found = net(), CompileCounterWithBackend(backend), list[torchsat.Snapshot]()
    run = torch.compile(model, backend=counter, fullgraph=True)
    with torchsat.watch(model, every=2, compiled=mode, sinks=[found.append], errors="raise"):  # type: ignore[arg-type]
        losses, _ = train(model, run, steps)
    return found, losses, counter.frame_count, model


@able
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_number_is_that_of_eager_observation(backend: str) -> None:
    eager, losses, _, _ = watched("eager", backend)
    inside, same_losses, graphs, _ = watched("in_graph", backend)
    assert graphs == 1
    assert losses == pytest.approx(same_losses, rel=1e-5)
    assert [each.step for each in inside] == [each.step for each in eager] == [0, 1, 2, 4, 6, 8]
    for mine, theirs in zip(inside, eager, strict=True):
        assert (
            [record.site for record in mine.records]
            == [record.site for record in theirs.records]
            == ["first.act", "second.act", "shared", "third.act"]
        )
        for pairs in (zip(mine.records, theirs.records, strict=True), zip(mine.weights, theirs.weights, strict=True)):
            for one, other in pairs:
                for field in dataclasses.fields(one):
                    a, b = getattr(one, field.name), getattr(other, field.name)
                    if isinstance(b, float) or (isinstance(b, tuple) and b and isinstance(b[0], float)):
                        assert a == pytest.approx(b, rel=1e-4, abs=1e-6), (mine.step, field.name)
                    else:
                        assert a == b, (mine.step, field.name)


@able
def test_training_is_bit_for_bit_that_of_the_compiled_model_alone() -> None:
    def after(watches: bool) -> tuple[list[float], dict[str, Tensor]]:
        torch._dynamo.reset()
        model = net()
        # Step 0 is observed in eager; the comparison begins behind it, from the same weights.
        monitor = torchsat.watch(model, every=1, compiled="in_graph") if watches else None
        train(model, model, 1)
        model.load_state_dict(net().state_dict())
        losses, _ = train(model, torch.compile(model, backend="inductor", fullgraph=True), 4)
        if monitor is not None:
            assert monitor.latest is not None
            assert (monitor.latest.step, len(monitor.latest.records)) == (4, 4)
            monitor.close()
        return losses, model.state_dict()

    (alone, weights), (beside, same) = after(False), after(True)
    assert alone == beside
    assert list(weights) == list(same)
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@able
def test_two_models_of_one_class_are_both_measured_even_if_the_other_was_compiled_before() -> None:
    other = net()
    unwatched = torch.compile(other, backend="aot_eager", fullgraph=True)
    train(other, unwatched, 2)
    first, second = net(), net()
    with torch.no_grad():
        second.first.linear.weight.mul_(100)  # type: ignore[union-attr, operator]
    snapshots: dict[int, list[torchsat.Snapshot]] = {0: [], 1: []}
    monitors = [
        torchsat.watch(model, every=1, compiled="in_graph", sinks=[snapshots[at].append], errors="raise") for at, model in enumerate((first, second))
    ]
    train(first, torch.compile(first, backend="aot_eager", fullgraph=True), 3)
    train(second, torch.compile(second, backend="aot_eager", fullgraph=True), 3)
    train(other, unwatched, 1)
    for monitor in monitors:
        monitor.close()
    assert [len(each) for each in snapshots.values()] == [3, 3]
    shares = [[known(snapshot["first.act"].saturated) for snapshot in each] for each in snapshots.values()]
    assert max(shares[0]) < 0.2
    assert min(shares[1]) > 0.8
    assert all(each["first.act"].n == 32 * 16 for found in snapshots.values() for each in found)


@able
def test_many_equal_blocks_share_their_graphs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(nn.Tanh()) for _ in range(12)), nn.Linear(16, 1))
    counter = CompileCounterWithBackend("aot_eager")
    for block in model[:-1].children():
        block.compile(backend=counter, fullgraph=True)
    with torchsat.watch(model, every=1, compiled="in_graph", errors="raise") as monitor:
        train(model, model, 3)
        assert monitor.latest is not None
        assert [record.n for record in monitor.latest.records] == [512] * 12
    # The first block's input needs no gradient, the others' do.
    assert counter.frame_count == 2


@able
def test_evaluation_is_not_measured_and_unobserved_steps_reach_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    counted: list[str] = []
    with torchsat.watch(model, every=4, compiled="in_graph", errors="raise") as monitor:
        counting = ingraph.GraphReceiver.heard_site
        monkeypatch.setattr(ingraph.GraphReceiver, "heard_site", lambda self, name, *given: (counted.append(name), counting(self, name, *given)))  # type: ignore[func-returns-value]
        for step in range(6):
            counted.clear()
            model.eval()
            with torch.no_grad():
                run(torch.randn(5, 16))
            run(torch.randn(5, 16))
            model.train()
            assert counted == []
            train(model, run, 1)
            assert len(counted) == (5 if step in (1, 2, 4) else 0)
        assert monitor.latest is not None
        assert (monitor.latest.step, monitor.latest["first.act"].n, monitor.latest["shared"].n) == (4, 512, 1024)


@able
def test_passes_of_one_step_add_up() -> None:
    model = net()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, every=1, compiled="in_graph", errors="raise") as monitor:
        for _ in range(3):
            for size in (32, 32, 32):
                run(torch.randn(size, 16)).square().mean().backward()
            optimizer.step()
        assert monitor.latest is not None
        record = monitor.latest["first.act"]
        assert (record.n, record.grad_n) == (3 * 512, 3 * 512)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.second(self.act(self.first(x))))


@able
def test_what_a_graph_does_not_show_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = net(Functional)
    with torchsat.watch(model, every=1, compiled="in_graph", errors="raise") as monitor:
        train(model, torch.compile(model, backend="aot_eager", fullgraph=True), 8)
        assert monitor.latest is not None
        assert [record.site for record in monitor.latest.records] == ["act"]
        ((place, reason),) = monitor.coverage.unseen
    assert place == "gelu"
    assert reason.startswith("measured in eager steps only: ")
    assert not [each for each in caplog.records if each.name == "torchsat"]


@able
@pytest.mark.parametrize("hidden", [False, True])
def test_a_model_that_no_graph_speaks_for_is_observed_in_eager(hidden: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Not compiled at all, or by a compiler that was told to leave the modules alone."""
    model, found = net(), list[torchsat.Snapshot]()
    with caplog.at_level(logging.WARNING), torchsat.watch(model, every=1, compiled="in_graph", sinks=[found.append], errors="raise"):
        for each in model.modules() if hidden else ():
            each.forward = torch.compiler.disable(each.forward)
        train(model, torch.compile(model, backend="aot_eager") if hidden else model, 6)
    (record,) = (each for each in caplog.records if each.name == "torchsat")
    assert record.message == (
        'torchsat: no compiled graph of Net was heard: it was compiled before torchsat.watch(compiled="in_graph"), or it does not run compiled. '
        "Observed steps run eager."
    )
    assert [each.step for each in found] == [0, 3, 4, 5]


def test_a_torch_that_cannot_says_so_at_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("torchsat.compiling.why_not_in_graph", lambda: "torch 1.0 has no ordered effects for operators")
    model, found = net(), list[torchsat.Snapshot]()
    with caplog.at_level(logging.WARNING), torchsat.watch(model, every=1, compiled="in_graph", sinks=[found.append], errors="raise"):
        train(model, torch.compile(model, backend="aot_eager", fullgraph=True), 3)
    assert [each.message for each in caplog.records if each.name == "torchsat"] == [
        'torchsat: compiled="in_graph" is not possible, observed steps run eager: torch 1.0 has no ordered effects for operators.'
    ]
    assert [each.step for each in found] == [0, 1, 2]


def test_it_is_one_of_two() -> None:
    with pytest.raises(ValueError, match='compiled is True; allowed are "eager" and "in_graph"'):
        torchsat.watch(nn.Tanh(), compiled=True)  # type: ignore[arg-type]


@able
def test_copies_are_silent_and_closing_leaves_nothing() -> None:
    model = net()
    keys = list(model.state_dict())
    monitor = torchsat.watch(model, every=1, compiled="in_graph", errors="raise")
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    train(model, torch.compile(model, backend="aot_eager", fullgraph=True), 2)
    for other in (twin, loaded):
        train(other, torch.compile(other, backend="aot_eager", fullgraph=True), 2)
    assert monitor.latest is not None
    assert monitor.latest["first.act"].n == 512
    monitor.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert math.isfinite(train(model, torch.compile(model, backend="aot_eager", fullgraph=True), 1)[0][0])


@able
def test_a_layer_that_is_replaced_is_measured_again() -> None:
    model = net()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torchsat.watch(model, every=1, compiled="in_graph", errors="raise") as monitor:
        train(model, run, 3)
        model.second = Block(nn.Sigmoid())
        train(model, run, 4)
        assert monitor.latest is not None
        assert monitor.latest["second.act"].activation == "sigmoid"
        assert monitor.latest["second.act"].n == 512


class CallingNet(nn.Module):
    """One activation as a module, one as a call, which a compiled graph does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second, self.head = nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.gelu(self.second(self.act(self.first(x)))))
        return out


@able
def test_what_only_eager_steps_measure_is_said_as_long_as_the_graph_measures() -> None:
    model = CallingNet()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    unseen: list[object] = []
    with torchsat.watch(model, every=1, compiled="in_graph", errors="raise") as monitor:
        train(model, run, 1)
        unseen.append(monitor.coverage.unseen)
        train(model, run, 2)
        unseen.append(monitor.coverage.unseen)
        # As another monitor does that makes everything run eager.
        compile_settings.force_eager("another")
        train(model, run, 2)
        unseen.append(monitor.coverage.unseen)
        assert monitor.coverage.seen == ("act", "gelu")
        compile_settings.release("another")
        train(model, run, 2)
        unseen.append(monitor.coverage.unseen)
    only_in_eager = (("gelu", ONLY_IN_EAGER),)
    assert unseen == [(), only_in_eager, (), only_in_eager]


@able
@pytest.mark.skipif(not hasattr(torch._inductor.config, "custom_should_partition_ops"), reason="before torch 2.9 an operator cannot be kept out")
def test_the_compiler_keeps_our_operators_out_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the scheduler of the compiler, which without a GPU records no CUDA graphs."""
    from torch._inductor.scheduler import Scheduler

    reasons: list[str] = []
    decide: Callable[..., str | None] = Scheduler.should_partition

    def should_partition(scheduler: Scheduler, node: Any) -> str | None:
        reason = decide(scheduler, node)
        operator = getattr(node.node, "op_overload", None)
        if "torchsat" in str(operator):
            reasons.append(f"{operator}: {reason}")
        return reason

    monkeypatch.setattr(Scheduler, "should_partition", should_partition)
    model = net()
    monitor = torchsat.watch(model, every=1, budget=None, compiled="in_graph", errors="raise")
    run, optimizer = torch.compile(model, fullgraph=True), torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        run(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    monitor.close()
    expected = [f"torchsat.{name}.default: custom partition op: torchsat::{name}.default" for name in ("gradient", "layer", "observe")]
    assert sorted(set(reasons)) == expected
