"""Rules: when a number is worth a word; standard library only.

A rule is a row: what to measure, where it warns, where it is critical. The `Judge` adds what keeps alerts rare: a rule fires only after
`patience` observations in a row beyond its limit, and clears only after as many on the safe side of `HYSTERESIS` times the limit. Rows of
the same name are one rule with several criteria: at one place at most one alert of it fires.

Sources of the limits: a hidden layer is saturated when its tails hold 30 points more than N(0, 1) puts there, or when E|f'| / peak falls
below 0.25; the second criterion is needed beside the first, since the drifting sigmoid layer of Glorot and Bengio (2010) has no element in a
tail. Both stand just beyond what layers of healthy networks reach when they are trained to convergence on digits (tanh: 29 % and 0.29). The
gradient limits are the range of float16. A recurrent layer remembers by saturating (a character LSTM that learns well has four fifths of its cell
inputs in the tails), so it is judged only before it has learned: untrained gates are open. Attention collapses when a query looks at one key and
nothing else (Zhai et al. 2023); heads that put four fifths of their weight on the first key are common in healthy models and have an entropy
near 0.27. A rectifier is sparse by design (networks with 90 % zeros train well), so of one-sided functions only stuck units and a wholly closed
layer are reported; deep ReLU networks on torch's default initialisation learn with a fifth of them dead.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchsat.record import Alert, Record, Severity, Snapshot, Weight

HYSTERESIS = 0.8
STANDS_OUT = 0.1
"""By this much more than that of all ranks is the share of a rank that is named."""


@dataclass(frozen=True)
class Rule:
    """One criterion.

    Args:
        name: of the alert. Several rows may share it.
        value: from (record or weight, snapshot) to the number that is judged; None: nothing is judged there.
        warning, critical: the limits, numbers or functions of the record or weight; None: no such level.
        says: the sentence of the alert, from (record or weight, value, limit).
        below: the rule fires below its limits, not above.
        patience: observations in a row.
        over: what is judged.
        first: judged only in the first so many observations, and from then on as long as it fires; None: always.
    """

    name: str
    value: Callable[[Any, Snapshot], float | None]
    warning: float | Callable[[Any], float | None] | None
    critical: float | Callable[[Any], float | None] | None
    says: Callable[[Any, float, float], str]
    below: bool = False
    patience: int = 3
    over: Literal["records", "weights"] = "records"
    first: int | None = None

    def limit(self, severity: Severity, item: Record | Weight) -> float | None:
        """The limit of that level at this record or weight."""
        limit = self.critical if severity == "critical" else self.warning
        return limit(item) if callable(limit) else limit

    def beyond(self, value: float, limit: float) -> bool:
        return value <= limit if self.below else value >= limit

    def safe(self, value: float, limit: float) -> bool:
        """Whether the value is clear of the limit by the hysteresis."""
        return value > limit / HYSTERESIS if self.below else value < limit * HYSTERESIS


def percent(share: float) -> str:
    """A share for people: never 0 % or 100 % unless it is."""
    points = 100 * share
    if 0 < points < 0.1 or 99.9 < points < 100:
        return "< 0.1 %" if points < 50 else "> 99.9 %"
    return f"{points:.1f} %" if points < 10 or points > 90 else f"{points:.0f} %"


def _closes_both_ways(record: Record) -> bool:
    """Two plateaus that N(0, 1) inputs mostly leave alone: not a ReLU6 or a Hardtanh(0, k), which are rectifiers."""
    two_sided = record.tails == "both" and max(record.normal_low or 0.0, record.normal_high or 0.0) < 0.25
    return two_sided and not (record.output or record.gate)


def _soft_share(record: Record, snapshot: Snapshot) -> float | None:
    """The share in the tails; not of hard functions, where it is 1 - m and trained healthy layers reach two thirds."""
    hard = _normal_share(record) + (record.normal_derivative or 0.0) > 0.995
    return record.saturated if _closes_both_ways(record) and not hard else None


def _normal_share(record: Record) -> float:
    return (record.normal_low or 0.0) + (record.normal_high or 0.0)


def _share_limit(record: Record) -> float:
    return _normal_share(record) + 0.3


def _share_limit_critical(record: Record) -> float:
    return max(0.5, _normal_share(record) + 0.45)


def _gates_from_the_start(record: Record, snapshot: Snapshot) -> float | None:
    """Of the sigmoid gates of a recurrent layer the one that saturates least, judged at the first of them."""
    if record.kind != "recurrent" or record.activation != "sigmoid":
        return None
    layer = record.site.rpartition("/")[0]
    gates = [each for each in snapshot.records if each.activation == "sigmoid" and each.site.rpartition("/")[0] == layer]
    shares = [each.saturated for each in gates if each.saturated is not None]
    return min(shares) if gates[0] is record and shares else None


def _one_sided_share(record: Record, snapshot: Snapshot) -> float | None:
    return record.saturated if record.tails in ("low", "high") and not record.output else None


def _slope(record: Record, snapshot: Snapshot) -> float | None:
    return record.relative_derivative if _closes_both_ways(record) else None


def _slope_limit(record: Record) -> float:
    return min(0.25, 0.45 * (record.normal_derivative or 1.0))


def _slope_limit_critical(record: Record) -> float:
    return min(0.15, 0.3 * (record.normal_derivative or 1.0))


def _stuck(record: Record, snapshot: Snapshot) -> float | None:
    """Of a bottleneck of a few units a share says little."""
    return None if record.output or record.gate or (record.units or 0) < 8 else record.stuck


def gradient_over_depth(snapshot: Snapshot) -> float | None:
    """||dL/dz|| at the first site over that at the last hidden one.

    Norms, not means over elements: where positions are pooled, a mean falls with their number though nothing is lost.
    """
    norms = [each.grad_z_rms * math.sqrt(each.elements) for each in snapshot.records if each.grad_z_rms is not None and _on_the_way(each)]
    return norms[0] / norms[-1] if len(norms) > 1 and norms[-1] else None


def _on_the_way(record: Record) -> bool:
    """Whether the signal passes through this site: not beside it, as through a gate or the logits of attention."""
    return not (record.output or record.gate or record.kind == "softmax")


def _over_depth(record: Record, snapshot: Snapshot) -> float | None:
    """`gradient_over_depth`, judged at the first site."""
    first = next((each for each in snapshot.records if each.grad_z_rms is not None and _on_the_way(each)), None)
    return gradient_over_depth(snapshot) if record is first else None


def _attention_entropy(record: Record, snapshot: Snapshot) -> float | None:
    """Of the median head; None for what has no heads, such as the router of a mixture of experts."""
    entropies = [head.entropy for head in record.heads or () if head.entropy is not None]
    return statistics.median(entropies) if len(entropies) > 1 and not record.output else None


def _step_size(weight: Weight) -> float | None:
    """The update ratio per learning rate; None for a layer that had nothing to learn from in this step."""
    if weight.update_ratio is None or weight.grad_norm is None or not weight.input_n or not weight.learning_rate:
        return None
    return weight.update_ratio / weight.learning_rate


def _relative_update(weight: Weight, snapshot: Snapshot) -> float | None:
    """The step of this layer over the median of all: schedules and optimizers move all layers alike."""
    steps = [step for each in snapshot.weights if (step := _step_size(each)) is not None]
    mine = _step_size(weight)
    if len(steps) < 3 or mine is None:
        return None
    median = statistics.median(steps)
    return mine / median if median else None


def _nonfinite(record: Record, snapshot: Snapshot) -> float:
    return float(record.nonfinite)


def _nonfinite_grad(record: Record, snapshot: Snapshot) -> float:
    return float(record.grad_nonfinite)


RULES: tuple[Rule, ...] = (
    Rule(
        "saturated",
        _soft_share,
        _share_limit,
        _share_limit_critical,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}) is saturated: {percent(value)} of its inputs lie on a plateau "
            f"({percent(r.low)} low, {percent(r.high)} high; limit {percent(limit)}, N(0, 1) inputs give {percent(_normal_share(r))})"
        ),
    ),
    Rule(
        "saturated",
        _slope,
        _slope_limit,
        _slope_limit_critical,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}) is saturated: its mean derivative is {percent(value)} of the peak (limit {percent(limit)}); "
            f"it outputs {r.a_mean:.3g} +- {r.a_std:.2g}"
        ),
        below=True,
    ),
    Rule(
        "saturated",
        _one_sided_share,
        None,
        0.99,
        lambda r, value, limit: f"{r.site} ({r.activation}) is closed: {percent(value)} of its inputs lie on its plateau (limit {percent(limit)})",
    ),
    Rule(
        "saturated",
        _gates_from_the_start,
        1 / 3,
        0.6,
        lambda r, value, limit: (
            f"{r.site.rpartition('/')[0]} is saturated before it has learned anything: at least {percent(value)} of the inputs of each of its gates "
            f"lie on a plateau (limit {percent(limit)})"
        ),
        first=3,
    ),
    Rule(
        "stuck_units",
        _stuck,
        0.3,
        0.5,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}): {percent(value)} of its {r.units} units are {'dead' if r.tails == 'low' else 'stuck on a plateau'}, "
            f"saturated in at least 99 % of {r.stuck_n} samples (limit {percent(limit)} of the units)"
        ),
        patience=1,
    ),
    Rule(
        "vanishing_gradient",
        _over_depth,
        1e-3,
        1e-6,
        lambda r, value, limit: (
            f"the gradient vanishes: at {r.site}, the first site, the norm of dL/dz is {value:.1e} of what it is at the last (limit {limit:.0e})"
        ),
        below=True,
    ),
    Rule(
        "exploding_gradient",
        _over_depth,
        1e3,
        1e6,
        lambda r, value, limit: (
            f"the gradient explodes: at {r.site}, the first site, the norm of dL/dz is {value:.1e} times what it is at the last (limit {limit:.0e})"
        ),
    ),
    Rule(
        "frozen_weights",
        _relative_update,
        1e-3,
        1e-5,
        lambda w, value, limit: (
            f"{w.name}, which feeds {', '.join(w.feeds)}, is frozen: a step changes it by {w.update_ratio:.1e} of itself, "
            f"{value:.1e} of what the median layer gets (limit {limit:.0e})"
        ),
        below=True,
        over="weights",
    ),
    Rule(
        "attention_collapse",
        _attention_entropy,
        0.15,
        0.03,
        lambda r, value, limit: (
            f"{r.site}: the attention has collapsed: half of its {len(r.heads)} heads have an entropy of {percent(value)} of ln T or less "
            f"(limit {percent(limit)}); its logits reach {r.z_max:.3g} and vary by {r.logit_std:.3g} within a row"
        ),
        below=True,
    ),
    Rule(
        "nonfinite",
        _nonfinite,
        None,
        1.0,
        lambda r, value, limit: f"{r.site} ({r.activation}): {value:.0f} of {r.n + r.nonfinite} measured elements are inf or nan",
        patience=1,
    ),
    Rule(
        "nonfinite",
        _nonfinite_grad,
        None,
        1.0,
        lambda r, value, limit: f"{r.site} ({r.activation}): {value:.0f} of {r.grad_n + r.grad_nonfinite} measured gradient elements are inf or nan",
        patience=1,
    ),
)


@dataclass
class _State:
    """One rule at one place."""

    streak: dict[Severity, int]
    since: int | None = None
    calm: int = 0
    alert: Alert | None = None


class Judge:
    """Holds each rule against each observation, in order, and remembers what fires.

    `fault` is told of a rule that raised; that rule is then left out.
    """

    def __init__(self, rules: Sequence[Rule] = RULES, fault: Callable[[str, Exception], None] | None = None) -> None:
        self._fault = fault
        self._groups: dict[str, list[Rule]] = {}
        for rule in rules:
            group = self._groups.setdefault(rule.name, [])
            if group and group[0].over != rule.over:
                raise ValueError(f"the rows of rule {rule.name!r} are over {group[0].over} and over {rule.over}; one rule judges one kind")
            group.append(rule)
        self._states: dict[tuple[str, str], _State] = {}
        self._observations = 0

    @property
    def firing(self) -> tuple[Alert, ...]:
        """The alerts that fire now, worst first, each with its latest value."""
        alerts = [state.alert for state in self._states.values() if state.alert is not None]
        return tuple(sorted(alerts, key=lambda alert: (alert.severity != "critical", alert.since)))

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, in plain types."""
        states = [
            {**vars(state), "streak": dict(state.streak), "place": place, "rule": rule, "alert": state.alert and state.alert.as_dict()}
            for (place, rule), state in self._states.items()
        ]
        return {"observations": self._observations, "states": states}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        states = {}
        for values in kept["states"]:
            alert = values["alert"] and Alert.from_dict(values["alert"])
            states[values["place"], values["rule"]] = _State(dict(values["streak"]), values["since"], values["calm"], alert)
        self._observations, self._states = kept["observations"], states

    def resume(self, firing: Sequence[Alert], observations: int) -> None:
        """Go on as after so many observations that ended with these alerts firing."""
        self._observations = observations
        for alert in firing:
            patience = max((rule.patience for rule in self._groups.get(alert.rule, ())), default=1)
            streak: dict[Severity, int] = {"warning": patience, "critical": patience if alert.severity == "critical" else 0}
            self._states[alert.site, alert.rule] = _State(streak, alert.since, 0, alert)

    def judge(self, snapshot: Snapshot) -> tuple[Alert, ...]:
        """The alerts that fire, worsen or clear at this observation."""
        events = []
        self._observations += 1
        for name, rules in list(self._groups.items()):
            items: Sequence[Record | Weight] = snapshot.weights if rules[0].over == "weights" else snapshot.records
            places = {item.name if isinstance(item, Weight) else item.site for item in items}
            for (place, rule), state in list(self._states.items()):
                if rule == name and state.alert is not None and place not in places:
                    gone = self._clear_gone(place, name, state, rules, snapshot)
                    events.extend([gone] if gone else [])
            for item in items:
                place = item.name if isinstance(item, Weight) else item.site
                try:
                    event = self._judge_one(place, name, rules, item, snapshot)
                except Exception as error:
                    del self._groups[name]
                    if self._fault is None:
                        raise
                    self._fault(f"rule {name}", error)
                    break
                if event is not None:
                    events.append(event)
        return tuple(events)

    def _clear_gone(self, place: str, name: str, state: _State, rules: list[Rule], snapshot: Snapshot) -> Alert | None:
        """An alert of a place that has not run for as long as the patience is over."""
        state.calm += 1
        if state.alert is None or state.calm < max(rule.patience for rule in rules):
            return None
        last = state.alert
        del self._states[place, name]
        return replace(last, step=snapshot.step, firing=False, message=f"{place}: no longer runs")

    def _judge_one(self, place: str, name: str, rules: list[Rule], item: Record | Weight, snapshot: Snapshot) -> Alert | None:
        known = self._states.get((place, name))
        held = known is not None and known.alert is not None
        due = [rule for rule in rules if rule.first is None or held or self._observations <= rule.first]
        values = [(rule, value) for rule in due if (value := rule.value(item, snapshot)) is not None]
        if not values:
            return None
        state = self._states.setdefault((place, name), _State({"warning": 0, "critical": 0}))
        worst: tuple[Rule, float, Severity, float] | None = None
        levels: tuple[Severity, ...] = ("critical", "warning")
        for severity in levels:
            over = [(rule, value, limit) for rule, value in values if (limit := rule.limit(severity, item)) is not None and rule.beyond(value, limit)]
            if over and worst is None:
                worst = (over[0][0], over[0][1], severity, over[0][2])
            # What is critical has also passed the warning level, whether or not the rule has one.
            reached = bool(over) or (severity == "warning" and worst is not None)
            state.streak[severity] = state.streak[severity] + 1 if reached else 0
        if worst is not None:
            rule, value, _, _ = worst
            state.calm = 0
            if state.since is None:
                state.since = snapshot.step
            severities: list[Severity] = [level for level in levels if state.streak[level] >= rule.patience]
            if not severities:
                return None
            severity = severities[0]
            limit = rule.limit(severity, item)
            if limit is None or not rule.beyond(value, limit):
                rule, value, _, limit = worst
            rank, where = _worst_rank(name, item)
            says = rule.says(item, value, limit) + where
            alert = Alert(place, name, severity, value, limit, state.since, snapshot.step, True, says, rank=rank)
            before = state.alert
            if before is not None and (before.severity == severity or before.severity == "critical"):
                state.alert = replace(alert, severity=before.severity)
                return None
            state.alert = alert
            return alert
        if state.alert is None:
            state.since = None
            return None
        lowest = [
            (rule, value, limit)
            for rule, value in values
            if (limit := rule.limit("warning", item) if rule.warning is not None else rule.limit("critical", item)) is not None
        ]
        if not all(rule.safe(value, limit) for rule, value, limit in lowest):
            state.calm = 0
            return None
        state.calm += 1
        if state.calm < max(rule.patience for rule in rules):
            return None
        last, state.alert, state.since, state.calm = state.alert, None, None, 0
        value = next((value for rule, value, limit in lowest if limit == last.threshold), lowest[0][1])
        return replace(last, value=value, step=snapshot.step, firing=False, message=f"{place}: no longer {_ADJECTIVE.get(name, name)}")


def _worst_rank(rule: str, item: Record | Weight) -> tuple[int | None, str]:
    """Of several ranks the one that stands out, and how to say so."""
    if isinstance(item, Record) and rule == "nonfinite" and item.nonfinite_rank is not None:
        return item.nonfinite_rank, f"; most of them on rank {item.nonfinite_rank}"
    if isinstance(item, Record) and rule == "saturated" and item.worst is not None and item.worst - (item.saturated or 0.0) >= STANDS_OUT:
        return item.worst_rank, f"; worst on rank {item.worst_rank}: {percent(item.worst)} on a plateau"
    return None, ""


_ADJECTIVE = {
    "saturated": "saturated",
    "stuck_units": "full of stuck units",
    "vanishing_gradient": "short of gradient",
    "exploding_gradient": "flooded with gradient",
    "frozen_weights": "frozen",
    "attention_collapse": "collapsed",
    "nonfinite": "non-finite",
}
