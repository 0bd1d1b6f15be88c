"""Turns merged rows into records: computes means, shares and ratios from the sums that came from the device. Standard library only.

A transport reads its numbers into `SiteRow` and `LayerRow`; `to_record` and `to_weight` turn these into the records of a Snapshot. A value that
cannot be known (no element was finite, no gradient was seen, the function has no peak) is None in the record, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchsat.columns import (
    BINS,
    COLUMN,
    EXPERTS,
    FORMATS,
    FORMATS_OF_SHARDS,
    FORMATS_OF_WEIGHTS,
    HEADS,
    LAYER,
    LEDGER,
    ROUTER,
    STREAM,
    UNITS,
)
from torchsat.experts import Experts
from torchsat.ledger import Ledger, Stream, decode_top, ledger_of
from torchsat.number_formats import BY_DTYPE, OF_LAYER, OF_SITE, FormatUse
from torchsat.number_formats import FORMATS as TABLE
from torchsat.record import Head, LayerFacts, Record, SiteFacts, Weight

_MOST_IN_DOUBT = 0.05
"""The share of stuck units is not known where more than this share of the units is in doubt."""
_MOST_UNKNOWN = 0.05
"""The derivative is not shown where it is unknown at more than this share of the elements: they may be unlike the others."""


@dataclass(frozen=True)
class Stuck:
    """The stuck units of a site. A unit (channel or feature) is stuck if nearly all of its samples are saturated.

    The samples of a unit are added up over observations (transport/windows.py), until every unit has enough samples to tell.
    """

    share: float
    """The share of its units that are stuck."""
    samples: int
    """`Record.stuck_n`."""


@dataclass(frozen=True)
class SiteRow:
    """The numbers of one site on the host, merged over calls and ranks."""

    facts: SiteFacts
    numbers: Sequence[float]
    """The columns of columns.ROW."""
    units: Sequence[float] | None = None
    """The numbers of columns.UNITS, this observation included; None where the number of units is not fixed."""
    heads: Sequence[Sequence[float]] = ()
    """For each name in columns.HEADS one number per head; empty where this is no softmax."""
    worst: float | None = None
    """Where several ranks observe together: the highest saturated share of one rank alone."""
    worst_rank: int | None = None
    """The rank with that share."""
    nonfinite_rank: int | None = None
    """The rank on which most elements were inf or nan, if any were."""
    dormant: float | None = None
    """The share of its units that are dormant (transport/windows.py); None where that is not known."""


@dataclass(frozen=True)
class LayerRow:
    """The numbers of one layer on the host."""

    facts: LayerFacts
    numbers: Sequence[float]
    """columns.LAYER, NaN where unknown."""
    n: int
    """Elements of the weight that were read."""
    numel: int
    """Elements that the weight has."""
    learning_rate: float | None = None
    """The learning rate of the optimizer's group that owns the weight."""


@dataclass(frozen=True)
class TallyRow:
    """The numbers of one place of a tally (columns.Tally) on the host."""

    facts: Mapping[str, Any]
    numbers: Mapping[str, Sequence[float]]
    """For each column of the tally, as many numbers as its block is wide."""


def to_record(row: SiteRow, scale: float, stuck: Stuck | None) -> tuple[Record, Stuck | None]:
    """The record of a row, and the stuck units of the site.

    Args:
        scale: the factor that the gradients carry (GradScaler, data parallelism).
        stuck: the stuck units as they were known before this observation. They stay valid until there are enough samples again, as after a resume.
    """
    facts, at, of_heads = row.facts, _Columns(row.numbers), _Heads(row.heads)
    stuck = _stuck_units(row.units) or stuck
    known = None if _in_doubt(row.units) else stuck
    is_sigmoid, is_softmax, has_tails = facts.activation == "sigmoid", facts.kind == "softmax", facts.tails != "unknown"
    low, high = (at.mean("low"), at.mean("high")) if has_tails else (None, None)
    told = 0.0 if is_softmax or at["derivative_unknown"] > _MOST_UNKNOWN * at.n else at.n - at["derivative_unknown"]
    derivative, peak = at["derivative"] / told if told > 0 else None, at.largest("peak")
    grad_a, grad_z = (at.rms(f"{name}_sq", at[f"{name}_n"], scale) for name in ("grad_a", "grad_z"))
    record = Record(
        **vars(facts),
        n=round(at["read"]),
        elements=round(at["elements"]),
        saturated=None if low is None or high is None else low + high,
        low=low,
        high=high,
        derivative=derivative,
        derivative_rms=at.rms("derivative_sq", told) if told > 0 else None,
        peak=peak,
        relative_derivative=derivative / peak if derivative is not None and peak else None,
        stuck=None if known is None or low is None else known.share,
        stuck_n=None if known is None or low is None else known.samples,
        dormant=row.dormant,
        z_mean=at.mean("z"),
        z_std=at.std("z", "z_sq"),
        z_rms=at.rms("z_sq", at.n),
        z_min=at.smallest("z_min_negated"),
        z_max=at.largest("z_max"),
        a_mean=at.mean("a"),
        a_std=at.std("a", "a_sq"),
        a_min=at.smallest("a_min_negated"),
        a_max=at.largest("a_max"),
        gate_left=at.mean("gate_left") if is_sigmoid else None,
        gate_right=at.mean("gate_right") if is_sigmoid else None,
        zeros=at.mean("zeros"),
        nonfinite=round(at["nonfinite"]),
        grad_n=round(max(at["grad_a_read"], at["grad_z_read"])),
        grad_nonfinite=round(at["grad_nonfinite"]),
        attenuation=grad_z / grad_a if grad_z is not None and grad_a else None,
        grad_a_rms=grad_a,
        grad_z_rms=grad_z,
        blocked=of_heads.part("row_blocked", "row_demand") if is_softmax else at.part("blocked", "demand") if has_tails else None,
        trapped=of_heads.part("row_trapped", "row_demand") if is_softmax else at.part("trapped", "demand") if has_tails else None,
        leaving=of_heads.leaving if is_softmax else at.part("leaving", "grad_a_n") if has_tails and at["demand"] else None,
        entropy=of_heads.mean("entropy"),
        jacobian=of_heads.mean("jacobian"),
        logit_std=None if (variance := of_heads.mean("logit_variance")) is None else math.sqrt(variance),
        log_keys=of_heads.mean("log_keys"),
        entropy_min=None if facts.activation == "log_softmax" else of_heads.lowest("entropy"),
        first_key=of_heads.mean("first_key"),
        log_z=of_heads.mean("log_z"),
        log_z_rms=_root(of_heads.mean("log_z_sq")),
        worst=row.worst,
        worst_rank=row.worst_rank,
        nonfinite_rank=row.nonfinite_rank,
        # A function whose peak was learned has a derivative for each element only in the backward, where no histogram is made.
        histogram=tuple([at[name] / at.n for name in BINS]) if at.n and peak and not facts.learned else None,
        heads=of_heads.each() if is_softmax else None,
    )
    return record, stuck


def to_weight(row: LayerRow) -> Weight:
    """The record of a layer.

    Its weight and gradient were read at `n` of `numel` elements. The mean square over these is taken for the mean square over all.
    """
    known = {name: None if math.isnan(value) else float(value) for name, value in zip(LAYER, row.numbers, strict=True)}
    offset = _ratio(known["input_offset_sq"], known["input_sq"])

    def norm(name: str) -> float | None:
        square = known[name]
        return None if square is None or not row.n else math.sqrt(square / row.n * row.numel)

    whole = norm("weight_sq")
    return Weight(
        **vars(row.facts),
        learning_rate=row.learning_rate,
        n=row.n,
        gain=None if whole is None else whole * math.sqrt(row.facts.fan_in / row.numel),
        norm=whole,
        grad_norm=norm("grad_sq"),
        update_ratio=_root(_ratio(known["change_sq"], known["weight_sq"])),
        input_rms=_root(known["input_sq"]),
        input_centred_share=None if offset is None else max(0.0, 1 - offset),
        input_n=round(known["input_n"] or 0),
        unevenness=None if known["unevenness"] is None else _finite(known["unevenness"]),
        learned_ratio=_root(_ratio(known["learned_sq"], known["weight_sq"])),
        spectral=known["spectral"],
    )


def to_ledger(tallies: Mapping[tuple[str, str], TallyRow], scale: float) -> Ledger | None:
    """The ledger of the gradient, from the tallies of an observation; None where it was not measured.

    Args:
        scale: the factor that the gradients carry.
    """
    found = [row for (kind, _), row in tallies.items() if kind == LEDGER.name and row.facts.get("entries") and any(row.numbers["heard"])]
    # Micro-batches may differ in their graphs. The one in which most gradients were heard is shown.
    row = max(found, key=lambda row: sum(row.numbers["heard"]), default=None)
    if row is None:
        return None
    streams = {place: _stream(row.numbers) for (kind, place), row in tallies.items() if kind == STREAM.name}
    return ledger_of(row.facts["entries"], row.numbers["grad_sq"], row.numbers["heard"], scale, streams)


def _stream(numbers: Mapping[str, Sequence[float]]) -> Stream:
    (n,), (square,), (top,) = (numbers[name] for name in ("n", "x_sq", "top"))
    return Stream(_root(square / n) if n else None, *decode_top(top))


def experts_of(tallies: Mapping[tuple[str, str], TallyRow]) -> tuple[Experts, ...]:
    """The mixtures of experts of one observation."""
    found = []
    for (kind, place), row in tallies.items():
        router = tallies.get((ROUTER.name, place))
        if kind == EXPERTS.name and router is not None:
            found.append(Experts.of(place, row.facts, row.numbers["choices"], router.numbers))
    return tuple(each for each in found if each is not None)


_TENSORS = {FORMATS.name: OF_SITE, FORMATS_OF_SHARDS.name: OF_LAYER, FORMATS_OF_WEIGHTS.name: OF_LAYER}
"""The tensors in the blocks of the tallies of number formats."""


def to_formats(tallies: Mapping[tuple[str, str], TallyRow]) -> tuple[FormatUse, ...]:
    """What number formats do to each tensor that was counted, in the order in which the places were first measured."""
    found = list[FormatUse]()
    for (kind, place), row in tallies.items():
        tensors = _TENSORS.get(kind, ())
        for at, (tensor, known) in enumerate((tensor, known) for tensor in tensors for known in TABLE):
            count = {name: values[at] for name, values in row.numbers.items()}
            if count["n"] > 0:
                in_use = BY_DTYPE.get(row.facts.get(tensor, "")) is known
                share = {name: _finite(value / count["n"]) for name, value in count.items() if name not in ("n", "read")}
                hidden = {"flushed": None, "clamped": None} if in_use else {}
                found.append(FormatUse(place, tensor, known.name, in_use, round(count["read"]), **{**share, **hidden}))
    return tuple(found)


class _Columns(dict[str, float]):
    """The columns of one row by name, and statistics of them. `n` is the sum of the weights of the elements that the sums of
    the forward pass run over: where none is inf or nan, the number of all elements."""

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__(zip(COLUMN, numbers, strict=True))
        self.n = self["n"]

    def mean(self, name: str) -> float | None:
        return _finite(self[name] / self.n) if self.n else None

    def std(self, first: str, second: str) -> float | None:
        """The standard deviation from a sum and a sum of squares."""
        mean = self[first] / self.n if self.n else 0.0
        variance = _finite(self[second] / self.n - mean * mean) if self.n else None
        return None if variance is None else math.sqrt(max(0.0, variance))

    def rms(self, name: str, n: float, scale: float = 1.0) -> float | None:
        """The root of a mean of squares over elements whose weights add up to n, divided by the scale that these elements carry."""
        square = _finite(self[name] / n) if n else None
        return None if square is None else math.sqrt(square) / scale

    def part(self, name: str, of: str) -> float | None:
        """One sum as a part of another one."""
        return _part(self[name], self[of])

    def largest(self, name: str) -> float | None:
        return self[name] if math.isfinite(self[name]) else None

    def smallest(self, negated: str) -> float | None:
        """The smallest value from the column of the largest negated one."""
        return -self[negated] if math.isfinite(self[negated]) else None


class _Heads:
    """The block of heads of a softmax, and means over its query rows; every mean is None where there is no block."""

    def __init__(self, block: Sequence[Sequence[float]]) -> None:
        self._block = dict(zip(HEADS, block, strict=True)) if block else dict.fromkeys(HEADS, ())
        self._rows = sum(self._block["rows"])

    def mean(self, name: str) -> float | None:
        """The mean over the query rows of all heads."""
        return sum(self._block[name]) / self._rows if self._rows else None

    def part(self, name: str, of: str) -> float | None:
        """One sum over the query rows of all heads as a part of another one."""
        return _part(sum(self._block[name]), sum(self._block[of]))

    @property
    def leaving(self) -> float | None:
        """The share of the query rows that are asked to leave their plateau."""
        return self.part("rows_leaving", "rows_heard") if sum(self._block["row_demand"]) else None

    def lowest(self, name: str) -> float | None:
        """The lowest mean that a single head has over its query rows."""
        return min((value / rows for value, rows in zip(self._block[name], self._block["rows"], strict=True) if rows), default=None)

    def each(self) -> tuple[Head, ...]:
        return tuple(_head(dict(zip(HEADS, values, strict=True))) for values in zip(*self._block.values(), strict=True))


def _head(at: dict[str, float]) -> Head:
    rows = at["rows"]
    if not rows:
        return Head(0, None, None, None, None)
    return Head(
        round(rows),
        at["entropy"] / rows,
        at["jacobian"] / rows,
        math.sqrt(at["logit_variance"] / rows),
        at["logit_max"],
        _part(at["row_blocked"], at["row_demand"]),
        _part(at["row_trapped"], at["row_demand"]),
        _part(at["rows_leaving"], at["rows_heard"]) if at["row_demand"] else None,
        at["first_key"] / rows,
        at["log_z"] / rows,
        math.sqrt(at["log_z_sq"] / rows),
    )


def _stuck_units(units: Sequence[float] | None) -> Stuck | None:
    """The stuck units of a site; None as long as some unit has too few samples."""
    if units is None:
        return None
    values = dict(zip(UNITS, units, strict=True))
    if values["units_measured"] != values["units"]:
        return None
    return Stuck(values["units_stuck"] / values["units"], round(values["unit_samples"]))


def _in_doubt(units: Sequence[float] | None) -> bool:
    """Whether so many units may have become stuck lately that their share is not known."""
    values = dict.fromkeys(UNITS, 0.0) if units is None else dict(zip(UNITS, units, strict=True))
    return values["units_in_doubt"] > _MOST_IN_DOUBT * values["units"]


def _finite(value: float) -> float | None:
    """The value, but None where the sum behind it is beyond float64, though the elements that it is of are finite."""
    return value if math.isfinite(value) else None


def _part(value: float, whole: float) -> float | None:
    """One sum as a part of another one; None where that is 0."""
    return _finite(value / whole) if whole else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below or math.isinf(below) else max(0.0, above) / below


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(max(0.0, value))
