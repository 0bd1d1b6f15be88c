"""What each rule is about, for people: a definition, and the metric that shows it; standard library only.

The Saturation tab shows these sentences, and those of the table of metrics, where a user asks what a word means.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """One rule in words."""

    rule: str
    says: str
    metric: str
    """The metric of metrics.METRICS that shows what the rule judges."""


RULE_DEFINITIONS: tuple[Definition, ...] = (
    Definition(
        "saturated",
        "Many inputs of the activation lie on a plateau, where its derivative is nearly 0, and the gradient asks them to leave it. The weights "
        "behind such elements do not learn.",
        "excess",
    ),
    Definition("stuck_units", "Units (channels or features) that lie on a plateau for nearly every sample. On ReLU they are dead units.", "stuck"),
    Definition(
        "vanishing_gradient", "The gradient is far smaller at the first activation than at the last. The first layers do not learn.", "grad_z_rms"
    ),
    Definition("exploding_gradient", "The gradient is far larger at the first activation than at the last.", "grad_z_rms"),
    Definition("frozen_weights", "A step changes the weights of this layer far less than those of the median layer.", "update_ratio"),
    Definition("shrunk_weights", "The weights have shrunk to a part of what they began with, mostly by weight decay.", "gain"),
    Definition("faded_input", "What the model computes as the input of this layer has shrunk to a part of what it began with.", "input_rms"),
    Definition("attention_collapse", "The heads of an attention look at a single key each, and the gradient asks for other keys.", "entropy_min"),
    Definition(
        "bounded_logits",
        "An output that its function bounds, such as a softmax, goes into a loss that takes unbounded logits. The loss cannot become small.",
        "alert_level",
    ),
    Definition("nonfinite", "Elements are inf or nan. Every number behind them is lost.", "nonfinite"),
)


CAUSE_TITLES: dict[str, str] = {
    "activation_choice": "the choice of the activation",
    "dead_units": "units that died",
    "init_too_large": "weights that began too large",
    "init_too_small": "weights that began too small",
    "inputs_uncentred": "inputs that are not centred",
    "inputs_unscaled": "inputs of a wrong scale",
    "numeric_range": "numbers beyond the range of the type",
    "softmax_logits": "logits of the softmax that are too large",
    "weight_decay": "weight decay that is too strong",
    "weight_growth": "weights that training has made too large",
}
"""The causes in words, by the name of `Cause.name`."""
