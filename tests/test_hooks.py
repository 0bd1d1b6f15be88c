"""Hooks are on the model only in observed steps, and a watched model can be copied, saved, traced and exported as if it had no hooks."""

import copy
import io
import pickle
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchsat
from tests.models import Block, Wrapped, mlp
from tests.training import loop_of, traces_of, train
from tests.truth import known
from torchsat import loop
from torchsat.observe import hooks


def test_a_watched_model_is_pickled_and_copied_without_us() -> None:
    model = nn.Sequential(Block(), Block())
    reference = {name: value.clone() for name, value in model.state_dict().items()}
    monitor = torchsat.watch(model, errors="raise")
    assert list(model.state_dict()) == list(reference)

    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"torchsat" not in buffer.getvalue()
    assert b"torchsat" not in pickle.dumps(model)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    copies = [loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module]
    x = torch.randn(4, 8)
    for twin in copies:
        assert torch.equal(twin(x), model(x))
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    passes = known(loop_of(monitor).observer.observation).passes
    seen = [each.rows["0.act"][0].item() for each in passes if each.rows]
    for twin in copies:
        twin(x).sum().backward()
    assert [each.rows["0.act"][0].item() for each in passes if each.rows] == seen
    optimizer.step()


def test_tracing_and_exporting_a_watched_model_is_not_disturbed() -> None:
    model, x = Block(), torch.randn(4, 8)
    plain = str(torch.jit.trace(copy.deepcopy(model), x).graph)
    torchsat.watch(model, every=1, errors="raise")
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert model.act._forward_hooks
    assert str(torch.jit.trace(model, x).graph).count("aten::") == plain.count("aten::")
    # Strict export uses Dynamo, and that of torch 2.6 fails on any module hook, ours or not.
    for strict in (False,) if torch.__version__ < "2.7" else (False, True):
        exported = torch.export.export(model, (x,), strict=strict)
        targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert targets == [torch.ops.aten.linear.default, torch.ops.aten.tanh.default]


def test_unobserved_steps_run_none_of_our_code_on_the_model() -> None:
    """Steps that are not observed cost nothing, because no hook is on the model then."""
    model, seen = mlp(), {}
    torchsat.watch(model, every=5, errors="raise")
    seen[0] = bool(traces_of(model))
    train(model, 14, each=lambda step: seen.__setitem__(step + 1, bool(traces_of(model))))
    assert [step for step, hooked in seen.items() if hooked] == [0, 1, 2, 4, 5, 10]


def test_a_model_may_hold_its_monitor() -> None:
    model = mlp()
    model.monitor = torchsat.watch(model)  # type: ignore[assignment]
    assert copy.deepcopy(model).monitor is None
    assert pickle.loads(pickle.dumps(model)).monitor is None


def test_between_observations_nothing_of_ours_runs_but_the_hook_on_the_optimizer() -> None:
    """Counts every Python call into a file of torchsat during forward, backward and optimizer step."""
    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torchsat.watch(model, every=50, errors="raise")
    house = str(Path(torchsat.__file__).parent)
    ours: list[str] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(house):
            ours.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    calls = []
    for _ in range(12):
        ours.clear()
        sys.setprofile(count)
        model(torch.randn(8, 64)).sum().backward()
        passes = len(ours)
        optimizer.step()
        sys.setprofile(None)
        calls.append((passes, len(ours), sorted(set(ours))))
    assert all(calls[step][0] > 20 for step in (0, 1, 2, 4, 8))
    hook = [
        "loop.after_step",
        "loop.before_step",
        "hooks.is_capturing",
        "steps.begins_short",
        "steps.ends",
        "process._after_step",
        "process._before_step",
        "compile_settings.restore_stance",
        "process._tell",
    ]
    for step in (5, 6, 9, 10, 11):
        passes, total, names = calls[step]
        assert passes == 0
        assert total <= 14
        # In the first steps after an observation the schedule reads the clock.
        assert set(names) <= {
            *hook,
            "process.<listcomp>",
            "schedule.due",
            "schedule.follow",
            "conftest.mark",
        }


class CountingCalls(TorchFunctionMode):
    """A mode of the user's that counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.__name__] += 1
        return function(*args, **(kwargs or {}))


class CountingOperators(TorchDispatchMode):
    """A mode of the user's that counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [CountingCalls, CountingOperators])
@pytest.mark.parametrize("by_hand", [False, True])
def test_the_modes_of_the_user_see_nothing_of_ours(kind: type[CountingCalls] | type[CountingOperators], by_hand: bool) -> None:
    counts = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = torchsat.watch(model, every=1, budget=None, errors="raise") if watched else None
        with kind() as mode:
            for _ in range(3):
                model(torch.ones(4, 8)).sum().backward()
                optimizer.step()
                if by_hand and monitor is not None:
                    monitor.step()
        counts.append(dict(mode.calls))
        if monitor is not None:
            monitor.close()
            assert monitor.latest is not None
    assert counts[0] == counts[1]


@pytest.mark.parametrize("by_hand", [False, True])
def test_steps_that_are_captured_in_a_cuda_graph_are_left_alone(
    by_hand: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CUDA graph is captured, says torch. tests/test_gpu.py captures one."""
    model, capturing, found = mlp(), False, list[torchsat.Snapshot]()
    monkeypatch.setattr(hooks, "is_capturing", lambda: capturing)
    monkeypatch.setattr(loop, "is_capturing", lambda: capturing)
    monitor = torchsat.watch(model, every=1, budget=None, sinks=[found.append], errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if by_hand:
            monitor.step()
        else:
            optimizer.step()

    step(torch.randn(16, 64))
    capturing = True
    for _ in range(2):
        step(torch.full((16, 64), torch.nan))
    capturing = False
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    step(torch.randn(16, 64))
    monitor.close()
    assert [snapshot.step for snapshot in found] == [0, 1]
    assert [[record.nonfinite for record in snapshot.records] for snapshot in found] == [[0] * len(found[0].records)] * 2
    assert [message for message in caplog.messages if "was captured in a CUDA graph" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_where_cuda_was_never_used_nobody_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch on a machine without a driver raises where it is asked for the current stream."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)
    assert not hooks.is_capturing()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert hooks.is_capturing()
