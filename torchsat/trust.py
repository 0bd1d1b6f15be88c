"""Whether the kernels for GPUs compute on a device what is computed on the host. Only then are they used there.

A kernel is compiled by the user's version of Triton, for a GPU that torchsat was perhaps never run on. So each kernel is tried once, on some thousand
elements, before the model is trained.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from torchsat.columns import BLOCK, COLUMN, FEATURES, HEADS
from torchsat.kernels import gpu
from torchsat.kernels.formulas import BETWEEN, LOGISTIC, Formula
from torchsat.sampling import Sample, Units, places
from torchsat.softmax import scan_softmax
from torchsat.statistics import Sides, empty_row, extremes, merge_, observe, observe_gradient, sides_of

_EDGES = (-2.0, 2.0)
_UNITS = 5


@functools.cache
def trust_kernels(device: torch.device) -> str | None:
    """Use the kernels on this GPU from now on, if they compute there what the host computes.

    This waits for the device and may compile for some seconds, so it is not called during a training step.

    Returns:
        Why the kernels are not used; None where they are.
    """
    kernels = gpu()
    if kernels is None:
        return "Triton is not installed"
    try:
        wrong = disagreement(kernels, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if wrong is None:
        kernels.trust(device)
    return wrong


def disagreement(kernels: Any, device: torch.device) -> str | None:
    """The first number in which kernels on a device and the host differ by more than rounding, with both; None: they agree."""
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.linspace(-9, 9, 20_000).roll(7777).to(dtype)
        wrong = _wrong_layer(kernels, z, device)
        # float16 holds all of these numbers. Triton's interpreter, in which the tests run without a GPU, cannot multiply bfloat16.
        wrong = wrong or _wrong_logits(kernels, z if dtype == torch.float32 else z.to(torch.float16), device)
        z[77], z[7777] = math.nan, math.inf
        wrong = wrong or _wrong_rows(kernels, z, device)
        if wrong is not None:
            return wrong
    return None


def _wrong_rows(kernels: Any, z: Tensor, device: torch.device) -> str | None:
    """The first column of a row in which the kernels are wrong about these elements."""
    there, here, units = z.to(device), z.float(), Units(Sample.of(z.reshape(-1, _UNITS), None, 0), 1)
    count, elements, some = len(z), 3 * len(z), len(z) // 2
    sides = sides_of(here, _EDGES)
    assert sides is not None
    drawn = Sides(sides.values.index_select(0, places(count, some, 3, here.device)), 3)
    for given in (Formula(LOGISTIC, 2.0, 4.0), Formula(BETWEEN), None):
        slope = 4 * torch.sigmoid(2 * here) * torch.sigmoid(-2 * here) if given is None or given.kind == LOGISTIC else (here > 0).float()
        row, block = empty_row(device), torch.zeros(len(BLOCK), _UNITS, dtype=torch.float64, device=device)
        kernels.observe(there, there, slope.to(device) if given is None else given, 1.0, _EDGES, elements, True, None, row, units.place, block)
        kernels.observe_gradient(there, there, count, elements, row, kernels.sides(there, _EDGES, some, 3), 3)
        expected, counts = observe(here, here, slope, 1.0, _EDGES, elements, True, units)
        merge_(expected, observe_gradient(here, here, elements, None, drawn))
        assert counts is not None
        if not torch.equal(kernels.extremes(there, there).cpu(), extremes(here, here)):
            return "the extremes are wrong"
        for name, one, other in zip((*COLUMN, "units"), (*row.cpu(), block.cpu()), (*expected, counts), strict=True):
            # Near the edge of a bin, an element may be counted in the next one: the derivative is float32.
            if not torch.allclose(one, other, rtol=1e-5, atol=6.0 if name.startswith("bin") else 1e-3):
                return f"{name} is {one.tolist()} and should be {other.tolist()}"
    return None


def _wrong_layer(kernels: Any, x: Tensor, device: torch.device) -> str | None:
    """The sum of a layer in which the kernels are wrong about these elements."""
    there, wide, units = x.to(device), x.double(), Units(Sample.of(x.reshape(-1, _UNITS), None, 0), 1)
    squares, features = torch.zeros(2, dtype=torch.float64, device=device), torch.zeros(len(FEATURES), _UNITS, dtype=torch.float64, device=device)
    kernels.squares(there, there.roll(1), squares, 0)
    kernels.add_features(there, units.place, features)
    expected = torch.stack([wide.square().sum(), (wide.roll(1) - wide).square().sum()])
    moments = torch.stack([torch.ones_like(wide), wide, wide.square()]).reshape(3, -1, _UNITS).sum(1)
    # All elements are read, so that each has the weight 1.
    by_feature = torch.stack([*moments, moments[0], moments[2], moments[0]])
    for name, found, right in (("squares", squares, expected), ("features", features, by_feature)):
        if not torch.allclose(found.cpu(), right, rtol=1e-5, atol=1e-3):
            return f"the sums of {name} are {found.tolist()} and should be {right.tolist()}"
    return None


def _wrong_logits(kernels: Any, x: Tensor, device: torch.device) -> str | None:
    """The first number in which the kernels are wrong about an attention whose queries and keys are these elements."""
    q = x.view(10, 2, -1, 20)[:, :, ::5]
    logits = 0.5 * q.double() @ q.double().transpose(-1, -2)
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    found, right = kernels.scan_logits(q.to(device), q.to(device), 0.5, True), scan_softmax(logits, seen[None, None], None)
    for names, one, other in zip((("bad", "highest", "lowest"), HEADS), (found[0][:3], found[1]), (right[0][:3], right[1]), strict=True):
        for name, there, here in zip(names, one.cpu(), other, strict=True):
            if not torch.allclose(there, here, rtol=1e-5, atol=1e-3):
                return f"of the logits of an attention, {name} is {there.tolist()} and should be {here.tolist()}"
    return None
