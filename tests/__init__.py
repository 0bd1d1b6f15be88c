"""Without a GPU the GPU kernels run in Triton's interpreter. Triton reads this setting when it is imported, so it is set here, before any test is."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest rewrites assertions in test files only. With this, a failing assertion in a shared module shows its values too.
pytest.register_assert_rewrite("tests.truth", "tests.processes")
