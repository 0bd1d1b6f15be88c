"""Arrays of numbers over time, joined over the sessions of a run; NumPy and standard library only.

A run may be interrupted and resumed from a checkpoint, with other sites than before. Its observations then come in several tables, whose names differ
and whose steps overlap. `join` makes one array of them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchsat.metrics import Values


@dataclass(frozen=True)
class Grid:
    """Numbers over time: one row per observation, one column per name. NaN: there is no number."""

    steps: NDArray[np.float64]
    times: NDArray[np.float64]
    names: tuple[str, ...]
    values: Values
    """[steps, names]"""

    def pack(self) -> bytes:
        """The grid as bytes, for a page: a uint32 length, JSON of that length ({"names", "count"}), steps as float64, values as float32.

        All numbers are little-endian. The JSON is padded with blanks, so that the arrays begin at multiples of 8 bytes.
        """
        head = json.dumps({"names": self.names, "count": len(self.steps)}).encode()
        head += b" " * (-(4 + len(head)) % 8)
        steps, values = self.steps.astype("<f8").tobytes(), np.ascontiguousarray(self.values, "<f4").tobytes()
        return struct.pack("<I", len(head)) + head + steps + values

    def thin(self, most: int) -> Grid:
        """A grid of at most `most` observations, evenly chosen, the first and the last among them."""
        if len(self.steps) <= most:
            return self
        kept = np.unique(np.linspace(0, len(self.steps) - 1, most).round().astype(int))
        return Grid(self.steps[kept], self.times[kept], self.names, self.values[kept])


def edges(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the columns of a picture begin and end: each observation holds until the next one, and the last as long as the one before it."""
    return np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1.0))


@dataclass(frozen=True)
class Table:
    """A matrix over time: at each step several rows of numbers, with one column per name. The tensors in event files are of this form."""

    names: tuple[str, ...]
    steps: Sequence[int]
    times: Sequence[float]
    values: Values
    """[steps, rows, names]"""

    @staticmethod
    def of(names: Sequence[str], step: int, time: float, rows: Sequence[Sequence[float]]) -> Table:
        """The table of one observation. A number beyond the range of float32 becomes infinite."""
        with np.errstate(over="ignore"):
            values = np.array([rows], np.float64).reshape(1, len(rows), len(names)).astype(np.float32)
        return Table(tuple(names), [step], [time], values)


def in_order(orders: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Merges lists of names into one, in the order of the last list. A name that only an earlier list has stands behind the name before it there."""
    merged: list[str] = []
    for names in dict.fromkeys(tuple(names) for names in reversed(list(orders))):
        place, known = 0, set(merged)
        for name in names:
            if name in known:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                place += 1
    return tuple(merged)


def last_session(steps: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.intp]:
    """The indices of the observations that count, in the order of their steps.

    A run that was resumed repeats steps. What the earlier session wrote from the first step of the later one on is void.
    """
    order = np.lexsort((steps, times))
    kept, least = [], math.inf
    for index in order[::-1]:
        if steps[index] < least:
            kept.append(index)
            least = steps[index]
    return np.array(kept[::-1], dtype=np.intp)


def not_void(steps: Sequence[float], times: Sequence[float], observed: Grid) -> NDArray[np.bool_]:
    """Which of the events at these steps and times count: those that no later session of `observed` has made void by beginning at or before them."""
    order = np.argsort(observed.times)
    least = np.minimum.accumulate(np.append(observed.steps[order], math.inf)[::-1])[::-1]
    found: NDArray[np.bool_] = np.asarray(steps, np.float64) < least[np.searchsorted(observed.times[order], times, "right")]
    return found


def join(tables: Sequence[Table], rows: int) -> tuple[tuple[str, ...], NDArray[np.float64], NDArray[np.float64], Values]:
    """Joins tables with the same rows, whose names may differ, to (names, steps, times, values [steps, rows, names]). Void observations are left
    out."""
    tables = sorted((table for table in tables if len(table.steps)), key=lambda table: max(table.times))
    names = in_order(table.names for table in tables)
    place = {name: index for index, name in enumerate(names)}
    steps = np.concatenate([np.asarray(table.steps, np.float64) for table in tables] or [np.zeros(0)])
    times = np.concatenate([np.asarray(table.times, np.float64) for table in tables] or [np.zeros(0)])
    values = np.full((len(steps), rows, len(names)), np.nan, np.float32)
    at = 0
    for table in tables:
        values[at : at + len(table.steps), :, [place[name] for name in table.names]] = table.values
        at += len(table.steps)
    kept = last_session(steps, times)
    return names, steps[kept], times[kept], values[kept]
