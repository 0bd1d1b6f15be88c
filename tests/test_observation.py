"""One observation: a missed one is reported, it takes little memory, and it never waits for a device."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import torchsat
from tests.models import EverySite, Wrapped, mlp
from tests.training import train
from torchsat import internals
from torchsat.kernels import cpu


def test_a_step_that_was_to_be_observed_but_was_not_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A gap in the observations is never silent."""
    model = mlp().eval()
    monitor = torchsat.watch(model, every=1)
    train(model, 6)
    assert monitor.latest is None
    assert [message for message in caplog.messages if "evaluation mode" in message]
    assert len(caplog.messages) == 1


class ToHost(TorchDispatchMode):
    """Raises AssertionError on operators that wait for a device: reading a number in Python, a shape that depends on data, a copy."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers: list[Tensor] = []
        """The tensors that torch has made of numbers of Python."""

    def __torch_dispatch__(self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default):
            raise AssertionError(f"{function} waits for the device")
        if function is torch.ops.aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise AssertionError("a mask as an index waits for the device")
        target = (kwargs or {}).get("device")
        if function is torch.ops.aten._to_copy.default and target is not None and torch.device(target) != args[0].device:
            raise AssertionError(f"{function} copies to {target}")
        # On a GPU, `x[0] = 1` copies a number of the host (before torch 2.15), and `x[0:1] = 1` does not.
        if function is torch.ops.aten.copy_.default and any(args[1] is number for number in self.numbers):
            raise AssertionError("a number as the value of one element waits for the device")
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.lift_fresh.default:
            self.numbers.append(out)
        return out


@pytest.mark.parametrize(("compiled_kernels", "extras"), [(False, ()), (True, ()), (True, ("formats",))], ids=["torch", "kernels", "formats"])
@pytest.mark.parametrize("model", [Wrapped, EverySite], ids=lambda kind: kind.__name__)
def test_no_hook_waits_for_a_device(model: type[nn.Module], compiled_kernels: bool, extras: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked on the CPU by the operators that are dispatched. On a GPU tests/test_gpu.py checks it with set_sync_debug_mode."""
    monkeypatch.setattr(internals, "_disable_current_modes", contextlib.nullcontext)
    if not compiled_kernels:
        monkeypatch.setattr(cpu, "reads", lambda *tensors: False)
    watched = model()
    optimizer = torch.optim.SGD(watched.parameters(), lr=0.01)
    monitor = torchsat.watch(watched, every=1, extras=extras, errors="raise")
    for step in range(4):
        # In the first step torchsat compares values to find out what modules of the user compute, which may wait for the device.
        with ToHost() if step else contextlib.nullcontext():
            watched(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
    assert monitor.latest is not None
    assert monitor.latest.step == 3


def test_the_test_above_can_fail() -> None:
    for call in (lambda x: x.sum().item(), torch.nonzero, lambda x: x[x > 0], lambda x: bool(x.sum() > 0), lambda x: x[0].copy_(torch.tensor(1.0))):
        with ToHost(), pytest.raises(AssertionError, match="waits for the device"):
            call(torch.ones(3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def highest(run: Callable[[], object]) -> int:
    """The largest number of bytes that torch's allocator held at one time during a second run, less those that it held before.

    The profiler does not count that a block is freed which was allocated while no profiler was on, so a first run under it replaces them.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    assert seen.profiler is not None
    events = sorted((event.start_ns(), event.nbytes()) for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    out: int = max(itertools.accumulate(size for _, size in events))
    return out


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
        assert monitor.latest is not None
        assert monitor.latest.step == 2
        extra.append(peaks[1] - peaks[0])
    # Samples are released as their site is finished: allowed are two of 65536 elements. One tensor of the larger batch alone has 4 MiB.
    assert all(each <= 2 * 65536 * 4 for each in extra), extra
