"""How fast the kernels read memory: `python benchmarks/bandwidth.py [--device cuda] [--megabytes 256] [--write]`.

For each kernel and element type it measures the bytes that must be read (each tensor once) divided by the time, and compares that with the speed at
which the device copies a tensor (bytes read and bytes written). A run of the copy and a run of the kernel take turns. The table gives medians, and
the quartiles of the ratio. `--write` puts it into docs/cost.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from overhead import put, table
from torch import Tensor
from workloads import machine

from torchsat.columns import BLOCK
from torchsat.kernels.formulas import GELU, LOGISTIC, Formula
from torchsat.sampling import Sample, Units
from torchsat.statistics import empty_row, observe, observe_gradient
from torchsat.trust import trust_kernels

UNITS = 1024


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    out: float = before.elapsed_time(after) / 1e3
    return out


def kernels(x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """The functions that are timed, by the name of their kernel. Each of them reads both tensors once."""
    row, block = empty_row(x.device), torch.zeros(len(BLOCK), UNITS, dtype=torch.float64, device=x.device)
    units = Units(Sample.of(x.view(-1, UNITS), None, 0), 1)

    def forward(formula: Formula) -> Callable[[], object]:
        return lambda: observe(x, y, formula, 1.0, (-2.178, 2.178), len(x), False, units, row, block)

    return {
        "forward, tanh": forward(Formula(LOGISTIC, 2.0, 4.0)),
        "forward, GELU": forward(Formula(GELU)),
        "gradients": lambda: observe_gradient(x, y, len(x), row),
    }


def rows(device: torch.device, megabytes: int, turns: int) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(megabytes * 10**6 // dtype.itemsize // UNITS * UNITS, device=device, dtype=dtype)
        y, target = x.tanh(), torch.empty_like(x)
        size = 2 * x.numel() * dtype.itemsize
        for name, run in kernels(x, y).items():
            speeds, ratios = [], []
            for turn in range(turns + 3):
                copied = seconds(lambda: target.copy_(x), device)  # noqa: B023
                took = seconds(run, device)
                if turn >= 3:
                    speeds.append(size / took / 1e9)
                    ratios.append(copied / took)
            low, middle, high = statistics.quantiles(ratios, n=4)
            found.append((name, str(dtype).removeprefix("torch."), f"{statistics.median(speeds):.1f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--megabytes", type=int, default=256, help="of one tensor")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda":
        why_not = trust_kernels(device)
        print("Triton kernels" if why_not is None else f"plain torch: {why_not}")
    found = table(("kernel", "type", "GB/s", "share of a copy's speed"), rows(device, given.megabytes, given.turns))
    text = f"{machine(device)}; tensors of {given.megabytes} MB, {given.turns} turns.\n\n{found}"
    print(text)
    if given.write:
        put(text, f"bandwidth-{device.type}")


if __name__ == "__main__":
    main()
