"""The part of the grid of audit.py that asks what number formats would do to tensors: torch's own casts, and lists of all values in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from audit_grid import Case, Compared
from audit_truth import Figure
from torch import Tensor, nn

import torchsat

CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
E4M3 = torch.tensor([*(m * 2.0**-9 for m in range(8)), *(2.0**e * (1 + m / 8) for e in range(-6, 9) for m in range(8))], dtype=torch.float64)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0], dtype=torch.float64)
"""All values of both, and the one after the last, had they one more."""


def nearest(sizes: Tensor, values: Tensor) -> Tensor:
    """The nearest of these values to each size, from the middle the one of even index."""
    above = torch.searchsorted(values, sizes.clamp(max=values[-1].item())).clamp(min=1)
    below = above - 1
    up, down = values[above] - sizes, sizes - values[below]
    return values[torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)]


def results(x: Tensor, name: str) -> tuple[Tensor, Tensor, float, float]:
    """What becomes of each element's size in units of its scale, whether it is beyond the range, and the smallest normal and the smallest value."""
    if name in CASTS:
        cast, told = x.to(CASTS[name]).double().abs(), torch.finfo(CASTS[name])
        beyond = x.abs() > 464 if name == "fp8_e4m3" else ~cast.isfinite()
        return cast, beyond, told.smallest_normal, told.smallest_normal * told.eps
    wide = x.double().abs()
    if name == "mxfp8":
        blocks = wide.reshape(-1, 32)
        largest = blocks.amax(1, keepdim=True)
        scale = torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, largest, 1.0))) - 8)
        found = nearest(blocks / scale, E4M3)
        return found, found > 448, 2.0**-6, 2.0**-9
    blocks, whole = x.abs().reshape(-1, 16), x.abs().max().clamp(min=1e-30) / (448 * 6)
    scales = (blocks.amax(1, keepdim=True) / 6 / whole).clamp(2.0**-6, 448).to(torch.float8_e4m3fn).float()
    # torchao multiplies by the reciprocal in float32, which decides in the middle of two values.
    found = nearest((blocks * ((1 / whole) / scales)).double(), E2M1)
    return found, found > 6, 1.0, 0.5


def figures(x: Tensor, tensor: str, name: str, in_use: bool) -> dict[str, Figure]:
    """What must be said of one tensor in one format."""
    x = x.float()
    found, beyond, normal, smallest = results(x, name)
    kept = ~beyond & (found > 0)
    shares = {
        "zero": x == 0,
        "flushed": (x != 0).reshape(found.shape) & (found == 0),
        "clamped": beyond,
        "subnormal": kept & (found < normal),
        "smallest": kept & (found == smallest),
    }
    told = {kind: Figure(None if in_use and kind in ("flushed", "clamped") else where.double().mean().item(), 1e-9) for kind, where in shares.items()}
    return {"place": Figure("1"), "tensor": Figure(tensor), "format": Figure(name), "in_use": Figure(in_use), "n": Figure(x.numel()), **told}


def counted(dtype: torch.dtype, scale: float) -> Iterator[Compared]:
    """A tanh in a model of this type, whose output is multiplied."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).to(dtype)
    plain, x, kept = copy.deepcopy(model), torch.randn(40, 32).to(dtype), dict[str, Tensor]()
    plain[1].register_forward_hook(lambda module, args, a: kept.update(z=args[0].detach().clone(), a=a.detach().clone()))

    def keep(module: nn.Module, given: Any, grad: Any) -> None:
        kept.update(grad_z=given[0].clone(), grad_a=grad[0].clone())

    plain[1].register_full_backward_hook(keep)
    (plain(x) * scale).float().square().mean().backward()
    with torchsat.watch(model, extras=("formats",), errors="raise") as monitor:
        (model(x) * scale).float().square().mean().backward()
        monitor.step()
    assert monitor.latest is not None
    for use in monitor.latest.formats_at["1"]:
        in_use = CASTS.get(use.format) is dtype
        yield f"{use.tensor} in {use.format}", use, figures(kept[use.tensor], use.tensor, use.format, in_use)


def cases(small: bool) -> Iterator[Case]:
    """Every case of this part of the grid."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scale in (1.0,) if small else (1.0, 0.1, 1e-3, 100.0):
            yield Case(f"formats: {str(dtype).removeprefix('torch.')} x {scale:g}", functools.partial(counted, dtype, scale))
