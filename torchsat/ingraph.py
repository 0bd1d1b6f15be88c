"""Measuring inside a compiled graph: `watch(model, compiled="in_graph")`.

Hooks that are there before torch.compile are compiled with the model. What ours add are operators that torch.compile can neither look into nor
leave out nor move past each other (an ordered effect). At run time such an operator calls the monitor, which measures z, a or a gradient there
and then, with the kernels of eager observation, if the step is observed, and returns at once if it is not: so switching observation on and off
compiles nothing anew.

Which site is measured is told by a slot, a tensor of one number on the CPU. A plain number would be compiled into the graph, and each of many equal
blocks would get a graph of its own. A gradient is reached by an identity with a backward of its own, put before and after the activation:
the one before sees what reaches z through this activation alone. It copies, since a view would forbid an in-place operation behind it; the
compiler makes the copy vanish.

In eager execution these hooks do nothing, so that a step observed in eager counts nothing twice.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchsat.taps import Inert


class Listener(Protocol):
    """Who is told."""

    def heard_site(self, name: str, z: Tensor, a: Tensor | None) -> None: ...
    def heard_gradient(self, name: str, grad: Tensor, of_output: bool) -> None: ...
    def heard_layer(self, name: str, x: Tensor) -> None: ...


_listening: dict[int, tuple[weakref.ref[Any], str]] = {}
"""By slot: the listener, and the name of its site or layer."""
_slots = itertools.count()
_library: torch.library.Library | None = None
_OPERATORS = {
    "observe(Tensor z, Tensor? a, Tensor slot) -> ()": lambda z, a, slot: _tell(slot, "heard_site", z, a),
    "gradient(Tensor grad, Tensor slot, bool of_output) -> ()": lambda grad, slot, of_output: _tell(slot, "heard_gradient", grad, of_output),
    "layer(Tensor x, Tensor slot) -> ()": lambda x, slot: _tell(slot, "heard_layer", x),
}


def _tell(slot: Tensor, what: str, *given: Any) -> None:
    listener, name = _listening.get(int(slot), (_nobody, ""))
    who = listener()
    if who is not None:
        getattr(who, what)(name, *given)


def _nobody() -> None:
    """No listener."""


def why_not() -> str | None:
    """Why this torch cannot measure inside a compiled graph; None: it can. The first call defines the operators."""
    global _library
    if _library is not None:
        return None
    if torch.__version__ < "2.8":
        return f"torch {torch.__version__} compiles anew for each of many equal blocks"
    try:
        from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
    except ImportError:
        return f"torch {torch.__version__} has no ordered effects for operators"
    if not hasattr(torch._dynamo.config, "skip_nnmodule_hook_guards"):
        return f"torch {torch.__version__} cannot be told to compile anew for a model with other hooks"
    # CUDA graphs replay kernels and no Python: where they are recorded, these operators must run between them.
    outside = [tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None]
    library: Any = torch.library.Library("torchsat", "DEF")
    for schema, run in _OPERATORS.items():
        name = schema.partition("(")[0]
        library.define(schema, tags=outside)
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"torchsat::{name}", lambda *given: None, lib=library)
        _register_effectful_op(getattr(torch.ops.torchsat, name).default, _EffectType.ORDERED)
    _library = library
    return None


class _Identity(torch.autograd.Function):
    """The same numbers; its backward shows the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, of_output: bool) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.of_output = of_output
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        torch.ops.torchsat.gradient(grad.detach(), *ctx.saved_tensors, ctx.of_output)
        return grad, None, None


def _measures(module: nn.Module, x: Any) -> bool:
    """Whether this call is compiled and part of a training pass. All of it is decided while compiling."""
    return (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and module.training
        and isinstance(x, Tensor)
        and x.is_floating_point()
        and x.numel() > 0
    )


class _Wire(Inert):
    """A hook that is compiled with its module."""

    def __init__(self, slot: Tensor) -> None:
        self.slot = slot


class _BeforeSite(_Wire):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not _measures(module, args[0]):
            return None
        if getattr(module, "inplace", False):
            # Behind the activation z is overwritten; what it becomes is computed again from the elements that are read.
            torch.ops.torchsat.observe(args[0].detach(), None, self.slot)
        return (_Identity.apply(args[0], self.slot, False), *args[1:])  # type: ignore[no-untyped-call]


class _AfterSite(_Wire):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], a: Any) -> Tensor | None:
        if not args or not _measures(module, args[0]) or not isinstance(a, Tensor):
            return None
        if not getattr(module, "inplace", False):
            torch.ops.torchsat.observe(args[0].detach(), a.detach(), self.slot)
        identity: Tensor = _Identity.apply(a, self.slot, True)  # type: ignore[no-untyped-call]
        return identity


class _BeforeLayer(_Wire):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and _measures(module, args[0]):
            torch.ops.torchsat.layer(args[0].detach(), self.slot)


class Wires:
    """The hooks of one monitor that are compiled with its model."""

    def __init__(self, listener: Listener) -> None:
        self._listener = weakref.ref(listener)
        self._handles: list[Any] = []
        self._taken: list[int] = []

    def lay(self, sites: Iterable[tuple[str, nn.Module]], layers: Iterable[tuple[str, nn.Module]]) -> None:
        """Hook these modules."""
        for name, module in sites:
            slot = self._slot(name)
            self._handles.append(module.register_forward_pre_hook(_BeforeSite(slot)))
            self._handles.append(module.register_forward_hook(_AfterSite(slot)))
        for name, module in layers:
            self._handles.append(module.register_forward_pre_hook(_BeforeLayer(self._slot(name))))

    def cut(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        for slot in self._taken:
            _listening.pop(slot, None)
        self._handles, self._taken = [], []

    def _slot(self, name: str) -> Tensor:
        number = next(_slots)
        _listening[number] = self._listener, name
        self._taken.append(number)
        return torch.tensor(number, device="cpu")
