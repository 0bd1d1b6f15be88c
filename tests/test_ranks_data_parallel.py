"""Data-parallel ranks together record the same values as one process that trains on the whole batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.processes import BATCH, SIZE, STEPS, Run, alone, assert_equal, batches, data_parallel, fsdp2, mlp, part, rank, train, watched


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


def data_parallel_compiled() -> Any:
    model = DistributedDataParallel(mlp())
    monitor, kept = watched(model)
    train(torch.compile(model, backend="aot_eager"), model.parameters())
    monitor.close()
    return kept, alone(mlp())


def test_compiled_data_parallel_ranks(run: Run) -> None:
    kept, expected = run(data_parallel_compiled)[0]
    assert_equal(kept, expected)


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
    # Ranks that observe together record the gradients of the averaged loss.
    merged = run(data_parallel, False, False)[0][0]
    squares = [kept[0]["1"].grad_z_rms ** 2 * kept[0]["1"].grad_n for kept in answers]
    assert sum(squares) / (BATCH * 32) == pytest.approx(merged[0]["1"].grad_z_rms ** 2, rel=1e-12)


def inside(how: str) -> Any:
    """The watched module contains the wrapper, or is contained in it; or FSDP2 is told not to divide gradients by the number of ranks."""
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
        assert isinstance(model, FSDPModule)
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


def scaled() -> Any:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, x in enumerate(batches()):
        optimizer.zero_grad()
        loss = wrapped(part(x)).square().mean()
        # Averaging gradients spreads an overflow from one rank to all, so that every rank skips the step.
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
