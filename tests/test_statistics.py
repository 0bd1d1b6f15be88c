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
from torchsat.sampling import Sample, Units, places, seed_of
from torchsat.statistics import empty_row, merge_, observe, observe_gradient, observe_quotient, upcast
from torchsat.transport.windows import SAMPLES_FROM_START, UnitWindows


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
        merged, block = empty_row(z.device), torch.zeros(4, 40, dtype=torch.float64)
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


def quotient_columns(z: torch.Tensor, grad_a: torch.Tensor, grad_z: torch.Tensor, elements: int) -> list[float]:
    row = empty_row(z.device)
    observe_quotient(z, z, grad_a, grad_z, elements, row)
    return [row[COLUMN[name]].item() for name in ("derivative", "derivative_sq", "derivative_unknown")]


def test_the_quotient_of_the_gradients_is_the_derivative_where_it_is_known() -> None:
    z = torch.tensor([0.5, 1.0, 2.0, math.nan])
    slope = torch.tensor([0.5, -1.0, 2.0, 7.0])
    grad_a = torch.tensor([1e-8, 4.0, -1e4, 1.0])
    assert quotient_columns(z, grad_a, slope * grad_a, 4) == pytest.approx([3.5, 5.25, -3.0])
    # Each element read stands for two.
    assert quotient_columns(z, grad_a, slope * grad_a, 8) == pytest.approx([7.0, 10.5, -6.0])
    nothing = torch.zeros(4)
    assert quotient_columns(z, nothing, nothing, 4) == [0.0, 0.0, 0.0]
    assert quotient_columns(z, torch.full((4,), math.inf), nothing, 4) == [0.0, 0.0, 0.0]
    # The smallest numbers of float16 have one digit, so that a quotient of two of them says nothing.
    tiny = torch.full((4,), 6e-8, dtype=torch.float16)
    assert quotient_columns(z, tiny, tiny, 4) == [0.0, 0.0, 0.0]


def test_elements_without_a_quotient_have_the_mean_of_those_with_nearly_the_same_z() -> None:
    z = torch.randn(20_000, dtype=torch.float64)
    slope = 1 - torch.tanh(z) ** 2
    # Elements with large z are more often known: their mean alone is smaller than that of all.
    for heard, told in ((torch.rand(20_000) < 0.05 + 0.2 * z.abs(), 1.0), (z > 0, 0.5)):
        derivative, square, unknown = quotient_columns(z, heard.double(), slope * heard, 20_000)
        assert -unknown == pytest.approx(20_000 * told, rel=0.02)
        kept = slope if told == 1 else slope[z > 0]
        assert derivative / -unknown == pytest.approx(kept.mean().item(), rel=0.02)
        assert square / -unknown == pytest.approx(kept.square().mean().item(), rel=0.03)


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
        # As even as independent draws, whose counts have a variance equal to their mean, or more so.
        assert counts.double().var(correction=0) <= counts.double().mean() * (1 + 4 * math.sqrt(2 / shape[axis]))


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


def patterns(b: torch.Tensor, c: torch.Tensor, h: torch.Tensor, w: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
    """What defeats one lattice or another: stripes, checkerboards and blocks of every period, parities of axes, ramps; values in [0, 1]."""
    found = {
        "three ways": (w // 64 + c + b) % 2,
        "parity": (b ^ c ^ h ^ w) % 2,
        "all bits": sum(((b ^ c ^ h ^ w) >> bit) & 1 for bit in range(10)) % 2,
        "product": (b * c + h * w) % 3 == 0,
        "quadratic": (w * w + c) % 7 < 3,
        "channels": c % 8 == 0,
        "one channel in 37": c % 37 == 5,
        "samples": b % 2,
        "ramp": w / max(1, width - 1),
        "steep ramp": (w / max(1, width - 1)) ** 8,
        "waves": 0.5 + 0.5 * torch.sin(0.7 * w + 2.1 * c + 1.3 * h),
    }
    for period in (1, 2, 4, 8, 32):
        found |= {
            f"stripes of {period}": (w // period) % 2,
            f"board of {period}": (w // period + h // period) % 2,
            f"blocks of {period}": (w // period + h // period + c // period + b) % 2,
            f"channels of {period}": (c // period + w) % 2,
        }
    return {name: torch.as_tensor(each).double() for name, each in found.items()}


SHAPES = [(4, 64, 16, 16), (64, 1, 1, 1024), (2, 128, 256, 1), (8, 16, 32, 16), (5, 33, 23, 19), (3, 101, 1, 331), (1, 1, 1, 50_021)]


@pytest.mark.parametrize("shape", SHAPES)
def test_of_any_pattern_the_error_is_that_of_independent_draws_or_less(shape: tuple[int, ...]) -> None:
    axes = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    true = {name: each.mean().item() for name, each in patterns(axes[0], axes[1], axes[2], axes[3], shape[-1]).items()}
    n, turns = 4096, 6
    errors: dict[str, list[float]] = {name: [] for name in true}
    for turn in range(turns):
        sample = Sample.of(torch.empty(()).expand(shape).to("meta").contiguous(), n, seed_of(turn, 0))
        places = sample.places(torch.device("cpu")).long()
        assert len(places) == sample.n == n
        assert (places.diff() >= 0).all()
        b, c, h, w = torch.unravel_index(places, shape)
        for name, each in patterns(b, c, h, w, shape[-1]).items():
            errors[name].append(each.mean().item() - true[name])
    for name, found in errors.items():
        # A value in [0, 1] with this mean has at most this standard deviation.
        deviation = math.sqrt(max(true[name] * (1 - true[name]), 1e-9) / n)
        assert max(map(abs, found)) <= 4 * deviation, name
        assert abs(sum(found)) / turns <= 4 * deviation / math.sqrt(turns), name


def test_a_stripe_that_a_step_of_a_power_of_two_and_one_cannot_see() -> None:
    """Read at every 257-th element, this pattern had shares of 0.52, 0.30, 0.75, 0.32, 0.47 in successive observations."""
    shape = (4, 256, 128, 128)
    for turn in range(10):
        b, c, _, w = torch.unravel_index(places(math.prod(shape), 65536, seed_of(turn, 0), torch.device("cpu")).long(), shape)
        assert ((w // 64 + c + b) % 2).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(65536))


def test_every_element_is_read_with_the_same_probability() -> None:
    """Also where the strata are little longer than an element, so that some elements would always be read and others half the time."""
    for size, count in ((30, 20), (40, 39), (7, 3), (1000, 64)):
        counts = torch.zeros(size)
        for seed in range(1000):
            counts += torch.bincount(places(size, count, seed_of(seed, 1), torch.device("cpu")), minlength=size)
        expected = 1000 * count / size
        assert (counts - expected).abs().max() <= 5 * math.sqrt(expected), (size, count)


def test_calls_and_observations_are_read_at_other_places() -> None:
    z = torch.arange(100_000.0)
    seeds = {seed_of(turn, call) for turn in range(50) for call in range(50)}
    assert len(seeds) == 2500
    taken = [Sample.of(z, 1000, seed_of(turn, call)).take(z) for turn in range(3) for call in range(3)]
    for one, other in itertools.combinations(taken, 2):
        assert len(set(one.tolist()) & set(other.tolist())) < 40
    assert Sample.of(z, 1000, 7) is not Sample.of(z, 1000, 8)
    kept = Sample.of(z, 1000, 7)
    assert Sample.of(z * 2, 1000, 7) is kept


def test_units_are_called_stuck_at_the_share_that_is_stuck() -> None:
    """Of 1024 units, read 16 times in an observation, those that were never active are stuck after some more observations than 200 / 16."""
    z = torch.ones(64, 1024)
    z[:, ::16] = -1.0
    windows, observations, stuck = UnitWindows(), 0, 0.0
    while stuck < 1024 / 16 and observations < 100:
        sample = Sample.of(z, 16384, seed_of(observations, 0))
        taken = sample.take(z)
        found = known(observe(taken, taken, (taken > 0).float(), 1.0, (0.0, None), z.numel(), units=sample.units(1))[1])
        units, measured, stuck, _, samples = windows.add("act", found.numpy())
        observations += 1
    assert samples >= SAMPLES_FROM_START
    assert (stuck, measured) == (1024 / 16, units)
    assert SAMPLES_FROM_START / 16 < observations < 30


def test_half_precision_is_summed_in_double() -> None:
    z = torch.full((1000,), 60000.0, dtype=torch.float16)
    record = to_host(make_row(nn.ReLU(), z))
    assert record.z_rms == 60000  # 60000^2 overflows float16, and its sum a float32 significand


def test_calls_weigh_by_the_elements_they_have_and_not_by_those_that_were_read() -> None:
    small, large = torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 3.0]]).repeat(1000, 1)
    row, block = empty_row(small.device), torch.zeros(4, 2, dtype=torch.float64)
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
    assert record.saturated == pytest.approx(0.5, abs=0.2)
    assert record.z_mean == pytest.approx(3 * known(record.saturated), rel=1e-12)
    assert record.derivative == pytest.approx(1 - known(record.saturated), rel=1e-12)
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
