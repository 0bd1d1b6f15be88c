"""What one observation gives, as one process has it: values that a transport (transport/) brings to the host.

Nothing here knows whether other ranks exist. A transport for one process and one for several take the same `Parts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from torchsat.record import LayerFacts, SiteFacts


@dataclass(frozen=True)
class Span:
    """Which of a site's units, or of a softmax's heads, this process holds, of those of all ranks of tensor parallelism."""

    count: int | None
    """How many there are on all ranks together. None: the unit axis has no fixed size."""
    first: int = 0
    """Where those of this process begin."""
    counts: bool = True
    """False where another rank holds the very same elements and counts them."""


@dataclass(frozen=True)
class SitePart:
    """What one observation gives of one site."""

    facts: SiteFacts
    """`units` is how many this process has; `span` says of how many."""
    row: Tensor | None = None
    """The columns of columns.ROW; None where the site did not run."""
    block: Tensor | None = None
    """[2, units]: samples and saturated samples of each unit in this observation; None where the units are not always as many."""
    heads: Tensor | None = None
    """columns.HEADS of each head, [6, heads]; None where this is no softmax."""
    span: Span = Span(None)
    """Of its units; of a softmax, of its heads."""
    stage: int | None = None
    """The stage of a pipeline that it is in; None where there is no pipeline."""
    leaves: bool = False
    """Its output leaves this stage of a pipeline for the next one."""


@dataclass(frozen=True)
class LayerPart:
    """What one observation gives of one layer that feeds a site."""

    facts: LayerFacts
    numbers: Tensor | None = None
    """The first three of columns.LAYER, NaN where unknown, over `n` elements; None where nothing was measured."""
    n: int = 0
    """Elements of the weight that were read."""
    numel: int = 0
    """Elements of this process's part of the weight."""
    whole: int | None = None
    """Elements of the weight on all ranks together; None where this process holds all of it."""
    rate: float | None = None
    """The learning rate of the optimizer's group that owns the weight."""
    inputs: Tensor | None = None
    """columns.FEATURES of its input, [3, features]; None where its input was not measured."""
    input_elements: int = 0
    """Elements of its input, read or not."""
    features: int = 0
    """Features of its input on all ranks together; 0 where the input is not measured."""
    first: int = 0
    """Where the features of this process begin."""
    sharded: bool = False
    """Every rank holds another part of the weight; otherwise all hold the same."""
    counts: bool = True
    """False where another rank holds the same part of the weight."""
    input_counts: bool = True
    """False where another rank was given the same input."""
    stage: int | None = None


@dataclass(frozen=True)
class Parts:
    """What one observation gives."""

    sites: Mapping[str, SitePart] = field(default_factory=dict)
    layers: Mapping[str, LayerPart] = field(default_factory=dict)
    averages: float = 1.0
    """What the loss that is trained on is smaller by than the one whose gradient this process sees: what data parallelism averages over."""
    scale: Tensor | None = None
    """What a GradScaler multiplied the loss with."""
    skipped: Tensor | None = None
    """The flag of an overflow, for which the optimizer itself has skipped the step."""
    structure: int = 0
    """Which structure of the model this is of: a number that changes when sites or layers do. Windows of units do not reach beyond it."""

    def averaged(self, averages: float) -> Parts:
        """The same, of a loss that is smaller by this factor than the one whose gradient this process sees."""
        return replace(self, averages=averages)

    @property
    def is_empty(self) -> bool:
        """Whether no site ran."""
        return all(part.row is None for part in self.sites.values())
