"""What loggers make of our numbers: `scalars`, and the real W&B and MLflow without a network."""

import json
import os
import re
import struct
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchsat
from tests.conftest import RunExample
from tests.test_tensorboard import snapshots, write
from torchsat.tensorboard.stock import scalars

ROOT = Path(__file__).parent.parent
WANDB, MLFLOW = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL | re.MULTILINE)
"""Examples of the docs that do not run in the process of the tests: loggers replace functions of TensorBoard and leave threads behind."""
MODEL = """
import torch, torchsat
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
"""
TRAIN = """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.randn(64, 8)).square().mean().backward()
    optimizer.step()
monitor.close()
"""


def run(code: str, directory: Path, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=variables, cwd=directory)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scalars_are_those_of_tensorboard_without_the_number_of_the_site(tmp_path: Path) -> None:
    (given,) = snapshots(1)
    written = EventAccumulator(str(write(tmp_path, [given]))).Reload()
    there = {re.sub(r"/\d{3}_", "/", tag): written.Scalars(tag)[0].value for tag in written.Tags()["scalars"]}
    assert scalars(given, firing=0) == pytest.approx(there)
    assert scalars(given).keys() == there.keys() - {"torchsat/alerts"}


@pytest.mark.parametrize(
    ("module", "library", "command"),
    [
        ("lightning", ("lightning.pytorch", "pytorch_lightning"), 'pip install "lightning>='),
        ("transformers", ("transformers",), 'pip install "transformers'),
        ("accelerate", ("accelerate",), 'pip install "accelerate>='),
    ],
)
def test_a_missing_library_is_answered_with_the_command(module: str, library: tuple[str, ...], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"torchsat.integrations.{module}", raising=False)
    for name in library:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as raised:
        import_module(f"torchsat.integrations.{module}")
    assert command in str(raised.value)


def wandb_rows(directory: Path) -> list[dict[str, Any]]:
    """The history of an offline run: a log of protocol buffers in blocks of 32 KiB, as LevelDB has it."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    log, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", log, at)
        record += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in Record.FromString(record).history.item})
            record = b""
    return [row for row in rows if any(tag.startswith(("torchsat", "train/torchsat")) for tag in row)]


MOST = 1 / 0.6057
"""Of a tanh, the largest E|f'| over what N(0, 1) inputs give."""
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def test_wandb_syncs_the_scalars_of_our_event_file(tmp_path: Path) -> None:
    """Our writer was imported before `wandb.init` put its own class in the place of TensorBoard's."""
    pytest.importorskip("wandb", reason="W&B is not installed: pip install wandb")
    run(f"{MODEL}import torchsat.tensorboard.writer, wandb\n{WANDB}{TRAIN}run.finish()", tmp_path, **OFFLINE)
    rows = {row["global_step"]: row for row in wandb_rows(tmp_path)}
    for snapshot in torchsat.read(tmp_path / "runs" / "exp1"):
        row = rows[snapshot.step]
        found: Any = snapshot.records[0]
        assert row["torchsat/excess_max"] == pytest.approx(found.saturated - found.normal_low - found.normal_high)
        assert row["torchsat.derivative/000_1"] == pytest.approx(found.relative_derivative / found.normal_derivative)


def test_wandb_through_lightning_transformers_and_accelerate(tmp_path: Path) -> None:
    for name in ("wandb", "lightning", "transformers", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    code = """
from pathlib import Path
from tests.test_lightning import batches, callback, net, trainer
from lightning.pytorch.loggers import WandbLogger
Path("lightning").mkdir()
logger = WandbLogger(project="torchsat", save_dir="lightning", offline=True)
trainer(Path("lightning"), callback(), logger=logger).fit(net(), batches())
logger.experiment.finish()

from tests import test_transformers
test_transformers.trainer(Path("transformers"), test_transformers.callback(), report_to="wandb").train()
import wandb
wandb.finish()

from tests import test_accelerate
import accelerate
Path("accelerate").mkdir()
accelerator = accelerate.Accelerator(cpu=True, log_with="wandb")
accelerator.init_trackers("torchsat", init_kwargs={"wandb": {"dir": "accelerate"}})
test_accelerate.train(accelerator)
accelerator.end_training()
"""
    run(code, tmp_path, **OFFLINE)
    rows = wandb_rows(tmp_path / "lightning")
    assert [row["trainer/global_step"] for row in rows] == [0, 1, 2, 4, 8]
    assert all(0 < row["torchsat.derivative/net.1"] <= MOST for row in rows)
    (events,) = tmp_path.glob("lightning/torchsat/*/torchsat")
    assert [snapshot.step for snapshot in torchsat.read(events)] == [0, 1, 2, 4, 8]
    rows = wandb_rows(tmp_path)
    assert [row["train/global_step"] for row in rows] == [0, 1, 2, 4]
    assert all(0 < row["train/torchsat.derivative/bert.pooler.activation"] <= MOST for row in rows)
    rows = wandb_rows(tmp_path / "accelerate")
    assert [(row["_step"], row["torchsat/step"]) for row in rows] == [(step, step) for step in (0, 1, 2, 4, 8)]


def test_mlflow_gets_the_scalars_by_a_sink_and_its_autolog_starts_no_runs_because_of_us(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny pandas")
    pytest.importorskip("pandas", reason="mlflow.pytorch needs pandas")
    before = """
import json, mlflow
from torch.utils.tensorboard import SummaryWriter
from torchsat.tensorboard.stock import scalars
mlflow.set_tracking_uri("file:store")
mlflow.pytorch.autolog(log_every_n_step=1)
writer = SummaryWriter("run")
"""
    after = """
writer.add_scalar("loss", 1.0, 0)
writer.close()
active = mlflow.active_run().info.run_id
mlflow.end_run()
client = mlflow.MlflowClient()
runs = {run.info.run_id: sorted(run.data.metrics) for run in client.search_runs(["0"])}
history = client.get_metric_history(active, "torchsat.derivative/1")
print(json.dumps([list(runs) == [active] and "torchsat.derivative/000_1" not in runs[active], [(each.step, each.value) for each in history]]))
"""
    code = before + MODEL + MLFLOW.replace('"runs/exp1"', "writer=writer") + TRAIN + after
    printed = run(code, tmp_path, MLFLOW_ALLOW_FILE_STORE="true", MLFLOW_DISABLE_TELEMETRY="true")
    alone, history = json.loads(printed.splitlines()[-1])
    assert alone
    found: list[tuple[int, Any]] = [(snapshot.step, snapshot.records[0]) for snapshot in torchsat.read(tmp_path / "run")]
    assert history == [[step, pytest.approx(each.relative_derivative / each.normal_derivative)] for step, each in found]


def test_the_ignite_example_runs_as_a_command(tmp_path: Path, run_example: RunExample) -> None:
    pytest.importorskip("ignite", reason="Ignite is not installed: pip install pytorch-ignite")
    assert "1 (tanh) is saturated" in run_example("ignite_digits", "--epochs", "2")
    assert [snapshot.step for snapshot in torchsat.read(tmp_path / "runs" / "ignite")] == [0, 1, 2, 4, 8, 16, 32, 50]
