"""The scalars that the user's own code writes beside our data, such as the loss. The tab and the page show them above the sites. Never torch."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.data.provider import RunTagFilter
from tensorboard.util.tensor_util import make_ndarray

from torchsat.grids import Grid, last_session
from torchsat.tensorboard import SUBRUN
from torchsat.tensorboard.reader import frames

log = logging.getLogger("torchsat")

MOST_POINTS = 1000
"""The most points of one scalar."""
_LOSS = re.compile(r"loss|nll|perplexity|elbo|objective", re.IGNORECASE)
_NOT_TRAINING = re.compile(r"val|eval|test|dev|valid", re.IGNORECASE)
_RATE = re.compile(r"(^|[^a-z])lr([^a-z]|$)|learning[_ -]?rate", re.IGNORECASE)


class UserScalars:
    """The scalars of one run, without those that torchsat has written.

    Args:
        provider: TensorBoard's data provider.
        context, experiment: what it is asked with.
        run: the user's run.
    """

    def __init__(self, provider: Any, context: Any, experiment: str, run: str) -> None:
        self._provider, self._asked, self._run = provider, {"experiment_id": experiment, "plugin_name": "scalars"}, run
        self._context = context
        found = provider.list_scalars(context, **self._asked, run_tag_filter=RunTagFilter(runs=[run]))
        self.tags = sorted(tag for tag in found.get(run, {}) if not tag.startswith("torchsat"))

    def describe(self) -> dict[str, Any]:
        """All tags, and those that by their names are the training loss and the learning rate; None where no name says so."""
        return {"tags": self.tags, "loss": _guess(self.tags, _LOSS), "rate": _guess(self.tags, _RATE)}

    def grid(self, tag: str) -> Grid:
        """One scalar over time. What a later session of the run has made void is left out."""
        wanted = RunTagFilter(runs=[self._run], tags=[tag])
        found = self._provider.read_scalars(self._context, **self._asked, downsample=MOST_POINTS, run_tag_filter=wanted)
        data = found.get(self._run, {}).get(tag, ())
        return _grid(tag, [each.step for each in data], [each.wall_time for each in data], [each.value for each in data])


def scalars_beside(directory: str) -> dict[str, Any]:
    """The loss and the learning rate that the user's own code has written beside a run, with as many points as a page holds.

    TensorBoard's reader of event files in Python computes a checksum of every record, and takes a second for each megabyte of images. So the files
    are read here; as TensorBoard's faster server does, without the checksums of what is read.

    Args:
        directory: that of our event files. Those of the user lie in the folder above it, or in the same one where we write through a writer.

    Returns:
        `UserScalars.describe` for these two tags, and under "grids" the points of each, by tag.
    """
    folder = Path(directory if Path(directory).is_dir() else directory.partition(" (")[0])
    folder = folder.parent if folder.name == SUBRUN else folder
    points: dict[str, tuple[array[float], array[float], array[float]]] = {}
    try:
        for path in sorted(folder.glob("*tfevents*")):
            for tag, *point in _points(path):
                for column, number in zip(points.setdefault(tag, (array("d"), array("d"), array("d"))), point, strict=True):
                    column.append(number)
    except Exception as error:  # The files are not ours, and the page is there without them.
        log.warning("torchsat: the scalars in %s cannot be read and are left out (%s: %s)", folder, type(error).__name__, error)
        points = {}
    loss, rate = (_guess(sorted(points), pattern) for pattern in (_LOSS, _RATE))
    tags = [tag for tag in (loss, rate) if tag is not None]
    return {"tags": tags, "loss": loss, "rate": rate, "grids": {tag: _grid(tag, *points[tag]).thin(MOST_POINTS) for tag in tags}}


def _points(path: Path) -> Iterator[tuple[str, float, float, float]]:
    """The scalars of the user in one event file: (tag, step, time, value)."""
    plugins: dict[str, str] = {}
    for _, payload in frames(path, [], lambda payload: True, checked=False):
        try:
            event = Event.FromString(payload)
        except DecodeError:
            continue
        for value in event.summary.value:
            # Only the first value of a tag says which plugin it is for.
            plugin = plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
            if value.tag.startswith("torchsat"):
                continue
            if value.HasField("simple_value"):
                yield value.tag, event.step, event.wall_time, value.simple_value
            elif value.HasField("tensor") and plugin == "scalars":
                yield value.tag, event.step, event.wall_time, float(make_ndarray(value.tensor).item())


def _grid(tag: str, steps: Sequence[float], times: Sequence[float], numbers: Sequence[float]) -> Grid:
    """One scalar, without what a later session of the run has made void."""
    at_steps, at_times = np.array(steps, np.float64), np.array(times, np.float64)
    with np.errstate(over="ignore"):
        values = np.array(numbers, np.float64).astype(np.float32).reshape(len(at_steps), 1)
    kept = last_session(at_steps, at_times)
    return Grid(at_steps[kept], at_times[kept], (tag,), values[kept])


def _guess(tags: list[str], pattern: re.Pattern[str]) -> str | None:
    """The tag that fits best: one of training rather than of validation, then the shortest."""
    fitting = [tag for tag in tags if pattern.search(tag)]
    return min(fitting, key=lambda tag: (bool(_NOT_TRAINING.search(tag)), len(tag), tag), default=None)
