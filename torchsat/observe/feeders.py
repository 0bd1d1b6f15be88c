"""Finds in the autograd graph which weights feed a tensor: on each path back from it, the first node in which a weight is contracted.

A weight is a parameter with two axes or more that a matrix product, a convolution, a bilinear map or an embedding multiplies with its input. A
parameter that is added, or that scales element by element (a bias, a position, the gain of a norm), is not. Two things tell where a weight enters:

- The node that made the output of a layer is noted when the layer runs. This holds too for weights that do not learn or are computed from others.
- Of any other product the operands are followed back. An operand that consists of parameters alone, whatever views, casts, scales and sums made it,
  is a weight. Its gain can be told only if nothing but views and casts lie between, since what enters the product has the values of the parameter.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.observe.marks import NodeTable
from torchsat.observe.tracing import Landing, Step, follow


@dataclass(frozen=True)
class _Product:
    """A kind of node that contracts its operands with each other."""

    kind: re.Pattern[str]
    operands: tuple[int, ...]
    """The places of its operands. At any other place there is something that is added."""
    weights: tuple[int, ...]
    """The operands that may be the weight."""


_PRODUCTS = tuple(
    _Product(re.compile(rf"({kinds})Backward"), operands, weights)
    for kinds, operands, weights in (
        ("Addmm|Baddbmm|Addbmm|Addmv|SparseAddmm", (1, 2), (1, 2)),
        ("Mm|Bmm|Mv|Dot|GroupedMm|SparseMm|SparseSparseMatmul", (0, 1), (0, 1)),
        (r"\w*Conv\w*", (0, 1), (1,)),
        ("(Mkldnn)?Linear", (0, 1), (1,)),
        ("Trilinear", (0, 1, 2), (1,)),
        ("Embedding(Bag)?", (0,), (0,)),
    )
)
"""The nodes that contract their operands."""
_VIEW = re.compile(
    r"(\w*View|ReshapeAlias|Unsqueeze|Squeeze|Expand|Transpose|Permute|Slice|Select|Split|SplitWithSizes|Chunk|Unbind|Index|IndexSelect|ToCopy|Clone|"
    r"Contiguous|Alias|T|_?(To|From)TorchTensor|Redistribute|_?AllGather\w*|WaitTensor)Backward\d*"
)
"""Nodes whose output holds values of their input and no others."""
_ON_WEIGHTS = re.compile(
    r"(Add|Sub|Rsub|Mul|Div|Neg|Pow|Exp|Sqrt|Rsqrt|Reciprocal|Abs|Sign|Mean|Sum|Var|VarMean|Std|Norm|LinalgVectorNorm|WeightNormInterface|Cat|Stack|"
    r"Clamp\w*|Round|Where|MaskedFill|FakeQuantize\w*|Mm|Bmm|Addmm|Baddbmm|Kron|Tril|Triu|IndexPut|SliceScatter|MatrixExp|LinalgSolve\w*|"
    r"\w*Householder\w*)Backward\d*"
)
"""Nodes that compute a weight from parameters, as weight norm, spectral norm, pruning, merged LoRA and other parametrizations do."""
_JOINS = re.compile("(Add|Sub|Rsub|Cat|Stack)Backward")
_MATRIX_PRODUCT = re.compile("(Mm|Bmm|Addmm|Baddbmm)Backward")
_CUT = re.compile(r"(Split|SplitWithSizes|Unbind|Select|Slice)Backward")
"""Nodes behind which only a part of their input goes on."""
_MOST = 512
"""The most nodes that are looked at on the way back from one tensor. The nearest ones are looked at first."""
_MOST_OF_WEIGHT = 64
"""The most nodes of a computation that makes a weight from parameters."""


@dataclass(frozen=True)
class Output:
    """What a node makes: the output of a layer."""

    layer: str
    """The name of the layer."""
    axis: int | None
    """The axis of its features, counted from the last one, which is 1."""


@dataclass(frozen=True)
class Use:
    """How a product uses a parameter as its weight."""

    name: str
    fan_in: int | None
    """How many input elements one output element is a sum of. None: what enters the product is computed from the parameter, so that its gain is
    not known."""
    data: bool
    """Whether the other operand is data: nothing that learns has computed it."""
    axis: int
    """The axis of the features in what the product makes, counted from the last one, which is 1."""


@dataclass(frozen=True)
class Feeder:
    """A weight that feeds a tensor."""

    name: str
    landing: Landing | None
    """Where the outputs of its layer arrive in the tensor; None where the shapes are not known."""
    width: int
    """The number of these outputs; 0 where it is not known."""
    use: Use | None = None
    """How a product uses it; None where it is the weight of a layer that was seen to run."""


@dataclass(frozen=True)
class Cut:
    """A part of a tensor along one axis."""

    axis: int
    first: int
    count: int

    def of(self, feeder: Feeder) -> Feeder:
        """A weight that feeds the whole tensor, as it feeds this part."""
        landing = feeder.landing
        if landing is None or landing.axis != self.axis:
            return feeder
        return replace(feeder, landing=Landing(self.axis, landing.first + self.first, self.count))


@dataclass
class Places:
    """What is known of a pass when one looks for feeders."""

    weights: dict[int, str] = field(default_factory=dict)
    """The name of each weight by the id of its tensor."""
    outputs: NodeTable[Output] = field(default_factory=NodeTable)
    """The nodes that made the outputs of layers."""


Way = tuple[Step, "Way | None"]
"""The steps from some node to the tensor that is looked at, in the order in which they ran."""


def feeders(starts: Iterable[Step], places: Places, ends_at: Callable[[Node], bool], touch: Callable[[Node], bool]) -> list[Feeder]:
    """The weights that are met first on each way back from some tensors, the nearest first.

    A layer is found once for each range of its outputs that arrives: that which makes both queries and keys feeds the attention twice.

    Args:
        starts: for each tensor its node, and which output of that node it is.
        ends_at: whether a node made the output of another site, beyond which no way is followed.
        touch: called with each node that is looked at. False: no more may be looked at.
    """
    found: dict[tuple[str, Landing | None], Feeder] = {}
    queue: deque[tuple[Step, Way | None, Step | None]] = deque((start, None, None) for start in starts)
    met = set[tuple[Step, Step | None]]()
    while queue and len(met) < _MOST:
        (node, nr), way, cut = queue.popleft()
        # A node is met again if another part of what it made was cut out for this way.
        if ((node, nr), cut) in met or not touch(node):
            continue
        met.add(((node, nr), cut))
        output = places.outputs.get(node)
        if output is not None or ends_at(node):
            if output is not None:
                _keep(found, _landed(output.layer, output.axis, node, way))
            continue
        product, uses = _uses(node, places.weights)
        for use in uses:
            _keep(found, _landed(use.name, use.axis, node, way, use))
        edges = node.next_functions
        if uses:
            # What is added to the product comes from elsewhere.
            edges = tuple(edge for at, edge in enumerate(edges) if product is not None and at not in product.operands)
        step = (node, nr)
        cut = step if _CUT.match(node.name()) else cut
        queue.extend(((before, at), (step, way), cut) for before, at in edges if before is not None)
    return list(found.values())


def weights_used(node: Node, weights: Mapping[int, str]) -> list[str]:
    """The names of the weights that a node contracts with its input."""
    return [use.name for use in _uses(node, weights)[1]]


def is_weight(node: Node, weights: Mapping[int, str]) -> bool:
    """Whether what a node has computed consists of parameters alone."""
    return _operand(node, weights) is not None


def widest(found: Iterable[Feeder]) -> list[Feeder]:
    """The feeders without those of which another range of the same layer covers all outputs. Rotary positions take every half apart, for example.

    Where the ranges of a layer together are all of its outputs, one feeder stands for the whole layer.
    """
    by_layer: dict[str, list[Feeder]] = {}
    for feeder in found:
        by_layer.setdefault(feeder.name, []).append(feeder)
    kept = []
    for same in by_layer.values():
        ranges = [(each.landing.first, -each.landing.count, each) for each in same if each.landing is not None]
        if len(ranges) < len(same):
            kept.append(same[0])
            continue
        end, mine = 0, list[Feeder]()
        for first, negated, feeder in sorted(ranges, key=lambda each: each[:2]):
            if first - negated > end or not mine:
                mine.append(feeder)
                end = max(end, first - negated)
        covered = sum(landing.count for each in mine if (landing := each.landing) is not None)
        whole = replace(mine[0], landing=Landing(None, 0, mine[0].width)) if len(mine) > 1 and covered >= mine[0].width else None
        kept += mine if whole is None else [whole]
    return kept


def _keep(found: dict[tuple[str, Landing | None], Feeder], feeder: Feeder) -> None:
    found.setdefault((feeder.name, feeder.landing and Landing(None, feeder.landing.first, feeder.landing.count)), feeder)


def _landed(name: str, axis: int | None, node: Node, way: Way | None, use: Use | None = None) -> Feeder:
    shape, path = internals.output_shape(node, 0), list[Step]()
    if shape is None or axis is None or axis > len(shape):
        return Feeder(name, None, 0, use)
    while way is not None:
        step, way = way
        path.append(step)
    return Feeder(name, follow(path, shape, len(shape) - axis), shape[-axis], use)


def _features_axis(node: Node, product: _Product, at: int) -> int:
    """The axis of the features in the output of a product whose weight is the operand `at`, counted from the last one, which is 1."""
    shape = internals.output_shape(node, 0) or ()
    if "Conv" in node.name() and len(shape) > 2:
        return len(shape) - 1
    # A weight that stands first makes the rows of the product.
    return 2 if product.weights == product.operands and at == product.operands[0] and len(shape) > 1 and len(product.operands) == 2 else 1


def _uses(node: Node, weights: Mapping[int, str]) -> tuple[_Product | None, list[Use]]:
    """Which kind of product a node is, and the weights that it contracts with its input."""
    edges = [before for before, _ in node.next_functions]
    product = next((product for product in _PRODUCTS if product.kind.match(node.name())), None)
    if product is None:
        # Of a function of the user's or a compiled one it is only known which parameters enter it, and not in which order they are used.
        entering = [operand for before in edges if (operand := _operand(before, weights))] if internals.forward_class(node) is not None else []
        names = dict.fromkeys(name for operand in entering for name in operand.names)
        return None, [Use(name, None, False, 1) for name in names] if len(names) == 1 else []
    candidates = {at: operand for at in product.weights if at < len(edges) and (operand := _operand(edges[at], weights)) is not None}
    if not candidates:
        return product, []
    # Where both operands consist of parameters, as where a learned token goes through a layer, the weight is the plainer one, and then the second.
    at = min(candidates, key=lambda at: (candidates[at].constants, candidates[at].computed, -at))
    data = all(edges[other] is None for other in product.operands if other != at and other < len(edges))
    if data and (candidates[at].constants or candidates[at].product):
        # A position that was added to data looks like this, and a learned table that went through a layer before a graph's matrix mixes its rows.
        return product, []
    axis = _features_axis(node, product, at)
    return product, [Use(name, _fan_in(node, product, at, candidates[at]), data, axis) for name in candidates[at].names]


@dataclass(frozen=True)
class _Operand:
    """An operand that consists of parameters alone."""

    names: tuple[str, ...]
    computed: bool
    """Whether more than views and casts lie between the parameters and the product."""
    constants: int
    """How many tensors that do not learn are added to the parameters or joined with them."""
    product: bool
    """Whether it is itself the product of two others."""
    shape: tuple[int, ...] | None
    """Its shape in the product."""


def _operand(start: Node | None, weights: Mapping[int, str]) -> _Operand | None:
    """The parameters that an operand consists of; None where anything else enters it."""
    if start is None:
        return None
    queue, met, names, computed, product, constants = deque([start]), set[Node](), dict[str, Tensor](), False, False, 0
    while queue:
        node = queue.popleft()
        if node in met:
            continue
        met.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            if id(leaf) not in weights and leaf.ndim >= 2:
                return None
            if id(leaf) in weights:
                names[weights[id(leaf)]] = leaf
            continue
        is_view = _VIEW.fullmatch(node.name()) is not None
        if len(met) > _MOST_OF_WEIGHT or not (is_view or _ON_WEIGHTS.fullmatch(node.name())):
            return None
        if _MATRIX_PRODUCT.match(node.name()):
            if any(before is None for before, _ in node.next_functions[-2:]):
                # The other factor is data.
                return None
            product = product or not computed
        computed = computed or not is_view
        constants += sum(before is None for before, _ in node.next_functions) if _JOINS.match(node.name()) else 0
        queue.extend(before for before, _ in node.next_functions if before is not None)
    # The length of each row, as weight norm keeps it, has the axes of a weight, but all of them except one have size 1.
    full = {name for name, leaf in names.items() if sum(size > 1 for size in leaf.shape) > 1}
    kept = tuple(name for name in names if name in full or not full)
    return _Operand(kept, computed or len(kept) > 1, constants, product, internals.output_shape(start, 0)) if kept else None


def _fan_in(node: Node, product: _Product, at: int, operand: _Operand) -> int | None:
    """How many input elements one output element of a product is a sum of, read from the shape of the weight in it."""
    kind, shape = node.name(), operand.shape
    if operand.computed or shape is None:
        return None
    if kind.startswith("EmbeddingBackward"):
        return 1
    if kind.startswith("EmbeddingBag"):
        return None
    if kind.startswith("Trilinear"):
        return math.prod(size for size in shape[-2:])
    if "Conv" in kind:
        if getattr(node, "_saved_transposed", False):
            taps = shape[0] // int(getattr(node, "_saved_groups", 1)) * math.prod(shape[2:])
            return max(1, taps // math.prod(int(each) for each in getattr(node, "_saved_stride", ())))
        return math.prod(shape[1:])
    if "Linear" in kind:
        return shape[-1]
    # The first operand of a product is contracted along its last axis, the second one along its last but one.
    is_first = at == product.operands[0]
    return shape[-1] if is_first or len(shape) == 1 else shape[-2]
