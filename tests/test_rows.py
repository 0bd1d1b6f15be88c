"""Records from rows whose figures can be computed by hand: means, shares and ratios, what is unknown, and windows of units."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from tests.facts import layer_facts, site_facts
from torchsat.columns import BINS, COLUMN, HEADS, LAYER, MAXES
from torchsat.record import Head, LayerFacts, Record, SiteFacts, Weight
from torchsat.rows import LayerRow, SiteRow, Stuck, to_record, to_weight

FACTS = site_facts("blocks.0.act", output=True, after=("blocks.0.input",), normal_low=0.015, normal_high=0.016)
LAYER_FACTS = layer_facts("blocks.0.linear", feeds=("blocks.0.act",), fan_in=50, data=True)


def row(facts: SiteFacts = FACTS, units: Any = None, heads: Any = (), **columns: float) -> SiteRow:
    """A row with these columns; the others are those of a row without elements."""
    empty = {name: -math.inf if name in MAXES else 0.0 for name in COLUMN}
    assert columns.keys() <= empty.keys()
    return SiteRow(facts, list({**empty, **columns}.values()), units, heads)


def record(given: SiteRow, scale: float = 1.0) -> Record:
    return to_record(given, scale, None)[0]


def layer(n: int = 100, **numbers: float) -> Weight:
    """A weight of 1000 elements, `n` of them read."""
    return to_weight(LayerRow(LAYER_FACTS, [{**dict.fromkeys(LAYER, math.nan), **numbers}[name] for name in LAYER], n, 1000, 0.1))


def unknown(made: Any) -> set[str]:
    return {field.name for field in fields(made) if getattr(made, field.name) is None}


def test_the_facts_pass_through() -> None:
    made = record(row(n=1.0))
    assert {field.name: getattr(made, field.name) for field in fields(SiteFacts)} == vars(FACTS)
    weight = layer(weight_sq=1.0)
    assert {field.name: getattr(weight, field.name) for field in fields(LayerFacts)} == vars(LAYER_FACTS)


def test_shares_and_counts() -> None:
    made = record(row(n=80.0, read=40.0, elements=640.0, nonfinite=3.0, low=20.0, high=4.0, zeros=8.0))
    assert (made.n, made.elements, made.nonfinite) == (40, 640, 3)
    assert (made.low, made.high, made.saturated, made.zeros) == (0.25, 0.05, 0.3, 0.1)


def test_means_and_deviations() -> None:
    # z = 1, 1, 4, 6: mean 3, mean square 13.5, variance 4.5. a = 0, 0, 0, 2: mean 0.5, variance 1 - 0.25.
    made = record(row(n=4.0, z=12.0, z_sq=54.0, z_max=6.0, z_min_negated=-1.0, a=2.0, a_sq=4.0, a_max=2.0, a_min_negated=0.0))
    assert (made.z_mean, made.z_std, made.z_rms) == (3.0, math.sqrt(4.5), math.sqrt(13.5))
    assert (made.z_min, made.z_max, made.z_absmax) == (1.0, 6.0, 6.0)
    assert (made.a_mean, made.a_std, made.a_min, made.a_max) == (0.5, math.sqrt(0.75), 0.0, 2.0)


def test_a_variance_that_rounding_makes_negative_is_0() -> None:
    assert record(row(n=3.0, z=3.0, z_sq=3.0 - 1e-9)).z_std == 0


def test_derivative_and_histogram_are_relative_to_the_peak() -> None:
    bins = dict.fromkeys(BINS, 0.0) | {BINS[0]: 1.0, BINS[-1]: 3.0}
    made = record(row(FACTS, n=4.0, derivative=0.5, derivative_sq=0.16, peak=0.25, **bins))
    assert (made.derivative, made.derivative_rms, made.peak, made.relative_derivative) == (0.125, 0.2, 0.25, 0.5)
    assert made.histogram is not None
    assert (made.histogram[0], made.histogram[-1], sum(made.histogram)) == (0.25, 0.75, 1.0)


def test_without_a_peak_nothing_is_relative() -> None:
    made = record(row(replace(FACTS, tails="unknown"), units=[4.0, 4.0, 2.0, 0.0, 1000.0], n=4.0, derivative=0.5, low=0.0))
    assert made.derivative == 0.125
    assert {"peak", "relative_derivative", "histogram"} <= unknown(made)
    assert made.saturated is made.low is made.high is made.stuck is made.stuck_n is None


def test_a_derivative_is_the_mean_over_the_elements_at_which_it_is_known() -> None:
    """It is not shown where it is unknown at more than one element in twenty: these may be unlike the others."""
    most = record(row(n=100.0, read=100.0, derivative_unknown=4.0, derivative=48.0, derivative_sq=96.0))
    assert (most.derivative, most.derivative_rms) == (0.5, 1.0)
    for missing in (6.0, 100.0):
        made = record(row(n=100.0, read=100.0, derivative_unknown=missing, derivative=48.0, derivative_sq=96.0))
        assert (made.derivative, made.derivative_rms, made.n) == (None, None, 100)


def test_only_a_sigmoid_has_gates() -> None:
    made = record(row(replace(FACTS, activation="sigmoid"), n=10.0, gate_left=2.0, gate_right=5.0))
    assert (made.gate_left, made.gate_right) == (0.2, 0.5)
    made = record(row(n=10.0, gate_left=2.0, gate_right=5.0))
    assert made.gate_left is made.gate_right is None


def test_attenuation_needs_both_gradients() -> None:
    both = record(row(n=1.0, grad_a_n=4.0, grad_a_read=3.0, grad_a_sq=16.0, grad_z_n=4.0, grad_z_read=3.0, grad_z_sq=1.0, grad_nonfinite=2.0))
    assert (both.grad_n, both.grad_nonfinite, both.grad_a_rms, both.grad_z_rms, both.attenuation) == (3, 2, 2.0, 0.5, 0.25)
    one = record(row(n=1.0, grad_z_n=4.0, grad_z_read=2.0, grad_z_sq=1.0))
    assert (one.grad_n, one.grad_z_rms) == (2, 0.5)
    assert one.grad_a_rms is one.attenuation is None
    nothing_came = record(row(n=1.0, grad_a_n=4.0, grad_a_sq=0.0, grad_z_n=4.0, grad_z_sq=0.0))
    assert (nothing_came.grad_a_rms, nothing_came.attenuation) == (0.0, None)


def test_the_loss_scale_is_taken_out_of_gradients_but_not_of_their_ratio() -> None:
    made = record(row(n=1.0, grad_a_n=4.0, grad_a_sq=16.0, grad_z_n=4.0, grad_z_sq=1.0), scale=8.0)
    assert (made.grad_a_rms, made.grad_z_rms, made.attenuation) == (0.25, 0.0625, 0.25)


def test_a_row_without_finite_elements_knows_nothing() -> None:
    made = record(row(elements=5.0, nonfinite=5.0))
    assert (made.n, made.elements, made.nonfinite, made.grad_n) == (0, 5, 5, 0)
    known = {field.name for field in fields(SiteFacts)} | {"n", "elements", "nonfinite", "grad_n", "grad_nonfinite"}
    assert unknown(made) == {field.name for field in fields(Record)} - known


def test_units_are_judged_once_every_one_has_its_samples() -> None:
    enough = [4.0, 4.0, 1.0, 0.0, 1200.0]
    made, memory = to_record(row(n=1.0, units=enough), 1.0, None)
    assert (made.stuck, made.stuck_n, memory) == (0.25, 1200, Stuck(0.25, 1200))
    # Three of four units have enough samples, as after a resume: what was known before stands.
    made, later = to_record(row(n=1.0, units=[4.0, 3.0, 3.0, 0.0, 40.0]), 1.0, memory)
    assert (made.stuck, made.stuck_n, later) == (0.25, 1200, memory)
    made, later = to_record(row(n=1.0, units=[4.0, 4.0, 4.0, 0.0, 100.0]), 1.0, memory)
    assert (made.stuck, made.stuck_n, later) == (1.0, 100, Stuck(1.0, 100))


def test_while_many_units_are_in_doubt_their_share_is_unknown() -> None:
    for in_doubt, known in ((5.0, 0.25), (6.0, None)):
        made, _ = to_record(row(n=1.0, units=[100.0, 100.0, 25.0, in_doubt, 1000.0]), 1.0, Stuck(0.0, 1000))
        assert made.stuck == known
        assert (made.stuck_n is None) == (known is None)


@pytest.mark.parametrize("units", [None, [math.nan] * 5])
def test_without_units_nothing_is_known_of_them(units: list[float] | None) -> None:
    made, memory = to_record(row(n=1.0, units=units), 1.0, None)
    assert {"stuck", "stuck_n"} <= unknown(made)
    assert memory is None
    assert to_record(row(n=1.0, units=units), 1.0, Stuck(0.5, 1000))[1] == Stuck(0.5, 1000)


def softmax(**heads: list[float]) -> SiteRow:
    heads = {**dict.fromkeys(HEADS, [0.0] * len(heads["rows"])), **heads}
    return row(replace(FACTS, activation="softmax", kind="softmax", tails="none"), heads=[heads[name] for name in HEADS], n=8.0, derivative=1.0)


def test_a_softmax_has_means_over_rows_and_its_lowest_head() -> None:
    # The first head has 2 rows, the second 6, the third none.
    made = record(
        softmax(
            rows=[2.0, 6.0, 0.0],
            first_key=[0.5, 3.0, 0.0],
            log_z=[3.0, -6.0, 0.0],
            log_z_sq=[8.0, 6.0, 0.0],
            entropy=[1.0, 1.2, 0.0],
            jacobian=[0.5, 1.5, 0.0],
            logit_variance=[8.0, 24.0, 0.0],
            log_keys=[4.0, 12.0, 0.0],
            logit_max=[3.0, -1.0, -math.inf],
        )
    )
    assert (made.entropy, made.entropy_min, made.jacobian, made.logit_std, made.log_keys) == (2.2 / 8, 1.2 / 6, 0.25, 2.0, 2.0)
    assert made.heads == (
        Head(2, 0.5, 0.25, 2.0, 3.0, first_key=0.25, log_z=1.5, log_z_rms=2.0),
        Head(6, 1.2 / 6, 0.25, 2.0, -1.0, first_key=0.5, log_z=-1.0, log_z_rms=1.0),
        Head(0, None, None, None, None),
    )
    assert (made.first_key, made.log_z, made.log_z_rms) == (3.5 / 8, -3 / 8, math.sqrt(14 / 8))
    assert {"derivative", "derivative_rms", "relative_derivative", "peak", "histogram"} <= unknown(made)


def test_a_softmax_without_rows_knows_nothing_and_other_sites_have_no_heads() -> None:
    made = record(softmax(**{name: [0.0] for name in HEADS}))
    assert made.entropy is made.entropy_min is made.jacobian is made.logit_std is made.log_keys is None
    assert made.heads == (Head(0, None, None, None, None),)
    made = record(row(n=8.0))
    assert {"entropy", "entropy_min", "heads"} <= unknown(made)


def test_what_is_known_of_single_ranks_passes_through() -> None:
    made = record(replace(row(n=1.0), worst=0.75, worst_rank=3, nonfinite_rank=1))
    assert (made.worst, made.worst_rank, made.nonfinite_rank) == (0.75, 3, 1)


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        record(SiteRow(FACTS, [1.0] * (len(COLUMN) + 1)))


def test_norms_stand_for_the_whole_weight() -> None:
    # 100 of 1000 elements were read, so the sums of squares are ten times as large over all: 4000, 90 and 10.
    made = layer(weight_sq=400.0, grad_sq=9.0, change_sq=1.0)
    assert (made.n, made.learning_rate) == (100, 0.1)
    assert made.norm == pytest.approx(math.sqrt(4000))
    assert made.grad_norm == pytest.approx(math.sqrt(90))
    # rms(W) = 2, and sqrt(fan_in) = sqrt(50).
    assert made.gain == pytest.approx(2 * math.sqrt(50))
    assert made.update_ratio == 0.05


def test_the_input_has_a_size_and_a_share_that_varies() -> None:
    made = layer(weight_sq=400.0, input_n=640.0, input_sq=25.0, input_offset_sq=16.0)
    assert (made.input_n, made.input_rms) == (640, 5.0)
    assert made.input_centred_share == pytest.approx(0.36)
    # The estimate of the squared mean has no bias, hence it can be negative, or larger than the mean square.
    assert layer(input_sq=25.0, input_offset_sq=-1e-3).input_centred_share == 1.0
    assert layer(input_sq=25.0, input_offset_sq=26.0).input_centred_share == 0.0


def test_what_is_unknown_of_a_layer() -> None:
    made = layer(weight_sq=400.0)
    assert unknown(made) == {
        *("grad_norm", "update_ratio", "input_rms", "input_centred_share", "unevenness", "learned_ratio", "spectral"),
        "alert_level",  # which the judge fills in
    }
    assert made.input_n == 0
    assert {"gain", "norm", "grad_norm"} <= unknown(layer(n=0, weight_sq=0.0, grad_sq=1.0))
    assert layer(weight_sq=0.0, change_sq=0.0).update_ratio is None
    assert layer(weight_sq=1.0, unevenness=7.5).unevenness == 7.5
    # Where every run has one value, the ratio of the variances has no bound.
    assert layer(weight_sq=1.0, unevenness=math.inf).unevenness is None


def test_a_norm_that_is_infinite_is_said_to_be() -> None:
    made = layer(weight_sq=400.0, grad_sq=math.inf, change_sq=math.inf, learned_sq=math.inf)
    assert (made.norm, made.grad_norm, made.update_ratio, made.learned_ratio) == (pytest.approx(math.sqrt(4000)), *[math.inf] * 3)
    made = layer(weight_sq=math.inf, grad_sq=math.nan, change_sq=1.0, learned_sq=math.inf)
    assert (made.norm, made.gain) == (math.inf, math.inf)
    # The ratio to something infinite is no number.
    assert {"grad_norm", "update_ratio", "learned_ratio"} <= unknown(made)


def test_what_a_sum_of_finite_elements_overflows_in_is_unknown() -> None:
    made = record(row(n=2.0, z=2e200, z_sq=math.inf, a=math.inf, a_sq=math.inf, grad_a_n=1.0, grad_a_sq=math.inf, z_max=1e200, z_min_negated=-1e200))
    assert (made.z_mean, made.z_max) == (1e200, 1e200)
    assert {"z_std", "z_rms", "a_mean", "a_std", "grad_a_rms", "attenuation"} <= unknown(made)
