"""What one observation has measured at the places of tallies (columns.Tally), as it leaves the observation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchsat.columns import FORMATS
from torchsat.observe.passes import Pass
from torchsat.parts import Key, TallyPart
from torchsat.sites import Sites


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
        if key[0] != FORMATS.name or key[1] in sites.ran:
            known[key] = {**known.get(key, ({}, 0))[0], **facts.get(key, {})}, sums.shape[1]
    return {
        key: TallyPart(found, width, whole.tally_sums.get(key), whole.tally_maxes.get(key), _counts(key, sites))
        for key, (found, width) in known.items()
    }


def _counts(key: Key, sites: Sites) -> bool:
    """Whether this process counts its numbers of a place: not those of a site that another rank counts."""
    site = sites.ran.get(key[1]) if key[0] == FORMATS.name else None
    return site is None or sites.span(site).counts
