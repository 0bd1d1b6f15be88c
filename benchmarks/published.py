"""How torchsat does on networks whose trained weights were published: `python benchmarks/published.py [NAME...] [--steps 50] [--every 50]`.

Ten networks whose weights ship inside packages are built, checked by what they compute, and trained on for 50 steps under `torchsat.watch`, as a user
would who fine-tunes them. Names are parts of those in the table (`crepe`, `minilm`); without any, all run. Of each network it prints what is seen and
what is not, and which alerts are raised. The saturated share and the mean derivative of each activation are compared with those that a copy of the
network in float64 has over all elements of the same batch (published_direct.py).

The exit status is 1 if a function that torchsat's table has is measured under another name or not at all and nothing says so, if an alert advises to
draw weights anew that were published, if a share or a mean derivative is off by more than 4 standard errors, or if a package is missing.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass, field

import published_matter
import published_sound
import published_text
import torch
from overhead import table
from published_direct import Site, direct, doubled
from published_networks import Network, NotInstalledError, Task

import torchsat

NETWORKS: tuple[Network, ...] = (*published_text.NETWORKS, *published_sound.NETWORKS, *published_matter.NETWORKS)
STEPS = 50
DRAWING = ("nn.init.", "nitialis", "draw ", "set the bias of", "with He")
"""What stands in a remedy that draws weights anew."""
SURE = 4.0
"""A number may be off by this many standard errors of what is read of it."""
ROUNDING = 2e-4
"""By how much a share or a relative derivative may be off without sampling: the rounding of float32 at the edge of a tail."""


@dataclass
class Outcome:
    """What was found of one network."""

    network: Network
    task: Task
    seconds: float = 0.0
    snapshots: list[torchsat.Snapshot] = field(default_factory=list)
    alerts: list[torchsat.Alert] = field(default_factory=list)
    unseen: tuple[tuple[str, str], ...] = ()
    anonymous: list[str] = field(default_factory=list)
    unaccounted: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    checked: int = 0
    worst: float = 0.0
    """The largest difference of a saturated share from the direct computation."""
    worst_derivative: float = 0.0

    @property
    def advises(self) -> list[str]:
        """The alerts that advise to draw weights anew."""
        remedies = [(alert, cause) for alert in self.alerts for cause in alert.causes]
        return [f"{alert.site}: {cause.name}: {cause.remedy}" for alert, cause in remedies if any(word in cause.remedy for word in DRAWING)]

    @property
    def passed(self) -> bool:
        return not (self.anonymous or self.unaccounted or self.wrong or self.advises)


def train(network: Network, steps: int, every: int, sample: int | None = 65536) -> Outcome:
    """Fine-tune a network under torchsat, and compare two of the observations with the direct computation."""
    task = network.build()
    outcome, began = Outcome(network, task), time.perf_counter()
    monitor = torchsat.watch(task.model, every=every, budget=None, sample=sample, sinks=(outcome.snapshots.append,), on_alert=outcome.alerts.append)
    compared = {0, max(step for step in range(steps) if step % every == 0 or step & (step - 1) == 0)}
    found: dict[int, tuple[dict[str, Site], set[str]]] = {}
    for step in range(steps):
        batch = task.batch(step)
        if step in compared:
            monitored = copy.deepcopy(task.model)
            found[step] = direct(monitored, lambda twin, batch=batch: task.loss(twin, doubled(batch)))  # type: ignore[misc]
        task.optimizer.zero_grad()
        task.loss(task.model, batch).backward()
        task.optimizer.step()
    monitor.close()
    outcome.seconds = time.perf_counter() - began
    outcome.unseen = monitor.coverage.unseen
    for snapshot in outcome.snapshots:
        if snapshot.step in found:
            compare(outcome, snapshot, *found[snapshot.step])
    return outcome


def compare(outcome: Outcome, snapshot: torchsat.Snapshot, sites: dict[str, Site], softmaxes: set[str]) -> None:
    """Hold each record against the site that was computed directly."""
    records = {record.site: record for record in snapshot.records}
    named = {place for place, _ in outcome.unseen}
    for place, site in sites.items():
        path, _, _ = place.rpartition("/")
        # The site of a module has the path of the module, that of a call directly in the model has none.
        known = next((records[each] for each in (place, place.lstrip("/"), path) if each in records), None)
        if known is None:
            if not named & {place, place.lstrip("/"), path, path.rpartition(".")[0]}:
                outcome.unaccounted.append(place)
            continue
        if known.activation != site.name:
            outcome.anonymous.append(f"{known.site}: {site.name} is called {known.activation}")
            continue
        if known.elements != site.elements:
            outcome.wrong.append(f"{known.site}: {known.elements} elements instead of {site.elements}")
            continue
        judge(outcome, known, site)


def judge(outcome: Outcome, record: torchsat.Record, site: Site) -> None:
    """Compare the share and the mean derivative of one activation."""
    n, rest = max(1, record.n), 1 - record.n / max(1, record.elements)
    share, mean = site.share, site.mean
    outcome.checked += 1
    if share is not None:
        off = math.inf if record.saturated is None else abs(record.saturated - share)
        outcome.worst = max(outcome.worst, off)
        if off > SURE * math.sqrt(share * (1 - share) / n * rest) + ROUNDING + site.edge / site.elements:
            outcome.wrong.append(f"{record.site}: saturated {record.saturated} instead of {share:.5f} ({record.n} of {record.elements} read)")
    off = math.inf if record.derivative is None else abs(record.derivative - mean)
    outcome.worst_derivative = max(outcome.worst_derivative, off)
    variance = max(0.0, site.derivative_sq / max(1, site.elements) - mean * mean)
    if off > SURE * math.sqrt(variance / n * rest) + ROUNDING * max(1.0, mean):
        outcome.wrong.append(f"{record.site}: mean derivative {record.derivative} instead of {mean:.5f} ({record.n} of {record.elements} read)")


def row(outcome: Outcome) -> tuple[str, ...]:
    last = outcome.snapshots[-1]
    return (
        outcome.network.name,
        f"{sum(parameter.numel() for parameter in outcome.task.model.parameters()):,}",
        str(len(last.records)),
        str(len(outcome.anonymous)),
        str(len(outcome.unseen)),
        str(len(outcome.unaccounted)),
        str(len(last.weights)),
        str(sum(alert.firing for alert in outcome.alerts)),
        str(len(outcome.advises)),
        f"{outcome.checked}, {len(outcome.wrong)} off",
        f"{outcome.worst:.4f}",
        f"{outcome.worst_derivative:.4f}",
    )


HEAD = (
    "network",
    "parameters",
    "sites",
    "anonymous",
    "unseen, named",
    "unseen, not named",
    "weights",
    "alerts",
    "that draw anew",
    "activations checked",
    "share off by at most",
    "derivative off by at most",
)


def main(chosen: tuple[Network, ...] = NETWORKS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of the name of a network")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=50)
    given = parser.parse_args()
    wanted = [each for each in chosen if not given.names or any(name.lower() in each.name.lower() for name in given.names)]
    if not wanted:
        parser.error(f"none is named so; there are {', '.join(each.name for each in chosen)}")
    torch.set_num_threads(1)
    outcomes, missing = [], []
    for network in wanted:
        try:
            outcome = train(network, given.steps, given.every)
        except NotInstalledError as error:
            missing.append(str(error))
            print(f"{network.name}: not installed: {error}\n", flush=True)
            continue
        outcomes.append(outcome)
        print(f"{network.name} ({network.package}): {outcome.task.verified}; {given.steps} steps in {outcome.seconds:.0f} s")
        for title, lines in (
            ("anonymous", outcome.anonymous),
            ("not seen and not named", outcome.unaccounted),
            ("off", outcome.wrong),
            ("unseen", [f"{place}: {reason}" for place, reason in outcome.unseen]),
            ("advises to draw anew", outcome.advises),
            ("alert", [f"{each.message}; {each.causes[0].name if each.causes else 'no cause'}" for each in outcome.alerts if each.firing]),
        ):
            for line in dict.fromkeys(lines):
                print(f"  {title}: {line}")
        print(flush=True)
    if outcomes:
        print(table(HEAD, [row(outcome) for outcome in outcomes]))
    if missing:
        print("\nto install what is missing: " + " && ".join(missing))
    sys.exit(0 if not missing and all(outcome.passed for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
