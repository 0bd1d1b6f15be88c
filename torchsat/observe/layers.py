"""Measures the layers that feed sites: statistics of their inputs, and what the optimizer's step does to their weights.

As long as it is not known which layers feed a site, every layer is measured; afterwards only those that do. Which parameters outside of layers are
used as weights, and which rows of a weight feed a site of their own, shows in the first pass. These are measured from the optimizer's step on that
ends it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torchsat.attributes import stored, stored_or, stored_parameters
from torchsat.columns import FORMATS_OF_SHARDS, FORMATS_OF_WEIGHTS, Tally
from torchsat.observe.formats import FormatCounter, of_layer
from torchsat.observe.graph import ends
from torchsat.observe.modules import first_tensor
from torchsat.observe.recurrent import matrices
from torchsat.optimizers import Decay, decay_of, learning_rate
from torchsat.parts import LayerPart
from torchsat.record import LayerFacts
from torchsat.sharding import is_freed, is_pending, local, part_of, placement
from torchsat.sites import LayerSpan, Rows, Site, Sites
from torchsat.structure import RECURRENT, Found, clean
from torchsat.tensors import plain, why_unread
from torchsat.weights import COMPUTED, ENTERED, NOT_YET, Layer, feature_axis, rows_axis, why_unmeasured, why_unreadable

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

FREED = "the memory of its weight is freed when the optimizer steps"


class Layers:
    """The layers that one observation measures.

    Args:
        observation: the observation, whose options, passes, sites and lineage are used.
    """

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self.measured: dict[str, Layer] = {}
        """The layers that are measured, by name."""
        self._parameters: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
        """The parameters with two axes or more that may be used as a weight: the module of each, and the attribute that holds it."""
        self._of_model = set[str]()
        """Those of them that the model itself holds, and no module inside it. One that is called `weight` is no module's weight."""
        self._formats: dict[str, dict[str, Tensor]] = {}
        """What number formats would do to the weight and the gradient of each layer, if the user has asked for it (formats.py)."""
        self._rates: dict[int, float | Tensor] = {}
        """The learning rate of each parameter that an optimizer has stepped, by the id of the parameter."""

    def choose(self, found: Found) -> None:
        """Choose the layers to be measured, and say of the others why they cannot be."""
        observation, feeders = self._observation, self._observation.sites.feeders()

        def wanted(place: str, owner: str) -> bool:
            return (observation.lineage.learns or place in feeders) and not observation.sites.has_failed(owner)

        rejected: dict[str, list[str]] = {}
        self._find_parameters(found)
        for each in found.layers:
            reason = why_unmeasured(each.module)
            if reason is not None:
                observation.reject(each.name, reason)
                rejected.setdefault(reason, []).append(each.name)
            elif wanted(each.name, each.name):
                observation.guard.attempt(each.name, self._add, each.name, each.module, "weight")
        for each in found.recurrent:
            for place, parameter in matrices(each):
                if wanted(place, each.name) and why_unreadable(each.module, parameter) is None:
                    observation.guard.attempt(place, self._add, place, each.module, parameter)
        self._complete()
        for reason, places in rejected.items():
            if reason not in (COMPUTED, NOT_YET):
                observation.say_unmeasured(places, reason)

    def _find_parameters(self, found: Found) -> None:
        """Find the parameters that may turn out to be used as a weight."""
        if not self._observation.lineage.learns and not self._observation.sites.uses:
            return
        for each in found.modules:
            for attribute, parameter in stored_parameters(each.module):
                if isinstance(each.module, RECURRENT) or is_lazy(parameter) or plain(parameter).ndim < 2:
                    continue
                place = each.name if attribute == "weight" and each.name else clean(f"{each.name}.{attribute}")
                self._parameters[place] = weakref.ref(each.module), attribute
                if not each.name:
                    self._of_model.add(place)
                if self._observation.lineage.learns:
                    self._observation.lineage.know(parameter, place)

    def _complete(self) -> None:
        """Measure the parameters that have turned out to be used as a weight, and the parts of weights that feed a site of their own."""
        for name in self._observation.sites.feeders():
            if name not in self.measured:
                self._observation.guard.attempt(name, self._add_found, name)

    def _add_found(self, name: str) -> None:
        sites = self._observation.sites
        rows = sites.rows.get(name)
        if rows is not None and rows.layer in self.measured and rows.layer not in sites.spans:
            self._add_rows(rows, self.measured[rows.layer])
        elif (fan_in := sites.uses.get(name)) is not None and name in self._parameters and not sites.has_failed(name):
            module, attribute = self._parameters[name][0](), self._parameters[name][1]
            if module is not None and why_unread(plain(stored(module, attribute))) is None:
                self.measured[name] = Layer(name, module, attribute, self._observation.options.limit, self._observation.turn, fan_in)

    def _add_rows(self, rows: Rows, whole: Layer) -> None:
        module = whole.module()
        weight: Any = None if module is None else plain(stored(module, whole.parameter))
        if module is None or why_unread(weight) is not None or placement(weight) is not None:
            return
        axis = rows_axis(module) if whole.parameter == "weight" else 0
        groups = int(stored_or(module, "groups", 1))
        if groups == 1 and rows.first + rows.count <= weight.shape[axis]:
            given = (axis, rows.first, rows.count)
            self.measured[rows.name] = Layer(rows.name, module, whole.parameter, whole.limit, whole.turn, whole.fan_in, given)

    def feeds_attention(self, site: Site, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note the weights that make queries and keys in a call of F.multi_head_attention_forward, which has them among its arguments."""
        lineage, width = self._observation.lineage, int(args[3] if len(args) > 3 else kwargs["embed_dim_to_check"])
        fused = args[5] if len(args) > 5 else kwargs.get("in_proj_weight")
        if fused is not None and (name := lineage.name_of(fused)) is not None:
            lineage.fed_by(site, [(name, Rows(name, 0, width, "q")), (name, Rows(name, width, width, "k"))])
            self._observation.sites.uses[name] = width
        elif fused is None:
            apart = [(lineage.name_of(weight), weight) for key in ("q_proj_weight", "k_proj_weight") if (weight := kwargs.get(key)) is not None]
            lineage.fed_by(site, [(name, None) for name, _ in apart if name is not None])
            self._observation.sites.uses.update((name, int(weight.shape[1])) for name, weight in apart if name is not None)

    def _add(self, name: str, module: nn.Module, parameter: str) -> None:
        weight = cast(Tensor, stored(module, parameter))
        self.measured[name] = Layer(name, module, parameter, self._observation.options.limit, self._observation.turn)
        self._observation.lineage.know(weight, name)

    def feed(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Measure the input of a layer."""
        passes, options = self._observation.passes, self._observation.options
        passes.runs(name)
        passes.current.merge_inputs(name, x, feature_axis(module, x.ndim), options.limit, self._observation.meter.seed(f"{name}, input"))

    def feed_recurrent(self, module: nn.Module, x: Tensor, is_data: bool) -> None:
        """Measure the input of a recurrent layer, which is the input of its first layer's matrices, in both directions.

        Args:
            is_data: whether no parameter was used to compute it.
        """
        observation = self._observation
        for layer in self.measured.values():
            if layer.module() is module and layer.parameter in ENTERED and layer.rows is None:
                observation.passes.runs(layer.name)
                observation.passes.current.merge_inputs(
                    layer.name, x, x.ndim - 1, observation.options.limit, observation.meter.seed(f"{layer.name}, input")
                )
                if observation.lineage.learns and is_data:
                    observation.sites.fed_by_data.add(layer.name)

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """Called before an optimizer steps: keep samples of its weights, and measure their gradients, unless a closure is yet to compute these."""
        self._complete()
        divisor = getattr(optimizer, "grad_scale", None)
        decays: dict[int, Decay | None] = {}
        for group in optimizer.param_groups:
            rate, decay = learning_rate(group), decay_of(optimizer, group)
            decays.update((id(p), decay) for p in group["params"])
            if rate is not None:
                self._rates.update((id(p), rate) for p in group["params"])
        for layer, weight in self._weights(optimizer):
            layer.decay = decays.get(id(weight))
            self._observation.guard.attempt(layer.name, _before_step, layer, weight, closure, divisor)
            self._count_formats(layer, weight, with_gradient=not closure)

    def after_step(self, optimizer: Optimizer | None, closure: bool = False) -> None:
        """Called after an optimizer has stepped, or with None after a step that the user ended by hand: measure what the step did to the weights."""
        for layer, weight in self._weights(optimizer):
            self._observation.guard.attempt(layer.name, _after_step, layer, weight, closure or optimizer is None)
            self._count_formats(layer, weight, with_gradient=closure or optimizer is None)

    def _count_formats(self, layer: Layer, weight: Tensor, with_gradient: bool) -> None:
        counter = self._observation.meter.formats
        if counter.counts:
            self._observation.guard.attempt(layer.name, self._count_formats_of, counter, layer, weight, with_gradient)

    def _count_formats_of(self, counter: FormatCounter, layer: Layer, weight: Tensor, with_gradient: bool) -> None:
        """Count the weight of a layer, and its gradient, the first time that each can be read: the weight mostly just before the step."""
        found = self._formats.setdefault(layer.name, {})
        grad = weight.grad if with_gradient and weight.is_leaf else None
        for tensor, value in (("weight", weight), ("grad", grad)):
            if value is None or tensor in found or is_pending(value) or why_unread(local(value)) is not None:
                continue
            part = layer.part(local(value)).detach()
            if part.numel():
                found[tensor] = counter.counted(layer.name, tensor, part)
                counter.note((_tally_of(weight).name, layer.name), tensor, part)

    def weights(self) -> list[tuple[Layer, Tensor]]:
        """The layers whose weight can be read now, and that weight."""
        return self._weights(None)

    def _weights(self, optimizer: Optimizer | None) -> list[tuple[Layer, Tensor]]:
        """The layers whose weight can be read now and belongs to this optimizer (None: to any or to none), and that weight."""
        owned = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = []
        for layer in self.measured.values():
            weight = None if self._observation.sites.has_failed(layer.name) else self._observation.guard.attempt(layer.name, self._weight, layer)
            if weight is not None and (owned is None or id(weight) in owned):
                weights.append((layer, weight))
        return weights

    def _weight(self, layer: Layer) -> Tensor | None:
        """The weight of a layer; None where it cannot be read now, which is noted."""
        module = layer.module()
        if module is None:
            return None
        reason = why_unreadable(module, layer.parameter)
        weight = None if reason is not None else cast(Tensor, stored(module, layer.parameter))
        if weight is not None and is_freed(weight):
            reason = FREED
        if reason is not None:
            self._observation.note(layer.name, reason)
            return None
        return weight

    def parts(self, inputs: dict[str, Tensor], weights: list[tuple[Layer, Tensor]]) -> dict[str, LayerPart]:
        """What was measured of the layers that feed a site.

        Args:
            inputs: the sums of each layer's input.
            weights: the layers whose weight could be read when the observation ended, and that weight.
        """
        guard, feeds = self._observation.guard, self._observation.sites.feeders()
        fed = [(layer, weight) for layer, weight in weights if layer.name in feeds]
        parts = {layer.name: guard.attempt(layer.name, self._part, layer, weight, inputs, feeds[layer.name]) for layer, weight in fed}
        return {name: part for name, part in parts.items() if part is not None}

    def _put_formats(self, layer: Layer, weight: Tensor) -> None:
        """Put what was counted of a layer into its tally."""
        self._count_formats(layer, weight, with_gradient=False)
        found = self._formats.get(layer.name)
        if found:
            block, kind, place = of_layer(found), _tally_of(weight), placement(weight)
            if place is not None and not place.counts:
                # Another rank has the same part and counts it.
                block = torch.zeros_like(block)
            nothing = block.new_empty(0, block.shape[1])
            self._observation.passes.always.tally((kind.name, layer.name), *((nothing, block) if kind.maxes else (block,)))

    def _part(self, layer: Layer, weight: Tensor, inputs: Mapping[str, Tensor], feeds: tuple[str, ...]) -> LayerPart:
        self._put_formats(layer, weight)
        # A part of the rows of a weight has the input of the whole.
        source = layer if layer.rows is None else self.measured[layer.name.rpartition("/")[0]]
        given = inputs.get(source.name)
        if not layer.n and given is not None:
            # No optimizer owns this layer, which is frozen. Its gain and its input are measured all the same.
            layer.after_step(weight)
        sites, place = self._observation.sites, placement(weight)
        if place is None and _makes_logits(sites, layer, feeds):
            direction = layer.observe_spectral(weight, sites.directions.get(layer.name))
            if direction is not None:
                sites.directions[layer.name] = direction
        is_parameter = source.parameter != "weight" or source.name in self._of_model
        data, titled = source.name in sites.fed_by_data, "" if is_parameter or layer.rows else layer.described
        return LayerPart(
            facts=LayerFacts(layer.name, feeds, layer.fan_in, data, parameter=is_parameter, layer=titled),
            numbers=layer.numbers,
            n=layer.n,
            numel=layer.part(local(weight)).numel(),
            whole=weight.numel() if layer.rows is None else layer.part(weight).numel(),
            rate=self._rates.get(id(weight)),
            inputs=given,
            features=layer.features,
            first=source.first,
            sharded=place is not None,
            counts=place is None or place.counts,
            input_counts=sites.counts_repeated if source.input_counts is None else source.input_counts,
            stage=self._observation.stage_of(layer.name),
        )


def _makes_logits(sites: Sites, layer: Layer, feeds: tuple[str, ...]) -> bool:
    """Whether this is a weight that makes logits of a softmax inside the model, such as queries or keys. Neither is an embedding, whose rows do,
    nor a weight of which a part does."""
    if isinstance(layer.module(), nn.Embedding) or any(rows.layer == layer.name for rows in sites.rows.values()):
        return False
    softmaxes = [site for name in feeds if (site := sites.ran.get(name)) is not None and site.kind == "softmax"]
    return any(not site.output for site in softmaxes)


def attach(observation: Observation, found: Found) -> None:
    """Hook the layers that are measured."""
    observation.layers.choose(found)
    for each in found.layers:
        layer = observation.layers.measured.get(each.name)
        if layer is not None:
            observation.hook_before(each.module, each.name, _before, observation, layer)
        elif observation.lineage.learns:
            observation.hook_before(each.module, each.name, _enter, observation)
        if observation.lineage.learns:
            observation.hook_after(each.module, each.name, _after, observation, each.name)


def _tally_of(weight: Tensor) -> Tally:
    """Ranks add up what they have found of a weight, where each holds a part of it; otherwise they have found the same."""
    return FORMATS_OF_WEIGHTS if placement(weight) is None else FORMATS_OF_SHARDS


def _enter(observation: Observation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note that a layer runs whose weight cannot be measured."""
    if observation.passes.counts(module):
        observation.lineage.enters_layer(*ends((args, kwargs)))


def _before(observation: Observation, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not observation.passes.counts(module):
        return
    x, lineage = first_tensor(args, kwargs), observation.lineage
    weight = stored_or(module, layer.parameter, None)
    if lineage.learns and isinstance(weight, Tensor):
        # FSDP replaces the weight by another tensor for the time of the pass.
        lineage.know(weight, layer.name)
    part = part_of(x)
    if is_pending(x):
        return
    if why_unread(part) is not None or not part.numel():
        return
    _look_at_ranks(observation, layer, module, x, weight)
    observation.layers.feed(layer.name, module, part)
    if lineage.learns:
        data = observation.sites.fed_by_data
        (data.add if x.grad_fn is None and not x.requires_grad else data.discard)(layer.name)
    lineage.enters_layer(x.grad_fn)


def _look_at_ranks(observation: Observation, layer: Layer, module: nn.Module, x: Tensor, weight: Tensor | None) -> None:
    """Note how tensor parallelism spreads a layer and its input over ranks."""
    sites, place, given = observation.sites, None if weight is None else placement(weight), placement(x)
    if weight is not None and place is not None and isinstance(module, nn.Linear):
        sites.counts_repeated = sites.counts_repeated and place.is_first
        sites.spans[layer.name] = LayerSpan(weight.shape[0], place.first[0], place.is_first, part_of(weight).shape[0])
    if given is not None:
        layer.input_counts, layer.first = given.counts, given.first[feature_axis(module, x.ndim)]


def _after(observation: Observation, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if isinstance(output, Tensor) and observation.passes.counts(module):
        observation.lineage.made_by_layer(name, output, feature_axis(module, output.ndim))


def _before_step(layer: Layer, weight: Tensor, closure: bool, divisor: Tensor | None) -> None:
    layer.before_step(weight)
    if not closure:
        layer.observe_grad(weight, divisor)


def _after_step(layer: Layer, weight: Tensor, with_gradient: bool) -> None:
    if with_gradient:
        layer.observe_grad(weight, None)
    layer.after_step(weight)
