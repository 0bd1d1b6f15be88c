"""The monitor and its process: the end of the process, its signals and its forked children."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import torchsat
from tests.models import mlp


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
