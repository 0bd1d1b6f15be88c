"""Counts what number formats would do to the tensors of sites and layers, where the user asks for it: `watch(..., extras=("formats",))`.

A tensor is counted where it lies in memory as the user's program has it: z before the activation runs, a after it, a gradient when it passes the
activation's node in the backward, with the factor of a GradScaler in it. So z of a fused attention and the gates of a recurrent layer, which never
leave their kernel, are not counted, and of dL/dz only one that arrives in one piece is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn.functional import pad

from torchsat.columns import FORMATS
from torchsat.formats import count
from torchsat.number_formats import FORMATS as TABLE
from torchsat.number_formats import OF_LAYER, OF_SITE
from torchsat.observe.passes import Pass, Passes
from torchsat.options import Options
from torchsat.parts import Key
from torchsat.sampling import seed_of
from torchsat.sharding import is_pending, part_of
from torchsat.tensors import why_unread


class FormatCounter:
    """Counts the tensors of one observation, if the user has asked for it.

    Args:
        turn: the number of the observation, which selects the elements that are read.
    """

    def __init__(self, options: Options, turn: int, passes: Passes) -> None:
        self.counts = "formats" in options.extras
        """Whether anything is counted at all."""
        self._limit, self._turn, self._passes = options.limit, turn, passes
        self._calls: dict[tuple[str, str], int] = {}
        """How often each tensor has been counted in this observation."""

    def add(self, site: str, tensor: str, x: Tensor, into: Pass | None = None) -> None:
        """Count a tensor of a site. `into`: the pass that it belongs to; None: the present one."""
        if not self.counts or is_pending(x):
            return
        x = part_of(x).detach()
        if x.numel() and why_unread(x) is None:
            key = FORMATS.name, site
            (self._passes.current if into is None else into).tally(key, _beside(self.counted(site, tensor, x), OF_SITE.index(tensor), len(OF_SITE)))
            self.note(key, tensor, x)

    def adder(self, site: str) -> Callable[[str, Tensor], None] | None:
        """A function to be called in the backward with the name of a gradient and the gradient, which counts it in the pass that runs now. None where
        nothing is counted."""
        if not self.counts:
            return None
        current = self._passes.current
        return lambda tensor, grad: self.add(site, tensor, grad, current)

    def counted(self, place: str, tensor: str, x: Tensor) -> Tensor:
        """The columns of one tensor, [columns, formats]. The calls of one place are not read at the same places."""
        call = self._calls.get((place, tensor), 0)
        self._calls[place, tensor] = call + 1
        return count(x, self._limit, seed_of(self._turn, call))

    def note(self, key: Key, tensor: str, x: Tensor) -> None:
        """Note the type that a tensor has in memory."""
        facts = self._passes.tally_facts
        facts[key] = {**facts.get(key, {}), tensor: str(x.dtype).removeprefix("torch.")}


def of_layer(counted: Mapping[str, Tensor]) -> Tensor:
    """The block of a layer: the columns of its tensors side by side."""
    return sum((_beside(found, OF_LAYER.index(tensor), len(OF_LAYER)) for tensor, found in counted.items()), start=0)  # type: ignore[return-value]


def _beside(found: Tensor, at: int, tensors: int) -> Tensor:
    """The columns of one tensor in a block of so many, in which those of the others are 0."""
    return pad(found, (at * len(TABLE), (tensors - 1 - at) * len(TABLE)))
