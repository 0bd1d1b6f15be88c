"""The kernels give the same rows as the plain implementation, column by column, whatever numbers they read."""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.test_activations import row as row_of
from torchsat import statistics
from torchsat.activations import Activation, bind
from torchsat.columns import COLUMN, HEADS
from torchsat.kernels import cpu
from torchsat.kernels.formulas import formula
from torchsat.sampling import Sample, Units
from torchsat.softmax import observe_softmax
from torchsat.statistics import extremes, known_slope, observe, observe_features, observe_gradient, put_squares

compiled = pytest.mark.skipif(not cpu.reads(), reason="no C compiler")
COLUMNS = tuple(COLUMN)


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


def squares(x: Tensor, y: Tensor | None = None) -> Tensor:
    """[sum x^2, sum (y - x)^2]"""
    out = torch.zeros(2, dtype=torch.float64)
    whole = Sample.of(x, None, 0)
    put_squares(whole.take(x), None if y is None else whole.take(y), out, 0)
    return out


def close(found: Tensor, expected: Tensor, names: tuple[str, ...]) -> None:
    for name, one, other in zip(names, found.tolist(), expected.tolist(), strict=True):
        # The sums are taken in another order, so they differ by the rounding of float64 over a few thousand elements.
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
            assert torch.allclose(block, other_block, rtol=1e-12, atol=0)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 3, 300, 1000])
def test_softmaxes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, keys: int) -> None:
    generator = torch.Generator().manual_seed(keys)
    logits = (torch.randn(3, 4, 5, keys, generator=generator) * 10.0 ** torch.randint(-2, 3, (3, 4, 5, 1), generator=generator)).to(dtype)
    logits[0, 0, 0, 0], logits[1, 1, 1, -1], logits[2, 2, 2, 0] = math.inf, math.nan, -1000.0
    some = torch.rand(3, 1, 5, keys, generator=generator) < 0.7
    causal = torch.ones(5, keys, dtype=torch.bool).tril()
    for visible in (torch.ones((), dtype=torch.bool), some, causal, torch.zeros(1, 1, 1, 1, dtype=torch.bool)):
        for z in (logits, logits.transpose(0, 2).contiguous().transpose(0, 2), logits.transpose(1, 2).contiguous().transpose(1, 2)):
            row, heads = observe_softmax(z, visible, 77)
            with monkeypatch.context() as patch:
                plain(patch)
                other, other_heads = observe_softmax(z, visible, 77)
            assert torch.allclose(row, other, rtol=1e-11, atol=1e-11), [name for name, a, b in zip(COLUMNS, row, other, strict=True) if a != b]
            # Of float32 the heads are computed in float32.
            near = 1e-11 if dtype == torch.float64 else 2e-6
            assert torch.allclose(heads, other_heads, rtol=near, atol=near), [
                (name, a, b) for name, a, b in zip(HEADS, heads, other_heads, strict=True)
            ]


@compiled
@pytest.mark.parametrize(
    "module",
    [nn.Sigmoid(), nn.Tanh(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 2.0), nn.Hardsigmoid(), nn.Threshold(0.3, 1.0), nn.SiLU(), nn.GELU("tanh")],
    ids=repr,
)
def test_the_formulas_of_the_kernels_are_the_derivatives_of_the_table(module: nn.Module) -> None:
    bound = bind(row_of(module), module, 0.05)
    of = formula(bound)
    assert of is not None
    assert of.kind in cpu.KINDS
    z = torch.cat(
        [torch.linspace(-40, 40, 4001, dtype=torch.float64), torch.tensor([0.0, -0.0, 0.3, 3.0, 6.0, -0.5, 2.0, 1e4, -1e4, 700, -700, 1e-300])]
    )
    # Each row is of one element, so that its sum of |f'| is the derivative at that element.
    found = torch.stack([observe(each.reshape(1), each.reshape(1), of, 1.0, (None, None), 1)[0] for each in z])[:, COLUMN["derivative"]]
    expected = bound.evaluate(z, z, {})[0]
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-15)


def test_a_derivative_of_the_users_own_is_never_replaced() -> None:
    own = Activation("tanh", (nn.Tanh,), (), lambda z: torch.ones_like(z))
    assert formula(bind(own, nn.Tanh(), 0.05)) is None


@compiled
def test_what_these_kernels_do_not_know_is_computed_by_torch() -> None:
    z = torch.zeros(1)
    assert known_slope(bind(row_of(nn.GELU()), nn.GELU(), 0.05), z) is None
    assert known_slope(bind(row_of(nn.GELU("tanh")), nn.GELU("tanh"), 0.05), z) is not None


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradients_features_and_squares(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    whole, other = hostile((40, 50), dtype), hostile((40, 50), dtype).flip(0)
    sample = Sample.of(whole, 700, 5)
    first, second = sample.take(whole), sample.take(other)
    units = Units(sample, 1)

    def measure() -> list[Tensor]:
        rows = [observe_gradient(one, two, 2000) for one, two in ((first, second), (first, None), (None, second))]
        finite = [torch.where(torch.isfinite(each), each, torch.zeros_like(each)) for each in (whole.t(), other.t())]
        return [*rows, observe_features(first, units).flatten(), squares(finite[0]), squares(finite[0], finite[1]), squares(whole)]

    found = measure()
    plain(monkeypatch)
    for one, reference in zip(found, measure(), strict=True):
        assert torch.allclose(one, reference, rtol=1e-12, atol=0, equal_nan=True)


def test_squares_of_what_float32_cannot_square(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, huge = torch.full((1000,), 1e-30), torch.full((300_000,), 1e30)
    for _ in range(2):
        assert squares(tiny)[0].item() == pytest.approx(1e-57, rel=1e-6)
        assert squares(huge)[0].item() == pytest.approx(3e65, rel=1e-6)
        assert squares(huge, 2 * huge)[1].item() == pytest.approx(3e65, rel=1e-6)
        plain(monkeypatch)


@compiled
def test_every_float16_is_read_as_it_is() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        values = values[torch.isfinite(values)]
        out = squares(values, values.double().float().to(dtype))
        assert out[1].item() == 0
        for value in values[::997]:
            assert squares(value.reshape(1))[0].item() == value.double().item() ** 2


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., bool]]:
    """A function that looks for the kernels again, under these environment variables (None: unset), and returns whether they are there."""

    def look(**environment: str | None) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path))
            for name, value in {"TORCHSAT_KERNELS": None, "XDG_CACHE_HOME": str(tmp_path), **environment}.items():
                patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
            cpu._library.cache_clear()
            return cpu.reads()

    yield look
    cpu._library.cache_clear()


def test_without_a_compiler_or_when_told_so_all_is_plain(fresh: Callable[..., bool], tmp_path: Path) -> None:
    assert not fresh(TORCHSAT_KERNELS="0")
    assert not fresh(CC="false")
    assert not fresh(CC="/no/such/compiler")
    assert not fresh(PATH=str(tmp_path), CC=None)


@compiled
def test_the_library_is_built_once_and_where_it_may_be(fresh: Callable[..., bool], tmp_path: Path) -> None:
    assert fresh()
    (built,) = (tmp_path / "torchsat").iterdir()
    stamp = built.stat().st_mtime_ns
    assert fresh()
    assert [each.stat().st_mtime_ns for each in (tmp_path / "torchsat").iterdir()] == [stamp]
    (tmp_path / "file").touch()
    assert fresh(XDG_CACHE_HOME=str(tmp_path / "file"))
    built.unlink()
    built.write_bytes(b"not a library")
    assert fresh()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1),
    "half": lambda t: t.chunk(2, -1)[1],
    "columns": lambda t: t[:, :, ::2],
    "broadcast": lambda t: t[:1].expand(5, *t.shape[1:]),
    "vector": lambda t: t.flatten()[3:],
    "one": lambda t: t[0, 1, 2],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ["kernels", "plain"])
def test_extremes_are_those_of_all_elements(monkeypatch: pytest.MonkeyPatch, engine: str, dtype: torch.dtype, name: str) -> None:
    if engine == "plain":
        plain(monkeypatch)
        monkeypatch.setattr(statistics, "_PART", 300)
    else:
        monkeypatch.setattr(cpu, "_PART", 500)
    z = LAYOUTS[name](hostile((6, 30, 14), dtype))
    for a in (LAYOUTS[name](hostile((6, 30, 14), dtype).flip(0)), hostile((z.numel() + 1,), dtype)[1:].reshape(z.shape)):
        good = z.isfinite() & a.isfinite()
        if z.stride() != a.stride():
            # Elements of tensors in another order are not looked at together.
            expected = [max((~z.isfinite()).sum().item(), (~a.isfinite()).sum().item())]
            kept = z[z.isfinite()], a[a.isfinite()]
        else:
            expected, kept = [(~good).sum().item()], (z[good], a[good])
        expected += [top for each in kept for top in (each.max().item(), -each.min().item())]
        assert extremes(z, a).tolist() == expected
        assert extremes(z, None).tolist()[3:] == extremes(None, a).tolist()[1:3] == [-math.inf] * 2
        assert extremes(z, None).tolist()[1] == z[z.isfinite()].max()
