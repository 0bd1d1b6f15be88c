"""What writing to TensorBoard costs: `python benchmarks/dashboard.py`.

Networks of 50 and 200 tanh layers are trained, every step observed. `training thread` is the time that the writer computes there per observation,
`waits` the time until training goes on (Python runs one thread at a time, and the thread that writes the file may come between), `writing thread` the
rest. Pictures (heatmap and layout) are timed apart: there are four in the first 64 observations, then one in 64.
"""

import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import torchsat
from torchsat import Snapshot
from torchsat.tensorboard.writer import TensorBoardWriter

STEPS = 200


class Timed:
    """A writer, timed."""

    def __init__(self, folder: str) -> None:
        self.writer = TensorBoardWriter(folder)
        self.computing: list[float] = []
        self.waiting: list[float] = []
        self.pictures: list[float] = []
        self.others = 0.0

    def __call__(self, snapshot: Snapshot) -> None:
        drawn, everything = self.writer._drawn, time.process_time()
        waited, computed = time.perf_counter(), time.thread_time()
        self.writer(snapshot)
        computed, waited = time.thread_time() - computed, time.perf_counter() - waited
        if self.writer._drawn == drawn:
            self.computing.append(computed)
            self.waiting.append(waited)
        else:
            self.pictures.append(computed)
        self.writer.flush()
        self.others += time.process_time() - everything - computed


def measure(sites: int) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [layer for _ in range(sites) for layer in (nn.Linear(32, 32), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        timed = Timed(folder)
        with torchsat.watch(model, every=1, sinks=(timed,)):
            for _ in range(STEPS):
                optimizer.zero_grad()
                model(torch.randn(64, 32)).square().mean().backward()
                optimizer.step()
        timed.writer.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*tfevents*"))
    return {
        "training thread": 1e3 * statistics.median(timed.computing),
        "95th percentile": 1e3 * statistics.quantiles(timed.computing, n=20)[-1],
        "waits": 1e3 * statistics.median(timed.waiting),
        "with pictures": 1e3 * statistics.median(timed.pictures),
        "writing thread": 1e3 * timed.others / STEPS,
        "kB": size / STEPS / 1e3,
    }


def main() -> None:
    logging.getLogger("torchsat").setLevel(logging.ERROR)
    measure(2)
    print("milliseconds and kB per observation")
    for sites in (50, 200):
        print(f"{sites:4d} sites: " + ", ".join(f"{name} {value:.2f}" for name, value in measure(sites).items()))


if __name__ == "__main__":
    main()
