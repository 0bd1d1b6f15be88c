"""Weights and activations that are divided among ranks by FSDP2, by tensor parallelism or by both: every part counts once."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.models import compiled, linear_at
from tests.processes import SIZE, Run, alone, assert_equal, fsdp2, hybrid, logged, mlp, rank, train, watched
from tests.training import loop_of
from torchsat.compiling import Mode


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return out


def sharded(how: str) -> Any:
    model: nn.Module = Checkpointed() if how == "checkpoint" else mlp()
    given: dict[str, Any] = {}
    if how == "offload":
        given["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if how == "kept":
        given["reshard_after_forward"] = False
    if how == "hybrid":
        given["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if how == "mixed":
        given["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    monitor, kept = watched(model) if how == "before" else (None, [])
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **given)
    fully_shard(model, **given)
    if monitor is None:
        monitor, kept = watched(model)
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    train(run, model.parameters())
    monitor.close()
    return kept, alone(Checkpointed() if how == "checkpoint" else mlp())


@fsdp2
@pytest.mark.parametrize("how", ["after", "before", "kept", "offload", pytest.param("hybrid", marks=hybrid), "checkpoint", "compiled"])
def test_sharded_ranks_record_what_one_process_does(run: Run, how: str) -> None:
    kept, expected = run(sharded, how)[0]
    # Every rank reads its own part of a weight, in runs of 16 elements. Together the ranks read every element, but they sum in another order.
    assert_equal(kept, expected)


@fsdp2
def test_sharded_mixed_precision(run: Run) -> None:
    kept, expected = run(sharded, "mixed")[0]
    assert [each["1"].n for each in kept] == [each["1"].n for each in expected]
    assert [each["1"].saturated for each in kept] == pytest.approx([each["1"].saturated for each in expected], abs=0.01)
    assert [each.weights[0].norm for each in kept] == pytest.approx([each.weights[0].norm for each in expected], rel=3e-3)


def flattened(original: bool, before: bool) -> Any:
    messages, model = logged(), mlp()
    monitor = watched(model, errors="warn")[0] if before else None
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
    if monitor is None:
        with pytest.raises(TypeError, match=r"FSDP1.* cannot be watched.*fully_shard"):
            torchsat.watch(compiled(wrapped))
        return None
    train(wrapped, wrapped.parameters())
    monitor.close()
    return messages, monitor.latest


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused_or_where_it_comes_later_given_up(run: Run, original: bool) -> None:
    run(flattened, original, False)
    for (message,), latest in run(flattened, original, True):
        assert re.search("FSDP1.* cannot be watched.*fully_shard.*all monitoring stops", message)
        assert latest is None


def in_graph(how: str) -> Any:
    model = mlp()
    if how == "sharded":
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer)
        fully_shard(model)
    wrapped: nn.Module = model if how == "sharded" else DistributedDataParallel(model)
    monitor, kept = watched(wrapped, compiled="in_graph")
    train(torch.compile(wrapped, backend="aot_eager"), model.parameters())
    in_graph = loop_of(monitor).observer.turn > 1 and loop_of(monitor).observer.compilation.mode is Mode.IN_GRAPH
    monitor.close()
    return kept, alone(mlp()), in_graph


@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.6 and 2.7 are refused: they compile anew for each of many equal blocks")
@pytest.mark.parametrize("how", ["data_parallel", "sharded"])
def test_ranks_measure_inside_the_graph(run: Run, how: str) -> None:
    kept, expected, is_in_graph = run(in_graph, how)[0]
    assert is_in_graph
    assert_equal(kept, expected)


def tensor_parallel(local: bool) -> Any:
    model = mlp(out=4)
    mesh = init_device_mesh("cpu", (SIZE,))
    plan: dict[str, Any] = {"0": ColwiseParallel(use_local_output=local), "2": RowwiseParallel(use_local_output=local)}
    if not local:
        plan["4"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    monitor, kept = watched(model)
    train(model, model.parameters(), mine=lambda x: x)
    monitor.close()
    return kept, alone(mlp(out=4), slices=False)


@pytest.mark.parametrize("local", [False, True])
def test_tensor_parallel_shards_count_once_and_replicas_once(run: Run, local: bool) -> None:
    kept, expected = run(tensor_parallel, local)[0]
    # dL/da of a replicated DTensor is a sum over ranks that is still pending, so that no rank knows its value.
    assert_equal(kept, expected, but=() if local else ("attenuation", "grad_a_rms", "blocked", "trapped", "leaving"))
    assert kept[-1]["1"].units == 32
    if not local:
        assert kept[-1]["3"].attenuation is None
        assert kept[-1]["1"].attenuation == pytest.approx(expected[-1]["1"].attenuation, rel=1e-12)


def two_dimensional() -> Any:
    model = mlp()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    monitor, kept = watched(model)
    train(model, model.parameters(), mine=lambda x: x.chunk(2)[rank() // 2])
    monitor.close()
    return kept, alone(mlp(), slices=False)


@fsdp2
def test_tensor_and_data_parallelism_together(run: Run) -> None:
    kept, expected = run(two_dimensional)[0]
    assert_equal(kept, expected)


def pending() -> Any:
    mesh = init_device_mesh("cpu", (SIZE,))
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    first, last = linear_at(model, 0), linear_at(model, 2)
    first.weight = nn.Parameter(distribute_tensor(first.weight.detach(), mesh, [Shard(1)]))
    first.register_parameter("bias", None)
    last.weight = nn.Parameter(distribute_tensor(last.weight.detach(), mesh, [Replicate()]))
    last.bias = nn.Parameter(distribute_tensor(last.bias.detach(), mesh, [Replicate()]))
    monitor, _ = watched(model, errors="warn")
    x = distribute_tensor(torch.randn(8, 16), mesh, [Shard(1)])
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    monitor.close()
    return monitor.coverage.unseen, monitor.latest


def test_a_sum_that_has_not_been_taken_is_not_measured(run: Run) -> None:
    for unseen, latest in run(pending):
        assert ("1", "TypeError: its input is a sum over ranks that has not been taken: no rank has an element of it") in unseen
        assert latest is None
