"""The verdict on a run, and on several runs: what is wrong, where, since when, and what to try, before everything else; standard library only.

The Saturation tab, the reports, the notebook and the last line of the log all begin with a verdict, and all take it from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torchsat.alerts import ADJECTIVE, Episode, episodes_of
from torchsat.percent import percent
from torchsat.record import Alert, LayerFacts, Nearest, SiteFacts, Snapshot
from torchsat.shown import Shown


class Health(Enum):
    """The state of a run at its last observation, by the alerts that fire then."""

    HEALTHY = "healthy"
    NOT_JUDGED = "not judged"
    """Nobody knows: there was no rule, or there is no observation."""
    IN_DOUBT = "in doubt"
    """No alert fires, but something is beyond a limit: an alert waits until that lasts."""
    WARNING = "warning"
    CRITICAL = "critical"
    NOT_FINITE = "not finite"
    """Something is inf or nan. Whatever else was wrong before, training is over."""

    @property
    def rank(self) -> int:
        """0 for a healthy run, and more for a worse one."""
        return list(Health).index(self)

    @property
    def is_sick(self) -> bool:
        """Whether an alert fires."""
        return self.rank > Health.IN_DOUBT.rank


NO_RULES = "no rules were given"


@dataclass(frozen=True, repr=False)
class Verdict(Shown):
    """What is wrong with one run."""

    health: Health
    alert: Alert | None = None
    """The alert that counts most, of those that fire at the last observation; None where none fires."""
    firing: int = 0
    """How many alerts fire at the last observation."""
    over: int = 0
    """How many alerts fired before and no longer do."""
    activation: str = ""
    """The activation at the place of the alert or of `nearest`, or what the layer there is; empty where it is not known."""
    nearest: Nearest | None = None
    """Where no alert fires: what comes nearest to a warning, if that is known."""
    unjudged: str = ""
    """Why a run is not judged; empty for one that is."""

    @property
    def in_short(self) -> str:
        """The verdict in one sentence."""
        return str(self)

    @property
    def rank(self) -> tuple[int, int, int]:
        """The sort key of runs, of which the largest is the worst: by health, by how many places suffer, and by how early it began."""
        return self.health.rank, 0 if self.alert is None else 1 + len(self.alert.also), 0 if self.alert is None else -self.alert.since

    @property
    def where(self) -> str:
        """The places that suffer, such as `hidden1.act (sigmoid) and 3 more places`."""
        if self.alert is None:
            return ""
        more = f" and {len(self.alert.also)} more place{'' if len(self.alert.also) == 1 else 's'}" if self.alert.also else ""
        return self._named(self.alert.site) + more

    def _named(self, place: str) -> str:
        """A place with what it is, unless its name says so."""
        return place + (f" ({self.activation})" if self.activation and not place.endswith(f"/{self.activation}") else "")

    @property
    def what(self) -> str:
        """What they are, such as `saturated`."""
        return "" if self.alert is None else ADJECTIVE.get(self.alert.rule, self.alert.rule)

    @property
    def advice(self) -> str:
        """What to try first, without code."""
        return "" if self.alert is None or not self.alert.causes else self.alert.causes[0].advice.rstrip(":")

    @property
    def calm(self) -> str:
        """What became of the alerts of a run of which none fires, and how far it is from the next one."""
        if self.unjudged:
            return self.unjudged
        cleared = "its alert has cleared" if self.over == 1 else f"its {self.over} alerts have cleared"
        return (cleared if self.over else "no alert was raised") + (f"; {self.margin}" if self.margin else "")

    @property
    def margin(self) -> str:
        """How far a run of which no alert fires is from the next one; empty where that is not known."""
        if self.nearest is None:
            return ""
        rule, place = self.nearest.rule.replace("_", " "), self._named(self.nearest.place)
        if self.health is Health.IN_DOUBT:
            return f"{place} is beyond the limit of a warning, but not for long enough to be told ({rule})"
        return f"nearest to a limit: {place}, {percent(self.nearest.way)} of the way to a warning ({rule})"

    def __str__(self) -> str:
        """The verdict in one sentence, without the advice."""
        if self.alert is None:
            return f"{self.health.value}: {self.calm}"
        others = f"; {self.firing - 1} more alert{'s' if self.firing > 2 else ''}" if self.firing > 1 else ""
        cause = f" ({self.alert.causes[0].name})" if self.alert.causes else ""
        return f"{self.health.value}: {self.where}: {self.what}{cause}, since step {self.alert.since}{others}"

    def as_dict(self) -> dict[str, Any]:
        """The verdict in plain types, with its parts in words."""
        alert = self.alert
        return {
            "health": self.health.value,
            "rank": list(self.rank),
            "sentence": str(self),
            "firing": self.firing,
            "over": self.over,
            "site": alert and alert.site,
            "rule": alert and alert.rule,
            "since": alert and alert.since,
            "where": self.where,
            "what": self.what,
            "cause": alert.causes[0].name if alert is not None and alert.causes else None,
            "margin": self.margin,
            "advice": self.advice,
            "code": alert.causes[0].code if alert is not None and alert.causes else "",
        }


def verdict_of(
    episodes: Sequence[Episode], activations: Mapping[str, str] | None = None, judged: bool = True, nearest: Nearest | None = None
) -> Verdict:
    """The verdict on a run by its alerts.

    Args:
        activations: the activation of each site, and what each layer is, by name, as far as they are known.
        judged, nearest: of the last observation.
    """
    firing = [each.alert for each in episodes if each.cleared is None]
    over = len(episodes) - len(firing)
    if not firing and not judged:
        return Verdict(Health.NOT_JUDGED, over=over, unjudged=NO_RULES)
    if not firing:
        health = Health.IN_DOUBT if nearest is not None and nearest.way >= 1 else Health.HEALTHY
        return Verdict(health, over=over, activation=(activations or {}).get(nearest.place, "") if nearest else "", nearest=nearest)
    worst = min(firing, key=lambda alert: (alert.rule != "nonfinite", alert.severity != "critical", -len(alert.also), alert.since))
    health = Health.NOT_FINITE if worst.rule == "nonfinite" else Health.CRITICAL if worst.severity == "critical" else Health.WARNING
    return Verdict(health, worst, len(firing), over, (activations or {}).get(worst.site, ""))


def verdict_on(snapshots: Sequence[Snapshot]) -> Verdict:
    """The verdict on a run that `torchsat.read` has read."""
    records, weights = (record for each in snapshots for record in each.records), (weight for each in snapshots for weight in each.weights)
    return verdict_of(episodes_of(snapshots), what_is_where(records, weights), snapshots[-1].judged, snapshots[-1].nearest)


def what_is_where(records: Iterable[SiteFacts], weights: Iterable[LayerFacts]) -> dict[str, str]:
    """The activation of each site, and what each layer is, by name. An older file does not say what a layer is."""
    return {weight.name: weight.layer or "" for weight in weights} | {record.site: record.activation for record in records}


def worst_first(verdicts: Mapping[str, Verdict]) -> list[str]:
    """The names of runs, the worst first. Runs that are equally bad keep their order."""
    return sorted(verdicts, key=lambda name: tuple(-part for part in verdicts[name].rank))


def summary(verdicts: Mapping[str, Verdict]) -> str:
    """One sentence on several runs: how many are sick, and what is wrong with the worst."""
    sick = [name for name in worst_first(verdicts) if verdicts[name].health.is_sick]
    counts = Counter(verdict.health for verdict in verdicts.values())
    if not sick:
        several = "The run is" if len(verdicts) == 1 else "Both runs are" if len(verdicts) == 2 else f"All {len(verdicts)} runs are"
        if len(counts) == 1:
            (health,) = counts
            return f"{several} {health.value}" + (f": {NO_RULES}." if health is Health.NOT_JUDGED else ".")
        healthy = counts[Health.HEALTHY]
        return f"{healthy} of {len(verdicts)} runs {'is' if healthy == 1 else 'are'} healthy{_others(counts)}."
    worst = verdicts[sick[0]]
    count = "The run is sick" if len(verdicts) == 1 else f"{len(sick)} of {len(verdicts)} runs {'is' if len(sick) == 1 else 'are'} sick"
    name = "" if len(verdicts) == 1 else f"Worst: {sick[0]}: "
    return f"{count}{_others(counts)}. {name}{worst}." + (f" Try: {worst.advice}" if worst.advice else "")


def _others(counts: Mapping[Health, int]) -> str:
    """The end of a sentence on several runs: how many of them are neither sick nor known to be healthy."""
    ends = {Health.IN_DOUBT: "in doubt", Health.NOT_JUDGED: f"not judged, since {NO_RULES}"}
    return "".join(f", and {runs} {'is' if runs == 1 else 'are'} {end}" for health, end in ends.items() if (runs := counts.get(health, 0)))
