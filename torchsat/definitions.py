"""What each rule and each cause is about, for people: a definition, and for a rule the metric that shows it; standard library only.

The Saturation tab shows these sentences, and those of the table of metrics, where a user asks what a word means. Each rule and cause has a heading in
docs/alerts.md, and each metric one in docs/metrics.md; the tab links to them (tensorboard/pages.py).
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


@dataclass(frozen=True)
class CauseDefinition:
    """One cause in words."""

    cause: str
    """The name, as in `Cause.name`."""
    title: str
    says: str


RULE_DEFINITIONS: tuple[Definition, ...] = (
    Definition(
        "saturated",
        "Many inputs of the activation lie on a plateau, where its derivative is nearly 0, and the gradient asks them to leave it. The weights "
        "behind such elements do not learn.",
        "excess",
    ),
    Definition("stuck_units", "Units (channels or features) that lie on a plateau for nearly every sample. On ReLU they are dead units.", "stuck"),
    Definition(
        "dormant_units",
        "Units whose mean size has become far smaller than that of their layer, as where targets change again and again.",
        "dormant",
    ),
    Definition(
        "vanishing_gradient", "The gradient is far smaller at the first activation than at the last. The first layers do not learn.", "grad_z_rms"
    ),
    Definition("exploding_gradient", "The gradient is far larger at the first activation than at the last.", "grad_z_rms"),
    Definition("frozen_weights", "A step changes the weights of this layer far less than those of the median layer.", "update_ratio"),
    Definition("shrunk_weights", "The weights have shrunk to a part of what they began with, mostly by weight decay.", "gain"),
    Definition("faded_input", "What the model computes as the input of this layer has shrunk to a part of what it began with.", "input_rms"),
    Definition(
        "underflow",
        "The gradient is so small that the type in which it is kept makes zeros of a part of it. It is judged where number formats are measured.",
        "grad_z_rms",
    ),
    Definition("attention_collapse", "The heads of an attention look at a single key each, and the gradient asks for other keys.", "entropy_min"),
    Definition(
        "logit_growth",
        "The largest logit of an attention has grown far beyond what it began with. Its weights then move from one key to another in a single step.",
        "z_max",
    ),
    Definition(
        "bounded_logits",
        "An output that its function bounds, such as a softmax, goes into a loss that takes unbounded logits. The loss cannot become small.",
        "alert_level",
    ),
    Definition(
        "expert_collapse",
        "The router of a mixture of experts sends nearly all tokens to a few experts. The others get no gradient and do not learn.",
        "alert_level",
    ),
    Definition("nonfinite", "Elements are inf or nan. Every number behind them is lost.", "nonfinite"),
)

CAUSE_DEFINITIONS: tuple[CauseDefinition, ...] = (
    CauseDefinition(
        "inputs_uncentred",
        "inputs that are not centred",
        "The inputs of the model have a mean far from 0 beside their spread. This offset pushes every unit to one side.",
    ),
    CauseDefinition(
        "inputs_unscaled",
        "inputs of a wrong scale",
        "The inputs of the model vary by far more than about 1, as raw pixels or prices do, so that the pre-activations are too large.",
    ),
    CauseDefinition(
        "init_too_large",
        "weights that began too large",
        "At the first observation the weights were larger than suits the activation, so that the pre-activations lie on its plateaus.",
    ),
    CauseDefinition(
        "init_too_small",
        "weights that began too small",
        "At the first observation the weights were smaller than suits the activation. Each layer passes on less of the gradient than it gets.",
    ),
    CauseDefinition(
        "weight_growth",
        "weights that training has made too large",
        "The weights were of a good size at first and have grown, mostly by a learning rate that is too high.",
    ),
    CauseDefinition(
        "weight_decay", "weight decay that is too strong", "Weight decay has shrunk the weights faster than the gradient can restore what is needed."
    ),
    CauseDefinition(
        "activation_choice",
        "the choice of the activation",
        "Sizes of inputs and weights are in order, and the activation itself passes too little gradient at this depth, or cannot reach the targets.",
    ),
    CauseDefinition(
        "dead_units", "units that died", "Units of a rectifier are below 0 for nearly every sample. They get no gradient that would bring them back."
    ),
    CauseDefinition(
        "router_collapse",
        "a router that feeds itself",
        "An expert that gets more tokens learns faster and gets more still, where nothing balances the load of the experts.",
    ),
    CauseDefinition(
        "numeric_range",
        "numbers beyond the range of the type",
        "A number is too large for its type and became inf or nan, or too small for it and became 0.",
    ),
    CauseDefinition(
        "softmax_logits",
        "logits of the softmax that are too large",
        "The logits vary so much within a row that the softmax puts nearly all of its weight on one key.",
    ),
)

CAUSE_TITLES: dict[str, str] = {each.cause: each.title for each in CAUSE_DEFINITIONS}
"""The causes in words, by the name of `Cause.name`."""
