"""The Saturation tab, server side: runs as JSON and little-endian arrays, and the page itself. Never torch.

Only TensorBoard's data provider is used, so that both of its data servers and remote directories work. What a query may ask is checked against what
there is; nothing of it reaches a path. An answer holds at most MOST_CELLS numbers: beyond that, observations are left out evenly.

    runs                          the runs that hold our data: [{name, time, sites}]
    scales                        metrics, ranges and colours
    run?run=                      sites, layers, alerts of a run
    values?run=&metric=           one metric, steps x sites             site?run=&site=    one site, steps x metrics
    histogram?run=&site=          steps x bins of |f'| / peak           heads?run=&site=   steps x entropies of heads
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.data.provider import RunTagFilter
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from torchsat.record import Alert
from torchsat.tensorboard import EVENTS, FORMAT, HEADS, HISTOGRAM, PLUGIN, RECORDS, WEIGHTS
from torchsat.view import Grid, Series, Table, join, not_void, rows_of, scales, series

STATIC = Path(__file__).parent / "static"
PAGES = {
    **dict.fromkeys(("index.js", "app.js", "charts.js", "heatmap.js", "source.js"), "text/javascript"),
    "style.css": "text/css",
}
"""All that is served of the folder `static`, and as what."""

MOST_OBSERVATIONS = 100_000
"""Asked of TensorBoard, which has at most what --samples_per_plugin kept."""
MOST_CELLS = 4_000_000
MOST_HISTOGRAMS = 200
"""Observations of a histogram, of which TensorBoard must send those of all sites."""
KEPT_BYTES = 512 * 2**20
"""How much is kept of runs between queries, as long as TensorBoard has nothing newer."""


class QueryError(ValueError):
    """A query that cannot be answered; the message goes to whoever asked."""


class SaturationPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Answers the tab's queries."""

    plugin_name = PLUGIN

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._kept: OrderedDict[tuple[str, str], tuple[Any, Series]] = OrderedDict()
        self._reading = threading.Lock()

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        answers = {
            "/runs": self._runs,
            "/scales": lambda query: scales(),
            "/run": lambda query: query.series().describe(),
            "/values": lambda query: query.series().grid(query.metric()),
            "/site": lambda query: query.series().site(query.site()),
            "/histogram": lambda query: query.tensor(HISTOGRAM, query.site()),
            "/heads": lambda query: query.tensor(HEADS, query.site()),
        }
        apps: dict[str, Callable[..., Any]] = {path: self._app(answer) for path, answer in answers.items()}
        return apps | {f"/{name}": _page(name, kind) for name, kind in PAGES.items()}

    def is_active(self) -> bool:
        """False: the tab appears as soon as TensorBoard itself finds data of this plugin."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Saturation")

    def _app(self, answer: Callable[[Query], Any]) -> Callable[..., Any]:
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
        found = []
        for run, tags in query.tags().items():
            records = [each for tag, each in tags.items() if _kind(tag) == RECORDS and _known(each) is not None]
            if records:
                newest = max(records, key=lambda each: each.max_wall_time)
                found.append({"name": run, "time": newest.max_wall_time, "sites": len((_known(newest) or {})["sites"])})
        return sorted(found, key=lambda each: str(each["name"]))


class Query:
    """One request: its arguments, checked, and TensorBoard's data for them."""

    def __init__(self, plugin: SaturationPlugin, request: wrappers.Request) -> None:
        self._plugin, self._arguments = plugin, request.args
        self._context = plugin_util.context(request.environ)
        self._experiment = plugin_util.experiment_id(request.environ)
        self._series: Series | None = None

    def tags(self, run: str | None = None) -> Mapping[str, Mapping[str, Any]]:
        wanted = None if run is None else RunTagFilter(runs=[run])
        found: Mapping[str, Mapping[str, Any]] = self._plugin._provider.list_tensors(
            self._context, experiment_id=self._experiment, plugin_name=PLUGIN, run_tag_filter=wanted
        )
        return found

    def _argument(self, name: str, allowed: Sequence[str], plural: str) -> str:
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
        """The whole run, read again only where TensorBoard has something newer. A page asks much at once: one query reads, the others wait."""
        if self._series is None:
            run, plugin = self.run(), self._plugin
            tags, key = self.tags(run).get(run, {}), (self._experiment, run)
            state = tuple(sorted((tag, each.max_step, each.max_wall_time) for tag, each in tags.items()))
            with plugin._reading:
                known, kept = plugin._kept.pop(key, (None, None))
                self._series = kept if kept is not None and known == state else self._read(run, tags)
                plugin._kept[key] = state, self._series
                while len(plugin._kept) > 1 and sum(_size(each) for _, each in plugin._kept.values()) > KEPT_BYTES:
                    plugin._kept.popitem(last=False)
        return self._series

    def _read(self, run: str, tags: Mapping[str, Any]) -> Series:
        tables: dict[str, list[tuple[Table, list[dict[str, Any]]]]] = {RECORDS: [], WEIGHTS: []}
        for kind, over, columns in ((RECORDS, "records", "sites"), (WEIGHTS, "weights", "layers")):
            for known, data in self._data(run, tags, kind, MOST_OBSERVATIONS):
                rows = [known["metrics"].index(name) for name in rows_of(over)]  # type: ignore[arg-type]
                facts = [dict(zip(known["facts"], each, strict=True)) for each in known[columns]]
                tables[kind].append((_table([each[known["facts"][0]] for each in facts], data, len(known["metrics"]), rows), facts))
        found = series(run, tables[RECORDS], tables[WEIGHTS])
        return found.told(self._alerts(run, tags, found.grid("saturated")))

    def _alerts(self, run: str, tags: Mapping[str, Any], observed: Grid) -> list[Alert]:
        """Those of sessions that no later one made void."""
        if EVENTS not in tags:
            return []
        data = sorted(self._tensors(run, [EVENTS], MOST_OBSERVATIONS)[EVENTS], key=lambda each: each.wall_time)
        kept = not_void([datum.step for datum in data], [datum.wall_time for datum in data], observed)
        return [Alert.from_dict(each) for datum, valid in zip(data, kept, strict=True) if valid for each in json.loads(datum.numpy.item(0))]

    def tensor(self, kind: str, site: str) -> Grid:
        """The part of a packed tensor that belongs to one site, over time."""
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

    def _data(self, run: str, tags: Mapping[str, Any], kind: str, most: int) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """Of each tag of a kind its content and its data."""
        wanted = {tag: known for tag, each in tags.items() if _kind(tag) == kind and (known := _known(each)) is not None}
        if wanted:
            found = self._tensors(run, list(wanted), most)
            yield from ((wanted[tag], found[tag]) for tag in wanted if found.get(tag))

    def _tensors(self, run: str, tags: list[str], most: int) -> Mapping[str, list[Any]]:
        wanted = RunTagFilter(runs=[run], tags=tags)
        found = self._plugin._provider.read_tensors(
            self._context, experiment_id=self._experiment, plugin_name=PLUGIN, downsample=most, run_tag_filter=wanted
        )
        tensors: Mapping[str, list[Any]] = found.get(run, {})
        return {tag: list(tensors.get(tag, ())) for tag in tags}


def _size(run: Series) -> int:
    return sum(values.nbytes for values in run.values.values())


def _kind(tag: str) -> str:
    return tag.partition(".")[0]


def _known(tensor: Any) -> dict[str, Any] | None:
    """The content of a tag's metadata; None for what another version of torchsat wrote."""
    try:
        content = json.loads(tensor.plugin_content)
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("v") == FORMAT else None


def _table(names: Sequence[str], data: Sequence[Any], rows: int, wanted: Sequence[int]) -> Table:
    values = [datum.numpy.reshape(rows, len(names))[wanted] for datum in data]
    return Table(tuple(names), [datum.step for datum in data], [datum.wall_time for datum in data], np.stack(values).astype(np.float32))


def _page(name: str, kind: str) -> Callable[..., Any]:
    @wrappers.Request.application
    def app(request: wrappers.Request) -> Any:
        return http_util.Respond(request, (STATIC / name).read_bytes(), kind)

    return app
