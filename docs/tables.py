"""Writes the tables of the docs from the code: `python docs/tables.py`. A test compares."""

from pathlib import Path

import torch

from torchsat import ACTIVATIONS, RULES
from torchsat.activations import bind

DOCS = Path(__file__).parent
EPSILON = 0.05


def activations() -> str:
    lines = ["| name | module | parameters | sup\\|f'\\| | tail below | tail above | E\\|f'\\|/sup at N(0, 1) |", "|---|---|---|---|---|---|---|"]
    for row in ACTIVATIONS:
        module = row.modules[0](0.0, 0.0) if row.name == "threshold" else row.modules[0]()
        constants = bind(row, module, EPSILON).constants
        numbers = ["learned", "-", "-", "-"]
        if constants is not None:
            numbers = [
                "-" if value is None else f"{value:.4g}" for value in (constants.peak, constants.low, constants.high, constants.normal_derivative)
            ]
        lines.append(f"| {row.name} | `{row.modules[0].__name__}` | {', '.join(row.parameters)} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def rules() -> str:
    def limit(value: object, below: bool) -> str:
        if value is None:
            return "-"
        return "by activation" if callable(value) else f"{'<=' if below else '>='} {value:g}"

    lines = ["| rule | over | warning | critical | observations in a row | judged |", "|---|---|---|---|---|---|"]
    for rule in RULES:
        judged = "always" if rule.first is None else f"in the first {rule.first}"
        limits = f"{limit(rule.warning, rule.below)} | {limit(rule.critical, rule.below)}"
        lines.append(f"| {rule.name} | {rule.over} | {limits} | {rule.patience} | {judged} |")
    return "\n".join(lines)


TABLES = {"saturation.md": ("activations", activations), "alerts.md": ("rules", rules)}


def filled(name: str) -> str:
    """The text of one page with its table as the code has it now."""
    mark, make = TABLES[name]
    head, rest = (DOCS / name).read_text().split(f"<!-- {mark} -->\n")
    _, tail = rest.split(f"<!-- /{mark} -->")
    return f"{head}<!-- {mark} -->\n{make()}\n<!-- /{mark} -->{tail}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for page in TABLES:
        (DOCS / page).write_text(filled(page))
