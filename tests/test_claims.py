"""A second `watch` of one model, or into one directory, closes the first monitor; whatever else is watched side by side stays."""

import gc
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import torchsat
from tests.test_diagnosis import stack
from torchsat import Monitor, process
from torchsat.tensorboard.reader import read_runs


def step(model: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()


def is_open(monitor: Monitor) -> bool:
    return "closed" not in repr(monitor)


def test_a_cell_that_is_run_again_watches_the_model_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, told = stack(nn.Tanh, gain=8.0), list[torchsat.Alert]()
    monitors = []
    for _ in range(2):
        monitors.append(torchsat.watch(model, tmp_path, every=1, errors="raise", on_alert=told.append))
        step(model, 8)
    first, second = monitors
    assert (is_open(first), is_open(second)) == (False, True)
    second.close()
    lines = [message for message in caplog.messages if "is closed" in message]
    assert lines == ["torchsat: the earlier monitor of Sequential is closed, since the same Sequential is watched anew."]
    assert len(told) == 2  # each monitor told its alert once
    (run,) = read_runs(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == list(range(8))
    assert not process._watchers


def test_a_new_model_in_the_same_directory_closes_the_first_monitor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = stack(nn.Tanh), stack(nn.ReLU)
    first = torchsat.watch(one, tmp_path / "run", every=1)
    step(one)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    second = torchsat.watch(other, os.path.relpath(tmp_path / "link"), every=1)
    step(other)
    assert (is_open(first), is_open(second)) == (False, True)
    assert "writes into the same directory; give each model its own to watch both." in caplog.text
    second.close()
    (run,) = read_runs(tmp_path / "run")
    assert {record.activation for record in run.snapshots[0].records} == {"relu"}


def test_one_writer_is_one_place(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "a") as writer, SummaryWriter(tmp_path / "b") as another:
        first, second = torchsat.watch(stack(nn.Tanh), writer=writer), torchsat.watch(stack(nn.Tanh), writer=another)
        assert is_open(first)
        third = torchsat.watch(stack(nn.Tanh), writer=writer)
        assert [is_open(each) for each in (first, second, third)] == [False, True, True]
        second.close()
        third.close()


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile])
def test_a_model_is_the_same_inside_its_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = stack(nn.Tanh)
    first, second = torchsat.watch(model), torchsat.watch(wrap(model))
    assert (is_open(first), is_open(second)) == (False, True)
    second.close()


def test_other_models_parts_and_copies_are_watched_side_by_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = nn.Sequential(stack(nn.Tanh))
    another = stack(nn.Tanh)
    monitors = [
        torchsat.watch(model, tmp_path / "whole", every=1),
        torchsat.watch(model[0], tmp_path / "part", every=1),
        torchsat.watch(another),
    ]
    torchsat.probe(model, torch.randn(8, 64))
    batches = [torch.randn(8, 64)]
    torchsat.try_remedies(model, batches, lambda m, x: m(x).square().mean(), steps=2, remedies=torchsat.REMEDIES[:1])
    step(model)
    assert all(map(is_open, monitors))
    for each in monitors:
        each.close()
    assert len(monitors[0].latest or ()) == len(monitors[1].latest or ()) == 3
    assert "is closed" not in caplog.text


def test_a_claim_keeps_no_model_alive_and_a_gone_model_is_no_rival(tmp_path: Path) -> None:
    model = stack(nn.Tanh)
    torchsat.watch(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    for _ in range(3):
        # A new model may be given the address of one that is gone.
        monitor = torchsat.watch(stack(nn.Tanh))
        assert is_open(monitor)
    for watcher in list(process._watchers):
        watcher.close()


def test_the_second_monitor_resumes_where_the_first_one_was(tmp_path: Path) -> None:
    model = stack(nn.Tanh)
    torchsat.watch(model, tmp_path, every=1)
    step(model, 3)
    second = torchsat.watch(model, tmp_path, every=1, start="resume")
    step(model, 2)
    second.close()
    (run,) = read_runs(tmp_path)
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2, 3, 4]
