"""The diagnosis: of alerts at many places, one per origin is told; standard library only.

If one layer saturates, the layers behind it often do too, and the gradient vanishes. The judge raises an alert at each of these places. Only the
alert that explains the others is passed on, with its causes (causes/) and with the other places in `Alert.also`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchsat.alerts import Firing, Key
from torchsat.causes import Moment, Scene, explain, remember, upstream_of
from torchsat.record import Alert, Snapshot

_RANK: Mapping[str, int] = {
    "nonfinite": 0,
    "saturated": 1,
    "stuck_units": 1,
    "attention_collapse": 1,
    "exploding_gradient": 2,
    "vanishing_gradient": 2,
    "frozen_weights": 3,
}
"""What explains what: a rule of a lower rank explains those of a higher one, wherever they fire. A rule of the user's has no rank: it neither
explains another nor is explained by one."""
_SPREADING = (0, 1)
"""Within these ranks, an alert also explains those at sites that lie behind it in the order of data flow."""


class Diagnosis:
    """Groups the alerts of single places by their origin, and tells one alert per origin, with its causes."""

    def __init__(self) -> None:
        self._first: Snapshot | None = None
        self._before: Snapshot | None = None
        self._moments: tuple[Moment, ...] = ()
        """What is kept of the observations so far, for `Scene.moments`."""
        self._raw: dict[Key, Alert] = {}
        """The alerts of the judge that fire now."""
        self._told = Firing()
        """The alerts that have been told and fire still: one per origin."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the diagnosis remembers, in plain types."""
        first, before = (None if each is None else each.as_dict() for each in (self._first, self._before))
        moments = [moment.as_dict() for moment in self._moments]
        return {"first": first, "before": before, "moments": moments, "told": [events[-1].as_dict() for events in self._told.raised.values()]}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        first, before = (None if kept[each] is None else Snapshot.from_dict(kept[each]) for each in ("first", "before"))
        self.resume([Alert.from_dict(alert) for alert in kept["told"]], first, before)
        self._moments = tuple(Moment(**moment) for moment in kept.get("moments", ()))

    def resume(self, told: Iterable[Alert], first: Snapshot | None, before: Snapshot | None) -> None:
        """Continue a run that ended with these alerts told. `first` and `before`: see `Scene`."""
        self._first, self._before = first, before
        self._told = Firing(told)

    @property
    def firing(self) -> tuple[Alert, ...]:
        """The alerts that have been told and fire still, in the order of `alerts.urgency`."""
        return tuple(self._told)

    def judge(self, events: Sequence[Alert], firing: Sequence[Alert], snapshot: Snapshot) -> tuple[Alert, ...]:
        """The events to be told: origins that are new, worse, or over.

        Args:
            events: what the judge raised, made worse or cleared at this observation.
            firing: what fires now at single places, by the judge.
        """
        self._first = self._first or snapshot
        finite = not any(record.nonfinite or record.grad_nonfinite for record in snapshot.records)
        if finite or self._before is None:
            self._before = snapshot
        self._raw = {(alert.site, alert.rule): alert for alert in firing}
        self._moments = remember(self._moments, snapshot)
        scene = Scene(snapshot, self._first, self._before, moments=self._moments)
        groups = self._grouped(snapshot)
        return (*self._cleared(events), *self._no_longer_origins(groups, snapshot), *self._raised(groups, scene))

    def _cleared(self, events: Sequence[Alert]) -> list[Alert]:
        """Those of the judge's events that clear an alert which was told."""
        return [event for event in events if not event.firing and self._told.apply(event)]

    def _no_longer_origins(self, groups: Mapping[Key, Sequence[Key]], snapshot: Snapshot) -> list[Alert]:
        """Clear the alerts that were told as an origin and still fire, but have turned out to follow from another one."""
        said = []
        for key, events in list(self._told.raised.items()):
            if key in groups or key not in self._raw:
                continue
            origin = next(origin for origin, members in groups.items() if key in members)
            told = f"told with {origin[0]}" if origin[0] != key[0] else f"{key[1]} is told with {origin[1]}"
            over = replace(events[-1], step=snapshot.step, firing=False, message=f"{key[0]}: {told} from here on")
            self._told.apply(over)
            said.append(over)
        return said

    def _raised(self, groups: Mapping[Key, Sequence[Key]], scene: Scene) -> list[Alert]:
        """Tell the origins that are new or have become critical, with their causes; bring the others up to date."""
        said = []
        for key, members in groups.items():
            alert, old = self._raw[key], self._told.get(key)
            critical = any(self._raw[member].severity == "critical" for member in (key, *members))
            also = tuple(dict.fromkeys(place for place, _ in members if place != alert.site))
            alert = replace(alert, severity="critical" if critical else alert.severity, also=also, causes=old.causes if old else ())
            if old is None or (old.severity != "critical" and critical):
                alert = replace(alert, causes=explain(alert, scene, alert.causes))
                self._told.apply(alert)
                said.append(alert)
            else:
                self._told.update(alert)
        return said

    def _grouped(self, snapshot: Snapshot) -> dict[Key, list[Key]]:
        """Every origin among the alerts that fire now, with the alerts that follow from it. Both are in the order of data flow."""
        position = {record.site: at for at, record in enumerate(snapshot.records)}
        sites = {key: [site for site in sites_of(key[0], snapshot) if site in position] for key in self._raw}
        before = {site: upstream_of(site, snapshot.records) for key in self._raw for site in sites[key]}

        def order(key: Key) -> tuple[int, int, bool]:
            # Of two alerts of one place, the one that has been told stays the origin: it would be no news that the other one fires there too.
            return _RANK.get(key[1], 3), min((position[site] for site in sites[key]), default=len(position)), self._told.get(key) is None

        def follows(key: Key, origin: Key) -> bool:
            rank, lower = _RANK.get(key[1]), _RANK.get(origin[1])
            if rank is None or lower is None:
                return False
            behind = any(site == mine or site in before[mine] for site in sites[origin] for mine in sites[key])
            return lower < rank or (lower == rank and rank in _SPREADING and behind)

        groups: dict[Key, list[Key]] = {}
        for key in sorted(self._raw, key=order):
            origin = next((origin for origin in groups if follows(key, origin)), None)
            if origin is None:
                groups[key] = []
            else:
                groups[origin].append(key)
        return groups


def sites_of(place: str, snapshot: Snapshot) -> Sequence[str]:
    """The sites of an alert's place: the place itself if it is a site, the sites that it feeds if it is a layer."""
    weight = next((weight for weight in snapshot.weights if weight.name == place), None)
    return weight.feeds if weight is not None else (place,)
