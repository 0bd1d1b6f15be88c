"""The processes that observe together: one merged record per site, whatever number of ranks ran it.

An observation costs one SUM and one MAX all-reduce of two packed vectors of a fixed layout, and no collective else. Every column of a row
adds or maxes (statistics.py), so the merged row is the row of one process that was given the concatenated batch; per-rank gradients are divided by
what data parallelism averages over. The layout is agreed upon at the first observation: sites and layers of all ranks, in order; a rank
that has not run a site contributes nothing to it. When the sites of some rank have changed it says so in a column of the MAX vector, and two
rounds later, when every rank has read that, all agree anew.

Nobody waits for another rank. The collectives run asynchronously in a group of our own (made from the store of the user's, so that
they can never be mistaken for collectives of the user's), and their result is read at a later step. What never arrives, because a rank has
died or left, is replaced by this rank's own numbers, and from then on it goes by itself.

Whether all ranks watch cannot be taken for granted (`if rank == 0: watch(...)`): each announces itself in the store, and at the end of the first
observed step the first one to see all, or to have waited long enough, writes the decision that binds everyone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import pickle
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchsat.record import SITE_FACTS, WEIGHT_FACTS
from torchsat.statistics import HEADS, MAXES, SUMS, UNIT_SAMPLES, UNITS, accumulator, empty_row, summarise_features, summarise_units
from torchsat.weights import COLUMNS as LAYER_COLUMNS

GRACE = 5.0
"""Seconds that a rank waits, once, for others: for those that have not begun to train a watched model, or for a result that is late."""
PATIENCE = 60.0
"""The same for those that have begun, and are still in their first observed step."""
LAG = 4
"""Steps after which a result becomes visible, on all ranks alike: by then it has arrived without anybody having waited."""
CLOSING = 10.0
"""Seconds that `close` waits for other ranks."""

_WIDTH = len(SUMS) + 1
"""Sum columns of a site, and behind them how many elements were read. The others stand for all elements, so that ranks which have read another share
of theirs weigh as they should; the host scales them back."""
WORST = ("worst", "nonfinite")
"""Max columns of a site: a number and the rank that it was found on, in one float64."""
LAYER_SUMS = ("weight_sq", "change_sq", "change_n", "grad_sq", "grad_n", "n", "numel", "input_n", "input_elements")
LAYER_MAXES = ("learning_rate", "weight_sq", "weight_sq_negated")
"""The last two are of the weights that every rank holds: they tell whether these are the same."""
ENDS = ("step", "step_negated", "interval", "changed", "skipped")
"""Max columns of the whole round."""
_FINE = 2**20
"""Steps of a share, and the most ranks, that fit beside each other into the 53 bits of a float64."""

_met: dict[str, int] = {}
"""How many monitors of this process have announced themselves to each group, by kind of model."""


@dataclass
class SitePart:
    """What one rank has of a site."""

    facts: dict[str, Any]
    row: Tensor | None
    """None where it did not run."""
    block: Tensor | None
    """Of this observation alone."""
    heads: Tensor | None
    first: int = 0
    """Where its units, or heads, lie among those of all ranks."""
    counts: bool = True
    """False where another rank holds the very same elements."""


@dataclass
class LayerPart:
    """What one rank has of a layer."""

    facts: dict[str, Any]
    numbers: Tensor | None
    """COLUMNS of weights.py; None where nothing was measured."""
    inputs: Tensor | None
    """[3, features]."""
    n: int
    numel: int
    """Of this rank's part of the weight."""
    rate: float | None
    sharded: bool = False
    """Every rank holds another part; otherwise all hold the same."""
    counts: bool = True
    """False where another rank holds the same part, or the same input."""
    input_counts: bool = True
    first: int = 0
    """Where its features lie among those of all ranks."""
    input_elements: int = 0
    """Of its input, of which a sample was read."""


@dataclass(frozen=True)
class Layout:
    """What all ranks have agreed upon: facts of sites and layers, in order, and the rank that speaks for each layer that is not sharded."""

    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)

    @functools.cached_property
    def places(self) -> Places:
        """Where everything lies in the two vectors: first a row for each site, then one for each layer, then what has no fixed width."""
        sums = _WIDTH * len(self.sites) + len(LAYER_SUMS) * len(self.layers)
        maxes = (len(MAXES) + len(WORST)) * len(self.sites) + len(LAYER_MAXES) * len(self.layers) + len(ENDS)
        blocks, heads, tops, inputs = {}, {}, {}, {}
        for name, facts in self.sites.items():
            if facts["units"]:
                blocks[name] = slice(sums, sums := sums + 2 * int(facts["units"]))
            if facts["heads"]:
                heads[name] = slice(sums, sums := sums + (len(HEADS) - 1) * int(facts["heads"]))
                tops[name] = slice(maxes, maxes := maxes + int(facts["heads"]))
        for name, facts in self.layers.items():
            if facts["features"]:
                inputs[name] = slice(sums, sums := sums + 3 * int(facts["features"]))
        return Places(sums, maxes, blocks, heads, tops, inputs)

    @property
    def bytes(self) -> int:
        """What a rank hands to the two all-reduces of one observation."""
        return 8 * (self.places.sums + self.places.maxes)


@dataclass(frozen=True)
class Places:
    """Of a layout: the lengths of the two vectors, and where blocks of units [2, units], of heads, their maxima and inputs [3, features] lie."""

    sums: int
    maxes: int
    blocks: dict[str, slice]
    heads: dict[str, slice]
    tops: dict[str, slice]
    inputs: dict[str, slice]


@dataclass
class Round:
    """One observation on its way around the ranks."""

    number: int
    step: int
    time: float
    layout: Layout
    vectors: list[Tensor]
    """SUM and MAX."""
    own: list[Tensor]
    """The same of this rank alone."""
    works: list[Any]
    event: torch.cuda.Event | None
    give_up: Callable[[str], None]
    failed: bool = False

    def arrived(self) -> bool:
        """Whether the numbers are on the host, those of all ranks or, where that has failed, our own."""
        if self.failed:
            return True
        try:
            if not all(work.is_completed() for work in self.works):
                return False
            for work in self.works if self.event is None else ():
                # Over already: raises what went wrong.
                work.wait()
        except Exception as error:
            self.fail(str(error).partition("\n")[0] or type(error).__name__)
            return True
        return self.event is None or bool(self.event.query())

    def wait(self, seconds: float = math.inf) -> None:
        """Until `arrived`, or until the other ranks are given up."""
        until = time.monotonic() + seconds
        while not self.arrived():
            if time.monotonic() > until:
                self.fail(f"nothing was heard of them for {seconds:g} s")
                return
            time.sleep(1e-4)

    def fail(self, why: str) -> None:
        self.failed = True
        self.give_up(why)


@dataclass(frozen=True)
class Merged:
    """A round on the host: facts and numbers as `to_record` and `to_weight` want them."""

    sites: list[tuple[dict[str, Any], list[float], dict[str, Any]]]
    """Facts, row, and what ranks add to a record."""
    layers: list[tuple[dict[str, Any], list[float]]]
    skipped: bool
    differing: tuple[str, ...] = ()
    """Layers of which every rank holds the whole weight, and not the same."""


class Ranks:
    """One monitor's view of the processes that observe with it.

    Args:
        group: the process group.
        kind: of the model; ranks meet over the n-th model of a kind that each of them trains.
        give_up: told once why the others are no longer heard.
    """

    def __init__(self, group: dist.ProcessGroup, kind: str, give_up: Callable[[str], None]) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.everywhere = dist.get_rank()
        """The rank in the whole job, by which people know it."""
        self._kind = kind
        self.together = False
        self.layout = Layout()
        self._group = group
        self._give_up = give_up
        members = dist.get_process_group_ranks(group)
        name = hashlib.sha256(json.dumps([members, kind]).encode()).hexdigest()[:12]
        self._number = number = _met.setdefault(name, 0)
        _met[name] += 1
        # The store of the whole job: the only one that every rank of any group can reach.
        self._store = PrefixStore(f"torchsat/{name}/{number}", dist.distributed_c10d._get_default_store())
        self._own: Any = None
        self._works: list[Any] = []
        """Collectives that may not be over."""
        self._device = torch.device("cpu")
        self._said = b""
        """The facts that this rank has told the others."""
        self._rounds = 0
        self.history: dict[str, Any] | None = None
        """What the rank that is furthest remembers of an earlier session, for those that do not; until it is taken up."""
        self._furthest = 0
        self._told: dict[int, tuple[bool, int]] = {}
        """By step: whether some rank wants to agree anew, and the longest interval that one wants."""
        self.interval = 0
        """What the ranks have agreed upon; 0: nothing yet."""
        self._windows: dict[str, Tensor] = {}
        """Of each site [2, units] since the last full window, on the host."""
        self._store.add("entered", 1)

    def meet(self, device: torch.device) -> str | None:
        """At the end of the first observed step, on every rank: decide whether all observe together; why not, if not."""
        self._store.add("arrived", 1)
        begun, pause = time.monotonic(), 1e-3
        why = ""
        while not self._store.check(["decision"]):
            entered, arrived = self._store.add("entered", 0), self._store.add("arrived", 0)
            if arrived == self.size:
                self._store.compare_set("decision", "", "together")
                break
            if time.monotonic() - begun > (PATIENCE if entered == self.size else GRACE):
                if entered < self.size:
                    why = (
                        f"{entered} of {self.size} ranks train a watched {self._kind} no. {self._number + 1}; call torchsat.watch on every rank, or "
                        "pass group= the ranks that do, or group=None"
                    )
                else:
                    why = f"only {arrived} of {self.size} ranks ended a step within {PATIENCE:g} s"
                self._store.compare_set("decision", "", f"apart: {why}")
                break
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
        decision = self._store.get("decision").decode()
        if decision != "together":
            return decision.partition(": ")[2]
        self._own, self._device = self._make_group(device)
        self.together = True
        return None

    def _make_group(self, device: torch.device) -> tuple[Any, torch.device]:
        """A group of our own with the same members and backend, and the device that it works on."""
        for kind in dict.fromkeys((device.type, "cuda" if torch.cuda.is_available() else "cpu", "cpu")):
            where = device if kind == device.type else torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
            try:
                backend = self._group._get_backend(torch.device(kind))
            except RuntimeError:
                continue
            name = backend.name()
            limit = getattr(getattr(backend, "options", None), "_timeout", dist.distributed_c10d.default_pg_timeout)
            store = PrefixStore("group", self._store)
            if name == "gloo":
                return dist.ProcessGroupGloo(store, self.rank, self.size, limit), torch.device("cpu")
            if name == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = limit
                return dist.ProcessGroupNCCL(store, self.rank, self.size, options), where
            # Another backend: the user's own group, whose collectives all ranks call in the same order.
            return backend, where
        raise RuntimeError(f"its process group has no backend for {device.type}")

    def leave(self) -> None:
        """Observe with nobody any more, and say so to those who will miss this rank."""
        if self.together:
            with contextlib.suppress(Exception):
                self._store.compare_set("left", "", str(self.everywhere))
        self.together = False
        own, self._own = self._own, None
        if own is not None and not all(work.is_completed() for work in self._works):
            # Its end would wait for what has not come, as long as the timeout of the group: it is kept until the process is no more.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(own))
        self._works = []

    def send(
        self,
        step: int,
        sites: Mapping[str, SitePart],
        layers: Mapping[str, LayerPart],
        *,
        divisor: Tensor | float = 1.0,
        interval: int = 1,
        skipped: Tensor | None = None,
        before: Callable[[], None] = lambda: None,
        history: Callable[[], dict[str, Any]] = dict,
    ) -> Round | None:
        """Hand this rank's numbers to the others. Every rank calls it at the end of the same observed steps, whether or not it has any.

        Args:
            divisor: what gradients are to be divided by: a GradScaler's factor, and what data parallelism averages over.
            interval: the interval between observations that this rank wants.
            skipped: the flag of an overflow, by which the optimizer has skipped this step.
            before: reads the rounds that are LAG steps old.
            history: what this rank remembers of an earlier session, in plain types.

        Returns:
            The round; None where the others were lost just now.
        """
        facts = _encode(sites, layers)
        if not self._rounds:
            step = self._agree(facts, step)
            if step:
                self._agree_on_history(history)
        else:
            before()
            # Also what was read before its time (by `flush`) is acted upon only now, as on the other ranks.
            told = [self._told.pop(at) for at in sorted(self._told) if at + LAG <= step]
            self.interval = told[-1][1] if told else self.interval
            if any(changed for changed, _ in told):
                self._agree(facts, step)
        if not self.together:
            return None
        vectors = self._pack(step, sites, layers, divisor, interval, facts != self._said, skipped)
        self._rounds += 1
        own = [vector.clone() for vector in vectors]
        works = [self._own.allreduce([vector], op) for vector, op in zip(vectors, (dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=True)]
        self._works = [work for work in self._works if not work.is_completed()] + works
        event = None
        if self._device.type == "cuda":
            vectors, own, event = _follow(works, vectors, own)
        return Round(self._rounds - 1, step, time.time(), self.layout, vectors, own, works, event, self._lost)

    def _lost(self, why: str) -> None:
        if self.together:
            with contextlib.suppress(Exception):
                if self._store.check(["left"]):
                    why = f"rank {self._store.get('left').decode()} no longer observes"
            self.leave()
            self._give_up(why)

    def _agree(self, facts: bytes, step: int) -> int:
        """All ranks tell each other their sites and layers; equal lists travel once. Returns the furthest step of a rank."""
        digest = int.from_bytes(hashlib.sha256(facts).digest()[:7], "big")
        mine = torch.tensor([digest, len(facts), step], dtype=torch.int64, device=self._device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        self._finish(self._own.allgather([gathered], [mine]))
        told_steps = torch.stack(gathered).cpu()
        table = [(int(each[0]), int(each[1])) for each in told_steps]
        sites: dict[str, dict[str, Any]] = {}
        layers: dict[str, dict[str, Any]] = {}
        owners: dict[str, int] = {}
        for root in sorted({table.index(each) for each in set(table)}):
            text = facts
            if len(set(table)) > 1:
                sent = torch.empty(table[root][1], dtype=torch.uint8)
                if self.rank == root:
                    sent = torch.frombuffer(bytearray(facts), dtype=torch.uint8)
                sent = sent.to(self._device)
                self._broadcast(sent, root)
                text = sent.cpu().numpy().tobytes()
            told = json.loads(text)
            for known, new in ((sites, told["sites"]), (layers, told["layers"])):
                for name, each in new.items():
                    _take(known, name, each)
            for name in told["layers"]:
                owners.setdefault(name, root)
        sites, layers = (dict(sorted(each.items(), key=lambda item: item[1].get("stage", 0))) for each in (sites, layers))
        _join_stages(sites)
        self.layout, self._said = Layout(sites, layers, owners), facts
        self._windows = {name: window for name, window in self._windows.items() if window.shape[1] == (sites.get(name, {}).get("units") or 0)}
        self._furthest = int(told_steps[:, 2].argmax())
        return int(told_steps[self._furthest, 2])

    def _agree_on_history(self, history: Callable[[], dict[str, Any]]) -> None:
        """All ranks go on with what the one remembers that is furthest: its files of an earlier session need not be theirs."""
        text = pickle.dumps(history()) if self.rank == self._furthest else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self._device)
        self._broadcast(size, self._furthest)
        sent = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8).to(self._device)
        self._broadcast(sent, self._furthest)
        if self.rank != self._furthest:
            self.history = pickle.loads(sent.cpu().numpy().tobytes())

    def _finish(self, work: Any) -> None:
        """Wait for a collective, but not for a rank that has gone astray."""
        self._works.append(work)
        until = time.monotonic() + GRACE
        while not work.is_completed():
            if time.monotonic() > until:
                raise TimeoutError(f"the others did not answer within {GRACE:g} s")
            time.sleep(1e-4)
        work.wait()

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        self._finish(self._own.broadcast([tensor], options))

    def _pack(
        self,
        step: int,
        sites: Mapping[str, SitePart],
        layers: Mapping[str, LayerPart],
        divisor: Tensor | float,
        interval: int,
        changed: bool,
        skipped: Tensor | None,
    ) -> list[Tensor]:
        device, dtype, layout = self._device, accumulator(self._device), self.layout
        places = layout.places
        sums = torch.zeros(places.sums, dtype=dtype, device=device)
        maxes = torch.full((places.maxes,), -math.inf, dtype=dtype, device=device)
        parts = {name: part for name, part in sites.items() if name in layout.sites and part.counts}
        by = divisor.detach().reshape(()).to(device, dtype) if isinstance(divisor, Tensor) else torch.full((), divisor, dtype=dtype, device=device)
        count, rest = len(layout.sites), len(MAXES) * len(layout.sites)
        if count:
            nothing = empty_row(device)
            given = {name: part.row for name, part in parts.items() if part.row is not None}
            table = torch.stack([given[name].to(device) if name in given else nothing for name in layout.sites])
            for column in _SQUARES:
                table[:, column] /= by * by
            read = table[:, _N] + table[:, _NONFINITE]
            elements = table[:, _ELEMENTS].clone()
            scales = torch.where(read > 0, elements / read.clamp(min=1), torch.ones_like(read))
            table[:, : len(SUMS)] *= scales.unsqueeze(1)
            table[:, _ELEMENTS] = elements
            sums[: _WIDTH * count] = torch.cat([table[:, : len(SUMS)], read.unsqueeze(1)], 1).flatten()
            maxes[:rest] = table[:, len(SUMS) :].flatten()
            maxes[rest : rest + len(WORST) * count] = _worst(table, self.everywhere).flatten()
        for at, name in enumerate(layout.sites):
            part = parts.get(name)
            if part is None:
                continue
            _put(part.block, sums, places.blocks.get(name), 2, part.first)
            if part.heads is not None:
                _put(part.heads[:-1].to(device) * scales[at], sums, places.heads.get(name), len(HEADS) - 1, part.first)
                _put(part.heads[-1:], maxes, places.tops.get(name), 1, part.first)
        rest += len(WORST) * count
        if layout.layers:
            known = [layers.get(name) for name in layout.layers]
            mine = [part if part is not None and self._speaks_for(part) else None for part in known]
            given_inputs = [part if part is not None and part.input_counts and part.inputs is not None else None for part in known]
            first = _WIDTH * count
            sums[first : first + len(LAYER_SUMS) * len(mine)] = torch.cat([_layer_sums(mine, device), _input_sums(given_inputs, device)], 1).flatten()
            maxes[rest : rest + len(LAYER_MAXES) * len(known)] = _layer_maxes(known, device).flatten()
            for name, part_of_input in zip(layout.layers, given_inputs, strict=True):
                if part_of_input is not None and part_of_input.inputs is not None:
                    inputs = part_of_input.inputs.to(device)
                    scale = part_of_input.input_elements / inputs[0].sum().clamp(min=1)
                    _put(inputs * scale, sums, places.inputs.get(name), 3, part_of_input.first)
        rest += len(LAYER_MAXES) * len(layout.layers)
        maxes[rest : rest + 4] = _numbers([step, -step, interval, changed], device)
        maxes[rest + 4] = 0.0 if skipped is None else skipped.detach().reshape(()).to(device, dtype)
        return [sums, maxes]

    def _speaks_for(self, part: LayerPart) -> bool:
        """Whether this rank's numbers of a weight are counted."""
        owner = self.layout.owners.get(part.facts["name"])
        return part.numbers is not None and part.n > 0 and part.counts and (part.sharded or owner == self.rank)

    def read(self, round_: Round) -> Merged:
        """The numbers of a round that has arrived."""
        sums, maxes = round_.own if round_.failed else round_.vectors
        layout, places = round_.layout, round_.layout.places
        count, layers = len(layout.sites), len(layout.layers)
        table = sums[: _WIDTH * count].reshape(count, _WIDTH)
        elements = table[:, _ELEMENTS].clone()
        scales = torch.where(elements > 0, table[:, -1] / elements.clamp(min=1), torch.ones_like(elements))
        table = table[:, :-1] * scales.unsqueeze(1)
        table[:, _ELEMENTS] = elements
        heights = table.tolist()
        first, rest = _WIDTH * count, len(MAXES) * count
        bottoms = maxes[:rest].reshape(count, len(MAXES)).tolist()
        worst = maxes[rest : rest + len(WORST) * count].reshape(count, len(WORST)).tolist()
        rest += len(WORST) * count
        found: list[tuple[dict[str, Any], list[float], dict[str, Any]]] = []
        for (name, facts), top, bottom, far, scale in zip(layout.sites.items(), heights, bottoms, worst, scales.tolist(), strict=True):
            block = places.blocks.get(name)
            units = [math.nan] * len(UNITS) if block is None else self._window(name, sums[block].reshape(2, -1))
            heads = [*(sums[places.heads[name]] * scale).tolist(), *maxes[places.tops[name]].tolist()] if name in places.heads else []
            plain = {key: tuple(facts[key]) if key == "after" else facts[key] for key in SITE_FACTS}
            found.append((plain, top + bottom + units + heads, {} if round_.failed else _decode(far)))
        weights: list[tuple[dict[str, Any], list[float]]] = []
        tops = maxes[rest : rest + len(LAYER_MAXES) * layers].reshape(layers, len(LAYER_MAXES)).tolist()
        rows = sums[first : first + len(LAYER_SUMS) * layers].reshape(layers, len(LAYER_SUMS)).tolist()
        differing = []
        for (name, facts), row, (rate, most, least) in zip(layout.layers.items(), rows, tops, strict=True):
            values = dict(zip(LAYER_SUMS, row, strict=True))
            place = places.inputs.get(name)
            if math.isfinite(most) and most + least > 1e-6 * most:
                differing.append(name)
            if values["n"]:
                weights.append(_weight(facts, values, None if place is None else sums[place].reshape(3, -1), rate))
        rest += len(LAYER_MAXES) * layers
        step, negated, interval, changed, skipped = maxes[rest : rest + len(ENDS)].tolist()
        if not round_.failed:
            self._told[round_.step] = changed > 0, round(interval)
            if step != -negated:
                self._lost(f"they are at other steps ({-negated:.0f} to {step:.0f} in one observation)")
        return Merged(found, weights, skipped > 0, tuple(differing))

    def _window(self, name: str, block: Tensor) -> list[float]:
        """UNITS of the window of a site after what one observation adds; a full window has ended with the observation before."""
        known = self._windows.get(name)
        full = known is None or float(known[0].min()) >= UNIT_SAMPLES
        self._windows[name] = block = block.clone() if known is None or full else known.add_(block)
        summed: list[float] = summarise_units(block, block.device).tolist()
        return summed


_N, _NONFINITE, _ELEMENTS = (SUMS.index(name) for name in ("n", "nonfinite", "elements"))
_SQUARES = [SUMS.index("grad_a_sq"), SUMS.index("grad_z_sq")]


def _encode(sites: Mapping[str, SitePart], layers: Mapping[str, LayerPart]) -> bytes:
    told = {"sites": {name: part.facts for name, part in sites.items()}, "layers": {name: part.facts for name, part in layers.items()}}
    return json.dumps(told, separators=(",", ":")).encode()


def _take(known: dict[str, dict[str, Any]], name: str, facts: dict[str, Any]) -> None:
    """Add a site or layer of another rank: it comes after, and feeds, what it does on any; where ranks disagree about its units, it has none."""
    have = known.setdefault(name, facts)
    for names in ("after", "feeds"):
        if names in have and have[names] != facts[names]:
            known[name] = have = {**have, names: [*have[names], *(each for each in facts[names] if each not in have[names])]}
    for size in ("units", "heads", "features"):
        if size in have and have[size] != facts[size]:
            known[name] = have = {**have, size: 0 if size == "features" else None}


def _join_stages(sites: dict[str, dict[str, Any]]) -> None:
    """What begins in a stage of a pipeline comes after what leaves the stage before."""
    leaving: dict[int, list[str]] = {}
    for name, facts in sites.items():
        if facts.get("leaves"):
            leaving.setdefault(facts["stage"], []).append(name)
    for facts in sites.values():
        if facts.get("stage") and not facts["after"]:
            facts["after"] = leaving.get(facts["stage"] - 1, [])


def _put(values: Tensor | None, into: Tensor, place: slice | None, rows: int, first: int) -> None:
    """Write [rows, some] to its place in a vector, which is [rows, all], from column `first` on."""
    if values is None or place is None:
        return
    whole = into[place].view(rows, -1)
    if first + values.shape[1] <= whole.shape[1]:
        whole[:, first : first + values.shape[1]] = values


def _numbers(values: list[float], device: torch.device) -> Tensor:
    """Numbers of the host on a device, which is not waited for."""
    return torch.tensor(values, dtype=accumulator(device)).to(device, non_blocking=True)


def _worst(table: Tensor, rank: int) -> Tensor:
    """WORST of each row: the share in the tails, and the count of what is not finite, each with this rank behind it."""
    n, low, high, bad, bad_grad = (table[:, SUMS.index(name)] for name in ("n", "low", "high", "nonfinite", "grad_nonfinite"))
    share = (low + high) / n.clamp(min=1)
    code = torch.stack([(share * _FINE).round(), (bad + bad_grad).clamp(max=_FINE)], 1) * _FINE + (_FINE - 1 - rank)
    return torch.where(torch.stack([n > 0, bad + bad_grad > 0], 1), code, torch.full_like(code, -math.inf))


def _decode(codes: list[float]) -> dict[str, Any]:
    """The fields that ranks add to a record."""

    def split(code: float) -> tuple[float | None, int | None]:
        return (None, None) if code < 0 else (code // _FINE / _FINE, round(_FINE - 1 - code % _FINE))

    (share, rank), (_, nonfinite_rank) = map(split, codes)
    return {"worst": share, "worst_rank": rank, "nonfinite_rank": nonfinite_rank}


def _layer_sums(parts: list[LayerPart | None], device: torch.device) -> Tensor:
    """[layers, LAYER_SUMS] but the last two, of this rank's parts of weights: the sample of a part stands for all of it."""
    zeros = torch.zeros(len(LAYER_COLUMNS), dtype=accumulator(device), device=device)
    numbers = torch.stack([zeros if part is None or part.numbers is None else part.numbers.to(device) for part in parts])
    n, numel = (_numbers([0 if part is None else getattr(part, size) for part in parts], device) for size in ("n", "numel"))
    weight, change, grad = (numbers[:, LAYER_COLUMNS.index(name)] for name in ("weight_sq", "change_sq", "grad_sq"))
    scale, nothing = numel / n.clamp(min=1), torch.zeros_like(n)
    columns = [weight * scale]
    for each in (change, grad):
        known = torch.isfinite(each)
        columns += [torch.where(known, each * scale, nothing), torch.where(known, numel, nothing)]
    return torch.stack([*columns, n, numel], 1)


def _input_sums(parts: list[LayerPart | None], device: torch.device) -> Tensor:
    """[layers, 2]: of each input the elements that were read, and all that there were."""
    nothing = torch.zeros((), dtype=accumulator(device), device=device)
    read = torch.stack([nothing if part is None or part.inputs is None else part.inputs[0].sum().to(device) for part in parts])
    return torch.stack([read, _numbers([0 if part is None else part.input_elements for part in parts], device)], 1)


def _layer_maxes(parts: list[LayerPart | None], device: torch.device) -> Tensor:
    """[layers, LAYER_MAXES]."""
    nothing = torch.full((), -math.inf, dtype=accumulator(device), device=device)
    squares = [nothing if part is None or part.numbers is None or part.sharded else part.numbers[0].to(device) for part in parts]
    square = torch.stack(squares)
    rates = _numbers([-math.inf if part is None or part.rate is None else part.rate for part in parts], device)
    return torch.stack([rates, square, torch.where(torch.isfinite(square), -square, nothing)], 1)


def _weight(facts: dict[str, Any], values: dict[str, float], inputs: Tensor | None, rate: float) -> tuple[dict[str, Any], list[float]]:
    """Facts and COLUMNS as `to_weight` wants them."""
    n, numel = values["n"], values["numel"]
    per = n / numel
    change = values["change_sq"] * per if values["change_n"] else math.nan
    grad = values["grad_sq"] * per if values["grad_n"] else math.nan
    summed = [math.nan] * 3
    if inputs is not None and values["input_elements"]:
        summed = summarise_features(inputs * (values["input_n"] / values["input_elements"])).tolist()
    given = {key: tuple(facts[key]) if key == "feeds" else facts[key] for key in WEIGHT_FACTS}
    rates = {"n": round(n), "numel": round(numel), "learning_rate": rate if math.isfinite(rate) else None}
    return {**given, **rates}, [values["weight_sq"] * per, change, grad, *summed]


def _follow(works: list[Any], vectors: list[Tensor], own: list[Tensor]) -> tuple[list[Tensor], list[Tensor], torch.cuda.Event]:
    """Copies on the host, made by a stream that waits for the collectives so that the user's does not."""
    stream: Any = torch.cuda.Stream(vectors[0].device)
    stream.wait_stream(torch.cuda.current_stream(vectors[0].device))
    event = torch.cuda.Event()
    with torch.cuda.stream(stream):
        mine = [_pinned(each) for each in own]
        for work in works:
            work.wait()
        theirs = [_pinned(each) for each in vectors]
        for each in (*vectors, *own):
            each.record_stream(stream)
        event.record(stream)
    return theirs, mine, event


def _pinned(vector: Tensor) -> Tensor:
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    host.copy_(vector, non_blocking=True)
    return host


def averaged_over(model: nn.Module | None, weights: Iterable[Tensor]) -> float:
    """What data parallelism divides the gradients of a model by; 1 where it has none, or is told to divide by nothing.

    `weights` are those that tensor parallelism does not spread: if they are spread all the same, FSDP2 does it, maybe from above the model.
    """
    modules = list(model.modules()) if model is not None else []
    for module in modules:
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            mesh = getattr(group, "mesh_info", None)
            if mesh is not None:
                told = getattr(group, "gradient_divide_factor", None)
                return float(told or int(getattr(mesh, "shard_mesh_size", 1)) * int(getattr(mesh, "replicate_mesh_size", 1)))
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return float(dist.get_world_size(module.process_group))
    return float(next((weight.device_mesh.size() for weight in weights if isinstance(weight, DTensor)), 1))


def default_group() -> dist.ProcessGroup | None:
    """The group of all ranks, if there are several."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return dist.group.WORLD
