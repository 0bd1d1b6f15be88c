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

    def heard(self, function: Callable[..., Any], given: tuple[Any, ...], result: Any) -> Tensor | None:
        """Note that a function of torch was called with these arguments and returned this. The result where a signal is kept or dropped in it by a
        condition of a signal; None otherwise."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not tensors or _NO_COMPARISON.fullmatch(name := getattr(function, "__name__", "")):
            return None
        conditional = any(_holds(self._known, value) for value in tensors)
        if not isinstance(result, Tensor):
            # An assignment, such as `z[z < 0] = 0`, returns nothing and changes its first argument.
            return tensors[0] if result is None and conditional and tensors[0].requires_grad else None
        if result.requires_grad:
            return result if conditional else None
        if conditional or (result.dtype == torch.bool and any(value.requires_grad or _holds(self._detached, value) for value in tensors)):
            _put(self._known, result)
        elif name in _DETACHED and tensors[0].requires_grad and result.is_floating_point():
            _put(self._detached, result)
        return None


def _holds(known: dict[int, weakref.ref[Tensor]], tensor: Tensor) -> bool:
    found = known.get(id(tensor))
    return found is not None and found() is tensor


def _put(known: dict[int, weakref.ref[Tensor]], tensor: Tensor) -> None:
    key = id(tensor)
    known[key] = weakref.ref(tensor, lambda _: known.pop(key, None))
