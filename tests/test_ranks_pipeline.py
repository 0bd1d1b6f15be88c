"""The stages of a pipeline, each on a rank of its own or several on one, are recorded as one model."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from tests.processes import BATCH, SIZE, Run, alone, assert_equal, batches, mlp, one_f_one_b, rank, watched


def pipelined(kind: str) -> Any:
    layers = [*mlp()[:3].children(), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)]
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
    # Where this version of torch does not divide gradients by the number of micro-batches, the loss has to.
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
    # Whether the output is computed from a site is known of the last stage alone, which has no site here.
    assert_equal(kept, expected, but=("site", "after", "name", "feeds", "last"))


def interleaved() -> Any:
    torch.manual_seed(2)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(7)] + [nn.Sequential(nn.Linear(16, 3))]
    expected_model = copy.deepcopy(nn.Sequential(*blocks))
    mine = [rank(), rank() + SIZE]
    stages = [PipelineStage(blocks[at], at, 2 * SIZE, torch.device("cpu")) for at in mine]
    schedule = ScheduleInterleaved1F1B([*stages], n_microbatches=4, loss_fn=lambda out, target: (out - target).square().mean())
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
    # Whether the output is computed from a site is known of the last stage alone, which has no site here.
    assert_equal(kept, expected, but=("site", "after", "name", "feeds", "last"))
