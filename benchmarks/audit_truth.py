"""What a record, a head and a weight must say, computed without torchsat: in float64, over all elements, from the definitions in the documentation.

`Tape` runs a copy of the model that nobody watches and keeps z, a and their gradients of every activation as the model computes them. The functions
turn these tensors into the values that the fields of `Record`, `Head` and `Weight` must have. The derivative f' comes from autograd in float64, its
peak and its tails from a search on a fine grid. Nothing of torchsat is used but the names of the fields and the edges of its histogram.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchsat.record import HISTOGRAM_EDGES

Function = Callable[[Tensor], Tensor]
Array = NDArray[np.float64]
_GRID = 40.0
"""The grid on which peak and tails are searched reaches from minus this number to this number."""
_FINE = 1_600_001
EDGE = 5e-5
"""An element nearer than this to the edge of a tail, which lies between two points of the grid, may be counted on either side."""


@dataclass(frozen=True)
class Figure:
    """The value that a field must have, and by how much rounding may move it."""

    value: Any
    within: float = 0.0


@dataclass(eq=False)
class Call:
    """One call of an activation module on the tape."""

    z: Tensor
    a: Tensor | None = None
    grad_z: Tensor | None = None
    grad_a: Tensor | None = None


@dataclass(eq=False)
class Tape:
    """The calls of the modules of a model, in the order in which they happen. `close` takes its hooks off."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """The inputs of the layers with a weight."""
    handles: list[Any] = field(default_factory=list)
    counts: bool = True
    """Whether the passes that run now belong to the training. Those that do not are not kept."""

    def record(self, model: nn.Module, activations: Sequence[str], layers: Sequence[str]) -> None:
        """Keep what passes through these modules from now on. A forward that runs inside a backward is a recompute, and is not kept again."""
        for name in activations:
            module = model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(functools.partial(self._before, name)))
            self.handles.append(module.register_forward_hook(functools.partial(self._after, name)))
        for name in layers:
            self.handles.append(model.get_submodule(name).register_forward_pre_hook(functools.partial(self._fed, name)))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.counts:
            return
        z = args[0]
        call = Call(z.detach().clone())
        if z.requires_grad:
            z.register_hook(lambda grad: setattr(call, "grad_z", grad.detach().clone()))
        self.calls.setdefault(name, []).append(call)

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], a: Tensor) -> None:
        if not self.counts:
            return
        call = self.calls[name][-1]
        call.a = a.detach().clone()
        if a.requires_grad:
            a.register_hook(lambda grad: setattr(call, "grad_a", grad.detach().clone()))

    def _fed(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.counts:
            self.inputs.setdefault(name, []).append(args[0].detach().clone())


def flat(tensors: Sequence[Tensor]) -> Array:
    """All elements of these tensors, in float64."""
    found: Array = np.concatenate([each.detach().double().reshape(-1).numpy() for each in tensors])
    return found


def slope(function: Function, z: Array) -> Array:
    """|f'(z)| by autograd in float64."""
    given = torch.from_numpy(z).requires_grad_()
    (found,) = torch.autograd.grad(function(given).sum(), given)
    size: Array = np.abs(found.numpy())
    return size


@dataclass(frozen=True)
class Shape:
    """The peak of |f'|, and the edges of its tails."""

    peak: float
    low: float | None
    high: float | None


def shape_of(function: Function, epsilon: float) -> Shape:
    """Peak and tails of a function, from a fine grid. A tail must reach to the end of the grid."""
    grid = np.linspace(-_GRID, _GRID, _FINE) + 1e-9
    magnitude = slope(function, grid)
    top = grid[int(magnitude.argmax())]
    # The largest value may be a limit that is reached only beside a kink, so a second grid looks closer.
    peak = float(slope(function, np.linspace(top - 1e-4, top + 1e-4, 200_001) + 1e-13).max())
    above = np.flatnonzero(magnitude > epsilon * peak)
    first, last = int(above[0]), int(above[-1])
    # The edge lies between the last point inside the tail and the first outside.
    low = None if first == 0 else float(grid[first] + grid[first - 1]) / 2
    high = None if last == len(grid) - 1 else float(grid[last] + grid[last + 1]) / 2
    return Shape(peak, low, high)


def normal(function: Function, shape: Shape) -> dict[str, Figure]:
    """The fields that say what z ~ N(0, 1) would give, by the trapezoid rule."""
    grid = np.linspace(-12, 12, 2_400_001) + 1e-9
    density = np.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    tail = [0.0 if edge is None else 0.5 * math.erfc(sign * edge / math.sqrt(2)) for edge, sign in ((shape.low, -1), (shape.high, 1))]
    values = density * slope(function, grid)
    mean = float((values[1:] + values[:-1]).sum()) / 2 * float(grid[1] - grid[0]) / shape.peak
    return {"normal_low": Figure(tail[0], EDGE), "normal_high": Figure(tail[1], EDGE), "normal_derivative": Figure(mean, 1e-5)}


def record(function: Function, calls: Sequence[Call], shape: Shape, *, sigmoid: bool = False, scale: float = 1.0) -> dict[str, Figure]:
    """The numbers of a record of these calls.

    Args:
        function: f, for float64.
        sigmoid: whether the activation is the sigmoid, which alone has shares of closed and open gates.
        scale: the factor that a GradScaler multiplied the loss with.
    """
    z, a = flat([call.z for call in calls]), flat([call.a for call in calls if call.a is not None])
    finite = np.isfinite(z) & np.isfinite(a)
    elements, z, a = len(z), z[finite], a[finite]
    n, derivative = len(z), slope(function, z)
    near = sum(int((np.abs(z - edge) < EDGE).sum()) for edge in (shape.low, shape.high) if edge is not None)
    low = 0.0 if shape.low is None else float((z <= shape.low).mean())
    high = 0.0 if shape.high is None else float((z >= shape.high).mean())
    bins, unsure = _histogram(derivative / shape.peak)
    z_rms, a_rms = _rms(z), _rms(a)
    figures = {
        "n": Figure(n),
        "elements": Figure(elements),
        "nonfinite": Figure(elements - n),
        "low": Figure(low, near / n),
        "high": Figure(high, near / n),
        "saturated": Figure(low + high, near / n),
        "derivative": _close(derivative.mean(), shape.peak),
        "derivative_rms": _close(_rms(derivative), shape.peak),
        "peak": Figure(shape.peak, 1e-6 * shape.peak),
        "relative_derivative": Figure(derivative.mean() / shape.peak, 2e-6),
        "z_mean": _close(z.mean(), z_rms),
        "z_std": _close(z.std(), z_rms),
        "z_rms": _close(z_rms, z_rms),
        "z_min": Figure(float(z.min())),
        "z_max": Figure(float(z.max())),
        "a_mean": _close(a.mean(), a_rms),
        "a_std": _close(a.std(), a_rms),
        "a_min": Figure(float(a.min())),
        "a_max": Figure(float(a.max())),
        "zeros": Figure(float((a == 0).mean())),
        "gate_left": Figure(float((a < 0.1).mean()) if sigmoid else None),
        "gate_right": Figure(float((a > 0.9).mean()) if sigmoid else None),
        "histogram": Figure(tuple(bins / n), unsure / n),
    }
    return {**figures, **_gradients(calls, scale)}


def _gradients(calls: Sequence[Call], scale: float) -> dict[str, Figure]:
    known = [call for call in calls if call.grad_a is not None and call.grad_z is not None]
    if not known:
        return {name: Figure(None) for name in ("grad_a_rms", "grad_z_rms", "attenuation")} | {"grad_n": Figure(0), "grad_nonfinite": Figure(0)}
    grad_a = flat([call.grad_a for call in known if call.grad_a is not None])
    grad_z = flat([call.grad_z for call in known if call.grad_z is not None])
    finite = np.isfinite(grad_a) & np.isfinite(grad_z)
    both = _rms(grad_a[finite]) / scale, _rms(grad_z[finite]) / scale
    return {
        "grad_n": Figure(int(finite.sum())),
        "grad_nonfinite": Figure(int((~finite).sum())),
        "grad_a_rms": _close(both[0], both[0]),
        "grad_z_rms": _close(both[1], both[1]),
        "attenuation": _close(both[1] / both[0], both[1] / both[0]) if both[0] else Figure(None),
    }


def stuck(calls: Sequence[Call], axis: int, shape: Shape, least: float = 0.99) -> float:
    """The share of units (along an axis of z) that lie in a tail in at least this share of all samples."""
    parts = [call.z.double().movedim(axis, 0).flatten(1) for call in calls]
    z = torch.cat(parts, 1)
    inside = torch.zeros_like(z, dtype=torch.bool)
    if shape.low is not None:
        inside |= z <= shape.low
    if shape.high is not None:
        inside |= z >= shape.high
    return float((inside.double().mean(1) >= least).double().mean())


def _histogram(relative: Array) -> tuple[Array, int]:
    """How many elements lie in each bin, and how many lie so near to an edge that rounding decides their bin."""
    edges = np.array(HISTOGRAM_EDGES)
    at = np.clip(np.searchsorted(edges, relative, side="right") - 1, 0, len(edges) - 2)
    unsure = sum(int((np.abs(relative - edge) <= 1e-5 * edge).sum()) for edge in edges[1:-1])
    return np.bincount(at, minlength=len(edges) - 1).astype(np.float64), unsure


def _demand(rows: list[tuple[float, float, bool]]) -> dict[str, Figure]:
    """`blocked`, `trapped` and `leaving` of rows, of which each has a demand, a gap, and is one-hot or not."""
    whole = sum(demand for demand, _, _ in rows)
    blocked, trapped = sum(demand for demand, _, one_hot in rows if one_hot), sum(gap for _, gap, one_hot in rows if one_hot)
    leaving = sum(one_hot and gap > demand / 2 for demand, gap, one_hot in rows)
    return {"blocked": Figure(blocked / whole, 1e-5), "trapped": Figure(trapped / whole, 1e-5), "leaving": Figure(leaving / len(rows), 1e-9)}


def softmax(logits: Tensor, visible: Tensor, grad: Tensor) -> tuple[dict[str, Figure], tuple[dict[str, Figure], ...]]:
    """The numbers of a softmax, and those of each of its heads.

    Args:
        logits: [batch, heads, queries, keys] in float64, with all masks added.
        visible: booleans of the same shape, which keys a query sees. A row with fewer than two visible keys does not count.
        grad: the gradient of the loss by the probabilities.
    """
    heads, demands = [], list[tuple[float, float, bool]]()
    rows: list[dict[str, list[float]]] = []
    for head in range(logits.shape[1]):
        kept: dict[str, list[float]] = {name: [] for name in ("entropy", "jacobian", "variance", "log_keys", "max", "first", "log_z", "log_z_sq")}
        asked = list[tuple[float, float, bool]]()
        for z, seen, slope in zip(*(each[:, head].flatten(0, 1) for each in (logits, visible, grad)), strict=True):
            values, g = z[seen].numpy(), slope[seen].numpy()
            if len(values) < 2:
                continue
            p = np.exp(values - values.max())
            p /= p.sum()
            entropy = -float((p * np.log(np.where(p > 0, p, 1))).sum())
            kept["entropy"].append(entropy / math.log(len(values)))
            kept["jacobian"].append(1 - float((p * p).sum()))
            kept["variance"].append(float(values.var()))
            kept["log_keys"].append(math.log(len(values)))
            kept["max"].append(float(values.max()))
            log_z = math.log(np.exp(values).sum())
            kept["first"].append(math.exp(float(values[0]) - log_z))
            kept["log_z"].append(log_z)
            kept["log_z_sq"].append(log_z * log_z)
            is_one_hot = 1 - float((p * p).sum()) <= 0.05 * (1 - 1 / len(p))
            asked.append((float(g.max() - g.min()), float(p.dot(g) - g.min()), is_one_hot))
        rows.append(kept)
        demands += asked
        heads.append(
            {
                "rows": Figure(len(kept["entropy"])),
                "entropy": Figure(float(np.mean(kept["entropy"])), 1e-5),
                "jacobian": Figure(float(np.mean(kept["jacobian"])), 1e-5),
                "logit_std": Figure(math.sqrt(float(np.mean(kept["variance"]))), 1e-4 * math.sqrt(float(np.mean(kept["variance"])))),
                "logit_max": Figure(max(kept["max"]), 1e-4 * abs(max(kept["max"]))),
                **_totals(kept["first"], kept["log_z"], kept["log_z_sq"]),
                **_demand(asked),
            }
        )

    def overall(name: str) -> float:
        return float(np.mean([value for kept in rows for value in kept[name]]))

    return {
        "entropy": Figure(overall("entropy"), 1e-5),
        "jacobian": Figure(overall("jacobian"), 1e-5),
        "logit_std": Figure(math.sqrt(overall("variance")), 1e-4 * math.sqrt(overall("variance"))),
        "log_keys": Figure(overall("log_keys"), 1e-6),
        "entropy_min": Figure(min(head["entropy"].value for head in heads), 1e-5),
        **_totals(*([value for kept in rows for value in kept[name]] for name in ("first", "log_z", "log_z_sq"))),
        **_demand(demands),
    }, tuple(heads)


def _totals(first: Sequence[float], log_z: Sequence[float], squares: Sequence[float]) -> dict[str, Figure]:
    """What is said of the first keys of rows, and of ln Z, whose square is what a z-loss punishes."""
    root = math.sqrt(float(np.mean(squares)))
    return {
        "first_key": Figure(float(np.mean(first)), 1e-5),
        "log_z": Figure(float(np.mean(log_z)), 1e-5 * root),
        "log_z_rms": Figure(root, 1e-5 * root),
    }


def dormant(calls: Sequence[Call], axis: int) -> Figure:
    """The share of units (along an axis of a) whose mean |a| is at most 0.025 of the mean over the units; None of fewer than 200 samples of each."""
    a = features([call.a for call in calls if call.a is not None], axis)
    if len(a) < 200:
        return Figure(None)
    scores = np.abs(a).mean(0)
    limit = 0.025 * float(scores.mean())
    return Figure(float((scores <= limit).mean()), float((np.abs(scores - limit) < 1e-5 * limit).mean()))


def ranks(calls: Sequence[Call], axis: int) -> dict[str, Figure]:
    """The ranks of the features (along an axis of a) of all samples, from their singular values."""
    a = features([call.a for call in calls if call.a is not None], axis)
    values, limit = np.asarray(torch.linalg.svdvals(torch.from_numpy(a))), min(a.shape)
    sums, entropy = np.cumsum(values) / values.sum(), 0.0
    for share in values / values.sum():
        entropy -= share * math.log(share) if share > 0 else 0.0
    # So many values come so near to 99 % that rounding decides which of them is the last.
    unsure = int((np.abs(sums - 0.99) < 1e-7).sum())
    return {
        "effective_rank": Figure(math.exp(entropy) / limit, 1e-5),
        "srank": Figure((int((sums < 0.99).sum()) + 1) / limit, unsure / limit + 1e-12),
        "rank_limit": Figure(limit),
    }


def features(tensors: Sequence[Tensor], axis: int) -> Array:
    """[samples, features] of tensors with the features along this axis, in float64."""
    found: Array = torch.cat([each.detach().double().movedim(axis, -1).flatten(0, -2) for each in tensors]).numpy()
    return found


def spectral(w: Tensor, within: float = 1e-5) -> Figure:
    """The largest singular value of a matrix; `within` is relative."""
    value = float(torch.linalg.matrix_norm(w.double(), 2))
    return Figure(value, within * value)


def weight(
    before: Tensor, after: Tensor, grad: Tensor | None, fan_in: int, inputs: Sequence[Tensor], axis: int, *, rate: float | None, decay: float = 0.0
) -> dict[str, Figure]:
    """The numbers of a layer.

    Args:
        before, after: its weight before and after the optimizer's step.
        grad: its gradient as the optimizer received it.
        inputs: its inputs, with the features along `axis`.
        rate: the learning rate.
        decay: the weight decay of an optimizer that multiplies weights by 1 - rate x decay.
    """
    w, change = before.double(), after.double() - before.double()
    norm = float(w.norm())
    features = torch.cat([x.double().movedim(axis, 0).flatten(1) for x in inputs], 1) if inputs else None
    figures = {
        "learning_rate": Figure(rate),
        "n": Figure(w.numel()),
        "gain": _close(math.sqrt(float(w.square().mean()) * fan_in), 1),
        "norm": _close(norm, norm),
        "grad_norm": Figure(None) if grad is None else _close(float(grad.double().norm()), float(grad.double().norm())),
        "fan_in": Figure(fan_in),
        "unevenness": _unevenness(w),
    }
    if grad is not None:
        learned = float((change + (rate or 0.0) * decay * w).norm()) / norm
        figures["update_ratio"] = _close(float(change.norm()) / norm, float(change.norm()) / norm)
        figures["learned_ratio"] = _close(learned, float(change.norm()) / norm)
    if features is not None:
        square, samples = float(features.square().mean()), features.shape[1]
        # The mean over pairs of distinct samples: the square of a sample mean would hold a part of the variance.
        pairs = (features.sum(1).square() - features.square().sum(1)) / max(1, samples * (samples - 1))
        offset = max(0.0, float(pairs.mean()))
        figures |= {
            "input_rms": _close(math.sqrt(square), math.sqrt(square)),
            "input_centred_share": Figure(max(0.0, 1 - offset / square), 1e-5),
            "input_n": Figure(features.numel()),
        }
    return figures


def _unevenness(w: Tensor) -> Figure:
    """Fisher's analysis of variance of |w| over runs of 16 neighbours, in standard errors; None of a weight that has fewer than 32 of these."""
    runs = w.abs().flatten()[: w.numel() // 16 * 16].reshape(-1, 16)
    if len(runs) < 32:
        return Figure(None)
    means = runs.mean(1)
    between = 16 * float((means - means.mean()).square().sum()) / (len(runs) - 1)
    within = float((runs - means[:, None]).square().sum()) / (15 * len(runs))
    return _close((between / within - 1) * math.sqrt(len(runs) / 2), max(1.0, between / within) * math.sqrt(len(runs) / 2))


def agrees(found: Any, figure: Figure) -> bool:
    """Whether a field has the value that it must have."""
    if found is None or figure.value is None:
        return found is figure.value
    if isinstance(figure.value, tuple) and all(isinstance(each, float) for each in figure.value):
        return (
            len(found) == len(figure.value)
            and sum(abs(one - other) for one, other in zip(found, figure.value, strict=True)) <= 2 * figure.within + 1e-12
        )
    if isinstance(figure.value, float) and math.isinf(figure.value):
        return bool(found == figure.value)
    if isinstance(figure.value, (int, float)) and not isinstance(figure.value, bool):
        return bool(abs(found - figure.value) <= figure.within * (1 + 1e-9))
    return bool(found == figure.value)


def _rms(values: Array) -> float:
    return math.sqrt(float(np.square(values).mean()))


def _close(value: float, size: float) -> Figure:
    """A figure that rounding in float32 may move by a few parts in a million of `size`."""
    return Figure(float(value), 4e-6 * abs(size) + 1e-300)


def merged(*parts: Mapping[str, Figure]) -> dict[str, Figure]:
    """The figures of several functions together."""
    return {name: figure for part in parts for name, figure in part.items()}
