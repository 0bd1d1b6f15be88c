"""torchsat measures |f'(z)|, how much of the gradient each activation lets through, while a PyTorch model trains.

    monitor = torchsat.watch(model, "runs/exp1")

and the training loop stays as it is. Names are resolved on first use, so that TensorBoard and the report never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchsat.activations import ACTIVATIONS, Activation
    from torchsat.cause import Cause
    from torchsat.coverage import Coverage
    from torchsat.experts import Experts
    from torchsat.monitor import Monitor, watch
    from torchsat.number_formats import FormatUse
    from torchsat.plotting import plot
    from torchsat.record import Alert, Head, Record, Snapshot, Weight
    from torchsat.remedies import REMEDIES, Remedy
    from torchsat.rules import RULES, Rule
    from torchsat.tensorboard.reader import read
    from torchsat.tensorboard.stock import scalars
    from torchsat.trial import probe, try_remedies
    from torchsat.trials import Trial, Trials

__version__ = "0.1.0"

_HOME = {
    "ACTIVATIONS": "activations",
    "Activation": "activations",
    "Alert": "record",
    "Cause": "cause",
    "Coverage": "coverage",
    "Experts": "experts",
    "FormatUse": "number_formats",
    "Head": "record",
    "Monitor": "monitor",
    "REMEDIES": "remedies",
    "RULES": "rules",
    "Record": "record",
    "Remedy": "remedies",
    "Rule": "rules",
    "Snapshot": "record",
    "Trial": "trials",
    "Trials": "trials",
    "Weight": "record",
    "plot": "plotting",
    "probe": "trial",
    "read": "tensorboard.reader",
    "scalars": "tensorboard.stock",
    "try_remedies": "trial",
    "watch": "monitor",
}

__all__ = [
    "ACTIVATIONS",
    "REMEDIES",
    "RULES",
    "Activation",
    "Alert",
    "Cause",
    "Coverage",
    "Experts",
    "FormatUse",
    "Head",
    "Monitor",
    "Record",
    "Remedy",
    "Rule",
    "Snapshot",
    "Trial",
    "Trials",
    "Weight",
    "plot",
    "probe",
    "read",
    "scalars",
    "try_remedies",
    "watch",
]


_MODULES = ("report",)
"""Modules that need no import of their own: `torchsat.report.report(snapshot)`."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"torchsat.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'torchsat' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"torchsat.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
