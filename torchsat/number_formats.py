"""The number formats in which a training may keep its numbers, and what was found of each at the tensors of a place; standard library only.

The numbers of the first four formats are those of torch's types. float8_e4m3fn has no infinity and a largest value of 448; the other three follow
IEEE 754, with one exponent for inf and nan. Elements are rounded to the nearest value and from the middle to the even one, as the casts of torch do
(c10/util/Half.h, BFloat16.h, Float8_e4m3fn.h, Float8_e5m2.h). A cast of torch to one of these has no scale: what a training multiplies a tensor with
before the cast (a GradScaler, the scale of a tensor in torchao's float8) has to be in the tensor.

A block-scaled format keeps a scale for each block of neighbours along the last axis, with which the largest element of the block comes near the end
of the format's range:

- mxfp8: 32 elements of e4m3 with a power of two (e8m0). The scale is 2^(floor(log2(amax)) - 8), the rule of the OCP Microscaling Formats
  specification 1.0, section 6.3, and the default of `torchao.prototype.mx_formats.mx_tensor.to_mx` (`ScaleCalculationMode.FLOOR`, torchao 0.18).
  Elements of more than 1.8 times the scale's 2^8 do not fit and are clamped. torchao's other modes round the scale up, and clamp none.
- nvfp4: 16 elements of e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6) with a scale in e4m3, which is amax of the block / 6 in units of amax of the tensor / (448 x
  6): `nvfp4_quantize` with `per_tensor_amax_to_scale` in torchao 0.18.

A *subnormal* result has fewer correct bits than a normal one, a *flushed* one has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class NumberFormat:
    """One number format. The sizes are those of its elements, before the scale of a block."""

    name: str
    dtype: str
    """The name of the type in torch of its elements, without `torch.`."""
    mantissa: int
    """Bits of the mantissa that are stored."""
    largest: float
    """The largest finite value."""
    smallest_normal: float
    block: int = 1
    """How many neighbours along the last axis share a scale; 1 where there is none."""

    @property
    def smallest(self) -> float:
        """The smallest value above 0, which is subnormal, and the distance between any two subnormal ones."""
        return math.ldexp(self.smallest_normal, -self.mantissa)


FORMATS: tuple[NumberFormat, ...] = (
    NumberFormat("fp16", "float16", 10, 65504.0, 2.0**-14),
    NumberFormat("bf16", "bfloat16", 7, math.ldexp(255.0, 120), 2.0**-126),
    NumberFormat("fp8_e4m3", "float8_e4m3fn", 3, 448.0, 2.0**-6),
    NumberFormat("fp8_e5m2", "float8_e5m2", 2, 57344.0, 2.0**-14),
    NumberFormat("mxfp8", "float8_e4m3fn", 3, 448.0, 2.0**-6, block=32),
    NumberFormat("nvfp4", "float4_e2m1fn_x2", 1, 6.0, 1.0, block=16),
)
BY_NAME: dict[str, NumberFormat] = {each.name: each for each in FORMATS}
BY_DTYPE: dict[str, NumberFormat] = {each.dtype: each for each in FORMATS if each.block == 1}
"""The format of a plain tensor of each type of torch. A block-scaled tensor is no plain tensor."""

OF_SITE = ("z", "a", "grad_a", "grad_z")
"""The tensors of a site, in the order of its block."""
OF_LAYER = ("weight", "grad")
"""The tensors of a layer, in the order of its block."""
IN_WORDS = {"z": "z", "a": "a", "grad_a": "dL/da", "grad_z": "dL/dz", "weight": "its weight", "grad": "dL/dW"}
"""The tensors as people call them."""
GRADIENTS = ("grad_a", "grad_z", "grad")


@dataclass(frozen=True)
class FormatUse:
    """What a number format does, or would do, to one tensor of a place in one observation. All shares are of its finite elements."""

    place: str
    """The site or the layer."""
    tensor: str
    """`z`, `a`, `grad_a` (dL/da) or `grad_z` (dL/dz) of a site; `weight` or `grad` (dL/dW) of a layer. A gradient is taken as it lies in memory, with
    the factor of a GradScaler if there is one, since this is what a format has to hold. That of a weight is taken when the optimizer steps."""
    format: str
    """The name of a row of FORMATS."""
    in_use: bool
    """Whether the tensor lies in memory in this format."""
    n: int
    """How many elements were read."""
    zero: float | None
    """Share of elements that are 0 already."""
    flushed: float | None
    """Share of elements that are not 0 and would become 0. None for the format in use: what it has flushed is a 0 like any other."""
    clamped: float | None
    """Share of elements that are beyond the range: those that torch would round beyond the largest value, whether its cast makes them inf or the
    largest value. None for the format in use."""
    subnormal: float | None
    """Share of elements that are, or would be, subnormal."""
    smallest: float | None
    """Share of elements that are, or would be, the smallest value above 0."""

    @property
    def lost(self) -> float | None:
        """An estimate of the share of elements that the format in use has flushed, of those that were not 0 before. None for any other format.

        What rounds to the smallest value lies in a range that is twice as wide as the range of what is flushed. So as long as elements become no
        rarer towards 0, at least half as many were flushed as are the smallest value. Where all is flushed nothing is left to tell it from.
        """
        if not self.in_use or self.smallest is None or self.zero is None:
            return None
        flushed, left = self.smallest / 2, 1 - self.zero
        return flushed / (flushed + left) if left > 0 else None


USE_FACTS = ("place", "tensor", "format", "in_use")
USE_METRICS = ("n", "zero", "flushed", "clamped", "subnormal", "smallest")
"""The fields of a FormatUse that stay the same, and its numbers."""


@dataclass(frozen=True)
class WithFormats:
    """The part of a snapshot that says what number formats do. Empty unless the user has asked for it: `watch(..., extras=("formats",))`."""

    formats: tuple[FormatUse, ...] = field(default=(), kw_only=True)
    """For each tensor of each site and layer, and for each format, what the format does or would do to its elements."""

    @cached_property
    def formats_at(self) -> dict[str, list[FormatUse]]:
        """`formats` by place."""
        found: dict[str, list[FormatUse]] = {}
        for use in self.formats:
            found.setdefault(use.place, []).append(use)
        return found


def most_lost(uses: Sequence[FormatUse]) -> FormatUse | None:
    """Of the gradients of one place, the one of which the format in use has flushed most; None where no format of the table is in use."""
    known = [use for use in uses if use.tensor in GRADIENTS and use.lost is not None]
    return max(known, key=lambda use: use.lost or 0.0, default=None)
