"""What is shown in a cell of a notebook while that cell runs: a card that follows the training, and a bar of progress. Never torch.

Both are one output of the cell, which is replaced. IPython sends it at once, so neither a thread nor widgets are needed. Outside a kernel nothing is
shown. IPython is asked only where it runs already: torchsat does not depend on it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

INTERVAL = 0.5
"""The least number of seconds between two pictures of the same output. Each is sent to the browser and kept in memory there."""


def is_kernel() -> bool:
    """Whether this code runs in a kernel, which shows HTML: Jupyter, Colab, VS Code. The prompt of IPython in a terminal does not."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Output:
    """One output of the running cell that shows HTML, which can be replaced.

    Args:
        html: gives what is to be shown now.
        text: gives the same for a notebook that shows no HTML.
        interval: the least number of seconds between two pictures.
    """

    def __init__(self, html: Callable[[], str], text: Callable[[], str], interval: float = INTERVAL) -> None:
        from IPython import display

        show: Callable[..., Any] = display.display  # it has no types
        self._html, self._text, self._interval = html, text, interval
        self._handle = show(self._bundle(), raw=True, display_id=True)
        self._shown = time.monotonic()
        self._is_stale = False

    def _bundle(self) -> dict[str, str]:
        return {"text/html": self._html(), "text/plain": self._text()}

    def show(self) -> None:
        """Show what there is now, unless the last picture is too new."""
        self._is_stale = True
        if time.monotonic() - self._shown >= self._interval:
            self.flush()

    def flush(self) -> None:
        """Show what there is now, if the last picture does not show it."""
        if self._is_stale:
            self._is_stale = False
            self._handle.update(self._bundle(), raw=True)
            self._shown = time.monotonic()


class Live:
    """A sink that shows a card of the monitor, which follows the training."""

    def __init__(self, html: Callable[[], str], text: Callable[[], str]) -> None:
        self._output = Output(html, text)

    def __call__(self, snapshot: object) -> None:
        self._output.show()

    def flush(self) -> None:
        self._output.flush()

    def close(self) -> None:
        """Show the end of the run."""
        self._output.show()
        self._output.flush()


class Bar:
    """A bar of progress.

    Args:
        title: what goes on.
        total: the number of steps at which it is full.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._output = Output(self._as_html, self._as_text, interval=0.1)

    def _as_html(self) -> str:
        if self._done >= self._total:
            return ""
        return f'<div style="font-size:12px">{self._title} <progress value="{self._done}" max="{self._total}"></progress> {self._share}</div>'

    def _as_text(self) -> str:
        return "" if self._done >= self._total else f"{self._title} {self._share}"

    @property
    def _share(self) -> str:
        return f"{100 * self._done // self._total} %"

    def advance(self, steps: int) -> None:
        self._done += steps
        self._output.show()

    def close(self) -> None:
        """Leave nothing in the cell."""
        self._done = self._total
        self._output.show()
        self._output.flush()
