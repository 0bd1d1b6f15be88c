"""Finds out the structure of a model: which layers and sites feed each site, and which sites are gates or compute the model's output.

A gate is an activation whose output multiplies another signal. All of this shows in the autograd graph of a pass, but a walk over the graph in Python
costs more than the measurement itself. So the graph is walked only as long as the structure is not known. It is then kept in `Sites` until the walk
over the modules finds other modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.faults import MODEL
from torchsat.observe.graph import MOST_NODES, Survey, has_weight
from torchsat.observe.marks import NodeTable
from torchsat.sites import Site, Sites, Structure

_GATES = ("sigmoid", "hardsigmoid")
"""The activations whose output can be a gate."""


class Lineage:
    """Learns the structure of the model during one observation.

    Args:
        sites: the sites of the model, to which what is learned is added.
        note: called with a place that the graph shows and no hook saw, and the reason.
    """

    def __init__(self, sites: Sites, note: Callable[[str, str], None]) -> None:
        self._sites = sites
        self._note = note
        self.learns = sites.structure is Structure.NEW
        """Whether this observation learns the structure."""
        self._nodes = NodeTable[Site]()
        """The autograd nodes that computed the outputs of sites in the present pass."""
        self._survey: Survey | None = None
        self._last_layer: str | None = None
        self._last_site: str | None = None
        self._weights: dict[int, str] = {}
        """The name of each layer by the id of its weight."""
        self._alive: list[weakref.ref[Tensor]] = []
        """Weak references to these weights. They remove the entry of a weight that dies, since another tensor could get the same id."""

    @property
    def looks(self) -> bool:
        """Whether the graph is to be looked at now. It is not during a recompute inside a backward, which only repeats the same graph."""
        return self.learns and not internals.in_backward()

    @property
    def survey(self) -> Survey:
        """The walks over the graph of the present pass."""
        if self._survey is None:
            self._survey = Survey()
        return self._survey

    def begin_pass(self) -> None:
        """Note that a training pass begins: through the whole model, or through its parts one by one."""
        self._last_layer = self._last_site = None
        self.end_pass()
        if self.learns:
            self._survey = Survey()

    def end_pass(self) -> None:
        """Let go of the graph of the pass, which is over."""
        self._mark_gates()
        self._nodes.clear()
        self._survey = None

    def end_part(self) -> None:
        """Let go of what holds the graph, after a part of the model that was called by itself. The nodes are known by their numbers from then on."""
        if self._survey is not None:
            self._mark_gates()
            self._survey.products.clear()

    def know(self, weight: Tensor, name: str) -> None:
        """Remember which layer this weight belongs to, for as long as the tensor lives. Wrappers such as FSDP put other tensors in its place."""
        key, weights = id(weight), self._weights
        if weights.get(key) != name:
            weights[key] = name
            self._alive.append(weakref.ref(weight, lambda _: weights.pop(key, None)))

    def ran_layer(self, name: str) -> None:
        """Note that a layer has run."""
        self._last_layer = name

    def ran(self, site: Site, nodes: Iterable[Node | None], last_layer: bool = False) -> None:
        """Note that a site ran on the output of these nodes.

        Args:
            last_layer: if no layer is found behind the nodes, take the layer that ran last for the one that feeds the site.
        """
        if not self.learns:
            return
        nodes = list(nodes)
        found = self.survey.feeders(nodes, self._weights)
        if not found and last_layer and self._last_layer:
            found = (self._last_layer,)
        site.feeds_on.update(dict.fromkeys(found))
        before = [self._nodes[node].name for node in self.survey.upstream(nodes, self._nodes.__contains__) if node in self._nodes]
        if not any(nodes) and self._last_site:
            # Without a graph, as in a reentrant checkpoint, only the order in which sites run is known.
            before = [self._last_site]
        self._last_site = site.name
        site.after.update(dict.fromkeys(name for name in before if name != site.name))

    def made(self, site: Site, node: Node) -> None:
        """Note the node that computed the output of a site."""
        if self.looks:
            self._nodes[node] = site
            site.traced = True
            if len(self._nodes) > MOST_NODES:
                # If the parts of a model are called one by one and never the whole, no pass ends and the nodes would pile up.
                self._nodes.forget_oldest()

    def made_all(self, site: Site, nodes: Iterable[Node]) -> None:
        """Note the nodes that computed the output of a recurrent layer. What comes after the layer then comes after this site, its last gate."""
        if self.learns:
            for node in nodes:
                self._nodes[node] = site

    def enters_layer(self, node: Node | None) -> None:
        """Note that a layer runs on the output of this node. The sites that this output comes from do not compute an output of the model."""
        if self.learns and self._nodes:
            for met in self.survey.upstream([node], lambda met: met in self._nodes or has_weight(met)):
                if met in self._nodes:
                    self._nodes[met].hidden = True

    def reached_output(self, ends: set[Node]) -> None:
        """Find the sites that the output of the model depends on with no weight between. These nodes computed the output."""
        if not self.learns:
            return
        for node in self.survey.upstream(ends, lambda node: node in self._nodes or has_weight(node)):
            if node in self._nodes:
                self._nodes[node].reaches_output = True
        self._mark_gates()
        if self.survey.is_spent:
            self._note(MODEL, f"its graph has more than {MOST_NODES} nodes: what no hook saw beyond them is not known")

    def look(self, nodes: set[Node], path: str, owns: Callable[[Tensor], bool] | None = None) -> None:
        """Report what is before these nodes and no site accounts for, as places in the module of this path.

        Args:
            owns: between the parts of a model that are called one by one, which leaves are parameters of the model; None inside the model.
        """
        for what, reason in self.survey.explore(nodes) if owns is None else self.survey.explore_parts(nodes, owns):
            self._note(f"{path}/{what}" if path else what, reason)

    def conclude(self, whole_model: bool) -> None:
        """Decide which sites compute an output of the model, at the end of an observation that has seen training passes.

        Args:
            whole_model: whether the model was called as a whole, so that its output was seen.
        """
        if not self.learns:
            return
        self._mark_gates()
        self._sites.structure = Structure.KNOWN
        for name, site in self._sites.known.items():
            site.decided = site.decided or name in self._sites.ran
            site.output = site.traced and not site.hidden and (site.reaches_output or not whole_model)

    def _mark_gates(self) -> None:
        """Mark the sigmoids that are gates: their output multiplies another signal, which does not come from it."""
        survey = self._survey
        for pair in survey.products if survey is not None else ():
            for node, other in (pair, pair[::-1]):
                site = self._nodes.get(node)
                if site is None or survey is None or site.bound.activation.name not in _GATES or site.multiplies:
                    continue
                site.multiplies = survey.is_learned(other) and not survey.depends(other, node)
