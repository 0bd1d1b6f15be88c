"""What a monitor has for itself: its model, and the place of its files.

A notebook's cell that is run again watches the same model once more, and nobody has closed the first monitor. Two monitors on one model would do all
work twice and tell each alert twice, and two that write into one directory would mix two runs. So a new monitor closes those that have what it needs.
Monitors of a model and of a part of it, or of a copy, have different models and do not disturb each other.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from torch import nn

from torchsat.options import Options


@dataclass(frozen=True, eq=False)
class Claim:
    """What one monitor has for itself."""

    name: str
    """The name of the model's class, for messages."""
    models: tuple[weakref.ref[nn.Module], ...]
    """The model inside its wrappers, or the stages of a pipeline. They are not kept alive."""
    files: Hashable
    """The directory that is written to, or the writer. None: nothing is written."""

    def why_not_both(self, newer: Claim) -> str | None:
        """Why the monitor with this claim is closed where a newer one is made, as the end of a sentence; None where both can be."""
        mine = {id(model()) for model in self.models if model() is not None}
        if mine & {id(model()) for model in newer.models}:
            return f"the same {self.name} is watched anew"
        if self.files is not None and self.files == newer.files:
            return f"a {newer.name} is watched that writes into the same directory; give each model its own to watch both"
        return None


def claim_of(models: Iterable[nn.Module], options: Options) -> Claim:
    """What a monitor of these models with these options needs."""
    found = tuple(models)
    place: Hashable = None
    if options.writer is not None:
        place = id(options.writer)
    elif options.log_dir is not None:
        directory = os.fspath(options.log_dir)
        place = directory if "://" in directory else os.path.realpath(directory)
    return Claim(type(found[0]).__name__ if found else "model", tuple(map(weakref.ref, found)), place)
