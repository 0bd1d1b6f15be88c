"""A type checker sees the arguments of `watch`, of the integrations and of `try_remedies`.

mypy checks this file with `warn_unused_ignores`: each `type: ignore` below is needed, or the check fails. At run time the same mistakes are answered.
"""

import inspect
from dataclasses import fields

import pytest
import torch
from torch import nn

import torchsat
from torchsat.options import Options, RunOptions, WatchOptions


def test_the_keyword_arguments_are_the_fields_of_options() -> None:
    assert set(RunOptions.__annotations__) == {field.name for field in fields(Options)}
    assert set(RunOptions.__annotations__) - set(WatchOptions.__annotations__) == {"log_dir"}
    written = {field.name: field.type for field in fields(Options)}
    assert {name: hint.__forward_arg__ for name, hint in RunOptions.__annotations__.items()} == written


def test_help_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(torchsat.watch).parameters
    assert list(shown) == ["model", "log_dir", *(field.name for field in fields(Options) if field.name != "log_dir")]
    assert (shown["every"].default, shown["budget"].default, shown["log_dir"].default) == (50, 0.02, None)
    assert str(shown["rules"]).endswith("= torchsat.RULES")


def test_an_option_that_there_is_not_is_answered() -> None:
    with pytest.raises(TypeError, match=r"watch\(\) has no option 'evry'; did you mean 'every'\? Allowed are: log_dir, writer, every, "):
        torchsat.watch(nn.Tanh(), evry=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"has no option 'zzz'\. Allowed are"):
        torchsat.watch(nn.Tanh(), zzz=5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="every is '5'"):
        torchsat.watch(nn.Tanh(), every="5")  # type: ignore[arg-type]


def test_the_remedies_take_options_of_what_is_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    batches = [torch.randn(8, 4)]
    with pytest.raises(TypeError, match="has no option 'epsilom'"):
        torchsat.try_remedies(model, batches, lambda m, x: m(x).sum(), steps=1, progress=False, epsilom=0.1)  # type: ignore[call-arg]
    trials = torchsat.try_remedies(model, batches, lambda m, x: m(x).sum(), steps=1, remedies=(), progress=False, include="1")
    assert [record.site for record in trials.trials[0].snapshots[0].records] == ["1"]


def test_the_callbacks_know_the_options() -> None:
    pytest.importorskip("lightning", reason='Lightning is not installed: pip install "lightning>=2.4"')
    from torchsat.integrations.lightning import Torchsat

    assert Torchsat(every=5, log_dir="runs/exp1").monitor is None
    assert Torchsat(evry=5).monitor is None  # type: ignore[call-arg]
