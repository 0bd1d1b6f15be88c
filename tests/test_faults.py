"""A fault of the monitor never stops training: one warning says what is no longer watched, and the rest goes on."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import torchsat
from tests.models import Block, Calling, mlp
from tests.training import traces_of, train
from tests.truth import known
from torchsat import Activation, internals
from torchsat.sampling import Sample


def test_a_site_that_fails_is_named_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4]

    model = nn.Sequential(Block(), Broken(), nn.Linear(4, 2), nn.Tanh())
    row = Activation("broken", (Broken,), derivative=torch.ones_like)
    monitor = torchsat.watch(model, activations=(*torchsat.ACTIVATIONS, row))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    monitor.close()
    assert monitor.latest is not None
    assert [record.site for record in monitor.latest.records] == ["0.act", "3"]
    assert ("1", "TypeError: it maps (4, 8) to (4, 4)") in monitor.coverage.unseen
    assert [message for message in caplog.messages if "1:" in message] == [
        "torchsat: 1: TypeError: it maps (4, 8) to (4, 4); 1 is no longer watched. Training is not affected."
    ]


@pytest.mark.parametrize("fault", ["sink", "alert", "rule", "disk"])
def test_a_fault_never_stops_training(fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning says what is lost, and all else is still observed."""

    def fail(*arguments: object) -> float:
        raise OSError("no space left on device")

    snapshots: list[torchsat.Snapshot] = []
    rule = torchsat.Rule("mine", lambda record, snapshot: record.n, 1, None, lambda record, value, limit: "always", patience=1)
    options: dict[str, Any] = {"sinks": [snapshots.append], "rules": (rule,)}
    if fault == "sink":
        options["sinks"] = [fail, snapshots.append]
    elif fault == "alert":
        options["on_alert"] = fail
    elif fault == "rule":
        options["rules"] = (torchsat.Rule("mine", fail, 1, None, lambda *_: ""), *torchsat.RULES)
    monitor = torchsat.watch(mlp_ := mlp(), tmp_path if fault == "disk" else None, every=1, **options)
    if fault == "disk":
        monkeypatch.setattr(event_file_writer.EventFileWriter, "add_event", fail)
    train(mlp_, 5)
    monitor.close()
    assert len(snapshots) == 5
    assert len([message for message in caplog.messages if "no space left" in message]) == 1
    assert "Training is not affected." in next(message for message in caplog.messages if "no space left" in message)


@pytest.mark.parametrize("gone", ["is_traced", "open_dispatch_modes", "without_function_modes"])
def test_a_torch_without_a_private_name_is_not_watched(gone: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*arguments: object) -> bool:
        raise AttributeError("module 'torch' has no such attribute")

    bare, watched = mlp(), mlp()
    watched.load_state_dict(bare.state_dict())
    torch.manual_seed(1)
    train(bare, 5)
    monkeypatch.setattr(internals, gone, lacks)
    torch.manual_seed(1)
    monitor = torchsat.watch(watched, every=1)
    train(watched, 5)
    monitor.close()
    assert all(torch.equal(one, other) for one, other in zip(bare.parameters(), watched.parameters(), strict=True))
    assert monitor.latest is None
    assert repr(monitor).startswith("<torchsat.Monitor: nothing observed yet")
    (told,) = caplog.messages
    assert told.startswith(f"torchsat: this version does not know torch {torch.__version__} (AttributeError: module 'torch' has no such attribute)")
    with pytest.raises(RuntimeError, match="so nothing is watched"):
        torchsat.watch(mlp(), errors="raise")


def test_a_bug_of_ours_ends_monitoring_with_one_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*arguments: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("torchsat.transport.local.pack", bug)
    model = mlp()
    torchsat.watch(model, every=1)
    train(model, 5)
    assert len([message for message in caplog.messages if "all monitoring stops" in message]) == 1
    assert not traces_of(model)
    with pytest.raises(KeyError, match="bug"):
        train_watched_raising()


def test_an_odd_optimizer_stops_monitoring_not_training(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(torch.optim.SGD):
        @property
        def param_groups(self) -> list[dict[str, object]]:
            if sys._getframe(1).f_code.co_filename.endswith("steps.py"):
                raise AttributeError("no groups")
            return self._groups

        @param_groups.setter
        def param_groups(self, groups: list[dict[str, object]]) -> None:
            self._groups = groups

    model = mlp()
    torchsat.watch(model, every=1)
    train(model, 3, optimizer=Odd)
    assert len(caplog.messages) == 1
    assert "AttributeError: no groups; all monitoring stops. Training is not affected." in caplog.messages[0]


def train_watched_raising() -> None:
    model = mlp()
    torchsat.watch(model, every=1, errors="raise")
    train(model, 2)


class Strange(Tensor):
    """A tensor that keeps its numbers in a way of its own."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Strange":
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, requires_grad=held.requires_grad)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        made = func(*tree_map(lambda each: each.held if isinstance(each, Strange) else each, args), **(kwargs or {}))
        return tree_map(lambda each: Strange(each) if isinstance(each, Tensor) else each, made)


def test_a_fault_at_many_places_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Every place is named in the coverage, and the log names how many there are."""
    model = nn.Sequential(*(each for _ in range(60) for each in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 1))
    monitor = torchsat.watch(model, every=1, budget=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(Strange(torch.randn(4, 8))).sum().backward()
        optimizer.step()
    monitor.close()
    reason = "TypeError: its input is a Strange, which keeps its numbers in a way of its own"
    assert monitor.coverage.unseen == tuple((str(at), reason) for at in range(1, 121, 2))
    assert [message for message in caplog.messages if "longer" in message] == [
        f"torchsat: 60 places such as 1, 3, 5: {reason}; they are no longer watched. Training is not affected."
    ]


def test_a_fault_in_the_backward_stays_with_its_site(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.GLU())
    monitor = torchsat.watch(model, every=1, budget=None)

    def broken(sample: Sample, tensor: Tensor) -> Tensor:
        if internals.in_backward():
            raise RuntimeError("no sample")
        return take(sample, tensor)

    take = Sample.take
    monkeypatch.setattr(Sample, "take", broken)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    monitor.close()
    assert [place for place, _ in monitor.coverage.unseen] == ["3/glu", "1"]


def test_a_call_that_cannot_be_measured_is_named_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Net(Calling):
        def forward(self, x: Tensor) -> Tensor:
            torch.tanh(torch.eye(3).to_sparse())
            return super().forward(x)

    model = Net(F.selu)
    monitor = torchsat.watch(model, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model(torch.randn(4, 16)).sum().backward()
        optimizer.step()
    assert monitor.coverage.seen == ("selu",)
    assert "sparse" in dict(monitor.coverage.unseen)["tanh"]
    assert len([message for message in caplog.messages if "tanh" in message]) == 1


def test_a_sink_that_raises_for_a_developer_raises_once_and_monitoring_goes_on() -> None:
    steps: list[int] = []

    def sink(snapshot: torchsat.Snapshot) -> None:
        steps.append(snapshot.step)
        if snapshot.step == 1:
            raise KeyError("sink")

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kept: list[int] = []
    monitor = torchsat.watch(model, every=1, sinks=[sink, lambda snapshot: kept.append(snapshot.step)], errors="raise")
    raised = []
    for step in range(4):
        model(torch.randn(4, 64)).sum().backward()
        try:
            optimizer.step()
        except KeyError:
            raised.append(step)
    assert (steps, raised) == ([0, 1], [1])
    # What came after the sink in that step is lost, and the step itself is not counted; then all goes on without the sink.
    assert kept[0] == 0
    assert kept[-1] == known(monitor.latest).step
    assert monitor.coverage.unseen == ()
