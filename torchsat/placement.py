"""Finds the fault that a new alert of a single place belongs to, or begins; standard library only. What decides is described in groups.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torchsat.alerts import Key, key_of
from torchsat.groups import NEAR, RANK, Extent, Group, GroupState, comparable, order
from torchsat.paths import Paths
from torchsat.record import Alert

_NEAREST_CAUSE = "softmax_logits"
"""The cause of each attention that collapses. It says nothing of what has made the logits large. In training that is taken to be the same that spoils
other places at the same time."""


class Placement:
    """Puts the new alerts of one observation into groups.

    Args:
        groups: those that there are. Those that begin are appended.
        pending: the conditions that hold, but not long enough for an alert.
        start: the step of the first observation.
        paths: between the places of the new alerts, of those that are pending, and of the groups.
        began: the number of the observation at which the condition of an alert began.
        leading: the name of the leading cause of an alert; None if nothing explains it. It is asked only where it decides.
    """

    def __init__(
        self,
        groups: list[Group],
        pending: Sequence[Alert],
        start: int,
        paths: Paths,
        began: Callable[[Alert], int],
        leading: Callable[[Alert], str | None],
    ) -> None:
        self._groups = groups
        self._pending = pending
        self._start = start
        self._paths = paths
        self._began = began
        self._leading = leading
        self._causes: dict[Key, str | None] = {key_of(group.told): group.told.causes[0].name for group in groups if group.told.causes}
        self._extents: dict[Key, Extent] = {}
        """By the key of the alert that is told, of which no two that fire are alike."""
        for group in groups:
            if group.state is not GroupState.ENDED:
                self._extents[key_of(group.told)] = self._extent(key_of(group.told), *group.members)

    def place(self, alerts: Sequence[Alert]) -> None:
        """Put each of these alerts into its group."""
        for alert in sorted(alerts, key=lambda each: order(each, self._paths)):
            began = self._began(alert)
            group = self._home(alert, began) or self._again(alert) or self._begin(alert)
            group.join(alert, began)
            self._extents[key_of(group.told)].add(key_of(alert), self._paths)
        self._add_pending()
        for group in self._groups:
            group.members = dict(sorted(group.members.items(), key=lambda item: self._paths.position(item[0][0])))

    def _add_pending(self) -> None:
        """Add to the groups that are new what suffers already, but not long enough for an alert: it is damage that is told once, now."""
        new = [group for group in self._groups if group.state is GroupState.NEW]
        for alert in sorted(self._pending, key=lambda each: order(each, self._paths)) if new else ():
            began = self._began(alert)
            group = next((group for group in new if self._belongs(alert, began, group, ask=False)), None)
            if group is not None:
                group.members[key_of(alert)] = alert

    def _extent(self, *keys: Key) -> Extent:
        extent = Extent()
        for key in keys:
            extent.add(key, self._paths)
        return extent

    def _home(self, alert: Alert, began: int) -> Group | None:
        """Of the groups whose alert fires and that this alert belongs to, one on the same path, and of these the one that began at nearly the same
        time."""
        found = [group for group in self._groups if group.state is not GroupState.ENDED and self._belongs(alert, began, group)]
        key = key_of(alert)

        def nearness(group: Group) -> tuple[bool, bool, int]:
            return key not in group.began, not self._extents[key_of(group.told)].related(key, self._paths), group.distance(began)

        return min(found, key=nearness, default=None)

    def _belongs(self, alert: Alert, began: int, group: Group, *, ask: bool = True) -> bool:
        """Whether an alert comes from the fault of a group. `ask`: whether causes may decide, which takes long to find."""
        key, told = key_of(alert), key_of(group.told)
        # What is not finite ends a training whatever was wrong before, so it has an alert of its own.
        if not comparable(alert.rule, told[1]) or (alert.rule == "nonfinite" and RANK[told[1]] > RANK[alert.rule]):
            return False
        extent = self._extents[told]
        if alert.site in group.places or extent.explains(key, self._paths):
            return True
        on_one_path, at_one_time = extent.related(key, self._paths), group.distance(began) <= NEAR
        if on_one_path == at_one_time or not ask:
            return on_one_path and at_one_time
        mine, other = self._cause(alert), self._cause(group.origin)
        if mine is None or other is None:
            return mine is other and alert.rule == told[1]
        return mine == other or (_NEAREST_CAUSE in (mine, other) and min(alert.since, group.origin.since) > self._start)

    def _cause(self, alert: Alert) -> str | None:
        key = key_of(alert)
        if key not in self._causes:
            self._causes[key] = self._leading(alert)
        return self._causes[key]

    def _again(self, alert: Alert) -> Group | None:
        """The group whose alert has cleared and that this alert continues."""
        for group in self._groups:
            if group.state is GroupState.ENDED and comparable(alert.rule, group.told.rule) and alert.site in group.places:
                group.earlier = group.earlier[0] if group.earlier else group.origin.since, group.told.step
                group.state, group.origin = GroupState.NEW, replace(group.origin, since=alert.since)
                self._extents[key_of(group.told)] = self._extent(key_of(group.told))
                return group
        return None

    def _begin(self, alert: Alert) -> Group:
        """A new group. It begins at this alert, or at one that is pending, explains it, and began no later."""
        taken = {place for group in self._groups for place in group.places}
        before = [
            each
            for each in self._pending
            if each.since <= alert.since and each.site not in taken | {alert.site} and self._extent(key_of(each)).explains(key_of(alert), self._paths)
        ]
        origin = min([*before, alert], key=lambda each: order(each, self._paths))
        group = Group(origin, origin, places={origin.site})
        self._groups.append(group)
        self._extents[key_of(origin)] = self._extent(key_of(origin))
        return group
