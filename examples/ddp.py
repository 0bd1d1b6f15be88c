"""Many processes, one record: `torchrun --nproc-per-node 4 examples/ddp.py [--fully-shard | --pipeline] [--steps 100]`.

Every rank trains on its part of each batch of scikit-learn's digits (with `--pipeline`: has its part of the layers), watched by the one line.
Then rank 0 trains the same network alone on the whole batches and compares what was recorded, number by number.
"""

import argparse
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

import torchsat

BATCH = 256


def blocks(count: int = 4, width: int = 64) -> list[nn.Module]:
    torch.manual_seed(0)
    hidden: list[nn.Module] = [nn.Sequential(nn.Linear(64, width), nn.Sigmoid() if at == 0 else nn.Tanh()) for at in range(count)]
    return [*hidden[:-1], nn.Sequential(hidden[-1], nn.Linear(width, 10))]


def batches(steps: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    # As they come, from 0 to 16: not standardised, which the first layer does not like.
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    drawn = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=drawn)
        yield images[rows].double().to(device), labels[rows].to(device)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train_parallel(kind: str, steps: int, device: torch.device) -> list[torchsat.Snapshot]:
    rank, size = dist.get_rank(), dist.get_world_size()
    kept: list[torchsat.Snapshot] = []
    if kind == "pipeline":
        each = 4 // size
        model = nn.Sequential(*blocks()[rank * each : (rank + 1) * each]).to(device)
        stage = PipelineStage(model, rank, size, device)
        schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=nn.functional.cross_entropy)
        monitor = torchsat.watch(stage, every=10, budget=None, sample=None, sinks=[kept.append])  # the one line
        optimizer = sgd(model)
        for images, labels in batches(steps, device):
            optimizer.zero_grad()
            schedule.step(*[images] * (rank == 0), target=labels if rank == size - 1 else None)
            optimizer.step()
    else:
        model = nn.Sequential(*blocks()).to(device)
        if kind == "fully_shard":
            # Without a mesh, torch shards onto GPUs wherever the machine has one.
            mesh = init_device_mesh(device.type, (size,))
            for block in model:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        run = model if kind == "fully_shard" else DistributedDataParallel(model)
        monitor = torchsat.watch(run, every=10, budget=None, sample=None, sinks=[kept.append])  # the one line
        optimizer = sgd(run)
        for images, labels in batches(steps, device):
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(images[rank::size]), labels[rank::size]).backward()
            optimizer.step()
    monitor.close()
    return kept


def train_alone(steps: int, device: torch.device) -> list[torchsat.Snapshot]:
    model, kept = nn.Sequential(*blocks()).to(device), list[torchsat.Snapshot]()
    optimizer = sgd(model)
    with torchsat.watch(model, every=10, budget=None, sample=None, sinks=[kept.append], group=None):
        for images, labels in batches(steps, device):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return kept


def compare(found: list[torchsat.Snapshot], expected: list[torchsat.Snapshot]) -> tuple[int, int, float]:
    """How many numbers there are, how many counts differ, and the largest relative difference of the others."""
    assert [each.step for each in found] == [each.step for each in expected]
    numbers, wrong, largest = 0, 0, 0.0
    for one, other in zip(found, expected, strict=True):
        pairs = [*zip(one.records, other.records, strict=True), *zip(one.weights, other.weights, strict=True)]
        for ours, theirs in pairs:
            for name, value in vars(theirs).items():
                got = getattr(ours, name)
                # Of a weight that is divided among ranks, the unevenness is that of the most uneven part.
                if isinstance(value, bool) or not isinstance(value, (int, float)) or name == "unevenness":
                    continue
                numbers += 1
                if isinstance(value, int):
                    wrong += got != value
                else:
                    largest = max(largest, abs(got - value) / max(abs(value), 1e-12))
    return numbers, wrong, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fully-shard", dest="kind", action="store_const", const="fully_shard", default="ddp")
    parser.add_argument("--pipeline", dest="kind", action="store_const", const="pipeline")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one device a process")
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo" if given.device == "cpu" else "nccl")
    size = dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if given.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if 4 % size:
        raise SystemExit(f"{size} processes; allowed are 1, 2 and 4, among which four blocks and a batch of {BATCH} can be divided")
    found = train_parallel(given.kind, given.steps, device)
    if dist.get_rank() == 0:
        numbers, wrong, largest = compare(found, train_alone(given.steps, device))
        print(f"{given.kind}, {size} processes: {len(found)} observations, {numbers} numbers compared with those of one process;")
        print(f"counts that differ: {wrong}; largest relative difference of the others: {largest:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
