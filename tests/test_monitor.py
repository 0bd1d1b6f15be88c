"""The life of a monitor from watch to close: training is bit-identical to training without it, and close leaves nothing behind."""

import functools
import gc
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchsat
from tests.models import Cnn, linear_at, mlp
from tests.training import open_files, traces_of, train
from tests.truth import known


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.reentrant = nn.Linear(64, 32), reentrant
        self.block, self.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.5)), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=self.reentrant))
        return out


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mlp, {}),
        (functools.partial(mlp, nn.RReLU), {}),
        (Cnn, {}),
        (Cnn, {"autocast": torch.bfloat16}),
        (mlp, {"autocast": torch.bfloat16, "accumulate": 3}),
        (functools.partial(Checkpointed, False), {}),
        (functools.partial(Checkpointed, True), {"autocast": torch.bfloat16}),
        (mlp, {"optimizer": torch.optim.AdamW}),
    ],
)
def test_training_is_bit_identical(make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path) -> None:
    """Losses, weights, random state and state_dict keys are those of training without a monitor."""

    def run(watched: bool) -> tuple[list[float], dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        model = make()
        monitor = torchsat.watch(model, tmp_path, every=1, sample=100, errors="raise") if watched else None
        losses = train(model, **options)
        keys = list(model.state_dict())
        state = torch.get_rng_state()
        if monitor is not None:
            monitor.close()
            assert len(torchsat.read(tmp_path)) == 12
        assert list(model.state_dict()) == keys
        return losses, model.state_dict(), state

    plain, watched = run(False), run(True)
    assert plain[0] == watched[0]
    assert list(plain[1]) == list(watched[1])
    for name, value in plain[1].items():
        assert torch.equal(value, watched[1][name]), name
    assert torch.equal(plain[2], watched[2])


def test_close_leaves_nothing_behind(tmp_path: Path) -> None:
    """No hook, attribute, thread, open file or signal handler is left."""
    model = mlp()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    threads, files, handler = threading.active_count(), open_files(), signal.getsignal(signal.SIGTERM)
    monitor = torchsat.watch(model, tmp_path, every=1, errors="raise")
    assert traces_of(model)
    assert threading.active_count() == threads + 1
    train(model, 3)
    monitor.close()
    monitor.close()
    assert not traces_of(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert threading.active_count() == threads
    assert open_files() == files
    assert signal.getsignal(signal.SIGTERM) == handler
    assert all(not parameter._backward_hooks for parameter in model.parameters())
    train(model, 2)
    assert monitor.latest is not None
    assert monitor.latest.step == 2


def test_the_context_manager_closes_after_an_exception() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="mine"), torchsat.watch(model):
        raise RuntimeError("mine")
    assert not traces_of(model)


def test_closing_from_within_a_callback_does_not_break_the_optimizer() -> None:
    inner = mlp()
    middle = nn.Sequential(inner)
    model = nn.Sequential(middle)
    monitor = torchsat.watch(model, every=1, errors="raise", sinks=(lambda snapshot: monitor.close(),))
    others = [torchsat.watch(part, every=1, errors="raise") for part in (middle, inner)]
    train(model, 5)
    assert monitor.latest is not None
    assert monitor.latest.step == 0
    assert others[0].latest is not None
    assert others[0].latest.step == 4


def test_a_monitor_nobody_keeps_goes_on() -> None:
    model, snapshots = mlp(), list[torchsat.Snapshot]()
    torchsat.watch(model, every=10, errors="raise", sinks=(snapshots.append,))
    train(model, 41, each=lambda step: gc.collect() if step in (0, 9, 35) else 0)
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 4, 8, 10, 16, 20, 30, 32, 40]


def test_a_model_is_not_kept_alive() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=2)
    train(model, 4)
    references = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert [reference() for reference in references] == [None] * 6
    other = mlp()
    train(other, 1)
    assert "closed" in repr(monitor)


def test_stuck_units_are_found_across_observations() -> None:
    model = mlp(nn.ReLU)
    with torch.no_grad():
        linear_at(model, 0).bias[:10] = -1e3
    monitor = torchsat.watch(model, every=1, rules=(), errors="raise")
    stuck = []
    train(model, 64, each=lambda step: stuck.append(known(monitor.latest)["1"].stuck))
    # A step has 16 samples, and a unit that has never been active is judged after 200 samples, which 13 observations have.
    assert stuck[:12] == [None] * 12
    assert stuck[12:] == [pytest.approx(10 / 32)] * 52
    assert monitor.latest is not None
    assert monitor.latest["1"].stuck_n == 1000 + 16
