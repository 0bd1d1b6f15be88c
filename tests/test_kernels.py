"""The kernels give the rows of the plain implementation, column by column, whatever they are handed."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchsat.kernels import cpu
from torchsat.statistics import MAXES, SUMS, Sample, Units, observe, observe_features, observe_gradient, square_sum

compiled = pytest.mark.skipif(not cpu.reads(), reason="no C compiler")
COLUMNS = (*SUMS, *MAXES)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "reads", lambda *tensors: False)


def hostile(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of every magnitude, zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 4, shape, generator=generator)
    flat = z.view(-1)
    for at, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan, 0.1, 0.9, 1e-7, 6e-8, -1e-45, 65504.0, 2.0)):
        flat[(at * 37 + 5) % len(flat)] = value
    return z.to(dtype)


def close(found: Tensor, expected: Tensor, names: tuple[str, ...]) -> None:
    for name, one, other in zip(names, found.tolist(), expected.tolist(), strict=True):
        # A sum in another order: the rounding of float64 over a few thousand elements.
        assert one == pytest.approx(other, rel=1e-12, abs=1e-290), name


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("edges", [(-2.178, 2.178), (0.0, None), (None, 3.0), (None, None)], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "limit"), [((37, 41), 1, None), ((37, 41), 1, 300), ((5, 7, 9, 11), 1, 1000), ((3, 700), 0, None), ((1,), 0, None)]
)
def test_forward_rows_and_units(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    edges: tuple[float | None, float | None],
    shape: tuple[int, ...],
    axis: int,
    limit: int | None,
) -> None:
    whole = hostile(shape, dtype)
    sample = Sample.of(whole, limit, 3)
    units = Units(sample, axis)
    z, a = sample.take(whole), sample.take(torch.tanh(whole.float()).to(dtype))
    slope = (1 / (1 + z.float().abs())).double() if dtype == torch.float64 else 1 / (1 + z.float().abs())
    for peak in (1.0, 0.25, None):
        rows = [observe(z, a, slope, peak, edges, whole.numel(), sigmoid, units) for sigmoid in (True, False)]
        with monkeypatch.context() as patch:
            plain(patch)
            expected = [observe(z, a, slope, peak, edges, whole.numel(), sigmoid, units) for sigmoid in (True, False)]
        for (row, block), (other, other_block) in zip(rows, expected, strict=True):
            close(row, other, COLUMNS)
            assert block is not None
            assert other_block is not None
            assert torch.equal(block, other_block)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradients_features_and_squares(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    whole, other = hostile((40, 50), dtype), hostile((40, 50), dtype).flip(0)
    sample = Sample.of(whole, 700, 5)
    first, second = sample.take(whole), sample.take(other)
    units = Units(sample, 1)

    def measure() -> list[Tensor]:
        rows = [observe_gradient(*given) for given in ((first, second), (first, None), (None, second))]
        finite = [torch.where(torch.isfinite(each), each, torch.zeros_like(each)) for each in (whole.t(), other.t())]
        return [*rows, observe_features(first, units).flatten(), square_sum(finite[0]), square_sum(finite[0], finite[1]), square_sum(whole)]

    found = measure()
    plain(monkeypatch)
    for one, reference in zip(found, measure(), strict=True):
        assert torch.allclose(one, reference, rtol=1e-12, atol=0, equal_nan=True)


def test_squares_of_what_float32_cannot_square(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, huge = torch.full((1000,), 1e-30), torch.full((300_000,), 1e30)
    for _ in range(2):
        assert square_sum(tiny)[0].item() == pytest.approx(1e-57, rel=1e-6)
        assert square_sum(huge)[0].item() == pytest.approx(3e65, rel=1e-6)
        assert square_sum(huge, 2 * huge)[1].item() == pytest.approx(3e65, rel=1e-6)
        plain(monkeypatch)


@compiled
def test_every_float16_is_read_as_it_is() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        values = values[torch.isfinite(values)]
        out = square_sum(values, values.double().float().to(dtype))
        assert out[1].item() == 0
        for value in values[::997]:
            assert square_sum(value.reshape(1))[0].item() == value.double().item() ** 2


def child(code: str, **environment: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return run.stdout.strip()


def test_without_a_compiler_or_when_told_so_all_is_plain(tmp_path: Path) -> None:
    code = "from torchsat.kernels import cpu; print(cpu.reads())"
    assert child(code, TORCHSAT_KERNELS="0") == "False"
    assert child(code, CC="false", XDG_CACHE_HOME=str(tmp_path)) == "False"
    assert child(code, CC="/no/such/compiler", XDG_CACHE_HOME=str(tmp_path)) == "False"
    assert child(code, PATH=str(tmp_path), CC="") == "False"


@compiled
def test_the_library_is_built_once_and_where_it_may_be(tmp_path: Path) -> None:
    code = "from torchsat.kernels import cpu; print(cpu.reads())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    assert child(code, **environment) == "True"
    (built,) = (tmp_path / "torchsat").iterdir()
    stamp = built.stat().st_mtime_ns
    assert child(code, **environment) == "True"
    assert [each.stat().st_mtime_ns for each in (tmp_path / "torchsat").iterdir()] == [stamp]
    (tmp_path / "file").touch()
    assert child(code, XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path)) == "True"
    built.write_bytes(b"not a library")
    assert child(code, **environment) == "True"
