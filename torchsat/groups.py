"""Which alerts of single places come from one fault; standard library only.

A fault spreads: a layer that saturates takes those behind it along, its gradient vanishes on the way back, and a rate that jumps spoils all layers at
once. The judge (judge.py) raises an alert at each of these places, in whatever order their patience runs out. Two alerts are taken to come from one
fault in either of two cases:

- One explains the other (`Extent.explains`): the signal flows from one place to the other, and a saturated layer explains those behind it and a
  gradient that vanishes, for instance.
- Two of three agree: they lie on one path, they began at the same time (`NEAR`), and their leading cause is the same. Twelve towers that saturate
  together when the learning rate jumps agree in time and cause. Two towers with a fault of their own each agree in time at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torchsat.alerts import Key, key_of
from torchsat.paths import Paths
from torchsat.record import Alert

RANK: Mapping[str, int] = {
    "nonfinite": 0,
    "saturated": 1,
    "stuck_units": 1,
    "attention_collapse": 1,
    "logit_growth": 1,
    "bounded_logits": 1,
    "shrunk_weights": 1,
    "faded_input": 1,
    "dormant_units": 2,
    "exploding_gradient": 2,
    "vanishing_gradient": 2,
    "underflow": 2,
    "frozen_weights": 3,
}
"""What explains what: a rule of a lower rank explains those of a higher one. A rule of the user's has no rank: it neither explains another nor is
explained by one, and its alerts are grouped with each other only."""
_SPREADING = 1
"""Within this rank and below, an alert also explains those at sites that lie behind it in the order of data flow."""
_EVERYWHERE = 3
"""Rules of this rank compare a layer with all others, so that what explains them may lie anywhere. One of rank 0 explains them anywhere too: a single
nan reaches all weights with the next step."""
NEAR = 5
"""Conditions that began within this many observations of each other began at the same time."""


def order(alert: Alert, paths: Paths) -> tuple[int, int]:
    """The sort key of alerts that begin together: the first one is the origin."""
    return RANK.get(alert.rule, _EVERYWHERE), paths.position(alert.site)


def comparable(rule: str, other: str) -> bool:
    """Whether alerts of two rules can come from one fault."""
    return rule == other or (rule in RANK and other in RANK)


@dataclass
class Extent:
    """Where the alerts of a fault lie, for each rank (of a user's rule: -1) the bits of its sites and of the sites before them."""

    own: dict[int, int] = field(default_factory=dict)
    before: dict[int, int] = field(default_factory=dict)

    def add(self, key: Key, paths: Paths) -> None:
        """Add the sites of one alert."""
        rank = RANK.get(key[1], -1)
        self.own[rank] = self.own.get(rank, 0) | paths.own(key[0])
        self.before[rank] = self.before.get(rank, 0) | paths.before(key[0])

    def explains(self, key: Key, paths: Paths) -> bool:
        """Whether one of these alerts explains another alert."""
        rank = RANK.get(key[1], -1)
        if rank < 0:
            return False
        if 0 in self.own or (rank == _EVERYWHERE and any(0 <= other < rank for other in self.own)):
            return True
        own, before = paths.own(key[0]), paths.before(key[0])
        lower = [other for other in self.own if 0 <= other < rank]
        connected = any((own | before) & self.own[other] or own & self.before[other] for other in lower)
        return connected or (rank <= _SPREADING and bool((own | before) & self.own.get(rank, 0)))

    def related(self, key: Key, paths: Paths) -> bool:
        """Whether another alert is at one of these places, or on one path with one of them."""
        own, before = paths.own(key[0]), paths.before(key[0])
        return any((own | before) & bits for bits in self.own.values()) or any(own & bits for bits in self.before.values())


class GroupState(Enum):
    """NEW until the alert is told, FIRING until it clears, ENDED for a while after that. An alert that fires again in this while is NEW again."""

    NEW = "new"
    FIRING = "firing"
    ENDED = "ended"


@dataclass
class Group:
    """The alerts of single places that come from one fault, and the one alert that is told for them."""

    origin: Alert
    """The alert of the place where the fault began, in its latest state. Its site and its rule never change."""
    told: Alert
    """The alert that is told, in its latest state. Its site and its rule are those of the origin."""
    state: GroupState = GroupState.NEW
    members: dict[Key, Alert] = field(default_factory=dict)
    """The alerts of the judge that fire now, in the order of data flow. At the observation at which the group begins, also the conditions that belong
    to it and hold, but not long enough for an alert of their own. Those are not in `began`."""
    began: dict[Key, int] = field(default_factory=dict)
    """For each alert that has ever fired as a member, the number of the observation at which its condition began."""
    places: set[str] = field(default_factory=set)
    """All places that have ever suffered."""
    over: Alert | None = None
    """The event by which the judge cleared the alert of the origin, if it did."""
    quiet: int = 0
    """How many observations in a row had no member."""
    ended: int = 0
    """The number of the observation at which the alert that was told was cleared."""
    earlier: tuple[int, int] | None = None
    """The steps from which and to which the alert fired before, if it cleared and fires again."""

    def join(self, alert: Alert, began: int) -> None:
        """Add an alert that fires. `began`: the number of the observation at which its condition began."""
        key = key_of(alert)
        self.members[key] = alert
        self.began.setdefault(key, began)
        self.places.add(alert.site)
        if key == key_of(self.origin):
            self.origin, self.over = alert, None

    def take_up(self, members: dict[Key, Alert], over: Alert | None) -> None:
        """Bring the group up to date.

        Args:
            members: those of its members that still fire.
            over: the event by which the judge has cleared the alert of the origin, if it did so now.
        """
        self.members = members
        self.origin = members.get(key_of(self.origin), self.origin)
        self.over = over or self.over
        self.quiet = 0 if members else self.quiet + 1

    def distance(self, began: int) -> int:
        """How many observations lie between one that is given and the nearest one at which a member began."""
        return min((abs(began - each) for each in self.began.values()), default=NEAR + 1)

    def as_dict(self) -> dict[str, Any]:
        """The group in plain types."""
        return {
            "origin": self.origin.as_dict(),
            "told": self.told.as_dict(),
            "state": self.state.value,
            "members": [alert.as_dict() for alert in self.members.values()],
            "began": [[*key, number] for key, number in self.began.items()],
            "places": sorted(self.places),
            "over": None if self.over is None else self.over.as_dict(),
            "quiet": self.quiet,
            "ended": self.ended,
            "earlier": None if self.earlier is None else list(self.earlier),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Group:
        """The inverse of `as_dict`, also after JSON."""
        members = [Alert.from_dict(alert) for alert in values["members"]]
        return Group(
            origin=Alert.from_dict(values["origin"]),
            told=Alert.from_dict(values["told"]),
            state=GroupState(values["state"]),
            members={key_of(alert): alert for alert in members},
            began={(place, rule): number for place, rule, number in values["began"]},
            places=set(values["places"]),
            over=None if values["over"] is None else Alert.from_dict(values["over"]),
            quiet=values["quiet"],
            ended=values["ended"],
            earlier=None if values["earlier"] is None else (values["earlier"][0], values["earlier"][1]),
        )
