"""Reads snapshots from event files, and says where a file is damaged. Never torch.

TensorBoard's own readers return what precedes the damage and say nothing. The frames of the file (length, checksum of the length, payload, checksum
of the payload) are therefore read here. The protocol buffers and the checksum function are TensorBoard's. Only payloads that hold our data are
checked and parsed.
"""

from __future__ import annotations

import array
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from torchsat.experts import Experts
from torchsat.ledger import Ledger
from torchsat.number_formats import FormatUse
from torchsat.record import HISTOGRAM_BINS, Alert, Head, Nearest, Record, Snapshot, Weight, from_float
from torchsat.tensorboard import (
    EVENTS,
    EXPERTS,
    FORMAT,
    FORMATS,
    HEADS,
    HISTOGRAM,
    JUDGEMENT,
    LEDGER,
    OVERHEAD,
    PLUGIN,
    READABLE,
    RECORDS,
    SUBRUN,
    WEIGHTS,
    WHOLE,
)

Made = TypeVar("Made", Record, Weight, Head, Nearest, Experts, FormatUse)


@dataclass
class Run:
    """What was read from the event files of one directory."""

    directory: str
    """The directory of the event files; where several runs share one, followed by the name of the file in brackets."""
    snapshots: list[Snapshot] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    """One sentence for each file that could not be read to its end, and for each kind of event that could not be understood."""
    notes: list[str] = field(default_factory=list)
    """Sentences about anything else that was left out."""
    name: str = ""
    """The directory that was given to `watch`, relative to the one that was asked for; of that one itself its last part."""


def read(run_dir: str | os.PathLike[str]) -> list[Snapshot]:
    """The snapshots of one run, in order of steps, from its event files.

    Args:
        run_dir: the directory given to `watch`, or the one that holds the event files.

    Raises:
        FileNotFoundError: there is no such directory, or no torchsat data in it.
        ValueError: it holds several runs; the message lists them.
    """
    runs = read_runs(run_dir)
    if len(runs) > 1:
        names = ", ".join(run.directory for run in runs)
        raise ValueError(f"{os.fspath(run_dir)} holds {len(runs)} runs: {names}. Read one of them at a time.")
    return runs[0].snapshots


def read_runs(run_dir: str | os.PathLike[str]) -> list[Run]:
    """Every run in a directory or below it. Raises FileNotFoundError if there is none."""
    top = Path(run_dir)
    if not top.is_dir():
        raise FileNotFoundError(f"{top} is not a directory; give the one that was given to torchsat.watch(model, ...)")
    folders: dict[Path, list[Path]] = {}
    for path in sorted(top.rglob("*tfevents*")):
        if path.is_file():
            folders.setdefault(path.parent, []).append(path)
    runs = [run for folder, files in folders.items() for run in _read_folder(folder, files)]
    runs = [run for run in runs if run.snapshots or run.damage]
    if not any(run.snapshots for run in runs):
        damage = "".join(f" {sentence}" for run in runs for sentence in run.damage)
        count = sum(map(len, folders.values()))
        raise FileNotFoundError(f"no torchsat data below {top} ({count} event files there).{damage}")
    found = [run for run in runs if run.snapshots]
    for run in found:
        run.name = _name(run.directory, top)
    return found


def _name(directory: str, top: Path) -> str:
    """The name of a run: the directory that was given to `watch`, relative to `top`. The name of `top` itself is its last part."""
    folder, bracket, file = directory.partition(" (")
    own, where = Path(os.path.abspath(top)), Path(os.path.abspath(folder))
    if where.name == SUBRUN:
        where = where.parent
    name = str(where.relative_to(own)) if own in where.parents else where.name
    return f"{name}{bracket}{file}"


def _read_folder(folder: Path, files: list[Path]) -> list[Run]:
    """The runs of one directory. Files that follow each other in time are the sessions of one run; files that overlap in time are several runs."""
    sessions = []
    for path in files:
        session, contents, odd = Run(str(folder)), dict[str, dict[str, Any]](), dict[str, list[int]]()
        for event in _events(path, session.damage):
            try:
                snapshot = _snapshot(event, contents)
            except (KeyError, ValueError, TypeError) as error:
                odd.setdefault(f"{type(error).__name__}: {error}", []).append(event.step)
                continue
            if snapshot is not None:
                session.snapshots.append(snapshot)
        for reason, steps in odd.items():
            which = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} on"
            session.damage.append(f"{path.name}: {which} could not be understood ({reason})")
        sessions.append((path.name, session))
    runs: list[Run] = []
    for name, session in sorted(sessions, key=lambda pair: pair[1].snapshots[0].time if pair[1].snapshots else math.inf):
        last = runs[-1] if runs else None
        if last is None or not session.snapshots or not last.snapshots:
            if last is not None and not session.snapshots:
                last.damage += session.damage
            else:
                runs.append(session)
        elif session.snapshots[0].time < last.snapshots[-1].time:
            session.directory = f"{folder} ({name})"
            runs.insert(len(runs) - 1, session)
        else:
            _resume(last, session)
    return runs


def _resume(run: Run, session: Run) -> None:
    """Add a later session to a run. It began at a checkpoint; what the earlier sessions wrote from that step on is void and left out."""
    first = session.snapshots[0].step
    kept = [snapshot for snapshot in run.snapshots if snapshot.step < first]
    void = len(run.snapshots) - len(kept)
    if void:
        run.notes.append(f"a later session began at step {first}: {void} observations of the earlier one are left out")
    run.snapshots = kept + session.snapshots
    run.damage += session.damage


def frames(path: Path, damage: list[str], wanted: Callable[[bytes], bool], checked: bool = True) -> Iterator[tuple[int, bytes]]:
    """The wanted payloads of one file, each behind the byte at which its record begins. If the file ends early or is corrupt, a sentence is added to
    `damage`. `checked`: whether the checksum of a wanted payload is compared, which takes longer than to parse it."""
    size, count, at, reason = path.stat().st_size, 0, 0, ""
    with path.open("rb") as file:
        while header := file.read(12):
            if len(header) < 12:
                reason = "truncated"
                break
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                reason = "corrupt (the checksum of a length does not fit)"
                break
            if at + 16 + length > size:
                reason = "truncated"
                break
            payload = file.read(length)
            (checksum,) = struct.unpack("<I", file.read(4))
            if wanted(payload):
                if checked and masked_crc32c(payload) != checksum:
                    reason = "corrupt (the checksum of a record does not fit)"
                    break
                yield at, payload
            count += 1
            at += 16 + length
    if reason:
        damage.append(f"{path.name}: read {count} records, stopped at byte {at} of {size}: {reason}")


def _events(path: Path, damage: list[str]) -> Iterator[Event]:
    """The events of one file that hold our data. If the file ends early or is corrupt, a sentence is added to `damage`."""
    for at, payload in frames(path, damage, lambda payload: PLUGIN.encode() in payload):
        try:
            yield Event.FromString(payload)
        except DecodeError as error:
            damage.append(f"{path.name}: the record at byte {at} is no event ({error})")


def _snapshot(event: Event, contents: dict[str, dict[str, Any]]) -> Snapshot | None:
    """The snapshot of one event; None if it holds none.

    Args:
        contents: the contents of the metadata of the tags met so far; only the first event of a tag has them.
    """
    records: tuple[Record, ...] | None = None
    histograms: dict[str, tuple[float, ...]] = {}
    heads: dict[str, list[Head]] = {}
    weights: tuple[Weight, ...] = ()
    alerts: tuple[Alert, ...] = ()
    overhead: float | None = None
    judgement: tuple[bool, Nearest | None] = (True, None)
    ledger: Ledger | None = None
    experts: tuple[Experts, ...] = ()
    formats: tuple[FormatUse, ...] = ()
    for value in event.summary.value:
        if value.tag == OVERHEAD:
            overhead = value.simple_value
        if value.metadata.plugin_data.plugin_name != PLUGIN:
            continue
        if value.metadata.plugin_data.content:
            contents[value.tag] = json.loads(value.metadata.plugin_data.content)
        known = contents[value.tag]
        if known["v"] not in READABLE:
            raise ValueError(f"format {known['v']} was written by another version of torchsat; this one reads {FORMAT}")
        kind = value.tag.partition(".")[0]
        if kind == RECORDS:
            records = tuple(_made(Record, values) for values in _columns(value.tensor, known, known["sites"]))
        elif kind == HISTOGRAM:
            flat = _floats(value.tensor)
            for index, site in enumerate(known["sites"]):
                bins = tuple(flat[index * HISTOGRAM_BINS : (index + 1) * HISTOGRAM_BINS])
                if bins and not math.isnan(bins[0]):
                    histograms[site] = bins
        elif kind == HEADS:
            owners = [[site] for site, count in known["sites"] for _ in range(count)]
            for values in _columns(value.tensor, {**known, "facts": ["site"]}, owners):
                heads.setdefault(values.pop("site"), []).append(_made(Head, values))
        elif kind == WEIGHTS:
            weights = tuple(_made(Weight, values) for values in _columns(value.tensor, known, known["layers"]))
        elif kind == LEDGER:
            ledger = Ledger.from_dict({"entries": list(_columns(value.tensor, known, known["entries"]))})
        elif kind == FORMATS:
            formats = tuple(_made(FormatUse, values) for values in _columns(value.tensor, known, known["uses"]))
        elif kind == WHOLE:
            overhead = next(_columns(value.tensor, {**known, "facts": []}, [[]]))["overhead"]
        elif kind == EVENTS:
            alerts = tuple(Alert.from_dict(alert) for alert in json.loads(value.tensor.string_val[0]))
        elif kind == EXPERTS:
            experts = experts_of(value.tensor.string_val[0])
        elif kind == JUDGEMENT:
            judgement = judgement_of(value.tensor.string_val[0])
    if records is None:
        return None
    joined = tuple(
        replace(record, histogram=histograms.get(record.site), heads=tuple(heads[record.site]) if record.site in heads else None)
        for record in records
    )
    made = Snapshot(int(event.step), float(event.wall_time), joined, weights, alerts, overhead, *judgement, ledger)
    return replace(made, experts=experts, formats=formats)


def experts_of(written: bytes) -> tuple[Experts, ...]:
    """`Snapshot.experts` of a string EXPERTS."""
    return tuple(_made(Experts, each) for each in json.loads(written))


def judgement_of(written: bytes) -> tuple[bool, Nearest | None]:
    """`Snapshot.judged` and `Snapshot.nearest` of a string JUDGEMENT."""
    values = json.loads(written)
    return values["judged"], _made(Nearest, values["nearest"]) if values["nearest"] else None


def _made(kind: Callable[..., Made], values: dict[str, Any]) -> Made:
    """A value of this kind. A field that an older version did not write is None, and one that is not known here is left out."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value := values.get(name), list) else value for name in names})


def _columns(tensor: Any, known: dict[str, Any], items: list[list[Any]]) -> Iterator[dict[str, Any]]:
    """For each column of a packed tensor [metrics, items], its facts and metrics by name.

    Args:
        known: the content of the tensor's metadata, with the names of its facts and metrics.
        items: the facts of each column.
    """
    flat, width = _floats(tensor), len(items)
    if len(flat) != len(known["metrics"]) * width:
        raise ValueError(f"{len(flat)} numbers where {len(known['metrics'])} x {width} were announced")
    for at, facts in enumerate(items):
        values: dict[str, Any] = dict(zip(known["facts"], facts, strict=True))
        for row, name in enumerate(known["metrics"]):
            values[name] = from_float(name, flat[row * width + at])
        yield values


def _floats(tensor: Any) -> array.array[float]:
    """The numbers of a packed tensor, which are little-endian float64; float32 in a file of version 4."""
    values = array.array("f" if tensor.dtype == DT_FLOAT else "d", tensor.tensor_content)
    if sys.byteorder == "big":
        values.byteswap()
    return values
