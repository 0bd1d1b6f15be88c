"""`torchsat.plot`: runs as a figure of matplotlib, from wherever they are known. Never torch.

Event files, snapshots and a monitor all give the same `Series`, so they give the same figure. How it looks is in figures.py, which is imported here
when a figure is asked for, since matplotlib is optional.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torchsat.grids import Grid
from torchsat.metrics import METRICS, Metric
from torchsat.record import Snapshot
from torchsat.tensorboard.reader import read_runs
from torchsat.view import Series, from_snapshots, heads, histograms

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@runtime_checkable
class Drawn(Protocol):
    """What remembers its run, such as a Monitor."""

    def _drawn(self) -> tuple[str, Source]: ...


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


Run = str | os.PathLike[str] | Snapshot | Sequence[Snapshot] | Drawn
"""What a run can be drawn from."""


def plot(*runs: Run, metric: str | None = None, site: str | None = None) -> Figure:
    """Draw a run: a metric of all sites over the steps, with its alerts, and the depth profile at the last step. Several runs are drawn below each
    other, on one scale of colours and one axis of steps: `torchsat.plot("runs/a", "runs/b")`.

    A notebook shows the figure where it is the last expression of a cell. A script writes it: `torchsat.plot("runs/exp1").savefig("exp1.png")`.

    Args:
        runs: each is the directory that was given to `watch`, or one above several of them, snapshots (as `torchsat.read` returns them), one
            snapshot, or a Monitor.
        metric: the name of a metric, such as `alert_level` (the health of each site, and what is drawn where none is named), `saturated`, `blocked`,
            `grad_z_rms` or `entropy_min`. It may also stand behind the runs: `torchsat.plot("runs/exp1", "blocked")`.
        site: the name of a site of one run. It is then drawn alone: its histogram of |f'| / peak over the steps, or the entropy of its heads, and
            what its plateaus take.

    Raises:
        FileNotFoundError: there is no torchsat data in a directory.
        ValueError: nothing has been observed, there is no such metric, or a site is asked for of several runs.
        KeyError: there is no such site.
        TypeError: no run is given, or something that is none.
        ModuleNotFoundError: matplotlib is not installed.
    """
    last = runs[-1] if len(runs) > 1 and metric is None else None
    if isinstance(last, str) and not Path(last).is_dir() and _like_a_metric(last):
        runs, metric = runs[:-1], last
    if not runs:
        raise TypeError("no run is given; allowed are a directory, snapshots, and a Monitor")
    found = [source for run in runs for source in _sources(run)]
    names = [name for name, _ in found]
    # Runs without a name of their own, or with the same one, are told apart by their place.
    told = [name if name and names.count(name) == 1 else f"{name or 'run'} {at + 1}" for at, name in enumerate(names)]
    return draw([(name if len(found) == 1 else own, source) for own, (name, source) in zip(told, found, strict=True)], metric or "alert_level", site)


def _sources(run: Run) -> list[tuple[str, Source]]:
    """The runs that one argument of `plot` stands for, by name."""
    if isinstance(run, (str, os.PathLike)):
        read = read_runs(run)
        return [(os.fspath(run) if len(read) == 1 else each.name, _Snapshots(each.snapshots)) for each in read]
    if isinstance(run, Snapshot):
        return [("", _Snapshots([run]))]
    if isinstance(run, Drawn):
        return [run._drawn()]
    snapshots = [each for each in run if isinstance(each, Snapshot)] if isinstance(run, Sequence) else []
    if isinstance(run, Sequence) and len(snapshots) == len(run):
        return [("", _Snapshots(snapshots))]
    raise TypeError(f"run is a {type(run).__name__}; allowed are a directory, snapshots, and a Monitor")


def draw(sources: Sequence[tuple[str, Source]], metric: str, site: str | None) -> Figure:
    """The figure of runs by name; `plot` explains the arguments."""
    wanted, runs = _metric(metric), [source.series(name) for name, source in sources]
    if not all(len(run.steps) for run in runs):
        raise ValueError("nothing has been observed yet, so there is nothing to draw; train a step first")
    if site is not None and len(runs) > 1:
        raise ValueError("a site is drawn of one run at a time; give one run")
    from torchsat.figures import runs_figure, site_figure

    if site is None:
        return runs_figure(runs, wanted)
    (run,), ((_, source),) = runs, sources
    if site not in run.names:
        near = get_close_matches(site, run.names, n=3) or list(run.names[:5])
        raise KeyError(f"no site {site!r}; near it: {', '.join(near)}")
    return site_figure(run, site, source.histograms(site), source.heads(site))


def _like_a_metric(name: str) -> bool:
    """Whether this is the name of a metric, or nearly one."""
    return bool(get_close_matches(name, [known for metric in METRICS for known in (metric.name, metric.title)], n=1))


def _metric(name: Any) -> Metric:
    """The metric of this name or title."""
    for metric in METRICS:
        if name in (metric.name, metric.title):
            return metric
    names = [metric.name for metric in METRICS]
    near = get_close_matches(str(name), names, n=1)
    raise ValueError(f"there is no metric {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} Allowed are: {', '.join(names)}")
