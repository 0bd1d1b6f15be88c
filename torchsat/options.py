"""The options of `torchsat.watch`, which are checked once, when they are given.

Every option is spelled twice: in `WatchOptions` and its base, which give a type checker the keyword arguments of `watch`, of the integrations and of
`try_remedies`, and in `Options`, which has the defaults and the checks and is what the rest of the code reads. A test holds them together.
"""

from __future__ import annotations

import fnmatch
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from torchsat.activations import ACTIVATIONS, Activation
from torchsat.record import Alert, Snapshot
from torchsat.rules import RULES, Rule

if TYPE_CHECKING:
    import torch.distributed as dist

Sink = Callable[[Snapshot], Any]
Patterns = str | Iterable[str] | None
Directory = str | os.PathLike[str]

EXTRAS = ("formats", "logits", "rank")
"""What is measured only if the user asks for it, since it costs more than the rest: what lower number formats would do to the numbers of each site,
the logits that a cross-entropy takes, and the effective rank of the features of each site."""
SAMPLE = 65536
"""The most elements that are read of one call of a site, where the user has not said how many."""


class MeasureOptions(TypedDict, total=False):
    """The keyword arguments of `torchsat.watch` that say what is measured; `watch` explains them."""

    epsilon: float
    sample: int | Literal["auto"] | None
    include: Patterns
    exclude: Patterns
    calls: bool
    activations: Sequence[Activation]
    extras: str | Iterable[str]


class WatchOptions(MeasureOptions, total=False):
    """All keyword arguments of `torchsat.watch`, which explains them."""

    writer: Any
    every: int
    budget: float | None
    compiled: Literal["eager", "in_graph"]
    rules: Sequence[Rule]
    sinks: Iterable[Sink] | None
    on_alert: Callable[[Alert], Any] | None
    group: dist.ProcessGroup | Literal["auto"] | None
    start: int | Literal["resume"]
    errors: Literal["warn", "raise"]


class RunOptions(WatchOptions, total=False):
    """All options of `watch` together with the directory, which `watch` takes by position."""

    log_dir: Directory | None


@dataclass(frozen=True)
class Options:
    """The options of one monitor; `torchsat.watch` explains them.

    Raises:
        TypeError, ValueError: an option is out of its range; the message states the allowed values.
    """

    log_dir: Directory | None = None
    writer: Any = None
    every: int = 50
    budget: float | None = 0.02
    epsilon: float = 0.05
    sample: int | Literal["auto"] | None = "auto"
    include: Patterns = None
    exclude: Patterns = None
    calls: bool = True
    compiled: Literal["eager", "in_graph"] = "eager"
    activations: Sequence[Activation] = ACTIVATIONS
    extras: str | Iterable[str] = ()
    rules: Sequence[Rule] = RULES
    sinks: Iterable[Sink] | None = None
    on_alert: Callable[[Alert], Any] | None = None
    group: dist.ProcessGroup | Literal["auto"] | None = "auto"
    start: int | Literal["resume"] = 0
    errors: Literal["warn", "raise"] = "warn"

    def __post_init__(self) -> None:
        if isinstance(self.sinks, Iterable):
            # An iterator can be read only once, and a list could change later.
            object.__setattr__(self, "sinks", tuple(self.sinks))
        _check_when(self)
        _check_what(self)
        _check_where(self)
        object.__setattr__(self, "extras", _extras(self.extras))
        object.__setattr__(self, "include", _patterns("include", self.include))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))

    @property
    def limit(self) -> int | None:
        """The most elements that are read of one call of a site. None: all."""
        return SAMPLE if self.sample == "auto" else self.sample

    @property
    def may_read_whole(self) -> bool:
        """Whether all elements may be read where a kernel on the GPU does that as quickly as it reads a sample."""
        return self.sample == "auto"

    @property
    def raises(self) -> bool:
        """Whether faults of the monitor are let through, for developers of torchsat."""
        return self.errors == "raise"

    @functools.cached_property
    def selects(self) -> Callable[[str], bool]:
        """Whether a site of this name is wanted."""
        return functools.partial(_selects, self.include or (), self.exclude or ())


def options_of(given: Mapping[str, Any]) -> Options:
    """The options of these keyword arguments.

    Raises:
        TypeError, ValueError: there is no option of that name, or its value is out of range.
    """
    names = [field.name for field in fields(Options)]
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise TypeError(f"watch() has no option {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} Allowed are: {', '.join(names)}")
    return Options(**given)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_when(given: Options) -> None:
    """Check the options that say how often to observe, on which ranks, and from which step on."""
    if given.group not in (None, "auto") and not _is_group(given.group):
        raise TypeError(
            f'group is {given.group!r}; allowed are "auto" (all ranks of torch.distributed), a torch.distributed.ProcessGroup of which this rank is '
            "a member, and None (each rank by itself)"
        )
    if given.start != "resume" and not _is_count(given.start, 0):
        raise ValueError(f'start is {given.start!r}; allowed are whole numbers from 0 up (optimizer steps already taken) and "resume"')
    if not _is_count(given.every, 1):
        raise ValueError(f"every is {given.every!r}; allowed are whole numbers from 1 up (steps between observations)")
    budget: Any = given.budget
    if budget is not None and (not isinstance(budget, (int, float)) or isinstance(budget, bool) or not 0 < budget <= 1):
        raise ValueError(f"budget is {budget!r}; allowed are numbers above 0 up to 1 (a share of training time; 0.02 by default), or None for any")
    if given.errors not in ("warn", "raise"):
        raise ValueError(f'errors is {given.errors!r}; allowed are "warn" and "raise"')


def _check_what(given: Options) -> None:
    """Check the options that say what is measured and judged."""
    if not isinstance(given.epsilon, float) or not 0 < given.epsilon < 1:
        raise ValueError(f"epsilon is {given.epsilon!r}; allowed are numbers between 0 and 1 (a share of the peak derivative; 0.05 by default)")
    if given.sample not in (None, "auto") and not _is_count(given.sample, 1):
        raise ValueError(f'sample is {given.sample!r}; allowed are whole numbers from 1 up, None for all elements, and "auto"')
    for kind, values in ((Activation, given.activations), (Rule, given.rules)):
        name = f"{kind.__name__.lower()}s"
        if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name} must be a tuple of torchsat.{kind.__name__}, such as (*torchsat.{name.upper()}, torchsat.{kind.__name__}(...))")
    if not isinstance(given.calls, bool):
        raise TypeError(f"calls is {given.calls!r}; allowed are True (hear function calls too) and False (modules and recurrent layers only)")
    if given.compiled not in ("eager", "in_graph"):
        raise ValueError(f'compiled is {given.compiled!r}; allowed are "eager" and "in_graph"')


def _check_where(given: Options) -> None:
    """Check the options that say where snapshots and alerts go."""
    if given.sinks is not None and not isinstance(given.sinks, Iterable):
        raise TypeError(f"sinks is {given.sinks!r}; allowed is a tuple of functions of one Snapshot")
    for sink in given.sinks or ():
        if not callable(sink):
            raise TypeError(f"sinks holds {sink!r}; each must be a function of one Snapshot")
    if given.on_alert is not None and not callable(given.on_alert):
        raise TypeError(f"on_alert is {given.on_alert!r}; allowed is a function of one Alert")
    if given.log_dir is not None and (not isinstance(given.log_dir, (str, os.PathLike)) or not os.fspath(given.log_dir)):
        raise TypeError(f'log_dir is {given.log_dir!r}; allowed is a directory such as "runs/exp1"')


def _is_group(value: Any) -> bool:
    import torch.distributed as dist

    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def _extras(given: Any) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for each in found:
        if each not in EXTRAS:
            allowed = ", ".join(f'"{name}"' for name in EXTRAS)
            raise ValueError(f"extras holds {each!r}; allowed are {allowed}, one or several: extras=({allowed})")
    return tuple(dict.fromkeys(found))


def _patterns(name: str, given: Any) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given or ()) if given is None or isinstance(given, Iterable) else (given,)
    if not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f'{name} is {given!r}; allowed are a pattern of site names such as "encoder.*", or several')
    return found


def _selects(include: Iterable[str], exclude: Iterable[str], name: str) -> bool:
    wanted = not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
