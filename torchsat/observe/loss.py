"""Finds out which functions of the loss take the output of a site, as one that takes it for logits, or squares its distance from a target.

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
from torchsat.observe.nodes import kind_of, spelled

_Value = TypeVar("_Value")

_NAMES = {"NllLoss2D": "nll_loss", "SmoothL1Loss": "smooth_l1_loss", "LogSigmoid": "logsigmoid"}
"""How functions are called where the name of the node does not say it."""
_OF_ANY_SCALE = frozenset(("MseLoss", "HuberLoss", "SmoothL1Loss", "Pow"))
"""Functions of which it does not matter whether what they take is shifted and scaled."""
_VIEWS = frozenset(("Alias", "Clone", "Expand", "Index", "IndexSelect", "MaskedSelect", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze"))
_VIEWS |= {"T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"}
"""Through these the values stay as they are."""
_AFFINE = frozenset(("Add", "Div", "Mul", "Neg", "Rsub", "Sub"))
"""These shift and scale values, where their other operand is no signal."""
_FARTHEST = 16
"""How many such nodes are passed on the way from a function to an output."""


def takers(objectives: Iterable[Node], made: NodeTable[_Value]) -> Iterator[tuple[_Value, str]]:
    """Each output that a function of the loss takes, with the name of the function. A pair may come twice.

    Args:
        objectives: the nodes that a backward begins at.
        made: what is known of the nodes that made the outputs.
    """
    for node in upstream(objectives, lambda node: node in made or has_weight(node), MOST_OF_CALL):
        if node in made or _passes_on(node):
            continue
        given = _given(node)
        for before in given:
            source, is_scaled = _source(before)
            found = made.get(source)
            if found is not None:
                yield found, _name(node, is_scaled, len(given) > 1)


def logits_in(objectives: Iterable[Node], made: NodeTable[_Value]) -> Iterator[tuple[_Value, int | None]]:
    """Each output that a softmax inside of the loss takes, as in cross_entropy, with the axis of its classes; None where views lie between.

    Args:
        objectives, made: as in `takers`.
    """
    for node in upstream(objectives, lambda node: node in made or has_weight(node), MOST_OF_CALL):
        if kind_of(node) != "LogSoftmax" or node in made:
            continue
        for before in _given(node):
            source, axis = before, getattr(node, "_saved_dim", None)
            for _ in range(_FARTHEST):
                if source in made or kind_of(source) not in _VIEWS or len(_given(source)) != 1:
                    break
                source = _given(source)[0]
            found = made.get(source)
            if found is not None:
                # An axis that is counted from the end comes as a number without a sign.
                yield found, axis if source is before and isinstance(axis, int) and axis < 2**63 else None


def _name(node: Node, is_scaled: bool, has_others: bool) -> str:
    """The name of a function, and how it takes an output if not as it is and alone."""
    kind = kind_of(node)
    name = "square" if kind == "Pow" and getattr(node, "_saved_exponent", None) == 2 else _NAMES.get(kind) or spelled(kind)
    if has_others:
        return f"{name} of several signals"
    return f"{name} of scaled values" if is_scaled and kind not in _OF_ANY_SCALE else name


def _given(node: Node) -> list[Node]:
    """The nodes of the signals that a node takes."""
    return [before for before, _ in node.next_functions if before is not None]


def _passes_on(node: Node) -> bool:
    """Whether a node gives the values of its only signal, maybe shifted and scaled."""
    return kind_of(node) in _VIEWS | _AFFINE and len(_given(node)) == 1


def _source(node: Node) -> tuple[Node, bool]:
    """The node whose values another one gives on, and whether they are shifted or scaled on the way."""
    is_scaled = False
    for _ in range(_FARTHEST):
        if not _passes_on(node):
            break
        is_scaled = is_scaled or kind_of(node) in _AFFINE
        node = _given(node)[0]
    return node, is_scaled
