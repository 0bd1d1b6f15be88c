"""Without a GPU the kernels for GPUs run in Triton's interpreter, which must be known before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
