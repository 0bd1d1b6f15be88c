"""Who feeds whom: the layers behind each site, the sites before it, and which sites are gates or make the model's output.

The autograd graph of a pass tells all of it, but to walk over the graph in Python costs more than the measurement itself. So it is done only while
the structure of the model is new, and kept in `Sites` until the walk over the modules finds other ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.faults import MODEL
from torchsat.observe.graph import MOST_NODES, Survey, has_weight
from torchsat.sites import Site, Sites, Structure

_GATES = ("sigmoid", "hardsigmoid")
"""The activations whose output can be a gate."""


class Lineage:
    """What one observation learns of the structure of the model.

    Args:
        sites: what is known already, and where what is learned goes.
        note: told of a place that the graph shows and nobody saw, with the reason.
    """

    def __init__(self, sites: Sites, note: Callable[[str, str], None]) -> None:
        self._sites = sites
        self._note = note
        self.learns = sites.structure is Structure.NEW
        """Whether this observation is one that looks at the structure."""
        self._nodes: dict[Node, Site] = {}
        """The nodes that make the outputs of sites, in the pass that runs."""
        self._survey: Survey | None = None
        self._last_layer: str | None = None
        self._last_site: str | None = None
        self._weights: dict[int, str] = {}
        """The name of each layer by the address of its weight."""
        self._alive: list[weakref.ref[Tensor]] = []
        """References to these weights: one that dies must not leave its address to another tensor."""

    @property
    def looks(self) -> bool:
        """Whether the graph is to be looked at now. A recompute inside a backward shows the same graph once more."""
        return self.learns and not internals.in_backward()

    @property
    def survey(self) -> Survey:
        """The walks over the graph of the pass that runs."""
        if self._survey is None:
            self._survey = Survey()
        return self._survey

    def begin_pass(self) -> None:
        """A training pass through the whole model begins."""
        self._last_layer = self._last_site = None
        self.end_pass()

    def end_pass(self) -> None:
        """The pass is over: its graph is not kept."""
        self._nodes.clear()
        self._survey = None

    def know(self, weight: Tensor, name: str) -> None:
        """This weight is that of a layer, as long as it lives: wrappers put others in its place."""
        key, weights = id(weight), self._weights
        if weights.get(key) != name:
            weights[key] = name
            self._alive.append(weakref.ref(weight, lambda _: weights.pop(key, None)))

    def ran_layer(self, name: str) -> None:
        """A layer has run."""
        self._last_layer = name

    def ran(self, site: Site, nodes: Iterable[Node | None], last_layer: bool = False) -> None:
        """A site ran on what these nodes made.

        Args:
            last_layer: where the nodes tell no layer that feeds the site, it is the one that ran last.
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
        """This node makes the output of a site."""
        if self.looks:
            self._nodes[node] = site
            site.traced = True
            if len(self._nodes) > MOST_NODES:
                # Where the parts of a model are called one by one, again and again, no pass ever ends.
                self._nodes.pop(next(iter(self._nodes)))

    def made_all(self, site: Site, nodes: Iterable[Node]) -> None:
        """What comes after a recurrent layer comes after this site, its last gate."""
        if self.learns:
            self._nodes.update(dict.fromkeys(nodes, site))

    def enters_layer(self, node: Node | None) -> None:
        """A layer runs on what this node made: the sites behind it make no output of the model."""
        if self.learns and self._nodes:
            for met in self.survey.upstream([node], lambda met: met in self._nodes or has_weight(met)):
                if met in self._nodes:
                    self._nodes[met].hidden = True

    def reached_output(self, ends: set[Node]) -> None:
        """These nodes make the output of the model: find the sites it depends on through no further weight."""
        if not self.learns:
            return
        for node in self.survey.upstream(ends, lambda node: node in self._nodes or has_weight(node)):
            if node in self._nodes:
                self._nodes[node].reaches_output = True
        self._mark_gates()
        if self.survey.is_spent:
            self._note(MODEL, f"its graph has more than {MOST_NODES} nodes: what no hook saw beyond them is not known")

    def look(self, nodes: set[Node], path: str) -> None:
        """Name what the graph shows before these nodes and nobody saw, as happening in the module of this path."""
        for what, reason in self.survey.explore(nodes):
            self._note(f"{path}/{what}" if path else what, reason)

    def conclude(self, whole_model: bool) -> None:
        """The observation has seen a whole pass: decide what each site is.

        Args:
            whole_model: the model was entered as a whole, so that its output was seen.
        """
        if not self.learns:
            return
        self._mark_gates()
        self._sites.structure = Structure.KNOWN
        for name, site in self._sites.known.items():
            site.decided = site.decided or name in self._sites.ran
            site.output = site.traced and not site.hidden and (site.reaches_output or not whole_model)

    def _mark_gates(self) -> None:
        """A sigmoid is a gate if its output multiplies another signal that does not come from it."""
        survey = self._survey
        for pair in survey.products if survey is not None else ():
            for node, other in (pair, pair[::-1]):
                site = self._nodes.get(node)
                if site is None or survey is None or site.bound.activation.name not in _GATES or site.multiplies:
                    continue
                site.multiplies = survey.is_learned(other) and not survey.depends(other, node)
