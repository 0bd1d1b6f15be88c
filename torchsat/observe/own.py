"""Finds out whether a module that the user has written, without children, is an activation, and measures it if it is one.

This is decided from its inputs z and outputs a in real calls. If they fit a row of the table of activations, the module is that function. Otherwise
autograd gives its derivative at each element. If that is a function of z, the module is an activation of which neither the peak nor the plateaus are
known. If an output depends on several elements of the input, it is no activation.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchsat import internals
from torchsat.observe.graph import derivative
from torchsat.observe.meter import Call
from torchsat.recognise import differentiated, differs, is_function, recognise
from torchsat.sampling import Sample, Units
from torchsat.sites import Site
from torchsat.statistics import upcast
from torchsat.structure import Found
from torchsat.tensors import plain

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

NOT_DIFFERENTIATED = "it may be an activation, but its derivative cannot be had inside a checkpoint: name it in activations="
_LINEAR_CALLS = 20
"""A module is taken for linear after it has looked so in this many calls. The inputs of the first calls may not reach the limits of a clamp."""


def attach(observation: Observation, found: Found) -> None:
    """Hook every module that may be an activation that the user has written."""
    for each in found.own:
        if not observation.sites.has_failed(each.name):
            calls: list[Call] = []
            observation.hook_before(each.module, each.name, _before, observation, each.name, calls)
            observation.hook_after(each.module, each.name, _after, observation, each.name, calls, always=True)


def _before(observation: Observation, name: str, calls: list[Call], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls.clear()
    z = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if z is None or not z.is_floating_point() or not internals.is_real(z) or z.layout != torch.strided or z.is_nested or not z.numel():
        return
    counts = observation.passes.counts(module)
    if internals.in_backward():
        counts = name in observation.sites.known and observation.meter.counts_at(name, module) is True
    if counts or internals.in_backward():
        sample = observation.meter.sample_of(z, name)
        taken, exact = upcast(sample.take(plain(z).detach())).clone(), observation.meter.exact_z(sample, plain(z))
        calls.append(Call(z, sample, taken, z.grad_fn, z.output_nr, counts, exact))


def _after(observation: Observation, name: str, calls: list[Call], module: nn.Module, args: tuple[Any, ...], a: Any) -> None:
    """Measure a call of a module that is known to be an activation, or find out whether it is one."""
    call = calls.pop() if calls else None
    if call is None or not isinstance(a, Tensor) or a.shape != call.z.shape or not a.is_floating_point():
        return
    sample, sites, slope = call.sample, observation.sites, None
    assert isinstance(sample, Sample)
    if module not in sites.own and not internals.in_backward():
        slope = _find_out(observation, name, module, call, a)
    bound = sites.own.get(module)
    if bound is None:
        return
    site = sites.known.setdefault(name, Site(name, bound))
    if call.counts and not internals.in_backward():
        taken = sample.take(plain(a).detach())
        if site.bound.constants is not None or site.bound.activation.function:
            _doubt(observation, site, module, call.taken, taken)
        if slope is None and site.bound.constants is None:
            slope = _slope(observation, call, a, None)
            if slope is None:
                observation.note(name, NOT_DIFFERENTIATED)
                return
        observation.meter.ran(site, [call.node], last_layer=True)
        slope = None if slope is None else upcast(sample.take(slope))
        observation.meter.count(site, sample, call.taken, taken, slope=slope, exact=observation.meter.exact(call, a))
    observation.meter.tap_output(site, call, a)


def _find_out(observation: Observation, name: str, module: nn.Module, call: Call, a: Tensor) -> Tensor | None:
    """Decide what this module computes and keep it in `sites.own`, if this call is enough to tell. Returns f'(z) of this call, if it was needed."""
    sample, sites = call.sample, observation.sites
    assert isinstance(sample, Sample)
    bound, slope = recognise(call.taken, sample.take(plain(a).detach()), observation.options.activations, observation.options.epsilon), None
    if bound is None:
        slope = _slope(observation, call, a, None)
        if slope is None:
            if next(module.parameters(), None) is None and observation.lineage.learns and internals.saving_is_hooked():
                observation.note_if_wanted(name, NOT_DIFFERENTIATED)
            return None
        weights = 1.5 + torch.cos(torch.arange(a.numel(), device=a.device, dtype=torch.float32)).reshape(a.shape).to(a.dtype)
        mixed = _slope(observation, call, a, weights)
        scale = 64 * torch.finfo(a.dtype).eps * slope.abs().amax()
        grouped = [None, *(Units(sample, axis).index(a.device) for axis in {min(1, a.ndim - 1), a.ndim - 1} if a.ndim > 1)]
        alone = mixed is not None and bool(((mixed - slope * weights).abs() <= scale).all())
        if alone and is_function(call.taken, upcast(sample.take(slope)), grouped):
            bound = differentiated(re.sub(r"[^A-Za-z0-9_.-]", "_", type(module).__name__), observation.options.epsilon)
        elif alone and sites.linear_calls.setdefault(module, 0) < _LINEAR_CALLS:
            sites.linear_calls[module] += 1
            return None
    sites.own[module] = bound
    if bound is not None:
        observation.forget_inside(name)
    return slope


def _slope(observation: Observation, call: Call, a: Tensor, direction: Tensor | None) -> Tensor | None:
    """f'(z) times a direction, by autograd through the graph of the call that has just run; None where that is not possible."""
    if a.grad_fn is None or call.node is None:
        return None
    with observation.meter.ignoring_gradients():
        return derivative(a, call.node, call.output_nr, torch.ones_like(a) if direction is None else direction)


def _doubt(observation: Observation, site: Site, module: nn.Module, z: Tensor, a: Tensor) -> None:
    """Check that a module still computes the function that it was recognised as. If it does not, its derivative comes from autograd from now on."""
    if site.doubt is not None and bool(site.doubt):
        site.doubt, site.bound = None, differentiated(type(module).__name__, observation.options.epsilon)
        observation.sites.own[module] = site.bound
        return
    changed = differs(site.bound, z, a)
    if changed.is_cuda:
        # The flag is read in the next observation. Reading it now would wait for the device.
        site.doubt = torch.zeros((), dtype=torch.bool, pin_memory=True).copy_(changed, non_blocking=True)
    elif bool(changed):
        site.doubt = changed
        _doubt(observation, site, module, z, a)
