"""The ledger of the gradient: by what factor each layer, activation, norm and residual join changes its norm on the way from output to input.

An entry has the gradient at its two ends. Its factor is ||dL/d(input)|| / ||dL/d(output)||. On the *spine* one entry begins where the one before it
ends, so that the factors multiply to the factor of the whole way. A residual join is one entry of the spine. The entries of its branches have a
higher level; the spine goes on without them.

Measuring half: observe/spine.py, observe/route.py, observe/way.py. Everything here is of the standard library only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any


class Kind(str, Enum):
    """What an entry of the ledger is."""

    LAYER = "layer"
    """It multiplies by a weight."""
    ACTIVATION = "activation"
    NORM = "norm"
    JOIN = "join"
    """Branches that begin at one tensor are added or concatenated: mostly a block with its residual connection."""
    GATE = "gate"
    """Branches that begin at one tensor are multiplied with each other."""
    ATTENTION = "attention"
    STEP = "step"
    """One step of a recurrence. The gradient at its ends is that of the state."""
    OTHER = "other"
    """Anything else: a mean over positions, a product with a constant, dropout."""


_WORDS = {
    Kind.LAYER: ("layer", "layers"),
    Kind.ACTIVATION: ("activation", "activations"),
    Kind.NORM: ("norm", "norms"),
    Kind.JOIN: ("join", "joins"),
    Kind.GATE: ("gated product", "gated products"),
    Kind.ATTENTION: ("attention", "attentions"),
    Kind.STEP: ("step in time", "steps in time"),
    Kind.OTHER: ("other part", "other parts"),
}
"""One and several of a kind, in words."""
_MOST_TOLD = 4
"""So many kinds are named in a sentence."""


@dataclass(frozen=True)
class Entry:
    """One entry of a ledger."""

    place: str
    """The path of the module, or the name of the site or of the weight; `blocks.3/add` is the join of a block."""
    kind: Kind
    level: int
    """0 on the spine, 1 in a branch of a join or gate of the spine, 2 in a branch inside that one."""
    parent: str | None
    """The place of the join or gate in whose branch it lies; None on the spine."""
    norm: float | None
    """||dL/d(output)||, the gradient that arrives at it, of all samples together; None where none was heard. The factor of a GradScaler is divided
    out."""
    factor: float | None
    """||dL/d(input)|| / ||dL/d(output)||. At the end of a branch, ||dL/d(input)|| is what this branch alone passes on."""
    branch: float | None = None
    """Of a join, ||gradient by the branches|| / ||gradient by the skip connection||, where the shortest branch counts as that."""
    input_rms: float | None = None
    """Of a norm, the root mean square of its input, by which RMSNorm divides. In a transformer it is the size of the residual stream."""
    input_top: float | None = None
    """Of a norm, the largest |x| of its input."""
    top_channel: int | None = None
    """The channel (feature) in which that value stands."""


@dataclass(frozen=True)
class Total:
    """Several entries of the spine taken together."""

    kind: Kind
    count: int
    factor: float
    """The product of their factors."""


@dataclass(frozen=True)
class Ledger:
    """The gradient's way in one observation, from the output of the model to the place at which data enters."""

    entries: tuple[Entry, ...]

    @property
    def norm(self) -> float | None:
        """||dL/d(output of the model)||."""
        return self.entries[0].norm

    @property
    def end(self) -> float | None:
        """The norm of the gradient at the end of the way: at the output of the first layer, or at the input where that requires a gradient."""
        last = self.spine[-1]
        return None if last.norm is None or last.factor is None else last.norm * last.factor

    @property
    def factor(self) -> float | None:
        """`end` / `norm`, which is the product of the factors of the spine."""
        return None if self.end is None or not self.norm else self.end / self.norm

    @property
    def spine(self) -> tuple[Entry, ...]:
        """The entries of level 0."""
        return tuple(entry for entry in self.entries if entry.level == 0)

    def inside(self, place: str) -> tuple[Entry, ...]:
        """The entries in the branches of a join or gate."""
        return tuple(entry for entry in self.entries if entry.parent == place)

    def totals(self) -> tuple[Total, ...]:
        """For each kind the product of its factors on the spine, the one that takes most first. A kind of which a factor is not known is left out."""
        logs: dict[Kind, list[float]] = {}
        for entry in self.spine:
            logs.setdefault(entry.kind, []).append(math.log(entry.factor) if entry.factor else math.nan if entry.factor is None else -math.inf)
        found = [Total(kind, len(each), math.exp(sum(each))) for kind, each in logs.items() if not math.isnan(sum(each))]
        return tuple(sorted(found, key=lambda total: total.factor))

    @property
    def told(self) -> str | None:
        """By what factor the norm changes on the way, and what gives that factor, in words; None where it is not known."""
        if self.factor is None:
            return None
        parts = sorted(self.totals(), key=lambda total: -abs(math.log(total.factor)) if total.factor else -math.inf)
        given = [f"{each.count} {_WORDS[each.kind][each.count > 1]} {'give' if each.count > 1 else 'gives'} {each.factor:.2g}" for each in parts]
        listed = ", ".join(given[:_MOST_TOLD])
        return f"from the output to the input of the model the gradient's norm changes by a factor of {self.factor:.2g}: {listed}"

    def as_dict(self) -> dict[str, Any]:
        """The ledger as nested dicts and tuples of plain values."""
        return {"entries": tuple({**asdict(entry), "kind": entry.kind.value} for entry in self.entries)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Ledger:
        """The inverse of `as_dict`, also after JSON. Fields that are not known here, of a later version, are left out."""
        names = (*ENTRY_FACTS, *ENTRY_METRICS)
        given = ({**each, "kind": Kind(each["kind"])} for each in values["entries"])
        return Ledger(tuple(Entry(**{name: each[name] for name in names if name in each}) for each in given))


ENTRY_FACTS = ("place", "kind", "level", "parent")
"""What is known of an entry besides its numbers."""
ENTRY_METRICS = tuple(field.name for field in fields(Entry) if field.name not in ENTRY_FACTS)
"""Names of the numbers of an entry."""

Fact = tuple[str, str, int, int | None, int, int, int | None, Sequence[int]]
"""What travels of an entry beside the numbers: place, kind, level, the index of its parent, and the indices of the points at which the gradient was
measured: at its output, at its input, by the skip connection, by each branch."""


@dataclass(frozen=True)
class Stream:
    """What was measured of the input of a norm."""

    rms: float | None
    top: float | None
    channel: int | None


def ledger_of(facts: Sequence[Fact], squares: Sequence[float], heard: Sequence[float], scale: float, streams: Mapping[str, Stream]) -> Ledger | None:
    """The ledger of an observation; None where there is no entry.

    Args:
        squares: for each point the sum of the squares of its gradient.
        heard: for each point how often a gradient was heard there.
        scale: the factor that the gradients carry.
        streams: the inputs of norms, by place.
    """
    if not facts:
        return None
    norms = [math.sqrt(square) / scale if count else None for square, count in zip(squares, heard, strict=True)]
    entries = []
    for place, kind, level, parent, start, end, skip, branches in facts:
        into, stream = norms[start], streams.get(place)
        by_branches = [norms[each] for each in branches]
        entries.append(
            Entry(
                place,
                Kind(kind),
                level,
                None if parent is None else facts[parent][0],
                into,
                _ratio(norms[end], into),
                _ratio(_together(by_branches), None if skip is None else norms[skip]),
                *((None, None, None) if stream is None else (stream.rms, stream.top, stream.channel)),
            )
        )
    return Ledger(tuple(entries))


def _ratio(above: float | None, below: float | None) -> float | None:
    if above is None or not below or not (math.isfinite(above) and math.isfinite(below)):
        return None
    return above / below


def _together(norms: Iterable[float | None]) -> float | None:
    known = [each for each in norms if each is not None]
    return math.hypot(*known) if known else None


CHANNELS = 2**20
"""The most channels whose index travels with the largest value."""


def decode_top(code: float) -> tuple[float | None, int | None]:
    """The largest |x| and its channel from the code that observe/stream.py makes of them; None where there is none."""
    if not math.isfinite(code) or code < 0:
        return None, None
    bits, channel = divmod(round(code), CHANNELS)
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value, channel
