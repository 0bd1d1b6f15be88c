"""The statistics of statistics.py in one pass over memory: C on the CPU (cpu.py, cpu.c) and Triton on NVIDIA GPUs (cuda.py).

Both are optional and give the rows of the plain implementation, which is used where there is no compiler, or where the environment variable
TORCHSAT_KERNELS is 0.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from torchsat.kernels import cpu

_gpu: ModuleType | None = None


def engine(*tensors: Tensor | None) -> ModuleType | None:
    """The kernels that can read these vectors: `cpu`, `cuda`, or None."""
    if cpu.reads(*tensors):
        return cpu
    return _gpu if _gpu is not None and _gpu.reads(*tensors) else None


def reads_whole(tensor: Tensor) -> bool:
    """Whether kernels read this tensor so quickly that there is no need to take a sample."""
    return _gpu is not None and bool(_gpu.reads(tensor))


def gpu() -> ModuleType | None:
    """The kernels for NVIDIA GPUs, whether or not they are trusted; None where Triton is not installed."""
    global _gpu
    if _gpu is None and os.environ.get("TORCHSAT_KERNELS") != "0":
        try:
            from torchsat.kernels import cuda
        except ImportError:
            return None
        _gpu = cuda
    return _gpu
