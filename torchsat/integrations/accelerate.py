"""`watch(accelerator, model)` for a loop that uses Accelerate.

`accelerator.prepare` wraps the model and the optimizer. We watch the module inside the wrapper and count the steps of the torch optimizer inside its
wrapper, which steps only when the gradients are synchronised and no overflow was found. The accelerator knows which process writes, and where to. We
ask it for its trackers at each observation, so `init_trackers` may be called after `watch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from torchsat.monitor import Monitor
from torchsat.monitor import watch as watch_module
from torchsat.options import Directory, WatchOptions
from torchsat.record import Snapshot
from torchsat.tensorboard.stock import scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError('Accelerate is not installed: pip install "accelerate>=1.0"') from error


def watch(accelerator: Accelerator, model: nn.Module, log_dir: Directory | None = None, **options: Unpack[WatchOptions]) -> Monitor:
    """Watch a model, before or after `accelerator.prepare`, and send the scalars of each observation to the trackers of the accelerator.

    Args:
        accelerator: the accelerator that prepares the model.
        model: the model, wrapped by the accelerator or not.
        log_dir: the same as of `torchsat.watch`. None: the directory of the TensorBoard tracker, if there is one already. That tracker gets no
            scalars then, since TensorBoard shows the sub-run `torchsat` next to its curves.
        options: all other arguments of `torchsat.watch`. In a resumed run `start=` must be the number of optimizer steps already taken.
    """
    beside = None
    if log_dir is None and options.get("writer") is None and accelerator.is_main_process:
        beside = next((tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"), None)
        log_dir = beside.logging_dir if beside is not None else None

    def to_trackers(snapshot: Snapshot) -> None:
        values = scalars(snapshot, len(monitor.alerts))
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                # W&B drops values for a step before its last one, and on a GPU an observation may arrive that late.
                tracker.log({**values, "torchsat/step": snapshot.step}, step=max(snapshot.step, tracker.tracker.step))
            elif tracker is not beside:
                tracker.log(values, step=snapshot.step)

    options["sinks"] = [*(options.get("sinks") or ()), to_trackers]
    monitor = watch_module(accelerator.unwrap_model(model), log_dir, **options)
    return monitor
