"""Why a gradient becomes 0 in the type in which it is kept: it is too small for it; standard library only."""

from __future__ import annotations

from torchsat.causes.scene import Scene, Term
from torchsat.expressions import owner
from torchsat.number_formats import BY_NAME, IN_WORDS, most_lost
from torchsat.percent import percent
from torchsat.record import Alert


def of_underflow(alert: Alert, scene: Scene) -> list[Term]:
    """The range of the type in use. Remedies put the gradient further up in that range, or take a type that reaches further down."""
    use = most_lost(scene.now.formats_at.get(alert.site, ()))
    if use is None:
        return []
    known, what = BY_NAME[use.format], f"{IN_WORDS[use.tensor]} at {alert.site}"
    lowest, normal = f"{known.smallest:.2g}, the smallest number of {use.format}", f"{known.smallest_normal:.2g}"
    evidence = (
        f"{percent(use.smallest or 0.0)} of {what} is {lowest}, {percent(use.subnormal or 0.0)} is below {normal}, where it has fewer "
        f"correct bits, and {percent(use.zero or 0.0)} is 0"
    )
    return [Term("numeric_range", 1.0, evidence, _REMEDIES[use.format].format(place=owner(alert.site)))]


def of_zeros(scene: Scene) -> list[Term]:
    """Gradients that are 0 everywhere and lie in a type that may have made them so. Empty where number formats are not measured."""
    uses = [use for use in scene.now.formats if use.in_use and use.tensor == "grad_a" and BY_NAME[use.format].smallest > SMALLEST]
    if not uses:
        return []
    known = BY_NAME[uses[0].format]
    evidence = f"dL/da at {uses[0].place} is kept in {known.name}, in which what is {known.smallest / 2:.2g} or smaller is 0"
    return [Term("numeric_range", 2.0, evidence, _REMEDIES[known.name].format(place="the model"))]


SMALLEST = 1e-30
"""A type that goes further down than this makes no gradient 0 that is of any use."""
_SCALE = "give each tensor, or each block of neighbours (mxfp8), a scale of its own"
_KEEP = "keep {place} in float32 or bfloat16"
_REMEDIES = {
    "fp16": f"multiply the loss: use torch.amp.GradScaler, or a larger scale; or train in bfloat16, which has the range of float32; or {_KEEP}",
    "bf16": "look for what makes the gradient so small: bfloat16 has the range of float32, and no scale of the loss is enough",
    "fp8_e4m3": f"{_SCALE}; or keep gradients in float8_e5m2, which has more range; or {_KEEP}",
    "fp8_e5m2": f"{_SCALE}; or {_KEEP}",
}
"""What to try, by the format in use."""
