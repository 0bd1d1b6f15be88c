"""A picture of all sites over all steps so far, for TensorBoard's Images dashboard. Never torch.

It is small, since the dashboard shrinks a picture that is larger than its card.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from torchsat.colours import SHADES, shade, shades
from torchsat.grids import Grid, Table, join
from torchsat.metrics import METRICS, excess
from torchsat.record import Snapshot

MISSING = (200, 204, 208)
"""The colour where there is no number."""
WORST = 8
"""How many sites `Heatmap.worst` names."""


class Heatmap:
    """The picture of all observations so far. Add each snapshot, then ask for the picture."""

    WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 350, 270, 106, 24, 40, 8
    KEPT = 512
    """The most observations that are kept. Beyond that every second one is left out."""

    def __init__(self) -> None:
        self._observed: list[tuple[int, float, list[tuple[str, float]]]] = []
        self._spared: set[str] = set()
        self._metric = METRICS[0]

    def add(self, snapshot: Snapshot) -> None:
        """Take in one observation."""
        values = [
            (record.site, excess(record.saturated, record.normal_low, record.normal_high))
            for record in snapshot.records
            if record.saturated is not None
        ]
        self._observed.append((snapshot.step, snapshot.time, values))
        self._spared = {record.site for record in snapshot.records if record.output or record.gate}
        if len(self._observed) > self.KEPT:
            self._observed = [*self._observed[:-1:2], self._observed[-1]]

    @property
    def end(self) -> tuple[int, float]:
        """The step and the time of the last observation."""
        return self._observed[-1][:2]

    def worst(self) -> list[str]:
        """The hidden sites that are furthest beyond normal at the last observation, the worst first; WORST of them at most."""
        found = [(value, site) for site, value in self._observed[-1][2] if site not in self._spared]
        return [site for _, site in sorted(found, key=lambda pair: -pair[0])[:WORST]]

    def png(self) -> bytes | None:
        """The picture as a PNG file; None if no site has a function that can saturate."""
        names, steps, times, values = join(
            [Table.of([site for site, _ in row], step, time, [[value for _, value in row]]) for step, time, row in self._observed], 1
        )
        if not names:
            return None
        grid = Grid(steps, times, names, values[:, 0])
        image = Image.new("RGB", (self.WIDTH, self.HEIGHT), "white")
        width, height = self.WIDTH - self.LEFT - self.RIGHT, self.HEIGHT - self.TOP - self.BOTTOM
        heat = Image.fromarray(self._pixels(grid, width)).resize((width, height), Image.Resampling.NEAREST)
        image.paste(heat, (self.LEFT, self.TOP))
        self._letter(image, grid, width, height)
        encoded = io.BytesIO()
        image.save(encoded, "png")
        return encoded.getvalue()

    def _pixels(self, grid: Grid, width: int) -> NDArray[np.uint8]:
        """The colours [sites, columns of pixels, 3]. A column shows the worst of the observations that begin in it; if none does, the one before
        it."""
        metric, colours = self._metric, np.array([*shades(self._metric.ramp), MISSING], np.uint8)
        last = grid.steps[-1] + (grid.steps[-1] - grid.steps[-2] if len(grid.steps) > 1 else 1)
        starts = np.linspace(grid.steps[0], last, width + 1)
        first = np.searchsorted(grid.steps, starts[:-1], "right") - 1
        until = np.searchsorted(grid.steps, starts[1:], "left")
        found = np.stack([np.fmax.reduce(grid.values[at : max(at + 1, end)], axis=0) for at, end in zip(first, until, strict=True)], 1)
        pixels: NDArray[np.uint8] = colours[np.where(np.isnan(found), len(colours) - 1, shade(metric, np.nan_to_num(found), 0.0, 1.0))]
        return pixels

    def _letter(self, image: Image.Image, grid: Grid, width: int, height: int) -> None:
        """Write the title, the names of sites, the first and last step, and the key of the colours round the picture."""
        pen, font, ink, faint = ImageDraw.Draw(image), _font(12), "#202124", "#5f6368"
        pen.text((4, 4), f"{self._metric.title}, {len(grid.names)} sites", ink, font)
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
        for at, colour in enumerate(shades(self._metric.ramp)):
            pen.line((self.LEFT + at * 140 // SHADES + 40, below + 18, self.LEFT + at * 140 // SHADES + 40, below + 28), fill=colour)
        pen.text((self.LEFT + 34, below + 23), "0 %", faint, font, anchor="rm")
        pen.text((self.LEFT + 186, below + 23), "100 %", faint, font, anchor="lm")


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
