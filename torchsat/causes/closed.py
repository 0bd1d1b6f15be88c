"""Why units never leave their plateau; standard library only.

When they closed is what tells the causes apart. Units that were shut at the first observations were shut by what was there: a bias, or an offset of
the inputs. Units that have died since were shut by a step that was too large; where the inputs are far too large, or the weights were, that is why
the step was. What tells when they closed is the share of units, not that of elements: half of the elements of any ReLU are shut.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torchsat.causes import advice
from torchsat.causes.growth import GROWN, grown, has_jumped, jumped, shrunk
from torchsat.causes.scene import Scene, Term, is_shifted, upstream_of
from torchsat.causes.size import drawn_too_large, of_inputs, of_z, uncentred
from torchsat.expressions import gain_for, spoken
from torchsat.percent import percent
from torchsat.record import Alert, Record, Weight

_SHUT = 0.9
"""Where it is not known which units are shut, a site is taken for shut when this share of its elements is."""
_MANY = 0.3
"""So many units that an offset shuts at once are a fault of their own, whatever has closed since."""
_FAR = 3.0
"""Inputs of which what varies has this size are too large for any learning rate that suits inputs of size 1."""


def of_closed(alert: Alert, scene: Scene) -> list[Term]:
    """Units that never leave their plateau: because of the input, of the initialisation, or of steps of the optimizer that were too large."""
    record = scene.record(alert.site)
    if record is None:
        return []
    zero = [pair for pair in scene.at_first.layers() if pair[1].gain == 0]
    if zero and not scene.trained and not record.z_rms:
        return [_drawn_as_zero(zero, scene)]
    if record.tails == "both":
        terms = of_z(alert.site, scene)
        if terms:
            return terms
    return why_shut(record, scene) or [_dead(record, scene, "")]


def of_dormant(alert: Alert, scene: Scene) -> list[Term]:
    """Units that fell asleep in training. Steps that were too large, and inputs or weights of a wrong size, put units to sleep as they shut them.
    Where none is found, the network has learned one thing after another until its units were spent (Dohare et al. 2024)."""
    record, start = scene.record(alert.site), scene.start(alert.site)
    if record is None:
        return []
    known = why_shut(record, scene) if record.tails == "low" else []
    before = f", {percent(start.dormant)} at the first observation" if start is not None and start.dormant is not None else ""
    evidence = f"{percent(record.dormant or 0.0)} of the units of {spoken(record.site)} are dormant{before}"
    if record.blocked is not None:
        evidence += f"; {percent(record.blocked)} of the gradient is lost on its plateau"
    others = [replace(term, evidence=f"{evidence}; {term.evidence}") if term.cause == "dead_units" else term for term in known]
    return others if any(term.cause == "dead_units" for term in others) else [*others, Term("dead_units", 0.7, evidence, _revive(record, scene))]


def _revive(record: Record, scene: Scene) -> str:
    """What to try against units that fell asleep in training."""
    if scene.trained:
        return f"{advice.AS_TRAINED}; other inputs may wake these units"
    behind = {each.site for each in scene.now.records if record.site in each.after}
    after = [weight for weight in scene.now.weights if behind & set(weight.feeds)]
    return advice.revive(record, scene.feeders(record.site), after)


def _drawn_as_zero(layers: list[tuple[Record, Weight]], scene: Scene) -> Term:
    """Weights that are all 0 at the first observation, so that z is 0, which is where the plateau of a rectifier begins."""
    weight = layers[0][1]
    evidence = f"{spoken(weight.name)} had a gain of 0 at the first observation: all of its weights are 0"
    return Term("init_too_small", 1.0, evidence, advice.draw(layers, scene))


def why_shut(record: Record, scene: Scene) -> list[Term]:
    """What has shut the units of a site with one plateau; nothing where that is not known."""
    return _from_the_start(record, scene) if shut_at_first(record, scene) else _in_training(record, scene)


def shut_at_first(record: Record, scene: Scene) -> bool:
    """Whether most of the units that are shut now were shut at the first observations."""
    stuck, start = scene.stuck_at_first(record.site), scene.start(record.site)
    if start is None:
        return False
    if _shut_by_offset(scene) >= _MANY:
        return True
    if stuck is not None and record.stuck:
        return stuck >= 0.6 * record.stuck
    return (start.saturated or 0.0) >= _SHUT


def _shut_by_offset(scene: Scene) -> float:
    """The share of units that an offset of the inputs shuts at once, where weights know nothing of the input.

    It moves z of each unit by a normal number, whose deviation is q = sqrt((1 - c) / c) times that of z over samples, with c the centred share. A
    unit that it moves by 2.5 deviations of z over samples is shut in 99 % of them.
    """
    shares = [max(weight.input_centred_share, 1e-6) for weight in scene.data() if weight.input_centred_share is not None]
    ratio = max((math.sqrt((1 - share) / share) for share in shares if share < 0.5), default=0.0)
    return 0.5 * math.erfc(2.5 / ratio / math.sqrt(2)) if ratio else 0.0


def _from_the_start(record: Record, scene: Scene) -> list[Term]:
    start = scene.start(record.site) or record
    terms = of_offset(record.site, scene)
    if not terms or is_shifted(start):
        terms.append(_dead(start, scene, " at the first observation"))
    largest = max(term.size for term in terms)
    since = [*_growth(record, scene), *shrunk(scene, [pair[1] for pair in scene.layers()])]
    return terms + [replace(term, size=min(term.size, 0.5 * largest)) for term in since]


def _in_training(record: Record, scene: Scene) -> list[Term]:
    """What closed the units of a rectifier since the first observation. The inputs were the same from the start, so an offset is only the second
    cause."""
    terms = [*_growth(record, scene), *shrunk(scene, [pair[1] for pair in scene.layers()]), *_of_initialisation(scene)]
    terms += [term for term in of_data(scene) if term.cause == "inputs_unscaled"]
    leading = max((term.size for term in terms), default=0.0)
    # At less than 1, it does not make a consequence of the growth.
    return terms + [replace(term, size=min(term.size, 0.9 * leading, 0.9) if leading >= 1 else term.size) for term in of_offset(record.site, scene)]


def _growth(record: Record, scene: Scene) -> list[Term]:
    """What the steps have changed. Where none of them was too large and the weights are of the size that they had, it is the least of the causes."""
    feeders = scene.feeders(record.site)
    weight = feeders[0] if feeders else None
    ratio = (weight.gain or 1.0) / (scene.first_gain(weight.name) or weight.gain or 1.0) if weight else 1.0
    names = [each.name for each in scene.now.weights]
    is_plain = ratio > GROWN or has_jumped(scene, names)
    size = 1.0 + math.log(max(ratio, 1.0)) if is_plain or not feeders else 0.3
    return grown(scene, weight, record, size) or jumped(scene, names, size)


def of_data(scene: Scene) -> list[Term]:
    """Of inputs whose scale is far too large, whatever is computed of them; of several layers that read data, of that with the largest."""
    found = [weight for weight in scene.data() if varying(weight) > _FAR]
    return of_inputs(max(found, key=varying), scene) if found else []


def varying(weight: Weight) -> float:
    """The rms of what varies between samples of the input of a layer."""
    return (weight.input_rms or 0.0) * math.sqrt(1.0 if weight.input_centred_share is None else weight.input_centred_share)


def _of_initialisation(scene: Scene) -> list[Term]:
    """Weights of the whole network that were too large at first: its outputs, and so its first steps, were too large."""
    large = [pair for pair in scene.at_first.layers() if advice.too_large(*pair, GROWN) and not pair[1].whole]
    if not large or scene.trained:
        return []
    large.sort(key=lambda pair: -(pair[1].gain or 0.0) / gain_for(pair[0].activation))
    return [drawn_too_large(scene, large, sum(math.log((weight.gain or 1.0) / gain_for(record.activation)) for record, weight in large))]


def of_offset(site: str, scene: Scene) -> list[Term]:
    """An offset of the model's inputs. Whatever its size, it closes some units of every rectifier behind it, and holds others open.

    At the first observation the weights know nothing of the input, so the offset moves each unit's z one way or the other by about gain x offset. The
    mean of z over all units shows a bias instead: the blame is less by as much as that mean is larger.
    """
    before = {site, *upstream_of(site, scene.now.records)}
    terms = []
    for weight in scene.data():
        centred = weight.input_centred_share
        if centred is None or centred >= 0.5 or not weight.input_rms or not before & set(weight.feeds):
            continue
        centred = max(centred, 1e-6)
        moved = (scene.first_gain(weight.name) or weight.gain or math.inf) * weight.input_rms * math.sqrt(1 - centred)
        means = [abs(fed.z_mean or 0.0) for name in {site, *weight.feeds} & before if (fed := scene.start(name)) is not None]
        bias = max(means, default=0.0)
        terms.append(uncentred(weight, weight.input_centred_share or 0.0, -math.log(centred) * min(1.0, moved / bias if bias else 1.0), scene))
    return terms


def _dead(record: Record, scene: Scene, when: str) -> Term:
    """Units that are shut, by what is measured of z. `when`: the end of the sentence, where it is known."""
    share = f": {percent(record.stuck)} of its units are shut" if record.stuck else f": {percent(record.saturated or 0.0)} of it lie on the plateau"
    verb = "was" if when and scene.started else "is"
    evidence = f"z of {spoken(record.site)} {verb} {record.z_mean or 0.0:.3g} +- {record.z_std or 0.0:.3g}{when}{share}"
    return Term("dead_units", 1.0, evidence, open_again(record, scene))


def open_again(record: Record, scene: Scene) -> str:
    """What to try against units that are shut."""
    if scene.trained:
        return f"{advice.AS_TRAINED}; other inputs may open these units"
    low = [(each, weight) for each, weight in scene.at_first.layers() if each.tails == "low" and (each.z_mean or 0.0) < -(each.z_std or 0.0)]
    if low:
        return advice.zero_biases([weight for _, weight in low], ", widen it, or use nn.LeakyReLU, nn.ELU, nn.GELU")
    rectifiers = [each for each in scene.now.records if each.activation == record.activation and each.kind == record.kind and not each.output]
    return advice.leaky(rectifiers or [record])
