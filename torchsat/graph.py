"""What the autograd graph tells of a pass: which layers feed a site, what comes after it, what multiplies it, and what nobody saw.

Nodes are looked at while the pass runs and forgotten after it. A walk holds nodes, never tensors.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

_MATRIX_PRODUCT = re.compile(r"Addmm|^Mm|Bmm|Baddbmm|Convolution|Matmul|Linear|Attention|Rnn")
_ACTIVATION = re.compile(
    r"(Sigmoid|Tanh|Relu|LeakyRelu|PreluKernel|RreluWithNoise|Elu|Celu|Gelu|Silu|Mish|Softplus|Hardtanh|Hardsigmoid|Hardswish|LogSigmoid|"
    r"Softshrink|Hardshrink|Threshold|Softmax|Glu|ScaledDotProduct\w*|\w*Rnn\w*|\w*ThnnFused\w*)Backward\d*"
)
_VIEW = re.compile(r"(\w*View|Unsqueeze|Squeeze|Expand|Transpose|Permute|Slice|Select|Split|Chunk|ToCopy|Clone|Alias|T)Backward")
_MOST_NODES = 100_000


def upstream(starts: Iterable[Node | None], stop: Callable[[Node], bool], limit: int = 512) -> Iterator[Node]:
    """The nodes that lead to these, breadth first, not beyond those where `stop` holds."""
    queue, met = deque(node for node in starts if node is not None), set[Node]()
    while queue and len(met) < limit:
        node = queue.popleft()
        if node in met:
            continue
        met.add(node)
        yield node
        if not stop(node):
            queue.extend(before for before, _ in node.next_functions if before is not None)


def feeders(node: Node | None, weights: dict[int, str]) -> tuple[str, ...]:
    """The layers whose weights are the first met on the way back from z."""
    names: dict[str, None] = {}
    for met in upstream([node], has_weight):
        names.update((weights[id(leaf)], None) for leaf in _parameters(met) if id(leaf) in weights)
    return tuple(names)


def has_weight(node: Node) -> bool:
    """Whether a matrix enters here: a product, or a parameter of two dimensions."""
    return bool(_MATRIX_PRODUCT.search(node.name())) or any(leaf.ndim >= 2 and leaf.requires_grad for leaf in _parameters(node))


def _parameters(node: Node) -> Iterator[Tensor]:
    """The leaves that enter a node directly, or through a few casts, views and transposes."""
    for start, _ in node.next_functions:
        if start is not None and (variable := getattr(_through_views(start), "variable", None)) is not None:
            yield variable


def _through_views(node: Node) -> Node:
    for _ in range(4):
        following = [before for before, _ in node.next_functions if before is not None]
        if len(following) != 1 or len(node.next_functions) != 1:
            break
        node = following[0]
    return node


def _behind_views(node: Node) -> Node:
    """The node whose output this is a view, cast or copy of."""
    for _ in range(8):
        if not _VIEW.match(node.name()) or node.next_functions[0][0] is None:
            break
        node = node.next_functions[0][0]
    return node


def ends(values: Any) -> set[Node]:
    """The nodes of the tensors in any structure that a module takes or gives."""
    return {leaf.grad_fn for leaf in tree_leaves(_opened(values)) if isinstance(leaf, Tensor) and leaf.grad_fn is not None}


def _opened(values: Any) -> Any:
    """A dataclass or other object with attributes as a dict, so that its tensors can be found."""
    if isinstance(values, (Tensor, tuple, list, dict)):
        return dict(values) if isinstance(values, dict) else values
    return vars(values) if hasattr(values, "__dict__") else values


class Survey:
    """A walk over all of the graph, part by part as modules are entered and left, for what no hook accounts for.

    What a site explains is given to `explain`; `explore` then says which of the other nodes are activations.
    """

    def __init__(self) -> None:
        self._met: set[Node] = set()
        self.products: list[tuple[Node, Node]] = []
        """Pairs of nodes whose outputs are multiplied with each other, both made from more than a parameter."""

    def explain(self, starts: Iterable[Node], before: set[Node]) -> None:
        """What lies between the nodes of an input and those of an output is accounted for."""
        stop = before | self._met
        self._met.update(node for node in upstream(starts, stop.__contains__, _MOST_NODES) if node not in before)

    def explore(self, starts: Iterable[Node]) -> Iterator[tuple[str, str]]:
        """(what, why it is not seen) of the nodes that lead here and were not met before."""
        for node in list(upstream(starts, self._met.__contains__, _MOST_NODES)):
            if node in self._met:
                continue
            self._met.add(node)
            name = node.name()
            if name.startswith("MulBackward"):
                factors = [_behind_views(before) for before, _ in node.next_functions if before is not None]
                if len(factors) == 2 and not any(hasattr(factor, "variable") for factor in factors):
                    self.products.append((factors[0], factors[1]))
            elif hasattr(node, "_forward_cls"):
                origin = node._forward_cls.__module__
                if name.startswith("CompiledFunction"):
                    yield "compiled", "a compiled function: what is fused in it runs no hook"
                elif not origin.startswith("torch."):
                    yield name.removesuffix("Backward"), "a custom autograd.Function: what it computes is not known"
            elif _ACTIVATION.fullmatch(name):
                yield re.sub(r"Backward\d*$", "", name), "called where torch tells no hook of it (a compiled or scripted function, torch.ops)"
