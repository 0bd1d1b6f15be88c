"""Which places lie before which others in the order of data flow; standard library only.

This is asked of every pair of alerts. It is therefore computed once for all places that are compared: each of their sites is a bit, and each site of
the model has a number whose bits are the places before it. One turn over the sites is enough for that, also with ten thousand of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchsat.record import Snapshot


class Paths:
    """Which of some places lie before which others in the order of data flow.

    Args:
        places: what is compared. A layer stands for the sites that it feeds, and a mixture of experts for those around its router.
    """

    def __init__(self, snapshot: Snapshot, places: Iterable[str]) -> None:
        wanted = set(places)
        self._position = {record.site: at for at, record in enumerate(snapshot.records)}
        feeds = {weight.name: weight.feeds for weight in snapshot.weights if weight.name in wanted}
        feeds |= {each.site: self._around(each.site) for each in snapshot.experts if each.site in wanted}
        self._sites = {place: tuple(site for site in feeds.get(place, (place,)) if site in self._position) for place in wanted}
        bits = {site: 1 << at for at, site in enumerate({site: None for sites in self._sites.values() for site in sites})}
        before = dict.fromkeys(self._position, 0)
        changed = True
        # One turn is enough, and a second one sees that it was, unless a signal flows back to a site that comes first in the order.
        while changed:
            changed = False
            for record in snapshot.records:
                reached = 0
                for site in record.after:
                    reached |= before.get(site, 0) | bits.get(site, 0)
                if reached & ~before[record.site]:
                    before[record.site] |= reached
                    changed = True
        self._own = {place: _union(bits[site] for site in sites) for place, sites in self._sites.items()}
        self._before = {place: _union(before[site] for site in sites) for place, sites in self._sites.items()}

    def _around(self, experts: str) -> tuple[str, ...]:
        """The sites in the module that holds a router and its experts."""
        module = experts.rpartition("/")[0]
        within = (f"{module}/", f"{module}.", *([f"{above}."] if (above := module.rpartition(".")[0]) else []))
        return tuple(site for site in self._position if site.startswith(within))

    def own(self, place: str) -> int:
        """The bits of the sites of a place."""
        return self._own.get(place, 0)

    def before(self, place: str) -> int:
        """The bits of all sites before those of a place."""
        return self._before.get(place, 0)

    def position(self, place: str) -> int:
        """Where the first site of a place stands in the order of data flow."""
        return min((self._position[site] for site in self._sites.get(place, ())), default=len(self._position))


def _union(bits: Iterable[int]) -> int:
    found = 0
    for each in bits:
        found |= each
    return found
