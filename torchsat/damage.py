"""The sentences of an alert that is told: how many places suffer and since when, which is the worst, and where it began; standard library only.

A reader first wants to know how bad it is, and that is seldom worst where it began: in a stack whose weights are drawn too large the first layer that
crosses a limit has just crossed it, while those behind it are far beyond. What a single place shows is said by the rule itself (rules.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torchsat.alerts import ADJECTIVE
from torchsat.groups import RANK
from torchsat.record import Alert, Record, Snapshot


@dataclass(frozen=True)
class _Kind:
    """What is counted together: sites of one function that are all hidden, all gates, or all outputs."""

    noun: str
    """In the plural."""


_LAYERS = _Kind("layers")
_RECURRENT = _Kind("recurrent layers")
_MIXTURES = _Kind("mixtures of experts")


class Census:
    """How many places of each kind an observation has."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    @cached_property
    def _records(self) -> dict[str, Record]:
        return {record.site: record for record in self._snapshot.records}

    @cached_property
    def _layers(self) -> set[str]:
        return {weight.name for weight in self._snapshot.weights}

    @cached_property
    def _mixtures(self) -> set[str]:
        return {experts.site for experts in self._snapshot.experts}

    @cached_property
    def _count(self) -> Counter[_Kind]:
        places = {(_kind_of(record), _unit(record)) for record in self._snapshot.records}
        count = Counter(kind for kind, _ in places)
        count[_MIXTURES] = len(self._snapshot.experts)
        count[_LAYERS] = sum(weight.whole is None for weight in self._snapshot.weights)
        return count

    def record(self, place: str) -> Record | None:
        """What was measured at a site; None for a layer, and for a site that did not run."""
        return self._records.get(place)

    def activation(self, place: str) -> str:
        """The activation of a site in brackets; empty for a layer."""
        record = self.record(place)
        return f" ({record.activation})" if record is not None else ""

    def share(self, places: Sequence[str]) -> str:
        """How many places these are, of how many of their kinds: `4 of 6 tanh layers`."""
        kinds: list[tuple[_Kind, str]] = []
        for place in places:
            record = self._records.get(place)
            if record is not None:
                kinds.append((_kind_of(record), _unit(record)))
            elif place in self._layers or place in self._mixtures:
                kinds.append((_LAYERS if place in self._layers else _MIXTURES, place))
            else:
                return f"{len(places)} places"
        found, met = set(kinds), {kind for kind, _ in kinds}
        noun = next(iter(met)).noun if len(met) == 1 else "sites"
        whole = sum(self._count[kind] for kind in met)
        return f"{len(found)} of {whole} {noun}" if whole >= len(found) else f"{len(found)} {noun}"


def _kind_of(record: Record) -> _Kind:
    if record.kind == "recurrent":
        return _RECURRENT
    if record.kind == "softmax":
        return _Kind("softmaxes")
    what = "outputs" if record.output else "gates" if record.gate else "layers"
    return _Kind(f"{record.activation} {what}")


def _unit(record: Record) -> str:
    """What is counted once: the layer of the gates of a recurrent layer, each other site by itself."""
    return record.site.rpartition("/")[0] if record.kind == "recurrent" else record.site


def worst_of(alerts: Sequence[Alert], census: Census) -> Alert:
    """The alert of the place that suffers most, of those of one rule.

    The rows of `saturated` compare numbers of different kinds, so places are compared by what they have in common: the share on a plateau, and the
    derivative where that is equal. A recurrent layer has no such number of its own.
    """

    def badness(alert: Alert) -> tuple[float, float]:
        record = census.record(alert.site)
        if alert.rule == "saturated" and record is not None and record.kind != "recurrent" and record.saturated is not None:
            return record.saturated, -(record.relative_derivative or 0.0)
        small_is_bad = alert.value <= alert.threshold
        return 1 - alert.value if small_is_bad else alert.value, -alert.value if small_is_bad else alert.value

    return max(alerts, key=badness)


def headline(origin: Alert, members: Sequence[Alert]) -> list[Alert]:
    """The alerts of that rule which explains the others; of several, that of the origin."""
    first = min((alert.rule for alert in members), key=lambda rule: (RANK.get(rule, len(RANK)), rule != origin.rule))
    return [alert for alert in members if alert.rule == first]


def describe(origin: Alert, members: Sequence[Alert], recovered: bool, census: Census) -> str:
    """The message of an alert.

    Args:
        origin: where it began.
        members: what is beyond a limit at single places now, in the order of data flow. At least one.
        recovered: whether the alert of the origin has cleared.
        census: of the newest observation.
    """
    first = headline(origin, members)
    said = [_of_rule(first, census)]
    rest = {alert.rule: None for alert in sorted(members, key=lambda alert: RANK.get(alert.rule, len(RANK))) if alert.rule != first[0].rule}
    said += [_briefly([alert for alert in members if alert.rule == rule], census) for rule in rest]
    if len(first) > 1 or first[0].site != origin.site:
        said.append(_beginning(origin, first, recovered, census))
    return ". ".join(said)


def _of_rule(alerts: Sequence[Alert], census: Census) -> str:
    """The alerts of one rule: how many places, since when, and the worst of them."""
    worst = worst_of(alerts, census)
    if len(alerts) == 1:
        return f"{worst.message}, since step {worst.since}"
    detail = worst.message.partition(": ")[2] or worst.message
    return f"{_count(alerts, census)}{_since(alerts)}, worst {worst.site}{census.activation(worst.site)}: {detail}"


def _briefly(alerts: Sequence[Alert], census: Census) -> str:
    """The alerts of a rule that the headline explains."""
    if len(alerts) == 1:
        return f"Also {alerts[0].message}"
    return f"Also {_count(alerts, census)}"


def _count(alerts: Sequence[Alert], census: Census) -> str:
    rule = alerts[0].rule
    state = ADJECTIVE.get(rule, f"beyond the limit of {rule}")
    return f"{census.share([alert.site for alert in alerts])} are {state}"


def _since(alerts: Sequence[Alert]) -> str:
    steps = [alert.since for alert in alerts]
    first, last = min(steps), max(steps)
    return f" since step {first}" if first == last else f", the first since step {first}, the last since step {last}"


def _beginning(origin: Alert, first: Sequence[Alert], recovered: bool, census: Census) -> str:
    """Where it began. `first`: the alerts of the headline."""
    place = f"{origin.site}{census.activation(origin.site)}"
    if recovered:
        return f"It began at {place} at step {origin.since}, which has recovered"
    if any(alert.since < origin.since for alert in first):
        return f"The first of them in the order of data flow is {place}"
    return f"It began at {place}"
