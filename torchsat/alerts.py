"""Alerts over time: which fire now, in which order they are shown, from when to when each fired, and its sentences; standard library only.

An alert is told as events. `Snapshot.alerts` holds those of one observation: an event whose `firing` is true raises an alert or says that it got
worse, one whose `firing` is false clears it. Whoever wants to know what fires now (the judge, the diagnosis, the event file, the report, the
Saturation tab) feeds the events to `Firing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torchsat.percent import percent
from torchsat.record import Alert, Snapshot

Key = tuple[str, str]
"""The place and the rule of an alert. No two alerts that fire at the same time have the same key."""

ADJECTIVE = {
    "saturated": "saturated",
    "stuck_units": "full of stuck units",
    "dormant_units": "full of dormant units",
    "vanishing_gradient": "short of gradient",
    "exploding_gradient": "flooded with gradient",
    "frozen_weights": "frozen",
    "shrunk_weights": "shrunk",
    "faded_input": "short of input",
    "underflow": "underflowing",
    "attention_collapse": "collapsed",
    "expert_collapse": "using few experts",
    "logit_growth": "growing in their logits",
    "bounded_logits": "bounding its logits",
    "nonfinite": "non-finite",
}
"""What a place is where a rule fires, and no longer is when the alert clears. A rule of the user's is named by its name."""


def key_of(alert: Alert) -> Key:
    return alert.site, alert.rule


def urgency(alert: Alert) -> tuple[bool, int]:
    """The sort key of the order in which alerts are shown: critical ones first; of the same severity, those that began earlier first."""
    return alert.severity != "critical", alert.since


class Firing:
    """The alerts that fire now. Iterating over it gives each in its latest state, in the order of `urgency`."""

    def __init__(self, events: Iterable[Alert] = ()) -> None:
        self.raised: dict[Key, list[Alert]] = {}
        """For each alert that fires the events that raised it and made it worse, oldest first. The last one is its latest state."""
        for event in events:
            self.apply(event)

    def apply(self, event: Alert) -> list[Alert]:
        """Take in one event. Returns the events that had raised the alert which this one clears; nothing if it clears none."""
        if not event.firing:
            return self.raised.pop(key_of(event), [])
        self.raised.setdefault(key_of(event), []).append(event)
        return []

    def update(self, alert: Alert) -> None:
        """Replace the latest state of an alert that fires, for example by one with a newer value."""
        self.raised[key_of(alert)][-1] = alert

    def get(self, key: Key) -> Alert | None:
        """The latest state of one alert; None if it does not fire."""
        events = self.raised.get(key)
        return events[-1] if events else None

    def __iter__(self) -> Iterator[Alert]:
        return iter(sorted((events[-1] for events in self.raised.values()), key=urgency))

    def __len__(self) -> int:
        return len(self.raised)


@dataclass(frozen=True)
class Episode:
    """One alert from the event that raised it to the one that cleared it."""

    alert: Alert
    """Its last critical state; if it never was critical, its last state before it cleared."""
    fired: int
    """The step at which it was raised. The condition itself began at `alert.since`, earlier by the patience of the rule."""
    cleared: int | None
    """The step at which it cleared; None if it fires until the end of the run."""
    gone: bool = False
    """It did not clear, but its site or layer is no longer there, for example because the run was resumed with another model. `cleared` is then the
    last step at which the place was seen."""


def episodes(events: Iterable[Alert], seen: Mapping[str, int], end: int) -> list[Episode]:
    """The alerts of a run: first those that still fire, then those that ended, both in the order of `urgency`.

    Args:
        events: in the order in which they happened.
        seen: the last step at which each site and layer was measured.
        end: the last step of the run.
    """
    firing, found = Firing(), []
    for event in events:
        raised = firing.apply(event)
        if raised:
            found.append(_episode(raised, event.step))
    for raised in firing.raised.values():
        last = seen.get(raised[-1].site, end)
        found.append(_episode(raised, last if last < end else None, gone=last < end))
    return sorted(found, key=lambda each: (each.cleared is not None, *urgency(each.alert)))


def _episode(raised: Sequence[Alert], cleared: int | None, gone: bool = False) -> Episode:
    worst = next((alert for alert in reversed(raised) if alert.severity == "critical"), raised[-1])
    return Episode(worst, raised[0].step, cleared, gone)


def episodes_of(snapshots: Sequence[Snapshot]) -> list[Episode]:
    """The alerts of a run that `torchsat.read` has read."""
    seen = {record.site: each.step for each in snapshots for record in each.records}
    seen |= {weight.name: each.step for each in snapshots for weight in each.weights}
    return episodes((alert for each in snapshots for alert in each.alerts), seen, snapshots[-1].step)


def sentences(alert: Alert) -> list[str]:
    """An alert in a few words: what is wrong; where it has causes, also why (`Why: ...`), and what to try (`Try: ...`, without code)."""
    if not alert.firing or not alert.causes:
        return [alert.message]
    several = len(alert.causes) > 1
    why = ", ".join(f"{cause.name} {percent(cause.share)}" if several else cause.name for cause in alert.causes)
    return [alert.message, f"Why: {why}: {alert.causes[0].evidence}", f"Try: {alert.causes[0].advice.rstrip(':')}"]
