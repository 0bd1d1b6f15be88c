"""Adds up unit blocks over observations, on the host, and tells which units (channels or features) are stuck now, and which are dormant.

One batch of a small network has too few samples of a unit to tell whether it is stuck, so samples are added up over observations. But what a unit did
long ago says nothing about whether it is stuck now: a sum over a fixed number of samples mixes healthy ones with dead ones, and is wrong until it has
forgotten the healthy ones. Therefore each unit has a *run*: its newest observations that together have at least STUCK_SHARE of their samples
saturated. The run ends as soon as an observation shows that the unit is active again. A unit is stuck once its run is so long that it would have been
active ACTIVE_BEFORE times in it at the rate at which it was active before: a unit that lived on half of its samples is known to be stuck after few
samples, a sparse one, which is seldom active, after many. (At that rate, a run of independent samples comes about by chance once in e^10 = 22,000
times.) The run is never shorter than LEAST_SAMPLES, and need not be longer than UNIT_SAMPLES. Halfway there the unit is in doubt. While many units
are in doubt, as when they have died together, the share of stuck units is not known.

A unit is *dormant* (Sokar et al. 2023) if its mean |a| is at most DORMANT_SCORE of the mean over the units of its layer. It may get a gradient, and
its function may have no plateau, but it hands on next to nothing. A dead ReLU is a special case. The means are taken over the newest observations
that together have SAMPLES_FROM_START samples of each unit, which is one observation where the batch is large enough.

Everything is a few numbers per unit, however many samples there were. Ranks add up their blocks before they come here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from torchsat.columns import UNITS

STUCK_SHARE = 0.99
"""At least this share of the samples of a run is saturated."""
LEAST_SAMPLES = 64
"""The least samples of a run that make a unit stuck."""
SAMPLES_FROM_START = 200
"""The samples of a run that make a unit stuck which has never been active: as many as it would take if it had been active on 5 % of its samples.
Until then there are too few to tell."""
FEW = 0.05
"""So small a share of units without enough samples does not keep that of the stuck ones from being known."""
UNIT_SAMPLES = 1000
"""A run of so many samples makes a unit stuck in any case. Of older samples at most so many are remembered, so that a unit that becomes active is
seen to be so, however long it was stuck."""
ACTIVE_BEFORE = 10.0
"""How many times a unit would have been active in its run, at the rate at which it was active before, for it to be stuck."""
DORMANT_SCORE = 0.025
"""The most that the mean |a| of a dormant unit is of the mean over all units of its layer: the threshold by which Sokar et al. recycle units."""
Block = NDArray[np.float64]
"""[4, units]: columns.BLOCK of each unit in one observation."""
State = NDArray[np.float64]
"""[4, units]: samples and active (not saturated) samples of each unit before its run; samples and active samples of its run."""
Sizes = NDArray[np.float64]
"""[3, units]: of each unit the weights of its samples, the sum of |a|, and how many samples were read, since its layer was told about last."""


class UnitWindows:
    """What is known of the units of each site."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}
        self._sizes: dict[str, Sizes] = {}
        self._dormant: dict[str, float] = {}

    def get(self, site: str) -> State | None:
        """What is known of the units of a site; None where nothing is."""
        return self._states.get(site)

    def add(self, site: str, block: Block) -> list[float]:
        """Add the block of one observation. With another number of units than before, what was known is forgotten.

        Returns:
            The numbers of columns.UNITS, this observation included.
        """
        known = self._states.get(site)
        if known is None or known.shape[1] != block.shape[1]:
            self.drop(site)
            known = np.zeros((4, block.shape[1]))
        self._states[site] = state = _joined(known, block)
        sizes = self._sizes.get(site, 0.0) + block[[0, 3, 2]]
        if sizes[2].min() >= SAMPLES_FROM_START:
            self._dormant[site], sizes = _dormant(sizes[1] / sizes[0]), np.zeros_like(sizes)
        self._sizes[site] = sizes
        return _summary(state)

    def dormant(self, site: str) -> float | None:
        """The share of the units of a site that are dormant; None as long as some unit has too few samples."""
        return self._dormant.get(site)

    def drop(self, site: str) -> None:
        """Forget a site that has no block any more."""
        for kept in (self._states, self._sizes, self._dormant):
            kept.pop(site, None)

    def keep(self, units: Mapping[str, int | None]) -> None:
        """Keep only what is known of sites that still have as many units as before."""
        for site in [site for site, state in self._states.items() if state.shape[1] != (units.get(site) or 0)]:
            self.drop(site)

    def start_over(self) -> None:
        """Forget everything."""
        for kept in (self._states, self._sizes, self._dormant):
            kept.clear()


def _dormant(sizes: NDArray[np.float64]) -> float:
    """Which share of the units with these mean |a| is dormant. Where all means are 0, all units are."""
    return float((sizes <= DORMANT_SCORE * sizes.mean()).mean())


def _joined(state: State, block: Block) -> State:
    """The state after an observation: its samples join the run, begin a new one, or end it."""
    weights, saturated, samples, _ = block
    # Which share of a unit is saturated is weighed by what each call has, and how sure that is depends on how many samples were read.
    active = samples * (1 - saturated / np.where(weights > 0, weights, 1.0))
    active = np.where((weights > 0) & (active > 1e-6), active, 0.0)  # What is less is rounding.
    before, run = (_at_most(part, UNIT_SAMPLES) for part in (state[:2], state[2:]))
    now = np.stack([samples, active])
    goes_on, begins = _is_closed(run + now) & ~_is_open(now), _is_closed(now)
    # What is not part of the run after this observation was before it.
    before = before + np.where(goes_on, 0.0, np.where(begins, run, run + now))
    run = np.where(goes_on, run + now, np.where(begins, now, 0.0))
    return np.concatenate([before, run])


def _at_most(counts: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """[2, units] scaled so that no unit has more samples than this, at the same share of active ones."""
    scaled: NDArray[np.float64] = counts * np.minimum(1.0, most / np.maximum(counts[0], 1.0))
    return scaled


def _is_closed(counts: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each unit is saturated in nearly all of these samples. The small number allows for rounding."""
    samples, active = counts
    closed: NDArray[np.bool_] = active <= (1 - STUCK_SHARE) * samples + 1e-9
    return closed


def _is_open(counts: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each unit is active in many more of these samples than a stuck one. This ends a run at once, however long it is."""
    samples, active = counts
    opened: NDArray[np.bool_] = active > np.maximum(2.0, 5 * (1 - STUCK_SHARE) * samples)
    return opened


def _summary(state: State) -> list[float]:
    """The numbers of columns.UNITS for what is known of the units of a site."""
    before, active, run, _ = state
    needed = np.clip(ACTIVE_BEFORE * before / np.maximum(active, 1e-9), LEAST_SAMPLES, UNIT_SAMPLES)
    never = active <= 0
    needed = np.where(never, SAMPLES_FROM_START, needed)
    stuck = run >= needed
    # A unit that was active on hardly more samples than a stuck one is halfway there again and again. That is no sign of a change.
    halfway = (run * active >= 0.5 * ACTIVE_BEFORE * before) & (needed < UNIT_SAMPLES / 2)
    in_doubt = ~stuck & (run > 0) & ~never & halfway
    seen = before + run
    measured = seen >= LEAST_SAMPLES
    new = ~stuck & (run > 0) & never
    if new.mean() > FEW:
        measured &= ~new
    samples = np.median(run[stuck]) if stuck.any() else seen.min()
    summary = [len(seen), float(measured.sum()), float(stuck.sum()), float(in_doubt.sum()), float(np.floor(samples))]
    assert len(summary) == len(UNITS)
    return summary
