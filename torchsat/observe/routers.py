"""Counts which experts the router of a mixture of experts chooses, and reads how surely it does.

A router scores the experts for each token and takes the highest scores, by `topk`, `argmax` or `max` along the last axis, which calls.py hears. Many
other things are chosen so: beams, points of a cloud, the keys of a sparse attention. So such a call is taken for that of a router only if the modules
around it hold as many experts as there are scores (`experts_in`): the module in whose forward it happens, the one around that, and their children.
And the experts must not have run before the choice: a classifier may have as many blocks as classes, and take the argmax of its logits. Where a
module takes the `topk` of scores, their `max` and `argmax` in the same forward are no choices: they stabilise a softmax, or are written to a log.

The choices of all tokens are counted. The entropy and the margin are read at a sample of the tokens. They need probabilities, and which function has
made the scores is asked of the numbers: where all lie between 0 and 1, they are a softmax or sigmoids, and are divided by their sum; otherwise they
are logits, and their softmax is taken. A router may choose by other numbers than its probabilities, as with the bias by which DeepSeek-V3 balances
the load, or with groups that are masked. Then the probabilities are those of the last softmax or sigmoid of as many values before the choice in the
same forward, and the margin is that of the numbers by which it chooses.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchsat import internals
from torchsat.activations import calls_of
from torchsat.columns import EXPERTS, ROUTER
from torchsat.observe.graph import upstream
from torchsat.observe.mode import Frame
from torchsat.observe.nodes import is_leaf
from torchsat.parts import Key
from torchsat.sampling import places
from torchsat.statistics import accumulator, upcast
from torchsat.structure import Found
from torchsat.tensors import plain, why_unread

if TYPE_CHECKING:
    from torchsat.observe.observation import Observation

CHOICES = frozenset((torch.topk, Tensor.topk, torch.argmax, Tensor.argmax, torch.max, Tensor.max))
"""The functions by which a router chooses."""
SCORES = frozenset((*calls_of("softmax", "sigmoid"), torch.special.expit))
"""The functions that make probabilities of logits."""
_MOST = 4096
"""The most tokens of a call whose entropy and margin are read."""
_NAMED = "expert"
"""What the attributes of a module are called that say how many experts there are, or hold them."""


class Routers:
    """Hears the routers of one observation."""

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self._modules: dict[str, weakref.ref[nn.Module]] = {}
        self._scores: tuple[weakref.ref[Frame], weakref.ref[Tensor]] | None = None
        """The last softmax or sigmoid, and the forward that has called it."""
        self._chosen: tuple[weakref.ref[Frame], weakref.ref[Tensor]] | None = None
        """The last scores from which was chosen: Switch Transformers take the argmax and the maximum of the same ones."""
        self._by_topk: weakref.ref[Frame] | None = None
        """The last forward in which the highest scores were taken by `topk`."""
        self._by_maximum: tuple[weakref.ref[Frame], list[tuple[Key, Tensor]]] | None = None
        """What was counted of the choices by `max` and `argmax` in the last forward that had any."""

    def know(self, found: Found) -> None:
        """Note the modules of the model by name."""
        self._modules = {each.name: weakref.ref(each.module) for each in found.modules}

    def heard_scores(self, frame: Frame, result: Any) -> None:
        """Note that a softmax or sigmoid was called in a forward and returned this."""
        if isinstance(result, Tensor):
            self._scores = weakref.ref(frame), weakref.ref(result)

    def heard_choice(self, frame: Frame, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Count a choice, if it is that of a router. Returns whether it is one."""
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not _is_along_last(function, x, args[1:], kwargs):
            return False
        k, indices = _chosen(function, result)
        if indices is None or not 1 <= k < x.shape[-1] or not self._is_router(frame, x):
            return False
        is_topk, had_topk = _name(function) == "topk", self._by_topk is not None and self._by_topk() is frame
        if _is(self._chosen, frame, x) and (had_topk or not is_topk):
            return False
        if is_topk:
            self._by_topk = weakref.ref(frame)
        elif had_topk:
            return False
        place = f"{frame.path}/experts" if frame.path else "experts"
        observation = self._observation
        if observation.options.selects(place) and observation.passes.counts(frame.module) and not observation.sites.has_failed(place):
            observation.guard.attempt(place, self._count, place, frame, x, indices, k, is_topk)
        self._chosen = weakref.ref(frame), weakref.ref(x)
        return True

    def _is_router(self, frame: Frame, x: Tensor) -> bool:
        if not x.is_floating_point() or not internals.is_real(x) or why_unread(plain(x)) is not None or x.numel() == 0:
            return False
        if x.ndim > 2 and x.shape[-2] == 1 and x.shape[0] > 1:
            # The best experts of each of several groups, of which there is one.
            return False
        known, key = self._observation.sites.routers, (frame.path, x.shape[-1])
        if key not in known:
            experts = experts_in(self._around(frame), x.shape[-1])
            known[key] = experts is not None and not self._have_run(experts, frame, x)
        return known[key]

    def _have_run(self, experts: Sequence[nn.Module], frame: Frame, x: Tensor) -> bool:
        """Whether some of these modules have run before the choice: the scores were computed from their weights, or they hold sites that have run."""
        made_by = [each.grad_fn for each in (x, self._probabilities(frame, x)) if each is not None]
        weights = {id(weight) for each in experts for weight in each.parameters()}
        if any(id(getattr(node, "variable", None)) in weights for node in upstream(made_by, is_leaf)):
            return True
        paths = tuple(f"{name}." for name, module in self._modules.items() if any(module() is each for each in experts))
        return any(name.startswith(paths) for name in self._observation.passes.current.rows)

    def _around(self, frame: Frame) -> list[nn.Module]:
        """The module that chooses, and the one around it."""
        found = [frame.module]
        if frame.path:
            above = self._modules.get(frame.path.rpartition(".")[0], lambda: None)()
            found += [above] if above is not None else []
        return found

    def _probabilities(self, frame: Frame, x: Tensor) -> Tensor | None:
        """The last softmax or sigmoid of as many values that was called in the same forward, unless it is x itself."""
        if self._scores is None or self._scores[0]() is not frame:
            return None
        found = self._scores[1]()
        return found if found is not None and found is not x and found.shape == x.shape else None

    def _count(self, place: str, frame: Frame, x: Tensor, indices: Tensor, k: int, is_topk: bool) -> None:
        observation, current, scores = self._observation, self._observation.passes.current, self._probabilities(frame, x)
        x, indices = (plain(each).detach().reshape(-1, size) for each, size in ((x, x.shape[-1]), (indices, k)))
        given = None if scores is None else plain(scores).detach().reshape(x.shape)
        width, dtype = x.shape[1], accumulator(x.device)
        choices = torch.zeros(width, dtype=dtype, device=x.device)
        choices.index_add_(0, indices.reshape(-1), torch.ones(indices.numel(), dtype=dtype, device=x.device))
        router = _sureness(x, given, k, observation.meter.seed(place))
        counted: list[tuple[Key, Tensor]] = [((EXPERTS.name, place), choices.unsqueeze(0)), ((ROUTER.name, place), router.unsqueeze(1))]
        if self._by_maximum is not None and self._by_maximum[0]() is not frame:
            self._by_maximum = None
        if is_topk and self._by_maximum is not None:
            # They were no choices.
            for key, sums in self._by_maximum[1]:
                current.tally(key, -sums)
            self._by_maximum = None
        for key, sums in counted:
            observation.passes.tally_facts[key] = {"k": k}
            current.tally(key, sums)
        if not is_topk:
            self._by_maximum = weakref.ref(frame), [*(self._by_maximum[1] if self._by_maximum is not None else ()), *counted]


def _sureness(x: Tensor, scores: Tensor | None, k: int, seed: int) -> Tensor:
    """The numbers of columns.ROUTER of one call. `scores`: the probabilities or sigmoids, where x is neither."""
    tokens, width = x.shape
    read = min(tokens, _MOST)
    chosen = places(tokens, read, seed, x.device)
    rows, weight, dtype = upcast(x.index_select(0, chosen)), tokens / read, accumulator(x.device)
    p = _distribution(rows if scores is None else upcast(scores.index_select(0, chosen)))
    entropy = torch.special.entr(p).sum(1) / math.log(width)
    # Of logits the margin is that of their probabilities. Numbers by which a router chooses beside its probabilities are taken as they are.
    top = (p if scores is None else rows).topk(k + 1, dim=1).values
    sums = [torch.full((), tokens, dtype=dtype, device=x.device)]
    for each in (entropy, top[:, k - 1] - top[:, k]):
        finite = torch.isfinite(each)
        sums += [weight * finite.sum().to(dtype), weight * torch.where(finite, each, torch.zeros_like(each)).to(dtype).sum()]
    return torch.stack(sums)


def _distribution(rows: Tensor) -> Tensor:
    """A distribution of each row; all of them hold probabilities, or sigmoids, or logits. The host does not wait to know which."""
    within, total = ((rows >= 0) & (rows <= 1)).all(), rows.sum(1, keepdim=True)
    return torch.where(within, rows / torch.where(total > 0, total, torch.ones_like(total)), torch.softmax(rows, 1))


def _is_along_last(function: Callable[..., Any], x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the highest values along the last axis are chosen. `rest`: the arguments behind the tensor."""
    if x.ndim < 2:
        return False
    if _name(function) == "topk":
        dim, largest = rest[1] if len(rest) > 1 else kwargs.get("dim", -1), rest[2] if len(rest) > 2 else kwargs.get("largest", True)
        return bool(largest) and dim in (-1, x.ndim - 1)
    dim = rest[0] if rest else kwargs.get("dim")
    return type(dim) is int and dim in (-1, x.ndim - 1)


def _chosen(function: Callable[..., Any], result: Any) -> tuple[int, Tensor | None]:
    """How many are chosen, and their indices."""
    indices = result if isinstance(result, Tensor) else result[1] if isinstance(result, tuple) and len(result) == 2 else None
    return (1 if _name(function) != "topk" else indices.shape[-1] if isinstance(indices, Tensor) else 0), indices


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", ""))


def _is(known: tuple[weakref.ref[Frame], weakref.ref[Tensor]] | None, frame: Frame, tensor: Tensor) -> bool:
    return known is not None and known[0]() is frame and known[1]() is tensor


def experts_in(around: Iterable[nn.Module], width: int) -> tuple[nn.Module, ...] | None:
    """The modules that are the experts, of so many experts that one of these modules, or a child of one, holds; empty where they are no modules of
    their own, and None where there are not so many.

    Experts are the modules of an nn.ModuleList or nn.ModuleDict, or the slices of a parameter [experts, ., .] of a module that is not one of torch.nn
    (where convolutions have such weights too). Where ranks divide the experts, a module holds only some of them, but says how many there are: in an
    attribute whose name has the word expert, beside a child whose name has it.
    """
    if width < 2:
        return None
    for module in around:
        children = dict(module.named_children())
        for each in (module, *children.values()):
            if isinstance(each, (nn.ModuleList, nn.ModuleDict)) and len(each) == width:
                return tuple(each.children())
            if _has_slices(each, width):
                return ()
        says = any(_NAMED in name and type(value) is int and value == width for name, value in vars(module).items())
        if says and any(_NAMED in name for name in children):
            return ()
    return None


def _has_slices(module: nn.Module, width: int) -> bool:
    own = not type(module).__module__.startswith("torch.")
    return own and any(each is not None and each.ndim == 3 and each.shape[0] == width for each in module._parameters.values())
