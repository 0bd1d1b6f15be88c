"""The table of rules: which number of a site or layer is judged, against which limits, and how the alert says it; standard library only.

A rule is one row of RULES. Rows of the same name are several criteria of one rule, and at one place at most one alert of a rule fires. The judge
(judge.py) holds the rules against each observation and decides when an alert is raised and cleared.

Where the limits come from:

- A hidden layer counts as saturated in either of two cases. Its tails hold 30 percentage points more than N(0, 1) inputs put there; or its mean
  derivative E|f'| / peak falls below 0.25. The second criterion is needed because the drifting sigmoid layer of Glorot and Bengio (2010) has no
  element in a tail. Both limits lie just beyond what layers of healthy networks reach when they are trained to convergence on handwritten digits
  (tanh: 29 % and 0.29).
- The limits of the gradient are the range of float16.
- A recurrent layer remembers by saturating: a character LSTM that learns well has four fifths of its cell inputs in the tails. It is therefore judged
  only at the start, since gates that are not trained yet are open; and not at all where the network comes trained.
- Attention has collapsed when each query looks at a single key (Zhai et al. 2023). Heads that put four fifths of their weight on the first key are
  common in healthy models; their entropy is near 0.27.
- A rectifier is sparse by design: networks with 90 % zeros train well, and deep ReLU networks on torch's default initialisation learn with a fifth of
  their units dead. Of functions with one plateau only stuck units and a layer that is closed as a whole are reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchsat.percent import percent
from torchsat.record import Record, Severity, Snapshot, Weight, normal_saturated

UNEVEN = 6.0
"""A weight whose unevenness is larger is taken for trained. Draws of torch.nn.init of 512 elements and more stay below 5."""
_TOO_LARGE_A_STEP = 0.05
"""A step that changes the median layer by more of itself makes weights uneven that have learned nothing."""
HYSTERESIS = 0.8
"""An alert clears only on the safe side of this factor times its limit, so that a value close to the limit does not raise and clear it in turns."""

STUCK_SAMPLES = 1000
"""Units are judged once the median stuck unit has been saturated in so many samples. The samples of one batch are not independent: the positions of
one image or sequence can all be alike."""


@dataclass(frozen=True)
class Rule:
    """One criterion.

    Args:
        name: of the rule, and so of its alerts. Several rows may share it.
        value: from (record or weight, snapshot) to the number that is judged. None where there is nothing to judge.
        warning, critical: the two limits. Each is a number, or a function of the record or weight; None if there is no such level.
        says: the sentence of the alert, from (record or weight, value, limit).
        below: the rule fires when the value is at or below its limit. By default it fires at or above.
        patience: an alert is raised after this many observations in a row beyond the limit, and cleared after as many on the safe side.
        over: whether records or weights are judged.
        first: the rule is judged only in this many first observations, and after that only where it fires. None: always.
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
        """The limit of one level at this record or weight; None if there is no such level."""
        limit = self.critical if severity == "critical" else self.warning
        found = limit(item) if callable(limit) else limit
        return None if found is None else float(found)

    def beyond(self, value: float, limit: float) -> bool:
        """Whether the value is as bad as the limit or worse."""
        return value <= limit if self.below else value >= limit

    def safe(self, value: float, limit: float) -> bool:
        """Whether the value is clear of the limit by the hysteresis."""
        return value > limit / HYSTERESIS if self.below else value < limit * HYSTERESIS


def came_trained(first: Snapshot) -> bool:
    """Whether the network had trained weights when the run began: whether a third of its layers are more uneven than an initialiser makes them.

    Layers that are drawn anew before a fine-tuning, such as a head, and those that training has hardly moved are in the minority. A few steps that
    are far too large make any weight uneven, so behind such steps nothing is concluded.
    """
    steps = [weight.update_ratio for weight in first.weights if weight.update_ratio is not None]
    if first.step > 0 and steps and statistics.median(steps) > _TOO_LARGE_A_STEP:
        return False
    known = [weight.unevenness for weight in first.weights if weight.unevenness is not None]
    return 3 * sum(unevenness > UNEVEN for unevenness in known) > len(known)


def _closes_both_ways(record: Record) -> bool:
    """Whether the function has two plateaus that N(0, 1) inputs mostly stay off. A ReLU6 or Hardtanh(0, k) has two, but works as a rectifier."""
    two_sided = record.tails == "both" and max(record.normal_low or 0.0, record.normal_high or 0.0) < 0.25
    return two_sided and not (record.output or record.gate)


def _normal(record: Record) -> float:
    return normal_saturated(record.normal_low, record.normal_high)


def _saturated_if_smooth(record: Record, snapshot: Snapshot) -> float | None:
    """`saturated`, but not of piecewise linear functions: there it is 1 - E|f'| / peak, and healthy trained layers reach two thirds."""
    piecewise_linear = _normal(record) + (record.normal_derivative or 0.0) > 0.995
    return record.saturated if _closes_both_ways(record) and not piecewise_linear else None


def _saturated_limit(record: Record) -> float:
    return _normal(record) + 0.3


def _saturated_limit_critical(record: Record) -> float:
    return max(0.5, _normal(record) + 0.45)


def _gates_from_the_start(record: Record, snapshot: Snapshot) -> float | None:
    """`saturated` of the least saturated sigmoid gate of a recurrent layer. It is judged at the first of these gates, so that a layer has one
    alert."""
    if record.kind != "recurrent" or record.activation != "sigmoid" or came_trained(snapshot):
        return None
    layer = record.site.rpartition("/")[0]
    gates = [each for each in snapshot.records if each.activation == "sigmoid" and each.site.rpartition("/")[0] == layer]
    saturated = [each.saturated for each in gates if each.saturated is not None]
    return min(saturated) if gates[0] is record and saturated else None


def _saturated_if_one_sided(record: Record, snapshot: Snapshot) -> float | None:
    return record.saturated if record.tails in ("low", "high") and not record.output else None


def _slope(record: Record, snapshot: Snapshot) -> float | None:
    return record.relative_derivative if _closes_both_ways(record) else None


def _slope_limit(record: Record) -> float:
    return min(0.25, 0.45 * (record.normal_derivative or 1.0))


def _slope_limit_critical(record: Record) -> float:
    return min(0.15, 0.3 * (record.normal_derivative or 1.0))


def _stuck(record: Record, snapshot: Snapshot) -> float | None:
    """`stuck`, once it is known of enough samples; but not of a bottleneck: of fewer than eight units a share says little."""
    if record.output or record.gate or (record.units or 0) < 8 or (record.stuck_n or 0) < STUCK_SAMPLES:
        return None
    return record.stuck


def on_signal_path(record: Record) -> bool:
    """Whether the signal passes through this site on its way to the loss. A gate and the logits of attention stand beside that way."""
    return not (record.output or record.gate or record.kind == "softmax")


def gradient_over_depth(snapshot: Snapshot) -> float | None:
    """||dL/dz|| at a first site over ||dL/dz|| at the last one behind it; None if no two sites with a gradient lie on one path. Where several paths
    begin (a critic behind a `detach` has a first site of its own), the one whose ratio is farthest from 1.

    Norms are compared, not means over elements: where a network pools positions, a mean falls with their number though no gradient is lost.
    """
    ratios = [ratio for record in snapshot.records if (ratio := _over_depth(record, snapshot)) is not None]
    return max(ratios, key=lambda ratio: abs(math.log(ratio)) if ratio else math.inf, default=None)


def _over_depth(record: Record, snapshot: Snapshot) -> float | None:
    """||dL/dz|| at a site with which paths begin over that at their ends; None at any other site.

    Sites are on one path if the signal flows from one to the other. A path ends at a site behind which no other one lies, or from which the output of
    the model is computed directly. Where a site has several ends behind it, its gradient is the sum of what comes from all of them, so it is compared
    with the end that has the largest: the others belong to losses that weigh little.
    """
    if record.site not in snapshot.behind:
        return None
    norms = {r.site: r.grad_z_rms * math.sqrt(r.elements) for r in snapshot.records if r.grad_z_rms is not None and on_signal_path(r)}
    after = {each.site: each.after for each in snapshot.records}
    if record.site not in norms or _nearest(record.site, after, norms):
        return None
    behind: dict[str, set[str]] = {site: set() for site in norms}
    for site in norms:
        for source in _nearest(site, after, norms):
            behind[source].add(site)
    direct = {each.site for each in snapshot.records if each.last}
    reached = _reached(record.site, behind)
    ends = [site for site in reached if not behind[site] or (site in direct and _enters(site, behind, norms))]
    largest = max((norms[site] for site in ends if site != record.site), default=0.0)
    return norms[record.site] / largest if largest else None


def _enters(site: str, behind: Mapping[str, set[str]], norms: Mapping[str, float]) -> bool:
    """Whether the gradient at a site comes from the model's output directly, and not from the sites behind it: they have hardly any. Features that
    the model returns too may have no part in the loss."""
    return norms[site] > _MOST_OF_ONE_LAYER * max(norms[other] for other in behind[site])


_MOST_OF_ONE_LAYER = 30.0
"""A gradient that grows by more from one site to the one before it is taken to come from elsewhere, if it can."""


def _nearest(site: str, after: Mapping[str, Iterable[str]], known: Mapping[str, object]) -> set[str]:
    """The known sites that a site's input comes from with no other known one between. Sites without a gradient are passed over."""
    found, waiting, met = set[str](), list(after[site]), {site}
    while waiting:
        name = waiting.pop()
        if name in met:
            continue
        met.add(name)
        if name in known:
            found.add(name)
        else:
            waiting += after.get(name, ())
    return found


def _reached(site: str, behind: Mapping[str, Iterable[str]]) -> set[str]:
    """A site and all those behind it."""
    found, waiting = set[str](), [site]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += behind[name]
    return found


def _attention_entropy(record: Record, snapshot: Snapshot) -> float | None:
    """The entropy of the median head; None if there are no heads, as in the router of a mixture of experts."""
    entropies = [head.entropy for head in record.heads or () if head.entropy is not None]
    return statistics.median(entropies) if len(entropies) > 1 and not record.output else None


def _step_size(weight: Weight) -> float | None:
    """The size of a step, without weight decay, divided by the learning rate; None for a layer that had nothing to learn from in this step, and for a
    part of a layer, which is judged as a whole."""
    learned = _learned(weight)
    if weight.whole is not None or learned is None or not math.isfinite(learned):
        return None
    if weight.grad_norm is None or not weight.input_n or not weight.learning_rate:
        return None
    return learned / weight.learning_rate


def _learned(weight: Weight) -> float | None:
    """What a step changes beside weight decay, which changes a layer that learns nothing too."""
    return weight.update_ratio if weight.learned_ratio is None else weight.learned_ratio


def _without_decay(weight: Weight) -> str:
    return "" if weight.learned_ratio in (None, weight.update_ratio) else "without weight decay, "


def _relative_update(weight: Weight, snapshot: Snapshot) -> float | None:
    """The step of this layer over the median step of all layers. What a schedule or an optimizer does to all layers alike drops out."""
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
        _saturated_if_smooth,
        _saturated_limit,
        _saturated_limit_critical,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}) is saturated: {percent(value)} of its inputs lie on a plateau "
            f"({percent(r.low)} low, {percent(r.high)} high; limit {percent(limit)}, N(0, 1) inputs give {percent(_normal(r))})"
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
        _saturated_if_one_sided,
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
            f"{w.name}, which feeds {', '.join(w.feeds)}, is frozen: {_without_decay(w)}a step changes it by {_learned(w):.1e} of itself, "
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
        lambda r, value, limit: f"{r.site} ({r.activation}): {value:.0f} of {r.inspected} elements are inf or nan",
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
