"""Rows are tested against quadrature and figures computed by hand; merging, sampling and windows of units against direct computation."""

import itertools
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from scipy import integrate, stats
from torch import nn

from tests.facts import site_facts
from tests.test_activations import MODULES, row
from tests.truth import known
from torchsat.activations import bind
from torchsat.columns import BINS, COLUMN, UNWEIGHED
from torchsat.kernels import cpu
from torchsat.record import HISTOGRAM_EDGES, Record
from torchsat.rows import SiteRow, to_record
from torchsat.sampling import Sample, Units
from torchsat.statistics import empty_row, merge_, observe, observe_gradient, upcast
from torchsat.transport.windows import UnitWindows


@pytest.fixture(params=["kernels", "plain"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs with the compiled kernels and with plain torch."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "reads", lambda *tensors: False)
    elif not cpu.reads():
        pytest.skip("no C compiler")
    return str(request.param)


FACTS = site_facts(units=None, normal_low=None, normal_high=None, normal_derivative=None)


def make_row(module: nn.Module, z: torch.Tensor) -> torch.Tensor:
    bound = bind(row(module), module, 0.05)
    a = module(z).detach()
    z = upcast(z)
    slope, peak, edges = bound.evaluate(z, upcast(a), {name: value.reshape(()).to(z) for name, value in bound.learned.items()})
    return observe(z, upcast(a), slope, peak, edges, z.numel())[0]


def to_host(row: torch.Tensor, block: torch.Tensor | None = None) -> Record:
    units = None if block is None else UnitWindows().add("act", block.numpy())
    return to_record(SiteRow(FACTS, row.tolist(), units), 1.0, None)[0]


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("module", [*(m for m in MODULES if not isinstance(m, nn.RReLU)), nn.RReLU().train()], ids=repr)
def test_normal_inputs_give_what_quadrature_gives(module: nn.Module, scale: float) -> None:
    """E|f'|, E f'^2 and both shares lie within five standard errors of an integral over autograd's f', which does not use torchsat."""
    module = module.double()
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(200_000, dtype=torch.float64, generator=generator) * scale
    got = to_host(make_row(module, z))

    bound = bind(row(module), module, 0.05)
    low, high = bound.evaluate(z[:1], z[:1], bound.learned)[2] if bound.constants is None else (bound.constants.low, bound.constants.high)
    grid = torch.linspace(-9 * scale, 9 * scale, 400_001, dtype=torch.float64).requires_grad_()
    evaluated = module.eval() if isinstance(module, nn.RReLU) else module
    (slope,) = torch.autograd.grad(evaluated(grid).sum(), grid)
    x, f = grid.detach().numpy(), slope.abs().numpy()
    second, fourth = f**2, f**4
    if isinstance(module, nn.RReLU):
        # The slope of the negative side is uniform in [l, u]: E s^2 = (u^3 - l^3) / (3 (u - l)), E s^4 = (u^5 - l^5) / (5 (u - l)).
        low_, up = module.lower, module.upper
        second[x < 0], fourth[x < 0] = (up**3 - low_**3) / (3 * (up - low_)), (up**5 - low_**5) / (5 * (up - low_))
    density = stats.norm.pdf(x, scale=scale)
    first_moment, second_moment, fourth_moment = (integrate.trapezoid(values * density, x) for values in (f, second, fourth))

    def close(found: float | None, expected: float, variance: float) -> None:
        # 1e-5 covers the kinks, which the trapezoid rule sees to one step of the grid.
        assert abs(known(found) - expected) <= 5 * math.sqrt(max(variance, 0) / len(z)) + 1e-5

    close(got.derivative, first_moment, second_moment - first_moment**2)
    close(known(got.derivative_rms) ** 2, second_moment, fourth_moment - second_moment**2)
    for found, expected in (
        (got.low, 0.0 if low is None else stats.norm.cdf(float(low), scale=scale)),
        (got.high, 0.0 if high is None else stats.norm.sf(float(high), scale=scale)),
    ):
        close(found, expected, expected * (1 - expected))


def test_a_hand_computed_row() -> None:
    # tanh at 0: f' = 1; at +-3: f' = 1 - tanh(3)^2 = 0.009866..., in both tails (|z| > 2.178).
    record = to_host(make_row(nn.Tanh(), torch.tensor([0.0, 3.0, -3.0, 0.0])))
    flat = 1 - math.tanh(3) ** 2
    assert (record.n, record.elements, record.nonfinite) == (4, 4, 0)
    assert (record.low, record.high, record.saturated) == (0.25, 0.25, 0.5)
    assert record.derivative == pytest.approx((2 + 2 * flat) / 4, rel=1e-6)
    assert record.derivative_rms == pytest.approx(math.sqrt((2 + 2 * flat**2) / 4), rel=1e-6)
    assert record.relative_derivative == record.derivative
    assert (record.z_mean, record.z_std, record.z_min, record.z_max, record.z_absmax) == (0, math.sqrt(4.5), -3, 3, 3)
    assert record.zeros == 0.5
    assert record.a_std == pytest.approx(math.tanh(3) / math.sqrt(2), rel=1e-6)
    assert record.attenuation is record.grad_z_rms is record.stuck is None


def test_a_mean_a_thousand_times_the_deviation_keeps_its_deviation() -> None:
    z = torch.randn(100_000) * 0.5 + 500
    record = to_host(make_row(nn.ReLU(), z))
    assert record.z_std == pytest.approx(z.double().std(correction=0).item(), rel=1e-6)


def columns_of(record: Record) -> dict[str, object]:
    return {name: value for name, value in asdict(record).items() if value is not None}


@pytest.mark.parametrize("module", [nn.Tanh(), nn.GELU(), nn.PReLU()], ids=repr)
def test_any_split_of_the_data_merges_to_the_same_record(module: nn.Module) -> None:
    z = torch.randn(60, 40, dtype=torch.float64) * 3
    module = module.double()
    z[0, 0], z[17, 3] = math.nan, math.inf
    grad_a, grad_z = torch.randn(60, 40), torch.randn(60, 40)

    def part(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        flat = z[rows].reshape(-1)
        bound = bind(row(module), module, 0.05)
        learned = {name: value.reshape(()) for name, value in bound.learned.items()}
        units = Units(Sample.of(z[rows], None, 0), 1)
        forward, block = observe(flat, module(flat).detach(), *_evaluated(bound, flat, module, learned), flat.numel(), units=units)
        assert block is not None
        backward = observe_gradient(grad_a[rows].reshape(-1), grad_z[rows].reshape(-1))
        return merge_(forward, backward), block

    whole = to_host(*part(slice(0, 60)))
    for cuts in ([0, 1, 60], [0, 13, 14, 40, 60], list(range(61))):
        merged, block = empty_row(z.device), torch.zeros(3, 40, dtype=torch.float64)
        for start, end in itertools.pairwise(cuts):
            row_, block_ = part(slice(start, end))
            merge_(merged, row_)
            block += block_
        for name, value in columns_of(to_host(merged, block)).items():
            expected = getattr(whole, name)
            assert value == (expected if isinstance(expected, (str, int, bool, tuple)) else pytest.approx(expected, rel=1e-12)), name
    assert whole.nonfinite == 2


def _evaluated(bound: Any, flat: torch.Tensor, module: nn.Module, learned: Any) -> tuple[Any, Any, Any]:
    found: tuple[Any, Any, Any] = bound.evaluate(torch.where(flat.isfinite(), flat, torch.zeros_like(flat)), module(flat).detach(), learned)
    return found


def test_nonfinite_elements_are_counted_and_poison_nothing() -> None:
    z = torch.tensor([1.0, math.nan, 2.0, math.inf, -math.inf])
    got, expected = to_host(make_row(nn.ReLU(), z)), to_host(make_row(nn.ReLU(), torch.tensor([1.0, 2.0])))
    assert got.nonfinite == 3
    assert got.elements == 5
    for name, value in columns_of(expected).items():
        if name not in ("nonfinite", "elements"):
            assert getattr(got, name) == value, name
    gradient = observe_gradient(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1.0, 1.0, math.inf]))
    record = to_host(merge_(gradient, make_row(nn.ReLU(), z)))
    assert (record.grad_n, record.grad_nonfinite, record.attenuation) == (1, 2, 1.0)


def test_nothing_but_nonfinite_elements_leaves_everything_unknown() -> None:
    record = to_host(make_row(nn.ReLU(), torch.full((3,), math.nan)))
    assert record.nonfinite == 3
    assert record.n == 0
    assert record.saturated is record.derivative is record.z_mean is record.z_max is record.histogram is None  # type: ignore[comparison-overlap]


def test_the_histogram_tells_a_millionth_from_a_hundredth() -> None:
    assert HISTOGRAM_EDGES[0] == 0
    assert HISTOGRAM_EDGES[-1] == 1
    assert list(HISTOGRAM_EDGES) == sorted(HISTOGRAM_EDGES)
    relative = torch.tensor([0.0, 1e-9, 1e-6, 1e-4, 1e-2, 0.5, 0.74, 0.75, 1.0], dtype=torch.float64)
    row = observe(relative, relative, relative * 3, 3.0, (None, None), len(relative))[0]
    counts = row[COLUMN[BINS[0]] : COLUMN[BINS[-1]] + 1]
    for value in relative.tolist():
        place = next(k for k in range(len(counts)) if value < HISTOGRAM_EDGES[k + 1] or k == len(counts) - 1)
        assert counts[place] > 0, value
    assert counts.sum() == len(relative)
    assert (counts > 0).sum() == 6  # 0 and 1e-9 share the first bin, 0.5 and 0.74 one, 0.75 and 1 the last


def test_attenuation_and_gradient_rms_by_hand() -> None:
    grad_a, grad_z = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    forward = make_row(nn.Tanh(), torch.zeros(2))
    record = to_record(SiteRow(FACTS, merge_(forward, observe_gradient(grad_a, grad_z)).tolist()), 8.0, None)[0]
    assert record.attenuation == pytest.approx(0.1)
    assert record.grad_a_rms == pytest.approx(math.sqrt(12.5) / 8)  # without a GradScaler's factor of 8
    assert record.grad_z_rms == pytest.approx(math.sqrt(0.125) / 8)


def test_stuck_units_of_a_real_block() -> None:
    windows = UnitWindows()
    z = torch.tensor([0.5, -0.5, 0.5]).repeat(100, 1)
    z[0, 0] = z[1, 2] = -0.5
    values = []
    for _ in range(3):
        found = observe(z.flatten(), z.flatten(), (z > 0).float().flatten(), 1.0, (0.0, None), z.numel(), units=Units(Sample.of(z, None, 0), 1))[1]
        values.append(windows.add("act", known(found).numpy()))
    # units, measured, stuck, in doubt, samples: a unit that has never been active is known to be stuck after 200 samples.
    assert values == [[3, 2, 0, 0, 100], [3, 3, 1, 0, 200], [3, 3, 1, 0, 300]]
    host = make_row(nn.Tanh(), torch.zeros(2))
    record, memory = to_record(SiteRow(FACTS, host.tolist(), values[2]), 1.0, None)
    assert record.stuck == pytest.approx(1 / 3)
    assert record.stuck_n == 300
    # Of the first samples alone nothing is known, and what was known before stands.
    assert to_record(SiteRow(FACTS, host.tolist(), values[0]), 1.0, None)[0].stuck is None
    assert to_record(SiteRow(FACTS, host.tolist(), values[0]), 1.0, memory)[0].stuck_n == 300


@pytest.mark.parametrize("shape", [(256, 1024), (16, 32, 24, 24), (16, 128, 64), (7, 5), (1, 1, 70000), (3, 2, 5, 7, 11)])
@pytest.mark.parametrize("limit", [None, 4096, 1000])
def test_a_sample_visits_all_units_evenly(shape: tuple[int, ...], limit: int | None) -> None:
    z = torch.zeros(shape)
    for turn in (0, 1, 57):
        sample = Sample.of(z, limit, turn)
        taken = sample.take(z)
        assert taken.numel() == z.numel() if limit is None else 0 < taken.numel() <= max(limit, 1)
        axis = 1
        counts = torch.bincount(Units(sample, axis).index(z.device), minlength=shape[axis])
        # At least as even as independent draws, whose counts have a variance equal to their mean.
        assert counts.double().var(correction=0) <= counts.double().mean()


def test_the_unit_of_each_element_taken_is_right_in_any_memory_order() -> None:
    base = torch.arange(5.0).reshape(1, 5, 1, 1).expand(4, 5, 6, 7).contiguous()
    for z in (base, base.to(memory_format=torch.channels_last), base.transpose(0, 3), base[:, :, ::2], base.permute(2, 3, 1, 0).contiguous()):
        axis = next(axis for axis in range(4) if z.shape[axis] == 5)
        for limit in (None, 50):
            sample = Sample.of(z, limit, 3)
            assert torch.equal(sample.take(z), Units(sample, axis).index(z.device).float())


def test_the_same_elements_are_taken_from_tensors_of_another_layout() -> None:
    z = torch.arange(4 * 5 * 6 * 7.0).reshape(4, 5, 6, 7)
    sample = Sample.of(z, 100, 1)
    assert torch.equal(sample.take(z), sample.take(z.to(memory_format=torch.channels_last)))
    learned = torch.arange(5.0)
    assert torch.equal(sample.spread(learned), Units(sample, 1).index(z.device).float())
    assert torch.equal(sample.spread(learned.reshape(1, 5, 1, 1)), Units(sample, 1).index(z.device).float())
    assert sample.spread(torch.tensor([2.0])).shape == ()


def test_the_error_of_sampling_is_that_of_a_random_sample() -> None:
    """On units that differ (shares drawn from Beta(.3, .3)) the error is within twice the binomial one; that of a stride that divides the width is
    not."""
    generator = torch.Generator().manual_seed(3)
    share = torch.tensor(stats.beta(0.3, 0.3).rvs(1024, random_state=5))
    z = (torch.rand(256, 1024, generator=generator) < share).float()
    errors = [Sample.of(z, 16384, turn).take(z).mean().item() - z.mean().item() for turn in range(20)]
    assert math.sqrt(sum(error**2 for error in errors) / 20) < 2 * 0.0039
    assert abs(z[:, ::16].mean() - z.mean()) > 2 * 0.0039


def test_half_precision_is_summed_in_double() -> None:
    z = torch.full((1000,), 60000.0, dtype=torch.float16)
    record = to_host(make_row(nn.ReLU(), z))
    assert record.z_rms == 60000  # 60000^2 overflows float16, and its sum a float32 significand


def test_calls_weigh_by_the_elements_they_have_and_not_by_those_that_were_read() -> None:
    small, large = torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 3.0]]).repeat(1000, 1)
    row, block = empty_row(small.device), torch.zeros(3, 2, dtype=torch.float64)
    for z in (small, large):
        sample = Sample.of(z, 100, 0)
        taken = sample.take(z)
        observe(taken, taken, (taken < 1).float(), 1.0, (None, 1.0), z.numel(), units=Units(sample, 1), row=row, block=block)
        merge_(row, observe_gradient(taken, 2 * taken, z.numel()))
    record = to_host(row)
    both = torch.cat([small, large])
    # Of the large call about half of the elements that were read are 3, which counts for 2000 elements beside the 2 of the small call.
    share = (2 + 2000 * (float(row[COLUMN["high"]]) - 2) / 2000) / both.numel()
    assert record.elements == both.numel()
    assert record.n == record.grad_n < 110
    assert record.saturated == pytest.approx(share, rel=1e-12)
    assert record.saturated == pytest.approx(0.5, abs=0.06)
    assert record.z_mean == pytest.approx(3 * record.saturated, rel=1e-12)
    assert record.derivative == pytest.approx(1 - record.saturated, rel=1e-12)
    assert sum(known(record.histogram)) == pytest.approx(1, rel=1e-12)
    assert record.grad_a_rms == pytest.approx(record.z_rms, rel=1e-12)
    # The first unit is flat in the small call only. All samples of the second one in the large call are.
    assert block[0].tolist() == pytest.approx([1002, 1002], rel=0.25)
    assert block[1, 0] == 2
    assert block[2].sum() == record.n


def test_a_call_that_is_read_whole_keeps_its_sums_bit_for_bit() -> None:
    z = torch.randn(999) / 3
    row = observe(z, z, z.abs(), 1.0, (None, 1.0), z.numel())[0]
    assert row[COLUMN["n"]] == row[COLUMN["read"]] == 999
    half = observe(z, z, z.abs(), 1.0, (None, 1.0), 2 * z.numel())[0]
    sums = slice(0, COLUMN["peak"])
    weighed = torch.tensor([name not in UNWEIGHED for name in list(COLUMN)[sums]])
    assert torch.equal(half[sums][weighed], 2 * row[sums][weighed])
    assert torch.equal(half[sums.stop :], row[sums.stop :])
