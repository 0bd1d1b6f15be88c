"""Finds out which function of the loss takes the output of a site: one that takes it for logits, or one that squares its distance from a target.

An activation whose values lie between two bounds can be right or wrong for a loss, and only the loss tells. A cross-entropy that applies a softmax or
a sigmoid of its own never sees a sure answer behind another one. A square goes on asking for a target that lies beyond the bounds, whereas a
cross-entropy of probabilities, or a critic, asks for more even where the output is right.

torch keeps no way from an output to what is computed from it, but a backward begins at the loss. From there the graph is walked back to the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch.autograd.graph import Node

from torchsat.observe.graph import MOST_OF_CALL, has_weight, upstream
from torchsat.observe.marks import NodeTable
from torchsat.observe.nodes import kind_of

_Value = TypeVar("_Value")

_OF_LOGITS = {
    "LogSoftmax": "log_softmax",
    "Softmax": "softmax",
    "Logsumexp": "logsumexp",
    "NllLoss": "nll_loss",
    "NllLoss2D": "nll_loss",
    "BinaryCrossEntropyWithLogits": "binary_cross_entropy_with_logits",
    "LogSigmoid": "logsigmoid",
    "SoftMarginLoss": "soft_margin_loss",
}
"""Kinds of nodes that take logits, or logarithms of probabilities, and how the function is called."""
_OF_PROBABILITIES = {"BinaryCrossEntropy": "binary_cross_entropy"}
_OF_SQUARES = {"MseLoss": "mse_loss", "HuberLoss": "huber_loss", "SmoothL1Loss": "smooth_l1_loss", "Pow": "pow"}
"""Kinds of nodes that square a difference. Beyond its middle, Huber's loss grows with the distance alone."""
_NAMES = _OF_LOGITS | _OF_PROBABILITIES | _OF_SQUARES
_VIEWS = frozenset(("Alias", "Clone", "Expand", "Index", "IndexSelect", "MaskedSelect", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze"))
_VIEWS |= {"T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"}
"""Through these the values stay as they are."""
_AFFINE = frozenset(("Add", "Div", "Mul", "Neg", "Rsub", "Sub"))
"""These shift and scale values, where their other operand is no signal."""
_FARTHEST = 16
"""How many such nodes are passed on the way from a function of the loss to an output."""


def takers(objectives: Iterable[Node], made: NodeTable[_Value]) -> Iterator[tuple[_Value, str]]:
    """Each output that a function of the loss takes, with the name of the function. It may come twice.

    Args:
        objectives: the nodes that a backward begins at.
        made: what is known of the nodes that made the outputs.
    """
    for node in upstream(objectives, lambda node: node in made or has_weight(node), MOST_OF_CALL):
        kind = kind_of(node)
        if node in made or (kind == "Pow" and getattr(node, "_saved_exponent", None) != 2):
            continue
        given = [before for before, _ in node.next_functions if before is not None]
        source = _source(given, _VIEWS | _AFFINE if kind in _OF_SQUARES else _VIEWS) if kind in _NAMES else None
        found = None if source is None else made.get(source)
        if found is not None:
            yield found, _NAMES[kind]


def _source(given: list[Node], passed: frozenset[str]) -> Node | None:
    """The node whose output reaches a function through nodes of these kinds alone; None where the function has two signals."""
    for _ in range(_FARTHEST):
        if len(given) != 1 or kind_of(given[0]) not in passed:
            break
        following = [before for before, _ in given[0].next_functions if before is not None]
        if not following:
            break
        given = following
    return given[0] if len(given) == 1 else None
