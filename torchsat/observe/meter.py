"""Measures z, a and their gradients at each site, and merges them into its row (columns.ROW). z is the input of an activation, a its output.

- z is read before the activation runs, since an in-place activation overwrites it.
- Everything is measured at once, inside the hook, since tensors that are kept for later may be overwritten by then.
- Gradients are read at the autograd nodes of the activation, in the user's own backward. The node that made a is given dL/da. Each node that z
  enters returns its share of dL/dz, and the shares of those nodes that this call has made add up to dL/dz through this activation alone. A hook on z
  would also see what reaches z by other ways (as in z * sigmoid(z)), and what the user's own hooks on z have made of it. Module backward hooks are
  never used, since they fail on in-place activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.activations import Edges
from torchsat.attention import Logits, SoftmaxRows
from torchsat.columns import COLUMN, RANK
from torchsat.gram import gram
from torchsat.kernels import reads_whole
from torchsat.kernels.formulas import Formula
from torchsat.observe.feeders import Cut
from torchsat.observe.formats import FormatCounter
from torchsat.observe.graph import MOST_OF_CALL, entrances, maker
from torchsat.observe.hooks import Guard
from torchsat.observe.lineage import Lineage
from torchsat.observe.passes import Pass, Passes
from torchsat.observe.tracing import Step
from torchsat.options import Options
from torchsat.parts import Span
from torchsat.recognise import is_anonymous
from torchsat.sampling import Sample, Units, seed_of
from torchsat.sharding import is_pending, part_of, placement
from torchsat.sites import Site, Sites
from torchsat.softmax import observe_softmax
from torchsat.statistics import Sides, extremes, known_slope, observe, observe_gradient, observe_quotient, sides_of, take, upcast
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
    """The extremes of all of z, if only some elements are read, and z may be overwritten or they were found with these elements."""
    in_place: bool = False
    """Whether the call may overwrite z."""
    began: int = field(default_factory=internals.next_node_number)
    """The number of the first autograd node that the call could make."""

    @property
    def steps(self) -> list[Step]:
        """The node that made z, and which of its outputs z is; empty where z has no graph."""
        return [] if self.node is None else [(self.node, self.output_nr)]


Hear = Callable[[Tensor | None, Tensor | None], None]
"""Called in the backward with dL/da and dL/dz at the elements of a call that are read; None where one is not known."""
HearWhole = Callable[[str, Tensor], None]
"""Called in the backward with the name of a gradient (`grad_a`, `grad_z`) and the whole gradient."""


class Meter:
    """Measures the sites of one observation.

    Args:
        note: called with a site that is measured only in part, and with what is missing.
    """

    def __init__(
        self, options: Options, turn: int, sites: Sites, passes: Passes, lineage: Lineage, guard: Guard, note: Callable[[str, str], None]
    ) -> None:
        self._options = options
        self._turn = turn
        self._sites = sites
        self._passes = passes
        self._lineage = lineage
        self._guard = guard
        self._note = note
        self.formats = FormatCounter(options, turn, passes)
        self._calls: dict[str, int] = {}
        """How often each site has been called in this observation."""
        self._recomputed: set[str] = set()
        """Names of the sites that have run in recomputes only so far."""
        self._latest: tuple[Pass | None, str] = (None, "")

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
        if counts:
            self.formats.add(site.name, "z", part)
        sample = self._site_sample(site, part, in_place)
        taken, exact = take(sample, part.detach(), is_z=True) if counts else (sample.take(part.detach()), None)
        if in_place and taken.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
            taken = taken.clone()
        place = placement(z)
        if place is not None:
            axis = unit_axis(site, tuple(part.shape))
            site.span = Span(None, 0, place.counts) if axis is None else Span(z.shape[axis], place.first[axis], place.counts)
        if in_place and counts and exact is None:
            exact = exact_z(sample, part)
        return Call(z, sample, taken, z.grad_fn, z.output_nr, counts, exact, in_place)

    def end(self, site: Site, call: Call, a: object) -> None:
        """Measure a call after it has returned a."""
        sample = call.sample
        assert isinstance(sample, Sample)
        part = part_of(a) if isinstance(a, Tensor) else a
        if not isinstance(part, Tensor) or part.shape != torch.Size(sample.shape):
            raise TypeError(f"it maps {sample.shape} to {tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}")
        assert isinstance(a, Tensor)
        if call.counts:
            self.ran(site, call.steps, call.z)
            self.formats.add(site.name, "a", part)
            if part.numel():
                taken, of_a = take(sample, part.detach(), is_z=False)
                self.count(site, sample, call.taken, taken, exact=exact(call, part, of_a))
                _tally_features(self, site, part.detach(), sample.seed)
        else:
            self._lineage.ran(site, call.steps, call.z)
        self.tap_output(site, call, a)

    def tap_output(self, site: Site, call: Call, a: Tensor) -> None:
        """Put hooks on the graph that read the gradients of a call in the backward, and note the node that computed its output."""
        if a.requires_grad and a.grad_fn is not None:
            self._lineage.made(site, maker(a)[0])
            missing = self.tap(site.name, call, a, self.gradient_adder(site, call.sample, call.taken))
            if missing is not None:
                self._note(site.name, missing)

    def tap(self, name: str, call: Call, a: Tensor, hear: Hear) -> str | None:
        """Put hooks on the graph that have `hear` called in the backward with dL/da and dL/dz of one call. Returns what they will not see.

        The hooks belong to nodes of the graph and must not hold tensors of the graph, such as z: such a cycle of references is never freed.
        """
        own, a_nr = maker(a)
        taking = entrances(own, call.z, call.node, call.output_nr, call.began)
        if not taking and a is call.z and call.node is not None and own is not call.node:
            # The activation ran in place on a view: the graph continues from the whole tensor that z is a view of.
            whole = next((before for before, _ in own.next_functions if before is not None), None)
            base = internals.base_of(a)
            covers = base is not None and base.numel() == a.numel() and base.is_contiguous() and a.is_contiguous()
            if whole is None or not whole.name().endswith("CopySlices") or not covers:
                return "its gradient is not seen: an in-place activation on a part of a tensor"
            own, a_nr, taking = whole, 0, {whole: [0]}
        gathered = _Gathered(call.sample, taking or {}, self._passes.ear(), hear, self.formats.adder(name))
        if taking and list(taking) == [own] and internals.forward_class(own) is None:
            # torch's own nodes leave dL/da as it is, so that one hook behind the node sees both, and nothing is copied.
            once = self._guard(name, gathered.at_once)
            own.register_hook(lambda grad_inputs, grad_outputs: once(grad_inputs, grad_outputs[a_nr]))
            return None
        begin, add = (self._guard(name, each) for each in (gathered.begin, gathered.add))
        own.register_prehook(lambda grad_outputs: begin(grad_outputs[a_nr]))
        for at, node in enumerate(taking or ()):
            node.register_hook(lambda grad_inputs, _, at=at: add(at, grad_inputs))
        return f"dL/dz is not seen: it made more than {MOST_OF_CALL} nodes of the autograd graph" if taking is None else None

    def ran(self, site: Site, steps: Sequence[Step], z: Tensor | None = None, cut: Cut | None = None) -> None:
        """Note that a site ran on these outputs of nodes; see Lineage.ran. What is no known site may still turn out to be none."""
        self._passes.has_measured = True
        if self._sites.known.get(site.name) is site:
            self._passes.runs(site.name)
            self._latest = (self._passes.current, site.name)
            self._sites.has_run(site)
        self._lineage.ran(site, steps, z, cut)

    @property
    def latest(self) -> str | None:
        """The site that ran last in the present pass; None where none has."""
        current, name = self._latest
        return name if current is self._passes.current else None

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
        elements: int | None = None,
        exact: Tensor | None = None,
    ) -> None:
        """Merge the row and the unit block of one call. The derivative of an anonymous function is not known yet: see quotient_adder.

        Args:
            z, a: the elements that were read, as vectors.
            axis: the axis of the units (channels or features). None: that of the layer which feeds the site or, failing that, by the number of axes.
            elements: the number of elements of the call, read or not. None: that of the tensor that was sampled.
            exact: the extremes of all these elements, where they are known and not all are read.
        """
        bound, current = site.bound, self._passes.current
        slope: Tensor | Formula
        edges: Edges
        peak: float | Tensor | None
        formula, is_unknown = known_slope(bound, z, a), is_anonymous(bound)
        if formula is not None and bound.constants is not None:
            slope, peak, edges = formula, bound.constants.peak, (bound.constants.low, bound.constants.high)
        elif is_unknown:
            slope, peak, edges = torch.zeros_like(z), None, bound.edges({})
        else:
            z = upcast(z).contiguous()
            learned = {name: sample.spread(value.to(z.device)).to(z.dtype) for name, value in bound.learned.items()}
            slope, peak, edges = bound.evaluate(z, upcast(a) if bound.activation.from_output else a, learned)
        units = self._units_of(site, sample, axis)
        elements = sample.elements if elements is None else elements
        row, block = current.place(current.rows, site.name, z.device), current.place(current.blocks, site.name, z.device)
        row = None if is_unknown else row
        if units is None or (block is not None and block.shape[1] != units.size):
            block = None
        row, block = observe(z, a, slope, peak, edges, elements, bound.activation.name == "sigmoid", units, row, block, exact)
        if is_unknown:
            row[COLUMN["derivative_unknown"]] = row[COLUMN["n"]]
            if bound.constants is not None and bound.constants.peak is not None:
                row[COLUMN["peak"]] = bound.constants.peak
        current.put(current.rows, site.name, row)
        if block is not None:
            current.put(current.blocks, site.name, block)

    def count_softmax(self, site: Site, logits: Logits, exact: tuple[Tensor, Tensor]) -> None:
        """Merge the row and the block of heads of one softmax. `exact` is what softmax.scan_softmax found among all its rows."""
        row, heads = observe_softmax(logits.z, logits.visible, logits.elements, exact)
        current = self._passes.current
        current.add(current.rows, site.name, row)
        current.add(current.heads, site.name, heads)

    def gradient_adder(self, site: Site, sample: Sample | SoftmaxRows, z: Tensor) -> Callable[[Tensor | None, Tensor | None], None]:
        """A function to be called in the backward with dL/da and dL/dz at the elements z that were read. It adds them to the pass that runs now. Of z
        it keeps only on which sides the elements lie."""
        current, elements, sides = self._passes.current, sample.elements, sides_at(site, sample, z)

        def add(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            given = [grad for grad in (grad_a, grad_z) if grad is not None]
            if given and given[0].numel():
                row = current.place(current.rows, site.name, given[0].device)
                current.put(current.rows, site.name, observe_gradient(grad_a, grad_z, elements, row, sides))

        return self._guard(site.name, add)

    def quotient_adder(self, site: Site, call: Call, a: Tensor) -> Hear:
        """A function to be called in the backward with dL/da and dL/dz of a call of an anonymous function. It adds the derivative, which is their
        quotient, to the pass that runs now.

        Args:
            a: the elements of the output that were read. They must not be overwritten later.
        """
        current, z, elements = self._passes.current, call.taken, call.sample.elements

        def add(grad_a: Tensor | None, grad_z: Tensor | None) -> None:
            row = None if grad_a is None else current.place(current.rows, site.name, grad_a.device)
            if grad_a is not None and grad_z is not None and row is not None:
                observe_quotient(z, a, grad_a, grad_z, elements, row)

        return add

    def _site_sample(self, site: Site, z: Tensor, in_place: bool) -> Sample:
        """Which elements of a call are read: all where that costs neither time nor memory and the user has not set a limit; otherwise a sample."""
        if self._options.may_read_whole and not in_place and reads_whole(z) and known_slope(site.bound, z) is not None:
            sample = Sample.of(z, None, self.seed(site.name))
            if sample.strides == z.stride():
                return sample
        return self.sample_of(z, site.name)

    def _units_of(self, site: Site, sample: Sample, axis: int | None) -> Units | None:
        """The units of a site; None where it has no unit axis, or where the number of units is not fixed."""
        axis = unit_axis(site, sample.shape) if axis is None else axis
        size = None if axis is None or site.units_vary else sample.shape[axis]
        if site.units is not None and size != site.units:
            size, site.units_vary = None, True
        site.units = size
        if axis is None or size is None:
            for each in self._passes:
                each.blocks.pop(site.name, None)
            return None
        return sample.units(axis)


def unit_axis(site: Site, shape: tuple[int, ...]) -> int | None:
    """The axis of channels or features: where the graph shows that the outputs of the layers lie that feed the site; otherwise by the number of axes,
    as torch.nn has them: [N, C], [N, L, C] and [N, C, ...]."""
    if site.unit_axis is not None and site.unit_axis[0] == len(shape):
        return site.unit_axis[1]
    return {0: None, 1: None, 2: 1, 3: 2}.get(len(shape), 1)


def _tally_features(meter: Meter, site: Site, a: Tensor, seed: int) -> None:
    """Add the Gram matrix of the features of one call, if that is wanted and their number is fixed."""
    axis = unit_axis(site, tuple(a.shape)) if "rank" in meter._options.extras else None
    if axis is not None and site.units is not None:
        meter._passes.current.tally((RANK.name, site.name), gram(a, axis, seed))


def sides_at(site: Site, sample: Sample | SoftmaxRows, z: Tensor) -> Sides | None:
    """On which side of the plateaus the elements z of a call lie that are read; None where the site has no plateaus."""
    bound = site.bound
    if not isinstance(sample, Sample) or not bound.tails_known:
        return None
    learned = {name: sample.spread(value.to(z.device)) for name, value in bound.learned.items()}
    return sides_of(z, bound.edges(learned), sample.seed)


class _Gathered:
    """Gathers dL/da and the shares of dL/dz of one call in one backward, and reports them once they are complete.

    Args:
        sample: the elements that are read.
        taking: the nodes that z enters, each with the positions of z among its inputs. The nodes themselves are not kept.
        ear: called with every gradient as it is met; see Passes.ear.
        hear: called with the elements that are read.
        whole_too: called with each gradient that arrives in one piece; None where only elements are read.
    """

    def __init__(
        self,
        sample: Sample | SoftmaxRows,
        taking: Mapping[Node, Sequence[int]],
        ear: Callable[..., None],
        hear: Hear,
        whole_too: HearWhole | None = None,
    ) -> None:
        self._sample = sample
        self._whole_too = whole_too
        self._places = tuple(taking.values())
        self._ear = ear
        self._hear = hear
        self._left = 0
        """How many nodes have not returned their share yet."""
        self._grad_a: Tensor | None = None
        self._grad_z: Tensor | None = None

    def at_once(self, grad_inputs: Sequence[Tensor | None], grad_a: Tensor | None) -> None:
        """Called after the only node of the activation has run."""
        self._ear(grad_a, *grad_inputs)
        self._hear_whole("grad_a", grad_a)
        self._grad_z = self._sum(None, 0, grad_inputs)
        self._report(self._take(grad_a))

    def begin(self, grad_a: Tensor | None) -> None:
        """Called before the node that made a runs."""
        self._ear(grad_a)
        self._hear_whole("grad_a", grad_a)
        taken = self._take(grad_a)
        # A copy: autograd and the user's own functions may overwrite a gradient after the hook.
        self._grad_a, self._grad_z, self._left = None if taken is None else taken.clone(), None, len(self._places)
        if not self._left:
            self._report(self._grad_a)

    def add(self, at: int, grad_inputs: Sequence[Tensor | None]) -> None:
        """Called after one of the nodes that z enters has run. Without dL/da before it, its gradient has not come through a."""
        self._ear(*grad_inputs)
        if self._left:
            self._grad_z = self._sum(self._grad_z, at, grad_inputs)
            self._left -= 1
            if not self._left:
                self._report(self._grad_a)

    def _report(self, grad_a: Tensor | None) -> None:
        grad_z, self._grad_a, self._grad_z = self._grad_z, None, None
        self._hear(grad_a, grad_z)

    def _sum(self, grad_z: Tensor | None, at: int, grad_inputs: Sequence[Tensor | None]) -> Tensor | None:
        for place in self._places[at]:
            if len(self._places) == len(self._places[at]) == 1:
                self._hear_whole("grad_z", grad_inputs[place])
            share = self._take(grad_inputs[place])
            if share is not None:
                kept = share.clone() if len(self._places) > 1 else share
                grad_z = kept if grad_z is None else grad_z + kept
        return grad_z

    def _hear_whole(self, name: str, grad: Tensor | None) -> None:
        if self._whole_too is not None and grad is not None:
            self._whole_too(name, grad)

    def _take(self, grad: Tensor | None) -> Tensor | None:
        """The elements that are read; a view where that is possible."""
        if grad is None or is_pending(grad):
            return None
        return self._sample.take(part_of(grad).detach().reshape(self._sample.shape))


def exact_z(sample: Sample, z: Tensor) -> Tensor | None:
    """The extremes of all elements of z, before it may be overwritten; None where all are read anyway."""
    return None if sample.is_whole else extremes(z.detach(), None)


def exact(call: Call, a: Tensor, of_a: Tensor | None = None) -> Tensor | None:
    """The extremes of all elements of z and a after a call; None where all are read anyway. `of_a` are those of a, if they are known."""
    if isinstance(call.sample, Sample) and call.sample.is_whole:
        return None
    a = part_of(a).detach()
    if call.exact is None:
        return extremes(part_of(call.z).detach(), a)
    of_a = extremes(None, a) if of_a is None else of_a
    # Where z is still there, its extremes were found by a kernel for the CPU, on which the host may branch. What is not finite in one of the two
    # does not count in the other: where there is such an element, both are read together.
    if not call.in_place and (call.exact[0] or of_a[0]):
        return extremes(part_of(call.z).detach(), a)
    return torch.maximum(call.exact, of_a)


def check_plain(z: Tensor) -> None:
    """Raise TypeError unless this is a dense tensor of real numbers."""
    reason = why_unread(z)
    if reason is not None:
        raise TypeError(f"its input is {reason}")
