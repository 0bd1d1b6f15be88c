"""Whether memory, threads and open files stay constant over ten thousand observed steps.

python benchmarks/flat.py [--steps 10000]
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

import torchsat


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    # These activations are observed in different ways: f is one autograd node, several nodes, has a learned parameter, or works in place.
    model = nn.Sequential(
        *(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Softsign(), nn.Linear(32, 32), nn.PReLU()),
        *(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 1)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    print(f"torch {torch.__version__}, {os.cpu_count()} CPU cores, every=1\n")
    print("   step  resident MB  threads  open files  seconds")
    with tempfile.TemporaryDirectory() as folder:
        monitor = torchsat.watch(model, folder, every=1, budget=None)
        start = time.perf_counter()
        for step in range(steps + 1):
            if step % (steps // 10) == 0:
                files = open_files()
                print(f"{step:7d}  {resident_megabytes():11.1f}  {threading.active_count():7d}  {files:10d}  {time.perf_counter() - start:7.1f}")
            x = torch.randn(32, 16)
            loss = (model(x) - x.mean(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        monitor.close()
        print(f"\nclosed:  {resident_megabytes():11.1f}  {threading.active_count():7d}  {open_files():10d}")


if __name__ == "__main__":
    main()
