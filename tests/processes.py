"""Four processes that form one process group, and the functions that all tests on several ranks share.

Starting the processes takes seconds, since each imports torch. They are therefore started once for all test files (fixture `run` in conftest.py) and
receive the functions to run, which the tests call scenarios, over a pipe."""

import contextlib
import itertools
import logging
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchsat
from torchsat import process
from torchsat.record import Snapshot

SIZE = 4
STEPS = 5
BATCH = 64
fsdp2 = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 does not run on a CPU")
hybrid = pytest.mark.skipif(torch.__version__ < "2.8", reason="hybrid FSDP2 of torch 2.6 and 2.7 does not run on a CPU")
one_f_one_b = pytest.mark.skipif(torch.__version__ < "2.8", reason="1F1B of torch 2.6 and 2.7 hangs over gloo, without torchsat too")


def settings() -> list[tuple[ModuleType, str, float]]:
    """All numeric constants of torchsat's modules. A scenario may shorten a deadline, and the next scenario must find the original value."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "torchsat"]
    return [(module, name, value) for module in modules for name, value in vars(module).items() if name.isupper() and isinstance(value, (int, float))]


def work(rank: int, port: int, pipe: Connection) -> None:
    """The main function of one process: runs every scenario that it receives and sends back the result or the error, until it receives None."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=30))
    while (sent := pipe.recv()) is not None:
        scenario, given = sent
        before = settings()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            pipe.send((scenario(*given), None))
        except BaseException:
            pipe.send((None, f"rank {rank}:\n{traceback.format_exc()}"))
        process._close_all()
        for module, name, value in before:
            setattr(module, name, value)
        torch._dynamo.reset()
    dist.destroy_process_group()


Run = Callable[..., list[Any]]


@contextlib.contextmanager
def started() -> Iterator[Run]:
    """Starts the processes and gives a function that runs a scenario on all ranks and returns the list of their results."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
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
    """The rows of the batch that this rank trains on. Every rank has a different number of rows."""
    bounds = [0, 10, 24, 44, len(x)]
    return x[bounds[rank()] : bounds[rank() + 1]]


def watched(model: Any, **given: Any) -> tuple[torchsat.Monitor, list[Snapshot]]:
    """A monitor that observes every step and reads all elements, and the list of snapshots that its sink on this rank receives."""
    kept: list[Snapshot] = []
    return torchsat.watch(model, **{"every": 1, "budget": None, "sample": None, "sinks": [kept.append], "errors": "raise", **given}), kept


def train(run: Callable[[Tensor], Tensor], parameters: Any, mine: Callable[[Tensor], Tensor] = part, steps: int = STEPS) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for x in batches(steps):
        optimizer.zero_grad()
        run(mine(x)).square().mean().backward()
        optimizer.step()


def alone(model: nn.Module, slices: bool = True, steps: int = STEPS, **given: Any) -> list[Snapshot]:
    """The snapshots of one process that trains on whole batches.

    With `slices`, the loss is the mean of the losses of the ranks' unequal slices, since this is what data parallelism averages."""
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
    """Asserts that counts are equal and that all other numbers agree to rounding."""
    assert [each.step for each in found] == [each.step for each in expected]
    for one, other in zip(found, expected, strict=True):
        pairs = [*zip(one.records, other.records, strict=True), *zip(one.weights, other.weights, strict=True)]
        assert pairs
        for ours, theirs in pairs:
            for name, value in vars(theirs).items():
                got = getattr(ours, name)
                # The unevenness of a weight that is divided among ranks is that of its most uneven part (test_packing.py).
                if name in ("worst", "worst_rank", "unevenness", *but):
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


def logged() -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torchsat").handlers = [handler]
    return messages


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
