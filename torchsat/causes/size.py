"""Why z is too large at a site: the sum of ln RMS(z); standard library only.

The size of a pre-activation is RMS(z) = gain x RMS of the input x alignment. This is exact up to the bias, and defines the alignment. Let s be the
size at which 5 % of the values of a centred normal z lie in a tail, and g the gain that suits the activation. Then

    ln(RMS(z) / s) = ln(gain / g) + ln(input RMS) + ln(alignment) + ln(g / s)

so how much z is too large is a sum of terms. The last one is a constant of the activation. Of the others each positive one is blamed in proportion to
its size:

- The gain is split into its value at the first observation (the initialisation) and what it has become since (growth).
- The input, if it is the model's own, is split into the offset that all samples share (un-centred) and what varies between samples (un-scaled). The
  two factors multiply: an offset of 130 over a spread of 4 makes the input 32.5 times as large, and the spread makes it 4 times as large.
- The alignment is split into its value at the first observation, where nothing is learned yet (a bias, or a factor in the code), and growth since.
- Where the input comes from an unbounded activation and nothing has rescaled it, the terms of the layers before are added.

Weights that cannot be seen (those of a layer of the user's own, of a parametrization) are no reason to take them for sound. There the sum has two
terms: the size that z had at the first observation, and how it has grown since. The same holds where something between the layer and the activation,
such as a norm, has made z much smaller than gain and input would.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torchsat.causes import advice
from torchsat.causes.growth import GROWN, cure, grown
from torchsat.causes.scene import Scene, Term, is_shifted, upstream_of
from torchsat.expressions import gain_for, owner, spoken
from torchsat.percent import percent
from torchsat.record import Record, Weight

UNBOUNDED = ("relu", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish")
"""Activations whose output grows with their input, so that too large a signal passes on to the next layer."""
LARGE = 1.4
"""A gain is said to be too large from this many times on what suits the activation. Xavier's initialisation of a layer that narrows gives up to
sqrt(2)."""
_RESCALED = 0.5
"""Where z is below this share of what gain and input would make, something between them has rescaled it."""


def of_z(site: str, scene: Scene, met: frozenset[str] = frozenset()) -> list[Term]:
    """The positive terms of ln RMS(z) at a site, and those of the layers before it that pass their size on. `met`: the sites already added."""
    record, feeders = scene.record(site), scene.feeders(site)
    if record is None or site in met:
        return []
    if not feeders or _is_rescaled(record, feeders[0], scene):
        return _of_unseen(record, scene)
    weight = feeders[0]
    terms = [*_of_gain(record, weight, scene), *_of_alignment(record, weight, scene)]
    rms = weight.input_rms
    if not rms:
        return terms + _of_unseen_input(record, weight, scene)
    if weight.data:
        return terms + of_inputs(weight, scene)
    sources = [scene.record(name) for name in record.after]
    flowing = [source for source in sources if source is not None and source.activation in UNBOUNDED and _flows(source, rms)]
    for source in flowing:
        terms += of_z(source.site, scene, met | {site})
    return terms if flowing else terms + _of_made_input(site, weight, rms, scene)


def _of_made_input(site: str, weight: Weight, rms: float, scene: Scene) -> list[Term]:
    """Of an input that the model itself makes, as by a branch that adds up, which is too large. What it was at the first observation was made by
    weights that were drawn too large, if there are any; what it has become since was made by weights that have grown."""
    known = (scene.first_input(weight.name) if scene.started else None) or rms
    what, terms = f"the input of {spoken(weight.name)}, which the model itself makes,", list[Term]()
    if known > GROWN:
        before = upstream_of(site, scene.now.records)
        large = [pair for pair in scene.at_first.layers() if before & set(pair[1].feeds) and advice.too_large(*pair, LARGE) and not pair[1].whole]
        evidence = f"{what} has an rms of {known:.3g} where 1 is expected"
        made = Term("inputs_unscaled", math.log(known), evidence, advice.shrink_inside(weight))
        terms.append(drawn_too_large(scene, large, made.size) if large and not scene.trained else made)
    if rms > GROWN * known:
        jump = scene.jump([each.name for each in scene.now.weights])
        evidence = f"{what} has grown from an rms of {known:.3g} to {rms:.3g}"
        terms.append(Term("weight_growth", math.log(rms / known), evidence, cure(scene, None, jump)))
    return terms


def of_inputs(weight: Weight, scene: Scene) -> list[Term]:
    """Of the model's own input: the offset that all samples share, and the scale of what is left."""
    rms = weight.input_rms or 0.0
    if rms <= LARGE:
        return []
    centred = 1.0 if weight.input_centred_share is None else weight.input_centred_share
    total = math.log(rms)
    offset = min(total, -0.5 * math.log(centred) if centred else math.inf)
    terms = []
    if offset > 0:
        term = uncentred(weight, centred, offset, scene)
        # Inputs that vary by less than 1 are compared with inputs that vary by 1: of those that hardly vary, the factor has no end.
        than = " as inputs that vary by 1 would" if offset == total else ""
        factor = rms if offset == total else 1 / math.sqrt(centred)
        terms.append(replace(term, evidence=f"{term.evidence}: the offset alone makes z {factor:.3g} times as large{than}"))
    if total - max(offset, 0.0) > 0:
        varies = rms * math.sqrt(centred)
        name = spoken(weight.name)
        evidence = f"the input of {name} has an rms of {rms:.3g}; it should vary by about 1"
        if centred < 0.99:
            evidence = (
                f"samples of the input of {name} differ by {varies:.3g}, where about 1 is expected: that alone makes z {varies:.3g} times as large"
            )
        terms.append(Term("inputs_unscaled", total - max(offset, 0.0), evidence, advice.standardise(weight, scene)))
    return terms


def uncentred(weight: Weight, centred: float, size: float, scene: Scene) -> Term:
    """An offset that all samples of the model's own input share. Both sizes are an rms over features."""
    rms, name = weight.input_rms or 0.0, spoken(weight.name)
    evidence = f"samples of the input of {name} share an offset of {rms * math.sqrt(1 - centred):.3g} and differ by {rms * math.sqrt(centred):.3g}"
    if not math.isfinite(rms):
        evidence = f"{percent(1 - centred)} of the mean square of the input of {name} is an offset that all samples share"
    return Term("inputs_uncentred", size, evidence, advice.standardise(weight, scene))


def _of_gain(record: Record, weight: Weight, scene: Scene) -> list[Term]:
    """Of the gain: what the initialisation made too large, and what it has grown since."""
    gain = weight.gain or 0.0
    known = scene.first_gain(weight.name) or gain
    wanted = gain_for(record.activation)
    terms = []
    if known > LARGE * wanted:
        size = math.log(min(known, max(gain, wanted)) / wanted)
        terms.append(drawn_too_large(scene, [(record, weight)], size))
    if gain > GROWN * known:
        terms += grown(scene, weight, record, math.log(gain / known))
    return terms


def drawn_too_large(scene: Scene, worst: list[tuple[Record, Weight]], size: float) -> Term:
    """Weights that are too large at the first observation. `worst`: the layers that the term is of; the first one is named.

    The remedy treats all layers of the network whose weights are too large.
    """
    record, weight = worst[0]
    known, wanted = scene.first_gain(weight.name) or weight.gain or 0.0, gain_for(record.activation)
    more = f", and {len(worst) - 1} more layers are too large" if len(worst) > 1 else ""
    verb = "had at first" if scene.started else "has"
    evidence = f"{spoken(weight.name)} {verb} a gain of {known:.3g} (rms(W) sqrt(fan_in)) where {record.activation} wants {wanted:.3g}{more}"
    if scene.trained:
        return Term("weight_growth", size, f"{evidence}; the weights came trained", advice.AS_TRAINED)
    named = {each.name for _, each in worst}
    layers = [pair for pair in scene.at_first.layers() if advice.too_large(*pair, LARGE) or pair[1].name in named]
    return Term("init_too_large", size, evidence, advice.draw(layers or worst, scene))


def _alignment(record: Record | None, weight: Weight | None) -> float | None:
    """What neither gain nor input explain of the size of z; None where it is not known."""
    if record is None or weight is None or not (weight.input_rms and weight.gain and record.z_rms):
        return None
    return record.z_rms / (weight.gain * weight.input_rms)


def _first_alignment(record: Record, weight: Weight, scene: Scene) -> float | None:
    first = next((each for each in scene.first.weights if each.name == weight.name), None)
    return _alignment(scene.start(record.site), first)


def _is_rescaled(record: Record, weight: Weight, scene: Scene) -> bool:
    """Whether something between a layer and a site has made z much smaller than the layer and its input would. Only where z was large nevertheless,
    or has grown since, is that of interest."""
    start, known = scene.start(record.site), _first_alignment(record, weight, scene)
    if start is None or known is None or known >= _RESCALED:
        return False
    return scene.started or (start.z_rms or 0.0) > GROWN


def _of_alignment(record: Record, weight: Weight, scene: Scene) -> list[Term]:
    """Of what neither gain nor input explain."""
    now, known = _alignment(record, weight), _first_alignment(record, weight, scene) or 1.0
    if now is None:
        return []
    terms = []
    if scene.started and now > GROWN * max(known, 1.0):
        terms += grown(scene, weight, record, math.log(now / max(known, 1.0)))
    # What is new is not of the start, but a bias that was there at first is.
    if min(now, known if scene.started else now) > GROWN:
        terms.append(_of_bias(record, weight, min(now, known) if scene.started else now, scene))
    return terms


def _of_bias(record: Record, weight: Weight, alignment: float, scene: Scene) -> Term:
    """A z that was larger at the first observation than weights and input make it: a bias, or a factor in the code."""
    start = scene.start(record.site) or record
    name, size, what = spoken(weight.name), math.log(alignment), _at_first(start)
    if scene.trained:
        return Term("weight_growth", size, f"{what}, more than {name} makes of its input; the weights came trained", advice.AS_TRAINED)
    evidence = f"{what}, more than {name} makes of its input: a bias, or a factor in the code"
    if not is_shifted(start) or weight.parameter:
        place = owner(weight.name)
        return Term(
            "init_too_large", size, evidence, f"make the bias of {place} smaller, and look for a factor or a norm between it and {record.activation}"
        )
    biased = [
        each for site, each in scene.at_first.layers() if (found := _alignment(site, each)) is not None and found > GROWN and each.whole is None
    ] or [weight]
    more = f", and look for a factor between it and {record.activation}"
    return Term("init_too_large", math.log(alignment), evidence, advice.zero_biases(biased, more))


def _at_first(start: Record) -> str:
    return f"z of {spoken(start.site)} had an rms of {start.z_rms:.3g} (mean {start.z_mean or 0.0:.3g}) at the first observation"


def _flows(source: Record, rms: float) -> bool:
    """Whether a layer's input has the size of that site's output. If not, something between them, such as a norm, has rescaled it."""
    made = size_of_output(source)
    return made > 0 and 0.75 < rms / made < 1.33


def size_of_output(record: Record) -> float:
    """The rms of a site's output; 0 where it is not known."""
    return 0.0 if record.a_mean is None or record.a_std is None else math.hypot(record.a_mean, record.a_std)


def _of_unseen_input(record: Record, weight: Weight, scene: Scene) -> list[Term]:
    """Weights that are seen, with an input that is not: z is judged by what comes out of the sites before."""
    start, known = scene.start(record.site), scene.first_gain(weight.name)
    if start is None or not start.z_rms or not known:
        return []
    terms = []
    made, coming = start.z_rms / known, implied_input(record, scene.at_first)
    if made > GROWN * (coming or 1.0) and is_shifted(start):
        terms.append(_of_bias(record, weight, made, scene))
    elif coming is None and made > GROWN and not scene.trained:
        evidence = f"{_at_first(start)}, from a gain of {known:.3g}: the input, which is not seen, is large"
        terms.append(Term("inputs_unscaled", math.log(made), evidence, advice.standardise(weight, scene)))
    grow = (record.z_rms or 0.0) / start.z_rms / max((weight.gain or known) / known, 1.0)
    if scene.started and grow > GROWN:
        terms += grown(scene, weight, record, math.log(grow))
    return terms


def implied_input(record: Record, scene: Scene) -> float | None:
    """The size of what comes out of the sites before this one; None where there is none, or it is not known."""
    found = [size_of_output(source) for name in record.after if (source := scene.record(name)) is not None]
    return max(found, default=0.0) or None


def implied_gain(record: Record, scene: Scene) -> float | None:
    """RMS(z) over the size of what comes out of the sites before; None where that is not known."""
    coming = implied_input(record, scene)
    return None if coming is None or not record.z_rms else record.z_rms / coming


def _of_unseen(record: Record, scene: Scene) -> list[Term]:
    """A site whose weights are not seen, or whose z something between has rescaled: the size of z at the first observation, and its growth."""
    start = scene.start(record.site)
    if start is None or not start.z_rms:
        return grown(scene, None, record, 1.0) if scene.started else []
    terms = []
    if start.z_rms > GROWN:
        terms += _unseen_at_first(start, min(start.z_rms, record.z_rms or start.z_rms), scene)
    if scene.started and (record.z_rms or 0.0) > GROWN * start.z_rms:
        terms += grown(scene, None, record, math.log((record.z_rms or 0.0) / start.z_rms))
    return terms


def _unseen_at_first(start: Record, rms: float, scene: Scene) -> list[Term]:
    """Either the weights or the input are too large. The sites before tell the input; where there are none, those behind tell how weights are
    drawn."""
    first = scene.at_first
    feeders = first.feeders(start.site)
    unseen = (
        f"what lies between {spoken(feeders[0].name)} and {spoken(start.site)}" if feeders else f"the weights that make z of {spoken(start.site)}"
    )
    size = math.log(rms)
    what = (
        f"{unseen} {'is' if feeders else 'are'} not seen; z had an rms of {start.z_rms:.3g} (mean {start.z_mean or 0.0:.3g}) at the first observation"
    )
    if scene.trained:
        return [Term("weight_growth", size, f"{what}, and the weights came trained", advice.AS_TRAINED)]
    draw = f"draw the weights before {start.site} smaller, by 1 / rms of z, and set its bias to 0"
    if implied_input(start, first) is not None:
        return [Term("init_too_large", size, what, draw)]
    gains = [gain for each in first.now.records if not first.feeders(each.site) and (gain := implied_gain(each, first)) is not None]
    drawn = bool(gains) and sorted(gains)[len(gains) // 2] > GROWN
    data = f"standardise the inputs, if they are not; or {draw}"
    terms = [Term("init_too_large", size, what, draw), Term("inputs_unscaled", size, what, data)]
    weights = (0.8, 0.2) if drawn or is_shifted(start) else (0.4, 0.6)
    return [replace(term, size=term.size * weigh) for term, weigh in zip(terms, weights, strict=True)]
