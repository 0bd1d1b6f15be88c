"""Packs the parts of an observation into two vectors, and turns merged vectors into rows. The packing is the same for one process and for many.

`pack` runs on the device and never waits for it: numbers of the host go there in one copy from pinned memory. `unpack` runs on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchsat.columns import BLOCK, COLUMN, FEATURES, HEADS, HEADS_LOSS_SCALED, INPUT, LOSS_SCALED, MAXES, SUMS, TALLIES, WEIGHT
from torchsat.parts import Key, LayerPart, Parts, SitePart
from torchsat.rows import LayerRow, SiteRow, TallyRow
from torchsat.statistics import accumulator, empty_row
from torchsat.transport.layout import LAYER_MAXES, LAYER_SUMS, WORST, LayerEntry, Layout
from torchsat.transport.windows import UnitWindows

_SCALED_HEADS = slice(HEADS.index(HEADS_LOSS_SCALED[0]), HEADS.index(HEADS_LOSS_SCALED[-1]) + 1)
_FINE = 2**20
"""Number of values that the code of a saturated share can have, and the most ranks. Both are coded together in the 53 bits of a float64."""


Vector = NDArray[np.float64]


class Vectors(NamedTuple):
    """The numbers of one observation, in the order of a layout."""

    sums: Tensor
    """Elements that add up."""
    maxes: Tensor
    """Elements that take the largest."""


@dataclass(frozen=True)
class Ends:
    """What ranks tell each other beside the numbers."""

    first_step: int = 0
    """The lowest step number of a rank for this observation."""
    last_step: int = 0
    """The highest one. If it is not the same as the lowest, the ranks have come to different steps."""
    interval: int = 1
    """The longest interval between observations that a rank wants."""
    changed: bool = False
    """Whether some rank has other sites or layers than it told the others."""
    earliest: int = 0
    """The latest of the steps before which a rank cannot pay for a further observation (schedule.py)."""


@dataclass(frozen=True)
class Numbers:
    """One observation on the host."""

    sites: list[SiteRow]
    layers: list[LayerRow]
    tallies: dict[Key, TallyRow] = field(default_factory=dict)
    scale: float = 1.0
    """The number by which gradients are still to be divided: the factor of a GradScaler, and what data parallelism averages over."""
    skipped: bool = False
    """Whether the optimizer found an overflow and skipped the step."""
    differing: tuple[str, ...] = ()
    """Layers of which every rank holds the whole weight, but not the same one."""
    ends: Ends = Ends()


def merge(pairs: Sequence[Vectors]) -> Vectors:
    """Merge several pairs of vectors, which have the same layout and are on the host, into one pair in float64."""
    sums, maxes = (vector.double() for vector in pairs[0])
    for pair in pairs[1:]:
        sums, maxes = sums + pair.sums, torch.maximum(maxes, pair.maxes.double())
    return Vectors(sums, maxes)


def pack(parts: Parts, layout: Layout, device: torch.device, ends: Ends, *, rank: int = 0, everywhere: int = 0) -> Vectors:
    """The vectors of what one process measured.

    The sums of sites and inputs stand for all elements of their calls (columns.py), so that they add up. In a shared layout those of weights are
    scaled up to all elements of the weight, gradients are divided by the loss scale and by what data parallelism averages over, and what another rank
    counts is left out. In the layout of one process the numbers stay as they are.

    Args:
        device: where the vectors are made. What lies on another device is copied there.
        ends: what this process tells the others: its own step, interval, changes and earliest step.
        rank: the rank of this process in the group that shares the layout.
        everywhere: its rank in the whole job, which is the one that users are shown.
    """
    sites = [_counted(parts.sites.get(name), layout) for name in layout.sites]
    layers = [parts.layers.get(name) for name in layout.layers]
    rows = _rows(sites, device)
    skipped = _number(parts.skipped, 0.0, device)
    if layout.shared:
        told = [ends.last_step, -ends.first_step, ends.interval, ends.changed, ends.earliest]
        tables = _shared(rows, layers, layout, parts, told, device, rank, everywhere)
    else:
        maxes = [rows[:, len(SUMS) :], _rates_on(device, layers)]
        tables = _Tables([rows[:, : len(SUMS)], _weights(layers, device)], maxes, _input_pieces(layers, layout, device))
    blocks, heads, tops = _unit_pieces(sites, parts, layout, device)
    added, largest = _tally_pieces(parts, layout, device)
    last = [skipped] if layout.shared else [skipped, _number(parts.scale, -math.inf, device)]
    return Vectors(
        torch.cat([each.reshape(-1) for each in (*tables.sums, *blocks, *heads, *tables.inputs, *added)]),
        torch.cat([each.reshape(-1) for each in (*tables.maxes, *last, *tops, *largest)]),
    )


class _Tables(NamedTuple):
    """The tables of sites and layers that `pack` puts into the two vectors."""

    sums: list[Tensor]
    maxes: list[Tensor]
    inputs: list[Tensor]
    """The sums of each layer's input, [6, features]."""


def _shared(
    rows: Tensor,
    layers: Sequence[LayerPart | None],
    layout: Layout,
    parts: Parts,
    told: Sequence[float],
    device: torch.device,
    rank: int,
    everywhere: int,
) -> _Tables:
    """The tables of a rank that observes together with others."""
    weights = [part if part is not None and _speaks_for(part, layout, rank) else None for part in layers]
    inputs = [part if part is not None and part.inputs is not None and part.input_counts else None for part in layers]
    n, numel, rates, said = _from_host(
        [
            [0 if part is None else part.n for part in weights],
            [0 if part is None else part.numel for part in weights],
            [part.rate if part is not None and isinstance(part.rate, float) else -math.inf for part in layers],
            told,
        ],
        device,
    )
    _unscale(rows, parts)
    rates = torch.maximum(rates, _rates_on(device, layers))
    return _Tables(
        [rows[:, : len(SUMS)], _layer_sums(weights, n, numel, device)],
        [rows[:, len(SUMS) :], _worst(rows, everywhere), _layer_maxes(layers, rates, device), said],
        _input_pieces(inputs, layout, device),
    )


def unpack(vectors: Vectors, layout: Layout, windows: UnitWindows) -> Numbers:
    """The rows of merged vectors, on the host.

    Args:
        vectors: float64, as `merge` gives them.
        windows: what the unit blocks are added to.
    """
    sums, maxes = (vector.numpy() for vector in vectors)
    places, count = layout.places, len(layout.sites)
    table = sums[places.site_sums].reshape(count, len(SUMS))
    rows = np.concatenate([table, maxes[places.site_maxes].reshape(count, len(MAXES))], 1).tolist()
    worst = maxes[places.worst].reshape(count, len(WORST)).tolist() if layout.shared else [_NOBODY] * count
    sites = []
    for (name, entry), row, codes in zip(layout.sites.items(), rows, worst, strict=True):
        units = None
        if name in places.blocks:
            units = windows.add(name, sums[places.blocks[name]].reshape(len(BLOCK), -1))
        else:
            windows.drop(name)
        heads = []
        if name in places.heads:
            heads = [*sums[places.heads[name]].reshape(len(HEADS) - 1, -1).tolist(), maxes[places.tops[name]].tolist()]
        (share, worst_rank), (_, nonfinite_rank) = _decode(codes[0]), _decode(codes[1])
        sites.append(SiteRow(entry.facts, row, units, heads, share, worst_rank, nonfinite_rank, windows.dormant(name)))
    tallies = _tally_rows(sums, maxes, layout)
    if not layout.shared:
        skipped, factor = maxes[places.ends].tolist()
        return Numbers(sites, _layers_alone(sums, maxes, layout), tallies, factor if factor > 0 else 1.0, skipped > 0)
    layers, differing = _layers_together(sums, maxes, layout)
    last_step, negated, interval, changed, earliest, skipped = maxes[places.ends].tolist()
    ends = Ends(round(-negated), round(last_step), round(interval), changed > 0, round(earliest))
    return Numbers(sites, layers, tallies, 1.0, skipped > 0, differing, ends)


_NOBODY = (-math.inf,) * len(WORST)
"""The codes in the columns WORST where one process observes by itself."""


def _counted(part: SitePart | None, layout: Layout) -> SitePart | None:
    """The part, unless another rank counts the same elements."""
    return None if part is None or (layout.shared and not part.span.counts) else part


def _speaks_for(part: LayerPart, layout: Layout, rank: int) -> bool:
    """Whether this process's numbers of a weight are counted."""
    if part.numbers is None or not part.n:
        return False
    return not layout.shared or (part.counts and (part.sharded or layout.owners.get(part.facts.name) == rank))


def _from_host(lists: Sequence[Sequence[float]], device: torch.device) -> tuple[Tensor, ...]:
    """Copy lists of numbers from the host to a device, in one copy that nothing waits for (from pinned memory, if the device is a GPU)."""
    numbers = torch.tensor([float(each) for values in lists for each in values], dtype=accumulator(device), pin_memory=device.type == "cuda")
    return torch.split(numbers.to(device, non_blocking=True), [len(values) for values in lists])


def _number(value: Tensor | None, absent: float, device: torch.device) -> Tensor:
    """One number that is on a device as a vector of length 1; `absent` where there is none."""
    if value is None:
        return torch.full((1,), absent, dtype=accumulator(device), device=device)
    return value.detach().reshape(1).to(device, accumulator(device))


def _rows(sites: Sequence[SitePart | None], device: torch.device) -> Tensor:
    """[sites, ROW]. A site that did not run has an empty row."""
    nothing = empty_row(device)
    rows = [nothing if part is None or part.row is None else part.row.to(device) for part in sites]
    return torch.stack(rows) if rows else nothing.new_empty(0, len(COLUMN))


def _unscale(rows: Tensor, parts: Parts) -> None:
    """Divide the sums of gradients, and of their squares, in place by that power of what the loss was multiplied with and averaged over."""
    divisor = _divisor(parts, rows)
    for name, power in LOSS_SCALED.items():
        rows[:, COLUMN[name]] /= divisor**power


def _divisor(parts: Parts, like: Tensor) -> Tensor:
    """What the gradients were multiplied with and averaged over, in the type and on the device of another tensor."""
    divisor = torch.full((), parts.averages, dtype=like.dtype, device=like.device)
    if parts.scale is not None:
        divisor *= parts.scale.detach().reshape(()).to(like.device, like.dtype)
    return divisor


def _unit_pieces(
    sites: Sequence[SitePart | None], parts: Parts, layout: Layout, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The tables of sites whose sizes differ: unit blocks, blocks of heads without their last row, and those last rows."""
    blocks, heads, tops = [], [], []
    for part, entry in zip(sites, layout.sites.values(), strict=True):
        first = part.span.first if part is not None and layout.shared else 0
        if entry.units:
            blocks.append(_piece(None if part is None else part.block, (len(BLOCK), entry.units), first, 0.0, device))
        if entry.heads:
            given = None if part is None else part.heads
            added, largest = (None, None) if given is None else (given[:-1].to(device), given[-1:])
            if added is not None and layout.shared:
                added = added.clone()
                added[_SCALED_HEADS] /= _divisor(parts, added)
            heads.append(_piece(added, (len(HEADS) - 1, entry.heads), first, 0.0, device))
            tops.append(_piece(largest, (1, entry.heads), first, -math.inf, device))
    return blocks, heads, tops


def _input_pieces(layers: Sequence[LayerPart | None], layout: Layout, device: torch.device) -> list[Tensor]:
    """The sums of the layers' inputs, [6, features] each."""
    pieces = []
    for part, entry in zip(layers, layout.layers.values(), strict=True):
        if entry.features:
            first = part.first if part is not None and layout.shared else 0
            pieces.append(_piece(None if part is None else part.inputs, (len(FEATURES), entry.features), first, 0.0, device))
    return pieces


def _tally_pieces(parts: Parts, layout: Layout, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The blocks of the tallies: those whose columns add up, and those of which the largest is kept."""
    sums, maxes = list[Tensor](), list[Tensor]()
    for key, entry in layout.tallies.items():
        tally, part = TALLIES[key[0]], parts.tallies.get(key)
        added, largest = (None, None) if part is None or (layout.shared and not part.counts) else (part.sums, part.maxes)
        if added is not None and layout.shared and tally.loss_scaled:
            added = added.to(device).clone()
            for name, power in tally.loss_scaled.items():
                added[tally.sums.index(name)] /= _divisor(parts, added) ** power
        sums.append(_piece(added, (len(tally.sums), entry.width), 0, 0.0, device))
        maxes.append(_piece(largest, (len(tally.maxes), entry.width), 0, -math.inf, device))
    return sums, maxes


def _tally_rows(sums: Vector, maxes: Vector, layout: Layout) -> dict[Key, TallyRow]:
    """The numbers of the tallies, by place."""
    found, places = dict[Key, TallyRow](), layout.places
    for key, entry in layout.tallies.items():
        tally = TALLIES[key[0]]
        added, largest = sums[places.tally_sums[key]].reshape(-1, entry.width), maxes[places.tally_maxes[key]].reshape(-1, entry.width)
        numbers = dict(zip((*tally.sums, *tally.maxes), (*added.tolist(), *largest.tolist()), strict=True))
        found[key] = TallyRow(entry.facts, numbers)
    return found


def _piece(values: Tensor | None, shape: tuple[int, int], first: int, empty: float, device: torch.device) -> Tensor:
    """[rows, all columns] with these values from column `first` on. Values that do not fit, because ranks disagree about the size, are left out."""
    if values is not None and values.shape == shape:
        return values.to(device)
    whole = torch.full(shape, empty, dtype=accumulator(device), device=device)
    if values is not None and first + values.shape[1] <= shape[1]:
        whole[:, first : first + values.shape[1]] = values
    return whole


def _weights(parts: Sequence[LayerPart | None], device: torch.device) -> Tensor:
    """[layers, WEIGHT]; zeros where nothing was measured here."""
    zeros = torch.zeros(len(WEIGHT), dtype=accumulator(device), device=device)
    given = [zeros if part is None or part.numbers is None else part.numbers.to(device) for part in parts]
    return torch.stack(given) if given else zeros.new_empty(0, len(WEIGHT))


def _layer_sums(parts: Sequence[LayerPart | None], n: Tensor, numel: Tensor, device: torch.device) -> Tensor:
    """[layers, LAYER_SUMS]. The sums over a sample are scaled up to this rank's part of the weight."""
    scale = numel / n.clamp(min=1)
    weight, change, grad, learned = (_weights(parts, device)[:, WEIGHT.index(f"{name}_sq")] for name in ("weight", "change", "grad", "learned"))
    columns = [weight * scale]
    for each in (change, grad, learned):
        known = ~torch.isnan(each)
        columns += [torch.where(known, each * scale, torch.zeros_like(n)), torch.where(known, numel, torch.zeros_like(n))]
    return torch.stack([*columns, n, numel], 1)


def _rates_on(device: torch.device, parts: Sequence[LayerPart | None]) -> Tensor:
    """[layers]: the learning rates that only a device knows; minus infinity where there is none."""
    rates = torch.full((len(parts),), -math.inf, dtype=accumulator(device), device=device)
    for at, part in enumerate(parts):
        if part is not None and isinstance(part.rate, Tensor):
            rates[at : at + 1].copy_(part.rate.reshape(1), non_blocking=True)
    return rates


def _layer_maxes(parts: Sequence[LayerPart | None], rates: Tensor, device: torch.device) -> Tensor:
    """[layers, LAYER_MAXES]."""
    nothing = torch.full((), -math.inf, dtype=rates.dtype, device=device)
    given = [nothing if part is None or part.numbers is None or part.sharded else part.numbers[0].to(device) for part in parts]
    squares = torch.stack(given) if given else torch.empty_like(rates)
    largest = [_largest(parts, name, nothing, rates) for name in ("unevenness", "spectral")]
    return torch.stack([rates, squares, torch.where(torch.isfinite(squares), -squares, nothing), *largest], 1)


def _largest(parts: Sequence[LayerPart | None], name: str, nothing: Tensor, like: Tensor) -> Tensor:
    """[layers]: a number of columns.WEIGHT that merges by the maximum, and `nothing` where it is not known."""
    at = WEIGHT.index(name)
    given = [nothing if part is None or part.numbers is None else part.numbers[at].to(nothing) for part in parts]
    return torch.where(torch.isnan(values := torch.stack(given)), nothing, values) if given else torch.empty_like(like)


def _worst(rows: Tensor, rank: int) -> Tensor:
    """The columns WORST of each row: the saturated share and the number of non-finite elements, each coded together with this rank."""
    n, low, high, bad, bad_grad = (rows[:, COLUMN[name]] for name in ("n", "low", "high", "nonfinite", "grad_nonfinite"))
    share = (low + high) / n.clamp(min=1)
    code = torch.stack([(share * _FINE).round(), (bad + bad_grad).clamp(max=_FINE)], 1) * _FINE + (_FINE - 1 - rank)
    return torch.where(torch.stack([n > 0, bad + bad_grad > 0], 1), code, torch.full_like(code, -math.inf))


def _decode(code: float) -> tuple[float | None, int | None]:
    """The share and the rank of one column of WORST; None where no rank had any."""
    return (None, None) if code < 0 else (code // _FINE / _FINE, round(_FINE - 1 - code % _FINE))


def _layers_alone(sums: Vector, maxes: Vector, layout: Layout) -> list[LayerRow]:
    """The rows of layers in the layout of one process."""
    numbers = sums[layout.places.layer_sums].reshape(len(layout.layers), len(WEIGHT)).tolist()
    rates = maxes[layout.places.layer_maxes].tolist()
    found = []
    for (name, entry), row, travelled in zip(layout.layers.items(), numbers, rates, strict=True):
        place = layout.places.inputs.get(name)
        summed = _UNKNOWN if place is None else _summary(sums[place].reshape(len(FEATURES), -1))
        rate = travelled if entry.rate is None and math.isfinite(travelled) else entry.rate
        found.append(LayerRow(entry.facts, [*row, *summed], entry.n, entry.numel, rate))
    return found


def _layers_together(sums: Vector, maxes: Vector, layout: Layout) -> tuple[list[LayerRow], tuple[str, ...]]:
    """The rows of layers that some rank has measured, and the names of those whose weight is not the same on all ranks that hold it whole."""
    places, count = layout.places, len(layout.layers)
    rows = sums[places.layer_sums].reshape(count, len(LAYER_SUMS)).tolist()
    tops = maxes[places.layer_maxes].reshape(count, len(LAYER_MAXES)).tolist()
    found, differing = [], []
    for (name, entry), row, (rate, most, least_negated, uneven, spectral) in zip(layout.layers.items(), rows, tops, strict=True):
        if math.isfinite(most) and most + least_negated > 1e-6 * most:
            differing.append(name)
        values = dict(zip(LAYER_SUMS, row, strict=True))
        if values["n"]:
            place = places.inputs.get(name)
            found.append(_layer_row(entry, values, None if place is None else sums[place].reshape(len(FEATURES), -1), rate, uneven, spectral))
    return found, tuple(differing)


def _layer_row(entry: LayerEntry, values: dict[str, float], inputs: Vector | None, rate: float, uneven: float, spectral: float) -> LayerRow:
    """The row of a layer. The sums of its weight, which were scaled up to all elements, are scaled back to those that were read."""
    n, numel = values["n"], values["numel"]
    per = n / numel
    change, grad, learned = (values[f"{name}_sq"] * per if values[f"{name}_n"] else math.nan for name in ("change", "grad", "learned"))
    summed = _summary(inputs) if inputs is not None and inputs[-1].any() else _UNKNOWN
    spectral = math.nan if spectral == -math.inf else spectral
    numbers = [values["weight_sq"] * per, change, grad, uneven if math.isfinite(uneven) else math.nan, learned, spectral, *summed]
    return LayerRow(entry.facts, numbers, round(n), round(numel), rate if math.isfinite(rate) else None)


_UNKNOWN = [math.nan] * len(INPUT)
"""The numbers of columns.INPUT for an input that was not measured."""


def _summary(features: Vector) -> list[float]:
    """The numbers of columns.INPUT, derived from columns.FEATURES."""
    n, first, second, square_n, square_second, read = features
    whole = float(n.sum())
    # The square of a sample mean is too large by the variance / n. Averaging over pairs of distinct samples avoids that; it needs two samples. Each
    # pair has the product of its samples' weights.
    pairs = np.where(read > 1, n * n - square_n, 0)
    products = first * first - square_second
    if not pairs.all():
        known = pairs > 0
        pairs, products = pairs[known], products[known]
    squares = float((products / pairs).sum()) / len(pairs) if len(pairs) else math.nan
    return [float(read.sum()), float(second.sum()) / whole if whole else math.nan, squares]
