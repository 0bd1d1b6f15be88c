"""Finds out whether a module that the user has written, without children, is an activation, and measures it if it is one.

The module is never run for this, and no backward is: it is judged by what the user's own training shows.

- In the forward pass its inputs z and outputs a are compared with the table of activations (recognise.py). If they fit a row, it is that function.
- Otherwise the hooks of the backward pass give dL/da and dL/dz at the same elements. If their quotient is the derivative of a function that acts on
  each element alone (elementwise.py), the module is an activation of which nothing else is known: an *anonymous* one. Its
  derivative is that quotient, in every observation. Its peak and plateaus are learned from the quotients (curves.py).

Until this is decided, the module is measured as if it were anonymous, under its own name in the rows of the pass. With the decision its site becomes
one of `Sites`; the rows of a name that is no site reach nobody. A decision is not for ever: a named function is compared with the numbers of each
call, and every other decision is made again after twice as many observations.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchsat.activations import Bound
from torchsat.curves import Curve, learn
from torchsat.elementwise import Nature, bends, nature
from torchsat.observe.graph import maker
from torchsat.observe.meter import Call, exact
from torchsat.recognise import anonymous, differs, is_anonymous, recognise
from torchsat.sampling import Sample, Units
from torchsat.sharding import is_pending, part_of
from torchsat.sites import Site
from torchsat.statistics import knows_quotient, upcast
from torchsat.structure import Found
from torchsat.tensors import why_unread

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

UNDECIDED = "it may be an activation, but what it computes does not show: "
NO_GRADIENT = f"{UNDECIDED}no gradient has reached both its input and its output"
ONE_PIECE = f"{UNDECIDED}where a gradient reached it, it is a straight line, or has slope 0 everywhere"
SEVERAL = f"{UNDECIDED}its numbers fit several functions"
_EXAMINED = 4
"""The most calls of a module that are examined in one observation."""
_REFUTED = 3
"""A module is taken for no activation after this many calls in which an output depended on other elements."""
_MOST = 16384
"""The elements of one call that are examined, unless there are so many units that more are needed to have some of each."""
_GLANCE = 4096
"""The elements of one call that are looked at in each observation of an anonymous function."""
_UNDECIDED = 20
"""It is so too after this many calls that did not show what it is: the inputs of the first calls may not reach the limits of a clamp."""


Numbers = tuple[Tensor, Tensor, Tensor, Tensor]
"""z, a, dL/da and dL/dz at the elements of a call that were read."""
Look = Callable[["Observation", "Candidate", Sample, Numbers], None]
"""What is concluded from the numbers of a call."""


@dataclass(eq=False)
class Candidate:
    """A module that may be an activation, in one observation; or a place at which several calls of torch together may be one (forms.py)."""

    name: str
    site: Site
    is_due: bool
    """Whether it is to be examined, although it has been decided before."""
    key: object
    """What is decided about: the module, or what `Sites.forms` has for the place."""
    label: str
    """What it is called if no row of the table fits."""
    inside: list[str] = field(default_factory=list)
    """Places of mathematical functions that are parts of it, so that they are no sites of their own if it is one."""
    noted: set[tuple[str, str]] = field(default_factory=set)
    """What coverage says of it as long as it is not decided: places, and reasons."""
    calls: dict[int, Call] = field(default_factory=dict)
    """The call that is running, by the id of the thread."""
    before: str | None = None
    """The site that ran before it in this pass."""
    examined: int = 0
    """How many calls of this observation have been examined."""
    first: tuple[Sample, Tensor, Tensor] | None = None
    """What was read of z and a in the first call that was examined. None: it is no activation, or no call was examined."""
    is_late: bool = False
    """Whether it turned out to be an activation only after its pass."""
    open: str = NO_GRADIENT
    """Why it is not decided."""

    @property
    def bends(self) -> bool:
        """Whether a is a function of z, and no straight line, so that the module may well be an activation."""
        if self.first is None:
            return False
        sample, z, a = self.first
        most = _enough(sample)
        return bends(z[:most].cpu(), a[:most].cpu(), [None if each is None else each[:most] for each in _units(sample)])


def attach(observation: Observation, found: Found) -> None:
    """Hook every module that may be an activation that the user has written."""
    sites = observation.sites
    for each in found.own:
        if sites.has_failed(each.name):
            continue
        is_due = sites.own.is_due(each.module)
        if is_due and sites.own[each.module] is None:
            del sites.own[each.module]
        bound = sites.own.get(each.module)
        known = sites.known.get(each.name) if bound is not None else None
        label = re.sub(r"[^A-Za-z0-9_.-]", "_", type(each.module).__name__)
        new = anonymous(label, observation.options.epsilon)
        candidate = Candidate(each.name, known or Site(each.name, bound or new), is_due, each.module, label)
        observation.candidates.append(candidate)
        observation.hook_before(each.module, each.name, _before, observation, candidate)
        observation.hook_after(each.module, each.name, _after, observation, candidate, always=True)


def conclude(observation: Observation) -> None:
    """Name the modules of which this observation could not tell whether they are activations, though they may well be."""
    sites = observation.sites
    if any(each.is_late for each in observation.candidates):
        sites.learn_again()
    for each in observation.candidates:
        _learn_tails(observation, each)
        if each.name in sites.forms:
            continue
        is_seen = each.site is sites.known.get(each.name) or any(name.startswith(f"{each.name}/") for name in sites.ran)
        if not is_seen and each.bends:
            observation.note_if_wanted(each.name, each.open)


def _before(observation: Observation, candidate: Candidate, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    thread = threading.get_ident()
    candidate.calls.pop(thread, None)
    z = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if z is None or is_pending(z) or why_unread(part_of(z)) is not None or not z.numel():
        return
    candidate.before = observation.meter.latest
    call = observation.meter.begin(candidate.site, z, module, in_place=True)
    if call is not None:
        candidate.calls[thread] = call


def _after(observation: Observation, candidate: Candidate, module: nn.Module, args: tuple[Any, ...], a: Any) -> None:
    """Measure a call, and see what it says about the module."""
    call = candidate.calls.pop(threading.get_ident(), None)
    if call is not None and isinstance(a, Tensor) and a.shape == call.z.shape and a.is_floating_point():
        examine(observation, candidate, call, a)


def examine(observation: Observation, candidate: Candidate, call: Call, a: Tensor) -> None:
    """Measure a call that has returned a, and see what it says about the candidate."""
    sites, key = observation.sites, candidate.key
    assert isinstance(call.sample, Sample)
    taken = call.sample.take(part_of(a).detach())
    examines = (candidate.is_due or key not in sites.own) and candidate.examined < _EXAMINED
    if examines:
        candidate.examined += 1
        _compare(observation, candidate, call, taken)
    elif sites.own.get(key) is not None and call.counts:
        _doubt(observation, candidate, call.taken, taken)
    bound, site = sites.own.get(key), candidate.site
    if key in sites.own and bound is None:
        return
    if call.counts:
        if bound is None:
            observation.lineage.ran(site, call.steps, call.z)
        else:
            observation.meter.ran(site, call.steps, call.z)
        observation.meter.count(site, call.sample, call.taken, taken, exact=exact(call, a))
        observation.meter.formats.add(site.name, "a", a)
    if not a.requires_grad or a.grad_fn is None:
        return
    if bound is not None and not is_anonymous(bound):
        observation.meter.tap_output(site, call, a)
        return
    if bound is not None:
        observation.lineage.made(site, maker(a)[0])
    if examines:
        look: Look | None = _judge
    else:
        # On a GPU the host would have to wait for the numbers. There, a decision is made again only when it is due.
        look = _glance if bound is not None and a.is_cpu and not candidate.examined else None
        candidate.examined += look is not None
    missing = observation.meter.tap(candidate.name, call, a, _Heard(observation, candidate, call, taken.clone(), look))
    if missing is not None:
        candidate.open = f"{UNDECIDED}{missing}"
        if bound is not None:
            observation.note(candidate.name, missing)


class _Heard:
    """What is done with the gradients of one call of an anonymous function, or of a module that may be one."""

    def __init__(self, observation: Observation, candidate: Candidate, call: Call, a: Tensor, look: Look | None) -> None:
        assert isinstance(call.sample, Sample)
        self._observation = observation
        self._candidate = candidate
        self._sample = call.sample
        self._numbers = (call.taken, a)
        self._look = look
        self._adders = [
            observation.meter.gradient_adder(candidate.site, call.sample, call.taken),
            observation.meter.quotient_adder(candidate.site, call, a),
        ]

    def __call__(self, grad_a: Tensor | None, grad_z: Tensor | None) -> None:
        sites, key = self._observation.sites, self._candidate.key
        bound = sites.own.get(key)
        if key in sites.own and (bound is None or not is_anonymous(bound)):
            return
        for add in self._adders:
            add(grad_a, grad_z)
        if grad_a is not None and grad_z is not None:
            self._learn(grad_a, grad_z)
        look, self._look = self._look, None
        if look is not None and grad_a is not None and grad_z is not None:
            look(self._observation, self._candidate, self._sample, (*self._numbers, grad_a, grad_z))

    def _learn(self, grad_a: Tensor, grad_z: Tensor) -> None:
        """Add the slopes of a call to the curve of the function."""
        z, site = self._numbers[0], self._candidate.site
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Each rank would learn other tails from its own elements, and their shares could not be merged.
            return
        site.curve = site.curve or Curve()
        known = knows_quotient(grad_a, grad_z) & torch.isfinite(z)
        site.curve.add(z, (upcast(grad_z) / upcast(grad_a)).abs(), known, self._sample.elements / max(1, known.numel()))


def _learn_tails(observation: Observation, candidate: Candidate) -> None:
    """Learn peak and tails of an anonymous function. They are used from the next observation on."""
    site, sites = candidate.site, observation.sites
    is_open = sites.own.get(candidate.key) is site.bound and is_anonymous(site.bound)
    numbers = site.curve.read() if is_open and site.curve is not None else None
    if numbers is not None:
        site.bound = dataclasses.replace(site.bound, constants=learn(*numbers, sites.epsilon))
        sites.own[candidate.key] = site.bound


def _compare(observation: Observation, candidate: Candidate, call: Call, a: Tensor) -> None:
    """Compare the numbers of a call with the table of activations."""
    found = recognise(call.taken, a, observation.options.activations, observation.options.epsilon)
    if found.bound is not None:
        for each in observation.passes:
            each.forget(candidate.name)
        _decide(observation, candidate, found.bound)
    elif candidate.key not in observation.sites.own:
        assert isinstance(call.sample, Sample)
        candidate.open = SEVERAL if found.may_come else NO_GRADIENT
        candidate.first = candidate.first or (call.sample, call.taken, a.clone())


def _nature(sample: Sample, numbers: Numbers, most: int) -> tuple[Nature, bool]:
    """What the first elements of a call show, and whether any gradient came through it."""
    z, a, grad_a, grad_z = (each[:most].cpu() for each in numbers)
    known = knows_quotient(grad_a, grad_z) & torch.isfinite(z) & torch.isfinite(a)
    units = [None if each is None else each[:most][known] for each in _units(sample)]
    rounding = max(torch.finfo(each.dtype).eps for each in (grad_a, grad_z))
    return nature(z[known], a[known], grad_z[known].double() / grad_a[known].double(), units, rounding), bool(known.any())


def _glance(observation: Observation, candidate: Candidate, sample: Sample, numbers: Numbers) -> None:
    """Have an anonymous function decided again from the next observation on, if a few of its elements speak against it."""
    if _nature(sample, numbers, _GLANCE)[0] is Nature.OTHER:
        observation.sites.own.suspect(candidate.key)


def _judge(observation: Observation, candidate: Candidate, sample: Sample, numbers: Numbers) -> None:
    """Decide by the gradients of a call whether the module is an activation, if they are enough to tell."""
    (found, is_heard), tally = _nature(sample, numbers, _enough(sample)), observation.sites.own.tally(candidate.key)
    if found is Nature.ACTIVATION and candidate.open != SEVERAL:
        _decide(observation, candidate, candidate.site.bound)
        return
    tally[found] += 1
    if found is Nature.OTHER:
        candidate.first = None
    elif found is not Nature.ACTIVATION and is_heard and candidate.open == NO_GRADIENT:
        candidate.open = ONE_PIECE
    if tally[Nature.OTHER] >= _REFUTED:
        _decide(observation, candidate, None)
    elif sum(tally.values()) >= _UNDECIDED and not candidate.is_due:
        _decide(observation, candidate, candidate.site.bound if tally[Nature.ACTIVATION] else None)


def _decide(observation: Observation, candidate: Candidate, bound: Bound | None) -> None:
    """Keep what a module computes. None: it is no activation."""
    sites, name = observation.sites, candidate.name
    was_known = sites.own.get(candidate.key) is not None
    sites.own.decide(candidate.key, bound)
    candidate.is_due = False
    if bound is None:
        for each in observation.passes:
            each.forget(name)
        if not candidate.bends:
            for reason in (NO_GRADIENT, ONE_PIECE, SEVERAL):
                sites.retract(name, reason)
        return
    if candidate.site.bound is not bound:
        candidate.site.bound, candidate.site.curve = bound, None
    if not was_known:
        sites.known[name] = candidate.site
        observation.forget_inside(name)
        for place, reason in candidate.noted:
            sites.retract(place, reason)
        for place in candidate.inside:
            sites.forget_place(place)
            for each in observation.passes:
                each.forget(place)
            if place in sites.forms:
                sites.own.decide(sites.forms[place], None)
        if is_anonymous(bound):
            # The rest of the pass was observed without this site.
            sites.has_run(candidate.site, candidate.before)
            candidate.is_late = True


def _doubt(observation: Observation, candidate: Candidate, z: Tensor, a: Tensor) -> None:
    """Check that a module still computes the function that it was recognised as. If it does not, it is looked for again."""
    site = candidate.site
    if is_anonymous(site.bound):
        return
    changed = differs(site.bound, z, a)
    if changed.is_cuda:
        # The flag is read in the next observation. Reading it now would wait for the device.
        before, site.doubt = site.doubt, torch.zeros((), dtype=torch.bool, pin_memory=True).copy_(changed, non_blocking=True)
        changed = before if before is not None else torch.zeros(())
    if bool(changed):
        site.doubt = None
        options = observation.options
        found = recognise(z, a, options.activations, options.epsilon).bound
        _decide(observation, candidate, found or anonymous(candidate.label, options.epsilon))


def _enough(sample: Sample) -> int:
    """How many of the elements that were read are enough to tell, within units too."""
    return max(_MOST, 16 * max((sample.shape[axis] for axis in _axes(sample)), default=0))


def _axes(sample: Sample) -> list[int]:
    """The axes along which a module may have a parameter: that of the channels of an image, and the last one."""
    return sorted({min(1, len(sample.shape) - 1), len(sample.shape) - 1}) if len(sample.shape) > 1 else []


def _units(sample: Sample) -> list[Tensor | None]:
    """The groupings within which a module may have a parameter: none, and the unit of each element along each of these axes."""
    return [None, *(Units(sample, axis).index(torch.device("cpu")) for axis in _axes(sample))]
