"""The rows of statistics.py in one pass over memory: in C on the CPU (cpu.py, cpu.c) and in Triton on NVIDIA GPUs (cuda.py).

Both are optional and give the same rows as the plain implementation in statistics.py. That one is used where there is no compiler, and everywhere if
the environment variable TORCHSAT_KERNELS is 0.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from torchsat.kernels import cpu

_gpu: ModuleType | None = None
"""The kernels for GPUs, once they are imported."""


def engine(*tensors: Tensor | None) -> ModuleType | None:
    """The module with the kernels that can read these vectors: `cpu` or `cuda`; None where neither can."""
    return cpu if cpu.reads(*tensors) else on_gpu(*tensors)


def on_gpu(*tensors: Tensor | None) -> ModuleType | None:
    """The module `cuda`, if its kernels can read these tensors."""
    return _gpu if _gpu is not None and _gpu.reads(*tensors) else None


def reads_whole(tensor: Tensor) -> bool:
    """Whether a kernel reads this tensor so quickly that all of it can be read instead of a sample."""
    return on_gpu(tensor) is not None


def gpu() -> ModuleType | None:
    """The kernels for NVIDIA GPUs, whether or not any device trusts them; None where Triton is not installed, or the user does not want kernels."""
    global _gpu
    if _gpu is None and os.environ.get("TORCHSAT_KERNELS") != "0":
        try:
            from torchsat.kernels import cuda
        except ImportError:
            return None
        _gpu = cuda
    return _gpu
