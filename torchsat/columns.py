"""The table of all numbers that are measured on the device: the name of each, how it merges, and which kernel writes it. Standard library only.

A *row* is one vector per site: the sum columns, then the max columns. A column adds, or takes the largest, over elements and depends on its element
alone. Micro-batches, repeated calls of a shared module and ranks therefore all merge by the same operation, and everything else (means, shares,
ratios) is derived on the host, in rows.py.

Calls of one site can differ in size, and of a large call only a sample is read. So each element that was read enters the sum columns with the weight
of its call, elements of the call / elements read: the sums stand for all elements, and merged rows weigh each call by what it has. If all is read the
weight is 1. The columns that say how many elements were read, or were inf or nan, are not weighed.

The C kernel gets the order of the columns from here as macros, the Triton kernel as constants, plain torch and the packing of ranks by name. A new
column is one line here, and one formula in each kernel (kernels/cpu.c, kernels/cuda_rows.py, statistics.py). What a record shows of it is one field
in record.py and one line in rows.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torchsat.record import HISTOGRAM_BINS


class Merge(Enum):
    """How the same column of two rows becomes one."""

    SUM = "sum"
    MAX = "max"


class Direction(Enum):
    """During which pass of the model a column is measured. One kernel writes the columns of one direction."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Column:
    """One number of a row."""

    name: str
    says: str
    """What the column is the sum of, or the largest value of."""
    merge: Merge = Merge.SUM
    measured: Direction = Direction.FORWARD
    loss_scaled: int = 0
    """The power of a GradScaler's factor that it carries: 1 if it holds gradients, 2 if it holds their squares."""
    weighed: bool = True
    """Whether an element enters with the weight of its call. A column that takes the largest is never weighed."""


_DEMAND = (Merge.SUM, Direction.BACKWARD, 1)
ROW: tuple[Column, ...] = (
    Column("n", "The weights of the elements that were read and at which z, a and |f'| are finite; they alone enter the sums."),
    Column("elements", "Elements that passed through the site, read or not.", weighed=False),
    Column("nonfinite", "Elements that were read and left out because z, a or |f'| is inf or nan.", weighed=False),
    Column("read", "Elements that were read and enter the sums.", weighed=False),
    Column("low", "Elements on the low plateau."),
    Column("high", "Elements on the high plateau."),
    Column("derivative", "Sum of |f'(z)|."),
    Column("derivative_sq", "Sum of f'(z)^2."),
    Column("derivative_unknown", "Elements at which f' is not known: that of an anonymous function shows only where a gradient passed."),
    Column("z", "Sum of z."),
    Column("z_sq", "Sum of z^2."),
    Column("a", "Sum of a."),
    Column("a_sq", "Sum of a^2."),
    Column("zeros", "Elements whose activation is exactly 0."),
    Column("gate_left", "Elements whose activation is below 0.1; of a sigmoid only."),
    Column("gate_right", "Elements whose activation is above 0.9; of a sigmoid only."),
    Column("grad_a_n", "The weights of the elements at which dL/da was read.", measured=Direction.BACKWARD),
    Column("grad_a_read", "How many elements these are.", measured=Direction.BACKWARD, weighed=False),
    Column("grad_a_sq", "Sum of (dL/da)^2.", measured=Direction.BACKWARD, loss_scaled=2),
    Column("grad_z_n", "The weights of the elements at which dL/dz was read.", measured=Direction.BACKWARD),
    Column("grad_z_read", "How many elements these are.", measured=Direction.BACKWARD, weighed=False),
    Column("grad_z_sq", "Sum of (dL/dz)^2.", measured=Direction.BACKWARD, loss_scaled=2),
    Column("demand", "Sum of |dL/da| over the elements of which it is known on which side of its plateaus z lies.", *_DEMAND),
    Column("leaving", "Elements in a tail whose dL/da asks them to leave it; see `trapped`.", measured=Direction.BACKWARD),
    Column("blocked", "The part of `demand` that falls to elements on a plateau.", *_DEMAND),
    Column(
        "trapped",
        "The part of `blocked` in which descent asks the element to leave its plateau: dL/da > 0 on the high one, < 0 on the low one.",
        *_DEMAND,
    ),
    Column("grad_nonfinite", "Elements left out because a gradient is inf or nan.", measured=Direction.BACKWARD, weighed=False),
    *(Column(f"bin{k}", f"Elements in bin {k} of the histogram of |f'| / peak.") for k in range(HISTOGRAM_BINS)),
    Column("peak", "sup|f'|; minus infinity where there is none.", Merge.MAX),
    Column("z_max", "Largest z.", Merge.MAX),
    Column("z_min_negated", "Minus the smallest z.", Merge.MAX),
    Column("a_max", "Largest a.", Merge.MAX),
    Column("a_min_negated", "Minus the smallest a.", Merge.MAX),
)

SUMS = tuple(column.name for column in ROW if column.merge is Merge.SUM)
MAXES = tuple(column.name for column in ROW if column.merge is Merge.MAX)
COLUMN = {name: at for at, name in enumerate((*SUMS, *MAXES))}
"""The index of each column in a row."""
assert tuple(COLUMN) == tuple(column.name for column in ROW), "in ROW the sum columns come first"
BACKWARD = tuple(column.name for column in ROW if column.measured is Direction.BACKWARD)
"""The columns that the backward pass writes. They are neighbours in ROW, so that one slice of a row holds them."""
BINS = tuple(column.name for column in ROW if column.name.startswith("bin"))
"""The bins of the histogram, from the smallest |f'| / peak to the largest. They are neighbours in ROW."""
UNWEIGHED = tuple(column.name for column in ROW if column.merge is Merge.SUM and not column.weighed)
"""The sum columns that an element enters as 1, whatever its call."""
LOSS_SCALED = {column.name: column.loss_scaled for column in ROW if column.loss_scaled}
"""The columns that carry a power of a GradScaler's factor, and which."""

HEADS = (
    *("rows", "entropy", "jacobian", "logit_variance", "log_keys", "first_key", "log_z", "log_z_sq"),
    *("rows_heard", "row_demand", "row_blocked", "row_trapped", "rows_leaving", "logit_max"),
)
"""The rows of the block [14, heads] that each softmax has. The last row merges by the maximum; the others are sums over query rows. The first eight
and the last are of all rows (softmax.scan_softmax), read or not. `rows_heard` are the rows whose gradient was heard in the backward, which the four
after it are of, each with the weight of its call; softmax.observe_demand says what they are."""
HEADS_LOSS_SCALED = ("row_demand", "row_blocked", "row_trapped")
"""The rows of HEADS that carry a GradScaler's factor."""
BLOCK = ("samples", "saturated", "samples_read", "a_abs")
"""The rows of the unit block [4, units]: for each channel or feature the weights of its samples, the weights of the saturated ones, how many samples
were read, and the sum of |a| by the weights of the samples."""
UNITS = ("units", "units_measured", "units_stuck", "units_in_doubt", "unit_samples")
"""Numbers that are derived from merged unit blocks (BLOCK): how many units there are, how many have enough samples to tell, how many are stuck
(nearly all of their newest samples are saturated), how many may have become stuck lately, and the samples in which the median stuck unit has been
saturated; where none is stuck, the samples of the least sampled unit."""
FEATURES = ("samples", "x", "x_sq", "square_samples", "square_x_sq", "samples_read")
"""The rows of the block [6, features] of a layer's input x: for each feature the sums of w, w x, w x^2, w^2 and w^2 x^2 over its samples, where w is
the weight of the call, and how many samples were read."""
WEIGHT = ("weight_sq", "change_sq", "grad_sq", "unevenness", "learned_sq", "spectral")
"""Numbers of a layer's weight: sums of squares over the elements that were read, of the weight, of its change by the optimizer's step, of its
gradient, and of what the step did to it beside weight decay (inf where an element is inf or nan, NaN where nothing was measured); and
weights.unevenness, which merges by the maximum. So does the last one, the largest singular value, which is known of a whole weight that feeds a
softmax alone."""
INPUT = ("input_n", "input_sq", "input_offset_sq")
"""Numbers of a layer's input, derived from its FEATURES: the samples that were read of all features together, the mean square, and the mean over
features of the squared mean."""
LAYER = (*WEIGHT, *INPUT)
"""All numbers of a layer."""


@dataclass(frozen=True)
class Tally:
    """A kind of numbers that some places have beside their row: a block [columns, width] of sums, and one of maxima.

    What is measured at places that are no sites, or only where the user asks for it, travels as a tally, and costs nothing where there is none. The
    blocks of one place merge column by column. The width is a number of experts or heads, for instance, and 1 for a place that has one number each.
    """

    name: str
    columns: tuple[Column, ...]

    @property
    def sums(self) -> tuple[str, ...]:
        """The names of the columns that add up, in the order of the block."""
        return tuple(column.name for column in self.columns if column.merge is Merge.SUM)

    @property
    def maxes(self) -> tuple[str, ...]:
        """The names of the columns of which the largest is kept, in the order of the block."""
        return tuple(column.name for column in self.columns if column.merge is Merge.MAX)

    @property
    def loss_scaled(self) -> dict[str, int]:
        """The columns that carry a power of a GradScaler's factor, and which. Only sums may carry one."""
        return {column.name: column.loss_scaled for column in self.columns if column.loss_scaled}


LEDGER = Tally(
    "ledger",
    (
        Column("grad_sq", "Sum of the squares of the gradient at this point.", Merge.SUM, Direction.BACKWARD, 2, False),
        Column("heard", "How many gradients were heard there.", Merge.SUM, Direction.BACKWARD, weighed=False),
    ),
)
"""The gradient at the points of its way from the output of a model to its input, which are the columns of its one block (ledger.py)."""
STREAM = Tally(
    "stream",
    (
        Column("n", "Elements.", weighed=False),
        Column("x_sq", "Sum of the squares of the elements.", weighed=False),
        Column("top", "The largest magnitude of an element together with its channel, as one number (ledger.decode_top).", Merge.MAX, weighed=False),
    ),
)
"""The input of a normalisation."""
RANK = Tally(
    "rank", (Column("gram", "Sum over samples of the outer product of some features of a, and a 1 behind them, with itself.", weighed=False),)
)
"""The Gram matrix of the features of a site (gram.py), measured with `extras="rank"`. Its last element is the number of samples that were read."""
EXPERTS = Tally("experts", (Column("choices", "How many tokens were sent to this expert.", weighed=False),))
"""The experts of a mixture, as many columns wide (observe/routers.py)."""
ROUTER = Tally(
    "router",
    (
        Column("tokens", "Tokens that were routed.", weighed=False),
        Column("entropy_tokens", "The weights of the tokens whose entropy was read."),
        Column("entropy", "Sum of H / ln E over them."),
        Column("margin_tokens", "The weights of the tokens whose margin was read."),
        Column("margin", "Sum over them of the lowest score that was chosen less the highest one that was not."),
    ),
)
"""The router of a mixture of experts."""


def _formats(name: str, merge: Merge) -> Tally:
    return Tally(
        name,
        (
            Column("n", "The weights of the finite elements that were read.", merge),
            Column("read", "How many elements these are.", merge, weighed=False),
            Column("zero", "Elements that are 0.", merge),
            Column("flushed", "Elements that are not 0 and become 0 in the format.", merge),
            Column("smallest", "Elements that become the smallest value above 0.", merge),
            Column("subnormal", "Elements that become a subnormal value.", merge),
            Column("clamped", "Elements that are rounded beyond the largest value.", merge),
        ),
    )


FORMATS = _formats("formats", Merge.SUM)
"""What number formats do to the tensors of a site (formats.py). Its columns are, for each tensor, the formats of number_formats.FORMATS."""
FORMATS_OF_SHARDS = _formats("formats_of_shards", Merge.SUM)
"""The same of a layer's weight and its gradient, of which each rank holds a part."""
FORMATS_OF_WEIGHTS = _formats("formats_of_weights", Merge.MAX)
"""The same where every rank holds the whole weight and reads the same elements: the ranks are not added up."""
TALLIES: dict[str, Tally] = {tally.name: tally for tally in (LEDGER, STREAM, RANK, EXPERTS, ROUTER, FORMATS, FORMATS_OF_SHARDS, FORMATS_OF_WEIGHTS)}
"""Every kind of tally, by name."""
