"""Steps, schedule, compile, and the promises to the user (design, section 5)."""

import contextlib
import copy
import functools
import gc
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchsat
from torchsat import activations, numeric, taps
from torchsat.kernels import cpu
from torchsat.weights import fan_in


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.SiLU(inplace=True))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x.reshape(-1, 1, 8, 8)).flatten(1)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.reentrant = nn.Linear(64, 32), reentrant
        self.block, self.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.5)), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=self.reentrant))


def mlp(act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 3))


def train(
    model: nn.Module,
    steps: int = 12,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    each: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """A plain loop on random data; the losses."""
    generator = torch.Generator().manual_seed(7)
    steps_of = optimizer(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        for _ in range(accumulate):
            x, y = torch.randn(16, 64, generator=generator), torch.randint(3, (16,), generator=generator)
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item())
        steps_of.step()
        steps_of.zero_grad()
        each(step)
    return losses


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
def test_training_is_bit_identical(make: Callable[[], nn.Module], options: dict[str, object], tmp_path: Path) -> None:
    """Promise 1."""

    def run(watched: bool) -> tuple[list[float], dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        model = make()
        monitor = torchsat.watch(model, tmp_path, every=1, sample=100, errors="raise") if watched else None
        losses = train(model, **options)  # type: ignore[arg-type]
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


def traces_of(model: nn.Module) -> list[object]:
    return [
        thing
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
        for thing in getattr(module, kind).values()
    ]


def test_close_leaves_nothing_behind(tmp_path: Path) -> None:
    """Promise 3."""
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
    assert monitor.latest.step == 2


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_the_context_manager_closes_after_an_exception() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="mine"), torchsat.watch(model):
        raise RuntimeError("mine")
    assert not traces_of(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_distributed_wrapper_is_looked_through(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Loopback: the host's own name need not resolve.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, snapshots = mlp(), list[torchsat.Snapshot]()
        if when == "before":
            torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
        wrapped = nn.parallel.DistributedDataParallel(model)
        if when == "after":
            torchsat.watch(wrapped, every=1, errors="raise", sinks=(snapshots.append,))
        train(wrapped, 4)
        assert [[record.site for record in snapshot.records] for snapshot in snapshots] == [["1", "3"]] * 4
        assert all(snapshot["1"].grad_n == 16 * 32 and len(snapshot.weights) == 2 for snapshot in snapshots)
    finally:
        torch.distributed.destroy_process_group()


def test_closing_from_within_a_callback_does_not_break_the_optimizer() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise", sinks=(lambda snapshot: monitor.close(),))
    others = [torchsat.watch(model, every=1, errors="raise") for _ in range(3)]
    train(model, 5)
    assert monitor.latest.step == 0
    assert others[0].latest.step == 4


def test_a_monitor_nobody_keeps_goes_on() -> None:
    model, snapshots = mlp(), []
    torchsat.watch(model, every=10, errors="raise", sinks=(snapshots.append,))
    train(model, 41, each=lambda step: gc.collect())
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 4, 8, 10, 20, 30, 40]


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


def test_unobserved_steps_run_none_of_our_code_on_the_model() -> None:
    """Promise 4, by counting: hooks are on the model in observed steps only."""
    model, seen = mlp(), {}
    torchsat.watch(model, every=5, errors="raise")
    seen[0] = bool(traces_of(model))
    train(model, 14, each=lambda step: seen.__setitem__(step + 1, bool(traces_of(model))))
    assert [step for step, hooked in seen.items() if hooked] == [0, 1, 2, 4, 5, 10]


def test_steps_are_those_of_the_optimizers_that_own_the_model() -> None:
    model, other = mlp(), mlp()
    monitor, others = torchsat.watch(model, every=1, errors="raise"), torchsat.watch(other, every=1, errors="raise")
    train(model, 3)
    train(other, 7)
    monitor.flush()
    assert monitor.latest.step == 2
    assert others.latest.step == 6


def test_two_optimizers_on_one_model_make_one_step() -> None:
    model, snapshots = mlp(), []
    torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
    first, second = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2:].parameters(), lr=0.01)
    for _ in range(4):
        model(torch.randn(8, 64)).sum().backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 3]
    assert all(snapshot["1"].n == 8 * 32 for snapshot in snapshots)
    assert all(weight.update_ratio > 0 for snapshot in snapshots for weight in snapshot.weights)


def test_two_optimizers_in_turn_make_a_step_each_round() -> None:
    model, snapshots = mlp(), []
    torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
    optimizers = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2:].parameters(), lr=0.1)
    for _ in range(4):
        for optimizer in optimizers:
            model(torch.randn(8, 64)).sum().backward()
            optimizer.step()
            model.zero_grad()
    assert 3 <= len(snapshots) <= 8
    assert [snapshot.step for snapshot in snapshots] == list(range(len(snapshots)))


def test_an_lbfgs_step_is_one_step_with_all_its_evaluations() -> None:
    model, snapshots = mlp(), []
    torchsat.watch(model, every=1, errors="raise", sinks=(snapshots.append,))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, y = torch.randn(16, 64), torch.randint(3, (16,))
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    counts = []
    for _ in range(3):
        before = calls[0]
        optimizer.step(closure)
        counts.append(calls[0] - before)
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2]
    assert [snapshot["1"].n for snapshot in snapshots] == [16 * 32 * count for count in counts]
    assert all(snapshot.weights[0].grad_norm > 0 and snapshot.weights[0].update_ratio > 0 for snapshot in snapshots)


def test_a_loop_without_an_optimizer_steps_by_hand() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=2, errors="raise")
    for _ in range(5):
        model(torch.randn(8, 64)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
        monitor.step()
    assert monitor.latest.step == 4
    assert monitor.latest.weights[0].gain == pytest.approx(1 / 3**0.5, rel=0.1)


def test_the_optimizer_may_be_made_later_and_raise() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")

    class Odd(torch.optim.SGD):
        fails = True

        def step(self, closure: None = None) -> None:
            if self.fails:
                raise RuntimeError("not now")
            super().step()

    optimizer = Odd(model.parameters(), lr=0.1)
    for attempt in range(3):
        Odd.fails = attempt == 0
        model(torch.randn(8, 64)).sum().backward()
        if attempt == 0:
            with pytest.raises(RuntimeError, match="not now"):
                optimizer.step()
        else:
            optimizer.step()
    monitor.flush()
    assert monitor.latest.step == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_is_taken_out_and_its_skipped_steps_are_not_counted(fused: bool) -> None:
    def run(scale: float | None) -> torchsat.Snapshot:
        torch.manual_seed(0)
        model = mlp(nn.Sigmoid)
        monitor = torchsat.watch(model, every=1, errors="raise")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
        x, y = torch.randn(16, 64), torch.randint(3, (16,))
        weights = model[0].weight.detach().clone()
        skipped = 0
        while torch.equal(weights, model[0].weight):
            optimizer.zero_grad()
            loss = 1e4 * nn.functional.cross_entropy(model(x), y)
            # 2^126 times these gradients overflows float32: the scaler halves its scale until they are finite.
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped += torch.equal(weights, model[0].weight)
        monitor.flush()
        assert (skipped > 0) == (scale is not None and scale > 1e30)
        return monitor.latest

    plain = run(None)
    for scaled in (run(2.0**16), run(2.0**126)):
        for site in ("1", "3"):
            for name in ("n", "grad_n", "attenuation", "grad_a_rms", "grad_z_rms", "grad_nonfinite"):
                assert getattr(scaled[site], name) == pytest.approx(getattr(plain[site], name), rel=1e-5), (site, name)
        for mine, theirs in zip(scaled.weights, plain.weights, strict=True):
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
            assert mine.update_ratio == pytest.approx(theirs.update_ratio, rel=1e-4)


def test_weights_are_measured_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Conv1d(1, 4, 3), nn.ReLU())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.tanh, self.conv, self.relu = model

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(self.tanh(self.linear(x)).unsqueeze(1)))

    net, x = Net(), torch.randn(400, 20) * 2 + 5
    monitor = torchsat.watch(net, sample=None, errors="raise")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    before = copy.deepcopy(net)
    net(x).sum().backward()
    optimizer.step()
    monitor.flush()
    linear, conv = monitor.latest.weights
    assert (linear.name, linear.feeds, linear.fan_in) == ("linear", ("tanh",), 20)
    assert (conv.name, conv.feeds, conv.fan_in) == ("conv", ("relu",), 3)
    # As they made z, before the step.
    assert linear.norm == pytest.approx(before.linear.weight.norm().item(), rel=1e-6)
    assert linear.gain == pytest.approx(before.linear.weight.norm().item() / 30**0.5, rel=1e-6)
    assert conv.gain == pytest.approx(before.conv.weight.norm().item() / 4**0.5, rel=1e-6)
    assert linear.grad_norm == pytest.approx(net.linear.weight.grad.norm().item(), rel=1e-6)
    change = (net.linear.weight - before.linear.weight).norm() / before.linear.weight.norm()
    assert linear.update_ratio == pytest.approx(change.item(), rel=1e-5)
    assert linear.input_rms == pytest.approx(x.square().mean().sqrt().item(), rel=1e-6)
    # N(5, 4): the mean square is 29, of which 4 varies between samples.
    assert linear.input_centred_share == pytest.approx(4 / 29, abs=0.01)
    assert linear.input_n == 8000
    assert linear.learning_rate == 0.5


def test_the_centred_share_has_no_bias_in_small_batches() -> None:
    shares = []
    for _ in range(200):
        model = nn.Sequential(nn.Linear(50, 4), nn.Tanh())
        monitor = torchsat.watch(model, errors="raise")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(4, 50)).sum().backward()
        optimizer.step()
        shares.append(monitor.latest.weights[0].input_centred_share)
        monitor.close()
    # A plain squared mean of 4 samples would show 1 - 1/4; clipping at 1 leaves a little.
    assert sum(shares) / 200 == pytest.approx(1, abs=0.03)


def test_fan_in_of_every_layer() -> None:
    assert fan_in(nn.Conv2d(8, 6, 3, groups=2)) == 4 * 9
    assert fan_in(nn.ConvTranspose2d(8, 6, 4, stride=2)) == 8 * 16 // 4


class Frames:
    """A compiler backend that counts graphs."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.count += 1
        return graph.forward


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("make", [mlp, Wrapped])
@pytest.mark.parametrize(
    "how", ["watch_compiled", "watch_then_compile", "compile_then_watch_inner", "in_place", "function", "submodule", "submodule_later"]
)
def test_a_compiled_model_is_observed_in_eager_without_a_recompile(make: Callable[[], nn.Module], how: str) -> None:
    def run(watched: bool) -> tuple[list[float], int, list[torchsat.Snapshot]]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, frames, snapshots = make(), Frames(), list[torchsat.Snapshot]()

        def watch(module: nn.Module) -> None:
            if watched:
                torchsat.watch(module, every=8, errors="raise", sinks=(snapshots.append,))

        call: Callable[[Tensor], Tensor] = model
        if how == "watch_compiled":
            call = torch.compile(model, backend=frames)
            watch(call)
        elif how == "watch_then_compile":
            watch(model)
            call = torch.compile(model, backend=frames, fullgraph=True)
        elif how == "compile_then_watch_inner":
            call = torch.compile(model, backend=frames, fullgraph=True)
            watch(model)
        elif how == "in_place":
            watch(model)
            (model if make is Wrapped else model[0]).compile(backend=frames)
        elif how == "function":
            watch(model)
            call = torch.compile(lambda x: model(x) * 1.0, backend=frames, fullgraph=True)
        elif how == "submodule":
            if make is Wrapped:
                model.net = torch.compile(model.net, backend=frames)
            else:
                model[1] = torch.compile(model[1], backend=frames)
            watch(model)
        else:
            watch(model)
            if make is Wrapped:
                model.net = torch.compile(model.net, backend=frames)
            else:
                model[1] = torch.compile(model[1], backend=frames)
        generator = torch.Generator().manual_seed(0)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(20):
            loss = call(torch.randn(8, 64, generator=generator)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, frames.count, snapshots

    (plain, graphs, _), (watched, graphs_watched, snapshots) = run(False), run(True)
    assert watched == pytest.approx(plain, rel=1e-5)
    assert graphs_watched == graphs
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 4, 8, 16]
    assert all([record.n for record in snapshot.records] == [256, 256] for snapshot in snapshots)


def test_what_is_compiled_inside_an_uncompiled_model_stays_compiled() -> None:
    torch._dynamo.reset()
    frames = Frames()
    scale = torch.compile(lambda x: x * 2.0 + 1.0, backend=frames)
    running = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            before = frames.count
            x = scale(x)
            running.append(frames.count - before)
            return self.net(x)

    model = Net()
    torchsat.watch(model, errors="raise")
    train(model, 3)
    assert running == [1, 0, 0]


def test_a_model_may_move_and_change_after_watch() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")
    train(model, 2)
    model.double()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(8, 64, dtype=torch.float64, generator=generator)).sum().backward()
        optimizer.step()
    model.append(nn.Tanh())
    for _ in range(2):
        model(torch.randn(8, 64, dtype=torch.float64, generator=generator)).sum().backward()
        optimizer.step()
    monitor.flush()
    assert [record.site for record in monitor.latest.records] == ["1", "3", "5"]


def test_stuck_units_are_found_across_observations() -> None:
    model = mlp(nn.ReLU)
    with torch.no_grad():
        model[0].bias[:10] = -1e3
    monitor = torchsat.watch(model, every=1, rules=(), errors="raise")
    stuck = []
    train(model, 64, each=lambda step: stuck.append(monitor.latest["1"].stuck))
    # 16 samples a step: 1000 are there after 63 observations.
    assert stuck[:62] == [None] * 62
    assert stuck[62] == pytest.approx(10 / 32)
    assert monitor.latest["1"].stuck_n == 1008


def test_include_and_exclude_choose_sites() -> None:
    def sites(**options: object) -> tuple[str, ...]:
        model = nn.ModuleDict({"encoder": mlp(), "decoder": mlp()})
        monitor = torchsat.watch(model, **options)  # type: ignore[arg-type]
        names = tuple(monitor._taps.names)
        monitor.close()
        return names

    assert sites() == ("encoder.1", "encoder.3", "decoder.1", "decoder.3")
    assert sites(include="encoder.*") == ("encoder.1", "encoder.3")
    assert sites(include=["*.1"], exclude=("decoder.*",)) == ("encoder.1",)
    model = nn.Sequential(nn.LSTM(3, 3))
    monitor = torchsat.watch(model, exclude="0.*", errors="raise")
    model(torch.randn(2, 3))[0].sum().backward()
    monitor.step()
    assert monitor.coverage == torchsat.Coverage((), ())


def test_site_names_hold_no_markup_and_no_wrappers() -> None:
    model = nn.ModuleDict({"<img src=x>": nn.Sequential(nn.Tanh()), "ok": torch.compile(nn.Sequential(nn.ReLU()))})
    monitor = torchsat.watch(model)
    assert monitor._taps.names == ["_img_src_x_.0", "ok.0"]


@pytest.mark.parametrize("fault", ["sink", "alert", "rule", "disk"])
def test_a_fault_never_stops_training(fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 2: one warning that says what is lost, and the rest goes on."""

    def fail(*arguments: object) -> float:
        raise OSError("no space left on device")

    snapshots: list[torchsat.Snapshot] = []
    rule = torchsat.Rule("mine", lambda record, snapshot: record.n, 1, None, lambda record, value, limit: "always", patience=1)
    options: dict[str, object] = {"sinks": [snapshots.append], "rules": (rule,)}
    if fault == "sink":
        options["sinks"] = [fail, snapshots.append]
    elif fault == "alert":
        options["on_alert"] = fail
    elif fault == "rule":
        options["rules"] = (torchsat.Rule("mine", fail, 1, None, lambda *_: ""), *torchsat.RULES)
    monitor = torchsat.watch(mlp_ := mlp(), tmp_path if fault == "disk" else None, every=1, **options)  # type: ignore[arg-type]
    if fault == "disk":
        monkeypatch.setattr(monitor._sinks[0]._ours, "add_event", fail)
    train(mlp_, 5)
    monitor.close()
    assert len(snapshots) == 5
    assert len([message for message in caplog.messages if "no space left" in message]) == 1
    assert "Training is not affected." in next(message for message in caplog.messages if "no space left" in message)


def test_a_bug_of_ours_ends_monitoring_with_one_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*arguments: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("torchsat.monitor.summarise_units", bug)
    model = mlp()
    torchsat.watch(model, every=1)
    train(model, 5)
    assert len([message for message in caplog.messages if "all monitoring stops" in message]) == 1
    assert not traces_of(model)
    with pytest.raises(KeyError, match="bug"):
        train_watched_raising()


def test_an_odd_optimizer_stops_monitoring_not_training(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(torch.optim.SGD):
        @property
        def param_groups(self) -> list[dict[str, object]]:
            if sys._getframe(1).f_code.co_filename.endswith("monitor.py"):
                raise AttributeError("no groups")
            return self._groups

        @param_groups.setter
        def param_groups(self, groups: list[dict[str, object]]) -> None:
            self._groups = groups

    model = mlp()
    torchsat.watch(model, every=1)
    train(model, 3, optimizer=Odd)
    assert len(caplog.messages) == 1
    assert "AttributeError: no groups; all monitoring stops. Training is not affected." in caplog.messages[0]


def train_watched_raising() -> None:
    model = mlp()
    torchsat.watch(model, every=1, errors="raise")
    train(model, 2)


def test_a_step_that_was_to_be_observed_but_was_not_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Promise 5."""
    model = mlp().eval()
    monitor = torchsat.watch(model, every=1)
    train(model, 6)
    assert monitor.latest is None
    assert [message for message in caplog.messages if "evaluation mode" in message]
    assert len(caplog.messages) == 1


def test_a_model_without_activations_is_said(caplog: pytest.LogCaptureFixture) -> None:
    monitor = torchsat.watch(nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(4, 2)), calls=False)
    assert "Sequential: no activation was found, nothing is watched" in caplog.text
    model = mlp()
    torchsat.watch(model, include="nope*", every=1)
    train(model, 2)
    assert caplog.text.count("nothing is watched") == 2
    assert "of its activations, include= and exclude= leave none" in caplog.text
    assert monitor.coverage.unseen[0][0] == "1/softmax"


def test_what_cannot_be_watched_is_refused_with_the_reason() -> None:
    """Promise 6."""
    with pytest.raises(TypeError, match=r"nn\.DataParallel cannot be watched.*DistributedDataParallel"):
        torchsat.watch(nn.DataParallel(mlp()))
    with pytest.raises(TypeError, match=r"TorchScript model cannot be watched.*close the .*monitor before torch\.jit\.script"):
        torchsat.watch(torch.jit.trace(mlp(), torch.zeros(1, 64)))
    with pytest.raises(TypeError, match="model is a str; allowed are a"):
        torchsat.watch("model")  # type: ignore[arg-type]


def test_a_weight_whose_memory_is_freed_between_its_uses_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    weight = model[0].weight.requires_grad_(False)
    kept = weight.detach().clone()

    def fetch(module: nn.Module, args: object) -> None:
        weight.untyped_storage().resize_(kept.untyped_storage().nbytes())
        weight.copy_(kept)

    model[0].register_forward_pre_hook(fetch)

    def free(module: nn.Module, args: object, output: object) -> None:
        weight.untyped_storage().resize_(0)

    model[0].register_forward_hook(free)
    monitor = torchsat.watch(model, every=1, errors="raise")
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
    monitor.flush()
    assert monitor.latest is not None
    assert [each.site for each in monitor.latest.records] == ["1"]
    assert not monitor.latest.weights
    assert monitor.coverage.unseen == (("0", "the memory of its weight is freed when the optimizer steps"),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_alert": 5}, "on_alert is 5; allowed is a function of one Alert"),
        ({"sinks": 5}, "sinks is 5; allowed is a tuple of functions"),
        ({"sinks": ("print",)}, "sinks holds 'print'; each must be a function of one Snapshot"),
        ({"log_dir": 5}, "log_dir is 5; allowed is a directory"),
        ({"log_dir": ""}, "log_dir is ''; allowed is a directory"),
    ],
)
def test_arguments_of_a_wrong_kind_are_answered_with_the_right_one(options: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        torchsat.watch(mlp(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": 5}, 'include is 5; allowed are a pattern of site names such as "encoder'),
        ({"exclude": [5]}, r"exclude is \[5\]"),
        ({"log_dir": "runs", "writer": "writer"}, "log_dir and writer are both given"),
        ({"every": 0}, "every is 0; allowed are whole numbers from 1 up"),
        ({"every": 2.5}, "every is 2.5"),
        ({"epsilon": 1.0}, "epsilon is 1.0; allowed are numbers between 0 and 1"),
        ({"sample": 0}, 'sample is 0; allowed are whole numbers from 1 up, None for all elements, and "auto"'),
        ({"activations": nn.Tanh}, r"activations must be a tuple of torchsat\.Activation"),
        ({"rules": ("saturated",)}, r"rules must be a tuple of torchsat\.Rule"),
        ({"errors": "ignore"}, 'errors is \'ignore\'; allowed are "warn" and "raise"'),
    ],
)
def test_bad_arguments_are_answered_with_what_is_allowed(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchsat.watch(mlp(), **options)  # type: ignore[arg-type]


def test_a_step_that_raised_does_not_deafen_the_monitor_to_another_optimizer() -> None:
    model = mlp()
    monitor = torchsat.watch(model, every=1, errors="raise")

    class Fails(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            raise RuntimeError("out of memory")

    model(torch.randn(4, 64)).sum().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        Fails(model.parameters(), lr=0.1).step()
    train(model, 5)
    assert monitor.latest.step == 4


def test_passes_without_any_step_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    torchsat.watch(model, errors="raise")
    for _ in range(250):
        model(torch.randn(2, 64)).sum().backward()
    assert len(caplog.messages) == 1
    assert "Call monitor.step() at the end of each step." in caplog.messages[0]


def test_an_idle_watched_model_forces_nobody_into_eager_for_long() -> None:
    torch._dynamo.reset()
    frames, teacher, student = Frames(), mlp(), mlp()
    torchsat.watch(teacher, errors="raise")
    call, optimizer = torch.compile(student, backend=frames), torch.optim.SGD(student.parameters(), lr=0.1)
    counts = []
    for _ in range(10):
        call(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        counts.append(frames.count)
    assert counts == [0] * 8 + [1] * 2


@pytest.mark.parametrize("compiled", ["eager", "in_graph"])
@pytest.mark.parametrize("earlier", [1, 20])
def test_another_model_that_trains_first_costs_no_compilation(earlier: int, compiled: str) -> None:
    """Hooks of an observation that were compiled with the model would make every later observation compile it anew."""
    torch._dynamo.reset()
    frames, found, trained = Frames(), list[torchsat.Snapshot](), []
    for model in (mlp(), mlp()):
        call = torch.compile(model, backend=frames if not trained else "eager", fullgraph=True)
        trained.append((model, call, torch.optim.SGD(model.parameters(), lr=0.1)))
    torchsat.watch(trained[0][0], every=4, budget=None, compiled=compiled, errors="raise", sinks=[found.append])  # type: ignore[arg-type]

    def step(which: int) -> None:
        _, call, optimizer = trained[which]
        call(torch.randn(4, 64)).sum().backward()
        optimizer.step()

    for _ in range(earlier):
        step(1)
    for _ in range(10):
        step(0)
        step(1)
    # After so long a wait the first step was let go.
    assert [snapshot.step for snapshot in found] == [0, 1, 2, 4, 8][earlier > 8 :]
    assert frames.count == 1


def test_a_compiled_validation_mostly_runs_its_graph() -> None:
    torch._dynamo.reset()
    eager, model, snapshots = [], Wrapped(), list[torchsat.Snapshot]()
    call, optimizer = torch.compile(model, backend=Frames()), torch.optim.SGD(model.parameters(), lr=0.1)
    torchsat.watch(call, every=1, errors="raise", sinks=(snapshots.append,))
    for _ in range(4):
        call(torch.randn(8, 64)).sum().backward()
        optimizer.step()
        model.eval()
        for _ in range(3):
            eager.append(eval_frame._stance.stance == "force_eager")
            with torch.no_grad():
                call(torch.randn(8, 64))
        model.train()
    # A validation that has a graph runs it; only the call that our stance met on its way runs eager. No observation is missed.
    assert eager == [True, False, False] * 4
    assert [snapshot.step for snapshot in snapshots] == [0, 1, 2, 3]


def test_the_users_own_stance_is_left_alone() -> None:
    model = mlp()
    torchsat.watch(model, errors="raise")
    with torch.compiler.set_stance("eager_on_recompile"):
        train(model, 3)
        assert eval_frame._stance.stance == "eager_on_recompile"
    train(model, 1)
    assert eval_frame._stance.stance == "default"


def test_a_model_may_hold_its_monitor() -> None:
    model = mlp()
    model.monitor = torchsat.watch(model)  # type: ignore[assignment]
    assert copy.deepcopy(model).monitor is None
    assert pickle.loads(pickle.dumps(model)).monitor is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_not_watched(tmp_path: Path) -> None:
    script = """
    import os, signal, sys, torch, torchsat
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    monitor = torchsat.watch(model, sys.argv[1], every=1, budget=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def train():
        for step in range(40):
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
    child = os.fork()
    train()
    if not child:
        assert not model[1]._forward_hooks
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os._exit(7)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7, done.stderr
    assert len(torchsat.read(tmp_path)) == 40


def test_the_gradient_norm_is_that_which_the_optimizer_received() -> None:
    class Centred(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(1e-3)
            super().step()

    model = mlp()
    monitor = torchsat.watch(model, errors="raise")
    optimizer = Centred(model.parameters(), lr=0.1)
    model(torch.randn(4, 64)).sum().backward()
    expected = model[0].weight.grad.norm().item()
    optimizer.step()
    assert monitor.latest.weights[0].grad_norm == pytest.approx(expected, rel=1e-6)


def test_wide_inputs_are_measured_where_they_were_read() -> None:
    model = nn.Sequential(nn.Linear(70_000, 2), nn.Tanh())
    monitor = torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 70_000) + 2).sum().backward()
    optimizer.step()
    (weight,) = monitor.latest.weights
    assert weight.input_n <= 65536
    assert weight.input_rms == pytest.approx(5**0.5, rel=0.02)
    # No feature was read twice: how much of it is a constant cannot be known.
    assert weight.input_centred_share is None


def test_a_lazy_layer_is_measured_once_it_exists() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 1))
    monitor = torchsat.watch(model, every=1, errors="raise")
    model(torch.randn(3, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(3, 5)).sum().backward()
        optimizer.step()
    assert [weight.name for weight in monitor.latest.weights] == ["0"]
    assert monitor.coverage.unseen == ()


def test_tails_that_are_not_known_are_not_zero() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.scale * x)

    slope = lambda z, scale: scale * (1 - torch.tanh(scale * z) ** 2)  # noqa: E731
    rows = torchsat.Activation("square", (Square,)), torchsat.Activation("scaled", (Scaled,), ("scale",), derivative=slope)
    model = nn.Sequential(nn.Linear(4, 4), Square(), Scaled())
    monitor = torchsat.watch(model, activations=rows, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    for record in monitor.latest.records:
        assert record.derivative > 0
        assert record.saturated is record.low is record.stuck is record.relative_derivative is record.histogram is None
        assert record.tails == "unknown"


def test_a_default_device_does_not_reach_into_the_table() -> None:
    numeric.grid.cache_clear()
    activations._constants.cache_clear()
    with torch.device("meta"):
        monitor = torchsat.watch(nn.Sequential(nn.GELU()), errors="raise")
    assert monitor._taps._known["0"].bound.constants.peak == pytest.approx(1.12890415, rel=1e-7)


SCRIPT = """
import os, signal, sys, torch, torchsat
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
monitor = torchsat.watch(model, sys.argv[1], every=1, budget=None)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(40):
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("raise ValueError('mine')", 1),
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(20)", -signal.SIGTERM),
    ],
    ids=["normal", "exception", "exit", "sigterm"],
)
def test_nothing_is_lost_however_the_process_ends(end: str, code: int, tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(end=end))
    done = subprocess.run([sys.executable, "-W", "error", "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert [snapshot.step for snapshot in torchsat.read(tmp_path)] == list(range(40))


def test_a_kill_loses_at_most_the_queue(tmp_path: Path) -> None:
    script = textwrap.dedent(SCRIPT.format(end="os.kill(os.getpid(), signal.SIGKILL)"))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    steps = [snapshot.step for snapshot in torchsat.read(tmp_path)]
    # The queue holds ten, and one more may be on its way to the disk.
    assert steps == list(range(len(steps)))
    assert len(steps) >= 40 - 11


def test_a_handler_of_the_users_is_left_alone() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with torchsat.watch(mlp()):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_observation_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = nn.Sequential(mlp(), nn.Softmax(-1))
    model[1].spare = nn.Tanh()
    torchsat.watch(model, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 64))[0, 0].backward()
    optimizer.step()
    assert caplog.messages[0] == "torchsat: watching 3 sites (2 modules, 1 softmax) and 3 layers; not seen: 1 (1.spare), see monitor.coverage"


@pytest.mark.parametrize("mode", ["eager", pytest.param("in_graph", marks=pytest.mark.skipif(torch.__version__ < "2.8", reason="refused"))])
@pytest.mark.parametrize("grad", [False, True])
def test_a_validation_before_training_keeps_fullgraph_content(mode: str, grad: bool) -> None:
    """fullgraph=True raises where no graph ran and the stance is the default at the end of the call: that of the first observation is given back
    in its midst."""
    torch._dynamo.reset()
    model = mlp()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchsat.watch(model, every=2, compiled=mode, errors="raise") as monitor:  # type: ignore[arg-type]
        for _ in range(4):
            model.eval()
            for _ in range(3):
                with torch.set_grad_enabled(grad):
                    run(torch.randn(4, 64))
            model.train()
            run(torch.randn(4, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert monitor.latest is not None
        assert monitor.latest.step == 2
    # Without dropout or hooks of ours in it, one graph serves both modes where gradients are on.
    assert counter.frame_count == (1 if grad and mode == "eager" else 2)
    torch._dynamo.reset()


def test_between_observations_nothing_of_ours_runs_but_the_hook_on_the_optimizer() -> None:
    """Every Python call into a file of torchsat's is counted, in forward, backward and step."""
    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torchsat.watch(model, every=50, errors="raise")
    house = str(Path(torchsat.__file__).parent)
    ours: list[str] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(house):
            ours.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    calls = []
    for _ in range(12):
        ours.clear()
        sys.setprofile(count)
        model(torch.randn(8, 64)).sum().backward()
        passes = len(ours)
        optimizer.step()
        sys.setprofile(None)
        calls.append((passes, len(ours), sorted(set(ours))))
    assert all(calls[step][0] > 20 for step in (0, 1, 2, 4, 8))
    hook = [
        "monitor._after_step",
        "monitor._before_step",
        "process._after_step",
        "process._before_step",
        "compile_settings.restore_stance",
        "process._tell",
    ]
    for step in (5, 6, 9, 10, 11):
        passes, total, names = calls[step]
        assert passes == 0
        assert total <= 14
        # Of the first steps behind an observation the clock is read.
        assert set(names) <= {*hook, "monitor._alone", "process.<listcomp>", "schedule.due", "schedule.follow", "schedule.now"}


class Everything(nn.Module):
    """A site of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.prelu = nn.Linear(64, 32), nn.ReLU(inplace=True), nn.PReLU(8)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 8, bidirectional=True)
        self.cell = nn.GRUCell(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.conv(self.relu(self.first(x)).unflatten(1, (4, 8))))
        x, _ = self.lstm(x.transpose(1, 2))
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
        x = F.glu(torch.cat([x, F.gelu(x)], -1))
        return self.cell(x.softmax(-1).sum(1)).tanh()


class ToHost(TorchDispatchMode):
    """Fails on what waits for a device: a number read by Python, a shape that depends on data, a copy to the host."""

    def __torch_dispatch__(self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default):
            raise AssertionError(f"{function} waits for the device")
        if function is torch.ops.aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise AssertionError("a mask as an index waits for the device")
        target = (kwargs or {}).get("device")
        if function is torch.ops.aten._to_copy.default and target is not None and torch.device(target) != args[0].device:
            raise AssertionError(f"{function} copies to {target}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled_kernels", [False, True])
@pytest.mark.parametrize("model", [Wrapped, Everything], ids=lambda kind: kind.__name__)
def test_no_hook_waits_for_a_device(model: type[nn.Module], compiled_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, by what is dispatched; on a GPU by set_sync_debug_mode (tests/test_gpu.py)."""
    monkeypatch.setattr(taps, "_disable_current_modes", contextlib.nullcontext)
    if not compiled_kernels:
        monkeypatch.setattr(cpu, "reads", lambda *tensors: False)
    watched = model()
    optimizer = torch.optim.SGD(watched.parameters(), lr=0.01)
    monitor = torchsat.watch(watched, every=1, errors="raise")
    for step in range(4):
        # What a module of the user's computes is found out in the first step, by looking.
        with ToHost() if step else contextlib.nullcontext():
            watched(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
    assert monitor.latest is not None
    assert monitor.latest.step == 3


def test_the_test_above_can_fail() -> None:
    for call in (lambda x: x.sum().item(), torch.nonzero, lambda x: x[x > 0], lambda x: bool(x.sum() > 0)):
        with ToHost(), pytest.raises(AssertionError, match="waits for the device"):
            call(torch.ones(3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def highest(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at once, more than before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    events = sorted((event.start_ns(), event.nbytes()) for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in events))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_observation_takes_the_memory_of_one_sample_a_site_whatever_the_batch(inplace: bool) -> None:
    extra = []
    for batch in (1024, 4096):
        bare = nn.Sequential(*(each for _ in range(4) for each in (nn.Linear(256, 256), nn.SiLU(inplace))))
        watched, x = copy.deepcopy(bare), torch.randn(batch, 256)
        monitor = torchsat.watch(watched, every=1, errors="raise")
        peaks = []
        for model in (bare, watched):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            step(model, optimizer, x)
            peaks.append(highest(functools.partial(step, model, optimizer, x)))
        monitor.close()
        assert monitor.latest.step == 1
        extra.append(peaks[1] - peaks[0])
    # Of each of four sites a sample, and of one what is computed from it; one tensor of the larger batch has 4 MiB.
    assert all(each <= 6 * 65536 * 4 for each in extra), extra
