"""The monitor and its process: the end of the process, its signals and its forked children."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.models import mlp


def some_steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        model(x).sum().backward()
        optimizer.step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_not_watched(tmp_path: Path) -> None:
    script = """
    import os, signal, sys, torch, torchsat
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    monitor = torchsat.watch(model, sys.argv[1], every=1, budget=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def train():
        for step in range(40):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
    child = os.fork()
    train()
    if not child:
        assert not model[1]._forward_hooks
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os._exit(7)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7, done.stderr
    assert len(torchsat.read(tmp_path)) == 40


SCRIPT = """
import os, signal, sys, torch, torchsat
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
monitor = torchsat.watch(model, sys.argv[1], every=1, budget=None)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(40):
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("raise ValueError('mine')", 1),
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(20)", -signal.SIGTERM),
    ],
    ids=["normal", "exception", "exit", "sigterm"],
)
def test_nothing_is_lost_however_the_process_ends(end: str, code: int, tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(end=end))
    done = subprocess.run([sys.executable, "-W", "error", "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert [snapshot.step for snapshot in torchsat.read(tmp_path)] == list(range(40))


@pytest.mark.parametrize("chains", [True, False])
@pytest.mark.parametrize("observed_before", [0, 3])
def test_a_handler_of_somebody_else_decides_how_the_process_ends(chains: bool, observed_before: int, tmp_path: Path) -> None:
    came: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL
    model, x = mlp(), torch.randn(16, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        with torchsat.watch(model, tmp_path, every=1, budget=None):
            some_steps(model, optimizer, x, observed_before)
            found = signal.getsignal(signal.SIGTERM)
            # Before an observation has ended there is nothing to lose, and no handler.
            assert callable(found) == (observed_before > 0)

            def theirs(number: int, frame: Any) -> None:
                came.append(number)
                if chains and callable(found):
                    found(number, frame)

            signal.signal(signal.SIGTERM, theirs)
            some_steps(model, optimizer, x, 4)
            os.kill(os.getpid(), signal.SIGTERM)
            if chains and observed_before:
                assert [each.step for each in torchsat.read(tmp_path)] == list(range(observed_before + 4))
            some_steps(model, optimizer, x, 2)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is theirs
        assert came == [signal.SIGTERM] * 2
        assert [each.step for each in torchsat.read(tmp_path)] == list(range(observed_before + 6))
    finally:
        signal.signal(signal.SIGTERM, before)


ENDS = {
    # As coverage.py does it: the handler that was there is put back, and the signal sent again.
    "put back": "old = signal.signal(15, lambda *_: (signal.signal(15, old), os.kill(os.getpid(), 15)))",
    "faulthandler": "import faulthandler; faulthandler.register(15, chain=True)",
    "asyncio": "loop = asyncio.new_event_loop(); loop.add_signal_handler(15, print); loop.remove_signal_handler(15); step()",
    "closed": "monitor.close()",
    "nothing": "",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_where_nobody_takes_the_decision_the_process_dies_of_the_signal(tmp_path: Path) -> None:
    script = """
    import asyncio, json, os, signal, sys, time, torch, torchsat
    import torchsat.tensorboard.writer  # here, once, and not in each child
    torchsat.watch
    def run(name, end):
        global monitor, step
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        monitor = torchsat.watch(model, os.path.join(sys.argv[1], name), every=1, budget=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        def step():
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
        for _ in range(8):
            step()
        exec(end, globals())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    for name, end in json.loads(sys.argv[2]).items():
        child = os.fork()
        if not child:
            run(name, end)
            os._exit(0)
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), json.dumps(ENDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [f"{name} {-signal.SIGTERM}" for name in ENDS], done.stderr
    for name in ENDS:
        steps = [snapshot.step for snapshot in torchsat.read(tmp_path / name)]
        assert steps == list(range(9 if name == "asyncio" else 8)), name


def test_a_signal_that_comes_while_a_snapshot_is_delivered_waits_for_its_end(tmp_path: Path) -> None:
    script = """
    import os, signal, sys, torch, torchsat
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    def sink(snapshot):
        if snapshot.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            print("whole", flush=True)
    monitor = torchsat.watch(model, sys.argv[1], every=1, budget=None, sinks=[sink])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(40):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "whole\n"), done.stderr
    assert [snapshot.step for snapshot in torchsat.read(tmp_path)] == list(range(6))


def test_a_kill_loses_at_most_the_queue(tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(end="os.kill(os.getpid(), signal.SIGKILL)"))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    steps = [snapshot.step for snapshot in torchsat.read(tmp_path)]
    # The writer's queue holds ten snapshots, and one more may be on its way to the disk.
    assert steps == list(range(len(steps)))
    assert len(steps) >= 40 - 11


def test_a_handler_of_the_users_is_left_alone() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with torchsat.watch(mlp()):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
