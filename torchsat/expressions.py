"""Python expressions for remedies, in the names of the user's own model, so that they can be pasted into the user's code; standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torchsat.record import Record

GAIN: Mapping[str, float] = {
    "relu": math.sqrt(2),
    "relu6": math.sqrt(2),
    "leaky_relu": math.sqrt(2),
    "gelu": 1.5,
    "silu": 1.5,
    "mish": 1.5,
    "hardswish": 1.5,
}
"""For each activation the gain rms(W) sqrt(fan_in) that keeps the signal at its size from layer to layer. It is 1 for those that are not listed."""


def attribute(name: str) -> str:
    """The Python expression of a module, from its name in the model: `blocks.0.fc` becomes `model.blocks[0].fc`."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)


def gain_for(activation: str) -> float:
    """The gain that suits an activation."""
    return GAIN.get(activation, 1.0)


def owner(weight: str) -> str:
    """The Python expression of the module that owns a weight. For a matrix of a recurrent layer (`rnn.weight_ih_l0`) that is the layer."""
    head, _, last = weight.rpartition(".")
    return attribute(head if last.startswith("weight_") else weight)


def initialiser(activation: str, weight: str) -> str:
    """The line of code that initialises a weight as its activation needs it."""
    last = weight.rpartition(".")[2]
    target = f"{owner(weight)}.{last if last.startswith('weight_') else 'weight'}"
    if last.startswith("weight_hh"):
        return f"nn.init.orthogonal_({target})"
    if activation in GAIN:
        return f'nn.init.kaiming_normal_({target}, nonlinearity="relu")'
    return f'nn.init.kaiming_normal_({target}, nonlinearity="linear")' if activation == "selu" else f"nn.init.xavier_normal_({target})"


def place_of(record: Record) -> str:
    """The place of a site in the user's code, with its preposition."""
    path = record.site.rpartition("/")[0]
    if record.kind == "module":
        return f"at {attribute(record.site)}"
    return f"in {attribute(path.rpartition('.')[0] if record.kind == 'recurrent' else path)}"
