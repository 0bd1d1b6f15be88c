"""Without a GPU the kernels for GPUs run in Triton's interpreter, which must be known before anything imports Triton."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# An assertion that fails in one of these shows its values, as one in a test does.
pytest.register_assert_rewrite("tests.truth", "tests.processes")
