"""What writing to TensorBoard costs: `python benchmarks/dashboard.py`.

Networks of 50 and 200 tanh layers are trained, and every step is observed. "training thread" is the time per observation for which the training
waits. "all threads" is the processor time per observation of the whole process, which includes drawing the pictures (the heatmap and the layout).
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
    """A sink that gives each snapshot to a TensorBoard writer and measures the time that this takes."""

    def __init__(self, folder: str) -> None:
        self.writer = TensorBoardWriter(folder)
        self.waiting: list[float] = []
        self.everything = 0.0

    def __call__(self, snapshot: Snapshot) -> None:
        everything, waited = time.process_time(), time.perf_counter()
        self.writer(snapshot)
        self.waiting.append(time.perf_counter() - waited)
        self.writer.flush()
        self.everything += time.process_time() - everything


def measure(sites: int) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [layer for _ in range(sites) for layer in (nn.Linear(32, 32), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        timed = Timed(folder)
        with torchsat.watch(model, every=1, budget=None, sinks=(timed,)):
            for _ in range(STEPS):
                optimizer.zero_grad()
                model(torch.randn(64, 32)).square().mean().backward()
                optimizer.step()
        timed.writer.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*tfevents*"))
    return {
        "training thread": 1e3 * statistics.median(timed.waiting),
        "95th percentile": 1e3 * statistics.quantiles(timed.waiting, n=20)[-1],
        "all threads": 1e3 * timed.everything / STEPS,
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
