"""One fault is one alert: what is told, how often, at which origin, and with which damage."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchsat
from tests.conftest import record
from tests.test_diagnosis import stack, weight
from torchsat import Alert, Record, Rule, Snapshot, causes, diagnosis
from torchsat.alerts import Firing, episodes, sentences
from torchsat.diagnosis import Diagnosis
from torchsat.groups import NEAR
from torchsat.judge import Judge
from torchsat.paths import Paths


class Teller:
    """The judge and the diagnosis of one run. `told` holds all events so far."""

    def __init__(self, rules: Sequence[Rule] = torchsat.RULES) -> None:
        self.judge, self.diagnosis = Judge(rules), Diagnosis()
        self.told: list[Alert] = []

    def see(self, snapshot: Snapshot) -> list[Alert]:
        """The events of one observation."""
        events = self.judge.judge(snapshot)
        found = list(self.diagnosis.judge(events, self.judge.firing, snapshot, self.judge.pending))
        self.told += found
        assert tuple(Firing(self.told)) == () or [each.site for each in Firing(self.told)] == [each.site for each in self.diagnosis.firing]
        return found

    def feed(self, snapshots: Iterable[Snapshot]) -> list[tuple[int, str, bool]]:
        """The step, the origin and whether it fires, of each event of these observations."""
        return [(each.step, each.site, each.firing) for snapshot in snapshots for each in self.see(snapshot)]

    def interrupted(self) -> "Teller":
        """One that goes on where this one stands, after its state went through a checkpoint."""
        other = Teller()
        other.judge.load_state_dict(json.loads(json.dumps(self.judge.state_dict())))
        other.diagnosis.load_state_dict(json.loads(json.dumps(self.diagnosis.state_dict())))
        other.told = list(self.told)
        return other


def closed(name: str, share: float, *after: str, **given: object) -> Record:
    """A tanh of whose inputs this share lies on a plateau, half of it on each side."""
    return record(name, saturated=share, low=share / 2, high=share / 2, relative_derivative=max(0.3, 1 - share), after=after, **given)


def chain(step: int, *shares: float) -> Snapshot:
    """A chain h0, h1, ... of tanh layers."""
    return Snapshot(step, 0.0, tuple(closed(f"h{at}", share, *([f"h{at - 1}"] if at else [])) for at, share in enumerate(shares)))


def towers(step: int, *shares: float, gains: Sequence[float] = ()) -> Snapshot:
    """Tanh layers t0, t1, ... side by side, each behind a layer of its own; all gains were 1 at first."""
    layers = tuple(weight(f"w{at}", f"t{at}", gain=gains[at] if gains else 1.0) for at in range(len(shares)))
    return Snapshot(step, 0.0, tuple(closed(f"t{at}", share) for at, share in enumerate(shares)), layers)


FINE = 0.03


def test_the_damage_is_said_first_then_where_it_began() -> None:
    teller = Teller()
    assert teller.feed(chain(step, FINE, FINE, 0.4, 0.45, 0.81, 0.6) for step in (40, 50, 60)) == [(60, "h2", True)]
    (alert,) = teller.told
    assert (alert.site, alert.value, alert.since, alert.step, alert.severity) == ("h2", 0.4, 40, 60, "critical")
    assert (alert.also, alert.worst) == (("h3", "h4", "h5"), "h4")
    assert alert.message == (
        "4 of 6 tanh layers are saturated since step 40, worst h4 (tanh): 81 % of its inputs lie on a plateau "
        "(limit 50 %, normal 2.9 %). It began at h2 (tanh)"
    )
    assert sentences(alert)[1:] == [f"Why: {alert.causes[0].name}: {alert.causes[0].evidence}", f"Try: {alert.causes[0].advice.rstrip(':')}"]


def test_the_worst_place_is_the_most_saturated_whichever_number_a_rule_compares() -> None:
    """A drifted layer without an element in a tail, one with most in the tails, and one in between."""
    drifted = replace(closed("h0", 0.0), relative_derivative=0.08)
    tails = closed("h1", 0.8, "h0")
    teller = Teller()
    teller.feed(Snapshot(step, 0.0, (drifted, tails, closed("h2", 0.5, "h1"))) for step in range(3))
    assert (teller.told[0].site, teller.told[0].worst) == ("h0", "h1")
    assert "worst h1 (tanh): 80 % of its inputs lie on a plateau" in teller.told[0].message
    other = replace(closed("h1", 0.0, "h0"), relative_derivative=0.05)
    teller = Teller()
    teller.feed(Snapshot(step, 0.0, (drifted, other)) for step in range(3))
    assert teller.told[0].worst == "h1"


def test_an_alert_of_one_place_says_what_the_rule_says_and_since_when() -> None:
    teller = Teller()
    teller.feed(chain(step, FINE, 0.4) for step in (0, 1, 2))
    (alert,) = teller.told
    assert (alert.also, alert.worst) == ((), None)
    assert alert.message == ("h1 (tanh) is saturated: 40 % of its inputs lie on a plateau (limit 33 %, normal 2.9 %), since step 0")


@pytest.mark.parametrize("late", [1, 2, 4, 30])
def test_what_joins_upstream_later_changes_the_damage_and_not_the_origin(late: int) -> None:
    """h4 is beyond its limit first, then h1, and at last all. It is told once, as it was critical from the start."""
    teller = Teller()
    for step in range(late + 40):
        teller.see(chain(step, FINE, 0.6 if step >= late else FINE, 0.9 if step >= late + 20 else FINE, FINE, 0.7, 0.6))
    # What is beyond its limit when the alert is told counts at once.
    also = ("h1", "h5") if late <= 2 else ("h5",)
    assert [(each.step, each.site, each.also, each.firing) for each in teller.told] == [(2, "h4", also, True)]
    (alert,) = teller.diagnosis.firing
    assert (alert.site, alert.since, alert.also, alert.worst, alert.causes) == ("h4", 0, ("h1", "h2", "h5"), "h2", teller.told[0].causes)
    assert alert.message.startswith(
        f"4 of 6 tanh layers are saturated, the first since step 0, the last since step {late + 20}, worst h2 (tanh): 90 %"
    )
    assert alert.message.endswith("It began at h4 (tanh)")


def test_an_alert_that_gets_worse_is_told_once_more() -> None:
    teller = Teller()
    shares = [0.4] * 5 + [0.6] * 5 + [0.4] * 5 + [0.7] * 5
    told = teller.feed(chain(step, FINE, share, share, 0.9 if step > 17 else FINE) for step, share in enumerate(shares))
    assert told == [(2, "h1", True), (7, "h1", True)]
    assert [each.severity for each in teller.told] == ["warning", "critical"]
    assert teller.told[1].causes == teller.told[0].causes
    # The two events are one episode.
    assert len(episodes(teller.told, {}, 20)) == 1


def test_what_gets_worse_while_the_patience_runs_is_told_as_critical_at_once() -> None:
    teller = Teller()
    # What suffers already counts, though its own patience is not over.
    teller.feed(chain(step, 0.4, 0.7 if step else FINE, 0.6 if step > 1 else FINE, FINE) for step in range(3))
    assert [(each.site, each.also, each.worst, each.severity) for each in teller.told] == [("h0", ("h1", "h2"), "h1", "warning")]
    assert teller.told[0].message.startswith("3 of 4 tanh layers are saturated, the first since step 0, the last since step 2, worst h1 (tanh): 70 %")
    teller = Teller()
    assert teller.feed(chain(step, share) for step, share in enumerate((0.35, 0.45, 0.55, 0.65, 0.75))) == [(2, "h0", True)]
    assert teller.told[0].severity == "critical"


def test_places_side_by_side_that_break_together_are_one_fault() -> None:
    """Twelve towers whose weights grow: they begin at three observations, and the first to lose its patience is the origin."""
    teller = Teller()
    for step in range(20):
        begun = [step >= 5 + at % 3 for at in range(12)]
        teller.see(towers(step, *(0.6 if each else FINE for each in begun), gains=[4.0 if each else 1.0 for each in begun]))
    assert [(each.step, each.site, len(each.also)) for each in teller.told] == [(7, "t0", 3)]
    (alert,) = teller.diagnosis.firing
    assert (alert.site, alert.causes[0].name, len(alert.also)) == ("t0", "weight_growth", 11)
    assert alert.message.startswith("12 of 12 tanh layers are saturated, the first since step 5, the last since step 7, worst t0 (tanh): 60 %")


def test_faults_of_another_time_or_cause_are_other_faults() -> None:
    # The same cause at another time.
    teller = Teller()
    for step in range(NEAR + 30):
        begun = (step >= 5, step >= 5 + NEAR + 1)
        teller.see(towers(step, *(0.6 if each else FINE for each in begun), gains=[4.0 if each else 1.0 for each in begun]))
    assert [(each.site, each.since) for each in teller.told] == [("t0", 5), ("t1", 5 + NEAR + 1)]
    # Another cause at the same time: t0 is drawn too large, t1 gets inputs that the model itself makes too large.
    teller = Teller()
    now = towers(0, 0.6, 0.6, gains=[4.0, 1.0])
    layers = (now.weights[0], replace(now.weights[1], input_rms=6.0))
    teller.feed(replace(now, step=step, weights=layers) for step in range(4))
    assert [(each.site, each.causes[0].name) for each in teller.told] == [("t0", "init_too_large"), ("t1", "inputs_unscaled")]
    assert [each.message.partition(" ")[0] for each in teller.told] == ["t0", "t1"]


def test_what_vanishes_or_is_frozen_is_told_with_the_fault_on_its_own_path() -> None:
    """Two towers of two layers each: a layer behind t1 is frozen, whose alert goes to the second fault and not to the first one."""
    records = (closed("a0", 0.6), closed("a1", FINE, "a0"), closed("b0", 0.6), closed("b1", FINE, "b0"))
    layers = [weight(f"w{name}", name, gain=gain, input_rms=rms) for name, gain, rms in (("a0", 4.0, 1.0), ("a1", 1.0, 1.0), ("b0", 1.0, 6.0))]
    frozen = weight("wb1", "b1", update_ratio=1e-8)
    teller = Teller()
    teller.feed(Snapshot(step, 0.0, records, (*layers, frozen)) for step in range(4))
    assert [(each.site, each.also) for each in teller.told] == [("a0", ()), ("b0", ("wb1",))]
    assert "Also wb1, which feeds b1, is frozen" in teller.told[1].message


def test_the_origin_is_where_it_began_and_not_whose_patience_ran_out_first() -> None:
    """Stuck units are judged without patience. Where the layer before them was saturated no later, it is the origin, though it does not fire yet."""

    def at(step: int, first: float) -> Snapshot:
        return Snapshot(step, 0.0, (closed("h0", first), closed("h1", FINE, "h0", units=64, stuck=0.95)))

    teller = Teller()
    assert teller.feed(at(step, 0.6) for step in range(6)) == [(0, "h0", True)]
    assert teller.told[0].rule == "saturated"
    assert teller.told[0].message.startswith("h0 (tanh) is saturated: 60 %")
    assert ", since step 0. Also h1 (tanh): 95.0 % of its 64 units are stuck on a plateau" in teller.told[0].message
    (alert,) = teller.diagnosis.firing
    assert alert.message.startswith("h0 (tanh) is saturated: 60 %")
    # A layer that is saturated later is not the origin.
    teller = Teller()
    assert teller.feed(at(step, 0.6 if step else FINE) for step in range(6)) == [(0, "h1", True)]


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 9, 16, 27])
def test_what_comes_and_goes_is_told_a_bounded_number_of_times(period: int) -> None:
    """Two layers that are saturated in turns, for 400 observations. Each raise of a fault takes at least twice the calm of the one before."""
    teller = Teller()
    for step in range(400):
        on = step // period % 2 == 0
        teller.see(chain(step, FINE, 0.6 if on else FINE, 0.6 if step // period % 4 == 0 else FINE))
    raised = [each for each in teller.told if each.firing]
    assert len(raised) <= 2 + math.log2(1 + 400 / 3)
    assert len(raised) <= 5
    assert {each.site for each in teller.told} <= {"h1"}
    assert {each.causes for each in raised} <= {raised[0].causes} if raised else True
    if len(raised) > 1 and period < 20:
        assert raised[1].message.endswith(f"It was told before, from step 0 to {teller.told[1].step}")
        assert raised[1].since > teller.told[1].step - 3


def test_a_fault_that_comes_back_much_later_is_a_new_one() -> None:
    teller = Teller()
    shares = [0.6] * 5 + [FINE] * 40 + [0.6] * 5 + [FINE] * 10
    told = teller.feed(chain(step, FINE, share, 0.7 if step < 5 else FINE) for step, share in enumerate(shares))
    # It clears after 3 observations on the safe side, and the second time after 3 more.
    assert told == [(2, "h1", True), (7, "h1", False), (47, "h1", True), (55, "h1", False)]
    assert [each.message for each in teller.told if not each.firing] == [
        "h1: no longer saturated; 1 other place no longer suffers either",
        "h1: no longer saturated",
    ]
    assert "told before" not in teller.told[2].message


def test_inf_and_nan_are_always_told_and_take_over_what_was_told_before() -> None:
    teller = Teller()
    teller.feed(chain(step, FINE, 0.6, 0.7) for step in range(5))
    broken = chain(5, FINE, 0.6, 0.7)
    broken = replace(broken, records=tuple(replace(each, nonfinite=10, saturated=None, relative_derivative=None) for each in broken.records))
    told = teller.see(broken)
    assert [(each.site, each.rule, each.firing, each.message.partition(",")[0]) for each in told] == [
        ("h1", "saturated", False, "h1: told with h0 from here on"),
        ("h0", "nonfinite", True, "3 of 3 tanh layers are non-finite since step 5"),
    ]
    assert told[1].message.endswith("Also 2 of 3 tanh layers are saturated. It began at h0 (tanh)")
    assert teller.feed(replace(broken, step=step) for step in range(6, 20)) == []
    assert [each.rule for each in teller.diagnosis.firing] == ["nonfinite"]


def test_a_checkpoint_at_any_observation_changes_nothing() -> None:
    def snapshots() -> list[Snapshot]:
        made = []
        for step in range(60):
            on = step // 8 % 2 == 0
            made.append(chain(step, FINE, 0.4 if on else FINE, 0.6 if on and step > 3 else FINE, 0.5 if step > 20 else FINE))
        return made

    whole = Teller()
    whole.feed(snapshots())
    assert len(whole.told) > 3
    for stop in range(1, 60, 7):
        teller = Teller()
        teller.feed(snapshots()[:stop])
        teller = teller.interrupted()
        teller.feed(snapshots()[stop:])
        assert teller.told == whole.told
        assert teller.diagnosis.firing == whole.diagnosis.firing


def test_a_run_that_goes_on_from_its_files_tells_nothing_again() -> None:
    before = Teller()
    before.feed(chain(step, FINE, 0.6, 0.7, 0.8) for step in range(5))
    after = Teller()
    after.told = list(before.told)
    after.judge.resume(before.told, 5)
    after.diagnosis.resume(before.told, chain(0, FINE), chain(4, FINE))
    assert after.feed(chain(step, FINE, FINE, 0.7, 0.8) for step in range(5, 15)) == []
    (alert,) = after.diagnosis.firing
    assert (alert.site, alert.also, alert.since) == ("h1", ("h2", "h3"), 0)
    assert after.feed(chain(step, FINE, FINE, FINE, FINE) for step in range(15, 20)) == [(17, "h1", False)]


def test_rules_of_the_users_are_grouped_by_themselves() -> None:
    hot = Rule("hot", lambda r, snapshot: r.z_max, 5.0, None, lambda r, value, limit: f"{r.site}: z reaches {value:g} (limit {limit:g})", patience=1)
    teller = Teller((*torchsat.RULES, hot))
    teller.feed(Snapshot(step, 0.0, tuple(replace(each, z_max=9.0) for each in chain(step, FINE, 0.4, 0.4).records)) for step in range(4))
    assert [(each.rule, each.site, each.also) for each in teller.told] == [("hot", "h0", ("h1", "h2")), ("saturated", "h1", ("h2",))]
    assert teller.told[0].message == (
        "3 of 3 tanh layers are beyond the limit of hot since step 0, worst h0 (tanh): z reaches 9 (limit 5). It began at h0 (tanh)"
    )


def test_an_alert_of_an_older_file_has_no_worst_place() -> None:
    teller = Teller()
    teller.feed(chain(step, 0.4, 0.4) for step in range(3))
    values = teller.told[0].as_dict()
    assert Alert.from_dict(json.loads(json.dumps(values))) == teller.told[0]
    del values["worst"]
    assert Alert.from_dict(values).worst is None


def test_many_alerts_at_many_sites_cost_one_turn_over_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2000 sites 20 fire. Paths are looked for where an alert is new, and causes where one is told."""
    explained, walked = [], []

    def explain(*given: Any) -> Any:
        explained.append(given)
        return genuine(*given)

    class Counted(Paths):
        def __init__(self, *given: Any) -> None:
            walked.append(given)
            super().__init__(*given)

    genuine = causes.explain
    monkeypatch.setattr(diagnosis, "explain", explain)
    monkeypatch.setattr(diagnosis, "Paths", Counted)
    first = chain(0, *(0.6 if at % 100 == 50 else FINE for at in range(2000)))
    teller = Diagnosis()
    judge = Judge([rule for rule in torchsat.RULES if rule.name == "saturated"])
    for step in range(5):
        snapshot = replace(first, step=step)
        teller.judge(judge.judge(snapshot), judge.firing, snapshot, judge.pending)
    (alert,) = teller.firing
    assert (alert.site, len(alert.also)) == ("h50", 19)
    assert alert.message.startswith("20 of 2000 tanh layers are saturated since step 0")
    assert (len(explained), len(walked)) == (1, 1)


def test_paths_are_those_of_a_walk_also_where_a_signal_flows_back() -> None:
    sites = {"a": (), "b": ("a", "d"), "c": ("b",), "d": ("c",), "e": ("a",)}
    paths = Paths(Snapshot(0, 0.0, tuple(record(name, after=after) for name, after in sites.items())), sites)
    upstream = {"a": set(), "b": {"a", "b", "c", "d"}, "c": {"a", "b", "c", "d"}, "d": {"a", "b", "c", "d"}, "e": {"a"}}
    found = {name: {other for other in sites if paths.before(name) & paths.own(other)} for name in sites}
    assert found == upstream
    assert [paths.position(name) for name in (*sites, "elsewhere")] == [0, 1, 2, 3, 4, 5]


def told_in(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int, at: int = -1, rate: float = 1.0
) -> list[Alert]:
    """What is told of a training whose learning rate is multiplied at a step."""
    told: list[Alert] = []
    monitor = torchsat.watch(model, every=5, errors="raise", on_alert=told.append)
    for step in range(steps):
        if step == at:
            optimizer.param_groups[0]["lr"] *= rate
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    monitor.close()
    return told


def classified(model: nn.Module) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        x = torch.randn(64, 64)
        return F.cross_entropy(model(x), x[:, :10].argmax(1))

    return loss


def test_a_deep_network_that_is_drawn_too_large_is_told_once() -> None:
    model = stack(nn.Tanh, depth=12, gain=3.0)
    told = told_in(model, classified(model), torch.optim.SGD(model.parameters(), lr=0.02), 6)
    assert len(told) == 1
    assert (told[0].site, told[0].causes[0].name) == (next(iter(sorted([told[0].site, *told[0].also], key=depth_of))), "init_too_large")
    assert "of 12 tanh layers are saturated" in told[0].message


def depth_of(site: str) -> int:
    return int(site.partition(".")[0].removeprefix("block")) if site.startswith("block") else 99


class Towers(nn.Module):
    """Towers of two layers each, whose outputs are concatenated."""

    def __init__(self, *towers: nn.Module) -> None:
        super().__init__()
        self.towers, self.head = nn.ModuleList(towers), nn.Linear(64 * len(towers), 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([tower(x) for tower in self.towers], 1))
        return out


def tower(activation: Callable[[], nn.Module], gain: float = 1.0, bias: float = 0.0) -> nn.Sequential:
    layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=1 / 8)
    with torch.no_grad():
        layers[0].weight *= gain
        layers[0].bias.fill_(bias)
    return nn.Sequential(layers[0], activation(), layers[1], activation())


def test_two_towers_with_a_fault_each_are_two_alerts() -> None:
    model = Towers(tower(nn.Tanh, gain=8.0), tower(nn.ReLU, bias=-10.0))
    told = told_in(model, classified(model), torch.optim.SGD(model.parameters(), lr=0.02), 8)
    assert [(each.site, each.causes[0].name) for each in told] == [("towers.0.1", "init_too_large"), ("towers.1.1", "dead_units")]


def test_towers_that_a_rate_breaks_together_are_one_alert() -> None:
    model = Towers(*(tower(nn.Tanh) for _ in range(3)))
    told = told_in(model, classified(model), torch.optim.SGD(model.parameters(), lr=0.05), 36, at=12, rate=400.0)
    assert [(each.causes[0].name, each.firing) for each in told] == [("weight_growth", True)]
    assert len(told[0].also) == 5


class Attention(nn.Module):
    """A block of a transformer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.other(x))))
        return out


def test_a_transformer_whose_rate_jumps_is_told_once() -> None:
    """All blocks collapse within some observations, their softmaxes and their activations."""
    model = nn.Sequential(nn.Embedding(16, 16), *(Attention() for _ in range(4)), nn.LayerNorm(16), nn.Linear(16, 16))

    def loss() -> Tensor:
        x = torch.randint(16, (8, 13))
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    told = told_in(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 36, at=10, rate=300.0)
    assert len([each for each in told if each.firing]) == 1


def test_a_convolutional_network_with_dead_layers_is_told_once() -> None:
    layers: list[nn.Module] = []
    for at in range(4):
        layers += [nn.Conv2d(16 if at else 1, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    nn.init.constant_(model.get_parameter("2.bias"), -20.0)
    told = told_in(
        model, lambda: F.cross_entropy(model(torch.randn(8, 1, 12, 12)), torch.randint(10, (8,))), torch.optim.SGD(model.parameters(), 0.01), 40
    )
    assert [(each.site, each.firing) for each in told] == [("3", True)]
    assert told[0].message.startswith("3 (relu): 100.0 % of its 16 units are dead")
