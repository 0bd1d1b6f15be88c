"""The colours of numbers: ramps, and which colour of its ramp a number has; NumPy and standard library only.

The colours are computed, not tabulated: each ramp is a path through OKLCH (Ottosson 2020, https://bottosson.github.io/posts/oklab/) on which the
lightness changes by equal steps. Equal steps of a number therefore look equal, in print and to eyes that confuse red and green. Good values have
nearly the colour of the page and bad ones stand out: the bad end is dark on a light page and bright on a dark one.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from torchsat.metrics import Metric, Ramp, Values

SHADES = 256
"""The number of colours of a ramp."""

_PATHS: dict[tuple[Ramp, bool], tuple[tuple[float, float, float], ...]] = {
    ("heat", False): ((0.965, 0.02, 100), (0.80, 0.14, 75), (0.60, 0.19, 38), (0.43, 0.17, 5), (0.26, 0.10, -40)),
    ("heat", True): ((0.23, 0.03, -85), (0.38, 0.14, -40), (0.58, 0.20, 10), (0.77, 0.16, 55), (0.95, 0.10, 105)),
    ("amount", False): ((0.965, 0.02, 190), (0.80, 0.08, 195), (0.60, 0.10, 225), (0.42, 0.12, 260), (0.26, 0.12, 285)),
    ("amount", True): ((0.23, 0.03, 285), (0.38, 0.12, 275), (0.58, 0.12, 240), (0.77, 0.12, 195), (0.95, 0.10, 150)),
    ("balance", False): ((0.36, 0.13, 255), (0.66, 0.11, 245), (0.965, 0.0, 60), (0.66, 0.15, 60), (0.36, 0.09, 50)),
    ("balance", True): ((0.88, 0.10, 225), (0.55, 0.12, 245), (0.23, 0.0, 60), (0.55, 0.12, 55), (0.88, 0.12, 85)),
}
"""For each ramp, on a light page (False) and on a dark one (True): points at equal distances, as (lightness, chroma, hue in degrees) of OKLCH."""


def _oklab_to_linear(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    """From OKLab to linear sRGB, by the matrices of Ottosson."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _rgb(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """From OKLCH to 8-bit sRGB. A colour that sRGB does not have becomes a paler one of the same lightness."""
    while True:
        linear = _oklab_to_linear(lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue)))
        if chroma <= 0 or all(-1e-4 <= channel <= 1 + 1e-4 for channel in linear):
            break
        chroma = max(0.0, chroma - 0.005)
    encoded = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in (min(1.0, max(0.0, channel)) for channel in linear))
    red, green, blue = (round(255 * value) for value in encoded)
    return red, green, blue


@functools.cache
def shades(ramp: Ramp, dark: bool = False) -> tuple[tuple[int, int, int], ...]:
    """The colours of a ramp, SHADES of them, as 8-bit RGB."""
    path, colours = _PATHS[ramp, dark], []
    for shade in range(SHADES):
        at = shade / (SHADES - 1) * (len(path) - 1)
        index = min(int(at), len(path) - 2)
        one, other = path[index], path[index + 1]
        if not (one[1] and other[1]):  # grey has no hue of its own and takes that of the other point
            one, other = ((each[0], each[1], max(one[1:], other[1:])[1]) for each in (one, other))
        colours.append(_rgb(*(start + (end - start) * (at - index) for start, end in zip(one, other, strict=True))))
    return tuple(colours)


def shade(metric: Metric, values: Values, low: float, high: float) -> NDArray[np.intp]:
    """For finite numbers, the indices of their colours in the ramp of a metric whose scale reaches from `low` to `high`."""
    wide = values.astype(np.float64)
    if metric.scale == "log":
        wide, low, high = np.log10(np.maximum(wide, 1e-300)), math.log10(low), math.log10(high)
    position = (np.clip(wide, low, high) - low) / (high - low)
    if metric.reversed:
        position = 1 - position
    found: NDArray[np.intp] = np.floor(position * (SHADES - 1) + 0.5).astype(np.intp)
    return found
