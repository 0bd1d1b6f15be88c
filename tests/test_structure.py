"""Which models can be watched: wrappers are looked through, and a model that cannot be hooked is refused with the reason."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchsat
from tests.models import mlp
from tests.training import train
from tests.truth import known
from torchsat.structure import find


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_distributed_wrapper_is_looked_through(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # gloo uses the loopback device, because the name of the host need not resolve.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, snapshots = mlp(), list[torchsat.Snapshot]()
        if when == "before":
            torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
        wrapped = nn.parallel.DistributedDataParallel(model)
        if when == "after":
            torchsat.watch(wrapped, every=1, errors="raise", sinks=(snapshots.append,))
        train(wrapped, 4)
        assert [[record.site for record in snapshot.records] for snapshot in snapshots] == [["1", "3"]] * 4
        assert all(snapshot["1"].grad_n == 16 * 32 and len(snapshot.weights) == 2 for snapshot in snapshots)
    finally:
        torch.distributed.destroy_process_group()


def test_what_cannot_be_watched_is_refused_with_the_reason() -> None:
    """The error names the reason and what to use instead."""
    with pytest.raises(TypeError, match=r"nn\.DataParallel cannot be watched.*DistributedDataParallel"):
        torchsat.watch(nn.DataParallel(mlp()))
    with pytest.raises(TypeError, match=r"TorchScript model cannot be watched.*close the .*monitor before torch\.jit\.script"):
        torchsat.watch(torch.jit.trace(mlp(), torch.zeros(1, 64)))
    with pytest.raises(TypeError, match="model is a str; allowed are a"):
        torchsat.watch("model")  # type: ignore[arg-type]


class Parts(nn.Module):
    """A model of which one part is scripted, and one is wrapped for data parallelism."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.scripted = nn.Linear(64, 8), nn.ReLU(), scripted
        self.wrapped = nn.DataParallel(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.wrapped(self.scripted(self.act(self.first(x)))))
        return out


@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
@pytest.mark.filterwarnings("ignore")
def test_a_scripted_part_is_named_and_the_rest_is_watched(how: str, caplog: pytest.LogCaptureFixture) -> None:
    def trained(watched: bool, **options: Any) -> tuple[list[float], torchsat.Coverage | None]:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        scripted = torch.jit.trace(plain, torch.zeros(1, 8)) if how == "trace" else torch.jit.script(plain.eval())
        if how == "freeze":
            scripted = torch.jit.freeze(scripted)
        model = Parts(scripted)
        monitor = torchsat.watch(model, every=1, budget=None, **options) if watched else None
        losses = train(model, 4)
        if monitor is not None:
            monitor.close()
            assert known(monitor.latest).step == 3
            assert {record.site for record in known(monitor.latest).records} == {"act", "wrapped.1"}
        return losses, None if monitor is None else monitor.coverage

    bare, _ = trained(False)
    losses, coverage = trained(True)
    assert losses == bare
    assert dict(known(coverage).unseen)["scripted"] == "a scripted module (torch.jit): it runs no Python hooks"
    excluded, coverage = trained(True, exclude="scripted")
    assert excluded == bare
    assert "scripted" not in dict(known(coverage).unseen)
    assert [message for message in caplog.messages if "longer" in message] == []


def test_data_parallelism_over_several_devices_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Parts(nn.Tanh())
    model.wrapped.device_ids = [0, 1]
    found = find(model, lambda module: None, lambda module: False, lambda name: True)
    assert found.unmeasurable == [("wrapped", "nn.DataParallel over several devices: it runs copies that are thrown away after each pass")]
    assert [each.name for each in found.layers] == ["first", "head"]


def test_a_walk_gives_every_module_by_its_name_as_a_site() -> None:
    model = mlp()
    found = find(model, lambda module: None, lambda module: False, lambda name: True)
    assert [(each.name, each.module) for each in found.modules] == [("", model), *((str(at), layer) for at, layer in enumerate(model))]
