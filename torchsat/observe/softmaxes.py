"""Measures softmax calls and attention: their rows in the forward pass, and in the backward the gradient dL/dp of their probabilities p.

dL/dp of a softmax is read at its autograd node. Of a call of attention the graph tells what has run:

- A plain softmax (`nn.MultiheadAttention` with `need_weights`, or what `F.scaled_dot_product_attention` falls back to, as for dropout on a CPU): its
  node is given dL/dp, whatever is done to p after it, such as dropout.
- One fused kernel: its node is given dL/dO, and dL/dp = dL/dO V^T (attention_gradient.py). If the kernel drops elements of p, dL/dp also has the mask
  of these as a factor, which nobody knows outside of the kernel: then the demand is not known, and that is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.attention import Attention, Logits, Queries, SoftmaxRows
from torchsat.attention_gradient import KeptValues, grad_of_weights
from torchsat.observe.graph import MOST_OF_CALL, maker, upstream
from torchsat.observe.meter import Call
from torchsat.observe.nodes import kind_of
from torchsat.replay import NotRebuiltError
from torchsat.sharding import is_pending, part_of
from torchsat.sites import Site
from torchsat.softmax import Probabilities, observe_demand
from torchsat.tensors import plain

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

_DROPPED = "blocked and trapped are not seen: its kernel drops elements of the probabilities, and which ones is not known"
_NOT_KEPT = "blocked and trapped are not seen: the graph does not keep its values until the backward, and they are large"
_MOST_KEPT = 2**23
"""The most bytes of values that are kept where the graph keeps none, as under a checkpoint."""
_SOFTMAX = ("Softmax", "SafeSoftmax")
_FUSED = "ScaledDotProduct"
"""How the names of the nodes of fused attention begin."""


def end_softmax(observation: Observation, site: Site, call: Call, negated: bool, a: Tensor) -> None:
    """Measure a softmax, or where `negated` a softmin, after it has returned a."""
    meter, rows, z = observation.meter, call.sample, plain(call.z).detach()
    assert isinstance(rows, SoftmaxRows)
    z = -z if negated else z
    logits = rows.logits(z)
    if call.counts:
        meter.ran(site, call.steps)
        meter.count_softmax(site, logits, rows.scan(z, plain(a).detach()))
        meter.formats.add(site.name, "z", z)
        meter.formats.add(site.name, "a", plain(a))
    if a.grad_fn is None:
        return
    add, taken = meter.gradient_adder(site, rows, call.taken), Probabilities.of(logits.z, logits.visible, logits.elements)
    add_demand = _demand_adder(observation, site, taken)

    def hear(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
        add(grad_a, grad_z)
        if grad_a is not None:
            add_demand(grad_a.view(taken.p.shape))

    observation.lineage.made(site, maker(a)[0])
    missing = meter.tap(site.name, call, a, hear)
    if missing is not None:
        observation.note(site.name, missing)


def end_gumbel(observation: Observation, site: Site, rows: SoftmaxRows, counts: bool, a: Tensor) -> None:
    """Measure a Gumbel softmax after it has returned a.

    Its logits, with the random numbers that torch has added and divided by tau, are the logarithm of a, up to a number for each row that changes
    nothing.
    """
    z, own = plain(a).detach().log(), None if a.grad_fn is None else maker(a)[0]
    node, nr = (None, 0) if own is None else own.next_functions[0]
    call = Call(z, rows, z, node, nr, counts, began=0 if own is None else internals.node_number(own))
    end_softmax(observation, site, call, False, a)


def end_attention(
    observation: Observation,
    site: Site,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    counts: bool,
    began: int,
    output: Any,
) -> None:
    """Measure a call of attention after it has returned.

    Args:
        counts: whether it enters the numbers of the forward pass.
        began: the number of the first autograd node that the call could make.
    """
    key = args[1] if len(args) > 1 else kwargs["key"]
    if not key.numel():
        return
    given, query, meter = (args, kwargs), args[0] if args else kwargs["query"], observation.meter
    steps = [maker(each) for each in (query, key) if each.grad_fn is not None]
    try:
        args, kwargs = internals.tree_map(lambda value: plain(value) if isinstance(value, Tensor) else value, (args, kwargs))
        attention = Attention.of(function, args, kwargs)
    except NotRebuiltError as reason:
        observation.note_if_wanted(site.name, str(reason))
        return
    rows = attention.rows(observation.options.limit, meter.seed(site.name))
    logits = attention.logits(rows)
    if counts:
        meter.ran(site, steps)
        if function is F.multi_head_attention_forward:
            observation.layers.feeds_attention(site, *given)
        returned = internals.tree_map(lambda value: plain(value) if isinstance(value, Tensor) else value, output)
        meter.count_softmax(site, logits, attention.scan(returned))
    answer = output[0] if isinstance(output, tuple) else output
    if answer.grad_fn is not None:
        _tap(observation, site, attention, rows, logits, _node_of_weights(answer, began))


def _tap(observation: Observation, site: Site, attention: Attention, rows: Queries, logits: Logits, node: Node | None) -> None:
    """Put a hook on the node of a call of attention that reads dL/dp in the backward. It holds no tensor of the graph, except values that are needed
    as a whole (KeptValues)."""
    if node is None:
        return
    is_fused, shape = kind_of(node).startswith(_FUSED), attention.shape
    if is_fused and attention.dropout > 0:
        observation.note_if_wanted(site.name, _DROPPED)
        return
    if is_fused and rows.has_all_samples and attention.values.source.nbytes > _MOST_KEPT and internals.graph_keeps_less():
        observation.note_if_wanted(site.name, _NOT_KEPT)
        return
    add = _demand_adder(observation, site, Probabilities.of(logits.z, logits.visible, logits.elements))
    ear, values = observation.passes.ear(), KeptValues(attention.values, rows) if is_fused else None

    def hear(grad: Tensor | None) -> None:
        ear(grad)
        if grad is None or is_pending(grad):
            return
        grad = plain(part_of(grad)).detach()
        if values is None:
            if grad.numel() == math.prod(shape):
                add(rows.pick(grad.reshape(shape)))
        elif (kept := values.take()) is not None:
            add(grad_of_weights(grad, kept, rows))

    guarded = observation.guard(site.name, hear)
    node.register_prehook(lambda grads: guarded(grads[0]))


def _demand_adder(observation: Observation, site: Site, rows: Probabilities) -> Callable[[Tensor], None]:
    """A function to be called in the backward with dL/dp at the rows of a softmax that are read. It adds their demand to the pass that runs now."""
    current, epsilon = observation.passes.current, observation.options.epsilon

    def add(grad: Tensor) -> None:
        heads, there = observe_demand(rows, grad, epsilon), current.heads.get(site.name)
        if there is None or there.shape == heads.shape:
            current.add(current.heads, site.name, heads)

    return add


def _node_of_weights(answer: Tensor, began: int) -> Node | None:
    """Of the nodes that a call of attention made from this number on, the one of its softmax or of its fused kernel. None where there is not exactly
    one, or where no gradient goes on from it to queries and keys."""

    def is_before(node: Node) -> bool:
        return internals.node_number(node) < began

    made = [node for node in upstream([maker(answer)[0]], is_before, MOST_OF_CALL) if not is_before(node)]
    found = [node for node in made if kind_of(node) in _SOFTMAX or kind_of(node).startswith(_FUSED)]
    if len(found) != 1 or all(before is None for before, _ in found[0].next_functions[:2]):
        return None
    return found[0]
