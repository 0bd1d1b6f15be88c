"""Runs as arrays, and the colours of numbers."""

import json
import math
import struct
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from tests.conftest import record
from tests.test_tensorboard import ALERT, snapshots
from tests.truth import known
from torchsat import Snapshot, Weight
from torchsat.colours import shade, shades
from torchsat.grids import Grid, Table, in_order, last_session
from torchsat.metrics import METRICS, Metric, Ramp, excess, rows_of
from torchsat.percent import PERCENT
from torchsat.record import HISTOGRAM_EDGES, RECORD_METRICS, SITE_FACTS, WEIGHT_METRICS, normal_saturated
from torchsat.tensorboard.heatmap import Heatmap
from torchsat.view import from_snapshots, heads, histograms, scales, series

BY_NAME = {metric.name: metric for metric in METRICS}
RAMPS: tuple[Ramp, ...] = ("heat", "amount", "balance")


def oklab(colour: tuple[int, int, int]) -> np.ndarray:
    """From 8-bit sRGB to OKLab, by the forward matrices. The code under test uses the inverse ones."""
    encoded = np.array(colour) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    lms = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]]
    )
    back = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099], [0.0259040371, 0.7827717662, -0.8086757660]]
    )
    out: np.ndarray = back @ np.cbrt(lms @ linear)
    return out


def seen_by_a_deuteranope(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour as somebody without green cones sees it, by Machado, Oliveira and Fernandes (2009), severity 1, in linear sRGB."""
    encoded = np.array(colour) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]) @ linear
    seen = np.clip(seen, 0, 1)
    red, green, blue = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055) * 255
    return round(red), round(green), round(blue)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("ramp", RAMPS)
def test_lightness_changes_by_nearly_equal_steps(ramp: Ramp, dark: bool) -> None:
    lightness = np.array([oklab(colour)[0] for colour in shades(ramp, dark)])
    sides = [lightness] if ramp != "balance" else [lightness[:128], lightness[128:]]
    for side in sides:
        parts = np.diff(side[:: len(side) // 8])  # eighths: single steps are rounded to 8 bits
        assert (np.sign(parts) == np.sign(parts[0])).all()
        assert abs(parts).min() > 0.45 * abs(parts).max()


@pytest.mark.parametrize("dark", [False, True])
def test_too_little_and_too_much_differ_to_colour_blind_eyes(dark: bool) -> None:
    low, high = (oklab(seen_by_a_deuteranope(shades("balance", dark)[at])) for at in (32, 223))
    assert math.dist(low, high) > 0.2


def test_what_is_well_has_the_colour_of_the_page() -> None:
    for ramp in ("heat", "amount"):
        assert oklab(shades(ramp)[0])[0] > 0.95
        assert oklab(shades(ramp, dark=True)[0])[0] < 0.25


def test_numbers_have_their_place_on_the_scale() -> None:
    values = np.array([-1, 0, 0.25, 1, 2], np.float32)
    assert shade(METRICS[0], values, 0, 1).tolist() == [0, 0, 64, 255, 255]
    assert shade(Metric("m", "", "", worst="low", group="saturation"), values, 0, 1).tolist() == [255, 255, 191, 0, 0]
    log = Metric("g", "", "", scale="log", ramp="amount", group="gradients")
    assert shade(log, np.array([0, 1e-4, 0.011, 1], np.float32), 1e-4, 1).tolist() == [0, 0, 130, 255]


def test_every_metric_is_a_number_of_a_record_or_a_weight() -> None:
    for metric in METRICS:
        assert (
            metric.name
            in {"records": RECORD_METRICS, "weights": WEIGHT_METRICS, "both": {*RECORD_METRICS} & {*WEIGHT_METRICS}, "view": ("excess",)}[metric.over]
        )
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_page_gets_all_that_it_needs_to_draw_and_print() -> None:
    found = json.loads(json.dumps(scales(), allow_nan=False))
    assert tuple(found["histogram_edges"]) == HISTOGRAM_EDGES
    assert found["percent"] == asdict(PERCENT)
    assert found["ramps"]["heat"]["dark"][3] == "#{:02x}{:02x}{:02x}".format(*shades("heat", dark=True)[3])
    for metric in found["metrics"]:
        low_end = shade(BY_NAME[metric["name"]], np.array([metric["low"] or 1e-9], np.float32), metric["low"] or 1e-9, metric["high"] or 1.0)
        assert metric["reversed"] == (low_end.tolist() == [255]), metric["name"]


def test_the_excess_is_what_is_beyond_the_normal_share_wherever_it_is_shown() -> None:
    sites = [record("relu", saturated=0.75, normal_low=0.5, normal_high=0.0), record("odd", saturated=0.25, normal_low=None, normal_high=None)]
    found = from_snapshots("run", [Snapshot(0, 0.0, tuple(sites))])
    picture = Heatmap()
    picture.add(Snapshot(0, 0.0, tuple(sites)))
    for each, expected in zip(sites, (0.25, 0.25), strict=True):
        assert each.saturated is not None
        assert each.saturated - normal_saturated(each.normal_low, each.normal_high) == expected
        assert excess(each.saturated, each.normal_low, each.normal_high) == expected
    assert found.values["excess"].tolist() == [[0.25, 0.25]]
    assert [(site, beyond) for site, _, beyond in picture._observed[0][2]] == [("relu", 0.25), ("odd", 0.25)]
    assert [site["normal_saturated"] for site in found.describe()["sites"]] == [0.5, 0.0]


def test_a_series_holds_the_numbers_of_its_snapshots() -> None:
    given = snapshots(6, sites=3)
    found = from_snapshots("run", given)
    assert found.names == ("a.act", "b.act", "c.act")
    assert found.steps.tolist() == [0, 1, 2, 3, 4, 5]
    for step, snapshot in enumerate(given):
        for at, each in enumerate(snapshot.records):
            for metric in METRICS:
                if metric.over == "records":
                    expected = getattr(each, metric.name)
                    value = found.values[metric.name][step, at]
                    assert (expected is None and math.isnan(value)) or value == pytest.approx(expected, rel=1e-6), metric.name
    assert found.values["excess"][0].tolist() == pytest.approx([known(each.saturated) - 0.0294 for each in given[0].records], abs=1e-6)


def test_a_layers_numbers_stand_at_the_sites_it_feeds_the_least_of_several() -> None:
    layers = tuple(
        Weight(name, feeds, 8, False, 0.1, 64, gain, 1.0, 0.1, ratio, 1.0, 0.5, 10)
        for name, feeds, gain, ratio in (("q", ("x",), 2.0, 1e-3), ("k", ("x", "y"), 1.0, 1e-2))
    )
    found = from_snapshots("run", [Snapshot(0, 0.0, (record("x"), record("y"), record("z")), layers)])
    assert found.values["update_ratio"][0, :2].tolist() == pytest.approx([1e-3, 1e-2])
    assert found.values["gain"][0, :2].tolist() == [1.0, 1.0]
    assert math.isnan(found.values["gain"][0, 2])


def test_sites_that_come_and_go_keep_their_place() -> None:
    assert in_order([("a", "b", "x", "c"), ("a", "b", "c")]) == ("a", "b", "x", "c")
    assert in_order([("old", "a"), ("a", "new")]) == ("old", "a", "new")
    assert in_order([]) == ()


def test_a_later_session_makes_void_what_it_repeats() -> None:
    steps, times = np.array([0.0, 1, 2, 3, 2, 3, 4]), np.array([0.0, 1, 2, 3, 10, 11, 12])
    assert [times[at] for at in last_session(steps, times)] == [0, 1, 10, 11, 12]


def test_an_alert_of_a_site_that_a_resumed_run_lacks_ends_where_the_site_does() -> None:
    def table(name: str, steps: list[int], time: float) -> tuple[Table, list[dict[str, object]]]:
        facts = {fact: getattr(record(name), fact) for fact in SITE_FACTS}
        return Table((name,), steps, [time + step for step in steps], np.ones((len(steps), len(rows_of("records")), 1), np.float32)), [facts]

    found = series("run", [table("old", list(range(0, 100, 10)), 0.0), table("new", list(range(60, 160, 10)), 1000.0)], [])
    assert found.steps.tolist() == list(range(0, 160, 10))
    (episode,) = found.told([replace(ALERT, site="old", step=20)]).alerts
    assert (episode.cleared, episode.gone) == (50, True)  # what the lost session saw from step 60 on is void


def test_an_alert_of_a_layer_stands_at_the_sites_that_the_layer_feeds() -> None:
    given = snapshots(1)
    given[0] = replace(given[0], alerts=(replace(ALERT, site="a", rule="frozen_weights"), replace(ALERT, site="nowhere")))
    described = from_snapshots("run", given).describe()
    assert [(alert["site"], alert["places"]) for alert in described["alerts"]] == [("a", ["a.act", "b.act"]), ("nowhere", [])]
    json.dumps(described, allow_nan=False)


def test_a_grid_is_packed_as_the_page_reads_it() -> None:
    grid = Grid(np.array([3.0, 5.0]), np.zeros(2), ("é", "b"), np.array([[1, 2], [3, np.nan]], np.float32))
    data = grid.pack()
    (length,) = struct.unpack_from("<I", data)
    assert (4 + length) % 8 == 0
    assert json.loads(data[4 : 4 + length]) == {"names": ["é", "b"], "count": 2}
    assert struct.unpack_from("<2d", data, 4 + length) == (3.0, 5.0)
    assert struct.unpack_from("<4f", data, 4 + length + 16)[:3] == (1.0, 2.0, 3.0)
    assert len(data) == 4 + length + 16 + 16


def test_thinning_keeps_both_ends() -> None:
    steps = np.arange(100.0)
    thin = Grid(steps, steps, ("a",), steps.astype(np.float32)[:, None]).thin(10)
    assert len(thin.steps) == 10
    assert (thin.steps[0], thin.steps[-1]) == (0, 99)
    assert thin.values[:, 0].tolist() == thin.steps.tolist()


def test_histograms_and_heads_of_one_site() -> None:
    given = snapshots(3)
    found = histograms("a.act", given)
    assert found.values.shape == (3, 49)
    assert found.values.sum() == pytest.approx(3, rel=1e-5)
    assert histograms("b.act", given).values.shape == (0, 49)
    assert heads("a.act", given).values.shape == (0, 0)


def test_what_is_not_finite_marks_only_the_numbers_that_a_site_has() -> None:
    """An activation has no entropy, and a softmax no plateau, whatever became of their elements."""
    unknown: dict[str, Any] = dict.fromkeys(("saturated", "low", "high", "relative_derivative", "stuck", "z_std", "z_mean", "zeros", "attenuation"))
    softmax: dict[str, Any] = {"kind": "softmax", **unknown, "z_std": 1.0}
    whole = Snapshot(0, 1.0, (record("act"), record("softmax", **softmax, entropy_min=0.5, logit_std=1.0)))
    broken = Snapshot(1, 2.0, (record("act", **unknown, nonfinite=8), record("softmax", **{**softmax, "z_std": None}, nonfinite=8)))
    values = {name: each[1].tolist() for name, each in from_snapshots("run", [whole, broken]).values.items()}
    assert values["saturated"][0] == values["z_std"][0] == values["attenuation"][0] == np.inf
    assert values["entropy_min"][1] == values["logit_std"][1] == values["z_std"][1] == np.inf
    assert np.isnan([values["entropy_min"][0], values["logit_std"][0], values["saturated"][1], values["stuck"][1]]).all()
