"""The server side of the Saturation tab: it answers with runs as JSON and as little-endian arrays, and with the files of the page. Never torch.

The data are asked from TensorBoard's data provider only, so that both of its data servers and remote directories work. Each argument of a query must
be one of the names that exist, and no argument becomes part of a path. An answer holds at most MOST_CELLS numbers; if there are more, observations
are left out at even distances.

    runs                          the runs that hold our data: [{name, time, sites, place, verdict}]
    scales                        how numbers are drawn and printed (view.scales)
    run?run=                      sites, layers and alerts of a run
    values?run=&metric=           one metric, steps x sites             site?run=&site=    one site, steps x metrics
    histogram?run=&site=          steps x bins of |f'| / peak           heads?run=&site=   steps x entropies of heads
    experts?run=                  the mixtures of experts               routing?run=       steps x what is known of each (view.routing)
    ledger?run=                         the entries of the ledger       ledger_values?run=&metric=   one number of each, steps x entries
    scalars?run=                  the user's own scalars beside a run: {tags, loss, rate}, of which two are guessed by their names
    scalar?run=&tag=              one of them, steps x 1
    docs/<page>?theme=            a page of the documentation (pages.py)
"""

from __future__ import annotations

import json
import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.data.provider import RunTagFilter
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from torchsat.alerts import episodes
from torchsat.grids import Grid, Table, join, not_void
from torchsat.ledger import ENTRY_METRICS
from torchsat.metrics import rows_of
from torchsat.record import Alert, Nearest, Snapshot
from torchsat.tensorboard import (
    EVENTS,
    EXPERTS,
    HEADS,
    HISTOGRAM,
    JUDGEMENT,
    LEDGER,
    PLUGIN,
    READABLE,
    RECORDS,
    SCRIPTS,
    SUBRUN,
    WEIGHTS,
    WHOLE,
    pages,
)
from torchsat.tensorboard.reader import experts_of, judgement_of
from torchsat.tensorboard.scalars import UserScalars
from torchsat.verdict import Verdict, verdict_of
from torchsat.view import Series, mixtures, routing, scales, series

STATIC = Path(__file__).parent / "static"
PAGES = {**dict.fromkeys(("index.js", *SCRIPTS), "text/javascript"), **dict.fromkeys(("style.css", "docs.css"), "text/css")}
"""The files of the folder `static` that are served, with their content types."""

MOST_OBSERVATIONS = 100_000
"""How many observations TensorBoard is asked for. It has at most as many as --samples_per_plugin says."""
MOST_CELLS = 4_000_000
"""The most numbers of one answer."""
MOST_STEPS = 200
"""The most observations of which the steps are read for the verdict on a run that is not shown."""
MOST_HISTOGRAMS = 200
"""The most observations of one histogram. They are few, since TensorBoard must load the histograms of all sites to answer for one."""
KEPT_BYTES = 512 * 2**20
"""How many bytes of runs are kept between queries."""


class QueryError(ValueError):
    """A query that cannot be answered. The message is sent to the client."""


class SaturationPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Answers the queries of the tab."""

    plugin_name = PLUGIN

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._kept: OrderedDict[tuple[str, str], tuple[Any, Series]] = OrderedDict()
        self._verdicts: dict[tuple[str, str], tuple[Any, Verdict]] = {}
        self._reading = threading.Lock()

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """The functions that answer, by path."""
        links = pages.links()
        answers = {
            "/runs": self._runs,
            "/scales": lambda query: scales() | {"links": links},
            "/run": lambda query: query.series().describe(),
            "/values": lambda query: query.series().grid(query.metric()),
            "/site": lambda query: query.series().site(query.site()),
            "/histogram": lambda query: query.tensor(HISTOGRAM, query.site()),
            "/heads": lambda query: query.tensor(HEADS, query.site()),
            "/ledger": lambda query: query.ledger(),
            "/ledger_values": lambda query: query.ledger_values(),
            "/experts": lambda query: mixtures(query.routed()),
            "/routing": lambda query: routing(query.routed()),
            "/scalars": lambda query: query.scalars().describe(),
            "/scalar": lambda query: query.scalars().grid(query.tag()),
        }
        apps: dict[str, Callable[..., Any]] = {path: self._app(answer) for path, answer in answers.items()}
        apps |= {f"/{name}": _file(STATIC / name, kind) for name, kind in PAGES.items()}
        return apps | {
            f"/docs/{name}": _file(path, "image/png") if name in pages.PICTURES else _explanation(name) for name, path in pages.files().items()
        }

    def is_active(self) -> bool:
        """Always False: TensorBoard shows the tab by itself as soon as it finds data of this plugin."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Saturation")

    def _app(self, answer: Callable[[Query], Any]) -> Callable[..., Any]:
        """The web application that sends one kind of answer: a grid as bytes, anything else as JSON."""

        @wrappers.Request.application
        def app(request: wrappers.Request) -> Any:
            try:
                found = answer(Query(self, request))
            except QueryError as error:
                return http_util.Respond(request, str(error), "text/plain", code=400)
            if isinstance(found, Grid):
                thinned = found.thin(max(2, MOST_CELLS // max(1, len(found.names))))
                return http_util.Respond(request, thinned.pack(), "application/octet-stream")
            return http_util.Respond(request, json.dumps(found, allow_nan=False), "application/json")

        return app

    def _runs(self, query: Query) -> list[dict[str, Any]]:
        found, places = [], query.places()
        for run, tags in query.tags().items():
            tables = [(each.max_wall_time, known) for tag, each in tags.items() if _kind(tag) == RECORDS and (known := _known(each)) is not None]
            if tables:
                time, newest = max(tables, key=operator.itemgetter(0))
                what = {**_what_is_where(tags, WEIGHTS, "layers"), **_what_is_where(tags, RECORDS, "sites")}
                verdict = query.verdict(run, tags, what).as_dict()
                found.append({"name": run, "time": time, "sites": len(newest["sites"]), "place": places.get(run, 0), "verdict": verdict})
        return sorted(found, key=lambda each: str(each["name"]))


class Query:
    """One request: its arguments, checked against what exists, and TensorBoard's data for them."""

    def __init__(self, plugin: SaturationPlugin, request: wrappers.Request) -> None:
        self._plugin, self._arguments = plugin, request.args
        self._context = plugin_util.context(request.environ)
        self._experiment = plugin_util.experiment_id(request.environ)
        self._series: Series | None = None

    def tags(self, run: str | None = None) -> Mapping[str, Mapping[str, Any]]:
        """Our tags with their metadata, by run: of one run, or of all."""
        wanted = None if run is None else RunTagFilter(runs=[run])
        found: Mapping[str, Mapping[str, Any]] = self._plugin._provider.list_tensors(
            self._context, experiment_id=self._experiment, plugin_name=PLUGIN, run_tag_filter=wanted
        )
        return found

    def _argument(self, name: str, allowed: Sequence[str], plural: str) -> str:
        """One argument of the query. Raises QueryError if it is missing or not allowed."""
        value = self._arguments.get(name)
        if value is None:
            raise QueryError(f"the argument {name!r} is missing")
        if value not in allowed:
            some = ", ".join(map(repr, allowed[:20])) + (" ..." if len(allowed) > 20 else "")
            raise QueryError(f"{name}={value[:200]!r} is not known; the {plural} are {some or 'none'}")
        return value

    def run(self) -> str:
        return self._argument("run", sorted(self.tags()), "runs")

    def metric(self) -> str:
        return self._argument("metric", list(self.series().values), "metrics")

    def site(self) -> str:
        return self._argument("site", self.series().names, "sites")

    def series(self) -> Series:
        """The whole run. It is read again only if TensorBoard has something newer.

        A page sends many queries at once. The first of them reads the run, under a lock, and the others wait for it.
        """
        if self._series is None:
            run, plugin = self.run(), self._plugin
            tags, key = self.tags(run).get(run, {}), (self._experiment, run)
            state = _state(tags)
            with plugin._reading:
                known, kept = plugin._kept.pop(key, (None, None))
                self._series = kept if kept is not None and known == state else self._read(run, tags)
                plugin._kept[key] = state, self._series
                while len(plugin._kept) > 1 and sum(_size(each) for _, each in plugin._kept.values()) > KEPT_BYTES:
                    plugin._kept.popitem(last=False)
        return self._series

    def _read(self, run: str, tags: Mapping[str, Any]) -> Series:
        """The whole run, from all of its tags."""
        tables: dict[str, list[tuple[Table, list[dict[str, Any]]]]] = {RECORDS: [], WEIGHTS: []}
        kinds: tuple[tuple[str, Literal["records", "weights"], str], ...] = ((RECORDS, "records", "sites"), (WEIGHTS, "weights", "layers"))
        for kind, over, columns in kinds:
            for known, data in self._data(run, tags, kind, MOST_OBSERVATIONS):
                facts = [dict(zip(known["facts"], each, strict=True)) for each in known[columns]]
                tables[kind].append((_table([each[known["facts"][0]] for each in facts], data, known["metrics"], rows_of(over)), facts))
        found = series(run, tables[RECORDS], tables[WEIGHTS])
        return found.told(self._alerts(run, tags, found.grid("saturated")), *self._judgement(run, tags))

    def _judgement(self, run: str, tags: Mapping[str, Any]) -> tuple[bool, Nearest | None]:
        """`judged` and `nearest` of the last observation of a run."""
        data = self._tensors(run, [JUDGEMENT], MOST_OBSERVATIONS)[JUDGEMENT] if JUDGEMENT in tags else []
        last = max(data, key=lambda each: each.wall_time, default=None)
        return (True, None) if last is None else judgement_of(last.numpy.item(0))

    def _alerts(self, run: str, tags: Mapping[str, Any], observed: Grid) -> list[Alert]:
        """The events of a run, without those that a later session has made void."""
        if EVENTS not in tags:
            return []
        data = sorted(self._tensors(run, [EVENTS], MOST_OBSERVATIONS)[EVENTS], key=lambda each: each.wall_time)
        kept = not_void([datum.step for datum in data], [datum.wall_time for datum in data], observed)
        return [Alert.from_dict(each) for datum, valid in zip(data, kept, strict=True) if valid for each in json.loads(datum.numpy.item(0))]

    def places(self) -> dict[str, int]:
        """The place of each run, ours or not, in TensorBoard's own list, which is in the order in which the runs began. It decides on the colour."""
        found = self._plugin._provider.list_runs(self._context, experiment_id=self._experiment)
        ordered = sorted(found, key=lambda run: (math.inf if run.start_time is None else run.start_time, run.run_name))
        return {run.run_name: place for place, run in enumerate(ordered)}

    def verdict(self, run: str, tags: Mapping[str, Any], activations: Mapping[str, str]) -> Verdict:
        """The verdict on a run with these sites and layers, by name. Where the whole run has not been read, it is made of the alerts and of the
        steps alone, which are little to read."""
        plugin, key, state = self._plugin, (self._experiment, run), _state(tags)
        known, kept = plugin._kept.get(key, (None, None))
        if kept is not None and known == state:
            return kept.verdict
        known, verdict = plugin._verdicts.get(key, (None, None))
        if verdict is None or known != state:
            whole = [tag for tag in tags if _kind(tag) == WHOLE]
            times = [(datum.step, datum.wall_time) for data in self._tensors(run, whole, MOST_STEPS).values() for datum in data] if whole else []
            steps = np.array(sorted(times) or [(math.inf, 0.0)], np.float64)
            observed = Grid(steps[:, 0], steps[:, 1], (), np.zeros((len(steps), 0), np.float32))
            found = episodes(sorted(self._alerts(run, tags, observed), key=lambda alert: alert.step), {}, 0)
            verdict = verdict_of(found, activations, *self._judgement(run, tags))
            plugin._verdicts[key] = state, verdict
        return verdict

    def scalars(self) -> UserScalars:
        """The scalars that the user has written for a run."""
        run = self.run()
        parent = run[: -len(SUBRUN) - 1] or "." if run.endswith(f"/{SUBRUN}") else "." if run == SUBRUN else run
        return UserScalars(self._plugin._provider, self._context, self._experiment, parent)

    def tag(self) -> str:
        return self._argument("tag", self.scalars().tags, "tags")

    def tensor(self, kind: str, site: str) -> Grid:
        """The part of a packed tensor that belongs to one site, over time: bins of its histogram, or entropies of its heads."""
        run, tables = self.run(), []
        for known, data in self._data(run, self.tags(run).get(run, {}), kind, MOST_HISTOGRAMS):
            if kind == HISTOGRAM:
                rows = [known["sites"].index(site)] if site in known["sites"] else []
                parts = [datum.numpy[rows[0]] for datum in data] if rows else []
            else:
                owners = [name for name, count in known["sites"] for _ in range(count)]
                own = [index for index, name in enumerate(owners) if name == site]
                entropy = known["metrics"].index("entropy")
                parts = [datum.numpy[entropy, own] for datum in data] if own else []
            if parts:
                names = tuple(map(str, range(len(parts[0]))))
                steps, times = [datum.step for datum in data], [datum.wall_time for datum in data]
                tables.append(Table(names, steps, times, np.stack(parts)[:, None].astype(np.float32)))
        names, at_steps, at_times, values = join(tables, 1)
        valid = not_void(at_steps.tolist(), at_times.tolist(), self.series().grid("saturated"))
        return Grid(at_steps[valid], at_times[valid], names, values[valid, 0])

    def ledger(self) -> list[dict[str, Any]]:
        """The facts of the entries of the newest ledger of a run."""
        run = self.run()
        tags = self.tags(run).get(run, {})
        found = [(each.max_wall_time, known) for tag, each in tags.items() if _kind(tag) == LEDGER and (known := _known(each)) is not None]
        newest = max(found, key=operator.itemgetter(0), default=(0.0, None))[1]
        return [] if newest is None else [dict(zip(newest["facts"], each, strict=True)) for each in newest["entries"]]

    def ledger_values(self) -> Grid:
        """One number of each entry of the ledger, over time."""
        run, metric = self.run(), self._argument("metric", ENTRY_METRICS, "metrics")
        data = self._data(run, self.tags(run).get(run, {}), LEDGER, MOST_HISTOGRAMS)
        tables = [_table([each[0] for each in known["entries"]], found, known["metrics"], [metric]) for known, found in data]
        names, steps, times, values = join(tables, 1)
        valid = not_void(steps.tolist(), times.tolist(), self.series().grid("saturated"))
        return Grid(steps[valid], times[valid], names, values[valid, 0])

    def routed(self) -> list[Snapshot]:
        """The mixtures of experts of a run over time, as snapshots that have nothing else."""
        run = self.run()
        if EXPERTS not in self.tags(run).get(run, {}):
            return []
        data = sorted(self._tensors(run, [EXPERTS], MOST_HISTOGRAMS)[EXPERTS], key=lambda each: each.wall_time)
        kept = not_void([datum.step for datum in data], [datum.wall_time for datum in data], self.series().grid("saturated"))
        return [
            Snapshot(datum.step, datum.wall_time, (), experts=experts_of(datum.numpy.item(0)))
            for datum, valid in zip(data, kept, strict=True)
            if valid
        ]

    def _data(self, run: str, tags: Mapping[str, Any], kind: str, most: int) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """For each tag of one kind, the content of its metadata and its data."""
        wanted = {tag: known for tag, each in tags.items() if _kind(tag) == kind and (known := _known(each)) is not None}
        if wanted:
            found = self._tensors(run, list(wanted), most)
            yield from ((wanted[tag], found[tag]) for tag in wanted if found.get(tag))

    def _tensors(self, run: str, tags: list[str], most: int) -> Mapping[str, list[Any]]:
        """The data of each tag, at most `most` observations."""
        wanted = RunTagFilter(runs=[run], tags=tags)
        found = self._plugin._provider.read_tensors(
            self._context, experiment_id=self._experiment, plugin_name=PLUGIN, downsample=most, run_tag_filter=wanted
        )
        tensors: Mapping[str, list[Any]] = found.get(run, {})
        return {tag: list(tensors.get(tag, ())) for tag in tags}


def _state(tags: Mapping[str, Any]) -> tuple[Any, ...]:
    """What changes when a run has something newer."""
    return tuple(sorted((tag, each.max_step, each.max_wall_time) for tag, each in tags.items()))


def _size(run: Series) -> int:
    """Bytes of a run's numbers."""
    return sum(values.nbytes for values in run.values.values())


def _kind(tag: str) -> str:
    """The tag without its hash."""
    return tag.partition(".")[0]


def _known(tensor: Any) -> dict[str, Any] | None:
    """The content of a tag's metadata; None if another version of torchsat wrote it."""
    try:
        content = json.loads(tensor.plugin_content)
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("v") in READABLE else None


def _what_is_where(tags: Mapping[str, Any], kind: str, columns: str) -> dict[str, str]:
    """The activation of each site, or what each layer is, by name, from the metadata of the tags of one kind."""
    found = [known for tag, each in tags.items() if _kind(tag) == kind and (known := _known(each)) is not None]
    facts = [dict(zip(known["facts"], each, strict=True)) for known in found for each in known[columns]]
    return {fact["site"]: fact["activation"] for fact in facts} if kind == RECORDS else {fact["name"]: fact.get("layer") or "" for fact in facts}


def _table(names: Sequence[str], data: Sequence[Any], metrics: Sequence[str], wanted: Sequence[str]) -> Table:
    """A table of the wanted metrics of packed tensors [metrics, names]. A metric that an older file does not have is NaN."""
    values = np.full((len(data), len(wanted), len(names)), np.nan, np.float32)
    there = [(at, metrics.index(name)) for at, name in enumerate(wanted) if name in metrics]
    into, rows = [at for at, _ in there], [row for _, row in there]
    with np.errstate(over="ignore"):  # The page gets float32, in which a number beyond its range is infinite.
        for observation, datum in enumerate(data):
            values[observation, into] = datum.numpy.reshape(len(metrics), len(names))[rows]
    return Table(tuple(names), [datum.step for datum in data], [datum.wall_time for datum in data], values)


def _file(path: Path, kind: str) -> Callable[..., Any]:
    """The web application that sends one file."""

    @wrappers.Request.application
    def app(request: wrappers.Request) -> Any:
        return http_util.Respond(request, path.read_bytes(), kind)

    return app


def _explanation(name: str) -> Callable[..., Any]:
    """The web application that sends one page of the documentation."""

    @wrappers.Request.application
    def app(request: wrappers.Request) -> Any:
        return http_util.Respond(request, pages.page(name, request.args.get("theme", "")), "text/html")

    return app
