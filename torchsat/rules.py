"""The table of rules: which number of a site or layer is judged, against which limits, and how the alert says it; standard library only.

A rule is one row of RULES. Rows of the same name are several criteria of one rule, and at one place at most one alert of a rule fires. The judge
(judge.py) holds the rules against each observation and decides when an alert is raised and cleared.

Where the limits come from:

- Which numbers say that saturation harms, and their limits, is in harm.py.
- The limits of the gradient are the range of float16.
- Attention has collapsed when each query looks at a single key (Zhai et al. 2023), and not at the one that the gradient asks for. Where no gradient
  is seen, the entropy tells: heads that put four fifths of their weight on the first key are common in healthy models, and theirs is near 0.27.
- Units that fall asleep in training are those of Sokar et al. (2023), who recycle each at a fortieth of the mean size of its layer. How many of them
  are too many is what healthy networks do not reach while most of the gradient is lost (harm.dormant).
- A gradient underflows where the type has flushed 5 % of it: the speech model of Micikevicius et al. 2018 (Mixed Precision Training, section 3.1)
  lost that many of its updates to float16 and did not train. Critical is where half of what is left is the smallest number of the type (ours). The
  share is estimated (number_formats.py::FormatUse.lost), and only measured where the user has asked for "formats".
- Logits of attention that grow beyond 100 are cut off by QK-clip (Kimi Team 2025), whose authors saw spikes of the loss beyond 1000; beyond 1e4 every
  run of Wortsman et al. (2023) diverged. Published networks have large logits too, so that only growth during the run counts.
- A rectifier is sparse by design: networks with 90 % zeros train well, and healthy ones have half of their units dead. Of functions with one
  plateau only stuck units and a layer that is closed as a whole are reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torchsat import harm
from torchsat.experts import COLLAPSED, Experts
from torchsat.flow import idle_in_mixtures, median_step, nothing_arrives, over_depth, shallow, step_size
from torchsat.number_formats import most_lost
from torchsat.percent import percent
from torchsat.record import Record, Severity, Snapshot, Weight

Item = Record | Weight | Experts
"""What a rule judges."""
HYSTERESIS = 0.8
"""An alert clears only on the safe side of this factor times its limit, so that a value close to the limit does not raise and clear it in turns."""


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
        over: whether records, weights or mixtures of experts are judged.
        first: the rule is judged only in this many first observations, and after that only where it fires. None: always.
        compares: `value` takes a third argument, a `Start`: the record or weight as it was at the first observation.
    """

    name: str
    value: Callable[..., float | None]
    warning: float | Callable[[Any], float | None] | None
    critical: float | Callable[[Any], float | None] | None
    says: Callable[[Any, float, float], str]
    below: bool = False
    patience: int = 3
    over: Literal["records", "weights", "experts"] = "records"
    first: int | None = None
    compares: bool = False

    def limit(self, severity: Severity, item: Item) -> float | None:
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


def _attention_entropy(record: Record, snapshot: Snapshot) -> float | None:
    """The entropy of the median head, where no gradient is seen; None if there are no heads, as in the router of a mixture of experts."""
    if record.blocked is not None or harm.routes(record, snapshot):
        return None
    entropies = [head.entropy for head in record.heads or () if head.entropy is not None]
    return statistics.median(entropies) if len(entropies) > 1 and not record.output else None


def _relative_update(weight: Weight, snapshot: Snapshot) -> float | None:
    """The step of this layer over the median step of all layers. What a schedule or an optimizer does to all layers alike drops out."""
    mine, median = step_size(weight), median_step(snapshot)
    return None if mine is None or median is None or weight.name in idle_in_mixtures(snapshot) else mine / median


def _underflow(record: Record, snapshot: Snapshot) -> float | None:
    """How much of the gradient the format has flushed in which it lies in memory, by estimate; None where this is not measured."""
    use = most_lost(snapshot.formats_at.get(record.site, ()))
    return None if use is None else use.lost


def _nonfinite(record: Record, snapshot: Snapshot) -> float:
    return float(record.nonfinite)


def _nonfinite_grad(record: Record, snapshot: Snapshot) -> float:
    return float(record.grad_nonfinite)


def _says_share(record: Record, value: float, limit: float) -> str:
    return (
        f"{record.site} ({record.activation}) is saturated: {percent(value)} of its inputs lie on a plateau "
        f"(limit {percent(limit)}, normal {percent(harm.normal(record))})"
    )


def _says_slope(record: Record, value: float, limit: float) -> str:
    return (
        f"{record.site} ({record.activation}) is saturated: its mean derivative is {percent(record.relative_derivative or 0.0)} of the peak (limit "
        f"{percent(limit)})"
    )


def _fed_by(weight: Weight) -> str:
    """A layer and what it feeds. The gates of a recurrent layer, or the branches of a block, are not all named."""
    return f"{weight.name}, which feeds {weight.feeds[0]}{f' and {len(weight.feeds) - 1} more' if len(weight.feeds) > 1 else ''}"


def _says_shrunk(weight: Weight, value: float, limit: float) -> str:
    return f"{_fed_by(weight)}, has shrunk to {percent(value)} of its first gain (limit {percent(limit)})"


def _says_gates_at_start(record: Record, value: float, limit: float) -> str:
    return (
        f"{record.site.rpartition('/')[0]} is saturated before it has learned anything: at least {percent(value)} of the inputs of each of its gates "
        f"lie on a plateau (limit {percent(limit)})"
    )


_AT_START = 3
"""How many observations count as the start of a run."""
RULES: tuple[Rule, ...] = (
    Rule(
        "saturated",
        harm.share_at_start,
        harm.share_limit,
        harm.share_limit_critical,
        _says_share,
        first=_AT_START,
    ),
    Rule(
        "saturated",
        harm.slope_at_start,
        harm.slope_limit,
        harm.slope_limit_critical,
        _says_slope,
        below=True,
        first=_AT_START,
    ),
    Rule("saturated", harm.share_unseen, harm.share_limit, harm.share_limit_critical, _says_share, compares=True),
    Rule("saturated", harm.slope_unseen, harm.slope_limit, harm.slope_limit_critical, _says_slope, below=True, compares=True),
    Rule(
        "saturated",
        harm.blocked,
        harm.blocked_limit,
        harm.blocked_limit_critical,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}) is saturated: {percent(r.saturated)} of its inputs lie on a plateau, and {percent(value)} of the "
            f"gradient is lost there (limit {percent(limit)})"
        ),
        compares=True,
    ),
    Rule(
        "saturated",
        harm.trapped,
        harm.trapped_limit,
        harm.trapped_limit_critical,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}) is saturated: {percent(r.saturated)} of its inputs lie on a plateau, and {percent(value)} of the "
            f"gradient asks them to leave it (limit {percent(limit)})"
        ),
        compares=True,
    ),
    Rule("saturated", harm.slope, harm.slope_limit_in_training, harm.slope_limit_critical_in_training, _says_slope, below=True),
    Rule(
        "saturated",
        harm.closed,
        None,
        0.99,
        lambda r, value, limit: f"{r.site} ({r.activation}) is closed: {percent(value)} of its inputs lie on its plateau (limit {percent(limit)})",
    ),
    Rule(
        "saturated",
        harm.leaving_output,
        0.3,
        0.6,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}), an output, is stuck: {percent(value)} of its elements lie on a plateau that the gradient asks them to leave "
            f"(limit {percent(limit)})"
        ),
    ),
    Rule(
        "saturated",
        harm.unsatisfied,
        0.65,
        None,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}), an output, is at the end of its range: {percent(r.saturated)} of its elements lie on a plateau, and the "
            f"gradient asks for more, at {percent(value)} of its first size (limit {percent(limit)})"
        ),
        compares=True,
    ),
    Rule(
        "saturated",
        harm.beyond_range,
        0.1,
        None,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}), an output, is asked for values beyond its range: {percent(value)} of the gradient pushes elements "
            f"on a plateau further (limit {percent(limit)})"
        ),
        compares=True,
    ),
    Rule(
        "bounded_logits",
        harm.range_of_logits,
        4.0,
        2.0,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}), an output, goes into a loss that takes logits, which must not be bounded: its values lie between "
            f"{r.a_min:.3g} and {r.a_max:.3g} (they differ by {value:.2g}, limit {limit:g})"
        ),
        below=True,
        patience=1,
    ),
    Rule(
        "saturated",
        harm.gate_with_gradient,
        harm.gate_limit,
        None,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}), a gate, is stuck: {percent(r.blocked)} of the gradient is lost on its plateaus, and {percent(value)} "
            f"asks to leave them (limit {percent(limit)})"
        ),
        compares=True,
    ),
    Rule("saturated", harm.gates_at_start, 1 / 3, 0.6, _says_gates_at_start, first=_AT_START),
    Rule(
        "saturated",
        harm.shut_at_start,
        0.9,
        None,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}), a gate, is shut before it has learned anything: {percent(value)} of its inputs lie on the low plateau "
            f"(limit {percent(limit)})"
        ),
        first=_AT_START,
    ),
    Rule(
        "saturated",
        harm.gates,
        0.6,
        0.85,
        lambda r, value, limit: (
            f"{r.site.rpartition('/')[0]} is saturated: at least {percent(value)} of the inputs of each of its gates lie on a plateau "
            f"(limit {percent(limit)})"
        ),
        compares=True,
    ),
    Rule(
        "saturated",
        harm.hidden_state,
        0.75,
        0.9,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}) is saturated: {percent(value)} of its inputs lie on a plateau at each step of the sequence "
            f"(limit {percent(limit)})"
        ),
        compares=True,
    ),
    Rule(
        "stuck_units",
        harm.stuck,
        harm.stuck_limit,
        harm.stuck_limit_critical,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}): {percent(value)} of its {r.units} units are {'dead' if r.tails == 'low' else 'stuck on a plateau'} "
            f"(in {r.stuck_n} samples; limit {percent(limit)})"
        ),
        patience=1,
    ),
    Rule(
        "dormant_units",
        harm.dormant,
        harm.dormant_limit,
        harm.dormant_limit_critical,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}): {percent(value)} of its {r.units} units are dormant (limit {percent(limit)}): their mean size is at most a "
            f"fortieth of that of the layer{'' if r.blocked is None else f', and {percent(r.blocked)} of the gradient is lost on its plateau'}"
        ),
        patience=5,
        compares=True,
    ),
    Rule(
        "vanishing_gradient",
        over_depth,
        1e-3,
        1e-6,
        lambda r, value, limit: (
            f"the gradient vanishes: at {r.site}, the first site, the norm of dL/dz is {value:.1e} of what it is at the last (limit {limit:.0e})"
        ),
        below=True,
    ),
    Rule(
        "vanishing_gradient",
        shallow,
        0.1,
        None,
        lambda r, value, limit: (
            f"the gradient vanishes: at {r.site}, the first site, a step changes the weights by {value:.1e} of what it changes those of the last "
            f"(limit {limit:.0e}), and its input has stayed as it was at the start"
        ),
        below=True,
        compares=True,
    ),
    Rule(
        "vanishing_gradient",
        nothing_arrives,
        None,
        1.0,
        lambda r, value, limit: f"no gradient arrives: from the start, dL/da is exactly 0 at {r.site} and at every other site that has a gradient",
        first=_AT_START,
    ),
    Rule(
        "exploding_gradient",
        over_depth,
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
            f"{_fed_by(w)}, is frozen: {'without weight decay, ' if w.decays else ''}a step changes it by "
            f"{w.learned:.1e} of itself, {value:.1e} of what the median layer gets (limit {limit:.0e})"
        ),
        below=True,
        over="weights",
    ),
    Rule(
        "shrunk_weights",
        harm.shrunk,
        0.5,
        0.1,
        lambda w, value, limit: (
            f"{_says_shrunk(w, value, limit)}: a step changes it by "
            f"{w.update_ratio:.1e} of itself{f', and without weight decay by {w.learned_ratio:.1e}' if w.decays else ''}"
        ),
        below=True,
        over="weights",
        compares=True,
    ),
    Rule(
        "shrunk_weights",
        harm.shrunk_by_decay,
        0.7,
        0.1,
        lambda w, value, limit: (
            f"{_says_shrunk(w, value, limit)}: weight decay takes "
            f"{percent(harm.taken_by_decay(w) or 0.0)} off it in each step, and momentum multiplies that"
        ),
        below=True,
        over="weights",
        compares=True,
    ),
    Rule(
        "faded_input",
        harm.faded_input,
        0.1,
        0.01,
        lambda w, value, limit: (
            f"{_fed_by(w)}, has lost its input: its rms is {w.input_rms:.3g}, {percent(value)} of what it was at the "
            f"first observation (limit {percent(limit)})"
        ),
        below=True,
        over="weights",
        compares=True,
    ),
    Rule(
        "underflow",
        _underflow,
        0.05,
        0.2,
        lambda r, value, limit: (
            f"{r.site} ({r.activation}): its gradient underflows: so many of its elements are the smallest number of their type that about "
            f"{percent(value)} of those that were not 0 have become 0 (limit {percent(limit)})"
        ),
    ),
    Rule(
        "attention_collapse",
        _attention_entropy,
        0.15,
        0.03,
        lambda r, value, limit: (
            f"{r.site}: the attention has collapsed: half of its {len(r.heads)} heads have an entropy of {percent(value)} of ln T or less "
            f"(limit {percent(limit)})"
        ),
        below=True,
    ),
    Rule(
        "attention_collapse",
        harm.leaving_rows,
        0.2,
        0.4,
        lambda r, value, limit: (
            f"{r.site}: the attention has collapsed: in its worst head {percent(value)} of the rows look at one key alone, and the gradient asks "
            f"for another one (limit {percent(limit)})"
        ),
    ),
    Rule(
        "expert_collapse",
        harm.dead_experts,
        0.25,
        0.5,
        lambda e, value, limit: (
            f"{e.site}: the experts have collapsed: {e.dead} of {e.experts} get less than a twentieth of an even share of the tokens (limit "
            f"{percent(limit)}), and the busiest gets {percent(max(e.load))} of all choices, where {percent(1 / e.experts)} is even"
        ),
        over="experts",
    ),
    Rule(
        "expert_collapse",
        harm.one_expert,
        COLLAPSED,
        None,
        lambda e, value, limit: (
            f"{e.site}: the experts have collapsed: one of {e.experts} gets {percent(max(e.load) * e.k)} of the tokens, where "
            f"{percent(e.k / e.experts)} is even ({percent(value)} of the way to all; limit {percent(limit)})"
        ),
        over="experts",
    ),
    Rule(
        "logit_growth",
        harm.logit_growth,
        100.0,
        1000.0,
        lambda r, value, limit: f"{r.site}: the logits grow: the largest is {value:.3g} (limit {limit:g})",
        # A single batch may have an outlier, and attention that collapses at once is told by the rule of that.
        patience=5,
        compares=True,
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
