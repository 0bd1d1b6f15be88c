"""Measures the gates of recurrent layers. One kernel of torch hides them, so replay.py computes them again from inputs, hidden states and weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.rnn import PackedSequence

from torchsat import internals
from torchsat.expressions import GATES
from torchsat.observe.graph import ends
from torchsat.observe.meter import check_plain
from torchsat.replay import Gate, NotRebuiltError, State, cell_gates, rnn_gates, why_unknown
from torchsat.sharding import part_of
from torchsat.sites import Rows, Site
from torchsat.statistics import upcast
from torchsat.structure import Found, NamedModule

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

_MATRIX = re.compile(r"weight_(ih|hh)(_l\d+(_reverse)?)?")
"""The names of the weight matrices. Libraries add other parameters, such as `weight_hh_l0_raw`, from which such a matrix is computed."""


@dataclass(frozen=True)
class Given:
    """The arguments of one call of a recurrent layer."""

    x: Tensor | PackedSequence
    state: State
    random: Tensor | None
    """The state of the CPU's random generator before the call, if a dropout between layers draws from it."""


def attach(observation: Observation, found: Found) -> None:
    """Hook every nn.LSTM, nn.GRU, nn.RNN and their cells."""
    for each in found.recurrent:
        calls: list[Given] = []
        observation.hook_before(each.module, each.name, _before, observation, calls)
        observation.hook_after(each.module, each.name, _after, observation, each.name, calls, always=True)


def matrices(layer: NamedModule) -> list[tuple[str, str]]:
    """(place, parameter) of each weight matrix of a recurrent layer that is a parameter itself. Each counts as a layer that feeds gates."""
    return [(f"{layer.name}.{name}", name) for name in vars(layer.module)["_parameters"] if _MATRIX.fullmatch(name)]


def _before(observation: Observation, calls: list[Given], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not observation.passes.counts(module):
        return
    calls.clear()
    if observation.lineage.learns:
        observation.lineage.enters_layer(*ends((args, kwargs)))
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    draws = isinstance(module, nn.RNNBase) and module.dropout > 0 and module.training and module.num_layers > 1
    calls.append(Given(given["input"], given.get("hx"), torch.get_rng_state() if draws else None))


def _after(observation: Observation, name: str, calls: list[Given], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not calls or not observation.passes.counts(module):
        return
    given = calls.pop()
    if output is None:
        # It raised an error.
        return
    entering = given.x.data if isinstance(given.x, PackedSequence) else given.x
    x = part_of(entering)
    if not x.numel() or not internals.is_real(x):
        return
    check_plain(x)
    observation.passes.has_measured = True
    observation.sites.has_run_layer(name)
    observation.layers.feed_recurrent(module, x, entering.grad_fn is None and not entering.requires_grad)
    options = observation.options
    reason = why_unknown(cast("nn.RNNBase | nn.RNNCellBase", module))
    if reason is not None:
        observation.note_if_wanted(name, reason)
        return
    gates = (
        cell_gates(module, x, given.state)
        if isinstance(module, nn.RNNCellBase)
        else rnn_gates(cast(nn.RNNBase, module), given.x, given.state, given.random, output[0], options.limit, observation.meter.seed(name))
    )
    try:
        for gate in gates:
            place = f"{name}.{gate.layer}/{gate.name}" if gate.layer else f"{name}/{gate.name}"
            if options.selects(place):
                feeders = [f"{name}.weight_{kind}_{gate.layer}".rstrip("_") for kind in ("ih", "hh")]
                _count(observation, place, gate, entering.grad_fn, feeders, gated=not isinstance(module, (nn.RNN, nn.RNNCell)))
    except NotRebuiltError as reason:
        observation.note(f"{name}, upper layers", str(reason))
    last = next((site for place, site in reversed(observation.sites.ran.items()) if place.startswith((f"{name}.", f"{name}/"))), None)
    if last is not None:
        observation.lineage.made_all(last, ends(output))


def _count(observation: Observation, place: str, gate: Gate, node: Node | None, feeders: Sequence[str], gated: bool) -> None:
    sites = observation.sites
    site = sites.known.get(place)
    if site is None:
        site = sites.known[place] = Site(place, sites.bind_named(gate.function), "recurrent", gated)
    observation.meter.ran(site, [] if node is None else [(node, 0)])
    at, count = GATES.get(gate.name, (0, 1)) if gated else (0, 1)
    rows = gate.z.shape[-1]
    parts = [Rows(weight, at * rows, rows, gate.name) if count > 1 else None for weight in feeders]
    observation.lineage.fed_by(site, ((weight, part) for weight, part in zip(feeders, parts, strict=True) if weight in observation.layers.measured))
    sample = observation.meter.sample_of(gate.z, place)
    z = upcast(sample.take(gate.z))
    observation.meter.count(site, sample, z, getattr(torch, gate.function)(z), elements=gate.elements)
