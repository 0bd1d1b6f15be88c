"""Where z, a and their gradients come from: module hooks and autograd nodes, open only during an observation.

What it must be right under decides the design:

- z is read in a forward *pre*-hook: after an in-place activation it is overwritten.
- Gradients are read at the autograd node of the activation, whose inputs and outputs are dL/dz through this activation alone and dL/da; a
  tensor hook on z would add what reaches z by other ways (z * sigmoid(z)). An activation of several nodes is read on both sides of it.
  Module backward hooks are never used: they fail on in-place activations.
- A pass counts if it is a training pass: autograd was on when the model was entered, and some part of the model is in training mode.
  A recompute of activation checkpointing runs inside a backward and is not counted again; in reentrant mode only it can see gradients.
- A pass whose gradients were thrown away (a GradScaler's overflow, a batch the user skipped) or whose forward raised is forgotten. When the
  next backward begins tells: the gradients that an earlier one left are gone.
- Hooks do nothing while torch traces or compiles, and never raise: the first fault of a site ends the watching of that site, with a word.
- Hooks on a module become no-ops of the standard library in a copy or a pickle of it.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import Node
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from torchsat.activations import ACTIVATIONS, Activation, Bound, bind, bind_plain
from torchsat.replay import Gate, NotRebuiltError, cell_gates, rnn_gates
from torchsat.statistics import (
    Sample,
    count_units,
    empty_row,
    merge_,
    observe,
    observe_gradient,
    start_over_if_full_,
    upcast,
)
from torchsat.weights import Layer, feature_axis, input_sums, is_layer, why_not, width

NOT_ELEMENTWISE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.RNNBase, "a subclass with a forward of its own"),
    (nn.RNNCellBase, "a subclass with a forward of its own"),
    (nn.MultiheadAttention, "the softmax is computed inside the attention"),
    (nn.TransformerEncoderLayer, "its activation is a function call, not a module"),
    (nn.TransformerDecoderLayer, "its activation is a function call, not a module"),
    (nn.GLU, "not an element-wise function"),
    (nn.Softmax, "not an element-wise function"),
    (nn.Softmin, "not an element-wise function"),
    (nn.Softmax2d, "not an element-wise function"),
    (nn.LogSoftmax, "not an element-wise function"),
)
MODEL = "(model)"
"""The place of a fault that ends the whole observation."""
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")
_MATRIX_PRODUCT = re.compile(r"Addmm|^Mm|Bmm|Baddbmm|Convolution|Matmul|Linear|Attention|Rnn")


class Hook:
    """A hook whose copies and pickles do nothing: they are a function of the standard library, so a saved model never needs torchsat."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling() and not torch._C._is_tracing():
            self.call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __copy__(self) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__


@dataclass(frozen=True)
class Call:
    """What a site keeps between the pre-hook and the hook of one forward call."""

    z: Tensor
    sample: Sample
    taken: Tensor
    """The elements of z, as they were before an in-place activation."""
    node: Node | None
    output_nr: int
    counts: bool
    """False in a recompute: only the gradient is wanted."""


@dataclass(eq=False)
class Pass:
    """What one training pass adds to the observation, until it is known that it counts."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    """By site."""
    blocks: dict[str, Tensor] = field(default_factory=dict)
    """Unit blocks, by site."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Of layers: [samples, sum x, sum x^2] per feature."""
    task: int | None = None
    """The backward that put this pass's gradient into `.grad`."""
    dropped: bool = False

    def add(self, kind: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Merge a row, a unit block or the sums of an input."""
        if self.dropped:
            return
        old = kind.get(name)
        if old is None or old.shape != value.shape:
            kind[name] = value
        elif kind is self.rows:
            merge_(old, value.to(old.device))
        else:
            old += value.to(old.device)

    def drop(self) -> None:
        self.dropped = True
        for kind in (self.rows, self.blocks, self.inputs):
            kind.clear()

    def keep_where(self, alive: Tensor) -> None:
        """Drop, on the device, unless the flag is true."""
        for name, row in self.rows.items():
            self.rows[name] = torch.where(alive.to(row.device), row, empty_row(row.device))
        for kind in (self.blocks, self.inputs):
            for name, value in kind.items():
                kind[name] = value * alive.to(value)

    def settle(self, into: Pass) -> None:
        """Become part of another pass; what still arrives goes there too."""
        for mine, theirs in ((self.rows, into.rows), (self.blocks, into.blocks), (self.inputs, into.inputs)):
            for name, value in mine.items():
                into.add(theirs, name, value)
        self.rows, self.blocks, self.inputs = into.rows, into.blocks, into.inputs


@dataclass(eq=False)
class Site:
    """One place where one activation is computed, and what is known of it."""

    name: str
    bound: Bound
    gate: bool = False
    feeds_on: dict[str, None] = field(default_factory=dict)
    """The layers that feed it, a set in order."""
    traced: bool = False
    """Its place in the graph was seen: what the next two say counts."""
    hidden: bool = False
    """A weight comes after it."""
    reaches_output: bool = False
    """The model's output depends on it through no further weight."""
    output: bool = False
    units: int | None = None
    units_vary: bool = False
    block: Tensor | None = None
    """The unit block of the window so far."""
    row: Tensor | None = None
    """What the observation gave, once it is over."""
    recompute_only: bool = False
    calls: dict[int, Call] = field(default_factory=dict)
    """The forward call under way, by thread."""

    @property
    def is_sigmoid_gate(self) -> bool:
        return self.gate and self.bound.activation.name == "sigmoid"

    def start_over(self) -> None:
        """Forget what depends on the structure of the model."""
        self.feeds_on, self.traced, self.hidden, self.reaches_output, self.output = {}, False, False, False, False
        self.units, self.units_vary, self.block = None, False, None


@dataclass
class Found:
    """What a walk over a model finds."""

    sites: list[tuple[str, nn.Module, Activation]] = field(default_factory=list)
    layers: list[tuple[str, nn.Module]] = field(default_factory=list)
    recurrent: list[tuple[str, nn.Module]] = field(default_factory=list)
    unseen: list[tuple[str, str]] = field(default_factory=list)


def clean(name: str) -> str:
    """A module path as a site name: wrappers of torch removed, nothing outside [A-Za-z0-9_./-]."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", _WRAPPERS.sub("", name).strip("."))


def is_compiled(module: nn.Module) -> bool:
    """Whether this module runs through torch.compile."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def find(model: nn.Module, activation_of: Callable[[nn.Module], Activation | None], selects: Callable[[str], bool]) -> Found:
    """The sites and layers of a model, by type of module."""
    found, taken = Found(), set()
    for path, module in model.named_modules():
        name = clean(path)
        activation = activation_of(module)
        if activation is not None:
            unique = site = name or activation.name
            count = 0
            while unique in taken:
                count += 1
                unique = f"{site}_{count}"
            taken.add(unique)
            if selects(unique):
                found.sites.append((unique, module, activation))
        elif is_layer(module):
            found.layers.append((name or "layer", module))
        elif isinstance(module, RECURRENT) and any(type(module).forward is kind.forward for kind in RECURRENT):
            found.recurrent.append((name or type(module).__name__.lower(), module))
        else:
            reason = next((reason for kind, reason in NOT_ELEMENTWISE if isinstance(module, kind)), None)
            if reason is not None and isinstance(getattr(module, "activation", None), nn.Module):
                continue
            if reason is None and _may_be_activation(module):
                reason = f"{type(module).__name__} is not in the table of activations: if it is one, add a row with activations="
            if reason is not None and selects(name):
                found.unseen.append((name or type(module).__name__, reason))
    return found


def _may_be_activation(module: nn.Module) -> bool:
    """A leaf of the user's own, without state beyond one-dimensional parameters."""
    own = not type(module).__module__.startswith("torch.")
    bare = next(module.children(), None) is None and next(module.buffers(), None) is None
    return own and bare and all(parameter.ndim <= 1 for parameter in module.parameters(recurse=False))


class Taps:
    """The hooks on one model, the sites and layers they feed, and the passes of the current observation.

    Args:
        on_enter, on_leave: called whenever the model is entered or left, with whether it is a training pass.
        gradients: asked when a backward begins, with whether there was an earlier one: (whether it will add to `.grad`, whether what the
            earlier one added is still there; a tensor where only the device knows).
        fault: called with a place and an exception when something went wrong there; that place is then no longer watched.
    """

    def __init__(
        self,
        activations: Sequence[Activation],
        selects: Callable[[str], bool],
        epsilon: float,
        sample: int | None,
        on_enter: Callable[[bool], None],
        on_leave: Callable[[bool], None],
        gradients: Callable[[bool], tuple[bool, bool | Tensor]],
        fault: Callable[[str, Exception], None],
    ) -> None:
        self.activations = activations
        self.selects = selects
        self.epsilon = epsilon
        self.limit = sample
        self.on_enter = on_enter
        self.on_leave = on_leave
        self.gradients = gradients
        self.fault = fault
        self.sites: dict[str, Site] = {}
        """Those that ran, by name, in the order in which they first did."""
        self.layers: dict[str, Layer] = {}
        """What is measured of weights in this observation: every layer while the structure is new, then those that feed a site."""
        self.names: list[str] = []
        """The sites that a walk over the model found, whether or not they ran."""
        self.recurrent: dict[str, bool] = {}
        """The recurrent layers that it found, and whether they ran."""
        self.unseen: list[tuple[str, str]] = []
        self.failed: dict[str, str] = {}
        """Places no longer watched, and why."""
        self.notes: dict[str, str] = {}
        """Places seen in part, and what is missing."""
        self.turn = 0
        self.is_open = False
        self.saw_pass = False
        self._rows: dict[type[nn.Module], Activation | None] = {}
        self._known: dict[str, Site] = {}
        self._structure: tuple[tuple[str, int, str | None], ...] = ()
        self._deciding = True
        """The structure of the model is new: what feeds what, and what is an output, is being found out."""
        self._saw_model = False
        self._handles: list[Any] = []
        self._passes: list[Pass] = []
        """First what is settled, and what ran outside the model's own forward; then one for each pass that may still be discarded."""
        self._running: Pass | None = None
        """The pass whose backward began last: a recompute belongs to it."""
        self._local = threading.local()
        self._last_layer: str | None = None
        self._shapes: dict[str, tuple[int, int]] = {}
        self._weights: dict[int, str] = {}
        self._nodes: dict[Node, Site] = {}
        self._indices: dict[Any, Tensor] = {}

    def open(self, model: nn.Module) -> None:
        """Hook the model as it is now."""
        found = find(model, self._activation_of, self.selects)
        self.names = [name for name, _, _ in found.sites]
        self.recurrent = {name: self.recurrent.get(name, False) for name, _ in found.recurrent}
        self.unseen = list(found.unseen)
        structure = (
            *((name, id(module), None) for name, module, _ in found.sites),
            *((name, id(module), why_not(module)) for name, module in found.layers),
        )
        if structure != self._structure:
            self._structure, self._deciding = structure, True
            for site in self._known.values():
                site.start_over()
        self.is_open, self.saw_pass, self._saw_model = True, False, False
        self._passes = [Pass()]
        self._passing = self._last_layer = self._running = None
        for site in self._known.values():
            site.row, site.recompute_only = None, False
            if site.block is not None:
                start_over_if_full_(site.block)
        self._hook(model, self._guarded(MODEL, self._enter), pre=True)
        for name, module, activation in found.sites:
            if name in self.failed:
                continue
            try:
                site = self._site(name, module, activation)
            except Exception as error:
                self._fail(name, error)
                continue
            self._hook(module, self._guarded(name, self._before_site, site), pre=True, with_kwargs=True)
            self._hook(module, self._guarded(name, self._after_site, site))
        for name, module in found.recurrent:
            calls: list[Any] = []
            self._hook(module, self._guarded(name, self._before_recurrent, calls), pre=True, with_kwargs=True)
            self._hook(module, self._guarded(name, self._after_recurrent, name, calls))
        feeders = self.feeders()
        self._weights, self.layers = {}, {}
        for name, module in found.layers:
            if name in self.failed or not (self._deciding or name in feeders):
                continue
            reason = why_not(module)
            if reason is not None:
                self.unseen.append((name, reason))
                continue
            layer = self.layers[name] = Layer(name, module)
            self._weights[id(module.weight)] = name
            self._hook(module, self._guarded(name, self._before_layer, layer), pre=True, with_kwargs=True)
            self._hook(module, self._guarded(name, self._after_layer, layer))
        # Last of all, so that a model that is itself an activation is still in its pass when its own hook runs.
        self._hook(model, self._guarded(MODEL, self._leave), always_call=True)

    def close(self) -> None:
        """Remove every hook, put together what the passes gave, and forget passes and modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        whole = Pass()
        for each in self._passes:
            each.settle(whole)
        for name, site in self._known.items():
            site.row = whole.rows.get(name)
            block = whole.blocks.get(name)
            if block is not None:
                site.block = block if site.block is None or site.block.shape != block.shape else block.add_(site.block.to(block))
            site.calls.clear()
        for name, layer in self.layers.items():
            layer.inputs = whole.inputs.get(name)
        if self._deciding and self.saw_pass:
            self._deciding = False
            for site in self._known.values():
                site.output = site.traced and not site.hidden and (site.reaches_output or not self._saw_model)
        self._passes, self._nodes, self._indices, self.layers = [], {}, {}, {}
        self._passing = None
        self.is_open = False
        self.turn += 1

    def last_pass(self) -> Pass | None:
        """The newest pass, as a mark for `drop_after`."""
        return self._passes[-1] if self._passes else None

    def drop_after(self, mark: Pass | None) -> None:
        """Forget the passes that began after a mark: they belong to the next step."""
        if mark in self._passes:
            for each in self._passes[self._passes.index(mark) + 1 :]:
                each.drop()

    def feeders(self) -> dict[str, tuple[str, ...]]:
        """The sites that each layer feeds."""
        feeds: dict[str, list[str]] = {}
        for site in self.sites.values():
            for name in site.feeds_on:
                feeds.setdefault(name, []).append(site.name)
        return {name: tuple(sites) for name, sites in feeds.items()}

    def _activation_of(self, module: nn.Module) -> Activation | None:
        kind = type(module)
        if kind not in self._rows:
            self._rows[kind] = next((row for row in self.activations if row.computes(module)), None)
        return self._rows[kind]

    def _site(self, name: str, module: nn.Module, activation: Activation) -> Site:
        site = self._known.get(name)
        if site is None:
            site = self._known[name] = Site(name, bind(activation, module, self.epsilon))
        elif site.bound.activation is not activation or site.bound.learned:
            site.bound = bind(activation, module, self.epsilon)
        return site

    def _hook(self, module: nn.Module, call: Callable[..., None], pre: bool = False, **options: bool) -> None:
        register = module.register_forward_pre_hook if pre else module.register_forward_hook
        self._handles.append(register(Hook(call), **options))

    def _guarded(self, place: str, call: Callable[..., None], *first: Any) -> Callable[..., None]:
        """The call, without gradients and without ever raising: what fails is no longer watched."""

        def run(*args: Any) -> None:
            if not self.is_open or place in self.failed:
                return
            # Whether autograd is on where the hook was called: inside, it is off.
            self._local.grad_enabled = torch.is_grad_enabled()
            try:
                with torch.no_grad():
                    call(*first, *args)
            except Exception as error:
                self._fail(place, error)

        return run

    def _fail(self, place: str, error: Exception) -> None:
        self.failed[place] = f"{type(error).__name__}: {error}"
        for each in self._passes:
            each.rows.pop(place, None)
            each.blocks.pop(place, None)
        self._known.pop(place, None)
        self.sites.pop(place, None)
        self.fault(place, error)

    def _enter(self, model: nn.Module, args: Any) -> None:
        if _in_backward():
            return
        training = self._local.grad_enabled and any(module.training for module in model.modules())
        self._passing = training
        if training:
            self._saw_model, self._last_layer = True, None
            self._nodes.clear()
            self._passes.append(Pass())
            if len(self._passes) > 8:
                self._passes.pop(1).settle(self._passes[0])
        self.on_enter(training)

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        training = self._passing
        if _in_backward() or training is None:
            return
        self._passing = None
        if training and self._passes:
            if output is None and sys.exc_info()[0] is not None:
                self._passes[-1].drop()
            else:
                self._follow(output, self._passes[-1])
            self._nodes.clear()
        self.on_leave(training)

    def _follow(self, output: Any, current: Pass) -> None:
        """From the model's output: hear when its backward begins, and find the sites it depends on through no further weight."""
        leaves = {leaf.grad_fn for leaf in tree_leaves(_opened(output)) if isinstance(leaf, Tensor) and leaf.grad_fn is not None}
        begins = self._guarded(MODEL, self._backward_begins, current)
        for node in leaves:
            node.register_prehook(lambda grad_outputs: begins())
        if self._deciding:
            for node in _upstream(leaves, lambda node: node in self._nodes or _has_weight(node)):
                if node in self._nodes:
                    self._nodes[node].reaches_output = True

    def _backward_begins(self, current: Pass) -> None:
        task = torch._C._current_graph_task_id()
        self._running = current
        if current.task is not None or current.dropped:
            return
        earlier = [each for each in self._passes[1:] if each.task not in (None, task) and not each.dropped]
        adds, alive = self.gradients(bool(earlier))
        if not adds:
            return
        current.task = task
        for each in earlier:
            if isinstance(alive, Tensor):
                each.keep_where(alive)
            elif not alive:
                each.drop()

    def _current(self) -> Pass:
        """The pass that what happens now belongs to."""
        if self._passing:
            return self._passes[-1]
        return self._running if self._running is not None and _in_backward() else self._passes[0]

    @property
    def _passing(self) -> bool | None:
        """Inside the model, on this thread: whether it is a training pass."""
        return getattr(self._local, "passing", None)

    @_passing.setter
    def _passing(self, value: bool | None) -> None:
        self._local.passing = value

    def _counts(self, module: nn.Module) -> bool:
        """Whether this forward call belongs to a training pass."""
        if _in_backward():
            return False
        passing = self._passing
        return passing if passing is not None else self._local.grad_enabled and module.training

    def _before_site(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        site.calls.pop(thread, None)
        counts = self._counts(module)
        if _in_backward():
            site.recompute_only |= not any(site.name in each.rows for each in self._passes)
            counts = site.recompute_only
        elif not counts:
            return
        z = _first_tensor(args, kwargs)
        if not _is_real(z):
            return
        _check_plain(z)
        plain = {name: getattr(module, name) for name in site.bound.plain}
        if plain != site.bound.plain:
            site.bound = bind(site.bound.activation, module, self.epsilon)
        self.saw_pass = True
        sample = Sample.of(z, self.limit, self.turn)
        taken = upcast(sample.take(z.detach()))
        if taken.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() and getattr(module, "inplace", True):
            taken = taken.clone()
        site.calls[thread] = Call(z, sample, taken, z.grad_fn, z.output_nr, counts)

    def _after_site(self, site: Site, module: nn.Module, args: tuple[Any, ...], a: Any) -> None:
        call = site.calls.pop(threading.get_ident(), None)
        if call is None:
            return
        sample = call.sample
        if not isinstance(a, Tensor) or a.shape != torch.Size(sample.shape):
            raise TypeError(f"it maps {sample.shape} to {tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__}")
        if call.counts:
            self.sites.setdefault(site.name, site)
            if self._deciding:
                found = _feeders(call.node, self._weights) or ((self._last_layer,) if self._last_layer else ())
                site.feeds_on.update(dict.fromkeys(found))
            if a.numel():
                self._count(site, sample, call.taken, upcast(sample.take(a.detach())))
        if a.requires_grad and a.grad_fn is not None:
            if self._deciding and not _in_backward():
                self._nodes[a.grad_fn] = site
                site.traced = True
            self._tap_gradient(site, call, a)

    def _count(self, site: Site, sample: Sample, z: Tensor, a: Tensor) -> None:
        bound, current = site.bound, self._current()
        learned = {name: sample.spread(value.to(z.device)).to(z.dtype) for name, value in bound.learned.items()}
        slope, peak, edges = bound.evaluate(torch.where(torch.isfinite(z), z, torch.zeros_like(z)), a, learned)
        row, finite, saturated = observe(z, a, slope, peak, edges, torch.Size(sample.shape).numel(), site.is_sigmoid_gate)
        current.add(current.rows, site.name, row)
        axis = self._unit_axis(site, sample.shape)
        size = None if axis is None or site.units_vary else sample.shape[axis]
        if site.units is not None and size != site.units:
            size, site.units_vary = None, True
        site.units = size
        if axis is None or size is None:
            site.block = None
            for each in self._passes:
                each.blocks.pop(site.name, None)
            return
        key = (sample, axis, z.device)
        if key not in self._indices:
            self._indices[key] = sample.units(axis, z.device)
        current.add(current.blocks, site.name, count_units(finite, saturated, self._indices[key], size))

    def _unit_axis(self, site: Site, shape: tuple[int, ...]) -> int | None:
        """The axis of channels or features: that of the layer which feeds the site, where the sizes agree; else by rank."""
        for name in site.feeds_on:
            out, from_end = self._shapes.get(name, (-1, 0))
            if 0 < from_end <= len(shape) and shape[-from_end] == out:
                return len(shape) - from_end
        return {0: None, 1: None, 2: 1, 3: 2}.get(len(shape), 1)

    def _tap_gradient(self, site: Site, call: Call, a: Tensor) -> None:
        # The hooks below live on nodes of the graph and must not hold its tensors, z above all: such a ring is never freed.
        turn, sample, z_nr, a_nr, own, node = self.turn, call.sample, call.output_nr, a.output_nr, a.grad_fn, call.node
        current = self._current()
        assert own is not None

        def add(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            given = [grad for grad in (grad_a, grad_z) if grad is not None]
            if turn != self.turn or not given or not given[0].numel():
                return
            taken = [None if grad is None else upcast(sample.take(grad.detach().reshape(sample.shape))) for grad in (grad_a, grad_z)]
            current.add(current.rows, site.name, observe_gradient(*taken))

        add_both = self._guarded(site.name, add)
        entering = [at for at, (before, _) in enumerate(own.next_functions) if before is not None]
        if node is not None and len(entering) == 1 and own.next_functions[entering[0]][0] is node:
            at = entering[0]
            own.register_hook(lambda grad_inputs, grad_outputs: add_both(grad_outputs[0], grad_inputs[at]))
            return
        if a is call.z and node is not None:
            # In place on a view: the graph goes on from the whole tensor that z is a view of.
            whole = next((before for before, _ in own.next_functions if before is not None), None)
            base = a._base
            covers = base is not None and base.numel() == a.numel() and base.is_contiguous() and a.is_contiguous()
            if whole is not None and whole.name().endswith("CopySlices") and covers:
                whole.register_hook(lambda grad_inputs, grad_outputs: add_both(grad_outputs[0], grad_inputs[0]))
                return
            self.notes[site.name] = "its gradient is not seen: an in-place activation on a part of a tensor"
            return
        if node is not None:
            node.register_prehook(lambda grad_outputs: add_both(None, grad_outputs[z_nr]))
        elif call.z.requires_grad and call.z.is_leaf:
            # The leaf outlives the pass: unlike a node's, its hook must be taken off.
            self._handles.append(call.z.register_hook(lambda grad: add_both(None, grad)))  # type: ignore[no-untyped-call]
        own.register_prehook(lambda grad_outputs: add_both(grad_outputs[a_nr], None))

    def _before_recurrent(self, calls: list[Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counts(module):
            return
        calls.clear()
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        drawn = isinstance(module, nn.RNNBase) and module.dropout > 0 and module.training and module.num_layers > 1
        calls.append((given["input"], given.get("hx"), torch.get_rng_state() if drawn else None))

    def _after_recurrent(self, name: str, calls: list[Any], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not calls or not self._counts(module):
            return
        x, state, random = calls.pop()
        plain = x.data if isinstance(x, PackedSequence) else x
        if not plain.numel() or not _is_real(plain):
            return
        _check_plain(plain)
        self.saw_pass = self.recurrent[name] = True
        gates = cell_gates(module, x, state) if isinstance(module, nn.RNNCellBase) else rnn_gates(cast(nn.RNNBase, module), x, state, random)
        try:
            for gate in gates:
                place = f"{name}.{gate.layer}/{gate.name}" if gate.layer else f"{name}/{gate.name}"
                if self.selects(place):
                    self._count_gate(place, gate, gated=not isinstance(module, (nn.RNN, nn.RNNCell)))
        except NotRebuiltError as reason:
            self.notes[f"{name}, upper layers"] = str(reason)

    def _count_gate(self, place: str, gate: Gate, gated: bool) -> None:
        site = self._known.get(place)
        if site is None:
            row = next(row for row in (*self.activations, *ACTIVATIONS) if row.name == gate.function)
            site = self._known[place] = Site(place, bind_plain(row, self.epsilon), gate=gated)
        self.sites.setdefault(place, site)
        sample = Sample.of(gate.z, self.limit, self.turn)
        z = upcast(sample.take(gate.z))
        self._count(site, sample, z, getattr(torch, gate.function)(z))

    def _before_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counts(module):
            return
        x = _first_tensor(args, kwargs)
        if not _is_real(x) or not x.is_floating_point() or not x.numel() or x.layout != torch.strided or type(x) not in (Tensor, nn.Parameter):
            return
        current = self._current()
        current.add(current.inputs, layer.name, input_sums(module, x, Sample.of(x, self.limit, self.turn)))
        if self._deciding and self._nodes:
            for node in _upstream([x.grad_fn], lambda node: node in self._nodes or _has_weight(node)):
                if node in self._nodes:
                    self._nodes[node].hidden = True

    def _after_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and self._counts(module):
            self._last_layer = layer.name
            self._shapes[layer.name] = (width(module), output.ndim - feature_axis(module, output.ndim))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _first_tensor(args: Iterable[Any], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("it was called without a tensor")


def _is_real(z: Tensor) -> bool:
    """Whether the tensor holds numbers of this run: not a stand-in for shapes, nor one row of a torch.func transform."""
    return not (z.is_meta or isinstance(z, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(z))


def _check_plain(z: Tensor) -> None:
    if z.is_nested or z.layout != torch.strided or not z.is_floating_point():
        raise TypeError(f"its input is a {'nested ' if z.is_nested else ''}{z.dtype} tensor of layout {z.layout}, not a dense tensor of real numbers")
    if type(z) not in (Tensor, nn.Parameter):
        raise TypeError(f"its input is a {type(z).__name__}, not a plain tensor")


def _opened(output: Any) -> Any:
    """A dataclass or other object with attributes as a dict, so that its tensors can be found."""
    if isinstance(output, (Tensor, tuple, list, dict)):
        return dict(output) if isinstance(output, dict) else output
    return vars(output) if hasattr(output, "__dict__") else output


def _upstream(starts: Iterable[Node | None], stop: Callable[[Node], bool], limit: int = 512) -> Iterator[Node]:
    """The nodes that lead to these, breadth first, not beyond those where `stop` holds."""
    queue, met = deque(node for node in starts if node is not None), set[Node]()
    while queue and len(met) < limit:
        node = queue.popleft()
        if node in met:
            continue
        met.add(node)
        yield node
        if not stop(node):
            queue.extend(before for before, _ in node.next_functions if before is not None)


def _parameters(node: Node) -> Iterator[Tensor]:
    """The leaves that enter a node directly, or through a few casts, views and transposes."""
    for start, _ in node.next_functions:
        before: Node | None = start
        for _ in range(4):
            if before is None:
                break
            variable = getattr(before, "variable", None)
            if variable is not None:
                yield variable
                break
            following = [child for child, _ in before.next_functions if child is not None]
            before = following[0] if len(following) == 1 and len(before.next_functions) == 1 else None


def _has_weight(node: Node) -> bool:
    return bool(_MATRIX_PRODUCT.search(node.name())) or any(leaf.ndim >= 2 and leaf.requires_grad for leaf in _parameters(node))


def _feeders(node: Node | None, weights: dict[int, str]) -> tuple[str, ...]:
    """The layers whose weights are the first met on the way back from z."""
    names: dict[str, None] = {}
    for met in _upstream([node], _has_weight):
        names.update((weights[id(leaf)], None) for leaf in _parameters(met) if id(leaf) in weights)
    return tuple(names)
