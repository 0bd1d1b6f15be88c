"""The alert level and the verdict: figures by hand."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import torchsat
from tests.conftest import record
from tests.test_tensorboard import ALERT
from torchsat import Cause, Rule, Snapshot, Weight
from torchsat.alert_level import alert_level, way_to_warning
from torchsat.alerts import Episode
from torchsat.definitions import CAUSE_TITLES, RULE_DEFINITIONS
from torchsat.judge import Judge
from torchsat.metrics import METRICS
from torchsat.record import Nearest, with_levels
from torchsat.rules import RULES
from torchsat.tensorboard import JUDGEMENT
from torchsat.tensorboard.writer import TensorBoardWriter
from torchsat.verdict import Health, summary, verdict_of, worst_first
from torchsat.view import from_snapshots

ABOVE = Rule("r", lambda record, snapshot: record.saturated, 0.4, 0.8, lambda *given: "")
BELOW = replace(ABOVE, warning=1e-3, critical=1e-6, below=True)


@pytest.mark.parametrize(
    ("rule", "value", "level"),
    [
        (ABOVE, 0.0, 0.0),
        (ABOVE, 0.32, 0.0),  # 0.8 of the limit: here an alert would clear
        (ABOVE, 0.36, 0.25),  # halfway from there to the limit
        (ABOVE, 0.4, 0.5),
        (ABOVE, 0.4 * math.sqrt(2), 0.75),  # halfway to the critical limit, in the logarithm
        (ABOVE, 0.8, 1.0),
        (ABOVE, math.inf, 1.0),
        (BELOW, 1.0, 0.0),
        (BELOW, 1.25e-3, 0.0),
        (BELOW, 1e-3 / 0.9, 0.25),
        (BELOW, 1e-4, 0.5 + 0.5 / 3),
        (BELOW, 1e-7, 1.0),
        (BELOW, 0.0, 1.0),
        (replace(ABOVE, critical=None), 5.0, 0.5),
        (replace(ABOVE, warning=None), 0.72, 0.25),
        (replace(ABOVE, warning=None, critical=None), 0.72, 0.0),
        (replace(ABOVE, warning=0.0, critical=None), -1.0, 0.0),
    ],
)
def test_the_level_is_where_a_value_stands_between_the_limits(rule: Rule, value: float, level: float) -> None:
    assert alert_level(rule, value, record("a")) == pytest.approx(level, abs=1e-12)


def test_the_level_of_a_place_is_that_of_its_worst_rule() -> None:
    judge = Judge((ABOVE, replace(ABOVE, name="other", value=lambda record, snapshot: record.stuck, warning=0.5)))
    snapshot = Snapshot(0, 0.0, (record("a", saturated=0.36, stuck=0.5), record("b", saturated=0.1, stuck=0.0)))
    judge.judge(snapshot)
    assert judge.levels == pytest.approx({"a": 0.5, "b": 0.0})
    judged = with_levels(snapshot.records, judge.levels)
    assert [each.alert_level for each in judged] == pytest.approx([0.5, 0.0])
    assert [replace(each, alert_level=None) for each in judged] == list(snapshot.records)
    assert [each.alert_level for each in with_levels(snapshot.records, {})] == [None, None]


def test_what_is_not_finite_looks_like_no_number_and_like_no_gap() -> None:
    broken = record("a", nonfinite=3, saturated=None, alert_level=1.0)
    series = from_snapshots("run", [Snapshot(0, 0.0, (record("a", saturated=0.1, alert_level=0.0),)), Snapshot(1, 1.0, (broken,))])
    assert series.values["saturated"][:, 0].tolist() == pytest.approx([0.1, math.inf])
    assert series.values["alert_level"][:, 0].tolist() == [0.0, math.inf]
    assert series.values["nonfinite"][:, 0].tolist() == [0.0, 3.0]
    assert math.isnan(series.values["entropy_min"][0, 0])


def test_every_rule_has_a_definition_and_a_metric_that_shows_it() -> None:
    assert {each.rule for each in RULE_DEFINITIONS} == {rule.name for rule in RULES}
    sources = [path.read_text() for path in (Path(torchsat.__file__).parent / "causes").glob("*.py")]
    assert set(CAUSE_TITLES) == {name for source in sources for name in re.findall(r'Term\(\s*"(\w+)"', source)}
    assert {each.metric for each in RULE_DEFINITIONS} <= {metric.name for metric in METRICS}


def test_the_verdict_names_the_alert_that_counts_most() -> None:
    causes = (Cause("init_too_large", 1.0, "gain 8", "draw the weights anew:\n    nn.init.xavier_normal_(w)"),)
    sick = Episode(replace(ALERT, site="a", since=10, also=("b", "c"), causes=causes), 20, None)
    warned = Episode(replace(ALERT, site="d", severity="warning"), 20, None)
    over = Episode(replace(ALERT, site="e"), 0, 30)
    verdict = verdict_of([over, warned, sick], {"a": "tanh"})
    assert verdict.health is Health.CRITICAL
    assert str(verdict) == "critical: a (tanh) and 2 more places: saturated (init_too_large), since step 10; 1 more alert"
    assert verdict.advice == "draw the weights anew"
    assert verdict_of([warned]).health is Health.WARNING
    lost = verdict_of([sick, Episode(replace(ALERT, rule="nonfinite", site="z"), 50, None)])
    assert (lost.health, lost.where) == (Health.NOT_FINITE, "z")
    assert str(verdict_of([over])) == "healthy: its alert has cleared"
    assert str(verdict_of([])) == "healthy: no alert was raised"
    assert str(verdict_of([over], judged=False)) == "not judged: no rules were given"
    assert verdict_of([sick], judged=False).health is Health.CRITICAL  # of a session before, which had rules
    near = verdict_of([over], {"fc": "Linear 4 -> 2"}, nearest=Nearest("fc", "shrunk_weights", 0.31))
    assert str(near) == "healthy: its alert has cleared; nearest to a limit: fc (Linear 4 -> 2), 31 % of the way to a warning (shrunk weights)"
    at = verdict_of([], nearest=Nearest("a", "saturated", 1.0))
    assert at.health is Health.IN_DOUBT
    assert at.margin == "a is beyond the limit of a warning, but not for long enough to be told (saturated)"
    assert str(at) == f"in doubt: no alert was raised; {at.margin}"
    assert not at.health.is_sick


def test_runs_that_are_neither_sick_nor_healthy_are_counted() -> None:
    healthy, unjudged = verdict_of([]), verdict_of([], judged=False)
    doubtful = verdict_of([], nearest=Nearest("a", "saturated", 1.0))
    assert summary({"a": healthy, "b": healthy}) == "Both runs are healthy."
    assert summary({"a": doubtful}) == "The run is in doubt."
    assert summary({"a": healthy, "b": doubtful, "c": unjudged}) == (
        "1 of 3 runs is healthy, and 1 is in doubt, and 1 is not judged, since no rules were given."
    )
    assert worst_first({"a": healthy, "b": unjudged, "c": doubtful}) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("rule", "value", "way"),
    [
        (ABOVE, 0.0, 0.0),
        (ABOVE, 0.1, 0.25),
        (ABOVE, 0.4, 1.0),
        (ABOVE, 0.7, 1.0),
        (BELOW, 1.0, 0.0),
        (BELOW, 10.0, 0.0),
        (BELOW, 1e-2, 2 / 3),  # two of three powers of ten
        (BELOW, 1e-5, 1.0),
        (replace(ABOVE, warning=1e3), 10.0, 1 / 3),
        (replace(ABOVE, warning=1e3), 0.5, 0.0),
        (replace(ABOVE, warning=1e3), 0.0, 0.0),
        (replace(BELOW, warning=4.0), 8.0, 0.5),
        (replace(BELOW, warning=4.0), math.inf, 0.0),
        (replace(ABOVE, warning=None), 0.7, None),
    ],
)
def test_the_way_to_a_warning(rule: Rule, value: float, way: float | None) -> None:
    found = way_to_warning(rule, value, record("a"))
    assert found is None if way is None else found == pytest.approx(way)


def test_the_judge_says_what_comes_nearest_to_a_warning() -> None:
    other = replace(ABOVE, name="other", value=lambda record, snapshot: record.stuck, warning=0.5)
    judge = Judge((ABOVE, other))
    judge.judge(Snapshot(0, 0.0, (record("a", saturated=0.1, stuck=0.0), record("b", saturated=0.0, stuck=0.2), record("c", stuck=0.2))))
    assert judge.nearest == Nearest("b", "other", 0.2 / 0.5)
    judge.judge(Snapshot(1, 0.0, (record("a", saturated=0.0, stuck=None),)))
    assert judge.nearest is None


def test_a_run_knows_whether_it_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def run(name: str, **options: Any) -> Snapshot:
        with torchsat.watch(model, tmp_path / name, errors="raise", **options) as monitor:
            model(3 * torch.randn(64, 4)).sum().backward()
            monitor.step()
        (read,) = torchsat.read(tmp_path / name)
        assert read == monitor.latest == Snapshot.from_dict(read.as_dict())
        return read

    assert (run("with").judged, run("without", rules=()).judged) == (True, False)
    assert run("with2").nearest is not None
    values = TensorBoardWriter._values
    monkeypatch.setattr(TensorBoardWriter, "_values", lambda self, snapshot: [each for each in values(self, snapshot) if each.tag != JUDGEMENT])
    with torchsat.watch(model, tmp_path / "old", rules=(), errors="raise") as monitor:
        model(torch.randn(8, 4)).sum().backward()
        monitor.step()
    (old,) = torchsat.read(tmp_path / "old")
    assert (old.judged, old.nearest) == (True, None)


def test_several_runs_are_summed_up_the_worst_first() -> None:
    fires = Episode(replace(ALERT, site="a", since=5), 20, None)
    runs = {
        "well": verdict_of([]),
        "warned": verdict_of([Episode(replace(ALERT, severity="warning"), 0, None)]),
        "sick": verdict_of([fires]),
        "wider": verdict_of([Episode(replace(fires.alert, also=("b",)), 20, None)]),
    }
    assert worst_first(runs) == ["wider", "sick", "warned", "well"]
    assert summary(runs).startswith("3 of 4 runs are sick. Worst: wider: critical: a and 1 more place: saturated")
    assert summary({"well": runs["well"]}) == "The run is healthy."
    assert summary({"one": runs["well"], "two": runs["well"]}) == "Both runs are healthy."


def test_a_layer_says_what_it_is() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 6, 1), nn.Tanh(), nn.Flatten(), nn.Linear(int(np.prod((6, 4))), 5), nn.Tanh(), weight_norm(nn.Linear(5, 2)), nn.Tanh()
    )
    model.append(nn.ModuleDict({"head": nn.Linear(2, 1)})["head"])
    with torchsat.watch(model, every=1, budget=None) as monitor:
        model(torch.randn(8, 3, 4)).sum().backward()
        monitor.step()
        monitor.flush()
        assert monitor.latest is not None
        names = {weight.name: weight.titled for weight in monitor.latest.weights}
    assert names["0"] == "layer 0 (Conv1d 3 -> 6)"
    assert names["3"] == "layer 3 (Linear 24 -> 5)"
    assert all("Parametrized" not in name for name in names.values())
    assert Weight("fc1", (), 8, False, None, 1, 1.0, 1.0, None, None, None, None, 0, layer="Linear 8 -> 2").titled == "fc1"
