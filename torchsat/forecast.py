"""What number formats that are not in use would do to a model, in sentences and in rows of a table; standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torchsat.number_formats import FORMATS, IN_WORDS, FormatUse
from torchsat.percent import percent

WORTH = 0.01
"""A share of elements below this is not told."""
MUCH = 0.05
"""The share of elements from which on a place is counted behind the worst one. Of the gradients of a weight 5 % lay below the range of float16 in the
speech model of Micikevicius et al. 2018 (Mixed Precision Training, section 3.1), which did not train where they were lost."""
_SHOWN = 3
"""So many places are shown of each format and tensor."""


def damage(use: FormatUse) -> float:
    """The share of elements that a format would spoil: what it would flush or clamp; of the format in use, what it is estimated to have flushed."""
    return (use.lost or 0.0) if use.in_use else (use.flushed or 0.0) + (use.clamped or 0.0)


def forecasts(uses: Sequence[FormatUse]) -> list[str]:
    """For each format that is not in use everywhere a sentence about the place that it would spoil most, and one about those that spoil none.

    A place whose tensor lies in memory in a format is left out there, since nothing would change.
    """
    sentences, harmless = list[str](), list[str]()
    for known in FORMATS:
        found = [use for use in uses if use.format == known.name and not use.in_use]
        if not found:
            continue
        worst = max(found, key=damage)
        if damage(worst) < WORTH:
            harmless.append(known.name)
            continue
        others = {use.place for use in found if damage(use) >= MUCH} - {worst.place}
        more = f", and {len(others)} more place{'s' if len(others) > 1 else ''} would lose {percent(MUCH)} or more of a tensor" if others else ""
        sentences.append(f"{worst.place} would {_does(worst)} in {known.name}{more}")
    if harmless:
        sentences.append(f"no place would lose {percent(WORTH)} of a tensor in {' or '.join(harmless)}")
    return sentences


def _does(use: FormatUse) -> str:
    """What a format would do to a tensor: `flush 12 % of dL/dz`."""
    shares = (("flush", use.flushed), ("clamp", use.clamped))
    first, *rest = [f"{verb} {percent(share)}" for verb, share in sorted(shares, key=lambda each: -(each[1] or 0.0)) if share and share >= WORTH / 2]
    return f"{first} of {IN_WORDS[use.tensor]}{f' and {rest[0]}' if rest else ''}"


def worst(uses: Iterable[FormatUse]) -> list[tuple[FormatUse, bool]]:
    """The tensors that each format spoils most, the worst of each format first; and whether one is among the two worst of its format."""
    rows: list[tuple[FormatUse, bool]] = []
    by_format: dict[str, list[FormatUse]] = {known.name: [] for known in FORMATS}
    for use in uses:
        by_format.setdefault(use.format, []).append(use)
    for found in by_format.values():
        count: dict[str, int] = {}
        for use in sorted(found, key=damage, reverse=True):
            count[use.tensor] = count.get(use.tensor, 0) + 1
            if count[use.tensor] <= _SHOWN:
                rows.append((use, sum(count.values()) <= 2))
    return rows
