"""Writes snapshots for TensorBoard: one Summary per observation, on a thread of its own. Never torch.

The training thread only puts a snapshot into a queue. To build the summary takes milliseconds, pictures and checksums take more; meanwhile torch's
kernels, which release Python's lock, go on.

Scalars are written as the older `simple_value`, with metadata of class SCALAR. Every reader (TensorBoard's two servers, W&B, MLflow) understands
them, and TensorBoard shows their descriptions. If the process dies, what is lost is at most the content of two queues: ours and the one of
TensorBoard's event writer.
"""

from __future__ import annotations

import math
import operator
import os
import queue
import threading
from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_STRING
from tensorboard.summary.writer import event_file_writer

from torchsat.alerts import Firing
from torchsat.ledger import ENTRY_FACTS, ENTRY_METRICS
from torchsat.number_formats import USE_FACTS, USE_METRICS
from torchsat.record import HEAD_METRICS, HISTOGRAM_BINS, RECORD_METRICS, SITE_FACTS, WEIGHT_FACTS, WEIGHT_METRICS, Alert, Record, Snapshot, to_float
from torchsat.tensorboard import (
    EVENTS,
    EXPERTS,
    FORMATS,
    HEADS,
    HISTOGRAM,
    JUDGEMENT,
    LEDGER,
    PLUGIN,
    RECORDS,
    SUBRUN,
    WEIGHTS,
    WHOLE,
    as_json,
    content,
    tag,
)
from torchsat.tensorboard.heatmap import Heatmap
from torchsat.tensorboard.stock import NETWORK, SITES, Group, alert_table, layout, levels_of, network
from torchsat.verdict import what_is_where

QUEUED = 10
"""How many snapshots may wait to be written. If there are more, training waits."""
PICTURES = 64
"""A heatmap and a layout are written after 8, 16, 32 and 64 observations, then after every 64 more, and at the end."""


class TensorBoardWriter:
    """A sink that writes event files: into `<log_dir>/torchsat`, or through a `torch.utils.tensorboard.SummaryWriter` of the user's.

    Raises:
        TypeError: `writer` is not a SummaryWriter.
        ValueError: both a directory and a writer are given.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None, writer: Any = None) -> None:
        if writer is not None and log_dir is not None:
            raise ValueError("log_dir and writer are both given; a writer has its own directory. Give one of them.")
        if writer is not None and not hasattr(writer, "_get_file_writer"):
            raise TypeError(
                f"writer is a {type(writer).__name__}; allowed is a torch.utils.tensorboard.SummaryWriter. "
                'Without one, pass a directory: torchsat.watch(model, "runs/exp1").'
            )
        self._theirs = writer
        self._log_dir = None if log_dir is None or writer is not None else os.fspath(log_dir)
        self._ours: event_file_writer.EventFileWriter | None = None
        self._described: set[str] = set()
        self._scalars: dict[str, Summary.Value] = {}
        self._tags: dict[Group, dict[str, str]] = {}
        self._depth: dict[str, int] = {}
        self._contents: dict[str, tuple[Any, str, str]] = {}
        self._firing = Firing()
        self._history: deque[Alert] = deque(maxlen=200)
        self._places: dict[str, str] = {}
        """What each site and layer is that has been seen, for the text of the alerts."""
        self._heatmap = Heatmap()
        self._layout = b""
        self._count = self._drawn = 0
        self._queue: queue.Queue[Snapshot | None] = queue.Queue(QUEUED)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def open(self) -> None:
        """Begin the event file. The first snapshot does so too, so that a rank which writes nothing makes no file."""
        if self._ours is None and self._log_dir is not None:
            # The class is looked up in its module only now, since W&B's sync_tensorboard puts a class of its own there.
            # The event file is opened anew for each write, and by then the program may have changed its working directory.
            folder = self._log_dir if "://" in self._log_dir else os.path.abspath(self._log_dir)
            self._ours = event_file_writer.EventFileWriter(os.path.join(folder, SUBRUN))

    def move(self, folder: str) -> None:
        """Write into a folder below the directory that was given. Without effect once something has been written."""
        if self._ours is None and self._log_dir is not None:
            self._log_dir = os.path.join(self._log_dir, folder)

    def __call__(self, snapshot: Snapshot) -> None:
        """Queue a snapshot. Raises the exception that writing an earlier one has raised."""
        self._raise()
        self.open()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="torchsat-writer", daemon=True)
            self._thread.start()
        self._queue.put(snapshot)

    def flush(self) -> None:
        """Wait until everything that is queued has been written."""
        self._queue.join()
        writer = self._ours if self._theirs is None else self._theirs
        if writer is not None:
            writer.flush()
        self._raise()

    def close(self) -> None:
        """Write what is queued and a last picture, then close our own file. A writer of the user's is only flushed."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._theirs is not None:
            self._theirs.flush()
        elif self._ours is not None:
            self._ours.close()
        self._raise()

    def _raise(self) -> None:
        """Raise the last exception of the writing thread, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        """Runs on the writing thread: writes one snapshot after the other until None is queued.

        After an exception it goes on to empty the queue, so that nobody waits forever.
        """
        while True:
            snapshot = self._queue.get()
            try:
                if snapshot is not None:
                    self._write(snapshot)
                elif self._drawn < self._count:
                    self._add(self._pictures(), *self._heatmap.end)
            except Exception as error:
                self._error = error
            finally:
                self._queue.task_done()
            if snapshot is None:
                return

    def _write(self, snapshot: Snapshot) -> None:
        """Write one snapshot, and a picture if it is due."""
        for event in snapshot.alerts:
            self._history.append(event)
            self._firing.apply(event)
        if self._ours is not None and not self._count:
            self._ours.add_event(Event(wall_time=snapshot.time, step=snapshot.step, session_log=SessionLog(status=SessionLog.START)))
        self._count += 1
        self._places.update(what_is_where(snapshot.records, snapshot.weights))
        self._heatmap.add(snapshot)
        self._add(self._values(snapshot), snapshot.step, snapshot.time)
        if self._count % PICTURES == 0 or (8 <= self._count < PICTURES and self._count & (self._count - 1) == 0):
            self._add(self._pictures(), snapshot.step, snapshot.time)

    def _add(self, values: Iterable[Summary.Value], step: int, time: float) -> None:
        """Write one event."""
        event = Event(wall_time=time, step=step)
        event.summary.value.extend(values)
        if self._theirs is not None:
            # MLflow's autolog replaces a method of the file writer. Called on our thread, its replacement would start a new MLflow run for every
            # event, so the event goes to the event writer below it.
            self._theirs._get_file_writer().event_writer.add_event(event)
        elif self._ours is not None:
            self._ours.add_event(event)

    def _values(self, snapshot: Snapshot) -> Iterable[Summary.Value]:
        """All values of one observation: scalars, packed tensors, and the events of alerts."""
        levels = levels_of(snapshot)
        for name, value in network(snapshot, len(self._firing), levels).items():
            if value is not None:
                yield self._scalar(f"torchsat/{name}", value, NETWORK[name])
        for group in SITES:
            tags = self._tags.setdefault(group, {})
            for record in snapshot.records:
                value = group.value(record, levels)
                if value is not None:
                    yield self._scalar(tags.get(record.site) or self._tag(group, record.site), value, group.says, record)
        sites = tuple(map(_SITE_FACTS, snapshot.records))
        metrics, values = _had(RECORD_METRICS, _floats(map(_RECORD_METRICS, snapshot.records)).T, _SELDOM)
        described, name = self._content(RECORDS, (sites, metrics), facts=SITE_FACTS, metrics=metrics, sites=sites)
        yield self._tensor(name, described, values)
        described, name = self._content(HISTOGRAM, sites, sites=[record.site for record in snapshot.records])
        yield self._tensor(name, described, _floats(record.histogram or _NO_HISTOGRAM for record in snapshot.records))
        attentions = tuple((record.site, len(record.heads)) for record in snapshot.records if record.heads)
        if attentions:
            described, name = self._content(HEADS, attentions, metrics=HEAD_METRICS, sites=attentions)
            heads = [head for record in snapshot.records for head in record.heads or ()]
            yield self._tensor(name, described, _floats(map(_HEAD_METRICS, heads)).T)
        if snapshot.weights:
            layers = tuple(map(_WEIGHT_FACTS, snapshot.weights))
            described, name = self._content(WEIGHTS, layers, facts=WEIGHT_FACTS, metrics=WEIGHT_METRICS, layers=layers)
            yield self._tensor(name, described, _floats(map(_WEIGHT_METRICS, snapshot.weights)).T)
        if snapshot.ledger is not None:
            entries = tuple((each.place, each.kind.value, each.level, each.parent) for each in snapshot.ledger.entries)
            # A plain network has no branches and no norms.
            metrics, values = _had(ENTRY_METRICS, _floats(map(_ENTRY_METRICS, snapshot.ledger.entries)).T, ENTRY_METRICS)
            described, name = self._content(LEDGER, (entries, metrics), facts=ENTRY_FACTS, metrics=metrics, entries=entries)
            yield self._tensor(name, described, values)
        if snapshot.formats:
            uses = tuple(map(_USE_FACTS, snapshot.formats))
            described, name = self._content(FORMATS, uses, facts=USE_FACTS, metrics=USE_METRICS, uses=uses)
            yield self._tensor(name, described, _floats(map(_USE_METRICS, snapshot.formats)).T)
        described, name = self._content(WHOLE, (), metrics=_WHOLE)
        yield self._tensor(name, described, np.array([[to_float(getattr(snapshot, metric))] for metric in _WHOLE]))
        judgement = as_json({"judged": snapshot.judged, "nearest": snapshot.nearest and asdict(snapshot.nearest)})
        yield self._string(JUDGEMENT, judgement.encode(), PLUGIN, content("judgement"))
        if snapshot.experts:
            yield self._string(EXPERTS, as_json([asdict(each) for each in snapshot.experts]).encode(), PLUGIN, content("experts"))
        if snapshot.alerts:
            events = as_json([alert.as_dict() for alert in snapshot.alerts])
            yield self._string(EVENTS, events.encode(), PLUGIN, content("events"))
            yield self._string(
                "torchsat/alerts/text_summary", alert_table(self._history, self._firing, self._places).encode("utf-8", "replace"), "text", ""
            )

    def _pictures(self) -> Iterable[Summary.Value]:
        """The heatmap so far. In a run of our own also the layout of the charts; in the user's run it would replace a layout of the user's."""
        self._drawn = self._count
        png = self._heatmap.png()
        if png is not None:
            image = Summary.Image(height=Heatmap.HEIGHT, width=Heatmap.WIDTH, colorspace=3, encoded_image_string=png)
            yield Summary.Value(tag="torchsat/heatmap", image=image)
        if self._ours is not None:
            tags = [(group, sorted(self._tags[group].values())) for group in SITES]
            worst = self._heatmap.worst()
            # Of a run without rules no site has a health, and the excess is drawn.
            drawn = [self._tags[group] for group in SITES if all(site in self._tags[group] for site in worst)]
            described = layout(tags, [drawn[0][site] for site in worst] if drawn else [])
            if described != self._layout:
                self._layout = described
                yield self._string("custom_scalars__config__", described, "custom_scalars", "")

    def _tag(self, group: Group, site: str) -> str:
        """The tag of one scalar of a site. The number in it is the place at which the site was first seen, so that the tag never changes."""
        depth = self._depth.setdefault(site, len(self._depth))
        made = f"{group.name}/{depth:03d}_{site}"
        self._tags[group][site] = made
        return made

    def _content(self, kind: str, key: Any, **names: Any) -> tuple[str, str]:
        """The content of the metadata of a packed tensor, and its tag. Both are made anew only if the sites or layers (`key`) have changed."""
        if kind not in self._contents or self._contents[kind][0] != key:
            described = content(kind.rpartition("/")[2], **names)
            self._contents[kind] = key, described, tag(kind, described)
        return self._contents[kind][1:]

    def _scalar(self, name: str, value: float, description: str, record: Record | None = None) -> Summary.Value:
        """A scalar. It has a description when it is first written. After that one value object is filled again each time, which costs less than a new
        one."""
        known = self._scalars.get(name)
        if known is not None:
            known.simple_value = value
            return known
        self._scalars[name] = Summary.Value(tag=name, simple_value=value)
        if record is not None:
            description = description.format(site=record.site, activation=record.activation)
        data = SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_SCALAR, summary_description=description)
        return Summary.Value(tag=name, simple_value=value, metadata=metadata)

    def _metadata(self, name: str, plugin: str, described: str) -> SummaryMetadata:
        """The metadata of a value. TensorBoard needs the plugin's name in every value, the content only in the first one of a tag."""
        data = SummaryMetadata.PluginData(plugin_name=plugin)
        if name not in self._described:
            self._described.add(name)
            data.content = described.encode()
        return SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_TENSOR)

    def _tensor(self, name: str, described: str, values: NDArray[np.float64]) -> Summary.Value:
        """A packed tensor. It is a new object each time, since a protocol buffer that is filled again keeps every string that it ever held."""
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in values.shape])
        tensor = TensorProto(dtype=DT_DOUBLE, tensor_shape=shape, tensor_content=values.astype("<f8", copy=False).tobytes())
        return Summary.Value(tag=name, tensor=tensor, metadata=self._metadata(name, PLUGIN, described))

    def _string(self, name: str, text: bytes, plugin: str, described: str) -> Summary.Value:
        """A text for one of TensorBoard's plugins."""
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[text])
        return Summary.Value(tag=name, tensor=tensor, metadata=self._metadata(name, plugin, described))


_WHOLE = ("overhead",)
"""The numbers of a snapshot that belong to no site or layer."""
_NO_HISTOGRAM = (math.nan,) * HISTOGRAM_BINS
_SITE_FACTS, _RECORD_METRICS = operator.attrgetter(*SITE_FACTS), operator.attrgetter(*RECORD_METRICS)
_WEIGHT_FACTS, _WEIGHT_METRICS = operator.attrgetter(*WEIGHT_FACTS), operator.attrgetter(*WEIGHT_METRICS)
_SELDOM = frozenset(
    (
        *("effective_rank", "srank", "rank_limit", "worst", "worst_rank", "nonfinite_rank"),
        *("entropy", "jacobian", "logit_std", "log_keys", "entropy_min", "first_key", "log_z", "log_z_rms"),
    )
)
"""Metrics that only some runs have: those with softmaxes, with several ranks, or of which they were asked for. Elsewhere they take no room."""
_HEAD_METRICS, _ENTRY_METRICS = operator.attrgetter(*HEAD_METRICS), operator.attrgetter(*ENTRY_METRICS)
_USE_FACTS, _USE_METRICS = operator.attrgetter(*USE_FACTS), operator.attrgetter(*USE_METRICS)


def _had(metrics: Sequence[str], values: NDArray[np.float64], seldom: Container[str]) -> tuple[list[str], NDArray[np.float64]]:
    """The metrics of these rows of numbers, and the rows, without those of `seldom` that no place has."""
    had = [at for at, metric in enumerate(metrics) if metric not in seldom or not np.isnan(values[at]).all()]
    return [metrics[at] for at in had], values[had]


def _floats(rows: Iterable[tuple[float | None, ...]]) -> NDArray[np.float64]:
    """Rows of numbers as an array. None becomes NaN."""
    return np.array(list(rows), np.float64)
