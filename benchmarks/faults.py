"""How often the alerts are right: in trainings whose fault is known, and in healthy ones that look like them.

    python benchmarks/faults.py                            all scenarios: a table for each of the three groups
    python benchmarks/faults.py --group first second --seeds 0 1 2
                                                           only those written blindly, with three seeds
    python benchmarks/faults.py --only NAME ...            those whose names contain one of these, with scores, alerts and causes of each run
    python benchmarks/faults.py --steps 20 ...             only so many steps of each: to see that everything runs
    python benchmarks/faults.py ... --keep FILE            keep the runs, to judge them again later
    python benchmarks/faults.py --write FILE ...           put the tables of kept runs into docs/alerts.md

The scenarios stand in faults_*.py, with their sources. Those of faults_strange*.py, and later those of faults_losses*.py and faults_everyday*.py,
were written blindly: without sight of the rules, when the limits had been tuned on all others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import faults_adversaries
import faults_agents
import faults_attention
import faults_depth
import faults_everyday
import faults_everyday_sound
import faults_finetuning
import faults_inputs
import faults_losses
import faults_losses_sound
import faults_outputs
import faults_probabilities
import faults_rates
import faults_sequences
import faults_sound
import faults_strange
import faults_strange_sound
import faults_stranger
import torch
from faults_runs import Run, Scenario, run
from other_rules import OTHERS
from overhead import put

import torchsat
from torchsat.diagnosis import Diagnosis
from torchsat.judge import Judge

TUNED: tuple[Scenario, ...] = (
    *faults_adversaries.SCENARIOS,
    *faults_agents.SCENARIOS,
    *faults_attention.SCENARIOS,
    *faults_depth.SCENARIOS,
    *faults_finetuning.SCENARIOS,
    *faults_inputs.SCENARIOS,
    *faults_outputs.SCENARIOS,
    *faults_probabilities.SCENARIOS,
    *faults_rates.SCENARIOS,
    *faults_sequences.SCENARIOS,
    *faults_sound.SCENARIOS,
)
FIRST: tuple[Scenario, ...] = (*faults_strange.SCENARIOS, *faults_strange_sound.SCENARIOS, *faults_stranger.SCENARIOS)
SECOND: tuple[Scenario, ...] = (
    *(*faults_losses.SCENARIOS, *faults_losses_sound.SCENARIOS),
    *(*faults_everyday.SCENARIOS, *faults_everyday_sound.SCENARIOS),
)
GROUPS: Mapping[str, tuple[str, tuple[Scenario, ...]]] = {
    "second": ("Written last, without sight of the rules", SECOND),
    "first": ("Written before that, without sight of the rules", FIRST),
    "tuned": ("The limits were tuned on these", TUNED),
}
"""The titles and the scenarios of the three tables. What the runs of a group showed when they were run first is in docs/alerts.md; some rules have
been changed since by what they showed, so that no group is unseen any more."""
SCENARIOS: tuple[Scenario, ...] = (*TUNED, *FIRST, *SECOND)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
HEALTHY = "healthy"
PAGE = Path(__file__).parent.parent / "docs" / "alerts.md"


def verdicts(snapshots: Iterable[torchsat.Snapshot]) -> list[torchsat.Alert]:
    """The alerts that a monitor with the default rules raises in a run."""
    judge, diagnosis = Judge(), Diagnosis()
    told = [diagnosis.judge(judge.judge(snapshot), judge.firing, snapshot) for snapshot in snapshots]
    return [alert for alerts in told for alert in alerts if alert.firing]


def one(job: tuple[str, bool, int, int | None]) -> Run:
    """Run one training, by the name of its scenario."""
    name, faulty, seed, steps = job
    return run(BY_NAME[name], faulty, seed, steps)


def jobs(scenarios: Iterable[Scenario], seeds: Sequence[int], steps: int | None) -> list[tuple[str, bool, int, int | None]]:
    """Every scenario without its fault, and with it, with each seed."""
    return [
        (scenario.name, faulty, seed, steps)
        for scenario in scenarios
        for seed in seeds
        for faulty in ((False, True) if scenario.causes else (False,))
    ]


@dataclass
class Score:
    """Counts over the runs of one kind of fault."""

    runs: int = 0
    found: int = 0
    """Runs with an alert."""
    right: int = 0
    """Runs whose first alert names a right cause first."""
    steps: list[int] = field(default_factory=list)
    """The step of the first alert of each run that has one."""

    def add(self, told: Sequence[torchsat.Alert], causes: Sequence[str]) -> None:
        self.runs += 1
        if told:
            self.found += 1
            self.right += any(cause.name in causes for cause in told[0].causes[:1])
            self.steps.append(told[0].step)

    def __str__(self) -> str:
        if not self.found:
            return f"{self.runs:5} {0:7.3f}"
        return f"{self.runs:5} {self.found / self.runs:7.3f} {self.right / self.found:11.3f} {statistics.median(self.steps):13.0f}"


def is_sound(runs: Sequence[Run], each: Run) -> bool:
    """Whether a run is what it is said to be: healthy, or harmed against the run of the same seed without the fault."""
    scenario = BY_NAME[each.scenario]
    if not each.faulty:
        return each.score >= scenario.good
    twin = next(other for other in runs if (other.scenario, other.seed, other.faulty) == (each.scenario, each.seed, False))
    return each.score <= twin.score - scenario.harm and each.score < twin.score


def evaluate(runs: Sequence[Run]) -> None:
    """Print the tables for these runs."""
    sound = [each for each in runs if is_sound(runs, each)]
    for title, snapshots_of in (("every=10", lambda each: each.often), ("the defaults", lambda each: each.seldom)):
        _print_table(title, sound, snapshots_of)
    faulty, healthy = ([each for each in sound if each.faulty is which] for which in (True, False))
    print(f"\n{len(runs) - len(sound)} runs were not what they are said to be and are left out")
    print("\nother rules             recall  healthy runs with an alert")
    for name in OTHERS:
        recall, false = (sum(name in each.others for each in group) / max(1, len(group)) for group in (faulty, healthy))
        print(f"{name:22} {recall:7.3f} {false:7.3f}")


def _print_table(title: str, sound: Sequence[Run], snapshots_of: Callable[[Run], Sequence[torchsat.Snapshot]]) -> None:
    scores = scores_of(sound, snapshots_of)
    false = [(each, alert) for each in sound if not each.faulty for alert in verdicts(snapshots_of(each))[:1]]
    print(f"\n{title:24} runs  recall  right cause  steps to tell")
    for kind, score in sorted(scores.items(), key=lambda pair: (pair[0] == HEALTHY, pair[0] == "all", pair[0])):
        print(f"{kind:23} {score}")
    for each, alert in false:
        print(f"false: {each.scenario} {each.seed}: {alert.rule} at {alert.site}, {alert.value:.3g} against {alert.threshold:.3g}, step {alert.step}")


def scores_of(sound: Iterable[Run], snapshots_of: Callable[[Run], Sequence[torchsat.Snapshot]]) -> dict[str, Score]:
    """The counts of each kind of fault, of all faults, and of the healthy runs."""
    scores: dict[str, Score] = defaultdict(Score)
    for each in sound:
        scenario, told = BY_NAME[each.scenario], verdicts(snapshots_of(each))
        for kind in (scenario.kind, "all") if each.faulty else (HEALTHY,):
            scores[kind].add(told, scenario.causes if each.faulty else ())
    return scores


def markdown(runs: Sequence[Run]) -> str:
    """The tables of docs/alerts.md."""
    columns: list[tuple[str, dict[str, Score], dict[str, Score]]] = []
    lines = list[str]()
    for name, (_, scenarios) in GROUPS.items():
        names = {each.name for each in scenarios}
        group = [each for each in runs if each.scenario in names]
        sound = [each for each in group if is_sound(group, each)]
        columns.append((name, scores_of(sound, lambda each: each.often), scores_of(sound, lambda each: each.seldom)))
        for rule in OTHERS:
            known, false = ([rule in each.others for each in sound if each.faulty is faulty] for faulty in (True, False))
            lines.append(
                f"| {name} | {rule} | {sum(known) / max(1, len(known)):.3f} | {sum(false) / max(1, len(false)):.3f} |".replace("|a|", "\\|a\\|")
            )
    kinds = sorted({kind for _, often, _ in columns for kind in often}, key=lambda kind: (kind == HEALTHY, kind == "all", kind))
    rows = [[kind, *(cell for _, often, seldom in columns for cell in _cells(kind, often, seldom))] for kind in kinds]
    titles = ["kind of fault", *(f"{name}: {title}" for name, _, _ in columns for title in ("runs", "every=10", "defaults", "right cause"))]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))
    return f"torch {torch.__version__}\n\n{table}\n\n" + "\n".join(
        ("| group | other rules | faults told | healthy runs with an alert |", "|---|---|---|---|", *lines)
    )


def _cells(kind: str, often: dict[str, Score], seldom: dict[str, Score]) -> list[str]:
    score, late = often.get(kind), seldom.get(kind)
    if score is None or late is None:
        return ["-"] * 4
    cause = "" if kind == HEALTHY or not score.found else f"{score.right / score.found:.3f}"
    return [str(score.runs), f"{score.found / score.runs:.3f}", f"{late.found / late.runs:.3f}", cause]


def show(runs: Sequence[Run]) -> None:
    """Print each run with its score, its alerts and their causes."""
    for each in runs:
        scenario = BY_NAME[each.scenario]
        what = f"fault ({', '.join(scenario.causes)})" if each.faulty else f"healthy from {scenario.good:g} on"
        print(f"\n{each.scenario}, seed {each.seed}, {what}: score {each.score:.4g}{'' if is_sound(runs, each) else ' NOT SO'}, {each.seconds:.1f} s")
        for title, snapshots in (("every=10", each.often), ("defaults", each.seldom)):
            for alert in verdicts(snapshots)[:3]:
                causes = ", ".join(f"{cause.name} {cause.share:.0%}" for cause in alert.causes)
                print(f"  {title}: step {alert.step} (since {alert.since}) {alert.severity} {alert.rule}: {alert.message}\n    {causes}")
        print(f"  others: {each.others}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="only the scenarios whose names contain one of these")
    parser.add_argument("--steps", type=int, help="only so many steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--keep", help="keep the runs in this file, or take them from it if it exists")
    parser.add_argument("--group", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="only the scenarios of these tables")
    parser.add_argument("--write", nargs="+", metavar="FILE", help="put the tables of the runs that are kept in these files into docs/alerts.md")
    options = parser.parse_args()
    if options.write:
        kept = [each for file in options.write for each in pickle.loads(Path(file).read_bytes())]
        put(markdown(kept), "faults", PAGE)
        return
    start = time.perf_counter()
    chosen = [each for name in options.group for each in GROUPS[name][1]]
    chosen = [each for each in chosen if options.only is None or any(part in each.name for part in options.only)]
    if options.keep and Path(options.keep).exists():
        runs: list[Run] = pickle.loads(Path(options.keep).read_bytes())
    else:
        with multiprocessing.get_context("spawn").Pool() as pool:
            runs = pool.map(one, jobs(chosen, options.seeds, options.steps), chunksize=1)
        if options.keep:
            Path(options.keep).write_bytes(pickle.dumps(runs))
    print(f"torch {torch.__version__}, {len(runs)} runs in {time.perf_counter() - start:.0f} s")
    if options.only:
        show(runs)
    else:
        for title, scenarios in GROUPS.values():
            names = {each.name for each in scenarios}
            group = [each for each in runs if each.scenario in names]
            if group:
                print(f"\n{title}: {len(group)} runs")
                evaluate(group)


if __name__ == "__main__":
    main()
