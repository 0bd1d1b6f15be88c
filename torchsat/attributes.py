"""Reads attributes of a user's module without running any code of the user's.

`getattr(module, name)` can run code: a property, a `__getattr__`, or a parametrization such as spectral norm or weight drop, which moves buffers and
draws random numbers each time its weight is read. Training would then no longer be bit for bit what it is without us. So only what is stored is read:
parameters, buffers, and plain attributes of the module and of its class. What forward computes and then stores can be read too; the older
`weight_norm` and `spectral_norm` and `torch.nn.utils.prune` do so before each forward.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_MISSING = object()


def stored(module: nn.Module, name: str) -> Any:
    """The value that is stored under this name.

    Raises:
        AttributeError: there is none, or the value is computed each time that it is read.
    """
    own = vars(module)
    kept = next((vars(kind)[name] for kind in type(module).__mro__ if name in vars(kind)), _MISSING)
    # In Python what computes a value on the class, such as a property, goes before what is stored in the object, unless it can only be read.
    if kept is not _MISSING and hasattr(type(kept), "__get__") and (name not in own or hasattr(type(kept), "__set__")):
        raise AttributeError(f"{type(module).__name__}.{name} is computed each time that it is read, which would run code of the model")
    for table in (own, own.get("_parameters", {}), own.get("_buffers", {})):
        if name in table:
            return table[name]
    if kept is _MISSING:
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
    return kept


def stored_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are stored in a module itself, by name."""
    return [(name, each) for name, each in vars(module).get("_parameters", {}).items() if each is not None]


def stored_or(module: nn.Module, name: str, default: Any) -> Any:
    """The value that is stored under this name, or `default` where there is none or it is computed when it is read."""
    try:
        return stored(module, name)
    except AttributeError:
        return default
