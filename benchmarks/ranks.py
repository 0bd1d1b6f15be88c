"""What an observation costs in a job of many ranks: `python benchmarks/ranks.py [--latency 10e-6] [--bandwidth 25e9] [--write]`.

The networks have many layers of one width, each with an activation. There are three parts:

- Computed: the bytes that a rank gives to the two all-reduces of an observation follow from the layout that the ranks agree on. Their time follows
  from the latency and the bandwidth of the network, by the usual formula for a tree: 2 log2(R) x latency + 2 x bytes / bandwidth.
- Measured: the milliseconds for packing the vectors on the training thread, and for reading them on the host.
- Simulated: the packed vectors of 10,000 ranks are merged as the collectives merge them. The counts, the means and the worst rank are compared with
  the values that were put in.

`--write` puts the tables into docs/distributed.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from overhead import put, table
from torch import Tensor
from torchsat.ranks import LayerPart, Layout, Ranks, Round, SitePart
from workloads import machine

from torchsat.columns import COLUMN, MAXES, SUMS, WEIGHT
from torchsat.record import SITE_FACTS, SiteFacts
from torchsat.rows import SiteRow, to_record
from torchsat.statistics import empty_row

DOCS = Path(__file__).parent.parent / "docs" / "distributed.md"
NETWORKS = ((10, 1024), (50, 1024), (50, 4096), (500, 1024), (5000, 1024))
RANKS = (8, 128, 1024, 10_000)
CPU = torch.device("cpu")


def facts(name: str, units: int | None) -> dict[str, Any]:
    values = {"site": name, "activation": "tanh", "kind": "module", "tails": "both", "output": False, "gate": False, "after": (), "units": units}
    normal = dict.fromkeys(("normal_low", "normal_high", "normal_derivative"), 0.1)
    return {**dict.fromkeys(SITE_FACTS), **values, **normal, "heads": None}


def layer_facts(name: str, features: int) -> dict[str, Any]:
    return {"name": name, "feeds": (name,), "fan_in": features, "data": False, "features": features}


def layout(sites: int, width: int | None) -> Layout:
    names = [f"layers.{at}.act" for at in range(sites)]
    layers = {name: layer_facts(name, width) for name in names} if width else {}
    return Layout({name: facts(name, width) for name in names}, layers, dict.fromkeys(layers, 0))


def alone(agreed: Layout, rank: int = 0) -> Ranks:
    """The `Ranks` of one rank with this layout, made without any communication."""
    made = Ranks.__new__(Ranks)
    made.rank, made.everywhere, made.size, made.layout = rank, rank, 1, agreed
    made._device, made._windows, made._told, made.together = CPU, {}, {}, False
    return made


def parts(agreed: Layout, width: int) -> tuple[dict[str, SitePart], dict[str, LayerPart]]:
    row, block = empty_row(CPU), torch.ones(2, width, dtype=torch.float64)
    row[: len(SUMS)] = 1.0
    numbers, inputs = torch.ones(len(WEIGHT), dtype=torch.float64), torch.ones(3, width, dtype=torch.float64)
    sites = {name: SitePart(told, row, block, None) for name, told in agreed.sites.items()}
    return sites, {name: LayerPart(told, numbers, inputs, 1, 1, 0.1, input_elements=width) for name, told in agreed.layers.items()}


def on_paper(latency: float, bandwidth: float) -> str:
    rows = []
    for sites, width in NETWORKS:
        agreed = layout(sites, width)
        gradients = sites * width * (width + 1) * 4
        times = [2 * math.log2(ranks) * latency + 2 * agreed.bytes / bandwidth for ranks in RANKS]
        share = f"{100 * agreed.bytes / gradients:.2f} %"
        rows.append((f"{sites} x {width}", f"{agreed.bytes / 1e6:.2f} MB", share, *(f"{1e3 * each:.2f} ms" for each in times)))
    return table(("sites x width", "per observation", "of the gradients", *(f"{ranks} ranks" for ranks in RANKS)), rows)


def measured() -> str:
    rows = []
    for sites, width in NETWORKS:
        agreed = layout(sites, width)
        rank, given = alone(agreed), parts(agreed, width)
        packs, reads = [], []
        for _ in range(5):
            begun = time.perf_counter()
            vectors = rank._pack(0, *given, 1.0, 1, False, None)
            packs.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            rank.read(Round(0, 0, 0.0, agreed, vectors, vectors, [], None, print))
            reads.append(time.perf_counter() - begun)
        rows.append((f"{sites} x {width}", *(f"{1e3 * statistics.median(each):.2f} ms" for each in (packs, reads))))
    return table(("sites x width", "packing", "reading"), rows)


def simulated(ranks: int, sites: int) -> str:
    """Merge ranks whose saturated shares differ, and compare the result with the values that were put in."""
    agreed = layout(sites, None)
    drawn = torch.Generator().manual_seed(0)
    n, low, z, elements = (SUMS.index(name) for name in ("n", "low", "z", "elements"))
    total: list[Tensor] = []
    counts, saturated, sums = torch.zeros(sites, dtype=torch.int64), torch.zeros(sites, dtype=torch.int64), torch.zeros(sites, dtype=torch.float64)
    worst, where = torch.full((sites,), -1.0, dtype=torch.float64), torch.zeros(sites, dtype=torch.int64)
    for at in range(ranks):
        taken = torch.randint(60_000, 65_537, (sites,), generator=drawn)
        flat = (torch.rand(sites, generator=drawn) * taken).long()
        mean = torch.randn(sites, generator=drawn, dtype=torch.float64)
        table_ = empty_row(CPU).repeat(sites, 1)
        table_[:, n], table_[:, elements], table_[:, low], table_[:, z] = taken.double(), taken.double(), flat.double(), mean
        rows = {name: SitePart(told, row, None, None) for (name, told), row in zip(agreed.sites.items(), table_, strict=True)}
        vectors = alone(agreed, at)._pack(0, rows, {}, 1.0, 1, False, None)
        if total:
            total[0] += vectors[0]
            torch.maximum(total[1], vectors[1], out=total[1])
        else:
            total = vectors
        counts, saturated, sums = counts + taken, saturated + flat, sums + mean
        share = flat / taken
        where, worst = torch.where(share > worst, at, where), torch.maximum(share.double(), worst)
    found = alone(agreed).read(Round(0, 0, 0.0, agreed, total, total, [], None, print)).sites
    records = [to_record(SiteRow(SiteFacts(**told), row[: len(COLUMN)]), 1.0, None)[0] for told, row, _ in found]
    wrong = sum(
        record.n != n_ or round((record.low or 0) * record.n) != s for record, n_, s in zip(records, counts.tolist(), saturated.tolist(), strict=True)
    )
    means = max(abs((record.z_mean or 0) * record.n - s) for record, s in zip(records, sums.tolist(), strict=True))
    near = sum(abs(extra["worst"] - w) < 1e-6 for (_, _, extra), w in zip(found, worst.tolist(), strict=True))
    return (
        f"{ranks} ranks x {sites} sites, simulated: {wrong} of {2 * sites} counts differ, sums of z by {means:.0e} at most, and the share of the "
        f"worst rank is found at {near} of {sites} sites. A rank's vectors had {8 * sum(each.numel() for each in total) / 1e6:.1f} MB (sites "
        f"without units or layers: {len(SUMS) + 1} + {len(MAXES)} + 2 numbers)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds per hop")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="bytes per second and rank")
    parser.add_argument("--ranks", type=int, default=10_000)
    parser.add_argument("--sites", type=int, default=5_000)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    text = "\n\n".join(
        [
            f"Per rank and observation, on paper, with {1e6 * given.latency:g} us per hop and {given.bandwidth / 1e9:g} GB/s:",
            on_paper(given.latency, given.bandwidth),
            f"On the host ({machine(CPU)}):",
            measured(),
            simulated(given.ranks, given.sites),
        ]
    )
    print(text)
    if given.write:
        put(text, "ranks", DOCS)


if __name__ == "__main__":
    main()
