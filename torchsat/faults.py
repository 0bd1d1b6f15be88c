"""Reports failures of torchsat itself: one log line names the place and what is lost, and training goes on.

With `errors="raise"`, which is for developers of torchsat, the exception is raised instead.
"""

from __future__ import annotations

import logging

log = logging.getLogger("torchsat")

MODEL = "(model)"
"""The place of a fault that ends all monitoring of a model."""


class Faults:
    """Reports the faults of one monitor.

    Args:
        raises: raise each fault instead of reporting it.
    """

    def __init__(self, raises: bool) -> None:
        self.raises = raises
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
        log.warning("torchsat: %s: %s: %s; %s. Training is not affected.", place, type(error).__name__, error, lost)
