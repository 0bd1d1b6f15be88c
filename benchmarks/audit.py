"""Whether every number that torchsat reports is right, against an independent computation in float64.

python benchmarks/audit.py [--small] [--only PATTERN]

Each case of the grid (audit_grid.py, audit_rows.py, audit_layers.py, audit_trainings.py, audit_formats.py: types, shapes, layouts, layers,
attention, recurrent layers, mixtures of experts, ways to train, number formats) is trained twice, with torchsat and without; what each field must say
is computed from the training without it (audit_truth.py). Printed are, for each field of Record, Head, Weight, Experts, FormatUse and Snapshot, how
many figures were compared and how many agree, and each figure that does not. The exit status is 1 if one does not agree, or if the grid has not
reached a field with any value but None.
"""

import argparse
import dataclasses
import logging
import re
import sys
import time
from collections import Counter

import audit_formats
import audit_grid
import audit_layers
import audit_rows
import audit_trainings
import audit_truth as truth
import torch

from torchsat.experts import Experts
from torchsat.number_formats import FormatUse
from torchsat.record import Head, Record, Snapshot, Weight

VALUES = (Record, Head, Weight, Experts, FormatUse, Snapshot)
DERIVED = ("Experts.experts", "Experts.dead", "Experts.busiest", "Experts.concentration")
"""What values compute from their fields."""
NOT_NUMBERS = {
    *(
        "Snapshot.alerts",
        "Snapshot.judged",
        "Snapshot.ledger",
        "Snapshot.nearest",
        "Record.heads",
        "Record.alert_level",
        "Weight.alert_level",
        "Weight.layer",
        "Experts.alert_level",
        "Snapshot.formats",
    ),
}
"""The fields that hold no measured number. Each head and each number format is compared field by field. Alerts are judged over several observations,
and are checked by benchmarks/faults.py and by the tests of the rules; how near an alert is, and what a layer is called, by tests/test_verdict.py.
tests/test_ledger.py compares the entries of a ledger with autograd."""


def kind_of(found: object) -> str:
    return "Snapshot" if type(found).__name__ == "_Listed" else type(found).__name__


class Tally:
    """How many figures were compared, how many agree, and which do not."""

    def __init__(self) -> None:
        self.checked: Counter[str] = Counter()
        self.agreeing: Counter[str] = Counter()
        self.reached: set[str] = set()
        """The fields that were compared with a value other than None."""
        self.wrong: list[str] = []

    def compare(self, case: str, place: str, found: object, figures: dict[str, truth.Figure]) -> None:
        if found is None:
            self.checked["missing"] += 1
            self.wrong.append(f"{case}: {place} is missing")
            return
        for name, figure in figures.items():
            field = f"{kind_of(found)}.{name}"
            value = getattr(found, name)
            self.checked[field] += 1
            if figure.value is not None:
                self.reached.add(field)
            if truth.agrees(value, figure):
                self.agreeing[field] += 1
            else:
                self.wrong.append(f"{case}: {place}.{name} is {shown(value)}, and must be {shown(figure.value)} (within {figure.within:.1e})")


def shown(value: object) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a part of the grid that reaches every field")
    parser.add_argument("--only", default="", metavar="PATTERN", help="only the cases whose name contains this regular expression")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # Some cases are meant to raise alerts, which say nothing here.
    logging.getLogger("torchsat").setLevel(logging.ERROR)
    tally, ran, began = Tally(), 0, time.perf_counter()
    for case in (
        *audit_grid.cases(given.small),
        *audit_rows.cases(given.small),
        *audit_layers.cases(given.small),
        *audit_trainings.cases(given.small),
        *audit_formats.cases(given.small),
    ):
        if not re.search(given.only, case.name):
            continue
        ran += 1
        try:
            for place, found, figures in case.compare():
                tally.compare(case.name, place, found, figures)
        except Exception as error:
            tally.checked["missing"] += 1
            tally.wrong.append(f"{case.name}: {type(error).__name__}: {error}")
    return report(tally, ran, time.perf_counter() - began, partly=bool(given.only))


def report(tally: Tally, ran: int, seconds: float, partly: bool) -> int:
    fields = [f"{kind.__name__}.{each.name}" for kind in VALUES for each in dataclasses.fields(kind)] + list(DERIVED)
    print("| field | checked | agree |\n| --- | ---: | ---: |")
    for name in (*fields, *sorted(set(tally.checked) - set(fields))):
        print(f"| {name} | {tally.checked[name]} | {tally.agreeing[name]} |")
    checked, agreeing = sum(tally.checked.values()), sum(tally.agreeing.values())
    print(f"\n{ran} cases in {seconds:.0f} s: {checked} figures checked, {agreeing} agree.")
    for line in tally.wrong[:200]:
        print(f"  {line}")
    if len(tally.wrong) > 200:
        print(f"  and {len(tally.wrong) - 200} more")
    unreached = [name for name in fields if name not in tally.reached and name not in NOT_NUMBERS]
    if unreached and not partly:
        print(f"Not reached with any value: {', '.join(unreached)}.")
    return 1 if tally.wrong or (unreached and not partly) else 0


if __name__ == "__main__":
    sys.exit(main())
