"""Where z, a and their gradients come from: module hooks, function calls and autograd nodes, open only during an observation.

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
import dataclasses
import functools
import math
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import Node
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from torchsat.activations import ACTIVATIONS, Activation, Bound, Edges, bind, bind_call, bind_plain, differentiated, fits, is_function, recognise
from torchsat.calls import ROLES, UNSEEN, Frame, Listener, Role, takes_fused_path
from torchsat.graph import MOST_NODES, Survey, derivative, ends, has_weight, saving_is_hooked
from torchsat.kernels import reads_whole
from torchsat.kernels.formulas import Formula
from torchsat.record import Kind
from torchsat.replay import Gate, Logits, NotRebuiltError, SoftmaxRows, attention_logits, cell_gates, rnn_gates
from torchsat.statistics import (
    Sample,
    Units,
    empty_row,
    known_slope,
    merge_,
    merge_heads_,
    observe,
    observe_gradient,
    observe_softmax,
    start_over_if_full_,
    upcast,
)
from torchsat.weights import Layer, feature_axis, input_sums, is_layer, is_pending, local, placement, why_not, width

MODEL = "(model)"
"""The place of a fault that ends the whole observation."""
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")
_MISSES = 5
"""Observations without a site before that is said: layers dropped at random and idle experts come back."""
_AUTO = 65536
"""The most elements read of a call where the user has not said how many."""
_PRODUCT = re.compile(r"Bmm|Baddbmm|Matmul")
_GATES = ("sigmoid", "hardsigmoid")
_UNKNOWN: Any = object()
_NOT_DIFFERENTIATED = "it may be an activation, but its derivative cannot be had inside a checkpoint: name it in activations="
_TRIES = 20
"""Calls in which a module was linear before it is taken to be so."""
_NOT_IN_GRAPH = "measured in eager steps only: in a compiled graph the activations of modules are heard, not function calls, gates or attention"
_TAKEN_FOR_REPEATED = "taken to be the same on all ranks of tensor parallelism, and counted on the first: other parts of a sequence are not seen"
_STOPPED = f"it ran before, but not in the last {_MISSES} observations"
_SOFTMAX = Bound(Activation("softmax"), lambda z: z, {}, {}, 0.0, None)
"""What a softmax has instead of a function of one element."""


class Inert:
    """A hook whose copies and pickles do nothing: they are a function of the standard library, so a saved model never needs torchsat."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__

    def __copy__(self) -> Callable[..., None]:
        return contextlib.nullcontext().__exit__


class Hook(Inert):
    """A hook of eager execution."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling() and not torch._C._is_tracing():
            self.call(*args)


@dataclass(frozen=True)
class Call:
    """What a site keeps between the pre-hook and the hook of one forward call."""

    z: Tensor
    sample: Sample | SoftmaxRows
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
    heads: dict[str, Tensor] = field(default_factory=dict)
    """Of softmaxes, by site."""
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
        elif kind is self.heads:
            merge_heads_(old, value.to(old.device))
        else:
            old += value.to(old.device)

    def place(self, kind: dict[str, Tensor], name: str, device: torch.device) -> Tensor | None:
        """What is there to merge into in place, on this device."""
        there = kind.get(name)
        return there if there is not None and there.device == device else None

    def put(self, kind: dict[str, Tensor], name: str, value: Tensor) -> None:
        """What `place` gave, merged in place, or something new."""
        if value is not kind.get(name):
            self.add(kind, name, value)

    def merge_inputs(self, name: str, x: Tensor, axis: int, limit: int | None, turn: int) -> None:
        """Merge the sums of an input x of a layer."""
        sums = self.place(self.inputs, name, x.device)
        self.put(self.inputs, name, input_sums(x, axis, limit, turn, sums if sums is not None and sums.shape[1] == x.shape[axis] else None))

    def drop(self) -> None:
        self.dropped = True
        for kind in (self.rows, self.blocks, self.heads, self.inputs):
            kind.clear()

    def keep_where(self, alive: Tensor) -> None:
        """Drop, on the device, unless the flag is true."""
        for name, row in self.rows.items():
            self.rows[name] = torch.where(alive.to(row.device), row, empty_row(row.device))
        for kind in (self.blocks, self.inputs):
            for name, value in kind.items():
                kind[name] = value * alive.to(value)
        for name, heads in self.heads.items():
            nothing = torch.zeros_like(heads)
            nothing[-1] = -math.inf
            self.heads[name] = torch.where(alive.to(heads.device), heads, nothing)

    def settle(self, into: Pass) -> None:
        """Become part of another pass; what still arrives goes there too."""
        pairs = ((self.rows, into.rows), (self.blocks, into.blocks), (self.heads, into.heads), (self.inputs, into.inputs))
        for mine, theirs in pairs:
            for name, value in mine.items():
                into.add(theirs, name, value)
        self.rows, self.blocks, self.heads, self.inputs = into.rows, into.blocks, into.heads, into.inputs


@dataclass(frozen=True)
class Share:
    """One rank's share in the units of a site, or in the output of a layer."""

    units: int | None
    """Of all ranks."""
    first: int
    """Where this rank's begin."""
    counts: bool
    """False where another rank holds the very same elements, and counts them."""
    width: int = 0
    """How many of a layer's outputs this rank makes."""


@dataclass(eq=False)
class Site:
    """One place where one activation is computed, and what is known of it."""

    name: str
    bound: Bound
    kind: Kind = "module"
    gate: bool = False
    feeds_on: dict[str, None] = field(default_factory=dict)
    """The layers that feed it, a set in order."""
    after: dict[str, None] = field(default_factory=dict)
    """The sites that its input depends on most directly."""
    traced: bool = False
    """Its place in the graph was seen: what the next two say counts."""
    hidden: bool = False
    """A weight comes after it."""
    reaches_output: bool = False
    """The model's output depends on it through no further weight."""
    output: bool = False
    decided: bool = False
    """Its place in the model has been found out."""
    multiplies: bool = False
    """Its output multiplies another signal."""
    units: int | None = None
    units_vary: bool = False
    share: Share | None = None
    """Where z is a tensor that knows how it is spread over ranks."""
    head_count: int | None = None
    """Of a softmax; None: it is no softmax, or its heads are not always as many."""
    block: Tensor | None = None
    """The unit block of the window so far; of the last observation alone where `Taps.keeps_windows` is off."""
    row: Tensor | None = None
    """What the observation gave, once it is over."""
    heads: Tensor | None = None
    is_attention: bool | None = None
    """Of a softmax over four axes: whether its logits are those of attention; None: not known."""
    doubt: Tensor | None = None
    """Whether a recognised function has turned out to be another one, on its way to the host."""
    missed: int = 0
    """Observations in a row in which it did not run."""
    recompute_only: bool = False
    calls: dict[int, Call] = field(default_factory=dict)
    """The forward call under way, by thread."""

    def start_over(self) -> None:
        """Forget what depends on the structure of the model."""
        self.feeds_on, self.after = {}, {}
        self.traced = self.hidden = self.reaches_output = self.output = self.decided = self.multiplies = False
        self.units, self.units_vary, self.block = None, False, None


class Stages(nn.ModuleDict):
    """The stages of a pipeline that one rank runs: entered one by one, never as a whole."""


@dataclass
class Found:
    """What a walk over a model finds."""

    sites: list[tuple[str, nn.Module, Activation]] = field(default_factory=list)
    own: list[tuple[str, nn.Module]] = field(default_factory=list)
    """Modules of the user's that may be activations: only what they do will tell."""
    layers: list[tuple[str, nn.Module]] = field(default_factory=list)
    recurrent: list[tuple[str, nn.Module]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """The function calls that modules of torch.nn are known to make."""
    unseen: list[tuple[str, str]] = field(default_factory=list)
    places: list[tuple[str, nn.Module, bool]] = field(default_factory=list)
    """Modules in whose forward a function may be called; of those marked true, all that happens inside is accounted for."""

    @property
    def structure(self) -> tuple[tuple[str, int, str | None], ...]:
        """What two models of the same sites and layers have in common."""
        sites = ((name, id(module), None) for name, module, _ in self.sites)
        return (*sites, *((name, id(module), why_not(module)) for name, module in self.layers))


def clean(name: str) -> str:
    """A module path as a site name: wrappers of torch removed, nothing outside [A-Za-z0-9_./-]."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", _WRAPPERS.sub("", name).strip("."))


def is_compiled(module: nn.Module) -> bool:
    """Whether this module runs through torch.compile."""
    own_forward = vars(module).get("forward")
    return (
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None or hasattr(own_forward, "_torchdynamo_orig_callable")
    )


def find(
    model: nn.Module,
    activation_of: Callable[[nn.Module], Activation | None],
    may_be_own: Callable[[nn.Module], bool],
    selects: Callable[[str], bool],
) -> Found:
    """The sites and layers of a model, by type of module."""
    found, taken = Found(), set()
    modules = list(model.named_modules())
    wrapped = [path for path, module in modules if isinstance(module, nn.parallel.DistributedDataParallel)]
    for path, module in modules:
        # The innermost first: what is cut out of a path must still be where the outer one looks.
        for outer in reversed(wrapped):
            if path.startswith(f"{outer}.module"):
                path = outer + path[len(outer) + len(".module") :]
        name = clean(path)
        activation, recurrent = activation_of(module), isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        if activation is not None:
            unique = site = name or activation.name
            count = 0
            while unique in taken:
                count += 1
                unique = f"{site}_{count}"
            taken.add(unique)
            if selects(unique):
                found.sites.append((unique, module, activation))
            found.places.append((name, module, True))
        elif recurrent:
            if isinstance(module, RECURRENT) and any(type(module).forward is kind.forward for kind in RECURRENT):
                found.recurrent.append((name or type(module).__name__.lower(), module))
            elif selects(name):
                found.unseen.append((name or type(module).__name__, "a subclass with a forward of its own"))
            found.places.append((name, module, True))
        else:
            if is_layer(module):
                found.layers.append((name or "layer", module))
            call = next((call for kind, call in _CALLERS if isinstance(module, kind)), None)
            if call is not None:
                found.calls.append(f"{name}/{call}" if name else call)
            if call is not None or next(module.children(), None) is not None or not type(module).__module__.startswith("torch."):
                found.places.append((name, module, False))
            if may_be_own(module) and selects(name or type(module).__name__):
                found.own.append((name or type(module).__name__, module))
    return found


_CALLERS = (
    (nn.GLU, "glu"),
    ((nn.Softmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention), "softmax"),
    (nn.LogSoftmax, "log_softmax"),
)
"""What modules of torch.nn call: there is no other place in torch.nn's leaves where a call is a site."""


class Taps:
    """The hooks on one model, the sites and layers they feed, and the passes of the current observation.

    Args:
        on_enter, on_leave: called whenever the model is entered or left, with whether it is a training pass.
        gradients: asked when a backward begins, with whether there was an earlier one: (whether it will add to `.grad`, whether what the
            earlier one added is still there; a tensor where only the device knows).
        fault: called with a place and an exception when something went wrong there; that place is then no longer watched.
        calls: hear function calls too.
        spend: told how many seconds each hook took.
    """

    def __init__(
        self,
        activations: Sequence[Activation],
        selects: Callable[[str], bool],
        epsilon: float,
        sample: int | Literal["auto"] | None,
        on_enter: Callable[[bool], None],
        on_leave: Callable[[bool], None],
        gradients: Callable[[bool], tuple[bool, bool | Tensor]],
        fault: Callable[[str, Exception], None],
        calls: bool = True,
        spend: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.activations = activations
        self.hears_calls = calls
        self.selects = selects
        self.epsilon = epsilon
        self.limit = _AUTO if sample == "auto" else sample
        self.whole = sample == "auto"
        self.on_enter = on_enter
        self.on_leave = on_leave
        self.gradients = gradients
        self.fault = fault
        self.spend = spend
        self.sites: dict[str, Site] = {}
        """Those that ran, by name, in the order in which they first did."""
        self.layers: dict[str, Layer] = {}
        """What is measured of weights in this observation: every layer while the structure is new, then those that feed a site."""
        self.names: list[str] = []
        """The sites that a walk over the model found, whether or not they ran."""
        self.expected: list[str] = []
        """The calls that it knows must come."""
        self.recurrent: dict[str, bool] = {}
        """The recurrent layers that it found, and whether they ran."""
        self.unseen: list[tuple[str, str]] = []
        self.failed: dict[str, str] = {}
        """Places no longer watched, and why."""
        self.notes: dict[str, str] = {}
        """Places seen in part, and what is missing."""
        self.fed_by_data: set[str] = set()
        """The layers whose input nothing computed that learns."""
        self.turn = 0
        self.keeps_windows = True
        """Unit blocks add up over observations here; off where they do so elsewhere."""
        self.is_open = False
        self.in_graph = False
        """This observation listens to the hooks of a compiled graph."""
        self.saw_pass = False
        self._samples: dict[str, Sample] = {}
        """Of the last call of each site in a compiled graph."""
        self._rows: dict[type[nn.Module], Activation | None] = {}
        self._known: dict[str, Site] = {}
        self._structure: tuple[tuple[str, int, str | None], ...] = ()
        self._deciding = True
        """The structure of the model is new: what feeds what, and what is an output, is being found out."""
        self.saw_model = False
        self._handles: list[Any] = []
        self._passes: list[Pass] = []
        """First what is settled, and what ran outside the model's own forward; then one for each pass that may still be discarded."""
        self._running: Pass | None = None
        """The pass whose backward began last: a recompute belongs to it."""
        self._local = threading.local()
        self._last_layer: str | None = None
        self._last_site: str | None = None
        self._shapes: dict[str, tuple[int, int]] = {}
        self._weights: dict[int, str] = {}
        """Layers by the address of their weight."""
        self._alive: list[weakref.ref[Tensor]] = []
        """Of these weights: one that dies must not leave its address to another."""
        self._nodes: dict[Node, Site] = {}
        self._indices: dict[tuple[Sample, int], Units] = {}
        self.spread: dict[str, Share] = {}
        """Of the layers whose weights tensor parallelism spreads over ranks."""
        self.counts_repeated = True
        """Whether this rank is the one that counts what tensor parallelism repeats on several."""
        self._own: weakref.WeakKeyDictionary[nn.Module, Bound | None] = weakref.WeakKeyDictionary()
        """What modules of the user's turned out to compute; None: no activation. Missing: not yet known."""
        self._tries: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._differentiating = False
        self._listener = Listener(self._hear)
        self._roles: dict[Any, Activation | Role] = dict(ROLES)
        for row in reversed(activations):
            self._roles.update(dict.fromkeys(row.calls, row))
        self._pass_survey: Survey | None = None
        self._stopped: dict[str, str] = {}
        """The sites that ran before and no longer do."""
        self._owner: int | None = None
        """The thread whose passes this observation is of: a model may be used by another one meanwhile."""

    def places(self, model: nn.Module) -> Found:
        """What there is to hook."""
        return find(model, self._activation_of, self._may_be_own, self.selects)

    def knows(self, found: Found) -> bool:
        """Whether the model is as it was when its sites and what feeds them were last found out."""
        return not self._deciding and self._structure == found.structure

    def open(self, model: nn.Module, found: Found, in_graph: bool = False) -> None:
        """Hook the model as it was found; `in_graph`: only listen to the hooks that were compiled with it (ingraph.py)."""
        self.names = [name for name, _, _ in found.sites]
        self.expected = [name for name in found.calls if self.selects(name)]
        self.recurrent = {name: self.recurrent.get(name, False) for name, _ in found.recurrent}
        self.unseen = list(found.unseen)
        structure = found.structure
        if structure != self._structure:
            self._structure, self._deciding = structure, True
            for site in self._known.values():
                site.start_over()
        self.is_open, self.saw_pass, self.saw_model = True, False, False
        self._passes = [Pass()]
        self._passing = self._last_layer = self._running = self._owner = None
        for site in self._known.values():
            site.row, site.heads, site.recompute_only = None, None, False
            if not self.keeps_windows:
                site.block = None
            elif site.block is not None:
                start_over_if_full_(site.block)
        self.in_graph = in_graph
        if in_graph:
            self._make_layers(found)
            for name, module, activation in found.sites:
                self._site(name, module, activation)
            self.notes.update((name, _NOT_IN_GRAPH) for name in self.sites if name not in self.names)
            return
        roots = tuple(model.children()) if isinstance(model, Stages) else (model,)
        for root in roots:
            self._hook(root, self._guarded(MODEL, self._enter), pre=True)
        for name, module, accounted in found.places if self.hears_calls else ():
            self._hook(module, self._guarded(MODEL, self._begin_module, name, accounted), pre=True, with_kwargs=True)
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
        for name, module in found.own:
            if name not in self.failed:
                kept: list[Call] = []
                self._hook(module, self._guarded(name, self._before_own, name, kept), pre=True, with_kwargs=True)
                self._hook(module, self._guarded(name, self._after_own, name, kept))
        for name, module in found.recurrent:
            calls: list[Any] = []
            self._hook(module, self._guarded(name, self._before_recurrent, calls), pre=True, with_kwargs=True)
            self._hook(module, self._guarded(name, self._after_recurrent, name, calls))
        self._make_layers(found)
        for name, module in found.layers:
            layer = self.layers.get(name)
            if layer is not None:
                self._hook(module, self._guarded(name, self._before_layer, layer), pre=True, with_kwargs=True)
                if self._deciding:
                    self._hook(module, self._guarded(name, self._after_layer, layer))
        for _, module, accounted in found.places if self.hears_calls else ():
            self._hook(module, self._guarded(MODEL, self._end_module, accounted), always_call=True)
        # Last of all, so that a model that is itself an activation is still in its pass when its own hook runs.
        for root in roots:
            self._hook(root, self._guarded(MODEL, self._leave), always_call=True)

    def _make_layers(self, found: Found) -> None:
        """What is measured of weights: every layer while the structure is new, then those that feed a site."""
        feeders = self.feeders()
        self._weights, self._alive, self.layers = {}, [], {}
        for name, module in found.layers:
            reason = why_not(module)
            if reason is not None:
                self.unseen.append((name, reason))
            if reason is None and name not in self.failed and (self._deciding or name in feeders):
                self.layers[name] = Layer(name, module, limit=self.limit, turn=self.turn)
                self._know(cast(Tensor, module.weight), name)
        for name, module in found.recurrent:
            self._recurrent_layers(name, module, feeders)

    def _know(self, weight: Tensor, name: str) -> None:
        """This weight is that of a layer, as long as it lives: wrappers put others in its place."""
        key, weights = id(weight), self._weights
        if weights.get(key) != name:
            weights[key] = name
            self._alive.append(weakref.ref(weight, lambda _: weights.pop(key, None)))

    def heard_site(self, name: str, z: Tensor, a: Tensor | None) -> None:
        """A compiled graph computes a site: z, and a where z was not overwritten with it."""
        if self.is_open:
            self._guarded(name, self._count_in_graph, name)(z, a)

    def _count_in_graph(self, name: str, z: Tensor, a: Tensor | None) -> None:
        site = self._known.get(name)
        if site is None:
            return
        sample = self._sample(site, z, a is None)
        taken = sample.take(z)
        if a is None:
            function = site.bound.activation.function or site.bound.activation.calls[0]
            made = function(taken.clone(), **site.bound.plain, **{name: sample.spread(value) for name, value in site.bound.learned.items()})
        else:
            made = sample.take(a)
        self._samples[name] = sample
        # Its place in the model cannot be seen from inside a graph.
        self.in_graph = True
        self._ran(site, ())
        self._count(site, sample, taken, made)

    def heard_gradient(self, name: str, grad: Tensor, of_output: bool) -> None:
        """The backward of a compiled graph computes dL/da (of the output) or dL/dz of a site."""
        if self.is_open:
            self._guarded(name, self._add_in_graph, name)(grad, of_output)

    def _add_in_graph(self, name: str, grad: Tensor, of_output: bool) -> None:
        sample = self._samples.get(name)
        if sample is None or sample.shape != tuple(grad.shape):
            sample = Sample.of(grad, self.limit, self.turn)
        taken = sample.take(grad)
        current = self._passes[0]
        row = current.place(current.rows, name, grad.device)
        current.put(current.rows, name, observe_gradient(taken if of_output else None, None if of_output else taken, row))

    def heard_layer(self, name: str, x: Tensor) -> None:
        """A compiled graph runs a layer on x."""
        layer = self.layers.get(name) if self.is_open else None
        module = layer.module() if layer is not None else None
        if module is not None:
            self._guarded(name, self._add_inputs, name, module)(x)

    def _add_inputs(self, name: str, module: nn.Module, x: Tensor) -> None:
        self.layers[name].input_elements += x.numel()
        self._current().merge_inputs(name, x, feature_axis(module, x.ndim), self.limit, self.turn)

    def _recurrent_layers(self, name: str, module: nn.Module, feeders: dict[str, tuple[str, ...]]) -> None:
        for parameter, weight in module.named_parameters(recurse=False):
            place = f"{name}.{parameter}"
            if parameter.startswith(("weight_ih", "weight_hh")) and (self._deciding or place in feeders) and name not in self.failed:
                self.layers[place] = Layer(place, module, parameter, self.limit, self.turn)
                self._know(weight, place)

    def close(self) -> None:
        """Remove every hook, put together what the passes gave, and forget passes and modules."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._listener.reset()
        whole = Pass()
        for each in self._passes:
            each.settle(whole)
        for name, site in self._known.items():
            site.row, site.heads = whole.rows.get(name), whole.heads.get(name)
            if site.heads is not None:
                site.head_count = site.heads.shape[1]
            block = whole.blocks.get(name)
            if block is not None:
                site.block = block if site.block is None or site.block.shape != block.shape else block.add_(site.block.to(block))
            site.calls.clear()
        for name, layer in self.layers.items():
            layer.inputs = whole.inputs.get(name)
        if self._deciding and self.saw_pass and not self.in_graph:
            self._mark_gates()
            self._deciding = False
            for name, site in self._known.items():
                if name in self.sites:
                    site.decided = True
                site.output = site.traced and not site.hidden and (site.reaches_output or not self.saw_model)
        # What ran for the first time after the structure had been looked at is looked at in the next observation.
        self._deciding = self._deciding or any(site.row is not None and not site.decided for site in self.sites.values())
        if self.saw_pass and not self.in_graph:
            self._count_misses()
        self._passes, self._nodes, self._indices, self.layers, self._pass_survey = [], {}, {}, {}, None
        self._passing = None
        self._samples.clear()
        self.is_open = self.in_graph = False
        self.turn += 1

    def _count_misses(self) -> None:
        for name, site in self.sites.items():
            site.missed = 0 if site.row is not None else site.missed + 1
            if site.missed >= _MISSES:
                self._stopped.setdefault(name, _STOPPED)

    @property
    def stopped(self) -> dict[str, str]:
        """The sites that ran before, but not in the last observations, and how to say so."""
        return {name: said for name, said in self._stopped.items() if name in self.sites and self.sites[name].missed >= _MISSES}

    def last_pass(self) -> Pass | None:
        """The newest pass, as a mark for `drop_after`."""
        return self._passes[-1] if self._passes else None

    def drop_after(self, mark: Pass | None) -> None:
        """Forget the passes that began after a mark: they belong to the next step."""
        if mark in self._passes:
            for each in self._passes[self._passes.index(mark) + 1 :]:
                each.drop()

    def share(self, site: Site) -> Share:
        """This rank's share in the units of a site, where tensor parallelism spreads them over ranks or repeats them."""
        own = site.head_count if site.kind == "softmax" else site.units
        if site.share is not None:
            return site.share if own is not None else Share(None, 0, site.share.counts)
        for name in site.feeds_on:
            made = self.spread.get(name)
            if made is None:
                continue
            units, first = made.units or 0, made.first
            if site.kind == "softmax" and own and units % own == 0 and made.width:
                # Heads lie one behind the other in the output of the layer that makes queries.
                return Share(own * (units // made.width), first * own // made.width, True)
            if own is not None and own == made.width != units:
                return Share(units, first, True)
            return Share(own, 0, made.counts)
        if self.spread and site.kind != "recurrent":
            self.notes.setdefault(site.name, _TAKEN_FOR_REPEATED)
        return Share(own, 0, self.counts_repeated)

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

    def _may_be_own(self, module: nn.Module) -> bool:
        """A leaf of the user's own that has not been found to be something else."""
        leaf = next(module.children(), None) is None and not type(module).__module__.startswith("torch.")
        return leaf and self._own.get(module, _UNKNOWN) is not None

    def _before_own(self, name: str, kept: list[Call], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.clear()
        z = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if z is None or not z.is_floating_point() or not _is_real(z) or z.layout != torch.strided or z.is_nested or not z.numel():
            return
        counts = self._counts(module)
        if _in_backward():
            site = self._known.get(name)
            counts = site is not None and self._counts_at(site, module) is True
        if counts or _in_backward():
            sample = Sample.of(z, self.limit, self.turn)
            kept.append(Call(z, sample, upcast(sample.take(z.detach())).clone(), z.grad_fn, z.output_nr, counts))

    def _after_own(self, name: str, kept: list[Call], module: nn.Module, args: tuple[Any, ...], a: Any) -> None:
        """Find out whether a module of the user's is an activation, from what it made of real data; then it is a site."""
        call = kept.pop() if kept else None
        if call is None or not isinstance(a, Tensor) or a.shape != call.z.shape or not a.is_floating_point():
            return
        sample = call.sample
        assert isinstance(sample, Sample)
        known, slope = self._own.get(module, _UNKNOWN), None
        if known is _UNKNOWN and not _in_backward():
            known, slope = self._find_out(name, module, call, a)
        if known is None or known is _UNKNOWN:
            return
        site = self._known.setdefault(name, Site(name, known))
        if call.counts and not _in_backward():
            taken = sample.take(a.detach())
            if site.bound.constants is not None or site.bound.activation.function:
                self._doubt(site, module, call.taken, taken)
            if slope is None and site.bound.constants is None:
                slope = self._slope(call, a, None)
                if slope is None:
                    self.notes.setdefault(name, _NOT_DIFFERENTIATED)
                    return
            self._ran(site, [call.node], last_layer=True)
            self._count(site, sample, call.taken, taken, slope=None if slope is None else upcast(sample.take(slope)))
        if a.requires_grad and a.grad_fn is not None:
            self._met(site, a.grad_fn)
            self._tap_gradient(site, call, a)

    def _find_out(self, name: str, module: nn.Module, call: Call, a: Tensor) -> tuple[Any, Tensor | None]:
        sample = call.sample
        assert isinstance(sample, Sample)
        bound, slope = recognise(call.taken, sample.take(a.detach()), self.activations, self.epsilon), None
        if bound is None:
            slope = self._slope(call, a, None)
            if slope is None:
                if next(module.parameters(), None) is None and self._deciding and saving_is_hooked():
                    self._unseen_call(name, _NOT_DIFFERENTIATED)
                return _UNKNOWN, None
            weights = 1.5 + torch.cos(torch.arange(a.numel(), device=a.device, dtype=torch.float32)).reshape(a.shape).to(a.dtype)
            mixed = self._slope(call, a, weights)
            scale = 64 * torch.finfo(a.dtype).eps * slope.abs().amax()
            grouped = [None, *(Units(sample, axis).index(a.device) for axis in {min(1, a.ndim - 1), a.ndim - 1} if a.ndim > 1)]
            alone = mixed is not None and bool(((mixed - slope * weights).abs() <= scale).all())
            if alone and is_function(call.taken, upcast(sample.take(slope)), grouped):
                bound = differentiated(re.sub(r"[^A-Za-z0-9_.-]", "_", type(module).__name__), self.epsilon)
            elif alone and self._tries.setdefault(module, 0) < _TRIES:
                # Linear as far as these numbers go; a clamp may not have been reached yet.
                self._tries[module] += 1
                return _UNKNOWN, None
        self._own[module] = bound
        if bound is not None:
            self.notes.pop(name, None)
            # What was heard inside is no site of its own.
            for place in [place for place in self._known if place.startswith(f"{name}/")]:
                for known in (self._known, self.sites):
                    known.pop(place, None)
                for each in self._passes:
                    for kind in (each.rows, each.blocks, each.heads):
                        kind.pop(place, None)
        return bound, slope

    def _slope(self, call: Call, a: Tensor, direction: Tensor | None) -> Tensor | None:
        """f'(z) times a direction, by autograd, through the graph of the call that has just run."""
        if a.grad_fn is None or call.node is None:
            return None
        self._differentiating = True
        try:
            return derivative(a, call.node, call.output_nr, torch.ones_like(a) if direction is None else direction)
        finally:
            self._differentiating = False

    def _doubt(self, site: Site, module: nn.Module, z: Tensor, a: Tensor) -> None:
        """A module may change what it computes; where it no longer is the function that it was taken for, autograd tells its derivative."""
        if site.doubt is not None and bool(site.doubt):
            site.doubt, self._own[module] = None, differentiated(type(module).__name__, self.epsilon)
            site.bound = cast(Bound, self._own[module])
            return
        differs = fits(site.bound, z, a)
        if differs.is_cuda:
            # Looked at in the next observation: waiting for it now would stop the device.
            site.doubt = torch.zeros((), dtype=torch.bool, pin_memory=True).copy_(differs, non_blocking=True)
        elif bool(differs):
            site.doubt = differs
            self._doubt(site, module, z, a)

    def _site(self, name: str, module: nn.Module, activation: Activation) -> Site:
        site = self._known.get(name)
        if site is None:
            site = self._known[name] = Site(name, bind(activation, module, self.epsilon))
        elif site.bound.activation is not activation:
            site.bound = bind(activation, module, self.epsilon)
        return site

    def _hook(self, module: nn.Module, call: Callable[..., None], pre: bool = False, **options: bool) -> None:
        register = module.register_forward_pre_hook if pre else module.register_forward_hook
        self._handles.append(register(Hook(call), **options))

    def _guarded(self, place: str, call: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        """The call, without gradients and without ever raising: what fails is no longer watched."""

        def run(*args: Any) -> Any:
            if not self.is_open or place in self.failed:
                return None
            begun = time.perf_counter()
            # Other monitors and modes of the user's must not take our arithmetic for the model's.
            with torch._C.DisableTorchFunction():
                # Whether autograd is on where the hook was called: inside, it is off.
                self._local.grad_enabled = enabled = torch.is_grad_enabled()
                torch._C._set_grad_enabled(False)
                try:
                    if torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled():
                        with _disable_current_modes(), torch.inference_mode(False):
                            # Which has switched gradients on again.
                            torch._C._set_grad_enabled(False)
                            return call(*first, *args)
                    return call(*first, *args)
                except Exception as error:
                    self._fail(place, error)
                    return None
                finally:
                    torch._C._set_grad_enabled(enabled)
                    self.spend(time.perf_counter() - begun)

        return run

    def _fail(self, place: str, error: Exception) -> None:
        self.failed[place] = f"{type(error).__name__}: {error}"
        for each in self._passes:
            for kind in (each.rows, each.blocks, each.heads):
                kind.pop(place, None)
        self._known.pop(place, None)
        self.sites.pop(place, None)
        self.fault(place, error)

    def _enter(self, model: nn.Module, args: Any) -> None:
        if _in_backward():
            return
        if self._passing is not None:
            if _runs_twice(model):
                # It calls itself: one pass.
                self._local.depth = getattr(self._local, "depth", 0) + 1
                return
            # A KeyboardInterrupt has ended the last pass without a word.
            self._listener.reset()
        self._local.depth = 0
        training = self._local.grad_enabled and any(module.training for module in model.modules()) and not _rehearses() and self._claims_thread()
        self._passing = training
        if training:
            self.saw_model, self._last_layer, self._last_site = True, None, None
            self._nodes.clear()
            self._pass_survey = None
            self._passes.append(Pass())
            if len(self._passes) > 8:
                self._passes.pop(1).settle(self._passes[0])
        self.on_enter(training)

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        training = self._passing
        if _in_backward() or training is None:
            return
        if self._local.depth:
            self._local.depth -= 1
            return
        self._passing = None
        if training and self._passes:
            if output is None and sys.exc_info()[0] is not None:
                self._passes[-1].drop()
            else:
                self._follow(output, self._passes[-1])
            self._nodes.clear()
            self._pass_survey = None
        self.on_leave(training)

    def _claims_thread(self) -> bool:
        """Whether this thread is the one that is observed: the first that trains."""
        if self._owner is None:
            self._owner = threading.get_ident()
        return self._owner == threading.get_ident()

    @property
    def _survey(self) -> Survey:
        """The walks over the graph of the pass that runs; only while the structure of the model is being found out."""
        if self._pass_survey is None:
            self._pass_survey = Survey()
        return self._pass_survey

    def _follow(self, output: Any, current: Pass) -> None:
        """From the model's output: hear when its backward begins, and find the sites it depends on through no further weight."""
        leaves = ends(output)
        begins = self._guarded(MODEL, self._backward_begins, current)
        for node in leaves:
            node.register_prehook(lambda grad_outputs: begins())
        if self._deciding:
            for node in self._survey.upstream(leaves, lambda node: node in self._nodes or has_weight(node)):
                if node in self._nodes:
                    self._nodes[node].reaches_output = True
            self._mark_gates()
            if self._survey.is_spent:
                self.notes[MODEL] = f"its graph has more than {MOST_NODES} nodes: what no hook saw beyond them is not known"

    def _mark_gates(self) -> None:
        """A sigmoid is a gate if its output multiplies another signal that does not come from it."""
        survey = self._pass_survey
        for pair in survey.products if survey is not None else ():
            for node, other in (pair, pair[::-1]):
                site = self._nodes.get(node)
                if site is None or survey is None or site.bound.activation.name not in _GATES or site.multiplies:
                    continue
                site.multiplies = survey.is_learned(other) and not survey.depends(other, node)

    def _begin_module(self, path: str, accounted: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is entered: its calls are heard, and what its parent computed before is looked through."""
        counts = _in_backward() or self._counts(module)
        above = self._listener.top
        if not counts and above is None:
            return
        if self._deciding and counts and not _in_backward():
            if above is not None:
                self._look(ends((args, kwargs)), above)
            else:
                # What comes into the model, or is computed between its modules, is not the model's.
                self._survey.skip(ends((args, kwargs)))
        fused = counts and takes_fused_path(module, (*args, *kwargs.values()), self._local.grad_enabled)
        if fused:
            self._unseen_call(path or type(module).__name__, "it is frozen and in evaluation mode, where torch runs it as one kernel")
        hears = counts and not (accounted or fused or self._own.get(module) is not None)
        self._listener.enter(Frame(path, module, hears, accounted and counts))

    def _end_module(self, accounted: bool, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self._listener.leave(module)
        if frame is None or not self._deciding or _in_backward():
            return
        if accounted or self._own.get(module) is not None:
            self._survey.explain(ends(output), set())
        else:
            self._look(ends(output), frame)

    def _look(self, nodes: set[Node], frame: Frame) -> None:
        """Name what the graph shows and nobody saw, as happening in this module."""
        for what, reason in self._survey.explore(nodes):
            self._unseen_call(f"{frame.path}/{what}" if frame.path else what, reason)

    def _unseen_call(self, place: str, reason: str) -> None:
        if self.selects(place):
            self.notes.setdefault(place, reason)

    def _hear(self, frame: Frame, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch, and measure it if it is an activation."""
        role = self._roles.get(function)
        reason = UNSEEN.get(getattr(function, "__name__", "")) if role is None else None
        if (role is None and reason is None) or not self.is_open or not frame.hears:
            return function(*args, **kwargs)
        place = frame.place(role.name if isinstance(role, Activation) else "glu" if role == "glu" else "softmax" if role else function.__name__)
        place += "_call" if place in self.names else ""
        finish: Callable[[Any], None] | None = None
        looking = self._deciding and not _in_backward()
        before = ends((args, kwargs)) if looking else set()
        if looking:
            self._guarded(MODEL, self._look)(before, frame)
        if role is None:
            self._unseen_call(place, reason or "")
        elif self.selects(place):
            finish = self._guarded(place, self._before_call, place, role, frame.module)(function, args, kwargs)
        result = function(*args, **kwargs)
        if finish is not None:
            self._guarded(place, finish)(result)
        if looking:
            self._guarded(MODEL, self._survey.explain)(ends(result), before)
        return result

    def _before_call(
        self, place: str, role: Activation | Role, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Any], None] | None:
        """What to do with the result of the call; None: nothing."""
        rest = args[1:]
        z = args[0] if args else kwargs.get("query" if role == "attention" else "input")
        if not isinstance(z, Tensor) or not z.is_floating_point() or not _is_real(z) or not z.numel() or (role in ROLES.values() and not z.ndim):
            return None
        site = self._known.get(place)
        if not isinstance(role, Activation):
            _check_plain(z)
        if isinstance(role, Activation):
            bound = bind_call(role, function, rest, kwargs, self.epsilon, site.bound if site is not None else None)
            site = self._known.setdefault(place, Site(place, bound, "call"))
            site.bound = bound
            in_place = function.__name__.endswith("_") or "out" in kwargs or kwargs.get("inplace", False) or any(value is True for value in rest)
            call = self._begin(site, z, module, in_place)
            return None if call is None else functools.partial(self._end, site, call)
        if role == "glu":
            axis = int(rest[0] if rest else kwargs.get("dim", -1)) % z.ndim
            site = self._known.setdefault(place, Site(place, self._plain("sigmoid"), "call", gate=True))
            value, gate = z.detach().chunk(2, axis)
            call = self._begin(site, gate, module, False)
            if call is None:
                return None
            kept = upcast(call.sample.take(value)).clone()
            return functools.partial(self._end_glu, site, dataclasses.replace(call, node=z.grad_fn), kept, axis)
        site = self._known.setdefault(place, Site(place, _SOFTMAX, "softmax"))
        counts = self._counts_at(site, module)
        if counts is None:
            return None
        # Neither overwrites its input: all else waits until the call has succeeded.
        if role == "attention":
            return functools.partial(self._end_attention, site, counts, function, args, kwargs)
        given = rest[0] if rest else kwargs.get("dim")
        axis = (_implicit_axis(z.ndim) if given is None else int(given)) % max(1, z.ndim)
        if z.ndim == 4 and axis == 3 and site.is_attention is None and z.grad_fn is not None:
            # Logits come out of a batched product of queries and keys; a map that happens to have four axes does not.
            site.is_attention = any(_PRODUCT.match(node.name()) for node in Survey().upstream([z.grad_fn], has_weight, 64))
        rows = SoftmaxRows.of(z, axis, self.limit, self.turn, site.is_attention is not False)
        return functools.partial(self._end_softmax, site, Call(z, rows, z, z.grad_fn, z.output_nr, counts), role == "softmin")

    def _end_glu(self, site: Site, call: Call, value: Tensor, axis: int, a: Tensor) -> None:
        """The gate is half of the input: what reaches it comes through the other half."""
        sample, own = call.sample, a.grad_fn
        assert isinstance(sample, Sample)
        if call.counts:
            self._ran(site, [call.node])
            self._count(site, sample, call.taken, torch.sigmoid(upcast(call.taken)), axis)
        if own is not None:
            add = self._adder(site, sample)
            own.register_hook(
                lambda grad_inputs, grad_outputs: add(
                    None if grad_outputs[0] is None else upcast(sample.take(grad_outputs[0].detach())) * value,
                    None if grad_inputs[0] is None else upcast(sample.take(grad_inputs[0].detach().chunk(2, axis)[1])),
                )
            )

    def _end_softmax(self, site: Site, call: Call, negated: bool, a: Tensor) -> None:
        if call.counts:
            assert isinstance(call.sample, SoftmaxRows)
            self._ran(site, [call.node])
            self._count_softmax(site, call.sample.logits(-call.z.detach() if negated else call.z.detach()))
        if a.requires_grad and a.grad_fn is not None:
            self._met(site, a.grad_fn)
            self._tap_gradient(site, call, a)

    def _end_attention(
        self, site: Site, counts: bool, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        key = args[1] if len(args) > 1 else kwargs["key"]
        if not counts or not key.numel():
            return
        try:
            logits = attention_logits(function, args, kwargs, self.limit, self.turn)
        except NotRebuiltError as reason:
            self._unseen_call(site.name, str(reason))
            return
        self._ran(site, ends((args[:2], kwargs)))
        self._count_softmax(site, logits)

    def _ran(self, site: Site, nodes: Iterable[Node | None], last_layer: bool = False) -> None:
        """A site ran on what these nodes made; `last_layer`: where they tell no layer that feeds it, it is the one that ran last."""
        self.saw_pass = True
        self.sites.setdefault(site.name, site)
        if not self._deciding:
            return
        nodes = list(nodes)
        found = self._survey.feeders(nodes, self._weights)
        if not found and last_layer and self._last_layer:
            found = (self._last_layer,)
        site.feeds_on.update(dict.fromkeys(found))
        before = [self._nodes[node].name for node in self._survey.upstream(nodes, self._nodes.__contains__) if node in self._nodes]
        if not any(nodes) and self._last_site:
            # Without a graph, as in a reentrant checkpoint, the order must do.
            before = [self._last_site]
        self._last_site = site.name
        site.after.update(dict.fromkeys(name for name in before if name != site.name))

    def _met(self, site: Site, node: Node) -> None:
        """This node makes the output of a site."""
        if self._deciding and not _in_backward():
            self._nodes[node] = site
            site.traced = True
            if len(self._nodes) > MOST_NODES:
                # Parts called one by one, again and again: the graphs of the first are not kept for it.
                self._nodes.pop(next(iter(self._nodes)))

    def _count_softmax(self, site: Site, logits: Logits) -> None:
        row, heads = observe_softmax(logits.z, logits.visible, logits.elements)
        current = self._current()
        current.add(current.rows, site.name, row)
        current.add(current.heads, site.name, heads)

    def _plain(self, function: str) -> Bound:
        """The function of this name as kernels compute it."""
        return bind_plain(next(row for row in (*self.activations, *ACTIVATIONS) if row.name == function), self.epsilon)

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
        return passing if passing is not None else self._local.grad_enabled and module.training and self._claims_thread()

    def _counts_at(self, site: Site, module: nn.Module) -> bool | None:
        """Whether a call at this site is counted (False: only its gradient); None: it is not looked at."""
        counts = self._counts(module)
        if _in_backward():
            site.recompute_only |= not any(site.name in each.rows for each in self._passes)
            return site.recompute_only
        return True if counts else None

    def _before_site(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        site.calls.pop(thread, None)
        z = _first_tensor(args, kwargs)
        if not _is_real(z):
            return
        if site.bound.activation.computes(module):
            # Neither attributes nor parameters need be what they were when the hooks were made.
            if any(getattr(module, name) != value for name, value in site.bound.plain.items()):
                site.bound = bind(site.bound.activation, module, self.epsilon)
            if site.bound.learned:
                learned = {name: getattr(module, name).detach().reshape(value.shape) for name, value in site.bound.learned.items()}
                site.bound = dataclasses.replace(site.bound, learned=learned)
        # A module of the user's may overwrite its input without saying so.
        in_place = getattr(module, "inplace", not type(module).__module__.startswith("torch.nn."))
        call = self._begin(site, z, module, in_place)
        if call is not None:
            site.calls[thread] = call

    def _after_site(self, site: Site, module: nn.Module, args: tuple[Any, ...], a: Any) -> None:
        call = site.calls.pop(threading.get_ident(), None)
        if call is not None:
            self._end(site, call, a)

    def _begin(self, site: Site, z: Tensor, module: nn.Module, in_place: bool) -> Call | None:
        """Take what is needed of z before the activation may overwrite it."""
        counts = self._counts_at(site, module)
        if counts is None:
            return None
        if is_pending(z):
            raise TypeError("its input is a sum over ranks that has not been taken: no rank has an element of it")
        part = part_of(z)
        _check_plain(part)
        self.saw_pass = True
        sample = self._sample(site, part, in_place)
        taken = sample.take(part.detach())
        if in_place and taken.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
            taken = taken.clone()
        place = placement(z)
        if place is not None:
            axis = self._unit_axis(site, tuple(part.shape))
            site.share = Share(None, 0, place.counts) if axis is None else Share(z.shape[axis], place.first[axis], place.counts)
        return Call(z, sample, taken, z.grad_fn, z.output_nr, counts)

    def _sample(self, site: Site, z: Tensor, in_place: bool) -> Sample:
        """What is read of a call: all of it where that costs neither time nor memory, and the user has not set a limit."""
        if self.whole and not in_place and reads_whole(z) and known_slope(site.bound, z) is not None:
            sample = Sample.of(z, None, self.turn)
            if sample.strides == z.stride():
                return sample
        return Sample.of(z, self.limit, self.turn)

    def _end(self, site: Site, call: Call, a: Any) -> None:
        sample = call.sample
        assert isinstance(sample, Sample)
        part = part_of(a) if isinstance(a, Tensor) else a
        if not isinstance(part, Tensor) or part.shape != torch.Size(sample.shape):
            raise TypeError(f"it maps {sample.shape} to {tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}")
        if call.counts:
            self._ran(site, [call.node], last_layer=True)
            if part.numel():
                self._count(site, sample, call.taken, sample.take(part.detach()))
        if a.requires_grad and a.grad_fn is not None:
            self._met(site, a.grad_fn)
            self._tap_gradient(site, call, a)

    def _count(
        self,
        site: Site,
        sample: Sample,
        z: Tensor,
        a: Tensor,
        axis: int | None = None,
        slope: Tensor | Formula | None = None,
        elements: int | None = None,
    ) -> None:
        bound, current = site.bound, self._current()
        edges: Edges
        peak: float | Tensor | None
        formula = known_slope(bound, z, a) if slope is None else None
        if formula is not None and bound.constants is not None:
            slope, peak, edges = formula, bound.constants.peak, (bound.constants.low, bound.constants.high)
        elif slope is None:
            z = upcast(z).contiguous()
            learned = {name: sample.spread(value.to(z.device)).to(z.dtype) for name, value in bound.learned.items()}
            slope, peak, edges = bound.evaluate(z, upcast(a) if bound.activation.from_output else a, learned)
        else:
            assert isinstance(slope, Tensor)
            slope, peak, edges = slope.abs(), None, (None, None)
        units = self._units(site, sample, axis)
        elements = math.prod(sample.shape) if elements is None else elements
        row, block = current.place(current.rows, site.name, z.device), current.place(current.blocks, site.name, z.device)
        if units is None or (block is not None and block.shape[1] != units.size):
            block = None
        row, block = observe(z, a, slope, peak, edges, elements, bound.activation.name == "sigmoid", units, row, block)
        current.put(current.rows, site.name, row)
        if block is not None:
            current.put(current.blocks, site.name, block)

    def _units(self, site: Site, sample: Sample, axis: int | None) -> Units | None:
        """The units of a site; None where it has none, or not always as many."""
        axis = self._unit_axis(site, sample.shape) if axis is None else axis
        size = None if axis is None or site.units_vary else sample.shape[axis]
        if site.units is not None and size != site.units:
            size, site.units_vary = None, True
        site.units = size
        if axis is None or size is None:
            site.block = None
            for each in self._passes:
                each.blocks.pop(site.name, None)
            return None
        return self._indices.setdefault((sample, axis), Units(sample, axis))

    def _unit_axis(self, site: Site, shape: tuple[int, ...]) -> int | None:
        """The axis of channels or features: that of the layer which feeds the site, where the sizes agree; else by rank."""
        for name in site.feeds_on:
            out, from_end = self._shapes.get(name, (-1, 0))
            if 0 < from_end <= len(shape) and shape[-from_end] == out:
                return len(shape) - from_end
        return {0: None, 1: None, 2: 1, 3: 2}.get(len(shape), 1)

    def _tap_gradient(self, site: Site, call: Call, a: Tensor) -> None:
        # The hooks below live on nodes of the graph and must not hold its tensors, z above all: such a ring is never freed.
        sample, z_nr, a_nr, own, node = call.sample, call.output_nr, a.output_nr, a.grad_fn, call.node
        add = self._adder(site, sample)
        assert own is not None

        def add_both(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            given = (None if grad is None or is_pending(grad) else part_of(grad) for grad in (grad_a, grad_z))
            add(*(None if grad is None else sample.take(grad.detach().reshape(sample.shape)) for grad in given))

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
            self._handles.append(call.z.register_hook(lambda grad: add_both(None, grad)))
        own.register_prehook(lambda grad_outputs: add_both(grad_outputs[a_nr], None))

    def _adder(self, site: Site, sample: Sample | SoftmaxRows) -> Callable[..., None]:
        """What takes the elements of dL/da and dL/dz during the backward of the pass that runs now."""
        turn, current = self.turn, self._current()

        def add(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            given = [grad for grad in (grad_a, grad_z) if grad is not None]
            if turn == self.turn and not self._differentiating and given and given[0].numel():
                current.put(current.rows, site.name, observe_gradient(grad_a, grad_z, current.place(current.rows, site.name, given[0].device)))

        return self._guarded(site.name, add)

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
        for layer in self.layers.values():
            if layer.module() is module and layer.parameter in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse"):
                layer.input_elements += plain.numel()
                self._current().merge_inputs(layer.name, plain, plain.ndim - 1, self.limit, self.turn)
                if self._deciding and plain.grad_fn is None and not plain.requires_grad:
                    self.fed_by_data.add(layer.name)
        gates = (
            cell_gates(module, x, state)
            if isinstance(module, nn.RNNCellBase)
            else rnn_gates(cast(nn.RNNBase, module), x, state, random, output[0], self.limit, self.turn)
        )
        try:
            for gate in gates:
                place = f"{name}.{gate.layer}/{gate.name}" if gate.layer else f"{name}/{gate.name}"
                if self.selects(place):
                    feeders = [f"{name}.weight_{kind}_{gate.layer}".rstrip("_") for kind in ("ih", "hh")]
                    self._count_gate(place, gate, plain, feeders, gated=not isinstance(module, (nn.RNN, nn.RNNCell)))
        except NotRebuiltError as reason:
            self.notes[f"{name}, upper layers"] = str(reason)
        last = next((site for place, site in reversed(self.sites.items()) if place.startswith((f"{name}.", f"{name}/"))), None)
        if self._deciding and last is not None:
            # What comes after the layer comes after its last gate.
            self._nodes.update(dict.fromkeys(ends(output), last))

    def _count_gate(self, place: str, gate: Gate, x: Tensor, feeders: Sequence[str], gated: bool) -> None:
        site = self._known.get(place)
        if site is None:
            site = self._known[place] = Site(place, self._plain(gate.function), "recurrent", gated)
        self._ran(site, [x.grad_fn])
        if self._deciding:
            site.feeds_on = dict.fromkeys(name for name in feeders if name in self.layers)
        sample = Sample.of(gate.z, self.limit, self.turn)
        z = upcast(sample.take(gate.z))
        self._count(site, sample, z, getattr(torch, gate.function)(z), elements=gate.elements)

    def _before_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counts(module):
            return
        x = _first_tensor(args, kwargs)
        weight = getattr(module, layer.parameter)
        if self._deciding:
            # FSDP puts another weight there for the pass.
            self._know(weight, layer.name)
        part = part_of(x)
        if is_pending(x):
            return
        if not _is_real(x) or not x.is_floating_point() or not part.numel() or x.layout != torch.strided or type(part) not in (Tensor, nn.Parameter):
            return
        self._look_at_ranks(layer, module, x, weight)
        self._add_inputs(layer.name, module, part)
        if self._deciding:
            (self.fed_by_data.add if x.grad_fn is None and not x.requires_grad else self.fed_by_data.discard)(layer.name)
        if self._deciding and self._nodes:
            for node in self._survey.upstream([x.grad_fn], lambda node: node in self._nodes or has_weight(node)):
                if node in self._nodes:
                    self._nodes[node].hidden = True

    def _look_at_ranks(self, layer: Layer, module: nn.Module, x: Tensor, weight: Tensor) -> None:
        """How tensor parallelism spreads a layer and its input over ranks."""
        place, given = placement(weight), placement(x)
        if place is not None and isinstance(module, nn.Linear):
            self.counts_repeated = self.counts_repeated and place.is_first
            self.spread[layer.name] = Share(weight.shape[0], place.first[0], place.is_first, part_of(weight).shape[0])
        if given is not None:
            layer.input_counts, layer.first = given.counts, given.first[feature_axis(module, x.ndim)]

    def _after_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and self._counts(module):
            self._last_layer = layer.name
            made = self.spread.get(layer.name)
            axis = feature_axis(module, output.ndim)
            self._shapes[layer.name] = (width(module) if made is None else part_of(output).shape[axis], output.ndim - axis)


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


def part_of(tensor: Tensor) -> Tensor:
    """The elements that this rank has, as a plain tensor."""
    part = local(tensor)
    return cast(Tensor, part.trigger_wait()) if isinstance(part, AsyncCollectiveTensor) else part


def _check_plain(z: Tensor) -> None:
    if z.is_nested or z.layout != torch.strided or not z.is_floating_point():
        raise TypeError(f"its input is a {'nested ' if z.is_nested else ''}{z.dtype} tensor of layout {z.layout}, not a dense tensor of real numbers")
    if type(z) not in (Tensor, nn.Parameter):
        raise TypeError(f"its input is a {type(z).__name__}, not a plain tensor")


def _runs_twice(model: nn.Module) -> bool:
    """Whether two calls of this module are on the stack."""
    frame, count = sys._getframe(1), 0
    while frame is not None and count < 2:
        count += frame.f_code is _CALL and frame.f_locals.get("self") is model
        frame = frame.f_back  # type: ignore[assignment]
    return count > 1


def _rehearses() -> bool:
    """Whether a pipeline only runs its stage to learn the shapes of what it makes: on memory that nobody has written."""
    frame: FrameType | None = sys._getframe(1) if PIPELINES in sys.modules else None
    while frame is not None:
        if frame.f_code.co_name in _REHEARSALS and frame.f_globals.get("__name__") == PIPELINES:
            return True
        frame = frame.f_back
    return False


PIPELINES = "torch.distributed.pipelining.stage"
_REHEARSALS = ("_prepare_forward_infra", "_shape_inference")
_CALL = nn.Module._call_impl.__code__


def _implicit_axis(ndim: int) -> int:
    """The axis of F.softmax where none is given."""
    return 0 if ndim in (0, 1, 3) else 1
