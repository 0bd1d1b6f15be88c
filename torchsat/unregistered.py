"""Finds modules that a model holds in a place where torch does not look: in a plain list, dict or tuple, an object, a partial function or a closure.

torch knows only modules that are attributes of modules. All others are missing in `model.parameters()`, `model.to()` and `state_dict()`, and hooks on
the model do not reach them. They are not watched as parts of the model: whether they are parts cannot be known, since a frozen teacher is put into a
list on purpose. They are named instead, if they have parameters that learn.

Nothing of the user's runs here. Attributes are read from the dicts of objects, so that no property is called, and containers are opened by the
methods of Python's own classes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from itertools import islice
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType
from typing import Any

from torch import nn

_OWN = frozenset(vars(nn.Module()))
"""The attributes that torch itself gives a module."""
_DICT = (GetSetDescriptorType, MemberDescriptorType)
"""What gives the dict of attributes in a class that does not have a property in its place."""
_MOST = 1000
"""The most values that are looked at in one container, and the most containers that are opened for one attribute."""
_ADVICE = "torch does not know it as part of the model; {}, or watch it by itself"


def unregistered(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The modules with parameters that learn which the model holds and torch does not know: by path, each with the reason why it is not watched."""
    modules = list(_inside(model))
    met = {id(module) for _, module in modules}
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in modules:
        for name, value in vars(module).items():
            if name in _OWN:
                continue
            for place, held, holder in _held(f"{path}.{name}" if path else name, value):
                inside = [each for _, each in _inside(held)]
                # What holds the model, as its trainer or a wrapper around it does, is no part of it.
                if not any(id(each) in met for each in inside) and any(_learns(each) for each in inside):
                    found[place] = held, _reason(holder)
                    met.update(map(id, inside))
    return found


def _inside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The path and the module of each module in this one, itself included. `named_modules` may be a method of the user's."""
    stack, met = [("", module)], set[int]()
    while stack:
        path, each = stack.pop()
        if id(each) not in met:
            met.add(id(each))
            yield path, each
            children = _table(each, "_modules").items()
            stack += reversed([(f"{path}.{name}" if path else name, child) for name, child in children if child is not None])


def _learns(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in _table(module, "_parameters").values())


def _table(module: nn.Module, name: str) -> dict[str, Any]:
    """One of the dicts in which a module keeps its parts. A scripted module has another object in its place."""
    table = vars(module).get(name)
    return table if isinstance(table, dict) else {}


def _held(place: str, value: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """(place, module, holder) of each module that is reached from the value of an attribute through containers and at most one plain object."""
    queue, met = deque[tuple[str, Any, Any, bool]]([(place, value, None, True)]), set[int]()
    while queue and len(met) < _MOST:
        name, each, holder, may_open = queue.popleft()
        if issubclass(type(each), nn.Module):
            if holder is not None:
                yield name, each, holder
        elif id(each) not in met:
            met.add(id(each))
            inside, is_object = _contents(each) if may_open else (_in_container(each), False)
            queue += ((f"{name}.{key}", item, each, may_open and not is_object) for key, item in islice(inside or (), _MOST))


def _contents(value: Any) -> tuple[Iterator[tuple[Any, Any]] | None, bool]:
    """(key, value) of what a container or an object holds, and whether it is an object."""
    inside = _in_container(value)
    is_plain = all(isinstance(kind.__dict__["__dict__"], _DICT) for kind in type(value).__mro__ if "__dict__" in kind.__dict__)
    if inside is not None or not is_plain:
        return inside, False
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None, False
    return (iter(list(dict.items(held))) if type(held) is dict and not issubclass(type(value), type) else None), True


def _in_container(value: Any) -> Iterator[tuple[Any, Any]] | None:
    kind = type(value)
    if issubclass(kind, dict):
        return iter(list(islice(dict.items(value), _MOST)))
    for container in (list, tuple, deque, set, frozenset):
        if issubclass(kind, container):
            return enumerate(list(islice(container.__iter__(value), _MOST)))
    if kind is functools.partial:
        return iter([("func", value.func), *enumerate(value.args), *value.keywords.items()])
    if kind is FunctionType:
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        return iter([(name, cell.cell_contents) for name, cell in cells if _is_filled(cell)])
    return iter([("self", value.__self__)]) if kind is MethodType else None


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _reason(holder: Any) -> str:
    kind = type(holder)
    if issubclass(kind, dict):
        return f"a module in a plain Python dict: {_ADVICE.format('put it into an nn.ModuleDict')}"
    if issubclass(kind, (list, tuple, deque, set, frozenset)):
        name = next(each.__name__ for each in (list, tuple, deque, set, frozenset) if issubclass(kind, each))
        return f"a module in a plain Python {name}: {_ADVICE.format('put it into an nn.ModuleList')}"
    return f"a module in a {kind.__name__}: {_ADVICE.format('make it an attribute of the model')}"
