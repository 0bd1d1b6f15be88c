"""The diagnosis: one alert for each fault, told once; standard library only.

The judge raises an alert at each place that is beyond a limit. Those that come from one fault are a group (groups.py), and one alert is told for it:
how bad the damage is (damage.py), where it began, why (causes/), and what to do.

- The origin is chosen once, when the alert is told, and by when and where the conditions began, not by whose patience ran out first: an alert that is
  still pending counts, if it began no later than the one that fires. What joins later changes the damage of the alert and never its origin. There is
  one exception: inf and nan end a training whatever was wrong before, so they are always told, and take over the alerts that were told before.
- An alert is told once when it is raised, once if it becomes critical, and once when no place suffers any more.
- An alert that fires again soon after it has cleared goes on with its origin and causes. Each time that an alert fires again, it takes twice as long
  to clear. So what comes and goes is told a number of times that grows with the logarithm of the number of observations.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torchsat.alerts import Firing, Key, key_of
from torchsat.causes import Moment, Scene, explain, remember
from torchsat.damage import Census, describe, headline, worst_of
from torchsat.groups import NEAR, RANK, Group, GroupState
from torchsat.paths import Paths
from torchsat.placement import Placement
from torchsat.record import Alert, Snapshot

_SOON = 20
"""An alert that fires again within this many observations of its end is the same alert."""
_HOLD = 3
"""An alert that fires for the second time fires on for so many observations after its last place has recovered, for the third time for three times as
many, and so on, by one less than each further power of two."""
_REMEMBERED = 64
"""How many of the newest observations are remembered by their steps. A condition that began earlier began long ago."""

_LONG_AGO = -NEAR - 1
"""The number of an observation of an earlier session."""


class Diagnosis:
    """Groups the alerts of single places by the fault that they come from, and tells one alert per fault, with its causes."""

    def __init__(self) -> None:
        self._first: Snapshot | None = None
        self._before: Snapshot | None = None
        self._moments: tuple[Moment, ...] = ()
        """What is kept of the observations so far, for `Scene.moments`."""
        self._groups: list[Group] = []
        """Those whose alert fires, and those whose alert has cleared within the last `_SOON` observations."""
        self._raised: dict[Key, int] = {}
        """For each alert of a single place, how often an alert was told and cleared of which it was a member."""
        self._count = 0
        """The number of observations so far."""
        self._steps: deque[int] = deque(maxlen=_REMEMBERED)
        """The steps of the newest observations."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the diagnosis remembers, in plain types."""
        first, before = (None if each is None else each.as_dict() for each in (self._first, self._before))
        return {
            "first": first,
            "before": before,
            "moments": [moment.as_dict() for moment in self._moments],
            "groups": [group.as_dict() for group in self._groups],
            "raised": [[*key, times] for key, times in self._raised.items()],
            "count": self._count,
            "steps": list(self._steps),
        }

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        first, before = (None if kept[each] is None else Snapshot.from_dict(kept[each]) for each in ("first", "before"))
        moments = tuple(Moment(**moment) for moment in kept.get("moments", ()))
        groups = [Group.from_dict(values) for values in kept["groups"]]
        raised = {(place, rule): times for place, rule, times in kept["raised"]}
        count, steps = kept["count"], deque(kept["steps"], maxlen=_REMEMBERED)
        self._first, self._before, self._moments = first, before, moments
        self._groups, self._raised, self._count, self._steps = groups, raised, count, steps

    def resume(self, told: Iterable[Alert], first: Snapshot | None, before: Snapshot | None) -> None:
        """Continue a run that ended with these alerts told. `first` and `before`: see `Scene`."""
        self._first, self._before = first, before
        self._groups = [
            Group(each, each, GroupState.FIRING, {key_of(each): each}, {key_of(each): _LONG_AGO}, {each.site, *each.also}) for each in told
        ]

    @property
    def firing(self) -> tuple[Alert, ...]:
        """The alerts that have been told and fire still, in the order of `alerts.urgency`."""
        return tuple(Firing(group.told for group in self._groups if group.state is GroupState.FIRING))

    def judge(self, events: Sequence[Alert], firing: Sequence[Alert], snapshot: Snapshot, pending: Sequence[Alert] = ()) -> tuple[Alert, ...]:
        """The events to be told: faults that are new, worse, or over.

        Args:
            events: what the judge raised, made worse or cleared at this observation.
            firing: what fires now at single places, by the judge.
            pending: the conditions that hold now, but not long enough for the judge.
        """
        self._first = self._first or snapshot
        self._moments = remember(self._moments, snapshot)
        finite = not any(record.nonfinite or record.grad_nonfinite for record in snapshot.records)
        if finite or self._before is None:
            self._before = snapshot
        self._count += 1
        self._steps.append(snapshot.step)
        self._groups = [group for group in self._groups if group.state is GroupState.FIRING or self._count - group.ended <= _SOON]
        raw = {key_of(alert): alert for alert in firing}
        over = {key_of(event): event for event in events if not event.firing}
        for group in self._groups:
            group.take_up({key: raw.pop(key) for key in group.members if key in raw and key in group.began}, over.get(key_of(group.told)))
        scene = Scene(snapshot, self._first, self._before, moments=self._moments)
        if raw:
            self._place(list(raw.values()), pending, scene)
        return (*self._taken_over(snapshot), *self._cleared(snapshot), *self._told(scene))

    def _place(self, alerts: Sequence[Alert], pending: Sequence[Alert], scene: Scene) -> None:
        """Put alerts that are in no group into one."""

        def leading(alert: Alert) -> str | None:
            return next((cause.name for cause in explain(alert, scene)), None)

        grouped = (place for group in self._groups for place in group.places)
        paths = Paths(scene.now, [*(alert.site for alert in (*alerts, *pending)), *grouped])
        Placement(self._groups, pending, scene.first.step, paths, self._began, leading).place(alerts)

    def _began(self, alert: Alert) -> int:
        """The number of the observation at which the condition of an alert began."""
        return self._count - (len(self._steps) - bisect.bisect_left(self._steps, alert.since))

    def _taken_over(self, snapshot: Snapshot) -> list[Alert]:
        """Clear what was told before something became inf or nan. Its places are those of the new alert from here on."""
        said = []
        for origin in [group for group in self._groups if group.state is GroupState.NEW and group.origin.rule == "nonfinite"]:
            for group in [each for each in self._groups if each.state is GroupState.FIRING and RANK.get(each.origin.rule, 0) > RANK["nonfinite"]]:
                for key, alert in group.members.items():
                    origin.join(alert, group.began.get(key, 0))
                self._groups.remove(group)
                where = f"with {origin.origin.site}" if origin.origin.site != group.origin.site else f"as {origin.origin.rule}"
                said.append(replace(group.told, step=snapshot.step, firing=False, message=f"{group.told.site}: told {where} from here on"))
        return said

    def _cleared(self, snapshot: Snapshot) -> list[Alert]:
        """Clear the alerts of which no place suffers any more."""
        said = []
        for group in self._groups:
            keys = {key_of(group.told), *group.began}
            if group.state is not GroupState.FIRING or group.members:
                continue
            times = max(self._raised.get(key, 0) for key in keys)
            if group.quiet <= _HOLD * (2**times - 1):
                continue
            self._raised.update(dict.fromkeys(keys, times + 1))
            last = group.over or replace(group.origin, message=f"{group.told.site}: no longer beyond the limit of {group.told.rule}")
            others = len(group.places - {group.told.site})
            rest = f"; {others} other place{'s' if others > 1 else ''} no longer suffer{'' if others > 1 else 's'} either" if others else ""
            group.told = replace(group.told, value=last.value, step=snapshot.step, firing=False, message=last.message + rest)
            group.state, group.ended = GroupState.ENDED, self._count
            said.append(group.told)
        return said

    def _told(self, scene: Scene) -> list[Alert]:
        """Tell the alerts that are new or have become critical; bring the others up to date."""
        said, census = [], Census(scene.now)
        for group in self._groups:
            if group.state is GroupState.ENDED or not group.members:
                continue
            new, was_critical = group.state is GroupState.NEW, group.state is GroupState.FIRING and group.told.severity == "critical"
            group.told = _composed(group, was_critical, scene.now.step, census)
            if new and not group.told.causes:
                group.told = replace(group.told, causes=explain(group.told, scene))
            group.state = GroupState.FIRING
            if new or (group.told.severity == "critical" and not was_critical):
                said.append(group.told)
        return said


def _composed(group: Group, was_critical: bool, step: int, census: Census) -> Alert:
    """The alert of a group as it is now, with the causes that it was told with."""
    critical = was_critical or any(alert.severity == "critical" for key, alert in group.members.items() if key in group.began)
    members = list(group.members.values())
    also = tuple(dict.fromkeys(alert.site for alert in members if alert.site != group.origin.site))
    message = describe(group.origin, members, group.over is not None, census)
    if group.earlier is not None:
        message += f". It was told before, from step {group.earlier[0]} to {group.earlier[1]}"
    return replace(
        group.origin,
        severity="critical" if critical else "warning",
        since=group.told.since if group.state is GroupState.FIRING else group.origin.since,
        step=step,
        message=message,
        causes=group.told.causes,
        also=also,
        worst=worst_of(headline(group.origin, members), census).site if also else None,
    )
