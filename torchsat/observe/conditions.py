"""Remembers which conditions were computed from a signal, since the autograd graph does not hold them.

`torch.where(z > 0, z, 0)` is a ReLU, and `torch.where(mask, z, 0)` with a mask from the data is none. In the graph both are the same node. What tells
them apart is how the condition came about: a comparison of a signal (a tensor that requires a gradient) gives a condition of the signal, and so does
every tensor that is computed from one, as in `(z > 0).float()`. A signal that was detached from the graph, `z.detach()`, still counts as one.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchsat.observe.marks import NodeSet

_NO_COMPARISON = re.compile(r".*_like|new_.*|is_?(nan|inf|neginf|posinf|finite|real)")
"""Functions whose result does not depend on the values of a signal, or only on whether they are finite."""
_DETACHED = ("detach", "__get__")
"""The functions whose result is a signal without its graph. Reading `z.data` calls `__get__`."""


class Conditions:
    """The conditions of one observation. Tensors are not kept alive."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}
        """Conditions by the id of the tensor. An entry goes when its tensor does, since another one could get the same id."""
        self._detached: dict[int, weakref.ref[Tensor]] = {}
        """Detached signals, likewise."""

    def heard(self, function: Callable[..., Any], given: tuple[Any, ...], result: Any, choices: NodeSet) -> None:
        """Note that a function of torch was called with these arguments and returned this. Where it keeps or drops elements of a signal by a
        condition of a signal, its node is added to `choices`."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not tensors or _NO_COMPARISON.fullmatch(name := getattr(function, "__name__", "")):
            return
        conditional = any(_holds(self._known, value) for value in tensors)
        # An assignment, such as `z[z < 0] = 0`, returns nothing and changes its first argument.
        changed = tensors[0] if result is None else result
        if not isinstance(changed, Tensor):
            return
        if changed.requires_grad:
            if conditional and changed.grad_fn is not None:
                choices.add(changed.grad_fn)
        elif conditional or (changed.dtype == torch.bool and any(value.requires_grad or _holds(self._detached, value) for value in tensors)):
            _put(self._known, changed)
        elif name in _DETACHED and tensors[0].requires_grad and changed.is_floating_point():
            _put(self._detached, changed)


def _holds(known: dict[int, weakref.ref[Tensor]], tensor: Tensor) -> bool:
    found = known.get(id(tensor))
    return found is not None and found() is tensor


def _put(known: dict[int, weakref.ref[Tensor]], tensor: Tensor) -> None:
    key = id(tensor)
    known[key] = weakref.ref(tensor, lambda _: known.pop(key, None))
