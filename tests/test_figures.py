"""Figures of runs, sites and trials: they show the numbers of the run, wherever it is read from, and change nothing of the user's matplotlib."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchsat
from tests.conftest import record
from tests.test_cards import alert
from tests.test_diagnosis import stack
from tests.test_tensorboard import write
from torchsat import Snapshot, Trial, Trials
from torchsat.history import MOST, History
from torchsat.metrics import METRICS
from torchsat.view import from_snapshots, heads, histograms

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")


def snapshots(count: int = 5) -> list[Snapshot]:
    """Two sites over some steps: `b` gets worse, and at the last step it is not finite."""
    bins = tuple([0.5] + [0.0] * 47 + [0.5])
    found = []
    for step in range(count):
        broken = step == count - 1
        sites = (
            record("a.act", alert_level=0.0, histogram=bins),
            record("b.act", alert_level=step / 4, saturated=None if broken else step / 5, nonfinite=int(broken), after=("a.act",)),
        )
        told = (alert("b.act", since=1, step=2),) if step == 2 else ()
        found.append(Snapshot(step, float(step), sites, alerts=told))
    return found


def mesh(figure: object, axes: int = 0) -> np.ma.MaskedArray:
    """The numbers that a heatmap shows."""
    return figure.axes[axes].collections[0].get_array()  # type: ignore[attr-defined, no-any-return]


def test_the_heatmap_shows_the_numbers_of_the_run() -> None:
    figure = torchsat.plot(snapshots())
    heat, profile = figure.axes[:2]
    assert heat.get_title() == "Health"
    assert [label.get_text() for label in heat.get_yticklabels()] == ["a.act (tanh)", "b.act (tanh)"]
    assert mesh(figure).tolist() == [[0.0] * 5, [0.0, 0.25, 0.5, 0.75, None]]
    (hatched,) = (each for each in heat.collections if each.get_hatch())
    assert hatched.get_paths()[0].get_extents().bounds == (4.0, 0.5, 1.0, 1.0)
    marks = [line for line in heat.lines if line.get_marker() == ">"]
    assert [(line.get_xdata().tolist(), line.get_color()) for line in marks] == [([1.0], "#cf3f45")]  # type: ignore[union-attr]
    assert [bar.get_extents().width > 0 for bar in profile.patches] == [False, True]
    assert profile.patches[1].get_hatch()
    assert "not finite" not in figure.get_suptitle()
    assert figure.get_suptitle().startswith("critical: b.act (tanh): saturated (init_too_large), since step 1")


@pytest.mark.parametrize("metric", [each.name for each in METRICS])
def test_every_metric_can_be_drawn(metric: str, tmp_path: Path) -> None:
    torchsat.plot(snapshots(2), metric).savefig(tmp_path / "run.png")


def test_a_site_is_drawn_with_its_histogram_and_its_alerts() -> None:
    figure = torchsat.plot(snapshots(), site="a.act")
    shares = mesh(figure)
    assert shares.shape == (49, 5)
    assert shares[0].tolist() == shares[48].tolist() == [0.5] * 5
    assert shares[1:48].max() == pytest.approx(1e-3)
    lower = torchsat.plot(snapshots(), site="b.act").axes[1]
    assert [line.get_label() for line in lower.lines] == [
        *("Saturated", "Stuck units", "saturated where inputs are N(0, 1)", "critical: saturated"),
    ]
    assert lower.lines[0].get_ydata()[:4].tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6])  # type: ignore[index, union-attr]


def test_a_softmax_is_drawn_by_its_heads() -> None:
    many = tuple(torchsat.Head(8, entropy, 0.1, 1.0, 2.0) for entropy in (0.9, 0.1, None))
    site = record("attn/softmax", activation="softmax", kind="softmax", heads=many, entropy_min=0.1, saturated=None)
    figure = torchsat.plot(Snapshot(3, 0.0, (site,)), site="attn/softmax")
    assert mesh(figure).tolist() == [[pytest.approx(0.9)], [pytest.approx(0.1)], [None]]


def test_a_monitor_a_directory_and_snapshots_give_the_same_figure(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = stack(nn.Tanh, gain=8.0)
    monitor = torchsat.watch(model, tmp_path, every=1, errors="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    # The last observation is still on its way, and the figure waits for it.
    ours = [monitor.plot(), torchsat.plot(monitor, "grad_z_rms"), monitor.plot(site="block1.act")]
    monitor.close()
    read = torchsat.read(tmp_path)
    for source in (tmp_path, str(tmp_path), read):
        theirs = [torchsat.plot(source), torchsat.plot(source, "grad_z_rms"), torchsat.plot(source, site="block1.act")]
        for one, other in zip(ours, theirs, strict=True):
            assert mesh(one).shape[1] == 5
            assert np.ma.allequal(mesh(one), mesh(other))
            assert len(one.axes[0].lines) == len(other.axes[0].lines)
    assert torchsat.plot(read[-1]).axes[0].get_title() == "Health"


def test_several_runs_are_drawn_on_one_scale_and_one_axis(tmp_path: Path) -> None:
    sick = snapshots()
    well = [dataclasses.replace(each, alerts=(), records=each.records[:1]) for each in sick[:3]]
    write(tmp_path / "sick", sick)
    write(tmp_path / "well", well)
    with torchsat.watch(stack(nn.Tanh), errors="raise") as monitor:
        monitor._loop.observer.delivery.model = "Net"
        monitor._loop.observer.delivery.remembered.add(sick[0])
        figures = [
            torchsat.plot(sick, well, monitor),
            torchsat.plot(tmp_path / "sick", str(tmp_path / "well"), monitor, metric="Health"),
            torchsat.plot(str(tmp_path), monitor, "alert_level"),
        ]
    for figure, names in zip(figures, (["run 1", "run 2"], [f"{tmp_path}/sick", f"{tmp_path}/well"], ["sick", "well"]), strict=True):
        heats, profiles = figure.axes[:6:2], figure.axes[1:6:2]
        assert [mesh(figure, at).tolist() for at in (0, 2)] == [[[0.0] * 5, [0.0, 0.25, 0.5, 0.75, None]], [[0.0] * 3]]
        told = [heat.get_title(loc="left").replace("\n", " ") for heat in heats]
        assert told[0] == f"{names[0]}: critical: b.act (tanh): saturated (init_too_large), since step 1"
        assert told[1] == f"{names[1]}: healthy: no alert was raised"
        assert told[2] == "Net: healthy: no alert was raised"
        assert {heat.get_xlim() for heat in heats} == {(0.0, 5.0)}
        assert {heat.collections[0].norm.vmax for heat in heats} == {1.0}
        assert [profile.get_title() for profile in profiles] == ["at step 4", "at step 2", "at step 0"]
    figure = torchsat.plot(sick, well, "grad_z_rms")
    scales = {(heat.collections[0].norm.vmin, heat.collections[0].norm.vmax) for heat in figure.axes[:4:2] if heat.collections}
    assert len(scales) <= 1
    bare = torchsat.plot(sick, Snapshot(0, 0.0, (record("a", saturated=None),)), "saturated")
    assert [text.get_text() for text in bare.axes[2].texts] == ["no site has the number 'Saturated'"]
    for each in (*figures, figure, bare):
        each.savefig(tmp_path / "runs.png")


def test_a_history_is_the_run_and_stays_bounded() -> None:
    told, history = snapshots(), History()
    for each in told:
        history.add(each)
    ours, theirs = history.series("run"), from_snapshots("run", told)
    assert ours.describe() == theirs.describe()
    assert all(np.array_equal(ours.values[name], theirs.values[name], equal_nan=True) for name in theirs.values)
    assert np.array_equal(history.histograms("a.act").values, histograms("a.act", told).values)
    assert history.heads("a.act").values.shape == heads("a.act", told).values.shape == (0, 0)
    plain = dataclasses.replace(told[0], alerts=())
    for step in range(5, 5 * MOST):
        history.add(dataclasses.replace(plain, step=step, time=float(step)))
        assert len(history) <= MOST
        assert history._rows[-1].records.steps == [step]
    steps = history.series().steps
    assert steps[0] == 0
    assert set(np.diff(steps)[:-1]) == {8}
    # What was alerted at an observation that is no longer kept is still an alert.
    assert [each.alert.site for each in history.series().alerts] == ["b.act"]


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(ValueError, match="there is no metric 'saturatd'; did you mean 'saturated'"):
        torchsat.plot(snapshots(), "saturatd")
    with pytest.raises(KeyError, match=r"no site 'a'; near it: a\.act"):
        torchsat.plot(snapshots(), site="a")
    with pytest.raises(ValueError, match="nothing has been observed yet"):
        torchsat.watch(nn.Tanh()).plot()
    with pytest.raises(ValueError, match="a site is drawn of one run at a time"):
        torchsat.plot(snapshots(), snapshots(), site="a.act")
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        torchsat.plot(snapshots(), "nowhere")
    with pytest.raises(TypeError, match="no run is given"):
        torchsat.plot()
    with pytest.raises(TypeError, match="run is a int; allowed are a directory, snapshots, and a Monitor"):
        torchsat.plot(3)  # type: ignore[arg-type]
    figure = torchsat.plot(Snapshot(0, 0.0, (record("a"),)), "entropy_min")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no site has the number 'Attention entropy'"]


def test_five_hundred_sites_with_names_that_are_no_markup_can_be_drawn(tmp_path: Path) -> None:
    records = tuple(record(f"$blocks_{{{k}}}^." + "x" * (k % 90), alert_level=math.nan if k % 7 == 0 else 0.5) for k in range(500))
    figure = torchsat.plot([Snapshot(step, 0.0, records) for step in range(3)])
    figure.savefig(tmp_path / "large.png")
    assert figure.get_size_inches()[1] <= 12
    assert len(figure.axes[0].get_yticks()) <= 60


def test_a_figure_changes_nothing_of_matplotlib_and_needs_no_pyplot(tmp_path: Path) -> None:
    """In a process of its own, since this one may have imported pyplot."""
    code = (
        "import sys, matplotlib, torchsat\nfrom tests.test_figures import snapshots\nbefore = matplotlib.rcParams.copy()\n"
        f"torchsat.plot(snapshots()).savefig({str(tmp_path / 'run.png')!r})\npng, size = torchsat.plot(snapshots())._repr_png_()\n"
        "assert png[:4] == b'\\x89PNG' and size['width'] == 1000, size\nassert 'matplotlib.pyplot' not in sys.modules\n"
        "assert all(before[key] == matplotlib.rcParams[key] for key in before if key != 'backend')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_a_dark_style_has_dark_colours() -> None:
    light = torchsat.plot(snapshots()).axes[0].collections[0].get_cmap()
    from matplotlib import style

    with style.context("dark_background"):
        dark = torchsat.plot(snapshots()).axes[0].collections[0].get_cmap()
    assert sum(light(0.0)[:3]) > 2.5
    assert sum(dark(0.0)[:3]) < 0.6


def test_a_figure_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "torchsat.figures", raising=False)
    trials = Trials((Trial("as it is", "nothing", (1.0,)),))
    for draw in (lambda: torchsat.plot(snapshots()), trials.plot, lambda: trials.picture(tmp_path / "trials.png")):
        with pytest.raises(ModuleNotFoundError, match="a figure needs matplotlib: pip install matplotlib"):
            draw()
