"""What is known of one mixture of experts at one observation: which experts its router chooses, and how surely; standard library only.

A router scores the experts for each token, and the token goes to the k experts with the highest scores. What is counted are these choices
(observe/routers.py). Nothing here depends on whether the scores are a softmax, sigmoids or logits.

The *load* of an expert is its part of all choices. With E experts, 1 / E is even. An expert is *dead* if it gets less than DEAD of that, and this is
only told where there are so many choices that an expert with an even load would have LEAST of them. One expert can get each token once, so the
highest load that there is, is 1 / k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEAD = 0.05
"""The part of an even load below which an expert is dead."""
COLLAPSED = 0.9
"""How far one expert is on its way to every token where the mixture has collapsed."""
LEAST = 64
"""So many choices per expert tell which experts are dead. An expert with an even load gets less than DEAD of them by chance once in 10^23 times."""


@dataclass(frozen=True)
class Experts:
    """One mixture of experts in one observation."""

    site: str
    """The place where its router chooses: `blocks.3.moe.router/experts`, which is the path of the module, a slash and `experts`."""
    k: int
    """How many experts each token goes to."""
    tokens: int
    """How many tokens were routed."""
    load: tuple[float, ...]
    """Of each expert, its part of all choices. They add up to 1."""
    entropy: float | None
    """Mean of H / ln E over the tokens that were read, where H is the entropy of the probabilities of the router over the E experts. 1 is a router
    that does not distinguish between experts, 0 one that is sure."""
    margin: float | None
    """Mean difference of the lowest score that was chosen and the highest one that was not: of the probabilities of the router, unless it chooses by
    other numbers. Where it is 0 the choice is a matter of chance. None where all others are masked."""
    alert_level: float | None = None
    """How near the mixture is to an alert, as `Record.alert_level`."""

    @property
    def path(self) -> str:
        """The path of the module that chooses."""
        return self.site.rpartition("/")[0]

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.load)

    @property
    def dead(self) -> int | None:
        """How many experts are dead; None where too few tokens were routed to tell."""
        if self.tokens * self.k < LEAST * self.experts:
            return None
        return sum(each * self.experts < DEAD for each in self.load)

    @property
    def busiest(self) -> float:
        """The highest load over an even one: 1 where all have the same, at most E / k. Less 1, it is the maximal violation of balance by Wang et al.
        (2024)."""
        return max(self.load) * self.experts

    @property
    def concentration(self) -> float:
        """How far the busiest expert is on its way from an even load, 0, to one that gets every token, 1."""
        most = self.experts / self.k
        return (self.busiest - 1) / (most - 1) if most > 1 else 0.0

    @staticmethod
    def of(site: str, facts: Mapping[str, Any], choices: Sequence[float], router: Mapping[str, Sequence[float]]) -> Experts | None:
        """The mixture of the numbers of its two tallies (columns.EXPERTS and ROUTER); None where no token was routed."""
        whole = sum(choices)
        sums = {name: values[0] for name, values in router.items()}
        if not whole or not sums["tokens"]:
            return None
        entropy, margin = (sums[name] / sums[f"{name}_tokens"] if sums[f"{name}_tokens"] else None for name in ("entropy", "margin"))
        return Experts(site, int(facts["k"]), round(sums["tokens"]), tuple(each / whole for each in choices), entropy, margin)


def is_router(site: str, log_keys: float | None, mixtures: Sequence[Experts]) -> bool:
    """Whether a softmax makes the probabilities of a router: it stands in the module that chooses, around it or in it, and has a key for each expert.

    Args:
        log_keys: the logarithm of the number of its keys (`Record.log_keys`).
    """
    path = site.rpartition("/")[0]
    return log_keys is not None and any(
        round(math.exp(log_keys)) == each.experts and (path in (each.path, _around(each.path)) or _around(path) == each.path) for each in mixtures
    )


def _around(path: str) -> str:
    """The path of the module that holds a module."""
    return path.rpartition(".")[0]


def is_idle(place: str, mixtures: Sequence[Experts]) -> bool:
    """Whether a module lies in an expert that gets next to no tokens, and so next to no gradient; or in one that is a second choice with next to no
    weight, since another expert gets every token.

    An expert is told by its name: it is a number behind names that have "expert" in them (`mlp.experts.3.up`), right below the path of the router or
    below the module that holds the router.
    """
    for mixture in mixtures:
        for holder in dict.fromkeys((mixture.path, _around(mixture.path))):
            if holder and not place.startswith(f"{holder}."):
                continue
            parts = place[len(holder) + 1 :].split(".") if holder else place.split(".")
            behind = list(itertools.dropwhile(lambda part: "expert" in part.lower(), parts))
            if behind and len(behind) < len(parts) and behind[0].isdecimal() and int(behind[0]) < mixture.experts:
                load = mixture.load[int(behind[0])]
                return load * mixture.experts < DEAD or (mixture.concentration >= COLLAPSED and load < max(mixture.load))
    return False
