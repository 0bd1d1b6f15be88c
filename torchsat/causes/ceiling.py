"""Why the logits of an attention grow: the ceiling that the weights of queries and keys set; standard library only.

A logit is q.k / sqrt(d) with q = W_q x and k = W_k y, so that the largest one is at most ||W_q|| ||W_k|| |x| |y| / sqrt(d), where ||W|| is the
largest singular value. How much the ceiling has grown is therefore a sum of terms,

    ln(ceiling now / ceiling at first) = ln(||W_q|| now / at first) + ln(||W_k|| now / at first) + 2 ln(|x| now / at first)

and each weight that has grown is told with its figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchsat.causes import advice
from torchsat.causes.closed import of_data
from torchsat.causes.growth import GROWN, cure, of_itself
from torchsat.causes.scene import HOT, Scene, Term
from torchsat.expressions import spoken
from torchsat.record import Alert, Record, Weight


@dataclass(frozen=True)
class Grown:
    """A weight that makes queries or keys, with its largest singular value at the first observation."""

    weight: Weight
    was: float

    @property
    def ratio(self) -> float:
        """How many times as large it has become."""
        return (self.weight.spectral or 0.0) / self.was

    @property
    def told(self) -> str:
        """The figures."""
        return f"||W|| of {spoken(self.weight.name)} {f'has grown from {self.was:.3g} to' if self.ratio > 1 else 'is'} {self.weight.spectral:.3g}"


def weights_of(site: str, scene: Scene) -> list[Grown]:
    """The weights that make the logits of a site and whose largest singular value is known, now and at the first observation, the one that has grown
    most first."""
    first = {weight.name: weight.spectral for weight in scene.first.weights}
    found = [
        Grown(weight, was)
        for weight in scene.now.weights
        if site in weight.feeds and weight.spectral is not None and math.isfinite(weight.spectral) and (was := first.get(weight.name))
    ]
    return sorted(found, key=lambda each: -each.ratio)


def of_weights(site: str, scene: Scene, most: float) -> list[Term]:
    """The term of the weights of queries and keys that training has made large. `most`: its size at the most."""
    known = weights_of(site, scene) if scene.started else []
    grown = [each for each in known if each.ratio > GROWN]
    if not grown:
        return []
    told = [each.told for each in (grown + [each for each in known if each not in grown])[:2]]
    first, jump = grown[0].weight, scene.jump([each.weight.name for each in grown])
    if jump is not None and jump.ratio < HOT and first.update_ratio:
        told.append(f"a step changes it by {of_itself(first.update_ratio)}")
    elif jump is not None:
        told.append(f"step {jump.step} changed {spoken(jump.weight)} by {of_itself(jump.ratio)}")
    size = sum(math.log(each.ratio) for each in grown)
    remedy = cure(scene, first, jump) if jump is not None and jump.ratio >= HOT else advice.slower_there([each.weight for each in grown])
    return [Term("weight_growth", min(most, size), "; ".join(told), remedy)]


def highest(record: Record) -> tuple[int, float] | None:
    """The head with the largest logit, and that logit; None where none is known."""
    known = [(head.logit_max, at) for at, head in enumerate(record.heads or ()) if head.logit_max is not None and math.isfinite(head.logit_max)]
    return (max(known)[1], max(known)[0]) if known else None


def ceiling_told(record: Record, start: Record | None) -> str | None:
    """The largest logit of a site now and at the first observation; None where it has not grown."""
    now, was = highest(record), None if start is None else highest(start)
    if now is None or was is None or now[1] < GROWN * was[1]:
        return None
    where = f" in head {now[0]}" if len(record.heads or ()) > 1 else ""
    return f"the largest logit of {spoken(record.site)} is {now[1]:.3g}{where}, and was {was[1]:.3g} at the first observation"


def cap(record: Record, scene: Scene) -> str:
    """What to try against logits that have grown."""
    known = highest(record)
    return advice.cap_logits(record, [each.weight for each in weights_of(record.site, scene)], 0.0 if known is None else known[1])


def of_growth(alert: Alert, scene: Scene) -> list[Term]:
    """Logits whose largest has grown."""
    record = scene.record(alert.site)
    told = None if record is None else ceiling_told(record, scene.start(alert.site))
    if record is None or told is None:
        return []
    if record.log_keys and record.entropy is not None:
        told += f"; the entropy is {record.entropy:.2g} of ln T"
    return [Term("softmax_logits", 1.0, told, cap(record, scene)), *of_weights(record.site, scene, math.inf), *of_data(scene)]
