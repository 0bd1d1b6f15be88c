"""`Torchsat`, a callback of PyTorch Lightning's Trainer: `Trainer(callbacks=[Torchsat()])`.

A step is a batch after which the optimizers have stepped, however many there are. The loggers of Lightning count in the same way.
`trainer.global_step` counts the step of each optimizer instead, which makes no difference with one optimizer, as in automatic optimization.

Watching begins with the first batch of a `fit`. By then a run that is resumed from a checkpoint knows the number of its step, and a sanity check, a
validation or a test without training opens no files.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchsat.integrations import take_up
from torchsat.monitor import Monitor, watch
from torchsat.options import RunOptions
from torchsat.record import Snapshot
from torchsat.tensorboard.stock import scalars

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
    from typing_extensions import Unpack
else:
    # Lightning is distributed as two packages with the same content. We take the one that is imported already, and otherwise the first one found.
    for _name in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            Callback = import_module(_name).Callback
            break
        except ImportError:
            continue
    else:
        raise ImportError('PyTorch Lightning is not installed: pip install "lightning>=2.4"')


class Torchsat(Callback):
    """A callback that watches the LightningModule during each `fit`.

    Args:
        options: the arguments of `torchsat.watch`. Without `log_dir` or `writer` the sub-run `torchsat` is written into the directory of the
            Trainer's TensorBoardLogger, or else into that of its first logger. Without a logger no files are written. All loggers but
            TensorBoardLogger get the scalars of each observation.

    The attribute `monitor` is the monitor of the last `fit`, so that `callback.monitor.alerts` tells which alerts fire.
    """

    def __init__(self, **options: Unpack[RunOptions]) -> None:
        self.monitor: Monitor | None = None
        self._options = options
        self._state: dict[str, Any] | None = None
        self._watching = False

    @property
    def state_key(self) -> str:
        """The key by which a checkpoint tells several of these callbacks apart."""
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
        options: RunOptions = {"start": step, **self._options}
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
    """Whether this is a TensorBoardLogger, of whichever package of Lightning. Each package has a class of this name."""
    return any(each.__name__ == "TensorBoardLogger" for each in type(logger).__mro__)


def _directory(trainer: Trainer) -> str | None:
    """The directory of a TensorBoardLogger, or else of the first logger.

    None where nothing is written: without a logger, in a `fast_dev_run`, and on all processes but the first.
    """
    if not trainer.loggers or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return None
    logger = min(trainer.loggers, key=lambda each: not _is_tensorboard(each))
    log_dir = getattr(logger, "log_dir", None)
    if log_dir:
        return str(log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
