"""Reference values for records, computed by plain autograd, and the functions that compare records with them."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import torchsat
from torchsat import Record, Snapshot


def one_step(
    model: nn.Module,
    forward: Callable[[Any], Tensor] | None = None,
    x: Tensor | None = None,
    **options: Any,
) -> Snapshot:
    """The snapshot of one step of SGD with learning rate 0 on the sum of squares of the output."""
    monitor = torchsat.watch(model, errors="raise", **options)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters or [torch.zeros(1)], lr=0.0)
    output = forward(model) if forward else model(x)
    loss = output.square().sum()
    if loss.requires_grad:
        loss.backward()
    if parameters:
        optimizer.step()
    else:
        monitor.step()
    monitor.close()
    assert monitor.latest is not None
    return monitor.latest


T = TypeVar("T")


def known(value: T | None) -> T:
    """The value itself, typed as not None, for a test in which it must be known. Raises AssertionError where it is None."""
    assert value is not None
    return value


def truth(f: Callable[[Tensor], Tensor], z: Tensor) -> dict[str, float]:
    """The values that the record of an activation f at z must have if the loss is the sum of the squares of f(z), by plain autograd in float64."""
    z = z.detach().double().requires_grad_()
    a = f(z)
    (slope,) = torch.autograd.grad(a.sum(), z, retain_graph=True)
    (grad_z,) = torch.autograd.grad(a.square().sum(), z)
    grad_a = 2 * a
    return {
        "n": z.numel(),
        "derivative": slope.abs().mean().item(),
        "derivative_rms": slope.square().mean().sqrt().item(),
        "z_mean": z.mean().item(),
        "z_std": z.std(correction=0).item(),
        "a_mean": a.mean().item(),
        "grad_a_rms": grad_a.square().mean().sqrt().item(),
        "grad_z_rms": grad_z.square().mean().sqrt().item(),
        "attenuation": (grad_z.norm() / grad_a.norm()).item(),
        "grad_n": z.numel(),
    }


def check(record: torchsat.Record, expected: dict[str, float], rel: float = 1e-5) -> None:
    for name, value in expected.items():
        assert getattr(record, name) == pytest.approx(value, rel=rel, abs=1e-7), name


def same(first: Record, second: Record) -> None:
    """Asserts that two records are equal to the last digit in every field but `site` and `kind`."""
    for each in fields(Record):
        if each.name not in ("site", "kind"):
            assert getattr(first, each.name) == getattr(second, each.name), each.name
