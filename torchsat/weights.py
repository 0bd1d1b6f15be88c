"""The layers that feed a site: gain, gradient norm, update ratio, and what their input looks like.

A layer is an `nn.Linear`, a convolution, or one of the matrices of a recurrent layer. Its input is measured in a forward pre-hook, per feature,
in three sums that merge (samples, x, x^2); its weight is measured just before the optimizer's step, as it made z. Weight, gradient and change
are read at the same sample of elements, so that no copy of the model is made: short runs that lie next to each other in memory, since single
elements far apart would cost as much as all of them.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from torchsat.record import Weight
from torchsat.statistics import Sample, Units, accumulator, observe_features, put_squares, summarise_features

COLUMNS = ("weight_sq", "change_sq", "grad_sq", "input_n", "input_sq", "input_offset_sq")
_AT = {name: index for index, name in enumerate(COLUMNS)}

_RUN = 16
"""Elements that lie in one line of a processor's cache, in float32."""
_LESS = 4
"""By this much fewer elements are read of a weight or an input than of a site: what is asked of them are means, not shares of units."""

_PER_FEATURE = 8
"""Elements of an input that are read of each feature, at least, as far as the limit of a site allows."""


@dataclass(frozen=True)
class Placement:
    """How the ranks hold one tensor of which each has a part."""

    counts: bool
    """False where another rank holds the very same part."""
    first: tuple[int, ...]
    """Where this rank's part begins, along each axis."""
    is_first: bool
    """Whether this rank is the first of all that have a part."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread over ranks; any other one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_freed(weight: Tensor) -> bool:
    """Whether there is nothing to read: some that shard or offload free the memory of a weight between its uses."""
    part = local(weight)
    return part.numel() > 0 and part.layout is torch.strided and part.untyped_storage().nbytes() == 0


def is_flattened(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel has made flat parameters of its weights; fully_shard never does."""
    return any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters())


def placement(tensor: Tensor) -> Placement | None:
    """Of a tensor that is spread over ranks; None: it is not, or it is a sum that has not been taken."""
    if not isinstance(tensor, DTensor):
        return None
    at = tensor.device_mesh.get_coordinate()
    if at is None or is_pending(tensor):
        return None
    counts = all(where == 0 for where, each in zip(at, tensor.placements, strict=True) if each.is_replicate())
    _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Placement(counts, tuple(first), not any(at))


def is_pending(tensor: Tensor) -> bool:
    """Whether the tensor is a sum over ranks that has not been taken: no rank has an element of it."""
    return isinstance(tensor, DTensor) and any(each.is_partial() for each in tensor.placements)


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd))


def why_unmeasured(module: nn.Module) -> str | None:
    """Why the weight of this layer cannot be measured, or None."""
    if is_parametrized(module, "weight"):
        return "its weight is computed from others, and reading it can change them"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return "its weight does not exist yet"
    if type(weight) not in (Tensor, nn.Parameter) and not isinstance(weight, DTensor):
        return f"its weight is a {type(weight).__name__}"
    return None


def fan_in(module: nn.Module) -> int:
    """Input elements that one output element is a sum of."""
    if isinstance(module, nn.Linear):
        return module.in_features
    assert isinstance(module, _ConvNd)
    taps = module.in_channels // module.groups * math.prod(module.kernel_size)
    return max(1, taps // math.prod(module.stride)) if isinstance(module, _ConvTransposeNd) else taps


def width(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else int(module.out_channels)  # type: ignore[arg-type]


def feature_axis(module: nn.Module, ndim: int) -> int:
    """The axis of features in this layer's input and output."""
    return ndim - 1 if isinstance(module, nn.Linear) else ndim - 1 - len(module.kernel_size)  # type: ignore[arg-type]


def input_sums(x: Tensor, axis: int, limit: int | None, turn: int, sums: Tensor | None = None) -> Tensor:
    """[samples, sum x, sum x^2] of each feature of one input, features along `axis`: [3, features], added in place to the sums given."""
    sample = Sample.of(x, None if limit is None else min(limit, max(1, limit // _LESS, _PER_FEATURE * x.shape[axis])), turn)
    return observe_features(sample.take(x.detach()), Units(sample, axis), sums)


def elements(weight: Tensor, limit: int | None, turn: int) -> Tensor:
    """A vector of about `limit` / 4 elements of a weight (None: all), in runs spread evenly over it; the same ones for the same turn."""
    start, step, runs = _runs(tuple(weight.shape), limit, turn)
    flat = weight.detach() if weight.is_contiguous() else Sample.of(weight, None, 0).take(weight.detach())
    if step == 1:
        return flat.reshape(-1)
    return flat.as_strided((runs, _RUN), (_RUN * step, 1), flat.storage_offset() + _RUN * start).reshape(-1)


@functools.lru_cache(maxsize=4096)
def _runs(shape: tuple[int, ...], limit: int | None, turn: int) -> tuple[int, int, int]:
    """The first run, every how manieth is taken, and how many these are."""
    whole = math.prod(shape) // _RUN
    wanted = max(1, (limit or 0) // _LESS // _RUN)
    if limit is None or math.prod(shape) <= max(limit // _LESS, 2 * _RUN):
        return 0, 1, 0
    step = -(-whole // wanted)
    while step > 1 and any(math.gcd(step, size) != 1 for size in (whole, *shape)):
        step += 1
    start = turn * 7919 % step
    return start, step, -(-(whole - start) // step)


class Layer:
    """What one layer shows during one observation, on its device.

    Args:
        limit: the most elements read of a site; None: all.
        turn: which observation this is.
    """

    def __init__(self, name: str, module: nn.Module, parameter: str = "weight", limit: int | None = None, turn: int = 0) -> None:
        self.name = name
        self.module = weakref.ref(module)
        self.parameter = parameter
        self.fan_in = fan_in(module) if parameter == "weight" else int(getattr(module, parameter).shape[1])
        self.limit, self.turn = limit, turn
        self.inputs: Tensor | None = None
        """`input_sums` over the passes of the observation."""
        self.input_counts: bool | None = None
        """Whether this rank is to count its input where others hold the same one; None: its input does not tell."""
        self.first = 0
        """Where the features of its input begin among those of all ranks."""
        self.input_elements = 0
        """Of all inputs, read or not."""
        self.before: Tensor | None = None
        """The elements of the weight before the step."""
        self.n = 0
        """Elements of the weight that were read."""
        self.numbers: Tensor | None = None
        """COLUMNS, NaN where unknown."""

    def before_step(self, weight: Tensor) -> None:
        """Keep the elements of the weight."""
        weight = local(weight)
        taken = elements(weight, self.limit, self.turn)
        self.before = taken.clone() if taken.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() else taken

    def observe_grad(self, weight: Tensor, divisor: Tensor | None) -> None:
        """Measure the gradient; `divisor` is the loss scale it still carries."""
        if weight.is_leaf and weight.grad is not None and not weight.grad.is_sparse and not is_pending(weight.grad):
            numbers = self._on(weight)
            put_squares(elements(local(weight.grad), self.limit, self.turn), None, numbers, _AT["grad_sq"])
            if divisor is not None:
                numbers[_AT["grad_sq"]] /= divisor.to(numbers) ** 2

    def after_step(self, weight: Tensor) -> None:
        if self.n:
            return
        now = elements(local(weight), self.limit, self.turn)
        self.n = now.shape[0]
        known = self.before is not None and weight.requires_grad
        first, second = (self.before, now) if self.before is not None and known else (now, None)
        put_squares(first, second, self._on(weight), _AT["weight_sq"])

    @property
    def features(self) -> int:
        """Of its input; 0 where that is not measured."""
        module = self.module()
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, _ConvNd):
            return module.in_channels
        measured = self.parameter in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
        return self.fan_in if measured else 0

    def row(self) -> Tensor | None:
        """COLUMNS as one vector, NaN where unknown; None where nothing was measured."""
        if self.numbers is not None and self.inputs is not None:
            self.numbers[_AT["input_n"] :] = summarise_features(self.inputs.to(self.numbers.device))
        return self.numbers if self.n else None

    def _on(self, weight: Tensor) -> Tensor:
        if self.numbers is None:
            self.numbers = torch.full((len(COLUMNS),), math.nan, dtype=accumulator(weight.device), device=weight.device)
        return self.numbers


def to_weight(facts: dict[str, Any], row: Sequence[float]) -> Weight:
    """The value of one row, on the host. `facts` are the WEIGHT_FACTS, and how many elements the weight has (numel) and were read (n)."""
    facts = dict(facts)

    def get(name: str) -> float | None:
        value = float(row[_AT[name]])
        return value if math.isfinite(value) else None

    def ratio(above: str, below: str) -> float | None:
        numerator, denominator = get(above), get(below)
        return None if numerator is None or not denominator else max(0.0, numerator) / denominator

    def root(value: float | None) -> float | None:
        return None if value is None else math.sqrt(max(0.0, value))

    offset = ratio("input_offset_sq", "input_sq")
    numel, n = facts.pop("numel"), facts["n"]

    def norm(name: str) -> float | None:
        square = get(name)
        return None if square is None or not n else math.sqrt(square / n * numel)

    return Weight(
        **facts,
        gain=None if (whole := norm("weight_sq")) is None else whole * math.sqrt(facts["fan_in"] / numel),
        norm=whole,
        grad_norm=norm("grad_sq"),
        update_ratio=root(ratio("change_sq", "weight_sq")),
        input_rms=root(get("input_sq")),
        input_centred_share=None if offset is None else max(0.0, 1 - offset),
        input_n=round(get("input_n") or 0),
    )
