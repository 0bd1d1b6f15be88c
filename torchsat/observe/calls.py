"""Measures function calls that are activations: `F.gelu(x)`, `x.tanh()`, softmax, attention, GLU.

A TorchFunctionMode (mode.py) is called in place of every function of torch, and a stack of the modules that are running says where a call happens. A
call *is heard* if the mode is called for it. The mode is open only in an observation, only while the outermost module runs or between the parts of a
model that are called one by one (outside.py), and not inside modules that are sites themselves. A call is named after the module in whose forward it
happens and numbered within one run of that forward: `blocks.0/gelu`, `blocks.0/gelu_1`; directly in the model, `gelu`.

With a mode open, torch.nn's encoder layers and attention do not take their fused inference path. Where they would take it the mode is closed, so that
training stays bit for bit the same, and calls inside are not heard. A function that the user has compiled is compiled once more when it is called
under the mode, and calls inside it are not heard either.

As long as the structure of the model is being learned, the graph is walked wherever a module begins or ends, and what it holds that no site accounts
for is named (graph.py). A condition such as `z > 0` is not in the graph, so it is remembered here which conditions were computed from a signal
(conditions.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import parametrize

from torchsat import internals
from torchsat.activations import CLAMP, Activation, Bound, bind_call, calls_of
from torchsat.faults import MODEL
from torchsat.observe import glu, logits, softmaxes
from torchsat.observe.conditions import Conditions
from torchsat.observe.forms import Forms
from torchsat.observe.functions import Functions, may_be_function
from torchsat.observe.graph import Survey, ends, has_weight
from torchsat.observe.meter import Call, check_plain
from torchsat.observe.mode import CallMode, Frame, Function
from torchsat.observe.nodes import IN_TRANSFORM, is_size
from torchsat.observe.outside import FUSED, Outside
from torchsat.observe.routers import CHOICES, SCORES, Routers
from torchsat.sites import Site
from torchsat.structure import Found
from torchsat.tensors import plain

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

Finish = Callable[[Any], None]
"""Called with the result of a function call, to measure it."""


class Role(Enum):
    """The functions that are sites but no element-wise activations."""

    SOFTMAX = "softmax"
    SOFTMIN = "softmin"
    GUMBEL = "gumbel_softmax"
    ATTENTION = "attention"
    GLU = "glu"
    CLAMP = "clamp"
    LOGITS = "logits"


_CLAMPS = calls_of("clamp", "clip", "clamp_min", "clamp_max")
ROLES: Mapping[Function, Role] = {
    torch.softmax: Role.SOFTMAX,
    torch.special.softmax: Role.SOFTMAX,
    F.softmax: Role.SOFTMAX,
    Tensor.softmax: Role.SOFTMAX,
    F.softmin: Role.SOFTMIN,
    F.gumbel_softmax: Role.GUMBEL,
    F.scaled_dot_product_attention: Role.ATTENTION,
    F.multi_head_attention_forward: Role.ATTENTION,
    F.glu: Role.GLU,
    **dict.fromkeys(_CLAMPS, Role.CLAMP),
}
PRODUCTS = frozenset(
    (
        *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, torch.einsum),
        *(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.tensordot, F.linear, F.bilinear, F.multi_head_attention_forward),
        *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    )
)
"""The functions that use a weight. A site on whose output one of them runs does not compute an output of the model."""
UNSEEN: Mapping[str, str] = {
    "log_softmax": "its derivative does not vanish: there is nothing to saturate",
    "special_log_softmax": "its derivative does not vanish: there is nothing to saturate",
    "flex_attention": "fused attention with scores of the user's own, which torchsat does not compute again",
}
"""The functions that are heard but not measured, by name, and why."""
_HARD = "its samples are hard (hard=True), so that the probabilities behind them are not seen"
_NOT_HEARD = "what it calls outside of its own forward is not heard while torch.compile or another TorchFunctionMode is in use"
_FUSED = "it is frozen and in evaluation mode, where torch runs it as one kernel"
_SOFTMAX = Bound(Activation("softmax"), lambda z: z, {}, {}, 0.0, None)
"""Stands where other sites have their element-wise function, since a softmax has none."""
_PRODUCTS = ("Bmm", "Baddbmm", "Matmul")
"""How the names of those autograd nodes begin that are batched matrix products."""


class Calls:
    """Hears the function calls of one observation and measures those that are activations."""

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self._mode = CallMode(self._hear)
        self._outside: Outside | None = None
        self._conditions = Conditions()
        self._routers = Routers(observation)
        self._names: frozenset[str] = frozenset()
        """The sites that are modules. A call that would have such a name gets another one."""
        self._functions = Functions(observation)
        self._forms = Forms(observation, self._conditions)
        self._roles: dict[Any, Activation | Role] = dict(ROLES)
        if logits.NAME in observation.options.extras:
            self._roles[F.cross_entropy] = Role.LOGITS
        for row in reversed(observation.options.activations):
            self._roles.update(dict.fromkeys(row.calls, row))

    def reset(self) -> None:
        """Forget the modules that are running: an exception ended a forward without calling hooks."""
        self.end_pass()
        self._mode.reset()

    def remove(self) -> None:
        """Take everything off, since the observation is over."""
        self.reset()
        if self._outside is not None:
            self._outside.remove()

    def end_pass(self) -> None:
        """Note that a pass outside of the model's own forward is over."""
        if self._outside is not None:
            self._outside.close()

    def hook(self, found: Found) -> Callable[[], None]:
        """Hook the beginning of each forward. The function that is returned hooks their ends."""
        self._names = self._functions.names = self._forms.names = frozenset(found.names)
        self._routers.know(found)
        self._outside = Outside(found, self._mode)
        callers = {each.module for each in found.callers}
        others = [each for each in found.modules if each.module not in callers]
        for each in found.callers:
            self._observation.hook_before(each.module, MODEL, self._begin_module, each.name, each.explained)
        for other in others:
            self._observation.hook_before(other.module, None, self._begin_other, other.name)

        def hook_ends() -> None:
            for each in found.callers:
                self._observation.hook_after(each.module, MODEL, self._end_module, each.explained, always=True)
            for other in others:
                self._observation.hook_after(other.module, None, self._end_other, always=True)

        return hook_ends

    def _is_explained(self, module: nn.Module) -> bool:
        """Whether a module of the user's own is known to be a site itself."""
        return self._observation.sites.own.get(module) is not None

    def _begin_module(self, path: str, explained: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module's forward begins, and look for activations that its parent has computed before and no hook saw."""
        observation, above = self._observation, self._mode.top
        counts = internals.in_backward() or observation.passes.counts(module)
        if not counts and above is None:
            return
        if above is None and not internals.in_backward():
            self._begin_outermost(module, ends((args, kwargs)))
        elif above is not None and observation.lineage.looks and counts:
            observation.lineage.look(ends((args, kwargs)), above.path)
        fused = counts and _takes_fused_path(module, (*args, *kwargs.values()), observation.guard.grad_enabled)
        if fused:
            observation.note_if_wanted(path or type(module).__name__, _FUSED)
        hears = counts and not (explained or fused or self._is_explained(module))
        self._mode.enter(Frame(path, module, hears, explained and counts))

    def _begin_other(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before a module in whose forward no activation is called. There is only something to do where it is called by itself."""
        if self._mode.top is None and not internals.in_backward():
            self._observation.guard(MODEL, self._begin_module)(path, False, module, args, kwargs)

    def _end_other(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        top = self._mode.top
        if top is not None and top.module is module:
            self._observation.guard(MODEL, self._end_module)(False, module, args, output)

    def _begin_outermost(self, module: nn.Module, inputs: set[Node]) -> None:
        """Note that the model is called, or a part of it while the model itself does not run. `inputs` are the nodes that computed its arguments."""
        lineage, outside = self._observation.lineage, self._outside
        assert outside is not None
        if self._observation.passes.is_inside is None:
            self._observation.passes.has_run_parts = True
            begins, path = outside.begins(module)
            if begins:
                lineage.begin_pass()
            elif lineage.looks:
                lineage.look(inputs, path, outside.owns)
        else:
            outside.close()
        if lineage.looks:
            # What was computed before does not belong to the model.
            lineage.survey.skip(inputs)

    def _end_module(self, explained: bool, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame, lineage, outside = self._mode.leave(module), self._observation.lineage, self._outside
        if frame is None:
            return
        if self._mode.top is None:
            self._observation.passes.leave_part(output)
        if self._mode.top is None and outside is not None and not internals.in_backward() and self._observation.passes.is_inside is None:
            if output is None and sys.exc_info()[0] is not None:
                outside.close()
            elif not outside.ends():
                self._observation.note_if_wanted(MODEL, _NOT_HEARD)
        if not lineage.looks:
            return
        if explained or self._is_explained(module) or isinstance(module, parametrize.ParametrizationList):
            # A parametrization computes a weight. There is no signal in it.
            lineage.survey.explain(ends(output), set())
        else:
            lineage.look(ends(output), frame.path)
        if self._mode.top is None and self._observation.passes.is_inside is None:
            lineage.end_part()

    def _hear(self, frame: Frame, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch, and measure it if it is an activation."""
        observation, role, outside = self._observation, self._roles.get(function), self._outside if frame is self._mode.outside else None
        if outside is not None and (outside.is_over() or internals.in_backward()):
            return self._mode.origins.call(function, args, kwargs)
        if outside is not None and function is Tensor.backward:
            outside.end_pass()
        if function in PRODUCTS and observation.lineage.looks:
            observation.guard(MODEL, observation.lineage.enters_layer)(*ends(args))
        reason = UNSEEN.get(getattr(function, "__name__", "")) if role is None else None
        guard, lineage = observation.guard, observation.lineage
        looks = guard.is_open and frame.hears and lineage.looks
        if function in CHOICES and guard.is_open and frame.hears and role is None:
            return self._hear_choice(frame, function, args, kwargs)
        if not guard.is_open or not frame.hears:
            return self._mode.origins.call(function, args, kwargs)
        if (role is None and reason is None) or (role is Role.CLAMP and _bounds(function, args, kwargs) is None):
            return self._call_other(frame, outside, function, args, kwargs)
        if outside is not None and not outside.claims((args, kwargs)):
            return self._mode.origins.call(function, args, kwargs)
        place = frame.place(_site_name(role, function))
        place += "_call" if place in self._names else ""
        before: set[Node] = ends((args, kwargs)) if looks else set()
        if looks:
            guard(MODEL, lineage.look)(before, frame.path, None if outside is None else outside.owns)
        finish: Finish | None = None
        if role is None:
            observation.note_if_wanted(place, reason or "")
        elif observation.options.selects(place):
            finish = guard(place, self._before, place, role, frame.module)(function, args, kwargs)
        result = self._mode.origins.call(function, args, kwargs)
        if finish is not None:
            guard(place, finish)(result)
        if function in SCORES:
            guard(MODEL, self._routers.heard_scores)(frame, result)
        if looks:
            guard(MODEL, lineage.survey.explain)(ends(result), before)
        return result

    def _call_other(self, frame: Frame, outside: Outside | None, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is no activation. It may be a mathematical function of a signal, or choose elements of one by a condition."""
        observation, guard = self._observation, self._observation.guard
        lineage, begun = observation.lineage, list[tuple[str, Finish | None]]()
        hears_forms = self._forms.are_heard
        if may_be_function(function, args) and (outside is None or outside.claims((args, kwargs))):
            place = guard(MODEL, self._functions.place)(frame, function, args, kwargs)
            if place is not None:
                begun.append((place, guard(place, self._functions.begin)(place, frame.module, function, args, kwargs)))
        if not begun and hears_forms and (form := guard(MODEL, self._forms.find)(frame, function, args, kwargs)) is not None:
            begun.append((form.place, guard(form.place, self._forms.begin)(form, frame.module, function)))
        result = self._mode.origins.call(function, args, kwargs)
        if hears_forms:
            guard(MODEL, self._conditions.heard)(function, (*args, *kwargs.values()), result, lineage.survey.choices if lineage.looks else None)
        for place, finish in begun:
            if finish is not None:
                guard(place, finish)(result)
        return result

    def _hear_choice(self, frame: Frame, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that chooses the highest of several values, and count its choices, if it is a router of a mixture of experts."""
        guard, lineage = self._observation.guard, self._observation.lineage
        result = self._mode.origins.call(function, args, kwargs)
        is_router = guard(MODEL, self._routers.heard_choice)(frame, function, args, kwargs, result)
        if lineage.looks and is_router:
            guard(MODEL, lineage.survey.explain)(ends(result), ends((args, kwargs)))
        elif self._forms.are_heard:
            guard(MODEL, self._conditions.heard)(function, (*args, *kwargs.values()), result, lineage.survey.choices if lineage.looks else None)
        return result

    def _before(
        self, place: str, role: Activation | Role, module: nn.Module, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Finish | None:
        """Called before a function that is a site runs. Returns what is to be called with its result; None: nothing."""
        rest = args[1:]
        z = args[0] if args else kwargs.get("query" if role is Role.ATTENTION else "logits" if role is Role.GUMBEL else "input")
        if isinstance(z, Tensor) and self._observation.passes.is_inside and internals.stands_for_others(z):
            self._observation.note_if_wanted(place, IN_TRANSFORM)
        if not isinstance(z, Tensor) or not z.is_floating_point() or not internals.is_real(z) or not z.numel():
            return None
        if isinstance(role, Activation):
            return self._before_activation(place, role, module, z, function, rest, kwargs)
        if role is Role.CLAMP:
            return self._before_activation(place, CLAMP, module, z, function, (), _bounds(function, args, kwargs) or {})
        if not z.ndim:
            return None
        check_plain(plain(z))
        if role is Role.GLU:
            return glu.begin(self._observation, place, module, z, int(rest[0] if rest else kwargs.get("dim", -1)) % z.ndim)
        if role is Role.GUMBEL and (rest[1] if len(rest) > 1 else kwargs.get("hard", False)):
            self._observation.note_if_wanted(place, _HARD)
            return None
        if role is Role.LOGITS:
            is_counted = self._observation.passes.counts(module)
            return (lambda _: self._observation.logits.heard(place, z, min(1, z.ndim - 1))) if is_counted else None
        site = self._observation.sites.known.setdefault(place, Site(place, _SOFTMAX, "softmax"))
        counts = self._observation.meter.counts_at(place, module)
        if counts is None:
            return None
        # Neither an attention nor a softmax overwrites its input, so everything else can wait until the call has succeeded.
        if role is Role.ATTENTION:
            began = internals.next_node_number()
            return functools.partial(softmaxes.end_attention, self._observation, site, function, args, kwargs, counts, began)
        if role is Role.GUMBEL:
            axis = int(rest[3] if len(rest) > 3 else kwargs.get("dim", -1)) % z.ndim
            return functools.partial(softmaxes.end_gumbel, self._observation, site, self._observation.meter.rows_of(z, axis, False, place), counts)
        given = rest[0] if rest else kwargs.get("dim")
        axis = (_implicit_axis(z.ndim) if given is None else int(given)) % max(1, z.ndim)
        if z.ndim == 4 and axis == 3 and site.is_attention is None and z.grad_fn is not None:
            # The logits of attention are a batched matrix product of queries and keys. Other tensors with four axes, such as images, are not.
            site.is_attention = any(node.name().startswith(_PRODUCTS) for node in Survey().upstream([z.grad_fn], has_weight, 64))
        rows = self._observation.meter.rows_of(z, axis, site.is_attention is not False, place)
        call = Call(z, rows, z, z.grad_fn, z.output_nr, counts)
        return functools.partial(softmaxes.end_softmax, self._observation, site, call, role is Role.SOFTMIN)

    def _before_activation(
        self, place: str, row: Activation, module: nn.Module, z: Tensor, function: Function, rest: Sequence[Any], kwargs: dict[str, Any]
    ) -> Finish | None:
        sites, site = self._observation.sites, self._observation.sites.known.get(place)
        bound = bind_call(row, function, tuple(rest), kwargs, sites.epsilon, site.bound if site is not None else None)
        site = sites.known.setdefault(place, Site(place, bound, "call"))
        site.bound = bound
        in_place = function.__name__.endswith("_") or "out" in kwargs or kwargs.get("inplace", False) or any(value is True for value in rest)
        call = self._observation.meter.begin(site, z, module, bool(in_place))
        return None if call is None else functools.partial(self._observation.meter.end, site, call)


def attach(observation: Observation, found: Found) -> Callable[[], None] | None:
    """Measure function calls, unless the user does not want that. The function that is returned hooks the ends of forwards."""
    return observation.calls.hook(found) if observation.options.calls else None


def _site_name(role: Activation | Role | None, function: Function) -> str:
    if isinstance(role, Activation):
        return role.name
    if role is None:
        return function.__name__
    return role.value if role in (Role.GLU, Role.CLAMP, Role.GUMBEL, Role.LOGITS) else "softmax"


def _bounds(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The bounds of a clamp of a signal, by name. None where they are tensors, or where the clamp only keeps a divisor away from 0."""
    z = args[0] if args else kwargs.get("input")
    if not isinstance(z, Tensor) or not z.requires_grad or is_size(next(iter(ends(z)), None)):
        return None
    names = ("max",) if function.__name__.startswith("clamp_max") else ("min", "max")
    given = {**dict(zip(names, args[1:], strict=False)), **{name: kwargs[name] for name in names if name in kwargs}}
    low, high = (bound if isinstance(bound := given.get(name), (int, float)) else None for name in ("min", "max"))
    is_plain = all(bound is None or isinstance(bound, (int, float)) for bound in given.values())
    return {"min": low, "max": high} if is_plain and (low is None or high is None or low < high) else None


def _takes_fused_path(module: nn.Module, given: Iterable[Any], grad_enabled: bool) -> bool:
    """Whether torch.nn may run this module in one fused kernel for inference, which it does not do while a mode is open."""
    if module.training or not isinstance(module, FUSED):
        return False
    tensors = [*module.parameters(), *(value for value in given if isinstance(value, Tensor))]
    return not (grad_enabled and any(tensor.requires_grad for tensor in tensors))


def _implicit_axis(ndim: int) -> int:
    """The axis that F.softmax takes where none is given."""
    return 0 if ndim in (0, 1, 3) else 1
