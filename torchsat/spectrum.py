"""How many directions the features of a site have: from their Gram matrix (gram.py) to the fields of a record; NumPy and standard library only.

With the singular values s_1 >= s_2 >= ... of the features [samples, features], not centred:

- The *effective rank* is exp(H), where H is the entropy of s_i / sum s (Roy & Vetterli 2007). It is 1 where all samples are multiples of one vector,
  and k where k singular values are equal and the others 0.
- *srank* is the least k for which the k largest singular values make up 1 - delta = 99 % of their sum (Kumar et al. 2021).

Both are told as a share of the most that they can be, the number of features or of samples that were read, whichever is smaller. So layers of
different width can be compared, and the absolute numbers are the share times `rank_limit`. Features that are all 0 have the rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from torchsat.columns import RANK
from torchsat.record import Record
from torchsat.rows import TallyRow

DELTA = 0.01
"""The part of the sum of singular values that srank leaves out."""


@dataclass(frozen=True)
class Spectrum:
    """What the singular values of the features tell, in absolute numbers."""

    effective_rank: float
    srank: int
    limit: int


def spectrum(numbers: Sequence[float]) -> Spectrum | None:
    """The spectrum of a block of columns.RANK; None where no sample was read."""
    size = math.isqrt(len(numbers))
    whole = np.asarray(numbers, np.float64).reshape(size, size)
    limit = min(round(whole[-1, -1]), size - 1)
    if limit < 1 or not np.isfinite(whole).all():
        return None
    return Spectrum(*_ranks(whole[:-1, :-1]), limit)


def _ranks(gram: NDArray[np.float64]) -> tuple[float, int]:
    """The effective rank and srank."""
    squares = np.linalg.eigvalsh(gram)[::-1]
    # What is smaller than the rounding of the largest one is 0.
    least = squares[0] * len(squares) * np.finfo(np.float64).eps
    values = np.sqrt(squares[squares > max(least, 0.0)])
    if not len(values):
        return 0.0, 0
    shares = values / values.sum()
    srank = int(np.searchsorted(np.cumsum(shares), 1 - DELTA) + 1)
    return float(np.exp(-(shares * np.log(shares)).sum())), min(srank, len(values))


def with_spectra(records: Iterable[Record], tallies: Mapping[tuple[str, str], TallyRow]) -> tuple[Record, ...]:
    """The records, each with the ranks of its features if these were measured."""
    found = []
    for record in records:
        row = tallies.get((RANK.name, record.site))
        known = None if row is None else spectrum(row.numbers["gram"])
        if known is not None:
            shares = known.effective_rank / known.limit, known.srank / known.limit
            record = replace(record, effective_rank=shares[0], srank=shares[1], rank_limit=known.limit)
        found.append(record)
    return tuple(found)
