"""Follows the outputs of one layer along the autograd graph to z: along which axis of z they lie, and which of them arrive there.

The nodes between are replayed on a tensor without memory (of the device "meta") that has the shape of the layer's output. Its only stride that is not
0 is 1, along the axis of the features, so that the stride of an axis says how the index of the feature changes along it. Views, transposes and slices
are applied as they stand in the graph. A node that cannot be followed, such as a flatten that merges features with pixels, loses the axis. What was
known before it of the range of features that arrive stays true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchsat import internals

Step = tuple[Node, int]
"""A node on the way, and which of its outputs the way goes on from."""

_ELEMENTWISE = re.compile(
    r"(Add|Sub|Rsub|Mul|Div|Neg|Pow|Exp|Expm1|Log|Log1P|Sqrt|Rsqrt|Reciprocal|Abs|Sign|Clamp\w*|Where|MaskedFill|MaskedScatter|ToCopy|Clone|Alias|Copy|"
    r"Contiguous|\w*Dropout|Native(Layer|Batch|Group)Norm|CudnnBatchNorm|MiopenBatchNorm|FusedRmsNorm|Addcmul|Addcdiv|Lerp|Maximum|Minimum|"
    r"Cumsum|Flip|Roll|IndexAdd|IndexPut|IndexFill|IndexSelect|Index|Scatter\w*|SliceScatter|SelectScatter|"
    r"\w*Pool\w*|Upsample\w*|\w*Pad\w*|_?(To|From)TorchTensor|Redistribute|_?AllGather\w*|_?ReduceScatter\w*|_?AllReduce\w*|WaitTensor)"
)
"""Nodes that leave each feature at its place along the axis of features. They may change the number of elements along the other axes."""
_REDUCTION = re.compile(r"(Mean|Sum|Amax|Amin|Max|Min|Logsumexp|Std|Var|Prod|Median)")


@dataclass(frozen=True)
class Landing:
    """Where the outputs of a layer arrive."""

    axis: int | None
    """The axis of z along which they lie; None where it cannot be told."""
    first: int
    """The index of the first of those that may arrive."""
    count: int
    """How many these are."""


def follow(path: Sequence[Step], shape: tuple[int, ...], axis: int) -> Landing:
    """Follow the features of a tensor of this shape, which lie along `axis`, through the nodes of a path, in the order in which they ran."""
    width = shape[axis]
    nothing = Landing(None, 0, width)
    if width < 2 or 0 in shape:
        # A single feature cannot be told from an axis of size 1 that a view has added.
        return nothing
    at = torch.empty_strided(shape, [int(each == axis) for each in range(len(shape))], device="meta")
    known = Landing(axis, 0, width)
    for node, output in path:
        moved = _moved(at, node, output)
        if moved is None:
            return Landing(None, known.first, known.count)
        at, known = moved, _landing(moved, known)
    return known


def _landing(at: Tensor, before: Landing) -> Landing:
    """What the strides say. Where the features that are left are no range of neighbours, they are still among those that arrived before."""
    axes = sorted((axis for axis, stride in enumerate(at.stride()) if stride and at.shape[axis] > 1), key=at.stride)
    axis, count = axes[0] if len(axes) == 1 else None, 1
    for each in axes:
        if at.stride(each) != count:
            return Landing(axis, before.first, before.count)
        count *= at.shape[each]
    return Landing(axis, int(at.storage_offset()), count) if axes else Landing(None, before.first, before.count)


def _moved(at: Tensor, node: Node, output: int) -> Tensor | None:
    """The features behind a node; None where they cannot be followed through it."""
    shape = internals.output_shape(node, output)
    kind = re.sub(r"Backward\d*$", "", node.name())
    if shape is None:
        return None
    try:
        if _ELEMENTWISE.fullmatch(kind):
            return _resized(at, shape)
        if kind == "Cat":
            return _resized(at, shape) if not at.stride(_signed(node, "dim")) else None
        if _REDUCTION.fullmatch(kind):
            return _reduced(at, node, shape)
        rule = _MOVES.get(kind)
        moved = rule(at, node, output, shape) if rule is not None else None
    except (RuntimeError, IndexError, AttributeError, TypeError):
        # A view that merges axes with different strides, or a node of another version of torch that keeps other values.
        return None
    return None if moved is None else _resized(moved, shape)


def _resized(at: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The features in a tensor of this shape. The sizes of axes along which the feature is the same everywhere may differ: by broadcasting, say."""
    missing = len(shape) - at.ndim
    if missing < 0:
        return None
    strides, sizes = (0,) * missing + at.stride(), (1,) * missing + tuple(at.shape)
    if any(stride and mine != wanted for stride, mine, wanted in zip(strides, sizes, shape, strict=True)):
        return None
    return at.as_strided(shape, strides, at.storage_offset())


def _reduced(at: Tensor, node: Node, shape: tuple[int, ...]) -> Tensor | None:
    if len(shape) == at.ndim:
        return _resized(at, shape)
    dims = getattr(node, "_saved_dim", None)
    if dims is None:
        return None
    for dim in sorted((_wrapped(each) % at.ndim for each in ([dims] if isinstance(dims, int) else dims)), reverse=True):
        if at.stride(dim):
            return None
        at = at.select(dim, 0)
    return _resized(at, shape)


def _split(at: Tensor, node: Node, output: int, shape: tuple[int, ...]) -> Tensor:
    dim = _signed(node, "dim")
    return at.narrow(dim, output * _signed(node, "split_size"), shape[dim])


def _split_with_sizes(at: Tensor, node: Node, output: int, shape: tuple[int, ...]) -> Tensor:
    dim = _signed(node, "dim")
    sizes: Sequence[int] = node._saved_split_sizes  # type: ignore[attr-defined]
    return at.narrow(dim, sum(sizes[:output]), shape[dim])


def _slice(at: Tensor, node: Node, output: int, shape: tuple[int, ...]) -> Tensor:
    dim = _signed(node, "dim") % at.ndim
    cut = slice(_signed(node, "start"), _signed(node, "end"), _signed(node, "step"))
    sliced: Tensor = at[(slice(None),) * dim + (cut,)]
    return sliced


_MOVES: dict[str, Callable[[Tensor, Node, int, tuple[int, ...]], Tensor]] = {
    "Transpose": lambda at, node, output, shape: at.transpose(_signed(node, "dim0"), _signed(node, "dim1")),
    "T": lambda at, node, output, shape: at.t(),
    "Permute": lambda at, node, output, shape: at.permute([_wrapped(each) for each in node._saved_dims]),  # type: ignore[attr-defined]
    "Split": _split,
    "SplitWithSizes": _split_with_sizes,
    "Unbind": lambda at, node, output, shape: at.select(_signed(node, "dim"), output),
    "Select": lambda at, node, output, shape: at.select(_signed(node, "dim"), _signed(node, "index")),
    "Slice": _slice,
    "Expand": lambda at, node, output, shape: at.expand(shape),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"), lambda at, node, output, shape: at.view(shape)),
}
"""How the features move through each kind of node that moves them."""


def _signed(node: Node, name: str) -> int:
    return _wrapped(getattr(node, f"_saved_{name}"))


def _wrapped(value: int) -> int:
    """A number that autograd kept as unsigned: a negative axis is 2^64 less than what it shows."""
    return int(value) - 2**64 if int(value) >= 2**63 else int(value)
