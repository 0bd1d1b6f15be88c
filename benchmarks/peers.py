"""What other monitors cost: `python benchmarks/peers.py [--device cpu] [--only MLP,GPT] [--peers wandb,delve] [--pairs 20] [--whole 100] [--write]`.

It needs `pip install wandb fastai torchexplorer delve` and the program `dot` of Graphviz. Monitors that are not installed are named below the tables.

The trainings of workloads.py run eager, and a watched and a bare one take turns. The first table is of whole trainings with the default settings of
each monitor, the second of single steps with the monitor measuring at every step. What the user of a monitor calls after each step is counted as part
of the step. The monitors measure different things, so each row says what is measured. Nothing is sent over the network, and all files are written to
temporary folders. `--write` puts the tables into docs/cost.md.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from overhead import after, put, table
from torch import Tensor, nn
from workloads import Batch, Training, Workload, compare, machine, twins, workloads

import torchsat

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
FOLDERS = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
HEARD = ("torch.nn.modules.activation", "torch.nn.modules.rnn")

AfterStep = Callable[[], object]
Attach = Callable[[Training, Path], AbstractContextManager[AfterStep]]
"""A context manager that watches a training, with a folder to write to. It gives the function that the user calls after each step."""


def nothing() -> None:
    """Most monitors need no call after a step."""


@contextmanager
def with_nothing(training: Training, folder: Path) -> Iterator[AfterStep]:
    yield nothing


@contextmanager
def with_torchsat(training: Training, folder: Path, start: int = 0, **how: Any) -> Iterator[AfterStep]:
    with torchsat.watch(training.model, folder, **how) as monitor:
        if start:
            after(training, monitor, start)
        yield nothing


@contextmanager
def with_wandb(training: Training, folder: Path, **how: Any) -> Iterator[AfterStep]:
    with mock.patch.dict(os.environ, OFFLINE | dict.fromkeys(FOLDERS, str(folder))):
        import wandb

        steps = count()
        with wandb.init(dir=folder) as run:
            run.watch(training.model, **how)
            # wandb keeps its histograms until something else is logged.
            yield lambda: run.log({"step": next(steps)})
            run.unwatch(training.model)


@contextmanager
def with_fastai(training: Training, folder: Path, **how: Any) -> Iterator[AfterStep]:
    from fastai.callback.hook import ActivationStats

    callback = ActivationStats(**how)
    # The callback uses only these attributes of a Learner.
    callback.learn = SimpleNamespace(model=training.model, training=True)
    callback.before_fit()
    yield callback.after_batch
    callback.after_fit()


@contextmanager
def with_torchexplorer(training: Training, folder: Path, **how: Any) -> Iterator[AfterStep]:
    import torchexplorer

    # torchexplorer would serve its page from a thread that never ends. Without the server it still writes the data of the page. There is no way to
    # remove its hooks.
    unserved = SimpleNamespace(app=SimpleNamespace(run=lambda port: None))
    with mock.patch.dict(sys.modules, app=unserved), mock.patch.object(sys, "path", [*sys.path]):
        torchexplorer.watch(training.model, backend="standalone", standalone_dir=str(folder / "page"), verbose=False, **how)
    yield nothing


@contextmanager
def with_delve(training: Training, folder: Path, saturations: bool) -> Iterator[AfterStep]:
    from delve import SaturationTracker

    logging.getLogger("delve.logger").setLevel(logging.WARNING)
    tracker = SaturationTracker(str(folder / "delve"), "csv", training.model, device=str(training.device))
    yield tracker.add_saturations if saturations else nothing
    tracker.close()


@contextmanager
def with_tensorboard(training: Training, folder: Path) -> Iterator[AfterStep]:
    from torch.utils.tensorboard import SummaryWriter

    step = 0

    def listen(writer: SummaryWriter, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            seen: Tensor = output[0] if isinstance(output, tuple) else output
            writer.add_histogram(f"activations/{name}", seen.detach(), step)

        return hook

    def write(writer: SummaryWriter) -> None:
        nonlocal step
        for name, parameter in training.model.named_parameters():
            if parameter.grad is not None:
                writer.add_histogram(f"gradients/{name}", parameter.grad, step)
        step += 1

    with SummaryWriter(str(folder)) as writer:
        heard = [(name, module) for name, module in training.model.named_modules() if type(module).__module__ in HEARD]
        handles = [module.register_forward_hook(listen(writer, name)) for name, module in heard]
        yield lambda: write(writer)
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Way:
    """One row of a table: a monitor with the call that its user writes and what that measures."""

    peer: str
    about: str
    attach: Attach


MODULES = {
    "wandb": "wandb",
    "fastai": "fastai.callback.hook",
    "torchexplorer": "torchexplorer",
    "delve": "delve",
    "TensorBoard": "tensorboard",
    "Composer": "composer",
    "SageMaker Debugger": "smdebug.pytorch",
}
PINNED = {
    "Composer": "the newest mosaicml, 0.32.1, requires torch<2.7.1",
    "SageMaker Debugger": "the newest smdebug, 1.0.34, requires protobuf<=3.20.3 and cannot be imported with a newer one, as TensorBoard 2.21 needs",
}
SATURATION = "activations: saturation, dead units, histogram, gradient; their layers: input, weight, gradient, update; alerts"
EXPLORER = "activations, norms of their gradients, parameters, their gradients: histograms of 1000 elements each"
COVARIANCE = "Linear, Conv2d, LSTM: covariance of the output"
LOOP = "`add_histogram()` in forward hooks and after the step: outputs of activation modules and LSTMs, parameters' gradients: histogram"
DEFAULT = (
    Way("torchsat", f"`watch(model, folder)`: {SATURATION}; one step in 50", partial(with_torchsat, start=1075)),
    Way("wandb", "`watch(model)`: parameters' gradients: histogram; no activations; one step in 1000", with_wandb),
    Way("fastai", "`ActivationStats()`: outputs of modules with parameters: mean, std, share ≤ 0.05; no gradients; every step", with_fastai),
    Way("torchexplorer", f'`watch(model, backend="standalone")`: {EXPLORER}; one step in 500', with_torchexplorer),
    Way("delve", f"`SaturationTracker(…)`: {COVARIANCE}, every step, not yet its rank; no gradients", partial(with_delve, saturations=False)),
    Way("nothing", "the same training against itself: the noise", with_nothing),
)
EVERY = (
    Way("torchsat", f"`watch(…, every=1, budget=None)`: {SATURATION}", partial(with_torchsat, every=1, budget=None)),
    Way("wandb", '`watch(…, log="all", log_freq=1)`: parameters, their gradients: histogram', partial(with_wandb, log="all", log_freq=1)),
    Way(
        "fastai",
        "`ActivationStats(with_hist=True, include_paramless=True)`: outputs of all modules: mean, std, share ≤ 0.05, histogram; no gradients",
        partial(with_fastai, with_hist=True, include_paramless=True),
    ),
    Way("torchexplorer", f"`watch(…, log_freq=1)`: {EXPLORER}", partial(with_torchexplorer, log_freq=1)),
    Way("delve", f"`add_saturations()` after each step: {COVARIANCE}, its rank; no gradients", partial(with_delve, saturations=True)),
    Way("TensorBoard", LOOP, with_tensorboard),
    Way("nothing", "the same training against itself: the noise", with_nothing),
)


class Watched(Training):
    """A training whose steps include the function that the user of a monitor calls after each step."""

    finish: AfterStep = staticmethod(nothing)

    def step(self, batch: Batch) -> float:
        taken = super().step(batch)
        begun = time.perf_counter()
        self.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return taken + time.perf_counter() - begun


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".replace("|", "\\|")


def measure(work: Workload, way: Way, device: torch.device, pairs: int, whole: bool) -> str:
    models = twins(work, device)
    bare, watched = Training(work, next(models), device), Watched(work, next(models), device)
    try:
        with tempfile.TemporaryDirectory() as folder, way.attach(watched, Path(folder)) as watched.finish:
            found = compare(bare, watched, pairs)
    except Exception as error:
        return first_line(error)
    return f"{found.total:.3f}" if whole else str(found)


def absence(peer: str) -> str:
    """Why this monitor cannot be measured here. The text is empty where it can."""
    reasons = [PINNED[peer]] if peer in PINNED else []
    try:
        importlib.import_module(MODULES[peer])
    except Exception as error:
        reasons.insert(0, first_line(error))
    return "; ".join(reasons)


def rows(ways: Iterable[Way], works: list[Workload], device: torch.device, pairs: int, whole: bool) -> Iterator[tuple[str, ...]]:
    for way in ways:
        row = (way.peer, way.about, *(measure(work, way, device, pairs, whole) for work in works))
        print("| " + " | ".join(row) + " |", flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="names of trainings, separated by commas")
    parser.add_argument("--peers", default="", help=f"of torchsat, {', '.join(MODULES)}, nothing, separated by commas")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--whole", type=int, default=100, help="pairs of steps of a whole training")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    device = torch.device(given.device)
    works = [work for work in workloads(device).values() if not given.only or work.name in given.only.split(",")]
    names = [name for name in ("torchsat", *MODULES, "nothing") if not given.peers or name in given.peers.split(",")]
    missing = {name: why for name in names if name in MODULES and (why := absence(name))}
    here = [name for name in names if name not in missing]
    titles = ("", "measures", *(work.name for work in works))
    default, every = (
        table(titles, list(rows([way for way in ways if way.peer in here], works, device, pairs, whole)))
        for ways, pairs, whole in ((DEFAULT, given.whole, True), (EVERY, given.pairs, False))
    )
    versions = "".join(f", {name} {version(MODULES[name].split('.')[0])}" for name in here if name in MODULES)
    text = "\n\n".join(
        [
            f"{machine(device)}{versions}.",
            f"As it comes; the ratio of {given.whole} steps of each; what is measured more seldom than that is not among them:",
            default,
            f"At every step; the ratio of a step, the median of {given.pairs} pairs and its quartiles:",
            every,
            *(f"{name} is not measured: {why}." for name, why in missing.items()),
        ]
    )
    print("\n" + text)
    if given.write:
        put(text, f"peers-{device.type}")


if __name__ == "__main__":
    main()
