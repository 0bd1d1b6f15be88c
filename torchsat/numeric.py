"""The derivative, the peak and the tails of a function, found numerically where a row of activations.py does not state them.

The derivative comes from automatic differentiation, of a function that is first checked to act on each element alone. Peak and tails are searched on
a grid of z, in float64 on the CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Differentiate = Callable[..., Tensor]
"""From (function, z, direction, **parameters) to f'(z) * direction, for a function that acts on each element alone."""

_REACH, _PER_UNIT = 60, 500
"""The even part of the grid goes from -60 to 60, with 500 points per unit."""
_FAR = 4000
"""Points on each side of the grid beyond the even part."""


def check_elementwise(name: str, function: Callable[..., Tensor], given: Mapping[str, Any]) -> Differentiate:
    """How to differentiate a function that acts on each element alone and draws no random numbers.

    Args:
        name: the name of the activation, for the error.
        given: the parameters of the function, by name.

    Raises:
        ValueError: the function fails, draws random numbers, or is not element-wise.
    """

    def reject(fact: str) -> ValueError:
        return ValueError(
            f"activation {name!r}: {fact}. torchsat can differentiate by itself only functions that act on each element alone "
            "and draw no random numbers: give `derivative=`, or leave the row out."
        )

    generator = torch.Generator("cpu").manual_seed(0)
    z = torch.randn(64, dtype=torch.float64, generator=generator, device="cpu") * 2
    direction = torch.rand(64, dtype=torch.float64, generator=generator, device="cpu") + 0.5
    state = torch.get_rng_state()
    try:
        full = function(z.clone(), **given)
        differentiate: Differentiate = _forward_mode
        try:
            slope = derivative_of(differentiate, function, z, **given)
        except Exception:
            # An autograd.Function need not have a forward mode. Its backward is what training uses.
            differentiate = _reverse_mode
            slope = derivative_of(differentiate, function, z, **given)
        mixed = differentiate(function, z.clone(), direction, **given)
        shifted = function(z.roll(7)[:40].clone(), **given)
    except Exception as error:
        raise reject(f"f(z) for 64 numbers failed: {type(error).__name__}: {error}") from error
    finally:
        drawn = not torch.equal(state, torch.get_rng_state())
        torch.set_rng_state(state)
    if drawn:
        raise reject("it draws random numbers")
    if not isinstance(full, Tensor) or full.shape != z.shape:
        raise reject(f"64 numbers become {tuple(getattr(full, 'shape', ()))}")
    if not torch.allclose(mixed, slope * direction, rtol=1e-9, atol=1e-12) or not torch.allclose(shifted, full.roll(7)[:40], rtol=1e-9, atol=1e-12):
        raise reject("an element of its output depends on other elements of its input")
    return differentiate


def derivative_of(differentiate: Differentiate, function: Callable[..., Tensor], z: Tensor, **parameters: Any) -> Tensor:
    """f'(z), by what `check_elementwise` returned."""
    return differentiate(function, z.clone(), torch.ones_like(z), **parameters)


def _forward_mode(function: Callable[..., Tensor], z: Tensor, direction: Tensor, **parameters: Any) -> Tensor:
    return torch.func.jvp(lambda x: function(x, **parameters), (z,), (direction,))[1]  # type: ignore[no-any-return]


def _reverse_mode(function: Callable[..., Tensor], z: Tensor, direction: Tensor, **parameters: Any) -> Tensor:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(function(leaf.clone(), **parameters), leaf, direction)[0]


@functools.lru_cache(maxsize=1)
def grid() -> Tensor:
    """z from -1e6 to 1e6, in even steps up to +-60 and in geometric steps beyond: some functions have algebraic tails, or are stretched by a
    parameter."""
    even = torch.linspace(-_REACH, _REACH, 2 * _REACH * _PER_UNIT + 1, dtype=torch.float64, device="cpu")
    far = torch.logspace(math.log10(_REACH), 6, _FAR + 1, dtype=torch.float64, device="cpu")[1:]
    return torch.cat([-far.flip(0), even, far])


def peak_on_grid(slope: Callable[[Tensor], Tensor], magnitude: Tensor) -> float | None:
    """sup|f'|; None where it is not finite, or where |f'| still grows at an end of the grid.

    Args:
        slope: |f'|, as a function of z.
        magnitude: |f'| at each point of the grid.
    """
    z = grid()
    top = int(magnitude.argmax())
    peak = float(magnitude[top])
    ends = max(float(magnitude[0]), float(magnitude[-1]))
    inner = float(magnitude[_FAR:-_FAR].max())
    if not math.isfinite(peak) or peak == 0 or ends > 1.001 * inner:
        return None
    left, right = (float(z[min(max(at, 0), len(z) - 1)]) for at in (top - 1, top + 1))
    return max(peak, float(slope(torch.linspace(left, right, 4001, dtype=torch.float64, device="cpu")).max()))


def tails_on_grid(slope: Callable[[Tensor], Tensor], magnitude: Tensor, level: float) -> tuple[float | None, float | None]:
    """(z_L, z_R), beyond which |f'| stays below `level`, all the way out. None: there is no such tail on that side, or everything lies below the
    level.

    Args:
        slope, magnitude: as for `peak_on_grid`.
    """
    z = grid()
    above = (magnitude >= level).nonzero()
    if not len(above):
        return None, None
    edges: list[float | None] = []
    for outer, inner in ((int(above[0]) - 1, int(above[0])), (int(above[-1]) + 1, int(above[-1]))):
        if not 0 <= outer < len(z):
            edges.append(None)
            continue
        flat, steep = float(z[outer]), float(z[inner])
        for _ in range(60):
            middle = (flat + steep) / 2
            if float(slope(torch.tensor([middle], dtype=torch.float64, device="cpu"))) < level:
                flat = middle
            else:
                steep = middle
        edges.append((flat + steep) / 2)
    return edges[0], edges[1]


def normal_mean(slope: Callable[[Tensor], Tensor]) -> float:
    """E|f'(z)| for z ~ N(0, 1), by the midpoint rule: the kinks of hard functions lie between its points."""
    z = (torch.arange(-20_000, 20_000, dtype=torch.float64, device="cpu") + 0.5) / 2000
    return float((slope(z) * torch.exp(-0.5 * z * z)).sum()) / 2000 / math.sqrt(2 * math.pi)
