import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.summary.writer import event_file_writer
from torch._dynamo import eval_frame

from torchsat import process, schedule
from torchsat.record import Record

# Workers share the cores, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

hooks = sys.modules["torch.optim.optimizer"]
log = logging.getLogger("torchsat")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Every test starts from the same seed and leaves no monitor, hook or stance behind."""
    torch.manual_seed(0)
    threads, level = torch.get_num_threads(), log.level
    torch.set_num_threads(1)
    yield
    process._close_all()
    process.take_down()
    torch.set_num_threads(threads)
    # A script or a library that a test has run may have made torchsat quiet, as logging.config does to every logger that it does not know.
    log.handlers.clear()
    log.setLevel(level)
    log.disabled, log.propagate = False, True
    logging.disable(logging.NOTSET)
    assert eval_frame._stance.stance == "default"
    assert not {"__reduce_ex__", "__prepare_scriptable__"} & set(vars(torch.nn.Module))
    assert not hooks._global_optimizer_pre_hooks
    assert not hooks._global_optimizer_post_hooks


class StoppedClock(schedule.Clock):
    """A clock on which nothing takes any time, so that the interval is never stretched."""

    def seconds(self) -> float:
        return 0.0

    def mark(self, device: torch.device | None) -> schedule.Mark:
        return schedule.Mark(0.0, None)


@pytest.fixture(autouse=True)
def _stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on how long a step takes. A test of the budget puts a clock of its own here."""
    monkeypatch.setattr(schedule, "CLOCK", StoppedClock())


# TensorBoard numbers the files of a process and sorts them by name: of two that are made within one second, number 10 stands before number 9.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)

RunExample = Callable[..., str]


@pytest.fixture
def run_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunExample:
    """Runs a script of examples/ as its command line does, in the temporary folder, and returns what it prints."""

    def given(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        path = Path(__file__).parent.parent / "examples" / f"{name}.py"
        # As Python does: an example may import its neighbours.
        monkeypatch.syspath_prepend(path.parent)
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return given


@pytest.fixture(scope="session")
def run() -> Iterator[Callable[..., list[Any]]]:
    """Runs a function on four ranks and returns what each rank returned. All test files share these processes."""
    from tests.processes import started

    with started() as everywhere:
        yield everywhere


def record(site: str = "act", **given: object) -> Record:
    """The record of a healthy tanh, in which a test replaces the fields that it names."""
    values: dict[str, object] = {
        "activation": "tanh",
        "kind": "module",
        "tails": "both",
        "output": False,
        "gate": False,
        "after": (),
        "units": 8,
        "normal_low": 0.0147,
        "normal_high": 0.0147,
        "normal_derivative": 0.6057,
        "n": 1000,
        "elements": 1000,
        "saturated": 0.03,
        "low": 0.015,
        "high": 0.015,
        "derivative": 0.6,
        "derivative_rms": 0.68,
        "peak": 1.0,
        "relative_derivative": 0.6,
        "stuck": 0.0,
        "stuck_n": 1000,
        "z_mean": 0.0,
        "z_std": 1.0,
        "z_rms": 1.0,
        "z_min": -3.0,
        "z_max": 3.0,
        "a_mean": 0.0,
        "a_std": 0.6,
        "a_min": -0.99,
        "a_max": 0.99,
        "gate_left": None,
        "gate_right": None,
        "zeros": 0.0,
        "nonfinite": 0,
        "grad_n": 1000,
        "grad_nonfinite": 0,
        "attenuation": 0.68,
        "grad_a_rms": 1e-3,
        "grad_z_rms": 7e-4,
    }
    return Record(site=site, **{**values, **given})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """A browser without a window."""
    from tests.browsing import browser

    with browser() as made:
        yield made
