"""Which models can be watched: wrappers are looked through, and a model that cannot be hooked is refused with the reason."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchsat
from tests.models import mlp
from tests.training import train
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


def test_a_walk_gives_every_module_by_its_name_as_a_site() -> None:
    model = mlp()
    found = find(model, lambda module: None, lambda module: False, lambda name: True)
    assert [(each.name, each.module) for each in found.modules] == [("", model), *((str(at), layer) for at, layer in enumerate(model))]
