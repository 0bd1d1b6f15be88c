"""Measures the layers that feed a site: sums for their gain, gradient norm and update ratio, and statistics of their input.

A layer is an `nn.Linear` or its like, a convolution, one of the matrices of a recurrent layer, any other parameter that the graph shows to be used as
a weight (observe/feeders.py), or a part of the rows of one of these. Its input is measured in a forward pre-hook as three sums per feature, which
merge; that of a parameter which is no layer of its own is not measured. The weight is measured just before the optimizer's step, as it was when it
made z, and again just after it.

Weight, gradient and change are read at the same sample of elements, so that no copy of the model is made. The sample consists of short runs of
elements that are neighbours in memory: a processor fetches memory a cache line at a time, so that single elements far apart would cost as much as
all of them.
"""

from __future__ import annotations

import functools
import math
import weakref
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchsat.attributes import stored
from torchsat.columns import WEIGHT
from torchsat.internals import Convolution, TransposedConvolution
from torchsat.optimizers import Decay, put_learned
from torchsat.sampling import Sample, places, seed_of
from torchsat.sharding import is_pending, local
from torchsat.spectral import largest_singular
from torchsat.statistics import accumulator, observe_features, put_squares
from torchsat.tensors import why_unread

COMPUTED = "its weight is computed from others, and reading it can change them"
NOT_YET = "its weight does not exist yet"
ENTERED = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
"""The weight matrices of a recurrent layer or cell that its own input is multiplied with, in both directions. The inputs of its other matrices are
computed inside torch's kernel."""
_RUN = 16
"""Elements of a run: as many float32 as one cache line holds."""
_LESS = 4
"""Of a weight or input, this many times fewer elements are read than of a site, since only means are derived from them, and no shares of units."""
_ENOUGH = 32
"""Whether a weight is uneven is told from this many runs on: of fewer, neighbours differ by chance."""
_EARLY = 3
"""In this many first observations of a run it is told how uneven a weight is: whether it came trained. Later it would be the work of this run."""
_PER_FEATURE = 8
"""At least this many elements of each input feature are read, as far as the limit for a site allows."""


def is_layer(module: nn.Module) -> bool:
    """Whether this module is a layer whose weight and input are measured."""
    return isinstance(module, (nn.Linear, Convolution)) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2 in transformers, called Conv1D, whose weight is [in, out]. It is known by its name, since the library
    may not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def rows_axis(module: nn.Module) -> int:
    """The axis of this layer's weight along which its outputs lie."""
    return 1 if is_transposed(module) or isinstance(module, TransposedConvolution) else 0


def why_unmeasured(module: nn.Module) -> str | None:
    """Why the weight of this layer cannot be measured; None where it can."""
    return why_unreadable(module, "weight")


def why_unreadable(module: nn.Module, parameter: str) -> str | None:
    """Why this weight of a module cannot be read; None where it can."""
    try:
        weight = stored(module, parameter)
    except AttributeError:
        return COMPUTED
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return NOT_YET
    reason = why_unread(local(weight))
    return None if reason is None else f"its weight is {reason}"


def fan_in(module: nn.Module) -> int:
    """How many input elements one output element is a sum of.

    The sizes that a user gives to a layer can be integers of NumPy, which JSON does not know. They are converted here and in the next functions.
    """
    if isinstance(module, nn.Linear):
        return int(module.in_features)
    if not isinstance(module, Convolution):
        return int(stored(module, "weight").shape[0])
    taps = int(module.in_channels // module.groups * math.prod(module.kernel_size))
    return max(1, taps // int(math.prod(module.stride))) if isinstance(module, TransposedConvolution) else taps


def feature_axis(module: nn.Module, ndim: int) -> int:
    """The axis of the features in an input or output of this layer that has `ndim` axes."""
    return ndim - 1 - len(module.kernel_size) if isinstance(module, Convolution) else ndim - 1


def input_sums(x: Tensor, axis: int, limit: int | None, seed: int, sums: Tensor | None = None) -> Tensor:
    """columns.FEATURES of one input, [6, features], added in place to the sums given.

    Args:
        axis: the axis of the features.
        limit: the most elements read of a site, of which an input gets its share; None: all.
        seed: which elements are read; see sampling.py.
    """
    sample = Sample.of(x, None if limit is None else min(limit, max(1, limit // _LESS, _PER_FEATURE * x.shape[axis])), seed)
    return observe_features(_widened(sample.take(x.detach())), sample.units(axis), sums)


def elements(weight: Tensor, limit: int | None, turn: int) -> Tensor:
    """About `limit` / 4 elements of a weight (None: all) as a vector, in runs that are drawn as sampling.py draws elements. They are the same ones
    for the same turn."""
    flat = weight.detach() if weight.is_contiguous() else Sample.of(weight, None, 0).take(weight.detach())
    whole, wanted = weight.numel() // _RUN, max(1, (limit or 0) // _LESS // _RUN)
    if limit is None or weight.numel() <= max(limit // _LESS, 2 * _RUN):
        return _widened(flat.reshape(-1))
    # A weight whose size is no multiple of a run ends with some elements that belong to none. They are read in every other observation, in place of
    # those that the first run would begin with.
    first = (weight.numel() - whole * _RUN) * (turn % 2)
    runs = flat.as_strided((whole, _RUN), (_RUN, 1), flat.storage_offset() + first)
    # torch has no index_select of float8 everywhere, but moves bytes.
    chosen = _runs(whole, wanted, seed_of(turn, 0), weight.device)
    if runs.element_size() == 1:
        return runs.view(torch.uint8).index_select(0, chosen).view(runs.dtype).float().reshape(-1)
    return runs.index_select(0, chosen).reshape(-1)


def _widened(values: Tensor) -> Tensor:
    """The same values as float32 where they are float8, with which torch cannot compute."""
    return values.float() if values.element_size() == 1 else values


@functools.lru_cache(maxsize=64)
def _runs(whole: int, wanted: int, seed: int, device: torch.device) -> Tensor:
    """Which of the runs of a weight are read. They are cached, since weight, gradient and change are read at the same ones."""
    return places(whole, wanted, seed, device)


def _fan_in(module: nn.Module, parameter: str) -> int:
    return fan_in(module) if parameter == "weight" else int(stored(module, parameter).shape[1])


def unevenness(x: Tensor) -> Tensor:
    """By how many standard errors |x| differs more from run to run than within the runs of a vector; NaN where that cannot be told.

    This is Fisher's analysis of variance: N runs of k elements have the ratio F = k var(means) / mean(variances), which for independent elements is 1
    with a standard error of about sqrt(2 / N). What an initialiser draws is independent, whatever its distribution and its scale. Training makes some
    units and inputs larger than others.
    """
    runs = len(x) // _RUN
    if runs < _ENOUGH:
        return torch.full((), math.nan, dtype=accumulator(x.device), device=x.device)
    table = x[: runs * _RUN].to(accumulator(x.device)).abs().reshape(runs, _RUN)
    variance, mean = torch.var_mean(table, 1)
    return (_RUN * mean.var() / variance.mean() - 1) * math.sqrt(runs / 2)


def _inf_for_nan_(sums: Tensor) -> None:
    """Replace NaN by inf, in place: NaN stands for what was not measured, and the norm of what holds inf or nan is no finite number either way."""
    torch.nan_to_num_(sums, nan=math.inf, posinf=math.inf, neginf=math.inf)


_WIDTHS = (("in_features", "out_features"), ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim"))
"""The attributes of torch's layers that hold how wide their input and their output are."""


class Layer:
    """The numbers of one layer during one observation, on its device.

    Args:
        name: the path of the module; for a recurrent layer the path of the matrix.
        parameter: the attribute of the module that holds the weight.
        limit: the most elements read of a site; None: all.
        turn: which observation this is.
        fan_in: how many input elements one output element is a sum of; None: what the type of the module says.
        rows: the part of the weight that is measured, as (axis, first, count); None: all of it.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parameter: str = "weight",
        limit: int | None = None,
        turn: int = 0,
        fan_in: int | None = None,
        rows: tuple[int, int, int] | None = None,
    ) -> None:
        self.name = name
        self.rows = rows
        self.module = weakref.ref(module)
        """Weak, so that a layer does not keep the user's model alive."""
        self.parameter = parameter
        self.fan_in = _fan_in(module, parameter) if fan_in is None else fan_in
        self.limit, self.turn = limit, turn
        self.input_counts: bool | None = None
        """Whether this rank counts its input. False where another rank is given the same input and counts it. None: the input is no DTensor, so that
        nothing says whether others are given it."""
        self.first = 0
        """The index of this rank's first input feature among those of all ranks."""
        self.decay: Decay | None = None
        """What weight decay does in the step that is observed; None where there is none."""
        self.before: Tensor | None = None
        """The elements of the weight as they were before the optimizer's step."""
        self.n = 0
        """How many elements of the weight were read."""
        self.numbers: Tensor | None = None
        """columns.WEIGHT, NaN where unknown; None where nothing was measured."""

    def before_step(self, weight: Tensor) -> None:
        """Keep the elements of the weight for a comparison after the optimizer's step."""
        weight = self.part(local(weight))
        taken = elements(weight, self.limit, self.turn)
        # A view must be copied, since the step changes the weight in place.
        self.before = taken.clone() if taken.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() else taken

    def observe_grad(self, weight: Tensor, divisor: Tensor | None) -> None:
        """Measure the gradient. `divisor` is the factor of a GradScaler that it still carries."""
        if weight.is_leaf and weight.grad is not None and not is_pending(weight.grad) and why_unread(local(weight.grad)) is None:
            numbers, at = self._on(weight), WEIGHT.index("grad_sq")
            put_squares(elements(self.part(local(weight.grad)), self.limit, self.turn), None, numbers, at)
            if divisor is not None:
                numbers[at] /= divisor.to(numbers) ** 2
            _inf_for_nan_(numbers[at : at + 1])

    def after_step(self, weight: Tensor) -> None:
        """Measure the weight as it was before the optimizer's step, and its change. No change is measured of a weight that does not learn."""
        if self.n:
            return
        now = elements(self.part(local(weight)), self.limit, self.turn)
        self.n = now.shape[0]
        known = self.before is not None and weight.requires_grad
        first, second = (self.before, now) if self.before is not None and known else (now, None)
        # put_squares writes the second sum behind the first, and "change_sq" follows "weight_sq".
        numbers = self._on(weight)
        put_squares(first, second, numbers, WEIGHT.index("weight_sq"))
        _inf_for_nan_(numbers[: 1 if second is None else 2])
        if self.turn < _EARLY:
            numbers[WEIGHT.index("unevenness")] = unevenness(first)
        if second is not None:
            put_learned(first, second, self.decay, dict(zip(WEIGHT, numbers.split(1), strict=True)))

    def observe_spectral(self, weight: Tensor, start: Tensor | None) -> Tensor | None:
        """Measure the largest singular value.

        Args:
            start: what the observation before returned.

        Returns:
            The vector that the next observation begins with; None where the weight is no matrix, as that of a convolution over several positions.
        """
        matrix = _widened(self.part(weight).detach())
        if self.numbers is None or not matrix.numel() or matrix.ndim < 2 or matrix.numel() != matrix.shape[0] * matrix.shape[1]:
            return None
        value, vector = largest_singular(matrix, start)
        at = WEIGHT.index("spectral")
        self.numbers[at] = value
        _inf_for_nan_(self.numbers[at : at + 1])
        return vector

    def part(self, weight: Tensor) -> Tensor:
        """The part of a weight, or of its gradient, that is measured."""
        return weight if self.rows is None else weight.narrow(*self.rows)

    @property
    def described(self) -> str:
        """The type of the module and its widths, such as `Linear 64 -> 10`. Attributes that the module does not keep itself may run code of the
        user's, and are not read."""
        module = self.module()
        kept = vars(module) if module is not None else {}
        # torch.nn.utils.parametrize and fully_shard replace the type by one of their own, whose name begins with theirs.
        name = type(module).__name__.removeprefix("FSDP").removeprefix("Parametrized") if module is not None else ""
        known = (
            f" {kept[start]} -> {kept[end]}"
            for start, end in _WIDTHS
            if isinstance(kept.get(start), Integral) and isinstance(kept.get(end), Integral)
        )
        return name + next(known, "")

    @property
    def features(self) -> int:
        """How many features its input has; 0 where the input is not measured."""
        module = self.module()
        if self.parameter == "weight" and isinstance(module, Convolution):
            return int(module.in_channels)
        if self.parameter == "weight" and module is not None and is_layer(module):
            return fan_in(module)
        return self.fan_in if self.parameter in ENTERED else 0

    def _on(self, weight: Tensor) -> Tensor:
        """The tensor `numbers`, which is made at the first use, on the device of the weight."""
        if self.numbers is None:
            self.numbers = torch.full((len(WEIGHT),), math.nan, dtype=accumulator(weight.device), device=weight.device)
        return self.numbers
