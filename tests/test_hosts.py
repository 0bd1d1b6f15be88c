"""Ranks that die: one of two hosts (network namespaces of one machine), the wire between them, or a rank of a job that torchrun restarts."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchsat

SCRIPT = """
import os, signal, subprocess, sys
from datetime import timedelta
import torch, torch.distributed as dist, torchsat
from torch import nn

rank, folder, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=5))
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
monitor = torchsat.watch(model, folder, every=5, budget=None)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1000):
    if rank == 1 and step == 23:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        subprocess.run(["ip", "link", "set", "wire1", "down"], check=True)
    optimizer.zero_grad()
    model(torch.randn(32, 8)).square().mean().backward()
    optimizer.step()
"""


def ip(*words: str, within: str = "") -> None:
    inside = ["ip", "netns", "exec", within] if within else []
    subprocess.run([*inside, "ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces with a wire between them: 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: the program `ip` is not installed")
    names = f"torchsat{os.getpid()}a", f"torchsat{os.getpid()}b"
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire1", "netns", names[1])
        for at, name in enumerate(names):
            ip("addr", "add", f"10.77.0.{at + 1}/24", "dev", f"wire{at}", within=name)
            ip("link", "set", f"wire{at}", "up", within=name)
            ip("link", "set", "lo", "up", within=name)
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="network namespaces are made by root on Linux")
@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_when_a_host_is_lost_the_other_ends_by_the_error_of_its_group(hosts: tuple[str, str], how: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    workers = []
    for rank, host in enumerate(hosts):
        environment = {**os.environ, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29577", "GLOO_SOCKET_IFNAME": f"wire{rank}"}
        command = ["ip", "netns", "exec", host, sys.executable, str(script), str(rank), str(tmp_path / "run"), how]
        heard = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        workers.append(subprocess.Popen(command, env=environment, stdout=heard, stderr=subprocess.STDOUT, text=True))
    try:
        # The limit is there to fail a hang; what ends the survivor is its group's own 5 s.
        said, _ = workers[0].communicate(timeout=90)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert workers[0].returncode == 1, said
    # The error is that of the user's backward, not one of ours.
    assert "loss.backward" in said or ".backward()" in said, said
    assert "torchsat/" not in said.rpartition("Traceback")[2], said
    snapshots = torchsat.read(tmp_path / "run")
    assert [each.step for each in snapshots] == [0, 1, 2, 4, 5, 8, 10, 15, 16, 20]
    # Both ranks' elements; of the last observation, if it was under way, at least our own.
    assert [each["1"].n for each in snapshots[:-1]] == [2 * 32 * 16] * 9
    assert snapshots[-1]["1"].n in (32 * 16, 2 * 32 * 16)


RESTARTED = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist, torchsat
from torch import nn

folder, attempt = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
torch.set_num_threads(1)
torch.manual_seed(0)
# torch 2.13 keeps the addresses of the attempt that died in the agent's store, where gloo finds them.
agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", store=dist.PrefixStore(f"attempt{attempt}", agent), rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 1)))
with torch.no_grad():
    model.module[0].weight *= 50
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
monitor = torchsat.watch(model, folder / "run", every=5, budget=None)
step, kept = 0, folder / "checkpoint"
if kept.exists():
    checkpoint = torch.load(kept, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    monitor.load_state_dict(checkpoint["monitor"])
    step = checkpoint["step"]
while step < 24:
    if attempt == 0 and rank == 1 and step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    model(torch.randn(32, 8, generator=torch.Generator().manual_seed(2 * step + rank))).square().mean().backward()
    optimizer.step()
    step += 1
    if rank == 0 and step % 10 == 0:
        torch.save({"model": model.state_dict(), "monitor": monitor.state_dict(), "step": step}, kept)
monitor.close()
assert [(alert.site, alert.since) for alert in monitor.alerts] == [("1", 0)], monitor.alerts
dist.destroy_process_group()
"""


def test_a_job_that_torchrun_restarts_goes_on_in_one_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RESTARTED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "--monitor-interval",
        "0.2",
    ]
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    snapshots = torchsat.read(tmp_path / "run")
    # The checkpoint of step 10: what was written of step 10 by the attempt that died is void, and the first step of a session is observed.
    assert [each.step for each in snapshots] == [0, 1, 2, 4, 5, 8, 10, 15, 16, 20]
    assert [each["1"].n for each in snapshots] == [2 * 32 * 16] * 10
    fired = [(alert.step, alert.since, alert.firing) for snapshot in snapshots for alert in snapshot.alerts]
    assert fired == [(2, 0, True)]
