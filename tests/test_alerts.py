"""What fires now, in which order, and from when to when: the same answer for everybody who asks."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from tests.conftest import record
from tests.test_tensorboard import ALERT
from torchsat import Alert, Record, Snapshot
from torchsat.alerts import Firing, episodes, episodes_of, urgency
from torchsat.diagnosis import Diagnosis
from torchsat.judge import Judge
from torchsat.tensorboard.writer import TensorBoardWriter

Severity = Literal["warning", "critical"]


def test_the_worst_alert_stands_first_then_the_earliest() -> None:
    given: list[tuple[Severity, int]] = [("warning", 1), ("critical", 9), ("warning", 0), ("critical", 2)]
    alerts = [replace(ALERT, site=f"{at}", severity=severity, since=since) for at, (severity, since) in enumerate(given)]
    assert [alert.since for alert in sorted(alerts, key=urgency)] == [2, 9, 0, 1]
    assert [alert.since for alert in Firing(alerts)] == [2, 9, 0, 1]


def test_events_raise_worsen_and_clear_what_fires() -> None:
    mild, worse = replace(ALERT, severity="warning", step=4), replace(ALERT, step=6)
    over = replace(ALERT, step=9, firing=False)
    firing = Firing()
    assert (firing.apply(mild), firing.apply(worse)) == ([], [])
    assert firing.apply(replace(over, rule="stuck_units")) == []  # another rule at the same place, which did not fire
    assert (len(firing), list(firing)) == (1, [worse])
    newer = replace(worse, step=7, value=0.8)
    firing.update(newer)
    assert firing.get(("b.act", "saturated")) == newer
    assert firing.apply(over) == [mild, newer]
    assert (len(firing), list(firing), firing.get(("b.act", "saturated"))) == (0, [], None)


def test_an_alert_that_comes_again_is_two_episodes() -> None:
    def at(step: int, firing: bool = True, severity: Severity = "warning") -> Alert:
        return replace(ALERT, step=step, firing=firing, severity=severity)

    given = [at(4), at(6, severity="critical"), at(9, False), at(20), replace(ALERT, site="other", since=0, step=1)]
    found = [(each.alert.site, each.alert.severity, each.fired, each.cleared, each.gone) for each in episodes(given, {"b.act": 30, "other": 12}, 30)]
    assert found == [
        ("b.act", "warning", 20, None, False),
        ("other", "critical", 1, 12, True),  # it is not there any more
        ("b.act", "critical", 4, 9, False),
    ]


def test_judge_diagnosis_event_file_and_report_agree_on_what_fires() -> None:
    """Two sites that saturate, clear, and saturate again at different times, the one independent of the other. What has fired before is told for
    longer than the judge fires."""

    def site(name: str, saturated: float) -> Record:
        return record(name, saturated=saturated, low=saturated, high=0.0)

    judge, diagnosis, writer = Judge(), Diagnosis(), TensorBoardWriter()
    snapshots: list[Snapshot] = []
    counts = set()
    for step in range(80):
        records = (site("a", 0.9 if step % 30 < 8 else 0.0), site("b", 0.4 if 14 < step % 30 < 22 else 0.6 if step > 70 else 0.0))
        snapshot = Snapshot(step, float(step), records)
        snapshot = replace(snapshot, alerts=diagnosis.judge(judge.judge(snapshot), judge.firing, snapshot, judge.pending))
        snapshots.append(snapshot)
        writer._write(snapshot)
        told = list(Firing(event for each in snapshots for event in each.alerts))

        def places(alerts: Iterable[Alert]) -> list[tuple[str, str]]:
            return [(alert.site, alert.severity) for alert in alerts]

        still: list[Alert] = [each.alert for each in episodes_of(snapshots) if each.cleared is None]
        assert places(diagnosis.firing) == places(told) == places(writer._firing) == places(still)
        assert set(places(judge.firing)) <= set(places(told))
        counts.add(len(told))
    assert counts == {0, 1, 2}
