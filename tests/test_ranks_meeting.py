"""Ranks that observe together: how they meet, stay at the same step and part. A rank that fails, leaves or never comes does not stop the others."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import torchsat
from tests.models import linear_at
from tests.processes import BATCH, SIZE, STEPS, Run, batches, logged, mlp, part, rank, train, watched
from tests.training import loop_of
from torchsat.record import Snapshot
from torchsat.schedule import Wish
from torchsat.transport import meeting


def fails_on_one() -> Any:
    messages = logged()
    model = DistributedDataParallel(mlp())
    monitor, kept = watched(model, errors="warn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, x in enumerate(batches(6)):
        if rank() == 1 and step == 2:
            loop_of(monitor).observer.sites.feeders = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
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


class Only(nn.Sequential):
    """A class for this scenario alone. Ranks find each other by the class of the watched model and must not meet over that of another scenario."""


def only_rank_0(folder: str) -> Any:
    messages, meeting.GRACE = logged(), 0.3
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
    messages, meeting.CLOSING = logged(), 0.5
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
    """Every rank has a different number of batches, which DDP allows inside Join."""
    messages, meeting.GRACE = logged(), 0.3
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
    return messages, loop_of(monitor).step, [each["1"].n for each in kept]


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
    messages = logged()
    model = mlp()
    monitor, _ = watched(model, every=2, errors="warn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, x in enumerate(batches(12)):
        optimizer.zero_grad()
        model(part(x)).square().mean().backward()
        optimizer.step()
        dist.barrier()
        if rank() == 1 and step == 2:
            # This rank counts two steps that the other ranks never took, so it does not observe step 4 with them.
            loop_of(monitor).step += 2
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
    # Ranks are numbered as in the whole job, not as in the group.
    assert [latest.worst_rank for _, latest in answers] == [1, 1, 3, 3]


def own_models() -> Any:
    messages = logged()
    model = mlp()
    with torch.no_grad():
        linear_at(model, 2).weight += rank()
    monitor, _ = watched(model)
    train(model, model.parameters(), steps=3)
    monitor.close()
    return messages


def test_ranks_with_models_of_their_own_are_told(run: Run) -> None:
    first, *others = run(own_models)
    (said,) = [message for message in first if "different" in message]
    assert said.startswith("torchsat: step 0: ranks hold different weights in 2. What is shown is of all ranks together; ")
    assert not [message for each in others for message in each if "different" in message]


def agreed_interval() -> Any:
    messages = logged()
    model = mlp()
    wrapped = DistributedDataParallel(model)
    monitor, kept = watched(wrapped, every=2, budget=0.5)
    # As if observing were slow on rank 3, which can pay for an observation 8 steps after each.
    plan = loop_of(monitor).observer.schedule
    plan.wish = lambda step, lag=0: Wish(step + 8, 8) if rank() == 3 else Wish(step, 2)  # type: ignore[method-assign]
    train(wrapped, wrapped.parameters(), steps=34)
    monitor.close()
    return [each.step for each in kept], messages


def test_the_steps_are_those_that_the_slowest_rank_can_pay_for(run: Run) -> None:
    (steps, messages), *others = run(agreed_interval)
    # What is wished at step 0 is acted upon at step 4.
    assert steps == [0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32]
    assert [message for message in messages if "to be observed" in message] == [
        "torchsat: step 4: the budget for observing is 2 s and 50 % of the training time, on the rank where observing costs most. Beside the powers "
        "of two, the next step to be observed is about 8, and then about one in 8; budget=None keeps every=2."
    ]
    assert not any("to be observed" in message for _, other in others for message in other)


def resumed(folder: str) -> Any:
    """Two sessions, of which the second resumes the first. Only rank 0 can read the event files."""
    model = mlp()
    monitor, _ = watched(model, log_dir=folder if rank() == 0 else None, rules=())
    train(model, model.parameters(), steps=3)
    monitor.close()
    again = mlp()
    monitor, kept = watched(again, log_dir=folder if rank() == 0 else None, start="resume")
    train(again, again.parameters(), steps=3)
    monitor.close()
    return [each.step for each in kept], loop_of(monitor).step, [each.step for each in torchsat.read(folder)] if rank() == 0 else []


def taken_up(folder: str) -> Any:
    """An alert that fires at the end of the first session still fires in the second one on all ranks, although only rank 0 can read the files."""
    sessions = []
    for start in (0, "resume"):
        model = mlp()
        with torch.no_grad():
            linear_at(model, 0).weight *= 20
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


def test_a_resumed_run_goes_on_at_the_step_that_the_furthest_rank_knows(run: Run, tmp_path: Any) -> None:
    answers = run(resumed, str(tmp_path / "run"))
    assert answers[0] == ([3, 4, 5], 6, [0, 1, 2, 3, 4, 5])
    assert [step for _, step, _ in answers] == [6] * 4
