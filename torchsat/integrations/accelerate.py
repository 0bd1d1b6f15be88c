"""`watch(accelerator, model)` for a loop that uses Accelerate.

`accelerator.prepare` wraps model and optimizer; what is watched is the module inside, and its steps are those of the torch optimizer inside, which
only steps when gradients are synchronised and no overflow was found. Which process writes, and where to, is known to the accelerator. It is asked
for its trackers at each observation, so `init_trackers` may come later.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from torchsat.monitor import Monitor
from torchsat.monitor import watch as watch_module
from torchsat.record import Snapshot
from torchsat.tensorboard.stock import scalars

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError('Accelerate is not installed: pip install "accelerate>=1.0"') from error


def watch(accelerator: Accelerator, model: nn.Module, log_dir: str | os.PathLike[str] | None = None, **options: Any) -> Monitor:
    """Watch a model, before or after `accelerator.prepare`. Its scalars go to the trackers of the accelerator.

    Args:
        log_dir: as of `torchsat.watch`. None: the directory of the TensorBoard tracker, if there is one already; it gets no scalars then, since it
            has the sub-run `torchsat` beside its curves.
        options: the others of `torchsat.watch`. In a resumed run `start=` is the number of optimizer steps already taken.
    """
    beside = None
    if log_dir is None and options.get("writer") is None and accelerator.is_main_process:
        beside = next((tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"), None)
        log_dir = beside.logging_dir if beside is not None else None

    def to_trackers(snapshot: Snapshot) -> None:
        values = scalars(snapshot, len(monitor.alerts))
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                # W&B drops what comes for a step before its last; on a GPU an observation may come that late.
                tracker.log({**values, "torchsat/step": snapshot.step}, step=max(snapshot.step, tracker.tracker.step))
            elif tracker is not beside:
                tracker.log(values, step=snapshot.step)

    monitor = watch_module(accelerator.unwrap_model(model), log_dir, **{**options, "sinks": [*(options.get("sinks") or ()), to_trackers]})
    return monitor
