"""transformers.Trainer: what the callback records is what the plain loop records; where it writes, how it counts, when it opens and closes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason='transformers is not installed: pip install "transformers[torch]>=4.50"')
pytest.importorskip("accelerate", reason='The Trainer needs Accelerate: pip install "transformers[torch]>=4.50"')

import torchsat  # noqa: E402
from tests.conftest import RunExample  # noqa: E402
from torchsat.integrations import transformers as ours  # noqa: E402
from torchsat.integrations.transformers import Torchsat  # noqa: E402
from torchsat.record import Snapshot  # noqa: E402
from torchsat.tensorboard.stock import scalars  # noqa: E402
from torchsat.transport import flight  # noqa: E402

ROOT = Path(__file__).parent.parent


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    # Without dropout, since the Trainer draws its own random numbers.
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    out: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=128, **sizes, **quiet))
    return out


def lines(count: int = 96) -> list[dict[str, Any]]:
    """Letters of Python's help texts; does the line hold a capital?"""
    text = re.sub(r"[^ -~]", " ", "".join(topics.values()))
    parts = [text[16 * k : 16 * k + 16] for k in range(count)]
    return [{"input_ids": torch.tensor([ord(letter) for letter in part]), "labels": int(part != part.lower())} for part in parts]


def trainer(directory: Path, callback: Any, steps: int = 6, kind: Any = transformers.Trainer, model: nn.Module | None = None, **options: Any) -> Any:
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "lr_scheduler_type": "constant"}
    sizes = {"per_device_train_batch_size": 8, "max_steps": steps, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    settings = transformers.TrainingArguments(str(directory), **{**quiet, **sizes, **options})
    # The order of the data is that of the plain loop.
    kind = type("InOrder", (kind,), {"_get_train_sampler": lambda self, dataset=None: torch.utils.data.SequentialSampler(self.train_dataset)})
    return kind(model or bert(), settings, train_dataset=lines(), eval_dataset=lines(8), callbacks=[] if callback is None else [callback])


def callback(seen: list[Snapshot] | None = None, **options: Any) -> Torchsat:
    return Torchsat(**{"every": 4, "budget": None, "errors": "raise", "sinks": () if seen is None else (seen.append,), **options})


def plain(steps: int = 6, accumulate: int = 1, precision: torch.dtype | None = None) -> list[Snapshot]:
    """The loop that the Trainer stands for."""
    seen: list[Snapshot] = []
    model, data = bert().train(), lines()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, every=4, budget=None, sinks=(seen.append,)):
        for step in range(steps * accumulate):
            batch = data[8 * step : 8 * step + 8]
            ids, labels = torch.stack([line["input_ids"] for line in batch]), torch.tensor([line["labels"] for line in batch])
            with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            if (step + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return seen


def activations(snapshot: Snapshot) -> list[torchsat.Record]:
    return [record for record in snapshot.records if record.activation != "softmax"]


def observations(watched: Torchsat) -> int:
    """How many observations its rules remember, those of the run before included."""
    assert watched.monitor is not None
    found: int = watched.monitor.state_dict()["judge"]["observations"]
    return found


def figures(snapshots: list[Snapshot]) -> list[Any]:
    return [(snapshot.step, snapshot.records, snapshot.weights, snapshot.alerts) for snapshot in snapshots]


def test_records_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    """With evaluations in between, which are not mixed in."""
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen), eval_strategy="steps", eval_steps=1).train()
    assert [snapshot.step for snapshot in seen] == [0, 1, 2, 4]
    assert {record.activation for record in seen[0].records} == {"gelu", "tanh", "softmax"}
    assert figures(seen) == figures(plain())


def test_gradient_accumulation_is_one_step(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen), steps=3, gradient_accumulation_steps=2).train()
    assert [snapshot.step for snapshot in seen] == [0, 1, 2]
    assert {record.n for record in activations(seen[0])} == {2 * 8 * 16 * 32, 2 * 8 * 16}
    # The classifier takes the mean of each batch, and the Trainer, which expects it to divide by the labels of both, leaves it at that.
    assert figures(seen) == figures(plain(3, accumulate=2))


def test_bf16(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen), bf16=True).train()
    assert figures(seen) == figures(plain(precision=torch.bfloat16))


@pytest.mark.skipif(
    torch.__version__ < "2.7" and transformers.__version__ >= "5",
    reason="what transformers 5 compiles needs torch.compiler.is_exporting, of torch 2.7",
)
def test_a_compiled_model(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    torch._dynamo.reset()
    trainer(tmp_path, callback(seen), torch_compile=True, torch_compile_backend="aot_eager").train()
    for got, wanted in zip(seen, plain(), strict=True):
        assert got.step == wanted.step
        for record, other in zip(activations(got), activations(wanted), strict=True):
            assert (record.site, record.n) == (other.site, other.n)
            assert record.derivative == pytest.approx(other.derivative, rel=1e-4)


def test_the_trainers_tensorboard_directory_gets_a_sub_run_on_its_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    trainer(tmp_path, callback(), report_to="tensorboard").train()
    assert [snapshot.step for snapshot in torchsat.read(tmp_path / "curves")] == [0, 1, 2, 4]
    theirs = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert not [tag for tag in theirs.Tags()["scalars"] if "torchsat" in tag]
    assert [event.step for event in theirs.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


class Reporter(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Stands for W&B's and its like; the real W&B is in test_loggers.py."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, float]]] = []
        self.ended = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        assert not self.ended
        self.heard.append((state.global_step, logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = True


def reported(directory: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Snapshot]) -> tuple[Reporter, Any]:
    reporter = Reporter()
    monkeypatch.setattr(ours, "_REPORTERS", (Reporter,))
    running = trainer(directory, reporter)
    running.add_callback(transformers.PrinterCallback())
    running.add_callback(callback(seen))
    running.train()
    return reporter, running


def test_what_else_is_reported_to_gets_the_scalars_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console and the log history do not, and we do not hear ourselves."""
    seen: list[Snapshot] = []
    reporter, running = reported(tmp_path, monkeypatch, seen)
    given = [(step, logs) for step, logs in reporter.heard if "torchsat/nonfinite" in logs]
    assert [step for step, _ in given] == [0, 1, 2, 4]
    for (_, logs), snapshot in zip(given, seen, strict=True):
        assert logs == {**scalars(snapshot), "torchsat/alerts": logs["torchsat/alerts"]}
    assert len(reporter.heard) == len(given) + 7
    assert "torchsat" not in capsys.readouterr().out
    assert "torchsat" not in json.dumps(running.state.log_history)


def test_reporters_hear_what_arrives_late_before_they_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where an observation is read at a later step."""
    monkeypatch.setattr(flight.Flight, "arrived", lambda self: False)
    reporter, _ = reported(tmp_path, monkeypatch, [])
    assert [step for step, logs in reporter.heard if "torchsat/nonfinite" in logs] == [0, 1, 2, 4]


def test_reporting_to_nobody_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    watched = callback()
    trainer(tmp_path / "out", watched).train()
    assert watched.monitor is not None
    assert watched.monitor.latest is not None
    assert not [path for path in tmp_path.rglob("*") if "tfevents" in path.name or "torchsat" in path.name]


def test_a_directory_of_the_users(tmp_path: Path) -> None:
    trainer(tmp_path, callback(log_dir=tmp_path / "ours")).train()
    assert len(torchsat.read(tmp_path / "ours")) == 4


def test_a_resumed_run_goes_on_with_its_number_and_its_state(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 16}
    trainer(tmp_path, callback(every=1), steps=5, **options).train()
    assert torch.load(tmp_path / "checkpoint-5" / "torchsat.pt")
    seen: list[Snapshot] = []
    second = callback(seen, every=1)
    trainer(tmp_path, second, steps=10, **options).train(resume_from_checkpoint=True)
    assert [snapshot.step for snapshot in seen] == [5, 6, 7, 8, 9]
    assert observations(second) == 10


def test_a_damaged_state_does_not_stop_the_run_that_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 16}
    trainer(tmp_path, callback(every=1), steps=5, **options).train()
    kept = tmp_path / "checkpoint-5" / "torchsat.pt"
    kept.write_bytes(kept.read_bytes()[:100])
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen, every=1), steps=7, **options).train(resume_from_checkpoint=True)
    assert [snapshot.step for snapshot in seen] == [5, 6]
    assert any(f"{kept} cannot be read, alerts begin anew" in message for message in caplog.messages)


def test_the_state_of_another_run_is_left_alone(tmp_path: Path) -> None:
    """A run resumed from elsewhere, into a directory where another run has left a checkpoint of the same step."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 16}
    for folder in ("mine", "theirs"):
        trainer(tmp_path / folder, callback(every=1), steps=5, **options).train()
    seen: list[Snapshot] = []
    where = str(tmp_path / "mine" / "checkpoint-5")
    second = callback(seen, every=1)
    trainer(tmp_path / "theirs", second, steps=7, **options).train(resume_from_checkpoint=where)
    assert [snapshot.step for snapshot in seen] == [5, 6]
    assert observations(second) == 2


def test_a_full_disk_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    save = torch.save

    def full(what: Any, where: Any, *given: Any, **named: Any) -> None:
        if str(where).endswith("torchsat.pt"):
            raise OSError("No space left on device")
        save(what, where, *given, **named)

    monkeypatch.setattr(torch, "save", full)
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen, every=1), steps=6, save_strategy="steps", save_steps=5).train()
    assert [snapshot.step for snapshot in seen] == [0, 1, 2, 3, 4, 5]
    assert any("its state is not in the checkpoint of step 5: OSError: No space left on device" in message for message in caplog.messages)


def test_a_checkpoint_made_without_us_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, None, steps=3, **options).train()
    seen: list[Snapshot] = []
    trainer(tmp_path, callback(seen), steps=6, **options).train(resume_from_checkpoint=True)
    assert [snapshot.step for snapshot in seen] == [3, 4]


def test_training_again_after_an_exception(tmp_path: Path) -> None:
    class Fails(transformers.Trainer):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 3:
                raise RuntimeError("the user's own mistake")
            out: torch.Tensor = super().training_step(*args, **kwargs)
            return out

    seen: list[Snapshot] = []
    watched, model = callback(seen), bert()
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        trainer(tmp_path, watched, kind=Fails, model=model).train()
    first = watched.monitor
    trainer(tmp_path, watched, model=model).train()
    assert "closed" in repr(first)
    assert [snapshot.step for snapshot in seen] == [0, 1, 2, 0, 1, 2, 4]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_evaluating_alone_opens_nothing(tmp_path: Path) -> None:
    watched = callback()
    trainer(tmp_path, watched).evaluate()
    assert watched.monitor is None


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    running = trainer(tmp_path, callback())
    running.args._n_gpu = 2
    with pytest.raises(TypeError, match=r"nn\.DataParallel cannot be watched"):
        running.callback_handler.on_train_begin(running.args, running.state, running.control)


DDP = """
import sys
from tests.test_transformers import *
if __name__ == "__main__":
    trainer(Path(sys.argv[1]), callback(errors="warn"), report_to="tensorboard", ddp_backend="gloo").train()
"""


def test_ddp(tmp_path: Path) -> None:
    """Two processes: one writes, and it has the elements of both."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TENSORBOARD_LOGGING_DIR": str(tmp_path / "curves")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path / "out")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    snapshots = torchsat.read(tmp_path / "curves")
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 4]
    assert len(list((tmp_path / "curves" / "torchsat").iterdir())) == 1
    assert snapshots[0]["bert.pooler.activation"].n == 2 * 8 * 16


def test_the_example_runs_as_a_command(tmp_path: Path, run_example: RunExample) -> None:
    assert "5 sites (2 softmaxes, 3 modules) seen; nothing is known to be unseen" in run_example("transformers_text", "--steps", "20")
    (run,) = (tmp_path / "runs" / "transformers_text" / "runs").iterdir()
    assert [snapshot.step for snapshot in torchsat.read(run)] == [0, 1, 2, 4, 8, 16]
