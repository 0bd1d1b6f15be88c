"""Saturation that harms, told from saturation that is meant: what the rules judge of outputs, gates, hidden layers, attention and weights."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchsat
from tests.conftest import record
from torchsat import Record, Rule, Snapshot, Weight, harm
from torchsat.flow import nothing_arrives, shallow, ways
from torchsat.judge import Judge
from torchsat.record import Head
from torchsat.rules import RULES
from torchsat.start import Start


def hidden(saturated: float, blocked: float | None, trapped: float | None, **given: Any) -> Record:
    """A tanh layer, half of whose saturated elements lie on either plateau."""
    facts = {
        "normal_low": 0.0147,
        "normal_high": 0.0147,
        "units": 64,
        "low": saturated / 2,
        "high": saturated / 2,
        "relative_derivative": 1 - saturated,
    }
    return record(**{**facts, "saturated": saturated, "blocked": blocked, "trapped": trapped, **given})


def rules_of(series: Sequence[Record | tuple[Record, ...]], weights: tuple[Weight, ...] = (), every: int = 10) -> list[tuple[str, int]]:
    """The rule and the step of each alert that a judge raises."""
    judge, raised = Judge(), []
    for at, item in enumerate(series):
        snapshot = Snapshot(at * every, 0.0, item if isinstance(item, tuple) else (item,), weights)
        raised += [(alert.rule, alert.step) for alert in judge.judge(snapshot) if alert.firing]
    return raised


def test_a_layer_at_convergence_is_content_and_one_that_broke_is_trapped() -> None:
    """Both have half of their elements on a plateau, from the fourth observation on."""
    fine = hidden(0.02, 0.02, 0.01)
    assert rules_of([fine] * 4 + [hidden(0.5, 0.28, 0.06)] * 6) == []
    assert rules_of([fine] * 4 + [hidden(0.5, 0.9, 0.1)] * 6) == []
    assert rules_of([fine] * 4 + [hidden(0.5, 0.7, 0.2)] * 6) == [("saturated", 60)]
    assert rules_of([fine] * 4 + [hidden(0.5, 0.5, 0.35)] * 6) == [("saturated", 60)]
    # Where no gradient is seen, the share is all that is known.
    assert rules_of([fine] * 4 + [hidden(0.5, None, None)] * 6) == [("saturated", 60)]


def test_at_the_start_the_share_tells_unless_the_layer_has_learned_before() -> None:
    assert rules_of([hidden(0.6, 0.6, 0.3)] * 3) == [("saturated", 20)]
    assert rules_of([hidden(0.6, 0.3, 0.05)] * 6) == []


@pytest.mark.parametrize(("units", "blocked", "trapped"), [(4, 0.97, 0.5147), (8, 0.883, 0.4268), (64, 0.6544, 0.2897), (512, 0.5736, 0.2412)])
def test_the_limits_of_a_layer_follow_from_how_many_units_it_has(units: int, blocked: float, trapped: float) -> None:
    """blocked: normal + 0.5 + 1 / sqrt(units); trapped: half of normal + 0.2 + 0.6 / sqrt(units), with 2.94 % as the normal share of a tanh."""
    layer = hidden(0.5, 0.5, 0.2, units=units)
    assert harm.blocked_limit(layer) == pytest.approx(blocked, abs=5e-4)
    assert harm.trapped_limit(layer) == pytest.approx(trapped, abs=5e-4)
    assert harm.blocked_limit_critical(layer) == pytest.approx((1 + harm.blocked_limit(layer)) / 2)
    assert harm.trapped_limit_critical(layer) == 2 * harm.trapped_limit(layer)


def test_what_trained_weights_saturated_when_the_run_began_is_no_news() -> None:
    now, snapshot = hidden(0.7, 0.75, 0.4), Snapshot(0, 0.0, ())
    for before, trained, expected in ((0.7, True, 0.0), (0.5, True, 0.75), (0.7, False, 0.75)):
        assert harm.blocked(now, snapshot, Start(hidden(before, 0.7, 0.3), 0, trained)) == expected
    # Nearly all counts, as when the inputs have another scale than those that the network was trained on.
    assert harm.blocked(hidden(0.97, 0.98, 0.5), snapshot, Start(hidden(0.97, 0.98, 0.5), 0, True)) == 0.98


def output(**given: Any) -> Record:
    return hidden(given.pop("saturated", 0.9), given.pop("blocked", 0.95), given.pop("trapped", 0.0), output=True, **given)


def test_an_output_is_judged_by_the_share_of_elements_that_are_asked_to_leave() -> None:
    sure = output(leaving=0.02, trapped=0.9, grad_a_rms=1e-3)
    assert rules_of([sure] * 20) == []
    assert rules_of([output(leaving=0.4)] * 4) == [("saturated", 20)]


def test_an_output_that_is_asked_for_more_than_its_range_holds_is_told_after_100_steps() -> None:
    begun = output(saturated=0.0, low=0.0, high=0.0, blocked=0.0, leaving=0.0, grad_a_rms=1.0)
    at_end = output(saturated=1.0, low=0.0, high=1.0, blocked=1.0, leaving=0.0, grad_a_rms=0.99)
    assert rules_of([begun, *[at_end] * 12]) == [("saturated", 120)]
    # The gradient of a sure classifier falls, and one that uses both plateaus gives what it is asked for.
    assert rules_of([begun, *[replace(at_end, grad_a_rms=0.5)] * 20]) == []
    assert rules_of([begun, *[replace(at_end, low=0.5, high=0.5)] * 20]) == []
    rectifier = replace(
        at_end, activation="relu", tails="low", normal_low=0.5, normal_high=None, normal_derivative=0.5, low=0.7, high=None, blocked=0.7
    )
    assert rules_of([replace(begun, tails="low"), *[rectifier] * 12]) == [("saturated", 120)]


def test_gates_with_a_gradient_are_told_when_they_are_trapped() -> None:
    gate = hidden(1.0, 1.0, 0.54, gate=True, activation="sigmoid", normal_low=0.0, normal_high=0.0)
    assert rules_of([gate] * 4) == [("saturated", 20)]
    assert rules_of([replace(gate, trapped=0.05)] * 4) == []


def test_a_forget_gate_that_is_shut_from_the_start_is_told() -> None:
    def gates(forget: float, entered: float) -> tuple[Record, ...]:
        shares = {"input": entered, "forget": forget, "output": 0.0}
        return tuple(
            hidden(x, None, None, site=f"rnn.l0/{name}", activation="sigmoid", kind="recurrent", gate=True, low=x, high=0.0)
            for name, x in shares.items()
        )

    assert rules_of([gates(1.0, 0.0)] * 4) == [("saturated", 20)]
    assert rules_of([gates(0.0, 1.0)] * 4) == []


def test_attention_that_looks_at_the_wrong_key_alone_is_told_in_its_worst_head() -> None:
    def attention(*heads: tuple[float, float]) -> Record:
        each = tuple(Head(100, 0.01, 0.01, 9.0, 40.0, blocked, leaving / 2, leaving) for blocked, leaving in heads)
        facts: dict[str, Any] = {"kind": "softmax", "tails": "unknown", "activation": "softmax", "logit_std": 9.0, "log_keys": 3.0, "units": None}
        return hidden(0.0, 0.9, 0.1, heads=each, entropy=0.01, **facts)

    assert rules_of([attention((1.0, 0.05), (1.0, 0.1))] * 6) == []
    assert rules_of([attention((1.0, 0.05), (0.9, 0.3))] * 6) == [("attention_collapse", 20)]
    assert rules_of([attention((0.2, 0.3))] * 6) == []


def weight(gain: float, learned: float, updated: float = 0.01) -> Weight:
    return Weight("fc", ("act",), 64, False, 0.1, 64, gain, gain, 1.0, updated, 1.0, 1.0, 64, None, learned)


def test_weights_that_decay_shrinks_are_told() -> None:
    start, snapshot = Start(weight(1.0, 0.01), 0, False), Snapshot(0, 0.0, ())
    assert [harm.shrunk(weight(gain, learned), snapshot, start) for gain, learned in ((0.4, 0.05), (0.4, 0.001), (0.4, 0.0099), (0.05, 0.0099))] == [
        *(0.4, 0.4, 1.0, 0.05)
    ]


@pytest.mark.parametrize(("rate", "decay", "momentum"), [(0.2, 0.2, 0.0), (0.03, 0.1, 0.9), (0.1, 5e-4, 0.9)])
def test_what_a_decay_takes_off_is_learning_rate_times_decay(rate: float, decay: float, momentum: float) -> None:
    """The split of the step by the norms of its two terms is inverted, so that momentum and the angle between them do not matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.LayerNorm(32, 1e-12), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum, weight_decay=decay)
    with torchsat.watch(model, every=1, errors="raise") as monitor:
        model(torch.randn(64, 16)).square().sum().backward()
        optimizer.step()
    assert monitor.latest is not None
    (first,) = (each for each in monitor.latest.weights if each.name == "0")
    assert harm.taken_by_decay(first) == pytest.approx(rate * decay, rel=0.02)


def test_a_strong_decay_is_told_though_each_step_is_what_the_gradient_makes_of_it() -> None:
    """With a gradient norm of 1 and a weight norm g, the decay is sqrt((step / learned)^2 - 1) / g, times the rate 0.1."""
    start, snapshot = Start(weight(1.0, 0.01), 0, False), Snapshot(0, 0.0, ())
    strong, usual = weight(0.5, 0.01, 0.01 * math.sqrt(1 + 0.02**2)), weight(0.5, 0.01, 0.01 * math.sqrt(1 + 0.002**2))
    assert harm.taken_by_decay(strong) == pytest.approx(0.1 * 0.02 / 0.5, rel=1e-3)
    assert harm.shrunk_by_decay(strong, snapshot, start) == 0.5
    assert harm.shrunk_by_decay(usual, snapshot, start) == 1.0


def test_an_input_that_has_faded_is_told() -> None:
    """The weights of the norm decay by 9 % a step (a rate of 3e-3 times a decay of 30), so that the input has a tenth of its size at step 25."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    matrices, others = ([each for each in model.parameters() if (each.dim() > 1) is which] for which in (True, False))
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": 30.0}, {"params": matrices, "weight_decay": 0.0}], 3e-3)
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    with torchsat.watch(model, every=5, errors="raise") as monitor:
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    (alert,) = monitor.alerts
    assert (alert.rule, alert.site, [cause.name for cause in alert.causes]) == ("faded_input", "2", ["weight_decay"])
    assert 20 <= alert.since <= 35


def stack(first: float, last: float, z_std: float, update: float) -> Snapshot:
    sites = [
        hidden(0.0, 0.0, 0.0, site=f"act{at}", after=(f"act{at - 1}",) if at else (), grad_z_rms=norm, z_std=z_std)
        for at, norm in enumerate((first, 1e-2, last))
    ]
    layers = [replace(weight(1.0, step, step), name=f"fc{at}", feeds=(f"act{at}",)) for at, step in ((0, update), (2, 1e-2))]
    return Snapshot(200, 0.0, tuple(sites), tuple(layers))


def test_a_short_stack_that_loses_the_gradient_is_told_where_its_first_layer_stays_as_it_was() -> None:
    lost = stack(1e-3, 1e-1, 0.5, 1e-4)
    way = ways(lost)["act0"]
    assert (way.end, way.layers) == ("act2", 2)
    assert (way.ratio, way.per_layer) == pytest.approx((0.01, 0.1))
    start = Start(lost.records[0], 0, False)
    assert shallow(lost.records[0], lost, start) == pytest.approx(0.01)
    for other in (stack(1e-3, 1e-1, 0.8, 1e-4), stack(3e-2, 1e-1, 0.5, 1e-4)):
        assert shallow(other.records[0], other, start) == 1.0
    # An optimizer that makes up for what is lost, as Adam does, changes the first layer as much as the last.
    adam = stack(1e-3, 1e-1, 0.5, 1e-2)
    assert shallow(adam.records[0], adam, start) == 1.0
    assert shallow(lost.records[0], replace(lost, step=50), start) == 1.0


def test_a_first_site_that_is_multiplied_by_zero_is_no_vanishing() -> None:
    gate, behind, end = stack(0.0, 1.0, 0.5, 1e-4).records
    assert list(ways(Snapshot(0, 0.0, (replace(gate, grad_a_rms=0.0), behind, end)))) == ["act1"]
    # In front of closed sites nothing arrives either, but there the sites behind have no gradient.
    closed = Snapshot(0, 0.0, (replace(gate, grad_a_rms=0.0), replace(behind, grad_z_rms=0.0), end))
    assert ways(closed)["act0"].ratio == 0.0


class OverOne(nn.Module):
    """A softmax over an axis of one element gives 1 whatever the model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).softmax(1)  # type: ignore[no-any-return]


def test_a_loss_that_does_not_depend_on_the_model_is_told() -> None:
    model, heard = OverOne(), list[torchsat.Alert]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torchsat.watch(model, sinks=(), budget=None, on_alert=heard.append):
        for _ in range(4):
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) - 0.5).square().mean().backward()
            optimizer.step()
    (alert,) = heard
    assert (alert.rule, alert.site, alert.step, alert.severity) == ("vanishing_gradient", "body.1", 2, "critical")
    assert alert.causes[0].name == "activation_choice"
    assert alert.causes[0].evidence.startswith("dL/da is 0 at each of ")
    some = hidden(0.0, None, None, grad_a_rms=0.0)
    assert nothing_arrives(some, Snapshot(0, 0.0, (some, replace(some, site="b", grad_a_rms=1e-9)))) == 0.0
    assert nothing_arrives(replace(some, grad_n=0), Snapshot(0, 0.0, (replace(some, grad_n=0),))) is None


def test_a_rule_may_compare_with_the_first_observation() -> None:
    grown = Rule("grown", lambda r, snapshot, start: r.z_std / start.item.z_std, 3.0, None, lambda *_: "it has grown", patience=1, compares=True)
    judge = Judge((grown, *RULES))
    assert [bool(judge.judge(Snapshot(at, 0.0, (hidden(0.0, 0.0, 0.0, z_std=size),)))) for at, size in enumerate((1.0, 2.0, 3.5))] == [
        False,
        False,
        True,
    ]
    kept = Judge((grown,))
    kept.load_state_dict(judge.state_dict())
    assert kept.state_dict()["starts"] == judge.state_dict()["starts"]
    assert not kept.judge(Snapshot(3, 0.0, (hidden(0.0, 0.0, 0.0, z_std=3.5),)))


def rectifier(dormant: float | None, blocked: float | None, **given: Any) -> Record:
    """A ReLU layer of 64 units, of which some are dormant."""
    facts = {"activation": "relu", "tails": "low", "normal_low": 0.5, "normal_high": 0.0, "units": 64, "saturated": 0.5, "low": 0.5, "high": 0.0}
    return record(**{**facts, "dormant": dormant, "blocked": blocked, "trapped": 0.2, **given})


@pytest.mark.parametrize(("units", "limit"), [(64, 0.448), (256, 0.399), (4096, 0.362)])
def test_the_limit_of_dormant_units_is_35_percent_and_the_error_of_a_share_of_so_many(units: int, limit: float) -> None:
    assert harm.dormant_limit(rectifier(0.0, 0.5, units=units)) == pytest.approx(limit, abs=5e-4)


def test_units_that_fall_asleep_and_take_the_gradient_along_are_told() -> None:
    awake = [rectifier(0.02, 0.5)] * 10
    assert rules_of(awake + [rectifier(0.5, 0.95)] * 6) == [("dormant_units", 140)]
    # They have slept from the start, the others carry the demand, or too few have fallen asleep.
    assert rules_of([rectifier(0.5, 0.95)] * 16) == []
    assert rules_of(awake + [rectifier(0.66, 0.85)] * 6) == []
    assert rules_of(awake + [rectifier(0.4, 0.95)] * 6) == []
    assert "dormant_units" not in dict(rules_of(awake + [rectifier(0.5, 0.95, output=True)] * 6))
    assert rules_of(awake + [rectifier(0.5, 0.95, gate=True)] * 6) == []
    # It clears once units are awake again.
    assert rules_of(awake + [rectifier(0.5, 0.95)] * 6 + [rectifier(0.1, 0.95)] * 6 + [rectifier(0.5, 0.95)] * 6) == [
        ("dormant_units", 140),
        ("dormant_units", 260),
    ]


def test_where_no_gradient_is_seen_the_share_of_dormant_units_tells() -> None:
    assert rules_of([rectifier(None, None)] * 10 + [rectifier(0.5, None)] * 6) == [("dormant_units", 140)]
