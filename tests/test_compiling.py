"""Compiled models: an observed step runs eager, and no observation makes torch compile again."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.testing import CompileCounterWithBackend

import torchsat
from tests.models import Wrapped, compiled, mlp
from tests.training import train


class Frames:
    """A compiler backend that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("make", [mlp, Wrapped])
@pytest.mark.parametrize(
    "how", ["watch_compiled", "watch_then_compile", "compile_then_watch_inner", "in_place", "function", "submodule", "submodule_later"]
)
def test_a_compiled_model_is_observed_in_eager_without_a_recompile(make: Callable[[], Any], how: str) -> None:
    def run(watched: bool) -> tuple[list[float], int, list[torchsat.Snapshot]]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, frames, snapshots = make(), Frames(), list[torchsat.Snapshot]()

        def watch(module: nn.Module) -> None:
            if watched:
                torchsat.watch(module, every=8, errors="raise", sinks=(snapshots.append,))

        call: Any = model
        if how == "watch_compiled":
            call = torch.compile(model, backend=frames)
            watch(call)
        elif how == "watch_then_compile":
            watch(model)
            call = torch.compile(model, backend=frames, fullgraph=True)
        elif how == "compile_then_watch_inner":
            call = torch.compile(model, backend=frames, fullgraph=True)
            watch(model)
        elif how == "in_place":
            watch(model)
            (model if make is Wrapped else model[0]).compile(backend=frames)
        elif how == "function":
            watch(model)

            def times_one(x: Tensor) -> Any:
                return model(x) * 1.0

            call = torch.compile(times_one, backend=frames, fullgraph=True)
        elif how == "submodule":
            if make is Wrapped:
                model.net = torch.compile(model.net, backend=frames)
            else:
                model[1] = torch.compile(model[1], backend=frames)
            watch(model)
        else:
            watch(model)
            if make is Wrapped:
                model.net = torch.compile(model.net, backend=frames)
            else:
                model[1] = torch.compile(model[1], backend=frames)
        generator = torch.Generator().manual_seed(0)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(20):
            loss = call(torch.randn(8, 64, generator=generator)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, frames.count, snapshots

    (plain, graphs, _), (watched, graphs_watched, snapshots) = run(False), run(True)
    assert watched == pytest.approx(plain, rel=1e-5)
    assert graphs_watched == graphs
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 4, 8, 16]
    assert all([record.n for record in snapshot.records] == [256, 256] for snapshot in snapshots)


def test_what_is_compiled_inside_an_uncompiled_model_stays_compiled() -> None:
    torch._dynamo.reset()
    frames = Frames()
    scale = torch.compile(lambda x: x * 2.0 + 1.0, backend=frames)
    running = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            before = frames.count
            x = scale(x)
            running.append(frames.count - before)
            out: Tensor = self.net(x)
            return out

    model = Net()
    torchsat.watch(model, errors="raise")
    train(model, 3)
    assert running == [1, 0, 0]


def test_an_idle_watched_model_forces_nobody_into_eager_for_long() -> None:
    torch._dynamo.reset()
    frames, teacher, student = Frames(), mlp(), mlp()
    torchsat.watch(teacher, errors="raise")
    call, optimizer = torch.compile(student, backend=frames), torch.optim.SGD(student.parameters(), lr=0.1)
    counts = []
    for _ in range(10):
        call(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        counts.append(frames.count)
    assert counts == [0] * 8 + [1] * 2


@pytest.mark.parametrize("compiled", ["eager", "in_graph"])
@pytest.mark.parametrize("earlier", [1, 20])
def test_another_model_that_trains_first_costs_no_compilation(earlier: int, compiled: Literal["eager", "in_graph"]) -> None:
    """If the hooks of an observation were compiled into the model, every later observation would compile it again."""
    torch._dynamo.reset()
    frames, found = Frames(), list[torchsat.Snapshot]()
    trained: list[tuple[nn.Module, Callable[[Tensor], Tensor], torch.optim.Optimizer]] = []
    for model in (mlp(), mlp()):
        call = torch.compile(model, backend=frames if not trained else "eager", fullgraph=True)
        trained.append((model, call, torch.optim.SGD(model.parameters(), lr=0.1)))
    torchsat.watch(trained[0][0], every=4, budget=None, compiled=compiled, errors="raise", sinks=[found.append])

    def step(which: int) -> None:
        _, call, optimizer = trained[which]
        call(torch.randn(4, 64)).sum().backward()
        optimizer.step()

    for _ in range(earlier):
        step(1)
    for _ in range(10):
        step(0)
        step(1)
    # After 20 steps of the other model the observation of step 0 has been given up.
    assert [snapshot.step for snapshot in found] == [0, 1, 2, 4, 8][earlier > 8 :]
    assert frames.count == 1


def test_a_compiled_validation_mostly_runs_its_graph() -> None:
    torch._dynamo.reset()
    eager, model, snapshots = [], Wrapped(), list[torchsat.Snapshot]()
    call, optimizer = compiled(model, backend=Frames()), torch.optim.SGD(model.parameters(), lr=0.1)
    torchsat.watch(call, every=1, errors="raise", sinks=(snapshots.append,))
    for _ in range(4):
        call(torch.randn(8, 64)).sum().backward()
        optimizer.step()
        model.eval()
        for _ in range(3):
            eager.append(eval_frame._stance.stance == "force_eager")
            with torch.no_grad():
                call(torch.randn(8, 64))
        model.train()
    # A validation pass that has a compiled graph runs it. Only the first pass after a training step still starts under our eager stance.
    # No observation is missed.
    assert eager == [True, False, False] * 4
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 3]


def test_the_users_own_stance_is_left_alone() -> None:
    model = mlp()
    torchsat.watch(model, errors="raise")
    with torch.compiler.set_stance("eager_on_recompile"):
        train(model, 3)
        assert eval_frame._stance.stance == "eager_on_recompile"
    train(model, 1)
    assert eval_frame._stance.stance == "default"


@pytest.mark.parametrize("mode", ["eager", pytest.param("in_graph", marks=pytest.mark.skipif(torch.__version__ < "2.8", reason="refused"))])
@pytest.mark.parametrize("grad", [False, True])
def test_a_validation_before_training_keeps_fullgraph_content(mode: Literal["eager", "in_graph"], grad: bool) -> None:
    """With fullgraph=True, torch raises if no graph ran during a call and the stance is the default when the call ends. The first observation is in
    this position, because it gives its stance back during the call."""
    torch._dynamo.reset()
    model = mlp()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, every=2, compiled=mode, errors="raise") as monitor:
        for _ in range(4):
            model.eval()
            for _ in range(3):
                with torch.set_grad_enabled(grad):
                    run(torch.randn(4, 64))
            model.train()
            run(torch.randn(4, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert monitor.latest is not None
        assert monitor.latest.step == 2
    # The model has no dropout, and the graph holds no hook of ours, so one graph serves training and evaluation if gradients are on.
    assert counter.frame_count == (1 if grad and mode == "eager" else 2)
    torch._dynamo.reset()
