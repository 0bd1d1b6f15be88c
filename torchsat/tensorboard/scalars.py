"""The scalars that the user's own code writes beside our data, such as the loss. The tab and the page show them above the sites. Never torch."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data.provider import RunTagFilter

from torchsat.grids import Grid, last_session
from torchsat.tensorboard import SUBRUN

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

    def grid(self, tag: str, most: int = MOST_POINTS) -> Grid:
        """One scalar over time, of which the provider chooses so many points if it has more. What a later session of the run has made void is left
        out."""
        wanted = RunTagFilter(runs=[self._run], tags=[tag])
        found = self._provider.read_scalars(self._context, **self._asked, downsample=most, run_tag_filter=wanted)
        data = found.get(self._run, {}).get(tag, ())
        steps, times = np.array([each.step for each in data], np.float64), np.array([each.wall_time for each in data], np.float64)
        with np.errstate(over="ignore"):
            values = np.array([[each.value] for each in data], np.float64).astype(np.float32).reshape(len(steps), 1)
        kept = last_session(steps, times)
        return Grid(steps[kept], times[kept], (tag,), values[kept])


def scalars_beside(directory: str) -> dict[str, Any]:
    """The loss and the learning rate that the user's own code has written beside a run, with as many points as a page holds.

    They are read and chosen by TensorBoard's own means, as in the tab. Whatever keeps it from reading the files, nothing is found there.

    Args:
        directory: that of our event files. Those of the user lie in the folder above it, or in the same one where we write through a writer.

    Returns:
        `UserScalars.describe` for these two tags, and under "grids" the points of each, by tag.
    """
    found: dict[str, Any] = {"tags": [], "loss": None, "rate": None, "grids": {}}
    folder = Path(directory if Path(directory).is_dir() else directory.partition(" (")[0])
    folder = folder.parent if folder.name == SUBRUN else folder
    if not any(folder.glob("*tfevents*")):
        return found
    try:
        multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 0})
        multiplexer.AddRun(str(folder), ".").Reload()
        scalars = UserScalars(MultiplexerDataProvider(multiplexer, str(folder)), RequestContext(), "", ".")
        known = scalars.describe()
        tags = [tag for tag in (known["loss"], known["rate"]) if tag is not None]
        return {**known, "tags": tags, "grids": {tag: scalars.grid(tag, sys.maxsize).thin(MOST_POINTS) for tag in tags}}
    except Exception as error:  # The files are not ours, and the page is there without them.
        log.warning("torchsat: the scalars in %s cannot be read and are left out (%s: %s)", folder, type(error).__name__, error)
        return found


def _guess(tags: list[str], pattern: re.Pattern[str]) -> str | None:
    """The tag that fits best: one of training rather than of validation, then the shortest."""
    fitting = [tag for tag in tags if pattern.search(tag)]
    return min(fitting, key=lambda tag: (bool(_NOT_TRAINING.search(tag)), len(tag), tag), default=None)
