"""Several ranks observe as one: four processes, made once, that run the functions of this file together."""

import contextlib
import copy
import itertools
import logging
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import torchsat
from torchsat import monitor as monitor_
from torchsat import process, ranks
from torchsat.record import Snapshot

SIZE = 4
STEPS = 5
BATCH = 64

fsdp2 = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 does not run on a CPU")
hybrid = pytest.mark.skipif(torch.__version__ < "2.8", reason="hybrid FSDP2 of torch 2.6 and 2.7 does not run on a CPU")
one_f_one_b = pytest.mark.skipif(torch.__version__ < "2.8", reason="1F1B of torch 2.6 and 2.7 hangs over gloo, without torchsat too")


def work(rank: int, port: int, pipe: Connection) -> None:
    """One process: runs what it is sent, until it is sent nothing."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=30))
    while (sent := pipe.recv()) is not None:
        scenario, given = sent
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            pipe.send((scenario(*given), None))
        except BaseException:
            pipe.send((None, f"rank {rank}:\n{traceback.format_exc()}"))
        process._close_all()
        torch._dynamo.reset()
    dist.destroy_process_group()


Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a function on all ranks, and gives what each returned."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    spawn = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for rank in range(SIZE):
        ours, theirs = spawn.Pipe()
        workers.append(spawn.Process(target=work, args=(rank, store.port, theirs), daemon=True))
        workers[-1].start()
        pipes.append(ours)

    def everywhere(scenario: Callable[..., Any], *given: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send((scenario, given))
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(100), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        errors = [error for _, error in answers if error]
        assert not errors, "\n".join(errors)
        return [found for found, _ in answers]

    yield everywhere
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.send(None)
    for worker in workers:
        worker.join(20)
        worker.kill()


def rank() -> int:
    return dist.get_rank()


def mlp(width: int = 32, out: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def batches(steps: int = STEPS, size: int = BATCH) -> list[Tensor]:
    torch.manual_seed(1)
    return [2 * torch.randn(size, 16) for _ in range(steps)]


def part(x: Tensor) -> Tensor:
    """This rank's rows; they differ in number."""
    bounds = [0, 10, 24, 44, len(x)]
    return x[bounds[rank()] : bounds[rank() + 1]]


def watched(model: Any, **given: Any) -> tuple[torchsat.Monitor, list[Snapshot]]:
    """Every step, all elements; and what the sinks of this rank get."""
    kept: list[Snapshot] = []
    return torchsat.watch(model, **{"every": 1, "budget": None, "sample": None, "sinks": [kept.append], "errors": "raise", **given}), kept


def train(run: Callable[[Tensor], Tensor], parameters: Any, mine: Callable[[Tensor], Tensor] = part, steps: int = STEPS) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for x in batches(steps):
        optimizer.zero_grad()
        run(mine(x)).square().mean().backward()
        optimizer.step()


def alone(model: nn.Module, slices: bool = True, steps: int = STEPS, **given: Any) -> list[Snapshot]:
    """What one process records that is given whole batches; the loss is what ranks with unequal slices average."""
    monitor, kept = watched(model, group=None, **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches(steps):
        optimizer.zero_grad()
        out = model(x)
        bounds = [0, 10, 24, 44, len(x)]
        parts = [out[first:last].square().mean() for first, last in itertools.pairwise(bounds)] if slices else [out.square().mean()]
        torch.stack(parts).mean().backward()
        optimizer.step()
    monitor.close()
    return kept


def assert_equal(found: list[Snapshot], expected: list[Snapshot], rtol: float = 1e-12, but: tuple[str, ...] = ()) -> None:
    """Counts to the last digit, all else to rounding."""
    assert [each.step for each in found] == [each.step for each in expected]
    for one, other in zip(found, expected, strict=True):
        pairs = [*zip(one.records, other.records, strict=True), *zip(one.weights, other.weights, strict=True)]
        assert pairs
        for ours, theirs in pairs:
            for name, value in vars(theirs).items():
                got = getattr(ours, name)
                if name in ("worst", "worst_rank", *but):
                    continue
                if isinstance(value, float):
                    assert got == pytest.approx(value, rel=rtol, abs=1e-15), (one.step, name)
                elif name == "histogram" and value is not None:
                    assert got == pytest.approx(value, rel=rtol), name
                elif name == "heads" and value is not None:
                    for head, head_alone in zip(got, value, strict=True):
                        assert vars(head) == pytest.approx(vars(head_alone), rel=rtol)
                else:
                    assert got == value, (one.step, name)


def data_parallel(static: bool, before: bool) -> Any:
    model = mlp()
    monitor, kept = watched(model) if before else (None, [])
    wrapped = DistributedDataParallel(model, static_graph=static)
    if monitor is None:
        monitor, kept = watched(wrapped)
    train(wrapped, wrapped.parameters())
    monitor.close()
    assert monitor.latest is not None
    return kept, (monitor.latest.records, monitor.latest.weights), alone(mlp())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_data_parallel_ranks_record_what_one_process_does(run: Run, static: bool, before: bool) -> None:
    (kept, latest, expected), *others = run(data_parallel, static, before)
    assert_equal(kept, expected)
    assert [len(each) for each, _, _ in others] == [0, 0, 0]
    assert all(other == latest for _, other, _ in others)
    assert latest[0][0].n == BATCH * 32


def accumulated() -> Any:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for first, second in zip(batches()[::2], batches()[1::2], strict=False):
        optimizer.zero_grad()
        with wrapped.no_sync():
            wrapped(part(first)).square().mean().backward()
        wrapped(part(second)).square().mean().backward()
        optimizer.step()
    monitor.close()
    return kept


def test_accumulated_micro_batches_count_once_each(run: Run) -> None:
    kept = run(accumulated)[0]
    assert [each["1"].n for each in kept] == [2 * BATCH * 32] * 2
    assert [each["1"].grad_n for each in kept] == [2 * BATCH * 32] * 2


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
    # A rank reads its part of a weight, in runs of 16: together as many elements as there are, in another order.
    assert_equal(kept, expected)


@fsdp2
def test_sharded_mixed_precision(run: Run) -> None:
    kept, expected = run(sharded, "mixed")[0]
    assert [each["1"].n for each in kept] == [each["1"].n for each in expected]
    assert [each["1"].saturated for each in kept] == pytest.approx([each["1"].saturated for each in expected], abs=0.01)
    assert [each.weights[0].norm for each in kept] == pytest.approx([each.weights[0].norm for each in expected], rel=3e-3)


def flattened(original: bool, before: bool) -> Any:
    messages, model = _messages(), mlp()
    monitor = watched(model, errors="warn")[0] if before else None
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
    if monitor is None:
        with pytest.raises(TypeError, match=r"FSDP1.* cannot be watched.*fully_shard"):
            torchsat.watch(torch.compile(wrapped))
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
    in_graph = monitor._taps.turn > 1 and monitor._silent == 0 and monitor._wires is not None
    monitor.close()
    return kept, alone(mlp()), in_graph


@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.6 and 2.7 are refused: they compile anew for each of many equal blocks")
@pytest.mark.parametrize("how", ["data_parallel", "sharded"])
def test_ranks_measure_inside_the_graph(run: Run, how: str) -> None:
    kept, expected, is_in_graph = run(in_graph, how)[0]
    assert is_in_graph
    assert_equal(kept, expected)


def fails_on_one() -> Any:
    messages = _messages()
    model = DistributedDataParallel(mlp())
    monitor, kept = watched(model, errors="warn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, x in enumerate(batches(6)):
        if rank() == 1 and step == 2:
            monitor._taps.feeders = lambda: 1 / 0  # type: ignore[method-assign]
        optimizer.zero_grad()
        model(part(x)).square().mean().backward()
        optimizer.step()
        dist.barrier()
        monitor.flush()
    monitor.close()
    return messages, [each["1"].n for each in kept], monitor.latest["1"].n if monitor.latest else None


def test_a_fault_on_one_rank_is_no_fault_of_the_others(run: Run) -> None:
    answers = run(fails_on_one)
    assert answers[0][1] == [BATCH * 32] * 2 + [10 * 32] * 4
    assert [latest for _, _, latest in answers] == [10 * 32, BATCH * 32, 20 * 32, 20 * 32]
    assert [len(messages) for messages, _, _ in answers] == [1, 1, 1, 1]
    assert "division by zero" in answers[1][0][0]


def data_parallel_compiled() -> Any:
    model = DistributedDataParallel(mlp())
    monitor, kept = watched(model)
    train(torch.compile(model, backend="aot_eager"), model.parameters())
    monitor.close()
    return kept, alone(mlp())


def test_compiled_data_parallel_ranks(run: Run) -> None:
    kept, expected = run(data_parallel_compiled)[0]
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
    # dL/da of a replicated DTensor is a sum that has not been taken yet: it is not known.
    assert_equal(kept, expected, but=() if local else ("attenuation", "grad_a_rms"))
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


def pipelined(kind: str) -> Any:
    layers = [*mlp()[:3], nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)]
    whole = nn.Sequential(*layers)
    stages = [(0, 2), (2, 4), (4, 6), (6, 7)]
    first, last = stages[rank()]
    torch.manual_seed(2)
    for layer in whole:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    expected_model = nn.Sequential(*(whole[at] for at in range(7)))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    mine = nn.Sequential(*(whole[at] for at in range(first, last)))
    stage = PipelineStage(mine, rank(), SIZE, torch.device("cpu"))
    schedules = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
    # Where torch does not divide by the number of micro-batches, the loss has to.
    parts = 1 if hasattr(stage, "scale_grads") else 4
    schedule = schedules[kind](stage, n_microbatches=4, loss_fn=lambda out, target: (out - target).square().mean() / parts)
    monitor, kept = watched(stage)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    for x in batches():
        optimizer.zero_grad()
        schedule.step(*[x] * (rank() == 0), target=torch.zeros(BATCH, 3) if rank() == SIZE - 1 else None)
        optimizer.step()
    monitor.close()
    expected_model.load_state_dict(state)
    return kept, alone(expected_model, slices=False)


@pytest.mark.parametrize("kind", [pytest.param("1f1b", marks=one_f_one_b), "gpipe"])
def test_the_stages_of_a_pipeline_are_one_model(run: Run, kind: str) -> None:
    kept, expected = run(pipelined, kind)[0]
    assert [each.site for each in kept[-1].records] == ["stage0.1", "stage1.1", "stage2.1"]
    assert [each.after for each in kept[-1].records] == [(), ("stage0.1",), ("stage1.1",)]
    assert [each.output for each in kept[-1].records] == [False] * 3
    assert_equal(kept, expected, but=("site", "after", "name", "feeds"))


def interleaved() -> Any:
    torch.manual_seed(2)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(7)] + [nn.Sequential(nn.Linear(16, 3))]
    expected_model = copy.deepcopy(nn.Sequential(*blocks))
    mine = [rank(), rank() + SIZE]
    stages = [PipelineStage(blocks[at], at, 2 * SIZE, torch.device("cpu")) for at in mine]
    schedule = ScheduleInterleaved1F1B(stages, n_microbatches=4, loss_fn=lambda out, target: (out - target).square().mean())
    monitor, kept = watched(stages)
    optimizer = torch.optim.SGD([parameter for at in mine for parameter in blocks[at].parameters()], lr=0.1)
    for x in batches():
        optimizer.zero_grad()
        schedule.step(*[x] * (rank() == 0), target=torch.zeros(BATCH, 3) if rank() == SIZE - 1 else None)
        optimizer.step()
    monitor.close()
    return kept, alone(expected_model, slices=False)


@one_f_one_b
def test_a_rank_runs_several_stages(run: Run) -> None:
    kept, expected = run(interleaved)[0]
    assert [each.site for each in kept[-1].records] == [f"stage{at}.1" for at in range(7)]
    assert [each.after for each in kept[-1].records] == [(), *((f"stage{at}.1",) for at in range(6))]
    assert [each.name for each in kept[-1].weights] == [f"stage{at}.0" for at in range(7)]
    assert [each.output for each in kept[-1].records] == [False] * 7
    assert_equal(kept, expected, but=("site", "after", "name", "feeds"))


class Experts(nn.Module):
    """Each rank runs the expert that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 3)
        self.choice = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.experts[self.choice](x))
        return out


def routed() -> Any:
    model = Experts()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    monitor, kept = watched(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Rank 3 runs another expert; from step 4 on rank 0 runs a third one.
    for step, x in enumerate(batches(12)):
        model.choice = 1 if rank() == 3 else 2 if rank() == 0 and step >= 4 else 0
        optimizer.zero_grad()
        wrapped(part(x)).square().mean().backward()
        optimizer.step()
    monitor.close()
    return kept


def test_ranks_that_run_other_sites_neither_hang_nor_skew(run: Run) -> None:
    kept = run(routed)[0]
    found = [{record.site: record.n for record in snapshot.records} for snapshot in kept]
    assert found[0] == {"experts.0.1": 44 * 8, "experts.1.1": 20 * 8}
    # Once all ranks have read that one has a new site it is agreed upon.
    assert found[4 : 4 + ranks.LAG] == [{"experts.0.1": 34 * 8, "experts.1.1": 20 * 8}] * ranks.LAG
    assert found[4 + ranks.LAG :] == [{"experts.0.1": 34 * 8, "experts.1.1": 20 * 8, "experts.2.1": 10 * 8}] * 4


def idle() -> Any:
    model = mlp()
    monitor, kept = watched(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches():
        optimizer.zero_grad()
        if rank() != 2:
            model(part(x)).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
        optimizer.step()
    monitor.close()
    return kept


def test_a_rank_without_a_pass_takes_part(run: Run) -> None:
    kept = run(idle)[0]
    assert [each["1"].n for each in kept] == [(BATCH - 20) * 32] * STEPS


def counted() -> Any:
    model = DistributedDataParallel(mlp())
    monitor, _ = watched(model, every=4)
    train(model, model.parameters(), steps=1)
    found = monitor._ranks
    assert found is not None
    calls = []
    own = found._own

    class Counting:
        def __getattr__(self, name: str) -> Any:
            def call(tensors: list[Tensor], *options: Any) -> Any:
                calls.append((monitor._step, name, str(options[0]), tensors[0].numel() * tensors[0].element_size()))
                return getattr(own, name)(tensors, *options)

            return call

    found._own = Counting()
    train(model, model.parameters(), steps=12)
    found._own = own
    monitor.close()
    return calls, found.layout.bytes


def test_two_collectives_per_observation_and_none_between(run: Run) -> None:
    for calls, size in run(counted):
        assert [(step, name) for step, name, _, _ in calls] == [(step, "allreduce") for step in (1, 2, 4, 8, 12) for _ in range(2)]
        assert {(op.split(".")[-1][:3], nbytes) for _, _, op, nbytes in calls} == {("SUM", calls[0][3]), ("MAX", calls[1][3])}
        assert calls[0][3] + calls[1][3] == size


def test_the_formula_of_the_docs_is_what_is_sent() -> None:
    site = {"units": 30, "heads": None, "after": ()}
    softmax = {"units": None, "heads": 4, "after": ()}
    layer = {"features": 20}
    layout = ranks.Layout({"a": site, "b": site, "c": softmax}, {"l": layer, "m": layer}, {})
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    (formula,) = re.findall(r"^    8 bytes x \((.*)\)$", text, re.MULTILINE)
    sizes = {"sites": 3, "units": 60, "heads": 4, "layers": 2, "features": 40}
    assert 8 * eval(formula.replace("x", "*"), sizes) == layout.bytes


def windows() -> Any:
    model = mlp(8)
    with torch.no_grad():
        model[0].bias[:3] = 50.0
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped)
    train(wrapped, wrapped.parameters(), steps=40)
    monitor.close()
    reference = mlp(8)
    with torch.no_grad():
        reference[0].bias[:3] = 50.0
    return kept, alone(reference, steps=40)


def test_stuck_units_are_counted_over_the_samples_of_all_ranks(run: Run) -> None:
    kept, expected = run(windows)[0]
    assert [each["1"].stuck for each in kept] == [each["1"].stuck for each in expected]
    assert [each["1"].stuck_n for each in kept] == [each["1"].stuck_n for each in expected]
    assert kept[14]["1"].stuck is None
    assert (kept[15]["1"].stuck, kept[15]["1"].stuck_n) == (3 / 8, 1024)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 2, 16)
        out: Tensor = self.head(self.lstm(self.attention(x, x, x)[0])[0])
        return out.flatten(0, 1)


def attentive() -> Any:
    wrapped = DistributedDataParallel(Attentive())
    monitor, kept = watched(wrapped)
    train(wrapped, wrapped.parameters())
    monitor.close()
    return kept, alone(Attentive())


def test_heads_and_gates_merge_too(run: Run) -> None:
    kept, expected = run(attentive)[0]
    assert {"attention/softmax", "lstm.l0/forget"} <= {each.site for each in kept[0].records}
    assert len(kept[0]["attention/softmax"].heads or ()) == 4
    assert_equal(kept, expected)


def one_bad_rank() -> Any:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped)
    train(wrapped, wrapped.parameters(), mine=lambda x: part(x) * (100 if rank() == 2 else 1))
    monitor.close()
    return kept, monitor.alerts


def test_an_alert_names_the_rank_where_it_is_worst(run: Run) -> None:
    answers = run(one_bad_rank)
    kept, alerts = answers[0]
    record = kept[0]["1"]
    assert record.worst_rank == 2
    assert record.worst is not None
    assert record.worst > 0.9 > (record.saturated or 0) + 0.1
    (alert,) = [each for each in alerts if each.site == "1"]
    assert alert.rank == 2
    assert "; worst on rank 2: 9" in alert.message
    assert all(other == alerts for _, other in answers)


def not_finite() -> Any:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, _ = watched(wrapped)
    x = batches(1)[0]
    x[30] = torch.nan
    wrapped(part(x)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    monitor.close()
    return monitor.latest


def test_what_is_not_finite_is_traced_to_its_rank(run: Run) -> None:
    latest = run(not_finite)[0]
    assert latest["1"].nonfinite == 32
    assert latest["1"].nonfinite_rank == 2
    (alert,) = [each for each in latest.alerts if each.site == "1"]
    assert alert.rank == 2
    assert "most of them on rank 2" in alert.message


def _messages() -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torchsat").handlers = [handler]
    return messages


class Only(nn.Sequential):
    """A model of its own kind, over which ranks meet that watch no other."""


def only_rank_0(folder: str) -> Any:
    messages, ranks.GRACE = _messages(), 0.3
    model = Only(*mlp())
    wrapped = DistributedDataParallel(model)
    kept: list[Snapshot] = []
    monitor = watched(wrapped, log_dir=folder)[0] if rank() == 0 else None
    train(wrapped, wrapped.parameters())
    if monitor is not None:
        monitor.close()
        kept = torchsat.read(folder)
    return messages, kept


def test_a_rank_that_watches_alone_does_not_wait_for_the_others(run: Run, tmp_path: Any) -> None:
    (messages, kept), *_ = run(only_rank_0, str(tmp_path / "run"))
    assert [each["1"].n for each in kept] == [10 * 32] * STEPS
    assert [message for message in messages if "by itself" in message] == [
        "torchsat: rank 0 observes by itself from here on: 1 of 4 ranks train a watched Only no. 1; call torchsat.watch on every rank, or pass "
        "group= the ranks that do, or group=None. Training is not affected."
    ]


def one_leaves() -> Any:
    messages, ranks.CLOSING = _messages(), 0.5
    model = mlp()
    monitor, _ = watched(model, errors="warn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step, x in enumerate(batches(9)):
        optimizer.zero_grad()
        model(part(x)).square().mean().backward()
        optimizer.step()
        dist.barrier()
        if step == 3 and rank() == 3:
            monitor.close()
        monitor.flush()
        seen.append(monitor.latest["1"].n if monitor.latest else None)
    monitor.close()
    return messages, seen


def test_when_a_rank_leaves_the_others_go_on(run: Run) -> None:
    answers = run(one_leaves)
    for at, (messages, seen) in enumerate(answers[:3]):
        assert seen[:4] == [BATCH * 32] * 4
        assert seen[-1] == [10, 14, 20][at] * 32
        (said,) = [message for message in messages if "by itself from here on" in message]
        assert said == f"torchsat: rank {at} observes by itself from here on: rank 3 no longer observes. Training is not affected."


def joined(folder: str) -> Any:
    """Ranks with different numbers of batches, as DDP's join allows."""
    messages, monitor_.GRACE = _messages(), 0.3
    ranks.GRACE = 0.3
    model = DistributedDataParallel(mlp())
    monitor, kept = watched(model, errors="warn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join([model]):
        for x in batches(4 + 3 * rank()):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    dist.barrier()
    monitor.close()
    return messages, monitor._step, [each["1"].n for each in kept]


def test_ranks_with_fewer_batches_stop_nobody(run: Run, tmp_path: Any) -> None:
    answers = run(joined, str(tmp_path / "run"))
    assert [step for _, step, _ in answers] == [4, 7, 10, 13]
    assert answers[0][2] == [4 * BATCH * 32] * 4
    assert all(len(messages) <= 1 for messages, _, _ in answers)


def seen_when() -> Any:
    model = DistributedDataParallel(mlp())
    with torch.no_grad():
        model.module[0].weight *= 20 if rank() == 0 else 1
    model = DistributedDataParallel(model.module)
    monitor, _ = watched(model, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step, x in enumerate(batches(20)):
        time.sleep(0.01 * ((rank() + step) % SIZE))
        optimizer.zero_grad()
        model(part(x)).square().mean().backward()
        optimizer.step()
        seen.append((monitor.latest.step if monitor.latest else None, [(alert.site, alert.step) for alert in monitor.alerts]))
    monitor.close()
    return seen


def test_what_is_known_is_known_on_all_ranks_at_the_same_step(run: Run) -> None:
    first, *others = run(seen_when)
    assert all(each == first for each in others)
    assert [step for step, _ in first][:9] == [None, None, None, None, 0, 1, 2, 2, 4]
    assert any(alerts for _, alerts in first)


def out_of_step() -> Any:
    messages = _messages()
    model = mlp()
    monitor, _ = watched(model, every=2, errors="warn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, x in enumerate(batches(12)):
        optimizer.zero_grad()
        model(part(x)).square().mean().backward()
        optimizer.step()
        dist.barrier()
        if rank() == 1 and step == 2:
            # As if it had been told of a step that the others never took: it passes over step 4.
            monitor._step += 2
    monitor.close()
    return messages


def test_ranks_that_have_come_to_other_steps_part(run: Run) -> None:
    answers = run(out_of_step)
    assert all(sum("by itself from here on" in message for message in messages) == 1 for messages in answers)
    assert any("they are at other steps" in message for messages in answers for message in messages)


def grouped() -> Any:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank() // 2]
    model = mlp()
    wrapped = DistributedDataParallel(model, process_group=mine)
    monitor, kept = watched(wrapped, group=mine)
    train(wrapped, wrapped.parameters(), mine=lambda x: part(x) * (1 + rank()))
    monitor.close()
    assert monitor.latest is not None
    return [each["1"].n for each in kept], monitor.latest["1"]


def test_a_group_of_some_ranks(run: Run) -> None:
    answers = run(grouped)
    assert [kept for kept, _ in answers] == [[24 * 32] * STEPS, [], [40 * 32] * STEPS, []]
    assert [latest.n for _, latest in answers] == [24 * 32, 24 * 32, 40 * 32, 40 * 32]
    # As people know them: ranks of the whole job.
    assert [latest.worst_rank for _, latest in answers] == [1, 1, 3, 3]


def own_models() -> Any:
    messages = _messages()
    model = mlp()
    with torch.no_grad():
        model[2].weight += rank()
    monitor, _ = watched(model)
    train(model, model.parameters(), steps=3)
    monitor.close()
    return messages


def test_ranks_with_models_of_their_own_are_told(run: Run) -> None:
    first, *others = run(own_models)
    (said,) = [message for message in first if "different" in message]
    assert said.startswith("torchsat: step 0: ranks hold different weights in 2. What is shown is of all ranks together; ")
    assert not [message for each in others for message in each if "different" in message]


def inside(how: str) -> Any:
    """What is watched holds the wrapper, or is held by it; or FSDP2 is told to divide by nothing."""
    model = nn.Sequential(mlp())
    if how == "ddp inside":
        model[0] = DistributedDataParallel(model[0])
        monitor, kept = watched(model)
        run: Callable[[Tensor], Tensor] = model
    elif how == "fsdp outside":
        fully_shard(model)
        monitor, kept = watched(model[0])
        run = model
    else:
        fully_shard(model)
        model.set_gradient_divide_factor(1.0)
        monitor, kept = watched(model)
        run = lambda x: model(x) / SIZE**0.5  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches():
        optimizer.zero_grad()
        run(part(x)).square().mean().backward()
        optimizer.step()
    monitor.close()
    return kept, alone(mlp())


@pytest.mark.parametrize("how", ["ddp inside", pytest.param("fsdp outside", marks=fsdp2), pytest.param("divided by the loss", marks=fsdp2)])
def test_gradients_are_those_of_the_averaged_loss(run: Run, how: str) -> None:
    kept, expected = run(inside, how)[0]
    for one, other in zip(kept, expected, strict=True):
        for ours, theirs in zip(one.records, other.records, strict=True):
            assert ours.site.removeprefix("0.") == theirs.site
            assert ours.grad_z_rms == pytest.approx(theirs.grad_z_rms, rel=1e-12)
        for ours, theirs in zip(one.weights, other.weights, strict=True):
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-12)


def by_themselves() -> Any:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped, group=None)
    train(wrapped, wrapped.parameters())
    monitor.close()
    return kept


def test_ranks_by_themselves(run: Run) -> None:
    answers = run(by_themselves)
    assert [[each["1"].n for each in kept] for kept in answers] == [[rows * 32] * STEPS for rows in (10, 14, 20, 20)]
    # Together their gradients are those of the averaged loss.
    merged = run(data_parallel, False, False)[0][0]
    squares = [kept[0]["1"].grad_z_rms ** 2 * kept[0]["1"].grad_n for kept in answers]
    assert sum(squares) / (BATCH * 32) == pytest.approx(merged[0]["1"].grad_z_rms ** 2, rel=1e-12)


def agreed_interval() -> Any:
    messages = _messages()
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped, every=2, budget=0.5)
    # One rank is slow to observe.
    monitor._schedule._stretch = lambda: setattr(monitor._schedule, "wanted", 8 if rank() == 3 else 2)  # type: ignore[method-assign, func-returns-value]
    train(wrapped, wrapped.parameters(), steps=30)
    monitor.close()
    return [each.step for each in kept], messages


def test_the_interval_is_that_of_the_slowest_rank(run: Run) -> None:
    (steps, messages), *others = run(agreed_interval)
    assert steps == [0, 1, 2, 4, 6, 8, 16, 24]
    assert sum("One in 8 steps is observed" in message for message in messages) == 1
    assert not any("is observed" in message for _, other in others for message in other)


def scaled() -> Any:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, x in enumerate(batches()):
        optimizer.zero_grad()
        loss = wrapped(part(x)).square().mean()
        # An overflow on one rank is one of all: the step is skipped everywhere.
        scaler.scale(loss * (float("inf") if step == 2 and rank() == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    monitor.close()
    return kept


def test_a_grad_scaler_and_a_skipped_step(run: Run) -> None:
    kept = run(scaled)[0]
    expected = run(data_parallel, False, False)[0][2]
    assert [each.step for each in kept] == [0, 1, 2, 3]
    assert_equal(kept[:2], expected[:2])


def resumed(folder: str) -> Any:
    """Rank 0 alone sees the files of the first session."""
    model = mlp()
    monitor, _ = watched(model, log_dir=folder if rank() == 0 else None, rules=())
    train(model, model.parameters(), steps=3)
    monitor.close()
    again = mlp()
    monitor, kept = watched(again, log_dir=folder if rank() == 0 else None, start="resume")
    train(again, again.parameters(), steps=3)
    monitor.close()
    return [each.step for each in kept], monitor._step, [each.step for each in torchsat.read(folder)] if rank() == 0 else []


def taken_up(folder: str) -> Any:
    """The alert of the first session fires on in the second one, on all ranks, though only rank 0 sees its files."""
    sessions = []
    for start in (0, "resume"):
        model = mlp()
        with torch.no_grad():
            model[0].weight *= 20
        wrapped = DistributedDataParallel(model)
        monitor, _ = watched(wrapped, log_dir=folder if rank() == 0 else None, start=start)
        train(wrapped, wrapped.parameters(), steps=6)
        monitor.close()
        sessions.append([(alert.site, alert.since, alert.causes) for alert in monitor.alerts])
    return sessions


def test_what_rank_0_remembers_all_ranks_do(run: Run, tmp_path: Any) -> None:
    first, *others = run(taken_up, str(tmp_path / "run"))
    assert [(site, since) for site, since, _ in first[0]] == [("1", 0)]
    assert [(site, since) for site, since, _ in first[1]] == [("1", 0)]
    assert all(each == first for each in others)


def sampled() -> Any:
    """One rank has few and saturated rows, the others many healthy ones."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))
    wrapped = DistributedDataParallel(model)
    x = torch.randn(4100, 16)
    x[:100] *= 100
    mine = x[:100] if rank() == 0 else x[100:].chunk(3)[rank() - 1]
    monitor, kept = watched(wrapped, sample=4096)
    wrapped(mine).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    monitor.close()
    whole, exact = watched(model, sample=None, group=None)
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    whole.close()
    return kept, exact


def test_ranks_weigh_by_their_elements_not_by_what_is_read_of_them(run: Run) -> None:
    (found,), (exact,) = run(sampled)[0]
    record, expected = found["1"], exact["1"]
    assert record.elements == expected.elements == expected.n == 4100 * 64
    assert record.n < 4 * 4096 + 4
    # 3 standard errors of a share of 2 % at the 12288 elements that are read of the many.
    assert record.saturated == pytest.approx(expected.saturated, abs=0.005)
    assert record.z_std == pytest.approx(expected.z_std, rel=0.1)
    assert found.weights[0].input_rms == pytest.approx(exact.weights[0].input_rms, rel=0.1)


def pending() -> Any:
    mesh = init_device_mesh("cpu", (SIZE,))
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    model[0].bias = None
    model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh, [Replicate()]))
    model[2].bias = nn.Parameter(distribute_tensor(model[2].bias.detach(), mesh, [Replicate()]))
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


def test_a_resumed_run_goes_on_at_the_step_that_the_furthest_rank_knows(run: Run, tmp_path: Any) -> None:
    answers = run(resumed, str(tmp_path / "run"))
    assert answers[0] == ([3, 4, 5], 6, [0, 1, 2, 3, 4, 5])
    assert [step for _, step, _ in answers] == [6] * 4
