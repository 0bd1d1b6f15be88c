"""Why a site with two plateaus is saturated, whatever it is for: a hidden layer, an output of the model, a gate, a softmax; standard library only.

An output saturates because it is asked to, or because a step threw it there. What its gradient says tells the two apart: where the elements on the
plateau are asked to go on in the same direction (`Record.trapped` is near 0) though they are at the end of the function's range, what is asked for
lies beyond that range, and no weights can give it. Where they are asked to come back, they were thrown.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torchsat.causes import advice
from torchsat.causes.ceiling import cap, ceiling_told, of_weights
from torchsat.causes.closed import of_data
from torchsat.causes.growth import GROWN, grown
from torchsat.causes.scene import HOT, Scene, Term, is_shifted
from torchsat.causes.size import LARGE, of_z
from torchsat.expressions import spoken
from torchsat.loss_functions import OF_LOGITS, still_asks, takes_squares
from torchsat.percent import percent
from torchsat.record import Alert, Record

_CONTENT = 0.1
"""Below this share of trapped demand an output is not held back from leaving its plateau."""
_CONTENT_OF_RECTIFIER = 0.6
_INSISTS = 0.3
"""The gradient at an output is said not to have fallen when it is still this many times what it was at the first observation."""


def of_size(alert: Alert, scene: Scene) -> list[Term]:
    """A site with two plateaus is saturated: its z is too large, or its mean has drifted."""
    record = scene.record(alert.site)
    if record is None:
        return []
    if record.kind == "softmax":
        return of_attention(alert, scene)
    if record.output and _is_asked_beyond_range(record, scene):
        return [_beyond_range(record, scene)]
    terms = of_z(alert.site, scene)
    terms += _of_what_has_grown(record, sum(term.size for term in terms if term.cause == "weight_growth"), scene)
    if terms or scene.trained:
        return terms
    return _of_drift(record, scene)


def _of_what_has_grown(record: Record, known: float, scene: Scene) -> list[Term]:
    """The rest of the growth of z at a site that was open at the first observation: gain and alignment may each have grown too little to be told.

    `known`: how much of it is told already.
    """
    start, feeders = scene.start(record.site), scene.feeders(record.site)
    if not scene.started or start is None or not (start.z_rms and record.z_rms) or (start.saturated or 0.0) > 0.5 * (record.saturated or 0.0):
        return []
    size = math.log(record.z_rms / start.z_rms) - known
    return grown(scene, feeders[0] if feeders else None, record, size) if size > math.log(GROWN) / 2 else []


def _of_drift(record: Record, scene: Scene) -> list[Term]:
    """A site of whose saturation neither gain nor input nor alignment is the cause."""
    feeders = scene.feeders(record.site)
    jump = scene.jump([weight.name for weight in feeders or scene.now.weights])
    if scene.started and ((jump is not None and jump.ratio >= HOT) or record.output or record.gate or record.kind == "recurrent"):
        terms = grown(scene, feeders[0] if feeders else None, record, 1.0)
        if terms:
            return terms
    if record.output or record.gate or record.kind == "recurrent":
        return []
    flat = advice.flat(scene)
    if is_shifted(record):
        where = f"{record.z_mean:.3g} +- {record.z_std or 0.0:.2g}"
        evidence = f"z of {spoken(record.site)} has drifted to {where}: behind outputs that are not centred it acts as a bias"
    elif record.a_mean is not None and not any(weight.data for weight in feeders):
        slope = percent(record.relative_derivative or 0.0)
        evidence = f"gain and input of {spoken(record.site)} are as they should be, and yet its mean derivative is {slope} of its peak"
    else:
        return grown(scene, feeders[0] if feeders else None, record, 1.0)
    return [Term("activation_choice", 1.0, evidence, advice.rectify(flat if record in flat else [record], scene))]


def _is_asked_beyond_range(record: Record, scene: Scene) -> bool:
    """Whether the elements of an output that lie on a plateau are asked for more than the function can give, and go on being asked."""
    start = scene.start(record.site) if scene.started else record
    blocked, trapped = record.blocked, record.trapped
    if start is None or not start.grad_a_rms or record.grad_a_rms is None or blocked is None or trapped is None:
        return False
    if takes_squares(record) and blocked - trapped > trapped and still_asks(record, start.grad_a_rms):
        return True
    if not scene.started or blocked < 0.5:
        return False
    # A rectifier has elements that it has thrown to 0 beside those that are asked for less than 0.
    if trapped > (_CONTENT if record.tails == "both" else _CONTENT_OF_RECTIFIER) * blocked:
        return False
    return record.grad_a_rms > _INSISTS * start.grad_a_rms


def _beyond_range(record: Record, scene: Scene) -> Term:
    start = scene.start(record.site)
    given = f"{spoken(record.site)} gives {record.a_mean or 0.0:.3g} +- {record.a_std or 0.0:.3g}"
    if takes_squares(record):
        evidence = (
            f"{given}, and the targets lie beyond the range of {record.activation}: {percent(record.blocked or 0.0)} of the gradient's demand falls "
            f"to its plateaus, and only {percent(record.trapped or 0.0)} asks to leave them"
        )
    else:
        evidence = (
            f"{given}, at the end of the range of {record.activation}, and is asked for more: its gradient dL/da is {record.grad_a_rms or 0.0:.3g}, "
            f"and was {(start or record).grad_a_rms or 0.0:.3g} at the first observation"
        )
    return Term("activation_choice", 1.0, evidence, advice.linear_output(record))


def of_logits(alert: Alert, scene: Scene) -> list[Term]:
    """Values between two bounds that the loss takes for logits: the function is one too many."""
    record = scene.record(alert.site)
    if record is None or record.a_min is None or record.a_max is None:
        return []
    loss = next((each for each in record.losses if each in OF_LOGITS), "softmax")
    evidence = (
        f"{OF_LOGITS[loss]}, and what it is given is {spoken(record.site)}, which {record.activation} keeps between {record.a_min:.3g} and "
        f"{record.a_max:.3g}"
    )
    return [Term("activation_choice", 1.0, evidence, advice.plain_logits(record, loss))]


def of_attention(alert: Alert, scene: Scene) -> list[Term]:
    """Logits that vary so much within a row that one key takes all of the weight."""
    record = scene.record(alert.site)
    if record is None or record.logit_std is None:
        return []
    start = scene.start(record.site)
    was = start.logit_std if start is not None and scene.started else None
    feeders = [weight for weight in scene.feeders(record.site) if weight.gain]
    jump = scene.jump([weight.name for weight in feeders or scene.now.weights])
    rate = next((weight.learning_rate for weight in scene.now.weights if jump is not None and weight.name == jump.weight), None)
    # One fault mostly makes the weights of many blocks too large, and a cure of one block would leave the others as they are.
    softmaxes = [record, *(each for each in scene.now.records if each.kind == "softmax" and each is not record and not each.output)]
    large = [
        (each, weight)
        for each in softmaxes
        for weight in scene.feeders(each.site)
        if weight.gain and (scene.first_gain(weight.name) or weight.gain) > LARGE
    ]
    then = f" (at the first observation by {was:.3g})" if was is not None else ""
    evidence = (
        f"the logits of {spoken(record.site)} vary by {record.logit_std:.3g} within a row{then}; beyond sqrt(2 ln T), with ln T = "
        f"{record.log_keys or 0.0:.3g}, one key takes all"
    )
    update, grew = jump.ratio if jump else 0.0, ceiling_told(record, start) if scene.started else None
    if grew is not None:
        evidence += f"; {grew}"
    if grew is None or large or scene.trained or update > advice.GOOD_UPDATE:
        remedy = advice.smaller_logits(record, large, scene, update, rate)
    else:
        remedy = cap(record, scene)
    terms = [Term("softmax_logits", 1.0, evidence, remedy)]
    # Inputs that are far too large make large logits, whatever the weights are.
    terms += [replace(term, size=2.0) for term in of_data(scene)]
    if was and record.logit_std > GROWN * was:
        most = min(0.9, math.log(record.logit_std / was))
        terms += of_weights(record.site, scene, most) or grown(scene, feeders[0] if feeders else None, None, most)
    return terms
