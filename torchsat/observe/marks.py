"""Marks nodes of autograd graphs without keeping them alive.

A node that Python holds keeps its graph alive, with all activations that were saved for the backward, and nothing tells when the user has dropped it.
torch has no weak references to nodes either. But every node of a graph has a number that no other one gets, so that it is enough to keep that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from torch.autograd.graph import Node

from torchsat import internals

_Value = TypeVar("_Value")


class NodeTable(Generic[_Value]):
    """A value for each of some nodes."""

    def __init__(self) -> None:
        self._values: dict[int | tuple[int], _Value] = {}

    def __contains__(self, node: Node) -> bool:
        return internals.node_key(node) in self._values

    def __getitem__(self, node: Node) -> _Value:
        return self._values[internals.node_key(node)]

    def __setitem__(self, node: Node, value: _Value) -> None:
        self._values[internals.node_key(node)] = value

    def __len__(self) -> int:
        return len(self._values)

    def get(self, node: Node) -> _Value | None:
        """The value of this node; None where it has none."""
        return self._values.get(internals.node_key(node))

    def forget_oldest(self) -> None:
        """Forget the node that was added first."""
        self._values.pop(next(iter(self._values)))

    def clear(self) -> None:
        """Forget all nodes."""
        self._values.clear()


class NodeSet:
    """Some nodes."""

    def __init__(self) -> None:
        self._keys: set[int | tuple[int]] = set()

    def __contains__(self, node: Node) -> bool:
        return internals.node_key(node) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, node: Node) -> None:
        """Add a node."""
        self._keys.add(internals.node_key(node))

    def update(self, nodes: Iterable[Node]) -> None:
        """Add several nodes."""
        self._keys.update(map(internals.node_key, nodes))
