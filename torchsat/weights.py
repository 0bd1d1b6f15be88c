"""The layers that feed a site: gain, gradient norm, update ratio, and what their input looks like.

A layer is an `nn.Linear`, a convolution, or one of the matrices of a recurrent layer. Its input is measured in a forward pre-hook, per feature,
in three sums that merge (samples, x, x^2); its weight is measured just before the optimizer's step, as it made z. The weight's change is
taken on a sample, so that no copy of the model is made.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from torchsat.record import Weight
from torchsat.statistics import Sample, accumulator

COLUMNS = ("numel", "weight_sq", "grad_sq", "change_sq", "before_sq", "input_n", "input_sq", "input_offset_sq")
_AT = {name: index for index, name in enumerate(COLUMNS)}


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd))


def why_not(module: nn.Module) -> str | None:
    """Why the weight of this layer cannot be measured, or None."""
    if is_parametrized(module, "weight"):
        return "its weight is computed from others, and reading it can change them"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or is_lazy(weight):
        return "its weight does not exist yet"
    if type(weight) not in (Tensor, nn.Parameter):
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


def input_sums(x: Tensor, axis: int, sample: Sample) -> Tensor:
    """[samples, sum x, sum x^2] of each feature of one input, features along `axis`: [3, features]."""
    taken = sample.take(x.detach())
    dtype = accumulator(x.device)
    finite = torch.isfinite(taken)
    values = torch.where(finite, taken.to(dtype), torch.zeros((), dtype=dtype, device=x.device))
    sums = torch.zeros(3, x.shape[axis], dtype=dtype, device=x.device)
    return sums.index_add_(1, sample.units(axis, x.device), torch.stack([finite.to(dtype), values, values * values]))


class Layer:
    """What one layer shows during one observation, on its device."""

    def __init__(self, name: str, module: nn.Module, parameter: str = "weight") -> None:
        self.name = name
        self.module = weakref.ref(module)
        self.parameter = parameter
        self.fan_in = fan_in(module) if parameter == "weight" else int(getattr(module, parameter).shape[1])
        self.sample: Sample | None = None
        self.inputs: Tensor | None = None
        """`input_sums` over the passes of the observation."""
        self.weight: Tensor | None = None
        self.columns: dict[str, Tensor] = {}

    def before_step(self, weight: Tensor, limit: int | None, turn: int) -> None:
        """Keep a sample of the weight."""
        self._measure(weight)
        self.sample = Sample.of(weight, limit, turn)
        self.weight = self.sample.take(weight.detach()).clone()

    def observe_grad(self, weight: Tensor, divisor: Tensor | None) -> None:
        """Measure the gradient; `divisor` is the loss scale it still carries."""
        if weight.is_leaf and weight.grad is not None and not weight.grad.is_sparse:
            square = _square_sum(weight.grad)
            self.columns["grad_sq"] = square if divisor is None else square / divisor.to(square) ** 2

    def _measure(self, weight: Tensor) -> None:
        self.columns["weight_sq"] = _square_sum(weight)
        self.columns["numel"] = torch.full_like(self.columns["weight_sq"], weight.numel())

    def after_step(self, weight: Tensor) -> None:
        if "weight_sq" not in self.columns:
            self._measure(weight)
        if self.weight is None or self.sample is None or not weight.requires_grad:
            return
        dtype = accumulator(weight.device)
        before = self.weight.to(dtype)
        change = self.sample.take(weight.detach()).to(dtype) - before
        self.columns["change_sq"], self.columns["before_sq"] = change.dot(change), before.dot(before)

    def row(self) -> Tensor | None:
        """COLUMNS as one vector, NaN where unknown; None where nothing was measured."""
        if "weight_sq" not in self.columns:
            return None
        like = self.columns["weight_sq"]
        if self.inputs is not None:
            n, first, second = self.inputs.to(like.device)
            self.columns["input_n"] = n.sum()
            self.columns["input_sq"] = second.sum() / n.sum()
            # E_j[mean_j]^2 without the 1/n bias of a squared sample mean: pairs of distinct samples only, over the features that have any.
            pairs = n * (n - 1)
            squares = torch.where(pairs > 0, (first * first - second) / pairs.clamp(min=1), torch.zeros_like(pairs))
            self.columns["input_offset_sq"] = squares.sum() / (pairs > 0).sum()
        unknown = torch.full_like(like, math.nan)
        return torch.stack([self.columns.get(name, unknown).to(like) for name in COLUMNS])


def _square_sum(tensor: Tensor) -> Tensor:
    # In float64: the square of a gradient that still carries a GradScaler's factor overflows float32.
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=accumulator(tensor.device))
    return norm.square()


def to_weight(facts: dict[str, Any], row: Sequence[float]) -> Weight:
    """The value of one row, on the host. `facts` are the WEIGHT_FACTS."""

    def get(name: str) -> float | None:
        value = float(row[_AT[name]])
        return value if math.isfinite(value) else None

    def ratio(above: str, below: str) -> float | None:
        numerator, denominator = get(above), get(below)
        return None if numerator is None or not denominator else max(0.0, numerator) / denominator

    def root(value: float | None) -> float | None:
        return None if value is None else math.sqrt(max(0.0, value))

    offset = ratio("input_offset_sq", "input_sq")
    mean_square = ratio("weight_sq", "numel")
    return Weight(
        **facts,
        gain=root(None if mean_square is None else mean_square * facts["fan_in"]),
        norm=root(get("weight_sq")),
        grad_norm=root(get("grad_sq")),
        update_ratio=root(ratio("change_sq", "before_sq")),
        input_rms=root(get("input_sq")),
        input_centred_share=None if offset is None else max(0.0, 1 - offset),
        input_n=round(get("input_n") or 0),
    )
