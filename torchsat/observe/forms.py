"""Measures activations that are written as several calls of torch: `torch.where(z > 0, z, 0)`, `z * (z > theta)`, `torch.maximum(z, floor)`.

Such a *form* ends with a call that chooses elements: by a condition that was computed from a signal (conditions.py), or as the larger of a signal and
a constant. It begins at that signal z, of which its output may be a function a = f(z). Whether it is one is found out as for a module of the user's
own (own.py): by comparing z and a with the table, or by the quotient dL/dz / dL/da. What the form contains is then no site of its own. Until that is
decided, and where a form turns out to be no activation, the walk over the graph names it as a choice of elements (nodes.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchsat import internals
from torchsat.activations import calls_of
from torchsat.observe import own
from torchsat.observe.conditions import Conditions
from torchsat.observe.functions import is_signal
from torchsat.observe.graph import maker
from torchsat.observe.meter import Call
from torchsat.observe.mode import Frame, Function
from torchsat.observe.nodes import is_size
from torchsat.observe.own import Candidate
from torchsat.recognise import anonymous
from torchsat.sites import Form, Site
from torchsat.tensors import plain, why_unread

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

_OF_TWO = frozenset(
    calls_of("maximum", "minimum", "fmax", "fmin", "max", "min", "clamp", "clip", "clamp_min", "clamp_max", "div", "divide", "true_divide")
    + calls_of("atan2", "arctan2", "hypot", "logaddexp", "logaddexp2", "xlogy", "special_xlogy", "xlog1py", "special_xlog1py", "float_power", "pow")
)
"""The functions of two tensors, or of a tensor and its bounds, that are element-wise functions of one of them if the others are no signals."""
_NAMES = {"__mul__": "mul", "__setitem__": "index_put"}


@dataclasses.dataclass(eq=False)
class FormCall:
    """One call of a form."""

    observation: Observation
    candidate: Candidate
    path: str
    """That of the module in which it is, up to and with the slash."""

    @property
    def place(self) -> str:
        """Where it is."""
        return self.candidate.name

    def decide(self, name: str, reason: str) -> str | None:
        """None where it has been found to be an activation; otherwise the reason that is given."""
        if self.observation.sites.known.get(self.place) is self.candidate.site:
            return None
        self.candidate.noted.add((self.path + name, reason))
        return reason


@dataclasses.dataclass(frozen=True)
class Begun:
    """A form that is about to end, with the signal at which it began."""

    place: str
    label: str
    z: Tensor
    began: int


class Forms:
    """The forms of one observation."""

    def __init__(self, observation: Observation, conditions: Conditions) -> None:
        self._observation = observation
        self._conditions = conditions
        self._candidates: dict[str, Candidate] = {}
        self.names: frozenset[str] = frozenset()
        """The sites that are modules."""

    @property
    def are_heard(self) -> bool:
        """Whether forms are looked for in this observation."""
        return self._observation.lineage.looks or bool(self._observation.sites.forms)

    def find(self, frame: Frame, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Begun | None:
        """Called before a function of torch runs: the form that ends with it; None where there is none."""
        given = (*args, *kwargs.values())
        tensors = [value for value in given if isinstance(value, Tensor)]
        z = began = None
        source = self._conditions.source(given)
        if source is not None:
            z, began = source.tensor(), source.began
            if not any(value.requires_grad for value in tensors) or (z is not None and not is_signal(z)):
                return None
        elif function in _OF_TWO:
            signals = [value for value in tensors if is_signal(value)]
            others = [value for value in tensors if not any(value is each for each in signals)]
            if len(signals) == 1 and any(other.ndim for other in others):
                z, began = signals[0], internals.next_node_number()
        if z is None or began is None or why_unread(plain(z)) is not None or is_size(z.grad_fn):
            return None
        label = _NAMES.get(function.__name__, function.__name__.strip("_").removeprefix("special_"))
        place = frame.place(label)
        place += "_call" if place in self.names else ""
        observation = self._observation
        if not observation.options.selects(place) or not (observation.lineage.looks or place in observation.sites.forms):
            return None
        key = observation.sites.forms.get(place)
        if key is not None and key in observation.sites.own and observation.sites.own[key] is None and not observation.sites.own.is_due(key):
            return None
        return Begun(place, label, z, began)

    def begin(self, form: Begun, module: nn.Module, function: Function) -> Callable[[Any], None] | None:
        """Read z. Returns what is to be called with the result of the function."""
        candidate = self._candidate(form)
        candidate.before = self._observation.meter.latest
        call = self._observation.meter.begin(candidate.site, form.z, module, function.__name__.endswith("_"))
        return None if call is None else lambda a: self._end(candidate, dataclasses.replace(call, began=form.began), form.z if a is None else a)

    def _candidate(self, form: Begun) -> Candidate:
        found = self._candidates.get(form.place)
        if found is None:
            sites = self._observation.sites
            key = sites.forms.setdefault(form.place, Form())
            is_due = sites.own.is_due(key)
            if is_due and sites.own[key] is None:
                del sites.own[key]
            bound = sites.own.get(key)
            known = sites.known.get(form.place) if bound is not None else None
            site = known or Site(form.place, bound or anonymous(form.label, sites.epsilon), "call")
            found = self._candidates[form.place] = Candidate(form.place, site, is_due, key, form.label)
            self._observation.candidates.append(found)
        return found

    def _end(self, candidate: Candidate, call: Call, a: Any) -> None:
        """Measure a form after its last function has returned a."""
        if not isinstance(a, Tensor) or a.shape != call.z.shape or not a.is_floating_point() or a.grad_fn is None:
            return
        observation, lineage, node = self._observation, self._observation.lineage, maker(a)[0]
        if lineage.looks and call.node is not None:
            survey = lineage.survey
            candidate.inside = list(dict.fromkeys([*candidate.inside, *(each.place for each in survey.heard_inside(node, call.node))]))
        own.examine(observation, candidate, call, a)
        if not lineage.looks:
            return
        path, inside, _ = candidate.name.rpartition("/")
        lineage.survey.hear(node, internals.node_number(node), FormCall(observation, candidate, path + inside))
        bound = observation.sites.own.get(candidate.key)
        if bound is not None and call.node is not None:
            lineage.survey.explain([node], {call.node})
