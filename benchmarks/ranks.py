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

import torch
from overhead import put, table
from workloads import machine

from torchsat.columns import BLOCK, FEATURES, MAXES, SUMS, WEIGHT
from torchsat.parts import LayerPart, Parts, SitePart, Span
from torchsat.record import LayerFacts, SiteFacts
from torchsat.rows import to_record
from torchsat.statistics import empty_row
from torchsat.transport.layout import WORST, LayerEntry, Layout, SiteEntry
from torchsat.transport.packing import Ends, Vectors, merge, pack, unpack
from torchsat.transport.windows import UnitWindows

DOCS = Path(__file__).parent.parent / "docs" / "distributed.md"
NETWORKS = ((10, 1024), (50, 1024), (50, 4096), (500, 1024), (5000, 1024))
RANKS = (8, 128, 1024, 10_000)
CPU = torch.device("cpu")
TOLD = Ends(0, 0)
"""What a rank tells the others beside its numbers: the step."""


def layout(sites: int, width: int | None) -> Layout:
    """What ranks agree on that watch `sites` layers with an activation each; without a width, the activations alone, without units."""
    names = [f"layers.{at}.act" for at in range(sites)]
    layers = {name: LayerEntry(LayerFacts(name, feeds=(name,), fan_in=width, data=False), features=width) for name in names} if width else {}
    return Layout({name: SiteEntry(facts(name, width), width) for name in names}, layers, owners=dict.fromkeys(layers, 0), shared=True)


def facts(name: str, units: int | None) -> SiteFacts:
    return SiteFacts(name, "tanh", "module", "both", False, False, (), units, normal_low=0.1, normal_high=0.1, normal_derivative=0.1)


def parts(agreed: Layout, width: int) -> Parts:
    """What one rank measured of every site and layer of a layout."""
    row, block = empty_row(CPU), torch.ones(len(BLOCK), width, dtype=torch.float64)
    row[: len(SUMS)] = 1.0
    numbers, inputs = torch.ones(len(WEIGHT), dtype=torch.float64), torch.ones(len(FEATURES), width, dtype=torch.float64)
    layers = {name: LayerPart(entry.facts, numbers, n=1, numel=1, rate=0.1, inputs=inputs, features=width) for name, entry in agreed.layers.items()}
    return Parts({name: SitePart(entry.facts, row, block, span=Span(width)) for name, entry in agreed.sites.items()}, layers)


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
        given, windows = parts(agreed, width), UnitWindows()
        packs, reads = [], []
        for _ in range(5):
            begun = time.perf_counter()
            vectors = pack(given, agreed, CPU, TOLD)
            packs.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            unpack(merge([vectors]), agreed, windows)
            reads.append(time.perf_counter() - begun)
        rows.append((f"{sites} x {width}", *(f"{1e3 * statistics.median(each):.2f} ms" for each in (packs, reads))))
    return table(("sites x width", "packing", "reading"), rows)


def simulated(ranks: int, sites: int) -> str:
    """Merge ranks whose saturated shares differ, and compare the result with the values that were put in."""
    agreed = layout(sites, None)
    drawn = torch.Generator().manual_seed(0)
    n, read, low, z, elements = (SUMS.index(name) for name in ("n", "read", "low", "z", "elements"))
    total: Vectors | None = None
    counts, saturated, sums = torch.zeros(sites, dtype=torch.int64), torch.zeros(sites, dtype=torch.int64), torch.zeros(sites, dtype=torch.float64)
    worst = torch.full((sites,), -1.0, dtype=torch.float64)
    for at in range(ranks):
        taken = torch.randint(60_000, 65_537, (sites,), generator=drawn)
        flat = (torch.rand(sites, generator=drawn) * taken).long()
        mean = torch.randn(sites, generator=drawn, dtype=torch.float64)
        rows = empty_row(CPU).repeat(sites, 1)
        rows[:, n], rows[:, read], rows[:, elements], rows[:, low], rows[:, z] = *(taken.double(),) * 3, flat.double(), mean
        given = Parts({name: SitePart(entry.facts, row) for (name, entry), row in zip(agreed.sites.items(), rows, strict=True)})
        vectors = pack(given, agreed, CPU, TOLD, rank=at, everywhere=at)
        total = merge([vectors] if total is None else [total, vectors])
        counts, saturated, sums = counts + taken, saturated + flat, sums + mean
        worst = torch.maximum((flat / taken).double(), worst)
    assert total is not None
    found = unpack(total, agreed, UnitWindows()).sites
    records = [to_record(row, 1.0, None)[0] for row in found]
    wrong = sum(
        record.n != n_ or round((record.low or 0) * record.n) != s for record, n_, s in zip(records, counts.tolist(), saturated.tolist(), strict=True)
    )
    means = max(abs((record.z_mean or 0) * record.n - s) for record, s in zip(records, sums.tolist(), strict=True))
    near = sum(row.worst is not None and abs(row.worst - w) < 1e-6 for row, w in zip(found, worst.tolist(), strict=True))
    return (
        f"{ranks} ranks x {sites} sites, simulated: {wrong} of {2 * sites} counts differ, sums of z by {means:.0e} at most, and the share of the "
        f"worst rank is found at {near} of {sites} sites. A rank's vectors had {8 * sum(each.numel() for each in total) / 1e6:.1f} MB (sites "
        f"without units or layers: {len(SUMS)} + {len(MAXES)} + {len(WORST)} numbers)."
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
