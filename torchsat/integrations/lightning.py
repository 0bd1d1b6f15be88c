"""`Torchsat`, a callback of PyTorch Lightning's Trainer: `Trainer(callbacks=[Torchsat()])`.

A step of ours is a batch after which the optimizers have stepped, however many there are. Lightning's loggers count so too; `trainer.global_step`
counts the step of every optimizer, which is the same with one, as in automatic optimization. Watching begins with the first batch of a `fit`: by then
a run that goes on from a checkpoint has its numbers, and sanity check, validation or test alone open nothing.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchsat.integrations import take_up
from torchsat.monitor import Monitor, watch
from torchsat.record import Snapshot
from torchsat.tensorboard.stock import scalars

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
else:
    # Two packages of the same content; the one that is in use first.
    for _name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            Callback = import_module(_name).Callback
            break
        except ImportError:
            continue
    else:
        raise ImportError('PyTorch Lightning is not installed: pip install "lightning>=2.4"')


class Torchsat(Callback):
    """Watches the LightningModule in each `fit`.

    Args:
        options: those of `torchsat.watch`. Without `log_dir` or `writer` the sub-run `torchsat` goes into the directory of the Trainer's
            TensorBoardLogger, else of its first logger; without a logger no files are written. Loggers other than TensorBoard's get the scalars.

    `monitor` is that of the last `fit`: `callback.monitor.alerts`.
    """

    def __init__(self, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._options = options
        self._state: dict[str, Any] | None = None
        self._watching = False

    @property
    def state_key(self) -> str:
        """By which checkpoints tell several apart."""
        own = {name: str(value) for name, value in self._options.items() if name in ("log_dir", "include", "exclude")}
        return self._generate_state_key(**own) if own else super().state_key

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._watching:
            return

        def to_loggers(snapshot: Snapshot) -> None:
            for logger in trainer.loggers:
                if not _is_tensorboard(logger):
                    logger.log_metrics(scalars(snapshot, len(monitor.alerts)), step=snapshot.step)

        step = trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.epoch_loop._batches_that_stepped
        options = {"start": step, **self._options}
        if "log_dir" not in options and "writer" not in options:
            options["log_dir"] = _directory(trainer)
        options["sinks"] = [*(options.get("sinks") or ()), to_loggers]
        monitor = self.monitor = watch(pl_module, **options)
        self._watching = True
        if self._state is not None:
            take_up(monitor, {**self._state, "step": step})
            self._state = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        self._watching = False
        if self.monitor is not None:
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        return self._state or {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict


def _is_tensorboard(logger: Logger) -> bool:
    """Lightning has a class of this name for each of its packages."""
    return any(each.__name__ == "TensorBoardLogger" for each in type(logger).__mro__)


def _directory(trainer: Trainer) -> str | None:
    """Of the first logger, TensorBoard's before others; on the first process, which is the one that writes."""
    if not trainer.loggers or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return None
    logger = min(trainer.loggers, key=lambda each: not _is_tensorboard(each))
    log_dir = getattr(logger, "log_dir", None)
    if log_dir:
        return str(log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
