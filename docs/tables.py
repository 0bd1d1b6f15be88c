"""Writes the tables of the docs from the code: `python docs/tables.py`. A test compares."""

from pathlib import Path

import torch
from marks import filled

from torchsat import ACTIVATIONS, RULES, Activation
from torchsat.activations import CLAMP, Constants, bind, bind_plain
from torchsat.functions import CURVES, FUNCTIONS
from torchsat.handwritten import CLIPPED_SQUARED_RELU, JUMP_RELU, QUICK_GELU, SINE, SNAKE, SOFT_CAP, SQUARED_RELU, SWISH

DOCS = Path(__file__).parent
EPSILON = 0.05


WRITTEN: tuple[tuple[Activation, dict[str, float | None], str], ...] = (
    (SQUARED_RELU, {}, "`relu(z)**2`"),
    (CLIPPED_SQUARED_RELU, {"cap": 4.0}, "`(relu(z)**2).clamp(max=4)`"),
    (QUICK_GELU, {}, "`z * sigmoid(1.702 * z)`"),
    (SWISH, {"beta": 2.0}, "`z * sigmoid(2 * z)`"),
    (JUMP_RELU, {"theta": 0.5}, "`z * (z > 0.5)`"),
    (CLAMP, {"min": None, "max": 7.0}, "`z.clamp(max=7)`"),
    (SOFT_CAP, {"cap": 30.0}, "`30 * tanh(z / 30)`"),
    (SINE, {"omega": 30.0}, "`sin(30 * z)`"),
    (SNAKE, {"alpha": 1.0}, "`z + sin(z)**2`"),
)
"""Activations that are written by hand, with a parameter as an example."""


def _numbers(constants: Constants) -> str:
    values = (constants.peak, constants.low, constants.high, constants.normal_derivative)
    return " | ".join("-" if value is None else f"{value:.4g}" for value in values)


def functions() -> str:
    lines = ["| name | written as | sup\\|f'\\| | tail below | tail above | E\\|f'\\|/sup at N(0, 1) |", "|---|---|---|---|---|---|"]
    for row, given, written in (*((row, dict[str, float | None](), f"`torch.{row.name}(z)`") for row in CURVES), *WRITTEN):
        written = "`torch.special.ndtr(z)`" if row.name == "ndtr" else written
        constants = bind_plain(row, EPSILON, given).constants
        assert constants is not None
        lines.append(f"| {row.name} | {written} | {_numbers(constants)} |")
    others = sorted({row.name for row in FUNCTIONS if row not in CURVES})
    return "\n".join([*lines, "", "Without a bound, or without a plateau: " + ", ".join(f"`{name}`" for name in others) + "."])


def activations() -> str:
    lines = ["| name | module | parameters | sup\\|f'\\| | tail below | tail above | E\\|f'\\|/sup at N(0, 1) |", "|---|---|---|---|---|---|---|"]
    for row in ACTIVATIONS:
        module = row.modules[0](0.0, 0.0) if row.name == "threshold" else row.modules[0]()
        constants = bind(row, module, EPSILON).constants
        numbers = "learned | - | - | -" if constants is None else _numbers(constants)
        lines.append(f"| {row.name} | `{row.modules[0].__name__}` | {', '.join(row.parameters)} | {numbers} |")
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


TABLES = {"saturation.md": {"activations": activations, "functions": functions}, "alerts.md": {"rules": rules}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for page, tables in TABLES.items():
        (DOCS / page).write_text(filled(DOCS / page, tables))
