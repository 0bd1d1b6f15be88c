"""The table of metrics: which numbers of a site are drawn, and how; NumPy and standard library only.

The Saturation tab, the HTML report and the heatmap image all draw from this table, so that they show the same numbers on the same scales.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchsat.record import normal_saturated

Ramp = Literal["heat", "amount", "balance"]
Group = Literal["health", "saturation", "pre-activations", "gradients", "attention", "weights", "training"]
Values = NDArray[np.float32]
Shares = TypeVar("Shares", float, Values)


@dataclass(frozen=True)
class Metric:
    """How one number of a site is drawn.

    Args:
        name: the attribute of Record, or of the Weight that feeds the site.
        title, says: for people, the name and one sentence.
        form: a `share` is printed in per cent, a `number` with three digits, a `level` in words (alert_level.py).
        scale: of the colours and of the axis.
        low, high: the ends of the scale. None: the least and the largest number that is shown.
        worst: which end of the scale is bad. Where one pixel has room for one of several numbers the worst is shown. None: neither end is bad, and
            the latest is shown.
        ramp: the colours. `heat` goes from good to bad, `amount` from little to much, `balance` from too little through right to too much.
        over: what the number belongs to: the site (`records`); the layers that feed it (`weights`), and of several layers the least number is drawn;
            neither, since it is computed for the view only (`view`); or the site and the layers, of which the largest number is drawn (`both`).
        group: the heading under which the metric stands in a list.
    """

    name: str
    title: str
    says: str
    form: Literal["share", "number", "level"] = "share"
    scale: Literal["linear", "log"] = "linear"
    low: float | None = 0.0
    high: float | None = 1.0
    worst: Literal["low", "high"] | None = "high"
    ramp: Ramp = "heat"
    over: Literal["records", "weights", "view", "both"] = "records"
    group: Group = field(kw_only=True)

    @property
    def reversed(self) -> bool:
        """Whether the ramp begins at the high end of the scale: `heat` begins with the colour of what is good, whichever end that is."""
        return self.ramp == "heat" and self.worst == "low"


METRICS: tuple[Metric, ...] = (
    Metric(
        "alert_level",
        "Health",
        "How near a site, or a layer that feeds it, is to an alert by any rule. The scale is the same for all activations: what is healthy has the "
        "colour of the page.",
        "level",
        over="both",
        group="health",
    ),
    Metric(
        "excess",
        "Saturated beyond normal",
        "Share of inputs on a plateau, less what N(0, 1) inputs give (ReLU: 50 %).",
        over="view",
        group="saturation",
    ),
    Metric("saturated", "Saturated", "Share of inputs on a plateau, where |f'| stays below 5 % of its peak by default.", group="saturation"),
    Metric("low", "Saturated low", "Share of inputs on the lower plateau.", group="saturation"),
    Metric("high", "Saturated high", "Share of inputs on the upper plateau.", group="saturation"),
    Metric(
        "relative_derivative",
        "E|f'| / peak",
        "Mean derivative over its peak: 1 is fully open, 0 is closed.",
        "number",
        worst="low",
        group="saturation",
    ),
    Metric(
        "stuck",
        "Stuck units",
        "Share of units saturated in at least 99 % of their newest samples (64 to 1000); on ReLU, dead units.",
        group="saturation",
    ),
    Metric(
        "dormant",
        "Dormant units",
        "Share of units whose mean |a| is at most a fortieth of that of their layer (Sokar et al. 2023).",
        group="saturation",
    ),
    Metric(
        "effective_rank",
        "Effective rank",
        'Directions of the features, by the entropy of their singular values, over the most there can be. Only with extras="rank".',
        worst="low",
        group="saturation",
    ),
    Metric(
        "attenuation",
        "Attenuation",
        "||dL/dz|| / ||dL/da||: what this activation alone does to the gradient.",
        "number",
        "log",
        1e-3,
        1.0,
        "low",
        group="gradients",
    ),
    Metric(
        "blocked",
        "Blocked demand",
        "Of the sum of |dL/da|, the part at elements on a plateau: what the gradient asks for and cannot get.",
        group="saturation",
    ),
    Metric(
        "trapped",
        "Trapped demand",
        "The part of that sum that asks elements to leave their plateau. A sure layer is saturated and has none.",
        group="saturation",
    ),
    Metric("grad_z_rms", "Gradient", "Root mean square of dL/dz.", "number", "log", None, None, None, "amount", group="gradients"),
    Metric(
        "update_ratio", "Update ratio", "||change of W|| / ||W|| per step.", "number", "log", 1e-6, 1.0, "low", "balance", "weights", group="training"
    ),
    Metric(
        "gain",
        "Weight gain",
        "rms(W) sqrt(fan_in): 1 under Xavier, 1.41 under He.",
        "number",
        "log",
        0.05,
        20.0,
        None,
        "balance",
        "weights",
        group="weights",
    ),
    Metric(
        "input_rms",
        "Input of the layer",
        "Root mean square of the input of the layer.",
        "number",
        "log",
        0.01,
        100.0,
        None,
        "balance",
        "weights",
        group="weights",
    ),
    Metric(
        "learning_rate", "Learning rate", "The learning rate of the layer.", "number", "log", None, None, None, "amount", "weights", group="training"
    ),
    Metric(
        "z_std", "Spread of z", "Standard deviation of the pre-activation.", "number", "log", 0.01, 100.0, None, "balance", group="pre-activations"
    ),
    Metric("z_mean", "Mean of z", "Mean of the pre-activation.", "number", "linear", -4.0, 4.0, None, "balance", group="pre-activations"),
    Metric(
        "z_max",
        "Largest z",
        "The largest pre-activation; of an attention the largest logit.",
        "number",
        "linear",
        0.0,
        100.0,
        "high",
        "amount",
        group="pre-activations",
    ),
    Metric("zeros", "Zeros", "Share of activations that are exactly 0.", ramp="amount", worst=None, group="saturation"),
    Metric(
        "entropy_min",
        "Attention entropy",
        "H / ln T of the lowest head: 1 is even attention, 0 is one key alone.",
        "number",
        worst="low",
        group="attention",
    ),
    Metric(
        "logit_std",
        "Attention logits",
        "Standard deviation of the logits within a row.",
        "number",
        "log",
        0.1,
        100.0,
        None,
        "amount",
        group="attention",
    ),
    Metric(
        "first_key",
        "Weight of the first key",
        "Mean probability of the first key that a row sees: how far the first token is a sink.",
        "number",
        worst=None,
        ramp="amount",
        group="attention",
    ),
    Metric(
        "log_z_rms",
        "Size of ln Z",
        "Root mean square of ln Z of a softmax over its rows: what a z-loss keeps small.",
        "number",
        "log",
        0.1,
        100.0,
        None,
        "amount",
        group="attention",
    ),
    Metric("nonfinite", "Not finite", "Elements of z and a that are inf or nan; any is too many.", "number", "log", 1.0, 1e6, group="health"),
    Metric("grad_nonfinite", "Gradient not finite", "Elements of dL/dz and dL/da that are inf or nan.", "number", "log", 1.0, 1e6, group="health"),
)


def rows_of(over: Literal["records", "weights"]) -> list[str]:
    """The names of the metrics that are numbers of a record, or of a weight."""
    return [metric.name for metric in METRICS if metric.over in (over, "both")]


def excess(saturated: Shares, normal_low: float | None, normal_high: float | None) -> Shares:
    """The metric `excess`: the saturated share beyond that of N(0, 1) inputs, of one observation or of many."""
    return saturated - normal_saturated(normal_low, normal_high)
