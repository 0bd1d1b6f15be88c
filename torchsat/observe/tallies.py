"""What one observation has measured at the places of tallies (columns.Tally), as it leaves the observation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchsat.columns import FORMATS, RANK
from torchsat.observe.passes import Pass
from torchsat.parts import Key, Span, TallyPart
from torchsat.sites import Sites

_OF_SITES = (FORMATS.name, RANK.name)
"""The tallies whose places are sites."""


def tally_parts(whole: Pass, sites: Sites, facts: Mapping[Key, Mapping[str, Any]]) -> dict[Key, TallyPart]:
    """The parts of the places that have been measured in this observation or an earlier one, since ranks agree on places whether they run or not.

    Args:
        whole: the passes that count, merged.
        sites: what is known of the sites; it keeps the places.
        facts: what is known of the places that were measured in this observation.
    """
    known = sites.tallied
    for key, sums in whole.tally_sums.items():
        # What was measured before its activation returned may have turned out to be no site.
        if (key[0] not in _OF_SITES or key[1] in sites.ran) and not _is_divided(key, sites):
            known[key] = {**known.get(key, ({}, 0))[0], **facts.get(key, {})}, sums.shape[1]
    return {
        key: TallyPart(found, width, whole.tally_sums.get(key), whole.tally_maxes.get(key), _span(key, sites).counts)
        for key, (found, width) in known.items()
    }


def _span(key: Key, sites: Sites) -> Span:
    """Which units of the site this process holds, where the place is a site."""
    site = sites.ran.get(key[1])
    return Span(None) if site is None else sites.span(site)


def _is_divided(key: Key, sites: Sites) -> bool:
    """Whether another rank holds the other features of a site, so that nobody has the products of all of them."""
    return key[0] == RANK.name and _span(key, sites).count not in (None, sites.ran[key[1]].units)
