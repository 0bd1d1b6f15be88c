"""What is known of one model's sites over the whole run: the function of each, its place in the model, and whether it is measured.

A *site* is one place in a model where one activation is computed: a module such as nn.ReLU, a call such as `F.gelu(x)`, a gate of a recurrent layer,
or a softmax. An *observation* is one training step that is measured. It starts with what is known here and adds to it when it ends; nothing that
belongs to one observation alone is kept here.

Every *place* (a site, a layer, or a call that cannot be measured) has exactly one `Status` with one reason, so that `monitor.coverage` cannot
contradict itself. The walk is the loop over all modules before each observation (structure.py):

    UNMEASURABLE   the walk recognises it and knows why it cannot be measured; decided anew at each walk
    EXPECTED       the walk found it, and it has not run yet
    SEEN           measured
    PARTLY         measured, but something was missing in the last observation of it
    STOPPED        measured before, but not in the last observations
    UNSEEN         it was noticed while the model ran, and could not be measured
    FAILED         its measurement raised; it is no longer watched

    from \\ event      found by walk   ran     noted     missed 5 times   failed
    (none)            EXPECTED        SEEN    UNSEEN    -                FAILED
    EXPECTED          EXPECTED        SEEN    UNSEEN    -                FAILED
    UNMEASURABLE      anew            PARTLY  UNSEEN    -                FAILED
    UNSEEN            UNSEEN          SEEN    UNSEEN    -                FAILED
    SEEN, PARTLY      unchanged       SEEN    PARTLY    STOPPED          FAILED
    STOPPED           unchanged       SEEN    PARTLY    STOPPED          FAILED
    FAILED            FAILED          FAILED  FAILED    FAILED           FAILED

"noted" means that an observation found something missing at a place (`Sites.note`), whether or not the place ran. "missed 5 times" means that a site
did not run in 5 observations in a row.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn

from torchsat.activations import ACTIVATIONS, Activation, Bound, bind, bind_plain
from torchsat.coverage import Coverage
from torchsat.curves import Curve
from torchsat.elementwise import Nature
from torchsat.parts import Key, Span
from torchsat.recognise import is_anonymous
from torchsat.record import Kind, SiteFacts
from torchsat.structure import Found, clean, find
from torchsat.unregistered import unregistered
from torchsat.ways import Ways

MISSES = 5
"""A site that has not run in this many observations in a row is reported as stopped. Randomly dropped layers and idle experts run again sooner."""
_HAS_NOT_RUN = "it has not run in an observed training pass"
_CALLS_OFF = "function calls are not heard (calls=False)"
_STOPPED = f"it ran before, but not in the last {MISSES} observations"


class Status(Enum):
    """How far one place is measured. Coverage lists places in the order of these values."""

    UNMEASURABLE = 0
    FAILED = 1
    UNSEEN = 2
    PARTLY = 3
    STOPPED = 4
    EXPECTED = 5
    SEEN = 6


@dataclass(frozen=True)
class Place:
    """The status of one place, and the reason that is shown to the user. SEEN needs no reason."""

    status: Status
    reason: str = ""


class Structure(Enum):
    """Whether it is known which layers and sites feed each site, and which sites compute the model's output.

    NEW -> KNOWN: an observation has seen a training pass (one call of the model in training) in eager execution.
    KNOWN -> NEW: the walk finds other modules than before, or a site ran for the first time after the structure had been learned.
    """

    NEW = "new"
    KNOWN = "known"


@dataclass(frozen=True)
class LayerSpan:
    """How tensor parallelism spreads the outputs of one layer over ranks."""

    units: int
    """Number of outputs on all ranks together."""
    first: int
    """Index of this rank's first output among them."""
    counts: bool
    """Whether this rank counts its outputs. False where another rank computes the same outputs and counts them."""
    width: int
    """Number of outputs on this rank."""


@dataclass(frozen=True)
class Rows:
    """A part of the rows of a layer's weight, which makes a part of its outputs: a gate of a recurrent layer, the queries of a fused projection."""

    layer: str
    first: int
    """The index of the first output that it makes."""
    count: int
    """How many outputs it makes."""
    label: str | None = None
    """What it is called; None: it is named after the range of its outputs."""

    @property
    def name(self) -> str:
        """The name under which its numbers are recorded, such as `rnn.weight_ih_l0/forget` or `attn.c_attn/0-767`."""
        return f"{self.layer}/{self.label or f'{self.first}-{self.first + self.count - 1}'}"


@dataclass(eq=False)
class Site:
    """One place where one activation is computed, and what is known of it."""

    name: str
    bound: Bound
    kind: Kind = "module"
    gate: bool = False
    """Whether its kind makes it a gate: an activation whose output multiplies another signal, as in an LSTM. See also `multiplies`."""
    place: Place = Place(Status.SEEN)
    feeds_on: dict[str, None] = field(default_factory=dict)
    """Names of the layers that feed it: those whose weights are met first on the way back from its input. Behind the name of a layer of which only a
    part feeds it stands the name of that part. The dict serves as an ordered set."""
    unit_axis: tuple[int, int] | None = None
    """The number of axes of z, and the one along which the outputs of the layers lie that feed it; None where the graph did not show it."""
    after: dict[str, None] = field(default_factory=dict)
    """Names of the sites that its input comes from with no other site between. The dict serves as an ordered set."""
    traced: bool = False
    """Whether its node was found in the autograd graph. Only then can `hidden` and `reaches_output` be trusted."""
    hidden: bool = False
    """Whether a layer with a weight runs on its output, so that it does not compute an output of the model."""
    reaches_output: bool = False
    """Whether the model's output, as far as its tensors were found, depends on it with no weight and no other site between."""
    last: bool = False
    """Whether the model's output, as far as its tensors were found, depends on it with no other site between."""
    output: bool = False
    """Whether it computes an output of the model. This is decided once the structure is known (`Lineage.conclude`)."""
    losses: dict[str, None] = field(default_factory=dict)
    """Names of the functions of the loss that take its output (observe/loss.py). The dict serves as an ordered set."""
    decided: bool = False
    """Whether the fields above that describe its place in the model have been filled in."""
    multiplies: bool = False
    """Whether the autograd graph showed that its output multiplies another signal, as that of a gate does."""
    units: int | None = None
    """Number of units (channels or features) on this rank; None where there is no unit axis, or where its size differs between calls."""
    units_vary: bool = False
    """Whether two calls had different numbers of units."""
    span: Span | None = None
    """Which of its units this rank holds, where z is a DTensor; None for any other z."""
    head_count: int | None = None
    """Number of heads of a softmax in the last observation of it; None where this is no softmax."""
    is_attention: bool | None = None
    """For a softmax over the last of four axes: whether a batched matrix product computes its logits, as in attention. None: not known yet."""
    doubt: Tensor | None = None
    """A flag, maybe still on its way to the host: whether a user's module no longer computes the function that it was recognised as."""
    curve: Curve | None = None
    """Of a function that no row names, what gradients have shown of its slope so far, from which its peak and tails are learned."""
    missed: int = 0
    """Number of observations in a row in which it did not run."""

    def start_over(self) -> None:
        """Forget what depends on the structure of the model."""
        self.feeds_on, self.after, self.losses, self.unit_axis = {}, {}, {}, None
        self.traced = self.hidden = self.reaches_output = self.last = self.output = self.decided = self.multiplies = False
        self.units, self.units_vary = None, False

    def facts(self) -> SiteFacts:
        """The fields of a record that describe this site and are not measured."""
        constants = self.bound.constants
        return SiteFacts(
            site=self.name,
            activation=self.bound.activation.name,
            kind=self.kind,
            tails=self.bound.tails if self.bound.tails_known else "unknown",
            output=self.output,
            gate=self.gate or self.multiplies,
            after=tuple(self.after),
            units=self.units,
            normal_low=constants.normal_low if constants else None,
            normal_high=constants.normal_high if constants else None,
            normal_derivative=constants.normal_derivative if constants else None,
            last=self.last,
            losses=tuple(self.losses) if self.output else (),
            learned=constants is not None and is_anonymous(self.bound),
        )


class Form:
    """Stands for a place at which several calls of torch together may be one activation, as `torch.where(z > 0, z, 0)` is. It is the key by which is
    kept what was decided there."""


class Decisions(weakref.WeakKeyDictionary[object, Bound | None]):
    """The function that each module of a user's own type, or each form, was found to compute. None: it is no activation. No entry: it is not known
    yet."""

    def __init__(self) -> None:
        super().__init__()
        self.walks = 0
        """How often the modules have been walked over: once for each observation."""
        self._again: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        """For each module the walk from which on it is to be decided again."""
        self._tallies: weakref.WeakKeyDictionary[object, Counter[Nature]] = weakref.WeakKeyDictionary()

    def decide(self, key: object, bound: Bound | None) -> None:
        """Keep what a module computes. It is to be decided again after twice as many observations."""
        self[key] = bound
        self._again[key] = 2 * self.walks + 8
        self._tallies.pop(key, None)

    def suspect(self, key: object) -> None:
        """Have it decided again from the next observation on what a module computes."""
        self._again[key] = 0

    def is_due(self, key: object) -> bool:
        """Whether it is to be decided again what a module computes."""
        return key in self and self.walks >= self._again[key]

    def tally(self, key: object) -> Counter[Nature]:
        """How often the gradients of a module that is not decided have shown what."""
        return self._tallies.setdefault(key, Counter())


class Sites:
    """The sites and other places of one model.

    Args:
        activations: the table of activations.
        epsilon: the share of the peak derivative below which an element is saturated.
    """

    def __init__(self, activations: Sequence[Activation], epsilon: float) -> None:
        self.activations = activations
        self.epsilon = epsilon
        self.known: dict[str, Site] = {}
        """Every site that has been bound to its function, whether or not it has run."""
        self.ran: dict[str, Site] = {}
        """The sites that have run, in the order in which they first ran."""
        self.failed: set[str] = set()
        """The places whose status is FAILED, as a set that every hook can look up quickly."""
        self.structure = Structure.NEW
        self.ways = Ways()
        """What is known of the graphs of the model, for the ledger of the gradient."""
        self.generation = 0
        """How many times the walk has found other modules than before."""
        self.own = Decisions()
        self.forms: dict[str, Form] = {}
        """The places at which calls of torch may together be an activation."""
        self.fed_by_data: set[str] = set()
        """Names of the layers whose input is data: no parameter was used to compute it."""
        self.uses: dict[str, int | None] = {}
        """The parameters that are used as a weight outside of a layer that torchsat knows, by name, and their fan-in; None where it is not known."""
        self.rows: dict[str, Rows] = {}
        """The parts of layers' weights that feed a site, by name."""
        self.logits: dict[int, int] = {}
        """Of the tensors that the model returns, the place of the one that a cross-entropy takes, and the axis of its classes (observe/logits.py)."""
        self.routers: dict[tuple[str, int], bool] = {}
        """Whether a choice among so many values in a module is that of a router of experts (observe/routers.py)."""
        self.directions: dict[str, Tensor] = {}
        """For each layer that feeds a softmax, the vector by which its weight was largest in the last observation (spectral.py)."""
        self.spans: dict[str, LayerSpan] = {}
        """How the outputs are spread, for each layer whose weight tensor parallelism spreads over ranks."""
        self.counts_repeated = True
        """Whether this rank counts the elements that tensor parallelism repeats on several ranks. Only one of these ranks counts them."""
        self.tallied: dict[Key, tuple[Mapping[str, Any], int]] = {}
        """The places of tallies that have been measured so far: the facts of each, and the width of its block."""
        self.has_modules = False
        """Whether the last walk found a module that is listed in the table of activations."""
        self.has_recurrent = False
        """Whether the last walk found a recurrent layer."""
        self.unregistered: dict[str, str] | None = None
        """The place of each module that the model holds and torch does not know, and the reason why it is not watched. None before the first walk."""
        self._signature: tuple[tuple[str, int, str | None], ...] = ()
        self._others: dict[str, Place] = {}
        """Every place with a status that is not a site in `ran`."""
        self._recurrent: set[str] = set()
        """Names of the recurrent layers that have run."""
        self.row_of: dict[type[nn.Module], Activation | None] = {}
        """The row of the table that modules of a class compute."""

    def walk(self, model: nn.Module, selects: Callable[[str], bool]) -> Found:
        """Find the modules of a model that can be hooked. `selects` says whether a site of this name is wanted."""
        self.own.walks += 1
        found = find(model, functools.partial(_activation_of, self), functools.partial(_may_be_own, self.own), selects)
        if self.unregistered is None or found.signature != self._signature:
            self.unregistered = {name: reason for place, (_, reason) in unregistered(model).items() if selects(name := clean(place))}
        found.unmeasurable.extend(self.unregistered.items())
        return found

    def knows(self, found: Found) -> bool:
        """Whether the structure of the model is known, and the model still has the modules that it had then."""
        return self.structure is Structure.KNOWN and self._signature == found.signature

    def expect(self, found: Found, calls: Sequence[str], hears_calls: bool) -> None:
        """Record the places that a walk found. If the modules are not the same as before, forget everything that depends on the structure.

        Args:
            calls: places of the function calls that modules of torch.nn are known to make.
            hears_calls: whether function calls are measured (the option `calls`).
        """
        self.has_modules, self.has_recurrent = bool(found.activations), bool(found.recurrent)
        for name in [name for name, place in self._others.items() if place.status in (Status.UNMEASURABLE, Status.EXPECTED)]:
            del self._others[name]
        for name, reason in found.unmeasurable:
            self.reject(name, reason)
        idle = {**dict.fromkeys(found.names, _HAS_NOT_RUN), **dict.fromkeys(calls, _HAS_NOT_RUN if hears_calls else _CALLS_OFF)}
        idle |= {each.name: _HAS_NOT_RUN for each in found.recurrent if each.name not in self._recurrent}
        for name, reason in idle.items():
            if name not in self.ran and name not in self._others:
                self._others[name] = Place(Status.EXPECTED, reason)
        signature = found.signature
        if signature != self._signature:
            self._signature = signature
            self.generation += 1
            self.learn_again()

    def learn_again(self) -> None:
        """Forget the structure of the model, so that the next observation learns it."""
        self.structure = Structure.NEW
        self.ways = Ways()
        self.logits, self.routers = {}, {}
        for site in self.known.values():
            site.start_over()

    def reject(self, name: str, reason: str) -> None:
        """Record that the walk over the modules found a place that cannot be measured."""
        if name in self.ran:
            self.ran[name].place = Place(Status.PARTLY, reason)
        elif not self.has_failed(name):
            self._others[name] = Place(Status.UNMEASURABLE, reason)

    def bind(self, name: str, module: nn.Module, activation: Activation) -> Site:
        """The site of a module, bound to the function that the module computes now.

        Raises:
            ValueError: the module lacks a parameter of the activation, or its function is not element-wise.
        """
        site = self.known.get(name)
        if site is None:
            site = self.known[name] = Site(name, bind(activation, module, self.epsilon))
        elif site.bound.activation is not activation:
            site.bound = bind(activation, module, self.epsilon)
        return site

    def bind_named(self, function: str) -> Bound:
        """The activation of this name, bound without a module, for gates inside a kernel of torch. A row of the user's table goes before ours."""
        return bind_plain(next(row for row in (*self.activations, *ACTIVATIONS) if row.name == function), self.epsilon)

    def note(self, name: str, reason: str) -> None:
        """Record why a place is not measured, or only in part. At a place that has not run, the first reason stays."""
        place = self._others.get(name)
        if name in self.ran:
            self.ran[name].place = Place(Status.PARTLY, reason)
        elif place is None or place.status not in (Status.FAILED, Status.UNSEEN):
            self._others.pop(name, None)
            self._others[name] = Place(Status.UNSEEN, reason)

    def has_run(self, site: Site, before: str | None = "") -> None:
        """Record that a site runs.

        Args:
            before: for a site that turned out to be one after its pass: the site that ran before it, or None where it was the first.
        """
        if site.name not in self.ran and not self.has_failed(site.name):
            self._others.pop(site.name, None)
            names = list(self.ran)
            at = 0 if before is None else names.index(before) + 1 if before in self.ran else len(names)
            later = {name: self.ran.pop(name) for name in names[at:]}
            self.ran[site.name] = site
            self.ran.update(later)

    def has_run_layer(self, name: str) -> None:
        """Record that a recurrent layer runs. Its gates are the sites, so the layer itself is no longer listed as a place that has not run."""
        self._recurrent.add(name)
        if name in self._others and self._others[name].status is Status.EXPECTED:
            del self._others[name]

    def fail(self, name: str, reason: str) -> None:
        """Record that the measurement of a place raised an error. The place is no longer watched."""
        self.known.pop(name, None)
        self.ran.pop(name, None)
        self.tallied = {key: kept for key, kept in self.tallied.items() if key[1] != name}
        self._others[name] = Place(Status.FAILED, reason)
        self.failed.add(name)

    def forget(self, prefix: str) -> None:
        """Forget the sites and the unseen places whose names begin with this prefix, since they turned out to be part of another site."""
        for name in [name for name in self.known if name.startswith(prefix)]:
            del self.known[name]
            self.ran.pop(name, None)
            self.tallied = {key: kept for key, kept in self.tallied.items() if key[1] != name}
        for name in [name for name, place in self._others.items() if name.startswith(prefix) and place.status is Status.UNSEEN]:
            del self._others[name]

    def forget_place(self, name: str) -> None:
        """Forget one site, since it turned out to be a part of another one."""
        self.known.pop(name, None)
        self.ran.pop(name, None)

    def retract(self, name: str, reason: str) -> None:
        """Take back the status UNSEEN of a place, if it was given for this reason."""
        if self._others.get(name) == Place(Status.UNSEEN, reason):
            del self._others[name]

    def has_failed(self, name: str) -> bool:
        """Whether this place is no longer watched because its measurement raised."""
        return name in self.failed

    def settle(self, ran: Mapping[str, object], noted: Mapping[str, str], counts_misses: bool) -> list[str]:
        """Update the status of every site that has ever run, at the end of an observation.

        Args:
            ran: the sites that were measured in the observation.
            noted: the places at which something was missing, each with the reason.
            counts_misses: whether the observation would have seen every site that ran. Only then did a site that it lacks not run.

        Returns:
            The sites whose status has just become STOPPED.
        """
        stopped = []
        for name, site in self.ran.items():
            if name in ran:
                site.missed = 0
                site.place = Place(Status.PARTLY, noted[name]) if name in noted else Place(Status.SEEN)
            elif counts_misses:
                site.missed += 1
                if site.missed >= MISSES and site.place.status is not Status.STOPPED:
                    site.place = Place(Status.STOPPED, _STOPPED)
                    stopped.append(name)
        return stopped

    def coverage(self, everywhere: Mapping[str, Kind]) -> Coverage:
        """What is seen and what is not.

        Args:
            everywhere: the sites that are seen on any rank, and their kinds; empty where this process observes by itself.
        """
        kinds: Mapping[str, Kind] = everywhere or {name: site.kind for name, site in self.ran.items()}
        listed = [*self._others.items(), *((name, site.place) for name, site in self.ran.items() if site.place.status is not Status.SEEN)]
        listed = [(name, place) for name, place in listed if place.status is not Status.EXPECTED or name not in kinds]
        # The sort is stable: within a status, places stay in the order in which they were met.
        listed.sort(key=lambda each: each[1].status.value)
        return Coverage(tuple(kinds), tuple((name, place.reason) for name, place in listed), tuple(Counter(kinds.values()).items()))

    def span(self, site: Site) -> Span:
        """Which of a site's units, or which heads of a softmax, this rank holds. Tensor parallelism may spread them over ranks, or repeat them."""
        own = site.head_count if site.kind == "softmax" else site.units
        if site.span is not None:
            return site.span if own is not None else Span(None, 0, site.span.counts)
        for name in site.feeds_on:
            made = self.spans.get(name)
            if made is None:
                continue
            if site.kind == "softmax" and own and made.units % own == 0 and made.width:
                # The layer that computes queries puts all features of one head next to each other, so its outputs are spread head by head.
                return Span(own * (made.units // made.width), made.first * own // made.width, True)
            if own is not None and own == made.width != made.units:
                return Span(made.units, made.first, True)
            return Span(own, 0, made.counts)
        return Span(own, 0, self.counts_repeated)

    def is_taken_for_repeated(self, site: Site) -> bool:
        """Whether this site is assumed to be the same on all ranks of tensor parallelism, since nothing shows how it is spread over them."""
        return bool(self.spans) and site.span is None and site.kind != "recurrent" and not any(name in self.spans for name in site.feeds_on)

    def feeders(self) -> dict[str, tuple[str, ...]]:
        """For each layer, the names of the sites that it feeds."""
        feeds: dict[str, list[str]] = {}
        for site in self.ran.values():
            for name in site.feeds_on:
                feeds.setdefault(name, []).append(site.name)
        return {name: tuple(sites) for name, sites in feeds.items()}


def _activation_of(sites: Sites, module: nn.Module) -> Activation | None:
    kind = type(module)
    if kind not in sites.row_of:
        sites.row_of[kind] = next((row for row in sites.activations if row.computes(module)), None)
    return sites.row_of[kind]


def _may_be_own(own: Decisions, module: nn.Module) -> bool:
    """Whether this is a module without children, of a user's own type, that has not been found to compute something else than an activation."""
    leaf = next(module.children(), None) is None and not type(module).__module__.startswith("torch.")
    return leaf and (module not in own or own[module] is not None or own.is_due(module))
