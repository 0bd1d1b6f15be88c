"""Measures calls of mathematical functions (functions.py) that act on the signal: `torch.sin(30 * x)`, `F.relu(x).square()`, `x.exp()`.

Whether such a call is a site shows only after it: `x.square()` may be the first step of a normalisation, and `y.abs()` a part of the loss. So a call
is measured under the name of its place, and the walk over the graph decides (graph.py, nodes.py): where it would name the function as one that no
site accounts for, the place becomes a site. The rows of a name that is no site reach nobody. Once the structure of the model is known, only the
places that have become sites are measured.

Never a site is a function of a parameter alone (`A_log.exp()`) or of data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchsat import functions, internals
from torchsat.activations import Activation, bind_call
from torchsat.functions import EXPONENTIAL, POWER, QUOTIENT, SQUARE
from torchsat.observe.graph import maker
from torchsat.observe.meter import Call
from torchsat.observe.mode import Frame, Function
from torchsat.observe.nodes import comes_from_parameter
from torchsat.sites import Site
from torchsat.tensors import plain, why_unread

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

_PRODUCTS = frozenset((torch.mul, torch.multiply, Tensor.mul, Tensor.mul_, Tensor.multiply))


class FunctionCall:
    """One call, which may turn out to be a site."""

    def __init__(self, observation: Observation, site: Site, unread: str | None) -> None:
        self._observation = observation
        self._site = site
        self._unread = unread
        self._before = observation.meter.latest
        self.place = site.name

    def decide(self, name: str, reason: str) -> str | None:
        """Make the place a site, since its function is on the way of the signal. Returns why that cannot be done; None where it is a site now."""
        sites, site = self._observation.sites, self._site
        if self._unread is not None:
            return self._unread
        if not sites.has_failed(site.name) and sites.known.setdefault(site.name, site) is site:
            sites.has_run(site, self._before)
        return None


class Functions:
    """The calls of mathematical functions in one observation."""

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self.names: frozenset[str] = frozenset()
        """The sites that are modules. A call that would have such a name gets another one."""
        self._tentative: dict[str, Site] = {}
        """The places that are measured in this observation, although it is not known yet whether they are sites."""

    def place(self, frame: Frame, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The place of a call of a function that acts on a signal; None where there is nothing to be measured."""
        given = _read(function, args, kwargs)
        if given is None:
            return None
        row, z, _ = given
        if not is_signal(z):
            return None
        place = frame.place(row.name) if functions.is_judged(row) else frame.place_of_line(row.name)
        place += "_call" if place in self.names else ""
        observation = self._observation
        return place if observation.options.selects(place) and (observation.lineage.looks or place in observation.sites.known) else None

    def begin(self, place: str, module: nn.Module, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], None] | None:
        """Called before the function runs. Returns what is to be called with its result; None: nothing."""
        given, observation, sites = _read(function, args, kwargs), self._observation, self._observation.sites
        assert given is not None
        row, z, rest = given
        unread, began = why_unread(plain(z)), internals.next_node_number()
        known = sites.known.get(place) or self._tentative.get(place)
        bound = bind_call(row, function, (), rest, sites.epsilon, known.bound if known is not None else None)
        site = known or Site(place, bound, "call" if functions.is_judged(row) else "function")
        site.bound = bound
        if place not in sites.known:
            self._tentative[place] = site
        heard = FunctionCall(observation, site, None if unread is None else f"its input is {unread}")
        if unread is not None:
            return lambda a: self._mark(a, began, heard)
        in_place = (function.__name__.endswith("_") and not function.__name__.endswith("__")) or "out" in kwargs
        call = observation.meter.begin(site, z, module, in_place)
        return None if call is None else lambda a: self._end(site, call, a, began, heard)

    def _end(self, site: Site, call: Call, a: Any, began: int, heard: FunctionCall) -> None:
        """Measure a call after it has returned a."""
        if isinstance(a, Tensor) and a.shape == call.z.shape:
            self._observation.meter.end(site, call, a)
            self._mark(a, began, heard)

    def _mark(self, a: Any, began: int, heard: FunctionCall) -> None:
        """Let the walk over the graph know the nodes of a call."""
        lineage = self._observation.lineage
        if lineage.looks and isinstance(a, Tensor) and a.grad_fn is not None:
            lineage.survey.hear(maker(a)[0], began, heard)


def may_be_function(function: Function, args: tuple[Any, ...]) -> bool:
    """Whether a call is one of a mathematical function. Asked at each call of torch."""
    return function in functions.ROWS or (function in _PRODUCTS and len(args) == 2 and args[0] is args[1])


def is_signal(z: Tensor) -> bool:
    """Whether this is computed from a signal, and is no function of a parameter alone."""
    node: Node | None = z.grad_fn if z.requires_grad else None
    return node is not None and z.numel() > 0 and not internals.stands_for_others(z) and not comes_from_parameter(node)


def _read(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Activation, Tensor, dict[str, Any]] | None:
    """The row, the signal and the parameters of a call; None where it is a call of no such function, or not of one tensor."""
    row = functions.ROWS.get(function)
    given: tuple[Any, ...] = (*args, *(kwargs[name] for name in ("input", "self", "other", "exponent") if name in kwargs))
    z: Any = given[0] if given else None
    other: Any = given[1] if len(given) > 1 else None
    if function in _PRODUCTS:
        return (SQUARE, z, {}) if isinstance(z, Tensor) and z is other else None
    if row is None:
        return None
    rest: dict[str, Any] = {}
    if row in (POWER, EXPONENTIAL, QUOTIENT):
        if row is POWER and isinstance(other, Tensor):
            row, z, other = EXPONENTIAL, other, z
        if not isinstance(other, (int, float)) or isinstance(other, bool) or (row is EXPONENTIAL and other <= 0):
            return None
        row, rest = (SQUARE, {}) if row is POWER and other == 2 else (row, {row.parameters[0]: other})
    elif function.__name__ in ("logit", "special_logit") and (other is not None or "eps" in kwargs):
        return None
    return (row, z, rest) if row is not None and isinstance(z, Tensor) else None
