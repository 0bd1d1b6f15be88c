"""Why the gradient vanishes, explodes, or is no number; standard library only.

If the gradient vanishes without saturation, each layer passes on gain / g of it. Where the derivative is small even at its peak (1/4 of a sigmoid),
no gain helps, and the cause is the choice of the activation.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from torchsat.causes import advice
from torchsat.causes.closed import of_data, of_offset, open_again, why_shut
from torchsat.causes.growth import GROWN, grown, has_jumped, jumped, shrunk
from torchsat.causes.scene import Scene, Term
from torchsat.causes.size import LARGE, drawn_too_large, implied_gain, of_inputs, of_z
from torchsat.causes.underflow import of_zeros
from torchsat.expressions import gain_for, spoken
from torchsat.flow import heard, on_signal_path
from torchsat.percent import percent
from torchsat.record import Alert, Record, Weight

_SMALL_ENOUGH = 30.0
"""The exponential function of a number of this size is far from the end of the range of float32, and its square is too."""
_SMALL = 0.75
"""A gain is said to be too small below this share of what suits the activation."""


def of_vanishing(alert: Alert, scene: Scene) -> list[Term]:
    """The gradient gets lost on its way back: at flat activations, at weights that are too small, or at closed rectifiers."""
    arrives = [record.grad_a_rms for record in heard(scene.now)]
    if arrives and not any(arrives):
        return [_of_nothing(len(arrives)), *of_zeros(scene)]
    hidden = [record for record in scene.now.records if on_signal_path(record)]
    terms = [*_of_flat(hidden, scene), *_of_small(hidden, scene), *shrunk(scene, [weight for _, weight in scene.layers()])]
    closed = _closed(hidden)
    if closed:
        known = {term.cause for term in terms}
        worst = max(closed, key=lambda record: record.saturated or 0.0)
        found = why_shut(worst, scene) if scene.started else of_offset(closed[0].site, scene)
        terms += [term for term in found if term.cause not in known] or [_of_shut(closed, hidden, scene)]
    elif scene.started:
        terms += _of_steps(terms, scene)
    if not terms:
        terms += [term for record in hidden for term in of_z(record.site, scene)]
    return terms


def _of_nothing(sites: int) -> Term:
    """A loss that does not depend on what the model computes: dL/da is 0 at so many sites."""
    return Term(
        "activation_choice",
        1.0,
        f"dL/da is 0 at each of {sites} sites: the loss does not depend on what they compute",
        "look at what lies between the model and the loss: a softmax over one element gives 1 whatever its input is, and an output that is rounded, "
        "compared or detached passes no gradient",
    )


def _of_steps(others: list[Term], scene: Scene) -> list[Term]:
    """A gradient that did not vanish at the first observation, and steps that were too large. What was there from the start did no harm then."""
    size = max(1.0, 2 * sum(term.size for term in others))
    return [replace(term, is_own=True) for term in jumped(scene, [weight.name for weight in scene.now.weights], size)]


def _of_flat(hidden: list[Record], scene: Scene) -> list[Term]:
    """Activations that pass little of a gradient even at their peak."""
    flat = [record for record in hidden if record.peak is not None and record.peak <= 0.5]
    if len(flat) * 2 <= len(hidden) or scene.trained:
        return []
    peak = statistics.median_low(record.peak for record in flat if record.peak is not None)
    evidence = f"{len(flat)} of {len(hidden)} hidden sites are {flat[0].activation}, which passes at most {peak:.3g} of the gradient at each layer"
    return [Term("activation_choice", -len(flat) * math.log(peak), evidence, advice.rectify(flat, scene))]


def _of_small(hidden: list[Record], scene: Scene) -> list[Term]:
    """Weights that were drawn too small."""
    if scene.trained:
        return []
    first = scene.at_first
    pairs = [(record, first.feeders(record.site)[:1]) for each in hidden if (record := scene.start(each.site)) is not None]
    seen = [(record, weight, (weight.gain or 0.0) / gain_for(record.activation)) for record, feeders in pairs for weight in feeders if weight.gain]
    small = [each for each in seen if each[2] < _SMALL]
    if small:
        size = -sum(math.log(ratio) for *_, ratio in small)
        record, weight, _ = min(small, key=lambda each: each[2])
        verb = "had at first" if scene.started else "has"
        evidence = (
            f"{len(small)} of {len(seen)} layers have less than three quarters of the gain that their activation wants; {spoken(weight.name)} {verb} "
            f"{weight.gain:.3g} for {gain_for(record.activation):.3g}"
        )
        return [Term("init_too_small", size, evidence, advice.draw([each[:2] for each in small], scene))]
    unseen = [(record, gain) for record, feeders in pairs if not feeders and (gain := implied_gain(record, first)) is not None and gain < _SMALL]
    if not unseen:
        return []
    record, _ = min(unseen, key=lambda each: each[1])
    size, what = -sum(math.log(gain) for _, gain in unseen), f"the weights that make z of {spoken(record.site)} are not seen"
    evidence = f"{what}; z had an rms of {record.z_rms:.3g} at the first observation{_coming(record, scene)}"
    return [Term("init_too_small", size, evidence, "draw the weights of these layers larger, by the rule of Xavier or He")]


def _coming(record: Record, scene: Scene) -> str:
    """What comes out of the site before one, at the first observation."""
    source = next((found for name in record.after if (found := scene.start(name)) is not None), None)
    if source is None or source.a_mean is None or source.a_std is None:
        return ""
    return f", where {spoken(source.site)} gives {source.a_mean:.3g} +- {source.a_std:.3g}"


def _closed(hidden: list[Record]) -> list[Record]:
    """The sites with one plateau that have most of their elements on it."""
    return [record for record in hidden if record.tails in ("low", "high") and (record.saturated or 0.0) > 0.7]


def _of_shut(closed: list[Record], hidden: list[Record], scene: Scene) -> Term:
    record = max(closed, key=lambda each: each.saturated or 0.0)
    most = f"{percent(record.saturated or 0.0)} of {spoken(record.site)} lie on its plateau"
    evidence = f"{len(closed)} of {len(hidden)} hidden sites are shut: {most}, with z {record.z_mean or 0.0:.3g} +- {record.z_std or 0.0:.3g}"
    return Term("dead_units", 1.0, evidence, open_again(record, scene))


def of_shrunk(alert: Alert, scene: Scene) -> list[Term]:
    """Weights that have become small, by as much as the rule says (a gain of 0.7 and less of the first one) or by nearly as much."""
    return shrunk(scene, [weight for _, weight in scene.layers()], 0.75)


def of_faded(alert: Alert, scene: Scene) -> list[Term]:
    """An input that the model makes has faded: layers before it have shrunk, units there are shut, or a scale between them has become small."""
    weight = next((each for each in scene.now.weights if each.name == alert.site), None)
    start = next((each for each in scene.first.weights if each.name == alert.site), None)
    terms = of_shrunk(alert, scene)
    if terms or weight is None or start is None or weight.input_rms is None or start.input_rms is None:
        return terms
    hidden = [record for record in scene.now.records if on_signal_path(record)]
    closed = _closed(hidden)
    if closed:
        return [_of_shut(closed, hidden, scene)]
    evidence = (
        f"the input of {spoken(weight.name)} has fallen from an rms of {start.input_rms:.3g} to {weight.input_rms:.3g}, and no layer has shrunk or "
        "is shut: scales that are not measured have become small, such as the weights of norms"
    )
    return [Term("weight_decay", 1.0, evidence, advice.spare_scales())]


def of_exploding(alert: Alert, scene: Scene) -> list[Term]:
    """The gradient grows on its way back, by weights that are or have become too large, or by the size of the signal."""
    terms: list[Term] = []
    large: list[tuple[float, Record, Weight]] = []
    for record in scene.now.records:
        for weight in scene.feeders(record.site)[:1]:
            known, wanted = scene.first_gain(weight.name) or weight.gain or 1.0, gain_for(record.activation)
            gain = weight.gain or known
            if known > 1.1 * wanted:
                large.append((math.log(known / wanted), record, weight))
            if gain > GROWN * known:
                terms += grown(scene, weight, record, math.log(gain / known))
        if not scene.feeders(record.site):
            terms += of_z(record.site, scene)
    if large:
        large.sort(key=lambda each: -each[0])
        terms.append(drawn_too_large(scene, [each[1:] for each in large], sum(each[0] for each in large)))
    terms += of_data(scene)
    return terms or jumped(scene, [weight.name for weight in scene.now.weights], 1.0)


def _was_small(scene: Scene) -> bool:
    """Whether no number was large at the last observation that was finite, and no step too large: then nothing has overflowed by growing."""
    before = replace(scene, now=scene.before)
    sizes = [record.z_absmax or 0.0 for record in scene.before.records]
    return max(sizes, default=math.inf) < _SMALL_ENOUGH and not has_jumped(before, [weight.name for weight in scene.before.weights])


_FAR_LOG_Z = 4.0
"""ln Z has drifted when it is so many times ln C, which it is where all logits are 0."""


def of_nonfinite(alert: Alert, scene: Scene) -> list[Term]:
    """Numbers that overflowed because the signal grew, or that were never finite."""
    broken_from_start = scene.before.step >= scene.now.step
    terms = []
    if not broken_from_start:
        before = replace(scene, now=scene.before)
        terms = [term for term in of_exploding(alert, before) if term.cause != "inputs_unscaled"]
        terms += [
            term
            for weight in scene.first.weights
            if weight.whole is None and weight.data and (weight.input_rms or 0.0) > LARGE
            for term in of_inputs(weight, scene)
        ]
        if not any(term.cause == "weight_growth" for term in terms):
            terms += jumped(before, [weight.name for weight in scene.before.weights], 1.0)
    if terms and not _was_small(scene):
        return terms
    when = ", from the first step on: look at the data" if broken_from_start else ""
    evidence, remedy = f"{spoken(alert.site)} is the first place with inf or nan{when}", advice.finite_inputs()
    record = next((each for each in scene.before.records if each.activation == "log_softmax" and each.log_z_rms is not None), None)
    if record is not None and not broken_from_start and (record.log_z_rms or 0.0) > _FAR_LOG_Z * max(1.0, record.log_keys or 0.0):
        evidence += (
            f"; ln Z of {record.site} had drifted to an rms of {record.log_z_rms:.3g}, where ln of the number of classes is {record.log_keys:.3g}"
        )
        remedy = advice.with_z_loss(remedy)
    return [Term("numeric_range", 1.0, evidence, remedy)]
