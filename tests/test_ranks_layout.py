"""The layout: on which rows the ranks agree, and what is sent in which collectives."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.processes import BATCH, STEPS, Run, batches, mlp, part, rank, train, watched
from tests.training import loop_of
from tests.truth import known
from torchsat.transport.meeting import LAG


class Experts(nn.Module):
    """A mixture of experts in which every rank runs the expert of its own choice."""

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
    # Rank 3 runs expert 1 and the other ranks run expert 0. From step 4 on, rank 0 runs expert 2.
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
    # The new site is agreed upon as soon as every rank has read that rank 0 has it, which takes LAG observations.
    assert found[4 : 4 + LAG] == [{"experts.0.1": 34 * 8, "experts.1.1": 20 * 8}] * LAG
    assert found[4 + LAG :] == [{"experts.0.1": 34 * 8, "experts.1.1": 20 * 8, "experts.2.1": 10 * 8}] * 4


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
    found = known(loop_of(monitor).observer.route._ranks)
    calls = []
    collectives = known(found._collectives)
    own = collectives._group

    class Counting:
        def __getattr__(self, name: str) -> Any:
            def call(tensors: list[Tensor], *options: Any) -> Any:
                calls.append((loop_of(monitor).step, name, str(options[0]), tensors[0].numel() * tensors[0].element_size()))
                return getattr(own, name)(tensors, *options)

            return call

    collectives._group = Counting()
    train(model, model.parameters(), steps=12)
    collectives._group = own
    monitor.close()
    return calls, found.layout.bytes


def test_two_collectives_per_observation_and_none_between(run: Run) -> None:
    for calls, size in run(counted):
        assert [(step, name) for step, name, _, _ in calls] == [(step, "allreduce") for step in (1, 2, 4, 8, 12) for _ in range(2)]
        assert {(op.split(".")[-1][:3], nbytes) for _, _, op, nbytes in calls} == {("SUM", calls[0][3]), ("MAX", calls[1][3])}
        assert calls[0][3] + calls[1][3] == size
