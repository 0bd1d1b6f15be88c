"""What is written is read back, by our reader and by TensorBoard's, and damage to a file is reported."""

import contextlib
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import torchsat
from tests.conftest import record
from tests.models import mlp
from tests.training import train
from torchsat import Alert, Cause, Rule, Snapshot, Weight
from torchsat.colours import shades
from torchsat.record import HISTOGRAM_BINS, Head
from torchsat.tensorboard.heatmap import HATCH, MISSING, Heatmap
from torchsat.tensorboard.reader import read_runs
from torchsat.tensorboard.stock import NETWORK
from torchsat.tensorboard.writer import QUEUED, TensorBoardWriter

ALERT = Alert("b.act", "saturated", "critical", 0.75, 0.5, 1, 4, True, "b.act is saturated", (Cause("init_too_large", 0.5, "gain 8", "Xavier"),))


def snapshots(count: int = 6, sites: int = 2) -> list[Snapshot]:
    made = []
    for step in range(count):
        records = tuple(
            record(
                f"{'abcdefgh'[k % 8]}{k // 8 or ''}.act",
                saturated=0.125 * k / sites,
                z_max=step + 0.5,
                histogram=(1 / HISTOGRAM_BINS,) * HISTOGRAM_BINS,
            )
            for k in range(sites)
        )
        records = (*records[:-1], replace(records[-1], attenuation=None, histogram=None, units=None, after=(records[0].site,) if sites > 1 else ()))
        weights = (Weight("a", ("a.act", "b.act"), 8, False, 0.1, 64, 1.5, None, 0.25, 0.001953125, 1.0, 0.5, 128),)
        alerts = (ALERT,) if step == 4 else (replace(ALERT, firing=False, step=5),) if step == 5 else ()
        made.append(Snapshot(step, 1000.0 + step, records, weights, alerts))
    return made


def write(directory: Path, given: list[Snapshot]) -> Path:
    writer = TensorBoardWriter(directory)
    for snapshot in given:
        writer(snapshot)
    writer.close()
    return next(Path(directory, "torchsat").glob("*tfevents*"))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    given = snapshots()
    write(tmp_path, given)
    back = torchsat.read(tmp_path)
    assert len(back) == 6
    assert back == given
    assert back[0]["b.act"].attenuation is None
    assert back[4].alerts == (ALERT,)


def test_a_real_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    live: list[Snapshot] = []
    model = mlp()
    monitor = torchsat.watch(model, tmp_path, every=1, sinks=(live.append,), errors="raise")
    train(model, 12)
    monitor.close()
    assert torchsat.read(tmp_path) == live


def test_tensorboards_own_reader_sees_the_scalars_and_the_text(tmp_path: Path) -> None:
    write(tmp_path, snapshots())
    reader = EventAccumulator(str(tmp_path / "torchsat"), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    tags = reader.Tags()
    network = [tag for tag in tags["scalars"] if tag.startswith("torchsat/")]
    assert set(network) == {f"torchsat/{name}" for name in NETWORK} - {
        f"torchsat/{name}" for name in ("entropy_min", "health_worst", "overhead", "unhealthy")
    }
    assert sorted(tag for tag in tags["scalars"] if not tag.startswith("torchsat/")) == [
        *("torchsat.attenuation/000_a.act", "torchsat.derivative/000_a.act", "torchsat.derivative/001_b.act"),
        *("torchsat.excess/000_a.act", "torchsat.excess/001_b.act"),
    ]
    beyond = pytest.approx(0.0625 - 2 * 0.0147)
    assert [(event.step, event.value) for event in reader.Scalars("torchsat.excess/001_b.act")] == [(step, beyond) for step in range(6)]
    assert reader.Scalars("torchsat.derivative/001_b.act")[0].value == pytest.approx(0.6 / 0.6057)
    assert [event.value for event in reader.Scalars("torchsat/alerts")] == [0, 0, 0, 0, 1, 0]
    metadata = reader.SummaryMetadata("torchsat/excess_max")
    assert metadata.data_class == 1
    assert metadata.summary_description == NETWORK["excess_max"]
    text = [event.tensor_proto.string_val[0].decode() for event in reader.Tensors("torchsat/alerts/text_summary")]
    assert text[-2].splitlines()[0] == "**critical: b.act (tanh): saturated (init\\_too\\_large), since step 1**. Try: Xavier"
    assert text[-1].splitlines()[0] == "**healthy: its alert has cleared**"
    assert text[-1].splitlines()[4:] == [
        "step 5: cleared: b.act is saturated | init_too_large 50 %: gain 8 | Xavier",
        "step 4: **critical**: b.act is saturated | init_too_large 50 %: gain 8 | Xavier",
    ]
    packed = next(tag for tag in tags["tensors"] if tag.startswith("torchsat/records."))
    assert json.loads(reader.SummaryMetadata(packed).plugin_data.content)["kind"] == "records"
    assert all(all(c.isalnum() or c in "_./-" for c in tag) for kind in ("scalars", "tensors") for tag in tags[kind])


def test_an_observation_of_fifty_sites_is_small(tmp_path: Path) -> None:
    size = write(tmp_path, snapshots(41, sites=50)).stat().st_size
    first = write(tmp_path / "one", snapshots(1, sites=50)).stat().st_size
    assert (size - first) / 40 < 45_000


def reader(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    found.Reload()
    return found


def test_the_spread_over_the_sites_is_that_of_numpy(tmp_path: Path) -> None:
    shares = [0.05, 0.9, 0.1, 0.4, 0.2, 0.33]
    records = [record(f"s{k}", saturated=share) for k, share in enumerate(shares)]
    write(tmp_path, [Snapshot(0, 1.0, (*records, record("out", saturated=1.0, output=True)))])
    found = reader(tmp_path / "torchsat")
    values = {name: found.Scalars(f"torchsat/excess_{name}")[0].value for name in ("p10", "median", "p90", "max")}
    assert values == pytest.approx(dict(zip(values, np.quantile(shares, [0.1, 0.5, 0.9, 1.0]) - 2 * 0.0147, strict=True)), rel=1e-5)


def test_a_healthy_relu_does_not_look_worse_than_a_sick_sigmoid(tmp_path: Path) -> None:
    """By the raw share it would: 50 % against 45 %."""
    relu = record("relu", activation="relu", saturated=0.5, normal_low=0.5, normal_high=0.0, normal_derivative=0.5, relative_derivative=0.5)
    sigmoid = record(
        "sigmoid", activation="sigmoid", saturated=0.45, normal_low=0.0, normal_high=0.0, normal_derivative=0.83, relative_derivative=0.1
    )
    layer = replace(snapshots(1)[0].weights[0], feeds=("fed",), alert_level=0.75)
    given = (
        replace(relu, alert_level=0.0),
        replace(sigmoid, alert_level=0.6),
        record("fed", alert_level=0.2),
        record("out", output=True, alert_level=1.0),
    )
    write(tmp_path, [Snapshot(0, 1.0, given, (layer,))])
    found = reader(tmp_path / "torchsat")
    values = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    assert values["torchsat.health/000_relu"] == 0.0
    assert values["torchsat.health/001_sigmoid"] == pytest.approx(0.6)
    assert values["torchsat.health/002_fed"] == pytest.approx(0.75)  # by the layer that feeds it
    assert (values["torchsat.excess/000_relu"], values["torchsat.excess/001_sigmoid"]) == (0.0, pytest.approx(0.45))
    assert (values["torchsat.derivative/000_relu"], values["torchsat.derivative/001_sigmoid"]) == (1.0, pytest.approx(0.1 / 0.83))
    assert (values["torchsat/health_worst"], values["torchsat/unhealthy"]) == (1.0, 0.75)
    assert (values["torchsat/excess_max"], values["torchsat/derivative_min"]) == (pytest.approx(0.45), pytest.approx(0.1 / 0.83))


@pytest.mark.parametrize("group", ["health", "excess"])
def test_the_layout_names_tags_that_are_there(group: str, tmp_path: Path) -> None:
    """Of a run without rules no site has a health."""

    def level(k: int) -> dict[str, float]:
        return {"alert_level": k / 40} if group == "health" else {}

    given = [
        Snapshot(step, 1000.0 + step, tuple(record(f"b.{k}", saturated=k / 40, entropy_min=0.5 if k == 3 else None, **level(k)) for k in range(35)))
        for step in range(3)
    ]
    write(tmp_path, given)
    found = reader(tmp_path / "torchsat")
    layout = Layout.FromString(found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    scalars = found.Tags()["scalars"]
    charts = {chart.title: chart for category in layout.category for chart in category.chart}
    (margin,) = [chart.margin.series[0] for chart in charts.values() if chart.HasField("margin")]
    assert {margin.value, margin.lower, margin.upper} <= set(scalars)
    matched = {title: [tag for tag in scalars for wanted in chart.multiline.tag if re.match(wanted, tag)] for title, chart in charts.items()}
    assert matched["The 8 worst sites"] == [f"torchsat.{group}/{k:03d}_b.{k}" for k in range(27, 35)]
    by_depth = [tags for title, tags in matched.items() if title.startswith("Health, " if group == "health" else "Saturated beyond normal, ")]
    assert [len(tags) for tags in by_depth] == [10, 10, 10, 5]
    assert matched["Attention entropy, 1 sites from 003_b.3"] == ["torchsat.entropy/003_b.3"]
    assert all(tags for title, tags in matched.items() if not re.search("(?i)gradient|health of", title) and not charts[title].HasField("margin"))


def test_the_picture_shows_the_stored_values(tmp_path: Path) -> None:
    series = [
        Snapshot(step, 1000.0 + step, tuple(record(f"net.{name}", saturated=0.0294 + 0.5 * k * (step >= 20)) for k, name in enumerate("abc")))
        for step in range(0, 40, 5)
    ]
    write(tmp_path, series)
    images = reader(tmp_path / "torchsat").Images("torchsat/heatmap")
    assert [event.step for event in images] == [35]
    picture = Image.open(io.BytesIO(images[0].encoded_image_string))
    assert picture.size == (Heatmap.WIDTH, Heatmap.HEIGHT)
    right, bottom = Heatmap.WIDTH - Heatmap.RIGHT, Heatmap.HEIGHT - Heatmap.BOTTOM
    rows = [Heatmap.TOP + (bottom - Heatmap.TOP) * part // 6 for part in (1, 3, 5)]
    heat = shades("heat")
    assert [picture.getpixel((Heatmap.LEFT + 10, row)) for row in rows] == [heat[0]] * 3
    after = [picture.getpixel((right - 10, row)) for row in rows]
    assert after[0] == heat[0]
    assert after[1] in heat[127:129]
    assert after[2] == heat[255]


def test_the_picture_shows_health_and_hatches_what_is_not_finite(tmp_path: Path) -> None:
    series = [
        Snapshot(
            step,
            1000.0 + step,
            (
                record("well", alert_level=0.0),
                record("sick", alert_level=1.0),
                *([record("nan", nonfinite=9, saturated=None, alert_level=1.0)] * (step > 3)),
            ),
        )
        for step in range(8)
    ]
    write(tmp_path, series)
    (image,) = reader(tmp_path / "torchsat").Images("torchsat/heatmap")
    picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    bottom, right, third = Heatmap.HEIGHT - Heatmap.BOTTOM, Heatmap.WIDTH - Heatmap.RIGHT, (Heatmap.HEIGHT - Heatmap.BOTTOM - Heatmap.TOP) // 3
    cells = [picture[Heatmap.TOP + at * third + 10 : Heatmap.TOP + (at + 1) * third - 10, right - 40 : right - 10].reshape(-1, 3) for at in range(3)]
    assert [set(map(tuple, each.tolist())) for each in cells] == [{shades("heat")[0]}, {shades("heat")[255]}, set(HATCH)]
    before = picture[bottom - third + 10 : bottom - 10, Heatmap.LEFT + 10 : Heatmap.LEFT + 40].reshape(-1, 3)
    assert set(map(tuple, before.tolist())) == {MISSING}


def test_pictures_come_at_a_low_cadence(tmp_path: Path) -> None:
    write(tmp_path, [Snapshot(step, 1000.0 + step, (record(),)) for step in range(140)])
    assert [event.step + 1 for event in reader(tmp_path / "torchsat").Images("torchsat/heatmap")] == [8, 16, 32, 64, 128, 140]


def test_a_fault_of_the_writing_thread_is_raised_and_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorBoardWriter(tmp_path)

    def full(*values: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(writer, "_add", full)
    writer(snapshots(1)[0])
    with pytest.raises(OSError, match="no space left"):
        writer.flush()
    for snapshot in snapshots(QUEUED + 5):  # more than the queue holds
        with contextlib.suppress(OSError):
            writer(snapshot)
    with pytest.raises(OSError, match="no space left"):
        writer.close()
    assert "torchsat-writer" not in {thread.name for thread in threading.enumerate()}


def test_a_learning_rate_that_changes_makes_no_new_tags(tmp_path: Path) -> None:
    given = [replace(each, weights=tuple(replace(weight, learning_rate=0.1 / (1 + each.step)) for weight in each.weights)) for each in snapshots()]
    write(tmp_path, given)
    tags = reader(tmp_path / "torchsat").Tags()["tensors"]
    assert len([tag for tag in tags if tag.startswith("torchsat/weights.")]) == 1
    assert [each.weights[0].learning_rate for each in torchsat.read(tmp_path)] == pytest.approx([0.1 / (1 + step) for step in range(6)])


def test_the_users_layout_is_left_alone(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardWriter(writer=writer)
        for snapshot in snapshots(9):
            sink(snapshot)
        sink.close()
    tags = reader(tmp_path).Tags()
    assert "torchsat/heatmap" in tags["images"]
    assert "custom_scalars__config__" not in tags["tensors"]


def test_the_users_writer_is_written_through_and_left_open(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        model = mlp()
        monitor = torchsat.watch(model, writer=writer, every=1, errors="raise")
        train(model, 3)
        monitor.close()
        writer.add_scalar("loss", 1.0, 3)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert len(list(tmp_path.glob("*tfevents*"))) == 1
    assert [snapshot.step for snapshot in torchsat.read(tmp_path)] == [0, 1, 2]
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert "loss" in reader.Tags()["scalars"]


def test_another_kind_of_writer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"writer is a str; allowed is a torch\.utils\.tensorboard\.SummaryWriter"):
        torchsat.watch(nn.Sequential(nn.Tanh()), writer="runs")


def test_a_resumed_run_replaces_what_the_lost_session_wrote(tmp_path: Path) -> None:
    write(tmp_path, snapshots(6))
    again = [replace(snapshot, time=2000.0) for snapshot in snapshots(8)[3:]]
    writer = TensorBoardWriter(tmp_path)
    for snapshot in again:
        writer(snapshot)
    writer.close()
    back = torchsat.read(tmp_path)
    assert [(snapshot.step, snapshot.time) for snapshot in back] == [*((k, 1000.0 + k) for k in range(3)), *((k, 2000.0) for k in range(3, 8))]


def test_what_a_later_session_voids_is_said(tmp_path: Path) -> None:
    write(tmp_path, snapshots(6))
    write(tmp_path, [replace(snapshot, time=2000.0) for snapshot in snapshots(2)])
    (run,) = read_runs(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1]
    assert run.notes == ["a later session began at step 0: 6 observations of the earlier one are left out"]


def test_two_monitors_in_one_directory_are_two_runs(tmp_path: Path) -> None:
    writers = [TensorBoardWriter(tmp_path) for _ in range(2)]
    for step in range(4):
        for k, writer in enumerate(writers):
            writer(Snapshot(step, 1000.0 + step + 0.5 * k, (record(f"model{k}"),)))
    for writer in writers:
        writer.close()
    runs = read_runs(tmp_path)
    assert sorted(run.snapshots[0].records[0].site for run in runs) == ["model0", "model1"]
    assert [len(run.snapshots) for run in runs] == [4, 4]
    with pytest.raises(ValueError, match="holds 2 runs"):
        torchsat.read(tmp_path)


def test_a_resumed_run_may_have_other_sites(tmp_path: Path) -> None:
    write(tmp_path, snapshots(2))
    write(tmp_path, [replace(snapshot, step=snapshot.step + 2, time=2000.0) for snapshot in snapshots(2, sites=5)])
    assert [len(snapshot.records) for snapshot in torchsat.read(tmp_path)] == [2, 2, 5, 5]


def test_every_number_comes_back_exactly(tmp_path: Path) -> None:
    heads = (Head(2**24 + 1, 1 / 3, 1e-60, None, math.inf), Head(0, None, None, None, None))
    given = record(
        *("act",),
        n=2**24 + 1,
        elements=2**40 + 1,
        grad_z_rms=1e-60,
        z_max=1e300,
        z_min=-math.inf,
        grad_n=0,
        heads=heads,
        histogram=(1 / 3,) * HISTOGRAM_BINS,
    )
    weight = replace(snapshots(1)[0].weights[0], grad_norm=math.inf, learning_rate=1e-60, n=2**31 + 1)
    made = [Snapshot(2**40 + 1, 1e9 + 1 / 3, (given,), (weight,), overhead=0.1)]
    write(tmp_path, made)
    assert torchsat.read(tmp_path) == made


def test_a_file_of_the_version_before_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 4: float32, no tensor of the observation as a whole, and fewer fields."""
    write_tensor = TensorBoardWriter._tensor

    def as_float32(self: TensorBoardWriter, name: str, described: str, values: Any) -> Any:
        found = write_tensor(self, name, described, values)
        found.tensor.dtype, found.tensor.tensor_content = 1, values.astype("<f4").tobytes()
        if name.startswith("torchsat/whole"):
            found.Clear()
        return found

    given = [replace(each, overhead=0.25) for each in snapshots(3)]
    with monkeypatch.context() as patched:
        patched.setattr("torchsat.tensorboard.FORMAT", 4)
        patched.setattr(TensorBoardWriter, "_tensor", as_float32)
        write(tmp_path, given)
    (one, *_), (other, *_) = torchsat.read(tmp_path), given
    assert (one.step, one.overhead, one.weights[0].gain) == (0, 0.25, 1.5)
    assert one["a.act"].derivative_rms == pytest.approx(other["a.act"].derivative_rms, rel=1e-6)
    assert one["a.act"].derivative_rms != other["a.act"].derivative_rms


def test_what_a_users_module_holds_does_not_cost_the_file(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(np.array((2, 2)).prod(), np.int32(16))
            self.add_module("caf\udcff é", nn.LeakyReLU(np.float32(0.1)))
            self.conv = nn.Conv1d(np.int64(1), np.int64(4), np.int64(3), stride=np.int64(1))
            self.back = nn.ConvTranspose1d(np.int64(4), np.int64(2), np.int64(3), stride=np.int64(2))
            self.elu, self.last = nn.ELU(np.float64(1.0)), nn.Linear(58, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.get_submodule("caf\udcff é")(self.first(x))
            x = self.elu(self.back(torch.tanh(self.conv(x.unsqueeze(1)))))
            out: Tensor = self.last(F.leaky_relu(x.flatten(1), np.float32(0.2)))
            return out

    def says(item: Any, value: float, limit: float) -> str:
        return f"{item.site} \udcff"

    model = Odd()
    value: Any = lambda item, snapshot: torch.tensor(float(item.n))  # noqa: E731
    limit: Any = np.float32(1.0)
    rule = Rule("odd", value, limit, None, says, patience=1)
    monitor = torchsat.watch(model, tmp_path, every=1, budget=None, rules=(rule,), errors="raise")
    optimizer = torch.optim.Adam(model.parameters(), lr=np.float64(1e-3))
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    json.dumps(monitor.state_dict())
    monitor.close()
    back = torchsat.read(tmp_path)
    assert [each.step for each in back] == [0, 1, 2]
    assert {(each.name, each.fan_in) for each in back[0].weights} == {("first", 4), ("conv", 3), ("back", 6)}
    (told,) = back[0].alerts
    assert {told.site, *told.also} == {each.site for each in back[0]}
    assert (len(told.also), told.value) == (3, float(back[0][told.site].n))


def test_a_fact_that_json_does_not_know_costs_that_fact(tmp_path: Path) -> None:
    number, nothing = cast(Any, np.int64(8)), cast(Any, object())
    odd = replace(snapshots(1)[0].weights[0], fan_in=number, data=nothing)
    given = Snapshot(0, 0.0, (record(units=Fraction(8), normal_low=np.float32(0.5)),), (odd,), (replace(ALERT, value=nothing),))
    write(tmp_path, [given])
    (back,) = torchsat.read(tmp_path)
    assert (back["act"].units, back["act"].normal_low, back["act"].n) == (None, 0.5, 1000)
    assert (back.weights[0].fan_in, back.weights[0].gain) == (8, 1.5)
    assert [cast(Any, each) for each in (back.weights[0].data, back.alerts[0].value)] == [None, None]


def offsets(path: Path) -> list[int]:
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        found.append(at)
        at += 16 + struct.unpack_from("<Q", data, at)[0]
    return found


@pytest.mark.parametrize("damage", ["cut", "length", "payload", "zeros", "cut_header"])
def test_a_damaged_file_gives_its_good_part_and_says_where_it_stops(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, snapshots())
    data, at = (
        bytearray(path.read_bytes()),
        offsets(path)[5],
    )  # records 0 and 1 are the file's version and the session's start, 2 to 7 the steps 0 to 5
    size = len(data)
    if damage == "cut":
        data = data[: at + 200]
    elif damage == "cut_header":
        data = data[: at + 5]
    elif damage == "zeros":
        data[at:] = bytes(size - at)
    elif damage == "length":
        data[at] ^= 0xFF
    else:
        data[at + 300] ^= 0xFF
    path.write_bytes(data)
    (run,) = read_runs(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2]
    (sentence,) = run.damage
    assert f"read 5 records, stopped at byte {at} of {len(data)}: {'truncated' if 'cut' in damage else 'corrupt'}" in sentence


def test_what_cannot_be_read_is_answered_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a directory; give the one that was given to torchsat\.watch"):
        torchsat.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no torchsat data below .* \(0 event files there\)"):
        torchsat.read(tmp_path)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    with pytest.raises(FileNotFoundError, match=r"\(1 event files there\)"):
        torchsat.read(tmp_path)
    for name in ("one", "two"):
        write(tmp_path / name, snapshots(1))
    with pytest.raises(ValueError, match=r"holds 2 runs: .*one.*two"):
        torchsat.read(tmp_path)


def test_a_newer_format_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchsat.tensorboard.FORMAT", 99)
    write(tmp_path, snapshots(1))
    with pytest.raises(FileNotFoundError, match="format 99 was written by another version of torchsat"):
        torchsat.read(tmp_path)


def test_what_is_wrong_with_many_steps_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("torchsat.tensorboard.FORMAT", 99)
        write(tmp_path, snapshots(5))
    with pytest.raises(FileNotFoundError) as caught:
        torchsat.read(tmp_path)
    assert str(caught.value).count("could not be understood") == 1
    assert "5 steps from 0 on could not be understood" in str(caught.value)


@pytest.mark.parametrize("load_fast", ["true", "false"])
def test_tensorboard_serves_the_run(load_fast: str, tmp_path: Path) -> None:
    """Starts a real server on loopback, with either of its ways to load data."""
    write(tmp_path / "run", snapshots())
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0", "--host", "127.0.0.1", f"--load_fast={load_fast}"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
    assert server.stderr is not None
    try:
        address = next(line for line in server.stderr if "http://" in line).split("http://")[1].split("/")[0]
        for _ in range(100):
            with urllib.request.urlopen(f"http://{address}/data/plugin/scalars/tags", timeout=10) as answer:
                tags = json.load(answer)
            if tags:
                break
            time.sleep(0.1)
        (run,) = tags
        assert run == str(Path("run", "torchsat"))
        assert "torchsat/excess_max" in tags[run]
        assert tags[run]["torchsat/excess_max"]["description"]
        url = f"http://{address}/data/plugin/scalars/scalars?run={run.replace('/', '%2F')}&tag=torchsat.excess%2F001_b.act"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert [point[1:] for point in json.load(answer)] == [[step, pytest.approx(0.0625 - 2 * 0.0147)] for step in range(6)]
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close()
