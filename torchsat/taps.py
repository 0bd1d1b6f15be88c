"""Where z, a and their gradients come from: module hooks and autograd nodes, open only during an observation.

What it must be right under decides the design:

- z is read in a forward *pre*-hook: after an in-place activation it is overwritten.
- Gradients are read at the autograd node of the activation, whose inputs and outputs are dL/dz through this activation alone and dL/da; a
  tensor hook on z would add what reaches z by other ways (z * sigmoid(z)). An activation of several nodes is read on both sides of it.
  Module backward hooks are never used: they fail on in-place activations.
- A pass counts if it is a training pass: autograd was on when the model was entered, and some part of the model is in training mode.
  A recompute of activation checkpointing runs inside a backward and is not counted again; in reentrant mode only it can see gradients.
- Hooks do nothing while torch traces or compiles, and never raise: the first fault of a site ends the watching of that site, with a word.
- Hooks on a module become no-ops of the standard library in a copy or a pickle of it.
"""

from __future__ import annotations

import contextlib
import re
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
    merge_,
    observe,
    observe_gradient,
    start_over_if_full_,
    upcast,
)
from torchsat.weights import Layer, feature_axis, is_layer, why_not, width

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
class Site:
    """One place where one activation is computed, and what was seen of it since the observation began."""

    name: str
    bound: Bound
    feeds_on: tuple[str, ...] | None = None
    """The layers that feed it; None until it has run."""
    output: bool | None = None
    """Whether it makes an output of the model; None until it has run."""
    gate: bool = False
    units: int | None = None
    units_vary: bool = False
    block: Tensor | None = None
    row: Tensor | None = None
    recompute_only: bool = False
    call: Call | None = None


@dataclass
class Found:
    """What a walk over a model finds."""

    sites: list[tuple[str, nn.Module, Activation]] = field(default_factory=list)
    layers: list[tuple[str, nn.Module]] = field(default_factory=list)
    recurrent: list[tuple[str, nn.Module]] = field(default_factory=list)
    unseen: list[tuple[str, str]] = field(default_factory=list)
    compiled: bool = False
    """Some submodule is compiled on its own."""


def clean(name: str) -> str:
    """A module path as a site name: wrappers of torch removed, nothing outside [A-Za-z0-9_./-]."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", _WRAPPERS.sub("", name).strip("."))


def find(model: nn.Module, activations: Sequence[Activation], selects: Callable[[str], bool]) -> Found:
    """The sites and layers of a model, by type of module. The first row that computes a module names it."""
    found, taken = Found(), set()
    for path, module in model.named_modules():
        name = clean(path)
        found.compiled |= path != "" and (hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None)
        activation = next((row for row in activations if row.computes(module)), None)
        if activation is not None:
            unique = site = name or activation.name
            count = 0
            while unique in taken:
                count += 1
                unique = f"{site}_{count}"
            taken.add(unique)
            if selects(unique):
                found.sites.append((unique, module, activation))
            continue
        if is_layer(module):
            found.layers.append((name or "layer", module))
            continue
        if isinstance(module, RECURRENT) and any(type(module).forward is kind.forward for kind in RECURRENT):
            found.recurrent.append((name or type(module).__name__.lower(), module))
            continue
        reason = next((reason for kind, reason in NOT_ELEMENTWISE if isinstance(module, kind)), None)
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
    """The hooks on one model, the sites and layers they feed, and the state of the current pass.

    Args:
        on_enter, on_leave: called whenever the model is entered (with whether it is a training pass) and left.
        fault: called with a place and an exception when something went wrong there; that place is then no longer watched.
    """

    def __init__(
        self,
        activations: Sequence[Activation],
        selects: Callable[[str], bool],
        epsilon: float,
        sample: int | None,
        on_enter: Callable[[bool], None],
        on_leave: Callable[[], None],
        fault: Callable[[str, Exception], None],
    ) -> None:
        self.activations = activations
        self.selects = selects
        self.epsilon = epsilon
        self.limit = sample
        self.on_enter = on_enter
        self.on_leave = on_leave
        self.fault = fault
        self.sites: dict[str, Site] = {}
        """By name, in the order in which they first ran."""
        self.layers: dict[str, Layer] = {}
        """What is measured of weights in this observation: at first every layer, then those that feed a site."""
        self.names: list[str] = []
        """The sites that a walk over the model found, whether or not they ran."""
        self.unseen: list[tuple[str, str]] = []
        self.compiled_inside = False
        self.failed: dict[str, str] = {}
        self.not_rebuilt: dict[str, str] = {}
        """Parts of recurrent layers whose gates are out of reach, and why."""
        self.turn = 0
        self.is_open = False
        self.saw_pass = False
        self.saw_backward = False
        self._known: dict[str, Site] = {}
        self._handles: list[Any] = []
        self._passing: bool | None = None
        """Inside the model: whether it is a training pass."""
        self._grad_enabled = False
        """Whether autograd was on where the hook was called: inside, it is off."""
        self._last_layer: str | None = None
        self._shapes: dict[str, tuple[int, int]] = {}
        self._weights: dict[int, str] = {}
        self._nodes: dict[Node, Site] = {}
        self._indices: dict[Any, Tensor] = {}

    def open(self, model: nn.Module) -> None:
        """Hook the model as it is now."""
        found = find(model, self.activations, self.selects)
        self.names = [name for name, _, _ in found.sites]
        for site in self._known.values():
            if site.block is not None:
                start_over_if_full_(site.block)
            site.row, site.call, site.recompute_only = None, None, False
        self.unseen, self.compiled_inside = found.unseen, found.compiled
        self.is_open, self.saw_pass, self.saw_backward = True, False, False
        self._passing = None
        self._last_layer = None
        self._hook(model, self._guarded(MODEL, lambda module, args: self._enter(module)), pre=True)
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
        feeders = {layer for site in self.sites.values() for layer in site.feeds_on or ()}
        undecided = any(site.feeds_on is None for site in self._known.values())
        self._weights = {}
        self.layers = {}
        for name, module in found.layers:
            if name in self.failed or not (undecided or name in feeders):
                continue
            reason = why_not(module)
            if reason is not None:
                self.failed[name] = reason
                continue
            layer = self.layers[name] = Layer(name, module)
            self._weights[id(module.weight)] = name
            self._hook(module, self._guarded(name, self._before_layer, layer), pre=True, with_kwargs=True)
            self._hook(module, self._guarded(name, self._after_layer, layer))
        # Last of all, so that a model that is itself an activation is still in its pass when its own hook runs.
        self._hook(model, self._guarded(MODEL, lambda module, args, output: self._leave(output)), always_call=True)

    def close(self) -> None:
        """Remove every hook, and forget the pass and every module."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self._indices.clear()
        self.layers = {}
        self._passing = None
        self.is_open = False
        self.turn += 1
        for site in self._known.values():
            site.call = None

    def empty(self, keep: Tensor | None = None) -> None:
        """Forget the passes so far; with `keep`, a boolean on the device, only where it is false."""
        for site in self.sites.values():
            if keep is None:
                site.row = None
            elif site.row is not None:
                blank = torch.zeros_like(site.row)
                blank[-5:] = -torch.inf
                site.row = torch.where(keep.to(site.row.device), site.row, blank)

    def feeders(self) -> dict[str, tuple[str, ...]]:
        """The sites that each layer feeds."""
        feeds: dict[str, list[str]] = {}
        for site in self.sites.values():
            for name in site.feeds_on or ():
                feeds.setdefault(name, []).append(site.name)
        return {name: tuple(sites) for name, sites in feeds.items()}

    def _site(self, name: str, module: nn.Module, activation: Activation) -> Site:
        site = self._known.get(name)
        if site is None:
            site = self._known[name] = Site(name, bind(activation, module, self.epsilon))
        else:
            old = site.bound
            plain = {key: getattr(module, key) for key in old.plain}
            if old.activation is not activation or old.learned or plain != dict(old.plain):
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
            self._grad_enabled = torch.is_grad_enabled()
            try:
                with torch.no_grad():
                    call(*first, *args)
            except Exception as error:
                self._fail(place, error)

        return run

    def _fail(self, place: str, error: Exception) -> None:
        self.failed[place] = f"{type(error).__name__}: {error}"
        site = self._known.get(place)
        if site is not None:
            site.row = site.call = site.block = None
        self.sites.pop(place, None)
        self.fault(place, error)

    def _enter(self, model: nn.Module) -> None:
        if _in_backward():
            return
        training = self._grad_enabled and any(module.training for module in model.modules())
        self.on_enter(training)
        self._passing = training
        self._last_layer = None

    def _leave(self, output: Any) -> None:
        if _in_backward() or self._passing is None:
            return
        if self._passing and self.is_open:
            self._decide_outputs(output)
        self._nodes.clear()
        self._passing = None
        self.on_leave()

    def _counts(self, module: nn.Module) -> bool:
        """Whether this forward call belongs to a training pass."""
        if _in_backward():
            return False
        return self._passing if self._passing is not None else self._grad_enabled and module.training

    def _before_site(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site.call = None
        counts = self._counts(module)
        if _in_backward():
            site.recompute_only |= site.row is None
            counts = site.recompute_only
        elif not counts:
            return
        z = _first_tensor(args, kwargs)
        if z.is_meta or isinstance(z, FakeTensor):
            return
        _check_plain(z)
        self.saw_pass = True
        sample = Sample.of(z, self.limit, self.turn)
        taken = upcast(sample.take(z.detach()))
        if taken.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() and getattr(module, "inplace", True):
            taken = taken.clone()
        site.call = Call(z, sample, taken, z.grad_fn, z.output_nr, counts)

    def _after_site(self, site: Site, module: nn.Module, args: tuple[Any, ...], a: Any) -> None:
        call, site.call = site.call, None
        if call is None:
            return
        sample = call.sample
        if not isinstance(a, Tensor) or a.shape != torch.Size(sample.shape):
            raise TypeError(f"it maps {sample.shape} to {tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__}")
        if call.counts:
            self.sites.setdefault(site.name, site)
            if site.feeds_on is None:
                site.feeds_on = _feeders(call.node, self._weights) or ((self._last_layer,) if self._last_layer else ())
            if a.numel():
                self._count(site, sample, call.taken, upcast(sample.take(a.detach())))
        if a.requires_grad and a.grad_fn is not None:
            if self._passing:
                self._nodes[a.grad_fn] = site
            self._tap_gradient(site, call, a)

    def _count(self, site: Site, sample: Sample, z: Tensor, a: Tensor) -> None:
        bound = site.bound
        learned = {name: sample.spread(value.to(z.device)).to(z.dtype) for name, value in bound.learned.items()}
        slope, peak, edges = bound.evaluate(torch.where(torch.isfinite(z), z, torch.zeros_like(z)), a, learned)
        elements = torch.Size(sample.shape).numel()
        row, finite, saturated = observe(z, a, slope, peak, edges, elements, site.gate)
        site.row = row if site.row is None else merge_(site.row, row.to(site.row.device))
        axis = self._unit_axis(site, sample.shape)
        if axis is None or site.units_vary:
            site.units, site.block = None, None
            return
        size = sample.shape[axis]
        if site.units not in (None, size):
            site.units, site.block, site.units_vary = None, None, True
            return
        site.units = size
        key = (sample, axis, z.device)
        if key not in self._indices:
            self._indices[key] = sample.units(axis, z.device)
        block = count_units(finite, saturated, self._indices[key], size)
        site.block = block if site.block is None else block.add_(site.block.to(block))

    def _unit_axis(self, site: Site, shape: tuple[int, ...]) -> int | None:
        """The axis of channels or features: that of the layer which feeds the site, where the sizes agree; else by rank."""
        for name in site.feeds_on or ():
            out, from_end = self._shapes.get(name, (-1, 0))
            if 0 < from_end <= len(shape) and shape[-from_end] == out:
                return len(shape) - from_end
        return {0: None, 1: None, 2: 1, 3: 2}.get(len(shape), 1)

    def _tap_gradient(self, site: Site, call: Call, a: Tensor) -> None:
        turn, sample, z, node = self.turn, call.sample, call.z, call.node

        def add(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            given = [grad for grad in (grad_a, grad_z) if grad is not None]
            if turn != self.turn or not given or not given[0].numel():
                return
            self.saw_backward = True
            taken = [None if grad is None else upcast(sample.take(grad.detach())) for grad in (grad_a, grad_z)]
            row = observe_gradient(*taken)
            if site.row is None:
                site.row = row
            else:
                merge_(site.row, row.to(site.row.device))

        add_both = self._guarded(site.name, add)
        own, a_nr = a.grad_fn, a.output_nr
        assert own is not None
        entering = [at for at, (before, _) in enumerate(own.next_functions) if before is not None]
        if node is not None and len(entering) == 1 and own.next_functions[entering[0]][0] is node:
            at = entering[0]
            own.register_hook(lambda grad_inputs, grad_outputs: add_both(grad_outputs[0], grad_inputs[at]))
            return
        if node is not None:
            node.register_prehook(lambda grad_outputs: add_both(None, grad_outputs[call.output_nr]))
        elif z.requires_grad and z.is_leaf:
            # The leaf outlives the pass: unlike a node's, its hook must be taken off.
            self._handles.append(z.register_hook(lambda grad: add_both(None, grad)))  # type: ignore[no-untyped-call]
        own.register_prehook(lambda grad_outputs: add_both(grad_outputs[a_nr], None))

    def _before_recurrent(self, calls: list[Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.clear()
        if not self._counts(module):
            return
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        drawn = isinstance(module, nn.RNNBase) and module.dropout > 0 and module.training and module.num_layers > 1
        calls.append((given["input"], given.get("hx"), torch.get_rng_state() if drawn else None))

    def _after_recurrent(self, name: str, calls: list[Any], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not calls:
            return
        x, state, random = calls.pop()
        plain = x.data if isinstance(x, PackedSequence) else x
        if not plain.numel() or plain.is_meta or isinstance(plain, FakeTensor):
            return
        _check_plain(plain)
        self.saw_pass = True
        gates = cell_gates(module, x, state) if isinstance(module, nn.RNNCellBase) else rnn_gates(cast(nn.RNNBase, module), x, state, random)
        try:
            for gate in gates:
                place = f"{name}.{gate.layer}/{gate.name}" if gate.layer else f"{name}/{gate.name}"
                if self.selects(place):
                    self._count_gate(place, gate)
        except NotRebuiltError as reason:
            self.not_rebuilt[f"{name}, upper layers"] = str(reason)

    def _count_gate(self, place: str, gate: Gate) -> None:
        site = self._known.get(place)
        if site is None:
            row = next(row for row in (*self.activations, *ACTIVATIONS) if row.name == gate.function)
            site = Site(place, bind_plain(row, self.epsilon), feeds_on=(), output=False, gate=gate.function == "sigmoid")
            self._known[place] = site
        self.sites.setdefault(place, site)
        sample = Sample.of(gate.z, self.limit, self.turn)
        z = upcast(sample.take(gate.z))
        a = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}[gate.function](z)
        self._count(site, sample, z, a)

    def _before_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counts(module):
            return
        x = _first_tensor(args, kwargs)
        if x.is_floating_point() and x.numel() and x.layout == torch.strided:
            layer.observe_input(module, x, self.limit, self.turn)

    def _after_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and self._counts(module):
            self._last_layer = layer.name
            self._shapes[layer.name] = (width(module), output.ndim - feature_axis(module, output.ndim))

    def _decide_outputs(self, output: Any) -> None:
        """A site is an output if the model's output depends on it through no further weight."""
        undecided = {node: site for node, site in self._nodes.items() if site.output is None}
        if not undecided:
            return
        for site in undecided.values():
            site.output = False
        leaves = (leaf for leaf in tree_leaves(_opened(output)) if isinstance(leaf, Tensor) and leaf.grad_fn is not None)
        for node in _upstream([leaf.grad_fn for leaf in leaves], lambda node: node in undecided or _has_weight(node)):
            if node in undecided:
                undecided[node].output = True


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _first_tensor(args: Iterable[Any], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("it was called without a tensor")


def _check_plain(z: Tensor) -> None:
    if z.is_nested or z.layout != torch.strided or not z.is_floating_point():
        raise TypeError(f"its input is a {'nested ' if z.is_nested else ''}{z.dtype} tensor of layout {z.layout}, not a dense tensor of real numbers")
    if type(z) not in (Tensor, nn.Parameter):
        raise TypeError(f"its input is a {type(z).__name__}, not a plain tensor")
    if torch._C._functorch.is_functorch_wrapped_tensor(z):
        raise TypeError("it runs inside a torch.func transform")


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
