"""Measures z, a and their gradients at each site, and merges them into its row (columns.ROW). z is the input of an activation, a its output.

- z is read before the activation runs, since an in-place activation overwrites it.
- Everything is measured at once, inside the hook, since tensors that are kept for later may be overwritten by then.
- Gradients are read at the autograd node of the activation. In the backward the node is given dL/da and returns dL/dz through this activation alone;
  a tensor hook on z would also see what reaches z by other ways (as in z * sigmoid(z)). Where an activation consists of several nodes, hooks before
  and after them are used. Module backward hooks are never used, since they fail on in-place activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.activations import Edges
from torchsat.attention import Logits, SoftmaxRows
from torchsat.kernels import reads_whole
from torchsat.kernels.formulas import Formula
from torchsat.observe.graph import maker
from torchsat.observe.hooks import Guard
from torchsat.observe.lineage import Lineage
from torchsat.observe.passes import Passes
from torchsat.options import Options
from torchsat.parts import Span
from torchsat.sampling import Sample, Units, seed_of
from torchsat.sharding import is_pending, part_of, placement
from torchsat.sites import Site, Sites
from torchsat.statistics import extremes, known_slope, observe, observe_gradient, observe_softmax, upcast
from torchsat.tensors import why_unread


@dataclass(frozen=True)
class Call:
    """What is kept of one call of an activation, from before it runs until it has returned."""

    z: Tensor
    sample: Sample | SoftmaxRows
    taken: Tensor
    """The elements of z that are read, as they were before an in-place activation."""
    node: Node | None
    """The node that made z."""
    output_nr: int
    """Which output of that node z is."""
    counts: bool
    """Whether the call enters the numbers of the forward pass. False in a recompute (of a checkpoint), of which only the gradient is read."""
    exact: Tensor | None = None
    """The extremes of all of z, if only some elements are read and z may be overwritten."""


class Meter:
    """Measures the sites of one observation.

    Args:
        note: called with a site that is measured only in part, and with what is missing.
        hooks: a list that takes the handles of hooks that outlive the pass, so that they are removed at the end of the observation.
    """

    def __init__(
        self,
        options: Options,
        turn: int,
        sites: Sites,
        passes: Passes,
        lineage: Lineage,
        guard: Guard,
        note: Callable[[str, str], None],
        hooks: list[torch.utils.hooks.RemovableHandle],
    ) -> None:
        self._options = options
        self._turn = turn
        self._sites = sites
        self._passes = passes
        self._lineage = lineage
        self._guard = guard
        self._note = note
        self._hooks = hooks
        self._calls: dict[str, int] = {}
        """How often each site has been called in this observation."""
        self._recomputed: set[str] = set()
        """Names of the sites that have run in recomputes only so far."""
        self._ignores_gradients = False

    def seed(self, name: str = "") -> int:
        """The seed of the next call of the site with this name. Each use of this method counts one call, so that the calls of a site, as in the
        micro-batches of a step, are not read at the same places."""
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        return seed_of(self._turn, call)

    def sample_of(self, z: Tensor, name: str = "") -> Sample:
        """Which elements of this tensor are read in the next call of the site with this name."""
        return Sample.of(z, self._options.limit, self.seed(name))

    def rows_of(self, z: Tensor, axis: int, has_heads: bool, name: str = "") -> SoftmaxRows:
        """Which rows of a softmax along `axis` are read in the next call of the site with this name."""
        return SoftmaxRows.of(z, axis, self._options.limit, self.seed(name), has_heads)

    def counts_at(self, name: str, module: nn.Module) -> bool | None:
        """Whether a call at this site counts. False: only its gradient is read. None: it is not measured at all."""
        counts = self._passes.counts(module)
        if internals.in_backward():
            if not self._passes.has_row(name):
                self._recomputed.add(name)
            return name in self._recomputed
        return True if counts else None

    @contextlib.contextmanager
    def ignoring_gradients(self) -> Iterator[None]:
        """A context in which gradients are not measured, since they come from a backward of ours and not of the user."""
        self._ignores_gradients = True
        try:
            yield
        finally:
            self._ignores_gradients = False

    def begin(self, site: Site, z: Tensor, module: nn.Module, in_place: bool) -> Call | None:
        """Read what is needed of z before the activation may overwrite it. Returns None where the call is not measured."""
        counts = self.counts_at(site.name, module)
        if counts is None:
            return None
        if is_pending(z):
            raise TypeError("its input is a sum over ranks that has not been taken: no rank has an element of it")
        part = part_of(z)
        check_plain(part)
        self._passes.has_measured = True
        sample = self._site_sample(site, part, in_place)
        taken = sample.take(part.detach())
        if in_place and taken.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
            taken = taken.clone()
        place = placement(z)
        if place is not None:
            axis = self._unit_axis(site, tuple(part.shape))
            site.span = Span(None, 0, place.counts) if axis is None else Span(z.shape[axis], place.first[axis], place.counts)
        return Call(z, sample, taken, z.grad_fn, z.output_nr, counts, self.exact_z(sample, part) if in_place and counts else None)

    def exact_z(self, sample: Sample, z: Tensor) -> Tensor | None:
        """The extremes of all elements of z, before it may be overwritten; None where all are read anyway."""
        return None if sample.is_whole else extremes(z.detach(), None)

    def exact(self, call: Call, a: Tensor) -> Tensor | None:
        """The extremes of all elements of z and a after a call; None where all are read anyway."""
        if isinstance(call.sample, Sample) and call.sample.is_whole:
            return None
        if call.exact is None:
            return extremes(part_of(call.z).detach(), part_of(a).detach())
        return torch.maximum(call.exact, extremes(None, part_of(a).detach()))

    def end(self, site: Site, call: Call, a: object) -> None:
        """Measure a call after it has returned a."""
        sample = call.sample
        assert isinstance(sample, Sample)
        part = part_of(a) if isinstance(a, Tensor) else a
        if not isinstance(part, Tensor) or part.shape != torch.Size(sample.shape):
            raise TypeError(f"it maps {sample.shape} to {tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}")
        assert isinstance(a, Tensor)
        if call.counts:
            self.ran(site, [call.node], last_layer=True)
            if part.numel():
                self.count(site, sample, call.taken, sample.take(part.detach()), exact=self.exact(call, part))
        self.tap_output(site, call, a)

    def tap_output(self, site: Site, call: Call, a: Tensor) -> None:
        """Put hooks on the graph that read the gradients of a call in the backward, and note the node that computed its output."""
        if a.requires_grad and a.grad_fn is not None:
            self._lineage.made(site, a.grad_fn)
            self._tap_gradient(site, call, a)

    def ran(self, site: Site, nodes: list[Node | None], last_layer: bool = False) -> None:
        """Note that a site ran on the output of these nodes; see Lineage.ran."""
        self._passes.has_measured = True
        self._passes.runs(site.name)
        self._sites.has_run(site)
        self._lineage.ran(site, nodes, last_layer)

    def read_call(self, site: Site, z: Tensor, in_place: bool) -> Sample:
        """Which elements of z are read in a call that is measured inside a compiled graph."""
        return self._site_sample(site, z, in_place)

    def count(
        self,
        site: Site,
        sample: Sample,
        z: Tensor,
        a: Tensor,
        axis: int | None = None,
        slope: Tensor | Formula | None = None,
        elements: int | None = None,
        exact: Tensor | None = None,
    ) -> None:
        """Merge the row and the unit block of one call.

        Args:
            z, a: the elements that were read, as vectors.
            axis: the axis of the units (channels or features). None: that of the layer which feeds the site or, failing that, by the number of axes.
            slope: f'(z) at these elements, where it is known only from autograd. None: it is computed from the function.
            elements: the number of elements of the call, read or not. None: that of the tensor that was sampled.
            exact: the extremes of all these elements, where they are known and not all are read.
        """
        bound, current = site.bound, self._passes.current
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
        units = self._units_of(site, sample, axis)
        elements = sample.elements if elements is None else elements
        row, block = current.place(current.rows, site.name, z.device), current.place(current.blocks, site.name, z.device)
        if units is None or (block is not None and block.shape[1] != units.size):
            block = None
        row, block = observe(z, a, slope, peak, edges, elements, bound.activation.name == "sigmoid", units, row, block, exact)
        current.put(current.rows, site.name, row)
        if block is not None:
            current.put(current.blocks, site.name, block)

    def count_softmax(self, site: Site, logits: Logits, exact: tuple[Tensor, Tensor]) -> None:
        """Merge the row and the block of heads of one softmax. `exact` is what statistics.softmax_extremes found among all its rows."""
        row, heads = observe_softmax(logits.z, logits.visible, logits.elements, exact)
        current = self._passes.current
        current.add(current.rows, site.name, row)
        current.add(current.heads, site.name, heads)

    def gradient_adder(self, site: Site, sample: Sample | SoftmaxRows) -> Callable[[Tensor | None, Tensor | None], None]:
        """A function to be called in the backward with dL/da and dL/dz at the elements of a sample. It adds them to the pass that runs now."""
        current, elements = self._passes.current, sample.elements

        def add(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            given = [grad for grad in (grad_a, grad_z) if grad is not None]
            if not self._ignores_gradients and given and given[0].numel():
                row = current.place(current.rows, site.name, given[0].device)
                current.put(current.rows, site.name, observe_gradient(grad_a, grad_z, elements, row))

        return self._guard(site.name, add)

    def _site_sample(self, site: Site, z: Tensor, in_place: bool) -> Sample:
        """Which elements of a call are read: all where that costs neither time nor memory and the user has not set a limit; otherwise a sample."""
        if self._options.may_read_whole and not in_place and reads_whole(z) and known_slope(site.bound, z) is not None:
            sample = Sample.of(z, None, self.seed(site.name))
            if sample.strides == z.stride():
                return sample
        return self.sample_of(z, site.name)

    def _units_of(self, site: Site, sample: Sample, axis: int | None) -> Units | None:
        """The units of a site; None where it has no unit axis, or where the number of units is not fixed."""
        axis = self._unit_axis(site, sample.shape) if axis is None else axis
        size = None if axis is None or site.units_vary else sample.shape[axis]
        if site.units is not None and size != site.units:
            size, site.units_vary = None, True
        site.units = size
        if axis is None or size is None:
            for each in self._passes:
                each.blocks.pop(site.name, None)
            return None
        return sample.units(axis)

    def _unit_axis(self, site: Site, shape: tuple[int, ...]) -> int | None:
        """The axis of channels or features: that of the layer which feeds the site, if the sizes agree; otherwise by the number of axes."""
        for name in site.feeds_on:
            width, from_end = self._sites.outputs.get(name, (-1, 0))
            if 0 < from_end <= len(shape) and shape[-from_end] == width:
                return len(shape) - from_end
        return {0: None, 1: None, 2: 1, 3: 2}.get(len(shape), 1)

    def _tap_gradient(self, site: Site, call: Call, a: Tensor) -> None:
        """Put hooks on the graph that read dL/da and dL/dz of one call in the backward.

        The hooks belong to nodes of the graph and must not hold tensors of the graph, such as z: such a cycle of references is never freed.
        """
        sample, z_nr, node = call.sample, call.output_nr, call.node
        own, a_nr = maker(a)
        add, hear = self.gradient_adder(site, sample), self._passes.ear()

        def read_both(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            hear(grad_a, grad_z)
            given = (None if grad is None or is_pending(grad) else part_of(grad) for grad in (grad_a, grad_z))
            add(*(None if grad is None else sample.take(grad.detach().reshape(sample.shape)) for grad in given))

        add_both = self._guard(site.name, read_both)
        entering = [at for at, (before, _) in enumerate(own.next_functions) if before is not None]
        if node is not None and len(entering) == 1 and own.next_functions[entering[0]][0] is node:
            at = entering[0]
            own.register_hook(lambda grad_inputs, grad_outputs: add_both(grad_outputs[0], grad_inputs[at]))
            return
        if a is call.z and node is not None:
            # The activation ran in place on a view: the graph continues from the whole tensor that z is a view of.
            whole = next((before for before, _ in own.next_functions if before is not None), None)
            base = internals.base_of(a)
            covers = base is not None and base.numel() == a.numel() and base.is_contiguous() and a.is_contiguous()
            if whole is not None and whole.name().endswith("CopySlices") and covers:
                whole.register_hook(lambda grad_inputs, grad_outputs: add_both(grad_outputs[0], grad_inputs[0]))
                return
            self._note(site.name, "its gradient is not seen: an in-place activation on a part of a tensor")
            return
        if node is not None:
            node.register_prehook(lambda grad_outputs: add_both(None, grad_outputs[z_nr]))
        elif call.z.requires_grad and call.z.is_leaf:
            # A leaf outlives the pass, so its hook must be removed. Hooks on nodes end with the graph.
            self._hooks.append(call.z.register_hook(lambda grad: add_both(None, grad)))
        own.register_prehook(lambda grad_outputs: add_both(grad_outputs[a_nr], None))


def check_plain(z: Tensor) -> None:
    """Raise TypeError unless this is a dense tensor of real numbers."""
    reason = why_unread(z)
    if reason is not None:
        raise TypeError(f"its input is {reason}")
