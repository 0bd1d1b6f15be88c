"""Keeps our hooks out of what is saved or copied of a model while they are on it.

Hooks lie in dictionaries of a module, so that `torch.save(model)`, `pickle` and `copy.deepcopy` take them along. Whatever such a hook became in the
file, it would be something that the bare model does not have: `torch.load` with `weights_only=True`, its default, would refuse the file. So while
hooks of ours are on any module, `nn.Module.__reduce_ex__`, by which Python takes a module apart, leaves them out; the file is byte for byte that
of the bare model. The dictionaries themselves are never replaced, since the handles of the user's own hooks refer to them.

`torch.jit.script` compiles hooks, and fails where it cannot. It asks each module by `__prepare_scriptable__` what to script in its place, so it is
given a module without our hooks.

`copy.copy` gives a module that shares its dictionaries with the original. It gets them as they are: a hook of ours does nothing in another module
than its own, and is taken off the shared dictionary when the observation ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torchsat import internals
from torchsat.observe.hooks import Inert

_TABLES = (
    ("_forward_pre_hooks", ("_forward_pre_hooks_with_kwargs",)),
    ("_forward_hooks", ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")),
)
"""The dictionaries of a module that hold hooks, and those that hold options of the same hooks under the same keys."""
_hooking: weakref.WeakSet[Any] = weakref.WeakSet()
"""Whoever has hooks on a model now."""


def leave_out(owner: object) -> None:
    """Leave the hooks of this owner out of all copies, until it calls `all_off`."""
    _hooking.add(owner)
    for name, method in _METHODS.items():
        if name not in vars(nn.Module):
            setattr(nn.Module, name, method)


def all_off(owner: object, model: nn.Module | None) -> None:
    """Take the hooks of this owner off every module of a model, wherever they have been carried, and end what `leave_out` has begun.

    What prepares a model for quantization or fuses its modules puts other modules in the place of those that were hooked, and gives them the hooks.
    """
    for module in () if model is None else internals.modules_of(model):
        own = vars(module)
        for table, options in _TABLES:
            for key in [key for key, hook in own[table].items() if isinstance(hook, Inert) and hook.owner is owner]:
                for each in (table, *options):
                    own[each].pop(key, None)
    _hooking.discard(owner)
    for name, method in () if _hooking else _METHODS.items():
        if vars(nn.Module).get(name) is method:
            delattr(nn.Module, name)


def _reduce_without_hooks(self: nn.Module, protocol: Any) -> Any:
    made = super(nn.Module, self).__reduce_ex__(protocol)
    if isinstance(made, str) or internals.is_shallow_copy():
        return made
    return tuple(_without_hooks(each) for each in made)


def _to_script(self: nn.Module) -> nn.Module:
    """A module with the same attributes and without our hooks. torch puts what it gets for the children into the table of children."""
    if isinstance(self, torch.jit.ScriptModule):
        return self
    made = object.__new__(type(self))
    vars(made).update(_without_hooks(vars(self)))
    vars(made)["_modules"] = dict(vars(self)["_modules"])
    return made


_METHODS = {"__reduce_ex__": _reduce_without_hooks, "__prepare_scriptable__": _to_script}
"""The methods that nn.Module has while hooks are on. torch.jit.script asks a module for what it should script in its place by the second one."""


def _without_hooks(value: Any) -> Any:
    """The state of a module without our hooks. It may lie in a tuple, as the state of a module with slots does."""
    if isinstance(value, tuple):
        given = tuple(_without_hooks(each) for each in value)
        return given if any(new is not old for new, old in zip(given, value, strict=True)) else value
    replaced = dict(_replaced(value)) if type(value) is dict and "_forward_hooks" in value else {}
    return {name: replaced.get(name, each) for name, each in value.items()} if replaced else value


def _replaced(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for table, options in _TABLES:
        ours = {key for key, hook in state.get(table, {}).items() if isinstance(hook, Inert)}
        for name in (table, *options) if ours else ():
            if name in state:
                yield name, type(state[name])((key, each) for key, each in state[name].items() if key not in ours)
