"""Measures activations inside a compiled graph: `watch(model, compiled="in_graph")`.

Hooks that are on a module before torch.compile runs are compiled with it. Ours add operators to the graph that torch.compile can neither look into
nor leave out nor move past each other (they have an *ordered effect*). At run time such an operator calls the monitor. If the step is observed, z, a
or a gradient is measured at once, with the kernels of eager observation; otherwise the operator returns at once. So nothing is compiled again when an
observation begins or ends.

Each operator is given a *slot*, a CPU tensor that holds one number, which says which site or layer is measured. A plain number would be compiled into
the graph, and each of many equal blocks would get a graph of its own. Gradients are read by an identity function with a backward of our own, which is
put before and after the activation; the one before it sees only what reaches z through this activation. The identity returns a copy, since torch
would forbid in-place operations on a view that it returns; the compiler removes the copy.

In eager execution these hooks do nothing, so that a step that is observed there counts nothing twice. The hooks (`GraphHooks`) live as long as the
monitor. What the operators measure goes to the observation that is open (`GraphReceiver`); between observations they do nothing.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchsat import internals
from torchsat.attributes import stored_or
from torchsat.observe import saving
from torchsat.observe.hooks import Inert
from torchsat.observe.meter import sides_at
from torchsat.sampling import Sample
from torchsat.statistics import DEMAND, Sides, extremes, merge_, observe_gradient
from torchsat.structure import Found, NamedModule
from torchsat.weights import why_unmeasured

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

_slots: dict[int, tuple[weakref.ref[GraphHooks], str]] = {}
"""For the number in each slot, the hooks that it belongs to, and the name of the site or layer."""
_numbers = itertools.count()
_library: torch.library.Library | None = None


def _receiver(slot: Tensor) -> tuple[GraphReceiver | None, str]:
    """The receiver that measures at this slot, None where no observation is open, and the name of the site or layer."""
    known = _slots.get(int(slot))
    hooks = None if known is None else known[0]()
    return (None, "") if known is None or hooks is None else (hooks.receiver, known[1])


def _observe(z: Tensor, a: Tensor | None, slot: Tensor) -> None:
    receiver, name = _receiver(slot)
    if receiver is not None:
        receiver.heard_site(name, z, a)


def _gradient(grad: Tensor, slot: Tensor, of_output: bool) -> None:
    receiver, name = _receiver(slot)
    if receiver is not None:
        receiver.heard_gradient(name, grad, of_output)


def _layer(x: Tensor, slot: Tensor) -> None:
    receiver, name = _receiver(slot)
    if receiver is not None:
        receiver.heard_layer(name, x)


_OPERATORS = {
    "observe(Tensor z, Tensor? a, Tensor slot) -> ()": _observe,
    "gradient(Tensor grad, Tensor slot, bool of_output) -> ()": _gradient,
    "layer(Tensor x, Tensor slot) -> ()": _layer,
}


def why_not_in_graph() -> str | None:
    """Why this torch cannot measure inside a compiled graph; None where it can. The first call defines the operators."""
    global _library
    if _library is not None:
        return None
    if torch.__version__ < "2.8":
        return f"torch {torch.__version__} compiles anew for each of many equal blocks"
    declare = internals.ordered_effect()
    if declare is None:
        return f"torch {torch.__version__} has no ordered effects for operators"
    if not internals.can_guard_hooks():
        return f"torch {torch.__version__} cannot be told to compile anew for a model with other hooks"
    library: Any = torch.library.Library("torchsat", "DEF")
    for schema, run in _OPERATORS.items():
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"torchsat::{name}", lambda *given: None, lib=library)
        declare(getattr(torch.ops.torchsat, name).default)
        # A CUDA graph replays kernels and no Python, so the operator has to run between the graphs of a compiled model.
        internals.keep_out_of_cuda_graphs(f"torchsat::{name}")
    _library = library
    return None


class _Identity(torch.autograd.Function):
    """Returns its input. Its backward hands the gradient to the monitor and returns it unchanged."""

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
    """Whether this call is compiled and part of a training pass. The compiler decides this once, while it compiles."""
    return (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and module.training
        and isinstance(x, Tensor)
        and x.is_floating_point()
        and x.numel() > 0
    )


class _CompiledHook(Inert):
    """A hook that is compiled with its module."""

    def __init__(self, slot: Tensor, owner: object) -> None:
        self.slot = slot
        self.owner = owner


class _BeforeSite(_CompiledHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not _measures(module, args[0]):
            return None
        if getattr(module, "inplace", False):
            # After the activation z is overwritten, so it is read here; a is computed again from the elements that are read.
            torch.ops.torchsat.observe(args[0].detach(), None, self.slot)
        return (_Identity.apply(args[0], self.slot, False), *args[1:])  # type: ignore[no-untyped-call]


class _AfterSite(_CompiledHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], a: Any) -> Tensor | None:
        if not args or not _measures(module, args[0]) or not isinstance(a, Tensor):
            return None
        if not getattr(module, "inplace", False):
            torch.ops.torchsat.observe(args[0].detach(), a.detach(), self.slot)
        identity: Tensor = _Identity.apply(a, self.slot, True)  # type: ignore[no-untyped-call]
        return identity


class _BeforeLayer(_CompiledHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and _measures(module, args[0]):
            torch.ops.torchsat.layer(args[0].detach(), self.slot)


class GraphHooks:
    """The hooks of one monitor that are compiled with its model."""

    def __init__(self) -> None:
        self.receiver: GraphReceiver | None = None
        """The receiver of the observation that is open; None between observations."""
        self._signature: tuple[Any, ...] = ()
        """The signature of the modules that are hooked (`Found.signature`)."""
        self._handles: list[Any] = []
        self._slots: list[int] = []
        self._model: Callable[[], nn.Module | None] = lambda: None

    def put_on(self, found: Found) -> None:
        """Hook the modules that were found, in place of those that were hooked before, unless they are the same."""
        signature = found.signature
        if signature == self._signature:
            return
        self.take_off()
        self._signature = signature
        self._model = weakref.ref(found.model)
        saving.leave_out(self)
        # RReLU draws its slope at random, so |f'| needs both z and a, and an in-place one has overwritten z by the time a is there.
        self._hook_sites(each for each in found.activations if not (each.activation.from_output and stored_or(each.module, "inplace", False)))
        for each in found.layers:
            if why_unmeasured(each.module) is None:
                self._handles.append(each.module.register_forward_pre_hook(_BeforeLayer(self._slot(each.name), self)))

    def _hook_sites(self, sites: Iterable[NamedModule]) -> None:
        for each in sites:
            slot = self._slot(each.name)
            self._handles.append(each.module.register_forward_pre_hook(_BeforeSite(slot, self)))
            self._handles.append(each.module.register_forward_hook(_AfterSite(slot, self)))

    def take_off(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        for slot in self._slots:
            _slots.pop(slot, None)
        self._handles, self._slots, self._signature = [], [], ()
        saving.all_off(self, self._model())

    def _slot(self, name: str) -> Tensor:
        number = next(_numbers)
        _slots[number] = weakref.ref(self), name
        self._slots.append(number)
        return torch.tensor(number, device="cpu")


class _Calls:
    """The calls of a site from its first one in a forward pass until their gradients have come.

    A gradient does not say which call it belongs to. Autograd runs what is ready in the reverse order of the forward pass, so the gradients of the
    calls come in their reverse order, if every call gets one. Whether that is so is known when the last one has come; the demand is added then.
    """

    def __init__(self) -> None:
        self.sides: list[Sides | None] = []
        """The sides of the elements of each call."""
        self.has_gradient = False
        """Whether the gradient of one of them has come."""
        self._demand: Tensor | None = None

    def add(self, grad_a: Tensor, elements: int, row: Tensor | None) -> Tensor:
        """Merge the next gradient into a row, and return it."""
        self.has_gradient = True
        found = observe_gradient(grad_a, None, elements, None, self.sides.pop() if self.sides else None)
        demand = found[DEMAND].clone()
        self._demand = demand if self._demand is None else self._demand + demand
        found[DEMAND] = 0 if self.sides else self._demand
        return found if row is None else merge_(row, found)


class GraphReceiver:
    """Measures the tensors that the compiled graph hands over during one observation."""

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self._samples: dict[str, Sample] = {}
        """The elements that were read in the last call of each site. Its gradients are read at the same elements."""
        self._calls: dict[str, _Calls] = {}
        """The calls of each site whose gradient has not come yet."""

    def heard_site(self, name: str, z: Tensor, a: Tensor | None) -> None:
        """Called by the graph at a site, with z, and with a unless the activation overwrites z."""
        self._observation.guard(name, self._count, name)(z, a)

    def heard_gradient(self, name: str, grad: Tensor, of_output: bool) -> None:
        """Called by the backward of the graph at a site, with dL/da (`of_output`) or dL/dz."""
        self._observation.guard(name, self._add_gradient, name)(grad, of_output)

    def heard_layer(self, name: str, x: Tensor) -> None:
        """Called by the graph at a layer, with its input x."""
        layer = self._observation.layers.measured.get(name)
        module = layer.module() if layer is not None else None
        if module is not None:
            self._observation.guard(name, self._observation.layers.feed, name, module)(x)

    def _count(self, name: str, z: Tensor, a: Tensor | None) -> None:
        observation = self._observation
        site = observation.sites.known.get(name)
        if site is None:
            return
        sample = observation.meter.read_call(site, z, a is None)
        taken = sample.take(z)
        if a is None:
            function = site.bound.activation.function or site.bound.activation.calls[0]
            made = function(taken.clone(), **site.bound.plain, **{name: sample.spread(value) for name, value in site.bound.learned.items()})
        else:
            made = sample.take(a)
        exact = None if sample.is_whole else extremes(z, a)
        if exact is not None and a is None:
            # What is computed again is no exact extreme of a. An infinite one stands for one that is unknown.
            exact[3:] = math.inf
        self._samples[name] = sample
        calls = self._calls.get(name)
        if calls is None or calls.has_gradient:
            calls = self._calls[name] = _Calls()
        calls.sides.append(sides_at(site, sample, taken))
        # The place of a site in the model cannot be seen from inside a graph.
        observation.heard_graph()
        observation.meter.ran(site, [])
        observation.meter.count(site, sample, taken, made, exact=exact)
        observation.meter.formats.add(site.name, "z", z)
        if a is not None:
            observation.meter.formats.add(site.name, "a", a)

    def _add_gradient(self, name: str, grad: Tensor, of_output: bool) -> None:
        sample, calls = self._samples.get(name), self._calls.get(name)
        if sample is None or sample.shape != tuple(grad.shape):
            calls, sample = None, self._observation.meter.sample_of(grad, name)
        taken, always = sample.take(grad), self._observation.passes.always
        row = always.place(always.rows, name, grad.device)
        if of_output and calls is not None:
            row = calls.add(taken, sample.elements, row)
        else:
            row = observe_gradient(taken if of_output else None, None if of_output else taken, sample.elements, row)
        always.put(always.rows, name, row)
        self._observation.meter.formats.add(name, "grad_a" if of_output else "grad_z", grad, always)


def attach(observation: Observation, found: Found) -> None:
    """Bind the sites and choose the layers that the graph will report. Its hooks are on the model already."""
    observation.layers.choose(found)
    for each in found.activations:
        if not observation.sites.has_failed(each.name):
            observation.sites.bind(each.name, each.module, each.activation)
