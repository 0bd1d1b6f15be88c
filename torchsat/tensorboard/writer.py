"""Snapshots into TensorBoard: one Summary per observation, through a queue of ten. Never torch.

Scalars are old-style `simple_value` with a metadata of class SCALAR: every reader (TensorBoard's two servers, W&B, MLflow) takes them, and
the descriptions are shown. A lost process loses at most the queue.
"""

from __future__ import annotations

import array
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterable
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from torchsat.diagnosis import verdict
from torchsat.record import HEAD_METRICS, HISTOGRAM_BINS, RECORD_METRICS, SITE_FACTS, WEIGHT_FACTS, WEIGHT_METRICS, Alert, Snapshot, to_float
from torchsat.rules import gradient_over_depth
from torchsat.tensorboard import EVENTS, HEADS, HISTOGRAM, PLUGIN, RECORDS, SUBRUN, WEIGHTS, content, tag

NETWORK = {
    "saturated_mean": "Mean over the sites of the share of elements that lie on a plateau of their activation.",
    "saturated_max": "The same share at the worst hidden site.",
    "relative_derivative_min": "E|f'(z)| / peak at the worst hidden site: 1 is fully open, 0 is closed.",
    "stuck_max": "Share of units saturated in at least 99 % of at least 1000 samples, at the worst hidden site.",
    "attenuation_min": "||dL/dz|| / ||dL/da|| at the hidden site that lets least of the gradient through.",
    "gradient_first_over_last": "||dL/dz|| at the first site over that at the last hidden one: 1 is healthy, 0 has vanished.",
    "update_ratio_min": "||change of W|| / ||W|| per step of the layer that moves least, of those that feed a site.",
    "update_ratio_max": "The same of the layer that moves most.",
    "entropy_min": "H / ln T of the attention head that looks at fewest keys: 1 is even attention, 0 is one key alone.",
    "nonfinite": "Measured elements that are inf or nan, in the forward and in the backward pass, over all sites.",
    "alerts": "Alerts that fire now. See the Text tab, or `torchsat report`.",
}
"""The scalars of the whole network under torchsat/, with their descriptions."""


class TensorBoardWriter:
    """A sink. Writes into `<log_dir>/torchsat`, or through a `torch.utils.tensorboard.SummaryWriter` of the user's.

    Raises:
        TypeError: `writer` is something else.
        ValueError: both are given.
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
        self._ours = None if log_dir is None or writer is not None else EventFileWriter(os.path.join(os.fspath(log_dir), SUBRUN))
        self._described: set[str] = set()
        self._depth: dict[str, int] = {}
        self._firing: dict[tuple[str, str], Alert] = {}
        self._history: deque[Alert] = deque(maxlen=200)

    def __call__(self, snapshot: Snapshot) -> None:
        for alert in snapshot.alerts:
            self._history.append(alert)
            if alert.firing:
                self._firing[alert.site, alert.rule] = alert
            else:
                self._firing.pop((alert.site, alert.rule), None)
        summary = Summary(value=list(self._values(snapshot)))
        if self._theirs is not None:
            self._theirs._get_file_writer().add_summary(summary, snapshot.step, snapshot.time)
        elif self._ours is not None:
            self._ours.add_event(Event(wall_time=snapshot.time, step=snapshot.step, summary=summary))

    def flush(self) -> None:
        writer = self._ours if self._theirs is None else self._theirs
        if writer is not None:
            writer.flush()

    def close(self) -> None:
        """Close our own file; the user's writer is only flushed."""
        if self._theirs is not None:
            self._theirs.flush()
        elif self._ours is not None:
            self._ours.close()

    def _values(self, snapshot: Snapshot) -> Iterable[Summary.Value]:
        for name, value in network(snapshot, len(self._firing)).items():
            if value is not None:
                yield self._scalar(f"torchsat/{name}", value, NETWORK[name])
        for record in snapshot.records:
            depth = self._depth.setdefault(record.site, len(self._depth))
            if record.saturated is not None:
                yield self._scalar(
                    f"torchsat.saturated/{depth:03d}_{record.site}",
                    record.saturated,
                    f"Share of the inputs of `{record.site}` ({record.activation}) that lie on a plateau.",
                )
            elif record.entropy_min is not None:
                yield self._scalar(
                    f"torchsat.entropy/{depth:03d}_{record.site}",
                    record.entropy_min,
                    f"Entropy H / ln T of the attention of the lowest head of `{record.site}`: 1 is even attention, 0 is one key alone.",
                )
        facts = [[getattr(record, name) for name in SITE_FACTS] for record in snapshot.records]
        described = content("records", facts=SITE_FACTS, metrics=RECORD_METRICS, sites=facts)
        rows = [[to_float(getattr(record, name)) for record in snapshot.records] for name in RECORD_METRICS]
        yield self._tensor(tag(RECORDS, described), described, rows)
        blank = (math.nan,) * HISTOGRAM_BINS
        yield self._tensor(
            tag(HISTOGRAM, described),
            content("histogram", sites=[record.site for record in snapshot.records]),
            [record.histogram or blank for record in snapshot.records],
        )
        attentions = [(record.site, record.heads) for record in snapshot.records if record.heads]
        if attentions:
            described = content("heads", metrics=HEAD_METRICS, sites=[[site, len(heads)] for site, heads in attentions])
            heads = [head for _, each in attentions for head in each]
            yield self._tensor(tag(HEADS, described), described, [[to_float(getattr(head, name)) for head in heads] for name in HEAD_METRICS])
        if snapshot.weights:
            facts = [[getattr(weight, name) for name in WEIGHT_FACTS] for weight in snapshot.weights]
            described = content("weights", facts=WEIGHT_FACTS, metrics=WEIGHT_METRICS, layers=facts)
            rows = [[to_float(getattr(weight, name)) for weight in snapshot.weights] for name in WEIGHT_METRICS]
            yield self._tensor(tag(WEIGHTS, described), described, rows)
        if snapshot.alerts:
            events = json.dumps([alert.as_dict() for alert in snapshot.alerts])
            yield self._string(EVENTS, events, PLUGIN, content("events"))
            yield self._string("torchsat/alerts/text_summary", self._list(), "text", "")

    def _list(self) -> str:
        """Every alert so far, newest first, in one text, since TensorBoard keeps one per step. A table would break words in two."""
        lines = []
        for alert in reversed(self._history):
            lines.append(f"- step {alert.step}, {f'**{alert.severity}**' if alert.firing else 'cleared'}: {verdict(alert)}")
        return "\n".join(lines)

    def _scalar(self, name: str, value: float, description: str) -> Summary.Value:
        result = Summary.Value(tag=name, simple_value=value)
        if name not in self._described:
            self._described.add(name)
            result.metadata.CopyFrom(
                SummaryMetadata(
                    plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"),
                    data_class=DATA_CLASS_SCALAR,
                    summary_description=description,
                )
            )
        return result

    def _metadata(self, name: str, plugin: str, described: str) -> SummaryMetadata:
        """The plugin's name in every value, its content in the first."""
        data = SummaryMetadata.PluginData(plugin_name=plugin)
        if name not in self._described:
            self._described.add(name)
            data.content = described.encode()
        return SummaryMetadata(plugin_data=data, data_class=DATA_CLASS_TENSOR)

    def _tensor(self, name: str, described: str, rows: list[Any]) -> Summary.Value:
        values = array.array("f", (_single(value) for row in rows for value in row))
        if sys.byteorder == "big":
            values.byteswap()
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in (len(rows), len(rows[0]) if rows else 0)])
        tensor = TensorProto(dtype=DT_FLOAT, tensor_shape=shape, tensor_content=values.tobytes())
        return Summary.Value(tag=name, tensor=tensor, metadata=self._metadata(name, PLUGIN, described))

    def _string(self, name: str, text: str, plugin: str, described: str) -> Summary.Value:
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[text.encode()])
        return Summary.Value(tag=name, tensor=tensor, metadata=self._metadata(name, plugin, described))


def _single(value: float) -> float:
    """A float64 as float32 holds it: beyond the range, infinite."""
    return value if math.isnan(value) or abs(value) <= 3.4028234e38 else math.copysign(math.inf, value)


def network(snapshot: Snapshot, firing: int) -> dict[str, float | None]:
    """The numbers of the whole network; None where nothing can be said."""
    hidden = [record for record in snapshot.records if not record.output]

    def collect(name: str) -> list[float]:
        return [value for record in hidden if (value := getattr(record, name)) is not None]

    saturated = collect("saturated")
    updates = [weight.update_ratio for weight in snapshot.weights if weight.update_ratio is not None]
    return {
        "saturated_mean": sum(saturated) / len(saturated) if saturated else None,
        "saturated_max": max(saturated, default=None),
        "relative_derivative_min": min(collect("relative_derivative"), default=None),
        "stuck_max": max(collect("stuck"), default=None),
        "attenuation_min": min(collect("attenuation"), default=None),
        "gradient_first_over_last": gradient_over_depth(snapshot),
        "update_ratio_min": min(updates, default=None),
        "update_ratio_max": max(updates, default=None),
        "entropy_min": min(collect("entropy_min"), default=None),
        "nonfinite": float(sum(record.nonfinite + record.grad_nonfinite for record in snapshot.records)),
        "alerts": float(firing),
    }
