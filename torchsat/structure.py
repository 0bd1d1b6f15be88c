"""Sorts the modules of a model by type, before any of them has run.

One walk over the modules finds those that can be a site (a place where one activation is computed), a layer with a weight, a recurrent layer, or a
module in whose forward an activation function may be called. The sources of sites (observe/) put their hooks on what is found here. Only types are
looked at: what a module computes shows when it runs, and is found out in observe/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchsat import internals
from torchsat.activations import Activation
from torchsat.internals_distributed import is_flattened, is_stage
from torchsat.weights import is_layer, why_unmeasured

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_WRAPPERS = re.compile(rf"(^|\.)({'|'.join(internals.WRAPPERS)})(?=\.|$)")
_CALLERS = (
    (nn.GLU, "glu"),
    ((nn.Softmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention), "softmax"),
    (nn.LogSoftmax, "log_softmax"),
)
"""The modules of torch.nn whose forward calls a function that is a site, and the name of that function."""
_SCRIPTED = "a scripted module (torch.jit): it runs no Python hooks"
_REPLICATED = "nn.DataParallel over several devices: it runs copies that are thrown away after each pass"
FLATTENED = (
    "a model in FullyShardedDataParallel (FSDP1) cannot be watched: it makes one flat parameter of the weights of many layers. "
    "Use torch.distributed.fsdp.fully_shard (FSDP2)."
)


class Stages(nn.ModuleDict):
    """The stages of a pipeline that one rank runs. The pipeline calls each stage by itself and never this module, so hooks go on the stages."""


@dataclass(frozen=True)
class NamedModule:
    """A module and its path as a site name."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class ActivationModule(NamedModule):
    """A module whose function is known from a row of the table of activations."""

    activation: Activation


@dataclass(frozen=True)
class CallingModule(NamedModule):
    """A module in whose forward a function may be called."""

    explained: bool
    """Whether the module is measured as a whole (it is an activation or a recurrent layer), so that calls inside it are not sites of their own."""


@dataclass
class Found:
    """The modules that a walk over a model finds. It holds strong references to them, so it must not be kept after the observation was opened."""

    model: nn.Module
    modules: list[NamedModule] = field(default_factory=list)
    """Every module, for sources that look for other kinds of modules than the walk sorts out. The name of the model itself is empty."""
    activations: list[ActivationModule] = field(default_factory=list)
    own: list[NamedModule] = field(default_factory=list)
    """Modules without children, of the user's own types, which may be activations. Whether they are shows only when they run."""
    layers: list[NamedModule] = field(default_factory=list)
    recurrent: list[NamedModule] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """The places of function calls that modules of torch.nn are known to make, such as `attn/softmax`."""
    callers: list[CallingModule] = field(default_factory=list)
    unmeasurable: list[tuple[str, str]] = field(default_factory=list)
    """(place, reason) of each module that is recognised and cannot be measured."""

    @property
    def names(self) -> list[str]:
        """Names of the sites that are modules, whether or not they run."""
        return [each.name for each in self.activations]

    @property
    def signature(self) -> tuple[tuple[str, int, str | None], ...]:
        """A value that stays equal as long as the model has the same sites and the same layers."""
        sites = ((each.name, id(each.module), None) for each in self.activations)
        return (*sites, *((each.name, id(each.module), why_unmeasured(each.module)) for each in self.layers))


def clean(path: str) -> str:
    """A module path as a site name: without the wrappers of torch, and without characters outside [A-Za-z0-9_./-]."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", _WRAPPERS.sub("", path).strip("."))


def find(
    model: nn.Module,
    activation_of: Callable[[nn.Module], Activation | None],
    may_be_own: Callable[[nn.Module], bool],
    selects: Callable[[str], bool],
) -> Found:
    """The sites and layers of a model, by type of module.

    Args:
        activation_of: the row of the table that a module computes, if any.
        may_be_own: whether this module may be an activation that the user has written.
        selects: whether a site of this name is wanted.
    """
    found, taken = Found(model), set[str]()
    for name, module in _named(model):
        if internals.runs_no_hooks(module):
            place = name or type(module).__name__
            if selects(place):
                found.unmeasurable.append((place, _SCRIPTED if isinstance(module, torch.jit.ScriptModule) else _REPLICATED))
            continue
        found.modules.append(NamedModule(name, module))
        activation = activation_of(module)
        if activation is not None:
            unique = _unique(name or activation.name, taken)
            if selects(unique):
                found.activations.append(ActivationModule(unique, module, activation))
            found.callers.append(CallingModule(name, module, explained=True))
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            _add_recurrent(found, name, module, selects)
        else:
            _add_other(found, name, module, may_be_own, selects)
    return found


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module with its name, without those inside a module that runs no hooks. The `.module` that a wrapper for data parallelism inside the model
    adds to paths is cut out."""
    modules = list(model.named_modules())
    wrapped = [path for path, module in modules if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))]
    closed = tuple(f"{path}." for path, module in modules if internals.runs_no_hooks(module))
    for path, module in modules:
        if path.startswith(closed):
            continue
        # The innermost wrapper goes first: its own path still contains the `.module` of the outer ones.
        for outer in reversed(wrapped):
            if path.startswith(f"{outer}.module"):
                path = outer + path[len(outer) + len(".module") :]
        yield clean(path), module


def _unique(site: str, taken: set[str]) -> str:
    unique, count = site, 0
    while unique in taken:
        count += 1
        unique = f"{site}_{count}"
    taken.add(unique)
    return unique


def _add_recurrent(found: Found, name: str, module: nn.Module, selects: Callable[[str], bool]) -> None:
    if isinstance(module, RECURRENT) and any(type(module).forward is kind.forward for kind in RECURRENT):
        found.recurrent.append(NamedModule(name or type(module).__name__.lower(), module))
    elif selects(name):
        found.unmeasurable.append((name or type(module).__name__, "a subclass with a forward of its own"))
    found.callers.append(CallingModule(name, module, explained=True))


def _add_other(found: Found, name: str, module: nn.Module, may_be_own: Callable[[nn.Module], bool], selects: Callable[[str], bool]) -> None:
    if is_layer(module):
        found.layers.append(NamedModule(name or "layer", module))
    call = next((call for kind, call in _CALLERS if isinstance(module, kind)), None)
    if call is not None:
        found.calls.append(f"{name}/{call}" if name else call)
    if call is not None or next(module.children(), None) is not None or not type(module).__module__.startswith("torch."):
        found.callers.append(CallingModule(name, module, explained=False))
    if may_be_own(module) and selects(name or type(module).__name__):
        found.own.append(NamedModule(name or type(module).__name__, module))


def stages_of(model: Any) -> dict[str, Any]:
    """The stages of a pipeline by name (`stage0`), if the user gave a stage or a list of those that this rank runs; empty for any other model."""
    given = model if isinstance(model, (list, tuple)) else [model]
    if not given or not all(is_stage(each) for each in given):
        return {}
    return {f"stage{each.stage_index}": each for each in given}


def unwrap(model: Any) -> nn.Module:
    """The module inside its compiled and distributed wrappers.

    Raises:
        TypeError: it cannot be watched; the message says why, and what to do instead.
    """
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "nn.DataParallel cannot be watched: it runs copies of the model that are thrown away after each pass. "
            "Use torch.nn.parallel.DistributedDataParallel, or watch the module inside it on one device."
        )
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TypeError(
            "a TorchScript model cannot be watched: its modules do not run Python hooks. Watch the model that it was made from, and close the "
            "monitor before torch.jit.script."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed are a torch.nn.Module and stages of torch.distributed.pipelining")
    plain: nn.Module = model
    while True:
        inner = internals.compiled_inside(plain)
        if inner is None and isinstance(plain, nn.parallel.DistributedDataParallel):
            inner = plain.module
        if inner is None:
            break
        plain = inner
    if is_flattened(plain):
        raise TypeError(FLATTENED)
    return plain
