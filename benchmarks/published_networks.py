"""What a published network is to benchmarks/published.py, and how the files of an installed package are found without running its code.

The packages are made for other versions of torch, and import much that the networks do not need. So a network is built anew in these files, or its
source file is imported alone, and the weights are read from the files of the installed package.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class NotInstalledError(Exception):
    """A package that a network needs is not installed. The message is the command that installs it."""


@dataclass(frozen=True)
class Task:
    """A network with its published weights, and a training that goes on from them."""

    model: nn.Module
    verified: str
    """What the network computes, with figures. Whoever built the task has asserted that it is what the published network computes."""
    batch: Callable[[int], Any]
    """The batch of a step."""
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Network:
    """A published network."""

    name: str
    package: str
    """The package that ships the weights, as pip names it."""
    folder: str
    """The same package, as Python imports it."""
    task: Callable[[Path], Task]
    """Makes the task from the folder of the installed package."""
    needs: tuple[str, ...] = ()
    """Other modules that the task imports, which torchsat does not need."""

    def build(self) -> Task:
        """Load the network.

        Raises:
            NotInstalledError: a package is missing.
            AssertionError: the network does not compute what the published one does.
        """
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        spec = importlib.util.find_spec(self.folder)
        if spec is None:
            raise NotInstalledError(f"pip install --no-deps {' '.join([self.package, *missing])}")
        if missing:
            raise NotInstalledError(f"pip install {' '.join(missing)}")
        torch.manual_seed(0)
        return self.task(Path(next(iter(spec.submodule_search_locations or ()))))


@contextmanager
def shell(folder: Path, *others: str) -> Iterator[Callable[[str], Any]]:
    """Gives a function that imports one source file of the package in this folder, without the `__init__` of the package.

    Args:
        others: further modules that the file imports and whose code must not run. Those that are not folders of the package need not be installed.
            From each of them any name can be imported; it is an empty class.
    """
    kept = dict(sys.modules)
    names = (folder.name, *others)
    for name in names:
        sys.modules[name] = _empty(name, folder.parent / name.replace(".", "/"))
    try:
        yield importlib.import_module
    finally:
        roots = {name.partition(".")[0] for name in names}
        for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in kept.items() if name.partition(".")[0] in roots})


def _empty(name: str, folder: Path) -> types.ModuleType:
    """A module that has nothing but the files of this folder, if there is one."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)] if folder.is_dir() else []

    def attribute(wanted: str) -> type:
        if wanted.startswith("__") or (folder / f"{wanted}.py").exists() or (folder / wanted).is_dir():
            raise AttributeError(wanted)
        return type(wanted, (), {})

    vars(module)["__getattr__"] = attribute
    return module


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
