"""The judge: when a rule raises an alert at one place, and when it clears it; standard library only.

Alerts must be rare to be read. A rule therefore has patience: it raises an alert only after several observations in a row beyond its limit, and
clears it only after as many observations on the safe side of the limit by a margin (the hysteresis). One value that swings about its limit raises
nothing and clears nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchsat.alert_level import alert_level, way_to_warning
from torchsat.alerts import ADJECTIVE, Firing, Key
from torchsat.experts import Experts
from torchsat.percent import percent
from torchsat.record import Alert, Nearest, Record, Severity, Snapshot, Weight, place_of, with_levels
from torchsat.rules import RULES, Item, Rule
from torchsat.start import Start, came_trained

STANDS_OUT = 0.1
"""An alert names the rank that is worst only if the saturated share on that rank alone exceeds the share over all ranks by this much."""
_LEVELS: tuple[Severity, ...] = ("critical", "warning")


@dataclass
class _State:
    """What the judge remembers of one rule at one place."""

    streak: dict[Severity, int]
    """For each level, how many observations in a row were beyond its limit."""
    since: int | None = None
    """The step at which the current streak began; None if there is none."""
    is_early: bool = False
    """Whether the alert that fires was raised when the first observations were judged; then their rules are judged until it clears."""
    calm: int = 0
    """While an alert fires: how many observations in a row were on the safe side, or did not have the place at all."""
    alert: Alert | None = None
    """The alert that fires, with its latest value."""
    pending: Alert | None = None
    """The alert that would fire if the rule had no patience; None if no value is beyond a limit, or if the patience is over."""


@dataclass(frozen=True)
class _Reading:
    """The value of one criterion at one place, and a limit."""

    rule: Rule
    value: float
    limit: float

    @property
    def beyond(self) -> bool:
        return self.rule.beyond(self.value, self.limit)

    @property
    def safe(self) -> bool:
        return self.rule.safe(self.value, self.limit)


class Judge:
    """Holds each rule against each observation, in order, and remembers what fires.

    Args:
        rules: the rows that are judged.
        fault: is called with the name and the exception of a rule that raised one; the rule is left out from then on. Without it the exception passes
            on.

    Raises:
        ValueError: rows of the same name are over records and over weights, for instance.
    """

    def __init__(self, rules: Sequence[Rule] = RULES, fault: Callable[[str, Exception], None] | None = None) -> None:
        self._fault = fault
        self._groups: dict[str, list[Rule]] = {}
        for rule in rules:
            group = self._groups.setdefault(rule.name, [])
            if group and group[0].over != rule.over:
                raise ValueError(f"the rows of rule {rule.name!r} are over {group[0].over} and over {rule.over}; one rule judges one kind")
            group.append(rule)
        self._states: dict[Key, _State] = {}
        self._observations = 0
        self._step: int | None = None
        """The step of the last observation."""
        self._starts: dict[str, Start] = {}
        """What each place was like at the first observation that had it."""
        self.levels: dict[str, float] = {}
        """For each place that was judged at the last observation its highest `alert_level`."""
        self.nearest: Nearest | None = None
        """What came nearest to a warning at the last observation."""

    @property
    def firing(self) -> tuple[Alert, ...]:
        """The alerts that fire now, each with its latest value, in the order of `alerts.urgency`."""
        return tuple(Firing(state.alert for state in self._states.values() if state.alert is not None))

    @property
    def pending(self) -> tuple[Alert, ...]:
        """The conditions that held at the last observation, but not yet long enough for an alert."""
        return tuple(state.pending for state in self._states.values() if state.pending is not None and state.pending.step == self._step)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the judge remembers, in plain types. What is pending is judged anew at the next observation."""
        states = [
            {
                "place": place,
                "rule": rule,
                "streak": dict(state.streak),
                "since": state.since,
                "calm": state.calm,
                "is_early": state.is_early,
                "alert": state.alert and state.alert.as_dict(),
            }
            for (place, rule), state in self._states.items()
        ]
        items = [start.item for start in self._starts.values()]
        records, weights = tuple(item for item in items if isinstance(item, Record)), tuple(item for item in items if isinstance(item, Weight))
        starts = Snapshot(0, 0.0, records, weights, experts=tuple(item for item in items if isinstance(item, Experts)))
        facts = {place: (start.step, start.trained) for place, start in self._starts.items()}
        return {"observations": self._observations, "states": states, "starts": starts.as_dict(), "since": facts}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        states = {}
        for values in kept["states"]:
            alert = values["alert"] and Alert.from_dict(values["alert"])
            states[values["place"], values["rule"]] = _State(dict(values["streak"]), values["since"], values["is_early"], values["calm"], alert)
        self._observations, self._states = kept["observations"], states
        starts, facts = Snapshot.from_dict(kept["starts"]), kept["since"]
        self._starts = {place: Start(item, *facts[place]) for place, item in _places(starts).items()}

    def resume(self, firing: Sequence[Alert], observations: int, first: Snapshot | None = None) -> None:
        """Continue a run whose first `observations` observations ended with these alerts firing. `first`: the first of them."""
        self._observations = observations
        if first is not None:
            self._note_starts(first)
        for alert in firing:
            patience = _patience(self._groups.get(alert.rule, ()))
            streak: dict[Severity, int] = {"warning": patience, "critical": patience if alert.severity == "critical" else 0}
            is_early = first is not None and alert.since <= first.step
            self._states[alert.site, alert.rule] = _State(streak, alert.since, is_early, 0, alert)

    def judge(self, snapshot: Snapshot) -> tuple[Alert, ...]:
        """The alerts that are raised, get worse or clear at this observation."""
        events: list[Alert] = []
        self._observations += 1
        self._step = snapshot.step
        self.levels, self.nearest = {}, None
        self._note_starts(snapshot)
        kinds = _kinds(snapshot)
        for name, rules in list(self._groups.items()):
            items = kinds[rules[0].over]
            events += self._clear_missing(name, rules, items, snapshot)
            try:
                for place, item in items.items():
                    event = self._judge_one((place, name), rules, item, snapshot)
                    if event is not None:
                        events.append(event)
            except Exception as error:
                del self._groups[name]
                if self._fault is None:
                    raise
                self._fault(f"rule {name}", error)
        return tuple(events)

    def marked(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot that was judged last, with what was found: whether there was any rule, the level of each place, and what came nearest."""
        records, weights = with_levels(snapshot.records, self.levels), with_levels(snapshot.weights, self.levels)
        experts = with_levels(snapshot.experts, self.levels)
        return replace(snapshot, records=records, weights=weights, judged=bool(self._groups), nearest=self.nearest, experts=experts)

    def _note_starts(self, snapshot: Snapshot) -> None:
        """Note the places that were not there before."""
        trained = next((start.trained for start in self._starts.values()), None)
        for place, item in _places(snapshot).items():
            if place not in self._starts:
                trained = came_trained(snapshot) if trained is None else trained
                self._starts[place] = Start(item, snapshot.step, trained)

    def _clear_missing(self, name: str, rules: Sequence[Rule], places: Container[str], snapshot: Snapshot) -> list[Alert]:
        """Clear the alerts of one rule at places that have been missing from as many observations as the rule has patience."""
        cleared = []
        for (place, rule), state in list(self._states.items()):
            if rule != name or state.alert is None or place in places:
                continue
            state.calm += 1
            if state.calm >= _patience(rules):
                del self._states[place, name]
                cleared.append(replace(state.alert, step=snapshot.step, firing=False, message=f"{place}: no longer runs"))
        return cleared

    def _judge_one(self, key: Key, rules: Sequence[Rule], item: Item, snapshot: Snapshot) -> Alert | None:
        """One rule at one place: the alert that it raises, makes worse or clears, if any."""
        known = self._states.get(key)
        fires = known is not None and known.alert is not None and known.is_early
        judged = [rule for rule in rules if rule.first is None or fires or self._observations <= rule.first]
        # A rule of the user's may return a scalar of NumPy or torch.
        start = self._starts[key[0]]
        given = [(rule, rule.value(item, snapshot, start) if rule.compares else rule.value(item, snapshot)) for rule in judged]
        values = [(rule, float(value)) for rule, value in given if value is not None]
        if not values:
            return None
        place = key[0]
        self.levels[place] = max(self.levels.get(place, 0.0), *(alert_level(rule, value, item) for rule, value in values))
        for rule, value in values:
            way = way_to_warning(rule, value, item)
            if way and (self.nearest is None or way > self.nearest.way):
                self.nearest = Nearest(place, rule.name, way)
        state = self._states.setdefault(key, _State({"warning": 0, "critical": 0}))
        state.pending = None
        critical = _first_beyond(values, "critical", item)
        worst = critical or _first_beyond(values, "warning", item)
        state.streak["critical"] = state.streak["critical"] + 1 if critical else 0
        # What is critical has also passed the warning level, whether or not the rule has one.
        state.streak["warning"] = state.streak["warning"] + 1 if worst else 0
        if worst is not None:
            new = state.alert is None
            raised = _raise(state, key, worst, item, snapshot)
            if raised is not None and new:
                state.is_early = any(rule.first is not None and self._observations <= rule.first for rule in rules)
            return raised
        if state.alert is not None:
            return _calm(state, state.alert, values, rules, item, snapshot)
        state.since = None
        return None


def _kinds(snapshot: Snapshot) -> dict[str, dict[str, Item]]:
    """What a rule may be over (`Rule.over`): for each kind, its items in a snapshot by the names of their places."""
    kinds: dict[str, Sequence[Item]] = {"records": snapshot.records, "weights": snapshot.weights, "experts": snapshot.experts}
    return {kind: {place_of(item): item for item in items} for kind, items in kinds.items()}


def _places(snapshot: Snapshot) -> dict[str, Item]:
    """The items of all kinds by the names of their places."""
    return {place: item for items in _kinds(snapshot).values() for place, item in items.items()}


def _raise(state: _State, key: Key, worst: _Reading, item: Item, snapshot: Snapshot) -> Alert | None:
    """A value is beyond a limit: raise the alert, or make it worse, once the patience is over. Otherwise keep its value up to date."""
    state.calm = 0
    if state.since is None:
        state.since = snapshot.step
    before = state.alert
    reached = next((level for level in _LEVELS if state.streak[level] >= worst.rule.patience), before.severity if before is not None else None)
    if before is None and reached is not None and state.streak["critical"]:
        # What gets worse as it lasts is told as critical at once, and not as a warning first.
        reached = "critical"
    severity = reached or ("critical" if worst.rule.warning is None else "warning")
    # A critical value that has not lasted long enough is told with the limit of a warning, where there is one.
    limit = worst.rule.limit(severity, item)
    if limit is None or not worst.rule.beyond(worst.value, limit):
        limit = worst.limit
    place, name = key
    rank, where = _worst_rank(name, item)
    # A rule of the user's may return characters that no file and no terminal takes, such as half of a surrogate pair.
    message = str(worst.rule.says(item, worst.value, limit)).encode(errors="replace").decode() + where
    alert = Alert(place, name, severity, worst.value, limit, state.since, snapshot.step, True, message, rank=rank)
    if reached is None:
        state.pending = alert
        return None
    if before is not None and (before.severity == severity or before.severity == "critical"):
        state.alert = replace(alert, severity=before.severity)
        return None
    state.alert = alert
    return alert


def _calm(state: _State, alert: Alert, values: Sequence[tuple[Rule, float]], rules: Sequence[Rule], item: Item, snapshot: Snapshot) -> Alert | None:
    """An alert fires and no value is beyond a limit: clear it once all values have been safe for as long as the patience."""
    lowest = [
        _Reading(rule, value, limit)
        for rule, value in values
        if (limit := rule.limit("critical" if rule.warning is None else "warning", item)) is not None
    ]
    if not all(reading.safe for reading in lowest):
        state.calm = 0
        return None
    state.calm += 1
    if state.calm < _patience(rules):
        return None
    state.alert, state.since, state.calm = None, None, 0
    told = next((reading for reading in lowest if reading.limit == alert.threshold), lowest[0])
    message = f"{alert.site}: no longer {ADJECTIVE.get(alert.rule, alert.rule)}"
    return replace(alert, value=told.value, step=snapshot.step, firing=False, message=message)


def _first_beyond(values: Sequence[tuple[Rule, float]], level: Severity, item: Item) -> _Reading | None:
    """The first criterion of a rule that is beyond its limit of that level."""
    for rule, value in values:
        limit = rule.limit(level, item)
        if limit is not None and rule.beyond(value, limit):
            return _Reading(rule, value, limit)
    return None


def _patience(rules: Sequence[Rule]) -> int:
    """The patience of a rule: the longest of its criteria."""
    return max((rule.patience for rule in rules), default=1)


def _worst_rank(rule: str, item: Item) -> tuple[int | None, str]:
    """If several ranks observe together and one stands out: that rank, and the end of the alert's sentence that says so."""
    if isinstance(item, Record) and rule == "nonfinite" and item.nonfinite_rank is not None:
        return item.nonfinite_rank, f"; most of them on rank {item.nonfinite_rank}"
    if isinstance(item, Record) and rule == "saturated" and item.worst is not None and item.worst - (item.saturated or 0.0) >= STANDS_OUT:
        return item.worst_rank, f"; worst on rank {item.worst_rank}: {percent(item.worst)} on a plateau"
    return None, ""
