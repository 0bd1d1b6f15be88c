"""Why: the causes of an alert, ranked, from what was measured; standard library only.

The size of a pre-activation is RMS(z) = gain x rms of the input x alignment (exact up to the bias). Over the size s at which 5 % of a centred
normal z lie in a tail, its logarithm is a sum of terms, and the positive ones are the blame:

    ln(RMS(z) / s) = ln(gain / g) + ln(input rms) + ln(alignment) + ln(g / s)

where g is the gain that belongs to the activation. The gain is split into what it was at the first observation (initialisation) and what it has
become since (growth); the input, if it is the model's own, into the offset that all samples share (un-centred) and what varies between them
(un-scaled); alignment is learned, hence growth too. Where the input comes out of an unbounded activation that nothing has rescaled, the terms
of the layers before it are added. The terms are judged at the first site in the order of data flow that is beyond a limit: what lies behind
it may suffer from the same.

A network whose gradient vanishes without saturation has another sum: each layer passes gain / g of it. Where the derivative itself is small
even at its peak (sigmoid 1/4), no gain helps, and it is the choice of the activation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchsat.record import Alert, Cause, Record, Snapshot, Weight
from torchsat.rules import percent

GAIN: Mapping[str, float] = {
    "relu": math.sqrt(2),
    "relu6": math.sqrt(2),
    "leaky_relu": math.sqrt(2),
    "gelu": 1.5,
    "silu": 1.5,
    "mish": 1.5,
    "hardswish": 1.5,
}
"""rms(W) sqrt(fan_in) that keeps the signal alive from layer to layer; 1 for what is not here."""
UNBOUNDED = ("relu", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish")
_STANDARDISE = "standardise the inputs: x = (x - x.mean(0)) / x.std(0), taken over the training set; or put nn.BatchNorm before "
_LEAST_SHARE = 0.05
_GROWN = 1.5
"""Times its first gain, before a weight is said to have grown."""


@dataclass(frozen=True)
class Scene:
    """What an explanation has before it."""

    now: Snapshot
    first: Snapshot
    """The first observation: what initialisation left."""
    before: Snapshot
    """The last one in which every number was finite, or the first."""

    def record(self, site: str) -> Record | None:
        return next((record for record in self.now.records if record.site == site), None)

    def feeders(self, site: str, snapshot: Snapshot | None = None) -> list[Weight]:
        """The layers that feed a site, the strongest first."""
        found = [weight for weight in (snapshot or self.now).weights if site in weight.feeds and weight.gain is not None]
        return sorted(found, key=lambda weight: -(weight.gain or 0.0) * (weight.input_rms or 1.0))

    def first_gain(self, name: str) -> float | None:
        return next((weight.gain for weight in self.first.weights if weight.name == name), None)


@dataclass(frozen=True)
class Term:
    """One summand of the blame."""

    cause: str
    size: float
    evidence: str
    remedy: str


def explain(alert: Alert, scene: Scene) -> tuple[Cause, ...]:
    """The causes of an alert, ranked; empty where nothing that was measured explains it."""
    if alert.since <= scene.first.step:
        # It was so from the start: what the weights have become since is not the cause.
        scene = replace(scene, now=scene.first, before=scene.first if alert.rule != "nonfinite" else scene.before)
    terms = _without_consequences(_EXPLAIN.get(alert.rule, _of_size)(alert, scene))
    total = sum(term.size for term in terms if term.size > 0)
    merged: dict[str, Term] = {}
    for term in sorted((term for term in terms if term.size > 0), key=lambda term: -term.size):
        known = merged.get(term.cause)
        merged[term.cause] = term if known is None else replace(known, size=known.size + term.size)
    kept = sorted((term for term in merged.values() if term.size >= _LEAST_SHARE * total), key=lambda term: -term.size)
    whole = sum(term.size for term in kept)
    return tuple(Cause(term.cause, term.size / whole, term.evidence, term.remedy) for term in kept)


def verdict(alert: Alert) -> str:
    """An alert in one line: what, since when, who else, why, and what to try first."""
    if not alert.firing:
        return alert.message
    text = f"{alert.message}, since step {alert.since}"
    if alert.also:
        text += f", and {len(alert.also)} more after it"
    if alert.causes:
        text += ". Why: " + ", ".join(f"{cause.name} {100 * cause.share:.0f} %" for cause in alert.causes) + f". Try: {alert.causes[0].remedy}"
    return text


def _without_consequences(terms: list[Term]) -> list[Term]:
    """Weights that grow where the network was wrong from the start grow because of that."""
    initial = sum(term.size for term in terms if term.cause in _INITIAL)
    grown = sum(term.size for term in terms if term.cause == "weight_growth")
    if initial < 1 or grown <= initial / 2:
        return terms
    return [replace(term, size=term.size * initial / 2 / grown) if term.cause == "weight_growth" else term for term in terms]


_INITIAL = ("inputs_uncentred", "inputs_unscaled", "init_too_large", "init_too_small")


def attribute(name: str) -> str:
    """The expression that leads to a module: `blocks.0.fc` is `model.blocks[0].fc`."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)


def gain_for(activation: str) -> float:
    return GAIN.get(activation, 1.0)


def owner(weight: str) -> str:
    """The expression of the module that owns a weight: of a recurrent layer's matrix, the layer."""
    head, _, last = weight.rpartition(".")
    return attribute(head if last.startswith("weight_") else weight)


def initialiser(activation: str, weight: str) -> str:
    """The line that initialises a weight as its activation wants it."""
    last = weight.rpartition(".")[2]
    target = f"{owner(weight)}.{last if last.startswith('weight_') else 'weight'}"
    if last.startswith("weight_hh"):
        return f"nn.init.orthogonal_({target})"
    if activation in GAIN:
        return f'nn.init.kaiming_normal_({target}, nonlinearity="relu")'
    return f'nn.init.kaiming_normal_({target}, nonlinearity="linear")' if activation == "selu" else f"nn.init.xavier_normal_({target})"


def _blame(site: str, scene: Scene, met: frozenset[str] = frozenset()) -> list[Term]:
    """The positive terms of ln RMS(z) at a site, those of the layers before it included."""
    record = scene.record(site)
    feeders = scene.feeders(site)
    if record is None or not feeders or site in met:
        return []
    weight = feeders[0]
    gain, rms = weight.gain or 0.0, weight.input_rms
    known = scene.first_gain(weight.name) or gain
    wanted = gain_for(record.activation)
    terms = []
    if known > wanted:
        terms.append(
            Term(
                "init_too_large",
                math.log(min(known, max(gain, wanted)) / wanted),
                f"{weight.name} has a gain of {known:.3g} (rms(W) sqrt(fan_in)) where {record.activation} wants {wanted:.3g}",
                initialiser(record.activation, weight.name) + _not_enough(record, scene),
            )
        )
    if gain > _GROWN * known:
        terms.append(_growth(weight, known, math.log(gain / known)))
    if rms and gain and record.z_rms:
        alignment = record.z_rms / (gain * rms)
        if alignment > _GROWN and scene.now.step <= scene.first.step:
            terms.append(
                Term(
                    "init_too_large",
                    math.log(alignment),
                    f"z of {record.site} is {alignment:.3g} times what {weight.name} makes of its input: a bias, or a factor in the code",
                    f"set the bias of {owner(weight.name)} to 0, and look for a factor between it and {record.activation}",
                )
            )
        elif alignment > _GROWN:
            terms.append(
                _growth(weight, known, math.log(alignment), f"z is {alignment:.2g} times what weights that know nothing of their input would make")
            )
    if rms and weight.data:
        terms += _of_inputs(weight, rms)
    elif rms:
        sources = [scene.record(name) for name in record.after]
        flowing = [source for source in sources if source is not None and source.activation in UNBOUNDED and _flows(source, rms)]
        for source in flowing:
            terms += _blame(source.site, scene, met | {site})
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


def _not_enough(record: Record, scene: Scene) -> str:
    """Where the derivative is small even at its peak, no initialisation rescues a stack."""
    stack = [each for each in scene.now.records if each.peak is not None and each.peak <= 0.5 and not (each.output or each.gate)]
    if record not in stack or len(stack) < 3:
        return ""
    return (
        f"; but no initialisation lets gradients through {len(stack)} layers of {record.activation}: use nn.ReLU, nn.GELU or nn.SiLU with He "
        "initialisation, or put nn.BatchNorm before each"
    )


def _flows(source: Record, rms: float) -> bool:
    """Whether a layer's input is the output of that site as it is, not rescaled by a norm."""
    if source.a_mean is None or source.a_std is None:
        return False
    made = math.hypot(source.a_mean, source.a_std)
    return made > 0 and 0.75 < rms / made < 1.33


def _of_inputs(weight: Weight, rms: float) -> list[Term]:
    share = weight.input_centred_share
    centred = max(share if share is not None else 1.0, 1e-6)
    scale = rms * math.sqrt(centred)
    total = math.log(rms) if rms > 0 else 0.0
    offset = min(total, -0.5 * math.log(centred))
    terms = []
    if offset > 0:
        terms.append(
            Term(
                "inputs_uncentred",
                offset,
                f"{percent(1 - centred)} of the mean square of the input of {weight.name} is an offset that all samples share (rms {rms:.3g})",
                _STANDARDISE + owner(weight.name),
            )
        )
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


def _growth(weight: Weight, first: float, size: float, evidence: str | None = None) -> Term:
    rate = f", now {weight.learning_rate:.3g}" if weight.learning_rate else ""
    update = f"; a step changes it by {percent(weight.update_ratio)} of itself" if weight.update_ratio else ""
    return Term(
        "weight_growth",
        size,
        evidence or f"the gain of {weight.name} has grown from {first:.3g} to {weight.gain:.3g}{update}",
        f"lower the learning rate (weight group of {owner(weight.name)}{rate}), warm it up, clip gradients, or add weight decay",
    )


def _activation(record: Record, size: float, evidence: str) -> Term:
    return Term(
        "activation_choice",
        size,
        evidence,
        f"replace {record.activation} {_where(record)} by nn.ReLU, nn.GELU or nn.SiLU with He initialisation, or put "
        "nn.BatchNorm before it; Xavier and LayerNorm do not help a deep stack of sigmoids",
    )


def _where(record: Record) -> str:
    """Where a site is in the user's code."""
    path = record.site.rpartition("/")[0]
    if record.kind == "module":
        return f"at {attribute(record.site)}"
    return f"in {attribute(path.rpartition('.')[0] if record.kind == 'recurrent' else path)}"


def _of_size(alert: Alert, scene: Scene) -> list[Term]:
    """A site with two plateaus is saturated: too large a z, or one that has drifted."""
    record = scene.record(alert.site)
    if record is None:
        return []
    terms = _blame(alert.site, scene)
    mean, std = abs(record.z_mean or 0.0), record.z_std or 0.0
    data = any(weight.data for weight in scene.feeders(alert.site))
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
    """Units that never open: by their input, by a bias or too few weights at the start, or by steps that were too big."""
    record = scene.record(alert.site)
    feeders = scene.feeders(alert.site)
    if record is None:
        return []
    if record.tails == "both":
        terms = _blame(alert.site, scene)
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
    """An offset of the model's inputs shuts units of every rectifier behind it, and opens others for good, whatever its size."""
    before = {site, *upstream_of(site, scene.now.records)}
    terms = []
    for weight in scene.now.weights:
        share = weight.input_centred_share
        if weight.data and share is not None and share < 0.5 and weight.input_rms and before & set(weight.feeds):
            offset = _of_inputs(weight, max(weight.input_rms, math.e / math.sqrt(max(share, 1e-6))))
            terms += [replace(term, size=2 * term.size) for term in offset if term.cause == "inputs_uncentred"]
    return terms


def _of_vanishing(alert: Alert, scene: Scene) -> list[Term]:
    hidden = [record for record in scene.now.records if not (record.output or record.gate or record.kind == "softmax")]
    ratios = {weight.name: weight.gain / gain_for(record.activation) for record in hidden for weight in scene.feeders(record.site)[:1] if weight.gain}
    flat = [record for record in hidden if record.peak is not None and record.peak <= 0.5]
    terms = []
    if len(flat) * 2 > len(hidden):
        peak = statistics.median(record.peak for record in flat if record.peak is not None)
        terms.append(
            _activation(
                flat[0],
                -len(flat) * math.log(peak) if peak < 1 else 0.0,
                f"{len(flat)} of {len(hidden)} hidden sites are {flat[0].activation}, which passes at most {peak:.3g} of the gradient at each layer",
            )
        )
    small = {name: ratio for name, ratio in ratios.items() if ratio < 0.75}
    if small:
        name = min(small, key=lambda each: small[each])
        record = next(record for record in hidden if any(weight.name == name for weight in scene.feeders(record.site)))
        terms.append(
            Term(
                "init_too_small",
                -sum(math.log(ratio) for ratio in small.values()),
                f"{len(small)} of {len(ratios)} layers have a gain below three quarters of what their activation wants "
                f"(median {statistics.median(small.values()):.2g} of it)",
                f"{initialiser(record.activation, name)}, and so for each layer",
            )
        )
    closed = [record for record in hidden if record.tails in ("low", "high") and (record.saturated or 0.0) > 0.7]
    if closed:
        terms += _of_offset(closed[0].site, scene) or [_dead(closed[0], scene, f"in {len(closed)} of {len(hidden)} layers")]
    if not terms:
        terms += [term for record in hidden for term in _blame(record.site, scene)]
    return terms


def _dead(record: Record, scene: Scene, where: str) -> Term:
    weight = next(iter(scene.feeders(record.site)), None)
    return Term(
        "dead_units",
        1.0,
        f"z of {record.site} is {record.z_mean or 0.0:.3g} +- {record.z_std or 0.0:.3g}: its units are shut {where}, whatever the input",
        f"set the bias of {owner(weight.name) if weight else 'the layer before it'} to 0, widen it, or use nn.LeakyReLU, nn.ELU, nn.GELU",
    )


def _of_exploding(alert: Alert, scene: Scene) -> list[Term]:
    terms: list[Term] = []
    for record in scene.now.records:
        for weight in scene.feeders(record.site)[:1]:
            known, wanted = scene.first_gain(weight.name) or weight.gain or 1.0, gain_for(record.activation)
            gain = weight.gain or known
            if known > 1.1 * wanted:
                evidence = f"{weight.name} has a gain of {known:.3g} where {record.activation} wants {wanted:.3g}"
                terms.append(Term("init_too_large", math.log(known / wanted), evidence, initialiser(record.activation, weight.name)))
            if gain > _GROWN * known:
                terms.append(_growth(weight, known, math.log(gain / known)))
    return terms


def _of_nonfinite(alert: Alert, scene: Scene) -> list[Term]:
    """Numbers that overflowed because the signal grew, or that were never finite."""
    broken_from_start = scene.before.step >= scene.now.step
    terms = []
    if not broken_from_start:
        terms = _of_exploding(alert, replace(scene, now=scene.before))
        terms += [term for weight in scene.first.weights if weight.data and weight.input_rms for term in _of_inputs(weight, weight.input_rms)]
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
    record = scene.record(alert.site)
    if record is None:
        return []
    place = attribute(record.site.partition("/")[0])
    return [
        Term(
            "softmax_logits",
            1.0,
            f"the logits of {record.site} vary by {record.logit_std:.3g} within a row; beyond sqrt(2 ln T) = "
            f"{math.sqrt(2 * (record.log_keys or 0.0)):.3g} one key takes all",
            f"normalise queries and keys of {place} (nn.RMSNorm on each head), lower the learning rate, or draw its query and key weights smaller",
        )
    ]


_EXPLAIN: Mapping[str, Callable[[Alert, Scene], list[Term]]] = {
    "saturated": lambda alert, scene: (_of_closed if _one_sided(alert, scene) else _of_size)(alert, scene),
    "stuck_units": _of_closed,
    "vanishing_gradient": _of_vanishing,
    "frozen_weights": _of_vanishing,
    "exploding_gradient": _of_exploding,
    "nonfinite": _of_nonfinite,
    "attention_collapse": _of_attention,
}


def _one_sided(alert: Alert, scene: Scene) -> bool:
    record = scene.record(alert.site)
    return record is not None and record.tails != "both"


_RANK: Mapping[str, int] = {
    "nonfinite": 0,
    "saturated": 1,
    "stuck_units": 1,
    "attention_collapse": 1,
    "exploding_gradient": 2,
    "vanishing_gradient": 2,
}
"""What explains what: a rule of a lower rank is the origin of those above it. Rules that are not here are their own origin."""


class Diagnosis:
    """Turns the alerts of single sites into verdicts: one alert per origin, with its causes."""

    def __init__(self) -> None:
        self._first: Snapshot | None = None
        self._before: Snapshot | None = None
        self._raw: dict[tuple[str, str], Alert] = {}
        self._told: dict[tuple[str, str], Alert] = {}

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, in plain types."""
        first, before = (None if each is None else each.as_dict() for each in (self._first, self._before))
        return {"first": first, "before": before, "told": [alert.as_dict() for alert in self._told.values()]}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        first, before = (None if kept[each] is None else Snapshot.from_dict(kept[each]) for each in ("first", "before"))
        self.resume([Alert.from_dict(alert) for alert in kept["told"]], first, before)

    def resume(self, told: Iterable[Alert], first: Snapshot | None, before: Snapshot | None) -> None:
        """Go on as after these verdicts: `first` and `before` are what a `Scene` has."""
        self._first, self._before = first, before
        self._told = {(alert.site, alert.rule): alert for alert in told}

    @property
    def firing(self) -> tuple[Alert, ...]:
        """The verdicts that stand now, worst first."""
        return tuple(sorted(self._told.values(), key=lambda alert: (alert.severity != "critical", alert.since)))

    def judge(self, events: Sequence[Alert], firing: Sequence[Alert], snapshot: Snapshot) -> tuple[Alert, ...]:
        """The verdicts that are new, worse or over, from what fired or cleared at single sites, and what fires now."""
        self._first = self._first or snapshot
        finite = not any(record.nonfinite or record.grad_nonfinite for record in snapshot.records)
        if finite or self._before is None:
            self._before = snapshot
        self._raw = {(alert.site, alert.rule): alert for alert in firing}
        said = []
        for event in events:
            if not event.firing and self._told.pop((event.site, event.rule), None) is not None:
                said.append(event)
        scene = Scene(snapshot, self._first, self._before)
        groups = self._grouped(snapshot)
        for key, alert in list(self._told.items()):
            if key not in groups and key in self._raw:
                del self._told[key]
                origin = next((other for other, members in groups.items() if key in members), None)
                if origin is not None:
                    said.append(replace(alert, step=snapshot.step, firing=False, message=f"{alert.site}: told with {origin[0]} from here on"))
        for key, members in groups.items():
            alert = self._raw[key]
            critical = any(self._raw[member].severity == "critical" for member in (key, *members))
            old = self._told.get(key)
            also = tuple(dict.fromkeys(place for place, _ in members if place != alert.site))
            alert = replace(alert, severity="critical" if critical else alert.severity, also=also, causes=old.causes if old else ())
            if old is None or (old.severity != "critical" and critical):
                alert = replace(alert, causes=explain(alert, scene))
                said.append(alert)
            self._told[key] = alert
        return tuple(said)

    def _grouped(self, snapshot: Snapshot) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """Every origin among the alerts that fire now, with those that follow from it, in the order of data flow."""
        place = {record.site: at for at, record in enumerate(snapshot.records)}
        sites = {key: [site for site in sites_of(key[0], snapshot) if site in place] for key in self._raw}
        order = sorted(self._raw, key=lambda key: (_RANK.get(key[1], 3), min((place[site] for site in sites[key]), default=len(place))))
        before = {site: upstream_of(site, snapshot.records) for key in order for site in sites[key]}
        groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for key in order:
            rank = _RANK.get(key[1], 3)
            for origin, members in groups.items():
                lower = _RANK.get(origin[1], 3)
                upstream = any(site in before[mine] or site == mine for site in sites[origin] for mine in sites[key])
                if (key[1] in _RANK or key[1] == "frozen_weights") and origin[1] in _RANK and (lower < rank if rank != 1 or lower == 0 else upstream):
                    members.append(key)
                    break
                if rank == 0 and lower == 0 and upstream:
                    members.append(key)
                    break
            else:
                groups[key] = []
        return groups


def upstream_of(site: str, records: Iterable[Record]) -> set[str]:
    """All sites that a site's input depends on."""
    after = {record.site: record.after for record in records}
    found: set[str] = set()
    waiting = list(after.get(site, ()))
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += after.get(name, ())
    return found


def sites_of(place: str, snapshot: Snapshot) -> Sequence[str]:
    """The sites that an alert's place stands for: itself, or those that a layer feeds."""
    weight = next((weight for weight in snapshot.weights if weight.name == place), None)
    return weight.feeds if weight is not None else (place,)
