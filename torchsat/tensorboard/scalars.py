"""The scalars that the user's own code writes beside our data, such as the loss. The tab shows them above the sites, on one axis. Never torch."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from tensorboard.data.provider import RunTagFilter

from torchsat.grids import Grid, last_session

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
        steps, times = np.array([each.step for each in data], np.float64), np.array([each.wall_time for each in data], np.float64)
        with np.errstate(over="ignore"):
            values = np.array([[each.value] for each in data], np.float64).astype(np.float32).reshape(len(steps), 1)
        kept = last_session(steps, times)
        return Grid(steps[kept], times[kept], (tag,), values[kept])


def _guess(tags: list[str], pattern: re.Pattern[str]) -> str | None:
    """The tag that fits best: one of training rather than of validation, then the shortest."""
    fitting = [tag for tag in tags if pattern.search(tag)]
    return min(fitting, key=lambda tag: (bool(_NOT_TRAINING.search(tag)), len(tag), tag), default=None)
