"""What an explanation looks at: the snapshots that it compares, and the few numbers that are kept of the observations between them; standard library
only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from torchsat.record import Record, Snapshot, Weight
from torchsat.start import came_trained

EARLY = 3
"""So many first observations tell how a run began."""
HOT = 0.1
"""A step that changes a layer by this share of itself or more is too large."""
_LATEST = 32
"""So many of the latest observations are kept in short. A rule has less patience than that, so the beginning of what it tells is among them."""


@dataclass(frozen=True)
class Moment:
    """What is kept of an observation when its snapshot is gone."""

    step: int
    updates: Mapping[str, float]
    """By how much of itself the step changed each layer, without what weight decay did: `Weight.learned`."""
    stuck: Mapping[str, float]
    """`Record.stuck` of each site that has one."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """The learning rate of each layer that has one."""

    def as_dict(self) -> dict[str, Any]:
        """The moment in plain types."""
        return asdict(self)


def remember(moments: Sequence[Moment], snapshot: Snapshot) -> tuple[Moment, ...]:
    """The moments with that of a new snapshot: the first and the latest ones of a run."""
    updates = {weight.name: weight.learned for weight in snapshot.weights if weight.learned is not None}
    stuck = {record.site: record.stuck for record in snapshot.records if record.stuck is not None}
    rates = {weight.name: weight.learning_rate for weight in snapshot.weights if weight.learning_rate}
    now = (*moments, Moment(snapshot.step, updates, stuck, rates))
    return now if len(now) <= EARLY + _LATEST else (*now[:EARLY], *now[-_LATEST:])


@dataclass(frozen=True)
class Jump:
    """The step that changed a layer most."""

    weight: str
    step: int
    ratio: float
    """`Moment.updates` at this step."""
    before: Moment | None
    """The observation before it; None where it is the first one that is known."""


@dataclass(frozen=True)
class Scene:
    """The snapshots that an explanation compares."""

    now: Snapshot
    """The observation at which the alert is raised."""
    first: Snapshot
    """The first observation of the run: the network as it was initialised or loaded."""
    before: Snapshot
    """The last observation in which every number was finite; the first one if there was none."""
    moments: tuple[Moment, ...] = field(default=(), kw_only=True)
    """What is kept of the observations until now, oldest first."""

    @cached_property
    def trained(self) -> bool:
        """Whether the network came with trained weights: they are uneven, or they are aligned with what they are given."""
        return came_trained(self.first) or _is_aligned(self.at_first)

    @property
    def started(self) -> bool:
        """Whether the network has had a step that was observed, so that it can differ from what it was at first."""
        return self.now.step > self.first.step

    @cached_property
    def at_first(self) -> Scene:
        """The scene as it was at the first observation."""
        return replace(self, now=self.first, before=self.first)

    def record(self, site: str) -> Record | None:
        """What was measured at a site; None if it did not run."""
        return next((record for record in self.now.records if record.site == site), None)

    def start(self, site: str) -> Record | None:
        """What was measured at a site at the first observation; None if it did not run then."""
        return next((record for record in self.first.records if record.site == site), None)

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

    def first_input(self, name: str) -> float | None:
        """The rms of the input of a layer at the first observation."""
        return next((weight.input_rms for weight in self.first.weights if weight.name == name), None)

    def layers(self) -> list[tuple[Record, Weight]]:
        """Each site with every layer that feeds it, in the order of data flow. A layer that feeds several sites is told with the first of them."""
        found: dict[str, tuple[Record, Weight]] = {}
        for record in self.now.records:
            for weight in self.feeders(record.site):
                found.setdefault(weight.name, (record, weight))
        return list(found.values())

    def data(self) -> list[Weight]:
        """The layers whose input is the model's own, as they are now, or at the first observation where their input is not finite now."""
        now = {
            weight.name: weight for weight in (*self.first.weights, *self.now.weights) if weight.data and weight.whole is None and weight.input_rms
        }
        return list(now.values())

    def jump(self, names: Iterable[str]) -> Jump | None:
        """The largest change of one of these layers by one observed step, until now; None if no change is known."""
        wanted = set(names)
        found = [
            Jump(name, moment.step, ratio, self.moments[at - 1] if at else None)
            for at, moment in enumerate(self.moments)
            for name, ratio in moment.updates.items()
            if name in wanted and moment.step <= self.now.step and math.isfinite(ratio)
        ]
        return max(found, key=lambda jump: jump.ratio, default=None)

    def stuck_at_first(self, site: str) -> float | None:
        """The share of stuck units at the earliest of the first observations that knows it; None if none does. What a step that was too large has
        done is not of the start."""
        for moment in self.moments[:EARLY]:
            if site in moment.stuck:
                return moment.stuck[site]
            if max(moment.updates.values(), default=0.0) >= HOT:
                return None
        return None


def _is_aligned(first: Scene) -> bool:
    """Whether most hidden layers made more of their input at the first observation than weights do that know nothing of it.

    Weights that are drawn make z of an rms of gain x input rms, to within a tenth in layers of 32 units and more, whatever their distribution.
    Training turns them towards their input, long before it makes a weight of a small layer uneven. The biases that torch draws are allowed for. Where
    z is larger by more than `_MOST_ALIGNED`, or is shifted as a whole, a factor in the code or a bias has made it so. The sum of a recurrent layer
    has two inputs, of which one is not known, so nothing is concluded from it.
    """
    known = []
    for record, weight in first.layers():
        if record.kind in ("recurrent", "softmax") or (record.units or 0) < _WIDE or not (weight.gain and weight.input_rms and record.z_rms):
            continue
        drawn = weight.gain * weight.input_rms
        bias = math.sqrt(2 / (3 * weight.fan_in))
        known.append(not is_shifted(record) and math.hypot(_ALIGNED * drawn, bias) < record.z_rms < _MOST_ALIGNED * drawn)
    return len(known) >= 2 and 2 * sum(known) > len(known)


def is_shifted(record: Record) -> bool:
    """Whether z of nearly all units lies on one side. An offset of the inputs moves z of some units up and of others down, so this is a bias."""
    return abs(record.z_mean or 0.0) > (record.z_std or 0.0)


_WIDE = 32
_ALIGNED = 1.25
_MOST_ALIGNED = 3.0


@dataclass(frozen=True)
class Term:
    """One term of the sum that is explained, with what a reader is told about it."""

    cause: str
    """The name of the cause. Terms of the same cause are added."""
    size: float
    evidence: str
    remedy: str
    is_own: bool = False
    """Whether it is told as it is although something was wrong from the start. Growth is otherwise taken for a consequence of that."""


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
