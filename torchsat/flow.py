"""The way of the gradient through the sites of a model, from the last one that it meets to the first; standard library only.

Sites are on one path if the signal flows from one to the other (`SiteFacts.after`). Norms of dL/dz are compared, not means over elements: where a
network pools positions, a mean falls with their number though no gradient is lost.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torchsat.experts import COLLAPSED, is_idle, is_router
from torchsat.record import Record, Snapshot, Weight
from torchsat.start import LONG, Start, per_snapshot


def on_signal_path(record: Record) -> bool:
    """Whether the signal passes through this site on its way to the loss. A gate and the logits of attention stand beside that way. Functions without
    a bound (`exp`, `square`) are left out: the activations in front of them and behind them are compared directly."""
    return not (record.output or record.gate or record.kind in ("softmax", "function"))


def gradient_over_depth(snapshot: Snapshot) -> float | None:
    """||dL/dz|| at a first site over ||dL/dz|| at the last one behind it; None if no two sites with a gradient lie on one path. Where several paths
    begin (a critic behind a `detach` has a first site of its own), the one whose ratio is farthest from 1.
    """
    ratios = [way.ratio for way in ways(snapshot).values()]
    return max(ratios, key=lambda ratio: abs(math.log(ratio)) if ratio else math.inf, default=None)


@per_snapshot
def idle_in_mixtures(snapshot: Snapshot) -> frozenset[str]:
    """The sites and layers in experts that get next to no tokens, and the router that has sent all to one. They have next to no gradient, which is a
    matter of the router and judged there."""
    if not snapshot.experts:
        return frozenset()
    collapsed = [each for each in snapshot.experts if each.concentration >= COLLAPSED]
    routers = {each.site for each in snapshot.records if is_router(each.site, each.log_keys, collapsed)}
    places = (*(each.site for each in snapshot.records), *(each.name for each in snapshot.weights))
    idle = {place for place in places if is_idle(place, snapshot.experts)}
    return frozenset(idle | {each.name for each in snapshot.weights if each.feeds and routers.issuperset(each.feeds)})


@dataclass(frozen=True)
class Way:
    """The way of the gradient from the end of a path to the site with which it begins."""

    end: str
    """The site with which the path ends."""
    ratio: float
    """||dL/dz|| at the first site over that at the end."""
    layers: int
    """From how many sites to the one before them the gradient is passed on, by the shortest way."""

    @property
    def per_layer(self) -> float:
        """What one site passes on to the one before it, as a geometric mean."""
        return float(self.ratio ** (1 / self.layers))


def over_depth(record: Record, snapshot: Snapshot) -> float | None:
    """`Way.ratio` at a site with which paths begin; None at any other site."""
    way = ways(snapshot).get(record.site)
    return None if way is None else way.ratio


@per_snapshot
def ways(snapshot: Snapshot) -> Mapping[str, Way]:
    """For each site with which paths begin, the way of the gradient to it.

    Sites are on one path if the signal flows from one to the other. A path ends at a site behind which no other one lies, or from which the output of
    the model is computed directly. Where a site has several ends behind it, its gradient is the sum of what comes from all of them, so it is compared
    with the end that has the largest: the others belong to losses that weigh little.
    """
    return dict(_ways(snapshot))


def _ways(snapshot: Snapshot) -> Iterator[tuple[str, Way]]:
    norms = {r.site: r.grad_z_rms * math.sqrt(r.elements) for r in snapshot.records if r.grad_z_rms is not None and on_signal_path(r)}
    for idle in [each.site for each in snapshot.records if each.site in norms and _is_idle(each, snapshot, norms)]:
        del norms[idle]
    for idle in idle_in_mixtures(snapshot):
        norms.pop(idle, None)
    after = {each.site: each.after for each in snapshot.records}
    before = {site: _nearest(site, after, norms) for site in norms}
    behind: dict[str, set[str]] = {site: set() for site in norms}
    for site, sources in before.items():
        for source in sources:
            behind[source].add(site)
    direct = {each.site for each in snapshot.records if each.last}
    for site, sources in before.items():
        if sources or not behind[site]:
            continue
        reached = _reached(site, behind)
        ends = [each for each in reached if not behind[each] or (each in direct and _enters(each, behind, norms))]
        end = max((each for each in ends if each != site), key=lambda each: norms[each], default=None)
        if end is not None and norms[end]:
            yield site, Way(end, norms[site] / norms[end], _distance(site, end, behind))


def _is_idle(record: Record, snapshot: Snapshot, norms: Mapping[str, float]) -> bool:
    """Whether nothing is asked of a first site, though the sites behind it have a gradient: its output is multiplied by a zero, as the forget gate of
    an LSTM is at the first step of a sequence. At a site in front of closed ones, those have no gradient either."""
    behind = [site for site in snapshot.behind.get(record.site, ()) if site in norms]
    return record.grad_a_rms == 0 and not any(site in norms for site in record.after) and all(norms[site] for site in behind)


def _distance(site: str, end: str, behind: Mapping[str, Iterable[str]]) -> int:
    """How many steps it takes from a site to one behind it."""
    reached, steps = {site}, 0
    while end not in reached:
        reached |= {each for site in reached for each in behind[site]}
        steps += 1
    return steps


def _enters(site: str, behind: Mapping[str, set[str]], norms: Mapping[str, float]) -> bool:
    """Whether the gradient at a site comes from the model's output directly, and not from the sites behind it: they have hardly any. Features that
    the model returns too may have no part in the loss."""
    return norms[site] > _MOST_OF_ONE_LAYER * max(norms[other] for other in behind[site])


_MOST_OF_ONE_LAYER = 30.0
"""A gradient that grows by more from one site to the one before it is taken to come from elsewhere, if it can."""


def _nearest(site: str, after: Mapping[str, Iterable[str]], known: Mapping[str, object]) -> set[str]:
    """The known sites that a site's input comes from with no other known one between. Sites without a gradient are passed over."""
    found, waiting, met = set[str](), list(after[site]), {site}
    while waiting:
        name = waiting.pop()
        if name in met:
            continue
        met.add(name)
        if name in known:
            found.add(name)
        else:
            waiting += after.get(name, ())
    return found


def _reached(site: str, behind: Mapping[str, Iterable[str]]) -> set[str]:
    """A site and all those behind it."""
    found, waiting = set[str](), [site]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += behind[name]
    return found


def shallow(record: Record, snapshot: Snapshot, start: Start) -> float | None:
    """`Way.ratio` of a short path that loses the gradient layer by layer; 1 where it does not, or does no harm.

    A stack of three or four sigmoids is too short for a ratio that float16 cannot hold, and yet its first layers may never learn. They do not learn
    if three things hold: each layer passes on little; the optimizer does not make up for that, so that the weights of the first layer change by as
    much less than those of the last; and z of the first site is what it was at the start, though a hundred steps have passed.
    """
    way = ways(snapshot).get(record.site)
    if way is None:
        return None
    first = start.item.z_std if isinstance(start.item, Record) else None
    if start.trained or not first or record.z_std is None or snapshot.step < start.step + LONG:
        return 1.0
    steps = [_step_into(site, snapshot) for site in (record.site, way.end)]
    if way.layers < 2 or way.per_layer > _LITTLE or abs(record.z_std / first - 1) > _SAME or not all(steps):
        return 1.0
    return max(way.ratio, (steps[0] or 0.0) / (steps[1] or 1.0))


_LITTLE = 0.35
"""A layer that passes on less of the gradient loses it. A sigmoid passes on 0.25 times the gain of its weights, a tanh by torch's default 0.58."""
_SAME = 0.1
"""A standard deviation that has changed by less than this part has not changed."""


@per_snapshot
def median_step(snapshot: Snapshot) -> float | None:
    """The median `step_size` of all layers but those of idle experts; None where fewer than three are known, or where half of them do not move."""
    idle = idle_in_mixtures(snapshot)
    steps = [step for each in snapshot.weights if each.name not in idle and (step := step_size(each)) is not None]
    return (statistics.median(steps) or None) if len(steps) >= 3 else None


def step_size(weight: Weight) -> float | None:
    """The size of a step, without weight decay, divided by the learning rate; None for a layer that had nothing to learn from in this step, and for a
    part of a layer, which is judged as a whole."""
    learned = weight.learned
    if weight.whole is not None or learned is None or not math.isfinite(learned):
        return None
    if weight.grad_norm is None or not weight.input_n or not weight.learning_rate:
        return None
    return learned / weight.learning_rate


def _step_into(site: str, snapshot: Snapshot) -> float | None:
    """The largest `step_size` of the layers that feed a site."""
    return max((step for weight in snapshot.weights if site in weight.feeds and (step := step_size(weight)) is not None), default=None)


def heard(snapshot: Snapshot) -> Iterator[Record]:
    """The sites at which dL/da was seen, in the order of data flow."""
    return (each for each in snapshot.records if each.grad_n and each.grad_a_rms is not None)


def nothing_arrives(record: Record, snapshot: Snapshot) -> float | None:
    """1 where dL/da is exactly 0 at every site at which it was seen, 0 elsewhere. It is judged at the first of these sites."""
    if next(heard(snapshot), None) is not record:
        return None
    return float(all(each.grad_a_rms == 0 for each in heard(snapshot)))
