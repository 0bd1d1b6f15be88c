"""What one observation has measured in one process: values on the device, which a transport (transport/) brings to the host.

Nothing here depends on whether other ranks exist. The transport for one process and that for several take the same `Parts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from torchsat.record import LayerFacts, SiteFacts


@dataclass(frozen=True)
class Span:
    """Which of a site's units (channels or features), or which heads of a softmax, this process holds, as tensor parallelism may spread them."""

    count: int | None
    """Number of units on all ranks together. None: the unit axis has no fixed size."""
    first: int = 0
    """Index of this process's first unit among them."""
    counts: bool = True
    """Whether this process counts its elements. False where another rank holds the same elements and counts them."""


@dataclass(frozen=True)
class SitePart:
    """What one observation has measured at one site."""

    facts: SiteFacts
    """`facts.units` is the number of units in this process; `span` says of how many on all ranks they are a part."""
    row: Tensor | None = None
    """The numbers of columns.ROW, merged over all calls; None where the site did not run."""
    block: Tensor | None = None
    """The unit block [4, units]: columns.BLOCK of each unit in this observation; None where the number of units is not fixed."""
    heads: Tensor | None = None
    """[14, heads]: the numbers of columns.HEADS for each head; None where this is no softmax."""
    span: Span = Span(None)
    """The units that this process holds, or the heads of a softmax."""
    stage: int | None = None
    """The number of the pipeline stage that the site is in; None where there is no pipeline."""
    leaves: bool = False
    """Whether its output leaves this stage of a pipeline for the next one."""


@dataclass(frozen=True)
class LayerPart:
    """What one observation has measured of one layer that feeds a site."""

    facts: LayerFacts
    numbers: Tensor | None = None
    """The numbers of columns.WEIGHT, summed over `n` elements, NaN where unknown; None where nothing was measured."""
    n: int = 0
    """Number of elements of the weight that were read."""
    numel: int = 0
    """Number of elements in this process's part of the weight."""
    whole: int | None = None
    """Number of elements of the weight on all ranks together; None where this process holds all of it."""
    rate: float | Tensor | None = None
    """The learning rate of the optimizer's group that owns the weight; a tensor where only the device knows it."""
    inputs: Tensor | None = None
    """[6, features]: the sums of columns.FEATURES over its input; None where its input was not measured."""
    features: int = 0
    """Number of features of its input on all ranks together; 0 where the input is not measured."""
    first: int = 0
    """Index of this process's first input feature among them."""
    sharded: bool = False
    """Whether the weight is a DTensor, of which each rank holds a part. Otherwise every rank holds the whole weight."""
    counts: bool = True
    """Whether this process counts its part of the weight. False where another rank holds the same part and counts it."""
    input_counts: bool = True
    """Whether this process counts its input. False where another rank was given the same input and counts it."""
    stage: int | None = None
    """The number of the pipeline stage that the layer is in; None where there is no pipeline."""


@dataclass(frozen=True)
class TallyPart:
    """What one observation has measured at one place beside a row (columns.Tally)."""

    facts: Mapping[str, Any]
    """What is known of the place besides its numbers, in values that JSON has."""
    width: int
    """Number of columns of its two blocks."""
    sums: Tensor | None = None
    """[Tally.sums, width]; None where nothing was measured."""
    maxes: Tensor | None = None
    """[Tally.maxes, width]; None where the tally has no such columns, or nothing was measured."""
    counts: bool = True
    """Whether this process counts its numbers. False where another rank has the same ones and counts them."""


Key = tuple[str, str]
"""The name of a tally (columns.TALLIES), and the place that it is of."""


@dataclass(frozen=True)
class Parts:
    """Everything that one observation has measured in this process."""

    sites: Mapping[str, SitePart] = field(default_factory=dict)
    layers: Mapping[str, LayerPart] = field(default_factory=dict)
    tallies: Mapping[Key, TallyPart] = field(default_factory=dict)
    averages: float = 1.0
    """The gradients that are read at sites are too large by this factor, since data parallelism averages gradients over ranks only later."""
    scale: Tensor | None = None
    """The factor that a GradScaler multiplied the loss with; None where there is no scaler."""
    skipped: Tensor | None = None
    """A flag on the device: an overflow made the optimizer itself skip the step. None where the optimizer has no such flag."""
    generation: int = 0
    """A number that changes when the sites or layers of the model do. The host does not add up samples of units across such a change."""

    def averaged(self, averages: float) -> Parts:
        """A copy with this value of `averages`."""
        return replace(self, averages=averages)

    @property
    def is_empty(self) -> bool:
        """Whether no site ran."""
        return all(part.row is None for part in self.sites.values())
