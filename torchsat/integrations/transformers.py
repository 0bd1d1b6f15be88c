"""`Torchsat`, a callback of transformers.Trainer and of the trainers made from it (TRL): `Trainer(..., callbacks=[Torchsat()])`.

A callback is handed neither the Trainer nor the other callbacks, and `Trainer.log` would also print all it is given. But it is the Trainer's
CallbackHandler that calls us, so it is found one frame up. Of its callbacks those of `report_to` get our scalars, each through the method by which it
gets the Trainer's own; TensorBoard's gets none, since it has our sub-run beside its curves. Nothing of ours comes back to us, nor to the
console or the Trainer's log history.

A step is one step of the optimizer, which is what the Trainer counts too; a resumed run goes on with its number. What the alerts remember is saved in
each checkpoint beside the Trainer's state.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from torchsat.integrations import log, take_up
from torchsat.internals import caller_of_hook
from torchsat.monitor import Monitor, watch
from torchsat.record import Snapshot
from torchsat.tensorboard.stock import scalars

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise ImportError('transformers is not installed, or its Trainer is not: pip install "transformers[torch]>=4.50"') from error

_REPORTERS = tuple(INTEGRATION_TO_CALLBACK.values())
_FILE = "torchsat.pt"


class Torchsat(TrainerCallback):
    """Watches the Trainer's model in each `train`.

    Args:
        options: those of `torchsat.watch`. Without `log_dir` or `writer` the sub-run `torchsat` goes into the Trainer's TensorBoard directory, if it
            reports to TensorBoard. All else in `report_to` gets the scalars.

    `monitor` is that of the last `train`: `callback.monitor.alerts`.
    """

    def __init__(self, **options: Any) -> None:
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
        options = {"start": state.global_step, **self._options}
        if "log_dir" not in options and "writer" not in options and state.is_world_process_zero:
            # Ours are called after the Trainer's own, so there it has its writer.
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
        # The Trainer puts more than one GPU of one process under nn.DataParallel, which watch refuses with its reason.
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
        # At the end of training reporters close before we are called: MLflow's would begin another run for what comes late.
        if self.monitor is not None:
            self.monitor.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


def _mark(state: TrainerState) -> str:
    """The name of a run, in the Trainer's state: by it a checkpoint of this run is told from one that another has left in the same directory."""
    kept: Any = state.stateful_callbacks
    return str(kept.setdefault("torchsat", {"run": uuid4().hex})["run"])


def _saved(args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    """What the checkpoint that is resumed from holds of a monitor."""
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
