"""Measures activations that are modules: those that the table of activations lists, such as nn.ReLU, nn.Tanh, and rows that the user has added."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchsat import internals
from torchsat.activations import bind
from torchsat.attributes import stored, stored_or
from torchsat.observe.meter import Call
from torchsat.observe.nodes import IN_TRANSFORM
from torchsat.sharding import part_of
from torchsat.sites import Site
from torchsat.structure import Found

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

RunningCalls = dict[int, Call]
"""The call of one module that is running, by the id of the thread."""


def attach(observation: Observation, found: Found) -> None:
    """Hook every module whose function is known from a row of the table."""
    for each in found.activations:
        if observation.sites.has_failed(each.name):
            continue
        try:
            site = observation.sites.bind(each.name, each.module, each.activation)
        except Exception as error:
            observation.fail(each.name, error)
            continue
        calls: RunningCalls = {}
        observation.hook_before(each.module, each.name, _before, observation, site, calls)
        observation.hook_after(each.module, each.name, _after, observation, site, calls, always=True)


def _before(observation: Observation, site: Site, calls: RunningCalls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    thread = threading.get_ident()
    calls.pop(thread, None)
    z = first_tensor(args, kwargs)
    if not internals.is_real(z):
        if observation.passes.is_inside and internals.stands_for_others(z):
            observation.note_if_wanted(site.name, IN_TRANSFORM)
        return
    if site.bound.activation.computes(module):
        # Attributes and parameters may have changed since the hooks were made.
        if any(stored(module, name) != value for name, value in site.bound.plain.items()):
            site.bound = bind(site.bound.activation, module, observation.options.epsilon)
        if site.bound.learned:
            learned = {name: part_of(stored(module, name)).detach().reshape(value.shape) for name, value in site.bound.learned.items()}
            site.bound = dataclasses.replace(site.bound, learned=learned)
    # A module that the user has written may overwrite its input without having an attribute `inplace`.
    in_place = stored_or(module, "inplace", not type(module).__module__.startswith("torch.nn."))
    call = observation.meter.begin(site, z, module, in_place)
    if call is not None:
        calls[thread] = call


def _after(observation: Observation, site: Site, calls: RunningCalls, module: nn.Module, args: tuple[Any, ...], a: Any) -> None:
    call = calls.pop(threading.get_ident(), None)
    # After an error the call is only let go of, since it holds the graph that led to it.
    if call is not None and not (a is None and sys.exc_info()[0] is not None):
        observation.meter.end(site, call, a)


def first_tensor(args: Iterable[Any], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor that a module was called with. Raises TypeError where there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("it was called without a tensor")
