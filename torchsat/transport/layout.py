"""Where each number of an observation lies in the two vectors that travel: the same order on every device and every rank.

The layout of one process (`Layout.of`) holds what ran there. The layout of several ranks (`Layout.joined`) is made of what each rank tells the others
about its sites and layers (`told`), as JSON: the text comes from another process, and reading JSON cannot run code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torchsat.columns import BLOCK, FEATURES, HEADS, MAXES, SUMS, TALLIES, WEIGHT
from torchsat.parts import Key, LayerPart, Parts, SitePart
from torchsat.record import LayerFacts, SiteFacts

WORST = ("worst", "nonfinite")
"""Max columns of a site: the highest saturated share and the highest non-finite count of one rank, each with that rank, in one float64."""
LAYER_SUMS = ("weight_sq", "change_sq", "change_n", "grad_sq", "grad_n", "learned_sq", "learned_n", "n", "numel")
"""Sum columns of a layer. change_n, grad_n and learned_n are 0 where no rank knows the number before it."""
LAYER_MAXES = ("learning_rate", "weight_sq", "weight_sq_negated", "unevenness", "spectral")
"""Max columns of a layer. Those of weight_sq are filled where every rank holds the whole weight: they tell whether all hold the same one."""
ENDS = ("step", "step_negated", "interval", "changed", "earliest", "skipped")
"""Max columns of an observation of several ranks as a whole. The largest negated step is the lowest step of a rank."""
ENDS_ALONE = ("skipped", "scale")
"""Max columns of an observation of one process as a whole. It sends the GradScaler's factor along; ranks divide by it before they send."""


@dataclass(frozen=True)
class SiteEntry:
    """One site of a layout."""

    facts: SiteFacts
    units: int | None = None
    """Columns of its unit block [4, units]; None where it has none."""
    heads: int | None = None
    """Columns of its block of heads [14, heads]; None where it is no softmax."""
    stage: int | None = None
    """The number of the pipeline stage that it is in; None where there is no pipeline."""
    leaves: bool = False
    """Whether its output leaves the stage for the next one."""


@dataclass(frozen=True)
class LayerEntry:
    """One layer of a layout."""

    facts: LayerFacts
    features: int = 0
    """Columns of the sums of its input [6, features]; 0 where its input is not measured."""
    stage: int | None = None
    n: int = 0
    """Number of elements of the weight that were read. This and the next two are set for one process only: they are on the host and need no
    packing."""
    numel: int = 0
    """Number of elements of the weight."""
    rate: float | None = None
    """The learning rate of the optimizer's group that owns the weight; None where it is not known, or travels because only the device knows it."""


@dataclass(frozen=True)
class TallyEntry:
    """One place of a tally in a layout."""

    facts: Mapping[str, Any]
    width: int


@dataclass(frozen=True)
class Places:
    """The lengths of the two vectors, and the slice of each table in one of them."""

    site_sums: slice
    """[sites, SUMS] in the sums."""
    layer_sums: slice
    """[layers, LAYER_SUMS] in the sums; [layers, WEIGHT] in the layout of one process."""
    blocks: dict[str, slice]
    """[4, units] of each site that has units, in the sums."""
    heads: dict[str, slice]
    """[13, heads] of each softmax, in the sums."""
    inputs: dict[str, slice]
    """[6, features] of each layer whose input is measured, in the sums."""
    site_maxes: slice
    """[sites, MAXES] in the maxes."""
    worst: slice
    """[sites, WORST] in the maxes; empty in the layout of one process."""
    layer_maxes: slice
    """[layers, LAYER_MAXES] in the maxes; in the layout of one process [layers], the learning rates that only the device knows."""
    ends: slice
    """ENDS in the maxes; ENDS_ALONE in the layout of one process."""
    tops: dict[str, slice]
    """The last row of HEADS [1, heads] of each softmax, in the maxes."""
    tally_sums: dict[Key, slice]
    """[Tally.sums, width] of each place of a tally, in the sums."""
    tally_maxes: dict[Key, slice]
    """[Tally.maxes, width] of each place of a tally, in the maxes."""
    sums: int
    """Length of the vector whose elements add up."""
    maxes: int
    """Length of the vector whose elements take the largest."""


@dataclass(frozen=True)
class Layout:
    """The sites and layers whose numbers travel, in order."""

    sites: dict[str, SiteEntry] = field(default_factory=dict)
    layers: dict[str, LayerEntry] = field(default_factory=dict)
    tallies: dict[Key, TallyEntry] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)
    """In the layout of several ranks: for each layer, the rank in their group whose numbers are taken if every rank holds the whole weight."""
    shared: bool = False
    """Whether several ranks have agreed on it. Then each rank leaves out what another rank counts; one process sends its numbers as they are."""

    @staticmethod
    def of(parts: Parts) -> Layout:
        """The layout of this process alone: the sites that ran and the layers that were measured."""
        sites = {name: _site_alone(part) for name, part in parts.sites.items() if part.row is not None}
        layers = {name: _layer_alone(part) for name, part in parts.layers.items() if part.numbers is not None and part.n}
        tallies = {key: TallyEntry(part.facts, part.width) for key, part in parts.tallies.items() if part.sums is not None}
        return Layout(sites, layers, tallies)

    @staticmethod
    def joined(texts: Mapping[int, bytes]) -> Layout:
        """The layout of several ranks.

        Args:
            texts: what the ranks have `told`. Each different text appears once, under the first rank that told it, in the order of ranks.
        """
        sites: dict[str, SiteEntry] = {}
        layers: dict[str, LayerEntry] = {}
        tallies: dict[Key, TallyEntry] = {}
        owners: dict[str, int] = {}
        for rank, text in texts.items():
            told = json.loads(text)
            for name, given in told["sites"].items():
                site = SiteEntry(**{**given, "facts": SiteFacts(**_tuples(given["facts"]))})
                sites[name] = _join_sites(sites[name], site) if name in sites else site
            for name, given in told["layers"].items():
                layer = LayerEntry(**{**given, "facts": LayerFacts(**_tuples(given["facts"]))})
                layers[name] = _join_layers(layers[name], layer) if name in layers else layer
                owners.setdefault(name, rank)
            for kind, place, facts, width in told["tallies"]:
                # Where the ranks disagree about the width, what does not fit is left out (packing.py).
                tallies.setdefault((kind, place), TallyEntry(facts, width))
        sites = dict(sorted(sites.items(), key=lambda item: item[1].stage or 0))
        layers = dict(sorted(layers.items(), key=lambda item: item[1].stage or 0))
        return Layout(_join_stages(sites), layers, tallies, owners, shared=True)

    @functools.cached_property
    def places(self) -> Places:
        """The place of each table: first the tables whose rows have a fixed number of columns, then blocks, heads and inputs."""
        sums, maxes = _Vector(), _Vector()
        units = {name: entry.units for name, entry in self.sites.items() if entry.units}
        heads = {name: entry.heads for name, entry in self.sites.items() if entry.heads}
        features = {name: entry.features for name, entry in self.layers.items() if entry.features}
        return Places(
            site_sums=sums.append(len(SUMS) * len(self.sites)),
            layer_sums=sums.append(len(LAYER_SUMS if self.shared else WEIGHT) * len(self.layers)),
            blocks={name: sums.append(len(BLOCK) * count) for name, count in units.items()},
            heads={name: sums.append((len(HEADS) - 1) * count) for name, count in heads.items()},
            inputs={name: sums.append(len(FEATURES) * count) for name, count in features.items()},
            site_maxes=maxes.append(len(MAXES) * len(self.sites)),
            worst=maxes.append(len(WORST) * len(self.sites) if self.shared else 0),
            layer_maxes=maxes.append((len(LAYER_MAXES) if self.shared else 1) * len(self.layers)),
            ends=maxes.append(len(ENDS if self.shared else ENDS_ALONE)),
            tops={name: maxes.append(count) for name, count in heads.items()},
            tally_sums={key: sums.append(len(TALLIES[key[0]].sums) * entry.width) for key, entry in self.tallies.items()},
            tally_maxes={key: maxes.append(len(TALLIES[key[0]].maxes) * entry.width) for key, entry in self.tallies.items()},
            sums=sums.length,
            maxes=maxes.length,
        )

    @property
    def bytes(self) -> int:
        """Number of bytes that a rank gives to the two all-reduces of one observation."""
        return 8 * (self.places.sums + self.places.maxes)


def told(parts: Parts) -> bytes:
    """What this rank tells the others about its sites and layers, run or not: JSON, the same bytes for the same facts."""
    sites = {name: asdict(_site_of_all(part)) for name, part in parts.sites.items()}
    layers = {name: asdict(LayerEntry(part.facts, part.features, part.stage)) for name, part in parts.layers.items()}
    tallies = [(kind, place, part.facts, part.width) for (kind, place), part in parts.tallies.items()]
    return json.dumps({"sites": sites, "layers": layers, "tallies": tallies}, separators=(",", ":")).encode()


class _Vector:
    """A vector whose tables are laid out one behind the other."""

    def __init__(self) -> None:
        self.length = 0

    def append(self, size: int) -> slice:
        self.length += size
        return slice(self.length - size, self.length)


def _site_alone(part: SitePart) -> SiteEntry:
    """The entry of a site in the layout of one process: its units and heads are those that the process holds itself."""
    units, heads = (None if block is None else block.shape[1] for block in (part.block, part.heads))
    return SiteEntry(part.facts, units, heads, part.stage, part.leaves)


def _layer_alone(part: LayerPart) -> LayerEntry:
    features = 0 if part.inputs is None else part.inputs.shape[1]
    return LayerEntry(part.facts, features, part.stage, part.n, part.numel if part.whole is None else part.whole, _on_host(part))


def _on_host(part: LayerPart) -> float | None:
    """The learning rate, if the host knows it."""
    return part.rate if isinstance(part.rate, float) else None


def _site_of_all(part: SitePart) -> SiteEntry:
    """The entry of a site in the layout of several ranks. A site whose output leaves a pipeline stage computes no output of the model."""
    facts = replace(part.facts, output=part.facts.output and not part.leaves)
    if facts.kind == "softmax":
        return SiteEntry(facts, facts.units, part.span.count, part.stage, part.leaves)
    return SiteEntry(replace(facts, units=part.span.count), part.span.count, None, part.stage, part.leaves)


def _tuples(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts with the tuples that JSON has made lists of."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


def _join_sites(known: SiteEntry, new: SiteEntry) -> SiteEntry:
    """Join the entries of one site on two ranks. It comes after all sites that it follows on either rank; where the ranks disagree about its number
    of units or heads, it has none."""
    units, heads = (one if one == other else None for one, other in ((known.units, new.units), (known.heads, new.heads)))
    facts = replace(
        known.facts,
        after=_union(known.facts.after, new.facts.after),
        losses=_union(known.facts.losses, new.facts.losses),
        units=known.facts.units if known.units == new.units else None,
    )
    return replace(known, facts=facts, units=units, heads=heads)


def _join_layers(known: LayerEntry, new: LayerEntry) -> LayerEntry:
    """Join the entries of one layer on two ranks. It feeds all sites that it feeds on either rank; where the ranks disagree about its features, its
    input is not measured."""
    facts = replace(known.facts, feeds=_union(known.facts.feeds, new.facts.feeds))
    return replace(known, facts=facts, features=known.features if known.features == new.features else 0)


def _union(known: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *new)))


def _join_stages(sites: dict[str, SiteEntry]) -> dict[str, SiteEntry]:
    """Let each site that begins a stage of a pipeline come after the sites whose output leaves the stage before."""
    leaving: dict[int | None, list[str]] = {}
    for name, entry in sites.items():
        if entry.leaves:
            leaving.setdefault(entry.stage, []).append(name)
    return {
        name: replace(entry, facts=replace(entry.facts, after=tuple(leaving.get(entry.stage - 1, ()))))
        if entry.stage and not entry.facts.after
        else entry
        for name, entry in sites.items()
    }
