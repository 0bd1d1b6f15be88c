"""A picture of all sites over all steps so far, for TensorBoard's Images dashboard. Never torch.

It is small, since the dashboard shrinks a picture that is larger than its card.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from torchsat.colours import SHADES, shade, shades
from torchsat.grids import Grid, Table, edges, join
from torchsat.metrics import METRICS, Metric
from torchsat.record import Snapshot, to_float
from torchsat.tensorboard.stock import excess_of, levels_of

MISSING = (200, 204, 208)
"""The colour where there is no number."""
HATCH = ((0, 0, 0), (255, 255, 255))
"""The colours of the stripes where elements are inf or nan. No ramp has them, so this looks neither healthy nor as if nothing had been measured."""
WORST = 8
"""How many sites `Heatmap.worst` names."""
_LEVEL, _EXCESS = METRICS[0], METRICS[1]


class Heatmap:
    """The picture of all observations so far: the health of each site; of a run without rules, how far it is saturated beyond normal. Add each
    snapshot, then ask for the picture."""

    WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 350, 270, 106, 24, 40, 8
    KEPT = 512
    """The most observations that are kept. Beyond that every second one is left out."""

    def __init__(self) -> None:
        self._observed: list[tuple[int, float, list[tuple[str, float, float]]]] = []
        self._spared: set[str] = set()

    def add(self, snapshot: Snapshot) -> None:
        """Take in one observation."""
        levels, values = levels_of(snapshot), []
        for record in snapshot.records:
            level, beyond = levels.get(record.site), excess_of(record)
            if record.nonfinite or record.grad_nonfinite:
                level = beyond = math.inf
            if level is not None or beyond is not None:
                values.append((record.site, to_float(level), to_float(beyond)))
        self._observed.append((snapshot.step, snapshot.time, values))
        self._spared = {record.site for record in snapshot.records if record.output or record.gate}
        if len(self._observed) > self.KEPT:
            self._observed = [*self._observed[:-1:2], self._observed[-1]]

    @property
    def end(self) -> tuple[int, float]:
        """The step and the time of the last observation."""
        return self._observed[-1][:2]

    def worst(self) -> list[str]:
        """The sites that are worst at the last observation, the worst first; WORST of them at most. They are compared by health, and where that is
        equal, hidden ones by how far they are beyond normal."""
        found = [
            (-1.0 if math.isnan(level) else level, -1.0 if site in self._spared or math.isnan(beyond) else beyond, site)
            for site, level, beyond in self._observed[-1][2]
        ]
        return [site for level, beyond, site in sorted(found, key=lambda each: (-each[0], -each[1]))[:WORST] if level > 0 or beyond > -1]

    def png(self) -> bytes | None:
        """The picture as a PNG file; None if no site is judged by a rule or has a function that can saturate."""
        rows = [(step, time, [each[0] for each in row], [[each[1] for each in row], [each[2] for each in row]]) for step, time, row in self._observed]
        names, steps, times, values = join([Table.of(names, step, time, table) for step, time, names, table in rows], 2)
        if not names:
            return None
        has_levels = bool(np.isfinite(values[:, 0]).any())
        metric, grid = (_LEVEL, Grid(steps, times, names, values[:, 0])) if has_levels else (_EXCESS, Grid(steps, times, names, values[:, 1]))
        image = Image.new("RGB", (self.WIDTH, self.HEIGHT), "white")
        width, height = self.WIDTH - self.LEFT - self.RIGHT, self.HEIGHT - self.TOP - self.BOTTOM
        image.paste(self._heat(metric, grid, width, height), (self.LEFT, self.TOP))
        self._letter(image, metric, grid, width, height)
        encoded = io.BytesIO()
        image.save(encoded, "png")
        return encoded.getvalue()

    @staticmethod
    def _heat(metric: Metric, grid: Grid, width: int, height: int) -> Image.Image:
        """The cells. A column of pixels shows the worst of the observations that begin in it; if none does, the one before it."""
        colours = np.array([*shades(metric.ramp), MISSING], np.uint8)
        starts = np.linspace(grid.steps[0], edges(grid.steps)[-1], width + 1)
        first = np.searchsorted(grid.steps, starts[:-1], "right") - 1
        until = np.searchsorted(grid.steps, starts[1:], "left")
        found = np.stack([np.fmax.reduce(grid.values[at : max(at + 1, end)], axis=0) for at, end in zip(first, until, strict=True)], 1)
        known = np.nan_to_num(found, posinf=0.0, neginf=0.0)
        cells = np.where(np.isnan(found), len(colours) - 1, shade(metric, known, 0.0, 1.0))
        rows = np.arange(height) * len(grid.names) // height
        pixels = np.where(np.isinf(found[rows])[..., None], _hatched(width, height), colours[cells[rows]])
        return Image.fromarray(pixels.astype(np.uint8))

    def _letter(self, image: Image.Image, metric: Metric, grid: Grid, width: int, height: int) -> None:
        """Write the title, the names of sites, the first and last step, and the key of the colours round the picture."""
        pen, font, ink, faint = ImageDraw.Draw(image), _font(12), "#202124", "#5f6368"
        pen.text((4, 4), f"{metric.title}, {len(grid.names)} sites", ink, font)
        row, every = height / len(grid.names), -(-15 * len(grid.names) // height)
        shared = _shared(grid.names)
        for place, name in enumerate(grid.names):
            if place % every == 0:
                pen.text(
                    (self.LEFT - 4, self.TOP + (place + 0.5) * row),
                    _shortened(name[shared:], self.LEFT - 8, font),
                    ink,
                    font,
                    anchor="rm",
                )
        pen.rectangle((self.LEFT - 1, self.TOP - 1, self.LEFT + width, self.TOP + height), outline="#9aa0a6")
        below = self.TOP + height + 4
        pen.text((self.LEFT, below), f"step {grid.steps[0]:.0f}", faint, font)
        pen.text((self.LEFT + width, below), f"{grid.steps[-1]:.0f}", faint, font, anchor="ra")
        low, high = ("healthy", "critical") if metric.form == "level" else ("0 %", "100 %")
        left = 10 + round(font.getlength(low))
        pen.text((4, below + 23), low, faint, font, anchor="lm")
        for at, colour in enumerate(shades(metric.ramp)):
            pen.line((left + at * 100 // SHADES, below + 18, left + at * 100 // SHADES, below + 28), fill=colour)
        pen.text((left + 106, below + 23), high, faint, font, anchor="lm")
        if np.isinf(grid.values).any():
            at = left + 118 + round(font.getlength(high))
            image.paste(Image.fromarray(_hatched(16, 11)), (at, below + 18))
            pen.text((at + 22, below + 23), "inf or nan", faint, font, anchor="lm")


def _hatched(width: int, height: int) -> NDArray[np.uint8]:
    """Diagonal stripes, [height, width, 3]."""
    dark = (np.arange(height)[:, None] + np.arange(width)) % 6 < 3
    return np.where(dark[..., None], *(np.array(colour, np.uint8) for colour in HATCH))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _shared(names: Sequence[str]) -> int:
    """The length of the path that all names begin with."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return sum(len(each[0]) + 1 for each in itertools.takewhile(lambda each: len(set(each)) == 1, parts)) if len(names) > 1 else 0


def _shortened(name: str, width: int, font: Any) -> str:
    """A name cut at its end to a width in pixels. The path that all names share has been removed before, so the beginning tells names apart."""
    text = name
    while font.getlength(text) > width:
        name = name[:-1]
        text = f"{name}…"
    return text
