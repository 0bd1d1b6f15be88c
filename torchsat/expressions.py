"""Python expressions for remedies, in the names of the user's own model, so that they can be pasted into the user's code; standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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


_WIDTH = 76
"""Code is at most so wide, so that with its indentation it fits a terminal of 80 columns."""


def attribute(name: str) -> str:
    """The Python expression of a module, from its name in the model: `blocks.0.fc` becomes `model.blocks[0].fc`."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)


def spoken(name: str) -> str:
    """The name of a site or a layer in a sentence. One that is only a number, as in an `nn.Sequential`, is told as the expression that it has
    there."""
    return attribute(name) if name[:1].isdigit() and "/" not in name else name


def gain_for(activation: str) -> float:
    """The gain that suits an activation."""
    return GAIN.get(activation, 1.0)


def owner(weight: str) -> str:
    """The Python expression of the module that owns a weight. For a matrix of a recurrent layer (`rnn.weight_ih_l0`) that is the layer."""
    name = weight.partition("/")[0]
    head, _, last = name.rpartition(".")
    return attribute(head if _is_matrix(last) else name)


def matrix(weight: str, parameter: bool = False) -> str:
    """The Python expression of the tensor of a weight.

    Args:
        weight: the name of the layer, or of a part of it.
        parameter: whether that is the name of the parameter itself, and not of a module with a `weight`.
    """
    name, _, rows = weight.partition("/")
    is_itself = parameter or _is_matrix(name.rpartition(".")[2])
    return (attribute(name) if is_itself else f"{attribute(name)}.weight") + _rows(rows)


def initialiser(activation: str, weight: str) -> str:
    """The call that draws a weight as its activation needs it, up to the tensor: `nn.init.xavier_normal_({})`, in which `{}` stands for the
    tensor."""
    if weight.partition("/")[0].rpartition(".")[2].startswith("weight_hh"):
        return "nn.init.orthogonal_({})"
    if activation in GAIN:
        return 'nn.init.kaiming_normal_({}, nonlinearity="relu")'
    return 'nn.init.kaiming_normal_({}, nonlinearity="linear")' if activation == "selu" else "nn.init.xavier_normal_({})"


def several(expressions: Sequence[str]) -> str:
    """A tuple of expressions, on one line or on one line for each."""
    line = f"({', '.join(expressions)}{',' if len(expressions) == 1 else ''})"
    if len(line) <= _WIDTH - len("for weight in :"):
        return line
    return "(\n" + "".join(f"    {expression},\n" for expression in expressions) + ")"


GATES: Mapping[str, tuple[int, int]] = {
    **{name: (at, 4) for at, name in enumerate(("input", "forget", "cell", "output"))},
    **{name: (at, 3) for at, name in enumerate(("reset", "update", "new"))},
    "q": (0, 3),
    "k": (1, 3),
}
"""Parts of a weight that have a name, as in an LSTM, a GRU and an attention: at which place its rows stand, and of how many parts."""


def _is_matrix(name: str) -> bool:
    return name.startswith("weight_") or name == "in_proj_weight"


def _rows(rows: str) -> str:
    """The index that takes these rows of a weight."""
    if rows in GATES:
        return f".chunk({GATES[rows][1]})[{GATES[rows][0]}]"
    first, _, last = rows.partition("-")
    return f"[{first}:{int(last) + 1}]" if last.isdigit() else ""


def place_of(record: Record) -> str:
    """The place of a site in the user's code, with its preposition."""
    path = record.site.rpartition("/")[0]
    if record.kind == "module":
        return f"at {attribute(record.site)}"
    return f"in {attribute(path.rpartition('.')[0] if record.kind == 'recurrent' else path)}"
