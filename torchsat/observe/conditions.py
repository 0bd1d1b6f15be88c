"""Remembers which conditions were computed from a signal, since the autograd graph does not hold them.

`torch.where(z > 0, z, 0)` is a ReLU, and `torch.where(mask, z, 0)` with a mask from the data is none. In the graph both are the same node. What tells
them apart is how the condition came about: a comparison of a signal (a tensor that requires a gradient) gives a condition of the signal, and so does
every tensor that is computed from one, as in `(z > 0).float()`. A signal that was detached from the graph, `z.detach()`, still counts as one.

Where a condition comes from one signal alone, that signal is its *source*.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchsat import internals
from torchsat.observe.marks import NodeSet
from torchsat.observe.nodes import comes_from_parameter

_NO_COMPARISON = re.compile(r".*_like|new_.*|is_?(nan|inf|neginf|posinf|finite|real)")
"""Functions whose result does not depend on the values of a signal, or only on whether they are finite."""
_DETACHED = ("detach", "__get__")
"""The functions whose result is a signal without its graph. Reading `z.data` calls `__get__`."""


@dataclass(frozen=True, eq=False)
class Source:
    """The signal that a condition was computed from. It is not kept alive."""

    signal: weakref.ref[Tensor]
    version: int
    """How often the signal had been overwritten when it was compared."""
    began: int
    """The number of the first autograd node that could be made from the signal."""

    def tensor(self) -> Tensor | None:
        """The signal; None where it is gone, or has been overwritten since."""
        z = self.signal()
        return z if z is not None and internals.version(z) == self.version else None


class Conditions:
    """The conditions of one observation. Tensors are not kept alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Source | None]] = {}
        """Conditions by the id of the tensor, with their sources. An entry goes when its tensor does, since another one could get the same id."""
        self._detached: dict[int, tuple[weakref.ref[Tensor], Source | None]] = {}
        """Detached signals, likewise."""

    def source(self, given: Iterable[Any]) -> Source | None:
        """The source of the one condition among these arguments; None where there is none, or several."""
        return _only(_source(self._known, value) for value in given if isinstance(value, Tensor))

    def heard(self, function: Callable[..., Any], given: tuple[Any, ...], result: Any, choices: NodeSet | None) -> None:
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
            if conditional and changed.grad_fn is not None and choices is not None:
                choices.add(changed.grad_fn)
        elif conditional or (changed.dtype == torch.bool and any(value.requires_grad or _holds(self._detached, value) for value in tensors)):
            _put(self._known, changed, self._common(tensors))
        elif name in _DETACHED and tensors[0].requires_grad and changed.is_floating_point():
            _put(self._detached, changed, _source_at(tensors[0]))

    def _common(self, tensors: Iterable[Tensor]) -> Source | None:
        """The signal that all of these come from, which are not parameters or data; None where there are several."""
        return _only(
            _source(self._known, each) or _source(self._detached, each) or (_source_at(each) if each.requires_grad else None) for each in tensors
        )


def _only(sources: Iterable[Source | None]) -> Source | None:
    """The one source among these; None where there are several. A function of a parameter alone, such as a learned threshold, is none."""
    found = {(id(signal), each.began): each for each in sources if each is not None and (signal := each.signal()) is not None}
    if len(found) > 1:
        found = {key: each for key, each in found.items() if not _is_learned(each)}
    return next(iter(found.values())) if len(found) == 1 else None


def _is_learned(source: Source) -> bool:
    signal = source.signal()
    return signal is not None and signal.grad_fn is not None and comes_from_parameter(signal.grad_fn)


def _source_at(signal: Tensor) -> Source | None:
    node = signal.grad_fn
    return None if node is None else Source(weakref.ref(signal), internals.version(signal), internals.node_number(node) + 1)


def _source(known: dict[int, tuple[weakref.ref[Tensor], Source | None]], tensor: Tensor) -> Source | None:
    return known[id(tensor)][1] if _holds(known, tensor) else None


def _holds(known: dict[int, tuple[weakref.ref[Tensor], Source | None]], tensor: Tensor) -> bool:
    # What a custom autograd.Function makes of a condition is a signal once the function has returned it.
    found = None if tensor.requires_grad else known.get(id(tensor))
    return found is not None and found[0]() is tensor


def _put(known: dict[int, tuple[weakref.ref[Tensor], Source | None]], tensor: Tensor, source: Source | None) -> None:
    key = id(tensor)
    known[key] = weakref.ref(tensor, lambda _: known.pop(key, None)), source
