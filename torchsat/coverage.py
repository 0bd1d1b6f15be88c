"""What a monitor sees and what it does not; standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torchsat.record import Kind
from torchsat.shown import Shown


@dataclass(frozen=True, repr=False)
class Coverage(Shown):
    """What a monitor sees and what it does not."""

    seen: tuple[str, ...]
    """The sites that were measured at least once."""
    unseen: tuple[tuple[str, str], ...]
    """(place, reason) of what is not measured, or only in part."""
    kinds: tuple[tuple[Kind, int], ...] = ()
    """How many of the sites that are seen are of which kind."""

    @property
    def described(self) -> str:
        """How many sites of which kind are seen, as in `5 sites (3 modules, 2 calls)`."""
        kinds = ", ".join(f"{count} {_NOUNS[kind][count > 1]}" for kind, count in self.kinds)
        return f"{len(self.seen)} site{'' if len(self.seen) == 1 else 's'}" + (f" ({kinds})" if kinds else "")

    @property
    def in_short(self) -> str:
        """How many sites are seen, and how many places are not."""
        return f"{self.described} seen, {len(self.unseen) or 'nothing'} unseen"

    @property
    def unseen_alike(self) -> list[tuple[str, str]]:
        """(places, reason): the same in different modules, and modules that differ only by a number, are one pair: `blocks.0/sin and 11 more`."""
        alike: dict[tuple[str, str], list[str]] = {}
        for place, reason in self.unseen:
            _, inside, what = place.rpartition("/")
            alike.setdefault((what if inside else re.sub(r"\d+", "0", place), reason), []).append(place)
        return [(f"{first}{f' and {len(more)} more' if more else ''}", reason) for (_, reason), (first, *more) in alike.items()]

    def __str__(self) -> str:
        rest = "nothing is known to be unseen" if not self.unseen else "not seen, or seen in part:"
        lines = (f"  {places}: {reason}" for places, reason in self.unseen_alike)
        return "\n".join([f"{self.described} seen; {rest}", *lines])


_NOUNS: dict[Kind, tuple[str, str]] = {
    "module": ("module", "modules"),
    "call": ("call", "calls"),
    "recurrent": ("gate", "gates"),
    "softmax": ("softmax", "softmaxes"),
    "function": ("function", "functions"),
}
