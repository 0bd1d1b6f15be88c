"""Why an alert fires: its causes, ranked, from what was measured; standard library only.

Each kind of damage has a file: `size.py` (z is too large), `closed.py` (units that never leave their plateau), `gradient.py` (it vanishes, explodes,
or is no number), `underflow.py` (it is too small for its type), `outputs.py` (what an output or a softmax is asked for), `ceiling.py` (logits that
grow), `routing.py` (experts that get no tokens). Each gives terms, a name with a size and with the figures that speak for it; `growth.py` has the
terms of what training has changed. Here they are ranked. What to try is in `advice.py`. `rate.py` finds a learning rate that rose just before.

Every figure in an evidence text is a field of a record, a layer or a number format as it stands in a snapshot, so that a reader can look it up.

The explanation is given for the first site, in the order of data flow, that is beyond a limit. Sites behind it may suffer from the same.

A network whose weights came trained (`came_trained`) was not initialised by this run. What would be blamed on an initialisation is then the size that
an earlier training gave the weights, hence growth, and no remedy draws weights anew, sets biases to 0 or replaces an activation: that would destroy
what the network knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torchsat.cause import Cause
from torchsat.causes import advice
from torchsat.causes.ceiling import of_growth
from torchsat.causes.closed import of_closed, of_dormant
from torchsat.causes.gradient import of_exploding, of_faded, of_nonfinite, of_shrunk, of_vanishing
from torchsat.causes.outputs import of_attention, of_logits, of_size
from torchsat.causes.rate import rise_before
from torchsat.causes.routing import of_experts
from torchsat.causes.scene import Moment, Scene, Term, remember, upstream_of
from torchsat.causes.underflow import of_underflow
from torchsat.record import Alert

__all__ = ["Moment", "Scene", "explain", "remember", "upstream_of"]

_LEAST_OF_BLAME = 0.05
"""Causes with a smaller share of the blame are not told."""
_MOST = 100.0
"""The largest size of a term. A number that has overflowed would have an infinite size, and the shares would not add up."""
_OF_THE_WAY = ("vanishing_gradient", "exploding_gradient")
"""The rules about what the gradient loses or gains on its way. The ledger of the gradient is evidence for their causes."""
_INITIAL = ("inputs_uncentred", "inputs_unscaled", "init_too_large", "init_too_small")
"""Causes that were there before training began."""


def explain(alert: Alert, scene: Scene) -> tuple[Cause, ...]:
    """The causes of an alert, the largest first, with shares that add up to 1. Empty if nothing that was measured explains it.

    Where a learning rate rose at once just before, the evidence says so: that of weight_growth, or else that of the first cause.
    """
    rise = rise_before(scene.moments, alert.since)
    if alert.since <= scene.first.step:
        # The condition was there from the start, so the change of the weights since then is not its cause.
        at_first = scene.at_first
        scene = at_first if alert.rule != "nonfinite" else replace(at_first, before=scene.before)
    found = [replace(term, size=min(term.size, _MOST)) for term in _EXPLAIN.get(alert.rule, _of_saturated)(alert, scene)]
    terms = _without_consequences(found)
    merged: dict[str, Term] = {}
    for term in sorted((term for term in terms if term.size > 0), key=lambda term: -term.size):
        known = merged.get(term.cause)
        merged[term.cause] = term if known is None else replace(known, size=known.size + term.size)
    total = sum(term.size for term in merged.values())
    kept = sorted((term for term in merged.values() if term.size >= _LEAST_OF_BLAME * total), key=lambda term: -term.size)
    whole = sum(term.size for term in kept)
    beside = next((term for term in kept if term.cause == "weight_growth"), kept[0] if kept else None)
    told = [replace(term, evidence=f"{term.evidence}; {rise.told(alert.since)}") if rise and term is beside else term for term in kept]
    ledger = scene.now.ledger if alert.rule in _OF_THE_WAY else None
    if told and ledger is not None and ledger.told is not None:
        told[0] = replace(told[0], evidence=f"{told[0].evidence}; {ledger.told}")
    return tuple(Cause(term.cause, term.size / whole, term.evidence, term.remedy) for term in told)


def _without_consequences(terms: list[Term]) -> list[Term]:
    """Blame growth for at most half of what the start is blamed for: where a network was wrong from the start, its weights grow because of that. A
    lower learning rate alone would then not make it sound."""
    initial = sum(term.size for term in terms if term.cause in _INITIAL)
    follows = [term for term in terms if term.cause == "weight_growth" and not term.is_own]
    grown = sum(term.size for term in follows)
    if initial < 1 or not grown:
        return terms
    least = min(1.0, initial / 2 / grown)
    told = advice.first_the_others()
    return [replace(term, size=term.size * least, remedy=told) if term in follows else term for term in terms]


def _of_saturated(alert: Alert, scene: Scene) -> list[Term]:
    """A site with two plateaus, or an output, is explained by the size of its z, and one with a single plateau by what has closed it."""
    record = scene.record(alert.site)
    return of_closed(alert, scene) if record is not None and record.tails in ("low", "high") and not record.output else of_size(alert, scene)


_EXPLAIN: Mapping[str, Callable[[Alert, Scene], list[Term]]] = {
    "saturated": _of_saturated,
    "stuck_units": of_closed,
    "dormant_units": of_dormant,
    "vanishing_gradient": of_vanishing,
    "frozen_weights": of_vanishing,
    "shrunk_weights": of_shrunk,
    "faded_input": of_faded,
    "exploding_gradient": of_exploding,
    "nonfinite": of_nonfinite,
    "underflow": of_underflow,
    "attention_collapse": of_attention,
    "logit_growth": of_growth,
    "bounded_logits": of_logits,
    "expert_collapse": of_experts,
}
"""Which function explains the alerts of which rule. A rule of the user's is explained like one of size."""
