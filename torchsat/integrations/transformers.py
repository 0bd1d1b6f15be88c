"""`Torchsat`, a callback of transformers.Trainer and of the trainers made from it (TRL): `Trainer(..., callbacks=[Torchsat()])`.

The scalars of each observation go to the trackers that `report_to` names. A callback is given neither the Trainer nor the other callbacks, and
`Trainer.log` cannot be used, since it also prints all values and keeps them in the log history. But our caller is the Trainer's CallbackHandler, so
we find it one frame up the stack. Those of its callbacks that belong to `report_to` get our scalars through `on_log`, the method through which they
also get the values of the Trainer. TensorBoard's callback gets none, since TensorBoard shows our sub-run next to its curves.

A step is one step of the optimizer, as the Trainer counts it too. A resumed run goes on with the number of its step. The state of the monitor, such
as which alerts fire, is saved in each checkpoint next to the state of the Trainer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import nn

from torchsat.integrations import log, take_up
from torchsat.internals import caller_of_hook
from torchsat.monitor import Monitor, watch
from torchsat.options import RunOptions
from torchsat.record import Snapshot
from torchsat.tensorboard.stock import scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise ImportError('transformers is not installed, or its Trainer is not: pip install "transformers[torch]>=4.50"') from error

_REPORTERS = tuple(INTEGRATION_TO_CALLBACK.values())
_FILE = "torchsat.pt"


class Torchsat(TrainerCallback):
    """A callback that watches the Trainer's model during each `train`.

    Args:
        options: the arguments of `torchsat.watch`. Without `log_dir` or `writer` the sub-run `torchsat` is written into the Trainer's TensorBoard
            directory, if the Trainer reports to TensorBoard. All other trackers in `report_to` get the scalars of each observation.

    The attribute `monitor` is the monitor of the last `train`, so that `callback.monitor.alerts` tells which alerts fire.
    """

    def __init__(self, **options: Unpack[RunOptions]) -> None:
        self.monitor: Monitor | None = None
        self._options = options
        self._run = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close()
        handler = caller_of_hook()
        callbacks = handler.callbacks if isinstance(handler, CallbackHandler) else []
        if not callbacks:
            log.warning(
                "torchsat: the Trainer's other callbacks were not found: report_to gets no scalars, and no files are written without log_dir=."
            )
        reporters: list[Any] = [each for each in callbacks if isinstance(each, _REPORTERS)]
        options: RunOptions = {"start": state.global_step, **self._options}
        if "log_dir" not in options and "writer" not in options and state.is_world_process_zero:
            # The Trainer calls its own callbacks before those of the user, so the one for TensorBoard has made its writer by now.
            writers = [each.tb_writer for each in reporters if isinstance(each, TensorBoardCallback) and each.tb_writer is not None]
            options["log_dir"] = writers[0].log_dir if writers else None
        model: nn.Module = kwargs["model"]

        def report(snapshot: Snapshot) -> None:
            then = copy.copy(state)
            then.global_step = snapshot.step
            for reporter in reporters:
                if not isinstance(reporter, TensorBoardCallback):
                    reporter.on_log(args, then, TrainerControl(), model=model, logs=scalars(snapshot, len(monitor.alerts)))

        options["sinks"] = [*(options.get("sinks") or ()), report]
        # With several GPUs in one process the Trainer will wrap the model in nn.DataParallel. `watch` refuses that and says why.
        monitor = self.monitor = watch(nn.DataParallel(model) if args.n_gpu > 1 else model, **options)
        self._run = _mark(state)
        kept = _saved(args, state)
        if kept is not None and kept["run"] == self._run:
            take_up(monitor, {**kept["monitor"], "step": state.global_step})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.monitor is None or not state.is_world_process_zero or not _checkpoint(args, state).is_dir():
            return
        try:
            torch.save({"run": self._run, "monitor": self.monitor.state_dict()}, _checkpoint(args, state) / _FILE)
        except Exception as error:
            log.warning("torchsat: its state is not in the checkpoint of step %d: %s: %s", state.global_step, type(error).__name__, error)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # At the end of the training the trackers close before we are called. MLflow would begin another run for scalars that arrive after that.
        if self.monitor is not None:
            self.monitor.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


def _mark(state: TrainerState) -> str:
    """A random name of the run, which the Trainer keeps in its state.

    It tells a checkpoint of this run from one that another run has left in the same directory.
    """
    kept: Any = state.stateful_callbacks
    return str(kept.setdefault("torchsat", {"run": uuid4().hex})["run"])


def _saved(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """The state of a monitor in the checkpoint that the run is resumed from, with the name of its run. None where there is none."""
    path = _checkpoint(args, state) / _FILE
    if not state.global_step or not path.exists():
        return None
    try:
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {"run": kept["run"], "monitor": kept["monitor"]}
    except Exception as error:
        log.warning("torchsat: %s cannot be read, alerts begin anew: %s: %s", path, type(error).__name__, error)
        return None


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
