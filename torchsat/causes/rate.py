"""A learning rate that rose at once, just before an alert began; standard library only.

It is told as a fact that was measured, beside the causes and not as one of them: a rate that has risen may be the reason why weights grow and logits
become large, and whether it is shows in what the steps have changed. A warm-up is no such rise. There the rate has been growing already, however much
it grows between two observations; here it was level or falling before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchsat.causes.scene import Moment
from torchsat.expressions import spoken

_AT_ONCE = 3.0
"""A rate that is so many times what it was at the observation before has risen at once."""
_LEVEL = 1.05
"""A rate that grew by more than this factor between the two observations before was growing already."""
_RECENT = 3
"""So many observations before the one at which an alert began are looked at, and that one itself."""


@dataclass(frozen=True)
class Rise:
    """A learning rate that rose at once."""

    layer: str
    """The layer whose rate rose most."""
    of_all: bool
    """Whether the rates of all layers rose at once then."""
    before: float
    after: float
    last: int
    """The last observed step with the rate before."""
    step: int
    """The first observed step with the rate after."""

    def told(self, since: int) -> str:
        """The rise as a part of a sentence, for an alert that began at step `since`."""
        what = "the learning rate" if self.of_all else f"the learning rate of {spoken(self.layer)}"
        when = f"at step {self.step}" if self.step == self.last + 1 else f"between steps {self.last} and {self.step}"
        distance = since - self.step
        before = f", {distance} step{'' if distance == 1 else 's'} before this began" if distance else ", just before this was seen"
        return f"{what} rose from {self.before:.3g} to {self.after:.3g} {when}{before}"


def rise_before(moments: Sequence[Moment], since: int) -> Rise | None:
    """The last rise of a learning rate within a few observations before an alert began; None if there is none."""
    began = next((at for at, moment in enumerate(moments) if moment.step >= since), None)
    if began is None:
        return None
    for at in range(began, max(1, began - _RECENT), -1):
        rise = _rise(moments[at - 2], moments[at - 1], moments[at])
        if rise is not None:
            return rise
    return None


def _rise(first: Moment, last: Moment, now: Moment) -> Rise | None:
    """What rose between the last two of three observations."""
    risen = {
        name: rate
        for name, rate in now.rates.items()
        if _ratio(last.rates, name, rate) >= _AT_ONCE and _ratio(first.rates, name, last.rates[name]) <= _LEVEL
    }
    if not risen:
        return None
    layer = max(risen, key=lambda name: risen[name] / last.rates[name])
    return Rise(layer, len(risen) == len(now.rates), last.rates[layer], risen[layer], last.step, now.step)


def _ratio(before: Mapping[str, float], name: str, now: float) -> float:
    """A rate over an earlier one; NaN, which is neither large nor small, where that is not known or is 0."""
    known = before.get(name)
    return now / known if known else float("nan")
