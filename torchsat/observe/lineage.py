"""Finds out the structure of a model: which layers and sites feed each site, and which sites are gates or compute the model's output.

A gate is an activation whose output multiplies another signal. All of this shows in the autograd graph of a pass, but a walk over the graph in Python
costs more than the measurement itself. So the graph is walked only as long as the structure is not known. It is then kept in `Sites` until the walk
over the modules finds other modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torchsat import internals
from torchsat.faults import MODEL
from torchsat.observe.feeders import Cut, Feeder, Output, Places, feeders, widest
from torchsat.observe.graph import MOST_NODES, Survey, has_weight, maker
from torchsat.observe.loss import takers
from torchsat.observe.marks import NodeTable
from torchsat.observe.tracing import Step
from torchsat.sites import Rows, Site, Sites, Structure

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
        self._made = NodeTable[Site]()
        """The same of all passes of this observation, since a loss is computed when its pass is over."""
        self._survey: Survey | None = None
        self._weights: dict[int, str] = {}
        """The name of each weight by the id of its tensor."""
        self._places = Places(self._weights)
        self._bare: dict[int, tuple[Output, weakref.ref[Tensor]]] = {}
        """The outputs of layers that have no graph, by the id of the tensor, as long as it lives."""
        self._blind: set[str] = set()
        """Names of the sites that ran without a graph, as in a reentrant checkpoint, where only the recompute in the backward makes one."""
        self._loses_track = False
        """Whether the graph of some pass has more nodes than may be looked at."""
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
        self.end_pass()
        if self.learns:
            self._survey = Survey()

    def end_pass(self) -> None:
        """Let go of the graph of the pass, which is over."""
        self._mark_gates()
        self._nodes.clear()
        self._places.outputs.clear()
        self._bare.clear()
        self._survey = None

    def end_part(self) -> None:
        """Let go of what holds the graph, after a part of the model that was called by itself. The nodes are known by their numbers from then on."""
        if self._survey is not None:
            self._mark_gates()
            self._survey.products.clear()

    def know(self, weight: Tensor, name: str) -> None:
        """Remember which layer this weight belongs to, for as long as the tensor lives. Wrappers such as FSDP put other tensors in its place."""
        key, weights = id(weight), self._weights
        if key not in weights:
            weights[key] = name
            self._alive.append(weakref.ref(weight, lambda _: weights.pop(key, None)))

    def site_of(self, node: Node) -> str | None:
        """The site whose output this node of the present pass has computed; None where that is not known."""
        site = self._nodes.get(node)
        return None if site is None else site.name

    def name_of(self, weight: Tensor) -> str | None:
        """The name of this weight; None where it is not known."""
        return self._weights.get(id(weight))

    def made_by_layer(self, name: str, output: Tensor, axis: int) -> None:
        """Note the node that made the output of a layer. `axis`: that of its features."""
        if not self.looks:
            return
        made = Output(name, output.ndim - axis)
        if output.grad_fn is not None:
            self._places.outputs[maker(output)[0]] = made
            _limit(self._places.outputs)
        else:
            bare, key = self._bare, id(output)
            bare[key] = made, weakref.ref(output, lambda _: bare.pop(key, None))

    def ran(self, site: Site, steps: Sequence[Step], z: Tensor | None = None, cut: Cut | None = None) -> None:
        """Note that a site ran.

        Args:
            steps: for each tensor that it ran on, the node that computed it, and which output of the node it is.
            z: the one tensor that it ran on, if there is only one.
            cut: the part of that tensor which is z; None: all of it.
        """
        if not self.learns:
            return
        if site.kind == "function":
            self._follow(site, steps)
            return
        if internals.in_backward():
            if site.name not in self._blind:
                return
        elif not steps:
            self._blind.add(site.name)
            if z is not None and id(z) in self._bare:
                # Without a graph it is still certain what feeds the site if z is the very tensor that a layer returned.
                made = self._bare[id(z)][0]
                site.feeds_on[made.layer] = None
                site.unit_axis = (z.ndim, z.ndim - (made.axis or 1))
        found = feeders(steps, self._places, self._nodes.__contains__, self.survey.touch)
        for feeder in widest(found if cut is None else [cut.of(feeder) for feeder in found]):
            self._add_feeder(site, feeder)
        axes = {feeder.landing.axis for feeder in found if feeder.landing is not None and feeder.landing.axis is not None}
        if z is not None and len(axes) == 1:
            site.unit_axis = (z.ndim, axes.pop())
        self._follow(site, steps)

    def _follow(self, site: Site, steps: Sequence[Step]) -> None:
        """Note which sites come before this one."""
        for node, passed in self.survey.before([node for node, _ in steps], self._nodes.__contains__):
            before = self._nodes[node]
            before.hidden = before.hidden or passed
            if before is not site:
                site.after[before.name] = None

    def fed_by(self, site: Site, weights: Iterable[tuple[str, Rows | None]]) -> None:
        """Note that these weights and no others feed a site, since its kind says so. With each come those of its rows that do; None: all."""
        if self.learns:
            site.feeds_on = {}
            for name, rows in weights:
                self._feed(site, name, rows)

    def _add_feeder(self, site: Site, feeder: Feeder) -> None:
        uses, use, landing = self._sites.uses, feeder.use, feeder.landing
        if use is not None:
            uses[use.name] = use.fan_in if uses.get(use.name, use.fan_in) == use.fan_in else None
            (self._sites.fed_by_data.add if use.data else self._sites.fed_by_data.discard)(use.name)
        if use is not None or landing is None or landing.count == feeder.width:
            self._feed(site, feeder.name, None)
        else:
            self._feed(site, feeder.name, Rows(feeder.name, landing.first, landing.count))

    def _feed(self, site: Site, name: str, rows: Rows | None) -> None:
        site.feeds_on[name] = None
        if rows is not None:
            site.feeds_on[rows.name] = None
            self._sites.rows[rows.name] = rows

    def made(self, site: Site, node: Node) -> None:
        """Note the node that computed the output of a site. Sites behind a mathematical function come after the site in front of it."""
        if site.kind == "function":
            return
        if self.looks or (self.learns and site.name in self._blind):
            self._nodes[node] = self._made[node] = site
            # Where a node of a recompute leads to cannot be seen, so it cannot be told whether the site computes an output.
            site.traced = site.traced or not internals.in_backward()
            _limit(self._nodes)
            _limit(self._made)

    def made_all(self, site: Site, nodes: Iterable[Node]) -> None:
        """Note the nodes that computed the output of a recurrent layer. What comes after the layer then comes after this site, its last gate."""
        if self.learns:
            for node in nodes:
                self._nodes[node] = site

    def enters_layer(self, *nodes: Node | None) -> None:
        """Note that a layer runs on the output of these nodes. The sites that this output comes from do not compute an output of the model."""
        if self.learns and self._nodes:
            for met in self.survey.upstream(nodes, lambda met: met in self._nodes or has_weight(met)):
                if met in self._nodes:
                    self._nodes[met].hidden = True

    def reached_output(self, ends: set[Node]) -> None:
        """Find the sites that the output of the model depends on with no weight between. These nodes computed the output."""
        if not self.learns:
            return
        for node, passed in self.survey.before(ends, self._nodes.__contains__):
            site = self._nodes[node]
            site.last = True
            site.hidden, site.reaches_output = site.hidden or passed, site.reaches_output or not passed
        self._mark_gates()
        if self.survey.is_spent:
            self._loses_track = True
            self._note(MODEL, f"its graph has more than {MOST_NODES} nodes: what no hook saw beyond them is not known")

    def hear_loss(self) -> None:
        """Find out, when a backward has begun, which functions of the loss take the outputs of sites."""
        if self.learns:
            for site, taker in takers(internals.objectives(), self._made):
                site.losses[taker] = None

    def look(self, nodes: set[Node], path: str, owns: Callable[[Tensor], bool] | None = None) -> None:
        """Report what is before these nodes and no site accounts for, as places in the module of this path.

        Args:
            owns: between the parts of a model that are called one by one, which leaves are parameters of the model; None inside the model.
        """
        for what, reason in self.survey.explore(nodes) if owns is None else self.survey.explore_parts(nodes, owns):
            self._note(f"{path}/{what}" if path else what, reason)

    def conclude(self, whole_model: bool) -> None:
        """Decide which sites compute an output of the model, at the end of an observation that has seen training passes.

        That is a site on whose output no layer with a weight and no other site of the model runs, wherever the result is kept: in what the model
        returns, on the model, or in an object that cannot be looked into. A site that another one follows computes an output too if the model
        returns its result, or what no weight was used to compute from it.

        Args:
            whole_model: whether the model was called as a whole, so that its output was seen.
        """
        if not self.learns:
            return
        self._mark_gates()
        self._sites.structure = Structure.KNOWN
        followed = {name for site in self._sites.known.values() if site.kind != "function" for name in site.after}
        for name, site in self._sites.known.items():
            # A call that came before may have turned out to be no site.
            site.after = {name: None for name in site.after if name in self._sites.known}
            site.decided = site.decided or name in self._sites.ran
            is_last = not self._loses_track and name not in followed
            site.output = site.traced and not site.hidden and (site.reaches_output or is_last or not whole_model)
            # What is returned by a method of the model, or computed from its parts, is not seen. It is computed from the sites that no other follows.
            site.last = site.last or (site.traced and is_last and not whole_model)

    def _mark_gates(self) -> None:
        """Mark the sigmoids that are gates: their output multiplies another signal, which does not come from it."""
        survey = self._survey
        for pair in survey.products if survey is not None else ():
            for node, other in (pair, pair[::-1]):
                site = self._nodes.get(node)
                if site is None or survey is None or site.bound.activation.name not in _GATES or site.multiplies:
                    continue
                site.multiplies = survey.is_learned(other) and not survey.depends(other, node)


def _limit(nodes: NodeTable[Any]) -> None:
    """Forget the oldest node if there are too many. If the parts of a model are called one by one and never the whole, no pass ends."""
    if len(nodes) > MOST_NODES:
        nodes.forget_oldest()
