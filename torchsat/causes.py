"""Why an alert fires: its causes, ranked, from what was measured; standard library only.

The size of a pre-activation is RMS(z) = gain x RMS of the input x alignment. This is exact up to the bias, and defines the alignment. Let s be the
size at which 5 % of the values of a centred normal z lie in a tail, and g the gain that suits the activation. Then

    ln(RMS(z) / s) = ln(gain / g) + ln(input RMS) + ln(alignment) + ln(g / s)

so how much z is too large is a sum of terms. The last one is a constant of the activation. Of the others each positive one is blamed in proportion to
its size:

- The gain is split into its value at the first observation (the initialisation) and what it has become since (growth).
- The input, if it is the model's own, is split into the offset that all samples share (un-centred) and what varies between samples (un-scaled).
- The alignment of weights and input is learned, hence growth too.
- Where the input comes from an unbounded activation and nothing has rescaled it, the terms of the layers before are added.

The explanation is given for the first site, in the order of data flow, that is beyond a limit. Sites behind it may suffer from the same.

A network whose weights came trained (`came_trained`) was not initialised by this run. What would be blamed on an initialisation is then the size that
an earlier training gave the weights, hence growth, and no remedy draws weights anew, sets biases to 0 or replaces an activation: that would destroy
what the network knows.

If the gradient vanishes without saturation the sum is another one: each layer passes on gain / g of the gradient. Where the derivative is small even
at its peak (1/4 of a sigmoid), no gain helps, and the cause is the choice of the activation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torchsat.expressions import attribute, gain_for, initialiser, owner, place_of
from torchsat.flow import on_signal_path
from torchsat.percent import percent
from torchsat.record import Alert, Cause, Record, Snapshot, Weight
from torchsat.start import came_trained

UNBOUNDED = ("relu", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish")
"""Activations whose output grows with their input, so that too large a signal passes on to the next layer."""
_STANDARDISE = "standardise the inputs: x = (x - x.mean(0)) / x.std(0), taken over the training set; or put nn.BatchNorm before "
_AS_TRAINED = "nothing, if the network does its task; if not, compare the scale of its inputs with that which it was trained on"
_LEAST_OF_BLAME = 0.05
"""Causes with a smaller share of the blame are not told."""
_MOST = 100.0
"""The largest size of a term. A number that has overflowed would have an infinite size, and the shares would not add up."""
_GROWN = 1.5
"""A weight is said to have grown when its gain is more than this many times what it was at first. The same holds of the alignment."""


@dataclass(frozen=True)
class Scene:
    """The snapshots that an explanation compares."""

    now: Snapshot
    """The observation at which the alert is raised."""
    first: Snapshot
    """The first observation of the run: the network as it was initialised or loaded."""
    before: Snapshot
    """The last observation in which every number was finite; the first one if there was none."""

    @property
    def trained(self) -> bool:
        """Whether the network came with trained weights."""
        return came_trained(self.first)

    def record(self, site: str) -> Record | None:
        """What was measured at a site; None if it did not run."""
        return next((record for record in self.now.records if record.site == site), None)

    def feeders(self, site: str) -> list[Weight]:
        """The layers that feed a site. The one that contributes most, by gain x RMS of its input, stands first."""
        found = [weight for weight in self.now.weights if site in weight.feeds and weight.gain is not None and math.isfinite(weight.gain)]
        # Where a part of a layer feeds the site, its own numbers count, and not those of the other parts.
        parted = {weight.whole for weight in found}
        found = [weight for weight in found if weight.name not in parted]
        return sorted(found, key=lambda weight: -(weight.gain or 0.0) * (weight.input_rms or 1.0))

    def first_gain(self, name: str) -> float | None:
        """The gain of a layer at the first observation."""
        gain = next((weight.gain for weight in self.first.weights if weight.name == name), None)
        return gain if gain is not None and math.isfinite(gain) else None


@dataclass(frozen=True)
class Term:
    """One term of the sum that is explained, with what a reader is told about it."""

    cause: str
    """The name of the cause. Terms of the same cause are added."""
    size: float
    evidence: str
    remedy: str


def explain(alert: Alert, scene: Scene) -> tuple[Cause, ...]:
    """The causes of an alert, the largest first, with shares that add up to 1. Empty if nothing that was measured explains it."""
    if alert.since <= scene.first.step:
        # The condition was there from the start, so the change of the weights since then is not its cause.
        scene = replace(scene, now=scene.first, before=scene.first if alert.rule != "nonfinite" else scene.before)
    found = [replace(term, size=min(term.size, _MOST)) for term in _EXPLAIN.get(alert.rule, _of_size)(alert, scene)]
    terms = _without_consequences(found)
    total = sum(term.size for term in terms if term.size > 0)
    merged: dict[str, Term] = {}
    for term in sorted((term for term in terms if term.size > 0), key=lambda term: -term.size):
        known = merged.get(term.cause)
        merged[term.cause] = term if known is None else replace(known, size=known.size + term.size)
    kept = sorted((term for term in merged.values() if term.size >= _LEAST_OF_BLAME * total), key=lambda term: -term.size)
    whole = sum(term.size for term in kept)
    return tuple(Cause(term.cause, term.size / whole, term.evidence, term.remedy) for term in kept)


def _without_consequences(terms: list[Term]) -> list[Term]:
    """Blame growth for at most half of what the start is blamed for: where a network was wrong from the start, its weights grow because of that."""
    initial = sum(term.size for term in terms if term.cause in _INITIAL)
    grown = sum(term.size for term in terms if term.cause == "weight_growth")
    if initial < 1 or grown <= initial / 2:
        return terms
    return [replace(term, size=term.size * initial / 2 / grown) if term.cause == "weight_growth" else term for term in terms]


_INITIAL = ("inputs_uncentred", "inputs_unscaled", "init_too_large", "init_too_small")
"""Causes that were there before training began."""


def _of_z(site: str, scene: Scene, met: frozenset[str] = frozenset()) -> list[Term]:
    """The positive terms of ln RMS(z) at a site, and those of the layers before it that pass their size on. `met`: the sites already added."""
    record, feeders = scene.record(site), scene.feeders(site)
    if record is None or not feeders or site in met:
        return []
    weight = feeders[0]
    terms = [*_of_gain(record, weight, scene), *_of_alignment(record, weight, scene)]
    rms = weight.input_rms
    if not rms:
        return terms
    if weight.data:
        return terms + _of_inputs(weight, rms)
    sources = [scene.record(name) for name in record.after]
    flowing = [source for source in sources if source is not None and source.activation in UNBOUNDED and _flows(source, rms)]
    for source in flowing:
        terms += _of_z(source.site, scene, met | {site})
    if not flowing and rms > _GROWN:
        terms.append(
            Term(
                "inputs_unscaled",
                math.log(rms),
                f"the input of {weight.name}, which the model itself makes, has an rms of {rms:.3g} where 1 is expected",
                f"make what comes into {owner(weight.name)} smaller: the weight of a norm, an embedding, or a branch that adds up",
            )
        )
    return terms


def _of_gain(record: Record, weight: Weight, scene: Scene) -> list[Term]:
    """Of the gain: what the initialisation made too large, and what it has grown since."""
    gain = weight.gain or 0.0
    known = scene.first_gain(weight.name) or gain
    wanted = gain_for(record.activation)
    terms = []
    if known > wanted:
        size = math.log(min(known, max(gain, wanted)) / wanted)
        evidence = f"{weight.name} has a gain of {known:.3g} (rms(W) sqrt(fan_in)) where {record.activation} wants {wanted:.3g}"
        remedy = initialiser(record.activation, weight.name, weight.parameter) + _not_enough(record, scene)
        terms.append(_too_large(weight, size, evidence, remedy, scene))
    if gain > _GROWN * known:
        terms.append(_growth(weight, known, math.log(gain / known)))
    return terms


def _of_alignment(record: Record, weight: Weight, scene: Scene) -> list[Term]:
    """Of what neither gain nor input explain. At the first observation nothing is learned yet, so it is a bias or a factor; later it is growth."""
    gain, rms = weight.gain, weight.input_rms
    if not (rms and gain and record.z_rms):
        return []
    alignment = record.z_rms / (gain * rms)
    if alignment <= _GROWN:
        return []
    if scene.now.step > scene.first.step:
        known = scene.first_gain(weight.name) or gain
        return [_growth(weight, known, math.log(alignment), f"z is {alignment:.2g} times what weights that know nothing of their input would make")]
    evidence = f"z of {record.site} is {alignment:.3g} times what {weight.name} makes of its input: a bias, or a factor in the code"
    remedy = f"set the bias of {owner(weight.name)} to 0, and look for a factor between it and {record.activation}"
    return [_too_large(weight, math.log(alignment), evidence, remedy, scene)]


def _too_large(weight: Weight, size: float, evidence: str, remedy: str, scene: Scene) -> Term:
    """Weights that are too large at the first observation. The remedy is that of an initialisation."""
    if not scene.trained:
        return Term("init_too_large", size, evidence, remedy)
    rate = f" (now {weight.learning_rate:.3g})" if weight.learning_rate else ""
    return Term(
        "weight_growth",
        size,
        f"{evidence}; the weights came trained",
        f"{_AS_TRAINED}, lower the learning rate{rate}, or train {owner(weight.name)} with weight decay",
    )


def _not_enough(record: Record, scene: Scene) -> str:
    """The end of a remedy for a stack of activations whose derivative is small even at its peak: no initialisation is enough there."""
    stack = [each for each in scene.now.records if each.peak is not None and each.peak <= 0.5 and not (each.output or each.gate)]
    if record not in stack or len(stack) < 3:
        return ""
    return (
        f"; but no initialisation lets gradients through {len(stack)} layers of {record.activation}: use nn.ReLU, nn.GELU or nn.SiLU with He "
        "initialisation, or put nn.BatchNorm before each"
    )


def _flows(source: Record, rms: float) -> bool:
    """Whether a layer's input has the size of that site's output. If not, something between them, such as a norm, has rescaled it."""
    if source.a_mean is None or source.a_std is None:
        return False
    made = math.hypot(source.a_mean, source.a_std)
    return made > 0 and 0.75 < rms / made < 1.33


def _of_inputs(weight: Weight, rms: float) -> list[Term]:
    """Of the model's own input: the offset that all samples share, and the scale of what is left."""
    centred = max(1.0 if weight.input_centred_share is None else weight.input_centred_share, 1e-6)
    scale = rms * math.sqrt(centred)
    total = math.log(rms) if rms > 0 else 0.0
    offset = min(total, -0.5 * math.log(centred))
    terms = []
    if offset > 0:
        terms.append(_uncentred(weight, centred, offset))
    if total - max(offset, 0.0) > 0:
        terms.append(
            Term(
                "inputs_unscaled",
                total - max(offset, 0.0),
                f"the input of {weight.name} has an rms of {scale:.3g} about its mean, where 1 is expected",
                _STANDARDISE + owner(weight.name),
            )
        )
    return terms


def _uncentred(weight: Weight, centred: float, size: float) -> Term:
    """An offset that all samples of the model's own input share."""
    return Term(
        "inputs_uncentred",
        size,
        f"{percent(1 - centred)} of the mean square of the input of {weight.name} is an offset that all samples share (rms {weight.input_rms:.3g})",
        _STANDARDISE + owner(weight.name),
    )


def _growth(weight: Weight, first: float, size: float, evidence: str | None = None) -> Term:
    """Weights that training has made too large. `first`: the gain at the first observation."""
    rate = f", now {weight.learning_rate:.3g}" if weight.learning_rate else ""
    update = f"; a step changes it by {percent(weight.update_ratio)} of itself" if weight.update_ratio else ""
    return Term(
        "weight_growth",
        size,
        evidence or f"the gain of {weight.name} has grown from {first:.3g} to {weight.gain:.3g}{update}",
        f"lower the learning rate (weight group of {owner(weight.name)}{rate}), warm it up, clip gradients, or add weight decay",
    )


def _activation(record: Record, size: float, evidence: str) -> Term:
    """An activation that is the wrong choice for its place."""
    return Term(
        "activation_choice",
        size,
        evidence,
        f"replace {record.activation} {place_of(record)} by nn.ReLU, nn.GELU or nn.SiLU with He initialisation, or put "
        "nn.BatchNorm before it; Xavier and LayerNorm do not help a deep stack of sigmoids",
    )


def _of_size(alert: Alert, scene: Scene) -> list[Term]:
    """A site with two plateaus is saturated: its z is too large, or its mean has drifted."""
    record = scene.record(alert.site)
    if record is None:
        return []
    terms = _of_z(alert.site, scene)
    mean, std = abs(record.z_mean or 0.0), record.z_std or 0.0
    data = any(weight.data for weight in scene.feeders(alert.site))
    if scene.trained:
        return terms
    if not terms and mean > std:
        return [
            _activation(
                record,
                1.0,
                f"z of {record.site} has drifted to {record.z_mean:.3g} +- {record.z_std:.2g}: behind outputs that are not centred it acts as a bias",
            )
        ]
    if not terms and not data and record.a_mean is not None:
        return [_activation(record, 1.0, f"gain and input of {record.site} are as they should be, and yet its mean derivative is low")]
    return terms


def _of_closed(alert: Alert, scene: Scene) -> list[Term]:
    """Units that never leave their plateau: because of the input, of the initialisation, or of steps of the optimizer that were too large."""
    record = scene.record(alert.site)
    feeders = scene.feeders(alert.site)
    if record is None:
        return []
    if record.tails == "both":
        terms = _of_z(alert.site, scene)
        if terms:
            return terms
    weight = feeders[0] if feeders else None
    terms = _of_offset(alert.site, scene)
    start = next((each for each in scene.first.records if each.site == alert.site), None)
    closed_at_start = start is not None and start.saturated is not None and record.saturated is not None and start.saturated > 0.8 * record.saturated
    if weight is not None:
        first = scene.first_gain(weight.name) or weight.gain or 1.0
        grown = math.log(max((weight.gain or first) / first, 1.0))
        if not closed_at_start:
            terms.append(_growth(weight, first, 1.0 + grown, None if grown > math.log(1.1) else f"{alert.site} has closed since the first step"))
    if closed_at_start or not terms:
        terms.append(_dead(record, scene, "from the first step on" if closed_at_start else "in training"))
    return terms


def _of_offset(site: str, scene: Scene) -> list[Term]:
    """An offset of the model's inputs. Whatever its size, it closes some units of every rectifier behind it, and holds others open.

    At the first observation the weights know nothing of the input, so the offset moves each unit's z one way or the other by about gain x offset. The
    mean of z over all units shows a bias instead: the blame is less by as much as that mean is larger.
    """
    before = {site, *upstream_of(site, scene.now.records)}
    terms = []
    for weight in scene.now.weights:
        centred = weight.input_centred_share
        if weight.whole is None and weight.data and centred is not None and centred < 0.5 and weight.input_rms and before & set(weight.feeds):
            centred = max(centred, 1e-6)
            moved = (weight.gain or math.inf) * weight.input_rms * math.sqrt(1 - centred)
            means = [abs(fed.z_mean or 0.0) for name in weight.feeds if (fed := scene.record(name)) is not None and name in before]
            bias = max(means, default=0.0) if scene.now.step <= scene.first.step else 0.0
            terms.append(_uncentred(weight, centred, -math.log(centred) * min(1.0, moved / bias if bias else 1.0)))
    return terms


def _of_vanishing(alert: Alert, scene: Scene) -> list[Term]:
    """The gradient gets lost on its way back: at flat activations, at weights that are too small, or at closed rectifiers."""
    hidden = [record for record in scene.now.records if on_signal_path(record)]
    ratios = {weight.name: weight.gain / gain_for(record.activation) for record in hidden for weight in scene.feeders(record.site)[:1] if weight.gain}
    flat = [record for record in hidden if record.peak is not None and record.peak <= 0.5]
    terms = []
    if len(flat) * 2 > len(hidden) and not scene.trained:
        peak = statistics.median(record.peak for record in flat if record.peak is not None)
        terms.append(
            _activation(
                flat[0],
                -len(flat) * math.log(peak) if peak < 1 else 0.0,
                f"{len(flat)} of {len(hidden)} hidden sites are {flat[0].activation}, which passes at most {peak:.3g} of the gradient at each layer",
            )
        )
    small = {name: ratio for name, ratio in ratios.items() if ratio < 0.75}
    if small and not scene.trained:
        name = min(small, key=lambda each: small[each])
        record = next(record for record in hidden if any(weight.name == name for weight in scene.feeders(record.site)))
        is_parameter = any(weight.parameter for weight in scene.now.weights if weight.name == name)
        terms.append(
            Term(
                "init_too_small",
                -sum(math.log(ratio) for ratio in small.values()),
                f"{len(small)} of {len(ratios)} layers have a gain below three quarters of what their activation wants "
                f"(median {statistics.median(small.values()):.2g} of it)",
                f"{initialiser(record.activation, name, is_parameter)}, and so for each layer",
            )
        )
    closed = [record for record in hidden if record.tails in ("low", "high") and (record.saturated or 0.0) > 0.7]
    if closed:
        terms += _of_offset(closed[0].site, scene) or [_dead(closed[0], scene, f"in {len(closed)} of {len(hidden)} layers")]
    if not terms:
        terms += [term for record in hidden for term in _of_z(record.site, scene)]
    return terms


def _dead(record: Record, scene: Scene, where: str) -> Term:
    """Units that are closed whatever the input. `where`: since when, or in how many layers."""
    weight = next(iter(scene.feeders(record.site)), None)
    remedy = f"set the bias of {owner(weight.name) if weight else 'the layer before it'} to 0, widen it, or use nn.LeakyReLU, nn.ELU, nn.GELU"
    if scene.trained:
        remedy = f"{_AS_TRAINED}; other inputs may open these units"
    return Term(
        "dead_units",
        1.0,
        f"z of {record.site} is {record.z_mean or 0.0:.3g} +- {record.z_std or 0.0:.3g}: its units are shut {where}, whatever the input",
        remedy,
    )


def _of_exploding(alert: Alert, scene: Scene) -> list[Term]:
    """The gradient grows on its way back, by weights that are or have become too large."""
    terms: list[Term] = []
    for record in scene.now.records:
        for weight in scene.feeders(record.site)[:1]:
            known, wanted = scene.first_gain(weight.name) or weight.gain or 1.0, gain_for(record.activation)
            gain = weight.gain or known
            if known > 1.1 * wanted:
                evidence = f"{weight.name} has a gain of {known:.3g} where {record.activation} wants {wanted:.3g}"
                remedy = initialiser(record.activation, weight.name, weight.parameter)
                terms.append(_too_large(weight, math.log(known / wanted), evidence, remedy, scene))
            if gain > _GROWN * known:
                terms.append(_growth(weight, known, math.log(gain / known)))
    return terms


def _of_nonfinite(alert: Alert, scene: Scene) -> list[Term]:
    """Numbers that overflowed because the signal grew, or that were never finite."""
    broken_from_start = scene.before.step >= scene.now.step
    terms = []
    if not broken_from_start:
        terms = _of_exploding(alert, replace(scene, now=scene.before))
        terms += [
            term
            for weight in scene.first.weights
            if weight.whole is None and weight.data and weight.input_rms
            for term in _of_inputs(weight, weight.input_rms)
        ]
        largest = max(scene.before.weights, key=lambda weight: weight.update_ratio or 0.0, default=None)
        if largest is not None and (largest.update_ratio or 0.0) > 0.3:
            terms.append(_growth(largest, scene.first_gain(largest.name) or 1.0, math.log1p(largest.update_ratio or 0.0)))
    if terms:
        return terms
    return [
        Term(
            "numeric_range",
            1.0,
            f"{alert.site} is the first place with inf or nan" + (", from the first step on: look at the data" if broken_from_start else ""),
            "check the inputs with torch.isfinite(x).all(); in float16 use a GradScaler, or bfloat16, or float32 for this layer",
        )
    ]


def _of_attention(alert: Alert, scene: Scene) -> list[Term]:
    """Logits that vary so much within a row that one key takes all of the weight."""
    record = scene.record(alert.site)
    if record is None or record.logit_std is None:
        return []
    place = attribute(record.site.partition("/")[0])
    smaller = "" if scene.trained else ", or draw its query and key weights smaller"
    return [
        Term(
            "softmax_logits",
            1.0,
            f"the logits of {record.site} vary by {record.logit_std:.3g} within a row; beyond sqrt(2 ln T) = "
            f"{math.sqrt(2 * (record.log_keys or 0.0)):.3g} one key takes all",
            f"normalise queries and keys of {place} (nn.RMSNorm on each head), or lower the learning rate{smaller}",
        )
    ]


def _of_saturated(alert: Alert, scene: Scene) -> list[Term]:
    record = scene.record(alert.site)
    return _of_size(alert, scene) if record is None or record.tails == "both" else _of_closed(alert, scene)


_EXPLAIN: Mapping[str, Callable[[Alert, Scene], list[Term]]] = {
    "saturated": _of_saturated,
    "stuck_units": _of_closed,
    "vanishing_gradient": _of_vanishing,
    "frozen_weights": _of_vanishing,
    "exploding_gradient": _of_exploding,
    "nonfinite": _of_nonfinite,
    "attention_collapse": _of_attention,
}
"""Which function explains the alerts of which rule. A rule of the user's is explained like one of size (`_of_size`)."""


def upstream_of(site: str, records: Iterable[Record]) -> set[str]:
    """All sites that the input of a site depends on."""
    after = {record.site: record.after for record in records}
    found: set[str] = set()
    waiting = list(after.get(site, ()))
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += after.get(name, ())
    return found
