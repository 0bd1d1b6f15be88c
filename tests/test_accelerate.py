"""Accelerate: what is recorded is what the plain loop records; where it writes, what counts as a step, who gets the scalars."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason='Accelerate is not installed: pip install "accelerate>=1.0"')

import torchsat  # noqa: E402
from tests.conftest import RunExample  # noqa: E402
from tests.truth import known  # noqa: E402
from torchsat.integrations.accelerate import watch  # noqa: E402
from torchsat.record import Snapshot  # noqa: E402
from torchsat.tensorboard.stock import scalars  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """An Accelerator shares its state with all others of the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Tracker(accelerate.tracking.GeneralTracker):  # type: ignore[misc, name-defined]
    name, requires_logging_directory, tracker = "mine", False, None

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int | None, dict[str, float]]] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        self.heard.append((step, values))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def batches(count: int = 12) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(count * 16, 8, generator=torch.Generator().manual_seed(1))), 16)


def train(accelerator: Any, seen: list[Snapshot] | None = None, model: nn.Module | None = None, count: int = 12, **options: Any) -> torchsat.Monitor:
    model = model or net()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(count))
    sinks = () if seen is None else (seen.append,)
    with watch(accelerator, model, **{"every": 4, "budget": None, "errors": "raise", "sinks": sinks, **options}) as monitor:
        for (x,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    return monitor


def plain(accumulate: int = 1, precision: torch.dtype | None = None) -> list[Snapshot]:
    """The same loop without Accelerate."""
    seen: list[Snapshot] = []
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, every=4, budget=None, sinks=(seen.append,)):
        for index, (x,) in enumerate(batches()):
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                output = model(x)
            (output.float().square().mean() / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return seen


def figures(snapshots: list[Snapshot]) -> list[Any]:
    return [(snapshot.step, snapshot.records, snapshot.weights, snapshot.alerts) for snapshot in snapshots]


def test_records_are_those_of_the_plain_loop() -> None:
    seen: list[Snapshot] = []
    train(accelerate.Accelerator(cpu=True), seen)
    assert [snapshot.step for snapshot in seen] == [0, 1, 2, 4, 8]
    assert figures(seen) == figures(plain())


def test_only_real_steps_count_under_gradient_accumulation() -> None:
    """`optimizer.step()` is called after every batch, and steps after every third."""
    seen: list[Snapshot] = []
    train(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3), seen)
    assert [snapshot.step for snapshot in seen] == [0, 1, 2]
    assert {record.n for record in seen[0].records} == {3 * 16 * 16}
    assert figures(seen) == figures(plain(accumulate=3))


def test_bf16() -> None:
    seen: list[Snapshot] = []
    train(accelerate.Accelerator(cpu=True, mixed_precision="bf16"), seen)
    assert figures(seen) == figures(plain(precision=torch.bfloat16))


def test_steps_that_the_scaler_skips_do_not_count() -> None:
    """Accelerate has fp16 for GPUs only, so its optimizer is given a scaler, of a scale that is too large at first."""
    accelerator, seen, model = accelerate.Accelerator(cpu=True), list[Snapshot](), net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    skipped = 0
    with watch(accelerator, model, every=1, budget=None, errors="raise", sinks=(seen.append,)):
        for (x,) in batches():
            with torch.autocast("cpu", torch.float16):
                loss = model(x).square().mean()
            scaler.scale(loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            skipped += optimizer.step_was_skipped
    assert skipped > 0
    assert [snapshot.step for snapshot in seen] == list(range(12 - skipped))
    assert all(known(record.grad_z_rms) < 1 for record in seen[0].records)


def test_a_model_compiled_by_prepare() -> None:
    seen: list[Snapshot] = []
    torch._dynamo.reset()
    train(accelerate.Accelerator(cpu=True, dynamo_backend="aot_eager"), seen)
    for got, wanted in zip(seen, plain(), strict=True):
        assert got.step == wanted.step
        assert [record.derivative for record in got.records] == pytest.approx([record.derivative for record in wanted.records], rel=1e-5)


def test_the_tensorboard_tracker_gets_a_sub_run_on_its_axis(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("mine")
    train(accelerator)
    accelerator.log({"loss": 1.0}, step=3)
    accelerator.end_training()
    assert [snapshot.step for snapshot in torchsat.read(tmp_path / "mine")] == [0, 1, 2, 4, 8]
    assert EventAccumulator(str(tmp_path / "mine")).Reload().Tags()["scalars"] == ["loss"]


def test_trackers_get_the_scalars_those_too_that_are_made_later() -> None:
    seen: list[Snapshot] = []
    tracker = Tracker()
    accelerator = accelerate.Accelerator(cpu=True, log_with=tracker)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(accelerator, model, every=4, budget=None, errors="raise", sinks=(seen.append,))
    accelerator.init_trackers("mine")
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    for (x,) in loader:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    assert [step for step, _ in tracker.heard] == [0, 1, 2, 4, 8]
    for (_, values), snapshot in zip(tracker.heard, seen, strict=True):
        assert values == {**scalars(snapshot), "torchsat/alerts": values["torchsat/alerts"]}


def test_a_checkpoint_holds_the_state_of_a_registered_monitor(tmp_path: Path) -> None:
    remembered: list[int] = []

    def run(load: bool) -> list[Snapshot]:
        seen: list[Snapshot] = []
        accelerator, model = accelerate.Accelerator(cpu=True), net()
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(70))
        with watch(accelerator, model, every=1, budget=None, errors="raise", sinks=(seen.append,)) as monitor:
            accelerator.register_for_checkpointing(monitor)
            if load:
                accelerator.load_state(tmp_path)
            for (x,) in loader:
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if not load:
                accelerator.save_state(tmp_path)
            remembered.append(monitor.state_dict()["judge"]["observations"])
        return seen

    run(load=False)
    seen = run(load=True)
    assert [snapshot.step for snapshot in seen] == list(range(70, 140))
    # What the rules remember includes the observations of the run before.
    assert remembered == [70, 140]


DDP = """
import sys
from tests.test_accelerate import *
if __name__ == "__main__":
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=sys.argv[1])
    accelerator.init_trackers("mine")
    train(accelerator, count=24, errors="warn")
"""


def test_ddp(tmp_path: Path) -> None:
    """Two processes, half of the batches each: one writes, and it has the elements of both."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path / "out")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    snapshots = torchsat.read(tmp_path / "out" / "mine")
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 4, 8]
    assert len(list((tmp_path / "out" / "mine" / "torchsat").iterdir())) == 1
    assert {record.n for record in snapshots[0].records} == {2 * 16 * 16}


def test_the_example_runs_as_a_command(tmp_path: Path, run_example: RunExample) -> None:
    printed = run_example("accelerate_digits", "--epochs", "1")
    assert "1 (tanh) is saturated" in printed
    assert "29 steps" in printed
    assert [snapshot.step for snapshot in torchsat.read(tmp_path / "runs" / "accelerate_digits")] == [0, 1, 2, 4, 8, 16]
