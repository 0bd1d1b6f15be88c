"""Curves drawn into a file with matplotlib, which is imported only here and only when a picture is asked for: torchsat does not depend on it.

This file knows nothing of trials. It is given panels of named curves, so that it changes only with how the picture looks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A line with the name that the legend shows."""

    name: str
    points: tuple[tuple[int, float], ...]
    """Pairs of a step and a finite value. Where there are none, the name still takes its place in the legend."""


@dataclass(frozen=True)
class Panel:
    """One chart of the row, with its curves over the steps."""

    title: str
    curves: tuple[Curve, ...]
    """The same names in the same order in every panel of a picture. The first one is the reference and is drawn in black."""
    logarithmic: bool = False


def draw(panels: Sequence[Panel], path: str | os.PathLike[str]) -> None:
    """Draw the panels side by side, with one legend below them, into a file of the kind that the end of its name says.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a picture needs matplotlib: pip install matplotlib") from None
    # Agg draws into files only, so that no display is needed.
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.2), layout="constrained")
    colours = [plt.get_cmap("tab20")(number) for number in range(20)]
    for axis, panel in zip(axes, panels, strict=True):
        for at, curve in enumerate(panel.curves):
            style: dict[str, Any] = {"color": "black", "linewidth": 2.2} if at == 0 else {"color": colours[(at - 1) % 20], "linewidth": 1.2}
            steps, values = zip(*curve.points, strict=True) if curve.points else ((), ())
            axis.plot(steps, values, label=curve.name, **style)
        if panel.logarithmic:
            axis.set_yscale("log")
        axis.set(title=panel.title, xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(os.fspath(path), dpi=100)
    plt.close(figure)
