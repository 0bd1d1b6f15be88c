"""Lightning's Trainer: what the callback records is what the plain loop records; where it writes, how it counts, when it opens and closes."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning.pytorch", reason='Lightning is not installed: pip install "lightning>=2.4"')

import torchsat  # noqa: E402
from tests.conftest import RunExample  # noqa: E402
from torchsat.integrations.lightning import Torchsat  # noqa: E402
from torchsat.record import Snapshot  # noqa: E402
from torchsat.tensorboard.stock import scalars  # noqa: E402

ROOT = Path(__file__).parent.parent
pytestmark = [
    # A name of torch that Lightning still uses.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # Advice to its user: workers for the loader, a shorter interval of logging, a resumable loader.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        self.fails_at = fails_at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor | None:
        if index == self.fails_at:
            raise RuntimeError("the user's own mistake")
        loss = self(batch[0]).square().mean()
        self.log("loss", loss)
        out: torch.Tensor = loss
        return out

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self(100 * batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Two(Net):
    """Optimizers of two halves, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        loss = self(batch[0]).square().mean()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[:2], self.net[2:])]


def net(made: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return made()


def batches(count: int = 12, size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(count * size, 8, generator=torch.Generator().manual_seed(1))), size)


def trainer(directory: Path, *callbacks: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return lightning.Trainer(**{**quiet, "default_root_dir": directory, "max_epochs": 1, "callbacks": list(callbacks), **options})


def callback(seen: list[Snapshot] | None = None, **options: Any) -> Torchsat:
    return Torchsat(**{"every": 4, "budget": None, "errors": "raise", "sinks": () if seen is None else (seen.append,), **options})


def plain(accumulate: int = 1, precision: torch.dtype | None = None, scaler: Any = None) -> list[Snapshot]:
    """The loop that Lightning stands for."""
    seen: list[Snapshot] = []
    model = net()
    optimizer = model.configure_optimizers()
    with torchsat.watch(model, every=4, budget=None, sinks=(seen.append,)):
        for index, (x,) in enumerate(batches()):
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                loss = model(x).square().mean() / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (index + 1) % accumulate == 0:
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                optimizer.zero_grad()
    return seen


def figures(snapshots: list[Snapshot]) -> list[Any]:
    return [(snapshot.step, snapshot.records, snapshot.weights, snapshot.alerts) for snapshot in snapshots]


def test_records_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    """With a sanity check before and validations in between, which are not mixed in."""
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen), logger=False, val_check_interval=3).fit(net(), batches(), batches(2))
    assert [snapshot.step for snapshot in seen] == [0, 1, 2, 4, 8]
    assert figures(seen) == figures(plain())


def test_gradient_accumulation_is_one_step(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen), logger=False, accumulate_grad_batches=3).fit(net(), batches())
    assert [snapshot.step for snapshot in seen] == [0, 1, 2]
    assert {record.n for record in seen[0].records} == {3 * 16 * 16}
    assert figures(seen) == figures(plain(accumulate=3))


def test_bf16_mixed(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen), logger=False, precision="bf16-mixed").fit(net(), batches())
    assert figures(seen) == figures(plain(precision=torch.bfloat16))


def test_16_mixed_is_free_of_the_scale_and_of_skipped_steps(tmp_path: Path) -> None:
    """On a CPU Lightning replaces 16-mixed by bf16-mixed, so its plugin is given: the first scale is too large for fp16."""
    from lightning.pytorch.plugins import MixedPrecision

    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**24) for _ in range(2)]
    seen: list[Snapshot] = []
    running = trainer(tmp_path, callback(seen), logger=False, plugins=[MixedPrecision("16-mixed", "cpu", scalers[0])])
    running.fit(net(), batches())
    assert figures(seen) == figures(plain(precision=torch.float16, scaler=scalers[1]))
    skipped = 24 - int(torch.tensor(scalers[0].get_scale()).log2())
    assert skipped > 0
    assert running.global_step == 12
    assert [snapshot.step for snapshot in seen] == [step for step in (0, 1, 2, 4, 8) if step < 12 - skipped]


class Silent(Net):
    """`self.log` in a compiled training_step is more than torch 2.13 can compile, watched or not."""

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        out: torch.Tensor = self(batch[0]).square().mean()
        return out


@pytest.mark.parametrize("compiled", ["eager", "in_graph"])
def test_a_compiled_module(compiled: str, tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    torch._dynamo.reset()
    trainer(tmp_path, callback(seen, compiled=compiled), logger=False).fit(torch.compile(net(Silent), backend="aot_eager"), batches())
    expected = plain()
    assert [snapshot.step for snapshot in seen] == [snapshot.step for snapshot in expected]
    for got, wanted in zip(seen, expected, strict=True):
        assert [record.site for record in got.records] == ["net.1", "net.3"]
        for record, other in zip(got.records, wanted.records, strict=True):
            assert record.derivative == pytest.approx(other.derivative, rel=1e-5)
            assert record.attenuation == pytest.approx(other.attenuation, rel=1e-5)


def test_the_tensorboard_logger_gets_a_sub_run_on_its_own_axis(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="mine")
    trainer(tmp_path, callback(), logger=logger, log_every_n_steps=1).fit(net(), batches())
    assert [snapshot.step for snapshot in torchsat.read(logger.log_dir)] == [0, 1, 2, 4, 8]
    assert (Path(logger.log_dir) / "torchsat").is_dir()
    theirs = EventAccumulator(logger.log_dir).Reload()
    assert not [tag for tag in theirs.Tags()["scalars"] if "torchsat" in tag]
    assert [event.step for event in theirs.Scalars("loss")] == list(range(12))


def test_several_optimizers_count_as_one_step_as_on_the_axis_of_lightnings_loggers(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    seen: list[Snapshot] = []
    running = trainer(tmp_path, callback(seen), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    running.fit(net(Two), batches())
    assert running.global_step == 24
    assert [snapshot.step for snapshot in seen] == [0, 1, 2, 4, 8]
    assert figures(seen) == figures(plain())
    rows = list(csv.DictReader((Path(running.log_dir) / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["loss"]] == [str(step) for step in range(12)]
    assert [row["step"] for row in rows if row["torchsat/excess_max"]] == ["0", "1", "2", "4", "8"]


def test_other_loggers_get_the_scalars(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    seen: list[Snapshot] = []
    running = trainer(tmp_path, callback(seen), logger=CSVLogger(tmp_path))
    running.fit(net(), batches())
    rows = [row for row in csv.DictReader((Path(running.log_dir) / "metrics.csv").read_text().splitlines()) if row["torchsat/nonfinite"]]
    for row, snapshot in zip(rows, seen, strict=True):
        values = {tag: float(text) for tag, text in row.items() if text and tag.startswith("torchsat") and tag != "torchsat/alerts"}
        assert values == scalars(snapshot)
        assert row["torchsat/alerts"]
    assert [snapshot.step for snapshot in torchsat.read(running.log_dir)] == [0, 1, 2, 4, 8]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("stops_at", [5, 6])
def test_a_resumed_run_goes_on_with_its_number_and_its_state(stops_at: int, tmp_path: Path) -> None:
    """From the middle of an epoch and from its end."""
    options = {"logger": False, "enable_checkpointing": True, "max_epochs": 4}
    saves = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stops_at)
    first = callback(every=1)
    trainer(tmp_path, first, saves, max_steps=stops_at, **options).fit(net(), batches(6, 256))
    saved = torch.load(saves.best_model_path, weights_only=True)["callbacks"][first.state_key]
    seen: list[Snapshot] = []
    second = callback(seen, every=1)
    trainer(tmp_path, second, saves, max_steps=2 * stops_at, **options).fit(net(), batches(6, 256), ckpt_path=saves.best_model_path)
    assert [snapshot.step for snapshot in seen] == list(range(stops_at, 2 * stops_at))
    assert saved
    assert second.monitor is not None
    assert second.monitor.state_dict()["judge"]["observations"] == 2 * stops_at


def test_two_callbacks_are_told_apart_in_a_checkpoint(tmp_path: Path) -> None:
    both = [callback(include="*.1"), callback(include="*.3")]
    assert len({each.state_key for each in (*both, callback())}) == 3
    trainer(tmp_path, *both, logger=False).fit(net(), batches())
    assert all(each.monitor is not None for each in both)


def test_what_the_user_raises_closes_the_monitor(tmp_path: Path) -> None:
    watched = callback()
    model = net()
    model.fails_at = 3
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        trainer(tmp_path, watched, logger=False).fit(model, batches())
    assert "closed" in repr(watched.monitor)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_fit_twice_and_once_more_with_another_trainer(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    watched = callback(seen)
    running = trainer(tmp_path, watched, logger=False)
    running.fit(net(), batches(4))
    running.fit_loop.max_epochs = 2
    running.fit(net(), batches(4))
    trainer(tmp_path, watched, logger=False).fit(net(), batches(2))
    assert [snapshot.step for snapshot in seen] == [0, 1, 2, 4, 0, 1]


def test_validate_and_test_alone_open_nothing(tmp_path: Path) -> None:
    watched = callback()
    running = trainer(tmp_path, watched)
    running.validate(net(), batches(2), verbose=False)
    running.test(net(), batches(2), verbose=False)
    assert watched.monitor is None
    assert not list(tmp_path.rglob("torchsat"))


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}])
def test_a_trainer_without_a_logger_gets_no_files(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    watched = callback()
    trainer(tmp_path, watched, **options).fit(net(), batches(), batches(1))
    assert watched.monitor is not None
    assert watched.monitor.latest is not None
    assert not list(tmp_path.iterdir())


def test_a_directory_of_the_users(tmp_path: Path) -> None:
    trainer(tmp_path / "theirs", callback(log_dir=tmp_path / "ours"), logger=False).fit(net(), batches())
    assert len(torchsat.read(tmp_path / "ours")) == 5


@pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")
def test_the_package_pytorch_lightning(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):  # type: ignore[misc, name-defined]
        forward, training_step, configure_optimizers = Net.forward, Net.training_step, Net.configure_optimizers
        fails_at = None

        def __init__(self) -> None:
            super().__init__()
            self.net = net().net

    seen: list[Snapshot] = []
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    logger = other.loggers.TensorBoardLogger(tmp_path)
    other.Trainer(max_epochs=1, callbacks=[callback(seen)], logger=logger, **quiet).fit(Other(), batches())
    assert figures(seen) == figures(plain())
    assert len(torchsat.read(logger.log_dir)) == 5


DDP = """
import sys, torch
from pathlib import Path
from tests.test_lightning import *
if __name__ == "__main__":
    from lightning.pytorch.loggers import TensorBoardLogger
    directory = Path(sys.argv[1])
    watched = callback(errors="warn")
    running = trainer(directory, watched, strategy="ddp", devices=2, logger=TensorBoardLogger(directory, "", ""))
    running.fit(net(), batches(24), batches(2))
    assert (watched.monitor.latest is not None) or running.global_rank, "rank 0 has a snapshot"
"""


def test_ddp(tmp_path: Path) -> None:
    """Two processes, half of the batches each: one run directory, and the elements of both."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, tmp_path / "run"], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    snapshots = torchsat.read(tmp_path / "run")
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 4, 8]
    assert len(list((tmp_path / "run" / "torchsat").iterdir())) == 1
    assert {record.n for record in snapshots[0].records} == {2 * 16 * 16}


def test_the_example_runs_as_a_command(tmp_path: Path, run_example: RunExample) -> None:
    assert "net.1 (sigmoid) is saturated" in run_example("lightning_digits", "--steps", "30")
    assert [snapshot.step for snapshot in torchsat.read(tmp_path / "lightning_logs" / "version_0")] == [0, 1, 2, 4, 8, 16]
