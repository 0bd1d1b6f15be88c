"""Reports failures of torchsat itself: one log line names the place and what is lost, and training goes on.

With `errors="raise"`, which is for developers of torchsat, the exception is raised instead.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

log = logging.getLogger("torchsat")

MODEL = "(model)"
"""The place of a fault that ends all monitoring of a model."""


_NAMED = 3
"""The most places that one log line names."""


def listed(places: Sequence[str]) -> str:
    """Several places in a few words: how many, and the first of them."""
    return f"{len(places)} places such as {', '.join(places[:_NAMED])}"


class Faults:
    """Reports the faults of one monitor.

    Args:
        raises: raise each fault instead of reporting it.
    """

    def __init__(self, raises: bool) -> None:
        self.raises = raises
        self._said: set[str] = set()
        """The reasons that have been logged."""
        self.ended: str | None = None
        """Why all monitoring of this model has ended; None as long as it continues."""

    def end(self, error: Exception) -> None:
        """Remember that all monitoring of this model has ended because of this fault."""
        self.ended = f"{type(error).__name__}: {error}"

    def report(self, place: str, error: Exception, lost: str | None = None) -> None:
        """Log that something failed at a place, and what is lost because of it. A fault at MODEL ends the monitor.

        Raises:
            Exception: the fault itself, where the user asked for that.
        """
        if self.raises:
            raise error
        if place == MODEL:
            self.end(error)
        lost = lost or ("all monitoring stops" if place == MODEL else f"{place} is no longer watched")
        self._log(place, error, lost)

    def report_places(self, places: Sequence[str], error: Exception) -> None:
        """Log in one line that the same thing failed at these places, which are no longer watched. This raises nothing."""
        if len(places) == 1:
            self._log(places[0], error, f"{places[0]} is no longer watched")
        else:
            self._log(listed(places), error, "they are no longer watched")

    def say_unmeasured(self, places: Sequence[str], reason: str) -> None:
        """Log once in a run, in one line, that these layers are not measured."""
        if reason not in self._said:
            self._said.add(reason)
            names, are = (places[0], "it is") if len(places) == 1 else (listed(places), "they are")
            log.warning("torchsat: %s: %s; %s not measured as a layer. Training is not affected.", names, reason, are)

    def _log(self, place: str, error: Exception, lost: str) -> None:
        log.warning("torchsat: %s: %s: %s; %s. Training is not affected.", place, type(error).__name__, error, lost)
