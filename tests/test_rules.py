"""When rules raise an alert, wait, and clear it; and that healthy layers raise none."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import record
from torchsat import RULES, Alert, Record, Rule, Snapshot, Weight, harm
from torchsat.flow import gradient_over_depth
from torchsat.judge import Judge
from torchsat.percent import percent


def feed(judge: Judge, series: Iterable[object], every: int = 10) -> list[tuple[Alert, ...]]:
    """The alerts of each snapshot of a series of records, tuples of records, or snapshots."""
    result = []
    for index, item in enumerate(series):
        records = item if isinstance(item, tuple) else (item,)
        snapshot = item if isinstance(item, Snapshot) else Snapshot(index * every, 0.0, records)
        result.append(judge.judge(snapshot))
    return result


def fired(series: Iterable[object]) -> list[Alert]:
    return [alert for alerts in feed(Judge(), series) for alert in alerts]


def tails(low: float, high: float, **given: Any) -> Record:
    return record(low=low, high=high, saturated=low + high, **given)


def test_a_saturated_layer_fires_after_three_observations_and_names_when_it_began() -> None:
    healthy, bad = tails(0.015, 0.015), tails(0.2, 0.2)
    events = feed(Judge(), [healthy, bad, bad, bad, bad])
    assert [len(alerts) for alerts in events] == [0, 0, 0, 1, 0]
    (alert,) = events[3]
    assert (alert.site, alert.rule, alert.severity, alert.since, alert.step, alert.firing) == ("act", "saturated", "warning", 10, 30, True)
    assert alert.value == pytest.approx(0.4)
    # N(0, 1) puts 2.94 % into the tails of tanh, and 30 points more are allowed.
    assert alert.threshold == pytest.approx(0.3294)
    assert alert.message == ("act (tanh) is saturated: 40 % of its inputs lie on a plateau (limit 33 %, normal 2.9 %)")
    assert alert.causes == ()


def test_one_good_observation_starts_the_patience_over() -> None:
    healthy, bad = tails(0.015, 0.015), tails(0.2, 0.2)
    assert not fired([bad, bad, healthy, bad, bad])


def test_an_alert_worsens_once_holds_and_clears_with_hysteresis() -> None:
    judge = Judge()
    warm, hot, edge, cool = tails(0.2, 0.2), tails(0.3, 0.3), tails(0.15, 0.15), tails(0.1, 0.1)
    events = feed(judge, [warm] * 3 + [hot] * 3 + [warm] * 3 + [edge] * 5 + [cool] * 3 + [edge] * 3)
    flat = [(index, alert.severity, alert.firing) for index, alerts in enumerate(events) for alert in alerts]
    # 0.30 is below the limit of 0.329, but not below 0.8 of it: the alert stays until 0.20 has been seen three times.
    assert flat == [(2, "warning", True), (5, "critical", True), (16, "critical", False)]
    cleared = events[16][0]
    assert cleared.value == pytest.approx(0.2)
    assert cleared.message == "act: no longer saturated"
    assert judge.firing == ()


def test_what_fires_carries_its_latest_value() -> None:
    judge = Judge()
    feed(judge, [tails(0.2, 0.2)] * 3 + [tails(0.2, 0.25)])
    assert judge.firing[0].value == pytest.approx(0.45)
    assert judge.firing[0].step == 30
    assert judge.firing[0].since == 0


def test_the_drifting_layer_without_a_saturated_element_fires_by_its_derivative() -> None:
    # Glorot & Bengio: E|f'| / peak = 0.08 and no element in a tail.
    drift = record(
        activation="sigmoid", low=0.0, high=0.0, saturated=0.0, relative_derivative=0.08, normal_derivative=0.826, normal_low=0.0, normal_high=0.0
    )
    (alert,) = fired([drift] * 4)
    assert (alert.rule, alert.severity, alert.value) == ("saturated", "critical", 0.08)
    assert "its mean derivative is 8.0 % of the peak (limit 15 %)" in alert.message


def test_both_criteria_at_once_are_one_alert() -> None:
    assert len(fired([tails(0.5, 0.4, relative_derivative=0.05)] * 6)) == 1


@pytest.mark.parametrize(
    "healthy",
    [
        record(activation="relu", tails="low", low=0.5, high=0.0, saturated=0.5, normal_low=0.5, normal_high=0.0, relative_derivative=0.5),
        record(
            activation="relu", tails="low", low=0.93, high=0.0, saturated=0.93, normal_low=0.5, normal_high=0.0, relative_derivative=0.07, stuck=0.05
        ),
        record(
            activation="relu6", low=0.85, high=0.01, saturated=0.86, normal_low=0.5, normal_high=0.0, normal_derivative=0.5, relative_derivative=0.14
        ),
        record(low=0.15, high=0.14, saturated=0.29, relative_derivative=0.29),
        record(activation="relu", tails="low", low=0.5, saturated=0.5, normal_low=0.5, normal_high=0.0, stuck=0.22, units=128),
        record(gate=True, low=0.3, high=0.6, saturated=0.9, relative_derivative=0.1, stuck=0.5),
        record(activation="relu", tails="low", low=0.5, saturated=0.5, normal_low=0.5, normal_high=0.0, units=4, stuck=0.25),
        record(activation="leaky_relu", tails="none", low=0.0, high=0.0, saturated=0.0, relative_derivative=0.5),
        record(
            activation="hardtanh",
            low=0.33,
            high=0.34,
            saturated=0.67,
            relative_derivative=0.33,
            normal_low=0.159,
            normal_high=0.159,
            normal_derivative=0.683,
        ),
        record(activation="softsign", low=0.1, high=0.1, saturated=0.2, normal_derivative=0.41, relative_derivative=0.21),
        record(activation="sigmoid", output=True, low=0.5, high=0.49, saturated=0.99, relative_derivative=0.01, stuck=1.0),
        record(activation="gelu", tails="low", low=0.3, high=0.0, saturated=0.3, normal_low=0.011, normal_high=0.0),
        record(stuck=None, stuck_n=None, attenuation=None, grad_z_rms=None, relative_derivative=None),
    ],
    ids=lambda r: f"{r.activation}-{r.saturated}",
)
def test_what_is_benign_raises_nothing(healthy: Record) -> None:
    assert fired([healthy] * 6) == []


def test_a_closed_rectifier_fires() -> None:
    closed = record(activation="relu", tails="low", low=0.995, high=0.0, saturated=0.995, normal_low=0.5, normal_high=0.0)
    (alert,) = fired([closed] * 4)
    assert alert.message == "act (relu) is closed: 99.5 % of its inputs lie on its plateau (limit 99.0 %)"


def rectifier(stuck: float | None, units: int | None, samples: int = 1024) -> Record:
    return record(activation="relu", tails="low", low=0.6, saturated=0.6, normal_low=0.5, stuck=stuck, units=units, stuck_n=samples)


def test_stuck_units_fire_at_once_since_their_window_is_the_patience() -> None:
    (alert,) = fired([rectifier(0.85, 64)])
    assert alert.message == ("act (relu): 85 % of its 64 units are dead (in 1024 samples; limit 84 %)")


def test_the_limit_of_stuck_units_is_a_bound_for_so_many_units() -> None:
    """75 %, and 1.645 standard errors of that share; no number of samples, since a unit counts as stuck when its own are enough."""
    for units, limit in ((4, 0.95), (8, 0.95), (64, 0.839), (512, 0.7815), (10_000, 0.7571)):
        assert harm.stuck_limit(rectifier(0.5, units)) == pytest.approx(limit, abs=5e-4)
        assert fired([rectifier(limit - 0.002, units)]) == []
        assert [alert.rule for alert in fired([rectifier(limit + 0.002, units, samples=64)])] == ["stuck_units"]
    assert fired([rectifier(None, 64)]) == fired([rectifier(0.9, None)]) == []


def network(*gradients: float | None, outputs: int = 0) -> tuple[Record, ...]:
    last = len(gradients) - outputs
    after = [(f"act{index - 1}",) if index else () for index in range(len(gradients))]
    return tuple(record(f"act{at}", grad_z_rms=value, output=at >= last, after=after[at]) for at, value in enumerate(gradients))


def test_a_vanishing_gradient_is_told_once_at_the_first_site() -> None:
    (alert,) = fired([network(1e-8, 1e-6, 1e-4, 1e-2)] * 4)
    assert (alert.site, alert.rule, alert.severity) == ("act0", "vanishing_gradient", "critical")
    assert alert.value == pytest.approx(1e-6)
    assert alert.message.startswith("the gradient vanishes: at act0, the first site, the norm of dL/dz is 1.0e-06 of what it is at the last")
    assert [alert.rule for alert in fired([network(1e3, 1.0, 1e-2)] * 4)] == ["exploding_gradient"]


def test_gradient_over_depth_needs_two_hidden_sites_with_gradient() -> None:
    assert fired([network(None, 2e-3, 1.0)] * 4) == []
    assert [alert.site for alert in fired([network(None, 1e-4, 1.0)] * 4)] == ["act1"]
    assert fired([network(1e-8, 1.0, outputs=1)] * 4) == []
    assert fired([network(0.0, 0.0, 0.0)] * 4) == []


def on_paths(**sites: tuple[float, tuple[str, ...]]) -> list[str]:
    """The rules that fire at a network whose sites have these norms of dL/dz and come after these sites."""
    records = tuple(record(name, grad_z_rms=norm, after=after, last=name.startswith("end")) for name, (norm, after) in sites.items())
    return [f"{alert.site} {alert.rule}" for alert in fired([records] * 4)]


def test_the_gradient_is_compared_along_one_path() -> None:
    # A critic behind a detach has a large loss, the actor a small one. Both learn well, and neither is compared with the other.
    trunk = {"trunk": (1e-6, ()), "end_actor": (1e-6, ("trunk",))}
    assert on_paths(**trunk, critic=(1e3, ()), end_critic=(1e3, ("critic",))) == []
    assert on_paths(critic=(1e3, ()), end_critic=(1e3, ("critic",)), **trunk) == []
    # An auxiliary loss of weight 1e-4, beside a head that has a hidden site of its own, and beside one that is a single layer.
    assert on_paths(one=(1.0, ()), two=(1.0, ("one",)), main=(1.0, ("two",)), end_aux=(1e-4, ("two",))) == []
    assert on_paths(one=(1.0, ()), end_two=(1.0, ("one",)), end_aux=(1e-4, ("end_two",))) == []
    # In each part what is lost or grows on the way is found.
    assert on_paths(**trunk, critic=(1e-9, ()), end_critic=(1e-3, ("critic",))) == ["critic vanishing_gradient"]
    assert on_paths(one=(1e-8, ()), two=(1e-4, ("one",)), main=(1.0, ("two",)), end_aux=(1e-4, ("two",))) == ["one vanishing_gradient"]
    assert on_paths(one=(1e4, ()), two=(1e2, ("one",)), main=(1.0, ("two",)), end_aux=(1e-4, ("two",))) == ["one exploding_gradient"]
    # Features that are returned too are no ends where the gradient grows little by little.
    chain = {f"end_{k}": (10.0 ** (4 - k), (f"end_{k - 1}",) if k else ()) for k in range(5)}
    assert on_paths(**chain) == ["end_0 exploding_gradient"]


def test_a_gate_or_a_site_without_a_gradient_does_not_interrupt_a_path() -> None:
    between = record("gate", gate=True, after=("first",)), record("hidden", grad_z_rms=None, after=("gate",))
    first, last = record("first", grad_z_rms=1e-8), record("last", grad_z_rms=1.0, after=("hidden",))
    assert gradient_over_depth(Snapshot(0, 0.0, (first, *between, last))) == pytest.approx(1e-8)


def test_a_part_of_a_layer_is_not_frozen_beside_the_layer() -> None:
    whole = weights(1e-7, 1e-3, 2e-3, 1e-3)
    part = replace(whole.weights[0], name="layer0/0-7")
    events = feed(Judge(), [replace(whole, weights=(*whole.weights, part))] * 3)
    assert [alert.site for alerts in events for alert in alerts] == ["layer0"]


def weights(*ratios: float | None) -> Snapshot:
    made = tuple(
        Weight(f"layer{index}", (f"act{index}",), 8, False, 0.1, 64, 1.0, 1.0, 1.0, ratio, 1.0, 1.0, 100) for index, ratio in enumerate(ratios)
    )
    return Snapshot(0, 0.0, (record(),), made)


def test_a_layer_that_moves_a_thousand_times_less_than_the_others_is_frozen() -> None:
    (alert,) = fired([weights(1e-7, 1e-3, 2e-3, 1e-3)] * 3)
    assert (alert.site, alert.rule, alert.severity, alert.threshold) == ("layer0", "frozen_weights", "warning", 1e-3)
    assert "layer0, which feeds act0, is frozen" in alert.message
    # Neither a learning rate of zero, nor a part that is frozen on purpose, nor a network of two layers raises an alert.
    for benign in (weights(0.0, 0.0, 0.0), weights(None, 1e-3, 1e-3, 1e-3), weights(1e-9, 1e-3), weights(1e-5, 1e-3, 1e-3)):
        assert fired([benign] * 3) == []


def test_chosen_learning_rates_and_idle_layers_are_not_frozen() -> None:
    moving = weights(1e-3, 1e-3, 1e-3).weights
    slow = replace(weights(1e-9).weights[0], name="slow", learning_rate=1e-7)
    idle = replace(weights(0.0).weights[0], name="idle", grad_norm=None)
    not_run = replace(weights(0.0).weights[0], name="not_run", input_n=0)
    assert fired([Snapshot(0, 0.0, (record(),), (*moving, slow, idle, not_run))] * 4) == []


def test_the_gradient_is_compared_by_its_norm_so_that_pooling_takes_nothing_away() -> None:
    # Behind a mean over 1024 positions the gradient of each element is 1/1024 as large, but the norm over all only 1/32.
    first, last = record("first", grad_z_rms=1e-3 / 1024, elements=1024 * 64), record("last", grad_z_rms=1e-3, elements=64, after=("first",))
    assert gradient_over_depth(Snapshot(0, 0.0, (first, last))) == pytest.approx(1 / 32)
    assert fired([(first, last)] * 4) == []


def test_an_alert_of_a_site_that_no_longer_runs_is_over() -> None:
    judge = Judge()
    other = record("other")
    events = feed(judge, [(tails(0.3, 0.3), other)] * 3 + [(other,)] * 3)
    assert [alert.message for alert in events[5]] == ["act: no longer runs"]
    assert judge.firing == ()


def test_rows_of_one_rule_judge_one_kind() -> None:
    rows = [Rule("mine", lambda *_: 0.0, 1.0, None, lambda *_: "", over=over) for over in ("records", "weights")]
    with pytest.raises(ValueError, match="the rows of rule 'mine' are over records and over weights"):
        Judge(rows)


def test_one_nonfinite_element_is_critical_at_once() -> None:
    (alert,) = fired([record(nonfinite=1)])
    assert (alert.rule, alert.severity) == ("nonfinite", "critical")
    assert alert.message == "act (tanh): 1 of 1000 elements are inf or nan"
    assert "gradient elements" in fired([record(grad_nonfinite=3)])[0].message


def test_a_value_that_cannot_be_judged_changes_nothing() -> None:
    bad, unknown = tails(0.2, 0.2), record(low=None, high=None, saturated=None, relative_derivative=None)
    events = feed(Judge(), [bad, bad, unknown, bad])
    assert [len(alerts) for alerts in events] == [0, 0, 0, 1]


def test_a_rule_of_the_users_is_a_longer_tuple() -> None:
    hot = Rule("hot", lambda r, snapshot: r.z_max, 5.0, None, lambda r, value, limit: f"{r.site}: z reaches {value:g} (limit {limit:g})", patience=1)
    judge = Judge((*RULES, hot))
    events = feed(judge, [record(z_max=9.0), record(z_max=4.5), record(z_max=3.0)])
    assert events[0][0].message == "act: z reaches 9 (limit 5)"
    assert events[1] == ()  # within the hysteresis
    assert events[2][0].message == "act: no longer hot"


def test_a_rule_that_raises_is_left_out() -> None:
    faults: list[str] = []
    broken = Rule("broken", lambda r, snapshot: 1 / 0, 1.0, None, lambda *_: "")
    judge = Judge((broken, *RULES), lambda place, error: faults.append(f"{place}: {error}"))
    assert [len(alerts) for alerts in feed(judge, [tails(0.2, 0.2)] * 3)] == [0, 0, 1]
    assert faults == ["rule broken: division by zero"]


def test_shares_are_never_rounded_to_all_or_nothing() -> None:
    assert [percent(value) for value in (0, 0.0001, 0.05, 0.5, 0.949, 0.9999, 1)] == [
        *("0.0 %", "< 0.1 %", "5.0 %", "50 %", "94.9 %", "> 99.9 %", "100.0 %")
    ]


def test_a_recurrent_layer_has_stricter_limits_before_it_has_learned() -> None:
    def lstm(step: int, *shares: float) -> Snapshot:
        gates = zip(("input", "forget", "output"), shares, strict=True)
        cell = record("rnn.l0/cell", kind="recurrent", gate=True, saturated=0.9, relative_derivative=0.05)
        records = [record(f"rnn.l0/{name}", activation="sigmoid", kind="recurrent", gate=True, saturated=share) for name, share in gates]
        return Snapshot(step, 0.0, (*records, cell))

    untrained, learned = Judge(), Judge()
    events = [untrained.judge(lstm(step, 0.5, 0.4, 0.7)) for step in range(6)]
    assert [len(each) for each in events] == [0, 0, 1, 0, 0, 0]
    (alert,) = events[2]
    assert (alert.site, alert.severity, alert.value, alert.threshold) == ("rnn.l0/input", "warning", 0.4, 1 / 3)
    assert alert.message.startswith(
        "rnn.l0 is saturated before it has learned anything: at least 40 % of the inputs of each of its gates lie on a plateau"
    )
    assert [event.firing for step in range(6, 9) for event in untrained.judge(lstm(step, 0.0, 0.0, 0.0))] == [False]
    assert all(learned.judge(lstm(step, *([0.0, 0.0, 0.0] if step < 2 else [0.5, 0.5, 0.5]))) == () for step in range(9))
    events = [learned.judge(lstm(step, 0.9, 0.88, 0.95)) for step in range(9, 12)]
    assert [len(each) for each in events] == [0, 0, 1]
    assert events[2][0].message == "rnn.l0 is saturated: at least 88 % of the inputs of each of its gates lie on a plateau (limit 85 %)"
    # A layer with one open gate is not saturated.
    assert all(Judge().judge(lstm(step, 0.9, 0.1, 0.9)) == () for step in range(4))


def test_a_recurrent_layer_that_came_trained_is_not_judged() -> None:
    """Its gates have learned, and remember by saturating."""
    gates = tuple(
        record(f"rnn.l0/{name}", activation="sigmoid", kind="recurrent", gate=True, saturated=0.5) for name in ("input", "forget", "output")
    )

    def fires(*unevenness: float | None) -> bool:
        weights = [
            Weight(f"rnn.{at}", ("rnn.l0/input",), 8, False, 0.1, 64, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 100, each) for at, each in enumerate(unevenness)
        ]
        return bool(fired(Snapshot(step, 0.0, gates, tuple(weights)) for step in range(3)))

    assert fires()
    assert fires(None, None)
    assert fires(3.0, -1.0)
    assert not fires(9.0, 2.0)
    # A network of which one layer in four is uneven was not trained.
    assert fires(9.0, 2.0, 4.0, 1.0, None)
