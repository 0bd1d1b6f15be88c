"""What training has changed: weights that have grown, or that weight decay has shrunk; standard library only.

Growth is said only of what has changed, with the figures from before and now: the gain of a layer, its z, or a single step that changed a layer by
far more than a step should. A network whose steps change a weight by a tenth of itself does not learn but jump, and then the learning rate is at
fault. Where weights grow by steps of a sound size, a lower rate would only delay it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torchsat.causes import advice
from torchsat.causes.rate import rise_before
from torchsat.causes.scene import HOT, Jump, Scene, Term
from torchsat.expressions import spoken
from torchsat.percent import percent
from torchsat.record import Record, Weight

GROWN = 1.5
"""A weight is said to have grown when its gain is more than this many times what it was at first. The same holds of z and of the alignment."""
_TO_SAY = 1.1
"""What has changed by less is not worth a figure: it might be printed as a growth from 1.45 to 1.45."""
_GONE = 0.1
_SHRUNK = 0.5
"""Weights are said to have shrunk when their gain is below this share of what it was at first."""


def grown(scene: Scene, weight: Weight | None, record: Record | None, size: float) -> list[Term]:
    """The term of what training has changed at a site and at the layer that feeds it; nothing where nothing has changed.

    Args:
        weight: the layer; None where it is not seen.
        size: of the term.
    """
    names = [weight.name] if weight else [each.name for each in scene.now.weights]
    jump = scene.jump(names)
    said = [text for text in (_of_gain(scene, weight), _of_z(scene, record)) if text][:1]
    if jump is not None and jump.ratio >= HOT:
        said.append(_of_jump(jump))
    elif said and weight and weight.update_ratio:
        said.append(f"a step changes it by {of_itself(weight.update_ratio)}")
    if not said or size <= 0:
        return []
    return [Term("weight_growth", size, "; ".join(said), cure(scene, weight, jump) if jump else _cure_unseen(scene, record))]


def _of_gain(scene: Scene, weight: Weight | None) -> str | None:
    known = scene.first_gain(weight.name) if weight else None
    if weight is None or not known or (weight.gain or 0.0) < _TO_SAY * known:
        return None
    return f"the gain of {spoken(weight.name)} has grown from {known:.3g} to {weight.gain:.3g}"


def _of_z(scene: Scene, record: Record | None) -> str | None:
    """What has become of z at a site since the first observation."""
    start = scene.start(record.site) if record else None
    if record is None or start is None or None in (record.z_mean, record.z_std, start.z_mean, start.z_std) or not scene.started:
        return None
    if moved(scene, record):
        return f"z of {spoken(record.site)} has moved from {start.z_mean:.3g} +- {start.z_std:.3g} to {record.z_mean:.3g} +- {record.z_std:.3g}"
    if (record.z_rms or 0.0) >= _TO_SAY * (start.z_rms or math.inf):
        return f"z of {spoken(record.site)} has grown from an rms of {start.z_rms:.3g} to {record.z_rms:.3g}"
    return None


def moved(scene: Scene, record: Record) -> bool:
    """Whether the mean of z has gone further since the first observation than z spread then."""
    start = scene.start(record.site)
    if start is None or start.z_mean is None or record.z_mean is None or not scene.started:
        return False
    return abs(record.z_mean - start.z_mean) > max(0.5 * (start.z_std or 0.0), 1e-3)


def _of_jump(jump: Jump) -> str:
    """A step that changed a layer by far too much, and the observation before it where that was still sound."""
    before = jump.before.updates.get(jump.weight) if jump.before else None
    then = f", after {of_itself(before)} at step {jump.before.step}" if jump.before and before is not None and before < 0.5 * jump.ratio else ""
    return f"step {jump.step} changed {spoken(jump.weight)} by {of_itself(jump.ratio)}{then}"


def of_itself(ratio: float) -> str:
    """An update ratio in words."""
    return f"{percent(ratio)} of itself" if ratio < 1 else f"{ratio:.3g} times itself"


def cure(scene: Scene, weight: Weight | None, jump: Jump | None) -> str:
    """What to try against growth."""
    if jump is None or jump.ratio < HOT:
        return advice.hold(weight)
    rise = rise_before(scene.moments, jump.step)
    if rise is not None and (rise.of_all or rise.layer == jump.weight):
        return advice.as_before(rise.last, spoken(rise.layer), rise.before, rise.after, rise.of_all)
    rates = [each.learning_rate for each in scene.now.weights if each.name == jump.weight and each.learning_rate]
    return advice.slower(rates[0] if rates else None, jump.ratio)


def _cure_unseen(scene: Scene, record: Record | None) -> str:
    """What to try where no change of a weight is seen: z tells how fast they grow."""
    start = scene.start(record.site) if record else None
    if record is None or start is None or not start.z_rms or not record.z_rms or not scene.started:
        return advice.hold(None)
    a_step = (record.z_rms / start.z_rms) ** (1 / (scene.now.step - scene.first.step)) - 1
    return advice.slower(None, a_step) if a_step >= HOT else advice.hold(None)


def has_jumped(scene: Scene, names: Iterable[str]) -> bool:
    """Whether a step changed one of these layers by far too much."""
    jump = scene.jump(names)
    return jump is not None and jump.ratio >= HOT


def jumped(scene: Scene, names: Sequence[str], size: float) -> list[Term]:
    """A term for the largest step of these layers, where it is too large."""
    jump = scene.jump(names)
    if jump is None or jump.ratio < HOT:
        return []
    return [Term("weight_growth", size, _of_jump(jump), cure(scene, None, jump))]


def shrunk(scene: Scene, weights: Sequence[Weight], least: float = _SHRUNK) -> list[Term]:
    """Layers that weight decay has made small, or a penalty in the loss. `least`: what is left of the gain of those that decay at the most."""
    found: list[tuple[float, Weight, float]] = []
    for weight in weights:
        known = scene.first_gain(weight.name)
        if known and weight.gain is not None and weight.gain < (least if weight.decays else _GONE) * known:
            found.append((math.log(known / max(weight.gain, 1e-30)), weight, known))
    if not found:
        return []
    _, weight, known = max(found, key=lambda each: each[0])
    step = f"a step changes it by {of_itself(weight.update_ratio or 0.0)}"
    if weight.decays:
        step += f", without weight decay by {of_itself(weight.learned or 0.0)}"
    more = f", and {len(found) - 1} more layers have shrunk" if len(found) > 1 else ""
    return [
        Term(
            "weight_decay",
            sum(size for size, _, _ in found),
            f"the gain of {spoken(weight.name)} has fallen from {known:.3g} to {weight.gain:.3g}{more}; {step}",
            advice.decay_less() if weight.decays else "make the penalty in the loss that pulls the weights to 0 smaller",
        )
    ]
