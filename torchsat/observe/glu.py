"""Measures the gate of a GLU, which is the sigmoid of the second half of its input z. The kernel of torch never writes the opened gate to memory.

The output is gate times `value`, the first half of z, so that dL/da of the gate is the gradient of the output times `value`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchsat.observe.feeders import Cut
from torchsat.observe.graph import maker
from torchsat.observe.meter import Call, exact_z
from torchsat.sampling import Sample
from torchsat.sites import Site
from torchsat.statistics import upcast
from torchsat.tensors import plain

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation


def begin(observation: Observation, place: str, module: nn.Module, z: Tensor, axis: int) -> Callable[[Any], None] | None:
    """Called before a GLU over this axis of z runs. Returns what is to be called with its output; None: nothing."""
    sites, meter = observation.sites, observation.meter
    site = sites.known.setdefault(place, Site(place, sites.bind_named("sigmoid"), "call", gate=True))
    value, gate = plain(z).detach().chunk(2, axis)
    call = meter.begin(site, gate, module, False)
    if call is None:
        return None
    kept = upcast(call.sample.take(value)).clone()
    return functools.partial(_end, observation, site, dataclasses.replace(call, node=z.grad_fn, output_nr=z.output_nr), kept, axis)


def _end(observation: Observation, site: Site, call: Call, value: Tensor, axis: int, a: Tensor) -> None:
    sample, meter = call.sample, observation.meter
    assert isinstance(sample, Sample)
    if call.counts:
        meter.ran(site, call.steps, call.z, Cut(axis, sample.shape[axis], sample.shape[axis]))
        exact = exact_z(sample, call.z)
        if exact is not None:
            # The sigmoid grows with z, so that its extremes are those of z.
            tops = exact[1:3]
            exact[3:] = torch.where(tops.isfinite(), torch.stack([tops[0].sigmoid(), -(-tops[1]).sigmoid()]), tops)
        meter.count(site, sample, call.taken, torch.sigmoid(upcast(call.taken)), axis, exact=exact)
    if a.grad_fn is not None:
        add, hear = meter.gradient_adder(site, sample, call.taken), observation.passes.ear()

        def read(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            hear(grad_a, grad_z)
            add(
                None if grad_a is None else upcast(sample.take(grad_a.detach())) * value,
                None if grad_z is None else upcast(sample.take(grad_z.detach().chunk(2, axis)[1])),
            )

        read_guarded = observation.guard(site.name, read)
        maker(a)[0].register_hook(lambda grad_inputs, grad_outputs: read_guarded(grad_outputs[0], grad_inputs[0]))
