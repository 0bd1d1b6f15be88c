"""One packing for one process and for many: what is sent is what is read, and two ranks that share a batch give what one process does."""

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchsat.columns import COLUMN, HEADS, HEADS_LOSS_SCALED, MAXES, SUMS, UNITS
from torchsat.diagnosis import Diagnosis
from torchsat.judge import Judge
from torchsat.parts import LayerPart, Parts, SitePart, Span
from torchsat.record import Snapshot
from torchsat.rules import RULES
from torchsat.transport.agreement import decode, encode
from torchsat.transport.flight import Copy, Flight
from torchsat.transport.layout import ENDS, LAYER_MAXES, LAYER_SUMS, WORST, LayerEntry, Layout, SiteEntry, told
from torchsat.transport.local import Local, _by_device
from torchsat.transport.packing import Ends, Numbers, Vectors, _summary, merge, pack, unpack
from torchsat.transport.windows import UNIT_SAMPLES, UnitWindows

from .conftest import record
from .facts import layer_facts, site_facts
from .truth import known

CPU = torch.device("cpu")
NOT_SUMMED = {"elements"}


def row(**columns: float) -> Tensor:
    """A row that has these columns, and otherwise those of no element."""
    found = torch.cat([torch.zeros(len(SUMS)), torch.full((len(MAXES),), -math.inf)]).double()
    for name, value in columns.items():
        found[COLUMN[name]] = value
    return found


def measured(z: Tensor, grad: Tensor, elements: int | None = None) -> Tensor:
    """A row of the columns that can be told from z and one gradient; beyond 1 lie the plateaus."""
    return row(
        n=z.numel(),
        read=z.numel(),
        elements=z.numel() if elements is None else elements,
        low=float((z < -1).sum()),
        high=float((z > 1).sum()),
        z=float(z.sum()),
        z_sq=float(z.square().sum()),
        grad_z_n=grad.numel(),
        grad_z_read=grad.numel(),
        grad_z_sq=float(grad.square().sum()),
        peak=1.0,
        z_max=float(z.max()),
        z_min_negated=-float(z.min()),
    )


def block(z: Tensor) -> Tensor:
    """BLOCK of z [samples, units]."""
    count = torch.full((z.shape[1],), float(len(z)))
    return torch.stack([count, (z.abs() > 1).sum(0), count, z.abs().sum(0)]).double()


def features(x: Tensor, weight: float = 1.0) -> Tensor:
    """FEATURES of x [samples, features] of a call with this weight."""
    count, first, second = torch.full((x.shape[1],), float(len(x))), x.sum(0), x.square().sum(0)
    return torch.stack([weight * count, weight * first, weight * second, weight**2 * count, weight**2 * second, count]).double()


def heads(logits: Tensor) -> Tensor:
    """HEADS of logits [rows, heads], of which only some are filled."""
    count = torch.full((logits.shape[1],), float(len(logits)))
    first, second = logits.sum(0), logits.square().sum(0)
    return torch.stack([count, first, second, *[count] * 3, *[torch.zeros_like(count)] * 7, logits.amax(0)]).double()


WEIGHT = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3)


def layer(x: Tensor, grad: Tensor, **given: Any) -> LayerPart:
    learned = (0.05 * WEIGHT).square().sum()
    numbers = torch.stack(
        [
            WEIGHT.square().sum(),
            (0.1 * WEIGHT).square().sum(),
            grad.square().sum(),
            torch.tensor(2.5, dtype=torch.float64),
            learned,
            torch.tensor(4.5, dtype=torch.float64),
        ]
    )
    values = {"numbers": numbers, "n": 12, "numel": 12, "rate": 0.1, "inputs": features(x), "features": 3}
    return LayerPart(**{"facts": layer_facts(), **values, **given})


def batch(rows: slice = slice(None), **given: Any) -> Parts:
    """What one process measures that was given these rows of a batch of 24: an element-wise site, a softmax and a layer."""
    torch.manual_seed(0)
    z, grad, logits, x = (2 * torch.randn(24, columns, dtype=torch.float64) for columns in (4, 4, 2, 3))
    mean = 1 / len(z[rows])
    sites = {
        "act": SitePart(site_facts(), measured(z[rows], grad[rows] * mean), block(z[rows]), span=Span(4)),
        "soft": SitePart(
            site_facts("soft", kind="softmax", activation="softmax", units=None, after=("act",)),
            row(n=logits[rows].numel(), elements=logits[rows].numel()),
            heads=heads(logits[rows]),
            span=Span(2),
        ),
    }
    return Parts(sites, {"layer": layer(x[rows], WEIGHT)}, **given)


def sent(parts: Parts, local: Local | None = None) -> Numbers:
    local = local or Local()
    flight = local.send(3, parts)
    assert flight is not None
    assert flight.arrived()
    flight.wait(0)
    return local.read(flight)


def joined(ranks: Sequence[Parts]) -> Layout:
    texts: dict[bytes, int] = {}
    for rank, parts in enumerate(ranks):
        texts.setdefault(told(parts), rank)
    return Layout.joined({rank: text for text, rank in texts.items()})


def together(*ranks: Parts, layout: Layout | None = None, ends: Sequence[Ends] = (), windows: UnitWindows | None = None) -> Numbers:
    """What several ranks read that observe together, without a process for each."""
    layout = layout or joined(ranks)
    own_ends = ends or [Ends(3, 3)] * len(ranks)
    pairs = [pack(parts, layout, CPU, own_ends[rank], rank=rank, everywhere=10 + rank) for rank, parts in enumerate(ranks)]
    assert all((len(pair.sums), len(pair.maxes)) == (layout.places.sums, layout.places.maxes) for pair in pairs)
    return unpack(merge(pairs), layout, windows or UnitWindows())


def column(numbers: Numbers, site: str, name: str) -> float:
    (found,) = [each for each in numbers.sites if each.facts.site == site]
    return found.numbers[COLUMN[name]]


def same(one: Sequence[float], other: Sequence[float]) -> bool:
    """Bit for bit; NaN is the same as NaN."""
    return len(one) == len(other) and all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True))


def test_one_process_reads_what_it_sent_bit_for_bit() -> None:
    torch.manual_seed(0)
    numbers = torch.rand(len(COLUMN), dtype=torch.float64) * 1e6 / 3
    # Of 1000 elements 7 were read: ranks would weigh these numbers, and weighing rounds.
    numbers[COLUMN["n"]], numbers[COLUMN["elements"]] = 7, 1000
    of_layer = torch.rand(6, dtype=torch.float64) / 3
    x, logits = torch.rand(5, 3, dtype=torch.float64) / 3, torch.rand(5, 2, dtype=torch.float64) / 3
    parts = Parts(
        {"act": SitePart(site_facts(), numbers, block(torch.rand(9, 4)), heads(logits), Span(8, 4, counts=False))},
        {
            "layer": layer(x, WEIGHT, numbers=of_layer, n=7, numel=30, first=3, features=6, counts=False, input_counts=False),
            "new": layer(x, WEIGHT, facts=layer_facts("new"), numbers=torch.tensor([2.0, *[math.nan] * 5]).double(), inputs=None, rate=None),
        },
    )
    found = sent(parts)
    (site,) = found.sites
    assert same(site.numbers, numbers.tolist())
    assert (site.worst, site.worst_rank, site.nonfinite_rank) == (None, None, None)
    assert site.heads == heads(logits).tolist()
    assert site.units is not None
    assert dict(zip(UNITS, site.units, strict=True)) == {"units": 4, "units_measured": 0, "units_stuck": 0, "units_in_doubt": 0, "unit_samples": 9}
    first, second = found.layers
    assert same(first.numbers, [*of_layer.tolist(), *_summary(features(x).numpy())])
    assert (first.n, first.numel, first.learning_rate) == (7, 30, 0.1)
    assert same(second.numbers, [2.0, *[math.nan] * 8])
    assert second.learning_rate is None
    assert (found.scale, found.skipped, found.differing) == (1.0, False, ())


def test_two_halves_of_a_batch_are_the_batch() -> None:
    # The loss is the mean over a batch: data parallelism averages the gradients of two halves.
    alone, merged = sent(batch()), together(batch(slice(0, 12), averages=2.0), batch(slice(12, None), averages=2.0))
    for one, other in zip(merged.sites, alone.sites, strict=True):
        assert one.facts == other.facts
        assert one.numbers == pytest.approx(other.numbers, rel=1e-12)
        assert one.units == other.units
        assert len(one.heads) == len(other.heads)
        for of_ours, of_theirs in zip(one.heads, other.heads, strict=True):
            assert of_ours == pytest.approx(of_theirs, rel=1e-12)
    (ours,), (theirs,) = merged.layers, alone.layers
    assert ours.numbers == pytest.approx(theirs.numbers, rel=1e-12)
    assert (ours.facts, ours.n, ours.numel, ours.learning_rate) == (theirs.facts, theirs.n, theirs.numel, theirs.learning_rate)
    assert (merged.scale, merged.skipped, merged.differing) == (1.0, False, ())


def test_unequal_parts_merge_too() -> None:
    alone, merged = sent(batch()), together(batch(slice(0, 5)), batch(slice(5, None)))
    for name in ("n", "elements", "low", "high", "z", "z_sq", "z_max", "z_min_negated", "peak"):
        assert column(merged, "act", name) == pytest.approx(column(alone, "act", name), rel=1e-12), name
    assert merged.sites[0].units == alone.sites[0].units
    assert merged.layers[0].numbers == pytest.approx(alone.layers[0].numbers, rel=1e-12)


def test_sums_of_ranks_add_up_whatever_share_of_theirs_each_has_read() -> None:
    # 10 of 100 elements were read on one rank, one of them was not finite; all of 10 were read on the other.
    few = Parts({"act": SitePart(site_facts(), row(n=90, read=9, nonfinite=1, elements=100, low=90, z=180), span=Span(4))})
    many = Parts({"act": SitePart(site_facts(), row(n=10, read=10, elements=10, high=4, z=-5), span=Span(4))})
    found = together(few, many)
    expected = {"n": 100, "read": 19, "nonfinite": 1, "low": 90, "high": 4, "z": 175, "elements": 110}
    assert {name: column(found, "act", name) for name in expected} == expected


def test_what_is_read_of_an_input_stands_for_all_of_it() -> None:
    x, y = torch.tensor([[1.0, 2.0, 3.0]] * 2), torch.tensor([[-1.0, 0.0, 5.0]] * 2)
    # Of the first input 6 of 60 elements were read, of the second all 6.
    first, second = (Parts(layers={"layer": layer(x, WEIGHT, inputs=features(given, weight))}) for given, weight in ((x, 10.0), (y, 1.0)))
    n, mean_square, offset = together(first, second).layers[0].numbers[6:]
    assert n == 12
    assert mean_square == pytest.approx((10 * float(x.square().sum()) + float(y.square().sum())) / 66)
    # The mean over pairs of distinct samples, by the product of their weights.
    samples = [(10.0, x[0]), (10.0, x[1]), (1.0, y[0]), (1.0, y[1])]
    pairs = [(v * w, one * other) for (v, one), (w, other) in itertools.permutations(samples, 2)]
    expected = torch.stack([weight * product for weight, product in pairs]).sum(0) / sum(weight for weight, _ in pairs)
    assert offset == pytest.approx(float(expected.mean()), rel=1e-6)


def test_the_squared_mean_of_an_input_is_a_mean_over_pairs_of_distinct_samples() -> None:
    x = torch.tensor([[1.0, 4.0], [2.0, -2.0], [6.0, 1.0]], dtype=torch.float64)
    pairs = [x[first] * x[second] for first, second in itertools.permutations(range(len(x)), 2)]
    expected = [6, float(x.square().mean()), float(torch.stack(pairs).mean())]
    assert _summary(features(x).numpy()) == pytest.approx(expected, rel=1e-12)
    # A feature with one sample has no pair, and is left out of the last number only.
    lone = features(torch.tensor([[7.0]], dtype=torch.float64))
    assert _summary(torch.cat([features(x), lone], 1).numpy()) == pytest.approx([7, (float(x.square().sum()) + 49) / 7, expected[2]], rel=1e-12)
    assert same(_summary(lone.numpy()), [1, 49, math.nan])
    assert same(_summary(torch.zeros(6, 2, dtype=torch.float64).numpy()), [0, math.nan, math.nan])


def test_ranks_divide_by_the_loss_scale_and_one_process_says_it() -> None:
    scale = torch.tensor(1024.0)
    plain = batch()
    larger, heads = known(plain.sites["act"].row).clone(), known(plain.sites["soft"].heads).clone()
    grown = {"act": replace(plain.sites["act"], row=larger), "soft": replace(plain.sites["soft"], heads=heads)}
    larger[COLUMN["grad_z_sq"]] *= (1024 * 3) ** 2
    heads[[HEADS.index(name) for name in HEADS_LOSS_SCALED]] = 1024 * 3 * 7.0
    scaled = replace(plain, sites={**plain.sites, **grown}, scale=scale, averages=3.0)
    alone, merged = sent(scaled), together(scaled)
    assert alone.scale == 3 * 1024
    assert column(alone, "act", "grad_z_sq") == float(larger[COLUMN["grad_z_sq"]])
    assert merged.scale == 1.0
    assert [alone.sites[1].heads[HEADS.index(name)] for name in HEADS_LOSS_SCALED] == [[1024 * 3 * 7.0] * 2] * 3
    assert [merged.sites[1].heads[HEADS.index(name)] for name in HEADS_LOSS_SCALED] == [[7.0] * 2] * 3
    assert heads[HEADS.index("row_demand"), 0] == 1024 * 3 * 7
    assert column(merged, "act", "grad_z_sq") == pytest.approx(column(sent(plain), "act", "grad_z_sq"), rel=1e-12)
    assert column(merged, "act", "z_sq") == column(sent(plain), "act", "z_sq")


@pytest.mark.parametrize("factor", [math.nan, 0.0, -4.0])
def test_a_scale_that_is_none_counts_as_1(factor: float) -> None:
    assert sent(batch(scale=torch.tensor(factor), averages=2.0)).scale == 2.0


@pytest.mark.parametrize("flag", [None, 0.0, 1.0])
def test_an_overflow_on_one_rank_is_one_of_all(flag: float | None) -> None:
    skipped = None if flag is None else torch.tensor([flag])
    assert sent(batch(skipped=skipped)).skipped is (flag == 1.0)
    assert together(batch(), batch(skipped=skipped)).skipped is (flag == 1.0)


def test_nothing_ran() -> None:
    idle = Parts({"act": SitePart(site_facts(), span=Span(4))}, {"layer": LayerPart(layer_facts(), features=3)})
    assert Local().send(0, idle) is None
    # Beside a rank that ran, an idle one changes nothing.
    one, both = together(batch()), together(batch(), idle)
    for ours, theirs in zip(both.sites, one.sites, strict=True):
        assert ours.numbers == theirs.numbers
        assert ours.heads == theirs.heads
    assert [each.numbers for each in both.layers] == [each.numbers for each in one.layers]
    nobody = together(idle, idle)
    assert column(nobody, "act", "n") == 0
    assert nobody.layers == []
    assert (nobody.sites[0].worst, nobody.sites[0].worst_rank) == (None, None)
    assert together(Parts(), Parts()).sites == []


def test_a_process_sends_one_pair_for_each_device() -> None:
    whole = batch(scale=torch.tensor(8.0), skipped=torch.tensor(1.0))
    layout = Layout.of(whole)
    first = replace(whole, sites={"act": whole.sites["act"]}, layers={}, skipped=None)
    second = replace(whole, sites={"soft": whole.sites["soft"]}, scale=None)
    pairs = [pack(parts, layout, CPU, Ends(3, 3)) for parts in (first, second, Parts())]
    found, expected = unpack(merge(pairs), layout, UnitWindows()), sent(whole)
    assert [each.numbers for each in found.sites] == [each.numbers for each in expected.sites]
    assert [each.heads for each in found.sites] == [each.heads for each in expected.sites]
    assert [each.numbers for each in found.layers] == [each.numbers for each in expected.layers]
    assert (found.scale, found.skipped) == (8.0, True)


def test_everything_is_packed_on_the_device_that_it_lies_on() -> None:
    whole = batch()
    assert list(_by_device(whole, Layout.of(whole))) == [CPU]
    elsewhere, meta = torch.zeros((), device="meta"), torch.device("meta")
    spread = replace(whole, scale=elsewhere, sites={**whole.sites, "far": SitePart(site_facts("far"), torch.zeros(len(COLUMN), device="meta"))})
    found = _by_device(spread, Layout.of(spread))
    assert {device: (list(parts.sites), list(parts.layers), parts.scale) for device, parts in found.items()} == {
        CPU: (["act", "soft"], ["layer"], None),
        meta: (["far"], [], elsewhere),
    }


def test_each_rank_of_tensor_parallelism_has_its_own_units_and_heads() -> None:
    z, logits, x = torch.randn(6, 5).double(), torch.randn(6, 3).double(), torch.randn(6, 4).double()

    def part(units: slice, of_heads: slice, of_features: slice) -> Parts:
        rows = [row(n=3, read=3, elements=3)] * 2
        return Parts(
            {
                "act": SitePart(site_facts(), rows[0], block(z[:, units]), span=Span(5, units.start)),
                "soft": SitePart(
                    site_facts("soft", kind="softmax", units=None), rows[1], heads=heads(logits[:, of_heads]), span=Span(3, of_heads.start)
                ),
            },
            {"layer": layer(x[:, of_features], WEIGHT, features=4, first=of_features.start, sharded=True, numel=6, n=6)},
        )

    windows = UnitWindows()
    found = together(part(slice(0, 2), slice(0, 1), slice(0, 2)), part(slice(2, 5), slice(1, 3), slice(2, 4)), windows=windows)
    assert found.sites[0].facts.units == 5
    window = windows.get("act")
    assert window is not None
    samples, saturated, read, _ = block(z).tolist()
    assert samples == read
    # Every unit was active in some of its samples, so none is in a run.
    assert window.tolist() == [samples, pytest.approx([n - s for n, s in zip(samples, saturated, strict=True)]), [0.0] * 5, [0.0] * 5]
    assert found.sites[1].heads == heads(logits).tolist()
    (of_layer,) = found.layers
    assert (of_layer.n, of_layer.numel) == (12, 12)
    assert of_layer.numbers[0] == pytest.approx(2 * float(WEIGHT.square().sum()))
    assert of_layer.numbers[3] == 2.5
    assert of_layer.numbers[6:] == pytest.approx(_summary(features(x).numpy()))


def test_what_another_rank_counts_is_left_out() -> None:
    whole = batch()
    repeated = replace(
        whole,
        sites={name: replace(part, span=replace(part.span, counts=False)) for name, part in whole.sites.items()},
        layers={"layer": replace(whole.layers["layer"], counts=False, input_counts=False, sharded=True)},
    )
    found, expected = together(whole, repeated), together(whole)
    assert [each.numbers for each in found.sites] == [each.numbers for each in expected.sites]
    assert found.layers[0].n == 12
    assert found.layers[0].numbers == expected.layers[0].numbers


def test_one_rank_speaks_for_a_weight_that_all_hold() -> None:
    found = together(batch(), batch(), batch())
    assert (found.layers[0].n, found.layers[0].numel) == (12, 12)
    assert found.layers[0].numbers[0] == float(WEIGHT.square().sum())
    assert found.differing == ()
    other = batch()
    changed = replace(other.layers["layer"], numbers=known(other.layers["layer"].numbers) * 1.1)
    assert together(batch(), replace(other, layers={"layer": changed})).differing == ("layer",)
    # Parts of one weight differ, of course.
    halves = [replace(parts, layers={"layer": replace(each, sharded=True)}) for parts, each in ((batch(), batch().layers["layer"]), (other, changed))]
    assert together(*halves).differing == ()


def test_the_part_of_a_weight_that_was_read_stands_for_all_of_it() -> None:
    def part(square: float, n: int, numel: int) -> Parts:
        numbers = torch.tensor([square, math.nan, 2 * square, square, math.nan, math.nan]).double()
        return Parts(layers={"layer": LayerPart(layer_facts(), numbers, n, numel, sharded=True)})

    (found,) = together(part(8.0, 2, 10), part(3.0, 3, 3)).layers
    # 8 of 2 elements are 40 of 10, and 3 are 3: 43 of 13 elements, of which 5 were read.
    assert (found.n, found.numel) == (5, 13)
    assert found.numbers[0] == pytest.approx(43 * 5 / 13)
    assert math.isnan(found.numbers[1])
    assert found.numbers[2] == pytest.approx(2 * 43 * 5 / 13)
    # The unevenness of the parts of a weight is that of the most uneven one.
    assert found.numbers[3] == 8.0
    assert all(math.isnan(each) for each in found.numbers[4:])


def test_a_learning_rate_that_only_the_device_knows_travels_with_the_numbers() -> None:
    whole = batch()
    rated = replace(whole.layers["layer"], rate=torch.tensor(0.25))
    parts = replace(whole, layers={"plain": replace(rated, facts=layer_facts("plain"), rate=0.5), "layer": rated})
    assert [each.learning_rate for each in sent(parts).layers] == [0.5, 0.25]
    assert [each.learning_rate for each in together(parts).layers] == [0.5, 0.25]


def test_a_norm_that_overflowed_on_one_rank_has_overflowed_on_all() -> None:
    whole = batch()
    part = replace(whole.layers["layer"], sharded=True)
    bad = replace(part, numbers=known(part.numbers).clone().index_fill_(0, torch.tensor([2]), math.inf))
    (found,) = together(replace(whole, layers={"layer": part}), replace(whole, layers={"layer": bad})).layers
    assert found.numbers[2] == math.inf
    assert all(math.isfinite(found.numbers[at]) for at in (0, 1, 4))


def test_the_worst_rank_is_named_as_people_know_it() -> None:
    def part(**columns: float) -> Parts:
        return Parts({"act": SitePart(site_facts(), row(**columns), span=Span(4))})

    found = together(part(n=10, elements=10, low=1), part(n=10, elements=11, low=3, high=4, nonfinite=1), part(n=10, elements=37, nonfinite=5))
    (site,) = found.sites
    assert site.worst == pytest.approx(0.7, abs=2e-6)
    assert (site.worst_rank, site.nonfinite_rank) == (11, 12)


def test_ranks_tell_each_other_step_interval_and_change() -> None:
    found = together(Parts(), Parts(), Parts(), ends=[Ends(4, 4, 50, earliest=9), Ends(6, 6, 200, changed=True), Ends(5, 5, 100)])
    assert found.ends == Ends(4, 6, 200, changed=True, earliest=9)
    assert together(Parts(), Parts()).ends == Ends(3, 3, 1, changed=False)


def test_layouts_join() -> None:
    first = Parts(
        {"a": SitePart(site_facts("a", after=("x",), losses=("mse_loss",)), span=Span(4)), "b": SitePart(site_facts("b"), span=Span(4))},
        {"l": LayerPart(layer_facts("l", feeds=("a",)), features=3), "m": LayerPart(layer_facts("m"), features=3)},
    )
    second = Parts(
        {
            "a": SitePart(site_facts("a", after=("y", "x"), losses=("square",)), span=Span(4)),
            "b": SitePart(site_facts("b"), span=Span(5)),
            "c": SitePart(site_facts("c")),
        },
        {
            "m": LayerPart(layer_facts("m"), features=2),
            "l": LayerPart(layer_facts("l", feeds=("b", "a")), features=3),
            "n": LayerPart(layer_facts("n")),
        },
    )
    layout = joined([first, first, second])
    assert layout.shared
    assert list(layout.sites) == ["a", "b", "c"]
    assert layout.sites["a"] == SiteEntry(site_facts("a", after=("x", "y"), losses=("mse_loss", "square")), 4)
    # Ranks disagree about the units of b, and c has no fixed number of them.
    assert layout.sites["b"] == SiteEntry(site_facts("b", units=None), None)
    assert layout.sites["c"] == SiteEntry(site_facts("c", units=None), None)
    assert layout.layers["l"] == LayerEntry(layer_facts("l", feeds=("a", "b")), 3)
    assert layout.layers["m"].features == 0
    assert layout.owners == {"l": 0, "m": 0, "n": 2}
    json.loads(told(first))


def test_a_stage_follows_what_leaves_the_stage_before() -> None:
    def stage(number: int, *names: str, leaves: str = "") -> Parts:
        return Parts(
            {name: SitePart(site_facts(name, output=name == leaves), span=Span(4), stage=number, leaves=name == leaves) for name in names},
            {f"layer{number}": LayerPart(layer_facts(f"layer{number}"), stage=number)},
        )

    layout = joined([stage(1, "c", leaves="c"), stage(0, "a", "b", leaves="b"), stage(2, "d")])
    assert [(name, entry.facts.after, entry.facts.output) for name, entry in layout.sites.items()] == [
        ("a", (), False),
        ("b", (), False),
        ("c", ("b",), False),
        ("d", ("c",), False),
    ]
    assert list(layout.layers) == ["layer0", "layer1", "layer2"]


def test_the_formula_of_the_docs_is_what_is_sent() -> None:
    site, softmax = SiteEntry(site_facts(), 30), SiteEntry(site_facts(kind="softmax", units=None), None, 4)
    entry = LayerEntry(layer_facts(), 20)
    layout = Layout({"a": site, "b": site, "c": softmax}, {"l": entry, "m": entry}, {}, shared=True)
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    (formula,) = re.findall(r"^    8 bytes x \((.*)\)$", text, re.MULTILINE)
    sizes = {"sites": 3, "units": 60, "heads": 4, "layers": 2, "features": 40}
    assert 8 * eval(formula.replace("x", "*"), sizes) == layout.bytes
    assert (len(SUMS), len(MAXES), len(WORST), len(LAYER_SUMS), len(LAYER_MAXES), len(ENDS)) == (76, 5, 2, 9, 5, 6)


def samples(count: int, saturated: int = 0, units: int = 4) -> Tensor:
    return torch.tensor([[count] * units, [saturated] * units, [count] * units, [count] * units]).double()


def test_what_is_known_of_units_lasts_as_long_as_there_are_as_many() -> None:
    windows = UnitWindows()
    assert windows.add("a", samples(60).numpy()) == [4, 0, 0, 0, 60]
    assert windows.add("a", samples(5).numpy()) == [4, 4, 0, 0, 65]
    assert windows.add("b", samples(UNIT_SAMPLES, UNIT_SAMPLES).numpy()) == [4, 4, 4, 0, UNIT_SAMPLES]
    assert windows.add("a", samples(3, units=5).numpy()) == [5, 0, 0, 0, 3]
    windows.drop("a")
    assert windows.add("a", samples(7, units=5).numpy()) == [5, 0, 0, 0, 7]
    windows.keep({"a": 5, "b": None})
    assert windows.add("a", samples(1, units=5).numpy()) == [5, 0, 0, 0, 8]
    assert windows.add("b", samples(1).numpy()) == [4, 0, 0, 0, 1]
    windows.start_over()
    assert windows.add("a", samples(1, units=5).numpy()) == [5, 0, 0, 0, 1]


def test_a_window_is_not_changed_by_what_was_added_to_it() -> None:
    windows, given = UnitWindows(), samples(3)
    windows.add("a", given.numpy())
    windows.add("a", samples(4).numpy())
    assert torch.equal(given, samples(3))


def test_the_windows_of_one_process() -> None:
    local = Local()

    def observe(block: Tensor | None, generation: int = 0, ran: bool = True) -> float | None:
        part = SitePart(site_facts(), row(n=1, elements=1) if ran else None, block)
        other = SitePart(site_facts("other"), row(n=1, elements=1))
        found = sent(Parts({"act": part, "other": other}, generation=generation), local)
        by_name = {each.facts.site: each.units for each in found.sites}
        assert by_name["other"] is None
        units = by_name.get("act")
        return None if units is None else units[-1]

    assert observe(samples(5)) == 5
    assert observe(samples(5)) == 10
    # It did not run: its window is kept.
    assert observe(None, ran=False) is None
    assert observe(samples(5)) == 15
    # It ran and has units no more.
    assert observe(None) is None
    assert observe(samples(5)) == 5
    # Another model.
    assert observe(samples(5), generation=1) == 5
    assert observe(samples(5), generation=1) == 10


class Work:
    """A collective: completed or not, or failed."""

    def __init__(self, completed: bool = True, error: Exception | None = None) -> None:
        self.completed, self.error = completed, error

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        if self.error is not None:
            raise self.error


def flight(*works: Work) -> tuple[Flight, list[str]]:
    reasons: list[str] = []
    merged, mine = (Copy(Vectors(torch.tensor([value]), torch.tensor([value])), None) for value in (7.0, 1.0))
    return Flight(3, 0.0, Layout(), [merged], works, [mine], give_up=reasons.append), reasons


def test_a_flight_arrives_with_the_last_collective() -> None:
    late = Work(completed=False)
    found, reasons = flight(Work(), late)
    assert not found.arrived()
    late.completed = True
    assert found.arrived()
    found.wait()
    assert float(found.merged().sums) == 7
    assert not reasons


def test_what_never_arrives_is_replaced_by_the_own_numbers() -> None:
    found, reasons = flight(Work(), Work(completed=False))
    found.wait(0.01)
    assert found.failed
    assert found.arrived()
    assert float(found.merged().sums) == 1
    assert reasons == ["nothing was heard of them for 0.01 s"]
    found, reasons = flight(Work(error=RuntimeError("connection closed\nat 0x1")))
    assert found.arrived()
    assert float(found.merged().maxes) == 1
    assert reasons == ["connection closed"]


def test_what_is_remembered_comes_through_json() -> None:
    judge, diagnosis = Judge(RULES), Diagnosis()
    for step in range(8):
        bad = record("1", saturated=0.9, low=0.5, high=0.4, z_mean=math.inf, a_mean=math.nan, after=("0",), histogram=(0.25, 0.75))
        snapshot = Snapshot(step, 1.5e9 + step / 3, (record("0"), bad))
        diagnosis.judge(judge.judge(snapshot), judge.firing, snapshot)
    assert diagnosis.firing
    history = {"stuck": {"0": [1 / 3, 1000]}, "judge": judge.state_dict(), "diagnosis": diagnosis.state_dict()}
    came = decode(encode(history))
    other_judge, other_diagnosis = Judge(RULES), Diagnosis()
    other_judge.load_state_dict(came["judge"])
    other_diagnosis.load_state_dict(came["diagnosis"])
    assert repr(other_judge.state_dict()) == repr(judge.state_dict())
    assert repr(other_diagnosis.state_dict()) == repr(diagnosis.state_dict())
    assert other_diagnosis.firing == diagnosis.firing
    assert came["stuck"] == {"0": (1 / 3, 1000)}
