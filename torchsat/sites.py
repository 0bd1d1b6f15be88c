"""What is known of one model's sites over the whole run: their functions, their place in the model, and what is seen and what is not.

An observation begins with what is known here and adds to it when it ends. Nothing that belongs to one observation alone is kept here.

Every place (a site, a layer, a call) has exactly one `Status` with one reason, so that `coverage` cannot contradict itself:

    UNMEASURABLE   the walk over the modules recognises it and says why it cannot be measured; decided anew at each walk
    EXPECTED       the walk found it, and it has not run yet
    SEEN           measured
    PARTLY         measured, but the last observation of it lacked something
    STOPPED        measured before, but not in the last observations
    UNSEEN         it was met while the model ran, and could not be measured
    FAILED         its measurement raised; it is no longer watched

    from \\ event      found by walk   ran     noted     missed 5 times   failed
    (none)            EXPECTED        SEEN    UNSEEN    -                FAILED
    EXPECTED          EXPECTED        SEEN    UNSEEN    -                FAILED
    UNMEASURABLE      anew            PARTLY  UNSEEN    -                FAILED
    UNSEEN            UNSEEN          SEEN    UNSEEN    -                FAILED
    SEEN, PARTLY      unchanged       SEEN    PARTLY    STOPPED          FAILED
    STOPPED           unchanged       SEEN    PARTLY    STOPPED          FAILED
    FAILED            FAILED          FAILED  FAILED    FAILED           FAILED

"noted" means that an observation has something to say against a place, whether or not it ran there.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor, nn

from torchsat.activations import ACTIVATIONS, Activation, Bound, bind, bind_plain
from torchsat.parts import Span
from torchsat.record import Coverage, Kind, SiteFacts
from torchsat.structure import Found, find

MISSES = 5
"""Observations in a row in which a site did not run, before that is said. Layers dropped at random and idle experts come back sooner."""
_HAS_NOT_RUN = "it has not run in an observed training pass"
_CALLS_OFF = "function calls are not heard (calls=False)"
_STOPPED = f"it ran before, but not in the last {MISSES} observations"


class Status(Enum):
    """What is known of one place; the order is that in which coverage lists them."""

    UNMEASURABLE = 0
    FAILED = 1
    UNSEEN = 2
    PARTLY = 3
    STOPPED = 4
    EXPECTED = 5
    SEEN = 6


MEASURED = frozenset((Status.SEEN, Status.PARTLY, Status.STOPPED))


@dataclass(frozen=True)
class Place:
    """The status of one place, and the reason for it. SEEN needs none."""

    status: Status
    reason: str = ""


class Structure(Enum):
    """Whether it is known what feeds what in the model, and which sites make its output.

    NEW -> KNOWN: an observation has seen a whole pass in eager execution.
    KNOWN -> NEW: the walk finds other modules, or a site ran for the first time after the structure had been looked at.
    """

    NEW = "new"
    KNOWN = "known"


@dataclass(frozen=True)
class LayerSpan:
    """How tensor parallelism spreads the outputs of one layer over ranks."""

    units: int
    """Outputs on all ranks together."""
    first: int
    """Where those of this rank begin."""
    counts: bool
    """False where another rank makes the very same outputs and counts them."""
    width: int
    """How many outputs this rank makes."""


@dataclass(eq=False)
class Site:
    """One place where one activation is computed, and what is known of it."""

    name: str
    bound: Bound
    kind: Kind = "module"
    gate: bool = False
    """The source of the site knows that it is a gate; see also `multiplies`."""
    place: Place = Place(Status.SEEN)
    feeds_on: dict[str, None] = field(default_factory=dict)
    """The layers that feed it: a set that keeps its order."""
    after: dict[str, None] = field(default_factory=dict)
    """The sites that its input depends on most directly: a set that keeps its order."""
    traced: bool = False
    """Its node was seen in the autograd graph, so that `hidden` and `reaches_output` can be trusted."""
    hidden: bool = False
    """A weight comes after it."""
    reaches_output: bool = False
    """The model's output depends on it through no further weight."""
    output: bool = False
    """It makes an output of the model; decided from the three above when the structure has become known."""
    decided: bool = False
    """Its place in the model has been found out."""
    multiplies: bool = False
    """Its output multiplies another signal, as a gate does."""
    units: int | None = None
    """Channels or features; None where it has none, or not always as many."""
    units_vary: bool = False
    """Two calls had different numbers of units."""
    span: Span | None = None
    """Where z is a DTensor: which of its units this rank holds."""
    head_count: int | None = None
    """Of a softmax; None where it is no softmax, or its heads are not always as many."""
    is_attention: bool | None = None
    """Of a softmax over the last of four axes: whether its logits are those of attention. None: not known yet."""
    doubt: Tensor | None = None
    """A flag on its way to the host: whether a recognised function has turned out to be another one."""
    missed: int = 0
    """Observations in a row in which it did not run."""

    def start_over(self) -> None:
        """Forget what depends on the structure of the model."""
        self.feeds_on, self.after = {}, {}
        self.traced = self.hidden = self.reaches_output = self.output = self.decided = self.multiplies = False
        self.units, self.units_vary = None, False

    def facts(self) -> SiteFacts:
        """What a record says of this site besides its numbers."""
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
        )


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
        """Those that have run, in the order in which they first did."""
        self.failed: set[str] = set()
        """The places whose status is FAILED, for every hook to look up quickly."""
        self.structure = Structure.NEW
        self.generation = 0
        """How often the walk has found other modules."""
        self.own: weakref.WeakKeyDictionary[nn.Module, Bound | None] = weakref.WeakKeyDictionary()
        """What modules of the user's own types turned out to compute. None: no activation. Missing: not known yet."""
        self.linear_calls: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        """In how many calls such a module has looked linear."""
        self.fed_by_data: set[str] = set()
        """The layers whose input is the model's: nothing that learns computed it."""
        self.outputs: dict[str, tuple[int, int]] = {}
        """Of each layer, how many outputs it makes on this rank, and how far from the end their axis lies."""
        self.spans: dict[str, LayerSpan] = {}
        """Of the layers whose weights tensor parallelism spreads over ranks."""
        self.counts_repeated = True
        """Whether this rank is the one that counts what tensor parallelism repeats on several."""
        self.has_modules = False
        """Whether the last walk found a module of the table."""
        self.has_recurrent = False
        """Whether it found a recurrent layer."""
        self._signature: tuple[tuple[str, int, str | None], ...] = ()
        self._others: dict[str, Place] = {}
        """The places that are no site which has run."""
        self._recurrent: set[str] = set()
        """The recurrent layers that have run."""
        self._rows: dict[type[nn.Module], Activation | None] = {}

    def walk(self, model: nn.Module, selects: Callable[[str], bool]) -> Found:
        """What there is to hook in a model, of the sites that are wanted."""
        return find(model, self._activation_of, self._may_be_own, selects)

    def knows(self, found: Found) -> bool:
        """Whether the model is as it was when its sites and what feeds them were last found out."""
        return self.structure is Structure.KNOWN and self._signature == found.signature

    def expect(self, found: Found, calls: Sequence[str], hears_calls: bool) -> None:
        """Take up what a walk found; forget what depends on the structure where it is another one than before."""
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
            self._signature, self.structure = signature, Structure.NEW
            self.generation += 1
            for site in self.known.values():
                site.start_over()

    def reject(self, name: str, reason: str) -> None:
        """The walk over the modules says that a place cannot be measured."""
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
        """The function of this name as a kernel of torch computes it: the user's row of that name, or else our own."""
        return bind_plain(next(row for row in (*self.activations, *ACTIVATIONS) if row.name == function), self.epsilon)

    def note(self, name: str, reason: str) -> None:
        """Something is to be said against a place. What it already says stays, where it has not run."""
        place = self._others.get(name)
        if name in self.ran:
            self.ran[name].place = Place(Status.PARTLY, reason)
        elif place is None or place.status not in (Status.FAILED, Status.UNSEEN):
            self._others.pop(name, None)
            self._others[name] = Place(Status.UNSEEN, reason)

    def has_run(self, site: Site) -> None:
        """A site runs."""
        if site.name not in self.ran and not self.has_failed(site.name):
            self._others.pop(site.name, None)
            self.ran[site.name] = site

    def has_run_layer(self, name: str) -> None:
        """A recurrent layer runs, whose gates are the sites."""
        self._recurrent.add(name)
        if name in self._others and self._others[name].status is Status.EXPECTED:
            del self._others[name]

    def fail(self, name: str, reason: str) -> None:
        """The measurement of a place has raised. It is no longer watched."""
        self.known.pop(name, None)
        self.ran.pop(name, None)
        self._others[name] = Place(Status.FAILED, reason)
        self.failed.add(name)

    def forget(self, prefix: str) -> None:
        """Forget the sites whose names begin so: they turned out to be part of another one."""
        for name in [name for name in self.known if name.startswith(prefix)]:
            del self.known[name]
            self.ran.pop(name, None)

    def retract(self, name: str, reason: str) -> None:
        """This is no longer to be said against a place that has not run."""
        if self._others.get(name) == Place(Status.UNSEEN, reason):
            del self._others[name]

    def has_failed(self, name: str) -> bool:
        """Whether this place is no longer watched."""
        return name in self.failed

    def settle(self, ran: Mapping[str, object], noted: Mapping[str, str], counts_misses: bool) -> list[str]:
        """Take up how an observation has ended.

        Args:
            ran: the sites that were measured in it.
            noted: what it had to say against places.
            counts_misses: whether it would have seen every site that ran.

        Returns:
            The sites that have stopped by now and had not before.
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
            everywhere: the sites that are seen on any rank, and their kinds; empty where this process is by itself.
        """
        kinds: Mapping[str, Kind] = everywhere or {name: site.kind for name, site in self.ran.items()}
        listed = [*self._others.items(), *((name, site.place) for name, site in self.ran.items() if site.place.status is not Status.SEEN)]
        listed = [(name, place) for name, place in listed if place.status is not Status.EXPECTED or name not in kinds]
        # Sorting keeps the order within a status, which is that in which they were met.
        listed.sort(key=lambda each: each[1].status.value)
        return Coverage(tuple(kinds), tuple((name, place.reason) for name, place in listed), tuple(Counter(kinds.values()).items()))

    def span(self, site: Site) -> Span:
        """Which of a site's units, or of a softmax's heads, this rank holds, where tensor parallelism spreads them over ranks or repeats them."""
        own = site.head_count if site.kind == "softmax" else site.units
        if site.span is not None:
            return site.span if own is not None else Span(None, 0, site.span.counts)
        for name in site.feeds_on:
            made = self.spans.get(name)
            if made is None:
                continue
            if site.kind == "softmax" and own and made.units % own == 0 and made.width:
                # Heads lie one behind the other in the output of the layer that makes queries.
                return Span(own * (made.units // made.width), made.first * own // made.width, True)
            if own is not None and own == made.width != made.units:
                return Span(made.units, made.first, True)
            return Span(own, 0, made.counts)
        return Span(own, 0, self.counts_repeated)

    def is_taken_for_repeated(self, site: Site) -> bool:
        """Whether nothing tells how tensor parallelism spreads this site, so that it is taken to be the same on all its ranks."""
        return bool(self.spans) and site.span is None and site.kind != "recurrent" and not any(name in self.spans for name in site.feeds_on)

    def feeders(self) -> dict[str, tuple[str, ...]]:
        """The sites that each layer feeds."""
        feeds: dict[str, list[str]] = {}
        for site in self.ran.values():
            for name in site.feeds_on:
                feeds.setdefault(name, []).append(site.name)
        return {name: tuple(sites) for name, sites in feeds.items()}

    def _activation_of(self, module: nn.Module) -> Activation | None:
        kind = type(module)
        if kind not in self._rows:
            self._rows[kind] = next((row for row in self.activations if row.computes(module)), None)
        return self._rows[kind]

    def _may_be_own(self, module: nn.Module) -> bool:
        """Whether this is a leaf of the user's own type that has not been found to be something else."""
        leaf = next(module.children(), None) is None and not type(module).__module__.startswith("torch.")
        return leaf and (module not in self.own or self.own[module] is not None)
