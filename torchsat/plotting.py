"""`torchsat.plot`: one run as a figure of matplotlib, from wherever the run is known. Never torch.

Event files, snapshots and a monitor all give the same `Series`, so they give the same figure. How it looks is in figures.py, which is imported here
when a figure is asked for, since matplotlib is optional.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torchsat.grids import Grid
from torchsat.metrics import METRICS, Metric
from torchsat.record import Snapshot
from torchsat.tensorboard.reader import read
from torchsat.view import Series, from_snapshots, heads, histograms

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@runtime_checkable
class Drawn(Protocol):
    """What draws itself, such as a Monitor."""

    def plot(self, metric: str = "alert_level", *, site: str | None = None) -> Figure: ...


class Source(Protocol):
    """What a figure of a run is drawn from."""

    def series(self, name: str = "") -> Series: ...

    def histograms(self, site: str) -> Grid: ...

    def heads(self, site: str) -> Grid: ...


class _Snapshots:
    """Snapshots as the source of a figure."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots

    def series(self, name: str = "") -> Series:
        return from_snapshots(name, self._snapshots)

    def histograms(self, site: str) -> Grid:
        return histograms(site, self._snapshots)

    def heads(self, site: str) -> Grid:
        return heads(site, self._snapshots)


def plot(run: str | os.PathLike[str] | Snapshot | Sequence[Snapshot] | Drawn, metric: str = "alert_level", *, site: str | None = None) -> Figure:
    """Draw one run: a metric of all sites over the steps, with its alerts, and the depth profile at the last step.

    A notebook shows the figure where it is the last expression of a cell. A script writes it: `torchsat.plot("runs/exp1").savefig("exp1.png")`.

    Args:
        run: the directory that was given to `watch`, snapshots (as `torchsat.read` returns them), one snapshot, or a Monitor.
        metric: the name of a metric, such as `alert_level` (the health of each site), `saturated`, `blocked`, `grad_z_rms` or `entropy_min`.
        site: the name of a site. It is then drawn alone: its histogram of |f'| / peak over the steps, or the entropy of its heads, and what its
            plateaus take.

    Raises:
        FileNotFoundError: there is no torchsat data in the directory.
        ValueError: the directory holds several runs, nothing has been observed, or there is no such metric.
        KeyError: there is no such site.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if isinstance(run, (str, os.PathLike)):
        return draw(_Snapshots(read(run)), metric, site, os.fspath(run))
    if isinstance(run, Snapshot):
        return draw(_Snapshots([run]), metric, site)
    if isinstance(run, Drawn):
        return run.plot(metric, site=site)
    snapshots = [each for each in run if isinstance(each, Snapshot)] if isinstance(run, Sequence) else []
    if isinstance(run, Sequence) and len(snapshots) == len(run):
        return draw(_Snapshots(snapshots), metric, site)
    raise TypeError(f"run is a {type(run).__name__}; allowed are a directory, snapshots, and a Monitor")


def draw(source: Source, metric: str, site: str | None, name: str = "") -> Figure:
    """The figure of a run; `plot` explains the arguments."""
    wanted, run = _metric(metric), source.series(name)
    if not len(run.steps):
        raise ValueError("nothing has been observed yet, so there is nothing to draw; train a step first")
    from torchsat.figures import run_figure, site_figure

    if site is None:
        return run_figure(run, wanted)
    if site not in run.names:
        near = get_close_matches(site, run.names, n=3) or list(run.names[:5])
        raise KeyError(f"no site {site!r}; near it: {', '.join(near)}")
    return site_figure(run, site, source.histograms(site), source.heads(site))


def _metric(name: Any) -> Metric:
    """The metric of this name or title."""
    for metric in METRICS:
        if name in (metric.name, metric.title):
            return metric
    names = [metric.name for metric in METRICS]
    near = get_close_matches(str(name), names, n=1)
    raise ValueError(f"there is no metric {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} Allowed are: {', '.join(names)}")
